"""results/improvement.py: measures of records made by hand, the tables, all that is generated."""

import csv
import json
import subprocess
import sys

import pytest
from conftest import ROOT, load_script

pytest.importorskip("rliable", reason="pip install -r results/requirements.txt")
RECORDS = ROOT / "results" / "records"


@pytest.fixture(scope="module")
def improvement():
    load_script("results/report.py")  # improvement.py imports it by its name
    return load_script("results/improvement.py")


def put(folder, name, rows, ended="finished", queries=(), **reference):
    """Write a record whose curve has `rows`: (phase, step, return, {column: value})."""
    record = json.loads((RECORDS / "cpu/iql/default/seed0.json").read_text())
    curve = {"phase": [r[0] for r in rows], "step": [float(r[1]) for r in rows],
             "seed": [float(name[-1])] * len(rows), "updates_per_second": [1.0] * len(rows),
             "return": [r[2] for r in rows], "score": [r[2] / 10 for r in rows]}  # fmt: skip
    curve["falls"] = [r[3].get("falls") for r in rows]
    record |= {
        "ended": ended, "reference": {"source": "made up"} | reference, "curve": curve,
        "config": {"init_from": "x" if "weak" in name else None, "name": name, "num_members": 2,
                   "cloning_steps": 10, "critic_steps": 20, "dynamics_steps": 5},
        "starts": [{"git_commit": "0" * 40, "script_sha256": "0" * 64}],
    }  # fmt: skip
    path = folder / "cpu" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))
    if queries:
        with open(path.with_suffix(".queries.csv"), "w", newline="") as file:
            writer = csv.DictWriter(file, queries[0])
            writer.writeheader()
            writer.writerows(queries)


@pytest.fixture
def records(tmp_path):
    """hopper-medium with two seeds of Uni-O4, scores a tenth of the returns; the shifted world."""
    for seed in (0, 1):
        queries = [{"step": 100 * (1 + i // 2), "seed": seed, "member": i % 2, "horizon": 9,
                    "amq": float(i), "return": value, "accepted": float(i < 2 + seed)}
                   for i, value in enumerate((100.0, 300.0, 200.0, 500.0))]
        put(tmp_path, f"uni_o4/hopper-medium/seed{seed}", [
            ("offline", 8, 50.0, {}), ("offline", 35, 90.0 + 20 * seed, {}),
            ("offline", 235, 300.0, {}),
            ("online", 0, 300.0, {}), ("online", 500, 250.0, {}), ("online", 1000, 400.0, {}),
        ], queries=queries, random=0.0, expert=1000.0)  # fmt: skip
    put(tmp_path, "uni_o4/hopper-medium/seed2", [("offline", 8, 1.0, {})], "not finite: q",
        random=0.0, expert=1000.0)  # fmt: skip
    put(tmp_path, "uni_o4-one-step/hopper-medium/seed0", [("offline", 235, 200.0, {})],
        random=0.0, expert=1000.0)  # fmt: skip
    put(tmp_path, "bc/hopper-medium/seed0", [("offline", 30, 120.0, {})], random=0.0,
        expert=1000.0)  # fmt: skip
    put(tmp_path, "ppo/Hopper-v5/seed0", [("online", 600, 3000.0, {"falls": 9})])
    for name, before in (("ppo-weak", []), ("uni_o4-weak", [("offline", 35, 1200.0, {}),
                                                            ("offline", 50, 1500.0, {})])):
        start = before[-1][2] if before else 1100.0
        put(tmp_path, f"{name}/Hopper-v5/seed0", [
            *before, ("online", 0, start, {}), ("online", 6000, 1300.0, {"falls": 30.0}),
            ("online", 10000, 1400.0, {"falls": 10.0}), ("online", 16000, 1600.0, {"falls": 3.0}),
        ])  # fmt: skip
    return tmp_path


def cells(line):
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_the_table_of_the_datasets(improvement, records):
    runs = improvement.read_runs(records, "cpu")
    header, _, row = map(cells, improvement.offline_table(runs).splitlines())
    assert dict(zip(header, row, strict=True)) == {
        "dataset": "hopper-medium", "seeds": "2", "unit": "score", "`bc.py`": "12.0",
        "clone": "10.0 [9.0, 11.0]",  # the last before the improvement, not the last of cloning
        "one step": "20.0", "Uni-O4": "30.0 [30.0, 30.0]", "best queried": "50.0 [50.0, 50.0]",
        "ranking": "0.83 [0.83, 0.83]",
        "within 20 %": "0.83 [0.83, 0.83]",  # all but 300 and 200
        "a coin's": "0.50 [0.50, 0.50]",
        "chance": "0.75 [0.75, 0.75]",  # 100, 300 and 200 are not above 300
        "accepted": "0.62 [0.50, 0.75]",  # of two queries of two members
        "online, lowest": "25.0 [25.0, 25.0]", "online, last": "40.0 [40.0, 40.0]",
    }  # fmt: skip


def test_pairs_are_near_or_ordered_and_of_one_horizon(improvement):
    def share(*rows, margin=0.2):
        names = "horizon", "amq", "return"
        return improvement.ordered(
            {"queries": [dict(zip(names, r, strict=True)) for r in rows]}, margin)

    assert share((9, 1.0, 100.0), (9, 2.0, 200.0)) == (1, 0.5)  # ordered
    assert share((9, 2.0, 100.0), (9, 1.0, 200.0)) == (0, 0.5)
    assert share((9, 2.0, 161.0), (9, 1.0, 200.0)) == (1, 1)  # 39 of 200
    assert share((9, 2.0, 161.0), (9, 1.0, 200.0), margin=0.0) == (0, 0.5)
    assert share((9, 2.0, 159.0), (9, 1.0, 200.0)) == (0, 0.5)
    assert share((9, 2.0, 100.0), (4, 1.0, 200.0)) == (None, None)  # scores of two horizons
    assert share((9, 2.0, 100.0), (4, 9.0, 0.0), (9, 1.0, 200.0)) == (0, 0.5)
    assert share() == (None, None)


def test_the_table_of_the_shifted_world(improvement, records):
    runs = improvement.read_runs(records, "cpu")
    rows = [cells(line)[1:] for line in improvement.shifted_table(runs).splitlines()[2:]]
    assert rows == [
        ["1", "3000", "-", "-"],
        ["1", "1100", "5.0", "-"],  # 30 falls in the first 6,000 steps
        ["1", "1500", "5.0", "-"],
        ["1", "1600", "0.50", "43.0"],  # 3 in the last 6,000
        ["1", "1600", "0.50", "43.0"],
    ]


def test_no_row_without_runs(improvement, tmp_path):
    put(tmp_path, "bc/hopper-medium/seed0", [("offline", 30, 120.0, {})])
    runs = improvement.read_runs(tmp_path, "cpu")
    assert len(improvement.offline_table(runs).splitlines()) == 2
    assert all(set(cells(line)[2:]) == {"-"}
               for line in improvement.shifted_table(runs).splitlines()[2:])  # fmt: skip


def test_all_that_is_generated(improvement, records):
    written = improvement.generate(records, "cpu", records)
    text, readme = (written[ROOT / name] for name in ("results/improvement.md", "README.md"))
    part = readme.partition("<!-- improvement -->")[2].partition("<!-- end of improvement -->")[0]
    for line in ("| hopper-medium | 2 |", "| Uni-O4, offline-improved | 1 | 1500 |"):
        assert line in text and line in part
    assert all((records / name).stat().st_size > 10_000
               for name in ("improvement.png", "shifted.png"))  # fmt: skip


def test_everything_generated_is_current():
    """improvement.md, its figures and README's part follow from the committed records."""
    done = subprocess.run([sys.executable, "results/improvement.py", "--check"], cwd=ROOT,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, f"python results/improvement.py: {done.stdout}{done.stderr}"
