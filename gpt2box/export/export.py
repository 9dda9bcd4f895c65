"""Export a model: a clean Hugging Face folder, nanoGPT's ckpt.pt, or GGUF for llama.cpp and Ollama.

Every export is read back and compared with the model before it gets its final name.
"""

import math
from functools import partial
from pathlib import Path

from gpt2box.errors import BadInput
from gpt2box.export.gguf import check_gguf, write_gguf, write_modelfile
from gpt2box.export.huggingface import write_huggingface
from gpt2box.export.model_card import model_card
from gpt2box.export.nanogpt import write_nanogpt
from gpt2box.export.publish import publish
from gpt2box.inference.model_loader import load_model
from gpt2box.model.gpt2 import GPT2
from gpt2box.utils.files import read_json_object
from gpt2box.utils.progress import log_line

DTYPES = {  # by format, the default first
    "huggingface": ("float32", "float16", "bfloat16"),
    "nanogpt": ("float32",),
    "gguf": ("float16", "float32", "q8_0"),
}
MAX_VALUE = {"float16": 65_504.0, "q8_0": 127 * 65_504.0}  # bfloat16 has float32's range


def export_model(
    folder: Path, format_name: str, dtype: str | None, out: Path | None, license_id: str, title: str = ""
) -> Path:
    """Export the model in `folder`; return the path that was written.

    `title` is the model card's heading; by default the run's name.

    Raises:
        BadInput: The format does not support this dtype, tokenizer or range of weights, or the path exists already.
        Damaged: What was read back differs from the model.
        VolumeUnwritable: There is no space or no permission.
    """
    dtype = dtype or DTYPES[format_name][0]
    if dtype not in DTYPES[format_name]:
        raise BadInput(f"--format {format_name} in {dtype}", f"one of: {', '.join(DTYPES[format_name])}")
    model, tokenizer = load_model(folder, "cpu")
    model.eval()
    check_range(model, format_name, dtype)
    path = (out or default_path(folder, format_name, dtype)).absolute()
    if format_name == "huggingface":
        card = model_card(folder, model.shape, license_id, title, path.name)
        write = partial(write_huggingface, model=model, tokenizer=tokenizer, dtype=dtype, card=card)
    elif format_name == "nanogpt":
        write = partial(write_nanogpt, model=model, state=read_json_object(folder / "state.json"))
    else:
        check_gguf(model, tokenizer, dtype)
        if model.shape.gelu == "none":
            log_line("note: llama.cpp computes GELU in its tanh form, this model exactly: outputs differ a little")
        write = partial(write_gguf, model=model, tokenizer=tokenizer, dtype=dtype, title=path.stem)
    publish(path, write)
    if format_name == "gguf":
        write_modelfile(path, model.shape.block_size, prompt_template(folder))
    return path


def prompt_template(folder: Path) -> str:
    """Return the prompt template of the instruction data that the run was trained on, or the plain prompt."""
    dataset = read_json_object(folder.resolve().parent.parent / "manifest.json").get("dataset")
    template = dataset.get("template") if isinstance(dataset, dict) else None
    return template if isinstance(template, str) and '"' not in template else "{prompt}"


def check_range(model: GPT2, format_name: str, dtype: str) -> None:
    """Check that the dtype can represent the largest weights. Raises BadInput: a weight is too large."""
    for name, parameter in model.named_parameters():
        if (largest := float(parameter.detach().abs().max())) > MAX_VALUE.get(dtype, math.inf):
            wider = "float32" if format_name == "gguf" else "bfloat16"
            raise BadInput(
                f"{name} has a number of {largest:,.6g}, which {dtype} cannot hold",
                f"numbers up to {MAX_VALUE[dtype]:,.6g}",
                f"--dtype {wider}",
            )


def default_path(folder: Path, format_name: str, dtype: str) -> Path:
    """Return the export's default path: in export/ of the run, or beside a folder that is not a run's checkpoint."""
    folder = folder.resolve()
    is_checkpoint = folder.parent.name == "checkpoints"
    name = folder.parents[1].name if is_checkpoint else folder.name
    parent = folder.parents[1] / "export" if is_checkpoint else folder.parent
    return (
        parent
        / {"huggingface": f"{name}-{dtype}", "nanogpt": f"{name}.pt", "gguf": f"{name}-{dtype}.gguf"}[format_name]
    )
