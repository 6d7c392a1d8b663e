"""Pictures of random rooms by ray casting, with twelve dense labels, exact functions of the scene or the picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mtl_lightning.datamodules.loading import derive_seed
from mtl_lightning.datamodules.scene_geometry import (
    CORNERS,
    SEMSEG_CLASSES,
    Array,
    Box,
    Camera,
    Scene,
    Solid,
    dot,
    nonzero,
    sample_scene,
    unit,
)

Indices = NDArray[np.intp]

MIN_SIZE = 32
MAX_SIZE = 224
#: How far, in metres, the light of ``reshading`` stands to the right of the camera and above it.
LIGHT_OFFSET = 0.6

_NOISE_STD = 0.012
_GAMMA = 1.6
_SHININESS = 30


def render(
    seed: int, size: int = 64, *, texture: float = 0.75, shading: float = 1.0, mirror: bool = False
) -> dict[str, NDArray[Any]]:
    """Return the picture and the labels of the random scene that ``seed`` names.

    The scene is a room of 4 to 7 m each way with boxes, balls and columns on its floor, windows, pictures and doors on
    its walls and perhaps a rug, lit by one lamp below the ceiling and seen by a pinhole camera inside. Solids may
    overlap. Plain, chequered, striped and marbled materials are solid textures: their colour depends on the point in
    space. Camera coordinates have x to the right, y up and z towards the viewer. All arrays are float32, shape
    ``(C, size, size)``, but for the classes, which are int64, shape ``(size, size)``:

    - ``image``, 3 channels: in ``[0, 1]``, rounded to multiples of 1/255 before anything is computed from it.
    - ``semseg``: the index in ``SEMSEG_CLASSES``.
    - ``instance``: the number of the surface or solid, consecutive from 0 in each picture. Each wall is one.
    - ``depth_zbuffer``, ``depth_euclidean``, 1 channel: the distance in metres along the view axis, and along the ray.
    - ``normal``, 3 channels: the unit vector that leaves the surface, in camera coordinates.
    - ``reshading``, 1 channel: ``max(0, n . l)`` with the unit vector ``l`` to a light 0.6 m to the right of the camera
      and 0.6 m above it; no shadows. ``reshading_left`` is the same with the light on the left, which a mirrored
      picture needs.
    - ``edge_occlusion``, 1 channel: 1 where one of the 4 neighbours is another instance and the ``depth_zbuffer`` of
      the two differs by over 5 % of the smaller; else 0.
    - ``edge_texture``, 1 channel: twice the Sobel magnitude (kernel divided by 4) of the grey image, at most 1.
    - ``keypoints2d``, 1 channel: four times ``det / (trace + 0.001)`` of the structure tensor, the sum of the products
      of Sobel derivatives over 3 x 3 pixels, at most 1.
    - ``keypoints3d``, 1 channel: the largest of Gaussians of height 1 and standard deviation ``size / 42`` pixels, one
      at each corner of the room or of a box that is seen: the ray of its pixel is as long as its distance within 6 %.
    - ``principal_curvature``, 2 channels: per metre, ``(1/r, 1/r)`` on balls, ``(1/r, 0)`` on the sides of columns.
    - ``albedo``, 3 channels: the colour of the material in ``[0, 1]``.

    Geometry, materials, lamp and noise have each their own generator, so that the geometry labels of a seed are the
    same for every ``texture`` and ``shading``, and the same bytes in every process.

    Args:
        seed: The name of the scene.
        size: The height and width in pixels, in ``[32, 224]``.
        texture: The share of materials that are not plain, in ``[0, 1]``. With 0, edges of the image are edges of
            surfaces and of shadows, and appearance follows geometry; with 1 it is mostly pattern. Windows stay plain.
        shading: The strength of light, shadow and the tone curve, in ``[0, 1]``. With 0 the image is the albedo and
            the noise of the sensor: geometry has to be read from perspective and pattern alone.
        mirror: Whether the camera sees the scene in a mirror: the image is flipped, noise included.

    Raises:
        ValueError: If ``seed`` is negative or another number is out of its range.

    Example:
        >>> scene = render(seed=0, size=32)
        >>> scene["image"].shape, scene["semseg"].shape, scene["principal_curvature"].shape
        ((3, 32, 32), (32, 32), (2, 32, 32))
    """
    _check(seed, size, texture, shading)
    scene = sample_scene(seed, texture)
    camera = scene.camera.mirrored() if mirror else scene.camera
    view = _view(scene, camera, size)
    noise = np.random.default_rng(derive_seed("scene noise", seed)).normal(0, _NOISE_STD, (3, size, size))
    colour = _shade(scene, camera, view, shading).reshape(3, size, size)
    colour = colour + (noise[:, :, ::-1] if mirror else noise)
    image = (np.rint(colour.clip(0, 1) * 255) / 255).astype(np.float32)
    grey = np.array([0.299, 0.587, 0.114])[:, None, None] * image

    def maps(values: Array) -> NDArray[np.float32]:
        return values.reshape(-1, size, size).astype(np.float32)

    instance = np.unique(view.surface, return_inverse=True)[1].reshape(size, size)
    depth = maps(view.distance * view.cosine)
    return {
        "image": image,
        "semseg": np.array([surface.label for surface in scene.surfaces])[view.surface].reshape(size, size),
        "instance": instance.astype(np.int64),
        "depth_zbuffer": depth,
        "depth_euclidean": maps(view.distance),
        "normal": maps(camera.coordinates(view.normal)),
        "reshading": maps(_reshading(camera, view, LIGHT_OFFSET)),
        "reshading_left": maps(_reshading(camera, view, -LIGHT_OFFSET)),
        "edge_occlusion": maps(_occlusion_edges(instance, depth[0].astype(np.float64))),
        "edge_texture": maps(_texture_edges(grey.sum(0))),
        "keypoints2d": maps(_keypoints2d(grey.sum(0))),
        "keypoints3d": maps(_keypoints3d(scene, camera, view.distance.reshape(size, size))),
        "principal_curvature": maps(view.curvature),
        "albedo": maps(view.albedo),
    }


def _check(seed: int, size: int, texture: float, shading: float) -> None:
    if seed < 0:
        raise ValueError(f"`seed` should be at least 0. Found {seed}.")
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise ValueError(f"`size` should be in [{MIN_SIZE}, {MAX_SIZE}] pixels. Found {size}.")
    for name, value in (("texture", texture), ("shading", shading)):
        if not 0 <= value <= 1:
            raise ValueError(f"`{name}` should be in [0, 1]. Found {value}.")


# Seeing it.


class _View(NamedTuple):
    """What the rays of all pixels meet; ``n`` pixels."""

    distance: Array  # (n,)
    cosine: Array  # (n,), between the ray and the view axis
    points: Array  # (3, n)
    surface: Indices  # (n,), in `Scene.surfaces`
    normal: Array  # (3, n), in world coordinates
    curvature: Array  # (2, n)
    albedo: Array  # (3, n)


def _view(scene: Scene, camera: Camera, size: int) -> _View:
    directions = camera.rays(size)
    limit, surface = _leave_room(scene.room, camera.position, directions)
    distance, solid = _meet_solids(scene.solids, camera.position, directions)
    points = camera.position[:, None] + np.minimum(distance, limit) * directions
    is_solid = distance < limit
    for number, fixture in enumerate(scene.fixtures, start=len(scene.sides)):
        surface[(surface == fixture.side) & fixture.contains(points)] = number
    surface = np.where(is_solid, solid + len(scene.sides) + len(scene.fixtures), surface)

    normal, curvature, albedo = np.empty_like(points), np.empty((2, points.shape[1])), np.empty_like(points)
    surfaces = scene.surfaces
    for number in np.flatnonzero(np.bincount(surface)).tolist():
        where = np.flatnonzero(surface == number)
        here, seen = points[:, where], surfaces[number]
        normal[:, where], curvature[:, where], albedo[:, where] = (
            seen.normal(here),
            seen.curvature(here),
            seen.albedo(here),
        )
    cosine = dot(camera.forward, directions)
    return _View(np.minimum(distance, limit), cosine, points, surface, normal, curvature, albedo)


def _leave_room(room: Array, origin: Array, directions: Array) -> tuple[Array, Indices]:
    """Return how far each ray goes to a side of the room, and the number of that side."""
    directions = nonzero(directions)
    ends = directions > 0
    lengths = (room[:, None] * ends - origin[:, None]) / directions
    axis = lengths.argmin(0)
    every = np.arange(len(axis))
    return lengths[axis, every], 2 * axis + ends[axis, every]


def _meet_solids(solids: Sequence[Solid], origin: Array, directions: Array) -> tuple[Array, Indices]:
    """Return how far each ray goes to the first solid, inf if to none, and which one that is."""
    distance = np.full(directions.shape[1], np.inf)
    first = np.zeros(directions.shape[1], dtype=np.intp)
    for number, solid in enumerate(solids):
        offset = solid.centre - origin
        along = dot(offset, directions)
        # The exact intersection is computed only for rays that pass through the sphere about the solid.
        near = np.flatnonzero((dot(offset, offset) - along * along < solid.reach**2) & (along > -solid.reach))
        hit = solid.hit(origin, directions[:, near])
        closer = hit < distance[near]
        distance[near[closer]] = hit[closer]
        first[near[closer]] = number
    return distance, first


def _shade(scene: Scene, camera: Camera, view: _View, shading: float) -> Array:
    """Return the colours, shape ``(3, n)``, before the noise."""
    beams = view.points - scene.lamp[:, None]
    lengths = np.sqrt(dot(beams, beams))
    beams = beams / lengths
    # Traced from the lamp, shadow rays have one origin, as the rays of the camera have.
    lit = _meet_solids(scene.solids, scene.lamp, beams)[0] > lengths - 1e-3
    light = scene.ambient + (1 - scene.ambient) * lit * np.maximum(-dot(view.normal, beams), 0)
    labels = np.array([surface.label for surface in scene.surfaces])[view.surface]
    light[labels == SEMSEG_CLASSES.index("window")] = 1.15
    halfway = unit(unit(camera.position[:, None] - view.points) - beams)
    is_solid = view.surface >= len(scene.sides) + len(scene.fixtures)
    highlight = 0.3 * (lit & is_solid) * np.maximum(dot(view.normal, halfway), 0) ** _SHININESS
    linear = view.albedo * (1 + shading * (light - 1)) + shading * highlight
    # Without shading there is no tone curve either, so that the image is the albedo.
    return linear ** (1 / (1 + shading * (_GAMMA - 1)))


# Labels of the geometry and of the image.


def _reshading(camera: Camera, view: _View, right: float) -> Array:
    light = camera.position + right * camera.right + LIGHT_OFFSET * camera.up
    return np.maximum(dot(view.normal, unit(light[:, None] - view.points)), 0)


def _occlusion_edges(instance: Indices, depth: Array) -> Array:
    edges = np.zeros(depth.shape)
    # Transposed views, so that the neighbours on the left and right are marked as those above and below.
    for marks, ids, near in ((edges, instance, depth), (edges.T, instance.T, depth.T)):
        gap = np.abs(near[1:] - near[:-1]) > 0.05 * np.minimum(near[1:], near[:-1])
        edge = gap & (ids[1:] != ids[:-1])
        marks[1:][edge] = 1
        marks[:-1][edge] = 1
    return edges


def _sobel(grey: Array) -> tuple[Array, Array]:
    """Return the derivatives to the right and down, per pixel; beyond the border the image repeats its last row."""
    padded = np.pad(grey, 1, mode="edge")
    rows = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    columns = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    return (rows[:, 2:] - rows[:, :-2]) / 4, (columns[2:] - columns[:-2]) / 4


def _texture_edges(grey: Array) -> Array:
    right, down = _sobel(grey)
    return np.minimum(2 * np.sqrt(right**2 + down**2), 1)


def _keypoints2d(grey: Array) -> Array:
    right, down = _sobel(grey)
    padded = np.pad(np.stack((right * right, down * down, right * down)), ((0, 0), (1, 1), (1, 1)))
    rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    xx, yy, xy = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    return (4 * (xx * yy - xy * xy) / (xx + yy + 1e-3)).clip(0, 1)


def _keypoints3d(scene: Scene, camera: Camera, distance: Array) -> Array:
    size = len(distance)
    room = (scene.room / 2)[:, None] * (1 + CORNERS)
    corners = np.concatenate([room, *(solid.corners() for solid in scene.solids if isinstance(solid, Box))], axis=1)
    offsets = corners - camera.position[:, None]
    x, y, z = camera.coordinates(offsets)
    offsets, x, y, z = (values[..., z < -0.1] for values in (offsets, x, y, -z))
    # Places in pixels, whole numbers at the centres of pixels.
    column, row = (((1 + side / (z * camera.tangent)) * size - 1) / 2 for side in (x, -y))
    lengths = np.sqrt(dot(offsets, offsets))
    grid = np.arange(size)
    heat = np.zeros((size, size))
    for at, to, length in zip(row, column, lengths, strict=True):
        nearest = (int(np.rint(at)), int(np.rint(to)))
        if not (0 <= nearest[0] < size and 0 <= nearest[1] < size):
            continue
        if abs(distance[nearest] - length) > 0.06 * length:
            continue
        down, across = (np.exp(-(((grid - place) / (size / 42)) ** 2) / 2) for place in (at, to))
        heat = np.maximum(heat, np.outer(down, across))
    return heat
