"""Make the runs behind results/: every entry of matrix.toml, as Ray tasks, and keep their records.

    python results/sweep.py                                  # on this machine, a trial per core
    python results/sweep.py --profile gpu                    # seeds vmapped, trials packed on GPUs
    python results/sweep.py --address HOST:6379              # on a Ray cluster with shared files
    python results/sweep.py --list                           # the trials, numbered
    python results/sweep.py --trial 3                        # one of them, without Ray: SLURM array

A trial is one process of one script in its own run folder. One that dies (kill -9, a lost node,
out of memory) goes on from its checkpoint, to the same bits on a CPU; a finished one is never run
again. Ctrl-C saves all of them; the same command goes on. On a CPU every process has one thread:
two of them do more updates than one over both cores, and do not disturb each other.
"""

import argparse
import csv
import ctypes
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
RETRIES = 20  # of a trial that dies; a loop of deaths ends some time


@dataclasses.dataclass(frozen=True)
class Trial:
    """One process: `name` is entry/dataset/seeds, its run folder and record are called so."""

    name: str
    command: list  # script and arguments
    after: str | None = None  # name of the trial that must have ended before


class Died(Exception):
    """The script's process was killed."""


def read_matrix(path, profile, data, runs):
    """The trials of a profile, all first seeds first. Exits on an entry it cannot understand."""
    matrix = tomllib.loads(path.read_text())
    trials = []
    for entry in matrix["trials"]:
        unknown = set(entry) - {"name", "script", "datasets", "seeds", "cpu", "gpu", "after"}
        if unknown or not {"script", "datasets", "seeds"} <= set(entry):
            sys.exit(f"{path}: an entry has {', '.join(sorted(entry))}; see the top of the file")
        if profile not in entry:
            continue
        if not (ROOT / entry["script"]).is_file():
            sys.exit(f"{path}: no script {entry['script']}")
        name = entry.get("name", Path(entry["script"]).stem)
        seeds = [f"seed{seed}" for seed in range(entry["seeds"])]
        if profile == "gpu" and entry["seeds"] > 1:
            seeds = [f"seeds0-{entry['seeds'] - 1}"]
        for dataset in entry["datasets"]:
            if dataset not in matrix["datasets"]:
                sys.exit(f"{path}: entry {name}: no [datasets] {dataset}")
            for i, seed in enumerate(seeds):
                after = f"{entry['after']}/{dataset}/{seed}" if "after" in entry else None
                many = ["--num-seeds", str(entry["seeds"])] if seed.startswith("seeds") else []
                arguments = [*matrix["datasets"][dataset], *entry[profile], "--seed", str(i), *many]
                words = {"data": data, "after": runs / after if after else ""}
                command = [str(ROOT / entry["script"]), *(a.format(**words) for a in arguments)]
                command += ["--resume", str(runs / name / dataset / seed)]
                trials.append((i, Trial(f"{name}/{dataset}/{seed}", command, after)))
    trials = [trial for _, trial in sorted(trials, key=lambda pair: pair[0])]
    names = [trial.name for trial in trials]
    for trial in trials:
        if names.count(trial.name) > 1 or (trial.after and trial.after not in names):
            sys.exit(f"{path}: {trial.name}: two of that name, or nothing of name {trial.after}")
    return trials


def die_with_parent():
    """Linux: a script ends with the Ray worker above it; its next start needs the folder's lock."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def run_script(command, folder, gpu):
    """Run one trial to its end, on the GPU or on one thread; a KeyboardInterrupt lets it save.

    Returns (exit code, last line of its log). Raises Died if it was killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    env = os.environ | {"PYTHONUNBUFFERED": "1", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if not gpu:
        env |= {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false", "JAX_PLATFORMS": "cpu",
                "OMP_NUM_THREADS": "1"}
    with open(folder / "log.txt", "a") as log:
        process = subprocess.Popen(
            [sys.executable, *command], env=env, stdout=log, stderr=log,
            preexec_fn=die_with_parent if sys.platform == "linux" else None,
        )
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise
    if code < 0 or code > 128:
        raise Died(f"{folder}: signal {-code if code < 0 else code - 128}")
    return code, (folder / "log.txt").read_text(errors="replace").strip().splitlines()[-1]


def finished(folder):
    """Whether a run folder holds a run that came to its end (a stop at NaN is one, too)."""
    record = read_json(folder / "record.json")
    return record.get("ended") == "finished" or "not finite" in record.get("ended", "")


def read_json(path):
    return json.loads(path.read_text()) if path.is_file() else {}


def keep_record(folder, path):
    """Copy a finished run's record to where the report finds it."""
    if finished(folder):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "record.json", path)


# --------------------------------------------------------------------------------------- Progress


def progress(folder):
    """(phase, share done, updates/s, latest score or return, seconds left) of a run folder."""
    config = read_json(folder / "config.json")
    try:
        with open(folder / "metrics.csv", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row.get("seconds")]
    except OSError:
        rows = []
    if not rows or not config:
        return "starting" if (folder / "log.txt").exists() else "waiting", 0.0, None, None, None
    offline = 0 if config["init_from"] else config.get("offline_steps", 0)
    last, totals = rows[-1], {"offline": offline, "online": config["online_steps"]}
    done = {phase: max([int(r["step"]) for r in rows if r["phase"] == phase], default=0)
            for phase in totals}
    spent = {phase: sum(float(r["seconds"]) for r in rows if r["phase"] == phase)
             / config["num_seeds"] for phase in totals}
    known = [spent[p] / done[p] for p in totals if done[p]]
    left = sum((totals[p] - done[p]) * (spent[p] / done[p] if done[p] else known[-1])
               for p in totals)
    values = [row["score"] or row["return"] for row in rows if row["return"]]
    share = sum(done.values()) / max(sum(totals.values()), 1)
    return (last["phase"], share, float(last["updates_per_second"]),
            float(values[-1]) if values else None, left)


def progress_table(trials, runs, outcomes):
    """The table that the terminal shows."""
    table = Table("trial", "phase", "done", "updates/s", "latest score", "left")
    for trial in trials:
        phase, share, rate, score, left = progress(runs / trial.name)
        phase = outcomes.get(trial.name, phase)
        table.add_row(
            trial.name, phase, f"{100 * share:.0f} %", "" if rate is None else f"{rate:.0f}",
            "" if score is None else f"{score:.1f}",
            "" if left is None or trial.name in outcomes else f"{left / 60:.0f} min",
        )
    return table


# -------------------------------------------------------------------------------------------- Ray


def run_all(trials, arguments, runs):
    """Run the trials through Ray. Returns {name: outcome}."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    gpu = arguments.profile == "gpu"
    share = 1 / arguments.trials_per_gpu if gpu else 0
    ray.init(address=arguments.address, include_dashboard=False, log_to_driver=False,
             logging_level="ERROR")
    # a lost node or worker is Ray's to retry, a killed script ours to report to it
    remote = ray.remote(num_cpus=1, num_gpus=share, max_retries=RETRIES, retry_exceptions=[Died])
    task = remote(lambda command, folder, *after: run_script(command, folder, gpu))
    outcomes = {t.name: "finished" for t in trials if finished(runs / t.name)}
    tasks = {}
    for trial in [t for t in trials if t.name not in outcomes]:
        after = [tasks[trial.after]] if trial.after in tasks else []
        tasks[trial.name] = task.remote(trial.command, runs / trial.name, *after)
    names = {ref: name for name, ref in tasks.items()}

    def note(refs):
        for ref in refs:
            name = names[ref]
            try:
                code, line = ray.get(ref)
                outcomes[name] = "finished" if code == 0 else f"failed ({code}): {line}"
            except Exception as error:  # whatever Ray wraps it in: the trial is not done
                outcomes[name] = f"failed: {type(error).__name__}"
            keep_record(runs / name, record_path(name, arguments))

    pending, console, printed = list(tasks.values()), Console(), 0.0
    try:
        with Live(console=console, auto_refresh=False, transient=True) as live:
            while pending:
                ready, pending = ray.wait(pending, num_returns=len(pending), timeout=2.0)
                note(ready)
                if console.is_terminal:
                    live.update(progress_table(trials, runs, outcomes), refresh=True)
                elif ready or time.time() - printed > 300:
                    printed = time.time()
                    console.print(progress_table(trials, runs, outcomes))
    except KeyboardInterrupt:
        console.print("saving; the same command goes on")
        for ref in pending:
            ray.cancel(ref)
        ray.wait(pending, num_returns=len(pending), timeout=120)
    console.print(progress_table(trials, runs, outcomes))
    ray.shutdown()
    return outcomes


def record_path(name, arguments):
    return arguments.records / arguments.profile / f"{name}.json"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--only", default="", help="trials whose name contains this text")
    parser.add_argument("--matrix", type=Path, default=ROOT / "results" / "matrix.toml")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data/d4rl_samples",
                        help="what {data} in the matrix stands for")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "sweep", help="run folders")
    parser.add_argument("--records", type=Path, default=ROOT / "results" / "records")
    parser.add_argument("--address", help="of a Ray cluster, or auto; default: this machine")
    parser.add_argument("--trials-per-gpu", type=int, default=4)
    parser.add_argument("--list", action="store_true", help="print the numbered trials and stop")
    parser.add_argument("--trial", type=int, help="run only this one, in this process, without Ray")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    runs = arguments.runs.resolve()
    trials = read_matrix(arguments.matrix, arguments.profile, arguments.data.resolve(), runs)
    trials = [trial for trial in trials if arguments.only in trial.name]
    if arguments.list:
        for i, trial in enumerate(trials):
            print(i, trial.name, "finished" if finished(runs / trial.name) else "", sep="\t")
        return 0
    if arguments.trial is None:
        outcomes = run_all(trials, arguments, runs)
        return int(any(outcomes.get(trial.name) != "finished" for trial in trials))
    if not 0 <= arguments.trial < len(trials):
        sys.exit(f"--trial {arguments.trial}: there are {len(trials)}, from 0; see --list")
    trial, gpu = trials[arguments.trial], arguments.profile == "gpu"
    if trial.after and not finished(runs / trial.after):
        sys.exit(f"{trial.name} needs {trial.after}, which has not ended")
    if not finished(runs / trial.name):
        run_script(trial.command, runs / trial.name, gpu)
    keep_record(runs / trial.name, record_path(trial.name, arguments))
    return int(not finished(runs / trial.name))


if __name__ == "__main__":
    sys.exit(main())
