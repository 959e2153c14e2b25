"""Language layers for a GPU: few, large kernels on buffers that never move.

A layer is a function of its weights, so one compiled program serves all layers of a network. Queries, keys and values are one
product, and so are gate and up; queries and keys are rotated together; keys and values are written into slots of one buffer per
layer, prefix first, suffix behind it, so that a suffix token's attention is one call over both.

Shape letters: B batch, P prefix tokens, T tokens of this pass, N slots (P and those of the suffix), W width, H heads, G
key/value heads, E head dimension, I inputs, O outputs, M rows of all tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlaflow.backbones.base import Rotary
from vlaflow.errors import CapabilityError
from vlaflow.nn.attention import KeyValues


class Matrix(NamedTuple):
    """A linear layer.

    Args:
        weight_OI: the outputs' rows.
        bias_O: None for none.
        scale_1O: by which each row of a float8 weight was divided; None in the number format of the network.
    """

    weight_OI: Tensor
    bias_O: Tensor | None
    scale_1O: Tensor | None = None

    @staticmethod
    def of(linear: nn.Linear) -> Matrix:
        """Its weights."""
        return Matrix(linear.weight, linear.bias)

    def product(self, x: Tensor) -> Tensor:
        """(..., I) → (..., O) in the format of ``x``. With float8 weights each row of ``x`` is rounded to float8 as well."""
        if self.scale_1O is None:
            return functional.linear(x, self.weight_OI, self.bias_O)
        row_MI, scale_M1 = rounded_to_float8(x.flatten(0, -2))
        kind = functional.ScalingType.RowWise
        made_MO = functional.scaled_mm(
            row_MI, self.weight_OI.t(), scale_M1, kind, self.scale_1O, kind, output_dtype=torch.bfloat16
        ).to(x.dtype)
        return (made_MO if self.bias_O is None else made_MO + self.bias_O).unflatten(0, x.shape[:-1])

    def in_float8(self) -> Matrix:
        """The same with a float8 weight."""
        weight_OI, scale_O1 = rounded_to_float8(self.weight_OI.detach())
        return Matrix(weight_OI, self.bias_O, scale_O1.t().contiguous())


def rounded_to_float8(x_MI: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in float8 (e4m3, three bits of mantissa) and float32 (M, 1), what each was divided by to use its whole range."""
    scale_M1 = (x_MI.float().abs().amax(-1, keepdim=True) / torch.finfo(FLOAT8).max).clamp(min=1e-12)
    return (x_MI.float() / scale_M1).to(FLOAT8), scale_M1


FLOAT8 = torch.float8_e4m3fn


class LayerWeights(NamedTuple):
    """One layer's, by what they do; a layer that does not norm its heads has None."""

    norm_in_W: Tensor
    qkv: Matrix
    out: Matrix
    norm_ffn_W: Tensor
    gate_up: Matrix
    down: Matrix
    norm_heads: Tensor | None = None
    """Of queries and keys, (H + G, 1, E)."""

    def in_float8(self) -> LayerWeights:
        """The same with float8 matrices."""
        matrices = {name: getattr(self, name).in_float8() for name in ("qkv", "out", "gate_up", "down")}
        return self._replace(**matrices)


@dataclass(frozen=True)
class LayerShape:
    """What a layer's tensors do not say.

    Args:
        heads, kv_heads: H and G.
        eps: of its norms.
    """

    heads: int
    kv_heads: int
    eps: float


class Visible(NamedTuple):
    """What the tokens of a pass see.

    Args:
        begin: number of slots before theirs, which are read and not written.
        mask: bool, broadcast to (B, H, T, begin + T), False where a token is not visible; None for all.
        causal: each token sees only those before it, and there are none in the slots.
    """

    begin: int = 0
    mask: Tensor | None = None
    causal: bool = False


def merged_layers(layers: nn.ModuleList) -> tuple[list[LayerWeights], float]:
    """The weights of transformers' language layers, and the epsilon of their norms.

    Matrices that are merged are held once: the modules' own become views of the merged ones.

    Raises:
        CapabilityError: these layers are made of other parts.
    """
    first: Any = layers[0]
    return [_merged(layer) for layer in layers], float(first.input_layernorm.variance_epsilon)


def _merged(layer: Any) -> LayerWeights:
    attention: Any = getattr(layer, "self_attn", None)
    mlp: Any = getattr(layer, "mlp", None)
    parts = [(attention, ("q_proj", "k_proj", "v_proj", "o_proj")), (mlp, ("gate_proj", "up_proj", "down_proj"))]
    if any(not hasattr(part, name) for part, names in parts for name in names):
        raise CapabilityError(
            f"A {type(layer).__name__} is made of other parts than the layers that run fused. Use --engine eager."
        )
    norm_heads = None
    if hasattr(attention, "q_norm"):  # Qwen3's family normalises each head's queries and keys
        pairs = [(attention.q_norm, attention.q_proj), (attention.k_norm, attention.k_proj)]
        scales = [norm.weight.detach().expand(len(project.weight) // len(norm.weight), -1) for norm, project in pairs]
        norm_heads = torch.cat(scales)[:, None].clone()
    return LayerWeights(
        layer.input_layernorm.weight,
        join(attention.q_proj, attention.k_proj, attention.v_proj),
        Matrix.of(attention.o_proj),
        layer.post_attention_layernorm.weight,
        join(mlp.gate_proj, mlp.up_proj),
        Matrix.of(mlp.down_proj),
        norm_heads,
    )


def join(*linears: nn.Linear) -> Matrix:
    """Several linear layers of one input as one; their parameters become views of its."""
    joined: list[Tensor | None] = []
    for name in ("weight", "bias"):
        own = [getattr(linear, name) for linear in linears]
        if own[0] is None:
            joined.append(None)
            continue
        whole = torch.cat([parameter.detach() for parameter in own])
        for linear, part in zip(linears, whole.split([len(parameter) for parameter in own]), strict=True):
            setattr(linear, name, nn.Parameter(part, requires_grad=False))
        joined.append(whole)
    weight, bias = joined
    assert weight is not None
    return Matrix(weight, bias)


def rotated(x_BHTE: Tensor, cosine_B1TE: Tensor, sine_B1TE: Tensor) -> Tensor:
    """x·cos + rotate_half(x)·sin."""
    first, second = x_BHTE.chunk(2, -1)
    return x_BHTE * cosine_B1TE + torch.cat((-second, first), -1) * sine_B1TE


def fused_layer(
    hidden_BTW: Tensor,
    rotary: Rotary,
    slots: tuple[Tensor, Tensor],
    visible: Visible,
    w: LayerWeights,
    *,
    shape: LayerShape,
) -> Tensor:
    """One pre-norm layer with rotary positions and SwiGLU on tokens that also read the slots before theirs.

    Args:
        hidden_BTW: hidden states.
        rotary: cosines and sines, (B, 1, T, E) each.
        slots: keys and values, (B, G, N, E) each; those from ``visible.begin`` on are overwritten with the tokens' own.
        visible: which tokens and slots are visible.
        w: weights.
        shape: heads and epsilon.

    Returns:
        (B, T, W).
    """
    (b, t, width), (key_BGNE, value_BGNE) = hidden_BTW.shape, slots
    h, g, e = shape.heads, shape.kv_heads, key_BGNE.shape[-1]
    x_BTW = functional.rms_norm(hidden_BTW.to(w.norm_in_W.dtype), (width,), w.norm_in_W, shape.eps)
    qkv = w.qkv.product(x_BTW).view(b, t, h + 2 * g, e).transpose(1, 2)
    turned = qkv[:, : h + g]
    if w.norm_heads is not None:
        turned = functional.rms_norm(turned.to(w.norm_heads.dtype), (e,), None, shape.eps) * w.norm_heads
    turned = rotated(turned, *rotary).to(value_BGNE.dtype)
    end = visible.begin + t
    key_BGNE[:, :, visible.begin : end] = turned[:, h:]
    value_BGNE[:, :, visible.begin : end] = qkv[:, h + g :]
    mixed_BHTE = functional.scaled_dot_product_attention(
        turned[:, :h],
        key_BGNE[:, :, :end],
        value_BGNE[:, :, :end],
        attn_mask=visible.mask,
        is_causal=visible.causal,
        enable_gqa=h != g,
    )
    hidden_BTW = hidden_BTW + w.out.product(mixed_BHTE.transpose(1, 2).reshape(b, t, h * e))
    x_BTW = functional.rms_norm(hidden_BTW.to(w.norm_ffn_W.dtype), (width,), w.norm_ffn_W, shape.eps)
    gate, up = w.gate_up.product(x_BTW).chunk(2, -1)
    return hidden_BTW + w.down.product(functional.silu(gate) * up)


Layer = Callable[..., Tensor]
"""``fused_layer``, or what it was compiled into."""


@dataclass(frozen=True)
class Slots(KeyValues):
    """Keys and values of a prefix in a buffer that has room for a suffix behind them.

    Args:
        buffer: (B, G, N, E) of keys and of values.
        owner: the buffers of all layers, and how often they have been given to a new prefix.
        use: at which of these times this prefix got them.
    """

    buffer: tuple[Tensor, Tensor] | None = None
    owner: Buffers | None = None
    use: int = 0

    def kept_by(self) -> Buffers:
        """The buffers of all layers.

        Raises:
            CapabilityError: another prefix has been written into them.
        """
        assert self.owner is not None
        if self.owner.uses != self.use:
            raise CapabilityError(
                "A later observation has overwritten the keys and values of this prefix. Read it again, or use --engine eager."
            )
        return self.owner

    def room(self, tokens: int) -> tuple[Tensor, Tensor] | None:
        """The layer's buffer, if so many tokens fit behind the prefix; raises as ``kept_by``."""
        self.kept_by()
        assert self.buffer is not None
        return self.buffer if self.key_CGPE.shape[2] + tokens <= self.buffer[0].shape[2] else None


class Buffers:
    """Keys and values of all layers for one shape of prefix, used again for every prefix of that shape.

    Args:
        layers: number of layers.
        shape: (B, G, N, E).
        prefix: P.
        like: of its type and device.
    """

    def __init__(self, layers: int, shape: tuple[int, int, int, int], prefix: int, like: Tensor) -> None:
        with torch.inference_mode(False):  # whose tensors could not be written to in another mode
            self.pairs = [(like.new_zeros(shape), like.new_zeros(shape)) for _ in range(layers)]
        self.prefix, self.uses = prefix, 0

    def hold(self, index: int, mask_BP: Tensor | None) -> Slots:
        """What layer ``index`` holds of the prefix."""
        key_BGNE, value_BGNE = self.pairs[index]
        p = self.prefix
        return Slots(key_BGNE[:, :, :p], value_BGNE[:, :, :p], mask_BP, (key_BGNE, value_BGNE), self, self.uses)
