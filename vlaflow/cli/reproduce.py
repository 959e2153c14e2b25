"""``vlaflow reproduce``: test a claim of one of the papers at the size of a laptop, by one command.

Every step is a vlaflow command, printed before it runs. Finished ones are recorded in ``steps.json`` by their text without the
number of workers and the folder of all tests, so the same command continues an interrupted test, also where that folder was
moved to, and claims in one folder share recordings and trainings. What somebody has removed is made again.
"""

from __future__ import annotations

import importlib
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from vlaflow.cli.arguments import parse_arguments
from vlaflow.config import JsonSource, decode
from vlaflow.errors import ConfigError, DataError, nearest
from vlaflow.outputs import make_folder, require_makeable, write_json
from vlaflow.packages import PAGES, require
from vlaflow.ranges import Count, NotNegative, Number
from vlaflow.strict import read_object

if TYPE_CHECKING:
    from rich.console import RenderableType

    from vlaflow.claims.base import Claim
    from vlaflow.claims.plan import Places
    from vlaflow.claims.row import Row

STEPS = "steps.json"
CONTINUED = ("train", "eval", "eval-vqa")
"""Commands that continue what was interrupted, unless they are told to start over."""
RECORDINGS = ("record", "record-vqa")
"""Commands that make the same again."""


@dataclass(frozen=True)
class Reproduce:
    """Test claims of the papers: record, train and evaluate, then write the verdict, the numbers and a page.

    Example: vlaflow reproduce C6 --out runs/claims

    Hours on two cores, listed by --list, are per training seed. Run the same command again to continue after an interruption.
    LIBERO has recipes for C1 to C8 and C13.

    Args:
        claims: names, such as C6; "all" for every claim.
        list: list the claims that can be tested on the benchmark and what is known of them in --out, and do nothing else.
        out: folder for data sets, checkpoints and results; claims in one folder share recordings and trainings. By default
            runs/claims, and runs/claims-quick with --quick.
        training_seeds: number of trainings with different seeds.
        demonstrations: per task.
        episodes: environment seeds per task and arm, for each training seed; 40 by default, on
            LIBERO's ten tasks 10.
        noise_seeds: episodes per environment seed, with other noise of the policy each.
        benchmark: test it on Meta-World, or on a suite of LIBERO with the recipes for LIBERO.
        workers: processes for recording and evaluation; one per core is best.
        quick: a few steps on one task, to check that everything works; says nothing about the claim.
        fresh: start the step that was interrupted over instead of continuing it; finished steps are kept.
    """

    claims: tyro.conf.Positional[tuple[str, ...]] = ()
    list: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    out: Path | None = None
    training_seeds: Count = 3
    demonstrations: Count = 50
    episodes: Count | None = None
    noise_seeds: Count = 1
    benchmark: Literal["metaworld", "libero/spatial", "libero/object", "libero/goal", "libero/long"] = "metaworld"
    workers: Number = 2
    quick: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    fresh: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False


def main(argv: list[str]) -> int:
    """Run ``vlaflow reproduce ...``; returns the exit status."""
    arguments = parse_arguments(Reproduce, "vlaflow reproduce", argv)

    from rich.console import Console

    from vlaflow.claims.benchmark import BENCHMARKS
    from vlaflow.claims.catalogue import CLAIMS
    from vlaflow.claims.plan import Places, Size

    benchmark = BENCHMARKS[arguments.benchmark]
    out = arguments.out or Path("runs/claims-quick" if arguments.quick else "runs/claims")
    if arguments.list:
        Console().print(_listed(Places(out, benchmark=benchmark)))
        return 0
    if not arguments.claims:
        raise ConfigError("Name at least one claim, e.g. vlaflow reproduce C6; vlaflow reproduce --list lists them.")
    for name in arguments.claims:
        if name not in CLAIMS and name != "all":
            raise ConfigError(f"There is no claim '{name}'; {nearest(name, CLAIMS)} (vlaflow reproduce --list lists them)")

    if "all" in arguments.claims:
        claims = [claim for claim in CLAIMS.values() if not benchmark.lacks(claim)]
    else:
        claims = [CLAIMS[name] for name in dict.fromkeys(arguments.claims)]
    for claim in claims:
        benchmark.require(claim)
    require(*benchmark.packages, "accelerate", "psutil", *PAGES, what="Testing a claim", extra=benchmark.extra)
    episodes = benchmark.episodes if arguments.episodes is None else arguments.episodes
    size = Size(arguments.training_seeds, arguments.demonstrations, episodes, arguments.noise_seeds, arguments.quick)
    steps, places = Steps(out, arguments.workers, fresh=arguments.fresh), Places(out, size, benchmark)
    for claim in claims:
        status = _reproduce(claim, steps, places)
        if status is not None:
            return status
    return 0


class Steps:
    """The finished steps of a folder, by the text of their command, and how long they took.

    Args:
        out: the folder.
        workers: processes of the commands that take a number of them.
        fresh: the first step that is not finished starts over, if its command can.

    Raises:
        DataError: the record is damaged.
        ConfigError: the folder cannot be created, or holds something else.
    """

    def __init__(self, out: Path, workers: int, *, fresh: bool = False) -> None:
        require_makeable(out)
        self._out, self._file, self._workers, self._fresh = out, out / STEPS, workers, fresh
        self.seconds: dict[str, float] = {}
        if self._file.exists():
            found = read_object(self._file, DataError, "it is damaged. Delete it, or choose another --out.")
            known = decode(dict[str, NotNegative], found, JsonSource(str(self._file), DataError), "seconds")
            try:
                self.seconds = {self._key(shlex.split(text)[1:]): seconds for text, seconds in known.items()}
            except ValueError as error:
                raise DataError(
                    f"{self._file} holds what is no command ({error}); it is damaged. Delete it, or choose another --out."
                ) from error
        elif out.exists() and any(out.iterdir()):
            raise ConfigError(f"{out} is not empty and contains no test of claims. Choose another --out.")
        make_folder(out)
        self._save()

    def run(self, words: Sequence[str]) -> int | None:
        """Print a command and run it unless it was finished before; returns an exit status if it did not finish, else None."""
        before = self._done(words)
        sys.stdout.write(f"\n$ {self.text(words)}{'   (done before)' if before else ''}\n")
        sys.stdout.flush()
        if before:
            return None
        over = ["--fresh"] if self._fresh and words[0] in CONTINUED else []
        self._fresh = False
        began = time.monotonic()
        status = _run([*self._whole(words), *over])
        if status is None:
            self.seconds[self._key(words)] = time.monotonic() - began
            self._save()
        return status

    def text(self, words: Sequence[str]) -> str:
        """A command as it is typed."""
        return _text(self._whole(words))

    def hours(self, commands: Iterable[Sequence[str]]) -> float:
        """Time spent on these commands."""
        return sum(self.seconds[self._key(words)] for words in commands) / 3600

    def _done(self, words: Sequence[str]) -> bool:
        """Whether a command was finished and what it made is still there.

        If a checkpoint is not, its calibrations and evaluations count no more; a recording is the same every time.
        """
        key, made = self._key(words), dict(pairwise(words)).get("--out")
        if key not in self.seconds or made is None or Path(made).exists():
            return key in self.seconds
        stale = [key]
        if words[0] not in RECORDINGS:
            stale += [other for other in self.seconds if self._inside(made) in shlex.split(other)]
        self.seconds = {name: seconds for name, seconds in self.seconds.items() if name not in stale}
        self._save()
        return False

    def _key(self, words: Sequence[str]) -> str:
        """What a command is recorded by."""
        return _text([self._inside(word) for word in words])

    def _inside(self, word: str) -> str:
        """A path in the folder of all tests, relative to it; any other word as it is."""
        return word.removeprefix(f"{self._out}/")

    def _whole(self, words: Sequence[str]) -> list[str]:
        from vlaflow.claims.plan import PARALLEL

        return [*words, *(["--workers", str(self._workers)] if words[0] in PARALLEL else [])]

    def _save(self) -> None:
        write_json(self._file, self.seconds, indent=1)


def _text(words: Sequence[str]) -> str:
    return shlex.join(["vlaflow", *words])


def _run(words: Sequence[str]) -> int | None:
    """Run one command; None where it finished."""
    command, *rest = words
    if command == "train":
        from vlaflow.cli import train

        outcome = train.run(rest)
        return None if outcome.finished else train.status(outcome)
    status: int = importlib.import_module(f"vlaflow.cli.{command.replace('-', '_')}").main(rest)
    return status or None


def _reproduce(claim: Claim, steps: Steps, places: Places) -> int | None:
    """Test one claim; returns an exit status if that ended early, else None."""
    from rich.console import Console

    from vlaflow.claims.plan import commands
    from vlaflow.claims.row import conclude, write
    from vlaflow.reports.claims import in_words, write_page

    everything = list(commands(claim, places))
    sys.stdout.write(f"\n{claim.name} ({claim.system}): {claim.statement}\n")
    for words in everything:
        status = steps.run(words)
        if status is not None:
            return status
    texts = tuple(steps.text(words) for words in everything)
    row = conclude(claim, places, hours=steps.hours(everything), commands=texts)
    write(row, places.row(claim))
    page = write_page(claim, row, places)
    console = Console()
    remark = " (--quick says nothing about the claim)" if row.size.quick else ""
    console.print(f"\n{claim.name}: {row.verdict}{remark}", style="bold")
    console.print(arms_table(row))
    for finding in row.findings:
        console.print(in_words(finding), markup=False)
    console.print(f"Written: {places.row(claim)} and {page}", soft_wrap=True, markup=False)
    return None


def arms_table(row: Row) -> RenderableType:
    """The arms of a row, for the terminal."""
    from rich import box
    from rich.table import Table

    from vlaflow.reports.words import percent

    grid = Table("arm", "success", "95 % interval", "p50 ms", "layers", box=box.SIMPLE, padding=0)
    for arm in row.arms:
        cost = [f"{value:.1f}" if value is not None else "" for value in (arm.latency_ms, arm.layer_passes)]
        grid.add_row(arm.arm, f"{arm.successes}/{arm.n}", percent(arm.interval), *cost)
    return grid


def _listed(places: Places) -> RenderableType:
    """All claims that can be tested on a benchmark, with the verdicts in a folder."""
    from rich import box
    from rich.table import Table

    from vlaflow.claims.catalogue import CLAIMS
    from vlaflow.claims.row import read

    grid = Table("claim", "system", "statement", "the paper's figures", "hours", "verdict", box=box.SIMPLE, padding=0)
    for claim in CLAIMS.values():
        if not places.benchmark.lacks(claim):
            hours = f"{places.benchmark.hours_of(claim):.1f}"
            verdict = read(claim, places).verdict if places.row(claim).exists() else ""
            grid.add_row(claim.name, claim.system, claim.statement, claim.published, hours, verdict)
    return grid
