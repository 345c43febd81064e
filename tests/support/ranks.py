"""Processes of one program under gloo, with a limit in seconds: whoever fails or hangs, all stop, and say where."""

import datetime
import faulthandler
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

ROUNDING = 1e-11  # of fp64 sums of fewer than 1000 numbers near 1, with room to spare
START = 120  # seconds in which ranks import what they need, on a busy machine
GRACE = 15  # seconds in which ranks may notice that another has stopped

# A server imports once what all ranks need, and forks: nothing of it has threads. Inductor's pool of compilers would.
_SERVER = torch.multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    ["torch.distributed.tensor", "torch.distributed.fsdp", "torch.distributed.pipelining", "compiled_loss"]
)


def run(body, world, folder, *arguments, limit):
    """What `body(*arguments)` returned on each of `world` ranks; raises, with each rank's last step and stack.

    The limit begins when all ranks have started.
    """
    processes = [
        _SERVER.Process(target=_rank, args=(body, rank, world, str(folder), arguments), daemon=True)
        for rank in range(world)
    ]
    end, started = time.monotonic() + START, False
    try:
        for process in processes:
            process.start()
        while any(process.is_alive() for process in processes) and time.monotonic() < end:
            if not started and all(Path(folder, f"{rank}.where").exists() for rank in range(world)):
                end, started = time.monotonic() + limit, True
            if any(process.exitcode for process in processes):
                end = min(end, time.monotonic() + GRACE)
            time.sleep(0.05)
        hanging = [process for process in processes if process.is_alive()]
        for process in hanging:
            os.kill(process.pid, signal.SIGUSR1)  # writes its stack
        if hanging or any(process.exitcode for process in processes):
            time.sleep(1.0)
            raise AssertionError("\n".join(_told(rank, process, folder) for rank, process in enumerate(processes)))
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)]


def at(where):
    """Remember the step a rank is at."""
    Path(os.environ["RANK_WHERE"]).write_text(where)


def failures_of(*tests):
    """The traceback of each function that fails, by its name."""
    failures = {}
    for test in tests:
        torch.manual_seed(0)
        try:
            test()
        except Exception:
            failures[test.__name__] = traceback.format_exc()
    return failures


def as_torchrun():
    """Set the variables by which frameworks know that processes were launched; the group is there already."""
    size, rank = dist.get_world_size(), dist.get_rank()
    names = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0}
    there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1, "TORCHELASTIC_RUN_ID": "tests"}
    os.environ.update({name: str(value) for name, value in (names | there).items()})


def _rank(body, rank, world, folder, arguments):
    os.environ["RANK_WHERE"] = f"{folder}/{rank}.where"
    at("start")
    torch.set_num_threads(1)
    with Path(folder, f"{rank}.stack").open("w") as stack:
        faulthandler.register(signal.SIGUSR1, stack)
        try:
            store = dist.FileStore(f"{folder}/store", world)
            timeout = datetime.timedelta(seconds=60)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timeout)
            result = body(*arguments)
            dist.barrier()
            torch.save(result, f"{folder}/{rank}.pt")
            dist.destroy_process_group()
        except BaseException:
            traceback.print_exc(file=stack)
            stack.flush()
            os._exit(1)  # the group's threads may wait for ranks that never come
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # torch's own threads abort one exit in ten ("terminate called without an active exception")


def _told(rank, process, folder):
    parts = [Path(folder, f"{rank}.{kind}") for kind in ("where", "stack")]
    where, stack = (part.read_text() if part.exists() else "" for part in parts)
    state = "hung" if process.exitcode is None else f"exited with {process.exitcode}"
    return f"rank {rank} {state} at: {where}\n{stack}"
