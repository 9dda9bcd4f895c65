"""Tokenize a corpus of any size with Hugging Face's datatrove, on one machine, Slurm or Ray.

    pip install "datatrove[processing]" tokenizers
    gpt2box prepare tinyshakespeare                    # writes the tokenizer folder
    python examples/datatrove_prepare.py CORPUS volumes/data/tinyshakespeare/tokenizer volumes/data/web --val-files 1

CORPUS is a folder of Parquet files. Each task tokenizes one file, so the order of tokens does not depend on scheduling,
and the tokens equal those of `gpt2box prepare`. The last `--val-files` files form the validation split. On a cluster,
replace LocalPipelineExecutor with datatrove's SlurmPipelineExecutor or RayPipelineExecutor; the steps stay the same.
Train with `gpt2box train CONFIG --dataset volumes/data/web`.
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
parser.add_argument("tokenizer", type=Path, help="folder with vocab.json and merges.txt")
parser.add_argument("output", type=Path, help="folder to create")
parser.add_argument("--val-files", type=int, default=1)
parser.add_argument("--workers", type=int, default=2)


def main() -> None:
    """Tokenize every file separately, then concatenate the results."""
    arguments = parser.parse_args()
    files = sorted(arguments.corpus.glob("*.parquet"))
    if not 0 < arguments.val_files < len(files):
        parser.error(f"{len(files)} Parquet files in {arguments.corpus}: hold out fewer, or make smaller files")
    arguments.output.mkdir(parents=True)
    parts, tokenizer = arguments.output / "parts", arguments.output / "tokenizer.json"
    # Do not declare <|endoftext|> special: where a text contains these characters, they are ordinary text.
    bpe = ByteLevelBPETokenizer(str(arguments.tokenizer / "vocab.json"), str(arguments.tokenizer / "merges.txt"))
    bpe.save(str(tokenizer))
    LocalPipelineExecutor(
        pipeline=[
            ParquetReader(str(arguments.corpus), glob_pattern="*.parquet", text_key="text"),
            DocumentTokenizer(
                str(parts),
                tokenizer_name_or_path=str(tokenizer),
                eos_token="<|endoftext|>",
                shuffle_documents=False,
            ),
        ],
        tasks=len(files),
        workers=arguments.workers,
        logging_dir=str(arguments.output / "logs"),
    ).run()
    shards = sorted(parts.glob("*.ds"))
    for split, members in (("train", shards[: -arguments.val_files]), ("val", shards[-arguments.val_files :])):
        with open(arguments.output / f"{split}.bin", "wb") as file:
            for member in members:
                with open(member, "rb") as part:
                    shutil.copyfileobj(part, file)
    shutil.rmtree(parts)


if __name__ == "__main__":
    main()
