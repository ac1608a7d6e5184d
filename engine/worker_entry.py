"""Where a worker of Ray Train begins: it imports what it needs, with as little delay as that takes.

This file imports nothing that costs time, as whoever hears of `enter` imports it.
"""

import gc
import importlib
from collections.abc import Mapping
from typing import Any


def enter(config: Mapping[str, Any]) -> dict[str, Any]:
    """`in_worker.attempt`; ``config["work"]`` is ``"module:function"``."""
    gc.disable()  # nothing that an import makes is ever garbage, and to look for it takes a tenth of the start
    try:
        worker = importlib.import_module("scarcade.engine.in_worker")
        importlib.import_module(config["work"].partition(":")[0])
    finally:
        gc.freeze()
        gc.enable()
    return dict(worker.attempt(config))
