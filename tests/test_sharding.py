"""Base weights spread over processes (FSDP2): the same training as with a copy on each, in less memory."""

import os
import shutil
import weakref

import pytest
import torch
from parallel import FSDP, assert_like_one, in_processes, rows_of, run_up_to
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from test_folding import METHODS, prepared
from test_run import bits, config_of
from tiny import FAMILIES, save_tiny_model, tiny_batch, tiny_model
from torch import nn
from transformers import AutoModelForSequenceClassification

from safe_lab import run as runs
from safe_lab.adapters import base_weights, find_units
from safe_lab.decision import FreezingRule
from safe_lab.freezing import Freezer
from safe_lab.importance import METRICS
from safe_lab.memory import Ledger
from safe_lab.model import loss_function
from safe_lab.prefix import ActivationCache, Prefix
from safe_lab.prefix.stack import Stack
from safe_lab.prefix.store import FileStore
from safe_lab.processes import ALONE, is_connection_lost
from safe_lab.sharding import Groups, is_sharded, own_part, shard, whole

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
        plain, sharded = attached(family), attached(family)
        shard(sharded, base_weights(sharded), processes, CPU)
        batch, equal = tiny_batch(), []
        for frozen in range(3):
            for model in (plain, sharded):
                for name, parameter in model.named_parameters():
                    if f".{frozen - 1}." in name:
                        parameter.requires_grad_(False)
            equal += map(torch.equal, gradients_of(sharded, batch), gradients_of(plain, batch))
        weights = dict(plain.named_parameters())
        equal += [torch.equal(whole(weight), weights[name]) for name, weight in sharded.named_parameters()]
        kept = sum(own_part(sharded.get_parameter(name)).nbytes for name in base_weights(sharded))
        all_bytes = sum(weights[name].nbytes for name in base_weights(plain))
        return all(equal), is_sharded(sharded), is_sharded(plain), kept / all_bytes

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
        groups = Groups(model)
        group_bytes = [sum(w._orig_size.numel() * 4 for w in group.fsdp_params) for group in groups._groups]
        return whole_bytes, own_bytes, group_bytes, traces, [groups.is_whole(i) for i in range(len(groups))]

    for whole_bytes, own_bytes, group_bytes, traces, left in in_processes(trace):
        assert len(group_bytes) == 5 and not any(left)
        first, *later = traces
        for entry in later:
            assert entry.left["parameters"] == entry.held["parameters"] == pytest.approx(own_bytes, rel=0.02)
            assert entry.peak_bytes == pytest.approx(first.peak_bytes, rel=0.02), (entry.peak, first.peak)
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
        with Ledger(sharded) as ledger:
            hidden = stack.run(stack.inputs_of(batch), start=0, stop=2)
        expected = whole.base_model.model.bert(**stack.inputs_of(batch), output_hidden_states=True).hidden_states[2]
        groups = Groups(sharded)
        return (
            torch.equal(hidden, expected),
            any(groups.is_whole(i) for i in range(len(groups))),
            ledger.trace.left["parameters"] == ledger.trace.held["parameters"],
            all(map(torch.equal, gradients_of(sharded, batch), gradients_of(whole, batch))),
        )

    assert in_processes(end) == [(True, False, True, True)] * 2


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
    """By their dtype, or by what transformers leaves on a model that it has quantised itself."""
    model = attached()
    layer = model.base_model.model.bert.encoder.layer[0].output.dense
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"quantised \(.*output.dense.weight\).*--multi_gpu"):
        shard(model, base_weights(model), ALONE, CPU)
    model = attached()
    model.base_model.model.hf_quantizer = object()
    with pytest.raises(ValueError, match="quantised .as their checkpoint says"):
        shard(model, base_weights(model), ALONE, CPU)


def test_layers_that_are_skipped_at_random_are_refused():
    model = attached()
    model.base_model.model.config.layerdrop = 0.1
    with pytest.raises(ValueError, match="layerdrop in its config.json.*set layerdrop to 0"):
        shard(model, base_weights(model), ALONE, CPU)


def test_the_device_never_holds_more_than_a_group_of_whole_weights():
    """Those of the groups before are gone when the next is moved there and cut."""

    def watch(processes):
        import torch.distributed.fsdp as fsdp

        model = attached()
        originals = [weakref.ref(model.get_parameter(name)) for name in base_weights(model)]
        fully_shard, left = fsdp.fully_shard, []

        def count(module, **arguments):
            left.append(sum(weight() is not None for weight in originals))
            return fully_shard(module, **arguments)

        fsdp.fully_shard = count
        shard(model, base_weights(model), processes, CPU)
        left.append(sum(weight() is not None for weight in originals))
        return left, len(originals)

    for left, num_weights in in_processes(watch):
        assert left[0] == num_weights and left[-1] == 0
        assert left == sorted(left, reverse=True) and len(set(left)) > 4


def test_weights_that_lie_transposed_are_spread_all_the_same():
    """As a method that decomposes them may leave them."""

    def compare(processes):
        plain, model = attached(), attached()
        for layer in model.base_model.model.bert.encoder.layer:
            layer.output.dense.weight.data = layer.output.dense.weight.data.t().contiguous().t()
        shard(model, base_weights(model), processes, CPU)
        return all(map(torch.allclose, gradients_of(model, tiny_batch()), gradients_of(plain, tiny_batch())))

    assert in_processes(compare) == [True, True]


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


@pytest.mark.parametrize("reshard", ["true", "false"])
@pytest.mark.parametrize(
    "sections",
    [
        {"savings": {"fold": False, "prefix": False}},
        {"training": {"gradient_accumulation": 4}, "freezing": {"interval": 1}},
        {"model": {"gradient_checkpointing": True}, "training": {"num_workers": 1}},
        {"freezing": {"normalize": "none", "final_threshold": 3.0}},
        {"savings": {"cache_limit": "1KiB", "trim_padding": 2}},
        # Of which eight are a multiple of two processes; the metric does not look at them.
        {"training": {"eval_batch_size": 16}, "freezing": {"probe_samples": 9, "metric": "update_norm"}},
    ],
    ids=["plain", "accumulated", "checkpointed", "all frozen", "cache of a few", "fewer batches than processes"],
)
def test_sharded_processes_do_whatever_is_on(sections, reshard, tree):
    result, _ = assert_like_one(tree, environment=FSDP | {"FSDP_RESHARD_AFTER_FORWARD": reshard}, count=2, **sections)
    assert result.processes["sharded"]


@pytest.mark.parametrize("reshard", ["true", "false"])
def test_a_probe_with_fewer_examples_than_processes_is_refused(reshard, tree):
    config = config_of(tree, freezing={"probe_samples": 2})
    with pytest.raises(
        AssertionError, match="freezing.probe_samples: each of 3 processes .* needs an example, and there are 2"
    ):
        in_processes(
            lambda processes: runs.run(config), count=3, environment=FSDP | {"FSDP_RESHARD_AFTER_FORWARD": reshard}
        )


def test_processes_that_were_told_different_things_are_refused(tree):
    config = config_of(tree)

    def differ(processes):
        os.environ["FSDP_RESHARD_AFTER_FORWARD"] = str(processes.rank == 0).lower()
        runs.run(config)

    with pytest.raises(
        AssertionError, match="how the launcher was told to use FSDP is not on process 1 what it is on process 0"
    ):
        in_processes(differ, environment=FSDP)


def test_memory_that_runs_out_on_one_process_ends_all(tree):
    config = config_of(tree)

    def run_out(processes):
        write = FileStore.write

        def write_or_not(self, *arguments):
            if processes.rank == 1:
                raise torch.OutOfMemoryError("no room")
            write(self, *arguments)

        FileStore.write = write_or_not
        try:
            runs.run(config)
        except RuntimeError as error:
            return type(error).__name__, is_connection_lost(error)

    assert in_processes(run_out, environment=FSDP) == [("RuntimeError", True), ("OutOfMemoryError", False)]


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


@pytest.mark.parametrize("step", [6, 12])
def test_a_checkpoint_of_sharded_processes_is_whole_and_goes_on_anywhere(step, tree):
    """And folds what freezes from then on."""
    whole = runs.run(config_of(tree, variant="whole"))
    config = config_of(tree, variant="resumed")
    in_processes(lambda processes: run_up_to(step, config), environment=FSDP)
    result = runs.run(config, resume=True)
    assert result.metrics == pytest.approx(whole.metrics, abs=1e-5)
    assert [row["step"] for row in rows_of(config)] == list(range(1, 19))
    assert result.frozen_depth == whole.frozen_depth
    assert result.savings["folded_layers"] == (whole.savings["folded_layers"] if step == 6 else 0)


def test_a_run_with_folded_layers_goes_on_with_sharded_weights(tree):
    whole = runs.run(config_of(tree, variant="whole"))
    config = config_of(tree, variant="resumed")
    run_up_to(12, config)
    assert torch.load(config.run_folder / "checkpoints" / "step-00000012" / "state.pt")["savings"]["folding"]["folded"]
    first, second = in_processes(lambda processes: runs.run(config, resume=True), environment=FSDP)
    assert first == second
    assert first.metrics == pytest.approx(whole.metrics, abs=1e-5)
    assert first.savings["folded_layers"] == 0 < whole.savings["folded_layers"]


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


def test_an_adapter_of_the_embeddings_is_saved_without_the_embeddings(tree, tmp_path):
    model = save_tiny_model(tmp_path / "llama", "llama")
    tree |= {"model": {"path": str(model)}, "savings": {"prefix": False}}
    tree["adapter"] |= {"target_modules": ["embed_tokens", "q_proj"]}
    tree["data"] |= {"max_length": 14}
    files = []
    for variant, environment in (("copies", {}), ("sharded", FSDP)):
        config = config_of(tree, variant=variant, freezing={"metric": "update_norm"})
        in_processes(lambda processes, config=config: runs.run(config), environment=environment)
        files.append(load_file(config.run_folder / "adapter" / "adapter_model.safetensors"))
    assert files[0].keys() == files[1].keys()
    assert any("embed" in name for name in files[0]) and not any("base_layer" in name for name in files[0])
    for name, weight in files[0].items():
        torch.testing.assert_close(files[1][name], weight, rtol=0, atol=1e-4)


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


@pytest.mark.parametrize("loser", [0, 1])
def test_a_machine_that_has_lost_its_cache_makes_it_anew_with_the_others(loser, tree, tmp_path):
    """Two machines with a process each; the layers run on both or on none, whatever one has left of its cache."""
    whole, *machines = (
        config_of(tree, training={"epochs": 5}, variant=variant, output_dir=str(tmp_path / folder))
        for variant, folder in (("whole", "runs"), ("resumed", "first"), ("resumed", "second"))
    )

    def on_each(function):
        def with_node(processes):
            os.environ["GROUP_RANK"] = str(processes.rank)
            return function(machines[processes.rank])

        return in_processes(with_node, environment=FSDP)

    in_processes(lambda processes: runs.run(whole), environment=FSDP)
    on_each(lambda config: run_up_to(18, config))
    caches = [config.run_folder / name for config, name in zip(machines, ("cache", "cache-1"), strict=True)]
    assert all((cache / "activations.index").exists() for cache in caches)
    shutil.rmtree(caches[loser])
    first, second = on_each(lambda config: runs.run(config, resume=True))
    assert first == second
    assert first.savings["cached_examples"] > 0
    ours, theirs = (bits(config.run_folder, with_bytes=False) for config in (whole, machines[0]))
    assert ours[0] == theirs[0]


@pytest.mark.parametrize(
    ("environment", "sections", "message"),
    [
        ({"FSDP_VERSION": "1"}, {}, "FSDP 1.*fsdp_version: 2"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, {}, "fsdp_offload_params is not supported"),
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
    copies, sharded = (
        config_of(tree, variant=variant, freezing={"policy": "none"}) for variant in ("copies", "sharded")
    )
    with_copies = in_processes(lambda processes: runs.run(copies))[0]
    with_parts = in_processes(lambda processes: runs.run(sharded), environment=FSDP)[0]
    kinds = [result.resources["memory_mean_by_kind"] for result in (with_copies, with_parts)]
    assert kinds[1]["parameters"] < 0.9 * kinds[0]["parameters"]
    assert kinds[1]["optimizer"] == pytest.approx(kinds[0]["optimizer"], rel=0.1)
    assert with_parts.resources["flops"] == with_copies.resources["flops"]
