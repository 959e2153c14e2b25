"""The demo's model as one would first write it: what ``benchmarks.training`` compares the library with.

With ``Style(norm=nn.LayerNorm, gelu="none")`` and the library's weights it computes what the library computes
(tests/benchmarks), so the two differ in how the work is done and in the choices that ``Style`` names, and in nothing else.

Shape letters: B batch, P prefix tokens, L chunk size, D action dimension, T tokens, W width, E head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlaflow.backbones.tiny import TinyConfig
from vlaflow.data.batch import ObservationBatch
from vlaflow.decoders.flow import ActionCodec


@dataclass(frozen=True)
class Style:
    """What the naive model leaves to choose."""

    bf16: bool = False
    norm: type[nn.Module] = nn.RMSNorm
    gelu: str = "tanh"
    fused: bool = False


class NaiveBlock(nn.Module):
    """A pre-norm transformer block with the fused attention kernel."""

    def __init__(self, width: int, heads: int, ffn: int, style: Style) -> None:
        super().__init__()
        self.heads, self.gelu = heads, style.gelu
        self.norm_attention, self.norm_ffn = style.norm(width, eps=1e-6), style.norm(width, eps=1e-6)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, ffn), nn.Linear(ffn, width)

    def forward(self, x_BTW: Tensor, seen_B1TT: Tensor) -> Tensor:
        """(B, T, W) → (B, T, W)."""
        b, t, w = x_BTW.shape
        qkv = self.qkv(self.norm_attention(x_BTW)).view(b, t, 3, self.heads, w // self.heads).permute(2, 0, 3, 1, 4)
        mixed_BHTE = functional.scaled_dot_product_attention(*qkv, attn_mask=seen_B1TT)
        x_BTW = x_BTW + self.out(mixed_BHTE.transpose(1, 2).reshape(b, t, w))
        return x_BTW + self.down(functional.gelu(self.up(self.norm_ffn(x_BTW)), approximate=self.gelu))


class NaivePolicy(nn.Module):
    """The tiny backbone and its flow decoder as one module over one joint sequence of tokens."""

    def __init__(self, c: TinyConfig, action_dim: int, chunk_size: int, style: Style) -> None:
        super().__init__()
        self.config, self.gelu = c, style.gelu
        halvings = (c.cell // 4).bit_length() - 1
        channels = [3] + [max(16, c.width >> (halvings - i)) for i in range(halvings)] + [c.width]
        kinds = [(4, 4, 0)] + [(3, 2, 1)] * halvings  # kernel, stride, padding
        self.stem = nn.ModuleList(nn.Conv2d(a, b, *kind) for a, b, kind in zip(channels[:-1], channels[1:], kinds, strict=True))
        self.byte, self.text = nn.Embedding(257, 32), nn.Linear(32 * c.text_patch, c.width)
        self.state = nn.Linear(c.state_dim, c.width)
        cells, texts = (c.image_size // c.cell) ** 2, c.text_bytes // c.text_patch
        self.prefix_position = nn.Parameter(torch.randn(cells + texts + 1, c.width) * 0.02)
        self.suffix_position = nn.Parameter(torch.randn(chunk_size, c.width) * 0.02)
        self.blocks = nn.ModuleList(NaiveBlock(c.width, c.heads, c.ffn, style) for _ in range(c.depth))
        self.norm, self.codec = style.norm(c.width), ActionCodec(action_dim, c.width)

    def velocity(self, seen: ObservationBatch, state_BS: Tensor, x_BLD: Tensor, clock_BL: Tensor) -> Tensor:
        """Predicted dx/dt (B, L, D); every row brings its own observation."""
        c = self.config
        (image_BHWC,) = seen.images.values()
        picture_BCHW = image_BHWC.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1
        for number, layer in enumerate(self.stem):
            picture_BCHW = layer(functional.gelu(picture_BCHW, approximate=self.gelu) if number else picture_BCHW)
        sentences = [s.encode() for s in seen.instructions]
        length = -(-max(map(len, sentences)) // c.text_patch) * c.text_patch
        byte_BN = torch.tensor([[*s, *[256] * (length - len(s))] for s in sentences])
        text_BTW = self.text(self.byte(byte_BN).flatten(1).unflatten(1, (length // c.text_patch, -1)))
        tokens = (picture_BCHW.flatten(2).mT, text_BTW, self.state(state_BS)[:, None])
        hidden_BPW = torch.cat(tokens, 1)
        p, chunk_size = hidden_BPW.shape[1], x_BLD.shape[1]
        hidden_BPW = hidden_BPW + torch.cat((self.prefix_position[: p - 1], self.prefix_position[-1:]))
        x_BTW = torch.cat((hidden_BPW, self.codec.encode(x_BLD, clock_BL) + self.suffix_position[:chunk_size]), 1)
        written_BT = (byte_BN < 256).view(len(seen), -1, c.text_patch).any(-1)
        key_BT = functional.pad(written_BT, (tokens[0].shape[1], 1 + chunk_size), value=True)
        may_TT = torch.ones(p + chunk_size, p + chunk_size, dtype=torch.bool)
        may_TT[:p, p:] = False  # the prefix does not see the actions
        for block in self.blocks:
            x_BTW = block(x_BTW, key_BT[:, None, None, :] & may_TT)
        return self.codec.decode(self.norm(x_BTW[:, p:]))
