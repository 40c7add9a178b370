"""Mean and peak of live bytes of a step under a memory budget, against the whole batch with nothing frozen.

``OMP_NUM_THREADS=1 python experiments/bench/mean_bytes.py [BUDGET]``: real steps of RoBERTa-large's shape with random weights,
32 x 128 tokens. A run's mean lies between those of its stages; that cached activations lower it further is left out.
"""

from __future__ import annotations

import sys

from safe_lab import config as configuration
from safe_lab.byte_size import format_bytes
from safe_lab.plan.stages import plan_stages
from safe_lab.plan.subject import build_subject

TREE = {
    "name": "mean-bytes",
    "model": {"path": "shape://roberta-large", "attention": "eager"},
    "data": {"task": "docstrings", "max_length": 128},
    "adapter": {"method": "lora", "rank": 8, "target_modules": ["query", "value"]},
    "training": {"batch_size": 32},
}


def main(budget: str = "2.4GiB") -> None:
    """Print a line for the whole batch, and one for each stage of the budget."""
    config = configuration.build(TREE | {"memory": {"budget": budget}})
    subject = build_subject(config, fake=False)
    rehearsal = subject.rehearsal
    stages = plan_stages(config, num_units=len(rehearsal.units), num_labels=subject.num_labels)
    whole = rehearsal.trace((), rows=config.training.batch_size)
    print(f"{'depth':>5} {'rows':>4} {'peak':>10} {'of whole':>8} {'mean':>10} {'of whole':>8}")
    for depth, rows in [(0, config.training.batch_size), *((s.frozen_depth, s.micro_batch_rows) for s in stages)]:
        several = rows < config.training.batch_size
        trace = rehearsal.trace(range(depth), rows=rows, accumulating=True) if depth or several else whole
        peak, mean = trace.peak_bytes + subject.kept_bytes, trace.mean_bytes + subject.kept_bytes
        shares = peak / whole.peak_bytes, mean / whole.mean_bytes
        figures = f"{format_bytes(peak):>10} {shares[0]:8.1%} {format_bytes(int(mean)):>10} {shares[1]:8.1%}"
        print(f"{depth:5} {rows:4} {figures}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
