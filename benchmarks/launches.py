"""What a GPU would be asked for per chunk: operations that compute, and what the host launches, eager and fused.

    python -m benchmarks.launches

Counted on a CPU with Qwen2.5-VL's published depth, windows, tokens and steps, and a narrow width, on which no count depends:
two images of 81 tokens, 52 other tokens, chunks of 8, ten steps. An operation is a call that torch dispatches to a kernel;
views are none. A compiled layer merges what lies between its matrix products, which is not counted here. A recording
(``engine.gpu``) is launched as one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Generator, Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks._timing import Case, report
from vlaflow.backbones.inputs import Inputs
from vlaflow.backbones.qwen2_5_vl import qwen2_5_vl_3b
from vlaflow.backbones.qwen2_5_vl_processor import patch_positions, token_positions
from vlaflow.decoders.model import Model
from vlaflow.engine import gpu
from vlaflow.flows.sampling import Sampling
from vlaflow.policies.asyncvla.policy import qwen3b
from vlaflow.policies.policy_config import PolicyConfig
from vlaflow.policies.recipe import DataSpec

MERGE, PATCH_NUMBERS = 2, 3 * 2 * 14 * 14
WORDS = 52
NO_KERNEL = {"aten::_unsafe_view", "aten::detach", "aten::lift_fresh", "aten::empty", "aten::empty_like", "aten::new_empty"}


@dataclass(frozen=True)
class Options:
    """What to count.

    Args:
        steps: of the solver.
        side: of an image, in tokens.
        layers: of the language model; all of the published one's by default.
        vision_layers: of the vision tower; all by default.
        json: file for the results.
    """

    steps: int = 10
    side: int = 9
    layers: int = 36
    vision_layers: int = 32
    json: Path | None = None


class Operations(TorchDispatchMode):
    """Counts operations, and launches: those outside of a recording, and each recording once."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.launches = 0
        self._recorded = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count it."""
        if not func.is_view and func._schema.name not in NO_KERNEL:
            self.operations += 1
            self.launches += not self._recorded
        return func(*args, **(kwargs or {}))

    def record(self, key: Any, function: Callable[..., Tensor], given: Sequence[Any]) -> Tensor:
        """In place of ``CapturedPasses.run``."""
        self.launches += 1
        self._recorded = True
        made = function(*given)
        self._recorded = False
        return made


def narrow_policy(options: Options) -> PolicyConfig:
    """AsyncVLA on Qwen2.5-VL-3B's layers, narrow."""
    architecture = qwen2_5_vl_3b()
    architecture["text_config"] |= {
        "vocab_size": 400,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": options.layers,
        "num_attention_heads": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        "bos_token_id": None,
        "eos_token_id": None,
    }
    vision = {"depth": options.vision_layers, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2}
    architecture["vision_config"] |= {**vision, "out_hidden_size": 64}
    config = qwen3b(DataSpec(7, 7, ("front", "wrist")), source=None)
    return replace(config, backbone=replace(config.backbone, architecture=architecture, recompute=False))


def example_inputs(side: int) -> Inputs:
    """Two images, their marks, an instruction and a state, as a processor gives them."""
    tokens, generator = side * side, Generator().manual_seed(0)
    grid_I3 = torch.tensor([[1, MERGE * side, MERGE * side]] * 2)
    image_BP = torch.zeros(1, WORDS + 2 * tokens, dtype=torch.bool)
    for begin in (20, 22 + tokens):
        image_BP[:, begin : begin + tokens] = True
    state_BP = torch.zeros_like(image_BP)
    state_BP[:, -20] = True
    position_3BP = token_positions(image_BP, grid_I3[:, 1:] // MERGE)
    return Inputs(
        torch.zeros(1, 7),
        torch.randint(10, 300, image_BP.shape, generator=generator),
        patches=torch.randn(2 * tokens * MERGE**2, PATCH_NUMBERS, generator=generator),
        grid_I3=grid_I3,
        patch_position_N2=patch_positions(grid_I3, MERGE),
        image_BP=image_BP,
        state_BP=state_BP,
        position_3BP=position_3BP,
        next_position_B=position_3BP.amax((0, 2)) + 1,
    )


def counted(model: Model, inputs: Inputs, steps: int) -> tuple[dict[str, Operations], Tensor]:
    """By part of a chunk, and the chunk; the second one, for which everything that is kept between chunks is there."""
    noise, whole = lambda: [Generator().manual_seed(0)], gpu.CapturedPasses.run
    found = {name: Operations() for name in ("images and words", "prefix layers", f"{steps} steps")}
    with torch.inference_mode():
        model.decoder.sample(model.read(model.embed(inputs)), noise(), Sampling(steps))
        embed, read, solve = found.values()
        try:
            gpu.CapturedPasses.run = embed.record  # type: ignore[method-assign]
            with embed:
                prefix = model.embed(inputs)
            gpu.CapturedPasses.run = read.record  # type: ignore[method-assign]
            with read:
                prefix = model.read(prefix)
            gpu.CapturedPasses.run = solve.record  # type: ignore[method-assign]
            with solve:
                made_BLD = model.decoder.sample(prefix, noise(), Sampling(steps))
        finally:
            gpu.CapturedPasses.run = whole  # type: ignore[method-assign]
    return found, made_BLD


def main(argv: Sequence[str] | None = None) -> int:
    """Count and report."""
    options = tyro.cli(Options, description=__doc__, args=argv)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = narrow_policy(options).build().eval()
    inputs = example_inputs(options.side)
    eager, wanted_BLD = counted(model, inputs, options.steps)
    fused, made_BLD = counted(gpu.FusedModel(model), inputs, options.steps)
    cases = []
    for what in ("operations", "launches"):
        parts = {part: (float(getattr(fused[part], what)), float(getattr(eager[part], what))) for part in eager}
        parts["a chunk"] = tuple(map(sum, zip(*parts.values(), strict=True)))
        cases += [Case(f"{what}, {part}", what, {"fused": [ours], "eager": [theirs]}) for part, (ours, theirs) in parts.items()]
    largest = float((made_BLD - wanted_BLD).abs().max())
    cases[-1] = replace(cases[-1], notes={"largest difference of the two chunks": f"{largest:.2g}"})
    return report("launches", options, cases, options.json)


if __name__ == "__main__":
    raise SystemExit(main())
