"""obs and var of an .h5ad as tables, for the encodings that nearly every file has: as anndata gives them, but sooner.

anndata asks each element, and each part of it, for its encoding and version before it reads it. A query of 500 cells is
read twice, and half of its reading was that. What is not one of the plain encodings is left to anndata.
"""

from typing import Any

import h5py
import numpy as np
import pandas as pd


def plain_frame(group: Any) -> pd.DataFrame | None:
    """The table in an HDF5 group; None if anndata has to read it.

    Raises:
        whatever h5py and pandas raise on broken bytes.
    """
    if not isinstance(group, h5py.Group) or _encoding(group) != ("dataframe", "0.2.0"):
        return None
    names = [str(name) for name in group.attrs["column-order"]]
    key = group.attrs["_index"]
    index = _values(group[key])
    columns = {name: _column(group[name]) for name in names}
    if index is None or any(values is None for values in columns.values()):
        return None
    frame = pd.DataFrame(columns, index=index, columns=names or None)
    if key != "_index":
        frame.index.name = key
    return frame


def _column(node: Any) -> Any:
    if isinstance(node, h5py.Dataset):
        return _values(node)
    if _encoding(node) != ("categorical", "0.2.0"):
        return None
    codes, categories = _values(node["codes"]), _values(node["categories"])
    if codes is None or categories is None:
        return None
    return pd.Categorical.from_codes(codes, categories=pd.Index(categories), ordered=bool(node.attrs["ordered"]))


def _values(node: Any) -> np.ndarray | None:
    """Numbers, or text as objects."""
    if not isinstance(node, h5py.Dataset) or len(node.shape or ()) != 1:
        return None
    dtype = node.dtype
    text = h5py.check_string_dtype(dtype)
    if text is not None and text.length is None:
        found: np.ndarray = node.asstr()[()]
        return found
    return node[()] if dtype.kind in "iufb" else None


def _encoding(group: h5py.Group) -> tuple[Any, Any]:
    return group.attrs.get("encoding-type"), group.attrs.get("encoding-version")
