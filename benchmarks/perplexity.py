"""Does a language model keep its language when it learns to act? Perplexity on English text, before and after (claim C14).

    ALL="--set policy.backbone.layers=none --set policy.exits=none"
    vlaflow train asyncvla.smol --dataset DIR --out runs/whole $ALL
    vlaflow train asyncvla.smol --dataset DIR --out runs/lora $ALL --set lora={}
    python -m benchmarks.perplexity runs/whole runs/lora

The text is the reference manual that comes with Python (``pydoc_data``), which no policy is trained on, or any file.
Perplexity is exp of the mean cross-entropy of each token given the ones before it in a window. "Before" is the source
with as many layers: the first layers of a language model alone speak no language, so ask a policy that has all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch.nn import functional

from vlaflow.backbones.inputs import Inputs
from vlaflow.backbones.language import LanguageBackbone
from vlaflow.backbones.pretrained_processor import PretrainedProcessor
from vlaflow.backbones.smol import SmolConfig
from vlaflow.errors import ConfigError
from vlaflow.policies.base import Policy


@dataclass(frozen=True)
class Options:
    """What to compare.

    Args:
        policies: checkpoints on the smol backbone.
        source: that they started from.
        text: a text file; Python's manual by default.
        tokens: of the text that are read.
        window: tokens that are read together.
    """

    policies: Annotated[tuple[Path, ...], tyro.conf.Positional]
    source: str = "smollm2"
    text: Path | None = None
    tokens: int = 8192
    window: int = 512


@torch.inference_mode()
def perplexity(backbone: LanguageBackbone, id_N: torch.Tensor, window: int) -> float:
    """Of a text's ids, window by window; the first of each window has no target."""
    total, count = 0.0, 0
    for id_P in id_N.split(window):
        if len(id_P) < 2:
            continue
        state_1S = torch.zeros(1, backbone.spec.state_dim)
        inputs = Inputs(state_1S, id_P[None], next_position_B=torch.tensor([len(id_P)]))
        hidden_1PW = backbone.run(backbone.embed(inputs)).hidden_BPW
        logits_PV = backbone.name_ids(backbone.finish(hidden_1PW))[0, :-1].float()
        total += functional.cross_entropy(logits_PV, id_P[1:], reduction="sum").item()
        count += len(id_P) - 1
    return math.exp(total / count)


def manual() -> str:
    """The reference manual inside Python, topic after topic."""
    topics = import_module("pydoc_data.topics").topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    options = tyro.cli(Options, description=__doc__, args=argv)
    text = manual() if options.text is None else options.text.read_text(encoding="utf-8")
    print("| language model | layers | perplexity |\n|---|---|---|")
    for folder in options.policies:
        policy = Policy.of_all_robots(folder)
        config, processor = policy.config.backbone, policy.processor.backbone
        if not isinstance(config, SmolConfig) or not isinstance(processor, PretrainedProcessor):
            raise ConfigError(f"{folder} is not on the smol backbone, which this script compares.")
        id_N = processor.tokens([text[: 16 * options.tokens]])[0][0, : options.tokens]
        before = replace(config, source=options.source, architecture=None, layers=policy.model.backbone.spec.depth)
        for words, backbone in ((f"{options.source}, before", before.build().eval()), (str(folder), policy.model.backbone)):
            print(f"| {words} | {backbone.spec.depth} | {perplexity(backbone, id_N, options.window):.2f} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
