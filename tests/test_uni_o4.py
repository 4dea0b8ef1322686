"""PPO and Uni-O4: advantages by hand, every loss against NumPy, the order of the improvement, the
model's bounds, AM-Q where its value is known, who is accepted, and the shifted worlds."""

import math
from functools import partial

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_losses import OBS, A, B, batch_of, dense, float64, fresh, gaussian_log_prob, q_of
from test_losses import v_of as value_of

SMALL = dict(hidden_dims=(16, 8), value_hidden_dims=(16, 8), batch_size=B)
OFFLINE = SMALL | dict(critic_hidden_dims=(16, 8), model_hidden_dims=(16, 8), num_members=3,
                       num_models=2, num_elites=1, amq_starts=6, horizon=5)  # fmt: skip


def gaussian(params, observations, activation=np.tanh):
    """Mean (B, A) and standard deviation of the bounded policy: log std = -5 + 2.5 (tanh u + 1)."""
    tree, x = params["params"], observations
    for name in sorted(tree["MLP_0"]):
        x = activation(dense(tree["MLP_0"], name, x))
    mean, u = np.tanh(dense(tree, "Dense_0", x)), np.tanh(dense(tree, "Dense_1", x))
    return mean, np.exp(-5.0 + 2.5 * (u + 1.0))


# ------------------------------------------------------------------------------------------- PPO
def test_advantages_by_hand(ppo):
    """Three steps to a termination, two to a cut, one that goes on: what is carried over, and which
    next states have a value."""
    config = ppo.Config(**SMALL, discount=0.9, gae_lambda=0.8)
    agent, rollout = fresh(ppo, config), batch_of(ppo, 0, size=6)
    masks, ends = np.float32([1, 1, 0, 1, 1, 1]), np.float32([0, 0, 1, 0, 1, 0])
    rollout = rollout.replace(masks=masks, ends=ends)
    params = float64(agent.value.params)
    states = rollout.observations, rollout.next_observations
    v, following = (value_of(params, x, np) for x in states)
    expected, carried = np.zeros(6), 0.0
    for t in reversed(range(6)):
        delta = rollout.rewards[t] + 0.9 * masks[t] * following[t] - v[t]
        carried = delta + 0.9 * 0.8 * (1 - ends[t]) * carried
        expected[t] = carried
    found, values = ppo.generalised_advantages(agent, rollout, config)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    np.testing.assert_allclose(values, v, rtol=1e-4)


def samples_of(ppo, seed):
    rng = np.random.default_rng(seed)
    batch = batch_of(ppo, seed)
    draw = lambda: np.float32(rng.normal(size=B))  # noqa: E731
    return ppo.Sample(batch.observations, batch.actions, draw() - 3, draw(), draw(), draw())


@pytest.mark.parametrize("value_clip", [0.0, 0.3])
def test_ppo_losses_are_the_papers(value_clip, ppo):
    config = ppo.Config(**SMALL, clip_ratio=0.2, entropy_weight=0.1, value_clip=value_clip)
    for seed in range(4):
        agent, batch = fresh(ppo, config, seed), samples_of(ppo, seed)
        b = float64(batch)
        mean, std = gaussian(float64(agent.actor.params), b.observations)
        ratio = np.exp(gaussian_log_prob(b.actions, mean, std, np) - b.log_probs)
        worse = np.minimum(ratio * b.advantages, np.clip(ratio, 0.8, 1.2) * b.advantages)
        entropy = (0.5 * math.log(2 * math.pi * math.e) + np.log(std)).sum(axis=1).mean()
        found, info = ppo.actor_loss(agent.actor.params, agent, batch, None, config)
        np.testing.assert_allclose(found, -worse.mean() - 0.1 * entropy, rtol=1e-4)
        assert 0 < info["ratio_clipped"] <= 1
        v = value_of(float64(agent.value.params), b.observations, np)
        errors = (v - b.returns) ** 2
        if value_clip:
            near = b.values + np.clip(v - b.values, -0.3, 0.3)
            errors = np.maximum(errors, (near - b.returns) ** 2)
        found, _ = ppo.value_loss(agent.value.params, agent, batch, None, config)
        np.testing.assert_allclose(found, errors.mean(), rtol=1e-4)


def test_an_improvement_uses_every_step_as_often(ppo):
    """Two epochs over 64 steps in minibatches of 16: eight updates of both networks."""
    config = ppo.Config(**SMALL, rollout_steps=64, epochs=2)
    agent = fresh(ppo, config)
    new, info = jax.jit(partial(ppo.improve, config=config))(agent, batch_of(ppo, 0, size=64))
    assert (new.actor.step, new.value.step) == (8, 8)
    assert np.isfinite(list(info.values())).all()


def test_ppo_moves_towards_the_better_action(ppo):
    """One state, reward -(a - 0.5)^2, every step an episode."""
    config = ppo.Config(hidden_dims=(16,), value_hidden_dims=(16,), rollout_steps=256,
                        batch_size=64, learning_rate=3e-3)  # fmt: skip
    zeros, rng = np.zeros((256, 1), np.float32), jax.random.PRNGKey(1)
    agent = ppo.create_agent(jax.random.PRNGKey(0), zeros[:1], zeros[:1], config)
    improve = jax.jit(partial(ppo.improve, config=config))
    for _ in range(25):
        rng, key = jax.random.split(rng)
        keys = jax.random.split(key, 256)
        draw = jax.vmap(lambda key, agent=agent: ppo.explore(agent, zeros[0], key, config))
        actions = draw(keys)  # (256, 1)
        rewards, ends = -((actions[:, 0] - 0.5) ** 2), jnp.ones(256)
        agent, _ = improve(agent, ppo.Batch(zeros, actions, rewards, zeros, 1 - ends, ends))
    assert abs(float(ppo.act(agent, zeros[:1], config)[0, 0]) - 0.5) < 0.15


# ---------------------------------------------------------------------------------------- Uni-O4
def test_cloning_losses(uni_o4):
    """The authors' diversity term has no gradient of its own: (1 + w) times cloning's; specialise
    gives the row's best member more, the others less."""
    batch, grads = batch_of(uni_o4, 0), {}
    for diversity, weight in (("heuristic", 0.0), ("heuristic", 0.5), ("specialise", 0.5)):
        config = uni_o4.Config(**OFFLINE, diversity=diversity, diversity_weight=weight)
        agent = fresh(uni_o4, config)
        grad = jax.value_and_grad(partial(uni_o4.cloning_loss, config=config), has_aux=True)
        params = agent.references.params
        (loss, _), grads[diversity, weight] = grad(params, agent, batch, None)
        relu = partial(np.maximum, 0)
        members = [jax.tree.map(lambda x, i=i: np.float64(x[i]), params) for i in range(3)]
        b = float64(batch)
        log_prob = np.stack(
            [gaussian_log_prob(b.actions, *gaussian(p, b.observations, relu), np) for p in members]
        )
        if diversity == "specialise":
            signs = np.where(log_prob == log_prob.max(axis=0), weight, -weight)
            expected = -((1 + signs) * log_prob).mean(axis=1).sum()
            np.testing.assert_allclose(loss, expected, rtol=1e-4)
    same = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    plain = jax.tree.map(lambda x: 1.5 * x, grads["heuristic", 0.0])
    jax.tree.map(same, grads["heuristic", 0.5], plain)


def test_critics_are_iqls(uni_o4):
    config = uni_o4.Config(**OFFLINE, expectile=0.8)
    agent, batch = fresh(uni_o4, config), batch_of(uni_o4, 0)
    b, target = float64(batch), float64(agent.target_critic_params)
    v = value_of(float64(agent.offline_value.params), b.observations, np)
    u = q_of(target, b.observations, b.actions, np).min(axis=0) - v
    loss, _ = uni_o4.expectile_loss(agent.offline_value.params, agent, batch, None, config)
    np.testing.assert_allclose(loss, (np.where(u < 0, 0.2, 0.8) * u**2).mean(), rtol=1e-4)
    following = value_of(float64(agent.offline_value.params), b.next_observations, np)
    q = q_of(float64(agent.critic.params), b.observations, b.actions, np)
    errors = (q - b.rewards - config.discount * b.masks * following) ** 2
    loss, _ = uni_o4.critic_loss(agent.critic.params, agent, batch, None, config)
    np.testing.assert_allclose(loss, errors.mean(axis=1).sum(), rtol=1e-4)


def test_dynamics_loss_and_shared_bounds(uni_o4):
    config = uni_o4.Config(**OFFLINE)
    agent, rng = fresh(uni_o4, config), np.random.default_rng(0)
    params = dict(agent.dynamics.params, high=np.float32(rng.normal(size=OBS + 1)),
                  low=np.float32(rng.normal(size=OBS + 1) - 3))  # fmt: skip
    agent = agent.replace(input_mean=np.zeros(OBS + A), input_std=np.ones(OBS + A))
    batches = jax.tree.map(lambda x, y: np.stack([x, y]), batch_of(uni_o4, 0), batch_of(uni_o4, 1))
    loss, info = uni_o4.dynamics_loss(params, agent, batches, None, config)
    b, p, total, decay = float64(batches), float64(params), 0.0, 0.0
    for m in range(2):
        x = np.concatenate([b.observations[m], b.actions[m]], axis=1)
        tree = jax.tree.map(lambda leaf, m=m: leaf[m], p["models"])["params"]
        for i in range(3):
            h = dense(tree, f"Dense_{i}", x)
            x = h / (1 + np.exp(-h))
            decay += 0.5 * (2.5e-5, 7.5e-5, 1e-4)[i] * (tree[f"Dense_{i}"]["kernel"] ** 2).sum()
        mean, log_var = np.split(h, 2, axis=1)
        log_var = p["high"] - np.logaddexp(0, p["high"] - log_var)
        log_var = p["low"] + np.logaddexp(0, log_var - p["low"])
        change = b.next_observations[m] - b.observations[m]
        y = np.concatenate([change, b.rewards[m][:, None]], axis=1)
        total += ((mean - y) ** 2 * np.exp(-log_var) + log_var).mean()
    np.testing.assert_allclose(info["dynamics_loss"], total, rtol=1e-4)
    bounds = 0.01 * (p["high"] - p["low"]).sum()
    np.testing.assert_allclose(loss, total + bounds + decay, rtol=1e-4)


def constant_critic(agent, value):
    params = jax.tree.map(np.zeros_like, agent.critic.params)
    params["params"]["bias"] += np.float32(value)
    return agent.replace(critic=agent.critic.replace(params=params))


def test_amq_sums_q_along_the_models_rollouts(uni_o4):
    """Q is 2 everywhere and nothing ends: 2 per step, 5 steps; the code's form is a mean."""
    states, units = jnp.asarray(batch_of(uni_o4, 0).observations), (np.ones(OBS), np.zeros(OBS))
    for amq, expected in (("paper", 10.0), ("code", 2.0)):
        config = uni_o4.Config(**OFFLINE, amq=amq)
        agent = constant_critic(fresh(uni_o4, config), 2.0)
        agent = agent.replace(input_mean=np.zeros(OBS + A), input_std=np.ones(OBS + A))
        ask = partial(uni_o4.amq_scores, agent, agent.members.params, jax.random.PRNGKey(0))
        scores = ask(states=states, units=units, config=config)
        np.testing.assert_allclose(scores, expected, rtol=1e-5)


def test_a_member_becomes_its_reference_where_amq_says_so(uni_o4, monkeypatch):
    config = uni_o4.Config(**OFFLINE)
    agent = fresh(uni_o4, config)
    answers = [np.float32([3, 1, 2]), np.float32([1, 2, 2])]  # of the members, of the references
    monkeypatch.setattr(uni_o4, "amq_scores", lambda *args, **kwargs: answers.pop(0))
    new, info = uni_o4.query(agent, None, None, config)
    kernels = [x["params"]["Dense_0"]["kernel"] for x in
               (new.references.params, agent.members.params, agent.references.params)]  # fmt: skip
    np.testing.assert_array_equal(kernels[0][0], kernels[1][0])
    np.testing.assert_array_equal(kernels[0][1:], kernels[2][1:])  # a draw is not better
    np.testing.assert_array_equal(new.actor.params["params"]["Dense_0"]["kernel"], kernels[0][0])
    assert float(info["accepted"]) == pytest.approx(1 / 3)


def test_a_rollout_ends_where_the_environment_says_so(uni_o4):
    env, rng = gym.make("Hopper-v5").unwrapped, np.random.default_rng(0)
    states = np.float32(rng.normal(size=(200, 11)) * 0.15 + np.eye(11)[0] * 0.9)
    expected = []
    for x in states:
        qpos, qvel = np.concatenate([[0.0], x[:5]]), x[5:]
        env.set_state(qpos.astype(float), qvel.astype(float))
        expected.append(not env.is_healthy)
    np.testing.assert_array_equal(uni_o4.terminated(states, "hopper"), expected)
    assert 0.1 < np.mean(expected) < 0.9


def test_shifted_physics_and_late_actions(ppo):
    env = gym.make("Hopper-v5")
    mass = env.unwrapped.model.body_mass.copy()
    late = ppo.ShiftedPhysics(env, mass=2.0, delay=1)
    np.testing.assert_allclose(env.unwrapped.model.body_mass, 2 * mass)
    late.reset(seed=0)
    first = late.step(np.ones(3, np.float32))[0]
    still = ppo.ShiftedPhysics(gym.make("Hopper-v5"), mass=2.0)
    still.reset(seed=0)
    np.testing.assert_array_equal(first, still.step(np.zeros(3, np.float32))[0])
