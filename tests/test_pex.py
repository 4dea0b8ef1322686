"""PEX: losses against NumPy, the choice between two policies' proposals, what an online update
moves and in which order, and IQL's runs, which go on here."""

from functools import partial

import jax
import numpy as np
import pytest
from conftest import read_metrics
from test_losses import (
    B,
    batch_of,
    compiled,
    float64,
    fresh,
    gaussian,
    gaussian_log_prob,
    parameters,
    q_of,
    v_of,
)

SIZES = dict(hidden_dims=(16, 8), batch_size=B)
close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)


def drawn(script, config, observations, key, narrow=False):
    """An agent, its composite actions and choices, and by NumPy both proposals and their Q. With
    `narrow` the new policy has a standard deviation of e^-5."""
    agent = fresh(script, config)
    if narrow:
        agent.new_actor.params["params"]["log_std"][:] = -5.0
    s, x = parameters(agent), np.float64(observations)
    old, (mean, std) = gaussian(s["actor"], x, np)[0], gaussian(s["new_actor"], x, np)
    noise = np.float64(jax.random.normal(jax.random.split(key)[0], mean.shape))
    proposals = old, np.clip(mean + std * noise, -1, 1)
    q = np.stack([q_of(s["critic"], x, a, np).min(axis=0) for a in proposals])
    return agent, *compiled(script, "composite", config)(agent, observations, key), proposals, q


def test_losses_by_hand(pex):
    config = pex.Config(**SIZES, expectile=0.8, beta=2.0, max_weight=1.5)
    agent, batch = fresh(pex, config), batch_of(pex, 0)
    s, b = parameters(agent), float64(batch)
    v, next_v = (v_of(s["value"], x, np) for x in (b.observations, b.next_observations))
    u = q_of(s["target"], b.observations, b.actions, np).min(axis=0) - v
    errors = q_of(s["critic"], b.observations, b.actions, np) - b.rewards - 0.99 * b.masks * next_v
    weight = np.minimum(np.exp(2 * u), 1.5)
    wanted = {
        "value": (np.where(u < 0, 0.2, 0.8) * u**2).mean(),
        "critic": (errors**2).mean(axis=1).sum(),
    }
    for name in ("actor", "new_actor"):
        policy = gaussian(s[name], b.observations, np)
        wanted[name] = -(weight * gaussian_log_prob(b.actions, *policy, np)).mean()
    for name, expected in wanted.items():
        loss = compiled(pex, f"{name.removeprefix('new_')}_loss", config)
        close(loss(getattr(agent, name).params, agent, batch, jax.random.PRNGKey(0))[0], expected)


@pytest.mark.parametrize("sharpness", [0.0, 3.0, 10.0])
def test_choice_frequencies_are_the_softmax_of_q(pex, sharpness):
    """In three states, from each 20,000 draws; then by the environment's own action."""
    config = pex.Config(**SIZES, sharpness=sharpness)
    states = 3 * batch_of(pex, 1).observations[:3]  # (3, O)
    rows, key = np.repeat(states, 20_000, axis=0), jax.random.PRNGKey(0)
    agent, _, chosen, _, q = drawn(pex, config, rows, key, narrow=True)
    wanted = (1 / (1 + np.exp(sharpness * (q[0] - q[1])))).reshape(3, -1).mean(axis=1)
    found = np.asarray(chosen).reshape(3, -1).mean(axis=1)
    np.testing.assert_allclose(found, wanted, atol=0.015)
    assert sharpness != 10 or np.ptp(wanted) > 0.05  # the states differ
    act = jax.vmap(compiled(pex, "explore", config), in_axes=(None, None, 0))
    actions = act(agent, states[0], jax.random.split(key, 20_000))  # (20_000, A)
    old = gaussian(parameters(agent)["actor"], np.float64(states[:1]), np)[0]
    share = np.mean(np.abs(actions - old).max(axis=1) > 1e-4)
    np.testing.assert_allclose(share, wanted[0], atol=0.015)


def test_a_composite_action_is_one_of_two_proposals(pex):
    """The offline policy's mode or a sample of the new one, in the box; each row has its own."""
    config = pex.Config(**SIZES, sharpness=0.5)
    inputs = batch_of(pex, 1, 200).observations, jax.random.PRNGKey(4)
    _, actions, chosen, proposals, _ = drawn(pex, config, *inputs)
    close(actions, np.where(np.asarray(chosen)[:, None] == 1, *proposals[::-1]))
    assert 20 < chosen.sum() < 180 and np.abs(proposals[1]).max() == 1


def test_evaluation_takes_the_better_mode_once_the_new_policy_has_learnt(pex):
    config, observations = pex.Config(**SIZES), batch_of(pex, 1, 100).observations
    agent = fresh(pex, config)
    s, x = parameters(agent), np.float64(observations)
    modes = [gaussian(s[name], x, np)[0] for name in ("actor", "new_actor")]
    q = np.stack([q_of(s["critic"], x, a, np).min(axis=0) for a in modes])
    close(pex.act(agent, observations, config), modes[0])
    agent = agent.replace(new_actor=agent.new_actor.replace(step=1))
    better = (q[1] > q[0])[:, None]
    assert 10 < better.sum() < 90
    close(pex.act(agent, observations, config), np.where(better, *modes[::-1]))


def test_an_online_update_step_by_step(pex):
    """V; Q with the old V; the target; the new policy on composite actions, with the new of all."""
    config = pex.Config(**SIZES, learning_rate=3e-2, tau=0.2)
    agent, batch = fresh(pex, config), batch_of(pex, 0)

    @jax.jit
    def by_hand(agent):
        key, draw_key, actor_key = jax.random.split(agent.key, 3)
        inputs = agent, batch, None, config
        value, _ = pex.gradient_step(agent.value, pex.value_loss, *inputs)
        critic, _ = pex.gradient_step(agent.critic, pex.critic_loss, *inputs)
        mix = lambda new, old: 0.2 * new + 0.8 * old  # noqa: E731
        target = jax.tree.map(mix, critic.params, agent.target_critic_params)
        between = agent.replace(value=value, critic=critic, target_critic_params=target, key=key)
        actions, chosen = pex.composite(between, batch.observations, draw_key, config)
        inputs = between, batch.replace(actions=actions), actor_key, config
        new_actor, _ = pex.gradient_step(agent.new_actor, pex.actor_loss, *inputs)
        return between.replace(new_actor=new_actor), chosen.mean()

    found, info = compiled(pex, "online_update", config)(agent, batch)
    expected, share = by_hand(agent)
    jax.tree.map(partial(close, rtol=1e-3, atol=1e-4), found, expected)
    jax.tree.map(np.testing.assert_array_equal, found.actor, agent.actor)  # frozen
    close(info["new_share"], share)


def test_half_of_an_online_batch_is_old(pex):
    numbers = np.float32([*range(-300, 100), *[1e6] * 400])
    rows = [pex.Batch(*[jax.device_put(x)] * 6) for x in np.split(numbers, [300])]
    config = pex.Config(batch_size=10_000)
    batch = pex.online_batch(*rows, 100, jax.random.PRNGKey(0), config)
    assert (batch.rewards < 0).sum() == 5000 and batch.rewards.max() == 99


def test_every_preset_of_iql_has_its_networks_and_units_here(iql, pex):
    """But locomotion's, whose rewards PEX's authors leave as they are. The new policy's std is
    learnt where the old one's is constant."""
    for preset in sorted({*iql.PRESETS} - {"mujoco"}):
        made = []
        for script in (iql, pex):
            found = next(name for name in script.PRESETS if name in preset)
            config = script.dataclasses.replace(script.Config(), **script.PRESETS[found])
            start = partial(script.create_agent, config=config)
            agent = jax.eval_shape(start, jax.random.PRNGKey(0), np.zeros((1, 3)), np.zeros((1, 2)))
            parts = agent.actor.params, agent.critic.params, agent.value.params
            units = config.normalize_returns, config.reward_scale, config.reward_shift
            made.append((jax.tree.map(lambda x: x.shape, parts), units, config.log_std_range))
        assert made[0] == made[1], preset
    config = pex.dataclasses.replace(pex.Config(), **pex.PRESETS["ogbench"])
    agent = pex.create_agent(jax.random.PRNGKey(0), np.zeros((1, 3)), np.zeros((1, 2)), config)
    agent.new_actor.params["params"]["log_std"] = np.float32([-1.0, 1.0])
    policy = agent.new_actor.apply_fn(agent.new_actor.params, np.zeros((1, 3)))
    np.testing.assert_allclose(policy.stddev()[0], np.exp([-1, 1]), rtol=1e-6)
    assert (agent.actor.apply_fn(agent.actor.params, np.zeros((1, 3))).stddev() == 1).all()


def test_iqls_runs_go_on_with_its_policy_frozen(iql, pex, pendulum, tmp_path):
    flags = ["--dataset", pendulum, "--hidden-dims", "8", "--offline-steps", "40", "--interval",
             "40", "--batch-size", "16", "--eval-episodes", "2",
             "--no-normalize-returns"]  # fmt: skip
    iql.main([*flags, "--online-steps", "0", "--run-dir", str(tmp_path / "iql")])
    own = ["--online-steps", "80", "--warmup-steps", "10", "--run-dir", str(tmp_path / "pex")]
    pex.main([*flags, *own, "--init-from", str(tmp_path / "iql")])
    rows, before = (read_metrics(tmp_path / name) for name in ("pex", "iql"))
    assert rows[0]["return"] == before[-1]["return"] and rows[0]["step"] == "0"
    assert rows[0]["new_share"] == "" and 0 <= float(rows[-1]["new_share"]) <= 1
    theirs, ours = (script.load(tmp_path / script.__name__)[0] for script in (iql, pex))
    frozen = [name for name in theirs if name.startswith("agents/actor")]
    assert frozen and all((theirs[name] == ours[name]).all() for name in frozen)
    assert ours["agents/new_actor/step"] == [70] and ours["agents/critic/step"] == [40 + 70]
