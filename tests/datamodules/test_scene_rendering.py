from __future__ import annotations

import hashlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from mtl_lightning.datamodules.scene_geometry import SEMSEG_CLASSES
from mtl_lightning.datamodules.scene_rendering import render

Scene = dict[str, NDArray[Any]]

GEOMETRY = (
    "semseg",
    "instance",
    "depth_zbuffer",
    "depth_euclidean",
    "normal",
    "reshading",
    "reshading_left",
    "edge_occlusion",
    "keypoints3d",
    "principal_curvature",
)
CHANNELS = {
    "image": 3,
    "depth_zbuffer": 1,
    "depth_euclidean": 1,
    "normal": 3,
    "reshading": 1,
    "reshading_left": 1,
    "edge_occlusion": 1,
    "edge_texture": 1,
    "keypoints2d": 1,
    "keypoints3d": 1,
    "principal_curvature": 2,
    "albedo": 3,
}


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [render(seed, 32) for seed in range(300)]


def _tangent(scene: Scene) -> float:
    # The ray of the corner pixel is sqrt(1 + 2 (tangent (size - 1) / size)^2) long per metre of depth.
    size = scene["semseg"].shape[0]
    ratio = float(scene["depth_euclidean"][0, 0, 0]) / float(scene["depth_zbuffer"][0, 0, 0])
    return float(np.sqrt((ratio**2 - 1) / 2)) * size / (size - 1)


def _points(scene: Scene) -> NDArray[np.float64]:
    """Back-project the depth: camera coordinates, x right, y up, z to the viewer, shape (3, size, size)."""
    size = scene["semseg"].shape[0]
    grid = _tangent(scene) * ((np.arange(size) + 0.5) / size * 2 - 1)
    depth = scene["depth_zbuffer"][0].astype(np.float64)
    return np.stack([depth * grid[None, :], -depth * grid[:, None], -depth])


def _degrees(one: NDArray[Any], other: NDArray[Any]) -> NDArray[np.float64]:
    chord = np.linalg.norm(one - other, axis=0) / 2
    return np.degrees(2 * np.arcsin(chord.clip(0, 1)))


def _reference_edge_occlusion(scene: Scene) -> NDArray[np.float32]:
    instance, depth = scene["instance"], scene["depth_zbuffer"][0]
    size = len(instance)
    edges = np.zeros((1, size, size), np.float32)
    for row in range(size):
        for column in range(size):
            for other in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
                if min(other) < 0 or max(other) >= size or instance[other] == instance[row, column]:
                    continue
                near, far = sorted((float(depth[other]), float(depth[row, column])))
                if far - near > 0.05 * near:
                    edges[0, row, column] = 1
    return edges


def test_maps_have_the_shapes_and_types_of_the_documentation(scenes: list[Scene]) -> None:
    expected: dict[str, tuple[tuple[int, ...], str]]
    expected = {name: ((channels, 32, 32), "float32") for name, channels in CHANNELS.items()}
    expected |= dict.fromkeys(("semseg", "instance"), ((32, 32), "int64"))
    for scene in scenes:
        assert {name: (values.shape, str(values.dtype)) for name, values in scene.items()} == expected


def test_all_numbers_are_finite(scenes: list[Scene]) -> None:
    assert all(np.isfinite(values).all() for scene in scenes for values in scene.values())


@pytest.mark.parametrize(
    "name", ["image", "reshading", "reshading_left", "edge_texture", "keypoints2d", "keypoints3d", "albedo"]
)
def test_maps_without_unit_stay_in_the_unit_interval(scenes: list[Scene], name: str) -> None:
    assert all(scene[name].min() >= 0 for scene in scenes)
    assert all(scene[name].max() <= 1 for scene in scenes)


def test_depth_is_metres_in_a_room(scenes: list[Scene]) -> None:
    depth = np.stack([scene["depth_zbuffer"] for scene in scenes])
    # The longest diagonal of a room.
    assert 0.5 < depth.min() < depth.max() < np.sqrt(7**2 + 7**2 + 3.2**2)


def test_curvature_is_at_most_12_per_metre(scenes: list[Scene]) -> None:
    curvature = np.stack([scene["principal_curvature"] for scene in scenes])
    assert curvature.min() == 0
    assert 8 < curvature.max() < 12.2


def test_the_image_is_rounded_to_bytes(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert np.array_equal(scene["image"], (np.rint(scene["image"] * 255.0) / 255.0).astype(np.float32))


def test_a_fresh_process_renders_the_same_bytes() -> None:
    code = (
        "import hashlib; from mtl_lightning.datamodules.scene_rendering import render; digest = hashlib.sha256();"
        "[digest.update(values.tobytes()) for seed in range(5) for values in render(seed, 48).values()];"
        "print(digest.hexdigest())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    digest = hashlib.sha256()
    for seed in range(5):
        for values in render(seed, 48).values():
            digest.update(values.tobytes())
    assert found == digest.hexdigest()


def test_seeds_name_different_scenes(scenes: list[Scene]) -> None:
    assert len({scene["depth_zbuffer"].tobytes() for scene in scenes}) == 300


def test_normals_are_unit_vectors(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert np.abs(np.linalg.norm(scene["normal"], axis=0) - 1).max() < 1e-3


def test_normals_face_the_viewer(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert ((scene["normal"] * _points(scene)).sum(0) < 1e-6).all()


def test_normals_of_flat_surfaces_are_those_of_the_depth() -> None:
    angles = []
    for seed in range(300):
        scene = render(seed, 64)
        points, normal = _points(scene), scene["normal"].astype(np.float64)
        across = points[:, 1:-1, 2:] - points[:, 1:-1, :-2]
        upwards = points[:, :-2, 1:-1] - points[:, 2:, 1:-1]
        found = np.cross(across, upwards, axis=0)
        found /= np.linalg.norm(found, axis=0)
        # Where the pixel and its four neighbours are on one flat side of one instance.
        flat = (scene["principal_curvature"] == 0).all(0)[1:-1, 1:-1]
        for rows, columns in ((0, 1), (2, 1), (1, 0), (1, 2)):
            window = (slice(rows, rows + 62), slice(columns, columns + 62))
            flat &= scene["instance"][window] == scene["instance"][1:-1, 1:-1]
            flat &= (np.abs(normal[(slice(None), *window)] - normal[:, 1:-1, 1:-1]) < 1e-6).all(0)
        angles.append(_degrees(found[:, flat], normal[:, 1:-1, 1:-1][:, flat]))
    every = np.concatenate(angles)
    assert len(every) > 300 * 64 * 64 / 2
    assert np.median(every) < 0.005
    assert np.quantile(every, 0.95) < 0.02


def test_depth_along_the_ray_is_depth_along_the_axis_times_the_length_of_the_ray(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert np.allclose(np.linalg.norm(_points(scene), axis=0), scene["depth_euclidean"][0], rtol=1e-5)


def test_balls_are_round(scenes: list[Scene]) -> None:
    checked = 0
    for scene in scenes:
        for number in np.unique(scene["instance"][scene["semseg"] == SEMSEG_CLASSES.index("ball")]):
            where = scene["instance"] == number
            first, second = scene["principal_curvature"][:, where]
            centres = _points(scene)[:, where] - scene["normal"][:, where] / first
            assert np.allclose(centres, centres[:, :1], atol=1e-3)
            assert np.array_equal(first, second)
            checked += 1
    assert checked > 150


def test_columns_are_round_about_the_vertical(scenes: list[Scene]) -> None:
    checked = 0
    for scene in scenes:
        up = scene["normal"][:, scene["semseg"] == SEMSEG_CLASSES.index("floor")][:, 0]
        for number in np.unique(scene["instance"][scene["semseg"] == SEMSEG_CLASSES.index("column")]):
            side = (scene["instance"] == number) & (scene["principal_curvature"][0] > 0)
            if not side.any():
                continue
            first, second = scene["principal_curvature"][:, side]
            axis = _points(scene)[:, side] - scene["normal"][:, side] / first
            axis -= up[:, None] * (up @ axis)
            assert np.allclose(axis, axis[:, :1], atol=1e-3)
            assert (second == 0).all()
            checked += 1
    assert checked > 80


def test_instances_are_numbered_from_zero_and_have_one_class(scenes: list[Scene]) -> None:
    for scene in scenes:
        pairs = np.unique(np.stack([scene["instance"].ravel(), scene["semseg"].ravel()]), axis=1)
        assert pairs[0].tolist() == list(range(len(pairs[0])))


@pytest.mark.parametrize(("name", "right"), [("reshading", 0.6), ("reshading_left", -0.6)])
def test_reshading_is_the_cosine_to_its_light(scenes: list[Scene], name: str, right: float) -> None:
    for scene in scenes:
        beam = np.array([right, 0.6, 0])[:, None, None] - _points(scene)
        expected = ((scene["normal"] * beam).sum(0) / np.linalg.norm(beam, axis=0)).clip(0)
        assert np.allclose(scene[name][0], expected, atol=1e-4)


def test_occlusion_edges_are_those_of_their_definition(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert np.array_equal(scene["edge_occlusion"], _reference_edge_occlusion(scene))


def test_texture_edges_are_the_sobel_magnitude_of_the_image(scenes: list[Scene]) -> None:
    for scene in scenes:
        grey = np.tensordot([0.299, 0.587, 0.114], scene["image"], 1)
        right, down = (ndimage.sobel(grey, axis, mode="nearest") / 4 for axis in (1, 0))
        assert np.allclose(scene["edge_texture"][0], (2 * np.hypot(right, down)).clip(max=1), atol=1e-5)


def test_keypoints2d_are_those_of_the_structure_tensor(scenes: list[Scene]) -> None:
    for scene in scenes:
        grey = np.tensordot([0.299, 0.587, 0.114], scene["image"], 1)
        right, down = (ndimage.sobel(grey, axis, mode="nearest") / 4 for axis in (1, 0))
        xx, yy, xy = (ndimage.convolve(v, np.ones((3, 3)), mode="constant") for v in (right**2, down**2, right * down))
        assert np.allclose(scene["keypoints2d"][0], (4 * (xx * yy - xy**2) / (xx + yy + 1e-3)).clip(0, 1), atol=1e-5)


def test_keypoints3d_are_where_planes_meet() -> None:
    meeting = []
    for seed in range(60):
        scene = render(seed, 96)
        heat = scene["keypoints3d"][0]
        for row, column in zip(*np.nonzero((heat == ndimage.maximum_filter(heat, 5)) & (heat > 0.8)), strict=True):
            window = scene["normal"][:, max(0, row - 2) : row + 3, max(0, column - 2) : column + 3].reshape(3, -1)
            meeting.append(len(np.unique(window.round(2), axis=1).T) > 1)
    assert len(meeting) > 100
    # The tolerance in distance lets corners pass that are just behind a side.
    assert np.mean(meeting) > 0.9


def test_a_keypoint_is_a_gaussian_of_a_42nd_of_the_size() -> None:
    checked = 0
    for seed in range(60):
        heat = render(seed, 96)["keypoints3d"][0].astype(np.float64)
        row, column = np.unravel_index(heat.argmax(), heat.shape)
        if not (8 <= row < 88 and 8 <= column < 88) or heat[row - 8 : row + 9, column - 8 : column + 9].sum() < 0.9 * (
            heat.sum()
        ):
            continue
        values = np.log(heat[row, column - 1 : column + 2])
        assert values[0] - 2 * values[1] + values[2] == pytest.approx(-((42 / 96) ** 2), rel=1e-3)
        checked += 1
    assert checked > 5


def test_classes_have_their_share_of_pixels(scenes: list[Scene]) -> None:
    share = np.bincount(np.stack([scene["semseg"] for scene in scenes]).ravel(), minlength=10) / (300 * 32 * 32)
    expected = [0.385, 0.361, 0.035, 0.017, 0.006, 0.010, 0.078, 0.071, 0.017, 0.020]
    assert np.allclose(share, expected, rtol=0.2, atol=0.012)


def test_classes_have_their_share_of_scenes(scenes: list[Scene]) -> None:
    share = np.mean([np.bincount(scene["semseg"].ravel(), minlength=10) > 0 for scene in scenes], axis=0)
    expected = [1, 0.97, 0.37, 0.32, 0.23, 0.21, 0.55, 0.70, 0.60, 0.40]
    assert np.allclose(share, expected, atol=0.12)


@pytest.mark.parametrize("knobs", [{"texture": 0.0}, {"texture": 1.0}, {"shading": 0.0}])
def test_geometry_does_not_depend_on_appearance(scenes: list[Scene], knobs: dict[str, Any]) -> None:
    for seed in range(20):
        scene = render(seed, 32, **knobs)
        assert all(np.array_equal(scene[name], scenes[seed][name]) for name in GEOMETRY)


def test_what_stays_plain_keeps_its_colour(scenes: list[Scene]) -> None:
    same = []
    for seed in range(40):
        plain = render(seed, 32, texture=0.0)
        for number in np.unique(plain["instance"]):
            where = scenes[seed]["instance"] == number
            colours = np.unique(scenes[seed]["albedo"][:, where], axis=1)
            if where.sum() >= 100 and colours.shape[1] == 1:
                same.append(np.array_equal(colours, np.unique(plain["albedo"][:, where], axis=1)))
    assert len(same) > 20
    # A large cell of a chequered surface can fill what is seen of it.
    assert np.mean(same) > 0.9


def test_materials_do_not_depend_on_the_light() -> None:
    assert np.array_equal(render(0, 32)["albedo"], render(0, 32, shading=0.3)["albedo"])


def _colours_per_surface(texture: float) -> list[int]:
    counts = []
    for seed in range(40):
        scene = render(seed, 32, texture=texture)
        window = SEMSEG_CLASSES.index("window")
        for number in np.unique(scene["instance"]):
            where = scene["instance"] == number
            if where.sum() >= 100 and scene["semseg"][where][0] != window:
                counts.append(len(np.unique(scene["albedo"][:, where], axis=1).T))
    return counts


def test_without_texture_a_surface_has_one_colour() -> None:
    assert set(_colours_per_surface(0.0)) == {1}


def test_with_texture_a_large_surface_has_several_colours() -> None:
    assert np.mean([count > 1 for count in _colours_per_surface(1.0)]) > 0.95


def test_without_shading_the_image_is_the_albedo_and_noise() -> None:
    residuals = []
    for seed in range(20):
        scene = render(seed, 32, shading=0.0)
        inside = (scene["albedo"] > 0.1) & (scene["albedo"] < 0.9)
        residuals.append((scene["image"] - scene["albedo"])[inside])
    residual = np.concatenate(residuals)
    assert abs(residual.mean()) < 3e-4
    assert residual.std() == pytest.approx(0.012, rel=0.03)


def _light(seed: int, shading: float) -> NDArray[np.float64]:
    """Return how bright each pixel of the room is, relative to its colour; solids have highlights, windows shine."""
    scene = render(seed, 32, shading=shading)
    room = np.isin(scene["semseg"], [SEMSEG_CLASSES.index(name) for name in ("floor", "wall", "ceiling")])
    return (scene["image"][:, room].astype(np.float64) ** (1 + 0.6 * shading) / scene["albedo"][:, room]).mean(0)


@pytest.mark.parametrize("shading", [0.0, 0.5])
def test_the_strength_of_light_is_that_of_shading(shading: float) -> None:
    for seed in range(20):
        expected = 1 + shading * (_light(seed, 1.0) - 1)
        assert np.abs(_light(seed, shading) - expected).mean() < 0.03


def test_windows_shine_whatever_the_lamp_does(scenes: list[Scene]) -> None:
    lights = [
        scene["image"][0, window].astype(np.float64) ** 1.6 / scene["albedo"][0, window]
        for scene, window in ((scene, scene["semseg"] == SEMSEG_CLASSES.index("window")) for scene in scenes)
    ]
    assert np.abs(np.concatenate(lights) - 1.15).max() < 0.15  # several times the noise


def test_light_is_between_that_of_shadows_and_that_of_the_lamp() -> None:
    lights = [_light(seed, 1.0) for seed in range(40)]
    darkest, brightest = (np.array([np.quantile(light, q) for light in lights]) for q in (0.005, 0.995))
    assert (brightest < 1.1).all()
    # Ambient light is 0.25 to 0.45.
    assert (darkest > 0.2).all()
    assert np.mean(darkest < 0.5) > 0.7


def test_the_size_changes_no_scene() -> None:
    # The centre of a pixel of the small picture is the centre of the middle one of 3 x 3 pixels of the large one.
    small, large = render(7, 32), render(7, 96)
    for name in ("semseg", "depth_zbuffer", "depth_euclidean", "normal", "reshading", "principal_curvature", "albedo"):
        assert np.allclose(small[name], large[name][..., 1::3, 1::3], rtol=1e-6, atol=1e-6)


def test_a_mirrored_scene_is_seen_from_a_mirrored_camera() -> None:
    scene, mirrored = render(3, 32), render(3, 32, mirror=True)
    assert np.array_equal(scene["image"][..., ::-1], mirrored["image"])
    assert np.array_equal(scene["reshading_left"][..., ::-1], mirrored["reshading"])
    assert np.allclose(_points(scene)[0][:, ::-1], -_points(mirrored)[0], atol=1e-5)


@pytest.mark.parametrize("size", [32, 33, 224])
def test_sizes_within_the_range_are_rendered(size: int) -> None:
    assert render(0, size)["image"].shape == (3, size, size)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, "`seed` should be at least 0. Found -1."),
        ({"size": 31}, r"`size` should be in \[32, 224\] pixels. Found 31."),
        ({"size": 225}, r"`size` should be in \[32, 224\] pixels. Found 225."),
        ({"texture": 1.1}, r"`texture` should be in \[0, 1\]. Found 1.1."),
        ({"shading": -0.1}, r"`shading` should be in \[0, 1\]. Found -0.1."),
        ({"shading": float("nan")}, r"`shading` should be in \[0, 1\]. Found nan."),
    ],
)
def test_numbers_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render(**({"seed": 0, "size": 32} | arguments))
