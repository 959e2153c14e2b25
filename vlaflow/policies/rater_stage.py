"""The stage that trains a confidence rater on a frozen policy, and the errors of the policy's chunks that it learns from.

Shape letters: B batch, K draws, N chunks of a batch (B·K), L chunk size, D action dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from vlaflow.backbones.base import Prefix
from vlaflow.data.batch import Batch
from vlaflow.data.source import Source
from vlaflow.decoders.losses import LossTerms
from vlaflow.errors import CapabilityError
from vlaflow.flows.sampling import Sampling
from vlaflow.policies.base import Policy
from vlaflow.policies.processor import Drawn, Prepared

TEN_STEPS = Sampling()
FRAMES, BATCH = 256, 32
"""Observations that the scale of absolute labels is measured on, and how many at a time."""


class RaterStage:
    """The rater learns which actions of the frozen policy's own chunks are the worse ones (AsyncVLA §3.3).

    Args:
        policy: with the rater.
        sampling: of the chunks.
        draws: chunks per observation, K; they share its prefix.
        expected: label each action by the mean error over the draws, not by that of its own chunk.

    Raises:
        CapabilityError: the policy has no rater.
    """

    def __init__(self, policy: Policy, sampling: Sampling = TEN_STEPS, draws: int = 1, *, expected: bool = False) -> None:
        if policy.model.rater is None:
            raise CapabilityError("The rater stage needs a policy with a rater; use policy.with_rater(config, seed).")
        self.policy, self.sampling, self.rater = policy, sampling, policy.model.rater
        self.draws, self.expected = draws, expected
        policy.model.backbone.requires_grad_(False)
        policy.model.decoder.requires_grad_(False)

    @property
    def module(self) -> nn.Module:
        """The rater alone."""
        return self.rater

    @property
    def uneven(self) -> bool:
        """Never."""
        return False

    def prepare(self, batch: Batch) -> Prepared:
        """See ``Policy.prepare``."""
        return self.policy.prepare(batch)

    def draw(self, batch: Prepared, generator: Generator, shared: Generator) -> Drawn:
        """Seeds of the policy's chunks, K for every sample."""
        seeds = torch.randint(2**62, (len(batch.inputs) * self.draws,), generator=generator).tolist()
        return Drawn(integers=tuple(seeds))

    def loss(self, batch: Prepared, drawn: Drawn) -> LossTerms:
        """Squared error between rating and label, on chunks the policy makes for the batch, over valid actions."""
        with torch.no_grad():
            prefix, made_NLD, error_NL = rated_chunks(self.policy, batch, drawn.integers, self.sampling)
            if self.expected:
                error_NL = error_NL.unflatten(0, (-1, self.draws)).mean(1).repeat_interleave(self.draws, 0)
            valid_NL = batch.targets.valid_BL.repeat_interleave(self.draws, 0)
            label_NL = self.rater.config.labels(error_NL, valid_NL)
        rating_NL = self.rater(prefix, made_NLD)
        weight_NL = valid_NL.float()
        total = (functional.mse_loss(rating_NL, label_NL, reduction="none") * weight_NL).sum() / weight_NL.sum().clamp(min=1)
        return LossTerms(total, {"rating": total.detach(), "error": error_NL[valid_NL].mean()})

    def after_step(self, step: int, shared: Generator) -> None:
        """Nothing."""

    def to(self, device: torch.device) -> None:
        """See ``Stage``."""
        self.policy.model.to(device)

    def save(self, folder: Path, weights: Mapping[str, Tensor] | None = None, card: str = "") -> None:
        """The whole policy, with the rater."""
        whole = None if weights is None else {f"rater.{name}": tensor for name, tensor in weights.items()}
        replace(self.policy, card=card or self.policy.card).save_pretrained(folder, whole)


@torch.no_grad()
def rated_chunks(policy: Policy, batch: Prepared, seeds: Sequence[int], sampling: Sampling) -> tuple[Prefix, Tensor, Tensor]:
    """Chunks of a policy for a batch, K = len(seeds) / B of each observation next to each other, and their errors.

    Args:
        policy: makes the chunks.
        batch: B observations and what was demonstrated.
        seeds: one per chunk.
        sampling: of the chunks.

    Returns:
        The prefix (N rows), the chunks (N, L, D), and the squared error of each action (N, L).
    """
    model, targets = policy.model, batch.targets
    prefix = model.read(policy.begin(batch))
    row_N = torch.arange(prefix.batch).repeat_interleave(len(seeds) // prefix.batch)
    if len(row_N) > prefix.batch:
        prefix = prefix.select(row_N.to(prefix.hidden_BPW.device))
    made_NLD = model.decoder.sample(prefix, [Generator().manual_seed(seed) for seed in seeds], sampling)
    error_BKLD = (made_NLD.unflatten(0, (len(batch.inputs), -1)) - targets.action_BLD[:, None]).square()
    error_BKL = torch.stack([targets.mean_over_dimensions(error_BLD) for error_BLD in error_BKLD.unbind(1)], 1)
    return prefix, made_NLD, error_BKL.flatten(0, 1)


def median_error(policy: Policy, source: Source, sampling: Sampling, seed: int) -> float:
    """Median squared error of the policy's actions on some samples, spread evenly, to three significant digits.

    So few digits, that a run can continue on a processor that rounds differently.

    Args:
        policy: in evaluation mode.
        source: training samples.
        sampling: of its chunks.
        seed: of the noise.
    """
    index_M = np.unique(np.linspace(0, len(source) - 1, FRAMES).round().astype(np.int64))
    found = []
    for begin in range(0, len(index_M), BATCH):
        batch = policy.prepare(cast(Batch, source.batch(index_M[begin : begin + BATCH]))).to(policy.device)
        seeds = np.random.default_rng([seed, begin]).integers(2**62, size=len(batch.inputs)).tolist()
        _, _, error_BL = rated_chunks(policy, batch, seeds, sampling)
        found.append(error_BL[batch.targets.valid_BL])
    return float(f"{float(torch.cat(found).median()):.3g}")
