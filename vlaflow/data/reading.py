"""How a data set is read where its columns and cameras do not have LeRobot's names, as said on a command line.

    reading = Reading.of(("action=actions", "state=joints,gripper"), ("front=observation.images.top", "wrist"))
    dataset = Dataset.open("runs/openpi", reading=reading)

A checkpoint keeps the ``Reading`` it was trained with, so that calibration and later stages read their data alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from vlaflow.config import from_json
from vlaflow.data.features import BOOKKEEPING, Feature, is_numeric
from vlaflow.errors import ConfigError, DataError, nearest
from vlaflow.spec import ActionSpec
from vlaflow.strict import read_object
from vlaflow.text import shown

ACTION, STATE = "action", "observation.state"


@dataclass(frozen=True)
class Reading:
    """Which columns are the action and the state, and which cameras are used under which names.

    Args:
        action, state: feature keys, joined in this order; LeRobot's 'action' and 'observation.state' where empty.
        views: pairs of a view's name and its feature key, in the policy's order; all cameras where empty.
        tolerance_s: largest distance in seconds between a row's timestamp, or a video's frame, and its place in the episode;
            a quarter of a frame where None.
        action_spec: what the actions mean, for data sets that do not say so; one that says something else is refused.
    """

    action: tuple[str, ...] = ()
    state: tuple[str, ...] = ()
    views: tuple[tuple[str, str], ...] = ()
    tolerance_s: float | None = None
    action_spec: ActionSpec | None = None

    def __post_init__(self) -> None:
        if self.tolerance_s is not None and not 0 < self.tolerance_s < math.inf:
            raise ConfigError(f"--tolerance-s is a positive number of seconds, got {self.tolerance_s}.")
        names = [name for name, _ in self.views]
        for name in names:
            if not name or "/" in name or name.startswith("."):
                raise ConfigError(f"A view cannot be named '{name}'; leave out slashes and a dot at the beginning.")
            if names.count(name) > 1:
                raise ConfigError(f"Two views are named '{name}'; give each a name of its own: --view NAME=KEY.")

    @staticmethod
    def of(
        keys: Sequence[str] = (), views: Sequence[str] = (), tolerance_s: float | None = None, spec: Path | None = None
    ) -> Reading:
        """From ``--key NAME=KEY,KEY``, ``--view NAME=KEY`` or ``--view NAME``, ``--tolerance-s``, and a file of a spec.

        Raises:
            ConfigError: a text of another form; a file that holds no spec.
        """
        columns: dict[str, tuple[str, ...]] = {}
        for text in keys:
            name, equals, listed = text.partition("=")
            found = tuple(key.strip() for key in listed.split(",") if key.strip())
            if not equals or name not in ("action", "state") or not found:
                raise ConfigError(
                    f"--key takes action=COLUMN or state=COLUMN, several columns separated by commas; got '{text}'."
                )
            if name in columns:
                raise ConfigError(f"--key {name}=... is given twice; name all its columns at once: --key {name}=A,B.")
            columns[name] = found
        pairs = []
        for text in views:
            name, equals, key = text.partition("=")
            if not name or (equals and not key):
                raise ConfigError(f"--view takes NAME=KEY, or the name of a view; got '{text}'.")
            pairs.append((name, key or name))
        return Reading(
            columns.get("action", ()), columns.get("state", ()), tuple(pairs), tolerance_s, read_spec(spec) if spec else None
        )

    @property
    def options(self) -> str:
        """The options of a command line that read columns and cameras so, after a space; nothing where they are LeRobot's."""
        words = [f"--key {name}={','.join(keys)}" for name, keys in (("action", self.action), ("state", self.state)) if keys]
        words += [f"--view {name}" + (f"={key}" if key != name else "") for name, key in self.views]
        if self.tolerance_s is not None:
            words.append(f"--tolerance-s {self.tolerance_s:g}")
        return "".join(f" {word}" for word in words)

    def before(self, general: Reading) -> Reading:
        """What it says, and what a more general one says of everything else."""
        own = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) not in ((), None)}
        return replace(general, **own)


def read_spec(file: Path) -> ActionSpec:
    """An action spec from a file, as ``vlaflow data spec --out FILE`` writes it.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    cure = f"it is no action spec. Write one: vlaflow data spec DIR --out {file}"
    return from_json(ActionSpec, read_object(file, ConfigError, cure), str(file))


@dataclass(frozen=True)
class ChosenColumns:
    """The columns that a data set's action and state consist of; no column where it has none.

    Args:
        action, state: feature keys, in order.
        notes: what the user should know about the choice.
    """

    action: tuple[str, ...]
    state: tuple[str, ...]
    notes: tuple[str, ...] = ()


def choose_columns(root: Path, features: Mapping[str, Feature], reading: Reading, *, video: bool) -> ChosenColumns:
    """Find the columns of action and state.

    Args:
        root: the data set's folder, for errors.
        features: by key.
        reading: what the user said.
        video: whether a data set without actions will do.

    Raises:
        DataError: no action, with the options that name it; a column that does not exist or holds no numbers.
    """
    action = _resolve(root, features, reading.action, "action")
    if not action and ACTION in features:
        action = (ACTION,)
    if not action and not video:
        raise DataError(missing_action(root, features))
    state = _resolve(root, features, reading.state, "state")
    if not state and STATE in features:
        state = (STATE,)
    for key in (*action, *state):
        if not is_numeric(key, features[key]):
            reason = f"holds no numbers ({shown(features[key]['dtype'])})"
            if key in BOOKKEEPING:
                reason = "only tells where a row belongs"
            others = [each for each, feature in features.items() if is_numeric(each, feature)]
            cure = f"Choose among {', '.join(others)}." if others else "It has no column that could be."
            raise DataError(f"'{key}' of {root} {reason}, so it is neither action nor state. {cure}")
    notes: tuple[str, ...] = ()
    looks = _like(features, "state")
    if not state and looks:
        notes = (f"It has no '{STATE}', so policies will not read a state; if it has one: --key state={','.join(looks)}.",)
    return ChosenColumns(action, state, notes)


def missing_action(root: Path, features: Mapping[str, Feature]) -> str:
    """The error about a data set without a column 'action': with the options that would read it, where they can be guessed."""
    action, state = _like(features, "action"), _like(features, "state")
    others = [key for key, feature in features.items() if is_numeric(key, feature)]
    if action:
        options = f"--key action={','.join(action)}"
        if state and STATE not in features:
            options += f" --key state={','.join(state)}"
        return f"{root} has no feature '{ACTION}' in meta/info.json. Say which columns it is, in order: {options}"
    if others:
        return (
            f"{root} has no feature '{ACTION}' in meta/info.json. Say which of its columns it is: --key action=COLUMN "
            f"(or COLUMN,COLUMN), out of {', '.join(others)}."
        )
    return f"{root} has no feature '{ACTION}' in meta/info.json and no other column of numbers. Choose another data set."


def _like(features: Mapping[str, Feature], word: str) -> list[str]:
    """Columns of numbers with the word, or its plural, among the parts of their key: "actions.joint", "state"."""
    words = (word, f"{word}s")
    keys = [key for key, feature in features.items() if is_numeric(key, feature)]
    return [key for key in keys if not {*words}.isdisjoint(key.replace("/", ".").split("."))]


def _resolve(root: Path, features: Mapping[str, Feature], keys: Sequence[str], name: str) -> tuple[str, ...]:
    """The features that are meant: by their whole key, or by the beginning of one."""
    found = []
    for key in keys:
        longer = [each for each in features if each.startswith(f"{key}.")]
        if key not in features and len(longer) > 1:
            raise DataError(
                f"'{key}' may be {' or '.join(longer)} of {root}; name them in order: --key {name}={','.join(longer)}"
            )
        if key not in features and not longer:
            raise DataError(f"{root} has no column '{key}', which --key {name}=... names; {nearest(key, features)}")
        found.append(key if key in features else longer[0])
    if len(set(found)) < len(found):
        raise DataError(f"--key {name}={','.join(keys)} names a column of {root} twice; name each once.")
    return tuple(found)
