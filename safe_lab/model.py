"""The pre-trained model and its tokenizer: from the hub, a folder, or an installed package."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

log = logging.getLogger(__name__)

PACKAGE_SCHEME = "package://"


def resolve(path: str) -> str:
    """A hub id, or the folder that ``path`` names.

    Args:
        path: ``package://name/path`` (inside an installed package, which is not imported), a local folder, or a hub id.

    Raises:
        ValueError: The package is not installed, or the folder does not exist.
    """
    if path.startswith(PACKAGE_SCHEME):
        name, _, inside = path.removeprefix(PACKAGE_SCHEME).partition("/")
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(f"model.path: package {name!r} is not installed (pip install {name.replace('_', '-')})")
        folder = Path(spec.submodule_search_locations[0]) / inside
        if not folder.is_dir():
            raise ValueError(f"model.path: package {name} has no folder {inside!r}")
        return str(folder)
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    folder = Path(path).expanduser()
    if looks_local and not folder.is_dir():
        raise ValueError(f"model.path: {path} is no folder")
    return str(folder) if folder.is_dir() else path


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token (the end-of-text token where the model has none, as decoders do).

    Raises:
        ValueError: There is none to load.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            resolve(path), trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"model.path: no tokenizer at {path}: {_first_line(error)}") from None
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"model.path: the tokenizer at {path} has neither a padding nor an end-of-text token to pad with"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    path: str,
    *,
    num_labels: int,
    regression: bool,
    pad_token_id: int | None,
    dtype: str = "float32",
    attention: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, list[str]]:
    """A pre-trained model with a fresh sequence-classification head, and the names of the modules that make the head.

    Args:
        path: Where from; see :func:`resolve`.
        num_labels: Size of the head (1 for regression).
        regression: Whether the loss is the mean squared error.
        pad_token_id: Token by which decoders find the end of a text.
        dtype: Name of a torch dtype, of all weights.
        attention: Name of an attention implementation; None: the library's choice.
        trust_remote_code: Run Python code that comes with the model.

    Raises:
        ValueError: No configuration or no weights there, or a model type without a classification head.
    """
    source = resolve(path)
    try:
        config = AutoConfig.from_pretrained(
            source,
            num_labels=num_labels,
            problem_type="regression" if regression else "single_label_classification",
            trust_remote_code=trust_remote_code,
        )
        # The tokenizer's, whatever the config says: decoders find the end of a text by it.
        config.pad_token_id = pad_token_id
        model, info = AutoModelForSequenceClassification.from_pretrained(
            source,
            config=config,
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            # A checkpoint may come with a head of another size; a body of another size is caught below.
            ignore_mismatched_sizes=True,
        )
    except Exception as error:  # noqa: BLE001 - of a damaged file transformers raises whatever its parsers do
        raise ValueError(f"model.path: no model to classify with at {path}: {_first_line(error)}") from None
    fresh = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    lost = [key for key in fresh if key.startswith(model.base_model_prefix + ".")]
    poolers = sorted({key.rpartition(".pooler.")[0] + ".pooler" for key in lost if ".pooler." in key})
    lost = [key for key in lost if ".pooler." not in key]
    if lost:
        raise ValueError(f"model.path: the weights at {path} lack {len(lost)} of the model's own, {lost[0]} among them")
    if poolers:
        log.warning("the checkpoint has no pooler (%s): it starts at random and trains with the head", poolers[0])
    return cast(PreTrainedModel, model), [*head_modules(model), *poolers]


def checkpoint_gradients(model: Any) -> None:
    """Recompute activations in the backward pass, and let that pass end where everything below is frozen.

    To be called after adapters are attached: PEFT, and reentrant checkpointing, make the embeddings' output require a
    gradient, and the backward pass would run to the bottom of the model for nothing.
    """
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.disable_input_require_grads()


def head_modules(model: PreTrainedModel) -> list[str]:
    """Names of the modules outside the pre-trained body: the task head, which trains in full.

    PEFT knows only the names ``classifier`` and ``score``; DistilBERT's ``pre_classifier`` and the poolers of DeBERTa and
    ModernBERT are as new as those, and would stay random and frozen.
    """
    body = model.base_model
    heads = [
        name for name, child in model.named_children() if child is not body and any(True for _ in child.parameters())
    ]
    return heads or ["classifier", "score"]


def num_positions(model: PreTrainedModel) -> int | None:
    """Longest text the model takes, in tokens; None if it has no table of positions.

    RoBERTa and its kin number positions from the padding token's id on, so that the table's first rows are never used.
    """
    positions: int | None = getattr(model.config, "max_position_embeddings", None)
    embeddings = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    offset = getattr(embeddings, "padding_idx", None)
    return positions - (0 if offset is None else offset + 1) if positions else None


def loss_function(model: nn.Module, batch: Any) -> Tensor:
    """Mean loss of a batch, as the model's own head computes it."""
    loss: Tensor = model(**batch).loss
    return loss


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
