from pathlib import Path

import numpy as np
import pytest
import zarr

from scarcade.dataloaders import array_layout
from scarcade.dataloaders.array_reader import ArrayReader, StringReader
from scarcade.dataloaders.array_writer import ArrayWriter, StringWriter
from scarcade.dataloaders.stored_files import LocalFiles
from scarcade.engine.errors import CorruptError, CsrError, LimitError, MissingChunkError, OpenError
from scarcade.engine.folder import MANIFEST, read_manifest, write_json, write_manifest


def written(folder: Path, values: np.ndarray, chunk_rows: int, pieces: int = 3) -> Path:
    writer = ArrayWriter(
        folder / "x", values.dtype, width=values.shape[1] if values.ndim == 2 else None, chunk_rows=chunk_rows
    )
    for piece in np.array_split(values, pieces):
        writer.append(piece)
    writer.close()
    write_manifest(folder, {})
    return folder


def reader(folder: Path) -> ArrayReader:
    return ArrayReader(LocalFiles(folder), "x", read_manifest(folder))


@pytest.mark.parametrize(
    "dtype", ["uint8", "uint16", "uint32", "uint64", "int8", "int32", "float32", "float64", "bool"]
)
def test_what_was_written_is_read_by_us_and_by_zarr(tmp_path: Path, dtype: str) -> None:
    values = np.random.default_rng(0).integers(0, 200, 5001).astype(dtype)
    written(tmp_path, values, chunk_rows=10)  # two shards
    ours = reader(tmp_path)
    assert np.array_equal(ours.rows(0, 5001), values)
    assert np.array_equal(ours.rows(2555, 2571), values[2555:2571])  # over the edge of a shard
    assert np.array_equal(np.concatenate(list(ours.pieces(999))), values)
    assert len(ours.rows(7, 7)) == 0
    theirs = zarr.open_array(tmp_path / "x", mode="r")
    assert theirs.dtype == values.dtype
    assert np.array_equal(np.asarray(theirs[:]), values)


def test_rows_of_a_matrix(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((100, 3)).astype(np.float32)
    written(tmp_path, values, chunk_rows=7)
    assert np.array_equal(reader(tmp_path).rows(13, 99), values[13:99])
    assert np.array_equal(np.asarray(zarr.open_array(tmp_path / "x", mode="r")[:]), values)


def test_an_array_without_rows(tmp_path: Path) -> None:
    written(tmp_path, np.zeros(0, np.uint16), chunk_rows=7, pieces=1)
    assert reader(tmp_path).rows(0, 0).shape == (0,)
    assert zarr.open_array(tmp_path / "x", mode="r").shape == (0,)


def test_strings(tmp_path: Path) -> None:
    names = [f"cell {i} né" for i in range(25)]
    writer = StringWriter(tmp_path / "s", chunk=10)
    writer.append(names[:13])
    writer.append(names[13:])
    writer.close()
    write_manifest(tmp_path, {})
    ours = StringReader(LocalFiles(tmp_path), "s", read_manifest(tmp_path))
    assert ours.rows(8, 23).tolist() == names[8:23]
    assert list(zarr.open_array(tmp_path / "s", mode="r")[:]) == names  # type: ignore[arg-type]


def test_every_flipped_byte_of_a_shard_is_found(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 9, 300).astype(np.uint16)
    written(tmp_path, values, chunk_rows=100)
    shard = tmp_path / "x" / "c" / "0"
    good = shard.read_bytes()
    missed = []
    index = len(good) - 4100
    for at in [*range(index), *range(index, len(good) - 4, 13), *range(len(good) - 4, len(good))]:
        shard.write_bytes(good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1 :])
        try:
            reader(tmp_path).rows(0, 300)
        except CorruptError:
            continue
        missed.append(at)
    assert missed == []


@pytest.mark.parametrize("keep", [0, 1, 50, -4100, -1])
def test_a_cut_shard_is_found(tmp_path: Path, keep: int) -> None:
    written(tmp_path, np.arange(300, dtype=np.uint16), chunk_rows=100)
    shard = tmp_path / "x" / "c" / "0"
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(CorruptError, match=str(tmp_path)):
        reader(tmp_path).rows(0, 300)


def test_a_file_that_is_cut_while_it_is_read(tmp_path: Path) -> None:
    written(tmp_path, np.arange(3000, dtype=np.uint16), chunk_rows=100)
    ours = reader(tmp_path)
    ours.rows(0, 1)
    (tmp_path / "x" / "c" / "0").write_bytes(b"")
    with pytest.raises(CorruptError, match="was cut: it ends at byte"):
        ours.rows(0, 3000)


def test_a_missing_shard_is_found(tmp_path: Path) -> None:
    written(tmp_path, np.arange(300, dtype=np.uint16), chunk_rows=1)
    (tmp_path / "x" / "c" / "1").unlink()
    ours = reader(tmp_path)
    assert ours.rows(0, 256).tolist() == list(range(256))
    with pytest.raises(MissingChunkError, match="x/c/1 is missing"):
        ours.rows(256, 300)


def test_a_shard_that_the_manifest_does_not_know(tmp_path: Path) -> None:
    written(tmp_path, np.arange(300, dtype=np.uint16), chunk_rows=1)
    manifest = read_manifest(tmp_path)
    del manifest["files"]["x/c/1"]
    with pytest.raises(MissingChunkError, match="x/c/1 is not in the manifest"):
        ArrayReader(LocalFiles(tmp_path), "x", manifest)


def test_a_chunk_that_the_index_calls_missing(tmp_path: Path) -> None:
    """Zarr reads such a chunk as zeros."""
    values = np.arange(1, 301, dtype=np.uint16)
    written(tmp_path, values, chunk_rows=100)
    shard = tmp_path / "x" / "c" / "0"
    index = np.frombuffer(shard.read_bytes()[-4100:-4], "<u8").reshape(-1, 2).copy()
    index[1] = 2**64 - 1
    shard.write_bytes(shard.read_bytes()[:-4100] + array_layout.seal(index.tobytes()))
    assert not np.asarray(zarr.open_array(tmp_path / "x", mode="r")[100:200]).any()
    with pytest.raises(MissingChunkError, match="x: chunk 1 is missing in x/c/0"):
        reader(tmp_path).rows(0, 300)


def hostile_index(folder: Path, index: list[list[int]]) -> None:
    shard = folder / "x" / "c" / "0"
    table = np.frombuffer(shard.read_bytes()[-4100:-4], "<u8").reshape(-1, 2).copy()
    table[: len(index)] = index
    shard.write_bytes(shard.read_bytes()[:-4100] + array_layout.seal(table.tobytes()))


@pytest.mark.parametrize("entry", [[0, 1 << 40], [1 << 63, 8], [1 << 40, 8], [0, 0], [3, 40]])
def test_a_hostile_index_with_a_good_checksum(tmp_path: Path, entry: list[int]) -> None:
    written(tmp_path, np.arange(300, dtype=np.uint16), chunk_rows=100)
    hostile_index(tmp_path, [entry])
    with pytest.raises(CorruptError):
        reader(tmp_path).rows(0, 300)


def test_chunks_in_another_order_in_the_file(tmp_path: Path) -> None:
    """Our writer keeps them in order; the reader does not depend on it."""
    values = np.arange(300, dtype=np.uint16)
    written(tmp_path, values, chunk_rows=100)
    shard = tmp_path / "x" / "c" / "0"
    raw = shard.read_bytes()
    index = np.frombuffer(raw[-4100:-4], "<u8").reshape(-1, 2).astype(int)[:3]
    parts = [raw[a : a + n] for a, n in index]
    body = parts[2] + parts[0] + parts[1]
    table = np.full((256, 2), 2**64 - 1, "<u8")
    table[:3] = [[len(parts[2]), len(parts[0])], [len(parts[2]) + len(parts[0]), len(parts[1])], [0, len(parts[2])]]
    shard.write_bytes(body + array_layout.seal(table.tobytes()))
    write_manifest(tmp_path, {})
    assert np.array_equal(reader(tmp_path).rows(0, 300), values)


def test_a_hostile_blosc_header_with_a_good_checksum(tmp_path: Path) -> None:
    written(tmp_path, np.arange(100, dtype=np.uint16), chunk_rows=100)
    shard = tmp_path / "x" / "c" / "0"
    raw = shard.read_bytes()
    length = int(np.frombuffer(raw[-4100:-4], "<u8")[1])
    for field, value in ((4, 1 << 30), (4, 16), (12, 1 << 20), (12, 3)):
        body = bytearray(raw[: length - 4])
        body[field : field + 4] = value.to_bytes(4, "little")
        shard.write_bytes(array_layout.seal(bytes(body)) + raw[length:])
        with pytest.raises(CorruptError):
            reader(tmp_path).rows(0, 100)


def test_values_beyond_a_bound(tmp_path: Path) -> None:
    written(tmp_path, np.array([1, 2, 9, 3], np.uint16), chunk_rows=2)
    out = np.empty(2, np.uint16)
    assert list(reader(tmp_path).each(0, 2, out, below=10)) == [0, 1]
    assert out.tolist() == [9, 3]
    with pytest.raises(CsrError, match=r"chunk 1 .* not below the 9 genes"):
        list(reader(tmp_path).each(0, 2, out, below=9))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"crc32c"', '"zstd"'),
        ('"uint16"', '"complex64"'),
        ('"uint16"', '"float128x"'),
        ("100", "0"),
        ('"end"', '"start"'),
        ('"shape"', '"form"'),
        ("{", ""),
    ],
)
def test_metadata_that_is_not_of_our_making(tmp_path: Path, old: str, new: str) -> None:
    written(tmp_path, np.arange(300, dtype=np.uint16), chunk_rows=100)
    meta = tmp_path / "x" / "zarr.json"
    meta.write_text(meta.read_text().replace(old, new, 1))
    write_manifest(tmp_path, {})
    with pytest.raises(CorruptError, match=r"zarr\.json"):
        reader(tmp_path)


def test_a_bomb_is_refused_from_its_metadata(tmp_path: Path) -> None:
    written(tmp_path, np.arange(300, dtype=np.uint16), chunk_rows=100)
    meta = tmp_path / "x" / "zarr.json"
    text = meta.read_text()
    meta.write_text(text.replace("100", str(1 << 40)).replace("25600", str((1 << 40) * 256)))
    write_manifest(tmp_path, {})
    with pytest.raises(LimitError, match="chunks of"):
        reader(tmp_path)
    meta.write_text(text.replace("300", "10000000000000"))
    write_manifest(tmp_path, {})
    with pytest.raises(MissingChunkError, match="not in the manifest"):
        reader(tmp_path)


def test_changed_metadata_is_found(tmp_path: Path) -> None:
    written(tmp_path, np.arange(300, dtype=np.uint16), chunk_rows=100)
    meta = tmp_path / "x" / "zarr.json"
    meta.write_text(meta.read_text().replace("300", "200"))
    with pytest.raises(CorruptError, match=r"x/zarr\.json is not what was written"):
        reader(tmp_path)


def test_a_folder_that_is_replaced_is_still_the_old_one(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    written(old, np.zeros(300, np.uint16), chunk_rows=1)
    written(new, np.ones(300, np.uint16), chunk_rows=1)
    ours = reader(old)
    ours.rows(0, 1)
    old.rename(tmp_path / "aside")
    new.rename(old)
    assert not ours.rows(0, 300).any()


def test_not_a_folder(tmp_path: Path) -> None:
    with pytest.raises(OpenError, match="nothing"):
        LocalFiles(tmp_path / "nothing")


def test_rows_of_another_type_are_a_bug(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        ArrayWriter(tmp_path / "x", np.uint16).append(np.zeros(3))


def test_a_manifest_with_other_sizes(tmp_path: Path) -> None:
    written(tmp_path, np.arange(300, dtype=np.uint16), chunk_rows=100)
    manifest = read_manifest(tmp_path)
    manifest["files"]["x/c/0"]["bytes"] += 1
    write_json(tmp_path / MANIFEST, manifest)
    with pytest.raises(CorruptError, match="bytes where"):
        reader(tmp_path).rows(0, 1)
