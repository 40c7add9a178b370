"""A model as it must be to be differentiated twice, for the time that takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from safe_lab.importance.probe import undisturbed
from safe_lab.sharding import is_sharded

# Attention that has a second derivative: by matrix products (torch 2.13; sdpa under SDPBackend.MATH).
_TWICE_DIFFERENTIABLE = ("eager", "sdpa")


@contextmanager
def twice_differentiable(model: nn.Module, dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Inside, the model runs without dropout, in ``dtype`` at least, and its loss can be differentiated twice.

    On leaving, everything is as it was, to the bit: weights and buffers, train mode, ``requires_grad``, ``grad``, the attention
    implementation, autocast, and the random streams.

    Attention runs by matrix products, since the fused kernels' backward pass cannot be differentiated. Weights of less precision
    than ``dtype`` have a wider copy for the time (:func:`is_widened`). One thing does not come back where they do: torch (2.13)
    gives them new gradient accumulators, on whose old ones DDP has its hooks, so that it must be wrapped anew.

    Args:
        model: The model.
        dtype: float32 or float64.

    Raises:
        ValueError: The base weights are quantised, or spread over processes.
    """
    if is_sharded(model):
        raise ValueError(
            "sharpness cannot be measured while FSDP spreads the weights over processes, which keeps no second derivative: "
            "measure the finished run with safe-lab sharpness"
        )
    quantised = next((name for name, parameter in model.named_parameters() if _is_quantised(parameter)), None)
    if quantised is None and getattr(model, "hf_quantizer", None) is not None:
        # GPTQ and AWQ keep their integers in buffers.
        quantised = type(model.hf_quantizer).__name__
    if quantised is not None:
        raise ValueError(
            f"sharpness needs second derivatives, and the base weights are quantised ({quantised}): they have none; load the "
            "base in float32 or bfloat16"
        )
    with ExitStack() as stack:
        stack.enter_context(undisturbed(model))
        stack.enter_context(_other_attention(model))
        stack.enter_context(_widened(model, dtype))
        stack.enter_context(_without_autocast(model))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def is_widened(model: nn.Module, dtype: torch.dtype) -> bool:
    """Whether :func:`twice_differentiable` widens any weight."""
    return bool(_narrow(model, dtype))


def _narrow(model: nn.Module, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    return [
        (tensor, tensor.data)
        for tensor in (*model.parameters(), *model.buffers())
        if tensor.is_floating_point() and torch.promote_types(tensor.dtype, dtype) != tensor.dtype
    ]


@contextmanager
def _widened(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    narrow = _narrow(model, dtype)
    try:
        for tensor, data in narrow:
            tensor.data = data.to(dtype)
        yield
    finally:
        for tensor, data in narrow:
            tensor.data = data


@contextmanager
def _without_autocast(model: nn.Module) -> Iterator[None]:
    # Accelerate puts autocast into a forward of the instance's own, and keeps the other one (1.15).
    original = vars(model).get("_original_forward")
    wrapped = vars(model).get("forward")
    if original is not None and wrapped is not None:
        model.forward = original
    try:
        with torch.autocast(next(model.parameters()).device.type, enabled=False):
            yield
    finally:
        if original is not None and wrapped is not None:
            model.forward = wrapped


@contextmanager
def _other_attention(model: nn.Module) -> Iterator[None]:
    configs: list[tuple[Any, str]] = []
    for module in model.modules():
        config = getattr(module, "config", None)
        name = getattr(config, "_attn_implementation", None)
        if isinstance(name, str) and name not in _TWICE_DIFFERENTIABLE:
            configs.append((config, name))
    try:
        for config, _ in configs:
            # Read by each layer at every pass (transformers 5).
            config._attn_implementation = "eager"
        yield
    finally:
        for config, name in reversed(configs):
            config._attn_implementation = name


def _is_quantised(parameter: nn.Parameter) -> bool:
    # bitsandbytes' own classes, torchao's tensor subclasses, and whatever keeps integers.
    return (
        not parameter.is_floating_point()
        or type(parameter).__name__ in ("Params4bit", "Int8Params")
        or type(parameter.data) is not Tensor
    )
