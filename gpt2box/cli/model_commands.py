"""Define the commands that use a trained model: sample, eval, export, push, import.

Heavy imports stay inside the commands, so that `gpt2box --help` is fast.
"""

import json
from pathlib import Path
from typing import Any

import click

from gpt2box.cli.params import FiniteRange
from gpt2box.config.sampling_defaults import TEMPERATURE, TOP_K, TOP_P
from gpt2box.errors import BadInput

checkpoint_option = click.option(
    "--checkpoint", default="best", show_default=True, help="Checkpoint of a run: best, last or step-NNNNNNNN."
)
device_option = click.option("--device", default="auto", show_default=True, help="Device: auto, cpu, cuda or cuda:N.")
license_option = click.option(
    "--license", "license_id", default="", help="License in the model card, such as mit or cc-by-4.0."
)


@click.command(short_help="Write text with a model.")
@click.argument("model", required=False)
@click.option("-p", "--prompt", "--start", default="", help="Text to continue.")
@click.option(
    "--prompt-file", type=click.File("r", encoding="utf-8"), help="File with the prompt; - is standard input."
)
@click.option(
    "--prompts",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="File of prompts: one per line, or .jsonl records.",
)
@click.option(
    "-n", "--num-samples", type=click.IntRange(min=1), default=1, show_default=True, help="Samples of each prompt."
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=300,
    show_default=True,
    help="Maximum length of a sample, in tokens.",
)
@click.option(
    "--temperature",
    type=FiniteRange(min=0),
    default=TEMPERATURE,
    show_default=True,
    help="Sampling temperature; 0 always takes the likeliest token.",
)
@click.option(
    "--top-k",
    type=click.IntRange(min=0),
    default=TOP_K,
    show_default=True,
    help="Sample from the k likeliest tokens only; 0: from all.",
)
@click.option(
    "--top-p",
    type=FiniteRange(0.0, 1.0, min_open=True),
    default=TOP_P,
    show_default=True,
    help="Sample from the likeliest tokens that add up to this probability.",
)
@click.option(
    "--seed", type=click.IntRange(0, 2**62), default=1337, show_default=True, help="The same seed gives the same text."
)
@click.option(
    "--batch-size",
    type=click.IntRange(1, 10_000),
    default=1,
    show_default=True,
    help="Samples generated together: faster, equal up to rounding, shown when complete.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per sample.")
@click.option("--interactive", is_flag=True, help="Continue texts with the model, line by line.")
@click.option("--instruct", is_flag=True, help="Wrap prompts in the template of instruction data (docs/data.md).")
@click.option(
    "--weights",
    type=click.Choice(["float32", "float16", "int8"]),
    default="float32",
    show_default=True,
    help="float16: about twice as fast, almost the same text; int8: faster still on a CPU, slightly worse text.",
)
@checkpoint_option
@device_option
def sample(
    model: str | None,
    prompt: str,
    prompt_file: Any,
    prompts: Path | None,
    num_samples: int,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    batch_size: int,
    as_json: bool,
    interactive: bool,
    instruct: bool,
    weights: str,
    checkpoint: str,
    device: str,
) -> None:
    """Write text with MODEL: a run, a Hugging Face folder, a published size (gpt2-medium) or OWNER/NAME on the Hub.

    Without MODEL, use the newest run's best checkpoint.
    """
    prompt_options = {"--prompt": prompt, "--prompt-file": prompt_file, "--prompts": prompts}
    if len(given := [name for name, value in prompt_options.items() if value]) > 1:
        raise BadInput(f"{given[0]} and {given[1]} are both given", "one of the two")
    if interactive and (as_json or prompts or num_samples > 1):
        raise BadInput("--interactive with several texts or --json", "gpt2box sample --interactive")
    if prompt_file:
        try:
            prompt = prompt_file.read()
        except UnicodeDecodeError as error:
            raise BadInput(
                f"{prompt_file.name} is not UTF-8: {error.reason} at byte {error.start:,}", "plain text"
            ) from error
    from gpt2box.data.instructions import TEMPLATE
    from gpt2box.inference.chat import chat
    from gpt2box.inference.model_loader import find_model, load_model
    from gpt2box.inference.sample import read_prompts, write_samples
    from gpt2box.model.decoder import Decoder
    from gpt2box.model.sampling import SamplingParams
    from gpt2box.preflight.preflight import check_gpu
    from gpt2box.utils.progress import log_line

    texts = read_prompts(prompts) if prompts else [prompt]
    folder = find_model(model, checkpoint)
    check_gpu(device)
    log_line(f"from {folder}")
    network, tokenizer = load_model(folder, device)
    decoder = Decoder(network, weights)
    params = SamplingParams(temperature, top_k, top_p)
    if interactive:
        return chat(decoder, tokenizer, prompt, max_new_tokens, params, seed, instruct)
    if instruct:
        texts = [TEMPLATE.format(prompt=text) for text in texts]
    write_samples(decoder, tokenizer, texts, num_samples, max_new_tokens, params, seed, batch_size, as_json)


@click.command(name="eval", short_help="Measure loss, perplexity, bits per byte, or a benchmark.")
@click.argument("model", required=False)
@click.option("--dataset", help="Prepared dataset [default: the run's own].")
@click.option(
    "--split", type=click.Choice(["val", "train"]), default="val", show_default=True, help="Split of the dataset."
)
@click.option(
    "--text", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Evaluate on a text file instead."
)
@click.option(
    "--stride", type=click.IntRange(min=1), help="Tokens predicted per sliding window [default: the block size]."
)
@click.option("--max-tokens", type=click.IntRange(min=1), help="Evaluate on the first tokens only.")
@click.option("--task", type=click.Choice(["hellaswag", "lambada"]), help="Run a benchmark instead.")
@click.option(
    "--file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Records of the benchmark [default: from the Hub].",
)
@click.option("--limit", type=click.IntRange(min=1), help="Use the first records only.")
@checkpoint_option
@device_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def evaluate(
    model: str | None,
    dataset: str | None,
    split: str,
    text: Path | None,
    stride: int | None,
    max_tokens: int | None,
    task: str | None,
    file: Path | None,
    limit: int | None,
    checkpoint: str,
    device: str,
    as_json: bool,
) -> None:
    """Measure MODEL (see `sample`): loss, perplexity and bits per byte on a text, or a benchmark.

    \b
    gpt2box eval                          the newest run, on its validation split
    gpt2box eval gpt2 --text book.txt     bits per byte compares across tokenizers
    gpt2box eval --task hellaswag         accuracy, as lm_eval counts it

    Computed in float32.
    """
    loss_options = {"--dataset": dataset, "--text": text, "--stride": stride, "--max-tokens": max_tokens}
    task_options = {"--file": file, "--limit": limit}
    if wrong := [name for name, value in (loss_options if task else task_options).items() if value]:
        raise BadInput(f"{wrong[0]} {'with' if task else 'without'} --task", "gpt2box eval --help")
    if dataset and text:
        raise BadInput("--dataset and --text are both given", "one of the two")
    from gpt2box.data.dataset import open_dataset
    from gpt2box.data.dataset_folder import check_content
    from gpt2box.evaluation import perplexity
    from gpt2box.evaluation.benchmarks import run_benchmark
    from gpt2box.inference.model_loader import find_model, load_model
    from gpt2box.preflight.preflight import check_gpu
    from gpt2box.utils.paths import dataset_dir

    folder = find_model(model, checkpoint)
    dataset_folder = None
    if not task and not text:
        dataset_folder = dataset_dir(dataset) if dataset else perplexity.training_dataset(folder)
    check_gpu(device)
    network, tokenizer = load_model(folder, device)
    metrics: dict[str, Any] = {"model": str(folder)}
    if task:
        metrics |= run_benchmark(task, network, tokenizer, file, limit)
    else:
        block_size = network.shape.block_size
        stride = min(stride or block_size, block_size)
        if text:
            loss = perplexity.loss_on_text(network, tokenizer, text, stride, max_tokens)
        else:
            assert dataset_folder is not None
            prepared = open_dataset(dataset_folder)
            check_content(prepared.folder, prepared.manifest, [split])
            loss = perplexity.loss_on_dataset(network, tokenizer, prepared, split, stride, max_tokens)
        metadata = {
            "on": str(text or dataset_folder),
            "split": None if text else split,
            "block_size": block_size,
            "stride": stride,
        }
        metrics |= metadata | loss.figures()
    if as_json:
        print(json.dumps(metrics))
        return
    shown_metrics = {key: value for key, value in metrics.items() if value is not None}
    width = max(map(len, shown_metrics))
    for key, value in shown_metrics.items():
        number_format = {float: ",.4f", int: ","}.get(type(value), "")
        print(f"{key:{width}}  {value:{number_format}}")


@click.command(short_help="Write a model for transformers, nanoGPT or llama.cpp.")
@click.argument("model", required=False)
@click.option(
    "--format",
    "format_name",
    type=click.Choice(["huggingface", "nanogpt", "gguf"]),
    default="huggingface",
    show_default=True,
    help="Hugging Face folder (transformers, the Hub), nanoGPT's ckpt.pt, or GGUF (llama.cpp, Ollama).",
)
@click.option(
    "--dtype",
    "--quantise",
    type=click.Choice(["float32", "float16", "bfloat16", "q8_0"]),
    metavar="[float32|float16|bfloat16|q8_0]",
    help="Data type of the matrices [default: float32; float16 in gguf].",
)
@click.option("--out", type=click.Path(path_type=Path), help="Output path [default: in the run's export/].")
@license_option
@checkpoint_option
def export(
    model: str | None, format_name: str, dtype: str | None, out: Path | None, license_id: str, checkpoint: str
) -> None:
    """Export MODEL (see `sample`) for other programs, and verify the result by reading it back.

    A checkpoint is already a Hugging Face folder; the export omits what only training needs and adds a model card.
    """
    from gpt2box.export.export import export_model
    from gpt2box.inference.model_loader import find_model
    from gpt2box.utils.paths import display_path
    from gpt2box.utils.progress import log_line

    folder = find_model(model, checkpoint)
    log_line(f"from {folder}")
    print(display_path(export_model(folder, format_name, dtype, out, license_id)))


@click.command(short_help="Upload a model to the Hugging Face Hub.")
@click.argument("model")
@click.argument("repo", metavar="OWNER/NAME")
@click.option("--public", is_flag=True, help="Make the repository public [default: private].")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Data type of the matrices.",
)
@license_option
@checkpoint_option
def push(model: str, repo: str, public: bool, dtype: str, license_id: str, checkpoint: str) -> None:
    """Upload MODEL (see `sample`) to the Hugging Face Hub as OWNER/NAME, with a model card.

    The model is exported and verified first, like `export`, and the files are listed. Needs a token with write access,
    in HF_TOKEN or from `hf auth login`; HF_ENDPOINT selects another Hub.
    """
    from gpt2box.export.push import push as upload
    from gpt2box.inference.model_loader import find_model
    from gpt2box.utils.progress import log_line

    folder = find_model(model, checkpoint)
    log_line(f"from {folder}")
    print(upload(folder, repo, dtype, license_id, public))


@click.command(name="import", short_help="Convert nanoGPT's ckpt.pt to a Hugging Face folder.")
@click.argument("checkpoint", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--name", help="Name in volumes/models [default: the name of the checkpoint's folder].")
@click.option("--out", type=click.Path(path_type=Path), help="Write to another folder instead.")
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Training text of a character-level model.",
)
@click.option(
    "--gelu",
    type=click.Choice(["exact", "tanh"]),
    default="exact",
    show_default=True,
    help="Form of GELU; nanoGPT's is exact since May 2023, tanh before.",
)
def import_checkpoint(checkpoint: Path, name: str | None, out: Path | None, text: Path | None, gelu: str) -> None:
    """Convert nanoGPT's CHECKPOINT, a ckpt.pt, to a Hugging Face folder, volumes/models/NAME.

    Then: gpt2box sample FOLDER, gpt2box train CONFIG --init-from NAME. AdamW's state is not imported.
    """
    from gpt2box.export.nanogpt import import_nanogpt
    from gpt2box.utils.paths import display_path, ensure_writable, model_dir, validate_name

    folder = out or model_dir(validate_name(name or checkpoint.resolve().parent.name, "model"))
    ensure_writable(folder.absolute().parent)
    print(display_path(import_nanogpt(checkpoint, folder.absolute(), text, {"exact": "none", "tanh": "tanh"}[gelu])))


COMMANDS = [sample, evaluate, export, push, import_checkpoint]
