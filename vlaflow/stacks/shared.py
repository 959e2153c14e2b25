"""The shared stack: suffix tokens run through the backbone's own layers and read the prefix's keys and values there.

It has no parameters. The suffix sees the whole prefix and, by default, all of itself. There are three ways to run it:

    exits     all suffix tokens in one pass; the prefix never saw them, so its keys and values are exact for ever
    extend    token after token, keys and values of the earlier ones kept (autoregression)
    joint     prefix and suffix in one pass, everything sees everything; the prefix's keys and values depend on the suffix

Shape letters: B batch, T suffix tokens, P prefix tokens, W width, G key/value heads, E head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from vlaflow.backbones.base import Prefix
from vlaflow.nn.attention import KeyValues
from vlaflow.stacks.base import Stack


@dataclass
class Cache:
    """Keys and values of prefix and suffix so far, one growing buffer per layer.

    Args:
        layers: buffers with room for every token; those from ``used`` on hold nothing yet.
        prefix: number of prefix tokens.
        used: tokens that are in.
    """

    layers: list[KeyValues]
    prefix: int
    used: int

    def so_far(self, index: int) -> KeyValues:
        """What layer ``index`` may read: views, no copies."""
        layer, n = self.layers[index], self.used
        mask_BP = None if layer.mask_CP is None else layer.mask_CP[:, :n]
        return KeyValues(layer.key_CGPE[:, :, :n], layer.value_CGPE[:, :, :n], mask_BP)

    def visible(self) -> Tensor:
        """bool (B, room), the tokens that may be read so far."""
        first = self.layers[0]
        if first.mask_CP is None:
            visible_BN = first.key_CGPE.new_zeros(first.key_CGPE.shape[::2], dtype=torch.bool)
            visible_BN[:, : self.used] = True
            return visible_BN
        visible_BN = first.mask_CP.clone()
        visible_BN[:, self.used :] = False
        return visible_BN

    def write(self, index: int, own: KeyValues) -> None:
        """Keep the keys and values of the next tokens in a layer; ``used`` is left to the caller, after the last layer."""
        layer, end = self.layers[index], self.used + own.key_CGPE.shape[2]
        layer.key_CGPE[:, :, self.used : end] = own.key_CGPE
        layer.value_CGPE[:, :, self.used : end] = own.value_CGPE


class SharedStack(Stack):
    """As many backbone layers as asked, applied to the suffix; of the backbone's width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def exits(self, suffix_BTW: Tensor, prefix: Prefix, depths: Sequence[int], mask_TS: Tensor | None = None) -> list[Tensor]:
        """See ``Stack``; where ``mask_TS`` (bool, T × T) is True, suffix token t sees suffix token s."""
        return prefix.backbone.follow(suffix_BTW, prefix, depths, mask_TS)[0]

    @staticmethod
    def cache(prefix: Prefix, room: int) -> Cache:
        """Buffers that hold the prefix and have room for so many suffix tokens; the prefix is copied once."""
        layers, p = [], prefix.kv_cache[0].key_CGPE.shape[2]
        for layer in prefix.kv_cache:
            key, value = (functional.pad(x, (0, 0, 0, room)) for x in (layer.key_CGPE, layer.value_CGPE))
            mask = None if layer.mask_CP is None else functional.pad(layer.mask_CP, (0, room), value=True)
            layers.append(KeyValues(key, value, mask))
        return Cache(layers, p, p)

    @staticmethod
    def extend(token_BTW: Tensor, prefix: Prefix, cache: Cache) -> Tensor:
        """Hidden states (B, T, W) of the next suffix tokens, which see all before them and all of themselves.

        Their keys and values are written into ``cache``.
        """
        backbone, t = prefix.backbone, token_BTW.shape[1]
        hidden_BTW, rotary = backbone.place(token_BTW, prefix, cache.used - cache.prefix)
        for index in range(len(cache.layers)):
            hidden_BTW, own = backbone.layer(index, hidden_BTW, rotary, cache.so_far(index))
            cache.write(index, own)
        cache.used += t
        return backbone.finish(hidden_BTW).to(token_BTW.dtype)

    @staticmethod
    def joint(suffix_BTW: Tensor, prefix: Prefix, depth: int) -> tuple[Tensor, Prefix]:
        """Prefix and suffix through ``depth`` layers together, every token seeing every other one, padding aside.

        Returns:
            The suffix's hidden states (B, T, W), and the prefix with the keys and values it had there. With several noise
            samples per observation the prefix has as many rows as the suffix.
        """
        start, backbone = prefix.restart(), prefix.backbone
        noise_samples = len(suffix_BTW) // start.batch
        if noise_samples > 1:
            start = start.select(torch.arange(start.batch, device=suffix_BTW.device).repeat_interleave(noise_samples))
        placed_BTW, after = backbone.place(suffix_BTW, start)
        t, p = suffix_BTW.shape[1], start.hidden_BPW.shape[1]
        rotary = None
        if start.rotary is not None and after is not None:
            rotary = (torch.cat((start.rotary[0], after[0]), -2), torch.cat((start.rotary[1], after[1]), -2))
        padding_mask_BN = None if start.padding_mask_BP is None else functional.pad(start.padding_mask_BP, (0, t), value=True)
        hidden_BNW, kv_cache = torch.cat((start.hidden_BPW, placed_BTW), 1), []
        for index in range(depth):
            hidden_BNW, own = backbone.layer(index, hidden_BNW, rotary, None, padding_mask_BN)
            kv_cache.append(KeyValues(own.key_CGPE[:, :, :p], own.value_CGPE[:, :, :p], start.padding_mask_BP))
        done = replace(start, hidden_BPW=hidden_BNW[:, :p], kv_cache=tuple(kv_cache), embedded_BPW=start.hidden_BPW)
        return backbone.finish(hidden_BNW[:, p:]).to(suffix_BTW.dtype), done
