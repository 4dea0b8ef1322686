"""MOORe, a reconstruction: rollouts by hand, where they end; the shares of the three sources, by
their TD errors; the models learn from old and new rows; a model is worth as much as its data."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_losses import OBS, A, B, batch_of, fresh

SIZES = dict(hidden_dims=(16, 8), batch_size=B, model_hidden_dims=(16,), num_models=3, horizon=4)


@pytest.fixture(scope="module")
def setting(moore):
    """A configuration, an agent whose models say 0.1 of every output, and a batch."""
    config = moore.Config(**SIZES, penalty=2.0)
    agent, batch = ready(moore, config), batch_of(moore, 0)
    models = jax.tree.map(jnp.zeros_like, agent.dynamics.params["models"])
    models["params"]["Dense_1"]["bias"] = jnp.full((3, 2 * (OBS + 1)), 0.1).at[:, OBS + 1 :].set(-3)
    dynamics = agent.dynamics.replace(params=agent.dynamics.params | {"models": models})
    return config, agent.replace(dynamics=dynamics), batch


def ready(moore, config):
    """A random agent, whose models' bounds and inputs are as at the start."""
    agent, start = fresh(moore, config), moore.create_agent
    start = start(jax.random.PRNGKey(0), jnp.zeros((1, OBS)), jnp.zeros((1, A)), config)
    return agent.replace(dynamics=start.dynamics, input_std=start.input_std, td_errors=jnp.ones(3))


def test_a_rollout_goes_on_from_where_it_is_and_pays_for_the_deviation(moore, setting):
    config, agent, batch = setting
    starts = batch.observations[:4]
    rows, deviation = moore.imagine(agent, starts, jax.random.PRNGKey(0), config)
    by_step = jax.tree.map(lambda x: np.reshape(x, (4, 4, *x.shape[1:])), rows)  # (H, P, ...)
    np.testing.assert_array_equal(by_step.observations[0], starts)
    np.testing.assert_array_equal(by_step.observations[1:], by_step.next_observations[:-1])
    assert (rows.masks == 1).all() and not np.array_equal(by_step.actions[0], by_step.actions[1])
    steps = by_step.next_observations - by_step.observations  # of means 0.1: the rest is noise
    assert np.abs(np.diff(steps, axis=0)).min() > 1e-4
    soft = lambda x: np.log1p(np.exp(x))  # noqa: E731
    log_var = 0.5 - soft(0.5 + 3)
    log_var = -10 + soft(log_var + 10)
    norm = np.sqrt((OBS + 1) * np.exp(log_var))
    np.testing.assert_allclose(deviation, norm, rtol=1e-5)
    many = jnp.tile(starts, (500, 1))
    rows, _ = moore.imagine(agent, many, jax.random.PRNGKey(1), config)
    change = np.array(rows.next_observations - rows.observations)
    np.testing.assert_allclose(change.mean(), 0.1, atol=0.01)
    np.testing.assert_allclose(change.std(), np.exp(0.5 * log_var), rtol=0.02)
    np.testing.assert_allclose(rows.rewards.mean(), 0.1 - 2.0 * norm, atol=0.01)


def test_an_ended_rollout_begins_again_where_it_began(moore, setting):
    config, agent, batch = setting
    config = moore.dataclasses.replace(config, termination="halfcheetah")
    starts = jnp.array(batch.observations[:4]).at[:2].set(101.0)  # the rule's bound is 100
    rows, _ = moore.imagine(agent, starts, jax.random.PRNGKey(0), config)
    masks = np.reshape(rows.masks, (4, 4))
    assert masks[:, :2].max() == 0 and masks[:, 2:].min() == 1
    np.testing.assert_array_equal(
        np.reshape(rows.observations, (4, 4, OBS))[:, :2], 4 * [starts[:2]]
    )


def test_the_rule_is_of_observations_as_they_are(moore):
    config = moore.Config(termination="hopper", normalize_observations=True)
    with pytest.raises(SystemExit, match="--termination hopper: of observations as they are"):
        list(moore.phases(config))


def test_rows_are_drawn_by_priority_times_error_and_errors_follow(moore, setting):
    config, agent, _ = setting
    size = 4000
    config = moore.dataclasses.replace(config, batch_size=size, priorities=(0.5, 1.0, 2.0))
    zeros = jax.tree.map(lambda x: jnp.zeros((size, *x.shape[1:])), batch_of(moore, 0))
    old, new = zeros, zeros.replace(rewards=jnp.full(size, 50.0))
    agent = agent.replace(td_errors=jnp.array([4.0, 1.0, 1.5]))
    after, info = jax.jit(partial(moore.update, config=config))(agent, old, online=new)
    np.testing.assert_allclose(info["online_share"], 1 / 6, atol=0.03)
    np.testing.assert_allclose(info["model_share"], 3 / 6, atol=0.03)
    _, info = jax.jit(partial(moore.update, config=config))(agent, old)
    assert info["online_share"] == 0
    np.testing.assert_allclose(info["model_share"], 3 / 5, atol=0.03)
    found = (after.td_errors - 0.99 * agent.td_errors) / 0.01  # of this batch, by source
    assert found[0] < 5 and abs(found[1] - 50) < 5 and found[2] < 10
    only = agent.replace(td_errors=jnp.array([1.0, 0.0, 0.0]))
    after, _ = jax.jit(partial(moore.update, config=config))(only, old, online=new)
    np.testing.assert_array_equal(after.td_errors[1:], [0, 0])  # nothing drawn, nothing learnt


def test_models_learn_what_old_and_new_rows_say(moore):
    """The state falls by |a|: what rows with a < 0 alone do not say of a > 0."""
    config = moore.Config(**SIZES | dict(model_hidden_dims=(64,)), model_learning_rate=1e-2)
    agents = jax.tree.map(lambda x: jnp.asarray(x)[None], ready(moore, config))
    rng, rows = np.random.default_rng(0), jax.tree.map(jnp.zeros_like, batch_of(moore, 0))

    def world(low, high):
        size = 256
        states, actions = rng.normal(size=(size, OBS)), rng.uniform(low, high, (size, A))
        return rows.replace(
            observations=jnp.float32(states),
            actions=jnp.float32(actions),
            rewards=jnp.float32(actions[:, 0]),
            next_observations=jnp.float32(states - np.abs(actions[:, :1])),
        )

    old, new = world(-1.0, 0.0), world(0.0, 1.0)
    buffers = jax.tree.map(lambda x: x[None], new)

    def error(agents):
        agent = jax.tree.map(lambda x: x[0], agents)
        many = jax.tree.map(lambda x: jnp.stack([x] * 3), new)
        mean, _ = moore.predict(agent, agent.dynamics.params, many.observations, many.actions)
        return float(((mean - moore.model_targets(many)) ** 2).mean())

    copy = partial(jax.tree.map, jnp.copy)  # what is fitted is donated
    before, _ = moore.fit_models(copy(agents), buffers, old, 0, config, 400)
    after, info = moore.fit_models(copy(agents), buffers, old, 256, config, 400)
    assert error(after) < 0.02 and error(before) > 0.2 and info["dynamics_loss"].shape == (1,)
