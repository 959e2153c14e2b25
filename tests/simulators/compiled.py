"""Environments of one scene share MuJoCo's compiled model: compiling one of LIBERO's takes seconds, copying it 0.1 s."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from functools import lru_cache
from typing import Any


@contextmanager
def scenes_compiled_once() -> Iterator[None]:
    """Compile no scene again that is described by the same bytes as the one before; every environment has its own copy."""
    import mujoco

    kind: Any = mujoco.MjModel
    plain = kind.from_xml_string
    compiled = lru_cache(maxsize=1)(plain)  # a model of LIBERO takes 150 MB
    kind.from_xml_string = lambda description: copy(compiled(description))
    try:
        yield
    finally:
        kind.from_xml_string = plain
