"""ENOTO, of which no official numbers exist: both critic losses against NumPy, the weighted pair
minimum against all pairs, and an ensemble whose disagreement is where the agent goes."""

from functools import partial
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import read_metrics
from test_losses import B, batch_of, compiled, float64, fresh, parameters, q_of

SIZES = dict(hidden_dims=(16, 8), critic_hidden_dims=(16, 8), batch_size=B, num_actions=3)
SIZES |= dict(num_critics=5, micro_batches=1)


@pytest.mark.parametrize("count", [2, 3, 10])
def test_the_weighted_pair_minimum_is_the_mean_over_all_pairs(count, enoto):
    q = np.random.default_rng(count).normal(size=(count, 4, 7))
    pairs = [np.minimum(q[i], q[j]) for i, j in combinations(range(count), 2)]
    found = enoto.weighted_pair_minimum(jnp.asarray(q))
    np.testing.assert_allclose(found, np.mean(pairs, axis=0), rtol=1e-4, atol=1e-6)
    assert (q.min(axis=0) <= found + 1e-6).all() and (found <= q.mean(axis=0) + 1e-6).all()
    same = enoto.weighted_pair_minimum(jnp.full((count, 1), 3.0))
    np.testing.assert_allclose(same, 3.0, rtol=1e-6)


def backup_loss(s, b, next_actions, config, value):
    """Squared TD error in NumPy; next_actions (M, B, A)."""
    q = [q_of(s["target"], b.next_observations, actions, np) for actions in next_actions]
    target = b.rewards + config.discount * b.masks * value(np.stack(q, axis=1)).max(axis=0)
    return ((q_of(s["critic"], b.observations, b.actions, np) - target) ** 2).mean(axis=1).sum()


def all_pairs(q):
    return np.mean([np.minimum(q[i], q[j]) for i, j in combinations(range(len(q)), 2)], axis=0)


@pytest.mark.parametrize("lagrange", [False, True])
def test_critic_losses(lagrange, enoto):
    """Online the pairs' minima alone; offline the minimum of all, and the weighted difference."""
    config = enoto.Config(**SIZES, backup_actions=3, cql_alpha=2.0, lagrange=lagrange)
    agent, batch, key = fresh(enoto, config), batch_of(enoto, 0), jax.random.PRNGKey(3)
    s, b, rest = parameters(agent), float64(batch), (agent, batch, key)
    draw = partial(enoto.policy_actions, agent, batch.next_observations)
    found, info = compiled(enoto, "critic_loss", config)(agent.critic.params, *rest)
    expected = backup_loss(s, b, np.float64(draw(key, 3)[0]), config, all_pairs)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    q = q_of(s["critic"], b.observations, b.actions, np)
    np.testing.assert_allclose(info["disagreement"], q.std(axis=0).mean(), rtol=1e-4)
    found, info = compiled(enoto, "offline_critic_loss", config)(agent.critic.params, *rest)
    keys = jax.random.split(key)
    actions = np.float64(draw(keys[0], 3)[0])
    expected = backup_loss(s, b, actions, config, partial(np.min, axis=0))
    np.testing.assert_allclose(info["critic_loss"], expected, rtol=1e-4)
    uniform_key, next_key, own_key = jax.random.split(keys[1], 3)
    draws = [jax.random.uniform(uniform_key, (3, B, 2), minval=-1.0, maxval=1.0)]
    densities = [np.full((3, B), -2 * np.log(2))]
    for observations, each in ((batch.next_observations, next_key), (batch.observations, own_key)):
        actions, density = enoto.policy_actions(agent, observations, each, 3)
        draws, densities = [*draws, actions], [*densities, density]
    sampled = [q_of(s["critic"], b.observations, np.float64(a), np) for a in np.concatenate(draws)]
    inside = np.stack(sampled, axis=1) - np.concatenate(densities)  # (N, 3 M, B)
    difference = (np.log(np.exp(inside).sum(axis=1)) - q).mean(axis=1)
    weight = 2 * np.exp(s["multiplier"]["log"]) if lagrange else 2
    gap = config.target_gap * lagrange
    np.testing.assert_allclose(found, expected + weight * (difference - gap).sum(), rtol=1e-3)


def test_online_the_difference_is_dropped(enoto):
    """One update is a step on the online loss; the multiplier rests, the optimisers go on."""
    config = enoto.Config(**SIZES, lagrange=True, learning_rate=1e-2)
    agent, batch = fresh(enoto, config), batch_of(enoto, 0)
    agent, _ = compiled(enoto, "update", config)(agent, batch)
    new, info = compiled(enoto, "online_update", config)(agent, batch)
    key = jax.random.split(jax.random.split(agent.key, 3)[1], 1)[0]
    inputs = agent.critic, enoto.critic_loss, agent, batch, key, config
    by_hand, _ = enoto.gradient_step(*inputs)
    same = partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5)
    jax.tree.map(same, new.critic.params, by_hand.params)
    assert new.critic.step == 2 and new.multiplier.step == 1 and "difference" not in info


def test_the_agent_explores_where_the_critics_disagree(enoto):
    """Their mean is best in the middle, but they agree only there."""
    config = enoto.Config(**SIZES, candidates=50, optimism=2.0)
    agent, key = fresh(enoto, config), jax.random.PRNGKey(0)
    slopes = jnp.linspace(-1, 1, 5)[:, None]  # (N, 1)
    q = lambda params, o, a: slopes * jnp.abs(a).sum(axis=1) - 0.1 * (a**2).sum(axis=1)  # noqa: E731
    agent = agent.replace(critic=agent.critic.replace(apply_fn=q))
    observation = batch_of(enoto, 0).observations[0]
    actions = enoto.policy_actions(agent, observation[None], key, 50)[0][:, 0]  # (M, A)
    size, cost = np.abs(actions).sum(axis=1), 0.1 * (actions**2).sum(axis=1)
    chosen = enoto.explore(agent, observation, key, config)
    bound = 2.0 * np.std(slopes) * size - cost
    np.testing.assert_allclose(chosen, actions[bound.argmax()], rtol=1e-5)
    config = enoto.Config(**SIZES, candidates=50, optimism=0.0)
    greedy = enoto.explore(agent, observation, key, config)
    np.testing.assert_allclose(greedy, actions[cost.argmin()], rtol=1e-5)
    assert np.abs(chosen).sum() > np.abs(greedy).sum()


def test_an_agent_of_cql_goes_on(enoto, cql, pendulum, tmp_path):
    flags = ["--dataset", pendulum, "--hidden-dims", "8", "--critic-hidden-dims", "8"]
    flags += ["--num-critics", "3", "--batch-size", "16", "--num-actions", "2", "--interval", "40"]
    flags += ["--eval-episodes", "1", "--offline-steps", "40", "--warmup-steps", "10"]
    theirs = [*flags, "--online-steps", "0", "--run-dir", str(tmp_path / "cql")]
    cql.main(theirs)
    flags += ["--init-from", str(tmp_path / "cql"), "--online-steps", "40"]
    enoto.main([*flags, "--run-dir", str(tmp_path / "run")])
    arrays, _ = enoto.load(tmp_path / "run")
    assert arrays["agents/critic/step"][0] == 40 + 30
    rows, before = (read_metrics(tmp_path / name) for name in ("run", "cql"))
    assert rows[0]["return"] == before[-1]["return"] and float(rows[-1]["disagreement"]) > 0


def test_one_critic_is_no_pair(enoto):
    with pytest.raises(SystemExit, match="--num-critics: at least 2"):
        list(enoto.phases(enoto.Config(num_critics=1)))
