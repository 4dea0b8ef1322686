"""Off2On beyond the authors' numbers (test_golden.py): the matched policy, how rows are drawn, what
passes from the members to the ensemble, and which rows of the dataset the priorities prefer."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from conftest import read_metrics
from test_losses import OBS, A, B, batch_of, compiled, fresh

SIZES = dict(hidden_dims=(16, 8), critic_hidden_dims=(16, 8), batch_size=B, num_actions=3)
SIZES |= dict(num_members=3, micro_batches=2)


def test_the_policy_has_the_moments_of_the_mixture(off2on):
    """Of all members' samples before the tanh."""
    agent, batch = fresh(off2on, off2on.Config(**SIZES)), batch_of(off2on, 0)
    apply, params = agent.members.actor.apply_fn, agent.actor.params
    samples = []
    for e in range(3):
        own = apply(jax.tree.map(lambda x, e=e: x[e], params), batch.observations)
        draw = own.distribution.sample(seed=jax.random.PRNGKey(e), sample_shape=(20_000,))
        samples.append(draw)
    samples = np.concatenate(samples)  # (60,000, B, A)
    policy = agent.actor.apply_fn(params, batch.observations)
    spread = np.std(samples, axis=0)
    mean = policy.distribution.mean()
    np.testing.assert_allclose((mean - samples.mean(axis=0)) / spread, 0, atol=0.02)
    np.testing.assert_allclose(policy.distribution.stddev(), spread, rtol=0.02)
    found = off2on.act(agent, batch.observations, None)
    np.testing.assert_allclose(found, np.tanh(mean), rtol=1e-5)


def test_rows_are_drawn_in_proportion_to_their_priorities(off2on):
    """As by one cumulative sum; rows without priority never; the rest from dataset and newest."""
    rng, config = np.random.default_rng(0), off2on.Config(batch_size=64)
    old, new = batch_of(off2on, 0, size=300), batch_of(off2on, 1, size=150)
    priorities = np.append(rng.uniform(0, 3, 420), np.zeros(80)).astype(np.float32)  # 120 are new
    ends, count = np.cumsum(priorities, dtype=np.float64), np.zeros(500)
    draw = jax.jit(partial(off2on.online_batch, config=config))
    for i in range(200):
        key, blocks = jax.random.PRNGKey(i), priorities.reshape(5, 100)
        found, rows = draw(old, (new, blocks), 120, key)
        uniform = np.float64(jax.random.uniform(jax.random.split(key)[0], (64,)))
        wanted = np.searchsorted(ends, (np.arange(64) + uniform) / 64 * ends[-1])
        assert (np.abs(rows - wanted) <= 1).all() and (rows == wanted).mean() > 0.95  # but rounding
        np.add.at(count, rows, 1)
        everything = np.concatenate([old.actions, new.actions])
        np.testing.assert_array_equal(found.actions[0], everything[rows])
        assert np.isin(found.rewards[1], old.rewards).all()
        assert np.isin(found.rewards[2], new.rewards[:120]).all()
    assert not count[420:].any()
    expected = 200 * 64 * priorities / priorities.sum()
    assert np.abs(count - expected).max() < 5 * np.sqrt(expected.max())


def test_the_uppermost_draw_is_a_row_that_is_there(off2on, monkeypatch):
    """Where the sum of the blocks, rounded, lies above the rows, as in 10 of these 200 buffers."""
    largest = lambda key, shape: jnp.full(shape, 1 - 2**-24)  # noqa: E731
    monkeypatch.setattr(jax.random, "uniform", largest)
    draw = jax.jit(partial(off2on.online_batch, config=off2on.Config(batch_size=64)))
    old, new = batch_of(off2on, 0, size=5000), batch_of(off2on, 1, size=15_000)
    for seed in range(200):
        rng = np.random.default_rng(seed)
        count = rng.integers(10_000, 19_000)
        priorities = np.append(rng.uniform(0.001, 3, count), np.zeros(20_000 - count))
        blocks = np.float32(priorities).reshape(20, 1000)
        _, rows = draw(old, (new, blocks), count - 5000, jax.random.PRNGKey(0))
        assert rows.max() < count, seed


def test_the_first_batch_has_its_share_of_new_rows(off2on):
    config = off2on.Config(batch_size=256, warmup_steps=50, new_share=0.7)
    old, new = batch_of(off2on, 0, size=1234), batch_of(off2on, 1, size=80)
    priorities, largest = off2on.first_priorities(jax.tree.map(lambda x: x[None], new), old, config)
    assert priorities.shape == (1, 2, 1000) and priorities.sum() == 1234
    rows = 1234 + np.arange(50)[None]
    values = np.full((1, 50), largest[0])
    priorities, again = off2on.prioritize(priorities, largest, rows, values)
    draw = jax.jit(partial(off2on.online_batch, config=config))
    _, drawn = draw(old, (new, priorities[0]), 50, jax.random.PRNGKey(0))
    assert (drawn < 1284).all() and abs((drawn >= 1234).mean() - 0.7) < 0.01
    lower = off2on.prioritize(priorities, again, rows, values / 2)
    assert lower[1] == largest and lower[0].max() == np.float32(largest[0] / 2)  # it never falls


def test_offline_every_member_learns_and_the_ensemble_is_all(off2on):
    """Each as an agent of its own; the ensemble has copies, unused optimisers, and no memory."""
    config = off2on.Config(**SIZES, learning_rate=1e-2, policy_learning_rate=1e-2)
    batch = batch_of(off2on, 0)
    inputs = jax.random.PRNGKey(0), batch.observations[:1], batch.actions[:1]
    agent = off2on.create_agent(*inputs, config)
    new, _ = compiled(off2on, "update", config)(agent, batch)
    for e in range(3):
        member, found = (jax.tree.map(lambda x, e=e: x[e], a.members) for a in (agent, new))
        alone, _ = off2on.update_networks(member, batch, config, off2on.conservative_loss)
        same = partial(np.testing.assert_allclose, rtol=2e-3, atol=2e-5)
        jax.tree.map(same, found.critic.params, alone.critic.params)
        jax.tree.map(same, found.actor.params, alone.actor.params)
    for ours, theirs in (("critic", "critic"), ("actor", "actor")):
        params = getattr(new.members, theirs).params
        jax.tree.map(np.testing.assert_array_equal, getattr(new, ours).params, params)
        assert getattr(new, ours).step == 0
    jax.tree.map(np.testing.assert_array_equal, new.target_critic_params, new.critic.params)
    members = [jax.tree.leaves(new.members.actor.params)[1][e] for e in range(3)]
    assert not np.array_equal(members[0], members[1])


def test_offline_there_is_no_entropy_in_the_target(off2on):
    config = off2on.Config(**SIZES, cql_alpha=0.0)
    agent, batch, key = fresh(off2on, config), batch_of(off2on, 0), jax.random.PRNGKey(1)
    member = jax.tree.map(lambda x: x[0], agent.members)
    cold = member.replace(temperature=member.temperature.replace(params={"log": -np.inf}))
    losses = [off2on.conservative_loss(m.critic.params, m, batch, key, config)[0]
              for m in (member, cold)]  # fmt: skip
    assert losses[0] == losses[1]
    losses = [off2on.critic_loss(m.critic.params, m, batch, key, config)[0]
              for m in (member, cold)]  # fmt: skip
    assert losses[0] != losses[1]


def test_priorities_prefer_rows_that_are_like_new_ones(off2on):
    """Half of the dataset was done by a policy that acts as the agent does, half by another."""
    config = off2on.Config(**SIZES | dict(batch_size=64), learning_rate=3e-3)
    rng = np.random.default_rng(0)

    def rows(centre, size):
        state, action = rng.normal(size=(size, OBS)), rng.normal(centre, 0.2, (size, A))
        columns = state, np.tanh(action), np.zeros(size), state, np.ones(size), np.ones(size)
        return off2on.Batch(*map(np.float32, columns))

    like, unlike, new = rows(0.7, 500), rows(-0.7, 500), rows(0.7, 100)
    old = jax.tree.map(lambda *x: jnp.concatenate(x), like, unlike)
    priorities, largest = (x for x in off2on.first_priorities(
        jax.tree.map(lambda x: x[None], new), old, config))  # fmt: skip
    priorities, largest = off2on.prioritize(
        priorities, largest, 1000 + np.arange(100)[None], np.ones((1, 100), np.float32)
    )
    inputs = jax.random.PRNGKey(0), like.observations[:1], like.actions[:1]
    draw, shares = jax.jit(partial(off2on.online_batch, config=config)), []
    agent = off2on.create_agent(*inputs, config)
    for i in range(250):
        drawn = draw(old, (new, priorities[0]), 100, jax.random.PRNGKey(i))
        shares.append((np.mean(drawn[1] < 500), np.mean((drawn[1] >= 500) & (drawn[1] < 1000))))
        agent, info = compiled(off2on, "online_update", config)(agent, drawn)
        each = drawn[1][None], info["priorities"][None]
        priorities, largest = off2on.prioritize(priorities, largest, *each)
    like, unlike = np.mean(shares[:20], axis=0), np.mean(shares[-20:], axis=0)
    assert abs(like[0] - like[1]) < 0.1 and unlike[0] > 3 * unlike[1]
    mean = priorities.ravel()[:500].mean(), priorities.ravel()[500:1000].mean()
    assert mean[0] > 3 * mean[1]


def test_a_run(off2on, pendulum, tmp_path):
    """Many updates when the warm-up ends, then one per step; new rows enter with the largest."""
    flags = ["--dataset", pendulum, "--hidden-dims", "8", "--critic-hidden-dims", "8"]
    flags += ["--num-members", "2", "--offline-steps", "10", "--online-steps", "60"]
    flags += ["--warmup-steps", "40", "--first-updates", "7", "--interval", "30"]
    flags += ["--batch-size", "16", "--num-actions", "2", "--eval-episodes", "1"]
    off2on.main([*flags, "--run-dir", str(tmp_path / "run")])
    arrays, _ = off2on.load(tmp_path / "run")
    assert arrays["agents/critic/step"][0] == 7 + 20 and arrays["agents/ratio/step"][0] == 27
    assert (arrays["agents/members/critic/step"] == 10).all()
    priorities, largest = arrays["buffers/1"].ravel(), arrays["buffers/2"][0]
    assert (priorities[:2060] > 0).all() and not priorities[2060:].any()
    assert largest == np.float32(2000 / 40) and priorities.max() <= largest
    rows = read_metrics(tmp_path / "run")
    assert [row["ratio_loss"] == "" for row in rows] == [True, True, False]
    off2on.main([*flags, "--init-from", str(tmp_path / "run"), "--run-dir", str(tmp_path / "on")])
