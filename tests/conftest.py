"""What the tests share: scripts as modules, scripts as processes, a small dataset."""

import csv
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import pytest
from minari.data_collector import EpisodeBuffer

ROOT = Path(__file__).resolve().parent.parent
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiled quickly. At optimisation level 0, which is quicker, XLA's program of SAC is not finite.
QUICKLY = "--xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", QUICKLY)
# Killed runs compile the same programs again. A worker's own: no other's half-written file.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax" / WORKER))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

TINY = ["--num-seeds", "2", "--eval-episodes", "2", "--batch-size", "16"]


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items):
    """A worker takes a file's tests, or of those of every script one script's: they share runs."""
    for item in items:
        script = getattr(item, "callspec", None) and item.callspec.params.get("name")
        name = script if item.path.stem == "test_scripts" and script else item.path.stem
        item.add_marker(pytest.mark.xdist_group(str(name)))


@pytest.fixture(autouse=True, scope="module")
def few_memory_maps():
    """XLA keeps every compiled program in mappings of its own: at the kernel's limit, 65,530, it
    crashed after some 500 tests in one process."""
    yield
    maps = Path("/proc/self/maps")
    if "jax" in sys.modules and maps.is_file() and maps.read_text().count("\n") > 20_000:
        sys.modules["jax"].clear_caches()  # not imported above: JAX_PLATFORMS has to be set first


def load_script(name):
    """A script, for example "algorithms/iql.py", as a module."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run_script(name, *arguments, cwd=None, timeout=120, **environment):
    """Run a script in its own process, on one thread: (exit code, stdout, stderr)."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, str(ROOT / name), *map(str, arguments)]
    done = subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout
    )
    return done.returncode, done.stdout, done.stderr


def read_metrics(folder):
    """metrics.csv of a run as dictionaries, without what depends on the clock."""
    with open(Path(folder, "metrics.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    clock = ("seconds", "updates_per_second")
    return [{name: x for name, x in row.items() if name not in clock} for row in rows]


def read_arrays(folder):
    """{name: bytes} of a checkpoint, without the meta."""
    with np.load(Path(folder, "checkpoint.npz")) as file:
        return {name: file[name].tobytes() for name in file.files if name != "meta"}


@pytest.fixture(scope="session", autouse=True)
def minari_folder(tmp_path_factory):
    """Minari's folder for this session, empty at first: no test sees what the machine has."""
    folder = tmp_path_factory.mktemp("minari")
    os.environ["MINARI_DATASETS_PATH"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def pendulum(minari_folder):
    """Id of a dataset of ten episodes of uniform actions in Pendulum-v1, whose box is [-2, 2]."""
    env = gym.make("Pendulum-v1")
    env.action_space.seed(0)
    episodes = []
    for number in range(10):
        observation, _ = env.reset(seed=number)
        buffer = EpisodeBuffer(observations=observation)
        ended = False
        while not ended:
            action = env.action_space.sample()
            observation, reward, terminated, truncated, _ = env.step(action)
            step = {"observation": observation, "action": action, "reward": reward, "info": {}}
            step |= {"terminated": terminated, "truncated": truncated}
            buffer = buffer.add_step_data(step)
            ended = terminated or truncated
        episodes.append(buffer)
    with pytest.warns():  # Minari asks for authors
        minari.create_dataset_from_buffers("pendulum/random-v0", env=env, buffer=episodes)
    return "pendulum/random-v0"


def script_fixture(path):
    return pytest.fixture(scope="session")(lambda: load_script(path.relative_to(ROOT)))


for path in [*ROOT.glob("algorithms/*.py"), *ROOT.glob("baselines/*.py")]:
    globals()[path.stem] = script_fixture(path)  # a script is the fixture of its name
