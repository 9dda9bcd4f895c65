"""Find and fetch what a training job needs: its dataset and the weights to start from."""

from dataclasses import dataclass
from pathlib import Path

from gpt2box.config.schema import MODEL_SHAPES, Config
from gpt2box.data.dataset import open_dataset
from gpt2box.data.prepare import prepare
from gpt2box.data.prepare_config import PrepareConfig
from gpt2box.data.pretrained import HUB_PINS, UNPINNED_SIZES, pretrained_folder
from gpt2box.data.sources import KNOWN_CORPORA, OPENWEBTEXT
from gpt2box.errors import VolumeUnwritable
from gpt2box.model.shape import GPT2_VOCAB_SIZE, ModelShape
from gpt2box.planner.model_shape import resolve_model_shape
from gpt2box.system import host
from gpt2box.utils.paths import dataset_dir, ensure_writable, list_checkpoints, model_dir, run_dir, volumes_dir
from gpt2box.utils.progress import format_bytes, log_line

VOLUMES = ("data", "models", "runs")
CHAR = "-char"  # default suffix of a character dataset's name
CORPUS_BYTES = {  # of the tokens, and of raw text that is there at the same time
    "shakespeare": 9_000_000,
    "tinyshakespeare": 3_000_000,
    "openwebtext": 19_500_000_000,
    "openwebtext-10k": 1_000_000_000,
}


@dataclass(frozen=True)
class DiskNeed:
    """Describe something that a job will write to a volume."""

    volume: str  # data, models or runs
    what: str
    size_bytes: int
    hub: bool = False  # True if it is downloaded from the Hugging Face Hub


def list_disk_needs(config: Config) -> list[DiskNeed]:
    """List what is missing, and what the run itself will write."""
    found = []
    corpus = known_corpus_name(config.dataset)
    if not has_dataset(config) and corpus:
        found.append(DiskNeed("data", f"the dataset {config.dataset}", CORPUS_BYTES[corpus], hub=corpus in OPENWEBTEXT))
    weights = config.init_from
    published = {**HUB_PINS, **UNPINNED_SIZES}
    if weights in published and not any(
        (model_dir(weights) / n).exists() for n in ("model.safetensors", "config.json")
    ):
        found.append(DiskNeed("models", f"the weights of {weights}", published[weights][0], hub=True))
    there = sum(path.stat().st_size for path in (run_dir(config.name) / "checkpoints").glob("step-*/*"))
    found.append(
        DiskNeed(
            "runs",
            f"{config.max_checkpoints} checkpoints",
            max(config.max_checkpoints * checkpoint_bytes(config) - there, 0),
        )
    )
    return found


def checkpoint_bytes(config: Config) -> int:
    """Return a checkpoint's size, on disk and, while it is written, in host memory."""
    if config.init_from == "scratch":
        shape = resolve_model_shape(config)
    else:  # other weights may not have been downloaded yet
        sizes = MODEL_SHAPES.get(config.init_from) or config.shape()
        shape = ModelShape(**sizes, block_size=config.block_size, vocab_size=GPT2_VOCAB_SIZE, bias=True)
    return shape.checkpoint_bytes(config.weights_dtype, config.optimizer, config.optimizer_states, config.lora_rank)


def group_needs_by_disk(config: Config | None) -> list[tuple[list[str], int, list[DiskNeed]]]:
    """Group volumes by disk: their names, the bytes free, and what the job writes there.

    Raises VolumeUnwritable: a volume cannot be created or written.
    """
    wanted = list_disk_needs(config) if config else []
    disks: dict[int, list[str]] = {}
    for volume in VOLUMES:
        disks.setdefault(ensure_writable(volumes_dir() / volume).stat().st_dev, []).append(volume)
    return [
        (names, host.free_bytes(volumes_dir() / names[0]), [need for need in wanted if need.volume in names])
        for names in disks.values()
    ]


def check_space(config: Config) -> None:
    """Check that the volumes can be written and have space for what the job will write.

    Raises VolumeUnwritable: with the bytes missing.
    """
    for names, free, wanted in group_needs_by_disk(config):
        needed = sum(need.size_bytes for need in wanted)
        if needed > free:
            listed = ", ".join(f"{need.what} {format_bytes(need.size_bytes)}" for need in wanted)
            raise VolumeUnwritable(
                f"{format_bytes(free)} free for {', '.join(names)} in {volumes_dir()}; "
                f"the job writes {format_bytes(needed)} ({listed})",
                f"{format_bytes(needed - free)} more",
                "free space, or set GPT2BOX_VOLUMES to a folder on a larger disk",
            )


def has_dataset(config: Config) -> bool:
    """Return True if the dataset's tokens are present."""
    return (dataset_dir(config.dataset) / "train.bin").exists()


def known_corpus_name(dataset: str) -> str:
    """Return the known corpus that a dataset's name stands for, or an empty string."""
    name = dataset.removesuffix(CHAR)
    return name if name in KNOWN_CORPORA and (name == dataset or name not in OPENWEBTEXT) else ""


def select_tokenizer(config: Config) -> str:
    """Return the tokenizer of the weights that a run starts from, as prepare's --tokenizer."""
    if config.init_from in ("scratch", *MODEL_SHAPES):
        return "gpt2"
    begun = bool(list_checkpoints(run_dir(config.name) / "checkpoints"))  # the initial weights may have been deleted
    folder = dataset_dir(config.dataset) / "tokenizer" if begun else pretrained_folder(config.init_from)
    return str(folder) if any((folder / name).exists() for name in ("vocab.json", "tokenizer.json")) else "gpt2"


def fetch_requirements(config: Config, text: Path | None) -> None:
    """Make the dataset from `text` or a known corpus, and download the weights, unless present.

    Raises:
        BadInput: the dataset is not there and nothing says what to make it from.
        TryAgain, Damaged, VolumeUnwritable: see downloads.fetch.
    """
    folder = dataset_dir(config.dataset)
    corpus = known_corpus_name(config.dataset)
    if text:
        _, written = prepare([str(text)], PrepareConfig(select_tokenizer(config)), folder=folder)
    elif not has_dataset(config) and corpus:
        tokenizer = "char" if config.dataset.endswith(CHAR) else "gpt2"
        _, written = prepare([corpus], PrepareConfig(tokenizer), folder=folder)
    else:
        written = False
    dataset = open_dataset(folder)  # says what to do where it is missing
    made = "made" if written else "there"
    log_line(f"dataset {config.dataset}: {made}, {dataset.tokens('train'):,} tokens to train on")
    if config.init_from != "scratch" and not list_checkpoints(run_dir(config.name) / "checkpoints"):
        log_line(f"weights of {config.init_from}: {pretrained_folder(config.init_from)}")
