"""Compute policies by the names that people type. More kinds may come with other distributions (``registry``).

dense            all layers, all solver steps
dense:2          2 solver steps
dense:2@0.5      … from half the noise; settings of the sampler may follow any kind that solves (docs/sampling.md)
dense:1-0.3-0    … at stated clocks
dense:5,midpoint … of second order, two evaluations each
dense:16,temperature=0  … of tokens, greedily
dense:16,expected  … the token nearest to the expected value in every slot
dense:2,depth=3  … through the first 3 layers
mean:8           the mean of eight dense chunks
medoid:8         … the one of them that is nearest to the others
mean:8+dense:2@0.5  … made by another compute policy
refine           the dense chunk, and what its rater doubts regenerated
refine:2@0.5     … both rounds with these settings; refine:2@0.5+dense the second alone
refine:2,clock=0.5  … from that clock; more options are threshold=0.3 and executed=16
refine:NAME      as calibrated: CKPT/calibration/refine/NAME.json
refine-random    the same with random doubts; refine-random:share=0.25
refine-spread    the mean of eight, and where they lie apart regenerated; refine-spread+medoid:4
refine-spread:draws=8+dense:2  a dense chunk, and where eight other draws lie apart regenerated
two-stage:14+2   14 stochastic steps and 2 deterministic ones, for discrete flows
two-stage:0+1    a single pass: the most probable tokens, given noise; two-stage:0+1,expected the expected ones
two-stage:14+2/0.3  … whose prefix is run again when 30 % of the tokens have changed (0: at every step, no cache)
refine-tokens    the dense chunk of a decoder of tokens, and the tokens below the threshold regenerated
exit:NAME        early exit by the calibration CKPT/calibration/NAME.json
refine+exit:NAME refinement of that
auto             what vlaflow calibrate CKPT --sampler chose for the checkpoint
budget:20        whatever fits 20 ms on this machine (vlaflow bench latency CKPT comes first)
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from vlaflow import registry
from vlaflow.compute.base import ComputePolicy
from vlaflow.compute.spelling import DEFAULTS, Checkpoint, ComputeKind, Knobs, Spelling
from vlaflow.decoders.model import Model
from vlaflow.errors import CapabilityError, ConfigError


def parse(name: str, knobs: Knobs = DEFAULTS, checkpoint: Checkpoint | None = None) -> ComputePolicy:
    """The compute policy of that name.

    Args:
        name: see the module text.
        knobs: settings.
        checkpoint: holds the calibrations and latencies that "exit" and "budget" read.

    Raises:
        ConfigError: for an unknown name, with the nearest valid one, or a malformed one.
        CalibrationError: for a calibration that is missing or of another checkpoint.
        CapabilityError: for a kind of another distribution that cannot be imported.
    """
    found = re.fullmatch(r"([^:+]*)(?::(.*)|\+(.*))?", name)
    kind, more, after = found.groups() if found else (name, None, None)
    for sign in re.finditer(r"\+([^:+]+)", more or ""):  # only before the name of a kind: two-stage:14+2 has a sign of its own
        if sign[1] in registry.names("compute"):
            more, after = sign.string[: sign.start()], sign.string[sign.start() + 1 :]
            break
    word = re.split("[,@]", kind)[0]
    if word != kind and word in registry.names("compute"):
        settings = re.sub(r"^,(?=\d)", "", name.removeprefix(word))
        raise ConfigError(f"Settings follow a colon: '{word}:{settings}', not '{name}'.")
    made = registry.load("compute", kind, ComputeKind, f"There is no compute policy '{kind}'")
    inner = None if after is None else parse(after, knobs, checkpoint)
    return made.parse(Spelling(name, more or "", inner, knobs, checkpoint))


def parse_all(names: Sequence[str], knobs: Knobs = DEFAULTS, checkpoint: Checkpoint | None = None) -> list[ComputePolicy]:
    """Several, each once, in the order given.

    Raises:
        ConfigError: see ``parse``; or two differ and share a name, so that no table could tell them apart.
    """
    return list(distinct(names, knobs, checkpoint).values())


def distinct(names: Sequence[str], knobs: Knobs = DEFAULTS, checkpoint: Checkpoint | None = None) -> dict[str, ComputePolicy]:
    """``parse_all``, by what was typed first for each."""
    found: dict[str, tuple[str, ComputePolicy]] = {}
    for name in names:
        compute = parse(name, knobs, checkpoint)
        before, same = found.setdefault(compute.name, (name, compute))
        if same != compute:
            raise ConfigError(
                f"'{before}' and '{name}' differ, and tables would name both {compute.name}. State the number of steps, as in "
                "dense:2, or measure them one after the other."
            )
    return dict(found.values())


def able(model: Model, knobs: Knobs = DEFAULTS) -> list[ComputePolicy]:
    """Every compute policy without a measurement that this model can run; kinds that cannot be imported are left out."""
    found = []
    for kind in registry.names("compute"):
        try:
            example = registry.load("compute", kind, ComputeKind).example
            if example is None:
                continue
            compute = parse(example, knobs)
            compute.needs.check(model, compute.name)
        except (CapabilityError, ConfigError):
            continue
        found.append(compute)
    return found
