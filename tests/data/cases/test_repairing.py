"""Tables as other tools leave them behind: read where nothing can be misunderstood, else refused with a repair that works."""

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.cases import build
from tests.data.cases.test_reading import require_sound
from tests.data.toyset import TASKS, edit_info, edit_table, episode
from vlaflow.data.edit import drop, repair
from vlaflow.data.lerobot import Dataset
from vlaflow.data.reading import Reading
from vlaflow.data.row_numbers import regular_rate
from vlaflow.data.video import encode_video
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
            "Timestamps of 5 episodes are frame_index / fps; they had none",
        ),
        (
            lambda root: edit_table(
                root / build.DATA, "frame_index", lambda frames: [f if i != 5 else 4 for i, f in enumerate(frames)]
            ),
            r"frame_index' is 4 at frame 5 .*have frames counted by the timestamps: vlaflow data repair",
            "no row is missing, so frames are counted",
        ),
        (lambda root: build.column_dropped(root, "task_index"), "no column 'task_index'.*data repair", "names no task"),
        (
            lambda root: edit_table(root / build.DATA, "task_index", lambda tasks: [-1] * len(tasks)),
            r"'task_index' is -1 at frame 0 .*names no task in meta.*data repair",
            "they get the one of the episode table",
        ),
        (build.task_number_of_two, "task_index = 0 is the number of two tasks.*data repair", "number 0 to 2 tasks"),
        (
            lambda root: build.length_stated(root, 0, 11),
            "Episode 0 .* has 11 frames according to meta, but .* holds 12 rows.*data repair",
            "another length than it has rows",
        ),
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


@pytest.mark.parametrize("stated", [15, 40])
def test_rows_of_another_rate_than_stated_name_theirs_and_are_repaired(old, tmp_path, stated):
    """Recorders that state their default rate; the rows, the videos and the action spec are those of another one."""
    edit_info(old, fps=stated)
    with pytest.raises(
        DataError, match=rf"disagrees with fps = {stated} .*all rows are 20 per second.*correct fps there.*data repair"
    ):
        Dataset.open(old).columns()
    made = repair(old, tmp_path / "whole")
    assert f"meta/info.json stated fps = {stated}, but the timestamps of all episodes are 20 per second" in " ".join(
        made.changes
    )
    assert Dataset.open(made.root).fps == 20
    require_sound(Dataset.open(made.root))
    edit_info(old, fps=20)
    require_sound(Dataset.open(old))


def test_a_clock_at_no_rate_says_its_mean_and_is_read_by_number_when_told(old):
    for path in (old / "data").rglob("*.parquet"):
        edit_table(path, "timestamp", lambda times: [1.2 * t + 0.02 * (i % 2) for i, t in enumerate(times)])
    with pytest.raises(DataError, match=r"the rows are 16\.\d+ per second on average.*larger --tolerance-s") as refused:
        Dataset.open(old).columns()
    assert "data repair" not in str(refused.value)
    require_sound(Dataset.open(old, reading=Reading.of(tolerance_s=0.5)))


def test_a_rate_is_corrected_wherever_it_is_stated(new, tmp_path):
    """Files, offsets and videos are of 20 frames per second, what is written about them says 10."""
    spec = json.loads((new / "meta/info.json").read_text())["x_vlaflow"]
    spec["action_spec"]["rate_hz"] = 10
    video = build.features(new)[build.TOP]
    build.feature(new, build.TOP, info={**video["info"], "video.fps": 10})
    edit_info(new, fps=10, x_vlaflow=spec)
    made = Dataset.open(repair(new, tmp_path / "whole").root)
    assert (made.fps, made.action_spec.rate_hz, made.features[build.TOP]["info"]["video.fps"]) == (20, 20, 20)
    require_sound(made)


def test_a_rate_that_the_videos_contradict_is_not_corrected(new, tmp_path):
    edit_table(new / build.DATA, "timestamp", lambda times: [t / 2 for t in times])
    made = repair(new, tmp_path / "whole")
    assert "Timestamps of 5 episodes are set to frame_index / fps" in " ".join(made.changes)
    assert Dataset.open(made.root).fps == 20
    require_sound(Dataset.open(made.root))


def test_rates_are_read_from_times_only_where_they_leave_no_doubt():
    rng, frames = np.random.default_rng(0), [np.arange(n) for n in (40, 300)]
    off_s = [rng.uniform(-0.004, 0.004, len(f)) for f in frames]
    exact = {rate: [f / rate + 3.5 for f in frames] for rate in (0.5, 15, 20, 2.5 * np.pi, 30000 / 1001)}
    for rate, times in exact.items():
        assert regular_rate(times, 25) == pytest.approx(rate, rel=1e-5)
        assert regular_rate(times, rate) is None
    assert regular_rate([t + o for t, o in zip(exact[20], off_s, strict=True)], 25) == 20  # a clock that is a little off
    assert regular_rate([t + o for t, o in zip(exact[2.5 * np.pi], off_s, strict=True)], 25) is None
    assert regular_rate([exact[20][0], exact[15][1]], 25) is None
    assert regular_rate([np.zeros(40), np.full(9, np.nan)], 25) is None
    assert regular_rate([np.delete(t, 7) for t in exact[20]], 25) is None


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


def test_cures_of_videos_at_another_rate_and_of_missing_ones_work(old, tmp_path):
    path = old / f"videos/chunk-000/{build.TOP}/episode_000001.mp4"
    encode_video(episode(1)[0]["corner"], path, 25)
    with pytest.raises(DataError, match=r"frame 2 is at 0.0800 s .*have frames taken by their number: vlaflow data repair"):
        Dataset.open(old).frames(1, "corner")
    require_sound(Dataset.open(repair(old, tmp_path / "whole").root))
    path.unlink()
    with pytest.raises(
        DataError, match=r"which is missing.*leave the episode out: vlaflow data drop .* --episodes 1 --out DIR"
    ):
        Dataset.open(old)
    assert len(Dataset.open(drop(old, [1], tmp_path / "fewer").root).episodes) == 4
