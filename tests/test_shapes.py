"""Named shapes are the published architectures, and their tokenizers take any text."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer

from safe_lab.shapes import SHAPES, build_tokenizer, find_shape

# Parameters in millions as published, with the decoders' output layer, which a classifier does not have.
PUBLISHED = {
    "bert-base": 109.5,
    "bert-large": 335.1,
    "roberta-base": 124.6,
    "roberta-large": 355.4,
    "deberta-v3-large": 434.0,
    "gpt2": 124.4,
    "gpt2-medium": 354.8,
    "gpt2-large": 774.0,
    "gpt2-xl": 1557.6,
    "llama-2-7b": 6738.4,
    "llama-2-13b": 13015.9,
    "llama-2-70b": 68976.6,
    "llama-3-8b": 8030.3,
    "qwen2.5-7b": 7615.6,
    "mistral-7b": 7241.7,
}
TEXTS = ["", "a b  c\n", "\N{GRINNING FACE} n\u00e9 \0 \x7f", "  lead , it is n't .", "word " * 3]


@pytest.fixture(params=sorted({shape["model_type"]: name for name, shape in SHAPES.items()}.values()))
def shape(request):
    """A shape of each family in turn."""
    return request.param


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_the_published_number_of_parameters(name):
    config = AutoConfig.for_model(**SHAPES[name])
    with torch.device("meta"):
        body = AutoModel.from_config(config)
    output_layer = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    count = sum(parameter.numel() for parameter in body.parameters()) + output_layer
    assert count / 1e6 == pytest.approx(PUBLISHED[name], rel=0.001)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("roberta-large", "roberta-large"),
        ("FacebookAI/roberta-large", "roberta-large"),
        ("google-bert/bert-base-uncased", "bert-base"),
        ("bert-large-cased", "bert-large"),
        ("microsoft/deberta-v3-large", "deberta-v3-large"),
        ("openai-community/gpt2-xl", "gpt2-xl"),
        ("meta-llama/Llama-2-7b-hf", "llama-2-7b"),
        ("meta-llama/Llama-2-70b-chat-hf", "llama-2-70b"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama-3-8b"),
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b"),
        ("mistralai/Mistral-7B-v0.1", "mistral-7b"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b"),
        ("google-bert/bert-base-multilingual-cased", None),
        ("mistralai/Mixtral-8x7B-v0.1", None),
        ("roberta-large-mnli", None),
        ("", None),
    ],
)
def test_hub_ids_and_their_variants_find_the_shape(path, name):
    assert find_shape(path) == name


def test_the_names_of_the_shapes_cost_no_import_of_torch():
    program = "import sys, safe_lab.shapes; assert not {'torch', 'transformers', 'tokenizers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_any_text_goes_through_the_tokenizer_and_comes_back(shape):
    tokenizer = build_tokenizer(shape)
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert 0 < len(ids) <= len(text.encode()) + 2
        assert max(ids) < len(tokenizer) < SHAPES[shape]["vocab_size"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_tokenizer_cuts_at_the_longest_text_that_was_published():
    longest = {name: build_tokenizer(name).model_max_length for name in ("bert-base", "roberta-large", "gpt2")}
    assert longest == {"bert-base": 512, "roberta-large": 512, "gpt2": 1024}


def test_special_tokens_stand_where_the_family_puts_them():
    pairs = {name: build_tokenizer(name)("a", "b") for name in ("bert-base", "roberta-base", "llama-2-7b", "gpt2")}
    assert {name: pair.input_ids for name, pair in pairs.items()} == {
        "bert-base": [2, 68, 3, 69, 3],
        "roberta-base": [0, 68, 2, 2, 69, 2],
        "llama-2-7b": [1, 67, 1, 68],
        "gpt2": [65, 66, 0],
    }
    assert pairs["bert-base"].token_type_ids == [0, 0, 0, 1, 1]
    assert "token_type_ids" not in pairs["roberta-base"]


@pytest.mark.parametrize("with_config", [False, True])
def test_a_saved_tokenizer_loads_with_plain_transformers(shape, with_config, tmp_path):
    tokenizer = build_tokenizer(shape)
    tokenizer.save_pretrained(tmp_path)
    if with_config:
        # AutoTokenizer then picks a class by the family.
        AutoConfig.for_model(**SHAPES[shape]).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.model_max_length == tokenizer.model_max_length
    for text in TEXTS:
        assert loaded(text, "second").data == tokenizer(text, "second").data
