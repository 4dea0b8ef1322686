"""Would the tests notice? Each bug of planted_bugs.toml is planted, one at a time, in a temporary
copy of the repository, and the tests that should catch it are run there.

    python tests/planted_bugs.py                        # all, one after the other
    python tests/planted_bugs.py -n 2 baselines/sac.py  # two at a time, those of a script
    python tests/planted_bugs.py tau-swapped no-mask    # some

Exit code 1 if fewer than 9 of 10 of a script's are caught; 2 if a text to replace does not stand
(once) in its file, a planted text is no Python, or the tests fail without any bug.
"""

import argparse
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIELDS = "file", "old", "new", "tests", "expression"
TEXT = (ROOT / "tests" / "planted_bugs.toml").read_text()
BUGS = {name: tuple(bug[x] for x in FIELDS) for name, bug in tomllib.loads(TEXT).items()}


def planted(name):
    """The whole text of the bug's file with the bug in it."""
    file, old, new, *_ = BUGS[name]
    text = (ROOT / file).read_text()
    if text.count(old) != 1:
        fail(f"{name}: stands {text.count(old)} times in {file}, not once: {old!r}")
    text = text.replace(old, new)
    compile(text, file, "exec")
    return text


def fail(message):
    print(message, file=sys.stderr, flush=True)
    raise SystemExit(2)


def copy_of_the_repository(folder):
    for part in ("algorithms", "baselines", "tests"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / part, Path(folder, part), ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def passes(folder, file, expression):
    """Whether the chosen tests pass in the copy, and the first that fails with its reason."""
    env = os.environ | {
        "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1",
        "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
        "COLUMNS": "300",  # of pytest's summary: room for the reasons
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-x", "-n", "0", "-p", "no:cacheprovider", file]
    command += ["-k", expression]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        print(done.stdout[-3000:], done.stderr[-3000:], file=sys.stderr)
        fail(f"pytest {file} -k {expression!r} ended with {done.returncode}")
    words = ("FAILED", "ERROR")
    failed = [x.split("::")[-1][:110] for x in done.stdout.splitlines() if x.startswith(words)]
    return done.returncode == 0, failed[0] if failed else ""


def try_one(name, text, folders):
    """Plant a bug in a copy that is free; whether it is caught."""
    file, _, _, tests, expression = BUGS[name]
    folder, begin = folders.get(), time.time()
    clean = Path(folder, file).read_text()
    Path(folder, file).write_text(text)
    missed, failed = passes(folder, tests, expression)
    Path(folder, file).write_text(clean)
    folders.put(folder)
    result, seconds = "MISSED" if missed else "caught", time.time() - begin
    print(f"{name:36} {Path(file).name:15} {result}  {seconds:4.0f} s  {failed}", flush=True)
    return not missed


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("-n", type=int, default=1, help="copies: bugs tried at a time")
    parser.add_argument("names", nargs="*", help="of bugs or scripts; default: all")
    flags = parser.parse_args()
    names = [
        name for name, bug in BUGS.items() if not flags.names or {name, bug[0]} & {*flags.names}
    ]
    texts = {name: planted(name) for name in names}
    with tempfile.TemporaryDirectory() as base, ThreadPoolExecutor(flags.n) as pool:
        folders = queue.Queue()
        for i in range(flags.n):
            folders.put(copy_of_the_repository(Path(base, str(i))))
        for file in sorted({BUGS[name][3] for name in names}):
            used = " or ".join({f"({BUGS[name][4]})" for name in names if BUGS[name][3] == file})
            if not passes(Path(base, "0"), file, used)[0]:
                fail(f"{file} fails without any bug")
        results = pool.map(lambda name: try_one(name, texts[name], folders), names)
        caught = dict(zip(names, results, strict=True))
    shares = []
    for file in sorted({BUGS[name][0] for name in names}):
        own = [caught[name] for name in names if BUGS[name][0] == file]
        shares.append(sum(own) / len(own))
        print(f"{file}: {sum(own)} of {len(own)} planted bugs caught")
    raise SystemExit(min(shares, default=0) < 0.9)


if __name__ == "__main__":
    main()
