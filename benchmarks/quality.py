"""Quality on real data beside the originals: labels of mapped queries, predicted responses, imputed proteins.

    python -m benchmarks.quality --splits FOLDER --gmt FILE --work EMPTY [--seeds 0 1 2]
        [--tasks labels] [--only mixology] [--methods "scarcade trvae"] [--peer-python PYTHON]

Each task is a module of this folder with ``rows(options, have, keep)``, which measures what `have` does not hold yet
and gives each row to `keep`, and ``table(rows)``, Markdown. Rows that ``benchmarks/results/quality.json`` already holds
are kept, so the long table can be made in parts. Rows with "source": "baseline" are of runs of the originals from
before this project, with the same cells and settings; nothing here measures them anew.
"""

import argparse
import importlib
import json
import os
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "quality.json"
TASKS = {"labels": "quality_labels", "kang": "quality_kang", "cite": "quality_cite"}
Row = dict[str, Any]
Key = tuple[str, str, str, int]
"""task, split, method, seed"""


def module(task: str) -> Any:
    return importlib.import_module(f"benchmarks.{TASKS[task]}")


def read() -> list[Row]:
    return json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []


def write(rows: list[Row]) -> None:
    """By a rename, so that a reader never sees half of it."""
    RESULTS.parent.mkdir(exist_ok=True)
    scratch = RESULTS.with_suffix(f".{os.getpid()}.tmp")
    scratch.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    scratch.replace(RESULTS)


def key(row: Row) -> Key:
    return row["task"], row["split"], row["method"], row["seed"]


def keep(row: Row) -> None:
    """Append a row to the file as it is now, which another run may have added to."""
    write([other for other in read() if key(other) != key(row)] + [row])
    print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--splits", type=Path, help="labels: folder with NAME_hvg.h5ad (obs: batch, lab, query)")
    parser.add_argument("--data", type=Path, help="kang, cite: folder with kang_ifnb_full.h5ad, cite_pbmc10k_5k.h5ad")
    parser.add_argument("--gmt", type=Path, help="expimap: file of gene programs (Reactome)")
    parser.add_argument("--peer-python", type=Path, help="an interpreter that has scvi-tools 1.4.2")
    parser.add_argument("--tasks", nargs="*", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--only", nargs="+", help="these splits alone")
    parser.add_argument("--methods", nargs="+", help="these methods alone, as they stand in the table")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--work", type=Path, help="a folder for stores, runs and results; none: print the table only")
    options = parser.parse_args()

    if options.work is not None:
        options.work.mkdir(parents=True, exist_ok=True)
        for task in options.tasks:
            module(task).rows(options, {key(row) for row in read()}, keep)
    for task in options.tasks:
        print(module(task).table([row for row in read() if row["task"] == task]), end="\n\n")


if __name__ == "__main__":
    main()
