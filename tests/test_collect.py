"""collect.py refuses what spoils training, in one line with field, row and remedy, and what it
writes is what it says: converted files, mazes solved on shortest paths, a run's own actions."""

import contextlib
import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import gymnasium as gym
import h5py
import jax
import minari
import numpy as np
import pytest
from conftest import load_script, run_script
from minari.data_collector import EpisodeBuffer


@pytest.fixture(scope="session")
def collect():
    return load_script("baselines/collect.py")


@pytest.fixture
def local(tmp_path, monkeypatch):
    """An empty folder as Minari's local storage; the working folder is its parent."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "minari").mkdir()
    return tmp_path / "minari"


@pytest.fixture
def refused(collect, local, capsys):
    """Run main with arguments that it must refuse; the one line on stderr. Nothing is written."""

    def refuse(*arguments):
        capsys.readouterr()
        before = sorted(local.rglob("*"))
        with pytest.raises(SystemExit) as stop:
            collect.main(list(map(str, arguments)))
        out, error = capsys.readouterr()
        assert stop.value.code == 2 and out == ""
        assert len(error.splitlines()) == 1 and error.startswith("collect.py: error: "), error
        assert sorted(local.rglob("*")) == before
        return error

    return refuse


def assert_words(line, *words):
    for word in words:
        assert str(word) in line, f"{word!r} is not in: {line}"


RNG = np.random.default_rng(0)
ROWS = {  # D4RL's keys for an episode of 200 steps and one of 50, in Pendulum-v1's sizes
    "observations": RNG.normal(size=(250, 3)).astype(np.float32),
    "actions": RNG.uniform(-2, 2, (250, 1)).astype(np.float32), "rewards": RNG.normal(size=250),
    "terminals": np.zeros(250, bool), "timeouts": np.isin(np.arange(250), (199, 249)),
}  # fmt: skip
ROWS["next_observations"] = np.concatenate([ROWS["observations"][1:], np.float32([[1, 2, 3]])])


def save(path, **changes):
    """A flat file of Pendulum-v1 rows with some fields changed, or left out where None."""
    path = Path(path)
    fields = {name: rows for name, rows in (ROWS | changes).items() if rows is not None}
    if path.suffix == ".npz":
        np.savez(path, **fields)
    else:
        with h5py.File(path, "w") as file:
            for name, rows in fields.items():
                file.create_dataset(name, data=rows, compression="gzip", fletcher32=True)
            file["infos/qpos"] = np.zeros(3)  # as D4RL's own files have it
    return path


def converting(file, env_id="Pendulum-v1"):
    return "convert", str(file), "--env-id", env_id, "--id", "mine/new-v0"


@pytest.fixture
def convert(collect, local):
    return lambda *arguments: collect.main(list(converting(*arguments)))


# ------------------------------------------------------------------------ What convert refuses
@pytest.mark.parametrize("name, word", [
    ("no.npz", "no such file"), ("no.hdf5", "no such file"), ("folder.npz", "no such file"),
    ("e.csv", "neither .hdf5 nor .npz"), ("a.npz", "unreadable"), ("b.hdf5", "unreadable"),
    ("c.h5", "unreadable"), ("d.npz", "unreadable"),
])  # fmt: skip
def test_files_that_are_none(refused, name, word):
    Path("folder.npz").mkdir()
    for file, content in (("a.npz", b""), ("b.hdf5", b""), ("c.h5", b"hi"), ("e.csv", b"1,2")):
        Path(file).write_bytes(content)
    with open("d.npz", "wb") as file:
        np.save(file, ROWS["rewards"])
    assert_words(refused(*converting(name)), name, word)


@pytest.mark.parametrize("suffix", [".npz", ".hdf5"])
def test_truncated_file(refused, suffix):
    content = save(f"x{suffix}").read_bytes()
    for size in (int(len(content) * 0.01), len(content) // 2, len(content) - 1):
        Path(f"x{suffix}").write_bytes(content[:size])
        assert_words(refused(*converting(f"x{suffix}")), "unreadable", "Fetch it again")


def test_flipped_bits(collect, refused):
    """One bit of one reward: the value stays plausible, only the checksum tells. Anywhere: bytes
    such as dates do not matter, but it never ends in a trace."""
    content, path = save("x.npz").read_bytes(), Path("x.npz")

    def flip(at, bit):
        flipped = bytearray(content)
        flipped[at] ^= 1 << bit
        path.write_bytes(flipped)

    for offset in (0, 1000, ROWS["rewards"].nbytes - 1):
        flip(content.index(ROWS["rewards"].tobytes()) + offset, 0)
        assert_words(refused(*converting(path)), "x.npz", "unreadable")
    np.savez(path, **{name: rows[:3] for name, rows in ROWS.items()})
    content = path.read_bytes()
    for at in range(0, len(content), 3):
        flip(at, at % 8)
        with contextlib.suppress(SystemExit):
            collect.read_flat_file(path)


def changed(name, where, value):
    """{field: its rows, one of them changed}."""
    rows = ROWS[name].astype(np.float64)
    rows[where] = value
    return {name: rows}


END = {"next_observations": None, "seg_end_index": np.array([199])}
BAD_FIELDS = [
    *(({name: None}, f"no {name}; D4RL's keys are needed") for name in list(ROWS)[:4]),
    ({"timeouts": None, "next_observations": None}, "neither timeouts nor next_observations"),
    ({"actions": np.zeros((249, 1))}, "actions have shape (249, 1), but (250, 1) is needed"),
    ({"timeouts": np.zeros(251)}, "timeouts have shape (251,), but (250,)"),
    ({"next_observations": np.zeros((9, 3))}, "next_observations have shape (9, 3)"),
    ({"next_observations": np.zeros((250, 4))}, "next_observations have shape (250, 4)"),
    ({"rewards": np.zeros((250, 2))}, "beside 500 rewards"),
    ({"terminals": np.zeros((250, 2))}, "terminals have shape (250, 2)"),
    ({"actions": np.zeros((250, 2))}, "actions have shape (2,) per step, but Pendulum-v1 needs"),
    ({"actions": np.zeros(250)}, "actions have shape () per step, but Pendulum-v1 needs (1,)"),
    ({"observations": np.zeros((250, 4)), "next_observations": None}, "Pendulum-v1 needs (3,)"),
    ({"observations": np.zeros(250), "next_observations": None}, "Pendulum-v1 needs (3,)"),
    ({name: rows[:0] for name, rows in ROWS.items()}, "empty"),
    ({"actions": np.full((250, 1), "a")}, "actions are of type <U1, but numbers are needed"),
    ({"actions": np.full((250, 1), None)}, "Object arrays"),
    (END | {"seg_end_index": np.array([999]), "seg_end_next_observations": np.zeros((1, 3))},
     "seg_end_index has values that are no rows"),
    (END | {"seg_end_next_observations": np.zeros((2, 3))}, "have shape (2, 3), but (1, 3)"),
    ({name: rows[199:200] for name, rows in ROWS.items()} | {"next_observations": None},
     "no row's next observation is known"),
    (changed("terminals", 3, 2), "1 terminals neither 0 nor 1, first in row 3;"),
    (changed("terminals", 17, np.nan), "1 terminals neither 0 nor 1, first in row 17;"),
    (changed("timeouts", 17, np.nan), "1 timeouts neither 0 nor 1, first in row 17;"),
    (changed("rewards", 249, -np.inf), "rewards are not finite in 1 of 250 rows, first in row 249"),
    (changed("rewards", 3, 1e300), "rewards are not finite in 1 of 250 rows, first in row 3;"),
    (changed("observations", (3, 1), np.nan), "first in row 3; end an episode before it"),
    (changed("actions", 9, np.nan), "actions are not finite in 1 of 250 rows, first in row 9;"),
    (changed("next_observations", (0, 2), np.inf), "next_observations are not finite in 1 of 250"),
    (changed("actions", 11, 2.01), "1 actions outside Pendulum-v1's box, first in row 11; clip"),
    (changed("actions", 11, -3.0), "1 actions outside Pendulum-v1's box, first in row 11; clip"),
]  # fmt: skip


@pytest.mark.parametrize("changes, words", BAD_FIELDS)
def test_bad_fields(refused, changes, words):
    assert_words(refused(*converting(save("x.npz", **changes))), "x.npz: ", words)


def test_bad_fields_in_hdf5(refused):
    for changes, words in (BAD_FIELDS[0], BAD_FIELDS[5], BAD_FIELDS[-2]):
        assert_words(refused(*converting(save("x.hdf5", **changes))), "x.hdf5: ", words)


def test_unknown_environment(collect, refused, monkeypatch):
    line = refused(*converting(save("x.npz"), "Pendulm-v1"))
    assert_words(line, "no environment", "Pendulm", "Did you mean: `Pendulum`")
    line = refused(*converting("x.npz", "CartPole-v1"))
    assert_words(line, "CartPole-v1", "Discrete(2)", "only bounded vectors")

    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(collect.importlib, "import_module", missing)
    line = refused(*converting("x.npz", "Nowhere-v1"))
    assert_words(line, "pip install gymnasium-robotics==1.4.2")


Box, ONE = gym.spaces.Box, gym.spaces.Box(-1, 1, (1,))
PICTURE = Box(0, 255, (8, 8, 3), np.uint8)


@pytest.mark.parametrize("observations, actions, words", [
    (PICTURE, ONE, "only vectors are supported, no images"),
    (Box(0, 1, (8, 8, 3)), ONE, "only vectors are supported, no images"),
    (gym.spaces.Dict({"picture": PICTURE}), ONE, "only vectors are supported, no images"),
    (gym.spaces.Dict([("b", ONE), ("a", ONE)], sort_keys=False), ONE, "['b', 'a'] are not sorted"),
    (ONE, Box(-np.inf, np.inf, (1,)), "only bounded vectors are supported"),
    (ONE, gym.spaces.Discrete(2), "only bounded vectors are supported"),
])  # fmt: skip
def test_spaces_that_no_script_can_use(collect, capsys, observations, actions, words):
    with pytest.raises(SystemExit):
        collect.check_spaces(observations, actions, "Odd-v0")
    assert_words(capsys.readouterr().err, "Odd-v0: ", words)


# -------------------------------------------------------------------------- What check refuses
def make_minari(name, observation_space=None, action_space=None, env="Pendulum-v1", **fields):
    """A Minari dataset of two episodes of 20 steps; the second's `fields` changed. Its folder."""
    made = gym.make(env) if isinstance(env, str) else env
    observation_space = observation_space or made.observation_space
    action_space = action_space or made.action_space
    sample = {
        "observations": np.stack([observation_space.sample() for _ in range(21)]),
        "actions": np.stack([action_space.sample() for _ in range(20)]),
        "rewards": np.linspace(0, 1, 20), "terminations": [False] * 20,
        "truncations": [False] * 19 + [True],
    }  # fmt: skip
    dataset = minari.create_dataset_from_buffers(
        name, [EpisodeBuffer(**sample), EpisodeBuffer(**sample | fields)], env=env,
        observation_space=observation_space, action_space=action_space,
    )  # fmt: skip
    return dataset.storage.data_path


def test_the_good_dataset_is_summarized(collect, local, capsys):
    make_minari("test/good-v0", terminations=[False] * 19 + [True], rewards=np.ones(20))
    collect.main(["check", "test/good-v0"])
    out, error = capsys.readouterr()
    assert error == ""
    assert_words(out, "test/good-v0: Pendulum-v1, 2 episodes, 40 steps",
                 "mean 15.0, min 10.0, max 20.0; discounted by 0.99: mean 13.5",
                 "1 (50%) by termination, 1 (50%) by time limit, 0 (0%) by neither",
                 "divided by the box's bound", "reference   none")  # fmt: skip


def test_the_embedded_dataset_goes_first(collect, local, capsys):
    make_minari("hopper/sac-medium-replay-v0")
    collect.main(["check", "hopper/sac-medium-replay-v0"])
    assert_words(capsys.readouterr().out, "Hopper-v5, 882 episodes, 120,000 steps", "869 (99%)")


@pytest.mark.parametrize("name, word", [
    ("mujoco/hopper/medium-v0", "not on this machine; `minari download mujoco/hopper/medium-v0`"),
    ("x.npz", "collect.py convert"), ("no/version", "not a Minari id"), ("../up-v0", "not a"),
])  # fmt: skip
def test_unknown_dataset(refused, name, word):
    assert_words(refused("check", name), name, word)


def rewrite(name, change):
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def flip_a_bit(content):
    at = len(content) // 2  # in the middle are numbers
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def with_file(change):
    def damage(folder):
        with h5py.File(folder / "main_data.hdf5", "a") as file:
            change(file)

    return damage


AGAIN = "`minari download test/cut-v0 --force`, or minari.download_dataset(id, force_download=True)"
DAMAGE = {
    "cut 0.05": (rewrite("main_data.hdf5", lambda x: x[: len(x) // 20]), "unreadable"),
    "cut 0.5": (rewrite("main_data.hdf5", lambda x: x[: len(x) // 2]), "unreadable"),
    "cut 0.95": (rewrite("main_data.hdf5", lambda x: x[: -len(x) // 20]), "unreadable"),
    "flipped": (rewrite("main_data.hdf5", flip_a_bit), "unreadable"),
    "no hdf5": (lambda folder: (folder / "main_data.hdf5").unlink(), "interrupted download"),
    "no json": (lambda folder: (folder / "metadata.json").unlink(), "interrupted download"),
    "no data": (shutil.rmtree, "interrupted download"),
    "empty json": (rewrite("metadata.json", lambda x: b""), "unreadable"),
    "cut json": (rewrite("metadata.json", lambda x: x[:20]), "unreadable"),
    "other json": (rewrite("metadata.json", lambda x: b"{}"), "unreadable"),
    "lost": (with_file(lambda file: file.pop("episode_1")), "2 episodes in metadata.json, 1 in"),
    "found": (with_file(lambda file: file.copy("episode_0", "x")), "json, 3 in data"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_dataset(collect, refused, kind):
    folder, (damage, words) = make_minari("test/cut-v0"), DAMAGE[kind]
    collect.pack(folder / "main_data.hdf5")  # what Minari itself writes has no checksums
    damage(folder)
    assert_words(refused("check", "test/cut-v0"), "test/cut-v0: ", words, AGAIN)


STEPS = np.arange(20)


@pytest.mark.parametrize("fields, words", [
    ({"rewards": np.full(20, np.inf)}, "rewards are not finite in 20 of 20 rows, first in step 0;"),
    ({"rewards": np.where(STEPS == 7, np.nan, 0)}, "in 1 of 20 rows, first in step 7; end an"),
    ({"observations": np.where(np.arange(63) == 62, np.nan, 0).reshape(21, 3)},
     "observations are not finite in 1 of 21 rows, first in step 20;"),
    ({"actions": np.where(STEPS == 19, np.nan, 0)[:, None]}, "actions are not finite in 1 of 20"),
    ({"actions": np.where(STEPS == 4, 2.5, 0)[:, None]},
     "1 actions outside Pendulum-v1's box, first in step 4;"),
    ({"observations": np.zeros((20, 3))}, "20 observations beside 20 rewards, 21 are needed (Min"),
    ({"observations": np.zeros((22, 3))}, "22 observations beside 20 rewards, 21 are needed"),
    ({"actions": np.zeros((19, 1))}, "19 actions beside 20 rewards, 20 are needed"),
    ({"terminations": np.zeros(19)}, "19 terminations beside 20 rewards, 20 are needed"),
    ({"truncations": np.zeros(21)}, "21 truncations beside 20 rewards, 20 are needed"),
])  # fmt: skip
def test_bad_episodes(refused, fields, words):
    make_minari("test/bad-v0", **fields)
    assert_words(refused("check", "test/bad-v0"), "test/bad-v0: episode 1: ", words)


def test_nothing_in_it(collect, refused, capsys):
    minari.create_dataset_from_buffers("test/none-v0", [], env="Pendulum-v1")
    assert_words(refused("check", "test/none-v0"), "test/none-v0: no episodes")
    empty = EpisodeBuffer(observations=np.zeros((1, 3)), actions=np.zeros((0, 1)))
    with pytest.raises(SystemExit):
        collect.check_episodes([empty], gym.make("Pendulum-v1"), "source")
    assert_words(capsys.readouterr().err, "source: episode 0: no steps")


def test_minari_without_environment_or_with_odd_spaces(refused):
    make_minari("test/lone-v0", Box(-1, 1, (3,)), Box(-1, 1, (3,)), env=None)
    assert_words(refused("check", "test/lone-v0"), "no environment")
    line = refused("check", "test/lone-v0", "--env-id", "Pendulum-v1")
    assert_words(line, "actions have shape (3,) per step, but Pendulum-v1 needs (1,)")
    make_minari("test/cart-v0", env="CartPole-v1")
    assert_words(refused("check", "test/cart-v0"), "Discrete(2)", "only bounded")
    make_minari("test/image-v0", PICTURE)
    assert_words(refused("check", "test/image-v0"), "image-v0", "no images")


def test_a_box_that_is_not_symmetric(collect, refused):
    """In a Minari dataset refused, as the scripts do; convert puts RescaleAction around it."""
    env = gym.wrappers.RescaleAction(gym.make("Pendulum-v1"), -1.0, 2.0)
    make_minari("test/odd-v0", env=env)
    assert_words(refused("check", "test/odd-v0"), "not symmetric", "RescaleAction")
    inside, actions = collect.unit_actions(env, np.float32([[-1], [1], [0.5]]))
    assert inside.action_space == Box(-1, 1, (1,))
    np.testing.assert_allclose(actions, [[-1], [1 / 3], [0]], atol=1e-6)


def test_what_looks_wrong_is_doubted(collect, convert, capsys):
    """The commonest mistake: `done` of an old Gym environment, which is 1 at time limits, too."""
    convert(save("x.npz", terminals=ROWS["timeouts"], timeouts=np.zeros(250)))
    collect.main(["check", "mine/new-v0"])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[0] == lines[1]
    assert_words(lines[0], "warning: all 1 episodes of the time limit's 200 steps end by term")
    make_minari("test/early-v0", terminations=[True, True] + [False] * 18)
    collect.main(["check", "test/early-v0"])
    error = capsys.readouterr().err
    assert_words(error, "2 terminations stand before an episode's last step", "all returns are eq")


def test_write_reference(collect, refused, capsys):
    make_minari("test/none-v0")
    line = refused("check", "test/none-v0", "--write-reference")
    assert_words(line, "D4RL has no reference returns for Pendulum-v1")
    folder = make_minari("test/some-v0", env="Hopper-v4")
    for flags in (["--write-reference"], []):
        collect.main(["check", "test/some-v0", *flags])
        words = "-20.2723 random, 3234.3 expert: mean score 0.9"
        assert_words(capsys.readouterr().out, words)
    metadata = json.loads((folder / "metadata.json").read_text())
    assert (metadata["ref_min_score"], metadata["ref_max_score"]) == (-20.272305, 3234.3)


@pytest.mark.parametrize("name, kwargs, returns", [
    ("Walker2d-v2", {}, (1.629008, 4592.3)), ("Walker2d-v4", {}, (1.629008, 4592.3)),
    ("Walker2d-v5", {}, None), ("FrankaKitchen-v1", {}, (0.0, 4.0)),
    ("FrankaKitchen-v1", {"remove_task_when_completed": False}, None),
    ("AntMaze_UMaze-v5", {"continuing_task": False}, (0.0, 1.0)), ("AntMaze_UMaze-v5", {}, None),
    ("AntMaze_UMaze-v5", {"continuing_task": False, "reward_type": "dense"}, None),
])  # fmt: skip
def test_reference_returns(collect, name, kwargs, returns):
    assert collect.reference_returns(SimpleNamespace(id=name, kwargs=kwargs)) == returns


# -------------------------------------------------------------------------- What convert writes
def test_same_file_same_bytes_and_ids(collect, convert, refused, local):
    """An existing id is refused with the way out; the second time the same bytes are written."""
    flags = converting(save("x.npz"))
    collect.main(list(flags))
    files = [local / "mine/new-v0/data" / name for name in ("main_data.hdf5", "metadata.json")]
    first = [file.read_bytes() for file in files]
    line = refused(*flags)
    assert_words(line, "--id mine/new-v0: exists", "`minari delete mine/new-v0`", "--force")
    collect.main([*flags, "--force"])
    assert [file.read_bytes() for file in files] == first
    for name, word in (("mine/new", "not a Minari id"), ("../up-v0", "not a Minari id"),
                       ("hopper/sac-medium-replay-v0", "baselines/datasets")):  # fmt: skip
        assert_words(refused(*flags[:-1], name), f"--id {name}", word)
    assert_words(refused(*converting("no.npz"), "--force"), "no such file")  # nothing is deleted
    metadata = json.loads(first[1])
    assert metadata["dataset_size"] == round(len(first[0]) / 1e6, 1)
    assert "x.npz, sha256" in metadata["description"] and "ref_max_score" not in metadata


def test_disk_full_leaves_nothing(collect, refused, monkeypatch):
    make_minari("mine/other-v0")  # the namespace stays
    full = Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr(collect, "pack", full)
    line = refused(*converting(save("x.npz")))
    assert_words(line, "new-v0: cannot be written (No space left on device)")


def test_reference_returns_are_converted(convert, local, capsys):
    rows = {"observations": np.zeros((9, 11)), "actions": np.zeros((9, 3)), "rewards": np.arange(9)}
    np.savez("h.npz", **rows, terminals=np.zeros(9), timeouts=np.arange(9) % 4 == 3)
    convert("h.npz", "Hopper-v4")
    assert_words(capsys.readouterr().out, "-20.2723 random, 3234.3 expert", "2 episodes, 6 steps",
                 "dropped     3 rows whose next observation", "with them 1 episodes",
                 "0 (0%) by termination")  # fmt: skip
    metadata = minari.load_dataset("mine/new-v0").storage.metadata
    assert (metadata["ref_min_score"], metadata["ref_max_score"]) == (-20.272305, 3234.3)


def test_d4rl_antmaze(collect, convert, refused):
    """29 numbers, from D4RL's origin: the start. The environment begins there, and its state is
    the observation. In D4RL the umaze's goal is at (0, 8), beyond the corridor at x = 8."""
    rng = np.random.default_rng(0)
    rows = {"observations": rng.normal(0, 0.1, (5, 29)), "actions": rng.uniform(-1, 1, (5, 8)),
            "rewards": [0, 0, 0, 0, 1], "terminals": [0, 0, 0, 0, 1]}  # fmt: skip
    np.savez("a.npz", **rows, timeouts=np.zeros(5))
    assert_words(refused(*converting("a.npz", "AntMaze_UMaze-v4")), "AntMaze_UMaze-v5")
    convert("a.npz", "AntMaze_UMaze-v5")
    dataset, origin = minari.load_dataset("mine/new-v0"), np.float32([-4, -4])
    env, episode = dataset.recover_environment(eval_env=True), dataset[0]
    shifted = rows["observations"].astype(np.float32)
    shifted[:, :2] += origin
    np.testing.assert_array_equal(episode.observations[:-1], shifted)
    np.testing.assert_array_equal(episode.actions, np.float32(rows["actions"]))
    starts = np.array([env.reset(seed=seed)[0][:2] for seed in range(20)])
    np.testing.assert_allclose(starts, [origin] * 20, atol=1.5)
    maze = env.unwrapped.maze
    assert np.abs(env.unwrapped.goal - (origin + [0, 8])).max() <= 1.0
    for (x, y), wall in {(8, 4): False, (4, 4): True, (0, 4): True, (4, 8): False}.items():
        row, column = maze.cell_xy_to_rowcol(origin + [x, y])
        assert (maze.maze_map[row][column] == 1) == wall
    assert env.action_space == Box(-5, 5, (8,)) and env.unwrapped.ant_env.dt == 0.1
    assert (dataset.storage.metadata["ref_min_score"], env.spec.max_episode_steps) == (0.0, 700)
    rows["observations"][2:, 0] += 5  # another trajectory, which no timeout tells (D4RL's issue 77)
    np.savez("b.npz", **rows, timeouts=np.zeros(5))
    collect.main([*converting("b.npz", "AntMaze_UMaze-v5"), "--force"])
    assert [len(episode.rewards) for episode in minari.load_dataset("mine/new-v0")] == [1, 3]


# ------------------------------------------------------------------------------------------- Mazes
CELLS = {"umaze": ((1, 1), (3, 1)), "medium": ((1, 1), (6, 6)), "large": ((1, 1), (7, 9))}
HAND_MADE = [  # a loop about (2, 2), a dead end at (1, 5), and a cell that cannot be reached
    [1, 1, 1, 1, 1, 1, 1],
    [1, 0, 0, 0, 1, 0, 1],
    [1, 0, 1, 0, 0, 0, 1],
    [1, 0, 0, "g", 1, 1, 1],
    [1, "r", 1, 1, 1, 0, 1],
    [1, 1, 1, 1, 1, 1, 1],
]


def maze_episodes(collect, env, maze, **request):
    return list(collect.maze_episodes(env, CELLS[maze][1], collect.Pointmaze(maze, **request)))


@pytest.mark.parametrize("start, goal, length", [
    ((1, 1), (1, 1), 0), ((4, 1), (1, 5), 7), ((1, 5), (4, 1), 7), ((1, 1), (3, 3), 4),
    ((3, 2), (1, 2), 4), ((3, 2), (2, 3), 2), ((1, 3), (2, 5), 3), ((2, 1), (2, 3), 4),
])  # fmt: skip
def test_plan_is_shortest(collect, start, goal, length):
    path = collect.shortest_path(HAND_MADE, start, goal)
    assert path[0] == start and path[-1] == goal and len(path) == length + 1
    assert all(HAND_MADE[row][column] != 1 for row, column in path)
    assert (np.abs(np.diff(np.reshape(path, (-1, 2)), axis=0)).sum(axis=1) == 1).all()


@pytest.mark.parametrize("maze, num_steps", [("umaze", 900), ("medium", 1500), ("large", 2000)])
def test_controller_reaches_the_goal(collect, maze, num_steps):
    """From start cells all over the maze to goals all over it, with the default noise."""
    env, eval_env = collect.maze_environments(maze)
    episodes = maze_episodes(collect, env, maze, steps=num_steps)
    assert sum(len(e.rewards) for e in episodes[:-1]) < num_steps
    assert sum(len(e.rewards) for e in episodes) >= num_steps
    assert np.mean([e.terminations[-1] for e in episodes]) >= 0.8
    geometry = env.unwrapped.maze
    ends = [[tuple(map(int, geometry.cell_xy_to_rowcol(e.observations[key][0]))) for e in episodes]
            for key in ("achieved_goal", "desired_goal")]  # fmt: skip
    assert len(set(ends[0])) > 2 and len(set(ends[1])) > 2
    assert all(start != goal for start, goal in zip(*ends, strict=True))
    for seed in range(3):  # agents begin and end in one cell each, wherever the data's are
        observation, _ = eval_env.reset(seed=seed)
        cells = [tuple(geometry.cell_xy_to_rowcol(observation[key]))
                 for key in ("achieved_goal", "desired_goal")]  # fmt: skip
        assert tuple(cells) == CELLS[maze]


def test_goals_noise_and_seed(collect):
    """The share of the evaluation's goal, the size of the noise, and that seeds differ."""
    env, _ = collect.maze_environments("umaze")
    env = gym.make(env.spec, max_episode_steps=5)
    episodes = maze_episodes(collect, env, "umaze", steps=1500, seed=1)
    goals = np.array([e.observations["desired_goal"][0] for e in episodes])
    centre = env.unwrapped.maze.cell_rowcol_to_xy((3, 1))
    share = (np.abs(goals - centre).max(axis=1) <= 0.25).mean()
    assert abs(share - (0.3 + 0.7 / 7)) < 0.09  # 300 episodes; the 7 cells contain the goal's
    other = maze_episodes(collect, env, "umaze", steps=5, seed=2)[0]
    assert (other.observations["desired_goal"][0] != goals[0]).all()
    still = {"observation": np.array([1.0, 2.0, 0.3, -0.2])}  # the controller asks for (0.2, 0)
    rng, waypoint = np.random.default_rng(0), np.array([1.05, 1.98])
    draws = np.array([collect.waypoint_action(still, collect.deque([waypoint]), 0.1, rng)
                      for _ in range(2000)])  # fmt: skip
    np.testing.assert_allclose(draws.mean(axis=0), [0.2, 0.0], atol=0.01)
    np.testing.assert_allclose(draws.std(axis=0), 0.1, atol=0.01)
    for distance, left in ((0.09, 1), (0.11, 2)):  # when a waypoint counts as passed
        waypoints = collect.deque([np.array([1.0 + distance, 2.0]), np.array([5.0, 2.0])])
        collect.waypoint_action(still, waypoints, 0.1, rng)
        assert len(waypoints) == left


def test_maze_dataset_reads_back(collect, iql, local, capsys):
    """Both environments, their package and the references are named; the mask is 0 at the goal
    only, and there the reward is 1. The command again gives the same bytes."""
    flags = ["pointmaze", "umaze", "--steps", "300", "--seed", "3"]
    collect.main(flags)
    assert_words(capsys.readouterr().out, "pointmaze/umaze-v0", "mean score 100.0")
    folder = local / "pointmaze/umaze-v0/data"
    first = (folder / "main_data.hdf5").read_bytes()
    metadata = json.loads((folder / "metadata.json").read_text())
    maps = [json.loads(metadata[name])["kwargs"]["maze_map"] for name in
            ("env_spec", "eval_env_spec")]  # fmt: skip
    assert maps[0][1][1] == 0 and maps[1][1][1] == "r" and maps[1][3][1] == "g"
    assert "gymnasium-robotics==1.4.2" in metadata["requirements"]
    assert (metadata["ref_min_score"], metadata["ref_max_score"]) == (0.0, 1.0)
    config, data, env = iql.parse_config(["--dataset", "pointmaze/umaze-v0"])
    assert config.preset == "maze" and env.spec.kwargs["maze_map"] == maps[1]
    rows, source = iql.load_dataset(config, data, env)
    assert source["reference"] == [0.0, 1.0]
    goal, reached = rows.next_observations[:, 2:4], rows.next_observations[:, :2]
    near = np.linalg.norm(goal - reached, axis=1) <= 0.45
    assert near.any() and np.array_equal(rows.masks == 0, near)
    assert np.array_equal(rows.rewards == 0, near)  # scaled by the preset: -1, and 0 at the goal
    collect.main([*flags, "--force"])
    assert (folder / "main_data.hdf5").read_bytes() == first


def test_goals_end_episodes(collect, local, capsys):
    """A copy stops at the first reward above 0, a termination, and so does its environment; an
    episode without one stays whole, cut off."""
    env, rng = gym.make("PointMaze_UMaze-v3", continuing_task=True), np.random.default_rng(0)
    spaces = env.observation_space.spaces
    episodes = [
        collect.episode_buffer(
            {name: rng.normal(size=(6, *space.shape)) for name, space in spaces.items()},
            rng.uniform(-1, 1, (5, 2)), rewards, np.zeros(5),
        )
        for rewards in ([0, 0, 1, 1, 0], [0] * 5)
    ]  # fmt: skip
    minari.create_dataset_from_buffers("maze/on-v0", episodes, env=env, eval_env=env)
    collect.main(["goals", "maze/on-v0", "--id", "maze/ends-v0"])
    assert "1 (50%) by termination" in capsys.readouterr().out
    dataset = minari.load_dataset("maze/ends-v0")
    first, second = dataset.iterate_episodes()
    assert list(first.rewards) == [0, 0, 1] and list(first.terminations) == [False, False, True]
    assert first.observations["observation"].shape == (4, 4)
    assert len(second.rewards) == 5 and not second.terminations.any() and second.truncations[-1]
    assert dataset.recover_environment(eval_env=True).spec.kwargs["continuing_task"] is False


@pytest.mark.parametrize("flag", ["--noise -0.1", "--noise nan", "--steps 0", "--seed -1"])
def test_maze_refusals(refused, flag):
    assert_words(refused("pointmaze", "umaze", *flag.split()), f"{flag}: must be in [")


# -------------------------------------------------------------------------------------------- Runs
RUN = ["--num-seeds", "2", "--hidden-dims", "8", "8", "--batch-size", "8", "--eval-episodes", "1",
       "--normalize-observations", "--reward-scale", "0.1", "--reward-shift", "-1"]  # fmt: skip


@pytest.fixture(scope="module")
def runs(iql, sac, pendulum, tmp_path_factory):
    """Two runs of two seeds: iql.py in Pendulum-v1 (box [-2, 2]), 210 online steps in rounds of 205
    and 5, of which the ring keeps 150; sac.py in InvertedPendulum-v5 ([-3, 3]), 60 steps."""
    folder = tmp_path_factory.mktemp("runs")
    iql.main(
        [
            "--dataset",
            pendulum,
            *RUN,
            "--offline-steps",
            "4",
            "--online-steps",
            "210",
            "--interval",
            "205",
            "--buffer-size",
            "150",
            "--run-dir",
            str(folder / "iql"),
        ]
    )
    sac.main(["--env-id", "InvertedPendulum-v5", *RUN, "--online-steps", "60", "--interval", "60",
              "--warmup-steps", "50", "--run-dir", str(folder / "sac"),
              "--no-normalize-observations"])  # fmt: skip
    return folder


def first_agent(script, folder, sizes):
    """The first seed's agent in a run's checkpoint, its Config and its units."""
    arrays, meta = script.load(folder)
    said = meta["config"]
    values = {f.name: said[f.name] for f in script.dataclasses.fields(script.Config)}
    config = script.Config(**values | {"hidden_dims": tuple(said["hidden_dims"])})
    keys = jax.random.split(jax.random.PRNGKey(9), 2)
    observation, action = (np.zeros((1, size), np.float32) for size in sizes)
    agents = jax.vmap(lambda key: script.create_agent(key, observation, action, config))(keys)
    agents = script.restore({"agents": agents}, arrays, folder)["agents"]
    return jax.tree.map(lambda x: x[0], agents), config, said["units"]


def assert_played(env, episode, start, steps=200, bound=1e-5):
    """An episode's observations, rewards and termination are those of `env` with its actions."""
    np.testing.assert_allclose(episode.observations[0], start, atol=bound)
    for t, action in enumerate(episode.actions[:steps]):
        observation, reward, terminated, _, _ = env.step(action)
        np.testing.assert_allclose(episode.observations[t + 1], observation, atol=bound)
        np.testing.assert_allclose(episode.rewards[t], reward, rtol=1e-4, atol=bound)
        assert episode.terminations[t] == terminated
    last = np.arange(len(episode.rewards)) == len(episode.rewards) - 1
    np.testing.assert_array_equal(episode.truncations, last & ~episode.terminations)


@pytest.mark.parametrize("name, env_id, high, sizes", [
    ("iql", "Pendulum-v1", 2.0, (3, 1)), ("sac", "InvertedPendulum-v5", 3.0, (4, 1))
])  # fmt: skip
def test_rollouts_act_as_the_script(request, collect, runs, local, name, env_id, high, sizes):
    """The recorded actions are the script's own, of the first seed, in the environment's units,
    and so are rewards and observations."""
    script, env = request.getfixturevalue(name), gym.make(env_id)
    agent, config, units = first_agent(script, runs / name, sizes)
    assert units["actions"] == [high]
    for kind, flags in (("mode", []), ("sampled", ["--sampled"])):
        flags = [*flags, "--steps", "201", "--seed", "7", "--id", f"my/{kind}-v0"]
        collect.main(["rollout", str(runs / name), *flags])
        dataset = minari.load_dataset(f"my/{kind}-v0")
        episodes = list(dataset)
        assert 201 <= dataset.total_steps < 201 + len(episodes[-1].rewards)
        for number, episode in enumerate(episodes):
            start, _ = env.reset(seed=collect.episode_seed(7, number))
            assert_played(env, episode, start)
        observations = np.concatenate([e.observations[:-1] for e in episodes])
        actions = np.concatenate([e.actions for e in episodes])
        scaled = script.rescale(observations, *map(np.array, units["observations"]))
        mode = high * np.asarray(script.act(agent, scaled, config))  # (T, 1)
        if kind == "mode":
            np.testing.assert_allclose(actions, mode, atol=2e-5)
            continue
        keys = jax.random.split(jax.random.PRNGKey(0), len(scaled))
        draw = jax.vmap(lambda o, k: script.explore(agent, o, k, config))
        others = high * np.asarray(draw(scaled, keys))  # the script's own draws in these states
        np.testing.assert_allclose((actions - mode).mean(), (others - mode).mean(), atol=0.3)
        np.testing.assert_allclose((actions - mode).std(), (others - mode).std(), rtol=0.15)


def test_replay_is_what_the_environment_gave(collect, runs, local, capsys):
    """The ring's 150 rows are steps 60 to 209: to the time limit at 200, to the round's end at 205,
    and the last round, each as Pendulum-v1 itself plays it."""
    collect.main(["replay", str(runs / "iql"), "--id", "my/replay-v0"])
    assert_words(capsys.readouterr().out, "3 episodes, 150 steps", "3 (100%) by time limit")
    episodes, env = list(minari.load_dataset("my/replay-v0")), gym.make("Pendulum-v1")
    assert [len(e.rewards) for e in episodes] == [140, 5, 5]
    start, _ = env.reset(seed=10**9 + 205)
    assert_played(env, episodes[2], start, bound=1e-4)
    cosine, sine, velocity = episodes[0].observations[0].astype(np.float64)  # in the middle
    env.unwrapped.state = np.array([np.arctan2(sine, cosine), velocity])
    assert_played(env, episodes[0], episodes[0].observations[0], steps=20, bound=0.02)
    collect.main(["replay", str(runs / "iql"), "--id", "my/replay-v0", "--steps", "142", "--force"])
    shorter = list(minari.load_dataset("my/replay-v0"))
    assert [len(e.rewards) for e in shorter] == [140, 2] and shorter[1].truncations[-1]
    np.testing.assert_array_equal(shorter[1].observations, episodes[1].observations[:3])


def test_replay_with_terminations(collect, runs, local):
    """60 steps of InvertedPendulum-v5, which ends when its pole leans by 0.2."""
    collect.main(["replay", str(runs / "sac"), "--id", "my/replay-v0"])
    env = gym.make("InvertedPendulum-v5")
    start, _ = env.reset(seed=10**9)
    episodes = list(minari.load_dataset("my/replay-v0"))
    for episode in episodes:
        assert_played(env, episode, start)
        start, _ = env.reset()
    assert sum(len(e.rewards) for e in episodes) == 60 and len(episodes) > 2
    log = collect.load_run(runs / "sac")[3]
    returns = [float(row["return"]) for row in log]
    step = next(r["step"] for r, x in zip(log, returns, strict=True) if x >= 0.9 * returns[-1])
    collect.main(["replay", str(runs / "sac"), "--id", "my/part-v0", "--share", "0.9"])
    assert minari.load_dataset("my/part-v0").total_steps == step
    assert all(e.terminations[-1] for e in episodes[:-1])


def test_run_refusals(runs, refused, tmp_path):
    new = ("--id", "mine/x-v0")
    for command in ("rollout", "replay"):
        assert_words(refused(command, "none", *new), "none: no config.json of a run of one")
    for script in ("../../evil", "nothing", None):
        Path("config.json").write_text(json.dumps({"script": script, "units": {}}))
        assert_words(refused("rollout", ".", *new), "no config.json of a run of one of these")
    folder = shutil.copytree(runs / "iql", tmp_path / "run")
    assert_words(refused("replay", folder, *new, "--steps", 151), "--steps 151: the buffer has 150")
    assert_words(refused("replay", folder, *new, "--share", 0.5), "--share 0.5: a return of")
    assert_words(refused("replay", folder, *new, "--share", 2), "--share 2.0: must be in")
    assert_words(refused("rollout", folder, *new, "--steps", 0), "--steps 0: must be in")
    content = (folder / "checkpoint.npz").read_bytes()
    (folder / "checkpoint.npz").write_bytes(content[: len(content) // 2])
    assert_words(refused("rollout", folder, *new), "checkpoint.npz: unreadable")
    arrays = dict(np.load(io.BytesIO(content)))
    meta = json.loads(arrays.pop("meta").tobytes())
    offline = json.dumps(meta | {"rows": meta["rows"][:2]}).encode()
    np.savez(folder / "checkpoint.npz", meta=np.frombuffer(offline, np.uint8), **arrays)
    assert_words(refused("replay", folder, *new), "no online transitions in its checkpoint")
    (folder / "config.json").write_text(json.dumps(meta["config"] | {"seed": 5}))
    assert_words(refused("replay", folder, *new), "of different runs")


# -------------------------------------------------------------------------------- As a user sees it
def test_process():
    """In a process of its own: one line, exit code 2, no trace."""
    code, out, error = run_script("baselines/collect.py", "check", "none/none-v0")
    assert code == 2 and out == "" and len(error.splitlines()) == 1
    assert_words(error, "collect.py: error: none/none-v0: not on this machine")


def test_help(collect, capsys):
    with pytest.raises(SystemExit):
        collect.main(["--help"])
    out = capsys.readouterr().out
    names = "convert", "check", "goals", "pointmaze", "rollout", "replay"
    assert_words(out, *(f"• {name} " for name in names))
