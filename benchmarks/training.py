"""Training samples per second: the demo policy's train step against the same model as one would first write it.

    python -m benchmarks.training
    python -m benchmarks.training --ladder    # which of the differences matters how much on this CPU

Both have the same sizes, batch, noise samples and loss; a sample is one observation with one draw. "First written" means: fused
attention over one joint sequence with a mask, RMSNorm, tanh-GELU, convolutions in PyTorch's default layout, draws by repeating
the whole observation, AdamW as a loop, bf16 autocast whatever the CPU. Because bf16 can be slow on a CPU without AMX, the same
in float32 is measured too. Loading, weight averaging and logging are in neither.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch import Generator, nn

from benchmarks._naive import NaivePolicy, Style
from benchmarks._timing import Case, report, seconds_in_turns
from vlaflow.config import override
from vlaflow.data.batch import Batch, ObservationBatch
from vlaflow.data.stats import FeatureStats
from vlaflow.flows import gaussian
from vlaflow.nn.precision import autocast
from vlaflow.policies.asyncvla.policy import tiny
from vlaflow.policies.asyncvla.recipes import demo
from vlaflow.policies.base import Policy, PolicyConfig
from vlaflow.policies.recipe import DataSpec, OptimConfig
from vlaflow.simulators.metaworld_tasks import ACTION, TASKS
from vlaflow.training.optim import build_optimizer
from vlaflow.training.precision import training_threads, use_bf16

CPU = torch.device("cpu")
DEMO_TASKS = ("drawer-open-v3", "button-press-topdown-v3", "window-close-v3")


@dataclass(frozen=True)
class Options:
    """What to measure.

    Args:
        batch_size: observations per step; the recipe's by default.
        precision: of the library's step; "auto" is what the demo does.
        ladder: also the naive model in float32 with one difference after the other taken back.
        set: changes to the policy's config, e.g. backbone.width=384 backbone.heads=12.
        threads: of torch; one per physical core by default.
        rounds: rounds of one step each.
        json: file for the results.
    """

    batch_size: int | None = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    ladder: bool = False
    set: tuple[str, ...] = ()
    threads: int | None = None
    rounds: int = 15
    json: Path | None = None


def make_policy(config: PolicyConfig) -> Policy:
    """The policy with random weights, for data with mean 0 and deviation 1."""
    rng = np.random.default_rng(0)
    stats = {name: FeatureStats.of(rng.normal(size=(500, ACTION.dim))) for name in ("state", "action")}
    return Policy.create(config, ACTION, stats, 0)


def make_batch(config: PolicyConfig, size: int) -> Batch:
    """Random images and numbers, the demo's sentences."""
    rng, chunk_size = np.random.default_rng(1), config.decoder.chunk_size
    shape = (size, config.backbone.image_size, config.backbone.image_size, 3)
    images = {view: torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8)) for view in config.backbone.views}
    state_BS = torch.from_numpy(rng.normal(size=(size, ACTION.dim)).astype(np.float32))
    words = [TASKS[DEMO_TASKS[i % len(DEMO_TASKS)]].instruction for i in range(size)]
    action_BLD = torch.from_numpy(rng.normal(size=(size, chunk_size, ACTION.dim)).astype(np.float32))
    index_B = torch.arange(size)
    return Batch(ObservationBatch(images, state_BS, words), action_BLD, torch.ones(size, chunk_size).bool(), index_B, index_B)


def our_step(policy: Policy, optim: OptimConfig, batch: Batch, bf16: bool) -> Callable[[], float]:
    """What the trainer does in a step."""
    optimizer, generator, weights = build_optimizer(policy.model, optim), Generator().manual_seed(0), policy.model.parameters
    policy.model.train()

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with autocast(bf16, CPU):
            loss = policy.loss(policy.prepare(batch), generator, generator).total
        loss.backward()
        nn.utils.clip_grad_norm_(weights(), optim.clip_norm)
        optimizer.step()
        return loss.item()

    return step


def naive_step(policy: Policy, optim: OptimConfig, batch: Batch, style: Style) -> Callable[[], float]:
    """The naive model's."""
    c, noise_samples = policy.config.decoder, policy.config.decoder.noise_samples
    with torch.random.fork_rng(devices=[]):
        model = NaivePolicy(policy.config.backbone, c.action_dim, c.chunk_size, style)
    optimizer = torch.optim.AdamW(
        model.parameters(), optim.learning_rate, optim.betas, weight_decay=optim.weight_decay, fused=style.fused, foreach=False
    )
    generator, seen = Generator().manual_seed(0), batch.observation
    rows = np.repeat(np.arange(len(seen)), noise_samples)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        repeated = ObservationBatch(
            {view: image[rows] for view, image in seen.images.items()},
            seen.state_BS[rows],
            [seen.instructions[i] for i in rows],
        )
        action_BLD = batch.action_BLD[rows]
        mask_BL = gaussian.sample_mask(len(rows), c.chunk_size, generator, c.whole)
        clock_BL = gaussian.sample_time((len(rows), 1), generator) * mask_BL
        noise_BLD = torch.randn(action_BLD.shape, generator=generator)
        with autocast(style.bf16, CPU):
            x_BLD = gaussian.interpolate(action_BLD, noise_BLD, clock_BL)
            error_BLD = model.velocity(repeated, repeated.state_BS, x_BLD, clock_BL).float() - (noise_BLD - action_BLD)
            loss = gaussian.masked_mean_square(error_BLD, mask_BL)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
        optimizer.step()
        return loss.item()

    return step


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report."""
    options = tyro.cli(Options, description=__doc__, args=argv)
    torch.set_num_threads(options.threads or training_threads())
    data = DataSpec(ACTION.dim, ACTION.dim, ("corner2",))
    recipe = demo(data)
    # the naive model has one answer, so ours is measured with one
    config = override(replace(tiny(data), exits=None), dict(pair.split("=", 1) for pair in options.set))
    size, bf16 = options.batch_size or recipe.global_batch_size, use_bf16(options.precision, CPU)
    batch, policy = make_batch(config, size), make_policy(config)
    styles = {"naive, bf16 autocast": Style(bf16=True), "naive, float32": Style()}
    if options.ladder:
        styles["… with LayerNorm, erf-GELU"] = Style(norm=nn.LayerNorm, gelu="none")
        styles["… and fused AdamW"] = Style(norm=nn.LayerNorm, gelu="none", fused=True)
    arms = {f"vlaflow, {'bf16' if bf16 else 'float32'}": our_step(policy, recipe.optim, batch, bf16)}
    arms |= {name: naive_step(policy, recipe.optim, batch, style) for name, style in styles.items()}
    noise_samples = config.decoder.noise_samples
    seconds = seconds_in_turns(arms, options.rounds, warmup=2)
    parameters = sum(p.numel() for p in policy.model.parameters()) / 1e6
    name = f"{parameters:.1f} M parameters, {size} observations × {noise_samples} noise samples"
    return report("training", options, [Case.of_rates(name, "samples/s", size * noise_samples, seconds)], options.json)


if __name__ == "__main__":
    raise SystemExit(main())
