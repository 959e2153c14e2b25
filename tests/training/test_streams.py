"""Training from a stream is training from a cache that is read in the same order, to the bit."""

from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest

from tests.training.small import weights
from tests.training.test_mixture import mixed_config, trained, write_wide
from vlaflow.data import stream
from vlaflow.data.decoding import EpisodeFrames
from vlaflow.data.lerobot import Dataset
from vlaflow.data.mixture import Mixed
from vlaflow.data.nearby import Nearby
from vlaflow.data.windows import Windows
from vlaflow.training.metrics_log import read_log


class Here:
    """In place of the processes of a stream: decodes at once, in this one."""

    def __init__(self, workers, context, begin, arguments):
        (opening,) = arguments
        self.frames = EpisodeFrames(Dataset.open(opening.root, video=True, reading=opening.reading), opening)

    def submit(self, function, episode, wanted):
        future = Future()
        future.set_result(self.frames.decode(episode, wanted))
        return future


def by_episode(self):
    """The order of a stream whose runs are whole episodes, for windows on a cache."""
    bounds = np.flatnonzero(np.diff(self.dataset.columns().episode[self.rows], prepend=-1, append=-1))
    return Nearby(bounds, lambda _: None)


def test_cut_streams_end_with_the_bytes_of_caches_read_in_the_same_order(dataset, tmp_path, monkeypatch):
    """Two data sets, whose episodes are shorter than a run; held-out frames are decoded one by one."""
    datasets, batch, calls = [f"narrow={dataset}:0.7", f"{write_wide(tmp_path / 'wide')}:0.3"], Mixed.batch, []
    config = mixed_config(chunk_s=0.4, max_excluded=1.0)

    def cut(self, indices):
        calls.append(0)
        if len(calls) == 3:
            raise RuntimeError("cut")
        return batch(self, indices)

    monkeypatch.setattr(stream, "ProcessPoolExecutor", Here)
    streaming = replace(config, frames="stream", checkpoint_every=1)
    monkeypatch.setattr(Mixed, "batch", cut)
    with pytest.raises(RuntimeError, match="cut"):
        trained(streaming, datasets, tmp_path / "stream")
    monkeypatch.setattr(Mixed, "batch", batch)
    trained(streaming, datasets, tmp_path / "stream")
    monkeypatch.setattr(Windows, "nearby", by_episode)
    trained(config, datasets, tmp_path / "cache")
    assert weights(tmp_path / "stream") == weights(tmp_path / "cache")
    logs = [read_log(tmp_path / name) for name in ("stream", "cache")]
    losses = [[entry["validation"]["loss"] for entry in log if "validation" in entry] for log in logs]
    assert losses[0] == losses[1] != []
