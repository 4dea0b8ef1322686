"""The scripts share text, not modules: a top-level name that stands in two of them has the same
bytes in both, but for what is the algorithm itself. Below the rule stands only what is in every
training script.

    python tests/shared_text.py                          # list disagreements
    python tests/shared_text.py --fix algorithms/iql.py  # push that file's versions into the others
    python tests/shared_text.py --readme                 # write README's table of scripts anew
"""

import argparse
import ast
import difflib
import json
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RULE = "# ==== The same bytes in every script from here"
MAY_DIFFER = {
    "Config", "PRESETS", "MAZE", "KITCHEN", "OGBENCH", "ADROIT", "WIDE", "SMALL", "INIT_FROM",
    "FAR", "METRICS", "Agent", "create_agent", "create_member",
    "critic_loss", "actor_loss", "value_loss", "temperature_loss", "conservative_difference",
    "update", "online_update", "phases", "online_batch", "explore", "act", "main",
}  # fmt: skip
SCRIPTS = {  # README's table: what, paper, nearest sibling
    "algorithms/iql.py": ("implicit Q-learning", "2110.06169", None),
    "algorithms/cql.py": ("conservative Q-learning, on SAC", "2006.04779", "algorithms/iql.py"),
    "algorithms/cal_ql.py": ("calibrated Q-learning", "2303.05479", "algorithms/cql.py"),
    "algorithms/sac_finetune.py": (
        "SAC from CQL's agent, in four ways", "2412.07762", "algorithms/cql.py"
    ),
    "algorithms/off2on.py": (
        "five CQL agents as one, balanced replay", "2107.00591", "algorithms/cql.py"
    ),
    "algorithms/enoto.py": (
        "CQL with many critics, optimistic online", "2306.06871",
        "algorithms/cql.py",
    ),
    "algorithms/td3_c.py": (
        "TD3 held to a slow pace", "2303.17396", "baselines/td3_bc.py"
    ),
    "algorithms/uni_o4.py": (
        "PPO offline, gated by a model, and online", "2311.03351", "baselines/ppo.py"
    ),
    "algorithms/pa_rl.py": (
        "any class of policy, by optimised actions", "2412.06685", "algorithms/cal_ql.py"
    ),
    "algorithms/boorl.py": (
        "five TD3+BC agents, one drawn per step", "2405.20984", "baselines/td3_bc.py"
    ),
    "algorithms/adaptive_bc.py": (
        "TD3+BC, its weight by the returns", "2210.13846", "baselines/td3_bc.py"
    ),
    "algorithms/apl.py": (
        "TD3+BC, greedy on fresh data", "2303.07693", "baselines/td3_bc.py"
    ),
    "algorithms/ooo.py": (
        "IQL explores by RND, a fresh one is retrained", "2310.08558", "algorithms/iql.py"
    ),
    "algorithms/moore.py": (
        "SAC on models that forget the data slowly", "2201.10070", "baselines/sac.py"
    ),
    "algorithms/opal.py": ("IQL over skills learnt before", "2010.13611", "algorithms/iql.py"),
    "baselines/bc.py": ("behaviour cloning, %BC", "2106.01345", "algorithms/iql.py"),
    "baselines/td3_bc.py": ("TD3 that imitates", "2106.06860", "algorithms/iql.py"),
    "baselines/sac.py": ("soft actor-critic, from scratch", "1812.05905", "algorithms/iql.py"),
    "baselines/rebrac.py": (
        "TD3+BC with both penalties and LayerNorm", "2305.09836", "baselines/td3_bc.py"
    ),
    "baselines/fql.py": ("flow Q-learning", "2502.02538", "algorithms/iql.py"),
    "baselines/awac.py": (
        "imitation weighted by advantage", "2006.09359", "algorithms/iql.py"
    ),
    "baselines/pex.py": (
        "a new policy beside the frozen one", "2302.00935", "algorithms/iql.py"
    ),
    "baselines/rlpd.py": ("SAC with prior data, from scratch", "2302.02948", "baselines/sac.py"),
    "baselines/ppo.py": ("PPO, from scratch", "1707.06347", "baselines/sac.py"),
    "baselines/collect.py": ("makes, converts and checks datasets", "2004.07219", None),
}  # fmt: skip
RECONSTRUCTIONS = {f"algorithms/{name}.py" for name in ("td3_c", "enoto", "opal", "moore")}
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
    diff = difflib.unified_diff(*sources, n=0, lineterm="")
    changes = [line for line in diff if line[0] in "+-" and line[:3] not in ("+++", "---")]
    return [x for x in changes if x[0] == "-"], [x for x in changes if x[0] == "+"]


def changed_lines(one, other):
    """Changed lines from one file to another, module docstrings left out."""
    texts = [(ROOT / name).read_text().split('"""', 2)[2].splitlines() for name in (one, other)]
    diff = difflib.unified_diff(*texts, n=0, lineterm="")
    return len([x for x in diff if x[0] in "+-" and x[:3] not in ("+++", "---")])


def basis(name):
    """What a script's updates are held to; results/golden.json lists the authors' numbers."""
    golden = json.loads((ROOT / "results" / "golden.json").read_text())
    numbers = ["numbers"] * any(row["script"] == name for row in golden.values())
    if "collect" in name:
        return ""
    return ", ".join([*numbers, *["reconstruction"] * (name in RECONSTRUCTIONS)]) or "equations"


def readme_table():
    """The table of scripts."""
    names = ("script", "what", "paper", "held to", "lines", "changed lines from")
    rows = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for name, (what, paper, sibling) in SCRIPTS.items():
        lines = len((ROOT / name).read_text().splitlines())
        link = f"https://arxiv.org/abs/{paper}"
        changed = f"{changed_lines(sibling, name)} from {Path(sibling).name}" if sibling else ""
        cells = f"[{Path(name).name}]({name})", what, link, basis(name), str(lines), changed
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


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
    parser.add_argument("--readme", action="store_true", help="write README's table of scripts")
    arguments = parser.parse_args()
    fix, readme = arguments.fix, ROOT / "README.md"
    if arguments.readme:
        before, rest = readme.read_text().split("<!-- scripts -->\n")
        after = rest.split("<!-- end of scripts -->")[1]
        table = f"<!-- scripts -->\n{readme_table()}\n<!-- end of scripts -->"
        readme.write_text(before + table + after)
    for script in scripts() if fix else []:
        if script.resolve() != fix.resolve() and RULE in script.read_text():
            print(script.name, push(fix, script))
    done = [path for path in scripts() if RULE in path.read_text()]
    for name, sources in disagreements(done).items():
        print(f"{name}: {' | '.join(', '.join(files) for files in sources.values())}")
    for path in done:
        print(f"{path.name}: main {main_changes(path, ROOT / 'algorithms/iql.py')}")
    raise SystemExit(bool(disagreements(done)))
