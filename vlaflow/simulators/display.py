"""What a software renderer can leave out of a MuJoCo scene: detail finer than a pixel, and geoms outside the picture.

Without a GPU, rendering costs about as much as the scene has vertices. Only what is uploaded to OpenGL changes here; the
model's own arrays, and with them the physics, stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

FINEST = 0.32
"""Side in metres, times that of the image in pixels, of the cells whose vertices are merged: 2.5 mm at 128 pixels."""
COARSEST = 2.56
"""The same as a share of the mesh's longest side, if that is more: 2 % at 128 pixels."""
FEW = 1000
"""Number of faces up to which a mesh is left alone."""
TEXELS = 4
"""Largest side of a texture, in sides of the image."""

_CHANGED = ("mesh_vert", "mesh_face", "mesh_facenormal", "mesh_facetexcoord", "mesh_facenum", "tex_width", "tex_height")


@contextmanager
def simplified(model: Any, size: int, *, solid: bool = False) -> Iterator[None]:
    """Simplify display meshes and shrink textures of ``model``, inside the context only.

    Vertices in one cell of a grid become one, at their mean; faces that lose their area, and repeated ones, vanish. Normals and
    texture coordinates of the remaining corners are kept.

    Args:
        model: the mujoco.MjModel.
        size: side of the images in pixels.
        solid: also meshes that take part in collisions; what collides is the model's own mesh, outside the context.
    """
    kept = {name: getattr(model, name).copy() for name in _CHANGED}
    texels: dict[int, np.ndarray] = {}
    try:
        left_alone = np.empty(0, np.int64) if solid else _collision_meshes(model)
        for number in np.setdiff1d(np.flatnonzero(model.mesh_facenum > FEW), left_alone):
            _simplify_mesh(model, number, size)
        for number in np.flatnonzero(np.minimum(model.tex_width, model.tex_height) > TEXELS * size):
            texels[int(model.tex_adr[number])] = _shrink_texture(model, int(number), size)
        yield
    finally:
        for name, value in kept.items():
            getattr(model, name)[:] = value
        for start, value in texels.items():
            model.tex_data[start : start + len(value)] = value


def in_view(model: Any, data: Any, camera: int) -> np.ndarray:
    """Whether the bounding sphere of each geom touches the square picture of a camera, (G,) bool; planes always do."""
    local = (data.geom_xpos - data.cam_xpos[camera]) @ data.cam_xmat[camera].reshape(3, 3)
    depth, radius = -local[:, 2], model.geom_rbound
    half = np.deg2rad(model.cam_fovy[camera]) / 2
    # Distance of the centre from the nearer one of the two planes through the camera and a side of the picture.
    outside = np.abs(local[:, :2]) * np.cos(half) - depth[:, None] * np.sin(half)
    return (radius == 0) | ((outside < radius[:, None]).all(1) & (depth > -radius))


def _collision_meshes(model: Any) -> np.ndarray:
    """Numbers of the meshes of geoms that can touch others."""
    import mujoco

    solid = (model.geom_contype != 0) | (model.geom_conaffinity != 0)
    return np.unique(model.geom_dataid[solid & (model.geom_type == mujoco.mjtGeom.mjGEOM_MESH)])


def _simplify_mesh(model: Any, number: int, size: int) -> None:
    """Simplify one mesh in the model's arrays."""
    first, count = model.mesh_vertadr[number], model.mesh_vertnum[number]
    vertex_V3 = model.mesh_vert[first : first + count]
    start, faces = model.mesh_faceadr[number], model.mesh_facenum[number]
    low, extent = vertex_V3.min(0), np.ptp(vertex_V3, axis=0).max()
    cell_V3 = ((vertex_V3 - low) / max(FINEST / size, COARSEST / size * extent)).astype(np.int64)
    _, member_C, cell_V, members_C = np.unique(
        (cell_V3 * (1, 1 << 20, 1 << 40)).sum(1), return_index=True, return_inverse=True, return_counts=True
    )
    mean_C3 = np.stack([np.bincount(cell_V, axis) for axis in vertex_V3.T], 1) / members_C[:, None]

    cell_F3 = cell_V[model.mesh_face[start : start + faces]]
    a, b, c = np.sort(cell_F3, 1).T
    whole = np.flatnonzero((a != b) & (b != c))
    _, chosen = np.unique((a * len(member_C) + b)[whole] * len(member_C) + c[whole], return_index=True)
    left = whole[np.sort(chosen)]

    model.mesh_vert[first + member_C] = mean_C3
    model.mesh_face[start : start + len(left)] = member_C[cell_F3[left]]
    for name in ("mesh_facenormal", "mesh_facetexcoord"):
        corner_F3 = getattr(model, name)[start : start + faces]
        corner_F3[: len(left)] = corner_F3[left]
    model.mesh_facenum[number] = len(left)


def _shrink_texture(model: Any, number: int, size: int) -> np.ndarray:
    """Average squares of texels of one texture in the model's arrays; returns what was overwritten.

    OpenGL does the same when a texture is far away, but first needs all of it in memory.
    """
    from PIL import Image

    width, height, channels = (int(getattr(model, f"tex_{what}")[number]) for what in ("width", "height", "nchannel"))
    factor = min(width, height) // (TEXELS * size)
    if width % factor or height % factor:
        return np.empty(0, np.uint8)
    start = int(model.tex_adr[number])
    texel_HWC = model.tex_data[start : start + width * height * channels].reshape(height, width, channels)
    small = np.asarray(Image.fromarray(texel_HWC.squeeze()).reduce(factor)).ravel()
    before = model.tex_data[start : start + len(small)].copy()
    model.tex_data[start : start + len(small)] = small
    model.tex_width[number], model.tex_height[number] = width // factor, height // factor
    return before
