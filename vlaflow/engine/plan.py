"""Which programs a policy's chunks call: those of a compute policy's passes, for batches and lengths of instruction.

Shape letters: B batch, L chunk size, T tokens, W width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import singledispatch
from typing import Any

import torch
from torch import Generator, Tensor, nn

from vlaflow.backbones.base import Backbone, Prefix
from vlaflow.backbones.inputs import Inputs
from vlaflow.compute.base import Passes
from vlaflow.decoders.autoregressive import AutoregressiveDecoder
from vlaflow.decoders.base import Decoder
from vlaflow.decoders.discrete_flow import DiscreteFlowDecoder
from vlaflow.decoders.flow import FlowDecoder
from vlaflow.decoders.latent_flow import LatentFlowDecoder
from vlaflow.decoders.model import Model
from vlaflow.decoders.rater import ConfidenceRater
from vlaflow.decoders.regression import RegressionDecoder
from vlaflow.decoders.tokens import TokenDecoder
from vlaflow.engine import modules, programs
from vlaflow.engine.programs import Program, ProgramKey
from vlaflow.errors import CapabilityError
from vlaflow.flows.sampling import Sampling
from vlaflow.stacks.shared import Cache


def needed(model: Model, inputs: Iterable[Inputs], passes: Passes) -> list[Program]:
    """The programs of these passes.

    Args:
        model: folded networks.
        inputs: examples, one for each batch and length of instruction.
        passes: of all compute policies.
    """
    found: dict[ProgramKey, Program] = {}
    with torch.no_grad():
        for each in inputs:
            for program in _of(model, each, passes):
                found.setdefault(program.key, program)
    return list(found.values())


def require_programmable(backbone: Backbone, inputs: Inputs) -> None:
    """Refuse a backbone whose prefix would be another one if programs computed it.

    Args:
        backbone: any package's.
        inputs: of observations whose instructions differ in length.

    Raises:
        CapabilityError: saying what a program is not given, or has no room for; of a pretrained one that its inputs have no
            fixed shapes, and its time goes into reading weights, which programs read as well.
    """
    kind = type(backbone).__name__
    if backbone.spec.rotary:
        raise CapabilityError(
            f"A {kind} has no programs: its shapes depend on images and words, and its chunks take "
            "their time for reading weights. Run it with --engine eager, or on a GPU with --engine graphs."
        )
    given_BP = inputs.padding_mask_BP
    with torch.no_grad():
        prefix = backbone.embed(inputs)
        bare = backbone.embed(replace(inputs, padding_mask_BP=None if given_BP is None else torch.ones_like(given_BP)))
    mask_BP = prefix.padding_mask_BP
    visible_BPW = prefix.hidden_BPW if mask_BP is None else prefix.hidden_BPW[mask_BP]
    unmasked_BPW = bare.hidden_BPW if mask_BP is None else bare.hidden_BPW[mask_BP]
    reasons = {
        "it takes pictures of any size, and a program takes one (let views state the side)": None in backbone.views.values(),
        "its processor makes tensors without a row for each observation": any(
            len(tensor) != len(inputs) for tensor in programs.tensors_of(inputs)
        ),
        "its prefix has positions or a mask of its own, which programs are not given": any(
            each is not None for each in (prefix.rotary, prefix.mask_PP, prefix.next_position_B)
        ),
        "its prefix hides other tokens than the padding mask of its processor": not _same(mask_BP, given_BP),
        "its embedding reads the padding mask, which programs are not given": not torch.equal(visible_BPW, unmasked_BPW),
        "its prefix has another state than its inputs": prefix.state_BS is not None
        and not torch.equal(prefix.state_BS, inputs.state_BS),
    }
    for reason, found in reasons.items():
        if found:
            raise CapabilityError(f"A {kind} has no programs: {reason}. Run it with --engine eager.")


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))


def _of(model: Model, inputs: Inputs, passes: Passes) -> Iterator[Program]:
    backbone, bare = model.backbone, programs.unmasked(inputs)
    yield Program(programs.embed_key(inputs), modules.Embed(backbone, bare), tuple(programs.tensors_of(bare)))
    embedded = programs.embedded(backbone, inputs)

    def prefix_at(depth: int, draws: int) -> Prefix:
        return model.read(embedded.select(torch.arange(len(inputs)).repeat_interleave(draws)), depth)

    for start, upto, draws in sorted(passes.reads):
        before = prefix_at(start, draws)
        if prefix_at(upto, draws).depth == upto:  # a decoder may read no prefix ahead of its tokens
            module = modules.RunLayers(backbone, start, upto)
            yield Program(programs.run_key(before, upto), module, tuple(programs.run_inputs(before)))
    for depth, draws in sorted(passes.steps):
        yield from steps(model.decoder, backbone, prefix_at(depth, draws))
    rater = model.rater
    if not isinstance(rater, ConfidenceRater):  # of another kind of rater nothing is known, of its steps as of a decoder's
        return
    for depth, draws in sorted(passes.ratings):
        prefix = prefix_at(depth, draws)
        action_BLD = torch.zeros(prefix.batch, model.decoder.chunk_size, model.decoder.action_dim)
        examples = (*programs.run_inputs(prefix), action_BLD)
        yield Program(programs.rating_key(prefix), modules.Rate(backbone, rater), examples)


@singledispatch
def steps(decoder: Decoder[Any], backbone: Backbone, prefix: Prefix) -> list[Program]:
    """Programs of a decoder's steps on this prefix; none by default."""
    return []


@steps.register
def _(decoder: FlowDecoder, backbone: Backbone, prefix: Prefix) -> list[Program]:
    state = decoder.start(prefix, [Generator().manual_seed(0) for _ in range(prefix.batch)], Sampling(1))
    clock_BL, time_BTW = state.start_BL, decoder.codec.times(state.start_BL)
    # tensors of their own: export would take one that is given twice for one argument
    examples = (state.x_BLX, state.x_BLX.clone(), clock_BL, -clock_BL, time_BTW, *programs.reading_inputs(prefix))
    return [Program(programs.reading_key("step", prefix), modules.SolverStep(backbone, decoder), examples)]


@steps.register
def _(decoder: RegressionDecoder, backbone: Backbone, prefix: Prefix) -> list[Program]:
    module, examples = modules.AnswerAtOnce(backbone, decoder), tuple(programs.reading_inputs(prefix))
    return [Program(programs.reading_key("answer", prefix), module, examples)]


@steps.register
def _(decoder: TokenDecoder, backbone: Backbone, prefix: Prefix) -> list[Program]:
    """Of tokens that all see one another."""
    embedded_BTW = decoder.behind_mark(torch.zeros(prefix.batch, decoder.slots, backbone.spec.width))
    examples = (embedded_BTW, *programs.reading_inputs(prefix))
    return [Program(programs.reading_key("look", prefix), modules.Look(backbone, decoder), examples)]


@steps.register
def _(decoder: DiscreteFlowDecoder, backbone: Backbone, prefix: Prefix) -> list[Program]:
    """Where the prefix sees the tokens: of both together, and of tokens that read the prefix as it was a few steps before."""
    if prefix.depth > 0:
        return steps.dispatch(TokenDecoder)(decoder, backbone, prefix)
    depth = backbone.spec.depth
    embedded_BTW = decoder.behind_mark(torch.zeros(prefix.batch, decoder.slots, backbone.spec.width))
    examples = (embedded_BTW, *programs.run_inputs(prefix))
    joint = Program(programs.joint_key(prefix, depth), modules.LookJointly(backbone, decoder, depth), examples)
    return [joint, *steps.dispatch(TokenDecoder)(decoder, backbone, backbone.run(prefix, depth))]


@steps.register
def _(decoder: AutoregressiveDecoder, backbone: Backbone, prefix: Prefix) -> list[Program]:
    return [_next(decoder.head, backbone, decoder.stack.cache(prefix, decoder.slots))]


@steps.register
def _(decoder: LatentFlowDecoder, backbone: Backbone, prefix: Prefix) -> list[Program]:
    generators = [Generator().manual_seed(0) for _ in range(prefix.batch)]
    made = steps(decoder.flow, backbone, decoder.start(prefix, generators, Sampling(1)).context)
    if decoder.latent.config.answer != "parallel":
        return [_next(decoder.latent.head, backbone, decoder.latent.cache(prefix)), *made]
    module, examples = modules.WriteCodes(backbone, decoder.latent), tuple(programs.reading_inputs(prefix))
    return [Program(programs.reading_key("codes", prefix), module, examples), *made]


def _next(head: nn.Module, backbone: Backbone, cache: Cache) -> Program:
    """Of one more token behind these."""
    token_B1W = torch.zeros(len(cache.layers[0].key_CGPE), 1, backbone.spec.width)
    return Program(programs.next_key(cache), modules.NextToken(backbone, head), tuple(programs.next_inputs(token_B1W, cache)))
