"""Training from a hundred thousand, a million and ten million cells x 2,000 genes: cells per second, and peak memory.

    python -m benchmarks.scaling --data FOLDER [--cells 100000 1000000 10000000] [--rounds 3] [--max-steps 1000]

An epoch of scVI (nb, batch 1,024) that streams a made store, and the latent of all its cells, each in a process of its
own; rounds are interleaved and the median is taken. The clock starts with the first line of metrics, after compilation
and the first window. With `--max-steps` all are trained for so many steps, the small stores for several epochs. The
bars: cells per second and memory within 10 %.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import environment
from scarcade.dataloaders.synthetic import simulate

RESULTS = Path(__file__).parent / "results" / "scaling.json"
BATCH = 1024
TRAIN = """
import json, resource, sys, tempfile
from pathlib import Path
import scarcade as sca
optim = {"validate_every": 0, "log_every": 20} | json.loads(sys.argv[2])
with tempfile.TemporaryDirectory(dir=sys.argv[3]) as out:
    sca.train(sys.argv[1], out=out + "/run", epochs=int(sys.argv[4]), batch_size=1024, settings={
        "model": {"gene_likelihood": "nb"}, "optim": optim, "checkpoint": {"every_seconds": None}})
    lines = [json.loads(line) for line in Path(out, "run", "metrics.jsonl").read_text().splitlines()]
first, last = lines[0], lines[-1]
print(json.dumps({"cells_per_s": (last["cells"] - first["cells"]) / (last["time"] - first["time"]),
                  "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder for the made data; kept for the next run")
    parser.add_argument("--cells", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.data.mkdir(parents=True, exist_ok=True)
    for cells in options.cells:
        if not (options.data / f"{cells}.zarr").exists():
            simulate(options.data / f"{cells}.zarr", cells=cells, genes=2000, seed=0)
    found: dict[int, list[dict[str, float]]] = {cells: [] for cells in options.cells}
    limit = {} if options.max_steps is None else {"max_steps": options.max_steps}
    for _ in range(options.rounds):
        for cells in options.cells:
            epochs = -(-(options.max_steps or 0) * BATCH // int(0.9 * cells)) or 1  # a tenth is held out
            command = [sys.executable, "-c", TRAIN, str(options.data / f"{cells}.zarr"), json.dumps(limit)]
            done = subprocess.run(
                [*command, str(options.data), str(epochs)],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
                env=environment(OMP_NUM_THREADS=options.threads),
            )
            found[cells].append(json.loads(done.stdout.strip().splitlines()[-1]))
    rows: list[dict[str, Any]] = [
        {"cells": cells, **{key: round(statistics.median(one[key] for one in many)) for key in many[0]}}
        for cells, many in found.items()
    ]
    print("| cells | cells/s | peak MB |\n|---|---|---|")
    for row in rows:
        print(f"| {row['cells']:,} | {row['cells_per_s']:,} | {row['peak_mb']:,} |")
    for key in ("cells_per_s", "peak_mb"):
        print(f"{key}: {rows[-1][key] / rows[0][key] - 1:+.1%} from the fewest cells to the most")
    options.out.parent.mkdir(exist_ok=True)
    about = {"genes": 2000, "batch": BATCH, "threads": options.threads, "rounds": options.rounds}
    options.out.write_text(json.dumps({**about, "max_steps": options.max_steps, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
