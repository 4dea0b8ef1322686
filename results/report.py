"""Tables, figures and the page, from the records: results/README.md, README.md, index.html.

    python results/report.py           # write them
    python results/report.py --check   # exit 1 where they are not what the records say

A record that lacks a field, whose script's hash is not that of the named commit, or that stands
twice is refused by name. Intervals are 95 % stratified bootstraps (rliable, 2,000 resamples); of
fewer than 5 seeds, the smallest and the largest value, for a bootstrap of those says no more.
"""

import argparse
import ast
import functools
import hashlib
import html
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

try:
    from rliable import library, metrics
except ImportError:
    sys.exit("rliable is missing: pip install -r results/requirements.txt")

ROOT = Path(__file__).resolve().parent.parent
FIELDS = {
    "ended", "offline", "online", "resumes", "seconds", "peak_memory_mb", "state_sha256",
    "dataset_rows", "reference", "config", "environment", "starts", "versions", "curve",
}  # fmt: skip
NESTED = {
    "versions": {"command", "script", "script_sha256", "dataset_sha256", "packages", "device"},
    "curve": {"phase", "step", "seed", "return", "score", "updates_per_second"},
    "reference": {"source"},
}
OTHERS = {"collapse.png", "improvement.png", "policies.png", "shifted.png"}  # of other pages
MACHINE = ("run_dir", "resume", "eval_only", "video", "wandb")  # no part of what was run
COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f3c8d", "#999999"]
STYLES = [(color, style) for style in ("-", "--", ":") for color in COLORS]


# ---------------------------------------------------------------------------------------- Records


def read_records(folder):
    """{name: record} of every .json below `folder`; exits, naming it, on one that is not sound."""
    records, known, commits = {}, {}, {}
    for path in sorted(set(folder.rglob("*.json")) - set(folder.rglob("failures.json"))):
        name = str(path.relative_to(folder).with_suffix(""))
        try:
            record = json.loads(path.read_text())
        except ValueError as error:
            sys.exit(f"{path}: no JSON: {error}")
        missing = FIELDS - set(record)
        for field, needed in NESTED.items():
            missing |= {f"{field}.{part}" for part in needed - set(record.get(field, needed))}
        if not all({"git_commit", "script_sha256"} <= set(s) for s in record.get("starts", [])):
            missing.add("starts.git_commit or starts.script_sha256")
        if missing:
            sys.exit(f"{path}: no {', '.join(sorted(missing))}")
        if name.count("/") != 3:
            sys.exit(f"{path}: must lie in PROFILE/ENTRY/DATASET/")
        lengths = {len(column) for column in record["curve"].values()}
        if len(lengths) != 1:
            sys.exit(f"{path}: the curve's columns have different lengths")
        check_hash(path, record, commits)
        settings = {k: v for k, v in record["config"].items() if k not in MACHINE}
        same = json.dumps([record["versions"]["script"], record["environment"], settings,
                           record["versions"]["dataset_sha256"]], sort_keys=True)
        if same in known:
            sys.exit(f"{path}: the same run as {known[same]}")
        known[same] = path
        records[name] = record
    return records


def check_hash(path, record, commits):
    """Exit where the script that made the record is not the one in the commit that it names."""
    versions = record["versions"]
    for start in record["starts"]:
        key = start["git_commit"], versions["script"]
        if key not in commits:
            commits[key] = script_hash(*key)
        if commits[key] is None:  # a shallow clone, a copy without its history, a commit made anew
            if start["script_sha256"] in earlier_hashes(versions["script"]):
                continue
            print(f"warning: {path}: commit {start['git_commit']}, which made it, is not in this "
                  "repository: its script cannot be checked", file=sys.stderr)
        elif commits[key] != start["script_sha256"]:
            sys.exit(f"{path}: {versions['script']} of commit {start['git_commit']} has another "
                     "hash than the script that made this record")


def script_hash(commit, script):
    """SHA-256 of a script in a commit, or None where the repository does not have the commit."""
    for folder in ("algorithms", "baselines"):
        command = ["git", "-C", str(ROOT), "show", f"{commit}:{folder}/{script}"]
        done = subprocess.run(command, capture_output=True, check=False)
        if done.returncode == 0:
            return hashlib.sha256(done.stdout).hexdigest()
    return None


@functools.cache
def earlier_hashes(script):
    """SHA-256 of a script in every commit of this repository that changed it."""
    command = ["git", "-C", str(ROOT), "log", "--format=%H", "--", f"*/{script}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return {script_hash(commit, script) for commit in done.stdout.split()}


def runs_of(name, record):
    """One entry per seed of a record: what the tables need."""
    curve, found = record["curve"], []
    unit = "score" if "expert" in record["reference"] else "return"
    done = record["ended"] == "finished"
    profile, entry, dataset, _ = name.split("/")
    for seed in dict.fromkeys(curve["seed"]):
        rows = [i for i, s in enumerate(curve["seed"]) if s == seed]
        points = {phase: [(curve["step"][i], curve[unit][i]) for i in rows
                          if curve["phase"][i] == phase] for phase in ("offline", "online")}
        offline = points["offline"][-1][1] if points["offline"] else None
        online = [value for _, value in points["online"]]
        if offline is None and record["config"].get("init_from") and online:
            offline = online[0]  # the evaluation at the switch, step 0
        if not done:  # a run that failed has a curve, but no final values
            online = []
        found.append({
            "name": name, "profile": profile, "entry": entry, "dataset": dataset, "unit": unit,
            "seed": int(seed), "ended": record["ended"], "points": points, "offline": offline,
            "online": online[-1] if online else None,
            # environment steps until the offline value is reached again, after the deepest dip
            "regained": regained(offline, points["online"]) if done else None,
            "dip": None if offline is None or not online else max(0.0, offline - min(online)),
            # Cal-QL's: mean over the evaluations of fine-tuning of 1 - normalised score
            "regret": float(np.mean([1 - v / 100 for step, v in points["online"] if step]))
            if online and unit == "score" else None,
            "updates_per_second": median_rate(record), "steps": (record["offline"],
                                                                record["online"]),
        })
    return found


def regained(offline, online):
    """First online step, from the lowest evaluation on, whose value is at least `offline`."""
    if offline is None or not online:
        return None
    lowest = min(range(len(online)), key=lambda i: online[i][1])
    if online[lowest][1] >= offline:  # nothing was lost
        return None
    return next((step for step, value in online[lowest:] if value >= offline), None)


def median_rate(record):
    rates = [rate for rate in record["curve"]["updates_per_second"] if rate]
    return float(np.median(rates)) if rates else None


def group_runs(records):
    """{(profile, dataset, entry): runs}, sorted."""
    groups = defaultdict(list)
    for name, record in records.items():
        for run in runs_of(name, record):
            groups[run["profile"], run["dataset"], run["entry"]].append(run)
    return dict(sorted(groups.items()))


def command(record):
    """The command line that re-makes a record."""
    words = record["versions"]["command"]
    folder = "algorithms" if (ROOT / "algorithms" / record["versions"]["script"]).exists() else (
        "baselines")
    kept = [w for w in words[1:] if w]
    if "--resume" in kept:
        at = kept.index("--resume")
        del kept[at : at + 2]
    kept = [re.sub(r"^/.*/(shared/data/)", r"../\1", word) for word in kept]
    return shlex.join(["python", f"{folder}/{record['versions']['script']}", *kept])


# ------------------------------------------------------------------------------------- Statistics


def interval(scores, statistic):
    """(estimate, low, high) of `statistic` over scores (runs, tasks): 95 %, stratified bootstrap
    over runs. Of one run there is no interval: (estimate, None, None)."""
    scores = np.asarray(scores, float)
    if len(scores) < 2:
        return float(statistic(scores)), None, None
    before = np.random.get_state()
    np.random.seed(0)  # rliable draws from the global generator
    try:
        estimates, intervals = library.get_interval_estimates(
            {"x": scores}, lambda x: np.array([statistic(x)]), reps=2000)
    finally:
        np.random.set_state(before)
    return float(estimates["x"][0]), float(intervals["x"][0, 0]), float(intervals["x"][1, 0])


def iqm(scores):
    """Interquartile mean: of the middle half of all runs and tasks (Agarwal et al. 2021)."""
    return metrics.aggregate_iqm(np.asarray(scores, float))


def mean(scores):
    return float(np.mean(scores))


def show(values, statistic=mean):
    """"mean [low, high]" of one value per seed, or - where there is none. Fewer than 5 seeds have
    their smallest and largest value in the brackets."""
    values = [value for value in values if value is not None]
    if not values:
        return "-"
    digits = 2 if max(map(abs, values)) < 2 else 1 if max(map(abs, values)) < 1000 else 0
    estimate, low, high = interval(np.array(values)[:, None], statistic)
    if 1 < len(values) < 5:
        low, high = min(values), max(values)
    if low is None:
        return f"{estimate:.{digits}f}"
    return f"{estimate:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def aggregates(groups):
    """Rows (profile, entry, tasks, seeds, {phase: {"IQM" or "mean": interval}}), over all datasets
    with a score; rows are comparable where they have the same datasets, which is how they are
    sorted. As many seeds of each dataset as the smallest group has."""
    tables = defaultdict(dict)
    for (profile, dataset, entry), runs in groups.items():
        if runs[0]["unit"] == "score" and all(r["ended"] == "finished" for r in runs):
            tables[profile, entry][dataset] = runs
    rows = []
    for (profile, entry), tasks in sorted(tables.items()):
        count = min(map(len, tasks.values()))
        if len(tasks) < 2 or count < 2:
            continue
        columns = {}
        for phase in ("offline", "online"):
            matrix = [[r[phase] for r in sorted(runs, key=lambda r: r["seed"])[:count]]
                      for runs in tasks.values()]
            if all(value is not None for row in matrix for value in row):
                scores = np.array(matrix).T  # (runs, tasks)
                columns[phase] = {"IQM": interval(scores, iqm), "mean": interval(scores, mean)}
        rows.append((profile, entry, sorted(tasks), count, columns))
    return sorted(rows, key=lambda row: (row[0], row[2], row[1]))


# ----------------------------------------------------------------------------------------- Tables


KEYS = ("offline", "online", "dip", "regained", "regret")


def results_table(groups):
    """The table of every group, in Markdown."""
    columns = ("dataset", "run", "seeds", "updates offline", "steps online", "unit", "offline",
               "online", "dip", "regained at", "regret")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for (profile, dataset, entry), runs in groups.items():
        steps = [", ".join(f"{n:,}" for n in sorted({run["steps"][i] for run in runs}))
                 for i in (0, 1)]
        cells = [show([run[key] for run in runs]) for key in KEYS]
        failed = sum(run["ended"] != "finished" for run in runs)
        seeds = f"{len(runs)}" + (f", {failed} not ended" if failed else "")
        label = entry if profile == "cpu" else f"{entry} ({profile})"
        lines.append(f"| {dataset} | {label} | {seeds} | {' | '.join(steps)} | "
                     f"{runs[0]['unit']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def aggregate_table(groups):
    lines = ["| run | datasets | seeds | offline IQM | offline mean | online IQM | online mean |",
             "|---|---|---|---|---|---|---|"]
    for profile, entry, tasks, count, columns in aggregates(groups):
        cells = ["{:.1f} [{:.1f}, {:.1f}]".format(*columns[phase][name])
                 if phase in columns else "-"
                 for phase in ("offline", "online") for name in ("IQM", "mean")]
        lines.append(f"| {entry} ({profile}) | {', '.join(tasks)} | {count} | "
                     f"{' | '.join(cells)} |")
    return "\n".join(lines)


def failures(records, folder):
    """Every run that did not come to its end, in words: of its record, or of the sweep's list of
    trials that left none."""
    listed = [f"{path.parent.name}/{name}: {text}" for path in sorted(folder.rglob("failures.json"))
              for name, text in json.loads(path.read_text()).items()
              if f"{path.parent.name}/{name}" not in records]
    return listed + [
        f"{name}: {record['ended']} at {record['offline']:,} updates, {record['online']:,} steps"
        for name, record in records.items() if record["ended"] != "finished"]


# ---------------------------------------------------------------------------------------- Figures


def save_figure(figure, path):
    """A PNG without a date in it, so that the same records give the same file."""
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def plot_dataset(dataset, groups, path):
    """A panel for each phase that any run has: every seed thin, the mean thick."""
    labels = {"offline": "updates offline", "online": "environment steps online"}
    phases = [phase for phase in labels if any(run["points"][phase] for _, runs in groups
                                               for run in runs)]
    size = 2 + 4.2 * len(phases), max(3.8, 0.8 + 0.17 * len(groups))  # the legend's height
    figure, axes = pyplot.subplots(1, len(phases), figsize=size, sharey=True, squeeze=False,
                                   layout="constrained")
    handles = []
    for (color, style), (entry, runs) in zip(STYLES * 5, groups, strict=False):
        handles.append(Line2D([], [], color=color, ls=style, lw=2, label=entry))
        for panel, phase in zip(axes[0], phases, strict=True):
            curves = [run["points"][phase] for run in runs if run["points"][phase]]
            for curve in curves:
                panel.plot(*zip(*curve, strict=True), color=color, ls=style, lw=0.5, alpha=0.4)
            if curves and len({len(curve) for curve in curves}) == 1:
                steps, values = np.mean(curves, axis=0).T
                marker = "o" if len(steps) == 1 else None
                panel.plot(steps, values, color=color, ls=style, lw=2, marker=marker)
    for panel, phase in zip(axes[0], phases, strict=True):
        panel.set_xlabel(labels[phase])
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes[0, 0].set_ylabel(groups[0][1][0]["unit"])
    figure.suptitle(dataset)
    figure.legend(handles=handles, frameon=False, fontsize=8, loc="outside right center")
    save_figure(figure, path)


def profiles(groups):
    """Performance profiles {"tau": [...], "lines": {entry: [...]}}: the share of an entry's runs
    whose final score exceeds tau (rliable), over all its scored datasets."""
    scores = defaultdict(list)
    for (profile, _, entry), runs in groups.items():
        if runs[0]["unit"] == "score":
            scores[f"{entry} ({profile})"] += [r["online"] for r in runs if r["online"] is not None]
    taus = np.linspace(0, 110, 111)
    lines = {f"{label}, n={len(values)}": library.score_distributions(
        np.array(values)[:, None], taus).round(4).tolist()
        for label, values in sorted(scores.items()) if values}
    return {"tau": taus.tolist(), "lines": lines}


def plot_profiles(groups, path):
    """The performance profiles as a picture."""
    figure, axes = pyplot.subplots(figsize=(9.5, 3.6), layout="constrained")
    found = profiles(groups)
    for (color, style), (label, profile) in zip(STYLES * 5, found["lines"].items(), strict=False):
        axes.step(found["tau"], profile, where="post", color=color, ls=style, label=label)
    axes.set(xlabel="tau", ylabel="share of runs with final score > tau",
             title="Performance profile, all scored datasets of a run")
    if found["lines"]:
        figure.legend(frameon=False, fontsize=8, loc="outside right center")
    save_figure(figure, path)


# ---------------------------------------------------------------------------------- Reading guide


def scripts():
    """Every script, algorithms first."""
    return [*sorted(ROOT.glob("algorithms/*.py")), *sorted(ROOT.glob("baselines/*.py"))]


def reading(path):
    """What a script's own text says of it: title, equations with the function and lines that hold
    them, deviations, metrics."""
    text = path.read_text()
    tree = ast.parse(text)
    doc = ast.get_docstring(tree)
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    equations, deviations, section = [], [], None
    for line in doc.splitlines():
        labelled = re.match(r"    (\S(?:\S| (?! ))*?)\s{2,}(\S.* = .*)$", line)
        if line.startswith("Deviations"):
            section = line.rstrip(":")
        elif labelled and section is None and not line.strip().startswith("python "):
            equations.append([labelled[1], labelled[2]])
        elif equations and section is None and re.match(r"     {8,}\S", line):
            equations[-1][1] += " " + line.strip()
        elif section and re.match(r" ?\d+\. ", line):
            deviations.append(line.split(". ", 1)[1].strip())
        elif section and line.startswith("    ") and deviations:
            deviations[-1] += " " + line.strip()
    found = []
    for label, formula in equations:
        node = function_of(label, functions)
        lines = [node.lineno, node.end_lineno] if node else None
        found.append({"label": label, "formula": re.sub(r"\s+", " ", formula),
                      "function": node.name if node else None, "lines": lines})
    metrics_node = next((node.value for node in tree.body if isinstance(node, ast.Assign)
                         and getattr(node.targets[0], "id", "") == "METRICS"), None)
    return {
        "path": str(path.relative_to(ROOT)), "title": doc.splitlines()[0], "equations": found,
        "deviations_of": section, "deviations": deviations,
        "metrics": ast.literal_eval(metrics_node) if metrics_node else {},
        "algorithm_lines": text[: text.find("==== The same bytes")].count("\n"),
    }


def function_of(label, functions):
    """The function of an equation's label: named after it, or its docstring begins with it."""
    word = label.lower().replace(" ", "_").replace("-", "_")
    for name, node in functions.items():
        doc = ast.get_docstring(node) or ""
        if doc.startswith(label) or name in (word, f"{word}_loss") or name.endswith(f"_{word}"):
            return node
    return None


ORDER = """Read `algorithms/iql.py` first: the docstring, `Losses`, `update_step`; then
`baselines/sac.py`, the base of the CQL family, beside it. Below the line `The same bytes in every
script` comes the plumbing: data, environments, checkpoints, the run's folder, the loops."""
EXERCISES = """1. **IQL → XQL** (`iql.py`, about 20 lines). Replace the expectile in `value_loss` by
   the Gumbel regression `exp(z) - z - 1`, `z = u / temperature` (clipped at 7, and the loss
   divided by `exp` of its batch maximum). Which setting has to change with the reward scale?
2. **IQL → AWAC** (`iql.py`, about 15 lines). Drop V: bootstrap from one action of the policy in
   `critic_loss`, take the policy's own mean Q as baseline in `actor_loss`. Watch `q` on
   `hopper-medium`, then say what the expectile was protecting.
3. **SAC → REDQ** (`sac.py`, about 10 lines). `--num-critics 10 --utd-ratio 20`, and the minimum
   over a random pair of target critics, drawn anew in every update.
4. **A time limit taken for a termination** (any script, 1 line). Set `masks` to 0 at truncations in
   `step_rollout`. Predict the change of `q` on Hopper before you run it, then run
   `python tests/planted_bugs.py` and see which test notices.
5. **Where does the dip come from?** (`iql.py`, no line). Run `--init-from` one checkpoint with
   `--beta 0`, `3` and `10`, and plot `advantage` and `weight` of the first 5,000 online steps."""


def guide(path_of_lines):
    """The reading guide in Markdown. `path_of_lines(script, first, last)` makes a link."""
    lines = [ORDER, ""]
    for path in scripts():
        read = reading(path)
        lines += [f"**`{read['path']}`** — {read['title']}", ""]
        if read["equations"]:
            lines += ["| equation | | function | lines |", "|---|---|---|---|"]
            for each in read["equations"]:
                where = path_of_lines(read["path"], *each["lines"]) if each["lines"] else ""
                lines.append(f"| {each['label']} | `{each['formula'].replace('|', chr(92) + '|')}` "
                             f"| `{each['function']}` | {where} |")
            lines.append("")
        if read["deviations"]:
            lines += [f"{read['deviations_of']}:", ""]
            lines += [f"{i}. {text}" for i, text in enumerate(read["deviations"], 1)] + [""]
    return "\n".join([*lines, "Exercises:", "", EXERCISES])


def metrics_table():
    """Every script's own columns of metrics.csv, with their healthy ranges."""
    texts = defaultdict(dict)  # {column: {text: [scripts]}}
    for path in scripts():
        for column, text in reading(path)["metrics"].items():
            texts[column].setdefault(text, []).append(path.name)
    lines = ["| column | meaning, healthy range |", "|---|---|"]
    for column, found in texts.items():
        cells = "; ".join(f"{text} ({', '.join(names)})" for text, names in found.items())
        lines.append(f"| `{column}` | {cells} |")
    return "\n".join(lines)


def line_link(script, first, last, prefix=""):
    return f"[{first}–{last}]({prefix}{script}#L{first}-L{last})"


# ------------------------------------------------------------------------------------------- Page


def page_data(records, groups, failed):
    """All that the page shows, as JSON."""
    rows = []
    for (profile, dataset, entry), runs in groups.items():
        rows.append({
            "profile": profile, "dataset": dataset, "entry": entry, "unit": runs[0]["unit"],
            "steps": runs[0]["steps"], "seeds": len(runs),
            **{key: show([run[key] for run in runs])
               for key in KEYS},
            "command": command(records[runs[0]["name"]]),
            "runs": [{key: run[key] for key in ("name", "seed", "ended", "points", "offline",
                                                "online", "steps")} for run in runs],
        })
    sources = {str(path.relative_to(ROOT)): path.read_text() for path in scripts()}
    return {"rows": rows, "failures": failed, "sources": sources,
            "guide": [reading(path) for path in scripts()], "colors": COLORS,
            "profiles": profiles(groups)}


def page(records, groups, failed):
    """index.html: the template with data, styles and libraries inline."""
    folder = ROOT / "results"
    data = json.dumps(page_data(records, groups, failed), sort_keys=True).replace("<", "\\u003c")
    parts = {
        "uplot_css": (folder / "vendor" / "uPlot.min.css").read_text(),
        "uplot_js": (folder / "vendor" / "uPlot.iife.min.js").read_text(),
        "diff_js": (folder / "vendor" / "diff.min.js").read_text(),
        "data": data,
        "order": as_html(ORDER),
        "exercises": "".join(f"<li>{as_html(each)}</li>" for each in
                             re.split(r"^\d\. ", EXERCISES, flags=re.M)[1:]),
    }
    text = (folder / "page.html").read_text()
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], text)


def as_html(text):
    """Markdown's bold and code as HTML; nothing else is used here."""
    text = html.escape(" ".join(text.split()), quote=False)
    text = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", text)
    return re.sub(r"`(.+?)`", r"<code>\1</code>", text)


# ------------------------------------------------------------------------------------------- main


ABOUT = """Made by `python results/report.py` from [`records/`](records), one JSON per run: its
configuration, versions, hashes and every evaluation. `python results/sweep.py` makes all the runs
again, `python results/check.py RECORD` one of them. [`index.html`](index.html) shows them with
curves to hover over, any two scripts side by side, and the reading guide: download it and open it.

Mean over seeds of the last evaluation of each phase: 10 deterministic episodes (AntMaze's IQL and
SAC: 20). A run with 0 updates offline and an offline value goes on from the agents of the
`-offline` run of its script (`sac_finetune` from `cql-offline`, in AntMaze, `-iql`, from
`iql-offline`); the CQL family's budgets are small, see `matrix.toml`: two hidden layers, 4 sampled
actions per source in place of 10, 20,000 updates, in AntMaze 6,000; `ppo-weak` goes on from `ppo`.
In brackets the smallest and the largest of three seeds (of five and more the 95 % bootstrap
interval). Some runs of the matrix still wait to be made. The dip is the offline value minus the
lowest evaluation after the switch, and at least 0; it is regained at the first environment step
after that whose evaluation is as good again (mean of the seeds that dip and do; without brackets:
one seed); the regret is the mean over the online evaluations of 1 − score / 100 (Cal-QL's). Scores
learned from a sample of a D4RL dataset are not scores on that dataset: `hopper-medium` and
`halfcheetah-medium` are about 1/100 of the trajectories, `hopper-medium-replay` 1/40,
`halfcheetah-medium-replay` 1/20. `default` is the repository's own dataset, in Hopper-v5. The runs
whose name begins with `collapse-` are in [`collapse.md`](collapse.md); what Uni-O4's runs say
beyond their scores is in [`improvement.md`](improvement.md), PA-RL's by policy class in
[`policies.md`](policies.md)."""


OVER_ALL = """Over all scored datasets of a run [95 % stratified bootstrap interval]; rows compare
where they have the same datasets:"""


def generate(records, folder, figures):
    """{path: text} of all that is generated; its pictures are written into `figures`."""
    groups, failed = group_runs(records), failures(records, folder)
    groups = {key: runs for key, runs in groups.items() if not key[2].startswith("collapse-")}
    datasets = list(dict.fromkeys((profile, dataset) for profile, dataset, _ in groups))
    shown = []
    for profile, dataset in datasets:
        mine = [(e, runs) for (p, d, e), runs in groups.items() if (p, d) == (profile, dataset)]
        plot_dataset(f"{dataset} ({profile})", mine, figures / f"{profile}-{dataset}.png")
        shown.append(f"![{dataset}](figures/{profile}-{dataset}.png)")
    plot_profiles(groups, figures / "profiles.png")
    table = results_table(groups)
    body = ["# Results", "", ABOUT, "", table, "", OVER_ALL, "",
            aggregate_table(groups), "", "![Performance profile](figures/profiles.png)", "",
            "Runs that did not come to their end: " + ("; ".join(failed) if failed else "none."),
            "", *shown, ""]
    readme = (ROOT / "README.md").read_text()
    readme = between(readme, "results", table)
    readme = between(readme, "metrics", metrics_table())
    readme = between(readme, "guide", guide(line_link))
    return {
        ROOT / "results" / "README.md": "\n".join(body),
        ROOT / "README.md": readme,
        ROOT / "results" / "index.html": page(records, groups, failed),
    }


def between(text, name, new):
    """`text` with what stands between the two marks of `name` replaced."""
    first, last = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, _, rest = text.partition(first)
    _, found, after = rest.partition(last)
    if not found:
        sys.exit(f"README.md: no {first} ... {last}")
    return f"{before}{first}\n{new}\n{last}{after}"


def alike(home, folder, name):
    """Whether a picture is in both folders, with the same pixels but for rounding."""
    paths = Path(home, name), Path(folder, name)
    if not all(path.is_file() for path in paths):
        return False
    one, other = (pyplot.imread(path) for path in paths)
    return one.shape == other.shape and np.abs(one - other).mean() < 1e-4


def settle(written, folder, pictures, check):
    """Write what has changed of `written`, {path: text}, and of the pictures drawn into `folder`;
    with `check` only name it. Returns the exit code."""
    home = ROOT / "results" / "figures"
    stale = [path for path, text in written.items()
             if not path.is_file() or path.read_text() != text]
    drawn = [name for name in pictures if not alike(home, folder, name)]
    if not check:
        for path in stale:
            path.write_text(written[path])
        for name in drawn:
            shutil.copy(Path(folder, name), home / name)
    stale += [home / name for name in drawn]
    print("\n".join(f"{'stale' if check else 'wrote'} {path}" for path in stale))
    return int(check and bool(stale))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=ROOT / "results" / "records")
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    arguments = parser.parse_args()
    records = read_records(arguments.records)
    if not records:
        sys.exit(f"{arguments.records}: no records; python results/sweep.py makes them")
    stale, home = [], ROOT / "results" / "figures"
    with tempfile.TemporaryDirectory() as folder:
        written = generate(records, arguments.records, Path(folder))
        drawn = {path.name for path in Path(folder).iterdir()}
        old = {path.name for path in home.glob("*")} - drawn - OTHERS
        stale += [home / name for name in sorted(drawn | old) if not alike(home, folder, name)]
        if not arguments.check:
            home.mkdir(exist_ok=True)
            for name in old:
                (home / name).unlink()
            for name in drawn:
                shutil.copy(Path(folder, name), home / name)
    for path, text in written.items():
        if not path.is_file() or path.read_text() != text:
            stale.append(path)
            if not arguments.check:
                path.write_text(text)
    print("\n".join(f"{'stale' if arguments.check else 'wrote'} {path}" for path in stale))
    return int(arguments.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
