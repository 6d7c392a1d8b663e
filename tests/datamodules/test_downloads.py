from __future__ import annotations

import functools
import hashlib
import http.server
import io
import logging
import os
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mtl_lightning.datamodules.downloads import check_digest, download_file, extract_archive, file_digest

CONTENT = b"some data" * 1000
DIGEST = hashlib.md5(CONTENT).hexdigest()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of a local server of one file, ``data.bin``."""
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "data.bin").write_bytes(CONTENT)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}/data.bin"
        running.shutdown()


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What Lightning's logger says."""
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("lightning"), "propagate", True)
    caplog.set_level(logging.INFO)
    return caplog


def _tar(path: Path, *members: tarfile.TarInfo, content: bytes = b"text") -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for member in members:
            member.size = len(content) if member.isreg() else 0
            tar.addfile(member, io.BytesIO(content) if member.isreg() else None)
    return path


def _link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


# Downloads


@pytest.mark.parametrize("algorithm", ["md5", "sha256"])
def test_the_digest_is_that_of_the_content(tmp_path: Path, algorithm: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    assert file_digest(path, algorithm) == hashlib.new(algorithm, CONTENT).hexdigest()


def test_a_file_is_fetched(tmp_path: Path, server: str) -> None:
    path = download_file(server, tmp_path / "new/data.bin", digest=DIGEST, licence="CC0")
    assert path.read_bytes() == CONTENT
    assert [file.name for file in path.parent.iterdir()] == ["data.bin"]


def test_address_and_licence_are_said(tmp_path: Path, server: str, messages: pytest.LogCaptureFixture) -> None:
    download_file(server, tmp_path / "data.bin", digest=DIGEST, licence="for research only")
    assert server in messages.text
    assert "for research only" in messages.text


def test_a_wrong_digest_leaves_nothing_behind(tmp_path: Path, server: str) -> None:
    with pytest.raises(ValueError, match=rf"md5 sum {'0' * 32}\. Found {DIGEST}, of 9000 bytes, and deleted them"):
        download_file(server, tmp_path / "new/data.bin", digest="0" * 32, licence="CC0")
    assert list((tmp_path / "new").iterdir()) == []


def test_a_whole_file_is_not_fetched_again(tmp_path: Path) -> None:
    path = tmp_path / "data.bin"
    path.write_bytes(CONTENT)
    assert download_file("http://127.0.0.1:1/none", path, digest=DIGEST, licence="CC0") == path


def test_a_damaged_file_that_is_there_is_named_and_kept(tmp_path: Path, server: str) -> None:
    path = tmp_path / "data.bin"
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(ValueError, match=rf"data\.bin should have the md5 sum {DIGEST}\. Found .*delete it"):
        download_file(server, path, digest=DIGEST, licence="CC0")
    assert path.read_bytes() == CONTENT[:-1]


def test_a_digest_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    check_digest(path, DIGEST)
    with pytest.raises(ValueError, match="should have the md5 sum ab"):
        check_digest(path, "ab")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(
            PermissionError, match=r"new should be a folder that can be written to\. Found .* read-only"
        ):
            download_file("http://127.0.0.1/none", tmp_path / "new" / "data.bin", digest=DIGEST, licence="none")
    finally:
        tmp_path.chmod(0o755)


# Archives


@pytest.mark.parametrize("suffix", [".zip", ".tar.gz"])
def test_an_archive_is_unpacked(tmp_path: Path, suffix: str) -> None:
    archive = tmp_path / f"set{suffix}"
    if suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as zipped:
            zipped.mkdir("set") if hasattr(zipped, "mkdir") else zipped.writestr("set/", "")
            zipped.writestr("set/inner/file.txt", "text")
    else:
        _tar(archive, tarfile.TarInfo("set/inner/file.txt"))
    into = tmp_path / "into"
    assert extract_archive(archive, into) == [into / "set"]
    assert (into / "set/inner/file.txt").read_text() == "text"
    assert [path.name for path in into.iterdir()] == ["set"]


@pytest.mark.parametrize("name", ["../out.txt", "/out.txt", "set/../../out.txt", "set\\..\\out.txt", "C:out.txt"])
@pytest.mark.parametrize("suffix", [".zip", ".tar.gz"])
def test_a_path_that_leads_out_is_refused(tmp_path: Path, name: str, suffix: str) -> None:
    archive = tmp_path / f"set{suffix}"
    if suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as zipped:
            zipped.writestr("set/good.txt", "text")
            zipped.writestr(name, "text")
    else:
        _tar(archive, tarfile.TarInfo("set/good.txt"), tarfile.TarInfo(name))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"that stay inside it\. Found .*out\.txt"):
        extract_archive(archive, tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    archive = _tar(tmp_path / "set.tar.gz", _link("set/link", "/etc/passwd", kind))
    with pytest.raises(ValueError, match="only plain files and folders"):
        extract_archive(archive, tmp_path)


def test_a_link_in_a_zip_file_is_refused(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("link")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as zipped:
        zipped.writestr(info, "/etc/passwd")
    with pytest.raises(ValueError, match="only plain files and folders"):
        extract_archive(tmp_path / "set.zip", tmp_path)


@pytest.mark.parametrize("content", [b"", b"no archive", None])
def test_a_damaged_archive_leaves_nothing_behind(tmp_path: Path, content: bytes | None) -> None:
    archive = _tar(tmp_path / "set.tar.gz", tarfile.TarInfo("set/file.txt"), content=bytes(range(256)) * 400)
    archive.write_bytes(archive.read_bytes()[:-600] if content is None else content)
    with pytest.raises(ValueError, match=r"set\.tar\.gz should be a whole \.zip or \.tar archive"):
        extract_archive(archive, tmp_path / "into")
    assert list((tmp_path / "into").iterdir()) == []


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    archive = _tar(tmp_path / "set.tar.gz", tarfile.TarInfo("set/file.txt"))
    (tmp_path / "set").mkdir()
    with pytest.raises(FileExistsError, match=r"should not yet hold set, which set\.tar\.gz"):
        extract_archive(archive, tmp_path)
    assert list((tmp_path / "set").iterdir()) == []


@pytest.mark.parametrize("left", [600, 512 * 4, 512 * 4 + 100])
def test_of_an_archive_that_ends_too_early_nothing_is_kept(tmp_path: Path, left: int) -> None:
    # Where a file ends within or before the header of the next one, `tarfile` itself says nothing.
    archive = tmp_path / "set.tar"
    with tarfile.open(archive, "w") as tar:
        for number in range(3):
            member = tarfile.TarInfo(f"set/{number}.txt")
            member.size = 512
            tar.addfile(member, io.BytesIO(bytes(512)))
    archive.write_bytes(archive.read_bytes()[:left])
    with pytest.raises(ValueError, match=r"set\.tar should be a whole"):
        extract_archive(archive, tmp_path / "into")
    assert list((tmp_path / "into").iterdir()) == []


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
def test_a_byte_that_was_changed_is_found(tmp_path: Path, mode: str) -> None:
    archive = tmp_path / f"set.tar.{mode}"
    with tarfile.open(archive, f"w:{mode}") as tar:  # type: ignore[call-overload]
        member = tarfile.TarInfo("set/file.txt")
        member.size = len(CONTENT)
        tar.addfile(member, io.BytesIO(CONTENT))
    content = archive.read_bytes()
    place = len(content) - 6 if mode == "gz" else len(content) // 2  # in the sum at the end, which follows all files
    archive.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with pytest.raises(ValueError, match=rf"set\.tar\.{mode} should be a whole"):
        extract_archive(archive, tmp_path / "into")
