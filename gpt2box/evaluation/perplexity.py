"""The loss of a model on text: nats a token, perplexity, and bits a byte, by which tokenizers compare.

Windows as in lm-evaluation-harness and in Hugging Face's guide to perplexity: each token is predicted once. The first
window predicts all its tokens; every further one the next `stride`, from as many tokens before them as the context
holds. A stride of a whole context is what training reports; a shorter one gives each token more to go on.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from gpt2box.data.dataset import ID_BYTES, Dataset, TokenFile
from gpt2box.data.readers import decoded
from gpt2box.data.tokenizer import Tokenizer, Tokens
from gpt2box.errors import BadInput
from gpt2box.model.gpt2 import GPT2
from gpt2box.utils.files import read_object
from gpt2box.utils.paths import dataset_dir
from gpt2box.utils.progress import bytes_bar

BATCH_TOKENS = 8192  # in one forward pass: small beside the weights


@dataclass(frozen=True)
class Loss:
    """Of a model on a text."""

    tokens: int  # that were predicted and count
    text_bytes: int  # that they stand for
    nats: float  # the sum of -log probability
    words: int | None = None  # of the text, where all of it was predicted

    def figures(self) -> dict[str, float | int]:
        """As they are shown and printed as JSON."""
        mean = self.nats / self.tokens
        of_words = {"word_perplexity": exponential(self.nats / self.words)} if self.words else {}
        return {
            "val_loss": mean,
            "perplexity": exponential(mean),
            "bits_per_byte": self.nats / math.log(2) / max(self.text_bytes, 1),
            "byte_perplexity": exponential(self.nats / max(self.text_bytes, 1)),
            **of_words,
            "tokens": self.tokens,
            "bytes": self.text_bytes,
        }


def exponential(nats: float) -> float:
    """Finite for anything."""
    return math.exp(min(nats, 700.0))


def windows(count: int, block_size: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """For `count` targets: a window's first input, the end of its inputs, and the first target that it predicts.

    Target i follows input i, so a window of inputs begin…end predicts the targets of the same numbers.
    """
    done = 0
    while done < count:
        end = min(done + (stride if done else block_size), count)
        yield max(0, end - block_size), end, done
        done = end


@torch.inference_mode()
def loss_of(
    model: GPT2,
    words: Tokenizer,
    count: int,
    read: Callable[[int, int], Tokens],
    counted: Callable[[int, int], npt.NDArray[np.bool_] | None],
    stride: int,
) -> Loss:
    """The loss on `count` + 1 tokens, of which the first is only a context.

    `read` and `counted` give the ids from a place on, and which of them count (None: all).
    """
    device, block_size = model.wte.weight.device, model.shape.block_size
    tokens = text_bytes = 0
    nats = 0.0
    at_once = max(1, BATCH_TOKENS // block_size)
    model.eval()
    with bytes_bar("evaluating", count * ID_BYTES) as advance:
        for _, alike in groupby(windows(count, block_size, stride), key=lambda window: window[1] - window[0]):
            while chosen := list(islice(alike, at_once)):
                batch = np.stack([read(begin, end + 1 - begin) for begin, end, _ in chosen]).astype(np.int64)
                if (largest := int(batch.max())) >= model.shape.vocab_size:
                    raise BadInput(f"the text holds token id {largest:,}", f"ids below {model.shape.vocab_size:,}")
                targets = batch[:, 1:].copy()  # (B, T)
                for row, (begin, end, first) in zip(targets, chosen, strict=True):
                    row[: first - begin] = -1
                    if (mask := counted(begin + 1, end - begin)) is not None:
                        row[~mask] = -1
                kept = targets[targets >= 0]
                mean = model(torch.from_numpy(batch[:, :-1]).to(device), torch.from_numpy(targets).to(device))
                nats += float(mean) * len(kept)
                tokens += len(kept)
                text_bytes += len(words.decode_bytes(kept[kept != words.end_of_text].tolist()))
                predicted = sum(end - first for _, end, first in chosen)
                advance(predicted * ID_BYTES, f"loss {nats / max(tokens, 1):.4f}")
    if not tokens:
        raise BadInput("no token of this text counts", "a text of two tokens or more")
    return Loss(tokens, text_bytes, nats)


def loss_on_dataset(model: GPT2, words: Tokenizer, dataset: Dataset, split: str, stride: int, most: int | None) -> Loss:
    """On a split of a prepared dataset: its tokens in a row, whatever document they are of.

    Raises:
        BadInput: another tokenizer's dataset.
    """
    theirs = dataset.tokenizer
    if theirs.vocabulary() != words.vocabulary():
        raise BadInput(
            f"{dataset.folder} is in tokens of a {theirs.kind} tokenizer of {theirs.vocab_size:,}",
            f"the model's own, a {words.kind} tokenizer of {words.vocab_size:,}",
            "gpt2box eval MODEL --text FILE, and compare bits per byte",
        )
    with closing(TokenFile(dataset.folder / f"{split}.bin")) as file:
        count = min(file.tokens - 1, most or file.tokens)
        return loss_of(model, words, count, file.read, file.counted, stride)


def loss_on_text(model: GPT2, words: Tokenizer, path: Path, stride: int, most: int | None) -> Loss:
    """On a plain text, as one document that begins after the end-of-text token where the vocabulary has one.

    Raises:
        BadInput: not UTF-8, or of other characters than the model's.
    """
    with open(path, "rb") as file:
        text = "".join(decoded(file, path))  # as prepare reads it: any line end is \n, a byte-order mark is dropped
    ids = words.encode(text)
    if words.end_of_text is not None:
        ids = np.concatenate([np.array([words.end_of_text], dtype=np.uint16), ids])
    count = min(len(ids) - 1, most or len(ids))
    found = loss_of(model, words, count, lambda begin, n: ids[begin : begin + n], lambda begin, n: None, stride)
    return replace(found, words=len(re.split(r"\s+", text)) if count == len(ids) - 1 else None)


def dataset_of(folder: Path) -> Path:
    """The dataset that a run's checkpoint was trained on.

    Raises:
        BadInput: no run's checkpoint.
    """
    about = read_object(folder.resolve().parent.parent / "manifest.json").get("dataset")
    kept = about.get("folder") if isinstance(about, dict) else None
    if not kept or not isinstance(kept, str):
        raise BadInput(f"what should {folder} be evaluated on?", "a dataset or a text", "--dataset NAME or --text FILE")
    there = Path(kept)
    return there if there.is_dir() else dataset_dir(there.name)  # the volumes may have moved
