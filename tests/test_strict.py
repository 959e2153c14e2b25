"""One reader for everything foreign: what is no JSON, of another form or out of range is one sentence with file and field."""

import json
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import save_file

from vlaflow.config import from_json
from vlaflow.errors import CheckpointError, ConfigError, DataError
from vlaflow.io import load_weights, read_json, stored_tensors
from vlaflow.nn.meta import require_fits
from vlaflow.ranges import AnyNumber, Count
from vlaflow.strict import MOST_DEPTH, fill, parse, read_lines, require_form
from vlaflow.text import one_line, shown

BAD = {
    "nested": b'{"a": ' * (MOST_DEPTH + 1) + b"1" + b"}" * (MOST_DEPTH + 1),
    "nested a thousand deep": b"[" * 1000 + b"]" * 1000,
    "nested a hundred thousand deep": b"[" * 100_000,
    "a key twice": b'{"a": 1, "a": 2}',
    "UTF-8": b'{"a": "\xff"}',
    "half a surrogate": b'{"a": "\\ud800"}',
    "digits": b'{"a": ' + b"9" * 5000 + b"}",
    "nothing": b"",
    "NaN": b'{"a": NaN}',
    "infinite": b'{"a": 1e999}',
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
def test_bytes_that_are_no_json_are_one_sentence_that_names_the_place(content):
    with pytest.raises(DataError, match=r"^a\.json is not (valid JSON|UTF-8) \(.*\); copy it again\.$") as caught:
        parse(content, "a.json", DataError, "copy it again.", finite=True)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_json_that_is_nested_as_deep_as_allowed_is_read():
    assert parse(b"[" * MOST_DEPTH + b"]" * MOST_DEPTH, "a", DataError, "") is not None
    assert parse('{"a": "ü \\u00fc \\ud83d\\ude00"}'.encode(), "a", DataError, "") == {"a": "ü ü 😀"}


@dataclass(frozen=True)
class Form:
    """An example."""

    count: Count
    rate: float
    end: AnyNumber = 0.0


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"count": 0}, "count"),
        ({"count": 1.0}, "count"),
        ({"count": True}, "count"),
        ({"count": 2**40}, "count"),
        ({"rate": None}, "rate"),
        ({"rate": "1"}, "rate"),
        ({"rate": int("9" * 400)}, "rate"),
        ({"rate": float("nan")}, "rate"),
        ({"rate": float("inf")}, "rate"),
        ({"end": "x" * 10_000}, "end"),
    ],
)
def test_a_field_of_another_type_or_range_is_named(change, field):
    found = {"count": 1, "rate": 1, "end": float("-inf"), "other": []}
    require_form(Form, found, "a.json", DataError)
    with pytest.raises(DataError, match=rf"'{field}' in a\.json must be ") as caught:
        require_form(Form, found | change, "a.json", DataError)
    assert len(str(caught.value)) < 300
    with pytest.raises(ConfigError, match=rf"'config\.{field}' in a\.json must be "):
        from_json(Form, {"count": 1, "rate": 1} | change, "a.json")


def test_a_list_where_an_object_belongs_is_refused():
    with pytest.raises(DataError, match=r"^a\.json must be an object \(Form\), got \[\]\.$"):
        require_form(Form, [], "a.json", DataError)


def test_lines_are_counted_as_editors_count_them(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": "\xe2\x80\xa8"}\n\n{"a": 2}')
    found = dict(read_lines(tmp_path / "a.jsonl", DataError, ""))
    assert [where.rpartition(", ")[2] for where in found] == ["line 1", "line 3"]


@pytest.mark.parametrize(
    "template",
    [
        "{chunk:0800000000d}",
        "{chunk:021d}",
        "{chunk!r}",
        "{chunk.real}",
        "{chunk[0]}",
        "{0}",
        "{}",
        "{{chunk}}",
        "{chunk",
        "}",
        "{key:>9}",
        "{chunk:x}",
        "{other}",
        "\0",
        "a" * 256,
        7,
        None,
        ["{chunk}"],
    ],
)
def test_a_template_is_parsed_and_never_formatted(template):
    with pytest.raises(ValueError, match=r".+"):
        fill(template, {"chunk": 3, "key": "a.b"})


def test_a_template_is_filled_as_python_would():
    for template in ("{chunk:03d}/{key}", "{chunk}", "{chunk:d}", "{chunk:3d}-{chunk:020d}", "{chunk:06}", "plain"):
        assert fill(template, {"chunk": 3, "key": "a"}) == template.format(chunk=3, key="a")


def test_what_is_shown_is_short_and_on_one_line():
    deep = []
    for _ in range(5000):
        deep = [deep]
    for value in (deep, ["x" * 10_000] * 100, dict.fromkeys(range(100), deep), "\x1b[31m\n", int("9" * 4000)):
        assert len(shown(value)) < 500
        assert shown(value).isprintable()
    assert one_line("a\x1b[31m\r\n\u202eü") == "a\\x1b[31m\\r\\n\\u202eü"


# -- tensors -----------------------------------------------------------------------------------------------------------------


def network(width=3):
    return lambda: torch.nn.Linear(2, width)


def header(file, change):
    """Rewrite the header of a safetensors file."""
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    text = json.dumps(change(json.loads(raw[8 : 8 + size]))).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])


def test_shapes_are_compared_before_anything_is_allocated(tmp_path):
    """A build that allocates what the config asks for would need a million terabytes."""
    file = tmp_path / "model.safetensors"
    save_file(network()().state_dict(), file)
    require_fits(network(), file)
    load_weights(network()(), file)
    for build in (network(4), network(2**58), lambda: torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(10**9))):
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            require_fits(build, file)


def test_a_config_that_no_network_can_be_built_from_is_one_sentence(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file(network()().state_dict(), file)
    for build in (network(-1), lambda: 1 // 0):
        with pytest.raises(CheckpointError, match=r"config\.json next to .*model\.safetensors .*cannot be built"):
            require_fits(build, file)


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h | {"weight": h["weight"] | {"shape": [2**40, 2]}},
        lambda h: h | {"weight": h["weight"] | {"shape": [2**40, 2], "data_offsets": [0, 2**43]}},
        lambda h: h | {"weight": h["weight"] | {"dtype": "F64"}},
        lambda h: h | {"weight": {}},
        lambda h: h | {"weight": h["weight"] | {"data_offsets": [8, 4]}},
        lambda h: [],
    ],
    ids=range(6),
)
def test_a_header_that_promises_what_the_file_does_not_hold_is_refused(tmp_path, change):
    file = tmp_path / "model.safetensors"
    save_file(network()().state_dict(), file)
    header(file, change)
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read .* the file is damaged"):
        stored_tensors(file)


def test_a_folder_in_place_of_a_file_is_one_sentence(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json is no file; the file is damaged\."):
        read_json(tmp_path / "config.json")
