"""Torch's small operations stay on one thread; what is large has all of them."""

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from scarcade.dataloaders.loader import Columns, LoaderConfig, in_memory
from scarcade.engine.adam import LARGE, Adam
from scarcade.engine.loop import FitConfig, fit
from scarcade.engine.pool import alone, run, threads, together
from scarcade.engine.schema import Categories, Schema
from scarcade.models.products import ALONE, product_of, times
from scarcade.models.scvi import Scvi


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    assert (torch.get_num_threads(), threads()) == (3, 3)
    torch.set_num_threads(before)


def _torch_has() -> tuple[int, int]:
    return torch.get_num_threads(), threads()


def test_blocks_within_blocks() -> None:
    assert _torch_has() == (3, 3)
    with alone():
        assert _torch_has() == (1, 3)
        with alone():
            assert _torch_has() == (1, 3)
        with together():
            assert _torch_has() == (3, 3)
            with alone():
                assert _torch_has() == (1, 3)
            assert _torch_has() == (3, 3)
        assert _torch_has() == (1, 3)
    with together():
        assert _torch_has() == (3, 3)


def test_an_error_ends_the_block() -> None:
    with pytest.raises(ValueError, match="within"), alone(), together():
        raise ValueError("within")


def test_rows_are_dealt_to_all_threads_all_the_same() -> None:
    seen: list[tuple[int, int]] = []
    with alone():
        run(96, lambda start, stop: seen.append((start, stop)))
    assert sorted(seen) == [(0, 32), (32, 64), (64, 96)]


def test_it_is_of_this_thread() -> None:
    found: list[int] = []
    with alone():
        other = threading.Thread(target=lambda: found.append(threads()))
        other.start()
        other.join()
    assert found[0] in (1, 3)  # as torch has it in a thread that is new
    assert threads() == 3


@pytest.mark.parametrize("n", [8, 300], ids=["small", "large"])
def test_products_are_those_of_torch(n: int) -> None:
    assert (n * n * n > ALONE) == (n == 300)
    left, right, out = torch.randn(n, n), torch.randn(n, n), torch.ones(n, n)
    with alone():
        expected = left @ right
        assert torch.allclose(times(left, right), expected, atol=1e-4)
        assert torch.allclose(times(left, right, torch.empty(n, n)), expected, atol=1e-4)
        assert torch.allclose(times(left, right, out, add=True), expected + 1, atol=1e-4)


@pytest.mark.parametrize("shape", [(5, 3, 4), (14, 13, 15)], ids=["narrow", "wide"])
@pytest.mark.parametrize("plus", [None, "units", "cells"])
def test_a_layer_has_the_gradients_of_torch(shape: tuple[int, int, int], plus: str | None) -> None:
    b, i, h = shape
    x, weight = torch.randn(b, i, dtype=torch.float64), torch.randn(h, i, dtype=torch.float64)
    added = None if plus is None else torch.randn((h,) if plus == "units" else (b, h), dtype=torch.float64)
    given = [tensor.requires_grad_() for tensor in (x, weight, added) if tensor is not None]
    assert torch.autograd.gradcheck(product_of, given)


def test_parameters_of_any_size_move_alike() -> None:
    def moved(parts: int) -> torch.Tensor:
        torch.manual_seed(0)
        start, gradient = torch.randn(2 * LARGE), torch.randn(2 * LARGE)
        parameters = [torch.nn.Parameter(part.clone()) for part in start.chunk(parts)]
        for parameter, part in zip(parameters, gradient.chunk(parts), strict=True):
            parameter.grad = part.clone()
        optimiser = Adam(parameters, lr=0.1)
        for _ in range(3):
            optimiser.step()
        return torch.cat([parameter.detach() for parameter in parameters])

    assert torch.equal(moved(1), moved(64))


class _Watched(Scvi):
    had: set[int]

    def losses(self, *given: object) -> object:  # type: ignore[override]
        self.had.add(torch.get_num_threads())
        return super().losses(*given)  # type: ignore[arg-type]


@pytest.mark.parametrize(("path", "expected"), [("auto", 1), ("analytic", 3)])
def test_a_step_of_compiled_work_has_one_thread_for_the_rest(path: str, expected: int) -> None:
    rng = np.random.default_rng(0)
    schema = Schema(tuple(f"g{k}" for k in range(30)), Categories("batch", ("a", "b")))
    columns = Columns(batch=rng.integers(0, 2, 64))
    loader = in_memory(
        rng.poisson(1.0, (64, 30)).astype(np.float32), columns, schema, LoaderConfig(batch_size=32), seed=0
    )
    model = _Watched(Scvi.Config(likelihood_path=path), schema)
    model.had = set()
    fit(model, loader, None, FitConfig(epochs=1))
    assert model.had == {expected}
