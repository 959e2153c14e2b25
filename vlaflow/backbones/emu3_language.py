"""Emu3's language model in the layout of its authors' own code, as UniVLA and UD-VLA publish theirs.

    config.json                          model_type "Emu3"; the language model's sizes
    model-00001-of-00004.safetensors     model.embed_tokens, model.layers.N..., model.norm, lm_head

It is that of transformers under shorter names. Such a folder has no image tokenizer, and a text tokenizer that only code of its
own can read; both are the same for all of Emu3's descendants and come from a folder in transformers' layout.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from vlaflow.backbones.emu3_processor import NAME
from vlaflow.backbones.opening import places_of, weight_files
from vlaflow.backbones.pretrained_processor import open_pretrained
from vlaflow.errors import CheckpointError, ConfigError
from vlaflow.io import read_json
from vlaflow.nn.stored import Stored, is_shared_later, lay, missing, read_here, stored_in, without_memory

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "pad_token_id",
)


def open_with_language(hub: Any, kind: Any, source: str, language: str, dtype: torch.dtype) -> Any:
    """Emu3 with the image tokenizer of one folder and the language model of another.

    Args:
        hub: the transformers package.
        kind: its class of the model.
        source: folder or Hub name in transformers' layout.
        language: folder or Hub name in the layout of Emu3's own code.
        dtype: of the weights.

    Raises:
        ConfigError: one of them cannot be opened, or lacks weights.
    """
    config = open_pretrained(kind.config_class, source, NAME)
    config.text_config = text_config(type(config.text_config), language)
    with without_memory(), torch.random.fork_rng(devices=[]):
        network = hub.AutoModelForImageTextToText.from_config(config, dtype=dtype)
    # The decoder of pictures is not kept, but is part of the network as long as transformers builds it.
    images = {name: place for name, place in places_of(network, source).items() if name.startswith("model.vqmodel.")}
    places = {**images, **places_of_language(language)}
    if name := missing(network, places):
        raise ConfigError(
            f"'{name}' is in neither '{language}' (weights in the layout of Emu3's own code, policy.backbone.language) nor "
            f"'{source}' (its image tokenizer, policy.backbone.source), or has another shape there."
        )
    lay(network, places)
    if not is_shared_later():
        read_here(network)
    return network


def text_config(kind: Any, language: str) -> Any:
    """transformers' config of the language model in such a folder.

    Raises:
        ConfigError: there is none.
    """
    file = Path(language) / "config.json"
    if not file.parent.is_dir():
        file = Path(import_module("transformers.utils.hub").cached_file(language, "config.json"))
    try:
        stated = read_json(file)
        rope = {"rope_type": "default", "rope_theta": stated["rope_theta"]}
        return kind(**{key: stated[key] for key in SIZES}, rope_parameters=rope)
    except (CheckpointError, KeyError, TypeError) as error:
        raise ConfigError(
            f"'{language}' is no Emu3 in the layout of its own code, as UniVLA's is: {error}. Give the folder that holds its "
            "config.json."
        ) from error


def places_of_language(language: str) -> dict[str, Stored]:
    """Where the language model's weights lie, by transformers' names."""
    found = stored_in(weight_files(language))
    inner = "model.text_model."
    return {inner + name.removeprefix("model.") if name.startswith("model.") else name: place for name, place in found.items()}
