"""The collapse study: what an agent loses when it goes online, by data, algorithm and replay.

    python results/collapse.py --profile cpu --runs DIR --data DIR   # make the runs, then the table
    python results/collapse.py --tables                              # the table, of what is there
    python results/collapse.py --check             # exit 1 where it is not what the records say

The runs are those of collapse.toml, by sweep.py (options not named here are passed on to it): the
same command goes on with them. Then collapse.md, figures/collapse.png and README.md's part are
written, from the records. A run that is missing, or failed, is counted and has no values.

The three factors are those of arXiv 2303.17396, the protocol ours. Not every algorithm with every
replay: TD3 and TD3-C, from the same agents, have all three, so that what the constraint does and
what the replay does can be told apart. The others have one each: SAC naive and mixed differ in
nothing else, WSRL is to do without the dataset, IQL appends, Cal-QL halves. The first 1,000 steps
are without updates; WSRL's 5,000 are its idea; IQL and Cal-QL update from the first step. Left out
of the protocol: agents trained from scratch, medium-expert and random data, five seeds for three,
100,000 steps for 50,000.

Of each run, in points of score:

    offline    the evaluation at the switch
    depth      offline - the lowest evaluation of the online steps 1 ... 25,000
    recovered  the first step after that lowest one whose evaluation is at least offline
    final      the last evaluation
    area       mean height of the curve, from the switch to the end, by trapezoids

Where the protocol leaves it open: the depth is not clipped, and below 0 says that the run was never
as low; such a run has nothing to recover from, and is not counted among those that recover or do
not. The area is divided by the steps: it is to be compared with the offline score.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import report
import sweep
from matplotlib import pyplot
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

HOME = report.ROOT / "results"
MATRIX = HOME / "collapse.toml"
WINDOW = 25_000  # online steps in which a collapse is looked for: it is early, or there is none
ROWS = {  # entry of collapse.toml: (whose offline agents, algorithm online, replay)
    "collapse-td3_bc": ("TD3+BC", "TD3+BC", "half"),
    "collapse-td3-online": ("TD3+BC", "TD3", "online"),
    "collapse-td3-append": ("TD3+BC", "TD3", "append"),
    "collapse-td3-half": ("TD3+BC", "TD3", "half"),
    "collapse-td3_c-online": ("TD3+BC", "TD3-C", "online"),
    "collapse-td3_c-append": ("TD3+BC", "TD3-C", "append"),
    "collapse-td3_c-half": ("TD3+BC", "TD3-C", "half"),
    "collapse-sac_finetune-naive": ("CQL", "SAC", "online"),
    "collapse-sac_finetune-mixed": ("CQL", "SAC", "half"),
    "collapse-sac_finetune-wsrl": ("CQL", "WSRL", "online"),
    "collapse-sac_finetune-conservative": ("CQL", "SAC, KL bound", "half"),
    "iql": ("IQL", "IQL", "append"),
    "collapse-cal_ql": ("Cal-QL", "Cal-QL", "half"),
}
ALGORITHMS = list(dict.fromkeys(algorithm for _, algorithm, _ in ROWS.values()))
COLOR = dict(zip(ALGORITHMS, report.COLORS, strict=True))
LINES = {"half": "-", "online": "--", "append": ":"}  # how the figure draws a replay


# --------------------------------------------------------------------------------------- Measures


def measures(run):
    """{measure: value} of a finished run (one of report.runs_of); None where there is none."""
    offline = run["offline"]
    points = [(step, value) for step, value in run["points"]["online"] if step > 0]
    lowest_at, lowest = min((p for p in points if p[0] <= WINDOW), key=lambda point: point[1])
    again = (step for step, value in points if step > lowest_at and value >= offline)
    steps, values = zip((0, offline), *points, strict=True)
    return {
        "offline": offline,
        "depth": offline - lowest,
        "recovered": next(again, None) if lowest < offline else None,
        "final": values[-1],
        "area": float(np.trapezoid(values, steps)) / steps[-1],
    }


def recovery(found):
    """The table's words on the measures of several runs: when, and how many of those that fell."""
    fell = [each["recovered"] for each in found if each["depth"] > 0]
    if not fell:
        return "never below" if found else "-"
    back = [step for step in fell if step is not None]
    return f"{report.show(back)} ({len(back)} of {len(fell)})" if back else f"none of {len(fell)}"


# ---------------------------------------------------------------------------------------- Records


def read_study(folder, profile):
    """({(dataset, entry): (runs that finished, number of runs planned)}, failures in words)."""
    records = report.read_records(folder)
    trials = sweep.read_matrix(MATRIX, profile, Path("data"), Path("runs"))
    if not trials:
        sys.exit(f"{MATRIX.name} has no runs for --profile {profile}")
    groups, names = {}, [f"{profile}/{trial.name}" for trial in trials]
    for name, trial in zip(names, trials, strict=True):
        entry, dataset, _ = trial.name.split("/")
        if name in records:
            check_made(name, records[name], trial)
        if entry in ROWS:
            runs = report.runs_of(name, records[name]) if name in records else []
            finished, planned = groups.setdefault((dataset, entry), ([], 0))
            finished += [run for run in runs if run["ended"] == "finished"]
            groups[dataset, entry] = finished, planned + 1
    failed = [text for text in report.failures(records, folder) if text.split(":")[0] in names]
    datasets, rows = list(dict.fromkeys(dataset for dataset, _ in groups)), list(ROWS)
    order = sorted(groups, key=lambda key: (datasets.index(key[0]), rows.index(key[1])))
    return {key: groups[key] for key in order}, failed


def check_made(name, record, trial):
    """Exit where a record was made by other arguments than collapse.toml has now."""
    made, planned = map(without_paths, (record["versions"]["command"], trial.command))
    if made != planned:
        sys.exit(f"{name}: its run was made by other arguments ({' '.join(made)}) than "
                 f"{MATRIX.name} has ({' '.join(planned)})")


def without_paths(command):
    """A command line whose paths are cut to what is the same on every machine."""
    kept = {"--dataset": 1, "--init-from": 3, "--resume": 3}  # last parts of the path
    words = [Path(command[0]).name]
    for flag, word in zip(command, command[1:], strict=False):
        words.append("/".join(Path(word).parts[-kept[flag] :]) if flag in kept else word)
    return words


# ------------------------------------------------------------------------------- Table and figure


def table(groups):
    """All groups in Markdown, a row each."""
    columns = ("dataset", "agent of", "online", "replay", "finished", "offline", "depth",
               "recovered at", "final", "area")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for (dataset, entry), (runs, planned) in groups.items():
        found = [measures(run) for run in runs]
        cells = {key: report.show([each[key] for each in found])
                 for key in ("offline", "depth", "final", "area")} | {"recovered": recovery(found)}
        shown = [cells[key] for key in ("offline", "depth", "recovered", "final", "area")]
        lines.append(f"| {' | '.join([dataset, *ROWS[entry], f'{len(runs)} of {planned}', *shown])}"
                     " |")
    return "\n".join(lines)


def count(groups):
    """How many runs there are, in words."""
    finished = sum(len(runs) for runs, _ in groups.values())
    return f"{finished} of {sum(planned for _, planned in groups.values())} runs finished"


def plot(groups, path):
    """A column per dataset; above what starts from TD3+BC's agents, below the others."""
    datasets = list(dict.fromkeys(dataset for dataset, _ in groups))
    figure, axes = pyplot.subplots(2, len(datasets), figsize=(3.4 * len(datasets) + 1.4, 6),
                                   sharex=True, sharey="col", squeeze=False, layout="constrained")
    for column, dataset in enumerate(datasets):
        mine = {entry: group for (d, entry), group in groups.items() if d == dataset}
        axes[0, column].set_title(f"{dataset}\n{count(mine)}", fontsize=10)
        axes[1, column].set_xlabel("environment steps after the switch")
        for panel in axes[:, column]:
            panel.axvline(0, color="0.4", lw=1)  # the switch
            panel.axhline(0, color="0.8", lw=0.5)  # every axis has its 0
            panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        for entry, (runs, _) in mine.items():
            if runs:
                plot_runs(axes[int(ROWS[entry][0] != "TD3+BC"), column], entry, runs)
        unit = next((run["unit"] for runs, _ in mine.values() for run in runs), None)
        for panel in axes[:, column]:
            panel.set_ylabel(unit)
    for i, panel in enumerate(axes[:, -1]):
        starts = [row for row in ROWS.values() if (row[0] != "TD3+BC") == bool(i)]
        panel.legend(handles=[Line2D([], [], color=COLOR[a], ls=LINES[r], label=f"{a}, {r}")
                              for _, a, r in starts],
                     frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1))
    report.save_figure(figure, path)


def plot_runs(panel, entry, runs):
    """One group's curve: the mean over its seeds, and from their smallest to their largest."""
    curves = [{0: run["offline"], **dict(run["points"]["online"])} for run in runs]
    steps = sorted(set.intersection(*map(set, curves)))
    values = np.array([[curve[step] for step in steps] for curve in curves])  # (seeds, steps)
    _, algorithm, replay = ROWS[entry]
    color = COLOR[algorithm]
    panel.plot(steps, values.mean(axis=0), color=color, ls=LINES[replay], lw=1.5)
    panel.fill_between(steps, values.min(axis=0), values.max(axis=0), color=color, alpha=0.1, lw=0)


# ------------------------------------------------------------------------------------------- main


ABOUT = """Made by `python results/collapse.py --tables` from the [records](records) of the runs in
[`collapse.toml`](collapse.toml); without `--tables` it makes the runs, or goes on with them. What
the columns mean, and why these combinations: the text at the top of [`collapse.py`](collapse.py).
In short: the depth is the offline score minus the lowest evaluation of the first 25,000 online
steps; a run has recovered at the first evaluation after that which is as good as offline (mean over
those that do, of those that fell); the area is the mean height of the online curve. Means over
seeds; in brackets the 95 % bootstrap interval, of fewer than 5 seeds the smallest and the largest
value.

A depth of some points is no collapse: it is the smallest of ten evaluations (IQL's: of five) of ten
episodes each, and the offline score is one such evaluation, too. Where the offline score is low
there is little to lose. The agents are small (50,000 offline updates of TD3+BC, 20,000 of CQL and
Cal-QL with 4 sampled actions, 200,000 of IQL), and so are the samples of the data: compare rows
within a dataset that start from the same agents, not with the literature. ope-hopper-replay has
360,658 rows, the others about 9,000: wide and narrow data are also large and small here, and after
25,000 steps the new rows are 74 % of an appended buffer there, but 6.5 % of that one. WSRL does not
learn before step 5,000, so that two of its ten evaluations are the offline agent's; a run that was
stopped because a loss was not finite has no row here, which flatters what breaks."""
CAPTION = """The switch is at 0, where each curve begins at the offline score. Mean over seeds, and
from the smallest to the largest of them: solid, half of every batch from the dataset; dashed, new
transitions only; dotted, all rows equally likely. Above, the agents of TD3+BC; below, those of CQL
(SAC and WSRL), IQL and Cal-QL."""


def generate(records, profile, figures):
    """{path: text} of what is generated; the figure is written into `figures`."""
    groups, failed = read_study(records, profile)
    plot(groups, figures / "collapse.png")
    body = ["# The collapse study", "", ABOUT, "", f"{count(groups)}; failed: "
            + ("; ".join(failed) if failed else "none") + ".", "", table(groups), "",
            "![Online curves](figures/collapse.png)", "", CAPTION, ""]
    shown = {key: group for key, group in groups.items() if group[0]}  # the README shows no holes
    part = f"{count(groups)}.\n\n{table(shown)}"
    readme = (report.ROOT / "README.md").read_text()
    return {
        HOME / "collapse.md": "\n".join(body),
        report.ROOT / "README.md": report.between(readme, "collapse", part),
    }


def write(arguments):
    """Write what has changed, or with --check only name it. Returns the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        written = generate(arguments.records, arguments.profile, Path(folder))
        return report.settle(written, folder, ["collapse.png"], arguments.check)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    parser.add_argument("--profile", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--records", type=Path, default=HOME / "records")
    parser.add_argument("--tables", action="store_true", help="make no runs")
    parser.add_argument("--check", action="store_true", help="make no runs, write nothing, compare")
    arguments, others = parser.parse_known_args()
    code = 0
    if arguments.tables or arguments.check:
        if others:
            parser.error(f"without runs there is no use for {' '.join(others)}")
    else:
        code = sweep.main(["--matrix", str(MATRIX), "--profile", arguments.profile,
                           "--records", str(arguments.records), *others])
        if {"--list", "--trial"} & set(others):  # a part of it, or nothing, was run here
            return code
    return write(arguments) or code


if __name__ == "__main__":
    sys.exit(main())
