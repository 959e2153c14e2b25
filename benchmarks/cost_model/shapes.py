"""The sizes of a policy that decide its cost, without the policy: layers, backbone, decoder, and the input they see.

A shape can be written down for a network of any size (``full_size.py`` does) or read off the config of one of ours
(``shapes_of.py``). What it costs is arithmetic on shapes and lives in ``cost.py``.

In the docstrings: T tokens, P prefix tokens, S keys, L actions per chunk, X (padded) action dimension, W width, H heads,
G key/value heads, E head dimension, F feed-forward width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vlaflow.backbones.base import BackboneSpec
from vlaflow.nn.block import BlockConfig


@dataclass(frozen=True)
class Piece:
    """Work that is done in one go, ``times`` over: one layer, one projection.

    Args:
        name: for tables.
        flops: two per multiply-add of its products, as torch.utils.flop_counter counts.
        weights: parameters read, each once however many tokens there are.
        numbers: activations, keys and values read or written.
        times: repetitions; a fraction in an expectation.
    """

    name: str
    flops: float
    weights: float
    numbers: float
    times: float = 1.0


@dataclass(frozen=True)
class Linear:
    """A matrix product with every token, behind a LayerNorm where ``norm`` says so."""

    inputs: int
    outputs: int
    bias: bool = True
    norm: bool = False

    @property
    def parameters(self) -> int:
        """Weights and biases, the norm's included."""
        return self.outputs * (self.inputs + self.bias) + 2 * self.inputs * self.norm

    def piece(self, name: str, tokens: float) -> Piece:
        """The product with T tokens."""
        moved = tokens * (self.inputs + self.outputs)
        return Piece(name, 2 * tokens * self.inputs * self.outputs, self.parameters, moved)


@dataclass(frozen=True)
class LayerShape:
    """One pre-norm transformer layer with grouped-query attention.

    Args:
        width, heads, kv_heads, head_dim, ffn: W, H, G, E, F.
        gated: three feed-forward matrices instead of two.
        qkv_bias, out_bias, ffn_bias: biases on those projections.
        norm_bias: LayerNorm (scale and shift) instead of RMSNorm (scale).
    """

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    gated: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    ffn_bias: bool = False
    norm_bias: bool = False

    @classmethod
    def of(cls, block: BlockConfig) -> LayerShape:
        """The shape of ``nn.block.Block``."""
        b = block
        sizes = (b.width, b.heads, b.kv_heads, b.head_dim, b.ffn, b.gated)
        return cls(*sizes, b.qkv_bias, b.qkv_bias and not b.gated, not b.gated, b.norm == "layer")

    @property
    def products(self) -> int:
        """Weights that multiply every token."""
        attention = self.width * (2 * self.heads + 2 * self.kv_heads) * self.head_dim
        return attention + (3 if self.gated else 2) * self.width * self.ffn

    @property
    def norm(self) -> int:
        """Parameters of one norm."""
        return self.width * (1 + self.norm_bias)

    @property
    def parameters(self) -> int:
        """Everything in the layer."""
        biases = self.qkv_bias * (self.heads + 2 * self.kv_heads) * self.head_dim + self.out_bias * self.width
        biases += self.ffn_bias * ((1 + self.gated) * self.ffn + self.width)
        return self.products + biases + 2 * self.norm

    def piece(self, name: str, tokens: float, keys: float, read: float | None = None, times: float = 1.0) -> Piece:
        """T tokens that each attend to S keys; a mask does not make the products smaller.

        Attention keeps its scores to itself (fused), other operations hand their results on through memory.

        Args:
            name: for tables.
            tokens: T.
            keys: S, own tokens included.
            read: tokens whose keys and values are fetched when that is not S (windows, several images at once).
            times: layers of this kind.
        """
        heads, kv_heads = self.heads * self.head_dim, self.kv_heads * self.head_dim
        flops = 2 * tokens * self.products + 4 * tokens * keys * heads
        between = 4 * self.width + 4 * heads + 2 * kv_heads + (6 if self.gated else 4) * self.ffn
        numbers = tokens * between + 2 * kv_heads * (keys if read is None else read)
        return Piece(name, flops, self.parameters, numbers, times)


@dataclass(frozen=True)
class BackboneShape:
    """A backbone and the observation it reads.

    Args:
        depth: layers.
        layer: each of them.
        prefix: tokens of the observation, P.
        embed: what happens before the first layer, vision tower included; every weight in it is read once.
        vocabulary: rows of the embedding table.
        tied: whether the language-model head is the embedding table itself.
        tables: other parameters that are looked up or added rather than multiplied (positions, byte embeddings).
    """

    depth: int
    layer: LayerShape
    prefix: int
    embed: tuple[Piece, ...] = ()
    vocabulary: int = 0
    tied: bool = True
    tables: int = 0

    @property
    def spec(self) -> BackboneSpec:
        """What stacks know of it."""
        own = self.layer
        return BackboneSpec(self.depth, own.width, own.heads, own.kv_heads, own.head_dim)

    @property
    def parameters(self) -> int:
        """Everything, the norm after the last layer included."""
        embed = sum(p.weights * p.times for p in self.embed)
        words = self.vocabulary * self.layer.width * (1 if self.tied else 2)
        return round(embed) + words + self.tables + self.depth * self.layer.parameters + self.layer.norm


@dataclass(frozen=True)
class DecoderShape:
    """What a decoder adds after the prefix at every solver step.

    Args:
        tokens: action tokens, L (for discrete decoders the token slots of a chunk).
        steps: solver steps of a chunk.
        enter: products that make each action token.
        leave: products that turn each token's hidden state into its answer.
        stack: "shared" runs the backbone's own layers, a shape runs one layer of its own per backbone layer, "none" reads
            the prefix's hidden states (regression from query tokens, which then belong to the prefix).
        context: products that make each further suffix token (a state, a time), one entry per token; learned tokens have none.
        sees: prefix tokens whose keys and values the stack reads; None for all.
        kv_projection: product that each layer applies once per chunk to the keys, and again to the values, it reads; None when
            they fit as they are.
        borrowed: ``enter`` and ``leave`` are rows of the backbone's own tables, no further parameters.
        tables: parameters that are added rather than multiplied (positions, queries).
    """

    tokens: int
    steps: int
    enter: tuple[Linear, ...] = ()
    leave: tuple[Linear, ...] = ()
    stack: LayerShape | Literal["shared", "none"] = "shared"
    context: tuple[tuple[Linear, ...], ...] = ()
    sees: int | None = None
    kv_projection: Linear | None = None
    borrowed: bool = False
    tables: int = 0

    @property
    def suffix(self) -> int:
        """Tokens that the stack moves."""
        return self.tokens + len(self.context)

    def parameters(self, depth: int) -> int:
        """Everything that is not the backbone's, over a backbone of ``depth`` layers."""
        linears = [linear for token in self.context for linear in token]
        linears += [] if self.borrowed else [*self.enter, *self.leave]
        linears += [] if self.kv_projection is None else [self.kv_projection] * depth
        own = depth * self.stack.parameters + self.stack.norm if isinstance(self.stack, LayerShape) else 0
        return own + self.tables + sum(linear.parameters for linear in linears)


@dataclass(frozen=True)
class RaterShape:
    """A confidence rater over prefix and chunk (``decoders.rater``)."""

    layer: LayerShape
    depth: int
    action_dim: int
    chunk_size: int

    @property
    def parameters(self) -> int:
        """Blocks, norm, projection, positions and the answer."""
        ends = Linear(self.action_dim, self.layer.width).parameters + Linear(self.layer.width, 1).parameters
        return self.depth * self.layer.parameters + self.layer.norm + self.chunk_size * self.layer.width + ends


@dataclass(frozen=True)
class PolicyShape:
    """Backbone, decoder and, where there is one, rater."""

    backbone: BackboneShape
    decoder: DecoderShape
    rater: RaterShape | None = None

    @property
    def parameters(self) -> int:
        """All of it."""
        rater = 0 if self.rater is None else self.rater.parameters
        return self.backbone.parameters + self.decoder.parameters(self.backbone.depth) + rater


def flow_codec(dim: int, width: int, head_layers: int | None = None) -> tuple[tuple[Linear, ...], tuple[Linear, ...]]:
    """``enter`` and ``leave`` of ``decoders.flow.ActionCodec`` for X dimensions at width W."""
    enter = (Linear(dim, width), Linear(2 * width, width), Linear(width, width))
    if head_layers is not None:
        return enter, residual_head(width, width, dim, head_layers)
    return enter, (Linear(width, width), Linear(width, dim))


def residual_head(inputs: int, hidden: int, outputs: int, layers: int = 2) -> tuple[Linear, ...]:
    """``nn.resnet.ResidualMLP``."""
    sizes = [(inputs, hidden), *[(hidden, hidden)] * layers, (hidden, outputs)]
    return tuple(Linear(a, b, norm=True) for a, b in sizes)
