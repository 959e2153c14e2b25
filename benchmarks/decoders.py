"""Milliseconds from an observation to a chunk for every kind of decoder on one backbone, and what their caches save.

    python -m benchmarks.decoders
    python -m benchmarks.decoders --views 4 --set backbone.cell=8      # a prefix of more than 576 tokens
    python -m benchmarks.decoders --checkpoint runs/dfm/emb runs/dfm/ar runs/dfm/full --dataset runs/a1/dataset

By default random weights, which serve as well as trained ones where every chunk takes as many evaluations as its config says:
tokens are coefficients without merges, so no sequence ends early. A prefix that is run again only when enough tokens have
changed depends on what the tokens do; time that on trained checkpoints. The first way is the one that others are compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro

from benchmarks._timing import Case, report, seconds_in_turns
from benchmarks.latency import compiled, make_observation, observations
from benchmarks.training import make_policy
from vlaflow.compute.base import ComputePolicy
from vlaflow.compute.dense import Dense
from vlaflow.compute.two_stage import TwoStage
from vlaflow.config import override
from vlaflow.decoders.autoregressive import AutoregressiveDecoder
from vlaflow.decoders.discrete_flow import DiscreteFlowDecoder
from vlaflow.decoders.flow import FlowDecoder
from vlaflow.decoders.tokens import TokenConfig
from vlaflow.policies.base import Policy
from vlaflow.policies.baselines import recipes as baselines
from vlaflow.policies.dfm_vla import recipes as dfm
from vlaflow.policies.objectives import PolicyObjective
from vlaflow.policies.recipe import DataSpec, TrainConfig
from vlaflow.simulators.metaworld_tasks import ACTION


@dataclass(frozen=True)
class Options:
    """What to measure.

    Args:
        checkpoint: policies; by default one of each decoder with random weights.
        dataset: where real observations come from; random pixels by default.
        steps: of flows and diffusions of tokens; continuous flows take ten.
        views: cameras of the default policies, each of (image size / cell)² tokens.
        set: changes to the default policies, e.g. backbone.width=384 backbone.heads=12.
        compile: also the continuous flow compiled (takes a minute or two, and a C++ compiler).
        threads: of torch.
        rounds: chunks per way.
        json: file for the results.
    """

    checkpoint: tuple[Path, ...] = ()
    dataset: Path | None = None
    steps: int = 16
    views: int = 1
    set: tuple[str, ...] = ()
    compile: bool = False
    threads: int = 1
    rounds: int = 100
    json: Path | None = None


def random_policies(changes: Sequence[str], views: int = 1) -> dict[str, Policy]:
    """One of each decoder on the same backbone, before any training, with tokenizers fitted on smooth random chunks."""
    rng = np.random.default_rng(0)
    chunks = rng.normal(size=(200, 16, ACTION.dim)).cumsum(1).clip(-4, 4).astype(np.float32) / 4
    data, made = DataSpec(ACTION.dim, ACTION.dim, tuple(f"view{number}" for number in range(views))), {}
    recipes: dict[str, Callable[[DataSpec], TrainConfig]] = {
        "flow": baselines.flow,
        "autoregression": baselines.coefficients_ar,
        "masked diffusion": baselines.masked_diffusion,
        "discrete flow": dfm.demo,
        "discrete flow, full attention": dfm.demo,
    }
    for name, recipe in recipes.items():
        objective = recipe(data).objective
        assert isinstance(objective, PolicyObjective)
        config = override(objective.policy, dict(pair.split("=", 1) for pair in changes))
        if isinstance(config.decoder, TokenConfig):
            config = replace(config, decoder=config.decoder.fitted(chunks))
        if name.endswith("full attention"):
            config = override(config, {"decoder.attention": "full"})
        made[name] = make_policy(config)
        made[name].model.eval()
    return made


def ways_of(name: str, policy: Policy, steps: int) -> dict[str, tuple[Policy, ComputePolicy]]:
    """The ways to decode with this policy that are worth comparing."""
    decoder = policy.model.decoder
    if isinstance(decoder, AutoregressiveDecoder):
        return {f"{name}, cached": (policy, Dense(1))}
    if not isinstance(decoder, DiscreteFlowDecoder):
        count = 10 if isinstance(decoder, FlowDecoder) else steps
        return {f"{name}, {count} steps": (policy, Dense(count))}
    split = (max(steps - 2, 1), min(2, steps - 1))
    if decoder.config.attention == "full":
        return {
            f"{name}, {split[0]}+{split[1]}, no cache": (policy, TwoStage(*split, refresh=0.0)),
            f"{name}, {split[0]}+{split[1]}, adaptive 0.1": (policy, TwoStage(*split, refresh=0.1)),
            f"{name}, {split[0]}+{split[1]}, adaptive 0.3": (policy, TwoStage(*split, refresh=0.3)),
            f"{name}, {split[0]}+{split[1]}, run once": (policy, TwoStage(*split, refresh=1.0)),
        }
    return {
        f"{name}, {split[0]}+{split[1]}, no cache": (policy, TwoStage(*split, refresh=0.0)),
        f"{name}, {split[0]}+{split[1]}, exact cache": (policy, TwoStage(*split)),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report."""
    options = tyro.cli(Options, description=__doc__, args=argv)
    torch.set_num_threads(options.threads)
    policies = {path.name: Policy.from_pretrained(path) for path in options.checkpoint} or random_policies(
        options.set, options.views
    )
    ways: dict[str, tuple[Policy, ComputePolicy]] = {}
    for name, policy in policies.items():
        ways |= ways_of(name, policy, options.steps)
        if options.compile and isinstance(policy.model.decoder, FlowDecoder):
            ways[f"{name}, 10 steps, torch.compile"] = (compiled(policy), Dense(10))
    first = next(iter(policies.values()))
    many = observations(first, options.dataset) if options.dataset else [make_observation(first)]
    counts: dict[str, list[int]] = {name: [] for name in ways}

    def arm(name: str) -> Callable[[], None]:
        policy, compute = ways[name]

        def once() -> None:
            number = len(counts[name])  # so every way meets the same observations with the same noise
            chunk = policy.act(many[number % len(many)], compute, generator=torch.Generator().manual_seed(number))
            counts[name].append(chunk.layer_passes)

        return once

    seconds = seconds_in_turns({name: arm(name) for name in ways}, options.rounds, warmup=min(options.rounds, 5))
    notes: dict[str, object] = {f"mean layer passes of {name}": round(float(np.mean(each)), 1) for name, each in counts.items()}
    notes |= {
        f"p50 and p99 of {name}": "{:.1f} and {:.1f} ms".format(*np.percentile(1e3 * np.array(each), (50, 99)))
        for name, each in seconds.items()
    }
    parameters = sum(p.numel() for p in first.model.parameters()) / 1e6
    title = f"{parameters:.1f} M parameters, chunk of {first.config.decoder.chunk_size}, batch 1"
    case = Case(title, "ms", {name: [s * 1e3 for s in each] for name, each in seconds.items()}, notes)
    return report("decoders", options, [case], options.json)


if __name__ == "__main__":
    raise SystemExit(main())
