"""Where the command begins: an interrupt that comes while the rest is still being imported ends it tidily, too."""

import sys


def main() -> int:
    """As `cli.main`."""
    try:
        from scarcade.jobs.cli import main as run

        return run()
    except KeyboardInterrupt:
        print("error: stopped; the same command continues where it stood", file=sys.stderr)
        return 130
