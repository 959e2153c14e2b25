"""What a chunk and a training step of AsyncVLA-3B cost on one GPU, through vlaflow's own code, in at most six minutes.

    python -m benchmarks.gpu --json runs/gpu.json
    python -m benchmarks.gpu --small                  # the same code with a small network, on a CPU as well

Weights are random and nothing is downloaded; the tokenizer is a small one that is written here. Chunks are of two views of 252
pixels, 8 actions and ten solver steps, in bfloat16, from the same noise in every way:

    act          Policy.act, from pixels to robot units
    eager        layers and solver as they are, on embedded tokens
    compiled     the same with torch.compile (prefix, and one solver step)
    CUDA graph   the same, recorded once

Training steps: all weights in float32 under bf16 autocast, and adapters on bfloat16, activations recomputed; with the memory
that ``vlaflow plan`` states next to the GPU's own count. Rooflines (``benchmarks.cost_model``) use what is measured first: the
card's copy bandwidth and the rate of a large product. What does not fit into the budget is left out, and said.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from torch import Generator, Tensor, nn

from benchmarks._timing import Case, report, say, seconds_in_turns
from benchmarks.cost_model import cost
from benchmarks.cost_model.hardware import Hardware
from benchmarks.cost_model.shapes import PolicyShape
from benchmarks.cost_model.shapes_of import Grid, flow_decoder, qwen_backbone
from tests.backbones.test_qwen2_5_vl import write_model
from vlaflow.backbones.base import Prefix
from vlaflow.backbones.pretrained_processor import FOLDER
from vlaflow.backbones.qwen2_5_vl import QwenConfig, qwen2_5_vl_3b
from vlaflow.compute.dense import Dense
from vlaflow.data.batch import Batch, ObservationBatch
from vlaflow.data.stats import FeatureStats
from vlaflow.decoders.flow import FlowConfig
from vlaflow.flows.sampling import Sampling
from vlaflow.nn.precision import autocast
from vlaflow.policies.adapters import LoraConfig, adapt
from vlaflow.policies.asyncvla.policy import qwen3b
from vlaflow.policies.asyncvla.recipes import libero
from vlaflow.policies.base import Policy
from vlaflow.policies.objectives import PolicyObjective
from vlaflow.policies.recipe import DataSpec, OptimConfig, TrainConfig
from vlaflow.simulators.metaworld_tasks import ACTION
from vlaflow.spec import Observation
from vlaflow.training.estimate import Machine, TrainingData, estimate
from vlaflow.training.moments import Masters
from vlaflow.training.optim import build_optimizer

VIEWS, SIDE, STEPS = ("front", "wrist"), 252, 10
SMALL = {
    "text_config": {
        "vocab_size": 336,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    },
    "vision_config": {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 64,
        "patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
    },
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Options:
    """What to measure.

    Args:
        device: by default a GPU where there is one.
        small: a network of three layers of 64, to try the script.
        batch_size: observations of a training step.
        rounds: chunks, and at most as many training steps, of each way.
        budget: seconds; what would begin later is left out.
        compile: also measure with torch.compile.
        json: file for the results.
    """

    device: str | None = None
    small: bool = False
    batch_size: int = 16
    rounds: int = 20
    budget: float = 340.0
    compile: bool = True
    json: Path | None = None


class Bench:
    """One run: options, device, the time that is left.

    Args:
        options: what to measure.
        folder: with tokenizer and image settings.
    """

    def __init__(self, options: Options, folder: Path) -> None:
        self.options, self.folder, self._began = options, folder, time.monotonic()
        self.device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.architecture = SMALL if options.small else qwen2_5_vl_3b()
        self.left_out: list[str] = []

    @property
    def on_gpu(self) -> bool:
        """Whether there is anything to wait for."""
        return self.device.type == "cuda"

    def has(self, seconds: float, what: str) -> bool:
        """Whether so much time is left; if not, it is noted."""
        enough = self.options.budget - (time.monotonic() - self._began) >= seconds
        if not enough:
            self.left_out.append(what)
        return enough

    def synced(self, call: Callable[[], object]) -> Callable[[], None]:
        """The call with everything done that it started."""

        def whole() -> None:
            call()
            if self.on_gpu:
                torch.cuda.synchronize()

        return whole

    def seconds(self, call: Callable[[], object], rounds: int = 5) -> float:
        """Median wall time of a call."""
        return float(np.median(seconds_in_turns({"": self.synced(call)}, rounds, warmup=2)[""]))

    def policy(self, dtype: Literal["float32", "bfloat16"], *, recompute: bool) -> Policy:
        """AsyncVLA-3B with random weights, on the device."""
        data = DataSpec(ACTION.dim, ACTION.dim, VIEWS)
        config = qwen3b(data, chunk_size=8, source=None)
        assert isinstance(config.backbone, QwenConfig)
        backbone = replace(config.backbone, architecture=self.architecture, dtype=dtype, recompute=recompute)
        rng = np.random.default_rng(0)
        stats = {name: FeatureStats.of(rng.normal(size=(500, ACTION.dim))) for name in ("state", "action")}
        with self.device:
            made = Policy.create(replace(config, backbone=backbone), ACTION, stats, 0, folder=self.folder)
        made.model.to(self.device).eval()
        return made

    def hardware(self) -> Hardware:
        """What the device reaches: bytes of a large copy, and products of large matrices in bfloat16, per second."""
        size = 2**28 if self.on_gpu else 2**22
        source = torch.ones(size, dtype=torch.bfloat16, device=self.device)
        target = torch.empty_like(source)
        bandwidth = 4 * size / self.seconds(lambda: target.copy_(source))
        side = 8192 if self.on_gpu else 256
        left = torch.ones(side, side, dtype=torch.bfloat16, device=self.device)
        return Hardware("measured", {"bfloat16": 2 * side**3 / self.seconds(lambda: left @ left)}, bandwidth)


def recorded(program: Callable[[], object]) -> Callable[[], object]:
    """A CUDA graph of a program."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            program()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        program()
    return graph.replay


@torch.inference_mode()
def chunks(bench: Bench, hardware: Hardware) -> list[Case]:
    """One observation's chunk in every way, and its parts."""
    policy = bench.policy("bfloat16" if bench.on_gpu else "float32", recompute=False)
    backbone, decoder = policy.model.backbone, policy.model.decoder
    rng = np.random.default_rng(0)
    images = {view: rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8) for view in VIEWS}
    seen = Observation(images, np.zeros(ACTION.dim, np.float32), "open the drawer")
    prefix = policy.embed(ObservationBatch.collate([seen]))
    run = backbone.run(prefix)
    state = decoder.start(run, [Generator().manual_seed(0)], Sampling(STEPS))
    advance = decoder.advance

    def solved(read: Prefix) -> Tensor:
        return decoder.finish(advance(state, read, STEPS))

    def program() -> Tensor:
        return solved(backbone.run(prefix))

    expected, ways = program(), {"eager": program}
    if bench.on_gpu and bench.has(60, "chunk in a CUDA graph"):
        place = torch.empty_like(expected)
        ways["CUDA graph"] = _or_why(bench, "CUDA graph", lambda: recorded(lambda: place.copy_(program())))
    if bench.options.compile and bench.has(200, "compiled chunk"):
        ways["compiled"] = _or_why(bench, "compiled", lambda: _compiled(policy, prefix, state))
    ways["act"] = lambda: policy.act(seen, Dense(STEPS))
    arms = {name: bench.synced(way) for name, way in ways.items() if way is not None}
    shape = _shape(bench, policy, prefix)
    floor = {"prefix": cost.layers(shape), "solver step": cost.step(shape)}
    notes = {
        "parameters": f"{sum(p.numel() for p in policy.model.parameters()):,}",
        "prefix": f"{prefix.hidden_BPW.shape[1]} tokens",
        **{f"roofline, {name}": f"{each.milliseconds(hardware):.3f} ms" for name, each in floor.items()},
        "roofline, layers and solver": f"{(floor['prefix'] + floor['solver step'] * STEPS).milliseconds(hardware):.3f} ms",
        "memory": _peak(bench),
    }
    taken = seconds_in_turns(arms, bench.options.rounds, warmup=3)
    whole = Case("a chunk, one observation", "ms", {name: [1e3 * s for s in each] for name, each in taken.items()}, notes)
    parts = {
        "layers": lambda: backbone.run(prefix),
        "embed (vision tower)": lambda: policy.embed(ObservationBatch.collate([seen])),
        "solver": lambda: solved(run),
    }
    apart = seconds_in_turns({name: bench.synced(part) for name, part in parts.items()}, bench.options.rounds)
    return [whole, Case("its parts, eager", "ms", {name: [1e3 * s for s in each] for name, each in apart.items()})]


def _compiled(policy: Policy, prefix: Prefix, state: Any) -> Callable[[], object]:
    """Prefix and solver steps compiled; it must make the same chunk."""
    backbone, decoder = policy.model.backbone, policy.model.decoder
    read, step = torch.compile(backbone.run), torch.compile(decoder.advance)

    def program() -> Tensor:
        run, now = read(prefix), state
        for _ in range(STEPS):
            now = step(now, run, 1)
        return decoder.finish(now)

    program()
    return program


def _or_why(bench: Bench, name: str, make: Callable[[], Callable[[], object]]) -> Any:
    """What ``make`` makes; a way that fails is left out with its reason, because the others are worth their minutes."""
    try:
        return make()
    except Exception as error:
        bench.left_out.append(f"{name} ({str(error).splitlines()[0][:200]})")
        return None


def _shape(bench: Bench, policy: Policy, prefix: Prefix) -> PolicyShape:
    images = Grid(SIDE // 28, len(VIEWS))
    others = prefix.hidden_BPW.shape[1] - images.tokens
    decoder = policy.config.decoder
    assert isinstance(decoder, FlowConfig)
    backbone = qwen_backbone(bench.architecture, images, others)
    return PolicyShape(backbone, flow_decoder(decoder, policy.model.backbone.spec, STEPS))


def _peak(bench: Bench) -> str:
    return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at most" if bench.on_gpu else "not measured on a CPU"


# -- training ------------------------------------------------------------------------------------------------------------


def batch_of(bench: Bench) -> Batch:
    """Random samples."""
    size, rng = bench.options.batch_size, np.random.default_rng(1)
    images = {view: torch.from_numpy(rng.integers(0, 256, (size, SIDE, SIDE, 3), np.uint8)) for view in VIEWS}
    action_BLD = torch.from_numpy(rng.normal(size=(size, 8, ACTION.dim)).astype(np.float32))
    observation = ObservationBatch(images, torch.zeros(size, ACTION.dim), ["open the drawer"] * size)
    index_B = torch.arange(size)
    return Batch(observation, action_BLD, torch.ones(size, 8, dtype=torch.bool), index_B, index_B)


def training(bench: Bench, hardware: Hardware) -> list[Case]:
    """A step on all weights, and one on adapters; each alone on the device, because both do not fit there together."""
    ways = {"all weights": ("float32", None), "adapters": ("bfloat16", LoraConfig())}
    return [
        step_of(bench, hardware, words, dtype, lora)
        for words, (dtype, lora) in ways.items()
        if bench.has(60, f"training step, {words}")
    ]


def step_of(
    bench: Bench, hardware: Hardware, words: str, dtype: Literal["float32", "bfloat16"], lora: LoraConfig | None
) -> Case:
    """A training step of one kind."""
    if bench.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    policy = bench.policy(dtype, recompute=True)
    model = policy.model.train()
    if lora is not None:
        adapt(model.to("cpu"), lora, 0)
        model.to(bench.device)
    optimizer = build_optimizer(model, OptimConfig(learning_rate=1e-5), Masters(model))
    prepared, generator = policy.prepare(batch_of(bench)).to(bench.device), Generator().manual_seed(0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with autocast(True, bench.device):
            loss = policy.loss(prepared, generator, generator).total
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    taken = seconds_in_turns({words: bench.synced(step)}, min(bench.options.rounds, 5), warmup=2)[words]
    shape = _shape(bench, policy, policy.begin(prepared))
    passes = 3 if lora is None else 2  # the frozen weights have no gradient
    flops = passes * bench.options.batch_size * (cost.prefix_pass(shape) + cost.step(shape)).flops
    notes = {
        "share of the measured rate of a large product": f"{flops / np.median(taken) / hardware.peak['bfloat16']:.2f}",
        "memory": _peak(bench),
    }
    if bench.on_gpu:
        notes["memory by vlaflow plan"] = f"{_planned(policy, bench, lora) / 2**30:.1f} GiB"
    rates = {words: [bench.options.batch_size / seconds for seconds in taken]}
    return Case(f"training step, {words}, {bench.options.batch_size} observations", "observations/s", rates, notes)


def _planned(policy: Policy, bench: Bench, lora: LoraConfig | None) -> float:
    """Bytes that ``vlaflow plan`` states for this step, with what it leaves for the CUDA context apart."""
    data = DataSpec(ACTION.dim, ACTION.dim, VIEWS)
    recipe: TrainConfig = replace(
        libero(data),
        objective=PolicyObjective(policy.config),
        global_batch_size=bench.options.batch_size,
        accumulate=1,
        lora=lora,
        optim=OptimConfig(),
    )
    found = estimate(recipe, Machine(gpus=1), TrainingData(data, side=SIDE))
    return found.layout(shard=False).memory.total


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report."""
    options = tyro.cli(Options, description=__doc__, args=argv)
    with tempfile.TemporaryDirectory() as temporary:
        write_model(Path(temporary) / FOLDER, tied=True)
        bench = Bench(options, Path(temporary))
        hardware = bench.hardware()
        say(f"{_name(bench)}: {hardware.bandwidth / 1e12:.3g} TB/s, {hardware.peak['bfloat16'] / 1e12:.3g} TFLOP/s in bfloat16")
        cases = [*chunks(bench, hardware), *training(bench, hardware)]
    notes = {
        "device": _name(bench),
        "copy": f"{hardware.bandwidth / 1e12:.3g} TB/s",
        "products in bfloat16": f"{hardware.peak['bfloat16'] / 1e12:.3g} TFLOP/s",
        "left out": "; ".join(bench.left_out) or "nothing",
    }
    first = replace(cases[0], notes={**cases[0].notes, **notes})
    return report("gpu", options, [first, *cases[1:]], options.json)


def _name(bench: Bench) -> str:
    return torch.cuda.get_device_name(bench.device) if bench.on_gpu else "CPU"


if __name__ == "__main__":
    raise SystemExit(main())
