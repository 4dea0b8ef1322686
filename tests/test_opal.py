"""OPAL: windows, losses of the task by hand, environments whose actions are skills, what is frozen
online, and a toy: a skill plays its window again, and the better of two is chosen."""

import re
from functools import partial

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import read_metrics, run_script
from test_losses import OBS, A, B, batch_of, compiled, constant, fresh

SIZES = dict(hidden_dims=(16, 8), skill_hidden_dims=(8,), gru_layers=1, skill_dim=2, batch_size=B)
close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)


def rows_of(script, lengths):
    """Episodes of these lengths; everything is the row's number."""
    numbers, ends = np.arange(sum(lengths), dtype=np.float32), np.cumsum(lengths) - 1
    last, column = np.isin(numbers, ends).astype(np.float32), numbers[:, None]
    s, a = column * np.ones(OBS), column / 100 * np.ones(A)
    return script.Batch(*map(np.float32, (s, a, numbers, s + 1, 1 - last, last)))


def test_windows_stay_inside_their_episode(opal):
    config = opal.Config(skill_length=3, discount=0.5)
    rows = rows_of(opal, (5, 2, 3, 4))
    windows, starts = opal.windows_of(rows, config), np.array([0, 1, 2, 7, 10, 11])
    inside = starts[:, None] + np.arange(3)
    np.testing.assert_array_equal(windows.observations[..., 0], inside)
    close(windows.actions[..., 0], inside / 100)
    close(windows.rewards, starts + 0.5 * (starts + 1) + 0.25 * (starts + 2))
    np.testing.assert_array_equal(windows.next_observations[:, 0], starts + 3)
    np.testing.assert_array_equal(windows.masks, [1, 1, 0, 0, 1, 0])
    np.testing.assert_array_equal(windows.ends, [0, 0, 1, 1, 0, 1])
    with pytest.raises(SystemExit, match="--skill-length 6"):
        opal.windows_of(rows, opal.Config(skill_length=6))
    with pytest.raises(SystemExit, match="--skill-length 10"):  # longer than the dataset
        opal.windows_of(rows_of(opal, (3, 3)), opal.Config(skill_length=10))


@pytest.mark.parametrize("preset", ["ogbench", "maze"])
def test_a_goal_is_worth_0_and_a_step_costs_a_tenth(opal, preset):
    """OGBench's rewards are -1 and 0, the mazes' 0 and 1."""
    settings = opal.PRESETS[preset]
    rewards = [-1, 0] if preset == "ogbench" else [0, 1]
    scaled = opal.rescale(rewards, settings["reward_scale"], settings.get("reward_shift", 0.0))
    close(scaled, [-0.1, 0.0])


def test_task_losses_by_hand(opal):
    """V = 1 and critics (3, 4): u = 2; Q regresses on R + 0.9^3 * V, where the mask is 1."""
    config = opal.Config(**SIZES, skill_length=3, discount=0.9, expectile=0.8, beta=0.5)
    agent, batch = fresh(opal, config), batch_of(opal, 0)
    value = agent.value.replace(params=constant(agent.value.params, 1.0))
    target = constant(agent.target_critic_params, [3, 4])
    agent = agent.replace(value=value, target_critic_params=target)
    inputs = agent, batch, None
    loss, info = compiled(opal, "value_loss", config)(value.params, *inputs)
    close([loss, info["v"]], [0.8 * 4, 1])
    policy = agent.actor.apply_fn(agent.actor.params, batch.observations)
    loss, info = compiled(opal, "actor_loss", config)(agent.actor.params, *inputs)
    close([loss, info["weight"]], [-np.e * policy.log_prob(batch.actions).mean(), np.e])
    expected = sum(((batch.rewards + 0.729 * batch.masks - q) ** 2).mean() for q in (3, 4))
    loss, _ = compiled(opal, "critic_loss", config)(target, *inputs)
    close(loss, expected)


def test_updates(opal):
    """Windows become (s_0, skill, R, s_c); half an online batch is of the newest skills played; the
    autoencoder and the task leave each other's networks alone."""
    config = opal.Config(**SIZES, skill_length=3)
    rows = rows_of(opal, (40,))
    windows = jax.tree.map(jnp.asarray, opal.windows_of(rows, config))
    buffer = jax.tree.map(lambda x: jnp.asarray(-1 - x[:30]), rows)  # here Z = A
    draw = jax.jit(partial(opal.online_batch, config=config))
    old, new = draw(windows, buffer, 4, jax.random.PRNGKey(0))
    assert len(old.rewards) == len(new.rewards) == B // 2
    assert set(map(float, new.rewards)) <= {-1, -2, -3, -4} and len(np.unique(old.rewards)) > 4
    agent = fresh(opal, config)
    labelled = jax.jit(opal.relabel)(agent, old)
    np.testing.assert_array_equal(labelled.observations, old.observations[:, 0])
    after, info = compiled(opal, "update", config)(agent, (old, new))
    batch = jax.tree.map(lambda *xs: np.concatenate(xs), labelled, new)
    loss = compiled(opal, "value_loss", config)
    close(info["value_loss"], loss(agent.value.params, agent, batch, None)[0])
    trained, _ = compiled(opal, "update_skills", config)(agent, old)
    skills = ("encoder", "prior", "decoder")
    for name in (*skills, "actor", "critic", "value"):
        kept, moved = (after, trained) if name in skills else (trained, after)
        same = jax.tree.map(np.array_equal, getattr(kept, name).params, getattr(agent, name).params)
        assert all(jax.tree.leaves(same)) and getattr(moved, name).step == 1
    assert (trained.key != agent.key).any()


class Count(gym.Env):
    """Its state counts steps, and pays its number; it is cut or terminates after `last` of them."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (OBS,))
    action_space = gym.spaces.Box(-1.0, 1.0, (A,))

    def __init__(self, last, cut):
        self.last, self.cut, self.seen = last, cut, []

    def reset(self, seed=None, options=None):
        self.count = 0
        return np.zeros(OBS, np.float32), {}

    def step(self, action):
        self.seen.append((self.count, action))
        self.count += 1
        state, end = np.full(OBS, self.count, np.float32), self.count == self.last
        return state, self.count, end and not self.cut, end and self.cut, {}


def test_a_step_of_the_environments_plays_a_skill(opal):
    """Three steps of the seed's own low-level policy, or to the end; others go on meanwhile."""
    config = opal.Config(**SIZES, skill_length=3, discount=0.5, num_seeds=2)
    agents = [fresh(opal, config, seed) for seed in (0, 1)]
    worlds = [Count(9, False), Count(4, False), Count(5, True), Count(9, False)]
    make = [lambda env=env: gym.wrappers.RecordEpisodeStatistics(env) for env in worlds]
    both = jax.tree.map(lambda *xs: np.stack(xs), *agents)
    envs = opal.SkillEnvs(gym.vector.SyncVectorEnv(make), {"agents": both}, config)
    envs.reset(seed=[0, 1, 2, 3])
    skills = np.random.default_rng(0).normal(size=(2, 4, 2)).astype(np.float32)
    first, rewards, *ends, _ = envs.step(skills[0])
    close(rewards, 4 * [1 + 0.5 * 2 + 0.25 * 3])
    assert not np.any(ends) and (first == 3).all()
    second, rewards, terminated, truncated, info = envs.step(skills[1])
    close(rewards, [4 + 2.5 + 1.5, 4, 4 + 2.5, 4 + 2.5 + 1.5])
    assert terminated.tolist() == [False, True, False, False] and first.max() == 3
    assert truncated.tolist() == [False, False, True, False]
    np.testing.assert_array_equal(second[:, 0], [6, 0, 0, 6])
    np.testing.assert_array_equal(info["final_obs"][:, 0], [6, 4, 5, 6])
    np.testing.assert_array_equal(info["final_info"]["episode"]["r"][1:3], [10, 15])
    for i, world in enumerate(worlds):
        decoder, (counts, actions) = agents[i // 2].decoder, zip(*world.seen, strict=True)
        states = np.float32(counts)[:, None] * np.ones(OBS, np.float32)
        held = skills[np.array(counts) // 3, i]
        close(decoder.apply_fn(decoder.params, states, held).mean(), np.stack(actions))


def test_online_rows_are_skills(opal, pendulum, tmp_path):
    flags = ["--dataset", pendulum, "--hidden-dims", "8", "--skill-hidden-dims", "8",
             "--gru-layers", "1", "--skill-length", "5", "--skill-steps", "10", "--batch-size",
             "16", "--offline-steps", "10", "--online-steps", "100", "--eval-episodes", "1",
             "--num-seeds", "2", "--interval", "50", "--run-dir", str(tmp_path)]  # fmt: skip
    opal.main(flags)
    arrays, _ = opal.load(tmp_path)
    steps = [list(arrays[f"agents/{name}/step"]) for name in ("encoder", "decoder", "actor")]
    assert steps == [[10, 10], [10, 10], [10 + 20] * 2]  # online an update per skill
    rows = {x.split("/")[1]: y for x, y in arrays.items() if x.startswith("buffers")}
    assert rows["actions"].shape == (2, 20, 8) and (rows["rewards"] < 0).all()
    following, ends = rows["next_observations"][:, :-1], rows["ends"][:, :-1]
    assert ((following == rows["observations"][:, 1:]).all(axis=2) == (ends == 0)).all()
    np.testing.assert_array_equal(np.flatnonzero(rows["ends"][0]), [9, 19])  # of the rounds
    code, out, err = run_script("results/evaluate.py", tmp_path)  # which plays skills, too
    found, last = [float(x) for x in re.findall("return (\\S+)", out)], read_metrics(tmp_path)[-2:]
    assert code == 0, err
    np.testing.assert_allclose(found, [float(row["return"]) for row in last], rtol=1e-3)


def test_a_skill_plays_its_window_again_and_the_better_one_is_chosen(opal):
    """Every episode goes one way, then the other; which is first is seen in no state, but pays."""
    config = opal.Config(skill_length=6, skill_dim=2, hidden_dims=(32,), skill_hidden_dims=(32,),
                         gru_layers=1, batch_size=32, skill_learning_rate=3e-3, beta=10.0,
                         learning_rate=3e-3)  # fmt: skip
    rng, time = np.random.default_rng(0), np.tile(np.arange(6), 300)
    way = np.repeat(rng.choice([-1.0, 1.0], 300), 6)
    s = np.stack([time / 3 - 1, rng.normal(size=1800)], axis=1)
    a = (way * (0.9 - 0.36 * time))[:, None]
    rows = opal.Batch(*map(np.float32, (s, a, way, s, time < 5, time == 5)))
    windows = jax.tree.map(jnp.float32, opal.windows_of(rows, config))
    create = jax.jit(partial(opal.create_agent, config=config))
    agents = create(jax.random.PRNGKey(0), rows.observations[:1], rows.actions[:1])
    agents = jax.tree.map(lambda x: x[None], agents)
    agents, _ = opal.update_steps(agents, windows, config, opal.update_skills, 300)

    def played(skills):
        """Actions (W, c) of the low-level policy in the windows' states, given skills (W, Z)."""
        seen = windows.observations.reshape(1, -1, 2)
        return opal.play(agents, seen, jnp.repeat(skills, 6, axis=0)[None]).reshape(300, 6)

    agent = jax.tree.map(lambda x: x[0], agents)
    skills, wanted = opal.relabel(agent, windows).actions, windows.actions[..., 0]
    assert np.abs(played(skills) - wanted).mean() < 0.1
    prior = agent.prior.apply_fn(agent.prior.params, windows.observations[:, 0]).mean()
    assert np.abs(played(prior) - wanted).mean() > 0.4  # without the window's skill: no idea
    agents, _ = opal.update_steps(agents, windows, config, opal.update, 300)
    chosen = opal.act(jax.tree.map(lambda x: x[0], agents), windows.observations[:, 0], config)
    assert np.abs(played(chosen) - wanted[np.argmax(windows.rewards)]).mean() < 0.2


def test_a_run_of_skills_is_no_dataset(collect, tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"script": "opal", "units": {}}')
    for command in ("replay", "rollout"):
        with pytest.raises(SystemExit):
            collect.main([command, str(tmp_path), "--id", "mine/skills-v0"])
        assert "its actions are skills" in capsys.readouterr().err
