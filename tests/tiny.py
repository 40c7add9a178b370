"""Tiny models of every family, made from config, and texts to train them on: no weights and no network are needed."""

import random

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast, Qwen2Tokenizer

VOCABULARY = 64

_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}
_DECODER = _ENCODER | {"num_key_value_heads": 2, "eos_token_id": 1, "bos_token_id": 2}

# Family -> (config class, arguments, modules to adapt).
FAMILIES = {
    "bert": ("BertConfig", _ENCODER, ["query", "value"]),
    "roberta": ("RobertaConfig", _ENCODER, ["query", "value"]),
    "deberta-v2": (
        "DebertaV2Config",
        _ENCODER | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "pooler_hidden_size": 16},
        ["query_proj", "value_proj"],
    ),
    "distilbert": (
        "DistilBertConfig",
        {
            "vocab_size": VOCABULARY,
            "dim": 16,
            "n_layers": 3,
            "n_heads": 2,
            "hidden_dim": 32,
            "max_position_embeddings": 40,
        },
        ["q_lin", "v_lin"],
    ),
    "electra": ("ElectraConfig", _ENCODER | {"embedding_size": 16}, ["query", "value"]),
    "modernbert": (
        "ModernBertConfig",
        _ENCODER
        | {"cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3, "global_attn_every_n_layers": 2},
        ["Wqkv"],
    ),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 16,
            "n_layer": 3,
            "n_head": 2,
            "n_positions": 40,
            "bos_token_id": 2,
            "eos_token_id": 1,
        },
        ["c_attn"],
    ),
    "llama": ("LlamaConfig", _DECODER, ["q_proj", "v_proj"]),
    "qwen2": ("Qwen2Config", _DECODER, ["q_proj", "v_proj"]),
}


def tiny_model(family: str = "bert", *, num_labels: int = 2, seed: int = 0, **changes):
    """A freshly initialised model of a family, with a classification head."""
    name, arguments, _ = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, name)(**(arguments | {"num_labels": num_labels} | changes))
    if config.pad_token_id is None:
        config.pad_token_id = 0
    return AutoModelForSequenceClassification.from_config(config)


def tiny_batch(*, examples: int = 4, tokens: int = 7, num_labels: int = 2, seed: int = 0):
    """Random tokens; the second half of the examples is padded by two."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(4, VOCABULARY, (examples, tokens), generator=generator)
    mask = torch.ones_like(input_ids)
    mask[examples // 2 :, -2:] = 0
    return {
        "input_ids": input_ids * mask,
        "attention_mask": mask,
        "labels": torch.randint(0, num_labels, (examples,), generator=generator),
    }


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"word{i}" for i in range(VOCABULARY - 4))]


def save_tiny_model(folder, family="bert", **changes):
    """A tiny model with a word-level tokenizer, as a local folder that ``model.path`` can name."""
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    if family == "qwen2":
        # AutoTokenizer takes the family's own byte-level tokenizer, whatever class was saved.
        characters = {character: i for i, character in enumerate(["[PAD]", "<|endoftext|>", "Ġ", *"word0123456789"])}
        tokenizer = Qwen2Tokenizer(vocab=characters, merges=[], pad_token="[PAD]", model_max_length=40)
    else:
        words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        words.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=40, **names)
    tokenizer.save_pretrained(folder)
    tiny_model(family, **changes).save_pretrained(folder)
    return folder


def write_csv(path, *, rows=48, seed=0):
    """Texts whose label is told by a word: learnable in a few steps."""
    draw = random.Random(seed)
    lines = ["text,label"]
    for i in range(rows):
        label = i % 2
        words = [f"word{draw.randrange(10, 50)}" for _ in range(draw.randrange(3, 12))]
        words.insert(draw.randrange(len(words)), f"word{label}")
        lines.append(f"{' '.join(words)},{label}")
    path.write_text("\n".join(lines) + "\n")
    return path


def tiny_tree_in(folder, model):
    """The YAML tree of a run that takes a second, with its data in a folder, and its runs."""
    return {
        "name": "tiny",
        "output_dir": str(folder / "runs"),
        "model": {"path": str(model)},
        "data": {"task": "classification", "path": str(write_csv(folder / "data.csv")), "max_length": 16},
        "adapter": {"method": "lora", "rank": 2, "alpha": 4, "target_modules": ["query", "value"]},
        "training": {"epochs": 3, "batch_size": 8, "learning_rate": 1e-2, "log_every": 2},
        "freezing": {
            "metric": "cka",
            "normalize": "rank",
            "interval": 5,
            "warmup": 1,
            "final": 3,
            "final_threshold": 0.55,
        },
        "tracking": {"wandb": "disabled"},
    }


def random_batch(rows=16, columns=36, *, seed=0, left=False, num_labels=2, shortest=2):
    """Rows of random lengths, the longest of which fills all columns."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, columns + 1, (rows,), generator=generator)
    lengths[rows // 2] = columns
    mask = (torch.arange(columns) < lengths[:, None]).long()
    mask = mask.flip(1) if left else mask
    labels = (
        torch.rand(rows, generator=generator)
        if num_labels == 1
        else torch.randint(num_labels, (rows,), generator=generator)
    )
    return {
        "input_ids": torch.randint(4, 64, (rows, columns), generator=generator) * mask,
        "attention_mask": mask,
        "labels": labels,
    }
