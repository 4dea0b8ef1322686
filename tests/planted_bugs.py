"""Would the tests notice? Each bug below is planted, one at a time, in a temporary copy of the
repository, and the tests that should catch it are run there.

    python tests/planted_bugs.py                        # all, one after the other
    python tests/planted_bugs.py -n 2 baselines/sac.py  # two at a time, those of a script
    python tests/planted_bugs.py tau-swapped no-mask    # some

Exit code 1 if fewer than 9 of 10 of a script's are caught; 2 if a text to replace does not stand
(once) in its file, a planted text is no Python, or the tests fail without any bug.
"""

import argparse
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUGS = {}  # name: (file, the text as it stands, the bug, test file, -k expression)


def plant(file, bugs):
    """Add a script's bugs, {name: (the text as it stands, the bug, test file, -k expression)}."""
    again = BUGS.keys() & bugs.keys()
    assert not again, again
    BUGS.update({name: (file, *bug) for name, bug in bugs.items()})


LOSSES, LEARNING, RUN, SCRIPTS = (
    f"tests/test_{name}.py" for name in ("losses", "learning", "run", "scripts")
)

# --------------------------------------------------------------------------------------------- IQL
OF_TARGET = "agent.critic.apply_fn(agent.target_critic_params, batch.observations, batch.actions)\n"
OF_Q = "agent.critic.apply_fn(agent.critic.params, batch.observations, batch.actions)\n"
V_STEP = "    agent = agent.replace(value=value, key=key)\n"
PI_STEP = (
    "    actor, actor_info = "
    "gradient_step(agent.actor, actor_loss, agent, batch, actor_key, config)\n"
)
Q_STEP = (
    "    critic, critic_info = "
    "gradient_step(agent.critic, critic_loss, agent, batch, None, config)\n"
)
plant("algorithms/iql.py", {
    "expectile-sign": (
        "config.expectile - (u < 0)", "config.expectile - (u > 0)", LOSSES, "by_hand"),
    "value-without-target": (
        f"q = {OF_TARGET}    v = agent.value.apply_fn(params",
        f"q = {OF_Q}    v = agent.value.apply_fn(params", LOSSES, "loss_is and iql"),
    "pi-without-target": (
        f"q = {OF_TARGET}    v = agent.value.apply_fn(agent.value.params",
        f"q = {OF_Q}    v = agent.value.apply_fn(agent.value.params", LOSSES, "loss_is and iql"),
    "min-to-max": (
        "u = q.min(axis=0) - v", "u = q.max(axis=0) - v", LOSSES, "loss_is and iql"),
    "weight-sign": (
        "jnp.exp(config.beta * advantage)", "jnp.exp(-config.beta * advantage)",
        LEARNING, "bandit and iql"),
    "weight-unclipped": (
        "jnp.minimum(jnp.exp(config.beta * advantage), config.max_weight)",
        "jnp.exp(config.beta * advantage)", LOSSES, "by_hand"),
    "mean-instead-of-sum": (
        "** 2).mean(axis=1).sum()", "** 2).mean(axis=1).mean()", LOSSES, "loss_is and iql"),
    "no-discount": (
        "config.discount * batch.masks * next_v", "batch.masks * next_v", LEARNING, "chain"),
    "no-mask": (
        "config.discount * batch.masks * next_v", "config.discount * next_v", LEARNING, "chain"),
    "value-of-the-wrong-state": (
        "next_v = agent.value.apply_fn(agent.value.params, batch.next_observations)",
        "next_v = agent.value.apply_fn(agent.value.params, batch.observations)",
        LEARNING, "chain"),
    "no-dropout": (
        "batch.observations, True, rngs", "batch.observations, False, rngs", LOSSES, "drops_out"),
    "std-unclipped": (
        "jnp.exp(jnp.clip(log_std, -5.0, 2.0))", "jnp.exp(log_std)", LOSSES, "bounds and iql"),
    "mean-unbounded": (
        "mean = nn.tanh(nn.Dense(self.action_dim, kernel_init=orthogonal)(features))",
        "mean = nn.Dense(self.action_dim, kernel_init=orthogonal)(features)",
        LOSSES, "bounds and iql"),
    "pi-with-the-old-v": (V_STEP + PI_STEP, PI_STEP + V_STEP, LOSSES, "replayed and iql"),
    "q-with-the-old-v": (
        V_STEP + PI_STEP + Q_STEP, Q_STEP + V_STEP + PI_STEP, LOSSES, "replayed and iql"),
    "key-used-twice": (V_STEP, V_STEP.replace(", key=key", ""), LOSSES, "replayed and iql"),
    "tau-swapped": (
        "incremental_update(critic.params, agent.target_critic_params, config.tau)",
        "incremental_update(agent.target_critic_params, critic.params, config.tau)",
        LOSSES, "replayed and iql"),
    "target-of-the-old-q": (
        "incremental_update(critic.params, agent.target",
        "incremental_update(agent.critic.params, agent.target", LOSSES, "replayed and iql"),
    "policy-frozen-online": (
        "optax.join_schedules(rates, updates[:1])", "rates[0]", LOSSES, "learning_rate"),
    "policy-decays-unasked": (
        "0.0 if config.decay_actor_lr else 1.0", "0.0", LOSSES, "learning_rate"),
    "evaluation-samples": (
        "agent.actor.apply_fn(agent.actor.params, observations).mean()",
        "agent.actor.apply_fn(agent.actor.params, observations).sample(seed=agent.key)",
        LOSSES, "drops_out and iql"),
    "no-exploration": (
        "policy.sample(seed=key)[0]", "policy.mean()[0]", LOSSES, "bounds and iql"),
    "exploration-leaves-the-box": (
        "jnp.clip(policy.sample(seed=key)[0], -1.0, 1.0)", "policy.sample(seed=key)[0]",
        LOSSES, "bounds and iql"),
    "union-off-by-one": ("x[rows - count]", "x[rows - count + 1]", LEARNING, "batches and iql"),
    "batches-of-the-dataset-only": (
        "(config.batch_size,), 0, count + size)", "(config.batch_size,), 0, count)",
        LEARNING, "batches and iql"),
    "union-swapped": ("rows < count), old, new)", "rows < count), new, old)",
                      LEARNING, "batches and iql"),
})  # fmt: skip

# ------------------------------------------- What every script has, planted in IQL: data and units
plant("algorithms/iql.py", {
    "time-limit-ends": (
        "1.0 - episode.terminations, ends)", "1.0 - ends, ends)", LEARNING, "dataset_is"),
    "next-observation-is-the-observation": (
        "episode.rewards, observations[1:]", "episode.rewards, observations[:-1]",
        LEARNING, "dataset_is"),
    "no-ends-in-the-data": (
        "== len(episode.rewards))", "== len(observations))", LEARNING, "dataset_is"),
    "data-actions-not-rescaled": (
        "np.clip(rows.actions / high,", "np.clip(rows.actions,", LEARNING, "dataset_is"),
    "data-actions-at-the-bound": ("-1 + 1e-5, 1 - 1e-5", "-1, 1", LEARNING, "dataset_is"),
    "part-of-the-box-stretched": (
        "high = np.ones_like(high)", "pass", LEARNING, "dataset_is"),
    "no-reward-shift": (
        '"rewards": (scale, config.reward_shift)', '"rewards": (scale, 0.0)',
        LEARNING, "dataset_is"),
    "returns-not-normalised": (
        "(1000 / np.ptp(returns) if config.normalize_returns else 1)", "1",
        LEARNING, "normalised_returns"),
    "normalised-by-the-largest-reward": (
        "1000 / np.ptp(returns)", "1000 / np.ptp(rows.rewards)", LEARNING, "normalised_returns"),
    "observations-shifted-the-wrong-way": (
        "= 1 / std, -rows.observations", "= 1 / std, rows.observations", LEARNING, "dataset_is"),
    "next-observations-not-normalised": (
        'next_observations=rescale(rows.next_observations, *units["observations"]),\n', "",
        LEARNING, "dataset_is"),
    "preset-before-flags": (
        "parse(default=dataclasses.replace(Config(), **PRESETS[preset]))",
        "dataclasses.replace(config, **PRESETS[preset])", LEARNING, "dataset_is"),
    "action-not-rescaled-online": (
        'np.clip(x, -1, 1) * units["actions"]', "np.clip(x, -1, 1)", LEARNING, "transitions"),
    "reward-not-scaled-online": (
        'rescale(x, *units["rewards"]))\n    return', "x)\n    return", LEARNING, "transitions"),
    "observation-not-normalised-online": (
        'rescale(x, *units["observations"]), None)', "np.float32(x), None)",
        LEARNING, "transitions"),
    "returns-of-scaled-rewards": (
        "RecordEpisodeStatistics(gym.make(spec, disable_env_checker=True))",
        "RecordEpisodeStatistics(wrap.TransformReward(gym.make(spec), lambda x: 2 * x))",
        LEARNING, "optimal"),
})  # fmt: skip

# --------------------------------------------------- Rounds: online, offline, evaluation, main
plant("algorithms/iql.py", {
    "online-time-limit-ends": (
        "1.0 - terminated, 1.0 * ends)", "1.0 - ends, 1.0 * ends)", LEARNING, "transitions"),
    "round-does-not-end-its-episodes": (
        "terminated | truncated | (step + 1 == last)", "terminated | truncated",
        LEARNING, "transitions"),
    "next-observation-after-reset": (
        'following[i] = info["final_obs"][i]', "pass", LEARNING, "transitions"),
    "observation-before-reset": (
        "store(buffers, rows, step % capacity), after",
        "store(buffers, rows, step % capacity), following", LEARNING, "transitions"),
    "insert-off-by-one": (
        "store(buffers, rows, step % capacity)", "store(buffers, rows, (step + 1) % capacity)",
        LEARNING, "transitions"),
    "insert-of-one-seed": (
        "buffer.at[:, position].set(row)", "buffer.at[:, position].set(row[:1])",
        LEARNING, "transitions"),
    "batches-of-unfilled-rows": (
        "size, due = min(step + 1, capacity),", "size, due = capacity,", LEARNING, "transitions"),
    "every-round-the-same-episodes": (
        "(config.seed + i + 1) + first for", "(config.seed + i + 1) for", LEARNING, "transitions"),
    "every-seed-the-same-episodes": (
        "10**9 * (config.seed + i + 1) + first", "10**9 * (config.seed + 1) + first",
        LEARNING, "transitions"),
    "no-updates-online": (
        "step >= warmup and (step + 1) % every == 0", "False", LEARNING, "transitions"),
    "too-many-updates-offline": (
        "size = min(200, last - begin)", "size = 200", LEARNING, "transitions"),
    "sums-for-means": (
        "for x in totals) / (last - first)", "for x in totals)", LEARNING, "optimal"),
    "evaluated-in-one-start": (
        "(config.seed + i) + episode for", "(config.seed + i) for", LEARNING, "optimal"),
    "evaluation-goes-on": (
        "(terminated | truncated) & np.isnan(returns)", "terminated | truncated",
        LEARNING, "optimal"),
    "last-round-too-long": (
        "min(first + config.interval, steps)", "first + config.interval",
        LEARNING, "transitions"),
    "one-key-for-all-seeds": (
        "jax.random.PRNGKey(seed) for", "jax.random.PRNGKey(config.seed) for", LEARNING,
        "transitions and iql"),
    "config-not-compared": ("if said.get(name) != its.get(name)]", "if False]", RUN, "another"),
    "hash-not-compared": (
        '"dataset_sha256": digest', '"dataset_sha256": ""', RUN, "another_dataset"),
    "metrics-not-written": (
        'csv.writer(file, lineterminator="\\n").writerows(table)', "pass", RUN, "a_row_per_round"),
    "metrics-of-this-process-only": (
        'meta["config"], meta["done"], meta["rows"]', 'meta["config"], meta["done"], []',
        RUN, "killed_run"),
    "rounds-again": (
        'meta["config"], meta["done"], meta["rows"]', 'meta["config"], 0, meta["rows"]',
        RUN, "killed_run or finished"),
    "buffers-not-restored": (
        "state = restore(state, arrays, folder)",
        'state |= restore({"agents": agents}, arrays, folder)', RUN, "killed_run"),
    "saved-in-place": (
        'folder / f"checkpoint.{os.getpid()}.tmp"', 'folder / "checkpoint.npz"',
        RUN, "killed_run or disk"),
    "temporary-left": ("temporary.unlink(missing_ok=True)", "pass", RUN, "disk"),
    "parameters-not-checked": (
        "in (info | arrays).items() if not", "in info.items() if not", RUN, "not_finite"),
    "pickle-allowed": (
        '"checkpoint.npz"))', '"checkpoint.npz"), allow_pickle=True)', SCRIPTS, "no_pickle"),
    "init-from-with-its-key": (
        '        arrays["agents/key"] = np.asarray(agents.key)\n', "", RUN, "init_from_starts"),
    "init-from-other-units": (
        ' or meta["config"]["units"] != said["units"]', "", RUN, "init_from_another"),
    "init-from-trains-offline": (
        "[*phases(config)][skip:]", "[*phases(config)]", RUN, "init_from_starts"),
    "restored-without-shapes": (
        "if {name: x.shape for name, x in arrays.items()} != {name: x.shape for",
        "if {name: () for name in arrays} != {name: () for", RUN, "init_from_another"),
})  # fmt: skip

# --------------------------------------------------------------------------------------------- SAC
plant("baselines/sac.py", {
    "sac-target-without-target": (
        "agent.target_critic_params, batch.next_observations, next_actions",
        "params, batch.next_observations, next_actions", LOSSES, "loss_is and sac"),
    "sac-next-q-mean": (
        "next_q.min(axis=0)", "next_q.mean(axis=0)", LOSSES, "loss_is and sac"),
    "sac-entropy-sign": (
        "next_q.min(axis=0) - temp", "next_q.min(axis=0) + temp", LOSSES, "loss_is and sac"),
    "sac-actions-of-the-old-state": (
        "apply_fn(agent.actor.params, batch.next_observations)",
        "apply_fn(agent.actor.params, batch.observations)", LOSSES, "loss_is and sac"),
    "sac-no-mask": (
        "config.discount * batch.masks * next_v", "config.discount * next_v", LEARNING,
        "bandit and sac"),
    "sac-mean-instead-of-sum": (
        "** 2).mean(axis=1).sum()", "** 2).mean(axis=1).mean()", LOSSES, "loss_is and sac"),
    "sac-temperature-not-in-pi": (
        "temperature * log_prob - q", "log_prob - q", LOSSES, "loss_is and sac"),
    "sac-pi-descends": ("log_prob - q.min(axis=0)", "log_prob + q.min(axis=0)",
                        LEARNING, "bandit and sac"),
    "sac-temperature-sign": (
        "temperature * (entropy - target_entropy)", "temperature * (target_entropy - entropy)",
        LEARNING, "bandit and sac"),
    "sac-target-entropy-sign": (
        "config.entropy_per_action * action_dim", "-config.entropy_per_action * action_dim",
        LEARNING, "bandit and sac"),
    "sac-pi-with-the-old-q": (
        "    agent = agent.replace(critic=critic, key=key)\n",
        "    agent = agent.replace(key=key)\n", LOSSES, "replayed and sac"),
    "sac-same-noise-twice": (
        "agent.critic, critic_loss, agent, batch, critic_key",
        "agent.critic, critic_loss, agent, batch, actor_key", LOSSES, "replayed and sac"),
    "sac-tau-swapped": (
        "incremental_update(critic.params, agent.target_critic_params, config.tau)",
        "incremental_update(agent.target_critic_params, critic.params, config.tau)",
        LOSSES, "replayed and sac"),
    "sac-temperature-frozen": (
        "actor=actor, temperature=temperature,", "actor=actor,", LOSSES, "replayed and sac"),
    "sac-std-unclipped": (
        "jnp.exp(jnp.clip(log_std, -10.0, 2.0))", "jnp.exp(log_std)", LOSSES, "extreme and sac"),
    "sac-not-squashed-in-evaluation": (
        "jnp.tanh(policy.distribution.mean())", "policy.distribution.mean()", LOSSES,
        "sac_actions"),
    "sac-no-uniform-start": (
        "jnp.where(agent.critic.step == 0, uniform, action)", "action", LOSSES, "sac_actions"),
    "sac-only-uniform": (
        "jnp.where(agent.critic.step == 0, uniform, action)", "uniform", LOSSES, "sac_actions"),
    "sac-half-the-box-at-first": ("minval=-1.0", "minval=0.0", LOSSES, "sac_actions"),
    "sac-updates-at-once": (
        "update=update, warmup=config.warmup_steps)", "update=update)", LEARNING,
        "transitions and sac"),
    "sac-batches-of-unfilled-rows": (
        "(config.batch_size,), 0, size)", "(config.batch_size,), 0, len(buffer.rewards))",
        LEARNING, "batches and sac"),
})  # fmt: skip

# ---------------------------------------------------------------------------------------------- BC
plant("baselines/bc.py", {
    "bc-likelihood-sign": ("loss = -policy.log_prob", "loss = policy.log_prob", LOSSES,
                           "loss_is and bc"),
    "bc-likelihood-of-itself": (
        "policy.log_prob(batch.actions)", "policy.log_prob(policy.mean())", LOSSES,
        "loss_is and bc"),
    "bc-no-dropout": ("batch.observations, True, rngs", "batch.observations, False, rngs", LOSSES,
                      "drops_out and bc"),
    "bc-dropout-in-evaluation": (
        "(agent.actor.params, observations)",
        "(agent.actor.params, observations, True, rngs={'dropout': agent.key})",
        LOSSES, "drops_out and bc"),
    "bc-std-unclipped": (
        "jnp.exp(jnp.clip(log_std, -5.0, 2.0))", "jnp.exp(log_std)", LOSSES, "bounds and bc"),
    "bc-frozen": ("agent.replace(actor=actor, key=key), info", "agent.replace(key=key), info",
                  LOSSES, "replayed and bc"),
    "bc-key-used-twice": ("agent.replace(actor=actor, key=key)", "agent.replace(actor=actor)",
                          LOSSES, "replayed and bc"),
    "bc-worst-trajectories": ("np.argsort(-returns", "np.argsort(returns", LOSSES, "percent"),
    "bc-rows-after-an-end": (
        "first = np.flatnonzero(np.append(1, dataset.ends[:-1]))",
        "first = np.append(0, np.flatnonzero(dataset.ends)[:-1])", LOSSES, "percent"),
    "bc-none-at-share-0": ("max(1, round(share * len(returns)))", "round(share * len(returns))",
                           LOSSES, "percent"),
    "init-from-any-script": (
        'meta["config"]["script"] not in INIT_FROM or ', "", RUN, "another_script"),
    "bc-all-trajectories": (
        "    dataset = best_trajectories(dataset, config.best_share)\n", "", LEARNING,
        "optimal"),
})  # fmt: skip


for name, bug in tomllib.loads((ROOT / "tests" / "planted_bugs.toml").read_text()).items():
    plant(bug["file"], {name: tuple(bug[x] for x in ("old", "new", "tests", "expression"))})


# ------------------------------------------------------------------------------------ The mechanism
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
    print(message, file=sys.stderr, flush=True)
    raise SystemExit(2)


def copy_of_the_repository(folder):
    for part in ("algorithms", "baselines", "tests"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / part, Path(folder, part), ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def passes(folder, file, expression):
    """Whether the chosen tests pass in the copy, and the first that fails with its reason."""
    env = os.environ | {
        "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1",
        "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
        "COLUMNS": "300",  # of pytest's summary: room for the reasons
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-x", "-n", "0", "-p", "no:cacheprovider", file]
    command += ["-k", expression]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        print(done.stdout[-3000:], done.stderr[-3000:], file=sys.stderr)
        fail(f"pytest {file} -k {expression!r} ended with {done.returncode}")
    words = ("FAILED", "ERROR")
    failed = [x.split("::")[-1][:110] for x in done.stdout.splitlines() if x.startswith(words)]
    return done.returncode == 0, failed[0] if failed else ""


def try_one(name, text, folders):
    """Plant a bug in a copy that is free; whether it is caught."""
    file, _, _, tests, expression = BUGS[name]
    folder, begin = folders.get(), time.time()
    clean = Path(folder, file).read_text()
    Path(folder, file).write_text(text)
    missed, failed = passes(folder, tests, expression)
    Path(folder, file).write_text(clean)
    folders.put(folder)
    result, seconds = "MISSED" if missed else "caught", time.time() - begin
    print(f"{name:36} {Path(file).name:15} {result}  {seconds:4.0f} s  {failed}", flush=True)
    return not missed


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("-n", type=int, default=1, help="copies: bugs tried at a time")
    parser.add_argument("names", nargs="*", help="of bugs or scripts; default: all")
    flags = parser.parse_args()
    names = [
        name for name, bug in BUGS.items() if not flags.names or {name, bug[0]} & {*flags.names}
    ]
    texts = {name: planted(name) for name in names}
    with tempfile.TemporaryDirectory() as base, ThreadPoolExecutor(flags.n) as pool:
        folders = queue.Queue()
        for i in range(flags.n):
            folders.put(copy_of_the_repository(Path(base, str(i))))
        for file in sorted({BUGS[name][3] for name in names}):
            used = " or ".join({f"({BUGS[name][4]})" for name in names if BUGS[name][3] == file})
            if not passes(Path(base, "0"), file, used)[0]:
                fail(f"{file} fails without any bug")
        results = pool.map(lambda name: try_one(name, texts[name], folders), names)
        caught = dict(zip(names, results, strict=True))
    shares = []
    for file in sorted({BUGS[name][0] for name in names}):
        own = [caught[name] for name in names if BUGS[name][0] == file]
        shares.append(sum(own) / len(own))
        print(f"{file}: {sum(own)} of {len(own)} planted bugs caught")
    raise SystemExit(min(shares, default=0) < 0.9)


if __name__ == "__main__":
    main()
