from pathlib import Path

import h5py
import numpy as np
import pytest

from scarcade.dataloaders import inflated as module
from scarcade.dataloaders.inflated import InflatedArray, inflated

VALUES = np.random.default_rng(0).poisson(2.0, 1003)


def file_of(tmp_path: Path, values: np.ndarray, **options: object) -> h5py.Dataset:
    file = h5py.File(tmp_path / "x.h5", "w")
    return file.create_dataset("v", data=values, **({"chunks": (100,), "compression": "gzip"} | options))


@pytest.mark.parametrize("dtype", ["int32", "int64", "float32", "uint16", "uint8", ">i4", ">f8"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_any_slice_is_what_hdf5_reads(tmp_path: Path, dtype: str, shuffle: bool) -> None:
    dataset = file_of(tmp_path, VALUES.astype(dtype), shuffle=shuffle)
    array = inflated(dataset)
    assert isinstance(array, InflatedArray)
    assert (array.shape, array.dtype, len(array)) == ((1003,), np.dtype(dtype), 1003)
    for part in (slice(0, 1003), slice(3, 1001), slice(99, 101), slice(100, 200), slice(150, 160), slice(7, 7)):
        assert np.array_equal(array[part], dataset[part])
        assert array[part].dtype == dataset[part].dtype


def test_slices_that_follow_one_another_inflate_no_chunk_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = inflated(file_of(tmp_path, VALUES))
    read: list[int] = []
    stored = InflatedArray._stored

    def counted(self: InflatedArray, number: int) -> tuple[int, bytes] | None:
        read.append(number)
        return stored(self, number)

    monkeypatch.setattr(InflatedArray, "_stored", counted)
    parts = [array[start : min(start + 37, 1003)] for start in range(0, 1003, 37)]
    assert np.array_equal(np.concatenate(parts), VALUES)
    assert read == list(range(11))


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "lzf"},
        {"compression": None},
        {"fletcher32": True},
        {"scaleoffset": 0},
        {"chunks": None, "compression": None},
    ],
)
def test_what_is_not_gzip_alone_is_left_to_hdf5(tmp_path: Path, options: dict[str, object]) -> None:
    dataset = file_of(tmp_path, VALUES, **options)
    assert inflated(dataset) is dataset


def test_what_are_no_plain_numbers_is_left_to_hdf5(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        packed = {"chunks": (10,), "compression": "gzip"}
        for made in (
            file.create_dataset("bool", data=np.ones(30, bool), **packed),
            file.create_dataset("text", data=np.array(["a"] * 30, object), dtype=h5py.string_dtype(), **packed),
            file.create_dataset("two", data=np.ones((30, 2)), chunks=(10, 2), compression="gzip"),
        ):
            assert inflated(made) is made
    values = np.ones(3)
    assert inflated(values) is values


def test_chunks_that_were_never_written_hold_what_hdf5_says(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        dataset = file.create_dataset("v", (950,), "int32", chunks=(100,), compression="gzip", fillvalue=7)
        dataset[120:130] = 3
        assert np.array_equal(inflated(dataset)[0:950], dataset[:])


def test_a_chunk_that_no_filter_went_over_is_read(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        dataset = file.create_dataset("v", (200,), "int32", chunks=(100,), compression="gzip")
        dataset.id.write_direct_chunk((0,), np.arange(100, dtype="int32").tobytes(), filter_mask=1)
        dataset[100:] = 5
        assert inflated(dataset)[0:200].tolist() == [*range(100), *[5] * 100]


@pytest.mark.parametrize("damage", ["middle", "checksum", "cut", "longer", "shorter"])
def test_damage_is_never_read_as_numbers(tmp_path: Path, damage: str) -> None:
    import zlib

    values = np.arange(100, dtype="int32")
    packed = bytearray(zlib.compress(values.tobytes()))
    if damage == "middle":
        packed[len(packed) // 2] ^= 0xFF
    elif damage == "checksum":
        packed[-1] ^= 1
    elif damage == "cut":
        packed = packed[:-20]
    else:
        made = np.arange(101 if damage == "longer" else 99, dtype="int32")
        packed = bytearray(zlib.compress(made.tobytes()))
    with h5py.File(tmp_path / "x.h5", "w") as file:
        dataset = file.create_dataset("v", (100,), "int32", chunks=(100,), compression="gzip")
        dataset.id.write_direct_chunk((0,), bytes(packed))
        array = inflated(dataset)
        assert array._values(bytes(packed)) is None
        if damage not in ("longer", "shorter"):  # of those HDF5 itself reads what fits
            with pytest.raises(OSError, match=r"[Cc]an't|filter"):
                array[0:100]


def test_without_isa_l_the_standard_library_does_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import zlib

    monkeypatch.setattr(module, "zlib", zlib)
    monkeypatch.setattr(module, "_Error", zlib.error)
    assert np.array_equal(inflated(file_of(tmp_path, VALUES))[5:999], VALUES[5:999])
