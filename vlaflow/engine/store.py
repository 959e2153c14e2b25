"""Where compiled programs are kept: in a folder of this user on this machine, never in a checkpoint.

Programs are machine code. A checkpoint may come from anywhere and holds data only, so nothing in it can name, bring or replace
a program: they are found by the fingerprint of the weights, in ``$XDG_CACHE_HOME/vlaflow/programs`` (by default below
``~/.cache``), which must belong to this user and be writable by no other. They are used only with the versions, the processor
and the sources that they were built with (docs/decisions/018-programs-are-never-part-of-a-checkpoint.md).
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache, partial
from pathlib import Path
from typing import Literal

import torch

from vlaflow.config import from_json, to_json
from vlaflow.engine import aoti, openvino
from vlaflow.engine.programs import Precision, Program, ProgramKey, Programs, Run
from vlaflow.errors import CheckpointError, DeploymentError
from vlaflow.io import read_json
from vlaflow.outputs import PartialOutput, require_writable_folder, storing, write_json
from vlaflow.packages import require
from vlaflow.text import as_typed
from vlaflow.versions import processor

Compiler = Literal["aoti", "openvino"]
COMPILERS: tuple[Compiler, ...] = ("aoti", "openvino")
MANIFEST = "manifest.json"
_ROOMS = ("nn", "flows", "actions", "backbones", "stacks", "decoders", "engine")
_SUFFIX = {"aoti": aoti.SUFFIX, "openvino": openvino.SUFFIX}


@dataclass(frozen=True)
class Identity:
    """What programs were made for; they are used for nothing else.

    Args:
        weights: fingerprint of the checkpoint.
        torch: version.
        compiler: version.
        machine: processor and system; any number of cores, because the number of threads is compiled in.
        instructions: the widest vectors that torch uses, which ``ATEN_CPU_CAPABILITY`` limits.
        sources: hash of the code that was compiled.
    """

    weights: str
    torch: str
    compiler: str
    machine: str
    instructions: str
    sources: str

    @staticmethod
    def here(weights: str, compiler: Compiler) -> Identity:
        """What programs of these weights must have been made for to run here and now."""
        return Identity(
            weights,
            torch.__version__,
            _version(compiler),
            f"{processor()}, {platform.machine()}",
            torch.backends.cpu.get_cpu_capability(),
            _sources(),
        )


@dataclass(frozen=True)
class Speed:
    """A chunk of the first compute policy at batch 1, against an eager one.

    Args:
        milliseconds: median.
        eager: median without programs, measured in turns.
        deviation: largest difference of any compute policy's chunk to the eager one, normalised.
    """

    milliseconds: float
    eager: float
    deviation: float


@dataclass(frozen=True)
class Deployment:
    """Programs of one checkpoint, as their manifest describes them.

    Args:
        identity: see the class.
        compiler, precision: that they were built with.
        batches: numbers of observations.
        lengths: of instructions, in the processor's units.
        computes: compute policies whose passes they cover.
        threads: that they run with, whatever torch is set to.
        programs: SHA-256 of each file by program.
        measured: what the programs gain.
    """

    identity: Identity
    compiler: Compiler
    precision: Precision
    batches: tuple[int, ...]
    lengths: tuple[int, ...]
    computes: tuple[str, ...]
    threads: int
    programs: dict[str, str]
    measured: Speed | None = None

    @property
    def engine(self) -> str:
        """In words, as ``Model.engine``."""
        return f"{self.compiler} {self.precision}"


def root() -> Path:
    """The folder of all programs of this user."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "vlaflow" / "programs"


def folder(weights: str, compiler: Compiler) -> Path:
    """Where programs of these weights are."""
    return root() / f"{weights}-{compiler}"


def find(weights: str, compiler: Compiler, checkpoint: Path | None = None) -> Deployment | None:
    """The deployment of these weights; None where there is none.

    Args:
        weights: fingerprint of the checkpoint.
        compiler: that built it.
        checkpoint: its folder, for the cures.

    Raises:
        DeploymentError: it was made for something else, or others could have written it.
    """
    place = folder(weights, compiler)
    if not place.exists():
        return None
    _require_private(checkpoint, root(), place, place / MANIFEST)
    again = _again(compiler, checkpoint)
    try:
        found = from_json(Deployment, read_json(place / MANIFEST), str(place / MANIFEST))
    except CheckpointError as error:
        raise DeploymentError(f"{error} {again}") from error
    wanted = Identity.here(weights, compiler)
    for field in fields(Identity):
        was, now = getattr(found.identity, field.name), getattr(wanted, field.name)
        if was != now:
            raise DeploymentError(f"The programs in {place} were built for {field.name} {was}, not {now}. {again}")
    return found


def load(deployment: Deployment, place: Path | None = None, checkpoint: Path | None = None) -> Programs:
    """Open the programs.

    Args:
        deployment: what they are.
        place: folder of them; None for where they are kept.
        checkpoint: folder of the checkpoint, for the cures.

    Raises:
        DeploymentError: a file is missing or damaged, or others could have written it.
    """
    place, opened = place or folder(deployment.identity.weights, deployment.compiler), dict[ProgramKey, Run]()
    open_one = opener(deployment.compiler, deployment.precision)
    for name, digest in deployment.programs.items():
        file = file_of(place, name, deployment.compiler)
        if not file.exists() or _hash(file) != digest:
            raise DeploymentError(f"{file} is missing or damaged. {_again(deployment.compiler, checkpoint)}")
        _require_private(checkpoint, file)
        opened[ProgramKey.named(name)] = open_one(file)
    return Programs(opened)


def opener(compiler: Compiler, precision: Precision) -> Callable[[Path], Run]:
    """What opens the programs of a compiler."""
    return aoti.load if compiler == "aoti" else partial(openvino.load, bf16=precision == "bf16")


def file_of(place: Path, program: str, compiler: Compiler) -> Path:
    """A program's file in such a folder."""
    return place / f"{program}{_SUFFIX[compiler]}"


@contextmanager
def replacing(weights: str, compiler: Compiler) -> Iterator[Path]:
    """A new folder to write into, which takes the old one's place when the block ends without an error.

    Raises:
        ConfigError: the cache folder cannot be written, which is tried before anything is compiled.
        StorageError: the disk is full or not writable.
    """
    require_writable_folder(root(), "Set XDG_CACHE_HOME to a folder of yours.")
    kept = "nothing of them was kept. Make room, or set XDG_CACHE_HOME to another folder"
    with storing(root(), "The programs", kept):
        root().chmod(0o700)
        new = PartialOutput(folder(weights, compiler), folder=True)
        try:
            new.path.chmod(0o700)
            yield new.path
            new.publish(over=True)
        finally:
            new.discard()


def build(program: Program, to: Path, compiler: Compiler, precision: Precision) -> str:
    """Compile a program into a folder; returns its file's SHA-256."""
    file = file_of(to, str(program.key), compiler)
    if compiler == "aoti":
        aoti.build(program, file, precision)
    else:
        openvino.build(program, file, bf16=precision == "bf16")
    file.chmod(0o600)
    return _hash(file)


def require_compiler(compiler: Compiler) -> None:
    """Refuse to build with what is not installed.

    Raises:
        CapabilityError: naming it.
    """
    if compiler == "aoti":
        aoti.require_compiler()
    else:
        require("openvino", what="--engine openvino")


def write(deployment: Deployment, to: Path) -> None:
    """Write the manifest, which others may not write whatever the umask is."""
    write_json(to / MANIFEST, to_json(deployment))
    (to / MANIFEST).chmod(0o600)


def _require_private(checkpoint: Path | None, *places: Path) -> None:
    for place in places:
        if not place.exists():
            continue
        found = place.lstat()
        if place.is_symlink() or found.st_uid != os.getuid() or found.st_mode & 0o022:
            raise DeploymentError(
                f"{place} is a link, belongs to another user, or can be written by others, so it may hold anybody's code. "
                "Remove it, or set XDG_CACHE_HOME to a folder of yours, and deploy again: "
                f"vlaflow deploy {as_typed(checkpoint)}"
            )


def _again(compiler: Compiler, checkpoint: Path | None) -> str:
    return f"Build them again: vlaflow deploy {as_typed(checkpoint)} --engine {compiler}"


def _hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _version(compiler: Compiler) -> str:
    if compiler == "aoti":
        return f"torch {torch.__version__}"
    from importlib import metadata

    try:
        return f"openvino {metadata.version('openvino')}"
    except metadata.PackageNotFoundError:
        return "no openvino"


@cache
def _sources() -> str:
    """Hash of the code that programs are made of."""
    package, digest = Path(__file__).parents[1], hashlib.sha256()
    for room in _ROOMS:
        for file in sorted((package / room).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
