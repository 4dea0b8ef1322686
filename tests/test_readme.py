"""README's recipe "Write your own", followed to the letter, gives a script that passes the tests
which all scripts pass."""

import re
import shutil
import subprocess
import sys

from conftest import ROOT


def test_write_your_own(tmp_path):
    for name in ("algorithms", "baselines", "tests", "pyproject.toml", "requirements.txt"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    text = (ROOT / "README.md").read_text().split("## Write your own")[1]
    shell, function = re.findall(r"```(?:bash|python)\n(.*?)```", text, re.S)[:2]
    assert len((shell + function).splitlines()) <= 11
    subprocess.run(["bash", "-euc", shell], cwd=tmp_path, check=True)
    script = tmp_path / "algorithms" / "xql.py"
    source = script.read_text()
    old = re.search(r"def value_loss\(.*?\n\n\n", source, re.S).group()
    script.write_text(source.replace(old, function + "\n\n"))
    ruff = [sys.executable, "-m", "ruff"]
    subprocess.run([*ruff, "format", "--check", script], check=True, cwd=tmp_path)
    subprocess.run([*ruff, "check", script], check=True, cwd=tmp_path)
    command = [sys.executable, "-m", "pytest", "-o", "addopts=-q", "-k", "xql or same_bytes"]
    done = subprocess.run(
        [*command, "tests/test_scripts.py"], cwd=tmp_path, text=True, capture_output=True,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    passed = int(re.search(r"(\d+) passed", done.stdout).group(1))
    assert passed >= 10 and "skipped" not in done.stdout
