"""Emu3 as a backbone: images are discrete tokens like words, so one transformer reads everything (UniVLA, UD-VLA, DFM-VLA).

A frozen VQ model turns every 8 × 8 pixels into one of 32 768 codes; its decoder, which would paint images, is not kept. By
default all prefix tokens see each other, as DFM-VLA says; "causal" is how the model was pretrained. The dropout that the
published config has in its layers is not applied. Layers and files are those of every pretrained backbone (``pretrained``).

Shape letters: B batch, P prefix tokens, T suffix tokens, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from vlaflow.backbones.base import InputSize
from vlaflow.backbones.emu3_language import open_with_language
from vlaflow.backbones.emu3_processor import FAMILY, NAME, EmuProcessor, EmuReader
from vlaflow.backbones.inputs import Inputs
from vlaflow.backbones.pretrained import PretrainedBackbone, PretrainedConfig, plain_architecture
from vlaflow.backbones.pretrained_processor import open_reader
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
class EmuConfig(PretrainedConfig):
    """The Emu3 backbone.

    Args:
        state_dim, views, source, architecture, dtype, recompute: see ``PretrainedConfig``; the state's length is checked and
            the state not read, the views have one size.
        pixels: area that an image is resized to, its shape kept; 200 × 200 (UniVLA) are 25 × 26 tokens.
        attention: which prefix tokens see each other: "full", or "causal".
        language: folder or Hub name of other weights of the language model, in the layout of Emu3's own code, such as UniVLA's;
            tokenizer and image tokenizer, which are the same for all of them, come from ``source``.
    """

    pixels: int = 200 * 200
    attention: Literal["full", "causal"] = "full"
    language: str | None = None

    name: ClassVar[str] = NAME
    family: ClassVar[str] = FAMILY
    model_class: ClassVar[str] = "Emu3ForConditionalGeneration"
    published: ClassVar[Mapping[str, Callable[[], dict[str, Any]]]] = {"Emu3-community/Emu3-Stage1-hf": emu3_8b}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pixels < 64:
            raise ConfigError(f"An image needs at least one code of 8 × 8 pixels, got {self.pixels} pixels.")

    def network(self, hub: ModuleType) -> Any:
        """See the base class; with other weights of the language model where ``language`` is given.

        Raises:
            ConfigError: it cannot be opened.
        """
        if self.language is None or self.source is None:
            return super().network(hub)
        kind = getattr(hub, self.model_class)
        return open_with_language(hub, kind, self.source, self.language, dtype=getattr(torch, self.dtype))

    def built(self, architecture: dict[str, Any]) -> Self:
        """See the base class."""
        return replace(self, source=None, architecture=architecture, language=None)

    def build(self) -> EmuBackbone:
        """See the base class."""
        return EmuBackbone(self)

    def processor(self, folder: Path | None = None) -> EmuProcessor:
        """See the base class."""
        reader = open_reader(EmuReader, self.source, folder)
        return EmuProcessor(reader, self.views, self.state_dim, pixels=self.pixels)

    def image_tokens(self, side: int) -> int:
        """See the base class; every row of codes ends with a token of its own."""
        codes = round(self.pixels**0.5 / 8)
        return codes * (codes + 1)

    @property
    def input_size(self) -> InputSize:
        """Of any shape."""
        return InputSize(area=self.pixels)

    @property
    def prefix_attention(self) -> Literal["full", "causal"]:
        """See the base class."""
        return self.attention

    @property
    def transformers_options(self) -> Mapping[str, Any]:
        """The map of 32 768 codes to ids, which would fill config.json, is read off the tokenizer instead."""
        return {"vocabulary_map": {}}


class EmuBackbone(PretrainedBackbone):
    """See the module text. ``network`` is transformers' ``Emu3Model`` without the part that paints images."""

    def __init__(self, config: EmuConfig) -> None:
        super().__init__(config)
        self.network.vqmodel.requires_grad_(False)
        del self.network.vqmodel.decoder, self.network.vqmodel.post_quant_conv

    @staticmethod
    def architecture_of(config: Any) -> dict[str, Any]:
        """See the base class; without the map of codes to ids."""
        return plain_architecture({key: getattr(config, key).to_diff_dict() for key in ("text_config", "vq_config")})

    @property
    def language(self) -> Any:
        """See the base class."""
        return self.network.text_model

    def embed_prompt(self, inputs: Inputs) -> Tensor:
        """See the base class; the ids in the images' places are those of the first code."""
        id_BP = inputs.id_BP
        if inputs.patches is not None and inputs.image_BP is not None:
            id_BP = id_BP + torch.zeros_like(id_BP).masked_scatter(inputs.image_BP, self.codes(inputs.patches))
        return self.embed_ids(id_BP)

    @torch.no_grad()
    def codes(self, pixels_I3HW: Tensor) -> Tensor:
        """Codes (I, H/8, W/8) of images of one size."""
        vq = self.network.vqmodel.eval()
        sizes = torch.tensor([pixels_I3HW.shape[2:]] * len(pixels_I3HW))
        return torch.stack(tuple(vq.encode(pixels_I3HW, sizes, return_dict=True).image_tokens)).long()
