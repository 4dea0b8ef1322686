"""PPO and Uni-O4: advantages by hand, every loss against NumPy, the order of the improvement, the
model's bounds, AM-Q where its value is known, who is accepted, and the shifted worlds."""

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


def test_an_improvement_uses_every_step_as_often(ppo):
    """Two epochs over 64 steps in minibatches of 16: eight updates of both networks."""
    config = ppo.Config(**SMALL, rollout_steps=64, epochs=2)
    agent = fresh(ppo, config)
    new, info = jax.jit(partial(ppo.improve, config=config))(agent, batch_of(ppo, 0, size=64))
    assert (new.actor.step, new.value.step) == (8, 8)
    assert np.isfinite(list(info.values())).all()


def test_an_improvements_returns_and_orders(ppo, monkeypatch):
    """V regresses on A + V(s), so that its first error is A; every epoch has its own order."""
    config = ppo.Config(**SMALL | dict(batch_size=64), rollout_steps=64, epochs=1)
    agent, rollout = fresh(ppo, config), jax.tree.map(jnp.asarray, batch_of(ppo, 0, size=64))
    _, info = ppo.improve(agent, rollout, config)
    advantages, _ = ppo.generalised_advantages(agent, rollout, config)
    np.testing.assert_allclose(info["value_loss"], (advantages**2).mean(), rtol=1e-4)
    keys, permutation = set(), jax.random.permutation

    def spy(key, *rest):
        jax.debug.callback(lambda key: keys.add(tuple(key.tolist())), key)
        return permutation(key, *rest)

    monkeypatch.setattr(jax.random, "permutation", spy)
    ppo.improve(agent, rollout, ppo.Config(**SMALL, rollout_steps=64, epochs=3))
    jax.effects_barrier()
    assert len(keys) == 3 and tuple(np.asarray(agent.key).tolist()) not in keys


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
    one, _ = uni_o4.fit_critics(agent, batch, config)
    two, _ = uni_o4.fit_critics(one, batch, config)
    jax.tree.map(np.testing.assert_array_equal, two.value.params, two.offline_value.params)
    kernels = [x.target_critic_params["params"]["kernel"] for x in (agent, one, two)]
    np.testing.assert_array_equal(kernels[0], kernels[1])  # the target moves in every second one
    assert not np.array_equal(kernels[1], kernels[2])


def constant_critic(agent, value):
    params = jax.tree.map(np.zeros_like, agent.critic.params)
    params["params"]["bias"] += np.float32(value)
    return agent.replace(critic=agent.critic.replace(params=params))


def test_amq_sums_q_along_the_models_rollouts(uni_o4):
    """Where Q is 2: 2 per step, 5 steps; the code's form is a mean. Where Q is infinite: ended."""
    states, units = jnp.asarray(batch_of(uni_o4, 0).observations), (np.ones(OBS), np.zeros(OBS))
    for amq, q, expected in (("paper", 2.0, 10.0), ("code", 2.0, 2.0), ("paper", np.inf, 0.0)):
        config = uni_o4.Config(**OFFLINE, amq=amq)
        agent = constant_critic(fresh(uni_o4, config), q)
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


@pytest.mark.parametrize("least, success, shift", [(-5, 5, -5), (-10, 0, 0)])  # D4RL's, OGBench's
def test_successes_only_keeps_what_leads_to_one(least, success, shift, uni_o4):
    """Of three episodes the first two rows of one and the whole of another; all for the critics."""
    rewards = np.full(9, least, np.float32)
    rewards[[1, 8]] = success
    ends = np.isin(np.arange(9), [3, 5, 8])
    rows = uni_o4.Batch(*[np.arange(9.0)] * 2, rewards, *[np.arange(9.0)] * 2, ends)
    config = uni_o4.Config(successes_only=True, reward_scale=10.0, reward_shift=float(shift))
    seen = lambda agents, buffers, run, *_: run[1].observations.tolist()  # noqa: E731
    play = partial(uni_o4.on_own_rows, seen, None, None, (config, rows), 0, 1)
    assert play(successes=True) == [0, 1, 6, 7, 8]
    assert play() == [*range(9)]
    rewards[[1, 8]] = (least + success) / 2 - 0.1  # of two objects one is in its place: no success
    with pytest.raises(SystemExit, match="--successes-only: no reward"):
        play(successes=True)


def test_after_init_from_a_round_has_no_steps(uni_o4):
    rounds = [("online", None, 0, 0), ("online", None, 0, 20), ("offline", None, 0, 8)]
    found = uni_o4.shorter_rounds(rounds, uni_o4.Config(interval=20, offline_interval=5))
    assert [each[2:] for each in found] == [(0, 0), (0, 20), (0, 5), (5, 8)]
