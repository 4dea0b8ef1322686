"""The scripts share text, not modules: a top-level name that stands in two of them has the same
bytes in both, but for what is the algorithm itself. Below the rule stands only what is in every
training script.

    python tests/shared_text.py                          # list disagreements
    python tests/shared_text.py --fix algorithms/iql.py  # push that file's versions into the others
"""

import argparse
import ast
import difflib
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RULE = "# ==== The same bytes in every script from here"
MAY_DIFFER = {
    "Config", "PRESETS", "MAZE", "INIT_FROM", "METRICS", "Agent", "create_agent",
    "critic_loss", "actor_loss", "value_loss", "temperature_loss", "conservative_difference",
    "update", "online_update", "phases", "online_batch", "explore", "act", "main",
}  # fmt: skip
MAIN_LINES = 4  # that `main` may have beside those of iql.py's


def scripts():
    """Every training script, sorted."""
    every = sorted([*ROOT.glob("algorithms/*.py"), *ROOT.glob("baselines/*.py")])
    return [path for path in every if path.name != "collect.py"]


def definitions(path):
    """{name: (first line, last line, source)} of each top-level function, class and constant."""
    lines = path.read_text().splitlines(keepends=True)
    found = {}
    for node in ast.parse("".join(lines)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            name = node.name
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name, first = node.targets[0].id, node.lineno
        else:
            continue
        found[name] = (first, node.end_lineno, "".join(lines[first - 1 : node.end_lineno]))
    return found


def below_the_rule(path):
    """Names of the definitions below the rule."""
    lines = path.read_text().splitlines()
    rule = next(i for i, line in enumerate(lines, 1) if line.startswith(RULE))
    return {name for name, (first, _, _) in definitions(path).items() if first > rule}


def disagreements(paths):
    """{name: {source: [files]}} for every shared name with more than one source."""
    versions = defaultdict(lambda: defaultdict(list))
    for path in paths:
        for name, (_, _, source) in definitions(path).items():
            versions[name][source].append(path.name)
    return {n: dict(v) for n, v in versions.items() if n not in MAY_DIFFER and len(v) > 1}


def main_changes(path, master):
    """(lines that `main` in `path` lacks, lines that it has beside `main` of `master`)."""
    sources = [definitions(each)["main"][2].splitlines() for each in (master, path)]
    changes = [line for line in difflib.ndiff(*sources) if line[:2] in ("- ", "+ ")]
    return [x for x in changes if x[0] == "-"], [x for x in changes if x[0] == "+"]


def push(master, path):
    """Replace every shared definition in `path` by the one in `master`; returns changed names."""
    wanted, lines, changed = definitions(master), path.read_text().splitlines(keepends=True), []
    for name, (first, last, source) in reversed(definitions(path).items()):
        if name in wanted and name not in MAY_DIFFER and wanted[name][2] != source:
            lines[first - 1 : last] = [wanted[name][2]]
            changed.append(name)
    path.write_text("".join(lines))
    return changed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fix", type=Path, metavar="FILE", help="the version that all take over")
    fix = parser.parse_args().fix
    for script in scripts() if fix else []:
        if script.resolve() != fix.resolve() and RULE in script.read_text():
            print(script.name, push(fix, script))
    done = [path for path in scripts() if RULE in path.read_text()]
    for name, sources in disagreements(done).items():
        print(f"{name}: {' | '.join(', '.join(files) for files in sources.values())}")
    for path in done:
        print(f"{path.name}: main {main_changes(path, ROOT / 'algorithms/iql.py')}")
    raise SystemExit(bool(disagreements(done)))
