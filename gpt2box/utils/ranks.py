"""Which of a run's processes this is, as torchrun says in the environment. Never imports torch."""

from __future__ import annotations

import os
from dataclasses import dataclass

SAID = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ranks:
    """A rank is a process with a GPU of its own, or a share of a CPU."""

    rank: int
    local: int  # among those of this machine
    count: int
    local_count: int

    @property
    def first(self) -> bool:
        """The one that speaks, writes and decides."""
        return self.rank == 0


ALONE = Ranks(0, 0, 1, 1)


def ranks() -> Ranks:
    """Read each time: a variable alone, which some container hosts set, says nothing."""
    if any(not os.environ.get(name) for name in SAID):
        return ALONE
    return Ranks(*(int(os.environ[name]) for name in SAID[:4]))
