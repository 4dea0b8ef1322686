"""PA-RL: the losses and samples of the three classes of policy, the search for better actions, the
critics' losses and whole updates against NumPy; the order of an online round; a known optimum."""

import math
from functools import lru_cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_losses import OBS, A, B, adam, batch_of, compiled, dense, float64, gaussian_log_prob
from test_losses import template as zeros

SIZES = dict(
    policy="gaussian", hidden_dims=(16, 8), critic_hidden_dims=(16, 8), policy_width=16,
    policy_blocks=1, attention_heads=2, action_bins=7, dropout_rate=0.0, denoising_steps=5,
    batch_size=B, num_critics=3, base_actions=6, kept_actions=4, ascent_steps=3, ascent_rate=5.0,
    num_actions=5, cql_alpha=2.0, learning_rate=1e-2, tau=0.2, policy_tau=0.25, pretrain_steps=100,
    cloning_learning_rate=3e-3, policy_learning_rate=1e-3, policy_warmup=10,
    cloning_schedule="cosine",
)  # fmt: skip
BINS = dict(value_bins=21, value_min=-3.0, value_max=2.0)
SEARCH = ("base_q", "kept_q", "optimised_q", "moved")
close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)


def config_of(script, **changes):
    return script.Config(**SIZES | changes)


def fresh(script, config, seed=0):
    """An agent with random parameters everywhere, of signals that neither fade nor explode: no bias
    is 0, no target is its network. Its critic has learnt."""
    rng, agent = np.random.default_rng(seed), zeros(script, config)
    scale = lambda x: 1 / math.sqrt(x.shape[-2]) if x.ndim > 1 else 0.3  # noqa: E731
    draw = partial(jax.tree.map, lambda x: np.float32(scale(x) * rng.normal(size=x.shape)))
    parts = {name: getattr(agent, name) for name in ("actor", "critic", "value")}
    parts = {name: x.replace(params=draw(x.params)) for name, x in parts.items()}
    for name in ("target_actor_params", "target_critic_params"):
        parts[name] = draw(getattr(agent, name))
    parts["critic"] = parts["critic"].replace(step=np.int32(1))
    return agent.replace(key=jax.random.PRNGKey(seed), **parts)


def batch_with_returns(script, seed):
    """Returns around the Q-values: some bound them, some do not; one is not known yet."""
    returns = np.random.default_rng(seed + 100).normal(size=B).astype(np.float32)
    returns[3] = -1e9
    return batch_of(script, seed).replace(mc_returns=returns)


@lru_cache
def graded(script, name, config):
    return jax.jit(jax.value_and_grad(partial(getattr(script, name), config=config), has_aux=True))


def same_gradient(found, reference, params):
    """Along random directions it is the reference's slope in float64: no other path has one."""
    rng, found, params = np.random.default_rng(9), float64(found), float64(params)
    norm = math.sqrt(sum(np.vdot(x, x) for x in jax.tree.leaves(found)))
    for _ in range(3):
        way = jax.tree.map(lambda x: rng.normal(size=x.shape), params)
        at = lambda h, way=way: reference(jax.tree.map(lambda x, y: x + h * y, params, way))  # noqa: E731
        slope = sum(np.vdot(*x) for x in zip(*map(jax.tree.leaves, (found, way)), strict=True))
        close(slope, (at(1e-6) - at(-1e-6)) / 2e-6, rtol=2e-3, atol=2e-4 * norm)


def equal(tree, other):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, tree, other)))


# --------------------------------------------------------------------------- Networks, written out
def swish(x):
    return x / (1 + np.exp(-x))


def elu(x):
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0)))


def softmax(x):
    mass = np.exp(x - x.max(axis=-1, keepdims=True))
    return mass / mass.sum(axis=-1, keepdims=True)


def norm(tree, name, x):
    x = x - x.mean(axis=-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6)
    return x * tree[name]["scale"] + tree[name]["bias"]


def outputs_of(params, observations, actions):
    """(N, B, Z)."""
    found = []
    for i in range(len(params["params"]["Dense_0"]["bias"])):
        tree, x = jax.tree.map(lambda leaf, i=i: leaf[i], params["params"]), (observations, actions)
        x = np.concatenate(x, axis=1)
        for layer in range(2):
            x = swish(norm(tree, f"LayerNorm_{layer}", dense(tree, f"Dense_{layer}", x)))
        found.append(dense(tree, "Dense_2", x))
    return np.stack(found)


def q_of(params, observations, actions, c):
    """(N, B)."""
    outputs = outputs_of(params, observations, actions)
    width = (c.value_max - c.value_min) / max(c.value_bins, 1)
    centres = c.value_min + width * (np.arange(c.value_bins) + 0.5)
    return (softmax(outputs) * centres).sum(axis=-1) if c.value_bins else outputs[..., 0]


def v_of(params, x):
    for layer in range(2):
        x = np.maximum(dense(params["params"], f"Dense_{layer}", x), 0)
    return dense(params["params"], "Dense_2", x)[:, 0]


def gaussian_of(params, x):
    """Mean and standard deviation (B, A)."""
    tree = params["params"]
    for layer in range(2):
        x = np.maximum(dense(tree, f"Dense_{layer}", x), 0)
    return dense(tree, "Dense_2", x), np.exp(np.clip(dense(tree, "Dense_3", x), -10, 2))


def denoiser(params, observations, actions, step):
    """The predicted noise (B, A)."""
    tree = params["params"]
    angle = 2 * np.pi * step[:, None] * tree["frequencies"]
    time = np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
    time = dense(tree, "Dense_0", swish(dense(tree, "Dense_1", time)))
    x = dense(tree, "Dense_2", np.concatenate([time, observations, actions], axis=1))
    x = x + dense(tree, "Dense_4", swish(dense(tree, "Dense_3", norm(tree, "LayerNorm_0", x))))
    return dense(tree, "Dense_5", swish(x))


def logits_of(params, observations, tokens):
    """The transformer's logits (B, A, V), all dimensions at once."""
    tree = params["params"]
    heads = tree["MultiHeadDotProductAttention_0"]
    first = dense(tree, "Dense_0", elu(dense(tree, "Dense_1", observations)))
    before = [tree["tokens"][d][tokens[:, d]] for d in range(A - 1)]
    x = np.stack([first, *before], axis=1) + tree["positions"]  # (B, A, W)
    inputs, each = norm(tree, "LayerNorm_0", x), ("query", "key", "value")
    project = lambda n: np.einsum("btw,whd->bhtd", inputs, heads[n]["kernel"])  # noqa: E731
    q, k, v = (project(name) + heads[name]["bias"][:, None] for name in each)
    scores = q @ k.swapaxes(2, 3) / math.sqrt(q.shape[-1])  # (B, H, A, A)
    scores = np.where(np.tri(A) > 0, scores, -1e30)
    x = x + np.einsum("bhtd,hdw->btw", softmax(scores) @ v, heads["out"]["kernel"])
    x = x + heads["out"]["bias"]
    block = dense(tree, "Dense_2", norm(tree, "LayerNorm_1", x))
    block = block / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (block + 0.044715 * block**3)))
    x = x + dense(tree, "Dense_3", block)
    return dense(tree, "Dense_5", elu(dense(tree, "Dense_4", norm(tree, "LayerNorm_2", x))))


def schedule():
    """The alphas and their products of five steps."""
    level = np.array([math.cos((t / 5 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(6)])
    alpha = np.maximum(level[1:] / level[:-1], 0.001)
    return alpha, np.cumprod(alpha)


def normal(key, shape=(B, A)):
    return np.float64(jax.random.normal(key, shape))


# -------------------------------------------------------------------------------------- Policies
def gaussian_loss(p, s, a, key):
    a = np.clip(a, -0.99, 0.99)
    log_prob = gaussian_log_prob(np.arctanh(a), *gaussian_of(p, s), np)
    return -(log_prob - np.log(1 - a**2).sum(axis=1)).mean()


def diffusion_loss(p, s, a, key):
    step_key, noise_key, _ = jax.random.split(key, 3)
    step, noise = np.array(jax.random.randint(step_key, (B,), 0, 5)), normal(noise_key)
    assert set(step) == {0, 1, 2, 3, 4}
    signal = schedule()[1][step][:, None]
    noisy = np.sqrt(signal) * a + np.sqrt(1 - signal) * noise
    return ((denoiser(p, s, noisy, step) - noise) ** 2).sum(axis=1).mean()


def tokens_of(a):
    return np.array([[np.abs(np.linspace(-1, 1, 7) - x).argmin() for x in row] for row in a])


def transformer_loss(p, s, a, key):
    tokens = tokens_of(a)
    mass = softmax(logits_of(p, s, tokens))
    return -np.log(np.take_along_axis(mass, tokens[..., None], axis=2)).sum(axis=(1, 2)).mean()


def gaussian_sample(p, s, key):
    mean, std = gaussian_of(p, s)
    return np.tanh(mean + std * normal(key, mean.shape))


def diffusion_sample(p, s, key):
    """The mean in its other form: by way of the estimate of the clean action."""
    (alpha, product), (start_key, noise_key) = schedule(), jax.random.split(key)
    x, before = normal(start_key), np.append(1, schedule()[1])
    for t in reversed(range(5)):
        clean = x - np.sqrt(1 - product[t]) * denoiser(p, s, x, np.full(B, t))
        clean = np.sqrt(before[t]) * (1 - alpha[t]) * clean / np.sqrt(product[t])
        mean = (clean + np.sqrt(alpha[t]) * (1 - before[t]) * x) / (1 - product[t])
        x = mean + (t > 0) * np.sqrt(1 - alpha[t]) * normal(jax.random.fold_in(noise_key, t))
        x = np.clip(x, -1, 1)
    assert 0.2 < (np.abs(x) < 1).mean()
    return x


def transformer_sample(p, s, key):
    """One dimension after the other, each from the logits of the whole network."""
    tokens = np.zeros((B, A), int)
    for d in range(A):
        logits = jnp.float32(logits_of(p, s, tokens)[:, d])
        tokens[:, d] = jax.random.categorical(jax.random.fold_in(key, d), logits)
    assert len(np.unique(tokens)) > 4
    return tokens / 3 - 1


@pytest.mark.parametrize("policy", ["diffusion", "transformer", "gaussian"])
def test_a_policys_loss_and_samples(policy, pa_rl):
    """Dropout is in the loss alone."""
    config, key = config_of(pa_rl, policy=policy), jax.random.PRNGKey(8)
    agent, batch = fresh(pa_rl, config), batch_of(pa_rl, 0)
    batch.actions[:4, 0] = [-1, 1, 0.999, -0.999]
    params, b = agent.actor.params, float64(batch)
    loss = partial(globals()[f"{policy}_loss"], s=b.observations, a=b.actions, key=key)
    (found, _), grads = graded(pa_rl, "actor_loss", config)(params, agent, batch, key)
    close(found, loss(float64(params)))
    same_gradient(grads, loss, params)
    dropping = agent.policy.clone(config=config_of(pa_rl, dropout_rate=0.5))
    inputs = params, batch.observations, batch.actions, key
    draws = [str(jax.make_jaxpr(x.loss)(*inputs)).count("bits[") for x in (agent.policy, dropping)]
    assert (draws[1] > draws[0]) == (policy != "gaussian")
    expected = globals()[f"{policy}_sample"](float64(params), b.observations, key)
    found = jax.jit(dropping.sample)(params, batch.observations, key)
    close(found, expected, rtol=2e-3, atol=2e-3)


# ------------------------------------------------------------------------------------- The search
def searched(agent, observations, keys, c, selection, count=1, data=None):
    """optimise in float64, its gradients by central differences, its samples a Gaussian's."""
    params, rows = float64(agent.critic.params), np.tile(observations, (c.base_actions, 1))
    value = lambda actions: np.stack(  # noqa: E731
        [q_of(params, observations, a, c).mean(axis=0) for a in actions])  # fmt: skip
    samples = gaussian_sample(float64(agent.target_actor_params), rows, keys[0]).reshape(-1, B, A)
    q = value(samples)
    order = np.argsort(-q, axis=0)[: c.kept_actions]
    info = {"base_q": q.mean(), "kept_q": np.take_along_axis(q, order, axis=0).mean()}
    kept = np.take_along_axis(samples, order[..., None], axis=0)
    if data is not None:
        kept[-1] = data
    positions = [kept]
    for _ in range(c.ascent_steps):
        slopes = [value(positions[-1] + h) - value(positions[-1] - h) for h in 1e-5 * np.eye(A)]
        moved = positions[-1] + c.ascent_rate * np.stack(slopes, axis=-1) / 2e-5
        positions.append(np.clip(moved, -1, 1))
    q = np.stack([value(x) for x in positions])  # (T + 1, K, B)
    best, q = q.argmax(axis=0), q.max(axis=0)
    actions = np.take_along_axis(np.stack(positions), best[None, ..., None], axis=0)[0]
    info |= {"optimised_q": q.mean(), "moved": np.abs(actions - kept).mean(), "best": best}
    if agent.critic.step == 0:
        actions = samples[: c.kept_actions] if data is None else np.broadcast_to(data, kept.shape)
    chosen = jax.random.categorical(keys[1], jnp.float32(q), axis=0, shape=(count, B))
    chosen = q.argmax(axis=0)[None] if selection == "argmax" else np.asarray(chosen)
    return np.take_along_axis(actions, chosen[..., None], axis=0), info


@pytest.mark.parametrize(("selection", "critic"), [("softmax", {}), ("argmax", BINS)])
@pytest.mark.parametrize("with_data", [False, True])
def test_the_search_for_better_actions(selection, critic, with_data, pa_rl):
    config, seen, edge = config_of(pa_rl, **critic), set(), 0
    optimise = jax.jit(partial(pa_rl.optimise, config=config, selection=selection, num_actions=5))
    for seed in range(4):
        agent, batch = fresh(pa_rl, config, seed), batch_of(pa_rl, seed)
        data = batch.actions if with_data else None
        agent = agent.replace(critic=agent.critic.replace(step=np.int32(seed > 0)))
        inputs = agent, batch.observations, jax.random.split(jax.random.PRNGKey(seed))
        found, info = optimise(*inputs, data_actions=data)
        expected, reference = searched(*inputs, config, selection, 5, data)
        close(found, expected, rtol=1e-3, atol=1e-3)
        close([info[name] for name in SEARCH], [reference[name] for name in SEARCH], rtol=1e-3)
        seen |= set(reference["best"].ravel())
        edge += (np.abs(expected) == 1).any()
    assert seen == {0, 1, 2, 3} and edge  # the best position is any of them; the box was reached


def test_who_acts(pa_rl):
    """pi* in training, by acting_selection; its best in evaluation, with the state's noise."""
    config = config_of(pa_rl, acting_selection="softmax")
    agent, s = fresh(pa_rl, config), batch_of(pa_rl, 0).observations
    keys = jax.random.split(jax.random.PRNGKey(int(s.view(np.uint32).sum(dtype=np.uint32))))
    expected = searched(agent, s, keys, config, "argmax")[0][0]
    close(compiled(pa_rl, "act", config)(agent, s), expected, rtol=1e-3, atol=1e-3)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        spy = lambda agent, s, *rest: (seen.append(rest), (s[None], {}))[1]  # noqa: E731
        patch.setattr(pa_rl, "optimise", spy)
        np.testing.assert_array_equal(pa_rl.explore(agent, s[0], agent.key, config), s[0])
    assert seen[0][2] == "softmax" and equal(seen[0][0], jax.random.split(agent.key))


# ------------------------------------------------------------------------------ Losses and updates
def drawn(params, key, c):
    """The critics that a key draws, with replacement."""
    members = np.asarray(jax.random.randint(key, (c.target_critics,), 0, c.num_critics))
    members = members if c.target_critics < c.num_critics else np.arange(c.num_critics)
    return jax.tree.map(lambda x: x[members], float64(params))


def error_of(outputs, targets, c):
    """The squared error, or the cross-entropy bin by bin, mean over the critics."""
    if not c.value_bins:
        return ((outputs[..., 0] - targets) ** 2).mean()
    width = (c.value_max - c.value_min) / c.value_bins
    targets = np.clip(targets, c.value_min, c.value_max)[:, None]
    z = (c.value_min + width * np.arange(c.value_bins + 1) - targets) / (c.value_std * width)
    below = np.vectorize(lambda x: 0.5 * math.erfc(-x / math.sqrt(2)))(z)
    mass = np.diff(below, axis=1) / (below[:, -1:] - below[:, :1])
    return -(mass * np.log(softmax(outputs))).sum(axis=-1).mean()


def critic_of(p, agent, b, own, following, key, c):
    """The critic's loss, with every copy of a best action written out."""
    target_key, difference_key = jax.random.split(key)
    uniform_key, member_key = jax.random.split(difference_key)
    judges = drawn(agent.target_critic_params, target_key, c)
    if c.critic == "iql":
        next_v = v_of(float64(agent.value.params), b.next_observations)
    else:
        lowest = [q_of(judges, b.next_observations, a, c).min(axis=0) for a in following]
        next_v = np.stack(lowest).max(axis=0)
    targets = b.rewards + c.discount * b.masks * next_v
    loss = error_of(outputs_of(p, b.observations, b.actions), targets, c)
    if c.critic == "iql":
        return loss
    pushed = drawn(p, member_key, c)
    uniform = jax.random.uniform(uniform_key, (c.num_actions, B, A), minval=-1, maxval=1)
    data_q = q_of(pushed, b.observations, b.actions, c)
    entries = [data_q, *(q_of(pushed, b.observations, a, c) for a in np.float64(uniform))]
    for actions in (own, following):
        for a in actions if len(actions) > 1 else [actions[0]] * c.num_actions:
            entries.append(np.maximum(q_of(pushed, b.observations, a, c), b.mc_returns))
    difference = np.log(np.exp(entries).mean(axis=0)) - data_q
    return loss + c.cql_alpha * difference.mean()


VARIANTS = {
    "scalar": {},
    "scalar, best action, all critics": dict(target_selection="argmax", target_critics=3),
    "histogram": BINS,
    "iql": dict(critic="iql", **BINS),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_critics_loss(variant, pa_rl):
    config = config_of(pa_rl, **VARIANTS[variant])
    count = 1 if config.target_selection == "argmax" else config.num_actions
    for seed in range(3):
        agent, batch = fresh(pa_rl, config, seed), batch_with_returns(pa_rl, seed)
        actions = np.random.default_rng(seed).uniform(-1, 1, (2, count, B, A)).astype(np.float32)
        key, params = jax.random.PRNGKey(seed), agent.critic.params
        inputs = params, agent, batch, *actions, key
        (found, info), grads = graded(pa_rl, "critic_loss", config)(*inputs)
        reference = partial(critic_of, agent=agent, b=float64(batch), own=float64(actions[0]),
                            following=float64(actions[1]), key=key, c=config)  # fmt: skip
        close(found, reference(float64(params)))
        same_gradient(grads, reference, params)
        q = q_of(float64(params), batch.observations, batch.actions, config)
        close(info["q"], q.mean())
        assert config.critic == "iql" or 0.1 < info["below_return"] < 0.9
