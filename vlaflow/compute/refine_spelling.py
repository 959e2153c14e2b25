"""How refinements are typed: settings of the second round's sampler, then options; or the name of a calibration.

refine:2@0.5,clock=0.5,threshold=0.3+dense:10@0
refine-random:share=0.25
refine-spread:2,draws=8+auto
refine:share-0.25                      CKPT/calibration/refine/share-0.25.json
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from vlaflow.compute.consensus import Consensus
from vlaflow.compute.dense import Dense
from vlaflow.compute.doubt_calibration import load_refine, spread_draws
from vlaflow.compute.doubts import AtRandom, BelowThreshold, Doubt, Spread
from vlaflow.compute.refine import Refine
from vlaflow.compute.spelling import ComputeKind, Spelling
from vlaflow.errors import ConfigError


@dataclass(frozen=True)
class RefineOptions:
    """What may be typed after the settings of the sampler, as in ``refine:2@0.5,clock=0.5,threshold=0.3``.

    Args:
        sampling: the text before the options.
        clock, executed: see ``Refine``.
        limit: threshold of the doubt, or its probability.
        draws: of ``Spread``; None for those of the first round.
    """

    sampling: str
    clock: float = 1.0
    executed: int | None = None
    limit: float | None = None
    draws: int | None = None

    @staticmethod
    def read(typed: Spelling, limit: str, *, draws: bool = False) -> RefineOptions:
        """The options of a spelling.

        Args:
            typed: the spelling.
            limit: name of the option that sets the limit.
            draws: whether the doubt takes a number of draws.

        Raises:
            ConfigError: for an option that the kind does not take.
        """
        sampling, *rest = re.split(r"(?:^|,)(?=(?:clock|executed|threshold|share|draws)=)", typed.more)
        taken = {"clock", "executed", limit, *(["draws"] if draws else [])}
        given = dict(option.split("=", 1) for option in rest)
        try:
            if len(given) < len(rest) or not given.keys() <= taken:
                raise ValueError
            return RefineOptions(
                sampling,
                float(given.get("clock", 1)),
                int(given["executed"]) if "executed" in given else None,
                float(given[limit]) if limit in given else None,
                int(given["draws"]) if "draws" in given else None,
            )
        except ValueError:
            options = ", ".join(f"{name}=NUMBER" for name in sorted(taken))
            kind = re.split("[:+]", typed.name, maxsplit=1)[0]
            raise ConfigError(
                f"'{typed.name}' is no compute policy; {kind} takes settings of the sampler and then {options}, as in "
                f"{kind}:2@0.5,clock=0.5."
            ) from None


def _parse(typed: Spelling, doubt: Doubt, options: RefineOptions, first: Dense | Consensus | None = None) -> Refine:
    sampling, label = typed.sampling(options.sampling), typed.own if typed.more else ""
    inner = typed.inner or first or Dense.by(sampling)
    return Refine(doubt, sampling, inner, options.clock, options.executed, typed.knobs.any_training, label)


def _parse_rated(typed: Spelling) -> Refine:
    if re.match(r"[A-Za-z]", typed.more) and "=" not in typed.more:
        typed.require(more=True, usage="a calibrated refinement brings its first round along: refine:NAME.")
        return load_refine(typed.more, typed.name, typed.knobs, typed.measured())
    options = RefineOptions.read(typed, "threshold")
    return _parse(typed, BelowThreshold(typed.knobs.threshold if options.limit is None else options.limit), options)


def _parse_random(typed: Spelling) -> Refine:
    options = RefineOptions.read(typed, "share")
    return _parse(typed, AtRandom() if options.limit is None else AtRandom(options.limit), options)


def _parse_spread(typed: Spelling) -> Refine:
    options = RefineOptions.read(typed, "threshold", draws=True)
    threshold = typed.knobs.threshold if options.limit is None else options.limit
    if options.draws is not None:
        return _parse(typed, Spread(threshold, spread_draws(options.draws)), options)
    sampling = typed.sampling(options.sampling)
    draws = Dense.by(sampling, label=f"dense:{sampling}" if options.sampling else "dense")
    return _parse(typed, Spread(threshold), options, Consensus(inner=draws))


REFINE = ComputeKind(_parse_rated, example="refine")
REFINE_RANDOM = ComputeKind(_parse_random, example="refine-random")
REFINE_SPREAD = ComputeKind(_parse_spread, example="refine-spread+mean:2")
