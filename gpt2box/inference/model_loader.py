"""Find a model by the name that the user gave, and load it with its tokenizer."""

from dataclasses import replace
from pathlib import Path

from gpt2box.checkpoint.metadata import verify_model_files
from gpt2box.config.schema import MODEL_SHAPES
from gpt2box.data import hub_models
from gpt2box.data.pretrained import load_shape, pretrained_folder
from gpt2box.data.tokenizer import Tokenizer, load_model_tokenizer
from gpt2box.errors import BadInput, Damaged
from gpt2box.model.gpt2 import GPT2
from gpt2box.model.hf_weights import load_hf_weights
from gpt2box.system.device import choose_device
from gpt2box.utils.paths import NAME_PATTERN, find_checkpoint, list_run_dirs, runs_dir


def find_model(name: str | None, checkpoint: str) -> Path:
    """Return a model's folder, given a run, a folder, a published size or OWNER/NAME on the Hub.

    Without a name, use the newest run. `checkpoint` selects a run's checkpoint: best, last or step-NNNNNNNN.

    Raises BadInput: there is no such model or checkpoint; the message lists what exists.
    """
    last_checkpoints = [(find_checkpoint(run, "last"), run.name) for run in list_run_dirs()]
    newest_first = sorted(((path.lstat().st_mtime, run) for path, run in last_checkpoints if path), reverse=True)
    runs = [run for _, run in newest_first]
    if name is None:
        if not runs:
            raise BadInput(
                f"no run with a checkpoint in {runs_dir()}",
                "a trained model",
                "gpt2box train demo, or gpt2box sample gpt2",
            )
        name = runs[0]
    if NAME_PATTERN.fullmatch(name) and name in runs:
        run = runs_dir() / name
        if folder := find_checkpoint(run, checkpoint):
            return folder
        existing = sorted(path.name for path in (run / "checkpoints").glob("[bls]*"))
        raise BadInput(f"run {name} has no checkpoint {checkpoint}", ", ".join(existing))
    if (Path(name) / "config.json").is_file():
        return Path(name)
    if name in MODEL_SHAPES or hub_models.HUB_NAME.fullmatch(name):
        return pretrained_folder(name)
    raise BadInput(
        f"no model {name!r}",
        f"a run ({', '.join(runs) or 'none yet'}), a folder with config.json, OWNER/NAME of the Hub, "
        f"or one of {', '.join(MODEL_SHAPES)}",
    )


def load_model(folder: Path, device: str) -> tuple[GPT2, Tokenizer]:
    """Load the model in `folder` onto a device, with its tokenizer; without a stored tokenizer, use GPT-2's.

    Raises:
        BadInput: The folder has no weights, or its tokenizer has more tokens than its model.
        Damaged: The files differ from what was written, or the weights do not fit config.json.
    """
    verify_model_files(folder)
    shape = load_shape(folder)
    files = list(folder.glob("*.safetensors"))
    stored_bytes = sum(path.stat().st_size for path in files)
    if not files:
        raise BadInput(f"no weights in {folder}", "model.safetensors")
    if stored_bytes < shape.parameters:  # under one byte per parameter: refuse before allocating memory for them
        raise Damaged(
            f"{folder}: config.json says {shape.parameters:,} parameters, its .safetensors have {stored_bytes:,} bytes",
            "weights of that shape",
        )
    model = GPT2.empty(shape, 0.0, choose_device(device))
    load_hf_weights(model, folder)
    tokenizer = load_model_tokenizer(folder, shape.vocab_size)
    if tokenizer.vocab_size > shape.vocab_size:
        raise BadInput(f"{folder}: {tokenizer.vocab_size:,} tokens in its tokenizer, {shape.vocab_size:,} in its model")
    model.shape = replace(shape, vocab_size=tokenizer.vocab_size)  # some stored weights have padding rows
    return model, tokenizer
