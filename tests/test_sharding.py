"""Base weights spread over processes (FSDP2): the same training as with a copy on each, in less memory."""

import json
import logging

import pytest
import torch
from parallel import FSDP, assert_like_one, in_processes, rows_of, run_up_to
from peft import LoraConfig, PeftModel, get_peft_model
from test_folding import METHODS, prepared
from test_run import bits, config_of
from tiny import FAMILIES, tiny_batch, tiny_model
from torch import nn
from transformers import AutoModelForSequenceClassification

from safe_lab import run as runs
from safe_lab.adapters import base_weights, find_units
from safe_lab.freezing import Freezer, FreezingRule
from safe_lab.importance import METRICS
from safe_lab.memory import Ledger
from safe_lab.model import loss_function
from safe_lab.prefix import ActivationCache, Prefix
from safe_lab.prefix.stack import Stack
from safe_lab.prefix.store import FileStore
from safe_lab.sharding import Gathering, gather, is_sharded, own_part, shard

CPU = torch.device("cpu")


def attached(family="bert", **options):
    """A model with adapters that have moved off their start."""
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=FAMILIES[family][2], **options)
    model = get_peft_model(tiny_model(family), config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def gradients_of(model, batch):
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.autograd.grad(loss_function(model, batch), parameters, allow_unused=True, materialize_grads=True)


def test_a_sharded_model_has_the_gradients_of_a_whole_one(family):
    def compare(processes):
        whole, sharded = attached(family), attached(family)
        shard(sharded, base_weights(sharded), processes, CPU)
        batch, equal = tiny_batch(), []
        for frozen in range(3):
            for model in (whole, sharded):
                for name, parameter in model.named_parameters():
                    if f".{frozen - 1}." in name:
                        parameter.requires_grad_(False)
            equal += map(torch.equal, gradients_of(sharded, batch), gradients_of(whole, batch))
        weights = dict(whole.named_parameters())
        equal += [torch.equal(gather(weight), weights[name]) for name, weight in sharded.named_parameters()]
        kept = sum(own_part(weight).nbytes for weight in base_weights(sharded))
        return all(equal), is_sharded(sharded), is_sharded(whole), kept / sum(w.nbytes for w in base_weights(whole))

    for equal, is_spread, is_whole_spread, share in in_processes(compare):
        assert equal and is_spread and not is_whole_spread
        assert share == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("method", METHODS)
def test_any_method_has_the_gradients_and_scores_of_a_whole_model(method):
    def measure(processes):
        batch, found = tiny_batch(), []
        for is_to_shard in (False, True):
            model, _ = prepared(METHODS[method], frozen=())
            if is_to_shard:
                shard(model, base_weights(model), processes, CPU)
            units = find_units(model, lambda model=model: model(**batch))
            optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
            rule = FreezingRule(final_threshold=0.0)
            freezer = Freezer(model, units, optimizer, [batch], loss_function, rule, processes=processes)
            scoring = freezer.step(1)
            found.append((gradients_of(model, batch), scoring.scores, scoring.update_norms))
        (gradients, *figures), (others, *other_figures) = found
        return all(map(torch.equal, gradients, others)) and figures == other_figures

    assert in_processes(measure) == [True, True]


@pytest.mark.parametrize("reshard_after_forward", [True, False])
def test_the_ledger_follows_weights_that_are_gathered_and_given_up(reshard_after_forward):
    def trace(processes):
        model = attached()
        whole_bytes = sum(parameter.nbytes for parameter in model.parameters())
        shard(model, base_weights(model), processes, CPU, reshard_after_forward=reshard_after_forward)
        own_bytes = sum(own_part(parameter).nbytes for parameter in model.parameters())
        traces = []
        for _ in range(3):
            with Ledger(model) as ledger:
                loss_function(model, tiny_batch()).backward()
            traces.append(ledger.trace)
            model.zero_grad()
        gathering = Gathering(model)
        group_bytes = [sum(w._orig_size.numel() * 4 for w in group.fsdp_params) for group in gathering._groups]
        return whole_bytes, own_bytes, group_bytes, traces, [gathering.is_whole(i) for i in range(len(gathering))]

    for whole_bytes, own_bytes, group_bytes, traces, left in in_processes(trace):
        assert len(group_bytes) == 5 and not any(left)
        first, *later = traces
        for entry in later:
            assert entry.left["parameters"] == entry.held["parameters"] == pytest.approx(own_bytes, rel=0.02)
            assert entry.peak == first.peak
            assert entry.flops == first.flops
            # At most what is at work and the next; or else all.
            gathered = entry.peak["parameters"] - entry.held["parameters"]
            if reshard_after_forward:
                assert 0 < gathered <= sum(sorted(group_bytes)[-2:]) * 1.02
                assert entry.peak["parameters"] < whole_bytes
            else:
                assert gathered == pytest.approx(sum(group_bytes), rel=0.02)


def test_a_pass_that_ends_half_way_leaves_the_model_usable():
    def end(processes):
        whole, sharded, batch = attached(), attached(), tiny_batch()
        shard(sharded, base_weights(sharded), processes, CPU)
        units = find_units(sharded, lambda: sharded(**batch))
        stack = Stack(sharded, units)
        with torch.enable_grad():
            stack.look(lambda: loss_function(sharded, batch))
        hidden = stack.run(stack.inputs_of(batch), start=0, stop=2)
        expected = whole.base_model.model.bert(**stack.inputs_of(batch), output_hidden_states=True).hidden_states[2]
        gathering = Gathering(sharded)
        return (
            torch.equal(hidden, expected),
            any(gathering.is_whole(i) for i in range(len(gathering))),
            all(map(torch.equal, gradients_of(sharded, batch), gradients_of(whole, batch))),
        )

    assert in_processes(end) == [(True, False, True)] * 2


def test_layers_that_are_skipped_are_not_gathered():
    def skip(processes):
        whole, model, batch = attached(), attached(), tiny_batch()
        shard(model, base_weights(model), processes, CPU)
        units = find_units(model, lambda: model(**batch))
        for parameter in units[0].parameters.values():
            parameter.requires_grad_(False)
        prefix = Prefix(model, units, batch, loss_function)
        assert prefix.update() == 1
        hidden = prefix.hidden(batch)
        gathered = []
        group_type = type(model.base_model.model.bert.encoder.layer[0]._get_fsdp_state()._fsdp_param_groups[0])
        unshard = group_type.unshard

        def count(self, *arguments):
            gathered.append(self._module_fqn.rpartition("bert.")[2])
            return unshard(self, *arguments)

        group_type.unshard = count
        with prefix.skipping(hidden=hidden):
            loss = loss_function(model, batch)
        return gathered, torch.equal(loss, loss_function(whole, batch))

    for gathered, is_equal in in_processes(skip):
        assert is_equal
        assert "encoder.layer.0" not in gathered and {"encoder.layer.1", "encoder.layer.2"} <= set(gathered)


def test_weights_that_stand_in_several_places_stay_whole():
    def tie(processes):
        model = attached()
        layers = model.base_model.model.bert.encoder.layer
        layers[1].output.dense.weight = layers[0].output.dense.weight
        shard(model, base_weights(model), processes, CPU)
        loss_function(model, tiny_batch()).backward()
        return type(layers[1].output.dense.weight), layers[1].output.dense.weight is layers[0].output.dense.weight

    assert in_processes(tie) == [(nn.Parameter, True)] * 2


def test_quantised_weights_are_refused():
    def quantise(processes):
        model = attached()
        layer = model.base_model.model.bert.encoder.layer[0].output.dense
        layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
        with pytest.raises(ValueError, match=r"quantised \(.*output.dense.weight\).*--multi_gpu"):
            shard(model, base_weights(model), processes, CPU)

    in_processes(quantise)


def test_a_probe_that_processes_cannot_share_equally_is_refused():
    def build(processes):
        model, batch = attached(), tiny_batch(examples=5)
        shard(model, base_weights(model), processes, CPU)
        units = find_units(model, lambda: model(**batch))
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        with pytest.raises(ValueError, match="each probe batch needs a multiple of 2 examples"):
            Freezer(model, units, optimizer, [batch], loss_function, processes=processes)

    in_processes(build)


@pytest.mark.parametrize("metric", list(METRICS))
def test_sharded_processes_train_and_freeze_as_one_does(metric, tree):
    result, alone = assert_like_one(tree, environment=FSDP, count=2, freezing={"metric": metric})
    assert result.savings == alone.savings | {"folded_layers": 0}
    assert result.processes["last_step_bytes"] < result.processes["first_step_bytes"]


@pytest.mark.parametrize(
    "sections",
    [
        {"savings": {"fold": False, "prefix": False}},
        {"training": {"gradient_accumulation": 4}, "freezing": {"interval": 1}},
        {"model": {"gradient_checkpointing": True}, "training": {"num_workers": 1}},
        {"freezing": {"normalize": "none", "final_threshold": 3.0}},
        {"savings": {"cache_limit": "1KiB", "trim_padding": 2}},
        {"training": {"eval_batch_size": 16}, "freezing": {"probe_samples": 9}},
    ],
    ids=["plain", "accumulated", "checkpointed", "all frozen", "cache of a few", "fewer batches than processes"],
)
def test_sharded_processes_do_whatever_is_on(sections, tree):
    environment = FSDP | {"FSDP_RESHARD_AFTER_FORWARD": str("savings" in sections).lower()}
    if "probe_samples" in sections.get("freezing", {}):
        # Eight of the nine are a multiple of two processes.
        tree["freezing"] |= {"metric": "update_norm"}
    assert_like_one(tree, environment=environment, count=2, **sections)


def test_three_processes_share_a_probe_that_is_no_multiple_of_three(tree):
    config = config_of(tree, freezing={"probe_samples": 16})
    first, *others = in_processes(lambda processes: runs.run(config), count=3, environment=FSDP)
    assert all(other == first for other in others)
    assert first.frozen_depth > 0


def test_a_sharded_run_resumes_to_the_bits_of_one_left_alone(tree):
    whole, resumed = (config_of(tree, variant=variant, training={"epochs": 5}) for variant in ("whole", "resumed"))
    in_processes(lambda processes: runs.run(whole), environment=FSDP)
    in_processes(lambda processes: run_up_to(12, resumed), environment=FSDP)
    in_processes(lambda processes: runs.run(resumed, resume=True), environment=FSDP)
    ours, theirs = (bits(config.run_folder, with_bytes=False) for config in (whole, resumed))
    assert ours[0] == theirs[0]
    assert ours[1] == theirs[1]


def test_a_checkpoint_of_sharded_processes_is_whole_and_goes_on_anywhere(tree):
    whole = runs.run(config_of(tree, variant="whole"))
    config = config_of(tree, variant="resumed")
    in_processes(lambda processes: run_up_to(6, config), environment=FSDP)
    result = runs.run(config, resume=True)
    assert result.metrics == pytest.approx(whole.metrics, abs=1e-5)
    assert [row["step"] for row in rows_of(config)] == list(range(1, 19))


def test_the_adapter_of_a_sharded_run_loads_in_plain_peft(tree):
    config = config_of(tree)
    result = in_processes(lambda processes: runs.run(config), environment=FSDP)[0]
    alone = runs.run(config_of(tree, variant="one"))
    adapters = []
    for folder in (config.run_folder, config.run_folder.parents[1] / "one" / "seed-0"):
        base = AutoModelForSequenceClassification.from_pretrained(tree["model"]["path"])
        adapters.append(PeftModel.from_pretrained(base, folder / "adapter").eval())
    with torch.no_grad():
        ours, theirs = (model(**tiny_batch()).logits for model in adapters)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert result.parameters == alone.parameters


@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_full_for_one_sharded_process_costs_all_of_them_the_cache_and_nothing_else(rank, tree):
    config = config_of(tree, training={"epochs": 5})

    def fill(processes):
        def write(self, offset, data):
            raise OSError(28, "No space left on device")

        if processes.rank == rank:
            FileStore.write = write
        return runs.run(config)

    results = in_processes(fill, environment=FSDP)
    plain = runs.run(config_of(tree, variant="plain", training={"epochs": 5}, savings={"cache": False}))
    assert results[0] == results[1]
    assert results[0].savings["cached_examples"] == 0
    assert results[0].metrics == pytest.approx(plain.metrics, abs=1e-5)


def test_a_cache_that_one_sharded_process_finds_altered_makes_all_run_the_layers(tree):
    """From the next batch on, though the others could read theirs: the layers run on all of them or on none."""
    config = config_of(tree, training={"epochs": 5})

    def drop(processes):
        read = ActivationCache._read

        def read_or_not(self, keys, columns):
            return None if processes.rank == 1 and self.depth else read(self, keys, columns)

        ActivationCache._read = read_or_not
        return runs.run(config)

    first, second = in_processes(drop, environment=FSDP)
    plain = runs.run(config_of(tree, variant="plain", training={"epochs": 5}, savings={"cache": False}))
    assert first == second
    assert first.metrics == pytest.approx(plain.metrics, abs=1e-5)


@pytest.mark.parametrize(
    ("environment", "sections", "message"),
    [
        ({"FSDP_VERSION": "1"}, {}, "FSDP 1.*fsdp_version: 2"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, {}, "fsdp_offload_params: false"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}, "model.gradient_checkpointing: true"),
        ({}, {"memory": {"budget": "1GiB"}}, "memory.budget plans with the whole model"),
    ],
)
def test_what_does_not_go_with_sharding_is_refused(environment, sections, message, tree):
    config = config_of(tree, **sections)
    with pytest.raises(AssertionError, match=message):
        in_processes(lambda processes: runs.run(config), environment=FSDP | environment)


def test_a_single_process_has_nothing_to_share_and_is_told(tree, monkeypatch, caplog):
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    plain = runs.run(config_of(tree, variant="plain"))
    assert "FSDP has no effect on a single process" in caplog.text
    assert plain.savings["folded_layers"] > 0


def test_bytes_of_a_sharded_run_are_less_than_those_of_copies(tree):
    """Of one block of a wide model, and by as much as a process does not keep."""
    copies, sharded = (
        config_of(tree, variant=variant, freezing={"policy": "none"}) for variant in ("copies", "sharded")
    )
    with_copies = in_processes(lambda processes: runs.run(copies))[0]
    with_parts = in_processes(lambda processes: runs.run(sharded), environment=FSDP)[0]
    logging.info(json.dumps(with_parts.resources["memory_peak_by_kind"]))
    kinds = [result.resources["memory_mean_by_kind"] for result in (with_copies, with_parts)]
    assert kinds[1]["parameters"] < 0.9 * kinds[0]["parameters"]
    assert kinds[1]["optimizer"] == pytest.approx(kinds[0]["optimizer"], rel=0.1)
    assert with_parts.resources["flops"] == with_copies.resources["flops"]
