"""TD3-C: fine-tune a TD3+BC agent with TD3, while the policy may only move slowly.

After the switch plain TD3 may collapse: the critic is right where the data were, and the policy
leaves. Here it may be no further than epsilon, in mean squared action, from a reference policy, by
default a slow average of itself, which bounds its speed and not where it gets to: less is lost at
the switch, but an agent that has become good may still fall later. A learnt multiplier is the price
of the distance. It needs time: in the first steps the bound does not hold, later it holds on
average, and on some data not even that: D is 2 to 4 epsilon, and the multiplier rises towards its
largest. Compare with td3_bc.py --online-loss td3 with a thousandth of the policy_learning_rate,
which is slow, too: results/collapse.md.

This is a RECONSTRUCTION of the conservative policy optimisation of
    Luo, Kay, Grefenstette, Deisenroth: Finetuning from Offline RL, arXiv 2303.17396
whose authors have published no code: the paper's claims are known here, its equations and settings
are not. The form below is the one we take it to have; numbers of it are not the paper's numbers.

    critic       L_Q    = sum_i E[ (r + discount * min_j Qtarget_j(s', a') - Q_i(s, a))^2 ]
                 a'     = clip(pi_target(s') + clip(noise, -noise_clip, noise_clip), -1, 1)
    actor        L_pi   = -q_weight / mean|Q_1| * E[ Q_1(s, pi(s)) ] + E[ (pi(s) - a)^2 ], offline
    td3          L_pi   = -1 / mean|Q_1| * E[ Q_1(s, pi(s)) ]
    constrained  L_pi   = the same + multiplier * D, online; D = E[ (pi(s) - pi_ref(s))^2 ]
    dual         L_dual = multiplier * (epsilon - D), multiplier = softplus(eta)

pi_ref, by --reference: ema (the target policy), periodic (a copy every reference_period updates),
best (the best evaluated so far: training sees evaluations) or frozen (the offline policy). For the
last two --epsilon 0.0025 --epsilon-end 0.04 is the line of OCR-CFT (deviation 2). --epsilon inf is
td3_bc.py with --online-loss td3, to the bit; --dual annealed --multiplier 0.8 is PROTO's penalty.

    python algorithms/td3_c.py                  # the dataset in this repository
    python algorithms/td3_c.py --init-from RUN  # made by td3_bc.py, or this, with --online-steps 0

Deviations from the authors' code (there is none: from the code of its neighbours):
 1. Constants are ours: epsilon 1e-4 and dual_learning_rate 1e-2 did not collapse in a prototype on
    Hopper where epsilon 1e-3 did (it left no record; those of these settings: results/collapse.md).
    The multiplier stays in 0.05 ... multiplier_max, so that it can turn round. A small epsilon is
    met only loosely: report D. With --no-normalize-q the multiplier is on Q's scale: raise
    multiplier_max, too.
 2. OCR-CFT (arXiv 2412.18855), the best reference: no reconstruction of the critic, no LayerNorm,
    no penalty in its target; softplus for exp, rates 1e-2 for 5e-5 (multiplier) and 3e-4 for 1e-4
    (policy), no more weight for violations than for slack; the best of evaluations that are
    eval_interval apart, where theirs are 1,000 steps apart.
 3. PROTO (arXiv 2305.15669), the annealed multiplier: TD3+BC before it, not XQL; no penalty in the
    critic's target, whose actions are noisy here; 0.8 Q-weights, as its 2 stands beside
    2.5 Q / mean|Q|; its replay, exploration noise and scale of rewards are not taken over.
 4. As in td3_bc.py: what happens at the switch, initialisation, the domains' settings, the clipped
    actions, the last rows of cut trajectories.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "jax==0.10.2",
#   "flax==0.12.8",
#   "optax==0.2.8",
#   "chex==0.1.92",
#   "numpy==2.4.6",
#   "scipy==1.17.1",
#   "gymnasium[mujoco]==1.4.0",
#   "mujoco==3.11.0",
#   "minari[hdf5,hf]==0.5.4",
#   "h5py==3.16.0",
#   "huggingface-hub==2.4.0",
#   "tyro==1.0.16",
#   "tqdm==4.70.1",
#   "matplotlib==3.11.2",
#   "imageio[ffmpeg]==2.38.1",
#   "imageio-ffmpeg==0.8.1",
# ]
# ///
import contextlib
import csv
import dataclasses
import difflib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import platform
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import flax
import flax.linen as nn
import gymnasium as gym
import h5py
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
    preset: str = "auto"  # settings of a domain, see PRESETS; auto: from the environment
    offline_steps: int = 1_000_000  # updates on the dataset
    online_steps: int = 100_000  # environment steps after that, per seed
    eval_interval: int = 5_000  # updates (offline) or environment steps (online)
    eval_episodes: int = 10  # per evaluation and seed
    log_interval: int = 1_000  # updates or environment steps per row of metrics.csv
    run_dir: str | None = None  # folder of this run; default: runs/<script>/<dataset>/<name>
    resume: str | None = None  # folder of a run to go on with (a new run where there is none)
    init_from: str | None = None  # checkpoint or run folder: skip the offline phase, start from it
    eval_only: str | None = None  # checkpoint or run folder: evaluate it and stop
    video: bool = False  # film one episode at the end: video.mp4
    wandb: bool = False  # also log to Weights & Biases
    # Data
    dataset: str | None = None  # Minari id, folder or file; default: --init-from's, else the repo's
    env_id: str | None = None  # Gymnasium id; needed with a flat file, else the dataset's
    normalize_observations: bool = True  # by the dataset's mean and standard deviation
    normalize_returns: bool = False  # rewards times 1000 / (max - min return in the dataset)
    reward_scale: float = 1.0  # r <- reward_scale * r + reward_shift, after the above
    reward_shift: float = 0.0  # see reward_scale
    # Optimisation
    batch_size: int = 256  # transitions per update
    discount: float = 0.99  # per step
    tau: float = 0.005  # both targets: fraction of the new network per update of the policy
    buffer_size: int = 1_000_000  # online transitions kept, per seed
    hidden_dims: tuple[int, ...] = (256, 256)  # widths of every network
    learning_rate: float = 3e-4  # Adam, critics
    policy_learning_rate: float = 3e-4  # Adam, policy
    utd_ratio: int = 1  # updates per environment step
    warmup_steps: int = 1_000  # environment steps before the first online update
    # TD3
    num_critics: int = 2  # Q-functions; the minimum is the target, the first one leads the policy
    policy_delay: int = 2  # updates of the critic per update of the policy and of both targets
    target_noise: float = 0.2  # standard deviation, on the target policy's actions
    noise_clip: float = 0.5  # of that noise
    exploration_noise: float = 0.1  # standard deviation, on the actions executed in training
    # TD3+BC
    q_weight: float = 2.5  # the paper's alpha: of Q beside the imitation, whose weight is 1
    # Fine-tuning
    normalize_q: bool = True  # online, without imitation: divide Q by its mean magnitude
    online_optimizer: Literal["carried", "reset"] = "reset"  # both optimisers' states at the switch
    replay: Literal["online", "append", "half"] = "half"  # new rows; all alike; half from the data
    # TD3-C
    epsilon: float = 1e-4  # bound of D, in squared actions; inf: plain TD3
    epsilon_end: float | None = None  # after epsilon_updates, on a line; default: constant
    epsilon_updates: int = 50_000  # of the policy, see epsilon_end
    reference: Literal["ema", "periodic", "best", "frozen"] = "ema"  # policy to stay close to
    reference_period: int = 100  # updates of the policy from one periodic reference to the next
    dual: Literal["learned", "annealed"] = "learned"  # the multiplier; annealed: PROTO's
    multiplier: float = 1.0  # price of D at the switch
    multiplier_max: float = 100.0  # largest one that is learnt
    dual_learning_rate: float = 1e-2  # Adam, the learned multiplier
    anneal_updates: int = 555_556  # of the policy until the annealed multiplier is 0


PRESETS = {
    "mujoco": dict(),
    "antmaze": dict(
        reward_shift=-1.0, online_steps=300_000, eval_episodes=100, eval_interval=50_000
    ),
    "pointmaze": dict(reward_shift=-1.0, eval_episodes=100, eval_interval=10_000),
    "kitchen": dict(),
    "adroit": dict(),
}
# A short budget for the repository's own dataset, and one for a look at whether all parts run.
PRESETS["default"] = PRESETS["mujoco"] | dict(
    offline_steps=50_000, online_steps=20_000, eval_interval=2_000
)
PRESETS["smoke"] = PRESETS["mujoco"] | dict(
    offline_steps=200, online_steps=200, warmup_steps=50, eval_interval=100, eval_episodes=1,
    log_interval=50, batch_size=32, hidden_dims=(32, 32),
)

RANGES = {  # smallest and largest accepted value
    "num_seeds": (1, 4096), "offline_steps": (0, 10**9), "online_steps": (0, 10**9),
    "eval_interval": (1, 10**9), "eval_episodes": (1, 10**4), "log_interval": (1, 10**9),
    "batch_size": (1, 10**6), "discount": (0.0, 1.0), "tau": (0.0, 1.0), "utd_ratio": (1, 1000),
    "learning_rate": (0.0, 1.0), "policy_learning_rate": (0.0, 1.0), "num_critics": (1, 100),
    "seed": (0, 2**31 - 1), "buffer_size": (1, 10**9), "warmup_steps": (0, 10**9),
    "reward_scale": (-1e9, 1e9), "reward_shift": (-1e9, 1e9), "policy_delay": (1, 1000),
    "target_noise": (0.0, 2.0), "noise_clip": (0.0, 2.0), "exploration_noise": (0.0, 2.0),
    "q_weight": (0.0, 1e6),
    "epsilon": (0.0, math.inf), "epsilon_end": (0.0, 4.0), "epsilon_updates": (1, 10**9),
    "reference_period": (1, 10**9), "multiplier": (0.05, 100.0), "multiplier_max": (5.0, 1e6),
    "dual_learning_rate": (0.0, 1.0), "anneal_updates": (1, 10**9),
}

INIT_FROM = ("td3_bc", "td3_c")  # scripts whose checkpoints --init-from takes
REFERENCES = {"ema": "target_actor_params", "frozen": "offline_actor_params",  # in AgentState
              "periodic": "reference_params", "best": "reference_params"}

METRICS = {  # every column of metrics.csv that is the algorithm's own, with its healthy range
    "critic_loss": "squared TD error, summed over critics; bounded, may grow with q",
    "q": "mean Q of the batch; near or above the dataset's discounted return, never far above",
    "actor_loss": "imitation - q_weight * Q over its mean magnitude; near -q_weight or q_weight, "
    "online without imitation near -1 or 1: the sign of Q",
    "constraint": "D on the batch, old rows and new; 1 to 4 epsilon, in a row up to 50 times it",
    "multiplier": "price of D; near multiplier_max the bound is not met; annealed: falls to 0",
    "distance_to_reference": "the root of D on new states; 0.01 where D is 1e-4",
    "imitation": "mean squared distance of the policy's actions from the batch's; falls, then flat",
    "offline_q": "online: mean Q of dataset rows; may drift where they are no longer replayed",
    "online_q": "online: mean Q of new transitions, in the agent's own states",
    "distance_to_offline": "online: root mean square distance, per action dimension, of the policy "
    "from the one at the switch, on new states; a jump is a warning",
}

# --------------------------------------------------------------------- Networks and distributions


def orthogonal(key, shape, dtype=jnp.float32):
    """Orthogonal initialisation with gain sqrt(2). Under vmap one matrix after the other: XLA's
    batched QR can wait for itself for ever where there are few cores."""
    draw = partial(nn.initializers.orthogonal(2**0.5), shape=shape, dtype=dtype)
    return jax.custom_batching.sequential_vmap(draw)(key)


class MLP(nn.Module):
    """Hidden layers, on demand with LayerNorm and dropout: (..., F) -> (..., H)."""

    hidden_dims: tuple[int, ...]
    dropout_rate: float = 0.0
    layer_norm: bool = False
    activation: Callable = nn.relu

    @nn.compact
    def __call__(self, x, training=False):
        for width in self.hidden_dims:
            x = nn.Dense(width, kernel_init=orthogonal)(x)  # (..., width)
            x = self.activation(nn.LayerNorm()(x) if self.layer_norm else x)
            if self.dropout_rate > 0:
                x = nn.Dropout(self.dropout_rate, deterministic=not training)(x)
        return x


class ScalarHead(nn.Module):
    """A linear layer with one output: (..., F) -> (...).

    Written as multiply-and-sum: on a CPU the gradient of a matmul with one column is slow.
    """

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", orthogonal, (x.shape[-1], 1))
        bias = self.param("bias", nn.initializers.zeros, ())
        return (x * kernel[:, 0]).sum(axis=-1) + bias  # (...)


class Critic(nn.Module):
    """One Q-function: (B, O), (B, A) -> (B,)."""

    hidden_dims: tuple[int, ...]
    layer_norm: bool = False

    @nn.compact
    def __call__(self, observations, actions):
        inputs = jnp.concatenate([observations, actions], axis=-1)  # (B, O + A)
        return ScalarHead()(MLP(self.hidden_dims, layer_norm=self.layer_norm)(inputs))  # (B,)


class CriticEnsemble(nn.Module):
    """`num_critics` Q-functions with their own parameters: (B, O), (B, A) -> (N, B)."""

    hidden_dims: tuple[int, ...]
    num_critics: int
    layer_norm: bool = False

    @nn.compact
    def __call__(self, observations, actions):
        ensemble = nn.vmap(
            Critic,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            axis_size=self.num_critics,
        )
        return ensemble(self.hidden_dims, self.layer_norm)(observations, actions)  # (N, B)


class DeterministicPolicy(nn.Module):
    """pi: (B, O) -> actions (B, A) inside [-1, 1]."""

    hidden_dims: tuple[int, ...]
    action_dim: int

    @nn.compact
    def __call__(self, observations):
        features = MLP(self.hidden_dims)(observations)  # (B, H)
        return nn.tanh(nn.Dense(self.action_dim, kernel_init=orthogonal)(features))  # (B, A)


# ------------------------------------------------------------------------------------ Agent state


@flax.struct.dataclass
class AgentState:
    """All that training changes in one agent. Outside the losses every array has a leading axis
    of seeds, (S, ...)."""

    actor: TrainState
    critic: TrainState
    target_actor_params: Any
    target_critic_params: Any
    offline_actor_params: Any  # of the policy at the switch
    key: jax.Array
    multiplier: TrainState  # eta, whose softplus is the multiplier
    reference_params: Any  # of the periodic or best reference policy
    best_return: jax.Array  # of the best reference policy, before the first one very low
    exploration_noise: float = flax.struct.field(pytree_node=False)  # constant, see Config


def create_agent_state(key, observation_dim, action_dim, config):
    """A fresh agent for one seed, from its random key (2,)."""
    key, actor_key, critic_key = jax.random.split(key, 3)
    observations = jnp.zeros((1, observation_dim))  # (1, O)
    actions = jnp.zeros((1, action_dim))  # (1, A)
    actor = DeterministicPolicy(config.hidden_dims, action_dim)
    critic = CriticEnsemble(config.hidden_dims, config.num_critics)
    actor_params = actor.init(actor_key, observations)
    critic_params = critic.init(critic_key, observations, actions)
    adam, policy_adam = optax.adam(config.learning_rate), optax.adam(config.policy_learning_rate)
    dual_adam = optax.adam(config.dual_learning_rate)
    eta = jnp.float32(config.multiplier + math.log(-math.expm1(-config.multiplier)))
    return AgentState(
        actor=TrainState.create(apply_fn=actor.apply, params=actor_params, tx=policy_adam),
        critic=TrainState.create(apply_fn=critic.apply, params=critic_params, tx=adam),
        target_actor_params=jax.tree.map(jnp.copy, actor_params),
        target_critic_params=jax.tree.map(jnp.copy, critic_params),
        offline_actor_params=jax.tree.map(jnp.copy, actor_params),
        key=key,
        multiplier=TrainState.create(apply_fn=jax.nn.softplus, params={"eta": eta}, tx=dual_adam),
        reference_params=jax.tree.map(jnp.copy, actor_params),
        best_return=jnp.finfo(jnp.float32).min,
        exploration_noise=config.exploration_noise,
    )


# ----------------------------------------------------------------------------------------- Losses
# Each takes first the parameters it differentiates, and returns (loss, metrics).


def critic_loss(params, state, batch, key, config):
    """Q regresses on r + discount * min Q of the target policy's noisy action; summed over i."""
    noise = config.target_noise * jax.random.normal(key, batch.actions.shape)  # (B, A)
    noise = jnp.clip(noise, -config.noise_clip, config.noise_clip)  # (B, A)
    next_actions = state.actor.apply_fn(state.target_actor_params, batch.next_observations)
    next_actions = jnp.clip(next_actions + noise, -1.0, 1.0)  # (B, A)
    next_q = state.critic.apply_fn(
        state.target_critic_params, batch.next_observations, next_actions
    )  # (N, B)
    target_q = batch.rewards + config.discount * batch.masks * next_q.min(axis=0)  # (B,)
    q = state.critic.apply_fn(params, batch.observations, batch.actions)  # (N, B)
    loss = ((q - target_q[None]) ** 2).mean(axis=1).sum()
    return loss, {"critic_loss": loss, "q": q.mean()}


def mean_magnitude(q):
    """mean|Q|, a constant for the gradient."""
    return jnp.maximum(jax.lax.stop_gradient(jnp.abs(q).mean()), 1e-6)


def actor_loss(params, state, batch, key, config):
    """TD3+BC: the policy ascends Q_1, scaled to q_weight, and imitates the actions in the batch.

    The imitation is a mean over rows and action dimensions.
    """
    actions = state.actor.apply_fn(params, batch.observations)  # (B, A)
    q = state.critic.apply_fn(state.critic.params, batch.observations, actions)[0]  # (B,)
    scale = config.q_weight / mean_magnitude(q)  # lambda in the paper
    imitation = ((actions - batch.actions) ** 2).mean()
    loss = -scale * q.mean() + imitation
    return loss, {"actor_loss": loss, "imitation": imitation}


def td3_loss(params, state, batch, key, config):
    """TD3: the policy ascends Q_1 alone."""
    actions = state.actor.apply_fn(params, batch.observations)  # (B, A)
    q = state.critic.apply_fn(state.critic.params, batch.observations, actions)[0]  # (B,)
    scale = 1.0 / mean_magnitude(q) if config.normalize_q else 1.0
    loss = -scale * q.mean()
    return loss, {"actor_loss": loss}


def constrained_loss(params, state, batch, key, config):
    """TD3-C: the policy ascends Q_1 and pays for its distance from the reference policy."""
    reference = getattr(state, REFERENCES[config.reference])
    actions = state.actor.apply_fn(params, batch.observations)  # (B, A)
    wanted = state.actor.apply_fn(reference, batch.observations)  # (B, A)
    distance = ((actions - wanted) ** 2).mean()  # D
    price = state.multiplier.apply_fn(state.multiplier.params["eta"])
    if config.dual == "annealed":
        falling = optax.linear_schedule(config.multiplier, 0.0, config.anneal_updates)
        price = falling(state.multiplier.step)
    loss = td3_loss(params, state, batch, key, config)[0] + price * distance
    return loss, {"actor_loss": loss, "constraint": distance, "multiplier": price}


def dual_loss(params, state, distance, config):
    """The multiplier rises while D is above its bound, and falls below it."""
    end = config.epsilon if config.epsilon_end is None else config.epsilon_end
    bound = optax.linear_schedule(config.epsilon, end, config.epsilon_updates)
    epsilon = bound(state.multiplier.step)
    return state.multiplier.apply_fn(params["eta"]) * (epsilon - distance), {}


# ----------------------------------------------------------------------------------------- Update


def gradient_step(train_state, loss_fn, *args):
    """One optimiser step on `loss_fn(params, *args) -> (loss, metrics)`."""
    grads, info = jax.grad(loss_fn, has_aux=True)(train_state.params, *args)
    return train_state.apply_gradients(grads=grads), info


def policy_step(state, batch, config, loss_fn):
    """One step of the policy on `loss_fn`."""
    actor, info = gradient_step(state.actor, loss_fn, state, batch, None, config)
    return state.replace(actor=actor), info


def td3_update(state, batch, config, improve):
    """One update in the order of the authors' code: Q; every policy_delay-th time pi (with the new
    Q) by improve(state, batch, config), then both targets."""
    key, critic_key = jax.random.split(state.key)
    critic, critic_info = gradient_step(state.critic, critic_loss, state, batch, critic_key, config)
    state = state.replace(critic=critic, key=key)

    def delayed(state):
        state, info = improve(state, batch, config)
        online = state.actor.params, state.critic.params
        targets = state.target_actor_params, state.target_critic_params
        actor, critic = optax.incremental_update(online, targets, config.tau)
        # what is logged is the mean over all updates of an interval: so it is the mean over these
        info = jax.tree.map(lambda x: config.policy_delay * x, info)
        return state.replace(target_actor_params=actor, target_critic_params=critic), info

    def waiting(state):
        _, info = jax.eval_shape(delayed, state)
        return state, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), info)

    due = critic.step % config.policy_delay == 0
    state, policy_info = jax.lax.cond(due, delayed, waiting, state)
    return state, critic_info | policy_info


def constrained_step(state, batch, config):
    """One step of the policy, and of the multiplier at the same D; first, a periodic reference."""
    if config.reference == "periodic":
        take = partial(jnp.where, state.multiplier.step % config.reference_period == 0)
        reference = jax.tree.map(take, state.actor.params, state.reference_params)
        state = state.replace(reference_params=reference)
    new, info = policy_step(state, batch, config, constrained_loss)
    multiplier, _ = gradient_step(state.multiplier, dual_loss, state, info["constraint"], config)
    bounded = {"eta": jnp.clip(multiplier.params["eta"], -3.0, config.multiplier_max)}
    return new.replace(multiplier=multiplier.replace(params=bounded)), info


def update_step(state, batch, config):
    """TD3's update, the policy by TD3+BC's loss."""
    return td3_update(state, batch, config, partial(policy_step, loss_fn=actor_loss))


def begin_finetuning(state, config):
    """At the switch: the target policy and the one to compare with are the policy; the optimisers
    begin anew, unless they are carried over."""
    params = state.actor.params
    if config.online_optimizer == "reset":
        actor, critic = (each.replace(opt_state=each.tx.init(each.params))
                         for each in (state.actor, state.critic))
        state = state.replace(actor=actor, critic=critic)
    return state.replace(target_actor_params=jax.tree.map(jnp.copy, params),
                         offline_actor_params=jax.tree.map(jnp.copy, params))


def online_update(state, batch, config):
    """TD3's update, the policy by the loss that is chosen for the online phase."""
    plain = partial(policy_step, loss_fn=td3_loss)
    improve = plain if math.isinf(config.epsilon) else constrained_step  # static: TD3 to the bit
    return td3_update(state, batch, config, improve)


def blank_transition(observation_dim, action_dim):
    """What the replay buffer holds of one step, all zeros."""
    observation, action = np.zeros(observation_dim, np.float32), np.zeros(action_dim, np.float32)
    return Batch(observation, action, np.float32(0), observation, np.float32(0))


def online_batch(dataset, buffer, key, config):
    """What an online update learns from: see --replay."""
    if config.replay == "append":
        return sample_union(dataset, buffer, key, config.batch_size)
    num_offline = config.batch_size // 2 if config.replay == "half" else 0
    offline_key, online_key = jax.random.split(key)
    offline = sample(dataset, dataset.rewards.shape[0], offline_key, num_offline)
    online = sample(buffer.rows, buffer.size, online_key, config.batch_size - num_offline)
    return jax.tree.map(lambda *xs: jnp.concatenate(xs), offline, online)  # (B, ...)


def sample_action(state, observation, key):
    """The training policy's action (A,) in one observation (O,): the policy's, with noise."""
    action = state.actor.apply_fn(state.actor.params, observation[None])[0]  # (A,)
    noise = state.exploration_noise * jax.random.normal(key, action.shape)  # (A,)
    return jnp.clip(action + noise, -1.0, 1.0)


def mode_actions(state, observations):
    """The deterministic policy's actions (B, A) in observations (B, O), for evaluation."""
    return state.actor.apply_fn(state.actor.params, observations)


# ==================================== The same bytes in every script from here to main ============
# ------------------------------------------------------------------------------------------- Data


@flax.struct.dataclass
class Batch:
    """Transitions as the agent sees them. `masks` is 0 only on a true termination, where no
    future reward exists; at a time limit it is 1."""

    observations: jax.Array  # (B, O)
    actions: jax.Array  # (B, A)
    rewards: jax.Array  # (B,)
    next_observations: jax.Array  # (B, O)
    masks: jax.Array  # (B,)
    mc_returns: Any = ()  # (B,), discounted returns from here on, where a script needs them


def fail(message, code=2):
    """End the program with one line on stderr. Codes: 2 input refused, 3 not finite, 4 disk."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(code)


KNOWN_DATASETS = """D4RL/antmaze/*-v1: umaze umaze-diverse medium-play medium-diverse large-play
D4RL/antmaze/*-v1: large-diverse
D4RL/door/*-v2: human cloned expert
D4RL/hammer/*-v2: human cloned expert
D4RL/kitchen/*-v2: complete partial mixed
D4RL/pen/*-v2: human cloned expert
D4RL/pointmaze/*-v2: umaze open medium large
D4RL/relocate/*-v2: human cloned expert
mujoco/*/expert-v0: ant halfcheetah hopper humanoid swimmer walker2d
mujoco/*/medium-v0: ant halfcheetah hopper humanoid swimmer walker2d
mujoco/*/simple-v0: ant halfcheetah hopper humanoid swimmer walker2d"""


def find_dataset(name):
    """Path of a dataset: a flat file, or the data folder of a Minari dataset, local or fetched.

    Without a name: the one in this repository, or Minari's where the script stands alone.
    """
    embedded = Path(__file__).resolve().parent.parent / "datasets"
    default = "hopper/sac-medium-replay-v0"
    if name is None:
        name = default if (embedded / default).is_dir() else "mujoco/hopper/medium-v0"
    path = Path(name)
    if path.suffix in (".npz", ".hdf5", ".h5"):
        return path if path.is_file() else fail(f"--dataset {name}: no such file")
    local = Path(os.environ.get("MINARI_DATASETS_PATH", Path.home() / ".minari" / "datasets"))
    for folder in (path, embedded / name, local / name):
        if (folder / "metadata.json").is_file():
            return folder
        if (folder / "data" / "metadata.json").is_file():
            return folder / "data"
    groups = (group.partition(": ") for group in KNOWN_DATASETS.splitlines())
    known = [form.replace("*", word) for form, _, words in groups for word in words.split()]
    if name not in known:
        here = [str(p.parent.parent.relative_to(root)) for root in (embedded, local)
                for p in root.glob("**/data/metadata.json")]
        near = difflib.get_close_matches(name, sorted({*here, *known}), n=3, cutoff=0.0)
        fail(f"--dataset {name}: unknown; nearest: {', '.join(near)}. For any other Minari dataset "
             f"first `minari download {name}`")
    print(f"{name}: downloading from Minari", flush=True)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries are its own affair
    try:
        minari.download_dataset(name, force_download=True)
    except Exception as error:  # network, registry or disk: whatever it is, the data is not here
        fail(f"{name} cannot be fetched ({type(error).__name__}); `minari download {name}` where "
             f"there is a network, copy it to {local}; or --dataset FILE --env-id ID")
    return local / name / "data"


def environment_spec(path, env_id):
    """Specification (JSON) of the environment that goes with the dataset at `path`.

    Of a Minari dataset its evaluation environment, where it has one: that is what is trained in.
    """
    try:
        if env_id is not None:
            if env_id not in gym.registry and importlib.util.find_spec("gymnasium_robotics"):
                import gymnasium_robotics

                gym.register_envs(gymnasium_robotics)
            return gym.make(env_id).spec.to_json()
        if path.is_file():
            fail(f"--dataset {path}: a flat file does not name its environment, add --env-id ID")
        return open_minari(path).recover_environment(eval_env=True).spec.to_json()
    except (gym.error.Error, ImportError, ValueError, OSError) as error:
        hint = "; pip install gymnasium-robotics" if "robotics" in str(error) else ""
        return fail(f"no environment: {' '.join(str(error).split())}{hint}")


def open_minari(path):
    """The Minari dataset in a folder; a damaged one is refused."""
    try:
        return minari.MinariDataset(path)
    except Exception as error:  # Minari checks nothing: a damaged file fails in many ways
        return fail_damaged(path, error)


def fail_damaged(path, error):
    """Refuse a file that cannot be read."""
    fault = " ".join(f"{type(error).__name__}: {error}".split())
    fail(f"{path}: unreadable ({fault}): damaged or cut off? Fetch it again, from Minari by "
         "minari.download_dataset(id, force_download=True)")


def make_env(spec, **keywords):
    """The environment of a specification (JSON); dict observations flattened in sorted order."""
    env = gym.make(gym.envs.registration.EnvSpec.from_json(spec), **keywords)
    if isinstance(env.observation_space, gym.spaces.Dict):
        space = gym.spaces.Dict(dict(sorted(env.observation_space.items())))
        env = gym.wrappers.TransformObservation(env, lambda x: x, space)
        env = gym.wrappers.FlattenObservation(env)
    return env


def check_spaces(observation_space, action_space, name):
    """Refuse what these scripts cannot learn from: images, discrete or unbounded actions."""

    def vector(space):
        if isinstance(space, gym.spaces.Dict):
            return all(map(vector, space.values()))
        box = isinstance(space, gym.spaces.Box) and len(space.shape) == 1
        return box and space.dtype != np.uint8

    if not vector(observation_space):
        fail(f"{name}: observations are {observation_space}; only vectors are supported, no images")
    bounded = isinstance(action_space, gym.spaces.Box) and action_space.is_bounded()
    if not bounded or not vector(action_space):
        fail(f"{name}: actions are {action_space}; only bounded vectors are supported")


def flatten_observations(observations):
    """Nested dicts of (T, ...) arrays -> (T, O), in sorted order, as gymnasium flattens them."""
    if not isinstance(observations, dict):
        return np.asarray(observations, np.float32)
    parts = [flatten_observations(observations[key]) for key in sorted(observations)]
    return np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)


def read_minari(path):
    """A Minari dataset as flat arrays, see read_dataset."""
    dataset = open_minari(path)
    check_spaces(dataset.observation_space, dataset.action_space, path)
    parts = []
    for episode in dataset.iterate_episodes():
        observations = flatten_observations(episode.observations)  # (T + 1, O)
        fields = {
            "observations": observations[:-1], "next_observations": observations[1:],
            "actions": np.asarray(episode.actions, np.float32),
            "rewards": np.asarray(episode.rewards, np.float64),
            "terminals": np.asarray(episode.terminations, bool),
        }
        steps = len(fields["rewards"])
        for name, rows in fields.items():
            if len(rows) != steps:
                fail(f"{path}: episode {episode.id}: {steps} rewards, but {name} for {len(rows)}")
        last = np.arange(steps) == steps - 1
        parts.append(fields | {"ends": fields["terminals"] | last, "keep": np.ones(steps, bool)})
    if not parts:
        fail(f"{path}: no episodes")
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def read_flat_file(path):
    """A .npz or .hdf5 file with D4RL's keys as flat arrays, see read_dataset."""
    with np.load(path) if path.suffix == ".npz" else h5py.File(path, "r") as file:
        names = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts",
                 "seg_end_index", "seg_end_next_observations")
        fields = {name: file[name][()] for name in names if name in file}
    check_fields(fields, path)
    observations = np.asarray(fields["observations"], np.float32)
    terminals = np.asarray(fields["terminals"], bool).reshape(-1)
    ends = terminals | np.asarray(fields.get("timeouts", terminals), bool).reshape(-1)
    ends[fields.get("seg_end_index", [])] = True
    ends[-1:] = True
    if "next_observations" in fields:
        next_observations = np.asarray(fields["next_observations"], np.float32)
        jump = np.abs(observations[1:] - next_observations[:-1]).max(axis=1) > 1e-6
        ends[:-1] |= jump
        known = np.ones(len(ends), bool)
    else:  # the next row, except at an end: there the file may give it, else it is unknown
        next_observations = np.concatenate([observations[1:], observations[-1:]])
        known = terminals | ~ends  # after a termination it is never looked at
        if "seg_end_next_observations" in fields:
            next_observations[fields["seg_end_index"]] = fields["seg_end_next_observations"]
            known[fields["seg_end_index"]] = True
    return {
        "observations": observations, "actions": np.asarray(fields["actions"], np.float32),
        "rewards": np.asarray(fields["rewards"], np.float64).reshape(-1),
        "next_observations": next_observations, "terminals": terminals, "ends": ends, "keep": known,
    }


def check_fields(fields, path):
    """Refuse a flat file whose fields are missing or do not fit each other."""
    needed = {"observations", "actions", "rewards", "terminals"}
    if not needed <= set(fields):
        fail(f"{path}: no {', '.join(sorted(needed - set(fields)))}; D4RL's keys are needed")
    if not {"timeouts", "next_observations", "seg_end_index"} & set(fields):
        fail(f"{path}: neither timeouts nor next_observations: where do the episodes end?")
    num_rows = fields["rewards"].size
    shapes = {"rewards": (num_rows,), "terminals": (num_rows,), "timeouts": (num_rows,),
              "actions": (num_rows, *fields["actions"].shape[1:]),
              "observations": (num_rows, *fields["observations"].shape[1:]),
              "next_observations": fields["observations"].shape}
    for name, shape in shapes.items():
        found = fields[name].shape if name in fields else shape
        if found not in (shape, (*shape, 1)):
            fail(f"{path}: {name} have shape {found}, but {shape} is needed")
        if name in ("terminals", "timeouts") and np.isnan(fields.get(name, 0.0)).any():
            bad = np.isnan(fields[name])
            fail(f"{path}: {name}: {bad.sum()} rows are not finite, the first is {bad.argmax()}")
    if not np.isin(fields.get("seg_end_index", []), np.arange(num_rows)).all():
        fail(f"{path}: seg_end_index has values that are no rows")


def read_dataset(path):
    """Flat arrays of N rows: observations (N, O), actions (N, A), rewards, next_observations,
    terminals (true terminations), ends (last row of a trajectory, for whatever reason), keep
    (False where the next observation is unknown: such a row counts in returns, not in training).
    """
    try:
        return read_flat_file(path) if path.is_file() else read_minari(path)
    except Exception as error:  # a damaged file fails in many ways
        return fail_damaged(path, error)


def check_dataset(arrays, env, path):
    """Refuse bad rows and a dataset that does not fit its environment, naming field and row."""
    if not arrays["keep"].any():
        fail(f"{path}: empty, or no row's next observation is known")
    for name in ("observations", "actions", "rewards", "next_observations"):
        bad = ~np.isfinite(arrays[name]).reshape(len(arrays[name]), -1).all(axis=1)
        if bad.any():
            fail(f"{path}: {name}: {bad.sum()} rows are not finite, the first is {bad.argmax()}")
    check_spaces(env.observation_space, env.action_space, env.spec.id)
    for name, space in (("observations", env.observation_space), ("actions", env.action_space)):
        if arrays[name].shape[1:] != space.shape:
            shape = arrays[name].shape[1:]
            fail(f"{path}: {name} have shape {shape}, but {env.spec.id}'s {space.shape}")
    low, high = env.action_space.low - 1e-3, env.action_space.high + 1e-3
    outside = ((arrays["actions"] < low) | (arrays["actions"] > high)).any(axis=1)
    if outside.any():
        fail(f"{path}: {outside.sum()} actions outside {env.spec.id}'s box, the first in row "
             f"{outside.argmax()}")


def discounted_returns(rewards, ends, discount):
    """Monte-Carlo return of every row: the discounted sum of rewards to its trajectory's end."""
    returns = np.zeros(len(rewards))
    following = 0.0
    for i in reversed(range(len(rewards))):
        following = rewards[i] + discount * following * (not ends[i])
        returns[i] = following
    return returns


ACTION_LIMIT = 1 - 1e-5  # of actions in batches: at 1 a squashed policy's density is not finite


@dataclasses.dataclass(frozen=True)
class Transform:
    """Between the data's and environment's units and the agent's. One object serves dataset,
    online data and evaluation, and is part of the checkpoint."""

    observation_mean: np.ndarray  # (O,)
    observation_std: np.ndarray  # (O,)
    action_center: np.ndarray  # (A,)
    action_scale: np.ndarray  # (A,)
    reward_scale: np.ndarray  # ()
    reward_shift: np.ndarray  # ()

    def observations(self, x):
        return ((x - self.observation_mean) / self.observation_std).astype(np.float32)

    def rewards(self, x):
        return (np.asarray(x) * self.reward_scale + self.reward_shift).astype(np.float32)

    def actions(self, x):
        """Data -> agent."""
        scaled = (x - self.action_center) / self.action_scale
        return np.clip(scaled, -ACTION_LIMIT, ACTION_LIMIT).astype(np.float32)

    def environment_actions(self, x):
        """Agent -> environment."""
        return (x * self.action_scale + self.action_center).astype(np.float32)


def fit_transform(arrays, action_space, config):
    """The dataset's Transform. Actions pass unchanged where the data lie in [-1, 1] and the box
    contains it; otherwise both are rescaled by the environment's box."""
    observations, actions = arrays["observations"], arrays["actions"]
    mean, std = np.zeros(observations.shape[1]), np.ones(observations.shape[1])
    if config.normalize_observations:
        mean = observations.mean(axis=0, dtype=np.float64)
        std = observations.std(axis=0, dtype=np.float64) + 1e-3
    low, high = action_space.low, action_space.high
    center, scale = (low + high) / 2, (high - low) / 2
    if np.abs(actions).max() <= 1 + 1e-3 and (low <= -1).all() and (high >= 1).all():
        center, scale = np.zeros_like(center), np.ones_like(scale)
    reward_scale = config.reward_scale
    if config.normalize_returns:
        span = np.ptp(episode_returns(arrays))
        if span < 1e-6:
            fail("--normalize-returns: all trajectories have the same return; turn it off by "
                 "--no-normalize-returns")
        reward_scale *= 1000.0 / span
    rewards = np.array(reward_scale), np.array(config.reward_shift)
    return Transform(mean, std, center, scale, *rewards)


def episode_returns(arrays):
    """Undiscounted return of every trajectory in the dataset, in the environment's units."""
    first = np.concatenate([[0], np.flatnonzero(arrays["ends"])[:-1] + 1])
    return np.add.reduceat(arrays["rewards"], first)


def agent_batch(arrays, transform):
    """The dataset's kept rows as the agent sees them: a Batch of NumPy arrays."""
    keep = arrays["keep"]
    return Batch(
        observations=transform.observations(arrays["observations"][keep]),
        actions=transform.actions(arrays["actions"][keep]),
        rewards=transform.rewards(arrays["rewards"][keep]),
        next_observations=transform.observations(arrays["next_observations"][keep]),
        masks=1.0 - arrays["terminals"][keep].astype(np.float32),
    )


# ---------------------------------------------------------------------------------- Replay buffer


@flax.struct.dataclass
class ReplayBuffer:
    """A ring of transitions on the device: `rows` (C, ...), of which `size` are filled."""

    rows: Batch
    size: jax.Array
    position: jax.Array  # where the next transition goes


def empty_buffers(num_seeds, capacity, blank):
    """A buffer per seed, on the host: rows (S, C, ...), each like the transition `blank`."""
    rows = jax.tree.map(lambda x: np.full((num_seeds, capacity, *x.shape), x, x.dtype), blank)
    counts = np.zeros(num_seeds, np.int32)
    return ReplayBuffer(rows, counts, counts)


def insert(buffer, transition):
    """The buffer with one transition more, the oldest overwritten when it is full."""
    capacity = buffer.rows.rewards.shape[0]
    rows = jax.tree.map(lambda x, new: x.at[buffer.position].set(new), buffer.rows, transition)
    size = jnp.minimum(buffer.size + 1, capacity)
    return ReplayBuffer(rows, size, (buffer.position + 1) % capacity)


def sample(rows, size, key, batch_size):
    """`batch_size` transitions, uniform with replacement over the first `size` rows."""
    indices = jax.random.randint(key, (batch_size,), 0, size)  # (B,)
    return jax.tree.map(lambda x: x[indices], rows)


def sample_union(dataset, buffer, key, batch_size):
    """`batch_size` transitions, uniform over the dataset and the buffer together."""
    num_offline = dataset.rewards.shape[0]
    indices = jax.random.randint(key, (batch_size,), 0, num_offline + buffer.size)  # (B,)
    online = indices >= num_offline  # (B,)

    def pick(offline_rows, online_rows):
        chosen = online.reshape(-1, *[1] * (offline_rows.ndim - 1))  # (B, 1) or (B,)
        return jnp.where(chosen, online_rows[indices - num_offline], offline_rows[indices])

    return jax.tree.map(pick, dataset, buffer.rows)


# ---------------------------------------------------------------------------------- Training steps


def for_each_seed(function, *arguments):
    """`function` over the leading axis, the seeds of one device: side by side on an accelerator,
    one after the other on a CPU, where batching the small matmuls halves their speed."""
    if jax.default_backend() == "cpu":
        return jax.lax.map(lambda xs: function(*xs), arguments)
    return jax.vmap(function)(*arguments)


@partial(jax.jit, static_argnames=("config", "num_steps"), donate_argnames="state")
def update_steps(state, dataset, config, num_steps):
    """`num_steps` updates of every seed on uniform batches of the dataset, compiled as one scan.

    `state` is donated: use the returned one. Metrics are means over the steps, (S,).
    """

    def one_seed(state):
        def body(state, _):
            key, sample_key = jax.random.split(state.key)
            batch = sample(dataset, dataset.rewards.shape[0], sample_key, config.batch_size)
            return update_step(state.replace(key=key), batch, config)

        state, info = jax.lax.scan(body, state, length=num_steps)
        return state, jax.tree.map(jnp.mean, info)

    return for_each_seed(one_seed, state)


@partial(jax.jit, donate_argnames="buffer")
def insert_transitions(buffer, transitions):
    """Insert one transition (S, ...) per seed, in place: `buffer` is donated.

    A call of its own, because XLA copies the whole buffer where one program writes and reads it.
    """
    return jax.vmap(insert)(buffer, transitions)


@partial(jax.jit, static_argnames=("config", "learn"), donate_argnames="state")
def online_step(state, buffer, observations, dataset, config, learn):
    """Update every agent `utd_ratio` times (without `learn`: not at all), then choose the actions
    (S, A) in `observations` (S, O). `state` is donated: use the returned one."""
    info = {}
    if learn:
        keys = jax.vmap(partial(jax.random.split, num=config.utd_ratio + 1))(state.key)
        draw = jax.vmap(partial(online_batch, config=config), in_axes=(None, None, 0))
        batches = jax.vmap(draw, in_axes=(None, 0, 0))(dataset, buffer, keys[:, 1:])  # (S, U, ...)

        def one_seed(state, batches):
            state, info = jax.lax.scan(partial(online_update, config=config), state, batches)
            return state, jax.tree.map(jnp.mean, info)

        state, info = for_each_seed(one_seed, state.replace(key=keys[:, 0]), batches)
    actions, key = act(state, observations)
    return state.replace(key=key), actions, info


@jax.jit
def act(state, observations):
    """The training policy's actions (S, A) in observations (S, O), and the next keys (S, 2)."""
    keys = jax.vmap(partial(jax.random.split, num=2))(state.key)  # (S, 2, 2)
    return jax.vmap(sample_action)(state, observations, keys[:, 1]), keys[:, 0]


@jax.jit
def act_deterministically(state, observations):
    """The evaluated policy's actions (S, E, A) in observations (S, E, O)."""
    return jax.vmap(mode_actions)(state, observations)


# ------------------------------------------------------------------------------ Seeds and devices
# A shard is what one device holds of the seeds; shards[d] has a leading axis of S / D seeds. Each
# device is given its own calls: they run side by side because dispatch returns at once.


def available_cores():
    """How many cores this process may use; of how many, XLA's last digits depend."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def use_all_cores(num_seeds):
    """Before jax starts: one virtual CPU device per core, as far as they divide the seeds."""
    divisors = [d for d in range(1, available_cores() + 1) if num_seeds % d == 0]
    with contextlib.suppress(RuntimeError):  # jax has started, in a notebook say: as it is
        jax.config.update("jax_num_cpu_devices", max(divisors))


def seed_devices(num_seeds):
    """The devices that the seeds are spread over: as many as divide their number."""
    devices = jax.devices()
    return devices[: max(d for d in range(1, len(devices) + 1) if num_seeds % d == 0)]


def split(tree, devices):
    """(S, ...) arrays -> a list with every device's part of the seeds."""
    leaves, structure = jax.tree.flatten(tree)
    parts = zip(*[x.reshape(len(devices), -1, *x.shape[1:]) for x in leaves], strict=True)
    return [jax.tree.unflatten(structure, part) for part in parts]


def to_devices(tree, devices):
    """(S, ...) arrays -> one shard on each device."""
    parts = zip(split(tree, devices), devices, strict=True)
    return [jax.device_put(part, device) for part, device in parts]


def to_host(shards):
    """Shards -> NumPy arrays (S, ...)."""
    return jax.tree.map(lambda *xs: np.concatenate(xs), *jax.device_get(shards))


def on_every_device(function, *shards):
    """`function(*shards)` on every device; for each of its results, the list of shards."""
    results = [function(*arguments) for arguments in zip(*shards, strict=True)]
    return [list(result) for result in zip(*results, strict=True)]


# ------------------------------------------------------------------------------------ Environments


def episode_seed(stream, seed, episode):
    """Reset seed of one episode; every episode has its own, so that any can be played again.
    `stream` keeps training (0), evaluation (1) and film (2) apart."""
    return int(np.random.SeedSequence((stream, seed, episode)).generate_state(1)[0])


@dataclasses.dataclass
class Rollout:
    """The training environments, as many for every seed, between two steps."""

    envs: list
    observations: np.ndarray  # (S, O), in the environments' units; S counts environments here
    actions: np.ndarray  # (S, A), the agents' next ones
    episodes: np.ndarray  # (S,), episodes finished so far
    played: list  # per environment: the actions since the last reset
    finished: list  # (seed index, return, length) of the episodes finished since the last log


def start_rollout(run, saved=None, num_envs=1):
    """Reset the training environments, `num_envs` per seed; with the arrays of a checkpoint play
    the interrupted episodes again, which brings a deterministic simulator back to its state, bit
    for bit."""
    indices = range(run.config.num_seeds * num_envs)
    envs = [gym.wrappers.RecordEpisodeStatistics(make_env(run.spec)) for _ in indices]
    episodes = saved["rollout/episodes"] if saved else np.zeros(len(envs), int)
    played = [list(saved[f"rollout/played/{i}"]) if saved else [] for i in indices]
    observations = np.zeros((len(envs), *envs[0].observation_space.shape))  # (S, O)
    actions = saved and saved["rollout/actions"]
    rollout = Rollout(envs, observations, actions, episodes, played, [])
    for i, env in enumerate(envs):
        observations[i] = reset_environment(run, rollout, i)
        for action in played[i]:
            observations[i], *_ = env.step(run.transform.environment_actions(action))
    return rollout


def reset_environment(run, rollout, i):
    """Begin the next episode of training environment i; returns its first observation (O,)."""
    num_envs = len(rollout.envs) // run.config.num_seeds
    number = int(rollout.episodes[i]) * num_envs + i % num_envs
    seed = episode_seed(0, run.config.seed + i // num_envs, number)
    return rollout.envs[i].reset(seed=seed)[0]


def step_rollout(run):
    """Step every environment with the agents' next actions; ended ones are reset.

    Returns the transitions, a Batch (S, ...); a next observation is the one before a reset.
    """
    rollout, num_envs = run.rollout, len(run.rollout.envs) // run.config.num_seeds
    before, next_observations = rollout.observations.copy(), rollout.observations.copy()  # (S, O)
    rewards, terminated = np.zeros(len(before)), np.zeros(len(before), bool)  # (S,)
    actions = run.transform.environment_actions(rollout.actions)  # (S, A)
    for i, env in enumerate(rollout.envs):
        observation, rewards[i], terminated[i], truncated, info = env.step(actions[i])
        rollout.played[i].append(rollout.actions[i])
        next_observations[i] = rollout.observations[i] = observation
        if terminated[i] or truncated:
            rollout.finished.append((i // num_envs, info["episode"]["r"], info["episode"]["l"]))
            rollout.episodes[i] += 1
            rollout.played[i] = []
            rollout.observations[i] = reset_environment(run, rollout, i)
    return Batch(
        observations=run.transform.observations(before),
        actions=np.clip(rollout.actions, -ACTION_LIMIT, ACTION_LIMIT),
        rewards=run.transform.rewards(rewards),
        next_observations=run.transform.observations(next_observations),
        masks=1.0 - terminated.astype(np.float32),
    )


def evaluate(run):
    """Returns and lengths (S, E) of one episode in each of the S * E environments, played side by
    side by the deterministic policy. Always the same start states; training is not touched."""
    shape = run.config.num_seeds, run.config.eval_episodes
    observations = np.zeros((*shape, *run.eval_envs[0].observation_space.shape))  # (S, E, O)
    returns, lengths, playing = np.zeros(shape), np.zeros(shape, int), np.ones(shape, bool)
    envs = np.array(run.eval_envs, object).reshape(shape)
    for i, j in np.ndindex(*shape):
        observations[i, j], _ = envs[i, j].reset(seed=episode_seed(1, run.config.seed + i, j))
    while playing.any():
        inputs = split(run.transform.observations(observations), run.devices)
        actions = to_host(list(map(act_deterministically, run.shards, inputs)))  # (S, E, A)
        actions = run.transform.environment_actions(actions)
        for i, j in np.argwhere(playing):
            step = envs[i, j].step(actions[i, j])
            observations[i, j], reward, terminated, truncated, _ = step
            returns[i, j] += reward
            lengths[i, j] += 1
            playing[i, j] = not (terminated or truncated)
    return returns, lengths


REFERENCE_RETURNS = {  # random and expert return, from D4RL (Fu et al. 2020, its infos.py)
    "HalfCheetah-v4": (-280.178953, 12135.0),
    "Hopper-v4": (-20.272305, 3234.3),
    "Walker2d-v4": (1.629008, 4592.3),
    "Ant-v4": (-325.6, 3879.7),
    "AdroitHandDoor-v1": (-56.512833, 2880.5693087298737),
    "AdroitHandHammer-v1": (-274.856578, 12794.134825156867),
    "AdroitHandPen-v1": (96.262799, 3076.8331017826877),
    "AdroitHandRelocate-v1": (-6.425911, 4233.877797728884),
    "FrankaKitchen-v1": (0.0, 4.0),
}


def reference_returns(spec):
    """(random, expert) return of an environment, and where they are from; NaN where none is known.
    A sparse maze that ends at its goal has return 1 or 0: its score is the success rate."""
    spec = json.loads(spec)
    ends = not spec["kwargs"].get("continuing_task", True)
    if "Maze" in spec["id"] and ends and spec["kwargs"].get("reward_type") != "dense":
        return 0.0, 1.0, "success rate in percent"
    # D4RL's kitchen sets on Minari count every finished task again in each step: no such reference
    counted_again = not spec["kwargs"].get("remove_task_when_completed", True)
    if spec["id"] in REFERENCE_RETURNS and not counted_again:
        return *REFERENCE_RETURNS[spec["id"]], "D4RL's, 0 random, 100 expert"
    return np.nan, np.nan, "no reference known, returns are raw"


def evaluation_values(run):
    """The evaluation's columns, each (S,): means over episodes."""
    returns, lengths = evaluate(run)  # (S, E)
    random, expert, _ = reference_returns(run.spec)
    scores = 100.0 * (returns - random) / (expert - random)  # (S, E)
    return {"return": returns.mean(1), "length": lengths.mean(1), "score": scores.mean(1)}


# -------------------------------------------------------------------------------------- Checkpoint


def named_arrays(tree, prefix):
    """{prefix/path/of/leaf: NumPy array} of a tree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    name = partial(jax.tree_util.keystr, simple=True, separator="/")
    return {f"{prefix}/{name(path)}": np.asarray(leaf) for path, leaf in leaves}


def restore(template, arrays, prefix, path):
    """A tree like `template` from the named arrays of the checkpoint read from `path`."""
    leaves, structure = jax.tree.flatten(template)
    for name, leaf in named_arrays(template, prefix).items():
        found = arrays[name].shape if name in arrays else "missing"
        if found != leaf.shape:
            fail(f"{path}: {name} is {found}, but this run needs {leaf.shape}")
    unused = {name for name in arrays if name.startswith(f"{prefix}/")}
    unused -= set(named_arrays(template, prefix))
    if unused:
        fail(f"{path}: {min(unused)} has no place in this run; another size of its networks?")
    return jax.tree.unflatten(structure, [arrays[name] for name in named_arrays(template, prefix)])


def save_checkpoint(path, arrays, meta):
    """Write arrays and meta (JSON) so that a kill at any moment leaves a whole checkpoint: to a
    temporary file, synced, then renamed; the one before is kept as *.previous.npz."""
    temporary, previous = path.with_suffix(".tmp"), path.with_suffix(".previous.npz")
    try:
        with open(temporary, "wb") as file:
            text = json.dumps(meta | {"arrays": sorted(arrays)}).encode()
            np.savez(file, meta=np.frombuffer(text, np.uint8), **arrays)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        fail(f"cannot write {path} ({error.strerror}); the checkpoint before it is whole", code=4)


def load_checkpoint(path):
    """(arrays, meta, path read) of a checkpoint or a run folder. Every byte is checked (the zip's
    CRC-32); for a damaged or missing file the one before is taken, with a warning."""
    path = Path(path) / "checkpoint.npz" if Path(path).is_dir() else Path(path)
    warnings = []
    for candidate in (path, path.with_suffix(".previous.npz")):
        try:
            with np.load(candidate, allow_pickle=False) as file:
                if file.zip.testzip():  # NumPy reads, and checks, only as far as a header says
                    raise ValueError("wrong checksum")
                arrays = {name: file[name] for name in file.files}
            meta = json.loads(arrays.pop("meta").tobytes())
            if meta["arrays"] != sorted(arrays):
                raise ValueError("arrays are missing")
        except Exception as error:  # a damaged file fails in many ways
            warnings.append(f"warning: {candidate}: {type(error).__name__}: {error}")
        else:
            for warning in warnings:
                print(warning, file=sys.stderr)
            return arrays, meta, candidate
    return fail(f"{path}: no readable checkpoint")


def load_own_checkpoint(path, others=()):
    """load_checkpoint, refusing one of a script that is neither this one nor among `others`."""
    arrays, meta, found = load_checkpoint(path)
    if meta.get("script") not in (Path(__file__).stem, *others):
        fail(f"{found}: a checkpoint of {meta.get('script')}.py, not of {Path(__file__).name}")
    return arrays, meta, found


def save_run(run):
    """One checkpoint of all that the run needs to go on, bit for bit on a CPU."""
    arrays = named_arrays(to_host(run.shards), "state")
    arrays |= named_arrays(dataclasses.asdict(run.transform), "transform")
    if run.buffers is not None:
        buffers = to_host(run.buffers)
        rows = jax.tree.map(lambda x: x[:, : buffers.size.max()], buffers.rows)
        arrays |= named_arrays(buffers.replace(rows=rows), "buffer")
    if run.rollout is not None:
        arrays["rollout/actions"] = run.rollout.actions
        arrays["rollout/episodes"] = run.rollout.episodes
        for i, played in enumerate(run.rollout.played):
            arrays[f"rollout/played/{i}"] = np.array(played, np.float32)
    meta = {"script": Path(__file__).stem, "config": dataclasses.asdict(run.config),
            "spec": run.spec, "pretrain": run.pretrain, "offline": run.offline,
            "online": run.online, "log_size": run.log_size}
    save_checkpoint(run.folder / "checkpoint.npz", arrays, meta)


def restore_agent(run, source):
    """Put agent and transform of a checkpoint into `run`; returns the checkpoint."""
    arrays, meta, found = load_own_checkpoint(source, INIT_FROM)
    state = restore(to_host(run.shards), arrays, "state", found)
    run.shards = to_devices(state, run.devices)
    names = [field.name for field in dataclasses.fields(Transform)]
    run.transform = Transform(**{name: arrays[f"transform/{name}"] for name in names})
    return arrays, meta, found


def resume_run(run):
    """Go on where the checkpoint in the run's folder left off; returns it."""
    arrays, meta, found = restore_agent(run, run.folder)
    for name in ("pretrain", "offline", "online", "log_size"):
        setattr(run, name, meta[name])
    os.replace(found, run.folder / "checkpoint.npz")  # were it the one before: the last is damaged
    return arrays, found


def take_over(run, source):
    """Put agent and transform of a checkpoint of INIT_FROM into `run`. What td3_c.py has beside
    them stays behind, or is fresh here."""
    arrays, meta, found = load_own_checkpoint(source, INIT_FROM)
    if meta["online"]:
        print(f"agent     has {meta['online']:,} online steps behind it: {found}")
    fresh = named_arrays(to_host(run.shards), "state")
    beside = tuple(f"state/{name}" for name in ("multiplier", "reference_params", "best_return"))
    mine = {name: x for name, x in arrays.items() if not name.startswith(beside)}
    mine |= {name: x for name, x in fresh.items() if name.startswith(beside)}
    run.shards = to_devices(restore(to_host(run.shards), mine, "state", found), run.devices)
    names = [field.name for field in dataclasses.fields(Transform)]
    run.transform = Transform(**{name: arrays[f"transform/{name}"] for name in names})


# ---------------------------------------------------------------------- Command line, run folder


def locate(config):
    """Dataset path, environment specification (JSON), and the preset that `auto` stands for."""
    path = find_dataset(config.dataset)
    spec = environment_spec(path, config.env_id)
    return path, spec, "default" if config.dataset is None else domain(json.loads(spec)["id"])


def domain(env_id):
    """Name of the preset for an environment."""
    words = ("AntMaze", "PointMaze", "Kitchen", "Adroit")
    return next((word.lower() for word in words if word in env_id), "mujoco")


def check_config(config):
    """Refuse numbers out of range before anything is built."""
    for name, (low, high) in RANGES.items():
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            fail(f"--{name.replace('_', '-')} {value}: must be in [{low}, {high}]")
    for name, values in dataclasses.asdict(config).items():
        if isinstance(values, tuple) and not all(1 <= width <= 10**5 for width in values):
            fail(f"--{name.replace('_', '-')} {values}: must be in [1, 100000]")
    if config.preset != "auto" and config.eval_interval % config.log_interval:
        fail(f"--eval-interval must be a multiple of --log-interval {config.log_interval}")


def check_resumed(config, recorded):
    """Refuse to go on with a run under settings that are not its own."""
    check_config(config)
    free = {"resume", "run_dir", "online_steps", "eval_episodes", "video", "wandb"}
    free |= {"save_dataset", "dataset_steps", "dataset_policy"}
    names = [field.name for field in dataclasses.fields(Config) if field.name not in free]
    changed = [name for name in names if getattr(config, name) != getattr(recorded, name)]
    if changed:
        fail(f"--resume {config.resume}: that run has another {', '.join(changed)}")


def config_from(text):
    """A Config from its JSON form."""
    try:
        values = json.loads(text)
    except ValueError as error:
        fail(f"not the configuration of another script or version, but damaged: {error}")
    unknown = set(values) ^ {field.name for field in dataclasses.fields(Config)}
    if unknown:
        fail(f"configuration of another script or version: {', '.join(sorted(unknown))}")
    return Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def parse_config(arguments):
    """Command line -> (Config, dataset path, environment specification).

    What counts, weakest first: defaults, preset, data, number and transform of the agents to start
    from, the record of the run to resume, flags. A resumed run may only change what is not of its
    past.
    """
    parse = partial(tyro.cli, Config, args=arguments, description=__doc__)
    config = parse()
    if config.eval_only:
        _, meta, _ = load_own_checkpoint(config.eval_only)
        default = config_from(json.dumps(meta.get("config", {})))
        config = parse(default=dataclasses.replace(default, eval_only=config.eval_only))
        check_config(config)
        return config, None, meta["spec"]
    recorded = Path(config.resume or "", "config.json")
    if config.resume and recorded.is_file():
        default = config_from(recorded.read_text())
        config = parse(default=default)
        if config.preset == "auto":
            config = dataclasses.replace(config, preset=default.preset)
        check_resumed(config, default)
        return config, *locate(config)[:2]
    check_config(dataclasses.replace(config, preset="auto"))  # the preset is still to come
    its, data = {}, {}
    if config.init_from:
        _, meta, found = load_own_checkpoint(config.init_from, INIT_FROM)
        names = ("num_seeds", "normalize_observations", "normalize_returns", "reward_scale",
                 "reward_shift")
        its = {name: meta["config"].get(name, False) for name in names if hasattr(config, name)}
        if getattr(config, "dataset", "") is None:  # without a flag it is what they learned from
            data = {"dataset": meta["config"].get("dataset"),
                    "env_id": config.env_id or meta["config"].get("env_id")}
            config = dataclasses.replace(config, **data)
    path, spec, auto = locate(config)
    preset = auto if config.preset == "auto" else config.preset
    if preset not in PRESETS:
        fail(f"--preset {preset}: must be auto or one of {', '.join(PRESETS)}")
    default = dataclasses.replace(Config(), **PRESETS[preset] | its | data)
    config = dataclasses.replace(parse(default=default), preset=preset)
    check_config(config)
    for name, needed in its.items():
        if getattr(config, name) != needed:
            flag = "--" + name.replace("_", "-")
            fail(f"--init-from {found}: was made with {flag} {needed}, not {getattr(config, name)}")
    return config, path, spec


def write_json(path, value):
    """Write JSON so that a kill leaves the old file or the new one. May raise OSError."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "w") as file:
            file.write(json.dumps(value, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def open_folder(config, dataset):
    """Make and lock the run's folder, with config.json and versions.json (an entry per start);
    refuse one that is in use. Returns (folder, lock): the lock holds until the process ends."""
    script = Path(__file__)
    name = f"seed{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    data = Path(config.dataset or "default").with_suffix("") if dataset else Path(config.env_id)
    data = data.name if data.is_absolute() or ".." in data.parts else data
    folder = Path(config.resume or config.run_dir or Path("runs", script.stem, data, name))
    if (folder / "config.json").exists() and not config.resume:
        fail(f"--run-dir {folder}: holds a run already; go on with it by --resume {folder}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "w")  # noqa: SIM115, it stays open
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        starts = folder / "versions.json"
        earlier = json.loads(starts.read_text()) if starts.exists() else []
        write_json(starts, [*earlier, versions(script, dataset, config.init_from)])
        write_json(folder / "config.json", dataclasses.asdict(config))
    except BlockingIOError:
        fail(f"{folder}: another process is at work in it")
    except ValueError as error:
        fail(f"{folder / 'versions.json'}: damaged: {error}")
    except OSError as error:
        fail(f"--run-dir {folder}: cannot be written ({error.strerror})")
    return folder, lock


def versions(script, dataset, init_from=None):
    """What makes a run: command, code, data, packages, machine."""

    def git(*words):
        command = ["git", "-C", str(script.resolve().parent), *words]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            return done.stdout.strip()
        except (OSError, subprocess.CalledProcessError):  # no git, or no repository
            return None

    def sha256(file):
        return hashlib.sha256(file.read_bytes()).hexdigest()

    data = dataset / "main_data.hdf5" if dataset and dataset.is_dir() else dataset
    agent = init_from and Path(init_from)
    agent = agent / "checkpoint.npz" if agent and agent.is_dir() else agent
    found = importlib.metadata.distributions()
    packages = {d.metadata["Name"].lower(): d.version for d in found if d.metadata["Name"]}
    settings = {k: v for k, v in os.environ.items() if k.startswith(("JAX_", "XLA_", "OMP_"))}
    return {
        "command": sys.argv, "script": script.name, "script_sha256": sha256(script),
        "git_commit": git("rev-parse", "HEAD"),
        "git_status": git("status", "--porcelain", "--", script.name),  # not empty: changed since
        "dataset": str(dataset), "dataset_sha256": sha256(data) if data else None,
        "python": platform.python_version(), "machine": platform.platform(),
        "cores": available_cores(), "device": jax.devices()[0].device_kind,
        "init_from_sha256": sha256(agent) if agent and agent.is_file() else None,
        "environment_variables": settings, "packages": packages,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


# ----------------------------------------------------------------------------- Metrics and signals


COLUMNS = ["phase", "step", "seed", *METRICS, "episode_return", "episode_length", "return",
           "length", "score", "updates_per_second", "seconds"]


def open_log(run):
    """metrics.csv, cut where the checkpoint was made, or new; progress bar; wandb."""
    path = run.folder / "metrics.csv"
    if not run.log_size:
        path.write_text(",".join(COLUMNS) + "\n")
    elif not path.is_file() or path.stat().st_size < run.log_size:
        fail(f"{path}: shorter than when the checkpoint was made")
    else:
        os.truncate(path, run.log_size)
    offline = 0 if run.config.init_from else getattr(run.config, "offline_steps", 0)
    total = offline + run.config.online_steps
    run.bar = tqdm(total=total, initial=run.offline + run.online, disable=None, smoothing=0.05)
    if run.config.wandb:
        try:
            import wandb

            name = hashlib.sha256(str(run.folder.resolve()).encode()).hexdigest()[:12]
            run.wandb = wandb.init(project="offline-to-online", dir=run.folder, id=name,
                                   resume="allow", config=dataclasses.asdict(run.config))
        except Exception as error:  # whatever it is, training goes on without
            print(f"warning: wandb is off: {type(error).__name__}: {error}", file=sys.stderr)


def check_finite(run, phase, values):
    """End the run where a metric or a parameter is not finite, before it is evaluated or saved."""
    arrays = values | named_arrays(to_host(run.shards), "state")
    bad = [name for name, array in arrays.items() if not np.isfinite(array).all()]
    bad = [name for name in bad if name in METRICS or "/" in name]
    if bad:
        write_record(run, f"not finite: {', '.join(bad[:3])}")
        fail(f"{phase} step {getattr(run, phase)}: not finite: {', '.join(bad[:3])}; the "
             f"checkpoint in {run.folder} is from before", code=3)


def write_log(run, phase, values):
    """One row of metrics.csv per seed; `values` are (S,) arrays by column."""
    step = getattr(run, phase)
    try:
        with open(run.folder / "metrics.csv", "a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            for i in range(run.config.num_seeds):
                row = {k: f"{v[i]:.6g}" for k, v in values.items() if np.isfinite(v[i])}
                writer.writerow({"phase": phase, "step": step, "seed": run.config.seed + i} | row)
    except OSError as error:
        fail(f"cannot write metrics.csv ({error.strerror})", code=4)
    run.log_size = (run.folder / "metrics.csv").stat().st_size
    means = {name: float(np.mean(value)) for name, value in values.items()}
    run.bar.set_description(phase, refresh=False)
    if "updates_per_second" in means:
        run.shown |= {"updates/s": f"{means['updates_per_second']:.0f}"}
    if "return" in means:
        score = f"  score {means['score']:6.1f}" if np.isfinite(means["score"]) else ""
        tqdm.write(f"{phase:7} {step:>9,}  return {means['return']:8.1f}{score}  "
                   f"episode length {means['length']:6.1f}")
        run.shown |= {"return": f"{means['return']:.0f}"}
    run.bar.set_postfix(run.shown, refresh=False)
    if run.wandb is not None:
        try:
            logged = {f"{phase}/{name}": mean for name, mean in means.items()}
            run.wandb.log(logged | {f"{phase}/step": step})
        except Exception as error:  # whatever it is, training goes on without
            print(f"warning: wandb is off: {type(error).__name__}: {error}", file=sys.stderr)
            run.wandb = None


def write_record(run, ended):
    """record.json: what was run, on what, how it ended, and every row with an evaluation."""
    with open(run.folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    evaluations = [row for row in rows if row["return"]]
    seconds = {phase: sum(float(row["seconds"] or 0) for row in rows if row["phase"] == phase)
               / run.config.num_seeds for phase in ("pretrain", "offline", "online")}
    starts = json.loads((run.folder / "versions.json").read_text())
    state = hashlib.sha256()
    for array in jax.tree.leaves(to_host(run.shards)):
        state.update(array.tobytes())
    dataset, (random, expert, source) = run.datasets[0], reference_returns(run.spec)

    def value(name, text):
        return text if name == "phase" else float(text) if text else None

    made = ("started", "git_commit", "script_sha256")
    record = {
        "ended": ended,  # "finished", a signal's name, or what was not finite
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "pretrain": run.pretrain, "offline": run.offline, "online": run.online,
        "resumes": len(starts) - 1,
        "seconds": seconds,  # of training, by phase
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "state_sha256": state.hexdigest(),  # of all that training changes in the agents
        "dataset_rows": None if dataset is None else dataset.rewards.shape[0],
        "reference": {"random": random, "expert": expert, "source": source}
        if np.isfinite(expert) else {"source": source},
        "config": dataclasses.asdict(run.config),
        "environment": json.loads(run.spec),
        "starts": [{name: start[name] for name in made} for start in starts],
        "versions": starts[-1],
        "curve": {name: [value(name, row[name]) for row in evaluations] for name in COLUMNS},
    }
    try:
        write_json(run.folder / "record.json", record)
    except OSError as error:
        fail(f"cannot write record.json ({error.strerror})", code=4)


def catch_signals():
    """SIGTERM, SIGUSR1 and Ctrl-C are noted, and answered after the current chunk: save, exit
    with 128 + the signal's number. A second one kills at once."""
    received, numbers = [], (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def handler(number, frame):
        received.append(number)
        for each in numbers:
            signal.signal(each, signal.SIG_DFL)

    for each in numbers:
        signal.signal(each, handler)
    return received


def summarize(run):
    """curve.png, and in words every seed's values at the ends of the phases, and the dip."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with open(run.folder / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["return"]]
    column = "score" if rows and rows[0]["score"] else "return"
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    begins = {"pretrain": 0, "offline": run.pretrain, "online": run.pretrain + run.offline}
    for begin in begins.values():
        axes.axvline(begin, color="black", ls=":", lw=1)
    for seed in dict.fromkeys(row["seed"] for row in rows):
        mine = [row for row in rows if row["seed"] == seed]
        steps = [int(row["step"]) + begins[row["phase"]] for row in mine]
        axes.plot(steps, [float(row[column]) for row in mine], label=f"seed {seed}")
        last = {row["phase"]: f"{row['phase']} {float(row[column]):.1f}" for row in mine}
        online = [float(row[column]) for row in mine if row["phase"] == "online"]
        lowest = f", lowest online {min(online):.1f}" if online else ""
        later = online[any(row["phase"] == "online" and row["step"] == "0" for row in mine) :]
        if later and column == "score":  # Cal-QL's: how much was missed while fine-tuning
            lowest += f", regret {np.mean([1 - score / 100 for score in later]):.2f}"
        print(f"seed {seed:4} {column}: {', then '.join(last.values())}{lowest}")
    axes.set(xlabel="updates offline | environment steps online", ylabel=column,
             title=str(run.folder))
    if rows:
        axes.legend(frameon=False)
    figure.savefig(run.folder / "curve.png", dpi=150)
    pyplot.close(figure)
    print(f"curve     {run.folder / 'curve.png'}")


def film(run, path):
    """video.mp4: one episode of the first seed's deterministic policy."""
    try:
        import imageio.v2

        if not os.environ.get("DISPLAY"):
            os.environ.setdefault("MUJOCO_GL", "egl")
        env = make_env(run.spec, render_mode="rgb_array")
        observation, _ = env.reset(seed=episode_seed(2, run.config.seed, 0))
        seeds, ended = run.config.num_seeds // len(run.devices), False
        with imageio.v2.get_writer(path, fps=env.metadata.get("render_fps", 30)) as film:
            film.append_data(env.render())
            while not ended:
                x = np.tile(run.transform.observations(observation), (seeds, 1, 1))  # (S / D, 1, O)
                action = np.asarray(act_deterministically(run.shards[0], x))[0, 0]  # (A,)
                action = run.transform.environment_actions(action)
                observation, _, terminated, truncated, _ = env.step(action)
                film.append_data(env.render())
                ended = terminated or truncated
        print(f"film      {path}")
    except Exception as error:  # no display driver, no encoder: the run itself is not to blame
        print(f"warning: no film: {' '.join(str(error).split())}; without a screen MuJoCo needs "
              "Debian's libegl1 (or MUJOCO_GL=osmesa and libosmesa6)", file=sys.stderr)


# ---------------------------------------------------------------------------------------- The run


@dataclasses.dataclass
class Run:
    """One run: what it is made of, how far it is, and what is shown of it."""

    config: Config
    spec: str  # the environment's, JSON
    folder: Path
    devices: list
    transform: Transform
    shards: list  # AgentState per device
    eval_envs: list
    datasets: list  # Batch per device, or None
    pretrain: int = 0  # steps or updates done before the offline phase, where a script has them
    offline: int = 0  # updates done
    online: int = 0  # environment steps done, per seed
    log_size: int = 0  # bytes of metrics.csv
    lock: Any = None
    buffers: Any = None  # ReplayBuffer per device, once online
    rollout: Any = None  # Rollout, once online
    bar: Any = None
    wandb: Any = None
    shown: dict = dataclasses.field(default_factory=dict)


def create_shards(config, observation_dim, action_dim, devices):
    """Fresh agents, each from its own seed's key, spread over the devices."""
    keys = jnp.stack([jax.random.PRNGKey(config.seed + i) for i in range(config.num_seeds)])
    sizes = {"observation_dim": observation_dim, "action_dim": action_dim}
    create = partial(create_agent_state, config=config, **sizes)
    return to_devices(jax.jit(partial(for_each_seed, create))(keys), devices)


def start_online(run, saved=None, found=None):
    """Replay buffers, training environments and first actions: new ones, or a checkpoint's."""
    blank = blank_transition(len(run.transform.observation_mean), len(run.transform.action_center))
    filled = saved["buffer/rows/rewards"].shape[1] if saved else 0
    capacity = max(filled, min(run.config.buffer_size, run.config.online_steps))
    buffers = empty_buffers(run.config.num_seeds, filled, blank)
    if saved:
        buffers = restore(buffers, saved, "buffer", found)
    pad = empty_buffers(run.config.num_seeds, capacity - filled, blank).rows
    rows = jax.tree.map(lambda *xs: np.concatenate(xs, axis=1), buffers.rows, pad)
    # a run with more --online-steps than before: its buffer was full, and has grown
    position = buffers.size % capacity if filled < capacity else buffers.position
    run.buffers = to_devices(buffers.replace(rows=rows, position=position), run.devices)
    run.rollout = start_rollout(run, saved)
    if not saved:
        observations = split(run.transform.observations(run.rollout.observations), run.devices)
        actions, keys = on_every_device(act, run.shards, observations)
        run.shards = [s.replace(key=key) for s, key in zip(run.shards, keys, strict=True)]
        run.rollout.actions = to_host(actions)


def offline_chunk(run, num_steps):
    """`num_steps` offline updates of every seed. Returns the mean metrics, (S,)."""
    update = partial(update_steps, config=run.config, num_steps=num_steps)
    run.shards, infos = on_every_device(update, run.shards, run.datasets)
    return to_host(infos)


def store(run, transitions):
    """Insert one transition (S, ...) per seed."""
    run.buffers = list(map(insert_transitions, run.buffers, split(transitions, run.devices)))


def online_chunk(run, num_steps):
    """`num_steps` environment steps of every seed, each with its updates. Returns the mean
    metrics, (S,), and the mean return and length of the training episodes that ended."""
    infos = []
    for step in range(run.online, run.online + num_steps):
        store(run, step_rollout(run))
        observations = split(run.transform.observations(run.rollout.observations), run.devices)
        learn = step >= run.config.warmup_steps
        update = partial(online_step, config=run.config, learn=learn)
        inputs = run.shards, run.buffers, observations, run.datasets
        run.shards, actions, info = on_every_device(update, *inputs)
        run.rollout.actions = to_host(actions)  # (S, A); waits for the device
        infos += [info] * learn
    values = jax.tree.map(lambda *xs: np.mean(xs, axis=0), *map(to_host, infos)) if infos else {}
    return values | finished_episodes(run)


def finished_episodes(run):
    """Mean return and length, (S,), of the training episodes that ended since the last log."""
    values = {}
    for column, name in ((1, "episode_return"), (2, "episode_length")):
        values[name] = np.full(run.config.num_seeds, np.nan)
        for i in {episode[0] for episode in run.rollout.finished}:
            values[name][i] = np.mean([e[column] for e in run.rollout.finished if e[0] == i])
    run.rollout.finished.clear()
    return values


@jax.jit
def mean_q(state, rows, sizes):
    """Mean Q (S,) of 1,000 of the first `sizes` (S,) rows (S, C, ...), drawn alike each time."""

    def one_seed(state, rows, size):
        batch = sample(rows, size, jax.random.PRNGKey(0), 1000)
        return state.critic.apply_fn(state.critic.params, batch.observations, batch.actions).mean()

    return for_each_seed(one_seed, state, rows, sizes)


def offline_q(run):
    """{"offline_q": mean Q (S,) of dataset rows}."""
    values = []
    for state, dataset in zip(run.shards, run.datasets, strict=True):
        some = sample(dataset, dataset.rewards.shape[0], jax.random.PRNGKey(0), 1000)
        seeds = len(state.key)
        rows = jax.tree.map(lambda x, n=seeds: jnp.broadcast_to(x, (n, *x.shape)), some)
        values.append(mean_q(state, rows, jnp.full(seeds, 1000)))
    return {"offline_q": to_host(values)}


def online_chunk_with_q(run, num_steps):
    """online_chunk, and after it how the critic judges the dataset and the new transitions."""
    values = online_chunk(run, num_steps)
    q = [mean_q(state, buffer.rows, buffer.size)
         for state, buffer in zip(run.shards, run.buffers, strict=True)]
    return values | offline_q(run) | {"online_q": to_host(q)}


@partial(jax.jit, static_argnames="other")
def policy_distance(state, rows, sizes, other):
    """Root mean square distance (S,), per action dimension, of the policy from the one whose
    parameters are the field `other`, in 1,000 of the first `sizes` (S,) rows (S, C, ...), drawn
    alike each time."""

    def one_seed(state, rows, size):
        observations = sample(rows, size, jax.random.PRNGKey(0), 1000).observations  # (1000, O)
        actions = state.actor.apply_fn(state.actor.params, observations)  # (1000, A)
        others = state.actor.apply_fn(getattr(state, other), observations)  # (1000, A)
        return jnp.sqrt(((actions - others) ** 2).mean())

    return for_each_seed(one_seed, state, rows, sizes)


def distance_to(run, other):
    """policy_distance of all seeds (S,), in the states that they have been in."""
    return to_host([policy_distance(state, buffer.rows, buffer.size, other)
                    for state, buffer in zip(run.shards, run.buffers, strict=True)])


def online_chunk_with_distance(run, num_steps):
    """online_chunk_with_q, and how far the policy has gone."""
    values = online_chunk_with_q(run, num_steps)
    return values | {"distance_to_offline": distance_to(run, "offline_actor_params")}


@jax.vmap
def follow_best(state, best_return):
    """The agent with its policy as reference, where its return is the best so far."""
    take = partial(jnp.where, best_return > state.best_return)
    found = state.replace(reference_params=state.actor.params, best_return=best_return)
    return jax.tree.map(take, found, state)


def constrained_chunk(run, num_steps):
    """online_chunk_with_distance; before it the best reference follows what was just evaluated."""
    if run.config.reference == "best":
        with open(run.folder / "metrics.csv", newline="") as file:
            rows = [row["return"] or "nan" for row in csv.DictReader(file)]
        returns = split(np.array(rows[-run.config.num_seeds :], np.float32), run.devices)
        run.shards = list(map(follow_best, run.shards, returns))
    values, reference = online_chunk_with_distance(run, num_steps), REFERENCES[run.config.reference]
    return values | {"distance_to_reference": distance_to(run, reference)}


def train(run, phase, chunk, num_steps, received, unit=1):
    """Chunk by chunk, each a multiple of `unit` steps, up to `num_steps` (or the first multiple
    above): log, evaluate, save, and answer a signal. Where the number of updates does not follow
    from that of the steps, `chunk` gives it as "updates"."""
    config, per_step = run.config, 1 if phase == "offline" else run.config.utd_ratio
    while getattr(run, phase) < num_steps:
        begin, done = time.time(), getattr(run, phase)
        size = min(config.log_interval - done % config.log_interval, num_steps - done)
        size += -size % unit
        values = chunk(run, size)
        done += size
        setattr(run, phase, done)
        seconds = time.time() - begin
        learnt = phase == "offline" or "actor_loss" in values  # not while warming up
        updates = values.pop("updates", size * per_step * config.num_seeds * learnt)
        check_finite(run, phase, values)
        values |= {"updates_per_second": np.full(config.num_seeds, updates / seconds),
                   "seconds": np.full(config.num_seeds, seconds)}
        passed = done // config.eval_interval > (done - size) // config.eval_interval
        evaluated = passed or done >= num_steps
        if evaluated:
            values |= evaluation_values(run)
        write_log(run, phase, values)
        run.bar.update(size)
        leaving = bool(received)  # read once: a signal may come while we save
        if evaluated or leaving:
            save_run(run)
        if leaving:
            run.bar.close()
            name = signal.Signals(received[0]).name
            write_record(run, name)
            print(f"{name}: saved; go on with --resume {run.folder}", file=sys.stderr)
            raise SystemExit(128 + received[0])


def evaluate_checkpoint(config, spec):
    """--eval-only: the score of a saved agent, and on demand a film of it."""
    arrays, _, found = load_checkpoint(config.eval_only)
    sizes = len(arrays["transform/observation_mean"]), len(arrays["transform/action_center"])
    devices = seed_devices(config.num_seeds)
    envs = [make_env(spec) for _ in range(config.num_seeds * config.eval_episodes)]
    shards = create_shards(config, *sizes, devices)
    run = Run(config, spec, found.parent, devices, None, shards, envs, None)
    restore_agent(run, found)
    values = evaluation_values(run)
    for i in range(config.num_seeds):
        row = ", ".join(f"{name} {value[i]:.1f}" for name, value in values.items())
        print(f"seed {config.seed + i}: {row}")
    if config.video:
        film(run, found.parent / "video.mp4")


# -------------------------------------------------------------------------------------------- main


def describe(run, dataset, arrays):
    """Say what is trained on what, before anything compiles."""
    returns = episode_returns(arrays)
    rewards = run.transform.rewards(arrays["rewards"])
    discounted = discounted_returns(rewards, arrays["ends"], run.config.discount).mean()
    settings = [f"{name} {getattr(run.config, name)}" for name in PRESETS[run.config.preset]]
    print(f"dataset   {dataset}: {len(rewards):,} steps, {len(returns):,} trajectories")
    print(f"          return {returns.mean():.1f} ({returns.min():.1f} ... {returns.max():.1f}); "
          f"discounted, in the agent's units {discounted:.2f}: compare q")
    print(f"env       {json.loads(run.spec)['id']}; score: {reference_returns(run.spec)[2]}")
    print(f"preset    {run.config.preset}: {', '.join(settings)}")
    print(f"run       {run.folder}", flush=True)


def main(arguments=None):
    gym.logger.min_level = gym.logger.ERROR  # no warnings that a -v4 environment is not the newest
    config, dataset, spec = parse_config(arguments)
    use_all_cores(config.num_seeds)
    if config.eval_only:
        evaluate_checkpoint(config, spec)
        return
    for name in ("log_interval", "offline_steps", "warmup_steps", "online_steps"):
        unused = name == "offline_steps" and config.init_from
        if getattr(config, name) % config.policy_delay and not unused:  # means are over whole turns
            flag = "--" + name.replace("_", "-")
            fail(f"{flag} must be a multiple of --policy-delay {config.policy_delay}")
    if math.isinf(config.epsilon) and (config.dual, config.epsilon_end) != ("learned", None):
        fail("--epsilon inf is plain TD3: without --dual annealed, without --epsilon-end")
    received = catch_signals()
    eval_envs = [make_env(spec) for _ in range(config.num_seeds * config.eval_episodes)]
    arrays = read_dataset(dataset)
    check_dataset(arrays, eval_envs[0], dataset)
    transform = fit_transform(arrays, eval_envs[0].action_space, config)
    (folder, lock), devices = open_folder(config, dataset), seed_devices(config.num_seeds)
    shards = create_shards(config, *eval_envs[0].observation_space.shape,
                           *eval_envs[0].action_space.shape, devices)
    run = Run(config, spec, folder, devices, transform, shards, eval_envs, None, lock=lock)
    if any(folder.glob("checkpoint*.npz")):
        saved, found = resume_run(run)
        if "rollout/actions" in saved:
            start_online(run, saved, found)
    elif config.init_from:
        take_over(run, config.init_from)
        run.shards = [s.replace(key=fresh.key) for s, fresh in zip(run.shards, shards, strict=True)]
    run.datasets = [jax.device_put(agent_batch(arrays, run.transform), d) for d in devices]
    describe(run, dataset, arrays)
    open_log(run)
    if not config.init_from:
        train(run, "offline", offline_chunk, config.offline_steps, received)
    if config.online_steps and run.rollout is None:
        begin = jax.jit(jax.vmap(partial(begin_finetuning, config=config)))
        run.shards = list(map(begin, run.shards))
        start_online(run)
        if run.offline == 0:  # otherwise the last offline evaluation is the one at the switch
            write_log(run, "online", evaluation_values(run) | offline_q(run))
    train(run, "online", constrained_chunk, config.online_steps, received)
    run.bar.close()
    write_record(run, "finished")
    summarize(run)
    if config.video:
        film(run, folder / "video.mp4")


if __name__ == "__main__":
    main()
