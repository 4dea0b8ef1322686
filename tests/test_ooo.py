"""OOO: a corridor whose end only the bonus finds, and the fresh agent keeps to; what is retrained
on, by which bounds, which agents."""

import gymnasium as gym
import jax
import jax.numpy as jnp
import minari
import numpy as np
import pytest
from conftest import read_arrays, read_metrics
from minari.data_collector import EpisodeBuffer


class Corridor(gym.Env):
    """From x = 0 an action is a step to the left or to the right; at 9 is a reward and the end."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,))
    action_space = gym.spaces.Box(-1.0, 1.0, (1,))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.x = 0.0
        return self.observation(), {}

    def observation(self):
        return np.float32([self.x / 3 - 1])

    def step(self, action):
        self.x = max(0.0, self.x + float(action[0]))
        return self.observation(), float(self.x >= 9), self.x >= 9, False, {}


gym.register("Corridor-v0", f"{__name__}:Corridor", max_episode_steps=20)


@pytest.fixture(scope="module")
def corridor(minari_folder):
    """Thirty episodes that tremble near the start."""
    env, rng, episodes = gym.make("Corridor-v0"), np.random.default_rng(0), []
    for _ in range(30):
        buffer = EpisodeBuffer(observations=env.reset()[0])
        for _ in range(20):
            action = np.float32(np.clip(rng.normal(-0.2, 0.5, 1), -1, 1))
            names = ("observation", "reward", "terminated", "truncated", "info")
            step = dict(zip(names, env.step(action), strict=True))
            buffer = buffer.add_step_data(step | {"action": action})
        episodes.append(buffer)
    with pytest.warns():  # Minari asks for authors
        minari.create_dataset_from_buffers("corridor-v0", env=env, buffer=episodes)
    return ["--dataset=corridor-v0", "--env-id=Corridor-v0", "--no-normalize-returns",
            "--reward-scale=10", "--bonus-scale=10", "--expectile=0.9", "--discount=0.95",
            "--hidden-dims", "32", "32", "--rnd-dims", "32", "32", "--learning-rate=1e-3",
            "--batch-size=64", "--tau=0.02", "--eval-episodes=1", "--upsample=8",
            "--offline-steps=500", "--online-steps=2000", "--interval=1000"]  # fmt: skip


def test_the_bonus_finds_the_end_and_a_fresh_agent_keeps_to_it(ooo, corridor, tmp_path):
    """IQL's own noise stays in the first half; the agent that explored does not go to the end."""
    ooo.main([*corridor, "--retrain-steps=2000", f"--run-dir={tmp_path}/bonus"])
    ooo.main([*corridor, "--retrain-steps=0", "--bonus-scale=0", f"--run-dir={tmp_path}/noise"])
    arrays = {name: ooo.load(tmp_path / name)[0] for name in ("bonus", "noise")}
    furthest = {name: 3 * x["buffers/next_observations"].max() + 3 for name, x in arrays.items()}
    assert furthest["bonus"] >= 9 and furthest["noise"] < 5
    assert arrays["bonus"]["buffers/rewards"].sum() >= 10 * 10  # ten times
    returns = [float(row["return"]) for row in read_metrics(tmp_path / "bonus")]
    assert returns[2:] == [0, 1, 1]  # after exploring; retrained


# -------------------------------------------------------------------------------------- Retraining
@pytest.fixture
def seen(ooo, monkeypatch):
    """retrain_steps with an update that only looks: at the bounds and the batch's rewards."""

    def look(agent, batch, config):
        low, high = agent.q_range
        return agent, {"low": low, "high": high, "rewards": batch.rewards}

    monkeypatch.setattr(ooo, "update", look)

    def steps(old, new, anew=True, **settings):
        config = ooo.Config(hidden_dims=(4,), rnd_dims=(4, 4), batch_size=16, **settings)
        rows = [ooo.Batch(*[jnp.float32(x)[..., None]] * 2, *[jnp.float32(x)] * 4)
                for x in (old, new)]  # fmt: skip
        rows = [x.replace(next_observations=x.observations) for x in rows]
        agent = ooo.create_agent(jax.random.PRNGKey(1), *[jnp.zeros((1, 1))] * 2, config)
        agent = agent.replace(critic=agent.critic.replace(step=7))
        agents = jax.tree.map(lambda x: jnp.stack([jnp.asarray(x)] * len(new)), agent)
        return ooo.retrain_steps(agents, rows[1], rows[0], config, 500, anew)

    return steps


def test_bounds_are_what_the_rewards_can_add_up_to(seen):
    """With discount 0.9 ten times a reward, or once. Each agent's are of the dataset and its own
    steps; rows of the buffer that no step filled do not count."""
    for old, new, steps, low, high in (
        ([-1, -1], [[0, -1], [-1, -1]], 2, [-10, -10], [0, -1]),  # the second one has no success
        ([1, 2], [[3, 1], [2, 2]], 2, [1, 1], [30, 20]),
        ([-4, -3], [[0]], 0, [-40], [-3]),
    ):
        _, info = seen(old, new, anew=False, online_steps=steps, discount=0.9)
        np.testing.assert_allclose(info["low"] / 500, low, rtol=1e-5)
        np.testing.assert_allclose(info["high"] / 500, high, rtol=1e-5)


def test_a_batch_is_of_everything_and_of_the_best(ooo):
    rewards = np.float32([0, 0, 5, 0, 5, 0, 0, 5])
    numbers = jnp.arange(8.0)
    data = ooo.Batch(*[numbers] * 2, jnp.asarray(rewards), *[numbers] * 3)
    config = ooo.Config(batch_size=20_000, upsample=6_000)
    best = jnp.cumsum(jnp.asarray(rewards == 5))
    batch = ooo.retrain_batch(data, best, jax.random.PRNGKey(0), config)
    for rows, allowed in ((batch.actions[:14_000], range(8)), (batch.actions[14_000:], (2, 4, 7))):
        found, counts = np.unique(rows, return_counts=True)
        np.testing.assert_array_equal(found, allowed)
        assert np.abs(counts - counts.mean()).max() < 6 * counts.mean() ** 0.5
    np.testing.assert_array_equal(batch.rewards, rewards[batch.actions.astype(int)])


def test_without_a_success_a_batch_is_uniform_and_agents_are_fresh_but_once(seen):
    agents, info = seen([-1] * 4, [[-1] * 4], online_steps=4, upsample=16)
    assert agents.critic.step == 0 and info["rewards"].mean() == -500
    _, info = seen([-1] * 4, [[-1, -1, 0, -1]], online_steps=4, upsample=4)
    assert abs(info["rewards"].sum() / 500 + 12 * 7 / 8) < 0.2  # four of sixteen are the success
    agents, _ = seen([-1] * 4, [[-1] * 4], anew=False, online_steps=4)
    assert agents.critic.step == 7


def test_every_draw_has_a_key_of_its_own(ooo, monkeypatch):
    """A key is drawn from or split, once: twice split, given to two losses, left for later."""
    config = ooo.Config(hidden_dims=(4,), rnd_dims=(4, 4))
    agent = ooo.create_agent(jax.random.PRNGKey(0), *[jnp.zeros((1, 1))] * 2, config)
    rows, keys, split = [jnp.ones((4, 1)), jnp.ones(4)], [], jax.random.split
    batch = ooo.Batch(rows[0], *rows, rows[0], rows[1], rows[1])
    spy = lambda state, loss, *inputs: keys.append(inputs[2]) or (state, {})  # noqa: E731
    monkeypatch.setattr(ooo, "gradient_step", spy)
    monkeypatch.setattr(jax.random, "split", lambda key: keys.append(key) or split(key))
    keys.append(ooo.explore_update(agent, batch, config)[0].key)
    keys = [key for key in keys if getattr(key, "dtype", None) == np.uint32]
    assert len(np.unique(np.stack(keys), axis=0)) == len(keys) == 5


# ------------------------------------------------------------------------------------- Three phases
def test_phases_resume_and_init_from(ooo, pendulum, tmp_path, monkeypatch):
    """Killed between two rounds of retraining; another N of online steps by --init-from."""
    flags = ["--dataset", pendulum, "--hidden-dims", "8", "--rnd-dims", "8", "8", "--interval=20",
             "--batch-size=16", "--eval-episodes=1", "--online-steps=30", "--offline-steps=20",
             "--retrain-steps=40"]  # fmt: skip
    ooo.main([*flags, f"--run-dir={tmp_path}/whole"])
    rows, calls, evaluate = read_metrics(tmp_path / "whole"), [], ooo.evaluate
    assert [row["phase"] for row in rows] == ["offline"] + ["online"] * 2 + ["retrain"] * 2
    assert [row["bonus"] != "" for row in rows] == [True] * 3 + [False] * 2

    def killed(*inputs):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return evaluate(*inputs)

    monkeypatch.setattr(ooo, "evaluate", killed)
    with pytest.raises(KeyboardInterrupt):
        ooo.main([*flags, f"--run-dir={tmp_path}/cut"])
    between, _ = ooo.load(tmp_path / "cut")
    ooo.main([*flags, f"--run-dir={tmp_path}/cut"])
    assert read_arrays(tmp_path / "cut") == read_arrays(tmp_path / "whole")
    assert read_metrics(tmp_path / "cut") == rows
    whole, _ = ooo.load(tmp_path / "whole")
    assert (between["agents/critic/step"], whole["agents/critic/step"]) == (20, 40)  # fresh, once
    assert whole["agents/predictor/step"] == 0 and len(np.unique(whole["agents/q_range"])) == 2
    again = [*flags, f"--init-from={tmp_path}/whole", f"--run-dir={tmp_path}/again"]
    ooo.main([*again, "--online-steps=10"])
    found, _ = ooo.load(tmp_path / "again")
    np.testing.assert_array_equal(found["buffers/actions"], whole["buffers/actions"][:, :10])
    assert found["agents/critic/step"] == 40
    with pytest.raises(SystemExit, match="it made 30 online steps"):
        ooo.main([*again[:-1], "--online-steps=31", f"--run-dir={tmp_path}/more"])
    ooo.main([*again[:-1], "--online-steps=0", f"--run-dir={tmp_path}/none"])  # the data alone
    assert ooo.load(tmp_path / "none")[0]["agents/critic/step"] == 40
    short = [*flags, "--buffer-size=20"]  # the ring of 20 has lost the first steps
    ooo.main([*short, f"--run-dir={tmp_path}/short"])
    with pytest.raises(SystemExit, match="it made 30 online steps"):
        ooo.main([*short, f"--init-from={tmp_path}/short", f"--run-dir={tmp_path}/lost"])
