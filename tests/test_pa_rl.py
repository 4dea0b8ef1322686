"""PA-RL: the three policies, the search for better actions and whole updates against NumPy; the
order of an online round; a diffusion that improves."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_losses
from test_losses import OBS, A, B, batch_of, dense, float64, gaussian_log_prob, template
from tqdm import tqdm

SIZES = dict(
    policy="gaussian", hidden_dims=(16, 8), critic_hidden_dims=(16, 8), policy_width=16,
    policy_blocks=1, attention_heads=2, action_bins=7, dropout_rate=0.0, batch_size=B, tau=0.2,
    num_critics=3, base_actions=6, kept_actions=4, ascent_steps=3, ascent_rate=5.0, num_actions=5,
    cql_alpha=2.0, learning_rate=1e-2, cloning_learning_rate=3e-3, policy_learning_rate=1e-3,
    policy_warmup=10, pretrain_steps=100, cloning_schedule="cosine", policy_tau=0.25,
)  # fmt: skip
BINS = dict(value_bins=21, value_min=-3.0, value_max=2.0)
BEST = dict(target_selection="argmax", target_critics=3)
SEARCH = ("base_q", "kept_q", "optimised_q", "moved")
close = partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)
equal = lambda x, y: jax.tree.all(jax.tree.map(np.array_equal, x, y))  # noqa: E731
config_of = lambda script, **changes: script.Config(**SIZES | changes)  # noqa: E731
averaged = lambda tau, *xs: jax.tree.map(lambda x, y, z: close(x + tau * (y - x), z), *xs)  # noqa: E731
quick = partial(jax.jit, compiler_options={  # to compile: these run a few times only
    "xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True})  # fmt: skip


def fresh(script, config, learnt=1):
    """test_losses.fresh of smaller policies and a bumpier Q, which has learnt or has not."""
    agent = test_losses.fresh(script, config)
    smaller = lambda x: np.float32(x * (2 / math.sqrt(x.shape[-2]) if x.ndim > 1 else 1))  # noqa: E731
    for name, scale in (("actor", smaller), ("critic", lambda x: 6 * x)):
        part, target = getattr(agent, name), f"target_{name}_params"
        new, old = (jax.tree.map(scale, x) for x in (part.params, getattr(agent, target)))
        agent = agent.replace(**{name: part.replace(params=new), target: old})
    return agent.replace(critic=agent.critic.replace(step=np.int32(learnt)))


def same_step(new, old, loss):
    """Along a gradient that is, in random directions, the slope of `loss`: nothing else has one."""
    grads, params, rng = float64(new.opt_state[0].mu), float64(old.params), np.random.default_rng(9)
    for _ in range(3):
        way = jax.tree.map(lambda x: rng.normal(size=x.shape), params)
        add = lambda h, way=way: loss(jax.tree.map(lambda x, y: x + h * y, params, way))  # noqa: E731
        slope = sum(jax.tree.leaves(jax.tree.map(np.vdot, grads, way)))  # of Adam's memory
        close(slope, 0.1 * (add(1e-6) - add(-1e-6)) / 2e-6, rtol=2e-3)
    assert new.step == old.step + 1 and not equal(new.params, old.params)


v_of = lambda p, s: dense(p["params"], "Dense_2", mlp(p["params"], s))[:, 0]  # noqa: E731
normal = lambda key, *shape: np.float64(jax.random.normal(key, shape or (B, A)))  # noqa: E731
log_softmax = lambda x: x - np.logaddexp.reduce(x, axis=-1, keepdims=True)  # noqa: E731


def mlp(tree, x):
    for layer in range(2):
        x, norm = dense(tree, f"Dense_{layer}", x), tree.get(f"LayerNorm_{layer}")
        if norm:
            x = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-6)
            x = x * norm["scale"] + norm["bias"]
        x = x / (1 + np.exp(-x)) if norm else np.maximum(x, 0)
    return x


def gaussian(p, s):
    mean, log_std = (dense(p["params"], f"Dense_{i}", mlp(p["params"], s)) for i in (2, 3))
    return mean, np.exp(np.clip(log_std, -10, 2))


def gaussian_loss(p, s, a):
    a = np.clip(a, -0.99, 0.99)
    log_prob = gaussian_log_prob(np.arctanh(a), *gaussian(p, s), np)
    return -(log_prob - np.log(1 - a**2).sum(axis=1)).mean()


def policy_of(script, name):  # its network, actions, a key, the loss, samples
    agent, batch = fresh(script, config_of(script, policy=name)), batch_of(script, 0)
    inputs = agent.actor.params, batch.observations, batch.actions, jax.random.PRNGKey(8)
    dropping = agent.policy.clone(config=config_of(script, policy=name, dropout_rate=0.5))
    found = quick(agent.policy.loss)(*inputs), quick(dropping.sample)(*inputs[:2], inputs[3])
    programs = {str(jax.make_jaxpr(x.loss)(*inputs)) for x in (agent.policy, dropping)}
    assert len(programs) == 2  # dropout is in the loss, and not in the samples
    network = partial(quick(agent.policy.apply), *inputs[:2])
    return lambda *xs: np.float64(network(*map(np.float32, xs))), *inputs[2:], *found


def test_a_diffusion(pa_rl):
    network, a, key, loss, samples = policy_of(pa_rl, "diffusion")
    level = np.cos((np.arange(6) / 5 + 0.008) / 1.008 * math.pi / 2) ** 2
    alpha = np.maximum(level[1:] / level[:-1], 0.001)
    step_key, noise_key, _ = jax.random.split(key, 3)
    step, noise = np.array(jax.random.randint(step_key, (B,), 0, 5)), normal(noise_key)
    signal = np.cumprod(alpha)[step][:, None]
    guess = network(np.sqrt(signal) * a + np.sqrt(1 - signal) * noise, step)
    close(loss, ((guess - noise) ** 2).sum() / B)
    start_key, noise_key = jax.random.split(key)
    x = normal(start_key)
    for t in reversed(range(5)):
        noise = network(x, np.full(B, t)) / np.sqrt(1 - np.cumprod(alpha)[t])
        new = (t > 0) * np.sqrt(1 - alpha[t]) * normal(jax.random.fold_in(noise_key, t))
        x = np.clip((x - (1 - alpha[t]) * noise) / np.sqrt(alpha[t]) + new, -1, 1)
    close(samples, x, atol=2e-3)


def test_a_transformer(pa_rl):
    network, a, key, loss, samples = policy_of(pa_rl, "transformer")
    tokens = np.abs(np.linspace(-1, 1, 7) - a[..., None]).argmin(axis=-1)[..., None]
    close(loss, -np.take_along_axis(log_softmax(network(a)), tokens, axis=2).sum() / B)
    x = np.zeros((B, A))
    for d in range(A):  # from the logits of all, in which later ones are 0
        token_key, logits = jax.random.fold_in(key, d), jnp.float32(network(x)[:, d])
        x[:, d] = jax.random.categorical(token_key, logits) / 3 - 1
    close(samples, x)


def outputs_of(params, s, actions):
    """(N, M, B, Z), of M actions (M, B, A)."""
    x, tree = np.stack([np.concatenate([s, a], axis=1) for a in actions]), params["params"]
    members = [jax.tree.map(lambda z, i=i: z[i], tree) for i in range(len(tree["Dense_2"]["bias"]))]
    return np.stack([dense(member, "Dense_2", mlp(member, x)) for member in members])


def q_of(params, s, actions, c):
    outputs, edges = outputs_of(params, s, actions), np.linspace(-3, 2, c.value_bins + 1)
    mass = np.exp(log_softmax(outputs))
    return (mass * (edges[1:] + edges[:-1]) / 2).sum(axis=-1) if c.value_bins else outputs[..., 0]


def searched(agent, s, keys, c, selection, data=None):
    """optimise, with gradients by central differences."""
    params, s, take = float64(agent.critic.params), np.float64(s), np.take_along_axis
    value = lambda actions: q_of(params, s, actions, c).mean(axis=0)  # noqa: E731
    mean, std = gaussian(float64(agent.target_actor_params), np.tile(s, (6, 1)))
    samples = np.tanh(mean + std * normal(keys[0], 6 * B, A)).reshape(6, B, A)
    q = value(samples)
    info = [q.mean(), np.sort(q, axis=0)[-4:].mean()]
    kept, plain = take(samples, np.argsort(-q, axis=0)[:4, :, None], axis=0), samples[:4]
    if data is not None:
        kept[-1], plain = data, np.broadcast_to(data, kept.shape)
    positions = [kept]
    for _ in range(3):
        slopes = [value(positions[-1] + h) - value(positions[-1] - h) for h in 1e-5 * np.eye(A)]
        positions.append(np.clip(positions[-1] + 5 / 2e-5 * np.stack(slopes, axis=-1), -1, 1))
    q = np.stack([value(x) for x in positions])  # (T + 1, K, B)
    best, q = q.argmax(axis=0), q.max(axis=0)
    assert len(np.unique(best)) > 2 and (np.abs(positions[-1]) == 1).any()  # not just the last
    actions = take(np.stack(positions), best[None, ..., None], axis=0)[0]
    info += [q.mean(), np.abs(actions - kept).mean()]
    chosen = np.array(jax.random.categorical(keys[1], jnp.float32(q), axis=0, shape=(5, B)))
    chosen = (q.argmax(axis=0)[None] if selection == "argmax" else chosen)[..., None]
    return take(actions if agent.critic.step > 0 else plain, chosen, axis=0), np.array(info)


def drawn(params, key, c):
    members = jax.random.randint(key, (2,), 0, 3) if c.target_critics == 2 else range(3)
    return jax.tree.map(lambda x: x[np.array(members)], float64(params))  # with replacement; or all


def critic_of(p, agent, b, own, following, key, c):
    target_key, difference_key = jax.random.split(key)
    uniform_key, member_key = jax.random.split(difference_key)
    judges, s = drawn(agent.target_critic_params, target_key, c), b.next_observations
    next_v = q_of(judges, s, following, c).min(axis=0).max(axis=0)
    next_v = v_of(float64(agent.value.params), s) if c.critic == "iql" else next_v
    targets = (b.rewards + c.discount * b.masks * next_v)[:, None]
    outputs = outputs_of(p, b.observations, b.actions[None])[:, 0]  # (N, B, Z)
    loss = ((outputs - targets) ** 2).mean()
    if c.value_bins:  # cross-entropy, bin by bin
        z = (np.linspace(-3, 2, 22) - np.clip(targets, -3, 2)) / (c.value_std * 5 / 21)
        below = np.vectorize(lambda x: 0.5 * math.erfc(-x / math.sqrt(2)))(z)
        mass = np.diff(below, axis=1) / (below[:, -1:] - below[:, :1])
        loss = -(mass * log_softmax(outputs)).sum(axis=-1).mean()
    uniform = jax.random.uniform(uniform_key, (5, B, A), minval=-1, maxval=1)
    actions = [np.resize(x, (5, B, A)) for x in (np.float64(uniform), own, following)]
    actions = np.concatenate([b.actions[None], *actions])
    q = q_of(drawn(p, member_key, c), b.observations, actions, c)
    q[:, 6:] = np.maximum(q[:, 6:], b.mc_returns)
    difference = (np.log(np.exp(q).mean(axis=1)) - q[:, 0]).mean()
    return loss + (c.critic == "cal_ql") * c.cql_alpha * difference


def value_of(p, agent, b, key, c):
    q = q_of(drawn(agent.target_critic_params, key, c), b.observations, b.actions[None], c)
    u = q[:, 0].min(axis=0) - v_of(p, b.observations)
    return np.where(u < 0, (1 - c.expectile) * u * u, c.expectile * u * u).mean()


@pytest.mark.parametrize("variant", [{}, BEST | BINS, dict(critic="iql", **BINS)])
def test_an_update_of_the_critic(variant, pa_rl):
    """pi* in both states, or V first; then Q, and the target's average. The policy is held."""
    config = config_of(pa_rl, **variant)
    agent, batch = fresh(pa_rl, config), batch_of(pa_rl, 0)
    returns = 9 * np.random.default_rng(1).normal(size=B)  # some bound Q, one is not known yet
    batch = batch.replace(mc_returns=np.float32([-1e9, *returns[1:]]))
    (new, info), b = quick(partial(pa_rl.update, config=config))(agent, batch), float64(batch)
    key, action_key, critic_key, value_key = jax.random.split(agent.key, 4)
    keys, selection = map(jax.random.split, jax.random.split(action_key)), config.target_selection
    own = searched(agent, b.observations, next(keys), config, selection)
    following = searched(agent, b.next_observations, next(keys), config, selection)
    if config.critic == "iql":
        loss = partial(value_of, agent=agent, b=b, key=value_key, c=config)
        close(info["value_loss"], loss(float64(agent.value.params)))
        same_step(new.value, agent.value, loss)
    else:
        close([info[name] for name in SEARCH], (own[1] + following[1]) / 2)
        assert equal(new.value, agent.value) and 0.02 < info["below_return"] < 0.98
    inputs = agent.replace(value=new.value), b, own[0], following[0], critic_key, config
    loss = lambda params: critic_of(params, *inputs)  # noqa: E731
    found = info["critic_loss"] + config.cql_alpha * info.get("difference", 0.0)
    close(found, loss(float64(agent.critic.params)))
    same_step(new.critic, agent.critic, loss)
    averaged(0.2, agent.target_critic_params, new.critic.params, new.target_critic_params)
    assert equal(new.key, key) and equal(new.actor, agent.actor)
    assert equal(new.target_actor_params, agent.target_actor_params)


@pytest.mark.parametrize("learnt", [0, 1])
def test_a_distillation(learnt, pa_rl):
    """The policy imitates pi*'s best, or the data while Q knows nothing. The critic is held."""
    config = config_of(pa_rl, critic="iql", distillation_selection="argmax")
    agent, batch = fresh(pa_rl, config, learnt), batch_of(pa_rl, 0)
    new, info = quick(partial(pa_rl.distil, config=config))(agent, batch)
    (key, *keys), s = jax.random.split(agent.key, 4), batch.observations
    (a,), search = searched(agent, s, keys[:2], config, "argmax", batch.actions)
    close([info[name] for name in SEARCH], search)
    assert equal(a, batch.actions) != learnt and equal(new.key, key)
    loss = partial(gaussian_loss, s=s, a=np.float64(a))
    close(info["actor_loss"], loss(float64(agent.actor.params)))
    same_step(new.actor, agent.actor, loss)
    averaged(0.25, agent.target_actor_params, new.actor.params, new.target_actor_params)
    assert equal(*((x.critic, x.target_critic_params, x.value) for x in (new, agent)))


def test_who_acts(pa_rl, monkeypatch):
    """pi*: in training by acting_selection, in evaluation the best, with the states' own noise."""
    config, s = config_of(pa_rl, acting_selection="softmax"), jnp.ones((3, 2))
    spy = lambda _, s, keys, *rest: (np.append(keys, rest[1] == "argmax")[None, None], {})  # noqa: E731
    monkeypatch.setattr(pa_rl, "optimise", spy)
    keys = jax.random.split(key := jax.random.PRNGKey(0))
    assert equal(pa_rl.explore(None, s[0], key, config), np.append(keys, 0))
    x, y, z = (pa_rl.act(None, s * by, config)[0] for by in (1, 1, 1.0001))
    assert equal(x, y) and not equal(x, z) and x[-1] == 1


def test_the_policys_learning_rate(pa_rl):
    counts = np.array([0, 4, 9, 50, 99, 100, 104, 109, 500])
    expected = 1e-3 * np.array([0.3, 1.5, 3, 3, 3, 0.1, 0.5, 1, 1])
    expected[:5] *= (1 + np.cos(np.pi * counts[:5] / 100)) / 2
    close(pa_rl.policy_rate(config_of(pa_rl))(counts), expected, atol=1e-9)


class Envs:  # two: one terminates every 25 steps, one is cut off every 60
    def reset(self, seed):
        self.seeds, self.log, self.age, self.rng = seed, [], np.zeros(2), np.random.default_rng(0)
        self.now = self.rng.normal(size=(2, OBS))
        return self.now, {}

    def step(self, actions):
        before, self.age, rewards = self.now, self.age + 1, self.rng.normal(size=2)
        final, self.now = self.rng.normal(size=(2, 2, OBS))
        ends = self.age == [25, 60]
        self.now[~ends], self.age[ends], terminated = final[~ends], 0, ends & [True, False]
        self.log.append((before, actions, rewards, final, 1.0 - terminated, 1.0 * ends))
        return self.now, rewards, terminated, ends & [False, True], {"final_obs": final}


def note(kind, agent, batch, _):  # what an update is, and of which rows its batch is
    table, i = agent.target_critic_params
    row = jnp.stack([kind, (batch.rewards == 99).mean(), (batch.rewards == 0).mean()])
    return agent.replace(target_critic_params=(table.at[i].set(row), i + 1)), {"q": 1.0}


def test_after_an_episode_as_many_distillations_and_then_updates(pa_rl, monkeypatch):
    """A critic's batch has 4 of 16 rows of the dataset, a distillation's draws its 60 and the
    ring's 40 alike, none that is not filled. At first the optimisers start anew."""
    changes = dict(num_seeds=2, discount=0.9, return_rule="infinite", seed=3, offline_ratio=0.25)
    config, keys, envs, s = config_of(pa_rl, **changes), [], Envs(), np.ones((60, OBS))
    dataset = jax.device_put(pa_rl.Batch(s, s[:, :A], 99 * s[:, 0], s, *[s[:, 0]] * 3))
    buffers = jax.tree.map(lambda x: np.zeros((2, 40, *x.shape[1:])), dataset)
    agents = jax.tree.map(lambda x: np.ones((2, *x.shape), x.dtype), template(pa_rl, config))
    agents = agents.replace(target_critic_params=(np.zeros((2, 160, 3)), np.zeros(2, int)))
    explore = lambda agents, s, key, _: keys.append(key) or np.full((2, A), s[0, 0])  # noqa: E731
    monkeypatch.setattr(pa_rl, "distil", partial(note, 1.0))
    monkeypatch.setattr(pa_rl, "update", partial(note, 2.0))
    monkeypatch.setattr(pa_rl, "explore_all", explore)
    for first, last in ((0, 10), (10, 80)):
        agents = agents.replace(critic=jax.tree.map(np.ones_like, agents.critic))
        inputs = agents, buffers, (config, dataset, envs, tqdm(disable=True)), first, last
        agents, buffers, info = pa_rl.episodes_round(*inputs)
        moments = {int(x.max()) for x in jax.tree.leaves(agents.critic.opt_state)}
        assert moments == {int(first > 0)} and equal(agents.actor.opt_state[1].count, [100, 100])
    for i, lengths in enumerate(([10, 25, 25, 20], [10, 60, 10])):
        kinds, old, unfilled = np.array(agents.target_critic_params[0][i].T)
        assert kinds.tolist() == [kind for n in lengths for kind in [1] * n + [2] * n]
        assert (old[kinds == 2] == 0.25).all() and 0.5 < old[kinds == 1].mean() < 0.75
        assert not unfilled.any()
    assert len(np.unique(np.concatenate(keys[10:]), axis=0)) == 70  # the seeds have one key here
    assert envs.seeds == [4 * 10**9 + 10, 5 * 10**9 + 10] and list(info["q"]) == [2.0, 2.0]
    rows = [np.stack(x, axis=1) for x in zip(*envs.log, strict=True)]  # (2, 70, ...)
    rows[5][:, -1] = 1  # the round's end
    returns = [pa_rl.monte_carlo_returns(*(rows[j][i] for j in (2, 4, 5)), config) for i in (0, 1)]
    for found, expected in zip(vars(buffers).values(), [*rows, np.array(returns)], strict=True):
        close(found[:, np.arange(40, 80) % 40], expected[:, -40:])


def test_a_diffusion_improves(pa_rl):
    """It clones uniform actions, which is what distillation does while Q knows nothing, and is then
    distilled: its samples come three times closer to the best action, s / 2."""
    config = config_of(pa_rl, policy="diffusion", policy_tau=1.0, policy_learning_rate=3e-3,
                       pretrain_steps=0, ascent_rate=0.02, distillation_selection="argmax",
                       num_critics=1, base_actions=4)  # fmt: skip
    train = partial(pa_rl.update_steps.__wrapped__, update=pa_rl.distil, num_steps=300)
    train, rng = quick(partial(train, config=config)), np.random.default_rng(0)
    s, a = np.float32(rng.choice([-1, 1], (999, 1))), np.float32(rng.uniform(-1, 1, (999, 1)))
    dataset, key, gaps = pa_rl.Batch(s, a, *[s[:, 0]] * 4), jax.random.PRNGKey(0), []
    agent = quick(partial(pa_rl.create_agent, config=config))(key, s[:1], a[:1])
    q = lambda params, s, a: params - (a - s / 2) ** 2  # noqa: E731
    agent = agent.replace(critic=agent.critic.replace(apply_fn=q, params=np.zeros(1)))
    agents, sample = jax.tree.map(lambda x: np.array(x)[None], agent), quick(agent.policy.sample)
    for learnt in (0, 1):
        agents = agents.replace(critic=agents.critic.replace(step=np.full(1, learnt)))
        agents, _ = train(agents, dataset)
        params = jax.tree.map(lambda x: np.array(x)[0], agents.target_actor_params)
        gaps.append(np.abs(sample(params, s, key) - s / 2).mean())
    assert gaps[0] > 0.5 and gaps[1] < gaps[0] / 3, gaps
