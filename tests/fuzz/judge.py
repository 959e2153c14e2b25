"""What became of a damaged input: refused in a sentence, or read as something, or what must not be.

========== =====================================================================================================
refused    one sentence of one line, without control characters
unchanged  read, and everything that matters is as in the sound input
another    read as another sound input: every value is of the type and in the range of the one it stands for, so
           somebody could have written it on purpose (an instruction, a threshold, a seed)
changed    read, and something that matters differs, although what is there could not have been meant: LOST
traceback  another exception than a ``VlaflowError``, or a sentence that is none: LOST
hang       more than 5 s of processor time: LOST
========== =====================================================================================================
"""

import io
import json
import signal
import threading
import traceback
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch

import pyarrow as pa
import pyarrow.parquet as pq

from tests.fuzz.kinds import after
from vlaflow.errors import VlaflowError

LIMIT_S = 5
MOST_SAID = 20_000
"""Characters of a sentence: what it quotes is cut, but names that a file consists of are not."""
LOST = ("changed", "traceback", "hang")


@dataclass(frozen=True)
class Outcome:
    """What became of a damaged input, and the sentence or traceback."""

    name: str
    said: str = ""


class Hang(BaseException):
    """The time is up."""


@contextmanager
def limited(seconds=LIMIT_S):
    """Raise ``Hang`` after so many seconds of processor time, which do not depend on what else runs; in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def up(*_):
        raise Hang

    before = signal.signal(signal.SIGPROF, up)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def judge(site, hurt) -> Outcome:
    """Damage the input of a site, use it, and restore it."""
    file, now = after(site.files, hurt)
    expected = site.expected(file)
    try:
        (site.folder / file).write_bytes(now)
        with limited(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = site.use(file)
    except VlaflowError as error:
        said = str(error)
        sound = "\n" not in said and 0 < len(said) < MOST_SAID
        return Outcome("refused" if sound else "traceback", said)
    except Hang:
        return Outcome("hang")
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return Outcome("traceback", traceback.format_exc())
    finally:
        (site.folder / file).write_bytes(site.files[file])
    if found == expected:
        return Outcome("unchanged")
    meant = plausible(site.kind, file, site.files[file], now, hurt)
    return Outcome("another" if meant else "changed", f"{file}: {hurt!r:.300}")


def plausible(kind, file, before, now, hurt) -> bool:
    """Whether what a file holds now could have been meant: values of the same types in the same places."""
    if any(fnmatch(file, pattern) for pattern in kind.unsealed):
        return True
    if file.endswith((".json", ".jsonl")):
        one, other = (documents(text, lines=file.endswith(".jsonl")) for text in (before, now))
        return alike(one, other, kind)
    if file.endswith(".parquet") and hurt[1] in ("cell", "rows", "column"):  # somebody wrote the table again, with checksums
        schemas = [pq.read_schema(io.BytesIO(content)) for content in (before, now)]
        return all(same_type(schemas[0].field(name).type, schemas[1].field(name).type) for name in schemas[0].names)
    return False


def documents(text, lines):
    return [json.loads(line) for line in text.split(b"\n") if line.strip()] if lines else json.loads(text)


def same_type(one, other):
    return (
        one == other
        or (pa.types.is_floating(one) and pa.types.is_floating(other))
        or (pa.types.is_integer(one) and pa.types.is_integer(other))
        or (pa.types.is_nested(one) and pa.types.is_nested(other))
    )


def alike(one, other, kind) -> bool:
    """Whether two JSON values have the same types in the same places.

    What is missing or null is alike, because the form of the file says what may be (``strict.require_form``); lists may differ
    in length.
    """
    if isinstance(one, dict) and isinstance(other, dict):
        known = kind.others or other.keys() <= one.keys()
        return known and all(alike(value, other.get(key), kind) or key in kind.free for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return not one or all(any(alike(each, value, kind) for each in one) for value in other)
    if one is None or other is None:
        return True
    if isinstance(one, bool) or isinstance(other, bool):
        return isinstance(one, bool) and isinstance(other, bool)
    if isinstance(one, int | float) and isinstance(other, int | float):
        return True
    return type(one) is type(other)
