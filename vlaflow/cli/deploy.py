"""``vlaflow deploy CKPT``: compile a checkpoint's chunks for this machine."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from vlaflow.cli.arguments import ONLINE, HubGroup, parse_arguments
from vlaflow.ranges import Count

if TYPE_CHECKING:
    from vlaflow.engine.programs import Program


@dataclass(frozen=True)
class Deploy:
    """Compile a checkpoint's chunks for this machine; --engine of vlaflow serve and vlaflow eval then uses the programs.

    Example: vlaflow deploy runs/demo/rated --compute dense --compute refine

    The programs are kept in the user's cache folder, not in the checkpoint. They are compared with the eager chunks, and timed,
    before they are kept; the checkpoint's programs of the same engine are replaced. What is timed is one observation.

    Args:
        checkpoint: folder, or Hugging Face repository id.
        engine: aoti (torch's AOTInductor, needs a C++ compiler) or openvino (pip install 'vlaflow[openvino]').
        compute: compute policies to prepare for, as in vlaflow eval; repeat the option for more. By default auto if the
            checkpoint's sampler was calibrated, else dense.
        precision: f32 (chunks differ from eager ones by less than 1e-5, normalised), or bf16 (by less than 0.05).
        batch: numbers of observations; others are filled up to the next larger one, so name 1 too if they also come alone.
            Repeat the option for more; 1 by default.
        instruction: instructions whose lengths to prepare for; shorter ones are padded. By default a third of the longest
            possible one, and all of it.
        threads: number of torch threads that the programs run with.
    """

    checkpoint: Annotated[str, tyro.conf.Positional]
    engine: Literal["aoti", "openvino"] = "aoti"
    compute: tuple[str, ...] = ()
    precision: Literal["f32", "bf16"] = "f32"
    batch: tuple[Count, ...] = ()
    instruction: tuple[str, ...] = ()
    threads: Count = 1
    hub: HubGroup = ONLINE


def main(argv: list[str]) -> int:
    """Run ``vlaflow deploy ...``; returns the exit status."""
    a = parse_arguments(Deploy, "vlaflow deploy", argv, config=(tyro.conf.UseAppendAction,))

    import torch

    from vlaflow.compute.auto import default_name
    from vlaflow.compute.parse import parse_all
    from vlaflow.compute.spelling import Checkpoint, Knobs
    from vlaflow.engine import store
    from vlaflow.engine.deploy import DeploymentPlan
    from vlaflow.policies.base import Policy
    from vlaflow.policies.deployment import build, default_lengths
    from vlaflow.policies.provenance import fingerprint
    from vlaflow.policies.robots import robot_folder

    store.require_compiler(a.engine)
    torch.set_num_threads(a.threads)
    folder = robot_folder(a.checkpoint, None)
    policy = Policy.from_pretrained(folder)
    weights = fingerprint(folder)
    computes = parse_all(a.compute or (default_name(folder),), Knobs(threads=a.threads), Checkpoint(folder, weights))
    lengths = tuple(sorted({len(text.encode()) for text in a.instruction})) or default_lengths(policy)
    batches = tuple(sorted(set(a.batch))) or (1,)
    plan = DeploymentPlan(a.engine, a.precision, computes, batches, lengths)

    def say(program: Program) -> None:
        sys.stderr.write(f"Compiling {program.key} ...\n")

    made = build(policy, folder, plan, say)
    assert made.measured is not None
    sys.stdout.write(
        f"A chunk of {made.computes[0]} takes {made.measured.milliseconds:.2f} ms (eager: {made.measured.eager:.2f} ms) and "
        f"differs by {made.measured.deviation:.2g} standard deviations at most. Programs: {len(made.programs)}, in "
        f"{store.folder(weights, a.engine)}\n"
    )
    if batches[0] > 1:
        sys.stdout.write(
            f"One observation is filled up to {batches[0]}, which was timed here; add --batch 1 for those that come alone.\n"
        )
    if made.measured.milliseconds >= made.measured.eager:
        sys.stdout.write(
            f"That is no faster than without programs, so --engine auto stays eager. For several observations together it may "
            f"be: --engine {a.engine} uses them.\n"
        )
    return 0
