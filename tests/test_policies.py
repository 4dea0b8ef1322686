"""results/policies.py: its table from records made by hand, and all that is generated."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, load_script

pytest.importorskip("rliable", reason="pip install -r results/requirements.txt")
RECORDS = ROOT / "results" / "records"


@pytest.fixture(scope="module")
def policies():
    load_script("results/report.py")  # policies.py imports it by its name
    return load_script("results/policies.py")


def put(folder, name, rows, ended="finished", init_from=None):
    """Write a record whose curve has `rows`: (phase, step, score)."""
    record = json.loads((RECORDS / "cpu/iql/default/seed0.json").read_text())
    curve = {"phase": [r[0] for r in rows], "step": [float(r[1]) for r in rows],
             "seed": [float(name[-1])] * len(rows), "updates_per_second": [1.0] * len(rows),
             "return": [r[2] / 9 for r in rows], "score": [r[2] for r in rows]}  # fmt: skip
    record |= {
        "ended": ended, "reference": {"source": "made up", "random": 0.0, "expert": 1.0},
        "curve": curve, "config": {"init_from": init_from, "name": name},
        "starts": [{"git_commit": "0" * 40, "script_sha256": "0" * 64}],
    }  # fmt: skip
    path = folder / "cpu" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))


@pytest.fixture
def records(tmp_path):
    for seed in (0, 1):
        put(tmp_path, f"pa_rl-diffusion/pointmaze-umaze/seed{seed}", [
            ("pretrain", 5, 3.0), ("pretrain", 9, 10.0 + seed), ("offline", 9, 20.0 + seed),
            ("online", 2, 15.0 + seed), ("online", 4, 30.0 + seed),
        ])  # fmt: skip
    put(tmp_path, "pa_rl-diffusion-global/pointmaze-umaze/seed0", [
        ("pretrain", 9, 10.0), ("offline", 9, 12.0), ("online", 2, 14.0), ("online", 4, 13.0)])
    for seed in (0, 1):  # nothing has gone on from seed 1
        put(tmp_path, f"pa_rl-iql-gaussian-offline/pointmaze-umaze/seed{seed}", [
            ("pretrain", 9, 40.0 + seed), ("offline", 9, 49.0)])
    for name, values in {"pa_rl-iql-gaussian": (50.0, 60.0),
                         "pa_rl-iql-gaussian-global": (51.0, 61.0)}.items():  # fmt: skip
        put(tmp_path, f"{name}/pointmaze-umaze/seed0", [
            ("online", step, value) for step, value in zip((0, 4), values, strict=True)],
            init_from="x")  # fmt: skip
    put(tmp_path, "pa_rl-iql-diffusion-offline/door-human/seed0", [("pretrain", 9, 41.0)])
    put(tmp_path, "pa_rl-transformer/pointmaze-umaze/seed0", [("pretrain", 9, 1.0)], "signal 15")
    put(tmp_path, "cal_ql/pointmaze-umaze/seed0", [("online", 0, 7.0), ("online", 4, 8.0)],
        init_from="x")  # fmt: skip
    return tmp_path


def test_the_table(policies, records):
    lines = policies.table(policies.read_runs(records, "cpu")).splitlines()
    header, _, *rows = [[c.strip() for c in line.split("|")[1:-1]] for line in lines]
    found = [dict(zip(header, row, strict=True)) for row in rows]
    assert [(row["policy"], row["critic"], row["seeds"]) for row in found] == [
        ("diffusion", "Cal-QL", "2"), ("gaussian", "IQL", "1"), ("diffusion", "IQL", "0")]
    first = found[0]
    assert first["unit"] == "score"
    assert first["cloned"].startswith("10.5 [10.0, 11.0]")  # the last of pretraining
    assert first["global"] == "12.0" and first["global, online"] == "13.0"
    assert first["global + local"].startswith("20.5 [20.0, 21.0]")
    assert first["global + local, online: lowest"].startswith("15.5 [15.0, 16.0]")
    assert first["last"].startswith("30.5 [30.0, 31.0]")
    assert first["Gaussian Cal-QL"] == "7.0" and first["online"] == "8.0"
    names = ("cloned", "global", "global + local", "global, online", "last")
    second, third = ([row[name] for name in names] for row in found[1:])
    assert second == ["40.0", "51.0", "50.0", "61.0", "60.0"]  # cloned: of the run before
    assert third == ["41.0", "-", "-", "-", "-"]


def test_nothing_at_all_and_a_picture(policies, records, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    for folder in (empty, records):
        written = policies.generate(folder, "cpu", tmp_path / "figures")
        assert (tmp_path / "figures" / "policies.png").stat().st_size > 1000
        assert any("| dataset |" in text for text in written.values())


def test_everything_generated_is_current():
    done = subprocess.run([sys.executable, "results/policies.py", "--check"], cwd=ROOT,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, f"python results/policies.py was not run: {done.stdout}"
