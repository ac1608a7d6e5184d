"""OpenMP's threads, which torch computes with: they shall sleep when they have nothing to do.

Threads that wait by spinning take the cores from whoever else computes: on a shared machine a training took ten times
as long. The setting is read once, when torch is loaded, and inherited by Ray's workers; so it is made when scarcade is
imported, and this file imports nothing that costs time.
"""

import os
import sys

spins = "torch" in sys.modules and os.environ.get("GOMP_SPINCOUNT") != "0"
"""Whether torch was loaded before, so that its threads may spin after all."""

os.environ.setdefault("GOMP_SPINCOUNT", "0")
