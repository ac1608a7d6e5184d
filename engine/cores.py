"""How many cores there are, and how workers share them out: plain numbers, known before torch is loaded."""

import os


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def granted(workers: int, threads: int | None, cpus_per_worker: float | None, *, private: bool) -> tuple[float, int]:
    """(cores reserved, threads) of each worker.

    A private session shares out the cores of this machine; of a cluster one core each is asked for.
    """
    share = max(1, cores() // max(workers, 1)) if private else 1
    cpus = cpus_per_worker or float(threads or share)
    return cpus, threads or max(1, int(cpus))


def offered(workers: int, cpus: float) -> int:
    """Cores that a private session says it has, so that `workers` of so many `cpus` each find room."""
    return max(cores(), int(cpus * workers + 0.999))
