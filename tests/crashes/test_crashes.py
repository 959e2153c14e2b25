"""A sample of ``make crash``: every command on a disk that cannot be written, and kills and failures of some."""

import json
import sys

import pytest

from tests.crashes.commands import COMMANDS, stock, warm_up
from tests.crashes.faults import Fault, attempt, files_of
from tests.crashes.walk import Case
from vlaflow.cli.main import COMMANDS as ALL_COMMANDS

WRITES_NOTHING = {"plan", "serve", "check"}
"""Commands whose only output is what they print or answer."""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    warm_up()
    return stock(tmp_path_factory.mktemp("stock"), results=False)


@pytest.fixture(scope="module")
def refused(source):
    """Status, output and errors of every command where nothing can be written; one process for all."""
    before, found = files_of(source), {}

    def everything():
        for name, command in COMMANDS.items():
            for stream in (sys.stdout, sys.stderr):
                stream.seek(0)
                stream.truncate()
            found[name] = (command.run(), sys.stdout.getvalue(), sys.stderr.getvalue())
        sys.stdout.seek(0)
        sys.stdout.truncate()
        sys.stdout.write(json.dumps(found))
        return 0

    ended = attempt(everything, source, Fault("read-only", 0))
    assert ended.status == 0, ended.err
    assert files_of(source) == before
    return json.loads(ended.out)


def test_every_command_that_writes_is_tried():
    assert {*ALL_COMMANDS} - WRITES_NOTHING == {name.partition(" ")[0].rstrip(",") for name in COMMANDS}


@pytest.mark.parametrize("name", COMMANDS)
def test_where_nothing_can_be_written_a_command_says_so_before_it_works(refused, name):
    """Nothing else is said, not even by a progress bar."""
    status, out, err = refused[name]
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert "Read-only file system" in err


SAMPLE = {
    "record": ("kill", "out.episodes", "unlink"),
    "train": ("full", r"log\.jsonl$", "write"),
    "calibrate": ("kill", r"x\.json$", "replace"),
    "deploy": ("kill", "pt2$", "chmod"),
    "export": ("full", "safetensors$", "sendfile"),
}
"""By command: what happens, and at which operation (pattern of its path, function); the last of its kind."""


@pytest.mark.parametrize("name", SAMPLE)
def test_what_is_interrupted_can_be_repeated_to_the_same_bytes(source, tmp_path, name):
    case, (kind, path, operation) = Case(name, source, tmp_path / "place"), SAMPLE[name]
    assert case.in_place() == []
    assert case.wrong(Fault(kind, case.find(kind, path, operation))) == ""
