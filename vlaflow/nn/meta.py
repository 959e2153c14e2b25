"""Networks without memory (torch's device "meta"): built to be counted, compared with a file, or filled later.

Nothing can be drawn at random there, but for the attempt torch imports its compiler, which takes longer than everything else
that opening a policy does. So attempts are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from vlaflow.errors import CheckpointError, VlaflowError
from vlaflow.io import require_described, stored_tensors
from vlaflow.text import one_line

DRAWS = {"uniform_", "normal_", "kaiming_uniform_", "kaiming_normal_"}
"""Names of functions of ``torch.nn.init`` and of methods of tensors."""
MOST_BUFFERS = 2**30
"""Bytes of tables that networks may compute for themselves, beyond the size of their weights."""
MOST_TIMES, MOST_NUMBERS, MOST_TENSORS = 4, 2**28, 1000
"""What networks may allocate while they are built: times what their file holds, and so many numbers and tensors more."""


class Undrawn(TorchFunctionMode):
    """A context in which tensors on the meta device are not drawn at random; all others are as always."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch in place of ``func``."""
        kwargs = kwargs or {}
        if getattr(func, "__name__", None) in DRAWS:
            drawn = args[0] if args else kwargs["tensor"]
            if drawn.is_meta:
                return drawn
        return func(*args, **kwargs)


@contextmanager
def on_meta() -> Iterator[None]:
    """A context in which tensors are made on the meta device."""
    with torch.device("meta"), Undrawn():
        yield


def require_fits(build: Callable[[], nn.Module], file: Path) -> None:
    """Compare the networks that a config describes with the weights that they are for, before either takes memory.

    They are built on torch's device "meta", so a config of larger networks than the file holds is refused before
    anything is allocated. Not for several threads that build networks at a time.

    Args:
        build: makes the networks; torch's global generator is afterwards as before.
        file: their weights.

    Raises:
        CheckpointError: a missing or damaged file, or one of other networks; a config that no networks can be built from.
    """
    stored = stored_tensors(file)
    # Heads that are tied, or replaced while building, count as well, so this only ends a build that would never end.
    most_numbers = MOST_TIMES * sum(prod(each.shape) for each in stored.values()) + MOST_NUMBERS
    most_tensors = MOST_TIMES * len(stored) + MOST_TENSORS
    kept: dict[int, torch.Tensor] = {}
    numbers = 0

    def count(_module: nn.Module, _name: str, parameter: torch.Tensor | None) -> None:
        nonlocal numbers
        if parameter is not None and id(parameter) not in kept:
            kept[id(parameter)] = parameter  # or another one could get its id
            numbers += parameter.numel()
            if numbers > most_numbers or len(kept) > most_tensors:
                raise CheckpointError(
                    f"config.json describes much larger networks than {file} holds; they belong to different checkpoints."
                )

    hook = register_module_parameter_registration_hook(count)
    try:
        with torch.random.fork_rng(devices=[]), on_meta():
            model = build()
    except VlaflowError:
        raise
    except Exception as error:  # whatever a part, or the library that it wraps, raises for numbers that make no sense
        raise CheckpointError(
            f"config.json next to {file} describes networks that cannot be built ({type(error).__name__}: "
            f"{one_line(str(error)):.200}); it is damaged."
        ) from error
    finally:
        hook.remove()
    own = model.state_dict()
    require_described(own, stored, file)
    extra = sum(each.numel() * each.element_size() for each in model.buffers()) - file.stat().st_size
    if extra > MOST_BUFFERS:
        raise CheckpointError(f"config.json next to {file} describes networks with {extra} bytes of tables; it is damaged.")
