"""Networks as AOTInductor multiplies few tokens fastest: matrices stored by inputs in float32, or products in bfloat16, and
blocks that attend by two products (``Block.joined``). OpenVINO has an order and kernels of its own.

Shape letters: I inputs, O outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlaflow.nn.block import Block

Net = TypeVar("Net", bound=nn.Module)


class TransposedLinear(nn.Module):
    """A linear layer whose matrix is stored (I, O) and whose bias is an operation of its own.

    With few tokens, the BLAS reads the matrix once, and in this order it need not reorder it first: 16 tokens through
    512 → 128 take 15 µs against 42 (one Sapphire Rapids core, MKL). A compiler merges the bias with whatever reads the sum.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter(linear.weight.detach().mT.contiguous(), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """(…, I) → (…, O)."""
        product = (x.reshape(-1, self.in_features) @ self.weight).view(*x.shape[:-1], self.out_features)
        return product if self.bias is None else product + self.bias


class Bfloat16Linear(nn.Module):
    """A linear layer whose product is bfloat16; the bias is added in float32."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter(linear.weight.detach().to(torch.bfloat16), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """(…, I) float32 → (…, O) float32."""
        product = functional.linear(x.to(torch.bfloat16), self.weight).float()
        return product if self.bias is None else product + self.bias


def transposed(network: Net) -> Net:
    """A copy whose linear layers are ``TransposedLinear`` and whose blocks attend by two products."""
    return _replaced(network, TransposedLinear)


def in_bfloat16(network: Net) -> Net:
    """A copy whose linear layers multiply in bfloat16; sums, norms, attention (by two products) and what is handed on stay in
    float32.
    """
    return _replaced(network, Bfloat16Linear)


def _replaced(network: Net, kind: Callable[[nn.Linear], nn.Module]) -> Net:
    copied = copy.deepcopy(network)
    for parent in list(copied.modules()):
        if isinstance(parent, Block):
            parent.joined = True
        if isinstance(parent, nn.TransformerEncoderLayer):  # which reads the matrices itself
            continue
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, kind(child))
    return copied.requires_grad_(False)
