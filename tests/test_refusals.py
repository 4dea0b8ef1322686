"""What cannot work is refused: one line that says why, exit code 2, before anything compiles.

Most of it in this process, where a refusal takes milliseconds; a few in one of their own, as a
user sees them.
"""

import time

import gymnasium as gym
import minari
import numpy as np
import pytest
from conftest import pendulum_rows, run_script
from minari.data_collector import EpisodeBuffer

ROWS = pendulum_rows(250)
SMOKE = ("--preset", "smoke")
PENDULUM = ("--env-id", "Pendulum-v1", *SMOKE)


@pytest.fixture
def refused(iql, capsys, monkeypatch, tmp_path):
    """Run main with arguments that it must refuse; returns the one line on stderr."""

    def compiles(*_):
        raise AssertionError("not refused before agents are made")

    monkeypatch.setattr(iql, "create_shards", compiles)
    monkeypatch.setattr(iql, "use_all_cores", lambda _: None)  # only before jax has started
    monkeypatch.setattr(iql, "catch_signals", list)  # pytest keeps its Ctrl-C
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    (tmp_path / "datasets").mkdir()
    monkeypatch.chdir(tmp_path)

    def refuse(*arguments):
        capsys.readouterr()
        begin = time.monotonic()
        with pytest.raises(SystemExit) as stop:
            iql.main([str(argument) for argument in arguments])
        error = capsys.readouterr().err
        assert stop.value.code == 2
        assert len(error.splitlines()) == 1 and error.endswith("\n"), error
        assert ": error: " in error and "Traceback" not in error
        assert time.monotonic() - begin < 10  # 0.05 s on an idle core
        assert not (tmp_path / "runs").exists()  # a refused run leaves nothing
        return error

    return refuse


def assert_words(line, *words):
    for word in words:
        assert str(word) in line, f"{word!r} is not in: {line}"


def save(path, **changes):
    """A flat .npz of Pendulum-v1 rows with some fields changed, or left out where None."""
    fields = {name: rows for name, rows in (ROWS | changes).items() if rows is not None}
    np.savez(path, **fields)
    return path


def changed(name, where, value):
    """{field: its rows, one of them changed}."""
    rows = ROWS[name].copy()
    rows[where] = value
    return {name: rows}


@pytest.fixture
def good(tmp_path):
    """Arguments that are all right."""
    return ("--dataset", save(tmp_path / "good.npz"), *PENDULUM)


def test_the_good_arguments_get_as_far_as_making_agents(iql, refused, good):
    """Otherwise the refusals below would mean little."""
    with pytest.raises(AssertionError, match="before agents are made"):
        iql.main([str(argument) for argument in good])


# ---------------------------------------------------------------------------------- Which dataset


def test_unknown_dataset_lists_near_ids(refused):
    line = refused("--dataset", "mujoco/hoper/medium-v0")
    assert_words(line, "mujoco/hoper/medium-v0", "nearest: mujoco/hopper/medium-v0", "minari")


def test_local_datasets_are_among_the_near_ids(refused):
    make_minari("test/wobble-v0")
    assert_words(refused("--dataset", "test/wobbel-v0"), "test/wobble-v0")


def test_known_dataset_without_a_network(refused, monkeypatch, tmp_path):
    def unreachable(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(minari, "download_dataset", unreachable)
    line = refused("--dataset", "mujoco/hopper/medium-v0")
    assert_words(
        line,
        "cannot be fetched",
        "minari download mujoco/hopper/medium-v0",
        tmp_path / "datasets",
        "--dataset FILE --env-id ID",
    )


def test_flat_file_without_environment(refused, good):
    assert_words(refused(*good[:2]), "good.npz", "add --env-id")


@pytest.mark.parametrize("name", ["no.npz", "no.hdf5", "folder.npz"])
def test_missing_file(refused, tmp_path, name):
    (tmp_path / "folder.npz").mkdir()
    assert_words(refused("--dataset", name, *PENDULUM), name, "no such file")


# --------------------------------------------------------------------------------- What is in it


@pytest.mark.parametrize("name", ["observations", "actions", "rewards", "terminals"])
def test_missing_field(refused, tmp_path, name):
    path = save(tmp_path / "x.npz", **{name: None})
    assert_words(refused("--dataset", path, *PENDULUM), "x.npz", f"no {name}")


def test_without_timeouts_the_ends_must_be_seen_otherwise(refused, tmp_path):
    path = save(tmp_path / "x.npz", timeouts=None, next_observations=None)
    assert_words(refused("--dataset", path, *PENDULUM), "x.npz", "timeouts")


@pytest.mark.parametrize("changes, words", [
    ({"actions": np.zeros((249, 1))}, ["actions have shape (249, 1)"]),
    ({"timeouts": np.zeros(251)}, ["timeouts have shape (251,)"]),
    ({"next_observations": np.zeros((9, 3))}, ["next_observations have shape (9, 3)"]),
    ({"actions": np.zeros((250, 2))}, ["actions", "(2,)", "Pendulum-v1", "(1,)"]),
    ({"actions": np.zeros(250)}, ["actions", "()", "Pendulum-v1", "(1,)"]),
    ({"observations": np.zeros((250, 4)), "next_observations": None},
     ["observations", "(4,)", "Pendulum-v1", "(3,)"]),
    ({"observations": np.zeros(250), "next_observations": None}, ["observations", "(3,)"]),
    ({name: rows[:0] for name, rows in ROWS.items()}, ["empty"]),
    ({"actions": np.full((250, 1), "a")}, ["could not convert"]),
    ({"actions": np.full((250, 1), None)}, ["Object arrays"]),
    pytest.param({"next_observations": np.zeros((250, 1))}, ["next_observations"]),
    pytest.param({"next_observations": np.zeros((250, 4))}, ["next_observations"]),
    pytest.param({"rewards": np.zeros((250, 2))}, ["rewards", "(250, 2)"]),
    pytest.param({"terminals": np.zeros((250, 2))}, ["terminals", "(250, 2)"]),
    pytest.param({"next_observations": None, "seg_end_index": np.array([999]),
         "seg_end_next_observations": np.zeros((1, 3))}, ["seg_end_index"]),
    pytest.param({name: rows[199:200] for name, rows in ROWS.items()} | {"next_observations": None},
        ["no row"]),
])  # fmt: skip
def test_wrong_shapes(refused, tmp_path, changes, words):
    path = save(tmp_path / "x.npz", **changes)
    assert_words(refused("--dataset", path, *PENDULUM), "x.npz", *words)


@pytest.mark.parametrize("name, where, value", [
    ("rewards", 17, np.nan), ("rewards", 249, -np.inf), ("observations", (3, 1), np.nan),
    ("actions", 9, np.nan), ("next_observations", (0, 2), np.inf),
    pytest.param("terminals", 17, np.nan),
])  # fmt: skip
def test_not_finite(refused, tmp_path, name, where, value):
    rows = ROWS[name].astype(np.float32)
    rows[where] = value
    path = save(tmp_path / "x.npz", **{name: rows})
    row = where[0] if isinstance(where, tuple) else where
    line = refused("--dataset", path, *PENDULUM)
    assert_words(line, "x.npz", f" {name}", "not finite", f"the first is {row}\n")


@pytest.mark.parametrize("value", [2.01, -3.0])
def test_action_outside_the_box(refused, tmp_path, value):
    path = save(tmp_path / "x.npz", **changed("actions", 11, value))
    line = refused("--dataset", path, *PENDULUM)
    assert_words(line, "x.npz", "1 actions outside Pendulum-v1's box", "row 11\n")


# ------------------------------------------------------------------------------------ Damaged files


def test_empty_and_foreign_files(refused, tmp_path):
    for name, content in (("a.npz", b""), ("b.hdf5", b""), ("c.npz", b"hello"), ("d.h5", b"hi")):
        (tmp_path / name).write_bytes(content)
        assert_words(refused("--dataset", name, *PENDULUM), name, "unreadable", "Fetch it again")


def test_npy_file_called_npz(refused, tmp_path):
    with open(tmp_path / "x.npz", "wb") as file:
        np.save(file, ROWS["rewards"])
    assert_words(refused("--dataset", "x.npz", *PENDULUM), "x.npz")


@pytest.mark.parametrize("compressed", [False, True])
def test_truncated_npz(refused, tmp_path, compressed):
    (np.savez_compressed if compressed else np.savez)(tmp_path / "x.npz", **ROWS)
    content = (tmp_path / "x.npz").read_bytes()
    for part in (0.01, 0.5, 0.99):
        (tmp_path / "x.npz").write_bytes(content[: int(len(content) * part)])
        assert_words(refused("--dataset", "x.npz", *PENDULUM), "x.npz", "unreadable")
    (tmp_path / "x.npz").write_bytes(content[:-1])
    assert_words(refused("--dataset", "x.npz", *PENDULUM), "x.npz", "unreadable")


def test_bit_flip_in_the_numbers_of_an_npz(refused, tmp_path):
    """One bit of one reward: the value stays plausible, only the checksum tells."""
    content = bytearray(save(tmp_path / "x.npz").read_bytes())
    at = content.index(ROWS["rewards"].tobytes())
    for offset in (0, 1000, ROWS["rewards"].nbytes - 1):
        content[at + offset] ^= 1
        (tmp_path / "x.npz").write_bytes(content)
        assert_words(refused("--dataset", "x.npz", *PENDULUM), "x.npz", "unreadable")
        content[at + offset] ^= 1


def test_bit_flip_anywhere_in_an_npz_never_ends_in_a_traceback(iql, tmp_path, capsys):
    path = tmp_path / "x.npz"
    np.savez(path, **{name: rows[:3] for name, rows in ROWS.items()})
    content, random = path.read_bytes(), np.random.default_rng(0)
    for at in range(len(content)):
        flipped = bytearray(content)
        flipped[at] ^= 1 << random.integers(8)
        path.write_bytes(flipped)
        try:
            iql.read_dataset(path)  # bytes such as dates do not matter
        except SystemExit as stop:
            assert stop.code == 2
    assert "Traceback" not in capsys.readouterr().err


def make_minari(
    name, observation_space=None, action_space=None, env="Pendulum-v1", steps=20, **fields
):
    """A Minari dataset of one episode; its data folder is where MINARI_DATASETS_PATH says."""
    spec = gym.make(env) if env else None
    observation_space = observation_space or spec.observation_space
    action_space = action_space or spec.action_space
    sample = {
        "observations": np.stack([observation_space.sample() for _ in range(steps + 1)]),
        "actions": np.stack([action_space.sample() for _ in range(steps)]),
        "rewards": [0.0] * steps, "terminations": [False] * steps, "truncations": [False] * steps,
    }  # fmt: skip
    dataset = minari.create_dataset_from_buffers(
        name, [EpisodeBuffer(**sample | fields)], env=env, observation_space=observation_space,
        action_space=action_space,
    )  # fmt: skip
    return dataset.storage.data_path


def test_good_minari_dataset_gets_as_far_as_making_agents(iql, refused):
    make_minari("test/good-v0")
    with pytest.raises(AssertionError, match="before agents are made"):
        iql.main(["--dataset", "test/good-v0", *SMOKE, "--no-normalize-returns"])


@pytest.mark.parametrize("part", [0.05, 0.5, 0.95])
def test_truncated_minari_hdf5(refused, part):
    file = make_minari("test/cut-v0") / "main_data.hdf5"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * part)])
    line = refused("--dataset", "test/cut-v0", *SMOKE)
    assert_words(line, "cut-v0", "unreadable", "Fetch it again", "minari.download_dataset")


@pytest.mark.parametrize("words", [
    ["bare-v0", "No data found"],
    pytest.param(["unreadable", "Fetch it again"]),
])  # fmt: skip
def test_minari_without_its_hdf5(refused, words):
    (make_minari("test/bare-v0") / "main_data.hdf5").unlink()
    assert_words(refused("--dataset", "test/bare-v0", *SMOKE), *words)


@pytest.mark.parametrize("content", [
    pytest.param(""),
    pytest.param('{"total_episodes": 1'),
    pytest.param("{}"),
])  # fmt: skip
def test_minari_with_damaged_metadata(refused, content):
    (make_minari("test/meta-v0") / "metadata.json").write_text(content)
    assert_words(refused("--dataset", "test/meta-v0", *SMOKE), "meta-v0")


def test_minari_with_nan(refused):
    rewards = [0.0] * 20
    rewards[7] = np.nan
    make_minari("test/nan-v0", rewards=rewards)
    line = refused("--dataset", "test/nan-v0", *SMOKE)
    assert_words(line, "nan-v0", "rewards", "not finite", "the first is 7\n")


def test_minari_without_environment(refused):
    box = gym.spaces.Box(-1, 1, (3,))
    make_minari("test/lone-v0", box, box, env=None)
    assert_words(refused("--dataset", "test/lone-v0", *SMOKE), "no environment")


# ------------------------------------------------------------- Environments that do not fit


def test_discrete_actions(refused, good):
    line = refused(*good[:2], "--env-id", "CartPole-v1", *SMOKE)
    assert_words(line, "CartPole-v1", "Discrete(2)", "only bounded vectors")


def test_discrete_actions_in_a_minari_dataset(refused):
    make_minari("test/cart-v0", env="CartPole-v1")
    assert_words(refused("--dataset", "test/cart-v0", *SMOKE), "Discrete(2)", "only bounded")


@pytest.mark.parametrize("space", [
    gym.spaces.Box(0, 255, (8, 8, 3), np.uint8),
    pytest.param(gym.spaces.Box(0, 1, (8, 8, 3), np.float32)),
])  # fmt: skip
def test_images_in_a_minari_dataset(refused, space):
    make_minari("test/image-v0", space)
    line = refused("--dataset", "test/image-v0", *SMOKE)
    assert_words(line, "image-v0", "only vectors are supported, no images")


class ImageEnv(gym.Env):
    """Continuous actions, and a picture for observation: plain, floating or in a dict."""

    action_space = gym.spaces.Box(-1, 1, (1,))

    def __init__(self, kind="plain", render_mode=None):
        picture = gym.spaces.Box(0, 255, (8, 8, 3), np.float32 if kind == "float" else np.uint8)
        self.observation_space = picture
        if kind == "dict":
            self.observation_space = gym.spaces.Dict({"picture": picture})


@pytest.mark.parametrize("kind", ["plain", "dict", "float"])
def test_images_in_the_environment(refused, good, kind):
    gym.register("TestImage-v0", "test_refusals:ImageEnv", kwargs={"kind": kind})
    try:
        line = refused(*good[:2], "--env-id", "TestImage-v0", *SMOKE)
    finally:
        gym.registry.pop("TestImage-v0")
    assert_words(line, "TestImage-v0")
    if kind != "float":
        assert_words(line, "only vectors are supported, no images")


def test_unknown_environment(iql, refused, good, monkeypatch):
    find_spec = iql.importlib.util.find_spec  # as if gymnasium-robotics were not installed
    monkeypatch.setattr(
        iql.importlib.util,
        "find_spec",
        lambda name, *a: None if "robotics" in name else find_spec(name, *a),
    )
    line = refused(*good[:2], "--env-id", "Pendulm-v1", *SMOKE)
    assert_words(line, "no environment", "Pendulm", "Did you mean: `Pendulum`")


# --------------------------------------------------------------------------------- Command line


@pytest.mark.parametrize("flag, value", [
    ("--batch-size", 0), ("--discount", 1.5), ("--discount", "nan"), ("--offline-steps", -1),
    ("--online-steps", -1), ("--num-seeds", 0), ("--eval-episodes", 0), ("--log-interval", 0),
    ("--tau", 2), ("--seed", -1), ("--utd-ratio", 0), ("--dropout-rate", 1), ("--expectile", -0.1),
    pytest.param("--buffer-size", 0),
    pytest.param("--hidden-dims", 0),
    pytest.param("--warmup-steps", -1),
    pytest.param("--max-weight", -1),
    pytest.param("--reward-scale", "nan"),
])  # fmt: skip
def test_numbers_out_of_range(refused, good, flag, value):
    assert_words(refused(*good, flag, value), f"{flag} ", value)


def test_eval_interval_is_a_multiple_of_log_interval(refused, good):
    assert_words(
        refused(*good, "--eval-interval", 75), "--eval-interval", "multiple", "--log-interval"
    )


def test_eval_interval_is_compared_with_the_presets_log_interval(refused, good, iql):
    """The smoke preset logs every 50: an evaluation every 150 is all right."""
    with pytest.raises(AssertionError, match="before agents are made"):
        iql.main([*map(str, good), "--eval-interval", "150"])


def test_unknown_preset(refused, good):
    line = refused(*good[:4], "--preset", "smok")
    assert_words(line, "--preset smok", "must be auto or one of", "smoke", "antmaze")


# ------------------------------------------------------------------------- Runs and checkpoints


def make_run(iql, folder, arguments):
    """The folder of a run that was started with these arguments, as far as its records."""
    config, dataset, _ = iql.parse_config([str(argument) for argument in arguments])
    folder, lock = iql.open_folder(iql.dataclasses.replace(config, run_dir=str(folder)), dataset)
    lock.close()
    return folder


def test_existing_run_folder(iql, refused, good, tmp_path):
    folder = make_run(iql, tmp_path / "run", good)
    before = (folder / "config.json").read_bytes()
    line = refused(*good, "--run-dir", folder, "--seed", 3)
    assert_words(line, f"--run-dir {folder}", "holds a run already", f"--resume {folder}")
    assert (folder / "config.json").read_bytes() == before


def test_run_folder_that_cannot_be(refused, good, tmp_path):
    (tmp_path / "file").write_text("")
    assert_words(refused(*good, "--run-dir", "file/run"), "--run-dir file/run", "cannot be written")


@pytest.mark.parametrize("flag, value, name", [
    ("--seed", 1, "seed"), ("--batch-size", 64, "batch_size"), ("--dataset", "x.npz", "dataset"),
])  # fmt: skip
def test_resume_with_other_settings(iql, refused, good, tmp_path, flag, value, name):
    folder = make_run(iql, tmp_path / "run", good)
    line = refused("--resume", folder, flag, value)
    assert_words(line, f"--resume {folder}", f"another {name}\n")


@pytest.mark.parametrize("content", [
    '{"seed": 0}', pytest.param('{"seed"')
])  # fmt: skip
def test_resume_of_a_foreign_configuration(refused, tmp_path, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text(content)
    assert_words(refused("--resume", "run"), "config")


@pytest.fixture
def checkpoint(iql, tmp_path):
    """Files that are no checkpoint of iql.py: none, a dataset, text, another script's."""
    (tmp_path / "text.npz").write_text("hello")
    save(tmp_path / "data.npz")
    meta = {"script": "sac", "config": {"seed": 0}, "spec": ""}
    iql.save_checkpoint(tmp_path / "sac.npz", {"state/x": np.zeros(1)}, meta)
    return {
        "none.npz": "no readable checkpoint",
        "data.npz": "no readable checkpoint",
        "text.npz": "no readable checkpoint",
        "sac.npz": " of ",
    }  # a checkpoint of, settings of


@pytest.mark.parametrize("name", [
    *(pytest.param(name) for name in ("none.npz", "data.npz",
                                                                     "text.npz")),
    "sac.npz",
])  # fmt: skip
def test_eval_only_of_what_is_no_checkpoint(refused, checkpoint, name):
    assert_words(refused("--eval-only", name), checkpoint[name])


def test_eval_only_of_a_checkpoint_without_configuration(iql, refused, tmp_path):
    iql.save_checkpoint(tmp_path / "x.npz", {"state/x": np.zeros(1)}, {"script": "other"})
    assert_words(refused("--eval-only", "x.npz"), "x.npz")


@pytest.mark.parametrize("name", ["none.npz", "data.npz", "text.npz", "sac.npz"])
def test_init_from_what_is_no_checkpoint(refused, good, checkpoint, tmp_path, name):
    assert_words(refused(*good, "--init-from", name, "--run-dir", "run"), name)
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------- As a user sees it


def assert_refused(code, out, err, *words):
    assert code == 2 and "Traceback" not in err
    assert len(err.splitlines()) == 1, err
    assert_words(err, "iql.py: error: ", *words)


def test_process_unknown_dataset(tmp_path):
    done = run_script("algorithms/iql.py", "--dataset", "mujoco/hoper/medium-v0", cwd=tmp_path,
                      MINARI_DATASETS_PATH=str(tmp_path))  # fmt: skip
    assert_refused(*done, "mujoco/hopper/medium-v0")


def test_process_nan(tmp_path):
    path = save(tmp_path / "x.npz", **changed("rewards", 17, np.nan))
    done = run_script("algorithms/iql.py", "--dataset", path, *PENDULUM, cwd=tmp_path)
    assert_refused(*done, "x.npz: rewards", "17")
    assert [file.name for file in tmp_path.iterdir()] == ["x.npz"]


def test_process_truncated_minari(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    file = make_minari("test/cut-v0") / "main_data.hdf5"
    file.write_bytes(file.read_bytes()[:1000])
    done = run_script("algorithms/iql.py", "--dataset", "test/cut-v0", *SMOKE, cwd=tmp_path)
    assert_refused(*done, "cut-v0", "unreadable")
