"""Columns that LeRobot does without: where they are absent or hold something else, data sets are read as LeRobot reads them."""

import pyarrow.parquet as pq
import pytest

from tests.data.cases import build
from tests.data.cases.test_reading import notes_of, require_sound
from tests.data.toyset import FPS, LENGTHS, TASKS, edit_info, edit_table
from vlaflow.data.lerobot import Dataset
from vlaflow.errors import DataError


def frames_are(change):
    return lambda root: edit_table(root / build.DATA, "frame_index", change)


@pytest.mark.parametrize("stored", [False, True], ids=["videos", "pictures"])
@pytest.mark.parametrize(
    ("change", "note"),
    [
        (lambda root: build.column_dropped(root, "frame_index"), "file-000.parquet has no 'frame_index'; frames are counted"),
        (frames_are(lambda frames: [None] * len(frames)), "file-000.parquet has no 'frame_index'; frames are counted"),
        (frames_are(lambda frames: [f + 1 for f in frames]), "of episode 0, 1, 2 and 2 more does not count from 0;"),
        (frames_are(lambda frames: [7] * len(frames)), "of episode 0, 1, 2 and 2 more does not count from 0;"),
        (frames_are(lambda frames: list(range(len(frames)))), "of episode 1, 2, 3 and 1 more does not count from 0;"),
    ],
)
def test_frame_numbers_are_not_needed(new, stored, change, note):
    if stored:
        build.no_videos(new)
    change(new)
    dataset = Dataset.open(new)
    require_sound(dataset)
    assert note in notes_of(dataset)
    assert dataset.columns().frame.tolist() == [i for n in LENGTHS for i in range(n)]


def test_rows_that_are_missing_are_not_counted_over(new):
    """Frame 4 of episode 1 is absent, and its numbers say so."""
    edit_table(new / build.DATA, "frame_index", lambda frames: [f + (12 + 4 <= i < 12 + 9) for i, f in enumerate(frames)])
    edit_table(new / build.DATA, "timestamp", lambda times: [t + (12 + 4 <= i < 12 + 9) / FPS for i, t in enumerate(times)])
    with pytest.raises(DataError, match=r"Episode 1 of .*'frame_index' is 5 at frame 4 .*data drop .* --episodes 1 --out DIR"):
        Dataset.open(new).columns()


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (lambda root: build.column_dropped(root, "timestamp"), ""),
        (lambda root: edit_table(root / build.DATA, "timestamp", lambda times: [None] * len(times)), ""),
        (
            lambda root: edit_table(root / build.DATA, "timestamp", lambda times: [i / FPS for i in range(len(times))]),
            "Timestamps of episode 1, 2, 3 and 1 more do not begin at 0 s (1 at 0.6 s)",
        ),
    ],
)
def test_times_are_not_needed_without_videos(new, change, note):
    build.no_videos(new)
    change(new)
    dataset = Dataset.open(new)
    require_sound(dataset)
    assert note in notes_of(dataset)


def test_task_numbers_may_have_gaps(new):
    build.task_numbers_with_gaps(new)
    dataset = Dataset.open(new)
    require_sound(dataset)
    assert "meta/tasks.parquet numbers its tasks up to 4 with gaps (3 missing, the first is 0)" in notes_of(dataset)
    assert [dataset.tasks[task] for task in dataset.columns().task[[0, 12]]] == list(TASKS[:2])
    edit_table(new / build.EPISODES, "tasks", lambda tasks: [[]] * len(tasks))
    assert [e.task for e in Dataset.open(new).episodes] == list(TASKS)
    edit_table(new / build.DATA, "task_index", lambda tasks: [2 if i == 14 else n for i, n in enumerate(tasks)])
    with pytest.raises(DataError, match=r"Episode 1 of .* has no task"):
        Dataset.open(new)


def test_lengths_are_also_those_of_the_ranges(new):
    path = new / build.EPISODES
    pq.write_table(pq.read_table(path).drop_columns(["length"]), path)
    require_sound(Dataset.open(new))


def test_a_file_of_its_own_needs_no_episode_numbers(old):
    path = old / "data/chunk-000/episode_000003.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["episode_index", "frame_index"]), path)
    dataset = Dataset.open(old)
    require_sound(dataset)
    assert "episode_000003.parquet has no 'frame_index'" in notes_of(dataset)


@pytest.mark.parametrize("what", ["episodes", "frames"])
def test_totals_may_lag_behind(new, what):
    """Tools that add episodes and leave meta/info.json as it was; where it counts more, something is missing."""
    edit_info(new, **{f"total_{what}": 4})
    dataset = Dataset.open(new)
    require_sound(dataset)
    assert f"meta/info.json counts 4 {what}, but meta/episodes/chunk-000/file-000.parquet describes" in notes_of(dataset)
    edit_info(new, **{f"total_{what}": 55})
    with pytest.raises(DataError, match=f"counts 55 {what} but .*data repair"):
        Dataset.open(new)
