"""`gpt2box export`: read by transformers, nanoGPT's loader, gguf and llama.cpp as the same model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpt2box.data.instructions import TEMPLATE
from gpt2box.data.tokenizer import Gpt2Tokenizer, Tokenizer, from_texts
from gpt2box.errors import BadInput, Damaged
from gpt2box.export import export as module
from gpt2box.export.export import export, form_of
from gpt2box.export.gguf import write_modelfile
from gpt2box.model.decoder import Decoder
from gpt2box.model.gpt2 import GPT2
from gpt2box.model.sampling import SamplingParams, generate
from gpt2box.model.shape import ModelShape
from tests.helpers.commands import Command
from tests.helpers.models import write_checkpoint
from tests.helpers.settings import options

TEXTS = [
    "To be, or not to be: that is the question.",
    "  naïve 漢字 🙂\n\n\t1984's <|x|>",
    "def f(x):\n    return x  # …",
]


def saved(folder: Path, words: Tokenizer, bias: bool = True) -> tuple[GPT2, Path]:
    """A random model with sharp choices, as a checkpoint folder."""
    torch.manual_seed(1)
    model = GPT2(ModelShape(n_layer=2, n_head=2, n_embd=64, block_size=48, vocab_size=words.vocab_size, bias=bias))
    model.init_weights(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8) if parameter.dim() > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
        model.wte.weight[words.vocab_size :] = 0
    folder.mkdir()
    write_checkpoint(folder, model, words)
    return model.eval(), folder


@pytest.mark.parametrize(
    "dtype, error, bias", [("float32", 1e-4, True), ("float32", 1e-4, False), ("bfloat16", 0.5, True)]
)
@torch.inference_mode()
def test_transformers_reads_the_folder_as_the_same_model(
    tmp_path: Path, gpt2_tokenizer: Gpt2Tokenizer, dtype: str, error: float, bias: bool
) -> None:
    model, folder = saved(tmp_path / "model", gpt2_tokenizer, bias)
    made = export(folder, "huggingface", dtype, tmp_path / "out", "mit")
    theirs = AutoModelForCausalLM.from_pretrained(made, dtype=getattr(torch, dtype)).eval().float()
    tokens = AutoTokenizer.from_pretrained(made)
    for text in TEXTS:
        ids = gpt2_tokenizer.encode(text).tolist()
        assert tokens(text)["input_ids"] == ids and tokens.decode(ids) == text
        logits = theirs(torch.tensor([ids])).logits
        assert (logits - model.logits(model.hidden_states(torch.tensor([ids])))).abs().max() < error
    assert {path.name for path in made.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "README.md"),
        *("vocab.json", "merges.txt", "tokenizer_config.json"),
    }
    assert 'license: "mit"' in (made / "README.md").read_text()


def test_a_run_is_exported_with_its_story(volumes: Path, gpt2box: Command) -> None:
    gpt2box("train", *options(name="run", max_steps=10))
    done = gpt2box("export", "run")
    made = volumes / "runs" / "run" / "export" / "run-float32"
    assert done.returncode == 0 and str(made) in done.stdout, done.stderr
    card = (made / "README.md").read_text()
    for part in (
        "# run",
        'model="run-float32"',
        "tinyshakespeare",
        "1,003,854 tokens",
        "| val_loss |",
        "| learning_rate | 0.001 |",
        "10,",
    ):
        assert part in card, card
    again = gpt2box("export", "run")
    assert again.returncode == 2 and "is there already" in again.stderr
    sampled = [gpt2box("sample", str(folder), "--max-new-tokens", "30").stdout for folder in (made, "run")]
    assert sampled[0] == sampled[1]
    assert "in characters" in gpt2box("export", "run", "--format", "gguf").stderr
    assert "--format nanogpt in q8_0" in gpt2box("export", "run", "--format", "nanogpt", "--quantise", "q8_0").stderr


def test_nanogpts_names_and_layout(tmp_path: Path, gpt2_tokenizer: Gpt2Tokenizer) -> None:
    model, folder = saved(tmp_path / "model", gpt2_tokenizer, bias=False)
    made = export(folder, "nanogpt", None, tmp_path / "ckpt.pt", "")
    content = torch.load(made, weights_only=True)
    sizes = {
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 64,
        "block_size": 48,
        "vocab_size": 50_257,
        "bias": False,
        "dropout": 0.0,
    }
    assert content["model_args"] == sizes
    state = content["model"]
    assert torch.equal(
        state["transformer.h.1.attn.c_attn.weight"], dict(model.named_parameters())["h.1.attn.c_attn.weight"]
    )
    assert state["lm_head.weight"].shape == (50_257, 64) and "transformer.ln_f.bias" not in state


def test_a_failed_check_leaves_nothing(
    tmp_path: Path, gpt2_tokenizer: Gpt2Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = saved(tmp_path / "model", gpt2_tokenizer)
    real = module.save_file  # type: ignore[attr-defined]

    def torn(state: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        name = "transformer.h.0.ln_1.weight"
        real(state | {name: state[name] + 0.01}, path, metadata=metadata)

    monkeypatch.setattr(module, "save_file", torn)
    with pytest.raises(Damaged, match=r"h\.0\.ln_1\.weight is not what was written"):
        export(folder, "huggingface", None, tmp_path / "out", "")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("number, form, dtype, part", [
    (math.nan, "huggingface", "float16", "wte.weight has numbers that are not finite"),
    (math.inf, "nanogpt", None, "wte.weight has numbers that are not finite"),
    (1e6, "huggingface", "float16", "--dtype bfloat16"),
    (-1e6, "gguf", "float16", "--dtype float32"),
])  # fmt: skip
def test_numbers_that_are_none_or_too_large_are_not_exported(
    tmp_path: Path, number: float, form: str, dtype: str | None, part: str
) -> None:
    words = from_texts(["abc"], end_of_text=True)
    model, folder = saved(tmp_path / "model", words)
    with torch.no_grad():
        model.wte.weight[1, 1] = number
    (folder / "state.json").unlink()
    write_checkpoint(folder, model, words)
    with pytest.raises(Damaged if abs(number) != 1e6 else BadInput) as raised:
        export(folder, form, dtype, tmp_path / "out", "")
    assert part in str(raised.value) and [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_modelfile_puts_prompts_as_the_data_had_them(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints" / "best"
    folder.mkdir(parents=True)
    for about, wanted in [
        ({"template": TEMPLATE}, "### Instruction:\n{{ .Prompt }}\n\n### Response:\n"),
        ({}, "{{ .Prompt }}"),
        ({"template": '"""\nSYSTEM {prompt}'}, "{{ .Prompt }}"),
    ]:
        (tmp_path / "run" / "manifest.json").write_text(json.dumps({"dataset": about}))
        write_modelfile(tmp_path / "a.gguf", 64, form_of(folder))
        assert f'TEMPLATE """{wanted}"""\n' in (tmp_path / "a.Modelfile").read_text()


def test_an_export_may_be_read_by_whoever_may_read_its_config(tmp_path: Path) -> None:
    _, folder = saved(tmp_path / "model", from_texts(["abc"], end_of_text=True))
    made = export(folder, "huggingface", None, tmp_path / "out", "")
    assert len({path.stat().st_mode for path in made.iterdir()}) == 1


@pytest.mark.parametrize(
    "dtype, error, bias", [("float32", 0.0, False), ("float16", 2**-11, True), ("q8_0", 0.01, True)]
)
def test_gguf_holds_the_same_numbers_and_tokens(
    tmp_path: Path, gpt2_tokenizer: Gpt2Tokenizer, dtype: str, error: float, bias: bool
) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf (gpt2box[export]) is not installed")
    model, folder = saved(tmp_path / "model", gpt2_tokenizer, bias)
    reader = gguf.GGUFReader(export(folder, "gguf", dtype, tmp_path / "small.gguf", ""))
    fields: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "gpt2" and fields["gpt2.attention.head_count"] == 2
    assert fields["tokenizer.ggml.tokens"][-1] == "<|endoftext|>" and len(fields["tokenizer.ggml.tokens"]) == 50_257
    found = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    assert len(found) == 3 + 1 + 12 * 2
    wanted = model.h[1].mlp.c_fc.weight.detach().numpy()  # type: ignore[union-attr]
    assert np.abs(found["blk.1.ffn_up.weight"] - wanted).max() <= error * np.abs(wanted).max()
    assert "FROM ./small.gguf" in (tmp_path / "small.Modelfile").read_text()


@pytest.mark.parametrize("dtype", ["float32", "float16", "q8_0"])
def test_llama_cpp_goes_on_with_the_same_tokens(tmp_path: Path, gpt2_tokenizer: Gpt2Tokenizer, dtype: str) -> None:
    pytest.importorskip("gguf", reason="gguf (gpt2box[export]) is not installed")
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    model, folder = saved(tmp_path / "model", gpt2_tokenizer)
    made = export(folder, "gguf", dtype, tmp_path / "small.gguf", "")
    llama = llama_cpp.Llama(str(made), n_ctx=48, logits_all=True, verbose=False)
    for text in TEXTS:
        ids = gpt2_tokenizer.encode(text).tolist()
        assert llama.tokenize(text.encode(), add_bos=False, special=False) == ids
        llama.reset()
        llama.eval(ids)
        logits = model.logits(model.hidden_states(torch.tensor([ids])))[0].detach().numpy()
        theirs = np.array(llama.scores[: len(ids)])
        agreeing = (logits.argmax(1) == theirs.argmax(1)).mean()
        assert agreeing == 1.0 if dtype == "float32" else agreeing >= 0.8
        assert np.abs(theirs - logits).max() < {"float32": 0.05, "float16": 0.1, "q8_0": 1.0}[dtype] * logits.std()
    if dtype == "float32":
        ours = list(
            generate(Decoder(model), gpt2_tokenizer.encode(TEXTS[0]).tolist(), 12, SamplingParams(temperature=0), 0)
        )
        stream = llama.generate(gpt2_tokenizer.encode(TEXTS[0]).tolist(), temp=0.0, top_k=1, repeat_penalty=1.0)
        assert [next(stream) for _ in range(12)] == ours


def test_gguf_of_an_odd_width_is_refused_in_8_bits(tmp_path: Path, gpt2_tokenizer: Gpt2Tokenizer) -> None:
    pytest.importorskip("gguf", reason="gguf (gpt2box[export]) is not installed")
    model = GPT2(ModelShape(n_layer=1, n_head=1, n_embd=40, block_size=8, vocab_size=50_257))
    model.init_weights(1)
    folder = tmp_path / "odd"
    folder.mkdir()
    write_checkpoint(folder, model, gpt2_tokenizer)
    with pytest.raises(BadInput, match="q8_0 with n_embd 40"):
        export(folder, "gguf", "q8_0", tmp_path / "odd.gguf", "")
    assert not (tmp_path / "odd.gguf").exists()
