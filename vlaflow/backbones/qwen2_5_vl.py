"""Qwen2.5-VL as a backbone: its own processor, chat template, vision tower, multimodal rotary positions and layers.

The prefix is causal, as the model was pretrained. Layers and files are those of every pretrained backbone (``pretrained``).

Shape letters: B batch, P prefix tokens, T suffix tokens, W width, S state dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlaflow.backbones.base import InputSize
from vlaflow.backbones.inputs import Inputs
from vlaflow.backbones.pretrained import PretrainedBackbone, PretrainedConfig
from vlaflow.backbones.pretrained_processor import open_reader
from vlaflow.backbones.qwen2_5_vl_processor import FAMILY, NAME, QwenProcessor, QwenReader
from vlaflow.errors import ConfigError
from vlaflow.nn.block import BlockConfig

PATCH = 28 * 28  # pixels of one image token: 2 × 2 patches of 14 × 14


def qwen2_5_vl_3b() -> dict[str, Any]:
    """The architecture of Qwen2.5-VL-3B, 3.755 B parameters, for networks without pretrained weights (and for counting)."""
    return {
        "text_config": {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 2048,
            "patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "tokens_per_second": 2,
        },
        "tie_word_embeddings": True,
    }


@dataclass(frozen=True)
class QwenConfig(PretrainedConfig):
    """The Qwen2.5-VL backbone.

    Args:
        state_dim, views, source, architecture, dtype, recompute: see ``PretrainedConfig``; the user turn shows the views.
        min_pixels, max_pixels: an image is resized, keeping its shape, until its area lies between (64 to 128 tokens).
        padded_state: state dimensions the network sees, zero beyond S.
        system: the system turn.
        state_token: a token that stands for the state in the user turn; one that no instruction uses.
    """

    min_pixels: int = 64 * PATCH
    max_pixels: int = 128 * PATCH
    padded_state: int = 32
    system: str = "You move a robot. Look at the images and its state, and do what the user asks."
    state_token: str = "<|vision_pad|>"  # noqa: S105

    name: ClassVar[str] = NAME
    family: ClassVar[str] = FAMILY
    model_class: ClassVar[str] = "Qwen2_5_VLForConditionalGeneration"
    published: ClassVar[Mapping[str, Callable[[], dict[str, Any]]]] = {"Qwen/Qwen2.5-VL-3B-Instruct": qwen2_5_vl_3b}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not PATCH <= self.min_pixels <= self.max_pixels:
            raise ConfigError(f"min_pixels {self.min_pixels} must lie between {PATCH} and max_pixels {self.max_pixels}.")

    def build(self) -> QwenBackbone:
        """See the base class."""
        return QwenBackbone(self)

    def processor(self, folder: Path | None = None) -> QwenProcessor:
        """See the base class."""
        return QwenProcessor(
            open_reader(QwenReader, self.source, folder),
            self.views,
            self.state_dim,
            pixels=(self.min_pixels, self.max_pixels),
            state_token=self.state_token,
            system=self.system,
        )

    def image_tokens(self, side: int) -> int:
        """See the base class."""
        area = min(max(side * side, self.min_pixels), self.max_pixels)
        return max(round(area**0.5 / 28), 1) ** 2

    @property
    def input_size(self) -> InputSize:
        """Of any shape."""
        return InputSize(area=self.max_pixels)

    @property
    def state_width(self) -> int:
        """See the base class."""
        return self.padded_state

    def rater_block(self) -> BlockConfig:
        """Like the blocks of Qwen2.5-VL-3B, whose sizes ``architecture`` may replace."""
        text = qwen2_5_vl_3b()["text_config"] | (self.architecture or {}).get("text_config", {})
        width, heads, kv_heads = text["hidden_size"], text["num_attention_heads"], text["num_key_value_heads"]
        return BlockConfig(width, heads, kv_heads, width // heads, text["intermediate_size"], norm="rms", gated=True)


class QwenBackbone(PretrainedBackbone):
    """See the module text. ``network`` is transformers' ``Qwen2_5_VLModel`` (vision tower and language layers)."""

    def __init__(self, config: QwenConfig) -> None:
        super().__init__(config)
        if config.recompute:
            self.network.visual.activation_checkpointing_enable()

    @property
    def vision_blocks(self) -> Iterable[nn.Module]:
        """See the base class."""
        return self.network.visual.blocks

    def embed_prompt(self, inputs: Inputs) -> Tensor:
        """See the base class."""
        hidden_BPW = self.embed_ids(inputs.id_BP)
        if inputs.patches is None or inputs.image_BP is None:
            return hidden_BPW
        return hidden_BPW.masked_scatter(inputs.image_BP[..., None], self.image_features(inputs).to(hidden_BPW.dtype))

    def image_features(self, inputs: Inputs) -> Tensor:
        """Tokens (V, W) of all images; the vision tower reads their grids as numbers, so these are on the CPU."""
        features = self.network.get_image_features(
            inputs.patches, inputs.grid_I3, position_ids=inputs.patch_position_N2, return_dict=True
        )
        return torch.cat(tuple(features.pooler_output))

    def prefix_positions(self, inputs: Inputs) -> Tensor:
        """Time, height and width: (3, B, P)."""
        assert inputs.position_3BP is not None
        return inputs.position_3BP

    def positions(self, position_BT: Tensor) -> Tensor:
        """Words have the same time, height and width: (3, B, T)."""
        return position_BT.expand(3, -1, -1)
