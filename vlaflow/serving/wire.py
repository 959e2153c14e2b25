"""The codec of openpi's protocol: msgpack with markers for NumPy arrays and scalars, decoded strictly.

An array is a map {b"__ndarray__": True, b"data": bytes, b"dtype": text, b"shape": ints}; a NumPy scalar is a map
{b"__npgeneric__": True, b"data": number, b"dtype": text}. Booleans, integers and floats of 1 to 8 bytes pass, nothing else: no
objects, no records, no complex numbers, no extension types. Nothing is executed, and no allocation is larger than the message.
"""

from __future__ import annotations

import math
from typing import Any

import msgpack
import numpy as np

from vlaflow.errors import RequestError

DTYPES = frozenset(np.dtype(code).str for code in ("?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"))
MOST_BYTES = 64 * 2**20
MOST_DIMENSIONS = 8


def pack(message: Any) -> bytes:
    """Encode plain Python values and NumPy arrays.

    Raises:
        RequestError: for anything else.
    """
    try:
        return msgpack.packb(message, default=_encode)
    except (TypeError, ValueError, OverflowError) as error:
        raise RequestError(f"A message can hold texts, numbers, lists, maps and arrays of numbers: {error}.") from error


def unpack(data: bytes, most_bytes: int = MOST_BYTES) -> Any:
    """Decode one message; arrays are read-only views of ``data``.

    Raises:
        RequestError: for a message that is too large, damaged, or holds what the protocol does not have.
    """
    if len(data) > most_bytes:
        raise RequestError(f"The message has {len(data)} bytes, at most {most_bytes} are taken. Send smaller images.")
    try:
        return msgpack.unpackb(data, object_hook=_decode, ext_hook=_refuse, strict_map_key=False)
    except RequestError:
        raise
    except (ValueError, TypeError, msgpack.exceptions.UnpackException, RecursionError) as error:
        raise RequestError(f"The message is not valid msgpack ({type(error).__name__}).") from error


def _encode(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        if value.dtype.str not in DTYPES:
            raise RequestError(f"An array of {value.dtype} cannot be sent; booleans, integers and floats can.")
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    if isinstance(value, np.generic):
        if value.dtype.str not in DTYPES:
            raise RequestError(f"A number of type {value.dtype} cannot be sent.")
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(f"not a {type(value).__name__}")


def _decode(found: dict[Any, Any]) -> Any:
    if b"__ndarray__" in found:
        return _array(found)
    if b"__npgeneric__" in found:
        data = found.get(b"data")
        if not isinstance(data, bool | int | float):
            raise RequestError("A NumPy scalar of a message holds no number.")
        try:
            return _dtype(found).type(data)
        except OverflowError as error:
            raise RequestError("A NumPy scalar of a message does not fit its own type.") from error
    return found


def _array(found: dict[Any, Any]) -> np.ndarray:
    data, shape, dtype = found.get(b"data"), found.get(b"shape"), _dtype(found)
    if not isinstance(data, bytes) or not isinstance(shape, list) or len(shape) > MOST_DIMENSIONS:
        raise RequestError("An array of a message lacks its data or its shape.")
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in shape):
        raise RequestError("The shape of an array of a message must be whole numbers from 0 on.")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise RequestError(f"An array of a message has shape {shape} of {dtype} and {len(data)} bytes, which do not fit.")
    return np.frombuffer(data, dtype).reshape(shape)


def _dtype(found: dict[Any, Any]) -> np.dtype:
    name = found.get(b"dtype")
    if not isinstance(name, str) or name not in DTYPES:
        raise RequestError(f"An array of a message has the type {name!r:.40}; booleans, integers and floats are taken.")
    return np.dtype(name)


def _refuse(code: int, data: bytes) -> Any:
    raise RequestError(f"The message holds an extension type ({code}), which this protocol does not have.")
