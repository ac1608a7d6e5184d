"""The hash of a file of cells, and what is remembered of files that were looked through."""

import os
from pathlib import Path

import anndata as ad
import numpy as np
import pytest

from scarcade.dataloaders.content import content_hash, stamp
from scarcade.dataloaders.source import AnnDataFile
from scarcade.engine.errors import OpenError
from tests.dataloaders.files import written


def test_a_hash_is_of_the_bytes_whatever_they_claim_to_be(tmp_path: Path) -> None:
    (tmp_path / "a.h5ad").write_bytes(b"no HDF5 at all")
    (tmp_path / "b.h5ad").write_bytes(b"no HDF5 at all")
    assert content_hash(tmp_path / "a.h5ad") == content_hash(tmp_path / "b.h5ad")
    assert content_hash(tmp_path / "a.h5ad")[0] == 14


def test_what_is_neither_a_file_nor_a_folder_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.h5ad")
    for place, reason in ((tmp_path / "pipe.h5ad", "neither a file"), (tmp_path / "none.h5ad", "no such file")):
        with pytest.raises(OpenError, match=reason):
            content_hash(place)
    with pytest.raises(OpenError, match="neither a file"):
        AnnDataFile(tmp_path / "pipe.h5ad")


def test_a_link_that_leaves_a_folder_is_not_hashed(tmp_path: Path) -> None:
    written(ad.AnnData(np.ones((3, 2), np.float32)), tmp_path / "q.zarr", version=3)
    before = content_hash(tmp_path / "q.zarr")
    os.symlink("/etc/hostname", tmp_path / "q.zarr" / "X" / "more")
    with pytest.raises(OpenError, match="leaves the folder"):
        content_hash(tmp_path / "q.zarr")
    (tmp_path / "q.zarr" / "X" / "more").unlink()
    (tmp_path / "q.zarr" / "X" / "more").write_bytes(b"x")
    assert content_hash(tmp_path / "q.zarr") != before


def test_a_file_that_was_in_order_is_looked_through_again_once_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "q.h5ad"
    ad.AnnData(np.ones((300, 20), np.float32)).write_h5ad(path)
    AnnDataFile(path).close()
    before = stamp(path)
    content = bytearray(path.read_bytes())
    place = content.index(b"HEAP") + 8  # the size of a heap of names: of size zero, HDF5 walks it for ever
    content[place : place + 24] = bytes(24)
    path.write_bytes(bytes(content))
    assert stamp(path) != before
    with pytest.raises(OpenError):
        AnnDataFile(path)
