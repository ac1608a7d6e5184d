"""The kernels are compiled for some GPUs, which needs none: the interpreter takes what a compiler refuses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu import needs_triton

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from scarcade.dataloaders import scatter_triton
from scarcade.engine import philox_triton
from scarcade.models import likelihood_triton, mmd_triton


def kinds(kernel, constants):
    'What each argument is: matrices of float32 but for these.'
    others = {
        "indices": "*u16", "data": "*u8", "starts": "*i64", "lengths": "*i32", "out": "*fp32", "lanes": "*i64",
        "code_B": "*i64", "place_B": "*i64", "total": "*fp64",
    }
    numbers = {"first", "n_genes", "n_lanes", "width", "draw", "n", "n_cells", "n_dims", "n_codes", "n_widths"}
    found = {}
    for name in kernel.arg_names:
        number = "i32" if name in numbers else "*fp32"
        found[name] = "constexpr" if name in constants else others.get(name, number)
    return found


likelihood = {"ROWS": likelihood_triton.ROWS, "BLOCK": likelihood_triton.BLOCK}
wanted = [
    (scatter_triton.scatter, {"BLOCK": scatter_triton.BLOCK}),
    (philox_triton.uniform, {"BLOCK": philox_triton.BLOCK}),
    (philox_triton.normal, {"BLOCK": philox_triton.BLOCK}),
    (mmd_triton.pairs, {"OWN": mmd_triton.OWN, "OTHER": mmd_triton.OTHER}),
]
for kernel in (likelihood_triton.value, likelihood_triton.gradients):
    wanted += [(kernel, {"ZINB": zinb, "SHARED": shared, **likelihood}) for zinb, shared in ((1, 1), (0, 0))]
for target in (GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)):
    for kernel, constants in wanted:
        source = ASTSource(kernel, kinds(kernel, constants), constexprs=constants)
        assert triton.compile(source, target=target).asm["llir"]
print(len(wanted), "kernels")
"""


@needs_triton
@pytest.mark.long
def test_every_kernel_can_be_compiled(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, check=False, env=environment)
    assert done.stdout == "8 kernels\n", done.stderr
