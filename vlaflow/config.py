"""Frozen dataclasses to JSON and back, strictly: an unknown key or a wrong type is an error and never ignored.

Every dataclass is written with a "kind" key, its class name, which selects the member of a union of dataclasses, or one of the
installed kinds where a field is open to other distributions (``registry.Part``). A file can never name a module, and a field
that becomes a union later still reads older files.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, Union

from vlaflow import __version__
from vlaflow.errors import ConfigError, VlaflowError, nearest
from vlaflow.ranges import require_in
from vlaflow.registry import Part, kind_of, require_registered
from vlaflow.text import one_line, shown

T = TypeVar("T")
INLINE: Mapping[str, Any] = {"inline": True}
"""Metadata of a field whose own keys ``override`` takes without its name before them: ``field(metadata=INLINE)``."""
JSON = Any


def to_json(value: Any) -> JSON:
    """Plain JSON data of a (nested) dataclass.

    Raises:
        ConfigError: for what ``from_json`` could not read back as it was: a config of a kind that is not registered, or a value
            that JSON does not have, or that its field does not take.
    """
    return _plain(value, "")


def _plain(value: Any, key: str) -> JSON:
    if isinstance(value, Part):
        require_registered(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = type(value).__name__
        fields = {f.name: _plain(getattr(value, f.name), f"{key or kind}.{f.name}") for f in dataclasses.fields(value)}
        data = {"kind": kind} | fields
        if isinstance(value, Part):
            _require_read_back(value, data)
        return data
    if isinstance(value, tuple | list):
        return [_plain(v, f"{key}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return {k: _plain(v, f"{key}.{k}") for k, v in value.items()}
    if value is None or isinstance(value, str | int | float):
        return value
    where = f"'{key}'" if key else "A config"
    what = "a dict whose keys are not text" if isinstance(value, dict) else f"of type {type(value).__name__}"
    raise ConfigError(
        f"{where} is {what}, which JSON cannot hold. A config consists of numbers, text, tuples, dicts by name, and "
        "dataclasses of these."
    )


def _require_read_back(part: Part, data: JSON) -> None:
    """Refuse a config that would be another one, or none, when its checkpoint is opened."""
    kind = type(part)
    try:
        again = _decode_dataclass(kind, json.loads(json.dumps(data)), JsonSource(f"the JSON of a {kind.__name__}"), "")
    except NameError as error:  # a type that is imported for type checkers alone
        raise ConfigError(f"The fields of {kind.__name__} have a type that cannot be read: {error}. Import it.") from error
    for f in dataclasses.fields(kind):  # type: ignore[arg-type]  # every kind is a dataclass
        before, after = getattr(part, f.name), getattr(again, f.name)
        if json.dumps(data[f.name]) != json.dumps(_plain(after, "")):
            raise ConfigError(
                f"'{kind.__name__}.{f.name}' is {shown(before)}, which is read back from JSON as {shown(after)}. Give it "
                "a type and a value that JSON has."
            )


@dataclass(frozen=True)
class JsonSource:
    """Where JSON comes from, for errors.

    Args:
        where: the file, or the option of a command line.
        error: class of the errors.
        others: whether keys that the dataclass does not name are ignored, as in files of other programs.
        unbounded: whether numbers that are not finite are left to the field's range, or to its class.
    """

    where: str
    error: type[VlaflowError] = ConfigError
    others: bool = False
    unbounded: bool = False


def from_json(cls: type[T], data: JSON, where: str) -> T:
    """Rebuild a dataclass written by ``to_json``.

    Raises:
        ConfigError: naming the key, the file (``where``) and the nearest valid key.
    """
    return typing.cast(T, decode(cls, data, JsonSource(where), "config"))


def from_versioned(cls: type[T], data: JSON, where: str) -> T:
    """As ``from_json``, for a file whose key "vlaflow" is the version that wrote it, whether or not ``cls`` has that field.

    Raises:
        ConfigError: as ``from_json``; it also names the version that wrote the file, if that is another one.
    """
    written_by = data.get("vlaflow") if isinstance(data, dict) else None
    if written_by is not None and all(f.name != "vlaflow" for f in dataclasses.fields(typing.cast(Any, cls))):
        data = {key: value for key, value in data.items() if key != "vlaflow"}
    try:
        return from_json(cls, data, where)
    except ConfigError as error:
        if not isinstance(written_by, str) or written_by == __version__:
            raise
        raise ConfigError(
            f"{str(error).rstrip('.')}. The file was written by vlaflow {shown(written_by)}, and this is {__version__}: "
            "open it with that version."
        ) from error


def decode(annotation: Any, data: JSON, source: JsonSource, key: str) -> Any:
    """The value of an annotated field, from JSON.

    Args:
        annotation: of the field, or a dataclass.
        data: what the file says.
        source: the file.
        key: of the field in it, with those of the objects that contain it.

    Raises:
        VlaflowError: of the source's class, naming key and file.
    """
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        value = decode(args[0], data, dataclasses.replace(source, unbounded=True), key)
        require_in(value, annotation, f"'{key}' in {source.where}", source.error)
        return value
    if annotation is Any:
        return data
    if origin is Literal:
        if not any(data == each and type(data) is type(each) for each in args):
            raise source.error(f"'{key}' in {source.where} is {shown(data)}; {nearest(str(data), map(str, args))}")
        return data
    if origin in (Union, types.UnionType):
        if data is None and type(None) in args:
            return None
        classes = _dataclasses_in(annotation)
        if classes and isinstance(data, dict):
            if len(classes) == 1:
                return decode(classes[0], data, source, key)
            by_name = {c.__name__: c for c in classes}
            kind = data.get("kind")
            if not isinstance(kind, str) or kind not in by_name:
                raise source.error(f"'{key}.kind' in {source.where} is {shown(kind)}; {nearest(str(kind), by_name)}")
            return decode(by_name[kind], data, source, key)
        plain = [a for a in args if a is not type(None) and a not in classes]
        for option in plain:
            try:
                return decode(option, data, source, key)
            except source.error:
                if option is plain[-1]:
                    raise
        raise source.error(f"'{key}' in {source.where} cannot be {shown(data)}.")
    if _is_open(annotation):
        _require(isinstance(data, dict), key, source, f"an object ({annotation.__name__})", data)
        _require(isinstance(data.get("kind"), str), f"{key}.kind", source, "a name", data.get("kind"))
        unknown = f"'{key}.kind' in {source.where} is {shown(data['kind'])}, which nothing installed provides"
        kind = kind_of(annotation, data["kind"], unknown)
        return _decode_dataclass(kind, data, source, key)
    if dataclasses.is_dataclass(annotation):
        return _decode_dataclass(annotation, data, source, key)
    if origin is tuple:
        _require(isinstance(data, list), key, source, "a list", data)
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(decode(args[0], v, source, f"{key}[{i}]") for i, v in enumerate(data))
        _require(len(data) == len(args), key, source, f"a list of {len(args)}", data)
        return tuple(decode(a, v, source, f"{key}[{i}]") for i, (a, v) in enumerate(zip(args, data, strict=True)))
    if origin is dict:
        _require(isinstance(data, dict), key, source, "an object", data)
        return {k: decode(args[1], v, source, f"{key}.{k}") for k, v in data.items()}
    if annotation is float:
        return _number(data, source, key)
    if annotation in (int, str, bool):
        _require(type(data) is annotation, key, source, annotation.__name__, data)
    return data


def _number(data: JSON, source: JsonSource, key: str) -> float:
    """A number that fits a float, and is finite where no range or mark of the field says more."""
    _require(isinstance(data, int | float) and not isinstance(data, bool), key, source, "a number", data)
    try:
        value = float(data)
    except OverflowError:  # an integer of 400 digits
        value = math.nan
    _require(source.unbounded or math.isfinite(value), key, source, "a finite number", data)
    return value


def _decode_dataclass(cls: Any, data: JSON, source: JsonSource, key: str) -> Any:
    _require(isinstance(data, dict), key, source, f"an object ({cls.__name__})", data)
    inside = f"{key}." if key else ""
    if not source.others:
        kind = data.get("kind", cls.__name__)
        _require(kind == cls.__name__, f"{inside}kind", source, repr(cls.__name__), kind)
        data = {name: value for name, value in data.items() if name != "kind"}
    hints, known = typing.get_type_hints(cls, include_extras=True), {f.name: f for f in dataclasses.fields(cls)}
    if not source.others:
        for name in data:
            if name not in known:
                raise source.error(f"Unknown key {shown(inside + name)} in {source.where}; {nearest(name, known)}")
    for name, f in known.items():
        needed = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if needed and name not in data:
            raise source.error(f"Key '{inside}{name}' is missing in {source.where}.")
    values = {name: decode(hints[name], data[name], source, f"{inside}{name}") for name in known if name in data}
    try:
        return cls(**values)
    except VlaflowError as error:
        raise type(error)(f"{source.where}, '{key}': {error}" if key else f"{source.where}: {error}") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # values of the right types in their ranges that make no sense together
        reason = f"{type(error).__name__}: {one_line(str(error))}"
        raise source.error(f"'{key}' in {source.where} cannot be used ({reason:.200}).") from error


def _dataclasses_in(annotation: Any) -> list[Any]:
    return [a for a in typing.get_args(annotation) if dataclasses.is_dataclass(a) or _is_open(a)]


def _is_open(annotation: Any) -> bool:
    """Whether the annotation is a base class of parts: it accepts every installed kind and is not a dataclass itself."""
    return isinstance(annotation, type) and issubclass(annotation, Part) and not dataclasses.is_dataclass(annotation)


def _require(condition: bool, key: str, source: JsonSource, wanted: str, found: Any) -> None:
    if not condition:
        what = f"'{key}' in {source.where}" if key else source.where
        raise source.error(f"{what} must be {wanted}, got {shown(found)}.")


def override(config: T, changes: Mapping[str, str], where: str = "--set") -> T:
    """A copy with values replaced as given on a command line: ``override(config, {"optim.learning_rate": "3e-4"})``.

    A text is read as JSON where that fits the field's type and as a plain string otherwise; "none" is None. All changes are
    made at once, so values that only fit together ("width" and "heads") may come in any order.

    Raises:
        ConfigError: an unknown key (with the nearest valid one), a value of another type, or a value that the config rejects.
    """
    return _override(config, changes, where, "")


def _override(config: Any, changes: Mapping[str, str], where: str, path: str) -> Any:
    inlined = {f.name for f in dataclasses.fields(config) if f.metadata.get("inline")}
    known = {f.name: "" for f in dataclasses.fields(config) if f.name not in inlined}
    known |= {f.name: name for name in inlined for f in dataclasses.fields(getattr(config, name)) if f.name not in known}
    hints = typing.get_type_hints(type(config), include_extras=True)
    values: dict[str, Any] = {}
    deeper: dict[str, dict[str, str]] = {}
    for key, text in changes.items():
        name, _, rest = key.partition(".")
        if name not in known:
            raise ConfigError(f"Unknown key '{path}{name}' in {where}; {nearest(name, known)}")
        if known[name]:
            deeper.setdefault(known[name], {})[key] = text
        elif rest:
            deeper.setdefault(name, {})[rest] = text
        else:
            values[name] = decode(hints[name], _read(hints[name], text), JsonSource(where), f"{path}{name}")
    for name, inner in deeper.items():
        current = values.get(name, getattr(config, name))
        group = _group_in(hints[name])
        if group is not None:
            values[name] = _override_groups(current, group, inner, where, f"{path}{name}.")
            continue
        if not dataclasses.is_dataclass(current):
            what = "is not set in this recipe" if current is None else f"is {current!r}, not a group of keys"
            cure = _cure(hints[name], f"{path}{name}", inner) if current is None else ""
            raise ConfigError(f"'{path}{name}' {what}, so '{path}{name}.{next(iter(inner))}' in {where} cannot be set.{cure}")
        values[name] = _override(current, inner, where, path if name in inlined else f"{path}{name}.")
    return dataclasses.replace(config, **values)


def _cure(annotation: Any, name: str, inner: Mapping[str, str]) -> str:
    """How to set a group of keys that is None, if it can be of one kind only; values that are given are taken over."""
    classes = _dataclasses_in(annotation)
    if len(classes) != 1 or _is_open(classes[0]):
        return ""
    needed = [
        f.name
        for f in dataclasses.fields(classes[0])
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    hints = typing.get_type_hints(classes[0], include_extras=True)
    values = [f"{json.dumps(f)}: {json.dumps(_read(hints[f], inner[f])) if f in inner else '...'}" for f in needed]
    return f" Set it as well: --set '{name}={{{', '.join(values)}}}'"


def _group_in(annotation: Any) -> Any:
    """The dataclass whose instances a dict of this type holds by name; None for other types."""
    group = typing.get_args(annotation)[1] if typing.get_origin(annotation) is dict else None
    return group if dataclasses.is_dataclass(group) else None


def _override_groups(groups: Mapping[str, Any], group: Any, changes: Mapping[str, str], where: str, path: str) -> Any:
    """A dict of dataclasses with values replaced, by keys such as "NAME.field"; a new name begins with the defaults."""
    by_name: dict[str, dict[str, str]] = {}
    for key, text in changes.items():
        name, dot, field = key.rpartition(".")
        if not dot:
            fields = ", ".join(f"{path}{key}.{f.name}" for f in dataclasses.fields(group))
            raise ConfigError(f"'{path}{key}' in {where} is a group of keys: {fields}.")
        by_name.setdefault(name, {})[field] = text
    changed = {name: _override(groups.get(name, group()), inner, where, f"{path}{name}.") for name, inner in by_name.items()}
    return {**groups, **changed}


def _read(annotation: Any, text: str) -> JSON:
    """A command-line text as the JSON value the field expects."""
    if typing.get_origin(annotation) is Annotated:
        annotation = typing.get_args(annotation)[0]
    plain = annotation is str or (typing.get_origin(annotation) is Literal and text in typing.get_args(annotation))
    if plain:
        return text
    lowered = {"none": "null", "True": "true", "False": "false"}.get(text, text)
    try:
        return json.loads(lowered)
    except json.JSONDecodeError:
        return text
