"""Random rooms in metres: materials, surfaces and solids, a lamp, and the camera that sees them.

Points and directions are arrays of shape ``(3, n)``, single ones of shape ``(3,)``; x and z are horizontal, y is up.
Products are written out: a matrix product may round differently with another number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from mtl_lightning.datamodules.loading import derive_seed

Array = NDArray[np.float64]

#: The classes of ``semseg``, in the order of their numbers.
SEMSEG_CLASSES = ("floor", "wall", "ceiling", "window", "picture", "door", "rug", "box", "ball", "column")

_FIXTURES = (("window", 0.30), ("picture", 0.25), ("door", 0.20))


def dot(left: Array, right: Array) -> Array:
    """Return the inner products of two arrays of vectors, shape ``(n,)``."""
    return left[0] * right[0] + left[1] * right[1] + left[2] * right[2]


def unit(vectors: Array) -> Array:
    """Return ``vectors``, scaled to length one."""
    return vectors / np.sqrt(dot(vectors, vectors))


def _about_y(vectors: Array, angle: float) -> Array:
    cos, sin = np.cos(angle), np.sin(angle)
    return np.stack((cos * vectors[0] + sin * vectors[2], vectors[1], cos * vectors[2] - sin * vectors[0]))


def nonzero(values: Array) -> Array:
    """Return ``values`` with 1e-12 in the place of those that are smaller, to divide by."""
    return np.where(np.abs(values) < 1e-12, 1e-12, values)


@dataclass(frozen=True)
class Material:
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
        """Return the colours at ``points``, shape ``(3, n)``."""
        if self.pattern == "plain":
            return np.repeat(self.colours[0][:, None], points.shape[1], axis=1)
        # The phase keeps planes such as the floor from lying on the border of two cells.
        scaled = self.frequency * points + self.phase[:, None]
        along = dot(self.direction, scaled)
        if self.pattern == "checker":
            mix = np.floor(scaled).sum(0) % 2
        elif self.pattern == "stripes":
            mix = np.floor(along) % 2
        else:
            swirl = np.sin(1.9 * scaled[0] + 1.3 * np.sin(1.1 * scaled[2])) + np.sin(1.7 * scaled[1] + scaled[2])
            mix = 0.5 + 0.5 * np.sin(2.5 * along + swirl)
        return self.colours[0][:, None] * (1 - mix) + self.colours[1][:, None] * mix


@dataclass(frozen=True)
class Face:
    """A rectangle of the side of the room at the lower (0) or upper (1) end of ``axis``, between two corners."""

    label: int
    material: Material
    axis: int
    end: int
    low: Array
    high: Array

    @property
    def side(self) -> int:
        """The number of the side of the room, 0 to 5."""
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
        """Return the unit vectors that leave the surface at ``points``."""
        normal = np.zeros_like(points)
        normal[self.axis] = 1 - 2 * self.end
        return normal

    def curvature(self, points: Array) -> Array:
        """Return the principal curvatures at ``points``, per metre, shape ``(2, n)``."""
        return np.zeros((2, points.shape[1]))

    def albedo(self, points: Array) -> Array:
        """Return the colours at ``points``, shape ``(3, n)``."""
        return self.material.albedo(points)


@dataclass(frozen=True)
class Box:
    """A box with half sizes ``half``, turned by ``angle`` about the vertical."""

    label: ClassVar[int] = SEMSEG_CLASSES.index("box")
    material: Material
    centre: Array
    half: Array
    angle: float

    @property
    def reach(self) -> float:
        """The radius of a sphere about ``centre`` that holds the solid."""
        return float(np.sqrt(dot(self.half, self.half)))

    def hit(self, origin: Array, directions: Array) -> Array:
        """Return how far each ray goes to the solid, shape ``(n,)``; inf if it misses it."""
        inverse = 1 / nonzero(_about_y(directions, self.angle))
        middle = -_about_y(origin - self.centre, self.angle)[:, None] * inverse
        radius = self.half[:, None] * np.abs(inverse)
        return _entry((middle - radius).max(0), (middle + radius).min(0))

    def normal(self, points: Array) -> Array:
        """Return the unit vectors that leave the surface at ``points``."""
        scaled = self._local(points) / self.half[:, None]
        axis = np.abs(scaled).argmax(0)
        every = np.arange(points.shape[1])
        normal = np.zeros_like(points)
        normal[axis, every] = np.sign(scaled[axis, every])
        return _about_y(normal, -self.angle)

    def curvature(self, points: Array) -> Array:
        """Return the principal curvatures at ``points``, per metre, shape ``(2, n)``."""
        return np.zeros((2, points.shape[1]))

    def albedo(self, points: Array) -> Array:
        """Return the colours at ``points``, shape ``(3, n)``."""
        return self.material.albedo(self._local(points))

    def corners(self) -> Array:
        """Return the eight corners, shape ``(3, 8)``."""
        return _about_y(self.half[:, None] * CORNERS, -self.angle) + self.centre[:, None]

    def _local(self, points: Array) -> Array:
        return _about_y(points - self.centre[:, None], self.angle)


@dataclass(frozen=True)
class Ball:
    """A ball."""

    label: ClassVar[int] = SEMSEG_CLASSES.index("ball")
    material: Material
    centre: Array
    radius: float

    @property
    def reach(self) -> float:
        """The radius of a sphere about ``centre`` that holds the solid."""
        return self.radius

    def hit(self, origin: Array, directions: Array) -> Array:
        """Return how far each ray goes to the solid, shape ``(n,)``; inf if it misses it."""
        offset = origin - self.centre
        middle = -dot(offset, directions)
        half = np.sqrt(np.maximum(middle**2 - dot(offset, offset) + self.radius**2, 0))
        return _entry(middle - half, middle + half)

    def normal(self, points: Array) -> Array:
        """Return the unit vectors that leave the surface at ``points``."""
        return unit(points - self.centre[:, None])

    def curvature(self, points: Array) -> Array:
        """Return the principal curvatures at ``points``, per metre, shape ``(2, n)``."""
        return np.full((2, points.shape[1]), 1 / self.radius)

    def albedo(self, points: Array) -> Array:
        """Return the colours at ``points``, shape ``(3, n)``."""
        return self.material.albedo(points - self.centre[:, None])


@dataclass(frozen=True)
class Column:
    """An upright cylinder with flat caps."""

    label: ClassVar[int] = SEMSEG_CLASSES.index("column")
    material: Material
    centre: Array
    radius: float
    half_height: float

    @property
    def reach(self) -> float:
        """The radius of a sphere about ``centre`` that holds the solid."""
        return float(np.hypot(self.radius, self.half_height))

    def hit(self, origin: Array, directions: Array) -> Array:
        """Return how far each ray goes to the solid, shape ``(n,)``; inf if it misses it."""
        offset = origin - self.centre
        x, z = directions[0], directions[2]
        square = np.maximum(x * x + z * z, 1e-12)
        middle = -(offset[0] * x + offset[2] * z) / square
        missing = (offset[0] ** 2 + offset[2] ** 2 - self.radius**2) / square
        half = np.sqrt(np.maximum(middle**2 - missing, 0))
        inverse = 1 / nonzero(directions[1])
        level, rise = -offset[1] * inverse, self.half_height * np.abs(inverse)
        return _entry(np.maximum(middle - half, level - rise), np.minimum(middle + half, level + rise))

    def normal(self, points: Array) -> Array:
        """Return the unit vectors that leave the surface at ``points``."""
        local = points - self.centre[:, None]
        cap = self._is_cap(local)
        across = np.where(cap, 0, 1 / self.radius)
        return np.stack((local[0] * across, np.where(cap, np.sign(local[1]), 0), local[2] * across))

    def curvature(self, points: Array) -> Array:
        """Return the principal curvatures at ``points``, per metre, shape ``(2, n)``."""
        around = np.where(self._is_cap(points - self.centre[:, None]), 0, 1 / self.radius)
        return np.stack((around, np.zeros_like(around)))

    def albedo(self, points: Array) -> Array:
        """Return the colours at ``points``, shape ``(3, n)``."""
        return self.material.albedo(points - self.centre[:, None])

    def _is_cap(self, local: Array) -> NDArray[np.bool_]:
        return np.abs(local[1]) / self.half_height > np.sqrt(local[0] ** 2 + local[2] ** 2) / self.radius


Solid = Box | Ball | Column
CORNERS = np.array([[x, y, z] for x in (-1.0, 1.0) for y in (-1.0, 1.0) for z in (-1.0, 1.0)]).T


def _entry(enter: Array, leave: Array) -> Array:
    """Return the length at which a ray enters the convex solid it crosses from ``enter`` to ``leave``; inf if not."""
    return np.where((enter < leave) & (enter > 0), enter, np.inf)


@dataclass(frozen=True)
class Camera:
    """A pinhole camera whose axes are unit vectors."""

    position: Array
    right: Array
    up: Array
    forward: Array
    tangent: float  # of half the field of view

    def mirrored(self) -> Camera:
        """Return the camera that sees the scene in a mirror."""
        return Camera(self.position, -self.right, self.up, self.forward, self.tangent)

    def rays(self, size: int) -> Array:
        """Return the unit directions of all pixels, shape ``(3, size * size)``."""
        across = self.tangent * (2 * np.arange(size) + 1 - size) / size
        x, y = np.tile(across, size), np.repeat(-across, size)
        return unit(self.forward[:, None] + x * self.right[:, None] + y * self.up[:, None])

    def coordinates(self, vectors: Array) -> Array:
        """Return ``vectors`` as seen by the camera: x to the right, y up, z towards the viewer."""
        return np.stack((dot(self.right, vectors), dot(self.up, vectors), -dot(self.forward, vectors)))


@dataclass(frozen=True)
class Scene:
    """A furnished room with its lamp and the camera."""

    room: Array  # the extents along x, y and z; one corner is the origin
    camera: Camera
    lamp: Array
    ambient: float
    sides: Sequence[Face]  # in the order of `Face.side`
    fixtures: Sequence[Face]
    solids: Sequence[Solid]

    @property
    def surfaces(self) -> list[Face | Solid]:
        """All surfaces; their places here are their numbers in a view."""
        return [*self.sides, *self.fixtures, *self.solids]


# Drawing a scene.


def sample_scene(seed: int, texture: float) -> Scene:
    """Return the scene that ``seed`` names, with the share ``texture`` of materials that are not plain."""
    rng = np.random.default_rng(derive_seed("scene geometry", seed))
    materials = _Materials(np.random.default_rng(derive_seed("scene materials", seed)), texture)
    room = np.array([rng.uniform(4, 7), rng.uniform(2.4, 3.2), rng.uniform(4, 7)])
    camera = _sample_camera(rng, room)
    light = np.random.default_rng(derive_seed("scene light", seed))
    lamp = room * np.array([light.uniform(0.2, 0.8), 1, light.uniform(0.2, 0.8)]) - np.array([0, 0.15, 0])
    names = ("wall", "wall", "floor", "ceiling", "wall", "wall")
    return Scene(
        room=room,
        camera=camera,
        lamp=lamp,
        ambient=light.uniform(0.25, 0.45),
        sides=[
            Face(SEMSEG_CLASSES.index(name), materials.draw(), side // 2, side % 2, np.zeros(3), room)
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

    def draw(self, fineness: float = 1.0) -> Material:
        patterned = self.rng.uniform() < self.texture
        patterns: tuple[Literal["checker", "stripes", "marble"], ...] = ("checker", "stripes", "marble")
        pattern = patterns[self.rng.integers(3)]
        return Material(
            pattern=pattern if patterned else "plain",
            colours=self.rng.uniform(0.2, 0.95, (2, 3)),
            frequency=fineness * self.rng.uniform(1.3, 3),
            direction=unit(self.rng.normal(size=3)),
            phase=self.rng.uniform(0, 10, 3),
        )

    def glass(self) -> Material:
        material = self.draw()
        return Material("plain", np.array([[0.72, 0.82, 0.95]] * 2), 1.0, material.direction, material.phase)


def _sample_camera(rng: np.random.Generator, room: Array) -> Camera:
    position = room * np.array([rng.uniform(0.15, 0.85), rng.uniform(0.4, 0.75), rng.uniform(0.15, 0.85)])
    aim = room * np.array([rng.uniform(0.35, 0.65), 0, rng.uniform(0.35, 0.65)])
    heading = np.arctan2(aim[0] - position[0], aim[2] - position[2])
    down = np.radians(rng.uniform(10, 40))
    forward = np.array([np.sin(heading) * np.cos(down), -np.sin(down), np.cos(heading) * np.cos(down)])
    right = np.array([-np.cos(heading), 0, np.sin(heading)])
    up = np.array([np.sin(heading) * np.sin(down), np.cos(down), np.cos(heading) * np.sin(down)])
    return Camera(position, right, up, forward, float(np.tan(np.radians(rng.uniform(30, 40)))))


def _sample_fixtures(rng: np.random.Generator, room: Array, materials: _Materials) -> list[Face]:
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
                fixtures.append(Face(SEMSEG_CLASSES.index(name), material, axis, end, low, upper))
                break
            draw -= share
    if rng.uniform() < 0.6:
        half = np.array([rng.uniform(0.6, 1.6), 0, rng.uniform(0.6, 1.6)])
        centre = half + 0.1 + rng.uniform(size=3) * (room - 2 * half - 0.2)
        rug = SEMSEG_CLASSES.index("rug")
        fixtures.append(Face(rug, materials.draw(fineness=1.5), 1, 0, centre - half, centre + half))
    return fixtures


def _fixture_extent(name: str, wide: float, high: float, ceiling: float) -> tuple[float, float, float]:
    """Return the width, the height and the level of the lower edge, in metres."""
    if name == "door":
        return 0.7 + 0.2 * wide, 1.9 + 0.15 * high, 0.0
    if name == "window":
        return 0.8 + 1.0 * wide, 0.8 + 0.5 * high, 0.85
    height = 0.4 + 0.5 * high
    return 0.4 + 0.7 * wide, height, min(1.1 + 0.4 * wide, ceiling - height - 0.1)


def _sample_solids(rng: np.random.Generator, room: Array, camera: Array, materials: _Materials) -> list[Solid]:
    solids: list[Solid] = []
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
            solids.append(Box(skin, np.array([ground[0], half[1], ground[2]]), half, angle))
            if carries:
                above = small * min(half[0], half[2])
                solids.append(Ball(second, np.array([ground[0], 2 * half[1] + above, ground[2]]), above))
        elif kind < 0.75:
            solids.append(Ball(skin, np.array([ground[0], radius, ground[2]]), radius))
        else:
            solids.append(Column(skin, np.array([ground[0], half_height, ground[2]]), radius, half_height))
    return solids
