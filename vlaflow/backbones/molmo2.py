"""Molmo2 as a backbone: its own tokenizer, chat template, vision tower, pooling adapter and language layers.

A1 stands on the first Molmo (Molmo-7B-D), which transformers does not have: its published code would have to be run from the
Hub, which we never do. Molmo2 is native, of the same makers and the same kind (vision tower, pooled patches, a Qwen language
model), so it takes its place; docs/decisions/008 says what differs.

Text is causal; the tokens of all images see each other, as in pretraining. Layers and files are those of every pretrained
backbone (``pretrained``).

Shape letters: B batch, P prefix tokens, T suffix tokens, W width, S state dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from vlaflow.backbones.inputs import Inputs
from vlaflow.backbones.molmo2_processor import FAMILY, NAME, ImagePatches, MolmoProcessor, MolmoReader
from vlaflow.backbones.pretrained import PretrainedBackbone, PretrainedConfig
from vlaflow.backbones.pretrained_processor import open_reader
from vlaflow.errors import ConfigError
from vlaflow.nn.attention import causal_mask


def molmo2_8b() -> dict[str, Any]:
    """The architecture of Molmo2-8B, 8.66 B parameters, for networks without pretrained weights (and for counting)."""
    return {
        "text_config": {
            "hidden_size": 4096,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 12288,
            "vocab_size": 151936,
        },
        "vision_config": {"hidden_size": 1152, "num_hidden_layers": 25, "intermediate_size": 4304},
        "adapter_config": {"text_hidden_size": 4096, "intermediate_size": 12288},
    }


@dataclass(frozen=True)
class MolmoConfig(PretrainedConfig):
    """The Molmo2 backbone.

    Args:
        state_dim, views, source, architecture, dtype, recompute: see ``PretrainedConfig``; the user turn shows the views.
        padded_state: state dimensions the network sees, zero beyond S.
        state_token: a token that stands for the state in the user turn, one that no instruction uses; None leaves the state
            to the action expert (A1 with flow matching).
        attention: which prefix tokens see each other: "causal", images apart, as pretrained; or "full" (A1 with regression).
    """

    padded_state: int = 32
    state_token: str | None = "<|vision_pad|>"  # noqa: S105
    attention: Literal["full", "causal"] = "causal"

    name: ClassVar[str] = NAME
    family: ClassVar[str] = FAMILY
    model_class: ClassVar[str] = "Molmo2ForConditionalGeneration"
    published: ClassVar[Mapping[str, Callable[[], dict[str, Any]]]] = {"allenai/Molmo2-8B": molmo2_8b}

    def build(self) -> MolmoBackbone:
        """See the base class."""
        return MolmoBackbone(self)

    def processor(self, folder: Path | None = None) -> MolmoProcessor:
        """See the base class."""
        reader = open_reader(MolmoReader, self.source, folder)
        return MolmoProcessor(reader, self.views, self.state_dim, state_token=self.state_token)

    def image_tokens(self, side: int) -> int:
        """See the base class; every row ends with a token of its own, and two enclose the picture."""
        rows, columns = ImagePatches().grid
        return rows * (columns + 1) + 2

    @property
    def state_width(self) -> int:
        """See the base class."""
        return self.padded_state

    @property
    def prefix_attention(self) -> Literal["full", "causal"]:
        """See the base class."""
        return self.attention


class MolmoBackbone(PretrainedBackbone):
    """See the module text. ``network`` is transformers' ``Molmo2Model``.

    Raises:
        ConfigError: for the Olmo-based sizes, whose layers normalise elsewhere, and for scaled rotary positions.
    """

    def __init__(self, config: MolmoConfig) -> None:
        super().__init__(config)
        text = self.language.config
        if text.qk_norm_type != "qwen3" or text.norm_after or text.rope_parameters["rope_type"] != "default":
            raise ConfigError(f"Of the {NAME} models those on Qwen3 can be run layer by layer (4B, 8B), not this one.")
        if config.recompute:
            self.network.vision_tower.activation_checkpointing_enable()

    @property
    def vision_blocks(self) -> Iterable[nn.Module]:
        """See the base class."""
        return self.network.vision_tower.layers

    def embed_prompt(self, inputs: Inputs) -> Tensor:
        """See the base class; image features are added to the placeholder's embedding."""
        hidden_BPW = self.embed_ids(inputs.id_BP)
        if inputs.patches is None or inputs.pooled_VK is None or inputs.image_BP is None:
            return hidden_BPW
        image_VW = self._pool(inputs.patches, inputs.pooled_VK).to(hidden_BPW.dtype)
        return hidden_BPW + torch.zeros_like(hidden_BPW).masked_scatter(inputs.image_BP[..., None], image_VW)

    def _pool(self, patches_INC: Tensor, pooled_VK: Tensor) -> Tensor:
        """Features of image tokens (V, W). transformers' own adapter drops tokens without a patch, which never are, and has the
        host wait for the device to find them.
        """
        states = self.network.vision_tower(patches_INC, output_hidden_states=True).hidden_states
        layers = self.network.config.adapter_config.vision_feature_layer
        feature_PF = torch.cat([states[i + 1 if i >= 0 else i] for i in layers], -1).flatten(0, 1)
        there_VK, adapter = pooled_VK >= 0, self.network.multi_modal_projector
        patch_VKF = feature_PF[pooled_VK.clamp(min=0)] * there_VK[..., None].to(feature_PF.dtype)
        mean_V1F = patch_VKF.sum(1, keepdim=True) / there_VK.float().sum(1)[:, None, None].to(patch_VKF.dtype)
        pooled_V1F, _ = adapter.image_pooling_2d(mean_V1F, patch_VKF, attention_mask=there_VK[:, None, None])
        return adapter.image_projector(pooled_V1F[:, 0])

    def prefix_mask(self, inputs: Inputs) -> Tensor | None:
        """Causal, but the tokens of all images see each other; None where all tokens do."""
        if self.spec.attention == "full":
            return None
        assert inputs.image_P is not None
        image_P = inputs.image_P
        return causal_mask(len(image_P), image_P.device) | (image_P[:, None] & image_P)
