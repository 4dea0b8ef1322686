"""results/report.py and check.py: sound records only, right statistics, a page that works."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, load_script

pytest.importorskip("rliable", reason="pip install -r results/requirements.txt")
RECORDS = ROOT / "results" / "records"


@pytest.fixture(scope="module")
def report():
    return load_script("results/report.py")


@pytest.fixture
def records(tmp_path):
    """A committed record, and the same as if of another seed, in a folder of their own."""
    record = json.loads((RECORDS / "cpu/iql/default/seed0.json").read_text())
    for seed in (0, 1):
        path = tmp_path / f"cpu/iql/default/seed{seed}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        record["config"]["seed"] = seed
        record["curve"]["seed"] = [seed] * len(record["curve"]["seed"])
        path.write_text(json.dumps(record))
    return tmp_path


def change(path, edit):
    record = json.loads(path.read_text())
    edit(record)
    path.write_text(json.dumps(record))


# ---------------------------------------------------------------------------------------- Records


def test_sound_records_are_read(report, records):
    assert sorted(report.read_records(records)) == [f"cpu/iql/default/seed{i}" for i in (0, 1)]


@pytest.mark.parametrize("field", sorted(load_script("results/report.py").FIELDS) + [
    "versions.script", "versions.dataset_sha256", "curve.seed", "reference.source"])
def test_a_missing_field_is_refused_by_name(field, report, records):
    path = records / "cpu/iql/default/seed1.json"
    *outer, name = field.split(".")
    change(path, lambda record: (record[outer[0]] if outer else record).pop(name))
    with pytest.raises(SystemExit, match=f"seed1.json: no .*{field}"):
        report.read_records(records)


def test_a_record_of_an_unknown_commit_is_named(report, records, capsys, monkeypatch):
    """Unless its script's bytes are those of another commit."""
    path = records / "cpu/iql/default/seed1.json"
    change(path, lambda record: record["starts"][0].update(git_commit="0" * 40))
    made = json.loads(path.read_text())["starts"][0]
    words = f"{path}: commit {'0' * 40}, which made it, is not in"
    for hashes, warned in (({made["script_sha256"]}, False), ({"1" * 64}, True)):
        monkeypatch.setattr(report, "earlier_hashes", lambda script, known=hashes: known)
        report.read_records(records)
        assert (words in capsys.readouterr().err) == warned


def test_the_hashes_of_a_scripts_past(report):
    now = report.script_hash("HEAD", "iql.py")
    assert now is None or now in report.earlier_hashes("iql.py")  # None: no clone, but a copy


def test_a_wrong_hash_is_refused_by_name(report, records, monkeypatch):
    path = records / "cpu/iql/default/seed1.json"
    made = json.loads(path.read_text())["starts"][0]
    if report.script_hash(made["git_commit"], "iql.py") is None:  # a clone without its history
        monkeypatch.setattr(report, "script_hash", lambda *_: made["script_sha256"])
    change(path, lambda record: record["starts"][0].update(script_sha256="0" * 64))
    with pytest.raises(SystemExit, match=r"seed1.json: iql.py of commit \w+ has another hash"):
        report.read_records(records)


def test_the_same_run_twice_is_refused_by_name(report, records):
    shutil.copy(records / "cpu/iql/default/seed1.json", records / "cpu/iql/default/seed9.json")
    with pytest.raises(SystemExit, match="seed9.json: the same run as .*seed1.json"):
        report.read_records(records)


def test_no_json_and_a_cut_curve_are_refused(report, records):
    path = records / "cpu/iql/default/seed1.json"
    whole = path.read_text()
    path.write_text(whole[:1000])
    with pytest.raises(SystemExit, match="seed1.json: no JSON"):
        report.read_records(records)
    path.write_text(whole)
    change(path, lambda record: record["curve"]["return"].pop())
    with pytest.raises(SystemExit, match="different lengths"):
        report.read_records(records)


def test_a_run_that_failed_is_shown(report, records):
    path = records / "cpu/iql/default/seed1.json"
    change(path, lambda record: record.update(ended="not finite: critic_loss"))
    (records / "cpu/failures.json").write_text('{"cql/x/seed0": "failed (4): disk full"}')
    read = report.read_records(records)
    shown = report.failures(read, records)
    assert len(shown) == 2 and "cpu/cql/x/seed0: failed (4): disk full" in shown
    assert any("seed1: not finite: critic_loss" in text for text in shown)
    runs = report.group_runs(read)["cpu", "default", "iql"]
    assert [run["online"] is None for run in runs] == [False, True]  # no final value, but a curve
    assert "2, 1 not ended" in report.results_table(report.group_runs(read))


# ------------------------------------------------------------------------------------- Statistics


def test_iqm_is_that_of_numpy(report):
    scores = np.random.RandomState(0).randn(12, 5) * 30 + 50  # 60 values: 15 are cut on each side
    by_hand = np.sort(scores, axis=None)[15:45].mean()
    assert abs(report.iqm(scores) - by_hand) < 1e-12
    estimate, low, high = report.interval(scores, report.iqm)
    assert abs(estimate - by_hand) < 1e-12
    # the stratified bootstrap by hand: runs drawn anew within each task
    draw = np.random.RandomState(1)
    means = [np.sort(np.stack([draw.choice(scores[:, j], 12) for j in range(5)]), axis=None)[15:45]
             .mean() for _ in range(2000)]
    np.testing.assert_allclose([low, high], np.percentile(means, [2.5, 97.5]), atol=2.0)


def test_what_the_table_says_of_a_run(report):
    """Offline, online, dip and regret of a curve made by hand."""
    record = json.loads((RECORDS / "cpu/iql/default/seed0.json").read_text())
    record |= {"reference": {"random": 0, "expert": 1, "source": "x"}, "offline": 20, "online": 30,
               "curve": {"phase": ["offline", "offline", "online", "online", "online"],
                         "step": [10, 20, 10, 20, 30], "seed": [0] * 5,
                         "score": [10, 60, 40, 60, 90], "return": [1] * 5,
                         "updates_per_second": [100, 120, 50, 60, 70]}}
    (run,) = report.runs_of("cpu/iql/default/seed0", record)
    assert (run["offline"], run["online"], run["dip"]) == (60, 90, 20)
    assert run["regret"] == pytest.approx((0.6 + 0.4 + 0.1) / 3)
    assert run["regained"] == 20
    record["curve"]["score"][2] = 65  # never below
    (run,) = report.runs_of("cpu/iql/default/seed0", record)
    assert (run["dip"], run["regained"]) == (0, None)
    assert report.show([60, 70, 80]) == "70.0 [60.0, 80.0]"  # smallest and largest
    five = report.show([60, 70, 80, 90, 100])
    assert five.startswith("80.0 [6") and five != "80.0 [60.0, 100.0]"  # a bootstrap
    np.random.rand(5)
    assert report.show([60, 70, 80, 90, 100]) == five  # the same whatever was drawn before
    assert (report.show([60]), report.show([None])) == ("60.0", "-")


# ---------------------------------------------------------------------------- What is in the house


def test_everything_generated_is_current(tmp_path):
    """README's tables, the reading guide's line numbers and the page follow from the records."""
    done = subprocess.run([sys.executable, "results/report.py", "--check"], cwd=ROOT,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, f"python results/report.py was not run: {done.stdout}{done.stderr}"


def test_every_loss_has_its_equation(report):
    import ast

    for path in report.scripts():
        read = report.reading(path)
        assert all(each["function"] for each in read["equations"]), path
        losses = {node.name for node in ast.parse(path.read_text()).body
                  if isinstance(node, ast.FunctionDef) and node.name.endswith("_loss")}
        assert losses <= {each["function"] for each in read["equations"]}, path
        assert read["deviations"], path


def on_one_core():
    """In a child: on how many cores a run has, its last digits depend."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def test_a_record_is_made_again_to_the_bit(tmp_path):
    command = [sys.executable, "algorithms/iql.py", "--preset", "smoke", "--run-dir",
               str(tmp_path / "run")]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, preexec_fn=on_one_core)
    path = tmp_path / "run" / "record.json"
    assert json.loads(path.read_text())["versions"]["cores"] == 1  # and check.py takes one, too
    check = [sys.executable, "results/check.py", str(path)]
    done = subprocess.run(check, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "the same, to the bit" in done.stdout, done.stdout
    change(path, lambda record: record["curve"]["return"].__setitem__(2, 0.0))
    done = subprocess.run(check, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "return differs from evaluation 2 on" in done.stdout


# ------------------------------------------------------------------------------------------- Page


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """The page in a headless Chromium, as from the file system."""
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("apt install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
                 "--disable-background-networking", "--disable-component-update", "--disable-sync",
                 "--window-size=1400,1000", f"--user-data-dir={tmp_path_factory.mktemp('user')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    browser.get((ROOT / "results" / "index.html").as_uri())
    yield browser
    browser.quit()


def find(browser, selector):
    return browser.find_elements("css selector", selector)


def test_the_page_loads_without_errors(browser):
    assert browser.get_log("browser") == []
    assert find(browser, "#chart canvas")
    assert len(find(browser, "#table tbody tr")) >= 2
    requests = browser.execute_script("return performance.getEntriesByType('resource').map(x => "
                                      "x.name).filter(x => !x.startsWith('data:'))")
    assert requests == []  # all is in the one file


def test_the_page_filters(browser):
    (field,) = find(browser, "#filter")
    total = len(find(browser, "#table tbody tr"))
    field.send_keys("sac")
    rows = find(browser, "#table tbody tr")
    assert 0 < len(rows) < total and all("sac" in row.text for row in rows)
    field.send_keys(" nothing")
    assert find(browser, "#table tbody tr") == []
    field.clear()
    field.send_keys(" ")
    assert len(find(browser, "#table tbody tr")) == total


def test_the_numbers_lead_to_their_records(browser):
    links = [link.get_attribute("href") for link in find(browser, "#table tbody a")]
    assert links and all((RECORDS / link.split("/records/")[1]).is_file() for link in links)
    find(browser, "#table tbody tr")[0].click()
    (command,) = find(browser, "#command")
    assert command.text.startswith("python ")


def choose(browser, left, right):
    for side, path in (("left", left), ("right", right)):
        browser.execute_script("const s = document.getElementById(arguments[0]);"
                               "s.value = arguments[1]; s.dispatchEvent(new Event('change'));",
                               side, path)


PAIRS = [("baselines/sac.py", "algorithms/iql.py"), ("algorithms/cql.py", "algorithms/cal_ql.py")]


@pytest.mark.parametrize("left, right", PAIRS)
def test_two_scripts_side_by_side(left, right, browser):
    choose(browser, left, right)
    removed, added = (find(browser, f"td.{kind}") for kind in ("del", "add"))
    diff = subprocess.run(["diff", left, right], cwd=ROOT, capture_output=True, text=True).stdout
    assert len(removed) == pytest.approx(diff.count("\n<"), rel=0.1, abs=5)
    assert len(added) == pytest.approx(diff.count("\n>"), rel=0.1, abs=5)
    assert any("critic_loss" in cell.text for cell in find(browser, ".code td"))
    equations = [cell.text for cell in find(browser, "td.equation") if cell.text]
    assert len(equations) >= 4
    choose(browser, left, left)
    assert find(browser, "td.del") + find(browser, "td.add") == []
    assert browser.get_log("browser") == []


def test_the_page_on_a_phone(browser):
    phone = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        for row in range(len(find(browser, "#table tbody tr"))):
            browser.execute_script(
                f"document.querySelectorAll('#table tbody tr')[{row}].click()")
            width, page = browser.execute_script(
                "return [innerWidth, document.documentElement.scrollWidth]")
            assert page <= width + 1
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
