"""OOO: a corridor whose end only the bonus finds and only the fresh agent keeps to; what is retrained
on, by which bounds, of which agents."""

import gymnasium as gym
import jax
import jax.numpy as jnp
import minari
import numpy as np
import pytest
from conftest import read_arrays, read_metrics
from minari.data_collector import EpisodeBuffer

STEPS = ["--offline-steps=500", "--online-steps=2000", "--retrain-steps=2000", "--interval=500"]


class Corridor(gym.Env):
    """From x = 0 an action is a step to the left or to the right; at 9 is a reward and the end."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,))
    action_space = gym.spaces.Box(-1.0, 1.0, (1,))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.x = 0.0
        return self.observation(), {}

    def observation(self):
        return np.float32([self.x / 3 - 1])

    def step(self, action):
        self.x = max(0.0, self.x + float(action[0]))
        return self.observation(), float(self.x >= 9), self.x >= 9, False, {}


gym.register("Corridor-v0", f"{__name__}:Corridor", max_episode_steps=20)


@pytest.fixture(scope="module")
def corridor(minari_folder):
    """Thirty episodes that tremble near the start."""
    env, rng, episodes = gym.make("Corridor-v0"), np.random.default_rng(0), []
    for _ in range(30):
        buffer = EpisodeBuffer(observations=env.reset()[0])
        for _ in range(20):
            action = np.float32(np.clip(rng.normal(-0.2, 0.5, 1), -1, 1))
            names = ("observation", "reward", "terminated", "truncated", "info")
            step = dict(zip(names, env.step(action), strict=True))
            buffer = buffer.add_step_data(step | {"action": action})
        episodes.append(buffer)
    with pytest.warns():  # Minari asks for authors
        minari.create_dataset_from_buffers("corridor-v0", env=env, buffer=episodes)
    sizes = ["--hidden-dims", "32", "32", "--rnd-dims", "32", "32", "--learning-rate=1e-3"]
    return ["--dataset=corridor-v0", "--env-id=Corridor-v0", "--no-normalize-returns", *sizes,
            "--batch-size=64", "--discount=0.95", "--tau=0.02", "--eval-episodes=1"]  # fmt: skip
