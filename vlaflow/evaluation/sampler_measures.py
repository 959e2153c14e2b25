"""Measures of a sampler on held-out frames: what might foretell its success without a simulator.

Every compute policy samples several chunks for the same frames and from the same noise. docs/sampling.md compares the measures
with success rates. Smaller is better for all of them.

Shape letters: N frames, B batch, K draws, L chunk size, H executed actions of a chunk, D action dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor

from vlaflow.backbones.base import Prefix
from vlaflow.compute.base import ComputePolicy, Stopwatch
from vlaflow.compute.consensus import mean_and_spread
from vlaflow.data.transforms import Normalizer
from vlaflow.evaluation.calibrate import BATCH, Sample
from vlaflow.policies.base import Policy
from vlaflow.progress import progress

MEASURES: Mapping[str, str] = {
    "executed_error": "mean squared distance of the executed actions to the demonstration",
    "chunk_error": "the same over the whole chunk",
    "first_error": "the same of the first two actions",
    "shape_error": "the same of the executed actions, without the mean difference of each dimension over them",
    "nearest_error": "the same of the executed actions, of the nearest of several draws",
    "gripper_error": "share of the executed actions on the other side of the gripper's range than the demonstration",
    "inconsistency": "mean squared difference between the rest of a chunk and the chunk made after executing its beginning, "
    "from the demonstration's own state",
    "spread": "root mean square distance of several draws to their mean, executed actions",
    "roughness": "mean squared second difference of the executed actions",
}
"""Names and meanings; all in normalised units, on valid actions."""


@dataclass(frozen=True)
class SamplerMeasures:
    """What one compute policy did on N frames.

    Args:
        values: by measure, float64 (N,); NaN where a frame has nothing to measure.
        nfe, layer_passes: means per chunk.
    """

    values: dict[str, np.ndarray]
    nfe: float
    layer_passes: float

    def by_episode(self, measure: str, episode_N: np.ndarray) -> np.ndarray:
        """Mean of a measure over the frames of each episode, by the episodes' numbers; NaN where there are none."""
        value_N = self.values[measure]
        known_N = np.isfinite(value_N)
        _, place_N = np.unique(episode_N, return_inverse=True)
        count_E = np.bincount(place_N, known_N)
        total_E = np.bincount(place_N, np.where(known_N, value_N, 0.0))
        return np.divide(total_E, count_E, out=np.full(len(count_E), np.nan), where=count_E > 0)


@dataclass(frozen=True)
class SampledChunks:
    """What a compute policy sampled for a batch of frames, on the CPU, normalised.

    Args:
        chunk_BKLD: K chunks of each frame.
        after_BLD: a chunk of the frame that follows the executed actions in the demonstration; None if there is one draw.
        target_BLD: the demonstration.
        valid_BL: bool, actions of the demonstration that count.
        has_later_B: bool, whether ``after_BLD`` belongs to the same episode.
    """

    chunk_BKLD: Tensor
    after_BLD: Tensor | None
    target_BLD: Tensor
    valid_BL: Tensor
    has_later_B: np.ndarray


@dataclass(frozen=True)
class Scale:
    """What the measures of a policy need to know of its actions.

    Args:
        executed: H, actions of a chunk that are executed.
        gripper_D: bool, dimensions of grippers.
        middle_D: middle of each dimension's range in the training data, normalised.
    """

    executed: int
    gripper_D: Tensor
    middle_D: Tensor

    @staticmethod
    def of(policy: Policy, executed: int) -> Scale:
        """Those of a policy; dimensions whose name contains "gripper" are grippers."""
        stats = policy.stats["action"]
        normalizer = Normalizer.from_stats(stats, policy.config.action_normalisation)
        gripper_D = torch.tensor(["gripper" in dimension.name for dimension in policy.action_spec.dimensions])
        return Scale(executed, gripper_D, normalizer.forward((torch.tensor(stats.min) + torch.tensor(stats.max)) / 2))

    def values(self, found: SampledChunks) -> dict[str, Tensor]:
        """The measures of a batch, each (B,)."""
        chunk_BKLD, valid_BL, place_L = found.chunk_BKLD, found.valid_BL, torch.arange(found.valid_BL.shape[1])
        target_B1LD = found.target_BLD[:, None]
        near_BL, first_BL = valid_BL & (place_L < self.executed), valid_BL & (place_L < min(2, self.executed))
        off_BKLD = chunk_BKLD - target_B1LD
        count_B11 = near_BL.sum(1)[:, None, None, None].clamp_min(1)
        bias_BK1D = (off_BKLD * near_BL[:, None, :, None]).sum(2, keepdim=True) / count_B11
        wrong_BKLD = (chunk_BKLD > self.middle_D) != (target_B1LD > self.middle_D)
        square_BKL, turn_BKLD = off_BKLD.square().mean(-1), chunk_BKLD[:, :, : self.executed].diff(n=2, dim=2)
        error_BK = _mean(square_BKL, near_BL)
        values = {
            "executed_error": error_BK.mean(1),
            "chunk_error": _mean(square_BKL, valid_BL).mean(1),
            "first_error": _mean(square_BKL, first_BL).mean(1),
            "shape_error": _mean((off_BKLD - bias_BK1D).square().mean(-1), near_BL).mean(1),
            "roughness": turn_BKLD[..., ~self.gripper_D].square().mean((1, 2, 3)),
        }
        if bool(self.gripper_D.any()):
            values["gripper_error"] = _mean(wrong_BKLD[..., self.gripper_D].float().mean(-1), near_BL).mean(1)
        if found.after_BLD is not None:
            _, spread_BL = mean_and_spread(chunk_BKLD)
            rest = chunk_BKLD.shape[2] - self.executed
            moved_BL = (chunk_BKLD[:, 0, self.executed :] - found.after_BLD[:, :rest]).square().mean(-1)
            both_BL = valid_BL[:, self.executed :] & torch.from_numpy(found.has_later_B)[:, None]
            values["nearest_error"] = error_BK.min(1).values
            values["spread"] = _mean(spread_BL.square()[:, None], near_BL)[:, 0].sqrt()
            values["inconsistency"] = _mean(moved_BL[:, None], both_BL)[:, 0]
        return values


@torch.no_grad()
def measure(
    policy: Policy, computes: Sequence[ComputePolicy], frames: Sample, *, n_action_steps: int, draws: int = 2
) -> tuple[list[SamplerMeasures], np.ndarray]:
    """Sample chunks with every compute policy on every frame.

    Args:
        policy: in evaluation mode.
        computes: what to measure.
        frames: held-out frames.
        n_action_steps: H, executed actions of a chunk.
        draws: K, chunks per frame and compute policy; with one, only errors and roughness are measured.

    Returns:
        The measures in the order of ``computes``, and the chunks of the first compute policy, float32 (N, K, L, D), normalised.
    """
    rows: list[list[dict[str, Tensor]]] = [[] for _ in computes]
    cost = np.zeros((len(computes), 2))
    first: list[Tensor] = []
    scale = Scale.of(policy, n_action_steps)
    with progress(len(frames.index_N), "Measuring samplers") as bar:
        for begin in range(0, len(frames.index_N), BATCH):
            index_B = frames.index_N[begin : begin + BATCH]
            later_B, has_later_B = _later(frames, index_B, n_action_steps)
            batch, later = frames.windows.batch(index_B), frames.windows.batch(later_B)
            target_BLD = policy.targets(batch).action_BLD.cpu()
            prefix = policy.embed(batch.observation)
            later_prefix = policy.embed(later.observation) if draws > 1 else None
            for number, compute in enumerate(computes):
                chunks, counts = _draws(policy, compute, prefix, frames.windows.rows[index_B], range(draws))
                after_BLD = None
                if later_prefix is not None:
                    again, _ = _draws(policy, compute, later_prefix, frames.windows.rows[later_B], range(draws, draws + 1))
                    after_BLD = again[:, 0]
                sampled = SampledChunks(chunks, after_BLD, target_BLD, batch.valid_BL, has_later_B)
                rows[number].append(scale.values(sampled))
                cost[number] += counts
                if not number:
                    first.append(chunks)
            bar.advance(len(index_B))
    found = [
        SamplerMeasures(
            {name: torch.cat([part[name] for part in parts]).double().numpy() for name in parts[0]},
            *(cost[number] / (len(frames.index_N) * draws)).tolist(),
        )
        for number, parts in enumerate(rows)
    ]
    return found, torch.cat(first).numpy()


def _later(frames: Sample, index_B: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The frames so many steps later, and whether they belong to the same episode (the frame itself where they do not)."""
    rows = frames.windows.rows
    later_B = np.minimum(index_B + steps, len(rows) - 1)
    same_B = rows[later_B] - rows[index_B] == steps
    episode = frames.windows.dataset.columns().episode
    same_B &= episode[rows[later_B]] == episode[rows[index_B]]
    return np.where(same_B, later_B, index_B), same_B


def _draws(
    policy: Policy, compute: ComputePolicy, prefix: Prefix, row_B: np.ndarray, draw_K: range
) -> tuple[Tensor, np.ndarray]:
    """Chunks (B, K, L, D) on the CPU, and their evaluations and layer passes in all."""
    found, counts = [], np.zeros(2)
    for draw in draw_K:
        generators = [Generator().manual_seed(int(row) * 64 + draw) for row in row_B]
        out = compute.decode(policy.model, prefix, generators, Stopwatch(policy.device))
        found.append(out.action_BLD.float().cpu())
        counts += (sum(out.nfe), sum(out.layer_passes))
    return torch.stack(found, 1), counts


def _mean(value_BKL: Tensor, known_BL: Tensor) -> Tensor:
    """Mean over known actions, (B, K); NaN where nothing is known."""
    known_B1L = known_BL[:, None]
    return torch.where(known_B1L, value_BKL, 0).sum(-1) / known_B1L.sum(-1)
