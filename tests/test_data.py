"""From a file or an environment to the transitions an agent learns from: nothing is mixed up.

The episodes here are written by hand, and so are the numbers that must come out.
"""

import dataclasses
from types import SimpleNamespace

import gymnasium as gym
import h5py
import jax
import jax.numpy as jnp
import minari
import numpy as np
import pytest
from conftest import pendulum_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from minari.data_collector import EpisodeBuffer

# Five trajectories in nine rows: a termination, a time limit, a single step to a termination, a
# single step to a time limit, and one that the end of the file cuts off.
TERMINALS = np.array([0, 0, 1, 0, 0, 1, 0, 0, 0], bool)
TIMEOUTS = np.array([0, 0, 0, 0, 1, 0, 1, 0, 0], bool)
ENDS = np.array([0, 0, 1, 0, 1, 1, 1, 0, 1], bool)
REWARDS = np.array([1.0, 2.0, 3.0, 10.0, 20.0, 5.0, 7.0, 100.0, 200.0])
# An observation is (trajectory, step), so that one can see where it comes from.
OBSERVATIONS = np.array(
    [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [2, 0], [3, 0], [4, 0], [4, 1]], np.float32
)
NEXT_OBSERVATIONS = OBSERVATIONS + np.array([0, 1], np.float32)
ACTIONS = np.linspace(-0.8, 0.8, 9, dtype=np.float32)[:, None]
FLAT = {
    "observations": OBSERVATIONS, "actions": ACTIONS, "rewards": REWARDS, "terminals": TERMINALS,
    "timeouts": TIMEOUTS,
}  # fmt: skip
SEGMENTS = {
    "seg_end_index": np.flatnonzero(ENDS), "seg_end_next_observations": NEXT_OBSERVATIONS[ENDS]
}  # fmt: skip


def write_flat(path, fields):
    """The fields as .npz or .hdf5, by the path's suffix."""
    if path.suffix == ".npz":
        np.savez(path, **fields)
        return path
    with h5py.File(path, "w") as file:
        for name, values in fields.items():
            file[name] = values
        file["infos/qpos"] = np.zeros((len(fields["rewards"]), 3))  # as D4RL's own files have it
    return path


@pytest.fixture(params=[".npz", ".hdf5"])
def read(request, tmp_path, iql):
    """Write fields to a flat file of either kind and read it back."""

    def write_and_read(fields):
        return iql.read_dataset(write_flat(tmp_path / f"data{request.param}", fields))

    return write_and_read


def identity(iql, observation_dim=2, action_dim=1):
    zeros, ones = np.zeros, np.ones
    return iql.Transform(
        zeros(observation_dim), ones(observation_dim), zeros(action_dim), ones(action_dim),
        np.array(1.0), np.array(0.0),
    )  # fmt: skip


def box(low, high):
    return gym.spaces.Box(np.float32(low), np.float32(high))


# ------------------------------------------------------------------------------------- Flat files


def test_without_next_observations_rows_cut_by_a_time_limit_are_dropped(iql, read):
    arrays = read(FLAT)
    np.testing.assert_array_equal(arrays["ends"], ENDS)
    np.testing.assert_array_equal(arrays["keep"], [1, 1, 1, 1, 0, 1, 0, 1, 0])
    batch = iql.agent_batch(arrays, identity(iql))
    np.testing.assert_array_equal(batch.masks, [1, 1, 0, 1, 0, 1])
    np.testing.assert_array_equal(batch.rewards, [1, 2, 3, 10, 5, 100])
    np.testing.assert_array_equal(batch.observations, OBSERVATIONS[[0, 1, 2, 3, 5, 7]])
    continues = batch.masks == 1
    np.testing.assert_array_equal(
        batch.next_observations[continues], NEXT_OBSERVATIONS[[0, 1, 3, 7]]
    )


def test_with_next_observations_every_row_is_kept_and_time_limits_bootstrap(iql, read):
    arrays = read(FLAT | {"next_observations": NEXT_OBSERVATIONS})
    np.testing.assert_array_equal(arrays["ends"], ENDS)
    batch = iql.agent_batch(arrays, identity(iql))
    np.testing.assert_array_equal(batch.masks, [1, 1, 0, 1, 1, 0, 1, 1, 1])
    np.testing.assert_array_equal(batch.next_observations, NEXT_OBSERVATIONS)
    np.testing.assert_allclose(batch.actions, ACTIONS, atol=1e-7)


def test_segment_ends_carry_their_next_observation(iql, read):
    arrays = read(FLAT | SEGMENTS)
    np.testing.assert_array_equal(arrays["ends"], ENDS)
    assert arrays["keep"].all()
    np.testing.assert_array_equal(arrays["next_observations"], NEXT_OBSERVATIONS)
    masks = iql.agent_batch(arrays, identity(iql)).masks
    np.testing.assert_array_equal(masks, [1, 1, 0, 1, 1, 0, 1, 1, 1])


def test_a_segment_end_not_in_the_file_stays_unknown(read):
    some = {name: values[:2] for name, values in SEGMENTS.items()}  # rows 2 and 4 only
    np.testing.assert_array_equal(read(FLAT | some)["keep"], [1, 1, 1, 1, 1, 1, 0, 1, 0])


def test_a_jump_in_the_observations_ends_a_trajectory(read):
    fields = FLAT | {"next_observations": NEXT_OBSERVATIONS}
    del fields["timeouts"]
    np.testing.assert_array_equal(read(fields)["ends"], ENDS)


def test_a_segment_end_ends_a_trajectory(read):
    fields = FLAT | SEGMENTS
    del fields["timeouts"]
    np.testing.assert_array_equal(read(fields)["ends"], ENDS)


def test_a_termination_at_the_time_limit_is_a_termination(iql, read):
    arrays = read(FLAT | {"timeouts": TIMEOUTS | TERMINALS})
    np.testing.assert_array_equal(arrays["terminals"], TERMINALS)
    masks = iql.agent_batch(arrays, identity(iql)).masks
    np.testing.assert_array_equal(masks, [1, 1, 0, 1, 0, 1])


def test_columns_and_numbers_serve_as_well_as_vectors_and_booleans(read):
    columns = {name: FLAT[name].astype(np.float32)[:, None]
               for name in ("rewards", "terminals", "timeouts")}  # fmt: skip
    plain, other = read(FLAT), read(FLAT | columns)
    for name in plain:
        np.testing.assert_array_equal(other[name], plain[name], name)


episodes = st.lists(st.tuples(st.integers(1, 6), st.booleans()), min_size=1, max_size=8)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(episodes, st.sampled_from(["next", "next only", "segments", "none"]))
def test_no_kept_transition_crosses_an_end(iql, tmp_path_factory, episodes, layout):
    """Whatever the episodes (length, terminated or cut) and the layout of the file."""
    lengths = np.array([length for length, _ in episodes])
    last = np.cumsum(lengths) - 1
    episode = np.repeat(np.arange(len(lengths)), lengths)
    step = np.concatenate([np.arange(length) for length in lengths])
    observations = np.stack([episode, step], axis=1).astype(np.float32)
    terminated = np.array([terminated for _, terminated in episodes])
    fields = {"observations": observations, "actions": np.zeros((len(step), 1)),
              "rewards": np.ones(len(step))}  # fmt: skip
    fields["terminals"], fields["timeouts"] = np.zeros((2, len(step)), bool)
    fields["terminals"][last], fields["timeouts"][last] = terminated, ~terminated
    if layout.startswith("next"):
        fields["next_observations"] = observations + np.float32([0, 1])
    if layout == "next only":
        del fields["timeouts"]
    if layout == "segments":
        fields |= {"seg_end_index": last,
                   "seg_end_next_observations": observations[last] + np.float32([0, 1])}
    path = tmp_path_factory.getbasetemp() / "property.npz"
    arrays = iql.read_dataset(write_flat(path, fields))

    batch = iql.agent_batch(arrays, identity(iql))
    continues = batch.masks == 1
    expected = batch.observations[continues] + np.float32([0, 1])
    np.testing.assert_array_equal(batch.next_observations[continues], expected)
    lost = 0 if layout != "none" else (~terminated).sum()
    assert len(batch.masks) == len(step) - lost
    assert (batch.masks == 0).sum() == terminated.sum()
    to_go = np.repeat(lengths, lengths) - step
    np.testing.assert_array_equal(iql.discounted_returns(fields["rewards"], arrays["ends"], 1.0),
                                  to_go)
    np.testing.assert_array_equal(iql.episode_returns(arrays), lengths)


# -------------------------------------------------------------------------------- Minari datasets


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    """An empty folder of local Minari datasets."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    (tmp_path / "datasets").mkdir()
    return tmp_path / "datasets"


def episode_buffer(observations, actions, rewards, terminated=False, truncated=False):
    """One episode of T steps; `observations` has T + 1."""
    ends = np.arange(len(rewards)) == len(rewards) - 1
    return EpisodeBuffer(
        observations=observations, actions=np.asarray(actions, np.float32),
        rewards=list(rewards), terminations=list(ends & terminated),
        truncations=list(ends & truncated),
    )  # fmt: skip


def two_steps(env):
    """An episode of two steps in `env`, as it is."""
    observations, actions = [env.reset(seed=0)[0]], np.zeros((2, *env.action_space.shape))
    for action in actions:
        observations.append(env.step(action.astype(np.float32))[0])
    return episode_buffer(np.array(observations), actions, [0.0, 0.0], truncated=True)


def test_minari_episodes_end_where_they_end(iql, datasets):
    """The last observation of an episode is a next observation, and never a start."""
    first = np.float32([[0, 0, 0], [0, 1, 0], [0, 2, 0], [0, 3, 0]])
    second, third = np.float32([[1, 0, 0], [1, 1, 0]]), np.float32([[2, 0, 0], [2, 1, 0]])
    minari.create_dataset_from_buffers("test/pendulum-v0", [
        episode_buffer(first, [[0.1], [0.2], [0.3]], [1.0, 2.0, 3.0], terminated=True),
        episode_buffer(second, [[0.4]], [10.0], truncated=True),
        episode_buffer(third, [[0.5]], [20.0]),  # cut off by its collector, without a flag
    ], env="Pendulum-v1")  # fmt: skip
    path = iql.find_dataset("test/pendulum-v0")
    assert path == datasets / "test/pendulum-v0/data"
    arrays = iql.read_dataset(path)
    np.testing.assert_array_equal(arrays["ends"], [0, 0, 1, 1, 1])
    np.testing.assert_array_equal(arrays["terminals"], [0, 0, 1, 0, 0])
    np.testing.assert_array_equal(iql.episode_returns(arrays), [6, 10, 20])
    batch = iql.agent_batch(arrays, identity(iql, 3))
    np.testing.assert_array_equal(batch.observations[:, :2], [[0, 0], [0, 1], [0, 2], [1, 0],
                                                              [2, 0]])  # fmt: skip
    np.testing.assert_array_equal(batch.next_observations[:, :2], [[0, 1], [0, 2], [0, 3], [1, 1],
                                                                   [2, 1]])  # fmt: skip
    np.testing.assert_array_equal(batch.masks, [1, 1, 0, 1, 1])
    np.testing.assert_allclose(batch.actions[:, 0], [0.1, 0.2, 0.3, 0.4, 0.5])


class GoalEnv(gym.Env):
    """Observations are a dict, as in the goal mazes; every number in them tells where it is."""

    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, sort_keys=True, render_mode=None):
        spaces = [("observation", 3), ("desired_goal", 2), ("achieved_goal", 2)]
        spaces = {name: gym.spaces.Box(-np.inf, np.inf, (size,)) for name, size in spaces}
        self.observation_space = gym.spaces.Dict(spaces, sort_keys=sort_keys)
        self.steps = 0

    def observe(self):
        values = {"achieved_goal": [1, 2], "desired_goal": [3, 4], "observation": [5, 6, 7]}
        return {key: np.float32(value) + 10 * self.steps for key, value in values.items()}

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.observe(), {}

    def step(self, action):
        self.steps += 1
        return self.observe(), 0.0, False, self.steps == 3, {}


@pytest.mark.parametrize("sort_keys", [True, False])
def test_dict_observations_are_flattened_like_the_environments(iql, datasets, sort_keys):
    gym.register("TestGoal-v0", "test_data:GoalEnv", kwargs={"sort_keys": sort_keys})
    try:
        env = gym.make("TestGoal-v0")
        observations = [env.reset()[0]] + [env.step(np.float32([0]))[0] for _ in range(3)]
        stacked = {key: np.stack([o[key] for o in observations]) for key in observations[0]}
        buffer = episode_buffer(stacked, np.zeros((3, 1)), np.zeros(3), truncated=True)
        minari.create_dataset_from_buffers("test/goal-v0", [buffer], env=env)
        path = iql.find_dataset("test/goal-v0")
        arrays = iql.read_dataset(path)
        online = iql.make_env(iql.environment_spec(path, None))
        iql.check_dataset(arrays, online, path)
        for wrapped in (online, gym.wrappers.FlattenObservation(env))[: 1 + sort_keys]:
            flat = [wrapped.reset()[0]] + [wrapped.step(np.float32([0]))[0] for _ in range(3)]
            np.testing.assert_array_equal(arrays["observations"], flat[:-1])
            np.testing.assert_array_equal(arrays["next_observations"], flat[1:])
        if sort_keys:
            np.testing.assert_array_equal(flat[0], [1, 2, 3, 4, 5, 6, 7])
    finally:
        gym.registry.pop("TestGoal-v0")


def test_the_datasets_environment_is_rebuilt_with_its_wrappers(iql, datasets):
    env = gym.wrappers.DtypeObservation(gym.make("Pendulum-v1", g=5.0), "float64")
    env = gym.wrappers.RescaleAction(env, -0.5, 0.5)
    minari.create_dataset_from_buffers("test/wrapped-v0", [two_steps(env)], env=env)
    spec = iql.environment_spec(iql.find_dataset("test/wrapped-v0"), None)
    rebuilt = iql.make_env(spec)
    assert rebuilt.unwrapped.g == 5.0
    assert rebuilt.observation_space.dtype == np.float64
    np.testing.assert_array_equal(rebuilt.action_space.high, [0.5])
    for each in (env, rebuilt):
        each.reset(seed=1)
    action = np.float32([0.3])
    np.testing.assert_array_equal(env.step(action)[0], rebuilt.step(action)[0])


def test_the_evaluation_environment_goes_before_the_one_of_the_data(iql, datasets):
    env, other = gym.make("Pendulum-v1", g=5.0), gym.make("Pendulum-v1", g=6.0)
    minari.create_dataset_from_buffers(
        "test/eval-v0", [two_steps(env)], env=env, eval_env=other.spec
    )
    path = iql.find_dataset("test/eval-v0")
    assert iql.make_env(iql.environment_spec(path, None)).unwrapped.g == 6.0
    named = iql.make_env(iql.environment_spec(path, "MountainCarContinuous-v0"))
    assert named.spec.id == "MountainCarContinuous-v0"


# -------------------------------------------------------------------------- Returns and transforms


def test_monte_carlo_returns(iql):
    returns = iql.discounted_returns(REWARDS, ENDS, 0.5)
    np.testing.assert_array_equal(returns, [2.75, 3.5, 3, 20, 20, 5, 7, 200, 200])


def test_episode_returns(iql, read):
    """A row that is dropped from training still counts in its trajectory's return."""
    np.testing.assert_array_equal(iql.episode_returns(read(FLAT)), [6, 30, 5, 7, 300])


@pytest.mark.parametrize("settings, scale, shift", [
    ({}, 1.0, 0.0),
    ({"reward_scale": 10.0, "reward_shift": -5.0}, 10.0, -5.0),
    ({"normalize_returns": True}, 1000 / 295, 0.0),  # the returns lie between 5 and 300
    ({"normalize_returns": True, "reward_scale": 2.0, "reward_shift": -1.0}, 2000 / 295, -1.0),
])  # fmt: skip
def test_reward_transform(iql, read, settings, scale, shift):
    arrays = read(FLAT | SEGMENTS)
    transform = iql.fit_transform(arrays, box([-1], [1]), iql.Config(**settings))
    expected = REWARDS * scale + shift
    np.testing.assert_allclose(transform.rewards(REWARDS), expected, rtol=1e-6)
    np.testing.assert_allclose(iql.agent_batch(arrays, transform).rewards, expected, rtol=1e-6)


def test_equal_returns_cannot_be_normalized(iql, read, capsys):
    arrays = read(FLAT | {"rewards": np.zeros(9)})
    with pytest.raises(SystemExit):
        iql.fit_transform(arrays, box([-1], [1]), iql.Config(normalize_returns=True))
    assert "--no-normalize-returns" in capsys.readouterr().err


def test_observation_normaliser(iql):
    arrays = {"observations": np.float32([[0, 10], [2, 10], [4, 10]]), "actions": np.zeros((3, 1))}
    config = iql.Config(normalize_observations=True)
    transform = iql.fit_transform(arrays, box([-1], [1]), config)
    std = (8 / 3) ** 0.5 + 1e-3
    found = transform.observations(np.float64([[4, 10], [2, 11]]))
    np.testing.assert_allclose(found, [[2 / std, 0], [0, 1000]], rtol=1e-4)
    off = iql.fit_transform(arrays, box([-1], [1]), iql.Config())
    np.testing.assert_array_equal(off.observations(arrays["observations"]), arrays["observations"])


def test_the_normaliser_is_exact_on_a_million_rows(iql):
    """A goal that never moves is 0 to the agent, however long the dataset."""
    arrays = {"observations": np.full((1_000_000, 2), 8.5, np.float32), "actions": np.zeros((1, 1))}
    config = iql.Config(normalize_observations=True)
    transform = iql.fit_transform(arrays, box([-1], [1]), config)
    np.testing.assert_allclose(transform.observations(arrays["observations"][:1]), 0, atol=1e-3)


@pytest.mark.parametrize("low, high, data, agent", [
    ([-1, -1], [1, 1], [0.5, -0.25], [0.5, -0.25]),
    ([-5, -5], [5, 5], [0.5, -0.25], [0.5, -0.25]),  # in [-1, 1] and the box holds it: unchanged
    ([-5, -5], [5, 5], [2.0, -0.5], [0.4, -0.1]),  # beyond [-1, 1]: by the box
    ([-0.5, -1], [0.5, 1], [0.25, -0.25], [0.5, -0.25]),  # the box is narrower: by the box
    ([0, -2], [10, 2], [7.5, 0.5], [0.5, 0.25]),  # and every dimension by its own
    ([0, -2], [1, 2], [0.75, 0.5], [0.5, 0.25]),  # the box does not hold [-1, 1]
])  # fmt: skip
def test_actions_pass_or_are_rescaled(iql, low, high, data, agent):
    arrays = {"observations": np.zeros((1, 2)), "actions": np.float32([data])}
    transform = iql.fit_transform(arrays, box(low, high), iql.Config())
    np.testing.assert_allclose(transform.actions(arrays["actions"]), [agent], atol=1e-6)
    np.testing.assert_allclose(transform.environment_actions(np.float32([agent])), [data],
                               atol=1e-6)


def test_one_row_beyond_the_unit_box_rescales_all(iql):
    """The choice is the dataset's, not the row's."""
    arrays = {"observations": np.zeros((2, 2)), "actions": np.float32([[0.5], [-2.0]])}
    transform = iql.fit_transform(arrays, box([-2], [2]), iql.Config())
    np.testing.assert_allclose(transform.actions(arrays["actions"]), [[0.25], [-1]], atol=2e-5)


def test_actions_stay_a_hair_inside_the_unit_box(iql):
    found = identity(iql).actions(np.float32([[1.0], [-1.0], [1.0005], [0.3]]))
    np.testing.assert_allclose(found[:, 0], [1 - 1e-5, -1 + 1e-5, 1 - 1e-5, 0.3], atol=1e-7)
    assert np.isfinite(np.arctanh(found)).all()


# ------------------------------------------------------------------------------------ Online rows


def online_run(iql, env_id, transform, num_seeds=1, seed=0):
    config = iql.Config(num_seeds=num_seeds, seed=seed)
    run = iql.Run(config, gym.make(env_id).spec.to_json(), None, [], transform, [], [], None)
    run.rollout = iql.start_rollout(run)
    return run


def play(iql, run, actions):
    """Step `run` with the agents' actions (T, S, A); the transitions with axes (T, S)."""
    steps = []
    for action in actions:
        run.rollout.actions = action
        steps.append(iql.step_rollout(run))
    return jax.tree.map(lambda *xs: np.stack(xs), *steps)


def recorded_rows(iql, env_id, seed, actions):
    """The same episodes without the script's rollout: flat arrays with next observations."""
    env, episode = gym.make(env_id), 0
    observation, _ = env.reset(seed=iql.episode_seed(0, seed, episode))
    rows = {name: [] for name in (*FLAT, "next_observations")}
    for action in actions:
        step = env.step(action)
        for name, value in zip(rows, (observation, action, *step[1:4], step[0]), strict=True):
            rows[name].append(value)
        observation = step[0]
        if step[2] or step[3]:
            episode += 1
            observation, _ = env.reset(seed=iql.episode_seed(0, seed, episode))
    return {name: np.array(values) for name, values in rows.items()}


def test_dataset_and_online_rows_go_through_the_same_transform(iql, tmp_path):
    """The same steps, once as a file and once as they happen, are the same transitions, over the
    time limit of 200 steps and for two seeds side by side."""
    actions = np.random.default_rng(0).uniform(-0.99, 0.99, (205, 2, 1)).astype(np.float32)
    datasets = [
        iql.read_dataset(write_flat(tmp_path / f"{i}.npz", recorded_rows(
            iql, "Pendulum-v1", 7 + i, 2 * actions[:, i])))
        for i in range(2)
    ]  # fmt: skip
    config = iql.Config(normalize_observations=True, normalize_returns=True, reward_shift=-1.0)
    transform = iql.fit_transform(datasets[0], gym.make("Pendulum-v1").action_space, config)
    run = online_run(iql, "Pendulum-v1", transform, num_seeds=2, seed=7)
    online = play(iql, run, actions)
    assert [(i, length) for i, _, length in run.rollout.finished] == [(0, 200), (1, 200)]
    for i, arrays in enumerate(datasets):
        offline = iql.agent_batch(arrays, transform)
        for field in dataclasses.fields(iql.Batch)[:5]:
            found, expected = (getattr(batch, field.name) for batch in (online, offline))
            np.testing.assert_allclose(found[:, i], expected, rtol=1e-5, atol=1e-5,
                                       err_msg=field.name)
        assert (online.masks == 1).all()  # Pendulum only ends by its time limit
        last, first = online.next_observations[199, i], online.observations[200, i]
        assert np.abs(last - first).max() > 0.01  # the one before the reset, not the one after


def test_a_termination_has_mask_0_and_the_last_observation(iql):
    """InvertedPendulum-v5 ends when its pole leans by 0.2: in the next observation it does."""
    run = online_run(iql, "InvertedPendulum-v5", identity(iql, 4))
    online = play(iql, run, np.ones((60, 1, 1), np.float32))
    leaning = np.abs(online.next_observations[:, 0, 1]) > 0.2
    assert leaning.sum() >= 2  # several episodes
    np.testing.assert_array_equal(online.masks[:, 0], ~leaning)
    ends = np.flatnonzero(leaning[:-1])
    assert (np.abs(online.observations[ends + 1, 0]) <= 0.01).all()  # starts are near upright
    assert run.rollout.episodes[0] == leaning.sum()


# ---------------------------------------------------------------------------------- Replay buffer


def transition(iql, i):
    """A transition that carries its number in every field."""
    i = np.float32(i)
    return iql.Batch(np.array([i, i]), np.array([i]), i, np.array([i, i]) + 0.5, i)


def filled(iql, numbers, capacity, unfilled=99.0):
    """A buffer with transitions of these numbers; every other row is marked."""
    numbers = [*numbers] + [unfilled] * (capacity - len(numbers))
    rows = jax.tree.map(lambda *xs: np.stack(xs), *[transition(iql, i) for i in numbers])
    return jax.device_put(rows)


def test_the_buffer_is_a_ring_per_seed(iql):
    """Five transitions into three places: the oldest two are gone, and no seed sees another's."""
    buffers = jax.device_put(iql.empty_buffers(2, 3, iql.blank_transition(2, 1)))
    for i in range(5):
        both = transition(iql, i), transition(iql, 10 + i)
        buffers = iql.insert_transitions(buffers, jax.tree.map(lambda *xs: np.stack(xs), *both))
        np.testing.assert_array_equal(buffers.size, [min(i + 1, 3)] * 2)
    expected = np.array([[3, 4, 2], [13, 14, 12]])
    for found in (buffers.rows.rewards, buffers.rows.masks, buffers.rows.actions[..., 0],
                  buffers.rows.observations[..., 1], buffers.rows.next_observations[..., 0] - 0.5):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(buffers.position, [2, 2])


def test_sample_stays_below_size(iql):
    rows = filled(iql, range(4), 10)
    batch = iql.sample(rows, jnp.array(4), jax.random.PRNGKey(0), 400)
    values, counts = np.unique(batch.rewards, return_counts=True)
    np.testing.assert_array_equal(values, [0, 1, 2, 3])
    assert counts.min() > 60  # uniform: 100 each, standard deviation 9
    np.testing.assert_array_equal(batch.observations[:, 0], batch.rewards)  # rows stay together


@pytest.mark.parametrize("size", [0, 1, 100])
def test_sample_union_draws_every_transition_alike(iql, size):
    """300 rows of data and `size` in a buffer of 500: each of them equally often."""
    dataset = filled(iql, range(-300, 0), 300)
    buffer = SimpleNamespace(rows=filled(iql, range(size), 500, unfilled=1e6), size=jnp.array(size))
    batch = iql.sample_union(dataset, buffer, jax.random.PRNGKey(1), 20_000)
    values, counts = np.unique(batch.rewards, return_counts=True)
    np.testing.assert_array_equal(values, np.arange(-300, size))
    expected = 20_000 / (300 + size)
    assert np.abs(counts - expected).max() < 6 * expected**0.5
    share = (np.asarray(batch.rewards) >= 0).mean()
    assert abs(share - size / (300 + size)) < 0.02
    for column in (batch.observations[:, 1], batch.actions[:, 0], batch.masks,
                   batch.next_observations[:, 0] - 0.5):
        np.testing.assert_array_equal(column, batch.rewards)


def test_the_pendulum_rows_of_the_tests_fit_their_environment(iql, tmp_path):
    """What other tests build on: time limits only, and a box of [-2, 2] that is rescaled."""
    path = write_flat(tmp_path / "pendulum.npz", pendulum_rows(450))
    arrays, env = iql.read_dataset(path), gym.make("Pendulum-v1")
    iql.check_dataset(arrays, env, path)
    np.testing.assert_array_equal(np.flatnonzero(arrays["ends"]), [199, 399, 449])
    assert not arrays["terminals"].any()
    assert iql.fit_transform(arrays, env.action_space, iql.Config()).action_scale == 2.0
