"""Where the command begins: an interrupt that comes while the rest is still being imported ends it tidily, too."""

import sys


def main() -> int:
    """As `cli.main`."""
    try:
        from scarcade.jobs.cli import main as run

        return run()
    except KeyboardInterrupt as error:
        from scarcade.jobs.exits import explained

        code, message = explained(error)
        print(f"error: {message}", file=sys.stderr)
        return code
