"""One shape for samples of several robots: the widest state, the widest action, the longest chunk, every view.

    shape = CommonShape(state_dim=14, action_dim=14, chunk_size=50, views=("front", "wrist"))
    batch = shape.batch(batch, robot=1)         # padded, with masks of what that robot has

Training and inference pad with the same functions. Numbers that a robot lacks are 0 after normalisation, steps beyond its chunk
repeat its last action, and views that it lacks are black; ``mask_BLD`` and ``shown`` say which, for losses and attention.

Shape letters: B batch, S state dimension, L chunk size, D action dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from vlaflow.data.batch import Batch, Executed, ObservationBatch
from vlaflow.data.transforms import Normalizer
from vlaflow.errors import SpecError


@dataclass(frozen=True)
class CommonShape:
    """What the networks of a policy take.

    Args:
        state_dim: S.
        action_dim: D.
        chunk_size: L.
        views: names of all views.
    """

    state_dim: int
    action_dim: int
    chunk_size: int
    views: tuple[str, ...]

    def observation(self, observation: ObservationBatch, robot: int, views: Sequence[str] | None = None) -> ObservationBatch:
        """Observations of one robot in this shape.

        Args:
            observation: in the robot's own shape.
            robot: its place in the policy's list.
            views: those that it has; all in ``observation`` by default. Other images are ignored.

        Raises:
            SpecError: it has a longer state, or none of the views.
        """
        own = [view for view in self.views if view in (observation.images if views is None else views)]
        if not own:
            raise SpecError(f"The policy looks at {', '.join(self.views)}, and the observation has none of these views.")
        count, extra = len(observation), self.state_dim - observation.state_BS.shape[1]
        if extra < 0:
            raise SpecError(f"The policy reads states of at most {self.state_dim} numbers, got {self.state_dim - extra}.")
        black = torch.zeros_like(observation.images[own[0]])
        known_BS = observation.known_BS
        return replace(
            observation,
            images={view: observation.images[view] if view in own else black for view in self.views},
            state_BS=functional.pad(observation.state_BS, (0, extra)),
            known_BS=None if known_BS is None else functional.pad(known_BS, (0, extra)),
            robot_B=torch.full((count,), robot),
            shown={view: torch.full((count,), view in own) for view in self.views},
        )

    def batch(self, batch: Batch, robot: int) -> Batch:
        """Training samples of one robot in this shape."""
        count, steps, dim = batch.action_BLD.shape
        mask_LD = self.mask(steps, dim)

        def padded(mask_BL: Tensor) -> Tensor:
            return functional.pad(mask_BL, (0, self.chunk_size - steps))

        executed = batch.executed and Executed(
            self.chunk(batch.executed.action_BLD),
            padded(batch.executed.intervened_BL),
            padded(batch.executed.present_BL),
            None if batch.executed.outlier_BL is None else padded(batch.executed.outlier_BL),
        )
        return replace(
            batch,
            observation=self.observation(batch.observation, robot),
            action_BLD=self.chunk(batch.action_BLD),
            valid_BL=padded(batch.valid_BL),
            executed=executed,
            mask_BLD=mask_LD.expand(count, -1, -1),
        )

    def mask(self, steps: int, dim: int) -> Tensor:
        """bool (L, D), True in the steps and dimensions of a robot that has so many."""
        mask_LD = torch.zeros(self.chunk_size, self.action_dim, dtype=torch.bool)
        mask_LD[:steps, :dim] = True
        return mask_LD

    def chunk(self, action_BLD: Tensor) -> Tensor:
        """Chunks with 0 in further dimensions and their last action in further steps."""
        steps, dim = action_BLD.shape[1:]
        wide_BLD = functional.pad(action_BLD, (0, self.action_dim - dim))
        return torch.cat((wide_BLD, wide_BLD[:, -1:].expand(-1, self.chunk_size - steps, -1)), 1)


@dataclass(frozen=True)
class Normalizers:
    """Normalizers of several robots over the dimensions that are common to them, or of one.

    Args:
        robots: the normalizer of each robot, in the policy's order.
        dim: dimensions of what is normalised; those that a robot lacks are 0.
    """

    robots: tuple[Normalizer, ...]
    dim: int

    def forward(self, x_BD: Tensor, robot_B: Tensor | None = None) -> Tensor:
        """Robot units to normalised units, (B, ..., D), each row by its robot.

        Without ``robot_B`` the rows are of the only robot; with several they are of none, as questions are, and become 0.
        """
        if robot_B is None:
            return self.robots[0].forward(x_BD) if len(self.robots) == 1 else torch.zeros_like(x_BD)
        result_BD = torch.zeros_like(x_BD)
        for robot in robot_B.unique().tolist():
            own, here_B = self.robots[robot], robot_B == robot
            result_BD[here_B] = functional.pad(own.forward(x_BD[here_B][..., : own.dim]), (0, self.dim - own.dim))
        return result_BD


def joined(batches: Sequence[Batch], back_B: Tensor) -> Batch:
    """One batch of several in the common shape.

    Args:
        batches: one after the other.
        back_B: int64, for each sample of the result its place among all of them.
    """
    observations = [b.observation for b in batches]
    instructions = [text for o in observations for text in o.instructions]
    sources = [source for b in batches for source in b.sources]

    def maybe(parts: Sequence[Tensor | None]) -> Tensor | None:
        found = [part for part in parts if part is not None]
        return torch.cat(found)[back_B] if len(found) == len(parts) else None

    def by_name(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.cat([part[name] for part in parts])[back_B] for name in parts[0]}

    shown = [o.shown for o in observations if o.shown is not None]
    executed = [b.executed for b in batches if b.executed is not None]
    return Batch(
        ObservationBatch(
            by_name([o.images for o in observations]),
            torch.cat([o.state_BS for o in observations])[back_B],
            [instructions[i] for i in back_B.tolist()],
            maybe([o.known_BS for o in observations]),
            maybe([o.robot_B for o in observations]),
            by_name(shown) if len(shown) == len(observations) else None,
        ),
        torch.cat([b.action_BLD for b in batches])[back_B],
        torch.cat([b.valid_BL for b in batches])[back_B],
        torch.cat([b.episode_B for b in batches])[back_B],
        torch.cat([b.frame_B for b in batches])[back_B],
        maybe([b.code_BK for b in batches]),
        Executed(
            torch.cat([e.action_BLD for e in executed])[back_B],
            torch.cat([e.intervened_BL for e in executed])[back_B],
            torch.cat([e.present_BL for e in executed])[back_B],
            maybe([e.outlier_BL for e in executed]),
        )
        if len(executed) == len(batches)
        else None,
        maybe([b.mask_BLD for b in batches]),
        [sources[i] for i in back_B.tolist()] if sources else (),
    )
