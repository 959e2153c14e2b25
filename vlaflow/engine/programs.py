"""A policy's networks cut into functions of tensors, which can be compiled.

    embed    images, instruction and state to prefix tokens
    run      prefix tokens through layers ``start`` … ``upto``, to hidden states and the keys and values of these layers
    step     one Euler step of a flow, or one velocity, through ``upto`` layers
    answer   the chunk of a regression, through ``upto`` layers
    look     the scores of action tokens that all see one another: masked diffusion, discrete flow
    joint    hidden states of tokens that the prefix sees too, and the prefix that was run with them
    next     the scores of the token after one more: autoregression, of actions or of latent codes
    codes    the latent action tokens that an expert reads
    rate     the rater's confidence in a chunk

Every compute policy is made of these, so one set of programs serves all of them at any number of steps, any grid of clocks and
with given actions. Shapes are fixed: a batch is filled up to the next program's, an instruction to the next length.
``modules`` holds what each of them is compiled from.

Shape letters: B batch, P prefix tokens, W width, S state dimension, N prefix tokens and room for the tokens behind them.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlaflow.backbones.base import Backbone, Prefix
from vlaflow.backbones.inputs import Inputs
from vlaflow.nn.attention import KeyValues
from vlaflow.stacks.shared import Cache

Precision = Literal["f32", "bf16"]
Part = Literal["embed", "run", "step", "answer", "look", "joint", "next", "codes", "rate"]
STEPS: frozenset[Part] = frozenset({"step", "answer", "look", "joint", "next"})
"""Of a decoder; the others make what it reads, or judge its chunk."""
Run = Callable[[Sequence[Tensor]], list[Tensor]]
"""A program that can be called: contiguous tensors of its shapes in, tensors out."""


@dataclass(frozen=True, order=True)
class ProgramKey:
    """Which part of a policy a program computes, and for which shapes.

    Args:
        part: see the module text.
        tokens: prefix tokens that it reads; ids of the instruction for ``embed``; all that the buffers hold for ``next``.
        start, upto: layers; 0 and 0 for ``embed``.
        batch: observations, times draws.
    """

    part: Part
    tokens: int
    start: int
    upto: int
    batch: int

    def __str__(self) -> str:
        """As its file is named."""
        return f"{self.part}-{self.tokens}-{self.start}-{self.upto}-{self.batch}"

    @staticmethod
    def named(name: str) -> ProgramKey:
        """The inverse of ``str``."""
        part, *numbers = name.split("-")
        return ProgramKey(part, *map(int, numbers))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Program:
    """A function of tensors that is to be compiled.

    Args:
        key: what it computes.
        module: computes it.
        examples: tensors of its shapes.
    """

    key: ProgramKey
    module: nn.Module
    examples: tuple[Tensor, ...]


def tensors_of(inputs: Inputs) -> list[Tensor]:
    """The tensors of inputs in the order of their fields, images by view; without the mask, which no embedding reads."""
    found: list[Tensor] = []
    for name, value in vars(inputs).items():  # dataclasses.fields takes as long as ten of these rounds
        if value is None or name == "padding_mask_BP":
            continue
        if isinstance(value, Tensor):
            found.append(value)
        else:
            found += value.values()
    return found


def with_tensors(like: Inputs, tensors: Iterable[Tensor]) -> Inputs:
    """Inputs with other tensors, given in the order of ``tensors_of``."""
    left, changed = iter(tensors), dict[str, Any]()
    for field in dataclasses.fields(like):
        value = getattr(like, field.name)
        if isinstance(value, Mapping):
            changed[field.name] = {name: next(left) for name in value}
        elif value is not None:
            changed[field.name] = next(left)
    return replace(like, **changed)


def unmasked(inputs: Inputs) -> Inputs:
    """The same without the mask of the prefix tokens: what ``with_tensors`` puts the tensors of ``tensors_of`` into."""
    return replace(inputs, padding_mask_BP=None)


def embedded(backbone: Backbone, inputs: Inputs) -> Prefix:
    """The prefix as ``embed`` gives it, computed by the networks: tokens, and what the inputs say of mask and state."""
    return replace(backbone.embed(inputs), state_BS=inputs.state_BS)


def embed_key(inputs: Inputs) -> ProgramKey:
    """What embeds these observations."""
    return ProgramKey("embed", inputs.id_BP.shape[1], 0, 0, len(inputs))


def run_key(prefix: Prefix, upto: int) -> ProgramKey:
    """What runs this prefix further."""
    return ProgramKey("run", prefix.hidden_BPW.shape[1], prefix.depth, upto, prefix.batch)


def rating_key(prefix: Prefix) -> ProgramKey:
    """What rates chunks on this prefix."""
    return ProgramKey("rate", prefix.hidden_BPW.shape[1], 0, prefix.depth, prefix.batch)


def reading_key(part: Literal["step", "answer", "look", "codes"], prefix: Prefix) -> ProgramKey:
    """What reads this prefix."""
    key_CGPE = prefix.kv_cache[0].key_CGPE
    return ProgramKey(part, key_CGPE.shape[2], 0, prefix.depth, len(key_CGPE))


def joint_key(prefix: Prefix, depth: int) -> ProgramKey:
    """What runs this prefix, of which no layer has run, together with a decoder's tokens."""
    return ProgramKey("joint", prefix.hidden_BPW.shape[1], 0, depth, prefix.batch)


def next_key(cache: Cache) -> ProgramKey:
    """What continues these tokens."""
    key_CGPE = cache.layers[0].key_CGPE
    return ProgramKey("next", key_CGPE.shape[2], 0, len(cache.layers), len(key_CGPE))


def run_inputs(prefix: Prefix) -> list[Tensor]:
    """What ``RunLayers`` takes, the first two arguments of ``Rate`` and the last two of ``LookJointly``."""
    return [prefix.hidden_BPW.contiguous(), _mask(prefix.padding_mask_BP, prefix.hidden_BPW)]


def reading_inputs(prefix: Prefix) -> list[Tensor]:
    """What reads a prefix takes of it: its state, bool of the tokens that may be read, key and value of every layer."""
    assert prefix.state_BS is not None
    first = prefix.kv_cache[0]
    visible_BP = _mask(first.mask_CP, first.key_CGPE[:, 0])
    return [prefix.state_BS.contiguous(), visible_BP, *_buffers(prefix.kv_cache)]


def next_inputs(token_B1W: Tensor, cache: Cache) -> list[Tensor]:
    """What ``NextToken`` takes: the token, bool (B, N) of the tokens before it, key and value of every layer."""
    return [token_B1W.contiguous(), cache.visible(), *_buffers(cache.layers)]


def _buffers(kv_cache: Sequence[KeyValues]) -> list[Tensor]:
    return [tensor.contiguous() for own in kv_cache for tensor in (own.key_CGPE, own.value_CGPE)]


def _mask(mask_BP: Tensor | None, token_BPW: Tensor) -> Tensor:
    """A mask where there was none: programs always read one."""
    return _everything(*token_BPW.shape[:2]) if mask_BP is None else mask_BP.contiguous()


@lru_cache(maxsize=64)
def _everything(batch: int, tokens: int) -> Tensor:
    with torch.inference_mode(mode=False):
        return torch.ones(batch, tokens, dtype=torch.bool)


class Programs:
    """Programs by what they compute; a batch that has none of its own takes the next larger one's.

    What is missing the networks compute, which is said once on standard error.

    Attributes:
        missed: what was asked for and not there.
    """

    def __init__(self, programs: Mapping[ProgramKey, Run]) -> None:
        self.missed: set[ProgramKey] = set()
        self._said = False
        self._found: dict[ProgramKey, Run | None] = {}
        self._by_batch: dict[ProgramKey, list[tuple[int, Run]]] = {}
        for key in sorted(programs):
            self._by_batch.setdefault(replace(key, batch=0), []).append((key.batch, programs[key]))

    def find(self, key: ProgramKey) -> Run | None:
        """The program for these shapes; None where none was built."""
        if key not in self._found:
            self._found[key] = self._search(key)
        return self._found[key]

    def _search(self, key: ProgramKey) -> Run | None:
        for batch, program in self._by_batch.get(replace(key, batch=0), ()):
            if batch == key.batch:
                return program
            if batch > key.batch:
                return _filling(program, key.batch, batch)
        if not self._said and any(other.part == key.part for other in self._by_batch):  # or this kind of policy has none
            self._said = True
            sys.stderr.write(
                f"No program was built for {key.batch} observation{'s' if key.batch > 1 else ''} and {key.tokens} tokens "
                f"({key}), so the networks compute this: the same chunk, only later. Tell vlaflow deploy what you run: "
                "--batch, --compute, and --instruction for its length.\n"
            )
        self.missed.add(key)
        return None


def _filling(program: Run, rows: int, batch: int) -> Run:
    """The program on fewer rows: the first is repeated."""

    def filled(tensor: Tensor) -> Tensor:
        return torch.cat((tensor, tensor[:1].expand(batch - rows, *tensor.shape[1:])))

    return lambda tensors: [out[:rows] for out in program([filled(tensor) for tensor in tensors])]
