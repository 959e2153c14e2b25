"""Attention over two groups of tokens: the sequence's own, and a cache of keys and values computed before.

The cache (of a prefix) is used in place: scores over cached and own tokens are computed separately and share one softmax, so
the prefix's keys and values are never copied or extended, neither at a solver step nor for several noise samples.

In bfloat16 and float16, products accumulate in float32 and scores enter the softmax unrounded, as in fused kernels; rounded
scores would multiply the error (tests/nn/test_attention.py). CPUs have no such product; there a float32 copy exists during it.

Shape letters: B batch of queries, C batch of the cache (B = C · noise samples), T queries, S own keys, P cached keys,
H heads, G key/value heads, E head dimension, W width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class KeyValues:
    """Keys and values of one layer, with a mask of the tokens that may be attended to.

    Args:
        key_CGPE: keys after rotation, (C, G, P, E).
        value_CGPE: values, same shape.
        mask_CP: bool, True where a token may be attended to; None for all.
    """

    key_CGPE: Tensor
    value_CGPE: Tensor
    mask_CP: Tensor | None = None

    def detach(self) -> KeyValues:
        """The same values, detached from the graph that computed them."""
        return KeyValues(self.key_CGPE.detach(), self.value_CGPE.detach(), self.mask_CP)

    def cat(self, other: KeyValues) -> KeyValues:
        """Concatenate the tokens of ``other`` after these."""
        mask_CP = None
        if self.mask_CP is not None or other.mask_CP is not None:
            mask_CP = torch.cat((self._mask(), other._mask()), 1)
        key_CGPE = torch.cat((self.key_CGPE, other.key_CGPE), 2)
        return KeyValues(key_CGPE, torch.cat((self.value_CGPE, other.value_CGPE), 2), mask_CP)

    def _mask(self) -> Tensor:
        c, _, p, _ = self.key_CGPE.shape
        return self.mask_CP if self.mask_CP is not None else self.key_CGPE.new_ones(c, p, dtype=torch.bool)

    def with_rows(self, row_R: Tensor, new: KeyValues) -> KeyValues:
        """Replace rows of the batch; masks are kept."""
        key_CGPE = self.key_CGPE.index_copy(0, row_R, new.key_CGPE)
        return KeyValues(key_CGPE, self.value_CGPE.index_copy(0, row_R, new.value_CGPE), self.mask_CP)

    def select(self, row_R: Tensor) -> KeyValues:
        """Select rows of the batch, in the order of the int64 indices."""
        mask_CP = None if self.mask_CP is None else self.mask_CP[row_R]
        return KeyValues(self.key_CGPE[row_R], self.value_CGPE[row_R], mask_CP)


_plain_on_cpu = ContextVar("plain_on_cpu", default=True)


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """A context in which attention on a CPU computes as on a GPU, for measuring what that would need."""
    before = _plain_on_cpu.set(False)
    try:
        yield
    finally:
        _plain_on_cpu.reset(before)


def attend(
    query_BHTE: Tensor,
    own: KeyValues,
    kv_cache: KeyValues | None = None,
    mask_TS: Tensor | None = None,
    *,
    joined: bool = False,
) -> Tensor:
    """softmax(q·[k_cache, k_own]ᵀ/√E) [v_cache, v_own], for grouped-query heads and shared caches.

    Args:
        query_BHTE: (B, H, T, E); H is a multiple of the G key/value heads.
        own: keys and values of the queries' own sequence, batch B; its mask hides padding.
        kv_cache: keys and values of batch C, where B is a multiple of C: with n = B / C, queries b·n … (b+1)·n − 1 use cache b.
        mask_TS: bool (T, S), True where query t may attend to own token s (causal masks); None for full attention.
        joined: copy a cache that belongs to one sequence each and the own keys together, and multiply plainly: two products,
            where starting four, or a fused kernel, would take longer than multiplying so few tokens.

    Returns:
        (B, H, T, E).
    """
    # When training on a CPU in bf16, the backward pass of the fused kernel takes five times as long as plain products; in
    # float32 the fused kernel is a fifth faster (AVX2) or equal (AVX512).
    on_cpu = query_BHTE.device.type == "cpu" and query_BHTE.dtype != torch.float32
    plain = joined or (on_cpu and torch.is_grad_enabled() and (torch.compiler.is_compiling() or _plain_on_cpu.get()))
    if joined and kv_cache is not None and len(kv_cache.key_CGPE) == len(query_BHTE):
        cached = kv_cache.key_CGPE.shape[2]
        mask_TS = None if mask_TS is None else functional.pad(mask_TS, (cached, 0), value=True)
        own, kv_cache = kv_cache.cat(own), None
    if kv_cache is None and not plain:
        return _fused(query_BHTE, own, mask_TS)
    b, h, t, e = query_BHTE.shape
    g = own.key_CGPE.shape[1]
    half = query_BHTE.dtype in _HALF  # scaling a half-precision query would round it; its scores are scaled instead
    query_BGRE = (query_BHTE if half else query_BHTE * e**-0.5).reshape(b, g, (h // g) * t, e)
    scores_BGRS = _hide(_product(query_BGRE, own.key_CGPE.mT), own.mask_CP, mask_TS)
    if kv_cache is None:
        weights_BGRS = _softmax(scores_BGRS, query_BHTE)
        return _product(weights_BGRS, own.value_CGPE).to(query_BHTE.dtype).reshape(b, h, t, e)
    c, p = kv_cache.key_CGPE.shape[0], kv_cache.key_CGPE.shape[2]
    scores_CGQP = _hide(_product(_merge_samples(query_BGRE, c), kv_cache.key_CGPE.mT), kv_cache.mask_CP, None)
    weights = _softmax(torch.cat((_split_samples(scores_CGQP, b), scores_BGRS), -1), query_BHTE)
    weights_BGRP, weights_BGRS = weights.split((p, scores_BGRS.shape[-1]), -1)
    read_BGRE = _split_samples(_product(_merge_samples(weights_BGRP, c), kv_cache.value_CGPE), b)
    out_BGRE = read_BGRE + _product(weights_BGRS, own.value_CGPE)
    return out_BGRE.to(query_BHTE.dtype).reshape(b, h, t, e)


def causal_mask(tokens: int, device: torch.device | None = None) -> Tensor:
    """bool (T, T), True where query t may attend to own token s ≤ t: the ``mask_TS`` of ``attend``."""
    return torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()


def _fused(query_BHTE: Tensor, own: KeyValues, mask_TS: Tensor | None) -> Tensor:
    mask = mask_TS
    if own.mask_CP is not None:
        mask = own.mask_CP[:, None, None, :] if mask is None else mask & own.mask_CP[:, None, None, :]
    grouped = own.key_CGPE.shape[1] != query_BHTE.shape[1]
    return functional.scaled_dot_product_attention(query_BHTE, own.key_CGPE, own.value_CGPE, attn_mask=mask, enable_gqa=grouped)


def _softmax(scores_BGRS: Tensor, query_BHTE: Tensor) -> Tensor:
    """Attention weights in the dtype of the queries."""
    if query_BHTE.dtype in _HALF:
        scores_BGRS = scores_BGRS * query_BHTE.shape[-1] ** -0.5
    return scores_BGRS.softmax(-1).to(query_BHTE.dtype)


def _product(one_BGMK: Tensor, other_BGKN: Tensor) -> Tensor:
    """The matrix product, at least in float32."""
    if one_BGMK.dtype in _HALF:
        return _Float32Product.apply(one_BGMK, other_BGKN)
    return one_BGMK @ other_BGKN


_HALF = (torch.bfloat16, torch.float16)


class _Float32Product(torch.autograd.Function):
    """The float32 product of half-precision matrices; gradients are half-precision products, as usual."""

    @staticmethod
    def forward(ctx: Any, one_BGMK: Tensor, other_BGKN: Tensor) -> Tensor:
        ctx.save_for_backward(one_BGMK, other_BGKN)
        if one_BGMK.is_cuda:  # this kernel exists only on CUDA, and has no derivative
            product = torch.bmm(one_BGMK.flatten(0, 1), other_BGKN.flatten(0, 1), out_dtype=torch.float32)
            return product.unflatten(0, one_BGMK.shape[:2])
        with torch.autocast(one_BGMK.device.type, enabled=False):  # autocast would compute the product in half precision
            return one_BGMK.float() @ other_BGKN.float()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor]:
        one_BGMK, other_BGKN = ctx.saved_tensors
        grad_BGMN = grads[0].to(one_BGMK.dtype)
        return grad_BGMN @ other_BGKN.mT, one_BGMK.mT @ grad_BGMN


def _hide(scores_BGRS: Tensor, visible_BS: Tensor | None, mask_TS: Tensor | None) -> Tensor:
    if visible_BS is not None:
        scores_BGRS = scores_BGRS.masked_fill(~visible_BS[:, None, None, :], float("-inf"))
    if mask_TS is not None:
        b, g, r, s = scores_BGRS.shape
        t = mask_TS.shape[0]
        scores_BGRS = scores_BGRS.view(b, g, r // t, t, s).masked_fill(~mask_TS, float("-inf")).view(b, g, r, s)
    return scores_BGRS


def _merge_samples(x_BGRZ: Tensor, c: int) -> Tensor:
    """(C·n, G, R, Z) → (C, G, n·R, Z): the n noise samples of one cache become further queries of one product."""
    b, g, r, z = x_BGRZ.shape
    if b == c:
        return x_BGRZ
    return x_BGRZ.view(c, b // c, g, r, z).transpose(1, 2).reshape(c, g, (b // c) * r, z)


def _split_samples(x_CGQZ: Tensor, b: int) -> Tensor:
    """The inverse of ``_merge_samples``."""
    c, g, q, z = x_CGQZ.shape
    if b == c:
        return x_CGQZ
    noise_samples = b // c
    return x_CGQZ.view(c, g, noise_samples, q // noise_samples, z).transpose(1, 2).reshape(b, g, q // noise_samples, z)
