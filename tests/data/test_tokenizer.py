"""Tokenizers: the published files from the pinned ranks, and what transformers makes of ours."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2box.data import tokenizer
from gpt2box.data.downloads import sha256_of
from gpt2box.data.tokenizer import Gpt2Tokenizer
from gpt2box.errors import BadInput, Damaged

TEXT = "To be — or not to be?\n\n  It's naïve: 3.14 ≠ π. 日本語 <|endoftext|> 🙂\n"


def test_the_files_written_are_the_published_ones(gpt2_tokenizer: Gpt2Tokenizer, tmp_path: Path) -> None:
    gpt2_tokenizer.save(tmp_path)
    # openai-community/gpt2-medium at 6dcaa7a
    assert sha256_of(tmp_path / "vocab.json") == "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
    assert sha256_of(tmp_path / "merges.txt") == "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
    loaded = tokenizer.load_tokenizer(tmp_path)
    assert isinstance(loaded, Gpt2Tokenizer) and loaded.ranks == gpt2_tokenizer.ranks


@settings(deadline=None)
@given(text=st.text(max_size=200))
def test_any_text_comes_back(gpt2_tokenizer: Gpt2Tokenizer, text: str) -> None:
    assert gpt2_tokenizer.decode_bytes(gpt2_tokenizer.encode(text).tolist()).decode() == text


def test_transformers_reads_the_gpt2_files_to_the_same_ids(gpt2_tokenizer: Gpt2Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    gpt2_tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    plain = TEXT.replace("<|endoftext|>", "")  # they take its name in a text for the token itself
    assert theirs(plain)["input_ids"] == gpt2_tokenizer.encode(plain).tolist()
    assert theirs.eos_token_id == gpt2_tokenizer.end_of_text == 50_256


def test_a_folder_that_transformers_saved_is_read(gpt2_tokenizer: Gpt2Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    gpt2_tokenizer.save(tmp_path)
    AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "theirs")
    loaded = tokenizer.load_tokenizer(tmp_path / "theirs")
    assert isinstance(loaded, Gpt2Tokenizer) and loaded.ranks == gpt2_tokenizer.ranks


def test_a_text_that_tiktoken_gives_up_on_is_refused(gpt2_tokenizer: Gpt2Tokenizer) -> None:
    with pytest.raises(BadInput, match="tiktoken gave up"):
        gpt2_tokenizer.encode(" " * 1_000_000 + "x")


@pytest.mark.parametrize("end_of_text", [True, False])
def test_transformers_reads_the_character_files_to_the_same_ids(tmp_path: Path, end_of_text: bool) -> None:
    from transformers import AutoTokenizer

    plain = TEXT.replace("<|endoftext|>", "")
    ours = tokenizer.build_char_tokenizer([plain], end_of_text)
    ours.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(plain)["input_ids"] == ours.encode(plain).tolist()
    assert theirs.decode(ours.encode(plain).tolist()) == plain
    assert theirs.eos_token_id == ours.end_of_text
    again = tokenizer.load_tokenizer(tmp_path)
    assert again.vocab_size == ours.vocab_size == len(set(plain)) + end_of_text
    assert again.decode_bytes(again.encode(plain).tolist()).decode() == plain


def test_a_character_it_does_not_know_is_named() -> None:
    with pytest.raises(BadInput, match=r"'é' \(U\+00E9\)"):
        tokenizer.build_char_tokenizer(["abc"], True).encode("abé")


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.json"])
@pytest.mark.parametrize("content", ["", "[]", '{"a": 1}', '{"model": {"type": "WordLevel", "vocab": 3}}'])
def test_broken_files_are_named(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises((Damaged, BadInput)):
        tokenizer.load_tokenizer(tmp_path)
