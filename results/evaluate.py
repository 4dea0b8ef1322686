"""Evaluate the agents of a run again: every seed's episodes, and on demand a film.

    python results/evaluate.py runs/iql/hopper/sac-medium-replay-v0/seed0
    python results/evaluate.py RUN --episodes 100 --video   # and RUN/video.mp4, an episode per seed

The run's checkpoint holds the agents, its config.json the rest: script, settings, environment and
units. The first episodes start as those of training's evaluations do, so that with as many of them
the last row of metrics.csv comes out again.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import sys
import warnings
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RENDERER = "apt-get install libegl1, or libosmesa6 and MUJOCO_GL=osmesa, or use a display"


def load_run(folder):
    """A run's script as a module, and its config.json."""
    try:
        said = json.loads((folder / "config.json").read_text())
        name = said["script"]
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(f"{folder}: no run, for config.json is unreadable ({error})") from None
    paths = [ROOT / place / f"{name}.py" for place in ("algorithms", "baselines")]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        raise SystemExit(f"{folder}: made by {name}.py, which is not here")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise SystemExit(f"{name}.py: {error}: pip install -r requirements.txt") from None
    return module, said


def config_of(module, said, folder, episodes):
    """The run's Config; JSON's lists become tuples again."""
    names = {field.name for field in dataclasses.fields(module.Config)}
    if missing := names - set(said):
        raise SystemExit(f"{folder}: of another {said['script']}.py (no {', '.join(missing)})")
    values = {x: tuple(said[x]) if isinstance(said[x], list) else said[x] for x in names}
    return module.Config(**values | {"eval_episodes": episodes or said["eval_episodes"]})


def restore_agents(module, config, source, folder):
    """The agents of the checkpoint, with a leading axis of seeds (S, ...)."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    env = make_env(module, source, folder)
    inputs = {
        "observation": np.zeros((1, *env.observation_space.shape), np.float32),
        "action": np.zeros((1, *env.action_space.shape), np.float32),
    }
    env.close()
    keys = jnp.stack([jax.random.PRNGKey(config.seed + i) for i in range(config.num_seeds)])
    create = partial(module.create_agent, config=config, **inputs)
    template = {"agents": jax.jit(partial(module.for_each_seed, create))(keys)}
    arrays, _ = module.load(folder)
    return module.restore(template, arrays, folder)["agents"]


def make_env(module, source, folder):
    try:
        return module.make_env(source)
    except Exception as error:  # not registered, not installed, MUJOCO_GL's library not there
        line = [*str(error).strip().splitlines(), type(error).__name__][0]
        gl = os.environ.get("MUJOCO_GL")
        hint = f" (MUJOCO_GL={gl} may be the reason: {RENDERER})" if gl else ""
        raise SystemExit(f"{folder}: cannot make its environment: {line}{hint}") from None


def evaluate(module, agents, source, config):
    """Returns and successes (S, E) of the episodes of training's own evaluation, ten at a time."""
    import gymnasium as gym
    import numpy as np

    shape, found = (config.num_seeds, min(10, config.eval_episodes)), []
    mode, make = gym.vector.AutoresetMode.SAME_STEP, [partial(module.make_env, source)]
    envs = gym.vector.SyncVectorEnv(make * shape[0] * shape[1], autoreset_mode=mode)
    if hasattr(module, "SkillEnvs"):
        envs = module.SkillEnvs(envs, {"agents": agents}, config)
    for first in range(0, config.eval_episodes, shape[1]):
        seeds = [10_000 * (config.seed + i) + first + j for i, j in np.ndindex(*shape)]
        np.random.seed([x % 2**32 for x in seeds])  # OGBench's mazes draw their starts from it
        observations = envs.reset(seed=seeds)[0]
        returns, reached = np.full((2, len(seeds)), np.inf)
        while np.isinf(returns).any():
            actions = np.asarray(module.act_all(agents, observations.reshape(*shape, -1), config))
            observations, _, terminated, truncated, info = envs.step(np.concatenate(actions))
            for i in np.flatnonzero((terminated | truncated) & np.isinf(returns)):
                returns[i] = info["final_info"]["episode"]["r"][i]
                reached[i] = terminated[i] or returns[i] > 0
        found.append(np.reshape([returns, reached], (2, *shape)))
    return np.concatenate(found, axis=2)[..., : config.eval_episodes]  # (2, S, E)


def film(module, agents, source, config, path):
    """The first evaluation episode of every seed, one after the other, as an .mp4."""
    import imageio.v2
    import numpy as np

    spec = json.loads(source["environment"])
    spec["kwargs"]["render_mode"] = "rgb_array"
    env = module.make_env(source | {"environment": json.dumps(spec)})
    writer = imageio.v2.get_writer(path, fps=env.metadata.get("render_fps", 30))
    frames, length = 0, getattr(config, "skill_length", 1)  # OPAL's actions are of many steps
    for i in range(config.num_seeds):
        observation, _ = env.reset(seed=10_000 * (config.seed + i))
        ended, steps = False, 0
        while not ended:
            writer.append_data(render(env))
            everyone = np.broadcast_to(observation, (config.num_seeds, 1, len(observation)))
            if steps % length == 0:
                actions = chosen = module.act_all(agents, everyone, config)
            if length > 1:
                actions = module.play(agents, everyone, chosen)
            observation, _, terminated, truncated, _ = env.step(np.asarray(actions[i, 0]))
            ended, steps, frames = terminated or truncated, steps + 1, frames + 1
    writer.close()
    env.close()
    return frames


def render(env):
    try:
        frame = env.render()
    except Exception as error:  # one of many, by the missing library
        line = [*str(error).strip().splitlines(), type(error).__name__][0]
        raise SystemExit(f"--video: rendering failed ({line}): {RENDERER}") from None
    if frame is None or frame.ndim != 3:
        raise SystemExit("--video: the environment has no pictures (render_mode rgb_array)")
    return frame


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("--episodes", type=int, help="per seed; default: as in training")
    parser.add_argument("--video", action="store_true", help="write RUN/video.mp4")
    arguments = parser.parse_args()
    if arguments.episodes is not None and arguments.episodes < 1:
        parser.error("--episodes must be at least 1")
    if arguments.video and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")  # before mujoco is imported
    warnings.simplefilter("ignore")  # other packages' advice
    module, said = load_run(arguments.run)
    module.gym.logger.min_level = module.gym.logger.ERROR
    config = config_of(module, said, arguments.run, arguments.episodes)
    agents = restore_agents(module, config, said, arguments.run)
    low, high = said["reference"]
    found = zip(*evaluate(module, agents, said, config), strict=True)
    for i, (returns, reached) in enumerate(found):
        measure = reached if (low, high) == (0, 1) else returns  # as in the scripts: of success
        score = "" if high is None else f"  score {100 * (measure.mean() - low) / (high - low):.1f}"
        each = " ".join(f"{value:.1f}" for value in returns)
        print(f"seed {config.seed + i}: return {returns.mean():.6g}{score}  ({each})", flush=True)
    if arguments.video:
        path = arguments.run / "video.mp4"
        frames = film(module, agents, said, config, path)
        print(f"{path}: {frames} frames")


if __name__ == "__main__":
    main()
