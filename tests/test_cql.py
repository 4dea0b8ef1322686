"""CQL, Cal-QL, SAC fine-tuning and RLPD: every loss against NumPy, whole updates, a bandit with a
known answer, the Monte-Carlo returns of dataset and buffer, what an online batch is made of."""

import math
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import read_metrics
from test_learning import trained
from test_losses import (
    OBS,
    A,
    B,
    adam,
    batch_of,
    compiled,
    dense,
    float64,
    fresh,
    gaussian_log_prob,
    hidden,
    noise_of,
    parameters,
    q_of,
    squashed_sample,
    template,
)

SIZES = dict(hidden_dims=(16, 8), critic_hidden_dims=(16, 8), batch_size=B, num_actions=3)
VARIANTS = {
    "fixed weight": dict(cql_alpha=2.0),
    "lagrange, best of 4": dict(cql_alpha=2.0, lagrange=True, target_gap=0.7, backup_actions=4),
    "no importance sampling": dict(
        cql_alpha=0.5, importance_sampling=False, difference_range=(0.5, 1e9), target_critics=1
    ),
}
ALL = ["cql", "cal_ql", "sac_finetune"]


@pytest.fixture(params=["cql", "cal_ql"])
def script(request):
    return request.getfixturevalue(request.param)


def batch_with_returns(script, seed):
    """Returns around the Q-values: some bound them, some do not; one is not known yet."""
    returns = np.random.default_rng(seed + 100).normal(size=B).astype(np.float32)
    returns[3] = -1e9
    return batch_of(script, seed).replace(mc_returns=returns)


# ----------------------------------------------------------------------------- Losses, written out
def gaussian(params, observations, xp):
    tree = params["params"]
    features = hidden(tree, observations, xp)
    mean, raw = dense(tree, "Dense_0", features), dense(tree, "Dense_1", features)
    log_std = tree["log_std_scale"] * raw + tree["log_std_shift"]
    return mean, xp.exp(xp.clip(log_std, -20.0, 2.0))


def squashed(params, observations, noise, xp):
    """tanh(mean + std * noise) (B, A) and its log-density (B,)."""
    mean, std = gaussian(params, observations, xp)
    u = mean + std * noise
    correction = 2 * (math.log(2) - u - xp.logaddexp(0.0, -2 * u)).sum(axis=1)
    return xp.tanh(u), gaussian_log_prob(u, mean, std, xp) - correction


def noises_of(script, config, critic_key, actor_key):
    """All random numbers of one update, read from a policy of mean 0 and std 0.1."""
    agent = template(script, config)
    params = jax.tree.map(np.zeros_like, agent.actor.params)
    params["params"]["log_std_shift"] = np.float32(math.log(0.1))
    policy = agent.actor.apply_fn(params, np.zeros((B, OBS), np.float32))
    draw = lambda key, *n: np.arctanh(np.float64(policy.sample(seed=key, sample_shape=n))) / 0.1  # noqa: E731
    target_key, difference_key = jax.random.split(critic_key)
    action_key, subset_key = jax.random.split(target_key)
    uniform_key, next_key, own_key = jax.random.split(difference_key, 3)
    shape = config.num_actions, B, A
    return {
        "backup": draw(action_key, config.backup_actions),
        "members": np.array(
            jax.random.choice(subset_key, config.num_critics, (config.target_critics,), False)
        ),
        "uniform": np.float64(jax.random.uniform(uniform_key, shape, minval=-1, maxval=1)),
        "next": draw(next_key, config.num_actions),
        "own": draw(own_key, config.num_actions),
        "actor": draw(actor_key),
    }


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
    return xp.clip(difference, *c.difference_range).mean(axis=1)


def bellman_of(p, s, b, noise, c, xp):
    candidates = []
    for draw in noise["backup"]:
        action, _ = squashed(s["actor"], b.next_observations, draw, xp)
        q = q_of(s["target"], b.next_observations, action, xp)[noise["members"]]
        candidates.append(q.min(axis=0))
    target = b.rewards + c.discount * b.masks * xp.stack(candidates).max(axis=0)
    q = q_of(p, b.observations, b.actions, xp)
    return sum(((q[i] - target) ** 2).mean() for i in range(len(q)))


def critic_of(p, s, b, noise, c, xp, calibrated=False):
    difference = difference_of(p, s, b, noise, c, xp, calibrated)
    weight, gap = (xp.exp(s["multiplier"]["log"]), c.target_gap) if c.lagrange else (1.0, 0.0)
    td_loss = bellman_of(p, s, b, noise, c, xp)
    return td_loss + weight * c.cql_alpha * (difference - gap).sum()


def actor_of(p, s, b, noise, c, xp):
    action, log_prob = squashed(p, b.observations, noise["actor"], xp)
    q = q_of(s["critic"], b.observations, action, xp).min(axis=0)
    return (xp.exp(s["temperature"]["log"]) * log_prob - q).mean()


def temperature_of(p, s, b, noise, c, xp):
    _, log_prob = squashed(s["actor"], b.observations, noise["actor"], xp)
    return xp.exp(p["log"]) * (-log_prob.mean() - c.entropy_per_action * A)


def multiplier_of(p, s, b, noise, c, xp, calibrated=False):
    difference = difference_of(s["critic"], s, b, noise, c, xp, calibrated).mean()
    return -xp.exp(p["log"]) * c.cql_alpha * (difference - c.target_gap)


CASES = [("cql", each) for each in VARIANTS] + [("cal_ql", each) for each in list(VARIANTS)[:2]]


@pytest.mark.parametrize(("name", "variant"), [*CASES, ("sac_finetune", "lagrange, best of 4")])
def test_losses_are_the_papers(name, variant, request):
    script = request.getfixturevalue(name)
    calibrated, config = name == "cal_ql", script.Config(**SIZES, **VARIANTS[variant])
    critic_key, actor_key = jax.random.PRNGKey(5), jax.random.PRNGKey(6)
    noise, shares = noises_of(script, config, critic_key, actor_key), []
    for seed in range(4):
        agent, batch = fresh(script, config, seed), batch_with_returns(script, seed)
        s, b = parameters(agent), float64(batch)
        loss = compiled(script, "critic_loss", config)
        found, info = loss(agent.critic.params, agent, batch, critic_key)
        expected = critic_of(s["critic"], s, b, noise, config, np, calibrated)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        expected = difference_of(s["critic"], s, b, noise, config, np, calibrated).mean()
        np.testing.assert_allclose(info["difference"], expected, rtol=1e-5)
        shares.append(float(info.get("below_return", 0.5)))
        loss = compiled(script, "actor_loss", config)
        found, info = loss(agent.actor.params, agent, batch, actor_key)
        expected = actor_of(s["actor"], s, b, noise, config, np)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        loss = compiled(script, "temperature_loss", config)
        found, _ = loss(agent.temperature.params, agent, info["entropy"], A)
        expected = temperature_of(s["temperature"], s, b, noise, config, np)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert 0.1 < np.mean(shares) < 0.9  # both sides of the bound were compared


@pytest.mark.parametrize("name", ALL)
def test_updates_replayed_step_by_step(name, request):
    """All gradients at the parameters before the update; the target's average after it."""
    script = request.getfixturevalue(name)
    rates = {"critic": 1e-2, "multiplier": 1e-2, "actor": 3e-3, "temperature": 3e-3}
    config = script.Config(**SIZES, **VARIANTS["lagrange, best of 4"], learning_rate=1e-2, tau=0.2,
                           policy_learning_rate=3e-3, micro_batches=1)  # fmt: skip
    bound = partial(partial, calibrated=name == "cal_ql")
    losses = {"critic": bound(critic_of), "multiplier": bound(multiplier_of)}
    losses |= {"actor": actor_of, "temperature": temperature_of}
    agent = fresh(script, config)
    s, key, moments = parameters(agent), agent.key, {}
    for i in range(3):
        batch = batch_with_returns(script, i)
        key, critic_key, actor_key = jax.random.split(key, 3)
        noise = noises_of(script, config, jax.random.split(critic_key, 1)[0], actor_key)
        with jax.enable_x64(True):
            new, before = {}, s
            for network, loss in losses.items():
                function = jax.jit(jax.grad(partial(loss, c=config, xp=jnp)))
                grads = jax.device_get(function(before[network], before, float64(batch), noise))
                old = moments.get(network, (jax.tree.map(np.zeros_like, s[network]),) * 2)
                step = adam(s[network], grads, old, i + 1, rates[network])
                new[network], moments[network] = step
        s = s | new
        mix = lambda q, old: config.tau * q + (1 - config.tau) * old  # noqa: E731
        s = s | {"target": jax.tree.map(mix, s["critic"], s["target"])}
        agent, _ = compiled(script, "update", config)(agent, batch)
    same = partial(np.testing.assert_allclose, rtol=2e-3, atol=3e-4)
    found = parameters(agent)
    for network in [*losses, "target"]:
        jax.tree.map(same, found[network], s[network])
    np.testing.assert_array_equal(agent.key, key)


def test_micro_batches_give_the_mean_of_their_gradients(script):
    """Every row in one part, every part with its own draws; the largest number that divides."""
    config = script.Config(**SIZES, micro_batches=6, learning_rate=1e-2)  # 2 of 6 divide 16
    agent, batch = fresh(script, config), batch_with_returns(script, 0)
    critic_key, total = jax.random.split(agent.key, 3)[1], []
    for i, key in enumerate(jax.random.split(critic_key, 2)):
        part = jax.tree.map(lambda x, i=i: x[8 * i : 8 * i + 8] if len(x) else x, batch)
        grad = jax.grad(partial(script.critic_loss, config=config), has_aux=True)
        total.append(grad(agent.critic.params, agent, part, key)[0])
    mean = jax.tree.map(lambda x, y: 0.1 * (x + y) / 2, *total)
    found, _ = compiled(script, "update", config)(agent, batch)
    same = partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5)
    jax.tree.map(same, found.critic.opt_state[0].mu, mean)  # Adam's memory of the gradient


def test_only_the_policys_actions_are_bounded(cql, cal_ql):
    """Without known returns Cal-QL is CQL to the bit; far above every Q, they take the gradient
    from the policy's actions and leave it to the data's."""
    grads = {}
    for script in (cql, cal_ql):
        config = script.Config(**SIZES, cql_alpha=1.0)
        agent, batch = fresh(script, config), batch_of(script, 0)
        for name, value in (("unknown", -1e9), ("high", 1e4)):
            filled = batch.replace(mc_returns=np.full(B, value, np.float32))
            grad = jax.grad(partial(script.critic_loss, config=config), has_aux=True)
            grads[script.__name__, name] = grad(agent.critic.params, agent, filled, agent.key)[0]
    same = jax.tree.map(np.array_equal, grads["cql", "unknown"], grads["cal_ql", "unknown"])
    assert all(jax.tree.leaves(same))
    same = jax.tree.map(np.array_equal, grads["cql", "high"], grads["cal_ql", "high"])
    assert not any(jax.tree.leaves(same))


# ------------------------------------------------------------------------------------ Fine-tuning
@pytest.mark.parametrize("mode", ["naive", "conservative"])
def test_online_losses_are_those_of_sac(mode, sac_finetune):
    script, key = sac_finetune, jax.random.PRNGKey(5)
    config = script.Config(**SIZES, mode=mode, backup_actions=7, online_backup_actions=2)
    plain = script.Config(**SIZES, backup_actions=2)
    noise = noises_of(script, plain, jax.random.PRNGKey(0), key)
    for seed in range(3):
        agent, batch = fresh(script, config, seed), batch_with_returns(script, seed)
        s, b = parameters(agent), float64(batch)
        keys = jax.random.split(key)
        target = noises_of(script, plain, jax.random.PRNGKey(0), keys[0])
        policy_noise = dict(noise, backup=_draw(script, plain, keys[0], 2))
        policy_noise["members"] = np.arange(2)
        loss = compiled(script, "online_critic_loss", config)
        found, _ = loss(agent.critic.params, agent, batch, key)
        expected = bellman_of(s["critic"], s, b, policy_noise, plain, np)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        loss = compiled(script, "online_actor_loss", config)
        found, info = loss(agent.actor.params, agent, batch, key)
        expected = actor_of(s["actor"], s, b, noise, config, np)
        if mode == "conservative":
            reference = float64(agent.reference_params)
            (m, std), (m0, std0) = (
                gaussian(p, b.observations, np) for p in (s["actor"], reference)
            )
            kl = np.log(std0 / std) + (std**2 + (m - m0) ** 2) / (2 * std0**2) - 0.5
            action, _ = squashed(s["actor"], b.observations, noise["actor"], np)
            scale = np.abs(q_of(s["critic"], b.observations, action, np)).mean()
            expected += np.exp(s["kl_multiplier"]["log"]) * scale * kl.sum(axis=1).mean()
            np.testing.assert_allclose(info["kl"], kl.sum(axis=1).mean(), rtol=1e-4)
        np.testing.assert_allclose(found, expected, rtol=1e-4)
        assert target["actor"].shape == (B, A)


def _draw(script, config, key, count):
    agent = template(script, config)
    params = jax.tree.map(np.zeros_like, agent.actor.params)
    params["params"]["log_std_shift"] = np.float32(math.log(0.1))
    policy = agent.actor.apply_fn(params, np.zeros((B, OBS), np.float32))
    return np.arctanh(np.float64(policy.sample(seed=key, sample_shape=(count,)))) / 0.1


@pytest.mark.parametrize(("kl", "sign"), [(3.0, 1), (0.01, -1)])
def test_the_price_of_the_kl_rises_above_its_limit(kl, sign, sac_finetune):
    config = sac_finetune.Config(**SIZES, mode="conservative")
    price = fresh(sac_finetune, config).kl_multiplier
    agent = SimpleNamespace(kl_multiplier=price)
    new, _ = sac_finetune.gradient_step(price, sac_finetune.kl_loss, agent, np.float32(kl), config)
    assert np.sign(new.params["log"] - price.params["log"]) == sign
    late = SimpleNamespace(kl_multiplier=price.replace(step=config.kl_steps))
    for at, rises in ((1.9, False), (2.1, True)):  # the limit is 2 nats by now
        step = sac_finetune.gradient_step(
            late.kl_multiplier, sac_finetune.kl_loss, late, np.float32(at), config
        )
        assert (step[0].params["log"] > price.params["log"]) == rises


@pytest.mark.parametrize("mode", ["naive", "mixed", "wsrl", "conservative"])
def test_a_mode_sets_what_is_open(mode, sac_finetune, cql, pendulum, tmp_path):
    """From CQL's agent: its score first, then as many critic updates as the mode says."""
    sizes = ["--dataset", pendulum, "--hidden-dims", "8", "--critic-hidden-dims", "8",
             "--num-actions", "2", "--batch-size", "16", "--eval-episodes", "2", "--interval", "40",
             "--num-critics", "2"]  # fmt: skip
    theirs = tmp_path / "theirs"
    cql.main([*sizes, "--offline-steps", "40", "--online-steps", "0", "--run-dir", str(theirs)])
    flags = [*sizes, "--mode", mode, "--online-steps", "40", "--init-from", str(theirs)]
    flags += ["--warmup-steps", "20", "--run-dir", str(tmp_path / "ours")]
    sac_finetune.main(flags)
    before, rows = read_metrics(theirs), read_metrics(tmp_path / "ours")
    assert [(row["phase"], row["step"]) for row in rows] == [("online", "0"), ("online", "40")]
    assert rows[0]["return"] == before[-1]["return"]
    arrays, _ = sac_finetune.load(tmp_path / "ours")
    updates = {"wsrl": 4}.get(mode, 1)
    assert arrays["agents/critic/step"][0] == 40 + 20 * updates
    assert arrays["agents/actor/step"][0] == 60
    kernel = arrays["agents/reference_params/params/Dense_0/kernel"]
    np.testing.assert_array_equal(
        kernel, sac_finetune.load(theirs)[0]["agents/actor/params/params/Dense_0/kernel"]
    )


# -------------------------------------------------------------------------------- Online batches
@pytest.mark.parametrize(("ratio", "offline"), [(0.5, 8), (0.25, 4), (0.0, 0)])
@pytest.mark.parametrize("name", [*ALL, "rlpd", "td3_bc", "td3_c"])
def test_an_online_batch_has_its_share_of_dataset_rows(ratio, offline, name, request):
    script, updates = request.getfixturevalue(name), 4 if name in ("rlpd", "sac_finetune") else 1
    own = {"rlpd": {"utd_ratio": 4}, "sac_finetune": {"critic_updates": 4}}.get(name, {})
    config = script.Config(offline_ratio=ratio, batch_size=B, **own)
    dataset = batch_of(script, 0)
    buffer, drawn = jax.tree.map(lambda x: x + 100, dataset), set()
    for seed in range(20):
        batch = script.online_batch(dataset, buffer, 3, jax.random.PRNGKey(seed), config)
        new = np.asarray(batch.rewards).reshape(updates, B) > 50
        np.testing.assert_array_equal((~new).sum(axis=1), [offline] * updates)
        drawn |= set(np.asarray(batch.rewards)[new.ravel()].tolist())
    assert len(drawn) == 3  # never an unfilled row


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
        begin = end + 1
    return returns


def trajectories(seed):
    """Random lengths; sparse rewards -5 and 5; a success terminates or not, a failure is cut."""
    rng, parts = np.random.default_rng(seed), []
    for _ in range(12):
        steps = rng.integers(1, 9)
        rewards, masks = np.full(steps, -5.0), np.ones(steps)
        if rng.random() > 0.5:
            rewards[-1], masks[-1] = 5.0, rng.random() < 0.5
        parts.append((rewards, masks, np.arange(steps) == steps - 1))
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


@pytest.mark.parametrize("rule", ["finite", "sparse", "infinite"])
def test_returns_of_the_dataset(rule, script):
    config = script.Config(return_rule=rule, discount=0.9, failure_reward=-5.0)
    rewards, masks, ends = trajectories(0)
    found = script.monte_carlo_returns(np.float32(rewards), masks, 1.0 * ends, config)
    np.testing.assert_allclose(found, by_hand(rewards, masks, ends, -5.0, config), rtol=1e-5)


def test_returns_of_the_buffer_are_those_of_the_dataset(cal_ql, pendulum, tmp_path):
    """Two seeds, a ring that overflows: an episode's returns are there when it has ended, and a
    round's end cuts an episode like a time limit."""
    flags = ["--dataset", pendulum, "--hidden-dims", "8", "--critic-hidden-dims", "8",
             "--batch-size", "16", "--num-seeds", "2", "--num-actions", "2",
             "--eval-episodes", "1", "--interval", "250", "--offline-steps", "10",
             "--online-steps", "330", "--warmup-steps", "320", "--buffer-size", "300",
             "--run-dir", str(tmp_path)]  # fmt: skip
    cal_ql.main(flags)
    arrays, meta = cal_ql.load(tmp_path)
    in_time = np.arange(30, 330) % 300
    rows = [arrays[f"buffers/{x}"][:, in_time] for x in ("rewards", "masks", "ends", "mc_returns")]
    config = cal_ql.Config(discount=meta["config"]["discount"])
    for rewards, masks, ends, returns in zip(*rows, strict=True):
        np.testing.assert_array_equal(np.flatnonzero(ends), [169, 219, 299])  # 200, 250, 330
        expected = by_hand(np.float64(rewards), masks, ends, 1.0, config)
        np.testing.assert_allclose(returns, expected, rtol=1e-4)


# ------------------------------------------------------------------------------------------- RLPD
def normalised_q(params, observations, actions):
    """(N, B) of critics with LayerNorm before each ReLU."""
    x, found = np.concatenate([observations, actions], axis=1), []
    for i in range(len(params["params"]["bias"])):
        tree, h = jax.tree.map(lambda leaf, i=i: leaf[i], params["params"]), x
        for layer in range(2):
            h = dense(tree["MLP_0"], f"Dense_{layer}", h)
            h = h - h.mean(axis=-1, keepdims=True)
            h = h / np.sqrt((h**2).mean(axis=-1, keepdims=True) + 1e-6)
            norm = tree["MLP_0"][f"LayerNorm_{layer}"]
            h = np.maximum(h * norm["scale"] + norm["bias"], 0)
        found.append((h @ tree["kernel"])[:, 0] + tree["bias"])
    return np.stack(found)


@pytest.mark.parametrize("entropy_backup", [True, False])
def test_rlpd_losses_are_the_papers(entropy_backup, rlpd):
    """Ensemble of 4 with LayerNorm, a random pair in the target, the actor against all four."""
    config = rlpd.Config(
        hidden_dims=(16, 8), batch_size=B, num_critics=4, entropy_backup=entropy_backup
    )
    key = jax.random.PRNGKey(5)
    action_key, subset_key = jax.random.split(key)
    chosen = np.asarray(jax.random.choice(subset_key, 4, (2,), replace=False))
    for seed in range(3):
        agent, batch = fresh(rlpd, config, seed), batch_of(rlpd, seed)
        s, b = parameters(agent), float64(batch)
        temperature = np.exp(s["temperature"]["params"]["log_temperature"])
        noise = noise_of(rlpd, action_key)
        a, log_prob = squashed_sample(s["actor"], b.next_observations, noise, np)
        next_v = normalised_q(s["target"], b.next_observations, a)[chosen].min(axis=0)
        next_v = next_v - temperature * log_prob * entropy_backup
        target = b.rewards + config.discount * b.masks * next_v
        expected = ((normalised_q(s["critic"], b.observations, b.actions) - target) ** 2).mean()
        loss = compiled(rlpd, "critic_loss", config)
        found, _ = loss(agent.critic.params, agent, batch, key)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        a, log_prob = squashed_sample(s["actor"], b.observations, noise_of(rlpd, key), np)
        q = normalised_q(s["critic"], b.observations, a).mean(axis=0)
        found, _ = compiled(rlpd, "actor_loss", config)(agent.actor.params, agent, batch, key)
        np.testing.assert_allclose(found, (temperature * log_prob - q).mean(), rtol=1e-5)


def test_rlpd_makes_many_critic_updates_and_one_of_the_policy(rlpd):
    config = rlpd.Config(hidden_dims=(16, 8), batch_size=B, num_critics=3, utd_ratio=5)
    agent, batch = fresh(rlpd, config), batch_of(rlpd, 0, size=5 * B)
    new, _ = compiled(rlpd, "update", config)(agent, batch)
    assert (new.critic.step, new.actor.step, new.temperature.step) == (5, 1, 1)
    for i in range(5):
        key, critic_key = jax.random.split(agent.key)
        part = jax.tree.map(lambda x, i=i: x[i * B : (i + 1) * B] if len(x) else x, batch)
        critic, _ = rlpd.gradient_step(
            agent.critic, rlpd.critic_loss, agent, part, critic_key, config
        )
        mix = lambda q, old: config.tau * q + (1 - config.tau) * old  # noqa: E731
        target = jax.tree.map(mix, critic.params, agent.target_critic_params)
        agent = agent.replace(critic=critic, target_critic_params=target, key=key)
    same = partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5)
    jax.tree.map(same, new.critic.params, agent.critic.params)
    jax.tree.map(same, new.target_critic_params, agent.target_critic_params)


# -------------------------------------------------------------------------------------- A bandit
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
    rng, alpha = np.random.default_rng(0), 2.0
    s, a = rng.choice([-1.0, 1.0], (2000, 1)), rng.uniform(-1, 1, (2000, 1))
    rewards, ends = 1 - (a - s / 2)[:, 0] ** 2, np.ones(2000)
    dataset = cql.Batch(*map(np.float32, (s, a, rewards, s, 1 - ends, ends, rewards)))
    config = cql.Config(
        hidden_dims=(32, 32), critic_hidden_dims=(64, 64), learning_rate=2e-3, batch_size=128,
        policy_learning_rate=2e-3, tau=0.05, cql_alpha=alpha, num_actions=30, discount=0.9,
    )  # fmt: skip
    agents, _ = trained(cql, config, dataset, 2000)
    grid, states = np.linspace(-1, 1, 81), np.float32([[-1], [1]])
    for x in states[:, 0]:
        inputs = np.full((81, 1), x, np.float32), np.float32(grid[:, None])
        q = [each.critic.apply_fn(each.critic.params, *inputs).mean(axis=0) for each in agents[10:]]
        reward = 1 - (grid - 0.5 * x) ** 2
        expected = known_q(reward, alpha)
        assert np.abs(expected - reward).max() > 0.3  # the regulariser matters here
        # at the edges of the box a network and 90 samples are not exact
        np.testing.assert_allclose(np.mean(q, axis=0)[6:-6], expected[6:-6], atol=0.15)
    np.testing.assert_allclose(cql.act(agents[-1], states, config), states / 2, atol=0.15)
