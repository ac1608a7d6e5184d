"""Workers without Ray: processes that meet over a file, each running one function of this module's callers."""

import multiprocessing as mp
import traceback
from collections.abc import Callable
from pathlib import Path
from queue import Empty
from typing import Any

from scarcade.engine.world import World, gathered, use_threads


def _work(
    rank: int, size: int, meeting: str, results: Any, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    use_threads(1)
    try:
        with gathered(rank, size, Path(meeting)) as world:
            results.put((rank, function(world, *arguments), None))
    except BaseException:  # noqa: BLE001  (told to the test)
        results.put((rank, None, traceback.format_exc()))


def on_workers(size: int, tmp_path: Path, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """``function(world, *arguments)`` in `size` processes; what each returned, by rank."""
    if size == 1:
        return [function(World(), *arguments)]
    context = mp.get_context("spawn")
    results = context.Queue()
    meeting = tmp_path / f"meeting-{size}-{len(list(tmp_path.iterdir()))}"
    processes = [
        context.Process(target=_work, args=(rank, size, str(meeting), results, function, arguments), daemon=True)
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    try:
        while len(found) < size:
            rank, value, error = results.get(timeout=100)
            assert error is None, error
            found[rank] = value
    except Empty:
        raise AssertionError(f"only {sorted(found)} of {size} workers answered") from None
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    return [found[rank] for rank in range(size)]
