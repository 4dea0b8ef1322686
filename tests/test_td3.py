"""td3_bc.py and td3_c.py: every loss and whole updates against NumPy, what happens at the switch,
the constraint from both its ends (nothing moves; plain TD3 to the bit), references and replays."""

import dataclasses
import math
from functools import lru_cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_learning import bandit_rows, best_action, first, one_agent
from test_losses import (
    OBS,
    A,
    B,
    adam,
    batch_of,
    close,
    compiled,
    config_of,
    constant,
    dense,
    float64,
    hidden,
    q_of,
    template,
)
from test_run import (
    Killed,
    assert_same_run,
    die,
    differing,
    go,
    load,
    on_call,
    reused_agents,
    table,
)

EXTRA = ("state/multiplier", "state/reference_params", "state/best_return")  # only in td3_c.py
OWN = ("constraint", "multiplier", "distance_to_reference")  # columns that only td3_c.py has


@pytest.fixture(params=["td3_bc", "td3_c"])
def script(request):
    return request.getfixturevalue(request.param)


def fresh(script, config, seed=0):
    """An agent with random parameters everywhere, targets, offline policy and reference apart."""
    rng, state = np.random.default_rng(seed), template(script, config)

    def draw(tree):
        return jax.tree.map(lambda x: np.float32(0.4 * rng.normal(size=x.shape)), tree)

    state = state.replace(
        actor=state.actor.replace(params=draw(state.actor.params)),
        critic=state.critic.replace(params=draw(state.critic.params)),
        target_actor_params=draw(state.actor.params), key=jax.random.PRNGKey(seed),
        target_critic_params=draw(state.critic.params),
        offline_actor_params=draw(state.actor.params),
    )
    if script.__name__ == "td3_bc":
        return state
    multiplier = state.multiplier.replace(params={"eta": np.float32(0.3)})
    return state.replace(multiplier=multiplier, reference_params=draw(state.actor.params))


def parameters(state):
    """{name: parameters in float64}."""
    trees = {"actor": state.actor.params, "critic": state.critic.params,
             "target": state.target_critic_params, "target_actor": state.target_actor_params,
             "frozen": state.offline_actor_params, "ema": state.target_actor_params}  # fmt: skip
    if hasattr(state, "multiplier"):
        trees |= {"eta": state.multiplier.params["eta"], "periodic": state.reference_params,
                  "best": state.reference_params}  # fmt: skip
    return jax.tree.map(lambda x: np.asarray(x, np.float64), trees)


# ------------------------------------------------------------------------------ Losses, written out
# p is differentiated; what the paper's gradient does not see is taken from s, the same parameters.


def pi_of(params, observations, xp):
    return xp.tanh(dense(params["params"], "Dense_0", hidden(params["params"], observations, xp)))


def critic_of(p, s, b, noise, c, xp):
    a = pi_of(s["target_actor"], b.next_observations, xp)
    a = xp.clip(a + xp.clip(c.target_noise * noise, -c.noise_clip, c.noise_clip), -1, 1)
    next_q = q_of(s["target"], b.next_observations, a, xp)
    target = b.rewards + c.discount * b.masks * next_q.min(axis=0)
    q = q_of(p, b.observations, b.actions, xp)
    return sum(((q[i] - target) ** 2).mean() for i in range(len(q)))


def td3_of(p, s, b, c, xp):
    q = q_of(s["critic"], b.observations, pi_of(p, b.observations, xp), xp)[0]
    seen = q_of(s["critic"], b.observations, pi_of(s["actor"], b.observations, xp), xp)[0]
    return -q.mean() / (xp.abs(seen).mean() if c.normalize_q else 1)


def bc_of(p, s, b, c, xp):
    imitation = ((pi_of(p, b.observations, xp) - b.actions) ** 2).sum() / (len(b.actions) * A)
    return c.q_weight * td3_of(p, s, b, c, xp) + imitation


def distance_of(p, s, b, c, xp):
    difference = pi_of(p, b.observations, xp) - pi_of(s[c.reference], b.observations, xp)
    return (difference**2).sum() / (len(b.actions) * A)


def constrained_of(p, s, b, c, xp):
    return td3_of(p, s, b, c, xp) + xp.log1p(xp.exp(s["eta"])) * distance_of(p, s, b, c, xp)


def dual_of(p, s, b, c, xp):
    return xp.log1p(xp.exp(p)) * (c.epsilon - distance_of(s["actor"], s, b, c, xp))


# ------------------------------------------------------------------------- Losses against NumPy


def test_critic_loss_is_td3s(td3_bc):
    """With three critics; the noise is wide, so that both clips are reached and both are not."""
    config = config_of(td3_bc, num_critics=3, target_noise=0.6)
    key, clipped, bounded = jax.random.PRNGKey(5), 0.0, 0.0
    noise = np.float64(jax.random.normal(key, (B, A)))
    for seed in range(5):
        state, batch = fresh(td3_bc, config, seed), batch_of(td3_bc, seed)
        s, b = parameters(state), float64(batch)
        found, info = compiled(td3_bc, "critic_loss", config)(
            state.critic.params, state, batch, key)
        expected = critic_of(s["critic"], s, b, noise, config, np)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        np.testing.assert_allclose(
            info["q"], q_of(s["critic"], b.observations, b.actions, np).mean(), rtol=1e-4)
        smooth = np.clip(0.6 * noise, -0.5, 0.5)
        action = pi_of(s["target_actor"], b.next_observations, np)
        clipped += (np.abs(0.6 * noise) > 0.5).mean() / 5
        bounded += (np.abs(action + smooth) > 1).mean() / 5
    assert 0.1 < clipped < 0.9 and 0.1 < bounded < 0.9


@pytest.mark.parametrize("normalize_q", [True, False])
def test_actor_losses_are_td3_bcs_and_td3s(normalize_q, td3_bc):
    config = config_of(td3_bc, normalize_q=normalize_q)
    always = dataclasses.replace(config, normalize_q=True)
    for seed in range(5):
        state, batch = fresh(td3_bc, config, seed), batch_of(td3_bc, seed)
        s, b = parameters(state), float64(batch)
        inputs = state.actor.params, state, batch, None
        found, info = compiled(td3_bc, "actor_loss", config)(*inputs)
        np.testing.assert_allclose(found, bc_of(s["actor"], s, b, always, np), rtol=1e-4)
        imitation = np.mean((pi_of(s["actor"], b.observations, np) - b.actions) ** 2)
        np.testing.assert_allclose(info["imitation"], imitation, rtol=1e-5)
        found, info = compiled(td3_bc, "td3_loss", config)(*inputs)
        np.testing.assert_allclose(found, td3_of(s["actor"], s, b, config, np), rtol=1e-4)


@pytest.mark.parametrize("reference", ["ema", "periodic", "best", "frozen"])
def test_constrained_loss_pays_for_the_distance_from_its_reference(reference, td3_c):
    config = config_of(td3_c, reference=reference)
    distances = []
    for seed in range(3):
        state, batch = fresh(td3_c, config, seed), batch_of(td3_c, seed)
        s, b = parameters(state), float64(batch)
        found, info = compiled(td3_c, "constrained_loss", config)(
            state.actor.params, state, batch, None)
        expected = constrained_of(s["actor"], s, b, config, np)
        np.testing.assert_allclose(found, expected, rtol=1e-4)
        distance = distance_of(s["actor"], s, b, config, np)
        np.testing.assert_allclose(info["constraint"], distance, rtol=1e-4)
        np.testing.assert_allclose(info["multiplier"], math.log1p(math.exp(0.3)), rtol=1e-5)
        distances.append(distance)
    assert min(distances) > 0.05


@pytest.mark.parametrize(("done", "price"), [(0, 0.8), (100, 0.6), (399, 0.002), (1000, 0.0)])
def test_annealed_multiplier_falls_on_a_line(done, price, td3_c):
    config = config_of(td3_c, dual="annealed", multiplier=0.8, anneal_updates=400)
    state, batch = fresh(td3_c, config), batch_of(td3_c, 0)
    state = state.replace(multiplier=state.multiplier.replace(step=np.int32(done)))
    s, b = parameters(state), float64(batch)
    found, info = compiled(td3_c, "constrained_loss", config)(
        state.actor.params, state, batch, None)
    np.testing.assert_allclose(info["multiplier"], price, rtol=1e-4, atol=1e-7)
    expected = td3_of(s["actor"], s, b, config, np) + price * info["constraint"]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_annealed_multiplier_falls_with_the_steps_of_the_policy(td3_c):
    config = config_of(td3_c, dual="annealed", multiplier=0.8, anneal_updates=4)
    state, step = fresh(td3_c, config), compiled(td3_c, "constrained_step", config)
    for price in (0.8, 0.6, 0.4, 0.2, 0.0, 0.0):
        state, info = step(state, batch_of(td3_c, 0))
        np.testing.assert_allclose(info["multiplier"], price, atol=1e-6)


def test_dual_loss_and_the_line_of_its_bound(td3_c):
    """softplus(eta) (epsilon - D), epsilon from 0.1 to 0.3 in 50 updates."""
    config = config_of(td3_c, epsilon=0.1, epsilon_end=0.3, epsilon_updates=50)
    flat, state = config_of(td3_c, epsilon=0.1), fresh(td3_c, config)
    for done, bound in ((0, 0.1), (25, 0.2), (50, 0.3), (400, 0.3)):
        moved = state.replace(multiplier=state.multiplier.replace(step=np.int32(done)))
        for settings, epsilon in ((config, bound), (flat, 0.1)):
            loss, _ = td3_c.dual_loss({"eta": 0.3}, moved, np.float32(0.25), settings)
            expected = math.log1p(math.exp(0.3)) * (epsilon - 0.25)
            np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("distance", "sign"), [(2e-4, 1), (0.5e-4, -1)])
def test_the_multiplier_rises_above_epsilon_and_falls_below(distance, sign, td3_c):
    config = config_of(td3_c)
    state = fresh(td3_c, config)
    new, _ = td3_c.gradient_step(
        state.multiplier, td3_c.dual_loss, state, np.float32(distance), config)
    move = float(new.params["eta"] - state.multiplier.params["eta"])
    np.testing.assert_allclose(move, sign * 1e-2, rtol=1e-2)  # Adam's first step: its rate


@pytest.mark.parametrize(("eta", "far", "bound"), [(49.5, True, 50.0), (-2.5, False, -3.0)])
def test_the_multiplier_stays_in_its_bounds(eta, far, bound, td3_c):
    """One step of size 1 from near a bound, upwards far from the reference, downwards at it."""
    config = config_of(td3_c, epsilon=0.02, dual_learning_rate=1.0, reference="frozen",
                       multiplier_max=50.0)
    state, batch = fresh(td3_c, config), batch_of(td3_c, 0)
    multiplier = state.multiplier.replace(params={"eta": np.float32(eta)})
    state = state.replace(multiplier=multiplier)
    if not far:
        state = state.replace(offline_actor_params=state.actor.params)
    new, info = compiled(td3_c, "constrained_step", config)(state, batch)
    assert (info["constraint"] > 0.02) == far
    np.testing.assert_allclose(new.multiplier.params["eta"], bound, rtol=1e-6)


def test_the_multiplier_begins_where_it_should(td3_c):
    for price in (0.05, 100.0):
        config = td3_c.Config(hidden_dims=(4,), multiplier=price)
        state = td3_c.create_agent_state(jax.random.PRNGKey(0), OBS, A, config)
        found = state.multiplier.apply_fn(state.multiplier.params["eta"])
        np.testing.assert_allclose(found, price, rtol=1e-5)


def test_q_of_nothing_is_not_divided_by_zero(td3_bc):
    """Where all rewards are 0 so is Q: what is left is the imitation."""
    config = config_of(td3_bc)
    state, batch = fresh(td3_bc, config), batch_of(td3_bc, 0)
    zero = state.critic.replace(params=constant(state.critic.params, [0.0, 0.0]))
    grads, info = jax.jit(jax.grad(partial(td3_bc.actor_loss, config=config), has_aux=True))(
        state.actor.params, state.replace(critic=zero), batch, None)
    assert info["actor_loss"] == info["imitation"]
    assert all(np.isfinite(x).all() and np.any(x) for x in jax.tree.leaves(grads))


# ----------------------------------------------------------------- Whole updates, replayed


def replay(s, batches, noises, c, policy_loss):
    """[(parameters, moments of Adam)] after each update, by the paper's box: the critic; each time
    that it is due the policy against the new critic (and the multiplier, at the D before it), then
    both targets."""
    zeros = jax.tree.map(np.zeros_like, s)
    moments = {name: (zeros[name], zeros[name]) for name in ("critic", "actor", "eta") if name in s}
    rates = {"actor": c.policy_learning_rate, "eta": getattr(c, "dual_learning_rate", 0)}
    losses, states = {"actor": policy_loss, "eta": dual_of}, []
    with jax.enable_x64(True):
        gradient = {name: jax.jit(jax.grad(partial(loss, c=c, xp=jnp)))
                    for name, loss in losses.items()}
        critic_gradient = jax.jit(jax.grad(partial(critic_of, c=c, xp=jnp)))
        for i, (b, noise) in enumerate(zip(batches, noises, strict=True), 1):
            grads = jax.device_get(critic_gradient(s["critic"], s, b, noise))
            new, moments["critic"] = adam(
                s["critic"], grads, moments["critic"], i, c.learning_rate)
            s = s | {"critic": new}
            if i % c.policy_delay == 0:
                before = s
                for name in ("actor", "eta") if "eta" in s else ("actor",):
                    grads = jax.device_get(gradient[name](before[name], before, b))
                    new, moments[name] = adam(
                        before[name], grads, moments[name], i // c.policy_delay, rates[name])
                    s = s | {name: new}
                for target, online in (("target", "critic"), ("target_actor", "actor")):
                    moved = jax.tree.map(
                        lambda x, old: c.tau * x + (1 - c.tau) * old, s[online], s[target])
                    s = s | {target: moved}
                s = s | {"ema": s["target_actor"]}
            states.append((s, dict(moments)))
    return states


CASES = {
    "TD3+BC": ("td3_bc", "update_step", bc_of, {}),
    "online as TD3": ("td3_bc", "online_update", td3_of, {"online_loss": "td3"}),
    "TD3-C": ("td3_c", "online_update", constrained_of, {"epsilon": 0.02}),
    "TD3+BC, delay 3": ("td3_bc", "update_step", bc_of, {"policy_delay": 3}),
}


@pytest.mark.parametrize("case", CASES)
def test_updates_replayed_step_by_step(case, request):
    """Q each time; pi, the multiplier and the targets at the 2nd and 4th of 5 updates (with a delay
    of 3 at the 3rd)."""
    name, function, loss, settings = CASES[case]
    script = request.getfixturevalue(name)
    config = config_of(
        script, learning_rate=1e-2, policy_learning_rate=3e-3, tau=0.2, **settings)
    state = fresh(script, config)
    batches, noises, key = [batch_of(script, i) for i in range(5)], [], state.key
    for _ in batches:
        key, critic_key = jax.random.split(key)
        noises.append(np.float64(jax.random.normal(critic_key, (B, A))))
    wide = [float64(batch) for batch in batches]
    expected = replay(parameters(state), wide, noises, config, loss)
    update = compiled(script, function, config)
    for i, batch in enumerate(batches):
        before = state
        state, info = update(state, batch)
        found = parameters(state)
        close(found, expected[i][0], rtol=1e-3, atol=2e-4)
        if (i + 1) % config.policy_delay:
            still = [(x.actor, x.target_actor_params, x.target_critic_params)
                     for x in (before, state)]
            assert all(jax.tree.leaves(jax.tree.map(np.array_equal, *still)))
            assert info["actor_loss"] == 0
        else:  # counted twofold where it is one of two
            s = expected[i - 1][0] | {"critic": expected[i][0]["critic"]}
            logged = loss(s["actor"], s, wide[i], config, np)
            np.testing.assert_allclose(
                info["actor_loss"], config.policy_delay * logged, rtol=2e-3, atol=1e-4)
            if "eta" in s:  # at the D of the old policy: Adam's step hides it, its memory does not
                memory = state.multiplier.opt_state[0].mu["eta"]
                np.testing.assert_allclose(memory, expected[i][1]["eta"][0], rtol=1e-3)
    np.testing.assert_array_equal(state.key, key)
    assert state.critic.step == 5 and state.actor.step == 5 // config.policy_delay


def test_online_as_offline(td3_bc):
    """With --online-loss bc the offline update goes on: the same program."""
    programs = {}
    for loss in ("bc", "td3"):
        config = config_of(td3_bc, online_loss=loss)
        for name in ("update_step", "online_update"):
            trace = jax.make_jaxpr(partial(getattr(td3_bc, name), config=config))
            programs[loss, name] = str(trace(fresh(td3_bc, config), batch_of(td3_bc, 0)))
    assert programs["bc", "online_update"] == programs["bc", "update_step"]
    assert programs["td3", "online_update"] != programs["td3", "update_step"]


# --------------------------------------------------------------------------------- At the switch


@pytest.mark.parametrize("optimizer", ["reset", "carried"])
def test_the_switch(optimizer, script):
    """Target and compared policy are the policy, the critic's target stays; Adam forgets or not."""
    config = config_of(script, online_optimizer=optimizer)
    state = fresh(script, config)
    used = {name: getattr(state, name) for name in ("actor", "critic")}
    used = {name: each.replace(opt_state=jax.tree.map(np.ones_like, each.opt_state))
            for name, each in used.items()}  # fmt: skip
    state = state.replace(**used)
    new = script.begin_finetuning(state, config)
    for name in ("target_actor_params", "offline_actor_params"):
        close(getattr(new, name), state.actor.params, rtol=0, atol=0)
    close(new.target_critic_params, state.target_critic_params, rtol=0, atol=0)
    for name in ("actor", "critic"):
        before, after = (getattr(x, name) for x in (state, new))
        close(after.params, before.params, rtol=0, atol=0)
        memory = 1 if optimizer == "carried" else 0
        assert all((x == memory).all() for x in jax.tree.leaves(after.opt_state))


@pytest.mark.parametrize(("replay_mode", "share"), [("online", 0), ("half", 0.5), ("append", 0.8)])
def test_a_batch_is_made_of_what_replay_says(replay_mode, share, script):
    """16 dataset rows, 4 new ones in a buffer of 16: the shares of dataset rows."""
    config = script.Config(replay=replay_mode, batch_size=B)
    dataset = jax.device_put(batch_of(script, 0))
    rows = jax.tree.map(lambda x: x + 100, dataset)
    buffer = script.ReplayBuffer(rows, np.int32(4), np.int32(4))
    draw = jax.jit(partial(script.online_batch, config=config))
    batches = [draw(dataset, buffer, jax.random.PRNGKey(i)) for i in range(60)]
    rewards = np.stack([batch.rewards for batch in batches])  # (60, B)
    new = rewards > 50
    if replay_mode != "append":
        np.testing.assert_array_equal((~new).sum(axis=1), round(share * B))
    assert (~new).mean() == pytest.approx(share, abs=0.05)
    assert set(rewards[new].tolist()) == set(np.asarray(rows.rewards[:4]).tolist())
    assert len(set(rewards[~new].tolist())) == (0 if replay_mode == "online" else 16)
    for batch in batches[:3]:  # whole rows, not fields of several
        at = np.where(batch.rewards > 50, batch.rewards - 100, batch.rewards)
        index = np.abs(at[:, None] - np.asarray(dataset.rewards)).argmin(axis=1)
        shift = 100 * (np.asarray(batch.rewards) > 50)[:, None]
        np.testing.assert_allclose(batch.actions, dataset.actions[index] + shift, atol=1e-4)


def test_actions_in_training_are_noisy_and_bounded(td3_bc):
    config = config_of(td3_bc, exploration_noise=0.3)
    state, observations = fresh(td3_bc, config), batch_of(td3_bc, 1).observations
    expected = pi_of(parameters(state)["actor"], np.float64(observations), np)
    np.testing.assert_allclose(td3_bc.mode_actions(state, observations), expected, atol=1e-5)
    keys = jax.random.split(jax.random.PRNGKey(0), 4000)
    sample = jax.jit(jax.vmap(td3_bc.sample_action, in_axes=(None, None, 0)))
    edge = np.abs(expected).max(axis=1).argmax()
    for i in (np.abs(expected).max(axis=1).argmin(), edge):
        found = np.asarray(sample(state, observations[i], keys))
        assert np.abs(found).max() <= 1.0
        quantiles = np.quantile(found, [0.1587, 0.5, 0.8413], axis=0)
        wanted = np.clip(expected[i] + 0.3 * np.array([[-1.0], [0.0], [1.0]]), -1, 1)
        np.testing.assert_allclose(quantiles, wanted, atol=0.03)
    assert (np.abs(found) == 1).any()  # at the edge some were clipped


# ------------------------------------------------------------------------------------ References


def test_a_periodic_reference_is_taken_before_the_step(td3_c):
    """At the 1st, 4th and 7th step of the policy with a period of 3."""
    config = config_of(td3_c, reference="periodic", reference_period=3)
    state, batch = fresh(td3_c, config), batch_of(td3_c, 0)
    step, seen = compiled(td3_c, "constrained_step", config), []
    for i in range(7):
        seen.append(state.actor.params)
        state, info = step(state, batch)
        close(state.reference_params, seen[i // 3 * 3], rtol=0, atol=0)
        assert (info["constraint"] == 0) == (i % 3 == 0)


def test_the_best_reference_follows_the_evaluations(td3_c, tmp_path, monkeypatch):
    """Two seeds. Rows without an evaluation, and worse or equal ones, change nothing."""
    monkeypatch.setattr(td3_c, "online_chunk_with_distance", lambda run, n: {"steps": n})
    monkeypatch.setattr(td3_c, "distance_to", lambda run, other: other)
    config = td3_c.Config(hidden_dims=(4,), reference="best", num_seeds=2)
    devices = jax.devices()[:1]
    state = td3_c.create_shards(config, OBS, A, devices)[0]
    run = SimpleNamespace(folder=tmp_path, config=config, devices=devices, shards=[state])
    kernel, log, expected = "state/actor/params/params/Dense_0/kernel", ["return"], [0, 0]
    for i, returns in enumerate([(-900, -500), (-950, -400), ("", ""), (-900, -300), (-1, -2)]):
        actor = run.shards[0].actor
        params = jax.tree.map(lambda x, i=i: jnp.full_like(x, i), actor.params)
        run.shards = [run.shards[0].replace(actor=actor.replace(params=params))]
        (tmp_path / "metrics.csv").write_text("\n".join(log := log + [f"{r}," for r in returns]))
        rows = [line.replace("return", "return,x") for line in log]
        (tmp_path / "metrics.csv").write_text("\n".join(rows) + "\n")
        assert td3_c.constrained_chunk(run, 7) == {
            "steps": 7, "distance_to_reference": "reference_params"}  # fmt: skip
        better = {0: (0, 1), 1: (1,), 3: (1,), 4: (0, 1)}.get(i, ())
        expected = [i if seed in better else expected[seed] for seed in (0, 1)]
        named = td3_c.named_arrays(run.shards[0], "state")
        reference = named[kernel.replace("actor/params", "reference_params")]
        assert reference[:, 0, 0].tolist() == expected
        assert (named[kernel] == i).all()  # the policy itself stays
    assert run.shards[0].best_return.tolist() == [-1, -2]
    other = dataclasses.replace(config, reference="ema")
    run = SimpleNamespace(folder=tmp_path, config=other, devices=devices, shards=[state])
    td3_c.constrained_chunk(run, 7)
    assert run.shards == [state]


# ------------------------------------------------------------------------------- Known solutions


def bandit(script, rows):
    zeros = np.zeros(len(rows["rewards"]), np.float32)
    fields = ("observations", "actions", "rewards", "next_observations")
    return jax.device_put(script.Batch(*[np.float32(rows[name]) for name in fields], zeros))


STATES = np.array([[-1.0], [1.0]], np.float32)
BANDIT = dict(hidden_dims=(32, 32), learning_rate=1e-3, policy_learning_rate=1e-3, batch_size=64,
              tau=0.05, utd_ratio=500, warmup_steps=0, replay="append")  # fmt: skip


@lru_cache
def new_agent(script):
    """On the host; cached, because a new optimiser object would compile everything again."""
    return jax.tree.map(np.asarray, one_agent(script, script.Config(**BANDIT), 1))


def fine_tune(script, **settings):
    """(the agent before, after 3,000 online updates on the bandit's rows, last metrics)."""
    config = script.Config(**BANDIT, **settings)
    before = script.begin_finetuning(first(new_agent(script)), config)
    if hasattr(config, "multiplier"):  # softplus changes little above 1
        eta = {"eta": np.float32(config.multiplier)}
        before = before.replace(multiplier=before.multiplier.replace(params=eta))
    state = jax.tree.map(lambda x: jnp.array(x)[None], before)
    buffer = jax.device_put(script.empty_buffers(1, 1, script.blank_transition(1, 1)))
    dataset, observations = bandit(script, bandit_rows()), np.ones((1, 1), np.float32)
    for _ in range(6):
        state, _, info = script.online_step(state, buffer, observations, dataset, config, True)
    return before, first(state), jax.tree.map(first, info)


def moved(script, before, after):
    return np.abs(script.mode_actions(after, STATES) - script.mode_actions(before, STATES)).max()


def test_td3_finds_the_best_action_and_the_constraint_holds_the_policy(td3_bc, td3_c):
    """Plain TD3 goes 0.3 or more, to the best action. With epsilon 1e-6 and a multiplier of 50 the
    policy "does not move": no further than 0.03 from its frozen reference, as 1 / (2 * 50) is what
    a Q of slope 1 can move it."""
    before, after, _ = fine_tune(td3_bc, online_loss="td3")
    found = td3_bc.mode_actions(after, STATES)[:, 0]
    np.testing.assert_allclose(found, best_action(STATES), atol=0.08)
    assert moved(td3_bc, before, after) > 0.3
    before, after, info = fine_tune(
        td3_c, reference="frozen", epsilon=1e-6, multiplier=50.0, dual_learning_rate=0.1)
    assert moved(td3_c, before, after) < 0.03 and info["multiplier"] > 50


def test_with_little_weight_of_q_it_imitates(td3_bc):
    """Data N(0.2 s, 0.3), best action 0.5 s: imitation finds the mean of the data."""
    rng = np.random.default_rng(0)
    s = rng.choice([-1.0, 1.0], (4000, 1)).astype(np.float32)
    a = np.clip(0.2 * s + 0.3 * rng.normal(size=s.shape), -1, 1).astype(np.float32)
    rewards = 1 - (a[:, 0] - best_action(s)) ** 2
    rows = {"observations": s, "actions": a, "rewards": rewards, "next_observations": s}
    config = td3_bc.Config(**BANDIT, q_weight=1e-3)
    state = jax.tree.map(jnp.array, new_agent(td3_bc))
    state, info = td3_bc.update_steps(state, bandit(td3_bc, rows), config, 3000)
    np.testing.assert_allclose(td3_bc.mode_actions(first(state), STATES), 0.2 * STATES, atol=0.05)
    assert info["imitation"][0] < 0.2  # 0.09 is the variance of the data


# ------------------------------------------------------------------------------------ Whole runs


@pytest.fixture(scope="module")
def flags(pendulum):
    return ["--dataset", str(pendulum), "--env-id", "Pendulum-v1", "--preset", "smoke",
            "--offline-steps", "40", "--online-steps", "120", "--log-interval", "20",
            "--warmup-steps", "20", "--eval-interval", "40", "--hidden-dims", "8",
            "--resume", "run"]  # fmt: skip


@pytest.fixture(scope="module")
def plain(td3_bc, flags, tmp_path_factory):
    """A run of plain TD3 from the start to the end."""
    folder = tmp_path_factory.mktemp("plain")
    with reused_agents(td3_bc):
        done = go(td3_bc, folder, [*flags, "--online-loss", "td3"])
    assert done.code == 0, done.err
    return folder / "run"


def test_without_a_bound_it_is_plain_td3_to_the_bit(td3_c, flags, plain, tmp_path):
    """All parameters, optimisers, keys, transitions and evaluations of the two runs."""
    with reused_agents(td3_c):
        done = go(td3_c, tmp_path, [*flags, "--epsilon", "inf"])
    assert done.code == 0, done.err
    found, expected = load(tmp_path / "run")[0], load(plain)[0]
    shared = {name: x for name, x in found.items() if not name.startswith(EXTRA)}
    assert differing(shared, expected) == [] and len(shared) > 50
    assert found["state/multiplier/step"] == 0
    rows = [[{k: v for k, v in row.items() if k not in OWN}
             for row in table(folder)] for folder in (tmp_path / "run", plain)]  # fmt: skip
    assert rows[0] == rows[1]


def test_the_log_says_how_far_the_policy_went(plain):
    """Nothing while the policy waits; then the distance from the policy at the switch."""
    rows = [row for row in table(plain) if row["phase"] == "online"]
    distances = [float(row["distance_to_offline"]) for row in rows]
    assert distances[0] == 0.0 and min(distances[1:]) > 0
    assert rows[0]["actor_loss"] == "" and rows[1]["actor_loss"] != ""
    arrays, _ = load(plain)
    states = np.float64(arrays["buffer/rows/observations"][0])  # all 120, in place of 1,000 draws
    trees = []
    for name in ("actor/params", "offline_actor_params"):
        prefix = f"state/{name}/params/"
        found = {key.removeprefix(prefix): x[0] for key, x in arrays.items()
                 if key.startswith(prefix)}  # fmt: skip
        x = np.maximum(states @ found["MLP_0/Dense_0/kernel"] + found["MLP_0/Dense_0/bias"], 0)
        trees.append(np.tanh(x @ found["Dense_0/kernel"] + found["Dense_0/bias"]))
    expected = np.sqrt(np.mean((trees[0] - trees[1]) ** 2))
    np.testing.assert_allclose(distances[-1], expected, rtol=0.1)


@pytest.mark.parametrize(("reference", "other"), [
    ("ema", "target_actor_params"), ("frozen", "offline_actor_params"),
    ("periodic", "reference_params"), ("best", "reference_params"),
])  # fmt: skip
def test_the_distance_to_the_reference_is_of_the_states_met(reference, other, td3_c, monkeypatch,
                                                           tmp_path):
    """The root of D where the policy is held, two seeds of them; rows not yet there do not count.
    The other policies are elsewhere."""
    config = td3_c.Config(hidden_dims=(8,), reference=reference, num_seeds=2)
    state = td3_c.create_shards(config, OBS, A, jax.devices()[:1])[0]
    fields = ("target_actor_params", "offline_actor_params", "reference_params")
    moved = {name: jax.tree.map(lambda x, i=i: x + 0.1 * i, getattr(state, name))
             for i, name in enumerate(fields, 1)}  # fmt: skip
    state = state.replace(**moved)
    rows = jax.vmap(lambda _: batch_of(td3_c, 0))(np.arange(2))
    far = jax.tree.map(lambda x: x.at[:, 9:].add(50), jax.device_put(rows))
    buffer = td3_c.ReplayBuffer(far, np.int32([9, 9]), np.int32([9, 9]))
    run = SimpleNamespace(config=config, shards=[state], buffers=[buffer], folder=tmp_path,
                          devices=jax.devices()[:1])  # fmt: skip
    (tmp_path / "metrics.csv").write_text("return,x\n,\n,\n")
    monkeypatch.setattr(td3_c, "online_chunk_with_distance", lambda *_: {})
    found = td3_c.constrained_chunk(run, 1)["distance_to_reference"]
    assert found.shape == (2,)
    for seed in (0, 1):
        one, seen = jax.tree.map(lambda x, i=seed: x[i], state), rows.observations[seed][:9]
        policies = [np.asarray(one.actor.apply_fn(params, seen))
                    for params in (one.actor.params, getattr(one, other))]  # fmt: skip
        expected = np.sqrt(np.mean((policies[0] - policies[1]) ** 2))
        np.testing.assert_allclose(found[seed], expected, rtol=0.1)  # 1,000 draws of the 9


def test_a_killed_run_goes_on_to_the_same_bits(td3_c, flags, tmp_path):
    """With the best reference, the one rule that looks at the log."""
    flags = [*flags, "--reference", "best", "--epsilon", "0.01"]
    folders = [tmp_path / name for name in ("whole", "killed")]
    for folder in folders:
        folder.mkdir()
    with reused_agents(td3_c):
        assert go(td3_c, folders[0], flags).code == 0
        with pytest.raises(Killed), on_call(td3_c, "step_rollout", 50, die):
            go(td3_c, folders[1], flags)
        done = go(td3_c, folders[1], flags)
    assert done.code == 0 and done.logged[0] == ("online", 60)
    assert_same_run(folders[1] / "run", folders[0] / "run")
    returns = [float(row["return"]) for row in table(folders[0] / "run") if row["return"]]
    arrays, _ = load(folders[0] / "run")
    # of the offline evaluations the last, of the online ones all but the last, have been compared
    np.testing.assert_allclose(arrays["state/best_return"][0], max(returns[:-1]), rtol=1e-5)
    assert arrays["state/multiplier/step"][0] == 100 // 2


@lru_cache
def small_agents(script):
    """Shards of the size of the whole runs."""
    return script.create_shards(script.Config(hidden_dims=(8,)), 3, 1, jax.devices()[:1])


def assert_taken_over(script, found, saved):
    """All they have in common is the file's; the multiplier and the reference are new."""
    common = {n: x for n, x in saved.items() if n.startswith("state/") and not n.startswith(EXTRA)}
    mine = {n: x for n, x in found.items() if not n.startswith(EXTRA)}
    assert set(differing(mine, common)) <= {"state/key"}
    assert any(n.startswith(EXTRA) for n in found) == (script.__name__ == "td3_c")
    if script.__name__ == "td3_c":
        multiplier = np.logaddexp(0, found["state/multiplier/params/eta"])
        np.testing.assert_allclose(multiplier, 1.0, rtol=1e-6)
        assert found["state/multiplier/step"] == 0 and found["state/best_return"] < -1e38


def test_an_agent_of_td3_c_is_taken_over(script, td3_c, plain, tmp_path, capsys):
    """What td3_c.py adds, all of it in use, stays behind. It is said that this agent is no longer
    an offline one."""
    arrays, meta = load(plain)
    used = {name: x + 1 for name, x in td3_c.named_arrays(small_agents(td3_c)[0], "state").items()
            if name.startswith(EXTRA)}  # fmt: skip
    path = tmp_path / "theirs.npz"
    td3_c.save_checkpoint(path, arrays | used, meta | {"script": "td3_c"})
    run = SimpleNamespace(devices=jax.devices()[:1], shards=small_agents(script))
    script.take_over(run, path)
    assert f"has 120 online steps behind it: {path}" in capsys.readouterr().out
    script.save_checkpoint(path, arrays, meta | {"online": 0})
    script.take_over(run, path)
    assert capsys.readouterr().out == ""
    assert_taken_over(script, script.named_arrays(script.to_host(run.shards), "state"), arrays)
    for name, x in dataclasses.asdict(run.transform).items():
        np.testing.assert_array_equal(x, arrays[f"transform/{name}"])


def test_an_agent_of_td3_bc_goes_on_in_td3_c(td3_c, flags, plain, tmp_path):
    """As it is at the switch: with the optimisers carried over, the policy as target and offline
    policy. The key is the new run's own."""
    seen = []

    def look(run, *_):
        seen.append(td3_c.named_arrays(td3_c.to_host(run.shards), "state"))
        raise Killed

    flags = [*flags, "--online-optimizer", "carried", "--init-from", str(plain)]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed), reused_agents(td3_c):
        patch.setattr(td3_c, "create_shards", lambda *_: small_agents(td3_c))
        patch.setattr(td3_c, "start_online", look)
        go(td3_c, tmp_path, flags)
    saved, prefix = load(plain)[0], "state/actor/params/"
    policy = {n.removeprefix(prefix): x for n, x in saved.items() if n.startswith(prefix)}
    for name in ("target_actor_params", "offline_actor_params"):
        saved |= {f"state/{name}/{n}": x for n, x in policy.items()}
    assert_taken_over(td3_c, seen[0], saved)
    assert seen[0]["state/key"].tolist() == small_agents(td3_c)[0].key.tolist()


# -------------------------------------------------------------------------------------- Refusals


@pytest.mark.parametrize(("name", "arguments", "words"), [
    ("td3_bc", ["--policy-delay", "0"], "--policy-delay 0"),
    ("td3_bc", ["--q-weight", "-1"], "--q-weight -1"),
    ("td3_bc", ["--exploration-noise", "nan"], "--exploration-noise nan"),
    ("td3_c", ["--epsilon", "-0.1"], "--epsilon -0.1"),
    ("td3_c", ["--multiplier", "0"], "--multiplier 0"),
    ("td3_c", ["--dual-learning-rate", "2"], "--dual-learning-rate 2"),
    ("td3_c", ["--reference-period", "0"], "--reference-period 0"),
    ("td3_c", ["--multiplier-max", "1"], "--multiplier-max 1"),
])  # fmt: skip
def test_numbers_out_of_range_are_refused_in_one_line(name, arguments, words, request, flags,
                                                      tmp_path):
    script = request.getfixturevalue(name)
    done = go(script, tmp_path, [*flags, *arguments])
    assert done.code == 2 and len(done.err.splitlines()) == 1
    assert words in done.err and "must be in" in done.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "arguments", "words"), [
    ("td3_bc", ["--policy-delay", "3"], "--log-interval must be a multiple of --policy-delay 3"),
    ("td3_bc", ["--offline-steps", "41"], "--offline-steps must be a multiple"),
    ("td3_c", ["--warmup-steps", "21"], "--warmup-steps must be a multiple"),
    ("td3_c", ["--online-steps", "121"], "--online-steps must be a multiple"),
    ("td3_c", ["--epsilon", "inf", "--dual", "annealed"], "plain TD3: without --dual annealed"),
    ("td3_c", ["--epsilon", "inf", "--epsilon-end", "0.04"], "without --epsilon-end"),
])  # fmt: skip
def test_what_would_do_nothing_or_log_nonsense_is_refused(name, arguments, words, request, flags,
                                                          tmp_path):
    done = go(request.getfixturevalue(name), tmp_path, [*flags, *arguments])
    assert done.code == 2 and len(done.err.splitlines()) == 1 and words in done.err
    assert list(tmp_path.iterdir()) == []


def test_offline_steps_that_are_not_made_are_not_refused(script, flags, plain, tmp_path):
    """Of two numbers that are no multiple of the delay only the one in use is named."""
    flags = [*flags, "--init-from", str(plain), "--offline-steps", "41", "--online-steps", "121"]
    done = go(script, tmp_path, flags)
    assert done.code == 2 and "--online-steps must be a multiple" in done.err


@pytest.mark.parametrize(("name", "arguments"), [
    ("td3_c", ["--reference", "last"]), ("td3_c", ["--dual", "fixed"]),
    ("td3_bc", ["--online-loss", "sac"]), ("td3_bc", ["--replay", "none"]),
    ("td3_bc", ["--online-optimizer", "new"]),
])  # fmt: skip
def test_words_that_are_no_choice_are_refused(name, arguments, request, flags, tmp_path):
    done = go(request.getfixturevalue(name), tmp_path, [*flags, *arguments])
    assert done.code == 2 and "Traceback" not in done.err


def test_an_agent_of_another_kind_is_refused(td3_c, flags, tmp_path):
    td3_c.save_checkpoint(tmp_path / "x.npz", {}, {"script": "bc", "config": {}})
    done = go(td3_c, tmp_path, [*flags, "--init-from", "x.npz"])
    assert done.code == 2 and len(done.err.splitlines()) == 1
    assert "a checkpoint of bc.py" in done.err
