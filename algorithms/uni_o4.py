"""Uni-O4: one on-policy objective, PPO's, for offline improvement and online fine-tuning.

Off-policy critics are why agents collapse at the switch from data to environment. Uni-O4 has no
switch: offline, PPO improves cloned policies on dataset states, against critics that are fitted
once; whether a policy becomes the new reference is decided by rolling it out in a learned model
(AM-Q). Online, PPO goes on with the best policy and the offline V.

    Lei, He, Lu, Hu, Gao, Xu: Uni-O4, arXiv 2311.03351

    cloning      L_i  = -E[ log pi_i(a | s) ] - diversity_weight * E[ log (pi_i / max_j!=i pi_j) ]
    expectile    L_V  = E[ |expectile - 1(u < 0)| u^2 ], u = min_i Qtarget_i(s, a) - V(s)
    critic       L_Q  = E[ sum_i (r + discount * V(s') - Q_i(s, a))^2 ]
    dynamics     L_T  = sum_m E[ |mu_m - y|^2 / sigma_m^2 + log sigma_m^2 ], y = (s' - s, r)
    PPO          L_pi = -E[ min(rho * A, clip(rho, 1 - clip_ratio, 1 + clip_ratio) * A) ],
     offline     rho  = pi(a | s) / pi_k(a | s), a ~ pi_k(s), A = min_i Q_i(s, a) - V(s), normalised
     online      as in ppo.py, from the member with the highest J and the offline V
    AM-Q         J(pi) = E[ sum_t min_i Q_i(s_t, pi(s_t)) ] over `horizon` steps in the model; the
                 reference pi_k becomes pi where J(pi) > J(pi_k), asked every amq_interval updates

    python algorithms/uni_o4.py                                                    # all phases
    python algorithms/uni_o4.py --online-steps 0 --dataset mujoco/hopper/medium-v0  # offline only
    python algorithms/uni_o4.py --dataset "" --env-id Hopper-v5 --shift friction=0.4,mass=1.3

The last is the paper's sim-to-real story: a policy trained in the plain world plays in one of other
physics (where it is evaluated from the beginning) for collect_steps, is improved offline on these
data alone, and fine-tuned there.

Deviations from the paper or its code; where (c) stands, presets *-code do as the code does
 1. AM-Q asks candidate and incumbent from the same states with the same noise, sums Q, and deploys
    the last accepted policy; theirs averages Q over the rows alive, compares with the best score
    ever seen, deploys the last policy (c, and in mazes). Every elite steps as many rows.
 2. `heuristic`, the diversity term, is theirs: with a constant denominator its gradient is that of
    cloning again, which Adam scales away. `specialise` works, but is nobody's published setting.
 3. AM-Q alone chooses the member; theirs is the best of three by its score in the environment.
 4. A time limit is no termination. Actions are clipped before Q sees them; PPO scores raw ones.
 5. Online the log-std passes tanh once, V's change is not clipped; theirs: twice, by 0.05 (c).
 6. One reward scale serves all phases; no running scale, V is not fitted again. Without a dataset
    observations are as they are.
 7. IQL's critics everywhere; two of their scripts use SARSA and Monte-Carlo. Orthogonal layers with
    gain sqrt(2), but small outputs of the policies, whose std begins at 0.5 (theirs 0.08).
 8. The model sees the agent's units, divided by the data's std plus 1e-3 (theirs: 1e-10), its
    members all rows (theirs: a bootstrap sample each); rounds cut epochs. The offline clip is
    constant (theirs from update 200 on). Members are cloned side by side.
 9. A preset has one horizon and rate of those searched; ours: ogbench, pointmaze; mazes, kitchen
    and relocate online.
10. Rounds begin with fresh episodes, the last ones are cut off, as by a time limit.
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
from functools import lru_cache, partial
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
    dataset: str = "hopper/sac-medium-replay-v0"  # Minari id, on this machine; "": make one
    env_id: str = ""  # Gymnasium id; default: the dataset's evaluation environment
    shift: str = ""  # changed physics, see ShiftedPhysics: friction=0.4,mass=1.3,delay=1
    pretrain_steps: int = 1_000_000  # without a dataset: environment steps in the plain world
    collect_steps: int = 180_224  # without a dataset: environment steps that make it
    cloning_steps: int = 400_000  # updates of the policies by behaviour cloning
    critic_steps: int = 2_000_000  # updates of Q and V
    dynamics_steps: int = 500_000  # updates of the model, at most; see model_patience
    offline_steps: int = 10_000  # updates of the policies by PPO
    online_steps: int = 1_000_000  # environment steps after that, per seed
    interval: int = 10_240  # updates or environment steps per round, whole rollouts
    offline_interval: int = 1_000  # updates by PPO per round, a multiple of amq_interval
    eval_episodes: int = 10  # per evaluation and seed; more than 10 in tens
    run_dir: str = ""  # folder of this run; default: runs/<script>/<dataset>/seed<seed>
    init_from: str = ""  # folder of a finished run: skip all but the last phase, use its agents
    wandb: bool = False  # also log to Weights & Biases
    # Data and optimisation
    normalize_observations: bool = False  # by the dataset's mean and standard deviation
    normalize_returns: bool = False  # rewards times 1000 / (max - min return in the dataset)
    reward_scale: float = 1.0  # r <- reward_scale * r + reward_shift, after the above
    reward_shift: float = 0.0  # see reward_scale
    successes_only: bool = False  # clone only rows from which a scaled reward >= 0 is reached
    batch_size: int = 512  # transitions per offline update
    discount: float = 0.99  # per step
    tau: float = 0.005  # target critic: fraction of the new critic, every second update
    hidden_dims: tuple[int, ...] = (256, 256, 256)  # widths of the policies
    activation: Literal["relu", "tanh"] = "relu"  # of the policies' hidden layers
    critic_hidden_dims: tuple[int, ...] = (1024, 1024)  # widths of Q
    value_hidden_dims: tuple[int, ...] = (512, 512, 512)  # widths of V
    learning_rate: float = 1e-4  # Adam, critics and cloning
    # Supervised
    num_members: int = 4  # policies
    diversity: Literal["heuristic", "specialise"] = "heuristic"  # see deviation 2
    diversity_weight: float = 0.1  # of the diversity term
    expectile: float = 0.7  # of IQL's V
    model_hidden_dims: tuple[int, ...] = (200, 200, 200, 200)  # widths of the dynamics model
    model_learning_rate: float = 1e-3  # Adam, model
    model_batch_size: int = 256  # transitions per update of the model
    model_patience: int = 5  # epochs without an improvement by 1 % after which the model stops
    num_models: int = 7  # members of the model's ensemble
    num_elites: int = 5  # of them, those that AM-Q uses
    # Offline improvement
    improvement_learning_rate: float = 1e-4  # Adam, falls linearly to 0
    improvement_clip_ratio: float = 0.245  # of the probability ratio, from 1
    amq: Literal["paper", "code"] = "paper"  # see deviation 1
    amq_interval: int = 100  # updates between two queries
    amq_starts: int = 510  # dataset states per query, a multiple of num_elites
    horizon: int = 1000  # steps of a rollout in the model
    termination: Literal["", "hopper", "walker2d", "halfcheetah", "pen", "maze"] = ""  # of rollouts
    # PPO online
    rollout_steps: int = 2_048  # environment steps between two improvements
    minibatch_size: int = 128  # transitions per online update
    epochs: int = 10  # passes over a rollout
    clip_ratio: float = 0.05  # of the probability ratio, from 1
    value_clip: float = 0.0  # of the change of V between two rollouts, in its units; 0: none
    gae_lambda: float = 0.95  # of the advantages
    entropy_weight: float = 0.01  # of the entropy bonus
    max_grad_norm: float = 0.5  # of the policies' PPO and of V online
    online_learning_rate: float = 2e-5  # Adam, policy; falls linearly to 0 over online_steps
    value_learning_rate: float = 2e-4  # Adam, V; falls as well
    squash_std_twice: bool = False  # tanh once more on the log-std, as in the authors' code

    @property
    def buffer_size(self):
        """The buffer holds one rollout or, without a dataset, what is collected."""
        return self.rollout_steps if self.dataset else self.collect_steps

    @property
    def num_minibatches(self):
        """Updates per pass over a rollout."""
        return self.rollout_steps // self.minibatch_size


CPU = dict(  # what a CPU does in minutes
    cloning_steps=10_000, critic_steps=30_000, dynamics_steps=4_000, offline_steps=2_000,
    online_steps=100_000, critic_hidden_dims=(256, 256), value_hidden_dims=(256, 256), horizon=100,
    offline_interval=500, collect_steps=51_200)  # fmt: skip
CODE = dict(amq="code", squash_std_twice=True, value_clip=0.05)
LARGE_MODEL = dict(model_hidden_dims=(400,) * 4, model_learning_rate=3e-4)
CHANGES = (  # a preset, the one it inherits from, what it changes; special ones behind general ones
    ("mujoco", "", dict(normalize_observations=True, online_learning_rate=3e-5, epochs=30)),
    ("hopper", "", dict(normalize_observations=True, reward_scale=0.1, termination="hopper")),
    ("hopper/medium-expert", "hopper", dict(online_learning_rate=6e-6, epochs=5)),
    ("sac-medium-replay", "hopper", CPU),
    ("walker2d", "mujoco", dict(termination="walker2d")),
    ("walker2d/medium", "walker2d", dict(dynamics_steps=117_210)),  # 30 epochs
    ("walker2d/medium-expert", "walker2d", dict(online_learning_rate=2e-5)),
    ("walker2d/medium-replay", "walker2d", dict(critic_steps=500_000)),
    ("halfcheetah", "mujoco", dict(activation="tanh", reward_scale=0.1, termination="halfcheetah")),
    ("halfcheetah/medium-expert", "halfcheetah",
     dict(activation="relu", online_learning_rate=2e-5, epochs=10)),
    ("halfcheetah/medium-replay", "halfcheetah", dict(normalize_observations=False, epochs=20)),
    ("adroit", "", dict(improvement_learning_rate=1e-5, online_learning_rate=8e-6, horizon=50,
                        minibatch_size=256, model_patience=10, **LARGE_MODEL)),
    ("handpen", "adroit", dict(reward_scale=0.1, termination="pen", online_learning_rate=6e-6)),
    ("pen/human", "handpen",
     dict(cloning_steps=200_000, critic_steps=1_000_000, model_patience=20)),
    ("hammer", "adroit", dict(reward_scale=0.1, normalize_observations=True, activation="tanh")),
    ("hammer/human", "hammer", dict(model_patience=20)),  # few rows
    ("relocate", "adroit", dict(activation="tanh")),
    ("relocate/human", "relocate", dict(model_patience=20)),
    ("door/human", "adroit", dict(offline_steps=5_000, improvement_clip_ratio=0.24,
                                  model_patience=20)),
    ("kitchen", "", dict(cloning_steps=200_000, critic_steps=1_000_000, offline_steps=1_000,
                         offline_interval=100, improvement_learning_rate=1e-5, horizon=4,
                         improvement_clip_ratio=0.2, model_patience=20,
                         normalize_observations=True, **LARGE_MODEL)),
    ("kitchen/complete", "kitchen", dict(cloning_steps=100_000, critic_steps=500_000, horizon=10,
                                         normalize_observations=False)),
    ("maze", "", dict(reward_scale=10.0, reward_shift=-5.0, expectile=0.9, horizon=70,
                      critic_hidden_dims=(256,) * 3, value_hidden_dims=(256,) * 3,
                      improvement_learning_rate=3e-5, amq="code", termination="maze",
                      successes_only=True, eval_episodes=50, interval=51_200, **LARGE_MODEL)),
    ("antmaze/large", "maze", dict(horizon=200)),
    ("antmaze/medium", "maze", dict(horizon=150)),
    ("antmaze/umaze-diverse", "maze", dict(model_hidden_dims=(200,) * 4, model_learning_rate=1e-3)),
    ("ogbench", "maze", dict(reward_shift=0.0, termination="")),
)  # fmt: skip
PRESETS = {}  # auto: the first whose name is in the dataset's or the environment's, else mujoco
for preset, parent, changes in CHANGES:
    PRESETS = {preset: PRESETS.get(parent, {}) | changes} | PRESETS
PRESETS |= {f"{name}-code": settings | CODE for name, settings in PRESETS.items()}
INIT_FROM = ("uni_o4",)  # scripts whose agents --init-from takes
METRICS = {  # the algorithm's own columns of metrics.csv, with their healthy range
    "cloning_loss": "negative log-likelihood of the members (nats), mean; falls, then flat",
    "expectile_loss": "expectile loss of the offline V (scaled reward units squared)",
    "critic_loss": "squared TD error, summed over critics; bounded, may grow with q",
    "q": "mean Q of the batch; near or above the dataset's discounted return, never far above",
    "dynamics_loss": "negative log-likelihood (nats, without constants), summed over models; falls",
    "model_error": "squared hold-out error of the elites, mean over dimensions; falls",
    "advantage": "mean of Q - V at the references' actions; below 0 for expectile > 0.5",
    "amq": "AM-Q of the candidates, mean over members and queries; rises. Huge: a shorter horizon",
    "amq_incumbent": "AM-Q of what they are compared with; rises",
    "accepted": "share of candidates that became references; 0: model or horizon are broken",
    "actor_loss": "clipped surrogate, negated; slightly below 0, the advantages being normalised",
    "value_loss": "squared error of V (scaled reward units squared)",
    "v": "mean V of the rollout; towards the discounted return",
    "ratio_clipped": "share of ratios outside the clip; online 0.05 ... 0.3",
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


def ensemble(network, size):
    """`size` networks of a class, each with its own parameters: their outputs are (N, ...)."""
    axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "in_axes": None}
    return nn.vmap(network, axis_size=size, **axes)


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


def clipped_adam(learning_rate, config):
    """Adam behind a bound on the gradient's norm; its rate falls linearly over online_steps."""
    rollouts = config.online_steps // config.rollout_steps
    num_updates = max(1, rollouts * config.epochs * config.num_minibatches)
    rate = optax.linear_schedule(learning_rate, 0.0, num_updates)
    bound = optax.clip_by_global_norm(config.max_grad_norm)
    return optax.chain(bound, optax.adam(rate, eps=1e-5))


@flax.struct.dataclass
class Agent:
    """All that training changes. Outside the losses with a leading axis of seeds, (S, ...); what
    belongs to the N members or M models has their axis next."""

    references: TrainState  # N policies: pi_k, at first the behaviour-cloned ones
    members: TrainState  # N policies: the candidates
    scores: jax.Array  # (N,), AM-Q of the references
    critic: TrainState
    target_critic_params: Any
    offline_value: TrainState
    dynamics: TrainState  # M models, and the two bounds (O + 1,) of log-variances that they share
    best_models: Any  # parameters of the models at their best hold-out error
    best_errors: jax.Array  # (M,), the hold-out errors then
    stale_epochs: jax.Array  # (), epochs without an improvement of any model
    input_mean: jax.Array  # (O + A,), of the models' inputs
    input_std: jax.Array  # (O + A,)
    actor: TrainState  # the chosen member's policy: what is evaluated, and trained online
    value: TrainState  # V online
    key: jax.Array


def create_agent(key, observation, action, config):
    """A fresh agent from its random key (2,), an observation (1, O) and an action (1, A)."""
    key, members_key, critic_key, value_key, models_key = jax.random.split(key, 5)
    sizes = config.hidden_dims, action.shape[1], config.activation
    policy = BoundedGaussianPolicy(*sizes)
    actor = BoundedGaussianPolicy(*sizes, config.squash_std_twice)
    critic = ensemble(Value, 2)(config.critic_hidden_dims)
    value = Value(config.value_hidden_dims)
    model = DynamicsModel(config.model_hidden_dims, observation.shape[1] + 1)
    inputs = jnp.concatenate([observation, action], axis=1)  # (1, O + A)
    member_keys = jax.random.split(members_key, config.num_members)  # (N, 2)
    model_keys = jax.random.split(models_key, config.num_models)  # (M, 2)
    policies = jax.vmap(policy.init, (0, None))(member_keys, observation)
    models = jax.vmap(model.init, (0, None))(model_keys, inputs)
    ones = jnp.ones(observation.shape[1] + 1)  # (O + 1,)
    dynamics = {"models": models, "high": 0.5 * ones, "low": -10.0 * ones}
    critic_params = critic.init(critic_key, observation, action)
    value_params = value.init(value_key, observation)
    make, copy = TrainState.create, partial(jax.tree.map, jnp.copy)
    adam, model_adam = optax.adam(config.learning_rate), optax.adam(config.model_learning_rate)
    actor_adam = clipped_adam(config.online_learning_rate, config)
    value_adam = clipped_adam(config.value_learning_rate, config)
    rate = config.improvement_learning_rate, 0.0, max(1, config.offline_steps)
    bound = optax.clip_by_global_norm(config.max_grad_norm)
    ppo = optax.chain(bound, optax.adam(optax.linear_schedule(*rate)))
    members = jax.vmap(partial(make, apply_fn=policy.apply, tx=ppo))(params=copy(policies))
    first = jax.tree.map(lambda x: x[0], policies)
    return Agent(
        references=make(apply_fn=policy.apply, params=policies, tx=adam),
        members=members,
        scores=jnp.full(config.num_members, -1e9),
        critic=make(apply_fn=critic.apply, params=critic_params, tx=adam),
        target_critic_params=copy(critic_params),
        offline_value=make(apply_fn=value.apply, params=value_params, tx=adam),
        dynamics=make(apply_fn=model.apply, params=dynamics, tx=model_adam),
        best_models=copy(models),
        best_errors=jnp.full(config.num_models, 1e9),
        stale_epochs=jnp.zeros((), jnp.int32),
        input_mean=jnp.zeros(inputs.shape[1]),
        input_std=jnp.ones(inputs.shape[1]),
        actor=make(apply_fn=actor.apply, params=first, tx=actor_adam),
        value=make(apply_fn=value.apply, params=copy(value_params), tx=value_adam),
        key=key,
    )


# ------------------------------------------------------------------------------ Losses and update
# A loss takes first the parameters it differentiates, and returns (loss, metrics).
def cloning_loss(params, agent, batch, key, config):
    """Negative log-likelihood of the data's actions and the diversity term, summed over members."""

    def one_policy(params):
        return agent.references.apply_fn(params, batch.observations).log_prob(batch.actions)

    log_prob = jax.vmap(one_policy)(params)  # (N, B)
    own = jnp.eye(config.num_members, dtype=bool)[:, :, None]  # (N, N, 1)
    best_other = jnp.where(own, -jnp.inf, log_prob).max(axis=1)  # (N, B)
    weight = config.diversity_weight
    if config.diversity == "specialise":  # who is best at a row learns more from it
        weight = jnp.where(log_prob >= best_other, weight, -weight)  # (N, B)
        loss = -(1.0 + weight) * log_prob  # (N, B)
    else:  # what is constant here has no gradient; what remains is log_prob once more
        loss = -log_prob - weight * (log_prob - jax.lax.stop_gradient(best_other))  # (N, B)
    return loss.mean(axis=1).sum(), {"cloning_loss": -log_prob.mean()}


def expectile_loss(params, agent, batch, key, config):
    """IQL's V: an upper expectile of the target Q of dataset actions."""
    q = agent.critic.apply_fn(agent.target_critic_params, batch.observations, batch.actions)
    v = agent.offline_value.apply_fn(params, batch.observations)  # (B,)
    u = q.min(axis=0) - v  # (B,), q is (K, B)
    weight = jnp.abs(config.expectile - (u < 0))  # (B,), |expectile - 1(u < 0)|
    loss = (weight * u**2).mean()
    return loss, {"expectile_loss": loss}


def critic_loss(params, agent, batch, key, config):
    """IQL's Q: regression on r + discount * V(s'), summed over critics."""
    v = agent.offline_value
    next_v = v.apply_fn(v.params, batch.next_observations)  # (B,)
    target_q = batch.rewards + config.discount * batch.masks * next_v  # (B,)
    q = agent.critic.apply_fn(params, batch.observations, batch.actions)  # (K, B)
    loss = ((q - target_q[None]) ** 2).mean(axis=1).sum()
    return loss, {"critic_loss": loss, "q": q.mean()}


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


@flax.struct.dataclass
class Sample:
    """What the steps of a rollout say to the losses."""

    observations: jax.Array  # (B, O)
    actions: jax.Array  # (B, A), before they were clipped to the box
    log_probs: jax.Array  # (B,), under the policy that took them
    advantages: jax.Array  # (B,), normalised
    values: jax.Array  # (B,), V before the update
    returns: jax.Array  # (B,), what V regresses on


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


def clone(agent, batch, config):
    """One update of the behaviour-cloned policies, on a shared batch."""
    references, info = gradient_step(agent.references, cloning_loss, agent, batch, None, config)
    first = jax.tree.map(lambda x: x[0], references.params)  # what is evaluated meanwhile
    return agent.replace(references=references, actor=agent.actor.replace(params=first)), info


def fit_critics(agent, batch, config):
    """One update of IQL: V, Q at the new V, and in every second update the target Q."""
    value, info = gradient_step(agent.offline_value, expectile_loss, agent, batch, None, config)
    agent = agent.replace(offline_value=value, value=agent.value.replace(params=value.params))
    critic, critic_info = gradient_step(agent.critic, critic_loss, agent, batch, None, config)
    tau = jnp.where(critic.step % 2 == 0, config.tau, 0.0)
    target = optax.incremental_update(critic.params, agent.target_critic_params, tau)
    return agent.replace(critic=critic, target_critic_params=target), info | critic_info


def fit_dynamics(agent, batch, config):
    """One update of the M models, each on its part (B, ...) of the batch (M * B, ...)."""
    shape = config.num_models, config.model_batch_size
    batch = jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), batch)  # (M, B, ...)
    dynamics, info = gradient_step(agent.dynamics, dynamics_loss, agent, batch, None, config)
    return agent.replace(dynamics=dynamics), info


def improve_members(agent, batch, config):
    """One PPO update of every member, on dataset states and what its reference does there."""
    key, noise_key = jax.random.split(agent.key)
    keys = jax.random.split(noise_key, config.num_members)  # (N, 2)
    offline = dict(clip_ratio=config.improvement_clip_ratio, entropy_weight=0.0)
    offline, x = dataclasses.replace(config, **offline), batch.observations
    v = agent.offline_value.apply_fn(agent.offline_value.params, x)  # (B,)

    def one_member(member, reference, key):
        policy = member.apply_fn(reference, x)
        actions = policy.sample(seed=key)  # (B, A)
        q = agent.critic.apply_fn(agent.critic.params, x, jnp.clip(actions, -1.0, 1.0))  # (K, B)
        raw = q.min(axis=0) - v  # (B,)
        advantages = (raw - raw.mean()) / (raw.std() + 1e-10)  # (B,)
        samples = Sample(x, actions, policy.log_prob(actions), advantages, v, v)
        inputs = agent.replace(actor=member), samples, None, offline
        member, info = gradient_step(member, actor_loss, *inputs)
        return member, info | {"advantage": raw.mean()}

    members, info = jax.vmap(one_member)(agent.members, agent.references.params, keys)
    return agent.replace(members=members, key=key), jax.tree.map(jnp.mean, info)


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


# --------------------------------------------------------------------------- Dynamics model, AM-Q
def judge_models(agent, held, config):
    """Keep the parameters of every model whose error on hold-out rows has fallen by more than 1 %,
    as long as there is patience."""
    many = jax.tree.map(lambda x: jnp.stack([x] * config.num_models), held)  # (M, B, ...)
    mean, _ = predict(agent, agent.dynamics.params, many.observations, many.actions)
    errors = ((mean - model_targets(many)) ** 2).mean(axis=(1, 2))  # (M,)
    better = (errors < 0.99 * agent.best_errors) & (agent.stale_epochs < config.model_patience)
    keep = partial(jax.vmap(jnp.where), better)
    return agent.replace(
        best_models=jax.tree.map(keep, agent.dynamics.params["models"], agent.best_models),
        best_errors=keep(errors, agent.best_errors),
        stale_epochs=jnp.where(better.any(), 0, agent.stale_epochs + 1),
    )


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


def amq_scores(agent, params, key, states, units, config):
    """AM-Q (N,) of N policies, from P of the dataset's states (D, O). The paper's: asked with the
    same key, policies start from the same states and meet the same noise."""
    elites = jnp.argsort(agent.best_errors)[: config.num_elites]  # (E,)
    models = jax.tree.map(lambda x: x[elites], agent.best_models)
    models = agent.dynamics.params | {"models": models}

    def one_policy(params, key):
        def step(carry, key):
            x, alive = carry  # (P, O), (P,)
            actions = jnp.clip(agent.references.apply_fn(params, x).mean(), -1.0, 1.0)  # (P, A)
            q = agent.critic.apply_fn(agent.critic.params, x, actions).min(axis=0)  # (P,)
            alive &= jnp.isfinite(q)  # a model may run away
            order_key, noise_key = jax.random.split(key)
            order = jax.random.permutation(order_key, len(x))  # every elite steps as many rows
            order = order.reshape(config.num_elites, -1)  # (E, P / E)
            mean, log_var = predict(agent, models, x[order], actions[order])  # (E, P / E, O + 1)
            change = mean + jnp.exp(0.5 * log_var) * jax.random.normal(noise_key, mean.shape)
            following = x.at[order].add(change[..., :-1])  # (P, O)
            raw = (following - units[1]) / units[0]  # (P, O)
            goes_on = alive & ~terminated(raw, config.termination) & jnp.isfinite(raw).all(axis=1)
            following = jnp.where(goes_on[:, None], following, x)  # (P, O)
            return (following, goes_on), (jnp.where(alive, q, 0.0).sum(), alive.sum())

        rows_key, key = jax.random.split(key)
        x = states[jax.random.randint(rows_key, (config.amq_starts,), 0, len(states))]  # (P, O)
        begin, keys = (x, jnp.ones(len(x), bool)), jax.random.split(key, config.horizon)
        _, (q, count) = jax.lax.scan(step, begin, keys)  # (H,), (H,)
        return q.sum() / (len(x) if config.amq == "paper" else count.sum())

    keys = jax.random.split(key, config.num_members)  # (N, 2)
    keys = jnp.broadcast_to(key, keys.shape) if config.amq == "paper" else keys
    return jax.vmap(one_policy)(params, keys)


def query(agent, states, units, config):
    """Ask AM-Q whether the members may become their own references, and choose whom to deploy."""
    key, amq_key = jax.random.split(agent.key)
    members, references = agent.members.params, agent.references.params
    ask = partial(amq_scores, key=amq_key, states=states, units=units, config=config)
    scores, incumbent = ask(agent, members), ask(agent, references)  # (N,), (N,)
    if config.amq == "code":  # the best score ever, and at first the reference's
        incumbent = jnp.where(agent.scores > -1e9, agent.scores, incumbent)
    better = scores > incumbent  # (N,)
    keep = partial(jax.vmap(jnp.where), better)
    references, kept = jax.tree.map(keep, (members, scores), (references, incumbent))
    candidates, judged = (references, kept) if config.amq == "paper" else (members, scores)
    params = jax.tree.map(lambda x: x[jnp.argmax(judged)], candidates)
    agent = agent.replace(
        references=agent.references.replace(params=references),
        scores=kept,
        actor=agent.actor.replace(params=params),
        key=key,
    )
    info = {"amq": scores, "amq_incumbent": incumbent, "accepted": 1.0 * better}
    return agent, jax.tree.map(jnp.mean, info)


@partial(jax.jit, static_argnames=("function", "config"), donate_argnames="agents")
def every_seed(agents, function, *arguments, config):
    """`function(agent, *arguments, config)` for every agent."""
    return for_each_seed(lambda agent: function(agent, *arguments, config), agents)


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


# ----------------------------------------------------------------------------------------- Phases
def phases(config):
    """The run, phase by phase: name, number of steps, and what one round of them does."""
    if config.interval % config.rollout_steps or config.rollout_steps % config.minibatch_size:
        raise SystemExit("--interval, --rollout-steps, --minibatch-size: multiples of the next")
    if config.amq_starts % config.num_elites or config.num_elites > config.num_models:
        raise SystemExit("--amq-starts: a multiple of --num-elites, which is at most --num-models")
    cloning, fitting = (partial(offline_round, update=x) for x in (clone, fit_critics))
    if config.dataset:
        yield "clone", config.cloning_steps, partial(on_own_rows, cloning, successes=True)
    else:
        if config.num_seeds > 1 or config.online_steps < config.collect_steps:
            raise SystemExit("no --dataset: --num-seeds 1, --collect-steps up to --online-steps")
        yield "pretrain", config.pretrain_steps, pretrain_round
        yield "collect", config.collect_steps, collect_round
    yield "critic", config.critic_steps, partial(on_own_rows, fitting)
    yield "dynamics", config.dynamics_steps, partial(on_own_rows, dynamics_round)
    yield "offline", config.offline_steps, partial(on_own_rows, improvement_round)
    yield "online", config.online_steps, on_policy_round


def shorter_rounds(rounds, config):
    """The rounds of `main`; those of the offline PPO are of `offline_interval` updates."""
    for phase, train, first, last in rounds:
        size = config.offline_interval if phase == "offline" else config.interval
        for begin in range(first, max(last, 1), size):
            yield phase, train, begin, min(begin + size, last)


@lru_cache
def pretraining(config):
    """Mostly ppo.py's settings, for a policy from nothing; its optimisers of policy and V. Cached:
    for jit another optimiser is another program."""
    settings = dict(clip_ratio=0.2, value_clip=0.0, entropy_weight=0.0, epochs=10)
    config = dataclasses.replace(config, online_steps=config.pretrain_steps, **settings)
    return config, clipped_adam(3e-4, config), clipped_adam(1e-3, config)


def pretrain_round(agents, buffers, run, first, last):
    """PPO from nothing in the world without --shift; between rounds with the later optimisers."""
    config, dataset, envs, bar = run
    plain = envs.env_fns[0].args[0] | {"environment": gym.make(config.env_id).spec.to_json()}
    envs = gym.vector.SyncVectorEnv([partial(make_env, plain)], autoreset_mode=envs.autoreset_mode)
    config, actor_adam, value_adam = pretraining(config)
    later_actor, later_value = agents.actor.tx, agents.value.tx
    actor, value = agents.actor.replace(tx=actor_adam), agents.value.replace(tx=value_adam)
    agents, run = agents.replace(actor=actor, value=value), (config, dataset, envs, bar)
    agents, buffers, info = on_policy_round(agents, buffers, run, first, last)
    actor, value = agents.actor.replace(tx=later_actor), agents.value.replace(tx=later_value)
    return agents.replace(actor=actor, value=value), buffers, info


def collect_round(agents, buffers, run, first, last):
    """The policy plays, without an update. It is what all members will start from."""
    play = partial(online_round, update=improve, warmup=last)
    agents, buffers, info = play(agents, buffers, run, first, last)
    copies = [agents.actor.params] * run[0].num_members
    many = jax.tree.map(lambda *xs: jnp.stack(xs, axis=1), *copies)  # (S, N, ...)
    references = agents.references.replace(params=many)
    return agents.replace(references=references), buffers, info


def on_own_rows(train, agents, buffers, run, first, last, successes=False):
    """A round of `train` on the dataset or, where there is none, on the rows collected. With
    `successes` and --successes-only on those up to their episode's last success."""
    config, dataset, *rest = run
    if not config.dataset:
        dataset = jax.tree.map(lambda x: x[0], buffers)
        dataset = dataset.replace(actions=jnp.clip(dataset.actions, -1.0, 1.0))  # stored raw
    if successes and config.successes_only:
        begins, rewards = np.flatnonzero(dataset.ends)[:-1] + 1, np.asarray(dataset.rewards)
        episodes = np.split(rewards >= 0.0, begins)  # in NumPy: JAX compiles for every length
        ahead = np.concatenate([x[::-1].cumsum()[::-1] > 0 for x in episodes])  # (D,)
        if not ahead.any():
            raise SystemExit("--successes-only: no reward of the dataset, scaled, is 0 or more")
        dataset = jax.tree.map(lambda x: x[ahead], dataset)
    return train(agents, buffers, (config, dataset, *rest), first, last)


def dynamics_round(agents, buffers, run, first, last):
    """Updates of the models, and after every epoch a look at hold-out rows. Once no model has
    improved for `model_patience` epochs, nothing happens any more."""
    config, dataset, envs, bar = run
    count = len(dataset.rewards)
    order = np.random.default_rng(0).permutation(count)
    holdout = min(max(1, count // 5), 1000)
    held = jax.tree.map(lambda x: x[order[:holdout]], dataset)
    rows = jax.tree.map(lambda x: x[order[holdout:]], dataset)
    x = jnp.concatenate([rows.observations, rows.actions], axis=1)  # (D, O + A)
    std = jnp.where(x.std(axis=0) < 1e-12, 1.0, x.std(axis=0))  # (O + A,)
    mean, std = (jnp.tile(y, (config.num_seeds, 1)) for y in (x.mean(axis=0), std))
    agents, losses, updates = agents.replace(input_mean=mean, input_std=std), [], 0
    wide = dataclasses.replace(config, batch_size=config.num_models * config.model_batch_size)
    run = wide, rows, envs, bar
    for begin in range(first, last, epoch := -(-count // config.model_batch_size)):
        if (agents.stale_epochs >= config.model_patience).all():
            bar.update(last - begin)
            break
        end = min(begin + epoch, last)
        agents, _, info = offline_round(agents, buffers, run, begin, end, update=fit_dynamics)
        agents = every_seed(agents, judge_models, held, config=config)
        losses.append(info["dynamics_loss"])
        updates += end - begin
    errors = np.sort(agents.best_errors, axis=1)[:, : config.num_elites]  # (S, E)
    means = {"dynamics_loss": np.mean(losses, axis=0)} if losses else {}
    return agents, buffers, means | {"model_error": errors.mean(axis=1), "updates": updates}


def improvement_round(agents, buffers, run, first, last):
    """Updates of the members, and after every `amq_interval` of them a query of AM-Q."""
    config, dataset, envs, _ = run
    source, infos = envs.env_fns[0].args[0], []  # what `main` has made the environments from
    units = [jnp.float32(x) for x in source["units"]["observations"]]
    if first == 0:
        params = jax.tree.map(jnp.copy, agents.references.params)
        agents = agents.replace(members=agents.members.replace(params=params))
    for begin in range(first, last, config.amq_interval):
        end = min(begin + config.amq_interval, last)
        agents, _, info = offline_round(agents, buffers, run, begin, end, update=improve_members)
        inputs = query, dataset.observations, units
        agents, judgement = every_seed(agents, *inputs, config=config)
        infos.append(info | jax.device_get(judgement))
    means = {name: np.mean([info[name] for info in infos], axis=0) for name in infos[0]}
    return agents, buffers, means | {"updates": last - first}


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
    rounds = [*shorter_rounds(rounds, config)]
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
