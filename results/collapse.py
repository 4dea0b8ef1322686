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
nothing else, WSRL is to do without the dataset, IQL appends, Cal-QL halves, TD3+BC, too. The first
1,000 steps are without updates; WSRL's 5,000, and its 4 critic updates a step, are its idea; IQL
updates from the first step. TD3's family begins online with fresh optimisers, the others carry
theirs; SAC's KL bound also holds the temperature. Left out of the protocol: agents trained from
scratch, REDQ, medium-expert and random data, five seeds for three, 100,000 steps for 50,000.

Of each run, in points of score:

    offline    the evaluation at the switch
    depth      offline - the lowest evaluation of the online steps 1 ... 25,000
    fell       whether the depth is more than a fifth of offline: less may be an evaluation's noise
    recovered  of a run that fell: the first step after that lowest one whose evaluation is at least
               offline
    drop       the largest loss at any time: the best evaluation so far, the one at the switch among
               them, minus the present one. A collapse that comes late has a drop and no depth
    final      the last evaluation
    area       mean height of the curve, from the switch to the end, by trapezoids
    distance   of the last policy from the offline one on the states met online, root mean square
               per action dimension (TD3's family)
    D          of TD3-C, the mean of its constraint over the evaluations (each row of metrics.csv is
               a mean of 500 steps), in epsilons: how well it holds
    multiplier of TD3-C, the last one, at most 100

Where the protocol leaves it open: the depth is not clipped, and below 0 says that the run was never
as low. The area is divided by the steps: it is to be compared with the offline score. What starts
from one agent is also compared seed by seed. Three controls. Is it the switch? The same measures
where nothing is switched, of 25,000 offline updates, as many as the online steps in which a
collapse is looked for: the last ones before the switch, or, where the agents have no more than
that, those after it, of a run with the same arguments that goes on offline. Is the constraint
anything but a slow pace? Plain TD3, half of every batch from the dataset, with a hundredth and with
a thousandth of the policy's learning rate (rate/100, rate/1000). The thousandth was chosen as, on
one agent, it leaves the offline policy about as slowly as TD3-C in 5,000 steps; what became of it
is in the column distance. Is it the optimiser, whose first steps are as long as its rate allows
when it is fresh? Plain TD3 with the moments of TD3+BC's (carried), on narrow data.
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
FALL = 0.2  # share of the offline score that is lost in a fall
ROWS = {  # entry of collapse.toml: (whose offline agents, algorithm online, replay)
    "collapse-td3_bc": ("TD3+BC", "TD3+BC", "half"),
    "collapse-td3-online": ("TD3+BC", "TD3", "online"),
    "collapse-td3-append": ("TD3+BC", "TD3", "append"),
    "collapse-td3-half": ("TD3+BC", "TD3", "half"),
    "collapse-td3-carried": ("TD3+BC", "TD3, carried", "half"),
    "collapse-td3-rate100": ("TD3+BC", "TD3, rate/100", "half"),
    "collapse-td3-rate1000": ("TD3+BC", "TD3, rate/1000", "half"),
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
CONTROLS = {"td3_bc-offline": "TD3+BC", "td3_bc-longer": "TD3+BC", "iql": "IQL"}
COMPARED = {  # measure: what is better, in a word and as a sign
    "depth": ("less", -1), "drop": ("less", -1), "final": ("more", 1), "area": ("more", 1),
}  # fmt: skip
OWN = ("D", "multiplier")  # what only TD3-C has
PAIRS = (  # compared seed by seed: both start from one agent
    ("collapse-td3_c-online", "collapse-td3-online"),
    ("collapse-td3_c-append", "collapse-td3-append"),
    ("collapse-td3_c-half", "collapse-td3-half"),
    ("collapse-td3_c-half", "collapse-td3-rate100"),
    ("collapse-td3_c-half", "collapse-td3-rate1000"),
    ("collapse-td3_bc", "collapse-td3-half"),
    ("collapse-td3-half", "collapse-td3-online"),
    ("collapse-td3-carried", "collapse-td3-half"),
    ("collapse-sac_finetune-conservative", "collapse-sac_finetune-mixed"),
    ("collapse-sac_finetune-mixed", "collapse-sac_finetune-naive"),
    ("collapse-sac_finetune-wsrl", "collapse-sac_finetune-naive"),
)
ALGORITHMS = list(dict.fromkeys(algorithm for _, algorithm, _ in ROWS.values()))
COLOR = dict(zip(ALGORITHMS, [*report.COLORS, "#000000", "#a6761d", "#c51b7d"], strict=True))
LINES = {"half": "-", "online": "--", "append": ":"}  # how the figure draws a replay


# --------------------------------------------------------------------------------------- Measures


def measures(run):
    """{measure: value} of a finished run (one of report.runs_of); None where there is none."""
    offline = run["offline"]
    points = [(step, value) for step, value in run["points"]["online"] if step > 0]
    lowest_at, lowest = min((p for p in points if p[0] <= WINDOW), key=lambda point: point[1])
    again = (step for step, value in points if step > lowest_at and value >= offline)
    fell = offline - lowest > FALL * abs(offline)
    steps, values = zip((0, offline), *points, strict=True)
    return {
        "offline": offline,
        "depth": offline - lowest,
        "fell": fell,
        "recovered": next(again, None) if fell else None,
        "drop": float(np.max(np.maximum.accumulate(values) - values)),
        "final": values[-1],
        "area": float(np.trapezoid(values, steps)) / steps[-1],
        "distance": run.get("distance_to_offline", [None])[-1],
        "D": float(np.mean(run["constraint"])) / run["epsilon"] if run.get("epsilon") else None,
        "multiplier": run.get("multiplier", [None])[-1],
    }


def control(run):
    """The measures as if the last WINDOW offline updates had been online steps; None of a run that
    has no more updates than that: it is still learning."""
    points = run["points"]["offline"]
    start = points[-1][0] - WINDOW
    if start < WINDOW:
        return None
    (first, offline), *others = [point for point in points if point[0] >= start]
    points = [(step - first, value) for step, value in others]
    return measures({"offline": offline, "points": {"online": points}})


def recovery(found):
    """The table's words on the measures of several runs: how many fell, and when each was back."""
    fell = [each["recovered"] for each in found if each["fell"]]
    steps = [f"{step:,.0f}" for step in sorted(step for step in fell if step is not None)]
    steps += ["never"] * fell.count(None)
    return f"{len(fell)} of {len(found)}" if found else "-", "; ".join(steps) or "-"


def differences(groups):
    """{(dataset, entry, other entry): {measure: the first one's minus the other's, a value per seed
    that both have}}, for PAIRS; D and the multiplier are TD3-C's own."""
    found = {}
    for key, (runs, _) in groups.items():
        found[key] = {run["seed"]: measures(run) for run in runs}
    pairs = {}
    for dataset in dict.fromkeys(dataset for dataset, _ in groups):
        for entry, other in PAIRS:
            mine, plain = found.get((dataset, entry), {}), found[dataset, other]
            two = [(mine[seed], plain[seed]) for seed in sorted(set(mine) & set(plain))]
            pairs[dataset, entry, other] = {
                name: [a[name] - b[name] for a, b in two] for name in COMPARED
            } | {name: [a[name] for a, _ in two] for name in OWN}
    return pairs


# ---------------------------------------------------------------------------------------- Records


def read_study(folder, profile):
    """({(dataset, entry): (runs that finished, number of runs planned)}, failures in words,
    {script: number of its versions that made runs}, {(dataset, algorithm): its controls})."""
    records = report.read_records(folder)
    trials = sweep.read_matrix(MATRIX, profile, Path("data"), Path("runs"))
    if not trials:
        sys.exit(f"{MATRIX.name} has no runs for --profile {profile}")
    names = [f"{profile}/{trial.name}" for trial in trials]
    groups, versions, controls = {}, {}, {}
    for name, trial in zip(names, trials, strict=True):
        entry, dataset, _ = trial.name.split("/")
        if name in records:
            check_made(name, records[name], trial)
            hashes = {start["script_sha256"] for start in records[name]["starts"]}
            versions.setdefault(records[name]["versions"]["script"], set()).update(hashes)
        runs = report.runs_of(name, records[name]) if name in records else []
        runs = [run for run in runs if run["ended"] == "finished"]
        found = [control(run) for run in runs if entry in CONTROLS]
        if any(found):
            controls.setdefault((dataset, CONTROLS[entry]), []).extend(found)
        if entry in ROWS:
            for run in runs:
                run |= online_columns(records[name], run["seed"])
            finished, planned = groups.setdefault((dataset, entry), ([], 0))
            groups[dataset, entry] = finished + runs, planned + 1
    check_paired(groups)
    failed = [text for text in report.failures(records, folder) if text.split(":")[0] in names]
    datasets, rows = list(dict.fromkeys(dataset for dataset, _ in groups)), list(ROWS)
    order = sorted(groups, key=lambda key: (datasets.index(key[0]), rows.index(key[1])))
    counts = {script: len(hashes) for script, hashes in sorted(versions.items())}
    controls = {key: controls[key] for key in sorted(controls, key=lambda k: datasets.index(k[0]))}
    return {key: groups[key] for key in order}, failed, counts, controls


def online_columns(record, seed):
    """What TD3's family logs: {column: a seed's values at the evaluations after the switch}, for
    those a record has, and TD3-C's epsilon."""
    curve, found = record["curve"], {}
    for name in ("distance_to_offline", "constraint", "multiplier"):
        column = curve.get(name, [None] * len(curve["seed"]))
        rows = zip(curve["phase"], curve["seed"], column, strict=True)
        values = [x for phase, s, x in rows if (phase, s) == ("online", seed) and x is not None]
        if values:
            found[name] = values
    if "constraint" in found:
        found["epsilon"] = record["config"]["epsilon"]
    return found


def check_made(name, record, trial):
    """Exit where a record was made by other arguments than collapse.toml has now."""
    made, planned = map(without_paths, (record["versions"]["command"], trial.command))
    if made != planned:
        sys.exit(f"{name}: its run was made by other arguments ({' '.join(made)}) than "
                 f"{MATRIX.name} has ({' '.join(planned)})")


def check_paired(groups):
    """Exit where two runs that are to start from one agent begin with different scores."""
    begun = {}
    for (dataset, entry), (runs, _) in groups.items():
        for run in runs:
            family = f"{ROWS[entry][0]}'s agent, {dataset}, seed {run['seed']}"
            other, offline = begun.setdefault(family, (entry, run["offline"]))
            if run["offline"] != offline:
                sys.exit(f"{family}: {entry} begins with {run['offline']}, {other} with {offline}")


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
    columns = ("dataset", "agent of", "online", "replay", "finished", "offline", "depth", "fell",
               "recovered at", "drop", "final", "area", "distance")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for (dataset, entry), (runs, planned) in groups.items():
        found = [measures(run) for run in runs]
        cells = {key: report.show([each[key] for each in found])
                 for key in ("offline", "depth", "drop", "final", "area", "distance")}
        cells["fell"], cells["recovered"] = recovery(found)
        shown = [cells[key] for key in
                 ("offline", "depth", "fell", "recovered", "drop", "final", "area", "distance")]
        lines.append(f"| {' | '.join([dataset, *ROWS[entry], f'{len(runs)} of {planned}', *shown])}"
                     " |")
    return "\n".join(lines)


def paired_table(groups):
    """One run minus another of the same agent, in Markdown: a row per two entries, over all
    datasets, then a row per dataset and two entries."""
    pairs = differences(groups)
    pooled = {}
    for (_, *two), values in pairs.items():
        mine = pooled.setdefault(("all", *two), {name: [] for name in (*COMPARED, *OWN)})
        for name in mine:
            mine[name] += values[name]
    columns = ("dataset", "online", "minus", "pairs", *COMPARED, *OWN)
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for (dataset, *two), values in (pooled | pairs).items():
        if values["area"]:
            names = [", ".join(ROWS[entry][1:]) for entry in two]
            cells = [f"{report.show(values[name], np.median)}; {word} in "
                     f"{sum(sign * value > 0 for value in values[name])}"
                     for name, (word, sign) in COMPARED.items()]
            cells += [report.show(values[name], np.median) for name in OWN]
            lines.append(f"| {' | '.join([dataset, *names, str(len(values['area'])), *cells])} |")
    return "\n".join(lines)


def control_table(controls):
    """The measures where nothing is switched, in Markdown: a row per dataset and algorithm."""
    lines = ["| dataset | algorithm | runs | begins at | depth | fell | drop | area |",
             "|---" * 8 + "|"]
    for (dataset, algorithm), found in controls.items():
        cells = [report.show([each[key] for each in found])
                 for key in ("offline", "depth", "drop", "area")]
        cells.insert(2, recovery(found)[0])
        lines.append(f"| {dataset} | {algorithm} | {len(found)} | {' | '.join(cells)} |")
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
In short:

- **depth**: the offline score minus the lowest evaluation of the first 25,000 online steps;
- a run **fell** if that is more than a fifth of the offline score, and has **recovered** at the
  first evaluation after the lowest one that is as good as offline, which need not last;
- **drop**: the largest loss from the best evaluation so far, at any time: it shows a fall that
  comes after the 25,000 steps, or from a height that was gained online;
- **area**: the mean height of the online curve; **distance**: of the last policy from the offline
  one.

Means over seeds, in brackets the 95 % bootstrap interval or, of fewer than five seeds, the smallest
and the largest value, which of three seeds is the same. TD3, rate/100 and rate/1000, has a
hundredth and a thousandth of the policy's learning rate; TD3, carried, the moments of TD3+BC's
optimisers, where TD3's family else begins online with fresh ones.

To be read with care:

- **A depth of some points is no collapse.** It is the smallest of ten evaluations (IQL's: of five)
  of 30 episodes each (IQL's: of 10), and the offline score is one such evaluation, too; a drop is
  the largest of all differences of twenty (IQL's: of ten). How large both are without any switch,
  over 25,000 updates, stands at the end, for TD3+BC and IQL; of CQL's and Cal-QL's agents it is not
  known. Where the offline score is low there is little to lose.
- **The agents are small**: 100,000 offline updates of TD3+BC, on hopper-medium 25,000; 20,000 of
  CQL and Cal-QL with 4 sampled actions and a policy's rate of 3e-4, ten times CORL's (CQL's Q still
  rises then); 200,000 of IQL. So are the samples of the data: compare rows within a dataset that
  start from the same agents, not with the literature.
- **Wide is also Hopper, and large.** ope-hopper-replay has 360,658 rows, the others about 9,000:
  after 25,000 steps the new rows are 6.5 % of its appended buffer, but 74 % of theirs.
- **TD3-C** has constants that were chosen before, on one narrow Hopper agent with half replay; its
  D is measured on the batch, on ope-hopper-replay with appended replay mostly on old rows. On
  halfcheetah-medium and hopper-medium-replay its bound does not hold: D is 2.7 to 5.7 epsilon, the
  multiplier at its largest or near it.
- **Between families** more differs than the algorithm: SAC, WSRL and Cal-QL carry their optimisers
  over the switch; IQL's policy, whose rate has decayed to 0 by then, has a constant one after it.
- **SAC's KL bound** holds the temperature, too, and bounds the distance from the offline policy
  where TD3-C bounds the pace; its price begins high, so that the first policies are almost the
  offline one, and its limit goes on to rise, to some 1 nat at the end.
- **WSRL** has two plain critics, not its ten with LayerNorm, and agents of this CQL; it does not
  learn before step 5,000, so that two of its ten evaluations are the offline agent's, and then
  makes four critic updates a step.
- **The agents of CQL and Cal-QL on hopper-medium-replay** are not those of the records of that
  name, from which matrix.toml's runs go on: the same commands made them, with later versions of the
  scripts.
- **A run that was stopped** because a loss was not finite has no row here, which flatters what
  breaks."""
CAPTION = """The switch is at 0, where each curve begins at the offline score. Mean over seeds, and
from the smallest to the largest of them: solid, half of every batch from the dataset; dashed, new
transitions only; dotted, all rows equally likely. Above, the agents of TD3+BC; below, those of CQL
(SAC and WSRL), IQL and Cal-QL."""


def generate(records, profile, figures):
    """{path: text} of what is generated; the figure is written into `figures`."""
    groups, failed, versions, controls = read_study(records, profile)
    plot(groups, figures / "collapse.png")
    made_by = ", ".join(f"{name} {number}" for name, number in versions.items())
    body = [
        "# The collapse study", ABOUT,
        (f"{count(groups)}; failed: {'; '.join(failed) or 'none'}. Versions of each script that "
        f"made runs: {made_by}."),
        table(groups),
        ("One run minus another that starts from the same agent, seed by seed: the median, in "
        "brackets the smallest and the largest (of five pairs and more its 95 % bootstrap "
        "interval), and in how many pairs the first one lost less, or had more. D, in epsilons, "
        "and the last multiplier are TD3-C's own."),
        paired_table(groups),
        ("The control: the same measures where nothing is switched, over 25,000 offline updates, "
        "the last ones before the switch; for hopper-medium's TD3+BC those after it, offline."),
        control_table(controls),
        "![Online curves](figures/collapse.png)", CAPTION,
    ]  # fmt: skip
    shown = {key: group for key, group in groups.items() if group[0]}  # the README shows no holes
    part = f"{count(groups)}.\n\n{table(shown)}"
    readme = (report.ROOT / "README.md").read_text()
    return {
        HOME / "collapse.md": "\n\n".join(body) + "\n",
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
