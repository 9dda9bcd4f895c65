"""The settings of a training run: one definition for YAML files, flags, help and checks.

config_file.py reads them; `validate` checks the whole and returns a frozen `Config`. What follows
from the settings (accumulation, warm-up, shape) is derived once, in planning/plan.py; nothing
further down has a default of its own.
"""

from __future__ import annotations

import difflib
import re
import reprlib
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from gpt2box.errors import BadInput, harmless

# Radford et al. 2019, table 2, with the head counts of the published checkpoints.
MODEL_SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
}
SHORT = reprlib.Repr()  # of values that a file may have made endless
SHORT.maxstring = SHORT.maxother = SHORT.maxlong = 200
MOST_GUESSES = 20  # at what a wrong name may have meant, each of a millisecond
MOST = 10**15  # of anything that is counted
WHOLE = re.compile(r"[+-]?\d+(_\d+)*(\.\d*)?([eE]\+?\d+)?", re.ASCII)
DEVICES = r"auto|cpu|cuda(:(0|[1-9]\d?))?"


def whole_number(value: object) -> object:
    """Accept 1e5 and 100_000 for a whole number, as people write them in YAML and on a command line."""
    if isinstance(value, str):
        if not WHOLE.fullmatch(value.strip()):
            raise ValueError("a whole number is expected")
        value = float(value)  # exact up to MOST
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or (isinstance(value, int) and abs(value) > MOST):
        raise ValueError("a whole number of use is expected")
    return value


def _number(value: object) -> object:
    if isinstance(value, bool) or (isinstance(value, int) and abs(value) > MOST):
        raise ValueError("a number of use is expected")
    return value


def _auto_or_bool(value: object) -> object:
    return {"true": True, "false": False}.get(value.lower(), value) if isinstance(value, str) else value


def _off(value: object) -> object:
    return "off" if value is False else value  # which `off` is in YAML


def _auto_or_whole(value: object) -> object:
    if value == "auto":
        return value
    number = whole_number(value)
    if not 1 <= int(str(number)) <= 1_000_000:
        raise ValueError("a positive number is expected")
    return int(str(number))


Whole = Annotated[int, BeforeValidator(whole_number)]
Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
AutoWhole = Annotated[Literal["auto"] | int, BeforeValidator(_auto_or_whole)]
Tracking = Annotated[Literal["off", "offline", "online"], BeforeValidator(_off)]
AutoBool = Annotated[Literal["auto"] | bool, BeforeValidator(_auto_or_bool)]


def setting(default: Any, description: str, *, group: str, may_change: bool = False, **limits: Any) -> Any:
    """A field of `Config`. `may_change`: a run may be resumed with another value of it."""
    extra: Any = {"group": group, "may_change": may_change}
    return Field(default, description=description, json_schema_extra=extra, **limits)


class Config(BaseModel):
    """All settings of a run. `None` means: derived from the others (see the description)."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    name: str = setting("", "the run's name, volumes/runs/NAME (default: the config's file name)", group="Run")
    dataset: str = setting("", "a prepared dataset, by name or by folder (a path with a slash)", group="Run")
    init_from: str = setting(
        "scratch",
        "scratch, a published size (gpt2-medium, …), a run, a Hugging Face folder, or OWNER/NAME of the Hub",
        group="Run",
    )
    seed: Whole = setting(1337, "of the initial weights, the batches' order and dropout", group="Run", ge=0, lt=2**32)

    model: Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] = setting(
        "gpt2-medium", "the shape by name; the three below override it", group="Model"
    )
    n_layer: Whole | None = setting(None, "layers", group="Model", ge=1, le=1000)
    n_head: Whole | None = setting(None, "attention heads in a layer", group="Model", ge=1, le=1000)
    n_embd: Whole | None = setting(None, "width, a multiple of n_head", group="Model", ge=1, le=100_000)
    block_size: Whole = setting(1024, "context length in tokens", group="Model", ge=1, le=1_048_576)
    dropout: Number = setting(
        0.0, "share of activations dropped; 0.1 to 0.2 helps on small texts", group="Model", ge=0, lt=1
    )
    bias: bool = setting(True, "biases in linear layers and layer norms, as in the published GPT-2", group="Model")

    micro_batch_size: AutoWhole = setting(
        "auto",
        "sequences in one forward and backward pass. auto: the fastest that fits",
        group="Batch",
        may_change=True,
    )
    tokens_per_step: Whole = setting(
        65_536, "tokens in one optimizer step; accumulation follows from it", group="Batch", ge=1, le=1 << 30
    )

    max_steps: Whole = setting(100_000, "optimizer steps", group="Optimizer", may_change=True, ge=0)
    optimizer: Literal["adamw", "muon"] = setting(
        "adamw",
        "muon: for the matrices inside the blocks, AdamW for the rest; fewer tokens to a loss, from scratch",
        group="Optimizer",
    )
    learning_rate: Number = setting(3e-4, "highest learning rate", group="Optimizer", gt=0, le=1)
    min_lr: Number | None = setting(None, "learning rate at the end (default: a tenth)", group="Optimizer", ge=0, le=1)
    warmup_steps: Whole | None = setting(
        None, "steps of linear rise (default: 2% of max_steps, at most 2000)", group="Optimizer", ge=0
    )
    lr_schedule: Literal["cosine", "linear", "constant-linear", "constant"] = setting(
        "cosine", "from the highest to min_lr; constant-linear stays, then falls", group="Optimizer"
    )
    decay_steps: Whole | None = setting(
        None, "step at which min_lr is reached (default: max_steps)", group="Optimizer", ge=1
    )
    decay_fraction: Number = setting(
        0.2, "constant-linear: the last share of decay_steps in which it falls", group="Optimizer", gt=0, le=1
    )
    weight_decay: Number = setting(0.1, "on matrices only", group="Optimizer", ge=0)
    beta1: Number = setting(0.9, "AdamW's average of gradients", group="Optimizer", ge=0, lt=1)
    beta2: Number = setting(0.95, "AdamW's average of their squares", group="Optimizer", ge=0, lt=1)
    grad_clip: Number = setting(
        1.0, "highest global norm of a step's gradient; 0: no clipping", group="Optimizer", ge=0
    )
    spike_sigma: Number = setting(
        6.0,
        "leave out a step whose loss is so many standard deviations above the last 128 steps' mean; 0: none",
        group="Optimizer",
        ge=0,
    )
    optimizer_states: Literal["float32", "int8"] = setting(
        "float32", "AdamW's averages. int8: a quarter of their memory; changes the numbers", group="Optimizer"
    )
    optimizer_in_backward: bool = setting(
        False,
        "take each gradient in and free it as it is made. Exact without accumulation below grad_clip; not compiled",
        group="Optimizer",
    )

    lora_rank: Whole = setting(
        0,
        "train adapters of this rank on the frozen weights (LoRA), merged in checkpoints; 0: all",
        group="Adapters",
        ge=0,
    )
    lora_alpha: Number | None = setting(
        None, "strength of the adapters, a multiple of lora_rank (default: twice lora_rank)", group="Adapters", gt=0
    )

    device: str = setting(
        "auto",
        "auto, cpu, cuda or cuda:N",
        group="Machine",
        may_change=True,
        pattern=f"^({DEVICES})$",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "of activations. auto: bfloat16 where the GPU has it", group="Machine"
    )
    weights_dtype: Literal["float32", "bfloat16"] = setting(
        "float32",
        "of the matrices. bfloat16: half their memory, rounded by chance; changes the numbers",
        group="Machine",
    )
    compile: AutoBool = setting(
        "auto", "torch.compile. auto: on a GPU, unless bench --sweep found otherwise", group="Machine", may_change=True
    )
    activation_checkpointing: Literal["auto", "none", "selective", "full"] = setting(
        "auto", "recompute in the backward pass: less memory, more time", group="Machine", may_change=True
    )
    loss_chunk_tokens: Whole = setting(
        512, "tokens whose logits exist at a time", group="Machine", may_change=True, ge=1
    )
    shard: bool = setting(
        False,
        "with several GPUs: each keeps a share of weights, gradients and averages (FSDP2). Less memory, more is sent",
        group="Machine",
        may_change=True,
    )
    deterministic: AutoBool = setting(
        "auto",
        "the same bits each time. auto: on a CPU, where it is free; on a GPU slower, by how much is not measured yet",
        group="Machine",
        may_change=True,
    )

    eval_interval: Whole = setting(500, "steps between evaluations", group="Evaluation", may_change=True, ge=1)
    eval_windows: Whole = setting(
        400, "validation windows of block_size tokens, the same each time; 0: all", group="Evaluation", ge=0
    )
    patience: Whole = setting(
        0,
        "stop after this many evaluations without a better val_loss; 0: never",
        group="Evaluation",
        may_change=True,
        ge=0,
    )
    eval_only: bool = setting(False, "evaluate and stop", group="Evaluation", may_change=True)
    sample_tokens: Whole = setting(
        0,
        "tokens of a sample written at each evaluation; 0: none",
        group="Evaluation",
        may_change=True,
        ge=0,
        le=100_000,
    )
    sample_prompt: str = setting("", "what the sample begins with", group="Evaluation", may_change=True)
    expected_val_loss: Number | None = setting(
        None, "a published best val_loss, printed beside this run's", group="Evaluation", may_change=True
    )

    save_interval: Whole | None = setting(
        None, "steps between checkpoints (default: eval_interval)", group="Checkpoints", may_change=True, ge=1
    )
    save_minutes: Number = setting(
        30,
        "and a checkpoint when none was written for so long; 0: by steps alone",
        group="Checkpoints",
        may_change=True,
        ge=0,
    )
    keep_last: Whole = setting(
        2, "newest checkpoints kept, besides the best", group="Checkpoints", may_change=True, ge=1
    )
    log_interval: Whole = setting(
        10, "steps between lines of metrics.jsonl and the log", group="Checkpoints", may_change=True, ge=1
    )
    log_format: Literal["auto", "text", "json"] = setting(
        "auto",
        "auto: a panel on a terminal, else lines of text. json: metrics.jsonl's lines on standard output, too",
        group="Checkpoints",
        may_change=True,
    )

    wandb: Tracking = setting(
        "off",
        "Weights & Biases, with metrics.jsonl's figures. offline: in the run's folder, without an account",
        group="Checkpoints",
        may_change=True,
    )

    @property
    def may_compile(self) -> bool:
        """A compiled backward pass hands out all gradients at once, which is what optimizer_in_backward is to avoid."""
        return self.compile is not False and not self.optimizer_in_backward

    @property
    def max_checkpoints(self) -> int:
        """Most checkpoints on disk: the newest, the best, two rollback candidates, one being written."""
        return self.keep_last + 4

    def shape(self) -> dict[str, Any]:
        """n_layer, n_head and n_embd with the overrides applied."""
        own = {key: getattr(self, key) for key in ("n_layer", "n_head", "n_embd")}
        return {key: own[key] or size for key, size in MODEL_SHAPES[self.model].items()}


class About(NamedTuple):
    """A setting in words."""

    meaning: str
    values: str  # what may be given, with limits
    default: str


def about(key: str) -> About:
    """A setting for help texts and messages."""
    field = Config.model_fields[key]
    kinds = [kind for kind in get_args(field.annotation) or (field.annotation,) if kind is not type(None)]
    values = "TEXT"
    if field.annotation is bool:
        values = "[true|false]"
    elif key in ("compile", "deterministic"):
        values = "[auto|true|false]"
    elif key == "micro_batch_size":
        values = "[auto|N ≥ 1]"
    elif all(isinstance(kind, str) for kind in kinds):
        values = f"[{'|'.join(kinds)}]"
    elif field.annotation is not str:
        values = "N" if "int" in str(field.annotation) else "X"
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    limits = [f"{sign} {getattr(m, name)}" for m in field.metadata for name, sign in signs.items() if hasattr(m, name)]
    if limits:
        values += " " + " and ".join(limits)
    return About(str(field.description), values, "" if field.default in (None, "") else str(field.default))


def validate(values: dict[str, Any], source: str) -> Config:
    """Check all values at once.

    Raises:
        BadInput: a list of every fault, each with what was found and what is expected.
    """
    faults = []
    for number, key in enumerate(values.keys() - Config.model_fields.keys()):
        near = difflib.get_close_matches(str(key), Config.model_fields, 1) if number < MOST_GUESSES else []
        faults.append(f"{key}: no such setting" + (f"; did you mean {near[0]}?" if near else ""))
    known = {key: value for key, value in values.items() if key in Config.model_fields}
    for key, value in known.items():
        if isinstance(value, str) and harmless(value.replace("\n", "")) != value.replace("\n", ""):
            faults.append(f"{key}: found {SHORT.repr(value)}; expected characters that can be written")
    config = None
    try:
        config = Config.model_validate(known)
    except ValidationError as error:
        for fault in error.errors():
            if not any(f.startswith(f"{fault['loc'][0]}: ") for f in faults):
                key = str(fault["loc"][0])
                found, expected = SHORT.repr(fault["input"]), about(key)
                faults.append(f"{key}: found {found}; expected {expected.values}: {expected.meaning}")
    if config is not None:
        from gpt2box.config.validation import contradictions  # which needs this module

        faults += contradictions(config)
    if config is None or faults:
        one = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise BadInput(
            f"{source}: {one}\n    " + "\n    ".join(sorted(faults)),
            next_step="gpt2box train --help lists all settings",
        )
    return config


# What a run may be resumed with where --allow-change asks for it: it changes the course from here on, and leaves the
# checkpoint, the position in the text and what val_loss means as they are.
CHANGEABLE = (
    "learning_rate", "min_lr", "warmup_steps", "lr_schedule", "decay_steps", "decay_fraction",
    "weight_decay", "beta1", "beta2", "grad_clip", "spike_sigma", "dropout", "dtype",
)  # fmt: skip


def may_change(key: str) -> bool:
    """Whether a run may be resumed with another value of this setting."""
    extra = Config.model_fields[key].json_schema_extra
    return isinstance(extra, dict) and bool(extra["may_change"])
