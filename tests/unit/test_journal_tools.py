"""jd-hpc journal: show, export and merge."""

from __future__ import annotations

import csv
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from journal_helpers import Counted, block_bounds, contents, names, squares

import jd_hpc
from jd_hpc import cli
from jd_hpc.journal_lock import JournalLock

RECORD = np.dtype([("x", ">f8"), ("in", [("a", "i2"), ("z", "c16")]), ("v", "f4", (2,))])


@pytest.fixture
def call(capsys):
    """Run the command, and return (exit code, stdout, stderr)."""

    def run(*words):
        code = cli.main(["journal", *map(str, words)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.journal"


def with_holes(path):
    sweep = squares(20)
    sweep.bad = (4, 9, 10)
    sweep.run(journal=path)


def test_show(path, call):
    with_holes(path)
    code, out, err = call("show", path)
    facts = dict(line.split(":", 1) for line in out.splitlines())
    assert (code, err) == (0, "")
    assert {name: text.strip() for name, text in facts.items()} | {"begun": "", "bytes": ""} == {
        "results": "17, numbers up to 19", "missing below": "3: 3, 8-9", "results are": "('<f8', ())", "jobs are": "('<f8', ())",
        "class": "Counted", "begun": "", "bytes": "", "written by": "nobody now",
    }  # fmt: skip
    assert int(facts["bytes"]) == path.stat().st_size


def test_show_tells_who_writes_and_what_is_torn(path, call):
    squares(3).run(journal=path)
    lock = JournalLock(str(path))
    end = path.stat().st_size
    with path.open("ab") as file:
        file.write(b"half a block")
    _, out, _ = call("show", path)
    assert f"process {os.getpid()} on " in out
    assert f"from byte {end} on (being written now, or torn)" in out
    lock.release()


def test_an_empty_journal(path, call, tmp_path):
    squares(0).run(journal=path)
    assert "results:        0\n" in call("show", path)[1]
    assert call("export", path)[1] == "index,result\n"
    assert call("export", path, tmp_path / "a.npy")[0] == 0
    assert np.load(tmp_path / "a.npy").shape == (0,)
    assert call("export", path, tmp_path / "a.parquet")[0] == 0


def test_errors_are_one_line(path, call, tmp_path):
    assert call("show", path) == (2, "", f"jd-hpc journal show: the journal {path} cannot be opened: No such file or directory\n")
    squares(2).run(journal=path)
    code, _, err = call("export", path, tmp_path / "a.xls")
    assert code == 2
    assert "the name must end in .csv, .npy, .parquet" in err
    code, _, err = call("export", path, tmp_path / "nowhere" / "a.csv")
    assert code == 2
    assert "cannot be written: No such file" in err
    code, _, err = call("merge", path, path)
    assert code == 2
    assert "is there already" in err


def test_a_journal_is_not_exported_into_itself(tmp_path, call):
    path = tmp_path / "results.csv"
    squares(2).run(journal=path)
    before = path.read_bytes()
    code, _, err = call("export", path, path)
    assert code == 2
    assert "is the journal itself; name another file" in err
    assert path.read_bytes() == before


def test_results_that_do_not_fit(path, call, tmp_path):
    pytest.importorskip("pyarrow")
    Counted([1, 2], lambda job: 2**80 + job).run(journal=path)
    code, _, err = call("export", path, tmp_path / "a.parquet")
    assert code == 2
    assert "the results do not fit into " in err
    assert "export them as .csv" in err


# ---- export ----------------------------------------------------------------------------------------------------------


def test_csv(path, call, tmp_path):
    with_holes(path)
    code, out, err = call("export", path)
    rows = list(csv.reader(io.StringIO(out)))
    assert rows[0] == ["index", "result"]
    assert [(int(i), float(x)) for i, x in rows[1:]] == [(i, float(i * i)) for i in range(20) if i not in (3, 8, 9)]
    assert (code, err) == (0, "3 jobs have no result: 3, 8-9\n")
    assert call("export", path, tmp_path / "a.csv")[1] == ""
    assert (tmp_path / "a.csv").read_text() == out


def test_numbers_in_csv_are_exact(path, call):
    values = [0.1, 1 / 3, 1e-300, -0.0, np.inf, np.nan]
    Counted(values, lambda job: job, "f8", "f8").run(journal=path)
    out = call("export", path)[1]
    back = [float(line.split(",")[1]) for line in out.splitlines()[1:]]
    assert np.array(back).tobytes() == np.array(values).tobytes()


def records(path):
    jobs = list(range(5))
    Counted(jobs, lambda job: (job / 3, (job, job * 1j), (job, np.nan)), "i8", RECORD).run(journal=path)
    return [(job / 3, (job, job * 1j), [job, np.nan]) for job in jobs]


def test_records_are_flattened(path, call, tmp_path):
    records(path)
    lines = call("export", path)[1].splitlines()
    assert lines[0] == "index,x,in.a,in.z,v[0],v[1]"
    assert lines[3] == "2,0.6666666666666666,2,2j,2.0,nan"
    assert call("export", path, tmp_path / "a.parquet")[0] == 0
    table = pytest.importorskip("pyarrow.parquet").read_table(tmp_path / "a.parquet").to_pydict()
    assert list(table) == ["index", "x", "in.a", "in.z", "v[0]", "v[1]"]
    assert table["x"] == [i / 3 for i in range(5)]
    assert table["in.z"] == [str(i * 1j) for i in range(5)]


@pytest.mark.parametrize("dtype", ["f8", ">i4", ("f8", (2, 3)), RECORD, "M8[ns]", "U4"], ids=str)
def test_npy(path, call, tmp_path, dtype):
    given = np.zeros(7, np.dtype(dtype))
    if given.dtype.names is None:
        given[...] = np.arange(given.size).reshape(given.shape).astype(given.dtype)
    else:
        given["x"] = np.arange(7) / 7
    sweep = Counted(list(range(7)), lambda job: given[job], "i8", dtype)
    sweep.bad = (3,)
    sweep.run(journal=path)
    assert call("export", path, tmp_path / "a.npy")[0] == 0
    loaded = np.load(tmp_path / "a.npy")
    assert loaded["index"].tolist() == [0, 1, 3, 4, 5, 6]
    assert loaded["result"].dtype == given.dtype
    assert loaded["result"].tobytes() == given[loaded["index"]].tobytes()


def test_objects(path, call, tmp_path):
    Counted(list(range(4)), lambda job: [1, 2.5, "text", (1, 2)][job]).run(journal=path)
    assert call("export", path)[1].splitlines() == ["index,result", "0,1", "1,2.5", "2,text", '3,"(1, 2)"']
    code, _, err = call("export", path, tmp_path / "a.npy")
    assert code == 2
    assert "make no array; export them as .csv" in err
    assert call("export", path, tmp_path / "a.parquet")[0] == 0
    table = pytest.importorskip("pyarrow.parquet").read_table(tmp_path / "a.parquet").to_pydict()
    assert table == {"index": [0, 1, 2, 3], "result": ["1", "2.5", "text", "(1, 2)"]}


def test_objects_that_are_numbers(path, call, tmp_path):
    Counted(list(range(4)), lambda job: np.arange(3) + job / 2).run(journal=path)
    assert call("export", path, tmp_path / "a.npy")[0] == 0
    assert np.array_equal(np.load(tmp_path / "a.npy")["result"], np.arange(3) + np.arange(4)[:, None] / 2)
    numbers = path.with_name("numbers")
    Counted(list(range(4)), float).run(journal=numbers)
    assert call("export", numbers, tmp_path / "b.parquet")[0] == 0
    assert pytest.importorskip("pyarrow.parquet").read_table(tmp_path / "b.parquet")["result"].to_pylist() == [0, 1, 2, 3]


def test_large_results(path, call, tmp_path):
    Counted(list(range(3)), lambda job: np.arange(1 << 20) * float(job), "i8", ("f8", 1 << 20)).run(journal=path)
    code, _, err = call("export", path)
    assert code == 2
    assert "more than 10000 numbers each: too many columns; take .npy" in err
    assert call("export", path, tmp_path / "a.npy")[0] == 0
    assert np.array_equal(np.load(tmp_path / "a.npy")["result"], np.arange(1 << 20) * np.arange(3.0)[:, None])


def test_many_results_are_exported_in_parts(path, call, tmp_path, monkeypatch):
    monkeypatch.setattr("jd_hpc.journal_tools.PART_BYTES", 1000)
    squares(700, grain=50).run(journal=path)
    for end in ("csv", "npy", "parquet"):
        assert call("export", path, tmp_path / f"a.{end}")[0] == 0
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 701
    assert np.array_equal(np.load(tmp_path / "a.npy")["result"], np.arange(700.0) ** 2)
    assert pytest.importorskip("pyarrow.parquet").read_table(tmp_path / "a.parquet")["index"].to_pylist() == list(range(700))
    assert call("merge", tmp_path / "b.journal", path)[0] == 0
    assert contents(tmp_path / "b.journal")[0] == contents(path)[0]


def test_without_pyarrow(path, call, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    squares(2).run(journal=path)
    code, _, err = call("export", path, tmp_path / "a.parquet")
    assert code == 2
    assert "pip install pyarrow" in err


def test_no_mpi_is_needed(path):
    squares(3).run(journal=path)
    code = f"""
import sys
from jd_hpc import cli
assert cli.main(["journal", "export", {str(path)!r}]) == 0
assert not [name for name in sys.modules if name.startswith(("mpi4py", "jd_hpc._core"))]
"""
    env = os.environ | {"PYTHONPATH": str(Path(jd_hpc.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=env)
    assert (done.returncode, done.stdout) == (0, "index,result\n0,0.0\n1,1.0\n2,4.0\n"), done.stderr


def test_head_has_seen_enough(path):
    squares(20_000, grain=1000).run(journal=path)
    env = os.environ | {"PYTHONPATH": str(Path(jd_hpc.__file__).parent.parent)}
    command = f"set -o pipefail; {sys.executable} -m jd_hpc.cli journal export {path} | head -2"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (0, "index,result\n0,0.0\n", "")


# ---- merge -----------------------------------------------------------------------------------------------------------


def task(path, jobs):
    """Run a task of an array: a part of the jobs, numbered from 0."""
    Counted(jobs, lambda job: job * job, "f8", "f8").run(journal=path)


def test_tasks_that_take_jobs_in_turn(tmp_path, call):
    jobs = [float(i) for i in range(20)]
    for number in range(3):
        task(tmp_path / f"{number}", jobs[number::3])
    files = [tmp_path / f"{number}" for number in range(3)]
    code, _, err = call("merge", tmp_path / "all", *files)
    assert code == 2
    assert "different job sets. Journals of array tasks" in err
    assert not (tmp_path / "all").exists()
    code, out, _ = call("merge", tmp_path / "all", *files, "--interleave")
    assert (code, out) == (0, f"{tmp_path / 'all'}: 20 results, 0 missing\n")
    whole = squares(20)
    whole.run(journal=tmp_path / "all")
    assert (whole.evaluated, len(whole.stored)) == (0, 20)


def test_tasks_that_take_jobs_in_pieces(tmp_path, call):
    jobs = [float(i) for i in range(20)]
    for number in range(4):
        task(tmp_path / f"{number}", jobs[5 * number : 5 * number + 5])
    assert call("merge", tmp_path / "all", "--append", *(tmp_path / f"{number}" for number in range(4)))[0] == 0
    whole = squares(25)
    whole.run(journal=tmp_path / "all")
    assert (whole.evaluated, len(whole.stored)) == (5, 20)


def test_journals_of_one_job_set(tmp_path, call):
    for name, bad in (("a", (2, 3, 4)), ("b", (1, 2))):
        sweep = Counted([{"i": i} for i in range(10)], lambda job: [job["i"]] * 3)
        sweep.bad = bad
        sweep.run(journal=tmp_path / name)
    code, out, _ = call("merge", tmp_path / "all", tmp_path / "a", tmp_path / "b")
    assert (code, out) == (0, f"{tmp_path / 'all'}: 9 results, 1 missing: 1\n")
    whole = Counted([{"i": i} for i in range(10)], lambda job: [job["i"]] * 3)
    whole.run(journal=tmp_path / "all")
    assert whole.evaluated == 1
    assert whole.results == {i: [i] * 3 for i in range(10)}


def test_a_damaged_journal_is_made_whole(path, tmp_path, call):
    for count in (100, 200, 300):
        squares(count).run(journal=path)
    data = bytearray(path.read_bytes())
    begin, end = block_bounds(path)[1]
    data[begin + 60] ^= 4
    path.write_bytes(data)
    with pytest.raises(jd_hpc.JournalFormatError, match="200 results are whole, 100 of them behind the damage"):
        squares(300).run(journal=path)
    assert f"not whole:      bytes {begin} to {end}" in call("show", path)[1]
    code, out, err = call("merge", tmp_path / "new", path)
    assert (code, out) == (0, f"{tmp_path / 'new'}: 200 results, 100 missing: 100-199\n")
    assert err == f"{path}: passed over what is not whole: bytes {begin} to {end}\n"
    again = squares(300)
    again.run(journal=tmp_path / "new")
    assert (again.evaluated, len(again.stored)) == (100, 200)


def test_journals_of_different_kinds(tmp_path, call):
    squares(3).run(journal=tmp_path / "a")
    Counted([1], lambda job: job).run(journal=tmp_path / "b")
    code, _, err = call("merge", tmp_path / "all", tmp_path / "a", tmp_path / "b")
    assert code == 2
    assert "of different dtypes" in err
    assert names(tmp_path) == ["a", "b"]
