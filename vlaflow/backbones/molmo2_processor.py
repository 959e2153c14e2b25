"""What Molmo2 reads: an observation as a conversation of token ids and image patches, by the model's own files.

Each image is shown once, resized to the vision tower's square (A1's crop mode "resize"); Molmo2's additional high-resolution
crops, made for documents, would multiply the tokens of a control step.

Shape letters: B batch, P prompt tokens, I images, N patches of an image, C numbers of a patch, K patches pooled to a token,
V image tokens of all images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional

from vlaflow.backbones.inputs import Inputs, hide_images, shown_views
from vlaflow.backbones.pretrained_processor import (
    ChatProcessor,
    Reader,
    open_pretrained,
    read_settings,
    require_chat_template,
    transformers_library,
    where,
)
from vlaflow.config import from_json, to_json
from vlaflow.data.batch import ObservationBatch
from vlaflow.errors import CapabilityError, ConfigError
from vlaflow.io import read_json
from vlaflow.outputs import write_json

NAME, FAMILY = "Molmo2", "molmo2"
SETTINGS = "vlaflow_molmo2.json"
PLACE, PATCH, COLUMN, START, END = "<|image|>", "<im_patch>", "<im_col>", "<low_res_im_start>", "<im_end>"
END_OF_TURN = "<|im_end|>"


@dataclass(frozen=True)
class ImagePatches:
    """How an image becomes patches, from the model's preprocessor_config.json and processor_config.json.

    Args:
        side: pixels of the square it is resized to.
        patch: pixels of a patch's side.
        pooling: rows and columns of patches that become one token.
        mean, std: of the normalisation, per colour.
        columns: a token ends every row of patches.
        own_start: the overview begins with a token of its own.
    """

    side: int = 378
    patch: int = 14
    pooling: tuple[int, int] = (2, 2)
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    columns: bool = True
    own_start: bool = True

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of image tokens."""
        patches = self.side // self.patch
        return -(-patches // self.pooling[0]), -(-patches // self.pooling[1])

    @property
    def words(self) -> str:
        """The tokens of one image."""
        rows, columns = self.grid
        row = PATCH * columns + (COLUMN if self.columns else "")
        return (START if self.own_start else "<im_start>") + row * rows + END

    def patches(self, images_IHW3: Tensor) -> Tensor:
        """uint8 images of one size to normalised patches (I, N, C), row by row, colours innermost."""
        image_I3HW = images_IHW3.permute(0, 3, 1, 2).float()
        if image_I3HW.shape[2:] != (self.side, self.side):
            image_I3HW = functional.interpolate(image_I3HW, (self.side, self.side), mode="bilinear", align_corners=False)
        mean, std = (torch.tensor(v)[:, None, None] for v in (self.mean, self.std))
        image_I3HW = (image_I3HW.round().clamp(0, 255) / 255 - mean) / std
        n, p = self.side // self.patch, self.patch
        return image_I3HW.view(-1, 3, n, p, n, p).permute(0, 2, 4, 3, 5, 1).reshape(len(images_IHW3), n * n, p * p * 3)

    def pooled(self, images: int) -> Tensor:
        """Which patches become each image token, (V, K) int64 into the patches of all images; −1 beyond the border."""
        n, (high, wide) = self.side // self.patch, self.pooling
        rows, columns = self.grid
        index = torch.arange(n * n).view(n, n)
        up, left = (rows * high - n) // 2, (columns * wide - n) // 2
        index = functional.pad(index, (left, columns * wide - n - left, up, rows * high - n - up), value=-1)
        one_VK = index.view(rows, high, columns, wide).transpose(1, 2).reshape(rows * columns, high * wide)
        offset_I11 = (torch.arange(images) * n * n)[:, None, None]
        return torch.where(one_VK >= 0, one_VK + offset_I11, -1).flatten(0, 1)


class MolmoReader(Reader):
    """Tokenizer, chat template and image settings of a Molmo2 folder.

    transformers' image processor for Molmo2 needs torchvision; ``ImagePatches`` makes the same overview without it.
    """

    image_processor: ImagePatches

    @classmethod
    def open(cls, source: str) -> Self:
        """From a published folder or Hub name, or from what ``save`` wrote.

        Raises:
            ConfigError: when there is no tokenizer, chat template or image settings.
        """
        hub = transformers_library(NAME, FAMILY)
        tokenizer = open_pretrained(hub.AutoTokenizer, source, NAME)
        known = Path(source) / SETTINGS
        settings: dict[str, Any] = {}
        if known.exists():
            image_processor = from_json(ImagePatches, read_json(known), str(known))
        else:
            settings = read_settings(hub.Molmo2Processor.get_processor_dict, source, NAME)
            image_processor = _image_patches(settings, source)
        require_chat_template(tokenizer, settings, source)
        return cls(tokenizer, image_processor)

    def save(self, folder: Path) -> None:
        """See the base class."""
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder, save_jinja_files=False)
        write_json(folder / SETTINGS, to_json(self.image_processor))

    @property
    def end(self) -> str:
        """See the base class."""
        return END_OF_TURN


class MolmoProcessor(ChatProcessor[MolmoReader]):
    """A user turn of images, state and lower-cased instruction, and the beginning of the assistant's turn (A1).

    Args:
        reader, views, state_dim, state_token: see ``ChatProcessor``.
    """

    def __init__(self, reader: MolmoReader | None, views: Sequence[str], state_dim: int, *, state_token: str | None) -> None:
        super().__init__(NAME, reader, views, state_dim, state_token=state_token)

    def conversation(self, sentence: str) -> str:
        """See the base class; with the tokens of every image in the place of its placeholder.

        Raises:
            ConfigError: for a template that makes no place for every image.
        """
        tokenizer, text = self.reader.tokenizer, super().conversation(sentence.lower())
        begin = tokenizer.bos_token or tokenizer.eos_token
        text = text if text.startswith(begin) else begin + text
        if text.count(PLACE) != len(self.views):
            raise ConfigError(f"The chat template makes {text.count(PLACE)} places for {len(self.views)} images.")
        return text.replace(PLACE, self.reader.image_processor.words)

    def read(self, observation: ObservationBatch) -> Inputs:
        """See the base class.

        Raises:
            CapabilityError: for a chat template that shows images after words.
        """
        reader = self.reader
        texts = [self.conversation(sentence) for sentence in observation.instructions]
        id_BP, padding_mask_BP, count_B = self.tokens(texts, add_special_tokens=False)
        image_BP = torch.zeros_like(id_BP, dtype=torch.bool)
        for token in (PATCH, COLUMN, START, "<im_start>", END):
            image_BP |= where(reader.tokenizer, id_BP, token)
        if not bool((image_BP == image_BP[:1]).all()):
            raise CapabilityError("This chat template shows images after words; Molmo2's own shows them first.")
        patches_INC = pooled_VK = None
        if self.views:
            count_V = image_BP[0].sum().expand(len(self.views)) // len(self.views)
            padding_mask_BP = hide_images(padding_mask_BP, image_BP, count_V, shown_views(observation, self.views))
            sides = torch.stack([reader.image_processor.patches(observation.images[view]) for view in self.views], 1)
            patches_INC = sides.flatten(0, 1)
            pooled_VK = reader.image_processor.pooled(len(patches_INC))
        return Inputs(
            state_BS=observation.state_BS,
            id_BP=id_BP,
            padding_mask_BP=padding_mask_BP,
            patches=patches_INC,
            pooled_VK=pooled_VK,
            image_BP=where(reader.tokenizer, id_BP, PATCH),
            state_BP=self.state_places(id_BP),
            image_P=image_BP[0],
            next_position_B=count_B,
        )


def _image_patches(settings: dict[str, Any], source: str) -> ImagePatches:
    inner = settings.get("image_processor")
    own = inner if isinstance(inner, dict) else _image_settings(source)
    size = own.get("size", {"height": ImagePatches.side})
    columns = settings.get("use_single_crop_col_tokens")
    return ImagePatches(
        side=size["height"],
        patch=own.get("patch_size", ImagePatches.patch),
        pooling=tuple(own.get("pooling_size", ImagePatches.pooling)),
        mean=tuple(own.get("image_mean", ImagePatches.mean)),
        std=tuple(own.get("image_std", ImagePatches.std)),
        columns=settings.get("image_use_col_tokens", True) if columns is None else columns,
        own_start=settings.get("use_single_crop_start_token", True),
    )


def _image_settings(source: str) -> dict[str, Any]:
    return read_settings(transformers_library(NAME, FAMILY).ImageProcessingMixin.get_image_processor_dict, source, NAME)
