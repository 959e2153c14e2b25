"""Low-rank adapters (LoRA) on a policy's pretrained networks, through peft, merged into the weights of a checkpoint.

    y = W x + (alpha / rank) · B A x

W stays as it is; A (rank × inputs, random) and B (outputs × rank, zero at first) train, and so does everything that is not
pretrained: decoder, expert, projection of the state, a vision stem from scratch. A checkpoint holds W + (alpha / rank) · B A
under W's own name, so it opens without peft and runs at the same speed. With ``quantise`` W is held in four bits in training
(QLoRA, bitsandbytes).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlaflow.backbones.base import Backbone
from vlaflow.errors import ConfigError, nearest
from vlaflow.io import save_tensors
from vlaflow.packages import require
from vlaflow.ranges import Count, NotNegative, Positive, require_ranges

ADAPTER = "default"
"""peft's name of the one adapter."""


@dataclass(frozen=True)
class LoraConfig:
    """Adapters of a training stage.

    Args:
        rank: of each adapter.
        alpha: an adapter's output is multiplied by alpha / rank.
        targets: last names of the matrices that get one, such as "q_proj"; by default those that the backbone names.
        learning_rate: of the adapters; None takes that of the part they are in.
        quantise: hold the adapted matrices in four bits; None holds them in the backbone's ``dtype``.
    """

    rank: Count = 16
    alpha: Positive = 32.0
    targets: tuple[str, ...] = ()
    learning_rate: NotNegative | None = None
    quantise: Literal["nf4"] | None = None

    def __post_init__(self) -> None:
        require_ranges(self, "lora.{}")

    @property
    def packages(self) -> tuple[str, ...]:
        """What it needs."""
        return ("peft", "bitsandbytes") if self.quantise else ("peft",)


def adapt(module: nn.Module, config: LoraConfig, seed: int) -> list[str]:
    """Give a module's pretrained parts adapters, and take the gradient from everything else in them.

    Args:
        module: changed in place; on the CPU.
        config: which adapters.
        seed: of A; the global generator is left as it was.

    Returns:
        Names of the adapters' parameters.

    Raises:
        ConfigError: nothing in the module is pretrained, or a target is not there.
        CapabilityError: a package is missing.
    """
    require(*config.packages, what="Training with adapters (lora)")
    backbones = [part for part in module.modules() if isinstance(part, Backbone)]
    parts = [part for backbone in backbones for part in backbone.pretrained]
    if not parts:
        raise ConfigError("Nothing in what is trained is pretrained, so there is nothing to adapt. Set lora=none.")
    matrices = {each for part in parts for each in part.modules() if isinstance(each, nn.Linear)}
    names = {part: name for name, part in module.named_modules() if part in matrices}
    known = {_last(name) for name in names.values()}
    for target in config.targets:
        if target not in known:
            raise ConfigError(f"No pretrained matrix is called '{target}' (lora.targets); {nearest(target, known)}")
    chosen = [part for part in names if _last(names[part]) in config.targets] if config.targets else []
    chosen = chosen or [each for backbone in backbones for each in backbone.adapted]
    free = [p for p in module.parameters() if p.requires_grad]
    frozen = {id(p) for part in parts for p in part.parameters()}
    if config.quantise:
        for part in chosen:
            _replace(module, names[part], _in_four_bits(part))
    peft = import_module("peft")
    settings = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=[names[part] for part in chosen])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(settings, module, ADAPTER)
    added = {name: p for name, p in module.named_parameters() if f".{ADAPTER}." in name and ".lora_" in name}
    for parameter in added.values():
        parameter.data = parameter.data.float()  # small enough for float32, whatever the pretrained weights are in
    for parameter in free:  # peft leaves the gradient to adapters alone
        parameter.requires_grad_(id(parameter) not in frozen)
    return list(added)


def digest(module: nn.Module) -> int:
    """A checksum of all weights that do not train, by which a continued run tells that it has the same ones."""
    found = 0
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            found = zlib.crc32(name.encode(), found)
            found = zlib.crc32(parameter.detach().contiguous().view(-1).view(torch.uint8).numpy().data, found)
    return found


class Merged(Mapping[str, Tensor]):
    """A module's weights with its adapters merged, by the names that they have without adapters; each is made when asked for.

    Args:
        module: with or without adapters.
        weights: tensors to use in place of the module's own of the same names, e.g. averaged ones.
    """

    def __init__(self, module: nn.Module, weights: Mapping[str, Tensor] | None = None) -> None:
        self._own, self._weights = module.state_dict(), weights or {}
        self._adapters = dict(_adapters(module))
        self._places: dict[str, str] = {}
        for name in self._own:
            path = next((path for path in self._adapters if name.startswith(f"{path}.")), None)
            if path is None:
                self._places[name] = name
            elif name in (f"{path}.base_layer.weight", f"{path}.base_layer.bias"):
                self._places[name.replace(".base_layer.", ".")] = name

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, name: str) -> Tensor:
        place, path = self._places[name], name.removesuffix(".weight")
        if path not in self._adapters or place == name:
            return self._given(place)
        layer = self._adapters[path]
        base = self._given(place) if layer.base_layer.weight.is_floating_point() else _whole(layer.base_layer)
        down_RI, up_OR = (self._given(f"{path}.{part}.{ADAPTER}.weight").float() for part in ("lora_A", "lora_B"))
        change_OI = layer.scaling[ADAPTER] * (up_OR @ down_RI)
        return (base.float() + change_OI.to(base.device)).to(base.dtype)

    def announced(self) -> dict[str, Tensor]:
        """Tensors without data, of the shapes and types of these."""
        shapes = {}
        for name, place in self._places.items():
            tensor = self._own[place]
            layer = self._adapters.get(name.removesuffix(".weight")) if place != name else None
            if layer is not None and not tensor.is_floating_point():
                tensor = _whole(layer.base_layer)
            shapes[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        return shapes

    def _given(self, place: str) -> Tensor:
        return (self._weights if place in self._weights else self._own)[place].detach()


def save_merged(file: Path, module: nn.Module, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write a module's weights as ``Merged`` gives them, one tensor in memory at a time."""
    merged = Merged(module, weights)
    save_tensors(file, merged, like=merged.announced())


def _adapters(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Adapted layers by path."""
    for path, part in module.named_modules():
        if hasattr(part, "base_layer") and ADAPTER in getattr(part, "lora_A", {}):
            yield path, part


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _replace(module: nn.Module, path: str, part: nn.Module) -> None:
    above, _, name = path.rpartition(".")
    setattr(module.get_submodule(above), name, part)


def _in_four_bits(linear: nn.Linear) -> nn.Module:
    """The same matrix in bitsandbytes' 4-bit normal floats."""
    bits = import_module("bitsandbytes")
    made = bits.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=linear.weight.dtype,
        quant_type="nf4",
    )
    made.weight = bits.nn.Params4bit(linear.weight.detach(), requires_grad=False, quant_type="nf4", module=made)
    made.bias = linear.bias
    made.support_avx512bf16_for_cpu = False  # which would reorder the weights in the first evaluation
    return made.to("cpu")  # quantises


def _whole(layer: Any) -> Tensor:
    """A 4-bit matrix in the format it had before."""
    bits = import_module("bitsandbytes")
    return bits.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(layer.weight.quant_state.dtype)
