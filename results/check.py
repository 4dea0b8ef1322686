"""Make a record again from its own command and compare: on the same kind of CPU, with the same
versions and the same script, every bit of the agents and every evaluation is the same.

    python results/check.py results/records/cpu/iql/default/seed0.json
    python results/check.py RECORD --data ../shared/data/d4rl_samples   # where its dataset lies now
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIMING = {"seconds", "updates_per_second"}


def command_of(record, folder, data, runs):
    """The record's command line with its own run folder, its dataset looked for in `data`, and the
    run that it starts from in `runs`."""
    _, *words = record["versions"]["command"]
    for i, flag in enumerate(words[:-1]):
        if flag in ("--resume", "--run-dir"):
            words[i + 1] = str(folder)
        if flag == "--dataset" and data and words[i + 1].endswith((".npz", ".hdf5")):
            words[i + 1] = str(data / Path(words[i + 1]).name)
        if flag == "--init-from" and runs:
            words[i + 1] = str(runs.joinpath(*Path(words[i + 1]).parts[-3:]))
    if not {"--resume", "--run-dir"} & set(words):
        words += ["--run-dir", str(folder)]
    script = record["versions"]["script"]
    paths = [ROOT / folder / script for folder in ("algorithms", "baselines")]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        sys.exit(f"{script}, which made the record, is no longer here")
    return [sys.executable, str(path), *words], path


def differences(old, new):
    """What is not the same in two records, in words."""
    found = []
    for name in ("jax", "jaxlib", "numpy", "mujoco", "gymnasium", "flax", "optax", "distrax"):
        was, now = (r["versions"]["packages"].get(name) for r in (old, new))
        if was != now:
            found.append(f"{name} was {was}, is {now}")
    for name in ("script_sha256", "dataset_sha256", "device", "cores"):
        if old["versions"][name] != new["versions"][name]:
            found.append(f"{name} was {old['versions'][name]}, is {new['versions'][name]}")
    for name in ("ended", "offline", "online", "state_sha256"):
        if old[name] != new[name]:
            found.append(f"{name} was {old[name]}, is {new[name]}")
    for name in sorted(set(old["curve"]) - TIMING):
        was, now = old["curve"][name], new["curve"].get(name, [])
        if was != now:
            first = next((i for i, pair in enumerate(zip(was, now, strict=False))
                          if pair[0] != pair[1]), min(len(was), len(now)))
            found.append(f"{name} differs from evaluation {first} on")
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path)
    parser.add_argument("--data", type=Path, help="folder of the dataset, if it has moved")
    parser.add_argument("--runs", type=Path, help="run folders of the sweep, for --init-from")
    arguments = parser.parse_args()
    if not arguments.record.is_file():
        sys.exit(f"{arguments.record}: no such record")
    old = json.loads(arguments.record.read_text())
    with tempfile.TemporaryDirectory() as folder:
        command, script = command_of(
            old, Path(folder) / "run", arguments.data, arguments.runs)
        if hashlib.sha256(script.read_bytes()).hexdigest() != old["versions"]["script_sha256"]:
            print(f"{script.name} has changed since; `git checkout "
                  f"{old['versions']['git_commit'][:10]}` for the one that made the record")
        made = old["versions"].get("environment_variables", {})
        env = os.environ | {k: v for k, v in made.items() if k != "JAX_COMPILATION_CACHE_DIR"}
        if old["versions"]["device"] == "cpu":
            env |= {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1",
                    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}
        if hasattr(os, "sched_setaffinity"):  # as many cores: the last digits depend on it
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: old["versions"]["cores"]])
        done = subprocess.run(command, env=env, check=False)
        path = Path(folder) / "run" / "record.json"
        if not path.exists():
            sys.exit(f"no record came of it: exit code {done.returncode}")
        found = differences(old, json.loads(path.read_text()))
    print("\n".join(found) if found else f"{arguments.record}: the same, to the bit")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
