"""The records of the published numbers: make the runs, keep one JSON each, and the tables.

    python results/records.py run iql --data ../shared/data/d4rl_samples --runs /tmp/runs
    python results/records.py collect /tmp/runs     # run folders -> results/records/**.json
    python results/records.py tables                # -> results/README.md, and README.md's table

`run` starts one single-threaded process per core and goes on where it was stopped: finished runs
are left alone, others resumed from their checkpoints.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot

ROOT = Path(__file__).resolve().parent.parent
BUDGET = ["--offline-steps", "200000", "--online-steps", "50000", "--eval-interval", "5000"]
MATRIX = {  # set: {name: (script, arguments, seeds)}; {data} is the folder of the D4RL samples
    "iql": {
        f"iql/{name}": (
            "algorithms/iql.py",
            ["--dataset", f"{{data}}/{name}.npz", "--env-id", env_id, *BUDGET],
            range(3),
        )
        for name, env_id in (
            ("hopper-medium-replay-v2-tsrl1of40", "Hopper-v4"),
            ("hopper-medium-v2-tsrl1of100", "Hopper-v4"),
            ("halfcheetah-medium-v2-tsrl1of100", "HalfCheetah-v4"),
        )
    },
    "default": {"iql/default": ("algorithms/iql.py", [], range(3))},
    "sac": {
        "sac/Hopper-v5": (
            "baselines/sac.py",
            ["--env-id", "Hopper-v5", "--online-steps", "300000", "--eval-interval", "10000"],
            range(4),
        )
    },
}


ABOUT = """Made by `python results/records.py tables` from `records/`, one JSON per run with its
configuration, versions and evaluation curve. Mean over seeds [every seed], from the last evaluation
of a phase, 10 episodes. The dip is the offline value minus the lowest evaluation after the switch.
Scores learned from a sample of a D4RL dataset are not scores on that dataset."""


def run(names, data, runs):
    """Every run of the named sets, seed by seed, one process per core."""
    jobs = [
        (name, script, [part.format(data=data) for part in arguments], seed)
        for each in names
        for name, (script, arguments, seeds) in MATRIX[each].items()
        for seed in seeds
    ]
    jobs.sort(key=lambda job: job[3])  # all first seeds first
    cores = SimpleQueue()
    for core in sorted(os.sched_getaffinity(0)):
        cores.put(core)

    def start(job):
        name, script, arguments, seed = job
        folder, core = runs / name / f"seed{seed}", cores.get()
        folder.mkdir(parents=True, exist_ok=True)
        env = os.environ | {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}
        command = ["taskset", "-c", str(core), sys.executable, str(ROOT / script), *arguments]
        command += ["--seed", str(seed), "--resume", str(folder)]
        if not (folder / "curve.png").exists():
            with open(folder / "log.txt", "a") as log:
                subprocess.run(command, env=env, stdout=log, stderr=log, check=False)
        cores.put(core)
        done = (folder / "curve.png").exists()
        print(f"{name} seed {seed}: {'done' if done else 'not finished, see log.txt'}", flush=True)

    with ThreadPoolExecutor(cores.qsize()) as pool:
        list(pool.map(start, jobs))


def record(folder):
    """A run folder as one JSON object: what made it, its evaluations, and what they amount to."""
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    curve = [
        {"phase": row["phase"], "step": int(row["step"]), "return": float(row["return"]),
         "score": float(row["score"]) if row["score"] else None, "length": float(row["length"])}
        for row in rows if row["return"]
    ]
    column = "score" if curve[0]["score"] is not None else "return"
    offline = [point[column] for point in curve if point["phase"] == "offline"]
    online = [point[column] for point in curve if point["phase"] == "online"]
    seconds = {phase: sum(float(row["seconds"]) for row in rows if row["phase"] == phase)
               for phase in ("offline", "online")}
    steps = {phase: max([int(row["step"]) for row in rows if row["phase"] == phase], default=0)
             for phase in ("offline", "online")}
    return {
        "unit": column,
        "steps": steps,
        "offline": offline[-1] if offline else None,
        "online": online[-1] if online else None,
        "lowest_online": min(online) if online else None,
        "dip": max(0.0, offline[-1] - min(online)) if offline and online else None,
        "training_seconds": seconds,
        "config": json.loads((folder / "config.json").read_text()),
        "versions": json.loads((folder / "versions.json").read_text()),
        "curve": curve,
    }


def collect(runs):
    """results/records/<script>/<name>/seed<k>.json of every run below `runs`."""
    for folder in sorted(path.parent for path in runs.glob("**/metrics.csv")):
        path = ROOT / "results" / "records" / folder.relative_to(runs).with_suffix(".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record(folder), indent=1) + "\n")
        print(path.relative_to(ROOT))


def tables():
    """results/README.md, the same table in README.md, and one figure per group of records."""
    groups = {}
    for path in sorted((ROOT / "results" / "records").glob("**/seed*.json")):
        name = str(path.parent.relative_to(ROOT / "results" / "records"))
        groups.setdefault(name, []).append(json.loads(path.read_text()))
    table = ["| run | seeds | updates offline | steps online | unit | offline | online | dip |",
             "|---|---|---|---|---|---|---|---|"]
    for name, records in groups.items():
        cells = [show([record[key] for record in records]) for key in ("offline", "online", "dip")]
        done = [", ".join(f"{n:,}" for n in sorted({record["steps"][phase] for record in records}))
                for phase in ("offline", "online")]
        table.append(f"| {name} | {len(records)} | {' | '.join(done)} | {records[0]['unit']} | "
                     f"{' | '.join(cells)} |")
        plot(name, records)
    figures = [f"![{name}](figures/{name.replace('/', '-')}.png)" for name in groups]
    lines = ["# Results", "", ABOUT, "", *table, "", *figures, ""]
    (ROOT / "results" / "README.md").write_text("\n".join(lines))
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text().partition("<!-- results -->")
    after = rest.partition("<!-- end of results -->")[2]
    parts = [before, "<!-- results -->\n", "\n".join(table), "\n<!-- end of results -->", after]
    readme.write_text("".join(parts))
    print("\n".join(table))


def show(values):
    """Mean and every seed's value."""
    if None in values:
        return "-"
    return f"{np.mean(values):.1f} [{', '.join(f'{value:.0f}' for value in values)}]"


def plot(name, records):
    """Every seed's evaluations over updates offline and steps online."""
    figure, axes = pyplot.subplots(figsize=(7, 3), layout="constrained")
    switch = records[0]["steps"]["offline"]
    for i, each in enumerate(records):
        steps = [p["step"] + switch * (p["phase"] == "online") for p in each["curve"]]
        axes.plot(steps, [p[each["unit"]] for p in each["curve"]], lw=1, label=f"seed {i}")
    axes.axvline(switch, color="black", ls=":", lw=1)
    axes.set(title=name, xlabel="updates offline | environment steps online",
             ylabel=records[0]["unit"])
    axes.legend(frameon=False)
    path = ROOT / "results" / "figures" / f"{name.replace('/', '-')}.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="make the runs of the named sets")
    runner.add_argument("sets", nargs="+", choices=list(MATRIX))
    runner.add_argument("--data", type=Path, default=Path("../shared/data/d4rl_samples"))
    runner.add_argument("--runs", type=Path, required=True)
    commands.add_parser("collect", help="keep the records").add_argument("runs", type=Path)
    commands.add_parser("tables", help="write results/README.md")
    arguments = parser.parse_args()
    if arguments.command == "run":
        run(arguments.sets, arguments.data.resolve(), arguments.runs.resolve())
    elif arguments.command == "collect":
        collect(arguments.runs.resolve())
    else:
        tables()


if __name__ == "__main__":
    main()
