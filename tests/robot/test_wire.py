"""The codec: what is sent comes back, and nothing hostile does more than be refused."""

from contextlib import suppress

import msgpack
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vlaflow.errors import RequestError
from vlaflow.robot import wire
from vlaflow.robot.wire import ArrayEncoding

DTYPES = st.sampled_from(sorted(wire.DTYPES))
arrays = hnp.arrays(DTYPES, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(array=arrays)
def test_arrays_come_back_with_their_type_shape_and_bytes(array):
    back = wire.unpack(wire.pack({"x": array}))["x"]
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert back.tobytes() == array.tobytes()
    assert not back.flags.writeable


@given(message=plain)
def test_plain_values_come_back(message):
    assert wire.unpack(wire.pack(message)) == message


@given(number=st.sampled_from([np.float32(1.5), np.int8(-3), np.uint64(2**63), np.bool_(True), np.float16(0.25)]))
def test_numpy_scalars_come_back(number):
    back = wire.unpack(wire.pack(number))
    assert back == number
    assert back.dtype == number.dtype


@given(array=arrays)
def test_msgpack_numpys_arrays_and_scalars_come_back(array):
    message = {"x": array, "y": np.float32(1.5), "z": "text"}
    back, encoding = wire.unpack_as_sent(wire.pack(message, ArrayEncoding.MSGPACK_NUMPY))
    assert encoding is ArrayEncoding.MSGPACK_NUMPY
    assert (back["x"].dtype, back["x"].shape, back["x"].tobytes()) == (array.dtype, array.shape, array.tobytes())
    assert not back["x"].flags.writeable
    assert back["y"] == np.float32(1.5)
    assert back["y"].dtype == np.float32
    assert back["z"] == "text"
    assert wire.unpack_as_sent(wire.pack(message))[1] is ArrayEncoding.OPENPI


def test_the_bytes_are_those_of_msgpack_numpy():
    """The markers as msgpack-numpy 0.4.8 writes them; it reads its own keys only."""
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    raw = msgpack.unpackb(wire.pack([array, np.int16(-2)], ArrayEncoding.MSGPACK_NUMPY), strict_map_key=False)
    assert raw == [
        {b"nd": True, b"type": "<f4", b"kind": b"", b"shape": [2, 3], b"data": array.tobytes()},
        {b"nd": False, b"type": "<i2", b"data": np.int16(-2).tobytes()},
    ]


def test_the_bytes_are_those_of_openpis_client():
    """The markers as openpi-client 0.1.2 writes them: byte keys, C order, the type as NumPy's short text."""
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    raw = msgpack.unpackb(wire.pack(array), strict_map_key=False)
    assert raw == {b"__ndarray__": True, b"data": array.tobytes(), b"dtype": "<f4", b"shape": [2, 3]}
    assert np.array_equal(wire.unpack(wire.pack(np.asfortranarray(array))), array)


@settings(max_examples=500)
@given(data=st.binary(max_size=200))
def test_random_bytes_are_refused_or_plain(data):
    with suppress(RequestError):
        wire.unpack(data)


@settings(max_examples=300)
@given(array=arrays, cut=st.integers(0, 200), flip=st.integers(0, 10_000))
def test_damaged_messages_are_refused_or_decode_to_sound_arrays(array, cut, flip):
    data = bytearray(wire.pack({"image": array, "prompt": "x"}))
    data[flip % len(data)] ^= 1 + flip % 255
    data = data[: len(data) - cut % len(data)]
    try:
        found = wire.unpack(bytes(data))
    except RequestError:
        return
    for value in found.values() if isinstance(found, dict) else ():
        if isinstance(value, np.ndarray):
            assert value.nbytes <= len(data)


def marker(**changes):
    fields = {b"__ndarray__": True, b"data": b"\0" * 8, b"dtype": "<f4", b"shape": [2]}
    return msgpack.packb({"x": fields | {k.encode(): v for k, v in changes.items()}})


@pytest.mark.parametrize(
    "message",
    [
        marker(dtype="|O"),
        marker(dtype="<c8"),
        marker(dtype="|V4"),
        marker(dtype="<U2"),
        marker(dtype=">f4x"),
        marker(dtype=5),
        marker(shape=[2**40, 2**40]),
        marker(shape=[-1, -2]),
        marker(shape=[1] * 9),
        marker(shape="2"),
        marker(shape=[True, 2]),
        marker(data="text"),
        msgpack.packb({b"__npgeneric__": True, b"data": [1], b"dtype": "<f4"}),
        msgpack.packb({b"nd": True, b"type": "|O", b"kind": b"O", b"shape": [1], b"data": b"x"}),
        msgpack.packb({b"nd": True, b"type": [["a", "<f4"]], b"kind": b"V", b"shape": [1], b"data": b"0000"}),
        msgpack.packb({b"nd": True, b"type": "<f4", b"shape": [2], b"data": b"0000"}),
        msgpack.packb({b"nd": True}),
        msgpack.packb({b"nd": False, b"type": "<f4", b"data": b"00"}),
        msgpack.packb({b"nd": False, b"type": "<f4", b"data": 1.0}),
        msgpack.packb({b"nd": [], b"type": "<c8", b"data": b"00000000"}),
        msgpack.packb({b"__npgeneric__": True, b"data": 2**40, b"dtype": "|i1"}),
        msgpack.packb(msgpack.ExtType(5, b"x")),
        msgpack.packb({"prompt": msgpack.Timestamp(5)}),
        msgpack.packb([msgpack.Timestamp(2**40, 5)]),
        b"\x81" * 5000,
        b"\x91" * 100_000,
        b"\x91" * wire.MOST_DEPTH + b"\xc0",
        msgpack.packb([None] * wire.MOST_VALUES),
        msgpack.packb("x" * (wire.MOST_TEXT + 1)),
        msgpack.packb({1: 2}),
        b"\xc1",
        b"\xdd\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"",
        msgpack.packb(1) + b"more",
    ],
)
def test_hostile_messages_are_one_sentence(message):
    with pytest.raises(RequestError) as caught:
        wire.unpack(message)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


packed = plain.map(msgpack.packb) | plain.map(lambda found: msgpack.packb(found, use_bin_type=False)) | st.binary(max_size=40)


@given(data=packed, cut=st.integers(1, 100))
def test_the_survey_refuses_no_message_that_msgpack_can_read_and_passes_none_that_ends_too_early(data, cut):
    """It walks over heads by a table of its own; one wrong entry, and one of the two would be false. Extensions aside."""

    def none(code, found):
        raise ValueError

    with suppress(ValueError, TypeError, msgpack.exceptions.UnpackException):
        found = msgpack.unpackb(data, strict_map_key=False, raw=True, ext_hook=none)
        assume("Timestamp(" not in repr(found))
        wire._survey(data)
        with pytest.raises(RequestError, match="ends too early"):
            wire._survey(data[: len(data) - 1 - cut % len(data)])


def test_what_the_limits_allow_is_decoded():
    assert wire.unpack(msgpack.packb([None] * (wire.MOST_VALUES - 1))) == [None] * (wire.MOST_VALUES - 1)
    assert wire.unpack(b"\x91" * (wire.MOST_DEPTH - 1) + b"\xc0")
    assert wire.unpack(msgpack.packb("x" * wire.MOST_TEXT)) == "x" * wire.MOST_TEXT


def test_what_the_protocol_does_not_have_is_not_sent():
    for value in (object(), np.array([object()]), np.array(["a"]), np.complex64(1), {1, 2}):
        with pytest.raises(RequestError):
            wire.pack({"x": value})
    with pytest.raises(RequestError, match="at most 10"):
        wire.unpack(b"\0" * 11, 10)
