"""Training samples per second: the demo policy's train step in both formats against the same model as first written.

    python -m benchmarks.training
    python -m benchmarks.training --compile --no-naive    # both formats also compiled, which takes minutes
    python -m benchmarks.training --ladder    # which of the differences matters how much on this CPU

A step's floating-point operations per second are stated as a share of what one large matrix product reaches in the same format,
in the same rounds.

Both have the same sizes, batch, noise samples and loss; a sample is one observation with one draw. "First written" means: fused
attention over one joint sequence with a mask, RMSNorm, tanh-GELU, convolutions in PyTorch's default layout, draws by repeating
the whole observation, AdamW as a loop, bf16 autocast whatever the CPU. Because bf16 can be slow on a CPU without AMX, the same
in float32 is measured too. Loading, weight averaging and logging are in neither.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch import Generator, Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks._naive import NaivePolicy, Style
from benchmarks._timing import Case, Summary, report, seconds_in_turns
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
from vlaflow.training.precision import chosen_format, training_threads

CPU = torch.device("cpu")
NAMES = {False: "float32", True: "bf16"}
FORMATS = {False: torch.float32, True: torch.bfloat16}
DEMO_TASKS = ("drawer-open-v3", "button-press-topdown-v3", "window-close-v3")


@dataclass(frozen=True)
class Options:
    """What to measure.

    Args:
        batch_size: observations per step; the recipe's by default.
        precision: of the library's step that comes first; "auto" is what the demo does.
        compile: also the library's steps with a compiled loss.
        naive: also the naive model.
        ladder: also the naive model in float32 with one difference after the other taken back.
        set: changes to the policy's config, e.g. backbone.width=384 backbone.heads=12.
        threads: of torch; one per physical core by default.
        side: of the square matrices of the product that a step is compared with.
        rounds: rounds of one step each.
        json: file for the results.
    """

    batch_size: int | None = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool = False
    naive: bool = True
    ladder: bool = False
    set: tuple[str, ...] = ()
    threads: int | None = None
    side: int = 1024
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


def our_step(policy: Policy, optim: OptimConfig, batch: Batch, bf16: bool, *, compiled: bool = False) -> Callable[[], float]:
    """What the trainer does in a step."""
    optimizer = build_optimizer(policy.model, optim, bf16=bf16)
    generator, weights = Generator().manual_seed(0), policy.model.parameters
    policy.model.train()
    loss_of = torch.compile(policy.loss_of) if compiled else policy.loss_of

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        ready = policy.prepare(batch)
        drawn = policy.draw(ready, generator, generator)
        with autocast(bf16, CPU):
            loss = loss_of(ready, drawn).total
        loss.backward()
        nn.utils.clip_grad_norm_(weights(), optim.clip_norm or math.inf)
        optimizer.step()
        return loss.item()

    return step


def product(bf16: bool, side: int) -> Callable[[], Tensor]:
    """A square matrix product in one of the formats."""
    one, other = torch.randn((2, side, side), generator=Generator().manual_seed(0)).to(FORMATS[bf16])
    return lambda: one @ other


def shares_of_peak(
    seconds: Mapping[str, Sequence[float]], steps: Mapping[str, tuple[str, str]], step_flops: float, product_flops: float
) -> dict[str, str]:
    """For each step, its operations per second as a share of the product's in the same round: median, smallest, largest.

    Args:
        seconds: by arm, one number a round.
        steps: arms, each with its format and the product in it.
        step_flops, product_flops: operations of a step and of a product.
    """
    found = {}
    for arm, (name, peak) in steps.items():
        pairs = zip(seconds[arm], seconds[peak], strict=True)
        shares = Summary.of([(step_flops / step) / (product_flops / whole) for step, whole in pairs])
        found[f"share of the matrix product's speed, {arm}"] = (
            f"{shares.median:.0%} ({shares.min:.0%} to {shares.max:.0%}) of {name}"
        )
    return found


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
        nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm or math.inf)
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
    size, noise_samples = options.batch_size or recipe.global_batch_size, config.decoder.noise_samples
    batch, first = make_batch(config, size), chosen_format(options.precision, CPU) == "bf16"
    arms: dict[str, Callable[[], object]] = {}
    steps: dict[str, tuple[str, str]] = {}
    for compiled in (False, True) if options.compile else (False,):
        for bf16 in (first, not first):
            name = f"vlaflow, {NAMES[bf16]}{', compiled' * compiled}"
            arms[name] = our_step(make_policy(config), recipe.optim, batch, bf16, compiled=compiled)
            steps[name] = (NAMES[bf16], f"product, {NAMES[bf16]}")
    with FlopCounterMode(display=False) as counter:
        next(iter(arms.values()))()
    arms |= {f"product, {NAMES[bf16]}": product(bf16, options.side) for bf16 in (False, True)}
    styles = {"naive, bf16 autocast": Style(bf16=True), "naive, float32": Style()} if options.naive else {}
    if options.ladder:
        styles["… with LayerNorm, erf-GELU"] = Style(norm=nn.LayerNorm, gelu="none")
        styles["… and fused AdamW"] = Style(norm=nn.LayerNorm, gelu="none", fused=True)
    policy = make_policy(config)
    arms |= {name: naive_step(policy, recipe.optim, batch, style) for name, style in styles.items()}
    seconds = seconds_in_turns(arms, options.rounds, warmup=2)
    notes = shares_of_peak(seconds, steps, counter.get_total_flops(), 2 * options.side**3)
    timed = {name: each for name, each in seconds.items() if not name.startswith("product")}
    parameters = sum(p.numel() for p in policy.model.parameters()) / 1e6
    name = f"{parameters:.1f} M parameters, {size} observations × {noise_samples} noise samples"
    return report("training", options, [Case.of_rates(name, "samples/s", size * noise_samples, timed, notes)], options.json)


if __name__ == "__main__":
    raise SystemExit(main())
