"""A latent on disk: what is written is read, by us and by anndata, and damage is seen."""

from pathlib import Path

import anndata as ad
import numpy as np
import pytest

from scarcade.engine.errors import CategoryError, CorruptError, MissingChunkError, OpenError, StorageError
from scarcade.engine.schema import Categories
from scarcade.jobs.latent import latent_arrays, latent_writer, read_latent

BATCH, TYPE = Categories("batch", ("one", "two")), Categories("cell_type", ("B", "T"))


def written(path: Path, n: int = 500) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    mean = rng.normal(size=(n, 7)).astype(np.float32)
    codes = rng.integers(-1, 2, n)
    with latent_writer(path, obsm_key="X_scVI", columns=[BATCH, TYPE], about={"model": "abc"}) as writer:
        for start in range(0, n, 123):
            part = slice(start, start + 123)
            arrays = latent_arrays("X_scVI", mean[part], mean[part] ** 2)
            writer.append(arrays, [np.abs(codes[part]), codes[part]])
    return mean, codes


def test_what_is_written_is_read(tmp_path: Path) -> None:
    mean, codes = written(tmp_path / "latent.zarr")
    latent = read_latent(tmp_path / "latent.zarr")
    np.testing.assert_array_equal(latent.mean, mean)
    np.testing.assert_array_equal(latent.variance, mean**2)
    assert latent.about == {"model": "abc"}
    assert latent.obsm_key == "X_scVI"
    column = latent.column("cell_type")
    assert column is not None
    assert column[0] == TYPE
    np.testing.assert_array_equal(column[1], codes)
    assert latent.column("other") is None


def test_anndata_opens_it(tmp_path: Path) -> None:
    mean, codes = written(tmp_path / "latent.zarr")
    adata = ad.read_zarr(tmp_path / "latent.zarr")
    assert adata.shape == (500, 0)
    np.testing.assert_array_equal(adata.obsm["X_scVI"], mean)
    np.testing.assert_array_equal(adata.obs["cell_type"].cat.codes, codes)
    assert list(adata.obs["batch"].cat.categories) == ["one", "two"]
    assert adata.obs_names[3] == "3"


def test_no_cells_are_a_latent_too(tmp_path: Path) -> None:
    with latent_writer(tmp_path / "l.zarr", obsm_key="X_scVI", columns=[BATCH], about={}):
        pass
    assert len(read_latent(tmp_path / "l.zarr")) == 0
    assert ad.read_zarr(tmp_path / "l.zarr").n_obs == 0


def test_damage_is_seen(tmp_path: Path) -> None:
    written(tmp_path / "latent.zarr")
    shard = tmp_path / "latent.zarr" / "obsm" / "X_scVI" / "c" / "0" / "0"
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CorruptError):
        read_latent(tmp_path / "latent.zarr")
    shard.unlink()
    with pytest.raises(MissingChunkError):
        read_latent(tmp_path / "latent.zarr")


def test_what_is_no_latent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OpenError, match="no such folder"):
        read_latent(tmp_path / "none.zarr")
    with pytest.raises(OpenError, match="MANIFEST"):
        read_latent(tmp_path)


def test_nothing_is_left_of_a_write_that_failed(tmp_path: Path) -> None:
    def fails() -> None:
        with latent_writer(tmp_path / "l.zarr", obsm_key="X_scVI", columns=[], about={}) as writer:
            writer.append(latent_arrays("X_scVI", *np.zeros((2, 3, 2), np.float32)), [])
            raise RuntimeError("the model failed")

    with pytest.raises(RuntimeError):
        fails()
    assert list(tmp_path.iterdir()) == []
    written(tmp_path / "l.zarr")
    with pytest.raises(StorageError, match="exists"):
        written(tmp_path / "l.zarr")


def test_a_columns_name_does_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    with pytest.raises(CategoryError, match="not a name"):
        latent_writer(tmp_path / "l.zarr", obsm_key="X_scVI", columns=[Categories("../x", ("a",))], about={})
