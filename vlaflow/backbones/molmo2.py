"""Molmo2 as a backbone: its own tokenizer, chat template, vision tower, pooling adapter and language layers.

A1 stands on the first Molmo (Molmo-7B-D), which transformers does not have: its published code would have to be run from the
Hub, which we never do. Molmo2 is native, of the same makers and the same kind (vision tower, pooled patches, a Qwen language
model), so it takes its place; docs/decisions/008 says what differs.

Text is causal; the tokens of all images see each other, as in pretraining. Layers and files are those of every pretrained
backbone (``pretrained``).

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
from vlaflow.backbones.molmo2_prompt import NAME, MolmoReader
from vlaflow.backbones.pretrained import PretrainedBackbone, plain_architecture
from vlaflow.backbones.pretrained_prompt import open_pretrained, transformers_library
from vlaflow.data.batch import ObservationBatch
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
class MolmoConfig(BackboneConfig):
    """The Molmo2 backbone.

    Args:
        state_dim: length of the proprioceptive state, S.
        views: camera views, any number, in the order in which the user turn shows them.
        source: local folder or Hub name of a pretrained model to start from; None when ``architecture`` is given.
        architecture: transformers' configs as JSON data, for random weights or those of a checkpoint.
        padded_state: state dimensions the network sees, zero beyond S.
        state_token: a token that stands for the state in the user turn, one that no instruction uses; None leaves the state
            to the action expert (A1 with flow matching).
        dtype: of the pretrained parts. Train in float32 under bf16 autocast; bfloat16 halves the memory of serving.
        recompute: forget activations in training and compute them again, layer by layer (less memory, a third more time).
    """

    state_dim: int
    views: tuple[str, ...]
    source: str | None = None
    architecture: dict[str, Any] | None = field(default=None, repr=False)
    padded_state: int = 32
    state_token: str | None = "<|vision_pad|>"  # noqa: S105
    dtype: Literal["float32", "bfloat16"] = "float32"
    recompute: bool = False

    def __post_init__(self) -> None:
        if (self.source is None) == (self.architecture is None):
            raise ConfigError("A Molmo2 backbone needs either 'source' (a folder or Hub name) or 'architecture'.")
        if len(set(self.views)) != len(self.views):
            raise ConfigError(f"Camera views must differ, got {list(self.views)}.")
        if self.state_dim > self.padded_state:
            raise ConfigError(f"padded_state {self.padded_state} is smaller than state_dim {self.state_dim}; raise it.")

    def build(self) -> MolmoBackbone:
        """The network: pretrained where ``source`` is given, else random, to be filled from a checkpoint."""
        return MolmoBackbone(self)

    @property
    def can_answer(self) -> bool:
        """The published model's head."""
        return True


class MolmoBackbone(PretrainedBackbone):
    """See the module text. ``network`` is transformers' ``Molmo2Model``.

    Raises:
        ConfigError: for the Olmo-based sizes, whose layers normalise elsewhere, and for scaled rotary positions.
    """

    def __init__(self, config: MolmoConfig) -> None:
        super().__init__()
        hub, dtype = transformers_library(NAME), getattr(torch, config.dtype)
        self.name, self.reader = NAME, None
        if config.source is not None:
            kind = hub.Molmo2ForConditionalGeneration
            full = open_pretrained(kind, config.source, NAME, dtype=dtype, use_safetensors=True)
            self.reader = MolmoReader.open(config.source)
            config = replace(config, source=None, architecture=plain_architecture(full.config.to_diff_dict()))
        else:
            full = hub.AutoModelForImageTextToText.from_config(hub.Molmo2Config(**(config.architecture or {})), dtype=dtype)
        self.config = config
        self.network, self.head = full.model, full.lm_head
        text = full.config.text_config
        if text.qk_norm_type != "qwen3" or text.norm_after or text.rope_parameters["rope_type"] != "default":
            raise ConfigError(f"Of the {NAME} models those on Qwen3 can be run layer by layer (4B, 8B), not this one.")
        self.spec = BackboneSpec(
            text.num_hidden_layers,
            text.hidden_size,
            text.num_attention_heads,
            text.num_key_value_heads,
            text.head_dim,
            attention="causal",
            state_dim=config.state_dim,
            rotary=True,
        )
        self.state = nn.Linear(config.padded_state, text.hidden_size)
        self._rotate = hub.models.molmo2.modeling_molmo2.apply_rotary_pos_emb
        if config.recompute:
            self.network.vision_tower.gradient_checkpointing_enable()

    @property
    def views(self) -> Mapping[str, int | None]:
        """Views of any size; the reader resizes them."""
        return dict.fromkeys(self.config.views)

    def embed(self, observation: ObservationBatch) -> Prefix:
        """See the base class. The vision tower runs here, once for all views of all observations.

        Raises:
            SpecError: for a state of another length, or an instruction with one of the tokenizer's own tokens.
            CapabilityError: for a network that has neither been given a ``source`` nor opened from a checkpoint.
        """
        prompt, table = self.reading().read(observation, self.config), self.language.embed_tokens
        device = table.weight.device
        hidden_BPW = table(prompt.id_BP.to(device))
        if prompt.patches_INC is not None and prompt.pooled_VK is not None:
            rows, columns = self.reading().pictures.grid
            grid_I4 = torch.tensor([[rows, columns, 0, 0]], device=device).expand(len(prompt.patches_INC), -1)
            features = self.network.get_image_features(
                prompt.patches_INC.to(device), prompt.pooled_VK.to(device), grid_I4, return_dict=True
            )
            image_VW = torch.cat(tuple(features.pooler_output)).to(hidden_BPW.dtype)
            there_BP1 = prompt.patch_BP[..., None].to(device)  # features are added to the placeholder's embedding
            hidden_BPW = hidden_BPW + torch.zeros_like(hidden_BPW).masked_scatter(there_BP1, image_VW)
        if self.config.state_token is not None:
            hidden_BPW = self.state_token(observation, hidden_BPW, prompt.state_BP)
        position_BP = torch.arange(hidden_BPW.shape[1], device=device)[None].expand(len(observation), -1)
        picture_P = prompt.picture_BP[0].to(device)
        return Prefix(
            self,
            hidden_BPW,
            padding_mask_BP=None if bool(prompt.padding_mask_BP.all()) else prompt.padding_mask_BP.to(device),
            rotary=self.language.rotary_emb(hidden_BPW, position_BP),
            next_position_B=prompt.padding_mask_BP.sum(1).to(device),
            state_BS=observation.state_BS,
            mask_PP=causal_mask(len(picture_P), device) | (picture_P[:, None] & picture_P),
        )

    def positions(self, position_BT: Tensor) -> Tensor:
        """As they are."""
        return position_BT

    @staticmethod
    def read_from(folder: Path) -> MolmoReader:
        """See the base class."""
        return MolmoReader.open(str(folder))
