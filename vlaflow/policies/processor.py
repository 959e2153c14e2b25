"""From observations in robot units to what a policy's networks take: on the CPU, by values alone.

Training runs it in the loader's thread, a server in its worker, ``Policy.act`` where it is called; all three run this one.

Shape letters: B batch, S state dimension, T answer tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from vlaflow.backbones.inputs import Inputs, Processor, require_state
from vlaflow.data.batch import ObservationBatch, moved
from vlaflow.data.common import Normalizers
from vlaflow.data.resize import fitted, resize
from vlaflow.decoders.base import Targets
from vlaflow.errors import SpecError, nearest


@dataclass(frozen=True)
class PolicyProcessor:
    """Checks views, resizes images, normalises the state, and has the backbone's processor make the inputs.

    Args:
        views: with the square image size each is resized to; None leaves the size to the backbone's processor.
        state: normalisers of the state.
        backbone: the backbone's processor.
        area: most pixels of a view whose size is left to it.
    """

    views: Mapping[str, int | None]
    state: Normalizers
    backbone: Processor
    area: int | None = None

    def __call__(self, observation: ObservationBatch) -> Inputs:
        """What the networks take of B observations on the CPU, in robot units.

        Raises:
            SpecError: for missing views, a state of another length, or an instruction that cannot be read.
        """
        require_views(observation, self.views)
        require_state(observation, self.state.dim)
        images = {view: _resized(observation.images[view], size, self.area) for view, size in self.views.items()}
        state_BS = self.state.forward(observation.state_BS, observation.robot_B)
        if observation.known_BS is not None:
            state_BS = state_BS * observation.known_BS
        return self.backbone(replace(observation, images=images, state_BS=state_BS, known_BS=None))


@dataclass(frozen=True)
class Prepared:
    """A training batch as the networks take it.

    Args:
        inputs: of the observations.
        targets: what is to be learned, normalised.
    """

    inputs: Inputs
    targets: Targets

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Prepared:
        """The same on another device."""
        return Prepared(self.inputs.to(device, non_blocking=non_blocking), self.targets.to(device, non_blocking=non_blocking))


@dataclass(frozen=True)
class Drawn:
    """Everything random in a training loss.

    Args:
        numbers: tensors; see ``Decoder.draw``.
        integers: choices and seeds, which stay on the CPU.
    """

    numbers: tuple[Tensor, ...] = ()
    integers: tuple[int, ...] = ()

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Drawn:
        """The same on another device."""
        return Drawn(tuple(moved(each, device, non_blocking=non_blocking) for each in self.numbers), self.integers)


@dataclass(frozen=True)
class PreparedAnswers:
    """Questions and their answers as the networks take them.

    Args:
        inputs: of the questions and their images.
        answer_BT: int64 ids of the answers and their ends, padded with −100. They stay on the CPU, which checks them.
    """

    inputs: Inputs
    answer_BT: Tensor

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PreparedAnswers:
        """The same on another device."""
        return replace(self, inputs=self.inputs.to(device, non_blocking=non_blocking))


def require_views(observation: ObservationBatch, views: Collection[str]) -> None:
    """Refuse an observation without one of the views, with a ``SpecError``."""
    for view in views:
        if view not in observation.images:
            raise SpecError(
                f"The policy looks at view '{view}', which the observation lacks; {nearest(view, observation.images)}"
            )


def _resized(image_BHWC: Tensor, size: int | None, area: int | None) -> Tensor:
    """As the frames of training were."""
    height, width = image_BHWC.shape[1:3]
    if fitted(height, width, size, area) == (height, width):
        return image_BHWC
    return torch.from_numpy(np.stack([resize(image, size, area) for image in image_BHWC.numpy()]))
