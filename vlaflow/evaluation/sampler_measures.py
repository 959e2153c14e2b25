"""Measures of a sampler on held-out frames: possible predictors of its success that need no simulator.

Every compute policy samples several chunks for the same frames and from the same noise. docs/sampling.md compares the measures
with success rates. The error alone favours means of many draws, which resemble no demonstration and fail more often; so the
distance to the nearest actions of any demonstration is measured as well (the two sides of Blau and Michaeli's
perception-distortion trade-off, 2018). Smaller is better for all measures but roughness.

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
from vlaflow.compute.multimodality import multimodality
from vlaflow.data.lerobot import Dataset
from vlaflow.data.windows import action_chunks
from vlaflow.evaluation.calibrate import BATCH, Sample
from vlaflow.policies.base import Policy
from vlaflow.progress import progress

REFERENCES = 8192
"""Demonstrated chunks to compare with."""
MEASURES: Mapping[str, str] = {
    "executed_error": "mean squared distance of the executed actions to the demonstration",
    "implausibility": "mean squared distance of the executed actions to the nearest ones demonstrated in any other episode",
    "chunk_error": "mean squared distance of the whole chunk to the demonstration",
    "first_error": "the same of its first two actions",
    "shape_error": "the same of the executed actions, without the mean difference of each dimension over them",
    "nearest_error": "the same of the executed actions, of the nearest of several draws",
    "gripper_error": "share of the executed actions on the other side of the gripper's range than the demonstration",
    "inconsistency": "mean squared difference between the rest of a chunk and the chunk made after executing its beginning, "
    "from the demonstration's own state",
    "spread": "root mean square distance of several draws to their mean, executed actions",
    "roughness": "mean squared second difference of the executed actions",
}
"""Names and meanings; all in normalised units, on valid actions."""
CRITERION = "plausible_error"
"""Geometric mean of ``executed_error`` and ``implausibility``: small only for chunks that are close both to their own
demonstration and to some other one. Of these measures, its ranking of samplers agrees best with their success rates
(docs/sampling.md)."""
GROUPS_FROM, APART = 0.5, 0.2
"""Multimodality and mean spread above which the draws for a frame count as two groups."""


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

    def means(self) -> dict[str, float]:
        """Means over the frames on which a measure is defined; a measure that is defined on none is left out."""
        known = {name: value_N[np.isfinite(value_N)] for name, value_N in self.values.items()}
        return {name: float(value.mean()) for name, value in known.items() if len(value)}

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
        episode_B: int64, the frames' episodes.
    """

    chunk_BKLD: Tensor
    after_BLD: Tensor | None
    target_BLD: Tensor
    valid_BL: Tensor
    has_later_B: np.ndarray
    episode_B: Tensor


@dataclass(frozen=True)
class Demonstrated:
    """Beginnings of demonstrated chunks, to which sampled ones are compared.

    Args:
        action_RX: M of them, H actions of D dimensions each, normalised and flattened.
        episode_R: int64, their episodes.
    """

    action_RX: Tensor
    episode_R: Tensor

    @staticmethod
    def of(policy: Policy, dataset: Dataset, executed: int) -> Demonstrated:
        """A random sample of all chunks of a data set, at most ``REFERENCES``, always the same."""
        episodes = dataset.numbers
        chunk_MLD = action_chunks(dataset, executed, episodes)
        length_E = [dataset.episode_slice(e).stop - dataset.episode_slice(e).start for e in episodes]
        chosen = np.sort(np.random.default_rng(0).permutation(len(chunk_MLD))[:REFERENCES])
        episode_M = np.repeat(np.array(episodes), length_E)
        action_RLD = policy.action_normalizer.forward(torch.from_numpy(chunk_MLD[chosen]))
        return Demonstrated(action_RLD.flatten(1), torch.from_numpy(episode_M[chosen]))

    def distance(self, chunk_BKHD: Tensor, episode_B: Tensor) -> Tensor:
        """Mean squared distance to the nearest beginning of another episode, (B, K); NaN if there is no other episode."""
        flat_BKX = chunk_BKHD.flatten(2).to(self.action_RX.dtype)
        square_BKR = torch.cdist(flat_BKX, self.action_RX.expand(len(flat_BKX), -1, -1)).square() / flat_BKX.shape[2]
        own_B1R = (self.episode_R == episode_B[:, None])[:, None]
        nearest_BK = square_BKR.masked_fill(own_B1R, torch.inf).amin(2)
        return nearest_BK.masked_fill(nearest_BK.isinf(), torch.nan)


@dataclass(frozen=True)
class Scale:
    """What the measures need to know about a policy's actions.

    Args:
        executed: H, actions of a chunk that are executed.
        gripper_D: bool, dimensions of grippers.
        middle_D: middle of each dimension's range in the training data, normalised.
        demonstrated: what was demonstrated.
    """

    executed: int
    gripper_D: Tensor
    middle_D: Tensor
    demonstrated: Demonstrated

    @staticmethod
    def of(policy: Policy, executed: int, demonstrated: Demonstrated) -> Scale:
        """Those of a policy; dimensions whose name contains "gripper" are grippers."""
        stats = policy.stats["action"]
        gripper_D = torch.tensor(["gripper" in dimension.name for dimension in policy.action_spec.dimensions])
        middle_D = policy.action_normalizer.forward((torch.tensor(stats.min) + torch.tensor(stats.max)) / 2)
        return Scale(executed, gripper_D, middle_D, demonstrated)

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
            "implausibility": self.demonstrated.distance(chunk_BKLD[:, :, : self.executed], found.episode_B).mean(1),
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


def plausible_error(found: SamplerMeasures, episode_N: np.ndarray) -> np.ndarray:
    """Logarithm of ``CRITERION`` by episode, (E,); of the error alone where nothing else was demonstrated."""
    tiny = np.finfo(np.float32).tiny
    error_E, far_E = (
        np.log(np.maximum(found.by_episode(name, episode_N), tiny)) for name in ("executed_error", "implausibility")
    )
    return np.where(np.isfinite(far_E), (error_E + far_E) / 2, error_E)


@torch.no_grad()
def two_group_share(policy: Policy, compute: ComputePolicy, frames: Sample, *, most: int = 64, draws: int = 8) -> float:
    """Share of the frames whose draws fall into two groups that are far apart, as left and right of an obstacle.

    Draws differ in two ways on many frames of any policy (an action now or one step later); only groups that are also far apart
    make their mean an action of neither.

    Args:
        policy: in evaluation mode.
        compute: makes the draws.
        frames: held-out frames.
        most: frames to look at, spread evenly.
        draws: chunks per frame.
    """
    index_N = frames.index_N[np.linspace(0, len(frames.index_N) - 1, min(most, len(frames.index_N))).astype(int)]
    found = 0
    for begin in range(0, len(index_N), BATCH):
        index_B = index_N[begin : begin + BATCH]
        prefix = policy.embed(policy.own(frames.windows.batch(index_B).observation))
        chunk_BKLD, _ = draw_chunks(policy, compute, prefix, frames.windows.rows[index_B], range(draws))
        spread_B = mean_and_spread(chunk_BKLD)[1].mean(1)
        found += int(((multimodality(chunk_BKLD) > GROUPS_FROM) & (spread_B > APART)).sum())
    return found / len(index_N)


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
    dataset = frames.windows.dataset
    scale = Scale.of(policy, n_action_steps, Demonstrated.of(policy, dataset, n_action_steps))
    with progress(len(frames.index_N), "Measuring samplers") as bar:
        for begin in range(0, len(frames.index_N), BATCH):
            index_B = frames.index_N[begin : begin + BATCH]
            later_B, has_later_B = _later(frames, index_B, n_action_steps)
            batch, later = frames.windows.batch(index_B), frames.windows.batch(later_B)
            target_BLD = policy.cut(policy.targets(policy.own_batch(batch)).action_BLD).cpu()
            prefix = policy.embed(policy.own(batch.observation))
            later_prefix = policy.embed(policy.own(later.observation)) if draws > 1 else None
            for number, compute in enumerate(computes):
                chunks, counts = draw_chunks(policy, compute, prefix, frames.windows.rows[index_B], range(draws))
                after_BLD = None
                if later_prefix is not None:
                    again, _ = draw_chunks(policy, compute, later_prefix, frames.windows.rows[later_B], range(draws, draws + 1))
                    after_BLD = again[:, 0]
                sampled = SampledChunks(chunks, after_BLD, target_BLD, batch.valid_BL, has_later_B, batch.episode_B)
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


def draw_chunks(
    policy: Policy, compute: ComputePolicy, prefix: Prefix, row_B: np.ndarray, draw_K: range
) -> tuple[Tensor, np.ndarray]:
    """Chunks (B, K, L, D) on the CPU, and their evaluations and layer passes in all; noise depends on row and draw alone."""
    found, counts = [], np.zeros(2)
    for draw in draw_K:
        generators = [Generator().manual_seed(int(row) * 64 + draw) for row in row_B]
        with policy.precision():
            out = compute.decode(policy.model, prefix, generators, Stopwatch(policy.device))
        found.append(policy.cut(out.action_BLD).float().cpu())
        counts += (sum(out.nfe), sum(out.layer_passes))
    return torch.stack(found, 1), counts


def _mean(value_BKL: Tensor, known_BL: Tensor) -> Tensor:
    """Mean over known actions, (B, K); NaN where nothing is known."""
    known_B1L = known_BL[:, None]
    return torch.where(known_B1L, value_BKL, 0).sum(-1) / known_B1L.sum(-1)
