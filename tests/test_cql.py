"""CQL, Cal-QL, SAC fine-tuning and RLPD beyond the authors' numbers (test_golden.py): modes,
micro-batches, a bandit with a known answer, returns of dataset and buffer, online batches."""

from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import read_metrics
from test_learning import trained
from test_losses import (
    B,
    batch_of,
    compiled,
    fresh,
)

SIZES = dict(hidden_dims=(16, 8), critic_hidden_dims=(16, 8), batch_size=B, num_actions=3)
ALL = ["cql", "cal_ql", "sac_finetune"]


@pytest.fixture(params=["cql", "cal_ql"])
def script(request):
    return request.getfixturevalue(request.param)


def batch_with_returns(script, seed):
    """Returns around the Q-values: some bound them, some do not; one is not known yet."""
    returns = np.random.default_rng(seed + 100).normal(size=B).astype(np.float32)
    returns[3] = -1e9
    return batch_of(script, seed).replace(mc_returns=returns)


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
def test_online_losses(sac_finetune):
    """Online the best of online_backup_actions counts, offline of backup_actions. The conservative
    mode's loss is SAC's and the price of the KL divergence from the reference, in units of |Q|."""
    script, key = sac_finetune, jax.random.PRNGKey(5)
    config = script.Config(**SIZES, mode="conservative", backup_actions=2, online_backup_actions=7)
    agent, batch = fresh(script, config), batch_with_returns(script, 0)
    found, _ = compiled(script, "online_critic_loss", config)(
        agent.critic.params, agent, batch, key
    )
    expected = [
        script.bellman_error(agent.critic.params, agent, batch, key, n, config)[0] for n in (7, 2)
    ]
    np.testing.assert_allclose(found, expected[0], rtol=1e-5)
    _, info = compiled(script, "critic_loss", config)(agent.critic.params, agent, batch, key)
    inputs = agent.critic.params, agent, batch, jax.random.split(key)[0], 2, config
    np.testing.assert_allclose(info["critic_loss"], script.bellman_error(*inputs)[0], rtol=1e-5)
    plain, _ = script.actor_loss(agent.actor.params, agent, batch, key, config)
    found, info = script.online_actor_loss(agent.actor.params, agent, batch, key, config)
    normals = [agent.actor.apply_fn(p, batch.observations).distribution
               for p in (agent.actor.params, agent.reference_params)]  # fmt: skip
    (m, std), (m0, std0) = ((np.float64(x.mean()), np.float64(x.stddev())) for x in normals)
    kl = (np.log(std0 / std) + (std**2 + (m - m0) ** 2) / (2 * std0**2) - 0.5).sum(axis=1).mean()
    np.testing.assert_allclose(info["kl"], kl, rtol=1e-4)
    actions = agent.actor.apply_fn(agent.actor.params, batch.observations).sample(seed=key)
    scale = np.abs(agent.critic.apply_fn(agent.critic.params, batch.observations, actions)).mean()
    price = np.exp(agent.kl_multiplier.params["log"])
    np.testing.assert_allclose(found - plain, price * scale * kl, rtol=1e-3)
    reference = agent.actor.apply_fn(agent.reference_params, batch.observations).distribution
    policy = lambda p: agent.actor.apply_fn(p, batch.observations).distribution  # noqa: E731
    slopes = [
        jax.grad(loss)(agent.actor.params)
        for loss in (
            lambda p: script.online_actor_loss(p, agent, batch, key, config)[0],
            lambda p: script.actor_loss(p, agent, batch, key, config)[0],
            lambda p: price * scale * policy(p).kl_divergence(reference).mean(),  # |Q| is constant
        )
    ]
    same = partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)
    jax.tree.map(lambda whole, *parts: same(whole, sum(parts)), *slopes)
    naive = script.Config(**SIZES, mode="naive")
    found, _ = script.online_actor_loss(agent.actor.params, agent, batch, key, naive)
    np.testing.assert_allclose(found, plain, rtol=1e-5)


@pytest.mark.parametrize("reference", ["frozen", "average"])
def test_an_online_update(reference, sac_finetune):
    """Three of Q by the online loss, each with its target; pi on the last part; the price, whose
    logarithm stays below 4.6; the temperature is held, the reference follows or stays."""
    script = sac_finetune
    config = script.Config(**SIZES, mode="conservative", critic_updates=3, reference=reference,
                           kl_limit=-9.0, kl_limit_end=-9.0)  # fmt: skip
    agent, batch = fresh(script, config), batch_of(script, 0, size=3 * B)
    price = agent.kl_multiplier.replace(params={"log": np.float32(4.599)})
    agent = agent.replace(kl_multiplier=price)
    new, _ = compiled(script, "online_update", config)(agent, batch)
    mix = lambda a, b: jax.tree.map(lambda x, y: config.tau * x + (1 - config.tau) * y, a, b)  # noqa: E731
    same = partial(jax.tree.map, partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5))
    for i in range(3):
        key, critic_key = jax.random.split(agent.key)
        part = jax.tree.map(lambda x, i=i: x[i * B : (i + 1) * B] if len(x) else x, batch)
        inputs = agent, part, critic_key, config
        critic, _ = script.gradient_step(agent.critic, script.online_critic_loss, *inputs)
        target = mix(critic.params, agent.target_critic_params)
        agent = agent.replace(critic=critic, target_critic_params=target, key=key)
    key, actor_key = jax.random.split(agent.key)
    inputs = agent, part, actor_key, config
    actor, _ = script.gradient_step(agent.actor, script.online_actor_loss, *inputs)
    same(new.critic.params, agent.critic.params)
    same(new.target_critic_params, agent.target_critic_params)
    same(new.actor.params, actor.params)
    moved = mix(actor.params, agent.reference_params)
    same(new.reference_params, moved if reference == "average" else agent.reference_params)
    assert float(new.kl_multiplier.params["log"]) == np.float32(4.6)
    assert new.temperature.params["log"] == agent.temperature.params["log"]
    np.testing.assert_array_equal(new.key, key)


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


def test_returns_of_the_buffer_are_those_of_the_dataset(cal_ql, pendulum, tmp_path, monkeypatch):
    """Two seeds, a ring that overflows: an episode's returns are there when it has ended, and a
    round's end cuts an episode like a time limit. Till then they are below every Q."""
    inserted, insert = set(), cal_ql.insert

    def spy(buffers, rows, position):
        inserted.update(rows.mc_returns.tolist() if isinstance(rows, cal_ql.Batch) else ())
        return insert(buffers, rows, position)

    monkeypatch.setattr(cal_ql, "insert", spy)
    flags = ["--dataset", pendulum, "--hidden-dims", "8", "--critic-hidden-dims", "8",
             "--batch-size", "16", "--num-seeds", "2", "--num-actions", "2",
             "--eval-episodes", "1", "--interval", "250", "--offline-steps", "10",
             "--online-steps", "330", "--warmup-steps", "320", "--buffer-size", "300",
             "--run-dir", str(tmp_path)]  # fmt: skip
    cal_ql.main(flags)
    assert inserted == {-1e9}
    arrays, meta = cal_ql.load(tmp_path)
    in_time = np.arange(30, 330) % 300
    rows = [arrays[f"buffers/{x}"][:, in_time] for x in ("rewards", "masks", "ends", "mc_returns")]
    config = cal_ql.Config(discount=meta["config"]["discount"])
    for rewards, masks, ends, returns in zip(*rows, strict=True):
        np.testing.assert_array_equal(np.flatnonzero(ends), [169, 219, 299])  # 200, 250, 330
        expected = by_hand(np.float64(rewards), masks, ends, 1.0, config)
        np.testing.assert_allclose(returns, expected, rtol=1e-4)


# ------------------------------------------------------------------------------------------- RLPD


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
