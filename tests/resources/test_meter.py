"""The meter samples, and what it says of a whole run is what tracing every step says."""

import itertools

import pytest
import torch
from tiny import FAMILIES, tiny_batch, tiny_model

from safe_lab.adapters import attach, build_peft_config, find_units
from safe_lab.memory import KINDS
from safe_lab.resources import Clock, EnergyMeter, Meter

CPU = torch.device("cpu")


class Training:
    """A bare loop over batches of given shapes, metered."""

    def __init__(self, *, accumulation=1, every_step=False):
        self.model = tiny_model(num_hidden_layers=4)
        config = build_peft_config("lora", rank=4, target_modules=FAMILIES["bert"][2], head_modules=["classifier"])
        self.model = attach(self.model, config).model.train()
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad])
        self.units = find_units(self.model, lambda: self.model(**tiny_batch()))
        self.meter = Meter(Clock(CPU, "other"), EnergyMeter(CPU), self.model, self.optimizer)
        self.accumulation = accumulation
        if every_step:
            self.meter._wants_trace = lambda situation, shape: True

    def run(self, *shapes):
        for i, (examples, tokens) in enumerate(shapes):
            batch = tiny_batch(examples=examples, tokens=tokens)
            last = (i + 1) % self.accumulation == 0
            with self.meter.micro_step(batch, first=i % self.accumulation == 0, last=last):
                self.model(**batch).loss.backward()
                if last:
                    self.optimizer.step()
                    self.optimizer.zero_grad()
        return self

    def freeze(self, *indices):
        for i in indices:
            for parameter in self.units[i].parameters.values():
                parameter.requires_grad, parameter.grad = False, None
                self.optimizer.state.pop(parameter, None)
        self.meter.changed()


@pytest.fixture
def ticking(monkeypatch):
    """A clock that goes on by one at each look: means over time without a machine's noise."""
    ticks = itertools.count()
    monkeypatch.setattr("time.perf_counter", lambda: float(next(ticks)))


def lengths(seed=0, num=60):
    drawn = torch.randint(5, 39, (num,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [(8, length) for length in drawn[:-1]] + [(3, drawn[-1])]


def test_most_steps_are_not_traced():
    summary = Training().run(*lengths()).meter.summary()
    assert summary["traced_micro_steps"] + summary["scaled_micro_steps"] == 60
    assert summary["traced_micro_steps"] <= 12


@pytest.mark.parametrize("accumulation", [1, 3])
def test_sampling_gives_the_flops_and_the_peak_of_tracing_every_step(accumulation, ticking):
    figures = []
    for every_step in (True, False):
        training = Training(accumulation=accumulation, every_step=every_step).run(*lengths())
        training.freeze(0, 1)
        training.run(*lengths(seed=1))
        figures.append(training.meter.summary())
    full, sampled = figures
    assert sampled["flops_by_phase"] == full["flops_by_phase"]
    assert sampled["memory_peak_bytes"] == full["memory_peak_bytes"]
    assert sampled["memory_peak_by_kind"] == full["memory_peak_by_kind"]
    assert sampled["memory_mean_bytes"] == pytest.approx(full["memory_mean_bytes"], rel=0.15)


def test_a_late_freeze_lowers_the_mean_and_not_the_peak(ticking):
    shapes = [(8, 38)] * 15
    live, freezing = (Training(every_step=True).run(*shapes) for _ in range(2))
    freezing.freeze(0, 1, 2, 3)
    live, freezing = (training.run(*shapes).meter.summary() for training in (live, freezing))
    assert freezing["memory_peak_bytes"] == live["memory_peak_bytes"]
    assert freezing["memory_mean_bytes"] < live["memory_mean_bytes"]
    assert freezing["memory_mean_step_peak_bytes"] < live["memory_mean_step_peak_bytes"] <= live["memory_peak_bytes"]


def test_a_row_tells_the_steps_since_the_last_row():
    training = Training().run((8, 30), (8, 30))
    first = training.meter.recent()
    training.freeze(0, 1, 2, 3)
    training.run((8, 30))
    second = training.meter.recent()
    assert second["step_memory_peak_bytes"] < first["step_memory_peak_bytes"] == second["memory_peak_bytes"]
    assert sum(second[f"step_memory/{kind}_bytes"] for kind in KINDS) == second["step_memory_peak_bytes"]
    assert second["step_traced"] is True
    training.run((8, 29), (8, 28))
    assert training.meter.recent()["step_traced"] is True  # until three lengths are traced
    training.run((8, 27))
    assert training.meter.recent()["step_traced"] is False


def test_what_is_kept_beside_the_model_is_cache():
    training = Training()
    kept = [torch.zeros(1000)]
    training.meter.keep(lambda: kept)
    training.run((8, 10))
    assert training.meter.summary()["memory_peak_by_kind"]["cache"] == 4000
    training.run((8, 10))
    peak = training.meter.summary()["memory_peak_bytes"]
    # Something more is kept, and the next step is like one that was traced: the peak rises all the same.
    kept.append(torch.zeros(100))
    training.run((8, 10))
    assert training.meter.summary()["memory_peak_bytes"] == peak + 400


def test_scoring_and_evaluation_are_counted_apart_and_evaluation_is_traced_once(monkeypatch):
    training = Training().run((8, 10))
    batch = tiny_batch(examples=64, tokens=38)

    def evaluate():
        with training.meter.activity("evaluation"), torch.no_grad():
            training.model(**batch)

    evaluate()
    once = training.meter.summary()
    monkeypatch.setattr("safe_lab.resources.meter.Ledger", None)
    evaluate()
    twice = training.meter.summary()
    assert once["flops_by_phase"]["evaluation"] > once["flops_by_phase"]["forward"] > 0
    assert twice["flops_by_phase"]["evaluation"] == 2 * once["flops_by_phase"]["evaluation"]
    assert once["memory_peak_in"] == "evaluation"


def test_a_resumed_meter_goes_on_to_the_same_figures():
    whole = Training().run(*lengths())
    begun = Training().run(*lengths()[:25])
    resumed = Training()
    # The optimizer's state is there again after a resume.
    resumed.run((8, 10))
    resumed.meter = Meter(Clock(CPU, "other"), EnergyMeter(CPU), resumed.model, resumed.optimizer)
    resumed.meter.load_state_dict(begun.meter.state_dict())
    resumed.run(*lengths()[25:])
    for key in ("flops_by_phase", "memory_peak_by_kind", "traced_micro_steps", "scaled_micro_steps"):
        assert resumed.meter.summary()[key] == whole.meter.summary()[key]
