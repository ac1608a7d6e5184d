import numpy as np
import torch
from torch.nn import functional as F

from scarcade.engine.contracts import Noise
from scarcade.engine.gradients import running_statistics
from scarcade.models.layers import BatchNorm, ConditionalLinear, FullyConnected, Linear, seeded


def test_rows_are_the_same_function_as_one_hot_columns() -> None:
    layer = ConditionalLinear(5, 4, {"batch": 3, "single": 1, "donor": 2}, seeded(0))
    x, batch, donor = torch.randn(6, 5), torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([0, 1, 0, 1, 1, 0])
    codes = {"batch": batch, "donor": donor, "single": torch.zeros(6, dtype=torch.int64)}
    whole = torch.cat([layer.weight, *(table.table().T for table in layer.conditions.values())], 1)  # type: ignore[operator]
    one_hot = torch.cat([x, F.one_hot(batch, 3), F.one_hot(donor, 2)], 1)
    torch.testing.assert_close(layer(x, codes), F.linear(one_hot, whole, layer.bias))
    assert list(layer.conditions) == ["batch", "donor"]  # a single category has no row


def test_first_weights_count_the_conditions_in_their_bound() -> None:
    layer = ConditionalLinear(60, 5000, {"batch": 40}, seeded(1))
    bound = 100**-0.5
    for name, parameter in layer.named_parameters():
        values = parameter.detach().numpy()
        assert np.abs(values).max() <= bound, name
        np.testing.assert_allclose(values.std(), bound / 3**0.5, rtol=0.05)


def test_weights_are_a_function_of_the_seed() -> None:
    a, b, c = (Linear(4, 3, seeded("x", s)) for s in (0, 0, 1))
    assert torch.equal(a.weight, b.weight)
    assert not torch.equal(a.weight, c.weight)


def test_a_new_row_does_not_depend_on_the_others() -> None:
    """So a query's first weights are the same alone and among others."""
    layers = [ConditionalLinear(5, 4, {"batch": 2}, seeded(0)) for _ in range(2)]
    layers[0].grow({"batch": ["q1", "q2", "q3"]}, 7, "decoder.linear.0")
    layers[1].grow({"batch": ["q3"]}, 7, "decoder.linear.0")
    many, one = (layer.conditions["batch"].new for layer in layers)
    assert torch.equal(many[2], one[0])  # type: ignore[index]
    assert not torch.equal(many[1], many[2])  # type: ignore[index]


def test_growing_from_one_category_keeps_the_function() -> None:
    layer = ConditionalLinear(5, 4, {"batch": 1}, seeded(0))
    x, zeros = torch.randn(3, 5), torch.zeros(3, dtype=torch.int64)
    before = layer(x, {"batch": zeros})
    layer.grow({"batch": ["new"]}, 0, "p")
    assert torch.equal(layer(x, {"batch": zeros}), before)
    assert not torch.equal(layer(x, {"batch": zeros + 1}), before)
    assert layer.sizes == {"batch": 2}


def test_settling_makes_grown_rows_rows() -> None:
    layer = ConditionalLinear(5, 4, {"batch": 2}, seeded(0))
    layer.grow({"batch": ["c", "d"]}, 0, "p")
    x, codes = torch.randn(4, 5), {"batch": torch.arange(4)}
    before = layer(x, codes)
    layer.settle()
    assert torch.equal(layer(x, codes), before)
    assert set(dict(layer.named_parameters())) == {"weight", "bias", "conditions.batch.rows"}


def test_batch_norm_is_that_of_torch_with_other_numbers() -> None:
    ours, theirs = BatchNorm(3), torch.nn.BatchNorm1d(3, eps=1e-3, momentum=0.01)
    x = torch.randn(20, 3) * 4 + 1
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x), theirs(x))


def test_dropout_comes_from_the_noise_and_in_training_only() -> None:
    block = FullyConnected(
        4, 50, 2, {}, inject=True, dropout_rate=0.5, batch_norm=False, layer_norm=True, generator=seeded(0)
    )
    x = torch.randn(8, 4)

    def noise() -> Noise:
        return Noise([((0, 1), 8)])

    assert torch.equal(block(x, {}, noise()), block(x, {}, noise()))
    assert not torch.equal(block(x, {}, noise()), block(x, {}, Noise([((0, 2), 8)])))
    block.eval()
    assert torch.equal(block(x, {}, noise()), block(x, {}, None))


def test_the_engine_averages_the_running_statistics_of_our_batch_norm_over_workers() -> None:
    # it once looked for torch's class alone, and every worker kept statistics of its own
    layer = FullyConnected(
        5,
        4,
        2,
        {},
        inject=False,
        dropout_rate=0.0,
        batch_norm=True,
        layer_norm=False,
        generator=seeded("test"),
    )
    found = {buffer.data_ptr() for buffer in running_statistics(layer)}
    assert found == {buffer.data_ptr() for buffer in layer.buffers()}
    assert len(found) == 4
