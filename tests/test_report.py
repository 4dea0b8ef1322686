"""results/report.py, evaluate.py, speed.py: sound records only, each seed shown, a page to read."""

import json
import re
import shutil
import subprocess

import pytest
from conftest import ROOT, load_script, run_script

RECORDS = ROOT / "results" / "records" / "second"
RUN = ["--hidden-dims", "16", "16", "--batch-size", "16", "--num-seeds", "2",
       "--eval-episodes", "2", "--offline-steps", "20", "--online-steps", "20",
       "--interval", "10"]  # fmt: skip


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
        record["curve"]["seed"] = [seed] * len(record["curve"]["seed"])
        path.write_text(json.dumps(record))
    return tmp_path


def made(entry, rows, after="", seed=0):
    """A record with a curve of (phase, step, score)."""
    phases, steps, scores = zip(*rows, strict=True)
    curve = {"phase": phases, "step": steps, "seed": [seed] * len(rows), "score": scores,
             "return": scores}  # fmt: skip
    return {"name": f"{entry}/default/seed{seed}",
            "after": after and f"{after}/default/seed{seed}", "steps": {"offline": 4, "online": 5},
            "config": {"init_from": after}, "reference": {"random": 0, "expert": 1},
            "command": ["python", "algorithms/iql.py", "--seed", "0"], "curve": curve, "starts": [],
            "script": "algorithms/iql.py", "units": {"rewards": [0.5, 0]},
            "updates_per_second": {"offline": 300, "online": 200}}  # fmt: skip


def change(path, edit):
    record = json.loads(path.read_text())
    edit(record)
    path.write_text(json.dumps(record))


# ---------------------------------------------------------------------------------------- Records


def test_sound_records_are_read(report, records):
    assert sorted(report.read_records(records)) == [f"cpu/iql/default/seed{i}" for i in (0, 1)]


@pytest.mark.parametrize("field", ["steps", "script", "curve.seed", "reference"])
def test_a_missing_field_is_refused_by_name(field, report, records):
    path = records / "cpu/iql/default/seed1.json"
    *outer, name = field.split(".")
    change(path, lambda record: (record[outer[0]] if outer else record).pop(name))
    with pytest.raises(SystemExit, match=f"seed1.json: no .*{field}"):
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
    (records / "cpu/failures.json").write_text(
        '{"cql/x/seed0": "failed (1): disk full", "iql/default/seed0": "failed (9), before"}'
    )
    shown = report.failures(report.read_records(records), records)
    assert shown == ["cpu/cql/x/seed0: failed (1): disk full"]  # the other one was made since


def test_what_the_tables_say_of_a_run(report):
    """Offline, at a tenth, at the end, lowest and dip, of a curve made by hand."""
    rows = [("offline", 2, 10), ("offline", 4, 60), ("online", 0, 62), ("online", 10, 40),
            ("online", 50, 20), ("online", 100, 90), ("retrain", 5, 95)]  # fmt: skip
    name, record = "cpu/iql/hopper/seed0", made("iql", rows)
    (run,) = report.runs_of(name, record, {})
    keys = ("offline", "early", "online", "lowest", "dip", "lost", "gain", "final")
    assert [run[key] for key in keys] == [60, 40, 90, 20, 40, 2 / 3, 30, 95]
    assert run["steps"] == (4, 5)
    more = [(phase, step, value + 2) for phase, step, value in rows]
    groups = report.group_runs({name: record, name[:-1] + "1": made("iql", more, seed=1)})
    (row,) = report.results_table(groups).splitlines()[2:]
    assert row == ("| hopper | iql | 4 | 5 | score | 60.0 · 62.0 | 40.0 · 42.0 | 90.0 · 92.0, "
                   "retrained 95.0 · 97.0 | 20.0 · 22.0 |")  # fmt: skip
    (row,) = report.front_table(groups, ["iql", "cql"]).splitlines()[2:]
    assert row.endswith("| 200 | 61 → 41 → 91 → 96 (-40), 2 of 3 seeds | - | - |")
    early = [(*row[:1], 0.2 * row[1], row[2]) if row[:2] == ("online", 10) else row for row in rows]
    assert next(report.runs_of(name, made("iql", early), {}))["early"] is None  # none is near
    little = made("iql", [("offline", 4, 8), ("online", 10, 2), ("online", 100, 8)], seed=1)
    both = {name: record, name[:-1] + "1": little}  # which has nothing to lose
    (row,) = report.front_table(report.group_runs(both), ["iql"]).splitlines()[2:]
    assert "| 34 → 21 → 49 → 52 (-20), 2 of 3 seeds |" in row
    nothing = [("offline", 4, 0), ("online", 100, 0)]
    (run,) = report.runs_of(name, made("iql", nothing), {})
    assert (
        run["dip"] is run["lost"] is None and run["gain"] == run["online"] == 0
    )  # nothing to lose
    (row,) = report.front_table(report.group_runs({name: made("iql", nothing[1:])}),
                                ["iql"]).splitlines()[2:]  # fmt: skip
    assert "| - → - → 0, 1 of 3 seeds |" in row


def test_a_claim_is_judged_by_every_seed(report):
    assert report.verdict([5, 6, 7], [1, 4, 2]) == (
        "**confirmed**: 5.0 · 6.0 · 7.0, against 1.00 · 4.0 · 2.0"
    )
    assert report.verdict([1, 4, 2], [5, 6, 7]).startswith("**refuted**")
    assert report.verdict([1, 5, 5], [4, 6, 6]).startswith("**open**")
    assert report.verdict([5, 6], [1, 4]).startswith("**open (2 of 3 seeds)**")  # too few to say
    assert report.verdict([1], []) == report.show([None, None]) == "-"  # not "- · -"
    assert report.front_table({}, report.TABLES["systems"]).startswith("Not run yet")
    entries = {*report.TABLES["systems"], *report.TABLES["variants"]}
    keys = {"offline", "early", "online", "dip", "lost", "gain", "final"}
    for claim in report.TABLES["claims"]:
        one, other = claim["compare"]
        assert all(entry in entries and key in keys for entry, key in (one, other)
                   if [entry, key] != ["", "0"]), claim  # fmt: skip


def test_claims_and_values_come_from_the_runs(report, tmp_path):
    """AWAC gains in one dataset and loses in one; the third is missing. Q in the world's units."""
    records = {}
    for seed in range(3):
        for world, end in (("hopper", 70), ("cube", 50)):
            rows = [("offline", 4, 60), ("online", 10, 40 + seed), ("online", 100, end + seed)]
            for entry in ("awac", "cql"):
                record = made(entry, rows, seed=seed)
                record["curve"]["q"] = [None, 3.0, 4.0]
                records[f"cpu/{entry}/{world}/seed{seed}"] = record
    groups = report.group_runs(records)
    (row,) = [x for x in report.claims_table(groups).splitlines() if "`awac` gain > 0" in x]
    assert row.split(" | ")[2:] == [
        "**confirmed**: 10.0 · 11.0 · 12.0",
        "**refuted**: -10.0 · -9.0 · -8.0",
        "- |",
    ]
    assert report.plot_values(records, tmp_path).count("\n") == 1  # of two datasets
    points = report.curve_points(record["curve"], 2, "q", record["units"])
    assert points == {"offline": [], "online": [(10, 6.0), (100, 8.0)]}


def test_a_panel_shows_every_evaluation_of_every_seed(report, tmp_path):
    """Moving one of them, of whatever phase, changes the picture."""
    rows = [("offline", 4, 60), ("online", 10, 40), ("online", 100, 70), ("retrain", 5, 65)]
    for moved in (None, *range(4)):
        new = [(*row[:2], row[2] + 4 * (i == moved)) for i, row in enumerate(rows)]
        runs = {f"cpu/{entry}/hopper/seed{seed}": made(entry, rows[first:3], seed=seed)
                for entry, first in (("ooo", 0), ("rlpd", 1)) for seed in (0, 1)}  # fmt: skip
        runs["cpu/ooo/hopper/seed1"] = made("ooo", new, seed=1)
        groups = {key[2]: found for key, found in report.group_runs(runs).items()}
        report.plot_panels("hopper", groups, tmp_path / f"{moved}.png")
    same = [report.alike(tmp_path / "None.png", tmp_path / f"{i}.png") for i in (None, *range(4))]
    assert same == [True] + [False] * 4


def test_a_run_from_anothers_agents_has_its_offline_value(report):
    """And its curve and its updates, by the record before, which has no row of its own."""
    before = made("cql-offline", [("pretrain", 3, 5), ("critic", 4, 60)])
    after = made("cql", [("online", 10, 40)], after="cql-offline")
    before["steps"], after["steps"] = {"pretrain": 3, "critic": 4}, {"online": 10}
    read = {"cpu/cql-offline/default/seed0": before, "cpu/cql/default/seed0": after}
    groups = report.group_runs(read)
    (run,) = groups["cpu", "default", "cql"]
    assert run["offline"] == 60 and run["steps"] == (7, 10) and run["dip"] == 20
    assert run["points"]["offline"] == [(3, 5), (7, 60)]  # phases one after the other
    assert [line.split(" | ")[1] for line in report.results_table(groups).splitlines()[2:]] == [
        "cql"
    ]


# ---------------------------------------------------------------------------- What is in the house


def test_everything_generated_is_current():
    """The tables, the reading guide's line numbers and the page follow from records and scripts."""
    code, out, err = run_script("results/report.py", "--check", cwd=ROOT)
    assert code == 0, f"python results/report.py was not run: {out}{err}"


def test_every_equation_has_its_function(report):
    for path in report.scripts():
        read = report.reading(path)
        assert read["equations"] and read["metrics"], path
        assert all(each["function"] for each in read["equations"]), (path, read["equations"])
    iql = {each["label"]: each["function"] for each in report.reading(
        ROOT / "algorithms/iql.py")["equations"]}  # fmt: skip
    names = ("value_loss", "critic_loss", "actor_loss")
    assert iql == {f"Eq. ({i})": name for i, name in zip((5, 6, 7), names, strict=True)}


def test_the_links_of_the_page_of_results_lead_somewhere():
    text = (ROOT / "results/README.md").read_text()
    links = {link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text)}
    local = {link for link in links if link and not link.startswith("http")}
    assert len(local) > 20 and all((ROOT / "results" / link).exists() for link in local)


# -------------------------------------------------------------------------------------------- Runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of iql.py with two seeds."""
    folder = tmp_path_factory.mktemp("runs") / "iql" / "seed0"
    code, _, err = run_script("algorithms/iql.py", *RUN, "--run-dir", folder, timeout=300)
    assert code == 0, err
    return folder


def test_curves_of_any_runs_in_one_picture(run, tmp_path):
    picture = tmp_path / "curves.png"
    record = RECORDS / "cpu/iql/default/seed0.json"
    code, out, err = run_script("results/report.py", "plot", run, record, "--out", picture)
    assert code == 0 and picture.stat().st_size > 10_000, err
    mixed = tmp_path / "scored.json"
    mixed.write_text(json.dumps(made("iql", [("offline", 2, 10)])))
    code, out, err = run_script("results/report.py", "plot", run, mixed, "--out", picture)
    assert code == 1 and "plot them apart" in err and "Traceback" not in err
    code, out, err = run_script("results/report.py", "plot", tmp_path, "--out", picture)
    assert code == 1 and "neither a run's folder nor a record" in err


def test_a_run_is_evaluated_again_to_the_same_returns_and_filmed(run):
    code, out, err = run_script("results/evaluate.py", run, "--video", timeout=300)
    found = re.findall(r"seed (\d): return (\S+)  \((\S+) (\S+)\)", out)
    rows = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    last = [row[rows[0].index("return")] for row in rows[-2:]]
    assert [mean for _, mean, *_ in found] == last, out + err
    for _, mean, *each in found:
        assert float(mean) == pytest.approx(sum(map(float, each)) / 2, abs=0.1)
    if code == 0:
        assert (run / "video.mp4").stat().st_size > 1000
    else:  # a machine without a renderer
        assert err.startswith("--video: rendering failed") and "libegl1" in err


def test_what_is_no_run_is_refused_in_one_line(run, tmp_path):
    (tmp_path / "damaged").mkdir()
    shutil.copy(run / "config.json", tmp_path / "damaged")
    (tmp_path / "damaged" / "checkpoint.npz").write_bytes(b"PK")
    for folder, words in ((tmp_path, "no run"), (tmp_path / "damaged", "unreadable")):
        code, out, err = run_script("results/evaluate.py", folder)
        assert code == 1 and words in err and err.count("\n") == 1, err


def test_speed_measures_and_compares():
    """With budgets too small for its numbers to mean anything."""
    flags = ["--only", "sac", "--repetitions", "1", "--steps", "30",
             "--flags", "--hidden-dims 16 16 --batch-size 16 --warmup-steps 10"]  # fmt: skip
    code, out, err = run_script("results/speed.py", *flags, timeout=300)
    assert code == 0, err
    (row,) = [line for line in out.splitlines() if line.startswith("| `sac online`")]
    assert all(float(cell.split()[0]) > 0 for cell in row.strip("|").split("|")[1:])
    found = {"now": [4.0, 9.0, 6.0], "bare": [8.0, 9.0, 6.0], "memory": [1.0, 2.0]}
    assert load_script("results/speed.py").row("iql offline", found).split(" | ")[1:] == [
        "6 (4 to 9)", "8 (6 to 9)", "1 (0.5 to 1)", "2.00 |"]  # fmt: skip


# -------------------------------------------------------------------------------------------- Page

SIZES = {"desktop": (1400, 1000), "phone": (390, 844)}


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """A headless Chromium."""
    webdriver = pytest.importorskip("selenium.webdriver")
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip("apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
                 "--disable-background-networking", "--disable-component-update", "--disable-sync",
                 f"--user-data-dir={tmp_path_factory.mktemp('user')}"):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.fixture(params=SIZES)
def browser(request, chromium):
    """The page, freshly opened from the file system, at one of the two sizes."""
    width, height = SIZES[request.param]
    size = {"width": width, "height": height, "deviceScaleFactor": 1,
            "mobile": request.param == "phone"}  # fmt: skip
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    chromium.get((ROOT / "results" / "index.html").as_uri())
    chromium.wide = request.param == "desktop"
    yield chromium
    assert chromium.get_log("browser") == []
    assert chromium.execute_script("return document.documentElement.scrollWidth <= innerWidth")


def find(browser, selector):
    return browser.find_elements("css selector", selector)


def test_the_page_opens_with_two_scripts_side_by_side(browser):
    chosen = [find(browser, f"#{side}")[0].get_attribute("value") for side in ("left", "right")]
    assert chosen == ["algorithms/cql.py", "algorithms/cal_ql.py"]
    top = find(browser, "#diff")[0].rect
    assert top["y"] < 350 and top["width"] > 0.9 * (1376 if browser.wide else 366)
    headings = [heading.text for heading in find(browser, "h2")]
    assert headings[0].startswith("Any two scripts") and headings[1] == "Results"
    assert len(find(browser, "tr.chart")) == 1  # of a run, further down
    assert browser.execute_script("return scrollY") == 0
    requests = browser.execute_script("return performance.getEntriesByType('resource').map(x => "
                                      "x.name).filter(x => !x.startsWith('data:'))")  # fmt: skip
    assert requests == []  # all is in the one file
    names = {option.text for option in find(browser, "#left option")}
    assert names == {path.relative_to(ROOT).as_posix() for path in load_script(
        "results/report.py").scripts()}  # fmt: skip


def choose(browser, left, right):
    for side, path in (("left", left), ("right", right)):
        browser.execute_script("const s = document.getElementById(arguments[0]);"
                               "s.value = arguments[1]; s.dispatchEvent(new Event('change'));",
                               side, path)  # fmt: skip


def clipped(browser):
    return browser.execute_script(
        "return [...document.querySelectorAll('.code td')].filter("
        "x => x.scrollWidth > x.clientWidth).map(x => x.textContent)"
    )


@pytest.mark.parametrize("left, right", [
    ("baselines/sac.py", "algorithms/iql.py"), ("algorithms/cql.py", "algorithms/cal_ql.py"),
])  # fmt: skip
def test_a_diff_has_every_line_whole(left, right, browser):
    choose(browser, left, right)
    removed, added = (find(browser, f"td.{kind}") for kind in ("del", "add"))
    command = ["diff", "--minimal", left, right]
    diff = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    assert (len(removed), len(added)) == (diff.count("\n<"), diff.count("\n>"))
    assert clipped(browser) == []
    columns = len(find(browser, ".code col"))
    assert columns == (4 if browser.wide else 2)  # side by side, or one below the other
    folds = len(find(browser, "td.fold"))
    browser.execute_script("document.querySelector('td.fold').click()")
    assert len(find(browser, "td.fold")) == folds - 1 and clipped(browser) == []
    browser.execute_script("document.getElementById('whole').click()")
    assert find(browser, "td.fold") == [] and clipped(browser) == []
    count = "return [...document.querySelectorAll('td.equation')].filter(x => x.textContent).length"
    assert browser.execute_script(count) >= 3
    choose(browser, left, left)
    assert find(browser, "td.del") + find(browser, "td.add") == []


OPEN_ROWS = """
const rows = [...document.querySelectorAll('tr.run')].filter((row, i) => i % 3 === 0);
return rows.map((row, i) => {
  if (row.classList.contains('chosen')) row.click();
  row.scrollIntoView({block: i % 2 ? 'start' : 'end'});
  row.click();
  const box = document.querySelector('tr.chart').getBoundingClientRect();
  const mine = row.getBoundingClientRect();
  const looks = [...document.querySelectorAll('.legend button[aria-pressed=true] path')];
  return {
    name: row.textContent, top: mine.top, chart: box.top - mine.bottom, bottom: box.bottom,
    height: innerHeight, wide: document.documentElement.scrollWidth - innerWidth,
    colors: looks.map(x => x.getAttribute('stroke')),
    all: [...document.querySelectorAll('.legend path')].map(
      x => x.getAttribute('stroke') + x.getAttribute('stroke-dasharray')),
    axes: [...document.querySelectorAll('tr.chart .panels svg')].map(x => x.getAttribute('class')),
    lines: document.querySelectorAll('tr.chart .panels path').length,
  };
});"""


def test_a_click_on_a_row_draws_its_chart_beside_it_in_view(browser):
    """Of every third row, at the top or the bottom of the screen when it is clicked."""
    opened = browser.execute_script(OPEN_ROWS)
    datasets = browser.execute_script("return data.rows.map(row => row.dataset)")
    assert len(opened) == -(-len(datasets) // 3)
    for one in opened:
        assert one["top"] >= -1 and abs(one["chart"]) < 2, one
        assert one["bottom"] <= one["height"] + 1 and one["wide"] <= 0, one
        assert one["axes"] in (["offline"], ["online"], ["offline", "online"]), one
        assert len(one["colors"]) <= 10 and len(set(one["colors"])) == len(one["colors"]), one
        assert len(set(one["all"])) == len(one["all"]) and one["lines"] > 0, one
    most = max(datasets.count(name) for name in datasets)
    assert max(len(one["colors"]) for one in opened) == min(10, most)
    assert any(len(one["axes"]) == 2 for one in opened)


def test_the_table_is_whole_and_filters(browser):
    shown = browser.execute_script("return [...document.querySelectorAll('#table th')].filter("
                                   "x => x.offsetWidth).map(x => x.textContent)")  # fmt: skip
    wanted = ["run", "updates", "steps", "offline", "lowest online", "online"]
    assert shown == (wanted if browser.wide else ["run", "offline", "online"])
    cut = browser.execute_script(
        "return [...document.querySelectorAll('.runs td, .runs th')]"
        ".filter(x => x.scrollWidth > x.clientWidth + 1).map(x => x.textContent)"
    )
    assert cut == []
    total = len(find(browser, "#table tr.run"))
    (field,) = find(browser, "#filter")
    field.send_keys("iql")
    rows = find(browser, "#table tr.run")
    assert 0 < len(rows) < total and all("iql" in row.text for row in rows)
    field.send_keys(" nothing")
    assert find(browser, "#table tr.run") == []
    browser.execute_script("arguments[0].value = ''; arguments[0].oninput()", field)
    assert len(find(browser, "#table tr.run")) == total


def test_the_numbers_lead_to_their_records_and_other_runs_are_added(browser):
    browser.execute_script("""
        const row = [...document.querySelectorAll('#table tr.run')].filter(
          x => x.textContent.startsWith('iql')).pop();
        if (!row.classList.contains('chosen')) row.click();
        document.querySelector('tr.chart details').open = true;""")
    links = [link.get_attribute("href") for link in find(browser, "tr.chart details a")]
    assert links and all((RECORDS / link.split("/second/")[1]).is_file() for link in links)
    assert find(browser, ".command")[0].text.startswith("python algorithms/iql.py")
    before = len(find(browser, "tr.chart .panels path"))
    browser.execute_script("document.querySelector('.legend button[aria-pressed=true]').click()")
    assert len(find(browser, "tr.chart .panels path")) < before
