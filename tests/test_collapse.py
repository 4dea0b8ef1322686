"""results/collapse.py: measures of curves made by hand, the table, a matrix that can run."""

import dataclasses
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tyro
from conftest import ROOT, load_script

pytest.importorskip("rliable", reason="pip install -r results/requirements.txt")
RECORDS = ROOT / "results" / "records"
DATA = ROOT.parent / "shared" / "data" / "d4rl_samples"


@pytest.fixture(scope="module")
def collapse():
    load_script("results/report.py")  # collapse.py imports both by their names
    load_script("results/sweep.py")
    return load_script("results/collapse.py")


@pytest.fixture(scope="module")
def trials(collapse):
    return collapse.sweep.read_matrix(collapse.MATRIX, "cpu", Path("data"), Path("runs"))


# --------------------------------------------------------------------------------------- Measures

K = 1_000
CURVES = {  # name: (offline, online points, depth, recovered, drop, final, area)
    "a collapse and a recovery":
        (60, [(10 * K, 20), (20 * K, 40), (30 * K, 70)], 40, 30 * K, 40, 70, (40 + 30 + 55) / 3),
    "one that only touches the old score":
        (60, [(10 * K, 20), (20 * K, 60)], 40, 20 * K, 40, 60, 40),
    "never recovered": (60, [(10 * K, 20), (20 * K, 59)], 40, None, 40, 59, (40 + 39.5) / 2),
    "none: never as low": (60, [(10 * K, 70), (20 * K, 65)], -5, None, 5, 65, (65 + 67.5) / 2),
    "none: never below": (60, [(10 * K, 60), (20 * K, 60)], 0, None, 0, 60, 60),
    "the evaluation at the switch is none of the online steps":
        (60, [(0, 60), (10 * K, 80), (20 * K, 70)], -10, None, 10, 70, (70 + 75) / 2),
    "good before it falls, which is no recovery":
        (60, [(10 * K, 80), (20 * K, 20), (30 * K, 30)], 40, None, 60, 30, (70 + 50 + 25) / 3),
    "the first of two lowest counts":
        (60, [(5 * K, 20), (10 * K, 60), (15 * K, 20)], 40, 10 * K, 40, 20, 40),
    "as late as the window":
        (60, [(20 * K, 50), (25 * K, 10), (50 * K, 60)], 50, 50 * K, 50, 60, 42.5),
    "too late to be a collapse of the switch":
        (60, [(25 * K, 50), (30 * K, 10), (50 * K, 60)], 10, None, 50, 60, 44.5),
    "too little to be a fall":
        (60, [(10 * K, 48), (20 * K, 70)], 12, None, 12, 70, (54 + 59) / 2),
    "a fall of more than a fifth":
        (60, [(10 * K, 47), (20 * K, 70)], 13, 20 * K, 13, 70, (53.5 + 58.5) / 2),
    "no fall from below 0":
        (-10, [(10 * K, -11), (20 * K, -10)], 1, None, 1, -10, -10.5),
    "steps that are not equally long":
        (0, [(10 * K, 10), (50 * K, 10)], -10, None, 0, 10, 9),
}  # fmt: skip


@pytest.mark.parametrize("name", CURVES)
def test_the_measures_of_a_curve(name, collapse):
    offline, points, depth, recovered, drop, final, area = CURVES[name]
    found = collapse.measures({"offline": offline, "points": {"online": points}})
    fell = depth > 0.2 * abs(offline)
    assert found == {"offline": offline, "depth": depth, "fell": fell, "recovered": recovered,
                     "drop": drop, "final": final, "area": pytest.approx(area), "distance": None,
                     "D": None, "multiplier": None}  # fmt: skip


def test_the_control_is_the_last_25000_offline_updates(collapse):
    """Not what was before them: the 5 and the 90."""
    points = [(20 * K, 5), (25 * K, 90), (30 * K, 60), (40 * K, 30), (55 * K, 50)]
    found = collapse.control({"points": {"offline": points}})
    assert found["offline"] == 60 and found["depth"] == 30 and found["fell"]
    assert found["recovered"] is None and found["final"] == 50
    assert found["area"] == pytest.approx((45 * 10 + 40 * 15) / 25)
    assert collapse.control({"points": {"offline": [(5 * K, 5), (25 * K, 90)]}}) is None


def test_recoveries_are_of_those_that_fell(collapse):
    fell = [{"fell": True, "recovered": step} for step in (20 * K, None, 10 * K)]
    high = {"fell": False, "recovered": None}
    assert collapse.recovery([*fell, high]) == ("3 of 4", "10,000; 20,000; never")
    assert collapse.recovery([fell[1], high]) == ("1 of 2", "never")
    assert collapse.recovery([high]) == ("0 of 1", "-")
    assert collapse.recovery([]) == ("-", "-")


# ------------------------------------------------------------------------------------------ Table


def put(folder, trial, scores, steps, ended="finished"):
    """Write a record of a trial, with these evaluations; those of the sweep look the same."""
    record = json.loads((RECORDS / "cpu/iql/default/seed0.json").read_text())
    seed = int(trial.name[-1])
    script = Path(trial.command[0]).name
    record["versions"] |= {"command": trial.command, "script": script}
    record |= {
        "ended": ended, "reference": {"random": 0, "expert": 100, "source": "made up"},
        "config": {"init_from": trial.after, "name": trial.name, "epsilon": 1e-4},
        "starts": [{"git_commit": "0" * 40, "script_sha256": "0" * 64}],
        "curve": {"phase": ["online"] * len(steps), "step": list(map(float, steps)),
                  "distance_to_offline": [0.1] * (len(steps) - 1) + [0.5 + seed / 10],
                  "seed": [seed] * len(steps), "return": scores, "score": scores,
                  "updates_per_second": [1.0] * len(steps)},
    }  # fmt: skip
    if script == "td3_c.py":  # the others have no such columns
        record["curve"] |= {"constraint": [None] + [1e-4 * (2 + seed)] * (len(steps) - 2) + [5e-4],
                            "multiplier": [None] + [1.0] * (len(steps) - 2) + [7.0]}  # fmt: skip
    path = folder / "cpu" / f"{trial.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))
    return path


@pytest.fixture
def records(tmp_path, trials):
    """TD3 on hopper-medium: two seeds that finished, one that failed. TD3-C: one seed."""
    named = {trial.name: trial for trial in trials}
    steps = [0, 2500, 25 * K, 50 * K]
    for seed, scores in enumerate([[60, 10, 20, 70], [50, 30, 40, 40]]):
        put(tmp_path, named[f"collapse-td3-half/hopper-medium/seed{seed}"], scores, steps)
    put(tmp_path, named["collapse-td3-half/hopper-medium/seed2"], [55, 1], steps[:2],
        "not finite: q")  # fmt: skip
    put(tmp_path, named["collapse-td3_c-half/hopper-medium/seed0"], [60, 61, 62, 63], steps)
    return tmp_path


def test_the_table_shows_what_is_there_and_counts_what_is_not(collapse, records):
    groups, failed, versions, controls = collapse.read_study(records, "cpu")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]]
            for line in collapse.table(groups).splitlines()[2:]]  # fmt: skip
    assert len(rows) == 4 * len(collapse.ROWS) - 2  # carried: narrow data only
    assert [row for row in rows if row[4] != "0 of 3"] == [
        ["hopper-medium", "TD3+BC", "TD3", "half", "2 of 3", "55.0 [50.0, 60.0]",
         "35.0 [20.0, 50.0]", "2 of 2", "50,000; never", "35.0 [20.0, 50.0]", "55.0 [40.0, 70.0]",
         "34.4 [31.0, 37.8]", "0.55 [0.50, 0.60]"],
        ["hopper-medium", "TD3+BC", "TD3-C", "half", "1 of 3", "60.0", "-1.00", "0 of 1", "-",
         "0.00", "63.0", "62.0", "0.50"],
    ]  # fmt: skip
    assert all(set(row[5:]) == {"-"} for row in rows if row[4] == "0 of 3")
    assert len(failed) == 1 and "seed2: not finite: q" in failed[0]
    assert collapse.count(groups) == "3 of 186 runs finished"
    assert versions == {"td3_bc.py": 1, "td3_c.py": 1} and controls == {}
    two = ("collapse-td3_c-half", "collapse-td3-half")
    assert collapse.differences(groups)["hopper-medium", *two] == {
        "depth": [-51], "drop": [-50], "final": [-7], "area": [pytest.approx(61.95 - 31.0)],
        "D": [pytest.approx(3)], "multiplier": [7]}  # fmt: skip
    cells = ("| TD3-C, half | TD3, half | 1 | -51.0; less in 1 | -50.0; less in 1 | -7.0; more in 0"
             " | 31.0; more in 1 | 3.0 | 7.0 |")
    assert collapse.paired_table(groups).splitlines()[2:] == [
        f"| all {cells}", f"| hopper-medium {cells}"]


def test_columns_are_of_one_seed_and_of_the_online_phase(collapse):
    curve = {"phase": ["offline", "online", "online", "online", "online"], "seed": [0, 0, 1, 0, 1],
             "constraint": [9.0, None, 5.0, 2.0, 6.0], "multiplier": [9.0, 1.0, 5.0, 2.0, 6.0]}
    record = {"curve": curve, "config": {"epsilon": 0.5}}
    assert collapse.online_columns(record, 0) == {
        "constraint": [2.0], "multiplier": [1.0, 2.0], "epsilon": 0.5}  # fmt: skip
    assert collapse.online_columns(record, 1)["multiplier"] == [5.0, 6.0]
    bare = {"curve": {"phase": ["online"], "seed": [0]}, "config": {}}  # SAC's, say
    assert collapse.online_columns(bare, 0) == {}


def test_pairs_of_all_datasets_are_pooled_by_entry(collapse, records, trials):
    named, steps = {trial.name: trial for trial in trials}, [0, 25 * K, 50 * K]
    made = {"td3-half": (60, 60), "td3_c-half": (20, 80), "td3-append": (60,),
            "td3_c-append": (70,), "td3-rate1000": (15,), "sac_finetune-naive": (60,),
            "sac_finetune-wsrl": (61,)}  # fmt: skip
    for name, ends in made.items():
        for seed, end in enumerate(ends):
            trial = named[f"collapse-{name}/halfcheetah-medium/seed{seed}"]
            put(records, trial, [60, 60, end], steps)
    rows = collapse.paired_table(collapse.read_study(records, "cpu")[0]).splitlines()
    found = {tuple(row.split(" | ")[:4]): row.split(" | ")[6] for row in rows[2:]}
    assert list(found.items()) == [
        (("| all", "TD3-C, append", "TD3, append", "1"), "10.0; more in 1"),
        (("| all", "TD3-C, half", "TD3, half", "3"), "-7.0 [-40.0, 20.0]; more in 1"),
        (("| all", "TD3-C, half", "TD3, rate/1000, half", "1"), "5.0; more in 1"),
        (("| all", "WSRL, online", "SAC, online", "1"), "1.00; more in 1"),
        (("| hopper-medium", "TD3-C, half", "TD3, half", "1"), "-7.0; more in 0"),
        (("| halfcheetah-medium", "TD3-C, append", "TD3, append", "1"), "10.0; more in 1"),
        (("| halfcheetah-medium", "TD3-C, half", "TD3, half", "2"),
         "-10.0 [-40.0, 20.0]; more in 1"),
        (("| halfcheetah-medium", "TD3-C, half", "TD3, rate/1000, half", "1"),
         "5.0; more in 1"),
        (("| halfcheetah-medium", "WSRL, online", "SAC, online", "1"), "1.00; more in 1"),
    ]  # fmt: skip


def test_what_is_paired_starts_from_one_agent_and_differs_in_one_factor(collapse):
    for two in collapse.PAIRS:
        mine, other = (collapse.ROWS[entry] for entry in two)
        assert mine[0] == other[0]
        assert (mine[1] == other[1]) != (mine[2] == other[2])


def test_the_control_has_a_table(collapse, records, trials):
    for seed, low in enumerate((59, 20)):
        trial = next(t for t in trials if t.name == f"td3_bc-offline/hopper-medium/seed{seed}")
        path = put(records, trial, [60, low, 60], [75 * K, 90 * K, 100 * K])
        record = json.loads(path.read_text())
        record["curve"]["phase"] = ["offline"] * 3
        path.write_text(json.dumps(record))
    groups, _, _, controls = collapse.read_study(records, "cpu")
    assert all(len(runs) < 3 for runs, _ in groups.values())  # no row of the table itself
    (row,) = collapse.control_table(controls).splitlines()[2:]
    assert row == ("| hopper-medium | TD3+BC | 2 | 60.0 [60.0, 60.0] | 20.5 [1.0, 40.0] | 1 of 2 "
                   "| 20.5 [1.0, 40.0] | 49.8 [40.0, 59.5] |")  # fmt: skip


def test_runs_of_one_family_begin_with_one_agent(collapse, records, trials):
    """Else a difference of two of them is one of their agents, too."""
    trial = next(t for t in trials if t.name == "collapse-td3_c-half/hopper-medium/seed1")
    put(records, trial, [50, 50, 50], [0, 25 * K, 50 * K])
    collapse.read_study(records, "cpu")
    put(records, trial, [51, 50, 50], [0, 25 * K, 50 * K])
    with pytest.raises(SystemExit, match=r"TD3\+BC's agent, hopper-medium, seed 1: .* with 51"):
        collapse.read_study(records, "cpu")


def test_all_that_is_generated(collapse, records):
    written = collapse.generate(records, "cpu", records)
    text, readme = (written[ROOT / name] for name in ("results/collapse.md", "README.md"))
    assert "3 of 186 runs finished; failed: cpu/collapse-td3-half/hopper-medium/seed2" in text
    part = readme.partition("<!-- collapse -->")[2].partition("<!-- end of collapse -->")[0]
    assert part.count("\n| hopper-medium |") == 2 and "0 of 3" not in part
    assert (records / "collapse.png").stat().st_size > 10_000


def test_the_report_leaves_the_study_to_its_own_page(collapse, records):
    report = collapse.report
    written = report.generate(report.read_records(records), records, records / "figures")
    text = written[ROOT / "results" / "README.md"]
    assert "| collapse-" not in text  # no row, but what failed is named
    assert "cpu/collapse-td3-half/hopper-medium/seed2: not finite: q" in text


def test_the_curve_is_that_of_the_seeds(collapse, records):
    """The mean over the steps that all seeds have, with IQL's start at the switch."""
    runs, _ = collapse.read_study(records, "cpu")[0]["hopper-medium", "collapse-td3-half"]
    runs[1]["points"]["online"] = [p for p in runs[1]["points"]["online"] if p[0] not in (0, 25000)]
    _, axes = collapse.pyplot.subplots()
    collapse.plot_runs(axes, "collapse-td3-half", runs)
    (line,) = axes.lines
    assert line.get_xydata().tolist() == [[0, 55], [2500, 20], [50 * K, 55]]
    collapse.pyplot.close("all")


def test_a_record_of_other_arguments_is_refused_by_name(collapse, records):
    path = records / "cpu/collapse-td3_c-half/hopper-medium/seed0.json"
    record = json.loads(path.read_text())
    words = record["versions"]["command"]
    elsewhere = [re.sub("^(data|runs|.*/algorithms)/", "/elsewhere/", word) for word in words]
    assert elsewhere != words
    record["versions"]["command"] = elsewhere  # the same run, made on another machine
    path.write_text(json.dumps(record))
    collapse.read_study(records, "cpu")
    for old, new in (("50000", "60000"), ("half", "append"), ("td3_bc-offline", "td3_bc")):
        changed = [w.replace(old, new) for w in elsewhere]
        assert changed != elsewhere
        record["versions"]["command"] = changed
        path.write_text(json.dumps(record))
        with pytest.raises(SystemExit, match="td3_c-half/hopper-medium/seed0: .* other arguments"):
            collapse.read_study(records, "cpu")


def test_everything_generated_is_current():
    """collapse.md, its figure and README's part follow from the committed records."""
    done = subprocess.run([sys.executable, "results/collapse.py", "--check"], cwd=ROOT,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, f"python results/collapse.py --tables: {done.stdout}{done.stderr}"


# ------------------------------------------------------------------------------------- The matrix


def entries(name):
    return tomllib.loads((ROOT / "results" / name).read_text())


def value_of(words, flag):
    return words[words.index(flag) + 1]


def test_every_run_is_one_that_its_script_takes(collapse, trials):
    """Flags, ranges, checkpoints it starts from, and the replay that the table says it has."""
    scripts, after = {}, {trial.name: trial for trial in trials}
    for trial in [trial for trial in trials if trial.name.endswith("/hopper-medium/seed0")]:
        path = Path(trial.command[0])
        module = scripts.setdefault(path.stem, load_script(f"{path.parent.name}/{path.name}"))
        default = dataclasses.replace(module.Config(), **module.PRESETS["mujoco"])
        config = tyro.cli(module.Config, args=trial.command[1:], default=default)
        module.check_config(dataclasses.replace(config, preset="mujoco"))
        if trial.after:
            assert Path(after[trial.after].command[0]).stem in module.INIT_FROM
            assert config.init_from == f"runs/{trial.after}" and "offline" in trial.after
        entry = trial.name.split("/")[0]
        if entry in collapse.ROWS:
            assert config.online_steps == 50_000
            assert config.eval_interval == (5_000 if entry == "iql" else 2_500)
            assert config.eval_episodes == (10 if entry == "iql" else 30)
            assert replay_of(module, config) == collapse.ROWS[entry][2], entry
        else:
            assert config.online_steps == 0 and entry.endswith(("-offline", "-longer"))
        if entry in collapse.CONTROLS and entry != "iql":  # like the online runs
            assert (config.eval_interval, config.eval_episodes) == (2_500, 30)


def replay_of(module, config):
    """What a run learns from online, by its own settings."""
    if hasattr(config, "replay"):
        return config.replay
    if hasattr(config, "mode"):
        assert config.offline_ratio is None
        ratio = module.MODES[config.mode]["offline_ratio"]
    else:
        ratio = getattr(config, "offline_ratio", -1)  # iql.py: all rows equally likely
    return {0.0: "online", 0.5: "half", -1: "append"}[ratio]


def test_every_row_is_in_the_matrix_and_no_run_is_in_it_twice(collapse, trials):
    names = {trial.name.split("/")[0] for trial in trials}
    assert names - set(collapse.ROWS) == {
        "td3_bc-offline", "td3_bc-longer", "cql-offline", "cal_ql-offline"}  # fmt: skip
    assert set(collapse.ROWS) < names and len(trials) == 225
    runs = [(*trial.command[:-1], trial.after) for trial in trials]
    assert len(set(runs)) == len(runs)
    plain = [name for name in collapse.ALGORITHMS if name.partition(",")[0] == "TD3"]
    wanted = {"TD3+BC": "bc"} | dict.fromkeys(plain, "td3")
    for trial in trials:
        agents, algorithm, _ = collapse.ROWS.get(trial.name.split("/")[0], ("", "", ""))
        if trial.after:
            assert agents.lower().replace("+", "_").replace("-", "_") == trial.after.split("-")[0]
        if algorithm in wanted:
            assert value_of(trial.command, "--online-loss") == wanted[algorithm]
            carried = "--online-optimizer" in trial.command
            assert carried == (algorithm == "TD3, carried")
            assert not carried or value_of(trial.command, "--online-optimizer") == "carried"
            slower = algorithm.partition("rate/")[2]
            assert bool(slower) == ("--policy-learning-rate" in trial.command)
            if slower:
                rate = float(value_of(trial.command, "--policy-learning-rate"))
                assert rate == pytest.approx(3e-4 / int(slower))


def test_what_both_matrices_have_is_the_same_run():
    """They share run folders and records: one name, one command."""
    ours, theirs = entries("collapse.toml"), entries("matrix.toml")
    shared = {key: value for key, value in theirs["datasets"].items() if key in ours["datasets"]}
    assert shared == ours["datasets"]
    known = {(entry.get("name", Path(entry["script"]).stem), dataset): entry
             for entry in theirs["trials"] for dataset in entry["datasets"]}  # fmt: skip
    found = 0
    for entry in ours["trials"]:
        for dataset in entry["datasets"]:
            other = known.get((entry.get("name", Path(entry["script"]).stem), dataset))
            if other:
                found += 1
                assert all(entry.get(k) == other.get(k) for k in ("script", "after", "cpu"))
    assert found >= 5  # iql on three datasets, CQL's and Cal-QL's agents on one


@pytest.mark.skipif(not DATA.is_dir(), reason="the D4RL samples are not here")
def test_every_dataset_is_there(trials):
    module, found = load_script("baselines/td3_bc.py"), set()
    for trial in trials:
        words = [word.replace("data/", f"{DATA}/", 1) for word in trial.command]
        env_id = value_of(words, "--env-id") if "--env-id" in words else None
        found.add((module.find_dataset(value_of(words, "--dataset")), env_id))
    assert len(found) == 4
    for path, env_id in found:  # all four have D4RL's reference returns: the table is of scores
        assert module.reference_returns(module.environment_spec(path, env_id))[1] > 0


def test_one_command_makes_the_runs_and_then_the_table(collapse, monkeypatch):
    done = []
    monkeypatch.setattr(collapse.sweep, "main", lambda words: done.append(words) or 1)
    monkeypatch.setattr(collapse, "write", lambda arguments: done.append("table") or 0)
    for words in (["--runs", "R", "--data", "D"], ["--tables"]):
        monkeypatch.setattr(sys, "argv", ["collapse.py", *words])
        assert collapse.main() == int(words != ["--tables"])  # the sweep's exit code stays
    assert done == [["--matrix", str(collapse.MATRIX), "--profile", "cpu", "--records",
                     str(RECORDS), "--runs", "R", "--data", "D"], "table", "table"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["collapse.py", "--tables", "--run", "R"])
    with pytest.raises(SystemExit):
        collapse.main()
