"""Arrays of a request, in the forms that clients send; images are converted to what a policy sees: uint8 (H, W, 3), RGB.

Accepted as images are uint8 or other integers from 0 to 255, floats in [0, 1] (as LeRobot has them), channels last or first,
and nested lists. Anything else is refused with what was sent and how to convert it; nothing is guessed from the content, except
that an axis of length three is taken for the channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vlaflow.errors import RequestError
from vlaflow.serving.conversation import MOST_SIDE
from vlaflow.serving.limits import most_pixels


def array_of(value: Any) -> np.ndarray:
    """An array, or the array of nested lists; lists of unequal lengths give an empty one of objects."""
    try:
        return np.asarray(value)
    except ValueError:
        return np.empty(0, object)


def image_of(value: Any, key: str, channels_first: bool, side: int | None = None) -> np.ndarray:
    """One image of a request, uint8 (H, W, 3), contiguous.

    Args:
        value: what the request holds under ``key``.
        key: of the image, for errors.
        channels_first: where the channels are if both ends of the shape are 3.
        side: at which the policy reads it, in pixels; None for any.

    Raises:
        RequestError: it is not an image; the message says how to convert it.
    """
    if isinstance(value, list):
        value = _from_list(value, key)
    if not isinstance(value, np.ndarray):
        raise RequestError(f"'{key}' must be an image, an array of shape (height, width, 3), got {_kind(value)}.")
    if value.size == 0 or max(value.shape, default=0) > MOST_SIDE:
        raise RequestError(f"'{key}' must be an image of 1 to {MOST_SIDE} pixels per side, got shape {list(value.shape)}.")
    image = _channels_last(value, key, channels_first)
    height, width = image.shape[:2]
    if height * width > most_pixels(side):
        read = f"{side} × {side}" if side else "smaller images"
        raise RequestError(f"'{key}' has {width} × {height} pixels, but the policy reads {read}. Send at most 1920 × 1080.")
    return np.ascontiguousarray(_levels(image, key))


def _from_list(value: list[Any], key: str) -> np.ndarray:
    found = array_of(value)
    if found.dtype.kind not in "uif":
        raise RequestError(f"'{key}' must be an image, an array of shape (height, width, 3), got a list of something else.")
    return found


def _channels_last(image: np.ndarray, key: str, channels_first: bool) -> np.ndarray:
    shape, cure = image.shape, ""
    if image.ndim == 3:
        first, last = shape[0] == 3, shape[2] == 3
        if first and (channels_first or not last):
            return image.transpose(1, 2, 0)
        if last:
            return image
        cure = "Drop the fourth channel: image[..., :3]." if shape[2] == 4 else "Convert it to RGB."
    elif image.ndim == 4 and shape[0] == 1:
        cure = "Send one image without a batch axis: image[0]."
    elif image.ndim == 4:
        cure = "Send one image, of the current time step."
    elif image.ndim == 2:
        cure = "Repeat a grey image over three channels: np.repeat(image[..., None], 3, -1)."
    raise RequestError(
        f"'{key}' must be an RGB image of shape (height, width, 3) or (3, height, width), got {list(shape)}. {cure}".rstrip()
    )


def _levels(image: np.ndarray, key: str) -> np.ndarray:
    """The image as uint8."""
    if image.dtype == np.uint8:
        return image
    if image.dtype.kind not in "uif":
        raise RequestError(f"'{key}' must be an image of uint8 in 0..255 or floats in [0, 1], got {image.dtype}.")
    if wrong := image.size - np.count_nonzero(np.isfinite(image)):
        raise RequestError(f"'{key}' has {wrong} values that are not finite. Send the last good image of the camera.")
    low, high = float(image.min()), float(image.max())
    most = 1 if image.dtype.kind == "f" else 255
    if low >= 0 and high <= most:
        return image.astype(np.uint8) if most == 255 else np.round(255 * image.astype(np.float32)).astype(np.uint8)
    if most == 255:
        raise RequestError(f"'{key}' has integers from {low:g} to {high:g}; an image needs 0 to 255. Scale it to uint8.")
    cure = "Send it as uint8."
    if low >= 0:
        cure = "Send it as uint8: image.astype(np.uint8)."
    elif low >= -1 and high <= 1:
        cure = "Undo the normalisation: (image + 1) / 2."
    raise RequestError(f"'{key}' is {image.dtype} from {low:g} to {high:g}; floats must lie in [0, 1]. {cure}")


def _kind(value: Any) -> str:
    if value is None:
        return "nothing (None). Send the last image of a camera that dropped a frame"
    if isinstance(value, bytes):
        return f"{len(value)} bytes. Decode a compressed image before sending it"
    return f"a {type(value).__name__}"
