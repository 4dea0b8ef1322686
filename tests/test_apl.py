"""APL: losses against NumPy, what is drawn for a greedy and for a conservative update, and a bandit
in which the policy leaves the data only where it learns greedily from what it has just done."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, read_metrics
from test_losses import A, B, batch_of, compiled, float64, fresh, parameters, q_of
from test_td3 import pi_of

SIZES = dict(hidden_dims=(16, 8), batch_size=B)
close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)


def test_losses_by_hand(apl):
    """The critic's is TD3's; the policy's imitation counts only where the update is conservative,
    and q_weight / mean|Q| stays."""
    config = apl.Config(**SIZES, q_weight=1.7, target_noise=0.8, noise_clip=0.3)
    agent, batch, key = fresh(apl, config), batch_of(apl, 0), jax.random.PRNGKey(3)
    s, b = parameters(agent), float64(batch)
    noise = np.clip(0.8 * np.float64(jax.random.normal(key, (B, A))), -0.3, 0.3)
    following = pi_of(float64(agent.target_actor_params), b.next_observations) + noise
    q = q_of(s["target"], b.next_observations, np.clip(following, -1, 1), np).min(axis=0)
    errors = q_of(s["critic"], b.observations, b.actions, np) - b.rewards - 0.99 * b.masks * q
    found, info = compiled(apl, "critic_loss", config)(agent.critic.params, agent, batch, key)
    close(found, (errors**2).mean(axis=1).sum())
    actions = pi_of(s["actor"], b.observations)
    q = q_of(s["critic"], b.observations, actions, np)[0]
    imitation = ((actions - b.actions) ** 2).mean()
    loss = partial(apl.actor_loss, agent.actor.params, agent, batch, None, config)
    close(loss(conservative=0.0)[0], -1.7 * q.mean() / np.abs(q).mean())
    close(loss()[0], imitation - 1.7 * q.mean() / np.abs(q).mean())
    assert loss(conservative=0.0)[1]["imitation"] == loss()[1]["imitation"] > 0


def test_a_steps_updates_are_updates_in_turn(apl):
    """Each on its own batch, each in its own mode; metrics are means."""
    config = apl.Config(**SIZES, utd_ratio=4, policy_delay=1, learning_rate=1e-2)
    agent, greedy = fresh(apl, config), jnp.float32([1, 0, 0, 1])
    batches = [batch_of(apl, i) for i in range(4)]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *batches)
    found, info = compiled(apl, "online_update", config)(agent, (stacked, greedy))
    losses = []
    for batch, mode in zip(batches, greedy, strict=True):
        loss = partial(apl.actor_loss, conservative=1 - mode)
        agent, each = jax.jit(partial(apl.update, config=config, policy_loss=loss))(agent, batch)
        losses.append(each["actor_loss"])
    jax.tree.map(partial(close, rtol=1e-3), found, agent)
    close([info["greedy"], info["actor_loss"]], [0.5, np.mean(losses)], rtol=1e-3)


@pytest.mark.parametrize(("size", "ratio"), [(0, 0.7), (40, 0.7), (41, 0.7), (100, 0.7), (99, 0)])
def test_what_is_drawn(apl, size, ratio):
    """Of 300 rows of data and 500 places for online ones, `size` of which are filled: a greedy
    batch has the 60 newest, if they are more than 40, another one all; each row alike."""
    numbers = np.float32([*range(-300, size), *[1e6] * (500 - size)])
    rows = [apl.Batch(*[jax.device_put(x)] * 6) for x in np.split(numbers, [300])]
    sizes = dict(utd_ratio=1000, batch_size=200, fresh_size=60, fresh_minimum=40)
    config = apl.Config(**sizes, greedy_ratio=ratio)
    batches, greedy = apl.online_batch(*rows, size, jax.random.PRNGKey(0), config)
    assert abs(float(greedy.mean()) - ratio * (size > 40)) < 0.06
    for mode, oldest in ((1, max(0, size - 60)), (0, -300)):
        drawn = batches.rewards[np.asarray(greedy) == mode]
        if drawn.size:
            found, counts = np.unique(drawn, return_counts=True)
            np.testing.assert_array_equal(found, np.arange(oldest, size))
            assert np.abs(counts - counts.mean()).max() < 6 * counts.mean() ** 0.5
    assert all((x == batches.rewards).all() for x in jax.tree.leaves(batches))


def bandit(script, greedy_ratio, steps=1000):
    """The policy's action after online steps in a bandit: the reward is 3 + a, and the actions of
    the dataset's 2,000 rows are near -0.6."""
    config = script.Config(
        hidden_dims=(32, 32), batch_size=64, learning_rate=3e-3, policy_learning_rate=3e-3,
        tau=0.05, utd_ratio=2, greedy_ratio=greedy_ratio, fresh_size=200, fresh_minimum=100,
        exploration_noise=0.3,
    )  # fmt: skip
    noise = np.random.default_rng(0).normal(size=(2000, 1))
    a, zeros = np.float32(np.clip(-0.6 + 0.2 * noise, -1, 1)), np.zeros((2000, 1), np.float32)
    data = script.Batch(zeros, a, 3 + a[:, 0], zeros, zeros[:, 0], 1 + zeros[:, 0])
    agent = script.create_agent(jax.random.PRNGKey(0), zeros[:1], a[:1], config)
    agents = jax.tree.map(lambda x: jnp.asarray(x)[None], agent)
    agents, _ = script.update_steps(agents, data, config, script.update, 1000)
    buffers = jax.tree.map(lambda x: jnp.zeros((1, steps, *x.shape[1:])), data)
    step = partial(script.online_step, dataset=data, config=config, update=script.online_update)
    agents, actions, _ = step(agents, buffers, 0, zeros[:1], learn=False)
    for i in range(steps):
        first = jax.tree.map(lambda x: x[:1], data)
        row = first.replace(actions=actions, rewards=3 + actions[:, 0])
        buffers = script.insert(buffers, row, i)
        agents, actions, _ = step(agents, buffers, i + 1, zeros[:1], learn=True)
    agent = jax.tree.map(lambda x: x[0], agents)
    return float(script.act(agent, zeros[:1], config)[0, 0])


def test_a_policy_leaves_the_data_where_it_is_greedy_on_fresh_rows(apl):
    """The best action is 1. Imitation of what is mostly old rows holds the policy at their side."""
    held, free = bandit(apl, greedy_ratio=0.0), bandit(apl, greedy_ratio=0.5)
    assert held < 0.05 < 0.15 < free < 1


def test_a_run_is_greedy_once_there_are_enough_fresh_rows(apl, pendulum, tmp_path):
    flags = [*TINY, "--dataset", pendulum, "--hidden-dims", "8", "--offline-steps", "30",
             "--interval", "30", "--online-steps", "90", "--warmup-steps", "10", "--utd-ratio", "3",
             "--fresh-size", "20", "--fresh-minimum", "15", "--run-dir", str(tmp_path)]  # fmt: skip
    apl.main([*flags, "--greedy-ratio", "1"])
    rows = [row for row in read_metrics(tmp_path) if row["seed"] == "0"]
    assert [row["greedy"] for row in rows] == ["", "0.75", "1", "1"]  # 15 of 20
    arrays, _ = apl.load(tmp_path)
    assert list(arrays["agents/critic/step"]) == [30 + 3 * 80] * 2
    with pytest.raises(SystemExit, match="--buffer-size 80"):
        apl.main([*flags, "--buffer-size", "80", "--run-dir", str(tmp_path / "other")])
