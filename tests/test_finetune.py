"""sac_finetune.py, rlpd.py and bc.py: their losses and updates against NumPy, the four modes at the
switch, what a batch is made of, and agents taken over from other scripts."""

import subprocess
import sys
from functools import partial

import jax
import numpy as np
import pytest
import test_cql
from conftest import ROOT
from test_cql import actor_of, batch_with_returns, critic_of, squashed, temperature_of
from test_learning import bandit_rows, best_action, first, one_agent
from test_losses import (
    OBS,
    STATE_NETWORKS,
    A,
    B,
    assert_same,
    batch_of,
    close,
    compiled,
    config_of,
    dense,
    float64,
    fresh,
    gaussian_log_prob,
    hidden,
    noise_of,
    parameters,
    replay,
    squashed_sample,
)
from test_run import Killed, assert_same_run, die, go, load, on_call, reused_agents, table

NETWORKS = ("actor", "critic", "temperature", "multiplier", "kl_multiplier")
STATE_NETWORKS |= {"sac_finetune": NETWORKS, "rlpd": ("actor", "critic", "temperature"),
                   "bc": ("actor",)}  # fmt: skip
SHAPES = dict(hidden_dims=(16, 8), critic_hidden_dims=(16, 8), batch_size=B, num_actions=3,
              warmup_steps=0, offline_ratio=0.5)  # fmt: skip


def normalised(tree, x, xp):
    """The hidden layers with LayerNorm before each ReLU."""
    layers = tree["MLP_0"]
    for i in range(len(layers) // 2):
        x = x @ layers[f"Dense_{i}"]["kernel"] + layers[f"Dense_{i}"]["bias"]
        centred = x - x.mean(axis=-1, keepdims=True)
        x = centred / xp.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-6)
        x = xp.maximum(x * layers[f"LayerNorm_{i}"]["scale"] + layers[f"LayerNorm_{i}"]["bias"], 0)
    return x


def normalised_q(params, observations, actions, xp):
    """(N, B) of critics with LayerNorm."""
    stacked, x = params["params"]["VmapCritic_0"], xp.concatenate([observations, actions], axis=1)
    members = [
        jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
        for i in range(len(stacked["ScalarHead_0"]["bias"]))
    ]
    return xp.stack(
        [
            (normalised(m, x, xp) @ m["ScalarHead_0"]["kernel"])[:, 0] + m["ScalarHead_0"]["bias"]
            for m in members
        ]
    )


# ----------------------------------------------------------------------------------- sac_finetune


def conservative_actor(p, s, b, noise, c, xp):
    """actor_of, with the KL from the reference policy: that of the Gaussians before tanh."""
    action, log_prob = squashed(p, b.observations, noise["actor"], xp)
    gaussians = []
    for tree in (p["params"], s["reference"]["params"]):
        features = hidden(tree, b.observations, xp)
        mean, raw = dense(tree, "Dense_0", features), dense(tree, "Dense_1", features)
        log_std = tree["log_std_scale"] * raw + tree["log_std_shift"]
        gaussians.append((mean, xp.exp(xp.clip(log_std, -20.0, 2.0))))
    (mean, std), (other_mean, other_std) = gaussians
    kl = xp.log(other_std / std) + (std**2 + (mean - other_mean) ** 2) / (2 * other_std**2) - 0.5
    kl = kl.sum(axis=1).mean()
    q = test_cql.q_of(s["critic"], b.observations, action, xp)
    temperature = xp.exp(s["temperature"]["params"]["log_temperature"])
    price = xp.exp(s["kl_multiplier"]["params"]["log_multiplier"])
    return (temperature * log_prob - q.min(axis=0)).mean() + price * xp.abs(q).mean() * kl, kl


@pytest.mark.parametrize("mode", ["naive", "conservative"])
def test_online_losses_are_those_of_sac(mode, sac_finetune):
    script, key = sac_finetune, jax.random.PRNGKey(5)
    config = script.Config(
        **SHAPES, mode=mode, critic_updates=1, backup_actions=7, online_backup_actions=2
    )
    # the critic: CQL's with weight 0
    plain = script.Config(**SHAPES, cql_alpha=0.0, backup_actions=2)
    noise = test_cql.noises_of(script, plain, jax.random.PRNGKey(0), key)
    noise["backup"] = test_cql.noise_of(script, plain, jax.random.split(key)[0], 2)
    for seed in range(5):
        state, batch = fresh(script, config, seed), batch_with_returns(script, seed)
        s, b = parameters(state), float64(batch)
        drawn = np.random.default_rng(seed + 50)
        reference = jax.tree.map(lambda x, rng=drawn: np.float32(x + 0.1 * rng.normal(
            size=x.shape)), state.actor.params)  # fmt: skip
        state = state.replace(reference_params=reference)
        s["reference"] = jax.tree.map(np.float64, reference)
        s["kl_multiplier"] = jax.tree.map(np.float64, state.kl_multiplier.params)
        found, _ = compiled(script, "online_critic_loss", config)(
            state.critic.params, state, batch, key
        )
        np.testing.assert_allclose(
            found, critic_of(s["critic"], s, b, noise, plain, np, False), rtol=1e-5
        )
        found, info = compiled(script, "online_actor_loss", config)(
            state.actor.params, state, batch, key
        )
        if mode == "naive":
            np.testing.assert_allclose(
                found, actor_of(s["actor"], s, b, noise, config, np), rtol=1e-5
            )
        else:
            expected, kl = conservative_actor(s["actor"], s, b, noise, config, np)
            np.testing.assert_allclose(found, expected, rtol=1e-4)
            np.testing.assert_allclose(info["kl"], kl, rtol=1e-4)
            assert kl > 0.01


def test_naive_updates_replayed_step_by_step(sac_finetune):
    """Q; then pi against the new Q, temperature; the target after Q."""
    script = sac_finetune
    config = script.Config(
        **SHAPES,
        critic_updates=1,
        learning_rate=1e-2,
        tau=0.2,
        cql_alpha=0.0,
        policy_learning_rate=3e-3,
    )
    state, noises = fresh(script, config), []
    batches, key = [batch_with_returns(script, i) for i in range(3)], state.key
    for _ in batches:
        key, critic_key = jax.random.split(key)
        key, actor_key = jax.random.split(key)
        noise = test_cql.noises_of(script, config, jax.random.PRNGKey(0), actor_key)
        noise["backup"] = test_cql.noise_of(script, config, jax.random.split(critic_key)[0], 1)
        noises.append(dict.fromkeys(("critic", "actor", "temperature"), noise))
    order = {"critic": (partial(critic_of, calibrated=False), ()), "actor": (actor_of, ("critic",)),
             "temperature": (temperature_of, ())}  # fmt: skip
    rates = {"critic": [1e-2] * 3, "actor": [3e-3] * 3, "temperature": [3e-3] * 3}
    s, moments = replay(
        parameters(state), [float64(b) for b in batches], noises, order, rates, config
    )
    update = compiled(script, "online_update", config)
    for batch in batches:
        state, _ = update(state, batch)
    assert_same(state, s, moments)


@pytest.mark.parametrize(("kl", "sign"), [(3.0, 1), (0.01, -1)])
def test_the_price_of_the_kl_rises_above_its_limit(kl, sign, sac_finetune):
    script = sac_finetune
    config = script.Config(**SHAPES, mode="conservative")
    state = fresh(script, config)
    inputs = state, np.float32(kl), config
    new, _ = script.gradient_step(state.kl_multiplier, script.kl_loss, *inputs)
    before, after = (x.apply_fn(x.params) for x in (state.kl_multiplier, new))
    assert np.sign(after - before) == sign
    late = state.replace(kl_multiplier=state.kl_multiplier.replace(step=config.kl_steps))
    low, _ = jax.grad(script.kl_loss, has_aux=True)(
        late.kl_multiplier.params, late, np.float32(1.9), config
    )
    high, _ = jax.grad(script.kl_loss, has_aux=True)(
        late.kl_multiplier.params, late, np.float32(2.1), config
    )
    signs = [float(jax.tree.leaves(x)[0]) > 0 for x in (low, high)]
    assert signs == [True, False]  # the limit is 2 by now


def test_the_price_of_the_kl_can_become_small(sac_finetune):
    """It is multiplied by mean |Q|: with a floor of 0.05 it was a fixed penalty, never a bound."""
    script = sac_finetune
    config = script.Config(**SHAPES, mode="conservative", critic_updates=1)
    state = fresh(script, config)
    low = jax.tree.map(lambda x: np.full_like(x, -5.0), state.kl_multiplier.params)
    state = state.replace(reference_params=state.actor.params,
                          kl_multiplier=state.kl_multiplier.replace(params=low))  # fmt: skip
    after, _ = compiled(script, "online_update", config)(state, batch_with_returns(script, 0))
    assert -5.1 < jax.tree.leaves(after.kl_multiplier.params)[0] < -5.0


def bandit(script, rows):
    zeros = np.zeros(len(rows["rewards"]), np.float32)
    fields = ("observations", "actions", "rewards", "next_observations")
    batch = script.Batch(*[np.float32(rows[name]) for name in fields], zeros)
    return jax.device_put(batch.replace(mc_returns=zeros))


def test_the_conservative_mode_holds_the_policy_and_naive_lets_it_go(sac_finetune):
    """On a bandit whose best action is far from the policy's, frozen reference, limit 0.05 nats."""
    script, moved = sac_finetune, {}
    dataset = bandit(script, bandit_rows())
    states = np.array([[-1.0], [1.0]], np.float32)
    for mode in ("naive", "conservative"):
        config = script.Config(
            mode=mode,
            hidden_dims=(32, 32),
            critic_hidden_dims=(32, 32),
            batch_size=64,
            tau=0.05,
            learning_rate=3e-3,
            policy_learning_rate=3e-3,
            critic_updates=1,
            warmup_steps=0,
            offline_ratio=1.0,
            kl_limit=0.05,
            kl_limit_end=0.05,
            kl_learning_rate=3e-2,
            utd_ratio=300,
        )
        state = one_agent(script, config, 1)
        state = jax.vmap(script.begin_online)(state)
        before = script.mode_actions(first(state), states)
        buffer = jax.device_put(script.empty_buffers(1, 1, script.blank_transition(1, 1)))
        buffer = buffer.replace(size=buffer.size + 1)
        for _ in range(4):
            state, _, info = script.online_step(
                state, buffer, np.ones((1, 1), np.float32), dataset, config, True
            )
        after = script.mode_actions(first(state), states)
        moved[mode] = np.abs(after - before).max(), np.abs(after[:, 0] - best_action(states)).max()
        if mode == "conservative":
            assert 0.02 < info["kl"][0] < 0.15  # the bound is used, not only kept
        assert (float(info["temperature"][0]) == 1.0) == (mode == "conservative")  # held
    assert moved["naive"][1] < 0.15  # it has found the best action
    assert moved["conservative"][0] < 0.5 * moved["naive"][0]


@pytest.mark.parametrize(("updates", "ratio", "offline"), [(4, 0.5, 8), (4, 0.0, 0), (1, 0.25, 4)])
@pytest.mark.parametrize("name", ["sac_finetune", "rlpd"])
def test_every_minibatch_has_its_share_of_dataset_rows(updates, ratio, offline, name, request):
    script = request.getfixturevalue(name)
    config = script.Config(offline_ratio=ratio, batch_size=B, critic_updates=updates)
    dataset = jax.device_put(batch_of(script, 0))
    rows = jax.tree.map(lambda x: x + 100, dataset)
    buffer = script.ReplayBuffer(rows, np.int32(3), np.int32(3))
    batch = script.online_batch(dataset, buffer, jax.random.PRNGKey(0), config)
    new = np.asarray(batch.rewards).reshape(updates, B) > 50
    np.testing.assert_array_equal((~new).sum(axis=1), [offline] * updates)
    again = script.online_batch(dataset, buffer, jax.random.PRNGKey(1), config)
    assert not np.array_equal(batch.rewards, again.rewards)


@pytest.fixture(scope="module")
def reused(sac_finetune):
    with reused_agents(sac_finetune) as patched:
        yield patched


@pytest.fixture(scope="module")
def flags(pendulum):
    return ["--dataset", str(pendulum), "--env-id", "Pendulum-v1", "--preset", "smoke",
            "--offline-steps", "40", "--online-steps", "120", "--log-interval", "20",
            "--eval-interval", "40", "--hidden-dims", "8", "--critic-hidden-dims", "8",
            "--num-actions", "2", "--resume", "run"]  # fmt: skip


@pytest.mark.parametrize("mode", ["naive", "mixed", "wsrl", "conservative"])
def test_a_mode_sets_what_is_open_and_resumes_to_the_same_bits(mode, reused, flags, tmp_path):
    folders = [tmp_path / name for name in ("whole", "killed")]
    for folder in folders:
        folder.mkdir()
    flags = [*flags, "--mode", mode, *(["--warmup-steps", "20"] if mode != "wsrl" else [])]
    done = go(reused, folders[0], flags)
    assert done.code == 0, done.err
    arrays, meta = load(folders[0] / "run")
    opened = {name: meta["config"][name] for name in reused.MODES[mode]}
    assert opened == reused.MODES[mode] | ({} if mode == "wsrl" else {"warmup_steps": 20})
    steps = arrays["state/critic/step"][0]
    # offline 40; WSRL's first 5,000 steps are the frozen policy's
    assert steps == 40 + (0 if mode == "wsrl" else 100 * opened["critic_updates"])
    moved = not np.array_equal(
        arrays["state/reference_params/params/Dense_0/kernel"],
        arrays["state/actor/params/params/Dense_0/kernel"],
    )
    assert moved == (mode != "wsrl")
    with pytest.raises(Killed), on_call(reused, "step_rollout", 70, die):
        go(reused, folders[1], flags)
    assert go(reused, folders[1], flags).code == 0
    assert_same_run(folders[1] / "run", folders[0] / "run")


def test_wsrl_updates_four_times_after_its_warmup(reused, flags, tmp_path):
    done = go(reused, tmp_path, [*flags, "--mode", "wsrl", "--warmup-steps", "100"])
    assert done.code == 0
    arrays, _ = load(tmp_path / "run")
    assert arrays["state/critic/step"][0] == 40 + 4 * 20
    assert arrays["state/actor/step"][0] == 40 + 20


@pytest.mark.parametrize("name", ["cql", "iql"])
@pytest.mark.parametrize("theirs, ours", [(1, 2), (2, 1)])
def test_networks_of_another_depth_are_refused(
    theirs, ours, name, request, sac_finetune, pendulum, tmp_path
):
    """Neither are layers left at random, nor layers of the checkpoint left out."""
    other = request.getfixturevalue(name)
    base = ["--dataset", str(pendulum), "--env-id", "Pendulum-v1", "--preset", "smoke"]

    def widths(script, depth):
        flags = ["--hidden-dims", *["8"] * depth]
        return flags if script == "iql" else [*flags, "--critic-hidden-dims", *["8"] * depth]

    done = go(
        other,
        tmp_path,
        [
            *base,
            *widths(name, theirs),
            "--offline-steps",
            "20",
            "--log-interval",
            "20",
            "--eval-interval",
            "20",
            "--online-steps",
            "0",
            "--run-dir",
            "theirs",
        ],
    )
    assert done.code == 0, done.err
    done = go(
        sac_finetune,
        tmp_path,
        [*base, *widths("", ours), "--init-from", "theirs", "--run-dir", "ours"],
    )
    assert done.code == 2 and len(done.err.splitlines()) == 1
    assert "Dense_" in done.err or "ScalarHead" in done.err


@pytest.mark.parametrize("name", ["cql", "cal_ql", "iql"])
def test_agents_of_other_scripts_are_taken_over(name, request, sac_finetune, pendulum, tmp_path):
    """With the same deterministic policy: the evaluation at the switch is theirs to the digit."""
    other = request.getfixturevalue(name)
    shapes = ["--hidden-dims", "16", "16", "--dataset", str(pendulum), "--env-id", "Pendulum-v1",
              "--preset", "smoke", "--eval-episodes", "3"]  # fmt: skip
    wide = [] if name == "iql" else ["--critic-hidden-dims", "16", "16"]
    done = go(
        other,
        tmp_path,
        [
            *shapes,
            *wide,
            "--offline-steps",
            "100",
            "--online-steps",
            "0",
            "--reward-scale",
            "0.5",
            "--run-dir",
            "theirs",
        ],
    )
    assert done.code == 0, done.err
    flags = [*shapes, "--critic-hidden-dims", "16", "16", "--online-steps", "20",
             "--log-interval", "20", "--eval-interval", "20", "--init-from", "theirs",
             "--run-dir", "ours"]  # fmt: skip
    done = go(sac_finetune, tmp_path, flags)
    assert done.code == 0, done.err
    theirs, ours = table(tmp_path / "theirs")[-1], table(tmp_path / "ours")[0]
    assert (ours["phase"], ours["step"]) == ("online", "0")
    np.testing.assert_allclose(float(ours["return"]), float(theirs["return"]), rtol=1e-4)
    arrays, meta = load(tmp_path / "ours")
    leaf = "state/temperature/params/params/log_temperature"
    begun = np.log(0.01) if name == "iql" else load(tmp_path / "theirs")[0][leaf]
    np.testing.assert_allclose(arrays[leaf], begun, rtol=1e-6)  # not SAC's usual 1
    assert meta["config"]["reward_scale"] == 0.5  # what is recorded is what was used
    refused = go(sac_finetune, tmp_path, [*flags[:-1], "new", "--reward-scale", "3"])
    assert refused.code == 2 and "was made with --reward-scale 0.5, not 3.0" in refused.err


def test_an_agent_of_another_kind_is_refused(sac_finetune, bc, pendulum, tmp_path):
    flags = ["--dataset", str(pendulum), "--env-id", "Pendulum-v1", "--preset", "smoke"]
    assert go(bc, tmp_path, [*flags, "--run-dir", "theirs"]).code == 0
    done = go(sac_finetune, tmp_path, [*flags, "--init-from", "theirs", "--run-dir", "ours"])
    assert done.code == 2 and "a checkpoint of bc.py" in done.err


# ------------------------------------------------------------------------------------------- RLPD


@pytest.mark.parametrize("entropy_backup", [True, False])
def test_rlpd_losses_are_the_papers(entropy_backup, rlpd):
    """Ensemble of 4 with LayerNorm, a random pair in the target, the actor against all four."""
    config = config_of(rlpd, num_critics=4, entropy_backup=entropy_backup)
    key = jax.random.PRNGKey(5)
    action_key, subset_key = jax.random.split(key)
    sac_noise = partial(noise_of, rlpd)
    chosen = np.asarray(jax.random.choice(subset_key, 4, (2,), replace=False))
    assert len(set(chosen.tolist())) == 2
    for seed in range(5):
        state, batch = fresh(rlpd, config, seed), batch_of(rlpd, seed)
        s, b = parameters(state), float64(batch)
        temperature = np.exp(s["temperature"]["params"]["log_temperature"])
        a, log_prob = squashed_sample(s["actor"], b.next_observations, sac_noise(action_key), np)
        next_v = normalised_q(s["target"], b.next_observations, a, np)[chosen].min(axis=0)
        next_v = next_v - temperature * log_prob * entropy_backup
        target = b.rewards + config.discount * b.masks * next_v
        expected = ((normalised_q(s["critic"], b.observations, b.actions, np) - target) ** 2).mean()
        found, _ = compiled(rlpd, "critic_loss", config)(state.critic.params, state, batch, key)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        a, log_prob = squashed_sample(s["actor"], b.observations, sac_noise(key), np)
        q = normalised_q(s["critic"], b.observations, a, np).mean(axis=0)
        found, _ = compiled(rlpd, "actor_loss", config)(state.actor.params, state, batch, key)
        np.testing.assert_allclose(found, (temperature * log_prob - q).mean(), rtol=1e-5)


def test_rlpd_makes_many_critic_updates_and_one_of_the_policy(rlpd):
    config = config_of(rlpd, num_critics=3, critic_updates=5)
    state, batch = fresh(rlpd, config), batch_of(rlpd, 0, size=5 * B)
    new, _ = compiled(rlpd, "update_step", config)(state, batch)
    assert (new.critic.step, new.actor.step, new.temperature.step) == (5, 1, 1)
    # the same by hand: the critic on each minibatch in turn, the policy on the last one only
    by_hand = state
    for i in range(5):
        key, critic_key = jax.random.split(by_hand.key)
        part = jax.tree.map(lambda x, i=i: x[i * B : (i + 1) * B], batch)
        critic, _ = rlpd.gradient_step(
            by_hand.critic, rlpd.critic_loss, by_hand, part, critic_key, config
        )
        target = jax.tree.map(lambda q, old: config.tau * q + (1 - config.tau) * old, critic.params,
                              by_hand.target_critic_params)  # fmt: skip
        by_hand = by_hand.replace(critic=critic, target_critic_params=target, key=key)
    key, actor_key = jax.random.split(by_hand.key)
    actor, _ = rlpd.gradient_step(by_hand.actor, rlpd.actor_loss, by_hand, part, actor_key, config)
    close(new.critic.params, by_hand.critic.params, rtol=1e-4, atol=1e-5)
    close(new.target_critic_params, by_hand.target_critic_params, rtol=1e-4, atol=1e-5)
    close(new.actor.params, actor.params, rtol=1e-4, atol=1e-5)


def test_rlpd_solves_a_bandit(rlpd):
    config = rlpd.Config(
        hidden_dims=(32, 32),
        learning_rate=3e-3,
        batch_size=64,
        tau=0.05,
        num_critics=3,
        critic_updates=2,
        utd_ratio=200,
        entropy_per_action=-1.0,
    )
    rows = bandit_rows()
    zeros = np.zeros(2000, np.float32)
    fields = ("observations", "actions", "rewards", "next_observations")
    dataset = jax.device_put(rlpd.Batch(*[np.float32(rows[name]) for name in fields], zeros))
    buffer = rlpd.ReplayBuffer(
        jax.tree.map(lambda x: x[None], dataset), np.full(1, 2000, np.int32), np.zeros(1, np.int32)
    )
    state = one_agent(rlpd, config, 1)
    for _ in range(8):
        state, *_ = rlpd.online_step(
            state, buffer, np.ones((1, 1), np.float32), dataset, config, True
        )
    states = np.array([[-1.0], [1.0]], np.float32)
    found = rlpd.mode_actions(first(state), states)[:, 0]
    np.testing.assert_allclose(found, best_action(states), atol=0.12)


# --------------------------------------------------------------------------------------------- BC


def test_bc_is_the_likelihood_of_the_data(bc):
    config = config_of(bc)
    for seed in range(5):
        state, batch = fresh_actor(bc, config, seed), batch_of(bc, seed)
        tree, b = jax.tree.map(np.float64, state.actor.params)["params"], float64(batch)
        mean = np.tanh(dense(tree, "Dense_0", hidden(tree, b.observations, np)))
        std = np.exp(np.clip(tree["log_std"], -5.0, 2.0))
        expected = -gaussian_log_prob(b.actions, mean, std, np).mean()
        found, info = compiled(bc, "actor_loss", config)(
            state.actor.params, state, batch, state.key
        )
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        np.testing.assert_allclose(info["mean_error"], np.abs(mean - b.actions).mean(), rtol=1e-5)


def fresh_actor(bc, config, seed):
    """test_losses.fresh for a script without a critic."""
    rng = np.random.default_rng(seed)
    state = bc.create_agent_state(jax.random.PRNGKey(seed), OBS, A, config)
    params = jax.tree.map(lambda x: np.float32(0.4 * rng.normal(size=x.shape)), state.actor.params)
    return state.replace(actor=state.actor.replace(params=params))


def test_bc_finds_the_mean_action_and_its_spread(bc):
    """States -1 and 1, actions N(0.4 s, 0.2): the maximum of the likelihood is known."""
    rng = np.random.default_rng(0)
    s = rng.choice([-1.0, 1.0], (4000, 1)).astype(np.float32)
    a = np.float32(0.4 * s + 0.2 * rng.normal(size=s.shape))
    zeros = np.zeros(len(s), np.float32)
    config = bc.Config(hidden_dims=(32, 32), learning_rate=3e-3, batch_size=256)
    state, _ = bc.update_steps(
        one_agent(bc, config, 1), bc.Batch(s, a, zeros, s, zeros), config, 1500
    )
    states = np.array([[-1.0], [1.0]], np.float32)
    np.testing.assert_allclose(bc.mode_actions(first(state), states), 0.4 * states, atol=0.04)
    policy = first(state).actor.apply_fn(first(state).actor.params, states)
    np.testing.assert_allclose(policy.stddev(), a[s == 1].std(), atol=0.02)


def test_percent_bc_keeps_the_best_trajectories(bc):
    lengths, rewards = [3, 1, 4, 2], [1.0, 5.0, 0.5, 4.0]
    arrays = {
        "rewards": np.repeat(rewards, lengths),
        "keep": np.ones(10, bool),
        "ends": np.concatenate([np.arange(n) == n - 1 for n in lengths]),
    }
    arrays["keep"][9] = False  # the next observation of this row is not known
    kept = dict(arrays)
    bc.keep_best(kept, 0.5)  # returns 3, 5, 2, 8: the second and the fourth
    np.testing.assert_array_equal(np.flatnonzero(kept["keep"]), [3, 8])
    one = dict(arrays)
    bc.keep_best(one, 0.0)
    np.testing.assert_array_equal(np.flatnonzero(one["keep"]), [8])
    every = dict(arrays)
    bc.keep_best(every, 1.0)
    np.testing.assert_array_equal(every["keep"], arrays["keep"])


@pytest.mark.parametrize("arguments", [["--online-steps", "10"], ["--init-from", "here"]])
def test_bc_has_no_online_phase(arguments, bc, pendulum, tmp_path):
    flags = ["--dataset", str(pendulum), "--env-id", "Pendulum-v1", "--preset", "smoke"]
    done = go(bc, tmp_path, [*flags, *arguments])
    assert done.code == 2 and len(done.err.splitlines()) == 1


def test_ten_critics_are_made_and_not_waited_for_for_ever():
    """A process of its own, for a hang in XLA ends no other way: its batched QR waited for itself
    on two cores. The published sizes, as small ones do not hang."""
    code = """
import sys
sys.path.insert(0, "baselines")
import rlpd
rlpd.use_all_cores(1)
shards = rlpd.create_shards(rlpd.Config(), 11, 3, rlpd.seed_devices(1))
print(shards[0].critic.params["params"]["VmapCritic_0"]["ScalarHead_0"]["bias"].shape)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          timeout=120)  # fmt: skip
    assert done.stdout.strip() == "(1, 10)", done.stderr
