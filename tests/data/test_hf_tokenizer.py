"""Vocabularies other than GPT-2's own: the ids of transformers, from preparation to export."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, ByteLevelBPETokenizer, Tokenizer, normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from gpt2box.data import bulk_tokenizer, text_chunks, tokenizer
from gpt2box.data.hf_tokenizer import BpeTokenizer
from gpt2box.data.prepare import prepare
from gpt2box.data.prepare_config import PrepareConfig
from gpt2box.data.tokenizer import Gpt2Tokenizer
from gpt2box.errors import BadInput, Damaged
from gpt2box.export.export import export_model
from gpt2box.inference.model_loader import load_model
from tests.helpers.commands import Command
from tests.helpers.settings import TINYSHAKESPEARE, options

HOSTILE = [
    "",
    "To be, or not to be: that is the question.",
    "  naïve 漢字 🙂👍🏽\n\n\t1984's <|x|>\r\n ",
    "<s>said</s> <|endoftext|> <unk> SPEAKER:SPEAKER: NEW",
    "e\u0301 \u00e9 ﬁ Å \u2126 \u202e\ufeff\x00\x7f",
    "'s'll'LL 'tis it’s  \u00a0\u3000 x" + " " * 300 + "y" * 300,
    "0123456789" * 30 + "٣٤٥",
    "def f(x):\n    return x  # …\n\n\n",
]
NAMES = {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
Make = Callable[[Path], None]


def trained(folder: Path, vocab_size: int = 600) -> Any:
    """A vocabulary of the speeches, whose special tokens come first."""
    made = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    made.train([str(TINYSHAKESPEARE)], vocab_size=vocab_size, special_tokens=special, show_progress=False)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    return made


def plain_files(folder: Path) -> None:
    trained(folder).save_model(str(folder))
    (folder / "tokenizer_config.json").write_text(json.dumps(NAMES))


def as_transformers_saves_gpt2s(folder: Path) -> None:
    plain_files(folder)
    words = AutoTokenizer.from_pretrained(folder)
    words.save_pretrained(folder)


def with_a_prefix_space(folder: Path) -> None:
    plain_files(folder)
    config = {**NAMES, "add_prefix_space": True, "tokenizer_class": "GPT2Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def with_normalizer_and_added_tokens(folder: Path) -> None:
    backend: Tokenizer = trained(folder)._tokenizer
    backend.normalizer = normalizers.NFKC()
    backend.add_tokens([AddedToken("SPEAKER:", lstrip=True)])
    backend.enable_truncation(5)
    words = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", additional_special_tokens=["<|x|>"])
    words.save_pretrained(folder)


MAKES = [plain_files, as_transformers_saves_gpt2s, with_a_prefix_space, with_normalizer_and_added_tokens]


@pytest.mark.parametrize("make", MAKES)
def test_the_ids_are_those_of_transformers(tmp_path: Path, make: Make) -> None:
    make(tmp_path / "theirs")
    ours = tokenizer.load_tokenizer(tmp_path / "theirs")
    assert isinstance(ours, BpeTokenizer) and ours.splits_as_gpt2 == (make in MAKES[:2])
    (tmp_path / "again").mkdir()
    ours.save(tmp_path / "again")
    shutil.copy(tmp_path / "theirs" / "config.json", tmp_path / "again")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert ours.vocab_size == len(theirs) and ours.end_of_text == theirs.eos_token_id
    assert ours.vocabulary() == theirs.get_vocab() == tokenizer.load_tokenizer(tmp_path / "again").vocabulary()

    def same(text: str) -> None:
        ids = ours.encode(text).tolist()
        assert ids == theirs.encode(text, add_special_tokens=False, split_special_tokens=True, truncation=False), text
        expected = theirs.decode(ids, clean_up_tokenization_spaces=False)
        assert ours.decode_bytes(ids).decode("utf-8", "replace") == expected

    for text in [*HOSTILE, TINYSHAKESPEARE.read_text()[:5000]]:
        same(text)
    settings(deadline=None, max_examples=60, database=None)(given(st.text(max_size=80))(same))()


def test_gpt2s_own_vocabulary_in_any_layout_keeps_its_fast_tokenizer(
    tmp_path: Path, gpt2_tokenizer: Gpt2Tokenizer
) -> None:
    folder = tmp_path / "distilgpt2"
    folder.mkdir()
    gpt2_tokenizer.save(folder)
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    assert isinstance(tokenizer.load_tokenizer(folder), Gpt2Tokenizer)
    words = AutoTokenizer.from_pretrained(folder)
    words.save_pretrained(folder)  # with tokenizer.json
    assert isinstance(tokenizer.load_tokenizer(folder), Gpt2Tokenizer)
    words.add_special_tokens({"pad_token": "<pad>"})
    words.save_pretrained(tmp_path / "padded")
    padded = tokenizer.load_tokenizer(tmp_path / "padded")
    assert isinstance(padded, BpeTokenizer) and padded.vocab_size == 50_258
    assert gpt2_tokenizer.vocabulary().items() <= padded.vocabulary().items()
    for text in HOSTILE:
        assert padded.encode(text).tolist() == gpt2_tokenizer.encode(text).tolist()
    (folder / "tokenizer.json").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"add_prefix_space": True}
    gpt2_tokenizer.save(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert isinstance(tokenizer.load_tokenizer(folder), BpeTokenizer)


def test_long_texts_are_cut_where_no_token_crosses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain_files(tmp_path / "words")
    words = tokenizer.load_tokenizer(tmp_path / "words")
    text = TINYSHAKESPEARE.read_text()[:200_000]
    whole = words.encode(text[:60_000])
    monkeypatch.setattr(text_chunks, "CHUNK_CHARACTERS", 64)
    bulk = bulk_tokenizer.BulkEncoder(tmp_path / "words")
    assert np.array_equal(np.concatenate(list(bulk.encode([text[:40_000], text[40_000:60_000]]))), whole)
    monkeypatch.setattr(text_chunks, "CHUNK_CHARACTERS", 1 << 20)
    expected = words._tokenizer.encode(text, add_special_tokens=False).ids  # type: ignore[attr-defined]
    assert words.encode(text).tolist() == expected


def test_what_is_too_large_or_of_another_kind_or_broken_is_said(tmp_path: Path) -> None:
    plain_files(tmp_path / "words")
    content = json.loads((tmp_path / "words" / "vocab.json").read_text())
    large = content | {f"Ġ{number}x": number for number in range(len(content), 65_537)}
    (tmp_path / "words" / "vocab.json").write_text(json.dumps(large))
    with pytest.raises(BadInput, match="65,537 tokens"):
        tokenizer.load_tokenizer(tmp_path / "words")
    (tmp_path / "words" / "merges.txt").write_text("#version: 0.2\nq Ġzzz\n")
    with pytest.raises(Damaged, match="damaged"):
        tokenizer.load_tokenizer(tmp_path / "words")
    (tmp_path / "words" / "merges.txt").unlink()
    with pytest.raises(BadInput, match=r"without merges\.txt"):
        tokenizer.load_tokenizer(tmp_path / "words")
    (tmp_path / "words" / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram", "vocab": []}}))
    with pytest.raises(BadInput, match="Unigram"):
        tokenizer.load_tokenizer(tmp_path / "words")


def model_folder(folder: Path, vocab_size: int) -> Path:
    """A small model of that vocabulary, as transformers writes it, in the tokenizer's folder."""
    torch.manual_seed(3)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 32}
    GPT2LMHeadModel(GPT2Config(**sizes, vocab_size=vocab_size)).save_pretrained(folder)
    return folder


def test_a_model_with_its_own_vocabulary_is_tuned_sampled_evaluated_and_exported(
    volumes: Path, tmp_path: Path, gpt2box: Command
) -> None:
    as_transformers_saves_gpt2s(tmp_path / "german")
    base = model_folder(tmp_path / "german", 640)  # rows that no token has
    (tmp_path / "book.txt").write_text(TINYSHAKESPEARE.read_text()[:100_000])
    settings = options(dataset=tmp_path / "book.txt", init_from=base, max_steps=1, eval_interval=1, eval_windows=2)
    done = gpt2box("train", *settings, "--name", "tuned")
    assert done.returncode == 0, done.stderr
    about = json.loads((volumes / "data" / "book" / "dataset.json").read_text())["tokenizer"]
    assert (about["kind"], about["vocab_size"]) == ("bpe", 600)
    theirs, best = AutoTokenizer.from_pretrained(base), volumes / "runs" / "tuned" / "checkpoints" / "best"
    kept = AutoTokenizer.from_pretrained(best)
    assert all(theirs(text)["input_ids"] == kept(text)["input_ids"] for text in HOSTILE)
    ids = np.fromfile(volumes / "data" / "book" / "train.bin", "<u2")[:2000].tolist()
    assert (tmp_path / "book.txt").read_text().startswith(theirs.decode(ids))
    text = gpt2box("sample", "tuned", "--prompt", "Ay, naïve", "--max-new-tokens", "20")
    assert text.returncode == 0 and text.stdout.startswith("Ay, naïve"), text.stderr
    figures = gpt2box("eval", "tuned", "--text", str(tmp_path / "book.txt"), "--max-tokens", "64", "--json")
    assert json.loads(figures.stdout)["tokens"] == 64, figures.stderr
    made = export_model(best, "huggingface", None, tmp_path / "out", "")
    exported, model = AutoModelForCausalLM.from_pretrained(made).eval(), load_model(best, "cpu")[0].eval()
    ids_of_text = torch.tensor([AutoTokenizer.from_pretrained(made)("To be, or not").input_ids])
    with torch.inference_mode():
        assert (exported(ids_of_text).logits - model.logits(model.hidden_states(ids_of_text))).abs().max() < 1e-4
    assert exported.config.vocab_size == 600 and exported.config.eos_token_id == theirs.eos_token_id


def test_gguf_has_the_models_own_vocabulary(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf (gpt2box[export]) is not installed")
    as_transformers_saves_gpt2s(tmp_path / "german")
    base = model_folder(tmp_path / "german", 600)
    fields = {
        n: f.contents()
        for n, f in gguf.GGUFReader(export_model(base, "gguf", None, tmp_path / "g.gguf", "")).fields.items()
    }
    words = AutoTokenizer.from_pretrained(base)
    assert fields["tokenizer.ggml.tokens"] == words.convert_ids_to_tokens(range(600))
    assert fields["tokenizer.ggml.eos_token_id"] == words.eos_token_id
    assert fields["tokenizer.ggml.merges"] == (base / "merges.txt").read_text().splitlines()[1:]


def test_weights_and_dataset_must_have_one_vocabulary_but_it_may_be_extended(
    volumes: Path, tmp_path: Path, gpt2_tokenizer: Gpt2Tokenizer, gpt2box: Command
) -> None:
    as_transformers_saves_gpt2s(tmp_path / "one")
    base = model_folder(tmp_path / "one", 600)
    book = tmp_path / "book.txt"
    book.write_text(TINYSHAKESPEARE.read_text()[:100_000])
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    swapped = (tmp_path / "two" / "tokenizer.json").read_text().replace('"he":', '"??":').replace('"th":', '"he":')
    (tmp_path / "two" / "tokenizer.json").write_text(swapped.replace('"??":', '"th":'))
    few = {"max_steps": 1, "eval_interval": 1, "eval_windows": 2}
    prepare([str(book)], PrepareConfig(str(tmp_path / "two")), "other")
    refused = gpt2box("train", *options(dataset="other", init_from=base, **few), "--name", "refused")
    assert refused.returncode == 2 and "another of as many" in refused.stderr, refused.stderr
    assert f"--tokenizer {base}" in refused.stderr

    words = AutoTokenizer.from_pretrained(base)
    words.add_tokens(["ROMEO:", "JULIET:"])
    words.save_pretrained(tmp_path / "extended")
    prepare([str(book)], PrepareConfig(str(tmp_path / "extended")), "extended")
    done = gpt2box("train", *options(dataset="extended", init_from=base, learning_rate=1e-9, **few), "--name", "ext")
    assert done.returncode == 0, done.stderr
    before = AutoModelForCausalLM.from_pretrained(base).transformer.wte.weight
    after = AutoModelForCausalLM.from_pretrained(volumes / "runs/ext/checkpoints/last").transformer.wte.weight
    assert after.shape == (602, 32) and (after[:600] - before).abs().max() < 1e-6
    assert (after[600:] - before.mean(0)).abs().max() < 1e-6
