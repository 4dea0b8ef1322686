"""Policy-agnostic RL (PA-RL): one actor-critic method for any class of policy.

Most offline-to-online methods send the critic's gradient through the policy, or need its density.
PA-RL needs samples and a supervised loss. The critic improves actions, not parameters: the best of
several samples are kept (globally) and climb Q (locally). The policy imitates the result, pi*.

    Mark, Gao, Sampaio, Srirama, Sharma, Finn, Kumar: Policy Agnostic RL ..., arXiv 2412.06685

    global step  A_k(s)  = the kept_actions best by mean_i Q_i(s, a) of base_actions a ~ pi(s)
    local step   a'      = clip(a + ascent_rate * grad_a mean_i Q_i(s, a)), ascent_steps times for
                 each a in A_k(s); of all its positions the best by mean_i Q_i stays
    select       pi*(a | s) = softmax of mean_i Q_i(s, a') over the actions a', or the best one
    actor        L_pi    = E[ the policy's own loss of a* ~ pi*(s) ], a in place of A_k(s)'s worst
    critic       L_Q     = E[ error(Q_i(s, a), r + discount * max_j min_n Qtarget_n(s', a*_j)) ]
                 + cql_alpha * D, a*_j ~ pi*(s'), over all i; n: a random pair of critics
    value error  error(Q, y) = (Q - y)^2, or the cross-entropy of Q's histogram (HL-Gauss)
    difference   D       = E[ log mean_j exp Q_n(s, a_j) - Q_n(s, a) ], Cal-QL's: a_j uniform, from
                 pi*(s'), pi*(s) and the data, max(Q_n, Monte-Carlo return) for those of pi*
    value        L_V     = E[ |expectile - 1(u < 0)| u^2 ], u = min_n Qtarget_n(s, a) - V(s), with
                 --critic iql: the critic's target has V(s'), and there is no difference

    python algorithms/pa_rl.py  # on the repository's data, or: --policy transformer

The policy is cloned (pretrain), the critic learns with the policy frozen (offline), and then after
every episode as many distillations and then critic updates follow as it had steps (online).

Deviations from the authors' code (github.com/MaxSobolMark/PolicyAgnosticRL):
 1. Targets draw from the softmax, the paper's pi*; the release takes the best action
    (--target-selection argmax) and optimises s' twice, for target and D. In kitchen one flag of
    the release rules acting and evaluation; here episodes draw and evaluation is greedy.
 2. Masks are the data's, not read off rewards: they differ where success ends no episode (kitchen,
    D4RL's mazes). Mazes' cut episodes repeat their last reward for ever; there failed data's do.
 3. Critics share no output layer. Beyond a histogram's range its nearest end is the target. All
    critics count if there are no more than are drawn (with replacement). Q's and V's outputs begin
    with 1e-2 (there Q's and the layer before), diffusion's time and the transformer as Flax's.
 4. Tokens are sampled with fresh noise per dimension and without dropout. Evaluation's noise comes
    from the observations. Until the critic has learnt, the policy itself acts, and imitates data.
 5. Online time is counted in environment steps. Rounds begin with fresh episodes; the last ones are
    cut off, as by a time limit, and learnt from like finished ones.
 6. With --critic iql, whose release does not run, V has ReLUs, no LayerNorm, and learns before Q
    from a random pair of critics; tau 0.002, 2 layers there. RLPD, images, OpenVLA: not here.
 7. Ours: the Gaussian's settings, default run, presets of PointMaze, OGBench, Adroit, MuJoCo (the
    last two with a scalar Q: no bound is known). Kitchen's is not in the release: one rate for all.
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
    pretrain_steps: int = 3_000_000  # updates of the policy on the dataset, by cloning
    offline_steps: int = 1_000_000  # updates of the critic on the dataset after that
    online_steps: int = 500_000  # environment steps after that, per seed
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
    critic_hidden_dims: tuple[int, ...] = (256, 256, 256, 256)  # widths of the critics and of V
    learning_rate: float = 3e-4  # Adam, critics and V
    # Policy
    policy: Literal["diffusion", "transformer", "gaussian"] = "diffusion"  # its class
    hidden_dims: tuple[int, ...] = (256, 256)  # widths of the Gaussian
    policy_width: int = 256  # of diffusion's and the transformer's blocks
    policy_blocks: int | None = None  # of them; by default the class's, see POLICY_SETTINGS
    denoising_steps: int = 5  # of the diffusion
    action_bins: int = 128  # tokens per action dimension of the transformer
    attention_heads: int = 8  # of the transformer; they divide policy_width
    dropout_rate: float = 0.1  # in diffusion and transformer, while they learn
    cloning_learning_rate: float | None = None  # Adam, pretraining; by default the class's
    policy_learning_rate: float | None = None  # Adam, online; by default the class's
    policy_warmup: int = 2_000  # updates over which a policy's learning rate rises
    policy_tau: float | None = None  # sampled policy: fraction of the new one per update; 1: itself
    # Action optimisation
    base_actions: int = 32  # samples of the policy per state
    kept_actions: int = 10  # the best of them, at least 2: online the data's action replaces one
    ascent_steps: int = 10  # gradient steps on each action; 0: the global step alone
    ascent_rate: float = 3e-4  # of a gradient step, in the agent's action units
    target_selection: Literal["softmax", "argmax"] = "softmax"  # actions of targets and difference
    acting_selection: Literal["softmax", "argmax"] = "argmax"  # actions of training episodes
    # Critic
    critic: Literal["cal_ql", "iql"] = "cal_ql"  # what its target and its loss are
    num_critics: int = 10  # Q-functions
    target_critics: int = 2  # of them, drawn anew for every target: their minimum counts
    value_bins: int = 0  # of the histogram that stands for Q; 0: a scalar and squared errors
    value_range: tuple[float, float] = (-100.0, 0.0)  # of it: extreme rewards / (1 - discount)
    cql_alpha: float = 0.005  # weight of the difference
    num_actions: int = 10  # of each source of D, per state; those in s' are the target's, too
    offline_ratio: float = 0.5  # of a critic's online batch
    expectile: float = 0.7  # of V, with --critic iql
    return_rule: Literal["finite", "infinite", "sparse"] = "finite"  # see monte_carlo_returns
    failure_reward: float = 0.0  # of a failed step, environment's units (config.json: agent's)


POLICY_SETTINGS = {  # what a class of policy has where nothing else is given
    "policy_blocks": dict(diffusion=3, transformer=4, gaussian=0),
    "cloning_learning_rate": dict(diffusion=3e-4, transformer=1e-4, gaussian=3e-4),
    "policy_learning_rate": dict(diffusion=5e-5, transformer=1e-4, gaussian=1e-4),
    "policy_tau": dict(diffusion=0.002, transformer=1.0, gaussian=1.0),
}
MUJOCO_TASKS = dict(normalize_observations=True, normalize_returns=True, cql_alpha=0.01)
SPARSE = dict(value_bins=128, return_rule="infinite", eval_episodes=50, interval=50_000)
PRESETS = {  # auto: the first whose name is in the dataset's or the environment's, else mujoco
    "sac-medium-replay": MUJOCO_TASKS | dict(pretrain_steps=40_000, offline_steps=8_000,
        online_steps=4_000, interval=2_000, policy_warmup=1_000, policy_width=64, policy_blocks=2,
        attention_heads=4, base_actions=16, kept_actions=4, ascent_steps=5, num_actions=4, tau=0.02,
        critic_hidden_dims=(128, 128), num_critics=2, batch_size=64),  # a CPU does it in minutes
    "ogbench/cube-double": SPARSE | dict(value_range=(-200.0, 0.0)),  # -1 for every object
    "ogbench/scene": SPARSE | dict(value_range=(-500.0, 0.0)),
    "ogbench/puzzle": SPARSE | dict(value_range=(-900.0, 0.0)),  # of 3x3
    "ogbench": SPARSE,
    "maze": SPARSE | dict(reward_shift=-1.0, eval_episodes=100),  # antmaze, pointmaze
    "kitchen": dict(reward_shift=-4.0, value_bins=128, value_range=(-400.0, 0.0), eval_episodes=50,
        critic_hidden_dims=(512,) * 3, offline_steps=500_000, online_steps=280_000, interval=14_000,
        offline_ratio=0.25, policy_learning_rate=1e-5, acting_selection="softmax"),
    "adroit": dict(normalize_returns=True, cql_alpha=0.01, online_steps=200_000),
    "mujoco": MUJOCO_TASKS | dict(online_steps=200_000),
}  # fmt: skip
INIT_FROM = ("pa_rl",)  # scripts whose agents --init-from takes
METRICS = {  # the algorithm's own columns of metrics.csv, with their healthy range
    "actor_loss": "the policy's own supervised loss; falls while cloning, online it may rise a bit",
    "critic_loss": "TD part: squared error, or cross-entropy (nats), mean over critics; bounded",
    "difference": "soft maximum of Q minus Q of the data; falls, online it may rise for a while",
    "value_loss": "expectile loss of V, with --critic iql; small next to critic_loss",
    "q": "mean Q of the batch; below the discounted return, never far above",
    "below_return": "share of pi*'s actions whose Q is below the return, and counts as the return",
    "base_q": "mean Q of the policy's samples (with --critic iql these four are distillation's)",
    "kept_q": "mean Q of the best of them; the gap to base_q is what the global step gains",
    "optimised_q": "mean Q after the local steps; below kept_q only by the data's action (iql)",
    "moved": "mean change of an action's dimension by the local steps; far below 1",
}


# -------------------------------------------------------------------------------------- Networks
def orthogonal(key, shape, dtype=jnp.float32):
    """Orthogonal, gain sqrt(2); under vmap in turn, for XLA's batched QR can hang on few cores."""
    draw = partial(nn.initializers.orthogonal(2**0.5), shape=shape, dtype=dtype)
    return jax.custom_batching.sequential_vmap(draw)(key)


class Critic(nn.Module):
    """Q(s, a) or V(s): (B, F), ... -> a histogram's logits (B, Z), or a scalar (B, 1); near 0."""

    hidden_dims: tuple[int, ...]
    num_outputs: int = 1
    layer_norm: bool = False

    @nn.compact
    def __call__(self, *inputs):
        x = jnp.concatenate(inputs, axis=-1)  # (B, F)
        for width in self.hidden_dims:
            x = nn.Dense(width, kernel_init=orthogonal)(x)  # (B, width)
            x = nn.swish(nn.LayerNorm()(x)) if self.layer_norm else nn.relu(x)
        return nn.Dense(self.num_outputs, kernel_init=lambda *x: 1e-2 / 2**0.5 * orthogonal(*x))(x)


# -------------------------------------------------------------------------------------- Policies
# To add a class: a network with two methods, named in Config, POLICY_SETTINGS and create_agent.
#   sample(params, observations (B, O), key) -> actions (B, A) in [-1, 1]
#   loss(params, observations (B, O), actions (B, A), key) -> the supervised loss, a scalar
class DiffusionPolicy(nn.Module):
    """Denoising diffusion (DDPM), cosine schedule; IDQL's network predicts the noise (B, A)."""

    action_dim: int
    config: Config

    @nn.compact
    def __call__(self, observations, actions, step=0, training=False):
        width, dropout_rate = self.config.policy_width, self.config.dropout_rate
        step = jnp.broadcast_to(step, len(actions))[:, None]  # (B, 1)
        frequencies = self.param("frequencies", nn.initializers.normal(0.2), (64,))
        angles = 2 * jnp.pi * step * frequencies  # (B, 64)
        time = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)  # (B, 128)
        time = nn.Dense(128)(nn.swish(nn.Dense(256)(time)))  # (B, 128)
        x = jnp.concatenate([time, observations, actions], axis=-1)  # (B, 128 + O + A)
        x = nn.Dense(width, kernel_init=orthogonal)(x)  # (B, W)
        for _ in range(self.config.policy_blocks):
            block = nn.Dropout(dropout_rate, deterministic=not training)(x)
            block = nn.swish(nn.Dense(4 * width)(nn.LayerNorm()(block)))  # (B, 4 W)
            x = x + nn.Dense(width)(block)  # (B, W)
        return nn.Dense(self.action_dim, kernel_init=orthogonal)(nn.swish(x))  # (B, A)

    def schedule(self):
        """alpha and its running product, each (T,): what a noising step leaves of the signal."""
        steps = self.config.denoising_steps
        level = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2  # (T + 1,)
        alpha = 1 - np.minimum(1 - level[1:] / level[:-1], 0.999)  # (T,)
        return jnp.asarray(alpha), jnp.asarray(np.cumprod(alpha))

    def sample(self, params, observations, key):
        alpha, product = self.schedule()
        start_key, noise_key = jax.random.split(key)
        actions = jax.random.normal(start_key, (len(observations), self.action_dim))  # (B, A)

        def denoise(actions, step):
            noise = self.apply(params, observations, actions, step)
            mean = actions - (1 - alpha[step]) / jnp.sqrt(1 - product[step]) * noise
            mean = mean / jnp.sqrt(alpha[step])  # (B, A)
            fresh = jax.random.normal(jax.random.fold_in(noise_key, step), actions.shape)
            std = jnp.where(step > 0, jnp.sqrt(1 - alpha[step]), 0.0)
            return jnp.clip(mean + std * fresh, -1.0, 1.0), None

        return jax.lax.scan(denoise, actions, jnp.arange(len(alpha)), reverse=True)[0]

    def loss(self, params, observations, actions, key):
        step_key, noise_key, dropout_key = jax.random.split(key, 3)
        step = jax.random.randint(step_key, (len(actions),), 0, self.config.denoising_steps)  # (B,)
        signal = self.schedule()[1][step][:, None]  # (B, 1)
        noise = jax.random.normal(noise_key, actions.shape)  # (B, A)
        noisy = jnp.sqrt(signal) * actions + jnp.sqrt(1 - signal) * noise  # (B, A)
        guess = self.apply(params, observations, noisy, step, True, rngs={"dropout": dropout_key})
        return ((guess - noise) ** 2).sum(axis=-1).mean()


class TransformerPolicy(nn.Module):
    """Each action dimension is one of `action_bins` tokens: logits (B, A, V), from the observation
    and the ones before. With `decode` one at a time, (B, 1, V), while it remembers the others."""

    action_dim: int
    config: Config
    decode: bool = False

    @nn.compact
    def __call__(self, observations, actions, training=False, dimension=None):
        config, normal = self.config, nn.initializers.normal(0.02)
        width, rate = config.policy_width, config.dropout_rate
        dropout = partial(nn.Dropout, rate, deterministic=not training)
        options = dict(dropout_rate=rate, deterministic=not training, broadcast_dropout=False)
        heads = partial(nn.MultiHeadDotProductAttention, config.attention_heads, decode=self.decode)
        table = self.param("tokens", normal, (self.action_dim, config.action_bins, width))
        positions = self.param("positions", normal, (self.action_dim, width))
        first = nn.Dense(width)(nn.elu(nn.Dense(128)(observations)))  # (B, W)
        before = table[jnp.arange(self.action_dim), self.tokens(actions)][:, :-1]  # (B, A - 1, W)
        x = jnp.concatenate([first[:, None], before], axis=1) + positions  # (B, A, W)
        if dimension is not None:
            x = jax.lax.dynamic_slice_in_dim(x, dimension, 1, axis=1)  # (B, 1, W)
        x, causal = dropout()(x), None if self.decode else nn.make_causal_mask(actions)
        for _ in range(config.policy_blocks):
            x = x + dropout()(heads(**options)(nn.LayerNorm(1e-5)(x), mask=causal))
            block = nn.gelu(nn.Dense(4 * width)(nn.LayerNorm(1e-5)(x)))  # (B, A, 4 W)
            x = x + dropout()(nn.Dense(width)(block))
        features = nn.elu(nn.Dense(width)(nn.LayerNorm(1e-5)(x)))  # (B, A, W)
        return nn.Dense(config.action_bins)(features)  # (B, A, V)

    def tokens(self, actions):
        """The nearest bins (..., A) of actions (..., A)."""
        bins = self.config.action_bins
        return jnp.clip(jnp.round((actions + 1) / 2 * (bins - 1)), 0, bins - 1).astype(jnp.int32)

    def sample(self, params, observations, key):
        network = self.clone(decode=True)
        actions = jnp.zeros((len(observations), self.action_dim))  # (B, A)
        memory = jax.eval_shape(network.init, key, observations, actions)["cache"]
        memory = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), memory)

        def draw(carry, dimension):
            memory, actions = carry
            inputs = params | {"cache": memory}, observations, actions, False, dimension
            logits, new = network.apply(*inputs, mutable=["cache"])  # (B, 1, V)
            token = jax.random.categorical(jax.random.fold_in(key, dimension), logits[:, 0])  # (B,)
            action = token / (self.config.action_bins - 1) * 2.0 - 1.0  # (B,)
            return (new["cache"], actions.at[:, dimension].set(action)), None

        return jax.lax.scan(draw, (memory, actions), jnp.arange(self.action_dim))[0][1]

    def loss(self, params, observations, actions, key):
        logits = self.apply(params, observations, actions, True, rngs={"dropout": key})  # (B, A, V)
        errors = optax.softmax_cross_entropy_with_integer_labels(logits, self.tokens(actions))
        return errors.sum(axis=-1).mean()


class TanhPolicy(nn.Module):
    """A diagonal Gaussian, squashed by tanh. Actions beyond 0.99 count as 0.99: at 0.99999 tanh's
    inverse is 6.1, and to fit data clipped to the box the Gaussian would reach from end to end."""

    action_dim: int
    config: Config

    @nn.compact
    def __call__(self, x, actions=None):  # x: observations (B, O)
        for width in self.config.hidden_dims:
            x = nn.relu(nn.Dense(width, kernel_init=orthogonal)(x))  # (B, width)
        mean = nn.Dense(self.action_dim, kernel_init=orthogonal)(x)  # (B, A)
        log_std = nn.Dense(self.action_dim, kernel_init=orthogonal)(x)  # (B, A)
        gaussian = distrax.MultivariateNormalDiag(mean, jnp.exp(jnp.clip(log_std, -10.0, 2.0)))
        return distrax.Transformed(gaussian, distrax.Block(distrax.Tanh(), 1))

    def sample(self, params, observations, key):
        return self.apply(params, observations).sample(seed=key)  # (B, A)

    def loss(self, params, observations, actions, key):
        actions = jnp.clip(actions, -0.99, 0.99)  # (B, A)
        return -self.apply(params, observations).log_prob(actions).mean()


def settle(config, source):
    """Puts the class's settings where none are given, and failure_reward in the agent's units."""
    given = {name: x for name, x in vars(config).items() if x is not None}
    given["failure_reward"] = float(rescale(config.failure_reward, *source["units"]["rewards"]))
    return Config(**{name: x[config.policy] for name, x in POLICY_SETTINGS.items()} | given)


@flax.struct.dataclass
class Agent:
    """All that training changes. Outside the losses with a leading axis of seeds, (S, ...)."""

    actor: TrainState
    target_actor_params: Any  # of the policy that is sampled
    critic: TrainState  # parameters of all Q-functions, (N, ...)
    target_critic_params: Any
    value: TrainState
    key: jax.Array
    policy: Any = flax.struct.field(pytree_node=False)  # what samples, and has the actor's loss


def create_agent(key, observation, action, config):
    """A fresh agent from its random key (2,), an observation (1, O) and an action (1, A)."""
    key, actor_key, critic_key, value_key = jax.random.split(key, 4)
    policies = dict(diffusion=DiffusionPolicy, transformer=TransformerPolicy, gaussian=TanhPolicy)
    policy = policies[config.policy](action.shape[1], config)
    critic = Critic(config.critic_hidden_dims, max(config.value_bins, 1), layer_norm=True)
    value = Critic(config.critic_hidden_dims)
    actor_params = policy.init(actor_key, observation, action)
    critic_keys = jax.random.split(critic_key, config.num_critics)
    each = partial(jax.vmap, in_axes=(0, None, None))  # of the critics
    critic_params = each(critic.init)(critic_keys, observation, action)
    value_params = value.init(value_key, observation)
    actor_adam = optax.adam(partial(policy_rate, config=config))
    adam = optax.adam(config.learning_rate)
    return Agent(
        actor=TrainState.create(apply_fn=policy.apply, params=actor_params, tx=actor_adam),
        target_actor_params=jax.tree.map(jnp.copy, actor_params),
        critic=TrainState.create(apply_fn=each(critic.apply), params=critic_params, tx=adam),
        target_critic_params=jax.tree.map(jnp.copy, critic_params),
        value=TrainState.create(apply_fn=value.apply, params=value_params, tx=adam),
        key=key,
        policy=policy,
    )


def policy_rate(count, config):
    """The rate after `count` updates: cloning's, diffusion's falling to 0; then the online one."""
    cloning, online = count < config.pretrain_steps, count - config.pretrain_steps
    done = count / max(config.pretrain_steps, 1)
    fade = (1 + jnp.cos(jnp.pi * done)) / 2 if config.policy == "diffusion" else 1.0
    warm = (jnp.where(cloning, count, online) + 1) / max(config.policy_warmup, 1)
    peak = jnp.where(cloning, config.cloning_learning_rate, config.policy_learning_rate)
    return peak * jnp.minimum(1.0, warm) * jnp.where(cloning, fade, 1.0)


# --------------------------------------------------------------------------- Action optimisation
def expectation(outputs, config):
    """Q (...) that a critic's outputs (..., Z) stand for: the mean of its histogram."""
    if not config.value_bins:
        return outputs[..., 0]
    edges = jnp.linspace(*config.value_range, config.value_bins + 1)  # (Z + 1,)
    return (jax.nn.softmax(outputs) * (edges[1:] + edges[:-1]) / 2).sum(axis=-1)


def action_values(agent, params, observations, actions, config, key=None):
    """Q (N, M, B) of M actions (M, B, A) per observation (B, O), by the critics of `params`; with a
    key by `target_critics` of them, drawn with replacement (by all, if there are no more)."""
    if key is not None and config.target_critics < config.num_critics:
        members = jax.random.randint(key, (config.target_critics,), 0, config.num_critics)
        params = jax.tree.map(lambda x: x[members], params)
    rows = jnp.tile(observations, (len(actions), 1)), actions.reshape(-1, actions.shape[-1])
    outputs = agent.critic.apply_fn(params, *rows)  # (N, M * B, Z)
    return expectation(outputs, config).reshape(-1, *actions.shape[:2])


def local_step(agent, observations, actions, config):
    """Plain gradient ascent of every action (K, B, A) on the mean Q, inside the box. Returns of
    all its positions, first and last included, the best one, and its Q (K, B)."""

    def total_q(actions):
        q = action_values(agent, agent.critic.params, observations, actions, config).mean(axis=0)
        return q.sum(), q  # the sum: every action has its own gradient, not divided by their number

    def step(actions, _):
        gradient, q = jax.grad(total_q, has_aux=True)(actions)  # (K, B, A), (K, B)
        return jnp.clip(actions + config.ascent_rate * gradient, -1.0, 1.0), (actions, q)

    _, (positions, q) = jax.lax.scan(step, actions, length=config.ascent_steps + 1)  # (T + 1, ...)
    best = q.argmax(axis=0)[None, ..., None]  # (1, K, B, 1)
    return jnp.take_along_axis(positions, best, axis=0)[0], q.max(axis=0)


def optimise(agent, observations, keys, config, selection, num_actions=1, data_actions=None):
    """pi*'s actions: `num_actions` draws (M, B, A), or the best one (1, B, A). Data actions (B, A)
    replace the worst kept ones. Until the critic has learnt, pi* is pi, or the data."""
    rows = jnp.tile(observations, (config.base_actions, 1))  # (M * B, O)
    samples = agent.policy.sample(agent.target_actor_params, rows, keys[0])  # (M * B, A)
    samples = samples.reshape(config.base_actions, len(observations), -1)  # (M, B, A)
    q = action_values(agent, agent.critic.params, observations, samples, config).mean(axis=0)
    best = jnp.argsort(-q, axis=0)[: config.kept_actions]  # (K, B), the global step, best first
    kept = jnp.take_along_axis(samples, best[..., None], axis=0)  # (K, B, A)
    info = {"base_q": q.mean(), "kept_q": jnp.take_along_axis(q, best, axis=0).mean()}
    kept = kept if data_actions is None else kept.at[-1].set(data_actions)
    actions, q = local_step(agent, observations, kept, config)  # (K, B, A), (K, B)
    info |= {"optimised_q": q.mean(), "moved": jnp.abs(actions - kept).mean()}
    plain = samples[: config.kept_actions] if data_actions is None else data_actions
    actions = jnp.where(agent.critic.step > 0, actions, plain)  # (K, B, A), before, Q is noise
    chosen, shape = q.argmax(axis=0)[None], (num_actions, len(observations))  # (1, B)
    if selection == "softmax":
        chosen = jax.random.categorical(keys[1], q, axis=0, shape=shape)  # (M, B)
    return jnp.take_along_axis(actions, chosen[..., None], axis=0), info


def explore(agent, observation, key, config):
    """The training policy's action (A,) in one observation (O,): pi*'s."""
    inputs = observation[None], jax.random.split(key), config, config.acting_selection
    return optimise(agent, *inputs)[0][0, 0]


def act(agent, observations, config):
    """The evaluated policy's actions (B, A) in observations (B, O): pi*'s best. The noise of the
    policy's samples comes from the bits of all observations: new in every step, yet repeatable."""
    bits = jax.lax.bitcast_convert_type(observations, jnp.uint32)  # (B, O)
    keys = jax.random.split(jax.random.PRNGKey(bits.sum()))  # (2, 2)
    return optimise(agent, observations, keys, config, "argmax")[0][0]


# ---------------------------------------------------------------------------- Losses and updates
# A loss takes first the parameters it differentiates, and returns (loss, metrics).
def actor_loss(params, agent, batch, key, config):
    """The policy's own supervised loss of the batch's actions: the data's, or pi*'s."""
    loss = agent.policy.loss(params, batch.observations, batch.actions, key)
    return loss, {"actor_loss": loss}


def value_error(outputs, targets, config):
    """Error (N, B) of critics' outputs (N, B, Z): squared, or the cross-entropy (nats) with the
    mass in each bin of a Gaussian around the target (B,), cut off at the ends of the range."""
    if not config.value_bins:
        return (outputs[..., 0] - targets) ** 2
    targets = jnp.clip(targets, *config.value_range)  # (B,)
    edges = jnp.linspace(*config.value_range, config.value_bins + 1)  # (Z + 1,)
    std = 0.75 * 2**0.5 * (edges[1] - edges[0])  # 0.75 bins, which the authors' code widens
    below = jax.scipy.stats.norm.cdf((edges - targets[:, None]) / std)  # (B, Z + 1)
    mass = jnp.diff(below) / (below[:, -1:] - below[:, :1])  # (B, Z)
    return optax.softmax_cross_entropy(outputs, mass)


def conservative_difference(params, agent, batch, own, following, key, config):
    """Cal-QL's D, over the data's, uniform, pi*'s own and following actions (M, B, A); where pi*'s
    is one best action, it stands for num_actions. Also the share of pi*'s below the return."""
    uniform_key, member_key = jax.random.split(key)
    shape = config.num_actions, *batch.actions.shape
    uniform = jax.random.uniform(uniform_key, shape, minval=-1.0, maxval=1.0)  # (M, B, A)
    actions = jnp.concatenate([batch.actions[None], uniform, own, following])  # (1 + 3 M, B, A)
    q = action_values(agent, params, batch.observations, actions, config, member_key)
    data_q, first = q[:, 0], 1 + config.num_actions  # (K, B), where pi*'s begin
    below = q[:, first:] < batch.mc_returns  # (K, 2 M, B)
    q = q.at[:, first:].max(batch.mc_returns)  # (K, 1 + 3 M, B)
    q = q.at[:, first:].add(jnp.log(config.num_actions / len(own)))  # copies
    soft_maximum = jax.nn.logsumexp(q, axis=1) - jnp.log(3 * config.num_actions + 1)  # (K, B)
    return (soft_maximum - data_q).mean(), below.mean()


def critic_loss(params, agent, batch, own, following, key, config):
    """The backup's error plus the difference. `own`, `following`: pi*'s (M, B, A) in s and s'."""
    target_key, difference_key = jax.random.split(key)
    if config.critic == "iql":
        next_v = agent.value.apply_fn(agent.value.params, batch.next_observations)[:, 0]  # (B,)
    else:
        inputs = batch.next_observations, following, config, target_key
        q = action_values(agent, agent.target_critic_params, *inputs)  # (K, M, B)
        next_v = q.min(axis=0).max(axis=0)  # (B,)
    targets = batch.rewards + config.discount * batch.masks * next_v  # (B,)
    outputs = agent.critic.apply_fn(params, batch.observations, batch.actions)  # (N, B, Z)
    loss = value_error(outputs, targets, config).mean()
    info = {"critic_loss": loss, "q": expectation(outputs, config).mean()}
    if config.critic == "cal_ql":
        inputs = agent, batch, own, following, difference_key, config
        difference, below = conservative_difference(params, *inputs)
        loss = loss + config.cql_alpha * difference
        info |= {"difference": difference, "below_return": below}
    return loss, info


def value_loss(params, agent, batch, key, config):
    """IQL's V: an upper expectile of the target Q of dataset actions."""
    inputs = batch.observations, batch.actions[None], config, key
    q = action_values(agent, agent.target_critic_params, *inputs)[:, 0]  # (K, B)
    u = q.min(axis=0) - agent.value.apply_fn(params, batch.observations)[:, 0]  # (B,)
    weight = jnp.abs(config.expectile - (u < 0))  # (B,), |expectile - 1(u < 0)|
    loss = (weight * u**2).mean()
    return loss, {"value_loss": loss}


def gradient_step(train_state, loss_fn, *args):
    """One optimiser step on `loss_fn(params, *args) -> (loss, metrics)`."""
    grads, info = jax.grad(loss_fn, has_aux=True)(train_state.params, *args)
    return train_state.apply_gradients(grads=grads), info


def imitate(agent, batch, config, keys=None):
    """The policy imitates the batch; the one sampled follows. `keys`: the next, and the loss's."""
    key, actor_key = jax.random.split(agent.key) if keys is None else keys
    actor, info = gradient_step(agent.actor, actor_loss, agent, batch, actor_key, config)
    target = optax.incremental_update(actor.params, agent.target_actor_params, config.policy_tau)
    return agent.replace(actor=actor, target_actor_params=target, key=key), info


def distil(agent, batch, config):
    """Online: the policy imitates pi*."""
    key, sample_key, select_key, actor_key = jax.random.split(agent.key, 4)
    inputs = batch.observations, (sample_key, select_key), config, "softmax"
    actions, search = optimise(agent, *inputs, data_actions=batch.actions)  # (1, B, A)
    agent, info = imitate(agent, batch.replace(actions=actions[0]), config, (key, actor_key))
    return agent, info | (search if config.critic == "iql" else {})  # others: in their own update


def update(agent, batch, config):
    """One update of the critic, with --critic iql of V first; the policy is held."""
    key, action_key, critic_key, value_key = jax.random.split(agent.key, 4)
    own, following = None, None
    if config.critic == "iql":
        value, info = gradient_step(agent.value, value_loss, agent, batch, value_key, config)
        agent = agent.replace(value=value)
    else:  # in s and then in s': the activations of both do not fit a CPU's cache
        both = jnp.stack([batch.observations, batch.next_observations])  # (2, B, O)
        settings = config, config.target_selection, config.num_actions
        search = lambda xs: optimise(agent, xs[0], jax.random.split(xs[1]), *settings)  # noqa: E731
        (own, following), info = jax.lax.map(search, (both, jax.random.split(action_key)))
    inputs = agent, batch, own, following, critic_key, config
    critic, critic_info = gradient_step(agent.critic, critic_loss, *inputs)
    target = optax.incremental_update(critic.params, agent.target_critic_params, config.tau)
    agent = agent.replace(critic=critic, target_critic_params=target, key=key)
    return agent, critic_info | jax.tree.map(jnp.mean, info)


# ------------------------------------------------------------------------------ Offline to online
def phases(config):
    """The run, phase by phase: name, number of steps, and what one round of them does."""
    yield "pretrain", config.pretrain_steps, partial(offline_round, update=imitate)
    yield "offline", config.offline_steps, partial(offline_round, update=update)
    yield "online", config.online_steps, episodes_round


def online_batch(dataset, buffer, size, key, config, distilling):
    """An online update's batch: the dataset's rows and the `size` newest, all equally likely to be
    distilled; of a critic's batch `offline_ratio` are the dataset's."""
    count, places = len(dataset.rewards), jnp.arange(config.batch_size)  # (B,)
    is_old = places < round(config.batch_size * config.offline_ratio)  # (B,)
    low = jnp.where(is_old | distilling, 0, count)  # (B,)
    high = jnp.where(is_old & (not distilling), count, count + size)  # (B,)
    rows = jax.random.randint(key, (config.batch_size,), low, high)  # (B,)
    old = jax.tree.map(lambda x: x[rows], dataset)
    new = jax.tree.map(lambda x: x[rows - count], buffer)
    return jax.tree.map(partial(jax.vmap(jnp.where), rows < count), old, new)


@partial(jax.jit, donate_argnames="buffers")
def insert(buffers, rows, position):
    """Rows (S, ...) into the buffers (S, C, ...), in place: hence a program of its own."""
    return jax.tree.map(lambda buffer, row: buffer.at[:, position].set(row), buffers, rows)


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


explore_all = jax.jit(jax.vmap(explore, in_axes=(0, 0, 0, None)), static_argnums=3)  # (S, A)


@partial(jax.jit, static_argnames=("config", "update"), donate_argnames="agents")
def learn(agents, buffers, size, dataset, counts, config, update):
    """`counts` (S,) calls of `update`, as one program. Metrics are sums. `agents` is donated."""

    def one_seed(agent, buffer, count):
        def step(_, carry):
            agent, sums = carry
            key, draw_key = jax.random.split(agent.key)
            batch = online_batch(dataset, buffer, size, draw_key, config, update is distil)
            agent, info = update(agent.replace(key=key), batch, config)
            return agent, {name: x + info.get(name, 0.0) for name, x in sums.items()}

        return jax.lax.fori_loop(0, count, step, (agent, dict.fromkeys(METRICS, jnp.zeros(()))))

    return for_each_seed(one_seed, agents, buffers, counts)


def episodes_round(agents, buffers, run, first, last):
    """Environment steps `first` to `last`. Where an episode ends its rows get their returns, and as
    many distillations and then updates of the critic as it had steps follow, in slices. Episodes
    are seeded by (seed, first) and truncated at `last`: no simulator is checkpointed."""
    config, dataset, envs, bar = run
    if first == 0:  # all optimisers start anew, the policy's with its online rate
        zero = lambda path, x: x * ("opt_state" not in jax.tree_util.keystr(path))  # noqa: E731
        agents = jax.tree_util.tree_map_with_path(zero, agents)
        adam, rate = agents.actor.opt_state
        rate = rate._replace(count=rate.count + config.pretrain_steps)
        agents = agents.replace(actor=agents.actor.replace(opt_state=(adam, rate)))
    keys = jax.vmap(partial(jax.random.split, num=1 + last - first))(agents.key)  # (S, 1 + T, 2)
    agents, keys = agents.replace(key=keys[:, 0]), np.asarray(keys[:, 1:])  # for exploration
    known = np.array(buffers.mc_returns)  # (S, C), all returns, on the host
    sums, capacity = dict.fromkeys(METRICS, 0.0), known.shape[1]
    begins = np.full(config.num_seeds, first)  # (S,), first steps of the episodes in play
    history = np.zeros((3, config.num_seeds, last))  # rewards, masks and ends of every step
    seeds = [10**9 * (config.seed + i + 1) + first for i in range(config.num_seeds)]
    observations, _ = envs.reset(seed=seeds)  # (S, O)
    for step in range(first, last):
        actions = np.asarray(explore_all(agents, observations, keys[:, step - first], config))
        after, rewards, terminated, truncated, info = envs.step(actions)  # (S, ...)
        following, ends = after.copy(), terminated | truncated | (step + 1 == last)
        for i in np.flatnonzero(terminated | truncated):  # reset already
            following[i] = info["final_obs"][i]
        history[:, :, step] = rewards, 1.0 - terminated, ends
        rows = Batch(observations, actions, rewards, following, *history[1:, :, step], rewards)
        buffers, observations = insert(buffers, rows, step % capacity), after  # its return follows
        counts = np.where(ends, step + 1 - begins, 0)  # (S,), updates that are due
        for i in np.flatnonzero(ends):
            places = np.arange(begins[i], step + 1) % capacity  # (T,), a later one overwrites
            known[i, places] = monte_carlo_returns(*history[:, i, begins[i] : step + 1], config)
            buffers, begins[i] = buffers.replace(mc_returns=jnp.array(known)), step + 1
        for kind in distil, update:
            for done in range(0, counts.max(), 50):
                inputs = buffers, min(step + 1, capacity), dataset, np.clip(counts - done, 0, 50)
                agents, info = learn(agents, *inputs, config, kind)
                sums = {name: x + sums[name] for name, x in jax.device_get(info).items()}
                bar.refresh()
        bar.update()
    means = {name: x / (last - first) for name, x in sums.items() if np.any(x)}
    return agents, buffers, means | {"updates": 2 * (last - first)}


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
    config = settle(config, source)
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
