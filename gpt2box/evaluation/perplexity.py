"""Measure a model's loss on text: nats per token, perplexity, and bits per byte, which compares across tokenizers.

Sliding windows follow lm-evaluation-harness and Hugging Face's guide to perplexity: each token is predicted once. The
first window predicts all its tokens; every later one predicts the next `stride` tokens, given as many preceding tokens
as the context holds. Training reports the loss with a stride of one full context; a shorter stride gives each token
more context.
"""

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
from gpt2box.data.readers import decode_text
from gpt2box.data.tokenizer import Tokenizer, Tokens
from gpt2box.errors import BadInput
from gpt2box.model.gpt2 import GPT2
from gpt2box.utils.files import read_json_object
from gpt2box.utils.paths import dataset_dir
from gpt2box.utils.progress import byte_progress

BATCH_TOKENS = 8192  # per forward pass; their activations stay small next to the weights
MAX_EXPONENT = 700.0  # exp() of more than 709 overflows a float


@dataclass(frozen=True)
class Loss:
    """Summed loss of a model on a text."""

    tokens: int  # predicted tokens that count toward the loss
    text_bytes: int  # UTF-8 bytes that these tokens decode to
    nats: float  # sum of -log probability
    words: int | None = None  # words in the text; None if only part of it was predicted

    def figures(self) -> dict[str, float | int]:
        """Return the metrics by the names that `gpt2box eval` prints."""
        mean = self.nats / self.tokens
        of_words = {"word_perplexity": bounded_exp(self.nats / self.words)} if self.words else {}
        return {
            "val_loss": mean,
            "perplexity": bounded_exp(mean),
            "bits_per_byte": self.nats / math.log(2) / max(self.text_bytes, 1),
            "byte_perplexity": bounded_exp(self.nats / max(self.text_bytes, 1)),
            **of_words,
            "tokens": self.tokens,
            "bytes": self.text_bytes,
        }


def bounded_exp(nats: float) -> float:
    """Return e^nats, capped so that it stays finite."""
    return math.exp(min(nats, MAX_EXPONENT))


def sliding_windows(count: int, block_size: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield (begin, end, first) for each window over `count` targets.

    Inputs begin…end go into the model; targets first…end count, the earlier ones are context. Target i is the token
    that follows input i.
    """
    done = 0
    while done < count:
        end = min(done + (stride if done else block_size), count)
        yield max(0, end - block_size), end, done
        done = end


@torch.inference_mode()
def compute_loss(
    model: GPT2,
    tokenizer: Tokenizer,
    count: int,
    read: Callable[[int, int], Tokens],
    counted: Callable[[int, int], npt.NDArray[np.bool_] | None],
    stride: int,
) -> Loss:
    """Compute the loss on `count` + 1 tokens, of which the first is context only.

    `read(begin, n)` returns the n token ids from position `begin`; `counted(begin, n)` returns a mask of those that
    count toward the loss, or None if all do.
    """
    device, block_size = model.wte.weight.device, model.shape.block_size
    tokens = text_bytes = 0
    nats = 0.0
    batch_size = max(1, BATCH_TOKENS // block_size)
    model.eval()
    with byte_progress("evaluating", count * ID_BYTES) as advance:
        windows = sliding_windows(count, block_size, stride)
        for _, same_length in groupby(windows, key=lambda window: window[1] - window[0]):
            while chosen := list(islice(same_length, batch_size)):
                batch = np.stack([read(begin, end + 1 - begin) for begin, end, _ in chosen]).astype(np.int64)
                if (largest := int(batch.max())) >= model.shape.vocab_size:
                    raise BadInput(f"the text holds token id {largest:,}", f"ids below {model.shape.vocab_size:,}")
                targets = batch[:, 1:].copy()  # (B, T)
                for row, (begin, end, first) in zip(targets, chosen, strict=True):
                    row[: first - begin] = -1
                    if (mask := counted(begin + 1, end - begin)) is not None:
                        row[~mask] = -1
                scored = targets[targets >= 0]
                mean = model(torch.from_numpy(batch[:, :-1]).to(device), torch.from_numpy(targets).to(device))
                nats += float(mean) * len(scored)
                tokens += len(scored)
                text_bytes += len(tokenizer.decode_bytes(scored[scored != tokenizer.end_of_text].tolist()))
                predicted = sum(end - first for _, end, first in chosen)
                advance(predicted * ID_BYTES, f"loss {nats / max(tokens, 1):.4f}")
    if not tokens:
        raise BadInput("no token of this text counts toward the loss", "a text of at least two tokens")
    return Loss(tokens, text_bytes, nats)


def loss_on_dataset(
    model: GPT2, tokenizer: Tokenizer, dataset: Dataset, split: str, stride: int, max_tokens: int | None
) -> Loss:
    """Compute the loss on a split of a prepared dataset, read as one stream across document boundaries.

    Raises BadInput: the dataset was made with another tokenizer.
    """
    other = dataset.tokenizer
    if other.vocabulary() != tokenizer.vocabulary():
        raise BadInput(
            f"{dataset.folder} is in tokens of a {other.kind} tokenizer of {other.vocab_size:,}",
            f"the model's own, a {tokenizer.kind} tokenizer of {tokenizer.vocab_size:,}",
            "gpt2box eval MODEL --text FILE, and compare bits per byte",
        )
    with closing(TokenFile(dataset.folder / f"{split}.bin")) as file:
        count = min(file.tokens - 1, max_tokens or file.tokens)
        return compute_loss(model, tokenizer, count, file.read, file.counted, stride)


def loss_on_text(model: GPT2, tokenizer: Tokenizer, path: Path, stride: int, max_tokens: int | None) -> Loss:
    """Compute the loss on a text file, as one document; it starts with the end-of-text token if there is one.

    Raises BadInput: the file is not UTF-8, or has characters that the model's vocabulary lacks.
    """
    with open(path, "rb") as file:
        text = "".join(decode_text(file, path))  # like prepare: all line ends become \n, a byte-order mark is dropped
    ids = tokenizer.encode(text)
    if tokenizer.end_of_text is not None:
        ids = np.concatenate([np.array([tokenizer.end_of_text], dtype=np.uint16), ids])
    count = min(len(ids) - 1, max_tokens or len(ids))
    loss = compute_loss(model, tokenizer, count, lambda begin, n: ids[begin : begin + n], lambda begin, n: None, stride)
    return replace(loss, words=len(re.split(r"\s+", text)) if count == len(ids) - 1 else None)


def training_dataset(folder: Path) -> Path:
    """Return the folder of the dataset that a run's checkpoint was trained on.

    Raises BadInput: `folder` is not a checkpoint of a run.
    """
    recorded = read_json_object(folder.resolve().parent.parent / "manifest.json").get("dataset")
    path = recorded.get("folder") if isinstance(recorded, dict) else None
    if not path or not isinstance(path, str):
        raise BadInput(f"what should {folder} be evaluated on?", "a dataset or a text", "--dataset NAME or --text FILE")
    return Path(path) if Path(path).is_dir() else dataset_dir(Path(path).name)  # the volumes may have moved
