"""The settings of a training run: one definition for YAML files, flags, help and checks.

loader.py reads them, validation.py checks them. Values that follow from the settings (accumulation, warm-up, shape)
are derived once, in planner/run_plan.py; no other code has defaults of its own.
"""

import re
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

# Radford et al. 2019, table 2, with the head counts of the published checkpoints.
MODEL_SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
}
MAX_COUNT = 10**15  # of any count
WHOLE_NUMBER_PATTERN = re.compile(r"[+-]?\d+(_\d+)*(\.\d*)?([eE]\+?\d+)?", re.ASCII)
DEVICE_PATTERN = r"auto|cpu|cuda(:(0|[1-9]\d?))?"


def parse_whole_number(value: object) -> object:
    """Convert 1e5 and 100_000, as people write them in YAML and on a command line, to a whole number."""
    if isinstance(value, str):
        if not WHOLE_NUMBER_PATTERN.fullmatch(value.strip()):
            raise ValueError("a whole number is expected")
        value = float(value)  # exact up to MAX_COUNT
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or (isinstance(value, int) and abs(value) > MAX_COUNT):
        raise ValueError("a whole number of usable size is expected")
    return value


def check_number(value: object) -> object:
    """Reject true, false and numbers too large to be meant."""
    if isinstance(value, bool) or (isinstance(value, int) and abs(value) > MAX_COUNT):
        raise ValueError("a number of usable size is expected")
    return value


def parse_auto_or_bool(value: object) -> object:
    """Convert "true" and "false" to a bool."""
    return {"true": True, "false": False}.get(value.lower(), value) if isinstance(value, str) else value


def parse_auto_or_whole(value: object) -> object:
    """Accept `auto` or a whole number from 1 to 1,000,000."""
    if value == "auto":
        return value
    number = parse_whole_number(value)
    if not 1 <= int(str(number)) <= 1_000_000:
        raise ValueError("a positive number is expected")
    return int(str(number))


Whole = Annotated[int, BeforeValidator(parse_whole_number)]
Number = Annotated[float, BeforeValidator(check_number), Field(allow_inf_nan=False)]
AutoWhole = Annotated[Literal["auto"] | int, BeforeValidator(parse_auto_or_whole)]
Tracking = Annotated[  # YAML reads a bare `off` as false
    Literal["off", "offline", "online"], BeforeValidator(lambda value: "off" if value is False else value)
]
AutoBool = Annotated[Literal["auto"] | bool, BeforeValidator(parse_auto_or_bool)]


def setting(default: Any, description: str, *, group: str, may_change: bool = False, **limits: Any) -> Any:
    """Define a field of `Config`. `may_change`: a run may be resumed with another value."""
    extra: Any = {"group": group, "may_change": may_change}
    return Field(default, description=description, json_schema_extra=extra, **limits)


class Config(BaseModel):
    """All settings of a run. None: derived from other settings, as the description says."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    name: str = setting(
        "", "name of the run and of its folder in volumes/runs (default: the config's file name)", group="Run"
    )
    dataset: str = setting("", "prepared dataset, by name or by path (with a slash)", group="Run")
    init_from: str = setting(
        "scratch",
        "initial weights: scratch, a published size (gpt2-medium, …), a run, a Hugging Face folder or OWNER/NAME",
        group="Run",
    )
    seed: Whole = setting(1337, "random seed of initial weights, batch order and dropout", group="Run", ge=0, lt=2**32)

    model: Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] = setting(
        "gpt2-medium", "model size by name; n_layer, n_head and n_embd override it", group="Model"
    )
    n_layer: Whole | None = setting(None, "number of layers", group="Model", ge=1, le=1000)
    n_head: Whole | None = setting(None, "attention heads per layer", group="Model", ge=1, le=1000)
    n_embd: Whole | None = setting(None, "embedding width, a multiple of n_head", group="Model", ge=1, le=100_000)
    block_size: Whole = setting(1024, "context length in tokens", group="Model", ge=1, le=1_048_576)
    dropout: Number = setting(0.0, "dropout probability; 0.1 to 0.2 helps on small texts", group="Model", ge=0, lt=1)
    bias: bool = setting(
        True, "use biases in linear layers and layer norms, as the published GPT-2 does", group="Model"
    )

    micro_batch_size: AutoWhole = setting(
        "auto",
        "sequences per forward and backward pass. auto: the fastest that fits into memory",
        group="Batch",
        may_change=True,
    )
    tokens_per_step: Whole = setting(
        65_536, "tokens per optimizer step; gradient accumulation follows from it", group="Batch", ge=1, le=1 << 30
    )

    max_steps: Whole = setting(100_000, "number of optimizer steps", group="Optimizer", may_change=True, ge=0)
    optimizer: Literal["adamw", "muon"] = setting(
        "adamw",
        "muon: for the matrices inside the blocks, AdamW for the rest; from scratch it needs fewer tokens",
        group="Optimizer",
    )
    learning_rate: Number = setting(3e-4, "peak learning rate", group="Optimizer", gt=0, le=1)
    min_lr: Number | None = setting(
        None, "final learning rate (default: a tenth of learning_rate)", group="Optimizer", ge=0, le=1
    )
    warmup_steps: Whole | None = setting(
        None, "steps of linear warm-up (default: 2% of max_steps, at most 2000)", group="Optimizer", ge=0
    )
    lr_schedule: Literal["cosine", "linear", "constant-linear", "constant"] = setting(
        "cosine",
        "decay from learning_rate to min_lr; constant-linear stays constant first, then decays linearly",
        group="Optimizer",
    )
    decay_steps: Whole | None = setting(
        None, "step at which min_lr is reached (default: max_steps)", group="Optimizer", ge=1
    )
    decay_fraction: Number = setting(
        0.2,
        "constant-linear: last fraction of decay_steps, in which the learning rate decays",
        group="Optimizer",
        gt=0,
        le=1,
    )
    weight_decay: Number = setting(0.1, "weight decay, applied to matrices only", group="Optimizer", ge=0)
    beta1: Number = setting(0.9, "AdamW's decay of the first moment", group="Optimizer", ge=0, lt=1)
    beta2: Number = setting(0.95, "AdamW's decay of the second moment", group="Optimizer", ge=0, lt=1)
    grad_clip: Number = setting(
        1.0, "maximum global norm of a step's gradient; 0: no clipping", group="Optimizer", ge=0
    )
    spike_sigma: Number = setting(
        6.0,
        "skip a loss spike: a step whose loss is this many standard deviations above the last 128 steps' mean; 0: off",
        group="Optimizer",
        ge=0,
    )
    optimizer_states: Literal["float32", "int8"] = setting(
        "float32", "dtype of the optimizer state. int8: a quarter of its memory; changes the numbers", group="Optimizer"
    )
    optimizer_in_backward: bool = setting(
        False,
        "apply and free gradients in the backward pass; not compiled. Exact without accumulation below grad_clip",
        group="Optimizer",
    )

    lora_rank: Whole = setting(
        0,
        "train LoRA adapters of this rank on frozen weights, merged in checkpoints; 0: train all weights",
        group="Adapters",
        ge=0,
    )
    lora_alpha: Number | None = setting(
        None, "scale of the LoRA adapters (default: twice lora_rank)", group="Adapters", gt=0
    )

    device: str = setting(
        "auto",
        "auto (a GPU if there is one), cpu, cuda or cuda:N",
        group="Machine",
        may_change=True,
        pattern=f"^({DEVICE_PATTERN})$",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto",
        "dtype of activations. auto: bfloat16 if the GPU supports it (mixed precision), else float32",
        group="Machine",
    )
    weights_dtype: Literal["float32", "bfloat16"] = setting(
        "float32",
        "dtype of the weight matrices. bfloat16: half their memory, stochastic rounding; changes the numbers",
        group="Machine",
    )
    compile: AutoBool = setting(
        "auto",
        "use torch.compile. auto: on a GPU, unless bench --sweep measured it to be slower",
        group="Machine",
        may_change=True,
    )
    activation_checkpointing: Literal["auto", "none", "selective", "full"] = setting(
        "auto", "recompute activations in the backward pass: less memory, more time", group="Machine", may_change=True
    )
    loss_chunk_tokens: Whole = setting(
        512, "tokens whose logits are in memory at a time", group="Machine", may_change=True, ge=1
    )
    shard: bool = setting(
        False,
        "shard weights, gradients and optimizer state over several GPUs (FSDP2): less memory, more traffic",
        group="Machine",
        may_change=True,
    )
    deterministic: AutoBool = setting(
        "auto",
        "repeat results bit for bit. auto: on a CPU, where it costs nothing; slower on a GPU (not measured yet)",
        group="Machine",
        may_change=True,
    )

    eval_interval: Whole = setting(500, "steps between evaluations", group="Evaluation", may_change=True, ge=1)
    eval_windows: Whole = setting(
        400, "validation windows of block_size tokens, the same in each evaluation; 0: all", group="Evaluation", ge=0
    )
    patience: Whole = setting(
        0,
        "stop early after this many evaluations without a better val_loss; 0: never",
        group="Evaluation",
        may_change=True,
        ge=0,
    )
    eval_only: bool = setting(False, "evaluate the run's best checkpoint and exit", group="Evaluation", may_change=True)
    sample_tokens: Whole = setting(
        0,
        "length in tokens of the sample written at each evaluation; 0: no sample",
        group="Evaluation",
        may_change=True,
        ge=0,
        le=100_000,
    )
    sample_prompt: str = setting("", "prompt of the sample", group="Evaluation", may_change=True)
    expected_val_loss: Number | None = setting(
        None, "published best val_loss, printed beside this run's", group="Evaluation", may_change=True
    )

    save_interval: Whole | None = setting(
        None, "steps between checkpoints (default: eval_interval)", group="Checkpoints", may_change=True, ge=1
    )
    save_minutes: Number = setting(
        30,
        "also save when the last checkpoint is this many minutes old; 0: by steps alone",
        group="Checkpoints",
        may_change=True,
        ge=0,
    )
    keep_last: Whole = setting(
        2, "newest checkpoints to keep, besides the best", group="Checkpoints", may_change=True, ge=1
    )
    log_interval: Whole = setting(
        10, "steps between rows of metrics.jsonl and lines of the log", group="Checkpoints", may_change=True, ge=1
    )
    log_format: Literal["auto", "text", "json"] = setting(
        "auto",
        "auto: a panel on a terminal, else lines of text. json: the rows of metrics.jsonl on standard output, too",
        group="Checkpoints",
        may_change=True,
    )

    wandb: Tracking = setting(
        "off",
        "log metrics to Weights & Biases. offline: into the run's folder, without an account",
        group="Checkpoints",
        may_change=True,
    )

    @property
    def may_compile(self) -> bool:
        """False if compilation is off, or excluded: a compiled backward pass returns all gradients at once."""
        return self.compile is not False and not self.optimizer_in_backward

    @property
    def max_checkpoints(self) -> int:
        """Most checkpoints on disk: the newest, the best, two rollback candidates, one being written."""
        return self.keep_last + 4

    def shape(self) -> dict[str, Any]:
        """Return n_layer, n_head and n_embd with the overrides applied."""
        own = {key: getattr(self, key) for key in ("n_layer", "n_head", "n_embd")}
        return {key: own[key] or size for key, size in MODEL_SHAPES[self.model].items()}


class SettingHelp(NamedTuple):
    """A setting as help texts and messages show it."""

    meaning: str
    values: str  # accepted values, with limits
    default: str


def describe_setting(key: str) -> SettingHelp:
    """Describe a setting for help texts and messages."""
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
    return SettingHelp(str(field.description), values, "" if field.default in (None, "") else str(field.default))


# Settings that --allow-change may change on resume: they affect the training from there on, but neither the checkpoint
# format, the position in the data nor the meaning of val_loss.
CHANGEABLE = (
    "learning_rate", "min_lr", "warmup_steps", "lr_schedule", "decay_steps", "decay_fraction",
    "weight_decay", "beta1", "beta2", "grad_clip", "spike_sigma", "dropout", "dtype",
)  # fmt: skip


def can_change_on_resume(key: str) -> bool:
    """Return True if a run may be resumed with another value of this setting."""
    extra = Config.model_fields[key].json_schema_extra
    return isinstance(extra, dict) and bool(extra["may_change"])
