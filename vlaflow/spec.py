"""The core types: what a robot's action means, what a policy observes and what it returns.

These classes validate their values and compute nothing. Batched tensors live in ``data.batch``, files in ``data.lerobot``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final, Literal

import numpy as np

from vlaflow.errors import SpecError
from vlaflow.ranges import AnyNumber

UNSTATED: Final = "unstated"
"""What a drafted spec says where nobody has said it; it matches everything."""
UNNAMED = "unnamed "
"""How the names of dimensions begin that a data set gives no name; they match every name."""


@dataclass(frozen=True)
class Dimension:
    """One number of an action: its unit, frame, range and what a positive value does.

    Args:
        name: within the action.
        unit, frame, positive: in words; "unstated" where unknown.
        low, high: its range.
        mode: whether it is added to what is there or replaces it; "unstated" where unknown.
        measured: whether the range is what a data set holds, with a margin, and not what the robot allows.
    """

    name: str
    unit: str
    frame: str
    low: AnyNumber
    high: AnyNumber
    positive: str
    mode: Literal["delta", "absolute", "unstated"] = "delta"
    measured: bool = False

    def __post_init__(self) -> None:
        for text in ("name", "unit", "frame", "positive"):
            if not str(getattr(self, text)).strip():
                raise SpecError(
                    f"Action dimension '{self.name}' has an empty '{text}'. Fill it in; write 'none' if there is none."
                )
        if not self.low < self.high:
            raise SpecError(f"Action dimension '{self.name}' has the empty range [{self.low}, {self.high}].")

    def differs(self, other: Dimension) -> str | None:
        """The first part in which both state something and differ; None where there is none."""
        for part in ("name", "unit", "frame", "low", "high", "positive", "mode"):
            mine, theirs = getattr(self, part), getattr(other, part)
            open_range = part in ("low", "high") and (self.measured or other.measured)
            unnamed = part == "name" and any(name.startswith(UNNAMED) for name in (mine, theirs))
            if mine != theirs and UNSTATED not in (mine, theirs) and not open_range and not unnamed:
                return part
        return None


@dataclass(frozen=True)
class ActionSpec:
    """What an action means: saved with every data set and checkpoint, and refused on a mismatch.

    A spec that was drafted from a data set (``data.draft``) says "unstated" where nobody has said it.

    Args:
        robot: robot and controller, e.g. "metaworld sawyer, end-effector displacement".
        dimensions: the D numbers of an action, in order.
        rotation: rotation representation ("none", "axis-angle", "quaternion xyzw", ...).
        gripper: gripper convention in words ("none", "-1 open, +1 closed", ...).
        rate_hz: actions per second.
        chunk_size: actions per chunk; None in a data set, which is not cut into chunks.
    """

    robot: str
    dimensions: tuple[Dimension, ...]
    rotation: str
    gripper: str
    rate_hz: float
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        if not self.dimensions:
            raise SpecError("An action needs at least one dimension.")
        names = [d.name for d in self.dimensions]
        if len(set(names)) != len(names):
            raise SpecError(f"Action dimension names must differ, got {names}.")
        if not self.rate_hz > 0:
            raise SpecError(f"rate_hz must be positive, got {self.rate_hz}.")

    @property
    def dim(self) -> int:
        """Number of action dimensions, D."""
        return len(self.dimensions)

    @property
    def low(self) -> np.ndarray:
        """Lower bounds, (D,)."""
        return np.array([d.low for d in self.dimensions], np.float32)

    @property
    def high(self) -> np.ndarray:
        """Upper bounds, (D,)."""
        return np.array([d.high for d in self.dimensions], np.float32)

    def with_chunk_size(self, chunk_size: int) -> ActionSpec:
        """The same meaning, cut into chunks of ``chunk_size`` actions."""
        return replace(self, chunk_size=chunk_size)

    def require_match(self, other: ActionSpec, ours: str, theirs: str) -> None:
        """Refuse ``other`` unless it means the same as this one, wherever both state something.

        Raises:
            SpecError: naming the first difference and both sides ("checkpoint X", "data set Y").
        """
        for part in fields(self):
            mine, other_value = getattr(self, part.name), getattr(other, part.name)
            if mine == other_value or UNSTATED in (mine, other_value) or None in (mine, other_value):
                continue
            what = part.name
            if part.name == "dimensions":
                pairs = [(m, o, m.differs(o)) for m, o in zip(mine, other_value, strict=False)]
                first = next(((m, o, differing) for m, o, differing in pairs if differing), None)
                if first is not None:
                    what = f"{first[2]} of action dimension '{first[0].name}'"
                    mine, other_value = getattr(first[0], first[2]), getattr(first[1], first[2])
                elif len(mine) != len(other_value):
                    what, mine, other_value = "number of action dimensions", len(mine), len(other_value)
                else:
                    continue
            raise SpecError(
                f"The actions of {ours} and {theirs} do not mean the same: {what} is {mine!r} in the first and "
                f"{other_value!r} in the second. Use a checkpoint trained for this robot, or convert one side."
            )

    @property
    def meaning(self) -> ActionSpec:
        """The spec without ranges that are only those of some data, which differ between two data sets of one robot."""
        whole = (replace(d, low=-math.inf, high=math.inf) if d.measured else d for d in self.dimensions)
        return replace(self, dimensions=tuple(whole))

    def widened(self, other: ActionSpec) -> ActionSpec:
        """The spec with measured ranges that hold the other's, of the same meaning, too."""
        both = zip(self.dimensions, other.dimensions, strict=True)
        wider = (replace(m, low=min(m.low, o.low), high=max(m.high, o.high)) if m.measured else m for m, o in both)
        return replace(self, dimensions=tuple(wider))


def known_parts(stated: Any) -> Any:
    """The JSON of an action spec without entries that state nothing (null) under a name that specs do not have."""
    known = {part.name for part in fields(ActionSpec)} | {"kind"}
    if not isinstance(stated, dict):
        return stated
    return {key: value for key, value in stated.items() if value is not None or key in known}


@dataclass(frozen=True)
class Observation:
    """What a policy observes at one time step.

    Args:
        images: by view name, uint8, (height, width, 3), RGB, upright.
        state: proprioception, (S,), in the robot's own units.
        instruction: the task in words.
    """

    images: Mapping[str, np.ndarray]
    state: np.ndarray
    instruction: str

    def __post_init__(self) -> None:
        for view, image in self.images.items():
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise SpecError(
                    f"View '{view}' must be a uint8 array of shape (height, width, 3), got {image.dtype} {image.shape}."
                )
        if self.state.ndim != 1:
            raise SpecError(f"The state must be one vector, got shape {self.state.shape}.")
        if not np.all(np.isfinite(self.state)):
            raise SpecError(f"The state contains a value that is not finite: {self.state.tolist()}.")


@dataclass(frozen=True)
class ActionPrefix:
    """The remaining actions of the chunk being executed while the next one is computed (real-time chunking).

    Args:
        actions: (N, D) float32, robot units. The first one is for the same control step as the new chunk's first action.
        count: how many of them are committed: the robot executes them before the new chunk arrives, so the new chunk begins
            with them, unchanged to the bit. The others would have followed; only guidance uses them.
    """

    actions: np.ndarray
    count: int

    def __post_init__(self) -> None:
        if self.actions.ndim != 2 or len(self.actions) < 1 or not np.all(np.isfinite(self.actions)):
            raise SpecError(
                f"Committed actions must be finite and of shape (N, D) with N >= 1, got shape {self.actions.shape}."
            )
        if not 0 <= self.count <= len(self.actions):
            raise SpecError(f"The number of committed actions must lie in 0 .. {len(self.actions)}, got {self.count}.")


@dataclass(frozen=True)
class Chunk:
    """The output of a policy: L future actions in robot units, with diagnostics.

    Args:
        actions: (L, D) float32, robot units.
        confidence: (L,) in (0, 1), one per action, from the confidence rater; None without a rater.
        spread: (L,) >= 0, how far several draws are apart (``compute.consensus``): their root mean square distance to their
            mean, over draws and dimensions, in units of normalised actions; None for a single draw.
        regenerated: (L,) bool, which actions were regenerated after the first round; None without refinement.
        draft: (L, D), the actions of the first round if refinement changed any; else None.
        layers: backbone layers run over the prefix.
        layer_passes: layers run in total: the prefix, latent tokens, every solver step and the rater.
        nfe: number of function evaluations: forward passes of the decoder.
        tokens: (S,) token ids that the actions were decoded from; None for decoders of continuous actions.
        token_probability: (S,), probability of each token when the network last evaluated it.
        revised: number of tokens changed by each solver step.
        repaired: whether the tokens did not decode to a chunk exactly, so that the tokenizer had to repair them.
        milliseconds: wall time by part: "prefix", "first", "rater", "refine", ..., "total".
    """

    actions: np.ndarray
    confidence: np.ndarray | None = None
    spread: np.ndarray | None = None
    regenerated: np.ndarray | None = None
    draft: np.ndarray | None = None
    layers: int = 0
    layer_passes: int = 0
    nfe: int = 0
    tokens: np.ndarray | None = None
    token_probability: np.ndarray | None = None
    revised: tuple[int, ...] = ()
    repaired: bool = False
    milliseconds: Mapping[str, float] = field(default_factory=dict)
