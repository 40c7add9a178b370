"""The rows of a batch: their content, their lengths, and some of them on their own."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from safe_lab.importance.probe import Batch

# Tokens to a multiple of which rows are padded where their activations are computed.
MULTIPLE = 16


def round_up(tokens: float) -> int:
    """The multiple of :data:`MULTIPLE` to which so many tokens are padded.

    >>> round_up(16), round_up(17)
    (16, 32)
    """
    return math.ceil(tokens / MULTIPLE) * MULTIPLE


def make_keys(inputs: Batch) -> list[bytes]:
    """The identity of each row: a hash of its content without padding, which must be on the right.

    Args:
        inputs: A batch; its tensors (B, T) count, but for the mask, and its labels (B,) do not.
    """
    names = [name for name in sorted(inputs) if name != "attention_mask" and inputs[name].dim() > 1]
    arrays = [(name.encode(), inputs[name].cpu().numpy()) for name in names]
    keys = []
    for row, tokens in enumerate(count_tokens(inputs)):
        digest = hashlib.blake2b(digest_size=16)
        for name, array in arrays:
            digest.update(name)
            digest.update(array[row, :tokens].tobytes())
        keys.append(digest.digest())
    return keys


def count_tokens(inputs: Batch) -> list[int]:
    """Tokens of each row, padding left out."""
    mask = inputs.get("attention_mask")
    if mask is None:
        rows, columns = inputs["input_ids"].shape
        return [columns] * rows
    counts: list[int] = (mask != 0).sum(1).tolist()
    return counts


def is_padded_on_the_right(inputs: Batch) -> bool:
    """Whether no row has padding before or between its tokens."""
    mask = inputs.get("attention_mask")
    return mask is None or bool((mask[:, 1:] <= mask[:, :-1]).all())


def make_ragged(batch: Batch, *, pad_token_id: int = 0, most_tokens: int | None = None) -> dict[str, Tensor]:
    """A batch whose rows are of unequal length and whose width is no multiple of :data:`MULTIPLE`, as batches come in training.

    Row i loses the i tokens before its last one, which a head may look for, and a column or two of padding is added.

    Args:
        batch: Tensors (B, T) padded on the right, and others, which stay as they are. Without an ``attention_mask`` all stay.
        pad_token_id: What ``input_ids`` are padded with.
        most_tokens: Longest row that the model takes; None: any length.
    """
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    if mask is None or not is_padded_on_the_right(batch):
        return dict(batch)
    columns = ids.shape[1] + (2 if (ids.shape[1] + 1) % MULTIPLE == 0 else 1)
    columns = min(columns, most_tokens) if most_tokens else columns
    before = count_tokens(batch)
    lengths = [max(1, tokens - row) for row, tokens in enumerate(before)]
    kept = torch.arange(columns, device=ids.device) < torch.tensor(lengths, device=ids.device)[:, None]
    ragged = dict(batch)
    for name, tensor in batch.items():
        if tensor.shape == ids.shape:
            fill = pad_token_id if name == "input_ids" else 0
            wide = torch.nn.functional.pad(tensor[:, :columns], (0, max(0, columns - ids.shape[1])), value=fill)
            ragged[name] = wide.masked_fill(~kept, fill)
            for row, length in enumerate(lengths):
                ragged[name][row, length - 1] = tensor[row, before[row] - 1]
    return ragged


def select_rows(
    inputs: Batch, rows: Sequence[int], *, pad_token_id: int = 0, most_tokens: int | None = None
) -> dict[str, Tensor]:
    """Some rows of a batch, padded to a multiple of :data:`MULTIPLE` tokens.

    Args:
        inputs: Tensors (B, T), padded on the right.
        rows: Which rows.
        pad_token_id: What ``input_ids`` are padded with.
        most_tokens: Longest row that the model takes; None: any length. Padding goes no further, and tokens are never cut.

    Returns:
        The tensors (rows, T'), an ``attention_mask`` among them.
    """
    device, counts = inputs["input_ids"].device, count_tokens(inputs)
    lengths = torch.tensor([counts[i] for i in rows], device=device)
    longest = max(1, int(lengths.max()))
    columns = round_up(longest)
    columns = max(min(columns, most_tokens), longest) if most_tokens else columns
    index = torch.tensor(rows, device=device)
    selected = {}
    for name, tensor in inputs.items():
        if name != "attention_mask":
            cut = tensor[index, :columns]
            fill = pad_token_id if name == "input_ids" else 0
            selected[name] = torch.nn.functional.pad(cut, (0, columns - cut.shape[1]), value=fill)
    mask = torch.arange(columns, device=device) < lengths[:, None]
    selected["attention_mask"] = mask.to(inputs.get("attention_mask", inputs["input_ids"]).dtype)
    return selected
