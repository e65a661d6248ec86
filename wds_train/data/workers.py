"""How many loader workers a process has by itself."""

import os

from wds_train.environment import number_of


def default_workers() -> int:
    """A process per core that this one may use, less one for the work itself; cores are shared by the ranks of a machine."""
    ranks = int(number_of("LOCAL_WORLD_SIZE", 1))
    return max(1, min(16, len(os.sched_getaffinity(0)) // ranks - 1))
