"""PA-RL's control: pa_rl.py, but online the gradient of Q goes through the policy's own sampling.

    python results/controls/through_the_policy.py --policy diffusion --init-from RUN

PA-RL's paper (arXiv 2412.06685) says that this is unstable for policies of many steps, and that to
imitate optimised actions is not. The two differ here by one loss, L = -E[mean_i Q_i(s, pi(s))]: the
policy's samples are optimised before they are played and backed up, as in pa_rl.py. Not for tokens,
which have no gradient. A run's folder says pa_rl: go on in it with this file only.
"""

import sys
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "algorithms"))
import pa_rl


def ascent_loss(params, agent, batch, key, config):
    """-Q of actions sampled by the policy, through all steps of its sampling."""
    actions = agent.policy.sample(params, batch.observations, key)[None]  # (1, B, A)
    inputs = agent, agent.critic.params, batch.observations, actions, config
    q = pa_rl.action_values(*inputs).mean()  # over critics and rows
    return -q, {"actor_loss": -q}


def ascend(agent, batch, config):
    """In place of pa_rl.py's `distil`."""
    key, actor_key = jax.random.split(agent.key)
    actor, info = pa_rl.gradient_step(agent.actor, ascent_loss, agent, batch, actor_key, config)
    target = agent.target_actor_params
    target = pa_rl.optax.incremental_update(actor.params, target, config.policy_tau)
    return agent.replace(actor=actor, target_actor_params=target, key=key), info


Config, PRESETS = pa_rl.Config, pa_rl.PRESETS

if __name__ == "__main__":
    pa_rl.distil = ascend
    pa_rl.main()
