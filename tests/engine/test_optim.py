import pytest
import torch
from torch import nn

from scarcade.engine.adam import Adam
from scarcade.engine.errors import CheckpointError, UsageError
from scarcade.engine.optim import (
    OptimConfig,
    Patience,
    adam,
    default_epochs,
    final_kl_weight,
    kl_weight,
    lower_on_plateau,
    moments,
    restore_moments,
    stop_early,
)


@pytest.mark.parametrize(
    ("cells", "epochs"), [(1, 400), (20_000, 400), (20_025, 400), (16_000_000, 1), (1_000_000, 8), (100_000, 80)]
)
def test_default_epochs_are_those_of_scvi_tools(cells: int, epochs: int) -> None:
    assert default_epochs(cells) == epochs


def test_kl_weight_counts_epochs_from_zero_and_is_constant_within_one() -> None:
    config = OptimConfig()
    assert [kl_weight(config, epoch=e, step=7, cells=99) for e in (0, 1, 200, 399, 400, 999)] == [
        0,
        1 / 400,
        0.5,
        399 / 400,
        1,
        1,
    ]


def test_kl_weight_by_steps_goes_before_epochs_and_by_cells_before_steps() -> None:
    by_steps = OptimConfig(kl_steps=10, kl_min=0.5)
    assert kl_weight(by_steps, epoch=0, step=5, cells=0) == pytest.approx(0.75)
    by_cells = OptimConfig(kl_steps=10, kl_cells=1000, kl_max=2)
    assert kl_weight(by_cells, epoch=0, step=5, cells=250) == pytest.approx(0.5)
    assert kl_weight(OptimConfig(kl_epochs=None), epoch=0, step=0, cells=0) == 1
    assert kl_weight(OptimConfig(kl_steps=0), epoch=0, step=0, cells=0) == 1


def test_a_million_cells_end_their_warm_up_almost_where_it_began() -> None:
    weight = final_kl_weight(OptimConfig(), epochs=8, steps_per_epoch=7032, n_cells=900_000)
    assert weight == pytest.approx(7 / 400)


def test_plateau_is_that_of_torch() -> None:
    config = OptimConfig(plateau=True, plateau_patience=2, plateau_factor=0.5)
    parameter = nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.SGD([parameter], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimiser, factor=0.5, patience=2, threshold=0, threshold_mode="abs"
    )
    lr, patience = 1.0, Patience()
    for value in [5, 4, 4, 4, 4, 3, 3, 3, 3, 3, 3, 3, 2.5, 9, 9, 9, 9, 9, 9]:
        theirs.step(value)
        lr = lower_on_plateau(lr, float(value), patience, config)
        assert lr == optimiser.param_groups[0]["lr"]


def test_early_stopping_waits_for_its_patience() -> None:
    config = OptimConfig(early_stopping=True, stop_patience=2, stop_delta=0.1)
    patience = Patience()
    assert [stop_early(v, patience, config) for v in (3.0, 2.0, 1.95, 1.8, 1.8, 1.9)] == [False] * 5 + [True]


def test_moments_survive_a_round_trip_bit_for_bit() -> None:
    def three_steps(optimiser: Adam, model: nn.Module) -> None:
        for i in range(3):
            optimiser.zero_grad()
            model(torch.full((4, 3), float(i + 1))).square().sum().backward()
            optimiser.step()

    model, twin = nn.Linear(3, 2), nn.Linear(3, 2)
    optimiser, names = adam(model, OptimConfig())
    three_steps(optimiser, model)
    twin.load_state_dict(model.state_dict())
    again, _ = adam(twin, OptimConfig())
    restore_moments(again, names, moments(optimiser, names))
    three_steps(optimiser, model)
    three_steps(again, twin)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_moments_of_another_model_are_refused() -> None:
    optimiser, names = adam(nn.Linear(3, 2), OptimConfig())
    with pytest.raises(CheckpointError, match="another model"):
        restore_moments(optimiser, names, {"weight/exp_avg": torch.zeros(2, 3)})


def test_a_model_that_is_frozen_entirely_is_a_usage_error() -> None:
    model = nn.Linear(3, 2).requires_grad_(False)
    with pytest.raises(UsageError, match="no parameter that trains"):
        adam(model, OptimConfig())
