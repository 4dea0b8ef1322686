"""TD3+BC and TD3-C: losses against NumPy, whole updates, the switch, the multiplier and its bound,
what a batch is made of, and a bandit that plain TD3 solves and the constraint holds back."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import read_arrays, read_metrics
from test_losses import B, batch_of, compiled, dense, float64, fresh, parameters, q_of

SIZES = dict(hidden_dims=(16, 8), batch_size=B)


@pytest.fixture(params=["td3_bc", "td3_c"])
def script(request):
    return request.getfixturevalue(request.param)


def pi_of(params, x):
    """tanh(MLP) of a Sequential: its layers are layers_0 (the MLP) and layers_1."""
    tree = params["params"]
    for name in sorted(tree["layers_0"]):
        x = np.maximum(dense(tree["layers_0"], name, x), 0)
    return np.tanh(dense(tree, "layers_1", x))


def fresh_agent(script, config, seed=0):
    """fresh, whose draws of eta and of targets stay, with another target and reference policy."""
    agent = fresh(script, config, seed)
    if script.__name__ == "td3_c":
        multiplier = script.create_multiplier(config)
        agent = agent.replace(multiplier=agent.multiplier.replace(params=multiplier.params))
    return agent


def adam(params, grads, moments, step, learning_rate):
    """(parameters, moments) after step `step` (from 1)."""
    first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, moments[0], grads)
    second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, moments[1], grads)
    rate, scale = learning_rate / (1 - 0.9**step), 1 - 0.999**step
    move = lambda p, m, v: p - rate * m / (np.sqrt(v / scale) + 1e-8)  # noqa: E731
    return jax.tree.map(move, params, first, second), (first, second)


def test_actor_losses_are_td3_bcs_and_td3s(td3_bc):
    config = td3_bc.Config(**SIZES, q_weight=1.7)
    for seed in range(4):
        agent, batch = fresh(td3_bc, config, seed), batch_of(td3_bc, seed)
        s, b = parameters(agent), float64(batch)
        actions = pi_of(s["actor"], b.observations)
        q = q_of(s["critic"], b.observations, actions, np)[0]
        loss = partial(td3_bc.actor_loss, agent.actor.params, agent, batch, None, config)
        expected = -1.7 * q.mean() / np.abs(q).mean() + ((actions - b.actions) ** 2).mean()
        np.testing.assert_allclose(loss()[0], expected, rtol=1e-4, atol=1e-5)
        expected = -q.mean() / np.abs(q).mean()
        np.testing.assert_allclose(loss(imitate=False)[0], expected, rtol=1e-4)


@pytest.mark.parametrize("reference", ["ema", "periodic", "frozen"])
def test_constrained_loss_pays_for_the_distance_from_its_reference(reference, td3_c):
    config = td3_c.Config(**SIZES, reference=reference, multiplier=3.0)
    field = {"ema": "target_actor_params", "periodic": "reference_params"}
    agent, batch = fresh_agent(td3_c, config), batch_of(td3_c, 0)
    s, b = parameters(agent), float64(batch)
    wanted = float64(getattr(agent, field.get(reference, "offline_actor_params")))
    actions = pi_of(s["actor"], b.observations)
    distance = ((actions - pi_of(wanted, b.observations)) ** 2).mean()
    q = q_of(s["critic"], b.observations, actions, np)[0]
    loss = compiled(td3_c, "constrained_loss", config)
    found, info = loss(agent.actor.params, agent, batch, None)
    np.testing.assert_allclose(found, -q.mean() / np.abs(q).mean() + 3 * distance, rtol=1e-4)
    np.testing.assert_allclose([info["constraint"], info["multiplier"]], [distance, 3], rtol=1e-4)
    config = dataclasses.replace(config, dual="annealed", anneal_updates=100)
    at = agent.replace(multiplier=agent.multiplier.replace(step=25))
    _, info = td3_c.constrained_loss(agent.actor.params, at, batch, None, config)
    np.testing.assert_allclose(info["multiplier"], 3 * 0.75, rtol=1e-5)


@pytest.mark.parametrize(("distance", "sign"), [(0.5, 1), (0.001, -1)])
def test_the_multiplier_rises_above_epsilon_and_falls_below(distance, sign, td3_c):
    config = td3_c.Config(epsilon=0.01, epsilon_end=0.03, epsilon_updates=10)
    multiplier = td3_c.create_multiplier(config)
    agent = type("Agent", (), {"multiplier": multiplier})
    inputs = agent, np.float32(distance), config
    new, _ = td3_c.gradient_step(multiplier, td3_c.dual_loss, *inputs)
    assert np.sign(new.params["eta"] - multiplier.params["eta"]) == sign
    for step, bound in ((0, 0.01), (5, 0.02), (99, 0.03)):
        agent.multiplier = multiplier.replace(step=step)
        loss, _ = td3_c.dual_loss(multiplier.params, agent, np.float32(0.5), config)
        np.testing.assert_allclose(loss, bound - 0.5, rtol=1e-4)  # softplus(eta) is 1 at first


@pytest.mark.parametrize("name", ["td3_bc", "td3_c"])
def test_updates_replayed_step_by_step(name, request):
    """Four online updates with a delay of two: Q; pi against the new Q, then the targets; the
    multiplier moves with the policy only, at its D before the step."""
    script = request.getfixturevalue(name)
    own = {"epsilon": 0.02} if name == "td3_c" else {}
    config = script.Config(**SIZES, learning_rate=1e-2, policy_learning_rate=3e-3, tau=0.2, **own)
    agent = fresh_agent(script, config)
    by_hand, moments = agent, {}
    for i in range(4):
        batch = batch_of(script, i)
        key, critic_key = jax.random.split(by_hand.key)
        grads = jax.grad(script.critic_loss, has_aux=True)
        grads, _ = grads(by_hand.critic.params, by_hand, batch, critic_key, config)
        old = moments.get("critic", (jax.tree.map(np.zeros_like, grads),) * 2)
        params, moments["critic"] = adam(by_hand.critic.params, grads, old, i + 1, 1e-2)
        by_hand = by_hand.replace(critic=by_hand.critic.replace(params=params), key=key)
        if i % 2:
            loss = script.constrained_loss if name == "td3_c" else script.actor_loss
            grads, info = jax.grad(loss, has_aux=True)(
                by_hand.actor.params, by_hand, batch, None, config
            )
            old = moments.get("actor", (jax.tree.map(np.zeros_like, grads),) * 2)
            params, moments["actor"] = adam(by_hand.actor.params, grads, old, i // 2 + 1, 3e-3)
            mix = lambda new, old: 0.2 * new + 0.8 * old  # noqa: E731
            by_hand = by_hand.replace(
                target_actor_params=jax.tree.map(mix, params, by_hand.target_actor_params),
                target_critic_params=jax.tree.map(
                    mix, by_hand.critic.params, by_hand.target_critic_params
                ),
                actor=by_hand.actor.replace(params=params),
            )
            if name == "td3_c":
                multiplier, _ = script.gradient_step(
                    by_hand.multiplier, script.dual_loss, by_hand, info["constraint"], config
                )
                by_hand = by_hand.replace(multiplier=multiplier)
        agent, _ = compiled(script, "online_update", config)(agent, batch)
    assert (agent.critic.step, agent.actor.step) == (4, 2)
    same = partial(np.testing.assert_allclose, rtol=2e-3, atol=3e-5)
    for field in ("target_actor_params", "target_critic_params"):
        jax.tree.map(same, getattr(agent, field), getattr(by_hand, field))
    jax.tree.map(same, parameters(agent), parameters(by_hand))
    np.testing.assert_array_equal(agent.key, by_hand.key)
    if name == "td3_c":
        assert agent.multiplier.step == 2
        jax.tree.map(same, agent.multiplier.opt_state, by_hand.multiplier.opt_state)


@pytest.mark.parametrize(("eta", "epsilon"), [(1.5, 0.0), (-3.0, 1e6)])
def test_the_multiplier_stays_in_its_bounds(eta, epsilon, td3_c):
    config = td3_c.Config(**SIZES, epsilon=epsilon, multiplier_max=1.5, policy_delay=1)
    agent = fresh_agent(td3_c, config)
    multiplier = agent.multiplier.replace(params={"eta": np.float32(eta)})
    agent = agent.replace(multiplier=multiplier)
    new, _ = compiled(td3_c, "online_update", config)(agent, batch_of(td3_c, 0))
    assert new.multiplier.step == 1 and float(new.multiplier.params["eta"]) == eta


def test_a_periodic_reference_is_taken_before_the_step(td3_c):
    config = td3_c.Config(**SIZES, reference="periodic", reference_period=2, policy_delay=1)
    agent, taken = fresh_agent(td3_c, config), []
    for i in range(4):
        before = agent.actor.params
        agent, info = compiled(td3_c, "online_update", config)(agent, batch_of(td3_c, i))
        same = jax.tree.map(np.array_equal, agent.reference_params, before)
        taken.append(all(jax.tree.leaves(same)))
        assert (float(info["constraint"]) == 0.0) == taken[-1]
    assert taken == [True, False, True, False]


def test_actions_in_training_are_noisy_and_bounded(td3_bc):
    config = td3_bc.Config(**SIZES, exploration_noise=0.1)
    agent = fresh(td3_bc, config)
    observation = batch_of(td3_bc, 0).observations[0]
    keys = jax.random.split(jax.random.PRNGKey(0), 2000)
    sample = jax.vmap(compiled(td3_bc, "explore", config), in_axes=(None, None, 0))
    actions, mean = sample(agent, observation, keys), td3_bc.act(agent, observation[None], config)
    assert np.abs(actions).max() <= 1
    loud = td3_bc.Config(**SIZES, exploration_noise=5.0)
    assert np.abs(td3_bc.explore(agent, observation, keys[0], loud)).max() == 1
    inside = np.abs(mean[0]) < 0.6
    np.testing.assert_allclose(np.std(actions, axis=0)[inside], 0.1, rtol=0.1)


def bandit_steps(script, config, count):
    """Online updates on a bandit whose best action in state s is s / 2."""
    rng = np.random.default_rng(0)
    s, a = rng.choice([-1.0, 1.0], (2000, 1)), rng.uniform(-1, 1, (2000, 1))
    rewards = 1 - (a - s / 2)[:, 0] ** 2
    rows = script.Batch(*map(np.float32, (s, a, rewards, s, np.zeros(2000), np.ones(2000))))
    inputs = jax.random.PRNGKey(0), rows.observations[:1], rows.actions[:1]
    agent = jax.tree.map(lambda x: jnp.asarray(x)[None], script.create_agent(*inputs, config))
    before = script.act(jax.tree.map(lambda x: x[0], agent), rows.observations[:200], config)
    agent, _ = script.update_steps(agent, rows, config, script.online_update, count)
    agent = jax.tree.map(lambda x: x[0], agent)
    after = script.act(agent, rows.observations[:200], config)
    return after, before, rows.observations[:200] / 2


def test_td3_finds_the_best_action_and_the_constraint_holds_the_policy(td3_bc, td3_c):
    sizes = dict(hidden_dims=(32, 32), batch_size=64, learning_rate=3e-3, tau=0.05)
    sizes |= dict(policy_learning_rate=3e-3)
    after, _, best = bandit_steps(td3_bc, td3_bc.Config(**sizes, online_loss="td3"), 2000)
    np.testing.assert_allclose(after, best, atol=0.12)
    config = td3_c.Config(**sizes, reference="frozen", epsilon=0.01, dual_learning_rate=0.1)
    after, before, _ = bandit_steps(td3_c, config, 2000)
    assert 0.003 < np.mean((after - before) ** 2) < 0.03  # the bound is used, and holds


@pytest.fixture(scope="module")
def flags(pendulum):
    return ["--dataset", pendulum, "--hidden-dims", "8", "--offline-steps", "40", "--interval",
            "40", "--online-steps", "80", "--warmup-steps", "10", "--batch-size", "16",
            "--eval-episodes", "1"]  # fmt: skip


def test_without_a_bound_it_is_plain_td3_to_the_bit(td3_bc, td3_c, flags, tmp_path):
    td3_bc.main([*flags, "--online-loss", "td3", "--run-dir", str(tmp_path / "plain")])
    td3_c.main([*flags, "--epsilon", "inf", "--run-dir", str(tmp_path / "free")])
    plain, free = (read_arrays(tmp_path / name) for name in ("plain", "free"))
    assert {name: free[name] for name in plain} == plain
    rows = read_metrics(tmp_path / "plain")
    assert rows[0]["distance_to_offline"] == "" and float(rows[-1]["distance_to_offline"]) > 0
    arrays, _ = td3_bc.load(tmp_path / "plain")
    assert arrays["agents/critic/opt_state/0/count"][0] == 70  # Adam began anew at the switch
    assert arrays["agents/critic/step"][0] == 40 + 70


def test_an_agent_of_td3_bc_goes_on_in_td3_c(td3_bc, td3_c, flags, tmp_path):
    td3_bc.main([*flags, "--online-steps", "0", "--run-dir", str(tmp_path / "theirs")])
    theirs = ["--init-from", str(tmp_path / "theirs"), "--run-dir", str(tmp_path / "ours")]
    td3_c.main([*flags, *theirs])
    rows, before = (read_metrics(tmp_path / name) for name in ("ours", "theirs"))
    assert rows[0]["return"] == before[-1]["return"] and rows[0]["step"] == "0"
    arrays, _ = td3_c.load(tmp_path / "ours")
    offline = arrays["agents/offline_actor_params/params/layers_1/kernel"]
    its = td3_c.load(tmp_path / "theirs")[0]["agents/actor/params/params/layers_1/kernel"]
    np.testing.assert_array_equal(offline, its)
    assert math.isfinite(float(rows[-1]["distance_to_reference"]))
