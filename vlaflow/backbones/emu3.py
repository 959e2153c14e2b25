"""Emu3 as a backbone: images are discrete tokens like words, so one transformer reads everything (UniVLA, UD-VLA, DFM-VLA).

A frozen VQ model turns every 8 × 8 pixels into one of 32 768 codes; its decoder, which would paint images, is not kept. By
default all prefix tokens see each other, as DFM-VLA says; "causal" is how the model was pretrained. The dropout that the
published config has in its layers is not applied. Layers and files are those of every pretrained backbone (``pretrained``).

Shape letters: B batch, P prefix tokens, T suffix tokens, W width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vlaflow.backbones.base import BackboneConfig, BackboneSpec, Prefix
from vlaflow.backbones.emu3_prompt import NAME, EmuReader
from vlaflow.backbones.pretrained import PretrainedBackbone, plain_architecture
from vlaflow.backbones.pretrained_prompt import open_pretrained, transformers_library
from vlaflow.data.batch import ObservationBatch
from vlaflow.errors import ConfigError


def emu3_8b() -> dict[str, Any]:
    """The architecture of Emu3, 8.49 B parameters, for networks without pretrained weights (and for counting)."""
    return {
        "text_config": {
            "vocab_size": 184622,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
        "vq_config": {},
    }


@dataclass(frozen=True)
class EmuConfig(BackboneConfig):
    """The Emu3 backbone.

    Args:
        state_dim: length of the proprioceptive state, S, which is checked and not read.
        views: camera views of one size, in the order of their tokens.
        source: local folder or Hub name of a pretrained model to start from; None when ``architecture`` is given.
        architecture: transformers' text and VQ config as JSON data, for random weights or those of a checkpoint.
        pixels: area that an image is resized to, its shape kept; 200 × 200 (UniVLA) are 25 × 26 tokens.
        attention: which prefix tokens see each other: "full", or "causal".
        dtype: of the pretrained parts. Train in float32 under bf16 autocast; bfloat16 halves the memory of serving.
        recompute: forget activations in training and compute them again, layer by layer (less memory, a third more time).
    """

    state_dim: int
    views: tuple[str, ...]
    source: str | None = None
    architecture: dict[str, Any] | None = field(default=None, repr=False)
    pixels: int = 200 * 200
    attention: Literal["full", "causal"] = "full"
    dtype: Literal["float32", "bfloat16"] = "float32"
    recompute: bool = False

    def __post_init__(self) -> None:
        if (self.source is None) == (self.architecture is None):
            raise ConfigError("An Emu3 backbone needs either 'source' (a folder or Hub name) or 'architecture'.")
        if len(set(self.views)) != len(self.views):
            raise ConfigError(f"Camera views must differ, got {list(self.views)}.")
        if self.pixels < 64:
            raise ConfigError(f"An image needs at least one code of 8 × 8 pixels, got {self.pixels} pixels.")

    def build(self) -> EmuBackbone:
        """The network: pretrained where ``source`` is given, else random, to be filled from a checkpoint."""
        return EmuBackbone(self)

    @property
    def can_answer(self) -> bool:
        """The published model's head."""
        return True


class EmuBackbone(PretrainedBackbone):
    """See the module text. ``network`` is transformers' ``Emu3Model`` without the part that paints images."""

    def __init__(self, config: EmuConfig) -> None:
        super().__init__()
        hub, dtype = transformers_library(NAME), getattr(torch, config.dtype)
        self.name, self.reader = NAME, None
        if config.source is not None:
            kind = hub.Emu3ForConditionalGeneration
            full = open_pretrained(kind, config.source, NAME, dtype=dtype, use_safetensors=True)
            self.reader = EmuReader.open(config.source)
            kept = {key: getattr(full.config, key).to_diff_dict() for key in ("text_config", "vq_config")}
            config = replace(config, source=None, architecture=plain_architecture(kept))
        else:
            # The map of 32 768 codes to ids, which would fill config.json, is read off the tokenizer instead.
            architecture = hub.Emu3Config(**(config.architecture or {}), vocabulary_map={})
            full = hub.AutoModelForImageTextToText.from_config(architecture, dtype=dtype)
        self.config = config
        self.network, self.head = full.model, full.lm_head
        self.network.vqmodel.requires_grad_(False)
        del self.network.vqmodel.decoder, self.network.vqmodel.post_quant_conv
        text = full.config.text_config
        heads, width = text.num_attention_heads, text.hidden_size
        self.spec = BackboneSpec(
            text.num_hidden_layers,
            width,
            heads,
            text.num_key_value_heads,
            width // heads,
            attention=config.attention,
            state_dim=config.state_dim,
            rotary=True,
        )
        self._rotate = hub.models.emu3.modeling_emu3.apply_rotary_pos_emb

    @property
    def language(self) -> Any:
        """See the base class."""
        return self.network.text_model

    @property
    def views(self) -> Mapping[str, int | None]:
        """Views of any size; the image processor resizes them by area."""
        return dict.fromkeys(self.config.views)

    def embed(self, observation: ObservationBatch) -> Prefix:
        """See the base class. The image tokenizer runs here, once for all views of all observations.

        Raises:
            SpecError: for a state of another length, or an instruction with one of the tokenizer's own tokens.
            CapabilityError: for a network that has neither been given a ``source`` nor opened from a checkpoint.
        """
        self.check_state(observation)
        prompt, table = self.reading().read(observation, self.config), self.language.embed_tokens
        device, id_BP = table.weight.device, prompt.id_BP
        if prompt.pixels_I3HW is not None:
            code_IHW = self._codes(prompt.pixels_I3HW.to(device)).to(id_BP.device)
            id_BP = id_BP.masked_scatter(prompt.image_BP, self.reading().codes(code_IHW))
        hidden_BPW = table(id_BP.to(device))
        position_BP = torch.arange(hidden_BPW.shape[1], device=device)[None].expand(len(observation), -1)
        return Prefix(
            self,
            hidden_BPW,
            padding_mask_BP=None if bool(prompt.padding_mask_BP.all()) else prompt.padding_mask_BP.to(device),
            rotary=self.language.rotary_emb(hidden_BPW, position_BP),
            next_position_B=prompt.padding_mask_BP.sum(1).to(device),
            state_BS=observation.state_BS,
        )

    @torch.no_grad()
    def _codes(self, pixels_I3HW: Tensor) -> Tensor:
        """Codes (I, H/8, W/8) of images of one size."""
        vq = self.network.vqmodel.eval()
        sizes = torch.tensor([pixels_I3HW.shape[2:]] * len(pixels_I3HW))
        return torch.stack(tuple(vq.encode(pixels_I3HW, sizes, return_dict=True).image_tokens)).long()

    def positions(self, position_BT: Tensor) -> Tensor:
        """As they are."""
        return position_BT

    @staticmethod
    def read_from(folder: Path) -> EmuReader:
        """See the base class."""
        return EmuReader.open(str(folder))
