"""The architectures of well-known models by name: enough to plan or rehearse a run without their weights or the hub."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BERT_BASE: dict[str, Any] = {
    "model_type": "bert",
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}
_BERT_LARGE = _BERT_BASE | {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
_ROBERTA: dict[str, Any] = {
    "model_type": "roberta",
    "vocab_size": 50265,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
}
_GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
}
_LLAMA_2_7B: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}

# Name -> what transformers' ``AutoConfig.for_model`` takes: the published config.json, less what is its class's default.
SHAPES: dict[str, dict[str, Any]] = {
    "bert-base": _BERT_BASE,
    "bert-large": _BERT_LARGE,
    "roberta-base": _BERT_BASE | _ROBERTA,
    "roberta-large": _BERT_LARGE | _ROBERTA,
    "deberta-v3-large": {
        "model_type": "deberta-v2",
        "vocab_size": 128100,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "max_position_embeddings": 512,
        "type_vocab_size": 0,
        "layer_norm_eps": 1e-7,
        "pad_token_id": 0,
        "relative_attention": True,
        "max_relative_positions": -1,
        "position_buckets": 256,
        "position_biased_input": False,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"],
        "pooler_hidden_size": 1024,
        "pooler_dropout": 0,
        "pooler_hidden_act": "gelu",
    },
    "gpt2": _GPT2,
    "gpt2-medium": _GPT2 | {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "gpt2-large": _GPT2 | {"n_embd": 1280, "n_layer": 36, "n_head": 20},
    "gpt2-xl": _GPT2 | {"n_embd": 1600, "n_layer": 48, "n_head": 25},
    "llama-2-7b": _LLAMA_2_7B,
    "llama-2-13b": _LLAMA_2_7B
    | {
        "hidden_size": 5120,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "intermediate_size": 13824,
    },
    "llama-2-70b": _LLAMA_2_7B
    | {
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "intermediate_size": 28672,
    },
    "llama-3-8b": _LLAMA_2_7B
    | {
        "vocab_size": 128256,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
    "qwen2.5-7b": {
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "tie_word_embeddings": False,
    },
    "mistral-7b": {
        "model_type": "mistral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    },
}

# What a hub id adds to a shape's name without changing the architecture by more than the vocabulary or the attention window.
_DECORATION = re.compile(r"^meta-|(-(hf|instruct|chat|uncased|cased|v0\.\d))+$")


def find_shape(path: str) -> str | None:
    """The key in ``SHAPES`` of the architecture that a name or hub id speaks of; None if it is none of them.

    >>> find_shape("meta-llama/Llama-2-7b-chat-hf"), find_shape("bert-base-uncased"), find_shape("my/own-model")
    ('llama-2-7b', 'bert-base', None)
    """
    name = _DECORATION.sub("", path.rpartition("/")[2].lower())
    return name if name in SHAPES else None


# Family -> special tokens by role, in the order of their ids (the published ids where those are low), and how one text
# and a pair are put between them. None leaves an empty text without a token: a batch of such texts could not be run.
_ENDS_WITH_EOS = (
    {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
    "$A <|endoftext|>",
    "$A $B <|endoftext|>",
)
_STARTS_WITH_BOS = ({"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}, "<s> $A", "<s> $A <s> $B")
_TEXT_FORMAT: dict[str, tuple[dict[str, str], str, str]] = {
    "bert": (
        {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"},
        "[CLS] $A [SEP]",
        "[CLS] $A [SEP] $B:1 [SEP]:1",
    ),
    "roberta": (
        {
            "bos_token": "<s>",
            "pad_token": "<pad>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "cls_token": "<s>",
            "sep_token": "</s>",
        },
        "<s> $A </s>",
        "<s> $A </s> </s> $B </s>",
    ),
    "deberta-v2": (
        {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"},
        "[CLS] $A [SEP]",
        "[CLS] $A [SEP] $B:1 [SEP]:1",
    ),
    "gpt2": _ENDS_WITH_EOS,
    "qwen2": _ENDS_WITH_EOS,
    "llama": _STARTS_WITH_BOS,
    "mistral": _STARTS_WITH_BOS,
}


def build_tokenizer(shape: str) -> PreTrainedTokenizerBase:
    """A tokenizer for a shape: one token a byte, between the special tokens of the family.

    It stands in for the real one, whose vocabulary no configuration holds. Any text goes through it and comes back; a text has
    some four times the tokens it would have with the real one.

    Args:
        shape: A key in ``SHAPES``.

    Returns:
        A tokenizer of fewer than 300 tokens, which cuts at the shape's longest text.
    """
    # Here and not above: the names of the shapes must not cost the seconds that transformers takes to import.
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    config = SHAPES[shape]
    roles, single, pair = _TEXT_FORMAT[config["model_type"]]
    special = list(dict.fromkeys(roles.values()))
    ids = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(token, ids[token]) for token in special]
    )
    positions = config.get("max_position_embeddings") or config["n_positions"]
    if config["model_type"] == "roberta":
        # Its positions count from the padding token's id on: the first rows of the table are never used.
        positions -= config["pad_token_id"] + 1
    segments = ["token_type_ids"] if "$B:1" in pair else []
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        model_max_length=positions,
        model_input_names=["input_ids", *segments, "attention_mask"],
        **roles,
    )
