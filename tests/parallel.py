"""Real processes for tests: forked from this one, talking through gloo."""

import os
import pickle
import socket
import tempfile
import traceback
from datetime import timedelta
from multiprocessing import get_context

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState

from safe_lab.processes import Processes

SECONDS = 120


def in_processes(function, *, count=2):
    """What ``function(processes)`` returns on each of ``count`` processes, by rank; what one raises is raised here."""
    context = get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes, started = [], []
        for rank in range(count):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_run, args=(function, rank, count, f"{folder}/store", theirs))
            process.start()
            theirs.close()
            pipes.append(ours)
            started.append(process)
        try:
            results = [_receive(pipe, rank) for rank, pipe in enumerate(pipes)]
        finally:
            for process in started:
                process.join(5)
                process.kill()
    for error, _ in results:
        if error is not None:
            raise AssertionError(error)
    return [value for _, value in results]


def _receive(pipe, rank):
    if not pipe.poll(SECONDS):
        return f"process {rank} did not answer within {SECONDS} s", None
    try:
        return pickle.loads(pipe.recv_bytes())
    except EOFError:
        return f"process {rank} died", None


def _run(function, rank, count, store, pipe):
    torch.set_num_threads(1)
    # As a launcher sets them; what this process's parent found out about itself is forgotten.
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, count),
            rank=rank,
            world_size=count,
            timeout=timedelta(seconds=SECONDS),
        )
        answer = None, function(Processes.of_job(torch.device("cpu")))
    except BaseException:  # noqa: BLE001 - told to the test
        answer = f"process {rank}: {traceback.format_exc()}", None
    try:
        # By value: the pipe's own way with tensors shares memory with a process that is about to end.
        pipe.send_bytes(pickle.dumps(answer))
    finally:
        # Not through the exit of pytest's own process, whose fixtures are not this one's to end.
        os._exit(0)


def free_port():
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
