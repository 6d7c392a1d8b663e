"""Pictures of random rooms by ray casting, with twelve dense labels, exact functions of the scene or the picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mtl_lightning.datamodules.loading import derive_seed

Array = NDArray[np.float64]
Indices = NDArray[np.intp]

#: The classes of ``semseg``, in the order of their numbers.
SEMSEG_CLASSES = ("floor", "wall", "ceiling", "window", "picture", "door", "rug", "box", "ball", "column")
MIN_SIZE = 32
MAX_SIZE = 224
#: How far, in metres, the light of ``reshading`` stands to the right of the camera and above it.
LIGHT_OFFSET = 0.6

_NOISE_STD = 0.012
_GAMMA = 1.6
_SHININESS = 30
_FIXTURES = (("window", 0.30), ("picture", 0.25), ("door", 0.20))


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
    scene = _sample_scene(seed, texture)
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


# Geometry. Points and directions are arrays of shape (3, n), single ones of shape (3,). Products are written out:
# a matrix product may round differently with another number of threads.


def _dot(left: Array, right: Array) -> Array:
    return left[0] * right[0] + left[1] * right[1] + left[2] * right[2]


def _unit(vectors: Array) -> Array:
    return vectors / np.sqrt(_dot(vectors, vectors))


def _about_y(vectors: Array, angle: float) -> Array:
    cos, sin = np.cos(angle), np.sin(angle)
    return np.stack((cos * vectors[0] + sin * vectors[2], vectors[1], cos * vectors[2] - sin * vectors[0]))


def _nonzero(values: Array) -> Array:
    return np.where(np.abs(values) < 1e-12, 1e-12, values)


@dataclass(frozen=True)
class _Material:
    """A colour at each point of space.

    ``frequency``, per metre, and ``phase``, shape ``(3,)``, place the pattern; ``direction``, shape ``(3,)``, is across
    the stripes.
    """

    pattern: Literal["plain", "checker", "stripes", "marble"]
    colours: Array  # (2, 3)
    frequency: float
    direction: Array
    phase: Array

    def albedo(self, points: Array) -> Array:
        if self.pattern == "plain":
            return np.repeat(self.colours[0][:, None], points.shape[1], axis=1)
        # The phase keeps planes such as the floor from lying on the border of two cells.
        scaled = self.frequency * points + self.phase[:, None]
        along = _dot(self.direction, scaled)
        if self.pattern == "checker":
            mix = np.floor(scaled).sum(0) % 2
        elif self.pattern == "stripes":
            mix = np.floor(along) % 2
        else:
            swirl = np.sin(1.9 * scaled[0] + 1.3 * np.sin(1.1 * scaled[2])) + np.sin(1.7 * scaled[1] + scaled[2])
            mix = 0.5 + 0.5 * np.sin(2.5 * along + swirl)
        return self.colours[0][:, None] * (1 - mix) + self.colours[1][:, None] * mix


@dataclass(frozen=True)
class _Face:
    """A rectangle of the side of the room at the lower (0) or upper (1) end of ``axis``, between two corners."""

    label: int
    material: _Material
    axis: int
    end: int
    low: Array
    high: Array

    @property
    def side(self) -> int:
        return 2 * self.axis + self.end

    def contains(self, points: Array) -> NDArray[np.bool_]:
        """Return which ``points`` of that side lie in the rectangle."""
        first, second = (axis for axis in range(3) if axis != self.axis)
        return (
            (points[first] > self.low[first])
            & (points[first] < self.high[first])
            & (points[second] > self.low[second])
            & (points[second] < self.high[second])
        )

    def normal(self, points: Array) -> Array:
        normal = np.zeros_like(points)
        normal[self.axis] = 1 - 2 * self.end
        return normal

    def curvature(self, points: Array) -> Array:
        return np.zeros((2, points.shape[1]))

    def albedo(self, points: Array) -> Array:
        return self.material.albedo(points)


@dataclass(frozen=True)
class _Box:
    """A box with half sizes ``half``, turned by ``angle`` about the vertical."""

    label: ClassVar[int] = SEMSEG_CLASSES.index("box")
    material: _Material
    centre: Array
    half: Array
    angle: float

    @property
    def reach(self) -> float:
        return float(np.sqrt(_dot(self.half, self.half)))

    def hit(self, origin: Array, directions: Array) -> Array:
        inverse = 1 / _nonzero(_about_y(directions, self.angle))
        middle = -_about_y(origin - self.centre, self.angle)[:, None] * inverse
        radius = self.half[:, None] * np.abs(inverse)
        return _entry((middle - radius).max(0), (middle + radius).min(0))

    def normal(self, points: Array) -> Array:
        scaled = self._local(points) / self.half[:, None]
        axis = np.abs(scaled).argmax(0)
        every = np.arange(points.shape[1])
        normal = np.zeros_like(points)
        normal[axis, every] = np.sign(scaled[axis, every])
        return _about_y(normal, -self.angle)

    def curvature(self, points: Array) -> Array:
        return np.zeros((2, points.shape[1]))

    def albedo(self, points: Array) -> Array:
        return self.material.albedo(self._local(points))

    def corners(self) -> Array:
        return _about_y(self.half[:, None] * _CORNERS, -self.angle) + self.centre[:, None]

    def _local(self, points: Array) -> Array:
        return _about_y(points - self.centre[:, None], self.angle)


@dataclass(frozen=True)
class _Ball:
    label: ClassVar[int] = SEMSEG_CLASSES.index("ball")
    material: _Material
    centre: Array
    radius: float

    @property
    def reach(self) -> float:
        return self.radius

    def hit(self, origin: Array, directions: Array) -> Array:
        offset = origin - self.centre
        middle = -_dot(offset, directions)
        half = np.sqrt(np.maximum(middle**2 - _dot(offset, offset) + self.radius**2, 0))
        return _entry(middle - half, middle + half)

    def normal(self, points: Array) -> Array:
        return _unit(points - self.centre[:, None])

    def curvature(self, points: Array) -> Array:
        return np.full((2, points.shape[1]), 1 / self.radius)

    def albedo(self, points: Array) -> Array:
        return self.material.albedo(points - self.centre[:, None])


@dataclass(frozen=True)
class _Column:
    """An upright cylinder with flat caps."""

    label: ClassVar[int] = SEMSEG_CLASSES.index("column")
    material: _Material
    centre: Array
    radius: float
    half_height: float

    @property
    def reach(self) -> float:
        return float(np.hypot(self.radius, self.half_height))

    def hit(self, origin: Array, directions: Array) -> Array:
        offset = origin - self.centre
        x, z = directions[0], directions[2]
        square = np.maximum(x * x + z * z, 1e-12)
        middle = -(offset[0] * x + offset[2] * z) / square
        missing = (offset[0] ** 2 + offset[2] ** 2 - self.radius**2) / square
        half = np.sqrt(np.maximum(middle**2 - missing, 0))
        inverse = 1 / _nonzero(directions[1])
        level, rise = -offset[1] * inverse, self.half_height * np.abs(inverse)
        return _entry(np.maximum(middle - half, level - rise), np.minimum(middle + half, level + rise))

    def normal(self, points: Array) -> Array:
        local = points - self.centre[:, None]
        cap = self._is_cap(local)
        across = np.where(cap, 0, 1 / self.radius)
        return np.stack((local[0] * across, np.where(cap, np.sign(local[1]), 0), local[2] * across))

    def curvature(self, points: Array) -> Array:
        around = np.where(self._is_cap(points - self.centre[:, None]), 0, 1 / self.radius)
        return np.stack((around, np.zeros_like(around)))

    def albedo(self, points: Array) -> Array:
        return self.material.albedo(points - self.centre[:, None])

    def _is_cap(self, local: Array) -> NDArray[np.bool_]:
        return np.abs(local[1]) / self.half_height > np.sqrt(local[0] ** 2 + local[2] ** 2) / self.radius


_Solid = _Box | _Ball | _Column
_CORNERS = np.array([[x, y, z] for x in (-1.0, 1.0) for y in (-1.0, 1.0) for z in (-1.0, 1.0)]).T


def _entry(enter: Array, leave: Array) -> Array:
    """Return the length at which a ray enters the convex solid it crosses from ``enter`` to ``leave``; inf if not."""
    return np.where((enter < leave) & (enter > 0), enter, np.inf)


@dataclass(frozen=True)
class _Camera:
    position: Array
    right: Array
    up: Array
    forward: Array
    tangent: float  # of half the field of view

    def mirrored(self) -> _Camera:
        return _Camera(self.position, -self.right, self.up, self.forward, self.tangent)

    def rays(self, size: int) -> Array:
        """Return the unit directions of all pixels, shape ``(3, size * size)``."""
        across = self.tangent * (2 * np.arange(size) + 1 - size) / size
        x, y = np.tile(across, size), np.repeat(-across, size)
        return _unit(self.forward[:, None] + x * self.right[:, None] + y * self.up[:, None])

    def coordinates(self, vectors: Array) -> Array:
        return np.stack((_dot(self.right, vectors), _dot(self.up, vectors), -_dot(self.forward, vectors)))


@dataclass(frozen=True)
class _Scene:
    room: Array  # the extents along x, y and z; one corner is the origin
    camera: _Camera
    lamp: Array
    ambient: float
    sides: Sequence[_Face]  # in the order of `_Face.side`
    fixtures: Sequence[_Face]
    solids: Sequence[_Solid]

    @property
    def surfaces(self) -> list[_Face | _Solid]:
        return [*self.sides, *self.fixtures, *self.solids]


# Drawing a scene.


def _sample_scene(seed: int, texture: float) -> _Scene:
    rng = np.random.default_rng(derive_seed("scene geometry", seed))
    materials = _Materials(np.random.default_rng(derive_seed("scene materials", seed)), texture)
    room = np.array([rng.uniform(4, 7), rng.uniform(2.4, 3.2), rng.uniform(4, 7)])
    camera = _sample_camera(rng, room)
    light = np.random.default_rng(derive_seed("scene light", seed))
    lamp = room * np.array([light.uniform(0.2, 0.8), 1, light.uniform(0.2, 0.8)]) - np.array([0, 0.15, 0])
    names = ("wall", "wall", "floor", "ceiling", "wall", "wall")
    return _Scene(
        room=room,
        camera=camera,
        lamp=lamp,
        ambient=light.uniform(0.25, 0.45),
        sides=[
            _Face(SEMSEG_CLASSES.index(name), materials.draw(), side // 2, side % 2, np.zeros(3), room)
            for side, name in enumerate(names)
        ],
        fixtures=_sample_fixtures(rng, room, materials),
        solids=_sample_solids(rng, room, camera.position, materials),
    )


class _Materials:
    """The source of materials. Every draw takes as many numbers, whatever the share ``texture`` of patterns is."""

    def __init__(self, rng: np.random.Generator, texture: float) -> None:
        self.rng = rng
        self.texture = texture

    def draw(self, fineness: float = 1.0) -> _Material:
        patterned = self.rng.uniform() < self.texture
        patterns: tuple[Literal["checker", "stripes", "marble"], ...] = ("checker", "stripes", "marble")
        pattern = patterns[self.rng.integers(3)]
        return _Material(
            pattern=pattern if patterned else "plain",
            colours=self.rng.uniform(0.2, 0.95, (2, 3)),
            frequency=fineness * self.rng.uniform(1.3, 3),
            direction=_unit(self.rng.normal(size=3)),
            phase=self.rng.uniform(0, 10, 3),
        )

    def glass(self) -> _Material:
        material = self.draw()
        return _Material("plain", np.array([[0.72, 0.82, 0.95]] * 2), 1.0, material.direction, material.phase)


def _sample_camera(rng: np.random.Generator, room: Array) -> _Camera:
    position = room * np.array([rng.uniform(0.15, 0.85), rng.uniform(0.4, 0.75), rng.uniform(0.15, 0.85)])
    aim = room * np.array([rng.uniform(0.35, 0.65), 0, rng.uniform(0.35, 0.65)])
    heading = np.arctan2(aim[0] - position[0], aim[2] - position[2])
    down = np.radians(rng.uniform(10, 40))
    forward = np.array([np.sin(heading) * np.cos(down), -np.sin(down), np.cos(heading) * np.cos(down)])
    right = np.array([-np.cos(heading), 0, np.sin(heading)])
    up = np.array([np.sin(heading) * np.sin(down), np.cos(down), np.cos(heading) * np.sin(down)])
    return _Camera(position, right, up, forward, float(np.tan(np.radians(rng.uniform(30, 40)))))


def _sample_fixtures(rng: np.random.Generator, room: Array, materials: _Materials) -> list[_Face]:
    fixtures = []
    for axis, end in ((0, 0), (0, 1), (2, 0), (2, 1)):
        draw, along = rng.uniform(), 2 - axis
        wide, high, middle = rng.uniform(size=3)
        for name, share in _FIXTURES:
            if draw < share:
                width, height, bottom = _fixture_extent(name, wide, high, room[1])
                start = 0.2 + middle * (room[along] - width - 0.4)
                low, upper = np.zeros(3), np.zeros(3)
                low[along], low[1], upper[along], upper[1] = start, bottom, start + width, bottom + height
                material = materials.glass() if name == "window" else materials.draw(fineness=2.0)
                fixtures.append(_Face(SEMSEG_CLASSES.index(name), material, axis, end, low, upper))
                break
            draw -= share
    if rng.uniform() < 0.6:
        half = np.array([rng.uniform(0.6, 1.6), 0, rng.uniform(0.6, 1.6)])
        centre = half + 0.1 + rng.uniform(size=3) * (room - 2 * half - 0.2)
        rug = SEMSEG_CLASSES.index("rug")
        fixtures.append(_Face(rug, materials.draw(fineness=1.5), 1, 0, centre - half, centre + half))
    return fixtures


def _fixture_extent(name: str, wide: float, high: float, ceiling: float) -> tuple[float, float, float]:
    """Return the width, the height and the level of the lower edge, in metres."""
    if name == "door":
        return 0.7 + 0.2 * wide, 1.9 + 0.15 * high, 0.0
    if name == "window":
        return 0.8 + 1.0 * wide, 0.8 + 0.5 * high, 0.85
    height = 0.4 + 0.5 * high
    return 0.4 + 0.7 * wide, height, min(1.1 + 0.4 * wide, ceiling - height - 0.1)


def _sample_solids(rng: np.random.Generator, room: Array, camera: Array, materials: _Materials) -> list[_Solid]:
    solids: list[_Solid] = []
    for _ in range(rng.integers(3, 8)):
        kind, angle, carries, small = rng.uniform(), rng.uniform(0, np.pi), rng.uniform() < 0.4, rng.uniform(0.55, 0.8)
        half = rng.uniform(0.15, 0.6, 3)
        radius, half_height = rng.uniform(0.15, 0.45), rng.uniform(0.25, 0.8)
        place = rng.uniform(size=3)
        skin, second = materials.draw(fineness=2.0), materials.draw(fineness=2.5)
        if kind >= 0.75:
            radius *= 0.75
        reach = float(np.hypot(half[0], half[2])) if kind < 0.5 else radius
        ground = reach + place * (room - 2 * reach)
        if np.hypot(ground[0] - camera[0], ground[2] - camera[2]) < 0.75 + reach:
            continue
        if kind < 0.5:
            solids.append(_Box(skin, np.array([ground[0], half[1], ground[2]]), half, angle))
            if carries:
                above = small * min(half[0], half[2])
                solids.append(_Ball(second, np.array([ground[0], 2 * half[1] + above, ground[2]]), above))
        elif kind < 0.75:
            solids.append(_Ball(skin, np.array([ground[0], radius, ground[2]]), radius))
        else:
            solids.append(_Column(skin, np.array([ground[0], half_height, ground[2]]), radius, half_height))
    return solids


# Seeing it.


class _View(NamedTuple):
    """What the rays of all pixels meet; ``n`` pixels."""

    distance: Array  # (n,)
    cosine: Array  # (n,), between the ray and the view axis
    points: Array  # (3, n)
    surface: Indices  # (n,), in `_Scene.surfaces`
    normal: Array  # (3, n), in world coordinates
    curvature: Array  # (2, n)
    albedo: Array  # (3, n)


def _view(scene: _Scene, camera: _Camera, size: int) -> _View:
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
    cosine = _dot(camera.forward, directions)
    return _View(np.minimum(distance, limit), cosine, points, surface, normal, curvature, albedo)


def _leave_room(room: Array, origin: Array, directions: Array) -> tuple[Array, Indices]:
    """Return how far each ray goes to a side of the room, and the number of that side."""
    directions = _nonzero(directions)
    ends = directions > 0
    lengths = (room[:, None] * ends - origin[:, None]) / directions
    axis = lengths.argmin(0)
    every = np.arange(len(axis))
    return lengths[axis, every], 2 * axis + ends[axis, every]


def _meet_solids(solids: Sequence[_Solid], origin: Array, directions: Array) -> tuple[Array, Indices]:
    """Return how far each ray goes to the first solid, inf if to none, and which one that is."""
    distance = np.full(directions.shape[1], np.inf)
    first = np.zeros(directions.shape[1], dtype=np.intp)
    for number, solid in enumerate(solids):
        offset = solid.centre - origin
        along = _dot(offset, directions)
        # The exact intersection is computed only for rays that pass through the sphere about the solid.
        near = np.flatnonzero((_dot(offset, offset) - along * along < solid.reach**2) & (along > -solid.reach))
        hit = solid.hit(origin, directions[:, near])
        closer = hit < distance[near]
        distance[near[closer]] = hit[closer]
        first[near[closer]] = number
    return distance, first


def _shade(scene: _Scene, camera: _Camera, view: _View, shading: float) -> Array:
    """Return the colours, shape ``(3, n)``, before the noise."""
    beams = view.points - scene.lamp[:, None]
    lengths = np.sqrt(_dot(beams, beams))
    beams = beams / lengths
    # Traced from the lamp, shadow rays have one origin, as the rays of the camera have.
    lit = _meet_solids(scene.solids, scene.lamp, beams)[0] > lengths - 1e-3
    light = scene.ambient + (1 - scene.ambient) * lit * np.maximum(-_dot(view.normal, beams), 0)
    labels = np.array([surface.label for surface in scene.surfaces])[view.surface]
    light[labels == SEMSEG_CLASSES.index("window")] = 1.15
    halfway = _unit(_unit(camera.position[:, None] - view.points) - beams)
    is_solid = view.surface >= len(scene.sides) + len(scene.fixtures)
    highlight = 0.3 * (lit & is_solid) * np.maximum(_dot(view.normal, halfway), 0) ** _SHININESS
    linear = view.albedo * (1 + shading * (light - 1)) + shading * highlight
    # Without shading there is no tone curve either, so that the image is the albedo.
    return linear ** (1 / (1 + shading * (_GAMMA - 1)))


# Labels of the geometry and of the image.


def _reshading(camera: _Camera, view: _View, right: float) -> Array:
    light = camera.position + right * camera.right + LIGHT_OFFSET * camera.up
    return np.maximum(_dot(view.normal, _unit(light[:, None] - view.points)), 0)


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


def _keypoints3d(scene: _Scene, camera: _Camera, distance: Array) -> Array:
    size = len(distance)
    room = (scene.room / 2)[:, None] * (1 + _CORNERS)
    corners = np.concatenate([room, *(solid.corners() for solid in scene.solids if isinstance(solid, _Box))], axis=1)
    offsets = corners - camera.position[:, None]
    x, y, z = camera.coordinates(offsets)
    offsets, x, y, z = (values[..., z < -0.1] for values in (offsets, x, y, -z))
    # Places in pixels, whole numbers at the centres of pixels.
    column, row = (((1 + side / (z * camera.tangent)) * size - 1) / 2 for side in (x, -y))
    lengths = np.sqrt(_dot(offsets, offsets))
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
