"""Calls the job of an update by Adam (`adam_job`): keeps its record from step to step."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from scarcade.engine import adam_job, crew
from scarcade.engine.adam_job import EACH, HEAD
from scarcade.engine.addresses import address_of
from scarcade.engine.pool import threads

FEW = 1 << 16  # numbers of all parameters that one thread moves by itself


def can(parameters: Sequence[nn.Parameter]) -> bool:
    """Whether the job can be done: for float32 on a CPU, on Linux, one number behind the other."""
    return crew.can_be_had() and all(
        one.device.type == "cpu" and one.dtype == torch.float32 and one.is_contiguous() for one in parameters
    )


class Moved:
    """Some parameters with their moments, as the job takes them."""

    def __init__(
        self, parameters: Sequence[nn.Parameter], states: Sequence[Mapping[str, Tensor]], hyper: Sequence[float]
    ) -> None:
        """`hyper`: epsilon, weight decay, and the two betas."""
        eps, weight_decay, *self._betas = hyper
        self.parameters, self.states = list(parameters), list(states)
        self._kept = [(state["exp_avg"], state["exp_avg_sq"]) for state in states]
        self._steps: list[np.ndarray] = [state["step"].numpy() for state in states]  # the same memory
        first, second = self._betas
        self._hyper = np.array([eps, weight_decay, 1 - first, second, 1 - second], np.float32)
        self._factors = np.empty((len(parameters), 2), np.float32)
        self._found = np.zeros(1, np.int64)
        self._n_all = sum(one.numel() for one in parameters)
        self._record = np.empty(HEAD + len(parameters) * EACH, np.int64)
        self._each = each = self._record[HEAD:].reshape(-1, EACH)
        each[:, adam_job.PARAMETER] = [one.data_ptr() for one in parameters]
        each[:, adam_job.MEAN] = [address_of(state["exp_avg"]) for state in states]
        each[:, adam_job.SQUARE] = [address_of(state["exp_avg_sq"]) for state in states]
        each[:, adam_job.COUNT] = [one.numel() for one in parameters]
        each[:, adam_job.FACTORS] = address_of(self._factors) + 8 * np.arange(len(parameters))

    def are(self, parameters: Sequence[nn.Parameter], states: Sequence[Mapping[str, Tensor]]) -> bool:
        """Whether they are these, where they were."""
        if len(parameters) != len(self.parameters):
            return False
        pairs = zip(parameters, self.parameters, states, self.states, strict=True)
        same = all(one is other and state is kept for one, other, state, kept in pairs)
        return same and [one.data_ptr() for one in parameters] == self._each[:, adam_job.PARAMETER].tolist()

    def update(self, lr: float) -> bool:
        """Move them by their gradients, if all of these are numbers; else change nothing, and return False."""
        crew_ = crew.crew_of(threads() if self._n_all > FEW else 1)
        crew_.wake()
        gradients = [one.grad.contiguous() for one in self.parameters if one.grad is not None]
        self._each[:, adam_job.GRADIENT] = [one.data_ptr() for one in gradients]
        made = [float(step) for step in self._steps]
        for n in set(made):  # nearly always one
            first, second = (1 - beta ** (n + 1) for beta in self._betas)
            self._factors[[one == n for one in made]] = -lr / first, math.sqrt(second)
        if len(self._found) != crew_.n:
            self._found = np.zeros(crew_.n, np.int64)
        numbers = crew_.address, crew_.n, len(gradients), self._n_all, address_of(self._found), address_of(self._hyper)
        self._record[:HEAD] = numbers
        crew_.begin(adam_job.job, self._record, (self, gradients))
        crew_.join()
        if self._found.any():
            return False
        for step in self._steps:
            step[()] += 1
        return True
