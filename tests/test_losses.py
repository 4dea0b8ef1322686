"""Every loss, and whole updates in their order, against float64 re-computations written out here.

The references know nothing of flax, distrax or optax: they take parameter arrays. With xp=np they
are NumPy; with xp=jnp, under x64, jax differentiates them for the comparison of whole updates.
"""

import dataclasses
import math
from functools import lru_cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

OBS, A, B = 3, 2, 16  # observation, action and batch size
STATE_NETWORKS = {"iql": ("actor", "critic", "value"), "sac": ("actor", "critic", "temperature")}

# ---------------------------------------------------------------------------- Networks, written out


def hidden(tree, x, xp):
    for name in sorted(tree["MLP_0"]):
        x = xp.maximum(x @ tree["MLP_0"][name]["kernel"] + tree["MLP_0"][name]["bias"], 0)
    return x


def scalar(tree, x, xp):
    head = tree["ScalarHead_0"]
    return (hidden(tree, x, xp) @ head["kernel"])[:, 0] + head["bias"]


def v_of(params, observations, xp):
    return scalar(params["params"], observations, xp)


def q_of(params, observations, actions, xp):
    """(N, B)."""
    stacked, x = params["params"]["VmapCritic_0"], xp.concatenate([observations, actions], axis=1)
    count = len(stacked["ScalarHead_0"]["bias"])
    members = [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(count)]
    return xp.stack([scalar(member, x, xp) for member in members])


def dense(tree, name, x):
    return x @ tree[name]["kernel"] + tree[name]["bias"]


def gaussian_log_prob(x, mean, std, xp):
    """(B, A) -> (B,)."""
    return (-0.5 * ((x - mean) / std) ** 2 - xp.log(std) - 0.5 * math.log(2 * math.pi)).sum(axis=1)


def squashed_sample(params, observations, noise, xp):
    """SAC's action tanh(mean + std * noise) (B, A) and its log-probability (B,)."""
    tree = params["params"]
    features = hidden(tree, observations, xp)
    mean = dense(tree, "Dense_0", features)
    std = xp.exp(xp.clip(dense(tree, "Dense_1", features), -10.0, 2.0))
    u = mean + std * noise
    correction = 2 * (math.log(2) - u - xp.logaddexp(0.0, -2 * u)).sum(axis=1)  # log(1 - tanh(u)^2)
    return xp.tanh(u), gaussian_log_prob(u, mean, std, xp) - correction


# ------------------------------------------------------------------------------ Losses, written out
# s: the parameters by name, "target" among them. Each is differentiated in its first argument.


def iql_value(p, s, b, noise, c, xp):
    u = q_of(s["target"], b.observations, b.actions, xp).min(axis=0) - v_of(p, b.observations, xp)
    return xp.where(u < 0, (1 - c.expectile) * u * u, c.expectile * u * u).mean()


def iql_actor(p, s, b, noise, c, xp):
    q = q_of(s["target"], b.observations, b.actions, xp).min(axis=0)
    weight = xp.exp(c.beta * (q - v_of(s["value"], b.observations, xp)))
    weight = xp.where(weight > c.max_weight, c.max_weight, weight)
    tree = p["params"]
    mean = xp.tanh(dense(tree, "Dense_0", hidden(tree, b.observations, xp)))
    std = xp.exp(xp.clip(tree["log_std"], -5.0, 2.0))
    return -(weight * gaussian_log_prob(b.actions, mean, std, xp)).mean()


def iql_critic(p, s, b, noise, c, xp):
    target = b.rewards + c.discount * b.masks * v_of(s["value"], b.next_observations, xp)
    q = q_of(p, b.observations, b.actions, xp)
    return sum(((q[i] - target) ** 2).mean() for i in range(len(q)))


def sac_critic(p, s, b, noise, c, xp):
    a, log_prob = squashed_sample(s["actor"], b.next_observations, noise, xp)
    next_q = q_of(s["target"], b.next_observations, a, xp).min(axis=0)
    next_v = next_q - xp.exp(s["temperature"]["params"]["log_temperature"]) * log_prob
    q = q_of(p, b.observations, b.actions, xp)
    target = b.rewards + c.discount * b.masks * next_v
    return sum(((q[i] - target) ** 2).mean() for i in range(len(q)))


def sac_actor(p, s, b, noise, c, xp):
    a, log_prob = squashed_sample(p, b.observations, noise, xp)
    q = q_of(s["critic"], b.observations, a, xp).min(axis=0)
    return (xp.exp(s["temperature"]["params"]["log_temperature"]) * log_prob - q).mean()


def sac_temperature(p, s, b, noise, c, xp):
    _, log_prob = squashed_sample(s["actor"], b.observations, noise, xp)
    excess = -log_prob.mean() - c.entropy_per_action * A
    return xp.exp(p["params"]["log_temperature"]) * excess


# ------------------------------------------------------------------------------------------ Helpers


def config_of(script, **changes):
    return script.Config(hidden_dims=(16, 8), batch_size=B, **changes)


UPDATE = {  # learning rates are large, so that an old V in place of the new one shows
    "iql": lambda script: config_of(
        script, learning_rate=3e-2, offline_steps=3, tau=0.2, max_weight=20.0
    ),
    "sac": lambda script: config_of(script, learning_rate=1e-2, tau=0.2),
}


def batch_of(script, seed, size=B, dtype=np.float32, scale=1.0):
    rng = np.random.default_rng(seed)
    return script.Batch(
        observations=rng.normal(size=(size, OBS)).astype(dtype),
        actions=rng.uniform(-1, 1, (size, A)).astype(dtype),
        rewards=(scale * rng.normal(size=size)).astype(dtype),
        next_observations=rng.normal(size=(size, OBS)).astype(dtype),
        masks=(rng.random(size) < 0.7).astype(dtype),
    )


@lru_cache
def template(script, config):
    """An agent of zeros; cached, because a new optimiser object would compile everything again."""
    create = partial(script.create_agent_state, observation_dim=OBS, action_dim=A, config=config)
    shapes = jax.eval_shape(create, jax.random.PRNGKey(0))
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)


@lru_cache
def compiled(script, name, config):
    return jax.jit(partial(getattr(script, name), config=config))


def fresh(script, config, seed=0):
    """An agent with random parameters everywhere: no bias is 0, the target critic is not Q."""
    rng, state = np.random.default_rng(seed), template(script, config)

    def draw(tree):
        return jax.tree.map(lambda x: np.float32(0.4 * rng.normal(size=x.shape)), tree)

    networks = STATE_NETWORKS[Path(script.__file__).stem]
    trained = {name: getattr(state, name) for name in networks}
    drawn = {name: each.replace(params=draw(each.params)) for name, each in trained.items()}
    target = draw(state.target_critic_params)
    return state.replace(target_critic_params=target, key=jax.random.PRNGKey(seed), **drawn)


def parameters(state):
    """{name: parameters in float64}, the target critic's as "target"."""
    names = ("actor", "critic", "value", "temperature")
    networks = [name for name in names if hasattr(state, name)]
    trees = {name: getattr(state, name).params for name in networks}
    trees["target"] = state.target_critic_params
    return jax.tree.map(lambda x: np.asarray(x, np.float64), trees)


def float64(batch):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), batch)


def noise_of(sac, key, size=B):
    """The standard normal noise (B, A) behind the policy's sample at this key: read from a policy
    of mean 0 and std 0.1, where tanh loses no digits."""
    state = fresh(sac, config_of(sac))
    params = jax.tree.map(np.zeros_like, state.actor.params)
    params["params"]["Dense_1"]["bias"][:] = math.log(0.1)
    sample = state.actor.apply_fn(params, np.zeros((size, OBS))).sample(seed=key)
    return np.arctanh(np.asarray(sample, np.float64)) / 0.1


def close(found, expected, rtol=1e-5, atol=1e-6):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=rtol, atol=atol), found, expected)


# ------------------------------------------------------------------------- Losses against NumPy


@pytest.mark.parametrize("name", ["value", "actor", "critic"])
def test_iql_loss_is_the_papers(iql, name):
    config = config_of(iql, expectile=0.8, beta=2.0, max_weight=3.0)
    reference = {"value": iql_value, "actor": iql_actor, "critic": iql_critic}[name]
    compute, clipped = compiled(iql, f"{name}_loss", config), False
    for seed in range(5):
        state, batch = fresh(iql, config, seed), batch_of(iql, seed)
        found, info = compute(getattr(state, name).params, state, batch, state.key)
        s, b = parameters(state), float64(batch)
        expected = reference(s[name], s, b, None, config, np)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        np.testing.assert_allclose(info[f"{name}_loss"], expected, rtol=1e-5)
        advantage = (q_of(s["target"], b.observations, b.actions, np).min(axis=0)
                     - v_of(s["value"], b.observations, np))
        logged = {"v": v_of(s["value"], b.observations, np).mean(), "advantage": advantage.mean(),
                  "weight": np.minimum(np.exp(2.0 * advantage), 3.0).mean(),
                  "q": q_of(s["critic"], b.observations, b.actions, np).mean(),
                  "policy_std": np.exp(s["actor"]["params"]["log_std"]).mean()}
        close({k: v for k, v in info.items() if k in logged}, {k: logged[k] for k in info
              if k in logged}, atol=1e-5)
        clipped |= (np.exp(2.0 * advantage) > 3.0).any() and (np.exp(2.0 * advantage) < 3.0).any()
    assert clipped  # some weights were, some were not: both sides of the clip were compared


@pytest.mark.parametrize("name", ["critic", "actor", "temperature"])
def test_sac_loss_is_the_papers(sac, name):
    config = config_of(sac)
    key = jax.random.PRNGKey(5)
    noise, compute = noise_of(sac, key), compiled(sac, f"{name}_loss", config)
    reference = {"critic": sac_critic, "actor": sac_actor, "temperature": sac_temperature}[name]
    for seed in range(5):
        state, batch = fresh(sac, config, seed), batch_of(sac, seed)
        s, b = parameters(state), float64(batch)
        params = getattr(state, name).params
        if name == "temperature":
            entropy = -squashed_sample(s["actor"], b.observations, noise, np)[1].mean()
            found, _ = compute(params, state, np.float32(entropy), np.int32(A))
        else:
            found, info = compute(params, state, batch, key)
        if name == "actor":
            entropy = -squashed_sample(s["actor"], b.observations, noise, np)[1].mean()
            np.testing.assert_allclose(info["entropy"], entropy, rtol=1e-5)
        np.testing.assert_allclose(found, reference(s[name], s, b, noise, config, np), rtol=1e-5)


# ----------------------------------------------------------------- Whole updates, Adam written out


def adam(params, grads, moments, step, learning_rate):
    """(parameters, moments) after step `step` (from 1)."""
    first, second = moments
    first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, grads)
    second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, second, grads)

    def move(p, m, v):
        m, v = m / (1 - 0.9**step), v / (1 - 0.999**step)
        return p - learning_rate * m / (np.sqrt(v) + 1e-8)

    return jax.tree.map(move, params, first, second), (first, second)


def replay(s, batches, noises, order, rates, config):
    """Parameters and Adam's moments after one update per batch: networks in `order`, each seeing
    those before it already updated, then the target critic."""
    zeros = jax.tree.map(np.zeros_like, s)
    moments = {name: (zeros[name], zeros[name]) for name in order}
    with jax.enable_x64(True):
        grads_of = {name: jax.jit(jax.grad(partial(loss, c=config, xp=jnp)))
                    for name, (loss, _) in order.items()}
        for i, (batch, noise) in enumerate(zip(batches, noises, strict=True)):
            before = s
            for name, (_, sees) in order.items():
                # the networks that the loss must see updated, all others from before the update
                seen = before | {other: s[other] for other in sees}
                grads = jax.device_get(grads_of[name](s[name], seen, batch, noise[name]))
                rate = rates[name][i]
                new, moments[name] = adam(s[name], grads, moments[name], i + 1, rate)
                s = s | {name: new}
            target = jax.tree.map(
                lambda q, old: config.tau * q + (1 - config.tau) * old, s["critic"], s["target"]
            )
            s = s | {"target": target}
    return s, moments


def assert_same(state, s, moments):
    """A float32 state equals the float64 replay: each parameter, each moment of Adam."""
    for name, (first, second) in moments.items():
        found = getattr(state, name).opt_state[0]
        for tree, expected in ((found.mu, first), (found.nu, second)):
            scale = max(np.abs(x).max() for x in jax.tree.leaves(expected))
            close(tree, expected, rtol=1e-3, atol=1e-4 * scale)
    close(parameters(state), s, rtol=1e-3, atol=2e-4)


def test_iql_updates_replayed_step_by_step(iql):
    """Order V, pi (new V), Q (new V), target; gradients of the own parameters only; the actor's
    learning rate along its cosine over 3 offline updates, and constant in 3 online ones."""
    rate, config = 3e-2, UPDATE["iql"](iql)
    state, batches = fresh(iql, config), [batch_of(iql, i) for i in range(6)]
    order = {"value": (iql_value, ()), "actor": (iql_actor, ("value",)),
             "critic": (iql_critic, ("value",))}
    cosine = [rate * 0.5 * (1 + math.cos(math.pi * i / 3)) for i in range(3)] + [rate] * 3
    rates = {"value": [rate] * 6, "actor": cosine, "critic": [rate] * 6}
    wide = [float64(batch) for batch in batches]
    expected = replay(parameters(state), wide, [dict.fromkeys(order)] * 6, order, rates, config)
    update = compiled(iql, "update_step", config)
    for batch in batches:
        state, _ = update(state, batch)
    assert_same(state, *expected)


def test_sac_updates_replayed_step_by_step(sac):
    """Order Q, pi (new Q), temperature (at the entropy that pi's loss saw), target."""
    rate, config = 1e-2, UPDATE["sac"](sac)
    state, batches = fresh(sac, config), [batch_of(sac, i) for i in range(3)]
    noises, key = [], state.key
    for _ in batches:
        key, critic_key, actor_key = jax.random.split(key, 3)
        actor_noise = noise_of(sac, actor_key)
        noises.append({"critic": noise_of(sac, critic_key), "actor": actor_noise,
                       "temperature": actor_noise})
    order = {"critic": (sac_critic, ()), "actor": (sac_actor, ("critic",)),
             "temperature": (sac_temperature, ())}
    rates = dict.fromkeys(order, [rate] * 3)
    expected = replay(parameters(state), map(float64, batches), noises, order, rates, config)
    update = compiled(sac, "update_step", config)
    for batch in batches:
        state, _ = update(state, batch)
    assert_same(state, *expected)
    np.testing.assert_array_equal(state.key, key)


# --------------------------------------------------------------------------- By hand, and the edges


def constant(tree, value):
    """Parameters of a scalar network whose output is `value` everywhere."""
    tree = jax.tree.map(np.zeros_like, tree)
    head = next(node for node in (tree["params"], *tree["params"].values())
                if "ScalarHead_0" in node)["ScalarHead_0"]
    head["bias"] = np.broadcast_to(np.float32(value), head["bias"].shape)
    return tree


def test_expectile_by_hand(iql):
    """V = 0 and critics (q, q + 1), so that their minimum is q: |0.9 - 1(q < 0)| q^2."""
    config = config_of(iql, expectile=0.9)
    state, batch = fresh(iql, config), batch_of(iql, 0)
    for q, expected in ((2.0, 0.9 * 4), (-2.0, 0.1 * 4)):
        target = constant(state.target_critic_params, [q, q + 1])
        params = constant(state.value.params, 0.0)
        state = state.replace(target_critic_params=target)
        loss, _ = compiled(iql, "value_loss", config)(params, state, batch, None)
        np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_weight_by_hand(iql):
    """Weights exp(beta * (Q - V)) = e^1 and e^-1, and 100 where the exponential is larger."""
    config = config_of(iql, beta=0.5)
    state, batch = fresh(iql, config), batch_of(iql, 0)
    tree = parameters(state)["actor"]["params"]
    mean = np.tanh(dense(tree, "Dense_0", hidden(tree, batch.observations, np)))
    std = np.exp(tree["log_std"])
    likelihood = gaussian_log_prob(float64(batch).actions, mean, std, np).mean()
    for q, weight in ((3.0, math.e), (-1.0, 1 / math.e), (1e4, 100.0)):
        s = state.replace(
            target_critic_params=constant(state.target_critic_params, [q, q + 1]),
            value=state.value.replace(params=constant(state.value.params, 1.0)),
        )
        loss, info = compiled(iql, "actor_loss", config)(s.actor.params, s, batch, s.key)
        np.testing.assert_allclose(info["weight"], weight, rtol=1e-5)
        np.testing.assert_allclose(loss, -weight * likelihood, rtol=1e-5)


@pytest.mark.parametrize("name", ["iql", "sac"])
def test_terminal_rows_have_no_future(request, name):
    """At mask 0 the target is the reward, wherever the row leads; at mask 1 it is not."""
    script = request.getfixturevalue(name)
    config = config_of(script)
    state, batch = fresh(script, config), batch_of(script, 0)
    q = q_of(parameters(state)["critic"], batch.observations, batch.actions, np)
    expected = ((q - batch.rewards) ** 2).mean(axis=1).sum()
    for mask in (0.0, 1.0):
        moved = batch.replace(masks=np.full(B, mask, np.float32),
                              next_observations=100 * batch.next_observations)
        compute = compiled(script, "critic_loss", config)
        loss, _ = compute(state.critic.params, state, moved, state.key)
        assert np.isclose(loss, expected, rtol=1e-5) == (mask == 0)


def test_actor_learning_rate(iql):
    """Cosine to 0 over the offline updates, then constant or another cosine over the online ones;
    constant where nothing is to decay."""
    config = config_of(iql, offline_steps=100)
    rates = [float(iql.actor_schedule(config)(i)) for i in (0, 50, 99, 100, 101, 10**6)]
    np.testing.assert_allclose(rates, 3e-4 * np.array([1, 0.5, 2.4672e-4, 1, 1, 1]), rtol=1e-3)
    for change in ({"decay_actor_lr": False}, {"init_from": "x"}, {"offline_steps": 0}):
        schedule = iql.actor_schedule(dataclasses.replace(config, **change))
        np.testing.assert_allclose([schedule(i) for i in (0, 50, 99, 200)], 3e-4, rtol=1e-6)
    config = dataclasses.replace(
        config, online_steps=100, utd_ratio=2, decay_actor_lr_online=True)
    rates = [float(iql.actor_schedule(config)(i)) for i in (0, 50, 99, 100, 200, 300)]
    np.testing.assert_allclose(rates, 3e-4 * np.array([1, 0.5, 2.4672e-4, 1, 0.5, 0]), atol=1e-9)


def test_dropout_only_in_training(iql):
    config = config_of(iql, dropout_rate=0.5)
    state, batch = fresh(iql, config), batch_of(iql, 0)
    loss = partial(compiled(iql, "actor_loss", config), state.actor.params, state, batch)
    losses = {float(loss(jax.random.PRNGKey(i))[0]) for i in range(3)}
    assert len(losses) == 3
    tree = parameters(state)["actor"]["params"]
    mean = np.tanh(dense(tree, "Dense_0", hidden(tree, batch.observations, np)))
    np.testing.assert_allclose(iql.mode_actions(state, batch.observations), mean, atol=1e-5)
    still = jax.tree.map(np.copy, state.actor.params)
    still["params"]["log_std"][:] = -99.0  # clipped to -5
    quiet = state.replace(actor=state.actor.replace(params=still))
    action = iql.sample_action(quiet, batch.observations[0], jax.random.PRNGKey(0))
    np.testing.assert_allclose(action, np.clip(mean[0], -1, 1), atol=5 * math.exp(-5))


def test_iql_policy_stays_in_its_bounds(iql):
    """log_std is clipped to [-5, 2], the mean is in [-1, 1], so are sampled actions."""
    state = fresh(iql, config_of(iql))
    sample = jax.jit(jax.vmap(iql.sample_action, in_axes=(None, None, 0)))
    for log_std, expected in ((7.0, math.exp(2)), (-9.0, math.exp(-5)), (0.5, math.exp(0.5))):
        params = jax.tree.map(np.copy, state.actor.params)
        params["params"]["log_std"][:] = log_std
        policy = state.actor.apply_fn(params, 100 * batch_of(iql, 0).observations)
        np.testing.assert_allclose(policy.stddev(), expected, rtol=1e-5)
        assert np.abs(policy.mean()).max() <= 1.0
        wide = state.replace(actor=state.actor.replace(params=params))
        keys = jax.random.split(jax.random.PRNGKey(0), 50)
        actions = sample(wide, np.ones(OBS, np.float32), keys)
        assert np.abs(actions).max() <= 1.0 and np.std(actions, axis=0).min() > 1e-3


def test_sac_actions(sac):
    """Uniform before the first update, the policy's after it; evaluated is tanh(mean)."""
    state, observation = fresh(sac, config_of(sac)), np.ones(OBS, np.float32)
    tree = parameters(state)["actor"]["params"]
    features = hidden(tree, observation[None], np)
    mean, log_std = dense(tree, "Dense_0", features)[0], dense(tree, "Dense_1", features)[0]
    np.testing.assert_allclose(sac.mode_actions(state, observation[None])[0], np.tanh(mean), 1e-5)
    keys = jax.random.split(jax.random.PRNGKey(0), 4000)
    sample = jax.jit(jax.vmap(sac.sample_action, in_axes=(None, None, 0)))

    def quantiles(step):
        moved = state.replace(critic=state.critic.replace(step=np.int32(step)))
        actions = sample(moved, observation, keys)  # (4000, A)
        return np.quantile(actions, [0.1587, 0.5, 0.8413], axis=0)

    uniform = np.array([-0.6827, 0.0, 0.6827])[:, None].repeat(A, 1)
    np.testing.assert_allclose(quantiles(0), uniform, atol=0.06)
    gaussian = np.tanh(mean + np.array([[-1.0], [0.0], [1.0]]) * np.exp(log_std))
    np.testing.assert_allclose(quantiles(1), gaussian, atol=0.06)


def test_temperature_goes_towards_the_target_entropy(sac):
    """Above its target of -1 per action entropy is too dear: its price falls; below it rises."""
    config = config_of(sac, learning_rate=1e-2)
    state = fresh(sac, config)
    for entropy, sign in ((0.0, -1), (-1.9, -1), (-2.1, 1), (-9.0, 1)):
        new, _ = sac.gradient_step(
            state.temperature, sac.temperature_loss, state, entropy, A, config
        )
        move = new.apply_fn(new.params) - state.temperature.apply_fn(state.temperature.params)
        assert np.sign(move) == sign


@pytest.mark.parametrize("name", ["iql", "sac"])
def test_extreme_inputs_stay_finite(request, name):
    """Rewards of 1e6, observations of 1e3, a batch of one, actions at the bounds, a saturated
    policy: finite losses and finite parameters, also after updates on what came out."""
    script = request.getfixturevalue(name)
    config = UPDATE[name](script)  # compiled already
    update, base = compiled(script, "update_step", config), fresh(script, config)
    saturated = jax.tree.map(np.copy, base.actor.params)
    saturated["params"]["Dense_0"]["bias"][:] = [60.0, -60.0]
    for actor in (base.actor.params, saturated):
        for size, change in ((B, {"rewards": 1e6}), (B, {"observations": 1e3}), (1, {}),
                             (B, {"actions": 1e9}), (1, {"rewards": -1e6})):
            batch = batch_of(script, 3, size)
            batch = batch.replace(**{k: v * getattr(batch, k) for k, v in change.items()})
            batch = batch.replace(actions=np.clip(batch.actions, -1, 1).astype(np.float32))
            batch = jax.tree.map(np.float32, batch)
            state = base.replace(actor=base.actor.replace(params=actor))
            for _ in range(2):
                state, info = update(state, batch)
                leaves = [*jax.tree.leaves(info), *jax.tree.leaves(parameters(state))]
                assert all(np.isfinite(x).all() for x in leaves), (size, change, info)
