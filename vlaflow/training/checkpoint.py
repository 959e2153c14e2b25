"""The training state on disk, so that a run continues bit for bit, and a folder that is whole at every instant.

    out/config.json, model.safetensors, action_spec.json, stats.json, README.md    the policy, with averaged weights
    out/training/step-000500/state.json                                            step, config, data, versions
                             weights.safetensors, average.safetensors, optimizer.safetensors, or pieces of them (``pieces``)
    out/training/log.jsonl, tensorboard/                                           see ``metrics_log``

A checkpoint is first written completely into a hidden folder next to these. One rename makes it count: from then on it is
``training/step-000500`` with the policy's files in a folder ``policy`` of its own, from which they are moved up one by one. A
run that is killed while they move finds the rest there and moves it. So a kill or a full disk at any moment leaves the
earlier checkpoint or the new one. The two newest training states are kept: without the newest folder a run continues from the
one before. No pickle: JSON and safetensors.

Of processes that share a sharded network each writes its own rows, and the first assembles the policy from these files, one
tensor at a time: nobody gathers the network.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from torch import Tensor, nn

from vlaflow.errors import CheckpointError, ConfigError, StorageError
from vlaflow.io import read_json
from vlaflow.outputs import claim, make_folder, require_makeable, write_json
from vlaflow.policies.provenance import STATE, newest_state, run_of, state_folder, training_states
from vlaflow.training.ema import Ema
from vlaflow.training.moments import Moments
from vlaflow.training.pieces import Pieces, piece, write_piece
from vlaflow.training.sharding import named_tensors
from vlaflow.training.team import ALONE, Team

logger = logging.getLogger("vlaflow.training")
PARTIAL = ".partial-"
KEPT = 2
"""Training states that are kept."""
Tensors = dict[str, dict[str, Tensor]]


def collect(module: nn.Module, optimizer: Moments, ema: Ema | None, *, frozen: bool = True) -> Tensors:
    """All tensors a run needs to continue, by file and name, as they are: on their device, sharded or not, without a copy.

    Args:
        module, optimizer, ema: what they are of.
        frozen: with the parameters that do not train.
    """
    if strangers := optimizer.strangers(module):
        raise RuntimeError(f"{strangers} parameters of the optimizer are not the module's, so their moments have no name.")
    moments: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        for key, value in optimizer.of(parameter).items():
            moments[f"{key}.{name}"] = value
    left_out = set() if frozen else _frozen(module)
    weights = {name: tensor for name, tensor in named_tensors(module).items() if name not in left_out}
    tensors = {"weights": weights, "optimizer": moments}
    return tensors if ema is None else {**tensors, "average": ema.named()}


def restore(
    folder: Path,
    state: Mapping[str, Any],
    module: nn.Module,
    optimizer: Moments,
    ema: Ema | None,
    *,
    frozen: int | None = None,
) -> None:
    """Put what ``collect`` found back; each process reads its own rows alone, whatever number of processes wrote them.

    Args:
        folder: of the training state.
        state: its ``state.json``; "writers" is the number of processes that wrote it, "moments" that of the tensors that the
            optimizer had.
        module, optimizer, ema: what is filled.
        frozen: checksum of the parameters that do not train, where the training state may lack them.

    Raises:
        CheckpointError: a file that is missing, damaged, incomplete, not finite or of another network.
    """
    if state.get("frozen") != frozen:
        raise CheckpointError(
            f"The pretrained weights are not those that the run in {folder.parent.parent} began with. Restore their source, or "
            f"start over with --fresh."
        )
    try:
        with (
            Pieces(folder, "weights", state["writers"]) as weights,
            Pieces(folder, "optimizer", state["writers"]) as moments,
            Pieces(folder, "average", state["writers"]) if ema is not None else nullcontext() as average,
        ):
            # A parameter that got no gradient yet has no moments, so only their number tells whether some are missing.
            if len(moments) != state["moments"]:
                raise CheckpointError(
                    f"{folder} holds {len(moments)} of the optimizer's {state['moments']} moments, so the run would not "
                    "continue as it began."
                )
            dispensable = set() if frozen is None else _frozen(module)
            for name, tensor in named_tensors(module).items():
                if name in weights or name not in dispensable:
                    weights.fill(name, tensor)
            for name, parameter in module.named_parameters():
                if parameter.requires_grad and f"step.{name}" in moments:
                    optimizer.restore(parameter, partial(_fill, moments, name))
            if ema is not None and average is not None:
                for name, tensor in ema.named().items():
                    average.fill(name, tensor)
                ema.updates = state["step"]
    except CheckpointError as error:
        raise CheckpointError(f"{error} {_way_back(folder)}") from error
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"The training state in {folder} belongs to another network ({error}). {_way_back(folder)}"
        ) from error


def _fill(moments: Pieces, name: str, key: str, target: Tensor) -> None:
    moments.fill(f"{key}.{name}", target)


def _frozen(module: nn.Module) -> set[str]:
    """Names of the parameters that do not train."""
    return {name for name, parameter in module.named_parameters() if not parameter.requires_grad}


@contextmanager
def policy_weights(folder: Path, writers: int, averaged: bool) -> Iterator[Mapping[str, Tensor]]:
    """The weights that a policy gets of a training state: averages where there are some; each is read when it is asked for.

    Args:
        folder: of the training state.
        writers: number of processes that wrote it.
        averaged: whether there are averages.
    """
    with ExitStack() as opened:
        groups = ("average", "weights") if averaged else ("weights",)
        yield ChainMap(*(cast(Any, opened.enter_context(Pieces(folder, group, writers))) for group in groups))


def require_free(out: Path) -> None:
    """Refuse a folder that another run is training into; raises as ``claimed``."""
    if out.exists():
        with claimed(out):
            pass


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Keep other runs out of a folder; a run that is killed lets go of it by itself.

    Raises:
        ConfigError: another run is training into it, or it cannot be made.
    """
    make_folder(out)
    place = os.open(out, os.O_RDONLY)
    try:
        try:
            claim(place, f"Another run is training into {out}. Wait for it, or give another --out.")
        except OSError as error:  # a network folder without locks
            logger.warning("%s cannot be locked (%s); start no second run in it.", out, error.strerror)
        yield
    finally:
        os.close(place)


def publish(
    out: Path,
    step: int,
    state: Mapping[str, Any],
    tensors: Tensors,
    save_policy: Callable[[Path], None] | None,
    *,
    team: Team = ALONE,
) -> None:
    """Write a checkpoint and move it into place; see the module text. Every process calls it.

    Args:
        out: folder of the run.
        step: that was taken last.
        state: for ``state.json``.
        tensors: what ``collect`` found.
        save_policy: writes the policy into a folder next to the tensors' files; None keeps the policy of the checkpoint before.
        team: the processes; each writes its rows where ``state["writers"]`` says that all of them do.

    Raises:
        CheckpointError: the disk is full or cannot be written; the earlier checkpoint is as it was.
    """
    partial, writers = out / f"{PARTIAL}step-{step:06d}", state.get("writers", 1)
    own = partial / "training"
    try:
        with team.together(), _writing(out, step):
            if team.is_first:
                shutil.rmtree(partial, ignore_errors=True)
                (out / "training").mkdir(parents=True, exist_ok=True)
                own.mkdir(parents=True)
        with team.together(), _writing(out, step):
            if team.rank < writers:
                for name, group in tensors.items():
                    write_piece(own, name, group, team.rank, writers)
                    _sync_file(piece(own, name, team.rank, writers))
        with team.together(), _writing(out, step):
            if team.is_first:
                if save_policy is not None:
                    save_policy(own / "policy")
                write_json(own / STATE, state)
                _sync(partial)
                own.rename(state_folder(out, step))
                _sync_folder(out / "training")
                _move_up(out, state_folder(out, step))
    finally:
        if team.is_first:
            shutil.rmtree(partial, ignore_errors=True)
    if team.is_first:
        _forget_oldest(out)


def complete(
    out: Path, step: int, state: Mapping[str, Any], save_policy: Callable[[Path], None] | None, *, team: Team = ALONE
) -> None:
    """Give the newest training state, whose tensors stay, another ``state.json`` and its policy. Every process calls it.

    A kill at any time leaves a state that is to be completed again, or a whole one.

    Args:
        out: folder of the run.
        step: of the training state.
        state: in place of what its ``state.json`` says.
        save_policy: as in ``publish``.
        team: the processes.

    Raises:
        CheckpointError: the disk is full or cannot be written; the training state is as it was.
    """
    folder = state_folder(out, step)
    with team.together(), _writing(out, step):
        if team.is_first:
            if save_policy is not None:
                unfinished = folder / f"{PARTIAL}policy"
                shutil.rmtree(unfinished, ignore_errors=True)
                save_policy(unfinished)
                _sync(unfinished)
                unfinished.rename(folder / "policy")
            write_json(folder / STATE, state)
            _sync_folder(folder)
            _move_up(out, folder)


@contextmanager
def _writing(out: Path, step: int) -> Iterator[None]:
    """Turn errors of the disk into one sentence."""
    earlier = newest_state(out)
    try:
        yield
    except (OSError, SafetensorError, StorageError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        kept = f"the one of step {earlier[0]} is untouched" if earlier else "there was none before it"
        raise CheckpointError(
            f"The checkpoint of step {step} could not be written to {out} ({reason}); {kept}. "
            f"Make room and run the same command again to continue."
        ) from error


def prepare(out: Path, fresh: bool) -> Path | None:
    """Make ``out`` ready for a run: finish and sweep up what a killed run left; with ``fresh`` move an old checkpoint aside.

    Returns:
        Where the old checkpoint went, or None.

    Raises:
        ConfigError: ``out`` holds a policy that no training run of ours left, which would be overwritten; or another run is
            training into it; or it cannot be made.
        CheckpointError: what is left there cannot be moved.
    """
    require_makeable(out)
    require_free(out)
    try:
        for leftover in out.glob(f"{PARTIAL}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        found = newest_state(out)
        if found is not None:
            _move_up(out, found[1])
        if fresh and held(out):
            return move_aside(out)
    except OSError as error:
        raise CheckpointError(
            f"The checkpoint in {out} cannot be put in order ({error.strerror}: {error.filename}). Make room and see that you "
            f"may write there, or choose another --out."
        ) from error
    if found is None and held(out):
        raise ConfigError(
            f"{out} holds a policy without a training state, so it cannot be continued and would be overwritten. "
            f"Choose another --out, or give --fresh to move it aside."
        )
    return None


def held(out: Path) -> bool:
    """Whether there is a checkpoint in ``out``."""
    return (out / "config.json").exists() or newest_state(out) is not None


def move_aside(out: Path) -> Path:
    """Give a folder another name next to its own, which is free afterwards; returns the new one."""
    aside = next(p for n in range(1, 1_000_000) if not (p := out.with_name(f"{out.name}.before-{n}")).exists())
    out.rename(aside)
    return aside


def require_run_of(out: Path, recipe: str) -> None:
    """Refuse a folder in which another recipe has left a checkpoint; it is only looked at.

    Raises:
        ConfigError: naming that recipe.
    """
    before = run_of(out).get("recipe")
    if held(out) and before != recipe:
        raise ConfigError(
            f"{out} holds a checkpoint of {before or 'an unknown recipe'}, where that of {recipe} is to be. Choose another "
            "--out, or give --fresh to move everything in it aside."
        )


def require_same_step(out: Path, step: int, team: Team) -> None:
    """Refuse, in every process, checkpoints of different steps in what should be one folder; −1 is none."""
    found = set(team.gather(step))
    if len(found) > 1:
        steps = ", ".join("none" if one < 0 else str(one) for one in sorted(found, reverse=True))
        raise ConfigError(
            f"The processes of this run find checkpoints of different steps ({steps}) in {out}. "
            f"--out must be a folder that all nodes share."
        )


def read_state(folder: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """The state of an earlier run, if it is the same run.

    Raises:
        ConfigError: naming the first key in which the runs differ.
        CheckpointError: a damaged file.
    """
    state = read_json(folder / STATE)
    if found := difference(state.get("run", {}), identity):
        key, before, now = found
        raise ConfigError(
            f"{folder.parent.parent} was trained with {key} = {before!r}, now it is {now!r}. Give the same value to continue, "
            f"another --out, or --fresh to start over (the old checkpoint is moved aside)."
        )
    return state


def difference(before: Any, now: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """The first dotted key in which two JSON values differ, with both values."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in {**now, **before}:
            found = difference(before.get(name), now.get(name), f"{key}.{name}" if key else name)
            if found:
                return found
        return None
    return None if before == now else (key, before, now)


def _way_back(folder: Path) -> str:
    """What to do about a training state that is of no use."""
    own = int(folder.name.removeprefix("step-"))
    earlier = [step for step, _ in training_states(folder.parent.parent) if step < own]
    return f"Delete {folder} to continue from step {earlier[-1]}." if earlier else "Start again with --fresh."


def _move_up(out: Path, step_folder: Path) -> None:
    """Move a checkpoint's policy files to where a policy is looked for; again after a kill, until none is left.

    One run's config, action spec and statistics never change, so old and new files together are consistent. config.json
    comes last: a folder that has none is not taken for a policy.
    """
    policy = step_folder / "policy"
    if policy.is_dir():
        for file in sorted(policy.iterdir(), key=lambda file: (file.name == "config.json", file.name)):
            _replace(file, out / file.name)
        _sync_folder(out)
        policy.rmdir()


def _replace(new: Path, place: Path) -> None:
    """Move a file or a folder to where an older one may be; again after a kill."""
    if not place.is_dir() or place.is_symlink():
        new.replace(place)
        return
    # A rename cannot take the place of a folder that holds something, so there is a moment without one.
    older = place.with_name(f"{PARTIAL}{place.name}")
    shutil.rmtree(older, ignore_errors=True)
    place.rename(older)
    new.replace(place)
    shutil.rmtree(older, ignore_errors=True)


def _forget_oldest(out: Path) -> None:
    for _, folder in training_states(out)[:-KEPT]:
        shutil.rmtree(folder, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Bytes on the disk before names, or a power cut could leave a name without its bytes."""
    for path in folder.rglob("*"):
        if path.is_file():
            _sync_file(path)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
