"""MOORe, a reconstruction: model-based RL whose models forget the dataset slowly once online.

Models of the environment let a policy practise where the data are thin, as far as they can be
trusted. Online, a few new transitions are lost among a million old ones; learnt from alone, they
take away at once what the policy rests on. So a row of the dataset has a priority that fades from
epoch to epoch; by it are drawn what the models learn from and where their rollouts begin.

    Mao, Wang, Wang, Zhang: MOORe: Model-based Offline-to-Online Reinforcement Learning,
    arXiv 2201.10070; offline it is MOPO, arXiv 2005.13239

    dynamics  L_T  = sum_m E[ mean((mu_m - y)^2 / sigma_m^2 + log sigma_m^2) ], y = (s' - s, r)
    Eq. (2)   r~   = r - penalty * max_m |sigma_m(s, a)|, s' and r from one of the M models, drawn
              anew in each of `horizon` steps from a real state; a ~ pi(s)
    Eq. (3)   Pr   = 1 of an online row, by Eq. (4) 1 / (decay * t) of one of the dataset,
              t = 1, 2, ...: the epoch, of epoch_steps environment steps
    critic    L_Q  = E[ sum_i (r~ + discount * soft V(s') - Q_i(s, a))^2 ]; all else is sac.py's

    python algorithms/moore.py                                    # the dataset in this repository
    python algorithms/moore.py --dataset mujoco/hopper/medium-v0  # any Minari dataset here

No code is public: this is a reconstruction from the paper and MOPO's code (tianheyu927/mopo).
 1. Online the models make an update per step; the paper's, every 250 steps, as many as converge.
    They have no hold-out rows and no elites (of MOPO's seven the best five count).
 2. Rollouts are made anew for every update and stored nowhere; the paper's, 100,000 every 250
    steps, are kept. One that ends, by the rule `termination`, begins again where it began;
    without a rule none ends.
 3. real_share of a batch are the rows the rollouts begin at, as in MOPO's code, online, too.
 4. Rows are drawn in proportion to their priority; the paper does not give the exponent of its
    prioritised replay, nor its decay (the paper's alpha; it tried 0.1 to 10).
 5. horizon and penalty are MOPO's for Minari's medium data and D4RL's medium-replay, here of all
    other locomotion; target entropy -1 per dimension (MOPO's -3). Mazes, OGBench, short run: ours.
 6. Rounds begin with fresh episodes, the last ones are cut off, as by a time limit.
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
    dynamics_steps: int = 100_000  # updates of the models
    offline_steps: int = 1_000_000  # updates on the dataset and the models after that
    online_steps: int = 100_000  # environment steps after that, per seed
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
    hidden_dims: tuple[int, ...] = (256, 256)  # widths of policy and critics
    learning_rate: float = 3e-4  # Adam, all but the models
    # SAC
    warmup_steps: int = 250  # environment steps before the first online update
    num_critics: int = 2  # Q-functions; the minimum counts
    entropy_per_action: float = -1.0  # target entropy (nats) per action dimension
    utd_ratio: int = 20  # updates per environment step
    # Models
    model_hidden_dims: tuple[int, ...] = (200, 200, 200, 200)  # widths of the dynamics model
    model_learning_rate: float = 1e-3  # Adam, model
    model_batch_size: int = 256  # transitions per update of the model
    num_models: int = 7  # members of the model's ensemble
    horizon: int = 5  # steps of a rollout in the models
    penalty: float = 1.0  # the papers' lambda: reward per unit of the largest deviation
    real_share: float = 0.05  # of a batch, rows that are no model's
    termination: Literal["", "hopper", "walker2d", "maze", "goal"] = ""  # what ends a rollout
    # MOORe
    decay: float = 1.0  # the paper's alpha: of the priority of the dataset's rows
    epoch_steps: int = 1_000  # environment steps per epoch


PRESETS = {  # auto: the first whose name is in the dataset's or the environment's, else mujoco
    "sac-medium-replay": dict(  # hopper's medium-replay, in a quarter of an hour
        dynamics_steps=4_000, model_hidden_dims=(128, 128), num_models=5, termination="hopper",
        offline_steps=30_000, online_steps=20_000, interval=5_000, utd_ratio=2),
    "ogbench": dict(termination="goal", penalty=0.1, eval_episodes=50, interval=50_000),
    "maze": dict(termination="maze", penalty=0.1, reward_shift=-1.0, eval_episodes=50),
    "hopper/medium-v": dict(termination="hopper", penalty=5.0),
    "walker2d/medium-v": dict(termination="walker2d", penalty=5.0),
    "halfcheetah/medium-v": dict(horizon=1),
    "hopper": dict(termination="hopper"),
    "walker2d": dict(termination="walker2d", horizon=1),
    "mujoco": dict(),
}  # fmt: skip
INIT_FROM = ("moore",)  # scripts whose agents --init-from takes
METRICS = {  # the algorithm's own columns of metrics.csv, with their healthy range
    "critic_loss": "squared TD error, summed over critics; bounded, may grow with q",
    "actor_loss": "temperature * log pi - Q; falls as q rises",
    "temperature_loss": "near 0 once the entropy is at its target",
    "q": "mean Q of the batch; below the best discounted return",
    "entropy": "-log pi of the policy's own actions (nats); settles at the target entropy",
    "dynamics_loss": "negative log-likelihood (nats, without constants), summed over models; falls",
    "deviation": "mean of max_m |sigma_m| over model rows; times penalty below a reward's size",
    "online_share": "share of new rows among those drawn online; rises as old priorities fall",
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


class TanhGaussianPolicy(nn.Module):
    """pi: (B, O) -> a diagonal Gaussian, squashed by tanh, over actions (B, A)."""

    hidden_dims: tuple[int, ...]
    action_dim: int

    @nn.compact
    def __call__(self, observations):
        features = MLP(self.hidden_dims)(observations)  # (B, H)
        mean = nn.Dense(self.action_dim, kernel_init=orthogonal)(features)  # (B, A)
        log_std = nn.Dense(self.action_dim, kernel_init=orthogonal)(features)  # (B, A)
        std = jnp.exp(jnp.clip(log_std, -10.0, 2.0))  # (B, A)
        gaussian = distrax.MultivariateNormalDiag(mean, std)
        return distrax.Transformed(gaussian, distrax.Block(distrax.Tanh(), 1))


class Temperature(nn.Module):
    """The price of a nat of entropy, a positive scalar."""

    @nn.compact
    def __call__(self):
        return jnp.exp(self.param("log_temperature", nn.initializers.zeros, ()))


class DynamicsModel(nn.Module):
    """One model: (B, O + A), standardised -> mean and log-variance (B, O + 1), not bounded yet."""

    hidden_dims: tuple[int, ...]
    num_outputs: int  # O + 1: the change of the observation, and the reward

    @nn.compact
    def __call__(self, x):
        for width in (*self.hidden_dims, 2 * self.num_outputs):
            init = nn.initializers.truncated_normal(0.5 / np.sqrt(x.shape[-1]))
            output = nn.Dense(width, kernel_init=init)(x)  # (B, width)
            x = nn.swish(output)
        return jnp.split(output, 2, axis=-1)  # (B, O + 1) each


@flax.struct.dataclass
class Agent:
    """All that training changes. Outside the losses with a leading axis of seeds, (S, ...)."""

    actor: TrainState
    critic: TrainState
    temperature: TrainState
    target_critic_params: Any
    dynamics: TrainState  # M models, and the two bounds (O + 1,) of log-variances that they share
    input_mean: jax.Array  # (O + A,), of the models' inputs
    input_std: jax.Array  # (O + A,)
    key: jax.Array


def create_agent(key, observation, action, config):
    """A fresh agent from its random key (2,), an observation (1, O) and an action (1, A)."""
    key, actor_key, critic_key, temperature_key, model_key = jax.random.split(key, 5)
    actor = TanhGaussianPolicy(config.hidden_dims, action.shape[1])
    critic = ensemble(Value, config.num_critics)(config.hidden_dims)
    temperature = Temperature()
    actor_params = actor.init(actor_key, observation)
    critic_params = critic.init(critic_key, observation, action)
    temperature_params = temperature.init(temperature_key)
    inputs = jnp.concatenate([observation, action], axis=1)  # (1, O + A)
    num_outputs = observation.shape[1] + 1
    model = DynamicsModel(config.model_hidden_dims, num_outputs)
    model_keys = jax.random.split(model_key, config.num_models)
    models = jax.vmap(model.init, in_axes=(0, None))(model_keys, inputs)
    low, high = jnp.full(num_outputs, -10.0), jnp.full(num_outputs, 0.5)
    dynamics = {"models": models, "low": low, "high": high}
    adam, model_adam = optax.adam(config.learning_rate), optax.adam(config.model_learning_rate)
    return Agent(
        actor=TrainState.create(apply_fn=actor.apply, params=actor_params, tx=adam),
        critic=TrainState.create(apply_fn=critic.apply, params=critic_params, tx=adam),
        temperature=TrainState.create(
            apply_fn=temperature.apply, params=temperature_params, tx=adam
        ),
        target_critic_params=jax.tree.map(jnp.copy, critic_params),
        dynamics=TrainState.create(apply_fn=model.apply, params=dynamics, tx=model_adam),
        input_mean=jnp.zeros(inputs.shape[1]),
        input_std=jnp.ones(inputs.shape[1]),
        key=key,
    )


# ------------------------------------------------------------------------------ Losses and update
# A loss takes first the parameters it differentiates, and returns (loss, metrics).
def predict(agent, params, observations, actions):
    """Of M models asked with (M, B, ...): mean and log-variance (M, B, O + 1), held softly between
    two bounds, which all models share."""
    x = jnp.concatenate([observations, actions], axis=-1)  # (M, B, O + A)
    x = (x - agent.input_mean) / agent.input_std
    mean, log_var = jax.vmap(agent.dynamics.apply_fn)(params["models"], x)  # (M, B, O + 1)
    log_var = params["high"] - nn.softplus(params["high"] - log_var)
    return mean, params["low"] + nn.softplus(log_var - params["low"])


def model_targets(batch):
    """What the models predict (..., O + 1): the change of the observation, and the reward."""
    change = batch.next_observations - batch.observations  # (..., O)
    return jnp.concatenate([change, batch.rewards[..., None]], axis=-1)


def dynamics_loss(params, agent, batch, key, config):
    """Gaussian negative log-likelihood, summed over models, each with its own batch (M, B, ...);
    from MBPO's code a penalty on weights, layer by layer, and one that draws the bounds of
    the log-variance together."""
    mean, log_var = predict(agent, params, batch.observations, batch.actions)  # (M, B, O + 1)
    error = (mean - model_targets(batch)) ** 2 * jnp.exp(-log_var)  # (M, B, O + 1)
    loss = (error + log_var).mean(axis=(1, 2)).sum()
    bounds = 0.01 * (params["high"].sum() - params["low"].sum())
    depth, published = len(config.model_hidden_dims), (2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4)
    layers, penalty = params["models"]["params"], 0.0
    for i in range(depth + 1):
        decay = np.interp(i / depth, np.linspace(0.0, 1.0, 5), published)
        penalty += 0.5 * decay * (layers[f"Dense_{i}"]["kernel"] ** 2).sum()
    return loss + bounds + penalty, {"dynamics_loss": loss}


def critic_loss(params, agent, batch, key, config):
    """Soft Bellman error: Q regresses on r + discount * (min Q - temperature * log pi)(s', a')."""
    policy = agent.actor.apply_fn(agent.actor.params, batch.next_observations)
    next_actions, next_log_prob = policy.sample_and_log_prob(seed=key)  # (B, A), (B,)
    next_q = agent.critic.apply_fn(
        agent.target_critic_params, batch.next_observations, next_actions
    )  # (N, B)
    temperature = agent.temperature.apply_fn(agent.temperature.params)  # ()
    next_v = next_q.min(axis=0) - temperature * next_log_prob  # (B,)
    target_q = batch.rewards + config.discount * batch.masks * next_v  # (B,)
    q = agent.critic.apply_fn(params, batch.observations, batch.actions)  # (N, B)
    loss = ((q - target_q[None]) ** 2).mean(axis=1).sum()
    return loss, {"critic_loss": loss, "q": q.mean()}


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
    target_entropy = config.entropy_per_action * action_dim
    loss = temperature * (entropy - target_entropy)
    return loss, {"temperature_loss": loss, "temperature": temperature}


def gradient_step(train_state, loss_fn, *args):
    """One optimiser step on `loss_fn(params, *args) -> (loss, metrics)`."""
    grads, info = jax.grad(loss_fn, has_aux=True)(train_state.params, *args)
    return train_state.apply_gradients(grads=grads), info


def sac_update(agent, batch, config):
    """One update: Q, pi (against the new Q), temperature (at the policy's entropy), target Q."""
    key, critic_key, actor_key = jax.random.split(agent.key, 3)
    critic, critic_info = gradient_step(agent.critic, critic_loss, agent, batch, critic_key, config)
    agent = agent.replace(critic=critic, key=key)
    actor, actor_info = gradient_step(agent.actor, actor_loss, agent, batch, actor_key, config)
    inputs = agent, actor_info["entropy"], batch.actions.shape[-1], config
    temperature, temperature_info = gradient_step(agent.temperature, temperature_loss, *inputs)
    target = optax.incremental_update(critic.params, agent.target_critic_params, config.tau)
    agent = agent.replace(actor=actor, temperature=temperature, target_critic_params=target)
    return agent, critic_info | actor_info | temperature_info


def fit_dynamics(agent, batch, config):
    """One update of the M models, each on its part (B, ...) of the batch (M * B, ...)."""
    shape = config.num_models, config.model_batch_size
    batch = jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), batch)  # (M, B, ...)
    dynamics, info = gradient_step(agent.dynamics, dynamics_loss, agent, batch, None, config)
    return agent.replace(dynamics=dynamics), info


def imagine(agent, starts, key, config):
    """Eq. (2): rows (horizon * P, ...) of rollouts in the models from states (P, O); the mean
    deviation."""

    def step(observations, key):
        policy_key, model_key, noise_key = jax.random.split(key, 3)
        policy = agent.actor.apply_fn(agent.actor.params, observations)
        actions = policy.sample(seed=policy_key)  # (P, A)
        same = jax.tree.map(lambda x: jnp.stack([x] * config.num_models), (observations, actions))
        mean, log_var = predict(agent, agent.dynamics.params, *same)  # (M, P, O + 1)
        std = jnp.exp(0.5 * log_var)  # (M, P, O + 1)
        deviation = jnp.linalg.norm(std, axis=-1).max(axis=0)  # (P,)
        chosen = jax.random.randint(model_key, (len(starts),), 0, config.num_models)  # (P,)
        mean, std = (x[chosen, jnp.arange(len(starts))] for x in (mean, std))  # (P, O + 1)
        sample = mean + std * jax.random.normal(noise_key, mean.shape)  # (P, O + 1)
        following = observations + sample[:, :-1]  # (P, O)
        rewards = sample[:, -1] - config.penalty * deviation  # (P,)
        end = terminated(following, config.termination)  # (P,)
        end |= (config.termination == "goal") & (sample[:, -1] > -0.5)  # rewards of -1, there 0
        rows = Batch(observations, actions, rewards, following, 1.0 - end, 1.0 * end)
        return jnp.where(end[:, None], starts, following), (rows, deviation)

    _, (rows, deviation) = jax.lax.scan(step, starts, jax.random.split(key, config.horizon))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows), deviation.mean()


def update(agent, batch, config):
    """SAC's, on rows of the models' rollouts from the batch's states, and some of the batch's."""
    key, model_key, sac_key = jax.random.split(agent.key, 3)
    count = -(-len(batch.rewards) // config.horizon)
    imagined, deviation = imagine(agent, batch.observations[:count], model_key, config)
    kept = round(config.real_share * len(batch.rewards))
    mix = jax.tree.map(lambda x, y: jnp.append(x[:kept], y, axis=0)[: len(x)], batch, imagined)
    agent, info = sac_update(agent.replace(key=sac_key), mix, config)
    return agent.replace(key=key), info | {"deviation": deviation}


def online_update(agent, drawn, config):
    """One of the models, and `utd_ratio` of the agent."""
    model_rows, batches, share = drawn  # (M * B, ...), (U, B, ...), ()
    agent, fitted = fit_dynamics(agent, model_rows, config)
    agent, info = jax.lax.scan(partial(update, config=config), agent, batches)
    return agent, jax.tree.map(jnp.mean, info) | fitted | {"online_share": share}


def explore(agent, observation, key, config):
    """The training policy's action (A,) in one observation (O,); uniform before any update."""
    policy_key, uniform_key = jax.random.split(key)
    policy = agent.actor.apply_fn(agent.actor.params, observation[None])
    action = policy.sample(seed=policy_key)[0]  # (A,)
    uniform = jax.random.uniform(uniform_key, action.shape, minval=-1.0, maxval=1.0)  # (A,)
    return jnp.where(agent.critic.step == 0, uniform, action)


def act(agent, observations, config):
    """The deterministic policy's actions (B, A) in observations (B, O), for evaluation."""
    policy = agent.actor.apply_fn(agent.actor.params, observations)
    return jnp.tanh(policy.distribution.mean())  # a squashed Gaussian has no `mode` in distrax


# --------------------------------------------------------------------------------- Dynamics model
def terminated(x, rule):
    """Whether an episode ends in raw observations (B, O), by the environment's rule or MBPO's."""
    small = (jnp.abs(x) < 100).all(axis=1)  # (B,)
    if rule == "hopper":
        high, upright = x[:, 0] > 0.7, jnp.abs(x[:, 1]) < 0.2
        return ~(high & upright & (jnp.abs(x[:, 1:]) < 100).all(axis=1))
    if rule == "walker2d":
        return ~((x[:, 0] > 0.8) & (x[:, 0] < 2.0) & (jnp.abs(x[:, 1]) < 1.0) & small)
    if rule == "halfcheetah":
        return ~small
    if rule == "pen":
        return x[:, 26] < 0.075
    if rule == "maze":  # achieved and desired goal come first; 0.45 is the environment's radius
        return jnp.linalg.norm(x[:, :2] - x[:, 2:4], axis=1) <= 0.45
    return jnp.zeros(len(x), bool)


# ------------------------------------------------------------------------------- Offline to online
def phases(config):
    """The run, phase by phase: name, number of steps, and what one round of them does."""
    if config.termination and config.normalize_observations:
        raise SystemExit(f"--termination {config.termination}: of observations as they are")
    yield "dynamics", config.dynamics_steps, fitting_round
    yield "offline", config.offline_steps, partial(offline_round, update=update)
    train = partial(online_round, update=online_update, warmup=config.warmup_steps)
    yield "online", config.online_steps, train


def fitting_round(agents, buffers, run, first, last):
    """Updates `first` to `last` of the models on the dataset, whose moments they know."""
    config, dataset, *rest = run
    x = jnp.concatenate([dataset.observations, dataset.actions], axis=1)  # (D, O + A)
    std = jnp.where(x.std(axis=0) < 1e-12, 1.0, x.std(axis=0))  # (O + A,)
    mean, std = (jnp.tile(y, (config.num_seeds, 1)) for y in (x.mean(axis=0), std))
    agents = agents.replace(input_mean=mean, input_std=std)
    wide = dataclasses.replace(config, batch_size=config.num_models * config.model_batch_size)
    return offline_round(agents, buffers, (wide, dataset, *rest), first, last, fit_dynamics)


def online_batch(dataset, buffer, size, key, config):
    """Eq. (3), (4): rows of the dataset and of the `size` newest, drawn by priority, for an update
    of the models (M * B, ...) and `utd_ratio` of the agent (U, B, ...); the share of new ones."""
    count, epoch = len(dataset.rewards), 1 + (size - 1) // config.epoch_steps
    weight = count / (config.decay * epoch)  # (), of all old rows; that of all new ones is `size`
    first = config.num_models * config.model_batch_size
    keys, shape = jax.random.split(key), (first + config.utd_ratio * config.batch_size,)
    old = jax.random.uniform(keys[0], shape) < weight / (weight + size)  # (D,)
    rows = jax.random.randint(keys[1], shape, 0, jnp.where(old, count, size))  # (D,)
    pick = partial(jax.vmap(jnp.where), old)
    drawn = jax.tree.map(lambda x, y: pick(x[rows], y[rows]), dataset, buffer)
    batches = jax.tree.map(lambda x: x[first:].reshape(config.utd_ratio, -1, *x.shape[1:]), drawn)
    return jax.tree.map(lambda x: x[:first], drawn), batches, 1.0 - old.mean()


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
