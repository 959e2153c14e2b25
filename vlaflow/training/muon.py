"""Muon: the matrices of the layers take orthogonal steps, all other parameters those of AdamW.

The momentum of a matrix is replaced by the nearest matrix whose singular values are all alike, so a step goes as far in
directions of small gradients as in those of large ones (Jordan et al., "Muon: An optimizer for hidden layers in neural
networks", 2024). Steps are scaled by 0.2·√max(rows, columns), which gives them the root mean square of AdamW's, so both share
one learning rate (Liu et al., "Muon is scalable for LLM training", 2025).

``torch.optim.Muon`` takes the same steps, but always computes them in bfloat16. A processor without instructions for it then
takes twenty times as long as in float32, which is longer than the rest of a small network's step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlaflow.policies.recipe import OptimConfig
from vlaflow.training.sharding import own_rows, whole

MOMENTUM = 0.95
ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b, c of X ← aX + b(XXᵀ)X + c(XXᵀ)²X, chosen by Jordan to lift small singular values fast, not to end at exactly 1."""


def orthogonal(matrix_RC: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """UVᵀ of the singular value decomposition USVᵀ, approximately: five Newton-Schulz iterations.

    Args:
        matrix_RC: any matrix.
        dtype: of the computation.

    Returns:
        A matrix with the same singular vectors, in ``dtype``; zeros for zeros.
    """
    a, b, c = COEFFICIENTS
    upright = matrix_RC.shape[0] > matrix_RC.shape[1]
    x_SC = (matrix_RC.mT if upright else matrix_RC).to(dtype)
    x_SC = x_SC / x_SC.norm().clamp(min=1e-7)  # no singular value is above 1
    for _ in range(ITERATIONS):
        gram_SS = x_SC @ x_SC.mT
        x_SC = torch.addmm(x_SC, torch.addmm(gram_SS, gram_SS, gram_SS, beta=b, alpha=c), x_SC, beta=a)
    return x_SC.mT if upright else x_SC


class Muon(torch.optim.Optimizer):
    """See the module text.

    Args:
        groups: parameter groups, each with "params", "lr", "weight_decay" and "turned", whether its parameters are matrices
            that take orthogonal steps; these first.
        config: of AdamW.
        dtype: in which directions are computed.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], config: OptimConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(groups, {})
        self._dtype, self._turned = dtype, sum(group["turned"] for group in groups)
        self._adamw: torch.optim.Optimizer | None = None
        if others := self.param_groups[self._turned :]:
            self._adamw = torch.optim.AdamW(others, betas=config.betas, eps=config.eps, fused=True)
            self._share()

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle holds."""
        own = {"_dtype": self._dtype, "_turned": self._turned, "_adamw": self._adamw}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What ``load_state_dict``, a copy and a pickle end with."""
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        """One memory and one set of groups, whichever of the two optimisers a reader asks."""
        if self._adamw is not None:
            self._adamw.state, self._adamw.param_groups = self.state, self.param_groups[self._turned :]

    def init_state(self, group: dict[str, Any], parameter: Tensor, *_: int) -> None:
        """Remember of a parameter what there is before its first step."""
        names = ("exp_avg",) if group["turned"] else ("exp_avg", "exp_avg_sq")
        self.state[parameter]["step"] = torch.zeros((), device=parameter.device)
        self.state[parameter].update({name: torch.zeros_like(parameter) for name in names})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # nothing here evaluates a loss again
        """Take a step; parameters without a gradient stay."""
        for group in self.param_groups[: self._turned]:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._turn(group, parameter, parameter.grad)
        if self._adamw is not None:
            self._adamw.step()

    def _turn(self, group: dict[str, Any], parameter: Tensor, gradient_RC: Tensor) -> None:
        """Step a matrix; where processes share it by rows, each of them makes the direction of the whole and steps its rows."""
        if parameter not in self.state:
            self.init_state(group, parameter)
        state = self.state[parameter]
        state["step"] += 1
        state["exp_avg"].lerp_(gradient_RC, 1 - MOMENTUM)
        direction_RC = orthogonal(whole(gradient_RC.lerp(state["exp_avg"], MOMENTUM)), self._dtype)
        rows_RC, first = own_rows(parameter)
        rows_RC.mul_(1 - group["lr"] * group["weight_decay"])
        scale = 0.2 * math.sqrt(max(parameter.shape))
        rows_RC.add_(direction_RC[first : first + len(rows_RC)].to(rows_RC.dtype), alpha=-group["lr"] * scale)
