"""Writing: whole or not at all, leftovers only of the dead, one sentence for a disk that refuses."""

import json
import multiprocessing
import os
import signal

import pytest

from tests.data.toyset import full_disk
from vlaflow.errors import ConfigError, StorageError
from vlaflow.outputs import (
    PartialOutput,
    require_writable,
    require_writable_folder,
    storing,
    whole_file,
    whole_folder,
    write_json,
)


def hidden(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_a_file_is_replaced_at_the_end_and_not_before(tmp_path):
    file = tmp_path / "new/folder/results.json"
    write_json(file, {"n": 1})
    with whole_file(file) as part:
        part.write_text("longer than before")
        assert json.loads(file.read_text()) == {"n": 1}
        assert part.suffix == ".json"
    assert file.read_text() == "longer than before"
    assert hidden(file.parent) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_the_older_file_is_as_it_was(tmp_path, error):
    write_json(tmp_path / "a", 1)

    def begin_and_fail(whole, name):
        with whole(tmp_path / name) as part:
            (part if part.is_file() else part / "within").write_text("half")
            raise error

    with pytest.raises(error):
        begin_and_fail(whole_file, "a")
    with pytest.raises(error):
        begin_and_fail(whole_folder, "b")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "1\n"


def test_a_folder_appears_with_everything_in_it(tmp_path):
    with whole_folder(tmp_path / "set") as part:
        (part / "one").write_text("1")
        assert not (tmp_path / "set").exists()
    assert (tmp_path / "set/one").read_text() == "1"
    with pytest.raises(OSError, match="not empty"), whole_folder(tmp_path / "set"):
        pass
    assert hidden(tmp_path) == []


def test_a_full_disk_is_one_sentence_worded_by_the_outermost(tmp_path):
    write_json(tmp_path / "a.json", 1)
    with (
        full_disk(),
        pytest.raises(StorageError, match=r"^a.json could not be written to .*too large.*; nothing of it"),
    ):
        write_json(tmp_path / "a.json", "x" * 5000)
    sentence = r"^The results could not .*too large.*; the episodes are kept\.$"
    with full_disk(), pytest.raises(StorageError, match=sentence), storing(tmp_path, "The results", "the episodes are kept"):
        write_json(tmp_path / "a.json", "x" * 5000)
    assert (tmp_path / "a.json").read_text() == "1\n"
    assert hidden(tmp_path) == []


def test_not_a_number_is_refused_where_every_number_must_be_finite(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", float("nan"), finite=True)
    assert list(tmp_path.iterdir()) == []
    write_json(tmp_path / "a.json", [float("-inf"), 1.0])  # the range of an action without limits
    assert json.loads((tmp_path / "a.json").read_text()) == [float("-inf"), 1.0]


def test_what_cannot_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="taken is a folder"):
        require_writable(tmp_path / "free", tmp_path / "taken")
    with pytest.raises(ConfigError, match=r"cannot be created .* Choose another --out"):
        require_writable(tmp_path / "file/below")
    with full_disk(room=0), pytest.raises(ConfigError, match=r"cannot be written .*too large"):
        require_writable_folder(tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "new", "taken"]


def _write_until_killed(place, ready):
    held = [PartialOutput(place), PartialOutput(place.with_name("folder"), folder=True)]
    (held[1].path / "content").touch()
    ready.set()
    signal.pause()


def test_leftovers_are_removed_when_their_writer_is_gone_and_not_before(tmp_path):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    writer = context.Process(target=_write_until_killed, args=(tmp_path / "file", ready))
    writer.start()
    assert ready.wait(30)
    write_json(tmp_path / "file", 1)
    with whole_folder(tmp_path / "folder"):
        pass
    assert len(hidden(tmp_path)) == 2  # its writer is alive
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    write_json(tmp_path / "other-file", 1)
    assert len(hidden(tmp_path)) == 2  # of other places
    write_json(tmp_path / "file", 1)
    PartialOutput(tmp_path / "folder", folder=True).discard()
    assert hidden(tmp_path) == []
