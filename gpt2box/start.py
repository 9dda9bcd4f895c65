"""How a training job begins: its dataset, the checkpoint it goes on from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpt2box.config import CHANGEABLE, Config
from gpt2box.data.batches import check_long_enough
from gpt2box.data.folder import check_content
from gpt2box.data.tokenizer import prompt_ids
from gpt2box.data.tokens import SPLITS, Dataset, open_dataset
from gpt2box.errors import BadInput, Damaged
from gpt2box.files import locked, mark, read_object, whole
from gpt2box.inputs import bring, has_dataset
from gpt2box.paths import dataset_dir, make_writable, shown
from gpt2box.progress import kept_log, say, size
from gpt2box.run_records import check_unchanged, read_manifest, stamps_of
from gpt2box.stop import raised
from gpt2box.training import kept, metrics
from gpt2box.training.distributed import Group
from gpt2box.training.state import TrainState, parse_state, write_state


def bring_dataset(config: Config, text: Path | None, group: Group) -> Dataset:
    """The dataset, made where it is not there yet; the same on all ranks.

    Raises:
        BadInput: it is too short, lacks the prompt's characters, or is another on another machine.
    """

    def needed() -> None:
        if text or not has_dataset(config):
            with raised():
                bring(config, text)

    group.on_each_machine(needed)
    dataset = open_dataset(dataset_dir(config.dataset))
    check_long_enough({split: dataset.tokens(split) for split in SPLITS}, config.block_size)
    prompt_ids(dataset.tokenizer, config.sample_prompt)
    if len(set(group.gathered(dataset.digest))) > 1:
        raise BadInput(
            f"the dataset {config.dataset} is not the same on all machines", "equal copies, or a shared folder"
        )
    return dataset


WORTH_A_WORD = 1 << 30  # bytes: a second or more
Found = tuple[Path, TrainState, list[Damaged]]


def take(config: Config, run: Path, held: ExitStack) -> str:
    """Take the run's lock and keep its log, as long as `held` is; returns the lock's mark."""
    make_writable(run)
    held.enter_context(locked(run / ".lock", f"the run {config.name} is being trained"))
    held.enter_context(kept_log(run / "log.txt"))
    return mark(run / ".lock")


def begin(config: Config, dataset: Dataset, run: Path, allow: Sequence[str]) -> tuple[Found | None, dict[str, Any]]:
    """The checkpoint to go on from, if there is one, and the settings that were changed."""
    if stamps_of(dataset) != read_manifest(run).get("checked"):
        check_dataset(dataset)
    found, changed = kept.newest(run / "checkpoints"), {}
    if not found:
        check_none_lost(run)
    else:
        changed = check_unchanged(config, dataset, run, allow)
        if changed.keys() & set(CHANGEABLE):
            forget_losses(found[0])
            found[1].recent_losses = []
        kept.point_to_last_and_best(run / "checkpoints", found[1])
        announce_resume(config, *found)
    return found, changed


def check_dataset(dataset: Dataset) -> None:
    """Whether its files are what was written: at a run's beginning, and after they were touched.

    Raises:
        Damaged: one is not.
    """
    size_bytes = sum(count for count, _ in stamps_of(dataset).values())
    if dataset.manifest and size_bytes > WORTH_A_WORD:
        say(f"comparing {size(size_bytes)} of tokens with their checksums")
    check_content(dataset.folder, dataset.manifest)


def unchanged(dataset: Dataset) -> Callable[[], None]:
    """What looks, while a run goes on, whether the dataset is still the one that it began with.

    Raises:
        Damaged: its files were touched, and are not what they were.
    """
    known = stamps_of(dataset)

    def check() -> None:
        nonlocal known
        now = stamps_of(dataset)
        if now == known:
            return
        if not dataset.manifest or not now:
            raise Damaged(
                f"the dataset {dataset.folder} was changed or removed while the run trained",
                "the same tokens until the end",
                "put it back; the same command then goes on from the last checkpoint",
            )
        check_content(dataset.folder, dataset.manifest)
        known = now

    return check


def check_none_lost(run: Path) -> None:
    """Before a run begins that has no checkpoint: whether it had one.

    Raises:
        Damaged: it went so far that the first had been written.
    """
    interval = whole(read_object(run / "plan.json").get("save_interval"))
    step = max((row["step"] for row in metrics.stream(run / "metrics.jsonl") if row["kind"] == "train"), default=0)
    if 0 < 2 * interval < step:  # the second save waits for the first
        raise Damaged(
            f"{run.name} was trained to step {step:,}, and its checkpoints are gone",
            f"them in {shown(run / 'checkpoints')}",
            f"mount their disk or put them back; to begin anew: another --name, or remove {shown(run)}",
        )


def forget_losses(folder: Path) -> None:
    """With another dropout, say, a loss far above those before is none that must not be.

    On the disk, and before config.yaml has the change: a run that is killed now goes on as one that is not. Earlier
    checkpoints keep theirs, with which the steps after them were done.
    """
    state, files = parse_state(folder)
    write_state(folder, replace(state, recent_losses=[]), files)


def announce_resume(config: Config, folder: Path, state: TrainState, passed_over: list[Any]) -> None:
    """Say where the run goes on, and which checkpoints were damaged."""
    for fault in passed_over:
        say(f"note: passed over a damaged checkpoint: {fault.found}")
    if state.step < config.max_steps:
        say(f"resuming from {folder} at step {state.step:,}")
