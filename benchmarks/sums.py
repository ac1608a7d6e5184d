"""The sum of gradients over the workers of one machine: through shared memory, and over the process group (gloo).

    python -m benchmarks.sums [--workers 2] [--numbers 774000] [--out benchmarks/results/sums.json]

By default the numbers are those of scVI at 2,000 genes, in buckets as training has them. The two ways take turns,
twenty steps each; told are the medians of a step's wall time and of the CPU time of worker 0, all its threads.
"""

import argparse
import json
import multiprocessing as mp
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from scarcade.engine.gradients import bucket_bytes_for
from scarcade.engine.world import gathered, use_threads

RESULTS = Path(__file__).parent / "results" / "sums.json"
STEPS, TURNS = 20, 15


def work(rank: int, size: int, meeting: str, n_numbers: int, results: Any) -> None:
    use_threads(1)
    per_bucket = bucket_bytes_for(4 * n_numbers) // 4
    parts = [(min(per_bucket, n_numbers - at), torch.float32) for at in range(0, n_numbers, per_bucket)]
    own = [torch.ones(n) for n, _ in parts]
    with gathered(rank, size, Path(meeting)) as world:
        shared = world.shared_sums(parts)
        assert shared is not None

        def in_memory() -> None:
            for number, (buffer, one) in enumerate(zip(shared.buffers(shared.turn), own, strict=True)):
                buffer.copy_(one)
                shared.send(number)
            for number, one in enumerate(own):
                shared.finish(number, one)
            shared.next_step()

        buckets = [torch.ones(n) for n, _ in parts]

        def by_group() -> None:
            for bucket, one in zip(buckets, own, strict=True):
                bucket.copy_(one)
            for pending in [world.sum_later(bucket) for bucket in buckets]:
                assert pending is not None
                pending.wait()

        found: dict[str, list[tuple[float, float]]] = {"shared memory": [], "gloo": []}
        for _ in range(TURNS):
            for name, step in (("shared memory", in_memory), ("gloo", by_group)):
                for one in own:
                    one.fill_(1.0)
                world.sizes(0)  # all begin together
                began, cpu = time.perf_counter(), time.process_time()
                for _ in range(STEPS):
                    step()
                found[name].append(((time.perf_counter() - began) / STEPS, (time.process_time() - cpu) / STEPS))
        if rank == 0:
            results.put(
                {
                    name: [1e3 * statistics.median(one) for one in zip(*rows, strict=True)]
                    for name, rows in found.items()
                }
            )
        world.sizes(0)
        shared.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--numbers", type=int, default=774_000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    context = mp.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        given = options.workers, f"{folder}/meeting", options.numbers, results
        processes = [context.Process(target=work, args=(rank, *given)) for rank in range(options.workers)]
        for process in processes:
            process.start()
        found = results.get(timeout=600)
        for process in processes:
            process.join()
    print(f"{options.workers} workers, {options.numbers:,} float32 numbers a step")
    for name, (wall_ms, cpu_ms) in found.items():
        print(f"{name:15} {wall_ms:6.2f} ms a step, {cpu_ms:6.2f} ms of CPU time")
    if options.out:
        about = {"workers": options.workers, "numbers": options.numbers}
        rows = {name: {"wall_ms": round(wall, 2), "cpu_ms": round(cpu, 2)} for name, (wall, cpu) in found.items()}
        options.out.write_text(json.dumps(about | rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
