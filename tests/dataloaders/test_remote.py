"""A store in an object store, read as one on the disk: a real S3 server on the loopback."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from scarcade.dataloaders.labelled import with_labelled
from scarcade.dataloaders.loader import LoaderConfig, stream
from scarcade.dataloaders.store import Store, is_store, open_store
from scarcade.dataloaders.synthetic import simulate
from scarcade.engine.errors import CorruptError, MissingChunkError, OpenError, StorageError, UsageError
from scarcade.engine.folder import MANIFEST
from scarcade.engine.storage import Mirror
from tests.dataloaders.made import Made, make
from tests.faulty_proxy import faulty_proxy
from tests.s3 import address_of, checked_keys, s3_server, through

Url = Callable[[str], str]
X = "X/data/c/0"


@pytest.fixture(scope="module")
def server() -> Iterator[Url]:
    with s3_server() as url:
        yield url


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("remote") / "a.zarr", 3000, 50)


@pytest.fixture(scope="module")
def place(server: Url, made: Made) -> str:
    Mirror(server("data")).push(made.store.path, "a.zarr")
    return server("data/a.zarr")


@pytest.fixture
def copy(server: Url, made: Made, tmp_path: Path) -> Iterator[tuple[str, Mirror]]:
    """A store of its own, to be hurt."""
    name = tmp_path.name
    Mirror(server("hurt")).push(made.store.path, name)
    yield server(f"hurt/{name}"), Mirror(server(f"hurt/{name}"))
    Mirror(server("hurt")).remove(name)


def everything(store: Store) -> list[np.ndarray]:
    """All that is in a store, as arrays."""
    proteins = store.proteins(0, store.n_cells)
    assert proteins is not None
    obs = store.obs()
    return [
        *store.read(0, store.n_cells),
        *proteins,
        store.keys(0, store.n_cells),
        store.codes("donor"),
        obs.to_numpy(str),
        obs.index.to_numpy(str),
        store.var().to_numpy(),
    ]


@pytest.mark.parametrize("gb", [1.0, 0.0, 60e-6], ids=["all cached", "nothing cached", "some cached"])
def test_all_that_is_in_it_is_what_is_on_the_disk(made: Made, place: str, tmp_path: Path, gb: float) -> None:
    store = open_store(place, (str(tmp_path), gb))
    assert store.fingerprint == made.store.fingerprint
    assert "3000 cells x 50 genes" in repr(store)
    for there, here in zip(everything(store), everything(made.store), strict=True):
        np.testing.assert_array_equal(there, here)
    truth = store.truth()
    assert truth is not None
    np.testing.assert_array_equal(truth["theta"], [0.0, 1.0, 2.0])
    assert store.verify() == []
    assert is_store(place)
    assert not is_store(place.replace("a.zarr", "none"))
    with pytest.raises(UsageError, match="not a folder of this disk"):
        print(store.path)


@pytest.mark.parametrize("gb", [1.0, 0.0])
def test_batches_are_those_from_the_disk_bit_for_bit(made: Made, place: str, tmp_path: Path, gb: float) -> None:
    config = LoaderConfig(batch_size=64, window=512, validation=0.1)
    loaders = []
    for store in (made.store, open_store(place, (str(tmp_path), gb))):
        main = stream(store, "train", config, seed=5)
        loaders.append(with_labelled(main, config, seed=5))
    n = 0
    for here, there in zip(loaders[0].epoch(1), loaders[1].epoch(1), strict=True):
        pairs = [(here.rows, there.rows), *zip(here.counts.csr(), there.counts.csr(), strict=True)]
        assert here.labelled is not None
        assert there.labelled is not None
        pairs += [(here.labelled.rows, there.labelled.rows)]
        for one, other in pairs:
            np.testing.assert_array_equal(one, other)
        n += len(here)
    assert n == loaders[0].n_cells


def test_what_is_told_ahead_comes_once(server: Url, tmp_path: Path) -> None:
    """A run of many chunks is told in other pieces than it is read in."""
    here = simulate(tmp_path / "a.zarr", cells=8000, genes=800, batches=2, seed=0)
    assert here.x_data.n_chunks > 16
    folders = [tmp_path / "a.zarr" / "X" / name / "c" for name in ("data", "indices")]
    wanted = sum(path.stat().st_size for folder in folders for path in folder.iterdir())
    Mirror(server("told")).push(here.path, "a.zarr")
    config = LoaderConfig(batch_size=64)
    with faulty_proxy(address_of(server("told")), 0.0) as (proxy, address):
        there = open_store(through(server("told/a.zarr"), address), (None, 0.0))
        loader = stream(there, "all", config, seed=5)
        before = proxy.bytes_out
        for a, b in zip(loader.epoch(0), stream(here, "all", config, seed=5).epoch(0), strict=True):
            for one, other in zip(a.counts.csr(), b.counts.csr(), strict=True):
                np.testing.assert_array_equal(one, other)
        came = proxy.bytes_out - before
        assert wanted <= came < 1.1 * wanted
        assert sum(len(batch) for batch in loader.epoch(1)) == 8000
        assert proxy.bytes_out - before == came  # the cells are kept


def test_a_second_reader_asks_the_store_for_no_shard(place: str, tmp_path: Path) -> None:
    with faulty_proxy(address_of(place), 0.0) as (proxy, address):
        url = through(place, address)
        first = open_store(url, (str(tmp_path), 1.0))
        first.read(0, first.n_cells)
        first.obs()
        read = proxy.bytes_out
        second = open_store(url, (str(tmp_path), 1.0))
        second.read(0, second.n_cells)
        second.obs()
        assert proxy.bytes_out - read < read / 4  # the manifest, and a list of the files


def test_without_a_cache_only_what_is_needed_comes(made: Made, place: str) -> None:
    with faulty_proxy(address_of(place), 0.0) as (proxy, address):
        store = open_store(through(place, address), (None, 0.0))
        before = proxy.bytes_out
        store.x_data.rows(0, 10)
        shard = (made.store.path / X).stat().st_size
        assert proxy.bytes_out - before <= shard + 5000


def test_a_cache_keeps_to_its_budget(place: str, made: Made, tmp_path: Path) -> None:
    budget = 60_000
    store = open_store(place, (str(tmp_path), budget / 1e9))
    everything(store)
    held = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert 0 < held <= budget
    assert held < sum(path.stat().st_size for path in made.store.path.rglob("*") if path.is_file())


def test_what_was_not_used_for_longest_makes_room(server: Url, tmp_path: Path) -> None:
    stores = []
    for seed in (1, 2):
        made = make(tmp_path / f"{seed}.zarr", 1000, 30, seed=seed)
        Mirror(server("two")).push(made.store.path, f"{seed}.zarr")
        stores.append(server(f"two/{seed}.zarr"))
    size = sum(path.stat().st_size for path in (tmp_path / "1.zarr").rglob("*") if path.is_file())
    cache = tmp_path / "cache"
    budget = (str(cache), 1.2 * size / 1e9)
    everything(open_store(stores[0], budget))
    for path in cache.iterdir():
        os.utime(path, (0, 0))  # long ago
    first = {path.name for path in cache.iterdir()}
    everything(open_store(stores[1], budget))
    left = {path.name for path in cache.iterdir()}
    assert first - left
    assert sum(path.stat().st_size for path in cache.iterdir()) <= 1.2 * size
    everything(open_store(stores[0], budget))  # and comes again


@pytest.mark.parametrize("gb", [1.0, 0.0])
def test_a_flipped_byte_in_the_bucket_is_found(copy: tuple[str, Mirror], made: Made, tmp_path: Path, gb: float) -> None:
    url, mirror = copy
    content = bytearray((made.store.path / X).read_bytes())
    content[len(content) // 3] ^= 4
    (tmp_path / "flipped").write_bytes(content)
    mirror.push_file(tmp_path / "flipped", X)
    store = open_store(url, (str(tmp_path / "cache"), gb))
    with pytest.raises(CorruptError, match=X):
        store.read(0, store.n_cells)
    assert store.verify() == [f"{X}: its content is not what was written"]
    assert not list((tmp_path / "cache").glob("*.part"))


def test_a_missing_or_cut_shard_is_told_when_the_store_is_opened(
    copy: tuple[str, Mirror], made: Made, tmp_path: Path
) -> None:
    url, mirror = copy
    (tmp_path / "cut").write_bytes((made.store.path / X).read_bytes()[:-7])
    mirror.push_file(tmp_path / "cut", X)
    with pytest.raises(CorruptError, match=f"{X}: .* bytes where .* were written"):
        open_store(url, (None, 0))
    mirror.remove_file(X)
    with pytest.raises(MissingChunkError, match=f"{X}: missing"):
        open_store(url, (None, 0))
    store_opened_before = copy[1]
    store_opened_before.remove_file(MANIFEST)
    with pytest.raises(OpenError, match="there is no store"):
        open_store(url, (None, 0))


def test_a_shard_that_goes_while_it_is_read_is_missing_and_not_zeros(copy: tuple[str, Mirror], tmp_path: Path) -> None:
    url, mirror = copy
    store = open_store(url, (str(tmp_path / "cache"), 1.0))
    mirror.remove_file("X/indices/c/0")
    key = store._manifest["files"]["X/indices/c/0"]["sha256"]
    (tmp_path / "cache" / key).unlink(missing_ok=True)
    with pytest.raises(MissingChunkError, match="X/indices/c/0 is missing"):
        store.read(0, 10)


def test_a_damaged_cache_is_told_by_the_chunks_checksum(place: str, made: Made, tmp_path: Path) -> None:
    store = open_store(place, (str(tmp_path), 1.0))
    store.read(0, 10)
    cached = tmp_path / store._manifest["files"][X]["sha256"]
    content = bytearray(cached.read_bytes())
    content[100] ^= 1
    cached.write_bytes(content)
    with pytest.raises(CorruptError, match=r"X/data: chunk 0 .*crc32c"):
        store.read(0, store.n_cells)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda url: url.replace("s3://bucket", "s3://buckett"), OpenError, "there is no such bucket"),
        (lambda url: url.replace("a.zarr", "b.zarr"), OpenError, "there is no store"),
        (lambda url: through(url, "http://127.0.0.1:9"), StorageError, "did not answer .*endpoint_override"),
        (lambda url: "s4://bucket/a.zarr", OpenError, "not a URL of a store"),
    ],
)
def test_what_cannot_be_reached_is_one_error_within_seconds(
    place: str, change: Callable[[str], str], kind: type[Exception], message: str
) -> None:
    began = time.monotonic()
    with pytest.raises(kind, match=message):
        open_store(change(place))
    assert time.monotonic() - began < 10


def test_a_wrong_key_is_told_at_once(place: str) -> None:
    began = time.monotonic()
    with checked_keys(place), pytest.raises(StorageError, match="AWS_ACCESS_KEY_ID"):
        open_store(place)
    assert time.monotonic() - began < 10


def test_a_store_that_always_fails_is_given_up_within_seconds(place: str) -> None:
    began = time.monotonic()
    with (
        faulty_proxy(address_of(place), 1.0) as (_, address),
        pytest.raises(StorageError, match="did not answer after"),
    ):
        open_store(through(place, address))
    assert time.monotonic() - began < 10


def test_a_cache_that_cannot_be_written_names_the_option(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StorageError, match=r"--data\.cache"):
        open_store(place, (str(tmp_path / "file"), 1.0))
