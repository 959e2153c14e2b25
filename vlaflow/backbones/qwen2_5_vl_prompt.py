"""What Qwen2.5-VL reads: an observation as a conversation of token ids and image patches, by the model's own files.

Shape letters: B batch, P prompt tokens, I images.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vlaflow.backbones.pretrained_prompt import in_words, open_pretrained, transformers_library, where
from vlaflow.data.batch import ObservationBatch
from vlaflow.errors import ConfigError

if TYPE_CHECKING:
    from vlaflow.backbones.qwen2_5_vl import QwenConfig

NAME = "Qwen2.5-VL"
IMAGE_TOKEN = "<|image_pad|>"  # noqa: S105


@dataclass(frozen=True)
class Prompt:
    """B conversations as the network reads them; on the CPU, padded on the right.

    Args:
        id_BP: token ids.
        padding_mask_BP: bool, False on padding.
        image_BP, state_BP: bool, True where image features and the state go.
        patches: pixels of all images' patches, in the order of the tokens; None without views.
        grid_I3: frames (1), rows and columns of patches of every image; None without views.
    """

    id_BP: Tensor
    padding_mask_BP: Tensor
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
        hub = transformers_library(NAME)
        tokenizer = open_pretrained(hub.AutoTokenizer, source, NAME)
        pictures = open_pretrained(hub.AutoImageProcessor, source, NAME, backend="pil")
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
        image_BP, state_BP = where(self.tokenizer, id_BP, IMAGE_TOKEN), where(self.tokenizer, id_BP, config.state_token)
        if not bool((state_BP.sum(1) == 1).all()):
            raise ConfigError(f"state_token '{config.state_token}' must be one token, used nowhere else in the conversation.")
        return Prompt(id_BP, tokens["attention_mask"].bool(), image_BP, state_BP, patches, grid_I3)

    @property
    def end(self) -> str:
        """The token that ends an assistant turn."""
        return "<|im_end|>"

    def _conversation(self, sentence: str, config: QwenConfig) -> str:
        shown = [{"type": "image"} for _ in config.views]
        said = {"type": "text", "text": config.state_token + in_words(sentence)}
        turns = [{"role": "system", "content": config.system}, {"role": "user", "content": [*shown, said]}]
        return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def _spread(text: str, counts: Iterator[int]) -> str:
    """One placeholder per image becomes one per image token."""
    before, *after = text.split(IMAGE_TOKEN)
    return before + "".join(IMAGE_TOKEN * next(counts) + part for part in after)
