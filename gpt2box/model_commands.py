"""The commands for a model that is there: what it writes.

Part of the command line (cli.py), and like it without heavy imports at the top.
"""

from __future__ import annotations

from typing import Any

import click

from gpt2box.errors import BadInput
from gpt2box.options import Between


@click.command()
@click.argument("model", required=False)
@click.option("-p", "--prompt", "--start", default="", help="What the text begins with.")
@click.option(
    "--prompt-file", type=click.File("r", encoding="utf-8"), help="A file with the prompt; - is standard input."
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
@click.option("--checkpoint", default="best", show_default=True, help="Of a run: best, last or step-NNNNNNNN.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
def sample(
    model: str | None,
    prompt: str,
    prompt_file: Any,
    num_samples: int,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    checkpoint: str,
    device: str,
) -> None:
    """Write text with MODEL: a run, a folder in the Hugging Face layout, or a published size (gpt2-medium).

    Without MODEL, the newest run's best checkpoint.
    """
    if prompt and prompt_file:
        raise BadInput("--prompt and --prompt-file are both given", "one of the two")
    if prompt_file:
        try:
            prompt = prompt_file.read()
        except UnicodeDecodeError as error:
            raise BadInput(
                f"{prompt_file.name} is not UTF-8: {error.reason} at byte {error.start:,}", "plain text"
            ) from error
    from gpt2box.model.generate import Choice
    from gpt2box.output.sample import find_model, load_model
    from gpt2box.output.sample import sample as write_samples
    from gpt2box.preflight import check_gpu
    from gpt2box.progress import say

    folder = find_model(model, checkpoint)
    check_gpu(device)
    say(f"from {folder}")
    network, words = load_model(folder, device)
    write_samples(network, words, prompt, num_samples, max_new_tokens, Choice(temperature, top_k, top_p), seed)
