"""MOORe, a reconstruction: rollouts by hand, where they end; the fading priority of the dataset;
what a batch is of; the models learn from old and new rows, as far as these are drawn."""

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
    return agent.replace(dynamics=start.dynamics, input_std=start.input_std)


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


def test_a_goal_ends_a_rollout_where_the_reward_says_so(moore, setting):
    """Of -1 and 0: in models whose reward is 0.1 every step ends, of one below -0.5 none."""
    config, agent, batch = setting
    config = moore.dataclasses.replace(config, termination="goal")
    rows, _ = moore.imagine(agent, batch.observations[:4], jax.random.PRNGKey(0), config)
    assert (rows.masks == 0).all() and (rows.rewards < -0.5).all()  # the penalty does not count
    models = agent.dynamics.params["models"]["params"]
    bias = models["Dense_1"]["bias"].at[:, OBS].set(-1.5)  # of the reward's mean
    models = {"params": models | {"Dense_1": models["Dense_1"] | {"bias": bias}}}
    dynamics = agent.dynamics.replace(params=agent.dynamics.params | {"models": models})
    rows, _ = moore.imagine(
        agent.replace(dynamics=dynamics), batch.observations[:4], jax.random.PRNGKey(0), config
    )
    assert (rows.masks == 1).all()


def test_a_batch_is_of_rollouts_from_its_states_and_some_of_its_rows(moore, setting, monkeypatch):
    config, agent, _ = setting
    config = moore.dataclasses.replace(config, batch_size=40, real_share=0.1, horizon=3)
    rows = jax.tree.map(lambda x: jnp.zeros((40, *x.shape[1:])), batch_of(moore, 0))
    states = jnp.arange(40.0)[:, None] + jnp.zeros((40, OBS))
    seen, rows = [], rows.replace(observations=states, rewards=jnp.full(40, 50.0))
    monkeypatch.setattr(
        moore, "sac_update", lambda agent, batch, _: seen.append(batch) or (agent, {})
    )
    moore.update(agent, rows, config)
    (mix,) = seen
    assert mix.rewards.shape == (40,)
    np.testing.assert_array_equal(mix.rewards[:4], 50.0)  # real_share of them
    assert mix.rewards[4:].max() < 10
    np.testing.assert_array_equal(mix.observations[:4], states[:4])
    np.testing.assert_array_equal(mix.observations[4:18], states[:14])  # a rollout's first rows
    assert not np.isin(mix.observations[18:], states).any()


def test_the_datasets_priority_fades_from_epoch_to_epoch(moore):
    """1,000 old rows of reward 0; the online rows have their number, the ones not there yet -1."""
    config = moore.Config(**SIZES | dict(batch_size=500), model_batch_size=400, utd_ratio=3,
                          decay=0.5, epoch_steps=100)  # fmt: skip
    old = jax.tree.map(lambda x: jnp.zeros((1000, *x.shape[1:])), batch_of(moore, 0))
    for size, epoch in ((1, 1), (100, 1), (101, 2), (1000, 10)):
        numbers = jnp.where(jnp.arange(1200) < size, jnp.arange(1200) + 1.0, -1.0)
        new = jax.tree.map(lambda x: jnp.ones((1200, *x.shape[1:])), batch_of(moore, 0))
        new = new.replace(rewards=numbers)
        draw = jax.jit(partial(moore.online_batch, config=config))
        for_models, batches, share = draw(old, new, size, jax.random.PRNGKey(size))
        assert for_models.rewards.shape == (1200,) and batches.rewards.shape == (3, 500)
        expected = size / (size + 1000 / (0.5 * epoch))  # Eqs. (3), (4)
        for rewards in (for_models.rewards, batches.rewards):
            assert rewards.min() >= 0 and rewards.max() <= size
            np.testing.assert_allclose((rewards > 0).mean(), expected, atol=0.05)
        np.testing.assert_allclose(share, expected, atol=0.03)
    uniform = np.sort(np.ravel(batches.rewards[batches.rewards > 0]))
    np.testing.assert_allclose(uniform.mean(), 500, rtol=0.1)  # of 1 ... 1000, all alike
    np.testing.assert_array_equal(for_models.observations[:, 0], for_models.rewards > 0)


def test_an_online_step_is_one_of_the_models_and_utd_ratio_of_the_agent(moore):
    config = moore.Config(**SIZES, model_batch_size=5, utd_ratio=4)
    agent, rows = ready(moore, config), jax.tree.map(np.array, batch_of(moore, 0))
    drawn = moore.online_batch(rows, rows, B, jax.random.PRNGKey(0), config)
    after, info = jax.jit(partial(moore.online_update, config=config))(agent, drawn)
    steps = [x.step - y.step for x, y in zip(
        (after.dynamics, after.critic, after.actor), (agent.dynamics, agent.critic, agent.actor),
        strict=True)]  # fmt: skip
    assert steps == [1, 4, 4] and info["online_share"] == drawn[2]
    assert set(info) == set(moore.METRICS)


def test_models_learn_what_old_and_new_rows_say(moore):
    """The state falls by |a|: what rows with a < 0 alone do not say of a > 0."""
    config = moore.Config(**SIZES | dict(model_hidden_dims=(64,)), model_learning_rate=1e-2)
    agent = ready(moore, config)
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

    def fitted(agent, decay):
        with_decay = moore.dataclasses.replace(config, decay=decay, utd_ratio=1)

        def step(agent, key):
            for_models, _, _ = moore.online_batch(old, new, 256, key, with_decay)
            return moore.fit_dynamics(agent, for_models, with_decay)

        return jax.lax.scan(step, agent, jax.random.split(jax.random.PRNGKey(0), 400))

    def error(agent):
        many = jax.tree.map(lambda x: jnp.stack([x] * 3), new)
        mean, _ = moore.predict(agent, agent.dynamics.params, many.observations, many.actions)
        return float(((mean - moore.model_targets(many)) ** 2).mean())

    none, half = (jax.jit(partial(fitted, decay=decay))(agent) for decay in (1e-9, 1.0))
    assert error(half[0]) < 0.02 and error(none[0]) > 0.2 and half[1]["dynamics_loss"][-1] < 0
