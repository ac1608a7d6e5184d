"""Tables of queries."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import pytest

from scarcade.engine.errors import OpenError, UsageError
from scarcade.jobs.cli import main
from scarcade.jobs.manifest import is_manifest, rows_of
from scarcade.jobs.queries import tasks_of
from tests.jobs.conftest import Atlas
from tests.jobs.test_queries import touch


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def table(folder: Path, text: str, name: str = "queries.csv") -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_a_row_has_options_of_its_own_and_the_commands_where_it_has_none(tmp_path: Path) -> None:
    touch(tmp_path / "in" / "a.h5ad", tmp_path / "in" / "b.h5ad")
    path = table(
        tmp_path,
        "\ufeffPath,Batch Key,NAME,label-key,layer\n"
        "in/a.h5ad,donor,Patient 1,cell_type; coarse ;,counts\n"
        "\n"
        f'{tmp_path}/in/b.h5ad,,"",\n',
    )
    one, other = tasks_of(path, batch_key="batch", label_keys=["label"], layer="X")
    assert (one.name, one.batch_key, one.label_keys, one.layer) == (
        *("Patient 1", "donor"),
        ("cell_type", "coarse"),
        "counts",
    )
    assert (other.name, other.batch_key, other.label_keys, other.layer) == ("b", "batch", ("label",), "X")
    assert [Path(task.source) for task in (one, other)] == [tmp_path / "in" / f"{name}.h5ad" for name in "ab"]


def test_a_table_stands_beside_other_paths_and_its_names_are_kept(tmp_path: Path) -> None:
    touch(tmp_path / "x.h5ad", tmp_path / "in" / "x.h5ad", tmp_path / "in" / "y.h5ad")
    path = table(tmp_path, "name\tpath\nX\tin/y.h5ad\n\tin/x.h5ad\n", "q.tsv")
    tasks = tasks_of([tmp_path / "x.h5ad", path])
    assert [task.name for task in tasks] == ["x-2", "X", "x-3"]


def test_a_file_may_be_several_queries_if_they_differ(tmp_path: Path) -> None:
    touch(tmp_path / "a.h5ad")
    path = table(tmp_path, "path,batch_key,name\na.h5ad,donor,\na.h5ad,donor,\na.h5ad,site,\na.h5ad,donor,mine\n")
    assert [(task.name, task.batch_key) for task in tasks_of(path)] == [
        *(("a", "donor"), ("a-2", "site")),
        ("mine", "donor"),
    ]


def test_what_a_row_names_and_is_not_there_is_a_query_all_the_same(tmp_path: Path) -> None:
    path = table(tmp_path, "path\nnone.h5ad\nno/*.h5ad\ns3://bucket/none.h5ad\n")
    tasks = tasks_of(path)
    assert [task.name for task in tasks] == ["none", "_", "none-2"]
    with pytest.raises(OpenError, match=r"none\.h5ad"):
        tasks[0].content_hash()


def test_a_row_may_stand_for_a_folder_unless_it_has_a_name(tmp_path: Path) -> None:
    touch(tmp_path / "in" / "a.h5ad", tmp_path / "in" / "b.h5ad")
    assert [task.name for task in tasks_of(table(tmp_path, "path,batch_key\nin,donor\n"))] == ["a", "b"]
    with pytest.raises(UsageError, match="stands for 2 files"):
        tasks_of(table(tmp_path, "path,name\nin,both\n"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is empty"),
        ("file,name\nx,y\n", r"column 'file'"),
        ("name,batch_key\nx,y\n", "no column path"),
        ("path,batchkey\n", "did you mean batch_key"),
        ("path;name\nx;y\n", "stand between ','"),
        ("path,PATH\n", "column path twice"),
        ("path,name\n,x\n", "line 2: has no path"),
        ("path\na,b\n", "line 2: has 2 cells"),
        ("path,name\na,x\nb,X\n", "lines 2 and 3 have the same name"),
        ('path\n"a\n', "is not CSV"),
    ],
)
def test_what_cannot_be_meant_is_told(text: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=reason):
        rows_of(table(tmp_path, text))


def test_a_table_that_is_not_there_or_not_text_is_told(tmp_path: Path) -> None:
    with pytest.raises(OpenError, match="no such file"):
        tasks_of(tmp_path / "none.csv")
    (tmp_path / "binary.csv").write_bytes(b"path\n\xff\xfe")
    with pytest.raises(OpenError, match="not UTF-8"):
        rows_of(tmp_path / "binary.csv")
    with pytest.raises(UsageError, match="no query"):
        tasks_of(table(tmp_path, "path,name\n"))


def test_a_row_whose_file_is_missing_fails_alone(
    atlas: Atlas, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = table(tmp_path, f"path,name,batch_key\n{atlas.query},mine,batch\nnone.h5ad,,\n{atlas.query},whole,\n")
    argv = ["map", atlas.model, path, "--out", tmp_path / "out", "--epochs", 1, "--results", "zarr"]
    assert main([str(part) for part in [*argv, "--merge", tmp_path / "all.zarr"]]) == 3
    assert "none.h5ad: there is no such file" in capsys.readouterr().err
    rows = {row["name"]: row for row in json.loads((tmp_path / "out" / "summary.json").read_text())["queries"]}
    assert {name: row["state"] for name, row in rows.items()} == {"mine": "done", "none": "failed", "whole": "done"}
    found = ad.read_zarr(tmp_path / "all.zarr")
    assert set(found.obs["batch"][found.obs["query"] == "mine"]) == {atlas.new_batch}
    assert set(found.obs["batch"][found.obs["query"] == "whole"]) == {"whole"}
    assert main(["map", str(atlas.model), str(tmp_path / "none.h5ad"), "--out", str(tmp_path / "other")]) == 4
    assert not (tmp_path / "other").exists()


def test_a_table_is_known_by_its_ending() -> None:
    assert is_manifest("a/Q.CSV")
    assert is_manifest(Path("q.tsv"))
    assert not is_manifest("q.h5ad")
    assert not is_manifest("https://server/q.csv")
