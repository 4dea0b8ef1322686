"""AWAC: losses against NumPy, one update step by step, and a bandit in which its policy stands
where the weighted mean of the data is, never beyond them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_learning import trained
from test_losses import (
    A,
    B,
    batch_of,
    compiled,
    float64,
    fresh,
    gaussian,
    gaussian_log_prob,
    parameters,
    q_of,
)

SIZES = dict(hidden_dims=(16, 8), batch_size=B)
close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)


def sampled(params, observations, key):
    mean, std = gaussian(params, observations, np)
    return np.clip(mean + std * np.float64(jax.random.normal(key, mean.shape)), -1, 1)


def weights(s, b, key, beta, maximum):
    """The advantage and the weight (B,) of a batch's actions."""
    q = q_of(s["critic"], b.observations, b.actions, np).min(axis=0)
    v = q_of(s["critic"], b.observations, sampled(s["actor"], b.observations, key), np).min(axis=0)
    return q - v, np.minimum(np.exp(beta * (q - v)), maximum)


def test_critic_loss_by_hand(awac):
    config = awac.Config(**SIZES, num_critics=3)
    agent, batch, key = fresh(awac, config), batch_of(awac, 0), jax.random.PRNGKey(3)
    s, b = parameters(agent), float64(batch)
    following = sampled(s["actor"], b.next_observations, key)
    assert np.abs(following).max() == 1  # some are clipped
    target = q_of(s["target"], b.next_observations, following, np).min(axis=0)
    errors = q_of(s["critic"], b.observations, b.actions, np) - b.rewards - 0.99 * b.masks * target
    found, info = compiled(awac, "critic_loss", config)(agent.critic.params, agent, batch, key)
    close(found, (errors**2).mean(axis=1).sum())
    close(info["q"], q_of(s["critic"], b.observations, b.actions, np).mean())


@pytest.mark.parametrize("maximum", [100.0, 1.1])
def test_actor_loss_and_its_gradient_by_hand(awac, maximum):
    """No gradient goes through the weight, which the policy's own sample is in."""
    config = awac.Config(**SIZES, beta=2.0, max_weight=maximum)
    agent, batch, key = fresh(awac, config), batch_of(awac, 0), jax.random.PRNGKey(3)
    s, b = parameters(agent), float64(batch)
    advantage, weight = weights(s, b, key, 2.0, maximum)
    assert (weight == maximum).any() == (maximum < 2)

    def by_hand(params, xp):
        log_prob = gaussian_log_prob(b.actions, *gaussian(params, b.observations, xp), xp)
        return -(weight * log_prob).mean()

    loss = jax.value_and_grad(compiled(awac, "actor_loss", config), has_aux=True)
    (found, info), grads = loss(agent.actor.params, agent, batch, key)
    close(found, by_hand(s["actor"], np))
    close([info["advantage"], info["weight"]], [advantage.mean(), weight.mean()])
    expected = jax.grad(by_hand)(agent.actor.params, jnp)
    jax.tree.map(partial(close, rtol=1e-3, atol=1e-4), grads, expected)


def test_an_update_is_q_then_pi_with_the_new_q_then_the_target(awac):
    config = awac.Config(**SIZES, learning_rate=3e-2, tau=0.2)
    agent, batch = fresh(awac, config), batch_of(awac, 0)

    @jax.jit
    def by_hand(agent):
        key, critic_key, actor_key = jax.random.split(agent.key, 3)
        inputs = batch, critic_key, config
        critic, _ = awac.gradient_step(agent.critic, awac.critic_loss, agent, *inputs)
        between, inputs = agent.replace(critic=critic), (batch, actor_key, config)
        actor, _ = awac.gradient_step(agent.actor, awac.actor_loss, between, *inputs)
        mix = lambda new, old: 0.2 * new + 0.8 * old  # noqa: E731
        target = jax.tree.map(mix, critic.params, agent.target_critic_params)
        return between.replace(actor=actor, target_critic_params=target, key=key)

    found, _ = compiled(awac, "update", config)(agent, batch)
    jax.tree.map(partial(close, rtol=1e-3, atol=1e-4), found, by_hand(agent))


@pytest.mark.parametrize(("beta", "expected"), [(0.0, -0.3), (10.0, 0.1)])
def test_a_policy_is_the_weighted_mean_of_the_data(awac, beta, expected):
    """Actions are uniform in [-0.8, 0.2] and the reward is a: a policy that ascends Q goes to 1.
    Weighted by exp(10 a) the actions' mean is 0.2 - 1 / 10; cloning has -0.3."""
    a = np.random.default_rng(0).uniform(-0.8, 0.2, (2000, 1))
    zeros, ones = np.zeros((2000, 1)), np.ones(2000)
    dataset = awac.Batch(*map(np.float32, (zeros, a, a[:, 0], zeros, 0 * ones, ones)))
    config = awac.Config(hidden_dims=(32, 32), batch_size=64, learning_rate=3e-3, beta=beta)
    agents, _ = trained(awac, config, dataset, 2000)
    means = [awac.act(agent, np.zeros((1, 1), np.float32), config) for agent in agents[10:]]
    assert abs(np.mean(means) - expected) < 0.04


def test_actions_in_training_are_sampled_and_bounded(awac):
    config = awac.Config(**SIZES)
    agent, observation = fresh(awac, config), np.ones(3, np.float32)
    keys = jax.random.split(jax.random.PRNGKey(0), 2000)
    draw = jax.vmap(compiled(awac, "explore", config), in_axes=(None, None, 0))
    actions = draw(agent, observation, keys)  # (2000, A)
    mean, std = gaussian(parameters(agent)["actor"], observation[None], np)
    assert actions.shape == (2000, A) and np.abs(actions).max() == 1
    close(awac.act(agent, observation[None], config), mean)
    expected = np.clip(mean[0] + std * np.random.default_rng(0).normal(size=(2000, A)), -1, 1)
    np.testing.assert_allclose(actions.mean(axis=0), expected.mean(axis=0), atol=0.07)
