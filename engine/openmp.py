"""How OpenMP's threads, which torch computes with, wait for work: they look for it for a moment, and then sleep.

Threads that go on looking take the cores from whoever else computes: on a shared machine a training took ten times as
long. Threads that sleep at once are woken by every operation, which takes longer than most of them. The setting is read
once, when torch is loaded, and inherited by Ray's workers; so it is made when scarcade is imported, and this file
imports nothing that costs time.
"""

import os

MOMENT = "2000"
"""How often a thread looks: some tens of microseconds, about what lies between two operations of a training step."""

spins = os.environ.setdefault("GOMP_SPINCOUNT", MOMENT) != "0"
"""Whether they look at all before they sleep (for long, if torch was loaded before)."""
