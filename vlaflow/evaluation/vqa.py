"""Accuracy of a checkpoint on questions about images, by kind, compared with baselines that do not use the image.

A reply is right if it has ended and equals the true answer except for case and spaces. Two baselines belong to every accuracy:

    majority    always the most frequent true answer to the same wording: the upper bound without images
    blind       the checkpoint itself with the image of another question with the same wording

Both use the same questions, so replies with and without the right image are compared in pairs. Questions of one group, such
as an episode, are alike: intervals count as many questions as they are worth, and the test flips whole groups (``clusters``).
Where every question is a group of its own, these are Wilson's interval and McNemar's exact test.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from vlaflow.backbones.language import speaking
from vlaflow.data.batch import VqaBatch
from vlaflow.data.image_cache import ImageCache, VqaSource
from vlaflow.data.vqa import Question, Turns, VqaDataset
from vlaflow.decoders.answers import Answer
from vlaflow.errors import CheckpointError, ConfigError
from vlaflow.evaluation.clusters import effective_size, sign_flip_test
from vlaflow.evaluation.episode_log import EpisodeLog
from vlaflow.evaluation.results import read_as
from vlaflow.evaluation.statistics import PairedOutcomes, paired_difference, wilson
from vlaflow.hub import origin
from vlaflow.nn.precision import Dtype
from vlaflow.outputs import require_writable, storing, write_json
from vlaflow.policies.base import Policy
from vlaflow.policies.checkpoint import local_folder
from vlaflow.policies.provenance import fingerprint, new_questions, trained_on
from vlaflow.versions import command_line, machine, versions

FORMAT = "vlaflow answers 1"
FILE, LOG = "answers.json", "answers.jsonl"
EVERYTHING = "all"
Part = Literal["held-out", "all"]


@dataclass(frozen=True)
class AnsweredQuestion:
    """One question and the checkpoint's replies.

    Args:
        name, question_kind, question, answer: as in the data set.
        reply: the reply with the question's image.
        ended: whether the reply ended within the limit; otherwise it is wrong.
        blind: the reply with another question's image; None if that was not measured.
        blind_ended: as ``ended``, for ``blind``.
        group: what it shares with other questions: the data set's group, or its images; empty if it shares nothing.
    """

    name: str
    question_kind: str
    question: str
    answer: str
    reply: str
    ended: bool
    blind: str | None = None
    blind_ended: bool = True
    group: str = ""

    @property
    def right(self) -> bool:
        """Whether the reply equals the true answer except for case and spaces."""
        return self.ended and normal(self.reply) == normal(self.answer)

    @property
    def right_blind(self) -> bool:
        """Whether the reply without the right image was right."""
        return self.blind is not None and self.blind_ended and normal(self.blind) == normal(self.answer)


@dataclass(frozen=True)
class AnsweredBatch:
    """The replies to one batch of questions, as the log of an unfinished evaluation keeps them."""

    replies: tuple[Answer, ...]


@dataclass(frozen=True)
class Accuracy:
    """Accuracy on one kind of question, or on all.

    Args:
        question_kind: the kind; "all" for all questions.
        questions, right: number of questions and of right replies.
        interval: 95 % Wilson interval of the accuracy, for as many independent questions as these are worth.
        majority: right answers of the majority-class baseline: always the most frequent true answer to the same wording.
        blind: right replies with other questions' images; None if not measured.
        difference: accuracy minus blind accuracy.
        difference_interval: its 95 % interval, Newcombe's method 10, for as many pairs as these are worth.
        p_value: exact permutation test over groups of replies with the right image against blind ones.
        unended: replies that did not end within the limit.
    """

    question_kind: str
    questions: int
    right: int
    interval: tuple[float, float]
    majority: int
    unended: int
    blind: int | None = None
    difference: float | None = None
    difference_interval: tuple[float, float] | None = None
    p_value: float | None = None


@dataclass(frozen=True)
class AnswerResults:
    """The content of ``answers.json``.

    Args:
        kinds: accuracies by kind, with all questions last.
        per_question: the single questions.
        part: which questions were used.
        questions, questions_fingerprint: the VQA data set.
        checkpoint, fingerprint: the policy.
        limit: largest number of tokens of a reply.
        seed: seed of the exchange of images.
        dtype: what the networks computed in.
        command, machine, versions: how the results were obtained.
        format: format of this file.
    """

    kinds: tuple[Accuracy, ...]
    per_question: tuple[AnsweredQuestion, ...]
    part: str
    questions: str
    questions_fingerprint: str
    checkpoint: str
    fingerprint: str
    limit: int
    seed: int
    dtype: Dtype
    command: str
    machine: str
    versions: dict[str, str]
    format: str = field(default=FORMAT)

    @property
    def overall(self) -> Accuracy:
        """All questions together."""
        return self.kinds[-1]


@dataclass(frozen=True)
class AnswerConfig:
    """Settings of a VQA evaluation.

    Args:
        part: the questions that training held out, or all of a data set on which the checkpoint was not trained.
        turns: as in ``VqaDataset.open``; None for those of the training, or all.
        limit: largest number of tokens of a reply.
        batch_size: questions per batch.
        blind: whether to measure with exchanged images too.
        seed: seed of the exchange.
        size: image size for backbones that accept any.
        device: where the networks run.
        dtype: what they compute in.
    """

    part: Part = "held-out"
    turns: Turns | None = None
    limit: int = 32
    batch_size: int = 64
    blind: bool = True
    seed: int = 0
    size: int = 448
    device: str = "cpu"
    dtype: Dtype = "fp32"

    def __post_init__(self) -> None:
        if self.limit < 1 or self.batch_size < 1:
            raise ConfigError(f"limit and batch_size must be at least 1, got {self.limit} and {self.batch_size}.")


def run(
    checkpoint: Path | str,
    questions: Path | str,
    config: AnswerConfig,
    out: Path,
    progress: Callable[[int, int], None] | None = None,
    *,
    fresh: bool = False,
) -> AnswerResults:
    """Evaluate a checkpoint on a VQA data set, and write ``answers.json`` into ``out``.

    Until then, answers are kept in ``answers.jsonl``, from which the same evaluation continues after an interruption.

    Args:
        checkpoint: folder or Hugging Face repository id.
        questions: file or folder of a VQA data set.
        config: settings.
        out: folder of the results.
        progress: called with (questions done, total questions), including blind ones.
        fresh: discard an unfinished evaluation in ``out`` instead of continuing it.

    Raises:
        VlaflowError: when the parts do not fit together.
    """
    require_writable(out / FILE)
    folder = local_folder(checkpoint)
    trained = next((each.vqa for each in reversed(trained_on(folder)) if each.vqa is not None), None)
    turns = config.turns or (trained.turns if trained else "all")
    found = VqaDataset.open(questions, turns)
    chosen = tuple(range(len(found))) if config.part == "all" else held_out(folder, found, turns)
    policy = Policy.from_pretrained(folder, config.device, config.dtype)
    speaking(policy.model.backbone)
    views = policy.model.backbone.views
    image_cache = ImageCache.open(found, next(iter(views.values())) or (trained.size if trained else config.size))
    source = VqaSource(found, image_cache, tuple(views), len(policy.stats["state"].mean), chosen)
    mark = fingerprint(folder)
    settings = {
        **asdict(replace(config, turns=turns, size=image_cache.size)),
        "checkpoint": mark,
        "questions": found.fingerprint,
        "versions": versions(),
        "asked": sha256(np.array(chosen, "<i8").tobytes()).hexdigest()[:16],
    }
    with EpisodeLog(out, AnsweredBatch, settings, name=LOG, what="answer", fresh=fresh) as log:
        answered = ask(policy, source, config, progress, log)
        results = AnswerResults(
            kinds=count(answered),
            per_question=tuple(answered),
            part=config.part,
            questions=str(questions),
            questions_fingerprint=found.fingerprint,
            checkpoint=origin(folder) or str(checkpoint),
            fingerprint=mark,
            limit=config.limit,
            seed=config.seed,
            dtype=config.dtype,
            command=command_line(),
            machine=machine(),
            versions=versions(),
        )
        with storing(out, "The results", log.kept):
            write_json(out / FILE, asdict(results))
            log.remove()
    return results


def held_out(folder: Path, questions: VqaDataset, turns: Turns = "all") -> tuple[int, ...]:
    """The questions on which neither the checkpoint nor one that it continues was trained.

    For a data set of their training, the questions that it held out; for any other data set, all questions.

    Args:
        folder: folder of the checkpoint.
        questions: the VQA data set.
        turns: the turns with which it was opened.

    Raises:
        CheckpointError: the checkpoint does not record this, or training held out none.
        ConfigError: training used other turns of the conversations in this data set.
    """
    trained = trained_on(folder)
    if not trained:
        raise CheckpointError(
            f"{folder} lacks training/, so it is unknown which questions it was trained on. If {questions.file} is new "
            "to it, pass --part all, or evaluate in the folder where it was trained."
        )
    new = new_questions(questions, turns, trained, folder)
    if not new:
        raise CheckpointError(f"Training held out no question of {questions.file}. Train with a larger vqa.held_out.")
    return new


def ask(
    policy: Policy,
    source: VqaSource,
    config: AnswerConfig,
    progress: Callable[[int, int], None] | None = None,
    log: EpisodeLog[AnsweredBatch] | None = None,
) -> list[AnsweredQuestion]:
    """The policy's replies to every question of a source, with its image and, if ``config.blind``, with another's.

    Args:
        policy, source, config: who is asked what, and how.
        progress: called with (questions done, total questions).
        log: batches that were answered before, to which the others are added.
    """
    questions = [source.questions.questions[i] for i in source.indices]
    starts = range(0, len(questions), config.batch_size)
    partners = exchange(questions, config.seed) if config.blind else None
    jobs = [(start, images) for images in (None, partners)[: 1 + config.blind] for start in starts]
    replies: list[Answer] = []
    for number, (start, images) in enumerate(jobs):
        indices = np.arange(start, min(start + config.batch_size, len(questions)))
        kept = log.finished.get(number) if log else None
        if kept is None or len(kept.replies) != len(indices):
            kept = AnsweredBatch(tuple(_answers(policy, source, indices, images, config.limit)))
            if log:
                log.add(number, kept)
        replies += kept.replies
        if progress:
            progress(len(replies), len(questions) * (1 + config.blind))
    blind: Sequence[Answer | None] = replies[len(questions) :] or [None] * len(questions)
    return [
        AnsweredQuestion(
            *(q.name, q.kind, q.question, q.answer, s.text, s.ended),
            blind=b.text if b else None,
            blind_ended=b.ended if b else True,
            group=q.group or " ".join(q.images),
        )
        for q, s, b in zip(questions, replies[: len(questions)], blind, strict=True)
    ]


def exchange(questions: Sequence[Question], seed: int) -> np.ndarray:
    """For each question, the index of another one with the same wording and other images, int64; −1 if there is none.

    The questions with one wording are put in a random order, and each gets the next images that differ from its own.
    """
    partner = np.full(len(questions), -1, np.int64)
    wordings: dict[str, list[int]] = {}
    for i, question in enumerate(questions):
        wordings.setdefault(question.question, []).append(i)
    for number, members in enumerate(wordings.values()):
        order = np.random.default_rng([seed, number]).permutation(members).tolist()
        for place, i in enumerate(order):
            others = (*order[place + 1 :], *order[:place])
            partner[i] = next((j for j in others if questions[j].images != questions[i].images), -1)
    return partner


def count(answered: Sequence[AnsweredQuestion]) -> tuple[Accuracy, ...]:
    """Accuracies by kind, in the order of their first questions, and of all questions together."""
    kinds = list(dict.fromkeys(each.question_kind for each in answered))
    groups = {kind or "unnamed": [each for each in answered if each.question_kind == kind] for kind in kinds}
    return tuple(_accuracy(name, group) for name, group in (*groups.items(), (EVERYTHING, list(answered))))


def normal(text: str) -> str:
    """Normalise case and spaces."""
    return " ".join(text.casefold().split())


def read(file: Path) -> AnswerResults:
    """Read ``answers.json`` strictly.

    Raises:
        DataError: when it is missing, damaged or of another format.
        ConfigError: naming an unknown or missing key.
    """
    return read_as(AnswerResults, file, FORMAT, f"vlaflow eval-vqa CKPT --vqa DIR --out {file.parent}")


def _accuracy(kind: str, group: Sequence[AnsweredQuestion]) -> Accuracy:
    n, right = len(group), sum(each.right for each in group)
    wordings: dict[str, Counter[str]] = {}
    for each in group:
        wordings.setdefault(each.question, Counter())[normal(each.answer)] += 1
    together = _groups(group)
    interval = wilson(right, n, effective=effective_size([[each.right for each in some] for some in together]))
    done = Accuracy(
        kind,
        n,
        right,
        (interval.low, interval.high),
        majority=sum(max(answers.values()) for answers in wordings.values()),
        unended=sum(not each.ended for each in group),
    )
    if any(each.blind is None for each in group):
        return done
    table = PairedOutcomes.of([each.right_blind for each in group], [each.right for each in group])
    differences = [[int(each.right) - int(each.right_blind) for each in some] for some in together]
    gain = paired_difference(table, effective=effective_size(differences))
    return replace(
        done,
        blind=sum(each.right_blind for each in group),
        difference=table.difference,
        difference_interval=(gain.low, gain.high),
        p_value=sign_flip_test(map(sum, differences)),
    )


def _groups(answered: Sequence[AnsweredQuestion]) -> list[list[AnsweredQuestion]]:
    """The questions by group, in the order of their first ones."""
    found: dict[tuple[str, int], list[AnsweredQuestion]] = {}
    for number, each in enumerate(answered):
        found.setdefault((each.group, 0 if each.group else number), []).append(each)
    return list(found.values())


def _answers(
    policy: Policy, source: VqaSource, indices: np.ndarray, partners: np.ndarray | None, limit: int
) -> Sequence[Answer]:
    batch = source.batch(indices)
    if partners is not None:
        batch = _with_images_of(batch, source, partners[indices])
    return policy.reply(batch.observation, limit)


def _with_images_of(batch: VqaBatch, source: VqaSource, partners: np.ndarray) -> VqaBatch:
    """Replace the images of the questions by those of their partners; black without a partner."""
    images = source.batch(np.maximum(partners, 0)).observation.images
    without_B = torch.from_numpy(partners < 0)
    images = {view: image.masked_fill(without_B[:, None, None, None], 0) for view, image in images.items()}
    return replace(batch, observation=replace(batch.observation, images=images))
