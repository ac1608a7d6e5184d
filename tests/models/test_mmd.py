"""The MMD of one pass against straightforward code over pairs of conditions, and against numbers of scArches."""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from scarcade.models.mmd import WIDTHS, _Fused, _OnGpu, mmd, pair_weights
from tests.gpu import DEVICE, needs_triton


def pair(a: Tensor, b: Tensor) -> Tensor:
    """The biased squared MMD of two groups, with tensors of all differences, as the original has it."""

    def mean_kernel(x: Tensor, y: Tensor) -> Tensor:
        distance = (x[:, None] - y[None]).square().sum(-1)
        return torch.stack([torch.exp(-distance / (2 * alpha)) for alpha in WIDTHS]).sum(0).mean()

    return mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b)


def plain(z: Tensor, code: Tensor, boundary: int | None = None) -> Tensor:
    total = torch.zeros((), dtype=z.dtype)
    for a, b in combinations(sorted(set(code.tolist())), 2):
        enough = min(int((code == a).sum()), int((code == b).sum())) >= 2
        if boundary is None or (a < boundary <= b and enough):
            total = total + pair(z[code == a], z[code == b])
    return total


S = torch.tensor([[0.0, 0], [1, 0], [0, 1]])
T = torch.tensor([[2.0, 2], [3, 2]])


def test_numbers_of_scarches() -> None:
    two = torch.cat([S, T]), torch.tensor([0, 0, 0, 1, 1])
    assert mmd(*two).item() == pytest.approx(9.505087, rel=1e-6)
    three = torch.cat([S, T, T + 5]), torch.tensor([0, 0, 0, 1, 1, 2, 2])
    assert mmd(*three).item() == pytest.approx(47.150635, rel=1e-6)
    assert mmd(*three, boundary=1).item() == pytest.approx(29.017599, rel=1e-6)
    same = torch.cat([S, S]), torch.tensor([0, 0, 0, 1, 1, 1])
    assert mmd(*same).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("boundary", [None, 4])
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_value_and_gradient_are_those_of_the_loop(scale: float, boundary: int | None) -> None:
    generator = torch.Generator().manual_seed(1)
    z = (torch.randn(60, 5, generator=generator, dtype=torch.float64) * scale).requires_grad_()
    code = torch.randint(0, 7, (60,), generator=generator)
    found, wanted = mmd(z, code, boundary), plain(z, code, boundary)
    torch.testing.assert_close(found, wanted)
    (g_found,), (g_wanted,) = (torch.autograd.grad(value, z) for value in (found, wanted))
    torch.testing.assert_close(g_found, g_wanted, rtol=1e-6, atol=1e-9)


def test_float32_and_a_single_cell_of_a_condition() -> None:
    generator = torch.Generator().manual_seed(2)
    z = torch.randn(33, 3, generator=generator, requires_grad=True)
    code = torch.tensor([5] + [900_000] * 20 + [7] * 12)  # codes need no room
    torch.testing.assert_close(mmd(z, code), plain(z, code), rtol=1e-5, atol=1e-6)
    wanted = plain(z, code, 8)  # a condition of one cell is left out with a boundary
    torch.testing.assert_close(mmd(z, code, 8), wanted, rtol=1e-5, atol=1e-6)


def test_one_condition_has_nothing_to_compare() -> None:
    z = torch.randn(8, 2, requires_grad=True)
    value = mmd(z, torch.full((8,), 3))
    value.backward()  # type: ignore[no-untyped-call]
    assert value.item() == 0
    assert z.grad is not None
    assert not z.grad.any()


def test_cells_that_lie_together_have_a_gradient_without_noise() -> None:
    """The narrowest Gaussian has a slope of 5e5 there, which must cancel exactly."""
    z = torch.full((6, 4), 3.3, requires_grad=True)
    mmd(z, torch.tensor([0, 0, 0, 1, 1, 1])).backward()  # type: ignore[no-untyped-call]
    assert z.grad is not None
    assert z.grad.abs().max() < 1e-4


@pytest.mark.parametrize("boundary", [None, 2])
@pytest.mark.parametrize("n_cells", [1, 2, 3, 64, 101])
def test_the_compiled_form_is_the_formula(n_cells: int, boundary: int | None) -> None:
    generator = torch.Generator().manual_seed(n_cells)
    z = torch.randn(n_cells, 6, generator=generator, requires_grad=True)
    code = torch.randint(0, 4, (n_cells,), generator=generator)
    exact = z.detach().double().requires_grad_()
    found, wanted = mmd(z, code, boundary), plain(exact, code, boundary)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    if wanted.requires_grad:
        (g_found,), (g_wanted,) = torch.autograd.grad(found, z), torch.autograd.grad(wanted, exact)
        torch.testing.assert_close(g_found.double(), g_wanted, rtol=1e-5, atol=1e-6)


def test_threads_do_not_change_a_bit_of_the_value() -> None:
    """Of the gradient the last bit may be another: its last products are torch's, which share their sums out."""
    generator = torch.Generator().manual_seed(5)
    z, code = torch.randn(201, 7, generator=generator), torch.randint(0, 4, (201,), generator=generator)
    before = torch.get_num_threads()
    results = []
    try:
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            of_threads = z.clone().requires_grad_()
            value = mmd(of_threads, code)
            value.backward()  # type: ignore[no-untyped-call]
            results.append((value, of_threads.grad))
    finally:
        torch.set_num_threads(before)
    for value, gradient in results[1:]:
        assert torch.equal(value, results[0][0])
        assert gradient is not None
        assert results[0][1] is not None
        torch.testing.assert_close(gradient, results[0][1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_latent_that_is_not_finite_gives_no_fine_loss(value: float) -> None:
    z = torch.zeros(6, 2)
    z[3, 1] = value
    assert not torch.isfinite(mmd(z, torch.tensor([0, 0, 0, 1, 1, 1])))


@needs_triton
@pytest.mark.parametrize("boundary", [None, 3])
@pytest.mark.parametrize(("n_cells", "n_dims", "scale"), [(1, 3, 1.0), (33, 5, 0.01), (64, 130, 1.0), (150, 10, 3.0)])
def test_the_kernel_for_gpus_gives_the_numbers_of_the_one_for_cpus(
    n_cells: int, n_dims: int, scale: float, boundary: int | None
) -> None:
    """Without a GPU by Triton's interpreter."""
    generator = torch.Generator().manual_seed(3)
    z_BD = torch.randn(n_cells, n_dims, generator=generator) * scale
    z_BD[n_cells // 2] = z_BD[0]  # two cells that lie together
    weights = pair_weights(torch.randint(0, 6, (n_cells,), generator=generator), boundary, torch.float32)
    found = []
    for way, device in ((_Fused, torch.device("cpu")), (_OnGpu, DEVICE)):
        z = z_BD.to(device).requires_grad_()
        value = way.apply(z, *(one.to(device) for one in weights))  # type: ignore[no-untyped-call]
        (gradient,) = torch.autograd.grad(value * 2.0, z)
        found.append((value.cpu(), gradient.cpu()))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-4, atol=1e-5 * float(found[0][1].abs().max()) + 1e-9)


@needs_triton
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_what_is_not_finite_is_seen_on_a_gpu() -> None:
    z = torch.randn(40, 3)
    z[7, 1] = torch.inf
    weights = pair_weights(torch.arange(40) % 2, None, torch.float32)
    assert not _OnGpu.apply(z.to(DEVICE), *(one.to(DEVICE) for one in weights)).isfinite()  # type: ignore[no-untyped-call]
