"""Editing data sets: repair one, drop episodes, merge several, rename columns and cameras.

    repair("runs/old", "runs/whole")
    drop("runs/demo/dataset", [3, 7], "runs/fewer")

Nothing is changed in place: each function reads data sets (``edit_survey``) and writes a new one (``edit_write``), format v3.0,
whose file ``changes.log`` says what is different. It gets its name only when it is complete.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vlaflow.data.cameras import view_names
from vlaflow.data.edit_seeds import seeds_of
from vlaflow.data.edit_survey import Survey, select, survey
from vlaflow.data.edit_write import Copied, EditPart, EpisodeCopier
from vlaflow.data.features import BOOKKEEPING, Feature, channels, image_size
from vlaflow.data.lerobot import EXTRA_KEY
from vlaflow.data.lerobot_meta import is_modern
from vlaflow.data.writer_files import require_free
from vlaflow.data.writer_meta import DEFAULT_FEATURES
from vlaflow.errors import ConfigError, DataError, SpecError, nearest
from vlaflow.outputs import require_makeable, storing
from vlaflow.strict import read_object

STATS = ("min", "max", "mean", "std")
"""The statistics that every recorder computes in the same way; quantiles are often estimates."""
KEPT = "nothing of it was kept. Make room, or choose another --out"


@dataclass(frozen=True)
class Edited:
    """What an edit did.

    Args:
        root: the new data set.
        episodes, frames: their numbers in it.
        changes: every change, a sentence each; the lines of its file ``changes.log``.
    """

    root: Path
    episodes: int
    frames: int
    changes: tuple[str, ...]


def repair(folder: Path | str, out: Path) -> Edited:
    """Write the episodes of a data set that are whole, with everything that is derived from rows and frames computed again.

    Episodes are numbered 0, 1, 2, ...; tasks, file pointers and lengths are those of the rows, offsets those of the videos.
    Episodes that are empty or broken are left out.

    Args:
        folder: a data set, or its name on the Hub.
        out: the new one.

    Raises:
        DataError: not a data set; no whole episode; the disk is full.
    """
    _require_place(out)
    found = survey(folder)
    if not found.episodes:
        reason = next(iter(found.problems.values()), "It has no rows.")
        raise DataError(f"{out} was not written: no episode of {found.root} is whole. {reason}")
    return _write(out, [EditPart(found)], skip=True, said=tuple(found.problems.values()))


def drop(folder: Path | str, episodes: Sequence[int], out: Path) -> Edited:
    """Write a data set without some of its episodes.

    Args:
        folder: a data set, or its name on the Hub.
        episodes: the numbers of those to leave out.
        out: the new one.

    Raises:
        SpecError: an episode that does not exist, or none would be left.
        DataError: not a data set; an episode that is kept is broken; the disk is full.
    """
    _require_place(out)
    found = survey(folder)
    numbers = sorted({*(one.number for one in found.episodes), *found.problems})
    dropped = {*episodes}
    unknown = sorted(dropped - {*numbers})
    if unknown:
        raise SpecError(f"{found.root} has no episode {unknown[0]}; it has {len(numbers)}, from {numbers[0]} to {numbers[-1]}.")
    kept = [number for number in numbers if number not in dropped]
    if not kept:
        raise SpecError(f"All {len(numbers)} episodes of {found.root} would be left out. Keep at least one.")
    runs = _runs([(number,) for number in sorted(dropped)])
    said = [
        f"Episode {first} of {found.root} is left out."
        if first == last
        else f"Episodes {first} to {last} of {found.root} are left out."
        for (first,), (last,) in runs
    ]
    return _write(out, [EditPart(select(found, kept))], said=said)


def merge(folders: Sequence[Path | str], out: Path) -> Edited:
    """Write the episodes of several data sets, one after another, as one data set.

    Args:
        folders: data sets, or their names on the Hub, of one robot: their columns, cameras, rate and action spec must agree.
        out: the new one.

    Raises:
        SpecError: fewer than two data sets, or two that do not agree.
        DataError: not a data set; an episode is broken; the disk is full.
    """
    if len(folders) < 2:
        raise SpecError("Merging needs at least two data sets.")
    _require_place(out)
    found = [_whole(survey(folder)) for folder in folders]
    for other in found[1:]:
        _require_alike(found[0], other)
    features = dict(found[0].info["features"])
    for key, feature in features.items():
        details = [one.info["features"][key].get("info") for one in found if key in one.info["features"]]
        if all(isinstance(each, dict) for each in details):
            same = {k: v for k, v in details[0].items() if all(k in each and each[k] == v for each in details)}
            features[key] = {**feature, "info": same}
    first = replace(found[0], info={**found[0].info, "features": features})
    own = [one.info.get(EXTRA_KEY) or {} for one in found]
    provenance = [each.get("provenance", {}) for each in own]
    info: dict[str, Any] = {}
    if any(each != own[0] or seeds_of(each.get("provenance")) for each in own):
        info = {EXTRA_KEY: {**own[0], "provenance": {"merged": provenance}}}
    said = [f"{len(one.episodes)} episodes are from {one.root}." for one in found]
    return _write(out, [EditPart(first), *map(EditPart, found[1:])], said=said, info=info)


def rename(
    folder: Path | str,
    out: Path,
    columns: Mapping[str, str],
    cameras: Mapping[str, str],
) -> Edited:
    """Write a data set with other names of columns and cameras.

    Args:
        folder: a data set, or its name on the Hub.
        out: the new one.
        columns: new feature key by old one.
        cameras: new view name by old one; the feature key becomes "observation.images.NAME".

    Raises:
        SpecError: a name that does not exist, that two would have, or that LeRobot does not allow.
        DataError: not a data set; an episode is broken; the disk is full.
    """
    _require_place(out)
    found = _whole(survey(folder))
    features = found.info["features"]
    images = {key: feature for key, feature in features.items() if feature["dtype"] in ("video", "image")}
    keys = {name: key for key, name in view_names(images).items()}
    names = dict(columns)
    for old, new in cameras.items():
        key = keys.get(old, old)
        if key not in images:
            raise SpecError(f"{found.root} has no camera '{old}'; {nearest(old, keys) if keys else 'it has none at all.'}")
        names[key] = f"observation.images.{new}"
    _require_names(found, names)
    changes = [f"'{old}' is now '{new}'." for old, new in names.items()]
    return _write(out, [EditPart(found, names)], said=changes)


def _require_place(out: Path) -> None:
    """Before data sets are read, which may take hours."""
    require_free(out)
    require_makeable(out)


def _whole(found: Survey) -> Survey:
    """The survey, if no episode has a problem."""
    return select(found, sorted({*(one.number for one in found.episodes), *found.problems}))


def _require_names(found: Survey, names: Mapping[str, str]) -> None:
    features = found.info["features"]
    if not names:
        raise SpecError("There is nothing to rename. Name at least one: --column OLD=NEW or --camera OLD=NEW")
    for old, new in names.items():
        if old not in features:
            raise SpecError(f"{found.root} has no column '{old}'; {nearest(old, features)}")
        if old in BOOKKEEPING or new in BOOKKEEPING:
            raise SpecError(f"'{old}' cannot be renamed to '{new}': every LeRobot data set has {', '.join(BOOKKEEPING)}.")
        if not new.strip() or "/" in new:
            raise SpecError(f"'{new}' cannot be the name of a column: LeRobot allows no '/' and no empty name.")
    after = [names.get(key, key) for key in features]
    twice = sorted({key for key in after if after.count(key) > 1})
    if twice:
        raise SpecError(f"Two columns of {found.root} would be named '{twice[0]}'. Choose another name.")
    if "action" in features and "action" not in after:
        raise SpecError(f"{found.root} would have no column 'action', which training looks for. Leave that name as it is.")


def _require_alike(one: Survey, other: Survey) -> None:
    """Refuse data sets that cannot be one."""
    together = "They can be trained on together without merging: give --dataset twice."

    def differ(what: str, here: Any, there: Any) -> None:
        if here != there:
            raise SpecError(
                f"{one.root} and {other.root} cannot be merged: {what} is {here} in one and {there} in the other. {together}"
            )

    differ("fps", one.fps, other.fps)
    differ("the robot", one.info.get("robot_type"), other.info.get("robot_type"))
    here, there = (each.info["features"] for each in (one, other))
    for key in dict.fromkeys((*here, *there)):
        if key in DEFAULT_FEATURES:
            continue
        if key not in here or key not in there:
            has, lacks = (one, other) if key in here else (other, one)
            raise SpecError(
                f"{one.root} and {other.root} cannot be merged: only {has.root} has '{key}'. If {lacks.root} has it under "
                f"another name: vlaflow data rename {lacks.root} --column OLD={key} --out DIR. {together}"
            )
        differ(f"'dtype' of '{key}'", here[key]["dtype"], there[key]["dtype"])
        if here[key]["dtype"] in ("video", "image"):  # stored alike, in whatever order and words the axes are declared
            differ(f"the size of '{key}'", _layout(here[key]), _layout(there[key]))
            continue
        for part in ("shape", "names"):
            differ(f"'{part}' of '{key}'", here[key].get(part), there[key].get(part))
    specs = [(each.info.get(EXTRA_KEY) or {}).get("action_spec") for each in (one, other)]
    if specs[0] != specs[1]:
        raise SpecError(f"{one.root} and {other.root} cannot be merged: their action specs differ. {together}")


def _layout(feature: Feature) -> str:
    """Height, width and channels of pictures."""
    known = len(feature["shape"]) in (2, 3)
    return "x".join(map(str, (*image_size(feature), channels(feature)) if known else feature["shape"]))


def _write(
    out: Path,
    parts: Sequence[EditPart],
    *,
    skip: bool = False,
    said: Sequence[str] = (),
    info: Mapping[str, Any] | None = None,
) -> Edited:
    """Write the parts, and the log of all changes with them.

    Args:
        out: the new data set.
        parts: its episodes.
        skip: whether episodes that cannot be read are left out.
        said: changes that are known before.
        info: further entries of meta/info.json.
    """
    for part in parts:
        if out.resolve().is_relative_to(part.source.root.resolve()):
            raise ConfigError(f"{out} lies within {part.source.root}, which is not to be changed. Choose another --out.")
    found: list[str] = []

    def log(written: Copied) -> Sequence[str]:
        versions = [
            f"{part.source.root} was of format {part.source.info['codebase_version']}; it is written as v3.0."
            for part in parts
            if not is_modern(part.source.info)
        ]
        surveyed = [change for part in parts for change in part.source.changes]
        renumbered = _renumbered(parts, written)
        stats = _about_stats(parts[0].source, written) if skip else []
        found.extend([*said, *written.problems, *versions, *surveyed, *written.changes, *renumbered, *stats])
        return found or ["Nothing was changed."]

    with storing(out, "The data set", KEPT):
        written = EpisodeCopier(out, parts, info=info, skip=skip).write(log)
    return Edited(written.root, len(written.episodes), written.frames, tuple(found))


def _renumbered(parts: Sequence[EditPart], written: Copied) -> list[str]:
    """What the number of every episode has become, unless it is the same."""
    sentences = []
    for at, part in enumerate(parts):
        moved = [(old, new) for new, (place, old) in enumerate(written.episodes) if place == at and new != old]
        for (old, new), (last, newest) in _runs(moved):
            if old == last:
                sentences.append(f"Episode {old} of {part.source.root} is now episode {new}.")
            else:
                sentences.append(f"Episodes {old} to {last} of {part.source.root} are now episodes {new} to {newest}.")
    return sentences


def _runs(numbers: Sequence[tuple[int, ...]]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The first and the last of every run in which all numbers count up together.

    >>> _runs([(1, 0), (2, 1), (5, 2)])
    [((1, 0), (2, 1)), ((5, 2), (5, 2))]
    """
    runs: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    for each in numbers:
        if runs and each == tuple(n + 1 for n in runs[-1][1]):
            runs[-1] = (runs[-1][0], each)
        else:
            runs.append((each, each))
    return runs


def _about_stats(source: Survey, written: Copied) -> list[str]:
    """Whether the statistics of rows in meta/stats.json were those that were computed, as far as recorders agree on them."""
    path = source.root / "meta/stats.json"
    if not is_modern(source.info):
        return []
    other = []
    try:
        stated = read_object(path, DataError, "")
        for key in written.stats.keys() - {*BOOKKEEPING}:
            there = [np.ravel(stated[key][name]) for name in STATS]
            if not np.allclose(there, [np.ravel(written.stats[key][name]) for name in STATS], rtol=1e-3, atol=1e-5):
                other.append(key)
    except (DataError, ValueError, KeyError, TypeError):
        return ["meta/stats.json was missing, damaged or incomplete; the statistics are computed again."]
    keys = ", ".join(f"'{key}'" for key in sorted(other))
    return [f"meta/stats.json had other statistics of {keys}; they are computed again."] if other else []
