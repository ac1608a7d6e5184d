"""The cache of shards, without a store at a URL."""

import fcntl
import os
import threading
from pathlib import Path

from scarcade.dataloaders.shard_cache import ShardCache


def test_a_file_is_not_renamed_while_others_count_what_is_here(tmp_path: Path) -> None:
    # a scan of the folder that meets a rename may list neither name, and the cache would grow past its budget
    cache = ShardCache(tmp_path, 100)
    written = threading.Event()

    def fill(handle: int) -> None:
        os.pwrite(handle, b"x" * 10, 0)
        written.set()

    counting = os.open(tmp_path / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    original = cache._reserved

    def reserved(handle: int, part: Path, n_bytes: int) -> bool:
        got = original(handle, part, n_bytes)
        fcntl.flock(counting, fcntl.LOCK_EX)  # another process begins to count as soon as there is room
        return got

    cache._reserved = reserved  # type: ignore[method-assign]
    filler = threading.Thread(target=lambda: os.close(cache.filled("key", 10, fill) or 0))
    filler.start()
    try:
        assert written.wait(10)
        filler.join(0.3)
        seen = [entry.name for entry in tmp_path.iterdir() if not entry.name.startswith(".")]
    finally:
        os.close(counting)
        filler.join(10)
    assert seen == ["key.part"]
    assert cache.holds("key")
