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
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
quick = partial(jax.jit, compiler_options=QUICK)  # to compile: these run a few times only
GAIN = {"actor": 1.0, "critic": 3.0, "value": 1.0}
SEARCH = ("base_q", "kept_q", "optimised_q", "moved")
close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)


def config_of(script, **changes):
    return script.Config(**SIZES | changes)


def fresh(script, config, seed=0):
    """An agent with random parameters everywhere: no bias is 0, no target is its network. Signals
    neither fade nor explode, Q is bumpy. The critic has learnt."""
    rng, agent = np.random.default_rng(seed), zeros(script, config)

    def draw(tree, gain=1.0):
        scale = lambda x: gain / math.sqrt(x.shape[-2]) if x.ndim > 1 else 0.3  # noqa: E731
        return jax.tree.map(lambda x: np.float32(scale(x) * rng.normal(size=x.shape)), tree)

    parts = {name: getattr(agent, name) for name in ("actor", "critic", "value")}
    parts = {name: x.replace(params=draw(x.params, GAIN[name])) for name, x in parts.items()}
    for name in ("actor", "critic"):
        params = getattr(agent, f"target_{name}_params")
        parts[f"target_{name}_params"] = draw(params, GAIN[name])
    parts["critic"] = parts["critic"].replace(step=np.int32(1))
    return agent.replace(key=jax.random.PRNGKey(seed), **parts)


def batch_with_returns(script, seed):
    """Returns around the Q-values: some bound them, some do not; one is not known yet."""
    returns = np.random.default_rng(seed + 100).normal(size=B).astype(np.float32)
    returns[3] = -1e9
    return batch_of(script, seed).replace(mc_returns=returns)


@lru_cache
def graded(script, name, config):
    return quick(jax.value_and_grad(partial(getattr(script, name), config=config), has_aux=True))


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
    found = quick(dropping.sample)(params, batch.observations, key)
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
def test_the_search_for_better_actions(selection, critic, pa_rl):
    """With the data's action among them, and without; the policy itself before Q has learnt."""
    config, seen, edge = config_of(pa_rl, **critic), set(), 0
    settings = dict(config=config, selection=selection, num_actions=5)
    optimise = quick(partial(pa_rl.optimise, **settings))
    for seed in range(4):
        agent, batch = fresh(pa_rl, config, seed), batch_of(pa_rl, seed)
        data = batch.actions if selection == "argmax" else None
        agent = agent.replace(critic=agent.critic.replace(step=np.int32(seed > 0)))
        inputs = agent, batch.observations, jax.random.split(jax.random.PRNGKey(seed))
        found, info = optimise(*inputs, data_actions=data)
        expected, reference = searched(*inputs, config, selection, 5, data)
        close(found, expected, rtol=1e-3, atol=1e-3)
        close([info[name] for name in SEARCH], [reference[name] for name in SEARCH], rtol=1e-3)
        seen |= set(reference["best"].ravel())
        edge += (np.abs(expected) == 1).any()
    assert len(seen) > 2 and edge  # the best position is not always the last; the box was reached


def test_who_acts(pa_rl, monkeypatch):
    """pi* in training, by acting_selection; its best in evaluation, whose noise comes from all the
    observations."""
    agent, s, seen = zeros(pa_rl, config_of(pa_rl)), batch_of(pa_rl, 0).observations, []
    spy = lambda agent, s, *rest: (seen.append(rest), (s[None], {}))[1]  # noqa: E731
    monkeypatch.setattr(pa_rl, "optimise", spy)
    config = config_of(pa_rl, acting_selection="softmax")
    close(pa_rl.explore(agent, s[0], jax.random.PRNGKey(7), config), s[0])
    close(pa_rl.act(agent, s, config), s)
    pa_rl.act(agent, s.copy(), config)
    s[5, 0] = np.nextafter(s[5, 0], np.float32(9))
    pa_rl.act(agent, s, config)
    keys, _, selections = zip(*seen, strict=True)
    assert selections == ("softmax", "argmax", "argmax", "argmax")
    assert equal(keys[0], jax.random.split(jax.random.PRNGKey(7)))
    assert equal(keys[1], keys[2]) and not equal(keys[1], keys[3])


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


VARIANTS = [{}, dict(target_selection="argmax", target_critics=3, **BINS)]


@pytest.mark.parametrize("variant", VARIANTS, ids=["scalar", "histogram, best, all critics"])
def test_the_critics_loss(variant, pa_rl):
    config = config_of(pa_rl, **variant)
    for seed in range(3):
        agent, batch = fresh(pa_rl, config, seed), batch_with_returns(pa_rl, seed)
        shape = 2, 1 if config.target_selection == "argmax" else 5, B, A
        own, following = np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)
        key, params = jax.random.PRNGKey(seed), agent.critic.params
        inputs = params, agent, batch, own, following, key
        (found, info), grads = graded(pa_rl, "critic_loss", config)(*inputs)
        reference = partial(critic_of, agent=agent, b=float64(batch), own=float64(own),
                            following=float64(following), key=key, c=config)  # fmt: skip
        close(found, reference(float64(params)))
        same_gradient(grads, reference, params)
        close(info["q"], q_of(float64(params), batch.observations, batch.actions, config).mean())
        assert 0.1 < info["below_return"] < 0.9


def value_of(p, agent, b, key, c):
    q = q_of(drawn(agent.target_critic_params, key, c), b.observations, b.actions, c)
    u = q.min(axis=0) - v_of(p, b.observations)
    return np.where(u < 0, (1 - c.expectile) * u * u, c.expectile * u * u).mean()


def same_step(new, old, loss, rate):
    """Adam's first step along the gradient of `loss` at the parameters before it."""
    grads = jax.tree.map(lambda x: 10 * x, new.opt_state[0].mu)
    same_gradient(grads, loss, old.params)
    moments = (jax.tree.map(np.zeros_like, grads),) * 2
    expected, _ = adam(old.params, grads, moments, 1, rate)
    jax.tree.map(partial(close, atol=1e-4), new.params, expected)


def averaged(target, old, new, tau):
    mixed = jax.tree.map(lambda x, y: (1 - tau) * x + tau * y, old, new)
    jax.tree.map(close, target, mixed)


@pytest.mark.parametrize("critic", ["cal_ql", "iql"])
def test_an_update_of_the_critic(critic, pa_rl):
    """pi* in both states, or V first; then Q, and the target's average. The policy is held."""
    config = config_of(pa_rl, critic=critic, **(BINS if critic == "iql" else {}))
    agent, batch = fresh(pa_rl, config, 1), batch_with_returns(pa_rl, 1)
    new, info = quick(partial(pa_rl.update, config=config))(agent, batch)
    key, action_key, critic_key, value_key = jax.random.split(agent.key, 4)
    b, own, following, before = float64(batch), None, None, agent
    if critic == "iql":
        loss = partial(value_of, agent=agent, b=b, key=value_key, c=config)
        close(info["value_loss"], loss(float64(agent.value.params)))
        same_step(new.value, agent.value, loss, 1e-2)
        before = agent.replace(value=new.value)
    else:
        inputs = zip((b.observations, b.next_observations), jax.random.split(action_key))
        found = [searched(agent, s, jax.random.split(k), config, "softmax", 5) for s, k in inputs]
        (own, own_info), (following, following_info) = found
        means = [(own_info[name] + following_info[name]) / 2 for name in SEARCH]
        close([info[name] for name in SEARCH], means, rtol=1e-3)
        assert equal(new.value, agent.value)
    loss = partial(critic_of, agent=before, b=b, own=own, following=following, key=critic_key,
                   c=config)  # fmt: skip
    found = info["critic_loss"] + config.cql_alpha * info.get("difference", 0.0)
    close(found, loss(float64(agent.critic.params)), rtol=1e-3)
    same_step(new.critic, agent.critic, loss, 1e-2)
    averaged(new.target_critic_params, agent.target_critic_params, new.critic.params, 0.2)
    assert equal((new.actor, new.target_actor_params), (agent.actor, agent.target_actor_params))
    assert equal(new.key, key) and new.critic.step == 2


def test_a_distillation(pa_rl):
    """The policy imitates pi*'s best, or the data while Q knows nothing. The critic is held."""
    config = config_of(pa_rl, critic="iql", distillation_selection="argmax")
    distil, batch = quick(partial(pa_rl.distil, config=config)), batch_of(pa_rl, 0)
    for learnt in (0, 1):
        agent = fresh(pa_rl, config)
        agent = agent.replace(critic=agent.critic.replace(step=np.int32(learnt)))
        new, info = distil(agent, batch)
        key, *keys = jax.random.split(agent.key, 4)
        inputs = batch.observations, keys[:2], config, "argmax", 1, batch.actions
        actions, search = searched(agent, *inputs)
        assert learnt or equal(actions[0], batch.actions)
        loss = partial(gaussian_loss, s=float64(batch.observations), a=actions[0], key=keys[2])
        close(info["actor_loss"], loss(float64(agent.actor.params)), rtol=1e-3)
        close([info[name] for name in SEARCH], [search[name] for name in SEARCH], rtol=1e-3)
        same_step(new.actor, agent.actor, loss, 3e-4)  # the first of ten steps of warm-up
        averaged(new.target_actor_params, agent.target_actor_params, new.actor.params, 0.25)
        for name in ("critic", "target_critic_params", "value"):
            assert equal(getattr(new, name), getattr(agent, name))
        assert equal(new.key, key)


def test_the_policys_learning_rate(pa_rl):
    counts = np.array([0, 4, 9, 50, 99, 100, 104, 109, 500])
    rise, online = [0.1, 0.5, 1, 1, 1], 1e-3 * np.array([0.1, 0.5, 1, 1])
    fade = (1 + np.cos(np.pi * counts[:5] / 100)) / 2
    for schedule, factor in (("cosine", fade), ("constant", 1.0)):
        rate = pa_rl.policy_rate(config_of(pa_rl, cloning_schedule=schedule))
        close(rate(counts), np.append(3e-3 * np.array(rise) * factor, online), atol=1e-9)


# ---------------------------------------------------------------------------------- Online rounds
LENGTHS = [[10, 25, 25, 99], [10, 60, 99]]  # of the seeds' episodes; the first seed's terminate


class Envs:
    """Observations (2, O) that count the resets and the steps since then."""

    def reset(self, seed):
        self.seeds, self.episode, self.log = seed, [0, 0], []
        self.now = np.zeros((2, OBS), np.float32)
        return self.now, {}

    def step(self, actions):
        before, self.now = self.now, self.now + np.float32([0, 0, 1])
        final, rewards = self.now.copy(), np.random.default_rng(len(self.log)).normal(size=2)
        ends = np.array([self.now[i, 2] == LENGTHS[i][self.episode[i]] for i in range(2)])
        for i in np.flatnonzero(ends):
            self.episode[i] += 1
            self.now[i] = [i, self.episode[i], 0]
        terminated = ends & np.array([True, False])
        self.log.append((before, actions, rewards, final, 1.0 - terminated, ends))
        return self.now, rewards, terminated, ends & ~terminated, {"final_obs": list(final)}


def returns_of(rewards, masks, ends):
    """By the rule "infinite": the last reward for ever, unless it was a termination."""
    returns = np.zeros(len(rewards))
    for i in reversed(range(len(rewards))):
        after = masks[i] * rewards[i] / 0.1 if ends[i] else returns[i + 1]
        returns[i] = rewards[i] + 0.9 * after
    return returns


def test_after_an_episode_as_many_distillations_and_then_updates_as_it_had_steps(
    pa_rl, monkeypatch
):
    """Rounds of 10 and 70 steps, two seeds, slices of 50, a ring of 40 that the last round fills:
    its rows, their returns as soon as they are known, and the optimisers' new start."""
    config = config_of(pa_rl, num_seeds=2, discount=0.9, return_rule="infinite", seed=3)
    both = jax.tree.map(lambda x: np.stack([x, x]), zeros(pa_rl, config))
    ones = {n: jax.tree.map(np.ones_like, getattr(both, n)) for n in ("actor", "critic", "value")}
    agents = both.replace(key=np.array(jax.random.split(jax.random.PRNGKey(0))), **ones)
    buffers = jax.tree.map(lambda x: jnp.zeros((2, 40, *x.shape[1:])), batch_with_returns(pa_rl, 0))
    envs, calls, keys, fresh_optimisers = Envs(), [], [], []

    def learn(agents, buffers, size, dataset, counts, config, update):
        fresh_optimisers.append(not any(x.any() for x in jax.tree.leaves(agents.critic.opt_state)))
        fresh_optimisers.append((agents.actor.opt_state[1].count == 100).all())
        known = (np.asarray(buffers.mc_returns) != -1e9).sum(axis=1)
        calls.append((update.__name__, size, [*counts], [*known]))
        return agents.replace(**ones), dict.fromkeys(pa_rl.METRICS, 1.0 * counts)

    def explore_all(agents, observations, key, config):
        keys.append(key)
        return np.full((2, A), len(keys), np.float32)

    monkeypatch.setattr(pa_rl, "learn", learn)
    monkeypatch.setattr(pa_rl, "explore_all", explore_all)
    bar = SimpleNamespace(update=lambda: None, refresh=lambda: None)
    run = config, None, envs, bar
    agents, buffers, info = pa_rl.episodes_round(agents, buffers, run, 0, 10)
    assert calls == [(n, 10, [10, 10], [40, 40]) for n in ("distil", "update")]
    assert fresh_optimisers == [True, True, False, False]
    calls.clear()
    agents, buffers, info = pa_rl.episodes_round(agents, buffers, run, 10, 80)
    assert envs.seeds == [4 * 10**9 + 10, 5 * 10**9 + 10] and not any(fresh_optimisers[2:])
    slices = [(35, [[25, 0]], [40, 15]), (40, [[25, 0]], [40, 0]),
              (40, [[0, 50], [0, 10]], [30, 40]), (40, [[20, 10]], [40, 40])]  # fmt: skip
    assert calls == [(name, size, counts, known) for size, each, known in slices
                     for name in ("distil", "update") for counts in each]  # fmt: skip
    assert len(np.unique(np.concatenate(keys), axis=0)) == 160
    assert info["updates"] == 140 and list(info["q"]) == [2.0, 2.0]  # the stub counts both kinds
    columns = [np.stack(x, axis=1) for x in zip(*envs.log, strict=True)]  # (2, 70, ...)
    columns[5][:, -1] = True
    columns.append(np.stack([returns_of(*x) for x in zip(*(columns[i] for i in (2, 4, 5)))]))
    in_time = np.arange(40, 80) % 40
    for found, expected in zip(vars(buffers).values(), columns, strict=True):
        close(found[:, in_time], expected[:, -40:])


def test_a_seed_learns_as_often_as_it_has_steps(pa_rl, monkeypatch):
    """Three times and not at all; batches of a distillation are drawn otherwise than an update's."""

    def count(agent, batch, config):
        actor = agent.actor.replace(step=agent.actor.step + 1)
        return agent.replace(actor=actor), {"q": batch.rewards.mean()}

    monkeypatch.setattr(pa_rl, "distil", count)
    config = config_of(pa_rl, num_seeds=2, offline_ratio=0.25)
    agents = jax.tree.map(lambda x: np.stack([x, x]), zeros(pa_rl, config))
    dataset = jax.tree.map(lambda x: jnp.zeros((1000, *x.shape[1:])), batch_with_returns(pa_rl, 0))
    buffers = jax.tree.map(lambda x: jnp.ones((2, 9, *x.shape[1:])), dataset)
    for kind, low, high in ((count, 0, 0.5), (lambda *xs: count(*xs), 2.25, 2.25)):
        inputs = jax.tree.map(jnp.array, agents), buffers, 9, dataset, np.array([3, 0])
        new, info = pa_rl.learn(*inputs, config, kind)
        assert list(new.actor.step) == [3, 0] and equal(new.key[1], agents.key[1])
        assert low <= info["q"][0] <= high and info["q"][1] == 0


@pytest.mark.parametrize("distilling", [False, True])
def test_an_online_batch(distilling, pa_rl):
    """offline_ratio of the dataset's 9 rows in a critic's; all 12 filled rows alike in others."""
    config, keys = config_of(pa_rl, offline_ratio=0.25), jax.random.split(jax.random.PRNGKey(0), 99)
    rows = batch_with_returns(pa_rl, 0).replace(**dict.fromkeys(("rewards", "ends"), np.arange(B)))
    dataset, buffer = jax.tree.map(lambda x: x[:9], rows), jax.tree.map(lambda x: x[9:], rows)
    draw = quick(
        jax.vmap(lambda key: pa_rl.online_batch(dataset, buffer, 3, key, config, distilling))
    )
    batch = draw(keys)
    found, counts = np.unique(batch.rewards, return_counts=True)
    assert list(found) == [*range(12)] and equal(batch.ends, batch.rewards)
    assert equal(batch.observations, rows.observations[batch.rewards])
    if distilling:
        close(counts, np.full(12, 132), rtol=0.35)
    else:
        assert ((batch.rewards < 9).sum(axis=1) == 4).all()


# --------------------------------------------------------------------------------- A known optimum
def test_a_diffusion_improves(pa_rl):
    """It clones uniform actions, which is what distillation does while Q knows nothing, and is then
    distilled: its samples come three times closer to the best action, s / 2."""
    config = config_of(
        pa_rl, policy="diffusion", batch_size=32, policy_tau=1.0, pretrain_steps=0, ascent_rate=0.02,
        policy_learning_rate=3e-3, distillation_selection="argmax", num_critics=1,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    s, a = rng.choice([-1.0, 1.0], (1000, 1)), rng.uniform(-1, 1, (1000, 1))
    dataset = pa_rl.Batch(*map(np.float32, (s, a, a[:, 0], s, a[:, 0], a[:, 0])))
    inputs = jax.random.PRNGKey(0), dataset.observations[:1], dataset.actions[:1]
    agent = pa_rl.create_agent(*inputs, config)
    q = lambda params, s, a: -((a - s / 2) ** 2) + params  # (B, 1)  # noqa: E731
    critic = agent.critic.replace(apply_fn=q, params=np.zeros(1))
    agents = jax.tree.map(lambda x: jnp.asarray(x)[None], agent.replace(critic=critic))
    sample, gaps, states = (
        jax.jit(agent.policy.sample),
        [],
        np.repeat(np.float32([[-1], [1]]), 500, 0),
    )
    for learnt in (0, 1):
        critic = agents.critic.replace(step=jnp.full(1, learnt))
        agents, _ = pa_rl.update_steps(
            agents.replace(critic=critic), dataset, config, pa_rl.distil, 400
        )
        params = jax.tree.map(lambda x: x[0], agents.target_actor_params)
        gaps.append(
            np.abs(sample(params, states, inputs[0]) - states / 2).reshape(2, 500).mean(axis=1)
        )
    assert (gaps[0] > 0.45).all() and (gaps[1] < gaps[0] / 3).all()
