"""Compare the final loss of nanoGPT's own train.py and of gpt2box on the same validation windows.

    python benchmarks/same_loss.py --nanogpt ../nanoGPT [--seeds 1 2 3]

Both train on tinyshakespeare in characters with nanoGPT's CPU model (4 layers, 128 wide, block size 64), micro-batch
size 12, the same AdamW and schedule, no dropout, and the same number of tokens. Dataset bytes are equal; each program
samples batches in its own way. Prepare the dataset first: gpt2box prepare tinyshakespeare --tokenizer char
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import torch

from gpt2box.data.dataloader import read_windows, val_window_starts
from gpt2box.data.dataset import TokenFile, open_dataset
from gpt2box.data.pretrained import load_shape
from gpt2box.model.gpt2 import GPT2
from gpt2box.model.hf_weights import load_hf_weights
from gpt2box.utils.paths import dataset_dir

BLOCK, BATCH = 64, 12
SETTINGS = {
    "n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": BLOCK, "batch_size": BATCH,
    "gradient_accumulation_steps": 1, "dropout": 0.0, "bias": False, "learning_rate": 1e-3, "min_lr": 1e-4,
    "beta2": 0.99, "warmup_iters": 100, "weight_decay": 0.1, "grad_clip": 1.0, "device": "cpu", "compile": False,
    "log_interval": 500,
}  # fmt: skip


def val_loss(logits_of: Callable[[torch.Tensor], torch.Tensor], folder: Path) -> float:
    """Compute the mean cross-entropy over all validation windows, in plain PyTorch."""
    dataset = open_dataset(folder)
    starts = [int(start) for start in val_window_starts(dataset.tokens("val"), BLOCK, 0)]
    total = 0.0
    with closing(TokenFile(folder / "val.bin")) as file, torch.no_grad():
        for begin in range(0, len(starts), 64):
            ids = read_windows(file, starts[begin : begin + 64], BLOCK, 65).long()
            logits = logits_of(ids[:, :-1])[..., :65]
            total += float(
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
            )
    return total / (len(starts) * BLOCK)


def train_nanogpt(checkout: Path, dataset: Path, steps: int, seed: int, work: Path) -> float:
    """Run nanoGPT's train.py on a copy of the checkout with another seed; return its validation loss."""
    copy = work / f"nanogpt-{seed}"
    shutil.copytree(checkout, copy, ignore=shutil.ignore_patterns(".git", "assets"))
    source = (copy / "train.py").read_text().replace("torch.manual_seed(1337", f"torch.manual_seed({seed}")
    (copy / "train.py").write_text(source)
    folder = copy / "data" / "same"
    folder.mkdir()
    for name in ("train.bin", "val.bin"):
        shutil.copy(dataset / name, folder)
    values = SETTINGS | {"max_iters": steps, "lr_decay_iters": steps, "eval_interval": steps, "eval_iters": 1}
    # without a meta.pkl nanoGPT would assume GPT-2's 50,304 tokens
    source = source.replace("meta_vocab_size = None", "meta_vocab_size = 65", 1)
    (copy / "train.py").write_text(source)
    flags = [f"--{key}={value}" for key, value in values.items()]
    flags += ["--dataset=same", "--out_dir=out", "--always_save_checkpoint=True", "--dtype=float32"]
    subprocess.run([sys.executable, "train.py", *flags], cwd=copy, check=True, stdout=subprocess.DEVNULL)
    saved = torch.load(copy / "out" / "ckpt.pt", weights_only=True)
    sys.path.insert(0, str(checkout))
    import model as nanogpt_model

    network = nanogpt_model.GPT(nanogpt_model.GPTConfig(**saved["model_args"])).eval()
    network.load_state_dict(saved["model"])
    return val_loss(lambda ids: network(ids.contiguous(), ids.contiguous())[0], dataset)


def train_gpt2box(dataset: Path, steps: int, seed: int, work: Path) -> float:
    """Run gpt2box with the same settings under nanoGPT's names; return its validation loss."""
    values = SETTINGS | {"max_iters": steps, "lr_decay_iters": steps, "eval_interval": steps, "eval_iters": 1}
    flags = [f"--{key}={value}" for key, value in values.items()]
    flags += [f"--data_dir={dataset.resolve()}", f"--name=seed-{seed}", f"--seed={seed}"]
    command = [sys.executable, "-m", "gpt2box", "train", *flags]
    environment = {"GPT2BOX_VOLUMES": str(work / "volumes")}
    subprocess.run(command, check=True, env=os.environ | environment, stderr=subprocess.DEVNULL)
    folder = work / "volumes" / "runs" / f"seed-{seed}" / "checkpoints" / "last"
    network = GPT2(load_shape(folder)).eval()
    load_hf_weights(network, folder)
    return val_loss(lambda ids: network.logits(network.hidden_states(ids)), dataset)


def main() -> None:
    """Train with both programs at each seed and print the losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    arguments = parser.parse_args()
    dataset = dataset_dir("tinyshakespeare-char")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for seed in arguments.seeds:
            nanogpt = train_nanogpt(arguments.nanogpt.resolve(), dataset, arguments.steps, seed, Path(name))
            gpt2box = train_gpt2box(dataset, arguments.steps, seed, Path(name))
            rows.append((nanogpt, gpt2box))
            print(
                f"seed {seed}: nanoGPT {nanogpt:.4f}, gpt2box {gpt2box:.4f}, ratio {gpt2box / nanogpt:.4f}", flush=True
            )
    nanogpt, gpt2box = (statistics.mean(column) for column in zip(*rows, strict=True))
    figures = {"nanogpt": nanogpt, "gpt2box": gpt2box, "ratio": gpt2box / nanogpt}
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
