"""Would the tests notice? Each bug below is planted, one at a time, in a temporary copy of the
repository, and the tests that should catch it are run there.

    python tests/planted_bugs.py                     # all: about 10 minutes on one core
    python tests/planted_bugs.py tau-swapped no-mask # some

Exit code 1 if fewer than 9 of 10 are caught; 2 if a text to replace does not stand (once) in its
file, a planted text is no Python, or the tests fail without any bug.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOSSES, LEARNING, DATA, FAMILY, FINETUNE, ON_POLICY, AGNOSTIC, TD3 = (
    f"tests/test_{name}.py"
    for name in ("losses", "learning", "data", "cql", "finetune", "uni_o4", "pa_rl", "td3"))
IQL, SAC = "algorithms/iql.py", "baselines/sac.py"
CQL, CAL, FT = (f"algorithms/{name}.py" for name in ("cql", "cal_ql", "sac_finetune"))
RLPD, BC, PPO, UNI = (
    "baselines/rlpd.py", "baselines/bc.py", "baselines/ppo.py", "algorithms/uni_o4.py")
PA = "algorithms/pa_rl.py"
TD3_BC, TD3_C = "baselines/td3_bc.py", "algorithms/td3_c.py"
ONLY_CQL = "{} and cql and not cal_ql"
TARGET_Q = "state.critic.apply_fn(state.target_critic_params, batch.observations, batch.actions)\n"
OWN_Q = "state.critic.apply_fn(state.critic.params, batch.observations, batch.actions)\n"
STEP = """    state = state.replace(value=value, key=key)
    actor, actor_info = gradient_step(state.actor, actor_loss, state, batch, actor_key, config)
"""
CRITIC_STEP = (
    "    critic, critic_info = "
    "gradient_step(state.critic, critic_loss, state, batch, None, config)\n"
)
RESTORE = """    state = restore(to_host(run.shards), arrays, "state", found)
"""

# name: (file, the text as it stands, the bug, test file, -k expression)
BUGS = {
    # The losses
    "expectile-sign": (IQL, "config.expectile - (u < 0)", "config.expectile - (u > 0)",
                       LOSSES, "expectile or iql_loss"),
    "value-without-target": (
        IQL, f"q = {TARGET_Q}    v = state.value.apply_fn(params",
        f"q = {OWN_Q}    v = state.value.apply_fn(params", LOSSES, "iql_loss"),
    "pi-without-target": (
        IQL, f"q = {TARGET_Q}    v = state.value.apply_fn(state.value.params",
        f"q = {OWN_Q}    v = state.value.apply_fn(state.value.params", LOSSES, "iql_loss"),
    "min-to-max": (IQL, "u = q.min(axis=0) - v", "u = q.max(axis=0) - v", LOSSES, "iql_loss"),
    "weight-sign": (IQL, "jnp.exp(config.beta * advantage)", "jnp.exp(-config.beta * advantage)",
                    LEARNING, "iql_solves_a_bandit"),
    "weight-unclipped": (IQL, "jnp.minimum(jnp.exp(config.beta * advantage), config.max_weight)",
                         "jnp.exp(config.beta * advantage)", LOSSES, "iql_loss or weight"),
    "mean-instead-of-sum": (IQL, "** 2).mean(axis=1).sum()", "** 2).mean(axis=1).mean()",
                            LOSSES, "iql_loss"),
    "no-discount": (IQL, "config.discount * batch.masks * next_v", "batch.masks * next_v",
                    LEARNING, "chain"),
    "no-mask": (IQL, "config.discount * batch.masks * next_v", "config.discount * next_v",
                LEARNING, "chain"),
    "value-of-the-wrong-state": (
        IQL, "next_v = state.value.apply_fn(state.value.params, batch.next_observations)",
        "next_v = state.value.apply_fn(state.value.params, batch.observations)",
        LEARNING, "chain"),
    "no-dropout": (IQL, "batch.observations, True, rngs", "batch.observations, False, rngs",
                   LOSSES, "dropout"),
    "std-unclipped": (IQL, "jnp.exp(jnp.clip(log_std, -5.0, 2.0))", "jnp.exp(log_std)",
                      LOSSES, "bounds"),
    # The update
    "pi-with-the-old-v": (
        IQL, STEP, "\n".join([*STEP.splitlines()[::-1], ""]), LOSSES, "iql_updates"),
    "q-with-the-old-v": (IQL, STEP + CRITIC_STEP, CRITIC_STEP + STEP, LOSSES, "iql_updates"),
    "tau-swapped": (
        IQL, "incremental_update(critic.params, state.target_critic_params, config.tau)",
        "incremental_update(state.target_critic_params, critic.params, config.tau)",
        LOSSES, "iql_updates"),
    "target-of-the-old-q": (
        IQL, "incremental_update(critic.params, state.target",
        "incremental_update(state.critic.params, state.target", LOSSES, "iql_updates"),
    "policy-frozen-online": (
        IQL, "return optax.join_schedules([offline, online], [config.offline_steps])",
        "return offline", LOSSES, "iql_updates"),
    "evaluation-samples": (
        IQL, "return state.actor.apply_fn(state.actor.params, observations).mean()",
        "return state.actor.apply_fn(state.actor.params, observations).sample(seed=state.key)",
        LOSSES, "dropout"),
    # The data
    "time-limit-ends": (IQL, 'masks=1.0 - arrays["terminals"]', 'masks=1.0 - arrays["ends"]',
                        LEARNING, "chain"),
    "next-observation-off-by-one": (
        IQL, "np.concatenate([observations[1:], observations[-1:]])",
        "np.concatenate([observations[2:], observations[-2:]])", LEARNING, "chain"),
    "rows-across-episodes": (IQL, "known = terminals | ~ends", "known = np.ones(len(ends), bool)",
                             DATA, "dropped or no_kept"),
    "data-actions-not-rescaled": (
        IQL, "scaled = (x - self.action_center) / self.action_scale", "scaled = x", DATA, "action"),
    # The environment
    "init-from-on-the-default-dataset": (
        IQL, "**PRESETS[preset] | its | data)", "**PRESETS[preset] | its)",
        "tests/test_run.py", "that_agents_data"),
    "init-from-forgets-given-data": (
        IQL, 'if getattr(config, "dataset", "") is None:', 'if hasattr(config, "dataset"):',
        "tests/test_run.py", "that_agents_data"),
    "online-time-limit-ends": (
        IQL, "        if terminated[i] or truncated:\n",
        "        terminated[i] |= truncated\n        if terminated[i]:\n",
        LEARNING, "online_transitions"),
    "next-observation-after-reset": (
        IQL, "next_observations=run.transform.observations(next_observations),",
        "next_observations=run.transform.observations(rollout.observations),",
        LEARNING, "online_transitions"),
    "reward-not-transformed-online": (
        IQL, "rewards=run.transform.rewards(rewards),", "rewards=rewards.astype(np.float32),",
        LEARNING, "online_transitions"),
    "action-not-rescaled-online": (
        IQL, "actions = run.transform.environment_actions(rollout.actions)  # (S, A)",
        "actions = rollout.actions", LEARNING, "online_transitions"),
    "action-not-rescaled-in-evaluation": (
        IQL, "        actions = run.transform.environment_actions(actions)\n", "",
        LEARNING, "main_learns"),
    "evaluation-not-normalised": (
        IQL, "inputs = split(run.transform.observations(observations), run.devices)",
        "inputs = split(observations.astype(np.float32), run.devices)", LEARNING, "main_learns"),
    "insert-off-by-one": (IQL, ".at[buffer.position].set(new)", ".at[buffer.position + 1].set(new)",
                          LEARNING, "online_transitions"),
    "union-off-by-one": (IQL, "online_rows[indices - num_offline]",
                         "online_rows[indices - num_offline + 1]", DATA, "sample_union"),
    "resumed-without-its-key": (
        IQL, RESTORE, RESTORE + "    state = state.replace(key=to_host(run.shards).key)\n",
        LEARNING, "resumed"),
    # SAC
    "sac-gradient-into-the-target": (
        SAC, "state.target_critic_params, batch.next_observations, next_actions",
        "params, batch.next_observations, next_actions", LOSSES, "sac_loss or sac_updates"),
    "sac-entropy-sign": (SAC, "next_q.min(axis=0) - temp", "next_q.min(axis=0) + temp",
                         LOSSES, "sac_loss"),
    "sac-temperature-sign": (SAC, "temperature * (entropy - target_entropy)",
                             "temperature * (target_entropy - entropy)", LEARNING, "sac"),
    "sac-pi-with-the-old-q": (
        SAC, "    state = state.replace(critic=critic, key=key)\n",
        "    state = state.replace(key=key)\n", LOSSES, "sac_updates"),
    "sac-temperature-not-in-pi": (SAC, "temperature * log_prob - q", "log_prob - q",
                                  LOSSES, "sac_loss"),
    "sac-not-squashed-in-evaluation": (SAC, "jnp.tanh(policy.distribution.mean())",
                                       "policy.distribution.mean()", LEARNING, "sac"),
    "sac-no-uniform-start": (SAC, "jnp.where(state.critic.step == 0, uniform, action)", "action",
                             LOSSES, "sac_actions"),
    # CQL
    "cql-uniform-density-sign": (CQL, "-jnp.log(2.0) * shape[2]", "jnp.log(2.0) * shape[2]",
                                 FAMILY, ONLY_CQL.format("losses")),
    "cql-difference-sign": (CQL, "config.cql_alpha * (difference - gap).sum()",
                            "config.cql_alpha * (gap - difference).sum()", FAMILY, "bandit"),
    "cql-next-actions-in-next-states": (
        CQL, "q = q_values(state, params, batch.observations, actions)  # (N, 3 M, B)",
        "q = q_values(state, params, batch.next_observations, actions)", FAMILY,
        ONLY_CQL.format("losses")),
    "cql-no-importance-weights": (CQL, "        q = q - log_prob  # (N, 3 M, B)\n", "", FAMILY,
                                  ONLY_CQL.format("losses")),
    "cql-max-then-min": (CQL, "q.min(axis=0).max(axis=0)", "q.max(axis=1).min(axis=0)", FAMILY,
                         ONLY_CQL.format("losses")),
    "cql-entropy-in-the-target": (
        CQL, "    q = random_subset(q, subset_key, config)  # (K, M, B)\n",
        "    q = random_subset(q, subset_key, config) - _\n", FAMILY, ONLY_CQL.format("losses")),
    "cql-gap-forgotten": (
        CQL, "state.multiplier.apply_fn(state.multiplier.params), config.target_gap",
        "state.multiplier.apply_fn(state.multiplier.params), 0.0", FAMILY,
        ONLY_CQL.format("losses")),
    "cql-multiplier-sign": (CQL, "return -multiplier * config.cql_alpha",
                            "return multiplier * config.cql_alpha", FAMILY, "multiplier_holds"),
    "cql-new-q-for-pi": (
        CQL, "gradient_step(state.actor, actor_loss, state, batch",
        "gradient_step(state.actor, actor_loss, state.replace(critic=critic), batch", FAMILY,
        ONLY_CQL.format("replayed")),
    "cql-no-shift": (CQL, "nn.initializers.constant(-1.0)", "nn.initializers.zeros", FAMILY,
                     "narrow"),
    "cql-failure-not-forever": (
        CQL, '"sparse": failed, "infinite": 1.0}', '"sparse": 0.0, "infinite": 1.0}', FAMILY,
        ONLY_CQL.format("returns_of_the_dataset")),
    "cql-online-returns-by-another-rule": (
        CQL, '"sparse": failed, "infinite": True}', '"sparse": True, "infinite": True}', FAMILY,
        ONLY_CQL.format("returns_of_the_buffer")),
    "cal-ql-return-of-a-running-episode": (
        CAL, "np.full(run.config.num_seeds, -np.inf, np.float32)",
        "np.zeros(run.config.num_seeds, np.float32)", FAMILY, "knows_the_returns"),
    "cql-ratio-swapped": (CQL, "num_offline = round(config.batch_size * config.offline_ratio)",
                          "num_offline = round(config.batch_size * (1 - config.offline_ratio))",
                          FAMILY, ONLY_CQL.format("share_of_dataset")),
    # Cal-QL
    "cal-ql-not-calibrated": (CAL, "q.at[:, config.num_actions :].max(batch.mc_returns)", "q",
                              FAMILY, "losses and cal_ql"),
    "cal-ql-min": (CAL, ".max(batch.mc_returns)", ".min(batch.mc_returns)", FAMILY,
                   "losses and cal_ql"),
    "cal-ql-bounds-the-uniform-ones": (CAL, "q.at[:, config.num_actions :].max", "q.at[:, :].max",
                                       FAMILY, "losses and cal_ql"),
    "cal-ql-after-the-weights": (
        CAL, "        q = q - log_prob  # (N, 3 M, B)\n",
        "        q = jnp.maximum(q - log_prob, batch.mc_returns)\n", FAMILY, "losses and cal_ql"),
    "cal-ql-episode-one-too-short": (
        CAL, "jax.lax.fori_loop(0, jnp.minimum(length, capacity)",
        "jax.lax.fori_loop(0, jnp.minimum(length - 1, capacity)", FAMILY,
        "returns_of_the_buffer and cal_ql"),
    "cal-ql-online-returns-off-by-one": (
        CAL, "at = (last - age) % capacity", "at = (last - age - 1) % capacity", FAMILY,
        "returns_of_the_buffer and cal_ql"),
    "cal-ql-returns-of-raw-rewards": (
        CAL, '    rewards = transform.rewards(arrays["rewards"])\n    failure',
        '    rewards = arrays["rewards"]\n    failure', FAMILY, "units and cal_ql"),
    # SAC fine-tuning
    "ft-still-cql-online": (FT, "gradient_step(state.critic, online_critic_loss, *inputs)",
                            "gradient_step(state.critic, critic_loss, *inputs)", FINETUNE,
                            "naive_updates"),
    "ft-kl-sign": (FT, "+ scale * price * kl", "- scale * price * kl", FINETUNE, "those_of_sac"),
    "ft-price-sign": (FT, "return -state.kl_multiplier.apply_fn(params) * (kl - limit)",
                      "return state.kl_multiplier.apply_fn(params) * (kl - limit)", FINETUNE,
                      "price"),
    "ft-reference-not-taken-at-the-switch": (
        FT, "        run.shards = list(map(jax.vmap(begin_online), run.shards))\n", "", FINETUNE,
        "mode_sets and wsrl"),
    "ft-limit-does-not-rise": (FT, "(config.kl_limit_end - config.kl_limit) * progress", "0.0",
                               FINETUNE, "price"),
    "ft-one-critic-update": (FT, "x.reshape(config.critic_updates, config.batch_size,",
                             "x[: config.batch_size].reshape(1, config.batch_size,",
                             FINETUNE, "wsrl_updates"),
    "ft-no-warmup-in-wsrl": (FT, '"wsrl": dict(warmup_steps=5_000', '"wsrl": dict(warmup_steps=0',
                             FINETUNE, "mode_sets and wsrl"),
    "ft-temperature-learnt-under-the-bound": (
        FT, "temperature = state.temperature  # held", "temperature = temperature  # held",
        FINETUNE, "holds_the_policy"),
    "ft-price-with-a-floor": (FT, "jnp.clip(x, -6.9, 4.6)", "jnp.clip(x, -3.0, 4.6)", FINETUNE,
                              "become_small"),
    "ft-iql-with-temperature-1": (FT, "np.log(run.config.initial_temperature)", "0.0", FINETUNE,
                                  "taken_over and iql"),
    "ft-records-a-transform-not-used": (FT, "dataclasses.replace(default, **its)", "default",
                                        FINETUNE, "taken_over and iql"),
    "ft-iql-policy-without-its-mean": (FT, 'kept = f"{prefix}MLP", f"{prefix}Dense"',
                                       'kept = (f"{prefix}MLP",)', FINETUNE, "taken_over"),
    # RLPD
    "rlpd-min-for-pi": (RLPD, "temperature * log_prob - q.mean(axis=0)",
                        "temperature * log_prob - q.min(axis=0)", FINETUNE, "rlpd_losses"),
    "rlpd-all-critics-in-the-target": (
        RLPD, "random_subset(next_q, subset_key, config).min(axis=0)", "next_q.min(axis=0)",
        FINETUNE, "rlpd_losses"),
    "rlpd-subset-with-replacement": (RLPD, "replace=False", "replace=True", FINETUNE,
                                     "rlpd_losses"),
    "rlpd-no-layer-norm": (RLPD, "config.num_critics, layer_norm=True", "config.num_critics",
                           FINETUNE, "rlpd_losses"),
    "rlpd-always-entropy": (RLPD, "    if config.entropy_backup:\n", "    if True:\n", FINETUNE,
                            "rlpd_losses"),
    "rlpd-pi-on-the-first-minibatch": (RLPD, "last = jax.tree.map(lambda x: x[-1], minibatches)",
                                       "last = jax.tree.map(lambda x: x[0], minibatches)",
                                       FINETUNE, "many_critic_updates"),
    "rlpd-frozen-target": (RLPD, "critic=critic, target_critic_params=target, key=key)",
                           "critic=critic, key=key)", FINETUNE, "many_critic_updates"),
    "rlpd-minibatches-not-mixed": (
        RLPD, "return jnp.concatenate([x, y], axis=1).reshape(-1, *y.shape[2:])",
        "return jnp.concatenate([x.reshape(-1, *x.shape[2:]), y.reshape(-1, *y.shape[2:])])",
        FINETUNE, "share_of_dataset and rlpd"),
    # BC
    "bc-likelihood-sign": (BC, "loss = -policy.log_prob", "loss = policy.log_prob", FINETUNE,
                           "bc_is"),
    "bc-worst-trajectories": (BC, "np.argsort(-returns", "np.argsort(returns", FINETUNE, "percent"),
    "bc-keeps-unknown-rows": (BC, 'arrays["keep"] & np.isin', "np.isin", FINETUNE, "percent"),
    "bc-rows-after-an-end": (BC, 'np.concatenate([[0], np.cumsum(arrays["ends"])[:-1]])',
                             'np.cumsum(arrays["ends"])', FINETUNE, "percent"),
    "bc-frozen": (BC, "state.replace(actor=actor, key=key), info", "state.replace(key=key), info",
                  FINETUNE, "bc_finds"),
    # Uni-O4 and PPO
    "uni-ratio-upside-down": (
        UNI, "ratio = jnp.exp(policy.log_prob(actions) - reference.log_prob(actions))",
        "ratio = jnp.exp(reference.log_prob(actions) - policy.log_prob(actions))", ON_POLICY,
        "improvement_loss or plain_policy_gradient"),
    "uni-advantage-raw": (UNI, "advantage = (raw - raw.mean()) / (raw.std() + 1e-10)",
                          "advantage = raw", ON_POLICY, "improvement_loss"),
    "uni-action-unclipped": (UNI, "executed = jnp.clip(actions, -1.0, 1.0)", "executed = actions",
                             ON_POLICY, "improvement_loss"),
    "uni-actions-of-the-candidate": (
        UNI, "actions = reference.sample(seed=key)",
        "actions = state.clones.apply_fn(params, observations).sample(seed=key)", ON_POLICY,
        "improvement_loss"),
    "uni-clip-falls-on": (UNI, "jnp.minimum(step, 200)", "step", ON_POLICY, "schedules"),
    "uni-amq-normalised-twice": (
        UNI, "q, action = q_and_action(x)  # (P,), (P, A)",
        "q, action = q_and_action(x * state.observation_std + state.observation_mean)", ON_POLICY,
        "amq_on"),
    "uni-termination-normalised": (
        UNI, "raw = x * state.observation_std + state.observation_mean", "raw = x", ON_POLICY,
        "amq_on"),
    "uni-amq-counts-the-dead": (
        UNI, "total, count = total + (alive * q).sum(), count + alive.sum()",
        "total, count = total + q.sum(), count + len(q)", ON_POLICY, "amq_on"),
    "uni-amq-max": (UNI, "return q.min(axis=0), action", "return q.max(axis=0), action", ON_POLICY,
                    "amq_"),
    "uni-worst-models": (UNI, "elites = jnp.argsort(state.best_errors)",
                         "elites = jnp.argsort(-state.best_errors)", ON_POLICY, "elite"),
    "uni-gate-upside-down": (UNI, "better = (scores > incumbent", "better = (scores < incumbent",
                             ON_POLICY, "gate or margin"),
    "uni-all-move": (
        UNI, ("references = jax.tree.map(partial(where_member, better), state.members.params, "
        "state.references)"), "references = state.members.params", ON_POLICY, "gate_moves"),
    "uni-incumbent-forgotten": (UNI, "kept = jnp.where(better, scores, incumbent)",
                                "kept = scores", ON_POLICY, "gate_moves"),
    "uni-q-from-the-old-v": (UNI, "    state = state.replace(offline_value=value)\n", "", ON_POLICY,
                             "new_v"),
    "uni-target-every-update": (UNI, "jnp.where(critic.step % 2 == 0, config.tau, 0.0)",
                                "config.tau", ON_POLICY, "second_update"),
    "uni-trained-on-holdout": (UNI, "minval=num_holdout, maxval=num_rows",
                               "minval=0, maxval=num_rows", ON_POLICY, "holdout"),
    "uni-last-models": (UNI, "better = errors < 0.99 * state.best_errors",
                        "better = errors < jnp.inf", ON_POLICY, "keeps_the_best"),
    "uni-diversity-attached": (UNI, "jax.lax.stop_gradient(best_other)", "best_other", ON_POLICY,
                               "plain_cloning"),
    "uni-kl-attached": (
        UNI, "jax.lax.stop_gradient(jnp.take_along_axis(mean, chosen, axis=0))",
        "jnp.take_along_axis(mean, chosen, axis=0)", ON_POLICY, "kl_moves"),
    "qr-batched": (
        RLPD, "    return jax.custom_batching.sequential_vmap(draw)(key)", "    return draw(key)",
        FINETUNE, "ten_critics"),
    "micro-batches-summed": (
        CQL, "lambda x: x.mean(axis=0), found", "lambda x: x.sum(axis=0), found", FAMILY,
        ONLY_CQL.format("micro_batches")),
    "q-of-the-wrong-row": (
        CQL, ".reshape(-1, *actions.shape[:2])",
        ".reshape(-1, *actions.shape[1::-1]).swapaxes(1, 2)", FAMILY,
        ONLY_CQL.format("papers")),
    "uni-collected-across-environments": (
        UNI, "np.stack([r[n] for r in rows], axis=1)", "np.stack([r[n] for r in rows], axis=0)",
        ON_POLICY, "one_command"),
    "uni-v-not-handed-over": (UNI, "state.replace(value=state.value.replace(params=params))",
                              "state", ON_POLICY, "online_v_begins"),
    "std-squashed-twice": (PPO, "if self.squash_twice else nn.tanh(u)", "",
                           ON_POLICY, "std_asked"),
    "uni-std-squashed-twice": (UNI, "if self.squash_twice else nn.tanh(u)", "",
                               ON_POLICY, "std_is_bounded"),
    "gae-across-episodes": (PPO, "(1.0 - end) * following", "following", ON_POLICY, "gae and ppo"),
    "gae-time-limit": (PPO, "config.discount * rollout.masks * next_values",
                       "config.discount * (1.0 - ends) * next_values", ON_POLICY, "gae and ppo"),
    "ppo-returns-normalised": (PPO, "normalised, values, advantages + values)",
                               "normalised, values, normalised + values)", ON_POLICY,
                               "v_regresses and ppo"),
    "ppo-clip-side": (PPO, "jnp.minimum(ratio * batch.advantages",
                      "jnp.maximum(ratio * batch.advantages", ON_POLICY, "ppo_losses and ppo"),
    "ppo-value-clip-relative": (PPO, "near = batch.values + change",
                                "near = batch.values * (1 + change)", ON_POLICY,
                                "ppo_losses and ppo"),
    "shift-without-inertia": (PPO, "        model.body_inertia[:] *= mass\n", "", ON_POLICY,
                              "shifted"),
    "delay-over-a-reset": (
        PPO, ("        self.waiting = [np.zeros(self.action_space.shape, "
        "self.action_space.dtype)] * self.delay\n"),
        ("        zero = np.zeros(self.action_space.shape, self.action_space.dtype)\n"
        "        self.waiting = self.waiting or [zero] * self.delay\n"), ON_POLICY, "shifted"),
    # PA-RL: action optimisation
    "pa-min-for-mean": (PA, "expectation(outputs, config).mean(axis=0)  # (M, B)",
                        "expectation(outputs, config).min(axis=0)  # (M, B)", AGNOSTIC,
                        "by_the_mean"),
    "pa-worst-kept": (PA, "jnp.argsort(-q, axis=0)", "jnp.argsort(q, axis=0)", AGNOSTIC,
                      "by_the_mean"),
    "pa-last-position": (
        PA, "return jnp.where((q > best_q)[..., None], actions, best), jnp.maximum(q, best_q)",
        "return actions, q", AGNOSTIC, "best_position"),
    "pa-gradient-divided": (PA, "return q.sum(), q  #", "return q.mean(), q  #", AGNOSTIC,
                            "by_hand"),
    "pa-out-of-the-box": (
        PA, "actions = jnp.clip(actions + config.ascent_rate * gradient, -1.0, 1.0)",
        "actions = actions + config.ascent_rate * gradient", AGNOSTIC, "or_the_box"),
    "pa-descent": (PA, "actions + config.ascent_rate * gradient",
                   "actions - config.ascent_rate * gradient", AGNOSTIC, "by_hand"),
    "pa-data-action-for-the-best": (PA, "kept.at[-1].set(data_actions)",
                                    "kept.at[0].set(data_actions)", AGNOSTIC, "replaces_the_worst"),
    "pa-softmax-upside-down": (PA, "jax.random.categorical(key, q, axis=0",
                               "jax.random.categorical(key, -q, axis=0", AGNOSTIC, "selection"),
    "pa-samples-of-the-online-policy": (
        PA, "    params = state.target_actor_params\n", "    params = state.actor.params\n",
        AGNOSTIC, "base_actions"),
    # PA-RL: the critic
    "pa-uniform-calibrated": (PA, "data_q, first = q[:, 0], 1 + config.num_actions",
                              "data_q, first = q[:, 0], 1", AGNOSTIC, "critics_loss"),
    "pa-copies-not-counted": (
        PA, "    q = q.at[:, first:].add(jnp.log(config.num_actions / len(own)))  # copies\n", "",
        AGNOSTIC, "critics_loss and argmax"),
    "pa-sum-for-mean": (PA, " - jnp.log(3 * config.num_actions + 1)", "", AGNOSTIC, "critics_loss"),
    "pa-states-swapped": (PA, "(own, following), info =", "(following, own), info =", AGNOSTIC,
                          "knows_both"),
    "pa-target-of-the-online-critic": (
        PA, "        params = random_members(state.target_critic_params, key, config)",
        "        params = random_members(state.critic.params, key, config)", AGNOSTIC,
        "critics_loss"),
    "pa-worst-next-action": (PA, ".min(axis=0).max(axis=0)", ".min(axis=0).min(axis=0)", AGNOSTIC,
                             "critics_loss and softmax"),
    "pa-histogram-not-cut": (PA, "return jnp.diff(below) / (below[:, -1:] - below[:, :1])",
                             "return jnp.diff(below)", AGNOSTIC, "histograms"),
    "pa-edges-for-centres": (PA, "(edges[1:] + edges[:-1]) / 2)", "edges[1:])", AGNOSTIC,
                             "histograms"),
    "pa-squared-error-of-a-histogram": (
        PA, "return optax.softmax_cross_entropy(outputs, histogram(targets, config))",
        "return (expectation(outputs, config) - targets) ** 2", AGNOSTIC, "critics_loss"),
    # PA-RL: the policies
    "pa-alpha-not-multiplied": (PA, "jnp.float32(np.cumprod(alpha))", "jnp.float32(alpha)",
                                AGNOSTIC, "noise_schedule"),
    "pa-noise-at-the-end": (PA, "std = jnp.where(step > 0, jnp.sqrt(1 - alpha[step]), 0.0)",
                            "std = jnp.sqrt(1 - alpha[step])", AGNOSTIC, "sampler"),
    "pa-signal-not-rooted": (PA, "noisy = jnp.sqrt(signal) * actions", "noisy = signal * actions",
                             AGNOSTIC, "diffusion_loss"),
    "pa-mean-over-dimensions": (PA, "((predicted - noise) ** 2).sum(axis=-1)",
                                "((predicted - noise) ** 2).mean(axis=-1)", AGNOSTIC,
                                "diffusion_loss"),
    "pa-tokens-floored": (PA, "jnp.round((actions + 1)", "jnp.floor((actions + 1)", AGNOSTIC,
                          "test_tokens"),
    "pa-no-causal-mask": (PA, "mask=causal", "mask=None", AGNOSTIC, "later_token"),
    "pa-tokens-not-shifted": (PA, "tokens][:, :-1]", "tokens][:, 1:]", AGNOSTIC,
                              "later_token or joint"),
    "pa-one-key-for-all-tokens": (PA, "token_key = jax.random.fold_in(key, dimension)",
                                  "token_key = key", AGNOSTIC, "joint"),
    "pa-wrong-token-remembered": (PA, "table[dimension - 1, tokens]", "table[dimension, tokens]",
                                  AGNOSTIC, "likely"),
    "pa-density-at-the-edge": (
        PA, "        actions = jnp.clip(actions, -ACTION_LIMIT, ACTION_LIMIT)  # at 1 the density",
        "        actions = 1.0 * actions  # at 1 the density", AGNOSTIC, "finite_on_the_box"),
    "pa-ema-swapped": (
        PA, "incremental_update(actor.params, state.target_actor_params, config.policy_tau)",
        "incremental_update(state.target_actor_params, actor.params, config.policy_tau)", AGNOSTIC,
        "moves_the_sampled"),
    # PA-RL: the schedule
    "pa-critic-before-distillation": (
        PA, """        parts.append(learn_in_slices(run, counts[0], distil, distillation_batch))
        parts.append(learn_in_slices(run, counts[1], update_step, online_batch))
""", """        parts.append(learn_in_slices(run, counts[1], update_step, online_batch))
        parts.append(learn_in_slices(run, counts[0], distil, distillation_batch))
""", AGNOSTIC, "after_each"),
    "pa-learns-in-every-step": (
        PA, "lengths[i] = 0 if run.rollout.played[i] else length", "lengths[i] = length", AGNOSTIC,
        "after_each"),
    "pa-optimiser-carried": (
        PA, "opt_state = jax.vmap(state.critic.tx.init)(state.critic.params)",
        "opt_state = state.critic.opt_state", AGNOSTIC, "switch"),
    "pa-values-optimiser-carried": (
        PA, "opt_state = jax.vmap(state.value.tx.init)(state.value.params)",
        "opt_state = state.value.opt_state", AGNOSTIC, "switch"),
    "pa-critic-born-with-preferences": (PA, "kernel_init=near_zero", "kernel_init=orthogonal",
                                        AGNOSTIC, "fresh_critic"),
    "pa-resumed-with-the-cloning-rate": (
        PA,
        "            run.shards = [s.replace(actor=s.actor.replace(tx=tx)) for s in run.shards]\n",
        "", AGNOSTIC, "killed"),
    "pa-random-critic-distilled": (
        PA, "jnp.where(state.critic.step > 0, chosen, batch.actions)", "chosen", AGNOSTIC,
        "what_is_distilled"),
    "pa-gaussian-fitted-up-to-the-box": (
        PA, "jnp.clip(actions, -0.99, 0.99)", "jnp.clip(actions, -ACTION_LIMIT, ACTION_LIMIT)",
        AGNOSTIC, "clipped_actions"),
    # TD3+BC and TD3-C
    "td3-noise-unclipped": (
        TD3_BC, "noise = jnp.clip(noise, -config.noise_clip, config.noise_clip)", "pass", TD3,
        "critic_loss"),
    "td3-target-action-unclipped": (
        TD3_BC, "next_actions = jnp.clip(next_actions + noise, -1.0, 1.0)",
        "next_actions = next_actions + noise", TD3, "critic_loss"),
    "td3-target-of-the-new-policy": (
        TD3_BC, "state.actor.apply_fn(state.target_actor_params, batch.next_observations)",
        "state.actor.apply_fn(state.actor.params, batch.next_observations)", TD3, "critic_loss"),
    "td3-scale-attached": (TD3_BC, "jax.lax.stop_gradient(jnp.abs(q).mean())",
                           "jnp.abs(q).mean()", TD3, "replayed and TD3+BC"),
    "td3-min-for-pi": (
        TD3_BC, ("q = state.critic.apply_fn(state.critic.params, batch.observations, actions)[0]"
        "  # (B,)\n    scale = config.q_weight"),
        ("q = state.critic.apply_fn(state.critic.params, batch.observations, actions).min(axis=0)"
        "\n    scale = config.q_weight"), TD3, "actor_losses"),
    "td3-imitation-summed": (
        TD3_BC, "imitation = ((actions - batch.actions) ** 2).mean()",
        "imitation = ((actions - batch.actions) ** 2).sum(axis=-1).mean()", TD3, "actor_losses"),
    "td3-no-delay": (TD3_BC, "due = critic.step % config.policy_delay == 0",
                     "due = critic.step > 0", TD3, "replayed and TD3+BC"),
    "td3-pi-at-the-critic-s-rate": (
        TD3_BC, "apply_fn=actor.apply, params=actor_params, tx=policy_adam",
        "apply_fn=actor.apply, params=actor_params, tx=adam", TD3, "replayed and TD3+BC"),
    "td3-pi-with-the-old-q": (
        TD3_BC, ("    state = state.replace(critic=critic, key=key)\n\n    def delayed(state):\n"
        "        state, info = improve(state, batch, config)\n"),
        ("    new, old, state = critic, state.critic, state.replace(critic=critic, key=key)\n\n"
        "    def delayed(state):\n"
        "        state, info = improve(state.replace(critic=old), batch, config)\n"
        "        state = state.replace(critic=new)\n"), TD3, "replayed and TD3+BC"),
    "td3-target-policy-frozen": (
        TD3_BC, "state.replace(target_actor_params=actor, target_critic_params=critic), info",
        "state.replace(target_critic_params=critic), info", TD3, "replayed and TD3+BC"),
    "td3-metrics-halved": (TD3_BC, "lambda x: config.policy_delay * x, info", "lambda x: x, info",
                           TD3, "replayed and TD3+BC"),
    "td3-imitation-goes-on": (TD3_BC, '{"bc": actor_loss, "td3": td3_loss}',
                              '{"bc": actor_loss, "td3": actor_loss}', TD3, "replayed and online"),
    "td3-optimisers-never-reset": (TD3_BC, 'config.online_optimizer == "reset"',
                                   'config.online_optimizer == "new"', TD3, "the_switch and bc"),
    "td3-old-target-policy-at-the-switch": (
        TD3_BC, "target_actor_params=jax.tree.map(jnp.copy, params),", "", TD3,
        "the_switch and bc"),
    "td3-no-switch": (
        TD3_BC, "        run.shards = list(map(begin, run.shards))\n", "", TD3, "how_far"),
    "td3-online-is-half": (TD3_BC, 'if config.replay == "half" else 0', "if config.replay else 0",
                           TD3, "replay_says and bc"),
    "td3-no-exploration": (TD3_BC, "jnp.clip(action + noise, -1.0, 1.0)", "action", TD3, "noisy"),
    "td3-c-price-sign": (TD3_C, "+ price * distance", "- price * distance", TD3, "pays_for"),
    "td3-c-dual-sign": (TD3_C, "* (epsilon - distance), {}", "* (distance - epsilon), {}", TD3,
                        "rises_above"),
    "td3-c-multiplier-attached-to-nothing": (
        TD3_C, "return new.replace(multiplier=multiplier.replace(params=bounded)), info",
        "return new, info", TD3, "replayed and TD3-C"),
    "td3-c-reference-is-the-policy": (
        TD3_C, "reference = getattr(state, REFERENCES[config.reference])",
        "reference = params", TD3, "pays_for"),
    "td3-c-ema-is-frozen": (
        TD3_C, '"ema": "target_actor_params",', '"ema": "offline_actor_params",', TD3,
        "pays_for"),
    "td3-c-dual-at-the-new-policy": (
        TD3_C, ("    multiplier, _ = gradient_step(state.multiplier, dual_loss, state, "
        'info["constraint"], config)\n'),
        ("    _, later = constrained_loss(new.actor.params, new, batch, None, config)\n"
        "    multiplier, _ = gradient_step(\n"
        '        state.multiplier, dual_loss, state, later["constraint"], config)\n'),
        TD3, "replayed and TD3-C"),
    "td3-c-unbounded-multiplier": (
        TD3_C, 'jnp.clip(multiplier.params["eta"], -3.0, config.multiplier_max)',
        'multiplier.params["eta"]', TD3, "its_bounds"),
    "td3-c-annealing-waits": (
        TD3_C, "price = falling(state.multiplier.step)", "price = falling(0 * state.actor.step)",
        TD3, "falls_with_the_steps"),
    "td3-c-distance-to-the-offline-policy": (
        TD3_C, "getattr(state, other), observations", "state.offline_actor_params, observations",
        TD3, "states_met"),
    "td3-c-a-little-price-at-inf": (
        TD3_C, "improve = plain if math.isinf(config.epsilon) else constrained_step",
        ("config = dataclasses.replace(config, epsilon=min(config.epsilon, 1e9))\n"
        "    improve = constrained_step"), TD3, "to_the_bit"),
    "td3-c-last-is-best": (TD3_C, "best_return > state.best_return", "best_return > -jnp.inf", TD3,
                           "best_reference"),
    "td3-c-period-after-the-step": (
        TD3_C, "take = partial(jnp.where, state.multiplier.step % config.reference_period == 0)",
        "take = partial(jnp.where, (state.multiplier.step + 1) % config.reference_period == 0)",
        TD3, "periodic_reference"),
    "td3-c-old-multiplier-taken-over": (
        TD3_C, 'for name in ("multiplier", "reference_params", "best_return")',
        'for name in ("reference_params", "best_return")', TD3, "of_td3_c_is_taken_over"),
    "td3-c-unevaluated-is-0": (TD3_C, 'row["return"] or "nan"', 'row["return"] or "0"', TD3,
                               "best_reference"),
    "td3-c-online-agent-unsaid": (TD3_C, 'if meta["online"]:', 'if meta["offline"]:', TD3,
                                  "of_td3_c_is_taken_over"),
    "td3-c-unused-steps-refused": (TD3_C, "config.policy_delay and not unused:",
                                   "config.policy_delay:", TD3, "not_made"),
}  # fmt: skip


def planted(name):
    """The whole text of the bug's file with the bug in it."""
    file, old, new, *_ = BUGS[name]
    text = (ROOT / file).read_text()
    if text.count(old) != 1:
        fail(f"{name}: stands {text.count(old)} times in {file}, not once: {old!r}")
    text = text.replace(old, new)
    compile(text, file, "exec")
    return text


def fail(message):
    print(message, file=sys.stderr)
    raise SystemExit(2)


def passes(folder, file, expression):
    """Whether the chosen tests pass in the copy, and the first that fails with its reason."""
    env = os.environ | {
        "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1",
        "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false", "PYTHONDONTWRITEBYTECODE": "1",
        "COLUMNS": "300",  # of pytest's summary: room for the reasons
    }
    command = [sys.executable, "-m", "pytest", "-x", "-n", "0", "-p", "no:cacheprovider",
               file]
    command += ["-k", expression] if expression else []
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        print(done.stdout[-3000:], done.stderr[-3000:], file=sys.stderr)
        fail(f"pytest {file} -k {expression!r} ended with {done.returncode}")
    failed = [line.split("::")[-1][:110] for line in done.stdout.splitlines()
              if line.startswith(("FAILED", "ERROR"))]
    return done.returncode == 0, failed[0] if failed else ""


def main():
    names = sys.argv[1:] or list(BUGS)
    texts = {name: planted(name) for name in names}
    caught = 0
    with tempfile.TemporaryDirectory() as folder:
        for part in ("algorithms", "baselines", "tests"):
            shutil.copytree(ROOT / part, Path(folder, part),
                            ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        for file in sorted({BUGS[name][3] for name in names}):
            expressions = sorted({BUGS[name][4] for name in names if BUGS[name][3] == file})
            if not passes(folder, file, " or ".join(expressions))[0]:
                fail(f"{file} fails without any bug")
        for name in names:
            file, _, _, tests, expression = BUGS[name]
            clean, begin = Path(folder, file).read_text(), time.time()
            Path(folder, file).write_text(texts[name])
            missed, failed = passes(folder, tests, expression)
            Path(folder, file).write_text(clean)
            caught += not missed
            result = "MISSED" if missed else "caught"
            seconds = time.time() - begin
            print(f"{name:34} {Path(file).name:15} {result}  {seconds:4.0f} s  {failed}",
                  flush=True)
    print(f"{caught} of {len(names)} planted bugs caught")
    raise SystemExit(caught < 0.9 * len(names))


if __name__ == "__main__":
    main()
