"""The ELBO of held-out cells after the same epochs: ours in float32 and with bfloat16 products, beside scvi-tools.

    python -m benchmarks.elbo --data FOLDER --peer-python PYTHON [--store STORE] [--batches 1024] [--epochs 20]
        [--seeds 0 1 2]

All train on the same cells and validate on the same others, with the defaults of scVI and the given batch size; ours
are streamed from the store. What differs between seeds is the first weights, the order of the cells and the noise.
The negative ELBO is told, per cell and with the whole KL: lower is better. Results are written where the original ran.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import environment
from benchmarks.training import make
from scarcade.dataloaders.loader import LoaderConfig, stream
from scarcade.dataloaders.store import Store, open_store
from scarcade.engine.loop import fit
from scarcade.engine.optim import OptimConfig
from scarcade.engine.world import use_threads
from scarcade.models import Scvi

RESULTS = Path(__file__).parent / "results" / "elbo.json"
PEER = Path(__file__).parent / "peers" / "elbo_scvi_tools.py"
TASKS = [("zinb", 128), ("zinb", 1024), ("nb", 1024)]
OURS = ("float32", "bfloat16")


def loaders(store: Store, batch: int, seed: int) -> tuple[Any, Any]:
    config = LoaderConfig(batch_size=batch, validation=0.1)
    return stream(store, "train", config, seed=seed), stream(store, "validation", config, seed=seed)


def trained(store: Store, likelihood: str, batch: int, products: str, epochs: int, seed: int) -> float:
    """The negative ELBO of ours."""
    train, validation = loaders(store, batch, seed)
    config = OptimConfig.model_validate({"epochs": epochs, "products": products, "validate_every": epochs})
    model = Scvi(Scvi.Config.model_validate({"gene_likelihood": likelihood}), store.schema, seed=seed)
    done = fit(model, train, validation, config, seed=seed)
    return float(done.history[-1]["validation/elbo"])


def of_peer(python: str, h5ad: Path, rows: Path, likelihood: str, batch: int, epochs: int, seed: int) -> float:
    """The negative ELBO of scvi-tools."""
    given = {"likelihood": likelihood, "batch": batch, "epochs": epochs, "seed": seed}
    options = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
    done = subprocess.run(
        [python, str(PEER), str(h5ad), str(rows), *options],
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
    )
    if done.returncode:
        raise SystemExit(f"scvi-tools failed: {done.stderr.strip().splitlines()[-1:]}")
    return float(json.loads(done.stdout.strip().splitlines()[-1])["elbo"])


def told(values: list[float]) -> str:
    return (
        f"{statistics.mean(values):,.2f} ± {statistics.stdev(values):.2f}" if len(values) > 1 else f"{values[0]:,.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder for made cells and scratch files")
    parser.add_argument("--store", type=Path, help="cells of your own, ingested; default: 20,000 made cells")
    parser.add_argument("--peer-python", help="interpreter of an environment with scvi-tools")
    parser.add_argument("--batches", type=int, nargs="+", default=[128, 1024], help="these batch sizes alone")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    use_threads(1)
    if options.store is None:
        path, h5ad, _ = make(options.data, 20_000)
    else:
        path, h5ad = options.store, options.data / f"{options.store.stem}-elbo.h5ad"
        options.data.mkdir(parents=True, exist_ok=True)
        open_store(path).to_anndata().write_h5ad(h5ad)
    store, rows, found = open_store(path), options.data / "elbo-rows.npz", []
    print("| likelihood | batch | float32 | bfloat16 products | scvi-tools |\n|---|---|---|---|---|")
    for likelihood, batch in (task for task in TASKS if task[1] in options.batches):
        elbos: dict[str, list[float]] = {}
        for seed in options.seeds:
            of_split = [
                np.sort(np.concatenate([b.rows for b in part.epoch(0)])) for part in loaders(store, batch, seed)
            ]
            np.savez(rows, train=of_split[0], validation=of_split[1])
            for products in OURS:
                elbo = trained(store, likelihood, batch, products, options.epochs, seed)
                elbos.setdefault(products, []).append(elbo)
            if options.peer_python:
                elbo = of_peer(options.peer_python, h5ad, rows, likelihood, batch, options.epochs, seed)
                elbos.setdefault("scvi-tools", []).append(elbo)
            print(
                likelihood, batch, seed, {name: round(values[-1], 2) for name, values in elbos.items()}, file=sys.stderr
            )
        row = [told(elbos[name]) if name in elbos else "" for name in (*OURS, "scvi-tools")]
        print(f"| {likelihood} | {batch} | " + " | ".join(row) + " |", flush=True)
        found.append({"likelihood": likelihood, "batch": batch, "epochs": options.epochs, "elbo": elbos})
    if options.peer_python:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps({"store": path.stem, "seeds": options.seeds, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
