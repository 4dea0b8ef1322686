"""The CQL family: every loss against NumPy, whole updates, a bandit with a known answer, the
Monte-Carlo returns of dataset and buffer, and what an online batch is made of."""

import dataclasses
import math
from functools import partial

import gymnasium as gym
import jax
import numpy as np
import pytest
from test_learning import bandit_rows, best_action, first, one_agent
from test_losses import (
    OBS,
    STATE_NETWORKS,
    A,
    B,
    assert_same,
    batch_of,
    compiled,
    dense,
    float64,
    fresh,
    gaussian_log_prob,
    hidden,
    parameters,
    q_of,
    replay,
)
from test_run import Killed, assert_same_run, die, go, load, on_call, reused_agents

NETWORKS = ("actor", "critic", "temperature", "multiplier")
STATE_NETWORKS |= {"cql": NETWORKS, "cal_ql": NETWORKS}
SHAPES = dict(hidden_dims=(16, 8), critic_hidden_dims=(16, 8), batch_size=B, num_actions=3)
VARIANTS = {
    "fixed weight": dict(cql_alpha=2.0),
    "lagrange, best of 4 next actions": dict(
        cql_alpha=2.0, lagrange=True, target_gap=0.7, backup_actions=4),
    "without importance sampling, clipped": dict(
        cql_alpha=0.5, importance_sampling=False, difference_min=0.5, difference_max=2.0),
}  # fmt: skip


@pytest.fixture(params=["cql", "cal_ql"])
def script(request):
    return request.getfixturevalue(request.param)


def batch_with_returns(script, seed):
    """Returns around the Q-values: some bound them, some do not; one is not known yet."""
    returns = np.random.default_rng(seed + 100).normal(size=B).astype(np.float32)
    returns[3] = -np.inf
    return batch_of(script, seed).replace(mc_returns=returns)


# ------------------------------------------------------------------------------ Losses, written out


def noise_of(script, config, key, count):
    """The normal noise (M, B, A) behind policy_actions at this key: read from a policy of mean 0
    and std 0.1, where tanh loses no digits."""
    state = fresh(script, config)
    params = jax.tree.map(np.zeros_like, state.actor.params)
    params["params"]["log_std_shift"] = np.float32(math.log(0.1))
    state = state.replace(actor=state.actor.replace(params=params))
    actions, _ = script.policy_actions(state, np.zeros((B, OBS), np.float32), key, count)
    return np.arctanh(np.asarray(actions, np.float64)) / 0.1


def squashed(params, observations, noise, xp):
    """tanh(mean + std * noise) (B, A) and its log-density (B,)."""
    tree = params["params"]
    features = hidden(tree, observations, xp)
    mean, raw = dense(tree, "Dense_0", features), dense(tree, "Dense_1", features)
    std = xp.exp(xp.clip(tree["log_std_scale"] * raw + tree["log_std_shift"], -20.0, 2.0))
    u = mean + std * noise
    correction = 2 * (math.log(2) - u - xp.logaddexp(0.0, -2 * u)).sum(axis=1)
    return xp.tanh(u), gaussian_log_prob(u, mean, std, xp) - correction


def difference_of(p, s, b, noise, c, xp, calibrated):
    """(N,), action by action and entry by entry."""
    data_q = q_of(p, b.observations, b.actions, xp)  # (N, B)
    entries = []
    for uniform in noise["uniform"]:
        q = q_of(p, b.observations, uniform, xp)
        entries.append(q + A * math.log(2) if c.importance_sampling else q)
    for states, draws in ((b.next_observations, noise["next"]), (b.observations, noise["own"])):
        for draw in draws:
            action, log_prob = squashed(s["actor"], states, draw, xp)
            q = q_of(p, b.observations, action, xp)
            q = xp.maximum(q, b.mc_returns) if calibrated else q
            entries.append(q - log_prob if c.importance_sampling else q)
    if not c.importance_sampling:
        entries.append(data_q)
    z = xp.stack(entries)  # (3 M or 3 M + 1, N, B)
    highest = z.max(axis=0)
    difference = xp.log(xp.exp(z - highest).sum(axis=0)) + highest - data_q
    return xp.clip(difference, c.difference_min, c.difference_max).mean(axis=1)


def critic_of(p, s, b, noise, c, xp, calibrated):
    candidates = []
    for draw in noise["backup"]:
        action, _ = squashed(s["actor"], b.next_observations, draw, xp)
        candidates.append(q_of(s["target"], b.next_observations, action, xp).min(axis=0))
    target = b.rewards + c.discount * b.masks * xp.stack(candidates).max(axis=0)
    q = q_of(p, b.observations, b.actions, xp)
    td = sum(((q[i] - target) ** 2).mean() for i in range(len(q)))
    difference = difference_of(p, s, b, noise, c, xp, calibrated)
    if c.lagrange:
        multiplier = xp.exp(s["multiplier"]["params"]["log_multiplier"])
        return td + (multiplier * c.cql_alpha * (difference - c.target_gap)).sum()
    return td + (c.cql_alpha * difference).sum()


def actor_of(p, s, b, noise, c, xp):
    action, log_prob = squashed(p, b.observations, noise["actor"], xp)
    q = q_of(s["critic"], b.observations, action, xp).min(axis=0)
    return (xp.exp(s["temperature"]["params"]["log_temperature"]) * log_prob - q).mean()


def temperature_of(p, s, b, noise, c, xp):
    _, log_prob = squashed(s["actor"], b.observations, noise["actor"], xp)
    excess = -log_prob.mean() - c.entropy_per_action * A
    return xp.exp(p["params"]["log_temperature"]) * excess


def multiplier_of(p, s, b, noise, c, xp, calibrated):
    difference = difference_of(s["critic"], s, b, noise, c, xp, calibrated)
    return -0.5 * (xp.exp(p["params"]["log_multiplier"]) * c.cql_alpha
                   * (difference - c.target_gap)).sum()  # fmt: skip


def noises_of(script, config, critic_key, actor_key):
    """All random numbers of one update."""
    target_key, difference_key = jax.random.split(critic_key)
    uniform_key, next_key, own_key = jax.random.split(difference_key, 3)
    shape = config.num_actions, B, A
    state = fresh(script, config)
    sample = state.actor.apply_fn(
        jax.tree.map(np.zeros_like, state.actor.params)
        | {"params": jax.tree.map(np.zeros_like, state.actor.params["params"])
           | {"log_std_shift": np.float32(math.log(0.1))}}, np.zeros((B, OBS), np.float32))
    return {
        "backup": noise_of(
            script, config, jax.random.split(target_key)[0], config.backup_actions),
        "uniform": np.float64(jax.random.uniform(uniform_key, shape, minval=-1, maxval=1)),
        "next": noise_of(script, config, next_key, config.num_actions),
        "own": noise_of(script, config, own_key, config.num_actions),
        "actor": np.arctanh(np.float64(sample.sample(seed=actor_key))) / 0.1,
    }


def references(calibrated):
    return {"critic": partial(critic_of, calibrated=calibrated), "actor": actor_of,
            "temperature": temperature_of,
            "multiplier": partial(multiplier_of, calibrated=calibrated)}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_are_the_papers(variant, script):
    config = script.Config(**SHAPES, **VARIANTS[variant])
    critic_key, actor_key = jax.random.PRNGKey(5), jax.random.PRNGKey(6)
    noise = noises_of(script, config, critic_key, actor_key)
    expected = references(script.__name__ == "cal_ql")
    bounded = []
    for seed in range(5):
        state, batch = fresh(script, config, seed), batch_with_returns(script, seed)
        s, b = parameters(state), float64(batch)
        s["multiplier"] = jax.tree.map(np.float64, state.multiplier.params)
        found, info = compiled(script, "critic_loss", config)(
            state.critic.params, state, batch, critic_key)
        np.testing.assert_allclose(
            found, expected["critic"](s["critic"], s, b, noise, config, np), rtol=1e-5)
        difference = difference_of(s["critic"], s, b, noise, config, np,
                                   script.__name__ == "cal_ql")
        np.testing.assert_allclose(info["difference"], difference.mean(), rtol=1e-5)
        bounded.append(float(info["below_return"]))
        found, _ = compiled(script, "actor_loss", config)(
            state.actor.params, state, batch, actor_key)
        np.testing.assert_allclose(
            found, actor_of(s["actor"], s, b, noise, config, np), rtol=1e-5)
        if config.lagrange:
            found, _ = compiled(script, "multiplier_loss", config)(
                state.multiplier.params, state, info["difference"])
            np.testing.assert_allclose(
                found, expected["multiplier"](s["multiplier"], s, b, noise, config, np), rtol=1e-5)
    assert 0.1 < np.mean(bounded) < 0.9  # both sides of the bound were compared


@pytest.mark.parametrize("variant", list(VARIANTS)[:2])
def test_updates_replayed_step_by_step(variant, script):
    """All gradients at the parameters before the update; the target's average after it."""
    config = script.Config(**SHAPES, **VARIANTS[variant], learning_rate=1e-2, tau=0.2,
                           policy_learning_rate=3e-3, micro_batches=1)
    state, noises = fresh(script, config), []
    batches, key = [batch_with_returns(script, i) for i in range(3)], state.key
    for _ in batches:
        key, critic_key, actor_key = jax.random.split(key, 3)
        critic_key, = jax.random.split(critic_key, 1)  # of the only micro-batch
        noises.append(dict.fromkeys(NETWORKS, noises_of(script, config, critic_key, actor_key)))
    losses = references(script.__name__ == "cal_ql")
    order = {name: (losses[name], ()) for name in NETWORKS if config.lagrange
             or name != "multiplier"}  # fmt: skip
    rates = {"critic": [1e-2] * 3, "multiplier": [1e-2] * 3, "actor": [3e-3] * 3,
             "temperature": [3e-3] * 3}  # fmt: skip
    s = parameters(state)
    if config.lagrange:
        s["multiplier"] = jax.tree.map(np.float64, state.multiplier.params)
    s, moments = replay(s, [float64(b) for b in batches], noises, order, rates, config)
    update = compiled(script, "update_step", config)
    for batch in batches:
        state, _ = update(state, batch)
    multiplier = s.pop("multiplier", None)
    assert_same(state, s, moments)
    if config.lagrange:
        np.testing.assert_allclose(state.multiplier.params["params"]["log_multiplier"],
                                   multiplier["params"]["log_multiplier"], rtol=1e-4)
    np.testing.assert_array_equal(state.key, key)


@pytest.mark.parametrize(("asked", "count"), [(4, 4), (6, 2)])
def test_micro_batches_give_the_mean_of_their_gradients(asked, count, script):
    """Every row in one part, every part with its own draws; the largest number that divides."""
    config = script.Config(**SHAPES, micro_batches=asked, learning_rate=1e-2)
    state, batch, key = fresh(script, config), batch_with_returns(script, 0), jax.random.PRNGKey(3)
    assert math.gcd(asked, B) == count
    size, total = B // count, 0
    for i, part_key in enumerate(jax.random.split(key, count)):
        part = jax.tree.map(lambda x, i=i: x[i * size : (i + 1) * size], batch)
        grads, _ = jax.grad(script.critic_loss, has_aux=True)(
            state.critic.params, state, part, part_key, config)
        total = jax.tree.map(np.add, total, grads) if i else grads
    expected = state.critic.apply_gradients(grads=jax.tree.map(lambda x: x / count, total))
    found, _ = script.critic_gradient_step(state, batch, key, config)
    same = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(same, found.params, expected.params)
    # Adam's step hides the size of the gradients, its memory of them does not
    jax.tree.map(same, found.opt_state[0].mu, expected.opt_state[0].mu)


# --------------------------------------------------------------------------- By hand, and the edges


def test_only_the_policys_actions_are_bounded(cql, cal_ql):
    """Without known returns Cal-QL is CQL to the bit; far above every Q, they take the gradient
    from the policy's actions and leave it to the data's."""
    loss = {}
    for script in (cql, cal_ql):
        config = script.Config(**SHAPES, cql_alpha=1.0)
        state, batch = fresh(script, config), batch_of(script, 0)
        for name, value in (("unknown", -np.inf), ("high", 1e4)):
            filled = batch.replace(mc_returns=np.full(B, value, np.float32))
            grad = jax.grad(partial(script.critic_loss, config=config), has_aux=True)
            loss[script.__name__, name] = grad(state.critic.params, state, filled, state.key)[0]
    same = jax.tree.map(np.array_equal, loss["cql", "unknown"], loss["cal_ql", "unknown"])
    assert all(jax.tree.leaves(same))
    same = jax.tree.map(np.array_equal, loss["cql", "high"], loss["cal_ql", "high"])
    assert not any(jax.tree.leaves(same))

    def td_minus_data(params, state, batch, key, config):
        target = cal_ql.target_values(state, batch, jax.random.split(key)[0], config)
        q = state.critic.apply_fn(params, batch.observations, batch.actions)
        return ((q - target) ** 2).mean(axis=1).sum() - q.mean(axis=1).sum()

    expected = jax.grad(td_minus_data)(state.critic.params, state, filled, state.key, config)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), loss["cal_ql", "high"],
                 expected)


@pytest.mark.parametrize(("difference", "sign"), [(2.0, 1), (0.1, -1)])
def test_the_multiplier_holds_the_gap(difference, sign, script):
    config = script.Config(**SHAPES, lagrange=True, target_gap=0.8)
    state = fresh(script, config)
    new, _ = script.gradient_step(
        state.multiplier, script.multiplier_loss, state, np.float32(difference), config)
    before, after = (x.apply_fn(x.params) for x in (state.multiplier, new))
    assert np.sign(after - before) == sign


def test_a_new_policy_is_narrow_and_its_log_std_scales(script):
    state = one_agent(script, script.Config(**SHAPES), OBS)
    tree = first(state).actor.params["params"]
    assert (tree["log_std_scale"], tree["log_std_shift"]) == (1.0, -1.0)
    assert first(state).multiplier.apply_fn(first(state).multiplier.params) == np.float32(np.e)


def known_q(rewards, alpha):
    """Q on a grid of actions that minimises E[(Q - r)^2] + alpha (log integral exp Q - E[Q]) under
    uniform data: Q = r - alpha / 2 * (softmax density / data density - 1)."""
    q = rewards.copy()
    for _ in range(5000):
        weight = np.exp(q - q.max())
        q = 0.95 * q + 0.05 * (rewards - alpha / 2 * (weight / weight.mean() - 1))
    return q


def test_cql_solves_a_bandit(cql):
    """Q is the regularised regression's known solution, flatter than the reward, and the policy's
    mode the best action."""
    rows, alpha = bandit_rows(), 2.0
    config = cql.Config(
        hidden_dims=(32, 32), critic_hidden_dims=(64, 64), learning_rate=2e-3, batch_size=128,
        policy_learning_rate=2e-3, tau=0.05, cql_alpha=alpha, num_actions=30, discount=0.9,
    )
    dataset = cql.Batch(rows["observations"], rows["actions"], np.float32(rows["rewards"]),
                        np.float32(rows["next_observations"]), np.zeros(2000, np.float32),
                        np.float32(rows["rewards"]))
    state, kept = one_agent(cql, config, 1), []
    grid = np.linspace(-1, 1, 81)
    for _ in range(8):
        state, info = cql.update_steps(state, dataset, config, 250)
        states = np.stack([np.full((81, 1), -1.0), np.full((81, 1), 1.0)]).astype(np.float32)
        agent = first(state)
        q = [agent.critic.apply_fn(agent.critic.params, x, np.float32(grid[:, None]))
             for x in states]
        kept.append(np.mean(q, axis=1))  # (2, 81)
    found = np.mean(kept[4:], axis=0)
    for i, x in enumerate((-1.0, 1.0)):
        expected = known_q(1 - (grid - 0.5 * x) ** 2, alpha)
        reward = 1 - (grid - 0.5 * x) ** 2
        assert np.abs(expected - reward).max() > 0.3  # the regulariser matters here
        # at the edges of the box a network and 90 samples are not exact
        np.testing.assert_allclose(found[i, 6:-6], expected[6:-6], atol=0.15)
    mode = cql.mode_actions(agent, np.array([[-1.0], [1.0]], np.float32))[:, 0]
    np.testing.assert_allclose(mode, best_action(np.array([[-1.0], [1.0]])), atol=0.15)


# ---------------------------------------------------------------------------- Monte-Carlo returns


def by_hand(rewards, masks, ends, failure, config):
    """Trajectory by trajectory, the paper's rules word for word."""
    returns, begin = np.zeros(len(rewards)), 0
    for end in np.flatnonzero(ends):
        rows = range(begin, end + 1)
        lost = all(rewards[i] == failure for i in rows)
        forever = rewards[end] / (1 - config.discount)
        goes_on = {"finite": False, "sparse": lost, "infinite": True}[config.return_rule]
        following = forever if goes_on else 0.0
        for i in reversed(rows):
            following = rewards[i] + config.discount * masks[i] * following
            returns[i] = following
        if config.return_rule == "sparse" and lost:
            assert np.allclose(returns[list(rows)], forever)
        begin = end + 1
    return returns


def trajectories(seed, fail_share=0.5):
    """Random lengths; sparse rewards -5 and 5; a success terminates or not, a failure is cut."""
    rng, parts = np.random.default_rng(seed), []
    for _ in range(12):
        steps = rng.integers(1, 9)
        rewards, masks = np.full(steps, -5.0), np.ones(steps)
        if rng.random() > fail_share:
            rewards[-1], masks[-1] = 5.0, rng.random() < 0.5
        parts.append((rewards, masks, np.arange(steps) == steps - 1))
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


@pytest.mark.parametrize("rule", ["finite", "sparse", "infinite"])
def test_returns_of_the_dataset(rule, script):
    config = script.Config(return_rule=rule, discount=0.9)
    rewards, masks, ends = trajectories(0)
    found = script.monte_carlo_returns(np.float32(rewards), masks, ends, np.float32(-5), config)
    np.testing.assert_allclose(found, by_hand(rewards, masks, ends, -5.0, config), rtol=1e-5)
    lost = script.monte_carlo_returns(
        np.full(3, -5, np.float32), np.ones(3), np.array([False, False, True]), np.float32(-5),
        script.Config(return_rule="sparse", discount=0.99))
    if rule == "sparse":
        np.testing.assert_allclose(lost, -500, rtol=1e-5)


def test_returns_are_in_the_agents_units(script):
    """AntMaze's 10 r - 5: a lost trajectory is worth -500, a success at its end 5; and a row whose
    next observation is not known counts in the returns before it."""
    config = script.Config(reward_scale=10.0, reward_shift=-5.0, return_rule="sparse")
    zeros = np.zeros((4, 1), np.float32)
    arrays = {"observations": zeros, "actions": zeros, "next_observations": zeros,
              "rewards": np.array([0.0, 0.0, 0.0, 1.0]), "ends": np.array([False, True] * 2),
              "terminals": np.array([False, False, False, True]),
              "keep": np.array([True, False, True, True])}
    box = gym.spaces.Box(-1, 1, (1,))
    transform = script.fit_transform(arrays, box, config)
    batch = script.batch_with_returns(arrays, transform, config)
    np.testing.assert_allclose(batch.mc_returns, [-500, -5 + 0.99 * 5, 5], rtol=1e-5)
    np.testing.assert_allclose(batch.rewards, [-5, -5, 5])


@pytest.mark.parametrize("rule", ["finite", "sparse", "infinite"])
def test_returns_of_the_buffer_are_those_of_the_dataset(rule, script):
    """Two seeds, a ring that overflows: a row's return is unknown until its episode has ended."""
    config = script.Config(return_rule=rule, discount=0.9)
    buffer = jax.device_put(script.empty_buffers(2, 20, script.blank_transition(1, 1)))
    data = [trajectories(1), trajectories(2)]
    steps = min(len(rewards) for rewards, _, _ in data)
    expected = [by_hand(*each, -5.0, config) for each in data]
    begins, zeros = np.zeros(2, int), np.zeros((2, 1), np.float32)
    for t in range(steps):
        rewards, masks, ends = (np.array([each[i][t] for each in data]) for i in range(3))
        row = script.Batch(zeros, zeros, np.float32(rewards), zeros, np.float32(masks),
                           np.full(2, -np.inf, np.float32))
        buffer = script.insert_transitions(buffer, row)
        lengths = np.where(ends, t + 1 - begins, 0)
        if ends.any():
            buffer = script.write_returns(
                buffer, np.int32(lengths), np.float32(-5), config)
        begins = np.where(ends, t + 1, begins)
        for seed in (0, 1):
            held = np.arange(max(0, t - 19), t + 1)
            found = np.asarray(buffer.rows.mc_returns[seed])[held % 20]
            known = held < begins[seed]
            np.testing.assert_allclose(found[known], expected[seed][held[known]], rtol=1e-5)
            assert (found[~known] == -np.inf).all()


@pytest.fixture(scope="module")
def flags(pendulum):
    return ["--dataset", str(pendulum), "--env-id", "Pendulum-v1", "--preset", "smoke",
            "--offline-steps", "40", "--online-steps", "460", "--log-interval", "20",
            "--eval-interval", "60", "--hidden-dims", "8", "--critic-hidden-dims", "8",
            "--num-actions", "2", "--buffer-size", "450", "--resume", "run"]  # fmt: skip


@pytest.fixture(scope="module")
def reused(cal_ql):
    with reused_agents(cal_ql) as patched:
        yield patched


@pytest.fixture(scope="module")
def whole(reused, flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    done = go(reused, folder, flags)
    assert done.code == 0, done.err
    return folder / "run"


def test_an_online_run_knows_the_returns_of_its_finished_episodes(whole, cal_ql):
    """Pendulum's episodes have 200 steps: at 460, in a ring of 450, two have ended."""
    arrays, meta = load(whole)
    rewards, returns = arrays["buffer/rows/rewards"][0], arrays["buffer/rows/mc_returns"][0]
    in_time = np.arange(10, 460) % 450  # rows of steps 10 ... 459
    rewards, returns = rewards[in_time], returns[in_time]
    ends = np.isin(np.arange(10, 460), [199, 399, 459])
    expected = cal_ql.discounted_returns(rewards, ends, meta["config"]["discount"])
    np.testing.assert_allclose(returns[:390], expected[:390], rtol=1e-4)
    assert (returns[390:] == -np.inf).all()


@pytest.mark.parametrize(("name", "number"), [
    ("step_rollout", 199), ("step_rollout", 201), ("write_returns", 2), ("update_steps", 2),
])  # fmt: skip
def test_killed_and_resumed_to_the_same_bits(name, number, reused, flags, whole, tmp_path):
    with pytest.raises(Killed), on_call(reused, name, number, die):
        go(reused, tmp_path, flags)
    assert go(reused, tmp_path, flags).code == 0
    assert_same_run(tmp_path / "run", whole)


# ----------------------------------------------------------------------------------- Online batches


@pytest.mark.parametrize(("ratio", "offline"), [(0.5, 8), (0.25, 4), (0.0, 0), (1.0, 16)])
def test_an_online_batch_has_its_share_of_dataset_rows(ratio, offline, script):
    config = script.Config(offline_ratio=ratio, batch_size=B)
    dataset = jax.device_put(batch_with_returns(script, 0))
    rows = jax.tree.map(lambda x: x + 100, dataset)
    buffer = script.ReplayBuffer(rows, np.int32(3), np.int32(3))
    drawn = set()
    for seed in range(20):
        batch = script.online_batch(dataset, buffer, jax.random.PRNGKey(seed), config)
        new = np.asarray(batch.rewards) > 50
        assert (~new).sum() == offline and len(new) == B
        drawn |= set(np.asarray(batch.rewards)[new].tolist())
    assert len(drawn) == (3 if offline < B else 0)  # never an unfilled row
    union = dataclasses.replace(config, offline_ratio=-1.0)
    new = [np.asarray(script.online_batch(dataset, buffer, jax.random.PRNGKey(i), union).rewards)
           > 50 for i in range(60)]  # fmt: skip
    assert np.mean(new) == pytest.approx(3 / (B + 3), abs=0.04)


def test_a_word_that_is_no_rule_is_refused(script):
    with pytest.raises(SystemExit) as end:
        script.main(["--return-rule", "forever"])
    assert end.value.code == 2
