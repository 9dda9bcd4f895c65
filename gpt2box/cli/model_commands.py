"""The commands for a model that is there: what it writes.

Part of the command line (cli.py), and like it without heavy imports at the top.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from gpt2box.cli.params import Between
from gpt2box.errors import BadInput


@click.command(short_help="Write text with a model.")
@click.argument("model", required=False)
@click.option("-p", "--prompt", "--start", default="", help="What the text begins with.")
@click.option(
    "--prompt-file", type=click.File("r", encoding="utf-8"), help="A file with the prompt; - is standard input."
)
@click.option(
    "--prompts",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A file of prompts, one a line, or of .jsonl records.",
)
@click.option("-n", "--num-samples", type=click.IntRange(min=1), default=1, show_default=True, help="How many texts.")
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), default=300, show_default=True, help="Longest text, in tokens."
)
@click.option(
    "--temperature", type=Between(min=0), default=0.8, show_default=True, help="0: always the likeliest token."
)
@click.option(
    "--top-k", type=click.IntRange(min=0), default=200, show_default=True, help="Only the k likeliest; 0: all."
)
@click.option(
    "--top-p",
    type=Between(0.0, 1.0, min_open=True),
    default=1.0,
    show_default=True,
    help="Only the likeliest that make up this probability.",
)
@click.option(
    "--seed", type=click.IntRange(0, 2**62), default=1337, show_default=True, help="The same seed gives the same text."
)
@click.option(
    "--batch-size",
    type=click.IntRange(1, 10_000),
    default=1,
    show_default=True,
    help="Texts written together: faster, the same but for rounding, seen when they are done.",
)
@click.option("--json", "as_json", is_flag=True, help="An object a line for each text, for programs.")
@click.option("--interactive", is_flag=True, help="Write on with the model, line by line.")
@click.option("--instruct", is_flag=True, help="Put prompts as instruction data has them (docs/data.md).")
@click.option(
    "--weights",
    type=click.Choice(["float32", "float16", "int8"]),
    default="float32",
    show_default=True,
    help="float16: about twice as fast, hardly another text; int8: faster still on a CPU, and a little worse.",
)
@click.option("--checkpoint", default="best", show_default=True, help="Of a run: best, last or step-NNNNNNNN.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
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
    """Write text with MODEL: a run, a folder in the Hugging Face layout, or a published size (gpt2-medium).

    Without MODEL, the newest run's best checkpoint.
    """
    given = {"--prompt": prompt, "--prompt-file": prompt_file, "--prompts": prompts}
    if len(both := [name for name, value in given.items() if value]) > 1:
        raise BadInput(f"{both[0]} and {both[1]} are both given", "one of the two")
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
    from gpt2box.utils.progress import say

    texts = read_prompts(prompts) if prompts else [prompt]
    folder = find_model(model, checkpoint)
    check_gpu(device)
    say(f"from {folder}")
    network, words = load_model(folder, device)
    decoder = Decoder(network, weights)
    choice = SamplingParams(temperature, top_k, top_p)
    if interactive:
        return chat(decoder, words, prompt, max_new_tokens, choice, seed, instruct)
    if instruct:
        texts = [TEMPLATE.format(prompt=text) for text in texts]
    write_samples(decoder, words, texts, num_samples, max_new_tokens, choice, seed, batch_size, as_json)


@click.command(name="eval", short_help="Measure loss, perplexity, bits per byte, or a benchmark.")
@click.argument("model", required=False)
@click.option("--dataset", help="A prepared dataset [default: the one that the run was trained on].")
@click.option("--split", type=click.Choice(["val", "train"]), default="val", show_default=True, help="Of the dataset.")
@click.option("--text", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Or a plain text.")
@click.option(
    "--stride", type=click.IntRange(min=1), help="Tokens that a window predicts, after the first [default: a context]."
)
@click.option("--max-tokens", type=click.IntRange(min=1), help="Only the first of them.")
@click.option("--task", type=click.Choice(["hellaswag", "lambada"]), help="A benchmark in place of a loss.")
@click.option(
    "--file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Its records [default: the Hub's]."
)
@click.option("--limit", type=click.IntRange(min=1), help="Only its first records.")
@click.option("--checkpoint", default="best", show_default=True, help="Of a run: best, last or step-NNNNNNNN.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
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
    """Measure MODEL (as for `sample`): loss, perplexity and bits per byte of a text, or a benchmark.

    \b
    gpt2box eval                          the newest run, on its validation text
    gpt2box eval gpt2 --text book.txt     bits per byte compare any tokenizers
    gpt2box eval --task hellaswag         accuracy as lm-evaluation-harness has it

    Computed in float32.
    """
    of_loss = {"--dataset": dataset, "--text": text, "--stride": stride, "--max-tokens": max_tokens}
    of_task = {"--file": file, "--limit": limit}
    if wrong := [name for name, value in (of_loss if task else of_task).items() if value]:
        raise BadInput(f"{wrong[0]} {'with' if task else 'without'} --task", "gpt2box eval --help")
    if dataset and text:
        raise BadInput("--dataset and --text are both given", "one of the two")
    from gpt2box.data.dataset import open_dataset
    from gpt2box.data.dataset_folder import check_content
    from gpt2box.evaluation import benchmarks
    from gpt2box.evaluation import perplexity as losses
    from gpt2box.inference.model_loader import find_model, load_model
    from gpt2box.preflight.preflight import check_gpu
    from gpt2box.utils.paths import dataset_dir

    folder = find_model(model, checkpoint)
    where = None if task or text else dataset_dir(dataset) if dataset else losses.training_dataset(folder)
    check_gpu(device)
    network, words = load_model(folder, device)
    figures: dict[str, Any] = {"model": str(folder)}
    if task:
        figures |= benchmarks.run_benchmark(task, network, words, file, limit)
    else:
        block_size = network.shape.block_size
        step = min(stride or block_size, block_size)
        if text:
            found = losses.loss_on_text(network, words, text, step, max_tokens)
        else:
            assert where is not None
            prepared = open_dataset(where)
            check_content(prepared.folder, prepared.manifest, [split])
            found = losses.loss_on_dataset(network, words, prepared, split, step, max_tokens)
        on = {"on": str(text or where), "split": None if text else split, "block_size": block_size, "stride": step}
        figures |= on | found.figures()
    if as_json:
        print(json.dumps(figures))
        return
    told = {key: value for key, value in figures.items() if value is not None}
    width = max(map(len, told))
    for key, value in told.items():
        kind = {float: ",.4f", int: ","}.get(type(value), "")
        print(f"{key:{width}}  {value:{kind}}")


@click.command(short_help="Write a model for transformers, nanoGPT or llama.cpp.")
@click.argument("model", required=False)
@click.option(
    "--format",
    "form",
    type=click.Choice(["huggingface", "nanogpt", "gguf"]),
    default="huggingface",
    show_default=True,
    help="A clean folder for transformers and the Hub; nanoGPT's ckpt.pt; a file for llama.cpp and Ollama.",
)
@click.option(
    "--dtype",
    "--quantise",
    type=click.Choice(["float32", "float16", "bfloat16", "q8_0"]),
    metavar="[float32|float16|bfloat16|q8_0]",
    help="Numbers of the matrices [default: float32; float16 in gguf].",
)
@click.option("--out", type=click.Path(path_type=Path), help="Where [default: the run's export/].")
@click.option("--license", "licence", default="", help="For the model card, such as mit or cc-by-4.0.")
@click.option("--checkpoint", default="best", show_default=True, help="Of a run: best, last or step-NNNNNNNN.")
def export(model: str | None, form: str, dtype: str | None, out: Path | None, licence: str, checkpoint: str) -> None:
    """Write MODEL (as for `sample`) for other programs, and read it back to see that it is the same.

    A checkpoint is a Hugging Face folder already; this leaves out what only training needs and adds a model card.
    """
    from gpt2box.export.export import export_model
    from gpt2box.inference.model_loader import find_model
    from gpt2box.utils.paths import shown
    from gpt2box.utils.progress import say

    folder = find_model(model, checkpoint)
    say(f"from {folder}")
    print(shown(export_model(folder, form, dtype, out, licence)))


@click.command(short_help="Upload a model to the Hugging Face Hub.")
@click.argument("model")
@click.argument("repo", metavar="OWNER/NAME")
@click.option("--public", is_flag=True, help="For everyone to see [default: private].")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Numbers of the matrices.",
)
@click.option("--license", "licence", default="", help="For the model card, such as mit or cc-by-4.0.")
@click.option("--checkpoint", default="best", show_default=True, help="Of a run: best, last or step-NNNNNNNN.")
def push(model: str, repo: str, public: bool, dtype: str, licence: str, checkpoint: str) -> None:
    """Upload MODEL (as for `sample`) to the Hugging Face Hub as OWNER/NAME, with a model card.

    It is exported and read back first, as by `export`, and said what is uploaded. Needs a token that may write, in
    HF_TOKEN or from `hf auth login`; HF_ENDPOINT names another Hub.
    """
    from gpt2box.export.push import push as upload
    from gpt2box.inference.model_loader import find_model
    from gpt2box.utils.progress import say

    folder = find_model(model, checkpoint)
    say(f"from {folder}")
    print(upload(folder, repo, dtype, licence, public))


@click.command(name="import", short_help="Turn nanoGPT's ckpt.pt into a Hugging Face folder.")
@click.argument("checkpoint", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--name", help="What it is called in volumes/models [default: the name of its folder].")
@click.option("--out", type=click.Path(path_type=Path), help="Or another place.")
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Of a model in characters: the text it was trained on.",
)
@click.option(
    "--gelu",
    type=click.Choice(["exact", "tanh"]),
    default="exact",
    show_default=True,
    help="nanoGPT's is exact since May 2023; before it was GPT-2's tanh form.",
)
def import_checkpoint(checkpoint: Path, name: str | None, out: Path | None, text: Path | None, gelu: str) -> None:
    """Turn nanoGPT's CHECKPOINT, a ckpt.pt, into a Hugging Face folder, volumes/models/NAME.

    From there: gpt2box sample FOLDER, gpt2box train CONFIG --init-from NAME. Weights alone; AdamW's averages stay.
    """
    from gpt2box.export.nanogpt import import_nanogpt
    from gpt2box.utils.paths import checked_name, make_writable, model_dir, shown

    place = out or model_dir(checked_name(name or checkpoint.resolve().parent.name, "model"))
    make_writable(place.absolute().parent)
    print(shown(import_nanogpt(checkpoint, place.absolute(), text, {"exact": "none", "tanh": "tanh"}[gelu])))


COMMANDS = [sample, evaluate, export, push, import_checkpoint]
