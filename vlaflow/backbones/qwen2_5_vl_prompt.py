"""What Qwen2.5-VL reads: an observation as a conversation of token ids and image patches, by the model's own files.

Shape letters: B batch, P prompt tokens, I images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlaflow.data.batch import ObservationBatch
from vlaflow.errors import CapabilityError, ConfigError, SpecError

if TYPE_CHECKING:
    from vlaflow.backbones.qwen2_5_vl import QwenConfig

IGNORED = -100  # an answer position without a target
IMAGE_TOKEN = "<|image_pad|>"  # noqa: S105


@dataclass(frozen=True)
class Prompt:
    """B conversations as the network reads them; on the CPU, padded on the right.

    Args:
        id_BP: token ids.
        seen_BP: bool, False on padding.
        image_BP, state_BP: bool, True where image features and the state go.
        patches: pixels of all images' patches, in the order of the tokens; None without views.
        grid_I3: frames (1), rows and columns of patches of every image; None without views.
    """

    id_BP: Tensor
    seen_BP: Tensor
    image_BP: Tensor
    state_BP: Tensor
    patches: Tensor | None
    grid_I3: Tensor | None


class PromptReader:
    """Tokenizer, chat template and image processor of a Qwen2.5-VL folder.

    transformers' own ``Qwen2_5_VLProcessor`` joins these with a video processor that needs torchvision; a policy has no
    use for it. Images are always resized by Pillow, so a checkpoint sees the same pixels on every machine.
    """

    def __init__(self, tokenizer: Any, pictures: Any) -> None:
        self.tokenizer, self.pictures = tokenizer, pictures
        tokenizer.padding_side = "right"  # under a causal mask a row of padding in front would see nothing: NaN

    @staticmethod
    def open(source: str) -> PromptReader:
        """From a folder or Hub name.

        Raises:
            ConfigError: when there is no tokenizer, image processor or chat template.
        """
        hub = transformers_library()
        tokenizer = open_pretrained(hub.AutoTokenizer, source)
        pictures = open_pretrained(hub.AutoImageProcessor, source, backend="pil")
        settings, _ = hub.Qwen2_5_VLProcessor.get_processor_dict(source)
        tokenizer.chat_template = settings.get("chat_template") or tokenizer.chat_template
        if not tokenizer.chat_template:
            raise ConfigError(f"'{source}' has no chat template; use the instruction-tuned model.")
        return PromptReader(tokenizer, pictures)

    def save(self, folder: Path) -> None:
        """Everything ``open`` reads."""
        self.pictures.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder, save_jinja_files=False)

    def read(self, observation: ObservationBatch, config: QwenConfig) -> Prompt:
        """A system turn, a user turn of images, state and instruction, and the beginning of the assistant's turn."""
        grid_I3 = patches = None
        if config.views:
            sides = [observation.images[view].cpu() for view in config.views]
            size = {"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels}
            images = [side[i].numpy() for i in range(len(observation)) for side in sides]
            seen = self.pictures(images, size=size, input_data_format="channels_last", return_tensors="pt")
            patches, grid_I3 = seen["pixel_values"], seen["image_grid_thw"]
        texts = [self._conversation(sentence, config) for sentence in observation.instructions]
        if grid_I3 is not None:
            counts = iter((grid_I3.prod(1) // self.pictures.merge_size**2).tolist())
            texts = [_spread(text, counts) for text in texts]
        tokens = self.tokenizer(texts, padding=True, return_tensors="pt")
        id_BP = tokens["input_ids"]
        image_BP, state_BP = self._where(id_BP, IMAGE_TOKEN), self._where(id_BP, config.state_token)
        if not bool((state_BP.sum(1) == 1).all()):
            raise ConfigError(f"state_token '{config.state_token}' must be one token, used nowhere else in the conversation.")
        return Prompt(id_BP, tokens["attention_mask"].bool(), image_BP, state_BP, patches, grid_I3)

    def answers(self, answers: Sequence[str]) -> Tensor:
        """See ``QwenBackbone.answer_ids``."""
        texts = [f"{_in_words(answer)}<|im_end|>" for answer in answers]
        tokens = self.tokenizer(texts, padding=True, return_tensors="pt")
        return tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, IGNORED)

    def _where(self, id_BP: Tensor, token: str) -> Tensor:
        """bool (B, P); nowhere when the tokenizer does not know the token."""
        known = self.tokenizer.convert_tokens_to_ids(token)
        return torch.zeros_like(id_BP, dtype=torch.bool) if known is None else id_BP == known

    def _conversation(self, sentence: str, config: QwenConfig) -> str:
        shown = [{"type": "image"} for _ in config.views]
        said = {"type": "text", "text": config.state_token + _in_words(sentence)}
        turns = [{"role": "system", "content": config.system}, {"role": "user", "content": [*shown, said]}]
        return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def _spread(text: str, counts: Iterator[int]) -> str:
    """One placeholder per image becomes one per image token."""
    before, *after = text.split(IMAGE_TOKEN)
    return before + "".join(IMAGE_TOKEN * next(counts) + part for part in after)


def _in_words(sentence: str) -> str:
    if "<|" in sentence:
        raise SpecError(f"'{sentence}' holds '<|', which begins the tokenizer's own tokens; write it in plain words.")
    return sentence


def transformers_library() -> ModuleType:
    """The transformers package, imported when it is first needed.

    Raises:
        CapabilityError: when it is not installed.
    """
    try:
        import transformers
        import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl
    except ImportError as error:
        raise CapabilityError("The Qwen2.5-VL backbone needs transformers. Install it: pip install 'vlaflow[vlm]'") from error
    return transformers


def open_pretrained(kind: Any, source: str, **options: Any) -> Any:
    """``kind.from_pretrained``; what a user can mend becomes one sentence."""
    try:
        return kind.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"'{source}' is no Qwen2.5-VL folder or Hub name that can be opened: {reason}") from error
