"""A private Ray session with the processes that it uses, and no others.

`ray.init` also starts an autoscaler's monitor, the server of a dashboard that is switched off (and waits until it
answers) and a reader of logs that nobody is shown. That is two seconds of every start, three of a core, 400 MB, and
ports that need not be open. There is no switch for them in `ray.init`; so within the block it makes its node of a class
that starts none of them. Where a later Ray calls them by other names, they are started again and nothing else changes
(`tests/engine/test_launch.py` looks).
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def bare() -> Iterator[None]:
    """A node of Ray that is started within the block, by this process, is a bare one."""
    nodes: Any = importlib.import_module("ray._private.node")
    whole = nodes.Node

    class Bare(whole):  # type: ignore[misc,valid-type]
        def start_monitor(self) -> None:
            """Nothing is scaled."""

        def start_api_server(self, **_: Any) -> None:
            self._webui_url = ""

        def start_log_monitor(self) -> None:
            """Logs stay in their files."""

    nodes.Node = Bare
    try:
        yield
    finally:
        nodes.Node = whole
