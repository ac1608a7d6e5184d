import signal
import subprocess
import sys
from pathlib import Path

import pytest

from scarcade.jobs.last_words import last_words
from scarcade.jobs.results import RECORDS

CRASH = """
import os, sys
from pathlib import Path
from scarcade.jobs.last_words import speaking
with speaking(Path(sys.argv[1]), "one"):
    if sys.argv[2] != "0":
        os.kill(os.getpid(), int(sys.argv[2]))
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("number", "told"),
    [
        (signal.SIGSEGV, "its process died of SIGSEGV"),
        (signal.SIGABRT, "its process died of SIGABRT"),
        (signal.SIGBUS, "its process died of SIGBUS"),
        (signal.SIGKILL, "its process was killed from outside (SIGKILL"),
        (0, "its process ended"),
    ],
)
def test_a_process_tells_what_it_died_of(tmp_path: Path, number: int, told: str) -> None:
    (tmp_path / RECORDS).mkdir()
    done = subprocess.run([sys.executable, "-c", CRASH, tmp_path, str(int(number))], check=False, timeout=120)
    assert done.returncode == -int(number)
    assert last_words(tmp_path, "one").startswith(told)
    assert not list((tmp_path / RECORDS).iterdir())
