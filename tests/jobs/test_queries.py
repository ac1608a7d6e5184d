"""Names and tasks of queries."""

from pathlib import Path

import anndata as ad
import numpy as np
import pytest

from scarcade.engine.errors import OpenError, UsageError
from scarcade.jobs.queries import distinct, safe, tasks_of


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        ad.AnnData(np.ones((2, 3), np.float32)).write_h5ad(path)


def test_folders_globs_and_files_are_each_taken_once(tmp_path: Path) -> None:
    touch(tmp_path / "a" / "x.h5ad", tmp_path / "a" / "y.h5ad", tmp_path / "b" / "x.h5ad")
    (tmp_path / "a" / "notes.txt").write_text("no query")
    tasks = tasks_of([tmp_path / "a", str(tmp_path / "*" / "x.h5ad"), tmp_path / "a" / "y.h5ad"], batch_key="donor")
    assert [(task.name, Path(task.source).parent.name) for task in tasks] == [("x", "a"), ("y", "a"), ("x-2", "b")]
    assert {task.batch_key for task in tasks} == {"donor"}


def test_nothing_found_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OpenError, match=r"none\.h5ad"):
        tasks_of([tmp_path / "none.h5ad"])
    with pytest.raises(UsageError, match="no query"):
        tasks_of([])


def test_objects_and_mappings_are_queries_too() -> None:
    one, two = ad.AnnData(np.ones((2, 3), np.float32)), ad.AnnData(np.zeros((2, 3), np.float32))
    assert [task.name for task in tasks_of([one, two])] == ["query", "query-2"]
    assert [task.name for task in tasks_of({"patient 7": one})] == ["patient 7"]
    first, second = tasks_of([one, two])
    assert first.content_hash() != second.content_hash()
    assert first.content_hash() == tasks_of(one.copy())[0].content_hash()


def test_names_are_distinct_whatever_the_file_system_thinks_of_case() -> None:
    assert distinct(["a", "A", "a", "a-2"]) == ["a", "A-2", "a-3", "a-2-2"]


def test_names_are_file_names() -> None:
    assert safe("../../etc/passwd") == "_.._etc_passwd"
    assert safe("...") == "query"
    assert safe("a\x00b\nc") == "a_b_c"
    assert len(safe("x" * 10_000)) <= 120
    assert len(safe("é" * 10_000).encode()) <= 120


def test_a_hash_follows_the_bytes(tmp_path: Path) -> None:
    touch(tmp_path / "x.h5ad")
    before = tasks_of(tmp_path / "x.h5ad")[0].content_hash()
    with open(tmp_path / "x.h5ad", "ab") as file:
        file.write(b"\0")
    assert tasks_of(tmp_path / "x.h5ad")[0].content_hash() != before
