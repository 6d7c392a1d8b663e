from __future__ import annotations

import hashlib
import logging
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mtl_lightning.datamodules.loading import derive_seed
from mtl_lightning.datamodules.scene_cache import FORMAT_VERSION, SceneFile, SceneSet, read_map
from mtl_lightning.datamodules.scene_rendering import render

SCENES = SceneSet("train", 4, 32, 0, 0.75, 1.0)
LOGGER = "mtl_lightning.datamodules.scene_cache"


def _file(folder: Path) -> SceneFile:
    file = SceneFile(folder, SCENES)
    file.ensure()
    return file


# Half a step of the rounding, and half the spacing of float16 numbers below 16.
ROUNDING = {
    "image": 0,
    "semseg": 0,
    "instance": 0,
    "depth_zbuffer": 0,
    "depth_euclidean": 0,
    "normal": 0.5 / 32767,
    "reshading": 0.5 / 65535,
    "reshading_left": 0.5 / 65535,
    "edge_occlusion": 0,
    "edge_texture": 0.5 / 65535,
    "keypoints2d": 0.5 / 65535,
    "keypoints3d": 0.5 / 65535,
    "principal_curvature": 2**-8,
    "albedo": 0.5 / 255,
}


@pytest.mark.parametrize("name", ROUNDING)
def test_a_record_is_the_rendered_scene_within_the_rounding(name: str) -> None:
    for index in range(4):
        scene = render(derive_seed("scene", 0, "train", index), 32)
        found = read_map(SCENES[index], name)
        assert found.dtype == (torch.int64 if name in ("semseg", "instance") else torch.float32)
        assert np.abs(found.numpy() - scene[name]).max() <= ROUNDING[name] + 1e-7


def test_a_record_names_every_map_of_the_renderer() -> None:
    assert set(SCENES.dtype.names or ()) == set(render(0, 32))


def test_the_renderer_changes_with_the_format_version_only() -> None:
    # Files of an older renderer would pass for new ones: when this fails, raise the version and renew the numbers.
    records = [SCENES[index] for index in range(4)]
    classes = hashlib.sha256(b"".join(read_map(record, "semseg").numpy().tobytes() for record in records)).hexdigest()
    brightness = torch.stack([read_map(record, "image") for record in records]).mean().item()
    assert (FORMAT_VERSION, classes[:16], round(brightness, 3)) == (1, "5df7c6d8ad33cf62", 0.614)


def test_normals_of_a_record_are_unit_vectors() -> None:
    assert (read_map(SCENES[0], "normal").norm(dim=0) - 1).abs().max() < 1e-4


@pytest.mark.parametrize("other", [{"split": "val"}, {"seed": 1}])
def test_splits_and_seeds_share_no_scene(other: dict[str, str | int]) -> None:
    digests = {scenes[index].tobytes() for scenes in (SCENES, replace(SCENES, **other)) for index in range(4)}  # type: ignore[arg-type]
    assert len(digests) == 8


def test_the_file_holds_the_scenes(tmp_path: Path) -> None:
    file = _file(tmp_path)
    assert len(file) == 4
    assert all(file[index].tobytes() == SCENES[index].tobytes() for index in range(4))


def test_nothing_else_is_left_in_the_folder(tmp_path: Path) -> None:
    file = _file(tmp_path / "new" / "folder")
    assert list(file.path.parent.iterdir()) == [file.path]


def test_a_good_file_is_kept(tmp_path: Path) -> None:
    file = _file(tmp_path)
    before = file.path.stat()
    SceneFile(tmp_path, SCENES).ensure()
    assert (file.path.stat().st_ino, file.path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize(
    "change",
    [
        {"split": "val"},
        {"count": 3},
        {"size": 33},
        {"seed": 1},
        {"texture": 0.5},
        {"shading": 0.5},
    ],
)
def test_all_that_decides_the_content_is_in_the_name(tmp_path: Path, change: dict[str, str | float]) -> None:
    assert SceneFile(tmp_path, replace(SCENES, **change)).path != SceneFile(tmp_path, SCENES).path  # type: ignore[arg-type]


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _truncate_within_the_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[50_000] ^= 1
    path.write_bytes(content)


def _replace_by_another_split(path: Path) -> None:
    other = SceneFile(path.parent / "other", replace(SCENES, split="test"))
    other.ensure()
    path.write_bytes(other.path.read_bytes())


def _replace_by_text(path: Path) -> None:
    path.write_text("[1, 2]".ljust(path.stat().st_size))


DAMAGES = [_truncate, _truncate_within_the_header, _empty, _flip_a_bit, _replace_by_another_split, _replace_by_text]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_not_right_is_rendered_again_with_one_warning(
    tmp_path: Path, damage: object, caplog: pytest.LogCaptureFixture
) -> None:
    file = _file(tmp_path)
    good = file.path.read_bytes()
    assert callable(damage)
    damage(file.path)
    with caplog.at_level(logging.WARNING, LOGGER):
        file.ensure()
        file.ensure()
    assert file.path.read_bytes() == good
    assert len(caplog.records) == 1
    assert "are rendered again" in caplog.text


@pytest.mark.parametrize("damage", [damage for damage in DAMAGES if damage is not _flip_a_bit])
def test_the_check_refuses_a_file_of_other_size_or_header(tmp_path: Path, damage: object) -> None:
    file = _file(tmp_path)
    assert callable(damage)
    damage(file.path)
    with pytest.raises(FileNotFoundError, match="`prepare_data` should be called before `setup`"):
        file.check()


def test_the_check_refuses_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        SceneFile(tmp_path, SCENES).check()


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    file = SceneFile(tmp_path, replace(SCENES, size=16))
    with pytest.raises(ValueError, match="`size` should be in"):
        file.ensure()
    assert list(tmp_path.iterdir()) == []


def test_two_processes_may_write_at_once(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from mtl_lightning.datamodules.scene_cache import SceneFile, SceneSet;"
        "file = SceneFile(Path(sys.argv[1]), SceneSet('train', 40, 32, 0, 0.75, 1.0)); print('ready', flush=True);"
        "sys.stdin.readline(); file.ensure(); assert file.problem(read_all=True) is None"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.wait() for process in processes] == [0, 0]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_pickled_file_carries_no_scene(tmp_path: Path) -> None:
    file = _file(tmp_path)
    first = file[0].tobytes()
    content = pickle.dumps(file)
    assert len(content) < 2000
    assert pickle.loads(content)[0].tobytes() == first


def test_progress_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, LOGGER):
        _file(tmp_path)
    assert caplog.messages[0].startswith("Rendering 4 train scenes into ")
    assert caplog.messages[-1] == "Rendered 4 of 4 train scenes"


def test_a_folder_that_cannot_be_made_is_reported_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"The folder of the scenes, '.*file.scenes', .* `cache_dir`, or None. Found: .*"):
        SceneFile(tmp_path / "file" / "scenes", SCENES).ensure()
