"""A run's folder that not every machine sees."""

from pathlib import Path

import pytest

from scarcade.engine.errors import StorageError
from scarcade.engine.folder import sweep
from scarcade.engine.shared_folder import marked, sees, unseen


def test_who_looks_in_the_marked_folder_sees_it_for_as_long_as_it_lasts(tmp_path: Path) -> None:
    place = str(tmp_path / "run")
    with marked(place, "a"):
        assert sees(place, "a")
        assert not sees(place, "b", patience_s=0)
        assert not sees(str(tmp_path / "elsewhere"), "a", patience_s=0.3)
    assert list(Path(place).iterdir()) == []


def test_what_a_killed_launch_left_is_swept(tmp_path: Path) -> None:
    with marked(str(tmp_path), "a"):
        sweep(tmp_path)
        assert list(tmp_path.iterdir()) == []


def test_a_url_is_seen_from_everywhere() -> None:
    with marked("s3://bucket/runs/a", "a"):
        assert sees("s3://bucket/runs/a", "a")


def test_a_place_that_is_no_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"--out .*file/run: cannot be written"), marked(f"{tmp_path}/file/run", "a"):
        pass


def test_the_error_says_which_node_and_what_to_give() -> None:
    said = str(unseen("/home/me/runs/a", "10.0.0.7"))
    assert "--out /home/me/runs/a: the node 10.0.0.7 does not see this folder" in said
    assert "s3://" in said
