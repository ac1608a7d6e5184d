import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from scarcade.engine.checkpoint import CheckpointConfig, Checkpoints
from scarcade.engine.errors import CheckpointError, DataChangedError
from scarcade.engine.loop import fit
from scarcade.engine.optim import OptimConfig
from tests.engine.toy import ToyLoader, ToyModel, digest


def made(folder: Path, said: list[str] | None = None, *, data: str = "d", max_failures: int = 3) -> Checkpoints:
    return Checkpoints(
        folder,
        CheckpointConfig(every_steps=3, every_seconds=None, max_failures=max_failures),
        about={"data": data},
        warn=(said if said is not None else []).append,
    )


def save(checkpoints: Checkpoints, step: int) -> None:
    checkpoints.save(step, {"step": step}, {"w": torch.full((1000,), float(step))})


def test_the_newest_two_are_kept_and_the_newest_is_loaded(tmp_path: Path) -> None:
    checkpoints = made(tmp_path)
    for step in (3, 6, 9):
        save(checkpoints, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000006", "step-00000009"]
    found = checkpoints.load()
    assert found is not None
    assert found[0] == {"step": 9}
    assert torch.equal(found[1]["w"], torch.full((1000,), 9.0))


def test_nothing_there_is_no_checkpoint(tmp_path: Path) -> None:
    assert made(tmp_path / "none").load() is None


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "manifest"])
def test_a_damaged_one_is_warned_of_and_the_one_before_is_used(tmp_path: Path, damage: str) -> None:
    said: list[str] = []
    checkpoints = made(tmp_path, said)
    for step in (3, 6):
        save(checkpoints, step)
    newest = tmp_path / "step-00000006"
    tensors = newest / "state.safetensors"
    if damage == "flip":
        content = bytearray(tensors.read_bytes())
        content[-7] ^= 1
        tensors.write_bytes(content)
    elif damage == "cut":
        os.truncate(tensors, 100)
    elif damage == "missing":
        tensors.unlink()
    else:
        (newest / "MANIFEST.json").unlink()
    found = checkpoints.load()
    assert found is not None
    assert found[0] == {"step": 3}
    assert "step-00000006 is damaged" in said[0]
    for step in (3, 6):
        (tmp_path / f"step-{step:08d}" / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints is intact"):
        checkpoints.load()


def test_other_data_are_refused(tmp_path: Path) -> None:
    save(made(tmp_path), 3)
    with pytest.raises(DataChangedError, match="began with other data"):
        made(tmp_path, data="e").load()


@contextmanager
def no_file_larger_than(n: int) -> Iterator[None]:
    """A disk that is full, as the operating system has it: writes beyond `n` bytes fail."""
    import signal

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_warned_of_and_borne_and_then_ends_the_run(tmp_path: Path) -> None:
    said: list[str] = []
    checkpoints = made(tmp_path, said, max_failures=2)
    save(checkpoints, 3)
    with no_file_larger_than(1000):
        save(checkpoints, 6)
        assert "step 6 could not be written" in said[0]
        assert os.strerror(errno.EFBIG) in said[0]
        with pytest.raises(CheckpointError, match="2 checkpoints in a row"):
            save(checkpoints, 9)
    found = checkpoints.load()
    assert found is not None
    assert found[0] == {"step": 3}
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]
    save(checkpoints, 9)


def test_training_on_a_full_disk_reaches_its_end(tmp_path: Path) -> None:
    said: list[str] = []
    whole, model = ToyModel(), ToyModel()
    fit(whole, ToyLoader(), None, OptimConfig(epochs=2))
    with no_file_larger_than(1000):
        fit(model, ToyLoader(), None, OptimConfig(epochs=2), checkpoints=made(tmp_path, said, max_failures=9))
    assert digest(model) == digest(whole)
    assert len(said) == 5  # steps 3, 6, 9, 12 and the end


@pytest.mark.parametrize("new_step", [2, 3])
def test_killed_at_every_file_operation_of_a_commit_one_checkpoint_is_left(tmp_path: Path, new_step: int) -> None:
    script = Path(__file__).with_name("commit_killer.py")
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script), str(tmp_path), str(new_step)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
    rounds = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rounds) > 10
    assert [r["ended"] for r in rounds] == [77] * (len(rounds) - 1) + [0]
    assert {r["stamp"] for r in rounds} == {2, 3}  # the one before or the new one
    assert rounds[-1]["stamp"] == 3
    assert all(r["left"] == [] for r in rounds)


def test_a_run_resumes_from_the_disk_with_the_same_bits(tmp_path: Path) -> None:
    whole = ToyModel()
    fit(whole, ToyLoader(), None, OptimConfig(epochs=3))
    asked = iter([False] * 10 + [True])
    part = ToyModel()
    fit(part, ToyLoader(), None, OptimConfig(epochs=3), checkpoints=made(tmp_path), stop=lambda: next(asked))
    again = ToyModel(seed=4)
    fit(again, ToyLoader(), None, OptimConfig(epochs=3), checkpoints=made(tmp_path))
    assert digest(again) == digest(whole)
