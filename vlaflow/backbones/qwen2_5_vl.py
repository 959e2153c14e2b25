"""Qwen2.5-VL as a backbone: its own processor, chat template, vision tower, multimodal rotary positions and layers.

The prefix is causal, as the model was pretrained. Layers and files are those of every pretrained backbone (``pretrained``).

Shape letters: B batch, P prefix tokens, T suffix tokens, W width, S state dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlaflow.backbones.base import BackboneConfig, BackboneSpec, Prefix
from vlaflow.backbones.pretrained import PretrainedBackbone, plain_architecture
from vlaflow.backbones.pretrained_prompt import open_pretrained, transformers_library
from vlaflow.backbones.qwen2_5_vl_prompt import NAME, PromptReader
from vlaflow.data.batch import ObservationBatch
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
class QwenConfig(BackboneConfig):
    """The Qwen2.5-VL backbone.

    Args:
        state_dim: length of the proprioceptive state, S.
        views: camera views, any number, in the order in which the user turn shows them.
        source: local folder or Hub name of a pretrained model to start from; None when ``architecture`` is given.
        architecture: transformers' text and vision config as JSON data, for random weights or those of a checkpoint.
        min_pixels, max_pixels: an image is resized, keeping its shape, until its area lies between (64 to 128 tokens).
        padded_state: state dimensions the network sees, zero beyond S.
        system: the system turn.
        state_token: a token that stands for the state in the user turn; one that no instruction uses.
        dtype: of the pretrained parts. Train in float32 under bf16 autocast; bfloat16 halves the memory of serving.
        recompute: forget activations in training and compute them again, layer by layer (less memory, a third more time).
    """

    state_dim: int
    views: tuple[str, ...]
    source: str | None = None
    architecture: dict[str, Any] | None = field(default=None, repr=False)
    min_pixels: int = 64 * PATCH
    max_pixels: int = 128 * PATCH
    padded_state: int = 32
    system: str = "You move a robot. Look at the images and its state, and do what the user asks."
    state_token: str = "<|vision_pad|>"  # noqa: S105
    dtype: Literal["float32", "bfloat16"] = "float32"
    recompute: bool = False

    def __post_init__(self) -> None:
        if (self.source is None) == (self.architecture is None):
            raise ConfigError("A Qwen2.5-VL backbone needs either 'source' (a folder or Hub name) or 'architecture'.")
        if len(set(self.views)) != len(self.views):
            raise ConfigError(f"Camera views must differ, got {list(self.views)}.")
        if self.state_dim > self.padded_state:
            raise ConfigError(f"padded_state {self.padded_state} is smaller than state_dim {self.state_dim}; raise it.")
        if not PATCH <= self.min_pixels <= self.max_pixels:
            raise ConfigError(f"min_pixels {self.min_pixels} must lie between {PATCH} and max_pixels {self.max_pixels}.")

    def build(self) -> QwenBackbone:
        """The network: pretrained where ``source`` is given, else random, to be filled from a checkpoint."""
        return QwenBackbone(self)

    @property
    def can_answer(self) -> bool:
        """The published model's head."""
        return True

    def rater_block(self) -> BlockConfig:
        """Like the blocks of Qwen2.5-VL-3B, whose sizes ``architecture`` may replace."""
        text = qwen2_5_vl_3b()["text_config"] | (self.architecture or {}).get("text_config", {})
        width, heads, kv_heads = text["hidden_size"], text["num_attention_heads"], text["num_key_value_heads"]
        return BlockConfig(width, heads, kv_heads, width // heads, text["intermediate_size"], norm="rms", gated=True)


class QwenBackbone(PretrainedBackbone):
    """See the module text.

    ``network`` is transformers' ``Qwen2_5_VLModel`` (vision tower and language layers). A tied language-model head is the
    embedding table itself and is held once, as in the published weights; an untied one is ``head``.
    """

    def __init__(self, config: QwenConfig) -> None:
        super().__init__()
        hub, dtype = transformers_library(NAME), getattr(torch, config.dtype)
        self.name, self.reader = NAME, None
        if config.source is not None:
            full = open_pretrained(
                hub.Qwen2_5_VLForConditionalGeneration, config.source, NAME, dtype=dtype, use_safetensors=True
            )
            self.reader = PromptReader.open(config.source)
            config = replace(config, source=None, architecture=plain_architecture(full.config.to_diff_dict()))
        else:
            full = hub.AutoModelForImageTextToText.from_config(hub.Qwen2_5_VLConfig(**(config.architecture or {})), dtype=dtype)
        self.config = config
        self.network = full.model
        self.head = None if full.config.tie_word_embeddings else full.lm_head
        text = full.config.text_config
        heads, width = text.num_attention_heads, text.hidden_size
        self.spec = BackboneSpec(
            text.num_hidden_layers,
            width,
            heads,
            text.num_key_value_heads,
            width // heads,
            attention="causal",
            state_dim=config.state_dim,
            rotary=True,
        )
        self.state = nn.Linear(config.padded_state, width)
        self._rotate = hub.models.qwen2_5_vl.modeling_qwen2_5_vl.apply_rotary_pos_emb
        if config.recompute:
            self.network.visual.activation_checkpointing_enable()

    @property
    def views(self) -> Mapping[str, int | None]:
        """Views of any size; the processor resizes them by area."""
        return dict.fromkeys(self.config.views)

    def embed(self, observation: ObservationBatch) -> Prefix:
        """See the base class. The vision tower runs here, once for all views of all observations.

        Raises:
            SpecError: for a state of another length, or an instruction with one of the tokenizer's own tokens.
            CapabilityError: for a network that has neither been given a ``source`` nor opened from a checkpoint.
        """
        c, table = self.config, self.network.language_model.embed_tokens
        prompt = self.reading().read(observation, c)
        position_3BP, _ = self.network.get_rope_index(
            prompt.id_BP,
            mm_token_type_ids=prompt.image_BP.int(),
            image_grid_thw=prompt.grid_I3,
            attention_mask=prompt.padding_mask_BP.long(),
        )
        next_position_B = position_3BP.masked_fill(~prompt.padding_mask_BP, -1).amax((0, 2)) + 1
        device = table.weight.device
        hidden_BPW = table(prompt.id_BP.to(device))
        if prompt.patches is not None and prompt.grid_I3 is not None:
            features = self.network.get_image_features(prompt.patches.to(device), prompt.grid_I3.to(device), return_dict=True)
            image_NW = torch.cat(tuple(features.pooler_output)).to(hidden_BPW.dtype)
            hidden_BPW = hidden_BPW.masked_scatter(prompt.image_BP[..., None].to(device), image_NW)
        hidden_BPW = self.state_token(observation, hidden_BPW, prompt.state_BP)
        return Prefix(
            self,
            hidden_BPW,
            padding_mask_BP=None if bool(prompt.padding_mask_BP.all()) else prompt.padding_mask_BP.to(device),
            rotary=self.network.language_model.rotary_emb(hidden_BPW, position_3BP.to(device)),
            next_position_B=next_position_B.to(device),
            state_BS=observation.state_BS,
        )

    def positions(self, position_BT: Tensor) -> Tensor:
        """Words have the same time, height and width: (3, B, T)."""
        return position_BT.expand(3, -1, -1)

    @staticmethod
    def read_from(folder: Path) -> PromptReader:
        """See the base class."""
        return PromptReader.open(str(folder))
