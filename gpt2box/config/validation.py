"""Check all settings of a run, each by itself and together."""

import difflib
import reprlib
from typing import Any

from pydantic import ValidationError

from gpt2box.config.schema import Config, describe_setting
from gpt2box.errors import BadInput, escape_control

SHORT_REPR = reprlib.Repr()  # values from a file may be very long
SHORT_REPR.maxstring = SHORT_REPR.maxother = SHORT_REPR.maxlong = 200
MAX_SUGGESTIONS = 20  # of the nearest name, each takes a millisecond


def validate(values: dict[str, Any], source: str) -> Config:
    """Check all settings and return them as a frozen `Config`.

    Raises BadInput: lists every fault, each with what was found and what is expected.
    """
    faults = []
    for number, key in enumerate(values.keys() - Config.model_fields.keys()):
        near = difflib.get_close_matches(str(key), Config.model_fields, 1) if number < MAX_SUGGESTIONS else []
        faults.append(f"{key}: no such setting" + (f"; did you mean {near[0]}?" if near else ""))
    known = {key: value for key, value in values.items() if key in Config.model_fields}
    for key, value in known.items():
        if isinstance(value, str) and escape_control(value.replace("\n", "")) != value.replace("\n", ""):
            faults.append(f"{key}: found {SHORT_REPR.repr(value)}; expected characters that can be written")
    config = None
    try:
        config = Config.model_validate(known)
    except ValidationError as error:
        for fault in error.errors():
            if not any(f.startswith(f"{fault['loc'][0]}: ") for f in faults):
                key = str(fault["loc"][0])
                found, expected = SHORT_REPR.repr(fault["input"]), describe_setting(key)
                faults.append(f"{key}: found {found}; expected {expected.values}: {expected.meaning}")
    if config is not None:
        faults += find_contradictions(config)
    if config is None or faults:
        one = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise BadInput(
            f"{source}: {one}\n    " + "\n    ".join(sorted(faults)),
            next_step="gpt2box train --help lists all settings",
        )
    return config


def find_contradictions(config: Config) -> list[str]:
    """Return faults of settings that are valid alone but not together."""
    faults = []
    shape = config.shape()
    if shape["n_embd"] % shape["n_head"]:
        faults.append(f"n_embd: found {shape['n_embd']}; expected a multiple of n_head, {shape['n_head']}")
    micro_batch_size = 1 if config.micro_batch_size == "auto" else config.micro_batch_size
    per_micro_step = micro_batch_size * config.block_size
    if config.tokens_per_step % per_micro_step:
        below = config.tokens_per_step // per_micro_step * per_micro_step
        choices = f"{below} or {below + per_micro_step}" if below else str(per_micro_step)
        faults.append(
            f"tokens_per_step: found {config.tokens_per_step}; expected a multiple of micro_batch_size × block_size "
            f"({micro_batch_size} × {config.block_size} = {per_micro_step} tokens), such as {choices}"
        )
    if config.lr_schedule != "constant" and config.min_lr is not None and config.min_lr > config.learning_rate:
        faults.append(f"min_lr: found {config.min_lr}; expected at most learning_rate, {config.learning_rate}")
    limit = config.decay_steps or config.max_steps
    if config.warmup_steps and config.warmup_steps > limit > 0:
        faults.append(
            f"warmup_steps: found {config.warmup_steps}; expected at most decay_steps or max_steps, {limit}, "
            f"such as {max(limit // 10, 1)}"
        )
    if config.compile is True and config.optimizer_in_backward:
        faults.append("compile: found true; expected auto or false with optimizer_in_backward")
    if config.optimizer == "muon" and config.optimizer_in_backward:
        faults.append("optimizer: found muon with optimizer_in_backward; expected adamw: muon needs complete gradients")
    if config.shard and config.weights_dtype != "float32":
        faults.append(f"shard: found with weights_dtype {config.weights_dtype}; expected float32")
    if config.lora_rank:
        faults += find_lora_contradictions(config)
    elif config.lora_alpha is not None:
        faults.append(f"lora_alpha: found {config.lora_alpha}; expected none without lora_rank")
    if not config.dataset:
        faults.append("dataset: missing; expected the name of a prepared dataset (gpt2box prepare --help)")
    return faults


def find_lora_contradictions(config: Config) -> list[str]:
    """Return faults of settings that do not work with LoRA."""
    faults = []
    if config.init_from == "scratch":
        faults.append("lora_rank: found with init_from scratch; expected initial weights, such as gpt2-medium")
    if config.lora_rank > config.shape()["n_embd"]:
        faults.append(f"lora_rank: found {config.lora_rank}; expected at most n_embd, {config.shape()['n_embd']}")
    if config.optimizer == "muon":
        faults.append("optimizer: found muon with lora_rank; expected adamw, which LoRA was published with")
    for key in ("optimizer_states", "optimizer_in_backward", "shard"):
        if getattr(config, key) != Config.model_fields[key].default:
            faults.append(
                f"{key}: found with lora_rank, whose gradients and optimizer state are small; expected the default"
            )
    if config.activation_checkpointing == "selective":
        faults.append("activation_checkpointing: found selective; expected auto, none or full with lora_rank")
    return faults


def check_ranks(config: Config, ranks: int) -> None:
    """Check that so many ranks can share a step.

    Raises BadInput: they cannot process equal numbers of sequences, or a setting works on one GPU alone.
    """
    if ranks == 1:
        return
    if config.optimizer_in_backward:
        raise BadInput(
            f"optimizer_in_backward with {ranks} ranks: it would apply gradients before they are averaged",
            "one GPU",
            "--optimizer-in-backward false; --optimizer-states int8 also saves memory on several",
        )
    if ":" in config.device:
        raise BadInput(f"device {config.device} with {ranks} ranks", "auto, cpu or cuda: each rank uses its own GPU")
    micro_batch_size = 1 if config.micro_batch_size == "auto" else config.micro_batch_size
    each = micro_batch_size * config.block_size * ranks
    if config.tokens_per_step % each:
        below = config.tokens_per_step // each * each
        raise BadInput(
            f"tokens_per_step {config.tokens_per_step} with {ranks} ranks",
            f"a multiple of ranks × micro_batch_size × block_size ({ranks} × {micro_batch_size} × {config.block_size} "
            f"= {each} tokens), such as {f'{below} or ' if below else ''}{below + each}",
        )
