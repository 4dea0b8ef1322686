"""Any policy class: what PA-RL makes of a cloned policy, by the global step alone and by both.

    python results/policies.py            # policies.md, its figure, README.md's part
    python results/policies.py --check    # exit 1 where they are not what the records say

From the records of the runs `pa_rl-...` and `cal_ql` of matrix.toml, which sweep.py makes. The
paper's ablation: the cloned policy's own samples, the best of them by Q (global), those ascended
(local), offline and after the online phase, beside Gaussian Cal-QL. A run that is missing, or
failed, has no values.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import report
from matplotlib import pyplot

HOME = report.ROOT / "results"
CLASSES = ("diffusion", "transformer", "gaussian")
CRITICS = {"pa_rl-": "Cal-QL", "pa_rl-iql-": "IQL"}  # how the entries' names begin
DATASETS = ("antmaze-umaze-diverse", "pointmaze-umaze", "door-human", "hopper-medium-replay",
            "ope-hopper-replay")  # fmt: skip


# ---------------------------------------------------------------------------------------- Records


def read_runs(folder, profile):
    """{(entry, dataset): finished runs} of report.runs_of, each with its cloned policy's value,
    "base": the last evaluation of the pretraining, None where there is none."""
    found = {}
    for name, record in report.read_records(folder).items():
        where, entry, dataset, _ = name.split("/")
        if where != profile or dataset not in DATASETS or not entry.startswith(("pa_rl", "cal_ql")):
            continue
        for run in report.runs_of(name, record):
            if run["ended"] == "finished":
                found.setdefault((entry, dataset), []).append(run | {"base": base(run, record)})
    return found


def base(run, record):
    curve = record["curve"]
    rows = zip(curve["phase"], curve["seed"], curve[run["unit"]], strict=True)
    values = [value for phase, seed, value in rows
              if phase == "pretrain" and seed == run["seed"] and value is not None]
    return values[-1] if values else None


def rows_of(runs):
    """Every (dataset, critic, class, cloned values, runs with both steps, runs with the global one)
    there is. The cloned policies are those of the `-offline` runs that both start from, if any,
    of the same seeds."""
    rows = []
    for dataset in DATASETS:
        for prefix, critic in CRITICS.items():
            for policy in CLASSES:
                both, alone, offline = (runs.get((f"{prefix}{policy}{form}", dataset), [])
                                        for form in ("", "-global", "-offline"))
                seeds = {run["seed"] for run in both or alone}
                cloned = [run["base"] for run in offline or both or alone
                          if run["seed"] in seeds or not seeds]
                if cloned:
                    rows.append((dataset, critic, policy, cloned, both, alone))
    return rows


def unit(runs, dataset):
    """What the dataset's runs are measured in: score, or return."""
    return next(run["unit"] for (_, its), all_runs in runs.items() if its == dataset
                for run in all_runs)  # fmt: skip


def lowest(run):
    """The lowest evaluation after the switch."""
    return min(value for step, value in run["points"]["online"] if step)


# ----------------------------------------------------------------------------------------- Output


def table(runs):
    """A row per dataset, critic and class, in Markdown."""
    names = ("dataset", "critic", "policy", "seeds", "unit", "cloned", "global", "global + local",
             "global, online", "global + local, online: lowest", "last",
             "Gaussian Cal-QL", "online")  # fmt: skip
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for dataset, critic, policy, cloned, both, alone in rows_of(runs):
        others = runs.get(("cal_ql", dataset), [])
        values = [
            cloned, [run["offline"] for run in alone], [run["offline"] for run in both],
            [run["online"] for run in alone], [lowest(run) for run in both],
            [run["online"] for run in both], [run["offline"] for run in others],
            [run["online"] for run in others],
        ]
        cells = [dataset, critic, policy, str(len(both or alone)), unit(runs, dataset)]
        lines.append(f"| {' | '.join(cells + [report.show(each) for each in values])} |")
    return "\n".join(lines)


def plot(runs, path):
    """A panel per dataset: the cloned policy, global, global + local, and the end, a point per
    seed, lines through the means, broken where there are no runs."""
    rows = rows_of(runs)
    datasets = list(dict.fromkeys(row[0] for row in rows))
    figure, axes = pyplot.subplots(1, max(len(datasets), 1), figsize=(3.3 * len(datasets) + 2, 3.4),
                                   squeeze=False, layout="constrained")
    labels = ("cloned", "global", "both", "both,\nonline")
    handles = {}
    for panel, dataset in zip(axes[0], datasets, strict=False):
        mine = [row for row in rows if row[0] == dataset]
        for i, (_, critic, policy, cloned, both, alone) in enumerate(mine):
            columns = (cloned, [run["offline"] for run in alone],
                       [run["offline"] for run in both], [run["online"] for run in both])
            color, style = report.COLORS[CLASSES.index(policy)], "-" if critic == "Cal-QL" else "--"
            means = [np.mean(each) if each else np.nan for each in columns]  # NaN: a gap
            (line,) = panel.plot(means, color=color, ls=style, lw=1.5)
            handles[f"{policy}, {critic}'s critic"] = line
            for x, each in enumerate(columns):
                shift = 0.08 * (i - (len(mine) - 1) / 2)  # equal points stay apart
                panel.plot([x + shift] * len(each), each, "o", color=color, ms=4, alpha=0.6, mew=0)
        others = [run["offline"] for run in runs.get(("cal_ql", dataset), [])]
        if others:
            handles["Gaussian Cal-QL, offline"] = panel.axhline(
                np.mean(others), color="0.4", ls=":", lw=1)
        panel.set(title=dataset, ylabel=unit(runs, dataset))
        panel.set_xticks(range(len(labels)), labels)
    if handles:
        figure.legend(handles.values(), handles, frameon=False, fontsize=8,
                      loc="outside right center")
    report.save_figure(figure, path)


ABOUT = """Made by `python results/policies.py` from the [records](records) of the runs in
[`matrix.toml`](matrix.toml). Means over seeds; in brackets the 95 % bootstrap interval, of fewer
than 5 seeds the smallest and the largest value, each the last evaluation of its phase, of 10
episodes. The runs are small: policies of 2 blocks of width 64 (the Gaussian: 2 layers of 256), two
critics of two layers, 16 samples of which 4 are kept, 5 steps of ascent. With Cal-QL's critic
40,000 steps of cloning, batches of 64, tau 0.02 (the target of so few updates must follow faster),
8,000 updates, 4,000 steps online. With IQL's batches of 256; cloning, updates and steps online: in
AntMaze 40,000, 100,000, 4,000; on ope-hopper-replay 20,000, 60,000, 5,000; the same agents serve
both forms of the search. Gaussian Cal-QL is `cal_ql.py` with batches of 256, 4 sampled actions and
its own budget (`matrix.toml`: 20,000 updates and 10,000 steps, in AntMaze 6,000 and 2,000, for
door-human 10,000 and 4,000). The door is gymnasium-robotics 1.4.2's as it is, whose reward adds 0.1
times the palm's distance from the handle where D4RL's subtracts it: a point of score at most."""
COLUMNS = """Cloned: one sample of the cloned policy per step. Global: the best of 16 samples by the
critic's mean. Global + local: the best of 4 of them after ascent. Online: after the online phase,
in which the policy is distilled towards the actions so found."""


def generate(records, profile, figures):
    """{path: text} of what is generated; the figure is written into `figures`."""
    runs = read_runs(records, profile)
    plot(runs, figures / "policies.png")
    found = table(runs)
    body = ["# Any policy class", "", ABOUT, "", found, "", COLUMNS, "",
            "![By policy class](figures/policies.png)", ""]
    readme = (report.ROOT / "README.md").read_text()
    return {
        HOME / "policies.md": "\n".join(body),
        report.ROOT / "README.md": report.between(readme, "policies", found),
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--records", type=Path, default=HOME / "records")
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        written = generate(arguments.records, arguments.profile, Path(folder))
        return report.settle(written, folder, ["policies.png"], arguments.check)


if __name__ == "__main__":
    sys.exit(main())
