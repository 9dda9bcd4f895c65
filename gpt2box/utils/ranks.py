"""Read this process's rank and the world size from torchrun's environment variables. Never imports torch."""

import os
from dataclasses import dataclass

TORCHRUN_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class RankInfo:
    """The position of this process among those of the run. A rank has its own GPU, or shares a CPU."""

    rank: int
    local_rank: int  # among the ranks of this machine
    world_size: int
    local_world_size: int

    @property
    def is_rank_0(self) -> bool:
        """Tell if this rank logs, writes files and decides."""
        return self.rank == 0


SINGLE_PROCESS = RankInfo(0, 0, 1, 1)


def rank_info() -> RankInfo:
    """Read the environment on each call. All variables must be set, because some container hosts set one of them."""
    if any(not os.environ.get(name) for name in TORCHRUN_VARIABLES):
        return SINGLE_PROCESS
    return RankInfo(*(int(os.environ[name]) for name in TORCHRUN_VARIABLES[:4]))
