"""Locate pretrained weights: download, checksums, shape. Importable without torch."""

from dataclasses import replace
from pathlib import Path

from gpt2box.config.schema import MODEL_SHAPES, Config
from gpt2box.data import downloads, hub_models
from gpt2box.data.tokenizer import GPT2_VOCAB_SIZES, Tokenizer, load_model_tokenizer
from gpt2box.errors import BadInput, Damaged, describe_error
from gpt2box.model.shape import GPT2_VOCAB_SIZE, ModelShape, parse_sizes
from gpt2box.utils.files import read_json
from gpt2box.utils.paths import find_checkpoint, model_dir, raw_dir, run_dir

HUB_REVISIONS = {
    "gpt2": "607a30d783dfa663caf39e06633721c8d4cfcd7e",
    "gpt2-medium": "6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
    "gpt2-large": "32b71b12589c2f8d625668d2335a01cac3249519",
    "gpt2-xl": "15ea56dee5df4983c59b2538573817e1667135e2",
}
HUB_PINS = {
    "gpt2": (548_105_171, "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707"),
    "gpt2-medium": (1_519_984_962, "fc5a354a19255ad494f3d71549390baca1ccf61d1d822b9408971705c687c9cd"),
}
# Queried from the Hub at the pinned revision; the sizes here are approximate.
UNPINNED_SIZES = {
    "gpt2-large": (3_247_159_000, ""),
    "gpt2-xl": (6_431_829_000, "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a"),
}
# Settings of config.json that would change the network but not its tensors.
REQUIRED_SETTINGS = {
    "n_inner": None,
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
GELU_VARIANTS = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}  # by the names of transformers


def pretrained_folder(init_from: str) -> Path:
    """Return the folder that `init_from` names: a run's best checkpoint, a published size or a Hub model.

    Downloads the latter two unless present.

    Raises:
        BadInput: no such folder, or no such model on the Hub.
        TryAgain, Damaged: see downloads.fetch.
    """
    if init_from not in MODEL_SHAPES:
        folder = Path(init_from) if "/" in init_from else model_dir(init_from)
        if "/" not in init_from and not folder.exists() and (of_run := find_checkpoint(run_dir(init_from), "best")):
            return of_run
        if not folder.is_dir() and hub_models.HUB_NAME.fullmatch(init_from):
            return hub_models.hub_model(init_from)
        if not (folder / "config.json").is_file():
            raise BadInput(
                f"init_from {init_from}: no config.json in {folder}",
                f"scratch, one of {', '.join(MODEL_SHAPES)}, a run, a Hugging Face folder, or OWNER/NAME of the Hub",
            )
        return folder
    folder = model_dir(init_from)
    if (folder / "config.json").is_file():
        return folder  # put there by the user
    size_bytes, sha256 = HUB_PINS.get(init_from) or fetch_pin(init_from)
    url = (
        f"{downloads.hub_endpoint()}/openai-community/{init_from}/resolve/{HUB_REVISIONS[init_from]}/model.safetensors"
    )
    downloads.fetch(downloads.Asset("model.safetensors", size_bytes, sha256, url), folder)
    return folder


def fetch_pin(init_from: str) -> tuple[int, str]:
    """Fetch size and sha256 of weights from the Hub at the pinned revision.

    Raises:
        Damaged: other weights than are known here.
        TryAgain: the Hub does not answer.
    """
    from gpt2box.data.hub_datasets import list_repository_files

    name, known = "model.safetensors", UNPINNED_SIZES[init_from][1]
    if (model_dir(init_from) / name).is_file() and known:
        return 0, known  # a copy that was put there
    kept = raw_dir() / f"{init_from}.files.json"
    found = list_repository_files(f"models/openai-community/{init_from}", HUB_REVISIONS[init_from], "", [name], kept)[
        name
    ]
    if known and found[1] != known:
        raise Damaged(f"the Hub's {init_from} has sha256 {found[1]}", known, f"see {kept}")
    return found


def resolve_shape(
    config: Config, stored: ModelShape, where: str, ours: Tokenizer | None, theirs: Tokenizer | None
) -> ModelShape:
    """Return the shape of a run that starts from weights of shape `stored`.

    `ours` and `theirs`: the tokenizers of the dataset and of the weights, where they are known. The weights' rows
    beyond the dataset's vocabulary are left out; where it has theirs and more, rows are added.

    Raises BadInput: the settings and the weights, or the weights and the dataset, do not fit.
    """
    faults = [
        f"{key}: found {value} in the settings, {getattr(stored, key)} in {where}"
        for key in ("n_layer", "n_head", "n_embd")
        if (value := getattr(config, key)) not in (None, getattr(stored, key))
    ]
    if config.block_size > stored.block_size:
        faults.append(f"block_size: found {config.block_size}; the weights allow at most {stored.block_size}")
    if ours and not is_compatible_vocabulary(ours, theirs, stored.vocab_size):
        faults.append(
            f"dataset {config.dataset} has a vocabulary of {ours.vocab_size:,} tokens, the weights "
            + (f"one of {stored.vocab_size:,}" if ours.vocab_size != stored.vocab_size else "another of as many")
            + f"; one in theirs: gpt2box prepare TEXT --tokenizer {config.init_from} --name …"
        )
    if faults:
        raise BadInput("\n    ".join(faults), f"settings and data that fit {config.init_from}")
    return replace(stored, block_size=config.block_size, vocab_size=ours.vocab_size if ours else stored.vocab_size)


def load_initial_shape(config: Config, folder: Path, ours: Tokenizer) -> ModelShape:
    """Return the shape of a run that starts from a folder's weights, on a dataset with tokenizer `ours`.

    Raises BadInput, Damaged: the weights do not fit the settings or the dataset.
    """
    stored = load_shape(folder)
    return resolve_shape(config, stored, str(folder), ours, load_weights_tokenizer(folder, stored, ours))


def is_compatible_vocabulary(ours: Tokenizer, theirs: Tokenizer | None, rows: int) -> bool:
    """Return True if each token of the weights has the same id in the dataset; if unknown, compare the sizes."""
    if theirs is None:
        return ours.vocab_size == rows
    return theirs.vocabulary().items() <= ours.vocabulary().items()


def load_weights_tokenizer(folder: Path, stored: ModelShape, ours: Tokenizer) -> Tokenizer | None:
    """Load the tokenizer of a folder's weights; None for GPT-2's with a character dataset, which never match."""
    has_own = any((folder / name).exists() for name in ("vocab.json", "tokenizer.json"))
    if not has_own and stored.vocab_size in GPT2_VOCAB_SIZES and ours.kind in ("gpt2", "char"):
        return ours if ours.kind == "gpt2" else None  # without a look at GPT-2's own, which may not be here
    return load_model_tokenizer(folder, stored.vocab_size)


def load_shape(folder: Path) -> ModelShape:
    """Return the shape of the model in a Hugging Face folder (or one that pretrained_folder downloaded).

    Raises:
        BadInput: not GPT-2's architecture.
        Damaged: config.json is unreadable.
    """
    path = folder / "config.json"
    if not path.exists() and folder.name in MODEL_SHAPES:
        sizes = MODEL_SHAPES[folder.name]
        return ModelShape(**sizes, block_size=1024, vocab_size=GPT2_VOCAB_SIZE, bias=True)
    try:
        config = read_json(path)
        if config.get("model_type") != "gpt2":
            raise BadInput(f"{path}: model_type {config.get('model_type')!r}", "'gpt2'")
        gelu = GELU_VARIANTS.get(config.get("activation_function", "gelu_new"))
        if gelu is None:
            raise BadInput(
                f"{path}: activation_function {config['activation_function']!r}", f"one of: {', '.join(GELU_VARIANTS)}"
            )
        sizes = parse_sizes({**config, "block_size": config["n_positions"]})
        for key, expected in REQUIRED_SETTINGS.items():
            if config.get(key, expected) not in (expected, 4 * sizes["n_embd"] if key == "n_inner" else expected):
                raise BadInput(f"{path}: {key} {config[key]!r}", f"{expected!r}, as in the published GPT-2")
        bias = bool(config.get("gpt2box", {}).get("bias", True))
        return ModelShape(**sizes, bias=bias, gelu=gelu)
    except (OSError, ValueError, OverflowError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(
            f"{path} is damaged ({describe_error(error)})", "a GPT-2 config as transformers writes it"
        ) from error
