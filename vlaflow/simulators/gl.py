"""Off-screen OpenGL for MuJoCo: environment variables, and the off-screen cameras of a model.

MuJoCo chooses its OpenGL library when it is first imported, so `prepare` must run before that; every simulator of this
package calls it. The user's own settings always take precedence.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

import numpy as np

from vlaflow.errors import CapabilityError
from vlaflow.simulators.display import in_view, simplified

Quality = Literal["fast", "exact"]
_HIDDEN_GROUP = 5
"""A group of geoms that MuJoCo does not show by default."""
_PLACES = ("xpos", "xquat", "xmat", "xipos", "ximat", "geom_xpos", "geom_xmat", "site_xpos", "site_xmat")
_IN_DATA = (*_PLACES, "cam_xpos", "cam_xmat", "light_xpos", "light_xdir")
"""Arrays of MuJoCo's data that a picture shows."""
_IN_MODEL = ("site_rgba", "geom_rgba")
"""Arrays of MuJoCo's model that a picture shows and tasks change while an episode runs."""

NO_OPENGL = (
    "MuJoCo found no OpenGL to render off screen ({why}). On Debian or Ubuntu: apt-get install libegl1 libgl1 libopengl0 "
    "libegl-mesa0 libgl1-mesa-dri (software rendering, no display needed), or libosmesa6 and MUJOCO_GL=osmesa."
)


def prepare() -> str:
    """Set MUJOCO_GL and the thread count of Mesa's software renderer, unless the user did, before mujoco is imported.

    On Linux EGL is preferred, OSMesa is the fallback, and "disable" is set if neither is installed, so that physics
    without images still works. On other systems MuJoCo chooses. LP_NUM_THREADS is 1 because a second llvmpipe thread costs
    15 % more processor time and saves no wall time when every core already has a worker.

    Returns:
        the selected backend, e.g. "egl".
    """
    os.environ.setdefault("LP_NUM_THREADS", "1")
    if sys.platform == "linux" and "MUJOCO_GL" not in os.environ:
        if _loads("libEGL.so.1") and (_loads("libOpenGL.so.0") or _loads("libGL.so.1")):
            os.environ["MUJOCO_GL"] = "egl"
        elif _loads("libOSMesa.so.8") or _loads("libOSMesa.so.6"):
            os.environ["MUJOCO_GL"] = "osmesa"
        else:
            os.environ["MUJOCO_GL"] = "disable"
    return os.environ.get("MUJOCO_GL", "default")


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


_contexts = threading.local()


def _context() -> Any:
    """The OpenGL context of this thread, created on first use and made current.

    All models of a thread share one context: a context per environment costs memory and, with EGL, is not released properly
    when Python exits.

    Raises:
        CapabilityError: when OpenGL does not work here, naming the packages to install.
    """
    context = getattr(_contexts, "context", None)
    if context is None or _contexts.process != os.getpid():  # a context does not survive a fork
        try:
            context = _backend()(64, 64)
            context.make_current()
        except CapabilityError:
            raise
        except Exception as problem:
            raise CapabilityError(NO_OPENGL.format(why=f"{type(problem).__name__}: {problem}")) from problem
        _contexts.context, _contexts.process = context, os.getpid()
        atexit.register(context.free)
        return context
    context.make_current()
    return context


def _backend() -> Any:
    """The class of OpenGL contexts, by name: mujoco.GLContext is GLFW's if mujoco was imported before ``prepare``."""
    name = prepare()
    if sys.platform == "linux" and name in ("egl", "osmesa"):
        return import_module(f"mujoco.{name}").GLContext
    maker = getattr(import_module("mujoco"), "GLContext", None)
    if maker is None:
        raise CapabilityError(NO_OPENGL.format(why=f"MUJOCO_GL={name}"))
    return maker


@dataclass(frozen=True)
class Moment:
    """What pictures depend on: copies of arrays of MuJoCo's data and model, by name. See `OffscreenCameras.keep`."""

    data: Mapping[str, np.ndarray]
    model: Mapping[str, np.ndarray]


@contextmanager
def _set(arrays: Any, values: Mapping[str, np.ndarray]) -> Iterator[None]:
    """Set arrays of a model or data, inside the context only."""
    before = {name: getattr(arrays, name).copy() for name in values}
    try:
        for name, value in values.items():
            getattr(arrays, name)[:] = value
        yield
    finally:
        for name, value in before.items():
            getattr(arrays, name)[:] = value


class OffscreenCameras:
    """Renders images of one MuJoCo model with some of its cameras.

    A picture is taken in two steps, so that it can show a moment that is over when it is asked for: ``keep`` copies what a
    picture depends on (microseconds), ``take`` renders it (milliseconds).

    Args:
        model: the mujoco.MjModel. With quality "fast" its off-screen buffer is set to the size of the image
            without multisampling, which affects images only.
        cameras: names of cameras of the model.
        size: side of the square images in pixels.
        quality: "exact" keeps every default of the model (4 samples per pixel, shadows, reflections), with which
            published numbers were measured; "fast" disables all three, leaves out what lies outside the picture, and is
            several times cheaper.
        hidden: groups of geoms that are not shown, in addition to MuJoCo's default.
        simplify: with "fast", also simplify display meshes; see ``display``.
        solid: with ``simplify``, also those that take part in collisions, where these are shown.
    """

    def __init__(
        self,
        model: Any,
        cameras: Sequence[str],
        size: int,
        quality: Quality,
        hidden: Sequence[int] = (),
        *,
        simplify: bool = False,
        solid: bool = False,
    ) -> None:
        import mujoco

        self._mujoco = mujoco
        self._model = model
        self._simplify, self._solid = simplify, solid
        self.size = size
        self.quality = quality
        self.taken = 0
        self._gpu: Any = None
        self._options, self._perturbation = mujoco.MjvOption(), mujoco.MjvPerturb()
        for group in hidden:
            self._options.geomgroup[group] = 0
        self._cameras = {}
        for name in cameras:
            self._cameras[name] = camera = mujoco.MjvCamera()
            camera.type, camera.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, model.camera(name).id
        self._scene = mujoco.MjvScene(model, 1000)
        if quality == "fast":
            self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
            self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        self._shown: Any = None

    def keep(self, data: Any) -> Moment:
        """What pictures of ``data`` (mujoco.MjData, only read) depend on; needs no OpenGL."""
        return Moment(
            {name: getattr(data, name).copy() for name in _IN_DATA},
            {name: getattr(self._model, name).copy() for name in _IN_MODEL},
        )

    def take(self, camera: str, moment: Moment) -> np.ndarray:
        """Render what a camera saw at a moment: (size, size, 3) uint8, row 0 at the bottom."""
        mujoco = self._mujoco
        if self._gpu is None:
            self._open()
        else:
            _context()
        self._compose(self._cameras[camera], moment)
        view = mujoco.MjrRect(0, 0, self.size, self.size)
        # Before every image: models share one OpenGL context, and without this the first image after another model's
        # is rendered into that model's buffer, while the pixels read back are this model's previous image.
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._gpu)
        mujoco.mjr_render(view, self._scene, self._gpu)
        pixels = np.empty((self.size, self.size, 3), np.uint8)
        mujoco.mjr_readPixels(pixels, None, view, self._gpu)
        self.taken += 1
        return pixels

    def close(self) -> None:
        """Release the uploaded model; a later image uploads it again."""
        if self._gpu is not None:
            _context()
            self._gpu.free()
            self._gpu = None

    def _compose(self, camera: Any, moment: Moment) -> None:
        """Fill the scene with what a camera saw; with "fast", without geoms outside the picture."""
        mujoco = self._mujoco
        if self._shown is None:
            self._shown = mujoco.MjData(self._model)
        for name, value in moment.data.items():
            getattr(self._shown, name)[:] = value
        changed = dict(moment.model)
        if self.quality == "fast":
            visible = in_view(self._model, self._shown, camera.fixedcamid)
            changed["geom_group"] = np.where(visible, self._model.geom_group, _HIDDEN_GROUP)
        with _set(self._model, changed):
            mujoco.mjv_updateScene(
                self._model, self._shown, self._options, self._perturbation, camera, mujoco.mjtCatBit.mjCAT_ALL, self._scene
            )

    def _open(self) -> None:
        """Upload the model to OpenGL (on the first image, so that an environment that is never rendered needs no OpenGL)."""
        mujoco = self._mujoco
        _context()
        screen = self._model.vis.global_
        if self.quality == "fast":
            screen.offwidth = screen.offheight = self.size
            self._model.vis.quality.offsamples = 0
            self._model.vis.quality.shadowsize = 0  # no shadow map is used, so its 64 MB need not be allocated
        else:
            screen.offwidth, screen.offheight = max(screen.offwidth, self.size), max(screen.offheight, self.size)
        simplify = self._simplify and self.quality == "fast"
        try:
            with simplified(self._model, self.size, solid=self._solid) if simplify else nullcontext():
                self._gpu = mujoco.MjrContext(self._model, mujoco.mjtFontScale.mjFONTSCALE_150)
        except mujoco.FatalError as problem:
            raise CapabilityError(NO_OPENGL.format(why=str(problem))) from problem
