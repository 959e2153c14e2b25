"""Weights that are read later: parameters without memory, which know in which file they lie.

Processes that are going to share a network (``training.sharding``) do not need it whole first. While ``shared_later`` holds,
networks are built without memory where their weights lie in files, of which each process reads its own rows afterwards. What is
drawn at random has memory in the first process alone, which sends it to the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vlaflow.errors import CheckpointError
from vlaflow.io import STORED
from vlaflow.nn.meta import Undrawn

_FIRST: ContextVar[bool | None] = ContextVar("first", default=None)
_PLACE = "vlaflow_stored"
"""Attribute of a parameter."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file.

    Args:
        file: the file.
        name: of the tensor in it.
        shape: of the tensor.
        dtype: name of its type in the file, such as "F32".
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def rows(self, first: int, last: int) -> Tensor:
        """Rows from ``first`` up to ``last``, which may be none; the whole of a scalar.

        Raises:
            CheckpointError: the file is gone or damaged.
        """
        if first == last:
            return self.rows(0, 1)[:0]  # the library takes no empty slice
        try:
            with safe_open(self.file, framework="pt") as handle:
                return handle.get_slice(self.name)[first:last] if self.shape else handle.get_tensor(self.name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.file} cannot be read ({error}). Copy it again.") from error

    def whole(self) -> Tensor:
        """All rows."""
        return self.rows(0, self.shape[0] if self.shape else 1)


def stored_in(files: Iterable[Path]) -> dict[str, Stored]:
    """All tensors of some files, by their names there; only headers are read.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    found = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 — it is no mapping
                    part = handle.get_slice(name)
                    found[name] = Stored(file, name, tuple(part.get_shape()), part.get_dtype())
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file} cannot be read ({error}). Copy it again.") from error
    return found


@contextmanager
def shared_later(first: bool | None) -> Iterator[None]:
    """A context in which networks are built to be shared by processes afterwards.

    Args:
        first: whether this process is the first one; None where nothing will be shared.
    """
    token = _FIRST.set(first)
    try:
        yield
    finally:
        _FIRST.reset(token)


def is_shared_later() -> bool:
    """Whether networks are being built to be shared by processes."""
    return _FIRST.get() is not None


def is_sent() -> bool:
    """Whether this process is sent the weights that lie in no file."""
    return _FIRST.get() is False


def drawing() -> AbstractContextManager[object]:
    """A context for weights that are drawn at random: without memory in a process that is sent them."""
    return without_memory() if is_sent() else nullcontext()


@contextmanager
def without_memory() -> Iterator[None]:
    """A context in which modules get parameters without memory; their buffers are as always.

    Not for several threads that build networks at a time.
    """
    register = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None and not parameter.is_meta:
            empty = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
            module._parameters[name] = empty

    nn.Module.register_parameter = register_empty  # type: ignore[method-assign, assignment]
    try:
        with Undrawn():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def missing(module: nn.Module, places: Mapping[str, Stored]) -> str | None:
    """The first parameter or persistent buffer for which there is no tensor of its shape; None if there is one for each."""
    wanted = _kept(module).items()
    return next((n for n, tensor in wanted if n not in places or places[n].shape != tuple(tensor.shape)), None)


def lay(module: nn.Module, places: Mapping[str, Stored]) -> None:
    """Tell the parameters of a module where they lie, by name, and read its persistent buffers, which are small."""
    for name, tensor in _kept(module).items():
        if tensor.is_meta:
            setattr(tensor, _PLACE, places[name])
        else:
            tensor.data.copy_(places[name].whole())


def lay_as(module: nn.Module, other: nn.Module) -> None:
    """Tell a module's parameters that they lie where those of another module of the same names do."""
    theirs = _kept(other)
    for name, tensor in _kept(module).items():
        setattr(tensor, _PLACE, place_of(theirs[name]))


def place_of(tensor: Tensor) -> Stored | None:
    """Where a parameter without memory lies; None for any other tensor."""
    return getattr(tensor, _PLACE, None) if tensor.is_meta else None


def rows_of(parameter: Tensor, id_N: Tensor) -> Tensor:
    """Rows of a parameter, read from its file where it has no memory."""
    place = place_of(parameter)
    if place is None or not id_N.numel():
        return parameter[id_N]
    first, last = int(id_N.min()), int(id_N.max()) + 1
    return place.rows(first, last)[id_N - first].to(parameter.dtype)


@torch.no_grad()
def read_here(module: nn.Module) -> None:
    """Give all parameters that lie in files their memory and values in this process."""
    for part in module.modules():
        for own in (part._parameters, part._buffers):
            for name, tensor in own.items():
                if tensor is not None and (place := place_of(tensor)) is not None:
                    value = place.whole().to(tensor.dtype)
                    if isinstance(tensor, nn.Parameter):
                        value = nn.Parameter(value, requires_grad=tensor.requires_grad)
                    cast(dict[str, Tensor], own)[name] = value


def require_same(module: nn.Module, places: Mapping[str, Stored], file: Path) -> None:
    """Refuse a checkpoint's file that does not hold exactly a module's tensors.

    Raises:
        CheckpointError: naming a tensor that is missing, unknown, or of another shape or type.
    """
    own = module.state_dict()
    for name in own.keys() ^ places.keys():
        raise CheckpointError(f"'{name}' is in only one of {file} and config.json; the two belong to different checkpoints.")
    for name, tensor in own.items():
        place, kind = places[name], STORED[str(tensor.dtype).removeprefix("torch.")]
        if place.shape != tuple(tensor.shape) or (place.dtype != kind and not {place.dtype, kind} <= {"F32", "BF16", "F16"}):
            raise CheckpointError(
                f"'{name}' in {file} is {place.shape} of {place.dtype}, config.json requires {tuple(tensor.shape)} of {kind}."
            )


def _kept(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; those with two names once."""
    kept = module.state_dict(keep_vars=True).keys()
    return {**dict(module.named_parameters()), **{name: b for name, b in module.named_buffers() if name in kept}}
