import copy

import torch
from torch.nn import functional as F

from scarcade.models.adversary import Adversary
from scarcade.models.layers import seeded


def made(on: float = 1.0) -> tuple[Adversary, torch.Tensor, torch.Tensor]:
    adversary = Adversary(4, 3, seeded("test"))
    adversary.on.fill_(on)
    z = torch.randn(12, 4, generator=seeded("z")).requires_grad_(True)
    return adversary, z, torch.arange(12) % 3


def test_one_backward_pass_gives_the_gradients_of_two_in_turns() -> None:
    adversary, z, codes = made()
    turns, z_turns = copy.deepcopy(adversary), z.detach().clone().requires_grad_(True)
    fool, classify = adversary.losses(z, codes, None)
    (fool.mean() + classify.mean()).backward()  # type: ignore[no-untyped-call]

    others = 1 - F.one_hot(codes, 3).float()
    fool_turn = -(turns(z_turns, None) * others / 2).sum(-1).mean()
    (wanted_z,) = torch.autograd.grad(fool_turn, z_turns)
    loss = F.nll_loss(turns(z_turns.detach(), None), codes)
    wanted = torch.autograd.grad(loss, list(turns.parameters()))
    torch.testing.assert_close(z.grad, wanted_z)
    for parameter, gradient in zip(adversary.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_off_it_says_nothing() -> None:
    adversary, z, codes = made(on=0.0)
    fool, classify = adversary.losses(z, codes, None)
    assert not fool.any()
    assert not classify.any()


def test_it_learns_and_grows() -> None:
    adversary, _, codes = made()
    z = F.one_hot(codes, 4).float()
    optimiser = torch.optim.Adam(adversary.parameters(), 1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        adversary.losses(z, codes, None)[1].mean().backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    assert (adversary(z, None).argmax(-1) == codes).all()
    adversary.classes.grow({"batch": ["d"]}, 0, "adversary.classes")
    assert adversary(z, None).shape == (12, 4)
    assert adversary.classes.new is not None
    assert not adversary.classes.new.requires_grad
