"""`gpt2box export --format gguf`, read by the gguf package and by llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpt2box.data.instructions import TEMPLATE
from gpt2box.data.tokenizer import Gpt2Tokenizer
from gpt2box.errors import BadInput
from gpt2box.export.export import export_model, prompt_template
from gpt2box.export.gguf import write_modelfile
from gpt2box.model.decoder import Decoder
from gpt2box.model.gpt2 import GPT2
from gpt2box.model.sampling import SamplingParams, generate
from gpt2box.model.shape import ModelShape
from tests.helpers.exports import TEXTS, save_random_model
from tests.helpers.models import write_checkpoint


def test_a_modelfile_has_the_template_of_the_training_data(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints" / "best"
    folder.mkdir(parents=True)
    for dataset, expected in [
        ({"template": TEMPLATE}, "### Instruction:\n{{ .Prompt }}\n\n### Response:\n"),
        ({}, "{{ .Prompt }}"),
        ({"template": '"""\nSYSTEM {prompt}'}, "{{ .Prompt }}"),
    ]:
        (tmp_path / "run" / "manifest.json").write_text(json.dumps({"dataset": dataset}))
        write_modelfile(tmp_path / "a.gguf", 64, prompt_template(folder))
        assert f'TEMPLATE """{expected}"""\n' in (tmp_path / "a.Modelfile").read_text()


@pytest.mark.parametrize(
    "dtype, error, bias", [("float32", 0.0, False), ("float16", 2**-11, True), ("q8_0", 0.01, True)]
)
def test_gguf_stores_the_weights_and_tokens_of_the_model(
    tmp_path: Path, gpt2_tokenizer: Gpt2Tokenizer, dtype: str, error: float, bias: bool
) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf (gpt2box[export]) is not installed")
    model, folder = save_random_model(tmp_path / "model", gpt2_tokenizer, bias)
    reader = gguf.GGUFReader(export_model(folder, "gguf", dtype, tmp_path / "small.gguf", ""))
    fields: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "gpt2" and fields["gpt2.attention.head_count"] == 2
    assert fields["tokenizer.ggml.tokens"][-1] == "<|endoftext|>" and len(fields["tokenizer.ggml.tokens"]) == 50_257
    tensors = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    assert len(tensors) == 3 + 1 + 12 * 2
    expected = model.h[1].mlp.c_fc.weight.detach().numpy()  # type: ignore[union-attr]
    assert np.abs(tensors["blk.1.ffn_up.weight"] - expected).max() <= error * np.abs(expected).max()
    assert "FROM ./small.gguf" in (tmp_path / "small.Modelfile").read_text()


@pytest.mark.parametrize("dtype", ["float32", "float16", "q8_0"])
def test_llama_cpp_computes_the_same_tokens_and_logits(
    tmp_path: Path, gpt2_tokenizer: Gpt2Tokenizer, dtype: str
) -> None:
    pytest.importorskip("gguf", reason="gguf (gpt2box[export]) is not installed")
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    model, folder = save_random_model(tmp_path / "model", gpt2_tokenizer)
    exported = export_model(folder, "gguf", dtype, tmp_path / "small.gguf", "")
    llama = llama_cpp.Llama(str(exported), n_ctx=48, logits_all=True, verbose=False)
    for text in TEXTS:
        ids = gpt2_tokenizer.encode(text).tolist()
        assert llama.tokenize(text.encode(), add_bos=False, special=False) == ids
        llama.reset()
        llama.eval(ids)
        logits = model.logits(model.hidden_states(torch.tensor([ids])))[0].detach().numpy()
        llama_logits = np.array(llama.scores[: len(ids)])
        agreement = (logits.argmax(1) == llama_logits.argmax(1)).mean()
        assert agreement == 1.0 if dtype == "float32" else agreement >= 0.8
        tolerance = {"float32": 0.05, "float16": 0.1, "q8_0": 1.0}[dtype] * logits.std()
        assert np.abs(llama_logits - logits).max() < tolerance
    if dtype == "float32":
        ids = gpt2_tokenizer.encode(TEXTS[0]).tolist()
        own = list(generate(Decoder(model), ids, 12, SamplingParams(temperature=0), 0))
        stream = llama.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0)
        assert [next(stream) for _ in range(12)] == own


def test_q8_0_is_refused_if_n_embd_is_not_a_multiple_of_32(tmp_path: Path, gpt2_tokenizer: Gpt2Tokenizer) -> None:
    pytest.importorskip("gguf", reason="gguf (gpt2box[export]) is not installed")
    model = GPT2(ModelShape(n_layer=1, n_head=1, n_embd=40, block_size=8, vocab_size=50_257))
    model.init_weights(1)
    folder = tmp_path / "odd"
    folder.mkdir()
    write_checkpoint(folder, model, gpt2_tokenizer)
    with pytest.raises(BadInput, match="q8_0 with n_embd 40"):
        export_model(folder, "gguf", "q8_0", tmp_path / "odd.gguf", "")
    assert not (tmp_path / "odd.gguf").exists()
