"""PA-RL: action optimisation, losses and policies against NumPy, bandits with known answers, the
schedule of an online episode, and the proof that a new class of policy is one class of code."""

import dataclasses
import inspect
import itertools
import math
import shutil
from functools import lru_cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import load_script, run_script
from test_losses import OBS, A, B, batch_of, close, template
from test_run import Killed, assert_same_run, die, go, load, on_call, reused_agents, table

SIZES = dict(
    critic_hidden_dims=(16, 8), hidden_dims=(16, 16), batch_size=B, num_critics=3, target_critics=2,
    base_actions=6, kept_actions=4, ascent_steps=3, num_actions=5, policy_width=16, policy_blocks=1,
    attention_heads=2, denoising_steps=5, policy_warmup=1, cloning_learning_rate=3e-3,
    policy_learning_rate=3e-3, cloning_schedule="constant", policy_tau=1.0, dropout_rate=0.0,
    pretrain_steps=1000,
)  # fmt: skip
BINS = dict(value_bins=21, value_min=-3.0, value_max=2.0)
CLASSES = ("diffusion", "transformer", "gaussian")
TINY = ["--preset", "smoke", "--pretrain-steps", "60", "--offline-steps", "60", "--online-steps",
        "230", "--log-interval", "15", "--eval-interval", "60", "--batch-size", "16",
        "--policy-width", "16", "--policy-blocks", "1", "--critic-hidden-dims", "16", "16",
        "--hidden-dims", "16", "16", "--no-normalize-returns"]  # fmt: skip


@pytest.fixture(scope="module")
def script():
    return load_script("algorithms/pa_rl.py")


def config_of(script, **changes):
    return script.Config(**SIZES | changes)


@lru_cache
def agent(script, config, seed=0):
    """An agent with random parameters everywhere: no bias is 0, no target is its network."""
    rng, state = np.random.default_rng(seed), template(script, config)

    def draw(tree):
        scale = lambda x: (1 / math.sqrt(x.shape[-2]) if x.ndim > 1 else 0.3)  # noqa: E731
        return jax.tree.map(lambda x: np.float32(scale(x) * rng.normal(size=x.shape)), tree)

    trained = {name: getattr(state, name) for name in ("actor", "critic", "value")}
    trained = {name: each.replace(params=draw(each.params)) for name, each in trained.items()}
    targets = {name: draw(getattr(state, name))
               for name in ("target_actor_params", "target_critic_params")}  # fmt: skip
    return state.replace(key=jax.random.PRNGKey(seed), **trained, **targets)


def observations_of(seed, size=B):
    return np.random.default_rng(seed).normal(size=(size, OBS)).astype(np.float32)


def actions_of(seed, count, size=B):
    return np.random.default_rng(seed).uniform(-1, 1, (count, size, A)).astype(np.float32)


def assert_equal(tree, other):
    assert jax.tree.all(jax.tree.map(np.array_equal, tree, other))


def with_q(script, state, function):
    """The agent with member i's Q(s, a) = function(s, a, i), scalar, for i = 0 ... N - 1."""
    members = np.arange(state.policy.config.num_critics, dtype=np.float32)
    apply = lambda i, s, a: function(s, a, i)[:, None]  # noqa: E731
    critic = state.critic.replace(apply_fn=apply, params=members, step=np.int32(1))
    return state.replace(critic=critic, target_critic_params=members)


# ----------------------------------------------------------------------------- Critics, written out


def outputs_of(params, observations, actions, xp=np):
    """(N, B, Z): Dense, LayerNorm, swish, and a linear head, for each member."""
    tree, found = params["params"], []
    for i in range(len(tree["Dense_0"]["bias"])):
        x = xp.concatenate([observations, actions], axis=1)
        for j in range(len(tree["MLP_0"]) // 2):
            layer, norm = tree["MLP_0"][f"Dense_{j}"], tree["MLP_0"][f"LayerNorm_{j}"]
            x = x @ layer["kernel"][i] + layer["bias"][i]
            x = x - x.mean(axis=1, keepdims=True)
            x = x / xp.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-6)
            x = x * norm["scale"][i] + norm["bias"][i]
            x = x / (1 + xp.exp(-x))
        found.append(x @ tree["Dense_0"]["kernel"][i] + tree["Dense_0"]["bias"][i])
    return xp.stack(found)


def q_of(params, observations, actions, c, xp=np):
    """(N, B)."""
    outputs = outputs_of(params, observations, actions, xp)
    if not c.value_bins:
        return outputs[..., 0]
    width = (c.value_max - c.value_min) / c.value_bins
    centers = c.value_min + width * (np.arange(c.value_bins) + 0.5)
    mass = xp.exp(outputs - outputs.max(axis=-1, keepdims=True))
    return (mass * centers).sum(axis=-1) / mass.sum(axis=-1)


def normal_cdf(x):
    return np.vectorize(lambda y: 0.5 * (1 + math.erf(y / math.sqrt(2))))(x)


def histogram_of(targets, c):
    """(B, Z), bin by bin."""
    width = (c.value_max - c.value_min) / c.value_bins
    edges = c.value_min + width * np.arange(c.value_bins + 1)
    targets = np.clip(targets, c.value_min, c.value_max)
    cdf = normal_cdf((edges - targets[:, None]) / (c.value_std * width))
    mass = cdf[:, 1:] - cdf[:, :-1]
    return mass / mass.sum(axis=1, keepdims=True)


def error_of(outputs, targets, c, xp):
    if not c.value_bins:
        return ((outputs[..., 0] - targets) ** 2).mean()
    log_mass = outputs - outputs.max(axis=-1, keepdims=True)
    log_mass = log_mass - xp.log(xp.exp(log_mass).sum(axis=-1, keepdims=True))
    return -(histogram_of(targets, c) * log_mass).sum(axis=-1).mean()


def members_of(params, key, c):
    chosen = np.asarray(jax.random.randint(key, (c.target_critics,), 0, c.num_critics))
    return jax.tree.map(lambda x: x[chosen], params)


def critic_of(p, state, b, own, following, key, c, xp=np):
    """The critic's loss, with every copy of a best action written out."""
    target_key, difference_key = jax.random.split(key)
    uniform_key, member_key = jax.random.split(difference_key)
    if c.critic == "iql":
        tree, x = state.value.params["params"], b.next_observations
        for name in sorted(tree["MLP_0"]):
            x = np.maximum(x @ tree["MLP_0"][name]["kernel"] + tree["MLP_0"][name]["bias"], 0)
        next_v = x @ tree["ScalarHead_0"]["kernel"][:, 0] + tree["ScalarHead_0"]["bias"]
    else:
        judges = members_of(state.target_critic_params, target_key, c)
        lowest = [q_of(judges, b.next_observations, a, c).min(axis=0) for a in following]
        next_v = np.stack(lowest).max(axis=0)
    targets = b.rewards + c.discount * b.masks * next_v
    td = error_of(outputs_of(p, b.observations, b.actions, xp), targets, c, xp)
    if c.critic != "cal_ql":
        return td
    pushed = members_of(p, member_key, c)
    uniform = jax.random.uniform(uniform_key, (c.num_actions, B, A), minval=-1.0, maxval=1.0)
    data_q = q_of(pushed, b.observations, b.actions, c, xp)  # (K, B)
    entries = [data_q, *(q_of(pushed, b.observations, a, c, xp) for a in np.asarray(uniform))]
    for actions in (own, following):
        copies = actions if len(actions) > 1 else [actions[0]] * c.num_actions
        entries += [xp.maximum(q_of(pushed, b.observations, a, c, xp), b.mc_returns)
                    for a in copies]  # fmt: skip
    assert len(entries) == 3 * c.num_actions + 1
    z = xp.stack(entries)
    soft = xp.log(xp.exp(z - z.max(axis=0)).mean(axis=0)) + z.max(axis=0)  # log of a mean
    return td + c.cql_alpha * (soft - data_q).mean()


def batch_with_returns(script, seed):
    """Returns around the Q-values: some bound them, some do not; one is not known yet."""
    returns = np.random.default_rng(seed + 100).normal(size=B).astype(np.float32)
    returns[3] = -np.inf
    return batch_of(script, seed).replace(mc_returns=returns)


VARIANTS = {
    "scalar, softmax": dict(cql_alpha=2.0),
    "scalar, argmax": dict(cql_alpha=2.0, target_selection="argmax"),
    "histogram, softmax": dict(cql_alpha=0.5, **BINS),
    "iql": dict(critic="iql", **BINS),
    "rlpd": dict(critic="rlpd", cql_alpha=2.0),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_critics_loss(variant, script):
    """Value and gradient; the gradient is the reference's, so that no other path has one."""
    config = config_of(script, **VARIANTS[variant])
    loss = jax.jit(jax.value_and_grad(partial(script.critic_loss, config=config), has_aux=True))
    for seed in range(3):
        state, batch = agent(script, config, seed), batch_with_returns(script, seed)
        count = 1 if config.target_selection == "argmax" else config.num_actions
        own, following = actions_of(seed + 7, count), actions_of(seed + 8, count)
        key, params = jax.random.PRNGKey(seed), state.critic.params
        (found, info), grads = loss(params, state, batch, own, following, key)
        close(found, critic_of(params, state, batch, own, following, key, config), rtol=1e-4)
        reference = partial(critic_of, state=state, b=batch, own=own, following=following,
                            key=key, c=config, xp=jnp)  # fmt: skip
        close(grads, jax.grad(reference)(params), rtol=1e-3, atol=1e-4)
        q = q_of(params, batch.observations, batch.actions, config)
        close(info["q"], q.mean(), rtol=1e-4, atol=1e-5)
        if config.critic == "cal_ql":
            assert 0.1 < info["below_return"] < 0.9


def test_the_values_loss(script):
    config = config_of(script, critic="iql", expectile=0.8)
    state, batch, key = agent(script, config), batch_of(script, 0), jax.random.PRNGKey(3)
    judges = members_of(state.target_critic_params, key, config)
    q = q_of(judges, batch.observations, batch.actions, config).min(axis=0)
    u = q - np.asarray(state.value.apply_fn(state.value.params, batch.observations))
    wanted = np.where(u < 0, 0.2 * u * u, 0.8 * u * u).mean()
    found, _ = script.value_loss(state.value.params, state, batch, key, config)
    close(found, wanted, rtol=1e-4)


def test_histograms(script):
    """Bin by bin; their means are the targets, except near the ends, where they are cut off."""
    config = config_of(script, **BINS)
    targets = np.array([-9.0, -3.0, -2.99, -1.234, 0.0, 0.617, 1.99, 2.0, 50.0], np.float32)
    found = np.asarray(script.histogram(targets, config))
    close(found, histogram_of(targets, config), atol=1e-5)
    close(found.sum(axis=1), np.ones(len(targets)), rtol=1e-5)
    means = script.expectation(np.log(found + 1e-30), config)
    close(np.asarray(means)[3:6], targets[3:6], atol=1e-3)
    assert -3 < means[0] < -2.7 and 1.7 < means[-1] < 2
    widths = np.sqrt((found * (np.linspace(-3, 2, 43)[1::2] - targets[:, None]) ** 2).sum(axis=1))
    close(widths[4], 0.75 * math.sqrt(2) * 5 / 21, rtol=0.05)  # and the bin's own 1/12


def test_members_are_drawn_with_replacement(script):
    config = config_of(script)
    draw = jax.jit(jax.vmap(lambda key: script.random_members(jnp.arange(3), key, config)))
    found = np.asarray(draw(jax.random.split(jax.random.PRNGKey(0), 3000)))  # (3000, 2)
    counts = np.array([[((found == pair).all(axis=1)).mean() for pair in itertools.product(
        range(3), repeat=2)]])  # fmt: skip
    close(counts, np.full((1, 9), 1 / 9), atol=0.03)
    everyone = dataclasses.replace(config, target_critics=3)
    close(script.random_members(jnp.arange(3), jax.random.PRNGKey(0), everyone), jnp.arange(3))


# ------------------------------------------------------------------------------ Action optimisation


def test_the_global_step_keeps_the_best_by_the_mean(script):
    """By the mean of all critics, not their minimum: the two disagree here."""
    config = config_of(script)
    state, observations, candidates = agent(script, config), observations_of(1), actions_of(2, 6)
    q = np.stack([q_of(state.critic.params, observations, a, config) for a in candidates])  # M,N,B
    found = np.asarray(script.ensemble_q(state, observations, candidates, config))
    close(found, q.mean(axis=1), rtol=1e-4, atol=1e-5)
    order = np.argsort(-q.mean(axis=1), axis=0)[:4]
    assert (order != np.argsort(-q.min(axis=1), axis=0)[:4]).any()
    kept = np.asarray(script.global_step(candidates, jnp.asarray(found), config))
    close(kept, np.take_along_axis(candidates, order[..., None], axis=0))


@pytest.mark.parametrize(("best", "wanted"), [
    ((0.3, -0.4), (0.3, -0.4)), ((2.0, -0.4), (1.0, -0.4)),
])  # fmt: skip
def test_the_local_step_climbs_to_the_optimum_or_the_box(best, wanted, script):
    """Q = -|a - best|^2 + member's constant: reached inside the box, clipped outside it."""
    config = config_of(script, ascent_steps=60, ascent_rate=0.1)
    state = with_q(script, agent(script, config),
                   lambda s, a, i: i - ((a - jnp.array(best)) ** 2).sum(axis=1))  # fmt: skip
    found, q = script.local_step(state, observations_of(0), actions_of(1, 4), config)
    close(np.asarray(found), np.broadcast_to(wanted, (4, B, A)), atol=1e-3)
    close(np.asarray(q), np.full((4, B), 1 - ((np.array(best) - wanted) ** 2).sum()), atol=1e-4)


def test_the_local_step_by_hand(script):
    """Three steps of a <- clip(a + rate * gradient of the mean), each action with its own whole
    gradient; rate and gradient are such that the division by any number would show."""
    config = config_of(script, ascent_rate=0.05)
    state = with_q(script, agent(script, config),
                   lambda s, a, i: (i + 1) * a @ jnp.array([1.0, -2.0]))  # fmt: skip
    start = actions_of(1, 4)
    found, _ = script.local_step(state, observations_of(0), start, config)
    wanted = start
    for _ in range(3):
        wanted = np.clip(wanted + 0.05 * 2 * np.array([1.0, -2.0]), -1, 1)
    close(np.asarray(found), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("steps", [0, 1, 2, 7])
def test_the_local_step_returns_the_best_position(steps, script):
    """With a rate that overshoots, Q goes up and down: the best of all positions is returned."""
    config = config_of(script, ascent_steps=steps, ascent_rate=0.9)
    best, start, observations = np.array([0.3, -0.2]), actions_of(1, 4), observations_of(0)
    quadratic = lambda s, a, i: -((a - best) ** 2 * jnp.array([1.0, 1.3])).sum(axis=1)  # noqa: E731
    state = with_q(script, agent(script, config), quadratic)
    positions = [start]
    for _ in range(steps):
        gradient = -2 * (positions[-1] - best) * np.array([1.0, 1.3])
        positions.append(np.clip(positions[-1] + 0.9 * gradient, -1, 1))
    q = np.stack([-((a - best) ** 2 * [1.0, 1.3]).sum(axis=-1) for a in positions])  # (T + 1, K, B)
    wanted = np.take_along_axis(np.stack(positions), q.argmax(axis=0)[None, ..., None], axis=0)[0]
    found, found_q = script.local_step(state, observations, start, config)
    close(np.asarray(found_q), q.max(axis=0), rtol=1e-4, atol=1e-5)
    close(np.asarray(found), wanted, rtol=1e-4, atol=1e-5)
    if steps > 1:  # otherwise the test would not tell the best from the last
        assert (q.argmax(axis=0) < steps).any() and (q.argmax(axis=0) > 0).any()


def test_a_data_action_replaces_the_worst_and_climbs(script):
    config = config_of(script, ascent_steps=1, ascent_rate=0.01)
    state = with_q(script, agent(script, config), lambda s, a, i: 3 * a[:, 0])
    candidates, data = actions_of(2, 6), np.full((B, A), -0.9, np.float32)
    actions, q, info = script.optimise(state, observations_of(0), candidates, config, data)
    order = np.argsort(-candidates[..., 0], axis=0)[:4]
    wanted = np.take_along_axis(candidates, order[..., None], axis=0)
    close(info["kept_q"], 3 * wanted[..., 0].mean(), rtol=1e-4)
    wanted[-1] = data
    wanted[..., 0] = np.clip(wanted[..., 0] + 0.03, -1, 1)
    close(np.asarray(actions), wanted, rtol=1e-5, atol=1e-6)
    close(np.asarray(q), 3 * wanted[..., 0], rtol=1e-4, atol=1e-5)
    plain, _, info = script.optimise(state, observations_of(0), candidates, config)
    assert plain[-1, :, 0].min() > -0.9
    close(info["base_q"], 3 * candidates[..., 0].mean(), rtol=1e-4, atol=1e-5)
    close(info["moved"], 0.015, rtol=0.05)


def test_selection(script):
    """Draws follow the softmax of Q at temperature 1, independently; argmax is the best one."""
    actions = np.arange(3.0)[:, None, None] * np.ones((3, 2, 1))
    q = np.array([[0.0, 2.0], [1.0, 0.0], [-1.0, 0.0]])
    best = script.select(actions, q, jax.random.PRNGKey(0), "argmax", 7)
    close(np.asarray(best), np.array([[[1.0], [0.0]]]))
    drawn = script.select(actions, jnp.asarray(q), jax.random.PRNGKey(0), "softmax", 20_000)
    wanted = np.exp(q) / np.exp(q).sum(axis=0)
    found = np.stack([(np.asarray(drawn)[..., 0] == i).mean(axis=0) for i in range(3)])
    close(found, wanted, atol=0.015)


# ------------------------------------------------------------------------------------------ Updates


def test_an_update_holds_the_policy_and_knows_both_states(script):
    """One update, replayed from the pieces tested above: the same keys, pi* at s and at s'."""
    config = config_of(script, learning_rate=1e-2, tau=0.3, cql_alpha=2.0)
    state, batch = agent(script, config, 1), batch_with_returns(script, 1)
    update = jax.jit(partial(script.update_step, config=config))
    after, info = update(state, batch)
    _, action_key, critic_key, _ = jax.random.split(state.key, 4)
    chosen, states = [], (batch.observations, batch.next_observations)
    for key, observations in zip(jax.random.split(action_key), states, strict=True):
        sample_key, select_key = jax.random.split(key)
        candidates = state.policy.sample(state.target_actor_params, observations, sample_key, 6)
        actions, q, _ = script.optimise(state, observations, candidates, config)
        chosen.append(np.asarray(script.select(actions, q, select_key, "softmax", 5)))
    inputs = dict(own=chosen[0], following=chosen[1], key=critic_key, c=config)
    reference = partial(critic_of, state=state, b=batch, xp=jnp, **inputs)
    grads = jax.grad(reference)(state.critic.params)
    memory = after.critic.opt_state[0].mu  # Adam's step hides the gradient's size, this does not
    close(memory, jax.tree.map(lambda x: 0.1 * x, grads), rtol=1e-3, atol=1e-5)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), after.critic.params, state.critic.params)
    assert min(jax.tree.leaves(moved)) > 5e-3
    mixed = jax.tree.map(lambda old, new: 0.7 * old + 0.3 * new, state.target_critic_params,
                         after.critic.params)  # fmt: skip
    close(after.target_critic_params, mixed, atol=1e-5)
    for name in ("actor", "target_actor_params", "value"):
        assert_equal(getattr(after, name), getattr(state, name))
    assert info["optimised_q"] >= info["kept_q"] > info["base_q"]


def test_distilling_holds_the_critic_and_moves_the_sampled_policy_slowly(script):
    config = config_of(script, policy_tau=0.25)
    state, batch = agent(script, config), batch_of(script, 0)
    state = state.replace(critic=state.critic.replace(step=np.int32(1)))
    after, _ = jax.jit(partial(script.distil, config=config))(state, batch)
    for name in ("critic", "target_critic_params", "value"):
        assert_equal(getattr(after, name), getattr(state, name))
    mixed = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, state.target_actor_params,
                         after.actor.params)  # fmt: skip
    close(after.target_actor_params, mixed, atol=1e-6)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), after.actor.params, state.actor.params)
    assert max(jax.tree.leaves(moved)) > 1e-3


@pytest.mark.parametrize("critic", ["iql", "cal_ql"])
def test_the_search_is_logged_once(critic, script):
    """By the critic's update; where that does not search, by distillation."""
    config = config_of(script, critic=critic)
    state, batch = agent(script, config), batch_with_returns(script, 0)
    logged = [jax.eval_shape(partial(update, config=config), state, batch)[1]
              for update in (script.distil, script.update_step)]  # fmt: skip
    names = {"base_q", "kept_q", "optimised_q", "moved"}
    assert [names <= set(info) for info in logged] == [critic == "iql", critic != "iql"]
    assert [bool(names & set(info)) for info in logged] == [critic == "iql", critic != "iql"]


def test_a_fresh_critic_prefers_no_action(script):
    """The search would find the noise of its initialisation, offline and for long."""
    config = config_of(script, value_bins=0, critic_hidden_dims=(64, 64))
    state = script.create_agent_state(jax.random.PRNGKey(0), OBS, A, config)
    q = script.ensemble_q(state, observations_of(0), actions_of(0, 64), config)  # (64, B)
    assert 0 < np.std(q, axis=0).mean() < 0.01


def test_what_is_distilled(script):
    """pi*'s actions; but the batch's own while the critic knows nothing."""
    config, seen = config_of(script, distillation_selection="argmax"), []
    state, batch = agent(script, config), batch_of(script, 0)
    with pytest.MonkeyPatch.context() as patch:
        seen_by = lambda state, s, actions, *rest: (state, seen.append(actions) or {})  # noqa: E731
        patch.setattr(script, "imitate", seen_by)
        for step in (0, 1):
            critic = state.critic.replace(step=np.int32(step))
            script.distil(state.replace(critic=critic), batch, config)
    assert np.array_equal(seen[0], batch.actions)
    key = jax.random.split(state.key, 4)[1]
    candidates = script.sample_policy(state, batch.observations, key, config)
    actions, q, _ = script.optimise(state, batch.observations, candidates, config, batch.actions)
    best = jnp.take_along_axis(actions, q.argmax(axis=0)[None, :, None], axis=0)[0]
    close(seen[1], best, atol=1e-5)


def test_base_actions_are_the_sampled_policys(script):
    config = config_of(script)
    state, observations = agent(script, config), observations_of(0)
    found = script.sample_policy(state, observations, jax.random.PRNGKey(5), config)
    wanted = state.policy.sample(state.target_actor_params, observations, jax.random.PRNGKey(5), 6)
    assert found.shape == (6, B, A) and np.array_equal(found, wanted)


def test_while_the_critic_knows_nothing_the_policy_acts(script):
    config = config_of(script, kept_actions=1, ascent_steps=0)
    state, observations = agent(script, config), observations_of(0)
    key = jax.random.PRNGKey(0)
    candidates = script.sample_policy(state, observations, jax.random.split(key)[0], config)
    act = partial(script.acting_actions, observations=observations, key=key, selection="argmax")
    close(act(state), candidates[0])
    learnt = state.replace(critic=state.critic.replace(step=np.int32(1)))
    q = script.ensemble_q(learnt, observations, candidates, config)
    best = jnp.take_along_axis(candidates, q.argmax(axis=0)[None, :, None], axis=0)[0]
    close(act(learnt), best)
    assert not np.array_equal(act(learnt), candidates[0])


def test_an_evaluation_can_be_repeated_and_has_new_noise_in_every_state(script):
    config = config_of(script)
    state, observations = agent(script, config), observations_of(0)
    mode = jax.jit(script.mode_actions)
    assert np.array_equal(mode(state, observations), mode(state, observations))
    other = observations.copy()
    other[5, 0] = np.nextafter(other[5, 0], np.float32(9))
    assert not np.allclose(mode(state, observations)[0], mode(state, other)[0])


# ----------------------------------------------------------------------------------------- Policies


def test_the_noise_schedule(script):
    """Cosine: the product of the alphas is cos^2, until the last beta is cut to 0.999."""
    config = config_of(script)
    alpha, product = map(np.asarray, agent(script, config).policy.schedule())
    level = [math.cos((t / 5 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(6)]
    close(product[:4], np.array(level[1:5]) / level[0], rtol=1e-5)
    close(1 - alpha[-1], 0.999, rtol=1e-5)
    close(product, np.cumprod(alpha), rtol=1e-5)


def denoiser(script, params, observations, actions, step):
    """The residual network (R, A) in NumPy, without dropout."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params["params"])

    def layer(i, x):
        return x @ p[f"Dense_{i}"]["kernel"] + p[f"Dense_{i}"]["bias"]

    def swish(x):
        return x / (1 + np.exp(-x))

    angle = 2 * np.pi * step[:, None] * p["frequencies"]
    time = layer(0, swish(layer(1, np.concatenate([np.cos(angle), np.sin(angle)], axis=1))))
    x = layer(2, np.concatenate([time, observations, actions], axis=1))
    normed = x - x.mean(axis=1, keepdims=True)
    normed = normed / np.sqrt((normed**2).mean(axis=1, keepdims=True) + 1e-6)
    normed = normed * p["LayerNorm_0"]["scale"] + p["LayerNorm_0"]["bias"]
    x = x + layer(4, swish(layer(3, normed)))
    return layer(5, swish(x))


def test_the_diffusion_loss(script):
    config = config_of(script)
    state, batch, key = agent(script, config), batch_of(script, 0), jax.random.PRNGKey(8)
    step_key, noise_key, _ = jax.random.split(key, 3)
    step = np.asarray(jax.random.randint(step_key, (B,), 0, 5))
    noise = np.asarray(jax.random.normal(noise_key, (B, A)))
    product = np.asarray(state.policy.schedule()[1])[step][:, None]
    noisy = np.sqrt(product) * batch.actions + np.sqrt(1 - product) * noise
    predicted = denoiser(script, state.actor.params, batch.observations, noisy, step)
    wanted = ((predicted - noise) ** 2).sum(axis=1).mean()  # summed over dimensions
    found = state.policy.loss(state.actor.params, batch.observations, batch.actions, key)
    close(found, wanted, rtol=1e-4)
    assert set(step) == {0, 1, 2, 3, 4}


def test_the_diffusion_sampler(script):
    """Step by step, the mean in its other form: by way of the estimate of the clean action."""
    config = config_of(script)
    state, observations, key = agent(script, config), observations_of(3, 4), jax.random.PRNGKey(1)
    alpha, product = (np.asarray(x, np.float64) for x in state.policy.schedule())
    start_key, noise_key = jax.random.split(key)
    rows = np.concatenate([observations] * 3)
    x = np.asarray(jax.random.normal(start_key, (12, A)), np.float64)
    for t in reversed(range(5)):
        noise = denoiser(script, state.actor.params, rows, x, np.full(12, t))
        before = product[t - 1] if t else 1.0
        clean = (x - np.sqrt(1 - product[t]) * noise) / np.sqrt(product[t])
        mean = np.sqrt(before) * (1 - alpha[t]) / (1 - product[t]) * clean
        mean = mean + np.sqrt(alpha[t]) * (1 - before) / (1 - product[t]) * x
        fresh = np.asarray(jax.random.normal(jax.random.fold_in(noise_key, t), (12, A)))
        x = np.clip(mean + (np.sqrt(1 - alpha[t]) * fresh if t else 0), -1, 1)
    found = state.policy.sample(state.actor.params, observations, key, 3)
    close(np.asarray(found), x.reshape(3, 4, A), rtol=1e-2, atol=2e-3)
    assert (np.abs(x) < 1).mean() > 0.2


def test_tokens(script):
    """The nearest of V bins from -1 to 1: a round trip errs by half a bin at most, and does."""
    policy = agent(script, config_of(script, policy="transformer", action_bins=7)).policy
    actions = np.linspace(-1, 1, 1001)
    tokens = np.asarray(policy.tokens(actions))
    error = np.abs(np.asarray(policy.actions(tokens)) - actions)
    assert 0.99 / 6 < error.max() <= 1.0001 / 6
    assert (tokens.min(), tokens.max()) == (0, 6) and np.array_equal(tokens, np.sort(tokens))
    assert np.array_equal(policy.tokens(policy.actions(np.arange(7))), np.arange(7))
    assert np.array_equal(policy.tokens(np.array([-5.0, 5.0])), [0, 6])


def test_a_later_token_never_changes_an_earlier_logit(script):
    config = config_of(script, policy="transformer", action_bins=7)
    policy = script.TransformerPolicy(4, config)
    params = policy.init(jax.random.PRNGKey(0), np.ones((1, OBS)))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape), params)
    observations, tokens = observations_of(0, 1), np.array([[1, 2, 3, 4]])
    before = np.asarray(policy.network.apply(params, observations, tokens))[0]  # (4, V)
    assert np.abs(np.diff(before, axis=0)).max() > 0.01
    for changed in range(4):
        other = tokens.copy()
        other[0, changed] = 6
        after = np.asarray(policy.network.apply(params, observations, other))[0]
        same = [np.allclose(after[d], before[d], atol=1e-6) for d in range(4)]
        assert same == [d <= changed for d in range(4)]


def test_samples_are_likely(script):
    """One dimension at a time, by way of the attention's memory, is the same as all at once: where
    tokens are nearly certain, samples are those that the whole network is certain of."""
    config = config_of(script, policy="transformer", action_bins=7)
    policy = script.TransformerPolicy(5, config)
    params, rng = policy.init(jax.random.PRNGKey(0), np.ones((1, OBS))), np.random.default_rng(1)
    params = jax.tree.map(lambda x: x + 0.2 * rng.normal(size=x.shape), params)
    head = params["params"]["Dense_5"]
    head["kernel"], head["bias"] = 400 * head["kernel"], 0 * head["bias"]
    observations = observations_of(0, 8)
    found = policy.tokens(policy.sample(params, observations, jax.random.PRNGKey(0), 1)[0])
    logits = np.asarray(policy.network.apply(params, observations, np.asarray(found)))
    assert np.array_equal(found, logits.argmax(axis=-1)) and len(np.unique(found)) > 3


def test_sampled_tokens_follow_their_joint_distribution(script):
    """p(first) p(second | first), from the logits of all sequences, against many samples; and the
    loss is minus the log of that product."""
    config = config_of(script, policy="transformer", action_bins=3)
    state = agent(script, config, 1)
    policy, params, observation = state.policy, state.actor.params, observations_of(0, 1)
    params = jax.tree.map(lambda x: jnp.asarray(2 * x), params)  # away from uniform
    joint = np.zeros((3, 3))
    for pair in itertools.product(range(3), repeat=2):
        log_prob = jax.nn.log_softmax(policy.network.apply(params, observation, np.array([pair])))
        joint[pair] = np.exp(sum(log_prob[0, d, pair[d]] for d in range(2)))
        action = np.asarray(policy.actions(np.array([pair])), np.float32)
        loss = policy.loss(params, observation, action, jax.random.PRNGKey(0))
        close(loss, -np.log(joint[pair]), rtol=1e-4)
    close(joint.sum(), 1.0, rtol=1e-4)
    drawn = policy.tokens(policy.sample(params, observation, jax.random.PRNGKey(0), 20_000))[:, 0]
    found = np.zeros((3, 3))
    np.add.at(found, tuple(np.asarray(drawn).T), 1 / len(drawn))
    close(found, joint, atol=0.015)
    independent = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0)
    assert np.abs(joint - independent).max() > 0.05


def test_the_gaussians_loss_is_finite_on_the_box(script):
    config = config_of(script, policy="gaussian")
    state, actions = agent(script, config), np.ones((B, A), np.float32)
    loss, grads = jax.value_and_grad(state.policy.loss)(
        state.actor.params, observations_of(0), actions, None)  # fmt: skip
    assert np.isfinite(loss) and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    inside = np.clip(actions_of(0, 1)[0], -0.98, 0.98)
    found = state.policy.loss(state.actor.params, observations_of(0), inside, None)
    tree = state.actor.params["params"]
    x = observations_of(0)
    for name in sorted(tree["MLP_0"]):
        x = np.maximum(x @ tree["MLP_0"][name]["kernel"] + tree["MLP_0"][name]["bias"], 0)
    mean = x @ tree["Dense_0"]["kernel"] + tree["Dense_0"]["bias"]
    std = np.exp(np.clip(x @ tree["Dense_1"]["kernel"] + tree["Dense_1"]["bias"], -10, 2))
    u = np.arctanh(inside.astype(np.float64))
    log_prob = -0.5 * ((u - mean) / std) ** 2 - np.log(std) - 0.5 * math.log(2 * math.pi)
    log_prob = log_prob - np.log(1 - np.tanh(u) ** 2)
    close(found, -log_prob.sum(axis=1).mean(), rtol=1e-3)


def test_a_gaussian_cloned_from_clipped_actions_stays_near_them(script):
    """Data of which a third lies at the box's end: tanh's inverse at 0.99999 is 6.1, and a Gaussian
    fitted to that samples the box's other half in 11 of 100 cases, the data in less than one."""
    noise = np.random.default_rng(0).normal(size=(256, A))
    actions = np.clip(0.85 + 0.4 * noise, -1, 1).astype(np.float32)  # (B, A)
    assert (actions == 1).mean() > 0.3 and (actions < -0.5).mean() < 0.005
    config = config_of(script, policy="gaussian", cloning_learning_rate=1e-2)
    state, observations = agent(script, config), np.zeros((256, OBS), np.float32)
    params, optimizer = state.actor.params, optax.adam(1e-2)

    @jax.jit
    def fit(carry, _):
        params, moments = carry
        grads = jax.grad(state.policy.loss)(params, observations, actions, None)
        updates, moments = optimizer.update(grads, moments)
        return (optax.apply_updates(params, updates), moments), None

    (params, _), _ = jax.lax.scan(fit, (params, optimizer.init(params)), None, 500)
    samples = state.policy.sample(params, observations, jax.random.PRNGKey(0), 8)  # (M, B, A)
    assert (samples < -0.5).mean() < 0.04, (samples < -0.5).mean()


# ------------------------------------------------------------------------------------------ Bandits


@dataclasses.dataclass(frozen=True)
class FlowPolicy:
    """Flow matching: a velocity field carries noise to actions along straight lines."""

    action_dim: int
    config: object

    class Velocity(nn.Module):
        action_dim: int

        @nn.compact
        def __call__(self, observations, actions, time):
            x = jnp.concatenate([observations, actions, time[:, None]], axis=-1)
            for width in (64, 64):
                x = nn.swish(nn.Dense(width)(x))
            return nn.Dense(self.action_dim)(x)  # (R, A)

    @property
    def network(self):
        return self.Velocity(self.action_dim)

    def init(self, key, observations):
        actions = jnp.zeros((len(observations), self.action_dim))
        return self.network.init(key, observations, actions, jnp.zeros(len(observations)))

    def sample(self, params, observations, key, num_actions):
        rows = jnp.tile(observations, (num_actions, 1))  # (M * B, O)
        actions = jax.random.normal(key, (len(rows), self.action_dim))
        steps = self.config.denoising_steps
        for step in range(steps):
            velocity = self.network.apply(params, rows, actions, jnp.full(len(rows), step / steps))
            actions = actions + velocity / steps
        return jnp.clip(actions, -1, 1).reshape(num_actions, -1, self.action_dim)

    def loss(self, params, observations, actions, key):
        time_key, noise_key = jax.random.split(key)
        time = jax.random.uniform(time_key, (len(actions),))
        noise = jax.random.normal(noise_key, actions.shape)
        between = (1 - time[:, None]) * noise + time[:, None] * actions
        velocity = self.network.apply(params, observations, between, time)
        return ((velocity - (actions - noise)) ** 2).sum(axis=-1).mean()


@pytest.fixture
def with_flow(script, monkeypatch):
    """A fourth class: its name and its settings are added, nothing else is touched."""
    monkeypatch.setitem(script.POLICIES, "flow", FlowPolicy)
    monkeypatch.setitem(script.POLICY_SETTINGS, "flow", script.POLICY_SETTINGS["diffusion"])


def bandit_agent(script, policy, **changes):
    """A new agent for one action dimension, its critic of -(a - s / 2)^2 with a weight of 30."""
    config = config_of(script, policy=policy, policy_width=64, **changes)
    state = jax.jit(partial(script.create_agent_state, observation_dim=1, action_dim=1,
                            config=config))(jax.random.PRNGKey(0))  # fmt: skip
    return with_q(script, state, lambda s, a, i: -30 * (a[:, 0] - s[:, 0] / 2) ** 2), config


def train(script, state, update, rows, config, steps):
    """`steps` updates on uniform batches of rows (N, ...)."""
    size = len(rows["observations"])
    rows = {name: jnp.asarray(column) for name, column in rows.items()}
    nothing = jnp.zeros(size)
    dataset = script.Batch(rewards=nothing, masks=nothing, mc_returns=nothing,
                           next_observations=rows["observations"], **rows)  # fmt: skip

    def body(state, _):
        key, sample_key = jax.random.split(state.key)
        batch = script.sample(dataset, size, sample_key, 64)
        return update(state.replace(key=key), batch, config)[0], None

    return jax.jit(lambda state: jax.lax.scan(body, state, length=steps)[0])(state)


def samples(state, count=500):
    """Actions (M, 2) of the sampled policy in the states -1 and 1."""
    states = np.array([[-1.0], [1.0]], np.float32)
    key = jax.random.PRNGKey(9)
    return np.asarray(state.policy.sample(state.target_actor_params, states, key, count))[..., 0]


@pytest.mark.parametrize("policy", [*CLASSES, "flow"])
def test_distillation_moves_the_samples_towards_higher_q(policy, script, with_flow):
    """Cloned from uniform actions, then distilled: the distance to the best action s / 2 falls to
    a third of what it was, in both states."""
    state, config = bandit_agent(script, policy)
    rng = np.random.default_rng(0)
    rows = {"observations": rng.choice([-1.0, 1.0], (1000, 1)).astype(np.float32),
            "actions": rng.uniform(-1, 1, (1000, 1)).astype(np.float32)}  # fmt: skip
    cloned = train(script, state, script.imitate_data, rows, config, 600)
    best = np.array([-0.5, 0.5])
    before = np.abs(samples(cloned) - best).mean(axis=0)
    assert (before > 0.4).all()  # uniform: 0.625
    after = np.abs(samples(train(script, cloned, script.distil, rows, config, 600)) - best)
    assert (after.mean(axis=0) < before / 3).all()


@pytest.mark.parametrize(("policy", "solves"), [
    ("diffusion", True), ("transformer", True), ("flow", True), ("gaussian", False),
])  # fmt: skip
def test_two_modes(policy, solves, script, with_flow):
    """Half of the data's actions are -0.7, half 0.7. All but the Gaussian clone both and little
    between; the Gaussian cannot."""
    state, config = bandit_agent(script, policy, denoising_steps=10)
    rng = np.random.default_rng(0)
    actions = rng.choice([-0.7, 0.7], (2000, 1)) + 0.03 * rng.normal(size=(2000, 1))
    rows = {"observations": rng.choice([-1.0, 1.0], (2000, 1)).astype(np.float32),
            "actions": actions.astype(np.float32)}  # fmt: skip
    found = samples(train(script, state, script.imitate_data, rows, config, 2500), 2000)
    near = np.abs(np.abs(found) - 0.7) < 0.25
    assert (near.mean() > 0.85) == solves, near.mean()
    if solves:
        assert (np.abs((found > 0).mean(axis=0) - 0.5) < 0.15).all()


def test_a_new_class_is_one_class(script, with_flow, pendulum, tmp_path):
    """The whole script with a policy it has never heard of, in under 60 lines."""
    assert len(inspect.getsource(FlowPolicy).splitlines()) < 60
    flags = ["--dataset", str(pendulum), "--env-id", "Pendulum-v1", *TINY, "--policy", "flow",
             "--run-dir", "run"]  # fmt: skip
    with reused_agents(script):
        done = go(script, tmp_path, flags)
    assert done.code == 0, done.err
    assert {phase for phase, _ in done.logged} == {"pretrain", "offline", "online"}


# --------------------------------------------------------------------------------- A run's schedule


@pytest.fixture(scope="module")
def flags(pendulum):
    return ["--dataset", str(pendulum), "--env-id", "Pendulum-v1", *TINY, "--resume", "run"]


@pytest.fixture(scope="module")
def reused(script):
    with reused_agents(script) as patched, pytest.MonkeyPatch.context() as patch:
        tx = script.fine_tuning_optimiser
        patch.setattr(script, "fine_tuning_optimiser", lru_cache(tx))
        yield patched


@pytest.fixture(scope="module")
def whole(reused, flags, tmp_path_factory):
    """An unbroken run, and every call of its online phase to `learn`."""
    folder, calls = tmp_path_factory.mktemp("whole"), []
    learn = reused.learn

    def recorded(state, buffer, dataset, counts, update, draw, config):
        at = int(buffer.position[0]), int(state.actor.step[0]), int(state.critic.step[0])
        calls.append((update.__name__, draw.__name__, int(counts[0]), *at))
        return learn(state, buffer, dataset, counts, update, draw, config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reused, "learn", recorded)
        done = go(reused, folder, flags)
    assert done.code == 0, done.err
    return folder / "run", calls


def test_after_each_episode_distillation_then_the_critic(whole):
    """Pendulum's episodes have 200 steps: after them 200 updates of each kind, in slices."""
    _, calls = whole
    pair = ("distil", "distillation_batch"), ("update_step", "online_batch")
    assert [call[:2] for call in calls] == [*[pair[0]] * 4, *[pair[1]] * 4]
    assert all((count, at) == (50, 200) for _, _, count, at, *_ in calls)
    steps = [(actor, critic) for *_, actor, critic in calls]
    assert steps[0] == (60, 60) and steps[4] == (260, 60) and steps[7] == (260, 210)


def test_the_log_of_a_run(whole):
    """Each phase has its metrics; a stretch without an episode's end has none."""
    rows = table(whole[0])
    first = {phase: next(r for r in rows if r["phase"] == phase) for phase in
             ("pretrain", "offline", "online")}  # fmt: skip
    assert first["pretrain"]["actor_loss"] and not first["pretrain"]["critic_loss"]
    assert first["offline"]["critic_loss"] and not first["offline"]["actor_loss"]
    learnt = [int(r["step"]) for r in rows if r["phase"] == "online" and r["critic_loss"]]
    assert learnt == [210]  # the first row after the episode's end
    assert [int(r["step"]) for r in rows if r["phase"] == "online" and r["actor_loss"]] == learnt


def test_the_buffer_knows_its_returns(whole, script):
    arrays, meta = load(whole[0])
    returns, rewards = (arrays[f"buffer/rows/{name}"][0] for name in ("mc_returns", "rewards"))
    assert np.isfinite(returns[:200]).all() and np.isneginf(returns[200:230]).all()
    wanted = script.discounted_returns(rewards[:200], np.arange(200) == 199, 0.99)
    close(returns[:200], np.float32(wanted), rtol=1e-4)


@pytest.mark.parametrize(("name", "number"), [
    ("clone_steps", 2), ("update_steps", 3), ("step_rollout", 70), ("step_rollout", 215),
])  # fmt: skip
def test_killed_and_resumed_to_the_same_bits(name, number, reused, flags, whole, tmp_path):
    """In each phase; the last one after the optimisers were exchanged and have learnt."""
    with on_call(reused, name, number, die), pytest.raises(Killed):
        go(reused, tmp_path, flags)
    done = go(reused, tmp_path, flags)
    assert done.code == 0, done.err
    assert_same_run(tmp_path / "run", whole[0])


def test_at_the_switch_all_optimisers_start_anew(script):
    config = config_of(script, policy_learning_rate=7e-4, policy_warmup=4)
    state = jax.tree.map(lambda x: x[None], agent(script, config))
    for name in ("actor", "critic", "value"):
        part = getattr(state, name)
        full = jax.tree.map(np.ones_like, part.opt_state)
        state = state.replace(**{name: part.replace(opt_state=full)})
    after = script.restart_optimisers(state, config)
    for part in (after.actor, after.critic, after.value):
        assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(part.opt_state))
    one, grads = jax.tree.map(lambda x: x[0], after.actor), None
    grads = jax.tree.map(np.ones_like, one.params)
    sizes = []
    for _ in range(5):
        moved = one.apply_gradients(grads=grads)
        gap = jax.tree.map(lambda a, b: np.abs(a - b).max(), moved.params, one.params)
        sizes.append(max(jax.tree.leaves(gap)))
        one = moved
    close(np.array(sizes), 7e-4 * np.array([0.25, 0.5, 0.75, 1, 1]), rtol=0.02)


def test_two_devices(pendulum, tmp_path):
    """Two seeds, each on a device of its own, through all phases and past the switch."""
    flags = ["--dataset", pendulum, "--env-id", "Pendulum-v1", *TINY, "--policy", "gaussian",
             "--num-seeds", "2", "--run-dir", tmp_path / "run"]  # fmt: skip
    code, _, err = run_script("algorithms/pa_rl.py", *flags, timeout=300)
    assert code == 0, err
    arrays, meta = load(tmp_path / "run")
    assert (meta["pretrain"], meta["offline"], meta["online"]) == (60, 60, 230)
    assert np.array_equal(arrays["state/critic/step"], [260, 260])


def test_cloning_warms_up_and_fades(script):
    config = config_of(script, policy_warmup=10, pretrain_steps=100, cloning_schedule="cosine")
    rate = script.cloning_rate(config)
    wanted = [3e-3 * min(1, (n + 1) / 10) * (1 + math.cos(math.pi * n / 100)) / 2
              for n in (0, 4, 9, 50, 99)]  # fmt: skip
    close(np.array([rate(n) for n in (0, 4, 9, 50, 99)]), np.array(wanted), rtol=1e-4)
    assert rate(100) == rate(150) == 0
    flat = script.cloning_rate(dataclasses.replace(config, cloning_schedule="constant"))
    close(flat(90), 3e-3, rtol=1e-5)


def test_a_seed_without_an_episodes_end_does_not_learn(script):
    """Counts differ between seeds: 3 updates and none."""
    config = config_of(script, num_seeds=2, policy="gaussian")
    two = [agent(script, config, seed) for seed in range(2)]
    state = jax.tree.map(lambda *xs: np.stack(xs), *two)
    buffer = script.empty_buffers(2, 8, script.blank_transition(OBS, A))
    buffer = buffer.replace(size=np.full(2, 8, np.int32))
    dataset = jax.tree.map(jnp.asarray, batch_with_returns(script, 0))
    kind = dict(update=script.distil, draw=script.distillation_batch)
    learn = partial(script.learn, config=config, **kind)
    after, sums = learn(jax.tree.map(jnp.array, state), buffer, dataset, np.array([3, 0]))
    assert np.array_equal(after.actor.step, [3, 0]) and sums["actor_loss"][1] == 0
    same = jax.tree.map(lambda a, b: np.array_equal(a[1], b[1]), after, state)
    assert jax.tree.all(same)
    alone, one = learn(jax.tree.map(lambda x: jnp.array(x[:1]), state),
                       jax.tree.map(lambda x: x[:1], buffer), dataset, np.array([3]))  # fmt: skip
    close(one["actor_loss"][0], sums["actor_loss"][0], rtol=1e-5)


# ----------------------------------------------------------------------------------------- Refusals


@pytest.mark.parametrize(("arguments", "words"), [
    (["--kept-actions", "99"], "more than --base-actions"),
    (["--policy", "flwo"], "must be one of diffusion, transformer, gaussian"),
    (["--value-bins", "1"], "--value-bins"),
    (["--value-bins", "64", "--value-min", "5", "--value-max", "4"], "below --value-max"),
    (["--value-bins", "64", "--value-min", "-1", "--value-max", "0"], "discounted returns go from"),
    (["--policy", "transformer", "--attention-heads", "3"], "multiple of --attention-heads"),
    (["--ascent-steps", "-1"], "--ascent-steps -1: must be in"),
    (["--kept-actions", "1"], "keep at least 2"),
    (["--critic", "rlpd"], "add --offline-steps 0"),
])  # fmt: skip
def test_refusals(arguments, words, reused, pendulum, tmp_path):
    flags = ["--dataset", str(pendulum), "--env-id", "Pendulum-v1", "--preset", "smoke"]
    done = go(reused, tmp_path, [*flags, *arguments, "--run-dir", "run"])
    assert done.code == 2 and words in done.err and done.err.count("\n") == 1, done.err
    assert not (tmp_path / "run").exists()  # the corrected command may use it


def test_the_source_of_a_run_may_be_gone(reused, flags, whole, tmp_path):
    """It is needed once: --resume and --eval-only do without it."""
    shutil.copytree(whole[0], tmp_path / "source")
    started = [*flags, "--init-from", "source"]
    assert go(reused, tmp_path, started).code == 0
    shutil.rmtree(tmp_path / "source")
    for arguments in (started, ["--eval-only", "run"]):
        done = go(reused, tmp_path, arguments)
        assert done.code == 0, done.err


@pytest.mark.parametrize(("name", "value"), [
    ("policy", "gaussian"), ("denoising-steps", "3"), ("value-max", "1"), ("critic", "iql"),
])  # fmt: skip
def test_an_agent_of_another_meaning_is_refused(name, value, reused, flags, whole, tmp_path):
    arguments = [*flags[:-2], "--init-from", str(whole[0]), f"--{name}", value]
    done = go(reused, tmp_path, arguments)
    assert done.code == 2 and f"was made with --{name}" in done.err, done.err


def test_presets_are_the_papers(script):
    """Section 6 of the specification: what the published runs have in common, and what not."""
    common = dict(num_critics=10, target_critics=2, base_actions=32, kept_actions=10,
                  ascent_steps=10, ascent_rate=3e-4, num_actions=10, cql_alpha=0.005,
                  discount=0.99, tau=0.005, batch_size=256, learning_rate=3e-4)  # fmt: skip
    own = {
        "antmaze": dict(value_min=-100.0, value_max=0.0, critic_hidden_dims=(256,) * 4,
                        reward_shift=-1.0, offline_ratio=0.5, offline_steps=1_000_000,
                        acting_selection="argmax"),
        "kitchen": dict(value_min=-400.0, value_max=0.0, critic_hidden_dims=(512,) * 3,
                        reward_shift=-4.0, offline_ratio=0.25, offline_steps=500_000,
                        policy_learning_rate=1e-5, acting_selection="softmax"),
    }  # fmt: skip
    for name, wanted in own.items():
        config = dataclasses.replace(script.Config(), **script.PRESETS[name])
        config = dataclasses.asdict(script.settle(config))
        wanted = common | wanted | dict(value_bins=128, policy_tau=0.002)
        assert {k: config[k] for k in wanted} == wanted
        assert config["value_min"] == pytest.approx(config["reward_shift"] / (1 - 0.99))
