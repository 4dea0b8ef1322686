"""REDQ + adaptive BC: the rule where returns rise and fall, in a run, and in its checkpoint; what a
batch is made of; the random pair of critics; several updates per step."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import read_metrics
from test_losses import B, batch_of, compiled, fresh, template

SIZES = dict(hidden_dims=(16, 8), batch_size=B, num_critics=4)


# ---------------------------------------------------------------------------------------- The rule
def weights(script, scores, **settings):
    """The weight after every one of these episodes of 500 steps, from half its largest value on."""
    config = script.Config(**SIZES, reference_returns=(-100.0, 300.0), **settings)
    agents, found = template(script, config), [config.bc_weight / 2]
    agents = agents.replace(weight=np.float32([found[0]]), average_score=np.float32(scores[:1]))
    for score in scores:
        episodes = {"r": np.array([400 * score - 100]), "l": np.array([500])}
        ends = np.array([False]), np.array([True])
        agents = script.weight_rule(agents, *ends, episodes, config)
        found.append(float(agents.weight[0]))
    return np.array(found)


def test_the_weight_falls_while_returns_rise_and_rises_after_a_fall(adaptive_bc):
    rising, fallen = np.linspace(0.3, 0.9, 15), [0.1] * 3
    found = weights(adaptive_bc, [*rising, *fallen], smoothing=0.5)
    assert (np.diff(found)[:15] < 0).all() and np.diff(found)[15] > 0.01
    assert (np.diff(weights(adaptive_bc, [*rising, *fallen], kd=0.0)) < 0).all()  # no memory
    found = weights(adaptive_bc, [0.5] * 3)  # no episode behind the average: the fall alone
    np.testing.assert_allclose(np.diff(found), -500 * 3e-5 * 0.55, rtol=1e-3)
    assert (np.diff(weights(adaptive_bc, [1.2] * 3)) > 0).all()  # above the target
    for score, bound in ((0.0, 0.0), (2.0, 0.4)):
        found = weights(adaptive_bc, [score] * 30)
        np.testing.assert_allclose(found[-1], bound)


def test_of_success_tasks_the_score_is_success(adaptive_bc):
    config = adaptive_bc.Config(**SIZES, reference_returns=(0.0, 1.0), smoothing=1.0)
    agents = template(adaptive_bc, config).replace(average_score=np.zeros(3, np.float32))
    ends = np.array([True, False, False]), np.array([False, True, False])
    episodes = {"r": np.array([-70.0, -200.0, 0.0]), "l": np.array([70, 200, 0])}
    new = adaptive_bc.weight_rule(agents, *ends, episodes, config)
    np.testing.assert_array_equal(new.average_score, [1, 0, 0])
    new = adaptive_bc.weight_rule(agents, *ends, episodes | {"r": np.array([1, 37, 0])}, config)
    np.testing.assert_array_equal(new.average_score, [1, 1, 0])  # where a goal does not terminate


@pytest.fixture(scope="module")
def run(adaptive_bc, pendulum, tmp_path_factory):
    """A run of two seeds whose second round cuts an episode, and what happened in it."""
    folder, seen, patch = tmp_path_factory.mktemp("run"), [], pytest.MonkeyPatch()
    step, rule = adaptive_bc.online_step, adaptive_bc.weight_rule

    def spy_step(agents, buffers, *rest, **keywords):
        named = SimpleNamespace(agents=agents, buffers=buffers)
        seen.append(("step", jax.tree.map(np.array, vars(named))))  # copies: they are donated
        return step(agents, buffers, *rest, **keywords)

    def spy_rule(agents, terminated, truncated, episodes, config):
        seen.append(("rule", {name: episodes[name].copy() for name in ("r", "l")}))
        return rule(agents, terminated, truncated, episodes, config)

    patch.setattr(adaptive_bc, "online_step", spy_step)
    patch.setattr(adaptive_bc, "weight_rule", spy_rule)
    flags = ["--dataset", pendulum, "--hidden-dims", "8", "--batch-size", "8", "--num-seeds", "2",
             "--eval-episodes", "1", "--interval", "250", "--offline-steps", "10",
             "--online-steps", "460", "--num-critics", "2", "--utd-ratio", "2",
             "--run-dir", str(folder)]  # fmt: skip
    with pytest.raises(SystemExit, match="--reference-returns"):
        adaptive_bc.main(flags)
    flags += ["--reference-returns", "-1600", "-100", "--kp", "1e-4", "--kd", "2e-3"]
    adaptive_bc.main(flags)
    patch.undo()
    return SimpleNamespace(folder=folder, seen=seen, flags=flags)


def test_a_run_follows_the_rule_and_its_checkpoint_has_the_state(run, adaptive_bc):
    rows, (arrays, meta) = read_metrics(run.folder), adaptive_bc.load(run.folder)
    assert meta["config"]["reference_returns"] == [-1600, -100]
    offline = np.array([float(row["return"]) for row in rows[:2]])
    weight, average, since = np.full(2, 0.4), (offline + 1600) / 1500, 0  # of the same episode
    for kind, what in run.seen:
        if kind == "step":
            since += 1
            found = what["agents"].weight, what["agents"].average_score
            np.testing.assert_allclose(found, (weight, average), rtol=1e-4, atol=1e-5)
            continue
        assert since == 201 and (what["l"] == 200).all()  # after the step's updates; cut: no end
        score, since = (what["r"] + 1600) / 1500, -50 if weight[0] == 0.4 else 0
        weight = weight + 200 * (2e-3 * np.maximum(0, average - score) - 1e-4 * (1.05 - average))
        weight, average = np.clip(weight, 0, 0.4), average + 0.05 * (score - average)
    assert [kind for kind, _ in run.seen].count("rule") == 2 and len(set(weight)) == 2
    found = arrays["agents/weight"], arrays["agents/average_score"]
    np.testing.assert_allclose(found, (weight, average), rtol=1e-4, atol=1e-5)
    assert arrays["agents/critic/step"].tolist() == [10 + 2 * 460] * 2


def test_the_weight_begins_anew_with_another_run(run, adaptive_bc, monkeypatch):
    """Both seeds' at once, whichever of them ends an episode first."""
    first = []
    monkeypatch.setattr(adaptive_bc, "ruled_round", lambda agents, *rest, **more: (
        first.append(np.array(agents.weight)), (agents, rest[0], {"updates": 0}))[1])  # fmt: skip
    more = ["--init-from", str(run.folder), "--bc-weight", "0.7"]
    adaptive_bc.main([*run.flags[:-2], *more, "--run-dir", str(run.folder / "more")])
    np.testing.assert_allclose(first[0], [0.7, 0.7])


# ----------------------------------------------------------------------------------------- Batches
def test_the_buffer_begins_with_random_rows_of_the_dataset(run, adaptive_bc):
    rows, _ = adaptive_bc.load_dataset(*adaptive_bc.parse_config(run.flags))
    first, last = run.seen[0][1]["buffers"], run.seen[-1][1]["buffers"]
    known = {x.tobytes(): i for i, x in enumerate(rows.observations)}
    for found, ours in zip(first.observations, first.rewards, strict=True):
        places = [known[x.tobytes()] for x in found]
        np.testing.assert_array_equal(ours, rows.rewards[places])
        assert len(set(places)) > 300  # of 460 draws from 2,000
    assert not np.array_equal(first.rewards[0], first.rewards[1])
    assert not set(last.rewards.ravel()) & set(first.rewards.ravel())  # all overwritten


def test_a_batch_is_of_new_rows_and_of_those_of_the_dataset_that_are_left(adaptive_bc):
    config = adaptive_bc.Config(**SIZES | dict(batch_size=500), utd_ratio=4)
    draw, tree = compiled(adaptive_bc, "online_batch", config), batch_of(adaptive_bc, 0, 100)
    tree = tree.replace(rewards=np.arange(100.0))
    for size, wanted in ((1, [0, *range(80, 100)]), (30, [*range(30), *range(80, 100)]),
                         (90, range(100)), (100, range(100))):  # fmt: skip
        batch = draw(None, tree, size, jax.random.PRNGKey(size))
        assert batch.rewards.shape == (4, 500)
        np.testing.assert_array_equal(np.unique(batch.rewards), sorted(wanted))
        np.testing.assert_allclose(np.mean(batch.rewards), np.mean(wanted), rtol=0.1)


# ------------------------------------------------------------------------------------ REDQ's parts
def test_the_target_is_the_minimum_of_a_random_pair(adaptive_bc):
    """Four target critics that say 0, 1, 2 and 3: the target is never 3, and 0 in every second."""
    config, batch = adaptive_bc.Config(**SIZES, discount=1.0), batch_of(adaptive_bc, 0)
    batch = batch.replace(rewards=np.zeros(B), masks=np.ones(B))
    agent = jax.tree.map(np.zeros_like, fresh(adaptive_bc, config))
    params = {"params": agent.critic.params["params"] | {"bias": np.arange(4, dtype=np.float32)}}
    agent = agent.replace(target_critic_params=params)
    keys = jax.random.split(jax.random.PRNGKey(0), 3000)
    loss = compiled(adaptive_bc, "critic_loss", config)
    found, _ = jax.vmap(lambda key: loss(agent.critic.params, agent, batch, key))(keys)
    shares = [np.mean(np.isclose(found, value**2)) for value in range(4)]
    np.testing.assert_allclose(shares, [1 / 2, 1 / 3, 1 / 6, 0], atol=0.03)


def test_online_updates_are_updates_one_after_the_other(adaptive_bc):
    config = adaptive_bc.Config(**SIZES, utd_ratio=3, learning_rate=1e-2, tau=0.2)
    agent = by_hand = fresh(adaptive_bc, config)
    batches, infos = [batch_of(adaptive_bc, i) for i in range(3)], []
    stacked = jax.tree.map(lambda *xs: np.stack(xs), *batches)
    agent, info = compiled(adaptive_bc, "online_update", config)(agent, stacked)
    for batch in batches:
        by_hand, each = compiled(adaptive_bc, "update", config)(by_hand, batch)
        infos.append(each["critic_loss"])
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), agent, by_hand
    )
    np.testing.assert_allclose(info["critic_loss"], np.mean(infos), rtol=1e-4)
    assert (agent.critic.step, agent.actor.step) == (3, 1)
