"""Hundreds of damaged files and stores: each is one of our errors or a read that holds, and the process lives on."""

import json
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from scarcade.dataloaders.ingest import ingest
from tests.dataloaders.files import adata, quiet, written

PER_KIND = 50


class Child:
    """A process that reads what it is told to; `ask` fails if it does not live to answer."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.faults.child"]
        root = Path(__file__).parents[2]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root)

    def ask(self, path: Path, what: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{path}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the process died of {what}: {self._process.wait()}"
        told: dict[str, Any] = json.loads(line)
        assert "bug" not in told, f"{what}: {told['bug']}"
        return told

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        assert self._process.wait() == 0


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    one = Child()
    yield one
    one.close()


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("originals")
    data = adata(40, 15)
    out = {"csr.h5ad": written(data, folder / "csr.h5ad"), "v2.zarr": written(data, folder / "v2.zarr", version=2)}
    out["v3.zarr"] = written(data, folder / "v3.zarr", version=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out["store.zarr"] = ingest(out["csr.h5ad"], folder / "store.zarr", batch_key="batch", report=quiet).path
    data.X = data.X.tocsc()
    out["csc.h5ad"] = written(data, folder / "csc.h5ad")
    data.X = data.X.toarray()
    out["dense.h5ad"] = written(data, folder / "dense.h5ad")
    return out


def flip(content: bytearray, rng: np.random.Generator) -> None:
    for _ in range(int(rng.integers(1, 9))):
        content[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))


def cut(content: bytearray, rng: np.random.Generator) -> None:
    del content[int(rng.integers(len(content))) :]


def blank(content: bytearray, rng: np.random.Generator) -> None:
    start = int(rng.integers(len(content)))
    stop = min(len(content), start + int(rng.integers(1, 2000)))
    content[start:stop] = bytes([int(rng.choice([0, 255]))]) * (stop - start)


def splice(content: bytearray, rng: np.random.Generator) -> None:
    start, stop = sorted(int(i) for i in rng.integers(len(content), size=2))
    content[:] = content[:start] + content[stop:]


def digits(content: bytearray, rng: np.random.Generator) -> None:
    """Another number in the metadata, if the file is text; else a flip."""
    places = [i for i, byte in enumerate(content) if chr(byte).isdigit()]
    if not places or content[:1] != b"{":
        return flip(content, rng)
    at = places[int(rng.integers(len(places)))]
    content[at : at + 1] = str(int(rng.choice([0, 7, 10**6, 10**13, 10**30]))).encode()
    return None


DAMAGE: list[Callable[[bytearray, np.random.Generator], None]] = [flip, cut, blank, splice, digits]


def damaged(original: Path, target: Path, rng: np.random.Generator) -> str:
    """A copy of `original` at `target` with one thing wrong with it; what that is."""
    if original.is_file():
        shutil.copy(original, target)
        victim = target
    else:
        shutil.copytree(original, target)
        files = sorted(p for p in target.rglob("*") if p.is_file())
        victim = files[int(rng.integers(len(files)))]
        if rng.random() < 0.15:
            victim.unlink()
            return f"no {victim.relative_to(target)}"
    content = bytearray(victim.read_bytes())
    how = DAMAGE[int(rng.integers(len(DAMAGE)))]
    if content:
        how(content, rng)
    victim.write_bytes(content)
    return f"{how.__name__} {victim.relative_to(target.parent)}"


@pytest.mark.long
@pytest.mark.parametrize("kind", ["csr.h5ad", "csc.h5ad", "dense.h5ad", "v2.zarr", "v3.zarr", "store.zarr"])
def test_damaged_bytes(child: Child, originals: dict[str, Path], tmp_path: Path, kind: str) -> None:
    whole = child.ask(originals[kind], kind)["ok"]
    seen: Counter[str] = Counter()
    for seed in range(PER_KIND):
        target = tmp_path / (f"store{seed}.zarr" if kind.startswith("store") else f"{seed}-{kind}")
        what = damaged(originals[kind], target, np.random.default_rng([seed, len(kind), ord(kind[-6])]))
        told = child.ask(target, f"{kind} {seed}: {what}")
        seen[str(told.get("error", "read"))] += 1
        if kind == "store.zarr" and "ok" in told:  # foreign files carry no checksums; ours do
            assert told["ok"] == whole, what
    assert sum(seen.values()) == PER_KIND
    assert len(seen) > 1


def structure(rng: np.random.Generator) -> tuple[str, str, Any]:
    """(array, what was done, function of the array) that breaks CSR or counts."""
    big = [-1, 10**6, 2**31 - 1, -(2**31), 15, 2**30]
    part = str(rng.choice(["indptr", "indices", "data"]))

    def change(values: np.ndarray) -> np.ndarray:
        values = values.copy()
        for _ in range(int(rng.integers(1, 4))):
            bad = rng.choice([np.nan, np.inf, -1, 0.5, 1e30]) if part == "data" else rng.choice(big)
            values[int(rng.integers(len(values)))] = bad
        return values

    def shorter(values: np.ndarray) -> np.ndarray:
        return values[: int(rng.integers(len(values)))]

    def longer(values: np.ndarray) -> np.ndarray:
        return np.concatenate([values, values[: int(rng.integers(1, len(values)))]])

    def otherwise(values: np.ndarray) -> np.ndarray:
        return rng.permutation(values)

    def kind(values: np.ndarray) -> np.ndarray:
        return values.astype(rng.choice(["f4", "i1", "S3", "u8", "c8", "?"]))

    def axes(values: np.ndarray) -> np.ndarray:
        return values[None]

    how = [change, change, change, shorter, longer, otherwise, kind, axes][int(rng.integers(8))]
    return part, how.__name__, how


@pytest.mark.parametrize("kind", ["csr.h5ad", "csc.h5ad"])
def test_broken_structure(child: Child, originals: dict[str, Path], tmp_path: Path, kind: str) -> None:
    seen: Counter[str] = Counter()
    for seed in range(PER_KIND * 2):
        rng = np.random.default_rng([seed, 7])
        target = tmp_path / f"{seed}-{kind}"
        shutil.copy(originals[kind], target)
        part, what, how = structure(rng)
        with h5py.File(target, "r+") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values = how(file["X"][part][:])
            del file["X"][part]
            file["X"][part] = values
        told = child.ask(target, f"{kind} {seed}: {what} {part}")
        seen[str(told.get("error", "read"))] += 1
        if what in {"shorter", "longer", "axes"}:
            assert told.get("error") in {"E_CSR", "E_OPEN"}, (what, part, told)
        if what == "change" and part == "data":
            assert told.get("error") == "E_COUNTS"
    assert seen["E_CSR"] > 20
    assert seen["E_COUNTS"] > 5
