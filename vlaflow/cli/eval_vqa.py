"""``vlaflow eval-vqa``: a checkpoint's accuracy on questions about images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from vlaflow.cli.arguments import ONLINE, HubGroup, parse_arguments
from vlaflow.ranges import Count, Seed

if TYPE_CHECKING:
    from rich.console import RenderableType

    from vlaflow.evaluation.vqa import AnswerResults


@dataclass(frozen=True)
class EvalVqa:
    """Measure accuracy by kind of question, compared with the majority-class baseline and with replies without the right image.

    Example: vlaflow eval-vqa runs/co/policy --vqa runs/qa --out runs/co/answers

    Writes answers.json. A reply is right if it equals the true answer except for case and spaces. After an interruption, the
    same command continues.

    Args:
        checkpoint: folder, or Hugging Face repository id.
        vqa: file or folder of a VQA data set.
        out: folder for answers.json.
        part: the questions that training held out, or all of a data set that is new to the checkpoint.
        turns: all turns of conversations, or only the first; as in training by default.
        limit: largest number of tokens of a reply, including its end.
        batch_size: questions per batch.
        blind: also measure with the images of other questions of the same wording.
        seed: seed of the exchange of images.
        device: where the networks run.
        dtype: what they compute in; bf16 halves the memory of their layers.
        fresh: discard an unfinished evaluation in ``out``; without it, the same command continues one.
    """

    checkpoint: Annotated[str, tyro.conf.Positional]
    vqa: Path
    out: Path = Path("runs/eval-vqa")
    part: Literal["held-out", "all"] = "held-out"
    turns: Literal["all", "first"] | None = None
    limit: Count = 32
    batch_size: Count = 64
    blind: bool = True
    seed: Seed = 0
    device: str = "cpu"
    dtype: Literal["fp32", "bf16"] = "fp32"
    fresh: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    hub: HubGroup = ONLINE


def main(argv: list[str]) -> int:
    """Run ``vlaflow eval-vqa ...``; returns the exit status."""
    given = parse_arguments(EvalVqa, "vlaflow eval-vqa", argv)

    from rich.console import Console

    from vlaflow.evaluation.vqa import FILE, AnswerConfig, run
    from vlaflow.progress import progress

    config = AnswerConfig(
        part=given.part,
        turns=given.turns,
        limit=given.limit,
        batch_size=given.batch_size,
        blind=given.blind,
        seed=given.seed,
        device=given.device,
        dtype=given.dtype,
    )
    with progress(100, "Evaluating") as bar:
        shown = [0]

        def report(done: int, total: int) -> None:
            percent = 100 * done // total
            bar.advance(percent - shown[0])
            shown[0] = percent

        results = run(given.checkpoint, given.vqa, config, given.out, report, fresh=given.fresh)
    console = Console()
    console.print(table(results))
    console.print(f"Written: {given.out / FILE}", soft_wrap=True)
    return 0


def table(results: AnswerResults) -> RenderableType:
    """Table of right replies, intervals and baselines by kind."""
    from rich import box
    from rich.table import Table

    grid = Table("kind", "right", "95 % interval", "majority", "blind", "p", box=box.SIMPLE, padding=0)
    for entry in results.kinds:
        low, high = (100 * side for side in entry.interval)
        grid.add_row(
            entry.question_kind,
            f"{entry.right}/{entry.questions}",
            f"{low:.0f} to {high:.0f} %",
            f"{entry.majority}",
            "" if entry.blind is None else f"{entry.blind}",
            "" if entry.p_value is None else f"{entry.p_value:.2g}",
            end_section=entry is results.kinds[-2] if len(results.kinds) > 1 else False,
        )
    unended = results.overall.unended
    if unended:
        grid.caption = f"{unended} reply(s) had not ended after {results.limit} tokens and count as wrong."
    return grid
