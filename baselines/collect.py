"""Collect: datasets that need no training, written as Minari datasets.

Two sources. Either D4RL's recipe for its mazes: a point mass is steered to random goals, by a PD
controller that follows the shortest path from cell to cell, with noise on its actions. Or the
policy of any checkpoint of these scripts, deterministic or sampled.

    Fu et al.: D4RL: Datasets for Deep Data-Driven Reinforcement Learning, arXiv 2004.07219

    action = 10 * (waypoint - position) - velocity + noise * N(0, 1), clipped to the box;
    a waypoint is passed within 0.1 of it, the last one is the goal itself

    python baselines/collect.py --maze umaze                      # pointmaze/umaze-v0
    python baselines/collect.py --checkpoint runs/sac/Hopper-v5/seed0 --dataset-id hopper/sac-v0

Training and evaluation happen in a maze with one start and one goal cell, those of D4RL's antmaze:
an episode ends at the goal with reward 1, so that the score is the success rate. Start and goal
are up to a quarter of a cell off their cell's centre, in the data as in the evaluation.

Deviations from D4RL's maze2d sets (scripts/generation/generate_maze2d_datasets.py):
 1. An episode ends at its goal, the next start is drawn anew, and the observation contains the
    goal, as in antmaze. In maze2d nothing ends: the ball rolls on from goal to goal, and the
    observation does not say where they are.
 2. 30 % of the goals are in the evaluation's goal cell, as in our antmaze sets; the others are
    uniform over the free cells, as all are in maze2d.
 3. Gymnasium-Robotics' PointMaze: its goal radius is 0.45 and the offset above 0.25, not 0.5, 0.1.
 4. Breadth-first search, not Q-iteration, plans the path: the lengths are the same. Waypoints are
    the cells' centres; D4RL moves each of them by up to 0.2.
 5. The noise of 0.5 is the default; in D4RL it is an option.

Of a checkpoint, the policy network alone acts: what a script does to its actions afterwards, for
example a search by the critic, is not in the data.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "jax==0.10.2",
#   "flax==0.12.8",
#   "optax==0.2.8",
#   "distrax==0.1.9",
#   "tfp-nightly==0.26.0.dev20261027",
#   "chex==0.1.92",
#   "numpy==2.4.6",
#   "scipy==1.17.1",
#   "gymnasium[mujoco]==1.4.0",
#   "mujoco==3.11.0",
#   "minari[hdf5,hf]==0.5.4",
#   "h5py==3.16.0",
#   "huggingface-hub==2.4.0",
#   "tyro==1.0.16",
#   "tqdm==4.70.1",
#   "matplotlib==3.11.2",
#   "imageio[ffmpeg]==2.38.1",
#   "imageio-ffmpeg==0.8.1",
#   "gymnasium-robotics==1.4.2",
# ]
# ///
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path

import distrax
import flax.linen as nn
import gymnasium as gym
import h5py
import jax
import jax.numpy as jnp
import minari
import numpy as np
import tyro
from minari.dataset.minari_dataset import parse_dataset_id
from tqdm import tqdm

# ---------------------------------------------------------------------------------------- Config


@dataclasses.dataclass(frozen=True)
class Config:
    # Run
    seed: int = 0  # of starts, goals, noise and samples
    num_steps: int = 300_000  # environment steps, and what the last episode still needs
    dataset_id: str | None = None  # Minari id to write; default: pointmaze/<maze>-v0
    # One source
    maze: str | None = None  # umaze, medium or large
    checkpoint: str | None = None  # run folder or checkpoint.npz of one of these scripts
    # Behaviour
    noise: float = 0.5  # --maze: standard deviation on each action; the box is [-1, 1]
    sampled: bool = False  # --checkpoint: sample the actions; default: the deterministic policy


RANGES = {  # smallest and largest accepted value
    "seed": (0, 2**31 - 1), "num_steps": (1, 10**8), "noise": (0.0, 2.0),
}

# ----------------------------------------------------------------------------------------- Mazes


MAZES = {  # environment, and start and goal cell (row, column) of D4RL's antmaze evaluation
    "umaze": ("PointMaze_UMaze-v3", (1, 1), (3, 1)),
    "medium": ("PointMaze_Medium-v3", (1, 1), (6, 6)),
    "large": ("PointMaze_Large-v3", (1, 1), (7, 9)),
}
GOAL_SHARE = 0.3  # of the episodes have their goal in the evaluation's goal cell


def maze_environments(name):
    """The environment for collecting, with start and goal in any cell, and the one for training
    and evaluation, with one start and one goal cell. Both end at the goal, with reward 1."""
    import gymnasium_robotics

    gym.register_envs(gymnasium_robotics)
    env_id, start, goal = MAZES[name]
    env = gym.make(env_id, continuing_task=False)
    maze_map = [list(row) for row in env.unwrapped.maze.maze_map]
    maze_map[start[0]][start[1]], maze_map[goal[0]][goal[1]] = "r", "g"
    return env, gym.make(env_id, continuing_task=False, maze_map=maze_map)


def shortest_path(maze_map, start, goal):
    """The cells (row, column) from start to goal, both included; 1 in the map is a wall."""
    previous, queue = {start: None}, deque([start])
    while goal not in previous:
        row, column = cell = queue.popleft()
        for near in ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
            if maze_map[near[0]][near[1]] != 1 and near not in previous:
                previous[near] = cell
                queue.append(near)
    path = [goal]
    while path[-1] != start:
        path.append(previous[path[-1]])
    return path[::-1]


def waypoint_action(observation, waypoints, noise, rng):
    """The controller's action (2,) towards the first of `waypoints`, a deque of (x, y). The ones
    that are reached are dropped from it, but for the last."""
    position, velocity = np.split(observation["observation"], 2)  # (2,), (2,)
    while len(waypoints) > 1 and np.linalg.norm(waypoints[0] - position) < 0.1:
        waypoints.popleft()
    action = 10.0 * (waypoints[0] - position) - velocity + noise * rng.standard_normal(2)
    return np.clip(action, -1.0, 1.0).astype(np.float32)


def maze_episodes(env, goal_cell, config):
    """At least `num_steps` steps of the controller, as episodes with dict observations."""
    maze, rng = env.unwrapped.maze, np.random.default_rng(config.seed)
    cells = np.ndindex(maze.map_length, maze.map_width)
    free = [cell for cell in cells if maze.maze_map[cell[0]][cell[1]] != 1]
    steps, episode = 0, 0
    while steps < config.num_steps:
        goal = goal_cell if rng.random() < GOAL_SHARE else free[rng.integers(len(free))]
        starts = [cell for cell in free if cell != goal]
        start = starts[rng.integers(len(starts))]
        options = {"reset_cell": np.array(start), "goal_cell": np.array(goal)}
        observation, _ = env.reset(seed=episode_seed(3, config.seed, episode), options=options)
        path = map(maze.cell_rowcol_to_xy, shortest_path(maze.maze_map, start, goal)[1:-1])
        waypoints = deque([*path, observation["desired_goal"]])
        observations, rest, ended = [observation], [], False
        while not ended:
            action = waypoint_action(observation, waypoints, config.noise, rng)
            observation, reward, terminated, truncated, _ = env.step(action)
            observations.append(observation)
            rest.append((action, reward, terminated, truncated))
            ended, steps = terminated or truncated, steps + 1
        stacked = {key: np.array([o[key] for o in observations]) for key in sorted(observation)}
        yield episode_buffer(stacked, *map(np.array, zip(*rest, strict=True)))
        episode += 1


# ----------------------------------------------------------------------------------- Checkpoints


def orthogonal(key, shape, dtype=jnp.float32):
    """Orthogonal initialisation with gain sqrt(2). Under vmap one matrix after the other: XLA's
    batched QR can wait for itself for ever where there are few cores."""
    draw = partial(nn.initializers.orthogonal(2**0.5), shape=shape, dtype=dtype)
    return jax.custom_batching.sequential_vmap(draw)(key)


class MLP(nn.Module):
    """Hidden layers, on demand with LayerNorm and dropout: (..., F) -> (..., H)."""

    hidden_dims: tuple[int, ...]
    dropout_rate: float = 0.0
    layer_norm: bool = False
    activation: Callable = nn.relu

    @nn.compact
    def __call__(self, x, training=False):
        for width in self.hidden_dims:
            x = nn.Dense(width, kernel_init=orthogonal)(x)  # (..., width)
            x = self.activation(nn.LayerNorm()(x) if self.layer_norm else x)
            if self.dropout_rate > 0:
                x = nn.Dropout(self.dropout_rate, deterministic=not training)(x)
        return x


class GaussianPolicy(nn.Module):
    """pi: (B, O) -> a diagonal Gaussian over (B, A), its mean inside [-1, 1], its std learned
    but the same in every state. It is not squashed: samples are clipped when they are executed."""

    hidden_dims: tuple[int, ...]
    action_dim: int
    dropout_rate: float = 0.0

    @nn.compact
    def __call__(self, observations, training=False):
        features = MLP(self.hidden_dims, self.dropout_rate)(observations, training)  # (B, H)
        mean = nn.tanh(nn.Dense(self.action_dim, kernel_init=orthogonal)(features))  # (B, A)
        log_std = self.param("log_std", nn.initializers.zeros, (self.action_dim,))  # (A,)
        std = jnp.exp(jnp.clip(log_std, -5.0, 2.0))  # (A,)
        return distrax.MultivariateNormalDiag(mean, jnp.broadcast_to(std, mean.shape))


class TanhGaussianPolicy(nn.Module):
    """pi: (B, O) -> a diagonal Gaussian, squashed by tanh, over actions (B, A)."""

    hidden_dims: tuple[int, ...]
    action_dim: int

    @nn.compact
    def __call__(self, observations):
        features = MLP(self.hidden_dims)(observations)  # (B, H)
        mean = nn.Dense(self.action_dim, kernel_init=orthogonal)(features)  # (B, A)
        log_std = nn.Dense(self.action_dim, kernel_init=orthogonal)(features)  # (B, A)
        std = jnp.exp(jnp.clip(log_std, -10.0, 2.0))  # (B, A)
        gaussian = distrax.MultivariateNormalDiag(mean, std)
        return distrax.Transformed(gaussian, distrax.Block(distrax.Tanh(), 1))


def checkpoint_policy(arrays, meta, found, config):
    """A checkpoint's policy, of its first seed, as `policy(observation, step) -> action`, in the
    environment's units. Its network is the one here whose parameters have the same names and
    shapes."""
    prefix = "state/actor/params"
    saved = {name: x[0] for name, x in arrays.items() if name.startswith(f"{prefix}/")}
    names = [field.name for field in dataclasses.fields(Transform)]
    transform = Transform(**{name: arrays[f"transform/{name}"] for name in names})
    observations = jnp.zeros((1, len(transform.observation_mean)))  # (1, O)
    sizes = tuple(meta["config"]["hidden_dims"]), len(transform.action_center)
    for network in (GaussianPolicy(*sizes), TanhGaussianPolicy(*sizes)):
        template = network.init(jax.random.PRNGKey(0), observations)
        shapes = {name: x.shape for name, x in named_arrays(template, prefix).items()}
        if shapes == {name: x.shape for name, x in saved.items()}:
            break
    else:
        fail(f"{found}: the policy of {meta['script']}.py is neither of the two known here, "
             "GaussianPolicy and TanhGaussianPolicy")
    params, key = restore(template, saved, prefix, found), jax.random.PRNGKey(config.seed)

    @jax.jit
    def choose(observation, step):
        noise_key = jax.random.fold_in(key, step) if config.sampled else None
        return network_action(network, params, observation, noise_key)

    def policy(observation, step):
        action = np.asarray(choose(transform.observations(observation), step))
        return transform.environment_actions(action)

    return policy


def network_action(network, params, observation, key):
    """The action (A,) in one observation (O,) as the training scripts choose it: sampled, and
    without a key their deterministic one."""
    policy = network.apply(params, observation[None])
    if isinstance(network, GaussianPolicy):
        return policy.mean()[0] if key is None else jnp.clip(policy.sample(seed=key)[0], -1.0, 1.0)
    return jnp.tanh(policy.distribution.mean())[0] if key is None else policy.sample(seed=key)[0]


# ==================================== The same bytes in every script from here to main ============
# ------------------------------------------------------------------------------------------- Data


def fail(message, code=2):
    """End the program with one line on stderr. Codes: 2 input refused, 3 not finite, 4 disk."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(code)


def make_env(spec, **keywords):
    """The environment of a specification (JSON); dict observations flattened in sorted order."""
    env = gym.make(gym.envs.registration.EnvSpec.from_json(spec), **keywords)
    if isinstance(env.observation_space, gym.spaces.Dict):
        space = gym.spaces.Dict(dict(sorted(env.observation_space.items())))
        env = gym.wrappers.TransformObservation(env, lambda x: x, space)
        env = gym.wrappers.FlattenObservation(env)
    return env


ACTION_LIMIT = 1 - 1e-5  # of actions in batches: at 1 a squashed policy's density is not finite


@dataclasses.dataclass(frozen=True)
class Transform:
    """Between the data's and environment's units and the agent's. One object serves dataset,
    online data and evaluation, and is part of the checkpoint."""

    observation_mean: np.ndarray  # (O,)
    observation_std: np.ndarray  # (O,)
    action_center: np.ndarray  # (A,)
    action_scale: np.ndarray  # (A,)
    reward_scale: np.ndarray  # ()
    reward_shift: np.ndarray  # ()

    def observations(self, x):
        return ((x - self.observation_mean) / self.observation_std).astype(np.float32)

    def rewards(self, x):
        return (np.asarray(x) * self.reward_scale + self.reward_shift).astype(np.float32)

    def actions(self, x):
        """Data -> agent."""
        scaled = (x - self.action_center) / self.action_scale
        return np.clip(scaled, -ACTION_LIMIT, ACTION_LIMIT).astype(np.float32)

    def environment_actions(self, x):
        """Agent -> environment."""
        return (x * self.action_scale + self.action_center).astype(np.float32)


# ------------------------------------------------------------------------------------ Environments


def episode_seed(stream, seed, episode):
    """Reset seed of one episode; every episode has its own, so that any can be played again.
    `stream` keeps training (0), evaluation (1) and film (2) apart."""
    return int(np.random.SeedSequence((stream, seed, episode)).generate_state(1)[0])


REFERENCE_RETURNS = {  # random and expert return, from D4RL (Fu et al. 2020, its infos.py)
    "HalfCheetah-v4": (-280.178953, 12135.0),
    "Hopper-v4": (-20.272305, 3234.3),
    "Walker2d-v4": (1.629008, 4592.3),
    "Ant-v4": (-325.6, 3879.7),
    "AdroitHandDoor-v1": (-56.512833, 2880.5693087298737),
    "AdroitHandHammer-v1": (-274.856578, 12794.134825156867),
    "AdroitHandPen-v1": (96.262799, 3076.8331017826877),
    "AdroitHandRelocate-v1": (-6.425911, 4233.877797728884),
    "FrankaKitchen-v1": (0.0, 4.0),
}


def reference_returns(spec):
    """(random, expert) return of an environment, and where they are from; NaN where none is known.
    A sparse maze that ends at its goal has return 1 or 0: its score is the success rate."""
    spec = json.loads(spec)
    ends = not spec["kwargs"].get("continuing_task", True)
    if "Maze" in spec["id"] and ends and spec["kwargs"].get("reward_type") != "dense":
        return 0.0, 1.0, "success rate in percent"
    # D4RL's kitchen sets on Minari count every finished task again in each step: no such reference
    counted_again = not spec["kwargs"].get("remove_task_when_completed", True)
    if spec["id"] in REFERENCE_RETURNS and not counted_again:
        return *REFERENCE_RETURNS[spec["id"]], "D4RL's, 0 random, 100 expert"
    return np.nan, np.nan, "no reference known, returns are raw"


# -------------------------------------------------------------------------------------- Checkpoint


def named_arrays(tree, prefix):
    """{prefix/path/of/leaf: NumPy array} of a tree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    name = partial(jax.tree_util.keystr, simple=True, separator="/")
    return {f"{prefix}/{name(path)}": np.asarray(leaf) for path, leaf in leaves}


def restore(template, arrays, prefix, path):
    """A tree like `template` from the named arrays of the checkpoint read from `path`."""
    leaves, structure = jax.tree.flatten(template)
    for name, leaf in named_arrays(template, prefix).items():
        found = arrays[name].shape if name in arrays else "missing"
        if found != leaf.shape:
            fail(f"{path}: {name} is {found}, but this run needs {leaf.shape}")
    unused = {name for name in arrays if name.startswith(f"{prefix}/")}
    unused -= set(named_arrays(template, prefix))
    if unused:
        fail(f"{path}: {min(unused)} has no place in this run; another size of its networks?")
    return jax.tree.unflatten(structure, [arrays[name] for name in named_arrays(template, prefix)])


def load_checkpoint(path):
    """(arrays, meta, path read) of a checkpoint or a run folder. Every byte is checked (the zip's
    CRC-32); for a damaged or missing file the one before is taken, with a warning."""
    path = Path(path) / "checkpoint.npz" if Path(path).is_dir() else Path(path)
    warnings = []
    for candidate in (path, path.with_suffix(".previous.npz")):
        try:
            with np.load(candidate, allow_pickle=False) as file:
                if file.zip.testzip():  # NumPy reads, and checks, only as far as a header says
                    raise ValueError("wrong checksum")
                arrays = {name: file[name] for name in file.files}
            meta = json.loads(arrays.pop("meta").tobytes())
            if meta["arrays"] != sorted(arrays):
                raise ValueError("arrays are missing")
        except Exception as error:  # a damaged file fails in many ways
            warnings.append(f"warning: {candidate}: {type(error).__name__}: {error}")
        else:
            for warning in warnings:
                print(warning, file=sys.stderr)
            return arrays, meta, candidate
    return fail(f"{path}: no readable checkpoint")


def available_cores():
    """How many cores this process may use; of how many, XLA's last digits depend."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def versions(script, dataset, init_from=None):
    """What makes a run: command, code, data, packages, machine."""

    def git(*words):
        command = ["git", "-C", str(script.resolve().parent), *words]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            return done.stdout.strip()
        except (OSError, subprocess.CalledProcessError):  # no git, or no repository
            return None

    def sha256(file):
        return hashlib.sha256(file.read_bytes()).hexdigest()

    data = dataset / "main_data.hdf5" if dataset and dataset.is_dir() else dataset
    agent = init_from and Path(init_from)
    agent = agent / "checkpoint.npz" if agent and agent.is_dir() else agent
    found = importlib.metadata.distributions()
    packages = {d.metadata["Name"].lower(): d.version for d in found if d.metadata["Name"]}
    settings = {k: v for k, v in os.environ.items() if k.startswith(("JAX_", "XLA_", "OMP_"))}
    return {
        "command": sys.argv, "script": script.name, "script_sha256": sha256(script),
        "git_commit": git("rev-parse", "HEAD"),
        "git_status": git("status", "--porcelain", "--", script.name),  # not empty: changed since
        "dataset": str(dataset), "dataset_sha256": sha256(data) if data else None,
        "python": platform.python_version(), "machine": platform.platform(),
        "cores": available_cores(), "device": jax.devices()[0].device_kind,
        "init_from_sha256": sha256(agent) if agent and agent.is_file() else None,
        "environment_variables": settings, "packages": packages,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


# ---------------------------------------------------------------------------------------- Dataset


def episode_buffer(observations, actions, rewards, terminations, truncations):
    """One Minari episode: observations (T + 1, O), the rest (T, ...)."""
    return minari.data_collector.EpisodeBuffer(
        observations=observations, actions=actions, rewards=np.asarray(rewards, np.float32),
        terminations=terminations, truncations=truncations,
    )


def policy_episodes(env, policy, num_steps, seed):
    """Episodes of `policy(observation (O,), step) -> action (A,)`, of `num_steps` or a few more."""
    steps, episode = 0, 0
    while steps < num_steps:
        observation, _ = env.reset(seed=episode_seed(3, seed, episode))
        observations, rest, ended = [observation], [], False
        while not ended:
            action = policy(observation, steps)
            observation, reward, terminated, truncated, _ = env.step(action)
            observations.append(observation)
            rest.append((action, reward, terminated, truncated))
            ended, steps = terminated or truncated, steps + 1
        yield episode_buffer(np.array(observations), *map(np.array, zip(*rest, strict=True)))
        episode += 1


def write_dataset(name, episodes, env, eval_env, algorithm, description):
    """Write a Minari dataset with provenance, versions, reference returns and two environments:
    `env`, which the episodes are from, and `eval_env`, where agents train and are scored.

    Its HDF5 file is packed afterwards (compressed, small headers): a third of the size.
    """
    episodes, spec = list(episodes), eval_env.spec.to_json()
    eval_env.action_space.seed(0)
    uniform = policy_episodes(make_env(spec), lambda *_: eval_env.action_space.sample(), 10_000, 0)
    random = float(np.mean([episode.rewards.sum() for episode in uniform]))
    low, high, source = reference_returns(spec)
    packages = ["gymnasium", "mujoco", "minari"]
    packages += ["gymnasium-robotics"] if "gymnasium_robotics" in spec else []
    dataset = minari.create_dataset_from_buffers(
        name, episodes, env=env, eval_env=eval_env, algorithm_name=algorithm,
        description=description, author="offline-to-online reference implementations",
        author_email="none",
        code_permalink=f"{Path(__file__).name}, git {versions(Path(__file__), None)['git_commit']}",
        requirements=[f"{package}=={importlib.metadata.version(package)}" for package in packages],
    )
    file = Path(dataset.storage.data_path) / "main_data.hdf5"
    pack(file)
    known = {} if np.isnan(high) else {"ref_max_score": high}
    known |= {"ref_min_score": random, "dataset_size": dataset.storage.get_size()}
    dataset.storage.update_metadata(known)
    returns = np.array([episode.rewards.sum() for episode in episodes])
    score = "" if np.isnan(high) else f", score {100 * (returns.mean() - low) / (high - low):.1f}"
    print(f"dataset   {name}: {sum(len(e.rewards) for e in episodes):,} steps, {len(episodes)} "
          f"episodes, return {returns.mean():.1f} ({returns.min():.1f} ... {returns.max():.1f})"
          f"{score} ({source}), {file.stat().st_size / 1e6:.1f} MB; a random policy's return "
          f"{random:.1f}")


def pack(path):
    """Rewrite an HDF5 file with compressed datasets, checksums and compact groups, in place."""
    packed = path.with_suffix(".packed")
    with h5py.File(path, "r") as old, h5py.File(packed, "w", libver="latest") as new:
        new.attrs.update(old.attrs)

        def copy(name, item):
            if isinstance(item, h5py.Dataset):
                options = {"compression": "gzip", "shuffle": True, "fletcher32": True}
                new.create_dataset(name, data=item[()], **options if item.shape else {})
            else:
                new.require_group(name).attrs.update(item.attrs)

        old.visititems(copy)
    os.replace(packed, path)


def check_new_dataset(flag, name):
    """Refuse a dataset id that Minari would not write, before the work is done."""
    try:
        parse_dataset_id(name)
    except (ValueError, TypeError):  # TypeError: Minari's, where the version is missing
        fail(f"{flag} {name}: not a Minari id, which has the form group/name-v0")
    folder = Path(minari.storage.get_dataset_path(name))
    if folder.exists():
        fail(f"{flag} {name}: exists, in {folder}; another id, or first `minari delete {name}`")


# -------------------------------------------------------------------------------------------- main


def check_request(config):
    """Refuse what cannot be made before anything is built. Returns the dataset's id."""
    for name, (low, high) in RANGES.items():
        if not low <= getattr(config, name) <= high:
            flag = f"--{name.replace('_', '-')}"
            fail(f"{flag} {getattr(config, name)}: must be in [{low}, {high}]")
    if (config.maze is None) == (config.checkpoint is None):
        fail("either --maze or --checkpoint is needed, for example --maze umaze")
    if config.maze is not None and config.maze not in MAZES:
        fail(f"--maze {config.maze}: must be one of {', '.join(MAZES)}")
    if config.maze is not None and importlib.util.find_spec("gymnasium_robotics") is None:
        fail("--maze needs a package: pip install gymnasium-robotics==1.4.2")
    if config.checkpoint is not None and config.dataset_id is None:
        fail("--checkpoint needs --dataset-id, for example --dataset-id hopper/sac-expert-v0")
    dataset_id = config.dataset_id or f"pointmaze/{config.maze}-v0"
    check_new_dataset("--dataset-id", dataset_id)
    return dataset_id


def with_progress(episodes, num_steps):
    """The same episodes, with a progress bar of their steps."""
    with tqdm(total=num_steps, unit=" steps", disable=None) as bar:
        for episode in episodes:
            bar.update(len(episode.rewards))
            yield episode


def main(arguments=None):
    gym.logger.min_level = gym.logger.ERROR  # no warnings that a -v4 environment is not the newest
    config = tyro.cli(Config, args=arguments, description=__doc__)
    dataset_id = check_request(config)
    if config.maze is not None:
        env, eval_env = maze_environments(config.maze)
        episodes = maze_episodes(env, MAZES[config.maze][2], config)
        algorithm = f"D4RL's waypoint controller, breadth-first plan, action noise {config.noise}"
        about = (f"PointMaze {config.maze}, D4RL recipe: random starts, {GOAL_SHARE:.0%} of the "
                 "goals in the evaluation's cell; sparse 0/1 reward, terminal at the goal")
    else:
        arrays, meta, found = load_checkpoint(config.checkpoint)
        try:
            env = eval_env = make_env(meta["spec"])
        except (gym.error.Error, ImportError) as error:
            fail(f"{found}: no environment: {' '.join(str(error).split())}")
        policy = checkpoint_policy(arrays, meta, found, config)
        episodes = policy_episodes(env, policy, config.num_steps, config.seed)
        kind = "sampled" if config.sampled else "deterministic"
        algorithm = f"policy of {meta['script']}.py, {kind}"
        about = (f"{found}, seed {meta['config']['seed']}, after {meta['offline']:,} offline "
                 f"updates and {meta['online']:,} online steps")
    about = f"{about}; collected with seed {config.seed}: {' '.join(sys.argv)}"
    episodes = with_progress(episodes, config.num_steps)
    write_dataset(dataset_id, episodes, env, eval_env, algorithm, about)


if __name__ == "__main__":
    main()
