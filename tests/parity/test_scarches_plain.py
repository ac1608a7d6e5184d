"""trVAE and expiMap against their formulas written plainly on a state dict of scArches: one-hot columns, torch alone.

scArches itself cannot be installed beside today's libraries, so what its saved numbers (test_scarches_shared.py) do
not cover is held to the formulas here: mse, MMD on the decoder's layer, batch norm, soft masks, new terms, HSIC.
"""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from scarcade.engine.contracts import Step
from scarcade.engine.errors import ModelFileError
from scarcade.models.expimap import Expimap
from scarcade.models.interop.scarches import ScarchesModel, build, from_state, to_state
from scarcade.models.layers import BatchNorm
from scarcade.models.trvae import Trvae
from tests.models.cells import made_batch, made_schema
from tests.models.test_mmd import plain as plain_mmd

SCHEMA = made_schema(20, batches="abc")
EPS = 1e-8
State = dict[str, Tensor]


def layer(state: State, name: str, h: Tensor, c: Tensor) -> Tensor:
    bias = state.get(f"{name}.expr_L.bias")
    return F.linear(h, state[f"{name}.expr_L.weight"], bias) + c @ state[f"{name}.cond_L.weight"].T


def norm(state: State, name: str, h: Tensor) -> Tensor:
    if f"{name}.weight" not in state:
        return F.relu(F.layer_norm(h, h.shape[-1:]))
    mean, variance = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    return F.relu((h - mean) / (variance + 1e-5).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"])


def encode(state: State, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    h = norm(state, "encoder.FC.N0", layer(state, "encoder.FC.L0", x, c))
    h = norm(state, "encoder.FC.N1", F.linear(h, state["encoder.FC.L1.weight"], state["encoder.FC.L1.bias"]))

    def heads(kind: str) -> Tensor:
        names = [f"encoder.{kind}_encoder"]
        short = kind.replace("log_", "")
        names += [f"encoder.expand_{short}_encoder"] if f"encoder.expand_{short}_encoder.weight" in state else []
        return torch.cat([F.linear(h, state[f"{name}.weight"], state[f"{name}.bias"]) for name in names], 1)

    return heads("mean"), heads("log_var").exp() + 1e-4


def negative_binomial(x: Tensor, m: Tensor, r: Tensor) -> Tensor:
    together = (r + m + EPS).log()
    out = r * ((r + EPS).log() - together) + x * ((m + EPS).log() - together)
    return (out + torch.lgamma(x + r) - torch.lgamma(r) - torch.lgamma(x + 1)).sum(1)


def zero_inflated(x: Tensor, m: Tensor, r: Tensor, pi: Tensor) -> Tensor:
    p = -pi + r * ((r + EPS).log() - (r + m + EPS).log())
    zero = F.softplus(p) - F.softplus(-pi)
    more = -F.softplus(-pi) + p + x * ((m + EPS).log() - (r + m + EPS).log())
    more = more + torch.lgamma(x + r) - torch.lgamma(r) - torch.lgamma(x + 1)
    return torch.where(x < EPS, zero, more).sum(1)


def trvae(state: State, x: Tensor, code: Tensor, config: Trvae.Config) -> Tensor:
    c = F.one_hot(code, 3).to(x.dtype)
    size = x.sum(1, keepdim=True)
    seen = torch.log1p(x / size.clamp(min=1) * 1e4) if config.recon_loss == "mse" else torch.log1p(x)
    mean, variance = encode(state, seen, c)
    y = norm(state, "decoder.FirstL.N0", layer(state, "decoder.FirstL.L0", mean, c))
    h = norm(state, "decoder.HiddenL.N1", F.linear(y, state["decoder.HiddenL.L1.weight"]))

    def head(name: str) -> Tensor:
        return F.linear(h, state[f"decoder.{name}.weight"], state[f"decoder.{name}.bias"])

    if config.recon_loss == "mse":
        reconstruction = (F.relu(head("recon_decoder.0")) - seen).square().sum(1)
    else:
        r = (c @ state["theta"].T).exp()
        m = size * torch.softmax(head("mean_decoder.0"), 1)
        pi = head("dropout_decoder") if config.recon_loss == "zinb" else None
        reconstruction = -(negative_binomial(x, m, r) if pi is None else zero_inflated(x, m, r, pi))
    kl = 0.5 * (variance + mean**2 - 1 - variance.log()).sum(1)
    penalty = config.beta * plain_mmd(mean if config.mmd_on == "z" else y, code, config.mmd_boundary)
    return (reconstruction + kl).mean() + penalty


def hsic(z: Tensor, s: Tensor) -> Tensor:
    def kernel(a: Tensor) -> Tensor:
        d = a.shape[1]
        g = 2 * torch.lgamma(torch.tensor((d + 1) / 2)).exp() / torch.lgamma(torch.tensor(d / 2)).exp()
        return torch.exp(-(a[:, None] - a[None]).square().sum(-1) / (2 * g**2))

    kz, ks = kernel(z), kernel(s)
    return ((kz * ks).mean() + kz.mean() * ks.mean() - 2 * (kz.mean(1) * ks.mean(1)).mean()).sqrt()


def expimap(state: State, x: Tensor, code: Tensor, config: Expimap.Config) -> Tensor:
    c = F.one_hot(code, 3).to(x.dtype)
    size = x.sum(1, keepdim=True)
    seen = torch.log1p(x / size.clamp(min=1) * 1e4) if config.recon_loss == "mse" else torch.log1p(x)
    mean, variance = encode(state, seen, c)
    weight = state["decoder.L0.expr_L.weight"]
    if "decoder.L0.expr_L.mask" in state:
        weight = weight * state["decoder.L0.expr_L.mask"]
    for name in ("ext_L_m", "ext_L"):
        if f"decoder.L0.{name}.weight" in state:
            weight = torch.cat([weight, state[f"decoder.L0.{name}.weight"]], 1)
    eta = mean @ weight.T + c @ state["decoder.L0.cond_L.weight"].T
    if config.recon_loss == "mse":
        reconstruction = (eta - seen).square().sum(1)
    else:
        last = config.decoder_last_layer or "softmax"
        rates: dict[str, Any] = {"softmax": partial(torch.softmax, dim=1), "softplus": F.softplus, "exp": torch.exp}
        m = rates[last](eta) * (size if last == "softmax" else 1)
        reconstruction = -negative_binomial(x, m, (c @ state["theta"].T).exp())
    kl = 0.5 * (variance + mean**2 - 1 - variance.log()).sum(1)
    loss = (reconstruction + kl).mean()
    if config.use_hsic and config.n_ext:
        t = mean.shape[1] - config.n_ext
        if config.hsic_one_vs_all:
            for i in range(t, mean.shape[1]):
                loss = loss + config.beta * hsic(mean[:, [i]], mean[:, [j for j in range(mean.shape[1]) if j != i]])
        else:
            loss = loss + config.beta * hsic(mean[:, t:], mean[:, :t])
    return loss


PROGRAMS = {"a": ("g0", "g1", "g2"), "b": ("g2", "g5", "g7"), "c": ("g9",)}
CASES: list[tuple[type[ScarchesModel], dict[str, Any]]] = [
    (Trvae, {"recon_loss": "mse"}),
    (Trvae, {"recon_loss": "nb", "norm": "batch", "beta": 3.0}),
    (Trvae, {"recon_loss": "zinb", "mmd_on": "y", "mmd_boundary": 2}),
    (Expimap, {}),
    (Expimap, {"recon_loss": "mse"}),
    (Expimap, {"soft_mask": True, "decoder_last_layer": "softplus", "norm": "batch"}),
    (Expimap, {"n_ext": 2, "use_hsic": True, "beta": 3.0}),
    (Expimap, {"n_ext": 2, "use_hsic": True, "hsic_one_vs_all": True, "decoder_last_layer": "exp"}),
    (Expimap, {"new_programs": {"new": ("g3", "g4")}}),
]


@pytest.mark.parametrize(("kind", "config"), CASES, ids=str)
def test_loss_and_gradients_are_those_of_the_formulas(kind: type[ScarchesModel], config: dict[str, Any]) -> None:
    settings = {"hidden_layer_sizes": (12, 8)} | ({"n_latent": 4} if kind is Trvae else {"programs": PROGRAMS}) | config
    checked: Any = kind.Config.model_validate(settings)
    model = kind(checked, SCHEMA, seed=1).eval()
    for module in model.modules():
        if isinstance(module, BatchNorm):
            generator = torch.Generator().manual_seed(0)
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    batch = made_batch(SCHEMA, 30)
    losses = model.losses(batch, Step(), None)
    found = losses.minimise.mean() + (0 if losses.penalty is None else losses.penalty)
    found.backward()  # type: ignore[no-untyped-call]

    state = {key: torch.from_numpy(np.array(value)).double().requires_grad_() for key, value in to_state(model).items()}
    x = batch.counts.dense(torch.device("cpu")).double()  # slopes of the MMD cancel: float32 has no 1e-5 there
    formula: Any = trvae if kind is Trvae else expimap
    wanted = formula(state, x, batch.batch, model.config)
    wanted.backward()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    gradients = to_state(model, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for key, value in state.items():
        if value.grad is None or key.rsplit(".", 1)[-1] in ("mask", "running_mean", "running_var"):
            continue
        own = torch.from_numpy(gradients[key].copy()).double()
        inside = own != 0 if "ext_L_m" in key else torch.ones_like(own)  # their mask is no weight, and stands elsewhere
        # float32 errors before an MMD, whose slopes cancel, come out larger: up to 1e-5 with torch's layers, too
        near = (1e-5 if losses.penalty is None else 3e-5) * float(value.grad.abs().max())
        torch.testing.assert_close(own, value.grad * inside, rtol=1e-5, atol=near)


@pytest.mark.parametrize(("kind", "config"), CASES, ids=str)
def test_weights_survive_the_way_there_and_back(kind: type[ScarchesModel], config: dict[str, Any]) -> None:
    settings = {"hidden_layer_sizes": (12, 8)} | ({"n_latent": 4} if kind is Trvae else {"programs": PROGRAMS}) | config
    checked: Any = kind.Config.model_validate(settings)
    model = kind(checked, SCHEMA, seed=1)
    back = from_state(model, to_state(model))
    assert back.keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(back[key], value), key


def test_a_model_with_covariates_that_scarches_has_not_is_not_written() -> None:
    model = Trvae(Trvae.Config(hidden_layer_sizes=(8,)), made_schema(20, batches="abc", categorical=("xy",)))
    with pytest.raises(ModelFileError, match="1 more categorical"):
        to_state(model)


@pytest.mark.parametrize("turn", [np.asarray, np.ndarray.tolist], ids=["array", "list"])
def test_masks_of_programs_are_arrays_or_lists(turn: Any) -> None:
    model = Expimap(Expimap.Config(hidden_layer_sizes=(8,), programs=PROGRAMS), SCHEMA)
    attributes = {
        "condition_key_": "batch", "conditions_": list("abc"), "hidden_layer_sizes_": [8], "dr_rate_": 0.05,
        "recon_loss_": "nb", "use_bn_": False, "use_ln_": True, "mask_": turn(model.mask.T.numpy()), "ext_mask_": None,
    }  # fmt: skip
    found = build(to_state(model), list(SCHEMA.genes), attributes, where="made")
    assert isinstance(found, Expimap)
    assert list(found.config.programs.values()) == list(PROGRAMS.values())
    with pytest.raises(ModelFileError, match=r"made: .* of 19 genes"):
        build(
            to_state(model),
            list(SCHEMA.genes),
            attributes | {"mask_": turn(model.mask.T[:, :19].numpy())},
            where="made",
        )
