"""What one change gains in a training step: turned on and off from step to step within one process.

    python -m benchmarks.step_by_step --data FOLDER [--change crew] [--models scvi scanvi totalvi scgen] [--batch 1024]

The speed of a shared machine drifts by a third within minutes, which hides a few per cent between two processes and
between two epochs; steps that take turns by twos meet the same machine. Batches are those of each model, or of
`--batch`; the first sixty steps are left out. Prints the median and the lower quartile of a step with and without.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from benchmarks.training import make
from scarcade.dataloaders.labelled import with_labelled
from scarcade.dataloaders.loader import LoaderConfig, stream
from scarcade.dataloaders.store import open_store
from scarcade.engine import blas, loop, tiles, updates
from scarcade.engine.contracts import Batch
from scarcade.engine.optim import OptimConfig
from scarcade.engine.world import use_threads
from scarcade.models import MODELS, head_crew, normal

BEGINNING = 60  # steps: compiling, and memory that is touched for the first time
BATCH = {"scvi": 128, "scanvi": 128, "totalvi": 256, "scgen": 32}


def _in_place(where: Any, name: str, before: Any) -> Callable[[loop.Run, bool], None]:
    """A change that is a function: what stood in its place."""
    after = getattr(where, name)
    return lambda run, on: setattr(where, name, after if on else before)


CHANGES: dict[str, Callable[[loop.Run, bool], None]] = {
    "latent": _in_place(normal, "_is_compiled", lambda weight_LH: False),
    "crew": _in_place(head_crew, "can", lambda kind: False),
    "tiles": _in_place(tiles, "are_faster", lambda: False),
    "update": lambda run, on: setattr(run.updates, "moves_if_finite", on),
    "alone": _in_place(updates, "as_shared_by", nullcontext),
}


def alternating(name: str, path: Path, change: str, epochs: int, batch_size: int) -> dict[bool, list[float]]:
    """Seconds of the steps with (True) and without the change."""
    kind, store, config = MODELS[name], open_store(path), LoaderConfig(batch_size=batch_size)
    cells = stream(store, "train", config, seed=0)
    loader = with_labelled(cells, config, seed=0) if kind.labelled_beside else cells
    turn, step, number = CHANGES[change], loop.Run._step, 0
    found: dict[bool, list[float]] = {True: [], False: []}

    def timed(run: loop.Run, batch: Batch) -> tuple[bool, bool]:
        nonlocal number
        number += 1
        on = number // 2 % 2 == 1
        turn(run, on)
        began = time.perf_counter()
        asked = step(run, batch)
        took = time.perf_counter() - began
        turn(run, True)
        if number > BEGINNING:
            found[on].append(took)
        return asked

    loop.Run._step = timed  # type: ignore[method-assign]
    try:
        settings = kind.training_defaults(store.n_cells).get("optim", {})
        loop.fit(kind(kind.Config(), store.schema, seed=0), loader, None, OptimConfig(**{**settings, "epochs": epochs}))
    finally:
        loop.Run._step = step  # type: ignore[method-assign]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder for the made cells (as benchmarks.training)")
    parser.add_argument(
        "--change", nargs="+", choices=list(CHANGES), default=[one for one in CHANGES if one != "tiles"]
    )
    parser.add_argument("--models", nargs="+", choices=list(BATCH), default=list(BATCH))
    parser.add_argument("--batch", type=int, help="cells of a step; default: the model's own")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    use_threads(options.threads)
    if "tiles" in options.change and not (tiles.are_faster() and blas.functions()):
        parser.error("--change tiles: this processor has MKL's products, or no others, so there is nothing to compare")
    path, _, _ = make(options.data, 20_000, h5ad=False)
    print("| change | model | batch | without, ms (quartile) | with, ms (quartile) | takes (quartile) |")
    print("|---|---|---|---|---|---|")
    for change in options.change:
        for name in options.models:
            size = options.batch or BATCH[name]
            found = alternating(name, path, change, options.epochs, size)
            low, middle = ({on: 1e3 * statistics.quantiles(found[on], n=4)[i] for on in found} for i in (0, 1))
            share = f"{middle[True] / middle[False]:.3f} ({low[True] / low[False]:.3f})"
            each = " | ".join(f"{middle[on]:.2f} ({low[on]:.2f})" for on in (False, True))
            print(f"| {change} | {name} | {size} | {each} | {share} |", flush=True)


if __name__ == "__main__":
    main()
