"""What Emu3 reads: an observation as token ids and pixels, by the model's own tokenizer and image processor.

The sequence is the beginning token, the instruction and one block of placeholders per view; the network puts the codes of its
frozen image tokenizer there. There is no chat template and, as in UniVLA and DFM-VLA, no proprioceptive state.

Shape letters: B batch, P prompt tokens, I images.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlaflow.backbones.pretrained_prompt import in_words, open_pretrained, transformers_library, where
from vlaflow.data.batch import ObservationBatch
from vlaflow.errors import ConfigError

if TYPE_CHECKING:
    from vlaflow.backbones.emu3 import EmuConfig

NAME = "Emu3"
END_OF_LINE, FIRST_CODE = "<|extra_200|>", "<|visual token 000000|>"


@dataclass(frozen=True)
class EmuPrompt:
    """B sequences as the network reads them; on the CPU, padded on the right.

    Args:
        id_BP: token ids, placeholders where image codes go.
        padding_mask_BP: bool, False on padding.
        image_BP: bool, the placeholders.
        pixels_I3HW: normalised images, those of an observation in the order of the views; None without views.
    """

    id_BP: Tensor
    padding_mask_BP: Tensor
    image_BP: Tensor
    pixels_I3HW: Tensor | None


class EmuReader:
    """Tokenizer and image processor of an Emu3 folder."""

    def __init__(self, tokenizer: Any, pictures: Any) -> None:
        self.tokenizer, self.pictures = tokenizer, pictures
        tokenizer.padding_side = "right"
        self.end_of_line, self.first_code = (self._known(token) for token in (END_OF_LINE, FIRST_CODE))

    @staticmethod
    def open(source: str) -> EmuReader:
        """From a folder or Hub name.

        Raises:
            ConfigError: when there is no tokenizer or image processor, or it lacks the tokens of images.
        """
        hub = transformers_library(NAME)
        tokenizer = open_pretrained(hub.AutoTokenizer, source, NAME)
        return EmuReader(tokenizer, open_pretrained(hub.Emu3ImageProcessor, source, NAME))

    def save(self, folder: Path) -> None:
        """Everything ``open`` reads."""
        self.pictures.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def read(self, observation: ObservationBatch, config: EmuConfig) -> EmuPrompt:
        """Beginning, instruction, and every view's block, all views of one size.

        Raises:
            ConfigError: for views whose shapes differ, whose code grids would too.
        """
        token, blocks, pixels = self.tokenizer, "", None
        if config.views:
            sides = [observation.images[view].cpu() for view in config.views]
            if len({tuple(side.shape[1:3]) for side in sides}) > 1:
                raise ConfigError("Emu3 reads views of one shape in a batch; record them at the same size.")
            self.pictures.min_pixels = self.pictures.max_pixels = config.pixels
            images = [side[i].numpy() for i in range(len(observation)) for side in sides]
            pixels = self.pictures(images, input_data_format="channels_last", return_tensors="pt")["pixel_values"]
            rows, columns = (size // self.pictures.spatial_factor for size in pixels.shape[2:])
            block = f"{token.boi_token}{rows}*{columns}{token.image_wrapper_token}"
            block += token.image_token * (rows * (columns + 1)) + token.eof_token + token.eoi_token
            blocks = block * len(config.views)
        texts = [f"{token.bos_token}{in_words(sentence)}{blocks}" for sentence in observation.instructions]
        tokens = token(texts, padding=True, return_tensors="pt")
        id_BP = tokens["input_ids"]
        return EmuPrompt(id_BP, tokens["attention_mask"].bool(), where(token, id_BP, token.image_token), pixels)

    def codes(self, code_IHW: Tensor) -> Tensor:
        """Codes of the image tokenizer as ids of the language model, row by row, each row with its end token: (I, H·(W+1))."""
        ends_IH1 = torch.full_like(code_IHW[..., :1], self.end_of_line)
        return torch.cat((code_IHW + self.first_code, ends_IH1), -1).flatten(1)

    @property
    def end(self) -> str:
        """The token that ends an assistant turn."""
        return self.tokenizer.eos_token

    def _known(self, token: str) -> int:
        found = self.tokenizer.get_vocab().get(token)
        if found is None:
            raise ConfigError(f"This tokenizer has no '{token}', so it is none of {NAME}'s.")
        return int(found)
