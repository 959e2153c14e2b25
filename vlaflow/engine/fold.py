"""Algebra done once instead of at every pass: norms' weights and linear layers after linear ones merged, clocks tabulated.

``folded`` copies a network whose output differs by rounding alone. Keys and values stay what they were, so a folded network and
the original can continue each other's prefixes. A rule is a function registered for a class of module; what has none is copied,
and its parts are folded.

Shape letters: B batch, L chunk size, X padded action dimension, W width, T time tokens (L, or one).
"""

from __future__ import annotations

import copy
from functools import singledispatch
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlaflow.decoders.flow import ActionCodec
from vlaflow.nn.block import Block
from vlaflow.nn.resnet import ResidualLayer
from vlaflow.nn.time import clock_embedding

Net = TypeVar("Net", bound=nn.Module)


def folded(network: Net) -> Net:
    """A folded copy; the network itself is left as it is."""
    with torch.no_grad():
        copied = _fold(copy.deepcopy(network))
    return cast(Net, copied.requires_grad_(False))


class TabulatedCodec(nn.Module):
    """An ``ActionCodec`` whose projection is part of the layer that mixes in the clock; what a clock adds there is a table.

    mix₀[P·x + p ; S(t)] = (M_x P)·x + (M_x p + M_t S(t) + m), so ``times`` gives the second term. With a time token ``times``
    gives that token. A head of two linear layers is one.
    """

    def __init__(self, codec: ActionCodec) -> None:
        super().__init__()
        self.width, self.time_token, self.head = codec.width, codec.time_token, _fold(codec.head)
        if self.time_token:
            self.project, self.leave = codec.project, nn.Sequential(*codec.mix)
            return
        first, w = codec.mix[0], codec.width
        assert isinstance(first, nn.Linear)
        self.project = nn.Linear(codec.project.in_features, first.out_features, bias=False)
        self.project.weight.copy_(first.weight[:, :w] @ codec.project.weight)
        self.clock_WW = nn.Parameter(first.weight[:, w:].clone())
        self.clock_W = nn.Parameter(functional.linear(codec.project.bias, first.weight[:, :w], first.bias))
        self.leave = nn.Sequential(*list(codec.mix)[1:])

    def times(self, clock_BL: Tensor) -> Tensor:
        """What ``enter`` takes of the clocks: (B, L, W), or (B, 1, W) with a time token."""
        if self.time_token:
            token_B1W: Tensor = self.leave(clock_embedding(clock_BL.amax(1, keepdim=True), self.width))
            return token_B1W
        return functional.linear(clock_embedding(clock_BL, self.width), self.clock_WW, self.clock_W)

    def enter(self, x_BLX: Tensor, time_BTW: Tensor) -> Tensor:
        """See ``ActionCodec``."""
        if self.time_token:
            return torch.cat((time_BTW, self.project(x_BLX)), 1)
        token_BLW: Tensor = self.leave(self.project(x_BLX) + time_BTW)
        return token_BLW

    def encode(self, x_BLX: Tensor, clock_BL: Tensor) -> Tensor:
        """See ``ActionCodec``."""
        return self.enter(x_BLX, self.times(clock_BL))

    def decode(self, hidden_BTW: Tensor) -> Tensor:
        """See ``ActionCodec``."""
        velocity_BLX: Tensor = self.head(hidden_BTW[:, int(self.time_token) :])
        return velocity_BLX


@singledispatch
def _fold(module: nn.Module) -> nn.Module:
    for name, child in list(module.named_children()):
        setattr(module, name, _fold(child))
    return module


@_fold.register
def _(block: Block) -> nn.Module:
    block.norm_attention = _into(block.norm_attention, block.qkv)
    ffn = block.ffn
    block.norm_ffn = _into(block.norm_ffn, ffn.up, *([] if ffn.gate is None else [ffn.gate]))
    return block


@_fold.register
def _(layer: ResidualLayer) -> nn.Module:
    layer.norm = _into(layer.norm, layer.linear)  # type: ignore[assignment]
    return layer


@_fold.register
def _(codec: ActionCodec) -> nn.Module:
    return TabulatedCodec(codec)


@_fold.register
def _(row: nn.Sequential) -> nn.Module:
    """Neighbours that are linear in each other become one; what derives from a row or a linear layer may compute otherwise."""
    if type(row) is not nn.Sequential:
        return _fold.dispatch(nn.Module)(row)
    made: list[nn.Module] = []
    for module in map(_fold, row):
        before = made[-1] if made else None
        if type(module) is nn.Linear and type(before) is nn.Linear:
            made[-1] = _merged(before, module)
            continue
        if type(module) is nn.Linear and isinstance(before, nn.LayerNorm | nn.RMSNorm):
            made[-1] = _into(before, module)
        made.append(module)
    return nn.Sequential(*made)


def _merged(first: nn.Linear, second: nn.Linear) -> nn.Linear:
    """second(first(x)) as one layer."""
    merged = nn.Linear(first.in_features, second.out_features)
    merged.weight.copy_(second.weight @ first.weight)
    merged.bias.zero_() if first.bias is None else merged.bias.copy_(second.weight @ first.bias)
    if second.bias is not None:
        merged.bias.add_(second.bias)
    return merged


def _into(norm: nn.Module, *linears: nn.Linear) -> nn.Module:
    """Move a norm's weight and bias into the linear layers that read it; returns what is left of it."""
    assert isinstance(norm, nn.LayerNorm | nn.RMSNorm)
    bias_W = getattr(norm, "bias", None)
    for linear in linears:
        if bias_W is not None:
            own = torch.zeros(linear.out_features) if linear.bias is None else linear.bias
            linear.bias = nn.Parameter(own + linear.weight @ bias_W)
        if norm.weight is not None:
            linear.weight.mul_(norm.weight)
    shape = tuple(norm.normalized_shape)
    if isinstance(norm, nn.LayerNorm):
        return nn.LayerNorm(shape, norm.eps, elementwise_affine=False)
    return nn.RMSNorm(shape, norm.eps, elementwise_affine=False)
