"""The search space: fields of a training's configuration with what each may be, and the trials drawn from it.

Everything is checked against the real configuration before anything starts: a field that does not exist, or one value
of many that it cannot have, would otherwise be found out by a trial that fails in the night. The n-th random trial is a
function of the space, the seed and n alone, so a search that is continued, or asked for more trials, has the same ones.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from scarcade.dataloaders.store import Store
from scarcade.engine.config import merged, nested
from scarcade.engine.errors import UsageError
from scarcade.jobs.options import sections_of
from scarcade.jobs.settings import check_known, settings_of
from scarcade.jobs.train_config import TrainConfig, resolved
from scarcade.jobs.tune_domain import KINDS, Choice, Domain, domain_of

Space = Mapping[str, Domain]
Parameters = dict[str, Any]

_FIXED = {
    "scale.": "is where and how fast a trial is computed",
    "checkpoint.": "is where and how fast a trial is computed",
    "log.": "is where curves of a training go",
    "data.validation": "decides which cells the trials are compared on, which must be the same for all",
    "optim.epochs": "is what the scheduler gives and takes: --epochs says how many a trial has at most",
    "optim.max_steps": "is what the scheduler gives and takes: --epochs says how many a trial has at most",
    "optim.validate_every": "decides when trials are compared, which must be the same for all",
}
_OF_ITS_OWN = ("seed", "recipe")  # fields of the whole, not of a section


class Fixed:
    """What all trials have in common: the settings that `train` would take, and the store.

    Args:
        given: as `train_config.resolved` takes it.
    """

    def __init__(self, given: Mapping[str, Any], *, name: str | None, recipe: str | None, seed: int) -> None:
        self.given, self.name, self.recipe, self.seed = dict(given), name, recipe, seed

    def config(self, parameters: Mapping[str, Any], store: Store) -> TrainConfig:
        """The whole configuration of a trial with these `parameters`.

        Raises:
            UsageError: it cannot be.
        """
        own = dict(parameters)
        recipe, seed = own.pop("recipe", self.recipe), own.pop("seed", self.seed)
        return resolved(merged(self.given, nested(own)), name=self.name, recipe=recipe, seed=seed, store=store)

    def record(self) -> dict[str, Any]:
        """Plain values, to be sent to workers and made anew there."""
        return {"given": self.given, "name": self.name, "recipe": self.recipe, "seed": self.seed}


def space_of(table: Mapping[str, Any]) -> dict[str, Domain]:
    """The space of the table ``[space]``, whose fields may be dotted names or tables in tables.

    Raises:
        UsageError: it is empty, or a domain cannot be meant.
    """
    found: dict[str, Domain] = {}
    for name, given in _leaves(table):
        if name in found:
            raise UsageError(f"[space] {name}: stands there twice")
        found[name] = domain_of(name, given)
    if not found:
        raise UsageError('[space]: is empty; give what to search, as in "optim.lr" = {loguniform = [1e-4, 1e-2]}')
    return found


def _leaves(table: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in table.items():
        name = f"{prefix}{key}".replace("-", "_")
        above = isinstance(value, Mapping) and value and not set(value) & set(KINDS)
        if above and all(isinstance(below, Mapping) for below in value.values()):
            found += _leaves(value, f"{name}.")
        else:
            found.append((name, value))
    return found


def check_space(space: Space, fixed: Fixed, store: Store) -> None:
    """Try every field, with values of its domain, on the real configuration.

    Raises:
        UsageError: with the name of the field and the value that it cannot have.
    """
    known = settings_of(sections_of("train", fixed.name or "scvi"))
    base = fixed.config({}, store)
    for field, domain in space.items():
        for fixed_field, why in _FIXED.items():
            if field.startswith(fixed_field) if fixed_field.endswith(".") else field == fixed_field:
                raise UsageError(f"[space] {field}: cannot be searched: it {why}")
        if field not in _OF_ITS_OWN:
            try:
                check_known(field.replace("_", "-"), known, "tune", "[space]")
            except UsageError as error:
                raise UsageError(str(error).replace("--", "")) from error
        section, _, leaf = field.partition(".")
        if leaf and leaf in (fixed.given.get(section) or {}):
            raise UsageError(f"[space] {field}: is fixed too (--{field.replace('_', '-')}); leave out one of them")
        for value in domain.probes():
            try:
                fixed.config({field: value}, store)
            except UsageError as error:
                raise UsageError(f"[space] {field}: cannot be {value!r}: {error}") from error
    if base.data.validation == 0 or store.n_before(base.data.validation) == 0:
        raise UsageError("--data.validation 0: trials are compared on held-out cells; leave it at 0.1")


def random_parameters(space: Space, seed: int, number: int) -> Parameters:
    """Those of the random trial `number` (from 0).

    Each field has a generator of its own, so that the order in which they stand in the file does not matter.
    """
    return {
        field: domain.drawn(np.random.default_rng([seed, number, *field.encode()])) for field, domain in space.items()
    }


def all_parameters(space: Space) -> list[Parameters]:
    """Every combination of the values of a space of choices and grids, the last field changing first.

    Raises:
        UsageError: a field has a range.
    """
    values = []
    for field, domain in space.items():
        if not isinstance(domain, Choice):
            raise UsageError(f"[space] {field}: --tune.search grid wants {{grid = [...]}} or {{choice = [...]}}")
        values.append(domain.values)
    return [dict(zip(space, combination, strict=True)) for combination in itertools.product(*values)]


def defaults_of(space: Space, fixed: Fixed, store: Store) -> Parameters:
    """What the fields of the space are where nothing is searched."""
    base = fixed.config({}, store).model_dump(mode="json")
    found: Parameters = {}
    for field in space:
        section, _, leaf = field.partition(".")
        found[field] = base[section].get(leaf) if leaf else base[section]
    return found


def described(space: Space, table: Mapping[str, Any]) -> dict[str, Any]:
    """Field -> its domain as it was given, for records and the report."""
    given = dict(_leaves(table))
    return {field: given[field] for field in space}
