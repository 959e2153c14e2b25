"""Writing: what goes in comes out, the bytes depend on the episodes alone, and nothing half-written looks whole."""

import ctypes
import json
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.data.toyset import FPS, LENGTHS, SPEC, TASKS, VIEWS, episode, files_of, full_disk, write_v3, writer
from vlaflow.data.lerobot import Dataset
from vlaflow.data.video import encode_video, exact_rate
from vlaflow.data.writer import Writer
from vlaflow.errors import DataError, SpecError

TINY = Path(__file__).parent.parent / "fixtures/lerobot_v3_tiny"


def test_numbers_come_back_exactly(pristine):
    """float32 in, float32 out; pixels are compared in the reader's tests."""
    columns = Dataset.open(pristine).columns()
    assert np.array_equal(columns.action, np.concatenate([episode(i)[2] for i in range(5)]))
    assert np.array_equal(columns.state, np.concatenate([episode(i)[1] for i in range(5)]))
    assert np.array_equal(columns.episode, np.repeat(np.arange(5), LENGTHS))


def test_writing_twice_gives_the_same_bytes(pristine, tmp_path):
    again = files_of(write_v3(tmp_path / "again"))
    assert again == files_of(pristine)
    assert len(again) == 9


def _encode(task):
    index, view, path = task
    return encode_video(episode(index)[0][view], Path(path), FPS)


@pytest.mark.parametrize("as_path", [False, True])
def test_segments_encoded_elsewhere_give_the_same_bytes(pristine, tmp_path, as_path):
    """Whether frames, a segment or only its path is handed over, and in which process it was encoded, leaves no trace."""
    jobs = [(i, view, str(tmp_path / f"{i}-{view}.mp4")) for i in range(5) for view in VIEWS]
    if as_path:
        segments = [_encode(job).path for job in jobs]
    else:
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            segments = list(pool.map(_encode, jobs))
    with writer(tmp_path / "joined") as out:
        for i, task in enumerate(TASKS):
            _, state, action = episode(i)
            out.add(None, state, action, task, videos=dict(zip(VIEWS, segments[2 * i : 2 * i + 2], strict=True)))
    assert files_of(tmp_path / "joined") == files_of(pristine)


def test_what_fresh_memory_holds_leaves_no_trace_in_a_video(tmp_path):
    """An encoder that reads memory before it writes there gives other bytes when that memory holds other values.

    With 0x55 and 0xFF the C library fills memory with the complement when it is handed out, and with the value when it is
    given back. With 0 it fills nothing, so the last round finds what the round before gave back.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        pytest.skip("only glibc fills memory on request")
    perturb = -6  # M_PERTURB of malloc.h
    for height, width in ((2, 2), (6, 10), (16, 16), (50, 70), (96, 96), (98, 130)):
        image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
        frames, found = [np.roll(image, i, axis=1) for i in range(8)], set()
        for value in (0, 0x55, 0xFF, 0):
            mallopt(perturb, value)
            try:
                encode_video(frames, tmp_path / "video.mp4", 10)
            finally:
                mallopt(perturb, 0)
            found.add((tmp_path / "video.mp4").read_bytes())
        assert len(found) == 1, f"{height}x{width}"


@pytest.mark.parametrize("fps", [10, 20, 80, 30000 / 1001])
def test_frame_times_are_exact(tmp_path, fps):
    """LeRobot turns seconds into frame numbers, so frame i of a joined file must be at i / fps, not nearly so."""
    spec = replace(SPEC, rate_hz=fps)
    with Writer(
        tmp_path / "set",
        fps=fps,
        action_spec=spec,
        state_names=("x", "y"),
        views={"corner": VIEWS["corner"]},
        robot_type="toy",
        provenance={},
    ) as out:
        for i in range(3):
            images, state, action = episode(i)
            out.add({"corner": images["corner"]}, state, action, "go")
    with av.open(str(next((tmp_path / "set").glob("videos/*/*/*.mp4")))) as container:
        times = [frame.pts * frame.time_base for frame in container.decode(video=0)]
    assert times == [Fraction(i) / exact_rate(fps) for i in range(sum(LENGTHS[:3]))]
    assert len(Dataset.open(tmp_path / "set").frames(2, "corner")) == LENGTHS[2]


def test_video_is_made_for_random_access(pristine):
    """h264, a key frame at least every second frame, presentation in decoding order (no B-frames)."""
    with av.open(str(next(pristine.glob("videos/*corner/*/*.mp4")))) as container:
        stream = container.streams.video[0]
        packets = [p for p in container.demux(stream) if p.pts is not None]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
    assert all(p.pts == p.dts for p in packets)
    keys = [i for i, p in enumerate(packets) if p.is_keyframe]
    assert max(np.diff(keys)) <= 2
    assert set(np.cumsum([0, *LENGTHS[:-1]])) <= set(keys)  # every episode begins with one


def test_files_roll_over_at_their_size(tmp_path):
    """With room for one episode per file and two files per chunk, five episodes fill three chunks."""
    root = write_v3(tmp_path / "small", chunks_size=2, data_mb=1e-6, video_mb=1e-6)
    names = ["chunk-000/file-000", "chunk-000/file-001", "chunk-001/file-000", "chunk-001/file-001", "chunk-002/file-000"]
    assert sorted(files_of(root / "data")) == [f"{name}.parquet" for name in names]
    assert sorted(files_of(root / "videos/observation.image")) == [f"{name}.mp4" for name in names]
    dataset = Dataset.open(root)
    for i in range(5):
        assert len(dataset.frames(i, "image")) == LENGTHS[i]
    assert np.array_equal(dataset.columns().action, np.concatenate([episode(i)[2] for i in range(5)]))


def test_data_parquet_has_one_row_group_per_episode(pristine):
    metadata = pq.ParquetFile(pristine / "data/chunk-000/file-000.parquet").metadata
    assert [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)] == list(LENGTHS)


def test_pandas_metadata_of_tasks_equals_lerobots_own(pristine):
    """Golden: LeRobot looks tasks up by the pandas index, which only this metadata names."""
    ours, theirs = (json.loads(pq.read_schema(root / "meta/tasks.parquet").metadata[b"pandas"]) for root in (pristine, TINY))
    for side in (ours, theirs):
        del side["creator"]["version"]
    assert ours == theirs
    assert pq.read_schema(pristine / "meta/tasks.parquet").names == ["task_index", "task"]


def test_meta_has_the_shape_of_lerobots_own(tmp_path):
    """Same columns and types in meta/episodes and in data, same keys in info.json and stats.json, for the same features."""
    tiny = json.loads((TINY / "meta/info.json").read_text())
    names = ("dx", "dy", "dz", "gripper")
    spec = replace(SPEC, dimensions=tuple(replace(SPEC.dimensions[0], name=name) for name in names))
    root = tmp_path / "like"
    options = {"state_names": ("x", "y", "z", "gripper"), "views": {"top": (64, 64)}, "robot_type": "metaworld_sawyer"}
    with Writer(root, fps=20, action_spec=spec, provenance={}, **options) as out:
        for i in range(2):
            images = np.full((4, 64, 64, 3), 50 * i, np.uint8)
            out.add({"top": images}, np.zeros((4, 4)), np.zeros((4, 4)), f"task number {i}")

    def types(folder, path):
        schema = pq.read_schema(folder / path)
        return {name: str(schema.field(name).type).replace("item:", "element:") for name in schema.names}

    for path in ("meta/episodes/chunk-000/file-000.parquet", "data/chunk-000/file-000.parquet"):
        assert types(root, path) == types(TINY, path)
    info = json.loads((root / "meta/info.json").read_text())
    assert set(info) == set(tiny) | {"x_vlaflow"}
    assert info["features"].keys() == tiny["features"].keys()
    for key, theirs in tiny["features"].items():
        ours = info["features"][key]
        assert (ours["dtype"], ours["shape"]) == (theirs["dtype"], theirs["shape"])
        assert (ours["names"] == theirs["names"]) or (ours["names"] == ["height", "width", "channel"])
    shapes = [
        {
            (key, name): np.shape(v)
            for key, stat in json.loads((f / "meta/stats.json").read_text()).items()
            for name, v in stat.items()
        }
        for f in (root, TINY)
    ]
    assert shapes[0] == shapes[1]


def test_image_statistics_are_those_of_the_decoded_pixels(pristine):
    """They are counted per value, so they are exact: compare with numpy over every pixel."""
    dataset = Dataset.open(pristine)
    pixels = np.concatenate([dataset.frames(i, "corner") for i in range(5)]).reshape(-1, 3) / 255
    stats = json.loads((pristine / "meta/stats.json").read_text())["observation.images.corner"]
    got = {name: np.array(values).reshape(-1) for name, values in stats.items()}
    assert got["count"].tolist() == [sum(LENGTHS)]
    for name, value in {"min": pixels.min(0), "max": pixels.max(0), "mean": pixels.mean(0), "std": pixels.std(0)}.items():
        assert np.allclose(got[name], value, atol=1e-9), name
    for name, q in {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}.items():
        assert np.allclose(got[name], np.quantile(pixels, q, axis=0, method="inverted_cdf"), atol=1e-9), name


def test_extra_columns_are_written(tmp_path):
    with writer(tmp_path / "set") as out:
        for i in range(2):
            images, state, action = episode(i)
            reward = np.arange(LENGTHS[i], dtype=np.float32)
            done = reward == reward[-1]
            out.add(images, state, action, "go", {"next.reward": reward, "next.done": done, "force": np.stack([reward] * 2, 1)})
    table = pq.read_table(tmp_path / "set/data/chunk-000/file-000.parquet")
    assert table["next.reward"].to_pylist() == [*range(LENGTHS[0]), *range(LENGTHS[1])]
    assert sum(table["next.done"].to_pylist()) == 2
    assert table["force"].to_pylist()[1] == [1.0, 1.0]
    features = json.loads((tmp_path / "set/meta/info.json").read_text())["features"]
    assert (features["next.done"]["dtype"], features["force"]["shape"]) == ("bool", [2])
    Dataset.open(tmp_path / "set").columns()


def test_state_of_one_number_is_read_back(tmp_path):
    """LeRobot stores vectors of length 1 as plain numbers."""
    with Writer(
        tmp_path / "set", fps=20, action_spec=SPEC, state_names=("x",), views={}, robot_type="toy", provenance={}
    ) as out:
        out.add(None, np.arange(4.0)[:, None], np.zeros((4, 3)), "go")
    assert Dataset.open(tmp_path / "set").columns().state.tolist() == [[0], [1], [2], [3]]


def test_provenance_and_spec_are_kept(pristine):
    dataset = Dataset.open(pristine)
    assert (dataset.provenance, dataset.action_spec) == ({"seed": 0}, SPEC)


def test_existing_folder_is_refused(pristine, tmp_path):
    before = files_of(pristine)
    with pytest.raises(DataError, match="exists already"):
        writer(pristine)
    assert files_of(pristine) == before
    (tmp_path / "empty").mkdir()
    write_v3(tmp_path / "empty")  # an empty folder is no loss


def test_interrupted_writing_leaves_nothing_that_looks_like_a_data_set(tmp_path):
    def record():
        with writer(tmp_path / "set") as out:
            out.add(*episode(0), "go")
            assert not (tmp_path / "set").exists()
            raise RuntimeError("cable pulled")

    with pytest.raises(RuntimeError, match="cable"):
        record()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing_and_is_told_as_it_was(tmp_path):
    """Closing the files writes again, and fails again."""

    def record():
        with writer(tmp_path / "set") as out:
            out.add(*episode(0), "go")
            with full_disk():
                try:
                    out.add(*episode(1), "go")
                except Exception as error:
                    first.append(error)
                    out.abort()
                    raise

    first = []
    with pytest.raises(Exception, match="too large") as caught:
        record()
    assert caught.value is first[0]
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_at_the_end_leaves_nothing(tmp_path):
    def record():
        with writer(tmp_path / "set") as out:
            out.add(*episode(0), "go")
            stack.enter_context(full_disk())

    with ExitStack() as stack, pytest.raises(Exception, match="too large"):
        record()
    assert list(tmp_path.iterdir()) == []


def test_a_finished_data_set_that_cannot_be_renamed_is_kept(tmp_path):
    def record():
        with writer(tmp_path / "set") as out:
            out.add(*episode(0), "go")
            (tmp_path / "set").mkdir()
            (tmp_path / "set/somebody").write_text("else's")

    with pytest.raises(DataError, match="Rename it by hand"):
        record()
    (kept,) = tmp_path.glob(".part-*-set")
    assert len(Dataset.open(kept)) == LENGTHS[0]


def test_no_episode_is_no_data_set(tmp_path):
    with pytest.raises(DataError, match="no episode"):
        writer(tmp_path / "set").finalize()
    assert list(tmp_path.iterdir()) == []


def test_an_extra_column_that_is_not_finite_is_refused_at_once(tmp_path):
    """Not after hours, when its statistics cannot be written."""
    images, state, action = episode(0)
    with writer(tmp_path / "set") as out:
        with pytest.raises(SpecError, match=r"Episode 0: the extra column 'next\.reward' is not finite at frame 7"):
            out.add(images, state, action, "go", {"next.reward": np.where(np.arange(12) == 7, np.inf, 0.0)})
        out.add(images, state, action, "go")
    assert len(Dataset.open(tmp_path / "set")) == 12


def bad_episode(what):
    images, state, action = episode(0)
    task = "go"
    if what == "nan":
        action[3, 1] = np.nan
    elif what == "width":
        state = state[:, :1]
    elif what == "length":
        state = state[:-1]
    elif what == "images":
        images["corner"] = images["corner"][:-1]
    elif what == "size":
        images["corner"] = images["corner"][:, :16]
    elif what == "missing view":
        del images["corner"]
    elif what == "unknown view":
        images["korner"] = images.pop("corner")
    elif what == "task":
        task = " "
    return images, state, action, task


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("nan", r"Episode 0: 'action' is not finite at frame 3, dimension 1 \('dy'\)"),
        ("width", r"Episode 0: 'observation.state' must have shape \(12, 2\), got \(12, 1\)"),
        ("length", r"Episode 0: 'observation.state' must have shape \(12, 2\), got \(11, 2\)"),
        ("images", r"Episode 0: view 'corner' must be uint8 \(12, 32, 48, 3\), got uint8 \(11, 32, 48, 3\)"),
        ("size", r"Episode 0: view 'corner' must be uint8 \(12, 32, 48, 3\), got uint8 \(12, 16, 48, 3\)"),
        ("missing view", r"Episode 0 must have the view 'corner' exactly once"),
        ("unknown view", r"'korner', which was not declared; did you mean 'corner'"),
        ("task", r"Episode 0 has no task"),
    ],
)
def test_unfit_episodes_are_refused(tmp_path, what, sentence):
    images, state, action, task = bad_episode(what)
    out = writer(tmp_path / "set")
    with pytest.raises(SpecError, match=sentence):
        out.add(images, state, action, task)
    images, state, action = episode(0)
    out.add(images, state, action, "go")  # the refused episode left no trace
    out.finalize()
    assert len(Dataset.open(tmp_path / "set")) == LENGTHS[0]


def test_segment_of_another_length_or_size_is_refused(tmp_path):
    images, state, action = episode(0)
    short = encode_video(images["corner"][:-1], tmp_path / "short.mp4", FPS)
    small = encode_video(images["corner"][:, :16], tmp_path / "small.mp4", FPS)
    with writer(tmp_path / "set") as out:
        for segment in (short, small):
            with pytest.raises(DataError, match="12 actions of view 'corner'"):
                out.add({"image": images["image"]}, state, action, "go", videos={"corner": segment})
        out.add(images, state, action, "go")


@pytest.mark.parametrize("provenance", [{"when": object()}, {"score": float("nan")}])
def test_provenance_that_is_no_json_is_refused_before_recording(tmp_path, provenance):
    with pytest.raises(SpecError, match="plain JSON"):
        Writer(tmp_path / "a", fps=20, action_spec=SPEC, state_names=(), views={}, robot_type="t", provenance=provenance)
    assert list(tmp_path.iterdir()) == []


def test_view_name_with_a_slash_is_refused(tmp_path):
    with pytest.raises(SpecError, match="'left/wrist' contains a '/'"):
        Writer(
            tmp_path / "a",
            fps=20,
            action_spec=SPEC,
            state_names=(),
            views={"left/wrist": (8, 8)},
            robot_type="t",
            provenance={},
        )


def test_odd_sizes_are_refused(tmp_path):
    with pytest.raises(SpecError, match="'corner' is 31x48; video needs an even"):
        Writer(
            tmp_path / "a", fps=20, action_spec=SPEC, state_names=(), views={"corner": (31, 48)}, robot_type="t", provenance={}
        )
