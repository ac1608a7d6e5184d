"""expiMap: masks, lasso, new terms and surgery with them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from scarcade.engine.contracts import Batch, Noise, Step
from scarcade.engine.errors import UsageError
from scarcade.engine.schema import Schema
from scarcade.models.expimap import Expimap
from scarcade.models.hsic import hsic
from scarcade.models.saved import read, read_delta, save, save_delta
from scarcade.models.surgery import SurgeryConfig, delta, grow, reference_hash, trainable
from scarcade.models.terms import CONSTRAINED, FREE, Terms
from tests.models.cells import made_batch, made_schema

SCHEMA = made_schema(30, batches="ab")
PROGRAMS = {"first": ("g0", "g1", "g2", "g3"), "second": ("g3", "g4", "g5"), "third": ("g10", "g11", "g29")}


def model_of(schema: Schema = SCHEMA, **config: Any) -> Expimap:
    settings = {"programs": PROGRAMS, "hidden_layer_sizes": (16, 12)} | config
    return Expimap(Expimap.Config(**settings), schema, seed=0)


def steps(model: Expimap, batch: Batch, n: int, lr: float = 5e-3) -> list[float]:
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    found = []
    for step in range(n):
        optimiser.zero_grad()
        where = Step(step, lr=lr)
        losses = model(batch, where, Noise([((step,), len(batch))]))
        (losses.minimise.mean() + (0 if losses.penalty is None else losses.penalty)).backward()
        optimiser.step()
        model.after_step(where)
        found.append(float(losses.terms["reconstruction"].detach().mean()))
    return found


@pytest.mark.long
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"recon_loss": "mse"},
        {"decoder_last_layer": "softplus"},
        {"norm": "batch"},
        {"soft_mask": True, "alpha_l1": 0.5, "alpha_l1_epochs": 10},
        {"n_ext": 2, "use_hsic": True, "gamma_ext": 0.1, "new_programs": {"more": ("g7", "g8")}},
        {"n_ext": 2, "use_hsic": True, "hsic_one_vs_all": True},
    ],
    ids=str,
)
def test_it_learns(config: dict[str, Any]) -> None:
    model, batch = model_of(alpha=0.01, **config), made_batch(SCHEMA, 48)
    model.train()
    history = steps(model, batch, 30)
    assert history[-1] < history[0]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_weights_stay_zero_outside_a_hard_mask() -> None:
    model = model_of(alpha=0.0)
    steps(model.train(), made_batch(SCHEMA, 32), 10)
    outside = model.mask == 0
    assert not model.decoder.weight[outside].any()
    assert model.decoder.weight[~outside].all()
    assert model.mask[:, 0].nonzero()[:, 0].tolist() == [0, 1, 2, 3]


def test_a_soft_mask_lets_genes_in_and_the_lasso_puts_them_out() -> None:
    open_, shut = (model_of(soft_mask=True, alpha=0.0, alpha_l1=l1) for l1 in (0.0, 20.0))
    for model in (open_, shut):
        steps(model.train(), made_batch(SCHEMA, 32), 15)
    outside = open_.mask == 0
    assert open_.decoder.weight[outside].all()
    assert (shut.decoder.weight[outside] == 0).float().mean() > 0.9
    assert shut.decoder.weight[~outside].all()


def test_the_group_lasso_switches_programs_off_by_their_weight() -> None:
    model = model_of(alpha=1.0, omega={"second": 1e6})
    steps(model.train(), made_batch(SCHEMA, 32), 5)
    assert model.active_terms().tolist() == [True, False, True]
    sign, confidence = model.directions("counts")
    assert sign[1] == 0
    assert confidence[1] == 0


def test_directions_follow_the_weights() -> None:
    model = model_of()
    with torch.no_grad():
        model.decoder.weight.copy_(model.mask * torch.tensor([1.0, -1.0, 1.0]))
        model.decoder.weight[0, 0] = -9
    assert model.directions("sum")[0].tolist() == [-1, -1, 1]
    sign, confidence = model.directions("counts")
    assert sign.tolist() == [1, -1, 1]
    torch.testing.assert_close(confidence, torch.tensor([0.5, 1.0, 1.0]))


def test_the_penalty_is_the_hsic_of_new_terms() -> None:
    batch = made_batch(SCHEMA, 24)
    model = model_of(n_ext=2, use_hsic=True, beta=3.0).eval()
    mean, _ = model.embed(batch)
    losses = model.losses(batch, Step(), None)
    assert losses.penalty is not None
    torch.testing.assert_close(losses.penalty, 3 * hsic(mean[:, 3:], mean[:, :3]))
    each = model_of(n_ext=2, use_hsic=True, hsic_one_vs_all=True).eval().dependence(mean)
    wanted = hsic(mean[:, 3:4], mean[:, [0, 1, 2, 4]]) + hsic(mean[:, 4:], mean[:, :4])
    torch.testing.assert_close(each, wanted)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UsageError, match="--programs"):
        model_of(programs={})
    with pytest.raises(UsageError, match="no gene 'nope'"):
        model_of(programs={"p": ("g0", "nope")})
    with pytest.raises(UsageError, match="softmax"):
        model_of(recon_loss="mse", decoder_last_layer="softmax")
    with pytest.raises(UsageError, match="typo"):
        model_of(omega={"typo": 2.0})


def test_programs_are_lines_in_files_and_come_back() -> None:
    config = model_of().config
    raw = config.model_dump(mode="json")
    assert raw["programs"]["second"] == "g3 g4 g5"
    assert Expimap.Config.model_validate(raw) == config
    odd = Expimap.Config(programs={"p": ("a gene", "b")})
    assert Expimap.Config.model_validate(odd.model_dump(mode="json")) == odd


def test_a_model_with_new_terms_is_saved_and_read(tmp_path: Path) -> None:
    model = model_of(n_ext=1, new_programs={"more": ("g7", "g8")})
    save(model, tmp_path / "m", training={}, data_fingerprint=None)
    again, batch = read(tmp_path / "m"), made_batch(SCHEMA)
    assert isinstance(again, Expimap)
    assert again.terms_names == [*PROGRAMS, "more", "unconstrained_0"]
    torch.testing.assert_close(again.embed(batch)[0], model.eval().embed(batch)[0], rtol=0, atol=0)
    assert again.n_latent == 5


EXTENSION = {"n_ext": 2, "new_programs": {"more": ("g7", "g8")}, "use_hsic": True, "gamma_ext": 0.5}
GROWN = made_schema(30, batches="abcd")


@pytest.mark.parametrize("before", [{}, {"new_programs": {"old": ("g20",)}}], ids=["none", "some"])
def test_surgery_learns_new_terms_beside_the_reference(before: dict[str, Any], tmp_path: Path) -> None:
    save(model_of(**before), tmp_path / "m", training={}, data_fingerprint=None)
    model = read(tmp_path / "m")
    assert isinstance(model, Expimap)
    grown = grow(model, GROWN, seed=0, config=SurgeryConfig(model=EXTENSION))
    hashed = reference_hash(model)
    assert reference_hash(grown) == hashed
    assert grown.n_latent == model.n_latent + 3
    assert grown.terms_names[: model.n_latent] == model.terms_names
    moved = trainable(grown)
    assert all(name.rsplit(".", 1)[-1] == "new" for name in moved)
    assert {"terms.free.genes.new", "terms.constrained.genes.new", "theta.new"} <= moved.keys()

    steps(grown.train(), made_batch(GROWN, 32, first_batch=2), 8)
    assert reference_hash(grown) == hashed
    constrained = grown.terms[CONSTRAINED]
    assert isinstance(constrained, Terms)
    assert constrained.genes.new is not None
    assert constrained.genes.new[0].nonzero()[:, 0].tolist() == [7, 8]

    cells = made_batch(SCHEMA, 10)
    own = grown.eval().embed(cells)[0][:, : model.n_latent]
    torch.testing.assert_close(own, model.embed(cells)[0], rtol=0, atol=0)

    assert model.fingerprint is not None
    save_delta(grown, tmp_path / "d", parent=model.fingerprint, training={})
    again = read_delta(tmp_path / "d", model)
    assert isinstance(again, Expimap)
    assert again.terms_names == grown.terms_names
    torch.testing.assert_close(again.embed(cells)[0], grown.embed(cells)[0], rtol=0, atol=0)
    assert delta(again).keys() == delta(grown).keys()

    save(grown, tmp_path / "whole", training={}, data_fingerprint=None)  # an updated reference
    whole = read(tmp_path / "whole")
    torch.testing.assert_close(whole.embed(cells)[0], grown.embed(cells)[0])
    assert isinstance(whole, Expimap)
    assert FREE in whole.terms


def test_surgery_refuses_what_it_cannot_add() -> None:
    model = model_of()
    with pytest.raises(UsageError, match="unconstrained terms"):
        config = SurgeryConfig(model={"new_programs": {"more": ("g7",)}})
        grow(model_of(n_ext=1), GROWN, seed=0, config=config)
    for settings, match in (({"alpha": 1.0}, "alpha"), ({"new_programs": {"first": ("g0",)}}, "'first' already")):
        with pytest.raises(UsageError, match=match):
            grow(model, GROWN, seed=0, config=SurgeryConfig(model=settings))


def test_proximal_steps_leave_a_frozen_reference_alone() -> None:
    model = grow(model_of(alpha=100.0), GROWN, seed=0)
    before = model.decoder.weight.clone()
    model.after_step(Step(lr=1.0))
    assert torch.equal(model.decoder.weight, before)


@pytest.mark.parametrize("config", [{"recon_loss": "mse"}, {"decoder_last_layer": "exp"}], ids=str)
def test_the_fused_likelihood_is_refused_where_it_cannot_be(config: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="likelihood-path fused"):
        model_of(likelihood_path="fused", **config)
    assert model_of(likelihood_path="fused").losses(made_batch(SCHEMA), Step(), None).minimise.isfinite().all()


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"new_programs": {"first": ("g7",)}}, "first"),
        ({"n_ext": 1, "programs": {"unconstrained_0": ("g7",)}}, "unconstrained_0"),
        ({"n_ext": 1, "new_programs": {"unconstrained_0": ("g7",)}}, "unconstrained_0"),
    ],
    ids=str,
)
def test_latent_dimensions_have_names_of_their_own(config: dict[str, Any], name: str) -> None:
    with pytest.raises(UsageError, match=f"--model: two latent dimensions are named '{name}'"):
        model_of(**config)


def test_surgery_keeps_the_names_of_latent_dimensions_apart_and_its_messages_whole() -> None:
    model = model_of(new_programs={"unconstrained_0": ("g7",)})
    with pytest.raises(UsageError, match=r"--surgery\.model: two latent dimensions are named 'unconstrained_0'"):
        grow(model, GROWN, seed=0, config=SurgeryConfig(model={"n_ext": 1}))
    with pytest.raises(UsageError, match=r"--surgery\.model\.n-ext: .*given: 'a--b'"):
        grow(model, GROWN, seed=0, config=SurgeryConfig(model={"n_ext": "a--b"}))


def test_factors_of_the_lasso_are_there_after_reading(tmp_path: Path) -> None:
    """In the order of the programs, which is nobody's alphabet."""
    model = model_of(
        programs={"z": PROGRAMS["first"], "a": PROGRAMS["second"], "m": PROGRAMS["third"]}, omega={"a": 1e6}, alpha=1.0
    )
    save(model, tmp_path / "m", training={}, data_fingerprint=None)
    again = read(tmp_path / "m")
    assert isinstance(again, Expimap)
    again.after_step(Step(lr=1e-3))
    assert again.active_terms().tolist() == [True, False, True]
    assert "omega" not in again.state_dict()
