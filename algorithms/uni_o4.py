"""Uni-O4: one on-policy objective, PPO's, for offline improvement and online fine-tuning.

Off-policy critics are why agents collapse at the switch from data to environment. Uni-O4 has no
switch: offline, PPO improves behaviour-cloned policies on dataset states, against an advantage of
critics that are fitted once; whether a policy may become the new reference is decided by rolling it
out in a learned model (AM-Q). Online, PPO goes on with the chosen policy and the offline V.

    Lei, He, Lu, Hu, Gao, Xu: Uni-O4, arXiv 2311.03351

    cloning      L_i     = -E[ log pi_i(a | s) ] - diversity_weight * E[ log (pi_i / max_j pi_j) ],
                 in the form that --diversity chooses; data (s, a), members i = 1 ... num_members
    expectile    L_V     = E[ |expectile - 1(u < 0)| u^2 ], u = min_k Qtarget_k(s, a) - V(s)
    critic       L_Q     = E[ sum_k (r + discount * V(s') - Q_k(s, a))^2 ]
    dynamics     L_T     = sum_m E[ |mu_m - y|^2 / sigma_m^2 + log sigma_m^2 ], y = (s' - s, r)
    improvement  L_pi    = -E[ min(rho * A, clip(rho, 1 - clip_ratio, 1 + clip_ratio) * A) ],
                 rho = pi(a | s) / pi_k(a | s), a ~ pi_k(s), A = min_k Q_k(s, a) - V(s), normalised
    AM-Q         J(pi)   = E[ sum_t min_k Q_k(s_t, pi(s_t)) ] over `horizon` steps in the model; the
                 reference pi_k becomes pi where J(pi) > J(pi_k), asked every amq_interval updates
    actor        L_pi    = the same with online samples and GAE, from the member with the highest J
    value        L_V     = E[ (V(s) - (A + V_old(s)))^2 ] online, from the offline V; see ppo.py

    python algorithms/uni_o4.py                                    # offline,online
    python algorithms/uni_o4.py --stages offline --dataset mujoco/hopper/medium-v0
    python algorithms/uni_o4.py --stages online,offline,online --shift friction=0.4,mass=1.3

With online,offline,online a policy is pre-trained in the environment as it is, taken to a world
with other physics (--shift), plays there for --collect-steps steps, is improved offline on these
data alone, and fine-tuned in that world: the paper's sim-to-real story, told in simulation.

Deviations. From the paper, known ones:
 1. At a query, AM-Q asks candidate and incumbent from the same dataset states with the same noise
    (--no-amq-paired: as the authors' code). Rows of the model are held within 10 standard
    deviations of the data; where |Q| grows tenfold on the way, nobody is accepted and the horizon
    is halved, with a warning. One elite steps each row.
 2. The diversity is `specialise`, as the paper's form has no gradient in the authors' code, whose
    denominator is detached (`heuristic`); `joint` is the paper's formula, gradients through both.
From the authors' code (github.com/Lei-Kun/Uni-O4); presets *-code bring back what is marked (c):
 3. AM-Q sums Q as in the paper; theirs averages over the rows that are alive (c).
 4. The gate compares with the incumbent; theirs with the best score ever seen (c).
 5. The member is chosen by AM-Q alone; theirs is the best of three by its score in the environment.
 6. The last accepted policy is deployed; in theirs the last one (c).
 7. A time limit is no termination. Rows whose next observation is another episode's are left out.
 8. Actions are clipped to the box before Q sees them; the ratio is that of the raw ones.
 9. The log-std passes tanh once online; in theirs twice (c). An online action is stored raw.
10. One reward scale serves all stages, so V need not be fitted again; no running scale. V's change
    is not clipped online; in theirs by 0.05 in units of V (c).
11. IQL's critics everywhere; two of their scripts use SARSA and Monte-Carlo. Orthogonal hidden
    layers with gain sqrt(2), small output layers, and a new policy's std of 0.5, not 0.08.
12. The model sees the agent's units, draws its rows with replacement, stops at --dynamics-steps at
    the latest; its hold-out rows and bootstraps are the same for every seed. Members are cloned
    side by side, not in random order.
13. `auto` knows an environment's domain; what their scripts set for one dataset is a preset of
    that name. Where they search several horizons or learning rates, it has one of them.
14. A maze's goal has the environment's radius of 0.45, theirs 0.5.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "jax==0.10.2",
#   "flax==0.12.8",
#   "optax==0.2.8",
#   "distrax==0.1.9",
#   "tfp-nightly==0.26.0.dev20261027",
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

import distrax
import flax
import flax.linen as nn
import gymnasium as gym
import h5py
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
    preset: str = "auto"  # settings of a domain, see PRESETS; auto: from the environment
    stages: Literal["offline", "offline,online", "online,offline,online"] = "offline,online"
    pretrain_steps: int = 1_000_000  # environment steps before all else, if online is first
    collect_steps: int = 180_000  # steps of the pre-trained policy that make its dataset
    cloning_steps: int = 400_000  # updates: behaviour cloning
    critic_steps: int = 2_000_000  # updates: Q and V
    dynamics_steps: int = 500_000  # updates: model, at most; it stops by its hold-out error
    improvement_steps: int = 10_000  # updates: offline PPO
    online_steps: int = 1_000_000  # environment steps after that, per seed
    eval_interval: int = 20_000  # updates (offline) or environment steps (online)
    eval_episodes: int = 10  # per evaluation and seed
    log_interval: int = 2_000  # updates or environment steps per row of metrics.csv
    true_scores: bool = False  # play every member at every query: for the log, never used
    run_dir: str | None = None  # folder of this run; default: runs/<script>/<dataset>/<name>
    resume: str | None = None  # folder of a run to go on with (a new run where there is none)
    init_from: str | None = None  # ppo.py's: skip pre-training; this script's: the offline phase
    supervised_from: str | None = None  # take clones, critics and model of that run of the script
    eval_only: str | None = None  # checkpoint or run folder: evaluate it and stop
    video: bool = False  # film one episode at the end: video.mp4
    wandb: bool = False  # also log to Weights & Biases
    # Data
    dataset: str | None = None  # Minari id, folder or file; default: --init-from's, else the repo's
    env_id: str | None = None  # Gymnasium id; needed with a flat file, else the dataset's
    shift: str = ""  # changed physics, see ShiftedPhysics: friction=0.4,mass=1.3,delay=1
    normalize_observations: bool = False  # by the dataset's mean and standard deviation
    normalize_returns: bool = False  # rewards times 1000 / (max - min return in the dataset)
    reward_scale: float = 1.0  # r <- reward_scale * r + reward_shift, after the above
    reward_shift: float = 0.0  # see reward_scale
    successes_only: bool = False  # clone only rows from which the goal is reached
    # Optimisation
    batch_size: int = 512  # transitions per offline update
    discount: float = 0.99  # per step
    tau: float = 0.005  # target critic: fraction of the new critic, every second update
    hidden_dims: tuple[int, ...] = (256, 256, 256)  # widths of the policies
    activation: Literal["relu", "tanh"] = "relu"  # of the policies' hidden layers
    critic_hidden_dims: tuple[int, ...] = (1024, 1024)  # widths of Q
    value_hidden_dims: tuple[int, ...] = (512, 512, 512)  # widths of V
    learning_rate: float = 1e-4  # Adam, critics and cloning
    max_grad_norm: float = 0.5  # of PPO's gradients
    initial_std: float = 0.5  # of a new policy
    # Supervised
    num_members: int = 4  # policies
    diversity: Literal["specialise", "kl", "joint", "heuristic", "none"] = "specialise"
    diversity_weight: float = 0.1  # of the diversity term
    num_critics: int = 2  # Q-functions; the minimum counts
    expectile: float = 0.7  # of IQL's V
    model_hidden_dims: tuple[int, ...] = (200, 200, 200, 200)  # widths of the dynamics model
    model_learning_rate: float = 1e-3  # Adam, model
    model_batch_size: int = 256  # transitions per update of the model
    num_models: int = 7  # members of the model's ensemble
    num_elites: int = 5  # of them, those that AM-Q uses
    model_patience: int = 5  # epochs without an improvement by 1 % after which the model stops
    # Offline improvement
    improvement_learning_rate: float = 1e-4  # Adam, falls linearly to 0
    improvement_clip_ratio: float = 0.25  # of the probability ratio, from 1
    gate: Literal["amq", "always", "never"] = "amq"  # never, --deploy last: one-step improvement
    amq: Literal["sum", "mean"] = "sum"  # of Q over the steps, or over the steps alive
    amq_paired: bool = True  # the same states and noise for candidate and incumbent
    amq_margin: float = 0.0  # of the incumbent's score, by which the candidate must be better
    amq_interval: int = 100  # updates between two queries
    amq_starts: int = 510  # dataset states per query, a multiple of num_elites
    horizon: int = 1000  # steps of a rollout in the model
    termination: str = "auto"  # rule that ends a rollout, see terminated; auto: the environment's
    deploy: Literal["accepted", "last"] = "accepted"  # which policy of the chosen member
    # Online
    num_envs: int = 1  # training environments per seed
    rollout_steps: int = 2_048  # environment steps between two improvements, all environments'
    minibatch_size: int = 128  # transitions per online update
    epochs: int = 10  # passes over a rollout
    clip_ratio: float = 0.05  # of the probability ratio, from 1
    value_clip: float = 0.0  # of the change of V between two rollouts, in its units; 0: none
    gae_lambda: float = 0.95  # of the advantages
    entropy_weight: float = 0.01  # of the entropy bonus
    online_learning_rate: float = 2e-5  # Adam, policy
    value_learning_rate: float = 2e-4  # Adam, V
    decay_learning_rate: bool = True  # linearly to 0 at --online-steps
    squash_std_twice: bool = False  # online: tanh once more on the log-std, as in the authors' code

    @property
    def offline_steps(self):
        """Updates of the whole offline phase."""
        return sum(steps for _, steps in offline_stages(self))

    @property
    def utd_ratio(self):
        """Updates per environment step."""
        return self.epochs / self.minibatch_size

    @property
    def num_minibatches(self):
        """Updates per pass over a rollout."""
        return self.rollout_steps // self.minibatch_size


CODE = dict(  # where the authors' code differs from their paper
    amq="mean", amq_paired=False, diversity="heuristic", deploy="last", squash_std_twice=True,
    value_clip=0.05,
)  # fmt: skip
PRESETS = {
    "hopper": dict(normalize_observations=True, reward_scale=0.1),
    "walker2d": dict(
        normalize_observations=True, online_learning_rate=3e-5, epochs=30,
    ),
    "halfcheetah": dict(
        normalize_observations=True, activation="tanh", online_learning_rate=3e-5, epochs=30,
        reward_scale=0.1,
    ),
    "adroit": dict(
        model_hidden_dims=(400,) * 4, model_learning_rate=3e-4, model_patience=10, horizon=50,
        improvement_learning_rate=1e-5, online_learning_rate=6e-6, minibatch_size=256,
    ),
    "kitchen": dict(
        critic_steps=1_000_000, cloning_steps=200_000, improvement_steps=1_000, horizon=4,
        model_hidden_dims=(400,) * 4, model_learning_rate=3e-4, model_patience=20,
        improvement_learning_rate=1e-5, normalize_observations=True,
    ),
    "antmaze": dict(
        reward_scale=10.0, reward_shift=-5.0, expectile=0.9, critic_hidden_dims=(256,) * 3,
        value_hidden_dims=(256,) * 3, horizon=70, amq="mean", improvement_learning_rate=3e-5,
        successes_only=True, eval_episodes=50, model_hidden_dims=(400,) * 4,
        model_learning_rate=3e-4,
    ),
}  # fmt: skip
PRESETS["pointmaze"] = PRESETS["antmaze"]
PRESETS["mujoco"] = PRESETS["walker2d"]
PRESETS |= {  # datasets whose scripts differ from their domain's
    "halfcheetah-medium-replay": PRESETS["halfcheetah"] | dict(normalize_observations=False),
    "walker2d-medium-replay": PRESETS["walker2d"] | dict(critic_steps=500_000),
    "pen-human": PRESETS["adroit"] | dict(critic_steps=1_000_000, cloning_steps=200_000),
    "hammer": PRESETS["adroit"] | dict(normalize_observations=True, activation="tanh"),
    "relocate": PRESETS["adroit"] | dict(activation="tanh"),
    "door-human": PRESETS["adroit"] | dict(improvement_steps=5_000),
    "kitchen-complete": PRESETS["kitchen"] | dict(
        critic_steps=500_000, cloning_steps=100_000, horizon=10, normalize_observations=False
    ),
    "kitchen-mixed": PRESETS["kitchen"] | dict(diversity="none"),
    "antmaze-medium": PRESETS["antmaze"] | dict(horizon=150),
    "antmaze-large": PRESETS["antmaze"] | dict(horizon=200),
}  # fmt: skip
SMALL = dict(  # what a CPU does in minutes
    cloning_steps=10_000, critic_steps=30_000, dynamics_steps=4_000, improvement_steps=2_000,
    online_steps=100_000, critic_hidden_dims=(256, 256), value_hidden_dims=(256, 256),
    horizon=100, eval_interval=10_000,
)  # fmt: skip
PRESETS |= {f"{name}-code": PRESETS[name] | CODE for name in list(PRESETS)}
PRESETS |= {f"{name}-cpu": PRESETS[name] | SMALL for name in ("hopper", "walker2d", "halfcheetah")}
PRESETS["cpu"] = PRESETS["default"] = PRESETS["hopper-cpu"]
PRESETS["smoke"] = PRESETS["hopper"] | dict(
    pretrain_steps=256, collect_steps=600, cloning_steps=200, critic_steps=200, dynamics_steps=200,
    improvement_steps=200, online_steps=256, eval_interval=100, eval_episodes=1, log_interval=50,
    batch_size=64, hidden_dims=(32, 32), critic_hidden_dims=(32, 32), value_hidden_dims=(32, 32),
    num_members=2, num_models=3, num_elites=2, model_hidden_dims=(32, 32), amq_interval=50,
    amq_starts=32, horizon=20, rollout_steps=128, minibatch_size=32, epochs=2,
)  # fmt: skip

RANGES = {  # smallest and largest accepted value
    "num_seeds": (1, 4096), "pretrain_steps": (0, 10**9), "collect_steps": (1, 10**8),
    "cloning_steps": (0, 10**9), "critic_steps": (0, 10**9), "dynamics_steps": (0, 10**9),
    "improvement_steps": (0, 10**9), "online_steps": (0, 10**9), "eval_interval": (1, 10**9),
    "eval_episodes": (1, 10**4), "log_interval": (1, 10**9), "seed": (0, 2**31 - 1),
    "reward_scale": (1e-9, 1e9), "reward_shift": (-1e9, 1e9), "batch_size": (2, 10**6),
    "discount": (0.0, 0.999999), "tau": (0.0, 1.0), "learning_rate": (0.0, 1.0),
    "max_grad_norm": (1e-9, 1e9), "initial_std": (0.007, 0.99), "num_members": (1, 100),
    "diversity_weight": (0.0, 1e3), "num_critics": (1, 100), "expectile": (1e-6, 1 - 1e-6),
    "model_learning_rate": (0.0, 1.0), "model_batch_size": (1, 10**6), "num_models": (1, 100),
    "num_elites": (1, 100), "model_patience": (1, 10**6),
    "improvement_learning_rate": (0.0, 1.0), "improvement_clip_ratio": (1e-9, 1e9),
    "amq_margin": (0.0, 1e3), "amq_interval": (1, 10**9), "amq_starts": (1, 10**6),
    "horizon": (1, 10**6), "num_envs": (1, 4096), "rollout_steps": (1, 10**7),
    "minibatch_size": (1, 10**6), "epochs": (1, 1000), "clip_ratio": (1e-9, 1e9),
    "value_clip": (0.0, 1e9), "gae_lambda": (0.0, 1.0), "entropy_weight": (0.0, 1e9),
    "online_learning_rate": (0.0, 1.0), "value_learning_rate": (0.0, 1.0),
}  # fmt: skip

INIT_FROM = ("uni_o4", "ppo")  # scripts whose checkpoints --init-from takes

METRICS = {  # every column of metrics.csv that is the algorithm's own, with its healthy range
    "cloning_loss": "negative log-likelihood of the members (nats), mean; falls, then flat",
    "expectile_loss": "expectile loss of the offline V (transformed reward units squared)",
    "critic_loss": "squared TD error, summed over critics; bounded, may grow with q",
    "q": "mean Q of the batch; near or above the dataset's discounted return, never far above",
    "dynamics_loss": "negative log-likelihood (nats, without constants), summed over models; falls",
    "model_error": "squared hold-out error of the elites, mean over dimensions; falls",
    "improvement_loss": "clipped surrogate offline, negated; a little below 0",
    "advantage": "mean of Q - V at the reference's actions; below 0 for expectile > 0.5",
    "horizon": "of AM-Q's rollouts; halved where |Q| explodes in the model",
    "amq": "AM-Q of the candidates, mean over members; rises",
    "amq_incumbent": "AM-Q of the references, mean over members; rises",
    "accepted": "queries won so far, mean over members; 0 after many: model or horizon are broken",
    "ranking": "share of pairs of members and queries that AM-Q orders as the environment does",
    "members_return": "mean return of all members' candidates, with --true-scores",
    "actor_loss": "clipped surrogate, negated; slightly below 0, the advantages being normalised",
    "value_loss": "squared error of V (transformed reward units squared)",
    "v": "mean V of the rollout; towards the discounted return",
    "ratio_clipped": "share of ratios outside the clip, mean over the epochs; 0.05 ... 0.3",
    "kl": "of the new policy from the rollout's (nats); of order 0.01",
    "entropy": "of the policy (nats); falls slowly",
    "falls": "episodes of the interval that ended by termination (in mazes: at the goal)",
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


class Value(nn.Module):
    """V: (B, O) -> (B,)."""

    hidden_dims: tuple[int, ...]

    @nn.compact
    def __call__(self, observations):
        return ScalarHead()(MLP(self.hidden_dims)(observations))  # (B,)


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


class BoundedGaussianPolicy(nn.Module):
    """pi: (B, O) -> a diagonal Gaussian over (B, A): its mean in (-1, 1), its std in (0.0067, 1),
    both functions of the state. It is not squashed: samples are clipped when they are executed.

    Authors' code of Uni-O4: log std = -5 + 2.5 (u + 1); mean and u pass a tanh, u online twice.
    """

    hidden_dims: tuple[int, ...]
    action_dim: int
    activation: str = "relu"
    initial_std: float = 0.5
    squash_twice: bool = False

    @nn.compact
    def __call__(self, observations):
        activation = getattr(nn, self.activation)
        features = MLP(self.hidden_dims, activation=activation)(observations)  # (B, H)
        small = nn.initializers.variance_scaling(1e-4, "fan_in", "normal")
        mean = nn.tanh(nn.Dense(self.action_dim, kernel_init=small)(features))  # (B, A)
        start = np.arctanh((np.log(self.initial_std) + 5.0) / 2.5 - 1.0)
        bias = nn.initializers.constant(start)
        u = nn.Dense(self.action_dim, kernel_init=small, bias_init=bias)(features)  # (B, A)
        u = nn.tanh(nn.tanh(u)) if self.squash_twice else nn.tanh(u)  # (B, A)
        return distrax.MultivariateNormalDiag(mean, jnp.exp(-5.0 + 2.5 * (u + 1.0)))


class DynamicsModel(nn.Module):
    """T: (B, O + A), standardised -> mean and log-variance (B, O + 1) of the change of the
    observation and of the reward. Two learnt bounds hold the log-variance softly between them."""

    hidden_dims: tuple[int, ...]
    num_outputs: int  # O + 1

    @nn.compact
    def __call__(self, x):
        def dense(width, x):
            init = nn.initializers.truncated_normal(0.5 / np.sqrt(x.shape[-1]))
            return nn.Dense(width, kernel_init=init)(x)

        for width in self.hidden_dims:
            x = nn.swish(dense(width, x))  # (B, width)
        mean, log_var = jnp.split(dense(2 * self.num_outputs, x), 2, axis=-1)  # (B, O + 1)
        high = self.param("high", nn.initializers.constant(0.5), (self.num_outputs,))
        low = self.param("low", nn.initializers.constant(-10.0), (self.num_outputs,))
        log_var = high - nn.softplus(high - log_var)  # (B, O + 1)
        return mean, low + nn.softplus(log_var - low)


# ------------------------------------------------------------------------------------ Agent state


@flax.struct.dataclass
class AgentState:
    """All that training changes in one agent. Outside the losses every array has a leading axis
    of seeds, (S, ...); what belongs to members of an ensemble has their axis next."""

    clones: TrainState  # N policies, behaviour-cloned
    members: TrainState  # N policies, the candidates of the offline improvement
    references: Any  # N policies' parameters: pi_k
    critic: TrainState
    target_critic_params: Any
    offline_value: TrainState
    dynamics: TrainState  # M models
    best_models: Any  # their parameters at the best hold-out error
    best_errors: jax.Array  # (M,), hold-out errors then
    stale_epochs: jax.Array  # (), epochs without an improvement of any model
    input_mean: jax.Array  # (O + A,), of the model's inputs
    input_std: jax.Array  # (O + A,)
    observation_mean: jax.Array  # (O,), of the transform: a termination needs raw observations
    observation_std: jax.Array  # (O,)
    scores: jax.Array  # (N,), AM-Q of the references
    accepted: jax.Array  # (N,), queries won
    queries: jax.Array  # ()
    horizon: jax.Array  # (), of AM-Q
    actor: TrainState  # the chosen member's policy; what is evaluated, and trained online
    value: TrainState  # V online
    key: jax.Array


def create_agent_state(key, observation_dim, action_dim, config):
    """A fresh agent for one seed, from its random key (2,)."""
    keys = jax.random.split(key, 6)
    x, actions = jnp.zeros((1, observation_dim)), jnp.zeros((1, action_dim))  # (1, O), (1, A)
    sizes = config.hidden_dims, action_dim, config.activation, config.initial_std
    policy, online_policy = (
        BoundedGaussianPolicy(*sizes, squash_twice) for squash_twice in (False, True)
    )
    critic = CriticEnsemble(config.critic_hidden_dims, config.num_critics)
    value = Value(config.value_hidden_dims)
    model = DynamicsModel(config.model_hidden_dims, observation_dim + 1)
    inputs = jnp.zeros((1, observation_dim + action_dim))  # (1, O + A)
    policies = jax.vmap(policy.init, (0, None))(jax.random.split(keys[1], config.num_members), x)
    models = jax.vmap(model.init, (0, None))(jax.random.split(keys[4], config.num_models), inputs)
    critic_params, value_params = critic.init(keys[2], x, actions), value.init(keys[3], x)
    copy = partial(jax.tree.map, jnp.copy)
    rate = optax.linear_schedule(
        config.improvement_learning_rate, 0.0, max(1, config.improvement_steps)
    )
    ppo = optax.chain(optax.clip_by_global_norm(config.max_grad_norm), optax.adam(rate))
    adam = optax.adam(config.learning_rate)
    return AgentState(
        clones=TrainState.create(apply_fn=policy.apply, params=policies, tx=adam),
        members=jax.vmap(partial(TrainState.create, apply_fn=policy.apply, tx=ppo))(
            params=copy(policies)
        ),
        references=copy(policies),
        critic=TrainState.create(apply_fn=critic.apply, params=critic_params, tx=adam),
        target_critic_params=copy(critic_params),
        offline_value=TrainState.create(apply_fn=value.apply, params=value_params, tx=adam),
        dynamics=TrainState.create(
            apply_fn=model.apply, params=models, tx=optax.adam(config.model_learning_rate)
        ),
        best_models=copy(models),
        best_errors=jnp.full(config.num_models, 1e9),
        stale_epochs=jnp.zeros((), jnp.int32),
        input_mean=jnp.zeros(observation_dim + action_dim),
        input_std=jnp.ones(observation_dim + action_dim),
        observation_mean=jnp.zeros(observation_dim),
        observation_std=jnp.ones(observation_dim),
        scores=jnp.full(config.num_members, -1e9),
        accepted=jnp.zeros(config.num_members),
        queries=jnp.zeros((), jnp.int32),
        horizon=jnp.full((), config.horizon),
        actor=TrainState.create(
            apply_fn=(online_policy if config.squash_std_twice else policy).apply,
            params=jax.tree.map(lambda p: jnp.copy(p[0]), policies),
            tx=clipped_adam(config.online_learning_rate, config),
        ),
        value=TrainState.create(
            apply_fn=value.apply, params=copy(value_params),
            tx=clipped_adam(config.value_learning_rate, config),
        ),
        key=keys[0],
    )


def clipped_adam(learning_rate, config):
    """Adam behind a bound on the gradient's norm; its rate falls linearly over the online steps."""
    num_updates = max(1, round(config.online_steps * config.utd_ratio))
    if config.decay_learning_rate:
        learning_rate = optax.linear_schedule(learning_rate, 0.0, num_updates)
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm), optax.adam(learning_rate, eps=1e-5)
    )


# ----------------------------------------------------------------------------------------- Losses
# Each takes first the parameters it differentiates, and returns (loss, metrics). N counts the
# members here, K the critics, M the models.


def cloning_loss(params, state, batch, key, config):
    """Negative log-likelihood of the data's actions, and the diversity term, summed over members.

    batch.mc_returns (B,) are weights: 0 leaves a row out. The forms of the diversity are those of
    the authors' code, but for `joint`, which is the paper's formula.
    """

    def one_member(params):
        policy = state.clones.apply_fn(params, batch.observations)
        return policy.log_prob(batch.actions), policy.mean(), policy.stddev()

    log_prob, mean, std = jax.vmap(one_member)(params)  # (N, B), (N, B, A), (N, B, A)
    num_members = len(log_prob)
    own = jnp.eye(num_members, dtype=bool)[:, :, None]  # (N, N, 1)
    others = jnp.where(own, -jnp.inf, log_prob)  # (N, N, B)
    best_other = others.max(axis=1)  # (N, B)
    weight = config.diversity_weight if num_members > 1 else 0.0
    if config.diversity == "specialise":  # who is best at a row learns more from it
        gain = jnp.where(log_prob >= best_other, weight, -weight)  # (N, B)
        loss = -(1.0 + gain) * log_prob  # (N, B)
    elif config.diversity == "kl":
        kl = pairwise_kl(mean, std, others.argmax(axis=1))  # (N, B)
        loss = -log_prob - weight * jnp.minimum(kl, 10.0)  # (N, B)
    elif config.diversity == "joint":
        loss = -log_prob - weight * (log_prob - log_prob.max(axis=0))  # (N, B)
    elif config.diversity == "heuristic":  # no gradient in the second term: plain cloning
        loss = -log_prob - weight * (log_prob - jax.lax.stop_gradient(best_other))  # (N, B)
    else:
        loss = -log_prob  # (N, B)
    rows = batch.mc_returns / jnp.maximum(batch.mc_returns.mean(), 1e-9)  # (B,)
    return (loss * rows).mean(axis=1).sum(), {"cloning_loss": -(log_prob * rows).mean()}


def pairwise_kl(mean, std, nearest):
    """KL (N, B) of each member, a Gaussian (N, B, A), from another one, chosen per row by nearest
    (N, B), without the other's gradient; summed over action dimensions."""
    chosen = nearest[..., None]  # (N, B, 1)
    other_mean = jax.lax.stop_gradient(jnp.take_along_axis(mean, chosen, axis=0))  # (N, B, A)
    other_std = jax.lax.stop_gradient(jnp.take_along_axis(std, chosen, axis=0))  # (N, B, A)
    ratio = (std / other_std) ** 2  # (N, B, A)
    distance = ((mean - other_mean) / other_std) ** 2  # (N, B, A)
    return 0.5 * (ratio + distance - 1 - jnp.log(ratio)).sum(axis=-1)


def expectile_loss(params, state, batch, key, config):
    """IQL's V: an upper expectile of the target Q of dataset actions."""
    q = state.critic.apply_fn(state.target_critic_params, batch.observations, batch.actions)
    v = state.offline_value.apply_fn(params, batch.observations)  # (B,)
    u = q.min(axis=0) - v  # (B,), q is (K, B)
    weight = jnp.abs(config.expectile - (u < 0))  # (B,), |expectile - 1(u < 0)|
    loss = (weight * u**2).mean()
    return loss, {"expectile_loss": loss}


def critic_loss(params, state, batch, key, config):
    """IQL's Q: regression on r + discount * V(s'), summed over critics."""
    v = state.offline_value
    next_v = v.apply_fn(v.params, batch.next_observations)  # (B,)
    target_q = batch.rewards + config.discount * batch.masks * next_v  # (B,)
    q = state.critic.apply_fn(params, batch.observations, batch.actions)  # (K, B)
    loss = ((q - target_q[None]) ** 2).mean(axis=1).sum()
    return loss, {"critic_loss": loss, "q": q.mean()}


def model_inputs(state, observations, actions):
    """What the model is asked (..., O + A): standardised by its training rows."""
    x = jnp.concatenate([observations, actions], axis=-1)  # (..., O + A)
    return (x - state.input_mean) / state.input_std


def model_targets(batch):
    """What the model predicts (..., O + 1): the change of the observation, and the reward."""
    change = batch.next_observations - batch.observations  # (..., O)
    return jnp.concatenate([change, batch.rewards[..., None]], axis=-1)  # (..., O + 1)


MODEL_WEIGHT_DECAY = (2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4)  # from the first layer to the last


def dynamics_loss(params, state, batch, key, config):
    """Gaussian negative log-likelihood, summed over models, each with its own batch (M, B, ...);
    a penalty on weights, layer by layer, and one that draws the log-variance's bounds together."""
    inputs = model_inputs(state, batch.observations, batch.actions)  # (M, B, O + A)
    mean, log_var = jax.vmap(state.dynamics.apply_fn)(params, inputs)  # (M, B, O + 1)
    error = (mean - model_targets(batch)) ** 2 * jnp.exp(-log_var)  # (M, B, O + 1)
    loss = (error + log_var).mean(axis=(1, 2)).sum()
    tree = params["params"]
    bounds = 0.01 * (tree["high"].sum() - tree["low"].sum())
    depth = len(config.model_hidden_dims)
    weights = np.interp(np.arange(depth + 1) / depth, np.arange(5) / 4, MODEL_WEIGHT_DECAY)
    decay = sum(
        weight * 0.5 * (tree[f"Dense_{i}"]["kernel"] ** 2).sum() for i, weight in enumerate(weights)
    )
    return loss + bounds + decay, {"dynamics_loss": loss}


def improvement_loss(params, reference_params, state, observations, key, config):
    """One member's clipped surrogate, negated, on dataset states (B, O) and actions of its
    reference. Lei et al., with the ratio the right way round: new over old."""
    reference = state.clones.apply_fn(reference_params, observations)
    actions = reference.sample(seed=key)  # (B, A)
    executed = jnp.clip(actions, -1.0, 1.0)  # (B, A)
    q = state.critic.apply_fn(state.critic.params, observations, executed)  # (K, B)
    v = state.offline_value.apply_fn(state.offline_value.params, observations)  # (B,)
    raw = q.min(axis=0) - v  # (B,)
    advantage = (raw - raw.mean()) / (raw.std() + 1e-10)  # (B,)
    policy = state.clones.apply_fn(params, observations)
    ratio = jnp.exp(policy.log_prob(actions) - reference.log_prob(actions))  # (B,)
    bound = improvement_clip(state.members.step.max(), config)
    clipped = jnp.clip(ratio, 1.0 - bound, 1.0 + bound)  # (B,)
    loss = -jnp.minimum(ratio * advantage, clipped * advantage).mean()
    return loss, {"improvement_loss": loss, "advantage": raw.mean()}


def improvement_clip(step, config):
    """The clip of the offline ratio: it falls linearly as the learning rate does, but, in the
    authors' code, stops after 200 updates."""
    progress = jnp.minimum(step, 200) / max(1, config.improvement_steps)
    return config.improvement_clip_ratio * (1.0 - progress)


# -------------------------------------------------------------------------------- Update, offline


def gradient_step(train_state, loss_fn, *args):
    """One optimiser step on `loss_fn(params, *args) -> (loss, metrics)`."""
    grads, info = jax.grad(loss_fn, has_aux=True)(train_state.params, *args)
    return train_state.apply_gradients(grads=grads), info


def clone(state, batch, config):
    """One update of the behaviour-cloned members, on a shared batch."""
    clones, info = gradient_step(state.clones, cloning_loss, state, batch, None, config)
    first = jax.tree.map(lambda x: x[0], clones.params)  # what is evaluated meanwhile
    return state.replace(clones=clones, actor=state.actor.replace(params=first)), info


def fit_critics(state, batch, config):
    """One update of IQL: V, Q at the new V, and in every second update the target Q."""
    value, value_info = gradient_step(
        state.offline_value, expectile_loss, state, batch, None, config
    )
    state = state.replace(offline_value=value)
    critic, info = gradient_step(state.critic, critic_loss, state, batch, None, config)
    tau = jnp.where(critic.step % 2 == 0, config.tau, 0.0)
    target = optax.incremental_update(critic.params, state.target_critic_params, tau)
    return state.replace(critic=critic, target_critic_params=target), value_info | info


def improve_offline(state, batch, config):
    """One PPO update of every member, on dataset states that they share."""
    key, noise_key = jax.random.split(state.key)
    keys = jax.random.split(noise_key, config.num_members)

    def one_member(member, reference, key):
        inputs = reference, state, batch.observations, key, config
        return gradient_step(member, improvement_loss, *inputs)

    members, info = jax.vmap(one_member)(state.members, state.references, keys)
    return state.replace(members=members, key=key), jax.tree.map(jnp.mean, info)


def holdout_rows(dataset):
    """How many rows of the dataset, its first, the model is judged by and not trained on."""
    return min(max(1, len(dataset.rewards) // 5), 1000)


def fit_dynamics(state, dataset, config):
    """One update of every model on its own bootstrap of the rows, and after every epoch a look at
    the hold-out error. Once no model has improved for some epochs, nothing happens any more."""
    num_rows, num_holdout = len(dataset.rewards), holdout_rows(dataset)
    epoch = -(-num_rows // config.model_batch_size)  # updates

    def step(state):
        key, batch_key = jax.random.split(state.key)
        shape = config.num_models, config.model_batch_size
        draws = jax.random.randint(batch_key, shape, 0, num_rows - num_holdout)  # (M, B)
        # draw j of model m is always the same row: a bootstrap sample without a table of it
        seeds = jax.vmap(partial(jax.random.fold_in, jax.random.PRNGKey(0)))(
            jnp.arange(config.num_models)
        )
        fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(seeds, draws)  # (M, B, 2)
        pick = partial(jax.random.randint, shape=(), minval=num_holdout, maxval=num_rows)
        rows = jax.vmap(jax.vmap(pick))(fold)  # (M, B)
        batch = jax.tree.map(lambda x: x[rows], dataset)  # (M, B, ...)
        inputs = state, batch, None, config
        dynamics, info = gradient_step(state.dynamics, dynamics_loss, *inputs)
        state = state.replace(dynamics=dynamics, key=key)
        ended = (dynamics.step % epoch == 0) | (dynamics.step == config.dynamics_steps)
        state = jax.lax.cond(ended, partial(judge_models, dataset=dataset, config=config),
                             lambda state: state, state)  # fmt: skip
        return state, info["dynamics_loss"]

    stopped = state.stale_epochs >= config.model_patience
    state, loss = jax.lax.cond(stopped, lambda state: (state, jnp.zeros(())), step, state)
    error = jnp.sort(state.best_errors)[: config.num_elites].mean()
    return state, {"dynamics_loss": loss, "model_error": error}


def judge_models(state, dataset, config):
    """Keep the parameters of every model whose hold-out error has fallen by more than 1 %."""
    held = jax.tree.map(lambda x: x[: holdout_rows(dataset)], dataset)
    inputs = model_inputs(state, held.observations, held.actions)  # (B, O + A)
    predict = jax.vmap(state.dynamics.apply_fn, (0, None))
    means, _ = predict(state.dynamics.params, inputs)  # (M, B, O + 1)
    errors = ((means - model_targets(held)) ** 2).mean(axis=(1, 2))  # (M,)
    better = errors < 0.99 * state.best_errors  # (M,)
    keep = partial(where_member, better)
    best = jax.tree.map(keep, state.dynamics.params, state.best_models)
    stale = jnp.where(better.any(), 0, state.stale_epochs + 1)
    return state.replace(best_models=best, best_errors=jnp.where(better, errors, state.best_errors),
                         stale_epochs=stale)


def where_member(chosen, new, old):
    """`new` where a member is chosen (N,), else `old`; both (N, ...)."""
    return jnp.where(chosen.reshape(-1, *[1] * (new.ndim - 1)), new, old)


# ------------------------------------------------------------------------------------------- AM-Q


TERMINATIONS = ("hopper", "walker2d", "halfcheetah", "pen", "maze", "none")


def terminated(observations, config):
    """Whether an episode ends in raw observations (B, O), by the environment's own rule."""
    x, rule = observations, config.termination
    if rule == "hopper":
        healthy = (x[:, 0] > 0.7) & (jnp.abs(x[:, 1]) < 0.2) & (jnp.abs(x[:, 1:]) < 100).all(axis=1)
        return ~healthy
    if rule == "walker2d":
        upright = (x[:, 0] > 0.8) & (x[:, 0] < 2.0) & (jnp.abs(x[:, 1]) < 1.0)
        return ~(upright & (jnp.abs(x) < 100).all(axis=1))
    if rule == "halfcheetah":
        return (jnp.abs(x) >= 100).any(axis=1)
    if rule == "pen":
        return x[:, 26] < 0.075
    if rule == "maze":  # achieved and desired goal come first
        return jnp.linalg.norm(x[:, :2] - x[:, 2:4], axis=1) <= 0.45
    return jnp.zeros(len(x), bool)


def amq_scores(state, params, starts, key, config):
    """AM-Q (N,) of N policies from start states (N, P, O), and the largest |Q| on the way, over
    that of the first step. Each row is stepped by one elite; ended rows count no more."""
    elites = jnp.argsort(state.best_errors)[: config.num_elites]  # (E,)
    models = jax.tree.map(lambda x: x[elites], state.best_models)

    def one_policy(params, starts, key):
        def q_and_action(x):
            action = jnp.clip(state.clones.apply_fn(params, x).mean(), -1.0, 1.0)  # (P, A)
            q = state.critic.apply_fn(state.critic.params, x, action)  # (K, P)
            return q.min(axis=0), action

        def model_step(x, action, key):
            order_key, noise_key = jax.random.split(key)
            order = jax.random.permutation(order_key, len(x)).reshape(config.num_elites, -1)
            inputs = model_inputs(state, x, action)[order]  # (E, P / E, O + A)
            mean, log_var = jax.vmap(state.dynamics.apply_fn)(models, inputs)
            noise = jax.random.normal(noise_key, mean.shape)  # (E, P / E, O + 1)
            change = (mean + jnp.exp(0.5 * log_var) * noise)[..., :-1]  # (E, P / E, O)
            following = x.at[order.reshape(-1)].add(change.reshape(x.shape))  # (P, O)
            size = x.shape[1]
            center, spread = state.input_mean[:size], 10.0 * state.input_std[:size]
            return jnp.clip(following, center - spread, center + spread)

        def step(t, carry):
            x, alive, total, count, largest, key = carry
            key, model_key = jax.random.split(key)
            q, action = q_and_action(x)  # (P,), (P, A)
            total, count = total + (alive * q).sum(), count + alive.sum()
            largest = jnp.maximum(largest, (alive * jnp.abs(q)).max())
            x = model_step(x, action, model_key)
            raw = x * state.observation_std + state.observation_mean
            return x, alive * (1.0 - terminated(raw, config)), total, count, largest, key

        first = jnp.abs(q_and_action(starts)[0]).max()
        begin = starts, jnp.ones(len(starts)), 0.0, 0.0, first, key
        _, _, total, count, largest, _ = jax.lax.fori_loop(0, state.horizon, step, begin)
        score = total / (count if config.amq == "mean" else len(starts))
        return score, largest / (first + 1e-6)

    return jax.vmap(one_policy)(params, starts, key)


@partial(jax.jit, static_argnames="config")
def query(state, dataset, config):
    """Ask AM-Q of every seed whether its members may become their own references, and choose the
    member to deploy. Returns the state and what was found: candidate's and incumbent's scores and
    acceptance, (S, N), and the horizon (S,)."""
    return for_each_seed(partial(query_one_seed, dataset=dataset, config=config), state)


def query_one_seed(state, dataset, config):
    """`query` of one seed."""
    key, rows_key, noise_key = jax.random.split(state.key, 3)
    num = 1 if config.amq_paired else config.num_members
    rows = jax.random.randint(rows_key, (num, config.amq_starts), 0, len(dataset.rewards))
    shape = config.num_members, config.amq_starts, dataset.observations.shape[1]
    starts = jnp.broadcast_to(dataset.observations[rows], shape)  # (N, P, O)
    keys = jax.random.split(noise_key, num)
    keys = jnp.broadcast_to(keys, (config.num_members, *keys.shape[1:]))  # (N, 2)
    scores, growth = amq_scores(state, state.members.params, starts, keys, config)  # (N,), (N,)
    ask_references = partial(amq_scores, state, state.references, starts, keys, config)
    if config.amq_paired:
        incumbent, other_growth = ask_references()
    else:  # only at the first query their score is not known yet
        known = state.scores, jnp.ones(config.num_members)
        incumbent, other_growth = jax.lax.cond(state.queries == 0, ask_references, lambda: known)
    exploded = jnp.maximum(growth, other_growth).max() > 10.0
    better = (scores > incumbent + config.amq_margin * jnp.abs(incumbent)) & ~exploded  # (N,)
    if config.gate != "amq":
        better = jnp.full(config.num_members, config.gate == "always")
    references = jax.tree.map(partial(where_member, better), state.members.params, state.references)
    kept = jnp.where(better, scores, incumbent)  # (N,)
    candidates = state.members.params if config.deploy == "last" else references
    chosen = jnp.argmax(scores if config.deploy == "last" else kept)
    params = jax.tree.map(lambda x, old: jnp.where(exploded, old, x[chosen]), candidates,
                          state.actor.params)  # fmt: skip
    horizon = jnp.where(exploded, jnp.maximum(state.horizon // 2, 1), state.horizon)
    state = state.replace(
        references=references, scores=kept, accepted=state.accepted + better,
        actor=state.actor.replace(params=params), horizon=horizon, key=key,
        queries=jnp.where(exploded, 0, state.queries + 1),  # another horizon: scores start anew
    )
    found = {"amq": scores, "amq_incumbent": kept, "accepted": better.astype(jnp.float32)}
    return state, found | {"horizon": horizon.astype(jnp.float32)}


def begin_offline(state, dataset, transform, config):
    """What the offline phase needs of one seed's dataset: the model's input scale, and the
    transform. Members that were pre-trained online start from that policy."""
    x = jnp.concatenate([dataset.observations, dataset.actions], axis=1)  # (B, O + A)
    x = x[holdout_rows(dataset) :]  # the rows that the model is trained on
    std = x.std(axis=0)  # (O + A,)
    state = state.replace(
        input_mean=x.mean(axis=0), input_std=jnp.where(std < 1e-12, 1.0, std),
        observation_mean=transform[0], observation_std=transform[1],
    )
    if config.stages.startswith("online"):
        clones = jax.tree.map(lambda p, x: jnp.broadcast_to(x, p.shape), state.clones.params,
                              state.actor.params)  # fmt: skip
        state = state.replace(clones=state.clones.replace(params=clones))
    return state


def begin_improvement(state):
    """Members and references start from the clones; the first is deployed until AM-Q chooses."""
    copy = partial(jax.tree.map, jnp.copy)
    params = state.clones.params
    actor = state.actor.replace(params=jax.tree.map(lambda x: x[0], params))
    return state.replace(members=state.members.replace(params=copy(params)), actor=actor,
                         references=copy(params))  # fmt: skip


def begin_fine_tuning(state):
    """The offline V becomes the online one. The policy is that of the last query already."""
    params = jax.tree.map(jnp.copy, state.offline_value.params)
    return state.replace(value=state.value.replace(params=params))


# ------------------------------------------------------------------------------------- Online: PPO


@flax.struct.dataclass
class Sample:
    """What one step of a rollout says to the losses."""

    observations: jax.Array  # (B, O)
    actions: jax.Array  # (B, A), before they were clipped to the box
    log_probs: jax.Array  # (B,), under the policy that took them
    advantages: jax.Array  # (B,), normalised
    values: jax.Array  # (B,), V before the update
    returns: jax.Array  # (B,), what V regresses on


def generalised_advantages(state, rollout, ends, config):
    """GAE of a rollout (T, E, ...): advantages and the values V(s), both (T, E).

    ends (T, E): whether the episode ended with the step, for whatever reason; the masks say
    whether the next state has a value. Schulman et al. 2016, generalised advantage estimation.
    """
    values = state.value.apply_fn(state.value.params, rollout.observations)  # (T, E)
    next_values = state.value.apply_fn(state.value.params, rollout.next_observations)  # (T, E)
    deltas = rollout.rewards + config.discount * rollout.masks * next_values - values  # (T, E)

    def step(following, inputs):
        delta, end = inputs  # (E,), (E,)
        advantage = delta + config.discount * config.gae_lambda * (1.0 - end) * following  # (E,)
        return advantage, advantage

    _, advantages = jax.lax.scan(step, jnp.zeros_like(deltas[0]), (deltas, ends), reverse=True)
    return advantages, values


def actor_loss(params, state, batch, key, config):
    """The clipped surrogate objective, negated, minus the entropy bonus."""
    policy = state.actor.apply_fn(params, batch.observations)
    log_ratio = policy.log_prob(batch.actions) - batch.log_probs  # (B,)
    ratio = jnp.exp(log_ratio)  # (B,)
    clipped = jnp.clip(ratio, 1.0 - config.clip_ratio, 1.0 + config.clip_ratio)  # (B,)
    surrogate = jnp.minimum(ratio * batch.advantages, clipped * batch.advantages)  # (B,)
    entropy = policy.entropy().mean()
    loss = -surrogate.mean() - config.entropy_weight * entropy
    info = {"ratio_clipped": (ratio != clipped).mean(), "kl": (ratio - 1.0 - log_ratio).mean()}
    return loss, info | {"actor_loss": loss, "entropy": entropy}


def value_loss(params, state, batch, key, config):
    """V regresses on the returns; with --value-clip on the worse of two errors, of V itself and
    of V held near its old value."""
    v = state.value.apply_fn(params, batch.observations)  # (B,)
    errors = (v - batch.returns) ** 2  # (B,)
    if config.value_clip > 0:
        change = jnp.clip(v - batch.values, -config.value_clip, config.value_clip)  # (B,)
        near = batch.values + change  # (B,)
        errors = jnp.maximum(errors, (near - batch.returns) ** 2)  # (B,)
    return errors.mean(), {"value_loss": errors.mean(), "v": v.mean()}


def update_step(state, batch, config):
    """One update on a minibatch: pi, then V."""
    actor, actor_info = gradient_step(state.actor, actor_loss, state, batch, None, config)
    value, value_info = gradient_step(state.value, value_loss, state, batch, None, config)
    return state.replace(actor=actor, value=value), actor_info | value_info


def improve(state, rollout, ends, config):
    """`epochs` passes over a rollout (T, E, ...) in random minibatches. Metrics are means."""
    advantages, values = generalised_advantages(state, rollout, ends, config)  # (T, E)
    normalised = (advantages - advantages.mean()) / (advantages.std() + 1e-8)  # (T, E)
    policy = state.actor.apply_fn(state.actor.params, rollout.observations)
    samples = Sample(rollout.observations, rollout.actions, policy.log_prob(rollout.actions),
                     normalised, values, advantages + values)
    samples = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), samples)  # (T * E, ...)

    def epoch(state, _):
        key, order_key = jax.random.split(state.key)
        order = jax.random.permutation(order_key, config.rollout_steps)  # (T * E,)
        order = order.reshape(config.num_minibatches, -1)  # (M, B)

        def step(state, rows):
            return update_step(state, jax.tree.map(lambda x: x[rows], samples), config)

        return jax.lax.scan(step, state.replace(key=key), order)

    state, info = jax.lax.scan(epoch, state, length=config.epochs)
    return state, jax.tree.map(jnp.mean, info)


def mode_actions(state, observations):
    """The deterministic policy's actions (B, A) in observations (B, O), for evaluation."""
    return state.actor.apply_fn(state.actor.params, observations).mode()


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


def sample(rows, size, key, batch_size):
    """`batch_size` transitions, uniform with replacement over the first `size` rows."""
    indices = jax.random.randint(key, (batch_size,), 0, size)  # (B,)
    return jax.tree.map(lambda x: x[indices], rows)


# ---------------------------------------------------------------------------------- Training steps


def for_each_seed(function, *arguments):
    """`function` over the leading axis, the seeds of one device: side by side on an accelerator,
    one after the other on a CPU, where batching the small matmuls halves their speed."""
    if jax.default_backend() == "cpu":
        return jax.lax.map(lambda xs: function(*xs), arguments)
    return jax.vmap(function)(*arguments)


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


# ------------------------------------------------------------------------------ On-policy rollouts


SHIFTS = {  # what ShiftedPhysics changes, and its smallest and largest accepted value
    "friction": (0.0, 100.0), "mass": (0.01, 100.0), "strength": (0.0, 100.0),
    "damping": (0.0, 100.0), "delay": (0, 100),
}  # fmt: skip


class ShiftedPhysics(gym.Wrapper, gym.utils.RecordConstructorArgs):
    """A MuJoCo environment with other physics, as factors of the model's own: `friction` of all
    contacts, `mass` and inertia of all bodies, `strength` of the actuators, `damping` of the
    joints; and actions that arrive `delay` steps late, until then the zero action."""

    def __init__(self, env, friction=1.0, mass=1.0, strength=1.0, damping=1.0, delay=0):
        factors = {"friction": friction, "mass": mass, "strength": strength, "damping": damping}
        gym.utils.RecordConstructorArgs.__init__(self, delay=delay, **factors)
        gym.Wrapper.__init__(self, env)
        model = env.unwrapped.model
        model.geom_friction[:] *= friction
        model.body_mass[:] *= mass
        model.body_inertia[:] *= mass
        model.actuator_gear[:] *= strength
        model.dof_damping[:] *= damping
        mujoco.mj_setConst(model, env.unwrapped.data)  # what MuJoCo derives from mass and inertia
        self.delay = int(delay)
        self.waiting = []

    def reset(self, **keywords):
        self.waiting = [np.zeros(self.action_space.shape, self.action_space.dtype)] * self.delay
        return self.env.reset(**keywords)

    def step(self, action):
        self.waiting.append(action)
        return self.env.step(self.waiting.pop(0))


def shifted(spec, text):
    """The specification (JSON) of an environment with the physics that --shift asks for."""
    if not text:
        return spec
    words = [word.partition("=") for word in text.split(",")]
    for name, _, number in words:
        low, high = SHIFTS.get(name, (0, 0))
        try:
            fits = name in SHIFTS and low <= float(number) <= high
            fits = fits and (name != "delay" or number.isdigit())
        except ValueError:
            fits = False
        if not fits:
            known = ", ".join(f"{n}={a}...{b}" for n, (a, b) in SHIFTS.items())
            fail(f"--shift {text}: {name}={number}; known are {known}")
    changes = {name: int(number) if name == "delay" else float(number) for name, _, number in words}
    made = json.loads(spec)
    if not hasattr(make_env(spec).unwrapped, "model"):
        fail(f"--shift {text}: {made['id']} has no MuJoCo model")
    made["additional_wrappers"].append({
        "name": "ShiftedPhysics", "entry_point": f"{__name__}:ShiftedPhysics", "kwargs": changes,
    })  # fmt: skip
    return json.dumps(made)


@jax.jit
def act_on_policy(state, observations):
    """The policies' sampled actions (S * E, A), not clipped to the box, in observations
    (S * E, O), and the next keys (S, 2)."""
    keys = jax.vmap(partial(jax.random.split, num=2))(state.key)  # (S, 2, 2)

    def one_seed(state, observations, key):
        return state.actor.apply_fn(state.actor.params, observations).sample(seed=key)

    observations = observations.reshape(len(keys), -1, observations.shape[-1])  # (S, E, O)
    actions = jax.vmap(one_seed)(state, observations, keys[:, 1])  # (S, E, A)
    return actions.reshape(-1, actions.shape[-1]), keys[:, 0]


def collect_rollout(run):
    """Play `rollout_steps` steps per seed with the current policies.

    Returns a Batch (S, T, E, ...) with the raw actions, and whether the episodes ended with the
    steps (S, T, E).
    """
    steps, ends, config = [], [], run.config
    for _ in range(config.rollout_steps // config.num_envs):
        observations = split(run.transform.observations(run.rollout.observations), run.devices)
        raw, keys = on_every_device(act_on_policy, run.shards, observations)
        run.shards = [s.replace(key=key) for s, key in zip(run.shards, keys, strict=True)]
        raw = to_host(raw)  # (S * E, A)
        run.rollout.actions = np.clip(raw, -1.0, 1.0)
        episodes = run.rollout.episodes.copy()
        steps.append(step_rollout(run).replace(actions=raw))
        ends.append((run.rollout.episodes != episodes).astype(np.float32))

    def by_seed(*rows):
        stacked = np.stack(rows)  # (T, S * E, ...)
        stacked = stacked.reshape(len(rows), config.num_seeds, config.num_envs, *stacked.shape[2:])
        return stacked.swapaxes(0, 1)  # (S, T, E, ...)

    return jax.tree.map(by_seed, *steps), by_seed(*ends)


@partial(jax.jit, static_argnames="config", donate_argnames="state")
def improve_policies(state, rollout, ends, config):
    """`improve` for every seed. `state` is donated: use the returned one."""
    return for_each_seed(partial(improve, config=config), state, rollout, ends)


def on_policy_chunk(run, num_steps):
    """`num_steps` environment steps of every seed, an improvement after each rollout. Returns the
    mean metrics, (S,), and the mean return and length of the training episodes that ended."""
    infos, falls = [], 0.0
    for _ in range(num_steps // run.config.rollout_steps):
        rollout, ends = collect_rollout(run)
        falls += (1.0 - rollout.masks).sum(axis=(1, 2))  # (S,)
        shards = split((rollout, ends), run.devices)
        improved = partial(improve_policies, config=run.config)
        rollouts, all_ends = zip(*shards, strict=True)
        run.shards, info = on_every_device(improved, run.shards, rollouts, all_ends)
        infos.append(to_host(info))
    values = jax.tree.map(lambda *xs: np.mean(xs, axis=0), *infos)
    return values | finished_episodes(run) | {"falls": falls}


def fresh_optimisers(state, fresh):
    """The policy and V of `state`, with the optimisers and the key of a fresh agent."""
    actor = fresh.actor.replace(params=state.actor.params)
    return fresh.replace(actor=actor, value=fresh.value.replace(params=state.value.params))


def start_on_policy(run, saved=None):
    """The training environments: new ones, or a checkpoint's."""
    run.rollout = start_rollout(run, saved, run.config.num_envs)
    if not saved:
        run.rollout.actions = np.zeros((len(run.rollout.envs), len(run.transform.action_center)))


# ------------------------------------------------------------------------------ The offline phase


def offline_stages(config):
    """Names and lengths (updates) of the offline phase's stages, in order. Members that were
    pre-trained online need no cloning."""
    cloning = 0 if config.stages.startswith("online") else config.cloning_steps
    return [("cloning", cloning), ("critics", config.critic_steps),
            ("dynamics", config.dynamics_steps), ("improvement", config.improvement_steps)]


def stage_at(config, done):
    """The stage after `done` updates of the offline phase, its updates done and still to do."""
    for stage, length in offline_stages(config):
        if done < length:
            return stage, done, length - done
        done -= length
    raise ValueError("the offline phase is over")


@partial(jax.jit, static_argnames=("stage", "config", "num_steps"), donate_argnames="state")
def offline_updates(state, dataset, stage, config, num_steps):
    """`num_steps` updates of one stage, for every seed, compiled as one scan.

    `state` is donated: use the returned one. Metrics are means over the steps, (S,).
    """
    updates = {"cloning": clone, "critics": fit_critics, "improvement": improve_offline}

    def one_seed(state):
        def body(state, _):
            if stage == "dynamics":
                return fit_dynamics(state, dataset, config)
            key, sample_key = jax.random.split(state.key)
            batch = sample(dataset, dataset.rewards.shape[0], sample_key, config.batch_size)
            return updates[stage](state.replace(key=key), batch, config)

        state, info = jax.lax.scan(body, state, length=num_steps)
        return state, jax.tree.map(jnp.mean, info)

    return for_each_seed(one_seed, state)


def staged_chunk(run, num_steps):
    """`num_steps` updates of the offline phase, whatever stages they fall into, and AM-Q's queries
    among them. Returns the mean metrics, (S,)."""
    config, infos, done = run.config, [], run.offline
    while num_steps:
        stage, at, left = stage_at(config, done)
        size = min(num_steps, left)
        if stage == "improvement":
            size = min(size, config.amq_interval - at % config.amq_interval)
            if at == 0:
                run.shards = [jax.jit(jax.vmap(begin_improvement))(s) for s in run.shards]
        stale = to_host([s.stale_epochs for s in run.shards])
        if stage != "dynamics" or (stale < config.model_patience).any():  # else it has stopped
            update = partial(offline_updates, stage=stage, config=config, num_steps=size)
            run.shards, info = on_every_device(update, run.shards, run.datasets)
            infos.append(to_host(info))
        done, num_steps = done + size, num_steps - size
        if stage == "improvement" and ((at + size) % config.amq_interval == 0 or size == left):
            infos.append(ask(run, at + size))
    names = dict.fromkeys(name for info in infos for name in info)
    return {n: np.mean([info[n] for info in infos if n in info], axis=0) for n in names}


def ask(run, step):
    """Query AM-Q, and log it in queries.csv, a row per seed and member. With --true-scores the
    members are also played in the environment: nothing but the log sees that. Returns metrics."""
    horizon = to_host([s.horizon for s in run.shards])
    run.shards, found = on_every_device(partial(query, config=run.config), run.shards, run.datasets)
    found = to_host(found)
    if (found["horizon"] < horizon).any():
        tqdm.write(f"warning: |Q| explodes in the model, AM-Q's horizon is now "
                   f"{found['horizon'].min():.0f}", file=sys.stderr)  # fmt: skip
    returns = member_returns(run) if run.config.true_scores else np.full(found["amq"].shape, np.nan)
    path, rows = run.folder / "queries.csv", []
    if path.exists():  # without those after the checkpoint that the run goes on from
        with open(path, newline="") as file:
            rows = [row for row in csv.DictReader(file) if int(row["step"]) < step]
    for i, j in np.ndindex(*returns.shape):
        rows.append({"step": step, "seed": run.config.seed + i, "member": j,
                     "horizon": int(horizon[i]),
                     "amq": found["amq"][i, j], "amq_incumbent": found["amq_incumbent"][i, j],
                     "accepted": int(found["accepted"][i, j]), "return": returns[i, j]})
    try:
        with open(path.with_suffix(".tmp"), "w", newline="") as file:
            writer = csv.DictWriter(file, rows[-1], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(path.with_suffix(".tmp"), path)
    except OSError as error:
        fail(f"cannot write queries.csv ({error.strerror})", code=4)
    won = to_host([s.accepted for s in run.shards])  # (S, N)
    seeds = [run.config.seed + i for i in range(run.config.num_seeds)]
    values = {"amq": found["amq"].mean(1), "amq_incumbent": found["amq_incumbent"].mean(1),
              "accepted": won.mean(1), "horizon": found["horizon"]}  # fmt: skip
    if run.config.true_scores:
        shares = [ranking([row for row in rows if int(row["seed"]) == seed
                           and int(row["horizon"]) == horizon[i]])
                  for i, seed in enumerate(seeds)]  # fmt: skip
        values |= {"members_return": returns.mean(1), "ranking": np.array(shares)}
    return values


def member_returns(run):
    """Mean returns (S, N) of all members' candidate policies in the environment."""
    shards, returns = run.shards, []
    for i in range(run.config.num_members):
        run.shards = [s.replace(actor=s.actor.replace(params=jax.tree.map(
            lambda x, i=i: x[:, i], s.members.params))) for s in shards]  # fmt: skip
        returns.append(evaluate(run)[0].mean(axis=1))
    run.shards = shards
    return np.stack(returns, axis=1)


def ranking(rows):
    """Share of pairs of queried policies whose order by AM-Q is that by their return. Pairs of
    equal return do not count; without any others a half, as of a coin."""
    amq, returns = (np.array([float(row[name]) for row in rows]) for name in ("amq", "return"))
    i, j = np.triu_indices(len(rows), 1)
    differ = returns[i] - returns[j]
    pairs = differ != 0
    if not pairs.any():
        return 0.5
    return np.mean(np.sign(amq[i] - amq[j])[pairs] == np.sign(differ)[pairs])


def offline_dataset(run, path):
    """Read and check the dataset at `path`, put it on the devices and describe it. A run without
    a transform gets the dataset's."""
    arrays = read_dataset(path)
    check_dataset(arrays, run.eval_envs[0], path)
    if run.transform is None:
        run.transform = fit_transform(arrays, run.eval_envs[0].action_space, run.config)
    batch = agent_batch(arrays, run.transform)
    weights = np.ones(len(batch.rewards), np.float32)
    if run.config.successes_only:
        weights = discounted_returns(arrays["rewards"], arrays["ends"], 0.99)[arrays["keep"]] > 0
        if not weights.any():
            fail(f"{path}: --successes-only, but no trajectory has a positive reward")
    # the order means nothing to the agent: its first rows are the model's hold-out
    order = np.random.default_rng(0).permutation(len(batch.rewards))
    batch = jax.tree.map(lambda x: x[order], batch.replace(mc_returns=np.float32(weights)))
    run.datasets = [jax.device_put(batch, device) for device in run.devices]
    describe(run, path, arrays)


def prepare_offline(run):
    """Give fresh agents what they need of the dataset."""
    transform = run.transform
    scale = [jnp.float32(x) for x in (transform.observation_mean, transform.observation_std)]
    prepare = jax.jit(jax.vmap(partial(begin_offline, config=run.config), (0, None, None)))
    run.shards = [prepare(s, d, scale) for s, d in zip(run.shards, run.datasets, strict=True)]


# --------------------------------------------------------------------------------- Online, offline


def pretraining(config):
    """The settings under which a policy is trained from nothing: ppo.py's."""
    return dataclasses.replace(
        config, online_learning_rate=3e-4, value_learning_rate=1e-3, clip_ratio=0.2, value_clip=0.0,
        entropy_weight=0.0, epochs=10, num_envs=8, online_steps=config.pretrain_steps,
        squash_std_twice=False,
    )  # fmt: skip


def fresh_shards(run):
    """New agents of the run's configuration."""
    sizes = len(run.transform.observation_mean), len(run.transform.action_center)
    return create_shards(run.config, *sizes, run.devices)


def pretrain(run, saved, received):
    """Train the policy by PPO in the environment as it is, without --shift."""
    config = pretraining(run.config)
    spec = unshifted(run.spec)
    envs = [make_env(spec) for _ in run.eval_envs]
    world = dataclasses.replace(run, config=config, spec=spec, eval_envs=envs)
    world.shards = fresh_shards(world)
    if saved:
        restore_agent(world, run.folder)
    start_on_policy(world, saved)
    train(world, "pretrain", on_policy_chunk, config.pretrain_steps, received, config.rollout_steps)
    run.shards = list(map(fresh_optimisers, world.shards, fresh_shards(run)))
    run.pretrain, run.log_size = world.pretrain, world.log_size


def collect_dataset(run, path, num_envs=5):
    """Play the policy in the run's environment: `collect_steps` steps as a flat file of D4RL's
    keys. One environment of five plays the mean actions, the others sample."""
    run.rollout, rows, state = start_rollout(run, None, num_envs), [], run.shards[0]
    num_steps = -(-run.config.collect_steps // num_envs)
    for step in tqdm(range(num_steps), desc="collecting", disable=None):
        before, episodes = run.rollout.observations.copy(), run.rollout.episodes.copy()
        inputs = run.transform.observations(before)
        sampled, key = act_on_policy(state, inputs)
        mean = act_deterministically(state, inputs[None])[0]
        state = state.replace(key=key)
        deterministic = np.arange(num_envs)[:, None] == 0
        run.rollout.actions = np.clip(np.where(deterministic, mean, sampled), -1.0, 1.0)
        batch = step_rollout(run)
        ends = (run.rollout.episodes != episodes) | (step == num_steps - 1)
        rows.append({
            "observations": before, "next_observations": batch.next_observations,
            "actions": run.transform.environment_actions(run.rollout.actions),
            "rewards": (batch.rewards - run.config.reward_shift) / run.config.reward_scale,
            "terminals": batch.masks == 0, "timeouts": ends & (batch.masks > 0),
        })  # fmt: skip
    # environment after environment, so that trajectories are whole
    arrays = {n: np.stack([r[n] for r in rows], axis=1).reshape(-1, *rows[0][n].shape[1:])
              for n in rows[0]}  # fmt: skip
    falls = arrays["terminals"].sum()
    tqdm.write(f"collected {len(arrays['rewards']):,} steps, {falls} falls: {path}")
    run.rollout = None
    try:
        np.savez(path.with_suffix(".tmp.npz"), **arrays)
        os.replace(path.with_suffix(".tmp.npz"), path)
    except OSError as error:
        fail(f"cannot write {path} ({error.strerror})", code=4)


def unshifted(spec):
    """The specification (JSON) without --shift."""
    made = json.loads(spec)
    made["additional_wrappers"] = [
        w for w in made["additional_wrappers"] if w["name"] != "ShiftedPhysics"
    ]
    return json.dumps(made)


def take_agent(run, source):
    """Put the agent of a finished offline phase into the run, with fresh optimisers and keys. Of
    one that was fine-tuned already, V is the online one."""
    _, meta, _ = restore_agent(run, source)
    taken = []
    for state, fresh in zip(run.shards, fresh_shards(run), strict=True):
        value = state.value if meta["online"] else state.offline_value
        state = state.replace(offline_value=state.offline_value.replace(params=value.params))
        actor = fresh.actor.replace(params=state.actor.params)
        taken.append(state.replace(actor=actor, value=fresh.value, key=fresh.key))
    run.shards = taken


def take_supervised(run, source):
    """Put what the supervised stages of another run have made into new agents: the offline
    improvement is next."""
    restore_agent(run, source)
    names = ("clones", "critic", "target_critic_params", "offline_value", "dynamics", "best_models",
             "best_errors", "stale_epochs", "input_mean", "input_std", "observation_mean",
             "observation_std")  # fmt: skip
    run.shards = [fresh.replace(**{name: getattr(state, name) for name in names})
                  for state, fresh in zip(run.shards, fresh_shards(run), strict=True)]  # fmt: skip
    run.offline = run.config.offline_steps - run.config.improvement_steps


def take_policy(run, source):
    """Put the policy of a checkpoint of ppo.py into the agents."""
    arrays, _, found = load_own_checkpoint(source, INIT_FROM)
    params = to_host([s.actor.params for s in run.shards])
    params = restore(params, arrays, "state/actor/params", found)
    parts = to_devices(params, run.devices)
    run.shards = [s.replace(actor=s.actor.replace(params=p))
                  for s, p in zip(run.shards, parts, strict=True)]  # fmt: skip


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


# ---------------------------------------------------------------------- Command line, run folder


def locate(config):
    """Dataset path (None where the run makes its own), environment specification (JSON), and the
    preset that `auto` stands for."""
    online_first = config.stages.startswith("online")
    path = None if online_first else find_dataset(config.dataset)
    spec = environment_spec(path, config.env_id or ("Hopper-v5" if online_first else None))
    env = make_env(spec)
    check_spaces(env.observation_space, env.action_space, env.spec.id)
    name = "default" if config.dataset is None and not online_first else task_preset(env.spec.id)
    return path, shifted(spec, config.shift), name


def task_preset(env_id):
    """Name of the preset for an environment."""
    words = ("Hopper", "Walker2d", "HalfCheetah", "AntMaze", "PointMaze", "Kitchen", "Adroit")
    return next((word.lower() for word in words if word in env_id), "mujoco")


def settle(config, spec):
    """The configuration with `auto` resolved, after refusing what does not fit together."""
    words = {"Hopper": "hopper", "Walker2d": "walker2d", "HalfCheetah": "halfcheetah",
             "HandPen": "pen", "Maze": "maze"}  # fmt: skip
    made, online_first = json.loads(spec), config.stages.startswith("online")
    if config.termination == "auto":
        rule = next((rule for word, rule in words.items() if word in made["id"]), "none")
        if rule == "maze" and made["kwargs"].get("continuing_task", True):
            rule = "none"  # it does not end at the goal
        config = dataclasses.replace(config, termination=rule)
    check_sizes(config, 8 if online_first else config.num_envs)
    resumed = config.resume and Path(config.resume, "config.json").is_file()
    if config.init_from and not resumed:  # else its source may be gone
        check_source(config, online_first)
    if online_first:
        if config.num_seeds > 1:
            fail("--stages online,offline,online: each seed has its own dataset, so --num-seeds 1")
        if config.dataset:
            fail("--stages online,offline,online: the run makes its own dataset, no --dataset")
        config = dataclasses.replace(  # the policy is trained on raw observations and rewards
            config, env_id=made["id"], normalize_observations=False, normalize_returns=False
        )
    if config.supervised_from and not resumed:
        check_supervised(config, online_first)
    return config


def check_sizes(config, num_envs):
    """Refuse sizes that do not fit each other."""
    parts = (("rollout_steps", "minibatch_size", config.minibatch_size),
             ("rollout_steps", "num_envs", config.num_envs),
             ("rollout_steps", "num_envs", num_envs),
             ("amq_starts", "num_elites", config.num_elites))  # fmt: skip
    for name, part, size in parts:
        if getattr(config, name) % size:
            flags = [f"--{word.replace('_', '-')}" for word in (name, part)]
            fail(f"{flags[0]} {getattr(config, name)}: must be a multiple of {flags[1]} {size}")
    if config.num_elites > config.num_models:
        fail(f"--num-elites {config.num_elites}: there are {config.num_models} models")
    if config.gate == "amq" and config.improvement_steps and not config.dynamics_steps:
        fail("--dynamics-steps 0: --gate amq needs a model")
    if config.termination not in TERMINATIONS:
        fail(f"--termination {config.termination}: must be auto or one of "
             f"{', '.join(TERMINATIONS)}")


def check_source(config, online_first):
    """Refuse a checkpoint that this run cannot go on from."""
    _, meta, found = load_own_checkpoint(config.init_from, INIT_FROM)
    wanted = "ppo" if online_first else "uni_o4"
    if meta["script"] != wanted:
        fail(f"--init-from {found}: a checkpoint of {meta['script']}.py; --stages {config.stages} "
             f"goes on from {wanted}.py's")
    for name in ("activation", "reward_scale", "reward_shift"):
        if meta["config"][name] != getattr(config, name):
            fail(f"--init-from {found}: has --{name.replace('_', '-')} {meta['config'][name]}, but "
                 f"this run {getattr(config, name)}")
    if wanted == "uni_o4":
        if config.stages == "offline":
            fail("--stages offline --init-from: nothing is left to do")
        if meta["offline"] < config_from(json.dumps(meta["config"])).offline_steps:
            fail(f"--init-from {found}: its offline phase is not finished")


def check_supervised(config, online_first):
    """Refuse a --supervised-from whose supervised stages are not this run's."""
    if online_first or config.init_from:
        fail("--supervised-from: not with --init-from, nor with --stages online,offline,online")
    _, meta, found = load_own_checkpoint(config.supervised_from)
    theirs = config_from(json.dumps(meta["config"]))
    names = ("dataset", "normalize_observations", "normalize_returns", "reward_scale",
             "reward_shift", "activation", "discount", "expectile", "cloning_steps", "critic_steps",
             "dynamics_steps", "diversity", "num_seeds", "seed")  # fmt: skip
    changed = [name for name in names if getattr(config, name) != getattr(theirs, name)]
    if changed:
        fail(f"--supervised-from {found}: that run has another {', '.join(changed)}")
    if meta["offline"] < theirs.offline_steps - theirs.improvement_steps:
        fail(f"--supervised-from {found}: its supervised stages are not finished")


def plain_transform(run):
    """The transform of a run without a dataset: actions by the box, rewards by the settings."""
    box, config = run.eval_envs[0].action_space, run.config
    size = run.eval_envs[0].observation_space.shape[0]
    return Transform(
        np.zeros(size), np.ones(size), (box.high + box.low) / 2, (box.high - box.low) / 2,
        np.array(config.reward_scale), np.array(config.reward_shift),
    )


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


def finished_episodes(run):
    """Mean return and length, (S,), of the training episodes that ended since the last log."""
    values = {}
    for column, name in ((1, "episode_return"), (2, "episode_length")):
        values[name] = np.full(run.config.num_seeds, np.nan)
        for i in {episode[0] for episode in run.rollout.finished}:
            values[name][i] = np.mean([e[column] for e in run.rollout.finished if e[0] == i])
    run.rollout.finished.clear()
    return values


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
    config = settle(config, spec)
    received = catch_signals()
    eval_envs = [make_env(spec) for _ in range(config.num_seeds * config.eval_episodes)]
    (folder, lock), devices = open_folder(config, dataset), seed_devices(config.num_seeds)
    sizes = eval_envs[0].observation_space.shape[0], eval_envs[0].action_space.shape[0]
    shards = create_shards(config, *sizes, devices)
    nothing = [None] * len(devices)
    run = Run(config, spec, folder, devices, None, shards, eval_envs, nothing, lock=lock)
    if dataset:
        offline_dataset(run, dataset)
    else:
        run.transform = plain_transform(run)
    saved = None
    if any(folder.glob("checkpoint*.npz")):
        saved, _ = resume_run(run)
    open_log(run)
    if not dataset and run.offline == 0 and run.online == 0:
        online_first(run, saved, received)
        dataset, saved = folder / "collected.npz", None
        offline_dataset(run, dataset)
    elif not dataset:
        offline_dataset(run, folder / "collected.npz")
    if config.init_from and not config.stages.startswith("online") and not saved:
        take_agent(run, config.init_from)
    elif config.supervised_from and run.offline == 0 and not saved:
        take_supervised(run, config.supervised_from)
    elif run.offline == 0 and not saved:
        prepare_offline(run)
        write_log(run, "offline", evaluation_values(run))
    if not config.init_from or config.stages.startswith("online"):
        train(run, "offline", staged_chunk, config.offline_steps, received)
    if config.stages.endswith("online"):
        fine_tune(run, saved, received)
    run.bar.close()
    write_record(run, "finished")
    summarize(run)
    if config.video:
        film(run, folder / "video.mp4")


def online_first(run, saved, received):
    """Pre-training, if no policy is given, and the dataset of the policy in its new world."""
    if run.config.init_from:
        take_policy(run, run.config.init_from)
    elif run.pretrain < run.config.pretrain_steps:
        pretrain(run, saved, received)
    else:  # it was killed after the pre-training
        run.shards = list(map(fresh_optimisers, run.shards, fresh_shards(run)))
    path = run.folder / "collected.npz"
    if not path.exists():
        collect_dataset(run, path)


def fine_tune(run, saved, received):
    """The online phase, from the policy that the offline phase has left."""
    if run.online == 0:
        run.shards = [jax.jit(jax.vmap(begin_fine_tuning))(s) for s in run.shards]
        saved = None
        write_log(run, "online", evaluation_values(run))
    start_on_policy(run, saved)
    steps, unit = run.config.online_steps, run.config.rollout_steps
    train(run, "online", on_policy_chunk, steps, received, unit)


if __name__ == "__main__":
    main()
