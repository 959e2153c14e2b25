"""The action expert: a separate, narrower stack whose layer j reads the keys and values of backbone layer j (A1 §3, π0).

The suffix is one state token and the decoder's tokens. By default the state token sees the prefix and itself, the decoder's
tokens see everything (π0's blocks); ``causal`` is what A1's code does. Since the mapping of layers is the identity, a prefix
that stopped after layer i is read by the first i layers, and the final norm and the decoder's head serve every depth.

Shape letters: B batch (observations × noise draws, draws innermost), T suffix tokens, S state dimension, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlaflow.backbones.base import BackboneSpec, Prefix
from vlaflow.errors import ConfigError
from vlaflow.nn.attention import causal_mask
from vlaflow.nn.block import Block, BlockConfig, make_norm
from vlaflow.stacks.base import Stack


@dataclass(frozen=True)
class ExpertConfig:
    """An action expert.

    Args:
        block: its blocks; ``kv_heads`` and ``head_dim`` are those of the backbone, all else is free.
        state_token: begin the suffix with a token made of the normalised proprioceptive state.
        padded_state: dimensions the state is padded to with zeros (A1: 32); None for its own.
        causal: tokens see only the suffix tokens before them.
    """

    block: BlockConfig
    state_token: bool = True
    padded_state: int | None = None
    causal: bool = False

    def build(self, spec: BackboneSpec, tokens: int) -> ExpertStack:
        """The stack for this backbone and so many decoder tokens, randomly initialised."""
        return ExpertStack(self, spec, tokens)


def a1_expert() -> ExpertConfig:
    """A1's "Qwen3-400M": 264.4 M parameters over the 28 layers of Qwen2-7B (without the language head it never uses)."""
    block = BlockConfig(1024, heads=8, kv_heads=4, head_dim=128, ffn=2048, norm="rms", gated=True, qkv_bias=True)
    return ExpertConfig(block, padded_state=32)


class ExpertStack(Stack):
    """See the module text.

    Raises:
        ConfigError: when the heads do not fit the backbone's keys and values.
    """

    def __init__(self, config: ExpertConfig, spec: BackboneSpec, tokens: int) -> None:
        super().__init__()
        self.config, block = config, config.block
        self.width = block.width
        if (block.kv_heads, block.head_dim) != (spec.kv_heads, spec.head_dim):
            raise ConfigError(
                f"An expert reads the backbone's keys and values, which have {spec.kv_heads} heads of {spec.head_dim}; "
                f"set the expert's kv_heads and head_dim to these instead of {block.kv_heads} and {block.head_dim}."
            )
        self.layers = nn.ModuleList(Block(block) for _ in range(spec.depth))
        self.norm = make_norm(block.norm, block.width, block.eps)
        lead = 0
        self.state: nn.Linear | None = None
        if config.state_token:
            size = config.padded_state or spec.state_dim
            if size < max(spec.state_dim, 1):
                raise ConfigError(f"padded_state {size} is smaller than the state, which has {spec.state_dim} dimensions.")
            self.state, lead = nn.Linear(size, block.width), 1
        self.position: nn.Parameter | None = None
        if not spec.rotary:
            self.position = nn.Parameter(torch.randn(lead + tokens, block.width) * 0.02)

    def exits(self, suffix_BTW: Tensor, prefix: Prefix, depths: Sequence[int]) -> list[Tensor]:
        """See ``Stack``."""
        found, tokens = [], suffix_BTW.shape[1]
        hidden_BTW = suffix_BTW
        if self.state is not None:
            hidden_BTW = torch.cat((self._state(self.state, prefix, len(suffix_BTW)), suffix_BTW), 1)
        if self.position is not None:
            hidden_BTW = hidden_BTW + self.position
        mask_TS = self._mask(hidden_BTW)
        rotate = prefix.backbone.rotation(prefix, len(hidden_BTW), hidden_BTW.shape[1])
        for index in range(depths[-1]):
            hidden_BTW, _ = self.layers[index](hidden_BTW, prefix.memory[index], None, mask_TS, rotate)
            if index + 1 in depths:
                found.append(self.norm(hidden_BTW[:, -tokens:]).to(suffix_BTW.dtype))
        return found

    def _state(self, project: nn.Linear, prefix: Prefix, batch: int) -> Tensor:
        if prefix.state_BS is None:
            raise ConfigError(f"{type(prefix.backbone).__name__} gives no state, which this expert's state token is made of.")
        state_BS = functional.pad(prefix.state_BS, (0, project.in_features - prefix.state_BS.shape[1]))
        return project(state_BS.to(project.weight.dtype)).repeat_interleave(batch // prefix.batch, 0)[:, None]

    def _mask(self, hidden_BTW: Tensor) -> Tensor | None:
        tokens = hidden_BTW.shape[1]
        if self.config.causal:
            return causal_mask(tokens, hidden_BTW.device)
        if self.state is None:
            return None
        mask_TS = torch.ones(tokens, tokens, dtype=torch.bool, device=hidden_BTW.device)
        mask_TS[0, 1:] = False
        return mask_TS
