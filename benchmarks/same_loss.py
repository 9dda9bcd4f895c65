"""The same training by nanoGPT's own train.py and by gpt2box: final loss on the same validation windows.

    python benchmarks/same_loss.py --nanogpt ../nanoGPT [--seeds 1 2 3]

tinyshakespeare in characters, nanoGPT's CPU shape (4 layers, 128 wide, block 64), micro-batch 12,
AdamW and schedule equal, no dropout, the same number of tokens. Both write the same dataset bytes; each
draws its batches its own way. Needs that dataset: gpt2box prepare tinyshakespeare --tokenizer char
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
    """Mean cross-entropy over all validation windows, by plain torch."""
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
    """nanoGPT's train.py, with its seed replaced, on a copy of the checkout."""
    copy = work / f"nanogpt-{seed}"
    shutil.copytree(checkout, copy, ignore=shutil.ignore_patterns(".git", "assets"))
    source = (copy / "train.py").read_text().replace("torch.manual_seed(1337", f"torch.manual_seed({seed}")
    (copy / "train.py").write_text(source)
    folder = copy / "data" / "same"
    folder.mkdir()
    for name in ("train.bin", "val.bin"):
        shutil.copy(dataset / name, folder)
    values = SETTINGS | {"max_iters": steps, "lr_decay_iters": steps, "eval_interval": steps, "eval_iters": 1}
    # it has no vocabulary file here and would take GPT-2's 50,304
    source = source.replace("meta_vocab_size = None", "meta_vocab_size = 65", 1)
    (copy / "train.py").write_text(source)
    flags = [f"--{key}={value}" for key, value in values.items()]
    flags += ["--dataset=same", "--out_dir=out", "--always_save_checkpoint=True", "--dtype=float32"]
    subprocess.run([sys.executable, "train.py", *flags], cwd=copy, check=True, stdout=subprocess.DEVNULL)
    saved = torch.load(copy / "out" / "ckpt.pt", weights_only=True)
    sys.path.insert(0, str(checkout))
    import model as theirs

    network = theirs.GPT(theirs.GPTConfig(**saved["model_args"])).eval()
    network.load_state_dict(saved["model"])
    return val_loss(lambda ids: network(ids.contiguous(), ids.contiguous())[0], dataset)


def train_ours(dataset: Path, steps: int, seed: int, work: Path) -> float:
    """gpt2box with the same settings under nanoGPT's names."""
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    arguments = parser.parse_args()
    dataset = dataset_dir("tinyshakespeare-char")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for seed in arguments.seeds:
            theirs = train_nanogpt(arguments.nanogpt.resolve(), dataset, arguments.steps, seed, Path(name))
            mine = train_ours(dataset, arguments.steps, seed, Path(name))
            rows.append((theirs, mine))
            print(f"seed {seed}: nanoGPT {theirs:.4f}, gpt2box {mine:.4f}, ratio {mine / theirs:.4f}", flush=True)
    theirs, mine = (statistics.mean(column) for column in zip(*rows, strict=True))
    print(json.dumps({"nanogpt": round(theirs, 4), "gpt2box": round(mine, 4), "ratio": round(mine / theirs, 4)}))


if __name__ == "__main__":
    main()
