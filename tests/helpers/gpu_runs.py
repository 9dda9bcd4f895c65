"""Settings under which a run on a GPU is repeated bit for bit."""

from __future__ import annotations

# GPT-2's vocabulary, of which many tokens come often, and rows long enough for attention's backward pass in several
# blocks: there atomic additions would come in another order each time.
BITS = {
    "dataset": "bpe", "device": "cuda", "dtype": "bfloat16", "n_embd": 256, "n_head": 4, "block_size": 512,
    "micro_batch_size": 8, "tokens_per_step": 2 * 8 * 512, "max_steps": 10, "log_interval": 1, "dropout": 0.1,
    "deterministic": "true",
}  # fmt: skip
