"""Checkpoints: a Hugging Face model folder plus optimizer.safetensors and state.json.

Written beside, synced, renamed. state.json comes last and holds the size and sha256 of every other
file, so a folder that a crash or a bad disk has damaged is recognised and passed over. No pickle.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gpt2box.data.assets import sha256_of
from gpt2box.data.tokenizer import Tokenizer
from gpt2box.errors import BadInput, Damaged, VolumeUnwritable
from gpt2box.model.gpt2 import GPT2
from gpt2box.model.lora import adapters
from gpt2box.model.weights import PREFIX, copy_from_hub, hub_config, hub_state, load_hub, stored_tensors, to_hub
from gpt2box.paths import fix_hint, fsync_dir
from gpt2box.progress import size
from gpt2box.training.digest import digest_of
from gpt2box.training.lean import LeanAdamW, reset

FORMAT = 1
ADAPTERS = "adapters.safetensors"
AVERAGE = "exp_avg"  # what every optimizer keeps of every parameter


@dataclass
class TrainState:
    """What a run knows besides tensors. All else follows from the step."""

    step: int = 0
    optimizer_steps: int = 0  # less than step where non-finite steps were left out
    evaluated_step: int = -1
    val_loss: float | None = None
    best_val_loss: float | None = None
    best_step: int = -1
    evaluations_without_best: int = 0
    stopped_early: bool = False
    seconds: float = 0.0  # of training, over all sessions


def folder_name(step: int) -> str:
    """step-00000500."""
    return f"step-{step:08d}"


def save(folder: Path, model: GPT2, optimizer: torch.optim.Optimizer, state: TrainState, tokenizer: Tokenizer) -> Path:
    """Write a checkpoint of `state.step` under `folder` and point `last` at it; `best` where it is the best.

    Raises:
        VolumeUnwritable: no space, which is looked at before, or no permission; earlier checkpoints are untouched.
    """
    final = folder / folder_name(state.step)
    temporary = folder / f".{final.name}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        recover(folder)
        check_space(folder, model, optimizer, state)
        temporary.mkdir()
        write_files(temporary, model, optimizer, state, tokenizer)
        retired = folder / f".{final.name}.old"
        if final.exists():  # the same step once more, after its evaluation
            os.rename(final, retired)
        os.rename(temporary, final)
        shutil.rmtree(retired, ignore_errors=True)
        fsync_dir(folder)
        point_to_last_and_best(folder, state)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise VolumeUnwritable(
            f"cannot save {final}: {getattr(error, 'strerror', None) or error}",
            f"{size(checkpoint_bytes(model, optimizer, state))} free",
            fix_hint(folder),
        ) from error
    return final


def write_files(
    folder: Path, model: GPT2, optimizer: torch.optim.Optimizer, state: TrainState, tokenizer: Tokenizer
) -> None:
    """All files of a checkpoint, synced, state.json last."""
    weights, trained = hub_state(model), adapters(model)
    dtype = weights["transformer.wte.weight"].dtype
    config = hub_config(model.shape, model.dropout, tokenizer.end_of_text, dtype)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tokenizer.save(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    if trained:
        save_file({name: parameter.detach().cpu() for name, parameter in trained.items()}, folder / ADAPTERS)
    # Before the first step all averages are zero.
    averages = optimizer_state(model, optimizer) if state.optimizer_steps else {}
    save_file(averages, folder / "optimizer.safetensors")
    files = {}
    for path in sorted(folder.iterdir()):
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    content = {"format": FORMAT, **asdict(state), "digest": digest_of(files), "files": files}
    with open(folder / "state.json", "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    fsync_dir(folder)


def optimizer_state(model: GPT2, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All it keeps: averages in the layout of the weights, and else (8 bits, a number a row) as it lies in memory."""
    tensors = {}
    for name, parameter in trained_parameters(model).items():
        for key, tensor in optimizer.state[parameter].items():
            if key == "step":
                if isinstance(optimizer, LeanAdamW):  # whose tensors may have left out different steps
                    tensors[f"step.{name}"] = tensor.cpu()
            elif tensor.shape == parameter.shape:
                tensors[f"{key}.{name}"] = to_hub(name, tensor, model.shape.vocab_size)
            else:
                tensors[f"{key}.{name}"] = tensor.cpu()
    return tensors


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


def check_space(folder: Path, model: GPT2, optimizer: torch.optim.Optimizer, state: TrainState) -> None:
    """Before anything is written.

    Raises:
        OSError: ENOSPC, as the system would, but with nothing to tidy up.
    """
    if shutil.disk_usage(folder).free < checkpoint_bytes(model, optimizer, state):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def recover(folder: Path) -> None:
    """Undo what a killed save or prune left half-way: an older copy without its successor gets its name back."""
    for path in folder.glob(".step-*.old"):
        final = folder / path.name.removeprefix(".").removesuffix(".old")
        if final.exists():
            shutil.rmtree(path)
        else:
            os.rename(path, final)
    for path in folder.glob(".step-*.tmp"):
        shutil.rmtree(path)


def point_to_last_and_best(folder: Path, state: TrainState) -> None:
    """Make the links agree with the state."""
    point(folder, "last", state.step)
    if (folder / folder_name(state.best_step)).exists():
        point(folder, "best", state.best_step)


def point(folder: Path, name: str, step: int) -> None:
    """Make `best` or `last` a link to a checkpoint, replaced at once."""
    temporary = folder / f".{name}.tmp"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(folder_name(step))
    os.replace(temporary, folder / name)
    fsync_dir(folder)


def prune(folder: Path, keep_last: int, state: TrainState) -> None:
    """Remove all but the newest `keep_last` checkpoints and the best.

    Those beyond `state.step` are damaged ones that were passed over: they do not count as newest.
    """
    steps = sorted(path for path in folder.glob("step-*") if path.name <= folder_name(state.step))
    for path in steps[:-keep_last]:
        if path.name != folder_name(state.best_step):
            # Out of sight first, so that a crash half-way leaves no torn checkpoint by that name.
            retired = path.with_name(f".{path.name}.tmp")
            os.rename(path, retired)
            shutil.rmtree(retired)


def read_state(folder: Path) -> TrainState:
    """state.json of a checkpoint, after checking every file it names.

    Raises:
        Damaged: which file, and how it differs.
    """
    try:
        content: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        state = TrainState(**{field.name: content[field.name] for field in fields(TrainState)})
        files = content["files"].items()
        if content["format"] != FORMAT:
            raise Damaged(f"{folder} has format {content['format']}", f"format {FORMAT}")
        for name, expected in files:
            path = folder / name
            if path.stat().st_size != expected["bytes"]:
                raise Damaged(f"{path} has {path.stat().st_size:,} bytes", f"{expected['bytes']:,} bytes")
            if sha256_of(path) != expected["sha256"]:
                raise Damaged(f"{path} has other content than was written", f"sha256 {expected['sha256']}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{folder}: {error!r}", "a checkpoint as it was written") from error
    return state


def newest(folder: Path) -> tuple[Path, TrainState, list[Damaged]] | None:
    """The newest whole checkpoint, its state, and what was wrong with newer ones; None where there is none at all.

    Raises:
        Damaged: there are checkpoints, and not one is whole.
    """
    recover(folder)
    passed_over: list[Damaged] = []
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            return path, read_state(path), passed_over
        except Damaged as fault:
            passed_over.append(fault)
    if passed_over:
        raise Damaged(
            f"no whole checkpoint in {folder}:\n    " + "\n    ".join(fault.found for fault in passed_over),
            next_step=f"restore one from a backup, or remove {folder} to begin anew",
        )
    return None


@torch.no_grad()
def load_weights(folder: Path, model: GPT2) -> None:
    """The weights of a checkpoint; of a model with adapters these alone, onto the weights that they were trained on.

    Raises:
        BadInput: the model was given other weights than those; or see load_hub.
    """
    trained = adapters(model)
    if not trained:
        return load_hub(model, folder)
    own = dict(model.named_parameters())
    for key, stored in stored_tensors(folder):
        name = key.removeprefix(PREFIX)
        # Norms and biases stand for all: adapters leave them as they are, and no two trainings end in the same.
        if stored.dim() == 1 and name in own and not torch.equal(stored, own[name].float().cpu()):
            raise BadInput(
                f"the adapters in {folder} were trained on other weights than these: {name} differs",
                "the weights that init_from had when the run began",
            )
    with safe_open(folder / ADAPTERS, framework="pt") as tensors:
        for name, parameter in trained.items():
            parameter.copy_(tensors.get_tensor(name))


@torch.no_grad()
def restore(folder: Path, model: GPT2, optimizer: torch.optim.Optimizer, state: TrainState) -> None:
    """Read weights and averages of a whole checkpoint into the existing tensors."""
    load_weights(folder, model)
    with safe_open(folder / "optimizer.safetensors", framework="pt") as tensors:
        stored = set(tensors.keys())
        for name, parameter in trained_parameters(model).items():
            entry = optimizer.state[parameter]
            if f"{AVERAGE}.{name}" not in stored:  # of step 0
                reset(entry)
                continue
            steps = tensors.get_tensor(f"step.{name}") if f"step.{name}" in stored else state.optimizer_steps
            entry["step"].fill_(float(steps))
            for key in entry.keys() - {"step"}:
                if entry[key].shape == parameter.shape:
                    copy_from_hub(name, entry[key], tensors.get_tensor(f"{key}.{name}"))
                else:
                    entry[key].copy_(tensors.get_tensor(f"{key}.{name}"))
