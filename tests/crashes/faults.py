"""A disk that fails, or a process that is killed, at a chosen file operation.

    found = attempt(work, folder)                          # counts: found.operations
    found = attempt(work, folder, Fault("kill", 17))       # SIGKILL instead of operation 17
    found = attempt(work, folder, Fault("full", 17))       # from operation 17 on there is no space

``attempt`` runs the work in a fork of this process, where Python's own functions for files are replaced by ones that count. So
a kill is a real one: buffers are lost, and the kernel releases locks. Only operations on paths within the folder count. What
libraries write by themselves counts as a few operations: beginning and end of a video, a table as a whole.
"""
# ruff: noqa: PTH100, PTH115, PTH116, PTH118

import builtins
import errno
import io
import json
import os
import select
import signal
import sys
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path

READ, CREATE, WRITE, CHANGE, SYNC = "read", "create", "write", "change", "sync"
KINDS = {
    "kill": (CREATE, WRITE, CHANGE, SYNC),
    "error": (CREATE, WRITE, CHANGE, SYNC),
    "full": (CREATE, WRITE, SYNC),
    "read-only": (CREATE, WRITE, CHANGE),
    "denied": (READ, CREATE),
}
"""What can happen, and at which operations: SIGKILL, EIO once, ENOSPC from there on, EROFS from there on, EACCES once."""
ERRORS = {"error": errno.EIO, "full": errno.ENOSPC, "read-only": errno.EROFS, "denied": errno.EACCES}
LASTING = ("full", "read-only")
PATIENCE_S = 600


@dataclass(frozen=True)
class Fault:
    """What happens instead of an operation.

    Args:
        kind: key of ``KINDS``.
        at: number of the operation, from 0.
    """

    kind: str
    at: int


@dataclass(frozen=True)
class Operation:
    """One file operation.

    Args:
        name: of the function.
        group: one of ``KINDS``' values.
        path: relative to the folder.
    """

    name: str
    group: str
    path: str


@dataclass(frozen=True)
class Attempt:
    """How the work ended.

    Args:
        status: exit status; None after a traceback, -9 after a kill.
        out, err: what it wrote; of a killed process nothing is known.
        operations: counted; empty after a kill.
        reached: whether the fault happened.
    """

    status: int | None
    out: str = ""
    err: str = ""
    operations: tuple[Operation, ...] = ()
    reached: bool = True

    @property
    def sentence(self) -> str:
        """What it said last."""
        return (self.err.strip().splitlines() or [""])[-1]


def attempt(work, folder, fault=None):
    """Run ``work()`` in a fork whose current folder is ``folder``; it returns an exit status."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(reader)
            said = json.dumps(_run(work, folder, fault)).encode()
            while said:
                said = said[os.write(writer, said) :]
        finally:
            os._exit(0)
    os.close(writer)
    said, deadline = b"", time.monotonic() + PATIENCE_S
    while select.select([reader], [], [], max(0.0, deadline - time.monotonic()))[0]:
        part = os.read(reader, 1 << 20)
        if not part:
            break
        said += part
    else:
        os.kill(child, signal.SIGKILL)
    os.close(reader)
    _, ended = os.waitpid(child, 0)
    if os.WIFSIGNALED(ended):
        return Attempt(-os.WTERMSIG(ended) if time.monotonic() < deadline else None, err="it hung")
    found = json.loads(said)
    return Attempt(**{**found, "operations": tuple(Operation(*each) for each in found["operations"])})


def _run(work, folder, fault):
    os.chdir(folder)
    disk = Disk(Path(folder), fault)
    status = None
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        disk.install()
        try:
            status = work()
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            traceback.print_exc()
    operations = [(each.name, each.group, each.path) for each in disk.operations]
    return {
        "status": status,
        "out": out.getvalue(),
        "err": err.getvalue(),
        "operations": operations,
        "reached": fault is None or disk.failed,
    }


class Disk:
    """Counts operations within a folder, and lets one fail."""

    def __init__(self, folder, fault):
        self.folder, self.fault, self.failed = f"{folder}{os.sep}", fault, False
        self.operations = []
        self.open_files = {}
        self._truncate = os.truncate

    def within(self, path):
        """Its path relative to the folder; None if it is elsewhere."""
        if isinstance(path, int):
            return self.open_files.get(path)
        full = os.path.abspath(os.fspath(path))
        return full[len(self.folder) :] if isinstance(full, str) and full.startswith(self.folder) else None

    def happens(self, name, group, path, half=None):
        """Count an operation and raise or kill where its turn has come; ``half`` does a part of it first."""
        number = len(self.operations)
        self.operations.append(Operation(name, group, path))
        fault = self.fault
        if fault is None or group not in KINDS[fault.kind]:
            return
        if number == fault.at or (fault.kind in LASTING and number > fault.at):
            self.failed = True
            if half is not None and number == fault.at and fault.kind != "read-only":
                half()
            if fault.kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            number = ERRORS[fault.kind]
            raise OSError(number, os.strerror(number), os.path.join(self.folder, path))

    def install(self):
        """Replace the functions, in this process, for good."""
        for name, group in (
            ("mkdir", CREATE),
            ("rename", CHANGE),
            ("replace", CHANGE),
            ("unlink", CHANGE),
            ("remove", CHANGE),
            ("rmdir", CHANGE),
            ("chmod", CHANGE),
            ("utime", CHANGE),
            ("link", CREATE),
            ("symlink", CREATE),
            ("truncate", CHANGE),
        ):
            setattr(os, name, self._by_path(getattr(os, name), name, group))
        for name, group in (("fsync", SYNC), ("ftruncate", CHANGE), ("posix_fallocate", WRITE), ("fchmod", CHANGE)):
            setattr(os, name, self._by_descriptor(getattr(os, name), name, group))
        os.sendfile = self._sendfile(os.sendfile)
        os.open, os.close, os.write = self._open(os.open), self._close(os.close), self._write(os.write)
        builtins.open = io.open = self._file(io.open)
        self._libraries()

    def _by_path(self, real, name, group):
        def replaced(path, *more, dir_fd=None, **options):
            whole = path if dir_fd is None else os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), path)
            inside = self.within(whole)
            if inside is None and name in ("rename", "replace"):
                inside = self.within(more[0])
            if inside is not None:
                self.happens(name, group, inside)
            return real(path, *more, **options, **({} if dir_fd is None else {"dir_fd": dir_fd}))

        return replaced

    def _by_descriptor(self, real, name, group):
        def replaced(descriptor, *more):
            number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
            if (inside := self.within(number)) is not None:
                self.happens(name, group, inside)
            return real(descriptor, *more)

        return replaced

    def _sendfile(self, real):
        def replaced(goal, *more, **options):
            if (inside := self.within(goal)) is not None:
                self.happens("sendfile", WRITE, inside)
            return real(goal, *more, **options)

        return replaced

    def _open(self, real):
        def replaced(path, flags, mode=0o777, *, dir_fd=None):
            inside = self.within(path) if dir_fd is None else None
            writes = flags & (os.O_WRONLY | os.O_RDWR)
            if inside is not None:
                self.happens("os.open", CREATE if writes else READ, inside)
            descriptor = real(path, flags, mode, dir_fd=dir_fd)
            if inside is not None and writes:
                self.open_files[descriptor] = inside
            return descriptor

        return replaced

    def _close(self, real):
        def replaced(descriptor):
            self.open_files.pop(descriptor, None)
            return real(descriptor)

        return replaced

    def _write(self, real):
        def replaced(descriptor, data):
            if (inside := self.within(descriptor)) is not None:
                self.happens("write", WRITE, inside, lambda: real(descriptor, bytes(data)[: len(data) // 2]))
            return real(descriptor, data)

        return replaced

    def _file(self, real):
        disk = self

        class File(io.FileIO):
            """Counts what is written."""

            place = ""

            def write(self, data):
                half = bytes(data)[: len(data) // 2]
                disk.happens("write", WRITE, self.place, lambda: io.FileIO.write(self, half))
                return super().write(data)

            def truncate(self, size=None):
                disk.happens("truncate", CHANGE, self.place)
                return super().truncate(size)

            def close(self):
                if not self.closed:
                    disk.open_files.pop(self.fileno(), None)
                super().close()

        def replaced(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, closefd=True, opener=None):
            inside = None if isinstance(file, int) else disk.within(file)
            if inside is None:
                return real(file, mode, buffering, encoding, errors, newline, closefd, opener)
            if not set(mode) & set("wax+"):
                disk.happens("open", READ, inside)
                return real(file, mode, buffering, encoding, errors, newline, closefd, opener)
            disk.happens("open", CREATE, inside)
            raw = File(file, mode.replace("b", "").replace("t", ""), closefd, opener)
            raw.place = disk.open_files[raw.fileno()] = inside
            if buffering == 0:
                return raw
            buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            if "b" in mode:
                return buffered
            text = io.TextIOWrapper(buffered, encoding, errors, newline, line_buffering=buffering == 1)
            text.mode = mode
            return text

        return replaced

    def _libraries(self):
        """Those that write files by their names."""
        if (parquet := sys.modules.get("pyarrow.parquet")) is not None:
            parquet.write_table = self._whole_write(parquet.write_table, "parquet", 1)
        if (av := sys.modules.get("av")) is not None:
            av.open = self._container(av.open)

    def _whole_write(self, real, name, place):
        def replaced(*given, **options):
            inside = self.within(given[place])
            if inside is None:
                return real(*given, **options)

            def half():
                real(*given, **options)
                self._truncate(given[place], os.stat(given[place]).st_size // 2)

            self.happens(name, WRITE, inside, half)
            return real(*given, **options)

        return replaced

    def _container(self, real):
        from av.error import err_check

        disk = self

        class Container:
            """A video that is written: its first packet counts, and its end; what lies between is in FFmpeg's memory."""

            def __init__(self, real, path):
                self._real, self._path, self._begun = real, path, False

            def __getattr__(self, name):
                return getattr(self._real, name)

            def __enter__(self):
                return self

            def __exit__(self, kind, *error):
                self.close()

            def _happens(self, name):
                try:
                    disk.happens(name, WRITE, self._path)
                except OSError as error:
                    err_check(-error.errno)  # FFmpeg's own kind of error

            def mux(self, packets):
                if not self._begun:
                    self._happens("first packet")
                self._begun = True
                self._real.mux(packets)

            def close(self):
                self._happens("end of video")
                self._real.close()

        def replaced(file, mode=None, *more, **options):
            inside = disk.within(file) if isinstance(file, str) else None
            if inside is None:
                return real(file, mode, *more, **options)
            try:
                disk.happens("video", CREATE if mode == "w" else READ, inside)
            except OSError as error:
                err_check(-error.errno)
            opened = real(file, mode, *more, **options)
            return Container(opened, inside) if mode == "w" else opened

        return replaced


def files_of(folder):
    """All files by their relative path, hidden ones too."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        with suppress(FileNotFoundError):
            if path.is_file():
                found[path.relative_to(folder).as_posix()] = path.read_bytes()
    return found
