"""What Qwen2.5-VL reads: an observation as a conversation of token ids and image patches, by the model's own files.

Shape letters: B batch, P prompt tokens, I images, N patches and V image tokens of all images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

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
from vlaflow.data.batch import ObservationBatch

NAME, FAMILY = "Qwen2.5-VL", "qwen2_5_vl"
IMAGE_TOKEN = "<|image_pad|>"  # noqa: S105


class QwenReader(Reader):
    """Tokenizer, chat template and image processor of a Qwen2.5-VL folder.

    transformers' own ``Qwen2_5_VLProcessor`` joins these with a video processor that needs torchvision; a policy has no
    use for it. Images are always resized by Pillow, so a checkpoint sees the same pixels on every machine.
    """

    @classmethod
    def open(cls, source: str) -> Self:
        """See the base class.

        Raises:
            ConfigError: when there is no tokenizer, image processor or chat template.
        """
        hub = transformers_library(NAME, FAMILY)
        tokenizer = open_pretrained(hub.AutoTokenizer, source, NAME)
        image_processor = open_pretrained(hub.AutoImageProcessor, source, NAME, backend="pil")
        settings = read_settings(hub.Qwen2_5_VLProcessor.get_processor_dict, source, NAME)
        require_chat_template(tokenizer, settings, source)
        return cls(tokenizer, image_processor)

    def save(self, folder: Path) -> None:
        """See the base class."""
        self.image_processor.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder, save_jinja_files=False)

    @property
    def end(self) -> str:
        """See the base class."""
        return "<|im_end|>"


class QwenProcessor(ChatProcessor[QwenReader]):
    """A system turn, a user turn of images, state and instruction, and the beginning of the assistant's turn.

    Args:
        reader, views, state_dim, state_token, system: see ``ChatProcessor``.
        pixels: smallest and largest area that an image is resized to, its shape kept.
    """

    def __init__(
        self,
        reader: QwenReader | None,
        views: Sequence[str],
        state_dim: int,
        *,
        pixels: tuple[int, int],
        state_token: str,
        system: str,
    ) -> None:
        super().__init__(NAME, reader, views, state_dim, state_token=state_token, system=system)
        self.size = {"shortest_edge": pixels[0], "longest_edge": pixels[1]}

    def read(self, observation: ObservationBatch) -> Inputs:
        """See the base class."""
        reader = self.reader
        merge, texts = reader.image_processor.merge_size, [self.conversation(s) for s in observation.instructions]
        grid_I3 = patches = patch_position_N2 = count_V = None
        if self.views:
            sides = [observation.images[view].numpy() for view in self.views]
            images = [side[i] for i in range(len(observation)) for side in sides]
            found = reader.image_processor(images, size=self.size, input_data_format="channels_last", return_tensors="pt")
            patches, grid_I3 = found["pixel_values"], found["image_grid_thw"]
            patch_position_N2 = patch_positions(grid_I3, merge)
            count_I = grid_I3.prod(1) // merge**2
            counts, count_V = iter(count_I.tolist()), count_I[: len(self.views)]
            texts = [_spread(text, counts) for text in texts]
        id_BP, padding_mask_BP, _ = self.tokens(texts)
        image_BP = where(reader.tokenizer, id_BP, IMAGE_TOKEN)
        position_3BP = token_positions(image_BP, None if grid_I3 is None else grid_I3[:, 1:] // merge)
        if padding_mask_BP is not None:
            position_3BP = position_3BP.masked_fill(~padding_mask_BP, 0)
        if count_V is not None:
            padding_mask_BP = hide_images(padding_mask_BP, image_BP, count_V, shown_views(observation, self.views))
        return Inputs(
            state_BS=observation.state_BS,
            id_BP=id_BP,
            padding_mask_BP=padding_mask_BP,
            patches=patches,
            grid_I3=grid_I3,
            patch_position_N2=patch_position_N2,
            image_BP=image_BP,
            state_BP=self.state_places(id_BP),
            position_3BP=position_3BP,
            next_position_B=position_3BP.amax((0, 2)) + 1,
        )


def token_positions(image_BP: Tensor, size_I2: Tensor | None) -> Tensor:
    """Time, height and width of every token, int64 (3, B, P), as the model was pretrained.

    Words count on in all three. The tokens of an image share the time at which it begins, their height and width count its
    rows and columns from there, and what follows goes on behind the larger of the two.

    Args:
        image_BP: bool, tokens of images; those of one image stand together, row by row, and images never touch.
        size_I2: int64, rows and columns of tokens of every image of the batch; None without any.
    """
    batch, length = image_BP.shape
    if size_I2 is None or not len(size_I2):
        return torch.arange(length).expand(3, batch, -1)
    first_BP = image_BP & ~functional.pad(image_BP, (1, 0))[:, :-1]
    # Every word is one step; an image is as many steps as its longer side, all taken where it begins.
    step_BP = (~image_BP).long()
    step_BP[first_BP] = size_I2.amax(1)
    begin_BP = step_BP.cumsum(1) - step_BP
    # Of every image token: the image it belongs to, where that begins, and its place within it.
    image_V = first_BP.flatten().cumsum(0)[image_BP.flatten()] - 1
    start_V = begin_BP[first_BP][image_V]
    place_V = image_BP.flatten().nonzero()[:, 0] - first_BP.flatten().nonzero()[:, 0][image_V]
    columns_V = size_I2[image_V, 1]
    position_3BP = begin_BP.expand(3, -1, -1).clone()
    position_3BP[:, image_BP] = start_V + torch.stack((0 * place_V, place_V // columns_V, place_V % columns_V))
    return position_3BP


def patch_positions(grid_I3: Tensor, merge: int) -> Tensor:
    """Row and column of every patch, int64 (N, 2), in the order of the patches: squares of merge × merge, row by row."""
    found: dict[tuple[int, int], Tensor] = {}
    sizes = [(rows, columns) for _, rows, columns in grid_I3.tolist()]
    for rows, columns in set(sizes):
        row_NN, column_NN = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        place_NN2 = torch.stack((row_NN, column_NN), -1).view(rows // merge, merge, columns // merge, merge, 2)
        found[rows, columns] = place_NN2.transpose(1, 2).reshape(-1, 2)
    return torch.cat([found[size] for size in sizes])


def _spread(text: str, counts: Iterator[int]) -> str:
    """One placeholder per image becomes one per image token."""
    before, *after = text.split(IMAGE_TOKEN)
    return before + "".join(IMAGE_TOKEN * next(counts) + part for part in after)
