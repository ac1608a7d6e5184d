"""Foreign pickles as plain values: each is read by `unpickle` in a process of its own, never in this one."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import load_file

from scarcade.engine.errors import ModelFileError, OpenError, UnsafeFileError
from scarcade.models.interop import unpickle


def read_pickle(path: Path) -> Any:
    """The value in a pickle or a torch archive: dicts, lists, strings, numbers and numpy arrays; the rest is None.

    Raises:
        OpenError: no such file. UnsafeFileError: it names something beyond arrays and containers.
        ModelFileError: it is not a pickle that can be read.
    """
    path = Path(path)
    if not path.is_file():
        raise OpenError(f"{path}: no such file")
    with tempfile.TemporaryDirectory(prefix="scarcade-unpickle-") as out:
        done = subprocess.run(
            [sys.executable, "-I", unpickle.__file__, str(path.resolve()), out],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            cwd=out,
            timeout=2 * unpickle.SECONDS,
            env={"PATH": os.environ.get("PATH", ""), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        reason = done.stdout.strip() or done.stderr.strip()[-300:] or f"reader ended with {done.returncode}"
        if done.returncode == 3:
            raise UnsafeFileError(f"{path}: {reason}, which a model has no use for; the file was not read")
        if done.returncode != 0:
            raise ModelFileError(f"{path}: cannot be read as a model: {reason}")
        try:
            arrays = load_file(Path(out) / "arrays.safetensors")
            value = json.loads((Path(out) / "value.json").read_text())
        except (OSError, ValueError, SafetensorError) as error:
            raise ModelFileError(f"{path}: cannot be read as a model: {error}") from error
    return _with_arrays(value, arrays)


def _with_arrays(value: Any, arrays: dict[str, Any]) -> Any:
    if isinstance(value, list):
        return [_with_arrays(item, arrays) for item in value]
    if isinstance(value, dict):
        if value.keys() == {"$array"}:
            return arrays[value["$array"]]
        return {key: _with_arrays(item, arrays) for key, item in value.items()}
    return value
