"""How the counts of a store may be packed: bytes a value, nanoseconds to pack and to decode one, for each way.

    python -m benchmarks.packing STORE [--chunks 40]

The chunks are those of a store (2,000 made genes, say, or 20,000), each decoded into one buffer, on one thread; ways
take turns, and the median of fifteen turns is told. See docs/decisions/003-ingest.md.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numcodecs import blosc

from scarcade.dataloaders.array_layout import COUNTS_PER_CHUNK, Packing
from scarcade.dataloaders.store import open_store

RESULTS = Path(__file__).parent / "results" / "packing.json"
WAYS = [Packing(shuffle, "lz4") for shuffle in ("noshuffle", "shuffle", "bitshuffle")]
WAYS += [Packing("shuffle", "lz4hc", level) for level in (1, 3, 5, 9)]
WAYS += [Packing("bitshuffle", "zstd", 1)]
TURNS = 15


def measured(values: np.ndarray, ways: Sequence[Packing]) -> list[dict[str, object]]:
    """One row for each way."""
    chunks = np.array_split(values, len(values) // COUNTS_PER_CHUNK)
    packed, pack_ns = [], []
    for way in ways:
        began = time.process_time()
        packed.append([way.pack(chunk, values.dtype.itemsize) for chunk in chunks])
        pack_ns.append((time.process_time() - began) / len(values) * 1e9)
    out = np.empty(COUNTS_PER_CHUNK * values.dtype.itemsize, np.uint8)
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(TURNS):
        for own, mine in zip(packed, times, strict=True):
            began = time.process_time()
            for chunk in own:
                blosc.decompress(chunk, out)
            mine.append((time.process_time() - began) / len(values) * 1e9)
    return [
        {
            "way": f"{way.codec} {way.level}, {way.shuffle}",
            "type": values.dtype.name,
            "bytes": round(sum(map(len, own)) / len(values), 3),
            "pack_ns": round(cost, 1),
            "decode_ns": round(statistics.median(mine), 2),
        }
        for way, own, cost, mine in zip(ways, packed, pack_ns, times, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--chunks", type=int, default=40)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    store = open_store(options.store)
    n = min(options.chunks * COUNTS_PER_CHUNK, len(store.x_data) // COUNTS_PER_CHUNK * COUNTS_PER_CHUNK)
    if n == 0:
        raise SystemExit(f"{options.store}: has less than a chunk of {COUNTS_PER_CHUNK} counts")
    indices, counts = store.x_indices.rows(0, n), store.x_data.rows(0, n)
    rows = []
    for name, values in (("gene indices", indices), ("counts", counts), ("counts", np.minimum(counts, 255))):
        kind = np.uint8 if values is not counts and name == "counts" else values.dtype
        rows += [{"of": name, **row} for row in measured(values.astype(kind), WAYS)]
    print("| | | bytes a value | ns to pack | ns to decode |\n|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['of']} ({row['type']}) | {row['way']} | {row['bytes']} | {row['pack_ns']} | {row['decode_ns']} |"
        )
    options.out.parent.mkdir(exist_ok=True)
    about = {"genes": store.n_genes, "values": n, "turns": TURNS}
    options.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
