"""Do the algorithms still learn? Small problems whose answers are known, solved by way of the
scripts' own data path, update loop and main()."""

import gymnasium as gym
import jax
import minari
import numpy as np
import pytest
from conftest import read_metrics
from minari.data_collector import EpisodeBuffer

OBSERVATIONS = np.float32(200 + 50 * np.eye(5))  # of the states 0 ... 4 of a chain, unhandy
UNITS = ["--normalize-observations", "--no-normalize-returns", "--reward-scale=2",
         "--reward-shift=-0.1"]  # fmt: skip
CHAIN = ["--dataset=chain-v0", *UNITS, "--hidden-dims", "32", "32", "--learning-rate=1e-3"]
IQL = ["--tau=0.05", "--beta=10", "--discount=0.9"]


# -------------------------------------------------------------------------------- A chain of states
class Chain(gym.Env):
    """An action above 1 goes right, another one left, and costs 0.1. Right of state 4 the episode
    terminates with a gain of 1; after 3 steps it is cut, which must not count as an end."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (5,))
    action_space = gym.spaces.Box(-2.0, 2.0, (1,))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.np_random.integers(5)
        return OBSERVATIONS[self.state], {}

    def step(self, action):
        reward, self.state, terminated = chain_step(self.state, action[0] > 1)
        return OBSERVATIONS[self.state], reward, terminated, False, {}


gym.register("Chain-v0", f"{__name__}:Chain", max_episode_steps=3)


def chain_step(state, right):
    """Reward, next state, terminated; after the end the observation is that of state 0."""
    if right and state == 4:
        return 0.9, 0, True
    return -0.1, state + 1 if right else max(state - 1, 0), False


def play(actions, seed_of):
    """The rows of a Batch as the environment itself gives them; seed_of(n): of the nth reset."""
    env, rows, episode = gym.make("Chain-v0"), [], 0
    observation, _ = env.reset(seed=seed_of(0))
    for action in actions:
        following, reward, terminated, truncated, _ = env.step(action)
        ended = terminated or truncated
        rows.append((observation, action, reward, following, not terminated, ended))
        observation = following
        if ended:
            episode += 1
            observation, _ = env.reset(seed=seed_of(episode))
    return [np.array(column) for column in zip(*rows, strict=True)]


def record(name, actions):
    """Play, write a Minari dataset of the episodes that ended, and return its rows."""
    rows, episodes = play(np.float32(actions)[:, None], lambda episode: episode), []
    last = np.flatnonzero(rows[5]) + 1
    for begin, end in zip([0, *last[:-1]], last, strict=True):
        s, a, r, following, masks, ends = (column[begin:end] for column in rows)
        episodes.append(EpisodeBuffer(
            observations=np.append(s, following[-1:], axis=0), actions=a, rewards=list(r),
            terminations=list(~masks), truncations=list(ends & masks),
        ))  # fmt: skip
    with pytest.warns():  # Minari asks for authors
        minari.create_dataset_from_buffers(name, env=gym.make("Chain-v0"), buffer=episodes)
    return [column[: last[-1]] for column in rows]


@pytest.fixture(scope="module")
def chain():
    """Rows of the dataset chain-v0: 40 % of the actions go right."""
    return record("chain-v0", np.random.default_rng(0).choice([1.4, -1.4], 1500, p=[0.4, 0.6]))


def same_in_units(found, rows, data, high):
    """`found`, by field, are the rows in the units of an agent trained on `data` with UNITS."""
    mean, std = data[0].mean(axis=0), data[0].std(axis=0) + 1e-3
    s, a, r, after, mask, end = rows
    expected = {"observations": (s - mean) / std, "actions": a / high, "rewards": 2 * r - 0.1,
                "next_observations": (after - mean) / std, "masks": mask, "ends": end}  # fmt: skip
    for name, x in expected.items():
        np.testing.assert_allclose(found[name], x, rtol=1e-4, atol=1e-4, err_msg=name)


# --------------------------------------------------------------------------- Rows of data and steps
@pytest.mark.parametrize(("size", "high"), [(2, 2.0), (1, 1.0)])
def test_the_dataset_is_the_episodes_in_the_agents_units(iql, size, high):
    """Where no action of the data leaves [-1, 1], that part of the box is the agent's."""
    rows = record(f"chain{size}-v0", np.random.default_rng(1).choice([-size, 0.6 * size], 200))
    dataset, source = iql.load_dataset(*iql.parse_config([f"--dataset=chain{size}-v0", *UNITS]))
    same_in_units(vars(dataset), rows, rows, high)
    assert source["units"]["actions"] == [high] and np.abs(dataset.actions).max() < 1
    assert size == 1 or len(np.unique(rows[4][rows[5]])) == 2  # ends of both kinds


def test_normalised_returns(iql, pendulum):
    config, data, env = iql.parse_config(["--dataset", pendulum, "--normalize-returns"])
    returns = [episode.rewards.sum() for episode in data.iterate_episodes()]
    units = iql.load_dataset(config, data, env)[1]["units"]
    np.testing.assert_allclose(units["rewards"], [1000 / np.ptp(returns), 0], rtol=1e-5)


OWN_LOOPS = {  # and those that share theirs
    "iql": "--offline-steps=20",
    "sac": "--warmup-steps=50",
    "adaptive_bc": "--offline-steps=20 --utd-ratio=1 --reference-returns -1 1",
    "off2on": "--offline-steps=20 --warmup-steps=50 --first-updates=1 --num-members=2 "
    "--num-actions=2 --critic-hidden-dims 16 16",
}


@pytest.mark.parametrize("name", OWN_LOOPS)
def test_online_transitions_are_the_environments(request, name, chain, tmp_path, monkeypatch):
    """The last two rounds of three, of two seeds, in a ring that is full: re-played from each
    round's seed they are the same, and a round's end is not a termination."""
    script, size, sizes = request.getfixturevalue(name), 60, []
    step = script.online_step
    spy = lambda *args, **kwargs: sizes.append(args[2]) or step(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(script, "online_step", spy)
    script.main([
        *CHAIN, "--env-id=Chain-v0", "--seed=7", "--num-seeds=2", "--eval-episodes=1",
        *OWN_LOOPS[name].split(), "--online-steps=100", "--interval=40",
        f"--buffer-size={size}", f"--run-dir={tmp_path}",
    ])  # fmt: skip
    arrays, _ = script.load(tmp_path)
    if name in ("iql", "sac"):
        assert list(arrays["agents/critic/step"]) == [120 if name == "iql" else 50] * 2
        assert name == "sac" or len({row["v"] for row in read_metrics(tmp_path)[:2]}) == 2  # keys
        assert sizes == [*range(41), 0, *range(41, 60), *[60] * 21, 0, *[60] * 20]
    kept = {path.split("/")[-1]: x for path, x in arrays.items() if path.startswith("buffers")}
    buffers = {field: kept[field] for field in script.Batch.__annotations__ if field in kept}
    for i, first, last in [(0, 40, 80), (0, 80, 100), (1, 40, 80), (1, 80, 100)]:
        found = {name: x[i, np.arange(first, last) % size] for name, x in buffers.items()}
        rows = play(2 * found["actions"], {0: 10**9 * (7 + i + 1) + first}.get)
        rows[5][-1] = True
        same_in_units(found, rows, chain, 2.0)


@pytest.mark.parametrize(("name", "oldest"), [("iql", -300), ("sac", 0)])
def test_online_batches_draw_every_transition_alike(request, name, oldest):
    """From 300 rows of data, where the script uses them, and the 100 filled ones of 500."""
    script, numbers = request.getfixturevalue(name), np.float32([*range(-300, 100), *[1e6] * 400])
    rows = [script.Batch(*[jax.device_put(x)] * 6) for x in np.split(numbers, [300])]
    batch = script.online_batch(*rows, 100, jax.random.PRNGKey(0), script.Config(batch_size=20_000))
    found, counts = np.unique(batch.rewards, return_counts=True)
    np.testing.assert_array_equal(found, np.arange(oldest, 100))
    assert np.abs(counts - counts.mean()).max() < 6 * counts.mean() ** 0.5
    assert all((x == batch.rewards).all() for x in jax.tree.leaves(batch))


# ------------------------------------------------------------------------------------- Known optima
def trained(script, config, dataset, steps):
    """The agent after each twentieth of the updates, and the last metrics."""
    inputs, agents = (dataset.observations[:1], dataset.actions[:1], config), []
    agent = script.create_agent(jax.random.PRNGKey(0), *inputs)
    agent = jax.tree.map(lambda x: np.asarray(x)[None], agent)
    for _ in range(20):
        agent, info = script.update_steps(agent, dataset, config, script.update, steps // 20)
        agents.append(jax.tree.map(lambda x: x[0], agent))
    return agents, {name: x[0] / (steps // 20) for name, x in info.items()}


@pytest.mark.parametrize("name", ["iql", "sac"])
def test_a_bandit_is_solved(request, name):
    """States -1 and 1, uniform actions, reward 1 - (a - s / 2)^2, and the episode is over: Q is the
    reward, the policy's action s / 2; SAC's entropy settles at its target of -1."""
    script, rng = request.getfixturevalue(name), np.random.default_rng(0)
    s, a = rng.choice([-1.0, 1.0], (2000, 1)), rng.uniform(-1, 1, (2000, 1))
    rewards, ends = 1 - (a - s / 2)[:, 0] ** 2, np.ones(2000)
    dataset = script.Batch(*map(np.float32, (s, a, rewards, 50 + s, 1 - ends, ends)))
    own = dict(beta=20.0, expectile=0.8, offline_steps=2000) if name == "iql" else {}
    config = script.Config(hidden_dims=(32, 32), batch_size=64, tau=0.05, learning_rate=3e-3, **own)
    agents, info = trained(script, config, dataset, 2000 if name == "iql" else 6000)
    agent, states = agents[-1], np.float32([[-1], [1]])
    q = agent.critic.apply_fn(agent.critic.params, dataset.observations, dataset.actions)
    assert np.abs(q - rewards).mean() < 0.05
    np.testing.assert_allclose(script.act(agent, states, config), states / 2, atol=0.1)
    assert name == "iql" or abs(info["entropy"] + 1) < 0.2


def chain_values(expectile, share):
    """V (5,): the expectile of Q over the two actions, `share` of them right; 1.0: the maximum."""
    v = np.zeros(5)
    for _ in range(200):
        q = np.zeros((5, 2))
        for s, right in np.ndindex(5, 2):
            reward, following, terminated = chain_step(s, right)
            q[s, right] = 2 * reward - 0.1 + 0.9 * v[following] * (not terminated)
        weight = np.stack([1 - share, share], axis=1)
        weight = weight * np.where(q == q.max(axis=1, keepdims=True), expectile, 1 - expectile)
        v = (weight * q).sum(axis=1) / weight.sum(axis=1)
    return v


@pytest.mark.parametrize(("expectile", "level"), [(0.8, 0.8), (0.99, 1.0)])
def test_iql_finds_the_values_of_a_chain(iql, chain, expectile, level):
    """V is the expectile's fixed point, for 0.99 within tolerance value iteration's maximum."""
    flags = [*CHAIN, *IQL, f"--expectile={expectile}", "--no-decay-actor-lr"]
    config, *inputs = iql.parse_config(flags)
    dataset, source = iql.load_dataset(config, *inputs)
    agents, _ = trained(iql, config, dataset, 5000)
    share = np.array([(chain[1][chain[0].argmax(axis=1) == i] > 1).mean() for i in range(5)])
    states = iql.rescale(OBSERVATIONS, *map(np.array, source["units"]["observations"]))
    # the mean over the last half takes the noise of single batches out
    v = np.mean([x.value.apply_fn(x.value.params, states) for x in agents[10:]], axis=0)
    np.testing.assert_allclose(v, chain_values(level, share), atol=0.05)


def test_main_is_optimal_offline_and_online_and_imitation_is_not(iql, bc, chain, tmp_path):
    """From state 2, 3 or 4 the end is reached in 3 steps; from the others it is not."""
    starts = [gym.make("Chain-v0").reset(seed=10_000 * 3 + i)[0].argmax() for i in range(20)]
    flags = [*CHAIN, "--seed=3", "--eval-episodes=20", "--offline-steps=3000", "--interval=200"]
    iql.main([*flags, *IQL, "--online-steps=400", f"--run-dir={tmp_path}/iql"])
    bc.main([*flags, f"--run-dir={tmp_path}/bc"])
    bc.main([*flags, "--best-share=0", f"--run-dir={tmp_path}/best"])  # of one trajectory
    found = {name: read_metrics(tmp_path / name) for name in ("iql", "bc", "best")}
    returns = {name: [float(row["return"]) for row in rows] for name, rows in found.items()}
    optimum = pytest.approx(np.mean(np.array([-0.3, -0.3, 0.7, 0.8, 0.9])[starts]))
    errors = [float(found[name][-1]["mean_error"]) for name in ("best", "bc")]
    assert [row["phase"] for row in found["iql"]] == ["offline"] * 15 + ["online"] * 2
    assert returns["iql"][12:] == [optimum] * 5
    assert all(abs(float(row["v"])) < 2 for row in found["iql"])  # a mean, not a sum
    assert max(returns["bc"]) < 0.5 * optimum.expected and errors[0] < 0.5 * errors[1]
