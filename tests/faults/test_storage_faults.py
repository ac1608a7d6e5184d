"""Training from and to an object store that fails: to the weights that a disk gives, bit for bit."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from scarcade.dataloaders.store import Store, open_store
from scarcade.dataloaders.synthetic import simulate
from scarcade.engine.storage import Mirror
from scarcade.jobs.train import train
from tests.faulty_proxy import faulty_proxy
from tests.s3 import address_of, s3_server, through

Url = Callable[[str], str]
SETTINGS: dict[str, Any] = {
    "model": {"n_hidden": 8, "n_latent": 4},
    "optim": {"epochs": 2, "log_every": 2},
    "scale": {"threads": 1},
    "data": {"batch_size": 64, "window": 512},
    "checkpoint": {"every_steps": 20, "every_seconds": None},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return simulate(tmp_path_factory.mktemp("faults") / "a.zarr", cells=2_000, genes=60, labels=3, seed=4)


@pytest.fixture(scope="module")
def server(store: Store) -> Iterator[Url]:
    with s3_server() as url:
        Mirror(url("data")).push(store.path, "a.zarr")
        yield url


@pytest.fixture(scope="module")
def wanted(store: Store, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    out = tmp_path_factory.mktemp("disk") / "run"
    train(store, out=out, settings=SETTINGS, progress=_silent)
    return weights(str(out))


def _silent(_: Any) -> None:
    pass


def weights(out: str) -> bytes:
    """The file of the weights that a run left, on the disk or at a URL."""
    if "://" not in out:
        return (Path(out) / "model" / "model.safetensors").read_bytes()
    return Mirror(out).content("model/model.safetensors", 1 << 20)


def settings(**data: Any) -> dict[str, Any]:
    return {**SETTINGS, "data": {**SETTINGS["data"], **data}}


@pytest.mark.long
@pytest.mark.parametrize(
    ("share", "gb"),
    [
        (0.0, 1.0),
        (0.3, 1.0),
        pytest.param(0.01, 0.0, marks=pytest.mark.slow),
        pytest.param(0.1, 0.0, marks=pytest.mark.slow),
        pytest.param(0.3, 0.0, marks=pytest.mark.slow),
    ],
)
def test_data_and_run_in_a_store_that_fails_give_the_weights_of_the_disk(
    server: Url, wanted: bytes, tmp_path: Path, share: float, gb: float
) -> None:
    with faulty_proxy(address_of(server("")), share, seed=7) as (proxy, address):
        out = server(f"runs/{share}-{gb}")
        own = settings(cache=str(tmp_path), cache_gb=gb)
        train(through(server("data/a.zarr"), address), out=through(out, address), settings=own, progress=_silent)
        assert proxy.failed >= share * sum(proxy.seen.values()) / 3
        if share >= 0.1:
            assert set(proxy.seen) == {"busy", "throttled", "reset", "cut", "passed"}
    assert weights(out) == wanted


@pytest.mark.slow
def test_two_workers_of_ray_share_the_cache(server: Url, store: Store, tmp_path: Path) -> None:
    """Their credentials are those of the process that started Ray; each shard is fetched once for both."""
    data = settings(cache=str(tmp_path / "cache"), cache_gb=1.0)
    both: dict[str, Any] = {**data, "scale": {"workers": 2, "threads": 1}}
    train(store, out=tmp_path / "disk", settings=both, progress=_silent)
    with faulty_proxy(address_of(server("")), 0.0) as (proxy, address):
        train(through(server("data/a.zarr"), address), out=tmp_path / "s3", settings=both, progress=_silent)
        assert proxy.paths
        twice = [path for path, n in proxy.paths.items() if n > 1 and "/c/" in path]
        assert not twice
    assert weights(str(tmp_path / "s3")) == weights(str(tmp_path / "disk"))


READER = """
import json, sys
from scarcade.dataloaders.store import open_store
url, folder = json.loads(sys.argv[1])
store = open_store(url, (folder, 1.0))
print(int(store.read(0, store.n_cells)[2].sum()), flush=True)
"""


def reader(url: str, folder: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", READER, json.dumps([url, str(folder)])]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_that_want_one_shard_at_once_fetch_it_once(server: Url, store: Store, tmp_path: Path) -> None:
    total = int(store.read(0, store.n_cells)[2].sum())
    with faulty_proxy(address_of(server("")), 0.1) as (proxy, address):
        readers = [reader(through(server("data/a.zarr"), address), tmp_path) for _ in range(2)]
        for one in readers:
            said, errors = one.communicate(timeout=120)
            assert one.returncode == 0, errors
            assert int(said) == total
    assert not list(tmp_path.glob("*.part"))
    assert proxy.failed


def test_a_killed_fetch_leaves_what_the_next_one_takes_over(server: Url, store: Store, tmp_path: Path) -> None:
    with faulty_proxy(address_of(server("")), 0.0, delay_s=0.3) as (proxy, address):
        url = through(server("data/a.zarr"), address)
        one = reader(url, tmp_path)
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("*.part")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        one.send_signal(signal.SIGKILL)
        one.communicate()
        assert list(tmp_path.glob("*.part"))
        proxy.delay_s = 0.0
        again = open_store(url, (str(tmp_path), 1.0))
        assert again.read(0, again.n_cells)[2].sum() == store.read(0, store.n_cells)[2].sum()
        again.obs()
        again.verify()
    assert not list(tmp_path.glob("*.part"))
