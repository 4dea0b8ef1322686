"""What the authors' numbers (test_golden.py) do not hold: values by hand, bounds of policies, keys,
rates, and the edges. The networks written out here know nothing of flax or distrax."""

import math
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.training.train_state import TrainState

OBS, A, B = 3, 2, 16  # observation, action and batch size


# --------------------------------------------------------------------------- Networks, written out
def dense(tree, name, x):
    return x @ tree[name]["kernel"] + tree[name]["bias"]


def hidden(tree, x, xp):
    for name in sorted(tree["MLP_0"]):
        x = xp.maximum(dense(tree["MLP_0"], name, x), 0)
    return x


def v_of(params, x, xp):
    tree = params["params"]
    return (hidden(tree, x, xp) @ tree["kernel"])[:, 0] + tree["bias"]


def q_of(params, observations, actions, xp):
    """(N, B)."""
    x, count = xp.concatenate([observations, actions], axis=1), len(params["params"]["bias"])
    members = [jax.tree.map(lambda leaf, i=i: leaf[i], params) for i in range(count)]
    return xp.stack([v_of(member, x, xp) for member in members])


def gaussian_log_prob(x, mean, std, xp):
    """(B, A) -> (B,)."""
    return (-0.5 * ((x - mean) / std) ** 2 - xp.log(std) - 0.5 * math.log(2 * math.pi)).sum(axis=1)


def gaussian(params, observations, xp):
    """Mean (B, A) and standard deviation (A,) of IQL's policy."""
    tree = params["params"]
    mean = xp.tanh(dense(tree, "Dense_0", hidden(tree, observations, xp)))
    return mean, xp.exp(xp.clip(tree["log_std"], -5.0, 2.0))


def squashed_sample(params, observations, noise, xp):
    """SAC's action tanh(mean + std * noise) (B, A) and its log-probability (B,)."""
    tree = params["params"]
    features = hidden(tree, observations, xp)
    mean = dense(tree, "Dense_0", features)
    std = xp.exp(xp.clip(dense(tree, "Dense_1", features), -10.0, 2.0))
    u = mean + std * noise
    correction = 2 * (math.log(2) - u - xp.logaddexp(0.0, -2 * u)).sum(axis=1)  # log(1 - tanh(u)^2)
    return xp.tanh(u), gaussian_log_prob(u, mean, std, xp) - correction


def bc_actor(p, s, b, noise, c, xp):
    return -gaussian_log_prob(b.actions, *gaussian(p, b.observations, xp), xp).mean()


CONFIG = {  # learning rates are large, so that an old V in place of the new one shows
    "iql": dict(max_weight=5.0, learning_rate=3e-2, tau=0.2, offline_steps=3, online_steps=3),
    "sac": dict(learning_rate=1e-2, tau=0.2),
    "bc": dict(learning_rate=1e-2),
}


# ----------------------------------------------------------------------------------------- Helpers
@pytest.fixture(params=CONFIG)
def script(request):
    return request.getfixturevalue(request.param)


def config_of(script, **changes):
    changes = CONFIG.get(script.__name__, {}) | changes
    return script.Config(hidden_dims=(16, 8), batch_size=B, **changes)


def batch_of(script, seed, size=B):
    rng = np.random.default_rng(seed)
    vectors = [rng.normal(size=(size, OBS)), rng.uniform(-1, 1, (size, A))]
    rest = rng.normal(size=size), rng.normal(size=(size, OBS)), rng.random(size) < 0.7
    return script.Batch(*map(np.float32, [*vectors, *rest, np.zeros(size)]))


@lru_cache
def template(script, config):
    """An agent of zeros; cached, because a new optimiser object would compile everything again."""
    inputs = jax.random.PRNGKey(0), jnp.zeros((1, OBS)), jnp.zeros((1, A))
    shapes = jax.eval_shape(partial(script.create_agent, config=config), *inputs)
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)


@lru_cache
def compiled(script, name, config):
    return jax.jit(partial(getattr(script, name), config=config))


def fresh(script, config, seed=0):
    """An agent with random parameters everywhere: no bias is 0, the target critic is not Q."""
    rng, agent = np.random.default_rng(seed), template(script, config)
    draw = partial(jax.tree.map, lambda x: np.float32(0.4 * rng.normal(size=x.shape)))
    for name, x in vars(agent).items():
        if isinstance(x, TrainState):
            agent = agent.replace(**{name: x.replace(params=draw(x.params))})
        elif name.endswith("_params"):
            agent = agent.replace(**{name: draw(x)})
    return agent.replace(key=jax.random.PRNGKey(seed))


def float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def parameters(agent):
    """{name: parameters in float64}, the target critic's as "target"."""
    trees = {name: x.params for name, x in vars(agent).items() if isinstance(x, TrainState)}
    return float64(trees | {"target": getattr(agent, "target_critic_params", {})})


# --------------------------------------------------------------------------------- Keys and rates
def test_every_draw_has_a_key_of_its_own(script, monkeypatch):
    """The keys that losses get, what is left for the next update, and the one before all differ."""
    agent, keys, step = fresh(script, config_of(script)), [], script.gradient_step

    def spy(state, loss, *inputs):
        keys.extend(x for x in inputs if getattr(x, "dtype", None) == np.uint32)
        return step(state, loss, *inputs)

    monkeypatch.setattr(script, "gradient_step", spy)
    new, _ = script.update(agent, batch_of(script, 0), config_of(script))
    keys += [agent.key, new.key]
    assert len(np.unique(np.stack(keys), axis=0)) == len(keys) >= 3


@pytest.mark.parametrize(("decay", "init_from"), [(True, ""), (False, ""), (True, "run")])
def test_actor_learning_rate(iql, decay, init_from):
    """Cosine to 0 over the offline updates, another over the online ones; or constant, as after
    --init-from: the count of updates is another run's."""
    settings = dict(offline_steps=100, online_steps=50, learning_rate=1.0, decay_actor_lr=decay)
    settings["init_from"] = init_from
    tx = template(iql, config_of(iql, **settings)).actor.tx
    step = lambda state, _: tx.update(jnp.ones(()), state)[::-1]  # noqa: E731
    steps = -jax.lax.scan(step, tx.init(jnp.ones(())), length=200)[1]  # Adam's, of a constant slope
    falls = decay and not init_from
    expected = [1, 0.5, 2.4672e-4, 1, 0.5, 0] if falls else [1] * 6
    found = steps[jnp.array([0, 50, 99, 100, 125, 199])]
    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-7)


# ------------------------------------------------------------------------- By hand, and the edges
def constant(tree, value):
    """Parameters of a scalar network whose output is `value` everywhere."""
    tree = jax.tree.map(np.zeros_like, tree)
    tree["params"]["bias"] += np.float32(value)
    return tree


def test_expectile_and_weight_by_hand(iql):
    """V = 1 and critics (1 + u, 2 + u), so that their minimum is 1 + u: |0.9 - 1(u < 0)| u^2, and
    weights exp(beta * u), 5 where that is larger."""
    config = config_of(iql, expectile=0.9, beta=0.5)
    agent, batch = fresh(iql, config), batch_of(iql, 0)
    likelihood = -bc_actor(parameters(agent)["actor"], None, float64(batch), None, config, np)
    value = agent.value.replace(params=constant(agent.value.params, 1.0))
    for u, loss, weight in ((2, 3.6, math.e), (-2, 0.4, 1 / math.e), (99, 0.9 * 99**2, 5)):
        target = constant(agent.target_critic_params, [1 + u, 2 + u])
        agent = agent.replace(target_critic_params=target, value=value)
        inputs = agent, batch, agent.key
        found, info = compiled(iql, "value_loss", config)(value.params, *inputs)
        np.testing.assert_allclose([found, info["v"]], [loss, 1], rtol=1e-6)
        found, info = compiled(iql, "actor_loss", config)(agent.actor.params, *inputs)
        expected = weight, u, -weight * likelihood
        np.testing.assert_allclose([info["weight"], info["advantage"], found], expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["iql", "bc"])
def test_gaussian_policy_drops_out_in_training_and_stays_in_its_bounds(request, name):
    """log_std is clipped to [-5, 2], the mean is in [-1, 1], so are sampled actions."""
    script, keys = request.getfixturevalue(name), jax.random.split(jax.random.PRNGKey(0), 50)
    config = config_of(script, dropout_rate=0.5)
    agent, batch = fresh(script, config), batch_of(script, 0)
    loss = partial(compiled(script, "actor_loss", config), agent.actor.params, agent, batch)
    assert len({float(loss(key)[0]) for key in keys[:3]}) == 3
    mean, _ = gaussian(parameters(agent)["actor"], batch.observations, np)
    np.testing.assert_allclose(script.act(agent, batch.observations, config), mean, atol=1e-5)
    for log_std, expected in ((7.0, math.exp(2)), (0.5, math.exp(0.5)), (-9.0, math.exp(-5))):
        agent.actor.params["params"]["log_std"][:] = log_std
        policy = agent.actor.apply_fn(agent.actor.params, 100 * batch.observations)
        np.testing.assert_allclose(policy.stddev(), expected, rtol=1e-5)
        assert np.abs(policy.mean()).max() <= 1.0
        if name == "iql":
            sample = jax.vmap(compiled(script, "explore", config), in_axes=(None, None, 0))
            actions = sample(agent, batch.observations[0], keys)  # (50, A)
            assert np.abs(actions).max() <= 1.0 and np.std(actions, axis=0).min() > 1e-3


def test_sac_actions(sac):
    """Uniform before the first update, the policy's after it; evaluated is tanh(mean)."""
    config, keys = config_of(sac), jax.random.split(jax.random.PRNGKey(0), 4000)
    agent, observation = fresh(sac, config), np.ones((1, OBS), np.float32)
    median, _ = squashed_sample(parameters(agent)["actor"], observation, 0.0, np)  # (1, A)
    upper, _ = squashed_sample(parameters(agent)["actor"], observation, 1.0, np)
    np.testing.assert_allclose(sac.act(agent, observation, config), median, rtol=1e-5)
    sample = jax.vmap(compiled(sac, "explore", config), in_axes=(None, None, 0))
    for step, expected in ((0, [[0.0] * A, [0.6827] * A]), (1, [median[0], upper[0]])):
        moved = agent.replace(critic=agent.critic.replace(step=np.int32(step)))
        found = np.quantile(sample(moved, observation[0], keys), [0.5, 0.8413], axis=0)
        np.testing.assert_allclose(found, expected, atol=0.06)


def test_percent_bc_keeps_the_best_trajectories(bc):
    """Returns 3, 5, 2, 8 of episodes of 3, 1, 4 and 2 steps."""
    rewards, numbers = np.float32([1, 1, 1, 5, 0.5, 0.5, 0.5, 0.5, 4, 4]), np.arange(10)
    ends = np.float32([0, 0, 1, 1, 0, 0, 0, 1, 0, 1])
    rows = bc.Batch(numbers, numbers, rewards, numbers, numbers, ends)
    for share, kept in ((0.5, [3, 8, 9]), (0.0, [8, 9]), (0.75, [0, 1, 2, 3, 8, 9]), (1, numbers)):
        np.testing.assert_array_equal(bc.best_trajectories(rows, share).observations, kept)


@pytest.mark.parametrize("saturated", [0, 1])
def test_extreme_inputs_stay_finite(script, saturated):
    """Rewards of 1e6, observations of 1e3, a batch of one, actions at the bounds, a saturated
    policy: finite losses and finite parameters, also after updates on what came out."""
    config = config_of(script)
    cases = [(B, "rewards", 1e6), (B, "observations", 1e3), (B, "actions", 1e9), (1, "masks", 1)]
    for size, field, factor in [*cases, (1, "rewards", -1e6)]:
        agent, batch = fresh(script, config), batch_of(script, 3, size)
        agent.actor.params["params"]["Dense_0"]["bias"] += saturated * np.float32([60, -60])
        batch = batch.replace(**{field: np.float32(factor) * getattr(batch, field)})
        batch = batch.replace(actions=np.clip(batch.actions, -1, 1))
        for _ in range(2):
            agent, info = compiled(script, "update", config)(agent, batch)
            assert all(np.isfinite(x).all() for x in jax.tree.leaves((info, parameters(agent))))
