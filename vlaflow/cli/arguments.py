"""The arguments of a command: read by tyro, then checked before anything else happens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import tyro

from vlaflow.errors import ConfigError
from vlaflow.hub import go_offline
from vlaflow.ranges import require_ranges

T = TypeVar("T")


@dataclass(frozen=True)
class HubOptions:
    """For commands that may fetch data sets, checkpoints or pretrained networks."""

    offline: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Never use the network: what was fetched from the Hugging Face Hub before is taken from its cache."""


HubGroup = Annotated[HubOptions, tyro.conf.arg(name="")]
"""As a field ``hub`` of a command's arguments: the option has no prefix."""
ONLINE = HubOptions()
"""The option was not given."""


def parse_arguments(kind: type[T], prog: str, argv: list[str], **options: Any) -> T:
    """Read the arguments of a command.

    Args:
        kind: dataclass of the arguments, or a union of several.
        prog: the command, for its help.
        argv: what follows it.
        options: of ``tyro.cli``.

    Raises:
        ConfigError: a number outside its range (``vlaflow.ranges``), or a ``device`` that this machine does not have.
    """
    arguments: T = tyro.cli(kind, prog=prog, args=argv, **options)
    require_ranges(arguments, "--{}")
    if getattr(arguments, "hub", ONLINE).offline:
        go_offline()
    device = getattr(arguments, "device", None)
    if device is not None:
        require_device(device)
    return arguments


def require_device(name: str) -> None:
    """Refuse a device that this machine does not have.

    Raises:
        ConfigError: naming it and what torch says.
    """
    if name == "cpu":
        return
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError, ModuleNotFoundError) as error:
        reason = str(error).strip().partition("\n")[0].partition(": ")
        raise ConfigError(
            f"--device {name} cannot be used on this machine ({reason[0]}). Use cpu"
            + (", or cuda." if torch.cuda.is_available() else ".")
        ) from error
