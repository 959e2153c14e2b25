"""``vlaflow data repair``, ``drop``, ``merge``, ``rename`` and ``push``; their arguments are in ``data``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlaflow.cli.data import DropEpisodes, MergeDataSets, PushToHub, RenameColumns, RepairDataSet
    from vlaflow.data.edit import Edited


def repair(arguments: RepairDataSet) -> int:
    """Write the intact episodes of a data set."""
    from vlaflow.data import edit

    return _report(edit.repair(arguments.directory, arguments.out), "Nothing had to be repaired.")


def drop(arguments: DropEpisodes) -> int:
    """Write a data set without some episodes."""
    from vlaflow.data import edit

    return _report(edit.drop(arguments.directory, _numbers(arguments.episodes), arguments.out))


def merge(arguments: MergeDataSets) -> int:
    """Write several data sets as one."""
    from vlaflow.data import edit

    return _report(edit.merge(arguments.directories, arguments.out))


def rename(arguments: RenameColumns) -> int:
    """Write a data set with other names."""
    from vlaflow.data import edit

    columns, cameras = _pairs(arguments.column, "--column"), _pairs(arguments.camera, "--camera")
    return _report(edit.rename(arguments.directory, arguments.out, columns, cameras))


def push(arguments: PushToHub) -> int:
    """Check that it is a data set, and upload it."""
    from rich.console import Console

    from vlaflow.data import hub
    from vlaflow.data.lerobot import Dataset
    from vlaflow.errors import ConfigError
    from vlaflow.hub import HubName, hub_name

    name = hub_name(f"hf://{arguments.repository.removeprefix('hf://')}", "data set")
    if not isinstance(name, HubName) or name.revision is not None:
        raise ConfigError(f"'{arguments.repository}' cannot be pushed to. Write USER/NAME, without a revision.")
    dataset = Dataset.open(arguments.directory, video=True)
    made = hub.push(dataset.root, name.repository, private=arguments.private, message=arguments.message)
    Console().print(f"Pushed: {made}", soft_wrap=True, highlight=False)
    return 0


def _report(edited: Edited, unchanged: str = "") -> int:
    """Print what was changed, and where the new data set is."""
    from rich.console import Console

    console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
    for sentence in edited.changes:
        console.print(sentence)
    if unchanged and not edited.changes:
        console.print(unchanged)
    console.print(f"Written: {edited.root} ({edited.episodes} episodes, {edited.frames} frames)")
    return 0


def _numbers(texts: Sequence[str]) -> list[int]:
    """Numbers of episodes: "3", "10-12"."""
    from vlaflow.errors import ConfigError

    found: list[int] = []
    for text in texts:
        first, dash, last = text.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise ConfigError(f"--episodes takes numbers and ranges such as 3 10-12, got '{text}'.")
        found += range(int(first), int(last if dash else first) + 1)
    return found


def _pairs(texts: Sequence[str], option: str) -> dict[str, str]:
    """New names by old ones."""
    from vlaflow.errors import ConfigError

    pairs = [text.partition("=") for text in texts]
    for text, (old, _, new) in zip(texts, pairs, strict=True):
        if not old or not new:
            raise ConfigError(f"{option} takes OLD=NEW, got '{text}'.")
    if len({old for old, _, _ in pairs}) < len(pairs):
        raise ConfigError(f"{option} gives two new names to one old one.")
    return {old: new for old, _, new in pairs}
