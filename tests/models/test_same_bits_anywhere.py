"""What compiled code gives does not depend, in any bit, on where in memory its arrays happen to lie.

With a few dozen genes or units arrays lie so close together that LLVM's check for overlaps may say no, and a sum that
is then done one by one has other last bits than one in vectors.
"""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from scarcade.engine.contracts import Noise, Step
from scarcade.models import MODELS, frozen_kernel
from scarcade.models import likelihood_kernel as kernel
from scarcade.models.sparse import Sparse
from tests.models.cells import made_batch, made_schema

N_CELLS, N_GENES = 40, 25
SCHEMA = made_schema(N_GENES, batches="abc", labels="xy")
BATCH = made_batch(SCHEMA, N_CELLS)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "nb": ("scvi", {"gene_likelihood": "nb", "n_hidden": 12}),
    "zinb": ("scvi", {"n_hidden": 12}),
    "layer norm": ("scvi", {"n_hidden": 12, "use_layer_norm": "both", "use_batch_norm": "none"}),
    "mmd": ("trvae", {"hidden_layer_sizes": (12, 10)}),
    "squared error": ("scgen", {"hidden_layer_sizes": (12, 10)}),
}


def repeated(function: Callable[[], list[np.ndarray]]) -> set[bytes]:
    """What it gives, as bytes, while memory is given and taken beside it."""
    draw = random.Random(0)
    held: list[object] = []
    found = set()
    for _ in range(500):
        held = [*held, np.empty(draw.randint(1, 6000), np.uint8)][-40:]
        found.add(b"".join(one.tobytes() for one in function()))
    return found


@pytest.mark.parametrize("zinb", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_kernels(*, zinb: bool, frozen: bool) -> None:
    """With all their arrays anew each time."""
    draw = np.random.default_rng(0)
    x_BG = (draw.random((N_CELLS, N_GENES)) < 0.3) * draw.integers(1, 30, (N_CELLS, N_GENES)).astype(np.float32)
    x = Sparse.of(torch.from_numpy(x_BG))
    logits_BG, dropout_BG = draw.normal(size=(2, N_CELLS, N_GENES)).astype(np.float32)
    theta, library_B = np.exp(draw.normal(size=(1, N_GENES))).astype(np.float32), x_BG.sum(1)

    def whole() -> list[np.ndarray]:
        d_dropout_BG = dropout_BG.copy() if zinb else np.empty((N_CELLS, 0), np.float32)
        found = d_BG, *_ = logits_BG.copy(), np.empty(N_CELLS, np.float32), np.empty(N_CELLS, np.float32)
        shared = [np.zeros((2, N_GENES), np.float32) for _ in range(3)]
        code_B, none = np.zeros(N_CELLS, np.int64), np.zeros((1, N_GENES), np.float32)
        kernel.rows(
            *(0, N_CELLS, 0, x.indptr, x.genes, x.values, d_BG, none, code_B, np.log(library_B), theta.copy(), code_B),
            *(d_dropout_BG, none, code_B, np.ones(N_CELLS, np.float32), kernel.LOG_FACTORIAL, *found[1:], *shared),
        )
        return [*found, *shared, d_dropout_BG]

    def of_frozen() -> list[np.ndarray]:
        d_BG, value_B = logits_BG.copy(), np.empty(N_CELLS, np.float32)
        d_dropout_BG = dropout_BG.copy() if zinb else np.empty((0, 0), np.float32)
        given = x.indptr, x.genes, x.values, d_BG, d_dropout_BG, library_B, np.zeros(N_CELLS), theta[0].copy()
        frozen_kernel.rows(0, N_CELLS, *given, value_B)
        return [d_BG, value_B, d_dropout_BG]

    assert len(repeated(of_frozen if frozen else whole)) == 1


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients(case: str) -> None:
    name, settings = CASES[case]
    model = MODELS[name](MODELS[name].Config(**settings), SCHEMA, seed=0)
    parameters = list(model.parameters())

    def step() -> list[np.ndarray]:
        losses = model.losses(BATCH, Step(), Noise.of_step(0, 0, BATCH))
        total = losses.minimise.sum() if losses.penalty is None else losses.minimise.sum() + losses.penalty
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        found: list[Tensor] = [losses.minimise.detach(), *(one for one in gradients if one is not None)]
        return [one.numpy() for one in found]

    assert len(repeated(step)) == 1
