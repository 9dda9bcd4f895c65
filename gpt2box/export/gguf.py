"""Write GGUF files: weights and tokenizer in one file, for llama.cpp and programs built on it (Ollama, LM Studio).

Names and keys follow llama.cpp's own converter. Matrices are float32, float16 or Q8_0 (8 bits, with one scale per 32
numbers of a row); biases, norms and position embeddings are always float32. The output layer is tied to the embedding,
so it is stored once.
"""

from pathlib import Path
from typing import Any

import numpy as np

from gpt2box.data.hf_tokenizer import BpeTokenizer
from gpt2box.data.tokenizer import Gpt2Tokenizer, Tokenizer, printable
from gpt2box.errors import BadInput, Damaged
from gpt2box.model.gpt2 import GPT2
from gpt2box.model.sampling import SamplingParams
from gpt2box.utils.files import write_atomically

LAYER_TENSOR_NAMES = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
MODEL_TENSOR_NAMES = {
    "wte.weight": "token_embd.weight",
    "wpe.weight": "position_embd.weight",
    "ln_f.weight": "output_norm.weight",
    "ln_f.bias": "output_norm.bias",
}
Q8_BLOCK_SIZE = 32
TOKEN_TYPE_NORMAL, TOKEN_TYPE_CONTROL = 1, 3
MODELFILE = """FROM ./{file}
TEMPLATE \"\"\"{template}\"\"\"
PARAMETER temperature {temperature}
PARAMETER top_k {top_k}
PARAMETER num_ctx {block_size}
"""


def check_gguf(model: GPT2, tokenizer: Tokenizer, dtype: str) -> None:
    """Check that this model can be written as GGUF.

    Raises:
        BadInput: The gguf package is missing, llama.cpp lacks the tokenizer, or n_embd is no multiple of Q8_0's block.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise BadInput("the package gguf is not installed", "the package", "pip install gguf") from error
    if isinstance(tokenizer, BpeTokenizer) and not tokenizer.splits_as_gpt2:
        raise BadInput(
            "a tokenizer that splits text differently from GPT-2's, which llama.cpp does not support", "GPT-2's pattern"
        )
    if not isinstance(tokenizer, (Gpt2Tokenizer, BpeTokenizer)):
        raise BadInput("a model in characters, for which llama.cpp has no tokenizer", "a model in GPT-2's tokens")
    if dtype == "q8_0" and model.shape.n_embd % Q8_BLOCK_SIZE:
        raise BadInput(f"q8_0 with n_embd {model.shape.n_embd}", f"a multiple of {Q8_BLOCK_SIZE}", "--dtype float16")


def gguf_name(name: str) -> str:
    """Return GGUF's name of a parameter: h.3.attn.c_attn.weight becomes blk.3.attn_qkv.weight."""
    if name in MODEL_TENSOR_NAMES:
        return MODEL_TENSOR_NAMES[name]
    _, layer, rest = name.split(".", 2)
    part, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{LAYER_TENSOR_NAMES[part]}.{kind}"


def list_tensors(model: GPT2) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """Return all tensors by GGUF name; llama.cpp needs biases, so a model without them gets zeros."""
    tensors = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach().float().contiguous().numpy()
        tensors[gguf_name(name)] = value[: model.shape.vocab_size] if name == "wte.weight" else value
    if not model.shape.bias:
        for name, value in list(tensors.items()):
            if name not in ("token_embd.weight", "position_embd.weight"):
                tensors[name.removesuffix("weight") + "bias"] = np.zeros(value.shape[0], dtype=np.float32)
    return tensors


def write_gguf(path: Path, model: GPT2, tokenizer: Tokenizer, dtype: str, title: str) -> None:
    """Write a GGUF file, read it back and compare. Raises Damaged: what was read back differs."""
    import gguf

    assert isinstance(tokenizer, (Gpt2Tokenizer, BpeTokenizer))
    shape = model.shape
    float32 = gguf.GGMLQuantizationType.F32
    matrix_types = {"float32": float32, "float16": gguf.GGMLQuantizationType.F16}
    matrix_type = matrix_types.get(dtype, gguf.GGMLQuantizationType.Q8_0)
    file_types = {"float32": gguf.LlamaFileType.ALL_F32, "float16": gguf.LlamaFileType.MOSTLY_F16}
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_name(title)
    writer.add_file_type(file_types.get(dtype, gguf.LlamaFileType.MOSTLY_Q8_0))
    writer.add_block_count(shape.n_layer)
    writer.add_context_length(shape.block_size)
    writer.add_embedding_length(shape.n_embd)
    writer.add_feed_forward_length(4 * shape.n_embd)
    writer.add_head_count(shape.n_head)
    writer.add_layer_norm_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    ids = tokenizer.vocabulary()
    control = {tokenizer.end_of_text} if isinstance(tokenizer, Gpt2Tokenizer) else set(tokenizer.added)
    tokens = sorted(ids, key=ids.__getitem__)
    writer.add_token_list(tokens)
    writer.add_token_types([TOKEN_TYPE_CONTROL if ids[token] in control else TOKEN_TYPE_NORMAL for token in tokens])
    writer.add_token_merges(list_merges(tokenizer))
    if tokenizer.end_of_text is not None:
        writer.add_bos_token_id(tokenizer.end_of_text)
        writer.add_eos_token_id(tokenizer.end_of_text)
    writer.add_add_bos_token(False)
    written = {}
    for name, value in list_tensors(model).items():
        is_matrix = value.ndim == 2 and name != "position_embd.weight"
        tensor_type = matrix_type if is_matrix else float32
        written[name] = (tensor_type, value)
        writer.add_tensor(name, gguf.quants.quantize(value, tensor_type), raw_dtype=tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read_back = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, (tensor_type, value) in written.items():
        tensor = read_back.get(name)
        if tensor is None or tensor.tensor_type != tensor_type:
            raise Damaged(f"{path}: {name} was not written", tensor_type.name)
        stored = gguf.quants.dequantize(tensor.data, tensor_type).reshape(value.shape)
        expected = gguf.quants.dequantize(gguf.quants.quantize(value, tensor_type), tensor_type)
        tolerance = 0.0 if tensor_type != gguf.GGMLQuantizationType.Q8_0 else np.abs(value).max() / 127
        if not np.array_equal(stored, expected) or (tolerance and np.abs(stored - value).max() > tolerance):
            raise Damaged(f"{path}: {name} is not what was written", "the same numbers", "try again on another disk")


def list_merges(tokenizer: Gpt2Tokenizer | BpeTokenizer) -> list[str]:
    """Return the tokenizer's merges in order, as lines of merges.txt."""
    if isinstance(tokenizer, BpeTokenizer):
        return tokenizer.merges()
    return [f"{printable(a)} {printable(b)}" for a, b in tokenizer.merges]


def write_modelfile(path: Path, block_size: int, template: str) -> None:
    """Write Ollama's Modelfile beside a .gguf; `template` has {prompt} in the place of the user's prompt."""
    content = MODELFILE.format(
        file=path.name,
        template=template.replace("{prompt}", "{{ .Prompt }}"),
        temperature=SamplingParams.temperature,
        top_k=SamplingParams.top_k,
        block_size=block_size,
    )
    write_atomically(path.with_name(f"{path.stem}.Modelfile"), content)
