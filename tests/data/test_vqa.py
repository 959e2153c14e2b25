"""Question sets: what is read and how, what is refused and why, the held-out part, batches."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vlaflow.data.image_cache import ImageCache, VqaSource, decode
from vlaflow.data.mixture import Order
from vlaflow.data.vqa import Question, VqaDataset
from vlaflow.errors import ConfigError, DataError, SpecError


def record(number=0, image="0.png", turns=(("<image>\nOpen or closed?", "closed"),), **more):
    said = [{"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)]
    return {"id": f"q{number}", "image": image, "conversations": said, **more}


def write(folder, records, name="questions.jsonl", pictures=3):
    for i in range(pictures):
        Image.fromarray(np.full((20, 20, 3), 40 * i, np.uint8)).save(folder / f"{i}.png")
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in records]
    text = "\n".join(lines) + "\n" if name.endswith("l") else f"[{', '.join(lines)}]"
    (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_lines_and_a_list_read_the_same(tmp_path):
    records = [record(0), record(1, "1.png", kind="open", group="a"), record(2, None, (("How many?", "two"),))]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    lines, listed = write(tmp_path / "a", records), write(tmp_path / "b", records, "questions.json")
    opened = VqaDataset.open(lines)
    assert opened.questions == VqaDataset.open(listed).questions
    assert opened.questions == VqaDataset.open(lines / "questions.jsonl").questions
    assert opened.questions[1] == Question("q1", ("1.png",), "Open or closed?", "closed", "open", "a")
    assert opened.questions[2].images == ()
    assert opened.images == ("0.png", "1.png")
    assert opened.fingerprint == VqaDataset.open(listed).fingerprint


def test_each_turn_is_a_question_with_the_earlier_turns_in_front(tmp_path):
    turns = (("<image>\nWhat is it?", "A drawer"), ("Now <image> this?", "A window"), ("Which is open?", "the first"))
    folder = write(tmp_path, [record(7, ["0.png", "1.png"], turns)])
    first, second, third = VqaDataset.open(folder).questions
    assert (first.name, first.images, first.question, first.answer) == ("q7/1", ("0.png",), "What is it?", "A drawer")
    assert second.question == "What is it?\nA drawer\nNow this?"
    assert second.images == ("0.png", "1.png")
    assert third.question == "What is it?\nA drawer\nNow this?\nA window\nWhich is open?"
    assert third.answer == "the first"
    assert VqaDataset.open(folder, turns="first").questions == (first,)


def test_a_line_separator_inside_a_text_is_no_new_line(tmp_path):
    text = json.dumps(record(0, turns=(("<image>Open\u2028or closed?", "closed"),)), ensure_ascii=False)
    assert VqaDataset.open(write(tmp_path, [text])).questions[0].question == "Open or closed?"


HUMAN, GPT = {"from": "human", "value": "<image> Open?"}, {"from": "gpt", "value": "yes"}
FAULTS = {
    "is not valid JSON": '{"id": 1, ',
    "a record is an object": [1],
    "'id' must be a string or a number, got None": {"image": "0.png", "conversations": [HUMAN, GPT]},
    "'image' must be a path or a list": record(image=5),
    "lies outside the folder of the data set": record(image="../0.png"),
    "names the image .gone.png., which .* lacks": record(image="gone.png"),
    r"1 image\(s\) and 0 <image>": record(turns=(("Open?", "yes"),)),
    r"2 image\(s\) and 1 <image>": record(image=["0.png", "1.png"]),
    r"0 image\(s\) and 1 <image>": record(image=None),
    "contains images but no question": record(turns=(("<image>\n", "yes"),)),
    "'conversations' must be a list": {"id": "1", "image": "0.png"},
    "turn 1 is an answer before its question": {"id": "1", "image": "0.png", "conversations": [GPT, HUMAN]},
    "turn 2 is from 'human'": {"id": "1", "image": "0.png", "conversations": [HUMAN, HUMAN]},
    "turn 1 is from 'system'": {"id": "1", "conversations": [{"from": "system", "value": "Be brief."}]},
    "turn 1 must be an object": {"id": "1", "image": "0.png", "conversations": ["Open?"]},
    "turn 2, of gpt, is empty": record(turns=(("<image> Open?", " \n"),)),
    "the answer in turn 2 contains <image>": record(turns=(("Open?", "see <image>"),)),
    "the last question has no answer": {"id": "1", "image": "0.png", "conversations": [HUMAN, GPT, HUMAN]},
    "turn 2 must be a string": record(turns=(("<image> Open?", 1),)),
    "kind must be a string": record(kind=3),
}


@pytest.mark.parametrize("message", FAULTS)
def test_a_fault_is_named_with_its_line(tmp_path, message):
    """The good record before it does not help: nothing is skipped."""
    fault = FAULTS[message]
    with pytest.raises(DataError, match=rf"questions\.jsonl, line 2.*{message}"):
        VqaDataset.open(write(tmp_path, [record(0), fault]))


def test_files_that_cannot_be_a_set_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"There is no .*vlaflow record-vqa"):
        VqaDataset.open(tmp_path)
    write(tmp_path, [record()], "questions.json")
    (tmp_path / "questions.json").write_text('{"id": 1}')
    with pytest.raises(DataError, match="must be a list of records"):
        VqaDataset.open(tmp_path)
    (tmp_path / "questions.json").write_text("[\n1,\n]")
    with pytest.raises(DataError, match=r"is not valid JSON .*line 3"):
        VqaDataset.open(tmp_path)
    (tmp_path / "questions.json").write_text("[]")
    with pytest.raises(DataError, match="holds no questions"):
        VqaDataset.open(tmp_path)
    write(tmp_path, [record()])
    with pytest.raises(DataError, match="name the one to read"):
        VqaDataset.open(tmp_path)
    (tmp_path / "latin.jsonl").write_bytes(b'{"id": "\xe9"}')
    with pytest.raises(DataError, match="line 1 is not UTF-8"):
        VqaDataset.open(tmp_path / "latin.jsonl")


# -- the held-out part ---------------------------------------------------------------------------------------------------------

LABELS = st.lists(
    st.tuples(st.lists(st.sampled_from("abcdef"), max_size=2, unique=True), st.sampled_from(["", "", "", "x", "y"])),
    min_size=1,
    max_size=25,
)


def made(labels):
    questions = (Question(f"n{i}", tuple(images), "?", "!", group=group) for i, (images, group) in enumerate(labels))
    return VqaDataset(None, tuple(questions))


@given(LABELS, st.floats(0, 0.99), st.integers(0, 5))
def test_no_image_and_no_group_is_on_both_sides(labels, share, seed):
    opened = made(labels)
    train, held = opened.split(share, seed)
    assert sorted((*train, *held)) == list(range(len(opened)))
    sides = [{image for i in side for image in opened.questions[i].images} for side in (train, held)]
    assert not sides[0] & sides[1]
    groups = [{g for i in side if (g := opened.questions[i].group)} for side in (train, held)]
    assert not groups[0] & groups[1]
    assert train  # never everything
    if share == 0:
        assert not held


@given(LABELS, st.floats(0, 0.99), st.randoms(use_true_random=False))
def test_the_division_depends_neither_on_order_nor_on_the_share_asked_first(labels, share, random):
    opened = made(labels)
    shuffled = list(opened.questions)
    random.shuffle(shuffled)
    again = replace(opened, questions=tuple(shuffled))

    def names(questions, part):
        return {questions.questions[i].name for i in part}

    held = names(opened, opened.split(share)[1])
    assert held == names(again, again.split(share)[1])
    if share < 0.5:
        assert held <= names(opened, opened.split(2 * share)[1])


def test_many_images_are_divided_as_asked_and_differently_by_another_seed():
    opened = made([([f"{i // 3}"], "") for i in range(300)])
    _, held = opened.split(0.2)
    assert len(held) == 60  # 20 of 100 images, with three questions each
    assert set(held) != set(opened.split(0.2, seed=1)[1])
    with pytest.raises(ConfigError, match=r"lie in \[0, 1\)"):
        opened.split(1.0)


# -- images and batches ------------------------------------------------------------------------------------------------------


def test_a_batch_shows_each_question_its_images_and_no_state(tmp_path):
    records = [record(0, "1.png"), record(1, ["2.png", "1.png"], (("<image><image> Same?", "no"),)), record(2, "2.png")]
    opened = VqaDataset.open(write(tmp_path, records))
    source = VqaSource(opened, ImageCache.open(opened, 10), ("image", "wrist"), state_dim=4, indices=(1, 2))
    batch = source.batch(np.array([1, 0]))
    assert len(source) == 2
    assert batch.observation.images["image"].shape == (2, 10, 10, 3)
    assert [int(image[5, 5, 0]) for image in batch.observation.images["image"]] == [80, 80]
    assert [int(image[5, 5, 0]) for image in batch.observation.images["wrist"]] == [0, 40]  # nothing left to show is black
    assert list(batch.observation.instructions) == ["Open or closed?", "Same?"]
    assert (batch.answers, batch.names, batch.targets) == (["closed", "no"], ["q2", "q1"], 2)
    assert not batch.observation.known_BS.any()
    with pytest.raises(SpecError, match=r"'q1'.*has 2 images, but the policy has 1"):
        VqaSource(opened, source.image_cache, ("image",), 4)
    with pytest.raises(ConfigError, match="No question"):
        VqaSource(opened, source.image_cache, ("image",), 4, indices=())


def test_an_order_continues_where_it_stopped(tmp_path):
    """Step n is a function of n: a run that begins there sees what an uninterrupted one sees."""
    records = [record(i, f"{i % 3}.png") for i in range(7)]
    opened = VqaDataset.open(write(tmp_path, records))
    source = VqaSource(opened, ImageCache.open(opened, 20), ("image",), 2)
    order = Order(len(source), 3, seed=5)
    whole = [source.batch(order.indices(step)).names for step in range(7)]
    assert [source.batch(Order(7, 3, 5).indices(step)).names for step in range(4, 7)] == whole[4:]
    assert sorted(name for names in whole for name in names) == sorted(3 * [f"q{i}" for i in range(7)])


def test_the_cache_is_the_image_and_is_built_once(tmp_path, monkeypatch):
    import vlaflow.data.image_cache as module

    opened = VqaDataset.open(write(tmp_path, [record(i, f"{i}.png") for i in range(3)]))
    seen = []
    cache = ImageCache.open(opened, 20, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert all(np.array_equal(cache.read(f"{i}.png"), decode(tmp_path / f"{i}.png")) for i in range(3))
    monkeypatch.setattr(module, "decode", None)  # would fail if it were built again
    assert np.array_equal(ImageCache.open(opened, 20).read("2.png"), cache.read("2.png"))
    without = VqaDataset.open(write(tmp_path, [record(0, None, (("Two and two?", "four"),))]))
    assert (
        VqaSource(without, ImageCache.open(without, 8), ("image",), 2).batch(np.array([0])).observation.images["image"].sum()
        == 0
    )


def test_a_damaged_image_is_named_and_leaves_no_cache(tmp_path):
    opened = VqaDataset.open(write(tmp_path, [record(0, "0.png"), record(1, "1.png")]))
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:60])
    with pytest.raises(DataError, match=r"1\.png cannot be decoded"):
        ImageCache.open(opened, 20)
    assert not [p for p in (tmp_path / ".cache").iterdir() if p.is_dir()]


def test_transparency_and_palettes_become_plain_colours(tmp_path):
    Image.fromarray(np.array([[[255, 0, 0, 255], [255, 0, 0, 0]]], np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(np.array([[[255, 0, 0], [0, 0, 255]]], np.uint8)).quantize(4).save(tmp_path / "p.png")
    assert decode(tmp_path / "a.png").tolist() == [[[255, 0, 0], [0, 0, 0]]]
    assert decode(tmp_path / "p.png").tolist() == [[[255, 0, 0], [0, 0, 255]]]
