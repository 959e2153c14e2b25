"""The files of a checkpoint: read strictly, and tensors written one at a time. ``outputs`` is about writing in general.

JSON and safetensors only; nothing that is read is ever executed. torch is imported when weights are read, so that workers that
record need not load it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlaflow.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

WEIGHTS = {"float32", "bfloat16", "float16"}
"""Weight types that are converted to each other; the config says which one a network computes in."""

STORED = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "int16": "I16",
    "float16": "F16",
    "bfloat16": "BF16",
    "int32": "I32",
    "float32": "F32",
    "float64": "F64",
    "int64": "I64",
}
"""Tensor types and their names in safetensors files, in the order that safetensors sorts them, smallest first."""


def load_weights(model: nn.Module, file: Path) -> None:
    """Load the weights of a model, strictly.

    The model's types are kept: bfloat16 weights open exactly in a float32 network, and float32 weights are rounded where the
    config asks for a bfloat16 one. Tensors of any other type are refused unless it is the model's own.

    Raises:
        CheckpointError: naming a tensor that is missing, unknown, of another shape or type, or not finite.
    """
    weights, own = read_weights(file), model.state_dict()
    for name in own.keys() - weights.keys():
        raise CheckpointError(f"{file} lacks '{name}', which config.json requires; they belong to different checkpoints.")
    for name in weights.keys() - own.keys():
        raise CheckpointError(
            f"{file} holds '{name}', which config.json does not describe; the two belong to different checkpoints."
        )
    for name, tensor in weights.items():
        if tensor.shape != own[name].shape:
            raise CheckpointError(
                f"'{name}' in {file} has shape {tuple(tensor.shape)}, but config.json requires {tuple(own[name].shape)}."
            )
        if tensor.dtype != own[name].dtype and not {_short(tensor.dtype), _short(own[name].dtype)} <= WEIGHTS:
            raise CheckpointError(
                f"'{name}' in {file} is of type {_short(tensor.dtype)}, but the network's is {_short(own[name].dtype)}. Save "
                "the checkpoint with its own types; quantised ones cannot be opened."
            )
    require_finite(weights, file)
    model.load_state_dict(weights)


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, unchecked.

    Raises:
        CheckpointError: for a missing or damaged file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not file.exists():
        raise CheckpointError(f"{file} is missing; the checkpoint is incomplete. Copy the whole folder.")
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); the file is damaged. Copy it again.") from error


def require_finite(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Refuse a file with a tensor that contains NaN or an infinite value.

    Raises:
        CheckpointError: naming the first such tensor.
    """
    if name := first_not_finite(tensors):
        raise CheckpointError(
            f"'{name}' in {file} contains NaN or an infinite value, so the network cannot be used: the training diverged "
            "or the file is damaged. Use an earlier checkpoint, or train again with a lower learning rate."
        )


def save_tensors(
    file: Path,
    tensors: Mapping[str, Tensor],
    *,
    like: Mapping[str, Tensor] | None = None,
    about: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file, one tensor in memory at a time; the bytes are those of ``safetensors.torch.save_file``.

    Args:
        file: where to.
        tensors: by name, on any device; a mapping may make each when it is asked for.
        like: all names to write, with tensors of the same shape and type, which are written where ``tensors`` has none; by
            default ``tensors`` are all.
        about: text for the header.
    """
    import torch

    like = tensors if like is None else like
    names = sorted(like, key=lambda name: (-list(STORED).index(_short(like[name].dtype)), name))
    header: dict[str, Any] = {"__metadata__": dict(about)} if about else {}
    end = 0
    for name in names:
        start, end = end, end + like[name].numel() * like[name].element_size()
        shape, kind = list(like[name].shape), STORED[_short(like[name].dtype)]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = (tensors if name in tensors else like)[name].detach().cpu().contiguous()
            if (tensor.shape, tensor.dtype) != (like[name].shape, like[name].dtype):
                raise ValueError(f"'{name}' is not of the shape and type it was announced with.")
            if tensor.numel():
                out.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of the first tensor that contains NaN or an infinite value, or None."""
    import torch

    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            low, high = torch.aminmax(tensor.detach())  # one pass without a copy; NaN wins in both
            if not (low.isfinite() and high.isfinite()):
                return name
    return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; a missing or damaged file is a ``CheckpointError``."""
    if not file.exists():
        raise CheckpointError(f"{file} is missing; {file.parent} is not a complete checkpoint.")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also text that is not UTF-8, and numbers of thousands of digits
        raise CheckpointError(f"{file} is not valid JSON ({error}); the file is damaged.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} contains a {type(found).__name__} instead of an object; the file is damaged.")
    return found
