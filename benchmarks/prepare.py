"""`prepare` beside nanoGPT's data/openwebtext/prepare.py on the same Parquet files: time, disk, memory, and the bytes.

    git clone https://github.com/karpathy/nanoGPT /tmp/nanoGPT
    python -m venv /tmp/nv && /tmp/nv/bin/pip install datasets tiktoken tqdm numpy
    python benchmarks/prepare.py /tmp/nanoGPT /tmp/nv/bin/python --texts /usr/lib/python3 .venv

The corpus is made of the .py, .md, .txt, .rst and .h files in the folders given, in the Hub's layout of OpenWebText.
Each in turn, `--rounds` times; medians. Memory is private (USS), of all processes together and of the largest. For
"tiktoken alone" a module in gigatoken's place refuses to be imported.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet

SUFFIXES = (".py", ".md", ".txt", ".rst", ".h")
NANOGPT = """
import sys, glob, datasets, tiktoken, tiktoken.load, tiktoken_ext.openai_public as public
tiktoken.load.data_gym_to_mergeable_bpe_ranks = lambda *a, **k: tiktoken.load.load_tiktoken_bpe(sys.argv[4])
public.data_gym_to_mergeable_bpe_ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks
tiktoken.get_encoding("gpt2")
real, files = datasets.load_dataset, sorted(glob.glob(sys.argv[1]))
datasets.load_dataset = lambda name, num_proc: real("parquet", data_files=files, num_proc=num_proc)
source = open(sys.argv[2]).read().replace("num_proc = 8", "num_proc = " + sys.argv[3])
sys.argv = [sys.argv[2]]
exec(compile(source, sys.argv[0], "exec"), {"__name__": "__main__", "__file__": sys.argv[0]})
"""
ENCODE_ONLY = """
import sys, time, glob, collections, multiprocessing, pyarrow.parquet
from pathlib import Path
from gpt2box.data.bulk_tokenizer import BulkEncoder
def work(share):
    encoder = BulkEncoder(Path(sys.argv[2]))
    texts = [t for f in share for t in pyarrow.parquet.read_table(f).column("text").to_pylist()]
    begin = time.perf_counter()
    for text in texts:
        collections.deque(encoder.encode((text,)), maxlen=0)
    return time.perf_counter() - begin
if __name__ == "__main__":
    files, workers = sorted(glob.glob(sys.argv[1])), int(sys.argv[3])
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        print(max(pool.map(work, [files[i::workers] for i in range(workers)])))
"""


@dataclass
class Measured:
    """The resources that a command used."""

    seconds: float
    disk: int = 0  # bytes, peak
    private: int = 0  # bytes of all its processes, peak
    largest: int = 0  # of one process


def make_corpus(roots: list[Path], folder: Path, megabytes: int, files: int) -> tuple[int, int]:
    """Distinct texts in Parquet files; returns documents and bytes of text."""
    seen: dict[str, None] = {}
    total = 0
    paths = [p for root in roots for p in root.rglob("*") if p.suffix in SUFFIXES and p.is_file()]
    for path in random.Random(0).sample(sorted(paths), len(paths)):
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if text.strip() and text not in seen:
            seen[text] = None
            total += len(text.encode())
        if total > megabytes * 1e6:
            break
    texts = list(seen)
    for index in range(files):
        table = pyarrow.table({"text": texts[index * len(texts) // files : (index + 1) * len(texts) // files]})
        pyarrow.parquet.write_table(table, folder / f"train-{index:05d}-of-{files:05d}.parquet", row_group_size=1000)
    return len(texts), total


def tree(pid: int) -> list[int]:
    """A process and those it started."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(p for child in children for p in tree(int(child)))]


def private_bytes(pid: int) -> int:
    """Memory that is a process's own."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


def size_of(folder: Path) -> int:
    """Bytes of the files in it that are there."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_blocks * 512
            except OSError:
                continue
    return total


def measure(command: list[str], folder: Path, environment: dict[str, str]) -> tuple[Measured, str]:
    """Run a command that writes to `folder`."""
    begin = time.perf_counter()
    found = Measured(0)
    with open(folder / "log", "w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | environment, cwd=folder)
        while process.poll() is None:
            each = [private_bytes(pid) for pid in tree(process.pid)]
            found.private, found.largest = max(found.private, sum(each)), max(found.largest, *each, 0)
            found.disk = max(found.disk, size_of(folder))
            time.sleep(0.2)
        found.seconds = time.perf_counter() - begin
        log.seek(0)
        return found, log.read()


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nanogpt", type=Path)
    parser.add_argument("python", help="a Python with datasets and tiktoken")
    parser.add_argument("--texts", type=Path, nargs="+", required=True)
    parser.add_argument("--ranks", type=Path, default=Path("volumes/data/raw/r50k_base.tiktoken"))
    parser.add_argument("--megabytes", type=int, default=250)
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="prepare-"))
    corpus = work / "corpus"
    corpus.mkdir()
    documents, total = make_corpus(chosen.texts, corpus, chosen.megabytes, chosen.files)
    print(f"{documents:,} documents, {total / 1e6:.0f} MB of text, {chosen.files} files, {chosen.workers} workers")
    refuse = work / "without" / "gigatoken"
    refuse.mkdir(parents=True)
    (refuse / "__init__.py").write_text("raise ImportError('left out')\n")
    found: dict[str, list[Measured]] = {}
    for _ in range(chosen.rounds):
        for way in ("nanoGPT", "gpt2box", "gpt2box, tiktoken alone", "encoding alone"):
            folder = work / way.replace(" ", "-")
            shutil.rmtree(folder, ignore_errors=True)
            (folder / "volumes/data/raw").mkdir(parents=True)
            shutil.copy(chosen.ranks, folder / "volumes/data/raw")
            pattern = str(corpus / "*.parquet")
            environment = {"GPT2BOX_VOLUMES": str(folder / "volumes"), "HF_HOME": str(folder / "cache")}
            if way == "nanoGPT":
                shutil.copy(chosen.nanogpt / "data/openwebtext/prepare.py", folder)
                script = [chosen.python, "-c", NANOGPT, pattern, str(folder / "prepare.py"), str(chosen.workers)]
                script.append(str(chosen.ranks.absolute()))
            elif way == "encoding alone":
                (folder / "encode.py").write_text(ENCODE_ONLY)
                script = [sys.executable, "encode.py", pattern, str(chosen.ranks.absolute()), str(chosen.workers)]
            else:
                script = [sys.executable, "-m", "gpt2box", "prepare", "openwebtext", "--from", str(corpus), "--split"]
                script += ["nanogpt", "--workers", str(chosen.workers)]
                environment |= {"PYTHONPATH": str(work / "without")} if "tiktoken" in way else {}
            took, log = measure(script, folder, environment)
            if way == "encoding alone":
                took = Measured(float(log.split()[-1]))
            found.setdefault(way, []).append(took)
    for split in ("train.bin", "val.bin"):
        outputs = [work / "nanoGPT" / split, *(work / w / "volumes/data/openwebtext" / split for w in ("gpt2box",))]
        same = outputs[0].read_bytes() == outputs[1].read_bytes()
        print(f"{split}: {'the same bytes' if same else 'DIFFERENT'}, {outputs[0].stat().st_size // 2:,} tokens")
    base = found["nanoGPT"]
    for way, rows in found.items():
        seconds = statistics.median(r.seconds for r in rows)
        ratio = statistics.median(r.seconds / b.seconds for r, b in zip(rows, base, strict=True))
        disk, private, largest = (max(getattr(r, key) for r in rows) / 1e6 for key in ("disk", "private", "largest"))
        print(
            f"| {way} | {seconds:.1f} s | {ratio:.3f} | {total / seconds / 1e6:.1f} MB/s | {disk:.0f} MB"
            f" | {private:.0f} MB | {largest:.0f} MB |"
        )
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
