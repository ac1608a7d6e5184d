"""Compiled code gives the same bits where it was just compiled and where it comes from numba's cache.

Otherwise the first run on a machine would not be repeatable, and a run that is continued would not be the same.
"""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from scarcade.engine import adam_job, addresses, blas, crew, philox, tiles, turned, vector_math
from scarcade.models import (
    frozen_kernel,
    head_job,
    hidden_kernel,
    likelihood_kernel,
    mmd_kernel,
    sparse,
    sparse_kernel,
    squared_error,
)

KERNELS = (
    *(adam_job, addresses, blas, crew, philox, tiles, turned, vector_math),
    *(likelihood_kernel, head_job, frozen_kernel, mmd_kernel, hidden_kernel, sparse, sparse_kernel, squared_error),
)
CODE = """
import hashlib, numpy as np, torch
from scarcade.engine.contracts import Noise
from scarcade.models import frozen_kernel, likelihood_kernel as kernel, mmd_kernel, sparse_kernel
from scarcade.models.hidden import After, hidden
from scarcade.models.layers import BatchNorm
from scarcade.models.squared_error import mean_squared_error
from scarcade.models.trained_head import Logits, head_log_likelihood

draw = np.random.default_rng(0)
n_cells, n_genes = 32, 301
found = []
for zinb in (True, False):
    x = draw.poisson(0.5 * draw.random((n_cells, n_genes)) * draw.choice([1, 30], n_genes)).astype(np.float32)
    logits, dropout = draw.normal(size=(2, n_cells, n_genes)).astype(np.float32)
    theta = np.exp(draw.normal(size=(1, n_genes))).astype(np.float32)
    value, d_library = np.empty((2, n_cells), np.float32)
    d_theta = np.zeros((1, n_genes), np.float32)
    none, empty = np.empty((n_cells, 0), np.float32), np.zeros((1, n_genes), np.float32)
    d_logits, d_dropout = logits.copy(), dropout.copy() if zinb else none
    cells, genes = np.nonzero(x)
    csr = np.searchsorted(cells, np.arange(n_cells + 1)), genes.astype(np.int32), x[cells, genes]
    code, d_bias = np.zeros(n_cells, np.int64), np.zeros((2, 1, n_genes), np.float32)
    kernel.rows(
        0, n_cells, 0, *csr, d_logits, empty, code, np.log(x.sum(1)), theta, code, d_dropout, empty, code,
        np.ones(n_cells, np.float32), kernel.LOG_FACTORIAL, value, d_library, d_theta, *d_bias,
    )
    found += [value, d_logits, d_library, d_theta] + ([d_dropout] if zinb else [])
    none = np.empty((0, 0), np.float32)
    in_place = [logits.copy(), dropout.copy() if zinb else none]
    value = np.empty(n_cells, np.float32)
    frozen_kernel.rows(
        0, n_cells, np.searchsorted(cells, np.arange(n_cells + 1)), genes, x[cells, genes], *in_place, x.sum(1),
        np.zeros(n_cells), theta[0], value,
    )
    found += [value, *in_place]
    given = torch.from_numpy(draw.normal(size=(n_cells, 16)).astype(np.float32)).requires_grad_()
    weights = [torch.full((n_genes, 16), by).requires_grad_() for by in (0.1, 0.2)]
    heads = [Logits(given, weight, torch.zeros(1, n_genes)) for weight in weights]
    counts, library = torch.from_numpy(x), torch.from_numpy(np.log(x.sum(1)))
    value = head_log_likelihood(counts, heads[0], library, torch.zeros(n_genes), heads[1] if zinb else None)
    used = [given, *weights[: 1 + zinb]]
    found += [value.detach().numpy(), *(d.numpy() for d in torch.autograd.grad(value.sum(), used))]
total, slope = np.zeros(n_cells), np.zeros((n_cells, n_cells), np.float32)
z = draw.normal(size=(5, n_cells)).astype(np.float32)
weight, place = np.ones((2, 2), np.float32), np.zeros(n_cells, np.int64)
mmd_kernel.pairs(0, n_cells // 2, z, weight, place, -np.geomspace(1e-3, 1e3, 19).astype(np.float32), total, slope)
weights, products = draw.normal(size=(48, n_genes)).astype(np.float32), np.empty((n_cells, 48), np.float32)
logs, d_weights = np.empty_like(csr[2]), np.empty_like(weights)
sparse_kernel.take_logs(csr[2], logs)
sparse_kernel.forward(0, n_cells, *csr[:2], logs, n_genes, weights, products)
sparse_kernel.backward(0, n_genes, *csr[:2], logs, products, d_weights)
found += [logs, products, d_weights]
noise = Noise([((1, lane), n_cells // 4) for lane in range(4)])
found += [noise.uniform(77).numpy(), noise.normal(77).numpy()]
for norm, layer_norm in ((BatchNorm(77), False), (None, True)):
    given = [torch.from_numpy(draw.normal(size=size).astype(np.float32)) for size in ((n_cells, 40), (77, 40), (77,))]
    given = [one.requires_grad_() for one in given]
    after = After(norm, layer_norm, 0.3, 0.2, noise.uniform(77))
    y = hidden(*given, None, None, None, after)
    error = mean_squared_error(torch.ones(n_cells, 40), y, torch.ones(40, 77), torch.ones(40))
    found += [y.detach().numpy(), *(d.numpy() for d in torch.autograd.grad(error.sum(), given))]
print(*(hashlib.sha256(array.tobytes()).hexdigest()[:12] for array in (*found, total, slope)))
"""


@pytest.mark.long
def test_code_from_the_cache_gives_the_bits_of_fresh_code(tmp_path: Path) -> None:
    printed = [
        subprocess.run(
            [sys.executable, "-c", CODE],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)},
        ).stdout.split()
        for _ in range(2)
    ]
    assert list(tmp_path.rglob("*.nbc"))
    assert len(printed[0]) == 37
    assert printed[0] == printed[1]


def compiled() -> Iterator[tuple[ast.FunctionDef, dict[str, object]]]:
    """The functions of the kernels that numba compiles, and what its decorator is told."""
    for module in KERNELS:
        for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text())):
            for decorator in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
                call = decorator if isinstance(decorator, ast.Call) else ast.Call(decorator, [], [])
                if "jit" in ast.unparse(call.func):
                    assert isinstance(node, ast.FunctionDef)
                    told = {one.arg: getattr(one.value, "value", None) for one in call.keywords if one.arg}
                    yield node, told


FUNCTIONS = list(compiled())


@pytest.mark.parametrize(("function", "told"), FUNCTIONS, ids=[function.name for function, _ in FUNCTIONS])
def test_compiled_functions_are_put_into_their_callers(function: ast.FunctionDef, told: dict[str, object]) -> None:
    """One that was compiled apart and linked may come with other bits from the cache; so may one that calls it.

    One that says no to it leaves the compiler no choice: each of its operations is written out, and none is fast.
    """
    if told.get("forceinline") or told.get("inline") == "always":
        return
    if told.get("forceinline") is False:
        assert told.get("fastmath") is False  # it would be the callers' else
        return
    assert told.get("cache")
    called = {
        ast.unparse(node.func).rpartition(".")[2]
        for caller, _ in FUNCTIONS
        for node in ast.walk(caller)
        if isinstance(node, ast.Call)
    }
    assert function.name not in called
