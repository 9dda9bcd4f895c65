"""Checkpoints: a Hugging Face model folder plus optimizer.safetensors and state.json.

Written beside, synced, read back, renamed. state.json comes last and holds the size and sha256 of every other
file, so a folder that a crash or a bad disk has damaged is recognised and passed over. No pickle. While training goes
on, saver.py writes them.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt2box.checkpoint.metadata import TrainState, read_state, write_state
from gpt2box.checkpoint.retention import folder_name, point_to_last_and_best, recover
from gpt2box.checkpoint.safetensors_io import Tensors, read_tensors, write_tensors
from gpt2box.data.downloads import sha256_of
from gpt2box.data.tokenizer import Tokenizer
from gpt2box.distributed.fsdp import outline, whole
from gpt2box.errors import BadInput, Damaged, VolumeUnwritable, printable, why
from gpt2box.model.gpt2 import GPT2
from gpt2box.model.hf_weights import PREFIX, copy_from_hub, hub_config, hub_view, hub_views, load_hub, stored_tensors
from gpt2box.model.lora import adapters
from gpt2box.optim.low_memory_adamw import LeanAdamW, reset
from gpt2box.utils.files import check_mark, discard, fsync_dir, locked
from gpt2box.utils.paths import fix_hint
from gpt2box.utils.progress import size
from gpt2box.utils.ranks import ranks

ADAPTERS = "adapters.safetensors"

Files = dict[str, Tensors]  # tensors by the name of their file


def save(folder: Path, model: GPT2, optimizer: torch.optim.Optimizer, state: TrainState, tokenizer: Tokenizer) -> Path:
    """Write a checkpoint of `state.step` under `folder`, at once and from the tensors themselves; see `publish`."""
    check_space(folder, checkpoint_bytes(model, optimizer, state), state.step)
    files, config = contents(model, optimizer, state), config_of(model, tokenizer)
    return publish(folder, files, config, state, tokenizer)


def publish(
    folder: Path, files: Files, config: dict[str, Any], state: TrainState, tokenizer: Tokenizer, mark: str = ""
) -> Path:
    """Write a checkpoint, read it back, and only then give it its name; point `last` at it, `best` if it is the best.

    `mark`: of the run's lock; where another lies there by now, nothing in the folder is touched any more.

    Raises:
        VolumeUnwritable: no space, no permission, or what is read back is not what was written. Earlier checkpoints are
            untouched, and nothing is left of this one.
    """
    final = folder / folder_name(state.step)
    temporary = folder / f".{final.name}.tmp"
    retired = folder / f".{final.name}.old"
    lock = folder.parent / ".lock"
    check_mark(lock, mark)
    with turn(folder):
        try:
            make_folder(folder)
            recover(folder)
            temporary.mkdir()
            write_into(temporary, files, config, state, tokenizer)
            read_state(temporary)
            check_mark(lock, mark)
            if final.exists():  # the same step once more, after its evaluation
                os.rename(final, retired)
            os.rename(temporary, final)
            fsync_dir(folder)
            discard(retired)
            point_to_last_and_best(folder, state)
        except (OSError, Damaged) as error:
            check_mark(lock, mark)
            with suppress(OSError):
                recover(folder)
            raise unwritable(final, error, bytes_of(files)) from error
    return final


@contextmanager
def turn(folder: Path) -> Iterator[None]:
    """Of several ranks whose memory runs out, each saves, and would tidy up what another writes."""
    if ranks().count == 1:
        yield
        return
    with locked(folder.parent / ".saving.lock", "a checkpoint is written", wait=True):
        yield


def unwritable(final: Path, error: Exception, needed: int) -> VolumeUnwritable:
    """What to say where a checkpoint could not be saved."""
    code = getattr(error, "errno", None)
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        expected, next_step = "permission to write", fix_hint(final.parent)
    elif code in (errno.ENOSPC, errno.EDQUOT):
        expected, next_step = f"{size(needed)} free", "make room; the same command goes on from the last checkpoint"
    elif code == errno.EFBIG:
        expected, next_step = f"files of up to {size(needed)}", "see ulimit -f; a disk with FAT has none above 4 GiB"
    else:
        expected = "a disk that takes what is written, and gives it back"
        next_step = "the system's log may say more; the same command goes on from the last checkpoint"
    return VolumeUnwritable(f"cannot save {final}: {why(error)}", expected, next_step)


def make_folder(folder: Path) -> None:
    """Durable, as its content will be. The run's own folder is there, or its volume is gone.

    Raises:
        OSError: among others where it is gone: made anew it would lie on another disk.
    """
    if not folder.exists():
        folder.mkdir()
        for parent in (folder.parent, folder.parent.parent):
            fsync_dir(parent)


def write_into(folder: Path, files: Files, config: dict[str, Any], state: TrainState, tokenizer: Tokenizer) -> None:
    """All files of a checkpoint, synced, state.json last; then the folder."""
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tokenizer.save(folder)
    described = {}
    for path in sorted(folder.iterdir()):
        described[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    for name, tensors in files.items():
        sha256 = write_tensors(folder / name, tensors)
        described[name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256}
        forget_pages(folder / name)
    write_state(folder, state, described)
    fsync_dir(folder)


def forget_pages(path: Path) -> None:
    """Have the system drop its copy of a synced file, so that reading it back asks the disk, and memory stays free."""
    with open(path, "rb") as file, suppress(OSError):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def contents(model: GPT2, optimizer: torch.optim.Optimizer, state: TrainState) -> Files:
    """What a checkpoint's files hold, in the layout on disk but where it lies, not copied."""
    files: Files = {"model.safetensors": lambda get: hub_views(model, get)}
    if trained := adapters(model):
        files[ADAPTERS] = lambda get: ((name, get(parameter.detach())) for name, parameter in trained.items())
    # Before the first step all averages are zero.
    files["optimizer.safetensors"] = lambda get: optimizer_state(model, optimizer, get) if state.optimizer_steps else ()
    return files


def bytes_of(files: Files) -> int:
    """Size on disk, but for small files."""
    return sum(tensor.numel() * tensor.element_size() for tensors in files.values() for _, tensor in tensors(outline))


def config_of(model: GPT2, tokenizer: Tokenizer) -> dict[str, Any]:
    """config.json; adapters are stored added in, in float32."""
    dtype = torch.float32 if adapters(model) else model.wte.weight.dtype
    return hub_config(model.shape, model.dropout, tokenizer.end_of_text, dtype)


def optimizer_state(
    model: GPT2, optimizer: torch.optim.Optimizer, get: Callable[[Tensor], Tensor] = whole
) -> Iterator[tuple[str, Tensor]]:
    """All it keeps: averages in the layout of the weights, and else (8 bits, a number a row) as it lies in memory."""
    parameters = trained_parameters(model)
    kept = [(name, *item) for name, parameter in parameters.items() for item in optimizer.state[parameter].items()]
    for name, key, tensor in sorted(kept, key=lambda item: -item[2].element_size()):
        if key == "step" and not isinstance(optimizer, LeanAdamW):  # whose tensors may have left out different steps
            continue
        alike = key != "step" and tensor.shape == parameters[name].shape
        tensor = get(tensor)
        yield f"{key}.{name}", hub_view(name, tensor, model.shape.vocab_size) if alike else tensor


def shapes_of(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, torch.Size]:
    """By name."""
    return {name: tensor.shape for name, tensor in tensors}


def trained_parameters(model: GPT2) -> dict[str, torch.nn.Parameter]:
    """All parameters by name, or of a model with adapters those of the adapters."""
    return adapters(model) or dict(model.named_parameters())


def checkpoint_bytes(model: GPT2, optimizer: torch.optim.Optimizer, state: TrainState) -> int:
    """Size of a checkpoint on disk, but for small files."""
    own = model.parameters()
    weights = sum(4 * p.numel() for p in own) if adapters(model) else sum(p.nbytes for p in own)
    if not state.optimizer_steps:
        return weights
    return weights + sum(int(tensor.nbytes) for entry in optimizer.state.values() for tensor in entry.values())


def check_space(folder: Path, needed: int, step: int) -> None:
    """Before anything is written.

    Raises:
        VolumeUnwritable: as where it runs out, but with nothing to tidy up.
    """
    there = folder if folder.exists() else folder.parent
    try:
        if shutil.disk_usage(there).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise unwritable(folder / folder_name(step), error, needed) from error


@torch.no_grad()
def load_weights(folder: Path, model: GPT2) -> None:
    """The weights of a checkpoint; of a model with adapters these alone, onto the weights that they were trained on.

    Raises:
        BadInput: the model was given other weights than those; or see load_hub.
        Damaged: the adapters are not this network's.
    """
    trained = adapters(model)
    if not trained:
        return load_hub(model, folder, tensors=read_tensors(folder / "model.safetensors"))
    own = dict(model.named_parameters())
    for key, stored in stored_tensors(folder):
        name = key.removeprefix(PREFIX)
        # Norms and biases stand for all: adapters leave them as they are, and no two trainings end in the same.
        if stored.dim() == 1 and name in own and not torch.equal(stored, own[name].float().cpu()):
            raise BadInput(
                f"the adapters in {folder} were trained on other weights than these: {name} differs",
                "the weights that init_from had when the run began",
            )
    missing = dict(trained)
    for name, tensor in read_tensors(folder / ADAPTERS):
        parameter = missing.pop(name, None)
        if parameter is None or parameter.shape != tensor.shape:
            what = f"{folder / ADAPTERS}: {printable(name)} of shape {list(tensor.shape)}"
            raise Damaged(what, "adapters as lora_rank has them")
        parameter.copy_(tensor)
    if missing:
        raise Damaged(f"{folder / ADAPTERS}: without {next(iter(missing))}", "adapters of all matrices")


@torch.no_grad()
def restore(folder: Path, model: GPT2, optimizer: torch.optim.Optimizer, state: TrainState) -> None:
    """Read weights and averages of a whole checkpoint into the existing tensors.

    Raises:
        BadInput, Damaged: they are not those of this network; see load_weights.
    """
    load_weights(folder, model)
    parameters = trained_parameters(model)
    read: set[str] = set()
    wanted = shapes_of(optimizer_state(model, optimizer, outline)) if state.optimizer_steps else {}
    for full_name, tensor in read_tensors(folder / "optimizer.safetensors"):
        key, _, name = full_name.partition(".")
        if wanted.pop(full_name, () if key == "step" else None) != tensor.shape:
            what = f"{folder}/optimizer.safetensors: {printable(full_name)} of shape {list(tensor.shape)}"
            raise Damaged(what, "the averages of the weights beside it")
        entry = optimizer.state[parameters[name]]
        if name not in read and key != "step":  # where each has its own, that is read, too
            entry["step"].fill_(float(state.optimizer_steps))
        if entry[key].shape == parameters[name].shape:
            copy_from_hub(name, entry[key], tensor)
        else:
            entry[key].copy_(tensor)
        read.add(name)
    if missing := [name for name in wanted if not name.startswith("step.")]:
        raise Damaged(f"{folder}/optimizer.safetensors: without {missing[0]}", "the averages of all weights")
    for name in parameters.keys() - read:  # of step 0
        reset(optimizer.state[parameters[name]])
