"""Models and texts to export."""

from __future__ import annotations

from pathlib import Path

import torch

from gpt2box.data.tokenizer import Tokenizer
from gpt2box.model.gpt2 import GPT2
from gpt2box.model.shape import ModelShape
from tests.helpers.models import write_checkpoint

TEXTS = [
    "To be, or not to be: that is the question.",
    "  naïve 漢字 🙂\n\n\t1984's <|x|>",
    "def f(x):\n    return x  # …",
]


def save_random_model(folder: Path, tokenizer: Tokenizer, bias: bool = True) -> tuple[GPT2, Path]:
    """Write a checkpoint of a random model whose logits have clear maxima; return the model and the folder."""
    torch.manual_seed(1)
    model = GPT2(ModelShape(n_layer=2, n_head=2, n_embd=64, block_size=48, vocab_size=tokenizer.vocab_size, bias=bias))
    model.init_weights(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8) if parameter.dim() > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
        model.wte.weight[tokenizer.vocab_size :] = 0
    folder.mkdir()
    write_checkpoint(folder, model, tokenizer)
    return model.eval(), folder
