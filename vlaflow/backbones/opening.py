"""Opening transformers' models: whole, or, where processes are going to share them, without memory (``nn.stored``).

In the second case each weight's place in the model's files is found from transformers' own table of old and new names. Models
of which some weights are computed from several tensors of the files (Molmo2) and formats other than safetensors (GGUF) have
no such places: the first process opens them whole and sends them to the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from vlaflow.backbones.pretrained_processor import open_pretrained
from vlaflow.nn.meta import Undrawn
from vlaflow.nn.stored import Stored, is_sent, is_shared_later, lay, missing, stored_in, without_memory


def open_network(hub: ModuleType, kind: str, auto: str, source: str, name: str, **options: Any) -> Any:
    """A pretrained network of transformers.

    Args:
        hub: the transformers package.
        kind: its class of the model.
        auto: its class that builds such a model from a config.
        source: folder or Hub name.
        name: of the model, for sentences.
        options: of ``from_pretrained``; "dtype" is needed.

    Raises:
        ConfigError: it cannot be opened.
    """
    model = getattr(hub, kind)
    if not is_shared_later():
        return _opened(model, source, name, options)
    reading = {key: value for key, value in options.items() if key == "gguf_file"}
    config = open_pretrained(model.config_class, source, name, **reading)
    with without_memory(), torch.random.fork_rng(devices=[]):  # some modules draw all the same
        network = getattr(hub, auto).from_config(config, dtype=options["dtype"])
    places = {} if reading else places_of(network, source)
    if missing(network, places) is None:
        lay(network, places)
        return network
    return network if is_sent() else _opened(model, source, name, options)


def _opened(model: Any, source: str, name: str, options: Mapping[str, Any]) -> Any:
    with Undrawn():  # transformers builds it on the meta device first
        return open_pretrained(model, source, name, **options)


def places_of(network: Any, source: str) -> dict[str, Stored]:
    """Where weights lie in a model's files, by their names in the network; without those that no single tensor holds."""
    try:
        mapping, loading = (import_module(f"transformers.{name}") for name in ("conversion_mapping", "core_model_loading"))
        transforms = mapping.get_model_conversion_mapping(network)
        rename = loading.rename_source_key
        kinds = (loading.WeightRenaming, loading.WeightConverter)
    except (ImportError, AttributeError):  # another version of transformers
        return {}
    renamings, converters = ([each for each in transforms if isinstance(each, kind)] for kind in kinds)
    prefix, own = network.base_model_prefix, nn.Module.state_dict(network)
    found = {}
    for key, place in stored_in(weight_files(source)).items():
        name, converted = rename(key, renamings, converters, prefix, own)
        if converted is None:
            found[name] = place
    return found


def weight_files(source: str) -> list[Path]:
    """The safetensors files of a folder or of a model on the Hub; none where there are none."""
    folder = Path(source)
    if folder.is_dir():
        return sorted(folder.glob("model*.safetensors"))
    hub = import_module("transformers.utils.hub")
    index = hub.cached_file(source, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
    if index is not None:
        return [Path(file) for file in hub.get_checkpoint_shard_files(source, index)[0]]
    single = hub.cached_file(source, "model.safetensors", _raise_exceptions_for_missing_entries=False)
    return [] if single is None else [Path(single)]
