"""The command `gpt2box`: options, help, and errors turned into exit codes.

Only click and errors are imported at the top, so that --help answers at once; each command imports
what it needs.
"""

import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import click

from gpt2box import __version__
from gpt2box.cli import model_commands, run_commands
from gpt2box.cli.params import FiniteRange, IndexRange, SettingsCommand, normalize_option_name
from gpt2box.errors import BadInput, Gpt2boxError, printable_line
from gpt2box.system.os_errors import explain_cuda_oom, explain_os_error
from gpt2box.utils.ranks import rank_info

CONTEXT = {
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": normalize_option_name,
    "max_content_width": 110,
}


@click.group(context_settings=CONTEXT)
@click.version_option(__version__, prog_name="gpt2box")
def cli() -> None:
    """Train and fine-tune GPT-2 on one consumer GPU, or, small, on a CPU.

    \b
    gpt2box prepare shakespeare     text to tokens
    gpt2box train shakespeare       train; the same command again resumes
    gpt2box sample                  read what it writes

    Everything is kept in ./volumes ($GPT2BOX_VOLUMES moves it). Exit codes: 0 done, 2 bad input, 3 the
    machine cannot do it, 4 data or checkpoint damaged, 75 try again (network, a failed GPU), 78 volume not
    writable, 129, 130 and 143 ended by a signal without saving.
    """


@cli.command(short_help="Turn text into a dataset, volumes/data/NAME.")
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.option(
    "--name", help="The dataset's name [default: the input's, with -char for characters or another tokenizer's name]."
)
@click.option(
    "--tokenizer",
    metavar="[gpt2|char|FOLDER|OWNER/NAME]",
    default="gpt2",
    show_default=True,
    help="GPT-2's 50,257 tokens, one token a character, or those of a model, here or on the Hub.",
)
@click.option(
    "--val-fraction",
    type=FiniteRange(0.0, 1.0, min_open=True, max_open=True),
    help="Share kept for validation [default: 0.1; 0.01 of much text; 0.0005 of openwebtext].",
)
@click.option("--text-column", default="", help="Where the text is in JSON, CSV and Parquet [default: text].")
@click.option("--prompt-column", default="", help="Where prompts are, which the loss leaves out [default: prompt].")
@click.option("--response-column", default="", help="Where their responses are [default: response].")
@click.option(
    "--split",
    type=click.Choice(["content", "nanogpt"]),
    default="content",
    show_default=True,
    help="How much text is split: by a hash of each document, or in nanoGPT's order, shuffled (Parquet only).",
)
@click.option("--max-docs", type=click.IntRange(min=1), help="Only the first documents.")
@click.option("--keep-duplicates", is_flag=True, help="Keep documents that are there twice.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes; the bytes do not depend on it.")
@click.option("--shards", type=IndexRange(), help="Only these of openwebtext's 80 files, or of a Hub dataset's.")
@click.option(
    "--from", "folder", type=click.Path(file_okay=False, exists=True, path_type=Path), help="openwebtext's own files."
)
@click.option("--keep-raw", is_flag=True, help="Keep downloaded files when they are tokenised.")
@click.option("--hub-config", default="", help="Configuration of a Hub dataset.")
@click.option("--hub-split", default="", help="Split of a Hub dataset [default: train].")
@click.option("--verify", is_flag=True, help="INPUT is a dataset's name: read it, and compare with its checksums.")
def prepare(inputs: tuple[str, ...], name: str | None, verify: bool, **options: Any) -> None:
    """Turn text into a dataset, volumes/data/NAME.

    \b
    INPUT is one of
      shakespeare, tinyshakespeare       the complete works, or 1 MB of them
      openwebtext, openwebtext-10k       9 billion tokens, or 10,000 documents
      hub:OWNER/NAME                     any dataset of the Hugging Face Hub
      files, folders, patterns of yours  txt md jsonl json csv tsv parquet,
                                         also gz bz2 xz zst; - is standard input

    A plain text is a document, as is each record of the others. Records of prompt and response become instruction data:
    the loss is on the responses alone. Doing it again with the same text does nothing; ended
    half-way, it goes on where it was.
    """
    from gpt2box.data import prepare as datasets
    from gpt2box.data.prepare_config import PrepareConfig

    if verify:
        for item in inputs:
            datasets.verify_dataset(item)
        return
    options["workers"] = options["workers"] or 0
    with going_on_later():
        datasets.prepare(inputs, PrepareConfig(**options), name)


@contextmanager
def going_on_later() -> Iterator[None]:
    """Exit on SIGTERM as on Ctrl-C: clean up, and print that the same command resumes."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        print("stopped: the same command goes on where it was", file=sys.stderr)
        raise


@cli.command(cls=SettingsCommand, short_help="Train as CONFIG says; the same command again resumes.")
@click.argument("config", required=False)
@click.option(
    "--allow-change", multiple=True, metavar="KEY", help="Go on with another value of this setting; from there on."
)
def train(config: str | None, allow_change: tuple[str, ...], **flags: str | None) -> None:
    """Train as CONFIG says; the same command again resumes.

    CONFIG is a YAML file, the name of a shipped one, or a nanoGPT config file. Any setting can be given as an
    option, which wins over the file; nanoGPT's names are understood (--batch_size=2).

    \b
    gpt2box train demo
    gpt2box train shakespeare --micro-batch-size 2
    gpt2box train finetune --dataset mybook.txt
    gpt2box train my_nanogpt_config.py --batch_size=2
    """
    from gpt2box.utils.signals import StopRequest

    stop = StopRequest().install()
    from gpt2box.training.run import run_job

    run_job(config, settings_from_flags(config, flags), stop, allow_change)


def settings_from_flags(config: str | None, flags: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that were given as options."""
    chosen = {key: value for key, value in flags.items() if value is not None}
    if config is None and not chosen:
        from gpt2box.config.loader import list_presets

        choices = ", ".join(list_presets())
        raise BadInput("no config", f"a YAML file, a nanoGPT config, or one of: {choices}", "gpt2box train demo")
    return chosen


@cli.command(
    cls=SettingsCommand, show_settings=False, short_help="Bring the dataset and weights that a training needs."
)
@click.argument("config")
def fetch(config: str, **flags: str | None) -> None:
    """Bring all that training CONFIG needs: its dataset and the weights it begins from.

    `train` does so itself; this is for doing it beforehand, where there is network but no GPU. It looks first
    whether there is space for the whole job. Takes all options of `train`; --dataset can be a text.
    """
    from gpt2box.config import loader
    from gpt2box.preflight import requirements
    from gpt2box.utils import paths

    settings, _ = loader.load_config(config, settings_from_flags(config, flags))
    requirements.check_space(settings)
    with going_on_later():
        requirements.fetch_requirements(settings, paths.text_path(flags["dataset"] or ""))


@cli.command(cls=SettingsCommand, show_settings=False, short_help="Check driver, card, memory, disk and network.")
@click.argument("config", required=False)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def preflight(config: str | None, as_json: bool, **flags: str | None) -> None:
    """Check this machine, for training CONFIG or in general: it tries things. Takes all options of `train`.

    Driver, card and its memory, PyTorch, bfloat16, torch.compile, memory, disk, volumes, vocabulary, network.
    Exit code 3 when a check fails.
    """
    from gpt2box.config import loader
    from gpt2box.preflight import preflight as checks
    from gpt2box.utils import paths

    text, in_general = paths.text_path(flags["dataset"] or ""), not (config or flags["dataset"])
    device = flags["device"] or "cuda"
    flags["dataset"] = "any" if in_general else flags["dataset"]  # a placeholder that is valid
    settings, _ = loader.load_config(config, settings_from_flags(config, flags))
    checks.preflight(None if in_general else settings, text, device if in_general else settings.device, as_json)


@cli.command(
    cls=SettingsCommand, show_settings=False, short_help="Say what fits, how fast it is and how long it takes."
)
@click.argument("config", required=False)
@click.option("--gpu", help="A card by name, such as rtx-4070 [default: the one that is here].")
@click.option("--vram-gib", type=FiniteRange(0, 10_000, min_open=True), help="Or only its memory.")
@click.option("--gpus", type=click.IntRange(min=1), default=1, show_default=True, help="So many of it in one machine.")
@click.option("--all-sizes", is_flag=True, help="The same for each published size, 124M to XL.")
@click.option("--explain", is_flag=True, help="How the bytes come about.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def plan(
    config: str | None,
    gpu: str | None,
    vram_gib: float | None,
    gpus: int,
    all_sizes: bool,
    explain: bool,
    as_json: bool,
    **flags: str | None,
) -> None:
    """Say before training what fits, how fast it is and how long it takes. Takes all options of `train`.

    \b
    gpt2box plan shakespeare
    gpt2box plan openwebtext --gpu rtx-4070 --block-size 512
    gpt2box plan finetune --vram-gib 8 --all-sizes

    Estimated from the model's shape and the card's data sheet; measured, and said so, where `bench --sweep` was done
    here. Exit code 3 when nothing fits.
    """
    from gpt2box.config import loader
    from gpt2box.planner import report
    from gpt2box.planner.target_device import select_target_device

    flags["dataset"] = flags["dataset"] or (None if config else "any")  # a plan needs no text
    chosen = settings_from_flags(config, flags)
    settings, _ = loader.load_config(config, chosen)
    device = select_target_device(gpu, vram_gib, settings, gpus)
    report.print_report(settings, device, all_sizes, explain, as_json)


@cli.command(cls=SettingsCommand, show_settings=False, short_help="Measure how fast this machine trains.")
@click.argument("config", required=False)
@click.option("--steps", type=click.IntRange(min=1), default=10, show_default=True, help="Steps that are timed.")
@click.option(
    "--sweep",
    is_flag=True,
    help="Find the fastest execution plan (micro-batch, activation checkpointing, compile); keep it.",
)
@click.option("--share", is_flag=True, help="Print a row for the table of cards (docs/cards.md).")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def bench(config: str | None, steps: int, sweep: bool, share: bool, as_json: bool, **flags: str | None) -> None:
    """Measure how fast this machine trains CONFIG [default: shakespeare on a GPU, demo without].

    \b
    gpt2box bench
    gpt2box bench openwebtext --sweep
    gpt2box bench finetune --share

    Step, tokens a second, share of the card's peak, memory, loader, evaluation, checkpoint, and what was estimated of
    them. Takes all options of `train`. Needs no dataset and no weights: where they are not there, random ones do.
    What --sweep finds is kept in volumes/runs/bench.json, and `plan` and `train` go by it; all else is left alone.
    """
    from gpt2box.config import loader
    from gpt2box.system.gpu import query_nvml

    if share and as_json:
        raise BadInput("--share and --json are both given", "one of the two")
    flags["dataset"] = flags["dataset"] or (None if config else "any")
    chosen = {key: value for key, value in flags.items() if value is not None}
    if config is None and set(chosen) <= {"dataset", "device"}:
        on_cpu = flags["device"] == "cpu" or not query_nvml().gpus
        config, chosen = ("demo" if on_cpu else "shakespeare"), chosen | {"dataset": ""}
    settings, _ = loader.load_config(config, chosen)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # keeps what was measured, as at Ctrl-C
    from gpt2box.bench.bench import bench as measure

    measure(settings, steps, sweep, share, as_json)


@cli.command(short_help="Watch the card and a run in a second terminal.")
@click.argument("run", required=False)
@click.option("--once", is_flag=True, help="Show it once and end.")
def monitor(run: str | None, once: bool) -> None:
    """Watch the card and RUN (the newest by default) beside the training, in a second terminal."""
    from gpt2box.dashboard.monitor import monitor as show

    show(run, once)


for command in [*model_commands.COMMANDS, *run_commands.COMMANDS]:
    cli.add_command(command)


def main() -> None:
    """Run a command; an expected failure is a few lines and its exit code, a bug a traceback."""
    from gpt2box.system.host import host_oom_error, is_host_oom  # import now, while there is memory

    output = sys.stdout
    try:
        cli.main(prog_name="gpt2box", standalone_mode=False)
    except SystemExit as ended:
        if sys.stdout is not output:  # click replaces it on a broken pipe, and exits with 1
            exit_on_broken_pipe()
        exit_process(ended.code)
    except Gpt2boxError as error:
        print(error, file=sys.stderr)
        exit_process(error.exit_code)
    except click.ClickException as error:
        error.show(said := io.StringIO())
        print("\n".join(map(printable_line, said.getvalue().rstrip("\n").split("\n"))), file=sys.stderr)
        exit_process(2)
    except (click.Abort, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        exit_process(130)
    except BrokenPipeError:
        exit_on_broken_pipe()
    except (
        OSError,
        RuntimeError,
        MemoryError,
        ImportError,
    ) as error:  # ImportError: a library cannot be mapped
        fault = explain_os_error(error) if isinstance(error, OSError) else explain_cuda_oom(error)
        fault = host_oom_error() if is_host_oom(error) else fault
        if fault is None:
            raise
        print(fault, file=sys.stderr)
        exit_process(fault.exit_code)


def exit_on_broken_pipe() -> NoReturn:
    """Exit after the reader of standard output, such as `head`, has closed the pipe. Flushing would fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    exit_process(141)


def exit_process(code: str | int | None) -> NoReturn:
    """Exit with a code. With several ranks, exit without Python's cleanup.

    Cleanup would wait for the threads that are connected to the other ranks. If a thread outlived the interpreter, the
    process would abort and its exit code would be lost.
    """
    if rank_info().world_size > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else bool(code))
    sys.exit(code)
