"""The contract of a compute policy, what it needs of a model, and what it reports.

Shape letters: B batch, L horizon, D action dimension.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Generator, Tensor

from vlaflow.backbones.base import Prefix
from vlaflow.decoders.base import Given, Tokens
from vlaflow.decoders.model import Model
from vlaflow.errors import CapabilityError


@dataclass(frozen=True)
class Requirements:
    """What a model must have been trained for; checked before anything runs."""

    rater: bool = False
    unified_masks: bool = False
    given: bool = False
    tokens: bool = False
    settles: bool = False
    exits: tuple[int, ...] = ()

    def check(self, model: Model, compute: str) -> None:
        """Refuse a model that lacks something.

        Raises:
            CapabilityError: saying what is missing and how to get it.
        """
        if self.tokens and not model.decoder.takes_tokens:
            raise CapabilityError(
                f"{compute} makes single tokens anew, which a {type(model.decoder).__name__} cannot. Use a discrete flow or "
                "masked diffusion."
            )
        if self.unified_masks and not model.decoder.regenerates:
            raise CapabilityError(
                f"{compute} regenerates parts of a chunk, which this checkpoint was not trained for. "
                "Train a flow decoder with masks='unified' (--set policy.decoder.masks=unified)."
            )
        if self.rater and model.rater is None:
            raise CapabilityError(
                f"{compute} needs a confidence rater and this checkpoint has none. "
                "Train one: vlaflow train asyncvla.rater --policy CKPT --dataset DIR --out DIR"
            )
        if self.given and not model.decoder.takes_given:
            raise CapabilityError(
                f"{compute} starts from an earlier answer, which a {type(model.decoder).__name__} cannot. "
                "Use a flow decoder, or a warm start of 'fresh' or 'same'."
            )
        if self.settles and not model.decoder.settles:
            raise CapabilityError(
                f"{compute} ends with deterministic steps that may revise every token, which a {type(model.decoder).__name__} "
                "does not have. Use a discrete flow."
            )
        if missing := [depth for depth in self.exits if depth not in model.depths]:
            raise CapabilityError(
                f"{compute} answers at depth {missing[0]}, and this checkpoint learned to answer only at {list(model.depths)}. "
                "Train with exits (policy.exits), or choose among these."
            )


@dataclass
class Stopwatch:
    """Wall time by part, in milliseconds; waits for the device, so parts add up."""

    device: torch.device
    milliseconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time of the block to ``name``."""
        begin = self._now()
        yield
        self.milliseconds[name] = self.milliseconds.get(name, 0.0) + (self._now() - begin) * 1e3

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@dataclass(frozen=True)
class Group:
    """Observations that were encoded equally deep: their places in the batch, int64 (R,), and their prefix."""

    row_R: Tensor
    prefix: Prefix


@dataclass(frozen=True)
class Decoded:
    """Normalised chunks for B observations and how they came about.

    Args:
        action_BLD: float32, normalised.
        groups: the observations as deep as they were encoded, for whoever continues.
        layers: depth each chunk was made at, B of them.
        evaluations: decoder evaluations, B.
        layer_passes: network layers run over prefix, solver steps and rater, B.
        confidence_BL: the rater's, where one was asked.
        regenerated_BL: bool, actions made anew.
        draft_BLD: the chunk before refinement.
        tokens: what a decoder of tokens knows of its chunks.
    """

    action_BLD: Tensor
    groups: tuple[Group, ...]
    layers: tuple[int, ...]
    evaluations: tuple[int, ...]
    layer_passes: tuple[int, ...]
    confidence_BL: Tensor | None = None
    regenerated_BL: Tensor | None = None
    draft_BLD: Tensor | None = None
    tokens: Tokens | None = None


@runtime_checkable
class ComputePolicy(Protocol):
    """Decides which layers, steps and tokens to spend on."""

    @property
    def name(self) -> str:
        """Short name for tables and file names."""

    @property
    def needs(self) -> Requirements:
        """What the model must offer."""

    def decode(
        self, model: Model, prefix: Prefix, generators: Sequence[Generator], watch: Stopwatch, given: Given | None = None
    ) -> Decoded:
        """Chunks for B embedded observations, one generator each."""
