"""The sample that a run writes after each evaluation."""

from __future__ import annotations

from pathlib import Path

from gpt2box.config.schema import Config
from gpt2box.data.dataset import Dataset
from gpt2box.data.tokenizer import encode_prompt
from gpt2box.model.decoder import Decoder
from gpt2box.model.gpt2 import GPT2
from gpt2box.model.sampling import SamplingParams, generate
from gpt2box.training.console import Display
from gpt2box.utils.files import write_atomically
from gpt2box.utils.paths import ensure_writable


class Sampler:
    """Writes samples/step-N.txt after each evaluation and shows its first lines."""

    def __init__(self, config: Config, model: GPT2, dataset: Dataset, run: Path) -> None:
        self.config, self.model, self.tokenizer, self.run = config, model, dataset.tokenizer, run

    def __call__(self, display: Display, step: int) -> None:
        if not self.config.sample_tokens:
            return
        text = self.config.sample_prompt
        prompt = encode_prompt(self.tokenizer, text)
        ids = list(generate(Decoder(self.model), prompt, self.config.sample_tokens, SamplingParams(), self.config.seed))
        text += self.tokenizer.decode_bytes(ids).decode("utf-8", errors="replace")
        folder = ensure_writable(self.run / "samples")
        write_atomically(folder / f"step-{step:08d}.txt", text + "\n")
        first_or_last = step == 0 or step >= self.config.max_steps
        excerpt = text.strip().splitlines()[: None if first_or_last else 3]
        display.show_sample(excerpt)
