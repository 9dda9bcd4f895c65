"""The sessions of a run, as its manifest.json has them: what each ran on, and what between two of them differs."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpt2box.config.schema import CHANGEABLE
from gpt2box.planner.run_plan import RunPlan
from gpt2box.runs.plan_file import flatten_plan
from gpt2box.utils.files import read_object, write_atomically

# How the steps are done: other numbers of these add in another order.
EXECUTION_KEYS = (
    "micro_batch_size", "grad_accum_steps", "activation_checkpointing", "loss_chunk_tokens", "compile", "dtype",
    "deterministic", "ranks", "shard",
)  # fmt: skip
CHANGEABLE_IN_SESSION = ("micro_batch_size", "grad_accum_steps", "activation_checkpointing")
BIT_RELEVANT_FACTS = ("way.", "gpu.", "packages.torch", "packages.triton", "environment.", "device_type")
BIT_RELEVANT_FACTS_ON_CPU = ("cpu.model", "cpu.instructions", "cpu.threads")
CHANGEABLE_SETTINGS = {"max_steps", *CHANGEABLE}  # settings that may change, and with them what is learned
IGNORED_FACTS = ("started", "step", "device", "cpu.cores", "ways")
CUDA_ONLY_FACTS = ("environment.CUBLAS_WORKSPACE_CONFIG",)  # says nothing on a CPU; the program sets it there, too


def make_session(facts: dict[str, Any], plan: RunPlan, step: int, changed: dict[str, Any]) -> dict[str, Any]:
    """A session that begins at a step: its facts (machine/provenance.py), its way, the settings it changed."""
    way = {key: value for key, value in flatten_plan(asdict(plan)).items() if key in EXECUTION_KEYS}
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    facts = {"started": started, **facts}
    return {**facts, "device_type": plan.device.partition(":")[0], "step": step, "way": way, "changed": changed}


def flatten_facts(session: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A session's facts by dotted names, such as cpu.threads."""
    found: dict[str, Any] = {}
    for key, value in session.items():
        name = f"{prefix}{key}"
        found |= flatten_facts(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found


def session_differences(before: dict[str, Any], now: dict[str, Any], of_bits: bool = False) -> list[str]:
    """Facts that differ, in words; `of_bits`: only those by which alone a step's bits come out otherwise.

    What only one of the two knows of is left out, but for the environment's variables.
    """
    old, new = flatten_facts(before), flatten_facts(now)
    on_cpu = now.get("device_type") == "cpu"
    wanted, left_out = BIT_RELEVANT_FACTS + BIT_RELEVANT_FACTS_ON_CPU * on_cpu, IGNORED_FACTS + CUDA_ONLY_FACTS * on_cpu
    lines = []
    for name in sorted(old.keys() | new.keys()):
        variable = name.startswith("environment.") and "environment" in before
        if name in left_out or name.startswith("changed.") or not (variable or (name in old and name in new)):
            continue
        if of_bits and not name.startswith(wanted):
            continue
        if old.get(name) != new.get(name):
            lines.append(f"{name}: {format_fact(old.get(name))} before, {format_fact(new.get(name))} now")
    return lines


def format_fact(value: object) -> str:
    """A fact in a message."""
    return "nothing" if value in (None, "") else str(value)


def recorded_sessions(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """All sessions of a manifest.json, whatever is said of them."""
    found = manifest.get("sessions")
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def valid_sessions(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The same without those that an older program wrote or a bad disk damaged."""
    listed = recorded_sessions(manifest)
    return [each for each in listed if type(each.get("step")) is int and isinstance(each.get("changed"), dict)]


def session_start_steps(sessions: list[dict[str, Any]]) -> list[int]:
    """The step from which on each session's changes hold: a later session may have gone on from an earlier step."""
    steps = [min(step for step, _ in execution_changes(each)) for each in sessions]
    return [min(steps[index:]) for index in range(len(steps))]


def execution_changes(session: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """A session's ways in the order in which it took them, each with the step from which on it held.

    A step may be one that was done before: where memory ran out half-way, or numbers were not finite, a run goes back.
    """
    way, later = session.get("way"), session.get("ways")
    found = [(int(session["step"]), way if isinstance(way, dict) else {})]
    for each in later if isinstance(later, list) else []:
        if isinstance(each, dict) and type(each.get("step")) is int:
            found.append(
                (each["step"], {**found[0][1], **{key: each[key] for key in CHANGEABLE_IN_SESSION if key in each}})
            )
    return found


def session_at_step(sessions: list[dict[str, Any]], step: int) -> dict[str, Any]:
    """The session that did the step after `step`, for the last time if several did, with the way that it did it in."""
    began = session_start_steps(sessions)
    index = max((index for index, first in enumerate(began) if first <= step), default=0)
    held = [way for first, way in execution_changes(sessions[index]) if first <= step]
    return {**sessions[index], "way": held[-1] if held else {}}


def execution_changes_after(sessions: list[dict[str, Any]], step: int) -> dict[int, dict[str, Any]]:
    """The ways that the steps after `step` were done in, where another than before, by the step from which on."""
    found, before = {}, session_at_step(sessions, step)["way"]
    for later in sorted({first for each in sessions for first, _ in execution_changes(each) if first > step}):
        way = session_at_step(sessions, later)["way"]
        if changeable_execution(way) != changeable_execution(before):
            found[later] = before = way
    return found


def changeable_execution(way: dict[str, Any]) -> dict[str, Any]:
    """Of a way what may change inside a session."""
    return {key: way[key] for key in CHANGEABLE_IN_SESSION if key in way}


def record_execution(run: Path, plan: RunPlan, step: int) -> None:
    """Note in a run's manifest.json that the session does its steps in this way from `step` on, unless it says so.

    Raises:
        OSError: it cannot be written.
    """
    path = run / "manifest.json"
    manifest = read_object(path)
    sessions = valid_sessions(manifest)
    if not sessions:
        return  # it never said what the session ran on
    now, session = changeable_execution(flatten_plan(asdict(plan))), sessions[-1]
    steps, ways = zip(*execution_changes(session), strict=True)
    if max(steps) <= step and changeable_execution(ways[-1]) == now:
        return
    earlier = session.get("ways")
    session["ways"] = [*(earlier if isinstance(earlier, list) else []), {"step": step, **now}]
    write_atomically(path, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
