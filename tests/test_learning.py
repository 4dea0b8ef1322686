"""Do the algorithms still learn? Small problems whose answers are known, solved by way of the
scripts' own data path, update loop and main()."""

import csv
import shutil
from pathlib import Path

import gymnasium as gym
import jax
import numpy as np
import pytest

# --------------------------------------------------------------------------- One step: a bandit


def best_action(observations):
    return 0.5 * observations[:, 0]


def bandit_rows(size=2000, seed=0):
    """States -1 and 1, uniform actions, reward 1 - (a - best)^2, and the episode is over."""
    rng = np.random.default_rng(seed)
    observations = rng.choice([-1.0, 1.0], (size, 1)).astype(np.float32)
    actions = rng.uniform(-1, 1, (size, 1)).astype(np.float32)
    rewards = 1 - (actions[:, 0] - best_action(observations)) ** 2
    return {"observations": observations, "actions": actions, "rewards": rewards,
            "terminals": np.ones(size, bool), "next_observations": 50 + observations}


def one_agent(script, config, observation_dim):
    return script.create_shards(config, observation_dim, 1, jax.devices()[:1])[0]


def first(state):
    """The first seed's agent, without the axis of seeds."""
    return jax.tree.map(lambda x: x[0], state)


def offline_agents(iql, path, box, config):
    """The agent at each twentieth of config.offline_steps updates on a flat file, and the file's
    transform."""
    arrays = iql.read_dataset(path)
    transform = iql.fit_transform(arrays, box, config)
    dataset = iql.agent_batch(arrays, transform)
    state = one_agent(iql, config, arrays["observations"].shape[1])
    agents = []
    for _ in range(20):
        state, _ = iql.update_steps(state, dataset, config, config.offline_steps // 20)
        agents.append(first(state))
    return agents, transform


def test_iql_solves_a_bandit(iql, tmp_path):
    """Q is the reward; the policy's mean, of actions weighted by exp(20 A), is the best action."""
    rows = bandit_rows()
    np.savez(tmp_path / "bandit.npz", **rows)
    config = iql.Config(
        hidden_dims=(32, 32), learning_rate=3e-3, batch_size=128, tau=0.05, beta=20.0,
        expectile=0.8, offline_steps=1500,
    )
    box = gym.spaces.Box(-1, 1, (1,))
    state = offline_agents(iql, tmp_path / "bandit.npz", box, config)[0][-1]
    q = state.critic.apply_fn(state.critic.params, rows["observations"], rows["actions"])
    assert np.abs(q - rows["rewards"]).mean() < 0.05
    states = np.array([[-1.0], [1.0]], np.float32)
    found = iql.mode_actions(state, states)[:, 0]
    np.testing.assert_allclose(found, best_action(states), atol=0.06)


def test_sac_solves_a_bandit(sac):
    """Q is the reward, the mode the best action, and the entropy settles at its target of -1."""
    rows = bandit_rows()
    config = sac.Config(
        hidden_dims=(32, 32), learning_rate=5e-3, batch_size=64, tau=0.05, utd_ratio=500
    )
    buffer = sac.empty_buffers(1, len(rows["rewards"]), sac.blank_transition(1, 1))
    names = ("observations", "actions", "rewards", "next_observations")
    kept = {name: np.float32(rows[name])[None] for name in names}  # (1, N, ...)
    full = np.full(1, len(rows["rewards"]), np.int32)
    buffer = buffer.replace(rows=buffer.rows.replace(**kept), size=full)
    state, observations = one_agent(sac, config, 1), np.ones((1, 1), np.float32)
    for _ in range(12):
        state, _, info = sac.online_step(state, buffer, observations, None, config, True)
    state = first(state)
    q = state.critic.apply_fn(state.critic.params, rows["observations"], rows["actions"])
    assert np.abs(q - rows["rewards"]).mean() < 0.05
    states = np.array([[-1.0], [1.0]], np.float32)
    found = sac.mode_actions(state, states)[:, 0]
    np.testing.assert_allclose(found, best_action(states), atol=0.1)
    assert abs(info["entropy"][0] + 1) < 0.2


# ------------------------------------------------------- Many steps: a chain with known values
# States 0 ... 4, one-hot. An action of +1.4 goes right, -1.4 left, in a box [-2, 2]. Right of state
# 4 the episode terminates with reward 1. After 3 steps it is cut, which must not count as an end.

CHAIN = 5


def chain_step(state, right):
    """(reward, next state, terminated); after the end the observation is that of state 0."""
    if right and state == CHAIN - 1:
        return 1.0, 0, True
    return 0.0, state + 1 if right else max(state - 1, 0), False


def chain_rows(episodes=700, seed=0):
    rng, one_hot, rows = np.random.default_rng(seed), np.eye(CHAIN, dtype=np.float32), []
    for _ in range(episodes):
        state, terminated, step = rng.integers(CHAIN), False, 0
        while not terminated and step < 3:
            right, step = rng.random() < 0.4, step + 1
            reward, following, terminated = chain_step(state, right)
            action = [1.4 if right else -1.4]
            rows.append((one_hot[state], action, reward, one_hot[following], terminated,
                         step == 3 and not terminated))
            state = following
    names = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")
    return {name: np.array(column) for name, column in zip(names, zip(*rows, strict=True),
                                                           strict=True)}


def chain_values(expectile, share, discount, scale, shift):
    """V (5,): expectile of Q over the two actions, `share` of them right; 1.0: the maximum."""
    v = np.zeros(CHAIN)
    for _ in range(200):
        q = np.zeros((CHAIN, 2))
        for s, right in np.ndindex(CHAIN, 2):
            reward, following, terminated = chain_step(s, right)
            q[s, right] = scale * reward + shift + discount * v[following] * (not terminated)
        weight = np.stack([1 - share, share], axis=1)
        weight = weight * np.where(q == q.max(axis=1, keepdims=True), expectile, 1 - expectile)
        v = (weight * q).sum(axis=1) / weight.sum(axis=1)
    return v


@pytest.mark.parametrize(("expectile", "with_next"), [(0.8, True), (0.99, False)])
def test_iql_finds_the_values_of_a_chain(iql, tmp_path, expectile, with_next):
    """V is the expectile's fixed point, for 0.99 within tolerance value iteration's maximum, and
    the policy goes right. Once the file gives next observations, once they are the next rows."""
    rows = chain_rows()
    if not with_next:
        del rows["next_observations"]
    np.savez(tmp_path / "chain.npz", **rows)
    config = iql.Config(
        hidden_dims=(32, 32), learning_rate=1e-3, batch_size=128, tau=0.05, discount=0.9,
        expectile=expectile, beta=10.0, offline_steps=5000, reward_scale=2.0, reward_shift=-0.1,
        normalize_observations=True, decay_actor_lr=False,
    )
    box = gym.spaces.Box(-2, 2, (1,))
    path = tmp_path / "chain.npz"
    agents, transform = offline_agents(iql, path, box, config)
    right, s = rows["actions"][:, 0] > 0, rows["observations"].argmax(axis=1)
    share = np.array([right[s == i].mean() for i in range(CHAIN)])
    level = 1.0 if expectile == 0.99 else expectile
    expected = chain_values(level, share, 0.9, 2.0, -0.1)
    states = transform.observations(np.eye(CHAIN))
    # the mean over the last half takes the noise of single batches out
    v = np.mean([s.value.apply_fn(s.value.params, states) for s in agents[10:]], axis=0)
    np.testing.assert_allclose(v, expected, atol=0.05)
    actions = transform.environment_actions(iql.mode_actions(agents[-1], states))[:, 0]
    assert actions.min() > 0.5 or level < 1


# ------------------------------------------------------------ main(): a point mass, offline, online

GOAL = np.array([0.5, -0.5])
UNITS = np.array([200.0, -3.0]), np.array([50.0, 0.02])  # offset and scale of the observations


def position_after(position, action):
    return np.clip(position + 0.04 * action, -1, 1)


class PointMass(gym.Env):
    """A point in [-1, 1]^2 is moved by at most 0.08 per step and axis; reward: minus its distance
    to the goal. Observations are in awkward units, actions in [-2, 2]."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gym.spaces.Box(-2.0, 2.0, (2,), np.float32)

    def __init__(self, render_mode=None):
        pass

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.position = self.np_random.uniform(-1, 1, 2)
        return UNITS[0] + UNITS[1] * self.position, {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.position = position_after(self.position, np.float64(action))
        reward = -np.linalg.norm(self.position - GOAL)
        return UNITS[0] + UNITS[1] * self.position, reward, False, False, {}


def point_mass_rows(episodes=150, seed=0):
    """A controller that goes towards the goal, slowly and with much noise."""
    rng, env, rows = np.random.default_rng(seed), PointMass(), []
    for i in range(episodes):
        observation, _ = env.reset(seed=i)
        for step in range(30):
            action = np.clip(0.5 * np.sign(GOAL - env.position) + rng.normal(size=2), -2, 2)
            following, reward, *_ = env.step(action.astype(np.float32))
            rows.append((observation, action, reward, following, False, step == 29))
            observation = following
    names = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")
    return {name: np.array(column) for name, column in zip(names, zip(*rows, strict=True),
                                                           strict=True)}


@pytest.fixture(scope="module")
def point_mass(iql, tmp_path_factory):
    """`run(folder, *flags)` is main() on the point mass, in this process."""
    gym.register("PointMass-v0", entry_point=f"{__name__}:PointMass", max_episode_steps=30)
    path = tmp_path_factory.mktemp("data") / "point_mass.npz"
    np.savez(path, **point_mass_rows())

    def run(folder, *flags, resume=False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(iql, "use_all_cores", lambda num_seeds: None)  # jax runs already
            patch.setattr(iql, "catch_signals", list)
            patch.setattr(iql, "summarize", lambda run: None)  # matplotlib is slow to load
            if resume:
                iql.main(["--resume", str(folder)])
            else:
                iql.main([
                    "--dataset", str(path), "--env-id", "PointMass-v0", "--run-dir", str(folder),
                    "--normalize-observations", "--no-normalize-returns", "--reward-scale", "0.5",
                    "--reward-shift", "0.2", "--hidden-dims", "32", "32", "--learning-rate", "1e-3",
                    "--batch-size", "128", "--discount", "0.95", "--tau", "0.02", "--beta", "10",
                    "--log-interval", "400", "--eval-interval", "400", *flags,
                ])
        with open(folder / "metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        with np.load(folder / "checkpoint.npz") as file:
            return rows, {name: file[name] for name in file.files}

    yield run
    del gym.registry["PointMass-v0"]


@pytest.fixture(scope="module")
def learned(point_mass, tmp_path_factory):
    """(folder, rows of metrics.csv, checkpoint) of one whole run."""
    folder = tmp_path_factory.mktemp("runs") / "learned"
    return folder, *point_mass(folder, "--offline-steps", "2000", "--online-steps", "800")


BAR = -10.0  # trained: about -8; imitation and the data: about -19


def returns_of(rows, phase):
    return [float(row["return"]) for row in rows if row["phase"] == phase]


def test_main_learns_offline_and_stays_good_online(learned):
    _, rows, _ = learned
    print(returns_of(rows, "offline"), returns_of(rows, "online"))
    assert returns_of(rows, "offline")[-1] > BAR
    assert returns_of(rows, "online")[-1] > BAR


def test_the_bar_is_above_imitation(point_mass, tmp_path):
    rows, _ = point_mass(tmp_path / "bc", "--beta", "0", "--offline-steps", "2000",
                         "--online-steps", "0")
    print(returns_of(rows, "offline"))
    assert max(returns_of(rows, "offline")) < BAR


def test_online_transitions_are_the_environments(learned):
    """Every row of the replay buffer obeys the dynamics, in the agent's units."""
    _, _, saved = learned
    rows = {name.rpartition("/")[2]: saved[name][0].astype(np.float64)
            for name in saved if name.startswith("buffer/rows/")}
    mean, std = saved["transform/observation_mean"], saved["transform/observation_std"]

    def positions(name):
        return (rows[name] * std + mean - UNITS[0]) / UNITS[1]

    before, after = positions("observations"), positions("next_observations")
    assert len(before) == 800 and np.abs(rows["actions"]).max() <= 1
    expected = position_after(before, 2 * rows["actions"])
    np.testing.assert_allclose(after, expected, atol=2e-3)
    assert np.abs(rows["observations"]).max() < 6 and rows["observations"].std() > 0.3  # normalised
    reward = -np.linalg.norm(expected - GOAL, axis=1)
    np.testing.assert_allclose(rows["rewards"], 0.5 * reward + 0.2, atol=2e-3)
    assert (rows["masks"] == 1).all()  # time limits only
    resets = np.abs(before[1:] - after[:-1]).max(axis=1) > 1e-5
    assert list(np.flatnonzero(resets)) == list(range(29, 799, 30))


def test_a_resumed_run_learns_the_same(learned, point_mass):
    """From the checkpoint in mid-episode and mid-phase to the same end, bit for bit."""
    folder, rows, saved = learned
    other = Path(f"{folder}-resumed")
    other.mkdir()
    for name in ("config.json", "versions.json", "metrics.csv"):
        shutil.copy(folder / name, other / name)
    shutil.copy(folder / "checkpoint.previous.npz", other / "checkpoint.npz")
    again, resumed = point_mass(other, resume=True)
    timing = {"updates_per_second", "seconds"}
    assert [{k: v for k, v in row.items() if k not in timing} for row in again] == [
        {k: v for k, v in row.items() if k not in timing} for row in rows]
    saved, resumed = ({k: v for k, v in x.items() if k != "meta"} for x in (saved, resumed))
    assert saved.keys() == resumed.keys()
    for name in saved:
        np.testing.assert_array_equal(saved[name], resumed[name], err_msg=name)
