"""The one place where pickles are written: files in the formats of scvi-tools and scArches, which are pickles.

Nothing of ours is read from them again but by the restricted reader (`pickles`), and nothing of ours is kept in them
(docs/decisions/016). They hold tensors, arrays, and plain values of Python.
"""

import pickle  # noqa: TID251 - the format of others: see above
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scarcade.engine.errors import StorageError


def state_dict(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Weights as a module's state dict: copies, and for each batch normalisation the counter that torch has beside."""
    state = {name: torch.from_numpy(np.array(value, order="C")) for name, value in arrays.items()}
    counted = [name.replace("running_mean", "num_batches_tracked") for name in arrays if name.endswith(".running_mean")]
    return state | {name: torch.zeros((), dtype=torch.int64) for name in counted}


def write_archive(content: Mapping[str, Any], path: Path) -> None:
    """Tensors and what stands beside them, as torch saves them.

    Raises:
        StorageError: it cannot be written.
    """
    try:
        with open(path, "wb") as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:  # torch tells of a full disk by the latter
        raise StorageError(f"{path}: cannot be written ({error})") from error


def write_values(content: Mapping[str, Any], path: Path) -> None:
    """Numbers, strings, lists and dicts, which nothing has to be imported for to read.

    Raises:
        StorageError: it cannot be written.
    """
    try:
        path.write_bytes(pickle.dumps(dict(content), protocol=4))
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror})") from error
