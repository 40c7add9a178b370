"""What measuring the sharpness of a finished run costs: seconds, products, and bytes beside those of a training step.

python experiments/bench/sharpness.py RUN [THREADS]

RUN is the folder of a finished run. Each ratio is of two figures of this one process.
"""

import sys
import time
from pathlib import Path

import torch

from safe_lab.memory import Ledger
from safe_lab.model import loss_function
from safe_lab.processes import ALONE
from safe_lab.saved import load_run
from safe_lab.sharpness import Budget, Plan, measure
from safe_lab.sharpness.gauge import TRAINING

TARGET_SECONDS = 180


def seconds_of(work, repetitions=3):
    """The shortest of some repetitions, after one that does not count."""
    work()
    times = []
    for _ in range(repetitions):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def peak_bytes(model, optimizer, work, batch=()):
    with Ledger(model, optimizer, cache=[], batch=batch) as ledger:
        work()
    return ledger.trace.peak_bytes


def main():
    path = Path(sys.argv[1])
    torch.set_num_threads(int(sys.argv[2]) if len(sys.argv) > 2 else torch.get_num_threads())
    run = load_run(path, ["validation_samples=0"], torch.device("cpu"), ALONE)
    model, config = run.model, run.config
    print(f"{run.name}, {torch.get_num_threads()} threads, torch {torch.__version__}")

    with run.gauge.surfaces() as surfaces:
        surface = surfaces[TRAINING]
        size = surface.space.num_dimensions
        tokens = sum(batch["input_ids"].numel() for batch in surface.batches)
        print(f"{surface.num_examples} examples, {tokens} tokens with padding, {size} weights")
        vectors = torch.randn(size, 8)
        gradient = seconds_of(surface.gradient)
        alone = seconds_of(lambda: surface.hessian_products(vectors[:, :1]))
        together = seconds_of(lambda: surface.hessian_products(vectors)) / 8
        print(f"gradient {gradient:.2f} s; product alone {alone:.2f} s, {alone / gradient:.2f} gradients")
        print(
            f"product in a block of 8 {together:.2f} s, {together / gradient:.2f} gradients, {together / alone:.2f} of alone"
        )
        plan, before = Plan(measures=["trace", "spectrum", "eigenvalues"]), surface.cost.products
        began = time.perf_counter()
        figures = measure(surface, plan, budget=Budget(surface.cost)).figures
        spent = time.perf_counter() - began
        trace = figures["trace"]
        print(
            f"trace {trace['value']:.4g} +- {trace['standard_error']:.2g} from the density's basis and {trace['products']} "
            f"products more, of {figures['cost']['products'] - before} in all"
        )
        print(f"trace, density and top {len(figures['top_eigenvalues'])}: {spent:.0f} s (target {TARGET_SECONDS})")
        worst = max(r / v for r, v in zip(figures["eigenvalue_residuals"], figures["top_eigenvalues"], strict=True))
        print(
            f"top eigenvalues {[round(v, 4) for v in figures['top_eigenvalues']]}, residuals up to {worst:.1%} of them"
        )
        no_optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        product_bytes = peak_bytes(model, no_optimizer, lambda: surface.hessian_products(vectors))

    # The widest step of the run, as it would be with nothing frozen.
    widest = max((batch for batch in surface.batches), key=lambda batch: batch["input_ids"].shape[1])
    rows = config.training.batch_size
    step_batch = {name: tensor[:1].expand(rows, *tensor.shape[1:]).contiguous() for name, tensor in widest.items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model.train()

    def step():
        loss_function(model, step_batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    step_bytes = peak_bytes(model, optimizer, step, step_batch.values())
    shape = tuple(step_batch["input_ids"].shape)
    print(
        f"peak of a block of products {product_bytes / 2**20:.0f} MiB, of a training step of {shape} "
        f"{step_bytes / 2**20:.0f} MiB: {product_bytes / step_bytes:.2f}"
    )

    with run.gauge.surfaces() as surfaces:
        surface = surfaces[TRAINING]
        for estimator in ("xtrace", "hutchinson"):
            plan = Plan(measures=["trace"], estimator=estimator, budget_products=None)
            began = time.perf_counter()
            budget = Budget(surface.cost, products=400)
            trace = measure(surface, plan, budget=budget).figures["trace"]
            print(
                f"trace alone to 5 % by {estimator}: {trace['value']:.4g} +- {trace['standard_error']:.2g}, "
                f"{trace['products']} products, {time.perf_counter() - began:.0f} s"
            )


if __name__ == "__main__":
    main()
