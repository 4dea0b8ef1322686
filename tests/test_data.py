"""From a file or an environment to the transitions an agent learns from: nothing is mixed up.

The episodes here are written by hand, and so are the numbers that must come out of
`collect.py convert` and a script's load_dataset.
"""

from types import SimpleNamespace

import gymnasium as gym
import h5py
import jax
import minari
import numpy as np
import pytest
from conftest import load_script
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from minari.data_collector import EpisodeBuffer

# Five episodes in nine rows: a termination, a time limit, a single step to a termination, a
# single step to a time limit, and one that the end of the file cuts off.
TERMINALS = np.array([0, 0, 1, 0, 0, 1, 0, 0, 0], bool)
TIMEOUTS = np.array([0, 0, 0, 0, 1, 0, 1, 0, 0], bool)
ENDS = np.array([0, 0, 1, 0, 1, 1, 1, 0, 1], bool)
REWARDS = np.array([1.0, 2.0, 3.0, 10.0, 20.0, 5.0, 7.0, 100.0, 200.0])
# An observation is (episode, step), so that one can see where it comes from.
OBSERVATIONS = np.float32(
    [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [2, 0], [3, 0], [4, 0], [4, 1]]
)  # fmt: skip
NEXT = OBSERVATIONS + np.float32([0, 1])
ACTIONS = np.linspace(-0.8, 0.8, 9, dtype=np.float32)[:, None]
FLAT = {"observations": OBSERVATIONS, "actions": ACTIONS, "rewards": REWARDS,
        "terminals": TERMINALS, "timeouts": TIMEOUTS}  # fmt: skip
SEGMENTS = {"seg_end_index": np.flatnonzero(ENDS), "seg_end_next_observations": NEXT[ENDS]}


class PlainEnv(gym.Env):
    """Observations are (0, step), rewards the action."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))

    def __init__(self, high=1.0, render_mode=None):
        self.action_space = gym.spaces.Box(-np.float32(high), np.float32(high), (1,))

    def reset(self, seed=None, options=None):
        self.steps = 0
        return np.float32([0, 0]), {}

    def step(self, action):
        self.steps += 1
        return np.float32([0, self.steps]), float(action[0]), False, False, {}


@pytest.fixture(scope="module")
def collect():
    return load_script("baselines/collect.py")


@pytest.fixture(autouse=True)
def environments(tmp_path, monkeypatch):
    """Plain-v0 and an empty folder of Minari datasets, beside the working folder."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    monkeypatch.chdir(tmp_path)
    gym.register("Plain-v0", "test_data:PlainEnv")
    yield
    gym.registry.pop("Plain-v0")


def load(iql, name="mine/new-v0", *flags):
    """A dataset's rows and source, as iql.py loads it."""
    flags = ["--dataset", name, "--no-normalize-returns", *flags]
    return iql.load_dataset(*iql.parse_config(flags))


@pytest.fixture(params=[".npz", ".hdf5"])
def read(request, iql, collect):
    """Write fields to a flat file of either kind, convert it, and load that as iql.py does."""

    def write_and_read(fields):
        np.savez("x.npz", **fields)
        with h5py.File("x.hdf5", "w") as file:
            file.update(fields)
        flags = "--env-id", "Plain-v0", "--id", "mine/new-v0", "--force"
        collect.main(["convert", f"x{request.param}", *flags])
        return load(iql)[0]

    return write_and_read


# ------------------------------------------------------------------------------------- Flat files
def test_without_next_observations_rows_cut_by_a_time_limit_are_dropped(read, capsys):
    rows = read(FLAT)
    kept = [0, 1, 2, 3, 5, 7]
    np.testing.assert_array_equal(rows.rewards, REWARDS[kept])
    np.testing.assert_array_equal(rows.observations, OBSERVATIONS[kept])
    np.testing.assert_array_equal(rows.masks, [1, 1, 0, 1, 0, 1])
    np.testing.assert_array_equal(rows.ends, [0, 0, 1, 1, 1, 1])
    continues = rows.masks == 1
    np.testing.assert_array_equal(rows.next_observations[continues], NEXT[[0, 1, 3, 7]])
    assert "dropped     3 rows" in capsys.readouterr().out


@pytest.mark.parametrize("more", [{"next_observations": NEXT}, SEGMENTS])
def test_with_next_observations_every_row_is_kept_and_time_limits_bootstrap(read, more):
    rows = read(FLAT | more)
    np.testing.assert_array_equal(rows.ends, ENDS)
    np.testing.assert_array_equal(rows.masks, [1, 1, 0, 1, 1, 0, 1, 1, 1])
    np.testing.assert_array_equal(rows.next_observations, NEXT)
    np.testing.assert_allclose(rows.actions, ACTIONS, atol=1e-7)
    np.testing.assert_array_equal(rows.rewards, REWARDS)


def test_a_segment_end_not_in_the_file_stays_unknown(read):
    some = {name: values[:2] for name, values in SEGMENTS.items()}  # rows 2 and 4 only
    np.testing.assert_array_equal(read(FLAT | some).rewards, REWARDS[[0, 1, 2, 3, 4, 5, 7]])


@pytest.mark.parametrize("more", [{"next_observations": NEXT}, SEGMENTS])
def test_ends_without_timeouts(read, more):
    """A jump in the observations ends an episode, and so does a segment."""
    fields = {name: values for name, values in FLAT.items() if name != "timeouts"}
    np.testing.assert_array_equal(read(fields | more).ends, ENDS)


def test_a_termination_at_the_time_limit_is_a_termination(read):
    rows = read(FLAT | {"timeouts": TIMEOUTS | TERMINALS})
    np.testing.assert_array_equal(rows.masks, [1, 1, 0, 1, 0, 1])
    dataset = minari.load_dataset("mine/new-v0")
    flags = [(bool(e.terminations[-1]), bool(e.truncations[-1])) for e in dataset]
    assert flags == [(True, False), (False, True), (True, False), (False, True)]


def test_columns_and_numbers_serve_as_well_as_vectors_and_booleans(read):
    columns = ("rewards", "terminals", "timeouts")
    plain = read(FLAT)
    other = read(FLAT | {name: FLAT[name].astype(np.float32)[:, None] for name in columns})
    jax.tree.map(np.testing.assert_array_equal, plain, other)


episodes = st.lists(st.tuples(st.integers(1, 6), st.booleans()), min_size=1, max_size=8)


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(episodes, st.sampled_from(["next", "next only", "segments", "none"]))
def test_no_transition_crosses_an_end(iql, collect, tmp_path, episodes, layout):
    """Whatever the episodes (length, terminated or cut) and the layout of the file."""
    lengths = np.array([length for length, _ in episodes])
    last, episode = np.cumsum(lengths) - 1, np.repeat(np.arange(len(lengths)), lengths)
    step = np.concatenate([np.arange(length) for length in lengths])
    observations = np.stack([episode, step], axis=1).astype(np.float32)
    terminated = np.array([terminated for _, terminated in episodes])
    fields = {"observations": observations, "actions": np.zeros((len(step), 1))}
    fields["rewards"], following = episode + 0.01 * step, observations + np.float32([0, 1])
    fields["terminals"], fields["timeouts"] = np.zeros((2, len(step)), bool)
    fields["terminals"][last], fields["timeouts"][last] = terminated, ~terminated
    if layout.startswith("next"):
        fields["next_observations"] = following
    if layout == "next only":
        del fields["timeouts"]
    if layout == "segments":
        fields |= {"seg_end_index": last, "seg_end_next_observations": following[last]}
    np.savez("property.npz", **fields)
    split = list(collect.split_episodes(collect.read_flat_file(collect.Path("property.npz"))))
    lost = (~terminated).sum() if layout == "none" else 0
    assert sum(len(e.rewards) for e in split) == len(step) - lost
    if not split:
        return
    env = gym.make("Plain-v0")
    collect.check_episodes(split, env, "source")
    (tmp_path / "main_data.hdf5").write_bytes(b"")
    storage = SimpleNamespace(data_path=tmp_path, metadata={})
    data = SimpleNamespace(iterate_episodes=lambda: split, storage=storage)
    batch, _ = iql.load_dataset(iql.Config(), data, env)
    continues = batch.masks == 1
    expected = batch.observations[continues] + np.float32([0, 1])
    np.testing.assert_array_equal(batch.next_observations[continues], expected)
    assert (batch.masks == 0).sum() == terminated.sum() and batch.ends.sum() == len(split)
    expected = batch.observations @ np.float32([1, 0.01])
    np.testing.assert_allclose(batch.rewards, expected, atol=1e-5)


# --------------------------------------------------------------------------------- Minari datasets
def episode_buffer(observations, actions, rewards, terminated=False, truncated=False):
    """One episode of T steps; `observations` has T + 1."""
    last = np.arange(len(rewards)) == len(rewards) - 1
    return EpisodeBuffer(
        observations=observations, actions=np.float32(actions), rewards=list(rewards),
        terminations=list(last & terminated), truncations=list(last & truncated),
    )  # fmt: skip


def test_minari_episodes_end_where_they_end(iql):
    """The last observation of an episode is a next observation, and never a start."""
    first, second, third = (np.float32([[i, j] for j in range(n)]) for i, n in enumerate((4, 2, 2)))
    minari.create_dataset_from_buffers("test/plain-v0", [
        episode_buffer(first, [[0.1], [0.2], [0.3]], [1.0, 2.0, 3.0], terminated=True),
        episode_buffer(second, [[0.4]], [10.0], truncated=True),
        episode_buffer(third, [[0.5]], [20.0]),  # cut off by its collector, without a flag
    ], env="Plain-v0")  # fmt: skip
    rows, source = load(iql, "test/plain-v0")
    np.testing.assert_array_equal(rows.ends, [0, 0, 1, 1, 1])
    np.testing.assert_array_equal(rows.masks, [1, 1, 0, 1, 1])
    expected = np.float32([[0, 0], [0, 1], [0, 2], [1, 0], [2, 0]])
    np.testing.assert_array_equal(rows.observations, expected)
    np.testing.assert_array_equal(rows.next_observations, expected + np.float32([0, 1]))
    np.testing.assert_allclose(rows.actions[:, 0], [0.1, 0.2, 0.3, 0.4, 0.5])
    assert source["reference"] == [None, None]
    short = episode_buffer(first[:3], [[0.1], [0.2], [0.3]], [1.0, 2.0, 3.0])  # Minari's issue 199
    minari.create_dataset_from_buffers("test/short-v0", [short], env="Plain-v0")
    with pytest.raises(SystemExit, match="bad rows"):
        load(iql, "test/short-v0")


def test_dict_observations_are_flattened_like_the_environments(iql):
    env = gym.make("gymnasium_robotics:FrankaKitchen-v1")  # Dicts in a Dict
    action = np.full(9, 0.1, np.float32)
    observations = [env.reset(seed=3)[0]] + [env.step(action)[0] for _ in range(3)]
    stacked = jax.tree.map(lambda *xs: np.stack(xs), *observations)
    buffer = episode_buffer(stacked, [action] * 3, [0.0, 1.0, 2.0], truncated=True)
    minari.create_dataset_from_buffers("test/goal-v0", [buffer], env=env)
    rows, source = load(iql, "test/goal-v0")
    for wrapped in (iql.make_env(source), gym.wrappers.FlattenObservation(env)):
        flat = [wrapped.reset(seed=3)[0]] + [wrapped.step(action)[0] for _ in range(3)]
        np.testing.assert_allclose(rows.observations, flat[:-1], atol=1e-6)
        np.testing.assert_allclose(rows.next_observations, flat[1:], atol=1e-6)
    assert len(set(flat[0])) > 20


# ------------------------------------------------------------------------------------------- Units
@pytest.mark.parametrize("high, largest, scale", [
    (1.0, 0.5, 1.0), (5.0, 0.5, 1.0), (5.0, 2.0, 5.0), (0.5, 0.25, 0.5),
])  # fmt: skip
@pytest.mark.parametrize("converted", [False, True])
def test_actions_pass_or_are_rescaled(iql, collect, high, largest, scale, converted):
    """Unchanged where all are in [-1, 1] and the box contains it, else divided by its bound; what
    the environment gets (its reward here) are the data's actions, on either way."""
    gym.registry["Plain-v0"].kwargs["high"] = high
    actions = largest * np.linspace(-1, 1, 9, dtype=np.float32)[:, None]
    if converted:
        np.savez("x.npz", **FLAT | SEGMENTS | {"actions": actions})
        collect.main(["convert", "x.npz", "--env-id", "Plain-v0", "--id", "mine/new-v0"])
    else:
        buffer = episode_buffer(np.zeros((10, 2)), actions, np.zeros(9))
        minari.create_dataset_from_buffers("mine/new-v0", [buffer], env="Plain-v0")
    rows, source = load(iql)
    np.testing.assert_allclose(rows.actions, actions / scale, atol=2e-5)
    env = iql.make_env(source)
    env.reset(seed=0)
    np.testing.assert_allclose([env.step(a)[1] for a in rows.actions], actions[:, 0], atol=1e-4)
    assert np.isfinite(np.arctanh(rows.actions)).all() and env.action_space.high == [1.0]


@pytest.mark.parametrize("converted", [False, True])
def test_dataset_and_environment_are_in_the_same_units(iql, collect, converted):
    """The same steps, once as data and once as they happen, are the same transitions: over the time
    limit of 200 steps, in a box of [-2, 2] and with every transformation of the Config."""
    raw, actions = gym.make("Pendulum-v1"), np.random.default_rng(0).uniform(-1.9, 1.9, (2, 200, 1))
    buffers = []
    for number, part in enumerate(actions.astype(np.float32)):
        first, _ = raw.reset(seed=number)
        steps = [raw.step(action) for action in part]
        observations = np.array([first, *(step[0] for step in steps)])
        rewards = np.array([step[1] for step in steps])
        buffers.append(episode_buffer(observations, part, rewards, truncated=steps[-1][3]))
    rewards = np.array([buffer.rewards for buffer in buffers])  # (2, 200)
    if converted:
        before, after = (np.concatenate([b.observations[x] for b in buffers])
                         for x in (slice(0, -1), slice(1, None)))  # fmt: skip
        rows = {"observations": before, "next_observations": after, "actions": actions}
        rows |= {"rewards": rewards, "terminals": np.zeros(400)}
        rows = {name: x.reshape(400, -1) for name, x in rows.items()}
        np.savez("x.npz", **rows)
        collect.main(["convert", "x.npz", "--env-id", "Pendulum-v1", "--id", "mine/new-v0"])
    else:
        minari.create_dataset_from_buffers("mine/new-v0", buffers, env="Pendulum-v1")
    flags = "--normalize-observations", "--normalize-returns", "--reward-shift", "-1.5"
    rows, source = load(iql, "mine/new-v0", *flags)
    assert (rows.masks == 1).all() and np.flatnonzero(rows.ends).tolist() == [199, 399]
    expected = rewards.reshape(-1) * 1000 / np.ptp(rewards.sum(axis=1)) - 1.5
    np.testing.assert_allclose(rows.rewards, expected, rtol=1e-4)
    np.testing.assert_allclose(rows.observations.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(rows.observations.std(axis=0), 1, atol=5e-3)
    env, after = iql.make_env(source), None
    for t, action in enumerate(rows.actions):
        before = env.reset(seed=t // 200)[0] if t % 200 == 0 else after
        after, reward, terminated, truncated, _ = env.step(action)
        np.testing.assert_allclose(before, rows.observations[t], atol=1e-3)
        np.testing.assert_allclose(after, rows.next_observations[t], atol=1e-3)
        np.testing.assert_allclose(reward, rows.rewards[t], rtol=1e-3, atol=1e-3)
        assert (terminated, truncated) == (rows.masks[t] == 0, rows.ends[t] == 1)
