"""What shows a language model images: a convolution stem learned from scratch, or a pretrained encoder of timm or transformers.

    vision="conv"                                             learned from scratch
    vision="timm:vit_small_patch14_dinov2.lvd142m"            any model of timm by name
    vision="transformers:google/siglip-base-patch16-256"      a folder or Hub name of a vision model, or of a pair with text

An encoder's grid of features is folded until every token covers one cell of the image: with patches of 16 pixels and cells of
64, four by four features side by side become one token (the "pixel shuffle" of SmolVLM).

Shape letters: I images, H height, W width, V tokens of an image, N features of an image, F numbers of a feature.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlaflow.backbones.pretrained_processor import open_pretrained, read_settings
from vlaflow.backbones.tiny import ConvStem
from vlaflow.errors import ConfigError
from vlaflow.packages import require

CONV = "conv"
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class EncoderSpec:
    """A pretrained encoder without its weights, as checkpoints record it.

    Args:
        library: that builds it.
        name: of the model in timm, or of its type in transformers.
        architecture: transformers' config of it as JSON data; empty for timm, where the name says everything.
        mean, std: of the images it was trained on, per colour in [0, 1].
    """

    library: Literal["timm", "transformers"]
    name: str
    architecture: dict[str, Any] = field(default_factory=dict, repr=False)
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF


class ScratchVision(nn.Module):
    """Convolutions learned from scratch; ``cell`` is a power of two from 4 on."""

    def __init__(self, cell: int, width: int) -> None:
        super().__init__()
        self.stem = ConvStem(cell, width)

    def forward(self, image_IHW3: Tensor) -> Tensor:
        """uint8 images (I, H, W, 3) → (I, V, width)."""
        return self.stem(image_IHW3)

    @property
    def blocks(self) -> Iterable[nn.Module]:
        """None to shard: it is small."""
        return ()


class PretrainedVision(nn.Module):
    """A pretrained encoder, its features folded to one token per cell and projected.

    Args:
        network: of timm or transformers.
        spec: what it is.
        size: side of the square images, in pixels.
        cell: side of the square that a token covers, in pixels.
        width: of a token.

    Raises:
        ConfigError: it reads no images of this size, or its grid of features cannot be folded to cells.
    """

    def __init__(self, network: Any, spec: EncoderSpec, *, size: int, cell: int, width: int) -> None:
        super().__init__()
        self.network, self._spec = network, spec
        for name in ("head", "pooler"):  # of the whole image, which nothing reads
            if isinstance(unused := getattr(network, name, None), nn.Module):
                unused.requires_grad_(False)
        first = next(network.parameters())
        try:
            with torch.no_grad():
                feature_INF = self._features(first.new_zeros(1, 3, size, size))
        except (AssertionError, RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"The vision encoder '{spec.name}' reads no images of {size} × {size} pixels ({reason}). "
                "Set image_size to its own."
            ) from error
        side, tokens = math.isqrt(feature_INF.shape[1]), size // cell
        if side % tokens:
            raise ConfigError(
                f"The vision encoder '{spec.name}' makes {side} × {side} features of an image, which cannot be folded to "
                f"{tokens} × {tokens} tokens. Set cell to image_size divided by a divisor of {side}."
            )
        self.fold = side // tokens
        self.project = nn.Linear(feature_INF.shape[2] * self.fold**2, width, dtype=first.dtype)

    def forward(self, image_IHW3: Tensor) -> Tensor:
        """uint8 images (I, H, W, 3) → (I, V, width)."""
        image_I3HW = image_IHW3.permute(0, 3, 1, 2).to(self.project.weight.dtype) / 255
        mean, std = (image_I3HW.new_tensor(values)[:, None, None] for values in (self._spec.mean, self._spec.std))
        feature_INF = self._features((image_I3HW - mean) / std)
        images, count, numbers = feature_INF.shape
        side, fold = math.isqrt(count), self.fold
        square = feature_INF.view(images, side // fold, fold, side // fold, fold, numbers)
        return self.project(square.transpose(2, 3).reshape(images, -1, numbers * fold**2))

    def _features(self, image_I3HW: Tensor) -> Tensor:
        """Its last features, row by row; tokens that have no place in the image come first and are left out."""
        if self._spec.library == "timm":
            found = self.network.forward_features(image_I3HW)
            if found.ndim == 4:  # a convolutional network's channels are the second dimension, Swin's the last
                found = found.flatten(2).mT if found.shape[1] == self.network.num_features else found.flatten(1, 2)
        else:
            found = self.network(pixel_values=image_I3HW).last_hidden_state
        return found[:, found.shape[1] - math.isqrt(found.shape[1]) ** 2 :]

    @property
    def blocks(self) -> Iterable[nn.Module]:
        """Its layers, where it has layers that are alike."""
        lists = [part for part in self.network.modules() if isinstance(part, nn.ModuleList | nn.Sequential)]
        longest = max(lists, key=len, default=())
        kinds = {type(part) for part in longest}
        return tuple(longest) if len(kinds) == 1 and kinds != {nn.Linear} else ()


def vision_packages(vision: str) -> tuple[str, ...]:
    """What an encoder needs besides transformers."""
    return ("timm",) if vision.startswith("timm:") else ()


def open_encoder(vision: str, spec: EncoderSpec | None, hub: ModuleType, dtype: torch.dtype) -> tuple[Any, EncoderSpec]:
    """A vision encoder and what it is.

    Args:
        vision: "timm:NAME" or "transformers:SOURCE"; where it is opened from.
        spec: build this one with random weights instead, to be filled from a checkpoint.
        hub: the transformers package.
        dtype: of its weights.

    Raises:
        ConfigError: there is no such encoder.
        CapabilityError: timm is not installed.
    """
    library, _, source = vision.partition(":")
    if library == "timm" and source:
        require("timm", what=f"The vision encoder '{source}'")
        return _timm(source, spec, dtype)
    if library == "transformers" and source:
        return _transformers(source, spec, hub, dtype)
    raise ConfigError(f"vision is '{CONV}', 'timm:NAME' or 'transformers:FOLDER-OR-HUB-NAME', got '{vision}'.")


def _timm(name: str, spec: EncoderSpec | None, dtype: torch.dtype) -> tuple[Any, EncoderSpec]:
    timm = import_module("timm")
    try:
        network = timm.create_model(name, pretrained=spec is None, num_classes=0).to(dtype)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"'{name}' is no model of timm that can be opened: {reason}") from error
    known = network.pretrained_cfg
    return network, spec or EncoderSpec("timm", name, {}, tuple(known["mean"]), tuple(known["std"]))


def _transformers(source: str, spec: EncoderSpec | None, hub: ModuleType, dtype: torch.dtype) -> tuple[Any, EncoderSpec]:
    if spec is not None:
        network = hub.AutoModel.from_config(hub.AutoConfig.for_model(spec.name, **spec.architecture), dtype=dtype)
        return _vision_part(network), spec
    network = open_pretrained(hub.AutoModel, source, "vision model", dtype=dtype, use_safetensors=True)
    network = _vision_part(network)
    config = network.config
    if not hasattr(config, "patch_size") and not hasattr(config, "num_channels"):
        raise ConfigError(f"'{source}' is a model of type {config.model_type}, which reads no images.")
    settings = read_settings(hub.BaseImageProcessor.get_image_processor_dict, source, "vision model")
    mean, std = (tuple(settings.get(key, HALF)) for key in ("image_mean", "image_std"))
    dropped = ("transformers_version", "dtype", "architectures", "model_type", "_name_or_path")
    architecture = {key: value for key, value in config.to_diff_dict().items() if key not in dropped}
    return network, EncoderSpec("transformers", config.model_type, architecture, mean, std)


def _vision_part(network: Any) -> Any:
    """The encoder of images alone, where there is one of text as well."""
    return getattr(network, "vision_model", network)
