"""`gpt2box plan`: what fits a card, how fast, how long, and what else there is to choose. Never imports torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from gpt2box.config.schema import MODEL_SHAPES, Config
from gpt2box.data.dataset import open_dataset
from gpt2box.data.pretrained import pretrained_folder, shape_from, shape_in, words_of
from gpt2box.data.tokenizer import Tokenizer
from gpt2box.errors import BadInput, Gpt2boxError, MachineCannot
from gpt2box.model.shape import ModelShape
from gpt2box.planner.execution_plan import ExecutionPlan, TargetDevice
from gpt2box.planner.gpu_specs import GPU_SPECS, GpuSpec, gpu_spec_named, gpu_spec_of_device
from gpt2box.planner.memory import GIB, padded_parameters
from gpt2box.planner.search import (
    BF16_FROM,
    apply_bench_records,
    check_ranks_divide_step,
    check_sharding,
    choose_execution_plan,
    fallback_settings,
    first_fitting_plan,
    list_execution_plans,
)
from gpt2box.system import gpu
from gpt2box.system.host import cpu_name, memory_bytes
from gpt2box.utils.paths import dataset_dir, model_dir
from gpt2box.utils.progress import counted, duration, size

VOCABULARY = 50_257
CHARACTERS = 100  # about as many as an English text has
DESKTOP_BYTES = GIB // 2  # of a card that is only named: what a desktop without a browser holds


@dataclass(frozen=True)
class Target:
    """Where to plan for, and a word on its memory."""

    place: TargetDevice
    note: str


def target(name: str | None, vram_gib: float | None, config: Config, gpus: int = 1) -> Target:
    """The card named, one of that memory, or what is here; `gpus` such cards in one machine.

    Raises:
        BadInput: an unknown card, or none here, none named and the settings want one; or so many cannot share a step.
    """
    check_ranks_divide_step(config, gpus)
    found = one_card(name, vram_gib, config)
    return replace(found, place=replace(found.place, ranks=gpus)) if gpus > 1 else found


def one_card(name: str | None, vram_gib: float | None, config: Config) -> Target:
    """The same of a single one."""
    if name or vram_gib:
        kind = gpu_spec_named(name) if name else None
        total = round((vram_gib or (kind.gib if kind else 0)) * GIB)
        note = f"{size(total)}, of which {size(DESKTOP_BYTES)} are left to a desktop"
        note += "" if kind else "; no speed without a card's name (--gpu)"
        dtype = dtype_of(config, kind.capability if kind else BF16_FROM)
        return Target(gpu_place(kind.name if kind else "the card", total - DESKTOP_BYTES, kind, dtype), note)
    nvml = gpu.ask_driver()
    if config.device == "cpu" or (config.device == "auto" and not nvml.cards):
        free = memory_bytes()[1]
        dtype = "float32" if config.dtype == "auto" else config.dtype
        place = TargetDevice(
            "this CPU", free, None, dtype, on_gpu=False, compiled=config.compile is True, bench_name=cpu_name()
        )
        return Target(place, f"{size(free)} free now")
    index = int(config.device.partition(":")[2] or 0)
    if index >= len(nvml.cards):
        found = nvml.fault or f"no card with the number {index}"
        raise BadInput(found, f"a card here, or one of {', '.join(GPU_SPECS)}", "gpt2box plan … --gpu rtx-4070")
    card = nvml.cards[index]
    if card.free_bytes is None:
        raise BadInput(f"the driver does not tell the memory of {card.name}", "", "gpt2box plan … --vram-gib 12")
    note = f"{size(card.free_bytes)} of {size(card.total_bytes or 0)} free now"
    kind = gpu_spec_of_device(card.name, card.total_bytes)
    place = gpu_place(card.name, card.free_bytes, kind, dtype_of(config, card.capability or BF16_FROM))
    return Target(replace(place, bench_name=card.name), note)


def gpu_place(name: str, free_bytes: int, kind: GpuSpec | None, dtype: str) -> TargetDevice:
    """A card, where training would be compiled."""
    return TargetDevice(name, free_bytes, kind, dtype, on_gpu=True, compiled=True)


def dtype_of(config: Config, capability: tuple[int, int]) -> str:
    """As machine/device.py chooses it."""
    if config.dtype != "auto":
        return config.dtype
    return "bfloat16" if capability >= BF16_FROM else "float32"


def shape_of(config: Config) -> ModelShape:
    """The model's shape, from the settings or the weights they begin from.

    Raises:
        BadInput: settings, weights and dataset do not fit, as in training.
    """
    words = words_in(config)
    if config.init_from == "scratch":
        sizes = config.shape()
        usual = CHARACTERS if config.dataset.endswith("-char") else VOCABULARY
        return ModelShape(
            **sizes, block_size=config.block_size, vocab_size=words.vocab_size if words else usual, bias=config.bias
        )
    if config.init_from in MODEL_SHAPES:  # which need not be here to plan
        stored = ModelShape(**MODEL_SHAPES[config.init_from], block_size=1024, vocab_size=VOCABULARY, bias=True)
        folder = model_dir(config.init_from)
    else:
        folder = pretrained_folder(config.init_from)
        stored = shape_in(folder)
    theirs = words_of(folder, stored, words) if words else None
    return shape_from(config, stored, config.init_from, words, theirs)


def words_in(config: Config) -> Tokenizer | None:
    """The dataset's tokenizer; None where it is not there yet."""
    try:
        return open_dataset(dataset_dir(config.dataset)).tokenizer
    except Gpt2boxError:
        return None


def train_tokens(config: Config) -> int:
    """Tokens of the dataset; 0 where it is not there yet."""
    try:
        return open_dataset(dataset_dir(config.dataset)).tokens("train")
    except Gpt2boxError:
        return 0


def show(config: Config, target: Target, all_sizes: bool, explain: bool, as_json: bool) -> None:
    """Print the plan, or the table of all sizes.

    Raises:
        MachineCannot: nothing fits (not for the table).
    """
    if all_sizes:
        return table(config, target, as_json)
    shape = shape_of(config)
    check_sharding(config, shape, target.place.ranks)
    place = apply_bench_records(target.place, config, shape)
    compiled = place.compiled and config.may_compile
    found = list_execution_plans(config, shape, place)
    try:
        chosen = choose_execution_plan(found, config, shape, place)
    except MachineCannot:
        if as_json:
            print(json.dumps({"name": config.name, "card": place.name, "chosen": None}, indent=2))
        for line in [] if as_json else other_lines(None, found, target):
            print(line)
        raise
    if as_json:
        print(json.dumps(as_dict(config, shape, target, chosen, found, compiled), indent=2))
        return
    cards = f"{place.ranks} × {place.name}" if place.ranks > 1 else place.name
    print(f"{config.name}: {shape.parameters:,} parameters, on {cards} ({target.note}); {KINDS[chosen.measured]}")
    for line in plan_lines(config, shape, chosen, compiled):
        print(f"  {line}")
    each = " of each card" if place.ranks > 1 else ""
    print(f"memory{each}, at its highest in {chosen.memory.moment}; estimated")
    for name, count in chosen.memory.parts().items():
        print(f"  {name:12} {size(count):>10}" + (f"   {EXPLAINED[name]}" if explain else ""))
    print(f"  {'in all':12} {size(chosen.memory.total, 2):>10}   of {size(place.free_bytes, 2)} free")
    if chosen.measured_bytes:
        print(f"  {'measured':12} {size(chosen.measured_bytes):>10}   here, by gpt2box bench")
    if explain:
        M = chosen.micro_batch_size * shape.block_size
        print(
            f"  N = {padded_parameters(shape):,} parameters with padding, L = {shape.n_layer}, C = {shape.n_embd}, "
            f"H = {shape.n_head}, P = {shape.padded_vocab_size:,}, M = {M:,} tokens"
        )
    print("other ways to do the same steps, fastest first")
    for line in other_lines(chosen, found, target):
        print(f"  {line}")
    for flags, way, changes in fallback_settings(config, shape, place) if place.on_gpu else ():
        print(f"  {flags}\n    {way_words(way)}; {'changes the numbers' if changes else 'the same numbers'}")


def way_words(way: ExecutionPlan) -> str:
    """In a line."""
    speed = f", {way.tokens_per_sec:,.0f} tokens/s{MARKS[way.measured]}" if way.tokens_per_sec else ""
    return f"{way.describe()}, {size(way.total_bytes)}{speed}"


KINDS = {False: "all estimated", True: "speed measured here by gpt2box bench, the rest estimated"}
MARKS = {False: "", True: " (measured here)"}

EXPLAINED = {
    "weights": "4 N: float32; weights_dtype bfloat16: 2 N",
    "gradients": "as the weights, there before the next micro-step begins; optimizer_in_backward: none",
    "optimizer": "8 N: AdamW's two averages; muon: 48 L C² less; optimizer_states int8: a quarter",
    "activations": "L × (M × (36 C + 16 + 4 H)), compiled 24 C² more; full recompute: 4 to 8 C, and a block",
    "loss": "4 P C + 2 P C for the output layer, 6 P × loss_chunk_tokens, 8 M C",
    "workspace": "cuBLAS, and what is small",
    "margin": "gaps in PyTorch's segments",
    "context": "CUDA itself",
}


def plan_lines(config: Config, shape: ModelShape, chosen: ExecutionPlan, compiled: bool) -> Iterator[str]:
    """What is done, how fast and how long."""
    yield (
        f"{config.tokens_per_step:,} tokens a step = {chosen.micro_batch_size} × {shape.block_size} × "
        f"{counted(chosen.grad_accum_steps, 'micro-step')}{f' × {chosen.ranks} GPUs' if chosen.ranks > 1 else ''}; "
        f"recompute: {chosen.activation_checkpointing}, {'compiled' if compiled else 'not compiled'}"
    )
    if chosen.tokens_per_sec:
        seconds = config.max_steps * config.tokens_per_step / chosen.tokens_per_sec
        rate = f"{chosen.tokens_per_sec:,.0f} tokens/s{MARKS[chosen.measured]}"
        yield f"{rate}, {config.max_steps:,} steps in {duration(seconds)}"
    if tokens := train_tokens(config):
        yield f"{config.max_steps * config.tokens_per_step / tokens:.2g} passes over {tokens:,} tokens"
    kept = config.keep_last + 4  # as in inputs.py
    each = shape.checkpoint_bytes(config.weights_dtype, config.optimizer, config.optimizer_states, config.lora_rank)
    yield f"checkpoints: {size(each)} each, {size(kept * each)} on disk; {size(each)} of the host's memory to copy one"


def other_lines(chosen: ExecutionPlan | None, found: list[ExecutionPlan], target: Target) -> Iterator[str]:
    """For each kind of recompute the fastest that fits; where none does, the smallest."""
    shown: list[tuple[ExecutionPlan, bool]] = []
    for mode in dict.fromkeys(option.activation_checkpointing for option in found):
        same = [option for option in found if option.activation_checkpointing == mode]
        fits = [option for option in same if option.total_bytes <= target.place.free_bytes]
        shown.append((fits[0] if fits else min(same, key=lambda option: option.total_bytes), bool(fits)))
    for best, fits_here in sorted(shown, key=lambda each: -each[0].tokens_per_sec):
        speed = f"{best.tokens_per_sec:>9,.0f} tokens/s{MARKS[best.measured]}" if best.tokens_per_sec else ""
        verdict = "chosen" if best == chosen else "fits" if fits_here else "does not fit"
        yield (
            f"{best.activation_checkpointing:10} micro_batch_size {best.micro_batch_size:<4} "
            f"{size(best.total_bytes, 2):>10}  {speed}  {verdict}"
        )


def as_dict(
    config: Config, shape: ModelShape, target: Target, chosen: ExecutionPlan, found: list[ExecutionPlan], compiled: bool
) -> dict[str, Any]:
    """For programs; bytes, tokens a second, seconds. Estimated, but for what an option's `kind` says of its speed."""

    def one(option: ExecutionPlan) -> dict[str, Any]:
        return {
            "micro_batch_size": option.micro_batch_size,
            "grad_accum_steps": option.grad_accum_steps,
            "activation_checkpointing": option.activation_checkpointing,
            "memory": option.memory.parts() | {"total": option.memory.total},
            "tokens_per_sec": round(option.tokens_per_sec, 1) or None,
            "kind": "measured here" if option.measured else "estimated",
            "measured_bytes": option.measured_bytes or None,
            "fits": option.total_bytes <= target.place.free_bytes,
        }

    total = config.max_steps * config.tokens_per_step
    return {
        "name": config.name,
        "kind": "measured here" if chosen.measured else "estimated",
        "card": target.place.name,
        "gpus": target.place.ranks,
        "free_bytes": target.place.free_bytes,
        "parameters": shape.parameters,
        "compiled": compiled,
        "tokens_per_step": config.tokens_per_step,
        "chosen": one(chosen),
        "seconds": round(total / chosen.tokens_per_sec) if chosen.tokens_per_sec else None,
        "checkpoint_bytes": shape.checkpoint_bytes(
            config.weights_dtype, config.optimizer, config.optimizer_states, config.lora_rank
        ),
        "alternatives": [one(option) for option in found],
    }


def table(config: Config, target: Target, as_json: bool) -> None:
    """The fastest plan of each published size."""
    rows = []
    for name, sizes in MODEL_SHAPES.items():
        shape = ModelShape(**sizes, block_size=config.block_size, vocab_size=VOCABULARY, bias=config.bias)
        found = list_execution_plans(config, shape, target.place)
        chosen = first_fitting_plan(found, target.place) or min(found, key=lambda option: option.total_bytes)
        rows.append((name, shape, chosen, chosen.total_bytes <= target.place.free_bytes))
    if as_json:
        content = [
            {"model": name, "fits": fits, "total_bytes": way.total_bytes, "micro_batch_size": way.micro_batch_size,
             "activation_checkpointing": way.activation_checkpointing, "tokens_per_sec": way.tokens_per_sec or None}
            for name, _, way, fits in rows
        ]  # fmt: skip
        print(json.dumps(content, indent=2))
        return
    print(f"on {target.place.name} ({target.note}), block_size {config.block_size}; all estimated")
    for name, shape, way, fits in rows:
        speed = f"{way.tokens_per_sec:>9,.0f} tokens/s" if way.tokens_per_sec and fits else ""
        verdict = "" if fits else "  does not fit"
        print(
            f"  {name:12} {shape.parameters / 1e6:>6.0f}M  micro_batch_size {way.micro_batch_size:<4} "
            f"recompute {way.activation_checkpointing:10} {size(way.total_bytes):>10}  {speed}{verdict}"
        )
