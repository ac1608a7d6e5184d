"""A classifier of batches that a latent space has to fool, in one backward pass with one optimiser.

scvi-tools trains it in turns with an optimiser of its own. Adam moves each weight by that weight's gradient alone,
so two losses whose gradients are kept apart are two optimisers: the model is fooled through a copy of the
classifier that takes no gradient, and the classifier learns from a latent that passes none on. Both see the
weights of before the step, as they do in turns. (docs/decisions/007-adversary.md.)

Shapes: B cells, L latent dimensions, K batches, H hidden units.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from scarcade.engine.contracts import Noise
from scarcade.models.layers import ConditionRows, FullyConnected, start_uniform
from scarcade.models.products import product_of

HIDDEN = 32


class Classes(ConditionRows):
    """Weights and bias of each class. A batch that surgery adds has zeros: surgery trains without the adversary."""

    def grow(self, new: Mapping[str, Sequence[str]], seed: int, path: str) -> None:
        width = self.rows.shape[1]
        self.append(new.get(self.covariate, ()), lambda _: torch.zeros(width))
        if self.new is not None:
            self.new.requires_grad_(False)


class Adversary(nn.Module):
    """Two hidden layers of 32 units with batch norm and dropout 0.1, as in scvi-tools."""

    on: Tensor

    def __init__(self, n_latent: int, n_batches: int, generator: torch.Generator) -> None:
        super().__init__()
        self.trunk = FullyConnected(
            n_latent,
            HIDDEN,
            2,
            {},
            inject=False,
            dropout_rate=0.1,
            batch_norm=True,
            layer_norm=False,
            generator=generator,
        )
        self.classes = Classes("batch", n_batches, HIDDEN + 1)
        start_uniform(self.classes.rows, HIDDEN**-0.5, generator)
        self.register_buffer("on", torch.zeros(()))  # set once the data are known

    def forward(self, z_BL: Tensor, noise: Noise | None) -> Tensor:
        """Log probabilities of the batches, (B, K)."""
        h_BH = self.trunk(z_BL, {}, noise)
        weight_KH = self.classes.table()
        return F.log_softmax(product_of(h_BH, weight_KH[:, :-1], weight_KH[:, -1]), -1)

    def losses(self, z_BL: Tensor, code_B: Tensor, noise: Noise | None) -> tuple[Tensor, Tensor]:
        """(what the model minimises, what the classifier minimises), (B,) each; 0 while it is off.

        The first is the cross-entropy to the uniform distribution over the batches that are not the cell's.
        """
        if self.on.device.type == "cpu" and not self.on:  # (on a GPU, to ask would be to wait for it)
            return z_BL.new_zeros(len(z_BL)), z_BL.new_zeros(len(z_BL))
        frozen = {name: parameter.detach() for name, parameter in self.named_parameters()}
        log_p_BK: Tensor = functional_call(self, frozen, (z_BL, noise))
        own_B = log_p_BK.gather(-1, code_B[:, None])[:, 0]
        fool_B = -(log_p_BK.sum(-1) - own_B) / (log_p_BK.shape[-1] - 1)
        classify_B = F.nll_loss(self(z_BL.detach(), noise), code_B, reduction="none")
        return self.on * fool_B, self.on * classify_B
