"""A pre-norm transformer block that returns its keys and values and attends to a cache of further ones.

LayerNorm and erf-GELU are the defaults because they are faster on a CPU (RMSNorm and tanh-GELU take 4 to 5 times as long
there); "rms" and ``gated`` give the block of the Qwen family.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

from vlaflow.nn.attention import KeyValues, attend
from vlaflow.ranges import NotNegative, Width

Rotate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Rotates queries (B, H, T, E) and keys (B, G, T, E) by their positions."""


@dataclass(frozen=True)
class BlockConfig:
    """Settings of one block.

    Args:
        width: hidden size, W.
        heads: query heads, H.
        kv_heads: key/value heads, G; divides ``heads``.
        head_dim: dimension per head, E.
        ffn: inner width of the feed-forward part.
        norm: "layer" or "rms".
        gated: SwiGLU with three matrices instead of GELU with two.
        qkv_bias: biases on the query, key and value projections.
        eps: epsilon of the norms.
    """

    width: Width
    heads: Width
    kv_heads: Width
    head_dim: Width
    ffn: Width
    norm: Literal["layer", "rms"] = "layer"
    gated: bool = False
    qkv_bias: bool = True
    eps: NotNegative = 1e-6


class LayerNorm(nn.LayerNorm):
    """torch's, also where weights are rounded and activations are not, as in sharded layers: on a CPU, torch refuses those."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, W) → (…, W), in the number format of ``x``."""
        weight_W, bias_W = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return functional.layer_norm(x, self.normalized_shape, weight_W, bias_W, self.eps)


class RMSNorm(nn.RMSNorm):
    """torch's, where weights and activations differ in format: under autocast as in sharded layers. torch warns of those, and
    has no fused kernel for them.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(…, W) → (…, W), in the number format of ``x``."""
        return functional.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def make_norm(kind: Literal["layer", "rms"], width: int, eps: float) -> nn.Module:
    """A LayerNorm or RMSNorm over the last dimension."""
    return LayerNorm(width, eps=eps) if kind == "layer" else RMSNorm(width, eps=eps)


class FeedForward(nn.Module):
    """GELU(x W₁) W₂, or SwiGLU: (SiLU(x W_g) ⊙ x W₁) W₂."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        bias = not config.gated
        self.up = nn.Linear(config.width, config.ffn, bias=bias)
        self.gate = nn.Linear(config.width, config.ffn, bias=False) if config.gated else None
        self.down = nn.Linear(config.ffn, config.width, bias=bias)

    def forward(self, x_BTW: Tensor) -> Tensor:
        """(B, T, W) → (B, T, W)."""
        if self.gate is None:
            return self.down(functional.gelu(self.up(x_BTW)))
        return self.down(functional.silu(self.gate(x_BTW)) * self.up(x_BTW))


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)).

    Attributes:
        joined: how it attends (``attend``).
    """

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.config, self.joined = config, False
        c = config
        self.norm_attention = make_norm(c.norm, c.width, c.eps)
        self.qkv = nn.Linear(c.width, (c.heads + 2 * c.kv_heads) * c.head_dim, bias=c.qkv_bias)
        self.out = nn.Linear(c.heads * c.head_dim, c.width, bias=c.qkv_bias and not c.gated)
        self.norm_ffn = make_norm(c.norm, c.width, c.eps)
        self.ffn = FeedForward(c)

    def forward(
        self,
        x_BTW: Tensor,
        kv_cache: KeyValues | None = None,
        padding_mask_BT: Tensor | None = None,
        mask_TS: Tensor | None = None,
        rotate: Rotate | None = None,
    ) -> tuple[Tensor, KeyValues]:
        """Apply the block.

        Args:
            x_BTW: hidden states, (B, T, W).
            kv_cache: further keys and values that every token attends to, or None.
            padding_mask_BT: bool, False on padding tokens, which are never attended to.
            mask_TS: bool (T, T), True where token t may attend to token s; None for full attention.
            rotate: applies rotary positions to queries and keys; None for none.

        Returns:
            New hidden states and this block's own keys and values.
        """
        c, (b, t, _) = self.config, x_BTW.shape
        qkv = self.qkv(self.norm_attention(x_BTW)).view(b, t, c.heads + 2 * c.kv_heads, c.head_dim).transpose(1, 2)
        query_BHTE, key_BGTE, value_BGTE = qkv.split((c.heads, c.kv_heads, c.kv_heads), 1)
        if rotate is not None:
            query_BHTE, key_BGTE = rotate(query_BHTE, key_BGTE)
        own = KeyValues(key_BGTE, value_BGTE, padding_mask_BT)
        mixed_BHTE = attend(query_BHTE, own, kv_cache, mask_TS, joined=self.joined)
        x_BTW = x_BTW + self.out(mixed_BHTE.transpose(1, 2).reshape(b, t, c.heads * c.head_dim))
        return x_BTW + self.ffn(self.norm_ffn(x_BTW)), own
