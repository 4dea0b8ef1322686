"""Real SIGKILLs at random moments of a script's runs, until there were enough of them; each run is
started again by the same command until it ends, and must have the bits of a run left alone.

    python tests/kills.py algorithms/iql.py --kills 50
    python tests/kills.py                               # every script, 10 kills each
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conftest import ROOT, read_arrays, read_metrics
from shared_text import SCRIPTS
from test_scripts import tiny_flags

DATA = "hopper/sac-medium-replay-v0"


def start(command, folder):
    command = [*command, "--run-dir", str(folder)]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)


def finish(process):
    _, error = process.communicate()
    if process.returncode:
        sys.exit(f"failed: {error}")


def kill_and_compare(script, kills):
    """(kills, runs) after which every run was the same to the bit; exits where one was not."""
    command = [sys.executable, str(ROOT / script), *tiny_flags(script, DATA)]
    command[command.index("--interval") + 1] = "16"
    rng, done, runs = random.Random(script), 0, 0
    with tempfile.TemporaryDirectory() as home:
        begin = time.time()
        finish(start(command, Path(home, "whole")))
        length = time.time() - begin
        while done < kills:
            folder, runs = Path(home, f"run{runs}"), runs + 1
            while True:
                process = start(command, folder)
                try:
                    _, error = process.communicate(timeout=rng.uniform(0.3, 1.1) * length)
                    if process.returncode:
                        sys.exit(f"{script}: {error}")
                    break
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.communicate()
                    done += 1
            same = read_arrays(folder) == read_arrays(Path(home, "whole"))
            if not same or read_metrics(folder) != read_metrics(Path(home, "whole")):
                sys.exit(f"{script}: another run after {done} kills: {folder}")
    return done, runs


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    training = [name for name in SCRIPTS if "collect" not in name]
    parser.add_argument("scripts", nargs="*", default=training)
    parser.add_argument("--kills", type=int, default=10)
    arguments = parser.parse_args()
    for script in arguments.scripts:
        done, runs = kill_and_compare(script, arguments.kills)
        print(f"{script}: {done} kills in {runs} runs, the same bits after each", flush=True)


if __name__ == "__main__":
    main()
