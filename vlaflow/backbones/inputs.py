"""What a backbone takes, and the processors that make it of observations: on the CPU, before any device is touched.

    inputs = config.processor()(observation)                # in the loader's thread, or in the server's worker
    prefix = backbone.embed(inputs.to(device))

A processor resizes images, cuts patches, tokenizes and counts positions; the network only computes. It holds values and no
network that learns, so training and serving share it and any thread may run it.

Shape letters: B batch, P prefix tokens, S state dimension, I images of the whole batch, N patches of all images, C numbers of
a patch, V image tokens of all images, K patches pooled to a token, T answer tokens, E numbers of a sentence.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from vlaflow.data.batch import ObservationBatch, moved
from vlaflow.errors import CapabilityError, SpecError

HOST = {"host": True}
"""Metadata of a field that stays on the CPU, because the network uses its values as Python numbers."""


@dataclass(frozen=True)
class Inputs:
    """B observations as a network reads them, padded on the right. What a backbone has no use for is None or empty.

    Args:
        state_BS: float32, the normalised proprioceptive state; 0 where it is unknown.
        id_BP: int64 ids: tokens of a pretrained model, placeholders included; bytes of the instruction for the tiny one, or
            none where it reads ``sentence_BE``.
        padding_mask_BP: bool, False on padding; None when there is none.
        images: by view, uint8 (B, H, W, 3).
        patches: float32, what the vision tower reads of all images, in the order of their tokens: patches (N, C) or
            (I, N, C), or whole images (I, 3, H, W).
        grid_I3: int64, frames (1), rows and columns of patches of every image. It stays on the CPU.
        patch_position_N2: int64, row and column of every patch.
        pooled_VK: int64, the patches that become each image token; −1 beyond the border.
        image_BP: bool, where image features go.
        state_BP: bool, where the state goes.
        image_P: bool, tokens that belong to an image, its marks included, and see each other; alike in all rows.
        position_3BP: int64, time, height and width of every token, for rotary positions of three kinds.
        next_position_B: int64, the position of the first token after the prefix.
        sentence_BE: float32, the instruction as a vector of a frozen sentence encoder.
    """

    state_BS: Tensor
    id_BP: Tensor
    padding_mask_BP: Tensor | None = None
    images: Mapping[str, Tensor] = field(default_factory=dict)
    patches: Tensor | None = None
    grid_I3: Tensor | None = field(default=None, metadata=HOST)
    patch_position_N2: Tensor | None = None
    pooled_VK: Tensor | None = None
    image_BP: Tensor | None = None
    state_BP: Tensor | None = None
    image_P: Tensor | None = None
    position_3BP: Tensor | None = None
    next_position_B: Tensor | None = None
    sentence_BE: Tensor | None = None

    def __len__(self) -> int:
        return len(self.state_BS)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """The same on another device, but for what stays on the CPU."""
        if self.state_BS.device == torch.device(device):  # looking at every field takes 2 % of a small chunk
            return self
        found = {
            f.name: _moved(getattr(self, f.name), device, non_blocking)
            for f in dataclasses.fields(self)
            if not f.metadata.get("host")
        }
        return dataclasses.replace(self, **found)


def _moved(value: Any, device: torch.device | str, non_blocking: bool) -> Any:
    if isinstance(value, Mapping):
        return {name: moved(tensor, device, non_blocking=non_blocking) for name, tensor in value.items()}
    return moved(value, device, non_blocking=non_blocking)


class Processor(ABC):
    """Makes ``Inputs`` of observations, and knows the words of answers. It touches no device."""

    @abstractmethod
    def __call__(self, observation: ObservationBatch) -> Inputs:
        """What the network takes of B observations on the CPU, whose state is normalised.

        Raises:
            SpecError: for a state of another length, or an instruction that cannot be read.
        """

    @property
    def end_id(self) -> int:
        """The id that ends an answer."""
        raise self._speechless()

    def answer_ids(self, answers: Sequence[str]) -> Tensor:
        """Ids of each answer and its end, (B, T) int64, padded with −100."""
        raise self._speechless()

    def answer_texts(self, id_BT: Tensor) -> list[str]:
        """What rows of ids say, up to their end."""
        raise self._speechless()

    def bucketed(self, lengths: Sequence[int]) -> Processor:
        """The same, with instructions padded to the next of these lengths, so that programs of a few shapes serve all of them.

        By default itself, where the instruction does not change the shapes, or no program is made.
        """
        return self

    def save(self, folder: Path) -> None:  # noqa: B027
        """Write what it needs besides the backbone's config into a checkpoint folder; nothing by default."""

    def _speechless(self) -> CapabilityError:
        return CapabilityError(f"{type(self).__name__} has no text for answers, so its backbone cannot answer questions.")


def require_state(observation: ObservationBatch, expected: int) -> None:
    """Refuse a state of another length.

    Raises:
        SpecError: with both lengths.
    """
    found = observation.state_BS.shape[1]
    if found != expected:
        raise SpecError(f"The policy expects a state of length {expected}, got {found}.")


def shown_views(observation: ObservationBatch, views: Sequence[str]) -> Tensor | None:
    """Which of the views each observation has, bool (B, views); None when all have all."""
    if observation.shown is None or all(bool(observation.shown[view].all()) for view in views):
        return None
    return torch.stack([observation.shown[view] for view in views], 1)


def hide_images(mask_BP: Tensor | None, image_BP: Tensor, count_V: Tensor, shown_BV: Tensor | None) -> Tensor | None:
    """A padding mask that also hides the tokens of images that are missing.

    Args:
        mask_BP: bool, False on padding; None when there is none.
        image_BP: bool, the tokens of images, in the order of the views.
        count_V: int64, how many each view has, the same in every row.
        shown_BV: as ``shown_views`` says.
    """
    if shown_BV is None:
        return mask_BP
    visible_BP = torch.ones_like(image_BP)
    visible_BP[image_BP] = shown_BV.repeat_interleave(count_V, 1).flatten()
    return visible_BP if mask_BP is None else mask_BP & visible_BP
