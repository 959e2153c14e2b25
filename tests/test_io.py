"""Files on systems that lack what Linux has: space is allocated and locks are done without, and Windows is one sentence."""

import errno
import os
import subprocess
import sys

import pytest

from vlaflow.errors import CapabilityError
from vlaflow.io import _ZEROS, allocate, lock, require_system


def lacking(monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")


def refusing(number):
    def install(monkeypatch):
        def refused(*_):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "posix_fallocate", refused)

    return install


SYSTEMS = [lacking, refusing(errno.EOPNOTSUPP), refusing(errno.EINVAL), refusing(errno.ENOSYS), lambda _: None]


@pytest.mark.parametrize("system", SYSTEMS, ids=["absent", "EOPNOTSUPP", "EINVAL", "ENOSYS", "present"])
@pytest.mark.parametrize("size", [1, 4097, _ZEROS + 1])
def test_a_file_of_zeros_takes_all_its_space_on_every_system(tmp_path, monkeypatch, system, size):
    system(monkeypatch)
    allocate(tmp_path / "file", size)
    stat = (tmp_path / "file").stat()
    assert stat.st_size == size
    assert stat.st_blocks * 512 >= size
    assert not (tmp_path / "file").read_bytes().strip(b"\0")


def test_a_full_disk_stays_an_error(tmp_path, monkeypatch):
    refusing(errno.ENOSPC)(monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        allocate(tmp_path / "file", 10)


def test_a_lock_keeps_a_second_holder_out_until_it_is_released(tmp_path):
    with (tmp_path / "lock").open("w") as first, (tmp_path / "lock").open("w") as second:
        lock(first.fileno(), wait=False)
        with pytest.raises(BlockingIOError):
            lock(second.fileno(), wait=False)
        first.close()
        lock(second.fileno(), wait=False)


def test_a_system_without_locks_is_the_error_of_a_folder_without_locks(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with (tmp_path / "lock").open("w") as file, pytest.raises(OSError, match="no file locks") as error:
        lock(file.fileno(), wait=True)
    assert error.value.errno == errno.ENOLCK


def test_windows_is_one_sentence_and_other_systems_are_none():
    for system in ("linux", "darwin"):
        require_system(system)
    with pytest.raises(CapabilityError, match="install it within WSL") as error:
        require_system("win32")
    assert "\n" not in str(error.value)


def test_a_command_on_windows_ends_with_that_sentence_before_anything_is_imported():
    code = "import sys\nfrom vlaflow.cli.main import main\nsys.platform = 'win32'\nsys.exit(main(['train', 'asyncvla.demo']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "WSL" in done.stderr
