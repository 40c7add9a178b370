"""The optimizer of a run."""

from __future__ import annotations

import torch
from torch import nn

from safe_lab.config import TrainingSection


def build_optimizer(model: nn.Module, settings: TrainingSection) -> torch.optim.AdamW:
    """AdamW over what trains; vectors (biases, norms, magnitudes) are not decayed."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trainable if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        # One kernel for all weights: a quarter of the time on CPU, and no copies of what trains on CUDA.
        fused=True,
    )
