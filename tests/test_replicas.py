"""Gradients of copies of a model: averaged over what trains, and nothing else."""

import gc
import weakref

import pytest
import torch
from parallel import in_processes
from torch import nn

from safe_lab.processes import ALONE
from safe_lab.replicas import Replicas, Traffic


def build(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))


def batch(rank):
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(rank))


def freeze(layer):
    for parameter in layer.parameters():
        parameter.requires_grad, parameter.grad = False, None


@pytest.mark.parametrize("overlapped", [True, False])
def test_gradients_are_the_mean_over_processes_also_after_a_freeze(overlapped):
    def gradients(processes):
        model = build()
        replicas = Replicas(model, processes, overlapped=overlapped)
        found = []
        for frozen in range(3):
            if frozen:
                freeze(model[frozen - 1])
                replicas.wrap()
            replicas.model(batch(processes.rank)).square().mean().backward()
            replicas.average()
            replicas.end_step()
            found.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
            model.zero_grad()
        return found, replicas.traffic

    (first, traffic), (second, _) = in_processes(gradients)
    weights = sum(p.numel() for p in build().parameters())
    assert (traffic.first_step_bytes, traffic.last_step_bytes) == (4 * weights, 4 * (weights - 40))
    assert traffic.gradient_bytes == 4 * (3 * weights - 20 - 40)
    for frozen, (ours, theirs) in enumerate(zip(first, second, strict=True)):
        model = build()
        for layer in model[:frozen]:
            freeze(layer)
        (sum(model(batch(rank)).square().mean() for rank in range(2)) / 2).backward()
        for parameter, one, other in zip(model.parameters(), ours, theirs, strict=True):
            if parameter.requires_grad:
                torch.testing.assert_close(one, parameter.grad)
                assert torch.equal(one, other)
            else:
                assert one is None and other is None


def test_held_back_gradients_add_up_and_are_sent_once():
    def gradients(processes):
        model = build()
        replicas = Replicas(model, processes, overlapped=True)
        for part in range(3):
            x = batch(10 * processes.rank + part)
            if part < 2:
                with replicas.held_back():
                    replicas.model(x).sum().backward()
            else:
                replicas.model(x).sum().backward()
        replicas.end_step()
        return model[0].weight.grad.clone(), replicas.traffic.gradient_bytes

    (first, sent), (second, _) = in_processes(gradients)
    model = build()
    (sum(model(batch(10 * rank + part)).sum() for rank in range(2) for part in range(3)) / 2).backward()
    torch.testing.assert_close(first, model[0].weight.grad)
    assert torch.equal(first, second)
    assert sent == 4 * sum(p.numel() for p in model.parameters())


def test_what_trains_begins_as_on_process_0():
    def weights(processes):
        model = build(seed=processes.rank)
        model[0].requires_grad_(False)
        Replicas(model, processes, overlapped=True)
        return [p.detach().clone() for p in model.parameters()]

    first, second = in_processes(weights)
    for parameter, one, other in zip(build(seed=0).parameters(), first, second, strict=True):
        assert torch.equal(one, parameter)
        assert torch.equal(one, other) or parameter.shape in (torch.Size([4, 4]), torch.Size([4]))
    assert all(torch.equal(one, other) for one, other in zip(first[2:], second[2:], strict=True))


def test_nothing_is_wrapped_where_nothing_trains_or_nobody_else_is():
    def is_wrapped(processes):
        model = build()
        replicas = Replicas(model, processes, overlapped=True)
        for layer in model:
            freeze(layer)
        replicas.wrap()
        return replicas.model is model

    assert in_processes(is_wrapped) == [True, True]
    model = build()
    replicas = Replicas(model, ALONE, overlapped=True)
    replicas.model(batch(0)).sum().backward()
    replicas.average()
    replicas.end_step()
    assert replicas.model is model and replicas.traffic == Traffic()


def test_an_old_wrapper_goes_with_its_hooks():
    def count(processes):
        model = build()
        replicas = Replicas(model, processes, overlapped=True)
        old = weakref.ref(replicas.model)
        freeze(model[0])
        replicas.wrap()
        gone = old() is None
        last = weakref.ref(replicas.model)
        del replicas
        gc.collect()
        return gone, last() is None

    assert in_processes(count) == [(True, True)] * 2
