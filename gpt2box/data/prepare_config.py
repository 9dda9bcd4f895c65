"""Define the choices of a prepare job, from the command line to the writer."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from gpt2box.data import tokenizer

load_cached_tokenizer = cache(tokenizer.load_tokenizer)


@dataclass(frozen=True)
class PrepareConfig:
    """Choices of a prepare job besides its inputs."""

    tokenizer: str = "gpt2"  # or char, a tokenizer's folder, or OWNER/NAME on the Hub
    val_fraction: float | None = None  # None: the default for this kind of input
    text_column: str = ""
    prompt_column: str = ""
    response_column: str = ""
    split: str = "content"  # or nanogpt
    max_docs: int | None = None
    shards: tuple[int, int] | None = None  # range of a corpus's files: the first, and one past the last
    folder: Path | None = None  # local folder with OpenWebText's files
    keep_raw: bool = False
    keep_duplicates: bool = False
    workers: int = 0  # processes; 0: default_worker_count(). Does not change the bytes
    hub_config: str = ""
    hub_split: str = ""

    @property
    def is_character_level(self) -> bool:
        """Return True if a token is a character; such a text is prepared in memory."""
        if self.tokenizer in ("gpt2", "char"):
            return self.tokenizer == "char"
        return load_cached_tokenizer(Path(self.tokenizer)).kind == "char"
