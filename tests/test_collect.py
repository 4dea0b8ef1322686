"""Collected datasets are what they say: the mazes are solved on shortest paths, the files read back
as they were played, and a checkpoint's rollouts are that checkpoint's own actions."""

import itertools
import json

import gymnasium as gym
import jax
import numpy as np
import pytest
from conftest import load_script, run_script

pytest.importorskip("gymnasium_robotics")

CELLS = {"umaze": ((1, 1), (3, 1)), "medium": ((1, 1), (6, 6)), "large": ((1, 1), (7, 9))}
HAND_MADE = [  # a loop about (2, 2), a dead end at (1, 5), and a cell that cannot be reached
    [1, 1, 1, 1, 1, 1, 1],
    [1, 0, 0, 0, 1, 0, 1],
    [1, 0, 1, 0, 0, 0, 1],
    [1, 0, 0, "g", 1, 1, 1],
    [1, "r", 1, 1, 1, 0, 1],
    [1, 1, 1, 1, 1, 1, 1],
]
REACHABLE = [(1, 1), (1, 2), (1, 3), (1, 5), (2, 1), (2, 3), (2, 4), (2, 5), (3, 1), (3, 2),
             (3, 3), (4, 1)]  # fmt: skip


@pytest.fixture(scope="module")
def collect():
    return load_script("baselines/collect.py")


@pytest.fixture
def local(tmp_path, monkeypatch):
    """An empty folder as Minari's local storage."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"


@pytest.fixture(scope="module")
def umaze(collect, tmp_path_factory):
    """A umaze dataset, some of whose episodes end at a time limit: its path and its episodes."""
    folder = tmp_path_factory.mktemp("minari")
    env, eval_env = collect.maze_environments("umaze")
    env = gym.make(env.spec, max_episode_steps=70)
    config = collect.Config(maze="umaze", num_steps=1500, seed=3)
    episodes = list(collect.maze_episodes(env, (3, 1), config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(folder))
        collect.write_dataset("pointmaze/test-v0", episodes, env, eval_env, "test", "test")
    return folder / "pointmaze" / "test-v0" / "data", episodes


def test_plan_is_shortest(collect):
    """Against powers of the adjacency matrix: the length between all pairs of cells."""
    steps = np.array([[abs(a[0] - b[0]) + abs(a[1] - b[1]) == 1 for b in REACHABLE]
                      for a in REACHABLE])  # fmt: skip
    distance, reached = np.full(steps.shape, -1), np.eye(len(REACHABLE), dtype=bool)
    for length in range(len(REACHABLE)):
        distance[reached & (distance < 0)] = length
        reached = reached @ steps
    for (i, start), (j, goal) in itertools.product(enumerate(REACHABLE), repeat=2):
        path = collect.shortest_path(HAND_MADE, start, goal)
        assert path[0] == start and path[-1] == goal and set(path) <= set(REACHABLE)
        moves = np.abs(np.diff(path, axis=0)).sum(axis=1) if len(path) > 1 else np.array([])
        assert (moves == 1).all()
        assert len(path) - 1 == distance[i, j]


@pytest.mark.parametrize("maze, num_steps", [("umaze", 1200), ("medium", 2000), ("large", 2500)])
def test_controller_reaches_the_goal(collect, maze, num_steps):
    """From start cells all over the maze to goals all over it, with the default noise."""
    env, _ = collect.maze_environments(maze)
    config = collect.Config(maze=maze, num_steps=num_steps)
    episodes = list(collect.maze_episodes(env, CELLS[maze][1], config))
    assert sum(len(e.rewards) for e in episodes[:-1]) < num_steps
    assert sum(len(e.rewards) for e in episodes) >= num_steps
    assert len(episodes) >= 5
    assert np.mean([e.terminations[-1] for e in episodes]) >= 0.8
    to_cell = env.unwrapped.maze.cell_xy_to_rowcol
    ends = [[tuple(map(int, to_cell(e.observations[key][0]))) for e in episodes]
            for key in ("achieved_goal", "desired_goal")]
    assert len(set(ends[0])) > 2 and len(set(ends[1])) > 2
    assert all(start != goal for start, goal in zip(*ends, strict=True))


def test_goals_noise_and_seed(collect, monkeypatch):
    """The share of the evaluation's goal, the size of the noise, and that a seed is repeatable."""
    env, _ = collect.maze_environments("umaze")
    env = gym.make(env.spec, max_episode_steps=5)
    play = lambda **x: list(collect.maze_episodes(env, (3, 1), collect.Config(**x)))  # noqa: E731
    episodes = play(num_steps=2000, seed=1)
    goals = np.array([e.observations["desired_goal"][0] for e in episodes])
    centre = env.unwrapped.maze.cell_rowcol_to_xy((3, 1))
    share = (np.abs(goals - centre).max(axis=1) <= 0.25).mean()
    assert abs(share - (0.3 + 0.7 / 7)) < 0.08  # 400 episodes; the 7 cells contain the goal's
    again, other = play(num_steps=50, seed=1), play(num_steps=50, seed=2)
    for key in ("observation", "desired_goal"):
        assert np.array_equal(again[0].observations[key], episodes[0].observations[key])
        assert not np.array_equal(again[0].observations[key], other[0].observations[key])
    assert np.array_equal(again[0].actions, episodes[0].actions)
    offsets = [e[0].observations["desired_goal"][0] % 1.0 for e in (again, other)]  # in the cell
    assert not np.allclose(*offsets)
    still = {"observation": np.array([1.0, 2.0, 0.3, -0.2])}  # the controller asks for (0.2, 0)
    rng, waypoint = np.random.default_rng(0), np.array([1.05, 1.98])
    draws = np.array([collect.waypoint_action(still, collect.deque([waypoint]), 0.1, rng)
                      for _ in range(2000)])
    np.testing.assert_allclose(draws.mean(axis=0), [0.2, 0.0], atol=0.01)
    np.testing.assert_allclose(draws.std(axis=0), 0.1, atol=0.01)


def test_dataset_reads_back(iql, umaze):
    """Every episode as it was played; the mask is 0 at the goal only, and there the reward is 1."""
    path, episodes = umaze
    arrays = iql.read_dataset(path)
    lengths = [len(e.rewards) for e in episodes]
    assert np.flatnonzero(arrays["ends"]).tolist() == (np.cumsum(lengths) - 1).tolist()
    last = [[e.terminations[-1], e.truncations[-1]] for e in episodes]
    reached, limited = np.array(last).T
    assert reached.any() and limited.any() and (reached | limited).all()
    assert np.array_equal(arrays["terminals"][arrays["ends"]], reached)
    assert not arrays["terminals"][~arrays["ends"]].any()
    assert np.array_equal(arrays["rewards"] == 1, arrays["terminals"])
    assert np.array_equal(arrays["rewards"] == 0, ~arrays["terminals"])
    for name in ("actions", "rewards"):
        played = np.concatenate([getattr(e, name) for e in episodes])
        assert np.array_equal(arrays[name], played)
    distance = np.linalg.norm(
        arrays["next_observations"][:, :2] - arrays["next_observations"][:, 2:4], axis=1
    )
    assert np.array_equal(distance <= 0.45, arrays["terminals"])
    env = iql.make_env(iql.environment_spec(path, None))
    iql.check_dataset(arrays, env, path)
    batch = iql.agent_batch(
        arrays, iql.fit_transform(arrays, env.action_space, iql.Config(normalize_returns=False))
    )
    assert np.array_equal(batch.masks == 0, arrays["terminals"])


def test_observations_are_flattened_as_gymnasium_does(iql, collect, umaze):
    path, episodes = umaze
    arrays = iql.read_dataset(path)
    wrapper = gym.wrappers.FlattenObservation(collect.maze_environments("umaze")[0])
    flat = [
        np.array([wrapper.observation({key: x[t] for key, x in e.observations.items()})
                  for t in range(len(e.rewards) + 1)], np.float32)
        for e in episodes
    ]  # fmt: skip
    assert np.array_equal(arrays["observations"], np.concatenate([x[:-1] for x in flat]))
    assert np.array_equal(arrays["next_observations"], np.concatenate([x[1:] for x in flat]))


@pytest.mark.parametrize("maze", CELLS)
def test_evaluation_has_one_start_and_one_goal(iql, collect, maze):
    """Start r and goal g, wherever the data's start and goal were; the score is in percent."""
    env, eval_env = collect.maze_environments(maze)
    spec = eval_env.spec.to_json()
    assert iql.reference_returns(spec)[:2] == (0.0, 1.0)
    flat, geometry = iql.make_env(spec), env.unwrapped.maze
    assert not any(isinstance(cell, str) for row in geometry.maze_map for cell in row)
    for seed in range(5):
        observation, _ = flat.reset(seed=seed)
        assert tuple(geometry.cell_xy_to_rowcol(observation[:2])) == CELLS[maze][0]
        assert tuple(geometry.cell_xy_to_rowcol(observation[2:4])) == CELLS[maze][1]
    assert not flat.spec.kwargs["continuing_task"] and flat.spec.kwargs["reward_type"] == "sparse"


def test_stored_environments(iql, umaze):
    """The dataset names both environments and the package that they need."""
    path, _ = umaze
    metadata = json.loads((path / "metadata.json").read_text())
    maps = [json.loads(metadata[name])["kwargs"]["maze_map"] for name in
            ("env_spec", "eval_env_spec")]
    assert maps[0][1][1] == 0 and maps[1][1][1] == "r" and maps[1][3][1] == "g"
    assert json.loads(iql.environment_spec(path, None))["kwargs"]["maze_map"] == maps[1]
    assert "gymnasium-robotics==1.4.2" in metadata["requirements"]
    assert (metadata["ref_min_score"], metadata["ref_max_score"]) == (0.0, 1.0)
    size = sum(file.stat().st_size for file in path.iterdir()) / 1e6  # as packed
    assert metadata["dataset_size"] == pytest.approx(size, abs=0.1)


def test_iql_runs_on_it(collect, local, tmp_path, capsys):
    """From the command line of one script to that of the other; the preset is the maze's."""
    collect.main(["--maze", "umaze", "--num-steps", "300", "--dataset-id", "maze/small-v0"])
    assert "score 100.0 (success rate in percent)" in capsys.readouterr().out
    run = tmp_path / "run"
    code, _, error = run_script(
        "algorithms/iql.py", "--dataset", local / "maze" / "small-v0", "--run-dir", run,
        "--offline-steps", 2, "--online-steps", 2, "--log-interval", 2, "--eval-interval", 2,
        "--eval-episodes", 1, "--batch-size", 4, "--hidden-dims", 4,
    )  # fmt: skip
    assert code == 0, error
    config = json.loads((run / "config.json").read_text())
    assert (config["preset"], config["reward_shift"]) == ("pointmaze", -1.0)
    assert len((run / "metrics.csv").read_text().splitlines()) == 3


def saved_agent(script, folder, rename=None):
    """An untrained agent with two seeds of `script`, in Pendulum-v1 (box [-2, 2]), saved by the
    script itself: its first seed's state and its transform."""
    config = script.Config(num_seeds=2, hidden_dims=(8, 8), seed=5)
    devices, rng = jax.devices()[:1], np.random.default_rng(0)
    transform = script.Transform(
        rng.normal(size=3), rng.uniform(0.5, 2.0, size=3), np.zeros(1), np.full(1, 2.0),
        np.array(1.0), np.array(0.0),
    )  # fmt: skip
    shards = script.create_shards(config, 3, 1, devices)
    spec = gym.make("Pendulum-v1").spec.to_json()
    folder.mkdir()
    script.save_run(script.Run(config, spec, folder, devices, transform, shards, [], [None]))
    if rename:
        arrays, meta, path = script.load_checkpoint(folder)
        arrays = {name.replace(*rename): x for name, x in arrays.items()}
        script.save_checkpoint(path, arrays, meta)
    return jax.tree.map(lambda x: x[0], shards[0]), transform


@pytest.mark.parametrize("name", ["iql", "sac"])
def test_rollouts_act_as_the_script_would(request, iql, collect, local, tmp_path, name):
    """The stored actions are the script's own, of the first seed, in the environment's units."""
    script = request.getfixturevalue(name)
    state, transform = saved_agent(script, tmp_path / "run")
    flags = ["--checkpoint", str(tmp_path / "run"), "--num-steps", "201", "--seed", "7"]
    collect.main([*flags, "--dataset-id", "pendulum/mode-v0"])
    collect.main([*flags, "--dataset-id", "pendulum/sampled-v0", "--sampled"])
    mode, sampled = (iql.read_dataset(local / "pendulum" / kind / "data")
                     for kind in ("mode-v0", "sampled-v0"))  # fmt: skip
    for arrays in (mode, sampled):
        assert np.flatnonzero(arrays["ends"]).tolist() == [199, 399]
        assert not arrays["terminals"].any() and np.abs(arrays["actions"]).max() <= 2.0
    actions = script.mode_actions(state, transform.observations(mode["observations"]))  # (400, 1)
    assert actions.std() > 0.01
    np.testing.assert_allclose(mode["actions"], 2.0 * np.asarray(actions), atol=2e-5)
    # Where each sampled action lies among 200 that the script draws in the same state: anywhere.
    trained = state.replace(critic=state.critic.replace(step=1))  # before, SAC acts uniformly
    draw = jax.vmap(script.sample_action, (None, None, 0))
    keys = jax.random.split(jax.random.PRNGKey(0), (400, 200))
    observations = transform.observations(sampled["observations"])  # (400, 3)
    draws = jax.jit(jax.vmap(draw, (None, 0, 0)))(trained, observations, keys)  # (400, 200, 1)
    others = 2.0 * np.asarray(draws)[..., 0]  # (400, 200)

    def ranks(x):
        return (1.0 * (others < x) + (others <= x)).mean(axis=1) / 2  # ties (clipped) count half

    assert abs(ranks(sampled["actions"]).mean() - 0.5) < 0.06
    assert abs(ranks(sampled["actions"]).std() - ranks(others[:, :1]).std()) < 0.04


def test_unknown_policy_is_refused(iql, collect, local, tmp_path, capsys):
    """Parameters of other names are no policy that is known: nothing is guessed."""
    saved_agent(iql, tmp_path / "run", rename=("params/log_std", "params/log_scale"))
    with pytest.raises(SystemExit) as error:
        collect.main(["--checkpoint", str(tmp_path / "run"), "--dataset-id", "test/set-v0"])
    assert error.value.code == 2 and not (local / "test").exists()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "the policy of iql.py is neither of the two known" in lines[0]


REFUSALS = {  # flags: what the one line on stderr says
    "": "either --maze or --checkpoint",
    "--maze umaze --checkpoint x": "either --maze or --checkpoint",
    "--maze giant": "--maze giant: must be one of umaze, medium, large",
    "--maze umaze --noise -0.1": "--noise -0.1: must be in [0.0, 2.0]",
    "--maze umaze --noise nan": "--noise nan: must be in",
    "--maze umaze --num-steps 0": "--num-steps 0: must be in",
    "--maze umaze --seed -1": "--seed -1: must be in",
    "--checkpoint x": "--checkpoint needs --dataset-id",
    "--maze umaze --dataset-id taken/set-v0": "--dataset-id taken/set-v0: exists",
    "--maze umaze --dataset-id no/version": "--dataset-id no/version: not a Minari id",
    "--maze umaze --dataset-id ../up-v0": "--dataset-id ../up-v0: not a Minari id",
}


@pytest.mark.parametrize("flags, message", REFUSALS.items())
def test_refusals(collect, local, capsys, flags, message):
    """One line, exit code 2, and nothing written."""
    (local / "taken" / "set-v0").mkdir(parents=True)
    before = sorted(local.rglob("*"))
    with pytest.raises(SystemExit) as error:
        collect.main(flags.split())
    lines = capsys.readouterr().err.splitlines()
    assert error.value.code == 2 and len(lines) == 1 and message in lines[0]
    assert sorted(local.rglob("*")) == before


def test_missing_package_is_named(collect, local, capsys, monkeypatch):
    """Without gymnasium-robotics: one line with the command that installs it."""
    monkeypatch.setattr(collect.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as error:
        collect.main(["--maze", "umaze"])
    lines = capsys.readouterr().err.splitlines()
    assert error.value.code == 2 and len(lines) == 1
    assert "pip install gymnasium-robotics==1.4.2" in lines[0]
