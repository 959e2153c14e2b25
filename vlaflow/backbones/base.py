"""The contract of a backbone: embed what its processor made of observations, then run its layers a few at a time.

A backbone is a stack of layers that can continue where it stopped and whose every layer can be run on other tokens that
read the prefix's keys and values. That is all a decoder, an early exit or a second expert needs.

Shape letters: B batch, P prefix tokens, T suffix tokens, W width, S state dimension.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

import torch
from torch import Tensor, nn

from vlaflow.backbones.inputs import Inputs, Processor
from vlaflow.data.batch import ObservationBatch
from vlaflow.errors import CapabilityError
from vlaflow.nn.attention import KeyValues, causal_mask
from vlaflow.nn.block import BlockConfig, Rotate
from vlaflow.nn.fake import real_tensors
from vlaflow.registry import Group, Part

Rotary = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class BackboneSpec:
    """What stacks and cost models need to know of a backbone.

    ``attention`` is how prefix tokens see each other: "full", or "causal" as in pretrained language models; ``state_dim`` is
    the length of the proprioceptive state it is made for; ``rotary`` says that its positions are rotations.
    """

    depth: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    attention: Literal["full", "causal"] = "full"
    state_dim: int = 0
    rotary: bool = False


@dataclass(frozen=True)
class InputLimit:
    """How much of something a backbone takes.

    Args:
        size: bytes of UTF-8 of a text, or tokens.
        key: the config's field that raises it.
    """

    size: int
    key: str


@dataclass(frozen=True)
class InputSize:
    """What a backbone makes of pictures before it looks at them, which frames are stored at and cameras' are brought to.

    Args:
        side: of the square in pixels that they are resized to; None keeps their shape.
        area: most pixels, where the shape is kept; None for any number.
    """

    side: int | None = None
    area: int | None = None


class BackboneConfig(Part, ABC):
    """All that is needed to build a backbone, weights aside; a checkpoint holds it as JSON.

    A kind is a frozen dataclass with the fields ``state_dim`` and ``views``, registered by its class's name under
    ``vlaflow.backbones`` (docs/extending.md). It provides what other parts must know before the network is built.
    """

    group: ClassVar[Group] = "backbones"

    if TYPE_CHECKING:  # a dataclass would take an inherited property for the default of its field

        @property
        def state_dim(self) -> int:
            """Length of the proprioceptive state, S."""

        @property
        def views(self) -> tuple[str, ...]:
            """Camera views in the order of their tokens."""

    @abstractmethod
    def build(self) -> Backbone:
        """The network, initialised from torch's global generator."""

    def resolved(self) -> Self:
        """With what is read from files that the config only names, as runs and checkpoints record it; by default as it is."""
        return self

    @abstractmethod
    def processor(self, folder: Path | None = None) -> Processor:
        """What makes the network's inputs of observations, on the CPU.

        Args:
            folder: of a checkpoint that ``Processor.save`` wrote into; None for a new policy.

        Raises:
            CheckpointError: when the checkpoint lacks a file.
        """

    def unread(self) -> Self:
        """The same network with its architecture written out, to be built without reading weights; by default as it is."""
        return self

    @property
    def can_answer(self) -> bool:
        """Whether the network has a language-model head, so that it can learn and give answers in words."""
        return False

    @property
    def input_size(self) -> InputSize:
        """The size that every view is brought to; by default as recorded, where the processor takes any."""
        return InputSize()

    @property
    def longest_instruction(self) -> InputLimit | None:
        """The longest instruction it reads; None where there is no fixed limit."""
        return None

    @property
    def longest_answer(self) -> InputLimit | None:
        """The longest answer it learns to give; None where there is no fixed limit."""
        return None

    @property
    def longest_suffix(self) -> InputLimit | None:
        """The most tokens that it has positions for behind an observation's; None where there is no fixed limit."""
        return None

    def rater_block(self) -> BlockConfig:
        """The transformer block of a rater that reads this backbone's hidden states, so of the same width.

        Raises:
            CapabilityError: by default; a backbone whose policies are to be rated overrides it.
        """
        raise CapabilityError(
            f"{type(self).__name__} does not say what a rater of its states is made of (rater_block), so none can be added."
        )


@dataclass(frozen=True)
class Prefix:
    """An encoded observation, and how far it has been encoded.

    Args:
        backbone: the network that encodes it.
        hidden_BPW: hidden states after ``depth`` layers.
        padding_mask_BP: bool, False on padding; None when there is none.
        kv_cache: keys and values of every layer that has run.
        rotary: cosines and sines of the prefix positions, (B, P, E) each, for backbones that rotate.
        next_position_B: position of the first suffix token, for backbones that count positions.
        state_BS: the normalised proprioceptive state, for stacks that read it themselves.
        mask_PP: bool, which prefix tokens see which, for backbones where it is neither all nor those before.
        embedded_BPW: the tokens before the first layer, for running them once more; None until one has run.
        written: tokens that a decoder has had the backbone write after the observation; later ones take positions after them.
        action_mask_BLD: bool, the dimensions and steps that a chunk of each observation's robot has, out of the decoder's; None
            for all.
    """

    backbone: Backbone
    hidden_BPW: Tensor
    padding_mask_BP: Tensor | None = None
    kv_cache: tuple[KeyValues, ...] = ()
    rotary: Rotary | None = None
    next_position_B: Tensor | None = None
    state_BS: Tensor | None = None
    mask_PP: Tensor | None = None
    embedded_BPW: Tensor | None = None
    written: int = 0
    action_mask_BLD: Tensor | None = None

    @property
    def depth(self) -> int:
        """Layers run so far."""
        return len(self.kv_cache)

    @property
    def batch(self) -> int:
        """Number of observations."""
        return self.hidden_BPW.shape[0]

    def detach(self) -> Prefix:
        """The same prefix without a path back to the backbone (gradient truncation)."""
        embedded_BPW = None if self.embedded_BPW is None else self.embedded_BPW.detach()
        kv_cache = tuple(m.detach() for m in self.kv_cache)
        return replace(self, hidden_BPW=self.hidden_BPW.detach(), kv_cache=kv_cache, embedded_BPW=embedded_BPW)

    def reading(self, kv_cache: tuple[KeyValues, ...], written: int = 0) -> Prefix:
        """The same observations with other keys and values to read, after so many more written tokens."""
        return replace(self, kv_cache=kv_cache, written=self.written + written)

    def restart(self) -> Prefix:
        """The same observations before the first layer."""
        if self.embedded_BPW is None:
            return self
        return replace(self, hidden_BPW=self.embedded_BPW, kv_cache=(), embedded_BPW=None, written=0)

    def select(self, row_R: Tensor) -> Prefix:
        """Some of the observations, in the order of the int64 indices."""
        return replace(
            self,
            hidden_BPW=self.hidden_BPW[row_R],
            padding_mask_BP=None if self.padding_mask_BP is None else self.padding_mask_BP[row_R],
            kv_cache=tuple(m.select(row_R) for m in self.kv_cache),
            rotary=None if self.rotary is None else (self.rotary[0][row_R], self.rotary[1][row_R]),
            next_position_B=None if self.next_position_B is None else self.next_position_B[row_R],
            state_BS=None if self.state_BS is None else self.state_BS[row_R],
            embedded_BPW=None if self.embedded_BPW is None else self.embedded_BPW[row_R],
            action_mask_BLD=None if self.action_mask_BLD is None else self.action_mask_BLD[row_R],
        )


class RunsLayers(Protocol):
    """What reads a prefix: a backbone, or a model that has another way to run the backbone's layers."""

    def run(self, prefix: Prefix, upto: int | None = None) -> Prefix:
        """See ``Backbone.run``."""
        ...


class Backbone(nn.Module, ABC):
    """A vision-language network seen as an embedding and a stack of layers.

    ``config`` rebuilds the network from nothing but itself, weights aside, whatever the network was first made from; it is
    what a checkpoint holds.
    """

    spec: BackboneSpec
    config: Any
    """Its ``BackboneConfig``."""

    @property
    @abstractmethod
    def views(self) -> Mapping[str, int | None]:
        """The camera views it reads, with the square image size each is resized to (None: any size)."""

    @property
    def blocks(self) -> Mapping[nn.Module, str]:
        """Its layers, and those of its parts, each with the name of the method that runs it.

        Nothing else may read a block's parameters: sharded training gathers them for the time of that call. None by default.
        """
        return {}

    @property
    def pretrained(self) -> Sequence[nn.Module]:
        """Its parts with pretrained weights, which low-rank adapters leave as they are; none by default."""
        return ()

    @property
    def adapted(self) -> Iterable[nn.Linear]:
        """The matrices in them that get an adapter where a recipe does not name others; none by default."""
        return ()

    @abstractmethod
    def embed(self, inputs: Inputs) -> Prefix:
        """Tokens of B observations before the first layer. All is on the device but what ``Inputs`` keeps on the CPU, and
        nothing is fetched back from it.
        """

    def blank(self, batch: int, side: int) -> Prefix:
        """The embedded prefix of black pictures and a short instruction, to count what a training step needs.

        Args:
            batch: observations.
            side: of the square pictures in pixels, where the backbone reads any size.
        """
        views = {view: size or side for view, size in self.views.items()}
        with real_tensors():
            images = {view: torch.zeros(batch, size, size, 3, dtype=torch.uint8) for view, size in views.items()}
            observation = ObservationBatch(images, torch.zeros(batch, self.config.state_dim), ("Open a drawer",) * batch)
            inputs = self.config.processor()(observation)
        return self.embed(inputs)

    def vision_numbers(self, batch: int, side: int) -> int:
        """Activations that a vision part which ``blank`` leaves out keeps for the backward pass; none by default."""
        return 0

    @abstractmethod
    def layer(
        self,
        index: int,
        hidden_BTW: Tensor,
        rotary: Rotary | None = None,
        kv_cache: KeyValues | None = None,
        padding_mask_BT: Tensor | None = None,
        *,
        mask_TS: Tensor | None = None,
    ) -> tuple[Tensor, KeyValues]:
        """One layer on any tokens, which also read ``kv_cache``. Returns hidden states and the tokens' own keys, values.

        Where ``mask_TS`` (bool, T × T) is True, token t sees token s of its own sequence; by default all. ``kv_cache`` always.
        """

    @abstractmethod
    def place(self, suffix_BTW: Tensor, prefix: Prefix, offset: int = 0) -> tuple[Tensor, Rotary | None]:
        """Give suffix tokens their positions, added or as a rotation for ``layer``.

        The first stands ``offset`` places behind the prefix and the tokens written after it (``Prefix.written``).
        """

    def rotation(self, prefix: Prefix, batch: int, tokens: int) -> Rotate | None:
        """How an expert rotates suffix tokens to the positions that ``place`` gives, noise samples innermost in the batch.

        None where this backbone's positions are not rotations: the expert then learns positions of its own.
        """
        return None

    @abstractmethod
    def finish(self, hidden_BTW: Tensor) -> Tensor:
        """The norm that follows the last layer run."""

    def run(self, prefix: Prefix, upto: int | None = None) -> Prefix:
        """Continue the prefix through the layers below ``upto`` (all of them by default). Layers already run are kept."""
        upto, mask_PP = self.spec.depth if upto is None else upto, prefix.mask_PP
        hidden, kv_cache = prefix.hidden_BPW, list(prefix.kv_cache)
        if mask_PP is None and self.spec.attention == "causal":
            mask_PP = causal_mask(hidden.shape[1], hidden.device)
        for index in range(prefix.depth, upto):
            hidden, own = self.layer(index, hidden, prefix.rotary, None, prefix.padding_mask_BP, mask_TS=mask_PP)
            kv_cache.append(own)
        embedded = prefix.hidden_BPW if prefix.depth == 0 else prefix.embedded_BPW
        return replace(prefix, hidden_BPW=hidden, kv_cache=tuple(kv_cache), embedded_BPW=embedded)

    def follow(
        self, suffix_BTW: Tensor, prefix: Prefix, depths: Sequence[int], mask_TS: Tensor | None = None
    ) -> tuple[list[Tensor], tuple[KeyValues, ...]]:
        """Suffix tokens behind the prefix through the layers below the last of ``depths``, in one pass.

        Args:
            suffix_BTW: embedded tokens without their positions; several noise samples per observation innermost.
            prefix: run to the last depth at least.
            depths: ascending.
            mask_TS: bool (T, T), True where token t sees token s; None for full attention. All see the prefix.

        Returns:
            States (B, T, W) after each depth and the final norm, in the suffix's number format; and the suffix's own keys and
            values in every layer, for later tokens that read them.
        """
        found, written = [], []
        hidden_BTW, rotary = self.place(suffix_BTW, prefix)
        for index in range(depths[-1]):
            hidden_BTW, own = self.layer(index, hidden_BTW, rotary, prefix.kv_cache[index], mask_TS=mask_TS)
            written.append(own)
            if index + 1 in depths:
                found.append(self.finish(hidden_BTW).to(suffix_BTW.dtype))
        return found, tuple(written)
