"""Speed and memory of the scripts, beside a bare scan of the same arithmetic: writes speed.md.

    python results/speed.py             # every case, medians over 5 repetitions
    python results/speed.py --only iql  # one script's cases, printed only

A benchmark, not a test: run it on an idle machine. Every measurement is a process of its own: a run
of the script on the repository's dataset, whose rounds, but the first, which compiles, give updates
per second; memory is the process's largest. The bare scan is a jitted scan of the script's own
`update` over drawn rows, without keys, metrics, environment, evaluation or checkpoints. Both take
turns, so that a slow minute of the machine meets both.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WIDE = "--hidden-dims 512 512 512 512"
ROWS = "ogbench/cube-single-play-task2-v0"  # made by collect.py ogbench cube-single
BALANCED = "--offline-steps 10 --first-updates 1 --warmup-steps 10"
BALANCED_ROWS = f"{BALANCED} --preset sac-medium-replay --dataset {ROWS}"
ROUNDS = 6  # of a run; the first one is not counted
CASES = {  # name: (script, phase, steps of a round, flags)
    "iql offline": ("algorithms/iql.py", "offline", 500, "--online-steps 0"),
    "iql online": ("algorithms/iql.py", "online", 500, "--offline-steps 10"),
    "sac online": ("baselines/sac.py", "online", 500, "--warmup-steps 100"),
    "cql offline": ("algorithms/cql.py", "offline", 100, "--online-steps 0"),
    "td3_bc offline": ("baselines/td3_bc.py", "offline", 500, "--online-steps 0"),
    "iql 4x512 offline": ("algorithms/iql.py", "offline", 50, f"--online-steps 0 {WIDE}"),
    "fql offline": ("baselines/fql.py", "offline", 200, "--online-steps 0 --hidden-dims 256 256"),
    "adaptive_bc offline": ("algorithms/adaptive_bc.py", "offline", 100, "--online-steps 0"),
    "boorl offline": ("algorithms/boorl.py", "offline", 100, "--online-steps 0"),
    "off2on online": ("algorithms/off2on.py", "online", 100, BALANCED),
    "off2on 1M rows online": ("algorithms/off2on.py", "online", 100, BALANCED_ROWS),
    "iql start": ("algorithms/iql.py", "start", 1, "--online-steps 0"),
    "iql 1M rows start": ("algorithms/iql.py", "start", 1, f"--online-steps 0 --dataset {ROWS}"),
}


def run(case, steps, flags):
    """One run of a case's script: rates of its rounds, or for "start" the seconds of a run with one
    update; and the peak memory in GB."""
    script, phase, _, own = CASES[case]
    budget = steps if phase == "start" else ROUNDS * steps
    name = "offline" if phase == "start" else phase
    words = f"{own} --interval {steps} --{name}-steps {budget} --eval-episodes 1 {flags}"
    env = {name: text for name, text in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    with tempfile.TemporaryDirectory() as runs, tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, script, *shlex.split(words), "--run-dir", f"{runs}/run"]
        begin = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begin
        memory = usage.ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            sys.exit(f"{shlex.join(command)}: {log.read().strip().splitlines()[-1]}")
        if phase == "start":
            return [seconds], memory
        lines = (Path(runs) / "run" / "metrics.csv").read_text().splitlines()
    header = lines[0].split(",")
    rows = [dict(zip(header, line.split(","), strict=True)) for line in lines[1:]]
    counted = [row for row in rows if row["phase"] == phase][1:]
    return [float(row["updates_per_second"]) for row in counted], memory


def bare(case, steps, flags):
    """Rates of a bare scan of the case's `update`, in this process, printed as JSON."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    script, phase, _, own = CASES[case]
    spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    config, data, env = module.parse_config(shlex.split(f"{own} {flags}"))
    dataset, _ = module.load_dataset(config, data, env)
    rng = np.random.default_rng(0)
    if len(dataset.rewards) == 1:  # an online script's
        draw = lambda x: rng.uniform(-1, 1, (10_000, *x.shape[1:])).astype(np.float32)  # noqa: E731
        dataset = jax.tree.map(draw, dataset)
    inputs = {"observation": dataset.observations[:1], "action": dataset.actions[:1]}
    if hasattr(module, "bootstrap_round"):  # BOORL's members have rows of their own
        dataset = jax.tree.map(lambda x: np.stack([x] * config.num_members, axis=1), dataset)
    if hasattr(module, "monte_carlo_returns"):  # Cal-QL's bound; its values cost nothing
        dataset = dataset.replace(mc_returns=0 * dataset.rewards)
    agent = module.create_agent(jax.random.PRNGKey(0), **inputs, config=config)
    indices = rng.integers(len(dataset.rewards), size=(steps, config.batch_size))

    def body(carry, rows):
        (agent, dataset), update = carry, module.update
        batch = jax.tree.map(lambda x: x[rows], dataset)
        if case.startswith("off2on"):  # its online losses take three minibatches, and their rows
            update = module.online_update
            batch = jax.tree.map(lambda x: jnp.stack([x] * 3), batch), 0
        agent, _ = update(agent, batch, config)
        return (agent, dataset), None

    @jax.jit
    def scan(agent, dataset, indices):
        return jax.lax.scan(body, (agent, dataset), indices)[0][0]

    arguments = jax.device_put(dataset), jnp.asarray(indices)
    rates = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        agent = jax.block_until_ready(scan(agent, *arguments))
        rates.append(steps / (time.perf_counter() - begin))
    print(json.dumps(rates[1:]))


def bare_process(case, steps, flags):
    command = [sys.executable, __file__, "--bare", case, "--steps", str(steps), f"--flags={flags}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"bare scan, {case}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(case, arguments):
    """{"now", "bare": medians of the repetitions, in turns; "memory"}."""
    steps = arguments.steps or CASES[case][2]
    found = {"now": [], "bare": [], "memory": []}
    for _ in range(arguments.repetitions):
        values, memory = run(case, 1 if case.endswith("start") else steps, arguments.flags)
        found["now"].append(statistics.median(values))
        found["memory"].append(memory)
        if not case.endswith("start"):
            found["bare"].append(statistics.median(bare_process(case, steps, arguments.flags)))
    return found


def spread(values, digits=4):
    """ "median (smallest to largest)"."""
    if not values:
        return "-"
    middle, low, high = (f(values) for f in (statistics.median, min, max))
    return f"{middle:.{digits}g} ({low:.{digits}g} to {high:.{digits}g})"


def row(case, found):
    """A case's row of the table, in Markdown."""
    shares = [now / bare for now, bare in zip(found["now"], found["bare"], strict=False)]
    unit = "seconds to the end of a run with one update" if case.endswith("start") else "updates/s"
    cells = [f"`{case}`, {unit}", spread(found["now"]), spread(found["bare"]), spread(shares, 3)]
    cells.append(f"{max(found['memory']):.2f}")
    return f"| {' | '.join(cells)} |"


def machine():
    """Processor, cores, versions, in one line."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    versions = [f"{p} {importlib.metadata.version(p)}" for p in ("jax", "jaxlib", "mujoco")]
    own = [f"{os.cpu_count()} cores", f"Python {platform.python_version()}"]
    return ", ".join([names[0] if names else platform.processor(), *own, *versions])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="part of the cases' names; the table is printed only")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--steps", type=int, help="of a round; default: by case")
    parser.add_argument("--flags", default="", help="more flags for every script")
    parser.add_argument("--bare", choices=CASES, help="measure this bare scan here (internal)")
    arguments = parser.parse_args()
    if arguments.bare:
        bare(arguments.bare, arguments.steps, arguments.flags)
        return
    lines = ["| what | now | bare scan | now / bare | memory, GB |", "|---|---|---|---|---|"]
    print("\n".join(lines), flush=True)
    for case in [case for case in CASES if (arguments.only or "") in case]:
        lines.append(row(case, measure(case, arguments)))
        print(lines[-1], flush=True)
    git = ["git", "-C", ROOT, "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    how = (
        f"{machine()}; {time.strftime('%Y-%m-%d')}; commit {commit}. Made by "
        f"`python results/speed.py`: medians of {arguments.repetitions} repetitions, each the "
        f"median of {ROUNDS - 1} rounds of one process, the smallest and the largest in brackets."
    )
    if arguments.only is None:
        (ROOT / "results" / "speed.md").write_text("\n".join(["# Speed", "", how, "", *lines, ""]))
    else:
        print(f"\n{how}")


if __name__ == "__main__":
    main()
