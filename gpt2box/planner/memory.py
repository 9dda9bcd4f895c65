"""Bytes that a training step takes on the device, part by part, from the shape alone.

A step's live memory is highest at one of a few moments; each is a sum of what is alive then. With

    M  tokens of a micro-batch    L  n_layer    C  n_embd    H  n_head    V  vocabulary rows    N  parameters

every term is what the program of model/ and training/ holds under bfloat16 autocast or in float32. The sums were set
against a simulation of that very program (tests/planning), not against a GPU. Compiled, it keeps more: the compiler
finds that norms, GELU and low-precision copies of weights are computed twice, and keeps the first. What a compiled
block keeps was counted in the graphs that the compiler cuts (`COMPILED`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from gpt2box.model.shape import EIGHT_BIT_BLOCK, ModelShape

GIB = 2**30
CUBLAS_WORKSPACE = 8_519_680  # its default below compute capability 9.0
FIXED_WORKSPACE = 8 * (4 << 20)  # as machine/determinism.py has it,
WORKSPACES = 2  # and PyTorch gives one to each thread with products: that of forward passes and that of backward passes
SMALL = 24 << 20  # what is small, and rounding to blocks of 512 bytes
CUDA_CONTEXT = round(0.45 * GIB)  # 0.3 to 0.5 were seen; outside PyTorch's own count
LEAN_CHUNK = 2 << 20  # numbers that training/lean.py updates at a time,
LEAN_SCRATCH = 60  # and bytes that it takes for each
MUON_SCRATCH = 16  # bytes for each number of the largest matrix that training/muon.py updates; with
MUON_SCRATCH_LOW = 26  # weights in bfloat16, and
MUON_SCRATCH_INT8 = 42  # for each of a chunk, beside 4 for each of the matrix, where its momentum is in 8 bits
VOCABULARY_COPIES = 2  # the tied embedding's two gradients and their sum, beside the one that is kept


@dataclass(frozen=True)
class Kept:
    """Bytes by how the backward pass gets at activations: a token's of one layer and its working set, in units of C."""

    layer: int  # kept a layer and token
    dropout: int  # masks, the same
    work: int  # working set of a block's backward pass, a token
    work_dropout: int
    work_weights: int  # of it, in units of C²
    forward: int  # working set of a block's forward pass, a token


# Residual stream in float32: 4 before attention, 4 before the MLP. In the products' dtype (2 or 4 bytes): normed input
# of attention and of the MLP, queries, keys and values (3), attention's output, the MLP inside (4) and after GELU (4).
KEPT = {
    "bfloat16": {
        "none": Kept(8 + 2 * 14, 2, 6, 0, 24, 8),
        "selective": Kept(8 + 2 * 8, 2, 22, 0, 16, 8),  # norms and GELU are made again
        "full": Kept(4, 0, 38, 1, 24, 18),  # all but a block's input is made again
    },
    "float32": {
        "none": Kept(8 + 4 * 14, 2, 12, 3, 16, 8),
        "selective": Kept(8 + 4 * 8, 2, 44, 3, 16, 16),
        "full": Kept(4, 0, 72, 5, 16, 36),
    },
}

# Under torch.compile: bytes a token and layer in units of C, and copies of weights in units of C² a layer. Selective
# recompute is undone by it and no choice there.
COMPILED = {
    "bfloat16": {"none": (37, 24), "selective": (37, 24), "full": (8, 24)},  # PyTorch 2.13 keeps none of full's copies
    "float32": {"none": (66, 0), "selective": (66, 0), "full": (8, 0)},
}


# Working set of a block without gradients, bytes a token in units of C: the residual twice, a norm, the MLP's insides.
EVALUATED = {"bfloat16": 30, "float32": 48}


@dataclass(frozen=True)
class Memory:
    """Bytes at the step's highest moment. `total` is what the card must have free."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    workspace: int
    margin: int
    context: int
    moment: str

    @property
    def allocated(self) -> int:
        """What PyTorch hands out."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.loss + self.workspace

    @property
    def reserved(self) -> int:
        """What PyTorch takes from the card: more, for fragmentation."""
        return self.allocated + self.margin

    @property
    def total(self) -> int:
        """With CUDA's own."""
        return self.reserved + self.context

    def parts(self) -> dict[str, int]:
        """All parts by name."""
        return {key: value for key, value in asdict(self).items() if key != "moment"}


def padded_parameters(shape: ModelShape) -> int:
    """Parameters in memory: the embedding has padding rows there."""
    return shape.parameters + (shape.padded_vocab_size - shape.vocab_size) * shape.n_embd


def matrix_parameters(shape: ModelShape) -> int:
    """Of these, the parameters of matrices; the rest are biases and norms."""
    return (shape.padded_vocab_size + shape.block_size) * shape.n_embd + 12 * shape.n_layer * shape.n_embd**2


@dataclass(frozen=True)
class Step:
    """All that decides a step's memory, besides the shape."""

    micro_batch_size: int
    accumulates: bool  # several micro-steps, so that gradients exist already when the next forward pass begins
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
    split: int = 1  # ranks that share weights, gradients and averages
    deterministic: bool = False


def update_scratch(shape: ModelShape, step: Step, lean: bool) -> int:
    """Working set of the optimizer's step: PyTorch's fused AdamW has none, training/muon.py that of a matrix."""
    largest = 4 * shape.n_embd**2
    embedding = max(shape.padded_vocab_size, shape.block_size) * shape.n_embd
    if step.optimizer != "muon":
        return LEAN_SCRATCH * min(LEAN_CHUNK, max(embedding, largest)) if lean else 0
    matrix = (MUON_SCRATCH_LOW if step.weights_dtype == "bfloat16" else MUON_SCRATCH) * largest
    if step.optimizer_states == "int8":
        matrix = max(matrix, 4 * largest + MUON_SCRATCH_INT8 * min(LEAN_CHUNK, largest))
    return max(matrix, LEAN_SCRATCH * min(LEAN_CHUNK, embedding) if lean else 0)


def training_memory(shape: ModelShape, step: Step) -> Memory:
    """The highest moment of a step."""
    L, C, T = shape.n_layer, shape.n_embd, shape.block_size
    M = step.micro_batch_size * T
    P = shape.padded_vocab_size
    N = padded_parameters(shape)
    matrices = matrix_parameters(shape)
    low = step.dtype == "bfloat16"
    weight = 2 if step.weights_dtype == "bfloat16" else 4
    copy = (2 if low else 4) if low == (weight == 4) else 0  # bytes of a weight in the products' dtype, made for each
    mode, dropout = step.activation_checkpointing, step.dropout
    kept = KEPT[step.dtype][mode]

    weights = weight * matrices + 4 * (N - matrices)
    inside = 12 * L * C * C if step.optimizer == "muon" else 0  # of which one number is kept, not two
    averages = 8 * N - 4 * inside
    if step.optimizer_states == "int8":
        averages = (2 * matrices - inside) * (EIGHT_BIT_BLOCK + 4) // EIGHT_BIT_BLOCK + 8 * (N - matrices)
    lean = step.optimizer_in_backward or step.optimizer_states == "int8" or weight == 2
    scratch = update_scratch(shape, step, lean)
    always = 0 if step.optimizer_in_backward else weights  # gradients, where they are kept between micro-steps
    block_grads = 0 if step.optimizer_in_backward else weights - weight * (P + T) * C

    tiny = 0 if mode == "full" else 16 + 4 * shape.n_head  # norms' and attention's sums, a token
    blocks_alone = step.split > 1 and mode == "full"  # compiled one by one, and what one keeps is given up after it
    layer, copies = COMPILED[step.dtype][mode] if step.compiled and not blocks_alone else (kept.layer, 0)
    per_layer = M * (C * (layer + (kept.dropout if dropout else 0)) + tiny) + copies * C * C
    ends = M * (4 * C + 8 + (C if dropout else 0))  # the last residual and its norm, the embedding's mask
    saved = L * per_layer + ends
    m = min(step.loss_chunk_tokens, M)
    output_grad = 4 * P * C  # of the output layer, formed in float32 beside the loss
    kept_grad = weight * P * C
    hidden_grad = 4 * M * C
    chunk = m * P * (6 if low else 4) + copy * P * C
    forming = output_grad + max(chunk, kept_grad if weight == 2 else 0)
    work = M * C * (kept.work + (kept.work_dropout if dropout else 0)) + kept.work_weights * C * C
    work += 16 * C * C if copy == 4 else 0
    work = max(
        work, work // 2 + (scratch if step.optimizer_in_backward else 0)
    )  # half of it is gone by the time a gradient is taken in

    if step.lora_rank:  # only the adapters have gradients and averages
        trained = shape.adapter_parameters(step.lora_rank)
        weights += 4 * trained
        averages = 8 * trained
        always = block_grads = 4 * trained
        product = 2 if low else 4
        per_layer += product * (M * 4 * step.lora_rank + (16 * C * step.lora_rank if low and mode != "full" else 0))
        saved = L * per_layer + ends
        kept_grad = output_grad = 0
        # An adapter's output and its sum with the product's; the figure is the simulation's.
        forming = chunk + 10 * M * C
        work += (5 if mode == "full" else 10) * M * C
    # Split over ranks: each keeps its rows of what rests. What is worked on is there as a whole, the embedding for all
    # of a pass; of blocks the one at work, the next and the gradients that are on their way. Counted in a simulation.
    R = step.split
    root, block = (4 * (P + T) * C, 48 * C * C) if R > 1 else (0, 0)
    always, block_grads, averages = always // R, block_grads // R, averages // R
    gathered, backward, averaging = root + block, root + 11 * block // 4, root + 4 * block + block // R
    held = always if step.accumulates else 0
    embedding_grads = VOCABULARY_COPIES + (1 if step.accumulates and not step.optimizer_in_backward else 0)
    moments = {
        "a block's forward pass": (held, saved + M * C * kept.forward + 4 * copy * C * C + gathered + block, 0),
        "the loss": (held, saved + gathered, 4 * M * C + hidden_grad + forming),
        "the last block's backward pass": (held, saved + work + backward, hidden_grad + kept_grad),
        "a block's gradients among ranks": (held, saved - per_layer + averaging, hidden_grad + kept_grad),
        "the first block's backward pass": (
            always if step.accumulates else block_grads * (L - 1) // L,
            per_layer + ends + work + backward,
            hidden_grad + kept_grad,
        ),
        "the embedding's gradient": (always, M * (8 * C + 48) + gathered, embedding_grads * kept_grad),
        "the largest update": (always, scratch, kept_grad if step.optimizer_in_backward else 0),
    }
    moment = max(moments, key=lambda name: sum(moments[name]))
    gradients, activations, loss = moments[moment]
    fixed = step.deterministic and step.on_gpu
    workspace = (WORKSPACES * FIXED_WORKSPACE if fixed else CUBLAS_WORKSPACE) + SMALL  # a second small one is in SMALL
    # Gaps in PyTorch's segments: the simulated allocator showed 1 to 5% for the published sizes.
    margin = (32 << 20) + (gradients + activations + loss) // 40 + output_grad + block
    context = CUDA_CONTEXT if step.on_gpu else 0
    return Memory(weights // R, gradients, averages, activations, loss, workspace, margin, context, moment)


def evaluation_sequences(shape: ModelShape, dtype: str, loss_chunk_tokens: int, step: dict[str, int]) -> int:
    """How many sequences an evaluation can take at a time in the memory that a step needs anyway (`Memory.parts`).

    No activation is kept and there are no gradients, so that is many more than a micro-batch's.
    """
    T, C, P = shape.block_size, shape.n_embd, shape.padded_vocab_size
    room = step["gradients"] + step["activations"] + step["loss"]
    product = 2 if dtype == "bfloat16" else 4
    room -= loss_chunk_tokens * P * (6 if product == 2 else 4) + product * P * C + 8 * product * C * C
    return max(room // (T * C * EVALUATED[dtype]), 0)
