"""The losses of held-out cells, over all workers."""

from typing import cast

import numpy as np
import torch
from torch import nn

from scarcade.engine.contracts import Loader, Model, Noise, Step
from scarcade.engine.errors import NonFiniteError
from scarcade.engine.metrics import Sums, means
from scarcade.engine.together import with_others
from scarcade.engine.world import World

_VALIDATION = 0x76616C  # a seed word that keeps this noise apart from that of training


@torch.no_grad()
def validate(model: nn.Module, loader: Loader, step: Step, *, seed: int, world: World) -> dict[str, float]:
    """``validation/...``: the mean over all cells of `loader`, over all ranks, of each term of the loss.

    In eval mode, with noise that is the same at every call, so that curves do not tremble.

    Raises:
        NonFiniteError: a mean is not finite.
    """
    training = model.training
    model.eval()
    sums = Sums()
    for number, batch in enumerate(loader.epoch(0)):
        batch = with_others(batch.to(world.device), world)
        noise = Noise([((seed, number, lane, _VALIDATION), n) for lane, n in batch.lanes], world.device)
        sums.add(cast(Model, model).losses(batch, step, noise))
    model.train(training)
    found = means(*sums.merged(world), "validation")
    for name, value in found.items():
        if not np.isfinite(value):
            raise NonFiniteError(f"{name} is not finite after step {step.step}; lower --optim.lr or set --optim.clip")
    return found
