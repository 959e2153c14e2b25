"""A small vision-language backbone learned from scratch, fast on a laptop CPU.

Images pass a convolution stem (or a patch projection) to a coarse grid of tokens; the instruction is read as UTF-8 bytes a few
at a time, or as one vector of a frozen sentence encoder; the state is one token; pre-norm blocks with full attention follow.
The prefix never sees the suffix, so its keys and values are exact for every solver step. With ``answers`` it can also be asked:
it answers byte by byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlaflow.backbones.base import BackboneConfig, BackboneSpec, InputLimit, InputSize, Prefix, Rotary
from vlaflow.backbones.inputs import Inputs
from vlaflow.backbones.language import LanguageBackbone
from vlaflow.backbones.sentences import SentenceSpec, encoder_spec, open_encoder
from vlaflow.backbones.tiny_processor import END, PAD, TinyProcessor
from vlaflow.errors import ConfigError
from vlaflow.nn.attention import KeyValues
from vlaflow.nn.block import Block, BlockConfig
from vlaflow.nn.drawn import drawn
from vlaflow.nn.patches import PixelStem
from vlaflow.ranges import Number, Width

MOST_VIEWS = 8


@dataclass(frozen=True)
class TinyConfig(BackboneConfig):
    """The tiny backbone.

    Args:
        state_dim: length of the proprioceptive state, S; 0 for none, and its token is constant.
        views: one to eight camera views, in the order of their tokens.
        image_size: side in pixels of the square that becomes tokens; a multiple of ``cell``.
        margin: pixels around that square. Images are resized to ``image_size + 2 * margin`` and their borders cut off, so 128
            and 32 see the central two thirds (of the side) as large as in an image of 192 pixels.
        cell: image side covered by one token in pixels; a power of two, at least 4.
        stem: "conv" (small patches, then 3×3 convolutions of stride 2) or "patch" (one projection).
        width, depth, heads, ffn: of the blocks.
        text: "bytes", learned from scratch; or a frozen sentence encoder: "minilm" (all-MiniLM-L6-v2), a folder, or a Hub name.
        sentence: which encoder it is, filled in when the policy is created.
        text_bytes: longest instruction in bytes.
        text_patch: bytes per text token.
        suffix: most suffix tokens a decoder or an answer may add.
        answers: give it a table of bytes and an end, which answers are read and named with.
    """

    state_dim: Number
    views: tuple[str, ...] = ("image",)
    image_size: Width = 96
    margin: Number = 0
    cell: Width = 16
    stem: Literal["conv", "patch"] = "conv"
    width: Width = 192
    depth: Width = 4
    heads: Width = 6
    ffn: Width = 768
    text: str = "bytes"
    sentence: SentenceSpec | None = None
    text_bytes: Width = 96
    text_patch: Width = 8
    suffix: Number = 64
    answers: bool = False

    def __post_init__(self) -> None:
        if not 1 <= len(self.views) <= MOST_VIEWS:
            raise ConfigError(
                f"The tiny backbone takes 1 to {MOST_VIEWS} views, got {list(self.views)}. Choose: --view NAME --view NAME"
            )
        if self.image_size % self.cell or self.cell & (self.cell - 1) or self.cell < 4:
            raise ConfigError(f"image_size {self.image_size} must be a multiple of cell {self.cell}, a power of two from 4 on.")
        if self.width % self.heads or self.text_bytes % self.text_patch:
            raise ConfigError("width must be a multiple of heads, and text_bytes of text_patch.")

    def build(self) -> TinyBackbone:
        """The network, randomly initialised."""
        return TinyBackbone(self.resolved())

    def resolved(self) -> TinyConfig:
        """See the base class: with the sentence encoder that there is now."""
        known = self.text == "bytes" or self.sentence is not None
        return self if known else replace(self, sentence=encoder_spec(self.text))

    def processor(self, folder: Path | None = None) -> TinyProcessor:
        """See the base class; it needs files for a sentence encoder only."""
        cells = dict.fromkeys(self.views, (self.image_size // self.cell) ** 2)
        encoder = None if self.text == "bytes" else open_encoder(self.text, self.sentence, folder)
        return TinyProcessor(
            cells,
            self.state_dim,
            text_bytes=self.text_bytes,
            text_patch=self.text_patch,
            margin=self.margin,
            encoder=encoder,
        )

    @property
    def input_size(self) -> InputSize:
        """A square, the margin included."""
        return InputSize(self.image_size + 2 * self.margin)

    @property
    def packages(self) -> tuple[str, ...]:
        """What a sentence encoder needs."""
        return () if self.text == "bytes" else ("transformers",)

    @property
    def can_answer(self) -> bool:
        """With a table of bytes."""
        return self.answers

    @property
    def longest_instruction(self) -> InputLimit | None:
        """A byte each; a sentence encoder has a limit of its own."""
        return InputLimit(self.text_bytes, "text_bytes") if self.text == "bytes" else None

    @property
    def longest_answer(self) -> InputLimit:
        """A byte each, and the end."""
        return InputLimit(self.suffix - 1, "suffix")

    @property
    def longest_suffix(self) -> InputLimit:
        """A learned position each."""
        return InputLimit(self.suffix, "suffix")

    def rater_block(self) -> BlockConfig:
        """A block like its own, with four times the width in between."""
        return BlockConfig(self.width, self.heads, self.heads, self.width // self.heads, 4 * self.width)


class ConvStem(nn.Module):
    """A 4×4 patch projection, then 3×3 convolutions of stride 2 down to one token per cell, doubling the channels.

    Starting from patches instead of full-resolution convolutions halves the stem's cost on a CPU.
    """

    def __init__(self, cell: int, width: int) -> None:
        super().__init__()
        halvings = (cell // 4).bit_length() - 1
        channels = [max(16, width >> (halvings - i)) for i in range(halvings)] + [width]
        self.patches = PixelStem(4, channels[0])
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(channels))

    def forward(self, image_BHW3: Tensor) -> Tensor:
        """uint8 (B, H, W, 3) → (B, tokens, width)."""
        b, h, w, _ = image_BHW3.shape
        # channels last all the way: the projection's output is already in the layout the convolutions are fast in
        x_BCHW = self.patches(image_BHW3).view(b, h // 4, w // 4, -1).permute(0, 3, 1, 2)
        for convolution in self.convolutions:
            x_BCHW = convolution(functional.gelu(x_BCHW))
        return x_BCHW.flatten(2).mT


class TinyBackbone(LanguageBackbone):
    """See the module text."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = c = config
        self.spec = BackboneSpec(c.depth, c.width, c.heads, c.heads, c.width // c.heads, state_dim=c.state_dim)
        stem = ConvStem if c.stem == "conv" else PixelStem
        self.stems = nn.ModuleList(stem(c.cell, c.width) for _ in c.views)
        cells = (c.image_size // c.cell) ** 2
        self.byte = None if c.sentence else nn.Embedding(PAD + 1, 32)
        texts = 1 if c.sentence else c.text_bytes // c.text_patch
        self.text = nn.Linear(c.sentence.dim if c.sentence else 32 * c.text_patch, c.width)
        self.state = nn.Linear(c.state_dim, c.width) if c.state_dim else None
        self.prefix_position = drawn(len(c.views) * cells + texts + 1, c.width)
        self.suffix_position = drawn(c.suffix, c.width)
        block = BlockConfig(c.width, c.heads, c.heads, c.width // c.heads, c.ffn)
        self.layers = nn.ModuleList(Block(block) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.width)
        self.answer = nn.Embedding(END + 1, c.width) if c.answers else None
        if self.answer is not None:  # one table reads and names; logits of a normed state begin at a deviation of 1
            nn.init.normal_(self.answer.weight, std=c.width**-0.5)

    @property
    def views(self) -> Mapping[str, int | None]:
        """Views and their image side, the margin included."""
        return dict.fromkeys(self.config.views, self.config.input_size.side)

    @property
    def blocks(self) -> Mapping[nn.Module, str]:
        """See the base class."""
        return dict.fromkeys(self.layers, "forward")

    def embed(self, inputs: Inputs) -> Prefix:
        """See the base class."""
        c = self.config
        tokens = []
        for view, stem in zip(c.views, self.stems, strict=True):
            tokens.append(stem(inputs.images[view]))
        tokens.append(self.text(self._text_numbers(inputs)))
        before_state = sum(t.shape[1] for t in tokens)
        tokens.append(self._state_token(inputs))
        position_PW = torch.cat((self.prefix_position[:before_state], self.prefix_position[-1:]))
        return Prefix(self, torch.cat(tokens, 1) + position_PW, inputs.padding_mask_BP, state_BS=inputs.state_BS)

    def _state_token(self, inputs: Inputs) -> Tensor:
        """The state as a token, (B, 1, width); zeros where the policy reads no state."""
        if self.state is None:
            return self.text.weight.new_zeros(len(inputs.state_BS), 1, self.config.width)
        return self.state(inputs.state_BS.to(self.state.weight.dtype))[:, None]

    def _text_numbers(self, inputs: Inputs) -> Tensor:
        """What is projected to text tokens, (B, tokens, numbers)."""
        if self.byte is None:
            assert inputs.sentence_BE is not None
            return inputs.sentence_BE.to(self.text.weight.dtype)[:, None] * self.text.in_features**0.5  # a mean square of 1
        batch, length = inputs.id_BP.shape
        return self.byte(inputs.id_BP).view(batch, length // self.config.text_patch, self.text.in_features)

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
        """See the base class; positions were added by ``embed`` and ``place``, so ``rotary`` is not used."""
        return self.layers[index](hidden_BTW, kv_cache, padding_mask_BT, mask_TS)

    def place(self, suffix_BTW: Tensor, prefix: Prefix, offset: int = 0) -> tuple[Tensor, Rotary | None]:
        """Adds a learned position to each suffix token."""
        first = prefix.written + offset
        end = first + suffix_BTW.shape[1]
        if end > self.config.suffix:
            raise ConfigError(
                f"The decoder adds {end} tokens to the observation's, and the tiny backbone has {self.config.suffix} positions "
                f"for them. In training: --set policy.backbone.suffix={end}"
            )
        return suffix_BTW + self.suffix_position[first:end], None

    def finish(self, hidden_BTW: Tensor) -> Tensor:
        """The final LayerNorm."""
        return self.norm(hidden_BTW)

    # -- language ----------------------------------------------------------------------------------------------------

    @property
    def vocabulary(self) -> int:
        """256 bytes and the end."""
        return END + 1 if self.config.answers else 0

    def embed_ids(self, id_BT: Tensor) -> Tensor:
        """See ``LanguageBackbone``."""
        return self._table()(id_BT)

    def name_ids(self, state_NW: Tensor) -> Tensor:
        """See ``LanguageBackbone``."""
        return functional.linear(state_NW, self._table().weight)

    def _table(self) -> nn.Embedding:
        self.require_head()
        assert self.answer is not None
        return self.answer
