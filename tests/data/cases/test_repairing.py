"""Tables as other tools leave them behind: read where nothing can be misunderstood, else refused with a repair that works."""

import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.cases import build
from tests.data.cases.test_reading import require_sound
from tests.data.toyset import TASKS, edit_info, edit_table
from vlaflow.data.edit import repair
from vlaflow.data.lerobot import Dataset
from vlaflow.errors import DataError


def test_numbers_in_the_types_that_other_tools_leave_behind_are_read(new):
    """Whole numbers as floats and words as categories, as pandas writes them; a shape of floats, as JSON may have it."""
    for key in ("frame_index", "episode_index", "task_index"):
        table = pq.read_table(new / build.DATA)
        place = table.column_names.index(key)
        pq.write_table(table.set_column(place, key, table[key].cast(pa.float64())), new / build.DATA)
    tasks = pq.read_table(new / "meta/tasks.parquet")
    place = tasks.column_names.index("task")
    pq.write_table(tasks.set_column(place, "task", tasks["task"].dictionary_encode()), new / "meta/tasks.parquet")
    build.feature(new, "action", shape=[float(n) for n in build.features(new)["action"]["shape"]])
    dataset = Dataset.open(new)
    require_sound(dataset)
    assert [e.task for e in dataset.episodes] == list(TASKS)
    edit_table(new / build.DATA, "frame_index", lambda frames: [f + 0.5 for f in frames])
    with pytest.raises(DataError, match=r"'frame_index' in .* instead of whole numbers"):
        Dataset.open(new).columns()


@pytest.mark.parametrize(
    ("change", "sentence", "log"),
    [
        (
            lambda root: build.column_dropped(root, "timestamp"),
            "no column 'timestamp'.*data repair",
            "Timestamps of 5 episodes",
        ),
        (lambda root: build.column_dropped(root, "frame_index"), "no column 'frame_index'.*data repair", "no 'frame_index'"),
        (lambda root: build.column_dropped(root, "task_index"), "no column 'task_index'.*data repair", "names no task"),
        (build.task_numbers_with_a_gap, "task_index must count 0 to 2.*data repair", "no row names"),
        (lambda root: build.feature(root, build.TOP, shape=[48, 32, 3]), "is 32x48.*48x32.*data repair", "now .* 32x48"),
    ],
)
def test_the_repair_that_a_refusal_names_works(new, tmp_path, change, sentence, log):
    change(new)
    with pytest.raises(DataError, match=sentence):
        require_sound(Dataset.open(new))
    made = repair(new, tmp_path / "whole")
    assert re.search(log, " ".join(made.changes))
    require_sound(Dataset.open(made.root))


def test_a_clone_without_git_lfs_is_told_to_fetch_its_files(old):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"
    (old / f"videos/chunk-000/{build.TOP}/episode_000001.mp4").write_text(pointer)
    with pytest.raises(DataError, match=r"Episode 1 of .*mp4\) is only a pointer of Git LFS .*: git lfs pull"):
        Dataset.open(old).frames(1, "corner")
    (old / "data/chunk-000/episode_000001.parquet").write_text(pointer)
    with pytest.raises(DataError, match=r"episode_000001.parquet is only a pointer of Git LFS .*: git lfs pull"):
        Dataset.open(old).columns()


def test_rows_of_another_rate_than_stated_name_theirs(old):
    edit_info(old, fps=15)
    with pytest.raises(DataError, match=r"disagrees with fps = 15 .*the rows are 20 per second, .*correct fps there"):
        Dataset.open(old).columns()
    edit_info(old, fps=20)
    require_sound(Dataset.open(old))


def test_booleans_where_numbers_are_declared_are_refused_and_repaired(new, tmp_path):
    closed = [[i % 2 == 0, True, False] for i in range(build.ROWS)]
    build.column(new, "action", closed, pa.list_(pa.bool_()))
    with pytest.raises(
        DataError, match=r"holds bool instead of numbers\). Have the booleans written as numbers: vlaflow data repair"
    ):
        Dataset.open(new).columns()
    made = repair(new, tmp_path / "whole")
    assert "'action' holds booleans where numbers are declared; they are written as 0 and 1." in made.changes
    assert np.array_equal(Dataset.open(made.root).columns().action, np.array(closed, np.float32))
