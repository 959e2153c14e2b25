"""How well a checkpoint answers questions about images, by kind, next to what can be had without looking.

An answer is right when it has ended and equals the true one but for case and spaces. Two baselines belong to every accuracy:

    majority    always the most frequent of the true answers to the same wording: the most that words alone can give
    blind       the checkpoint itself, shown the image of another question with the same wording

Both are measured on the very same questions, so seeing and blind answers are compared in pairs (McNemar's exact test).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
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
from vlaflow.evaluation.results import read_as
from vlaflow.evaluation.statistics import PairedOutcomes, mcnemar, paired_difference, wilson
from vlaflow.io import require_writable, write_json
from vlaflow.policies.base import Policy
from vlaflow.policies.checkpoint import local_folder
from vlaflow.policies.provenance import fingerprint, new_questions, trained_on
from vlaflow.versions import command_line, machine, versions

FORMAT = "vlaflow answers 1"
FILE = "answers.json"
EVERYTHING = "all"
Part = Literal["held-out", "all"]


@dataclass(frozen=True)
class AnsweredQuestion:
    """One question, and what was said.

    Args:
        name, question_kind, question, answer: as in the set.
        said: with its image.
        ended: whether the answer came to its end within the limit; one that did not is wrong.
        blind: said with another question's image; None where that was not tried.
        blind_ended: as ``ended``, of ``blind``.
    """

    name: str
    question_kind: str
    question: str
    answer: str
    said: str
    ended: bool
    blind: str | None = None
    blind_ended: bool = True

    @property
    def right(self) -> bool:
        """Said and true are the same but for case and spaces."""
        return self.ended and normal(self.said) == normal(self.answer)

    @property
    def right_blind(self) -> bool:
        """Whether the answer without the right image was right."""
        return self.blind is not None and self.blind_ended and normal(self.blind) == normal(self.answer)


@dataclass(frozen=True)
class Accuracy:
    """One kind of question, or all.

    Args:
        question_kind: "all" for all of them.
        questions, right: counts.
        interval: of the accuracy, Wilson, 95 %.
        majority: right answers of the majority-class baseline: always the most frequent true answer to the same wording.
        blind: right answers with other questions' images; None where that was not tried.
        difference: accuracy minus blind accuracy.
        difference_interval: Newcombe's method 10, 95 %.
        p_value: exact McNemar test of seeing against blind.
        unended: answers that had not ended within the limit.
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
    """The whole file.

    Args:
        kinds: by kind, and all together last.
        per_question: everything that was said.
        part: which questions were asked.
        questions, questions_fingerprint: the set.
        checkpoint, fingerprint: the policy that answered.
        limit: most tokens of an answer.
        seed: of the exchange of images.
        command, machine, versions: how this file came about.
        format: of this file.
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
    """What is asked.

    Args:
        part: the questions that training held out, or all of a set that the checkpoint never learned from.
        turns: as in ``VqaDataset.open``; None as in training, or all.
        limit: most tokens of an answer.
        batch_size: questions answered together.
        blind: also ask with exchanged images.
        seed: of the exchange.
        size: side at which images are shown to backbones that look at any size.
        device: where the networks run.
    """

    part: Part = "held-out"
    turns: Turns | None = None
    limit: int = 32
    batch_size: int = 64
    blind: bool = True
    seed: int = 0
    size: int = 448
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.limit < 1 or self.batch_size < 1:
            raise ConfigError(f"limit and batch_size are at least 1, got {self.limit} and {self.batch_size}.")


def run(
    checkpoint: Path | str,
    questions: Path | str,
    config: AnswerConfig,
    out: Path,
    progress: Callable[[int, int], None] | None = None,
) -> AnswerResults:
    """Ask, and write ``answers.json`` into ``out``.

    Args:
        checkpoint: folder or Hugging Face repository id.
        questions: file or folder of a set.
        config: what is asked.
        out: folder.
        progress: called with (questions done, questions in all); asking again blindly counts too.

    Raises:
        VlaflowError: when the parts do not fit together.
    """
    folder = local_folder(checkpoint)
    asked = next((each.vqa for each in reversed(trained_on(folder)) if each.vqa is not None), None)
    turns = config.turns or (asked.turns if asked else "all")
    found = VqaDataset.open(questions, turns)
    chosen = tuple(range(len(found))) if config.part == "all" else held_out(folder, found, turns)
    policy = Policy.from_pretrained(folder, config.device)
    speaking(policy.model.backbone)
    views = policy.model.backbone.views
    image_cache = ImageCache.open(found, next(iter(views.values())) or (asked.size if asked else config.size))
    source = VqaSource(found, image_cache, tuple(views), len(policy.stats["state"].mean), chosen)
    require_writable(out / FILE)
    answered = ask(policy, source, config, progress)
    results = AnswerResults(
        kinds=count(answered),
        per_question=tuple(answered),
        part=config.part,
        questions=str(questions),
        questions_fingerprint=found.fingerprint,
        checkpoint=str(checkpoint),
        fingerprint=fingerprint(folder),
        limit=config.limit,
        seed=config.seed,
        command=command_line(),
        machine=machine(),
        versions=versions(),
    )
    write_json(out / FILE, asdict(results))
    return results


def held_out(folder: Path, questions: VqaDataset, turns: Turns = "all") -> tuple[int, ...]:
    """The questions that neither the checkpoint nor one that it continues has learned from.

    Those that training held out of a set of its own, all of another one.

    Args:
        folder: of the checkpoint.
        questions: the set.
        turns: how it was opened.

    Raises:
        CheckpointError: when the checkpoint does not say, or training held out none.
        ConfigError: when training read the conversations of this set in another way.
    """
    trained = trained_on(folder)
    if not trained:
        raise CheckpointError(
            f"{folder} lacks training/, so nobody knows which questions it learned from. Say that {questions.file} is new "
            "to it with --part all, or evaluate in the folder where it was trained."
        )
    new = new_questions(questions, turns, trained, folder)
    if not new:
        raise CheckpointError(f"Training held out no question of {questions.file}. Train with a larger vqa.held_out.")
    return new


def ask(
    policy: Policy, source: VqaSource, config: AnswerConfig, progress: Callable[[int, int], None] | None = None
) -> list[AnsweredQuestion]:
    """What a policy says to every question of a source, with its image and, where ``config.blind``, with another's."""
    asked = [source.questions.questions[i] for i in source.indices]
    total = len(asked) * (1 + config.blind)
    seen = _answers(policy, source, None, config, lambda done: progress and progress(done, total))
    blind: Sequence[Answer | None] = [None] * len(asked)
    if config.blind:
        partners = exchange(asked, config.seed)
        blind = _answers(policy, source, partners, config, lambda done: progress and progress(len(asked) + done, total))
    return [
        AnsweredQuestion(q.name, q.kind, q.question, q.answer, s.text, s.ended, *((b.text, b.ended) if b else ()))
        for q, s, b in zip(asked, seen, blind, strict=True)
    ]


def exchange(questions: Sequence[Question], seed: int) -> np.ndarray:
    """For each question another one with the same wording and other images, int64; −1 where there is none.

    Those of one wording are put in a random order, in which each takes the next one's images that differ from its own.
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
    """Accuracies by kind in the order of their first questions, and of all together."""
    kinds = list(dict.fromkeys(each.question_kind for each in answered))
    groups = {kind or "unnamed": [each for each in answered if each.question_kind == kind] for kind in kinds}
    return tuple(_accuracy(name, group) for name, group in (*groups.items(), (EVERYTHING, list(answered))))


def normal(text: str) -> str:
    """Without case, and with single spaces."""
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
    interval = wilson(right, n)
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
    gain = paired_difference(table)
    return replace(
        done,
        blind=sum(each.right_blind for each in group),
        difference=table.difference,
        difference_interval=(gain.low, gain.high),
        p_value=mcnemar(table),
    )


def _answers(
    policy: Policy,
    source: VqaSource,
    partners: np.ndarray | None,
    config: AnswerConfig,
    progress: Callable[[int], object],
) -> list[Answer]:
    said: list[Answer] = []
    for start in range(0, len(source), config.batch_size):
        indices = np.arange(start, min(start + config.batch_size, len(source)))
        batch = source.batch(indices)
        if partners is not None:
            batch = _with_pictures_of(batch, source, partners[indices])
        said += policy.reply(batch.observation, config.limit)
        progress(len(said))
    return said


def _with_pictures_of(batch: VqaBatch, source: VqaSource, partners: np.ndarray) -> VqaBatch:
    """The questions with others' images; black where there is no other."""
    images = source.batch(np.maximum(partners, 0)).observation.images
    lonely_B = torch.from_numpy(partners < 0)
    images = {view: image.masked_fill(lonely_B[:, None, None, None], 0) for view, image in images.items()}
    return replace(batch, observation=replace(batch.observation, images=images))
