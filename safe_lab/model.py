"""The pre-trained model and its tokenizer: from the hub, a folder, an installed package, or a named shape."""

from __future__ import annotations

import copy
import importlib.util
import logging
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from safe_lab.shapes import SHAPES, build_tokenizer, find_shape
from safe_lab.suggest import did_you_mean

log = logging.getLogger(__name__)

PACKAGE_SCHEME = "package://"
SHAPE_SCHEME = "shape://"


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


def named_shape(path: str) -> str | None:
    """The key in ``SHAPES`` that a path of the form ``shape://NAME`` names; None for any other path.

    Raises:
        ValueError: There is no shape of that name.
    """
    if not path.startswith(SHAPE_SCHEME):
        return None
    name = path.removeprefix(SHAPE_SCHEME)
    shape = find_shape(name)
    if shape is None:
        raise ValueError(f"model.path: no shape {name!r}{did_you_mean(name, SHAPES)}; there are {', '.join(SHAPES)}")
    return shape


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token (the end-of-text token where the model has none, as decoders do).

    Args:
        path: Where from: ``shape://NAME``, or see :func:`resolve`.
        trust_remote_code: Run Python code that comes with the tokenizer.

    Raises:
        ValueError: There is none to load, or no such shape.
    """
    shape = named_shape(path)
    tokenizer: PreTrainedTokenizerBase
    if shape is not None:
        tokenizer = build_tokenizer(shape)
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(resolve(path), trust_remote_code=trust_remote_code)
        except (OSError, ValueError) as error:
            raise ValueError(f"model.path: no tokenizer at {path}: {_first_line(error)}") from None
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"model.path: the tokenizer at {path} has neither a padding nor an end-of-text token to pad with"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(
    path: str,
    *,
    num_labels: int,
    regression: bool,
    pad_token_id: int | None,
    attention: str | None = None,
    trust_remote_code: bool = False,
    download: bool = False,
) -> PreTrainedConfig:
    """The architecture at ``path``, as a classifier: what a model is built from, with or without weights.

    A folder needs a ``config.json`` and nothing else. A hub id needs one on this machine (where the hub's files are cached),
    unless it is the id of a named shape, as ``FacebookAI/roberta-large`` is.

    Args:
        path: Where from: ``shape://NAME``, or see :func:`resolve`.
        num_labels: Size of the head (1 for regression).
        regression: Whether the loss is the mean squared error.
        pad_token_id: Token by which decoders find the end of a text; None: the configuration's own.
        attention: Name of an attention implementation; None: the library's choice.
        trust_remote_code: Run Python code that comes with the model.
        download: Fetch the ``config.json`` of a hub id from the hub. No shape then stands in for a model.

    Raises:
        ValueError: No configuration there, or no such shape.
    """
    shape = named_shape(path)
    task: dict[str, Any] = {
        "num_labels": num_labels,
        "problem_type": "regression" if regression else "single_label_classification",
        "attn_implementation": attention,
    }
    config: PreTrainedConfig
    if shape is None:
        source = resolve(path)
        try:
            config = AutoConfig.from_pretrained(
                source, **task, trust_remote_code=trust_remote_code, local_files_only=not download
            )
        except Exception as error:  # noqa: BLE001 - of a damaged file transformers raises whatever its parsers do
            shape = None if download or Path(source).is_dir() else find_shape(path)
            if shape is None:
                raise ValueError(f"model.path: {_why_no_config(path, source, download, error)}") from None
            _tell_stand_in(path, shape)
    if shape is not None:
        # A copy, because the configuration keeps the lists and dicts that it is given, and callers may change them.
        config = AutoConfig.for_model(**copy.deepcopy(SHAPES[shape]), **task)
    if pad_token_id is not None:
        config.pad_token_id = pad_token_id
    # Decoders would keep keys and values of every layer for a next token that never comes, frozen layers' too.
    config.use_cache = False
    return config


@cache
def _tell_stand_in(path: str, shape: str) -> None:
    # Once, however often a plan builds the model.
    if path != shape:
        log.warning("the config.json of %s is not on this machine: the shape %s stands in for it", path, shape)


def _why_no_config(path: str, source: str, download: bool, error: Exception) -> str:
    if Path(source).is_dir():
        if not (Path(source) / "config.json").is_file():
            return f"the folder {path} has no config.json"
    elif not download:
        near = did_you_mean(path.rpartition("/")[2].lower(), SHAPES)
        return f"the config.json of {path} is not on this machine, and no shape has its name{near}; there are {', '.join(SHAPES)}"
    return f"no model configuration at {path}: {_first_line(error)}"


def build_skeleton(
    path: str,
    *,
    num_labels: int,
    regression: bool,
    pad_token_id: int | None,
    dtype: str = "float32",
    attention: str | None = None,
    trust_remote_code: bool = False,
    device: str = "meta",
) -> tuple[PreTrainedModel, list[str]]:
    """What :func:`load_model` gives, with parameters and buffers on the ``meta`` device: no weights, no memory, no hub.

    One thing cannot be known without weights: whether they have the body's pooler. It counts as there, so it is no head.

    Args:
        path: Where from; see :func:`load_config`.
        num_labels: Size of the head (1 for regression).
        regression: Whether the loss is the mean squared error.
        pad_token_id: Token by which decoders find the end of a text; None: the configuration's own, or else 0.
        dtype: Name of a torch dtype, of all weights.
        attention: Name of an attention implementation; None: the library's choice.
        trust_remote_code: Run Python code that comes with the model.
        device: ``meta``, or where to build it with random weights.

    Raises:
        ValueError: No configuration there, or of a model that cannot be built there or has no classification head.
    """
    config = load_config(
        path,
        num_labels=num_labels,
        regression=regression,
        pad_token_id=pad_token_id,
        attention=attention,
        trust_remote_code=trust_remote_code,
    )
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0
    try:
        with torch.device(device):
            model: Any = AutoModelForSequenceClassification.from_config(  # type: ignore[no-untyped-call]
                config, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code
            )
    except Exception as error:  # a model's own code raises whatever it does
        raise ValueError(f"model.path: no model to classify with at {path}: {_first_line(error)}") from error
    return model.eval(), head_modules(model)


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

    Of a shape, the whole model is fresh: made in ``dtype`` and on torch's default device from the start, so that a large one
    never lies in float32 or, ``with torch.device("cuda")``, in the memory of the host. A CPU core makes some 100 M weights a
    second.

    Args:
        path: Where from: ``shape://NAME``, or see :func:`resolve`.
        num_labels: Size of the head (1 for regression).
        regression: Whether the loss is the mean squared error.
        pad_token_id: Token by which decoders find the end of a text; None: the configuration's own.
        dtype: Name of a torch dtype, of all weights.
        attention: Name of an attention implementation; None: the library's choice.
        trust_remote_code: Run Python code that comes with the model.

    Raises:
        ValueError: No configuration or no weights there, or a model type without a classification head.
    """
    if named_shape(path) is not None:
        model, heads = build_skeleton(
            path,
            num_labels=num_labels,
            regression=regression,
            pad_token_id=pad_token_id,
            dtype=dtype,
            attention=attention,
        )
        # Not straight from the configuration: torch would draw every weight first, and transformers draw it again.
        model.to_empty(device=torch.get_default_device())
        model.init_weights()  # type: ignore[no-untyped-call]
        return model, heads
    config = load_config(
        path,
        num_labels=num_labels,
        regression=regression,
        # The tokenizer's, whatever the config says: decoders find the end of a text by it.
        pad_token_id=pad_token_id,
        attention=attention,
        trust_remote_code=trust_remote_code,
        download=True,
    )
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            resolve(path),
            config=config,
            dtype=getattr(torch, dtype),
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


def set_gradient_checkpointing(model: Any, on: bool) -> None:
    """Recompute activations, or no longer, of a model with adapters attached."""
    if on:
        checkpoint_gradients(model)
    elif any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        model.gradient_checkpointing_disable()


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


def check_length(model: PreTrainedModel, max_length: int) -> None:
    """Make sure that the model takes texts of ``max_length`` tokens.

    Raises:
        ValueError: It does not.
    """
    positions = num_positions(model)
    if positions and max_length > positions:
        raise ValueError(f"data.max_length is {max_length}, and the model takes {positions} tokens")


def loss_function(model: nn.Module, batch: Any) -> Tensor:
    """Mean loss of a batch, as the model's own head computes it."""
    loss: Tensor = model(**batch).loss
    return loss


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
