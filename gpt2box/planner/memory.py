"""Estimate the device memory of a training step, by component, from the model's shape. Importable without torch.

A step's memory peaks at one of a few moments; each is a sum of what is alive then. With

    M  tokens of a micro-batch    L  n_layer    C  n_embd    H  n_head    P  padded vocabulary    N  parameters

every term is what model/ and training/ allocate under bfloat16 autocast or in float32. The sums were checked against a
simulation of that program (tests/helpers/memory_simulator.py). A compiled model keeps more: the compiler finds that
norms, GELU and low-precision copies of weights are computed twice and keeps the first result. What a compiled block
keeps was counted in the compiler's graphs (`COMPILED_COSTS`).
"""

from dataclasses import asdict, dataclass

from gpt2box.model.shape import INT8_BLOCK_SIZE, ModelShape

GIB = 2**30
CUBLAS_WORKSPACE_BYTES = 8_519_680  # cuBLAS's default below compute capability 9.0
DETERMINISTIC_WORKSPACE_BYTES = 8 * (4 << 20)  # as system/determinism.py sets it,
WORKSPACE_COUNT = 2  # and PyTorch allocates one for each thread: forward and backward
SMALL_TENSORS_BYTES = 24 << 20  # small tensors, and rounding to blocks of 512 bytes
CUDA_CONTEXT_BYTES = round(0.45 * GIB)  # 0.3 to 0.5 GiB were observed; PyTorch's statistics do not include it
LOW_MEMORY_CHUNK = 2 << 20  # numbers that optim/low_memory_adamw.py updates at a time,
LOW_MEMORY_SCRATCH_BYTES = 60  # and scratch bytes for each
# Scratch bytes of optim/muon.py for each number of the largest matrix: plainly; with bfloat16 weights; and with int8
# state for each number of a chunk, beside 4 bytes for each of the matrix.
MUON_SCRATCH_BYTES = 16
MUON_SCRATCH_BF16_BYTES = 26
MUON_SCRATCH_INT8_BYTES = 42
EMBEDDING_GRADIENT_COPIES = 2  # the tied embedding's two gradients and their sum, beside the accumulated one


@dataclass(frozen=True)
class ActivationCost:
    """Bytes of activations per token, in units of C."""

    layer: int  # kept for the backward pass, per layer
    dropout: int  # masks, per layer
    backward: int  # working set of a block's backward pass
    backward_dropout: int
    backward_weights: int  # part of that working set, in units of C² and not per token
    forward: int  # working set of a block's forward pass


# Residual stream in float32: 4 before attention, 4 before the MLP. In the products' dtype (2 or 4 bytes): normed input
# of attention and of the MLP, queries, keys and values (3), attention's output, the MLP inside (4) and after GELU (4).
ACTIVATION_COSTS = {
    "bfloat16": {
        "none": ActivationCost(8 + 2 * 14, 2, 6, 0, 24, 8),
        "selective": ActivationCost(8 + 2 * 8, 2, 22, 0, 16, 8),  # recomputes norms and GELU
        "full": ActivationCost(4, 0, 38, 1, 24, 18),  # recomputes all but a block's input
    },
    "float32": {
        "none": ActivationCost(8 + 4 * 14, 2, 12, 3, 16, 8),
        "selective": ActivationCost(8 + 4 * 8, 2, 44, 3, 16, 16),
        "full": ActivationCost(4, 0, 72, 5, 16, 36),
    },
}

# Compiled: bytes per token and layer in units of C, and copies of weights per layer in units of C². The compiler undoes
# selective checkpointing, so it is not offered there.
COMPILED_COSTS = {
    "bfloat16": {"none": (37, 24), "selective": (37, 24), "full": (8, 24)},  # PyTorch 2.13 keeps none of full's copies
    "float32": {"none": (66, 0), "selective": (66, 0), "full": (8, 0)},
}

# Working set of a block without gradients, bytes per token in units of C: the residual twice, a norm, the MLP inside.
EVALUATION_BYTES = {"bfloat16": 30, "float32": 48}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the step's peak, by component."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    workspace: int
    margin: int
    context: int
    peak_phase: str

    @property
    def allocated(self) -> int:
        """Bytes in PyTorch tensors."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.loss + self.workspace

    @property
    def reserved(self) -> int:
        """Bytes that PyTorch's allocator reserves, including fragmentation."""
        return self.allocated + self.margin

    @property
    def total(self) -> int:
        """Bytes that the device must have free, including the CUDA context."""
        return self.reserved + self.context

    def components(self) -> dict[str, int]:
        """Return the bytes by component, as plan.json stores them."""
        return {key: value for key, value in asdict(self).items() if key != "peak_phase"}


def count_padded_parameters(shape: ModelShape) -> int:
    """Count parameters in memory, with the embedding's padding rows."""
    return shape.parameters + (shape.padded_vocab_size - shape.vocab_size) * shape.n_embd


@dataclass(frozen=True)
class StepSettings:
    """The settings that determine a step's memory, besides the model's shape."""

    micro_batch_size: int
    accumulates: bool  # gradients exist when the next forward pass begins
    dtype: str
    activation_checkpointing: str
    loss_chunk_tokens: int
    dropout: bool
    on_gpu: bool
    compiled: bool
    weights_dtype: str
    optimizer: str
    optimizer_states: str
    optimizer_in_backward: bool
    lora_rank: int = 0
    shards: int = 1  # ranks that share weights, gradients and optimizer state
    deterministic: bool = False

    @property
    def low_memory_optimizer(self) -> bool:
        """True if optim/low_memory_adamw.py updates the weights, not PyTorch's fused AdamW."""
        return self.optimizer_in_backward or self.optimizer_states == "int8" or self.weights_dtype == "bfloat16"


def update_scratch_bytes(shape: ModelShape, step: StepSettings) -> int:
    """Estimate the optimizer's working set. PyTorch's fused AdamW has none, Muon that of the largest matrix."""
    largest = 4 * shape.n_embd**2
    embedding = max(shape.padded_vocab_size, shape.block_size) * shape.n_embd
    if step.optimizer != "muon":
        chunk = min(LOW_MEMORY_CHUNK, max(embedding, largest))
        return LOW_MEMORY_SCRATCH_BYTES * chunk if step.low_memory_optimizer else 0
    matrix = (MUON_SCRATCH_BF16_BYTES if step.weights_dtype == "bfloat16" else MUON_SCRATCH_BYTES) * largest
    if step.optimizer_states == "int8":
        matrix = max(matrix, 4 * largest + MUON_SCRATCH_INT8_BYTES * min(LOW_MEMORY_CHUNK, largest))
    adamw = LOW_MEMORY_SCRATCH_BYTES * min(LOW_MEMORY_CHUNK, embedding)
    return max(matrix, adamw if step.low_memory_optimizer else 0)


def estimate_training_memory(shape: ModelShape, step: StepSettings) -> MemoryEstimate:
    """Estimate the memory of a training step at its peak."""
    L, C, T = shape.n_layer, shape.n_embd, shape.block_size
    M = step.micro_batch_size * T
    P = shape.padded_vocab_size
    N = count_padded_parameters(shape)
    matrices = (P + T) * C + shape.block_matrix_parameters  # the other parameters are biases and norms
    is_bf16 = step.dtype == "bfloat16"
    product_bytes = 2 if is_bf16 else 4
    weight_bytes = 2 if step.weights_dtype == "bfloat16" else 4
    copy_bytes = 0 if product_bytes == weight_bytes else product_bytes  # autocast's copy of a weight
    mode, dropout = step.activation_checkpointing, step.dropout
    cost = ACTIVATION_COSTS[step.dtype][mode]

    weights = weight_bytes * matrices + 4 * (N - matrices)
    muon = shape.block_matrix_parameters if step.optimizer == "muon" else 0  # one number of state each, not two
    optimizer = 8 * N - 4 * muon
    if step.optimizer_states == "int8":
        optimizer = (2 * matrices - muon) * (INT8_BLOCK_SIZE + 4) // INT8_BLOCK_SIZE + 8 * (N - matrices)
    scratch = update_scratch_bytes(shape, step)
    gradients = 0 if step.optimizer_in_backward else weights  # kept between micro-steps
    block_gradients = 0 if step.optimizer_in_backward else weights - weight_bytes * (P + T) * C

    statistics = 0 if mode == "full" else 16 + 4 * shape.n_head  # of norms and attention, per token
    # Sharded blocks are compiled one by one, and with full checkpointing a block's activations are dropped after it.
    block_by_block = step.shards > 1 and mode == "full"
    layer, copies = COMPILED_COSTS[step.dtype][mode] if step.compiled and not block_by_block else (cost.layer, 0)
    per_layer = M * (C * (layer + (cost.dropout if dropout else 0)) + statistics) + copies * C * C
    ends = M * (4 * C + 8 + (C if dropout else 0))  # the last residual and its norm, the embedding's mask
    saved = L * per_layer + ends
    m = min(step.loss_chunk_tokens, M)
    output_grad = 4 * P * C  # of the output layer, formed in float32 beside the loss
    embedding_grad = weight_bytes * P * C
    hidden_grad = 4 * M * C
    chunk = m * P * (6 if is_bf16 else 4) + copy_bytes * P * C
    loss = output_grad + max(chunk, embedding_grad if weight_bytes == 2 else 0)
    work = M * C * (cost.backward + (cost.backward_dropout if dropout else 0)) + cost.backward_weights * C * C
    work += 16 * C * C if copy_bytes == 4 else 0
    # Half of the working set is free by the time that an update in the backward pass begins.
    work = max(work, work // 2 + (scratch if step.optimizer_in_backward else 0))

    if step.lora_rank:  # only the adapters have gradients and optimizer state
        trained = shape.adapter_parameters(step.lora_rank)
        weights += 4 * trained
        optimizer = 8 * trained
        gradients = block_gradients = 4 * trained
        adapter_copies = 16 * C * step.lora_rank if is_bf16 and mode != "full" else 0
        per_layer += product_bytes * (M * 4 * step.lora_rank + adapter_copies)
        saved = L * per_layer + ends
        embedding_grad = output_grad = 0
        # An adapter's output and its sum with the product's; the figure is the simulation's.
        loss = chunk + 10 * M * C
        work += (5 if mode == "full" else 10) * M * C
    # Each rank stores its rows. What is in use is gathered: the embedding for all of a pass; of the blocks the current
    # one, the next one, and gradients being reduced. Counted in a simulation.
    R = step.shards
    root, block = (4 * (P + T) * C, 48 * C * C) if R > 1 else (0, 0)
    gradients, block_gradients, optimizer = gradients // R, block_gradients // R, optimizer // R
    gathered, backward, averaging = root + block, root + 11 * block // 4, root + 4 * block + block // R
    accumulated = gradients if step.accumulates else 0
    embedding_grads = EMBEDDING_GRADIENT_COPIES + (1 if step.accumulates and not step.optimizer_in_backward else 0)
    phases = {  # bytes of gradients, activations and loss
        "a block's forward pass": (
            accumulated,
            saved + M * C * cost.forward + 4 * copy_bytes * C * C + gathered + block,
            0,
        ),
        "the loss": (accumulated, saved + gathered, 4 * M * C + hidden_grad + loss),
        "the last block's backward pass": (accumulated, saved + work + backward, hidden_grad + embedding_grad),
        "a block's gradients among ranks": (accumulated, saved - per_layer + averaging, hidden_grad + embedding_grad),
        "the first block's backward pass": (
            gradients if step.accumulates else block_gradients * (L - 1) // L,
            per_layer + ends + work + backward,
            hidden_grad + embedding_grad,
        ),
        "the embedding's gradient": (gradients, M * (8 * C + 48) + gathered, embedding_grads * embedding_grad),
        "the largest update": (gradients, scratch, embedding_grad if step.optimizer_in_backward else 0),
    }
    peak_phase = max(phases, key=lambda name: sum(phases[name]))
    peak_gradients, activations, peak_loss = phases[peak_phase]
    workspace = CUBLAS_WORKSPACE_BYTES  # a second, small one is in SMALL_TENSORS_BYTES
    if step.deterministic and step.on_gpu:
        workspace = WORKSPACE_COUNT * DETERMINISTIC_WORKSPACE_BYTES
    # Fragmentation: the simulated allocator showed 1 to 5% for the published sizes.
    margin = (32 << 20) + (peak_gradients + activations + peak_loss) // 40 + output_grad + block
    return MemoryEstimate(
        weights=weights // R,
        gradients=peak_gradients,
        optimizer=optimizer,
        activations=activations,
        loss=peak_loss,
        workspace=workspace + SMALL_TENSORS_BYTES,
        margin=margin,
        context=CUDA_CONTEXT_BYTES if step.on_gpu else 0,
        peak_phase=peak_phase,
    )


def max_evaluation_batch(shape: ModelShape, dtype: str, loss_chunk_tokens: int, memory: dict[str, int]) -> int:
    """Return how many sequences an evaluation can process at a time in the memory of a training step.

    Without gradients and saved activations that is many more than a micro-batch.

    Args:
        memory: the step's memory as `MemoryEstimate.components` returns it.
    """
    T, C, P = shape.block_size, shape.n_embd, shape.padded_vocab_size
    free = memory["gradients"] + memory["activations"] + memory["loss"]
    product_bytes = 2 if dtype == "bfloat16" else 4
    logits = loss_chunk_tokens * P * (6 if dtype == "bfloat16" else 4)
    free -= logits + product_bytes * P * C + 8 * product_bytes * C * C
    return max(free // (T * C * EVALUATION_BYTES[dtype]), 0)
