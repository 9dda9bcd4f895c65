"""Compare the sessions that a run's manifest.json records: machine, software and execution plan of each."""

import json
import time
from pathlib import Path
from typing import Any

from gpt2box.config.schema import CHANGEABLE
from gpt2box.planner.run_plan import RunPlan
from gpt2box.utils.files import read_json_object, write_atomically

# Execution settings recorded per session: another value adds numbers in another order. "way" in manifest.json.
EXECUTION_KEYS = (
    "micro_batch_size", "grad_accum_steps", "activation_checkpointing", "loss_chunk_tokens", "compile", "dtype",
    "deterministic", "ranks", "shard",
)  # fmt: skip
CHANGEABLE_IN_SESSION = ("micro_batch_size", "grad_accum_steps", "activation_checkpointing")  # after out of memory
BIT_RELEVANT_FACTS = ("way.", "gpu.", "packages.torch", "packages.triton", "environment.", "device_type")
BIT_RELEVANT_FACTS_ON_CPU = ("cpu.model", "cpu.instructions", "cpu.threads")
CHANGEABLE_SETTINGS = {"max_steps", *CHANGEABLE}  # may change between sessions and affect what the model learns
IGNORED_FACTS = ("started", "step", "device", "cpu.cores", "ways")
CUDA_ONLY_FACTS = ("environment.CUBLAS_WORKSPACE_CONFIG",)  # gpt2box sets it on a CPU too, without effect


def make_session(facts: dict[str, Any], plan: RunPlan, step: int, changed: dict[str, Any]) -> dict[str, Any]:
    """Describe a session that starts at `step`: its facts (system/provenance.py), execution and changed settings."""
    execution = {key: value for key, value in plan.as_dict().items() if key in EXECUTION_KEYS}
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    device_type = plan.derived.device.partition(":")[0]
    return {
        "started": started, **facts, "device_type": device_type, "step": step, "way": execution, "changed": changed
    }  # fmt: skip


def flatten_facts(session: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a session to dotted names such as cpu.threads."""
    flat: dict[str, Any] = {}
    for key, value in session.items():
        name = f"{prefix}{key}"
        flat |= flatten_facts(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def session_differences(before: dict[str, Any], now: dict[str, Any], bits_only: bool = False) -> list[str]:
    """List the facts that differ between two sessions; `bits_only`: only those that can change a step's bits.

    A fact that only one session records is skipped, except for environment variables.
    """
    old, new = flatten_facts(before), flatten_facts(now)
    on_cpu = now.get("device_type") == "cpu"
    relevant = BIT_RELEVANT_FACTS + BIT_RELEVANT_FACTS_ON_CPU * on_cpu
    ignored = IGNORED_FACTS + CUDA_ONLY_FACTS * on_cpu
    lines = []
    for name in sorted(old.keys() | new.keys()):
        is_variable = name.startswith("environment.") and "environment" in before
        is_comparable = is_variable or (name in old and name in new)
        if name in ignored or name.startswith("changed.") or not is_comparable:
            continue
        if bits_only and not name.startswith(relevant):
            continue
        if old.get(name) != new.get(name):
            lines.append(f"{name}: {format_fact(old.get(name))} before, {format_fact(new.get(name))} now")
    return lines


def format_fact(value: object) -> str:
    """Format a fact for a message."""
    return "nothing" if value in (None, "") else str(value)


def recorded_sessions(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Return all sessions of a manifest, unchecked."""
    sessions = manifest.get("sessions")
    return [each for each in sessions if isinstance(each, dict)] if isinstance(sessions, list) else []


def valid_sessions(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the sessions of a manifest that have a step and changes: older versions and bad disks leave others."""
    sessions = recorded_sessions(manifest)
    return [each for each in sessions if type(each.get("step")) is int and isinstance(each.get("changed"), dict)]


def session_start_steps(sessions: list[dict[str, Any]]) -> list[int]:
    """Return the step from which each session counts: a later session may have resumed from an earlier step."""
    steps = [min(step for step, _ in execution_changes(each)) for each in sessions]
    return [min(steps[index:]) for index in range(len(steps))]


def execution_changes(session: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """Return a session's executions in order, each with the step from which it held.

    A step may repeat an earlier one: after out of memory or non-finite numbers, a run goes back.
    """
    first, later = session.get("way"), session.get("ways")
    changes = [(int(session["step"]), first if isinstance(first, dict) else {})]
    for each in later if isinstance(later, list) else []:
        if isinstance(each, dict) and type(each.get("step")) is int:
            changes.append((each["step"], {**changes[0][1], **changeable_execution(each)}))
    return changes


def session_at_step(sessions: list[dict[str, Any]], step: int) -> dict[str, Any]:
    """Return the session that last did the step after `step`, with the execution ("way") of that step."""
    starts = session_start_steps(sessions)
    index = max((index for index, start in enumerate(starts) if start <= step), default=0)
    executions = [execution for start, execution in execution_changes(sessions[index]) if start <= step]
    return {**sessions[index], "way": executions[-1] if executions else {}}


def execution_changes_after(sessions: list[dict[str, Any]], step: int) -> dict[int, dict[str, Any]]:
    """Return each change of execution after `step`, by the step from which it held."""
    changes, before = {}, session_at_step(sessions, step)["way"]
    for later in sorted({start for each in sessions for start, _ in execution_changes(each) if start > step}):
        execution = session_at_step(sessions, later)["way"]
        if changeable_execution(execution) != changeable_execution(before):
            changes[later] = before = execution
    return changes


def changeable_execution(execution: dict[str, Any]) -> dict[str, Any]:
    """Return the part of an execution that may change within a session."""
    return {key: execution[key] for key in CHANGEABLE_IN_SESSION if key in execution}


def record_execution(run: Path, plan: RunPlan, step: int) -> None:
    """Record in manifest.json that the session executes the steps after `step` as `plan` says, if that is new.

    Raises OSError: the file cannot be written.
    """
    path = run / "manifest.json"
    manifest = read_json_object(path)
    sessions = valid_sessions(manifest)
    if not sessions:
        return  # the manifest was lost: there is no session to add to
    now, session = changeable_execution(plan.as_dict()), sessions[-1]
    steps, executions = zip(*execution_changes(session), strict=True)
    if max(steps) <= step and changeable_execution(executions[-1]) == now:
        return
    earlier = session.get("ways")
    session["ways"] = [*(earlier if isinstance(earlier, list) else []), {"step": step, **now}]
    write_atomically(path, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
