"""Ways to damage files, as data: a damage can be drawn by hypothesis, applied, written down as a seed, and judged.

A damage is a tuple ("file", "how", ...) of plain values, where "file" is a path within the damaged folder:

    (file, "set", [key, ...], value)      a place of a JSON document, or of a safetensors file's header, holds another value
    (file, "drop", [key, ...])            ... is missing
    (file, "twice", key)                  a key of the outermost object occurs twice
    (file, "column", name, kind)          a column of a table has another type
    (file, "cell", name, row, value)      a cell of a table holds another value
    (file, "without", name)               a column is missing
    (file, "rows", [row, ...])            other rows, in another order
    (file, "flip", place, mask)           bits of a file, (file, "cut", place), (file, "zero", place, length),
    (file, "insert", place, bytes)        and so on
"""

import io
import json
import math

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

DEEP = "deep"
"""Stands for a list that is nested a thousand deep, which would not be readable as an example."""
LONG = "long"
"""Stands for an integer of 400 digits."""

TEXTS = ["", " ", "x" * 300, "\x1b[31mred", "[/red]", "$\\frac{$", "<script>", "a\nb", "\u202e", "\0", "../../x", "/etc/passwd"]
TEXTS += ["{chunk_index:0800000000d}", "{0}", "{video_key", "nan", "1.5", "\ud800"]
NUMBERS = [0, -1, 1, 2, 7, 2**31, 2**63, 2**64, -(2**63), 0.5, -0.5, 1e-300, 1e30, 1e308, math.nan, math.inf, -math.inf, LONG]
HOSTILE = [None, True, False, [], {}, [[]], {"": {}}, [None], [1, "x"], DEEP, *NUMBERS, *TEXTS]
KINDS = ["string", "bool", "null", "double", "int32", "list", "binary", "decimal", "timestamp", "struct"]

values = st.one_of(
    st.sampled_from(HOSTILE),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=20),
    st.lists(st.sampled_from(HOSTILE), max_size=3),
    st.dictionaries(st.text(max_size=5), st.sampled_from(HOSTILE), max_size=3),
)


def real(value):
    """What a stand-in stands for, outside JSON."""
    if value == DEEP and isinstance(value, str):
        for _ in range(1000):
            value = [value]
        return value
    if value == LONG and isinstance(value, str):
        return int("9" * 400)
    if isinstance(value, list):
        return [real(each) for each in value]
    return {key: real(each) for key, each in value.items()} if isinstance(value, dict) else value


def places(document, prefix=()):
    """The path of every value in a JSON document."""
    inner = document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    yield prefix
    for key, value in inner:
        yield from places(value, (*prefix, key))


def of_json(file, content):
    """Strategy: damages of a JSON document."""
    document = json.loads(content)
    found = [list(place) for place in places(document)]
    place = st.sampled_from(found)
    ways = [
        st.tuples(st.just(file), st.just("set"), place, values),
        st.tuples(st.just(file), st.just("set"), place, values),
        st.tuples(st.just(file), st.just("drop"), st.sampled_from(found[1:])),
    ]
    if isinstance(document, dict):
        ways.append(st.tuples(st.just(file), st.just("twice"), st.sampled_from(list(document))))
    return st.one_of(*ways, of_bytes(file, content))


def of_bytes(file, content):
    """Strategy: damages of any file."""
    place = st.integers(0, len(content) - 1)
    junk = st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from([b"\xff\xfe", b"[" * 2000, b"\0" * 64, b"9" * 5000]))
    return st.one_of(
        st.tuples(st.just(file), st.just("flip"), place, st.integers(1, 255)),
        st.tuples(st.just(file), st.just("cut"), place),
        st.tuples(st.just(file), st.just("zero"), place, st.sampled_from([1, 16, 4096])),
        st.tuples(st.just(file), st.just("insert"), place, junk),
    )


def of_table(file, content):
    """Strategy: damages of a parquet file."""
    table = pq.read_table(io.BytesIO(content))
    name, row = st.sampled_from(table.column_names), st.integers(0, len(table) - 1)
    return st.one_of(
        st.tuples(st.just(file), st.just("column"), name, st.sampled_from(KINDS)),
        st.tuples(st.just(file), st.just("cell"), name, row, st.sampled_from([None, *NUMBERS, *TEXTS])),
        st.tuples(st.just(file), st.just("without"), name),
        st.tuples(st.just(file), st.just("rows"), st.lists(row, max_size=2 * len(table))),
        of_bytes(file, content),
        of_bytes(file, content),
    )


def of_tensors(file, content):
    """Strategy: damages of a safetensors file, half of them in its header."""
    return st.one_of(of_json(file, header_of(content)), of_bytes(file, content))


def header_of(content):
    """The JSON text in a safetensors file."""
    return content[8 : 8 + int.from_bytes(content[:8], "little")]


def damaged(content, damage):
    """The bytes of a file after a damage."""
    file, how, *rest = damage
    if how in ("set", "drop", "twice"):
        if file.endswith(".safetensors"):
            text = damaged_text(header_of(content), how, *rest)
            return len(text).to_bytes(8, "little") + text + content[8 + len(header_of(content)) :]
        return damaged_text(content, how, *rest)
    if how in ("column", "cell", "without", "rows"):
        return damaged_table(content, how, *rest)
    place = rest[0]
    if how == "flip":
        return content[:place] + bytes([content[place] ^ rest[1]]) + content[place + 1 :]
    if how == "cut":
        return content[:place]
    if how == "zero":
        end = min(place + rest[1], len(content))
        return content[:place] + bytes(end - place) + content[end:]
    return content[:place] + rest[1] + content[place:]


def damaged_text(content, how, *rest):
    document = json.loads(content)
    if how == "twice":
        text = json.dumps({rest[0]: document[rest[0]]})[1:-1]
        return content.rstrip()[:-1] + b", " + text.encode() + b"}"
    path = rest[0]
    if not path:
        return written(rest[1])
    at = document
    for key in path[:-1]:
        at = at[key]
    if how == "drop":
        del at[path[-1]]
    else:
        at[path[-1]] = rest[1]
    return written(document)


def written(document):
    """JSON text with what the stand-ins stand for."""
    text = json.dumps(document).replace(json.dumps(DEEP), "[" * 1000 + "]" * 1000)
    return text.replace(json.dumps(LONG), "9" * 400).encode()


def damaged_table(content, how, *rest):
    table = pq.read_table(io.BytesIO(content))
    if how == "without":
        table = table.drop_columns([rest[0]])
    elif how == "rows":
        table = table.take(pa.array(rest[0], pa.int64()))
    else:
        place = table.column_names.index(rest[0])
        cells = table[rest[0]].to_pylist()
        if how == "cell":
            new = cells.copy()
            new[rest[1]] = real(rest[2])
            column = as_column(new, table.schema.field(rest[0]).type)
        else:
            column = retyped(cells, rest[1])
        table = table.set_column(place, rest[0], column)
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


def as_column(cells, kind):
    """A column of the old type if the new cell fits it, or of whatever type holds all cells; of texts if none does."""
    for wanted in (kind, None):
        try:
            return pa.array(cells, wanted)
        except (pa.ArrowException, OverflowError, TypeError, ValueError):
            continue
    return retyped(cells, "string")


def retyped(cells, kind):
    """The same cells as another type, as far as there is a meaning to it."""
    text = [None if cell is None else ascii(cell) for cell in cells]
    count = len(cells)
    return {
        "string": lambda: pa.array(text, pa.string()),
        "binary": lambda: pa.array([b"\xff\xfe"] * count, pa.binary()),
        "bool": lambda: pa.array([bool(cell) for cell in cells]),
        "null": lambda: pa.nulls(count),
        "double": lambda: pa.array([float(cell) if isinstance(cell, int | float) else 0.5 for cell in cells], pa.float64()),
        "int32": lambda: pa.array([0] * count, pa.int32()),
        "list": lambda: pa.array([[cell] for cell in text]),
        "decimal": lambda: pa.array([None] * count, pa.decimal128(10, 2)),
        "timestamp": lambda: pa.array([0] * count, pa.timestamp("us")),
        "struct": lambda: pa.array([{"a": cell} for cell in text]),
    }[kind]()
