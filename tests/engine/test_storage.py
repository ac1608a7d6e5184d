"""A run's folders in an object store: a real S3 server on the loopback."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from scarcade.engine.checkpoint import CheckpointConfig, Checkpoints
from scarcade.engine.errors import CheckpointError, OpenError
from scarcade.engine.folder import committed, problems
from scarcade.engine.storage import Mirror, is_url, shown
from tests.s3 import s3_server


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_server() as url:
        yield url("atlas")


def test_what_is_a_url() -> None:
    assert is_url("s3://bucket/run")
    assert not is_url(Path("/tmp/run"))
    with pytest.raises(OpenError, match="nonsense://"):
        Mirror("nonsense://x")


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("s3://key:secret@bucket/q.h5ad", "s3://***@bucket/q.h5ad"),
        ("https://lab.org/q.h5ad?X-Amz-Signature=abc&token=def", "https://lab.org/q.h5ad?***"),
        ("s3://bucket/q.h5ad?region=eu", "s3://bucket/q.h5ad?region=eu"),
        ("file:///data/q.h5ad", "file:///data/q.h5ad"),
    ],
)
def test_what_opens_a_store_is_told_to_nobody(url: str, told: str) -> None:
    assert shown(url) == told


def test_a_folder_goes_up_and_comes_back(bucket: str, tmp_path: Path) -> None:
    mirror = Mirror(bucket)
    with committed(tmp_path / "model") as work:
        (work / "a").write_bytes(b"1" * 1000)
        (work / "deep").mkdir()
        (work / "deep" / "b").write_text("2")
    mirror.push(tmp_path / "model", "models/m")
    assert mirror.names("models") == ["m"]
    assert mirror.exists("models/m/MANIFEST.json")
    mirror.pull("models/m", tmp_path / "back")
    assert problems(tmp_path / "back") == []
    assert not mirror.pull_file("models/none", tmp_path / "none")
    mirror.remove_file("models/m/a")
    mirror.remove("models/m")
    assert mirror.names("models") == []
    mirror.remove("models/m")


def checkpoints(bucket: str, folder: Path, said: list[str]) -> Checkpoints:
    return Checkpoints(folder, CheckpointConfig(), about={"data": "d"}, mirror=Mirror(bucket), warn=said.append)


def test_a_run_resumes_on_another_machine(bucket: str, tmp_path: Path) -> None:
    said: list[str] = []
    here = checkpoints(bucket, tmp_path / "here", said)
    for step in (1, 2, 3):
        here.save(step, {"step": step}, {"w": torch.full((10,), float(step))})
    assert Mirror(bucket).names("checkpoints") == ["step-00000002", "step-00000003"]

    found = checkpoints(bucket, tmp_path / "there", said).load()
    assert found is not None
    assert (found[0], float(found[1]["w"][0])) == ({"step": 3}, 3.0)
    assert not said

    # an upload that was cut: the manifest never came
    Mirror(bucket).remove_file("checkpoints/step-00000003/MANIFEST.json")
    found = checkpoints(bucket, tmp_path / "third", said).load()
    assert found is not None
    assert found[0] == {"step": 2}
    assert "step-00000003 is damaged" in said[0]
    Mirror(bucket).remove_file("checkpoints/step-00000002/state.json")
    with pytest.raises(CheckpointError, match="none of the 2"):
        checkpoints(bucket, tmp_path / "fourth", said).load()
