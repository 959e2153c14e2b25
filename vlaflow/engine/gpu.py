"""A policy's networks for a GPU: fused layers on static buffers, and passes that are recorded once and replayed as CUDA graphs.

    fast = Policy.from_pretrained(folder, "cuda", engine="graphs")      # chunks differ by rounding alone
    fast = Policy.from_pretrained(folder, "cuda", engine="graphs-fp8")  # and here by the rounding of float8
    fast.act(observation)

What is recorded, per shape: the vision tower, the prefix through the language layers, and all solver steps of a chunk.
Everywhere else than on CUDA the same code runs without being recorded or compiled, which is how it is tested. Nothing inside a
chunk reads a value back from the device.

A prefix lives in buffers that the next observation of the same shape overwrites (``gpu_layers.Slots``); an older one is
refused. What does not fit (gradients, several noise samples per observation, guidance, another kind of attention) runs as ever.

Shape letters: B batch, P prefix tokens, T suffix tokens, L chunk size, X padded action dimension, W width.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import singledispatch
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlaflow.backbones.base import Backbone, Prefix, Rotary
from vlaflow.backbones.inputs import Inputs
from vlaflow.backbones.pretrained import PretrainedBackbone
from vlaflow.backbones.qwen2_5_vl import QwenBackbone
from vlaflow.decoders.base import Decoder
from vlaflow.decoders.flow import FlowDecoder, FlowState
from vlaflow.decoders.latent_flow import LatentFlowDecoder
from vlaflow.decoders.model import Model
from vlaflow.decoders.tokens import TokenDecoder
from vlaflow.engine.gpu_layers import Buffers, Layer, LayerShape, Slots, Visible, fused_layer, merged_layers
from vlaflow.engine.gpu_vision import VisionPlan, merged_vision, see, vision_layer
from vlaflow.errors import CapabilityError
from vlaflow.nn.attention import KeyValues, causal_mask

KEPT = 4
"""Shapes whose buffers and recordings are kept; the one used longest ago makes room."""

Kept = TypeVar("Kept")


class Recent(OrderedDict[Hashable, Kept], Generic[Kept]):
    """The ``KEPT`` values used last."""

    def fetch(self, key: Hashable, make: Callable[[], Kept]) -> Kept:
        """The value of a key, made where there is none."""
        if key not in self:
            self[key] = make()
            if len(self) > KEPT:
                self.popitem(last=False)
        self.move_to_end(key)
        return self[key]


class CapturedPass:
    """A function of tensors recorded as one CUDA graph, which is replayed with new values.

    Args:
        function: of tensors and None; what it returns, and all tensors besides its arguments, must stay where they are.
        given: arguments to record with.
    """

    def __init__(self, function: Callable[..., Tensor], given: Sequence[Tensor | None]) -> None:
        self._function = function  # and with it all tensors that the graph reads
        with torch.inference_mode(False):  # whose tensors could not be written to in another mode
            self._given = [None if each is None else each.clone() for each in given]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # compiles, and lets libraries allocate what they keep
                function(*self._given)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._made = function(*self._given)

    def __call__(self, *given: Tensor | None) -> Tensor:
        """The function's value."""
        for kept, each in zip(self._given, given, strict=True):
            if kept is not None and each is not None:
                kept.copy_(each, non_blocking=True)
        self._graph.replay()
        return self._made.clone()  # the next call overwrites it


class CapturedPasses:
    """Functions of tensors, recorded once per key on CUDA and simply called elsewhere."""

    def __init__(self) -> None:
        self._kept: Recent[CapturedPass] = Recent()

    def run(self, key: Hashable, function: Callable[..., Tensor], given: Sequence[Tensor | None]) -> Tensor:
        """The function's value.

        Args:
            key: of everything that the function depends on besides the values of its arguments.
            function, given: see ``CapturedPass``.
        """
        if not any(each is not None and each.is_cuda for each in given):
            return function(*given)
        return self._kept.fetch(key, lambda: CapturedPass(function, given))(*given)


class FusedLanguage(PretrainedBackbone):
    """A pretrained backbone whose language layers run fused; mixed in before the class of a network that it takes over.

    Args:
        backbone: whose networks it shares.
        room: slots for suffix tokens.
    """

    def __init__(self, backbone: PretrainedBackbone, room: int) -> None:
        nn.Module.__init__(self)
        vars(self).update(vars(backbone))
        self.fused, eps = merged_layers(self.language.layers)
        self.shape, self.slots = LayerShape(self.spec.heads, self.spec.kv_heads, eps), room
        self.one_layer: Layer = fused_layer
        if self.fused[0].qkv.weight_OI.is_cuda:
            self.one_layer = torch.compile(fused_layer, dynamic=False)
        self._shapes: Recent[Buffers] = Recent()
        self._passes = CapturedPasses()

    def to_float8(self) -> None:
        """Have the fused language layers read float8 copies of their matrices.

        Raises:
            CapabilityError: torch or the GPU is too old, or a matrix has a size that is not divisible by 16.
        """
        matrix = self.fused[0].qkv.weight_OI
        sizes = {size for w in self.fused for each in (w.qkv, w.out, w.gate_up, w.down) for size in each.weight_OI.shape}
        old = matrix.is_cuda and torch.cuda.get_device_capability(matrix.device) < (8, 9)
        if old or not hasattr(functional, "scaled_mm") or any(size % 16 for size in sizes):
            raise CapabilityError(
                "Products of float8 need torch.nn.functional.scaled_mm, which torch 2.13 has, a GPU of compute capability 8.9, "
                "and sizes that are multiples of 16. Use --engine graphs."
            )
        self.fused = [w.in_float8() for w in self.fused]

    def run(self, prefix: Prefix, upto: int | None = None) -> Prefix:
        """See ``Backbone``; keys and values go into the buffers of this shape."""
        upto = self.spec.depth if upto is None else upto
        begun = all(isinstance(each, Slots) for each in prefix.kv_cache)
        if torch.is_grad_enabled() or prefix.rotary is None or not begun or upto <= prefix.depth:
            return super().run(prefix, upto)
        buffers = self._buffers_for(prefix)
        given = (prefix.hidden_BPW, *prefix.rotary, prefix.padding_mask_BP, prefix.mask_PP)
        depth, key = prefix.depth, (*_shapes(given), prefix.depth, upto, id(buffers))

        def layers(
            hidden_BPW: Tensor, cosine: Tensor, sine: Tensor, padding_BP: Tensor | None, mask_PP: Tensor | None
        ) -> Tensor:
            visible = self._visible(hidden_BPW, padding_BP, mask_PP)
            rotary = cosine[:, None], sine[:, None]
            for index in range(depth, upto):
                hidden_BPW = self._layer(index, hidden_BPW, rotary, buffers.pairs[index], visible)
            return hidden_BPW

        hidden_BPW = self._passes.run(key, layers, given)
        held = (buffers.hold(index, prefix.padding_mask_BP) for index in range(upto))
        embedded_BPW = prefix.hidden_BPW if depth == 0 else prefix.embedded_BPW
        return replace(prefix, hidden_BPW=hidden_BPW, kv_cache=tuple(held), embedded_BPW=embedded_BPW)

    def follow(
        self, suffix_BTW: Tensor, prefix: Prefix, depths: Sequence[int], mask_TS: Tensor | None = None
    ) -> tuple[list[Tensor], tuple[KeyValues, ...]]:
        """See ``Backbone``; the suffix's keys and values stand behind the prefix's, where later suffixes overwrite them."""
        held, tokens = prefix.kv_cache[: depths[-1]], suffix_BTW.shape[1]
        pairs = [each.room(tokens) for each in held if isinstance(each, Slots)]
        if torch.is_grad_enabled() or len(suffix_BTW) != prefix.batch or len(pairs) < len(held) or None in pairs:
            return super().follow(suffix_BTW, prefix, depths, mask_TS)
        found, written = [], []
        p = held[0].key_CGPE.shape[2]
        hidden_BTW, after = self.place(suffix_BTW, prefix)
        assert after is not None
        rotary = after[0][:, None], after[1][:, None]
        visible = Visible(p, _suffix_mask(held[0].mask_CP, mask_TS, p, tokens))
        for index, pair in enumerate(pairs):
            assert pair is not None
            hidden_BTW = self._layer(index, hidden_BTW, rotary, pair, visible)
            written.append(KeyValues(pair[0][:, :, p : p + tokens], pair[1][:, :, p : p + tokens]))
            if index + 1 in depths:
                found.append(self.finish(hidden_BTW).to(suffix_BTW.dtype))
        return found, tuple(written)

    def _layer(self, index: int, hidden_BTW: Tensor, rotary: Rotary, pair: tuple[Tensor, Tensor], visible: Visible) -> Tensor:
        return self.one_layer(hidden_BTW, rotary, pair, visible, self.fused[index], shape=self.shape)

    def _buffers_for(self, prefix: Prefix) -> Buffers:
        """Those that a prefix has begun to fill, or those of its shape, from now on its own."""
        if prefix.kv_cache:
            first = prefix.kv_cache[0]
            assert isinstance(first, Slots)
            return first.kept_by()
        spec, (b, p, _) = self.spec, prefix.hidden_BPW.shape
        like = prefix.hidden_BPW.new_empty(0)
        if torch.is_autocast_enabled(like.device.type):
            like = like.to(torch.get_autocast_dtype(like.device.type))
        shape = (b, spec.kv_heads, p + self.slots, spec.head_dim)
        buffers = self._shapes.fetch((shape, like.dtype), lambda: Buffers(spec.depth, shape, p, like))
        buffers.uses += 1
        return buffers

    def _visible(self, hidden_BPW: Tensor, padding_BP: Tensor | None, mask_PP: Tensor | None) -> Visible:
        """What the prefix's tokens see of each other."""
        causal, p = mask_PP is None and self.spec.attention == "causal", hidden_BPW.shape[1]
        if padding_BP is None:
            return Visible(mask=mask_PP, causal=causal)
        if causal:
            mask_PP = causal_mask(p, hidden_BPW.device)
        visible = padding_BP[:, None, None]
        return Visible(mask=visible if mask_PP is None else visible & mask_PP)


class FusedQwen(FusedLanguage, QwenBackbone):
    """Qwen2.5-VL with its vision tower fused as well.

    Args:
        backbone, room: see ``FusedLanguage``.
    """

    def __init__(self, backbone: QwenBackbone, room: int) -> None:
        super().__init__(backbone, room)
        self.fused_vision = merged_vision(self.network.visual.blocks)
        self.one_vision_layer: Callable[..., Tensor] = vision_layer
        if self.fused_vision[0].qkv.weight_OI.is_cuda:
            self.one_vision_layer = torch.compile(vision_layer, dynamic=False)
        self._plans: Recent[VisionPlan] = Recent()

    def image_features(self, inputs: Inputs) -> Tensor:
        """See ``QwenBackbone``."""
        if torch.is_grad_enabled():
            return super().image_features(inputs)
        visual = self.network.visual
        assert inputs.patches is not None
        assert inputs.grid_I3 is not None
        assert inputs.patch_position_N2 is not None
        sizes = tuple((rows, columns) for _, rows, columns in inputs.grid_I3.tolist())  # on the CPU
        merge, device = visual.spatial_merge_size, inputs.patches.device
        window = visual.window_size // visual.patch_size // merge
        plan = self._plans.fetch(sizes, lambda: VisionPlan.of(sizes, merge, window, device))
        given = (inputs.patches.to(visual.dtype), inputs.patch_position_N2)

        def tokens(patch_NC: Tensor, position_N2: Tensor) -> Tensor:
            return see(visual, self.fused_vision, patch_NC, position_N2, plan, layer=self.one_vision_layer)

        return self._passes.run((sizes, id(plan)), tokens, given)


class RecordedFlow(FlowDecoder):
    """A flow decoder whose solver steps are one recording.

    Args:
        flow: whose networks it shares.
    """

    def __init__(self, flow: FlowDecoder) -> None:
        nn.Module.__init__(self)
        vars(self).update(vars(flow))
        self._solvers = CapturedPasses()

    def advance(self, state: FlowState, prefix: Prefix, steps: int = 1) -> FlowState:
        """See ``Decoder``."""
        held = prefix.kv_cache
        if torch.is_grad_enabled() or state.guidance is not None or not held or len(state.x_BLX) != prefix.batch:
            return super().advance(state, prefix, steps)
        owners = {id(each.kept_by()) for each in held if isinstance(each, Slots)}
        # keys and values that do not stay where they are, such as those of latent tokens, are copied to where they do
        moving = [each for each in held if not isinstance(each, Slots)]
        tensors = [tensor for each in moving for tensor in (each.key_CGPE, each.value_CGPE)]
        others = (prefix.next_position_B, held[0].mask_CP, prefix.state_BS, prefix.action_mask_BLD)
        given = (state.x_BLX, state.start_BL, *others, *tensors)
        until = min(state.done + steps, state.sampling.steps)
        key = (*_shapes(given), *owners, prefix.depth, prefix.written, state.sampling, state.done, until)

        def solve(x_BLX: Tensor, start_BL: Tensor, *kept: Tensor | None) -> Tensor:
            position_B, mask_BP, state_BS, mask_BLD, *pairs = kept
            copies = iter(pairs)
            caches = [
                replace(each, mask_CP=mask_BP)
                if isinstance(each, Slots)
                else KeyValues(cast(Tensor, next(copies)), cast(Tensor, next(copies)), mask_BP)
                for each in held
            ]
            here = replace(
                prefix,
                kv_cache=tuple(caches),
                next_position_B=position_B,
                state_BS=state_BS,
                action_mask_BLD=mask_BLD,
            )
            begun = replace(state, x_BLX=x_BLX, start_BL=start_BL)
            return super(RecordedFlow, self).advance(begun, here, steps).x_BLX

        x_BLX = self._solvers.run(key, solve, given)
        return replace(state, x_BLX=x_BLX, done=until)


class FusedModel(Model):
    """A model whose passes are fused, and on CUDA recorded.

    Args:
        model: whose networks it shares; matrices that are merged become views there too.
        float8: round the matrices of the language layers, and what they multiply, to float8. The copies are read in place of
            the networks' own, which stay for what does not run fused.

    Raises:
        CapabilityError: its backbone is of another kind, or there is no float8 here.
    """

    def __init__(self, model: Model, *, float8: bool = False) -> None:
        room = model.decoder.slots if isinstance(model.decoder, TokenDecoder) else model.decoder.chunk_size
        backbone = fuse(model.backbone, room)
        if float8:
            backbone.to_float8()
        super().__init__(backbone, recorded(model.decoder), model.rater, model.depths)
        self.float8 = float8
        self.eval()

    @property
    def engine(self) -> str:
        """See ``Model``."""
        return f"fused layers and CUDA graphs{' in float8' * self.float8}"


@singledispatch
def fuse(backbone: Backbone, room: int) -> FusedLanguage:
    """The backbone with fused layers, and slots for so many suffix tokens.

    Raises:
        CapabilityError: for backbones that are not pretrained, whose layers are too small for it.
    """
    raise CapabilityError(f"A {type(backbone).__name__} has no fused layers. Use --engine eager.")


@fuse.register
def _(backbone: PretrainedBackbone, room: int) -> FusedLanguage:
    kind = type(f"Fused{type(backbone).__name__}", (FusedLanguage, type(backbone)), {})
    return cast(FusedLanguage, kind(backbone, room))


@fuse.register
def _(backbone: QwenBackbone, room: int) -> FusedLanguage:
    return FusedQwen(backbone, room)


@singledispatch
def recorded(decoder: Decoder[Any]) -> Decoder[Any]:
    """The decoder with its steps as one recording; those of tokens depend on the tokens, so there is none."""
    return decoder


@recorded.register
def _(decoder: FlowDecoder) -> Decoder[Any]:
    return RecordedFlow(decoder)


@recorded.register
def _(decoder: LatentFlowDecoder) -> Decoder[Any]:
    made = copy.copy(decoder)
    made._modules = {**decoder._modules, "flow": RecordedFlow(decoder.flow)}
    return made


def _suffix_mask(padding_BP: Tensor | None, mask_TS: Tensor | None, prefix: int, tokens: int) -> Tensor | None:
    """Which slots each suffix token sees, bool (B or 1, 1, T, P + T); None for all."""
    if padding_BP is None and mask_TS is None:
        return None
    like = padding_BP if padding_BP is not None else mask_TS
    assert like is not None
    if padding_BP is None:
        padding_BP = like.new_ones(1, prefix)
    if mask_TS is None:
        mask_TS = like.new_ones(tokens, tokens)
    rows = len(padding_BP)
    before = padding_BP[:, None, None].expand(rows, 1, tokens, prefix)
    return torch.cat((before, mask_TS[None, None].expand(rows, 1, tokens, tokens)), -1)


def _shapes(given: Sequence[Tensor | None]) -> tuple[Hashable, ...]:
    return tuple(None if each is None else (*each.shape, each.dtype) for each in given)
