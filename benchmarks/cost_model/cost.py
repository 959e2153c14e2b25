"""What a policy costs before it exists: parameters, floating-point operations, bytes moved and roofline milliseconds.

Pure arithmetic on shapes (``shapes.py``) and a hardware line (``hardware.py``), for one observation.

- **Operations** are two per multiply-add of matrix products, convolutions and the two products of attention. Norms,
  activations, softmax, rotations and additions are not counted (about 0.01 % of a large layer); masked products are
  counted whole. That is the convention of torch.utils.flop_counter, and the tests hold the two against each other.
- **Bytes**: every weight once per pass; activations once out and once in between products, attention scores never;
  the keys and values that are attended to once per layer and pass.
- **Milliseconds**: for every piece (a layer, a projection) the longer of arithmetic and memory, summed over pieces. Within a
  piece the two overlap perfectly and nothing is launched, so this is a bound from below. Compiled programs come within a
  factor of two of it, eager ones at batch 1 are 10 to 50 times slower, because every layer pass costs them about a
  millisecond of launches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from benchmarks.cost_model.hardware import BFLOAT16, Hardware, NumberFormat
from benchmarks.cost_model.shapes import Linear, Piece, PolicyShape
from vlaflow.errors import ConfigError


@dataclass(frozen=True)
class Cost:
    """Pieces of work, which add up."""

    pieces: tuple[Piece, ...] = ()

    @property
    def flops(self) -> float:
        """Operations, two per multiply-add."""
        return sum(p.times * p.flops for p in self.pieces)

    def moved(self, numbers: NumberFormat = BFLOAT16) -> float:
        """Bytes between processor and memory."""
        return sum(p.times * _moved(p, numbers) for p in self.pieces)

    def milliseconds(self, hardware: Hardware, numbers: NumberFormat = BFLOAT16) -> float:
        """Roofline time, piece by piece; no program is faster."""
        return sum(p.times * hardware.milliseconds(p.flops, _moved(p, numbers), numbers) for p in self.pieces)

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.pieces + other.pieces)

    def __mul__(self, times: float) -> Cost:
        return Cost(tuple(replace(p, times=p.times * times) for p in self.pieces))


def _moved(piece: Piece, numbers: NumberFormat) -> float:
    return numbers.weight * piece.weights + numbers.number * piece.numbers


# -- passes --------------------------------------------------------------------------------------------------------------


def embed(shape: PolicyShape) -> Cost:
    """Everything before the first layer: vision tower, projections, rows of the embedding table."""
    own = shape.backbone
    return Cost((*own.embed, Piece("embedding", 0, 0, own.prefix * own.layer.width)))


def layers(shape: PolicyShape, upto: int | None = None, since: int = 0) -> Cost:
    """Backbone layers ``since`` … ``upto`` − 1 over the prefix, all of them by default."""
    own = shape.backbone
    upto = _checked(shape, own.depth if upto is None else upto)
    return Cost((own.layer.piece("layer", own.prefix, own.prefix, times=max(0, upto - since)),))


def prefix_pass(shape: PolicyShape, upto: int | None = None) -> Cost:
    """One full pass over the observation, or down to depth ``upto``."""
    return embed(shape) + layers(shape, upto)


def step(shape: PolicyShape, depth: int | None = None) -> Cost:
    """One solver step of a decoder that reads a prefix of this depth (full depth by default)."""
    own, decoder = shape.backbone, shape.decoder
    depth = _checked(shape, own.depth if depth is None else depth)
    pieces = [linear.piece("enter", decoder.tokens) for linear in decoder.enter]
    pieces += [linear.piece("context", 1) for token in decoder.context for linear in token]
    if decoder.stack != "none":
        layer = own.layer if decoder.stack == "shared" else decoder.stack
        pieces.append(layer.piece("stack", decoder.suffix, _prefix_tokens(shape) + decoder.suffix, times=depth))
    pieces += [linear.piece("leave", decoder.tokens) for linear in decoder.leave]
    return Cost(tuple(pieces))


def step_without_cache(shape: PolicyShape) -> Cost:
    """One solver step at full depth that runs the prefix again, in one pass with the suffix.

    Raises:
        ConfigError: for a decoder whose stack is not the backbone's own.
    """
    own, decoder = shape.backbone, shape.decoder
    if decoder.stack != "shared":
        raise ConfigError("Only a decoder on the shared stack runs the prefix again with its own tokens.")
    tokens = own.prefix + decoder.suffix
    return step(shape, 0) + Cost((own.layer.piece("layer", tokens, tokens, times=own.depth),))


def once(shape: PolicyShape, depth: int | None = None) -> Cost:
    """What a decoder does once per chunk before its steps: fitting the prefix's keys and values to its own width."""
    kv_projection, depth = shape.decoder.kv_projection, shape.backbone.depth if depth is None else depth
    return Cost() if kv_projection is None else Cost((kv_projection.piece("kv projection", 2 * _prefix_tokens(shape)),)) * depth


def rating(shape: PolicyShape) -> Cost:
    """One look of the rater at prefix and chunk.

    Raises:
        ConfigError: for a policy without one.
    """
    rater = shape.rater
    if rater is None:
        raise ConfigError("This policy has no rater whose cost could be counted.")
    tokens = shape.backbone.prefix + rater.chunk_size
    blocks = rater.layer.piece("rater", tokens, tokens, times=rater.depth)
    project = Linear(rater.action_dim, rater.layer.width).piece("rater", rater.chunk_size)
    return Cost((project, blocks, Linear(rater.layer.width, 1).piece("rater", rater.chunk_size)))


def words(shape: PolicyShape, tokens: int) -> Cost:
    """Language-model tokens written one after the other behind the prefix, each through all layers and the vocabulary."""
    own = shape.backbone
    mean_keys = own.prefix + (tokens + 1) / 2
    vocabulary = Linear(own.layer.width, own.vocabulary, bias=False).piece("vocabulary", 1)
    return Cost((own.layer.piece("word", 1, mean_keys, times=own.depth), vocabulary)) * tokens


# -- chunks --------------------------------------------------------------------------------------------------------------


def chunk(shape: PolicyShape, depth: int | None = None, steps: int | None = None) -> Cost:
    """Prefix down to ``depth``, then all solver steps there: the dense policy, or an exit that is known beforehand."""
    return ladder(shape, (shape.backbone.depth if depth is None else depth,), steps)


def ladder(shape: PolicyShape, depths: Sequence[int], steps: int | None = None) -> Cost:
    """A prefix that stops at each of these depths to make a chunk there, and continues from where it stopped.

    This is early exit by consistency (A1): the exit is taken at the last depth, after chunks were made and compared at all
    of them. The comparison itself costs nothing worth counting.

    Args:
        shape: the policy.
        depths: layers run when a chunk is made, rising.
        steps: solver steps at each depth; the decoder's own number by default.
    """
    if not depths or list(depths) != sorted(set(depths)):
        raise ConfigError(f"Depths at which chunks are made must rise, got {list(depths)}.")
    steps = shape.decoder.steps if steps is None else steps
    total = prefix_pass(shape, depths[-1]) + once(shape, depths[-1])
    for depth in depths:
        total += step(shape, depth) * steps
    return total


def expected(shape: PolicyShape, shares: Mapping[int, float], steps: int | None = None, before: Sequence[int] = ()) -> Cost:
    """The mean cost of early exit.

    Args:
        shape: the policy.
        shares: probability of leaving at each depth (layers run), all exits included, summing to 1.
        steps: solver steps per exit.
        before: depths below the first exit at which a chunk is made only to compare with (A1 makes one after its first
            layer).

    Raises:
        ConfigError: for shares that are negative or do not sum to 1.
    """
    if min(shares.values(), default=-1) < 0 or abs(sum(shares.values()) - 1) > 1e-9:
        raise ConfigError(f"Exit shares must be probabilities that sum to 1, got {dict(shares)}.")
    exits, total = sorted(shares), Cost()
    for number, depth in enumerate(exits, 1):
        if shares[depth]:
            total += ladder(shape, (*before, *exits[:number]), steps) * shares[depth]
    return total


def mean_depth(shares: Mapping[int, float]) -> float:
    """Layers run on average."""
    return sum(depth * share for depth, share in shares.items())


def _prefix_tokens(shape: PolicyShape) -> int:
    return shape.backbone.prefix if shape.decoder.sees is None else shape.decoder.sees


def _checked(shape: PolicyShape, depth: int) -> int:
    if not 0 <= depth <= shape.backbone.depth:
        raise ConfigError(f"The backbone has {shape.backbone.depth} layers, depth {depth} is not one of them.")
    return depth
