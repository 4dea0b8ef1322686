"""Collect: make, convert and check the datasets that the other scripts train on, all Minari's.

The training scripts trust a dataset; this is where it is doubted. Every row is checked for what
spoils training in silence: missing steps, values that are not finite, actions outside the box,
sizes that do not fit the environment (and time limits called terminations: a warning). A refusal
is one line: the field, the row and what helps.

    python baselines/collect.py convert hopper.hdf5 --env-id Hopper-v4 --id mine/hopper-v0
    python baselines/collect.py check mine/hopper-v0
    python baselines/collect.py goals D4RL/antmaze/umaze-v1 --id mine/umaze-v0
    python baselines/collect.py pointmaze umaze --steps 300000
    python baselines/collect.py ogbench cube-single --steps 20000
    python baselines/collect.py rollout runs/iql/mine/hopper-v0/seed0 --steps 10000 --id mine/iql-v0
    python baselines/collect.py replay runs/sac/Hopper-v5/seed0 --id mine/replay-v0

`convert` reads D4RL's keys. Actions that use the environment's box are written in [-1, 1], with
RescaleAction around the environment; if all lie in [-1, 1] inside a larger box, they stay. A row
whose next observation is not in the file, at a time limit, is dropped; at a termination it counts
as unchanged. D4RL's antmaze (29 numbers) is shifted into AntMaze_*-v5, turned, with its torques and
time step (10 of 0.01 s, there 5 of 0.02), a goal radius of 0.45 (0.5), starts and goals all around
their cells' centres; its rows at the goal, where the ant walks on, are an episode each. In
today's Adroit the palm's distance has the sign opposite to D4RL's files and reference returns.

`pointmaze` follows D4RL's maze2d: a point mass is steered to random goals, by a PD controller on
the shortest path from cell to cell, with noise on its actions (D4RL's option --noisy).

    Fu et al.: D4RL: Datasets for Deep Data-Driven Reinforcement Learning, arXiv 2004.07219

    action = 10 * (waypoint - position) - velocity + noise * N(0, 1), clipped to the box;
    a waypoint is passed within 0.1 of it, the last one is the goal itself (D4RL: its cell's centre)

Training and evaluation happen in a maze with one start and one goal cell, those of D4RL's antmaze:
an episode ends at the goal with reward 1, so that the score is the success rate. Start and goal
are up to a quarter of a cell off their cell's centre, in the data as in the evaluation.

Deviations from D4RL's maze2d sets (scripts/generation/generate_maze2d_datasets.py):
 1. An episode ends at its goal, which the observation contains. In maze2d nothing
    ends: the ball rolls on from goal to goal, and the observation does not say where they are.
 2. 30 % of the goals are in the evaluation's goal cell; the others are uniform over the free
    cells, as all are in maze2d.
 3. Gymnasium-Robotics' PointMaze: its goal radius is 0.45 and the offset above 0.25, not 0.5, 0.1.
 4. Breadth-first search plans paths of the same lengths, over cells' centres (D4RL: up to 0.2 off).

`ogbench` regenerates data by OGBench's recipe with the oracles of its package: scripted grasps, or
in mazes the way from cell to cell, walked by a point or by an ant that sac.py has trained, with
noise. Rewards are those of one task: minus the number of things not in place, in the state before
the action; a step from a state in which all are is a termination, though the recording goes on.

    Park, Frans, Eysenbach, Levine: OGBench, arXiv 2410.20092; its package 1.2.2, data_gen_scripts

Deviations: 1,001 steps of a recording, not 1,000; the walker, in runs/ogbench-walker, is our SAC
(ReLU, initialisation, updates in turn, log-std from -10).
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "jax==0.10.2", "flax==0.12.8", "optax==0.2.8", "distrax==0.1.9", "numpy==2.4.6",
#   "tfp-nightly==0.26.0.dev20261027", "gymnasium[mujoco]==1.4.0", "gymnasium-robotics==1.4.2",
#   "mujoco==3.11.0", "minari[hdf5,hf]==0.5.4", "tyro==1.0.16", "tqdm==4.70.1", "h5py==3.16.0",
#   "ogbench==1.2.2", "dm_control==1.0.44",
# ]
# ///
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import gymnasium as gym
import h5py
import minari
import numpy as np
import tyro
from minari.dataset.minari_dataset import parse_dataset_id
from tqdm import tqdm
from tyro.conf import Positional

HERE = Path(__file__).resolve().parent


# ---------------------------------------------------------------------------------------- Commands
@dataclasses.dataclass(frozen=True)
class Convert:
    """A .hdf5 or .npz file with D4RL's keys -> a Minari dataset."""

    file: Positional[Path]  # observations, actions, rewards, terminals, timeouts ...
    env_id: str  # Gymnasium id of the environment that the data are from
    id: str  # Minari id to write, for example mine/hopper-medium-v0
    force: bool = False  # delete an existing dataset of this id


@dataclasses.dataclass(frozen=True)
class Check:
    """Doubt a Minari dataset on this machine, and say what is in it."""

    id: Positional[str]  # looked up in baselines/datasets, then in Minari's folder
    env_id: str = ""  # Gymnasium id; default: the dataset's evaluation environment
    write_reference: bool = False  # add D4RL's reference returns to its metadata


@dataclasses.dataclass(frozen=True)
class Goals:
    """End the episodes of a Minari dataset at the goal, where its environment goes on."""

    source: Positional[str]  # for example D4RL/antmaze/umaze-v1
    id: str  # Minari id to write
    force: bool = False  # delete an existing dataset of this id


@dataclasses.dataclass(frozen=True)
class Pointmaze:
    """A point mass, steered to random goals in a maze, as in D4RL's maze2d."""

    maze: Positional[Literal["umaze", "medium", "large"]]  # which one
    steps: int = 300_000  # environment steps, and what the last episode still needs
    seed: int = 0  # of starts, goals and noise
    noise: float = 0.5  # standard deviation on each action; the box is [-1, 1]
    id: str = ""  # Minari id to write; default: pointmaze/<maze>-v0
    force: bool = False  # delete an existing dataset of this id


@dataclasses.dataclass(frozen=True)
class Ogbench:
    """OGBench's recipe: its oracles play in its worlds, and one task's rewards are put on it."""

    world: Positional[
        Literal["cube-single", "cube-double", "scene", "puzzle-3x3", "pointmaze-medium",
                "antmaze-medium"]
    ]  # fmt: skip
    task: int = 0  # 1 ... 5; default: OGBench's
    type: Literal["", "play", "navigate"] = ""  # play, or in mazes navigate, which is all there is
    steps: int = 1_000_000  # environment steps, and what the last recording still needs
    seed: int = 0  # of starts, goals and noise
    processes: int = 0  # that play at once, to the same data; default: one per core
    walker: Path = Path("runs/ogbench-walker")  # antmaze: run of sac.py; trained if not finished
    walker_steps: int = 400_000  # environment steps that the walker has been trained for
    id: str = ""  # Minari id to write; default: ogbench/<world>-<type>-task<task>-v0
    force: bool = False  # delete an existing dataset of this id


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Episodes of a run's policy, of its first seed."""

    run: Positional[Path]  # folder of a run of one of the scripts
    id: str  # Minari id to write
    steps: int = 10_000  # environment steps, and what the last episode still needs
    seed: int = 0  # of starts and samples
    sampled: bool = False  # the training policy; default: the deterministic one
    force: bool = False  # delete an existing dataset of this id


@dataclasses.dataclass(frozen=True)
class Replay:
    """What a run has seen online: the replay buffer in its checkpoint, of its first seed."""

    run: Positional[Path]  # folder of a run of one of the scripts
    id: str  # Minari id to write
    steps: int = 0  # only the oldest so many; default: all
    share: float = 1.0  # only what came before an evaluation with this share of the last return
    force: bool = False  # delete an existing dataset of this id


def fail(message):
    """End the program with one line on stderr and exit code 2."""
    print(f"collect.py: error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def warn(message):
    print(f"warning: {message}", file=sys.stderr)


def sha256(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


# ------------------------------------------------------------------------------------ Environments
REFERENCE = ("ref_min_score", "ref_max_score")  # in a dataset's metadata
REFERENCE_RETURNS = {  # random and expert, from D4RL's infos.py; not Pen, twice as long here
    "HalfCheetah-v4": (-280.178953, 12135.0),
    "Hopper-v4": (-20.272305, 3234.3),
    "Walker2d-v4": (1.629008, 4592.3),
    "Ant-v4": (-325.6, 3879.7),
    "AdroitHandDoor-v1": (-56.512833, 2880.5693087298737),
    "AdroitHandHammer-v1": (-274.856578, 12794.134825156867),
    "AdroitHandRelocate-v1": (-6.425911, 4233.877797728884),
    "FrankaKitchen-v1": (0.0, 4.0),
}


def reference_returns(spec):
    """(random, expert) return of an environment's specification, or None where D4RL has none.
    A sparse maze that ends at its goal has return 1 or 0: its score is the success rate."""
    ends = not spec.kwargs.get("continuing_task", True)
    if "Maze" in spec.id and ends and spec.kwargs.get("reward_type") != "dense":
        return 0.0, 1.0
    # D4RL's kitchen sets on Minari count every finished task again in each step: no such reference
    if not spec.kwargs.get("remove_task_when_completed", True):
        return None
    name, _, version = spec.id.rpartition("-v")  # -v2 and -v3 are the same task as -v4
    return REFERENCE_RETURNS.get(f"{name}-v4" if version in ("2", "3") else spec.id)


def make_environment(make, *arguments, **keywords):
    """The environment of `make(*arguments, **keywords)`; refused in one line if there is none."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # Gymnasium-Robotics gives advice there
            if arguments and arguments[0] not in gym.registry:
                gym.register_envs(importlib.import_module("gymnasium_robotics"))
            return make(*arguments, **keywords)
    except Exception as error:  # unknown, moved, or a package is missing
        hint = "; pip install gymnasium-robotics==1.4.2" if "robotics" in str(error) else ""
        return fail(f"no environment: {error}{hint}")


def flat_environment(env):
    """The environment with flat observations, by a wrapper that its specification records."""
    is_dict = isinstance(env.observation_space, gym.spaces.Dict)
    return gym.wrappers.FlattenObservation(env) if is_dict else env


def check_spaces(observation_space, action_space, name):
    """Refuse what the scripts cannot learn from: images, discrete or unbounded actions."""

    def vector(space):
        if isinstance(space, gym.spaces.Dict):
            return all(map(vector, space.values()))
        box = isinstance(space, gym.spaces.Box) and len(space.shape) == 1
        return box and space.dtype != np.uint8

    def in_order(space):
        is_dict = isinstance(space, gym.spaces.Dict)
        return not is_dict or list(space) == sorted(space) and all(map(in_order, space.values()))

    if not vector(observation_space):
        fail(f"{name}: observations are {observation_space}; only vectors are supported, no images")
    if not in_order(observation_space):
        keys = list(observation_space)
        fail(f"{name}: the observations' keys {keys} are not sorted, as the scripts sort them")
    bounded = isinstance(action_space, gym.spaces.Box) and action_space.is_bounded()
    if not bounded or not vector(action_space):
        fail(f"{name}: actions are {action_space}; only bounded vectors are supported")


# ------------------------------------------------------------------------------------------ Checks
def leaves(observations):
    """The arrays in nested dicts, in sorted order, as FlattenObservation and JAX have it."""
    if not isinstance(observations, dict):
        return [np.asarray(observations)]
    return [leaf for key in sorted(observations) for leaf in leaves(observations[key])]


def flatten(observations):
    """Nested dicts of (T, ...) arrays -> (T, O)."""
    parts = [x.reshape(len(x), -1) for x in leaves(observations)]
    return np.concatenate(parts, axis=1, dtype=np.float32)


def check_rows(fields, env, source, row="row"):
    """Refuse rows of the wrong size, not finite or outside the box, naming field and row."""
    name, box, size = env.spec.id, env.action_space, gym.spaces.flatdim(env.observation_space)
    shapes = {"observations": (size,), "next_observations": (size,), "actions": box.shape}
    for field, values in fields.items():
        found, needed = values.shape[1:], shapes.get(field, ())
        if found != needed:
            words = f"{field} have shape {found} per step, but {name} needs {needed}"
            fail(f"{source}: {words}: are they another environment's? (--env-id)")
        bad = ~np.isfinite(values).reshape(len(values), -1).all(axis=1)
        if bad.any():
            words = f"{field} are not finite in {bad.sum()} of {len(bad)} rows"
            fail(f"{source}: {words}, first in {row} {bad.argmax()}; end an episode before it")
    low, high = box.low - 1e-3, box.high + 1e-3
    outside = ((fields["actions"] < low) | (fields["actions"] > high)).any(axis=1)
    if outside.any():
        words = f"{outside.sum()} actions outside {name}'s box, first in {row} {outside.argmax()}"
        fail(f"{source}: {words}; clip them, or name their environment (--env-id)")


def check_episodes(episodes, env, source):
    """Refuse Minari episodes that no script should learn from, naming field, episode and step."""
    box = env.action_space
    check_spaces(env.observation_space, box, env.spec.id)
    if (box.low != -box.high).any():
        words = f"{env.spec.id}'s box of actions is not symmetric, {box}"
        fail(f"{source}: {words}; write actions in [-1, 1], with RescaleAction around it")
    if not episodes:
        fail(f"{source}: no episodes; collect or fetch it again")
    for number, episode in enumerate(episodes):
        words, steps = f"{source}: episode {number}", len(episode.rewards)
        if steps == 0:
            fail(f"{words}: no steps; write the dataset without it")
        names = ("actions", "rewards", "terminations", "truncations")
        fields = {name: np.asarray(getattr(episode, name), np.float32) for name in names}
        lengths = [(name, len(x), steps) for name, x in fields.items()]
        lengths += [("observations", len(x), steps + 1) for x in leaves(episode.observations)]
        for name, found, needed in lengths:
            if found != needed:
                words = f"{words}: {found} {name} beside {steps} rewards, {needed} are needed"
                fail(f"{words} (Minari's issue 199, if it is one observation); write it anew")
        fields["observations"] = flatten(episode.observations)  # (T + 1, O)
        check_rows(fields, env, words, "step")


def summarize(source, episodes, env, reference):
    """What is in a dataset that has passed the checks, and what looks wrong all the same."""
    lengths = np.array([len(episode.rewards) for episode in episodes])
    returns = np.array([np.sum(episode.rewards, dtype=np.float64) for episode in episodes])
    discounted = [np.polynomial.polynomial.polyval(0.99, episode.rewards) for episode in episodes]
    terminated = np.array([episode.terminations[-1] for episode in episodes], bool)
    truncated = np.array([episode.truncations[-1] for episode in episodes], bool) & ~terminated
    shares = {"termination": terminated, "time limit": truncated}
    shares |= {"neither": ~terminated & ~truncated}
    ends = ", ".join(f"{x.sum():,} ({x.mean():.0%}) by {name}" for name, x in shares.items())
    largest = max(np.abs(episode.actions).max() for episode in episodes)
    as_they_are = largest <= 1 + 1e-3 and (env.action_space.high >= 1).all()
    use = "taken as they are" if as_they_are else "divided by the box's bound"
    returned = f"mean {returns.mean():.1f}, min {returns.min():.1f}, max {returns.max():.1f}"
    print(f"{source}: {env.spec.id}, {len(episodes):,} episodes, {lengths.sum():,} steps")
    print(f"  return      {returned}; discounted by 0.99: mean {np.mean(discounted):.1f}")
    print(f"  ends        {ends}; lengths {lengths.min():,} to {lengths.max():,}")
    print(f"  actions     up to {largest:.3g}, {use} by the scripts")
    if reference:
        low, high = reference
        reached = np.array([episode.terminations.any() for episode in episodes]) | (returns > 0)
        measure = reached if (low, high) == (0, 1) else returns  # as the scripts' evaluation
        score = 100 * (measure.mean() - low) / (high - low)
        print(f"  reference   {low:g} random, {high:g} expert: mean score {score:.1f}")
    else:
        print("  reference   none: scripts report raw returns")
    at_limit = lengths == env.spec.max_episode_steps
    if at_limit.any() and terminated[at_limit].all():
        words = f"all {at_limit.sum()} episodes of the time limit's {lengths.max()} steps end by"
        warn(f"{words} termination: are these timeouts, not terminals?")
    early = sum(int(np.sum(episode.terminations[:-1])) for episode in episodes)
    if early:
        warn(f"{early} terminations stand before an episode's last step; scripts end it at each")
    if np.ptp(returns) < 1e-6 and "Maze" not in env.spec.id:
        warn("all returns are equal: nothing for --normalize-returns")


# ------------------------------------------------------------------------------------- D4RL's files
FLOATS = ("observations", "actions", "rewards", "next_observations")
FIELDS = ("observations", "actions", "rewards", "terminals")
FIELDS += ("timeouts", "next_observations", "seg_end_index", "seg_end_next_observations")


def read_fields(file):
    """{key: array} of a file's known keys."""
    if file.suffix not in (".npz", ".hdf5", ".h5"):
        fail(f"{file}: neither .hdf5 nor .npz; for a Minari dataset there is `collect.py check`")
    if not file.is_file():
        fail(f"{file}: no such file")
    try:
        with np.load(file) if file.suffix == ".npz" else h5py.File(file, "r") as content:
            if file.suffix == ".npz" and content.zip.testzip():
                raise ValueError("wrong checksum")
            return {name: content[name][()] for name in FIELDS if name in content}
    except Exception as error:  # a damaged file fails in many ways
        fault = f"{type(error).__name__}: {error}"
        return fail(f"{file}: unreadable ({fault}): damaged or cut off? Fetch it again")


def check_fields(fields, file):
    """Refuse a file whose fields are missing or do not fit each other."""
    if missing := [name for name in FIELDS[:4] if name not in fields]:
        fail(f"{file}: no {', '.join(missing)}; D4RL's keys are needed, found {list(fields)}")
    if not {"timeouts", "next_observations", "seg_end_index"} & set(fields):
        fail(f"{file}: neither timeouts nor next_observations: where do the episodes end?")
    for name, values in fields.items():
        if values.dtype.kind not in "fiub":
            fail(f"{file}: {name} are of type {values.dtype}, but numbers are needed")
    rows = fields["rewards"].size
    if rows == 0:
        fail(f"{file}: empty, rewards have no rows")
    ends = fields.get("seg_end_index", np.zeros(0, int))
    shapes = {"rewards": (rows,), "terminals": (rows,), "timeouts": (rows,)}
    shapes["actions"] = (rows, *fields["actions"].shape[1:])
    shapes["observations"] = (rows, *fields["observations"].shape[1:])
    shapes["next_observations"] = shapes["observations"]
    shapes["seg_end_next_observations"] = (ends.size, *shapes["observations"][1:])
    for name, shape in shapes.items():
        found = fields[name].shape if name in fields else shape
        if found not in (shape, (*shape, 1)):
            fail(f"{file}: {name} have shape {found}, but {shape} is needed beside {rows} rewards")
    for name in {"terminals", "timeouts"} & set(fields):
        bad = ~np.isin(fields[name].reshape(-1), (0, 1))
        if bad.any():
            words = f"{bad.sum()} {name} neither 0 nor 1, first in row {bad.argmax()}"
            fail(f"{file}: {words}; 1 marks the last row of an episode")
    if not np.isin(ends, np.arange(rows)).all():
        fail(f"{file}: seg_end_index has values that are no rows, of which there are {rows}")


def read_flat_file(file):
    """The rows of a file with D4RL's keys: observations (N, O), actions (N, A), rewards,
    next_observations, terminals (true terminations), ends (last row of an episode, for whatever
    reason), known (False where the next observation is not in the file)."""
    fields = read_fields(file)
    check_fields(fields, file)
    ends = fields["terminals"].reshape(-1).astype(bool)
    rows = {name: fields[name].astype(np.float32) for name in FLOATS if name in fields}
    rows |= {"rewards": rows["rewards"].reshape(-1), "terminals": ends.copy()}
    observations, segments = rows["observations"], fields.get("seg_end_index", np.zeros(0, int))
    ends |= fields.get("timeouts", ends).reshape(-1).astype(bool)
    ends[segments.reshape(-1)] = True
    ends[-1] = True
    if "next_observations" in rows:
        jump = np.abs(observations[1:] - rows["next_observations"][:-1]) > 1e-6
        ends[:-1] |= jump.any(axis=tuple(range(1, jump.ndim)))
        known = np.ones(len(ends), bool)
    else:  # the next row, except at an end: there the file may give it, else it is unknown
        following = np.concatenate([observations[1:], observations[-1:]])
        following[ends] = observations[ends]  # a stand-in, which no value is learnt from
        known = rows["terminals"] | ~ends
        if "seg_end_next_observations" in fields:
            following[segments.reshape(-1)] = fields["seg_end_next_observations"]
            known[segments.reshape(-1)] = True
        rows["next_observations"] = following
    return rows | {"ends": ends, "known": known}


def split_episodes(rows):
    """Minari episodes of flat rows; at an end without a known next observation a row is lost."""
    first = 0
    for last in np.flatnonzero(rows["ends"]):
        part = slice(first, last + rows["known"][last])
        first = last + 1
        if part.start == part.stop:
            continue
        own = {name: x[part] for name, x in rows.items()}
        observations = np.concatenate([own["observations"], own["next_observations"][-1:]])
        yield episode_buffer(observations, own["actions"], own["rewards"], own["terminals"])


def unit_actions(env, actions):
    """Environment and actions so that the agent's [-1, 1] is theirs: unchanged where the data lie
    in [-1, 1] and the box contains it (some mazes use a part of theirs), else both rescaled."""
    low, high = env.action_space.low, env.action_space.high
    if (low == -high).all() and (high >= 1).all() and np.abs(actions).max() <= 1 + 1e-3:
        return env, actions
    scaled = (actions - (high + low) / 2) / ((high - low) / 2)
    return gym.wrappers.RescaleAction(env, -1.0, 1.0), np.clip(scaled, -1, 1).astype(np.float32)


def d4rl_antmaze(env_id):
    """D4RL's antmaze in Gymnasium-Robotics, and where D4RL's origin, its start, lies in it. There
    y grows with the map's rows, here it falls: the map is turned upside down. Observations have no
    goal; actions in [-1, 1] are a fifth of the torques here; a step lasts 0.1 s."""
    name = env_id.partition("_")[2].partition("-")[0].lower()
    if name not in MAZES or not env_id.endswith("-v5"):
        fail(f"--env-id {env_id}: D4RL's antmaze needs AntMaze_UMaze-v5, _Medium-v5 or _Large-v5")
    _, start, goal = MAZES[name]
    maze = make_environment(gym.make, env_id).unwrapped.maze
    upside_down = marked_map(maze.maze_map, start, goal)[::-1]
    keywords = {"frame_skip": 10, "include_cfrc_ext_in_observation": False}
    env = gym.make(env_id, maze_map=upside_down, continuing_task=False, **keywords)
    env = gym.wrappers.FilterObservation(env, ["achieved_goal", "observation"])
    env = gym.wrappers.RescaleAction(gym.wrappers.FlattenObservation(env), -5.0, 5.0)
    origin = maze.cell_rowcol_to_xy((maze.map_length - 1 - start[0], start[1]))  # (2,)
    return env, origin


def convert(request):
    """The Minari dataset of a file with D4RL's keys."""
    file, source = request.file, str(request.file)
    check_new_id(request)
    rows = read_flat_file(file)
    env = make_environment(gym.make, request.env_id)
    check_spaces(env.observation_space, env.action_space, env.spec.id)
    env = flat_environment(env)
    if "AntMaze" in request.env_id and rows["observations"].shape[1:] == (29,):
        env, origin = d4rl_antmaze(request.env_id)
        jump = np.linalg.norm(np.diff(rows["observations"][:, :2], axis=0), axis=1) > 1  # 10 m/s
        lost = np.append(jump, False) & ~rows["ends"]  # D4RL's issue 77: timeouts beside the ends
        rows["ends"], rows["known"] = rows["ends"] | lost, rows["known"] & ~lost
        for name in ("observations", "next_observations"):
            rows[name][:, :2] += origin
    check_rows({name: rows[name] for name in FLOATS}, env, source)
    env, rows["actions"] = unit_actions(env, rows["actions"])
    episodes = list(split_episodes(rows))
    if not episodes:
        fail(f"{source}: no row's next observation is known: add next_observations")
    about = f"converted from {file.name}, sha256 {sha256(file)}"
    write_dataset(request, episodes, env, env, "unknown", about)
    lost, all_lost = (~rows["known"]).sum(), rows["ends"].sum() - len(episodes)
    if lost:
        words = f"{lost:,} rows whose next observation is not in the file"
        print(f"  dropped     {words}, and with them {all_lost:,} episodes of one step")


# --------------------------------------------------------------------------------- Minari datasets
def check_new_id(request):
    """Refuse a dataset id that cannot be written, before any work is done."""
    try:
        parse_dataset_id(request.id)
    except (ValueError, TypeError):  # TypeError: Minari's, where the version is missing
        fail(f"--id {request.id}: not a Minari id, which has the form group/name-v0")
    if (HERE / "datasets" / request.id).exists():
        fail(f"--id {request.id}: the dataset in baselines/datasets goes before it; another id")
    folder = minari.storage.get_dataset_path(request.id)
    if folder.exists() and not request.force:
        words = f"--id {request.id}: exists, in {folder}"
        fail(f"{words}; another id, --force, or first `minari delete {request.id}`")


def episode_buffer(observations, actions, rewards, terminations):
    """One Minari episode: observations (T + 1, O), the rest (T, ...). What does not end by a
    termination is truncated."""
    terminations = np.asarray(terminations, bool)
    last = np.arange(len(terminations)) == len(terminations) - 1
    return minari.data_collector.EpisodeBuffer(
        observations=observations,
        actions=np.asarray(actions, np.float32),
        rewards=np.asarray(rewards, np.float32),
        terminations=terminations,
        truncations=last & ~terminations,
    )


def write_dataset(request, episodes, env, eval_env, algorithm, description, reference=None):
    """Check and write a Minari dataset, with reference returns and two environments: `env`, which
    the episodes are from, and `eval_env`, where agents train and are scored."""
    check_episodes(episodes, eval_env, request.id)
    reference = reference_returns(eval_env.spec) or reference
    spec, packages = eval_env.spec.to_json(), ["gymnasium", "mujoco", "minari"]
    packages += [x for x in ("gymnasium-robotics", "ogbench") if x.replace("-", "_") in spec]
    folder = minari.storage.get_dataset_path(request.id)
    if folder.exists():  # and --force is given
        shutil.rmtree(folder)
    try:
        dataset = minari.create_dataset_from_buffers(
            request.id,
            episodes,
            env=env,
            eval_env=eval_env,
            algorithm_name=algorithm,
            description=description,
            author="offline-to-online reference implementations",
            author_email="none",
            code_permalink=f"collect.py, sha256 {sha256(Path(__file__))}",
            requirements=[f"{name}=={importlib.metadata.version(name)}" for name in packages],
        )
        pack(dataset.storage.data_path / "main_data.hdf5")
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        fail(f"{folder}: cannot be written ({error.strerror or error})")
    dataset.storage.update_metadata({"dataset_size": dataset.storage.get_size()})
    write_reference(dataset, reference)
    summarize(request.id, episodes, eval_env, reference)


def write_reference(dataset, reference):
    """Reference returns into a dataset's metadata, where scripts look for them."""
    if reference:
        dataset.storage.update_metadata(dict(zip(REFERENCE, reference, strict=True)))


def pack(path):
    """Rewrite an HDF5 file in place, compressed and with checksums: a third of its size, and the
    same bytes for the same episodes."""
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


def open_dataset(name):
    """The Minari dataset of an id, where the scripts look for it, and its episodes."""
    try:
        parse_dataset_id(name)
    except (ValueError, TypeError):
        fail(f"{name}: not a Minari id; for a file there is `collect.py convert`")
    local, folder = minari.storage.get_dataset_path(name), HERE / "datasets" / name / "data"
    folder = folder if folder.exists() else local / "data"
    if not local.exists() and not folder.exists():
        fail(f"{name}: not on this machine; `minari download {name}`, or see collect.py --help")
    again = f"`minari download {name} --force`, or minari.download_dataset(id, force_download=True)"
    if not all((folder / file).is_file() for file in ("metadata.json", "main_data.hdf5")):
        words = f"{folder} has no metadata.json or no main_data.hdf5, an interrupted download?"
        fail(f"{name}: {words} {again}")
    try:
        dataset = minari.MinariDataset(folder)
        check_spaces(dataset.observation_space, dataset.action_space, name)
        with h5py.File(folder / "main_data.hdf5") as file:
            found = len(file)
        if found != dataset.total_episodes:
            raise ValueError(f"{dataset.total_episodes} episodes in metadata.json, {found} in data")
        return dataset, list(dataset.iterate_episodes())
    except Exception as error:  # Minari checks nothing: a damaged file fails in many ways
        fault = f"{type(error).__name__}: {error}"
        return fail(f"{name}: unreadable ({fault}): damaged or cut off? {again}")


def check(request):
    """Doubt a Minari dataset and say what is in it."""
    dataset, episodes = open_dataset(request.id)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if request.env_id:
            env = make_environment(gym.make, request.env_id)
        else:
            env = make_environment(partial(dataset.recover_environment, eval_env=True))
    check_episodes(episodes, env, request.id)
    metadata = dataset.storage.metadata
    known = [metadata.get(name) for name in REFERENCE]
    reference = None if None in known else known
    if request.write_reference:
        reference = reference_returns(env.spec)
        if reference is None:
            fail(f"--write-reference: D4RL has no reference returns for {env.spec.id}")
        write_reference(dataset, reference)
    summarize(request.id, episodes, env, reference)
    for warning in caught:
        if "requirement" in str(warning.message) or "not installed" in str(warning.message):
            warn(" ".join(str(warning.message).split()))


def goals(request):
    """A copy of a dataset whose episodes, and those of its environment, end at the first reward
    above 0: a termination. What came after it is dropped."""
    check_new_id(request)
    dataset, episodes = open_dataset(request.source)
    whole = make_environment(partial(dataset.recover_environment, eval_env=True))
    env = make_environment(partial(gym.make, whole.spec, continuing_task=False))

    def begin(x, count):
        return {name: begin(x[name], count) for name in x} if isinstance(x, dict) else x[:count]

    cut = []
    for episode in episodes:
        if not np.isin(episode.rewards, (0, 1)).all():
            fail(f"{request.source}: its rewards are not 0 and, at the goal, 1")
        at_goal = episode.rewards > 0  # (T,)
        steps = 1 + int(at_goal.argmax()) if at_goal.any() else len(at_goal)
        rest = episode.actions[:steps], episode.rewards[:steps], at_goal[:steps]
        cut.append(episode_buffer(begin(episode.observations, steps + 1), *rest))
    write_dataset(request, cut, env, env, "collect.py goals", f"{request.source}, to the goal")


# -------------------------------------------------------------------------------------- Collecting
def episode_seed(seed, episode):
    """Reset seed of one episode; every episode has its own, so that any can be played again."""
    return int(np.random.SeedSequence((3, seed, episode)).generate_state(1)[0])


def play(env, num_steps, begin):
    """Whole episodes, of `num_steps` steps together or a few more. `begin(number)` resets `env`:
    (observation, policy), `policy(observation)` is what `env` takes and what is recorded."""
    steps, number = 0, 0
    with tqdm(total=num_steps, unit=" steps", disable=None) as bar:
        while steps < num_steps:
            observation, policy = begin(number)
            observations, rest, ended = [observation], [], False
            while not ended:
                action, recorded = policy(observation)
                observation, reward, terminated, truncated, _ = env.step(action)
                observations.append(observation)
                rest.append((recorded, reward, terminated))
                ended, steps = terminated or truncated, steps + 1
                bar.update()
            if isinstance(observation, dict):
                keys = sorted(observation)
                observations = {key: np.array([o[key] for o in observations]) for key in keys}
            else:
                observations = np.array(observations)
            yield episode_buffer(observations, *map(np.array, zip(*rest, strict=True)))
            number += 1


def check_ranges(request):
    """Refuse numbers that make no dataset."""
    ranges = {"steps": (0 if isinstance(request, Replay) else 1, 10**8), "seed": (0, 2**31 - 1)}
    ranges |= {"noise": (0.0, 2.0), "share": (0.0, 1.0), "processes": (0, 10_000)}
    for name, (low, high) in ranges.items():
        value = getattr(request, name, low)
        if not low <= value <= high:
            fail(f"--{name} {value}: must be in [{low}, {high}]")


# ------------------------------------------------------------------------------------------- Mazes
MAZES = {  # environment, and start and goal cell (row, column) of D4RL's antmaze evaluation
    "umaze": ("PointMaze_UMaze-v3", (1, 1), (3, 1)),
    "medium": ("PointMaze_Medium-v3", (1, 1), (6, 6)),
    "large": ("PointMaze_Large-v3", (1, 1), (7, 9)),
}
GOAL_SHARE = 0.3  # of the episodes have their goal in the evaluation's goal cell


def marked_map(maze_map, start, goal):
    """A maze's map with one start and one goal cell."""
    marked = [list(row) for row in maze_map]
    marked[start[0]][start[1]], marked[goal[0]][goal[1]] = "r", "g"
    return marked


def maze_environments(name):
    """The environment for collecting, with start and goal in any cell, and the one for training
    and evaluation, with one start and one goal cell. Both end at the goal, with reward 1."""
    env_id, start, goal = MAZES[name]
    env = make_environment(gym.make, env_id, continuing_task=False)
    maze_map = marked_map(env.unwrapped.maze.maze_map, start, goal)
    return env, make_environment(gym.make, env_id, continuing_task=False, maze_map=maze_map)


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


def maze_episodes(env, goal_cell, request):
    """At least `steps` steps of the controller, as episodes with dict observations."""
    maze, rng = env.unwrapped.maze, np.random.default_rng(request.seed)
    cells = np.ndindex(maze.map_length, maze.map_width)
    free = [cell for cell in cells if maze.maze_map[cell[0]][cell[1]] != 1]

    def begin(number):
        goal = goal_cell if rng.random() < GOAL_SHARE else free[rng.integers(len(free))]
        starts = [cell for cell in free if cell != goal]
        start = starts[rng.integers(len(starts))]
        options = {"reset_cell": np.array(start), "goal_cell": np.array(goal)}
        observation, _ = env.reset(seed=episode_seed(request.seed, number), options=options)
        path = map(maze.cell_rowcol_to_xy, shortest_path(maze.maze_map, start, goal)[1:-1])
        waypoints = deque([*path, observation["desired_goal"]])

        def policy(observation):
            action = waypoint_action(observation, waypoints, request.noise, rng)
            return action, action

        return observation, policy

    return play(env, request.steps, begin)


def pointmaze(request):
    """The dataset of D4RL's waypoint controller in a point maze."""
    request = dataclasses.replace(request, id=request.id or f"pointmaze/{request.maze}-v0")
    check_ranges(request)
    check_new_id(request)
    env, eval_env = maze_environments(request.maze)
    episodes = list(maze_episodes(env, MAZES[request.maze][2], request))
    algorithm = f"D4RL's waypoint controller, breadth-first plan, action noise {request.noise}"
    share = f"{GOAL_SHARE:.0%} of the goals in the evaluation's cell; reward 1 and end at the goal"
    about = f"PointMaze {request.maze}: {share}; seed {request.seed}, {request.steps} steps"
    write_dataset(request, episodes, env, eval_env, algorithm, about)


# ----------------------------------------------------------------------------------------- OGBench
TASKS = {"puzzle-3x3": 4, "pointmaze-medium": 1, "antmaze-medium": 1}  # by default; others: 2
P_STACK = {"cube-single": (0.0, 0.0), "cube-double": (0.0, 0.25)}  # ranges; others: 0.5


def walker_world():
    """An ant that is rewarded for its way along a direction, which is in its observation."""
    from ogbench.online_locomotion import wrappers

    return wrappers.GymXYWrapper(gym.make("online-ant-v0"), resample_interval=100)


gym.register("online-ant-xy-v0", "collect:walker_world", max_episode_steps=1000)


def oracles_of(env, world):
    """{target: oracle}; which one plays is in the environment's info."""
    from ogbench.manipspace.oracles import plan

    found, closed = {}, {"gripper_always_closed": True} if "puzzle" in world else {}
    for target, options in {"cube": {}, "button": closed, "drawer": {}, "window": {}}.items():
        module = importlib.import_module(f"{plan.__name__}.{target}_plan")
        oracle = getattr(module, f"{target.title()}PlanOracle")
        found[target] = oracle(env=env, noise=0.1, noise_smoothing=0.5, **options)
    return found


def manipulate(env, world, rng, seed, walk):
    """One recording of the oracles: yields (observation, action, the next one, its info)."""
    observation, info = env.reset(seed=seed)
    stack, oracles = rng.uniform(*P_STACK.get(world, (0.5, 0.5))), oracles_of(env, world)
    oracle = oracles[info["privileged/target_task"]]
    oracle.reset(observation, info)
    truncated = False
    while not truncated:
        action = np.clip(oracle.select_action(observation, info), -1, 1)
        following, _, _, truncated, info = env.step(action)
        yield observation, action, following, info
        if oracle.done:
            start, first = env.unwrapped.set_new_target(p_stack=stack)
            oracle = oracles[first["privileged/target_task"]]
            oracle.reset(start, first)
        observation = following


def navigate(env, world, rng, seed, walk):
    """One recording in a maze, from vertex to vertex: yields as `manipulate` does."""
    wall = np.pad(env.unwrapped.maze_map, 1, constant_values=1) == 1
    up, down, left, right = wall[:-2, 1:-1], wall[2:, 1:-1], wall[1:-1, :-2], wall[1:-1, 2:]
    straight = ~up & ~down & left & right | up & down & ~left & ~right  # a corridor
    cells = np.argwhere(~wall[1:-1, 1:-1])
    vertices = np.argwhere(~wall[1:-1, 1:-1] & ~straight)
    task = {"init_ij": tuple(rng.choice(cells)), "goal_ij": tuple(rng.choice(vertices))}
    observation, _ = env.reset(seed=seed, options={"task_info": task})
    maze, truncated = env.unwrapped, False
    while not truncated:
        position = maze.get_xy()
        way = maze.get_oracle_subgoal(position, maze.cur_goal_xy)[0] - position
        direction = way / (np.linalg.norm(way) + 1e-6)
        action = np.clip(walk(maze, direction, rng), -1, 1)
        following, _, _, truncated, info = env.step(action)
        yield observation, action, following, info
        if info["success"]:
            maze.set_goal(goal_ij=tuple(rng.choice(vertices)))
        observation = following


def train_walker(request):
    """sac.py's run that walks: goes on where it stopped, does nothing where it is finished."""
    settings = f"--warmup-steps 10000 --learning-rate 1e-4 --online-steps {request.walker_steps}"
    settings += " --entropy-per-action -0.5 --env-id collect:online-ant-xy-v0 --run-dir"
    command = [sys.executable, str(HERE / "sac.py"), *settings.split(), str(request.walker)]
    if subprocess.run(command).returncode:
        fail(f"the walker's run, {request.walker}, did not come to its end")


def walker(request):
    """`walk(maze, direction, rng)`: a point's step, or the ant's, by the policy of sac.py's run."""
    if "point" in request.world:
        return lambda maze, direction, rng: direction + rng.normal(0, 0.5, 2)
    script, said, arrays, _ = load_run(request.walker)
    policy = run_policy(script, said, arrays, Rollout(request.walker, ""), run_environment(said))

    def walk(maze, direction, rng):
        observation = np.concatenate([maze.get_ob(ob_type="states")[2:], direction])
        return policy(observation, 0) + rng.normal(0, 0.2, 8)

    return walk


@cache  # once in every process
def ogbench_world(request):
    """(environment that is played in, environment of the task, walk)."""
    importlib.import_module("ogbench")  # registers its environments
    task = make_environment(gym.make, f"{request.world}-singletask-task{request.task}-v0")
    options = {"terminate_at_goal": False, "max_episode_steps": 1001}
    options |= {} if "maze" in request.world else {"mode": "data_collection"}
    walk = walker(request) if "maze" in request.world else None
    return make_environment(gym.make, f"{request.world}-v0", **options), task, walk


def recording(request, number):
    """One recording with the rewards of one task, Minari's episode; None where OGBench drops it."""
    env, task, walk = ogbench_world(request)
    seed = episode_seed(request.seed, number)
    np.random.seed(seed)  # the oracles draw from NumPy's global generator
    record = navigate if "maze" in request.world else manipulate
    played = record(env, request.world, np.random.default_rng([seed, 1]), seed, walk)
    observations, actions, following, infos = map(list, zip(*played, strict=True))
    qpos = np.stack([info["prev_qpos"] for info in infos])  # (T, P), of the states before
    if request.world == "scene":  # its cube fell off the table, or beside the drawer
        y, z = qpos[:, 15], qpos[:, 16]
        if (y >= 0.29).any() or ((y <= -0.3) & ((z < 0.06) | (z > 0.08))).any():
            return None
    rows = {"qpos": qpos}
    if "prev_button_states" in infos[0]:
        rows["button_states"] = np.stack([info["prev_button_states"] for info in infos])
    importlib.import_module("ogbench.relabel_utils").relabel_dataset(task.spec.id, task, rows)
    states = np.float32([*observations, following[-1]])  # (T + 1, O)
    return episode_buffer(states, np.float32(actions), rows["rewards"], rows["masks"] == 0)


def ogbench(request):
    """The dataset of OGBench's oracles in one of its worlds, with the rewards of one task."""
    if importlib.util.find_spec("ogbench") is None:
        fail("No module named 'ogbench'; pip install ogbench==1.2.2")
    world, kind = request.world, "navigate" if "maze" in request.world else "play"
    task = request.task or TASKS.get(world, 2)
    if task not in range(1, 6) or request.type not in ("", kind):
        fail(f"{world}: --task {task} --type {request.type}: a task of 1 ... 5, of type {kind}")
    name = request.id or f"ogbench/{world}-{kind}-task{task}-v0"
    request = dataclasses.replace(request, id=name, task=task)
    check_ranges(request)
    check_new_id(request)
    if "ant" in world:
        train_walker(request)
    os.environ["JAX_PLATFORMS"] = "cpu"  # in many processes, a step at a time, to the same bits
    episodes, count, processes = [], 0, request.processes or os.cpu_count()
    quiet, numbers = (warnings.simplefilter, ("ignore",)), itertools.count()  # as in this process
    with (
        ProcessPoolExecutor(processes, get_context("spawn"), *quiet) as pool,
        tqdm(total=request.steps, unit=" steps", disable=None) as bar,
    ):
        play_all = pool.map if processes > 1 else map
        while count < request.steps:  # in turns: the same data whatever their number
            turn = list(itertools.islice(numbers, processes))
            for episode in play_all(partial(recording, request), turn):
                if episode is not None and count < request.steps:
                    episodes.append(episode)
                    count += len(episode.rewards)
                    bar.update(len(episode.rewards))
    what = f"regenerated by OGBench's recipe: {world}, {kind}, task {task}, seed {request.seed}"
    goal = ogbench_world(request)[1]
    write_dataset(request, episodes, goal, goal, "OGBench's oracles", what, (0.0, 1.0))


# -------------------------------------------------------------------------------------------- Runs
def load_run(folder):
    """A run's script as a module, what is in its config.json, its checkpoint's arrays, of the
    first seed, (1, ...), and the checkpoint's rows of metrics.csv."""
    try:
        said = json.loads((folder / "config.json").read_text())
        name, _ = said["script"], said["units"]
        files = [HERE.parent / part / f"{name}.py" for part in ("algorithms", "baselines")]
        file = next(file for file in files if name.isidentifier() and file.is_file())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration):
        fail(f"{folder}: no config.json of a run of one of these scripts")
    spec = importlib.util.spec_from_file_location(f"run_{name}", file)
    script = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    if hasattr(script, "SkillEnvs"):
        fail(f"{folder}: its actions are skills, not the environment's")
    try:
        arrays, meta = script.load(folder)
    except SystemExit as error:  # damaged, or not there yet
        fail(error)
    if meta.get("config") != said:
        fail(f"{folder}: config.json and checkpoint.npz are of different runs")
    return script, said, {name: x[:1] for name, x in arrays.items()}, meta["rows"]


def run_environment(said):
    """The environment of a run, in its own units, with flat observations."""
    spec = gym.envs.registration.EnvSpec.from_json(said["environment"])
    return flat_environment(make_environment(partial(gym.make, spec)))


def run_policy(script, said, arrays, request, env):
    """A run's policy: `policy(observation, step)` is the agent's action (A,), in [-1, 1], in an
    observation (O,) in the environment's units."""
    values = {field.name: said[field.name] for field in dataclasses.fields(script.Config)}
    values = {name: tuple(x) if isinstance(x, list) else x for name, x in values.items()}
    config, jax = script.Config(**values), script.jax
    zeros = {"observation": np.zeros((1, gym.spaces.flatdim(env.observation_space)), np.float32)}
    zeros["action"] = np.zeros((1, *env.action_space.shape), np.float32)
    create = partial(script.create_agent, config=config, **zeros)
    agents = {"agents": jax.vmap(create)(jax.random.PRNGKey(0)[None])}  # (1, ...)
    try:
        agents = script.restore(agents, arrays, request.run)["agents"]
    except SystemExit as error:
        fail(error)
    agent, units = jax.tree.map(lambda x: x[0], agents), said["units"]["observations"]
    multiplier, offset = map(np.array, units)
    key = jax.random.PRNGKey(request.seed)

    @jax.jit
    def choose(agent, observation, step):
        if request.sampled:
            return script.explore(agent, observation, jax.random.fold_in(key, step), config)
        return script.act(agent, observation[None], config)[0]

    def policy(observation, step):
        action = choose(agent, script.rescale(observation, multiplier, offset), step)
        return np.clip(np.asarray(action), -1.0, 1.0)

    return policy


def rollout(request):
    """The dataset of a run's policy."""
    check_ranges(request)
    check_new_id(request)
    script, said, arrays, rows = load_run(request.run)
    if request.sampled and not hasattr(script, "explore"):
        fail(f"--sampled: {said['script']}.py has no policy for training")
    env, scale = run_environment(said), np.array(said["units"]["actions"])
    policy = run_policy(script, said, arrays, request, env)
    raw = {"observations": (1.0, 0.0), "rewards": (1.0, 0.0), "actions": said["units"]["actions"]}
    played = script.make_env(said | {"units": raw})
    step = iter(range(10**9))

    def begin(number):
        np.random.seed(episode_seed(request.seed, number))  # OGBench's mazes draw starts from it
        observation, _ = played.reset(seed=episode_seed(request.seed, number))

        def act(observation):
            action = policy(observation, next(step))
            return action, action * scale

        return observation, act

    episodes = list(play(played, request.steps, begin))
    kind = "training" if request.sampled else "deterministic"
    write_run(request, said, rows, episodes, env, f"its {kind} policy, seed {request.seed}")


def write_run(request, said, rows, episodes, env, what):
    """The dataset of a run's episodes: `what` they are, of which run, and how far it had come."""
    done = f"{rows[-1]['phase']} step {rows[-1]['step']}" if rows else "no step"
    data = said["dataset"] or said["env_id"]
    run = f"{said['script']}.py on {data}, seed {said['seed']}, after {done} ({request.run})"
    reference = None if None in said["reference"] else said["reference"]
    write_dataset(request, episodes, env, env, said["script"], f"{run}: {what}", reference)


def replay_rows(said, arrays, steps):
    """The replay buffer's rows, the oldest first, back in the environment's units."""
    names = ("observations", "actions", "rewards", "next_observations", "masks", "ends")
    rows = {name: arrays[f"buffers/{name}"][0] for name in names}
    capacity = len(rows["rewards"])
    order = np.arange(max(0, steps - capacity), steps) % capacity  # row t is at t % capacity
    rows = {name: x[order] for name, x in rows.items()}
    for name in ("observations", "next_observations", "rewards"):
        multiplier, offset = map(np.array, said["units"][name.removeprefix("next_")])
        rows[name] = ((rows[name] - offset) / multiplier).astype(np.float32)
    rows["actions"] = np.clip(rows["actions"], -1.0, 1.0) * np.array(said["units"]["actions"])
    rows |= {"terminals": rows.pop("masks") == 0, "ends": rows["ends"] == 1}
    return rows | {"known": np.ones(len(order), bool)}


def replay(request):
    """The dataset of a run's replay buffer."""
    check_ranges(request)
    check_new_id(request)
    script, said, arrays, log = load_run(request.run)
    online = [r for r in log if r["phase"] == "online" and r["seed"] == said["seed"]]
    steps = max([row["step"] for row in online], default=0)
    kept = arrays.get("buffers/ends", np.zeros(1)).any() and not hasattr(script, "on_policy_round")
    if steps == 0 or not kept:
        fail(f"{request.run}: no online transitions in its checkpoint, as rows")
    env, rows = run_environment(said), replay_rows(said, arrays, steps)
    count = request.steps or len(rows["ends"])
    if request.share < 1.0:
        level = request.share * float(online[-1]["return"])
        good = [row["step"] for row in online if float(row["return"]) >= level]
        reached = min([*good, steps])
        count = min(count, reached - steps + len(rows["ends"]))  # the ring has lost the oldest
        if level <= 0 or count <= 0:
            fail(f"--share {request.share}: a return of {level} must be above 0, its rows kept")
    if count > len(rows["ends"]):
        fail(f"--steps {count}: the buffer has {len(rows['ends'])}")
    rows = {name: x[:count] for name, x in rows.items()}
    rows["ends"][-1] = True  # the last episode may be cut here
    episodes = list(split_episodes(rows))
    write_run(request, said, log, episodes, env, f"the oldest {count:,} steps of its replay buffer")


# -------------------------------------------------------------------------------------------- main
COMMANDS = {
    Convert: convert, Check: check, Goals: goals, Pointmaze: pointmaze, Ogbench: ogbench,
    Rollout: rollout, Replay: replay,
}  # fmt: skip


def main(arguments=None):
    gym.logger.min_level = gym.logger.ERROR  # no advice that a -v4 environment is not the newest
    names = {kind.__name__.lower(): kind for kind in COMMANDS}
    parse = tyro.extras.subcommand_cli_from_dict
    request = parse(names, args=arguments, prog="collect.py", description=__doc__)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Gymnasium's and Minari's advice
        COMMANDS[type(request)](request)


if __name__ == "__main__":
    main()
