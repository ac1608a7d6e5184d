"""Reads files whose paths come in line by line, and answers each with one line: what a worker must survive.

Run as a program: a crash of the process is seen by its parent as the end of the answers.
"""

import json
import sys
import traceback
import warnings
from pathlib import Path

import numpy as np


def answer(path: Path) -> dict[str, object]:
    """{"ok": sum of all that was read} or {"error": code} or {"bug": traceback}."""
    from scarcade.dataloaders.gene_names import GeneNames
    from scarcade.dataloaders.schema import read_query
    from scarcade.dataloaders.source import AnnDataFile
    from scarcade.dataloaders.store import open_store
    from scarcade.engine.errors import InputError
    from scarcade.engine.schema import Categories, Schema

    try:
        if path.name.startswith("store"):
            store = open_store(path)
            if store.verify():
                return {"error": "E_CORRUPT"}
            indptr, indices, data = store.read(0, store.n_cells)
            store.obs()
            store.var()
            return {"ok": [len(indptr), int(indices.sum()), int(data.sum())]}
        with AnnDataFile(path) as file:
            genes = GeneNames.of(file.var("X"), str(path)).index
        query = read_query(path, Schema(tuple(genes), Categories("batch", ())), batch_key="batch", layer="X")
        indptr, indices, data = query.csr
        assert len(indptr) == len(query.obs) + 1
        assert (np.diff(indptr) >= 0).all()
        assert indptr[-1] == len(indices) == len(data)
        assert len(indices) == 0 or indices.max() < len(genes)
        return {"ok": [len(indptr), int(indices.sum()), int(data.sum())]}
    except InputError as error:
        return {"error": error.code, "text": str(error)}
    except BaseException:  # noqa: BLE001  whatever else comes out is a bug that the parent reports
        return {"bug": traceback.format_exc()}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        print(json.dumps(answer(Path(line.rstrip("\n")))), flush=True)
