"""What tests of the code for GPUs need: a GPU, or Triton's interpreter in place of one."""

import os
from importlib.util import find_spec

import pytest
import torch

HERE = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if HERE else torch.device("cpu")
"""Where kernels are tested: on a GPU, or on a CPU by the interpreter."""

needs_a_gpu = pytest.mark.skipif(not HERE, reason="needs a GPU")
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None or not (HERE or os.environ.get("TRITON_INTERPRET") == "1"),
    reason="needs the package triton, and a GPU or its interpreter",
)
