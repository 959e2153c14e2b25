"""Blocks of a frame cache: whole or absent, the same from all writers, and never silently damaged."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from tests.data.toyset import LENGTHS, VIEWS, files_of
from vlaflow.cli.data import main
from vlaflow.data import blocks
from vlaflow.data.blocks import BlockStore, cut
from vlaflow.data.codecs import Jpeg, Raw
from vlaflow.data.frames import CacheBuilder, FrameCache, damaged_blocks
from vlaflow.data.lerobot import Dataset
from vlaflow.errors import ConfigError, DataError

ROWS = sum(LENGTHS)
ALL = np.arange(ROWS)
CODECS = [Raw(), Jpeg()]


@pytest.fixture(autouse=True)
def a_block_per_episode(monkeypatch):
    monkeypatch.setattr(blocks, "SMALLEST", 1)
    monkeypatch.setattr(blocks, "MANY", 10**9)


@pytest.fixture(scope="module")
def good(pristine):
    return Dataset.open(pristine)


def opened(dataset, **options):
    return FrameCache.open(dataset, 16, **options)


def images(cache):
    return {view: image.numpy() for view, image in cache.gather(ALL).items()}


def block_files(cache):
    return sorted(cache.folder.glob("*.safetensors"))


@given(sizes=st.lists(st.integers(0, 400), max_size=40), smallest=st.integers(1, 300))
def test_blocks_are_whole_episodes_in_order_and_none_is_larger_than_its_limit_or_one_episode(sizes, smallest):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "SMALLEST", smallest)
        found = cut(sizes)
    assert [i for part in found for i in range(part.start, part.stop)] == list(range(len(sizes)))
    assert all(len(sizes[part]) == 1 or sum(sizes[part]) <= max(smallest, sum(sizes)) for part in found)
    joined = [sum(sizes[a.start : b.start + 1]) for a, b in pairwise(found)]
    assert all(size > smallest for size in joined)  # the next episode would not have fitted


@pytest.mark.parametrize("codec", CODECS, ids=["raw", "jpeg"])
def test_shares_built_in_any_order_are_the_files_of_one_builder(dataset, good, codec, tmp_path, monkeypatch):
    """Each share writes only its own blocks; the last one completes the cache, and opening decodes nothing more."""
    calls = []
    for number in (2, 0, 1):
        builder = CacheBuilder(dataset, 16, codec=codec)
        before = set(builder.store.missing())
        builder.build(share=(number, 3))
        assert before - set(builder.store.missing()) == set(range(number, 5, 3))
    shared = opened(dataset, codec=codec, progress=lambda *counts: calls.append(counts))
    assert not calls
    monkeypatch.setenv("VLAFLOW_CACHE", str(tmp_path / "alone"))
    assert files_of(shared.folder) == files_of(opened(good, codec=codec).folder)


def test_an_interrupted_build_keeps_its_blocks(dataset):
    """Ctrl-C at the end of the third episode, before its block has its name: only what is missing then is decoded again."""
    calls = []

    def stop(done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        opened(dataset, workers=1, progress=stop)
    missing = CacheBuilder(dataset, 16).store.missing()
    assert 2 in missing
    assert not {0, 1} & set(missing)
    opened(dataset, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(done, 5) for done in range(6 - len(missing), 6)]


def test_a_block_is_a_safetensors_file(dataset):
    cache = opened(dataset)
    found = load_file(block_files(cache)[1])
    start, end = found["place"][1, 2]  # views are sorted by name
    assert found["place"].shape == (len(VIEWS), LENGTHS[1], 2)
    assert np.array_equal(found["data"][start:end].reshape(16, 16, 3), images(cache)["image"][LENGTHS[0] + 2])


@pytest.mark.parametrize("codec", CODECS, ids=["raw", "jpeg"])
@pytest.mark.parametrize("damage", ["zeroed", "emptied", "cut", "gone", "frame", "index"])
def test_a_damaged_block_is_an_error_whose_cure_works(dataset, codec, damage):
    whole = images(opened(dataset, codec=codec))
    file = block_files(opened(dataset, codec=codec))[2]
    content = bytearray(file.read_bytes())
    if damage == "zeroed":
        content[:] = bytes(len(content))
    elif damage in ("emptied", "cut"):
        del content[len(content) // 2 if damage == "cut" else 0 :]
    elif damage == "frame":
        content[1100:1200] = bytes(100)
    elif damage == "index":
        content[-1000:] = bytes(1000)
    cache = opened(dataset, codec=codec)
    file.unlink() if damage == "gone" else file.write_bytes(content)
    with pytest.raises(DataError, match=rf"{file.name} .* damaged .*Delete it, and it is built again: rm {file}"):
        cache.gather(ALL)
    if damage != "gone":
        (sentence,) = damaged_blocks(dataset)
        assert sentence.endswith(f"rm {file}")
        file.unlink()
    again = images(opened(dataset, codec=codec))
    assert all(np.array_equal(again[view], whole[view]) for view in VIEWS)
    assert not list(damaged_blocks(dataset))


@settings(max_examples=40)
@given(place=st.integers(0), bit=st.integers(0, 7))
def test_no_flipped_bit_gives_other_images(tmp_path_factory, place, bit):
    """CRC-32 finds every single flipped bit of a frame; of the index, what it leads to; of the header, what it states."""
    folder, rng = tmp_path_factory.getbasetemp() / "flipped", np.random.default_rng(0)
    frames = [(view, row, rng.integers(0, 256, 12, dtype=np.uint8).data) for row in range(4) for view in range(2)]
    BlockStore(folder, [0, 4], "ab", {"data": "x"}).write(0, frames)
    file = folder / "000000.safetensors"
    content = bytearray(file.read_bytes())
    content[place % len(content)] ^= 1 << bit
    file.write_bytes(content)
    store = BlockStore(folder, [0, 4], "ab", {"data": "x"})
    try:
        found = {view: store.read(view, np.arange(4)) for view in "ab"}
    except DataError:
        return
    assert all(np.array_equal(found["ab"[view]][row], frame) for view, row, frame in frames)


def test_jpegs_are_close_to_the_frames_and_take_a_fraction_of_the_bytes():
    """At quality 95 the error of a soft picture is one level on average: rounding, and the rounding of chroma."""
    ramp = np.linspace(0, 255, 128)
    image = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], 128), -1).astype(np.uint8)
    content = Jpeg().encode(image)
    back = np.empty((1, *image.shape), np.uint8)
    Jpeg().decode([np.frombuffer(content, np.uint8)], back)
    assert np.abs(back[0].astype(int) - image).mean() < 1
    assert len(content) < image.nbytes / 10
    assert len(Jpeg(50).encode(image)) < len(content)


def test_codecs_have_caches_of_their_own(dataset):
    assert opened(dataset, codec=Jpeg()).folder != opened(dataset).folder != opened(dataset, codec=Jpeg(80)).folder


def test_the_command_builds_shares_until_the_cache_is_complete(dataset, capsys):
    for share, words in (("2/2", "2 of 5 blocks are in"), ("1/2", "The cache is complete")):
        assert main(["cache", str(dataset.root), "--size", "16", "--shard", share]) == 0
        assert words in capsys.readouterr().out
    assert not CacheBuilder(dataset, 16).store.missing()
    for wrong in ("0/2", "3/2", "1", "a/b"):
        with pytest.raises(ConfigError, match=r"I in 1\.\.N"):
            main(["cache", str(dataset.root), "--shard", wrong])
