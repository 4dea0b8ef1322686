"""results/sweep.py: a matrix of runs through Ray, killed, stopped, continued, recorded."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import tyro
from conftest import ROOT, load_script, run_script

pytest.importorskip("ray", reason="pip install -r results/requirements.txt")
linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc")
BUDGET = ("--hidden-dims 16 16 --batch-size 16 --eval-episodes 1 --offline-steps 400 "
          "--online-steps 200 --interval 50")  # fmt: skip
MATRIX = f"""
[datasets]
default = ""
[[trials]]
script = "algorithms/iql.py"
datasets = ["default"]
seeds = 1
cpu = "{BUDGET}"
[[trials]]
name = "bad"
script = "algorithms/iql.py"
datasets = ["default"]
seeds = 1
cpu = "{BUDGET} --preset none"
[[trials]]
name = "next"
script = "algorithms/iql.py"
datasets = ["default"]
seeds = 1
after = "bad"
cpu = "{BUDGET} --init-from {{after}}"
"""


@pytest.fixture
def matrix(tmp_path):
    path = tmp_path / "matrix.toml"
    path.write_text(MATRIX)
    return path


def sweep(matrix, name, *arguments):
    """Start a sweep with its own runs and records: (process, folder of the first trial's run)."""
    folder = matrix.parent / name
    command = [sys.executable, "results/sweep.py", "--matrix", matrix, "--runs", folder / "runs",
               "--records", folder / "records", *arguments]  # fmt: skip
    process = subprocess.Popen(
        list(map(str, command)), cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    return process, folder / "runs" / "iql" / "default" / "seed0"


def scripts_in(folder):
    """{pid of every script that works in a run folder}."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            words = path.read_bytes().decode().split("\0")
            if str(folder) in words and "algorithms/iql.py" in words:
                found.add(int(path.parent.name))
    return found


def wait_for(condition, seconds=120):
    """Wait until `condition()` is true."""
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited in vain"
        time.sleep(0.05)


def read(path):
    return json.loads(path.read_text())


@linux
def test_a_killed_trial_finishes_with_the_same_agents_and_a_bad_one_is_named(matrix):
    process, run = sweep(matrix, "killed")
    wait_for(lambda: (run / "checkpoint.npz").exists())
    (pid,) = scripts_in(run)
    os.kill(pid, signal.SIGKILL)
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 1 and "1 of 3 finished, 2 failed" in out, out
    assert "bad/default/seed0: failed (1): --preset none" in out
    assert "next/default/seed0: failed: the trial that it starts from failed" in out
    kept = matrix.parent / "killed" / "records" / "cpu"
    assert set(read(kept / "failures.json")) == {"bad/default/seed0", "next/default/seed0"}
    record = read(kept / "iql/default/seed0.json")
    assert record == read(run / "record.json")
    assert [start["exit_code"] for start in record["starts"]] == [-signal.SIGKILL, 0]

    process, whole = sweep(matrix, "whole", "--trial", "0")  # undisturbed, without Ray
    assert process.wait(240) == 0
    other = read(whole / "record.json")
    for name in ("agents_sha256", "steps", "dataset_rows", "config", "command"):
        assert record[name] == other[name], name
    for name in set(record["curve"]) - {"seconds", "updates_per_second"}:
        assert record["curve"][name] == other["curve"][name], name
    assert len(other["starts"]) == 1 and other["steps"] == {"offline": 400, "online": 200}

    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    process, _ = sweep(matrix, "killed", "--trial", "0")  # a finished one is left alone
    assert process.wait(60) == 0
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before

    matrix.write_text(MATRIX.replace("--offline-steps 400", "--offline-steps 500"))
    process, _ = sweep(matrix, "killed", "--trial", "0")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "made by python" in out and "Traceback" not in out


@linux
def test_a_stopped_sweep_leaves_no_process(matrix):
    longer = MATRIX.replace("--offline-steps 400", "--offline-steps 40000")
    matrix.write_text(longer.partition('[[trials]]\nname = "bad"')[0])
    process, run = sweep(matrix, "stopped")
    wait_for(lambda: (run / "checkpoint.npz").exists())
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "the same command goes on" in out and "Traceback" not in out
    wait_for(lambda: not scripts_in(run), 10)
    assert not (run / "record.json").exists() and len(read(run / "starts.json")) == 1


def test_what_a_record_holds(tmp_path):
    """Of a run made by hand: two seeds, three rounds."""
    module = load_script("results/sweep.py")
    trial = module.Trial("iql/default/seeds0-1", "algorithms/iql.py", ("--num-seeds", "2"))
    source = {"environment": '{"id": "X-v0"}', "units": {}, "reference": [1.0, 5.0],
              "dataset_sha256": "abc"}  # fmt: skip
    config = {"script": "iql", "dataset": "hopper/sac-medium-replay-v0", "seed": 0}
    (tmp_path / "config.json").write_text(json.dumps(config | source))
    rounds = (("offline", 10, 1), ("offline", 20, 30), ("online", 0, 0), ("online", 5, 1),
              ("online", 9, 7))  # fmt: skip
    rows = [f"{a},{b},{seed},{b}.{seed},,{c},2.0" for a, b, c in rounds for seed in (5, 6)]
    header = "phase,step,seed,return,score,updates_per_second,seconds"
    (tmp_path / "metrics.csv").write_text("\n".join([header, *rows, ""]))
    module.np.savez(tmp_path / "checkpoint.npz", **{"agents/x": module.np.arange(3)})
    start = module.provenance("algorithms/iql.py", False, {0})
    begun = [start | {"seconds": 3.0, "peak_memory_mb": 5}, start | {"peak_memory_mb": 9}]
    record = module.make_record(trial, tmp_path, begun)
    assert record["steps"] == {"offline": 20, "online": 9}
    assert record["updates_per_second"] == {"offline": 30.0, "online": 7.0}  # without compilation
    assert (record["wall_seconds"], record["peak_memory_mb"]) == (3.0, 9)
    assert record["reference"] == {"random": 1.0, "expert": 5.0}
    assert record["dataset_rows"] == 120_000 and record["dataset_sha256"] == "abc"
    assert record["config"] == {"dataset": config["dataset"], "seed": 0}
    assert record["curve"]["return"] == [10.5, 10.6, 20.5, 20.6, 0.5, 0.6, 5.5, 5.6, 9.5, 9.6]
    assert record["curve"]["score"] == [None] * 10
    assert len(start["script_sha256"]) == 64 and start["packages"]["jax"] and start["cores"] == 1
    report = load_script("results/report.py")
    (tmp_path / "records/cpu/iql/default").mkdir(parents=True)
    record["curve"]["score"] = record["curve"]["return"]
    (tmp_path / "records/cpu/iql/default/seeds0-1.json").write_text(json.dumps(record))
    (found,) = report.group_runs(report.read_records(tmp_path / "records")).values()
    assert [(run["seed"], run["offline"], run["online"]) for run in found] == [
        (5, 20.5, 9.5), (6, 20.6, 9.6)]  # fmt: skip


# ----------------------------------------------------------------------------------------- Matrix


@pytest.mark.parametrize("old, new, word", [
    ("algorithms/iql.py", "algorithms/none.py", "no script"),
    ('datasets = ["default"]', 'datasets = ["other"]', "no [datasets] other"),
    ('after = "bad"', 'after = "cql"', "nothing of name"),
    ('name = "bad"', 'name = "iql"', "two trials of name"),
    ("seeds = 1", "sseeds = 1", "see the top of the file"),
    ("seeds = 1", 'seeds = 1\nbudget = "slow"', "no [budgets] slow"),
])  # fmt: skip
def test_a_wrong_matrix_is_refused(old, new, word, matrix):
    matrix.write_text(MATRIX.replace(old, new))
    with pytest.raises(SystemExit) as error:
        load_script("results/sweep.py").read_matrix(matrix, "cpu")
    assert word in str(error.value)


def test_datasets_that_are_not_here_are_made_by_their_commands(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    module, made = load_script("results/sweep.py"), tmp_path / "my/data-v0/data/metadata.json"
    made.parent.mkdir(parents=True)
    script = tmp_path / "make.py"
    script.write_text(f"open('{made}', 'w').write('{{\"total_steps\": 5}}')\nprint('ma' + 'de')")
    trial = module.Trial("iql/my/seed0", "iql.py", ("--dataset", "my/data-v0"), make=("false",))
    with pytest.raises(SystemExit, match="my/data-v0: could not be made by false"):
        module.make_datasets([trial])
    made_by = module.dataclasses.replace(trial, make=(f"python {script}",))
    module.make_datasets([made_by, made_by, module.Trial("iql/default/seed0", "iql.py", ())])
    module.make_datasets([made_by, trial])
    assert made.exists() and capfd.readouterr().out.count("\nmade\n") == 1


def test_every_dataset_of_the_matrix_is_made_under_its_name():
    """The last word of the last command is what the script is told, or it is collect.py's own."""
    collect = load_script("baselines/collect.py")
    matrix = tomllib.loads((ROOT / "results/matrix.toml").read_text())
    for said in filter(lambda x: isinstance(x, dict), matrix["datasets"].values()):
        words = said["make"][-1].split()
        made = words[-1] if words[-1].endswith("-v0") or "D4RL" in words[-1] else ""
        if "pointmaze" in words:
            made = f"pointmaze/{words[-1]}-v0"
        if "ogbench" in words:
            world = words[words.index("ogbench") + 1]
            kind = "navigate" if "maze" in world else "play"
            made = f"ogbench/{world}-{kind}-task{collect.TASKS.get(world, 2)}-v0"
        assert said["arguments"].removesuffix(" --eval-episodes 50") == f"--dataset {made}"


def test_a_budget_makes_two_runs_of_an_entry(matrix):
    """Offline, and online from those agents; an entry with `after` starts from another's."""
    halves = """
        [budgets.fast]
        cpu = ["--offline-steps 7", "--online-steps 5 --interval 1"]
        [[trials]]
        script = "algorithms/iql.py"
        datasets = ["default"]
        seeds = 2
        budget = "fast"
        cpu = "--beta 1"
        [[trials]]
        script = "baselines/pex.py"
        datasets = ["default"]
        seeds = 2
        budget = "fast"
        after = "iql-offline"
        cpu = ""
    """
    matrix.write_text(MATRIX.partition("[[trials]]")[0] + halves)
    trials = load_script("results/sweep.py").read_matrix(matrix, "cpu")
    assert [trial.name for trial in trials] == [
        f"{name}/default/seed{i}" for i in (0, 1) for name in ("iql-offline", "iql", "pex")
    ]
    before, then, other = trials[3:]
    words = shlex.join(before.command("")), shlex.join(then.command("X")), other.command("X")
    assert words[0].split()[:6] == [
        "algorithms/iql.py",
        "--offline-steps",
        "7",
        "--beta",
        "1",
        "--online-steps",
    ]
    assert "--online-steps 5 --interval 1 --beta 1 --init-from X" in words[1]
    assert then.after == other.after == before.name and words[2][0] == "baselines/pex.py"


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_every_run_of_the_matrix_is_one_that_its_script_takes(profile):
    """What --list shows can be started: its flags and presets, of every first seed."""
    trials = load_script("results/sweep.py").read_matrix(ROOT / "results/matrix.toml", profile)
    assert trials
    modules = {path: load_script(path) for path in {trial.script for trial in trials}}
    for trial in trials:
        if trial.name.split("/")[2].startswith(("seed0", "seeds0")):
            module, arguments = modules[trial.script], trial.command("folder")[1:]
            config = tyro.cli(module.Config, args=arguments)
            assert config.preset in ("auto", *module.PRESETS), shlex.join(arguments)


def test_only_takes_along_what_its_trials_start_from():
    _, out, _ = run_script("results/sweep.py", "--only", "pex/hopper/seed1", "--list")
    before, after = [line.split("\t") for line in out.splitlines()]
    assert [before[1], after[1]] == ["iql-offline/hopper/seed1", "pex/hopper/seed1"]
    assert f"--init-from {ROOT}/runs/sweep/{before[1]} " in after[3]


def test_trials_at_the_same_time_have_a_core_each(tmp_path, monkeypatch):
    module = load_script("results/sweep.py")
    monkeypatch.setattr(module.tempfile, "gettempdir", lambda: str(tmp_path))
    cores = os.sched_getaffinity(0)
    with contextlib.ExitStack() as trials:
        held = [trials.enter_context(module.own_core()) for _ in cores]
        assert all(len(core) == 1 for core in held) and set.union(*held) == cores
        with module.own_core() as core:  # one trial more than there are cores
            assert core == cores
    script = tmp_path / "script.py"
    script.write_text("import os\nprint(*os.sched_getaffinity(0))\n")
    with module.own_core() as first:
        code, memory = module.run_process([str(script)], tmp_path, False, first)
    assert code == 0 and memory > 1
    assert (tmp_path / "log.txt").read_text().split() == [str(core) for core in first]
    with module.own_core() as again:
        assert again == first  # given back
