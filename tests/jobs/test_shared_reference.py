"""A reference as arrays and plain values is the same reference again, and leaves large arrays where they are."""

import numpy as np
import torch

from scarcade.jobs.reference import TransferConfig, load_reference
from scarcade.jobs.shared_reference import n_bytes, packed, unpacked
from tests.jobs.conftest import Atlas


def test_a_reference_comes_back_as_it_was(atlas: Atlas) -> None:
    reference = load_reference(atlas.model, TransferConfig(k=7, edit=True), seed=3)
    values = packed(reference)
    assert reference.latent is not None
    assert reference.transfer is not None
    for array in (values["latent"]["mean"], *values["weights"].values()):
        array.flags.writeable = False  # as it comes out of the object store
    again = unpacked(values)
    assert again.latent is not None
    assert again.transfer is not None
    assert again.latent.mean is reference.latent.mean
    assert (again.path, again.fingerprint) == (reference.path, reference.fingerprint)
    assert (again.schema, again.contradicted) == (reference.schema, reference.contradicted)
    assert again.model.record == reference.model.record
    assert not again.model.training
    weights = again.model.state_dict()
    assert weights.keys() == reference.model.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in reference.model.state_dict().items())
    with torch.no_grad():
        next(again.model.parameters()).add_(1)  # its own memory
    cells = reference.latent.mean[:50] + 0.1
    assert again.transfer.usual == reference.transfer.usual
    for one, other in zip(again.transfer.predict(cells), reference.transfer.predict(cells), strict=True):
        np.testing.assert_array_equal(one.codes, other.codes)
        np.testing.assert_array_equal(one.uncertainty, other.uncertainty)
    assert n_bytes(values) > 2 * reference.latent.mean.nbytes


def test_a_reference_without_a_latent_is_shared_too(atlas: Atlas) -> None:
    from dataclasses import replace

    bare = replace(load_reference(atlas.model, TransferConfig()), latent=None, transfer=None)
    again = unpacked(packed(bare))
    assert again.latent is None
    assert again.transfer is None
