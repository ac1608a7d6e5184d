"""Reads a foreign pickle without running anything of it: ``python -I unpickle.py FILE OUT`` in a process of its own.

A pickle is a program that calls what it names. Here every name is looked up in a table of inert
stand-ins: nothing is imported for it, and a name that is not in the table ends the reading. Arrays and
tensors are rebuilt from their bytes with their sizes checked. Only the standard library, numpy and
safetensors are used, and the process caps its own memory and time.

OUT receives ``value.json``, the pickled value with arrays as ``{"$array": key}``, and ``arrays.safetensors``.
Exit codes: 0; 3 (unsafe: names something that is not in the table); 4 (not readable). One line on stdout says why.
"""

import json
import math
import pickle  # noqa: TID251  (the one place: a restricted unpickler, see above)
import resource
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

MEMORY = 16 << 30  # bytes of address space
SECONDS = 600
MEMBER_LIMIT = 8 << 30  # bytes of one file or member of an archive


class UnsafeError(Exception):
    """The pickle names something that is not in the table."""


class UnreadableError(Exception):
    """The file is not what it should be."""


class Inert:
    """Stands for an object whose content is not wanted: takes everything, does nothing."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def append(self, item: object) -> None:
        pass

    def extend(self, items: object) -> None:
        pass


class PlainDict(dict[Any, Any]):
    """dict, OrderedDict and defaultdict: its items and nothing else."""

    def __init__(self, *args: Any) -> None:
        super().__init__(args[0] if len(args) == 1 and isinstance(args[0], list | dict) else {})

    def __setstate__(self, state: object) -> None:
        pass


class DType(Inert):
    """A numpy dtype by its code, "f8" or "O"."""

    def __init__(self, code: Any, *_: object) -> None:
        self.code = str(code)
        self.order = "<"

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "|", "="):
            self.order = str(state[1])

    def numeric(self) -> np.dtype[Any] | None:
        """The dtype if it is of numbers or booleans, else None."""
        if self.code[:1] not in "biuf" or not self.code[1:].isdigit():
            return None
        order: Any = "<" if self.order == "|" else self.order
        return np.dtype(self.code).newbyteorder(order)


class Array(Inert):
    """A numpy array, rebuilt by `value` from its shape, dtype and bytes."""

    def __init__(self, *_: object) -> None:
        self.state: tuple[Any, ...] | None = None

    def __setstate__(self, state: Any) -> None:
        self.state = tuple(state)

    def value(self) -> Any:
        if self.state is None or len(self.state) != 5:
            raise UnreadableError("a numpy array without its state")
        _, shape, dtype, fortran, content = self.state
        if not isinstance(dtype, DType) or not all(isinstance(n, int) and n >= 0 for n in shape):
            raise UnreadableError("a numpy array with a malformed state")
        if isinstance(content, list):  # objects
            if math.prod(shape) != len(content):
                raise UnreadableError("a numpy array whose size is not that of its content")
            return content
        numeric = dtype.numeric()
        if numeric is None:
            return fixed_strings(dtype, bytes(content), math.prod(shape))
        if math.prod(shape) * numeric.itemsize != len(content):
            raise UnreadableError("a numpy array whose size is not that of its content")
        values = np.frombuffer(content, numeric).astype(numeric.newbyteorder("="))
        return values.reshape(shape, order="F" if fortran else "C")


def fixed_strings(dtype: DType, content: bytes, n: int) -> list[str]:
    """The items of an array of fixed-width strings (U12, S12)."""
    kind, width = dtype.code[:1], dtype.code[1:]
    if kind not in "US" or not width.isdigit():
        raise UnreadableError(f"a numpy array of dtype {dtype.code!r}")
    if int(width) * (4 if kind == "U" else 1) * n != len(content):
        raise UnreadableError("a numpy array whose size is not that of its content")
    order = "<" if dtype.order in "<|=" else ">"
    return [
        x.decode("utf8", "replace") if isinstance(x, bytes) else str(x)
        for x in np.frombuffer(content, f"{order}{dtype.code}").tolist()
    ]


class Scalar(Inert):
    """A numpy scalar."""

    def __init__(self, dtype: Any, content: Any = b"") -> None:
        numeric = dtype.numeric() if isinstance(dtype, DType) else None
        if numeric is None or not isinstance(content, bytes) or len(content) != numeric.itemsize:
            raise UnreadableError("a numpy scalar with a malformed state")
        self.item = np.frombuffer(content, numeric)[0].item()


class Storage:
    """The class of a torch storage, by its dtype."""

    def __init__(self, dtype: str) -> None:
        self.dtype = np.dtype(dtype)


def encode(text: Any, encoding: Any = "latin1") -> bytes:
    """`_codecs.encode`, with which old pickles make bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise UnsafeError(f"_codecs.encode to {encoding!r}")
    return text.encode("latin1")


def rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: object) -> np.ndarray[Any, Any]:
    """A tensor's values; offset, size and stride are checked against the storage."""
    numbers = [offset, *size, *stride]
    if not isinstance(storage, np.ndarray) or not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise UnreadableError("a tensor with a malformed state")
    size, stride = tuple(size), tuple(stride)
    if len(size) != len(stride):
        raise UnreadableError("a tensor with a malformed state")
    n = math.prod(size)
    last = offset + sum((k - 1) * s for k, s in zip(size, stride, strict=True)) if n else 0
    if n > len(storage) or (n and last >= len(storage)):
        raise UnreadableError("a tensor that lies outside of its storage")
    if not n:
        return np.zeros(size, storage.dtype)
    steps = tuple(s * storage.itemsize for s in stride)
    return np.lib.stride_tricks.as_strided(storage[offset:], size, steps, writeable=False).copy()


def rebuild_parameter(data: Any, *_: object) -> Any:
    """`torch.nn.Parameter` -> its data."""
    return data


STORAGES = {
    "FloatStorage": "f4",
    "DoubleStorage": "f8",
    "HalfStorage": "f2",
    "LongStorage": "i8",
    "IntStorage": "i4",
    "ShortStorage": "i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}

TABLE: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): PlainDict,
    ("collections", "defaultdict"): PlainDict,
    ("builtins", "dict"): PlainDict,
    ("builtins", "list"): list,
    ("builtins", "set"): list,
    ("builtins", "slice"): Inert,
    ("builtins", "bytes"): bytes,
    ("builtins", "str"): str,
    ("_codecs", "encode"): encode,
    ("numpy", "ndarray"): Array,
    ("numpy", "dtype"): DType,
    ("torch", "Size"): tuple,
    ("torch", "device"): Inert,
    ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): rebuild_parameter,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): Array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): Scalar for core in ("core", "_core")},
    **{("torch", name): Storage(dtype) for name, dtype in STORAGES.items()},
}
INERT = ("pandas.", "torch.distributions.", "anndata.", "scvi.")
"""Modules whose objects (training history, constraints) are read as nothing. None of them is imported."""


class Reader(pickle.Unpickler):
    """Finds names in the table, and tensors' bytes in the archive."""

    def __init__(self, file: Any, archive: zipfile.ZipFile | None, root: str) -> None:
        super().__init__(file, encoding="latin1")
        self.archive, self.root = archive, root
        self.storages: dict[str, np.ndarray[Any, Any]] = {}

    def find_class(self, module: str, name: str) -> Any:
        module = {"__builtin__": "builtins"}.get(module, module)
        if (found := TABLE.get((module, name))) is not None:
            return found
        if module.startswith(INERT):
            return Inert
        raise UnsafeError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> np.ndarray[Any, Any]:
        if self.archive is None or not isinstance(pid, tuple) or len(pid) < 5 or not isinstance(pid[1], Storage):
            raise UnreadableError("a reference to a storage that is not there")
        key, n, dtype = str(pid[2]), pid[4], pid[1].dtype
        if key not in self.storages:
            info = self.archive.getinfo(f"{self.root}data/{key}")
            if info.compress_type != zipfile.ZIP_STORED or info.file_size > MEMBER_LIMIT:
                raise UnreadableError(f"storage {key} is compressed or too large")
            self.storages[key] = np.frombuffer(self.archive.read(info), dtype)
        if len(self.storages[key]) != n or self.storages[key].dtype != dtype:
            raise UnreadableError(f"storage {key} has not the size that is given for it")
        return self.storages[key]


def load(path: Path) -> Any:
    """The value in a torch archive, or in a bare pickle."""
    if path.stat().st_size > MEMBER_LIMIT:
        raise UnreadableError(f"larger than {MEMBER_LIMIT} bytes")
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            if file.read(4) == b"PK\x03\x04":  # no pickle begins so, and an archive has its table at the end
                raise UnreadableError("the file is truncated; copy or download it again")
            file.seek(0)
            return Reader(file, None, "").load()
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(names) != 1:
            raise UnreadableError("an archive without one data.pkl")
        root = names[0].removesuffix("data.pkl")
        if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
            raise UnreadableError("tensors in big-endian order")
        info = archive.getinfo(names[0])
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > MEMBER_LIMIT:
            raise UnreadableError("data.pkl is compressed or too large")
        with archive.open(info) as file:
            return Reader(file, archive, root).load()


def to_json(value: Any, arrays: dict[str, np.ndarray[Any, Any]], depth: int = 0) -> Any:
    """`value` as JSON; numeric arrays are put into `arrays`, what is inert becomes null."""
    if depth > 64:
        raise UnreadableError("nested more than 64 deep")
    if isinstance(value, Array):
        value = value.value()
    if isinstance(value, np.ndarray):
        key = str(len(arrays))
        arrays[key] = np.ascontiguousarray(value).reshape(value.shape)  # keeps () as ()
        return {"$array": key}
    if isinstance(value, Scalar):
        value = value.item
    if isinstance(value, bytes):
        value = value.decode("utf8", "replace")
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        return {str(to_json(k, arrays, depth + 1)): to_json(v, arrays, depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [to_json(item, arrays, depth + 1) for item in value]
    return None


def main(path: str, out: str) -> int:
    """Convert `path`; returns the exit code."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    try:
        value = to_json(load(Path(path)), arrays)
    except UnsafeError as error:
        print(f"names {error}")
        return 3
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001  (whatever a malformed pickle makes of itself is one error)
        print(f"{type(error).__name__}: {error}"[:500].replace("\n", " "))
        return 4
    save_file(arrays, Path(out) / "arrays.safetensors")
    (Path(out) / "value.json").write_text(json.dumps(value))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
