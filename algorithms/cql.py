"""Conservative Q-learning (CQL): train on a fixed dataset, then go on in the environment.

A Q-function trained on fixed data overrates actions that the data lack, and a policy finds just
those. CQL is SAC whose critic is also pushed down where the policy, or a uniform one, would act,
and up on the actions of the data. Online the same losses go on, half of a batch from the dataset.

    Kumar, Zhou, Tucker, Levine: Conservative Q-Learning, arXiv 2006.04779

    L_Q     = sum_i E[ (r + discount * V(s') - Q_i(s, a))^2 ] + cql_alpha * D_i
    V(s')   = max_j min_i Qtarget_i(s', a'_j), a'_j ~ pi(s'), j = 1 ... backup_actions
    D_i     = E[ logsumexp_j (Q_i(s, a_j) - log p(a_j)) - Q_i(s, a) ], num_actions a_j each from the
              uniform density, pi(s'), pi(s); in kitchen Q_i(s, a) among them, without log p
    L_mult  = -E[ multiplier * cql_alpha * (D - gap) ], multiplier * (D_i - gap) for D_i in L_Q
    L_pi    = E[ temperature * log pi(a | s) - min_i Q_i(s, a) ], a ~ pi(s)
    L_alpha = -temperature * E[ log pi(a | s) + target_entropy ]

    python algorithms/cql.py  # on the repository's data, or: --dataset mujoco/hopper/medium-v0

Deviations from Cal-QL's authors' code (JaxCQL's; CQL's own takes max_j, then min_i):
 1. The temperature's loss is linear in it, not in its logarithm; output layers start like hidden
    ones, not with 1e-2; last rows of cut episodes stay; two layers in the short run, not three.
 2. Online, after 1,000 frozen steps, every step has an update (theirs: episodes). Rounds begin with
    fresh episodes; the last ones, and so their returns, are cut off as by a time limit.
 3. Locomotion (but raw rewards) and dense Adroit follow CORL, except in its one buffer; PointMaze
    is ours, OGBench FQL's, but with cql_alpha 5 (github.com/andypeng05/wsrl), not 0.01. Kitchen
    goes on after 4 subtasks, Minari's antmaze at the goal: values tend to 500, the authors' to 5.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "jax==0.10.2", "flax==0.12.8", "optax==0.2.8", "distrax==0.1.9", "numpy==2.4.6",
#   "tfp-nightly==0.26.0.dev20261027", "gymnasium[mujoco]==1.4.0", "gymnasium-robotics==1.4.2",
#   "mujoco==3.11.0", "minari[hdf5,hf]==0.5.4", "tyro==1.0.16", "tqdm==4.70.1",
# ]
# ///
import csv
import dataclasses
import hashlib
import json
import os
import time
from functools import partial
from pathlib import Path
from typing import Any, Literal

import distrax
import flax
import flax.linen as nn
import gymnasium as gym
import jax
import jax.numpy as jnp
import minari
import numpy as np
import optax
import tyro
from flax.training.train_state import TrainState
from tqdm import tqdm


# ---------------------------------------------------------------------------------------- Config
@dataclasses.dataclass(frozen=True)
class Config:
    # Run
    seed: int = 0  # the first seed
    num_seeds: int = 1  # seeds trained side by side: seed, seed + 1, ...
    preset: str = "auto"  # settings of a domain, see PRESETS; auto: from dataset and environment
    dataset: str = "hopper/sac-medium-replay-v0"  # Minari id, on this machine
    env_id: str = ""  # Gymnasium id; default: the dataset's evaluation environment
    offline_steps: int = 1_000_000  # updates on the dataset
    online_steps: int = 1_000_000  # environment steps after that, per seed
    interval: int = 10_000  # updates or environment steps per round: train, evaluate, save
    eval_episodes: int = 10  # per evaluation and seed; more than 10 in tens
    run_dir: str = ""  # folder of this run; default: runs/<script>/<dataset>/seed<seed>
    init_from: str = ""  # folder of a finished run: skip all but the last phase, use its agents
    wandb: bool = False  # also log to Weights & Biases
    # Data and optimisation
    normalize_observations: bool = False  # by the dataset's mean and standard deviation
    normalize_returns: bool = False  # rewards times 1000 / (max - min return in the dataset)
    reward_scale: float = 1.0  # r <- reward_scale * r + reward_shift, after the above
    reward_shift: float = 0.0  # see reward_scale
    batch_size: int = 256  # transitions per update
    discount: float = 0.99  # per step
    tau: float = 0.005  # target critic: fraction of the new critic per update
    buffer_size: int = 1_000_000  # online transitions kept, per seed; the oldest go first
    hidden_dims: tuple[int, ...] = (256, 256)  # widths of every network
    critic_hidden_dims: tuple[int, ...] = (256, 256)  # but of the critics these
    learning_rate: float = 3e-4  # Adam, every network
    policy_learning_rate: float = 1e-4  # but for policy and temperature this
    warmup_steps: int = 1_000  # environment steps before the first online update
    offline_ratio: float = 0.5  # of every online batch, from the dataset
    # SAC and CQL
    num_critics: int = 2  # Q-functions; the minimum counts
    target_critics: int = 2  # so many of them, drawn anew per micro-batch, in its targets
    layer_norm: bool = False  # in critics and policy
    entropy_per_action: float = -1.0  # target entropy (nats) per action dimension
    cql_alpha: float = 5.0  # weight of the difference
    lagrange: bool = False  # learn a multiplier that holds the difference at target_gap
    target_gap: float = 0.8  # of the difference, with --lagrange
    num_actions: int = 10  # sampled from each of the three sources, per state
    micro_batches: int = 8  # parts of a batch, one after the other; 8 suit a CPU, 1 a GPU
    backup_actions: int = 1  # next actions, of which the best counts
    importance_sampling: bool = True  # no: the data's action joins the sampled ones, unweighted
    difference_range: tuple[float, float] = (-1e9, 1e9)  # a row's difference is clipped to it
    return_rule: Literal["finite", "infinite", "sparse"] = "finite"  # see monte_carlo_returns
    failure_reward: float = 0.0  # of a failed step, environment's units (config.json: agent's)


THREE_LAYERS = dict(hidden_dims=(256,) * 3, critic_hidden_dims=(256,) * 3)
MUJOCO_CQL = dict(cql_alpha=10.0, policy_learning_rate=3e-5, normalize_observations=True)
MAZE = dict(lagrange=True, backup_actions=10, critic_hidden_dims=(256,) * 4, return_rule="infinite")
MAZE |= dict(reward_scale=10.0, reward_shift=-5.0, eval_episodes=100, interval=50_000)
WIDE = dict(hidden_dims=(512,) * 3, critic_hidden_dims=(512,) * 3, return_rule="infinite")
OGBENCH = MAZE | dict(lagrange=False, cql_alpha=5.0, reward_shift=0.0, hidden_dims=(256,) * 4)
KITCHEN = WIDE | dict(importance_sampling=False, backup_actions=10, offline_ratio=0.25)
PRESETS = {  # auto: the first whose name is in the dataset's or the environment's, else mujoco
    "sac-medium-replay": MUJOCO_CQL | dict(offline_steps=10**4, online_steps=10**4, interval=2000),
    "ogbench": OGBENCH | dict(eval_episodes=50),
    "maze": MAZE,  # antmaze, pointmaze
    "kitchen": KITCHEN | dict(offline_steps=500_000, online_steps=1_500_000),
    "adroit": THREE_LAYERS | dict(cql_alpha=1.0, backup_actions=10, difference_range=(-200.0, 1e9)),
    "mujoco": THREE_LAYERS | MUJOCO_CQL,
}
INIT_FROM = ("cql", "cal_ql")  # scripts whose agents --init-from takes
METRICS = {  # the algorithm's own columns of metrics.csv, with their healthy range
    "critic_loss": "squared TD error, summed over critics; bounded, may grow with q",
    "difference": "soft maximum of Q minus Q of the data; falls, online it may rise for a while",
    "multiplier": "of the difference (1 without --lagrange); rises while it is above target_gap",
    "q": "mean Q of the batch; below the discounted return, never far above",
    "below_return": "share of the policy's actions with Q below the Monte-Carlo return; Cal-QL's",
    "actor_loss": "temperature * log pi - Q; falls as q rises",
    "entropy": "-log pi of the policy's own actions (nats); settles at the target entropy",
    "temperature": "price of a nat of entropy; from 1 to where the entropy is at its target",
}


# ---------------------------------------------------------------------------- Networks and agent
def orthogonal(key, shape, dtype=jnp.float32):
    """Orthogonal, gain sqrt(2); under vmap in turn, for XLA's batched QR can hang on few cores."""
    draw = partial(nn.initializers.orthogonal(2**0.5), shape=shape, dtype=dtype)
    return jax.custom_batching.sequential_vmap(draw)(key)


class MLP(nn.Module):
    """Hidden layers, on demand with LayerNorm and dropout: (..., F) -> (..., H)."""

    hidden_dims: tuple[int, ...]
    dropout_rate: float = 0.0
    layer_norm: bool = False
    activation: Any = nn.relu

    @nn.compact
    def __call__(self, x, training=False):
        for width in self.hidden_dims:
            x = nn.Dense(width, kernel_init=orthogonal)(x)  # (..., width)
            x = self.activation(nn.LayerNorm()(x) if self.layer_norm else x)
            x = nn.Dropout(self.dropout_rate, deterministic=not training)(x)
        return x


class Value(nn.Module):
    """A scalar function of its inputs, V(s) or Q(s, a): (B, F), ... -> (B,)."""

    hidden_dims: tuple[int, ...]
    layer_norm: bool = False

    @nn.compact
    def __call__(self, *inputs):
        mlp = MLP(self.hidden_dims, layer_norm=self.layer_norm)
        x = mlp(jnp.concatenate(inputs, axis=-1))  # (B, H)
        kernel = self.param("kernel", orthogonal, (x.shape[-1], 1))
        bias = self.param("bias", nn.initializers.zeros, ())
        return (x * kernel[:, 0]).sum(axis=-1) + bias  # a matmul with one column is slow on a CPU


def ensemble(network, size):
    """`size` networks of a class, each with its own parameters: their outputs are (N, ...)."""
    axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "in_axes": None}
    return nn.vmap(network, axis_size=size, **axes)


class ScaledTanhGaussianPolicy(nn.Module):
    """pi: (B, O) -> a diagonal Gaussian, squashed by tanh, over actions (B, A); narrow at first."""

    hidden_dims: tuple[int, ...]
    action_dim: int
    layer_norm: bool = False

    @nn.compact
    def __call__(self, observations):
        features = MLP(self.hidden_dims, layer_norm=self.layer_norm)(observations)  # (B, H)
        mean = nn.Dense(self.action_dim, kernel_init=orthogonal)(features)  # (B, A)
        log_std = nn.Dense(self.action_dim, kernel_init=orthogonal)(features)  # (B, A)
        scale = self.param("log_std_scale", nn.initializers.ones, ())
        shift = self.param("log_std_shift", nn.initializers.constant(-1.0), ())
        std = jnp.exp(jnp.clip(scale * log_std + shift, -20.0, 2.0))  # (B, A)
        gaussian = distrax.MultivariateNormalDiag(mean, std)
        return distrax.Transformed(gaussian, distrax.Block(distrax.Tanh(), 1))


def from_log(params):
    """A positive scalar: the temperature, or the multiplier, which has this upper limit."""
    return jnp.minimum(jnp.exp(params["log"]), 1e6)


@flax.struct.dataclass
class Agent:
    """All that training changes. Outside the losses with a leading axis of seeds, (S, ...)."""

    actor: TrainState
    critic: TrainState
    temperature: TrainState
    multiplier: TrainState
    target_critic_params: Any
    key: jax.Array


def create_agent(key, observation, action, config):
    """A fresh agent from its random key (2,), an observation (1, O) and an action (1, A)."""
    key, actor_key, critic_key, _ = jax.random.split(key, 4)
    actor = ScaledTanhGaussianPolicy(config.hidden_dims, action.shape[1], config.layer_norm)
    critic = ensemble(Value, config.num_critics)(config.critic_hidden_dims, config.layer_norm)
    actor_params = actor.init(actor_key, observation)
    critic_params = critic.init(critic_key, observation, action)
    zero, one = {"log": jnp.float32(0.0)}, {"log": jnp.float32(1.0)}
    policy_adam, adam = optax.adam(config.policy_learning_rate), optax.adam(config.learning_rate)
    return Agent(
        actor=TrainState.create(apply_fn=actor.apply, params=actor_params, tx=policy_adam),
        critic=TrainState.create(apply_fn=critic.apply, params=critic_params, tx=adam),
        temperature=TrainState.create(apply_fn=from_log, params=zero, tx=policy_adam),
        multiplier=TrainState.create(apply_fn=from_log, params=one, tx=adam),
        target_critic_params=jax.tree.map(jnp.copy, critic_params),
        key=key,
    )


# ------------------------------------------------------------------------------ Losses and update
# A loss takes first the parameters it differentiates, and returns (loss, metrics).
def actor_loss(params, agent, batch, key, config):
    """The policy ascends min Q and its entropy, through one reparameterised action."""
    policy = agent.actor.apply_fn(params, batch.observations)
    actions, log_prob = policy.sample_and_log_prob(seed=key)  # (B, A), (B,)
    q = agent.critic.apply_fn(agent.critic.params, batch.observations, actions)  # (N, B)
    temperature = agent.temperature.apply_fn(agent.temperature.params)  # ()
    loss = (temperature * log_prob - q.min(axis=0)).mean()
    return loss, {"actor_loss": loss, "entropy": -log_prob.mean()}


def temperature_loss(params, agent, entropy, action_dim, config):
    """The temperature rises while the entropy is below its target, and falls above it."""
    temperature = agent.temperature.apply_fn(params)  # ()
    loss = temperature * (entropy - config.entropy_per_action * action_dim)
    return loss, {"temperature_loss": loss, "temperature": temperature}


def policy_actions(agent, observations, key, num_actions):
    """Actions (M, B, A) of the policy in observations (B, O), and their log-densities (M, B)."""
    policy = agent.actor.apply_fn(agent.actor.params, observations)
    return policy.sample_and_log_prob(seed=key, sample_shape=(num_actions,))


def q_values(agent, params, observations, actions):
    """Q (N, M, B) of M actions (M, B, A) per observation (B, O)."""
    observations = jnp.broadcast_to(observations, (len(actions), *observations.shape))  # (M, B, O)
    rows = (x.reshape(-1, x.shape[-1]) for x in (observations, actions))  # (M * B, ...), faster
    return agent.critic.apply_fn(params, *rows).reshape(-1, *actions.shape[:2])


def conservative_difference(params, agent, batch, data_q, key, config):
    """The difference D (N,), CQL(H)'s: a soft maximum of Q over actions, minus Q of the data.
    All actions are judged in the same state, those of the policy in the next one, too."""
    uniform_key, next_key, policy_key = jax.random.split(key, 3)
    shape = config.num_actions, *batch.actions.shape
    draw = jax.random.uniform(uniform_key, shape, minval=-1.0, maxval=1.0)  # (M, B, A)
    uniform = draw, jnp.full(shape[:2], -jnp.log(2.0) * shape[2])  # (M, B, A), (M, B)
    following = policy_actions(agent, batch.next_observations, next_key, config.num_actions)
    own = policy_actions(agent, batch.observations, policy_key, config.num_actions)
    actions, log_prob = map(jnp.concatenate, zip(uniform, following, own, strict=True))
    q = q_values(agent, params, batch.observations, actions)  # (N, 3 M, B)
    below = q[:, config.num_actions :] < batch.mc_returns  # (N, 2 M, B)
    if config.importance_sampling:
        q = q - log_prob  # (N, 3 M, B)
    else:
        q = jnp.concatenate([q, data_q[:, None]], axis=1)  # (N, 3 M + 1, B)
    difference = jax.nn.logsumexp(q, axis=1) - data_q  # (N, B)
    return jnp.clip(difference, *config.difference_range).mean(axis=1), below.mean()


def critic_loss(params, agent, batch, key, config):
    """Q regresses on the best of several next actions; the weighted difference is added."""
    target_key, difference_key = jax.random.split(key)
    action_key, subset_key = jax.random.split(target_key)
    following = batch.next_observations
    next_actions, _ = policy_actions(agent, following, action_key, config.backup_actions)
    next_q = q_values(agent, agent.target_critic_params, following, next_actions)  # (N, M, B)
    members = jax.random.choice(subset_key, len(next_q), (config.target_critics,), replace=False)
    next_v = next_q[members].min(axis=0).max(axis=0)  # (B,)
    target_q = batch.rewards + config.discount * batch.masks * next_v  # (B,)
    q = agent.critic.apply_fn(params, batch.observations, batch.actions)  # (N, B)
    loss = ((q - target_q[None]) ** 2).mean(axis=1).sum()
    info = {"critic_loss": loss, "q": q.mean()}  # of the Bellman error alone
    difference, below = conservative_difference(params, agent, batch, q, difference_key, config)
    multiplier = agent.multiplier.apply_fn(agent.multiplier.params) if config.lagrange else 1.0
    loss += multiplier * config.cql_alpha * (difference - config.lagrange * config.target_gap).sum()
    info |= {"difference": difference.mean(), "below_return": below, "multiplier": multiplier}
    return loss, info


def multiplier_loss(params, agent, difference, config):
    """The multiplier rises while the difference is above its target gap, and falls below it."""
    multiplier = agent.multiplier.apply_fn(params)  # ()
    return -multiplier * config.cql_alpha * (difference - config.target_gap), {}


def gradient_step(train_state, loss_fn, *args):
    """One optimiser step on `loss_fn(params, *args) -> (loss, metrics)`."""
    grads, info = jax.grad(loss_fn, has_aux=True)(train_state.params, *args)
    return train_state.apply_gradients(grads=grads), info


def update(agent, batch, config):
    """One update, all gradients at the old parameters. The critic's is the mean over micro-batches,
    one after the other: a whole batch with its sampled actions does not fit a CPU's cache."""
    key, critic_key, actor_key = jax.random.split(agent.key, 3)
    count = int(np.gcd(config.micro_batches, config.batch_size))
    parts = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)  # (P, B / P, ...)
    inputs = parts, jax.random.split(critic_key, count)
    gradient = jax.grad(critic_loss, has_aux=True)
    found = jax.lax.map(lambda part: gradient(agent.critic.params, agent, *part, config), inputs)
    grads, critic_info = jax.tree.map(lambda x: x.mean(axis=0), found)
    critic = agent.critic.apply_gradients(grads=grads)
    actor, actor_info = gradient_step(agent.actor, actor_loss, agent, batch, actor_key, config)
    inputs = agent, actor_info["entropy"], batch.actions.shape[-1], config
    temperature, temperature_info = gradient_step(agent.temperature, temperature_loss, *inputs)
    if config.lagrange:
        inputs = agent, critic_info["difference"], config
        multiplier, _ = gradient_step(agent.multiplier, multiplier_loss, *inputs)
        agent = agent.replace(multiplier=multiplier)
    target = optax.incremental_update(critic.params, agent.target_critic_params, config.tau)
    agent = agent.replace(actor=actor, critic=critic, temperature=temperature, key=key)
    return agent.replace(target_critic_params=target), critic_info | actor_info | temperature_info


def explore(agent, observation, key, config):
    """The training policy's action (A,) in one observation (O,)."""
    return policy_actions(agent, observation[None], key, 1)[0][0, 0]


def act(agent, observations, config):
    """The deterministic policy's actions (B, A) in observations (B, O), for evaluation."""
    policy = agent.actor.apply_fn(agent.actor.params, observations)
    return jnp.tanh(policy.distribution.mean())  # a squashed Gaussian has no `mode` in distrax


# ------------------------------------------------------------------------------- Offline to online
def phases(config):
    """The run, phase by phase: name, number of steps, and what one round of them does."""
    yield "offline", config.offline_steps, partial(offline_round, update=update)
    yield "online", config.online_steps, partial(round_with_returns, update=update)


def online_batch(dataset, buffer, size, key, config):
    """An online update's batch: `offline_ratio` dataset rows, the rest of the `size` newest."""
    offline = jnp.arange(config.batch_size) < config.batch_size * config.offline_ratio  # (B,)
    rows = jax.random.randint(key, offline.shape, 0, jnp.where(offline, len(dataset.rewards), size))
    old = jax.tree.map(lambda x: x[rows], dataset)
    new = jax.tree.map(lambda x: x[rows], buffer)
    return jax.tree.map(partial(jax.vmap(jnp.where), offline), old, new)


@partial(jax.jit, donate_argnames="buffers")
def insert(buffers, rows, position):
    """Rows (S, ...) into the buffers (S, C, ...), in place: hence a program of its own."""
    return jax.tree.map(lambda buffer, row: buffer.at[:, position].set(row), buffers, rows)


@partial(jax.jit, static_argnames=("config", "update", "learn"), donate_argnames="agents")
def online_step(agents, buffers, size, observations, dataset, config, update, learn):
    """With `learn` update all agents, then choose actions (S, A). `agents` is donated."""
    keys, info = jax.vmap(partial(jax.random.split, num=3))(agents.key), {}  # (S, 3, 2)
    agents = agents.replace(key=keys[:, 0])
    if learn:
        draw = partial(online_batch, config=config)
        draw_all = jax.vmap(draw, in_axes=(None, 0, None, 0))
        batches = draw_all(dataset, buffers, size, keys[:, 1])  # (S, B, ...)
        agents, info = for_each_seed(partial(update, config=config), agents, batches)
    actions = jax.vmap(partial(explore, config=config))(agents, observations, keys[:, 2])
    return agents, actions, info


def online_round(agents, buffers, run, first, last, update, warmup=0, every=1, store=insert):
    """Environment steps `first` to `last`, an update after every `every`th but the `warmup` first.
    Episodes are seeded by (seed, first) and truncated at `last`: no simulator is checkpointed."""
    config, dataset, envs, bar = run
    infos, capacity = [], buffers.rewards.shape[1]
    seeds = [10**9 * (config.seed + i + 1) + first for i in range(config.num_seeds)]
    observations, _ = envs.reset(seed=seeds)  # (S, O)
    step_all = partial(online_step, dataset=dataset, config=config, update=update)
    agents, actions, _ = step_all(agents, buffers, 0, observations, learn=False)
    for step in range(first, last):
        after, rewards, terminated, truncated, info = envs.step(np.asarray(actions))  # (S, ...)
        following, ends = after.copy(), terminated | truncated | (step + 1 == last)
        for i in np.flatnonzero(terminated | truncated):  # reset already
            following[i] = info["final_obs"][i]
        rows = Batch(observations, actions, rewards, following, 1.0 - terminated, 1.0 * ends)
        buffers, observations = store(buffers, rows, step % capacity), after
        size, due = min(step + 1, capacity), step >= warmup and (step + 1) % every == 0
        agents, actions, info = step_all(agents, buffers, size, observations, learn=due)
        infos += [jax.device_get(info)] * due
        bar.update()
    means = {name: np.mean([x[name] for x in infos], axis=0) for name in (infos or [{}])[0]}
    return agents, buffers, means | {"updates": len(infos)}


def monte_carlo_returns(rewards, masks, ends, config):
    """Discounted returns (N,) of rows (N,). An episode's last reward is repeated for ever, unless
    it terminated, by the rule "infinite", by "sparse" where all rewards are `failure_reward`."""
    last = np.flatnonzero(ends)  # (E,), rows
    first = np.append(0, last[:-1] + 1)  # (E,)
    failed = np.logical_and.reduceat(rewards == config.failure_reward, first)  # (E,)
    repeats = {"finite": 0.0, "sparse": failed, "infinite": 1.0}[config.return_rule] * masks[last]
    returns = np.array(rewards, np.float64)  # (N,)
    returns[last] /= np.where(repeats > 0, 1 - config.discount, 1.0)
    for i in reversed(range(len(returns) - 1)):
        returns[i] += config.discount * returns[i + 1] * (1 - ends[i])
    return returns.astype(np.float32)


def round_with_returns(agents, buffers, run, first, last, update):
    """online_round; a row's return is written when its episode ends. Till then it bounds no Q."""
    config, known = run[0], np.array(buffers.mc_returns)  # (S, C), the returns on the host
    episodes = [[] for _ in known]  # in play: reward, mask and end of every step

    def store(buffers, rows, position):
        known[:, position] = -1e9  # unknown: below every Q
        buffers = insert(buffers, rows.replace(mc_returns=np.full(len(known), -1e9)), position)
        for i, episode in enumerate(episodes):
            episode.append((rows.rewards[i], rows.masks[i], rows.ends[i]))
            if rows.ends[i]:
                places = (position - np.arange(min(len(episode), known.shape[1]))) % known.shape[1]
                returns = monte_carlo_returns(*np.array(episode).T, config)[::-1]  # newest first
                known[i, places] = returns[: len(places)]
                places = np.pad(places, (0, -len(places) % 1024), "edge")  # few shapes
                returns = insert(buffers.mc_returns, known[:, places], places)
                buffers = buffers.replace(mc_returns=returns)
                episode.clear()
        return buffers

    return online_round(agents, buffers, run, first, last, update, config.warmup_steps, store=store)


# ==== The same bytes in every script from here ==================================================


@flax.struct.dataclass
class Batch:
    """Transitions in the agent's units."""

    observations: jax.Array  # (B, O)
    actions: jax.Array  # (B, A), inside [-1, 1]
    rewards: jax.Array  # (B,)
    next_observations: jax.Array  # (B, O)
    masks: jax.Array  # (B,), 0 only on a true termination, where no future reward exists
    ends: jax.Array  # (B,), 1 on the last row of an episode, for whatever reason
    mc_returns: Any = ()  # (B,), discounted returns from here on, where a script needs them
    next_actions: Any = ()  # (B, A), what was done in next_observations, where it needs these


def rescale(x, multiplier, offset):
    """The environment's units -> the agent's, for data and steps alike."""
    return (np.asarray(x) * multiplier + offset).astype(np.float32, copy=False)


def make_env(source):
    """The environment of a source (load_dataset's), in all but statistics in the agent's units."""
    units, wrap = {name: np.array(x) for name, x in source["units"].items()}, gym.wrappers
    spec = gym.envs.registration.EnvSpec.from_json(source["environment"])
    env = gym.make(spec, disable_env_checker=True)
    env = wrap.FlattenObservation(wrap.RecordEpisodeStatistics(env))
    box = gym.spaces.Box(-1.0, 1.0, env.action_space.shape)
    env = wrap.TransformAction(env, lambda x: np.clip(x, -1, 1) * units["actions"], box)
    env = wrap.TransformReward(env, lambda x: rescale(x, *units["rewards"]))
    return wrap.TransformObservation(env, lambda x: rescale(x, *units["observations"]), None)


def load_dataset(config, data, env):
    """The dataset, a Batch of N rows (without --dataset of one row of zeros), and its source, for
    config.json: environment, units, reference returns, hash. collect.py checks more."""
    high, metadata, digest, parts, returns = env.action_space.high, {}, "", [], np.zeros(1)
    zeros = np.zeros((1, gym.spaces.flatdim(env.observation_space)))  # (1, O)
    rows = Batch(zeros, high[None] * 0, np.zeros(1), zeros, np.ones(1), np.ones(1))
    for episode in data.iterate_episodes() if data else ():
        leaves = jax.tree.leaves(episode.observations)  # Dicts by sorted key, as gymnasium's spaces
        observations = np.concatenate([x.reshape(len(x), -1) for x in leaves], axis=1)  # (T + 1, O)
        ends = np.append(episode.terminations[:-1], True)  # (T,), a termination inside is one, too
        step = observations[:-1], episode.actions, episode.rewards, observations[1:]
        parts.append(Batch(*step, 1.0 - episode.terminations, 1.0 * ends))
    if data:
        rows, parts = jax.tree.map(lambda *xs: np.concatenate(xs, dtype=np.float32), *parts), []
        file = data.storage.data_path / "main_data.hdf5"
        metadata, digest = data.storage.metadata, hashlib.sha256(file.read_bytes()).hexdigest()
        if np.abs(rows.actions).max() <= 1 + 1e-3 and (high >= 1).all():
            high = np.ones_like(high)  # the data use this part of the box
        returns = np.add.reduceat(rows.rewards, np.flatnonzero(np.append(1, rows.ends[:-1])))
        print(f"{config.dataset}: {len(rows.ends):,} steps, mean return {returns.mean():.1f}")
    scale = config.reward_scale * (1000 / np.ptp(returns) if config.normalize_returns else 1)
    units = {"observations": (1.0, 0.0), "rewards": (scale, config.reward_shift), "actions": high}
    if data and config.normalize_observations:
        std = rows.observations.std(axis=0, dtype=np.float64) + 1e-3
        units["observations"] = 1 / std, -rows.observations.mean(axis=0, dtype=np.float64) / std
    whole = all(np.isfinite(x).all() and len(x) == len(rows.ends) for x in jax.tree.leaves(rows))
    sizes = rows.observations.shape[1:] + rows.actions.shape[1:]
    if not whole or sizes != zeros.shape[1:] + high.shape or not np.isfinite(scale):
        raise SystemExit(f"{config.dataset}: bad rows, baselines/collect.py check says which")
    rows = rows.replace(
        observations=rescale(rows.observations, *units["observations"]),
        actions=np.clip(rows.actions / high, -1 + 1e-5, 1 - 1e-5).astype(np.float32),
        rewards=rescale(rows.rewards, *units["rewards"]),
        next_observations=rescale(rows.next_observations, *units["observations"]),
    )
    return rows, {
        "environment": env.spec.to_json(),
        "units": jax.tree.map(lambda x: np.asarray(x).tolist(), units),
        "reference": [metadata.get("ref_min_score"), metadata.get("ref_max_score")],
        "dataset_sha256": digest,
    }


def for_each_seed(function, *arguments):
    """`function` over the seeds, the leading axis; on a CPU in turn, which is twice as fast."""
    if jax.default_backend() == "cpu":
        return jax.lax.map(lambda xs: function(*xs), arguments)
    return jax.vmap(function)(*arguments)


@partial(jax.jit, static_argnames=("config", "update", "num_steps"), donate_argnames="agents")
def update_steps(agents, dataset, config, update, num_steps):
    """`num_steps` updates of every agent, as one scan. Metrics are sums. `agents` is donated."""

    def body(agent, _):
        key, sample_key = jax.random.split(agent.key)
        rows = jax.random.randint(sample_key, (config.batch_size,), 0, len(dataset.rewards))  # (B,)
        return update(agent.replace(key=key), jax.tree.map(lambda x: x[rows], dataset), config)

    agents, info = for_each_seed(partial(jax.lax.scan, body, length=num_steps), agents)
    return agents, jax.tree.map(partial(jnp.sum, axis=1), info)


def offline_round(agents, buffers, run, first, last, update):
    """Updates `first` to `last` on the dataset, in slices, so that the bar moves."""
    (config, dataset, _, bar), totals = run, []
    for begin in range(first, last, 200):
        size = min(200, last - begin)
        agents, info = update_steps(agents, dataset, config, update, size)
        totals.append(jax.device_get(info))
        bar.update(size)
    means = {x: sum(t[x] for t in totals) / (last - first) for x in (totals or [()])[0]}
    return agents, buffers, means | {"updates": last - first}


act_all = jax.jit(jax.vmap(act, in_axes=(0, 0, None)), static_argnums=2)  # (S, E, O) -> (S, E, A)


def evaluate(agents, envs, source, config, first):
    """Mean return and score (S,) of the `first` and the next episodes, always the same."""
    shape = config.num_seeds, envs.num_envs // config.num_seeds
    seeds = [10_000 * (config.seed + i) + first + episode for i, episode in np.ndindex(*shape)]
    np.random.seed([x % 2**32 for x in seeds])  # OGBench's mazes draw their starts from it
    (observations, _), (returns, reached) = envs.reset(seed=seeds), np.full((2, len(seeds)), np.inf)
    while np.isinf(returns).any():
        actions = np.asarray(act_all(agents, observations.reshape(*shape, -1), config))
        observations, _, terminated, truncated, info = envs.step(actions.reshape(len(seeds), -1))
        for i in np.flatnonzero((terminated | truncated) & np.isinf(returns)):
            returns[i] = info["final_info"]["episode"]["r"][i]
            reached[i] = terminated[i] or returns[i] > 0
    low, high = (np.nan if x is None else x for x in source["reference"])
    measure = reached if (low, high) == (0, 1) else returns  # then it is the share of successes
    values = {"return": returns, "score": 100 * (measure - low) / (high - low)}
    return {name: x.reshape(shape).mean(axis=1) for name, x in values.items()}


def named_arrays(**trees):
    """{path/of/leaf: NumPy array}."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(trees))
    return {jax.tree_util.keystr(at, simple=True, separator="/"): np.asarray(x) for at, x in leaves}


def save(folder, arrays, meta):
    """metrics.csv, then checkpoint.npz: a kill leaves the old checkpoint or the new one, whole."""
    temporary = folder / f"checkpoint.{os.urandom(4).hex()}.tmp"
    names = ("phase", "step", "seed", *METRICS, "return", "score", "updates_per_second", "seconds")
    try:
        with open(folder / "metrics.csv", "w") as file:
            table = [names, *([row.get(name, "") for name in names] for row in meta["rows"])]
            csv.writer(file, lineterminator="\n").writerows(table)
        with open(temporary, "wb") as file:
            np.savez(file, meta=np.frombuffer(json.dumps(meta).encode(), np.uint8), **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / "checkpoint.npz")
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise SystemExit(f"{folder}: {error.strerror}; the checkpoint before is whole") from None


def load(folder):
    """The arrays and the meta of a run's checkpoint; the zip's checksums are checked."""
    try:
        arrays = dict(np.load(Path(folder, "checkpoint.npz")))
        return arrays, json.loads(arrays.pop("meta").tobytes())
    except Exception as error:  # missing, or damaged in one of many ways
        raise SystemExit(f"{folder}/checkpoint.npz: unreadable ({error})") from None


def restore(template, arrays, folder):
    """A tree like `template` from a checkpoint's arrays. Fields it has not stay as they are."""
    own, fields = named_arrays(**template), {name.split("/")[1] for name in arrays}
    arrays = {name: x for name, x in arrays.items() if name.split("/")[0] in template}
    arrays |= {name: x for name, x in own.items() if name.split("/")[1] not in fields}
    if {name: x.shape for name, x in arrays.items()} != {name: x.shape for name, x in own.items()}:
        raise SystemExit(f"{folder}: an agent with other networks, or of other sizes")
    return jax.device_put(jax.tree.structure(template).unflatten([arrays[name] for name in own]))


def parse_config(arguments):
    """Command line -> Config (flags before preset before defaults), Minari dataset, environment."""
    parse = partial(tyro.cli, Config, args=arguments, description=__doc__)
    config, data = parse(), None
    at = Path(__file__).resolve().parents[1] / "baselines/datasets" / config.dataset / "data"
    try:
        if config.dataset:
            data = minari.MinariDataset(at) if at.exists() else minari.load_dataset(config.dataset)
        env = gym.make(config.env_id) if config.env_id else data.recover_environment(eval_env=True)
        if not (np.isfinite((box := env.action_space).high) & (box.low == -box.high)).all():
            raise ValueError("the box of its actions is not symmetric and finite")
    except Exception as error:  # not here, not installed, damaged
        words = f"--dataset {config.dataset} --env-id {config.env_id}: {error}"
        raise SystemExit(f"{words} (`minari download ID`, or baselines/collect.py)") from None
    auto = [name for name in PRESETS if name in f"{config.dataset} {env.spec.id}".lower()]
    preset = [*auto, "mujoco"][0] if config.preset == "auto" else config.preset
    if preset not in PRESETS:
        raise SystemExit(f"--preset {preset}: must be auto or one of {', '.join(PRESETS)}")
    config = parse(default=dataclasses.replace(Config(), **PRESETS[preset]))
    return dataclasses.replace(config, preset=preset), data, env


def main(arguments=None):
    gym.logger.min_level = gym.logger.ERROR  # no advice that a -v4 environment is not the newest
    config, data, env = parse_config(arguments)
    dataset, source = load_dataset(config, data, env)
    failure = rescale(config.failure_reward, *source["units"]["rewards"])
    config = dataclasses.replace(config, failure_reward=float(failure))  # in the agent's units
    returns = monte_carlo_returns(dataset.rewards, dataset.masks, dataset.ends, config)
    dataset = dataset.replace(mc_returns=returns)
    script, seeds = Path(__file__).stem, range(config.seed, config.seed + config.num_seeds)
    default = f"runs/{script}/{config.dataset or config.env_id}/seed{config.seed}"
    folder = Path(config.run_dir or default)
    said = {"script": script, **dataclasses.asdict(config), **source, "run_dir": "", "wandb": False}
    said = json.loads(json.dumps(said))
    inputs = {"observation": dataset.observations[:1], "action": dataset.actions[:1]}
    create = partial(for_each_seed, partial(create_agent, config=config, **inputs))
    agents = jax.jit(create)(jnp.stack([jax.random.PRNGKey(seed) for seed in seeds]))
    shape = config.num_seeds, max(1, min(config.buffer_size, config.online_steps))
    buffers = jax.tree.map(lambda x: jnp.zeros((*shape, *x.shape[1:]), np.float32), dataset)
    state, done, rows = {"agents": agents, "buffers": buffers}, 0, []  # rounds, rows of metrics.csv
    if (folder / "checkpoint.npz").exists():
        arrays, meta = load(folder)
        its, done, rows = meta["config"], meta["done"], meta["rows"]
        if other := [name for name in said | its if said.get(name) != its.get(name)]:
            raise SystemExit(f"{folder}: a run with another {', '.join(other)}; choose a --run-dir")
        state = restore(state, arrays, folder)
    elif config.init_from:
        arrays, meta = load(config.init_from)
        if meta["config"]["script"] not in INIT_FROM or meta["config"]["units"] != said["units"]:
            raise SystemExit(f"--init-from {config.init_from}: of another script, or other units")
        arrays["agents/key"] = np.asarray(agents.key)
        state |= restore({"agents": agents}, arrays, config.init_from)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(said, indent=1))
    if config.wandb:
        import wandb

        name = "-".join(folder.resolve().parts[1:])[-100:].replace(":", "-")
        wandb.init(project="offline-to-online", id=name, resume="allow", config=said)
    skip = -1 if config.init_from else 0  # then the first round has no steps: the score before
    rounds = [
        (phase, train, max(first, 0), min(first + config.interval, steps))
        for phase, steps, train in [*phases(config)][skip:]
        for first in range(skip * config.interval, steps, config.interval)
    ]
    sizes = [last - first for *_, first, last in rounds]
    bar = tqdm(total=sum(sizes), initial=sum(sizes[:done]), smoothing=0.05, disable=None)
    make = partial(gym.vector.SyncVectorEnv, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    eval_envs = make([partial(make_env, source)] * config.num_seeds * min(10, config.eval_episodes))
    run = config, jax.device_put(dataset), make([partial(make_env, source)] * config.num_seeds), bar
    for number, (phase, train, first, last) in enumerate(rounds[done:], done + 1):
        np.random.seed([config.seed, number])  # as in evaluate
        begin = time.time()
        state["agents"], state["buffers"], info = train(*state.values(), run, first, last)
        seconds, arrays = time.time() - begin, named_arrays(**state)
        speed = info.pop("updates") * config.num_seeds / seconds
        if bad := [name for name, x in (info | arrays).items() if not np.isfinite(x).all()]:
            raise SystemExit(f"{phase} step {last}: {', '.join(bad[:3])} not finite; not saved")
        ask = partial(evaluate, state["agents"], eval_envs, source, config)
        scores = [ask(first) for first in range(0, config.eval_episodes, 10)]
        info |= jax.tree.map(lambda *xs: np.mean(xs, axis=0), *scores)
        for i, seed in enumerate(seeds):
            values = {name: f"{x[i]:.6g}" for name, x in info.items() if np.isfinite(x[i])}
            row = {"phase": phase, "step": last, "seed": seed, "seconds": f"{seconds:.3f}"}
            rows.append(row | {"updates_per_second": f"{speed:.1f}"} | values)
        save(folder, arrays, {"config": said, "done": number, "rows": rows})
        means = {name: float(np.mean(x)) for name, x in info.items() if np.isfinite(x).all()}
        shown = "  ".join(f"{x} {means[x]:.1f}" for x in ("return", "score") if x in means)
        tqdm.write(f"{phase:8} {last:>9,}  {shown}")
        if config.wandb:
            wandb.log({f"{phase}/{name}": x for name, x in means.items()} | {"step": last})


if __name__ == "__main__":
    main()
