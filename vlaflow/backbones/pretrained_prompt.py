"""What the prompts of pretrained backbones share: plain words, tokens that stand for something else, answers, opening files.

Shape letters: B batch, P prompt tokens, T answer tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vlaflow.backbones.language import IGNORED
from vlaflow.errors import CapabilityError, ConfigError, SpecError


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


def answer_ids(tokenizer: Any, answers: Sequence[str], end: str) -> Tensor:
    """Tokens of each answer and its end, (B, T) int64, padded with −100."""
    tokens = tokenizer([in_words(answer) + end for answer in answers], padding=True, return_tensors="pt")
    return tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, IGNORED)


def answer_texts(tokenizer: Any, id_BT: Tensor, end: int) -> list[str]:
    """What each row says up to its end."""
    rows = ([number for number in row if number >= 0] for row in id_BT.tolist())
    return [tokenizer.decode(row[: row.index(end)] if end in row else row) for row in rows]


def transformers_library(name: str) -> ModuleType:
    """The transformers package, imported when it is first needed.

    Raises:
        CapabilityError: when it is not installed, or too old for the model.
    """
    try:
        import transformers
        import transformers.models.emu3.modeling_emu3
        import transformers.models.molmo2.modeling_molmo2
        import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl
    except ImportError as error:
        raise CapabilityError(f"The {name} backbone needs transformers. Install it: pip install 'vlaflow[vlm]'") from error
    return transformers


def open_pretrained(kind: Any, source: str, name: str, **options: Any) -> Any:
    """``kind.from_pretrained``; what a user can fix becomes one sentence."""
    try:
        return kind.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"'{source}' is no {name} folder or Hub name that can be opened: {reason}") from error
