"""A compute policy as people type it, and what a kind of compute policy registers so that it can be typed."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from vlaflow.compute.base import ComputePolicy
from vlaflow.errors import ConfigError
from vlaflow.flows.sampling import Sampling, Solver
from vlaflow.nn.precision import Dtype


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk: where it lies, and the fingerprint of its content."""

    folder: Path
    fingerprint: str


@dataclass(frozen=True)
class Knobs:
    """What the command line may turn.

    Args:
        steps: solver steps per round, where the spelling states none.
        threshold: confidence below which "refine" regenerates an action; spread above which "refine-spread" does; probability
            below which "refine-tokens" regenerates a token.
        any_training: see ``Refine``.
        device, threads, dtype: what is computed with, for budgets and calibrations.
        engine: what computes chunks, in words (``Model.engine``), for budgets.
    """

    steps: int = 10
    threshold: float = 0.5
    any_training: bool = False
    device: str = "cpu"
    threads: int = 1
    dtype: Dtype = "fp32"
    engine: str = "eager"

    def as_measured(self) -> Knobs:
        """With the settings that calibrations measure with, for names that state none."""
        return replace(self, steps=DEFAULTS.steps, threshold=DEFAULTS.threshold)


DEFAULTS = Knobs()


@dataclass(frozen=True)
class Spelling:
    """What was typed: KIND, KIND:MORE, KIND+ANOTHER or KIND:MORE+ANOTHER.

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

    @property
    def own(self) -> str:
        """What was typed of the kind itself: all but the inner compute policy."""
        kind = re.split("[:+]", self.name, maxsplit=1)[0]
        return f"{kind}:{self.more}" if self.more else kind

    def sampling(self, text: str | None = None) -> Sampling:
        """The settings of the sampler.

        Args:
            text: how they are typed (see ``read_sampling``); all that follows the colon by default.

        Raises:
            ConfigError: for a malformed one.
        """
        return read_sampling(self.more if text is None else text, self.knobs.steps, self.name)

    def measured(self) -> Checkpoint:
        """The checkpoint, for kinds that read what was measured for it.

        Raises:
            ConfigError: where there is none.
        """
        if self.checkpoint is None:
            raise ConfigError(
                f"'{self.name}' is measured for one checkpoint, and the policy was opened from none. Save it, have it measured "
                "there, and open it with Policy.from_pretrained."
            )
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


_SAMPLING = re.compile(
    r"(?:(?P<grid>[\d.]+(?:-[\d.]+)+)|(?P<steps>\d*))(?:@(?P<noise_scale>[\d.]+))?"
    r"(?:,(?P<solver>euler|midpoint|heun))?(?:,temperature=(?P<temperature>[\d.]+))?(?P<expected>,expected)?"
)


def read_sampling(text: str, steps: int, name: str) -> Sampling:
    """Settings of the sampler, as ``str(sampling)`` writes them.

    Args:
        text: steps or a grid of clocks, then ``@NOISE_SCALE``, ``,SOLVER``, ``,temperature=T``, ``,expected``; each may be left
            out.
        steps: where there is neither steps nor a grid.
        name: all that was typed, for the refusal.

    Raises:
        ConfigError: for a malformed or impossible one.
    """
    found = _SAMPLING.fullmatch(text)
    try:
        if found is None:
            raise ValueError
        given = {key: value for key, value in found.groupdict().items() if value}
        return Sampling(
            int(given.get("steps", steps)),
            float(given.get("noise_scale", 1)),
            tuple(map(float, given["grid"].split("-"))) if "grid" in given else None,
            cast(Solver, given.get("solver", "euler")),
            float(given["temperature"]) if "temperature" in given else None,
            "expected" in given,
        )
    except ValueError:
        raise ConfigError(
            f"Settings of the sampler are typed as in 10, 2@0.5 (noise scale), 1-0.3-0 (clocks), 5,midpoint (or heun), "
            f"16,temperature=0 and 16,expected, which '{name}' does not follow."
        ) from None


@dataclass(frozen=True)
class ComputeKind:
    """A kind of compute policy, registered under ``vlaflow.compute`` by the word it begins with.

    Args:
        parse: makes the compute policy of a spelling; raises ConfigError for a malformed one.
        example: a spelling that needs nothing measured; None for kinds that all need a measurement of the checkpoint.
    """

    parse: Callable[[Spelling], ComputePolicy]
    example: str | None = None
