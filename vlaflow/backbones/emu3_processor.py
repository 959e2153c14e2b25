"""What Emu3 reads: an observation as token ids and pixels, by the model's own tokenizer and image processor.

The sequence is the beginning token, the instruction and one block per view, in which the id of the first code stands for every
code of the network's frozen image tokenizer; the network adds which code it is. There is no chat template and, as in UniVLA and
DFM-VLA, no proprioceptive state.

Shape letters: B batch, P prompt tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch

from vlaflow.backbones.inputs import Inputs, hide_images, shown_views
from vlaflow.backbones.pretrained_processor import (
    PretrainedProcessor,
    Reader,
    in_words,
    open_pretrained,
    transformers_library,
    where,
)
from vlaflow.data.batch import ObservationBatch
from vlaflow.errors import ConfigError

NAME, FAMILY = "Emu3", "emu3"
END_OF_LINE, FIRST_CODE = "<|extra_200|>", "<|visual token 000000|>"


class EmuReader(Reader):
    """Tokenizer and image processor of an Emu3 folder."""

    def __init__(self, tokenizer: Any, image_processor: Any) -> None:
        super().__init__(tokenizer, image_processor)
        self.end_of_line, self.first_code = (self._known(token) for token in (END_OF_LINE, FIRST_CODE))

    @classmethod
    def open(cls, source: str) -> Self:
        """See the base class.

        Raises:
            ConfigError: when there is no tokenizer or image processor, or it lacks the tokens of images.
        """
        hub = transformers_library(NAME, FAMILY)
        tokenizer = open_pretrained(hub.AutoTokenizer, source, NAME)
        return cls(tokenizer, open_pretrained(hub.Emu3ImageProcessor, source, NAME))

    def save(self, folder: Path) -> None:
        """See the base class."""
        self.image_processor.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @property
    def end(self) -> str:
        """See the base class."""
        return self.tokenizer.eos_token

    def _known(self, token: str) -> int:
        found = self.tokenizer.get_vocab().get(token)
        if found is None:
            raise ConfigError(f"This tokenizer has no '{token}', so it is none of {NAME}'s.")
        return int(found)


class EmuProcessor(PretrainedProcessor[EmuReader]):
    """See the module text.

    Args:
        reader, views, state_dim: see ``PretrainedProcessor``; the state is checked and not read.
        pixels: area that an image is resized to, its shape kept.
    """

    def __init__(self, reader: EmuReader | None, views: Sequence[str], state_dim: int, *, pixels: int) -> None:
        super().__init__(NAME, reader, views, state_dim)
        if reader is not None:
            reader.image_processor.min_pixels = reader.image_processor.max_pixels = pixels

    def read(self, observation: ObservationBatch) -> Inputs:
        """See the base class.

        Raises:
            ConfigError: for views whose shapes differ, whose code grids would too.
        """
        reader, token, blocks, pixels, line = self.reader, self.reader.tokenizer, "", None, 1
        if self.views:
            sides = [observation.images[view] for view in self.views]
            if len({tuple(side.shape[1:3]) for side in sides}) > 1:
                raise ConfigError("Emu3 reads views of one shape in a batch; record them at the same size.")
            images = [side[i].numpy() for i in range(len(observation)) for side in sides]
            pixels = reader.image_processor(images, input_data_format="channels_last", return_tensors="pt")["pixel_values"]
            rows, columns = (size // reader.image_processor.spatial_factor for size in pixels.shape[2:])
            line = columns + 1  # each row of codes has an end token
            block = f"{token.boi_token}{rows}*{columns}{token.image_wrapper_token}"
            blocks = len(self.views) * (block + token.image_token * (rows * line) + token.eof_token + token.eoi_token)
        texts = [f"{token.bos_token}{in_words(sentence)}{blocks}" for sentence in observation.instructions]
        id_BP, padding_mask_BP, count_B = self.tokens(texts)
        placeholder_BP = where(token, id_BP, token.image_token)
        if self.views:
            count_V = placeholder_BP[0].sum().expand(len(self.views)) // len(self.views)
            padding_mask_BP = hide_images(padding_mask_BP, placeholder_BP, count_V, shown_views(observation, self.views))
        place_BP = placeholder_BP.cumsum(1) - 1
        image_BP = placeholder_BP & (place_BP % line < line - 1)
        id_BP = torch.where(placeholder_BP, torch.where(image_BP, reader.first_code, reader.end_of_line), id_BP)
        return Inputs(
            state_BS=observation.state_BS,
            id_BP=id_BP,
            padding_mask_BP=padding_mask_BP,
            patches=pixels,
            image_BP=image_BP,
            next_position_B=count_B,
        )
