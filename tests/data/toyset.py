"""Small data sets for the tests of this folder, and ways to damage them."""

import json
import resource
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlaflow.data.video import encode_video
from vlaflow.data.writer import Writer
from vlaflow.spec import ActionSpec, Dimension

FPS = 20
VIEWS = {"image": (32, 32), "corner": (32, 48)}
LENGTHS = (12, 9, 15, 10, 8)
TASKS = ("push the puck", "open the drawer", "push the puck", "push the puck", "open the drawer")

SPEC = ActionSpec(
    robot="toy arm",
    dimensions=(
        Dimension("dx", "m", "base", -1.0, 1.0, "forward"),
        Dimension("dy", "m", "base", -1.0, 1.0, "left"),
        Dimension("gripper", "none", "gripper", -1.0, 1.0, "close", mode="absolute"),
    ),
    rotation="none",
    gripper="-1 open, +1 closed",
    rate_hz=FPS,
)


def episode(index, length=None):
    """Images that roll down by two rows per frame (two, because chroma is stored in pairs of rows), and numbers."""
    rng = np.random.default_rng(index)
    length = length or LENGTHS[index]
    images = {}
    for view, (height, width) in VIEWS.items():
        coarse = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        first = np.kron(coarse, np.ones((8, 8, 1), np.uint8))
        images[view] = np.stack([np.roll(first, 2 * i, axis=0) for i in range(length)])
    state = rng.normal(size=(length, 2)).astype(np.float32)
    action = rng.uniform(-1, 1, (length, 3)).astype(np.float32)
    return images, state, action


def writer(root, **options):
    return Writer(
        root,
        fps=FPS,
        action_spec=SPEC,
        state_names=("x", "y"),
        views=VIEWS,
        robot_type="toy",
        provenance={"seed": 0},
        **options,
    )


def write_v3(root, **options):
    with writer(root, **options) as out:
        for i, task in enumerate(TASKS):
            images, state, action = episode(i)
            out.add(images, state, action, task)
    return root


def write_v21(root):
    """The older layout, one parquet and one mp4 per episode, written from its description."""
    keys = {"image": "observation.image", "corner": "observation.images.corner"}
    keys = {view: key for view, key in keys.items() if view in VIEWS}
    words = list(dict.fromkeys(TASKS))
    for i, task in enumerate(TASKS):
        images, state, action = episode(i)
        frame = np.arange(LENGTHS[i])
        table = pa.table(
            {
                "observation.state": pa.array(state.tolist(), pa.list_(pa.float32())),
                "action": pa.array(action.tolist(), pa.list_(pa.float32())),
                "timestamp": pa.array((frame / FPS).astype(np.float32)),
                "frame_index": frame,
                "episode_index": np.full(LENGTHS[i], i),
                "index": sum(LENGTHS[:i]) + frame,
                "task_index": np.full(LENGTHS[i], words.index(task)),
            }
        )
        path = root / f"data/chunk-000/episode_{i:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path)
        for view, key in keys.items():
            video = root / f"videos/chunk-000/{key}/episode_{i:06d}.mp4"
            video.parent.mkdir(parents=True, exist_ok=True)
            encode_video(images[view], video, FPS)
    features = {
        key: {"dtype": "video", "shape": [*VIEWS[v], 3], "names": ["height", "width", "channel"]} for v, key in keys.items()
    }
    features |= {
        "observation.state": {"dtype": "float32", "shape": [2], "names": {"motors": ["x", "y"]}},
        "action": {"dtype": "float32", "shape": [3], "names": ["dx", "dy", "gripper"]},
    }
    info = {
        "codebase_version": "v2.1",
        "fps": FPS,
        "features": features,
        "total_episodes": len(TASKS),
        "chunks_size": 1000,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    }
    meta = root / "meta"
    meta.mkdir()
    (meta / "info.json").write_text(json.dumps(info))
    lines = [{"episode_index": i, "tasks": [task], "length": LENGTHS[i]} for i, task in enumerate(TASKS)]
    (meta / "episodes.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (meta / "tasks.jsonl").write_text("\n".join(json.dumps({"task_index": i, "task": t}) for i, t in enumerate(words)))
    return root


def cut_in_half(path: Path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


@contextmanager
def full_disk(room=1000):
    """No file may grow past so many bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def edit_info(root, **changes):
    path = root / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def without_actions(root):
    """Turn a data set into one of video alone."""
    path = root / "data/chunk-000/file-000.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["action", "observation.state"]), path)
    features = json.loads((root / "meta/info.json").read_text())["features"]
    kept = {key: feature for key, feature in features.items() if key not in ("action", "observation.state")}
    edit_info(root, features=kept, x_vlaflow={})


def edit_table(path, column, change):
    """Replace one column by ``change(list of values)``; metadata and row groups are lost, which readers must bear."""
    table = pq.read_table(path)
    place = table.schema.names.index(column)
    values = pa.array(change(table[column].to_pylist()), table.schema.field(column).type)
    pq.write_table(table.set_column(place, column, values), path)


def files_of(root):
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
