"""Attach adapters through PEFT, and list them as units in the order in which they run."""

from __future__ import annotations

import copy
import hashlib
import inspect
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from peft import (
    PeftConfig,
    PeftModel,
    PeftType,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from safe_lab.sharding import whole_weights
from safe_lab.suggest import did_you_mean
from safe_lab.units import Unit

log = logging.getLogger(__name__)

Granularity = Literal["layer", "module", "matrix"]


@dataclass(frozen=True)
class Attached:
    """A model with adapters.

    Attributes:
        model: The PEFT model.
        initial: Where attaching changed base weights (PiSSA, OLoRA, CorDA), the adapters' weights as they were then, else None:
            switching the adapters off does not give the pre-trained model back, and what is saved must be converted to load
            on it.
        base_fingerprint: Hash of all weights outside adapters and head, by which a resumed run knows its base again;
            of a model on ``meta``, which has none, it tells nothing.
    """

    model: PeftModel
    initial: Mapping[str, Tensor] | None
    base_fingerprint: str


def attach(model: nn.Module, config: PeftConfig) -> Attached:
    """Attach adapters; the base is frozen, what ``config.modules_to_save`` names (the task head) trains in full.

    Args:
        model: A ``transformers`` model; on ``meta``, to be attached to under ``torch.device("meta")``, for its shapes alone.
        config: PEFT's own, by hand or from :func:`build_peft_config`.

    Raises:
        ValueError: PEFT cannot attach the method, its targets match nothing, or it adds nothing that could freeze.
    """
    method, target_modules = (
        str(getattr(config.peft_type, "value", config.peft_type)).lower(),
        getattr(config, "target_modules", None),
    )
    before = _hashes(model)
    linear_names = sorted(
        {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    )
    try:
        with warnings.catch_warnings():
            # PEFT (0.21) asks for it by a name that transformers (5.23) is about to give up.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            attached = get_peft_model(model, config)
    except Exception as error:
        if "not found in the base model" not in str(error) and "No modules were targeted" not in str(error):
            # A regular expression that is none, an option of the wrong kind, a method that wants more than a config.
            raise ValueError(f"adapter: PEFT cannot attach {method}: {type(error).__name__}: {error}") from error
        wanted = [target_modules] if isinstance(target_modules, str) else sorted(target_modules or [])
        near = "".join(did_you_mean(name, linear_names) for name in wanted)
        raise ValueError(
            f"adapter.target_modules: {wanted or 'the choice of PEFT'} matches no module of {type(model).__name__}{near}; "
            f"its linear modules are {', '.join(linear_names)}"
        ) from None
    if not tuner_layers(attached):
        raise ValueError(
            f"adapter.method: {method} adds no adapter layers (BaseTunerLayer), so there is nothing to freeze one by one"
        )
    stray = [
        name
        for name, parameter in attached.named_parameters()
        if parameter.requires_grad and not _belongs(attached, name)
    ]
    if stray:
        raise ValueError(
            f"adapter: {len(stray)} weights outside adapters and head would train and never freeze, {stray[0]} among them; "
            "set adapter.options.bias to none or lora_only"
        )
    after = {key: hash_ for key, hash_ in _hashes(attached).items() if key in before}
    changed = any(before[key] != hash_ for key, hash_ in after.items())
    if changed and config.peft_type != PeftType.LORA:
        raise ValueError(
            f"adapter.method: {method} changes the base weights, and could not be loaded on the pre-trained model"
        )
    return Attached(
        model=attached,
        initial={key: tensor.clone() for key, tensor in get_peft_model_state_dict(attached).items()}
        if changed
        else None,
        base_fingerprint=hashlib.sha256(repr(list(after.values())).encode()).hexdigest(),
    )


def _hashes(model: nn.Module) -> dict[int, int]:
    """Hash of each weight by its identity; a weight on ``meta`` has no value, and 0 for a hash."""
    return {
        id(parameter): 0 if parameter.is_meta else int(torch.hash_tensor(parameter.detach()).item())
        for parameter in model.parameters()
    }


def _belongs(model: nn.Module, name: str) -> bool:
    """Whether a weight is of an adapter layer or of a module that trains in full."""
    parents = name.split(".")
    return any(
        isinstance(model.get_submodule(".".join(parents[:i])), BaseTunerLayer | AuxiliaryTrainingWrapper)
        for i in range(1, len(parents))
    )


def base_weights(model: nn.Module) -> list[str]:
    """Names of the pre-trained model's weights that stay as they are: in no adapter, nor in a module that trains in full."""
    return [
        name
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad and ("base_layer" in name.split(".") or not _belongs(model, name))
    ]


def build_peft_config(
    method: str,
    *,
    rank: int | None = None,
    alpha: float | None = None,
    dropout: float | None = None,
    target_modules: Sequence[str] | str | None = None,
    options: Mapping[str, Any] | None = None,
    head_modules: Sequence[str] = (),
) -> PeftConfig:
    """The PEFT config of a method, with our few common settings under the names that method gives them.

    Raises:
        ValueError: Unknown method or option, or a setting the method does not have.
    """
    by_name = {peft_type.value.lower(): config for peft_type, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    name = method.lower().replace("-", "_")
    if name not in by_name:
        raise ValueError(
            f"adapter.method: PEFT has no method {method!r}{did_you_mean(name, by_name)}; it has {', '.join(sorted(by_name))}"
        )
    config_class = by_name[name]
    known = set(inspect.signature(config_class).parameters)
    if alpha is not None and float(alpha).is_integer():
        alpha = int(alpha)  # as PEFT's configs declare it
    settings: list[tuple[str, Any, tuple[str, ...]]] = [
        ("rank", rank, ("r", "rank")),
        ("alpha", alpha, ("lora_alpha", "alpha", f"{name}_alpha")),
        ("dropout", dropout, ("lora_dropout", "dropout", f"{name}_dropout", "module_dropout")),
        (
            "target_modules",
            list(target_modules) if isinstance(target_modules, tuple) else target_modules,
            ("target_modules",),
        ),
        ("head_modules", list(head_modules) or None, ("modules_to_save",)),
    ]
    arguments: dict[str, Any] = {"task_type": "SEQ_CLS"}
    for setting, value, names in settings:
        if value is None:
            continue
        key = next((candidate for candidate in names if candidate in known), None)
        if key is None and setting == "head_modules":
            raise ValueError(f"adapter.method: {name} cannot train a task head beside it")
        if key is None:
            raise ValueError(f"adapter.{setting}: method {name} has no such setting; leave it out (null)")
        arguments[key] = value
    for key, value in (options or {}).items():
        if key not in known:
            raise ValueError(
                f"adapter.options.{key}: {config_class.__name__} has no such argument{did_you_mean(key, known)}"
            )
        if key in arguments:
            raise ValueError(f"adapter.options.{key}: already set, by the adapter section or the task")
        arguments[key] = value
    if arguments.get("init_lora_weights") in ("eva", "lora_ga"):
        raise ValueError(
            f"adapter.options.init_lora_weights: {arguments['init_lora_weights']} is computed from data by a pass of its own, "
            "which is not made here; it would be plain LoRA"
        )
    try:
        return config_class(**arguments)
    except Exception as error:  # noqa: BLE001 - the configs check their arguments each in its own way
        raise ValueError(f"adapter: {config_class.__name__} refuses its arguments: {error}") from None


def tuner_layers(model: nn.Module) -> dict[str, Any]:
    """The adapter layers of a model by qualified name (each an ``nn.Module`` and a ``BaseTunerLayer``)."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def affine_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The adapter layers that compute an affine function of their input, of shape (examples, tokens, features), by name."""
    return {
        name: layer
        for name, layer in tuner_layers(model).items()
        if isinstance(layer.get_base_layer(), nn.Linear | Conv1D)
    }


def find_units(model: nn.Module, forward: Callable[[], object], granularity: Granularity = "layer") -> list[Unit]:
    """List the adapters of a PEFT model as units, in the order in which they run.

    The order is the one of a forward pass, not of names: a unit stands where its first adapter layer runs first. A layer is
    what the outermost ``nn.ModuleList`` on the way to an adapter holds; an adapter outside of any list (on the embeddings,
    say) is a unit of its own.

    Args:
        model: A model with PEFT adapter layers.
        forward: Runs the model once, on any batch.
        granularity: ``layer``: all adapters of a layer; ``module``: one adapted module; ``matrix``: one adapter weight.

    Raises:
        ValueError: There is no trainable adapter weight, or none of the adapters ran.
    """
    layers = tuner_layers(model)
    order = _execution_order(layers, forward)
    idle = [name for name in layers if name not in order]
    if idle:
        log.warning("%d adapter(s) never run in a forward pass and are left out: %s", len(idle), ", ".join(idle[:3]))
        for name in idle:
            layers[name].requires_grad_(False)
    modules = dict(model.named_modules())
    groups: dict[str, list[str]] = {}
    for name in order:
        site = _enclosing_layer(modules, name) if granularity == "layer" else name
        groups.setdefault(site, []).append(name)
    units: list[Unit] = []
    for site, members in groups.items():
        parameters = {
            f"{name}.{key}": parameter
            for name in members
            for key, parameter in layers[name].named_parameters()
            if parameter.requires_grad
        }
        member_layers = [layers[name] for name in members]
        off, read_at = partial(switched_off, member_layers), modules[site]
        if granularity == "matrix":
            for key, parameter in parameters.items():
                units.append(Unit(_short(key), len(units), {key: parameter}, read_at, off))
        elif parameters:
            units.append(Unit(_short(site), len(units), parameters, read_at, off, _delta_weights(member_layers)))
    if not units:
        raise ValueError(
            "the model has no adapter weights to freeze: none is trainable, or none runs in a forward pass"
        )
    return units


def save_adapter(model: PeftModel, folder: Path, *, initial: Mapping[str, Tensor] | None = None) -> None:
    r"""Write adapters and head in PEFT's format, so that ``PeftModel.from_pretrained`` loads them on the pre-trained base.

    Where attaching took :math:`s B_0 A_0` out of the base (PiSSA, NeurIPS 2024, section 3), the update of the pre-trained
    weight is a plain LoRA of twice the rank:

    .. math:: \Delta W = s\,(B A - B_0 A_0) = s\,[B\;\; {-B_0}]\,[A;\; A_0]

    Deviation: PEFT's own conversion (0.21) loses the head.

    Args:
        model: The trained model.
        folder: Where to write.
        initial: :attr:`Attached.initial`.
    """
    if initial is None:
        # The base's embeddings do not train, and a process may have but a part of them.
        model.save_pretrained(str(folder), save_embedding_layers=False)
        return
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    for key in weights:
        if ".lora_A." in key or ".lora_embedding_A" in key:
            weights[key] = torch.cat([weights[key], initial[key].to(weights[key])], dim=0)
        elif ".lora_B." in key or ".lora_embedding_B" in key:
            weights[key] = torch.cat([weights[key], -initial[key].to(weights[key])], dim=1)
    config: Any = copy.deepcopy(model.peft_config["default"])
    # alpha / r, or alpha / sqrt(r) with rsLoRA, must stay what it was in training.
    alpha_factor = math.sqrt(2) if config.use_rslora else 2
    config.init_lora_weights = True
    config.r, config.lora_alpha = 2 * config.r, alpha_factor * config.lora_alpha
    config.rank_pattern = {name: 2 * rank for name, rank in config.rank_pattern.items()}
    config.alpha_pattern = {name: alpha_factor * alpha for name, alpha in config.alpha_pattern.items()}
    config.inference_mode = True
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {key: tensor.detach().contiguous() for key, tensor in weights.items()}, folder / "adapter_model.safetensors"
    )
    config.save_pretrained(str(folder))


def load_adapter(model: PeftModel, folder: Path, *, initial: Mapping[str, Tensor] | None = None) -> None:
    """Load what :func:`save_adapter` has written into a model to which the same adapters were attached anew.

    Args:
        model: As :func:`attach` gives it.
        folder: Where it was written.
        initial: :attr:`Attached.initial`.

    Raises:
        ValueError: There is no adapter, it is damaged, it is of another model or other adapters, or attaching has changed the
            base weights otherwise than it did then.
    """
    path = folder / "adapter_model.safetensors"
    try:
        weights = load_file(path)
    except Exception as error:  # noqa: BLE001 - of a missing or damaged file the library raises what it likes
        raise ValueError(f"{path}: there is no whole adapter ({error})") from None
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    if initial is not None:
        weights = {key: _trained_part(key, tensor, initial) for key, tensor in weights.items()}
    if weights.keys() != expected.keys():
        other = sorted(weights.keys() ^ expected.keys())
        raise ValueError(f"{path}: the adapter has other weights than the configuration's model, {other[0]} among them")
    for key, tensor in weights.items():
        if tensor.shape != expected[key].shape:
            raise ValueError(
                f"{path}: {key} has the shape {tuple(tensor.shape)}, and the configuration's model {tuple(expected[key].shape)}"
            )
    set_peft_model_state_dict(model, weights)


def _trained_part(key: str, tensor: Tensor, initial: Mapping[str, Tensor]) -> Tensor:
    """Of the doubled LoRA that :func:`save_adapter` makes, the factor that was trained; the other one is checked."""
    if ".lora_A." in key or ".lora_embedding_A" in key:
        trained, start = tensor.chunk(2, dim=0)
    elif ".lora_B." in key or ".lora_embedding_B" in key:
        trained, start = tensor.chunk(2, dim=1)
        start = -start
    else:
        return tensor
    if not torch.allclose(start, initial[key].to(start), rtol=1e-3, atol=1e-5):
        raise ValueError(
            f"{key}: attaching has changed the base weights otherwise than it did in training (another machine or version?)"
        )
    return trained.contiguous()


def _execution_order(layers: Mapping[str, nn.Module], forward: Callable[[], object]) -> list[str]:
    order: dict[str, None] = {}

    def record(name: str) -> Callable[..., None]:
        return lambda module, inputs: order.setdefault(name)

    hooks = [layer.register_forward_pre_hook(record(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    return list(order)


def _enclosing_layer(modules: Mapping[str, nn.Module], name: str) -> str:
    parts = name.split(".")
    for i in range(1, len(parts)):
        if isinstance(modules[".".join(parts[:i])], nn.ModuleList):
            return ".".join(parts[: i + 1])
    return name


def _short(name: str) -> str:
    """A name as in the base model, without PEFT's wrappers."""
    return name.removeprefix("base_model.model.")


@contextmanager
def switched_off(layers: Sequence[Any]) -> Iterator[None]:
    """Inside, these adapter layers run their base layer alone; nothing else of them changes."""
    # Not enable_adapters(False): on the way back it turns requires_grad on for frozen adapters too (peft 0.21).
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled


def _delta_weights(layers: Sequence[Any]) -> Callable[[], Iterator[Tensor]] | None:
    def deltas() -> Iterator[Tensor]:
        for layer in layers:
            for adapter in layer.active_adapters:
                yield _delta_weight(layer, adapter).detach()

    # DoRA's magnitudes and trained biases are no part of what get_delta_weight gives.
    trained = [name for layer in layers for name, parameter in layer.named_parameters() if parameter.requires_grad]
    if any("magnitude" in name or name.endswith("bias") for name in trained):
        return None
    try:
        return deltas if all(isinstance(delta, Tensor) for delta in deltas()) else None
    # No such form (IA3), or another one (BOFT's rotation), or one that wants the base weight (MiSS).
    except (AttributeError, NotImplementedError, TypeError):
        return None


def _delta_weight(layer: Any, adapter: str) -> Any:
    try:
        return layer.get_delta_weight(adapter)
    except RuntimeError:
        # The update of some methods (PEANuT, DEFT) depends on the base weight, of which this process may have but a part.
        with whole_weights(layer.get_base_layer()):
            return layer.get_delta_weight(adapter)
