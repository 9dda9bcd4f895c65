"""Prompts with responses: what is written, what counts in the loss, and what is refused."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import torch.nn.functional as F

from gpt2box.data.dataloader import count_loss_targets, inputs_and_targets, read_windows
from gpt2box.data.dataset import SPLITS, TokenFile, open_dataset
from gpt2box.data.downloads import sha256_of
from gpt2box.data.prepare import prepare, verify_dataset
from gpt2box.data.prepare_config import PrepareConfig
from gpt2box.data.tokenizer import Gpt2Tokenizer
from gpt2box.distributed.group import RankGroup
from gpt2box.errors import BadInput, Damaged
from gpt2box.training.step import target_shares
from gpt2box.utils.ranks import SINGLE_PROCESS
from tests.helpers.commands import Command
from tests.helpers.models import tiny_model
from tests.helpers.settings import options

RECORDS = [
    {"prompt": f"What is {i} plus {i}?", "response": f"{i} plus {i} is {2 * i}, naïvely — 漢字."} for i in range(60)
]


def write_jsonl(path: Path, records: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def made_of(path: Path, **changes: object) -> Path:
    folder = path.parent / f"made-{len(list(path.parent.iterdir()))}"
    prepare([str(path)], PrepareConfig(**changes), folder=folder)  # type: ignore[arg-type]
    return folder


def test_responses_and_their_end_count_and_prompts_do_not(
    volumes: Path, tmp_path: Path, gpt2_tokenizer: Gpt2Tokenizer
) -> None:
    folder = made_of(write_jsonl(tmp_path / "chat.jsonl", RECORDS))
    ids, counted = np.fromfile(folder / "train.bin", "<u2"), np.fromfile(folder / "train.mask", bool)
    assert len(ids) == len(counted)
    seen = set()
    for document, mask in zip(
        np.split(ids, np.flatnonzero(ids == 50_256) + 1),
        np.split(counted, np.flatnonzero(ids == 50_256) + 1),
        strict=True,
    ):
        if len(document):
            prompt, response = (gpt2_tokenizer.decode_bytes(document[m].tolist()).decode() for m in (~mask, mask))
            assert not mask[: (~mask).sum()].any() and document[-1] == 50_256
            seen.add((prompt, response.removesuffix("<|endoftext|>")))
    wanted = {(f"### Instruction:\n{r['prompt']}\n\n### Response:\n", r["response"]) for r in RECORDS}
    assert seen < wanted and len(seen) == 57  # 3 of 60 are held out


@pytest.mark.parametrize("kind", ["json", "csv", "parquet", "jsonl.gz"])
def test_each_kind_of_file_gives_the_same_tokens(volumes: Path, tmp_path: Path, kind: str) -> None:
    import csv
    import gzip

    path = tmp_path / f"same.{kind}"
    if kind == "json":
        path.write_text(json.dumps(RECORDS))
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(write_jsonl(tmp_path / "x", RECORDS).read_bytes()))
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)
    else:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "response"])
            writer.writeheader()
            writer.writerows(RECORDS)
    first = made_of(write_jsonl(tmp_path / "plain.jsonl", RECORDS))
    second = made_of(path)
    for name in ("train.bin", "val.bin", "train.mask", "val.mask"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_an_instruction_with_its_input_is_one_prompt(
    volumes: Path, tmp_path: Path, gpt2_tokenizer: Gpt2Tokenizer
) -> None:
    records = [{"instruction": f"Sort {i}.", "input": "b a" if i % 2 else "", "output": f"a b {i}"} for i in range(80)]
    folder = made_of(write_jsonl(tmp_path / "alpaca.jsonl", records))
    text = gpt2_tokenizer.decode_bytes(np.fromfile(folder / "train.bin", "<u2").tolist()).decode()
    assert "### Instruction:\nSort 3.\n\nb a\n\n### Response:\na b 3<|endoftext|>" in text
    assert "### Instruction:\nSort 4.\n\n### Response:\na b 4<|endoftext|>" in text


def test_a_context_counts_in_whichever_record_it_is(
    volumes: Path, tmp_path: Path, gpt2_tokenizer: Gpt2Tokenizer
) -> None:
    records = [{"instruction": f"Add {i} to", "output": f"{i} more, {i} in all, as asked of me"} for i in range(80)]
    with_context = [record | {("input", "context")[i % 2]: f"number {i}"} for i, record in enumerate(records[1:])]
    path = write_jsonl(tmp_path / "later.jsonl", [records[0], *with_context])
    folder = made_of(path)
    ids = np.concatenate([np.fromfile(folder / f"{split}.bin", "<u2") for split in SPLITS]).tolist()
    text = gpt2_tokenizer.decode_bytes(ids).decode()
    assert all(f"Add {i} to\n\nnumber {i - 1}\n" in text for i in range(1, 80))
    assert "Add 0 to\n\n### Response" in text


def test_a_record_with_a_text_or_a_named_column_stays_plain_text(volumes: Path, tmp_path: Path) -> None:
    records = [r | {"text": "some words that are many " * 5 + r["prompt"]} for r in RECORDS]
    path = write_jsonl(tmp_path / "both.jsonl", records)
    assert not (made_of(path) / "train.mask").exists()
    assert not (made_of(path, text_column="response") / "train.mask").exists()
    assert (made_of(path, prompt_column="prompt", response_column="response") / "train.mask").exists()


def test_duplicates_and_pairs_without_response_are_left_out_and_counted(volumes: Path, tmp_path: Path) -> None:
    records = [*RECORDS, RECORDS[0], {"prompt": "silence", "response": " "}]
    manifest = json.loads((made_of(write_jsonl(tmp_path / "a.jsonl", records)) / "dataset.json").read_text())
    assert (manifest["duplicates_left_out"], manifest["empty_left_out"]) == (1, 1)
    assert manifest["splits"]["train"]["documents"] == 57 and manifest["loss_on"] == "responses"


def test_bad_requests_are_named(volumes: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "chat.jsonl", RECORDS)
    with pytest.raises(BadInput, match="one of --prompt-column and --response-column without the other"):
        made_of(path, prompt_column="prompt")
    with pytest.raises(BadInput, match="no column 'answer'"):
        made_of(path, prompt_column="prompt", response_column="answer")
    with pytest.raises(BadInput, match="--tokenizer char has no meaning"):
        made_of(path, tokenizer="char")
    with pytest.raises(BadInput, match="--max-docs has no meaning for prompts with responses"):
        made_of(path, max_docs=3)


def test_a_damaged_mask_is_noticed(volumes: Path, tmp_path: Path) -> None:
    folder = made_of(write_jsonl(tmp_path / "chat.jsonl", RECORDS))
    mask = bytearray((folder / "val.mask").read_bytes())
    mask[3] ^= 1
    (folder / "val.mask").write_bytes(mask)
    with pytest.raises(Damaged, match="val"):
        verify_dataset(str(folder))
    (folder / "val.mask").write_bytes(mask[:-1])
    with pytest.raises(Damaged, match=r"val\.mask is missing or not of"):
        open_dataset(folder)
    (folder / "val.mask").write_bytes(bytes(len(mask)))
    manifest = json.loads((folder / "dataset.json").read_text())
    manifest["splits"]["val"]["mask_sha256"] = sha256_of(folder / "val.mask")
    (folder / "dataset.json").write_text(json.dumps(manifest))
    with pytest.raises(Damaged, match=r"val\.mask: no token counts"):
        verify_dataset(str(folder))


def test_a_stray_mask_is_not_used_and_one_of_other_bytes_refused(volumes: Path, tmp_path: Path) -> None:
    for split in SPLITS:
        (volumes / "data" / "text" / f"{split}.mask").write_bytes(bytes(2_000_000))
    with closing(TokenFile(volumes / "data" / "text" / "train.bin")) as file:
        assert file.counted(0, 10) is None
    folder = made_of(write_jsonl(tmp_path / "chat.jsonl", RECORDS))
    mask = bytearray((folder / "val.mask").read_bytes())
    mask[3] = 2
    (folder / "val.mask").write_bytes(mask)
    with closing(TokenFile(folder / "val.bin")) as file, pytest.raises(Damaged, match="has a byte 2"):
        file.counted(0, 10)
    (folder / "val.mask").unlink()
    with pytest.raises(Damaged, match=r"val\.mask: No such file"):
        TokenFile(folder / "val.bin")


@pytest.mark.parametrize("key", ["loss_on", "mask_sha256"])
def test_what_counts_is_said_in_whole_or_not_at_all(volumes: Path, tmp_path: Path, key: str) -> None:
    folder = made_of(write_jsonl(tmp_path / "chat.jsonl", RECORDS))
    manifest = json.loads((folder / "dataset.json").read_text())
    (manifest if key == "loss_on" else manifest["splits"]["val"]).pop(key)
    (folder / "dataset.json").write_text(json.dumps(manifest))
    with pytest.raises(Damaged, match="loss_on"):
        open_dataset(folder)


def test_a_step_is_the_mean_over_counted_tokens_however_it_is_dealt(volumes: Path, tmp_path: Path) -> None:
    folder = made_of(write_jsonl(tmp_path / "chat.jsonl", RECORDS))
    dataset = open_dataset(folder)
    model = tiny_model(vocab_size=50_257, dtype=torch.float64)
    file = TokenFile(folder / "train.bin")
    T = model.shape.block_size
    starts = [i * T for i in range(12)]
    windows = read_windows(file, starts, T, 50_257)
    inputs, targets = inputs_and_targets(windows)
    ids = np.fromfile(folder / "train.bin", "<u2").astype(np.int64)
    counted = np.fromfile(folder / "train.mask", bool)
    assert dataset.masked and count_loss_targets(windows) == sum(counted[s + 1 : s + T + 1].sum() for s in starts)
    assert inputs.tolist() == [ids[s : s + T].tolist() for s in starts]
    logits = model.logits(model.hidden_states(inputs.long()))
    wanted = torch.tensor(np.stack([np.where(counted, ids, -1)[s + 1 : s + T + 1] for s in starts]))
    reference = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=-1)
    for micro in (1, 3, 4, 12):
        parts = list(windows.split(micro))
        shares = target_shares(parts, RankGroup(SINGLE_PROCESS))
        losses = [
            model(*inputs_and_targets(part), 1 / len(parts)) * share for part, share in zip(parts, shares, strict=True)
        ]
        assert torch.stack(losses).sum().item() == pytest.approx(reference.item(), rel=1e-12)
    assert targets.tolist() == wanted.tolist()


def test_answers_are_learned_and_prompts_are_not(volumes: Path, tmp_path: Path, gpt2box: Command) -> None:
    path = write_jsonl(tmp_path / "chat.jsonl", RECORDS)
    assert "loss on the responses alone" in gpt2box("prepare", str(path)).stderr
    steps = {"max_steps": 24, "eval_interval": 24, "learning_rate": 1e-2, "block_size": 16}
    first = gpt2box("train", *options(dataset="chat", name="a", **steps, micro_batch_size=4))
    assert first.returncode == 0, first.stderr
    again = gpt2box("train", *options(dataset="chat", name="b", **steps, micro_batch_size=16))
    losses = [
        [r["val_loss"] for r in map(json.loads, (volumes / "runs" / n / "metrics.jsonl").open()) if r["kind"] == "eval"]
        for n in "ab"
    ]
    assert again.returncode == 0 and losses[0][-1] < losses[0][0] - 2
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)
