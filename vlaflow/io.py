"""The files of a checkpoint: read strictly, and tensors written one at a time. ``outputs`` is about writing in general.

JSON and safetensors only; nothing that is read is ever executed. torch is imported when weights are read, so that workers that
record need not load it.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

from vlaflow.errors import CheckpointError
from vlaflow.strict import read_object
from vlaflow.text import one_line, shown

if TYPE_CHECKING:
    import torch
    from torch import Tensor

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
CHECKSUM = "crc32"
"""Key in the header of a safetensors file: CRC-32 of the file with eight zeros in its place, as eight hexadecimal digits."""
_TYPES = {name: kind for kind, name in STORED.items()} | {"C64": "complex64", "F8_E4M3": "float8_e4m3fn"}


def load_weights(model: torch.nn.Module, file: Path) -> None:
    """Load the weights of a model, strictly.

    The model's types are kept: bfloat16 weights open exactly in a float32 network, and float32 weights are rounded where the
    config asks for a bfloat16 one. Tensors of any other type are refused unless it is the model's own.

    Raises:
        CheckpointError: naming a tensor that is missing, unknown, of another shape or type, or not finite.
    """
    require_described(model.state_dict(), stored_tensors(file), file)
    weights = read_weights(file)
    require_finite(weights, file)
    model.load_state_dict(weights)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, by the file's header.

    Args:
        dtype: its type as torch names it, or as safetensors does where torch has none of ``STORED``.
        shape: its shape.
    """

    dtype: str
    shape: tuple[int, ...]


def stored_tensors(file: Path) -> dict[str, StoredTensor]:
    """What the header of a safetensors file says, compared with the size of the file; no tensor is read.

    Raises:
        CheckpointError: for a missing or damaged file.
    """
    from safetensors import safe_open

    with _reading(file), safe_open(file, framework="numpy") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 — it is no mapping
        return {
            name: StoredTensor(_TYPES.get(each.get_dtype(), each.get_dtype()), tuple(each.get_shape()))
            for name, each in slices.items()
        }


def require_described(own: Mapping[str, Tensor], stored: Mapping[str, StoredTensor], file: Path) -> None:
    """Refuse a file with tensors of other names, shapes or types than those of the networks that its config describes.

    Raises:
        CheckpointError: naming one of them.
    """
    for name in own.keys() - stored.keys():
        raise CheckpointError(f"{file} lacks '{name}', which config.json requires; they belong to different checkpoints.")
    for name in stored.keys() - own.keys():
        raise CheckpointError(
            f"{file} holds {shown(name)}, which config.json does not describe; the two belong to different checkpoints."
        )
    for name, found in stored.items():
        if found.shape != tuple(own[name].shape):
            raise CheckpointError(
                f"'{name}' in {file} has shape {found.shape}, but config.json requires {tuple(own[name].shape)}."
            )
        if found.dtype != _short(own[name].dtype) and not {found.dtype, _short(own[name].dtype)} <= WEIGHTS:
            raise CheckpointError(
                f"'{name}' in {file} is of type {found.dtype}, but the network's is {_short(own[name].dtype)}. Save "
                "the checkpoint with its own types; quantised ones cannot be opened."
            )


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, as they were saved.

    Raises:
        CheckpointError: for a missing or damaged file.
    """
    from safetensors.torch import load_file

    require_undamaged(file)
    with _reading(file):
        return load_file(file)


def require_undamaged(file: Path) -> None:
    """Refuse a safetensors file with other bytes than ``save_tensors`` wrote; one without its checksum is not looked at.

    A flipped bit mostly leaves a finite number, which nothing else would notice. It takes 30 ms per 100 MB, where
    SHA-256 takes 80 and BLAKE2 150.

    Raises:
        CheckpointError: it is missing, damaged or was changed.
    """
    from safetensors import safe_open

    with _reading(file):
        with safe_open(file, framework="numpy") as opened:
            stated = (opened.metadata() or {}).get(CHECKSUM)
        if stated is None:
            return
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            start = 8 + int.from_bytes(content[:8], "little")
            found = crc32(content[:start].replace(_entry(stated), _entry(_BLANK), 1))
            with memoryview(content) as whole, whole[start:] as tensors:
                found = crc32(tensors, found)
    if f"{found:08x}" != stated:
        raise CheckpointError(
            f"{file} is not as it was saved (its checksum is {found:08x}, not {shown(stated)}): it is damaged, or another "
            f"program changed it. Copy it again; if the change is meant, save it without '{CHECKSUM}' in its metadata."
        )


_BLANK = "0" * 8


def _entry(checksum: str) -> bytes:
    """As it stands in the header."""
    return f'"{CHECKSUM}":"{checksum}"'.encode()


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turn what safetensors raises about a missing or damaged file into a ``CheckpointError``."""
    from safetensors import SafetensorError

    if not file.is_file():
        raise CheckpointError(f"{file} is missing; the checkpoint is incomplete. Copy the whole folder.")
    try:
        yield
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{file} cannot be read ({one_line(str(error))}); the file is damaged. Copy it again.") from error


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
    """Write a safetensors file, one tensor in memory at a time.

    The bytes are those of ``safetensors.torch.save_file`` with a ``CHECKSUM``, which ``require_undamaged`` compares.

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
    header: dict[str, Any] = {"__metadata__": {CHECKSUM: _BLANK, **(about or {})}}
    end = 0
    for name in names:
        start, end = end, end + like[name].numel() * like[name].element_size()
        shape, kind = list(like[name].shape), STORED[_short(like[name].dtype)]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    text = len(text).to_bytes(8, "little") + text
    checksum = crc32(text)
    with file.open("wb") as out:
        out.write(text)
        for name in names:
            tensor = (tensors if name in tensors else like)[name].detach().cpu().contiguous()
            if (tensor.shape, tensor.dtype) != (like[name].shape, like[name].dtype):
                raise ValueError(f"'{name}' is not of the shape and type it was announced with.")
            if tensor.numel():
                data = tensor.reshape(-1).view(torch.uint8).numpy().data
                checksum = crc32(data, checksum)
                out.write(data)
        out.seek(text.index(_entry(_BLANK)))
        out.write(_entry(f"{checksum:08x}"))


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
    return read_object(file, CheckpointError, "the file is damaged.")
