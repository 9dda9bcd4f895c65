"""The sessions of a run, as its manifest.json has them: what each ran on, and what between two of them differs."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from gpt2box.config import CHANGEABLE
from gpt2box.planning.plan import RunPlan

# How the steps are done: other numbers of these add in another order.
WAY = (
    "micro_batch_size", "grad_accum_steps", "activation_checkpointing", "loss_chunk_tokens", "compile", "dtype",
    "deterministic", "ranks", "shard",
)  # fmt: skip
OF_BITS = ("way.", "gpu.", "packages.torch", "packages.triton", "environment.", "device_type")
OF_BITS_ON_CPU = ("cpu.model", "cpu.instructions", "cpu.threads")
OF_COURSE = {"max_steps", *CHANGEABLE}  # settings that may change, and with them what is learned
NOT_COMPARED = ("started", "step", "device", "cpu.cores")


def session_of(facts: dict[str, Any], plan: RunPlan, step: int, changed: dict[str, Any]) -> dict[str, Any]:
    """A session that begins at a step: its facts (machine/provenance.py), its way, the settings it changed."""
    way = {key: value for key, value in asdict(plan).items() if key in WAY}
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    facts = {"started": started, **facts}
    return {**facts, "device_type": plan.device.partition(":")[0], "step": step, "way": way, "changed": changed}


def flat(session: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A session's facts by dotted names, such as cpu.threads."""
    found: dict[str, Any] = {}
    for key, value in session.items():
        name = f"{prefix}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found


def differences(before: dict[str, Any], now: dict[str, Any], of_bits: bool = False) -> list[str]:
    """Facts that differ, in words; `of_bits`: only those by which alone a step's bits come out otherwise.

    What only one of the two knows of is left out, but for the environment's variables.
    """
    old, new = flat(before), flat(now)
    wanted = OF_BITS + (OF_BITS_ON_CPU if now.get("device_type") == "cpu" else ())
    lines = []
    for name in sorted(old.keys() | new.keys()):
        variable = name.startswith("environment.") and "environment" in before
        if name in NOT_COMPARED or name.startswith("changed.") or not (variable or (name in old and name in new)):
            continue
        if of_bits and not name.startswith(wanted):
            continue
        if old.get(name) != new.get(name):
            lines.append(f"{name}: {shown(old.get(name))} before, {shown(new.get(name))} now")
    return lines


def shown(value: object) -> str:
    """A fact in a message."""
    return "nothing" if value in (None, "") else str(value)


def sessions_in(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Of a manifest.json; those that an older program wrote or a bad disk damaged are left out."""
    found = manifest.get("sessions")
    listed = [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []
    return [each for each in listed if type(each.get("step")) is int and isinstance(each.get("changed"), dict)]


def began_at(sessions: list[dict[str, Any]]) -> list[int]:
    """The step from which on each session's changes hold: a later session may have gone on from an earlier step."""
    steps = [each["step"] for each in sessions]
    return [min(steps[index:]) for index in range(len(steps))]
