"""Make the runs behind results/: every entry of matrix.toml, as Ray tasks, and keep their records.

    python results/sweep.py                                  # on this machine, a trial per core
    python results/sweep.py --profile gpu                    # seeds vmapped, trials packed on GPUs
    python results/sweep.py --address HOST:6379              # on a Ray cluster with shared files
    python results/sweep.py --list                           # the trials, numbered
    python results/sweep.py --trial 3                        # one of them, without Ray: SLURM array

A dataset that is not on this machine is made first, by the commands beside its name in the matrix.
A trial is one process of one script in its own run folder. One that dies (kill -9, a lost node, out
of memory) is started again with the same command and goes on from its last round; a finished one is
never run again. Ctrl-C loses less than a round of each: the same command goes on. When a run has
finished, its record is written from outside: what was run, on what, how fast, and every evaluation.
"""

import argparse
import contextlib
import csv
import ctypes
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RETRIES = 20  # of a trial that dies; a loop of deaths ends some time
KEYS = {"name", "script", "datasets", "seeds", "budget", "after", "both", "cpu", "gpu"}


@dataclasses.dataclass(frozen=True)
class Trial:
    """One process. Its run folder and its record are called `name`, which is entry/dataset/seeds;
    in its arguments {after} stands for the folder of the trial that must have finished before."""

    name: str
    script: str
    arguments: tuple[str, ...]
    after: str = ""
    make: tuple[str, ...] = ()  # commands that make its dataset

    def command(self, after):
        """The words after `python`."""
        return [self.script, *(word.replace("{after}", after) for word in self.arguments)]


# ------------------------------------------------------------------------------------------ Matrix


def read_matrix(path, profile):
    """The trials of a profile, all first seeds first. Exits on an entry it cannot understand."""
    try:
        matrix = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        sys.exit(f"{path}: {error}")
    trials, entries = [], []
    for entry in matrix["trials"]:
        if set(entry) - KEYS or not {"script", "datasets", "seeds"} <= set(entry):
            sys.exit(f"{path}: an entry has {', '.join(sorted(entry))}; see the top of the file")
        if entry.get("budget") not in {None, *matrix.get("budgets", ())}:
            sys.exit(f"{path}: {entry['script']}: no [budgets] {entry['budget']}")
        if profile in entry:
            entries += halves(entry, matrix["budgets"], profile) if "budget" in entry else [entry]
    for entry in entries:
        if not (ROOT / entry["script"]).is_file():
            sys.exit(f"{path}: no script {entry['script']}")
        for dataset in entry["datasets"]:
            if dataset not in matrix["datasets"]:
                sys.exit(f"{path}: {entry['script']}: no [datasets] {dataset}")
            said = matrix["datasets"][dataset]  # arguments, or with the commands that make it
            said = {"arguments": said} if isinstance(said, str) else said
            words = f"{said['arguments']} {entry.get('both', '')} {entry[profile]}"
            for first, trial in trials_of(entry, dataset, shlex.split(words), profile):
                trial = dataclasses.replace(trial, make=tuple(said.get("make", ())))
                trials.append((first, trial))
    trials = [trial for _, trial in sorted(trials, key=lambda pair: pair[0])]
    names = [trial.name for trial in trials]
    for i, trial in enumerate(trials):
        if trial.name in names[:i]:
            sys.exit(f"{path}: two trials of name {trial.name}")
        if trial.after and trial.after not in names[:i]:
            sys.exit(f"{path}: {trial.name}: nothing of name {trial.after} above it")
    return trials


def halves(entry, budgets, profile):
    """An entry with a budget, as two: offline, and online from there; that alone with `after`."""
    name = entry.get("name", Path(entry["script"]).stem)
    before, then = (f"{words} {entry[profile]}" for words in budgets[entry["budget"]][profile])
    after = entry.get("after", f"{name}-offline")
    online = entry | {"name": name, "after": after, profile: f"{then} --init-from {{after}}"}
    offline = entry | {"name": f"{name}-offline", profile: f"{before} --online-steps 0"}
    return [online] if "after" in entry else [offline, online]


def trials_of(entry, dataset, words, profile):
    """[(first seed, trial)] of an entry on a dataset: on GPUs one with all seeds."""
    name = entry.get("name", Path(entry["script"]).stem)
    groups = [(f"seed{seed}", seed, 1) for seed in range(entry["seeds"])]
    if profile == "gpu" and entry["seeds"] > 1:
        groups = [(f"seeds0-{entry['seeds'] - 1}", 0, entry["seeds"])]
    found = []
    for group, first, count in groups:
        arguments = (*words, "--seed", str(first), "--num-seeds", str(count))
        after = f"{entry['after']}/{dataset}/{group}" if "after" in entry else ""
        found.append((first, Trial(f"{name}/{dataset}/{group}", entry["script"], arguments, after)))
    return found


# ----------------------------------------------------------------------------------------- One run


@contextlib.contextmanager
def own_core():
    """{a core of this machine that no other trial has}; all cores where none is free, None where
    the system binds no process. Two trials loose on two cores take turns in each other's threads:
    measured, 0.6 to 0.7 of the updates per second; and two threads round otherwise than one."""
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


def run_process(command, folder, gpu, cores):
    """One process of a script, to its end: (exit code, below 0 a signal; peak memory in MB)."""
    env = os.environ | {"PYTHONUNBUFFERED": "1", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if gpu:
        env["JAX_PLATFORMS"] = "cuda,cpu"  # without a GPU an error, not a slow run
    else:
        env |= {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
        env["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def in_child():
        if libc:
            libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with the process above it
        if cores:
            os.sched_setaffinity(0, cores)

    with open(folder / "log.txt", "a") as log:
        process = subprocess.Popen(  # of its own session: a terminal's Ctrl-C comes to us only
            [sys.executable, *command], cwd=ROOT, env=env, stdout=log, stderr=log,
            start_new_session=True, preexec_fn=in_child,
        )  # fmt: skip
    pid = 0
    while not pid:  # an interrupt by Ray does not wake a wait without end
        time.sleep(0.2)
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, round(usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3))


def run_trial(trial, runs, gpu):
    """A trial to its end, started again as often as it dies: "finished" or "failed: ...". Leaves
    starts.json, log.txt and, of a finished one, record.json in its folder."""
    folder = runs / trial.name
    folder.mkdir(parents=True, exist_ok=True)
    command = [*trial.command(str(runs / trial.after)), "--run-dir", str(folder)]
    starts, code = read_json(folder / "starts.json") or [], -1
    with contextlib.nullcontext() if gpu else own_core() as cores:
        for _ in range(RETRIES):
            begin = time.time()
            starts.append(provenance(trial.script, gpu, cores))
            write_json(folder / "starts.json", starts)
            code, memory = run_process(command, folder, gpu, cores)
            seconds = round(time.time() - begin, 1)
            starts[-1] |= {"exit_code": code, "seconds": seconds, "peak_memory_mb": memory}
            write_json(folder / "starts.json", starts)
            if 0 <= code <= 128:
                break
    if code:
        lines = (folder / "log.txt").read_text(errors="replace").strip().splitlines()
        return f"failed ({code}): {lines[-1] if lines else 'no word in log.txt'}"
    write_json(folder / "record.json", make_record(trial, folder, starts))
    return "finished"


def read_json(path):
    """A JSON file's content; None where there is none, or a damaged one."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


# ------------------------------------------------------------------------------------------ Record


def provenance(script, gpu, cores):
    """What a process was started from, and where."""
    text = (ROOT / script).read_bytes()
    commit = output("git", "-C", ROOT, "rev-parse", "HEAD").decode().strip()
    committed = output("git", "-C", ROOT, "show", f"HEAD:{script}")
    pins = re.findall(r"^([\w-]+).*==", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "git_commit": commit,
        "differs_from_commit": committed != text,
        "script_sha256": hashlib.sha256(text).hexdigest(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in [*pins, "jaxlib"]},
        "machine": platform.platform(),
        "device": device(gpu),
        "cores": len(cores) if cores else os.cpu_count(),
    }


def output(*command):
    """What a command prints; nothing where it fails, or is not there."""
    try:
        return subprocess.run(command, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return b""


def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def device(gpu=False):
    """The GPU's name, or the processor's."""
    if gpu:
        found = output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").decode()
        return found.splitlines()[0] if found else "gpu"
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def make_record(trial, folder, starts):
    """The record of a finished run, from its files."""
    config = json.loads((folder / "config.json").read_text())
    rows = read_rows(folder)
    phases = dict.fromkeys(row["phase"] for row in rows)
    mine = {phase: [r for r in rows if r["phase"] == phase] for phase in phases}
    low, high = config["reference"]
    names = ("environment", "units", "reference", "script", "dataset_sha256")
    return {
        "edition": 2,
        "name": trial.name,
        "after": trial.after,
        "command": ["python", *trial.command(trial.after)],
        "script": trial.script,
        "config": {key: value for key, value in config.items() if key not in names},
        "environment": json.loads(config["environment"]),
        "units": config["units"],
        "reference": {"random": low, "expert": high} if high is not None else {},
        "dataset_sha256": config["dataset_sha256"],
        "dataset_rows": dataset_rows(config["dataset"]),
        "steps": {phase: int(each[-1]["step"]) for phase, each in mine.items()},
        "updates_per_second": {phase: usual_rate(each) for phase, each in mine.items()},
        "wall_seconds": round(sum(start.get("seconds", 0) for start in starts), 1),
        "peak_memory_mb": max(start.get("peak_memory_mb", 0) for start in starts),
        "agents_sha256": agents_hash(folder / "checkpoint.npz"),  # to the bit the same if run again
        "starts": starts,
        "curve": {
            name: [
                x[name] if name == "phase" else float(x[name]) if x[name] else None for x in rows
            ]
            for name in rows[0]
        },
    }


def read_rows(folder):
    """The rows of a run's metrics.csv."""
    try:
        with open(folder / "metrics.csv", newline="") as file:
            return list(csv.DictReader(file))
    except OSError:
        return []


def usual_rate(rows):
    """The median of a phase's updates per second, without the first round, which compiles."""
    rows = [row for row in rows if float(row["updates_per_second"])] or rows  # not the switch
    later = [row for row in rows if row["step"] != rows[0]["step"]]
    return statistics.median(float(row["updates_per_second"]) for row in later or rows)


def dataset_rows(dataset):
    """Number of rows of a Minari dataset, from its metadata; None where there is none."""
    home = os.environ.get("MINARI_DATASETS_PATH", Path.home() / ".minari" / "datasets")
    for folder in (ROOT / "baselines" / "datasets", Path(home)):
        found = read_json(folder / dataset / "data" / "metadata.json") if dataset else None
        if found:
            return found.get("total_steps") or None  # 0: killed while it was written
    return None


def agents_hash(path):
    """SHA-256 of the agents' arrays in a checkpoint."""
    state = hashlib.sha256()
    with np.load(path) as arrays:
        for name in sorted(name for name in arrays.files if name.startswith("agents/")):
            state.update(name.encode() + arrays[name].tobytes())
    return state.hexdigest()


# ---------------------------------------------------------------------------------------- All runs


def make_datasets(trials):
    """Make the datasets that are not on this machine, by the commands in the matrix."""
    for make in dict.fromkeys(trial.make for trial in trials if trial.make):
        arguments = next(trial.arguments for trial in trials if trial.make == make)
        dataset = arguments[arguments.index("--dataset") + 1]
        for command in make if dataset_rows(dataset) is None else ():
            print(f"{dataset} is not here: {command}", flush=True)
            path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # this Python's commands
            if subprocess.run(
                shlex.split(command), cwd=ROOT, env=os.environ | {"PATH": path}
            ).returncode:
                sys.exit(f"{dataset}: could not be made by {command}")


def outcome(trial, runs):
    """ "finished" or None. Exits where the folder's finished run was made by other arguments."""
    record = read_json(runs / trial.name / "record.json")
    if record and record["command"] != ["python", *trial.command(trial.after)]:
        made = " ".join(record["command"])
        sys.exit(f"{runs / trial.name}: made by {made}; move it away, or choose other --runs")
    return "finished" if record else None


def keep_record(trial, arguments, runs):
    """Copy a finished trial's record to where the report finds it."""
    record = read_json(runs / trial.name / "record.json")
    path = arguments.records / arguments.profile / f"{trial.name}.json"
    if record and read_json(path) != record:
        write_json(path, record)


def keep_failures(outcomes, arguments):
    """The trials that failed, for the report: they have left no record."""
    path = arguments.records / arguments.profile / "failures.json"
    before = read_json(path) or {}
    failed = {name: text for name, text in before.items() if name not in outcomes}
    failed |= {name: text for name, text in outcomes.items() if text != "finished"}
    if failed or before:
        write_json(path, dict(sorted(failed.items())))


def show_progress(trials, runs, outcomes):
    """Print how many trials have ended, and the last row of each that is at work."""
    ended = list(outcomes.values())
    count = f"{ended.count('finished')} of {len(trials)} finished"
    failed = len(ended) - ended.count("finished")
    print(f"{time.strftime('%H:%M')}  {count}" + f", {failed} failed" * bool(failed), flush=True)
    for trial in trials:
        rows = read_rows(runs / trial.name)
        if trial.name in outcomes:
            if outcomes[trial.name] != "finished":
                print(f"    {trial.name}: {outcomes[trial.name]}")
        elif rows:
            last = rows[-1]
            value = f"score {last['score']}" if last["score"] else f"return {last['return']}"
            print(f"    {trial.name}: {last['phase']} {int(last['step']):,}, {value}", flush=True)


def run_all(trials, arguments, runs):
    """Run the trials through Ray. Returns {name: outcome} of those that ended."""
    try:
        import ray
    except ImportError:
        sys.exit("Ray is missing: pip install -r results/requirements.txt")
    gpu = arguments.profile == "gpu"
    options = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    if not arguments.address and hasattr(os, "sched_getaffinity"):
        options["num_cpus"] = len(os.sched_getaffinity(0))  # not those that SLURM keeps back
    try:
        ray.init(address=arguments.address or "local", **options)
    except Exception as error:  # no cluster there, or no token for it
        sys.exit(f"--address {arguments.address}: {' '.join(str(error).split())}")
    if gpu and not ray.cluster_resources().get("GPU"):
        sys.exit("--profile gpu: Ray sees no GPU")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray has put its own there
    share = 1 / arguments.trials_per_gpu if gpu else 0
    remote = ray.remote(num_cpus=1, num_gpus=share, max_retries=RETRIES)  # of lost nodes, workers

    @remote
    def run(trial, *after):
        if any(text != "finished" for text in after):
            return "failed: the trial that it starts from failed"
        return run_trial(trial, runs, gpu)

    outcomes = {trial.name: "finished" for trial in trials if outcome(trial, runs)}
    tasks = {}  # {name: its task}
    for trial in trials:
        keep_record(trial, arguments, runs)
        if trial.name in outcomes:
            continue
        after = [tasks[trial.after]] if trial.after in tasks else []
        if trial.after and not after and not (runs / trial.after / "record.json").exists():
            outcomes[trial.name] = f"failed: needs {trial.after}, which has not finished"
            continue
        tasks[trial.name] = run.remote(trial, *after)
    of = {tasks[trial.name]: trial for trial in trials if trial.name in tasks}
    pending, printed = list(of), 0.0
    try:
        while pending:
            ready, pending = ray.wait(pending, num_returns=len(pending), timeout=5.0)
            for task in ready:
                try:
                    outcomes[of[task].name] = ray.get(task)
                except Exception as error:  # whatever Ray wraps it in: the trial has not ended
                    outcomes[of[task].name] = f"failed: {str(error).strip().splitlines()[-1]}"
                keep_record(of[task], arguments, runs)
            if ready or time.time() - printed > 60:
                printed = time.time()
                show_progress(trials, runs, outcomes)
    except KeyboardInterrupt:
        print("stopped; the same command goes on")
    keep_failures(outcomes, arguments)
    ray.shutdown()
    return outcomes


def run_one(trial, arguments, runs):
    """One trial in this process, without Ray. Returns its outcome."""
    if trial.after and not (runs / trial.after / "record.json").exists():
        sys.exit(f"{trial.name} needs {trial.after}, which has not finished")
    ended = outcome(trial, runs) or run_trial(trial, runs, arguments.profile == "gpu")
    keep_record(trial, arguments, runs)
    keep_failures({trial.name: ended}, arguments)
    print(f"{trial.name}: {ended}")
    return ended


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--profile", choices=["cpu", "gpu"], default="cpu")
    add("--only", default="", help="trials with this in their name, and what they start from")
    add("--matrix", type=Path, default=ROOT / "results" / "matrix.toml")
    add("--runs", type=Path, default=ROOT / "runs" / "sweep", help="run folders")
    add("--records", type=Path, default=ROOT / "results" / "records" / "second")
    add("--address", help="of a Ray cluster, or auto; default: this machine")
    add("--trials-per-gpu", type=int, default=4)
    add("--list", action="store_true", help="print the numbered trials and stop")
    add("--trial", type=int, help="run only this one, in this process, without Ray")
    arguments = parser.parse_args()
    runs = arguments.runs.resolve()
    trials = read_matrix(arguments.matrix, arguments.profile)
    named = [trial for trial in trials if arguments.only in trial.name]
    trials = [x for x in trials if x in named or x.name in {trial.after for trial in named}]
    if arguments.list:
        for i, trial in enumerate(trials):
            command = shlex.join(["python", *trial.command(str(runs / trial.after))])
            print(i, trial.name, outcome(trial, runs) or "", command, sep="\t")
        return 0
    if arguments.trial is None:
        make_datasets(trials)
        outcomes = run_all(trials, arguments, runs)
        return int(any(outcomes.get(trial.name) != "finished" for trial in trials))
    if not 0 <= arguments.trial < len(trials):
        sys.exit(f"--trial {arguments.trial}: there are {len(trials)}, from 0; see --list")
    make_datasets([trials[arguments.trial]])
    return int(run_one(trials[arguments.trial], arguments, runs) != "finished")


if __name__ == "__main__":
    sys.exit(main())
