"""TD3+BC: TD3 that also imitates the data; online it goes on so, or as plain TD3.

The smallest change that makes TD3 work on fixed data: the policy ascends Q, divided by its mean
magnitude, and imitates the action in the batch. Online, --online-loss bc goes on so; td3 does not
imitate: the policy may leave where the critic is right, which only distance_to_offline shows.

    Fujimoto, Gu: A Minimalist Approach to Offline RL, arXiv 2106.06860; TD3: arXiv 1802.09477

    critic  L_Q  = sum_i E[ (r + discount * min_j Qtarget_j(s', a') - Q_i(s, a))^2 ]
            a'   = clip(pi_target(s') + clip(noise, -noise_clip, noise_clip), -1, 1)
    bc      L_pi = -q_weight / mean|Q_1(s, pi(s))| * E[ Q_1(s, pi(s)) ] + E[ (pi(s) - a)^2 ]
    td3     L_pi = -1 / mean|Q_1(s, pi(s))| * E[ Q_1(s, pi(s)) ]

    python baselines/td3_bc.py --online-loss td3  # or --init-from RUN, offline, --run-dir NEW

Deviations from the authors' code (github.com/sfujim/TD3_BC):
 1. Ours: mazes, OGBench, the short run, the online phase: 1,000 steps of the noisy offline policy,
    then its copy is the target policy, Adam anew; TD3, too, divides Q by mean|Q|, at least 1e-6.
 2. Orthogonal layers; actions within 1 - 1e-5; cut episodes' last rows; rounds begin new episodes.
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
    online_steps: int = 100_000  # environment steps after that, per seed
    interval: int = 10_000  # updates or environment steps per round: train, evaluate, save
    eval_episodes: int = 10  # per evaluation and seed; more than 10 in tens
    run_dir: str = ""  # folder of this run; default: runs/<script>/<dataset>/seed<seed>
    init_from: str = ""  # folder of a finished run: skip all but the last phase, use its agents
    wandb: bool = False  # also log to Weights & Biases
    # Data and optimisation
    normalize_observations: bool = True  # by the dataset's mean and standard deviation
    normalize_returns: bool = False  # rewards times 1000 / (max - min return in the dataset)
    reward_scale: float = 1.0  # r <- reward_scale * r + reward_shift, after the above
    reward_shift: float = 0.0  # see reward_scale
    batch_size: int = 256  # transitions per update
    discount: float = 0.99  # per step
    tau: float = 0.005  # both targets: fraction of the new network per update of the policy
    buffer_size: int = 1_000_000  # online transitions kept, per seed; the oldest go first
    hidden_dims: tuple[int, ...] = (256, 256)  # widths of every network
    learning_rate: float = 3e-4  # Adam, critics
    policy_learning_rate: float = 3e-4  # Adam, policy
    # TD3+BC
    q_weight: float = 2.5  # the paper's alpha: of Q beside the imitation, whose weight is 1
    policy_delay: int = 2  # updates of the critic per update of the policy and of both targets
    target_noise: float = 0.2  # standard deviation, on the target policy's actions
    noise_clip: float = 0.5  # of that noise
    exploration_noise: float = 0.1  # standard deviation, on the actions executed in training
    online_loss: Literal["bc", "td3"] = "bc"  # of the policy, see above
    offline_ratio: float = 0.5  # of every online batch, from the dataset
    warmup_steps: int = 1_000  # environment steps before the first online update


PRESETS = {  # auto: the first whose name is in the dataset's or the environment's, else mujoco
    "sac-medium-replay": dict(offline_steps=50_000, online_steps=20_000, interval=5_000),
    "ogbench": dict(hidden_dims=(512,) * 4, eval_episodes=50, interval=50_000),
    "maze": dict(reward_shift=-1.0, online_steps=300_000, eval_episodes=100, interval=50_000),
    "mujoco": dict(),
}
INIT_FROM = ("td3_bc",)  # scripts whose agents --init-from takes
METRICS = {  # the algorithm's own columns of metrics.csv, with their healthy range
    "critic_loss": "squared TD error, summed over critics; bounded, may grow with q",
    "q": "mean Q of the batch; near or above the dataset's discounted return, never far above",
    "actor_loss": "near -q_weight, with td3 near -1; near q_weight or 1 where Q is negative",
    "imitation": "mean squared distance of the policy's actions from the batch's; falls, then flat",
    "distance_to_offline": "root mean square of pi - offline pi, last states; a jump is a warning",
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


@flax.struct.dataclass
class Agent:
    """All that training changes. Outside the losses with a leading axis of seeds, (S, ...)."""

    actor: TrainState
    critic: TrainState
    target_actor_params: Any
    target_critic_params: Any
    offline_actor_params: Any  # of the policy at the switch
    key: jax.Array


def create_agent(key, observation, action, config):
    """A fresh agent from its random key (2,), an observation (1, O) and an action (1, A)."""
    key, actor_key, critic_key = jax.random.split(key, 3)
    last_layer = nn.Dense(action.shape[1], kernel_init=orthogonal)
    actor = nn.Sequential([MLP(config.hidden_dims), last_layer, nn.tanh])  # (B, O) -> (B, A)
    critic = ensemble(Value, 2)(config.hidden_dims)  # the first one leads the policy
    actor_params = actor.init(actor_key, observation)
    critic_params = critic.init(critic_key, observation, action)
    adam, policy_adam = optax.adam(config.learning_rate), optax.adam(config.policy_learning_rate)
    return Agent(
        actor=TrainState.create(apply_fn=actor.apply, params=actor_params, tx=policy_adam),
        critic=TrainState.create(apply_fn=critic.apply, params=critic_params, tx=adam),
        target_actor_params=jax.tree.map(jnp.copy, actor_params),
        target_critic_params=jax.tree.map(jnp.copy, critic_params),
        offline_actor_params=jax.tree.map(jnp.copy, actor_params),
        key=key,
    )


# ------------------------------------------------------------------------------ Losses and update
# A loss takes first the parameters it differentiates, and returns (loss, metrics).
def critic_loss(params, agent, batch, key, config):
    """Q regresses on r + discount * min Q of the target policy's noisy action; summed over i."""
    noise = config.target_noise * jax.random.normal(key, batch.actions.shape)  # (B, A)
    noise = jnp.clip(noise, -config.noise_clip, config.noise_clip)  # (B, A)
    next_actions = agent.actor.apply_fn(agent.target_actor_params, batch.next_observations)
    inputs = batch.next_observations, jnp.clip(next_actions + noise, -1.0, 1.0)  # (B, O), (B, A)
    next_q = agent.critic.apply_fn(agent.target_critic_params, *inputs)  # (N, B)
    target_q = batch.rewards + config.discount * batch.masks * next_q.min(axis=0)  # (B,)
    q = agent.critic.apply_fn(params, batch.observations, batch.actions)  # (N, B)
    loss = ((q - target_q[None]) ** 2).mean(axis=1).sum()
    return loss, {"critic_loss": loss, "q": q.mean()}


def actor_loss(params, agent, batch, key, config, imitate=True):
    """TD3+BC: the policy ascends Q_1 and imitates the batch's actions. TD3: it ascends Q_1 only."""
    actions = agent.actor.apply_fn(params, batch.observations)  # (B, A)
    q = agent.critic.apply_fn(agent.critic.params, batch.observations, actions)[0]  # (B,)
    magnitude = jnp.maximum(jax.lax.stop_gradient(jnp.abs(q).mean()), 1e-6)  # ()
    imitation = ((actions - batch.actions) ** 2).mean()  # over rows and action dimensions
    loss = imitate * imitation - (config.q_weight if imitate else 1.0) / magnitude * q.mean()
    return loss, {"actor_loss": loss, "imitation": imitation}


def gradient_step(train_state, loss_fn, *args):
    """One optimiser step on `loss_fn(params, *args) -> (loss, metrics)`."""
    grads, info = jax.grad(loss_fn, has_aux=True)(train_state.params, *args)
    return train_state.apply_gradients(grads=grads), info


def update(agent, batch, config, policy_loss=actor_loss):
    """One update in the order of the authors' code: Q; in every policy_delay-th one pi, against
    the new Q, and both targets."""
    key, critic_key = jax.random.split(agent.key)
    critic, critic_info = gradient_step(agent.critic, critic_loss, agent, batch, critic_key, config)
    agent = agent.replace(critic=critic, key=key)

    def delayed(agent):
        actor, info = gradient_step(agent.actor, policy_loss, agent, batch, None, config)
        targets = agent.target_actor_params, agent.target_critic_params
        targets = optax.incremental_update((actor.params, critic.params), targets, config.tau)
        agent = agent.replace(target_actor_params=targets[0], target_critic_params=targets[1])
        # each stands for policy_delay updates, so that the mean over a round's updates is right
        return agent.replace(actor=actor), jax.tree.map(lambda x: config.policy_delay * x, info)

    due = critic.step % config.policy_delay == 0
    nothing = jax.tree.map(jnp.zeros_like, jax.eval_shape(delayed, agent)[1])
    agent, actor_info = jax.lax.cond(due, delayed, lambda agent: (agent, nothing), agent)
    return agent, critic_info | actor_info


def online_update(agent, batch, config):
    """The same, the policy by the loss that is chosen for the online phase."""
    return update(agent, batch, config, partial(actor_loss, imitate=config.online_loss == "bc"))


def explore(agent, observation, key, config):
    """The training policy's action (A,) in one observation (O,): the policy's, with noise."""
    action = agent.actor.apply_fn(agent.actor.params, observation[None])[0]  # (A,)
    noise = jax.random.normal(key, action.shape)  # (A,)
    return jnp.clip(action + config.exploration_noise * noise, -1.0, 1.0)


def act(agent, observations, config):
    """The deterministic policy's actions (B, A) in observations (B, O), for evaluation."""
    return agent.actor.apply_fn(agent.actor.params, observations)


# ------------------------------------------------------------------------------- Offline to online
def phases(config):
    """The run, phase by phase: name, number of steps, and what one round of them does."""
    yield "offline", config.offline_steps, partial(offline_round, update=update)
    yield "online", config.online_steps, td3_round


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


def td3_round(agents, buffers, run, first, last):
    """An online round. Before the first one, at the switch, the target policy becomes the policy,
    the offline one is kept, and both optimisers begin anew: Adam with zeros."""
    if first == 0:
        target, offline = jax.tree.map(jnp.copy, (agents.actor.params, agents.actor.params))
        agents = agents.replace(target_actor_params=target, offline_actor_params=offline)
        for name, network in (("actor", agents.actor), ("critic", agents.critic)):
            zeros = jax.tree.map(jnp.zeros_like, network.opt_state)
            agents = agents.replace(**{name: network.replace(opt_state=zeros)})
    train = partial(online_round, update=online_update, warmup=run[0].warmup_steps)
    agents, buffers, info = train(agents, buffers, run, first, last)
    moved = distance(agents, agents.offline_actor_params, buffers, last, run[0])
    return agents, buffers, info | {"distance_to_offline": moved}


def distance(agents, others, buffers, last, config):
    """Root mean square (S,) of the policies' actions minus other policies', in the last states."""
    rows = np.arange(max(0, last - 1000), max(1, last)) % buffers.rewards.shape[1]
    states, there = buffers.observations[:, rows], agents.actor.replace(params=others)  # (S, R, O)
    actions = [act_all(x, states, config) for x in (agents, agents.replace(actor=there))]
    return np.sqrt(((actions[0] - actions[1]) ** 2).mean(axis=(1, 2)))


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
