"""The codec of openpi's protocol: msgpack with markers for NumPy arrays and scalars, decoded strictly.

An array is a map {b"__ndarray__": True, b"data": bytes, b"dtype": text, b"shape": ints}; a NumPy scalar is a map
{b"__npgeneric__": True, b"data": number, b"dtype": text}. The msgpack-numpy package marks them differently (``ArrayEncoding``):
{b"nd": True, b"type": text, b"kind": b"", b"shape": ints, b"data": bytes}, and {b"nd": False, b"type": text, b"data": bytes}.
Both are read, and a server answers each client in the client's own. Only booleans, integers and floats of 1 to 8 bytes are
allowed: no objects, no records, no complex numbers, no extension types. Nothing is executed.

msgpack allocates a container before it has read its content, and an empty map of one byte takes 64 bytes in memory, so a small
message could allocate a lot of memory. Therefore the headers of a message are checked before it is decoded, and a message with
too many values, too deep nesting, too long a text or missing content is refused. Decoding the rest takes little more memory
than its size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import Enum
from typing import Any

import msgpack
import numpy as np

from vlaflow.errors import RequestError

DTYPES = frozenset(np.dtype(code).str for code in ("?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"))
MOST_BYTES = 64 * 2**20
MOST_DIMENSIONS = 8
MOST_VALUES = 10_000
MOST_DEPTH = 32
MOST_TEXT = 2**16
"""Largest size of a text or key in bytes."""


class ArrayEncoding(Enum):
    """How arrays and scalars are marked: as by openpi's client, or as by the msgpack-numpy package."""

    OPENPI = "openpi"
    MSGPACK_NUMPY = "msgpack-numpy"


def pack(message: Any, encoding: ArrayEncoding = ArrayEncoding.OPENPI) -> bytes:
    """Encode plain Python values and NumPy arrays.

    Raises:
        RequestError: for anything else.
    """
    try:
        return msgpack.packb(message, default=_encode if encoding is ArrayEncoding.OPENPI else _encode_msgpack_numpy)
    except (TypeError, ValueError, OverflowError) as error:
        raise RequestError(f"A message can contain texts, numbers, lists, maps and arrays of numbers: {error}.") from error


def unpack(data: bytes, most_bytes: int = MOST_BYTES, decode: Callable[[dict[Any, Any]], Any] | None = None) -> Any:
    """Decode one message; its arrays are read-only.

    Args:
        data: the message.
        most_bytes: largest size.
        decode: called with every map, and returns what it stands for; None for arrays and scalars in both encodings.

    Raises:
        RequestError: for a message that is too large, damaged, or contains types that the protocol does not have.
    """
    if len(data) > most_bytes:
        raise RequestError(f"The message has {len(data)} bytes, but at most {most_bytes} are accepted. Send smaller images.")
    _survey(data)
    try:
        return msgpack.unpackb(data, object_hook=decode or _decode, strict_map_key=True)
    except RequestError:
        raise
    except (ValueError, TypeError, msgpack.exceptions.UnpackException, RecursionError) as error:
        raise RequestError(f"The message is not valid msgpack ({type(error).__name__}).") from error


def unpack_as_sent(data: bytes, most_bytes: int = MOST_BYTES) -> tuple[Any, ArrayEncoding]:
    """Decode one message, and return the encoding of its arrays, which the reply should use too; raises as ``unpack`` does."""
    encoding = ArrayEncoding.OPENPI

    def decode(found: dict[Any, Any]) -> Any:
        nonlocal encoding
        if b"nd" in found:
            encoding = ArrayEncoding.MSGPACK_NUMPY
        return _decode(found)

    message = unpack(data, most_bytes, decode)
    return message, encoding


def _heads() -> tuple[tuple[int, int, int], ...]:
    """Headers by first byte: (bytes of the length field, values per unit of length, other bytes), from msgpack's format.

    A length in the first byte itself is given as minus the number of its bits; -1 values stand for text, 0 for bytes.
    """
    text, plain = -1, 0
    heads = [(0, 0, 0)] * 0x80 + [(-4, 2, 0)] * 16 + [(-4, 1, 0)] * 16 + [(-5, text, 0)] * 32
    heads += [(0, 0, 0)] * 4  # nil, never used, false, true
    heads += [(1, plain, 0), (2, plain, 0), (4, plain, 0)]  # bin
    heads += [(1, plain, 1), (2, plain, 1), (4, plain, 1)]  # ext
    heads += [(0, 0, n) for n in (4, 8, 1, 2, 4, 8, 1, 2, 4, 8)]  # float, uint, int
    heads += [(0, 0, 1 + n) for n in (1, 2, 4, 8, 16)]  # fixext
    heads += [(1, text, 0), (2, text, 0), (4, text, 0), (2, 1, 0), (4, 1, 0), (2, 2, 0), (4, 2, 0)]
    return (*heads, *[(0, 0, 0)] * 32)


_HEADS = _heads()
_EXTENSIONS = frozenset((*range(0xC7, 0xCA), *range(0xD4, 0xD9)))
"""First bytes of extension types. msgpack decodes one of them as a timestamp by default, so they are refused here."""


def _survey(data: bytes) -> None:
    """Check the headers of all values, and refuse messages that would take more memory than their size suggests."""
    size, at, announced = len(data), 0, 1
    open_ = [1]  # number of remaining values, by container
    while open_:
        if not open_[-1]:
            open_.pop()
            continue
        open_[-1] -= 1
        if at >= size:
            raise RequestError("The message is not valid msgpack (it ends too early).")
        first = data[at]
        if first in _EXTENSIONS:
            raise RequestError("The message contains an extension type, which this protocol does not have.")
        width, unit, length = _HEADS[first]
        at += 1
        if width < 0:
            count = first & (1 << -width) - 1
        else:
            count = int.from_bytes(data[at : at + width], "big")
            at += width
        if unit > 0:
            open_.append(count * unit)
            announced += count * unit
            if announced > MOST_VALUES:
                raise RequestError(f"The message contains more than {MOST_VALUES} values; send images and states as arrays.")
            if len(open_) > MOST_DEPTH:
                raise RequestError(f"The message is nested more than {MOST_DEPTH} deep.")
            continue
        if unit < 0 and count > MOST_TEXT:
            raise RequestError(f"A text of the message has {count} bytes, but at most {MOST_TEXT} are accepted.")
        at += length + count
    if at > size:
        raise RequestError("The message is not valid msgpack (it ends too early).")


def _encode(value: Any) -> Any:
    _require_numbers(value)
    if isinstance(value, np.ndarray):
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}


def _encode_msgpack_numpy(value: Any) -> Any:
    _require_numbers(value)
    if isinstance(value, np.ndarray):
        return {b"nd": True, b"type": value.dtype.str, b"kind": b"", b"shape": value.shape, b"data": value.tobytes()}
    return {b"nd": False, b"type": value.dtype.str, b"data": value.tobytes()}


def _require_numbers(value: Any) -> None:
    """Refuse anything but an array or a scalar of NumPy's numbers."""
    if not isinstance(value, np.ndarray | np.generic):
        raise TypeError(f"not a {type(value).__name__}")
    if value.dtype.str not in DTYPES:
        if isinstance(value, np.ndarray):
            raise RequestError(f"An array of {value.dtype} cannot be sent; booleans, integers and floats can.")
        raise RequestError(f"A number of type {value.dtype} cannot be sent.")


def _decode(found: dict[Any, Any]) -> Any:
    if b"__ndarray__" in found:
        return array(found.get(b"data"), found.get(b"shape"), found.get(b"dtype"))
    if b"__npgeneric__" in found:
        return _scalar(found.get(b"data"), _dtype(found.get(b"dtype")))
    if b"nd" in found:
        if found[b"nd"]:
            return array(found.get(b"data"), found.get(b"shape"), found.get(b"type"))
        return array(found.get(b"data"), [], found.get(b"type"))[()]
    return found


def _scalar(data: Any, dtype: np.dtype) -> Any:
    if not isinstance(data, bool | int | float):
        raise RequestError("A NumPy scalar of the message is not a number.")
    try:
        with np.errstate(over="raise"):
            return dtype.type(data)
    except (OverflowError, FloatingPointError, ValueError) as error:
        raise RequestError("A NumPy scalar of the message does not fit its type.") from error


def array(data: Any, shape: Any, dtype: Any) -> np.ndarray:
    """The array of these bytes, read-only.

    Raises:
        RequestError: the parts do not make an array of booleans, integers or floats.
    """
    kind = _dtype(dtype)
    if not isinstance(data, bytes) or not isinstance(shape, list) or len(shape) > MOST_DIMENSIONS:
        raise RequestError("An array of the message lacks its data or its shape.")
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in shape):
        raise RequestError("The shape of an array of the message must consist of integers ≥ 0.")
    if math.prod(shape) * kind.itemsize != len(data):
        raise RequestError(f"An array of the message has shape {shape} of {kind} but {len(data)} bytes, which does not match.")
    return np.frombuffer(data, kind).reshape(shape)


def _dtype(name: Any) -> np.dtype:
    if not isinstance(name, str) or name not in DTYPES:
        raise RequestError(f"An array of the message has type {name!r:.40}; only booleans, integers and floats are accepted.")
    return np.dtype(name)
