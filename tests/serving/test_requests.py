"""Requests as users send them: accepted and converted, or refused with the cause and the cure."""

import io
from dataclasses import replace

import msgpack
import numpy as np
import pytest
import torch
from PIL import Image
from websockets.sync.client import connect

from tests import helpers
from tests.serving.live import PLACE, POLICY, request, serving
from vlaflow.compute.dense import Dense
from vlaflow.errors import ConfigError, RequestError
from vlaflow.robot import wire
from vlaflow.robot.client import Client
from vlaflow.robot.wire import ArrayEncoding
from vlaflow.serving.engine import EngineConfig
from vlaflow.serving.observation_keys import choose, read
from vlaflow.serving.openpi import committed

IMAGE = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)


def seen(value, channels_first=False):
    """The image that a policy sees when a client sends ``value``."""
    name = "aloha" if channels_first else "metaworld"
    place = choose(name, ("v",), images=("camera",), state=("state",))
    return read({"camera": value, "state": [0.0], "prompt": "x"}, **place).images["v"]


@pytest.mark.parametrize(
    "sent",
    [
        IMAGE,
        IMAGE.transpose(2, 0, 1),
        IMAGE / 255,
        (IMAGE / 255).astype(np.float32),
        (IMAGE / 255).astype(np.float32).transpose(2, 0, 1),
        IMAGE.astype(np.int64),
        IMAGE.tolist(),
        (IMAGE / 255).tolist(),
        IMAGE[::-1][::-1],
    ],
    ids=["uint8", "chw", "float64", "float32", "float32 chw", "int64", "list", "list of floats", "strided"],
)
@pytest.mark.parametrize("channels_first", [False, True])
def test_an_image_is_the_same_however_it_is_sent(sent, channels_first):
    """Layouts differ only where the shape leaves open which axis holds the channels."""
    found = seen(sent, channels_first)
    assert found.dtype == np.uint8
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, IMAGE)


def test_half_precision_is_off_by_less_than_one_level_after_rounding():
    """float16 has 11 bits: at most 1 / 4096 away from a value below 1, so an eighth of a level of 255."""
    np.testing.assert_array_equal(seen((IMAGE / 255).astype(np.float16)), IMAGE)


def test_the_layout_decides_where_the_shape_does_not():
    square = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    np.testing.assert_array_equal(seen(square), square)
    np.testing.assert_array_equal(seen(square, channels_first=True), square.transpose(1, 2, 0))


def jpeg():
    file = io.BytesIO()
    Image.fromarray(IMAGE).save(file, "JPEG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("sent", "sentence"),
    [
        (IMAGE[None], r"got \[1, 8, 12, 3\]\. Send one image without a batch axis: image\[0\]"),
        (np.stack([IMAGE, IMAGE]), "one image, of the current time step"),
        (np.concatenate([IMAGE, IMAGE[..., :1]], 2), r"image\[\.\.\., :3\]"),
        (IMAGE[..., 0], r"np\.repeat\(image\[\.\.\., None\], 3, -1\)"),
        (IMAGE[..., :2], "Convert it to RGB"),
        (
            IMAGE.astype(np.float32),
            r"from 0 to 255; floats must lie in \[0, 1\]\. Send it as uint8: image\.astype\(np\.uint8\)",
        ),
        (IMAGE / 127.5 - 1, r"from -1 to 1; .* Undo the normalisation: \(image \+ 1\) / 2"),
        (np.full((8, 8, 3), np.nan), r"has 192 values that are not finite\. Send the last good image of the camera"),
        (np.where(IMAGE > 250, np.inf, 0.5), r"values that are not finite"),
        (IMAGE.astype(np.int64) * 257, r"integers from 0 to 65535; an image needs 0 to 255"),
        (IMAGE > 100, "got bool"),
        (None, r"nothing \(None\)"),
        (jpeg(), "bytes. Decode a compressed image before sending it"),
        ("image", "got a str"),
        ([[1, 2], [3]], "a list of something else"),
        ([["a"]], "a list of something else"),
        (np.zeros((0, 4, 3), np.uint8), "1 to 4096 pixels"),
    ],
)
def test_another_image_is_refused_with_cause_and_cure(sent, sentence):
    with pytest.raises(RequestError, match=sentence) as error:
        seen(sent)
    assert "'camera'" in str(error.value)


@pytest.mark.parametrize("sent", [[1, 2.5], np.array([1, 2.5]), np.array([1, 2.5], np.float32)])
def test_a_state_may_be_a_list_or_any_array_of_numbers(sent):
    place = choose("metaworld", ("v",), images=("camera",), state=("state",))
    assert read({"camera": IMAGE, "state": sent, "prompt": "x"}, **place).state.tolist() == [1, 2.5]
    with pytest.raises(RequestError, match=r"got shape \[1, 2\]\. Send one state without a batch axis: state\[0\]"):
        read({"camera": IMAGE, "state": [list(sent)], "prompt": "x"}, **place)


def test_an_action_prefix_may_be_a_list():
    prefix = committed({"action_prefix": [[1, 2], [3, 4]], "inference_delay": 1}, 4)
    assert prefix is not None
    assert prefix.actions.tolist() == [[1, 2], [3, 4]]
    with pytest.raises(RequestError, match="must be an array of actions"):
        committed({"action_prefix": [[1, 2], [3]]}, 4)


def test_the_keys_of_openpis_own_data_sets_are_named_with_options():
    """LIBERO in openpi's conversion: image, wrist_image, state."""
    place = choose("libero", ("a", "b"), images=("image", "wrist_image"), state=("state",))
    sent = {"image": IMAGE, "wrist_image": IMAGE[::-1], "state": np.arange(3.0), "prompt": "x"}
    found = read(sent, **place)
    np.testing.assert_array_equal(found.images["b"], IMAGE[::-1])
    assert found.state.tolist() == [0, 1, 2]
    with pytest.raises(RequestError, match="lacks 'observation/wrist_image'; did you mean 'wrist_image'"):
        read({"observation/image": IMAGE, **sent}, **choose("libero", ("a", "b")))


def test_a_missing_key_is_never_taken_for_one_that_has_its_own_meaning():
    """The image is not misspelt where the state is named as it should be; it was not sent."""
    sent = {"observation/state": [0.0], "prompt": "x"}
    with pytest.raises(RequestError, match=r"lacks 'observation/image'; it has 'observation/state' and 'prompt'\."):
        read(sent, **PLACE)
    with pytest.raises(RequestError, match=r"lacks 'observation/image'; did you mean 'observation/images'"):
        read({"observation/images": IMAGE, **sent}, **PLACE)
    with pytest.raises(RequestError, match=r"lacks 'observation/image'\.$"):
        read({}, **PLACE)


def test_a_request_without_a_prompt_gets_the_default_or_a_cure():
    sent = {"observation/image": IMAGE, "observation/state": [0.0]}
    with pytest.raises(RequestError, match=r"lacks 'prompt'.*Send the instruction, or serve with --default-prompt"):
        read(sent, **PLACE)
    with_default = choose("metaworld", ("image",), default_prompt="push the puck")
    assert read(sent, **with_default).instruction == "push the puck"
    assert read({**sent, "prompt": "stop"}, **with_default).instruction == "stop"
    with pytest.raises(RequestError, match=r"in words\. Send one text, not a list"):
        read({**sent, "prompt": ["push"]}, **with_default)
    with pytest.raises(ConfigError, match="default prompt is empty"):
        choose("metaworld", ("image",), default_prompt=" ")


def msgpack_numpy(message):
    """As the msgpack-numpy package packs it."""

    def encode(value):
        if isinstance(value, np.ndarray):
            shape = value.shape
            return {b"nd": True, b"type": value.dtype.str, b"kind": b"", b"shape": shape, b"data": value.tobytes()}
        return {b"nd": False, b"type": value.dtype.str, b"data": value.tobytes()}

    return msgpack.packb(message, default=encode)


def test_a_client_is_answered_in_its_own_encoding():
    with serving() as (_, address), Client(address) as client:
        expected = client.infer(request(1, seed=7))["actions"]
        with connect(address, proxy=None) as raw:
            raw.recv()
            for encoding, packed in ((ArrayEncoding.MSGPACK_NUMPY, msgpack_numpy), (ArrayEncoding.OPENPI, wire.pack)):
                raw.send(packed(request(1, seed=np.int64(7))))
                reply, found = wire.unpack_as_sent(raw.recv(10))
                assert found is encoding
                np.testing.assert_array_equal(reply["actions"], expected)


def test_an_image_of_another_size_is_resized_as_in_training():
    """Before inference, in the thread that decodes."""
    sizes, seen = [], helpers.observation(1, size=40)
    larger = replace(seen, images={"image": seen.images["image"][:28]})
    generator = torch.Generator().manual_seed(7)
    known = POLICY.act(larger, Dense(3), generator=generator).actions
    with serving(engine=EngineConfig(batch=1)) as (server, address), Client(address) as client:
        act = server.engine.policy.act
        server.engine._act = lambda asked: (
            sizes.append(asked[0].observation.images["image"].shape)
            or act([a.observation for a in asked], asked[0].compute, generator=[a.generator for a in asked])
        )
        found = client.infer(
            {
                "observation/image": larger.images["image"],
                "observation/state": seen.state,
                "prompt": seen.instruction,
                "seed": 7,
            }
        )
    assert sizes == [(16, 16, 3)]
    np.testing.assert_array_equal(found["actions"], known)


def test_float_channel_first_and_listed_requests_get_the_answer_of_the_plain_one():
    plain = request(1, seed=7)
    image, state = plain["observation/image"], plain["observation/state"]
    with (
        serving(place=choose("metaworld", ("image",), default_prompt=plain["prompt"])) as (_, address),
        Client(address) as client,
    ):
        expected = client.infer(plain)["actions"]
        for changed in (
            {"observation/image": (image / 255).astype(np.float32).transpose(2, 0, 1)},
            {"observation/image": image.tolist()},
            {"observation/state": state.tolist()},
            {"observation/state": state.astype(np.float64)},
        ):
            np.testing.assert_array_equal(client.infer({**plain, **changed})["actions"], expected)
        unprompted = {key: value for key, value in plain.items() if key != "prompt"}
        np.testing.assert_array_equal(client.infer(unprompted)["actions"], expected)
