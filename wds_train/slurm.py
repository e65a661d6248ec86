"""The place of this process among the ranks of a training, if Slurm has started it.

`srun` starts a process for each task, and sets variables that give each its place. The shell of
sbatch or salloc has many of the same variables, but is one process: as a rank, it would wait for
the others in vain.
https://slurm.schedmd.com/srun.html#SECTION_OUTPUT-ENVIRONMENT-VARIABLES
"""

import os
import re
import socket
import zlib

from wds_train.environment import number_of
from wds_train.errors import UsageError

# A process of `srun` has one of these, and the shell of sbatch or salloc has none.
LAUNCHED = ("SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NUM_TASKS", "SLURM_LAUNCH_NODE_IPADDR")
# From here on, a step's number means a shell: salloc's, or that of a batch script.
SPECIAL_STEP = 4_000_000_000
# Above those that Linux hands out by itself.
PORTS = range(61_000, 65_500)
# The number of processes that another launcher has started, for MPI.
OTHERS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_SIZE", "MV2_COMM_WORLD_SIZE")
# The nodes of a step, or of its job, in Slurm's short form.
NODE_LISTS = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
# A larger number of nodes in a list would only fill the memory.
MOST_NODES = 1 << 16


def take_place(processes: int | None = None) -> str:
    """Take this process's place among the ranks from Slurm, unless torchrun has given it one.

    The variables that PyTorch reads (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT) are
    set to what Slurm's say. One task, as in the shell of `salloc`, is an ordinary process.

    Args:
        processes: The number that the user wants this one to start; None: the user says nothing.

    Returns:
        A line for the user; "" if nothing was taken, or another rank says it.

    Raises:
        UsageError: There are several tasks, and it is not clear how they belong together.
    """
    # An ordinary process, or one whose place is known.
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        return ""
    tasks = tasks_of_slurm()
    if tasks == 1:
        _refuse_other_launchers()
        return ""

    # Either srun has started the ranks, or this process starts them.
    if not _is_by_srun():
        if processes:
            return ""
        raise UsageError(
            f"SLURM_NTASKS = {tasks}, but srun has not started this process; write `srun wds-train "
            f"train ...` for {tasks} ranks, or give --processes N for N ranks on this node (1 for "
            "a single one)"
        )
    if processes:
        raise UsageError(
            f"--processes {processes} starts processes, but srun has started {tasks} already; "
            "leave it out, or use `srun --ntasks=1`"
        )

    place = _place_by_slurm(tasks)
    os.environ.update(place)
    if place["RANK"] != "0":
        return ""
    return (
        f"slurm    {tasks} tasks of job {os.environ.get('SLURM_JOB_ID', 'unknown')} are the ranks "
        f"of this training; they meet at {place['MASTER_ADDR']}:{place['MASTER_PORT']}"
    )


def tasks_of_slurm() -> int:
    """Return the number of tasks that Slurm has for what runs here; 1 without Slurm."""
    return int(number_of("SLURM_STEP_NUM_TASKS", number_of("SLURM_NTASKS", 1)))


def tasks_by_srun() -> int:
    """Return the number of processes that `srun` has started, with this one; 1 if it did not."""
    if not _is_by_srun():
        return 1
    return tasks_of_slurm()


def tasks_here() -> int:
    """Return the number of processes of this training on this machine, with this one."""
    if "LOCAL_WORLD_SIZE" in os.environ or not _is_by_srun():
        return int(number_of("LOCAL_WORLD_SIZE", 1))
    return _read_tasks_here() or 1


def _is_by_srun() -> bool:
    """Return True if `srun` has started this process.

    If not, Slurm's variables may be an allocation's, for a shell.
    """
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
            f"SLURM_NTASKS = {tasks}, but the environment lacks {' and '.join(missing)}; start "
            "with srun, which sets them, or set WORLD_SIZE=1 for a process of its own"
        )
    rank = int(number_of("SLURM_PROCID", 0))
    local = int(number_of("SLURM_LOCALID", 0))
    if rank >= tasks:
        raise UsageError(
            f"SLURM_PROCID = {rank} cannot work with SLURM_NTASKS = {tasks}; start with srun"
        )
    # With a GPU bound to each task, each sees its own as the only one. The variable is the number,
    # or "KIND:NUMBER".
    if os.environ.get("SLURM_GPUS_PER_TASK", "").rpartition(":")[2] == "1":
        local = 0
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": str(local),
        "MASTER_ADDR": os.environ.get("MASTER_ADDR") or _first_node(tasks),
        "MASTER_PORT": os.environ.get("MASTER_PORT") or str(_port()),
    }


def _first_node(tasks: int) -> str:
    """Return the address of the node that task 0 runs on."""
    if number_of("SLURM_STEP_NUM_NODES", number_of("SLURM_NNODES", 0)) == 1:
        return "127.0.0.1"
    for name in NODE_LISTS:
        node = first_host(os.environ.get(name, ""))
        if node and _resolves(node):
            return node
    # The node of srun itself: the first one in a batch script, but the login node after salloc.
    launcher = os.environ.get("SLURM_LAUNCH_NODE_IPADDR")
    if launcher:
        return launcher
    nodes = os.environ.get("SLURM_JOB_NODELIST")
    raise UsageError(
        f"SLURM_NTASKS = {tasks}, but neither SLURM_JOB_NODELIST = {nodes!r} nor "
        "SLURM_LAUNCH_NODE_IPADDR says where task 0 can be reached; set MASTER_ADDR to the address "
        "of its node"
    )


def first_host(nodes: str) -> str:
    """Return the first name of a list in Slurm's short form.

    It is node007 of "node[007-009,012],gpu1".
    """
    # Up to the first comma outside of brackets; then the first number of each bracket.
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])*", nodes.strip())
    if first is None:
        return ""
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0])


def _resolves(node: str) -> bool:
    try:
        socket.getaddrinfo(node, None)
    except (OSError, UnicodeError):
        return False
    return True


def _port() -> int:
    """Return a port that follows from the job and the step.

    All tasks of a step come to the same one, and other steps and jobs hardly ever.
    """
    job = os.environ.get("SLURM_JOB_ID", "")
    step = os.environ.get("SLURM_STEP_ID", "")
    return PORTS[zlib.crc32(f"{job}.{step}".encode()) % len(PORTS)]


def _read_tasks_here() -> int:
    """Return the number of tasks on this node; 0 if nothing says it."""
    step = os.environ.get("SLURM_STEP_TASKS_PER_NODE")
    listed = step or os.environ.get("SLURM_TASKS_PER_NODE") or ""

    # A list such as "4(x2),1" has a number for each node: 4, 4 and 1.
    counts: list[int] = []
    for part in listed.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if found is None:
            return 0
        counts += [int(found[1])] * min(int(found[2] or 1), MOST_NODES)
    node = os.environ.get("SLURM_NODEID", "0")
    if not node.isdecimal() or int(node) >= len(counts):
        return 0
    return counts[int(node)]


def _refuse_other_launchers() -> None:
    """Raise `UsageError` if mpirun or its like has started several processes.

    Each would train by itself.
    """
    for name in OTHERS:
        size = os.environ.get(name, "")
        if size.isdecimal() and int(size) > 1:
            raise UsageError(
                f"{name} = {size}, but WORLD_SIZE is not set: these processes would not know of "
                "one another; start with torchrun or srun, or set RANK, WORLD_SIZE, LOCAL_RANK, "
                "MASTER_ADDR and MASTER_PORT"
            )
