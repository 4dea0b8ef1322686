"""uni_o4.py and ppo.py: every loss against NumPy, PPO's first step, GAE against a double loop, AM-Q
on a model whose rollouts are known, the gate, the dynamics ensemble, and the hand-over to PPO."""

import csv
import dataclasses
import json
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_losses import OBS, A, B, batch_of, compiled, dense, gaussian_log_prob, hidden, q_of, v_of
from test_run import Killed, assert_same_run, die, go, on_call, reused_agents

SMALL = dict(
    hidden_dims=(16, 8), critic_hidden_dims=(16, 8), value_hidden_dims=(16, 8), batch_size=B,
    model_hidden_dims=(16, 16), num_members=3, num_models=4, num_elites=2, amq_starts=16,
    horizon=7, model_batch_size=8, improvement_steps=10_000,
)  # fmt: skip


@lru_cache
def created(script, config):
    """A fresh agent; cached, because its optimisers are part of what jit knows it by."""
    create = partial(script.create_agent_state, observation_dim=OBS, action_dim=A, config=config)
    return jax.jit(create)(jax.random.PRNGKey(0))


def agent(script, config, seed=0):
    """An agent with random parameters everywhere; references are not the members."""
    state, rng = created(script, config), np.random.default_rng(seed)
    state = state.replace(key=jax.random.PRNGKey(seed))

    def draw(tree):
        return jax.tree.map(lambda x: np.float32(0.4 * rng.normal(size=x.shape)), tree)

    for name in ("clones", "members", "critic", "offline_value", "dynamics", "actor", "value"):
        if hasattr(state, name):
            network = getattr(state, name)
            state = state.replace(**{name: network.replace(params=draw(network.params))})
    if hasattr(state, "references"):
        state = state.replace(
            references=draw(state.references), best_models=draw(state.best_models),
            target_critic_params=draw(state.target_critic_params),
            best_errors=jnp.float32(rng.random(config.num_models)),
        )  # fmt: skip
    return jax.tree.map(jnp.asarray, state)


def wide(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def member(tree, i):
    return jax.tree.map(lambda x: x[i], tree)


def gaussian_of(params, observations, twice=False):
    """Mean and std (B, A) of a bounded Gaussian policy, written out."""
    tree = params["params"]
    features = hidden(tree, observations, np)
    u = np.tanh(dense(tree, "Dense_1", features))
    u = np.tanh(u) if twice else u
    return np.tanh(dense(tree, "Dense_0", features)), np.exp(-5 + 2.5 * (u + 1))


def log_probs_of(params, b, count):
    return np.stack([gaussian_log_prob(b.actions, *gaussian_of(member(params, i), b.observations),
                                       np) for i in range(count)])  # fmt: skip


# ------------------------------------------------------------------------------- Policy and cloning


@pytest.mark.parametrize(("twice", "ends"), [(False, (0.0067, 1.0)), (True, (0.0122, 0.551))])
def test_the_std_is_bounded(twice, ends, uni_o4):
    policy = uni_o4.BoundedGaussianPolicy((4,), 1, squash_twice=twice)
    params = policy.init(jax.random.PRNGKey(0), jnp.zeros((1, 1)))
    for u, expected in zip((-100.0, 100.0), ends, strict=True):
        params["params"]["Dense_1"]["bias"] = jnp.full(1, u)
        std = policy.apply(params, jnp.zeros((1, 1))).stddev()[0, 0]
        np.testing.assert_allclose(std, expected, rtol=1e-2)


def test_a_new_policy_has_the_std_asked_for(ppo):
    state = ppo.create_agent_state(jax.random.PRNGKey(0), OBS, A, ppo.Config(initial_std=0.3))
    std = state.actor.apply_fn(state.actor.params, np.zeros((5, OBS), np.float32)).stddev()
    np.testing.assert_allclose(std, 0.3, rtol=0.02)


def cloning_of(params, b, c, count):
    log_prob, weight = log_probs_of(params, b, count), c.diversity_weight
    total = 0.0
    for i in range(count):
        others = np.stack([log_prob[j] for j in range(count) if j != i])
        best = others.max(axis=0)
        if c.diversity == "specialise":
            row = -np.where(log_prob[i] >= best, 1 + weight, 1 - weight) * log_prob[i]
        elif c.diversity == "kl":
            mean, std = gaussian_of(member(params, i), b.observations)
            kl = []
            for row, j in enumerate(others.argmax(axis=0)):
                nearest = [k for k in range(count) if k != i][j]
                m, s = (x[row] for x in gaussian_of(member(params, nearest), b.observations))
                kl.append((np.log(s / std[row]) + (std[row] ** 2 + (mean[row] - m) ** 2)
                           / (2 * s**2) - 0.5).sum())  # fmt: skip
            row = -log_prob[i] - weight * np.minimum(kl, 10.0)
        elif c.diversity == "joint":
            row = -log_prob[i] - weight * (log_prob[i] - log_prob.max(axis=0))
        elif c.diversity == "heuristic":
            row = -log_prob[i] - weight * (log_prob[i] - best)
        else:
            row = -log_prob[i]
        total += (row * b.mc_returns).sum() / b.mc_returns.sum()
    return total


@pytest.mark.parametrize("diversity", ["specialise", "kl", "joint", "heuristic", "none"])
def test_cloning_losses_written_out(diversity, uni_o4):
    config = uni_o4.Config(**SMALL, diversity=diversity, diversity_weight=0.3)
    for seed in range(3):
        state = agent(uni_o4, config, seed)
        rows = np.float32(np.arange(B) % 4 != 0)  # some rows are left out
        batch = batch_of(uni_o4, seed).replace(mc_returns=rows)
        found, _ = compiled(uni_o4, "cloning_loss", config)(state.clones.params, state, batch, None)
        expected = cloning_of(wide(state.clones.params), wide(batch), config, 3)
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_the_authors_diversity_is_plain_cloning_and_specialising_is_not(uni_o4):
    """The detached denominator leaves (1 + weight) times the gradient of cloning."""
    state = agent(uni_o4, uni_o4.Config(**SMALL))
    batch = batch_of(uni_o4, 0).replace(mc_returns=np.ones(B, np.float32))
    grads = {}
    for diversity in ("none", "heuristic", "specialise", "joint", "kl"):
        config = uni_o4.Config(**SMALL, diversity=diversity, diversity_weight=0.1)
        grad = jax.grad(partial(uni_o4.cloning_loss, config=config), has_aux=True)
        grads[diversity] = jax.tree.leaves(grad(state.clones.params, state, batch, None)[0])
    for plain, theirs in zip(grads["none"], grads["heuristic"], strict=True):
        np.testing.assert_allclose(theirs, 1.1 * plain, rtol=1e-3, atol=1e-5)
    for other in ("specialise", "joint", "kl"):
        assert any(not np.allclose(1.1 * x, y, rtol=1e-2) and not np.allclose(0.9 * x, y, rtol=1e-2)
                   for x, y in zip(grads["none"], grads[other], strict=True)), other  # fmt: skip


# ------------------------------------------------------------------------------------------ Critics


def test_the_kl_moves_a_member_away_and_does_not_draw_the_other_after_it(uni_o4):
    """The gradient of a member is that of its own term, the other one held fixed."""
    config = uni_o4.Config(**SMALL | dict(num_members=2), diversity="kl", diversity_weight=0.5)
    state = agent(uni_o4, config)
    batch = batch_of(uni_o4, 0).replace(mc_returns=np.ones(B, np.float32))
    found, _ = jax.grad(partial(uni_o4.cloning_loss, config=config), has_aux=True)(
        state.clones.params, state, batch, None
    )
    other = state.clones.apply_fn(member(state.clones.params, 1), batch.observations)

    def own_term(params):
        policy = state.clones.apply_fn(params, batch.observations)
        kl = jnp.minimum(policy.kl_divergence(other), 10.0)
        return -(policy.log_prob(batch.actions) + 0.5 * kl).mean()

    expected = jax.grad(own_term)(member(state.clones.params, 0))
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), member(found, 0), expected
    )


def test_critic_losses_written_out(uni_o4):
    config = uni_o4.Config(**SMALL, expectile=0.8, discount=0.9)
    for seed in range(3):
        state, batch = agent(uni_o4, config, seed), batch_of(uni_o4, seed)
        b = wide(batch)
        u = q_of(wide(state.target_critic_params), b.observations, b.actions, np).min(axis=0)
        u = u - v_of(wide(state.offline_value.params), b.observations, np)
        expected = np.where(u < 0, 0.2 * u * u, 0.8 * u * u).mean()
        found, _ = compiled(uni_o4, "expectile_loss", config)(
            state.offline_value.params, state, batch, None
        )
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        target = b.rewards + 0.9 * b.masks * v_of(
            wide(state.offline_value.params), b.next_observations, np
        )
        q = q_of(wide(state.critic.params), b.observations, b.actions, np)
        found, _ = compiled(uni_o4, "critic_loss", config)(state.critic.params, state, batch, None)
        np.testing.assert_allclose(found, ((q - target) ** 2).mean(axis=1).sum(), rtol=1e-5)


def test_q_learns_from_the_new_v_and_its_target_follows_every_second_update(uni_o4):
    config = uni_o4.Config(**SMALL, learning_rate=1e-2, tau=0.5)
    state, batch = agent(uni_o4, config), batch_of(uni_o4, 0)
    update = compiled(uni_o4, "fit_critics", config)
    one, _ = update(state, batch)
    inputs = batch, None, config
    value, _ = uni_o4.gradient_step(state.offline_value, uni_o4.expectile_loss, state, *inputs)
    by_hand = state.replace(offline_value=value)
    critic, _ = uni_o4.gradient_step(state.critic, uni_o4.critic_loss, by_hand, *inputs)
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    for found, expected in ((one.offline_value, value), (one.critic, critic)):
        jax.tree.map(close, found.params, expected.params)
        jax.tree.map(close, found.opt_state, expected.opt_state)  # Adam's first step hides scale
    jax.tree.map(
        np.testing.assert_array_equal, one.target_critic_params, state.target_critic_params
    )
    two, _ = update(one, batch)
    mixed = jax.tree.map(lambda p, q: 0.5 * (p + q), two.critic.params, one.target_critic_params)
    jax.tree.map(close, two.target_critic_params, mixed)


# ----------------------------------------------------------------------------------------- Dynamics


def test_dynamics_loss_written_out(uni_o4):
    config = uni_o4.Config(**SMALL)
    state = agent(uni_o4, config, 1)
    rng = np.random.default_rng(0)
    state = state.replace(
        input_mean=np.float32(rng.normal(size=OBS + A)),
        input_std=np.float32(rng.uniform(0.5, 2.0, OBS + A)),
    )
    parts = [batch_of(uni_o4, seed) for seed in range(4)]
    batch = jax.tree.map(lambda *xs: np.stack(xs), *parts)  # (M, B, ...)
    found, info = compiled(uni_o4, "dynamics_loss", config)(
        state.dynamics.params, state, batch, None
    )
    total, extra = 0.0, 0.0
    for i, part in enumerate(map(wide, parts)):
        tree = member(wide(state.dynamics.params), i)["params"]
        x = np.concatenate([part.observations, part.actions], axis=1)
        x = (x - np.float64(state.input_mean)) / np.float64(state.input_std)
        for name in ("Dense_0", "Dense_1"):
            x = dense(tree, name, x)
            x = x / (1 + np.exp(-x))
        mean, raw = np.split(dense(tree, "Dense_2", x), 2, axis=1)
        log_var = tree["high"] - np.log1p(np.exp(tree["high"] - raw))
        log_var = tree["low"] + np.log1p(np.exp(log_var - tree["low"]))
        y = np.concatenate([part.next_observations - part.observations, part.rewards[:, None]], 1)
        total += ((mean - y) ** 2 / np.exp(log_var) + log_var).mean()
        extra += 0.01 * (tree["high"].sum() - tree["low"].sum())
        for name, weight in zip(("Dense_0", "Dense_1", "Dense_2"), (2.5e-5, 7.5e-5, 1e-4),
                                strict=True):  # fmt: skip
            extra += weight * 0.5 * (tree[name]["kernel"] ** 2).sum()
    np.testing.assert_allclose(info["dynamics_loss"], total, rtol=1e-4)
    np.testing.assert_allclose(found, total + extra, rtol=1e-4)


def linear_rows(script, count=2000, noise=0.05):
    """Rows of x' = x + 0.5 a (in the first two dimensions) + noise, reward x_0."""
    rng = np.random.default_rng(0)
    x, a = rng.normal(size=(count, OBS)), rng.uniform(-1, 1, (count, A))
    change = np.concatenate([0.5 * a, np.zeros((count, 1))], axis=1)
    y = x + change + noise * rng.normal(size=x.shape)
    rows = (x, a, x[:, 0], y, np.ones(count))
    return script.Batch(*[np.float32(row) for row in rows])


def test_the_model_learns_keeps_the_best_and_stops(uni_o4):
    """Its hold-out error falls to the noise; a model that gets worse is not kept; after the
    patience nothing changes any more."""
    settings = SMALL | dict(model_batch_size=64, model_hidden_dims=(32, 32))
    config = uni_o4.Config(**settings, model_patience=3, model_learning_rate=3e-3)
    state = uni_o4.create_agent_state(jax.random.PRNGKey(0), OBS, A, config)
    dataset = jax.device_put(linear_rows(uni_o4))
    transform = np.zeros(OBS, np.float32), np.ones(OBS, np.float32)
    state = uni_o4.begin_offline(state, dataset, transform, config)
    x = np.concatenate([dataset.observations, dataset.actions], axis=1)[400:]
    np.testing.assert_allclose(state.input_std, x.std(axis=0), rtol=1e-4)
    state, kept = jax.tree.map(lambda x: jnp.asarray(x)[None], state), []
    for _ in range(150):
        state, info = uni_o4.offline_updates(state, dataset, "dynamics", config, 32)
        kept.append(jax.device_get(state))
    errors = np.array([s.best_errors[0] for s in kept])
    assert (np.diff(errors, axis=0) <= 0).all()
    # three changes with variance 0.05^2, and a reward that can be known
    assert errors[-1].mean() < 1.5 * 0.75 * 0.05**2
    assert kept[-1].stale_epochs[0] == 3  # it has stopped,
    jax.tree.map(np.testing.assert_array_equal, kept[-1].dynamics.params, kept[-2].dynamics.params)
    assert kept[-1].dynamics.step[0] < 150 * 32  # long ago,
    params = kept[-1].dynamics.params, kept[-1].best_models
    assert not all(jax.tree.leaves(jax.tree.map(np.array_equal, *params)))  # and not at the best


def test_holdout_rows_are_never_trained_on(uni_o4):
    """A row that would ruin the loss stands among them."""
    config = uni_o4.Config(**SMALL)
    dataset = linear_rows(uni_o4, 100)
    assert uni_o4.holdout_rows(dataset) == 20
    dataset.rewards[:20] = np.nan
    state = jax.tree.map(lambda x: x[None], agent(uni_o4, config))
    state, info = uni_o4.offline_updates(state, jax.device_put(dataset), "dynamics", config, 10)
    assert np.isfinite(info["dynamics_loss"]).all()


# ------------------------------------------------------------------------------ Offline improvement


def test_improvement_loss_written_out(uni_o4):
    config = uni_o4.Config(**SMALL, improvement_clip_ratio=0.2)
    for seed in range(3):
        state, batch = agent(uni_o4, config, seed), batch_of(uni_o4, seed)
        params, reference = (member(x, 0) for x in (state.members.params, state.references))
        for tree in (params["params"], reference["params"]):
            tree["Dense_1"]["bias"] = tree["Dense_1"]["bias"] + 0.8  # a wide policy
        key, x = jax.random.PRNGKey(seed), np.float64(batch.observations)
        actions = np.float64(state.clones.apply_fn(reference, batch.observations).sample(seed=key))
        assert np.abs(actions).max() > 1  # some are outside the box
        q = q_of(wide(state.critic.params), x, np.clip(actions, -1, 1), np).min(axis=0)
        raw = q - v_of(wide(state.offline_value.params), x, np)
        advantage = (raw - raw.mean()) / raw.std()
        new, old = (gaussian_log_prob(actions, *gaussian_of(wide(p), x), np)
                    for p in (params, reference))  # fmt: skip
        ratio = np.exp(new - old)
        surrogate = np.minimum(ratio * advantage, np.clip(ratio, 0.8, 1.2) * advantage)
        found, info = compiled(uni_o4, "improvement_loss", config)(
            params, reference, state, batch.observations, key
        )
        np.testing.assert_allclose(found, -surrogate.mean(), rtol=2e-3, atol=1e-5)
        np.testing.assert_allclose(info["advantage"], raw.mean(), rtol=1e-4)


def test_the_first_step_from_the_reference_is_the_plain_policy_gradient(uni_o4):
    config = uni_o4.Config(**SMALL)
    state, batch = agent(uni_o4, config), batch_of(uni_o4, 0)
    params, key = member(state.references, 1), jax.random.PRNGKey(0)
    loss, grads = jax.value_and_grad(
        lambda p: uni_o4.improvement_loss(p, params, state, batch.observations, key, config)[0]
    )(params)
    np.testing.assert_allclose(loss, 0.0, atol=1e-6)  # ratio 1, advantages of mean 0
    policy = state.clones.apply_fn(params, batch.observations)
    actions = policy.sample(seed=key)
    q = state.critic.apply_fn(state.critic.params, batch.observations, jnp.clip(actions, -1, 1))
    raw = q.min(axis=0) - state.offline_value.apply_fn(
        state.offline_value.params, batch.observations
    )
    advantage = (raw - raw.mean()) / raw.std()

    def plain(p):
        return -(state.clones.apply_fn(p, batch.observations).log_prob(actions) * advantage).mean()

    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), grads, jax.grad(plain)(params)
    )


def test_schedules_of_the_offline_improvement(uni_o4):
    """The clip stops falling after 200 updates, the learning rate does not."""
    config = uni_o4.Config(**SMALL)
    clip = partial(uni_o4.improvement_clip, config=config)
    np.testing.assert_allclose([clip(0), clip(200), clip(5000)], [0.25, 0.245, 0.245])
    state, batch = agent(uni_o4, config), batch_of(uni_o4, 0)
    schedules = [x for x in jax.tree.leaves(state.members.opt_state) if x.dtype == jnp.int32]
    assert all((x == 0).all() for x in schedules)

    def moved(count):
        late = jax.tree.map(lambda x: jnp.full_like(x, count) if x.dtype == jnp.int32 else x,
                            state.members.opt_state)  # fmt: skip
        old = state.replace(members=state.members.replace(opt_state=late))
        new, _ = compiled(uni_o4, "improve_offline", config)(old, batch)
        return max(float(np.abs(x - y).max()) for x, y in zip(
            jax.tree.leaves(new.members.params), jax.tree.leaves(state.members.params),
            strict=True))  # fmt: skip

    assert moved(9_999) < 1e-3 * moved(0)


def test_members_have_their_own_gradient_norm(uni_o4):
    """One member's huge gradient does not shrink the others' steps."""
    config = uni_o4.Config(**SMALL, max_grad_norm=1e-3)
    state, batch = agent(uni_o4, config), batch_of(uni_o4, 0)
    state = state.replace(references=state.members.params)
    new, _ = compiled(uni_o4, "improve_offline", config)(state, batch)
    moments = new.members.opt_state[1][0].mu
    for i in range(3):
        norm = np.sqrt(sum(float((x[i] ** 2).sum()) for x in jax.tree.leaves(moments)))
        np.testing.assert_allclose(norm, 0.1 * 1e-3, rtol=1e-3)


# --------------------------------------------------------------------------------------------- AM-Q


def known_agent(script, config, bias=0.0):
    """A world that can be calculated: the model moves the observation by 0.1 in the first dimension
    and by nothing else, without noise; min Q is that dimension; policies answer tanh(bias)."""
    state = created(script, config)
    zero = partial(jax.tree.map, jnp.zeros_like)
    models, members = zero(state.best_models), zero(state.members.params)
    outputs = jnp.zeros((config.num_models, 2 * (OBS + 1))).at[:, 0].set(0.1)
    outputs = outputs.at[:, OBS + 1 :].set(-60.0)
    models["params"]["Dense_2"]["bias"] = outputs
    models["params"]["low"] = jnp.full_like(models["params"]["low"], -60.0)
    members["params"]["Dense_0"]["bias"] = members["params"]["Dense_0"]["bias"] + bias
    return state.replace(
        best_models=models, members=state.members.replace(params=members), references=members,
        clones=state.clones.replace(params=members),
    )  # fmt: skip


def with_q(state, function):
    """The agent with Q (2, B) = function(observations, actions), and one that is higher."""

    def apply(params, observations, actions):
        q = function(observations, actions)
        return jnp.stack([q + 1.0, q])

    return state.replace(critic=state.critic.replace(apply_fn=apply))


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_amq_on_a_model_whose_rollouts_are_known(reduce, uni_o4, monkeypatch):
    """Q = x_0 grows by 0.1 per step; the episode ends where x_0 exceeds 0.35: after the step that
    leads there nothing counts."""
    config = uni_o4.Config(**SMALL, amq=reduce)
    state = with_q(known_agent(uni_o4, config), lambda x, a: x[:, 0])
    state = state.replace(observation_mean=jnp.full(OBS, 5.0), observation_std=jnp.full(OBS, 2.0))
    begin = np.linspace(-0.9, 0.3, 16)
    starts = jnp.zeros((3, 16, OBS)).at[:, :, 0].set(begin)
    keys = jnp.stack([jax.random.PRNGKey(i) for i in range(3)])
    # the rule sees the environment's units: (x - 5) / 2 > 0.35
    monkeypatch.setattr(uni_o4, "terminated", lambda x, config: (x[:, 0] - 5.0) / 2.0 > 0.35)
    found, growth = uni_o4.amq_scores(state, state.members.params, starts, keys, config)
    visited = []
    for x in begin:
        row = [x + 0.1 * t for t in range(config.horizon)]
        visited.append([q for t, q in enumerate(row) if t == 0 or row[t - 1] + 0.1 <= 0.35 + 1e-6])
    total, count = sum(map(sum, visited)), sum(map(len, visited))
    assert count < 16 * config.horizon  # some did end
    expected = total / 16 if reduce == "sum" else total / count
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    np.testing.assert_allclose(growth, 1.0, atol=1e-3)  # |Q| is largest at the start, 0.9


def test_amq_asks_the_mean_action_inside_the_box(uni_o4):
    config = uni_o4.Config(**SMALL | dict(horizon=1))
    state = with_q(known_agent(uni_o4, config, bias=0.5), lambda x, a: a.sum(axis=1))
    found, _ = uni_o4.amq_scores(state, state.members.params, jnp.zeros((3, 16, OBS)),
                                 jnp.zeros((3, 2), jnp.uint32), config)  # fmt: skip
    np.testing.assert_allclose(found, A * np.tanh(0.5), rtol=1e-4)


def test_every_elite_and_no_other_model_steps_rows(uni_o4):
    """Models move by their own number; only the two with the smallest error are asked."""
    config = uni_o4.Config(**SMALL | dict(horizon=2))
    state = known_agent(uni_o4, config)
    models = state.best_models
    steps = jnp.array([1.0, 2.0, 4.0, 8.0])
    models["params"]["Dense_2"]["bias"] = models["params"]["Dense_2"]["bias"].at[:, 0].set(steps)
    state = with_q(
        state.replace(best_models=models, best_errors=jnp.array([3.0, 1.0, 4.0, 2.0])),
        lambda x, a: x[:, 0],
    )
    found, _ = uni_o4.amq_scores(state, state.members.params, jnp.zeros((3, 16, OBS)),
                                 jnp.zeros((3, 2), jnp.uint32), config)  # fmt: skip
    np.testing.assert_allclose(found, (2.0 + 8.0) / 2, rtol=1e-5)  # half the rows each


TERMINATIONS = [
    ("hopper", [1.2, 0.0, 1.0], False), ("hopper", [0.69, 0.0, 1.0], True),
    ("hopper", [1.2, -0.21, 1.0], True), ("hopper", [1.2, 0.0, -101.0], True),
    ("walker2d", [1.2, 0.5, 1.0], False), ("walker2d", [2.1, 0.0, 0.0], True),
    ("walker2d", [1.2, -1.1, 0.0], True), ("walker2d", [0.7, 0.0, 0.0], True),
    ("halfcheetah", [0.0, 99.0, 1.0], False), ("halfcheetah", [0.0, -100.0, 1.0], True),
    ("maze", [1.0, 1.0, 1.3, 1.3], True), ("maze", [1.0, 1.0, 1.33, 1.33], False),
    ("none", [np.inf, 0.0, 0.0], False),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "x", "ends"), TERMINATIONS)
def test_terminations_are_the_environments(rule, x, ends, uni_o4):
    config = uni_o4.Config(termination=rule)
    assert bool(uni_o4.terminated(jnp.array([x]), config)[0]) == ends


# --------------------------------------------------------------------------------------------- Gate


def ask_with(script, config, state, monkeypatch, values, incumbents=(0.0, 0.0, 0.0)):
    """One query where AM-Q gives the candidates `values`, and the references `incumbents`."""

    def scores(state, params, starts, key, config):
        same = jax.tree.leaves(params)[0] is jax.tree.leaves(state.references)[0]
        return jnp.array(incumbents if same else values), jnp.ones(3)

    monkeypatch.setattr(script, "amq_scores", scores)
    return script.query_one_seed(state, batch_of(script, 0), config)


def test_the_gate_moves_the_references_of_winners_only(uni_o4, monkeypatch):
    config = uni_o4.Config(**SMALL)
    state = agent(uni_o4, config)
    new, found = ask_with(uni_o4, config, state, monkeypatch, [1.0, -1.0, 0.5])
    np.testing.assert_array_equal(found["accepted"], [1, 0, 1])
    np.testing.assert_array_equal(found["amq_incumbent"], [1.0, 0.0, 0.5])
    for i, source in enumerate((state.members.params, state.references, state.members.params)):
        jax.tree.map(np.testing.assert_array_equal, member(new.references, i), member(source, i))
    jax.tree.map(np.testing.assert_array_equal, new.members.params, state.members.params)
    jax.tree.map(np.testing.assert_array_equal, new.actor.params, member(new.references, 0))
    again, found = ask_with(
        uni_o4, config, new, monkeypatch, [1.0, 0.2, 0.4], (1.0, 0.0, 0.5)
    )  # a tie, a win, less
    np.testing.assert_array_equal(found["accepted"], [0, 1, 0])
    np.testing.assert_array_equal(again.accepted, [1, 1, 1])


@pytest.mark.parametrize(("gate", "won"), [("always", 1), ("never", 0)])
def test_gates_without_amq(gate, won, uni_o4, monkeypatch):
    config = uni_o4.Config(**SMALL, gate=gate)
    new, found = ask_with(uni_o4, config, agent(uni_o4, config), monkeypatch, [1.0, -1.0, 0.0])
    np.testing.assert_array_equal(found["accepted"], [won] * 3)


def test_the_margin_is_relative(uni_o4, monkeypatch):
    config = uni_o4.Config(**SMALL, amq_margin=0.1, amq_paired=False)  # keeps scores
    scores = jnp.array([10.0, -10.0, 1.0])
    state = agent(uni_o4, config).replace(queries=jnp.array(1), scores=scores)
    _, found = ask_with(uni_o4, config, state, monkeypatch, [10.9, -8.9, 1.2])
    np.testing.assert_array_equal(found["accepted"], [0, 1, 1])


def test_paired_queries_give_equal_policies_equal_scores(uni_o4):
    """Every query anew; unpaired ones differ."""
    found = {}
    for paired in (True, False):
        config = uni_o4.Config(**SMALL, amq_paired=paired)
        state = agent(uni_o4, config)
        same = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), state.members.params)
        state = state.replace(members=state.members.replace(params=same))
        for _ in range(2):
            state, info = uni_o4.query_one_seed(state, jax.device_put(batch_of(uni_o4, 0)), config)
            found.setdefault(paired, []).append(np.asarray(info["amq"]))
    assert [len({float(x) for x in row}) for row in found[True]] == [1, 1]
    assert found[True][0][0] != found[True][1][0]
    assert len({float(x) for row in found[False] for x in row}) == 6


def test_an_exploding_model_halves_the_horizon_and_scores_begin_anew(uni_o4, monkeypatch):
    config = uni_o4.Config(**SMALL)
    state = agent(uni_o4, config).replace(queries=jnp.array(5))
    scores, growth = uni_o4.amq_scores, jnp.array([1.0, 11.0, 1.0])
    monkeypatch.setattr(uni_o4, "amq_scores", lambda *a: (scores(*a)[0], growth))
    new, _ = uni_o4.query_one_seed(state, jax.device_put(batch_of(uni_o4, 0)), config)
    assert (int(new.horizon), int(new.queries)) == (3, 0)
    same = partial(jax.tree.map, np.testing.assert_array_equal)
    same((new.references, new.actor.params), (state.references, state.actor.params))


def test_a_model_that_never_saw_an_epoch_is_judged_at_its_end(uni_o4):
    """A stage shorter than an epoch leaves a trained model, not the one it began with."""
    config = uni_o4.Config(**SMALL, dynamics_steps=5)
    state = created(uni_o4, config)
    before = state.best_models
    state = jax.tree.map(lambda x: jnp.asarray(x)[None], state)
    dataset = jax.device_put(linear_rows(uni_o4))
    state, info = uni_o4.offline_updates(state, dataset, "dynamics", config, 5)
    assert (state.best_errors < 1e8).all()
    assert not any(jax.tree.leaves(jax.tree.map(
        lambda x, y: np.array_equal(x[0], y), state.best_models["params"]["Dense_0"],
        before["params"]["Dense_0"])))  # fmt: skip


def test_ranking_counts_pairs(uni_o4):
    rows = [{"amq": a, "return": r} for a, r in ((1, 10), (2, 30), (3, 20), (4, 20))]
    # ordered rightly: 1-2, 1-3, 1-4; wrongly: 2-3, 2-4; 3-4 are equal
    assert uni_o4.ranking(rows) == 3 / 5


# ---------------------------------------------------------------------------------------------- PPO


@pytest.fixture(params=["ppo", "uni_o4"])
def script(request):
    return request.getfixturevalue(request.param)


def ppo_config(script, **changes):
    small = dict(hidden_dims=(16, 8), value_hidden_dims=(16, 8), rollout_steps=B, num_envs=2)
    own = dict(batch_size=4, activation="relu")
    if script.__name__ == "uni_o4":
        own = SMALL | dict(minibatch_size=4)
    return script.Config(**own | small | changes)


def rollout_of(script, seed=0, steps=8, envs=2):
    rng, batch = np.random.default_rng(seed), batch_of(script, seed, steps * envs)
    batch = jax.tree.map(lambda x: x.reshape(steps, envs, *x.shape[1:]), batch)
    ends = np.float32((1 - batch.masks) + (rng.random((steps, envs)) < 0.2) > 0)
    assert ((ends == 1) & (batch.masks == 1)).any()
    assert ((ends == 1) & (batch.masks == 0)).any()
    return batch, ends


def test_gae_is_the_double_sum(script):
    """Over every later step of the episode; a time limit bootstraps, a termination does not."""
    config = ppo_config(script, discount=0.9, gae_lambda=0.8)
    state = agent(script, config)
    batch, ends = rollout_of(script)
    found, values = script.generalised_advantages(state, batch, ends, config)
    params, b = wide(state.value.params), wide(batch)
    flat = partial(v_of, params, xp=np)
    v = flat(b.observations.reshape(-1, OBS)).reshape(8, 2)
    following = flat(b.next_observations.reshape(-1, OBS)).reshape(8, 2)
    np.testing.assert_allclose(values, v, rtol=1e-4, atol=1e-5)
    delta = b.rewards + 0.9 * b.masks * following - v
    for e in range(2):
        for t in range(8):
            total, weight = 0.0, 1.0
            for k in range(t, 8):
                total, weight = total + weight * delta[k, e], weight * 0.9 * 0.8
                if ends[k, e]:
                    break
            np.testing.assert_allclose(found[t, e], total, rtol=1e-4, atol=1e-5)


def sample_of(script, state, seed):
    rng, batch = np.random.default_rng(seed), batch_of(script, seed)
    return script.Sample(
        observations=batch.observations, actions=np.float32(1.5 * rng.normal(size=(B, A))),
        log_probs=np.float32(rng.normal(size=B) - 3), advantages=np.float32(rng.normal(size=B)),
        values=np.float32(rng.normal(size=B)), returns=np.float32(rng.normal(size=B)),
    )  # fmt: skip


@pytest.mark.parametrize("value_clip", [0.0, 0.3])
def test_ppo_losses_written_out(value_clip, script):
    config = ppo_config(script, clip_ratio=0.1, entropy_weight=0.01, value_clip=value_clip)
    for seed in range(3):
        state = agent(script, config, seed)
        batch = sample_of(script, state, seed)
        b = wide(batch)
        mean, std = gaussian_of(wide(state.actor.params), b.observations)
        ratio = np.exp(gaussian_log_prob(b.actions, mean, std, np) - b.log_probs)
        surrogate = np.minimum(ratio * b.advantages, np.clip(ratio, 0.9, 1.1) * b.advantages)
        entropy = (np.log(std) + 0.5 * np.log(2 * np.pi * np.e)).sum(axis=1).mean()
        found, info = compiled(script, "actor_loss", config)(state.actor.params, state, batch, None)
        np.testing.assert_allclose(found, -surrogate.mean() - 0.01 * entropy, rtol=1e-3)
        np.testing.assert_allclose(info["entropy"], entropy, rtol=1e-4)
        v = v_of(wide(state.value.params), b.observations, np)
        errors = (v - b.returns) ** 2
        if value_clip:
            near = b.values + np.clip(v - b.values, -0.3, 0.3)
            errors = np.maximum(errors, (near - b.returns) ** 2)
        found, _ = compiled(script, "value_loss", config)(state.value.params, state, batch, None)
        np.testing.assert_allclose(found, errors.mean(), rtol=1e-4)


def test_v_regresses_on_raw_advantages_and_pi_ascends_normalised_ones(script, monkeypatch):
    config = ppo_config(script, epochs=1)
    state = agent(script, config)
    batch, ends = jax.device_put(rollout_of(script))
    seen = []

    def update(state, batch, config):
        jax.debug.callback(lambda b: seen.append(b), batch, ordered=True)
        return state, {"actor_loss": jnp.zeros(())}

    monkeypatch.setattr(script, "update_step", update)
    script.improve(state, batch, ends, config)
    jax.effects_barrier()
    rows = jax.tree.map(lambda *xs: np.concatenate(xs), *seen)
    assert len(seen) == 4
    raw, values = script.generalised_advantages(state, batch, ends, config)
    np.testing.assert_allclose(np.sort(rows.returns), np.sort(np.ravel(raw + values)), rtol=1e-4)
    np.testing.assert_allclose([rows.advantages.mean(), rows.advantages.std()], [0, 1], atol=1e-4)
    order = np.argsort(np.ravel(raw + values))
    mine = np.argsort(rows.returns)
    raw = (np.ravel(raw) - raw.mean()) / raw.std()
    np.testing.assert_allclose(rows.advantages[mine], raw[order], rtol=1e-3, atol=1e-4)
    policy = state.actor.apply_fn(state.actor.params, rows.observations)
    np.testing.assert_allclose(rows.log_probs, policy.log_prob(rows.actions), rtol=1e-4)


# --------------------------------------------------------------------------------------- Whole runs


@pytest.fixture(scope="module")
def flags(pendulum):
    return ["--dataset", str(pendulum), "--env-id", "Pendulum-v1", "--preset", "smoke",
            "--cloning-steps", "60", "--critic-steps", "60", "--dynamics-steps", "60",
            "--improvement-steps", "100", "--online-steps", "256", "--log-interval", "20",
            "--eval-interval", "40", "--hidden-dims", "8", "--resume", "run"]  # fmt: skip


@pytest.fixture(scope="module")
def reused(uni_o4):
    with reused_agents(uni_o4) as patched:
        yield patched


def evaluations(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [row for row in csv.DictReader(file) if row["return"]]


def test_the_switch_changes_nothing_and_a_killed_run_resumes(reused, flags, tmp_path):
    """Killed in the improvement, after a query that the checkpoint does not know, and online."""
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    assert go(reused, tmp_path / "whole", [*flags, "--true-scores"]).code == 0
    rows = evaluations(tmp_path / "whole" / "run")
    last = [row for row in rows if row["phase"] == "offline"][-1]
    first = next(row for row in rows if row["phase"] == "online")
    assert (first["step"], first["return"]) == ("0", last["return"])
    folder = tmp_path / "killed"
    with pytest.raises(Killed), on_call(reused, "ask", 2, die):
        go(reused, folder, [*flags, "--true-scores"])
    with pytest.raises(Killed), on_call(reused, "step_rollout", 100, die):
        go(reused, folder, [*flags, "--true-scores"])
    assert go(reused, folder, [*flags, "--true-scores"]).code == 0
    assert_same_run(folder / "run", tmp_path / "whole" / "run")
    one, other = (tmp_path / name / "run" / "queries.csv" for name in ("whole", "killed"))
    assert one.read_bytes() == other.read_bytes()
    assert one.read_text().count("\n") == 1 + 2 * 2  # two members, two queries


def test_the_online_v_begins_as_the_offline_one(uni_o4):
    state = agent(uni_o4, uni_o4.Config(**SMALL))
    new = uni_o4.begin_fine_tuning(state)
    same = partial(jax.tree.map, np.testing.assert_array_equal)
    same(new.value.params, state.offline_value.params)
    same(new.actor.params, state.actor.params)
    assert not any(x.any() for x in jax.tree.leaves(new.actor.opt_state))


@pytest.fixture(scope="module")
def finished(reused, flags, tmp_path_factory):
    """Folder of a run of both phases."""
    folder = tmp_path_factory.mktemp("finished")
    assert go(reused, folder, flags).code == 0
    return folder / "run"


def test_fine_tuning_goes_on_from_a_finished_agent_with_fresh_optimisers(
    reused, flags, finished, tmp_path, monkeypatch
):
    """It plays the saved policy and V; the learning rate starts anew; another key."""
    seen = []
    start = reused.start_on_policy
    monkeypatch.setattr(
        reused,
        "start_on_policy",
        lambda run, saved=None: (seen.append(jax.device_get(run.shards[0])), start(run, saved)),
    )
    done = go(reused, tmp_path, [*flags, "--init-from", str(finished)])
    assert done.code == 0 and {phase for phase, _ in done.logged} == {"online"}
    with np.load(finished / "checkpoint.npz") as saved:
        for name in ("actor", "value"):
            tree = reused.named_arrays(getattr(seen[0], name).params, f"state/{name}/params")
            for leaf, value in tree.items():
                np.testing.assert_array_equal(value, saved[leaf])
        assert not np.array_equal(seen[0].key, saved["state/key"])
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(seen[0].actor.opt_state))


def test_only_the_improvement_is_made_again(reused, flags, finished, tmp_path):
    """With the same settings it ends as the run that it was taken from; a gate that never opens
    leaves the references what they were."""
    folder = tmp_path / "again"
    folder.mkdir()
    wanted = [*flags, "--supervised-from", str(finished), "--stages", "offline"]
    done = go(reused, folder, [*wanted, "--gate", "never"])
    assert done.code == 0
    assert done.logged[0] == ("offline", 200)  # improvement alone, from the 180th update on
    one, other = (np.load(f / "checkpoint.npz") for f in (finished, folder / "run"))
    clones = [name for name in one.files if name.startswith("state/clones/params")]
    assert clones
    for name in clones:
        np.testing.assert_array_equal(one[name], other[name])
        reference = name.replace("state/clones/params", "state/references")
        np.testing.assert_array_equal(other[reference], one[name])


REFUSALS = {
    "another activation": (["--activation", "tanh"], "--activation"),
    "another reward scale": (["--reward-scale", "0.5"], "--reward-scale"),
    "nothing to do": (["--stages", "offline"], "nothing is left"),
    "other supervised stages": (
        ["--supervised-from", "{}", "--critic-steps", "80"],
        "critic_steps",
    ),
    "another script's": (["--stages", "online,offline,online"], "ppo.py"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_does_not_fit_a_checkpoint_is_refused(case, reused, flags, finished, tmp_path):
    extra, text = REFUSALS[case]
    if case == "another script's":
        flags = ["--preset", "smoke", "--env-id", "Pendulum-v1", "--resume", "run"]
    extra = [word.format(finished) for word in extra]
    if "--supervised-from" not in extra:
        extra += ["--init-from", str(finished)]
    done = go(reused, tmp_path, [*flags, *extra])
    assert done.code == 2 and text in done.err
    assert not (tmp_path / "run").exists()


SIZES = {
    "--rollout-steps": ["--rollout-steps", "100"], "--amq-starts": ["--amq-starts", "33"],
    "--num-elites": ["--num-elites", "4", "--amq-starts", "32"],
    "--dynamics-steps": ["--dynamics-steps", "0"], "--termination": ["--termination", "never"],
}  # fmt: skip


@pytest.mark.parametrize("flag", SIZES)
def test_sizes_that_do_not_fit_are_refused(flag, reused, flags, tmp_path):
    done = go(reused, tmp_path, [*flags, *SIZES[flag]])
    assert done.code == 2 and flag in done.err and done.err.count("\n") == 1


def test_online_offline_online_in_one_command(uni_o4, tmp_path):
    """Pre-trained in the plain world, collected and improved in the shifted one; killed anywhere,
    the run goes on to the same bits."""
    flags = ["--preset", "smoke", "--env-id", "Hopper-v5", "--stages", "online,offline,online",
             "--shift", "friction=0.4,mass=1.3", "--cloning-steps", "0", "--critic-steps", "40",
             "--dynamics-steps", "40", "--improvement-steps", "50", "--eval-interval", "128",
             "--log-interval", "64", "--hidden-dims", "8", "--resume", "run"]  # fmt: skip
    with reused_agents(uni_o4) as script:
        for name in ("whole", "killed"):
            (tmp_path / name).mkdir()
        assert go(script, tmp_path / "whole", flags).code == 0
        for call, count in (("improve_policies", 2), ("prepare_offline", 1), ("query", 1)):
            with pytest.raises(Killed), on_call(script, call, count, die):
                go(script, tmp_path / "killed", flags)
        assert go(script, tmp_path / "killed", flags).code == 0
    assert_same_run(tmp_path / "killed" / "run", tmp_path / "whole" / "run")
    record = json.loads((tmp_path / "whole" / "run" / "record.json").read_text())
    assert record["environment"]["additional_wrappers"][0]["kwargs"] == {
        "friction": 0.4, "mass": 1.3}  # fmt: skip
    assert list(dict.fromkeys(record["curve"]["phase"])) == ["pretrain", "offline", "online"]
    with np.load(tmp_path / "whole" / "run" / "collected.npz") as data:
        ends = data["terminals"] | data["timeouts"]
        assert len(ends) == 600 and data["terminals"].sum() > 5
        same = (data["next_observations"][:-1] == np.float32(data["observations"][1:])).all(axis=1)
        assert same[~ends[:-1]].all() and not same[ends[:-1]].any()


# ------------------------------------------------------------------------------------------ Physics


def test_shifted_physics_changes_the_model_and_delays_actions(ppo):
    spec = ppo.environment_spec(None, "Hopper-v5")
    plain = ppo.make_env(spec)
    text = "friction=0.5,mass=2,strength=0.25,damping=3,delay=2"
    env = ppo.make_env(ppo.shifted(spec, text))
    old, new = plain.unwrapped.model, env.unwrapped.model
    for name, factor in (("geom_friction", 0.5), ("body_mass", 2), ("body_inertia", 2),
                         ("actuator_gear", 0.25), ("dof_damping", 3)):  # fmt: skip
        np.testing.assert_allclose(getattr(new, name), factor * getattr(old, name))
    np.testing.assert_allclose(new.body_subtreemass, 2 * old.body_subtreemass)  # derived
    env = ppo.make_env(ppo.shifted(spec, "delay=2"))
    for each in (plain, env):
        each.reset(seed=0)
    ones, zeros = np.ones(3, np.float32), np.zeros(3, np.float32)
    for late, now in ((ones, zeros), (-ones, zeros), (ones, ones), (ones, -ones)):
        np.testing.assert_array_equal(env.step(late)[0], plain.step(now)[0])
    for each in (plain, env):
        each.reset(seed=1)
    np.testing.assert_array_equal(env.step(ones)[0], plain.step(zeros)[0])  # nothing is left over


@pytest.mark.parametrize("text", ["mas=1", "mass", "mass=0", "friction=x", "delay=1.5", "mass=1,"])
def test_bad_shifts_are_refused(text, ppo, capsys):
    with pytest.raises(SystemExit):
        ppo.shifted(ppo.environment_spec(None, "Hopper-v5"), text)
    assert "--shift" in capsys.readouterr().err


def test_ppo_resumes_to_the_same_bits_and_seed_by_seed(ppo, tmp_path):
    flags = ["--preset", "smoke", "--env-id", "Pendulum-v1", "--hidden-dims", "8",
             "--resume", "run"]  # fmt: skip
    with reused_agents(ppo) as script:
        for name in ("whole", "killed"):
            (tmp_path / name).mkdir()
        assert go(script, tmp_path / "whole", flags).code == 0
        with pytest.raises(Killed), on_call(script, "improve_policies", 3, die):
            go(script, tmp_path / "killed", flags)
        assert go(script, tmp_path / "killed", flags).code == 0
    assert_same_run(tmp_path / "killed" / "run", tmp_path / "whole" / "run")


def test_ppo_solves_a_bandit(ppo):
    """One-step episodes with reward -(a - 0.5 x)^2: the mean action goes to 0.5 x."""
    config = ppo.Config(
        hidden_dims=(32, 32), value_hidden_dims=(32, 32), rollout_steps=256, batch_size=64,
        learning_rate=3e-3, online_steps=256 * 60, clip_ratio=0.2, num_envs=1,
    )  # fmt: skip
    state, rng = ppo.create_agent_state(jax.random.PRNGKey(0), 1, 1, config), None
    rng = np.random.default_rng(0)
    improve = jax.jit(partial(ppo.improve, config=config))
    for _ in range(60):
        x = np.float32(rng.choice([-1.0, 1.0], (256, 1, 1)))
        key, noise = jax.random.split(state.key)
        action = state.actor.apply_fn(state.actor.params, x).sample(seed=noise)
        reward = -((np.clip(action, -1, 1) - 0.5 * x) ** 2)[..., 0]
        zeros = np.zeros((256, 1), np.float32)
        batch = ppo.Batch(x, np.asarray(action), np.float32(reward), x, zeros)
        state, _ = improve(state.replace(key=key), batch, zeros + 1)
    states = np.array([[-1.0], [1.0]], np.float32)
    np.testing.assert_allclose(ppo.mode_actions(state, states)[:, 0], [-0.5, 0.5], atol=0.1)


def test_presets(uni_o4):
    """Every preset is a configuration within the ranges; some values of the published scripts."""
    for name, settings in uni_o4.PRESETS.items():
        uni_o4.check_config(dataclasses.replace(uni_o4.Config(preset=name), **settings))
    wanted = {
        "hopper": dict(normalize_observations=True, activation="relu", horizon=1000),
        "halfcheetah": dict(normalize_observations=True, activation="tanh"),
        "halfcheetah-medium-replay": dict(normalize_observations=False, activation="tanh"),
        "door-human": dict(improvement_steps=5_000, improvement_learning_rate=1e-5),
        "kitchen-complete": dict(critic_steps=500_000, improvement_steps=1_000),
        "antmaze-large": dict(expectile=0.9, critic_hidden_dims=(256,) * 3, horizon=200),
        "hopper-code": dict(amq="mean", amq_paired=False, diversity="heuristic"),
    }  # fmt: skip
    for name, settings in wanted.items():
        config = dataclasses.replace(uni_o4.Config(), **uni_o4.PRESETS[name])
        assert {k: getattr(config, k) for k in settings} == settings
