"""PA-RL: the three policies, the search for better actions and whole updates against NumPy; the
order of an online round; a diffusion that improves."""

import math
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_losses
from test_losses import OBS, A, B, batch_of, dense, float64, gaussian_log_prob, template

SIZES = dict(
    policy="gaussian", hidden_dims=(16, 8), critic_hidden_dims=(16, 8), policy_width=16,
    policy_blocks=1, attention_heads=2, action_bins=7, dropout_rate=0.0, batch_size=B, tau=0.2,
    num_critics=3, base_actions=6, kept_actions=4, ascent_steps=3, ascent_rate=5.0, num_actions=5,
    cql_alpha=2.0, learning_rate=1e-2, cloning_learning_rate=3e-3, policy_learning_rate=1e-3,
    policy_warmup=10, pretrain_steps=100, cloning_schedule="cosine", policy_tau=0.25,
)  # fmt: skip
BINS = dict(value_bins=21, value_min=-3.0, value_max=2.0)
SEARCH = ("base_q", "kept_q", "optimised_q", "moved")
close = partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)
equal = lambda x, y: jax.tree.all(jax.tree.map(np.array_equal, x, y))  # noqa: E731
config_of = lambda script, **changes: script.Config(**SIZES | changes)  # noqa: E731
quick = partial(jax.jit, compiler_options={  # to compile: these run a few times only
    "xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True})  # fmt: skip


def fresh(script, config, learnt=1):
    """test_losses.fresh of smaller policies and a bumpier Q, which has learnt or has not."""
    agent = test_losses.fresh(script, config)
    smaller = lambda x: np.float32(x * (2 / math.sqrt(x.shape[-2]) if x.ndim > 1 else 1))  # noqa: E731
    for name, scale in (("actor", smaller), ("critic", lambda x: 4 * x)):
        part, target = getattr(agent, name), f"target_{name}_params"
        new = part.replace(params=jax.tree.map(scale, part.params))
        agent = agent.replace(**{name: new, target: jax.tree.map(scale, getattr(agent, target))})
    return agent.replace(critic=agent.critic.replace(step=np.int32(learnt)))


def same_step(new, old, loss):
    """One step by Adam's memory of a gradient that is, in random directions, the slope of `loss` in
    float64: no other path has one."""
    grads, params = (float64(x) for x in (new.opt_state[0].mu, old.params))
    rng, add = np.random.default_rng(9), lambda h: lambda x, y: x + h * y
    for _ in range(3):
        way = jax.tree.map(lambda x: rng.normal(size=x.shape), params)
        ends = [loss(jax.tree.map(add(h), params, way)) for h in (1e-6, -1e-6)]
        slope = sum(jax.tree.leaves(jax.tree.map(np.vdot, grads, way)))
        close(slope, 0.1 * (ends[0] - ends[1]) / 2e-6, rtol=2e-3)
    assert new.step == old.step + 1 and not equal(new.params, old.params)


def averaged(target, old, new, tau):
    jax.tree.map(lambda z, x, y: close(z, (1 - tau) * x + tau * y), target, old, new)


# --------------------------------------------------------------------------- Policies, written out
swish = lambda x: x / (1 + np.exp(-x))  # noqa: E731
relu = partial(np.maximum, 0)
normal = lambda key, shape=(B, A): np.float64(jax.random.normal(key, shape))  # noqa: E731
log_softmax = lambda x: x - np.logaddexp.reduce(x, axis=-1, keepdims=True)  # noqa: E731


def norm(tree, name, x):
    x = x - x.mean(axis=-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6)
    return x * tree[name]["scale"] + tree[name]["bias"]


def mlp(tree, x, activation=relu):
    for layer in range(2):
        x = dense(tree, f"Dense_{layer}", x)
        x = activation(norm(tree, f"LayerNorm_{layer}", x) if "LayerNorm_0" in tree else x)
    return x


class Gaussian:
    def policy(p, s):
        tree, x = p["params"], mlp(p["params"], s)
        return dense(tree, "Dense_2", x), np.exp(np.clip(dense(tree, "Dense_3", x), -10, 2))

    def loss(p, s, a, key):
        a = np.clip(a, -0.99, 0.99)
        log_prob = gaussian_log_prob(np.arctanh(a), *Gaussian.policy(p, s), np)
        return -(log_prob - np.log(1 - a**2).sum(axis=1)).mean()

    def sample(p, s, key):
        mean, std = Gaussian.policy(p, s)
        return np.tanh(mean + std * normal(key, mean.shape))


class Diffusion:
    level = np.cos((np.arange(6) / 5 + 0.008) / 1.008 * math.pi / 2) ** 2
    alpha = np.maximum(level[1:] / level[:-1], 0.001)

    def noise(p, s, a, step):
        tree, angle = p["params"], 2 * np.pi * step[:, None] * p["params"]["frequencies"]
        time = np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
        time = dense(tree, "Dense_0", swish(dense(tree, "Dense_1", time)))
        x = dense(tree, "Dense_2", np.concatenate([time, s, a], axis=1))
        x = x + dense(tree, "Dense_4", swish(dense(tree, "Dense_3", norm(tree, "LayerNorm_0", x))))
        return dense(tree, "Dense_5", swish(x))

    def loss(p, s, a, key):
        step_key, noise_key, _ = jax.random.split(key, 3)
        step, noise = np.array(jax.random.randint(step_key, (B,), 0, 5)), normal(noise_key)
        signal = np.cumprod(Diffusion.alpha)[step][:, None]
        noisy = np.sqrt(signal) * a + np.sqrt(1 - signal) * noise
        return ((Diffusion.noise(p, s, noisy, step) - noise) ** 2).sum(axis=1).mean()

    def sample(p, s, key):
        (start_key, noise_key), alpha = jax.random.split(key), Diffusion.alpha
        x, product = normal(start_key), np.cumprod(alpha)
        for t in reversed(range(5)):
            noise = Diffusion.noise(p, s, x, np.full(B, t)) / np.sqrt(1 - product[t])
            fresh = (t > 0) * np.sqrt(1 - alpha[t]) * normal(jax.random.fold_in(noise_key, t))
            x = np.clip((x - (1 - alpha[t]) * noise) / np.sqrt(alpha[t]) + fresh, -1, 1)
        return x


@pytest.mark.parametrize("written_out", [Diffusion, Gaussian])
def test_a_policy(written_out, pa_rl):
    """Its loss and a step along it; its samples, in which is no dropout."""
    config, key = config_of(pa_rl, policy=written_out.__name__.lower()), jax.random.PRNGKey(8)
    agent, batch = fresh(pa_rl, config), batch_of(pa_rl, 0)
    batch.actions[:4, 0] = [-1, 1, 0.999, -0.999]
    params, b = float64(agent.actor.params), float64(batch)
    loss = partial(written_out.loss, s=b.observations, a=b.actions, key=key)
    new, info = quick(partial(pa_rl.imitate, config=config))(agent, batch, key)
    close(info["actor_loss"], loss(params))
    same_step(new.actor, agent.actor, loss)
    averaged(new.target_actor_params, agent.target_actor_params, new.actor.params, 0.25)
    policy = agent.policy.clone(config=config_of(pa_rl, dropout_rate=0.5))
    found = quick(policy.sample)(agent.actor.params, batch.observations, key)
    close(found, written_out.sample(params, b.observations, key), atol=2e-3)
    assert (np.abs(found) < 1).mean() > 0.2


def test_a_transformer(pa_rl):
    """Its loss, and its tokens one after the other, from all their logits at once; the later ones
    change nothing."""
    config, key = config_of(pa_rl, policy="transformer"), jax.random.PRNGKey(8)
    agent, batch = fresh(pa_rl, config), batch_of(pa_rl, 0)
    params, s, policy = agent.actor.params, batch.observations, agent.policy
    logits = lambda a: log_softmax(np.float64(network(params, s, np.float32(a))))  # noqa: E731
    network, tokens = quick(policy.apply), np.abs(np.linspace(-1, 1, 7) - batch.actions[..., None])
    tokens = tokens.argmin(axis=-1)[..., None]
    found = quick(policy.loss)(params, s, batch.actions, key)
    close(found, -np.take_along_axis(logits(batch.actions), tokens, axis=2).sum() / B)
    drawn = np.zeros((B, A))
    for d in range(A):
        chances = jnp.float32(logits(drawn)[:, d])
        drawn[:, d] = jax.random.categorical(jax.random.fold_in(key, d), chances) / 3 - 1
    policy = policy.clone(config=config_of(pa_rl, policy="transformer", dropout_rate=0.5))
    close(quick(policy.sample)(params, s, key), drawn)
    assert abs(quick(policy.loss)(params, s, batch.actions, key) - found) > 1e-3


# --------------------------------------------------------------------- Search and critics' updates
def q_of(params, s, actions, c, outputs=False):
    """(N, M, B), or the outputs (N, M, B, Z)."""
    x = np.stack([np.concatenate([s, a], axis=1) for a in actions])
    members = range(len(params["params"]["Dense_0"]["bias"]))
    trees = [jax.tree.map(lambda leaf, i=i: leaf[i], params["params"]) for i in members]
    z = np.stack([dense(tree, "Dense_2", mlp(tree, x, swish)) for tree in trees])
    centres = np.linspace(c.value_min, c.value_max, 2 * c.value_bins + 1)[1::2]
    q = (np.exp(log_softmax(z)) * centres).sum(axis=-1) if c.value_bins else z[..., 0]
    return z if outputs else q


def v_of(params, s):
    return dense(params["params"], "Dense_2", mlp(params["params"], s))[:, 0]


def searched(agent, s, keys, c, selection, data=None):
    """optimise, with gradients by central differences."""
    params, s = float64(agent.critic.params), np.float64(s)
    value = lambda actions: q_of(params, s, actions, c).mean(axis=0)  # noqa: E731
    samples = float64(agent.target_actor_params), np.tile(s, (c.base_actions, 1)), keys[0]
    samples = Gaussian.sample(*samples).reshape(-1, B, A)
    q = value(samples)
    order = np.argsort(-q, axis=0)[: c.kept_actions]
    kept = np.take_along_axis(samples, order[..., None], axis=0)
    info = [q.mean(), np.take_along_axis(q, order, axis=0).mean()]
    plain = samples[: c.kept_actions]
    if data is not None:
        kept[-1], plain = data, np.broadcast_to(data, kept.shape)
    positions = [kept]
    for _ in range(c.ascent_steps):
        slopes = [value(positions[-1] + h) - value(positions[-1] - h) for h in 1e-5 * np.eye(A)]
        moved = positions[-1] + c.ascent_rate * np.stack(slopes, axis=-1) / 2e-5
        positions.append(np.clip(moved, -1, 1))
    q = np.stack([value(x) for x in positions])  # (T + 1, K, B)
    best, q = q.argmax(axis=0), q.max(axis=0)
    assert len(np.unique(best)) > 2 and (np.abs(positions[-1]) == 1).any()  # not just the last
    actions = np.take_along_axis(np.stack(positions), best[None, ..., None], axis=0)[0]
    info += [q.mean(), np.abs(actions - kept).mean()]
    chosen = jax.random.categorical(keys[1], jnp.float32(q), axis=0, shape=(c.num_actions, B))
    chosen = q.argmax(axis=0)[None] if selection == "argmax" else np.asarray(chosen)
    actions = actions if agent.critic.step > 0 else plain
    return np.take_along_axis(actions, chosen[..., None], axis=0), np.array(info)


def drawn(params, key, c):
    """The critics that a key draws, with replacement; or all."""
    members = np.array(jax.random.randint(key, (c.target_critics,), 0, c.num_critics))
    chosen = members if c.target_critics < c.num_critics else slice(None)
    return jax.tree.map(lambda x: x[chosen], float64(params))


def critic_of(p, agent, b, own, following, key, c):
    """The critic's loss, with every copy of a best action."""
    target_key, difference_key = jax.random.split(key)
    uniform_key, member_key = jax.random.split(difference_key)
    judges = drawn(agent.target_critic_params, target_key, c)
    next_v = q_of(judges, b.next_observations, following, c).min(axis=0).max(axis=0)
    if c.critic == "iql":
        next_v = v_of(float64(agent.value.params), b.next_observations)
    targets = (b.rewards + c.discount * b.masks * next_v)[:, None]
    outputs = q_of(p, b.observations, b.actions[None], c, outputs=True)[:, 0]  # (N, B, Z)
    loss = ((outputs - targets) ** 2).mean()
    if c.value_bins:  # cross-entropy, bin by bin
        edges, step = np.linspace(c.value_min, c.value_max, c.value_bins + 1, retstep=True)
        z = (edges - np.clip(targets, c.value_min, c.value_max)) / (c.value_std * step)
        below = np.vectorize(lambda x: 0.5 * math.erfc(-x / math.sqrt(2)))(z)
        mass = np.diff(below, axis=1) / (below[:, -1:] - below[:, :1])
        loss = -(mass * log_softmax(outputs)).sum(axis=-1).mean()
    uniform = np.float64(jax.random.uniform(uniform_key, (5, B, A), minval=-1, maxval=1))
    best = [np.resize(x, (5, B, A)) for x in (own, following)]
    actions = np.concatenate([b.actions[None], uniform, *best])
    q = q_of(drawn(p, member_key, c), b.observations, actions, c)
    q[:, 6:] = np.maximum(q[:, 6:], b.mc_returns)
    difference = (np.log(np.exp(q).mean(axis=1)) - q[:, 0]).mean()
    return loss + (c.critic == "cal_ql") * c.cql_alpha * difference


def value_of(p, agent, b, key, c):
    q = q_of(drawn(agent.target_critic_params, key, c), b.observations, b.actions[None], c)
    u = q[:, 0].min(axis=0) - v_of(p, b.observations)
    return np.where(u < 0, (1 - c.expectile) * u * u, c.expectile * u * u).mean()


BEST = dict(target_selection="argmax", target_critics=3)


@pytest.mark.parametrize("variant", [{}, BEST | BINS, dict(critic="iql", **BINS)])
def test_an_update_of_the_critic(variant, pa_rl):
    """pi* in both states, or V first; then Q, and the target's average. The policy is held."""
    config = config_of(pa_rl, **variant)
    agent, batch = fresh(pa_rl, config), batch_of(pa_rl, 0)
    returns = 5 * np.random.default_rng(1).normal(size=B)  # some bound Q, one is not known yet
    batch = batch.replace(mc_returns=np.float32([-1e9, *returns[1:]]))
    (new, info), b = quick(partial(pa_rl.update, config=config))(agent, batch), float64(batch)
    key, action_key, critic_key, value_key = jax.random.split(agent.key, 4)
    keys, states = jax.random.split(action_key), (b.observations, b.next_observations)
    settings = config, config.target_selection
    pi = [searched(agent, states[i], jax.random.split(keys[i]), *settings) for i in range(2)]
    if config.critic == "iql":
        loss = partial(value_of, agent=agent, b=b, key=value_key, c=config)
        close(info["value_loss"], loss(float64(agent.value.params)))
        same_step(new.value, agent.value, loss)
    else:
        close([info[name] for name in SEARCH], (pi[0][1] + pi[1][1]) / 2)
        assert equal(new.value, agent.value) and 0.02 < info["below_return"] < 0.98
    inputs = agent.replace(value=new.value), b, pi[0][0], pi[1][0], critic_key, config
    loss = lambda params: critic_of(params, *inputs)  # noqa: E731
    found = info["critic_loss"] + config.cql_alpha * info.get("difference", 0.0)
    close(found, loss(float64(agent.critic.params)))
    same_step(new.critic, agent.critic, loss)
    averaged(new.target_critic_params, agent.target_critic_params, new.critic.params, 0.2)
    assert equal((new.actor, new.target_actor_params), (agent.actor, agent.target_actor_params))
    assert equal(new.key, key)


def test_a_distillation(pa_rl):
    """The policy imitates pi*'s best, or the data while Q knows nothing. The critic is held."""
    config = config_of(pa_rl, critic="iql", distillation_selection="argmax")
    distil, batch = quick(partial(pa_rl.distil, config=config)), batch_of(pa_rl, 0)
    for learnt in (0, 1):
        agent = fresh(pa_rl, config, learnt)
        (new, info), (key, *keys) = distil(agent, batch), jax.random.split(agent.key, 4)
        inputs = batch.observations, keys[:2], config, "argmax", batch.actions
        (actions, *_), search = searched(agent, *inputs)
        assert equal(actions, batch.actions) != learnt
        close([info[name] for name in SEARCH], search)
        s, a = batch.observations, np.float64(actions)
        same_step(new.actor, agent.actor, partial(Gaussian.loss, s=s, a=a, key=None))
        held = [(x.critic, x.target_critic_params, x.value) for x in (new, agent)]
        assert equal(*held) and equal(new.key, key)


def test_who_acts(pa_rl, monkeypatch):
    """pi*: in training by acting_selection, in evaluation the best, with the states' own noise."""
    config, s = config_of(pa_rl, acting_selection="softmax"), batch_of(pa_rl, 0).observations
    spy = lambda _, s, keys, *rest: (np.append(keys, rest[1] == "argmax")[None, None], {})  # noqa: E731
    monkeypatch.setattr(pa_rl, "optimise", spy)
    key, other = jax.random.PRNGKey(0), s + np.float32(1e-6) * np.eye(B, OBS, -5, np.float32)
    assert equal(pa_rl.explore(None, s[0], key, config), np.append(jax.random.split(key), 0))
    x, y, z = (pa_rl.act(None, each, config)[0] for each in (s, s, other))
    assert equal(x, y) and not equal(x, z) and x[-1] == 1


def test_the_policys_learning_rate(pa_rl):
    counts = np.array([0, 4, 9, 50, 99, 100, 104, 109, 500])
    expected = 1e-3 * np.array([0.3, 1.5, 3, 3, 3, 0.1, 0.5, 1, 1])
    expected[:5] *= (1 + np.cos(np.pi * counts[:5] / 100)) / 2
    close(pa_rl.policy_rate(config_of(pa_rl))(counts), expected, atol=1e-9)


# ---------------------------------------------------------------------------------- Online rounds
class Envs:
    """Episodes of two environments: 25 steps to a termination, and 60 to a time limit."""

    def reset(self, seed):
        self.seeds, self.log, self.age, self.rng = seed, [], np.zeros(2), np.random.default_rng(0)
        self.now = self.rng.normal(size=(2, OBS))
        return self.now, {}

    def step(self, actions):
        before, self.age, rewards = self.now, self.age + 1, self.rng.normal(size=2)
        final, self.now = self.rng.normal(size=(2, 2, OBS))
        ends = self.age == [25, 60]
        self.now[~ends], self.age[ends] = final[~ends], 0
        terminated = ends & [True, False]
        self.log.append((before, actions, rewards, final, 1.0 - terminated, 1.0 * ends))
        return self.now, rewards, terminated, ends & [False, True], {"final_obs": final}


def note(kind, agent, batch, _):
    """An update that writes down what it is, and of which rows its batch is."""
    table, i = agent.target_critic_params
    row = jnp.stack([kind, (batch.rewards > 50).mean(), (batch.rewards == 0).mean()])
    return agent.replace(target_critic_params=(table.at[i].set(row), i + 1)), {"q": 1.0}


def test_after_an_episode_as_many_distillations_and_then_updates(pa_rl, monkeypatch):
    """As it had steps. A critic's batch has 4 of 16 rows of the dataset, a distillation's draws its
    60 rows and those of the ring alike; none that is not filled. The ring's 40 rows and their
    returns. Only before the first round the optimisers start anew."""
    config = config_of(pa_rl, num_seeds=2, discount=0.9, return_rule="infinite", seed=3,
                       offline_ratio=0.25)  # fmt: skip
    agents = jax.tree.map(lambda x: jnp.ones((2, *x.shape), x.dtype), template(pa_rl, config))
    agents = agents.replace(target_critic_params=(jnp.zeros((2, 160, 3)), jnp.zeros(2, int)))
    rows = batch_of(pa_rl, 0, 60).replace(mc_returns=np.zeros(60), rewards=np.full(60, 99.0))
    buffers = jax.tree.map(lambda x: jnp.zeros((2, 40, *x.shape[1:])), rows)
    kinds, keys, envs = [partial(note, kind) for kind in (1.0, 2.0)], [], Envs()
    explore = lambda agents, s, key, _: keys.append(key) or np.full((2, A), s[0, 0])  # noqa: E731
    for name, x in zip(("distil", "update", "explore_all"), [*kinds, explore], strict=True):
        monkeypatch.setattr(pa_rl, name, x)
    run = config, jax.device_put(rows), envs, SimpleNamespace(update=int, refresh=int)
    for first, last, count, other in ((0, 10, 100, 0), (10, 80, 1, 1)):
        agents, buffers, info = pa_rl.episodes_round(agents, buffers, run, first, last)
        states = agents.actor.opt_state, agents.critic.opt_state, agents.value.opt_state
        assert sorted({*map(int, map(jnp.max, jax.tree.leaves(states)))}) == sorted({count, other})
        agents = jax.tree.map(jnp.ones_like, agents).replace(
            target_critic_params=agents.target_critic_params
        )
    assert envs.seeds == [4 * 10**9 + 10, 5 * 10**9 + 10]
    for table, lengths in zip(agents.target_critic_params[0], ([10, 25, 25, 20], [10, 60, 10])):
        expected = [kind for n in lengths for kind in [1] * n + [2] * n]
        assert table[:, 0].tolist() == expected and not table[:, 2].any()
        assert (table[table[:, 0] == 2, 1] == 0.25).all()
        assert 0.5 < table[table[:, 0] == 1, 1].mean() < 0.75
    assert len(np.unique(np.concatenate(keys[10:]), axis=0)) == 70  # the seeds have one key here
    assert info["updates"] == 140 and list(info["q"]) == [2.0, 2.0]
    columns = [np.stack(x, axis=1) for x in zip(*envs.log, strict=True)]  # (2, 70, ...)
    columns[5][:, -1] = 1
    columns.append([pa_rl.monte_carlo_returns(*x, config) for x in zip(*columns[2::2], columns[5])])
    for found, rows in zip(vars(buffers).values(), columns, strict=True):
        close(found[:, np.arange(40, 80) % 40], np.array(rows)[:, -40:])


# --------------------------------------------------------------------------------- A known optimum
def test_a_diffusion_improves(pa_rl):
    """It clones uniform actions, which is what distillation does while Q knows nothing, and is then
    distilled: its samples come three times closer to the best action, s / 2."""
    config = config_of(
        pa_rl, policy="diffusion", policy_tau=1.0, pretrain_steps=0, ascent_rate=0.02,
        policy_learning_rate=3e-3, distillation_selection="argmax", num_critics=1, base_actions=4,
    )  # fmt: skip
    rng, key, gaps = np.random.default_rng(0), jax.random.PRNGKey(0), []
    s, a = np.float32(rng.choice([-1, 1], (999, 1))), np.float32(rng.uniform(-1, 1, (999, 1)))
    dataset, q = pa_rl.Batch(s, a, *[s[:, 0]] * 4), lambda params, s, a: params - (a - s / 2) ** 2
    agent = quick(partial(pa_rl.create_agent, config=config))(key, s[:1], a[:1])
    agent = agent.replace(critic=agent.critic.replace(apply_fn=q, params=np.zeros(1)))
    agents = jax.tree.map(lambda x: jnp.asarray(x)[None], agent)
    for learnt in (0, 1):
        agents = agents.replace(critic=agents.critic.replace(step=jnp.full(1, learnt)))
        agents, _ = pa_rl.update_steps(agents, dataset, config, pa_rl.distil, 400)
        params = jax.tree.map(lambda x: x[0], agents.target_actor_params)
        gaps.append(np.abs(quick(agent.policy.sample)(params, s, key) - s / 2).mean())
    assert gaps[0] > 0.5 and gaps[1] < gaps[0] / 3, gaps
