"""Batched tensors as they leave the data room and enter a policy, in robot units (policies normalise).

Shape letters: B batch, H height, W width, S state dimension, L chunk size, D action dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vlaflow.errors import SpecError
from vlaflow.spec import Observation


@dataclass(frozen=True)
class ObservationBatch:
    """B observations of the same robot.

    Args:
        images: by view name, uint8 (B, H, W, 3); views may differ in size.
        state_BS: float32 (B, S), robot units.
        instructions: B sentences.
        known_BS: bool; unknown state dimensions are 0 after normalisation. None when all are known.
    """

    images: Mapping[str, Tensor]
    state_BS: Tensor
    instructions: Sequence[str]
    known_BS: Tensor | None = None

    def __len__(self) -> int:
        return len(self.instructions)

    def to(self, device: torch.device | str) -> ObservationBatch:
        """The same batch on another device."""
        known_BS = None if self.known_BS is None else self.known_BS.to(device)
        images = {k: v.to(device) for k, v in self.images.items()}
        return ObservationBatch(images, self.state_BS.to(device), self.instructions, known_BS)

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
                raise SpecError(f"Observation {i} of the batch has other views, image sizes or state length than the first.")
        images = {v: torch.from_numpy(np.stack([o.images[v] for o in observations])) for v in first.images}
        state = torch.from_numpy(np.stack([np.asarray(o.state, np.float32) for o in observations]))
        return ObservationBatch(images, state, [o.instruction for o in observations])


@dataclass(frozen=True)
class Executed:
    """What the robot was given while other actions were noted as those to be learned.

    Where the two are far apart, something intervened. Actions labelled after that belong to a state that the observation
    could not predict, so only a network that is given the actions executed until then learns them.

    Args:
        action_BLD: float32, what was executed.
        intervened_BL: bool, steps at which it was far from the action to be learned.
        present_BL: bool, steps that are neither past the episode's end nor a pause.
    """

    action_BLD: Tensor
    intervened_BL: Tensor
    present_BL: Tensor

    def valid_after(self, known_B1: Tensor | int) -> Tensor:
        """Steps that count when the first ``known_B1`` executed actions are given: no intervention lies between; bool (B,
        L).
        """
        place_1L = torch.arange(self.intervened_BL.shape[1], device=self.intervened_BL.device)[None]
        intervened_BL = self.intervened_BL & (place_1L >= known_B1)
        return self.present_BL & (intervened_BL.cumsum(1) - intervened_BL.long() == 0)

    def repeat(self, times: int) -> Executed:
        """Every sample so many times, one after the other."""
        return Executed(*(x.repeat_interleave(times, 0) for x in (self.action_BLD, self.intervened_BL, self.present_BL)))

    def to(self, device: torch.device | str) -> Executed:
        """The same on another device."""
        return Executed(self.action_BLD.to(device), self.intervened_BL.to(device), self.present_BL.to(device))


@dataclass(frozen=True)
class Batch:
    """Training samples.

    Args:
        observation: what the policy saw.
        action_BLD: float32, robot units; steps past the episode's end repeat its last action.
        valid_BL: bool; False on steps past the episode's end, on pauses, and on all that follow an intervention (see
            ``Executed``). They never touch the loss.
        episode_B: int64, the episode each sample comes from (named when a loss explodes).
        frame_B: int64, the frame within that episode.
        code_BK: int64, latent action codes of the frame, −1 where there are none; None when nobody asked for them.
        executed: what the robot was given at these steps; None when it was ``action_BLD``.
    """

    observation: ObservationBatch
    action_BLD: Tensor
    valid_BL: Tensor
    episode_B: Tensor
    frame_B: Tensor
    code_BK: Tensor | None = None
    executed: Executed | None = None

    @property
    def targets(self) -> int:
        """What an average over the batch stands for: valid actions (a decoder that draws masks counts them by its draw)."""
        return int(self.valid_BL.sum())

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(
            self.observation.to(device),
            self.action_BLD.to(device),
            self.valid_BL.to(device),
            self.episode_B,
            self.frame_B,
            None if self.code_BK is None else self.code_BK.to(device),
            None if self.executed is None else self.executed.to(device),
        )


@dataclass(frozen=True)
class VqaBatch:
    """Questions about images, with their answers.

    Args:
        observation: images by view; the instructions are the questions; no state dimension is known.
        answers: B sentences.
        names: of the questions, e.g. for a loss that explodes.
    """

    observation: ObservationBatch
    answers: Sequence[str]
    names: Sequence[str]

    @property
    def targets(self) -> int:
        """What an average over the batch stands for: answers."""
        return len(self.answers)

    def to(self, device: torch.device | str) -> VqaBatch:
        """The same batch on another device."""
        return VqaBatch(self.observation.to(device), self.answers, self.names)
