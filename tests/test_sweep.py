"""results/sweep.py: a matrix of runs through Ray, killed, continued, on two nodes."""

import contextlib
import dataclasses
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tyro
from conftest import ROOT, load_script

ray = pytest.importorskip("ray", reason="pip install -r results/requirements.txt")
BUDGET = ["--offline-steps", "6000", "--online-steps", "300", "--eval-interval", "100",
          "--log-interval", "100", "--eval-episodes", "1", "--hidden-dims", "16", "16",
          "--batch-size", "32"]  # fmt: skip


@pytest.fixture
def matrix(pendulum, tmp_path):
    """A matrix of iql.py on two seeds."""
    path = tmp_path / "matrix.toml"
    path.write_text(f"""
[datasets]
pendulum = ["--dataset", "{pendulum}", "--env-id", "Pendulum-v1"]
[[trials]]
script = "algorithms/iql.py"
datasets = ["pendulum"]
seeds = 2
cpu = {json.dumps(BUDGET)}
""")
    return path


def sweep(matrix, name, *arguments):
    """Start a sweep with its own runs and records: (process, folder of the runs)."""
    folder = matrix.parent / name
    command = [sys.executable, "results/sweep.py", "--matrix", matrix, "--runs", folder / "runs",
               "--records", folder / "records", *arguments]  # fmt: skip
    process = subprocess.Popen(
        list(map(str, command)), cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return process, folder / "runs" / "iql" / "pendulum"


def scripts_in(folder):
    """{pid of every script that works in a run folder}."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode().split("\0")
        except OSError:  # it has just ended
            continue
        if str(folder) in words and "algorithms/iql.py" in words[1]:
            found.add(int(path.parent.name))
    return found


def wait_for(condition, seconds=120):
    """Wait until `condition()` is true."""
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited in vain"
        time.sleep(0.05)


def digest(folder):
    """What a finished run's agents and evaluations are."""
    record = json.loads((folder / "record.json").read_text())
    assert record["ended"] == "finished"
    curve = {k: v for k, v in record["curve"].items() if k not in ("seconds", "updates_per_second")}
    return record["state_sha256"], curve


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_killed_trial_goes_on_to_the_same_bits_and_a_finished_one_is_left(matrix):
    process, runs = sweep(matrix, "killed")
    wait_for(lambda: (runs / "seed0" / "checkpoint.npz").exists())
    (pid,) = scripts_in(runs / "seed0")
    os.kill(pid, signal.SIGKILL)
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out
    resumed = json.loads((runs / "seed0" / "record.json").read_text())["resumes"]
    assert resumed == 1
    process, whole = sweep(matrix, "whole", "--trial", "0")  # undisturbed, without Ray
    assert process.wait(240) == 0
    assert digest(runs / "seed0") == digest(whole / "seed0")
    for seed in ("seed0", "seed1"):
        kept = matrix.parent / "killed" / "records" / "cpu" / "iql" / "pendulum" / f"{seed}.json"
        assert kept.read_bytes() == (runs / seed / "record.json").read_bytes()
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*")}
    process, _ = sweep(matrix, "killed")
    assert process.wait(120) == 0
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*")} == before


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize("background", [False, True])
def test_a_stopped_sweep_saves_and_a_second_start_goes_on(background, matrix):
    """By Ctrl-C, and by SIGTERM what a script has started with &, for which SIGINT is ignored."""
    # Ray sees a signal within seconds: the run must last longer, on a fast or a busy machine
    matrix.write_text(matrix.read_text().replace('"6000"', '"20000"'))
    ignore = signal.signal(signal.SIGINT, signal.SIG_IGN) if background else None
    process, runs = sweep(matrix, "stopped")
    if background:
        signal.signal(signal.SIGINT, ignore)
    wait_for(lambda: (runs / "seed0" / "checkpoint.npz").exists())
    process.send_signal(signal.SIGTERM if background else signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "the same command goes on" in out and "Traceback" not in out
    assert scripts_in(runs / "seed0") | scripts_in(runs / "seed1") == set()
    assert json.loads((runs / "seed0" / "record.json").read_text())["ended"] == "SIGTERM"
    process, _ = sweep(matrix, "stopped")
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out
    assert digest(runs / "seed0") and digest(runs / "seed1")


def test_a_refused_trial_is_shown_and_the_others_end(matrix):
    text = matrix.read_text()
    matrix.write_text(text + text[text.index("[[trials]]") :].replace(
        "seeds = 2", 'seeds = 1\nname = "bad"').replace('"--batch-size", "32"',
                                                       '"--batch-size", "0"'))  # fmt: skip
    process, runs = sweep(matrix, "refused")
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 1
    assert "batch-size" in " ".join(out.split()) or "failed (2)" in out
    assert digest(runs / "seed0") and digest(runs / "seed1")
    assert not (matrix.parent / "refused/records/cpu/bad").exists()


@pytest.mark.parametrize("change, word", [
    (("algorithms/iql.py", "algorithms/none.py"), "no script"),
    (('datasets = ["pendulum"]', 'datasets = ["other"]'), "no [datasets] other"),
    (("seeds = 2", "seeds = 2\nafter = 'cql'"), "nothing of name"),
    (("seeds = 2", "sseeds = 2"), "see the top of the file"),
])  # fmt: skip
def test_a_wrong_matrix_is_refused(change, word, matrix):
    matrix.write_text(matrix.read_text().replace(*change))
    process, _ = sweep(matrix, "wrong", "--list")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and word in out and "Traceback" not in out


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
@pytest.mark.parametrize("name", ["matrix.toml", "collapse.toml"])
def test_every_run_of_a_matrix_is_one_that_its_script_takes(name, profile):
    """What --list shows can be started: flags, ranges and presets, of every first seed."""
    read = load_script("results/sweep.py").read_matrix
    trials, scripts = read(ROOT / "results" / name, profile, Path("data"), Path("runs")), {}
    assert bool(trials) == ((name, profile) != ("collapse.toml", "gpu"))  # that study is a CPU's
    for trial in trials:
        if not trial.name.split("/")[2].startswith(("seed0", "seeds0")):
            continue
        path = Path(trial.command[0])
        module = scripts.setdefault(path.stem, load_script(f"{path.parent.name}/{path.name}"))
        config = tyro.cli(module.Config, args=trial.command[1:])
        module.check_config(dataclasses.replace(config, preset="auto"))
        assert config.preset in ("auto", *module.PRESETS), trial.name


def children(pid):
    """{pids of all processes below one}."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_two_nodes_and_the_loss_of_one(matrix, monkeypatch):
    """Two Ray nodes on this machine, a trial on each; one node is killed with all it runs."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    ray, port, home = Path(sys.executable).parent / "ray", 20000 + os.getpid() % 10000, "/tmp/rays"
    common = ["--num-cpus", "1", "--disable-usage-stats", "--block",
              "--object-store-memory", "80000000"]  # fmt: skip
    head = [ray, "start", "--head", "--port", port, "--include-dashboard", "false",
            "--temp-dir", f"{home}-{os.getpid()}", *common]  # fmt: skip
    join = [ray, "start", "--address", f"127.0.0.1:{port}", *common]
    nodes = []
    try:
        for command, ready in ((head, "Ray runtime started"), (join, "Ray runtime started")):
            log = matrix.parent / f"node{len(nodes)}.txt"
            with open(log, "w") as file:
                nodes.append(subprocess.Popen(list(map(str, command)), stdout=file, stderr=file))
            wait_for(lambda log=log, ready=ready: ready in log.read_text())
        process, runs = sweep(matrix, "nodes", "--address", f"127.0.0.1:{port}")
        wait_for(lambda: all((runs / s / "checkpoint.npz").exists() for s in ("seed0", "seed1")))
        lost = children(nodes[1].pid)
        killed = [s for s in ("seed0", "seed1") if scripts_in(runs / s) & lost]
        assert len(killed) == 1  # one trial on each node
        for pid in lost | {nodes[1].pid}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        out, _ = process.communicate(timeout=400)
        assert process.returncode == 0, out
    finally:
        for pid in [p for node in nodes for p in (*children(node.pid), node.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(f"{home}-{os.getpid()}", ignore_errors=True)
    resumed = [s for s in ("seed0", "seed1")
               if json.loads((runs / s / "record.json").read_text())["resumes"]]  # fmt: skip
    assert resumed == killed
    whole, folder = sweep(matrix, "whole", "--only", killed[0], "--trial", "0")
    assert whole.wait(240) == 0
    assert digest(runs / killed[0]) == digest(folder / killed[0])


@pytest.mark.parametrize("phases, share, left", [
    ({"pretrain": 500}, 500 / 1600, 1.1), ({"pretrain": 1000, "offline": 100}, 1100 / 1600, 0.5),
    ({"offline": 400}, 400 / 600, 0.2), ({"offline": 400, "online": 50}, 450 / 600, 0.15),
    ({"online": 150}, 150 / 200, 0.05), ({"online": 210}, 1.0, 0.0),
])  # fmt: skip
def test_progress_of_every_kind_of_run(phases, share, left, tmp_path):
    """From pretraining, from the dataset, or online from another's agent, which is its first row;
    a phase that has not begun counts at the pace of the one before; 1 ms per step."""
    config = dict(pretrain_steps=1000, offline_steps=400, online_steps=200, num_seeds=1)
    (tmp_path / "config.json").write_text(json.dumps(config))
    rows = [f"{phase},{step},{step / 1000},,7,1000" for phase, step in phases.items()]
    header = "phase,step,seconds,score,return,updates_per_second"
    (tmp_path / "metrics.csv").write_text("\n".join([header, *rows]))
    found = load_script("results/sweep.py").progress(tmp_path)
    assert found[0] == list(phases)[-1] and found[2:4] == (1000, 7)
    assert found[1] == pytest.approx(share) and found[4] == pytest.approx(left)


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
        code, line = module.run_script([str(script)], tmp_path / "run", gpu=False)
    with module.own_core() as again:
        assert again == first  # given back
    if len(cores) > 1:
        assert code == 0 and {int(core) for core in line.split()} == {sorted(cores)[1]}
    assert module.run_script([str(script)], tmp_path / "gpu", gpu=True)[1].split() == [
        str(core) for core in sorted(cores)]  # fmt: skip
