"""Do the draws of a flow policy vary as much as their mean errs? On frames that training held out, executed actions.

    python -m benchmarks.draws runs/demo/policy --dataset runs/demo/dataset

Draws from the right distribution do: their mean squared error is then twice that of their mean. A sampler with less variance
leaves out what the policy is unsure of (docs/sampling.md). The second table is the network's velocity error by clock, and what
it means for the action, clock² times as much.

Shape letters: B batch, K draws, L chunk size, H executed actions, D action dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Generator, Tensor

from vlaflow.backbones.base import Prefix
from vlaflow.compute.base import ComputePolicy, Stopwatch
from vlaflow.compute.parse import parse_all
from vlaflow.data.lerobot import Dataset
from vlaflow.decoders.flow import FlowDecoder
from vlaflow.errors import CapabilityError
from vlaflow.evaluation.calibrate import BATCH, held_out, sample
from vlaflow.flows import gaussian
from vlaflow.policies.base import Policy

COMPUTES = ("dense:10", "dense:10@0.5", "dense:10@0", "dense:5", "dense:5,midpoint", "dense:2", "dense:2@0", "dense:1")
CLOCKS = (1.0, 0.9, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05)


@dataclass(frozen=True)
class Options:
    """What to measure.

    Args:
        checkpoint: folder of a policy with a flow decoder; its training state says which episodes were held out.
        dataset: LeRobot data set.
        computes: samplers.
        frames: number of frames.
        draws: chunks per frame.
    """

    checkpoint: tyro.conf.Positional[Path]
    dataset: Path
    computes: tuple[str, ...] = COMPUTES
    frames: int = 240
    draws: int = 16


@torch.no_grad()
def main(options: Options) -> None:
    """Print both tables."""
    policy, dataset = Policy.from_pretrained(options.checkpoint), Dataset.open(options.dataset)
    decoder = policy.model.decoder
    if not isinstance(decoder, FlowDecoder):
        raise CapabilityError(f"{options.checkpoint} has no flow decoder, so it has no velocities to measure.")
    frames = sample(policy, dataset, held_out(options.checkpoint, dataset), options.frames)
    computes, executed = parse_all(options.computes), policy.config.n_action_steps
    draws, velocities = np.zeros((len(computes), 4)), np.zeros((len(CLOCKS), 2))
    for begin in range(0, len(frames.index_N), BATCH):
        index_B = frames.index_N[begin : begin + BATCH]
        batch = frames.windows.batch(index_B)
        target_BLD, valid_BH = policy.targets(batch).action_BLD.float(), batch.valid_BL[:, :executed]
        prefix = policy.embed(batch.observation)
        for number, compute in enumerate(computes):
            chunk_BKLD = sampled(policy, compute, prefix, frames.windows.rows[index_B], options.draws)
            draws[number] += moments(chunk_BKLD[:, :, :executed], target_BLD[:, :executed], valid_BH)
        whole, generator = decoder.read(policy.model.backbone, prefix), Generator().manual_seed(begin)
        for number, clock in enumerate(CLOCKS):
            noise_BLD = torch.randn(target_BLD.shape, generator=generator)
            clock_BL = torch.full(target_BLD.shape[:2], clock)
            velocity_BLD = decoder.velocity(gaussian.interpolate(target_BLD, noise_BLD, clock_BL), clock_BL, whole).float()
            square_BLD = (velocity_BLD - gaussian.velocity_target(target_BLD, noise_BLD)).square()
            velocities[number] += ((square_BLD.mean(-1)[:, :executed] * valid_BH).sum(), valid_BH.sum())
    print("| compute policy | mean squared error of a draw | of the mean of draws | variance of the draws |\n|---|---|---|---|")
    for compute, (error, of_mean, variance, count) in zip(computes, draws, strict=True):
        print(f"| `{compute.name}` | {error / count:.3f} | {of_mean / count:.3f} | {variance / count:.3f} |")
    print("\n| clock | velocity error | error of the action |\n|---|---|---|")
    for clock, (error, count) in zip(CLOCKS, velocities, strict=True):
        print(f"| {clock:g} | {error / count:.3f} | {clock**2 * error / count:.4f} |")


def sampled(policy: Policy, compute: ComputePolicy, prefix: Prefix, row_B: np.ndarray, draws: int) -> Tensor:
    """Chunks (B, K, L, D), normalised."""
    found = []
    for draw in range(draws):
        generators = [Generator().manual_seed(int(row) * 64 + draw) for row in row_B]
        found.append(compute.decode(policy.model, prefix, generators, Stopwatch(policy.device)).action_BLD.float())
    return torch.stack(found, 1)


def moments(chunk_BKHD: Tensor, target_BHD: Tensor, valid_BH: Tensor) -> np.ndarray:
    """Sums over valid actions: squared error of a draw, that of the mean of infinitely many, variance, and their number."""
    draws, mean_BHD = chunk_BKHD.shape[1], chunk_BKHD.mean(1)
    error_BH = (chunk_BKHD - target_BHD[:, None]).square().mean((1, 3))
    variance_BH = chunk_BKHD.var(1).mean(-1)
    of_mean_BH = (mean_BHD - target_BHD).square().mean(-1) - variance_BH / draws
    return np.array(
        [float((part * valid_BH).sum()) for part in (error_BH, of_mean_BH, variance_BH, torch.ones(valid_BH.shape))]
    )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
