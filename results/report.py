"""Tables, figures and the page, from the records; learning curves of any runs.

    python results/report.py                             # README.md, figures/ and index.html here
    python results/report.py --check                     # exit 1 where they are not up to date
    python results/report.py plot RUN... --out FILE      # curves of run folders or records, a .png

Every seed is shown, as a value, a point or a thin line; a mean, where there is one, is a help to
the eye. A record that lacks a field is refused by name. From the scripts' own text come the reading
guide (equation, function, lines) and the table of metrics.
"""

import argparse
import ast
import csv
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
import tomllib
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / "results"
FIELDS = ("steps", "units", "config", "reference", "command", "script", "curve")  # of a record
COLUMNS = {"phase", "step", "seed", "return", "score"}  # of a curve
COLORS = [matplotlib.colors.to_hex(color) for color in pyplot.colormaps["tab10"].colors]
DASHES = ["-", "--", ":"]
PHASES = {"offline": "updates offline", "online": "environment steps online"}
TABLES = tomllib.loads((HOME / "tables.toml").read_text())  # what is in them, and claims of papers
WORLDS = TABLES["datasets"]


# ---------------------------------------------------------------------------------------- Records


def read_records(folder):
    """{name: record} of every .json below `folder`; exits, naming it, on one that is not sound.
    Names are PROFILE/ENTRY/DATASET/SEED."""
    records = {}
    for path in sorted(set(folder.rglob("*.json")) - set(folder.rglob("failures.json"))):
        name = path.relative_to(folder).with_suffix("").as_posix()
        try:
            record = json.loads(path.read_text())
        except ValueError as error:
            sys.exit(f"{path}: no JSON: {error}")
        missing = [field for field in FIELDS if field not in record]
        missing += sorted(f"curve.{name}" for name in COLUMNS - set(record.get("curve", COLUMNS)))
        if missing:
            sys.exit(f"{path}: no {', '.join(missing)}")
        if len({len(column) for column in record["curve"].values()}) != 1:
            sys.exit(f"{path}: the curve's columns have different lengths")
        if name.count("/") != 3:
            sys.exit(f"{path}: must lie in PROFILE/ENTRY/DATASET/")
        records[name] = record
    return records


def curve_points(curve, seed, unit, units=None):
    """{"offline": [(step, value)], "online": [...]} of a seed. Where a script has other phases
    before the online one, they count as offline, one after the other. With `units` online values
    (of Q, V) are divided by the scale of the agent's rewards."""
    names = curve["phase"]
    offline = {"offline"} if "offline" in names else set(names) - {"online"}
    points, base, last = {"offline": [], "online": []}, 0, {}
    multiplier = units["rewards"][0] if units else 1.0
    for phase, step, owner, value in zip(
        names, curve["step"], curve["seed"], curve[unit], strict=True
    ):
        if owner != seed or value is None or (phase not in offline and phase != "online"):
            continue
        if phase == "online":
            points["online"].append((step, value / multiplier))
            continue
        if last and phase not in last:
            base += sum(last.values())
            last = {}
        last[phase] = step
        points["offline"].append((base + step, value))
    return points


def runs_of(name, record, records):
    """One entry per seed of a record: what tables, figures and the page need."""
    profile, entry, dataset, _ = name.split("/")
    unit = "score" if "expert" in record["reference"] else "return"
    parent = records.get(f"{profile}/{record.get('after') or ''}")
    steps = (parent or {"steps": {}})["steps"] | record["steps"]
    updates = sum(count for phase, count in steps.items() if phase != "online")
    for seed in dict.fromkeys(record["curve"]["seed"]):
        points = curve_points(record["curve"], seed, unit)
        values = zip(record["curve"]["seed"], record["curve"][unit], strict=True)
        if parent:  # the agents of that run are this one's
            before = curve_points(parent["curve"], seed, unit)["offline"]
            points["offline"] = before or points["offline"]
        offline = points["offline"][-1][1] if points["offline"] else None
        run = {
            "name": name, "profile": profile, "entry": entry, "dataset": dataset, "unit": unit,
            "seed": int(seed), "points": points, "offline": offline,
            "final": [value for owner, value in values if owner == seed][-1],
            "steps": (int(updates), int(steps.get("online", 0))),
            "rates": record.get("updates_per_second", {}), "script": record["script"],
        }  # fmt: skip
        run |= dict.fromkeys(("early", "online", "lowest", "dip", "lost", "gain"))
        if online := [value for _, value in points["online"]]:
            end = points["online"][-1][0]
            far = [abs(10 * step - end) for step, _ in points["online"]]
            run |= {"online": online[-1], "lowest": min(online)}
            if min(far) <= end / 4:  # else no evaluation is near to a tenth of the steps
                run["early"] = online[int(np.argmin(far))]
            run["gain"] = online[-1] - offline if offline is not None else None
            if (offline or 0) >= 10:  # who has next to nothing loses nothing
                run["dip"] = max(0.0, offline - min(online))
                run["lost"] = run["dip"] / offline
        yield run


def group_runs(records):
    """{(profile, dataset, entry): runs in the order of their seeds}, sorted; without the offline
    runs that all have gone on, which are in the ones that went on."""
    groups, before = defaultdict(list), set()
    for name, record in records.items():
        before.add(f"{name.partition('/')[0]}/{record.get('after')}")
        for run in runs_of(name, record, records):
            groups[run["profile"], run["dataset"], run["entry"]].append(run)
    groups = {key: sorted(groups[key], key=lambda run: run["seed"]) for key in sorted(groups)}
    over = [key for key, runs in groups.items() if {run["name"] for run in runs} <= before]
    return {key: runs for key, runs in groups.items() if key not in over}


def failures(records, folder):
    """Every run that did not come to its end, in words, from the sweep's list."""
    listed = []
    for path in sorted(folder.rglob("failures.json")):
        where = path.parent.relative_to(folder).as_posix()
        for name, text in json.loads(path.read_text()).items():
            listed += [f"{where}/{name}: {text}"] * (f"{where}/{name}" not in records)
    return listed


# ----------------------------------------------------------------------------------------- Tables


def show(values):
    """The values of all seeds, in their order; - where there is none."""
    text = " · ".join("-" if value is None else short(value) for value in values)
    return text if any(value is not None for value in values) else "-"


def short(value):
    size = abs(value)
    return f"{value:.{2 if 0 < size < 2 else 1 if size < 1000 else 0}f}".replace("-0.00", "0.00")


def results_table(groups):
    """A row per dataset and entry, in Markdown."""
    keys = ("offline", "early", "online", "lowest")
    names = ("dataset", "run", "updates", "steps online", "unit", "offline", "at a tenth",
             "at the end", "lowest online")  # fmt: skip
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for (profile, dataset, entry), runs in groups.items():
        steps = [f"{count:,}" for count in runs[0]["steps"]]
        cells = [show([run[key] for run in runs]) for key in keys]
        if runs[0]["online"] is not None and runs[0]["final"] != runs[0]["online"]:
            cells[2] += f", retrained {show([run['final'] for run in runs])}"
        label = entry if profile == "cpu" else f"{entry} ({profile})"
        cells = [dataset, label, *steps, runs[0]["unit"], *cells]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def comparable_table(groups):
    """Our success rates on OGBench's task, regenerated, beside the published ones."""
    names = ("run", "updates", "success, %", "published, %", "steps online", "success then, %")
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for entry, published in TABLES["published"].items():
        if runs := groups.get(("cpu", "cube-single", entry)):
            steps = [f"{count:,}" for count in runs[0]["steps"]]
            offline, online = (show([run[key] for run in runs]) for key in ("offline", "online"))
            cells = entry.removesuffix("-ogbench"), steps[0], offline, published, steps[1], online
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def front_table(groups, systems):
    """The one table: a row per system, a column per dataset, means over the seeds."""
    names = "system", "lines", "updates + steps", "updates/s online", *WORLDS.values()
    lines, number = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"], EngFormatter(sep="")
    for entry in systems:
        found = [groups.get(("cpu", world, entry), []) for world in WORLDS]
        if not any(found):  # not run yet
            continue
        run = next(run for runs in found for run in runs)
        size, budget = (ROOT / run["script"]).read_text().count("\n"), map(number, run["steps"])
        rate = f"{run['rates']['online']:.0f}" if "online" in run["rates"] else "-"
        cells = entry, str(size), " + ".join(budget), rate, *map(journey, found)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) if lines[2:] else "Not run yet: `python results/sweep.py` makes them."


def journey(runs):
    """ "offline → at a tenth → at the end (-deepest dip)" of some seeds, their means; and after
    that of a phase that comes later."""
    if not runs:
        return "-"
    keys = ["offline", "early", "online"] if runs[0]["online"] is not None else ["offline"]
    keys += ["final"] * (runs[0]["online"] is not None and runs[0]["final"] != runs[0]["online"])
    text = " → ".join(map(mean_of, [[run[key] for run in runs] for key in keys]))
    if any(run["dip"] is not None for run in runs):
        text += f" (-{np.mean([run['dip'] or 0.0 for run in runs]):.0f})"
    return text + f", {len(runs)} of 3 seeds" * (len(runs) < 3)


def mean_of(values):
    known = [value for value in values if value is not None]
    return f"{np.mean(known):.0f}" if known else "-"


def claims_table(groups):
    """The papers' claims, judged: confirmed where all seeds are on the claimed side of all seeds of
    the other, or of a number, refuted where all are on the other side, else open."""
    lines = [f"| claim | compared | {' | '.join(WORLDS)} |", "|---" * (2 + len(WORLDS)) + "|"]
    for claim in TABLES["claims"]:
        one, other = claim["compare"]
        cells = []
        for world in WORLDS:
            values = []
            for entry, key in (one, other):
                runs = [{"0": 0}] * 3 if key == "0" else groups.get(("cpu", world, entry), [])
                values.append([run[key] for run in runs if run[key] is not None])
            cells.append(verdict(*values).split(", against" if key == "0" else "\n")[0])
        compared = " > ".join(f"`{entry}` {key}".removeprefix("`` ") for entry, key in (one, other))
        lines.append(f"| {claim['paper']}: {claim['says']} | {compared} | {' | '.join(cells)} |")
    return "\n".join(lines)


def verdict(one, other):
    """Whether `one` is larger than `other`, by all of at least three seeds; with their values."""
    if not one or not other:  # not run, or there was nothing to lose
        return "-"
    more, less = min(one) > max(other), max(one) < min(other)
    count = min(len(one), len(other))  # of two and two a third would be judged by chance
    word = "confirmed" if more and count > 2 else "refuted" if less and count > 2 else "open"
    word += f" ({count} of 3 seeds)" * (count < 3)
    return f"**{word}**: {show(one)}, against {show(other)}"


# ---------------------------------------------------------------------------------------- Figures


def plot_panels(title, groups, path):
    """A panel per entry: every seed through its updates offline, up to the line, and its steps
    online, each over half of it; a star is where a later phase ends. Grey: the other entries."""
    rows, columns, number = -(-len(groups) // 5), min(5, len(groups)), EngFormatter(sep="")
    shape = {"figsize": (1 + 2.4 * columns, 0.7 + 1.9 * rows), "sharex": True, "sharey": True}
    figure, axes = pyplot.subplots(rows, columns, layout="constrained", squeeze=False, **shape)
    for panel, entry in zip(axes.flat, groups, strict=False):
        for other in sorted(groups, key=lambda name: name == entry):  # its own on top
            grey = {} if other == entry else {"color": "0.88", "lw": 0.7, "ms": 2}
            for run in groups[other]:
                offline, online = ([*points] for points in run["points"].values())
                online = [(0, value) for _, value in offline[-1:]] * bool(online) + online
                for i, points in enumerate((offline, online)):
                    x = [i - 1 + step / max(points[-1][0], 1) for step, _ in points]
                    y = [value for _, value in points]
                    panel.plot(
                        x, y, **{"color": COLORS[i], "marker": ".", "ms": 4, "lw": 1.2} | grey
                    )
                if run["final"] not in (run["online"], run["offline"]):
                    panel.plot(1, run["final"], "*", **{"color": COLORS[2], "ms": 8} | grey)
        panel.axvline(0, color="0.5", lw=0.7)
        updates, steps = map(number, groups[entry][0]["steps"])
        panel.set_title(f"{entry}: {updates} + {steps}", fontsize=9)
        panel.set_xticks([])
    for panel in axes.flat[len(groups) :]:
        panel.set_axis_off()
    figure.supylabel([*groups.values()][0][0]["unit"])
    figure.suptitle(f"{title}: updates offline | environment steps online")
    save(figure, path)


def plot_values(records, figures):
    """Mean Q or V over the online steps: the figure on Uni-O4's page. Returns it in Markdown."""
    shown, pictures = {"sac_finetune-naive": "q", "cql": "q", "uni_o4": "v"}, []
    for world in WORLDS:
        groups = {f"{entry}, {column.upper()}": [
            curve_points(record["curve"], seed, column, record["units"]) | {"offline": []}
            for name, record in records.items() if name.startswith(f"cpu/{entry}/{world}/")
            for seed in dict.fromkeys(record["curve"]["seed"])
        ] for entry, column in shown.items()}  # fmt: skip
        title = f"{world}: mean Q of a batch, V of a rollout, divided by the reward scale"
        if any(groups.values()):
            plot_curves(title, groups, "Q or V", figures / f"values-{world}.png")
            pictures.append(f"![{title}](figures/values-{world}.png)")
    return "\n".join(pictures)


def save(figure, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})  # the same bytes from the same data
    pyplot.close(figure)


def plot_curves(title, groups, unit, path):
    """{label: points of each seed} as a picture: a panel for each phase that any run has, every
    seed thin, the mean thick where all seeds have the same steps."""
    curves = [points for runs in groups.values() for points in runs]
    phases = [phase for phase in PHASES if any(points[phase] for points in curves)]
    size = 2 + 4.2 * len(phases), max(3.8, 0.8 + 0.17 * len(groups))  # the legend's height
    figure, axes = pyplot.subplots(
        1, max(1, len(phases)), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    handles = []
    for i, (label, runs) in enumerate(groups.items()):
        look = {"color": COLORS[i % len(COLORS)], "ls": DASHES[i % len(DASHES)]}
        handles.append(Line2D([], [], lw=2, label=label, **look))
        for panel, phase in zip(axes[0], phases, strict=False):
            seeds = [points[phase] for points in runs if points[phase]]
            for points in seeds:
                marker = "o" if len(points) == 1 else None
                alpha = 0.5 if len(seeds) > 1 else 1
                panel.plot(*zip(*points, strict=True), lw=0.8, alpha=alpha, marker=marker, **look)
            if len({tuple(step for step, _ in points) for points in seeds}) == 1:
                panel.plot(*np.mean(seeds, axis=0).T, lw=2, **look)
    for panel, phase in zip(axes[0], phases, strict=False):
        panel.set_xlabel(PHASES[phase])
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes[0, 0].set_ylabel(unit)
    figure.suptitle(title)
    figure.legend(handles=handles, frameon=False, fontsize=8, loc="outside right center")
    save(figure, path)


def read_run(path):
    """(label, unit, [points of each seed]) of a run folder or a record."""
    try:
        if path.is_dir():
            config = json.loads((path / "config.json").read_text())
            scored = config["reference"][1] is not None
            with open(path / "metrics.csv", newline="") as file:
                rows = list(csv.DictReader(file))
            curve = {name: [row[name] for row in rows] for name in COLUMNS}
            for name in COLUMNS - {"phase"}:
                curve[name] = [float(text) if text else None for text in curve[name]]
        else:
            record = json.loads(path.read_text())
            curve, scored = record["curve"], "expert" in record["reference"]
        unit = "score" if scored else "return"
        runs = [curve_points(curve, seed, unit) for seed in dict.fromkeys(curve["seed"])]
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"{path}: neither a run's folder nor a record ({error!r})")
    return re.sub(r"/seeds?[\d-]+$", "", path.with_suffix("").as_posix()), unit, runs


def plot_runs(paths, out):
    """Learning curves of any runs in one picture; folders that differ in the seed share a line."""
    groups, units = defaultdict(list), set()
    for path in paths:
        label, unit, runs = read_run(path)
        groups[label] += runs
        units.add(unit)
    if len(units) > 1:
        sys.exit("some of these runs have scores, the others only returns: plot them apart")
    common = os.path.commonpath(groups) if len(groups) > 1 else str(Path(*groups).parent)
    labels = {label: os.path.relpath(label, common) if common else label for label in groups}
    plot_curves("", {labels[label]: runs for label, runs in groups.items()}, units.pop(), out)
    print(f"wrote {out}")


# ---------------------------------------------------------------------------------- Reading guide


def scripts():
    """Every training script, algorithms first."""
    found = [*sorted(ROOT.glob("algorithms/*.py")), *sorted(ROOT.glob("baselines/*.py"))]
    return [path for path in found if path.name != "collect.py"]


def reading(path):
    """What a script's own text says of it: title, equations with the function and lines that hold
    them, deviations, metrics."""
    text = path.read_text()
    tree = ast.parse(text)
    doc = ast.get_docstring(tree)
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    metrics = next((node.value for node in tree.body if isinstance(node, ast.Assign)
                    and getattr(node.targets[0], "id", "") == "METRICS"), None)  # fmt: skip
    equations, within = [], False
    words = r"(?!=)\S(?:\S| (?! ))*?"  # one blank between them, at most
    for line in doc.partition("\nDeviations")[0].splitlines():
        match = re.match(rf"    (?:({words})\s{{2,}})?({words})\s+= (.*)$", line)
        within = bool(match) or within and line.startswith("     ")
        if match:
            equations.append({"label": match[1] or "", "symbol": match[2], "formula": match[3]})
        elif within:
            equations[-1]["formula"] += " " + line.strip()
    for each in equations:
        node = function_of(each["label"], each["symbol"], functions)
        each["formula"] = re.sub(r"\s+", " ", f"{each['symbol']} = {each['formula']}")
        each["function"] = node.name if node else None
        each["lines"] = [node.lineno, node.end_lineno] if node else None
    return {
        "path": path.relative_to(ROOT).as_posix(),
        "title": doc.splitlines()[0],
        "equations": equations,
        "metrics": ast.literal_eval(metrics) if metrics else {},
        "lines": text.count("\n"),
        "above_the_rule": text.partition("# ==== The same bytes")[0].count("\n"),
    }


def function_of(label, symbol, functions):
    """The function whose docstring begins with an equation's number, or which is named after it,
    or which computes what its left side stands for."""
    word = re.sub(r"[ -]", "_", label.lower())
    for name, node in functions.items():
        doc = ast.get_docstring(node) or ""
        if label.startswith("Eq.") and doc.startswith(label):
            return node
        if word and (name in (word, f"{word}_loss") or name.endswith(f"_{word}")):
            return node
    stem = symbol if symbol.startswith("L_") else re.split(r"[(_]", symbol)[0]
    names = TABLES["functions"].get(stem, "")
    return next((functions[name] for name in names.split() if name in functions), None)


def guide():
    """The reading guide in Markdown: a table per script."""
    lines = []
    for read in map(reading, scripts()):
        sizes = f"{read['lines']} lines, {read['above_the_rule']} of them above the rule."
        lines += [f"**[`{read['path']}`](../{read['path']})** — {read['title']}", "", sizes, ""]
        if read["equations"]:
            lines += ["| equation | | function | lines |", "|---|---|---|---|"]
        for each in read["equations"]:
            formula = each["formula"].replace("|", "\\|")
            first, last = each["lines"] or ("", "")
            link = f"[{first}–{last}](../{read['path']}#L{first}-L{last})" if first else ""
            cells = [each["label"], f"`{formula}`", f"`{each['function']}`" if first else "", link]
            lines.append(f"| {' | '.join(cells)} |")
        lines += [""] * bool(read["equations"])
    return "\n".join(lines).strip()


def metrics_table():
    """Every script's own columns of metrics.csv, with their healthy ranges."""
    texts = defaultdict(dict)  # {column: {text: [scripts]}}
    for path in scripts():
        for column, text in reading(path)["metrics"].items():
            texts[column].setdefault(text, []).append(path.name)
    lines = ["| column | meaning, healthy range |", "|---|---|"]
    for column, found in texts.items():
        cells = [f"{text} ({', '.join(names)})" for text, names in found.items()]
        lines.append(f"| `{column}` | {'; '.join(cells)} |".replace("|v|", "\\|v\\|"))
    return "\n".join(lines)


def golden_table():
    """The largest errors against the authors' own numbers, as tests/test_golden.py wrote them."""
    columns = {"losses, values": ("losses", "values", "shares"), "gradients": ("gradients",),
               "parameters after updates": ("parameters",)}  # fmt: skip
    lines = [f"| numbers | computed by | our script | {' | '.join(columns)} |"]
    lines.append("|---" * (3 + len(columns)) + "|")
    for name, row in json.loads((HOME / "golden.json").read_text()).items():
        commit = f" {row['commit'][:7]}" if row["commit"] else ""
        cells = [f"`{name}`", f"{row['repository'] or 'see its page'}{commit}"]
        cells += [f"[{Path(row['script']).name}](../{row['script']})"]
        for kinds in columns.values():
            errors = [error for kind, error in row["errors"].items() if kind in kinds]
            cells.append(f"{max(errors):.0e}" if errors else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------- Page


def page_rows(records, groups):
    """The page's rows, one per group."""
    rows = []
    for (profile, dataset, entry), runs in groups.items():
        kept = [{key: run[key] for key in ("name", "seed")} for run in runs]
        for one, run in zip(kept, runs, strict=True):
            one |= {key: short(run[key]) for key in ("offline", "online", "lowest")
                    if run[key] is not None}  # fmt: skip
            one["points"] = {
                phase: [[int(step), float(f"{value:.4g}")] for step, value in points]
                for phase, points in run["points"].items()
            }
        rows.append({
            "dataset": dataset, "unit": runs[0]["unit"], "steps": runs[0]["steps"], "runs": kept,
            "entry": entry + f" ({profile})" * (profile != "cpu"),
            "command": shlex.join(records[runs[0]["name"]]["command"]),
        })  # fmt: skip
    return rows


def page(records, groups, failed):
    """index.html: the template with data, sources and the diff library inline."""
    notes = {}  # {script: {line: the equations that stand above it}}
    for read in map(reading, scripts()):
        mine = notes[read["path"]] = {}
        for each in [each for each in read["equations"] if each["lines"]]:
            text = f"{each['label']}:  {each['formula']}".removeprefix(":  ")
            line = each["lines"][0]
            mine[line] = f"{mine[line]}\n{text}" if line in mine else text
    data = {
        "rows": page_rows(records, groups), "failures": failed, "notes": notes,
        "sources": {path.relative_to(ROOT).as_posix(): path.read_text() for path in scripts()},
        "colors": COLORS,
    }  # fmt: skip
    text = json.dumps(data, sort_keys=True, separators=(",", ":")).replace("<", "\\u003c")
    parts = {"data": text, "diff_js": (HOME / "vendor" / "diff.min.js").read_text()}
    template = (HOME / "page.html").read_text()
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


# ------------------------------------------------------------------------------------------- main


def generate(records, folder, figures):
    """{path: text} of all that is generated; its pictures are written into `figures`."""
    groups, failed, pictures = group_runs(records), failures(records, folder), []
    for profile, dataset in dict.fromkeys(key[:2] for key in groups):
        mine = {key[2]: runs for key, runs in groups.items() if key[:2] == (profile, dataset)}
        name = f"second-{profile}-{dataset}.png"
        plot_panels(f"{dataset} ({profile})", mine, figures / name)
        pictures.append(f"![{dataset}](figures/{name})")
    ended = f"Runs that did not come to their end: {'; '.join(failed) if failed else 'none'}."
    written = {ROOT / "README.md": {
        "comparable": comparable_table(groups), "table": front_table(groups, TABLES["systems"]),
    }, HOME / "README.md": {
        "comparable": comparable_table(groups), "claims": claims_table(groups),
        "variants": front_table(groups, TABLES["variants"]), "failures": ended,
        "runs": f"{results_table(groups)}\n\n" + "\n".join(pictures), "golden": golden_table(),
        "values": plot_values(records, figures), "guide": guide(), "metrics": metrics_table(),
    }}  # fmt: skip
    texts = {HOME / "index.html": page(records, groups, failed)}
    for path, parts in written.items():
        texts[path] = path.read_text()
        for name, text in parts.items():
            texts[path] = between(texts[path], name, text)
    return texts


def between(text, name, new):
    """`text` with what stands between the two marks of `name` replaced."""
    first, last = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, _, rest = text.partition(first)
    _, found, after = rest.partition(last)
    if not found:
        sys.exit(f"a README.md has no {first} ... {last}")
    return f"{before}{first}\n{new}\n{last}{after}"


def alike(one, other):
    """Whether two pictures have the same pixels but for rounding."""
    if not (one.is_file() and other.is_file()):
        return False
    one, other = pyplot.imread(one), pyplot.imread(other)
    return one.shape == other.shape and (np.abs(one - other) > 0.1).mean() < 1e-6


def update(folder, check):
    """Write what has changed, or with `check` only name it. Returns the exit code."""
    records, home = read_records(folder), HOME / "figures"
    if not records:
        sys.exit(f"{folder}: no records; python results/sweep.py makes them")
    with tempfile.TemporaryDirectory() as drawn:
        written = generate(records, folder, Path(drawn))
        new = {path.name for path in Path(drawn).iterdir()}
        old = {path.name for path in home.glob("*.png")} - new
        stale = [home / name for name in sorted(new) if not alike(home / name, Path(drawn, name))]
        if not check:
            home.mkdir(exist_ok=True)
            for path in stale:
                shutil.copy(Path(drawn, path.name), path)
            for name in old:
                (home / name).unlink()
    stale += [home / name for name in sorted(old)]
    for path, text in written.items():
        if not path.is_file() or path.read_text() != text:
            stale.append(path)
            if not check:
                path.write_text(text)
    print("\n".join(f"{'stale' if check else 'wrote'} {path}" for path in stale))
    return int(check and bool(stale))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=Path, default=HOME / "records" / "second")
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    plot = parser.add_subparsers(dest="what").add_parser("plot", help="learning curves of runs")
    plot.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    plot.add_argument("--out", type=Path, default=Path("curves.png"))
    arguments = parser.parse_args()
    if arguments.what == "plot":
        plot_runs(arguments.runs, arguments.out)
        return 0
    return update(arguments.records, arguments.check)


if __name__ == "__main__":
    sys.exit(main())
