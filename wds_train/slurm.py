"""The place of this process among the ranks of a training, where Slurm has started it.

`srun` starts a process for each task and tells each its place by names of its own. The shell of sbatch or salloc has
many of the same variables, but is one process, which the others would be waited for in vain.
https://slurm.schedmd.com/srun.html#SECTION_OUTPUT-ENVIRONMENT-VARIABLES
"""

import os
import re
import socket
import zlib

from wds_train.environment import number_of
from wds_train.errors import UsageError

LAUNCHED = ("SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NUM_TASKS", "SLURM_LAUNCH_NODE_IPADDR")
"""What a process of `srun` has, and the shell of sbatch or salloc has not."""
SPECIAL_STEP = 4_000_000_000
"""From here on, a step's number means a shell: salloc's, or that of a batch script."""
PORTS = range(61_000, 65_500)
"""Above those that Linux hands out by itself."""
OTHERS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_SIZE", "MV2_COMM_WORLD_SIZE")
"""How many processes another launcher has started, for MPI."""


def take_place(processes: int | None = None) -> str:
    """Take this process's place among the ranks from Slurm, where torchrun has said nothing.

    The variables that PyTorch reads (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT) are set to what
    Slurm's say. One task, as in the shell of `salloc`, is an ordinary process.

    Args:
        processes: How many the user wants this one to start, if that is said.

    Returns:
        A line for the user; "" where nothing was taken, or another rank says it.

    Raises:
        UsageError: There are several tasks, and what they are to one another cannot be told.
    """
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        return ""
    tasks = tasks_of_slurm()
    if tasks == 1:
        _refuse_other_launchers()
        return ""
    if not _by_srun():
        if processes:
            return ""
        raise UsageError(
            f"SLURM_NTASKS = {tasks}, but srun has not started this process; write `srun wds-train train ...` for "
            f"{tasks} ranks, or give --processes N for N ranks on this node (1 for a single one)"
        )
    if processes:
        raise UsageError(
            f"--processes {processes} starts processes, but srun has started {tasks} already; leave it out, or use "
            "`srun --ntasks=1`"
        )
    place = _place_by_slurm(tasks)
    os.environ.update(place)
    if place["RANK"] != "0":
        return ""
    return (
        f"slurm    {tasks} tasks of job {os.environ.get('SLURM_JOB_ID', 'unknown')} are the ranks of this training; "
        f"they meet at {place['MASTER_ADDR']}:{place['MASTER_PORT']}"
    )


def tasks_of_slurm() -> int:
    """Return how many tasks Slurm has for what runs here; 1 without Slurm."""
    return int(number_of("SLURM_STEP_NUM_TASKS", number_of("SLURM_NTASKS", 1)))


def tasks_by_srun() -> int:
    """Return how many processes `srun` has started beside this one, itself included; 1 elsewhere."""
    return tasks_of_slurm() if _by_srun() else 1


def tasks_here() -> int:
    """Return how many processes of this training share this machine, this one among them."""
    if "LOCAL_WORLD_SIZE" in os.environ or not _by_srun():
        return int(number_of("LOCAL_WORLD_SIZE", 1))
    return _listed_here() or 1


def _by_srun() -> bool:
    """Whether `srun` has started this process; elsewhere Slurm's variables may be an allocation's, for a shell."""
    if number_of("SLURM_PROCID", 0) > 0:
        return True
    step = os.environ.get("SLURM_STEP_ID", os.environ.get("SLURM_STEPID", ""))
    if step.isdecimal() and int(step) >= SPECIAL_STEP:
        return False
    return any(name in os.environ for name in LAUNCHED)


def _place_by_slurm(tasks: int) -> dict[str, str]:
    """Return the variables of PyTorch for one of several `tasks` of srun."""
    missing = [name for name in ("SLURM_PROCID", "SLURM_LOCALID") if name not in os.environ]
    if missing:
        raise UsageError(
            f"SLURM_NTASKS = {tasks}, but the environment lacks {' and '.join(missing)}; start with srun, which sets "
            "them, or set WORLD_SIZE=1 for a process of its own"
        )
    rank, local = int(number_of("SLURM_PROCID", 0)), int(number_of("SLURM_LOCALID", 0))
    if rank >= tasks:
        raise UsageError(
            f"SLURM_PROCID = {rank} cannot work with SLURM_NTASKS = {tasks}; start with srun"
        )
    # With a GPU bound to each task, each sees its own as the only one.
    own_gpu = os.environ.get("SLURM_GPUS_PER_TASK", "").rpartition(":")[2] == "1"
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": "0" if own_gpu else str(local),
        "MASTER_ADDR": os.environ.get("MASTER_ADDR") or _first_node(tasks),
        "MASTER_PORT": os.environ.get("MASTER_PORT") or str(_port()),
    }


def _first_node(tasks: int) -> str:
    """Return the address of the node that task 0 runs on."""
    if number_of("SLURM_STEP_NUM_NODES", number_of("SLURM_NNODES", 0)) == 1:
        return "127.0.0.1"
    for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"):
        node = first_host(os.environ.get(name, ""))
        if node and _resolves(node):
            return node
    # The node of srun itself: the first one in a batch script, but the login node after salloc.
    if launcher := os.environ.get("SLURM_LAUNCH_NODE_IPADDR"):
        return launcher
    raise UsageError(
        f"SLURM_NTASKS = {tasks}, but neither SLURM_JOB_NODELIST = {os.environ.get('SLURM_JOB_NODELIST')!r} nor "
        "SLURM_LAUNCH_NODE_IPADDR says where task 0 can be reached; set MASTER_ADDR to the address of its node"
    )


def first_host(nodes: str) -> str:
    """Return the first name of a list in Slurm's short form: node007 of "node[007-009,012],gpu1"."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])*", nodes.strip())
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0]) if first else ""


def _resolves(node: str) -> bool:
    try:
        socket.getaddrinfo(node, None)
    except (OSError, UnicodeError):
        return False
    return True


def _port() -> int:
    """Return a port that all tasks of a step come to by themselves, and other steps and jobs hardly."""
    job, step = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_STEP_ID", "")
    return PORTS[zlib.crc32(f"{job}.{step}".encode()) % len(PORTS)]


def _listed_here() -> int:
    """Return the number of tasks on this node, from a list such as "4(x2),1"; 0 where nothing says it."""
    listed = (
        os.environ.get("SLURM_STEP_TASKS_PER_NODE") or os.environ.get("SLURM_TASKS_PER_NODE") or ""
    )
    counts: list[int] = []
    for part in listed.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if found is None:
            return 0
        counts += [int(found[1])] * min(int(found[2] or 1), 1 << 16)
    node = os.environ.get("SLURM_NODEID", "0")
    if not node.isdecimal() or int(node) >= len(counts):
        return 0
    return counts[int(node)]


def _refuse_other_launchers() -> None:
    """Raise `UsageError` where mpirun or its like has started several processes: each would train by itself."""
    for name in OTHERS:
        size = os.environ.get(name, "")
        if size.isdecimal() and int(size) > 1:
            raise UsageError(
                f"{name} = {size}, but WORLD_SIZE is not set: these processes would not know of one another; start with "
                "torchrun or srun, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT"
            )
