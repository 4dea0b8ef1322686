"""PA-RL beyond the authors' numbers (test_golden.py): IQL's critic, distillation, who acts, the
order of an online round, a diffusion that improves."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import test_losses
from conftest import load_script
from test_losses import OBS, A, B, batch_of, template
from tqdm import tqdm

SIZES = dict(
    policy="gaussian", hidden_dims=(16, 8), critic_hidden_dims=(16, 8), policy_width=16,
    policy_blocks=1, attention_heads=2, action_bins=7, dropout_rate=0.0, batch_size=B, tau=0.2,
    num_critics=3, base_actions=6, kept_actions=4, ascent_steps=3, ascent_rate=5.0, num_actions=5,
    cql_alpha=2.0, learning_rate=1e-2, cloning_learning_rate=3e-3, policy_learning_rate=1e-3,
    policy_warmup=10, pretrain_steps=100, policy_tau=0.25,
)  # fmt: skip
close = partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)
equal = lambda x, y: jax.tree.all(jax.tree.map(np.array_equal, x, y))  # noqa: E731
config_of = lambda script, **changes: script.Config(**SIZES | changes)  # noqa: E731
averaged = lambda tau, *xs: jax.tree.map(lambda x, y, z: close(x + tau * (y - x), z), *xs)  # noqa: E731
quick = partial(jax.jit, compiler_options={  # to compile: these run a few times only
    "xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True})  # fmt: skip


def fresh(script, config, learnt=1):
    """test_losses.fresh of smaller policies and a bumpier Q, which has learnt or has not."""
    agent = test_losses.fresh(script, config)
    smaller = lambda x: np.float32(x * (2 / math.sqrt(x.shape[-2]) if x.ndim > 1 else 1))  # noqa: E731
    for name, scale in (("actor", smaller), ("critic", lambda x: 6 * x)):
        part, target = getattr(agent, name), f"target_{name}_params"
        new, old = (jax.tree.map(scale, x) for x in (part.params, getattr(agent, target)))
        agent = agent.replace(**{name: part.replace(params=new), target: old})
    return agent.replace(critic=agent.critic.replace(step=np.int32(learnt)))


def test_policies_drop_out_in_training_only(pa_rl):
    for name in ("diffusion", "transformer"):
        config = config_of(pa_rl, policy=name)
        agent, batch = fresh(pa_rl, config), batch_of(pa_rl, 0)
        inputs = agent.actor.params, batch.observations
        dropping = agent.policy.clone(config=config_of(pa_rl, policy=name, dropout_rate=0.5))
        for method, changes in (("loss", True), ("sample", False)):
            rest = (batch.actions, agent.key) if changes else (agent.key,)
            programs = {str(jax.make_jaxpr(getattr(x, method))(*inputs, *rest)) for x in
                        (agent.policy, dropping)}  # fmt: skip
            assert len(programs) == 1 + changes


def test_an_iql_critic(pa_rl):
    """V, by the minimum of the target critics that are drawn; Q at the new V, without a difference;
    the target's average. The policy is held."""
    config = config_of(pa_rl, critic="iql", value_bins=21, value_range=(-3.0, 2.0))
    agent, batch = fresh(pa_rl, config), batch_of(pa_rl, 0)
    new, info = quick(partial(pa_rl.update, config=config))(agent, batch)
    key, _, critic_key, value_key = jax.random.split(agent.key, 4)
    inputs = batch.observations, batch.actions[None], config, value_key
    q = pa_rl.action_values(agent, agent.target_critic_params, *inputs)[:, 0]  # (2, B)
    v = agent.value.apply_fn(agent.value.params, batch.observations)[:, 0]
    u = q.min(axis=0) - v
    close(info["value_loss"], np.where(u < 0, 0.3 * u * u, 0.7 * u * u).mean())
    following = agent.value.apply_fn(new.value.params, batch.next_observations)[:, 0]
    targets = batch.rewards + config.discount * batch.masks * following
    outputs = agent.critic.apply_fn(agent.critic.params, batch.observations, batch.actions)
    close(info["critic_loss"], pa_rl.value_error(outputs, targets, config).mean())
    assert "difference" not in info and equal(new.key, key) and equal(new.actor, agent.actor)
    assert not equal(new.value.params, agent.value.params)
    assert not equal(new.critic.params, agent.critic.params)
    averaged(0.2, agent.target_critic_params, new.critic.params, new.target_critic_params)


def test_pi_star_is_pi_until_the_critic_has_learnt(pa_rl):
    config, s = config_of(pa_rl), batch_of(pa_rl, 0).observations
    keys, data = jax.random.split(jax.random.PRNGKey(0)), batch_of(pa_rl, 0).actions
    for learnt in (0, 1):
        agent = fresh(pa_rl, config, learnt)
        found, _ = pa_rl.optimise(agent, s, keys, config, "argmax", data_actions=data)
        assert equal(found[0], data) != learnt


def test_the_datas_action_takes_the_worst_kept_ones_place(pa_rl):
    """Q is -a^2: of 0.6 ... 0.1 the 4 smallest are kept, and of them 0.4 gives way to the data's
    0.9, though it is worse; without data 0.4 stays."""
    config, s = config_of(pa_rl, ascent_steps=0), batch_of(pa_rl, 0).observations
    agent, keys = fresh(pa_rl, config), jax.random.split(jax.random.PRNGKey(0))
    samples = jnp.repeat(jnp.arange(6, 0, -1) / 10, B)[:, None]  # (6 * B, 1)
    policy = type("Policy", (), {"sample": lambda *_: samples})()
    agent = agent.replace(policy=policy, critic=agent.critic.replace(
        apply_fn=lambda params, s, a: -(a**2)[None]))  # fmt: skip
    for data, kept in ((jnp.full((B, 1), 0.9), [0.1, 0.2, 0.3, 0.9]), (None, [0.1, 0.2, 0.3, 0.4])):
        found, _ = pa_rl.optimise(agent, s, keys, config, "softmax", 100, data)
        assert all(equal(np.unique(x), np.float32(kept)) for x in np.moveaxis(found, 1, 0))


def test_a_distillation(pa_rl, monkeypatch):
    """The policy imitates pi*'s, among them the data's; the critic is held."""
    config, asked = config_of(pa_rl, critic="iql"), []
    agent, batch = fresh(pa_rl, config), batch_of(pa_rl, 0)

    def optimise(agent, observations, keys, config, selection, data_actions):
        asked.append((keys, selection, data_actions))
        return 0.5 * batch.actions[None], {"base_q": 7.0}

    monkeypatch.setattr(pa_rl, "optimise", optimise)
    new, info = pa_rl.distil(agent, batch, config)
    key, *keys, actor_key = jax.random.split(agent.key, 4)
    assert equal(asked[0][0], tuple(keys)) and asked[0][1:] == ("softmax", batch.actions)
    half = batch.replace(actions=0.5 * batch.actions)
    imitated, expected = pa_rl.imitate(agent, half, config, (key, actor_key))
    assert info == expected | {"base_q": 7.0} and equal(new.key, key)
    close(
        expected["actor_loss"],
        agent.policy.loss(agent.actor.params, half.observations, half.actions, actor_key),
    )
    assert equal(new.actor.params, imitated.actor.params)
    averaged(0.25, agent.target_actor_params, new.actor.params, new.target_actor_params)
    assert equal(*((x.critic, x.target_critic_params, x.value) for x in (new, agent)))


def test_who_acts(pa_rl, monkeypatch):
    """pi*: in training by acting_selection, in evaluation the best, with the states' own noise."""
    config, s = config_of(pa_rl, acting_selection="softmax"), jnp.ones((3, 2))
    spy = lambda _, s, keys, *rest: (np.append(keys, rest[1] == "argmax")[None, None], {})  # noqa: E731
    monkeypatch.setattr(pa_rl, "optimise", spy)
    keys = jax.random.split(key := jax.random.PRNGKey(0))
    assert equal(pa_rl.explore(None, s[0], key, config), np.append(keys, 0))
    x, y, z = (pa_rl.act(None, s * by, config)[0] for by in (1, 1, 1.0001))
    assert equal(x, y) and not equal(x, z) and x[-1] == 1


def test_the_policys_learning_rate(pa_rl):
    """Rises over 10 updates, in pretraining and online; the diffusion's falls in pretraining."""
    counts = np.array([0, 4, 9, 50, 99, 100, 104, 109, 500])
    expected = 1e-3 * np.array([0.3, 1.5, 3, 3, 3, 0.1, 0.5, 1, 1])
    close(pa_rl.policy_rate(counts, config_of(pa_rl)), expected, atol=1e-9)
    expected[:5] *= (1 + np.cos(np.pi * counts[:5] / 100)) / 2
    found = pa_rl.policy_rate(counts, config_of(pa_rl, policy="diffusion"))
    close(found, expected, atol=1e-9)


class Envs:  # two: one terminates every 25 steps, one is cut off every 60
    def reset(self, seed):
        self.seeds, self.log, self.age, self.rng = seed, [], np.zeros(2), np.random.default_rng(0)
        self.now = self.rng.normal(size=(2, OBS))
        return self.now, {}

    def step(self, actions):
        before, self.age, rewards = self.now, self.age + 1, self.rng.normal(size=2)
        final, self.now = self.rng.normal(size=(2, 2, OBS))
        ends = self.age == [25, 60]
        self.now[~ends], self.age[ends], terminated = final[~ends], 0, ends & [True, False]
        self.log.append((before, actions, rewards, final, 1.0 - terminated, 1.0 * ends))
        return self.now, rewards, terminated, ends & [False, True], {"final_obs": final}


def note(kind, agent, batch, _):  # what an update is, and of which rows its batch is
    table, i = agent.target_critic_params
    row = jnp.stack([kind, (batch.rewards == 99).mean(), (batch.rewards == 0).mean()])
    return agent.replace(target_critic_params=(table.at[i].set(row), i + 1)), {"q": 1.0}


def test_after_an_episode_as_many_distillations_and_then_updates(pa_rl, monkeypatch):
    """A critic's batch has 4 of 16 rows of the dataset, a distillation's draws its 60 and the
    ring's 40 alike, none that is not filled. At first the optimisers start anew."""
    changes = dict(num_seeds=2, discount=0.9, return_rule="infinite", seed=3, offline_ratio=0.25)
    config, keys, envs, s = config_of(pa_rl, **changes), [], Envs(), np.ones((60, OBS))
    dataset = jax.device_put(pa_rl.Batch(s, s[:, :A], 99 * s[:, 0], s, *[s[:, 0]] * 3))
    buffers = jax.tree.map(lambda x: np.zeros((2, 40, *x.shape[1:])), dataset)
    agents = jax.tree.map(lambda x: np.ones((2, *x.shape), x.dtype), template(pa_rl, config))
    agents = agents.replace(target_critic_params=(np.zeros((2, 160, 3)), np.zeros(2, int)))
    explore = lambda agents, s, key, _: keys.append(key) or np.full((2, A), s[0, 0])  # noqa: E731
    monkeypatch.setattr(pa_rl, "distil", partial(note, 1.0))
    monkeypatch.setattr(pa_rl, "update", partial(note, 2.0))
    monkeypatch.setattr(pa_rl, "explore_all", explore)
    for first, last in ((0, 10), (10, 80)):
        agents = agents.replace(critic=jax.tree.map(np.ones_like, agents.critic))
        inputs = agents, buffers, (config, dataset, envs, tqdm(disable=True)), first, last
        agents, buffers, info = pa_rl.episodes_round(*inputs)
        moments = {int(x.max()) for x in jax.tree.leaves(agents.critic.opt_state)}
        assert moments == {int(first > 0)} and equal(agents.actor.opt_state[1].count, [100, 100])
    for i, lengths in enumerate(([10, 25, 25, 20], [10, 60, 10])):
        kinds, old, unfilled = np.array(agents.target_critic_params[0][i].T)
        assert kinds.tolist() == [kind for n in lengths for kind in [1] * n + [2] * n]
        assert (old[kinds == 2] == 0.25).all() and 0.5 < old[kinds == 1].mean() < 0.75
        assert not unfilled.any()
    assert len(np.unique(np.concatenate(keys[10:]), axis=0)) == 70  # the seeds have one key here
    assert envs.seeds == [4 * 10**9 + 10, 5 * 10**9 + 10] and list(info["q"]) == [2.0, 2.0]
    rows = [np.stack(x, axis=1) for x in zip(*envs.log, strict=True)]  # (2, 70, ...)
    rows[5][:, -1] = 1  # the round's end
    returns = [pa_rl.monte_carlo_returns(*(rows[j][i] for j in (2, 4, 5)), config) for i in (0, 1)]
    for found, expected in zip(vars(buffers).values(), [*rows, np.array(returns)], strict=False):
        close(found[:, np.arange(40, 80) % 40], expected[:, -40:])


def test_a_diffusion_improves(pa_rl):
    """It clones uniform actions, which is what distillation does while Q knows nothing, and is then
    distilled: its samples come three times closer to the best action, s / 2."""
    config = config_of(pa_rl, policy="diffusion", policy_tau=1.0, policy_learning_rate=3e-3,
                       pretrain_steps=0, ascent_rate=0.002, num_critics=1,
                       base_actions=4)  # fmt: skip
    train = partial(pa_rl.update_steps.__wrapped__, update=pa_rl.distil, num_steps=300)
    train, rng = quick(partial(train, config=config)), np.random.default_rng(0)
    s, a = np.float32(rng.choice([-1, 1], (999, 1))), np.float32(rng.uniform(-1, 1, (999, 1)))
    dataset, key, gaps = pa_rl.Batch(s, a, *[s[:, 0]] * 4), jax.random.PRNGKey(0), []
    agent = quick(partial(pa_rl.create_agent, config=config))(key, s[:1], a[:1])
    q = lambda params, s, a: params - 10 * (a - s / 2) ** 2  # noqa: E731
    agent = agent.replace(critic=agent.critic.replace(apply_fn=q, params=np.zeros((1, 1, 1))))
    agents, sample = jax.tree.map(lambda x: np.array(x)[None], agent), quick(agent.policy.sample)
    for learnt in (0, 1):
        agents = agents.replace(critic=agents.critic.replace(step=np.full(1, learnt)))
        agents, _ = train(agents, dataset)
        params = jax.tree.map(lambda x: np.array(x)[0], agents.target_actor_params)
        gaps.append(np.abs(sample(params, s, key) - s / 2).mean())
    assert gaps[0] > 0.5 and gaps[1] < gaps[0] / 3, gaps


def test_the_control_climbs_q_through_all_steps_of_sampling(pa_rl):
    """Only the policy moves, and that by Adam on the gradient of -Q of its own samples."""
    control = load_script("results/controls/through_the_policy.py")
    config = config_of(pa_rl, policy="diffusion", pretrain_steps=0)
    agent, batch = fresh(pa_rl, config), batch_of(pa_rl, 0)
    key, actor_key = jax.random.split(agent.key)

    def total(params):
        actions = agent.policy.sample(params, batch.observations, actor_key)
        outputs = agent.critic.apply_fn(
            agent.critic.params, batch.observations, actions
        )  # (N, B, 1)
        return -outputs.sum() / outputs.size

    new, info = control.ascend(agent, batch, config)
    close(info["actor_loss"], total(agent.actor.params))
    expected = agent.actor.apply_gradients(grads=jax.grad(total)(agent.actor.params))
    jax.tree.map(close, new.actor.params, expected.params)
    assert not equal(new.actor.params, agent.actor.params) and equal(new.key, key)
    averaged(0.25, agent.target_actor_params, new.actor.params, new.target_actor_params)
    assert equal(*((x.critic, x.target_critic_params, x.value) for x in (new, agent)))
