"""Speed and memory of the scripts, beside a bare scan of the same networks: writes speed.md.

    python results/speed.py                  # every case, medians of 7 repetitions
    python results/speed.py --only iql       # one script's; the other rows stay as they are

A benchmark, not a test: run it on an idle machine. Every case is a process of its own. Sizes are
D4RL's: 11 observations, 3 actions, 1,000,000 rows, batches of 256, two hidden layers of 256.
"""

import argparse
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {path.stem: path for folder in ("algorithms", "baselines")
           for path in sorted(ROOT.glob(f"{folder}/*.py"))}
CASES = {  # name: (what is measured, unit)
    "bare": ("bare scan of IQL's matrix products and Adam, 1 seed", "updates/s"),
    "iql-offline-1": ("iql.py offline, 1 seed", "updates/s"),
    "iql-offline-cores": ("iql.py offline, 1 seed per core", "seed-updates/s"),
    "iql-online-1": ("iql.py online in Hopper-v5, 1 seed, updates included", "steps/s"),
    "iql-online-cores": ("iql.py online in Hopper-v5, 1 seed per core", "seed-steps/s"),
    "iql-start": ("iql.py, process start to the end of the first update, 1M rows", "s"),
    "sac-updates-1": ("sac.py, updates alone, 1 seed", "updates/s"),
    "sac-online-1": ("sac.py online in Hopper-v5, 1 seed, updates included", "steps/s"),
    "bc-offline-1": ("bc.py offline, 1 seed", "updates/s"),
    "cql-offline-1": ("cql.py offline, 3 x 10 sampled actions, 1 seed", "updates/s"),
    "cql-offline-cores": ("cql.py offline, 1 seed per core", "seed-updates/s"),
    "cal_ql-offline-1": ("cal_ql.py offline, 3 x 10 sampled actions, 1 seed", "updates/s"),
    "cal_ql-online-1": ("cal_ql.py online in Hopper-v5, 1 seed, updates included", "steps/s"),
    "sac_finetune-online-1": ("sac_finetune.py --mode mixed online in Hopper-v5", "steps/s"),
    "td3_bc-offline-1": ("td3_bc.py offline, 1 seed", "updates/s"),
    "td3_bc-offline-cores": ("td3_bc.py offline, 1 seed per core", "seed-updates/s"),
    "td3_bc-online-1": ("td3_bc.py --online-loss td3 online in Hopper-v5, 1 seed", "steps/s"),
    "td3_c-online-1": ("td3_c.py online in Hopper-v5, 1 seed, updates included", "steps/s"),
    "rlpd-online-1": ("rlpd.py online in Hopper-v5, 10 critics, critic updates", "updates/s"),
    "ppo-online-1": ("ppo.py in Hopper-v5, 8 environments, 10 x 16 updates per 2048", "steps/s"),
    "uni_o4-improvement-1": ("uni_o4.py, 100 offline PPO updates, 4 members, Q 2 x 256", "s"),
    "uni_o4-improvement-paper": ("the same with the published critics, Q 2 x 1024", "s"),
    "uni_o4-amq-1": ("uni_o4.py, an AM-Q query: 4 members, 510 starts, horizon 100", "s"),
    **{f"pa_rl-{part}-{policy}-{preset}": (f"pa_rl.py, {policy}, {preset}: {what}", "1/s")
       for preset in ("smoke", "antmaze") for policy in ("diffusion", "transformer", "gaussian")
       for part, what in (("critic", "critic updates"), ("distil", "distillation updates"),
                          ("optimise", "action optimisations of s and s', samples included"))},
    "pa_rl-separate-gaussian-smoke": (
        "pa_rl.py, gaussian, smoke: critic updates, actions optimised three times", "1/s"),
    "pa_rl-separate-gaussian-antmaze": (
        "pa_rl.py, gaussian, antmaze: critic updates, actions optimised three times", "1/s"),
}
SETTINGS = {  # what differs from the defaults of Config
    "iql": {}, "sac": {}, "bc": {}, "cql": {}, "cal_ql": {}, "rlpd": {"critic_updates": 20},
    "sac_finetune": {"mode": "mixed", "offline_ratio": 0.5, "critic_updates": 1}, "ppo": {},
    "uni_o4": {}, "td3_bc": {"online_loss": "td3"}, "td3_c": {},
}
STEPS = {"cql": 200, "cal_ql": 200, "rlpd": 20}  # per repetition; else 1,000
ROWS, OBSERVATIONS, ACTIONS, REPETITIONS = 1_000_000, 11, 3, 7


def load(name):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS[name])
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def dataset(module):
    """A Batch of 1M random rows."""
    rng = np.random.default_rng(0)
    shapes = ((ROWS, OBSERVATIONS), (ROWS, ACTIONS), (ROWS,), (ROWS, OBSERVATIONS), (ROWS,))
    batch = module.Batch(*[rng.standard_normal(shape, dtype=np.float32) for shape in shapes])
    if hasattr(module, "monte_carlo_returns"):
        return batch.replace(mc_returns=batch.rewards)
    if hasattr(module, "amq_scores"):  # uni_o4.py: weights of the rows in cloning
        return batch.replace(mc_returns=np.ones_like(batch.rewards))
    return batch


def repeat(function, amount, repetitions=REPETITIONS):
    """Rates of `function`, called once to compile and then `repetitions` times."""
    function()
    rates = []
    for _ in range(repetitions):
        begin = time.perf_counter()
        function()
        rates.append(amount / (time.perf_counter() - begin))
    return rates


def bare():
    """What the matrix products of an IQL update and Adam alone cost: value, policy and two critics
    forward and backward, and two target critics forward, as one scan; nothing of ours."""
    import jax
    import jax.numpy as jnp
    import optax

    sizes = {"v": OBSERVATIONS, "pi": OBSERVATIONS, "q1": OBSERVATIONS + ACTIONS}
    sizes["q2"] = sizes["q1"]
    key = jax.random.PRNGKey(0)

    def network(size):
        shapes = ((size, 256), (256,), (256, 256), (256,), (256,))
        return [0.05 * jax.random.normal(key, shape) for shape in shapes]

    def forward(p, x):
        return (jax.nn.relu(jax.nn.relu(x @ p[0] + p[1]) @ p[2] + p[3]) * p[4]).sum(-1)

    params = {name: network(size) for name, size in sizes.items()}
    target = jax.tree.map(jnp.copy, {name: params[name] for name in ("q1", "q2")})
    rows = {n: jax.random.normal(key, (ROWS, n)) for n in set(sizes.values())}
    adam = optax.adam(3e-4)

    def body(carry, key):
        params, target, moments = carry
        batch = {n: x[jax.random.randint(key, (256,), 0, ROWS)] for n, x in rows.items()}
        wanted = sum(forward(target[name], batch[sizes[name]]) for name in target)
        next_v = forward(params["v"], batch[OBSERVATIONS] + 1)

        def loss(params):
            errors = [(forward(params[n], batch[size]) - wanted - next_v) ** 2
                      for n, size in sizes.items()]
            return sum(error.mean() for error in errors)

        updates, moments = adam.update(jax.grad(loss)(params), moments)
        params = optax.apply_updates(params, updates)
        mixed = optax.incremental_update({n: params[n] for n in target}, target, 0.005)
        return (params, mixed, moments), None

    scan = jax.jit(lambda carry, keys: jax.lax.scan(body, carry, keys)[0], donate_argnums=0)
    state = [(params, target, adam.init(params))]
    keys = jax.random.split(key, 1000)

    def run():
        state[0] = jax.block_until_ready(scan(state[0], keys))

    return repeat(run, 1000)


def make_run(module, num_seeds, **settings):
    """A Run at D4RL's sizes in Hopper-v5, without files."""
    import jax

    settings = SETTINGS[module.__name__] | settings
    config = module.Config(num_seeds=num_seeds, **settings)
    module.use_all_cores(num_seeds)
    devices = module.seed_devices(num_seeds)
    spec = module.make_env(module.environment_spec(None, "Hopper-v5")).spec.to_json()
    zeros, ones = np.zeros(OBSERVATIONS), np.ones(OBSERVATIONS)
    transform = module.Transform(zeros, ones, np.zeros(3), np.ones(3), np.array(1.0), np.array(0.0))
    shards = module.create_shards(config, OBSERVATIONS, ACTIONS, devices)
    datasets = [None] * len(devices)
    if hasattr(module, "update_steps") or hasattr(module, "offline_updates"):
        rows = dataset(module)
        datasets = [jax.device_put(rows, device) for device in devices]
    return module.Run(config, spec, None, devices, transform, shards, [], datasets)


def offline(module, num_seeds):
    run = make_run(module, num_seeds)
    steps = STEPS.get(module.__name__, 1000)
    return repeat(lambda: module.offline_chunk(run, steps), num_seeds * steps)


def online(module, num_seeds):
    run = make_run(module, num_seeds, online_steps=50_000, warmup_steps=1)
    module.start_online(run)
    run.online = 1
    steps = STEPS.get(module.__name__, 1000)
    amount = num_seeds * steps * (20 if module.__name__ == "rlpd" else 1)
    return repeat(lambda: module.online_chunk(run, steps), amount)


def updates(module, num_seeds):
    """Updates of an online script without its environment."""
    run = make_run(module, num_seeds, online_steps=1000, utd_ratio=500)
    module.start_online(run)
    full = np.full_like(run.buffers[0].size, 1000)
    run.buffers = [run.buffers[0].replace(size=full)]
    observations = np.zeros((num_seeds, OBSERVATIONS), np.float32)

    def some():
        inputs = run.shards[0], run.buffers[0], observations, run.datasets[0]
        run.shards[0], actions, _ = module.online_step(*inputs, run.config, True)
        actions.block_until_ready()

    return repeat(some, 500 * num_seeds)


def on_policy(module, num_seeds):
    run = make_run(module, num_seeds, online_steps=10**7)
    module.start_on_policy(run)
    steps = 5 * run.config.rollout_steps
    return repeat(lambda: module.on_policy_chunk(run, steps), num_seeds * steps)


def uni_o4(part, size):
    """Seconds of 100 offline PPO updates, or of a query."""
    import jax

    module = load("uni_o4")
    narrow = {} if size == "paper" else {
        "critic_hidden_dims": (256, 256), "value_hidden_dims": (256, 256)}
    run = make_run(module, 1, horizon=100, termination="hopper", **narrow)
    module.prepare_offline(run)

    def improve():
        run.shards[0], info = module.offline_updates(
            run.shards[0], run.datasets[0], "improvement", run.config, 100)
        jax.block_until_ready(info)

    def ask():
        run.shards[0], found = module.query(run.shards[0], run.datasets[0], run.config)
        jax.block_until_ready(found)

    if part == "amq":
        ask()  # the first one asks the references, too
    return [1 / rate for rate in repeat({"amq": ask, "improvement": improve}[part], 1)]


def pa_rl(part, policy, preset):
    """Rates of PA-RL's updates on one batch, at the sizes of the preset."""
    import dataclasses
    from functools import partial

    import jax

    module = load("pa_rl")
    settings = module.PRESETS[preset] | {"policy": policy}
    config = module.settle(dataclasses.replace(module.Config(), **settings))
    create = partial(module.create_agent_state, observation_dim=OBSERVATIONS, action_dim=ACTIONS,
                     config=config)
    state = jax.jit(create)(jax.random.PRNGKey(0))
    batch = jax.tree.map(lambda x: x[: config.batch_size], dataset(module))
    batch = batch.replace(actions=batch.actions.clip(-1, 1))

    def optimise(state, batch, config):
        key, action_key = jax.random.split(state.key)
        both = jax.numpy.stack([batch.observations, batch.next_observations])
        one = partial(module.target_actions, state, config=config)
        found = jax.lax.map(lambda xs: one(*xs), (both, jax.random.split(action_key)))
        return state.replace(key=key), found[0].sum()

    parts = {"critic": module.update_step, "distil": module.distil, "optimise": optimise,
             "separate": separate_update(module)}
    count = 50 if preset == "smoke" else 1

    @partial(jax.jit, donate_argnums=0)
    def several(state, batch):
        return jax.lax.scan(lambda s, _: parts[part](s, batch, config), state, length=count)

    states = [state]

    def run():
        states[0], info = several(states[0], batch)
        jax.block_until_ready(info)

    return repeat(run, count, REPETITIONS if preset == "smoke" else 3)  # half a minute each


def separate_update(module):
    """PA-RL's critic update with the actions of s and s' optimised wherever they are needed: once
    for the targets, twice for the difference."""
    import jax

    def update(state, batch, config):
        state_key, *keys, critic_key = jax.random.split(state.key, 5)
        backup, _ = module.target_actions(state, batch.next_observations, keys[0], config)
        following, _ = module.target_actions(state, batch.next_observations, keys[1], config)
        own, _ = module.target_actions(state, batch.observations, keys[2], config)

        def loss(params):
            target_key, difference_key = jax.random.split(critic_key)
            targets = module.backup_targets(state, batch, backup, target_key, config)
            outputs = module.q_outputs(state, params, batch.observations, batch.actions[None])
            td_loss = module.value_error(outputs[:, 0], targets, config).mean()
            difference, _ = module.conservative_difference(
                params, state, batch, own, following, difference_key, config)
            return td_loss + config.cql_alpha * difference

        critic = state.critic.apply_gradients(grads=jax.grad(loss)(state.critic.params))
        target = module.optax.incremental_update(
            critic.params, state.target_critic_params, config.tau)
        state = state.replace(critic=critic, target_critic_params=target, key=state_key)
        return state, critic.step

    return update


def start():
    """Seconds from the start of a process to the end of its first update."""
    import tempfile

    module = load("iql")
    rows = dataset(module)
    folder = Path(tempfile.mkdtemp())
    timeouts = np.arange(ROWS) % 1000 == 999
    np.savez(folder / "rows.npz", observations=rows.observations, rewards=rows.rewards,
             actions=np.clip(rows.actions, -1, 1), next_observations=rows.next_observations,
             terminals=np.zeros(ROWS, bool), timeouts=timeouts)
    command = [sys.executable, SCRIPTS["iql"], "--dataset", folder / "rows.npz", "--env-id",
               "Hopper-v5", "--offline-steps", "1", "--online-steps", "0", "--eval-interval", "1",
               "--log-interval", "1", "--eval-episodes", "1"]
    seconds = []
    for i in range(REPETITIONS):
        begin = time.perf_counter()
        run = [*map(str, command), "--run-dir", str(folder / str(i))]
        subprocess.run(run, check=True, capture_output=True)
        seconds.append(time.perf_counter() - begin)
    return seconds


def measure(case):
    """One case in this process: prints its rates and peak memory as JSON."""
    cores = len(os.sched_getaffinity(0))
    name, *parts = case.split("-")
    if case == "bare":
        rates = bare()
    elif case == "iql-start":
        rates = start()
    elif name in ("uni_o4", "pa_rl"):
        rates = {"uni_o4": uni_o4, "pa_rl": pa_rl}[name](*parts)
    elif name == "ppo":
        rates = on_policy(load(name), 1)
    else:
        num_seeds = cores if parts[1] == "cores" else 1
        part = {"offline": offline, "online": online, "updates": updates}[parts[0]]
        rates = part(load(name), num_seeds)
    kind = resource.RUSAGE_CHILDREN if case == "iql-start" else resource.RUSAGE_SELF
    print(json.dumps({"rates": rates, "memory": resource.getrusage(kind).ru_maxrss / 1e6}))


def machine():
    """Processor, cores, versions, in one line."""
    import importlib.metadata

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    versions = [f"{p} {importlib.metadata.version(p)}" for p in ("jax", "jaxlib", "mujoco")]
    cores = f"{len(os.sched_getaffinity(0))} cores"
    python = f"Python {platform.python_version()}"
    return ", ".join([names[0] if names else platform.processor(), cores, python, *versions])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="part of the cases' names")
    parser.add_argument("--case", help="measure this one here (used for the subprocesses)")
    arguments = parser.parse_args()
    if arguments.case:
        measure(arguments.case)
        return
    git = ["git", "-C", ROOT, "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    table = ROOT / "results" / "speed.md"
    lines = table.read_text().splitlines() if table.exists() else []
    rows = {line.split(" | ")[0].strip("| "): line for line in lines if line.startswith("| ")}
    for case in [name for name in CASES if arguments.only in name]:
        done = subprocess.run([sys.executable, __file__, "--case", case], capture_output=True,
                              text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        middle, low, high = (f(found["rates"]) for f in (statistics.median, min, max))
        what, unit = CASES[case]
        rows[what] = (f"| {what} | {middle:.4g} | {low:.4g} to {high:.4g} | {unit} | "
                      f"{found['memory']:.2f} | {commit} |")
        print(rows[what], flush=True)
    how = (f"{machine()}; {time.strftime('%Y-%m-%d')}. `python results/speed.py`: a process per "
           f"row, {REPETITIONS} repetitions (3 of pa_rl.py at the published sizes).")
    columns = "| what | median | range | unit | peak memory, GB | commit |"
    head = ["# Speed", "", how, "", columns, "|---|---|---|---|---|---|"]
    rows = [rows[what] for what, _ in CASES.values() if what in rows]
    table.write_text("\n".join([*head, *rows, ""]))


if __name__ == "__main__":
    main()
