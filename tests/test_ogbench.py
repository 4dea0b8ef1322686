"""OGBench's recipe; ReBRAC and FQL: losses by hand, next actions, a flow that clones two modes, and
a one-step policy where it is known to stand."""

import dataclasses
import subprocess
import sys
from functools import partial

import gymnasium as gym
import jax
import jax.numpy as jnp
import minari
import mujoco
import numpy as np
import pytest
from conftest import ROOT, load_script, read_arrays, read_metrics
from test_learning import trained
from test_losses import B, batch_of, compiled, fresh

SIZES = dict(hidden_dims=(16, 8), batch_size=B)
close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------- ReBRAC
def q_at(agent, batch, actions):
    return agent.critic.apply_fn(agent.critic.params, batch.observations, actions)  # (N, B)


def test_rebrac_losses(rebrac):
    """The target pays for the noisy next action's distance from the data's; pi for its own."""
    config = rebrac.Config(**SIZES, critic_imitation=0.7, actor_imitation=0.3, target_noise=0.8)
    agent, batch, key = fresh(rebrac, config), batch_of(rebrac, 0), jax.random.PRNGKey(3)
    batch = batch.replace(next_actions=batch_of(rebrac, 1).actions)
    noise = np.clip(0.8 * jax.random.normal(key, batch.actions.shape), -0.5, 0.5)
    following = agent.actor.apply_fn(agent.target_actor_params, batch.next_observations)
    following = np.clip(following + noise, -1, 1)
    q = agent.critic.apply_fn(agent.target_critic_params, batch.next_observations, following)
    distance = ((following - batch.next_actions) ** 2).sum(axis=1)
    target = batch.rewards + 0.99 * batch.masks * (q.min(axis=0) - 0.7 * distance)
    q = agent.critic.apply_fn(agent.critic.params, batch.observations, batch.actions)
    found, _ = compiled(rebrac, "critic_loss", config)(agent.critic.params, agent, batch, key)
    close(found, ((q - target) ** 2).mean(axis=1).sum())
    actions = agent.actor.apply_fn(agent.actor.params, batch.observations)
    tree, q = agent.critic.params["params"], q_at(agent, batch, actions)
    bias = tree["bias"] + np.array([0.0, np.median(q[0] - q[1])])  # now either is the smaller one
    critic = agent.critic.replace(params={"params": tree | {"bias": np.float32(bias)}})
    agent = agent.replace(critic=critic)
    q_of = partial(q_at, agent, batch)
    assert set(np.argmin(q_of(actions), axis=0).tolist()) == {0, 1}
    magnitude = np.abs(q_of(actions).min(axis=0)).mean()  # a constant: a gradient tells, no value

    def by_hand(params):
        actions = agent.actor.apply_fn(params, batch.observations)
        imitation = ((actions - batch.actions) ** 2).sum(axis=1).mean()
        return 0.3 * imitation - q_of(actions).min(axis=0).mean() / magnitude

    wanted = jax.value_and_grad(by_hand)(agent.actor.params)
    loss = partial(rebrac.actor_loss, agent=agent, batch=batch, key=None, config=config)
    (found, _), gradient = jax.value_and_grad(loss, has_aux=True)(agent.actor.params)
    jax.tree.map(close, (found, gradient), wanted)


def test_rebrac_online(rebrac):
    """beta_2 is 0; beta_1 falls in a line to a half and stays there, wherever offline ended."""
    config = rebrac.Config(**SIZES, critic_imitation=0.7, actor_imitation=0.4, online_steps=8)
    batch = batch_of(rebrac, 0).replace(next_actions=batch_of(rebrac, 1).actions)
    agent, losses = fresh(rebrac, config).replace(offline_updates=np.int32(1_001)), []
    for done, share in ((0, 1.0), (2, 0.75), (4, 0.5), (6, 0.5)):  # each moves the policy
        now = agent.replace(critic=agent.critic.replace(step=1_001 + done))
        weights = dict(actor_imitation=0.4 * share, critic_imitation=0.0)
        _, wanted = rebrac.update(now, batch, dataclasses.replace(config, **weights))
        _, found = rebrac.online_update(now, batch, config)
        jax.tree.map(close, found, wanted)
        losses.append(float(found["actor_loss"]))
    assert losses[0] > losses[1] > losses[2] == losses[3]


def test_rebrac_goes_on_without_the_penalty(rebrac, pendulum, tmp_path):
    """In a whole run: a penalty of 1e6 is in the critic's loss offline, and not online."""
    flags = ["--dataset", pendulum, "--hidden-dims", "8", "--batch-size", "16", "--interval", "10",
             "--offline-steps", "10", "--online-steps", "20", "--eval-episodes", "1",
             "--critic-imitation", "1e6", "--run-dir", str(tmp_path)]  # fmt: skip
    rebrac.main(flags)
    losses = [float(row["critic_loss"]) for row in read_metrics(tmp_path)]
    assert losses[0] > 1e9 and max(losses[1:]) < 1e6
    assert rebrac.load(tmp_path)[0]["agents/offline_updates"].tolist() == [10]


def test_next_actions(rebrac, pendulum):
    """An episode's next row's action, at its end its own."""
    config, data, env = rebrac.parse_config(["--dataset", pendulum])
    rows, _ = rebrac.load_dataset(config, data, env)
    following, last = rebrac.following_actions(rows), np.flatnonzero(rows.ends)
    np.testing.assert_array_equal(following[last], rows.actions[last])
    inside = np.flatnonzero(rows.ends == 0)
    np.testing.assert_array_equal(following[inside], rows.actions[inside + 1])


# -------------------------------------------------------------------------------------------- FQL
def test_fql_losses(fql):
    """At the recorded keys, from the networks' own outputs."""
    batch, key = batch_of(fql, 0), jax.random.PRNGKey(3)
    for minimum, normalize in ((False, True), (True, False)):
        config = fql.Config(**SIZES, imitation=3.0, target_minimum=minimum, normalize_q=normalize)
        agent = fresh(fql, config)
        q_of, mu = agent.critic.apply_fn, partial(agent.actor.apply_fn, agent.actor.params)
        noise = jax.random.normal(key, batch.actions.shape)
        following = np.clip(mu(batch.next_observations, noise), -1, 1)
        q = q_of(agent.target_critic_params, batch.next_observations, following)
        next_v = q.min(axis=0) if minimum else q.mean(axis=0)
        target = batch.rewards + 0.99 * batch.masks * next_v
        errors = (q_of(agent.critic.params, batch.observations, batch.actions) - target) ** 2
        found, _ = compiled(fql, "critic_loss", config)(agent.critic.params, agent, batch, key)
        close(found, errors.mean())
        actions, x = mu(batch.observations, noise), noise
        for i in range(10):
            time = np.full((B, 1), i / 10, np.float32)
            x = x + agent.flow.apply_fn(agent.flow.params, batch.observations, x, time) / 10
        distillation = ((actions - np.clip(x, -1, 1)) ** 2).mean()
        q = q_of(agent.critic.params, batch.observations, np.clip(actions, -1, 1)).mean(axis=0)
        expected = 3.0 * distillation - q.mean() / (np.abs(q).mean() if normalize else 1.0)
        found, info = compiled(fql, "actor_loss", config)(agent.actor.params, agent, batch, key)
        close(found, expected, rtol=1e-3)
        close(info["distillation"], distillation, rtol=1e-3)
    noise_key, time_key = jax.random.split(key)
    noise, time = (
        jax.random.normal(noise_key, batch.actions.shape),
        jax.random.uniform(time_key, (B, 1)),
    )
    between = noise + time * (batch.actions - noise)
    velocity = agent.flow.apply_fn(agent.flow.params, batch.observations, between, time)
    found, _ = compiled(fql, "flow_loss", config)(agent.flow.params, agent, batch, key)
    close(found, ((velocity - batch.actions + noise) ** 2).mean())


def test_an_update_of_fql_has_all_gradients_at_the_old_parameters(fql):
    config, batch = fql.Config(**SIZES, tau=0.2, learning_rate=1e-2), batch_of(fql, 0)
    agent = fresh(fql, config)
    new, _ = compiled(fql, "update", config)(agent, batch)
    key, *keys = jax.random.split(agent.key, 4)
    for name, each in zip(("critic", "flow", "actor"), keys, strict=True):
        loss = getattr(fql, f"{name}_loss")
        state, _ = fql.gradient_step(getattr(agent, name), loss, agent, batch, each, config)
        jax.tree.map(partial(close, rtol=1e-3, atol=1e-4), getattr(new, name).params, state.params)
    mix = jax.tree.map(
        lambda q, old: 0.2 * q + 0.8 * old, new.critic.params, agent.target_critic_params
    )
    jax.tree.map(close, new.target_critic_params, mix)
    np.testing.assert_array_equal(new.key, key)


def test_fql_clones_two_modes_and_moves_both(fql):
    """Actions are -0.6 or 0.6, the reward is 2 + a, the episode is over: the flow keeps both modes,
    of which a Gaussian would be the mean. Where the slope of Q / mean|Q|, 1 / 2.2, balances twice
    the distance from the flow, the one-step policy stands 0.22 above it, for every noise."""
    rng, zeros = np.random.default_rng(0), np.zeros((2000, 1), np.float32)
    actions = rng.choice([-0.6, 0.6], (2000, 1)) + 0.05 * rng.normal(size=(2000, 1))
    rewards, ends = np.float32(2 + actions[:, 0]), np.ones(2000, np.float32)
    dataset = fql.Batch(zeros, np.float32(actions), rewards, zeros, 1 - ends, ends)
    config = fql.Config(hidden_dims=(64, 64), batch_size=256, learning_rate=2e-3)
    agent = trained(fql, config, dataset, 1500)[0][-1]
    noise = jax.random.normal(jax.random.PRNGKey(1), (2000, 1))
    cloned = np.asarray(fql.flow_actions(agent, zeros, noise, config))
    assert 0.35 < np.mean(cloned > 0) < 0.65
    assert np.mean(np.abs(np.abs(cloned) - 0.6) < 0.2) > 0.8
    taken = np.asarray(agent.actor.apply_fn(agent.actor.params, zeros, noise))
    assert abs(np.median(taken - cloned) - 0.22) < 0.08
    assert abs(np.mean(taken > 0.2) - np.mean(cloned > 0)) < 0.1
    again = [fql.act(agent, jnp.ones((5, 1)) * x, config) for x in (1.0, 1.0, 2.0)]
    np.testing.assert_array_equal(again[0], again[1])
    assert not np.array_equal(again[0], again[2])
    pairs = [fql.act(agent, jnp.float32([[1.0], [x]]), config) for x in (2.0, 3.0)]
    assert pairs[0][0] != pairs[1][0]  # the same state, in another step


# --------------------------------------------------------------------------------- OGBench's recipe
@pytest.fixture(scope="module")
def collect():
    return load_script("baselines/collect.py")


@pytest.mark.parametrize("world", ["cube-single", "puzzle-3x3", "pointmaze-medium"])
def test_ogbench_regenerated(world, collect, iql, tmp_path, monkeypatch):
    """Rewards are those of the task's own environment in the states before the actions, a success
    is a termination, the next segment goes on; and the same command makes the same bytes."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    pytest.importorskip("ogbench")
    flags = ["ogbench", world, "--steps", "2000", "--seed", "6"]
    collect.main([*flags, "--processes", "1"])
    kind = "navigate" if "maze" in world else "play"
    name = f"ogbench/{world}-{kind}-task{collect.TASKS.get(world, 2)}-v0"
    file = tmp_path / name / "data" / "main_data.hdf5"
    first = file.read_bytes()
    dataset = minari.load_dataset(name)
    env = dataset.recover_environment(eval_env=True)
    assert "singletask" in env.spec.id and dataset.total_steps == 2002
    episode, other = dataset.iterate_episodes()
    config, data, env = iql.parse_config(["--dataset", name])
    assert config.preset == {"cube-single": "ogbench/cube"}.get(world, "ogbench")
    rows, source = iql.load_dataset(config, data, env)
    assert source["reference"] == [0.0, 1.0] and np.abs(rows.actions).max() <= 1
    ended = np.concatenate([episode.terminations, other.terminations])
    np.testing.assert_array_equal(rows.masks, 1 - ended)
    ended[[1000, 2001]] = True
    np.testing.assert_array_equal(rows.ends, ended)
    assert not np.array_equal(episode.observations[0], other.observations[0])
    assert not np.array_equal(episode.observations[-1], episode.observations[-2])
    if world == "pointmaze-medium":
        env.reset(seed=0)
        goal, tolerance = env.unwrapped.cur_goal_xy, env.unwrapped._goal_tol
        places = np.concatenate([episode.observations[:-1], other.observations[:-1]])
        near = np.linalg.norm(places - goal, axis=1) <= tolerance  # in 4 of 2,002 rows
        np.testing.assert_array_equal(rows.rewards, near - 1.0)
        np.testing.assert_array_equal(rows.masks, ~near)
        assert near.any()
    if world == "pointmaze-medium":  # started anew, and by two processes
        command = [sys.executable, ROOT / "baselines/collect.py", *flags, "--processes", "2"]
        subprocess.run([*command, "--force"], check=True)
    else:
        collect.main([*flags, "--processes", "1", "--force"])
    assert file.read_bytes() == first


def test_rewards_are_the_environments_own(collect):
    """The recorded states, set in the task's environment, one after the other: its reward and its
    success there are what the recipe writes; some rows are successes."""
    relabel = pytest.importorskip("ogbench.relabel_utils").relabel_dataset
    name = "cube-single-singletask-task2-v0"
    options = {"terminate_at_goal": False, "mode": "data_collection", "max_episode_steps": 300}
    world, env = gym.make("cube-single-v0", **options), gym.make(name)
    np.random.seed(0)
    played = [*collect.manipulate(world, "cube-single", np.random.default_rng(0), 0, None)]
    rows = {"qpos": np.stack([info["prev_qpos"] for *_, info in played])}
    relabel(name, env, rows)
    inner, expected = env.unwrapped, []
    for qpos in rows["qpos"]:
        inner._data.qpos[:] = qpos
        mujoco.mj_forward(inner._model, inner._data)
        inner.post_step()
        expected.append((inner.compute_reward(), not inner.terminate_episode()))
    np.testing.assert_array_equal(np.stack([rows["rewards"], rows["masks"]], axis=1), expected)
    assert 0 < rows["masks"].mean() < 1
    for (_, _, following, _), (observation, *_) in zip(played, played[1:], strict=False):
        np.testing.assert_array_equal(following, observation)


def test_ogbench_refusals(collect, capsys):
    for flags in (["cube-single", "--task", "6"], ["scene", "--type", "navigate"]):
        with pytest.raises(SystemExit):
            collect.main(["ogbench", *flags, "--steps", "10"])
        assert "a task of 1 ... 5, of type play" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        collect.main(["ogbench", "scene", "--processes", "-1"])
    assert "--processes -1: must be in" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["cal_ql", "enoto", "off2on", "sac_finetune"])
def test_relatives_are_pessimistic_as_cql_is(name, cql):
    """In every domain, in the same units: claims compare them, SAC goes on from CQL's agents."""
    relative = load_script(f"algorithms/{name}.py")
    for domain in cql.PRESETS.keys() & relative.PRESETS.keys():
        one, other = (dataclasses.asdict(x.Config(**x.PRESETS[domain])) for x in (cql, relative))
        for word in ("cql_alpha", "reward_scale", "reward_shift", "normalize_observations"):
            assert one[word] == other[word], (domain, word)


def test_agents_of_the_family_go_on_in_each_other(cql, cal_ql, sac_finetune):
    """--init-from wants the same networks and units under every preset; the -wsrl ones those of
    cql.py with ten critics and LayerNorm."""

    def made(script, preset, **more):
        config = script.dataclasses.replace(script.Config(), **script.PRESETS[preset] | more)
        start = partial(script.create_agent, config=config)
        agent = jax.eval_shape(start, jax.random.PRNGKey(0), np.zeros((1, 3)), np.zeros((1, 2)))
        shapes = jax.tree.map(lambda x: x.shape, (agent.actor.params, agent.critic.params))
        names = "normalize_observations", "normalize_returns", "reward_scale", "reward_shift"
        return shapes, [getattr(config, name) for name in names]

    for preset in cql.PRESETS:
        assert made(cql, preset) == made(cal_ql, preset) == made(sac_finetune, preset), preset
        wide = made(cql, preset, num_critics=10, layer_norm=True)
        assert wide == made(sac_finetune, f"{preset}-wsrl"), preset


@pytest.fixture(scope="module")
def anywhere(iql, pendulum, tmp_path_factory):
    """Folders of two runs of one command, from two states of NumPy's generator, in a world that
    starts where this says, whatever reset's seed is; so do OGBench's mazes."""
    reset, folder = gym.envs.classic_control.PendulumEnv.reset, tmp_path_factory.mktemp("runs")

    def anywhere(env, **keywords):
        _, info = reset(env, **keywords)
        env.state = np.random.uniform(-1.0, 1.0, 2)
        return env._get_obs(), info

    flags = [
        "--dataset",
        pendulum,
        "--offline-steps=0",
        "--online-steps=40",
        "--interval=20",
        "--hidden-dims=8",
        "--batch-size=8",
        "--eval-episodes=10",
        "--learning-rate=0",
    ]  # so that the returns depend on the starts alone
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gym.envs.classic_control.PendulumEnv, "reset", anywhere)
        for seed in range(2):
            np.random.seed(seed)
            iql.main([*flags, f"--run-dir={folder}/{seed}"])
        yield folder


def test_starts_that_no_seed_determines_are_the_same_again(anywhere):
    one, other = anywhere / "0", anywhere / "1"
    assert read_arrays(one) == read_arrays(other)
    first, second = read_metrics(one)
    assert [first, second] == read_metrics(other) and first["return"] == second["return"]


def test_evaluate_finds_those_starts_again(anywhere):
    tool, folder = load_script("results/evaluate.py"), anywhere / "0"
    module, said = tool.load_run(folder)
    config = tool.config_of(module, said, folder, None)
    agents = tool.restore_agents(module, config, said, folder)
    returns, _ = tool.evaluate(module, agents, said, config)
    assert len(np.unique(returns)) == 10
    wanted = float(read_metrics(folder)[-1]["return"])
    np.testing.assert_allclose(returns.mean(), wanted, rtol=1e-4)


def test_seeds_of_ten_digits(iql, pendulum, tmp_path):
    """OGBench's generator takes 32 bits; a round must not be lost to that."""
    flags = ["--dataset", pendulum, "--hidden-dims", "8", "--batch-size", "16", "--interval", "10"]
    flags += ["--offline-steps", "10", "--online-steps", "0", "--eval-episodes", "1"]
    iql.main([*flags, "--seed", "2000000000", "--run-dir", str(tmp_path)])
    assert len(read_metrics(tmp_path)) == 1


def test_actions_of_another_width_are_refused(iql, pendulum):
    config, data, env = iql.parse_config(["--dataset", pendulum])
    env.action_space = gym.spaces.Box(-2.0, 2.0, (3,))
    with pytest.raises(SystemExit, match="bad rows"):
        iql.load_dataset(config, data, env)


def test_an_infinite_box_is_refused(iql, pendulum):
    class Endless(gym.Env):
        observation_space = gym.spaces.Box(-1.0, 1.0, (3,))
        action_space = gym.spaces.Box(-np.inf, np.inf, (1,))

    gym.register("Endless-v0", Endless)
    with pytest.raises(SystemExit, match="not symmetric and finite"):
        iql.parse_config(["--dataset", pendulum, "--env-id", "Endless-v0"])


def test_goals_of_dense_rewards_are_refused(collect, capsys):
    """There every reward is above 0, so that every episode would end with its first step."""
    env = gym.make("gymnasium_robotics:PointMaze_UMazeDense-v3", continuing_task=True)
    observations = {name: np.zeros((3, *x.shape)) for name, x in env.observation_space.items()}
    rest = np.zeros((2, 2)), [0.3, 0.4], np.zeros(2)
    episode = collect.episode_buffer(observations, *rest)
    minari.create_dataset_from_buffers("maze/dense-v0", [episode], env=env, eval_env=env)
    with pytest.raises(SystemExit):
        collect.main(["goals", "maze/dense-v0", "--id", "maze/dense-ends-v0"])
    assert "rewards are not 0 and, at the goal, 1" in capsys.readouterr().err
