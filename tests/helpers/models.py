"""Small models and their checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch

from gpt2box.checkpoint.metadata import TrainState
from gpt2box.checkpoint.writer import checkpoint_config, checkpoint_tensors, save_checkpoint, write_checkpoint_files
from gpt2box.data.tokenizer import CharTokenizer, Tokenizer
from gpt2box.model.gpt2 import GPT2
from gpt2box.model.shape import ModelShape


def tiny_model(
    bias: bool = True, vocab_size: int = 101, dropout: float = 0.0, dtype: torch.dtype = torch.float32
) -> GPT2:
    """Create a random model whose vocabulary needs padding and whose parameters are not zero."""
    model = GPT2(ModelShape(n_layer=3, n_head=4, n_embd=32, block_size=24, vocab_size=vocab_size, bias=bias), dropout)
    model.init_weights(seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.empty_like(parameter).normal_(0, 0.1, generator=generator))
            else:
                parameter.mul_(5)
    return model.to(dtype)


def write_checkpoint(folder: Path, model: GPT2, words: Tokenizer) -> None:
    """Write a checkpoint of step 0 into a folder."""
    state = TrainState()
    files = checkpoint_tensors(model, torch.optim.AdamW(model.parameters()), state)
    write_checkpoint_files(folder, files, checkpoint_config(model, words), state, words)


VOCABULARY = CharTokenizer("".join(chr(33 + i) for i in range(100)), end_of_text=True)  # 101 tokens


def saved(model: GPT2, folder: Path) -> Path:
    """Save a checkpoint as training does."""
    optimizer = torch.optim.AdamW(model.parameters())
    return save_checkpoint(folder, model, optimizer, TrainState(), VOCABULARY)
