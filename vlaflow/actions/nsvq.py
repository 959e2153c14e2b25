"""A codebook that learns by noise substitution (NSVQ: Vali and Bäckström, IEEE Access 2022), replacing unused entries.

In training, a vector is not replaced by its nearest entry; instead, noise of the same length as the quantisation error is added
to it. So the decoder sees an error of that size, the encoder's gradient passes through the sum, and the entry gets a gradient
through the length of the noise, towards its vectors where a smaller error helps. This needs no commitment loss, no codebook
loss and no straight-through estimate.

An entry far from all vectors gets no gradient and would remain unused forever, so rarely used entries are regularly moved next
to frequently used ones. Uses are counted over all processes, and all draw the same numbers, so the codebook stays the same in
each.

Shape letters: B batch, K codes of a pair, V entries of the codebook, E dimension of an entry.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed
from torch import Generator, Tensor, nn

from vlaflow.errors import CapabilityError, ConfigError
from vlaflow.nn.drawn import drawn
from vlaflow.ranges import Positive


@dataclass(frozen=True)
class Replacement:
    """Rule for replacing unused codebook entries.

    Every ``every`` steps, during the first ``until`` of the run, entries with less than ``threshold`` times the fair share 1/V
    of the uses since the last check are replaced: each is moved to another entry, sampled in proportion to its uses, plus
    normal noise of ``noise`` times that entry's length.

    (NSVQ's own code replaces below a share of 0.01, whatever V is. LAPA's and iFlyBot's divide by the batch size instead of
    the number of steps, so their threshold means something else; they also count and draw separately in each process, so the
    codebooks diverge.)

    Args:
        every: number of steps between checks.
        until: share of the run with replacements, in [0, 1]; 0 for none.
        threshold: share of the fair share below which an entry is replaced, in [0, 1).
        noise: relative noise; positive, because otherwise the moved entry would equal its source.
    """

    every: int = 50
    until: float = 0.7
    threshold: float = 0.1
    noise: Positive = 0.02

    def __post_init__(self) -> None:
        if self.every < 1 or not 0 <= self.until <= 1 or not 0 <= self.threshold < 1 or self.noise <= 0:
            raise ConfigError(f"A replacement needs every ≥ 1, until in [0, 1], threshold in [0, 1) and noise > 0, got {self}.")

    def due(self, step: int, steps: int) -> bool:
        """Whether entries are replaced after step number ``step`` (0, 1, ...) of ``steps``."""
        return (step + 1) % self.every == 0 and step + 1 < self.until * steps


class Codebook(nn.Module):
    """V entries of dimension E.

    Attributes:
        entry_VE: the entries.
        used_V: int64, uses since the last replacement over all processes; part of a training state, not of a saved model.
    """

    used_V: Tensor

    def __init__(self, entries: int, dim: int) -> None:
        super().__init__()
        self.entry_VE = drawn(entries, dim, std=dim**-0.5)
        self.register_buffer("used_V", torch.zeros(entries, dtype=torch.long), persistent=False)
        # Not a buffer: processes that train together copy the first one's buffers before every forward pass.
        self._step_V: Tensor | None = None

    def nearest(self, x_BKE: Tensor) -> Tensor:
        """The nearest entry of each vector, int64 (B, K); the first one in a tie."""
        return torch.cdist(x_BKE.float(), self.entry_VE.float(), compute_mode="donot_use_mm_for_euclid_dist").argmin(-1)

    def forward(self, x_BKE: Tensor, noise_BKE: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Quantise vectors.

        Args:
            x_BKE: vectors.
            noise_BKE: standard normal, z; needed in training.

        Returns:
            In training v = x + (|x − c*| / |z|) z, so |v − x| = |x − c*|; otherwise c* itself; and the ids of c*, int64
            (B, K).
        """
        id_BK = self.nearest(x_BKE.detach())
        code_BKE = self.entry_VE[id_BK]
        if not self.training:
            return code_BKE, id_BK
        if noise_BKE is None:
            raise ConfigError("A codebook in training needs noise.")
        self._count(id_BK)
        noise_BKE = noise_BKE.to(x_BKE)
        unit_BKE = noise_BKE / torch.linalg.vector_norm(noise_BKE, dim=-1, keepdim=True)
        return x_BKE + torch.linalg.vector_norm(x_BKE - code_BKE, dim=-1, keepdim=True) * unit_BKE, id_BK

    def _count(self, id_BK: Tensor) -> None:
        count_V = _uses(id_BK, len(self.entry_VE))
        self._step_V = count_V if self._step_V is None else self._step_V + count_V

    @torch.no_grad()
    def replace_unused(self, rule: Replacement, step: int, steps: int, generator: Generator) -> int:
        """Count the uses of a training step and, when due by the rule, replace rarely used entries.

        Every training process must call it after every step.

        Args:
            rule: see ``Replacement``.
            step, steps: index of the step, from 0, and total number of steps.
            generator: a CPU generator in the same state in every process.

        Returns:
            The number of replaced entries.
        """
        if type(self.entry_VE) is not nn.Parameter or type(self.entry_VE.data) is not Tensor:
            raise CapabilityError("A codebook cannot be sharded; train latent actions with DDP, not with FSDP.")
        step_V = torch.zeros_like(self.used_V) if self._step_V is None else self._step_V
        self._step_V = None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(step_V)
        self.used_V += step_V
        if not rule.due(step, steps):
            return 0
        share_V = self.used_V.cpu().double() / max(int(self.used_V.sum()), 1)
        self.used_V.zero_()
        dead_N = (share_V < rule.threshold / len(share_V)).nonzero()[:, 0]
        if not len(dead_N) or not share_V.any():
            return 0
        share_V[dead_N] = 0
        parent_NE = self.entry_VE[torch.multinomial(share_V, len(dead_N), replacement=True, generator=generator)]
        noise_NE = torch.randn(parent_NE.shape, generator=generator).to(parent_NE) * parent_NE.shape[-1] ** -0.5
        length_N1 = torch.linalg.vector_norm(parent_NE, dim=-1, keepdim=True)
        self.entry_VE[dead_N] = parent_NE + rule.noise * length_N1 * noise_NE
        return len(dead_N)


def perplexity(id_BK: Tensor, entries: int) -> Tensor:
    """exp of the entropy of the entries' frequencies: V if all are used equally, 1 if only one is used."""
    share_V = _uses(id_BK, entries).float() / max(id_BK.numel(), 1)
    return torch.special.entr(share_V).sum().exp()


def _uses(id_BK: Tensor, entries: int) -> Tensor:
    """How often each id occurs, int64 (V,)."""
    id_N = id_BK.flatten()  # bincount would have the host wait for the largest id
    return torch.zeros(entries, dtype=torch.long, device=id_N.device).scatter_add_(0, id_N, torch.ones_like(id_N))
