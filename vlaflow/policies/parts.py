"""How a training step is split into parts of equal size, which processes take one after another."""

from __future__ import annotations

from vlaflow.errors import ConfigError


def require_even(size: int, parts: int, key: str, why: str, before: int = 1) -> None:
    """Refuse a step that cannot be split into parts of equal size.

    Args:
        size: samples per step.
        parts: that it is split into.
        key: of the size in the config.
        why: reason for the number of parts.
        before: parts of an earlier attempt of the run, whose size can no longer be changed.

    Raises:
        ConfigError: with the nearest size that can be split, or the numbers of processes that a begun run can continue on.
    """
    if not size % parts:
        return
    near = max((size + parts // 2) // parts, 1) * parts
    cure = f"The nearest size that can is {near}: --set {key}={near}"
    if before > 1:
        cure = f"Continue the run on a number of processes that divides {before}"
    raise ConfigError(f"A step of {size} samples ({key}) cannot be split evenly into {parts} parts ({why}). {cure}.")
