"""Optimiser, KL weight, learning-rate plateau and early stopping, as small functions and small states.

The numbers are those of scvi-tools (`TrainingPlan`): Adam with lr 1e-3, eps 0.01 and an L2 term of 1e-6
inside the gradient; eps 0.01 instead of 1e-8 gives visibly different models.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from scarcade.engine.adam import MOMENTS, Adam
from scarcade.engine.config import Section
from scarcade.engine.errors import CheckpointError, UsageError


class OptimConfig(Section):
    """How the weights are moved, how fast, and when to stop."""

    epochs: int | None = Field(
        None, ge=1, description="Passes over the cells; default: round(20000/cells*400), 1..400."
    )
    max_steps: int | None = Field(None, ge=1, description="Stop after that many optimiser steps, whatever the epoch.")
    products: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="kind of number of the large products (over all genes) in training; losses and sums stay float32",
    )
    lr: float = Field(1e-3, gt=0, description="Learning rate of Adam.")
    eps: float = Field(0.01, gt=0, description="Added to the root of Adam's second moment.")
    weight_decay: float = Field(1e-6, ge=0, description="L2 term added to the gradient (not decoupled).")
    clip: float | None = Field(None, gt=0, description="Largest norm of the whole gradient; default: not clipped.")

    accumulate: int = Field(
        1, ge=1, description="Parts in which a batch is computed, to need less memory, before the weights move once."
    )

    record: bool = Field(
        True, description="On a GPU: record the steps once and replay them; the numbers are the same, sooner."
    )

    kl_epochs: float | None = Field(400, ge=0, description="Epochs until the KL weight is at its full value.")
    kl_steps: float | None = Field(None, ge=0, description="The same in optimiser steps (goes before kl_epochs).")
    kl_cells: float | None = Field(None, ge=0, description="The same in cells seen (goes before kl_steps).")
    kl_min: float = Field(0.0, ge=0, description="KL weight at the start.")
    kl_max: float = Field(1.0, ge=0, description="KL weight at the end of the warm-up.")

    monitor: str = Field("elbo", description="Term of the validation that plateau and early stopping watch.")
    validate_every: int = Field(1, ge=0, description="Epochs between two validations; 0: none.")
    plateau: bool = Field(False, description="Lower the learning rate when the validation does not improve.")
    plateau_patience: int = Field(30, ge=0, description="Validations without improvement that are borne.")
    plateau_factor: float = Field(0.6, gt=0, lt=1, description="What the learning rate is multiplied by.")
    plateau_delta: float = Field(0.0, ge=0, description="Least change that counts as an improvement.")
    lr_min: float = Field(0.0, ge=0, description="The plateau lowers the learning rate to no less.")
    early_stopping: bool = Field(False, description="Stop when the validation does not improve.")
    stop_patience: int = Field(45, ge=1, description="Validations without improvement after which to stop.")
    stop_delta: float = Field(0.0, ge=0, description="Least change that counts as an improvement.")

    log_every: int = Field(100, ge=1, description="Steps between two lines of metrics within an epoch.")
    mode: Literal["train", "eval"] = Field("train", description="eval: no dropout, batch norm as it was learnt.")


def default_epochs(n_cells: int) -> int:
    """The heuristic of scvi-tools (`get_max_epochs_heuristic`); `n_cells` counts training and validation."""
    return max(1, min(round(20000 / max(n_cells, 1) * 400), 400))


def kl_weight(config: OptimConfig, *, epoch: int, step: int, cells: int) -> float:
    """The weight of the KL term: linear from `kl_min` to `kl_max`, by cells, steps or epochs begun."""
    if config.kl_cells is not None:
        done, whole = float(cells), config.kl_cells
    elif config.kl_steps is not None:
        done, whole = float(step), config.kl_steps
    elif config.kl_epochs is not None:
        done, whole = float(epoch), config.kl_epochs
    else:
        return config.kl_max
    if done >= whole:
        return config.kl_max
    return config.kl_min + (config.kl_max - config.kl_min) * done / whole


def final_kl_weight(config: OptimConfig, *, epochs: int, steps_per_epoch: int, n_cells: int) -> float:
    """The largest KL weight that a run of this length reaches, in its last step."""
    steps = epochs * steps_per_epoch
    if config.max_steps is not None:
        steps = min(steps, config.max_steps)
    last = max(steps - 1, 0)
    cells = last * n_cells // max(steps_per_epoch, 1)
    return kl_weight(config, epoch=last // max(steps_per_epoch, 1), step=last, cells=cells)


def adam(model: nn.Module, config: OptimConfig) -> tuple[Adam, list[str]]:
    """Adam over the parameters of `model` that train, and their names in the same order.

    The fused kernel does one pass over the moments where the plain one does ten.

    Raises:
        UsageError: nothing in the model trains.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise UsageError("the model has no parameter that trains; were all of them frozen?")
    parameters = [p for _, p in named]
    optimiser = Adam(parameters, lr=config.lr, eps=config.eps, weight_decay=config.weight_decay)
    return optimiser, [name for name, _ in named]


def moments(optimiser: Adam, names: Sequence[str]) -> dict[str, Tensor]:
    """The optimiser's state as named tensors: ``<parameter>/<moment>``; nothing before the first step."""
    state = optimiser.state
    return {
        f"{name}/{kind}": state[p][kind]
        for name, p in zip(names, optimiser.parameters, strict=True)
        for kind in MOMENTS
        if p in state
    }


def restore_moments(optimiser: Adam, names: Sequence[str], saved: Mapping[str, Tensor]) -> None:
    """The inverse of `moments`.

    Raises:
        CheckpointError: the tensors are not those of this optimiser.
    """
    parameters = optimiser.parameters
    wanted = {f"{name}/{kind}" for name in names for kind in MOMENTS}
    if not saved:
        return
    if set(saved) != wanted:
        odd = sorted(set(saved) ^ wanted)[:3]
        raise CheckpointError(f"the checkpoint's optimiser belongs to another model (differs in {', '.join(odd)})")
    for name, parameter in zip(names, parameters, strict=True):
        state = {kind: saved[f"{name}/{kind}"] for kind in MOMENTS}
        if state["exp_avg"].shape != parameter.shape:
            raise CheckpointError(f"the checkpoint's optimiser has another shape for {name}")
        optimiser.state[parameter] = {
            kind: value.to(device=parameter.device, copy=True).contiguous() for kind, value in state.items()
        }


@dataclass
class Patience:
    """Counts validations without improvement; what plateau and early stopping each keep."""

    best: float = math.inf
    waited: int = 0

    def improved(self, value: float, delta: float) -> bool:
        """Take in a new value of what is to be minimised."""
        if value < self.best - delta:
            self.best, self.waited = value, 0
            return True
        self.waited += 1
        return False

    def to_dict(self) -> dict[str, Any]:
        raw = asdict(self)
        return {**raw, "best": None if math.isinf(self.best) else self.best}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "Patience":
        return cls(math.inf if raw["best"] is None else float(raw["best"]), int(raw["waited"]))


def lower_on_plateau(lr: float, value: float, patience: Patience, config: OptimConfig) -> float:
    """The learning rate after a validation of `value` (torch's ReduceLROnPlateau, absolute threshold)."""
    if patience.improved(value, config.plateau_delta) or patience.waited <= config.plateau_patience:
        return lr
    patience.waited = 0
    return max(lr * config.plateau_factor, config.lr_min)


def stop_early(value: float, patience: Patience, config: OptimConfig) -> bool:
    """Whether a validation of `value` ends the run (Lightning's EarlyStopping, mode min)."""
    return not patience.improved(value, config.stop_delta) and patience.waited >= config.stop_patience
