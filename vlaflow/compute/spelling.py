"""A compute policy as people type it, and what a kind of compute policy registers so that it can be typed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vlaflow.compute.base import ComputePolicy
from vlaflow.errors import ConfigError


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk: where it lies, and the fingerprint of its content."""

    folder: Path
    fingerprint: str


@dataclass(frozen=True)
class Knobs:
    """What the command line may turn.

    Args:
        steps: solver steps per round.
        threshold: confidence below which "refine" regenerates an action.
        any_training: see ``Refine``.
        device, threads: what is computed with, for budgets.
    """

    steps: int = 10
    threshold: float = 0.5
    any_training: bool = False
    device: str = "cpu"
    threads: int = 1


DEFAULTS = Knobs()


@dataclass(frozen=True)
class Spelling:
    """What was typed: KIND, KIND:MORE or KIND+ANOTHER.

    Args:
        name: all of it.
        more: what follows the colon; empty where there is none.
        inner: the compute policy that follows the plus sign; None where there is none.
        knobs: settings.
        checkpoint: holds what was measured for it; None where no checkpoint is at hand.
    """

    name: str
    more: str
    inner: ComputePolicy | None
    knobs: Knobs
    checkpoint: Checkpoint | None

    def measured(self) -> Checkpoint:
        """The checkpoint, for kinds that read what was measured for it.

        Raises:
            ConfigError: where there is none.
        """
        if self.checkpoint is None:
            raise ConfigError(f"'{self.name}' is measured for one checkpoint; say which.")
        return self.checkpoint

    def require(self, *, more: bool = False, inner: bool = False, usage: str) -> None:
        """Refuse what the kind does not take.

        Args:
            more, inner: whether it takes text after a colon, or another compute policy after a plus sign.
            usage: how it is typed, as the end of a sentence.

        Raises:
            ConfigError: with the usage.
        """
        if (self.more and not more) or (self.inner is not None and not inner):
            raise ConfigError(f"'{self.name}' is no compute policy; {usage}")


@dataclass(frozen=True)
class ComputeKind:
    """A kind of compute policy, registered under ``vlaflow.compute`` by the word it begins with.

    Args:
        parse: makes the compute policy of a spelling; raises ConfigError for a malformed one.
        example: a spelling that needs nothing measured; None for kinds that all need a measurement of the checkpoint.
    """

    parse: Callable[[Spelling], ComputePolicy]
    example: str | None = None
