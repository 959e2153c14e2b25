"""What the processors of pretrained backbones share: opening files, plain words, conversations, answers.

A processor takes values, never a config or a network, so these files know nothing of the wrappers that use them. What it reads
with (tokenizer, image settings) is opened from ``source`` or from a checkpoint's ``processor`` folder; a network built from an
architecture alone has none, and its processor says so when it is called.

Shape letters: B batch, P prompt tokens, T answer tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor

from vlaflow.backbones.inputs import Inputs, Processor, require_state
from vlaflow.backbones.language import IGNORED
from vlaflow.data.batch import ObservationBatch
from vlaflow.errors import CapabilityError, CheckpointError, ConfigError, SpecError, VlaflowError

FOLDER = "processor"
"""Of a checkpoint: tokenizer, chat template and image settings, all JSON."""


class Reader(ABC):
    """Tokenizer and image settings of a pretrained model.

    Args:
        tokenizer: made to pad on the right, because under a causal mask a row of padding in front would see nothing: NaN.
        image_processor: how images become what the vision part takes.
    """

    def __init__(self, tokenizer: Any, image_processor: Any) -> None:
        self.tokenizer, self.image_processor = tokenizer, image_processor
        tokenizer.padding_side = "right"

    @classmethod
    @abstractmethod
    def open(cls, source: str) -> Self:
        """From a folder or Hub name.

        Raises:
            ConfigError: when a file is missing that reading needs.
        """

    @property
    @abstractmethod
    def end(self) -> str:
        """The token that ends an assistant turn."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write everything that ``open`` reads, as JSON."""


R = TypeVar("R", bound=Reader)


class PretrainedProcessor(Processor, Generic[R]):
    """See the module text.

    Args:
        name: of the model, for sentences.
        reader: tokenizer and image settings; None for a network built from an architecture alone.
        views: in the order of their tokens.
        state_dim: length of the state, S.
    """

    def __init__(self, name: str, reader: R | None, views: Sequence[str], state_dim: int) -> None:
        self.name, self.views, self.state_dim = name, tuple(views), state_dim
        self._reader = reader

    @property
    def reader(self) -> R:
        """Tokenizer and image settings.

        Raises:
            CapabilityError: when the network was built from an architecture alone.
        """
        if self._reader is None:
            raise CapabilityError(
                f"This {self.name} network has no tokenizer: it was built from an architecture alone. "
                "Build it with 'source', or open a checkpoint with Policy.from_pretrained."
            )
        return self._reader

    def __call__(self, observation: ObservationBatch) -> Inputs:
        """See the base class.

        Raises:
            SpecError: for a state of another length, or an instruction with one of the tokenizer's own tokens.
            CapabilityError: for a network that has neither been given a ``source`` nor opened from a checkpoint.
        """
        require_state(observation, self.state_dim)
        return self.read(observation)

    @abstractmethod
    def read(self, observation: ObservationBatch) -> Inputs:
        """The same, of a state whose length has been checked."""

    def tokens(self, texts: Sequence[str], **options: Any) -> tuple[Tensor, Tensor | None, Tensor]:
        """Ids of texts (B, P), their mask as the network takes it (None when nothing is padded), and tokens per row (B,)."""
        found = self.reader.tokenizer(texts, padding=True, return_tensors="pt", **options)
        mask_BP = found["attention_mask"].bool()
        return found["input_ids"], None if bool(mask_BP.all()) else mask_BP, mask_BP.sum(1)

    @property
    def end_id(self) -> int:
        """The end of an assistant turn."""
        return int(self.answer_ids([""])[0, -1])

    def answer_ids(self, answers: Sequence[str]) -> Tensor:
        """Tokens of an assistant turn with its end, (B, T) int64, padded with −100."""
        id_BT, mask_BT, _ = self.tokens([in_words(answer) + self.reader.end for answer in answers])
        return id_BT if mask_BT is None else id_BT.masked_fill(~mask_BT, IGNORED)

    def answer_texts(self, id_BT: Tensor) -> list[str]:
        """Words up to the end of the turn."""
        tokenizer, end = self.reader.tokenizer, self.end_id
        rows = ([number for number in row if number >= 0] for row in id_BT.tolist())
        return [tokenizer.decode(row[: row.index(end)] if end in row else row) for row in rows]

    def save(self, folder: Path) -> None:
        """Tokenizer, chat template and image settings into ``folder/processor``."""
        if self._reader is not None:
            self._reader.save(folder / FOLDER)


class ChatProcessor(PretrainedProcessor[R]):
    """Of a model with a chat template, whose user turn holds the images, a token that stands for the state, and words.

    Args:
        name, reader, views, state_dim: see the base class.
        state_token: stands for the state, one that no instruction uses; None where the model does not read the state.
        system: the system turn; None for none.
    """

    def __init__(
        self,
        name: str,
        reader: R | None,
        views: Sequence[str],
        state_dim: int,
        *,
        state_token: str | None,
        system: str | None = None,
    ) -> None:
        super().__init__(name, reader, views, state_dim)
        self.state_token, self.system = state_token, system

    def conversation(self, sentence: str) -> str:
        """One placeholder per view, state token and instruction, up to the beginning of the assistant's turn."""
        shown = [{"type": "image"} for _ in self.views]
        said = {"type": "text", "text": (self.state_token or "") + in_words(sentence)}
        turns: list[dict[str, Any]] = [{"role": "user", "content": [*shown, said]}]
        if self.system is not None:
            turns.insert(0, {"role": "system", "content": self.system})
        return self.reader.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    def state_places(self, id_BP: Tensor) -> Tensor | None:
        """Where the state goes, bool (B, P); None where the model does not read it.

        Raises:
            ConfigError: when the state token is not there exactly once.
        """
        if self.state_token is None:
            return None
        state_BP = where(self.reader.tokenizer, id_BP, self.state_token)
        if not bool((state_BP.sum(1) == 1).all()):
            raise ConfigError(f"state_token '{self.state_token}' must be one token, used once in the conversation.")
        return state_BP


def in_words(sentence: str) -> str:
    """The sentence itself.

    Raises:
        SpecError: when it holds the beginning of the tokenizer's own tokens.
    """
    if "<|" in sentence:
        raise SpecError(f"'{sentence}' holds '<|', which begins the tokenizer's own tokens; write it in plain words.")
    return sentence


def where(tokenizer: Any, id_BP: Tensor, token: str) -> Tensor:
    """Where a token stands, bool (B, P); nowhere when the tokenizer does not know it."""
    known = tokenizer.convert_tokens_to_ids(token)
    return torch.zeros_like(id_BP, dtype=torch.bool) if known is None else id_BP == known


def require_chat_template(tokenizer: Any, settings: Mapping[str, Any], source: str) -> None:
    """Give the tokenizer the chat template of the processor's settings, where they have one, and refuse a model without.

    Raises:
        ConfigError: when neither has one.
    """
    tokenizer.chat_template = settings.get("chat_template") or tokenizer.chat_template
    if not tokenizer.chat_template:
        raise ConfigError(f"'{source}' has no chat template; use the instruction-tuned model.")


def open_reader(kind: type[R], source: str | None, folder: Path | None) -> R | None:
    """The reader of a checkpoint, or of the model that a policy starts from; None with neither.

    Args:
        kind: of the reader.
        source: folder or Hub name in the config.
        folder: of a checkpoint.

    Raises:
        CheckpointError: when the checkpoint lacks its files.
        ConfigError: see ``Reader.open``.
    """
    if folder is not None:
        if not (folder / FOLDER).is_dir():
            raise CheckpointError(f"{folder / FOLDER} is missing (tokenizer and image settings). Copy the whole folder.")
        source = str(folder / FOLDER)
    return kind.open(source) if source else None


def transformers_library(name: str, family: str) -> ModuleType:
    """The transformers package, imported when it is first needed, with one model's own module and no other's.

    Args:
        name: of the model, for sentences.
        family: of the module, as in ``transformers.models``.

    Raises:
        CapabilityError: when it is not installed, or too old for the model.
    """
    try:
        hub = import_module("transformers")
        import_module(f"transformers.models.{family}.modeling_{family}")
    except ImportError as error:
        raise CapabilityError(
            f"The {name} backbone needs a version of transformers that knows it. Install one: pip install 'vlaflow[vlm]'"
        ) from error
    return hub


def open_pretrained(kind: Any, source: str, name: str, **options: Any) -> Any:
    """``kind.from_pretrained``; what a user can fix becomes one sentence.

    Raises:
        ConfigError: there is none, or a file of it is damaged, for which its libraries have many kinds of errors.
    """
    return _opened(lambda: kind.from_pretrained(source, **options), source, name)


def read_settings(reading: Callable[[str], tuple[dict[str, Any], Any]], source: str, name: str) -> dict[str, Any]:
    """The settings that one of transformers' functions reads in a folder or Hub name, as JSON data.

    Raises:
        ConfigError: see ``open_pretrained``.
    """
    return dict(_opened(lambda: reading(source), source, name)[0])


def _opened(opening: Callable[[], Any], source: str, name: str) -> Any:
    try:
        return opening()
    except (VlaflowError, MemoryError):
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        cure = " If it was copied, copy it again." if Path(source).is_dir() else ""
        raise ConfigError(f"'{source}' is no {name} folder or Hub name that can be opened: {reason}.{cure}") from error
