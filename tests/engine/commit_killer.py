"""Kills a process before the n-th file operation of a checkpoint's commit, for every n; prints what is left.

Run as a program: it forks before any thread begins, and a hook on the interpreter's own audit events counts.
"""

import json
import os
import sys
from pathlib import Path

import torch

from scarcade.engine.checkpoint import CheckpointConfig, Checkpoints

OPERATIONS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "shutil.rmtree", "tempfile.mkdtemp"}


def checkpoints(folder: Path) -> Checkpoints:
    return Checkpoints(folder, CheckpointConfig(), about={"data": "d"}, warn=lambda _: None)


def save(folder: Path, step: int, stamp: int) -> None:
    checkpoints(folder).save(step, {"stamp": stamp}, {"w": torch.full((64,), float(stamp))})


def in_child(work: "object") -> int:
    """Run `work` in a fork and return how it ended."""
    child = os.fork()
    if child == 0:
        work()  # type: ignore[operator]
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(root: Path, new_step: int) -> None:
    torch.set_num_threads(1)
    n = 0
    while True:
        n += 1
        folder = root / f"n{n}"
        save(folder, 1, 1)
        save(folder, 2, 2)

        def killed(folder: Path = folder, n: int = n) -> None:
            left = n

            def hook(event: str, args: object) -> None:
                nonlocal left
                if event in OPERATIONS:
                    left -= 1
                    if left == 0:
                        os._exit(77)

            sys.addaudithook(hook)
            save(folder, new_step, 3)

        ended = in_child(killed)
        found = checkpoints(folder).load()
        assert found is not None, f"no checkpoint is left at operation {n}"
        state, tensors = found
        assert bool((tensors["w"] == state["stamp"]).all())
        left = sorted(p.name for p in folder.iterdir() if p.name.startswith(".tmp"))
        print(json.dumps({"n": n, "ended": ended, "stamp": state["stamp"], "left": left}))
        if ended == 0:
            return


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
