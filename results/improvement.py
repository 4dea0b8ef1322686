"""What Uni-O4's offline stage is worth: the gate beside the truth, and a shifted world.

    python results/improvement.py           # write improvement.md, its figures and README.md's part
    python results/improvement.py --check   # exit 1 where they are not what the records say

From the records of `uni_o4`, `uni_o4-one-step`, `bc`, and of the story of the shifted world (`ppo`,
`ppo-weak`, `uni_o4-weak`) that sweep.py has made from matrix.toml. With --true-scores a run plays
every candidate of AM-Q in the environment, for its log (queries.csv) only; here the two are held
against each other:

    ranking      the share of pairs of a run's candidates, of any query and member, whose order by
                 AM-Q is that of their returns; a coin has 0.5
    within 20 %  the same, where a pair whose returns differ by less counts as ordered, too
    chance       how often the deployed policy would be at least that good, were it drawn from the
                 run's candidates: the share of them whose return is not above the deployed one's

A gate that is worth its rollouts has the first and the last near 1.
"""

import argparse
import csv
import sys
import tempfile
from pathlib import Path

import numpy as np
import report
from matplotlib import pyplot
from matplotlib.ticker import EngFormatter

HOME = report.ROOT / "results"
DATASETS = ("hopper-medium-replay", "hopper-medium", "halfcheetah-medium-replay",
            "ope-hopper-replay")  # fmt: skip
WORLD = "Hopper-v5"  # where the story of the shifted world is told


# ---------------------------------------------------------------------------------------- Records


def read_runs(folder, profile):
    """{(entry, dataset): finished runs} of report.runs_of, each with its "record" and "queries"
    (rows of queries.csv, of its seed)."""
    found = {}
    for name, record in report.read_records(folder).items():
        where, entry, dataset, _ = name.split("/")
        if where != profile or not (
            entry in ("uni_o4", "uni_o4-one-step", "bc") and dataset in DATASETS
            or entry in ("ppo", "ppo-weak", "uni_o4-weak") and dataset == WORLD
        ):
            continue
        for run in report.runs_of(name, record):
            if run["ended"] == "finished":
                queries = read_queries(folder / f"{name}.queries.csv", run["seed"])
                run |= {"record": record, "queries": queries}
                found.setdefault((entry, dataset), []).append(run)
    return found


def read_queries(path, seed):
    """The rows of a seed in a queries.csv, as numbers; [] where there is none."""
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        rows = [{name: float(text) for name, text in row.items()} for row in csv.DictReader(file)]
    return [row for row in rows if row["seed"] == seed]


def column(run, name, phase):
    """The values of a column of a run's curve in a phase, where there are any."""
    curve = run["record"]["curve"]
    rows = zip(curve["phase"], curve["seed"], curve[name], strict=True)
    return [value for p, seed, value in rows
            if p == phase and seed == run["seed"] and value is not None]


# --------------------------------------------------------------------------------------- Measures


def in_unit(run, value):
    """A return in the run's unit: the score where its environment has one."""
    reference = run["record"]["reference"]
    if run["unit"] == "return":
        return value
    return 100 * (value - reference["random"]) / (reference["expert"] - reference["random"])


def offline_measures(run):
    """{measure: value} of a run of uni_o4 with --true-scores."""
    config = run["record"]["config"]
    supervised = config["cloning_steps"] + config["critic_steps"] + config["dynamics_steps"]
    returns = [in_unit(run, row["return"]) for row in run["queries"]]
    online = [value for step, value in run["points"]["online"] if step]
    accepted = [row["accepted"] for row in run["queries"]]
    return {
        "clone": [v for step, v in run["points"]["offline"] if step <= supervised][-1],
        "offline": run["offline"],
        "best": max(returns) if returns else None,
        "ranking": ordered(run, 0.0)[0],
        "near": ordered(run, 0.2)[0],
        "coin": ordered(run, 0.2)[1],
        "chance": float(np.mean(np.array(returns) <= run["offline"])) if returns else None,
        "accepted": float(np.mean(accepted)) if accepted else None,
        "lowest": min(online) if online else None,
        "online": run["online"],
    }


def ordered(run, margin):
    """Share of pairs of candidates, queried with one horizon, that AM-Q orders as their returns
    are, or whose returns differ by less than `margin` of the larger; and what a coin would have of
    that. None without any."""
    rows = run["queries"]
    if not rows:
        return None, None
    horizon, amq, returns = (np.array([row[name] for row in rows])
                             for name in ("horizon", "amq", "return"))
    i, j = np.triu_indices(len(rows), 1)
    i, j = i[horizon[i] == horizon[j]], j[horizon[i] == horizon[j]]
    if not len(i):
        return None, None
    right = np.sign(amq[i] - amq[j]) == np.sign(returns[i] - returns[j])
    near = np.abs(returns[i] - returns[j]) < margin * np.maximum(returns[i], returns[j])
    return float(np.mean(right | near)), float(np.mean(np.where(near, 1.0, 0.5)))


def falls(run, steps):
    """Falls per 1,000 training steps in the first `steps` online steps, or, below 0, the last."""
    points = [step for step, _ in run["points"]["online"]]
    fallen = column(run, "falls", "online")
    begins, ends = points[:-1], points[1:]  # of the logged intervals; the first point is step 0
    total = ends[-1]
    kept = [i for i, (a, b) in enumerate(zip(begins, ends, strict=True))
            if (a < steps if steps > 0 else b > total + steps)]
    return 1000 * sum(fallen[i] for i in kept) / (ends[kept[-1]] - begins[kept[0]])


# ----------------------------------------------------------------------------------------- Tables


def offline_table(runs):
    """A row per dataset, in Markdown."""
    names = ("dataset", "seeds", "unit", "`bc.py`", "clone", "one step", "Uni-O4", "best queried",
             "ranking", "within 20 %", "a coin's", "chance", "accepted", "online, lowest",
             "online, last")  # fmt: skip
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for dataset in DATASETS:
        mine = runs.get(("uni_o4", dataset), [])
        if not mine:
            continue
        found = [offline_measures(run) for run in mine]
        cells = [dataset, str(len(mine)), mine[0]["unit"]]
        cells += [report.show([run["offline"] for run in runs.get(("bc", dataset), [])])]
        cells += [report.show([each["clone"] for each in found])]
        cells += [report.show([r["offline"] for r in runs.get(("uni_o4-one-step", dataset), [])])]
        keys = ("offline", "best", "ranking", "near", "coin", "chance", "accepted", "lowest",
                "online")  # fmt: skip
        cells += [report.show([each[key] for each in found]) for key in keys]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def shifted_table(runs):
    """The story of the shifted world in Markdown, a row per policy."""
    home, plain, uni = (runs.get((entry, WORLD), []) for entry in
                        ("ppo", "ppo-weak", "uni_o4-weak"))  # fmt: skip
    lines = ["| policy | seeds | return | falls per 1,000 steps | falls in the online phase |",
             "|---|---|---|---|---|"]

    def row(label, group, value, rate=None, total=None):
        cells = [report.show([function(run) for run in group]) if function else "-"
                 for function in (value, rate, total)]
        lines.append(f"| {label} | {len(group)} | {' | '.join(cells)} |")

    def whole(run):
        return sum(column(run, "falls", "online"))

    row("pre-trained by PPO, at home", home, lambda run: run["online"])
    row("pre-trained, in the shifted world", plain, lambda run: run["points"]["online"][0][1],
        lambda run: falls(run, 5_000))
    row("Uni-O4, offline-improved", uni, lambda run: run["offline"], lambda run: falls(run, 5_000))
    row("Uni-O4, online-improved", uni, lambda run: run["online"], lambda run: falls(run, -5_000),
        whole)
    row("PPO online, without the offline stage", plain, lambda run: run["online"],
        lambda run: falls(run, -5_000), whole)
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------- Figures


def plot_offline(runs, path):
    """A column per dataset: above AM-Q's scores beside the returns, below the online curves."""
    datasets = [dataset for dataset in DATASETS if ("uni_o4", dataset) in runs]
    figure, axes = pyplot.subplots(2, max(len(datasets), 1), figsize=(3.4 * len(datasets) + 1, 6),
                                   squeeze=False, layout="constrained")
    for (above, below), dataset in zip(axes.T, datasets, strict=False):
        mine = runs["uni_o4", dataset]
        for color, run in zip(report.COLORS, mine, strict=False):
            above.scatter([row["amq"] for row in run["queries"]],
                          [in_unit(run, row["return"]) for row in run["queries"]],
                          s=8, color=color, alpha=0.6, lw=0, label=f"seed {run['seed']}")
        above.set(title=dataset, xlabel="AM-Q", ylabel=f"{mine[0]['unit']} of a candidate")
        plot_curves(below, mine, report.COLORS[0], "Uni-O4")
        for style, label, entry in (("--", "one step", "uni_o4-one-step"), (":", "bc.py", "bc")):
            others = [run["offline"] for run in runs.get((entry, dataset), [])]
            if others:
                below.axhline(np.mean(others), color="0.4", ls=style, lw=1, label=label)
        below.set(xlabel="environment steps after the switch", ylabel=mine[0]["unit"])
    for panel in axes[:, -1]:
        if panel.has_data():
            panel.legend(frameon=False, fontsize=8)
    report.save_figure(figure, path)


def plot_shifted(runs, path):
    """In the shifted world: returns, and falls so far."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8.5, 3.2), layout="constrained")
    for color, label, entry in ((report.COLORS[0], "Uni-O4: offline, then online", "uni_o4-weak"),
                                (report.COLORS[1], "PPO online", "ppo-weak")):
        mine = runs.get((entry, WORLD), [])
        plot_curves(left, mine, color, label)
        for i, run in enumerate(mine):
            steps = [step for step, _ in run["points"]["online"]]
            right.plot(steps, np.cumsum([0, *column(run, "falls", "online")]), color=color, lw=1,
                       label=None if i else label)
    mine = runs.get(("ppo-weak", WORLD), [])
    if mine:
        before = np.mean([run["points"]["online"][0][1] for run in mine])
        left.axhline(before, color="0.4", ls=":", lw=1, label="pre-trained")
    for panel, label in ((left, "return"), (right, "falls so far")):
        panel.set(xlabel="environment steps in the shifted world, online", ylabel=label)
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    if left.has_data():
        left.legend(frameon=False, fontsize=8)
    report.save_figure(figure, path)


def plot_curves(panel, runs, color, label):
    """The mean of the online curves, and from the smallest to the largest seed."""
    if not runs:
        return
    curves = [dict(run["points"]["online"]) for run in runs]
    steps = sorted(set.intersection(*map(set, curves)))
    values = np.array([[curve[step] for step in steps] for curve in curves])  # (seeds, steps)
    panel.plot(steps, values.mean(axis=0), color=color, lw=1.5, label=label)
    panel.fill_between(steps, values.min(axis=0), values.max(axis=0), color=color, alpha=0.15, lw=0)
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))


# ------------------------------------------------------------------------------------------- main


ABOUT = """Made by `python results/improvement.py` from the [records](records) of the runs in
[`matrix.toml`](matrix.toml). Means over seeds; in brackets the 95 % bootstrap interval, of fewer
than 5 seeds the smallest and the largest value. The runs are small: 4,000 steps of cloning, 25,000
of critics (2 layers of 256; tau 0.02, because with the published 0.005 Q had come to a third of the
data's discounted return after 18,000 updates), 3,000 of the model, 1,500 of improvement with 15
queries of 100 steps in the model (the paper's: 1,000); then 100,000 steps online. The data are
samples of D4RL's (`ope-hopper-replay`: regenerated), so no score here is one on D4RL."""
OFFLINE = """The clone is the first member before the improvement, `bc.py` another network on the
same rows; one step: the same 1,500 improvement steps against the clones, behind a gate that never
opens. Best queried: the highest of all candidates ever asked about, which nobody may choose without
the environment. Ranking: share of pairs of a run's candidates that AM-Q orders as the environment
does (a coin: 0.5); within 20 %: the same, a pair whose returns differ by less counting as ordered,
and what a coin would have of that. Chance: share of a run's candidates that are not better than the
deployed one. Accepted: share of the questions, member by member, after which the reference moved.
Online: the lowest and the last evaluation after the switch."""
SHIFTED = """Hopper-v5, every motor with 90 % of its strength. PPO trains for 600,000 steps in the
world as it is. Uni-O4 plays that policy for 50,000 steps in the shifted one, improves it on these
alone, then goes on there for 100,000 steps; PPO goes on there at once, for as many, with Uni-O4's
learning rates and clipping (its value function has two layers of 64, Uni-O4's two of 256). Return:
10 deterministic episodes. Falls: of the sampling policy that trains, in the first interval of about
5,000 steps (before it has changed much: the pre-trained, the offline-improved) or the last one (the
online-improved). Not counted: the falls of Uni-O4's 50,000 collected steps, at the pre-trained
policy's rate some 195."""


def generate(records, profile, figures):
    """{path: text} of what is generated; the figures are written into `figures`."""
    runs = read_runs(records, profile)
    plot_offline(runs, figures / "improvement.png")
    plot_shifted(runs, figures / "shifted.png")
    offline, shifted = offline_table(runs), shifted_table(runs)
    body = ["# What the offline stage is worth", "", ABOUT, "", "## On datasets", "", offline, "",
            OFFLINE, "", "![AM-Q beside the truth, and the online curves](figures/improvement.png)",
            "", "Below: the mean over seeds, from the smallest to the largest.", "",
            "## In a shifted world", "", shifted, "", SHIFTED, "",
            "![The shifted world](figures/shifted.png)", ""]
    readme = (report.ROOT / "README.md").read_text()
    return {
        HOME / "improvement.md": "\n".join(body),
        report.ROOT / "README.md": report.between(readme, "improvement", f"{offline}\n\n{shifted}"),
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
        pictures = ["improvement.png", "shifted.png"]
        return report.settle(written, folder, pictures, arguments.check)


if __name__ == "__main__":
    sys.exit(main())
