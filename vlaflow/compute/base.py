"""The contract of a compute policy, what it needs of a model, and what it reports.

Shape letters: B batch, L chunk size, D action dimension.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Generator, Tensor

from vlaflow.backbones.base import Prefix
from vlaflow.decoders.base import Conditioning, Tokens
from vlaflow.decoders.capability import Capability
from vlaflow.decoders.model import Model
from vlaflow.errors import CapabilityError
from vlaflow.flows.sampling import Sampling
from vlaflow.text import as_typed

_WITHOUT = {
    Capability.TOKEN_CONDITIONING: (
        "{compute} regenerates single tokens, which a {decoder} cannot. Use a discrete flow or masked diffusion."
    ),
    Capability.REGENERATION: (
        "{compute} regenerates parts of a chunk, which this checkpoint was not trained for. Train a flow decoder with "
        "masks='unified' (--set policy.decoder.masks=unified)."
    ),
    Capability.CONDITIONING: (
        "{compute} starts from an earlier answer, which a {decoder} cannot. Use a flow decoder, or a warm start of 'fresh' or "
        "'same'."
    ),
    Capability.DETERMINISTIC_STEPS: (
        "{compute} ends with deterministic steps that may revise every token, which a {decoder} does not have. Use a discrete "
        "flow."
    ),
    Capability.PREFIX_REFRESH: (
        "{compute} says when the prefix is run again, and a {decoder} runs it once. Leave the share of changed tokens out."
    ),
    Capability.CONTINUOUS: (
        "{compute} sets a noise scale or a second-order solver, which a {decoder} does not have. Leave them out, or use a flow "
        "decoder."
    ),
    Capability.GRID: "{compute} states the clocks of its steps, and a {decoder} has none to state. Give a number of steps.",
    Capability.TEMPERATURE: "{compute} sets a temperature, and a {decoder} draws no tokens. Leave it out.",
    Capability.EXPECTED: (
        "{compute} takes the expected token, which a {decoder} without ids ordered by value does not have. Leave 'expected' "
        "out, or train a decoder of tokens with bins or with FAST without merges."
    ),
    Capability.JOINT_ATTENTION: "{compute} needs a decoder whose prefix reads the action tokens, which a {decoder}'s does not.",
}
"""The error for each missing capability, in the order in which they are checked."""


@dataclass(frozen=True)
class Requirements:
    """What a model must offer; checked before anything runs.

    Args:
        capabilities: of the decoder.
        rater: whether there must be a confidence rater.
        exits: depths at which the model must have learned to answer.
    """

    capabilities: frozenset[Capability] = frozenset()
    rater: bool = False
    exits: tuple[int, ...] = ()

    def also(self, *capabilities: Capability, rater: bool = False) -> Requirements:
        """These, and more."""
        return replace(self, capabilities=self.capabilities | set(capabilities), rater=self.rater or rater)

    def sampled(self, sampling: Sampling) -> Requirements:
        """These, and what the settings of a sampler need."""
        asked = {
            Capability.CONTINUOUS: sampling.noise_scale != 1 or sampling.solver != "euler",
            Capability.GRID: sampling.grid is not None,
            Capability.TEMPERATURE: sampling.temperature is not None,
            Capability.EXPECTED: sampling.expected,
        }
        return self.also(*(capability for capability, needed in asked.items() if needed))

    def check(self, model: Model, compute: str, checkpoint: Path | None = None) -> None:
        """Refuse a model that lacks something.

        Args:
            model: the networks.
            compute: name of the compute policy.
            checkpoint: folder of the model, for the cures; None where it lies in none.

        Raises:
            CapabilityError: saying what is missing and how to get it.
        """
        missing = self.capabilities - model.decoder.capabilities
        for capability, sentence in _WITHOUT.items():
            if capability in missing:
                raise CapabilityError(sentence.format(compute=compute, decoder=type(model.decoder).__name__))
        if self.rater and model.rater is None:
            raise CapabilityError(
                f"{compute} needs a confidence rater and this checkpoint has none. "
                f"Train one: vlaflow train asyncvla.rater --policy {as_typed(checkpoint)} --dataset DIR --out DIR"
            )
        if untaught := [depth for depth in self.exits if depth not in model.depths]:
            raise CapabilityError(
                f"{compute} answers at depth {untaught[0]}, and this checkpoint learned to answer only at {list(model.depths)}."
                " Train with exits (policy.exits), or choose among these."
            )


@dataclass
class Stopwatch:
    """Time by part, in milliseconds. A GPU notes by itself when it began and ended a part, so that nothing waits for it."""

    device: torch.device
    _spent: dict[str, float] = field(default_factory=dict)
    _noted: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time of the block to ``name``."""
        if self.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._noted.append((name, begin, end))
            return
        began = time.perf_counter()
        yield
        self._add(name, (time.perf_counter() - began) * 1e3)

    @property
    def milliseconds(self) -> dict[str, float]:
        """The time of each part; waits for a GPU to have done what was noted."""
        for name, begin, end in self._noted:
            end.synchronize()
            self._add(name, begin.elapsed_time(end))
        self._noted.clear()
        return self._spent

    def _add(self, name: str, milliseconds: float) -> None:
        self._spent[name] = self._spent.get(name, 0.0) + milliseconds


@dataclass(frozen=True)
class Passes:
    """The passes through the networks that a chunk may take, for what prepares them ahead (``vlaflow.engine``).

    Args:
        reads: of the prefix: (layers that have run, layers that will have, draws), where each draw reads it for itself.
        steps: of the decoder: (depth, draws).
        ratings: of the rater: (depth, draws).
    """

    reads: frozenset[tuple[int, int, int]]
    steps: frozenset[tuple[int, int]]
    ratings: frozenset[tuple[int, int]] = frozenset()

    def __or__(self, other: Passes) -> Passes:
        """Both."""
        return Passes(self.reads | other.reads, self.steps | other.steps, self.ratings | other.ratings)

    def then(self, depth: int, *, rated: bool) -> Passes:
        """These, then the rest of the prefix from wherever they ended, the rater if it is asked, and steps at full depth."""
        rest = frozenset((upto, depth, 1) for _, upto, _ in self.reads if upto < depth)
        full = frozenset({(depth, 1)})
        return self | Passes(rest, full, full if rated else frozenset())

    def drawn(self, draws: int) -> Passes:
        """Those of so many draws; what all of them read is read once."""
        reads = frozenset((start, upto, n * (draws if start else 1)) for start, upto, n in self.reads)
        steps, ratings = (frozenset((depth, n * draws) for depth, n in each) for each in (self.steps, self.ratings))
        return Passes(reads, steps, ratings)

    @staticmethod
    def at(depth: int) -> Passes:
        """One draw, at this depth alone."""
        return Passes(frozenset({(0, depth, 1)}), frozenset({(depth, 1)}))


@dataclass(frozen=True)
class Stages:
    """Solver steps of one chunk, the last ``settling`` of them deterministic (``Decoder.refine_deterministic``)."""

    sampling: Sampling
    settling: int = 0

    @property
    def stochastic(self) -> int:
        """Those before the deterministic ones."""
        return self.sampling.steps - self.settling


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
        groups: the observations as deep as they were encoded, for what continues.
        layers: depth each chunk was made at, B of them.
        nfe: decoder evaluations, B.
        layer_passes: network layers run over prefix, latent tokens, solver steps and rater, B.
        confidence_BL: the rater's, where one was asked.
        regenerated_BL: bool, actions regenerated.
        draft_BLD: the chunk before refinement.
        tokens: what a decoder of tokens knows of its chunks.
        spread_BL: root mean square distance of several draws from their mean, normalised, where there were several.
    """

    action_BLD: Tensor
    groups: tuple[Group, ...]
    layers: tuple[int, ...]
    nfe: tuple[int, ...]
    layer_passes: tuple[int, ...]
    confidence_BL: Tensor | None = None
    regenerated_BL: Tensor | None = None
    draft_BLD: Tensor | None = None
    tokens: Tokens | None = None
    spread_BL: Tensor | None = None


class ComputePolicy(ABC):
    """Decides which layers, steps and tokens to spend on. A kind is a frozen dataclass."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Short name for tables and file names."""

    @property
    def needs(self) -> Requirements:
        """What the model must offer; by default nothing beyond a trained decoder."""
        return Requirements()

    @abstractmethod
    def decode(
        self,
        model: Model,
        prefix: Prefix,
        generators: Sequence[Generator],
        watch: Stopwatch,
        conditioning: Conditioning | None = None,
    ) -> Decoded:
        """Chunks for B embedded observations, one generator each."""

    def read(self, model: Model, prefix: Prefix) -> Prefix:
        """The prefix as deep as every chunk on it needs it, whatever the noise; several draws share that.

        By default no layer is known to be needed.
        """
        return prefix

    def passes(self, depth: int) -> Passes:
        """The passes it may take through a backbone of so many layers; by default those of one draw at full depth."""
        return Passes.at(depth)

    def executing(self, n_action_steps: int) -> ComputePolicy:
        """The same where so many actions of each chunk are executed; by default that changes nothing."""
        return self

    @property
    def reports_spread(self) -> bool:
        """Whether it says how far several draws lie apart (``Decoded.spread_BL``)."""
        return False

    @property
    def averages(self) -> bool:
        """Whether its chunks are means of several draws, which no draw need be near."""
        return False

    @property
    def levels(self) -> int:
        """How many levels of draws it nests, for what draws around it to begin its own from other noise; by default none."""
        return 0

    @property
    def stages(self) -> Stages | None:
        """Its solver steps, where it takes all of them at full depth, one after the other; None where it does more or less."""
        return None

    def exact(self, model: Model) -> ComputePolicy | None:
        """What it approximates on this model, where keys and values of the prefix are kept that should have changed."""
        return None
