"""`gpt2box export` to a Hugging Face folder, and what all formats share."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpt2box.data.tokenizer import Gpt2Tokenizer, build_char_tokenizer
from gpt2box.errors import BadInput, Damaged
from gpt2box.export import huggingface
from gpt2box.export.export import export_model
from tests.helpers.commands import Command
from tests.helpers.exports import TEXTS, save_random_model
from tests.helpers.models import write_checkpoint
from tests.helpers.settings import options


@pytest.mark.parametrize(
    "dtype, error, bias", [("float32", 1e-4, True), ("float32", 1e-4, False), ("bfloat16", 0.5, True)]
)
@torch.inference_mode()
def test_transformers_loads_an_exported_folder_with_the_same_logits(
    tmp_path: Path, gpt2_tokenizer: Gpt2Tokenizer, dtype: str, error: float, bias: bool
) -> None:
    model, folder = save_random_model(tmp_path / "model", gpt2_tokenizer, bias)
    exported = export_model(folder, "huggingface", dtype, tmp_path / "out", "mit")
    hf_model = AutoModelForCausalLM.from_pretrained(exported, dtype=getattr(torch, dtype)).eval().float()
    tokens = AutoTokenizer.from_pretrained(exported)
    for text in TEXTS:
        ids = gpt2_tokenizer.encode(text).tolist()
        assert tokens(text)["input_ids"] == ids and tokens.decode(ids) == text
        logits = hf_model(torch.tensor([ids])).logits
        assert (logits - model.logits(model.hidden_states(torch.tensor([ids])))).abs().max() < error
    assert {path.name for path in exported.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "README.md"),
        *("vocab.json", "merges.txt", "tokenizer_config.json"),
    }
    assert 'license: "mit"' in (exported / "README.md").read_text()


def test_exporting_a_run_writes_a_model_card_with_its_training(volumes: Path, gpt2box: Command) -> None:
    gpt2box("train", *options(name="run", max_steps=10))
    done = gpt2box("export", "run")
    exported = volumes / "runs" / "run" / "export" / "run-float32"
    assert done.returncode == 0 and str(exported) in done.stdout, done.stderr
    card = (exported / "README.md").read_text()
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
    sampled = [gpt2box("sample", str(folder), "--max-new-tokens", "30").stdout for folder in (exported, "run")]
    assert sampled[0] == sampled[1]
    assert "in characters" in gpt2box("export", "run", "--format", "gguf").stderr
    assert "--format nanogpt in q8_0" in gpt2box("export", "run", "--format", "nanogpt", "--quantise", "q8_0").stderr


def test_an_export_that_fails_its_check_leaves_no_files(
    tmp_path: Path, gpt2_tokenizer: Gpt2Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = save_random_model(tmp_path / "model", gpt2_tokenizer)
    save_file = huggingface.save_file  # type: ignore[attr-defined]

    def save_wrong_numbers(state: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        name = "transformer.h.0.ln_1.weight"
        save_file(state | {name: state[name] + 0.01}, path, metadata=metadata)

    monkeypatch.setattr(huggingface, "save_file", save_wrong_numbers)
    with pytest.raises(Damaged, match=r"h\.0\.ln_1\.weight is not what was written"):
        export_model(folder, "huggingface", None, tmp_path / "out", "")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("number, format_name, dtype, part", [
    (math.nan, "huggingface", "float16", "wte.weight has numbers that are not finite"),
    (math.inf, "nanogpt", None, "wte.weight has numbers that are not finite"),
    (1e6, "huggingface", "float16", "--dtype bfloat16"),
    (-1e6, "gguf", "float16", "--dtype float32"),
])  # fmt: skip
def test_weights_that_are_not_finite_or_out_of_range_are_refused(
    tmp_path: Path, number: float, format_name: str, dtype: str | None, part: str
) -> None:
    tokenizer = build_char_tokenizer(["abc"], end_of_text=True)
    model, folder = save_random_model(tmp_path / "model", tokenizer)
    with torch.no_grad():
        model.wte.weight[1, 1] = number
    (folder / "state.json").unlink()
    write_checkpoint(folder, model, tokenizer)
    with pytest.raises(Damaged if abs(number) != 1e6 else BadInput) as raised:
        export_model(folder, format_name, dtype, tmp_path / "out", "")
    assert part in str(raised.value) and [path.name for path in tmp_path.iterdir()] == ["model"]


def test_all_files_of_an_export_have_the_same_permissions(tmp_path: Path) -> None:
    _, folder = save_random_model(tmp_path / "model", build_char_tokenizer(["abc"], end_of_text=True))
    exported = export_model(folder, "huggingface", None, tmp_path / "out", "")
    assert len({path.stat().st_mode for path in exported.iterdir()}) == 1
