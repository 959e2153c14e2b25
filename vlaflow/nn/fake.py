"""Real tensors where torch makes fake ones: inputs whose values are read, in a step whose memory is only measured."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch.utils._python_dispatch import _disable_current_modes


def real_tensors() -> AbstractContextManager[object]:
    """A context in which tensors have memory and values, inside of one in which they have not."""
    return _disable_current_modes()
