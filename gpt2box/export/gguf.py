"""GGUF: one file with weights and tokenizer, as llama.cpp and what is built on it (Ollama, LM Studio) read GPT-2.

Names and keys are those of llama.cpp's own converter. Matrices are float32, float16 or Q8_0 (8 bits, a scale for each
32 numbers of a row); biases, norms and positions are always float32. The output layer is the embedding, once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gpt2box.data.hf_tokenizer import BpeTokenizer
from gpt2box.data.tokenizer import Gpt2Tokenizer, Tokenizer, printable
from gpt2box.errors import BadInput, Damaged
from gpt2box.model.gpt2 import GPT2
from gpt2box.utils.files import write_atomically

NAMES = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
WHOLE = {
    "wte.weight": "token_embd.weight",
    "wpe.weight": "position_embd.weight",
    "ln_f.weight": "output_norm.weight",
    "ln_f.bias": "output_norm.bias",
}
Q8_BLOCK = 32
NORMAL, CONTROL = 1, 3  # kinds of token
MODELFILE = """FROM ./{file}
TEMPLATE \"\"\"{template}\"\"\"
PARAMETER temperature 0.8
PARAMETER top_k 200
PARAMETER num_ctx {block_size}
"""


def check_gguf(model: GPT2, words: Tokenizer, dtype: str) -> None:
    """Whether this model can be had in GGUF.

    Raises:
        BadInput: no package, no tokenizer that llama.cpp has, or a width that Q8_0 does not divide.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise BadInput("the package gguf is not installed", "it", "pip install gguf") from error
    if isinstance(words, BpeTokenizer) and not words.splits_as_gpt2:
        raise BadInput(
            "a tokenizer that splits text otherwise than GPT-2's, which llama.cpp does not know", "GPT-2's way"
        )
    if not isinstance(words, (Gpt2Tokenizer, BpeTokenizer)):
        raise BadInput("a model in characters, which llama.cpp has no tokenizer for", "a model in GPT-2's tokens")
    if dtype == "q8_0" and model.shape.n_embd % Q8_BLOCK:
        raise BadInput(f"q8_0 with n_embd {model.shape.n_embd}", f"a multiple of {Q8_BLOCK}", "--dtype float16")


def gguf_name(name: str) -> str:
    """Of a parameter: h.3.attn.c_attn.weight is blk.3.attn_qkv.weight."""
    if name in WHOLE:
        return WHOLE[name]
    _, layer, rest = name.split(".", 2)
    part, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{NAMES[part]}.{kind}"


def tensors(model: GPT2) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """All tensors by their names in the file; without biases, those that llama.cpp asks for are zero."""
    found = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach().float().contiguous().numpy()
        found[gguf_name(name)] = value[: model.shape.vocab_size] if name == "wte.weight" else value
    if not model.shape.bias:
        for name, value in list(found.items()):
            if name not in ("token_embd.weight", "position_embd.weight"):
                found[name.removesuffix("weight") + "bias"] = np.zeros(value.shape[0], dtype=np.float32)
    return found


def write_gguf(path: Path, model: GPT2, words: Tokenizer, dtype: str, title: str) -> None:
    """Write the file, and read it back."""
    import gguf

    assert isinstance(words, (Gpt2Tokenizer, BpeTokenizer))
    shape = model.shape
    kinds = {"float32": gguf.GGMLQuantizationType.F32, "float16": gguf.GGMLQuantizationType.F16}
    kind = kinds.get(dtype, gguf.GGMLQuantizationType.Q8_0)
    files = {"float32": gguf.LlamaFileType.ALL_F32, "float16": gguf.LlamaFileType.MOSTLY_F16}
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_name(title)
    writer.add_file_type(files.get(dtype, gguf.LlamaFileType.MOSTLY_Q8_0))
    writer.add_block_count(shape.n_layer)
    writer.add_context_length(shape.block_size)
    writer.add_embedding_length(shape.n_embd)
    writer.add_feed_forward_length(4 * shape.n_embd)
    writer.add_head_count(shape.n_head)
    writer.add_layer_norm_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    ids = words.vocabulary()
    control = {words.end_of_text} if isinstance(words, Gpt2Tokenizer) else set(words.added)
    in_order = sorted(ids, key=ids.__getitem__)
    writer.add_token_list(in_order)
    writer.add_token_types([CONTROL if ids[token] in control else NORMAL for token in in_order])
    writer.add_token_merges(merges_in(words))
    if words.end_of_text is not None:
        writer.add_bos_token_id(words.end_of_text)
        writer.add_eos_token_id(words.end_of_text)
    writer.add_add_bos_token(False)
    stored = {}
    for name, value in tensors(model).items():
        packed = value.ndim == 2 and name != "position_embd.weight"
        stored[name] = (kind if packed else gguf.GGMLQuantizationType.F32, value)
        writer.add_tensor(name, gguf.quants.quantize(value, stored[name][0]), raw_dtype=stored[name][0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read_back = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, (own_kind, value) in stored.items():
        tensor = read_back.get(name)
        if tensor is None or tensor.tensor_type != own_kind:
            raise Damaged(f"{path}: {name} was not written", own_kind.name)
        again = gguf.quants.dequantize(tensor.data, own_kind).reshape(value.shape)
        expected = gguf.quants.dequantize(gguf.quants.quantize(value, own_kind), own_kind)
        bound = 0.0 if own_kind != gguf.GGMLQuantizationType.Q8_0 else np.abs(value).max() / 127
        if not np.array_equal(again, expected) or (bound and np.abs(again - value).max() > bound):
            raise Damaged(f"{path}: {name} is not what was written", "the same numbers", "try again on another disk")


def merges_in(words: Gpt2Tokenizer | BpeTokenizer) -> list[str]:
    """As merges.txt has them, in order."""
    if isinstance(words, BpeTokenizer):
        return words.merges()
    return [f"{printable(a)} {printable(b)}" for a, b in words.merges]


def write_modelfile(path: Path, block_size: int, form: str) -> None:
    """Ollama's description of a .gguf, beside it. `form`: how a prompt is put to the model."""
    template = form.replace("{prompt}", "{{ .Prompt }}")
    beside = path.with_name(f"{path.stem}.Modelfile")
    write_atomically(beside, MODELFILE.format(file=path.name, template=template, block_size=block_size))
