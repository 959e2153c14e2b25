"""Reading and writing the files of a checkpoint folder, strictly. JSON and safetensors only; nothing is executed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vlaflow.errors import CheckpointError

WEIGHTS = (torch.float32, torch.bfloat16, torch.float16)
"""Types of weights that are converted into each other; the config says which a network computes in."""


def load_weights(model: nn.Module, file: Path) -> None:
    """Fill a model, strictly.

    The model's types are kept: bfloat16 weights open exactly in a float32 network, and float32 weights are rounded where the
    config asks for a bfloat16 one. Tensors of any other type are refused unless it is the model's own.

    Raises:
        CheckpointError: naming missing or unknown tensors, or those of another shape or type, or with values not finite.
    """
    if not file.exists():
        raise CheckpointError(f"{file} is missing; the checkpoint is incomplete. Copy the whole folder.")
    try:
        weights = load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); the file is damaged. Copy it again.") from error
    own = model.state_dict()
    for name in own.keys() - weights.keys():
        raise CheckpointError(f"{file} lacks '{name}', which config.json asks for; they belong to different checkpoints.")
    for name in weights.keys() - own.keys():
        raise CheckpointError(
            f"{file} holds '{name}', which config.json does not know; the two belong to different checkpoints."
        )
    for name, tensor in weights.items():
        if tensor.shape != own[name].shape:
            raise CheckpointError(
                f"'{name}' in {file} has shape {tuple(tensor.shape)}, config.json asks for {tuple(own[name].shape)}."
            )
        if tensor.dtype != own[name].dtype and not {tensor.dtype, own[name].dtype} <= set(WEIGHTS):
            raise CheckpointError(
                f"'{name}' in {file} is of type {_short(tensor.dtype)}, the network's is {_short(own[name].dtype)}. Save the "
                "checkpoint with its own types; quantised ones cannot be opened."
            )
    require_finite(weights, file)
    model.load_state_dict(weights)


def require_finite(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Refuse tensors that a file holds with NaN or an infinite value.

    Raises:
        CheckpointError: naming the first.
    """
    if name := first_not_finite(tensors):
        raise CheckpointError(
            f"'{name}' in {file} holds NaN or an infinite value, so nothing could be computed with it: the training diverged "
            "or the file is damaged. Take an earlier checkpoint, or train again with a lower learning rate."
        )


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of the first tensor that holds NaN or an infinite value, or None."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            low, high = torch.aminmax(tensor.detach())  # one pass without a copy; NaN wins in both
            if not (low.isfinite() and high.isfinite()):
                return name
    return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object, or one sentence about the file."""
    if not file.exists():
        raise CheckpointError(f"{file} is missing; {file.parent} is not a complete checkpoint.")
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}); the file is damaged.") from error


def write_json(file: Path, data: object) -> None:
    """Indented, with a final newline."""
    file.write_text(json.dumps(data, indent=2) + "\n")
