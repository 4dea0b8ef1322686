"""Proximal policy optimisation (PPO): from scratch, online; Uni-O4's online phase is the same code.

Policy gradient in small steps: collect with the current policy, estimate every action's advantage,
and ascend it over a few epochs, but take no credit for moving an action's probability by more than
a factor of 1 +- clip_ratio. With --shift the world has other friction, masses or motors, or actions
arrive late.

    Schulman et al.: Proximal Policy Optimization Algorithms, arXiv 1707.06347
    Schulman et al.: ... Using Generalized Advantage Estimation, arXiv 1506.02438

    advantages  A_t   = sum_k (discount * gae_lambda)^k delta_{t+k}, up to the episode's end
                delta_t = r_t + discount * masks_t * V(s'_t) - V(s_t)
    policy      L_pi  = -E[ min(rho * A, clip(rho, 1 - clip_ratio, 1 + clip_ratio) * A) ]
                        - entropy_weight * E[ entropy of pi(. | s) ]
                rho   = pi(a | s) / pi_old(a | s), A normalised over the rollout
    value       L_V   = E[ (V(s) - (A + V_old(s)))^2 ], clipped with --value-clip

    python baselines/ppo.py --env-id Hopper-v5
    python baselines/ppo.py --env-id Hopper-v5 --shift friction=0.4,mass=1.3,strength=0.8,delay=1

Deviations from the paper's code (github.com/openai/baselines, ppo2):
 1. No running statistics: observations are raw, rewards multiplied by --reward-scale.
 2. The policy is Uni-O4's: its mean passes a tanh, its std depends on the state and stays below 1
    (theirs: a linear mean, one std, from 1). Its hidden layers are tanh; V's are ReLU.
 3. Policy and V have an optimiser and a bound on the gradient each; V's learning rate is 1e-3;
    rates fall with every minibatch (theirs with every rollout).
 4. Minibatches of 128 (theirs 64); advantages are normalised over the rollout, not over each.
 5. V's change between two rollouts is not clipped (--value-clip).
 6. After a time limit V of the next observation is bootstrapped; theirs takes it for an end.
 7. Rounds begin with fresh episodes, the last ones are cut off, as by a time limit.
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
import mujoco
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
    dataset: str = ""  # Minari id: its environment is trained in, with --env-id ""
    env_id: str = "Hopper-v5"  # Gymnasium id
    shift: str = ""  # changed physics, see ShiftedPhysics: friction=0.4,mass=1.3,delay=1
    online_steps: int = 1_000_000  # environment steps, per seed
    interval: int = 10_240  # environment steps per round: train, evaluate, save; whole rollouts
    eval_episodes: int = 10  # per evaluation and seed; more than 10 in tens
    run_dir: str = ""  # folder of this run; default: runs/<script>/<dataset>/seed<seed>
    init_from: str = ""  # folder of a finished run: start from its agents
    wandb: bool = False  # also log to Weights & Biases
    # Data and optimisation
    normalize_observations: bool = False  # by the dataset's mean and standard deviation
    normalize_returns: bool = False  # rewards times 1000 / (max - min return in the dataset)
    reward_scale: float = 0.1  # r <- reward_scale * r + reward_shift, after the above
    reward_shift: float = 0.0  # see reward_scale
    batch_size: int = 128  # transitions per update
    discount: float = 0.99  # per step
    hidden_dims: tuple[int, ...] = (64, 64)  # widths of the policy
    activation: Literal["relu", "tanh"] = "tanh"  # of the policy's hidden layers
    value_hidden_dims: tuple[int, ...] = (64, 64)  # widths of V
    learning_rate: float = 3e-4  # Adam, policy; falls linearly to 0 over online_steps
    value_learning_rate: float = 1e-3  # Adam, V; falls as well
    max_grad_norm: float = 0.5  # of policy and of V
    # PPO
    rollout_steps: int = 2_048  # environment steps between two improvements
    epochs: int = 10  # passes over a rollout
    clip_ratio: float = 0.2  # of the probability ratio, from 1
    value_clip: float = 0.0  # of the change of V between two rollouts, in its units; 0: none
    gae_lambda: float = 0.95  # of the advantages
    entropy_weight: float = 0.0  # of the entropy bonus

    @property
    def buffer_size(self):
        """The buffer holds one rollout, in the order of time."""
        return self.rollout_steps

    @property
    def num_minibatches(self):
        """Updates per pass over a rollout."""
        return self.rollout_steps // self.batch_size


PRESETS = {"mujoco": dict()}
INIT_FROM = ("ppo",)  # scripts whose agents --init-from takes
METRICS = {  # the algorithm's own columns of metrics.csv, with their healthy range
    "actor_loss": "clipped surrogate, negated; slightly below 0, the advantages being normalised",
    "value_loss": "squared error of V (scaled reward units squared)",
    "v": "mean V of the rollout; towards the discounted return",
    "ratio_clipped": "share of ratios outside the clip, mean over the epochs; 0.05 ... 0.3",
    "kl": "of the new policy from the rollout's (nats); of order 0.01",
    "entropy": "of the policy (nats); falls slowly",
    "falls": "terminations per rollout (in mazes: at the goal)",
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


class BoundedGaussianPolicy(nn.Module):
    """pi: (B, O) -> a diagonal Gaussian over (B, A), not squashed. Mean in (-1, 1), log std in
    (-5, 0), at first log 0.5; in Uni-O4's code it passes its tanh twice online (first log 0.39)."""

    hidden_dims: tuple[int, ...]
    action_dim: int
    activation: str
    squash_twice: bool = False

    @nn.compact
    def __call__(self, observations):
        activation = getattr(nn, self.activation)
        features = MLP(self.hidden_dims, activation=activation)(observations)  # (B, H)
        small = nn.initializers.variance_scaling(1e-4, "fan_in", "normal")
        mean = nn.tanh(nn.Dense(self.action_dim, kernel_init=small)(features))  # (B, A)
        start = nn.initializers.constant(np.arctanh((np.log(0.5) + 5.0) / 2.5 - 1.0))
        u = nn.Dense(self.action_dim, kernel_init=small, bias_init=start)(features)  # (B, A)
        u = nn.tanh(nn.tanh(u)) if self.squash_twice else nn.tanh(u)  # (B, A)
        return distrax.MultivariateNormalDiag(mean, jnp.exp(-5.0 + 2.5 * (u + 1.0)))


def clipped_adam(learning_rate, config):
    """Adam behind a bound on the gradient's norm; its rate falls linearly over online_steps."""
    rollouts = config.online_steps // config.rollout_steps
    num_updates = max(1, rollouts * config.epochs * config.num_minibatches)
    rate = optax.linear_schedule(learning_rate, 0.0, num_updates)
    bound = optax.clip_by_global_norm(config.max_grad_norm)
    return optax.chain(bound, optax.adam(rate, eps=1e-5))


@flax.struct.dataclass
class Agent:
    """All that training changes. Outside the losses with a leading axis of seeds, (S, ...)."""

    actor: TrainState
    value: TrainState
    key: jax.Array


def create_agent(key, observation, action, config):
    """A fresh agent from its random key (2,), an observation (1, O) and an action (1, A)."""
    key, actor_key, value_key = jax.random.split(key, 3)
    actor = BoundedGaussianPolicy(config.hidden_dims, action.shape[1], config.activation)
    value = Value(config.value_hidden_dims)
    actor_params = actor.init(actor_key, observation)
    value_params = value.init(value_key, observation)
    actor_adam = clipped_adam(config.learning_rate, config)
    value_adam = clipped_adam(config.value_learning_rate, config)
    return Agent(
        actor=TrainState.create(apply_fn=actor.apply, params=actor_params, tx=actor_adam),
        value=TrainState.create(apply_fn=value.apply, params=value_params, tx=value_adam),
        key=key,
    )


# ------------------------------------------------------------------------------ Losses and update
# A loss takes first the parameters it differentiates, and returns (loss, metrics).
@flax.struct.dataclass
class Sample:
    """What the steps of a rollout say to the losses."""

    observations: jax.Array  # (B, O)
    actions: jax.Array  # (B, A), before they were clipped to the box
    log_probs: jax.Array  # (B,), under the policy that took them
    advantages: jax.Array  # (B,), normalised
    values: jax.Array  # (B,), V before the update
    returns: jax.Array  # (B,), what V regresses on


def generalised_advantages(agent, rollout, config):
    """GAE of a rollout (T, ...) in the order of time: advantages and the values V(s), both (T,).
    `ends` cut the sum, for whatever reason; `masks` say whether the next state has a value."""
    values = agent.value.apply_fn(agent.value.params, rollout.observations)  # (T,)
    next_values = agent.value.apply_fn(agent.value.params, rollout.next_observations)  # (T,)
    deltas = rollout.rewards + config.discount * rollout.masks * next_values - values  # (T,)

    def step(following, inputs):
        delta, end = inputs  # (), ()
        advantage = delta + config.discount * config.gae_lambda * (1.0 - end) * following  # ()
        return advantage, advantage

    steps = deltas, rollout.ends
    _, advantages = jax.lax.scan(step, jnp.zeros_like(deltas[0]), steps, reverse=True)  # (T,)
    return advantages, values


def actor_loss(params, agent, batch, key, config):
    """The clipped surrogate objective, negated, minus the entropy bonus."""
    policy = agent.actor.apply_fn(params, batch.observations)
    log_ratio = policy.log_prob(batch.actions) - batch.log_probs  # (B,)
    ratio = jnp.exp(log_ratio)  # (B,)
    clipped = jnp.clip(ratio, 1.0 - config.clip_ratio, 1.0 + config.clip_ratio)  # (B,)
    surrogate = jnp.minimum(ratio * batch.advantages, clipped * batch.advantages)  # (B,)
    entropy = policy.entropy().mean()
    loss = -surrogate.mean() - config.entropy_weight * entropy
    info = {"ratio_clipped": (ratio != clipped).mean(), "kl": (ratio - 1.0 - log_ratio).mean()}
    return loss, info | {"actor_loss": loss, "entropy": entropy}


def value_loss(params, agent, batch, key, config):
    """V regresses on the returns; --value-clip: or V held near its old value, if that is worse."""
    v = agent.value.apply_fn(params, batch.observations)  # (B,)
    errors = (v - batch.returns) ** 2  # (B,)
    if config.value_clip > 0:
        change = jnp.clip(v - batch.values, -config.value_clip, config.value_clip)  # (B,)
        near = batch.values + change  # (B,)
        errors = jnp.maximum(errors, (near - batch.returns) ** 2)  # (B,)
    return errors.mean(), {"value_loss": errors.mean(), "v": v.mean()}


def gradient_step(train_state, loss_fn, *args):
    """One optimiser step on `loss_fn(params, *args) -> (loss, metrics)`."""
    grads, info = jax.grad(loss_fn, has_aux=True)(train_state.params, *args)
    return train_state.apply_gradients(grads=grads), info


def update(agent, batch, config):
    """One update on a minibatch: pi, then V."""
    actor, actor_info = gradient_step(agent.actor, actor_loss, agent, batch, None, config)
    value, value_info = gradient_step(agent.value, value_loss, agent, batch, None, config)
    return agent.replace(actor=actor, value=value), actor_info | value_info


def improve(agent, rollout, config):
    """`epochs` passes over a rollout (T, ...) in random minibatches. Metrics are means."""
    advantages, values = generalised_advantages(agent, rollout, config)  # (T,)
    normalised = (advantages - advantages.mean()) / (advantages.std() + 1e-8)  # (T,)
    policy = agent.actor.apply_fn(agent.actor.params, rollout.observations)
    taken = rollout.observations, rollout.actions, policy.log_prob(rollout.actions)
    samples = Sample(*taken, normalised, values, advantages + values)

    def epoch(agent, _):
        key, order_key = jax.random.split(agent.key)
        order = jax.random.permutation(order_key, config.rollout_steps)  # (T,)
        order = order.reshape(config.num_minibatches, -1)  # (M, B)

        def step(agent, rows):
            return update(agent, jax.tree.map(lambda x: x[rows], samples), config)

        return jax.lax.scan(step, agent.replace(key=key), order)

    agent, info = jax.lax.scan(epoch, agent, length=config.epochs)
    return agent, jax.tree.map(jnp.mean, info) | {"falls": (1.0 - rollout.masks).sum()}


def explore(agent, observation, key, config):
    """The training policy's action (A,) in one observation (O,), not clipped to the box."""
    return agent.actor.apply_fn(agent.actor.params, observation[None]).sample(seed=key)[0]


def act(agent, observations, config):
    """The deterministic policy's actions (B, A) in observations (B, O), for evaluation."""
    return agent.actor.apply_fn(agent.actor.params, observations).mean()


# -------------------------------------------------------------------------------- A shifted world
class ShiftedPhysics(gym.Wrapper):
    """A MuJoCo environment with other physics, as factors of the model's own: `friction` of all
    contacts, `mass` and inertia of all bodies, `strength` of the actuators, `damping` of the
    joints; and actions that arrive `delay` steps late, until then the zero action."""

    def __init__(self, env, friction=1.0, mass=1.0, strength=1.0, damping=1.0, delay=0):
        super().__init__(env)
        self.delay, self.waiting = int(delay), []
        model = env.unwrapped.model
        model.geom_friction[:] *= friction
        model.body_mass[:] *= mass
        model.body_inertia[:] *= mass
        model.actuator_gear[:] *= strength
        model.dof_damping[:] *= damping
        mujoco.mj_setConst(model, env.unwrapped.data)  # what MuJoCo derives from mass and inertia

    def reset(self, **keywords):
        self.waiting = [np.zeros(self.action_space.shape, self.action_space.dtype)] * self.delay
        return self.env.reset(**keywords)

    def step(self, action):
        self.waiting.append(action)
        return self.env.step(self.waiting.pop(0))


def shifted(source, config):
    """The source (load_dataset's) with the physics that --shift asks for."""
    if not config.shift:
        return source
    try:
        words = [word.split("=") for word in config.shift.split(",")]
        changes = {name: float(number) for name, number in words}
        ShiftedPhysics(make_env(source), **changes)
    except (AttributeError, TypeError, ValueError) as error:
        raise SystemExit(f"--shift {config.shift}: {error}; see ShiftedPhysics") from None
    entry_point = f"{Path(__file__).stem}:ShiftedPhysics"  # where other programs find it, too
    wrapper = {"name": "ShiftedPhysics", "entry_point": entry_point, "kwargs": changes}
    spec = json.loads(source["environment"])
    spec["additional_wrappers"].append(wrapper)
    return source | {"environment": json.dumps(spec)}


# ---------------------------------------------------------------------------------------- Online
def phases(config):
    """The run, phase by phase: name, number of steps, and what one round of them does."""
    if config.interval % config.rollout_steps or config.rollout_steps % config.batch_size:
        raise SystemExit("--interval must be a multiple of --rollout-steps, that of --batch-size")
    yield "online", config.online_steps, on_policy_round


def on_policy_round(agents, buffers, run, first, last):
    """Environment steps `first` to `last`, an improvement after each rollout, none of which is kept
    any longer. At first with fresh optimisers: agents of --init-from bring their old ones along."""
    config = run[0]
    if first == 0:
        actor, value = fresh_optimiser(agents.actor), fresh_optimiser(agents.value)
        agents = agents.replace(actor=actor, value=value)
    train = partial(online_round, update=improve, every=config.rollout_steps)
    rollout = jax.tree.map(lambda x: jnp.zeros_like(x[:, : config.rollout_steps]), buffers)
    agents, _, info = train(agents, rollout, run, first, last)
    updates = info["updates"] * config.epochs * config.num_minibatches
    return agents, buffers, info | {"updates": updates}


@jax.jit
def fresh_optimiser(train_states):
    """TrainStates (S, ...) with the same parameters and an optimiser that has made no step."""
    create = partial(TrainState.create, apply_fn=train_states.apply_fn, tx=train_states.tx)
    return jax.vmap(lambda params: create(params=params))(train_states.params)


def online_batch(dataset, buffer, size, key, config):
    """The whole rollout (T, ...), in the order of time."""
    return buffer


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
    source = shifted(source, config)
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
