"""Expected speed on a card, from its data sheet: a roofline with a stated efficiency. An estimate."""

from __future__ import annotations

from gpt2box.model.shape import ModelShape
from gpt2box.planner.gpu_specs import GpuSpec
from gpt2box.planner.memory import padded_parameters

EFFICIENCY = 0.6  # of the tensor cores' dense rate; a 4070 was seen at 0.82 with 124M, larger cards at 0.4 to 0.6
EAGER = (
    0.65  # of that when not compiled: nanoGPT's README has 1.85 times as fast compiled on an A100; less is at stake on
)
# cards whose memory is fast for their arithmetic
BANDWIDTH_EFFICIENCY = 0.8
LEAN_BYTES = 400  # a parameter, read and written by some 40 operations; counted, not measured
MUON_BYTES = 210  # the same, of a number in a matrix that muon.py updates; counted in its operations
# Products of muon.py in a layer: five times two products and a square, for four matrices of C × C (queries, keys,
# values, output) and two of C × 4 C, come to 300 C³ operations.
MUON_PRODUCTS = 300
FULL_GPU_TOKENS = 1024  # a micro-batch of so many tokens reaches half of it
BETWEEN_CARDS_GB_S = 6  # that pass each link of a ring of cards on PCIe 4.0 without NVLink; assumed, not measured
# Arithmetic over that of a plain step, in which the backward pass is two thirds.
RECOMPUTED = {"none": 1.0, "selective": 1.02, "full": 4 / 3}


def tokens_per_sec(
    shape: ModelShape,
    kind: GpuSpec,
    micro_batch_size: int,
    grad_accum_steps: int,
    activation_checkpointing: str,
    compiled: bool,
    lean_updates: int = 0,
    adapters: int = 0,
    muon: bool = False,
    ranks: int = 1,
) -> float:
    """Expected tokens a second in training, with bfloat16; 0 for a card without bfloat16.

    `lean_updates`: how often in a step training/lean.py goes through all parameters. `adapters`: how many parameters
    they have, if these alone are trained; a third of the arithmetic, the frozen weights' gradients, is then spared.
    `muon`: the matrices inside the blocks are its own. `ranks`: so many share AdamW's update.
    """
    if not kind.bf16_tflops:
        return 0.0
    M = micro_batch_size * shape.block_size
    share = EFFICIENCY * (1.0 if compiled else EAGER) * M / (M + FULL_GPU_TOKENS / 4)
    work = RECOMPUTED[activation_checkpointing] - (1 / 3 if adapters else 0)
    arithmetic = M * (shape.flops_per_token * work + 6 * adapters) / (kind.bf16_tflops * 1e12 * share)
    N = padded_parameters(shape)
    per_byte = 1 / (kind.bandwidth_gb_s * 1e9 * BANDWIDTH_EFFICIENCY)
    if adapters:
        weights = 12 * N * per_byte
        return grad_accum_steps * M / (grad_accum_steps * (arithmetic + weights) + 32 * adapters * per_byte)
    weights = 24 * N * per_byte  # a micro-step reads weights twice, writes two copies, adds to the gradients
    # The optimizer's step: weights, gradients, two averages, read and written; lean.py's, operation by operation.
    a_number = LEAN_BYTES * lean_updates if lean_updates else 32
    inside = 12 * shape.n_layer * shape.n_embd**2 if muon else 0
    update = (a_number * (N - inside) / ranks + MUON_BYTES * inside) * per_byte
    if muon:
        update += MUON_PRODUCTS * shape.n_layer * shape.n_embd**3 / (kind.bf16_tflops * 1e12 * EFFICIENCY)
    return grad_accum_steps * M / (grad_accum_steps * (arithmetic + weights) + update)


def between_gathers(alone: float, micro_batch_tokens: int, ranks: int, shape: ModelShape) -> float:
    """Tokens a second of one card whose weights are split over several, of what it does with all of them there.

    In each micro-step the weights are put together twice and their gradients averaged once, in float32, around the same
    ring, while the card computes; the slower of the two is what counts. That nothing else is waited for is assumed.
    """
    if ranks == 1 or not alone:
        return alone
    sent = 3 * (ranks - 1) / ranks * 4 * padded_parameters(shape) / (BETWEEN_CARDS_GB_S * 1e9)
    return micro_batch_tokens / max(micro_batch_tokens / alone, sent)


def together(alone: float, tokens_per_step: int, ranks: int, gradient_bytes: int) -> float:
    """Tokens a second of several cards in one machine, of what one does `alone`; 0 where that is not known.

    The gradients' average goes around a ring once a step, when the backward pass is done.
    """
    if ranks == 1 or not alone:
        return alone
    average = 2 * (ranks - 1) / ranks * gradient_bytes / (BETWEEN_CARDS_GB_S * 1e9)
    return tokens_per_step / (tokens_per_step / ranks / alone + average)
