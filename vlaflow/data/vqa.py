r"""VQA data sets: questions about images and their answers, in LLaVA's file layout.

    questions.jsonl    one record per line (or questions.json: one list of records)
    images/...         wherever the records say, relative to that file

    {"id": "7", "image": "images/7.png", "conversations": [
        {"from": "human", "value": "<image>\nIs the drawer open or closed?"}, {"from": "gpt", "value": "closed"}]}

"image" is a path, a list of paths, or absent; the human turns contain one ``<image>`` per image. Two optional keys are
read: "kind" (accuracies are reported by it) and "group" (records of one group are held out together). Reading is strict:
anything invalid is an error that names the line, and nothing is skipped.

A conversation of several turns becomes one question per turn: the earlier questions and answers, one per line, followed by
the turn's own question, with all images up to that turn. With ``turns="first"`` only the first turn is used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from vlaflow.errors import ConfigError, DataError
from vlaflow.strict import MOST_LISTED, is_file, read_json, read_lines
from vlaflow.text import shown

Turns = Literal["all", "first"]
MARK = "<image>"
NAMES = ("questions.jsonl", "questions.json")
SPEAKERS = ("human", "gpt")


@dataclass(frozen=True)
class Question:
    """One question and its answer.

    Args:
        name: id of the record, with the turn if there are several: "7", "7/2".
        images: paths relative to the folder of the data set; empty for a question about text alone.
        question: the text of the question, earlier turns included, without ``<image>``.
        answer: the true answer.
        kind: kind of question; "" if the data set does not state it.
        group: questions of one group are held out together, as are those with the same image; "" for no group.
    """

    name: str
    images: tuple[str, ...]
    question: str
    answer: str
    kind: str = ""
    group: str = ""


@dataclass(frozen=True)
class VqaDataset:
    """A VQA data set that has been read and checked, including the presence of its images.

    Args:
        file: the file of the records.
        questions: in the order of the file.
    """

    file: Path
    questions: tuple[Question, ...]

    @staticmethod
    def open(path: Path | str, turns: Turns = "all") -> VqaDataset:
        """Read a file, or ``questions.jsonl`` or ``questions.json`` in a folder.

        Raises:
            DataError: naming file, line and cure.
        """
        file = _file(Path(path))
        found: list[Question] = []
        present: set[str] = set()
        for where, record in _records(file):
            for question in _questions(record, turns, where):
                found.append(question)
                for image in question.images:
                    if image not in present and not is_file(file.parent / image):
                        raise DataError(
                            f"{where} names the image {shown(image)}, which {file.parent} lacks. Copy it there, or remove the "
                            "record."
                        )
                    present.add(image)
        if not found:
            raise DataError(f"{file} holds no questions. Write a record per line; docs/vqa.md shows one.")
        return VqaDataset(file, tuple(found))

    def __len__(self) -> int:
        return len(self.questions)

    @property
    def root(self) -> Path:
        """The folder that image paths are relative to."""
        return self.file.parent

    @cached_property
    def images(self) -> tuple[str, ...]:
        """Every image once, in the order of the questions."""
        return tuple(dict.fromkeys(image for question in self.questions for image in question.images))

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits of the questions in full and of each image's path and size in bytes."""
        digest = hashlib.blake2b(digest_size=16)
        for q in self.questions:
            digest.update(json.dumps([q.name, q.images, q.question, q.answer, q.kind, q.group]).encode())
        for image in self.images:
            digest.update(f"{image}\0{(self.root / image).stat().st_size}\0".encode())
        return digest.hexdigest()

    def split(self, held_out: float, seed: int = 0) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Divide the questions into (training, held out): int indices, ascending.

        Questions that share an image or a group stay together. The resulting families are ordered by a hash of their group
        or image (or name), and the first ``round(held_out · families)`` are held out: at least one (if the share is not 0
        and there are two or more) and never all. So the split does not depend on the order of the file, and what a smaller
        share holds out is a subset of what a larger one does.

        Raises:
            ConfigError: the share is not in [0, 1).
        """
        if not 0 <= held_out < 1:
            raise ConfigError(f"The held-out share of the questions must lie in [0, 1), got {held_out}.")
        families = self._families()
        count = round(held_out * len(families))
        if held_out > 0:
            count = min(max(count, 1), len(families) - 1)

        def place(name: str) -> bytes:
            return hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()

        held = {i for name in sorted(families, key=place)[:count] for i in families[name]}
        return tuple(i for i in range(len(self)) if i not in held), tuple(sorted(held))

    def _families(self) -> dict[str, list[int]]:
        """Indices of connected questions, by the smallest of their labels."""
        parent: dict[str, str] = {}

        def root(label: str) -> str:
            while parent.setdefault(label, label) != label:
                parent[label] = label = parent[parent[label]]
            return label

        labels = [_labels(question) for question in self.questions]
        for own in labels:
            roots = sorted(root(label) for label in own)
            for other in roots[1:]:
                parent[root(other)] = root(roots[0])
        families: dict[str, list[int]] = {}
        for i, own in enumerate(labels):
            families.setdefault(root(own[0]), []).append(i)
        return {min(label for i in members for label in labels[i]): members for members in families.values()}


def _labels(question: Question) -> list[str]:
    found = [f"image {image}" for image in question.images]
    if question.group:
        found.append(f"group {question.group}")
    return found or [f"words {question.name.partition('/')[0]}"]


# -- reading -----------------------------------------------------------------------------------------------------------------


def _file(path: Path) -> Path:
    if path.is_file():
        return path
    here = [path / name for name in NAMES if (path / name).is_file()]
    if len(here) == 1:
        return here[0]
    if here:
        raise DataError(f"{path} holds {' and '.join(NAMES)}; name the one to read.")
    raise DataError(f"There is no {path / NAMES[0]}. Name a file of questions, or record one with vlaflow record-vqa.")


def _records(file: Path) -> Iterator[tuple[str, Any]]:
    """Every record, with its location in words."""
    if file.suffix == ".json":
        records = read_json(file, DataError, "fix it, or write one record per line.", finite=True, most_bytes=MOST_LISTED)
        if not isinstance(records, list):
            raise DataError(f"{file} must be a list of records. Put them in [ ], or one per line into a .jsonl file.")
        yield from ((f"{file}, record {number}", record) for number, record in enumerate(records, 1))
        return
    yield from read_lines(file, DataError, "fix the line, or remove it.", finite=True)


def _questions(record: Any, turns: Turns, where: str) -> Iterator[Question]:
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: a record is an object with id, image and conversations, not {type(record).__name__}.")
    name = record.get("id")
    if not isinstance(name, str | int) or isinstance(name, bool) or name == "":
        raise DataError(f"{where}: 'id' must be a string or a number, got {shown(name)}. Give the record an id.")
    images = _images(record.get("image"), where)
    kind, group = (_text(record.get(key, ""), key, where) for key in ("kind", "group"))
    exchanges = list(_exchanges(record.get("conversations"), where))
    marks = sum(human.count(MARK) for human, _ in exchanges)
    if marks != len(images):
        raise DataError(f"{where}: {len(images)} image(s) and {marks} {MARK} in the human turns. Write one {MARK} per image.")
    earlier: list[str] = []
    images_so_far = 0
    for turn, (human, answer) in enumerate(exchanges[: 1 if turns == "first" else None], 1):
        images_so_far += human.count(MARK)
        words = " ".join(human.replace(MARK, " ").split())
        if not words:
            raise DataError(f"{where}: turn {2 * turn - 1} contains images but no question. Add the question as text.")
        question = "\n".join((*earlier, words))
        earlier += [words, answer]
        yield Question(
            f"{name}/{turn}" if len(exchanges) > 1 else str(name), images[:images_so_far], question, answer, kind, group
        )


def _images(value: Any, where: str) -> tuple[str, ...]:
    paths = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(paths, Sequence) or not all(isinstance(path, str) and path for path in paths):
        raise DataError(f"{where}: 'image' must be a path or a list of paths, got {shown(value)}.")
    for path in paths:
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise DataError(
                f"{where}: the image {shown(path)} lies outside the folder of the data set. Move it next to the file "
                "of questions."
            )
    return tuple(Path(path).as_posix() for path in paths)


def _exchanges(turns: Any, where: str) -> Iterator[tuple[str, str]]:
    """The pairs of question and answer of a conversation."""
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: 'conversations' must be a list of turns, got {shown(turns)}.")
    texts: list[str] = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, Mapping) or not {"from", "value"} <= turn.keys():
            raise DataError(f"{where}: turn {number + 1} must be an object with 'from' and 'value', got {shown(turn)}.")
        expected = SPEAKERS[number % 2]
        if turn["from"] != expected:
            fault = "an answer before its question" if turn["from"] == "gpt" else f"from {shown(turn['from'])}"
            raise DataError(
                f"{where}: turn {number + 1} is {fault}; human and gpt take turns, human first, so {expected} is expected here."
            )
        text = _text(turn["value"], f"turn {number + 1}", where).strip()
        if not text:
            raise DataError(f"{where}: turn {number + 1}, of {expected}, is empty. Fill it, or remove the record.")
        if expected == "gpt" and MARK in text:
            raise DataError(f"{where}: the answer in turn {number + 1} contains {MARK}. Images belong in the human turns.")
        texts.append(text)
    if len(texts) % 2:
        raise DataError(f"{where}: the last question has no answer. Add a turn from gpt, or remove the question.")
    yield from zip(texts[::2], texts[1::2], strict=True)


def _text(value: Any, what: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {what} must be a string, got {shown(value)}.")
    return value
