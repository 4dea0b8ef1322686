"""Make the runs behind results/: every entry of matrix.toml, as Ray tasks, and keep their records.

    python results/sweep.py                                  # on this machine, a trial per core
    python results/sweep.py --profile gpu                    # seeds vmapped, trials packed on GPUs
    python results/sweep.py --address HOST:6379              # on a Ray cluster with shared files
    python results/sweep.py --list                           # the trials, numbered
    python results/sweep.py --trial 3                        # one of them, without Ray: SLURM array

A trial is one process of one script in its own run folder. One that dies (kill -9, a lost node,
out of memory) goes on from its checkpoint, to the same bits on a CPU; a finished one is never run
again. Ctrl-C saves all of them; the same command goes on. On a CPU every process has a core of its
own: two of them do more updates than one over both cores, and do not disturb each other.
"""

import argparse
import contextlib
import csv
import ctypes
import dataclasses
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
OFFLINE = ("offline_steps", "cloning_steps", "critic_steps", "dynamics_steps", "improvement_steps")
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
    try:
        matrix = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        sys.exit(f"{path}: {error}")
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
        if names.count(trial.name) > 1:
            sys.exit(f"{path}: two trials of name {trial.name}")
        if trial.after and trial.after not in names[: names.index(trial.name)]:
            sys.exit(f"{path}: {trial.name}: nothing of name {trial.after} above it")
    return trials


@contextlib.contextmanager
def own_core():
    """{a core of this machine that no other trial has}; all cores where none is free, None where
    the system binds no process. With two trials loose on two cores, XLA starts two threads in each,
    which take turns: measured, 0.6 to 0.7 of the updates per second; and they round otherwise than
    one (the last digit of a mean), so that a trial moved there would not go on to the same bits."""
    if not hasattr(os, "sched_getaffinity"):
        yield None
        return
    cores = os.sched_getaffinity(0)
    with contextlib.ExitStack() as locks:
        for core in sorted(cores):
            path = Path(tempfile.gettempdir(), f"sweep-{os.getuid()}-core{core}.lock")
            lock = locks.enter_context(open(path, "w"))
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                cores = {core}
                break
        yield cores


def run_script(command, folder, gpu):
    """Run one trial to its end, on the GPU or on one core; a KeyboardInterrupt lets it save.

    Returns (exit code, last line of its log). Raises Died if it was killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:  # after a lost node: until its script has ended
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(1)
    env = os.environ | {"PYTHONUNBUFFERED": "1", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if gpu:
        env["JAX_PLATFORMS"] = "cuda,cpu"  # without a GPU an error, not a slow run
    else:
        env |= {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false", "JAX_PLATFORMS": "cpu",
                "OMP_NUM_THREADS": "1"}
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    with (open(folder / "log.txt", "a") as log,
          contextlib.nullcontext() if gpu else own_core() as cores):

        def in_child():
            if libc:
                libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with the worker above it
            if cores:
                os.sched_setaffinity(0, cores)

        process = subprocess.Popen(  # of its own session: a terminal's Ctrl-C comes to us only
            [sys.executable, *command], env=env, stdout=log, stderr=log, start_new_session=True,
            preexec_fn=in_child,
        )
        try:
            code = None
            while code is None:  # an interrupt by Ray does not wake a wait without end
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = process.wait(1)
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise
    if code < 0 or code > 128:
        raise Died(f"{folder}: signal {-code if code < 0 else code - 128}")
    lines = (folder / "log.txt").read_text(errors="replace").strip().splitlines()
    return code, lines[-1] if lines else ""


def outcome(trial, runs):
    """How a trial ended: "finished", "failed: not finite ...", or None where it did not end. Exits
    where its folder holds a run with other arguments."""
    record = read_json(runs / trial.name / "record.json")
    if not record:
        return None
    made = record["versions"]["command"][1:]
    if made != trial.command[1:]:
        sys.exit(f"{runs / trial.name}: its run was made by other arguments ({' '.join(made)}); "
                 "move it away, or choose other --runs")
    if record["ended"].startswith("not finite"):
        return f"failed: {record['ended']}"
    return "finished" if record["ended"] == "finished" else None


def read_json(path):
    """A JSON file's content; {} where there is none, or a damaged one."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def keep_record(trial, arguments, runs):
    """Copy an ended trial's record to where the report finds it, and AM-Q's queries beside it."""
    if not outcome(trial, runs):
        return
    path = arguments.records / arguments.profile / f"{trial.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, kept in (("record.json", path), ("queries.csv", path.with_suffix(".queries.csv"))):
        if (runs / trial.name / name).exists():
            shutil.copy(runs / trial.name / name, path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), kept)


def keep_failures(outcomes, arguments):
    """The trials that failed, for the report: they may have left no record."""
    path = arguments.records / arguments.profile / "failures.json"
    failed = {name: text for name, text in sorted(outcomes.items()) if text != "finished"}
    before = read_json(path)
    failed |= {name: text for name, text in before.items() if name not in outcomes}
    if failed or before:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(failed, indent=1) + "\n")


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
    totals = {
        "pretrain": config.get("pretrain_steps", 0),
        "offline": sum(config.get(name, 0) for name in (
            ("improvement_steps",) if config.get("supervised_from") else OFFLINE)),
        "online": config["online_steps"],
    }
    while next(iter(totals)) != rows[0]["phase"]:  # what comes before it, the run has not
        del totals[next(iter(totals))]
    last = rows[-1]
    done = {phase: max([int(r["step"]) for r in rows if r["phase"] == phase], default=0)
            for phase in totals}
    spent = {phase: sum(float(r["seconds"]) for r in rows if r["phase"] == phase)
             / config["num_seeds"] for phase in totals}
    known = [spent[p] / done[p] for p in totals if done[p]]
    left = sum(max(totals[p] - done[p], 0) * (spent[p] / done[p] if done[p] else known[-1])
               for p in totals) if known else None
    values = [row["score"] or row["return"] for row in rows if row["return"]]
    share = min(sum(done.values()) / max(sum(totals.values()), 1), 1)
    return (last["phase"], share, float(last["updates_per_second"]),
            float(values[-1]) if values else None, left)


def progress_table(trials, runs, outcomes):
    """The table that the terminal shows: trials at work and failed ones; the others as counts."""
    count = list(outcomes.values()).count("finished")
    table = Table("trial", "phase", "done", "updates/s", "latest score", "left",
                  caption=f"{count} of {len(trials)} trials finished")
    for trial in trials:
        if outcomes.get(trial.name) == "finished":
            continue
        if trial.name in outcomes:
            table.add_row(trial.name, outcomes[trial.name])
            continue
        try:
            phase, share, rate, score, left = progress(runs / trial.name)
        except (OSError, ValueError, KeyError):  # it is just being written
            continue
        if phase != "waiting":
            table.add_row(
                trial.name, phase, f"{100 * share:.0f} %", "" if rate is None else f"{rate:.0f}",
                "" if score is None else f"{score:.1f}",
                "" if left is None else f"{left / 60:.0f} min",
            )
    return table


# -------------------------------------------------------------------------------------------- Ray


def run_all(trials, arguments, runs):
    """Run the trials through Ray. Returns {name: outcome} of those that ended."""
    try:
        import ray
    except ImportError:
        sys.exit("Ray is missing: pip install -r results/requirements.txt")
    gpu = arguments.profile == "gpu"
    try:
        ray.init(address=arguments.address or "local", include_dashboard=False,
                 log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # no cluster there, or no token for it
        sys.exit(f"--address {arguments.address}: {' '.join(str(error).split())}")
    if gpu and not ray.cluster_resources().get("GPU"):
        sys.exit("--profile gpu: Ray sees no GPU")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray has put its own there
    # a lost node or worker is Ray's to retry, a killed script ours to report to it
    remote = ray.remote(num_cpus=1, num_gpus=1 / arguments.trials_per_gpu if gpu else 0,
                        max_retries=RETRIES, retry_exceptions=[Died])

    def start(command, folder, *after):
        if any(code for code, _ in after):
            return 1, "the trial that it starts from failed"
        # ray.cancel raises it, and would do nothing where a script has started the sweep with &
        signal.signal(signal.SIGINT, signal.default_int_handler)
        return run_script(command, folder, gpu)

    task = remote(start)
    outcomes = {t.name: outcome(t, runs) for t in trials if outcome(t, runs)}
    for trial in trials:
        keep_record(trial, arguments, runs)
    tasks, of = {}, {}
    for trial in [t for t in trials if t.name not in outcomes]:
        ended = read_json(runs / trial.after / "record.json").get("ended") if trial.after else None
        if trial.after and trial.after not in tasks and ended != "finished":
            outcomes[trial.name] = f"failed: needs {trial.after}, which has not ended"
            continue
        after = [tasks[trial.after]] if trial.after in tasks else []
        tasks[trial.name] = task.remote(trial.command, runs / trial.name, *after)
        of[tasks[trial.name]] = trial

    def note(refs):
        for ref in refs:
            trial = of[ref]
            try:
                code, line = ray.get(ref)
                outcomes[trial.name] = "finished" if code == 0 else f"failed ({code}): {line}"
            except Exception as error:  # whatever Ray wraps it in: the trial has not ended
                reason = [*str(error).strip().splitlines(), ""]
                outcomes[trial.name] = f"failed: {type(error).__name__}: {reason[-2]}"
            keep_record(trial, arguments, runs)

    pending, console, printed = list(tasks.values()), Console(), 0.0
    try:
        with Live(console=console, auto_refresh=False, transient=True) as live:
            while pending:
                ready, pending = ray.wait(pending, num_returns=len(pending), timeout=5.0)
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
        for ref in pending:
            keep_record(of[ref], arguments, runs)
    console.print(progress_table(trials, runs, outcomes))
    keep_failures(outcomes, arguments)
    ray.shutdown()
    return outcomes


def run_one(trial, arguments, runs):
    """One trial in this process. Returns the exit code."""
    if trial.after and read_json(runs / trial.after / "record.json").get("ended") != "finished":
        sys.exit(f"{trial.name} needs {trial.after}, which has not ended")
    try:
        if not outcome(trial, runs):
            run_script(trial.command, runs / trial.name, arguments.profile == "gpu")
    except KeyboardInterrupt:
        print(f"{trial.name}: saved; the same command goes on")
        return 128 + signal.SIGTERM
    except Died as error:
        sys.exit(f"{error}; the same command goes on")
    keep_record(trial, arguments, runs)
    return int(outcome(trial, runs) != "finished")


def main(words=None):
    """`words`: the command line, where another script calls this (collapse.py)."""
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
    arguments = parser.parse_args(words)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.default_int_handler)  # as Ctrl-C
    if arguments.trials_per_gpu < 1:
        parser.error("--trials-per-gpu must be at least 1")
    runs, data = arguments.runs.resolve(), arguments.data.resolve()
    trials = read_matrix(arguments.matrix, arguments.profile, data, runs)
    trials = [trial for trial in trials if arguments.only in trial.name]
    if arguments.list:
        for i, trial in enumerate(trials):
            print(i, trial.name, outcome(trial, runs) or "", sep="\t")
        return 0
    needs_data = any(str(data) in word for trial in trials for word in trial.command)
    if needs_data and not data.is_dir():
        sys.exit(f"--data {data}: no such folder; the matrix takes datasets from it")
    if arguments.trial is None:
        outcomes = run_all(trials, arguments, runs)
        return int(any(outcomes.get(trial.name) != "finished" for trial in trials))
    if not 0 <= arguments.trial < len(trials):
        sys.exit(f"--trial {arguments.trial}: there are {len(trials)}, from 0; see --list")
    return run_one(trials[arguments.trial], arguments, runs)


if __name__ == "__main__":
    sys.exit(main())
