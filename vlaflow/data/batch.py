"""Batched tensors on their way from the data to a policy, in robot units (policies normalise them).

Shape letters: B batch, H height, W width, S state dimension, L chunk size, D action dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from vlaflow.errors import SpecError
from vlaflow.spec import Observation

T = TypeVar("T", Tensor, Tensor | None)


def moved(tensor: T, device: torch.device | str, *, non_blocking: bool) -> T:
    """A tensor on another device.

    A copy to a GPU that is not to be waited for starts from pinned memory, without which CUDA would wait all the same.
    """
    if tensor is None:
        return tensor
    if non_blocking and torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=non_blocking)


@dataclass(frozen=True)
class ObservationBatch:
    """B observations, of one robot or, brought to a common shape (``common.CommonShape``), of several.

    Args:
        images: by view name, uint8 (B, H, W, 3); views may differ in size.
        state_BS: float32 (B, S), robot units.
        instructions: B sentences.
        known_BS: bool; unknown state dimensions are 0 after normalisation. None when all are known.
        robot_B: int64, the robot of each observation, as a place in the policy's list; None where there is one robot, and for
            questions, which belong to none.
        shown: by view, bool (B,): whether the observation has it; an image that is missing is black and never attended to. None
            when all have every view.
    """

    images: Mapping[str, Tensor]
    state_BS: Tensor
    instructions: Sequence[str]
    known_BS: Tensor | None = None
    robot_B: Tensor | None = None
    shown: Mapping[str, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.instructions)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> ObservationBatch:
        """The same batch on another device."""

        def own(tensor: T) -> T:
            return moved(tensor, device, non_blocking=non_blocking)

        return ObservationBatch(
            {view: own(image) for view, image in self.images.items()},
            own(self.state_BS),
            self.instructions,
            own(self.known_BS),
            own(self.robot_B),
            None if self.shown is None else {view: own(mask) for view, mask in self.shown.items()},
        )

    @staticmethod
    def collate(observations: Sequence[Observation]) -> ObservationBatch:
        """Stack single observations.

        Raises:
            SpecError: when views, image sizes or state lengths differ between them.
        """
        first = observations[0]
        for i, other in enumerate(observations):
            same = (
                other.images.keys() == first.images.keys()
                and all(other.images[v].shape == first.images[v].shape for v in first.images)
                and other.state.shape == first.state.shape
            )
            if not same:
                raise SpecError(
                    f"Observation {i} of the batch differs from the first in its views, image sizes or state length."
                )
        images = {v: torch.from_numpy(np.stack([o.images[v] for o in observations])) for v in first.images}
        state = torch.from_numpy(np.stack([np.asarray(o.state, np.float32) for o in observations]))
        return ObservationBatch(images, state, [o.instruction for o in observations])

    def split(self) -> list[Observation]:
        """Single observations, the inverse of ``collate``; images and states alone."""
        return [
            Observation({view: x[i].cpu().numpy() for view, x in self.images.items()}, self.state_BS[i].cpu().numpy(), words)
            for i, words in enumerate(self.instructions)
        ]


@dataclass(frozen=True)
class Executed:
    """The actions that the robot executed, where they can differ from the actions to be learned.

    A large difference is an intervention. The actions recorded after it belong to a state that the observation could not
    predict, so they count in the loss only for a network that is conditioned on the actions executed until then.

    Args:
        action_BLD: float32, the executed actions.
        intervened_BL: bool, steps at which the executed action is far from the action to be learned.
        present_BL: bool, steps that are neither past the end of the episode nor in a pause.
        outlier_BL: bool, steps whose numbers are wrong and never count; None for none.
    """

    action_BLD: Tensor
    intervened_BL: Tensor
    present_BL: Tensor
    outlier_BL: Tensor | None = None

    def valid_after(self, known_B1: Tensor | int) -> Tensor:
        """Mask of the steps that count if the first ``known_B1`` executed actions are known: no intervention in between.

        Returns:
            bool (B, L).
        """
        place_1L = torch.arange(self.intervened_BL.shape[1], device=self.intervened_BL.device)[None]
        intervened_BL = self.intervened_BL & (place_1L >= known_B1)
        valid_BL = self.present_BL & (intervened_BL.cumsum(1) - intervened_BL.long() == 0)
        return valid_BL if self.outlier_BL is None else valid_BL & ~self.outlier_BL

    def repeat(self, times: int) -> Executed:
        """Repeat every sample ``times`` times in a row."""
        return self._changed(lambda x: x.repeat_interleave(times, 0))

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Executed:
        """The same tensors on another device."""
        return self._changed(lambda x: moved(x, device, non_blocking=non_blocking))

    def _changed(self, change: Callable[[Tensor], Tensor]) -> Executed:
        outlier_BL = None if self.outlier_BL is None else change(self.outlier_BL)
        return Executed(change(self.action_BLD), change(self.intervened_BL), change(self.present_BL), outlier_BL)


LossName = Literal["loss", "answer_loss"]
"""Names of the losses in the log: on actions (or frame pairs), and on questions."""


class SampleGroup(NamedTuple):
    """Samples that a message lists together; groups sort by data set, then by episode.

    Args:
        source: data set, "" where there is one.
        episode: its number, −1 for questions.
        heading: what precedes the samples' numbers or names, in the singular.
    """

    source: str
    episode: int
    heading: str


@dataclass(frozen=True)
class Batch:
    """A batch of training samples.

    Args:
        observation: the policy's input.
        action_BLD: float32, robot units; steps past the end of the episode repeat its last action.
        valid_BL: bool; False on steps past the end of the episode, in pauses, and after an intervention (see
            ``Executed``). These steps do not enter the loss.
        episode_B: int64, the episode each sample comes from (reported when the loss diverges).
        frame_B: int64, the frame within that episode.
        code_BK: int64, latent action codes of the frame, −1 where there are none; None unless the training uses them.
        executed: the actions executed at these steps; None if they equal ``action_BLD``.
        mask_BLD: bool; False in dimensions and steps that a chunk of the sample's robot does not have: they hold 0, or repeat
            its last action. None when every robot has all of them.
        sources: the data set of each sample; empty where there is one.
    """

    observation: ObservationBatch
    action_BLD: Tensor
    valid_BL: Tensor
    episode_B: Tensor
    frame_B: Tensor
    code_BK: Tensor | None = None
    executed: Executed | None = None
    mask_BLD: Tensor | None = None
    sources: Sequence[str] = ()

    loss_name: ClassVar[LossName] = "loss"
    advice: ClassVar[str] = "Look at them (vlaflow data show)"
    """What to do about samples on which the loss diverges."""

    @property
    def targets(self) -> int:
        """Number of terms that the loss averages over: valid actions (a decoder that samples masks does its own count)."""
        return int(self.valid_BL.sum())

    def sample_names(self) -> list[tuple[SampleGroup, int | str]]:
        """Each sample's group, its episode, and its frame."""
        sources = self.sources or [""] * len(self.episode_B)
        return [
            (SampleGroup(source, episode, f"{source and f'{source} '}episode {episode} frame"), frame)
            for source, episode, frame in zip(sources, self.episode_B.tolist(), self.frame_B.tolist(), strict=True)
        ]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same batch on another device."""
        return Batch(
            self.observation.to(device, non_blocking=non_blocking),
            moved(self.action_BLD, device, non_blocking=non_blocking),
            moved(self.valid_BL, device, non_blocking=non_blocking),
            self.episode_B,
            self.frame_B,
            moved(self.code_BK, device, non_blocking=non_blocking),
            None if self.executed is None else self.executed.to(device, non_blocking=non_blocking),
            moved(self.mask_BLD, device, non_blocking=non_blocking),
            self.sources,
        )


@dataclass(frozen=True)
class VqaBatch:
    """A batch of questions about images, with their answers.

    Args:
        observation: images by view; the instructions are the questions; no state dimension is known.
        answers: B sentences.
        names: of the questions, reported when the loss diverges.
    """

    observation: ObservationBatch
    answers: Sequence[str]
    names: Sequence[str]

    loss_name: ClassVar[LossName] = "answer_loss"
    advice: ClassVar[str] = "Look at them"

    @property
    def targets(self) -> int:
        """Number of terms that the loss averages over: answers."""
        return len(self.answers)

    def sample_names(self) -> list[tuple[SampleGroup, int | str]]:
        """Each question's group, which is one for all, and its name."""
        return [(SampleGroup("", -1, "question"), name) for name in self.names]
