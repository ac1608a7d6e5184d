"""A process computes with the threads that it was given, and no more."""

import subprocess
import sys


def test_neither_numba_nor_what_uses_it_later_gives_torch_more_threads() -> None:
    # numba's pool sets the threads of torch's OpenMP when it starts: once seen as a slowdown of twenty times
    program = (
        "import numba, torch; from scarcade.engine.world import use_threads\n"
        "use_threads(1); first = torch.get_num_threads()\n"
        "@numba.njit(parallel=True)\n"
        "def total(x):\n"
        "    s = 0.0\n"
        "    for i in numba.prange(len(x)): s += x[i]\n"
        "    return s\n"
        "total(torch.ones(1000).numpy()); print(first, torch.get_num_threads(), numba.get_num_threads())"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["1", "1", "1"]
