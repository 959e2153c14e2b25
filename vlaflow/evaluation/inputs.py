"""Which inputs a policy's actions follow: a view that it does not look at, a state that already tells everything.

A held-out frame is paired with the frame of another episode of the same task in which the robot's state is most alike: the same
moment, with the objects elsewhere. One input at a time is taken from the other frame. How far the actions then go towards the
other frame's, between 0 and 1, is the share that follows this input.

Errors on held-out frames hardly show a policy that does not look. Most of what a demonstrator does next can be told from where
the robot is (causal confusion: de Haan, Jayaraman and Levine, 2019), while an episode fails by the few centimetres that only an
image tells.

Shape letters: N frames, M rows of the held-out episodes, B batch, H executed actions of a chunk, D action dimension, X = H·D,
E episodes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vlaflow.compute.base import ComputePolicy
from vlaflow.data.batch import ObservationBatch
from vlaflow.data.lerobot import Dataset
from vlaflow.data.reading import Reading
from vlaflow.errors import CalibrationError
from vlaflow.evaluation.calibrate import BATCH, Sample, held_out, sample
from vlaflow.evaluation.sampler_measures import draw_chunks
from vlaflow.policies.base import Policy
from vlaflow.policies.provenance import fingerprint, reading_of
from vlaflow.progress import progress
from vlaflow.versions import command_line, versions

ALL_VIEWS, STATE, INSTRUCTION = "all views", "state", "instruction"
OWN, PARTNER = "own inputs", "all inputs"


@dataclass(frozen=True)
class InputUse:
    """What taking one input from another frame does.

    Args:
        name: a view, "all views", "state" or "instruction".
        share: of the difference between the two frames' actions that follows it; None for the instruction, which both share.
        interval: 95 % confidence interval of the share; None without a share, or with one episode.
        change: root mean square change of the executed actions, normalised.
        error: root mean square distance of the executed actions to the demonstration, normalised.
    """

    name: str
    share: float | None
    interval: tuple[float, float] | None
    change: float
    error: float


@dataclass(frozen=True)
class InputReport:
    """What ``measure`` found.

    Args:
        compute: name of the compute policy.
        frames: N.
        episodes: E, held-out episodes that they are of.
        error: root mean square distance of the executed actions to the demonstration with a frame's own inputs, normalised.
        apart: root mean square difference between the actions of the two frames of a pair.
        uses: by input.
        checkpoint, dataset: fingerprints.
        command, versions: how it was measured.
    """

    compute: str
    frames: int
    episodes: int
    error: float
    apart: float
    uses: tuple[InputUse, ...]
    checkpoint: str
    dataset: str
    command: str
    versions: Mapping[str, str]


def run(
    checkpoint: Path,
    dataset: Path,
    *,
    compute: str = "auto",
    frames: int = 256,
    new_data: bool = False,
    reading: Reading | None = None,
    device: str = "cpu",
) -> InputReport:
    """Open a checkpoint and a data set, and measure which inputs the actions follow.

    Args:
        checkpoint: folder of a policy, or of one of its robots.
        dataset: LeRobot data set; of that of the training, the held-out episodes are used.
        compute: compute policy; "auto" for the calibrated sampler, or ``dense`` where there is none.
        frames: N, at most.
        new_data: the checkpoint was trained on no episode of the data set.
        reading: names of the data set's columns and cameras; by default as in the training.
        device: where the networks run.

    Raises:
        CalibrationError: it is unknown which episodes were held out, or no task has two of them.
    """
    policy, mark = Policy.from_pretrained(checkpoint, device), fingerprint(checkpoint)
    data = Dataset.open(dataset, reading=reading or reading_of(checkpoint, dataset))
    chosen = policy.default_compute if compute == "auto" else policy.compute(compute)
    chosen.needs.check(policy.model, chosen.name, policy.folder)
    episodes = data.numbers if new_data else held_out(checkpoint, data)
    found = sample(policy, data, episodes, frames)
    return measure(policy, chosen, found, checkpoint=mark)


def partners(frames: Sample) -> tuple[np.ndarray, np.ndarray]:
    """Frames that have a partner, and the partners: places among the windows, int64, both (N,).

    The partner is the frame of another of the episodes with the same task whose state is nearest, with every number divided by
    its standard deviation; without a state, the one that is as far in its episode.
    """
    windows = frames.windows
    columns, rows = windows.dataset.columns(), windows.rows
    task_M, episode_M = columns.task[rows], columns.episode[rows]
    place_MS = columns.state[rows].astype(np.float64)
    if not place_MS.shape[1]:
        length_M = np.array([columns.frame[columns.episode == e].max() + 1 for e in np.unique(episode_M)])
        place_MS = (columns.frame[rows] / length_M[np.unique(episode_M, return_inverse=True)[1]])[:, None]
    deviation_S = place_MS.std(0)
    place_MS = place_MS / np.where(deviation_S > 0, deviation_S, 1.0)
    own, others = [], []
    for i in frames.index_N.tolist():
        possible = np.flatnonzero((task_M == task_M[i]) & (episode_M != episode_M[i]))
        if len(possible):
            own.append(i)
            others.append(int(possible[np.square(place_MS[possible] - place_MS[i]).sum(1).argmin()]))
    return np.array(own, np.int64), np.array(others, np.int64)


def exchanged(own: ObservationBatch, other: ObservationBatch) -> dict[str, ObservationBatch]:
    """Observations with one input of another's, by the input's name."""
    found = {view: replace(own, images={**own.images, view: other.images[view]}) for view in own.images}
    if len(found) > 1:
        found[ALL_VIEWS] = replace(own, images=other.images)
    if own.state_BS.shape[1]:
        found[STATE] = replace(own, state_BS=other.state_BS)
    return found


@torch.no_grad()
def measure(policy: Policy, compute: ComputePolicy, frames: Sample, *, checkpoint: str = "") -> InputReport:
    """Exchange every input of every frame that has a partner.

    Args:
        policy: in evaluation mode.
        compute: makes the chunks; noise is the same for all inputs of a frame.
        frames: held-out frames.
        checkpoint: fingerprint of the policy, for the report.

    Raises:
        CalibrationError: no task has two of the episodes.
    """
    windows, steps = frames.windows, policy.n_action_steps
    dataset = windows.dataset
    own_N, other_N = partners(frames)
    if not len(own_N):
        raise CalibrationError(
            f"No task of {dataset.root} has two of the episodes to measure on, between which inputs are exchanged. Train with "
            "a larger validation_fraction, or measure on other data."
        )
    sentences, executing = _other_sentences(dataset.tasks), compute.executing(steps)
    chunks: dict[str, list[Tensor]] = {}
    squares: dict[str, list[Tensor]] = {}
    count = 0.0
    with progress(len(own_N), "Exchanging inputs") as bar:
        for begin in range(0, len(own_N), BATCH):
            index_B = own_N[begin : begin + BATCH]
            batch, other = windows.batch(index_B), windows.batch(other_N[begin : begin + BATCH])
            target_BHD = policy.cut(policy.targets(policy.own_batch(batch)).action_BLD).cpu()[:, :steps]
            valid_BH1 = batch.valid_BL[:, : target_BHD.shape[1], None].float()
            observations = {OWN: batch.observation, PARTNER: other.observation} | exchanged(
                batch.observation, other.observation
            )
            if sentences:
                asked = [sentences[sentence] for sentence in batch.observation.instructions]
                observations[INSTRUCTION] = replace(batch.observation, instructions=asked)
            for name, observation in observations.items():
                prefix = policy.embed(policy.own(observation))
                chunk_BHD = draw_chunks(policy, executing, prefix, windows.rows[index_B], range(1))[0][:, 0, :steps]
                chunks.setdefault(name, []).append(chunk_BHD.flatten(1))
                squares.setdefault(name, []).append(((chunk_BHD - target_BHD).square() * valid_BH1).mean(-1).sum(1))
            count += float(valid_BH1.sum())
            bar.advance(len(index_B))
    error = {name: (float(torch.cat(parts).sum()) / count) ** 0.5 if count else math.nan for name, parts in squares.items()}
    made_NX = {name: torch.cat(parts).double().numpy() for name, parts in chunks.items()}
    own_NX = made_NX.pop(OWN)
    apart_NX = made_NX.pop(PARTNER) - own_NX
    episode_N = dataset.columns().episode[windows.rows[own_N]]
    uses = []
    for name, chunk_NX in made_NX.items():
        moved_NX = chunk_NX - own_NX
        share, interval = (None, None) if name == INSTRUCTION else followed(moved_NX, apart_NX, episode_N)
        uses.append(InputUse(name, share, interval, _size(moved_NX), error[name]))
    return InputReport(
        compute=compute.name,
        frames=len(own_N),
        episodes=len(np.unique(episode_N)),
        error=error[OWN],
        apart=_size(apart_NX),
        uses=tuple(uses),
        checkpoint=checkpoint,
        dataset=dataset.fingerprint,
        command=command_line(),
        versions=versions(),
    )


def followed(
    moved_NX: np.ndarray, apart_NX: np.ndarray, episode_N: np.ndarray
) -> tuple[float | None, tuple[float, float] | None]:
    """The share of a difference that a change follows, Σ⟨moved, apart⟩ / Σ|apart|², and its 95 % interval.

    The interval is that of a ratio whose frames come in clusters, the episodes (linearised, Student's quantile).

    Args:
        moved_NX: what taking one input did to the actions.
        apart_NX: what taking all of them did.
        episode_N: whose frames.

    Returns:
        None for the share if nothing differs at all, and None for the interval with fewer than two episodes.
    """
    from scipy.stats import t

    _, place_N = np.unique(episode_N, return_inverse=True)
    along_E = np.bincount(place_N, (moved_NX * apart_NX).sum(1))
    whole_E = np.bincount(place_N, np.square(apart_NX).sum(1))
    whole, clusters = float(whole_E.sum()), len(whole_E)
    if not whole:
        return None, None
    share = float(along_E.sum()) / whole
    if clusters < 2:
        return share, None
    variance = float(np.square(along_E - share * whole_E).sum()) * clusters / (clusters - 1) / whole**2
    reach = float(t.ppf(0.975, clusters - 1)) * variance**0.5
    return share, (share - reach, share + reach)


def _size(moved_NX: np.ndarray) -> float:
    """Root mean square."""
    return float(np.square(moved_NX).mean() ** 0.5)


def _other_sentences(tasks: tuple[str, ...]) -> dict[str, str]:
    """Another sentence for each, the next one in order; empty if there is only one."""
    distinct = list(dict.fromkeys(tasks))
    return dict(zip(distinct, distinct[1:] + distinct[:1], strict=True)) if len(distinct) > 1 else {}
