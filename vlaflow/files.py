"""Reading and writing the files of a checkpoint folder, strictly. JSON and safetensors only; nothing is executed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from vlaflow.errors import CheckpointError


def load_weights(model: nn.Module, file: Path) -> None:
    """Fill a model, strictly.

    Raises:
        CheckpointError: naming missing, unknown or misshapen tensors.
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
    model.load_state_dict(weights)


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
