"""Training on one GPU, streamed from disk, beside scvi-tools with the same cells in memory.

    python -m benchmarks.gpu --data FOLDER [--peer-python PYTHON] [--cells 200000] [--rounds 3]

Cells per second of epochs after the first, and the share of the time that ours waited for data: as it is by default,
with counts that stay on the GPU once they were read, and with all of them read, decoded and copied anew in each epoch,
as data are that are too large to stay. Same architecture, batch size and likelihood (scVI's defaults unless a row says
otherwise). The bars: 150,000 cells/s in batches of 4,096, less than 15 % of the time waiting, five times scvi-tools.
Contenders take turns; medians. Models of scArches have no peer here.
"""

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.training import Task, make, measure, medians

RESULTS = Path(__file__).parent / "results" / "gpu.json"
TASKS = [
    Task("scvi", "scvi_tools", "zinb", 4096),
    Task("scvi", "scvi_tools", "zinb", 128),
    Task("scvi", "scvi_tools", "zinb", 4096, "bfloat16"),
    Task("scanvi", "scvi_tools", "zinb", 4096),
    Task("totalvi", "scvi_tools", "nb", 4096),
    Task("trvae", "scarches", "nb", 4096),
    Task("expimap", "scarches", "nb", 4096),
    Task("scgen", "scarches", "mse", 4096),
    Task("scvi", "scvi_tools", "zinb", 1024),
    Task("scvi", "scvi_tools", "nb", 4096),
]
_STREAMED = "streamed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder for the made cells")
    parser.add_argument("--peer-python", help="interpreter of an environment with scvi-tools and a GPU's torch")
    parser.add_argument("--models", nargs="+", choices=sorted({task.model for task in TASKS}))
    parser.add_argument("--batches", type=int, nargs="+", help="these batch sizes alone")
    parser.add_argument("--products", choices=("float32", "bfloat16"), help="these products alone")
    parser.add_argument("--cells", type=int, default=200_000)
    parser.add_argument(
        "--epochs", type=int, default=3, help="of the original; ours are trained for four times as many"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    store, h5ad, programs = make(options.data, options.cells, h5ad=options.peer_python is not None)
    tasks = [task for task in TASKS if not options.models or task.model in options.models]
    tasks = [task for task in tasks if not options.batches or task.batch in options.batches]
    tasks = [task for task in tasks if options.products in (None, task.products)]
    found: dict[tuple[Task, str], list[dict[str, float]]] = {}
    about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "threads": options.threads}
    about |= {"cells": options.cells, "genes": 2000, "epochs": options.epochs}
    for _ in range(options.rounds):
        for task in tasks:
            ours = sys.executable, store, 4 * options.epochs
            runs: list[tuple[str, str, Path, int]] = [("scarcade", *ours), (_STREAMED, *ours)]
            if options.peer_python and task.products == "float32" and task.original == "scvi_tools":
                runs.append((task.original, options.peer_python, h5ad, options.epochs))
            for name, python, data, epochs in runs:
                more = {"streamed": True} if name == _STREAMED else {}
                more |= {"programs": programs} if task.model == "expimap" else {}
                contender = "scarcade" if name == _STREAMED else name
                how = {"epochs": epochs, "threads": options.threads, "gpu": True, **more}
                one = measure(python, contender, data, task, **how)
                if one is not None:
                    found.setdefault((task, name), []).append(one)
            kept(options.out, about, found)  # a GPU that is lent may be taken back
    table(options.out)


def kept(out: Path, about: dict[str, Any], found: dict[tuple[Task, str], list[dict[str, float]]]) -> None:
    """Write what was measured so far."""
    rows = []
    for task in dict.fromkeys(task for task, _ in found):
        ours = found.get((task, "scarcade"), [])
        streamed = found.get((task, _STREAMED), [])
        theirs = found.get((replace(task, products="float32"), task.original), [])
        rows.append(
            {
                **asdict(task),
                "rounds": len(ours),
                "ours": medians(ours),
                "streamed": medians(streamed),
                "theirs": medians(theirs),
            }
        )
        if ours and theirs:
            rows[-1]["times"] = round(rows[-1]["ours"]["cells_per_s"] / rows[-1]["theirs"]["cells_per_s"], 1)
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


def table(out: Path) -> None:
    print(
        "| model | likelihood | batch | cells/s | waiting | streamed, cells/s | waiting | scvi-tools, cells/s | times |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for row in json.loads(out.read_text())["rows"]:
        kind = "" if row["products"] == "float32" else f", {row['products']}"
        numbers: list[str] = []
        for one in (row["ours"], row["streamed"]):
            numbers += [f"{one['cells_per_s']:,.0f}", f"{one['wait']:.0%}"] if one else ["failed", ""]
        theirs = row["theirs"]
        numbers += [f"{theirs['cells_per_s']:,.0f}" if theirs else "", str(row.get("times", ""))]
        print(f"| {row['model']} | {row['likelihood']}{kind} | {row['batch']:,} | " + " | ".join(numbers) + " |")


if __name__ == "__main__":
    main()
