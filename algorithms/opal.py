"""OPAL: learn skills of many steps from the data; then choose among skills instead of actions.

Values from fixed data are spoilt by errors that every step adds to, and by actions the data lacks.
OPAL first lets an autoencoder find what the data does in c steps: a skill z, which a low-level
policy pi(a | s, z) plays. Then all windows of c steps are relabelled with their skills, and a task
policy psi learns to choose one, hold it for c steps, and choose again: its horizon is c times
shorter, what it chooses is played as the data would. Online only the task policy goes on.

    Ajay, Kumar, Agrawal, Levine, Nachum: OPAL, arXiv 2010.13611

    skills   L = E[ -sum_t log pi(a_t | s_t, z) + kl_weight * KL(q(z | tau) || rho(z | s_0)) ],
             tau = (s_0, a_0, ..., s_c-1, a_c-1), of one episode, z ~ q(z | tau)
    relabel  tau -> (s_0, z, R, s_c), z now the mean of q(z | tau), R = sum_t discount^t r_t
    task     IQL's Eq. (5) to (7) (arXiv 2110.06169), with skills for actions, discount^c a step:
             L_V   = E[ |expectile - 1(u < 0)| u^2 ],   u = min_i Qtarget_i(s_0, z) - V(s_0)
             L_Q   = E[ sum_i (R + discount^c * V(s_c) - Q_i(s_0, z))^2 ]
             L_psi = -E[ exp(beta * (min_i Qtarget_i(s_0, z) - V(s_0))) * log psi(z | s_0) ]

    python algorithms/opal.py  # on the repository's data, or: --dataset D4RL/antmaze/medium-play-v1

Deviations. The authors' code is not public: a reconstruction, held to a third party's numbers
(github.com/hij0527/OPAL-PyTorch, branch phase1) in the autoencoder, its loss and the windows.
 1. The task is learnt by IQL, in the paper by CQL. All its settings are ours, kitchen has none.
 2. Going on online from the offline task policy is ours, with an update per skill, on windows and
    skills played, half and half. The paper's: SAC or PPO from nothing (third party: KL to rho).
 3. R is discounted, as in the paper (third party: a plain sum, and 0.99 per skill).
 4. pi is not tuned again on relabelled windows, the same as it was trained on, and plays its mean.
 5. Log-std in [-5, 2] ([-10, 2]); 100,000 updates of 256 (200,000 of 50, the first 100 clipped).
 6. Rounds begin with fresh episodes. A skill that an end cuts counts as whole, as c steps, too.
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
from typing import Any

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
    skill_steps: int = 100_000  # updates of the autoencoder on the dataset
    offline_steps: int = 1_000_000  # updates of the task policy on the dataset
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
    batch_size: int = 256  # windows per update; online half are skills played
    discount: float = 0.99  # per step
    tau: float = 0.005  # target critic: fraction of the new critic per update
    buffer_size: int = 1_000_000  # online steps kept, per seed, as skills; the oldest go first
    hidden_dims: tuple[int, ...] = (256, 256)  # widths of the task's networks
    learning_rate: float = 3e-4  # Adam, of the task's networks
    # Skills
    skill_length: int = 10  # the paper's c: steps that a skill is held
    skill_dim: int = 8  # numbers in a skill z
    kl_weight: float = 0.1  # the paper's beta: more makes skills easier to guess from s_0
    skill_hidden_dims: tuple[int, ...] = (200, 200)  # of prior, low-level policy and encoder
    gru_layers: int = 4  # of the encoder, after its hidden layers; as wide as the last of them
    skill_learning_rate: float = 1e-3  # Adam, of those three
    # IQL
    expectile: float = 0.7  # 0.5: V is the mean of Q over the data; towards 1: its maximum
    beta: float = 1.0  # inverse temperature of the advantage weights; 0: behaviour cloning
    max_weight: float = 100.0  # the weights are clipped here


MAZE = dict(expectile=0.9, discount=0.999, eval_episodes=50, interval=50_000)
SMALL = dict(skill_steps=10_000, offline_steps=30_000, online_steps=20_000, gru_layers=1)
PRESETS = {  # auto: the first whose name is in the dataset's or the environment's, else mujoco
    "sac-medium-replay": SMALL | dict(normalize_returns=True, skill_hidden_dims=(64, 64)),
    "ogbench": MAZE | dict(reward_scale=0.1),  # unscaled, beta 1 is greedy
    "maze": MAZE | dict(reward_shift=-0.1, reward_scale=0.1, eval_episodes=100),
    "mujoco": dict(normalize_returns=True),
}
INIT_FROM = ("opal",)  # scripts whose agents --init-from takes
METRICS = {  # the algorithm's own columns of metrics.csv, with their healthy range
    "reconstruction": "negative log-likelihood of a window's actions (nats per skill); falls",
    "kl": "of encoder and prior (nats per skill); rises, then flat, above 0: else z says nothing",
    "value_loss": "expectile loss of V (scaled reward units squared); falls, then flat",
    "critic_loss": "squared TD error, summed over critics; bounded, may grow with q",
    "actor_loss": "weighted negative log-likelihood (nats); falls",
    "q": "mean Q of the batch; near or above the dataset's discounted return, never far above",
    "v": "mean V of the batch; close to q",
    "advantage": "mean of Q - V; slightly negative for expectile > 0.5",
    "weight": "mean advantage weight; of order 1 (max_weight: beta is too large for the rewards)",
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


class Gaussian(nn.Module):
    """rho(z | s), pi(a | s, z) or psi(z | s): a diagonal Gaussian over (..., D)."""

    hidden_dims: tuple[int, ...]
    dim: int

    @nn.compact
    def __call__(self, *inputs):
        features = MLP(self.hidden_dims)(jnp.concatenate(inputs, axis=-1))  # (..., H)
        mean = nn.Dense(self.dim)(features)  # (..., D)
        log_std = jnp.clip(nn.Dense(self.dim)(features), -5.0, 2.0)  # (..., D)
        return distrax.MultivariateNormalDiag(mean, jnp.exp(log_std))


class Encoder(nn.Module):
    """q(z | tau): windows (B, c, O) and (B, c, A) -> a Gaussian over skills (B, Z)."""

    hidden_dims: tuple[int, ...]
    gru_layers: int
    skill_dim: int

    @nn.compact
    def __call__(self, observations, actions):
        x, width = MLP(self.hidden_dims)(observations), self.hidden_dims[-1]  # (B, c, H)
        x = jnp.concatenate([x, actions], axis=-1)  # (B, c, H + A)
        cell = partial(nn.GRUCell, width, recurrent_kernel_init=nn.initializers.lecun_normal())
        for _ in range(self.gru_layers):
            x = nn.Bidirectional(nn.RNN(cell()), nn.RNN(cell()))(x)  # (B, c, 2 H)
        return Gaussian((), self.skill_dim)(x[:, -1, :width])  # forward, after the last step


@flax.struct.dataclass
class Agent:
    """All that training changes. Outside the losses with a leading axis of seeds, (S, ...)."""

    encoder: TrainState
    prior: TrainState
    decoder: TrainState  # the low-level policy
    actor: TrainState  # the task policy, over skills
    critic: TrainState
    value: TrainState
    target_critic_params: Any
    key: jax.Array


def create_agent(key, observation, action, config):
    """A fresh agent from its random key (2,), an observation (1, O) and an action (1, A)."""
    key, *keys = jax.random.split(key, 7)

    def create(rate, network, *inputs):
        params, adam = network.init(keys.pop(), *inputs), optax.adam(rate)
        return TrainState.create(apply_fn=network.apply, params=params, tx=adam)

    rate, wide, dim = config.skill_learning_rate, config.skill_hidden_dims, config.skill_dim
    encoder, skill = Encoder(wide, config.gru_layers, dim), jnp.zeros((1, dim))
    encoder = create(rate, encoder, observation[:, None], action[:, None])
    prior = create(rate, Gaussian(wide, dim), observation)
    decoder = create(rate, Gaussian(wide, action.shape[1]), observation, skill)
    rate, wide = config.learning_rate, config.hidden_dims
    actor = create(rate, Gaussian(wide, dim), observation)
    critic = create(rate, ensemble(Value, 2)(wide), observation, skill)
    value = create(rate, Value(wide), observation)
    target = jax.tree.map(jnp.copy, critic.params)
    return Agent(encoder, prior, decoder, actor, critic, value, target, key)


# ------------------------------------------------------------------------------ Losses and update
# A loss takes first the parameters it differentiates, and returns (loss, metrics).
def skill_loss(params, agent, windows, key, config):
    """The autoencoder's: windows are rebuilt from skills that their first state makes likely."""
    encoder_params, prior_params, decoder_params = params
    observations, actions = windows.observations, windows.actions  # (B, c, O), (B, c, A)
    posterior = agent.encoder.apply_fn(encoder_params, observations, actions)
    prior = agent.prior.apply_fn(prior_params, observations[:, 0])
    skills = posterior.sample(seed=key)  # (B, Z), as mean + std * noise
    held = jnp.repeat(skills[:, None], actions.shape[1], axis=1)  # (B, c, Z)
    policy = agent.decoder.apply_fn(decoder_params, observations, held)
    reconstruction = -policy.log_prob(actions).sum(axis=1).mean()  # summed over the window
    kl = posterior.kl_divergence(prior).mean()
    return reconstruction + config.kl_weight * kl, {"reconstruction": reconstruction, "kl": kl}


def relabel(agent, windows):
    """Windows as transitions of c steps at once, whose actions are skills, the encoder's means."""
    posterior = agent.encoder.apply_fn(agent.encoder.params, windows.observations, windows.actions)
    return windows.replace(observations=windows.observations[:, 0], actions=posterior.mean())


def value_loss(params, agent, batch, key, config):
    """IQL's Eq. (5): V regresses on an upper expectile of the target Q of the data's skills."""
    q = agent.critic.apply_fn(agent.target_critic_params, batch.observations, batch.actions)
    v = agent.value.apply_fn(params, batch.observations)  # (B,)
    u = q.min(axis=0) - v  # (B,), q is (N, B)
    weight = jnp.abs(config.expectile - (u < 0))  # (B,), |expectile - 1(u < 0)|
    loss = (weight * u**2).mean()
    return loss, {"value_loss": loss, "v": v.mean()}


def actor_loss(params, agent, batch, key, config):
    """IQL's Eq. (7), negated; the clip of the weights is from its authors' code only."""
    q = agent.critic.apply_fn(agent.target_critic_params, batch.observations, batch.actions)
    v = agent.value.apply_fn(agent.value.params, batch.observations)  # (B,)
    advantage = q.min(axis=0) - v  # (B,), q is (N, B)
    weight = jnp.minimum(jnp.exp(config.beta * advantage), config.max_weight)  # (B,)
    policy = agent.actor.apply_fn(params, batch.observations)
    log_prob = policy.log_prob(batch.actions)  # (B,), nats
    loss = -(weight * log_prob).mean()
    return loss, {"actor_loss": loss, "advantage": advantage.mean(), "weight": weight.mean()}


def critic_loss(params, agent, batch, key, config):
    """IQL's Eq. (6): Q regresses on R + discount^c * V(s_c), c steps later; summed over i."""
    next_v = agent.value.apply_fn(agent.value.params, batch.next_observations)  # (B,)
    discount = config.discount**config.skill_length
    target_q = batch.rewards + discount * batch.masks * next_v  # (B,)
    q = agent.critic.apply_fn(params, batch.observations, batch.actions)  # (N, B)
    loss = ((q - target_q[None]) ** 2).mean(axis=1).sum()
    return loss, {"critic_loss": loss, "q": q.mean()}


def gradient_step(train_state, loss_fn, *args):
    """One optimiser step on `loss_fn(params, *args) -> (loss, metrics)`."""
    grads, info = jax.grad(loss_fn, has_aux=True)(train_state.params, *args)
    return train_state.apply_gradients(grads=grads), info


def update_skills(agent, windows, config):
    """One update of encoder, prior and low-level policy."""
    key, skill_key = jax.random.split(agent.key)
    states = agent.encoder, agent.prior, agent.decoder
    params, gradient = [x.params for x in states], jax.grad(skill_loss, has_aux=True)
    grads, info = gradient(params, agent, windows, skill_key, config)
    new = [x.apply_gradients(grads=own) for x, own in zip(states, grads, strict=True)]
    return agent.replace(encoder=new[0], prior=new[1], decoder=new[2], key=key), info


def update(agent, batch, config):
    """IQL's, in its order: V, psi (with the new V), Q, target Q. Online on skills played, too."""
    windows, *played = batch if isinstance(batch, tuple) else (batch,)
    batch = jax.tree.map(lambda *xs: jnp.concatenate(xs), relabel(agent, windows), *played)
    value, value_info = gradient_step(agent.value, value_loss, agent, batch, None, config)
    agent = agent.replace(value=value)
    actor, actor_info = gradient_step(agent.actor, actor_loss, agent, batch, None, config)
    critic, critic_info = gradient_step(agent.critic, critic_loss, agent, batch, None, config)
    target = optax.incremental_update(critic.params, agent.target_critic_params, config.tau)
    agent = agent.replace(actor=actor, critic=critic, target_critic_params=target)
    return agent, value_info | actor_info | critic_info


def explore(agent, observation, key, config):
    """The task policy's next skill (Z,) in one observation (O,), while training."""
    return agent.actor.apply_fn(agent.actor.params, observation[None]).sample(seed=key)[0]


def act(agent, observations, config):
    """The deterministic task policy's skills (B, Z) in observations (B, O), for evaluation."""
    return agent.actor.apply_fn(agent.actor.params, observations).mean()


@jax.jit
@jax.vmap
def play(agent, observations, skills):
    """The low-level policy's actions (S, E, A): observations (S, E, O), skills (S, E, Z)."""
    return agent.decoder.apply_fn(agent.decoder.params, observations, skills).mean()


class SkillEnvs:
    """Vectorised environments whose actions are skills: a step plays one for `skill_length` steps,
    or to the episode's end; its reward is their discounted sum. state["agents"] play."""

    def __init__(self, envs, state, config):
        self.envs, self.num_envs, self.state, self.config = envs.envs, envs.num_envs, state, config

    def reset(self, seed):
        starts = [env.reset(seed=own)[0] for env, own in zip(self.envs, seed, strict=True)]
        self.observations = np.stack(starts)  # (S * E, O)
        return self.observations, {}

    def step(self, skills):
        """As SyncVectorEnv's, of skills (S * E, Z). Who is at an end waits for the others."""
        observations, shape = self.observations.copy(), (self.config.num_seeds, -1)
        (rewards, returns), (terminated, truncated) = np.zeros((2, 2, len(skills)))  # (S * E,)
        for t in range(self.config.skill_length):
            inputs = (x.reshape(*shape, x.shape[1]) for x in (observations, skills))
            actions = np.asarray(play(self.state["agents"], *inputs)).reshape(len(skills), -1)
            for i in np.flatnonzero(terminated + truncated == 0):
                step = self.envs[i].step(actions[i])
                observations[i], reward, terminated[i], truncated[i], info = step
                rewards[i] += self.config.discount**t * reward
                returns[i] = info["episode"]["r"] if "episode" in info else 0.0
        self.observations = observations.copy()
        for i in np.flatnonzero(terminated + truncated):
            self.observations[i], _ = self.envs[i].reset()
        info = {"final_obs": observations, "final_info": {"episode": {"r": returns}}}
        return self.observations, rewards, terminated > 0, truncated > 0, info


# ------------------------------------------------------------------------------- Offline to online
def phases(config):
    """The run, phase by phase: name, number of steps, and what one round of them does."""
    yield "skills", config.skill_steps, partial(offline_round, update=update_skills)
    yield "offline", config.offline_steps, partial(offline_round, update=update)
    yield "online", config.online_steps, skills_round


def windows_of(dataset, config):
    """Every `skill_length` rows in a row of one episode: a Batch with a leading axis of windows."""
    length = config.skill_length
    episode = np.append(0, np.cumsum(dataset.ends[:-1], dtype=int))  # (N,), number of each row's
    starts = np.flatnonzero(episode[: max(0, len(episode) - length + 1)] == episode[length - 1 :])
    if not len(starts):
        raise SystemExit(f"no episode of the dataset has --skill-length {length} steps")
    rows = starts[:, None] + np.arange(length)  # (W, c)
    windows = jax.tree.map(lambda x: x[rows], dataset)  # (W, c, ...)
    rewards = windows.rewards @ config.discount ** np.arange(length)  # (W,)
    last = jax.tree.map(lambda x: x[:, -1], windows)  # for next observation, mask and end
    return last.replace(observations=windows.observations, actions=windows.actions, rewards=rewards)


def skills_round(agents, buffers, run, first, last):
    """online_round, a step of which is a skill. It donates the agents: a copy of them plays."""
    config, dataset, envs, bar = run
    envs = SkillEnvs(envs, {"agents": jax.tree.map(jnp.copy, agents)}, config)
    run, skills = (config, dataset, envs, bar), [x // config.skill_length for x in (first, last)]
    bar.update(last - first - (skills[1] - skills[0]))
    return online_round(agents, buffers, run, *skills, update=update)


def online_batch(dataset, buffer, size, key, config):
    """An online update's batch: windows of the dataset, and as many of the `size` skills played."""
    half, keys = config.batch_size // 2, jax.random.split(key)
    rows = jax.random.randint(keys[0], (half,), 0, len(dataset.rewards))
    newest = jax.random.randint(keys[1], (half,), 0, size)
    return jax.tree.map(lambda x: x[rows], dataset), jax.tree.map(lambda x: x[newest], buffer)


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
    shape = config.num_seeds, -(-shape[1] // config.skill_length)  # a row is a skill
    buffers = jax.tree.map(lambda x: jnp.zeros((*shape, *x.shape[1:]), np.float32), dataset)
    buffers = buffers.replace(actions=jnp.zeros((*shape, config.skill_dim), np.float32))
    dataset = windows_of(dataset, config)
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
    eval_envs = SkillEnvs(eval_envs, state, config)
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
