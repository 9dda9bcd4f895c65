"""Checkpoints: a Hugging Face model folder plus optimizer.safetensors and state.json.

A checkpoint is written to a temporary folder, synced, read back and renamed. state.json is written last and holds the
size and sha256 of every other file, so a folder damaged by a crash or a bad disk is recognised and skipped. No pickle.
async_writer.py saves without stopping the training.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt2box.checkpoint.metadata import TrainState, load_verified_state, write_state
from gpt2box.checkpoint.retention import checkpoint_name, recover_interrupted_saves, update_links
from gpt2box.checkpoint.safetensors_io import TensorSource, write_tensors
from gpt2box.data.downloads import sha256_of
from gpt2box.data.tokenizer import Tokenizer
from gpt2box.distributed.fsdp import full_tensor, meta_tensor
from gpt2box.errors import Damaged, VolumeUnwritable, describe_error
from gpt2box.model.gpt2 import GPT2
from gpt2box.model.hf_weights import hf_config, hf_tensors, hf_view
from gpt2box.model.lora import lora_parameters
from gpt2box.optim.low_memory_adamw import LowMemoryAdamW
from gpt2box.utils.files import check_lock_token, file_lock, fsync_dir, remove_path
from gpt2box.utils.paths import writable_hint
from gpt2box.utils.progress import format_bytes
from gpt2box.utils.ranks import rank_info

ADAPTERS_FILE = "adapters.safetensors"

TensorFiles = dict[str, TensorSource]  # tensors by the name of their file


def save_checkpoint(
    folder: Path, model: GPT2, optimizer: torch.optim.Optimizer, state: TrainState, tokenizer: Tokenizer
) -> Path:
    """Save a checkpoint of `state.step` synchronously, without a copy of the tensors; raises as publish_checkpoint."""
    check_disk_space(folder, checkpoint_bytes(model, optimizer, state), state.step)
    files, config = checkpoint_tensors(model, optimizer, state), checkpoint_config(model, tokenizer)
    return publish_checkpoint(folder, files, config, state, tokenizer)


def publish_checkpoint(
    folder: Path,
    files: TensorFiles,
    config: dict[str, Any],
    state: TrainState,
    tokenizer: Tokenizer,
    lock_mark: str = "",
) -> Path:
    """Write a checkpoint, verify it, rename it to its final name and update the links `last` and `best`.

    `lock_mark` identifies this process's lock on the run; if another process holds the lock by now, no file is touched.

    Raises:
        VolumeUnwritable: no space, no permission, or the disk returns other data than was written. Earlier checkpoints
            are unchanged, and nothing is left of this one.
    """
    final = folder / checkpoint_name(state.step)
    temporary = folder / f".{final.name}.tmp"
    retired = folder / f".{final.name}.old"
    lock = folder.parent / ".lock"
    check_lock_token(lock, lock_mark)
    with exclusive_save(folder):
        try:
            create_checkpoints_folder(folder)
            recover_interrupted_saves(folder)
            temporary.mkdir()
            write_checkpoint_files(temporary, files, config, state, tokenizer)
            load_verified_state(temporary)
            check_lock_token(lock, lock_mark)
            if final.exists():  # saved before the evaluation of this step
                os.rename(final, retired)
            os.rename(temporary, final)
            fsync_dir(folder)
            remove_path(retired)
            update_links(folder, state)
        except (OSError, Damaged) as error:
            check_lock_token(lock, lock_mark)
            with suppress(OSError):
                recover_interrupted_saves(folder)
            raise save_error(final, error, tensor_bytes(files)) from error
    return final


@contextmanager
def exclusive_save(folder: Path) -> Iterator[None]:
    """Let one rank save at a time.

    After an out-of-memory error on several ranks each saves, and would delete the temporary files of the others.
    """
    if rank_info().world_size == 1:
        yield
        return
    with file_lock(folder.parent / ".saving.lock", "a checkpoint is being written", wait=True):
        yield


def save_error(final: Path, error: Exception, needed: int) -> VolumeUnwritable:
    """Make the error for a checkpoint that could not be saved."""
    code = getattr(error, "errno", None)
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        expected, next_step = "permission to write", writable_hint(final.parent)
    elif code in (errno.ENOSPC, errno.EDQUOT):
        expected, next_step = (
            f"{format_bytes(needed)} free",
            "make room; the same command resumes from the last checkpoint",
        )
    elif code == errno.EFBIG:
        expected, next_step = (
            f"files of up to {format_bytes(needed)}",
            "see ulimit -f; a disk with FAT has none above 4 GiB",
        )
    else:
        expected = "a disk that stores what is written"
        next_step = "see the system's log; the same command resumes from the last checkpoint"
    return VolumeUnwritable(f"cannot save {final}: {describe_error(error)}", expected, next_step)


def create_checkpoints_folder(folder: Path) -> None:
    """Create and sync the folder of a run's checkpoints.

    Raises:
        OSError: among others if the run folder is missing: its volume was unmounted, and creating the folder again
            would write to another disk.
    """
    if not folder.exists():
        folder.mkdir()
        for parent in (folder.parent, folder.parent.parent):
            fsync_dir(parent)


def write_checkpoint_files(
    folder: Path, files: TensorFiles, config: dict[str, Any], state: TrainState, tokenizer: Tokenizer
) -> None:
    """Write and sync all files of a checkpoint, state.json last, then sync the folder."""
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tokenizer.save(folder)
    checksums = {}
    for path in sorted(folder.iterdir()):
        checksums[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    for name, tensors in files.items():
        sha256 = write_tensors(folder / name, tensors)
        checksums[name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256}
        drop_page_cache(folder / name)
    write_state(folder, state, checksums)
    fsync_dir(folder)


def drop_page_cache(path: Path) -> None:
    """Drop a synced file from the page cache, so that verifying it reads the disk, and memory stays free."""
    with open(path, "rb") as file, suppress(OSError):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def checkpoint_tensors(model: GPT2, optimizer: torch.optim.Optimizer, state: TrainState) -> TensorFiles:
    """List the tensors of each file of a checkpoint, in the layout on disk, as views of the tensors in use."""
    files: TensorFiles = {"model.safetensors": lambda get: hf_tensors(model, get)}
    if trained := lora_parameters(model):
        files[ADAPTERS_FILE] = lambda get: ((name, get(parameter.detach())) for name, parameter in trained.items())
    # Before the first step the optimizer state is zero.
    files["optimizer.safetensors"] = lambda get: (
        optimizer_tensors(model, optimizer, get) if state.optimizer_steps else ()
    )
    return files


def tensor_bytes(files: TensorFiles) -> int:
    """Return the size of all tensors in bytes."""
    return sum(
        tensor.numel() * tensor.element_size() for tensors in files.values() for _, tensor in tensors(meta_tensor)
    )


def checkpoint_config(model: GPT2, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the content of config.json. Weights with merged LoRA adapters are stored in float32."""
    dtype = torch.float32 if lora_parameters(model) else model.wte.weight.dtype
    return hf_config(model.shape, model.dropout, tokenizer.end_of_text, dtype)


def optimizer_tensors(
    model: GPT2, optimizer: torch.optim.Optimizer, get: Callable[[Tensor], Tensor] = full_tensor
) -> Iterator[tuple[str, Tensor]]:
    """Yield the optimizer state: tensors of a weight's shape in the layout of the weights, others as in memory."""
    parameters = trained_parameters(model)
    entries = [(name, *item) for name, parameter in parameters.items() for item in optimizer.state[parameter].items()]
    for name, key, tensor in sorted(entries, key=lambda item: -item[2].element_size()):
        # LowMemoryAdamW may have skipped other steps for each tensor; in PyTorch's AdamW `step` is equal for all.
        if key == "step" and not isinstance(optimizer, LowMemoryAdamW):
            continue
        has_weight_shape = key != "step" and tensor.shape == parameters[name].shape
        tensor = get(tensor)
        yield f"{key}.{name}", hf_view(name, tensor, model.shape.vocab_size) if has_weight_shape else tensor


def trained_parameters(model: GPT2) -> dict[str, torch.nn.Parameter]:
    """Return the parameters in training by name: all, or those of the LoRA adapters if the model has any."""
    return lora_parameters(model) or dict(model.named_parameters())


def checkpoint_bytes(model: GPT2, optimizer: torch.optim.Optimizer, state: TrainState) -> int:
    """Return the size of a checkpoint on disk in bytes, without the small files."""
    float32 = bool(lora_parameters(model))
    weights = sum(4 * p.numel() if float32 else p.nbytes for p in model.parameters())
    if not state.optimizer_steps:
        return weights
    return weights + sum(int(tensor.nbytes) for entry in optimizer.state.values() for tensor in entry.values())


def check_disk_space(folder: Path, needed: int, step: int) -> None:
    """Check before a save that the disk has `needed` bytes free. Raises VolumeUnwritable: it has less."""
    try:
        if shutil.disk_usage(folder if folder.exists() else folder.parent).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise save_error(folder / checkpoint_name(step), error, needed) from error
