"""Tokenise a corpus of any size with Hugging Face's datatrove, on one machine, Slurm or Ray.

    pip install "datatrove[processing]" tokenizers
    gpt2box prepare tinyshakespeare                    # for its tokenizer folder
    python examples/datatrove_prepare.py CORPUS volumes/data/tinyshakespeare/tokenizer volumes/data/web --val-files 1

CORPUS holds Parquet files; a task takes a file, so the tokens, which are gpt2box's own, come out in the files' order
whatever runs beside what. The last `--val-files` are held out. For a cluster, put datatrove's SlurmPipelineExecutor or
RayPipelineExecutor in the LocalPipelineExecutor's place; the steps stay. `gpt2box train CONFIG --dataset
volumes/data/web` reads the result.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import ParquetReader
from datatrove.pipeline.tokens import DocumentTokenizer
from tokenizers import ByteLevelBPETokenizer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("corpus", type=Path)
parser.add_argument("tokenizer", type=Path, help="a folder with vocab.json and merges.txt")
parser.add_argument("output", type=Path, help="a folder that is not there yet")
parser.add_argument("--val-files", type=int, default=1)
parser.add_argument("--workers", type=int, default=2)


def main() -> None:
    """Tokenise every file by itself, then append them to each other."""
    chosen = parser.parse_args()
    files = sorted(chosen.corpus.glob("*.parquet"))
    if not 0 < chosen.val_files < len(files):
        parser.error(f"{len(files)} Parquet files in {chosen.corpus}: hold out fewer, or make smaller files")
    chosen.output.mkdir(parents=True)
    parts, tokenizer = chosen.output / "parts", chosen.output / "tokenizer.json"
    # Not declared special, so that the name of the end-of-text token inside a text is ordinary text.
    words = ByteLevelBPETokenizer(str(chosen.tokenizer / "vocab.json"), str(chosen.tokenizer / "merges.txt"))
    words.save(str(tokenizer))
    LocalPipelineExecutor(
        pipeline=[
            ParquetReader(str(chosen.corpus), glob_pattern="*.parquet", text_key="text"),
            DocumentTokenizer(
                str(parts),
                tokenizer_name_or_path=str(tokenizer),
                eos_token="<|endoftext|>",
                shuffle_documents=False,
            ),
        ],
        tasks=len(files),
        workers=chosen.workers,
        logging_dir=str(chosen.output / "logs"),
    ).run()
    done = sorted(parts.glob("*.ds"))
    for split, members in (("train", done[: -chosen.val_files]), ("val", done[-chosen.val_files :])):
        with open(chosen.output / f"{split}.bin", "wb") as file:
            for member in members:
                with open(member, "rb") as part:
                    shutil.copyfileobj(part, file)
    shutil.rmtree(parts)


if __name__ == "__main__":
    main()
