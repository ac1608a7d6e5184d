"""Folders that are complete or not there."""

import json
import os
from pathlib import Path

import pytest

from scarcade.engine import folder
from scarcade.engine.errors import CorruptError, OpenError, StorageError


def _write(target: Path, content: bytes, *, replace: bool = False) -> None:
    with folder.committed(target, replace=replace) as work:
        (work / "deep").mkdir()
        (work / "deep" / "a.bin").write_bytes(content)


def test_a_committed_folder_is_intact_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    _write(tmp_path / "x", b"abc")
    assert folder.problems(tmp_path / "x") == []
    assert os.listdir(tmp_path) == ["x"]


def test_what_is_committed_can_be_read_by_others(tmp_path: Path) -> None:
    with folder.committed(tmp_path / "x") as work:
        (work / "weights").touch(mode=0o600)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "x" / "weights").stat().st_mode & 0o777 == 0o644


def test_an_error_in_the_block_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), folder.committed(tmp_path / "x") as work:
        (work / "a").write_bytes(b"1")
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []


def test_a_failed_replacement_keeps_the_old_one(tmp_path: Path) -> None:
    _write(tmp_path / "x", b"old")
    with pytest.raises(ZeroDivisionError), folder.committed(tmp_path / "x", replace=True) as work:
        (work / "a").write_bytes(b"1")
        raise ZeroDivisionError
    assert (tmp_path / "x" / "deep" / "a.bin").read_bytes() == b"old"


def test_an_existing_folder_is_replaced_only_when_told(tmp_path: Path) -> None:
    _write(tmp_path / "x", b"old")
    with pytest.raises(StorageError, match="exists already"):
        _write(tmp_path / "x", b"new")
    _write(tmp_path / "x", b"new", replace=True)
    assert (tmp_path / "x" / "deep" / "a.bin").read_bytes() == b"new"


@pytest.mark.parametrize("offset", range(0, 64, 7))
def test_every_flipped_byte_is_found(tmp_path: Path, offset: int) -> None:
    _write(tmp_path / "x", bytes(range(64)))
    path = tmp_path / "x" / "deep" / "a.bin"
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)
    assert folder.problems(tmp_path / "x") == ["deep/a.bin: its content is not what was written"]


def test_missing_and_cut_files_are_found(tmp_path: Path) -> None:
    _write(tmp_path / "x", b"abcdef")
    path = tmp_path / "x" / "deep" / "a.bin"
    path.write_bytes(b"abc")
    assert folder.problems(tmp_path / "x", deep=False) == ["deep/a.bin: 3 bytes where 6 were written"]
    path.unlink()
    assert folder.problems(tmp_path / "x", deep=False) == ["deep/a.bin: missing"]


def test_a_manifest_cannot_point_outside(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"s")
    _write(tmp_path / "x", b"abc")
    manifest = folder.read_manifest(tmp_path / "x")
    manifest["files"]["../secret"] = {"bytes": 1, "sha256": ""}
    (tmp_path / "x" / folder.MANIFEST).write_text(json.dumps(manifest))
    assert "../secret: lies outside of the folder" in folder.problems(tmp_path / "x")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"files": [1]}', b'{"files": {"a": 1}}', b"\xff\xfe"])
def test_a_broken_manifest_is_an_error_of_ours(tmp_path: Path, content: bytes) -> None:
    (tmp_path / folder.MANIFEST).write_bytes(content)
    with pytest.raises(CorruptError, match="not a manifest"):
        folder.problems(tmp_path)


def test_no_manifest_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(OpenError, match=folder.MANIFEST):
        folder.problems(tmp_path)


def test_sweep_puts_back_what_a_killed_replacement_moved_aside(tmp_path: Path) -> None:
    _write(tmp_path / "x", b"old")
    aside = tmp_path / ".tmp-x-old-abcd_123"
    aside.mkdir()
    os.replace(tmp_path / "x", aside / "x")  # the state in which a kill between the two renames leaves it
    (tmp_path / ".tmp-x-def").mkdir()
    folder.sweep(tmp_path)
    assert os.listdir(tmp_path) == ["x"]
    assert folder.problems(tmp_path / "x") == []


def test_write_json_is_whole_or_not_at_all(tmp_path: Path) -> None:
    folder.write_json(tmp_path / "a.json", {"b": 1})
    with pytest.raises(ValueError, match="Out of range"):
        folder.write_json(tmp_path / "a.json", {"b": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": 1}
    assert os.listdir(tmp_path) == ["a.json"]
