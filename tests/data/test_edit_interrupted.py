"""A command that writes a changed data set and is killed half-way leaves nothing of that name, and is simply repeated."""

import multiprocessing
import os
import shutil
import signal

import pytest

from tests.data.toyset import files_of
from vlaflow.data.edit import merge
from vlaflow.data.writer_files import NewFolder


@pytest.fixture(scope="module")
def whole(pristine, tmp_path_factory):
    """The merged data set of a command that nothing interrupted, and its sources."""
    folder = tmp_path_factory.mktemp("whole")
    sources = [shutil.copytree(pristine, folder / name) for name in ("one", "two")]
    merge(sources, folder / "both")
    return sources, folder / "both"


def merge_until(sources, out, step, count):
    """Kill this process at the ``count``-th call of a method that writes."""
    really, calls = getattr(NewFolder, step), []

    def killed(self, *given, **options):
        calls.append(step)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return really(self, *given, **options)

    setattr(NewFolder, step, killed)
    merge(sources, out)


@pytest.mark.parametrize(("step", "count"), [("add_rows", 1), ("add_video", 7), ("publish", 1)])
def test_a_killed_command_is_repeated_with_the_same_result(whole, tmp_path, step, count):
    sources, wanted = whole
    before, out = [files_of(source) for source in sources], tmp_path / "both"
    process = multiprocessing.get_context("fork").Process(target=merge_until, args=(sources, out, step, count))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not out.exists()
    assert list(tmp_path.glob(".part-*"))
    merge(sources, out)
    assert files_of(out) == files_of(wanted)
    assert list(tmp_path.iterdir()) == [out]
    assert [files_of(source) for source in sources] == before
