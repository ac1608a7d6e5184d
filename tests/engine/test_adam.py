import pytest
import torch
from torch import nn

from scarcade.engine.adam import MOMENTS, Adam


@pytest.mark.parametrize("weight_decay", [0.0, 1e-2])
def test_it_is_torchs_fused_adam_to_the_last_bit(weight_decay: float) -> None:
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(7, 33), nn.ReLU(), nn.Linear(33, 5))
    theirs = nn.Sequential(nn.Linear(7, 33), nn.ReLU(), nn.Linear(33, 5))
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
        own.step()
        other.step()
        if number == 6:
            own.lr = other.param_groups[0]["lr"] = 3e-3
    for mine, its in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, its)
        assert all(torch.equal(own.state[mine][name], other.state[its][name]) for name in MOMENTS)


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
