"""Which queries are given to whom together, by their cells.

A query comes out the same in any company, so this is about time alone. The largest begin first, so that what is left
at the end is small and workers end together.
"""

from collections.abc import Mapping, Sequence

from scarcade.jobs.queries import Task

LARGE = 20_000  # cells: in one process all threads work on such a query together
MOST = 32  # queries of a pack of Ray: what a lost worker costs, and what waits while another is idle
ROUNDS = 4  # packs that each worker of Ray gets, about


def largest_first(tasks: Sequence[Task], sizes: Mapping[str, int]) -> list[Task]:
    """By cells; of equal size in their order."""
    return sorted(tasks, key=lambda task: -sizes[task.name])


def large_and_small(tasks: Sequence[Task], sizes: Mapping[str, int]) -> tuple[list[Task], list[Task]]:
    """Those that all threads work on together, and those of which each thread has its own."""
    ordered = largest_first(tasks, sizes)
    n_large = sum(sizes[task.name] > LARGE for task in ordered)
    return ordered[:n_large], ordered[n_large:]


def packs_of(tasks: Sequence[Task], sizes: Mapping[str, int], workers: int) -> list[list[Task]]:
    """Packs of about equally many cells, `ROUNDS` for each worker; none is empty."""
    most_cells = max(1, -(-sum(sizes[task.name] for task in tasks) // (ROUNDS * workers)))
    packs: list[list[Task]] = []
    cells = 0
    for task in largest_first(tasks, sizes):
        if not packs or len(packs[-1]) == MOST or cells + sizes[task.name] > most_cells:
            packs.append([])
            cells = 0
        packs[-1].append(task)
        cells += sizes[task.name]
    return packs
