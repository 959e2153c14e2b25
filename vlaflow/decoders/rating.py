"""The contract of a rater: how sure a policy may be of each action of a finished chunk, and what it learns that from.

``rater`` has AsyncVLA's; other distributions may bring more (``registry``). What is done with a confidence is not its affair
(``compute.doubts``), nor how it is trained (``policies.rater_stage``).

Shape letters: B batch, L chunk size, D action dimension.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Self

from torch import Tensor, nn

from vlaflow.backbones.base import BackboneSpec, Prefix
from vlaflow.errors import ConfigError
from vlaflow.registry import Group, Part


class BaseRaterConfig(Part, ABC):
    """All that is needed to build a rater, weights aside; a checkpoint holds it as JSON.

    A kind is a frozen dataclass, registered by its class's name under ``vlaflow.raters`` (docs/extending.md).
    """

    group: ClassVar[Group] = "raters"

    @abstractmethod
    def build(self, spec: BackboneSpec, action_dim: int, chunk_size: int) -> Rater:
        """The rater of such chunks on such a backbone, initialised from torch's global generator."""

    def labels(self, error_BL: Tensor, valid_BL: Tensor) -> Tensor:
        """What the rating of actions with these errors should be, (B, L) in [0, 1]; by default relative (``rater_labels``).

        Args:
            error_BL: squared error per action, ≥ 0, in normalised units.
            valid_BL: bool, the actions that count.
        """
        return rater_labels(error_BL, valid_BL)

    @property
    def error_scale(self) -> float | None:
        """The error that absolute labels are measured in; None for relative labels."""
        return None

    def with_error_scale(self, scale: float) -> Self:
        """The config of a rater that learns absolute errors, of which this is the middle one.

        Raises:
            ConfigError: for raters that learn no absolute errors.
        """
        raise ConfigError(f"A {type(self).__name__} has no labels on the scale of the error; leave labels=absolute out.")


class Rater(nn.Module, ABC):
    """Gives every action of a chunk a confidence."""

    config: BaseRaterConfig

    @property
    def layers(self) -> int:
        """Network layers that a rating runs, for ``Chunk.layer_passes``; by default one."""
        return 1

    @abstractmethod
    def forward(self, prefix: Prefix, action_BLD: Tensor) -> Tensor:
        """Confidence in [0, 1] of every action of normalised chunks, (B, L) float32.

        Args:
            prefix: as the decoder reads it at full depth. The backbone is frozen and gets no gradient.
            action_BLD: normalised; one chunk for each row of the prefix.
        """


def rater_labels(error_BL: Tensor, valid_BL: Tensor, alpha: float = 0.01, beta: float = 0.98, eps: float = 1e-6) -> Tensor:
    """q = 1 − α − β·(e − min e)/(max e − min e + ε) within each chunk (AsyncVLA eq. 6).

    Args:
        error_BL: squared error per action, ≥ 0, (B, L).
        valid_BL: bool; padded and paused actions take no part in the minimum and maximum.

    Returns:
        (B, L) in [1 − α − β, 1 − α], falling as the error grows; 1 − α everywhere when all errors are equal. Labels of
        invalid actions are clamped into the range and must be masked by the caller.
    """
    low_B1 = error_BL.masked_fill(~valid_BL, float("inf")).amin(1, keepdim=True)
    high_B1 = error_BL.masked_fill(~valid_BL, float("-inf")).amax(1, keepdim=True)
    share_BL = ((error_BL - low_B1) / (high_B1 - low_B1 + eps)).nan_to_num(0.0).clamp(0, 1)
    return 1 - alpha - beta * share_BL
