"""What the tests share: scripts as modules, scripts as processes, a small dataset."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Killed and resumed runs compile the same programs again. A folder per worker: what one writes the
# other may not read in halves.
CACHE = ROOT / ".pytest_cache" / "jax" / os.environ.get("PYTEST_XDIST_WORKER", "")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


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


def pendulum_rows(num_steps=2000, seed=0):
    """`num_steps` of uniform actions in Pendulum-v1 as flat D4RL arrays (its box is [-2, 2])."""
    env = gym.make("Pendulum-v1")
    env.action_space.seed(seed)
    names = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")
    rows = {name: [] for name in names}
    observation, _ = env.reset(seed=seed)
    for _ in range(num_steps):
        action = env.action_space.sample()
        next_observation, reward, terminated, truncated, _ = env.step(action)
        step = (observation, action, reward, next_observation, terminated, truncated)
        for name, value in zip(names, step, strict=True):
            rows[name].append(value)
        observation = env.reset()[0] if terminated or truncated else next_observation
    return {name: np.array(values) for name, values in rows.items()}


@pytest.fixture(scope="session")
def pendulum(tmp_path_factory):
    """Path of a flat .npz file of 2,000 Pendulum-v1 steps."""
    path = tmp_path_factory.mktemp("data") / "pendulum.npz"
    np.savez(path, **pendulum_rows())
    return path


@pytest.fixture(scope="session")
def iql():
    return load_script("algorithms/iql.py")


@pytest.fixture(scope="session")
def sac():
    return load_script("baselines/sac.py")


@pytest.fixture(scope="session")
def cql():
    return load_script("algorithms/cql.py")


@pytest.fixture(scope="session")
def cal_ql():
    return load_script("algorithms/cal_ql.py")


@pytest.fixture(scope="session")
def sac_finetune():
    return load_script("algorithms/sac_finetune.py")


@pytest.fixture(scope="session")
def rlpd():
    return load_script("baselines/rlpd.py")


@pytest.fixture(scope="session")
def bc():
    return load_script("baselines/bc.py")


@pytest.fixture(scope="session")
def uni_o4():
    return load_script("algorithms/uni_o4.py")


@pytest.fixture(scope="session")
def ppo():
    return load_script("baselines/ppo.py")


@pytest.fixture(scope="session")
def td3_bc():
    return load_script("baselines/td3_bc.py")


@pytest.fixture(scope="session")
def td3_c():
    return load_script("algorithms/td3_c.py")
