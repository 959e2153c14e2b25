"""Which options of ``vlaflow calibrate`` belong to what it calibrates; one that would have no effect is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal

from vlaflow.errors import ConfigError

Calibrated = Literal["exits", "sampler", "refine"]

OPTIONS: Mapping[str, tuple[Calibrated, ...]] = {
    "budget_ms": ("sampler",),
    "env": ("sampler",),
    "rollouts": ("sampler",),
    "workers": ("sampler",),
    "fresh": ("sampler",),
    "compute": ("sampler", "refine"),
    "share": ("refine",),
    "doubt": ("refine",),
    "draws": ("refine",),
    "clock": ("refine",),
    "max_deviation": ("refine", "exits"),
    "confidence": ("refine", "exits"),
    "name": ("refine", "exits"),
    "sampling": ("refine", "exits"),
    "exit_budget": ("exits",),
    "exit_distribution": ("exits",),
    "first_exit": ("exits",),
    "deviation": ("exits",),
    "depths": ("exits",),
    "metric": ("exits",),
    "warm_start": ("exits",),
    "restart": ("exits",),
    "ladder": ("exits",),
}
"""By option, what it is for; others are for everything."""

NEEDED = {
    "rollouts": "env",
    "workers": "env",
    "fresh": "env",
    "confidence": "max_deviation",
    "deviation": "max_deviation",
}
"""Options that have an effect only with another one."""


def require_effect(given: Any, calibrated: Calibrated) -> None:
    """Refuse options that have a value of their own but no effect.

    Args:
        given: the arguments; a dataclass with the fields of ``OPTIONS``.
        calibrated: what they calibrate.

    Raises:
        ConfigError: naming the option and what it needs.
    """
    set_here = {each.name for each in fields(given) if getattr(given, each.name) != each.default}
    for name in (each for each in OPTIONS if each in set_here):
        owners, option = OPTIONS[name], _typed(name)
        if calibrated not in owners:
            if calibrated == "exits":
                kinds = " or ".join(f"--{owner}" for owner in owners)
                raise ConfigError(f"{option} has no effect on early exits; add {kinds}, or leave it out.")
            raise ConfigError(f"{option} has no effect with --{calibrated}; leave it out.")
        if (needed := NEEDED.get(name)) and needed not in set_here:
            raise ConfigError(f"{option} has an effect only with {_typed(needed)}.")
    if "max_deviation" in set_here:
        for name in ("exit_budget", "exit_distribution", "first_exit", "share"):
            if name in set_here:
                raise ConfigError(f"Give either {_typed(name)} or --max-deviation: one fixes the compute, the other the risk.")
    if "restart" in set_here and given.warm_start != "renoise":
        raise ConfigError("--restart has an effect only with --warm-start renoise.")


def _typed(name: str) -> str:
    """An option as it is typed."""
    return "--" + {"first_exit": "no-first-exit", "ladder": "no-ladder"}.get(name, name).replace("_", "-")
