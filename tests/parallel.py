"""Real processes for tests: forked from this one, talking through gloo; and whole runs on them."""

import os
import pickle
import socket
import tempfile
import traceback
from datetime import timedelta
from multiprocessing import get_context

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from test_run import config_of

from safe_lab import build as building
from safe_lab import run as runs
from safe_lab.processes import Processes
from safe_lab.run_folder import RunFolder

SECONDS = 120
# What `accelerate launch` with FSDP2 leaves in the environment.
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def in_processes(function, *, count=2, environment=()):
    """What ``function(processes)`` returns on each of ``count`` processes, by rank; what one raises is raised here.

    ``environment`` is what the launcher tells them beside their place.
    """
    context = get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes, started = [], []
        for rank in range(count):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_run, args=(function, rank, count, dict(environment), f"{folder}/store", theirs)
            )
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


def _run(function, rank, count, environment, store, pipe):
    torch.set_num_threads(1)
    # As a launcher sets them; what this process's parent found out about itself is forgotten.
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    os.environ |= environment
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, count),
            rank=rank,
            world_size=count,
            timeout=timedelta(seconds=SECONDS),
        )
        # One that has nothing to ask of the others would else be done, and its connections closed, while they still connect.
        dist.barrier()
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


def train(config, **arguments):
    """What a run comes to, and the weights that trained."""
    built = []
    build = runs.build

    def keeping(*args):
        built.append(build(*args))
        return built[0]

    runs.build = keeping
    try:
        result = runs.run(config, **arguments)
    finally:
        runs.build = build
    trained = {name: p for name, p in built[0].model.named_parameters() if "lora_" in name or "modules_to_save" in name}
    return result, {name: parameter.detach().clone() for name, parameter in trained.items()}


def rows_of(config, file="metrics.jsonl", key="train/loss"):
    return [row for row in RunFolder(config.run_folder).rows(file) if key in row]


def assert_like_one(tree, *, count, environment=(), **sections):
    """Train on one process and on several, and hold them together; returns what the several came to."""
    one = config_of(tree, variant="one", **sections)
    many = config_of(tree, variant="many", **sections)
    alone, weights_alone = train(one)
    results, weights = zip(
        *in_processes(lambda processes: train(many), count=count, environment=environment), strict=True
    )

    assert all(result == results[0] for result in results)
    for others in weights[1:]:
        assert all(torch.equal(others[name], weight) for name, weight in weights[0].items())
    for name, weight in weights_alone.items():
        torch.testing.assert_close(weights[0][name], weight, rtol=0, atol=1e-4)
    losses = [[row["train/loss"] for row in rows_of(config)] for config in (one, many)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    events = [
        [(row["step"], row["scoring"], row["units"]) for row in rows_of(config, "events.jsonl", "units")]
        for config in (one, many)
    ]
    assert events[0] == events[1] != []
    scores = [[row["score"] for row in rows_of(config, "importance.jsonl", "score")] for config in (one, many)]
    if None not in scores[0]:
        assert scores[1] == pytest.approx(scores[0], rel=1e-3, abs=1e-5)
    assert results[0].metrics == pytest.approx(alone.metrics, abs=1e-5)
    assert results[0].tokens == alone.tokens
    assert results[0].frozen_depth == alone.frozen_depth
    return results[0], alone


def run_up_to(step, config):
    """A run that is interrupted once it has saved its checkpoint of a step."""
    save = building.Trainer.save

    def save_and_stop(self):
        save(self)
        if self.progress.step == step:
            raise KeyboardInterrupt

    building.Trainer.save = save_and_stop
    try:
        with pytest.raises(KeyboardInterrupt):
            runs.run(config)
    finally:
        building.Trainer.save = save
