"""Data sets as people have them, edited: what reads well is kept, and what cannot be kept is said."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.cases import build
from tests.data.cases.test_reading import require_sound
from tests.data.toyset import FPS, LENGTHS, TASKS, edit_table, episode, files_of
from vlaflow.data import writer_meta as meta
from vlaflow.data.check import check
from vlaflow.data.edit import drop, merge, repair
from vlaflow.data.lerobot import Dataset
from vlaflow.data.video import encode_video
from vlaflow.errors import DataError, SpecError

EVERYTHING = tuple(range(len(LENGTHS)))


def rows_of(root, number):
    return root / f"data/chunk-000/episode_{number:06d}.parquet"


def replace_column(path, key, values):
    table = pq.read_table(path)
    if key in table.column_names:
        table = table.drop_columns([key])
    pq.write_table(table.append_column(key, values), path)


def lines_of(root, change):
    """Change the lines of meta/episodes.jsonl, by number."""
    path = root / "meta/episodes.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("\n".join(json.dumps(line | change(i)) for i, line in enumerate(lines)))


def actions(root):
    return Dataset.open(root).columns().action


@pytest.mark.parametrize("first", [True, False])
def test_an_episode_of_whole_numbers_among_others_of_fractions_keeps_both(old, tmp_path, first):
    """A recorder that writes lists as Python has them stores [0, 1, 0] as whole numbers, in this episode's file alone."""
    number = 0 if first else 3
    replace_column(rows_of(old, number), "action", pa.array([[0, 1, 0]] * LENGTHS[number], pa.list_(pa.int64())))
    edited = repair(old, tmp_path / "out")
    assert edited.episodes == len(LENGTHS)
    assert np.array_equal(actions(tmp_path / "out"), actions(old))


def test_a_column_that_is_empty_in_the_first_episode_keeps_the_words_of_the_others(old, tmp_path):
    for number, length in enumerate(LENGTHS):
        words = pa.array([None] * length) if number == 0 else pa.array([f"note {number}"] * length)
        replace_column(rows_of(old, number), "note", words)
    build.feature(old, "note", dtype="string", shape=[1], names=None)
    assert repair(old, tmp_path / "out").episodes == len(LENGTHS)
    notes = pq.read_table(tmp_path / "out" / build.DATA)["note"].to_pylist()
    assert notes == [None if n == 0 else f"note {n}" for n, length in enumerate(LENGTHS) for _ in range(length)]


def test_an_episode_that_lacks_a_camera_is_the_only_one_left_out(new, tmp_path):
    """Where meta names no file for its video. The counts of frames do not add up then, but the others need no counting."""
    images = [episode(i)[0]["corner"] for i in EVERYTHING if i != 2]
    encode_video(np.concatenate(images), new / f"videos/{build.TOP}/chunk-000/file-000.mp4", FPS)
    (new / "meta/hashes.json").unlink()
    ends = np.cumsum([0 if i == 2 else length for i, length in enumerate(LENGTHS)]) / FPS
    starts = np.concatenate(([0.0], ends[:-1]))
    values = {"chunk_index": [0] * 5, "file_index": [0] * 5, "from_timestamp": starts.tolist(), "to_timestamp": ends.tolist()}
    for name, cells in values.items():
        own = [None if i == 2 else cell for i, cell in enumerate(cells)]
        edit_table(new / build.EPISODES, f"videos/{build.TOP}/{name}", lambda _, own=own: own)
    with pytest.raises(DataError, match=r"Episode 2 .* does not say where its video .* data repair"):
        Dataset.open(new)
    edited = repair(new, tmp_path / "out")
    assert any("Episode 2 of" in s and "has no place in the video" in s for s in edited.changes)
    dataset = Dataset.open(tmp_path / "out")
    assert check(dataset).problems == ()
    assert [e.length for e in dataset.episodes] == [length for i, length in enumerate(LENGTHS) if i != 2]
    drop(new, [2], tmp_path / "fewer")
    assert np.array_equal(actions(tmp_path / "fewer"), actions(tmp_path / "out"))


def test_what_the_episode_table_states_besides_is_kept_where_some_state_nothing(old, tmp_path):
    lines_of(old, lambda i: {"operator": f"person {i}"} if i != 3 else {})
    repair(old, tmp_path / "out")
    table = pq.read_table(tmp_path / "out" / build.EPISODES)
    assert table["operator"].to_pylist() == [None if i == 3 else f"person {i}" for i in EVERYTHING]


@pytest.mark.parametrize("values", [lambda i: "good" if i == 0 else 1, lambda _: {}], ids=["two types", "empty objects"])
def test_what_no_table_can_hold_is_left_out_and_said(old, tmp_path, values):
    lines_of(old, lambda i: {"remark": values(i), "operator": "ann"})
    edited = repair(old, tmp_path / "out")
    assert any("'remark' of the episode table" in s and "left out" in s for s in edited.changes)
    table = pq.read_table(tmp_path / "out" / build.EPISODES)
    assert "remark" not in table.column_names
    assert table["operator"].to_pylist() == ["ann"] * 5


def test_an_instruction_without_words_is_kept(new, tmp_path):
    """LeRobot records with an empty one where none is given; it is read, so it is not a reason to lose the episode."""
    empty = [task if task == TASKS[1] else "" for task in TASKS]
    tasks = pq.read_table(new / "meta/tasks.parquet")
    meta.write_tasks(new / "meta/tasks.parquet", [w if w == TASKS[1] else "" for w in tasks["task"].to_pylist()])
    edit_table(new / build.EPISODES, "tasks", lambda _: [[word] for word in empty])
    assert [e.task for e in Dataset.open(new).episodes] == empty
    for name, edited in (("out", repair(new, tmp_path / "out")), ("both", merge([new, new], tmp_path / "both"))):
        assert [e.task for e in Dataset.open(tmp_path / name).episodes] == empty * (edited.episodes // len(empty))
    assert repair(tmp_path / "out", tmp_path / "again").changes == ()


@pytest.mark.parametrize("key", ["next.reward", "info.contact"])
def test_columns_that_nothing_is_learned_from_may_have_empty_cells(new, tmp_path, key):
    """Of numbers and of vectors, in some rows or in all."""
    cells = [None if i % 3 else float(i) for i in range(build.ROWS)]
    kind, shape = pa.float32(), [1]
    if key == "info.contact":
        cells, kind, shape = [None if cell is None else [cell, 1.0] for cell in cells], pa.list_(pa.float32()), [2]
    build.column(new, key, cells, kind, dtype="float32", shape=shape, names=None)
    build.column(new, "info.force", [None] * build.ROWS, pa.float32(), dtype="float32", shape=[1], names=None)
    require_sound(Dataset.open(new))
    drop(new, [0], tmp_path / "out")
    kept = pq.read_table(tmp_path / "out" / build.DATA)
    assert kept[key].to_pylist() == cells[LENGTHS[0] :]
    assert kept["info.force"].null_count == build.ROWS - LENGTHS[0]
    stats = json.loads((tmp_path / "out/meta/stats.json").read_text())
    assert stats[key]["count"] == [sum(cell is not None for cell in cells[LENGTHS[0] :])]
    assert repair(new, tmp_path / "whole").episodes == len(LENGTHS)


def test_depth_maps_are_not_cut_to_eight_bits(new, tmp_path):
    """One that begins between key frames cannot be copied, and a camera's encoder would make colours of it."""
    build.depth_video(new)
    (new / "meta/hashes.json").unlink()
    before = files_of(new)
    with pytest.raises(DataError, match=r"depth maps .* are not encoded again"):
        drop(new, [0], tmp_path / "fewer")
    assert files_of(new) == before


def test_a_table_of_many_episodes_has_the_same_columns_in_every_file(tmp_path, monkeypatch):
    """LeRobot reads all of them as one table, which it is not if a value is absent throughout a file."""
    monkeypatch.setattr(meta, "EPISODES_PER_FILE", 2)
    rows = [{"episode_index": i, "operator": None if i < 2 else "ann"} for i in range(4)]
    meta.write_episodes(tmp_path, rows, 1000)
    schemas = [pq.read_schema(path) for path in sorted(tmp_path.rglob("*.parquet"))]
    assert len(schemas) == 2
    assert schemas[0].equals(schemas[1])


def test_a_column_that_only_some_rows_have_is_left_out_and_said(old, tmp_path):
    """The other episodes would have nothing there, which readers do not bear."""
    for number in (1, 2):
        replace_column(rows_of(old, number), "next.reward", pa.array([1.0] * LENGTHS[number], pa.float32()))
    build.feature(old, "next.reward", dtype="float32", shape=[1], names=None)
    edited = repair(old, tmp_path / "out")
    assert "'next.reward' is declared, but not in the rows of every episode; it is left out." in edited.changes


def test_cameras_that_two_recorders_declare_in_other_words_are_merged(new, pristine, tmp_path):
    """LeRobot has called the last axis both "channel" and "channels", and others put it first; the video is the same."""
    build.feature(new, build.TOP, names=["height", "width", "channels"])
    build.feature(new, "observation.image", shape=[3, 32, 32], names=["channels", "height", "width"])
    merge([pristine, new], tmp_path / "both")
    assert check(Dataset.open(tmp_path / "both")).problems == ()
    build.feature(new, build.TOP, shape=[48, 32, 3])
    with pytest.raises(
        SpecError, match=r"the size of 'observation\.images\.corner' is 32x48x3 in one and 48x32x3 in the other"
    ):
        merge([pristine, new], tmp_path / "other")
