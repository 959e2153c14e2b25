"""A backbone that takes one glance: a few large patches of each image, the instruction's bytes, the state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vlaflow.backbones.base import Backbone, BackboneConfig, BackboneSpec, Prefix, Rotary
from vlaflow.backbones.inputs import Inputs, Processor
from vlaflow.data.batch import ObservationBatch
from vlaflow.nn.attention import KeyValues
from vlaflow.nn.block import Block, BlockConfig
from vlaflow.nn.patches import PatchStem

PAD = 256  # the id after those of the 256 bytes


@dataclass(frozen=True)
class GlanceConfig(BackboneConfig):
    """The glance.

    Args:
        state_dim: length of the state.
        views: camera views, each read as a square of ``side`` pixels.
        side: a multiple of ``patch``.
        patch: pixels.
        width, depth: of the blocks.
    """

    state_dim: int
    views: tuple[str, ...]
    side: int = 16
    patch: int = 8
    width: int = 32
    depth: int = 2

    def build(self) -> GlanceBackbone:
        """The network."""
        return GlanceBackbone(self)

    def processor(self, folder: Path | None = None) -> GlanceProcessor:
        """It needs no files of a checkpoint."""
        return GlanceProcessor(self.views)

    def rater_block(self) -> BlockConfig:
        """A block like its own, so that ``asyncvla.rater`` can rate a policy with this backbone too."""
        return BlockConfig(self.width, heads=2, kv_heads=2, head_dim=self.width // 2, ffn=2 * self.width)


class GlanceProcessor(Processor):
    """Bytes of the instruction; images and state as they are."""

    def __init__(self, views: tuple[str, ...]) -> None:
        self.views = views

    def __call__(self, observation: ObservationBatch) -> Inputs:
        """On the CPU, in the loader's thread or the server's worker."""
        texts = [torch.tensor(list(text.encode()) or [PAD]) for text in observation.instructions]
        id_BP = nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=PAD)
        return Inputs(observation.state_BS, id_BP, images={view: observation.images[view] for view in self.views})


class GlanceBackbone(Backbone):
    """See the module text."""

    def __init__(self, config: GlanceConfig) -> None:
        super().__init__()
        self.config = c = config
        self.spec = BackboneSpec(c.depth, c.width, 2, 2, c.width // 2, state_dim=c.state_dim)
        self.stem = PatchStem(c.patch, c.width)
        self.words = nn.EmbeddingBag(PAD + 1, c.width, padding_idx=PAD)
        self.state = nn.Linear(c.state_dim, c.width)
        self.position = nn.Parameter(torch.randn(len(c.views) * (c.side // c.patch) ** 2 + 2, c.width) * 0.02)
        self.layers = nn.ModuleList(Block(c.rater_block()) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.width)

    @property
    def views(self) -> Mapping[str, int | None]:
        """All of one size."""
        return dict.fromkeys(self.config.views, self.config.side)

    def embed(self, inputs: Inputs) -> Prefix:
        """Patches, one token for the instruction, one for the state."""
        tokens = [self.stem(inputs.images[view].float() / 127.5 - 1) for view in self.config.views]
        tokens.append(self.words(inputs.id_BP)[:, None])
        tokens.append(self.state(inputs.state_BS)[:, None])
        return Prefix(self, torch.cat(tokens, 1) + self.position, state_BS=inputs.state_BS)

    def layer(
        self,
        index: int,
        hidden_BTW: Tensor,
        rotary: Rotary | None = None,
        kv_cache: KeyValues | None = None,
        padding_mask_BT: Tensor | None = None,
        *,
        mask_TS: Tensor | None = None,
    ) -> tuple[Tensor, KeyValues]:
        """One block."""
        return self.layers[index](hidden_BTW, kv_cache, padding_mask_BT, mask_TS)

    def place(self, suffix_BTW: Tensor, prefix: Prefix, offset: int = 0) -> tuple[Tensor, Rotary | None]:
        """Suffix tokens bring positions of their own."""
        return suffix_BTW, None

    def finish(self, hidden_BTW: Tensor) -> Tensor:
        """A LayerNorm."""
        return self.norm(hidden_BTW)
