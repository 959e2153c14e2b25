"""Data sets as people have them: each made from a good one by the change that makes it special, named after what it is.

Public reports were the model; nothing is fetched. ``old`` and ``new`` in the tests are good data sets of format v2.1 and v3.0,
with five episodes (``toyset.LENGTHS``) and two cameras.
"""

import io
import json
import struct
import zlib

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.data.toyset import FPS, LENGTHS, VIEWS, edit_info, edit_table, episode

DATA = "data/chunk-000/file-000.parquet"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"
TOP = "observation.images.corner"
ROWS = sum(LENGTHS)


def features(root):
    return json.loads((root / "meta/info.json").read_text())["features"]


def feature(root, key, **changes):
    """Change what is declared of a column; None takes an entry away."""
    found = features(root)
    found[key] = {name: value for name, value in (found.get(key, {}) | changes).items() if value is not None}
    edit_info(root, features=found)


def no_spec(root):
    """What everyone but vlaflow writes."""
    edit_info(root, x_vlaflow={})


def renamed(root, **names):
    """Other names of columns; dots are written as two underscores."""
    names = {old.replace("__", "."): new for old, new in names.items()}
    found = features(root)
    edit_info(root, features={names.get(key, key): value for key, value in found.items()}, x_vlaflow={})
    for path in (root / "data").rglob("*.parquet"):
        table = pq.read_table(path)
        pq.write_table(table.rename_columns([names.get(name, name) for name in table.column_names]), path)


def column(root, key, values, kind, **declared):
    """Add or replace a column of the one data file of format v3.0, and its feature."""
    table = pq.read_table(root / DATA)
    if key in table.column_names:
        table = table.drop_columns([key])
    pq.write_table(table.append_column(key, pa.array(values, kind)), root / DATA)
    feature(root, key, **declared)


def png(image):
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "png")
    return {"bytes": stream.getvalue(), "path": None}


def pictures(view="corner"):
    """The exact pictures of all rows."""
    return [image for i in range(len(LENGTHS)) for image in episode(i)[0][view]]


def stored_images(root):
    """One camera's pictures as PNG in the table."""
    cells = [png(image) for image in pictures()]
    column(root, TOP, cells, pa.struct({"bytes": pa.binary(), "path": pa.string()}), dtype="image")


def depth_png16(root):
    """Depth in millimetres as 16-bit PNG in a column that nothing marks as depth."""
    cells = [png(np.full((32, 48), 800 + i, np.uint16)) for i in range(ROWS)]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    column(root, "observation.images.range", cells, kind, dtype="image", shape=[32, 48, 3], names=None)


def depth_png16_with_transparency(root):
    """Pillow opens such a file as eight bits of grey."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = zlib.compress(b"".join(b"\0" + np.full((48, 2), 800, ">u2").tobytes() for _ in range(32)))
    header = struct.pack(">IIBBBBB", 48, 32, 16, 4, 0, 0, 0)
    file = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    cells = [{"bytes": file, "path": None}] * ROWS
    column(root, "observation.images.range", cells, kind, dtype="image", shape=[32, 48, 3], names=None)


def column_dropped(root, key):
    """Every data set has it, and meta declares it."""
    pq.write_table(pq.read_table(root / DATA).drop_columns([key]), root / DATA)


def no_videos(root):
    """One camera, whose pictures are in the table."""
    stored_images(root)
    edit_info(root, features={key: one for key, one in features(root).items() if one["dtype"] != "video"})


def task_numbers_with_gaps(root):
    """As after deleting tasks: the two that are left are 1 and 4, in any order of the table."""
    tasks = pq.read_table(root / "meta/tasks.parquet").to_pydict()
    numbers = [3 * n + 1 for n in tasks["task_index"]]
    pq.write_table(pa.table({"task_index": numbers[::-1], "task": tasks["task"][::-1]}), root / "meta/tasks.parquet")
    edit_table(root / DATA, "task_index", lambda rows: [3 * n + 1 for n in rows])


def task_number_of_two(root):
    tasks = pq.read_table(root / "meta/tasks.parquet").to_pydict()
    tasks = {"task_index": [*tasks["task_index"], 0], "task": [*tasks["task"], "juggle"]}
    pq.write_table(pa.table(tasks), root / "meta/tasks.parquet")


def depth_video(root):
    """Depth in a video of 16-bit grey; the muxer of MP4 takes no such codec before PyAV 16."""
    path = root / "videos/observation.images.corner/chunk-000/file-000.mp4"
    with av.open(str(path), "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=FPS)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "gray16le"
        for i in range(ROWS):
            frame = av.VideoFrame.from_ndarray(np.full((32, 48), 800 + i, np.uint16), format="gray16le")
            frame.pts = i
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def image_raw_uint8(root):
    """Pictures as nested lists of bytes."""
    column(root, TOP, [image.tolist() for image in pictures()], pa.list_(pa.list_(pa.list_(pa.uint8()))), dtype="uint8")


def image_raw_channel_first(root):
    cells = [image.transpose(2, 0, 1).tolist() for image in pictures()]
    kind = pa.list_(pa.list_(pa.list_(pa.uint8())))
    column(root, TOP, cells, kind, dtype="uint8", shape=[3, 32, 48], names=["c", "h", "w"])


def action_2d(root):
    """Two arms: a matrix of two rows per frame, whose axes have names."""
    values = [np.arange(14.0).reshape(2, 7) / 10 + i for i in range(ROWS)]
    kind = pa.list_(pa.list_(pa.float32()))
    column(root, "action", [v.tolist() for v in values], kind, shape=[2, 7], names=["arm", "joint"])
    no_spec(root)
    return np.stack([v.flatten() for v in values]).astype(np.float32)


def split_columns(root):
    """Joints and effectors in columns of their own, the latter as truth values."""
    joints = [[i / 10, i / 5] for i in range(ROWS)]
    closed = [[i % 2 == 0] for i in range(ROWS)]
    renamed(root, action="was", observation__state="observation.states.joint.position")
    column(root, "actions.joint.position", joints, pa.list_(pa.float64()), dtype="float64", shape=[2])
    column(root, "actions.effector", closed, pa.list_(pa.bool_()), dtype="bool", shape=[1])
    found = {key: value for key, value in features(root).items() if key != "was"}
    edit_info(root, features=found)
    return np.array([[*j, *c] for j, c in zip(joints, closed, strict=True)], np.float32)


def clock(root, off_s):
    """Wall-clock timestamps: up to ``off_s`` seconds away from i / fps, either way; the first of an episode is exact."""
    stray = np.random.default_rng(0).uniform(-off_s, off_s, ROWS)
    frames = np.concatenate([np.arange(n) for n in LENGTHS])
    stray[frames == 0], stray[5] = 0, off_s
    edit_table(root / DATA, "timestamp", lambda _: (frames / FPS + stray).astype(np.float32).tolist())


def empty_episode(root, number):
    """An episode of length 0 between the others; its rows are gone, its frames remain in the video."""
    edit_table(root / EPISODES, "length", lambda lengths: [0 if i == number else n for i, n in enumerate(lengths)])
    table = pq.read_table(root / DATA)
    table = table.filter(pa.array(np.asarray(table["episode_index"]) != number))
    pq.write_table(table, root / DATA)
    edit_info(root, total_frames=len(table))


def length_stated(root, number, length):
    """Of an episode, another one than it has rows."""
    edit_table(root / EPISODES, "length", lambda lengths: [length if i == number else n for i, n in enumerate(lengths)])
    edit_info(root, total_frames=ROWS + length - LENGTHS[number])


def remove_episode_v21(root, number):
    """As people delete an episode: its files and its line, and the count."""
    lines = (root / "meta/episodes.jsonl").read_text().splitlines()
    (root / "meta/episodes.jsonl").write_text("\n".join(line for i, line in enumerate(lines) if i != number))
    for path in (*root.rglob(f"episode_{number:06d}.*"),):
        path.unlink()
    edit_info(root, total_episodes=len(lines) - 1)


def no_listed_tasks_v21(root):
    """As GR00T's: the instruction is in the rows alone."""
    lines = map(json.loads, (root / "meta/episodes.jsonl").read_text().splitlines())
    kept = [{key: value for key, value in line.items() if key != "tasks"} for line in lines]
    (root / "meta/episodes.jsonl").write_text("\n".join(map(json.dumps, kept)))


def late_video_v21(root, number, frames):
    """A video whose first frame is shown later than at 0 s."""
    path = root / f"videos/chunk-000/{TOP}/episode_{number:06d}.mp4"
    content = path.read_bytes()
    with av.open(io.BytesIO(content)) as source, av.open(str(path), "w") as late:
        own = source.streams.video[0]
        stream = late.add_stream_from_template(own)
        shift = int(frames / FPS / own.time_base)
        for packet in source.demux(own):
            if packet.pts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, stream
                late.mux(packet)
    return path


def colliding_views(root):
    """'observation.images.image' next to 'observation.image', with other pictures."""
    found, name = features(root), "observation.images.image"
    found[name] = found.pop(TOP)
    (root / f"videos/{TOP}").rename(root / f"videos/{name}")
    edit_info(root, features=found)
    table = pq.read_table(root / EPISODES)
    names = [each.replace(TOP, name) for each in table.column_names]
    pq.write_table(table.rename_columns(names), root / EPISODES)


assert set(VIEWS) == {"image", "corner"}
