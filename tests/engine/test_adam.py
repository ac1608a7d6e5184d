from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from scarcade.engine import adam_crew
from scarcade.engine.adam import MOMENTS, Adam

crewed = pytest.mark.skipif(not adam_crew.can([]), reason="no threads that do without the interpreter here")


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets how many threads there are, for the time of a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def _network(width: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, width), nn.ReLU(), nn.Linear(width, 5))


def _agree(mine: torch.Tensor, its: torch.Tensor, *, exactly: bool) -> None:
    if exactly:
        assert torch.equal(mine, its)
    else:
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("weight_decay", [0.0, 1e-2])
@pytest.mark.parametrize(("width", "n_threads"), [(33, 1), (9000, 2), (9000, 3)])
@pytest.mark.parametrize("if_finite", [False, pytest.param(True, marks=crewed)])
def test_it_is_torchs_fused_adam(
    weight_decay: float, width: int, n_threads: int, if_finite: bool, threads: Callable[[int], None]
) -> None:
    """To the last bit, where torch's own kernel is called."""
    ours, theirs = _network(width), _network(width)
    threads(n_threads)
    theirs.load_state_dict(ours.state_dict())
    own = Adam(list(ours.parameters()), lr=1e-2, eps=0.01, weight_decay=weight_decay)
    other = torch.optim.Adam(theirs.parameters(), lr=1e-2, eps=0.01, weight_decay=weight_decay, fused=True)
    for number in range(10):
        cells = torch.randn(20, 7)
        for model, optimiser in ((ours, own), (theirs, other)):
            optimiser.zero_grad()
            model(cells).square().sum().backward()
        if number == 4:  # a parameter that the step does not reach
            for model in (ours, theirs):
                next(iter(model.parameters())).grad = None
        assert own.step_if_finite() if if_finite else own.step() is None
        other.step()
        if number == 6:
            own.lr = other.param_groups[0]["lr"] = 3e-3
    for mine, its in zip(ours.parameters(), theirs.parameters(), strict=True):
        _agree(mine, its, exactly=not if_finite)
        for name in MOMENTS:
            _agree(own.state[mine][name], other.state[its][name], exactly=name == "step" or not if_finite)


@crewed
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e21])  # the last one's square is none
@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("width", [33, 9000])
def test_one_gradient_that_is_no_number_and_nothing_moves(width: int, place: int, value: float) -> None:
    model = _network(width)
    optimiser = Adam(list(model.parameters()), lr=1e-2)
    assert optimiser.can_step_if_finite

    def step() -> bool:
        model(torch.ones(3, 7)).square().sum().backward()
        if not good:
            gradient = list(model.parameters())[place].grad
            assert gradient is not None
            gradient.view(-1)[-1] = value
        return optimiser.step_if_finite()

    good = True
    assert step()
    before = [one.detach().clone() for one in model.parameters()]
    kept = [{name: one.clone() for name, one in optimiser.state[p].items()} for p in model.parameters()]
    good = False
    assert not step()
    for mine, was, state in zip(model.parameters(), before, kept, strict=True):
        assert torch.equal(mine, was)
        assert all(torch.equal(optimiser.state[mine][name], state[name]) for name in MOMENTS)


@crewed
def test_the_number_of_threads_changes_no_bit_of_an_update(threads: Callable[[int], None]) -> None:
    found = []
    for n_threads in (1, 2, 3):
        threads(n_threads)
        model = _network(9001)
        optimiser = Adam(list(model.parameters()), lr=1e-2, weight_decay=1e-3)
        for number in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.linspace(-1, number + 1, parameter.numel()).view_as(parameter)
            assert optimiser.step_if_finite()
        found.append([one.detach() for one in model.parameters()])
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


@crewed
def test_moments_that_are_put_in_place_are_taken() -> None:
    """As where a run is continued."""
    model = _network(33)
    optimiser = Adam(list(model.parameters()), lr=1e-2)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert optimiser.step_if_finite()
    for parameter in model.parameters():
        optimiser.state[parameter] = {name: one.clone() for name, one in optimiser.state[parameter].items()}
    assert optimiser.step_if_finite()
    assert all(float(state["step"]) == 2 for state in optimiser.state.values())
    assert all(float(state["exp_avg"].view(-1)[0]) == pytest.approx(0.19) for state in optimiser.state.values())


def test_a_step_that_is_not_to_be_made_changes_nothing() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimiser = Adam([weight], lr=0.1)
    optimiser.step()  # without a gradient
    assert optimiser.state == {}
    weight.grad = torch.ones(3)
    optimiser.found_inf = torch.ones(())
    optimiser.step()
    assert torch.equal(weight, torch.ones(3))
    assert optimiser.state[weight]["step"] == 0
    optimiser.found_inf = torch.zeros(())
    optimiser.step()
    assert torch.all(weight < 1)
    assert optimiser.state[weight]["step"] == 1
