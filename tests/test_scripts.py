"""Each script is one file that stands alone, the same as its neighbours where it says so."""

import ast
import csv
import difflib
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from types import SimpleNamespace

import pytest
from conftest import ROOT
from shared_text import disagreements, scripts

SCRIPTS = scripts()
NAMES = [str(path.relative_to(ROOT)) for path in SCRIPTS]
each_script = pytest.mark.parametrize("name", NAMES)

# The quick run of each script when it stands alone; None: it does not train.
OFFLINE = ["--dataset", "{data}", "--env-id", "Pendulum-v1", "--preset", "smoke"]
ONLINE = ["--env-id", "Pendulum-v1", "--preset", "smoke"]
SMOKE = {
    "baselines/sac.py": ONLINE,
    "baselines/ppo.py": ONLINE,
    "baselines/collect.py": None,
}  # every other script: OFFLINE
TRAINING = [name for name in NAMES if SMOKE.get(name, OFFLINE)]

FLAGS = [
    "--env-id", "--seed", "--num-seeds", "--online-steps", "--eval-interval", "--eval-episodes",
    "--batch-size", "--discount", "--preset", "--run-dir", "--resume", "--init-from",
    "--eval-only", "--video", "--wandb",
]  # fmt: skip

# An environment made, an argument parsed, a file written or a jax backend started by the import
# shows here; what was found is written before the run starts, so that it survives its failure.
ALONE = """
import contextlib, importlib.util, io, json, os, sys
from pathlib import Path
import gymnasium as gym

def refuse(*args, **kwargs):
    raise AssertionError("an environment is made at import")

script, flags, report = sys.argv[1], json.loads(sys.argv[2]), {}
make, gym.make = gym.make, refuse
sys.argv = [script, "--no-such-flag"]
spec = importlib.util.spec_from_file_location("script", script)
module = sys.modules["script"] = importlib.util.module_from_spec(spec)
out = io.StringIO()
with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
    spec.loader.exec_module(module)
gym.make = make
from jax._src import xla_bridge
report["import"] = {
    "printed": out.getvalue(), "files": os.listdir(), "backends": list(xla_bridge._backends),
}
report["metrics"] = sorted(getattr(module, "METRICS", {}))
sys.argv, out = [script, "--help"], io.StringIO()
with contextlib.redirect_stdout(out):
    try:
        module.main()
    except SystemExit as end:
        report["help_code"] = end.code
report["help"] = out.getvalue()
Path("..", "report.json").write_text(json.dumps(report))
if flags is not None:
    sys.argv = [script, *flags]
    module.main()
"""


@pytest.fixture(scope="session")
def alone(pendulum, tmp_path_factory):
    """A script copied into an empty folder, imported, asked for help and run there, once."""
    done = {}

    def run(name):
        if name in done:
            return done[name]
        flags = SMOKE.get(name, OFFLINE)
        flags = flags and [flag.format(data=pendulum) for flag in flags]
        folder = tmp_path_factory.mktemp("alone") / "empty"
        folder.mkdir()
        file = shutil.copy(ROOT / name, folder)
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1",
            "WANDB_API_KEY": "secret-of-the-user", "COLUMNS": "200",
        }  # fmt: skip
        environment.pop("PYTHONPATH", None)
        process = subprocess.run(
            [sys.executable, "-c", ALONE, os.path.basename(file), json.dumps(flags)],
            cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        report = folder.parent / "report.json"
        done[name] = SimpleNamespace(
            folder=folder, code=process.returncode, out=process.stdout, err=process.stderr,
            **(json.loads(report.read_text()) if report.exists() else {}),
        )  # fmt: skip
        return done[name]

    return run


# ------------------------------------------------------------------------------------ Shared text


def test_shared_text_is_the_same_bytes():
    assert disagreements(SCRIPTS) == {}


BUDGETS = {  # changed lines, docstrings left out; "algorithm": only above the shared plumbing and
    # without the settings, which are each script's own
    ("algorithms/cql.py", "algorithms/cal_ql.py", "all"): 40,
    ("baselines/sac.py", "algorithms/cql.py", "algorithm"): 180,  # with micro-batches
    ("algorithms/iql.py", "algorithms/cql.py", "algorithm"): 275,
    ("algorithms/cql.py", "algorithms/sac_finetune.py", "algorithm"): 150,
    ("baselines/td3_bc.py", "algorithms/td3_c.py", "all"): 90,
}


@pytest.mark.parametrize(("one", "other", "part"), BUDGETS)
def test_siblings_differ_by_their_idea(one, other, part):
    if not ((ROOT / one).exists() and (ROOT / other).exists()):
        pytest.skip("not there yet")

    def lines(name):
        text = (ROOT / name).read_text().split('"""', 2)[2]
        if part == "algorithm":
            head, rest = text.split("- Config\n", 1)
            text = head + rest[rest.index("- Networks and") : rest.index("==== The same bytes")]
        return text.splitlines()

    diff = difflib.unified_diff(lines(one), lines(other), n=0, lineterm="")
    changed = [line for line in diff if line[0] in "+-" and line[:3] not in ("+++", "---")]
    print(f"{one} -> {other}, {part}: {len(changed)} changed lines")
    assert len(changed) <= BUDGETS[one, other, part]


def sections(path):
    """Names of the sections, as they follow each other."""
    lines = path.read_text().splitlines()
    return [line.strip("#-= ") for line in lines if re.match(r"# [-=]{4}", line)]


def test_sections_stand_in_the_same_order():
    found = {path.name: sections(path) for path in SCRIPTS}
    for name, names in found.items():
        assert names[0] == "Config" and names[-1] == "main", name
        assert len(set(names)) == len(names), name
    for (one, names), (other, others) in itertools.combinations(found.items(), 2):
        shared = set(names) & set(others)
        assert [n for n in names if n in shared] == [n for n in others if n in shared], (one, other)


@each_script
def test_main_runs_only_as_a_program(name):
    last = ast.parse((ROOT / name).read_text()).body[-1]
    assert ast.unparse(last) == "if __name__ == '__main__':\n    main()"


# ------------------------------------------------------------------------------------------- Pins


def header(path):
    """The PEP 723 block, parsed as the standard says."""
    block = re.search(r"(?m)^# /// script$\s(?P<content>(^#(| .*)$\s)+)^# ///$", path.read_text())
    lines = block.group("content").splitlines()
    return tomllib.loads("\n".join(re.sub("^# ?", "", line) for line in lines))


@each_script
def test_header_pins_what_requirements_txt_pins(name):
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = [line for line in lines if line.strip() and not line.startswith("#")]
    script = header(ROOT / name)
    assert script["requires-python"] == ">=3.11"
    assert all(re.fullmatch(r"[\w.-]+(\[[\w,]+\])?==[\w.]+", pin) for pin in pins)
    assert [pin for pin in script["dependencies"] if pin not in pins] == []


@each_script
def test_header_names_every_import(name):
    """The third-party packages that the file imports at its top are all in its header."""
    tree, known = ast.parse((ROOT / name).read_text()), sys.stdlib_module_names
    imported = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    dependencies = {re.split(r"[\[=]", d)[0] for d in header(ROOT / name)["dependencies"]}
    dependencies = {d.replace("-", "_") for d in dependencies}
    assert sorted(imported - known - dependencies) == []


# --------------------------------------------------------------------------------------- Security

FORBIDDEN_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "yaml.load",
                   "os.system", "np.fromfile"}  # fmt: skip


def dangers(source):
    """Every construct in a script that could run what is written in a file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        else:
            names = []
        found += [name for name in names if name.split(".")[0] in FORBIDDEN_MODULES]
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            found += [called] * (called in FORBIDDEN_CALLS)
            found += [k.arg for k in node.keywords
                      if k.arg == "allow_pickle" and ast.unparse(k.value) != "False"]  # fmt: skip
            found += ["shell"] * any(k.arg == "shell" for k in node.keywords)
    return found


@pytest.mark.parametrize("line", [
    "import pickle", "from joblib import load", "np.load(f, allow_pickle=True)", "eval(text)",
    "exec(text)", "torch.load(f)", "subprocess.run(c, shell=True)",
])  # fmt: skip
def test_the_search_for_dangers_finds(line):
    assert len(dangers(f"def function():\n    {line}")) == 1


@each_script
def test_no_pickle_and_no_code_from_files(name):
    assert dangers((ROOT / name).read_text()) == []


# ------------------------------------------------------------------------------------------ Alone


@each_script
def test_import_has_no_side_effects(name, alone):
    script = alone(name)
    wanted = {"printed": "", "files": [os.path.basename(name)], "backends": []}
    assert getattr(script, "import", script.err) == wanted


@each_script
def test_help_lists_the_shared_flags(name, alone):
    script = alone(name)
    assert script.help_code == 0
    words = re.findall(r"--[\w-]+", script.help)
    needed = FLAGS if name in TRAINING else ["--seed"]
    needed = needed + ["--dataset", "--offline-steps"] * (SMOKE.get(name, OFFLINE) is OFFLINE)
    if name == "algorithms/uni_o4.py":  # its offline phase has four stages, each with its steps
        needed[-1:] = [f"--{stage}-steps" for stage in ("cloning", "critic", "dynamics")]
    assert [flag for flag in needed if flag not in words] == []


@each_script
def test_every_metric_is_explained_in_the_readme(name, alone):
    lines = (ROOT / "README.md").read_text().splitlines()
    cells = [line.split("|")[1] for line in lines if line.startswith("| `")]
    explained = set(re.findall(r"`(\w+)`", " ".join(cells)))
    columns = set(alone(name).metrics)
    if name in TRAINING:
        with open(next(alone(name).folder.glob("runs/*/*/*/metrics.csv")), newline="") as file:
            columns |= set(next(csv.reader(file)))
    assert sorted(columns - explained) == []


@pytest.mark.parametrize("name", TRAINING)
def test_copied_alone_it_runs(name, alone):
    script = alone(name)
    assert script.code == 0, script.err
    assert "Traceback" not in script.err
    stem = os.path.basename(name).removesuffix(".py")
    data = "pendulum" if SMOKE.get(name, OFFLINE) is OFFLINE else "Pendulum-v1"
    folders = list(script.folder.glob("runs/*/*/*"))
    assert [f.relative_to(script.folder).parts[:3] for f in folders] == [("runs", stem, data)]
    left = {path.name for path in folders[0].iterdir()}
    wanted = {"config.json", "versions.json", "metrics.csv", "record.json",
              "checkpoint.npz", "curve.png"}
    own = {"queries.csv"} if stem == "uni_o4" else set()
    assert left == wanted | own | {"checkpoint.previous.npz", "lock"}
    assert sorted(os.listdir(script.folder)) == sorted([f"{stem}.py", "runs"])
    assert (folders[0] / "curve.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((folders[0] / "config.json").read_text())
    assert config["preset"] == "smoke"


@pytest.mark.parametrize("name", TRAINING)
def test_versions_make_the_run_again(name, alone, pendulum):
    script = alone(name)
    (record,) = json.loads(next(script.folder.glob("runs/*/*/*/versions.json")).read_text())
    needed = {"command", "script", "script_sha256", "git_commit", "git_status", "dataset",
              "dataset_sha256", "python", "machine", "cores", "device",
              "environment_variables", "packages", "init_from_sha256", "started"}  # fmt: skip
    assert needed <= set(record)
    assert record["command"][0] == record["script"] == os.path.basename(name)
    assert record["script_sha256"] == hashlib.sha256((ROOT / name).read_bytes()).hexdigest()
    if SMOKE.get(name, OFFLINE) is OFFLINE:
        assert record["dataset_sha256"] == hashlib.sha256(pendulum.read_bytes()).hexdigest()
    pins = dict(pin.split("==") for pin in header(ROOT / name)["dependencies"])
    pinned = {re.sub(r"\[.*", "", package) for package in pins}
    assert sorted(pinned - {package.replace("_", "-") for package in record["packages"]}) == []


@pytest.mark.parametrize("name", TRAINING)
def test_the_record_of_a_run(name, alone):
    """record.json says how the run ended, and has the evaluations and the agents' digest."""
    script = alone(name)
    folder = next(script.folder.glob("runs/*/*/*"))
    record = json.loads((folder / "record.json").read_text())
    assert (record["ended"], record["resumes"]) == ("finished", 0)
    assert record["config"] == json.loads((folder / "config.json").read_text())
    assert [record["versions"]] == json.loads((folder / "versions.json").read_text())
    assert record["environment"]["id"] == "Pendulum-v1"
    assert record["reference"] == {"source": "no reference known, returns are raw"}
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    phases = {phase: sum(float(row["seconds"] or 0) for row in rows if row["phase"] == phase)
              for phase in ("pretrain", "offline", "online")}
    assert record["seconds"] == pytest.approx(phases)
    rows = [row for row in rows if row["return"]]
    assert len(rows) >= 2 and len(rows) == len(record["curve"]["return"])
    for column, values in record["curve"].items():
        assert ["" if v is None else str(v) for v in values] == [
            str(row[column] if column == "phase" else float(row[column]) if row[column] else "")
            for row in rows], column  # fmt: skip
    last = {row["phase"]: int(row["step"]) for row in rows}
    assert (record["offline"], record["online"]) == tuple(
        last.get(phase, 0) for phase in ("offline", "online"))
    assert 100 < record["peak_memory_mb"] < 5000


@pytest.mark.parametrize("name", TRAINING)
def test_no_secret_of_the_environment_is_written(name, alone):
    files = [path for path in alone(name).folder.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert [path for path in files if b"secret-of-the-user" in path.read_bytes()] == []
