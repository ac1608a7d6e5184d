import io
import json
import pickle  # noqa: TID251  (hostile and foreign files are made here)
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scarcade.engine.errors import ModelFileError, OpenError, UnsafeFileError
from scarcade.models.interop.pickles import read_pickle
from scarcade.models.interop.scvi_tools import build, read_scvi_tools
from scarcade.models.totalvi import Totalvi
from tests.shared import shared


class Calls:
    """Pickles as a call of any function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.made = function, arguments

    def __reduce__(self) -> Any:
        return self.made


def raw_call(module: str, name: str, argument: str) -> bytes:
    """The oldest protocol's GLOBAL, which needs nothing to be importable here."""
    return f"c{module}\n{name}\n(V{argument}\ntR.".encode()


def archive(path: Path, content: bytes, storages: dict[str, bytes] | None = None) -> Path:
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("model/data.pkl", content)
        for key, value in (storages or {}).items():
            out.writestr(f"model/data/{key}", value)
    return path


HOSTILE = {
    "os.system": lambda marker: raw_call("os", "system", f"touch {marker}"),
    "posix.system": lambda marker: raw_call("posix", "system", f"touch {marker}"),
    "eval": lambda marker: raw_call("builtins", "eval", f"open({str(marker)!r}, 'w')"),
    "__builtin__.exec": lambda marker: raw_call("__builtin__", "exec", f"open({str(marker)!r}, 'w')"),
    "subprocess": lambda marker: raw_call("subprocess", "getoutput", f"touch {marker}"),
    "numpy.load": lambda marker: raw_call("numpy", "load", str(marker)),
    "torch.load": lambda marker: raw_call("torch", "load", str(marker)),
    "pathlib": lambda marker: pickle.dumps(Calls(Path.touch, marker)),
    "getattr": lambda marker: pickle.dumps(Calls(getattr, marker, "touch")),
}


@pytest.mark.parametrize("in_archive", [True, False])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_does_nothing(tmp_path: Path, name: str, in_archive: bool) -> None:
    marker = tmp_path / "marker"
    content = HOSTILE[name](marker)
    path = tmp_path / "model.pt"
    if in_archive:
        archive(path, content)
    else:
        path.write_bytes(content)
    with pytest.raises(UnsafeFileError, match="names"):
        read_scvi_tools(path)
    assert not marker.exists()


def test_pandas_and_the_like_are_inert(tmp_path: Path) -> None:
    """`pandas.io.common.os.system` and `pandas.read_pickle` are names within an ignored module."""
    marker = tmp_path / "marker"
    for module, name in (("pandas.io.common", "os.system"), ("pandas.io.pickle", "read_pickle")):
        (tmp_path / "m").write_bytes(raw_call(module, name, f"touch {marker}"))
        assert read_pickle(tmp_path / "m") is None
    assert not marker.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x02",
        b"not a pickle",
        b"\x80\x05\x95\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"(" * 1000 + b"l" * 1000 + b".",
    ],
)
def test_garbage_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m").write_bytes(content)
    with pytest.raises(ModelFileError, match="cannot be read"):
        read_pickle(tmp_path / "m")


def test_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(OpenError, match="no such file"):
        read_pickle(tmp_path / "nothing")
    with pytest.raises(OpenError, match="no model of scvi-tools"):
        read_scvi_tools(tmp_path)


def test_plain_values_and_arrays_come_through(tmp_path: Path) -> None:
    value = {
        "text": "a", "none": None, "numbers": [1, 2.5, True], "nan": float("nan"), "ordered": OrderedDict(a=1),
        "float": np.arange(6.0).reshape(2, 3), "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "big": np.arange(3, dtype=">i4"), "bool": np.array([True, False]), "names": np.array(["x", "yy"], dtype=object),
        "fixed": np.array(["x", "yy"]), "scalar": np.float32(1.5), "empty": np.zeros((0, 3)),
    }  # fmt: skip
    (tmp_path / "m").write_bytes(pickle.dumps(value))
    found = read_pickle(tmp_path / "m")
    assert found["numbers"] == [1, 2.5, True]
    assert (found["text"], found["none"], found["nan"], found["ordered"]) == ("a", None, None, {"a": 1})
    assert found["names"] == found["fixed"] == ["x", "yy"]
    assert found["scalar"] == 1.5
    for key in ("float", "fortran", "big", "bool", "empty"):
        np.testing.assert_array_equal(found[key], value[key])


def test_tensors_come_through(tmp_path: Path) -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    value = {"a": base, "t": base.T, "part": base[1:3, 2:], "int": torch.arange(3), "scalar": torch.tensor(2.0)}
    torch.save(value, tmp_path / "m.pt")
    found = read_pickle(tmp_path / "m.pt")
    for key, tensor in value.items():
        np.testing.assert_array_equal(found[key], tensor.numpy())


def tensor_pickle(size: tuple[int, ...], stride: tuple[int, ...], offset: int, n: int) -> bytes:
    """The bytes that torch.save would write for a tensor, with any numbers."""

    class Reference:
        pass

    class Writer(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", n) if isinstance(obj, Reference) else None

    out = io.BytesIO()
    rebuild = torch._utils._rebuild_tensor_v2
    Writer(out, 2).dump(Calls(rebuild, Reference(), offset, size, stride, False, OrderedDict()))
    return out.getvalue()


@pytest.mark.parametrize(
    ("size", "stride", "offset", "n"),
    [
        ((4, 4), (4, 1), 0, 10),
        ((10,), (1,), 5, 10),
        ((2,), (1000,), 0, 10),
        ((2,), (-1,), 1, 10),
        ((10**6, 10**6), (0, 0), 0, 10),
        ((3,), (1,), 0, 4),
        ((2, 2), (1,), 0, 10),
    ],
)
def test_tensors_beyond_their_bytes_are_refused(tmp_path: Path, size: Any, stride: Any, offset: int, n: int) -> None:
    path = archive(tmp_path / "m.pt", tensor_pickle(size, stride, offset, n), {"0": struct.pack("10f", *range(10))})
    with pytest.raises(ModelFileError, match=r"tensor|storage"):
        read_pickle(path)


def test_a_compressed_storage_is_refused(tmp_path: Path) -> None:
    """It could be small in the file and large in memory."""
    with zipfile.ZipFile(tmp_path / "m.pt", "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("model/data.pkl", tensor_pickle((10,), (1,), 0, 10))
        out.writestr("model/data/0", bytes(40))
    with pytest.raises(ModelFileError, match="compressed"):
        read_pickle(tmp_path / "m.pt")


@pytest.mark.parametrize("drop", ["model_state_dict", "var_names", "attr_dict"])
def test_a_model_with_a_part_missing(tmp_path: Path, drop: str) -> None:
    content = {"model_state_dict": OrderedDict(), "var_names": np.array(["a"], dtype=object), "attr_dict": {}}
    (tmp_path / "model.pt").write_bytes(pickle.dumps({k: v for k, v in content.items() if k != drop}))
    with pytest.raises(ModelFileError, match=drop):
        read_scvi_tools(tmp_path)


@pytest.mark.parametrize(
    ("folder", "version", "genes", "batches"),
    [
        ("archmap_scVI_pancreas", "0.16.1", 1000, ("Pancreas CelSeq", "Pancreas Fluidigm C1", "Pancreas inDrop")),
        ("scvi_data_0150_scvi", "0.15.5", 100, ("batch_0", "batch_1")),
        ("testing_models/080_scvi", "0.0.0", 100, ("batch_0", "batch_1")),
    ],
)
def test_models_of_other_people(folder: str, version: str, genes: int, batches: tuple[str, ...]) -> None:
    model = read_scvi_tools(shared(f"data/checkpoints/{folder}"))
    assert model.record is not None
    assert model.record["version"] == version
    assert (model.schema.n_genes, model.schema.batch.values) == (genes, batches)
    assert len(model.schema.labels) == 1
    if folder.startswith("archmap"):
        assert (model.config.encode_covariates, model.config.deeply_inject_covariates) == (True, False)
        assert (model.config.use_layer_norm, model.config.use_batch_norm) == ("both", "none")


@pytest.mark.parametrize(
    ("folder", "formulation"), [("scvi_tools_exp_activation_totalvi", "1.0"), ("scvi_data_0150_totalvi", "1.3.1")]
)
def test_totalvi_models_of_other_people(folder: str, formulation: str) -> None:
    model = read_scvi_tools(shared(f"data/checkpoints/{folder}"))
    assert isinstance(model, Totalvi)
    assert isinstance(model.config, Totalvi.Config)
    assert model.config.formulation == formulation
    assert model.schema.n_genes == 100
    assert len(model.schema.proteins) == model.background.mean.rows.shape[1]


def test_a_totalvi_of_before_its_name_was_saved_is_known_by_its_tensors() -> None:
    folder = shared("data/checkpoints/testing_models/080_totalvi")
    with pytest.raises(ModelFileError, match=r"TOTALVI model of a scvi-tools before 0\.15; those since") as told:
        read_scvi_tools(folder)
    assert "\n" not in str(told.value)
    with pytest.raises(ModelFileError, match=r"TOTALVI model of scvi-tools 0\.14\.2"):
        build({"background_pro_alpha": np.zeros(1)}, ["g"], {"scvi_setup_dict_": {"scvi_version": "0.14.2"}}, where="x")


def test_settings_that_cannot_be_are_told_in_one_line() -> None:
    mapping = {"state_registry": {"categorical_mapping": ["a"], "original_key": "batch"}}
    attributes = {
        "registry_": {"model_name": "SCVI", "field_registries": {"batch": mapping}},
        "init_params_": {"n_hidden": "many", "foo": 1},
    }
    with pytest.raises(ModelFileError, match=r"^there: n_hidden: [^\n]*; foo: [^\n]*$"):
        build({}, ["g0"], attributes, where="there")


def test_other_classes_say_what_they_are() -> None:
    with pytest.raises(ModelFileError, match="PEAKVI"):
        build({}, ["g0"], {"registry_": {"model_name": "PEAKVI"}}, where="there")


def test_the_reader_imports_neither_torch_nor_ours() -> None:
    from scarcade.models.interop import unpickle

    source = Path(unpickle.__file__).read_text()
    assert "import torch" not in source
    assert "from scarcade" not in source
    assert json.dumps(unpickle.INERT)
