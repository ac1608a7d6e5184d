"""One training of scArches 0.6.1, data in memory, in its own environment; prints one JSON object (`timing`).

It is from 2024 and wants shims for today's anndata and scipy; modules that it imports and that training does not
need are stood in for. A batch of scGen costs it time in proportion to all cells, for it takes the rows of a view
of a view anew each time: of its epochs, which take minutes, only the first batches are timed.
"""

import argparse
import contextlib
import io
import sys
import warnings
from functools import partial
from itertools import count
from typing import Any
from unittest.mock import MagicMock

from timing import Timer, answer, programs

UNNEEDED = ("gdown", "requests", "scHPL", "squidpy", "squidpy.datasets", "squidpy.datasets._utils")
SCGEN_BATCHES = 32  # that are timed as if they were an epoch


def shims() -> None:
    warnings.simplefilter("ignore")
    import anndata
    import scipy.sparse

    anndata.read = anndata.read_h5ad
    for kind in (scipy.sparse.csr_matrix, scipy.sparse.csc_matrix):
        kind.A = property(lambda matrix: matrix.toarray())
    for name in UNNEEDED:
        sys.modules.setdefault(name, MagicMock())


def read(options: argparse.Namespace) -> Any:
    """The cells; counts in float32, as these models want them."""
    shims()
    import anndata
    import numpy as np
    import torch

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    np.random.seed(0)
    data = anndata.read_h5ad(options.data)
    data.X = data.X.astype("float32")
    return data


def of_trainer(name: str, options: argparse.Namespace) -> dict[str, float]:
    """trVAE and expiMap: all cells train, so that no validation is run in between."""
    data = read(options)
    import numpy as np
    from scarches.models import EXPIMAP, TRVAE

    given = {"condition_key": "batch", "recon_loss": options.likelihood}
    extra: dict[str, Any] = {}
    if name == "expimap":
        mask = np.zeros((len(sets := programs(options.programs)), data.n_vars), "float32")
        for row, genes in zip(mask, sets.values(), strict=True):
            row[data.var_names.get_indexer(genes)] = 1
        model, extra = EXPIMAP(data, mask=mask, **given), {"alpha": 0.7, "alpha_kl": 0.5, "weight_decay": 0.0}
    else:
        model = TRVAE(data, **given)
    timer = Timer()
    # their callback: `on_epoch_end` of the trainer, which `train` makes
    kind = {"expimap": "expiMapTrainer", "trvae": "trVAETrainer"}[name]
    module = sys.modules[type(model).__module__]
    trainer = getattr(module, kind)

    class Timed(trainer):  # type: ignore[misc, valid-type]
        def on_epoch_end(self) -> None:
            timer.end()
            super().on_epoch_end()

    setattr(module, kind, Timed)
    model.train(
        n_epochs=options.epochs,
        batch_size=options.batch,
        train_frac=1.0,
        use_early_stopping=False,
        monitor=False,
        **extra,
    )
    return timer.result(data.n_obs)


class Enough(Exception):
    """As many batches as were to be timed."""


def scgen(options: argparse.Namespace) -> dict[str, float]:
    data = read(options)
    import scanpy as sc
    import torch
    from scarches.models import scgen as Scgen
    from scarches.trainers.scgen.trainer import vaeArithTrainer

    sc.pp.normalize_total(data, target_sum=1e4)
    sc.pp.log1p(data)
    model = Scgen(data).model
    timer, steps = Timer(), count(1)
    step = torch.optim.Adam.step

    def timed(*arguments: Any, **options_: Any) -> Any:
        result = step(*arguments, **options_)
        if next(steps) % SCGEN_BATCHES == 0:
            timer.end()
            if len(timer.ends) == options.epochs:
                raise Enough
        return result

    torch.optim.Adam.step = timed
    with contextlib.suppress(Enough):
        # the class beside it, scgen.train, hands its batch size on as the fraction of cells to train on
        vaeArithTrainer(model, data, batch_size=options.batch, monitor=False).train(n_epochs=1)
    return timer.result(SCGEN_BATCHES * options.batch)


if __name__ == "__main__":
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        answer({**{name: partial(of_trainer, name) for name in ("trvae", "expimap")}, "scgen": scgen})
    print(printed.getvalue().strip().splitlines()[-1])
