"""Two CPU processes beside one, one thread each: tokens a second, bytes, and what wrapping a model anew costs against a step.

``python experiments/bench/processes.py [REPETITIONS]``: the quickstart without freezing, two epochs, on one process, on two with
a copy of the model each, and on two with the base weights spread over them (FSDP2), in turn; then steps of MiniLM, 32 x 64 random
tokens, half of them with half of the adapters frozen. Needs two cores that do nothing else.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from safe_lab import config as configuration
from safe_lab.model import loss_function
from safe_lab.plan.subject import build_subject
from safe_lab.processes import Processes
from safe_lab.replicas import Replicas

RUN = Path(__file__).parents[1] / "quickstart.yaml"
CHANGES = ("training.epochs=2", "freezing.policy=none", "training.save_every=never", "tracking.wandb=disabled")
TOKENS = 64


def launch(count: int, *words: str, **environment: str) -> str:
    """Run a Python command line on so many processes; returns what it prints."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"} | environment
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}")
    return subprocess.run([*torchrun, *words], env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def measure_run(count: int, **environment: str) -> dict[str, float]:
    """Figures of a whole run."""
    with tempfile.TemporaryDirectory() as folder:
        launch(count, "-m", "safe_lab", "train", str(RUN), *CHANGES, f"output_dir={folder}", "--quiet", **environment)
        (file,) = Path(folder).rglob("result.json")
        resources = json.loads(file.read_text())["resources"]
    return {
        "tokens_per_second": resources["tokens_per_second"],
        "parameters": resources["memory_mean_by_kind"]["parameters"],
        "peak": resources["memory_peak_bytes"],
    }


def measure_wrapping() -> None:
    """On each of the processes: seconds of a step, of wrapping anew after a freeze event, and bytes sent; process 0 prints."""
    dist.init_process_group("gloo")
    processes = Processes.of_job(torch.device("cpu"))
    config = configuration.load(RUN)
    rehearsal = build_subject(config, fake=False).rehearsal
    model, optimizer = rehearsal.model, torch.optim.AdamW(rehearsal.model.parameters())
    replicas = Replicas(model, processes)
    rows = config.training.batch_size // processes.count
    batch = {"input_ids": torch.randint(4, 1000, (rows, TOKENS)), "labels": torch.zeros(rows, dtype=torch.long)}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])

    def step() -> float:
        began = time.perf_counter()
        loss_function(replicas.model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        replicas.end_step()
        return time.perf_counter() - began

    steps = [step() for _ in range(8)][2:]
    for unit in rehearsal.units[: len(rehearsal.units) // 2]:
        for parameter in unit.parameters.values():
            parameter.requires_grad, parameter.grad = False, None
    processes.wait()
    began = time.perf_counter()
    replicas.wrap()
    wrapping = time.perf_counter() - began
    # The first step after it sets up the buckets anew.
    after = [step() for _ in range(8)]
    traffic = replicas.traffic
    if processes.is_main:
        print(
            f"step {statistics.median(steps):.3f} s; wrapping anew {wrapping * 1000:.1f} ms, "
            f"the step after it {after[0]:.3f} s, later ones {statistics.median(after[2:]):.3f} s; "
            f"gradients {traffic.first_step_bytes} bytes a step, then {traffic.last_step_bytes}"
        )
    dist.destroy_process_group()


def main(repetitions: str = "2") -> None:
    """Print the figures."""
    ways = {"two with copies": {}, "two with FSDP2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}}
    ratios: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(int(repetitions)):
        one = measure_run(1)
        for way, environment in ways.items():
            two = measure_run(2, **environment)
            ratios[way].append({name: two[name] / one[name] for name in two})
            print(f"{way} / one process: {ratios[way][-1]}", flush=True)
    for way, found in ratios.items():
        print(f"{way}, median: { {name: round(statistics.median(r[name] for r in found), 3) for name in found[0]} }")
    print(launch(2, __file__, "wrapping"), end="")


if __name__ == "__main__":
    measure_wrapping() if sys.argv[1:] == ["wrapping"] else main(*sys.argv[1:])
