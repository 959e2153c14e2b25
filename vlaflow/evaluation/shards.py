"""An evaluation on several machines: each plays every n-th block of its episodes, and their logs are merged.

A shard is one process of ``vlaflow eval --shard i/n``. It keeps its episodes in ``shard-i-of-n.jsonl`` in the output folder, a
log like that of an evaluation on one machine, and measures nothing else. Shards consist of whole blocks, because the episodes
of a block are played in one batch; so each episode is what it is on one machine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlaflow.errors import ConfigError, DataError
from vlaflow.evaluation.episode_log import Kept, read_log
from vlaflow.evaluation.rollout import EpisodeResult
from vlaflow.text import shortened

MACHINE = "machine"
"""The setting in which shards may differ."""


@dataclass(frozen=True)
class Shard:
    """A part of an evaluation.

    Args:
        number: which one, from 1.
        of: how many there are.
    """

    number: int
    of: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.of:
            raise ConfigError(f"Shards of {self.of} are numbered 1 to {self.of}, so there is no shard {self.number}.")

    @staticmethod
    def parse(text: str) -> Shard:
        """From "2/4".

        Raises:
            ConfigError: for anything else.
        """
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if not found:
            raise ConfigError(f"A shard is given as NUMBER/OF, such as 2/4, not '{text}'.")
        return Shard(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    @property
    def file(self) -> str:
        """Name of its log."""
        return f"shard-{self.number}-of-{self.of}.jsonl"

    def of_blocks(self, blocks: Sequence[list[int]]) -> list[list[int]]:
        """Its blocks: every n-th, so that each shard gets episodes of all environments."""
        return list(blocks[self.number - 1 :: self.of])


@dataclass(frozen=True)
class Shards:
    """All shards of an evaluation, as their logs hold them.

    Args:
        folder: of the logs.
        kept: what each holds, in the order of their numbers.
    """

    folder: Path
    kept: tuple[Kept[EpisodeResult], ...]

    @property
    def about(self) -> Mapping[str, Any]:
        """What the first shard noted about its run."""
        return self.kept[0].about

    @property
    def settings(self) -> Mapping[str, Any]:
        """What determines the episodes, without the machines."""
        return {name: value for name, value in self.kept[0].settings.items() if name != MACHINE}

    @property
    def machines(self) -> tuple[str, ...]:
        """Where the episodes were played, each kind of machine once."""
        return tuple(dict.fromkeys(each.settings[MACHINE] for each in self.kept))

    @property
    def commands(self) -> tuple[str, ...]:
        """The commands that played them."""
        return tuple(each.about["command"] for each in self.kept)

    @property
    def seconds(self) -> float:
        """Wall time of all shards together."""
        return sum(each.seconds for each in self.kept)

    @property
    def files(self) -> list[Path]:
        """Their logs."""
        return [self.folder / Shard(number, len(self.kept)).file for number in range(1, len(self.kept) + 1)]

    def episodes(self, blocks: Sequence[list[int]]) -> list[EpisodeResult]:
        """All episodes, in the order of the jobs.

        Args:
            blocks: the numbers of the jobs of each block of the evaluation.

        Raises:
            DataError: a shard has not played all of its blocks.
        """
        found: dict[int, EpisodeResult] = {}
        for number, each in enumerate(self.kept, 1):
            own = [job for block in Shard(number, len(self.kept)).of_blocks(blocks) for job in block]
            done = [job for job in own if job in each.finished]
            if len(done) < len(own):
                raise DataError(
                    f"{self.files[number - 1]} holds {len(done)} of its {len(own)} episodes. Run its command again to finish "
                    f"it: {each.about['command']}"
                )
            found |= {job: each.finished[job] for job in own}
        return [found[job] for job in sorted(found)]


def read_shards(folder: Path) -> Shards:
    """Read the logs of all shards in a folder.

    Raises:
        ConfigError: there are none, or those of two evaluations, or one is still running.
        DataError: one is missing or damaged.
    """
    found = {}
    for file in folder.glob("shard-*-of-*.jsonl"):
        if name := re.fullmatch(r"shard-(\d+)-of-(\d+)\.jsonl", file.name):
            found[int(name[2]), int(name[1])] = file
    if not found:
        raise ConfigError(f"There is no shard in {folder}. Play one: vlaflow eval CKPT --env NAME --out {folder} --shard 1/4")
    counts = sorted({of for of, _ in found})
    if len(counts) > 1:
        listed = " and ".join(str(of) for of in counts)
        raise ConfigError(
            f"{folder} holds shards of {listed}, which do not belong together. Remove those that should not count."
        )
    (of,) = counts
    missing = [number for number in range(1, of + 1) if (of, number) not in found]
    if missing:
        which = ", ".join(f"{number}/{of}" for number in missing)
        raise DataError(
            f"{folder} lacks --shard {which}. Play what is missing, or copy its log here if it was played elsewhere."
        )
    logs = [(found[of, number], read_log(found[of, number], EpisodeResult)) for number in range(1, of + 1)]
    (first, whole), *others = logs
    for file, kept in others:
        require_same(kept.settings, whole.settings, str(file), first.name)
    return Shards(folder, tuple(kept for _, kept in logs))


def require_same(one: Mapping[str, Any], other: Mapping[str, Any], where: str, elsewhere: str) -> None:
    """Refuse shards that were played with other settings; the machine may be another.

    Raises:
        ConfigError: naming the first setting that differs.
    """
    for name in {**one, **other}:
        if name != MACHINE and one.get(name) != other.get(name):
            raise ConfigError(
                f"{where} was played with {name} = {_short(one.get(name))}, {elsewhere} with {_short(other.get(name))}, so "
                f"they are not parts of one evaluation. Play them with the same settings, checkpoint and packages."
            )


def _short(value: Any) -> str:
    return shortened(str(value))
