"""BOORL: which member acts, on which rows each learns, that each is TD3+BC alone, the switch."""

from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from test_losses import OBS, A, B, batch_of, compiled, fresh, parameters, q_of
from test_td3 import pi_of

SIZES = dict(hidden_dims=(16, 8), batch_size=B, num_members=3)
same = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)


def member(tree, k):
    return jax.tree.map(lambda x: x[k], tree)


# -------------------------------------------------------------------------------------- The choice
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_choice_frequencies_are_the_softmax_of_each_members_own_q(scale, boorl):
    config = boorl.Config(**SIZES, choice_scale=scale, exploration_noise=0.0)
    agent, observation = fresh(boorl, config), batch_of(boorl, 0).observations[0]
    s, actions, logits = parameters(agent), [], []
    for k in range(3):
        actor, critic = member(s["actor"], k), member(s["critic"], k)
        actions.append(pi_of(actor, observation[None])[0])
        logits.append(scale * q_of(critic, observation[None], actions[k][None], np).min())
    expected = np.exp(logits) / np.exp(logits).sum()
    assert scale == 0 or np.ptp(expected) > 0.1
    keys = jax.random.split(jax.random.PRNGKey(0), 5000)
    found = jax.vmap(compiled(boorl, "explore", config), (None, None, 0))(agent, observation, keys)
    distance = np.abs(np.asarray(found)[:, None] - np.stack(actions)).max(axis=2)  # (5000, K)
    same(distance.min(axis=1), 0)
    same(np.bincount(distance.argmin(axis=1), minlength=3) / 5000, expected, atol=0.025)
    same(boorl.act(agent, observation[None], config)[0], np.mean(actions, axis=0))


def test_the_chosen_action_is_noisy_and_bounded(boorl):
    config = boorl.Config(**SIZES, exploration_noise=5.0)
    agent, observation = fresh(boorl, config), batch_of(boorl, 0).observations[0]
    keys = jax.random.split(jax.random.PRNGKey(0), 500)
    found = jax.vmap(compiled(boorl, "explore", config), (None, None, 0))(agent, observation, keys)
    assert np.abs(found).max() == 1 and found.shape == (500, A)


# ------------------------------------------------------------------------------------ Its members
def test_offline_every_member_is_td3_bc_on_its_own_rows(boorl, td3_bc):
    config = boorl.Config(**SIZES, learning_rate=1e-2, tau=0.2)
    alone = td3_bc.Config(hidden_dims=(16, 8), batch_size=B, learning_rate=1e-2, tau=0.2)
    agent = fresh(boorl, config)
    by_hand = [
        td3_bc.Agent(**vars(member(agent.replace(key=np.zeros((3, 2), np.uint32)), k)))
        for k in range(3)
    ]
    for i in range(2):
        columns = [batch_of(boorl, 10 * i + k) for k in range(3)]
        batch = jax.tree.map(lambda *xs: np.stack(xs, axis=1), *columns)  # (B, K, ...)
        key, *keys = jax.random.split(agent.key, 4)
        agent, info = compiled(boorl, "update", config)(agent, batch)
        losses = []
        for k in range(3):
            by_hand[k] = by_hand[k].replace(key=keys[k])
            by_hand[k], each = compiled(td3_bc, "update", alone)(by_hand[k], columns[k])
            losses.append(each["critic_loss"])
        same(info["critic_loss"], np.mean(losses))
        np.testing.assert_array_equal(agent.key, key)
    for k in range(3):
        names = "target_actor_params", "target_critic_params"
        found, wanted = ([getattr(x, name) for name in names] for x in (member(
            agent.replace(key=np.zeros((3, 2))), k), by_hand[k]))  # fmt: skip
        jax.tree.map(partial(same, rtol=1e-3, atol=1e-4), found, wanted)
    assert agent.actor.step.tolist() == [1, 1, 1]


def test_fresh_members_differ(boorl):
    inputs = jax.random.PRNGKey(0), np.zeros((1, OBS)), np.zeros((1, A))
    agent = compiled(boorl, "create_agent", boorl.Config(**SIZES))(*inputs)
    kernel = agent.actor.params["params"]["layers_1"]
    assert len({x.tobytes() for x in np.asarray(kernel["kernel"])}) == 3


def test_every_member_has_its_own_part_of_the_dataset(boorl, monkeypatch):
    config, seen = boorl.Config(**SIZES, kept_share=0.9), []
    rows = batch_of(boorl, 0, 101)
    rows = rows.replace(rewards=np.arange(101.0), actions=np.arange(202.0).reshape(101, 2))
    spy = lambda agents, buffers, run, first, last, update: seen.append((run[1], update))  # noqa: E731
    monkeypatch.setattr(boorl, "offline_round", spy)
    for _ in range(2):  # the same in every round
        boorl.bootstrap_round(None, None, (config, rows, None, None), 0, 1)
    own, again = seen[0][0], seen[1][0]
    jax.tree.map(np.testing.assert_array_equal, own, again)
    assert own.rewards.shape == (91, 3) and own.actions.shape == (91, 3, 2)
    assert seen[0][1] is boorl.update
    parts = [set(column) for column in own.rewards.T]
    assert [len(part) for part in parts] == [91] * 3 and len(set.union(*parts)) > 95
    assert all(len(one & other) < 90 for one, other in zip(parts, parts[1:], strict=False))
    np.testing.assert_array_equal(own.actions[..., 0], 2 * own.rewards)


# ------------------------------------------------------------------------------------------- Online
def test_half_a_batch_is_of_the_data_and_what_was_collected_first(boorl):
    config = boorl.Config(**SIZES | dict(batch_size=400), utd_ratio=3, warmup_steps=20)
    dataset = batch_of(boorl, 0, 30).replace(rewards=np.arange(30.0))
    buffer = batch_of(boorl, 1, 100).replace(rewards=np.arange(1000.0, 1100.0))
    draw = compiled(boorl, "online_batch", config)
    for size, early in ((10, 10), (50, 20)):
        rewards = np.asarray(draw(dataset, buffer, size, jax.random.PRNGKey(0)).rewards)
        assert rewards.shape == (3, 400)
        old, new = rewards[:, :200], rewards[:, 200:]
        np.testing.assert_array_equal(np.unique(old), [*range(30), *range(1000, 1000 + early)])
        np.testing.assert_array_equal(np.unique(new), range(1000, 1000 + size))
        assert not np.array_equal(rewards[0], rewards[1])


def test_the_switch_keeps_adam_and_copies_the_networks(boorl, pendulum, tmp_path):
    flags = ["--dataset", pendulum, "--hidden-dims", "8", "--batch-size", "8", "--num-members", "2",
             "--eval-episodes", "1", "--interval", "40", "--offline-steps", "30",
             "--online-steps", "40", "--utd-ratio", "2", "--run-dir"]  # fmt: skip
    runs = {}
    for warmup in (40, 35):
        boorl.main([*flags, str(tmp_path / str(warmup)), "--warmup-steps", str(warmup)])
        runs[warmup] = SimpleNamespace(arrays=boorl.load(tmp_path / str(warmup))[0])
    at_rest, trained = runs[40].arrays, runs[35].arrays
    for name, x in at_rest.items():
        for target, network in (("target_actor_params", "actor/params"),
                                ("offline_actor_params", "actor/params"),
                                ("target_critic_params", "critic/params")):  # fmt: skip
            if name.startswith(f"agents/{network}/"):
                other = name.replace(network, target)
                np.testing.assert_array_equal(at_rest[other], x)
    assert at_rest["agents/critic/opt_state/0/count"].tolist() == [[30, 30]]
    assert trained["agents/critic/opt_state/0/count"].tolist() == [[40, 40]]  # 5 steps, UTD 2
    assert trained["agents/actor/opt_state/0/count"].tolist() == [[20, 20]]  # 15 offline
