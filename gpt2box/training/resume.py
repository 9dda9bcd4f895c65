"""Open a run's dataset, find the checkpoint to resume from, and verify both."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from gpt2box.checkpoint import retention
from gpt2box.checkpoint.fingerprint import fingerprint_run_state
from gpt2box.checkpoint.metadata import TrainState, parse_state, write_state
from gpt2box.config.loader import read_yaml
from gpt2box.config.schema import CHANGEABLE, Config
from gpt2box.data.dataloader import check_split_lengths
from gpt2box.data.dataset import SPLITS, Dataset, open_dataset
from gpt2box.data.dataset_folder import check_content
from gpt2box.data.pretrained import load_shape
from gpt2box.data.tokenizer import encode_prompt, load_tokenizer
from gpt2box.distributed.group import RankGroup
from gpt2box.errors import BadInput, Damaged
from gpt2box.model.gpt2 import GPT2
from gpt2box.optim.factory import Optimizer
from gpt2box.preflight.requirements import fetch_requirements, has_dataset
from gpt2box.runs import metrics
from gpt2box.runs.manifest import (
    LARGE_FILE_BYTES,
    check_settings_unchanged,
    describe_dataset,
    file_stamps,
    is_same_dataset,
    read_manifest,
    read_plan,
)
from gpt2box.runs.sessions import session_at_step, valid_sessions
from gpt2box.runs.view import as_mapping
from gpt2box.utils.files import count_or_zero, file_lock, open_regular, read_json_object, write_lock_token
from gpt2box.utils.paths import dataset_dir, display_path, ensure_writable
from gpt2box.utils.progress import format_bytes, log_line, run_log_file
from gpt2box.utils.signals import exit_on_signal


def load_or_prepare_dataset(config: Config, text: Path | None, group: RankGroup) -> Dataset:
    """Open the dataset on all ranks; prepare it first if it is missing.

    Raises:
        BadInput: It is too short, lacks the prompt's characters, or differs between machines.
    """

    def needed() -> None:
        if text or not has_dataset(config):
            with exit_on_signal():
                fetch_requirements(config, text)

    group.run_once_per_host(needed)
    dataset = open_dataset(dataset_dir(config.dataset))
    check_split_lengths({split: dataset.tokens(split) for split in SPLITS}, config.block_size)
    encode_prompt(dataset.tokenizer, config.sample_prompt)
    if len(set(group.all_gather(dataset.digest))) > 1:
        raise BadInput(
            f"the dataset {config.dataset} is not the same on all machines", "equal copies, or a shared folder"
        )
    return dataset


# The last line of a session in log.txt, see job.report.
CLEAN_END = re.compile(r".{21}([^ ]+: (finished|stopped early.*) at step [1-9]|stopped by .* at step [1-9].*, saved$)")
ResumePoint = tuple[Path, TrainState, list[Damaged]]


def acquire_run_lock(config: Config, run: Path, stack: ExitStack) -> str:
    """Acquire the run's lock and open its log until `stack` closes; return the lock token."""
    ensure_writable(run)
    stack.enter_context(file_lock(run / ".lock", f"the run {config.name} is being trained"))
    stack.enter_context(run_log_file(run / "log.txt"))
    return write_lock_token(run / ".lock")


def find_resume_point(
    config: Config, dataset: Dataset, run: Path, allow: Sequence[str]
) -> tuple[ResumePoint | None, dict[str, Any]]:
    """Return the checkpoint to resume from, or None, and the changed settings."""
    if file_stamps(dataset) != read_manifest(run).get("checked"):
        check_dataset(dataset)
    found, changed = retention.find_newest_checkpoint(run / "checkpoints"), {}
    if not found:
        check_no_checkpoint_lost(run)
    else:
        changed = check_settings_unchanged(config, dataset, run, allow, found[1].step)
        check_network(run, found[0], dataset)
        if changed.keys() & set(CHANGEABLE):
            clear_recent_losses(found[0])
            found[1].recent_losses = []
        retention.update_links(run / "checkpoints", found[1])
        announce_resume(config, *found)
    return found, changed


def check_dataset(dataset: Dataset) -> None:
    """Verify the dataset's checksums.

    Raises:
        Damaged: A file has changed.
    """
    size_bytes = sum(count for count, _ in file_stamps(dataset).values())
    if dataset.manifest and size_bytes > LARGE_FILE_BYTES:
        log_line(f"comparing {format_bytes(size_bytes)} of tokens with their checksums")
    check_content(dataset.folder, dataset.manifest)


def make_dataset_check(dataset: Dataset, run: Path) -> Callable[[], None]:
    """Return a function that verifies the dataset whenever its size or mtime has changed.

    Raises (when called):
        Damaged: The content has changed.
    """
    known = file_stamps(dataset)

    def check() -> None:
        nonlocal known
        now = file_stamps(dataset)
        if now == known:
            return
        noted = read_manifest(run).get("dataset")
        if now and dataset.manifest:
            check_content(dataset.folder, dataset.manifest)
        elif not (
            now
            and noted
            and is_same_dataset(noted["splits"], describe_dataset(open_dataset(dataset.folder), {})["splits"])
        ):
            raise Damaged(
                f"the dataset {dataset.folder} was changed or removed while the run trained",
                "the same tokens until the end",
                "put it back; the same command then goes on from the last checkpoint",
            )
        known = now

    return check


def check_no_checkpoint_lost(run: Path) -> None:
    """Refuse to restart a run whose checkpoints are missing. One killed before its first save may restart.

    Raises:
        Damaged: The run had saved a checkpoint.
    """
    interval, step, best = recorded_save_interval(run), 0, set()
    for row in metrics.iter_rows(run / "metrics.jsonl"):
        step = max(step, row["step"] if row["kind"] == "train" else 0)
        if row.get("best") and row["step"] % interval:
            best.add(row["step"])
    saves = (step - 1) // interval + sum(0 < each < step for each in best)
    began = max((session["step"] for session in valid_sessions(read_json_object(run / "manifest.json"))), default=0)
    if saves < 2 and not began and not session_ended_cleanly(run):  # the second save waits for the first
        return
    reached = f"to step {max(step, began):,}" if step or began else "before"
    raise Damaged(
        f"{run.name} was trained {reached}, and its checkpoints are gone",
        f"them in {display_path(run / 'checkpoints')}",
        f"mount their disk or put them back; to begin anew: another --name, or remove {display_path(run)}",
    )


def recorded_save_interval(run: Path) -> int:
    """Return the save interval of the last session, or 2**63 if no file has it."""
    plan, manifest, settings = read_plan(run), read_json_object(run / "manifest.json"), {}
    with suppress(BadInput):
        settings = read_yaml(run / "config.yaml")
    kept_in = (plan, settings, manifest.get("settings"))
    found = [count_or_zero(each.get("save_interval")) for each in kept_in if isinstance(each, dict)]
    return next((interval for interval in found if interval > 0), 2**63)


def session_ended_cleanly(run: Path) -> bool:
    """Return True if the log shows a session that saved and ended after a step."""
    with suppress(OSError), open(run / "log.txt", encoding="utf-8", errors="replace", opener=open_regular) as log:
        return any(CLEAN_END.match(line) for line in log)
    return False


def check_network(run: Path, folder: Path, dataset: Dataset) -> None:
    """Verify that a checkpoint has this run's model shape and vocabulary; it might be another run's.

    Raises:
        Damaged: They differ.
    """
    plans = [read_plan(run), as_mapping(read_manifest(run).get("plan"))]
    shapes = [plan["shape"] for plan in plans if isinstance(plan, dict) and isinstance(plan.get("shape"), dict)]
    found, known = asdict(load_shape(folder)), shapes[0] if shapes else {}
    if differing := [key for key in found if key in known and known[key] != found[key]]:
        lines = ", ".join(f"{key} {found[key]}" for key in differing)
        wanted = ", ".join(f"{key} {known[key]}" for key in differing)
        raise foreign_checkpoint_error(folder, f"config.json has {lines}", f"the run's network: {wanted}")
    if load_tokenizer(folder).vocabulary() != dataset.tokenizer.vocabulary():
        raise foreign_checkpoint_error(folder, "another vocabulary than the dataset's", f"that of {dataset.folder}")


def verify_restored_state(run: Path, folder: Path, step: int, model: GPT2, optimizer: Optimizer) -> None:
    """Verify restored weights and optimizer state against the fingerprint in metrics.jsonl.

    Raises:
        Damaged: They differ.
    """
    sessions = valid_sessions(read_manifest(run))
    if not sessions or session_at_step(sessions, step - 1)["way"].get("shard"):
        return  # a sharded reduction may sum in another order
    rows = metrics.iter_rows(run / "metrics.jsonl")
    noted = {row.get("digest") for row in rows if row["kind"] == "train" and row["step"] == step} - {None}
    if noted and fingerprint_run_state(model, optimizer) not in noted:
        raise foreign_checkpoint_error(
            folder, f"other weights than metrics.jsonl has noted for step {step:,}", "the run's own; is it another's?"
        )


def foreign_checkpoint_error(folder: Path, found: str, expected: str) -> Damaged:
    """Return the error for an intact checkpoint that is not this run's."""
    return Damaged(
        f"{folder}: {found}",
        expected,
        f"move it away, and the run goes on from the one before; or begin another run from it: --init-from {folder}",
    )


def clear_recent_losses(folder: Path) -> None:
    """Clear the loss history of a checkpoint, since a changed setting (dropout) may legitimately raise the loss.

    Written before config.yaml changes, so that a run killed in between resumes alike. Earlier checkpoints keep their
    history: the steps after them were executed with it.
    """
    state, files = parse_state(folder)
    write_state(folder, replace(state, recent_losses=[]), files)


def announce_resume(config: Config, folder: Path, state: TrainState, passed_over: list[Any]) -> None:
    """Log the checkpoint to resume from and the damaged ones that were skipped."""
    for fault in passed_over:
        log_line(f"note: passed over a damaged checkpoint: {fault.found}")
    if state.step < config.max_steps:
        log_line(f"resuming from {folder} at step {state.step:,}")
