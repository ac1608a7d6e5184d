"""What holds for every test."""

import os
import signal
from importlib.util import find_spec

# A shell starts background jobs with SIGINT ignored, and children inherit that: tests of Ctrl-C would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Kernels for GPUs are tested on a CPU by Triton's interpreter; this must be said before Triton is imported.
if find_spec("triton") is not None and not os.path.exists("/dev/nvidiactl") and not os.path.exists("/dev/kfd"):
    os.environ.setdefault("TRITON_INTERPRET", "1")
