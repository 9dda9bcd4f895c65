"""Estimate training speed from a GPU's data sheet: a roofline with a stated efficiency."""

from gpt2box.model.shape import ModelShape
from gpt2box.planner.gpu_specs import GpuSpec
from gpt2box.planner.memory import count_padded_parameters

EFFICIENCY = 0.6  # of the tensor cores' dense rate; reported: an RTX 4070 0.82 with 124M, larger GPUs 0.4 to 0.6
# Of EFFICIENCY, if not compiled: nanoGPT's README reports a factor of 1.85 on an A100; GPUs whose memory is fast for
# their arithmetic lose less.
EAGER_EFFICIENCY = 0.65
BANDWIDTH_EFFICIENCY = 0.8
# Bytes read and written per parameter and update, counted in the optimizers' operations (some 40), not measured.
ADAMW_UPDATE_BYTES = 32  # fused: weight, gradient and both moments, read and written
LOW_MEMORY_UPDATE_BYTES = 400
MUON_UPDATE_BYTES = 210
# Operations of Muon's products per layer, in units of C³: five times two products and a square, for four matrices of
# C × C (queries, keys, values, output) and two of C × 4 C.
MUON_FLOPS = 300
HALF_RATE_TOKENS = 256  # a micro-batch of this many tokens reaches half of the efficiency
INTERCONNECT_GB_S = 6  # per link of a ring of GPUs on PCIe 4.0 without NVLink; assumed, not measured
# Operations relative to a step without activation checkpointing, in which the backward pass is two thirds.
CHECKPOINTING_COST = {"none": 1.0, "selective": 1.02, "full": 4 / 3}


def estimate_device_tokens_per_sec(
    shape: ModelShape,
    spec: GpuSpec,
    micro_batch_size: int,
    grad_accum_steps: int,
    activation_checkpointing: str,
    compiled: bool,
    low_memory_updates: int = 0,
    adapter_parameters: int = 0,
    muon: bool = False,
    ranks: int = 1,
) -> float:
    """Estimate one GPU's training speed in tokens per second with bfloat16; 0 for a GPU without bfloat16.

    Args:
        low_memory_updates: passes of optim/low_memory_adamw.py over all parameters in one step.
        adapter_parameters: size of the LoRA adapters if only these are trained, which saves a third of the
            arithmetic, the gradients of the frozen weights.
        muon: Muon updates the matrices inside the blocks.
        ranks: processes that share AdamW's update.
    """
    if not spec.bf16_tflops:
        return 0.0
    M = micro_batch_size * shape.block_size
    efficiency = EFFICIENCY * (1.0 if compiled else EAGER_EFFICIENCY) * M / (M + HALF_RATE_TOKENS)
    cost = CHECKPOINTING_COST[activation_checkpointing] - (1 / 3 if adapter_parameters else 0)
    flops = M * (shape.flops_per_token * cost + 6 * adapter_parameters)
    arithmetic_s = flops / (spec.bf16_tflops * 1e12 * efficiency)
    N = count_padded_parameters(shape)
    byte_s = 1 / (spec.bandwidth_gb_s * 1e9 * BANDWIDTH_EFFICIENCY)
    if adapter_parameters:
        micro_step_s = arithmetic_s + 12 * N * byte_s
        update_s = ADAMW_UPDATE_BYTES * adapter_parameters * byte_s
        return grad_accum_steps * M / (grad_accum_steps * micro_step_s + update_s)
    # A micro-step reads the weights twice, writes two bfloat16 copies and adds to the gradients.
    micro_step_s = arithmetic_s + 24 * N * byte_s
    update_bytes = LOW_MEMORY_UPDATE_BYTES * low_memory_updates or ADAMW_UPDATE_BYTES
    muon_parameters = shape.block_matrix_parameters if muon else 0
    update_s = (update_bytes * (N - muon_parameters) / ranks + MUON_UPDATE_BYTES * muon_parameters) * byte_s
    if muon:
        update_s += MUON_FLOPS * shape.n_layer * shape.n_embd**3 / (spec.bf16_tflops * 1e12 * EFFICIENCY)
    return grad_accum_steps * M / (grad_accum_steps * micro_step_s + update_s)


def with_weight_gathers(device_tokens_per_sec: float, micro_batch_tokens: int, ranks: int, shape: ModelShape) -> float:
    """Limit one rank's speed by the traffic of sharded weights.

    A micro-step gathers the weights twice and reduces the gradients once, in float32, around a ring, while the GPU
    computes: the slower of the two counts. Assumes that nothing else is waited for.
    """
    if ranks == 1 or not device_tokens_per_sec:
        return device_tokens_per_sec
    traffic_s = 3 * (ranks - 1) / ranks * 4 * count_padded_parameters(shape) / (INTERCONNECT_GB_S * 1e9)
    return micro_batch_tokens / max(micro_batch_tokens / device_tokens_per_sec, traffic_s)


def with_gradient_averaging(
    device_tokens_per_sec: float, tokens_per_step: int, ranks: int, gradient_bytes: int
) -> float:
    """Return the speed of all ranks together, from that of one; 0 if that is unknown.

    The gradients are averaged around a ring once a step, after the backward pass.
    """
    if ranks == 1 or not device_tokens_per_sec:
        return device_tokens_per_sec
    average_s = 2 * (ranks - 1) / ranks * gradient_bytes / (INTERCONNECT_GB_S * 1e9)
    return tokens_per_step / (tokens_per_step / ranks / device_tokens_per_sec + average_s)
