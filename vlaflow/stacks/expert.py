"""The action expert: a separate, narrower stack whose layer j reads the keys and values of backbone layer j (A1 §3, π0).

The suffix is a time token where the decoder has one, a state token, and the decoder's actions. By default the time token sees
the prefix and itself, the state token also the time, the actions everything (the blocks of π0 and iFlyBot); ``causal`` is what
A1's code does. Since the mapping of layers is the identity, a prefix that stopped after layer i is read by the first i layers,
and the final norm and the decoder's head serve every depth. Which tokens' keys and values there are to read is not the
expert's affair: a decoder may show it those of the latent action tokens alone (``decoders.latent_flow``).

Shape letters: B batch (observations × noise samples, samples innermost), T suffix tokens, S state dimension, W width, G
key/value heads and E head dimension of the backbone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlaflow.backbones.base import BackboneSpec, Prefix
from vlaflow.errors import ConfigError
from vlaflow.nn.attention import KeyValues, causal_mask
from vlaflow.nn.block import Block, BlockConfig, make_norm
from vlaflow.nn.drawn import drawn
from vlaflow.ranges import Number
from vlaflow.stacks.base import Stack


@dataclass(frozen=True)
class ExpertConfig:
    """An action expert.

    Args:
        block: its blocks; ``kv_heads`` and ``head_dim`` are those of the backbone unless ``projected``, all else is free.
        state_token: begin the suffix with a token made of the normalised proprioceptive state.
        padded_state: dimensions the state is padded to with zeros (A1: 32); None for its own.
        causal: tokens see only the suffix tokens before them.
        projected: each layer brings the backbone's keys and values to its own heads by one linear map, the same for both
            (iFlyBot); its own positions are then learned, for the backbone's rotation is of another size.
    """

    block: BlockConfig
    state_token: bool = True
    padded_state: Number | None = None
    causal: bool = False
    projected: bool = False

    def build(self, spec: BackboneSpec, tokens: int, time_token: bool = False) -> ExpertStack:
        """The stack for this backbone and so many action tokens, randomly initialised."""
        return ExpertStack(self, spec, tokens, time_token)


def a1_expert() -> ExpertConfig:
    """A1's "Qwen3-400M": 264.4 M parameters over the 28 layers of Qwen2-7B (without the language head it never uses)."""
    block = BlockConfig(1024, heads=8, kv_heads=4, head_dim=128, ffn=2048, norm="rms", gated=True, qkv_bias=True)
    return ExpertConfig(block, padded_state=32)


class ExpertStack(Stack):
    """See the module text.

    Raises:
        ConfigError: when the heads do not fit the backbone's keys and values.
    """

    own_layers = True

    def __init__(self, config: ExpertConfig, spec: BackboneSpec, tokens: int, time_token: bool = False) -> None:
        super().__init__()
        self.config, block = config, config.block
        self.width, self.time_tokens = block.width, int(time_token)
        own, theirs = block.kv_heads * block.head_dim, spec.kv_heads * spec.head_dim
        self.projections = nn.ModuleList(nn.Linear(theirs, own) for _ in range(spec.depth if config.projected else 0))
        if not config.projected and (block.kv_heads, block.head_dim) != (spec.kv_heads, spec.head_dim):
            raise ConfigError(
                f"An expert reads the backbone's keys and values, which have {spec.kv_heads} heads of {spec.head_dim}; "
                f"set the expert's kv_heads and head_dim to these instead of {block.kv_heads} and {block.head_dim}, "
                "or set projected."
            )
        self.layers = nn.ModuleList(Block(block) for _ in range(spec.depth))
        self.norm = make_norm(block.norm, block.width, block.eps)
        lead = self.time_tokens
        self.state: nn.Linear | None = None
        if config.state_token:
            size = config.padded_state or max(spec.state_dim, 1)  # without a state the token is constant
            if size < spec.state_dim:
                raise ConfigError(f"padded_state {size} is smaller than the state, which has {spec.state_dim} dimensions.")
            self.state, lead = nn.Linear(size, block.width), lead + 1
        self.position: nn.Parameter | None = None
        if not spec.rotary or config.projected:
            self.position = drawn(lead + tokens, block.width)

    @property
    def blocks(self) -> Mapping[nn.Module, str]:
        """See ``Stack``."""
        return dict.fromkeys(self.layers, "forward")

    def exits(self, suffix_BTW: Tensor, prefix: Prefix, depths: Sequence[int]) -> list[Tensor]:
        """See ``Stack``."""
        found, tokens = [], suffix_BTW.shape[1]
        hidden_BTW = suffix_BTW
        if self.state is not None:
            time_BTW, action_BTW = suffix_BTW[:, : self.time_tokens], suffix_BTW[:, self.time_tokens :]
            hidden_BTW = torch.cat((time_BTW, self._state(self.state, prefix, len(suffix_BTW)), action_BTW), 1)
        if self.position is not None:
            hidden_BTW = hidden_BTW + self.position
        mask_TS = self._mask(hidden_BTW)
        rotate = None
        if not self.config.projected:
            rotate = prefix.backbone.rotation(prefix, len(hidden_BTW), hidden_BTW.shape[1])
        for index in range(depths[-1]):
            hidden_BTW, _ = self.layers[index](hidden_BTW, self._keys_and_values(index, prefix), None, mask_TS, rotate)
            if index + 1 in depths:
                # the state token, which stands after the time token, is no answer
                kept_BTW = hidden_BTW[:, self.time_tokens - tokens :]
                if self.time_tokens:
                    kept_BTW = torch.cat((hidden_BTW[:, : self.time_tokens], kept_BTW), 1)
                found.append(self.norm(kept_BTW).to(suffix_BTW.dtype))
        return found

    def _keys_and_values(self, index: int, prefix: Prefix) -> KeyValues:
        theirs = prefix.kv_cache[index]
        if not self.config.projected:
            return theirs
        block, (c, _, p, _), to_own = self.config.block, theirs.key_CGPE.shape, self.projections[index]

        def project(x_CGPE: Tensor) -> Tensor:
            own_CPX = to_own(x_CGPE.transpose(1, 2).reshape(c, p, -1))
            return own_CPX.view(c, p, block.kv_heads, block.head_dim).transpose(1, 2)

        return KeyValues(project(theirs.key_CGPE), project(theirs.value_CGPE), theirs.mask_CP)

    def _state(self, project: nn.Linear, prefix: Prefix, batch: int) -> Tensor:
        if prefix.state_BS is None:
            raise ConfigError(f"{type(prefix.backbone).__name__} gives no state, which this expert's state token is made of.")
        state_BS = functional.pad(prefix.state_BS, (0, project.in_features - prefix.state_BS.shape[1]))
        return project(state_BS.to(project.weight.dtype)).repeat_interleave(batch // prefix.batch, 0)[:, None]

    def _mask(self, hidden_BTW: Tensor) -> Tensor | None:
        tokens = hidden_BTW.shape[1]
        if self.config.causal:
            return causal_mask(tokens, hidden_BTW.device)
        lead = self.time_tokens + (self.state is not None)
        if lead == 0:
            return None
        mask_TS = torch.ones(tokens, tokens, dtype=torch.bool, device=hidden_BTW.device)
        for leader in range(lead):
            mask_TS[leader, leader + 1 :] = False
        return mask_TS
