"""All benchmarks that need nothing but this environment, one after the other (``make bench``).

Those with a peer take its interpreter as an option and are run by hand: each module's first lines say how. Loading and
training are told here and not written, for their results are those beside the peers.
"""

import subprocess
import sys
import tempfile

ALONE = {
    "loader": ["--data"],
    "likelihood": [],
    "frozen_head": [],
    "training": ["--data"],
    "workers": ["--data"],
    "memory": ["--data", "--train"],
}


def main() -> int:
    worst = 0
    with tempfile.TemporaryDirectory(prefix="scarcade-bench-") as folder:
        for name, options in ALONE.items():
            print(f"== {name}", flush=True)
            given = [word for option in options for word in ((option, folder) if option == "--data" else (option,))]
            worst = max(
                worst, subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *given], check=False).returncode
            )
    return worst


if __name__ == "__main__":
    sys.exit(main())
