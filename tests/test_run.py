"""A run is a sequence of rounds: killed at any moment, the same command goes on to the same bits.

Runs here are calls of iql.py's `main` in this process with small sizes. `Killed` passes every
`except` of the scripts, as a SIGKILL would; real SIGKILLs, of every script, are in test_scripts.py.
"""

import json
import random
import shutil
import sys
from types import SimpleNamespace

import gymnasium as gym
import jax
import numpy as np
import pytest
from conftest import read_arrays, read_metrics

SIZES = ["--offline-steps", "40", "--online-steps", "60", "--interval", "20", "--buffer-size", "50",
         "--hidden-dims", "16", "16", "--batch-size", "16", "--eval-episodes", "2"]  # fmt: skip


class Killed(BaseException):
    """Stands for a SIGKILL: no handler of the scripts may catch it."""


@pytest.fixture(scope="module")
def flags(pendulum):
    return ["--dataset", pendulum, *SIZES]


def go(script, arguments, capsys=None):
    """`main`, or the line that it ends with."""
    try:
        script.main(list(map(str, arguments)))
    except SystemExit as end:
        return end.code
    return None


@pytest.fixture(scope="module")
def unbroken(iql, flags, tmp_path_factory):
    """An unbroken run: 2 rounds offline, 3 online; the ring of 50 is full in the last one."""
    folder = tmp_path_factory.mktemp("unbroken")
    assert go(iql, [*flags, "--run-dir", folder]) is None
    return SimpleNamespace(folder=folder, arrays=read_arrays(folder), rows=read_metrics(folder))


def same(folder, unbroken):
    assert read_arrays(folder) == unbroken.arrays
    assert read_metrics(folder) == unbroken.rows
    assert sorted(p.name for p in folder.iterdir() if "tmp" not in p.name) == [
        "checkpoint.npz", "config.json", "metrics.csv"]  # fmt: skip


def test_a_row_per_round_and_what_it_says(unbroken):
    steps = [(row["phase"], row["step"], row["seed"]) for row in unbroken.rows]
    offline, online = [("offline", "20", "0"), ("offline", "40", "0")], ("20", "40", "60")
    assert steps == offline + [("online", step, "0") for step in online]
    assert all(row["critic_loss"] and row["return"] and not row["score"] for row in unbroken.rows)
    config = json.loads((unbroken.folder / "config.json").read_text())
    assert config["units"]["actions"] == [2.0] and config["reference"][1] is None


def test_more_than_ten_episodes_are_evaluated_in_tens(iql, flags, tmp_path, monkeypatch):
    """Twenty starts, always the same, in ten environments; what is logged is the mean of all."""
    asked, reset = [], gym.vector.SyncVectorEnv.reset

    def seen(envs, seed=None, **keywords):
        asked.append(seed)
        return reset(envs, seed=seed, **keywords)

    def score(agents, envs, source, config, first):
        original(agents, envs, source, config, first)
        return {"return": np.array([1.0 + first]), "score": np.array([np.nan])}

    original = iql.evaluate
    monkeypatch.setattr(iql, "evaluate", score)
    monkeypatch.setattr(gym.vector.SyncVectorEnv, "reset", seen)
    more = ["--offline-steps", 20, "--online-steps", 0, "--eval-episodes", 20, "--seed", 3]
    assert go(iql, [*flags, *more, "--run-dir", tmp_path]) is None
    assert asked == [[30_000 + i for i in range(10)], [30_010 + i for i in range(10)]]
    assert [row["return"] for row in read_metrics(tmp_path)] == ["6"]


# -------------------------------------------------------------------------------------------- Kills

MOMENTS = [("np.savez", 1), ("np.savez", 2), ("np.savez", 4), ("os.replace", 1), ("os.replace", 3),
           ("os.fsync", 3), ("evaluate", 1), ("evaluate", 4), ("update_steps", 2),
           ("online_step", 1), ("online_step", 30), ("insert", 45)]  # fmt: skip


@pytest.mark.parametrize(("where", "number"), MOMENTS)
def test_killed_run_goes_on_to_the_same_bits(
    where, number, iql, flags, unbroken, tmp_path, monkeypatch
):
    owner, _, name = where.rpartition(".")
    owner = {"np": iql.np, "os": iql.os, "": iql}[owner]
    original, calls = getattr(owner, name), []

    def killing(*args, **kwargs):
        calls.append(name)
        if len(calls) == number:
            raise Killed
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, killing)
        if name == "insert":  # a default argument: bound when it was defined
            store = iql.online_round.__defaults__
            patch.setattr(iql.online_round, "__defaults__", (*store[:-1], killing))
        with pytest.raises(Killed):
            iql.main([*flags, "--run-dir", str(tmp_path)])
    assert len(calls) == number
    assert go(iql, [*flags, "--run-dir", tmp_path]) is None
    same(tmp_path, unbroken)


def test_finished_run_does_nothing_more(iql, flags, unbroken, tmp_path, monkeypatch):
    folder = shutil.copytree(unbroken.folder, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(iql, "evaluate", None)
    monkeypatch.setattr(iql, "update_steps", None)
    monkeypatch.setattr(iql, "online_step", None)
    assert go(iql, [*flags, "--run-dir", folder]) is None
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# ----------------------------------------------------------------------------------------- Refusals


@pytest.mark.parametrize(("change", "named"), [
    (["--beta", "1"], "beta"), (["--seed", "1"], "seed"), (["--hidden-dims", "16"], "hidden_dims"),
    (["--online-steps", "80"], "online_steps"), (["--env-id", "MountainCarContinuous-v0"], None),
])  # fmt: skip
def test_another_configuration_is_refused_by_name(change, named, iql, flags, unbroken, tmp_path):
    folder = shutil.copytree(unbroken.folder, tmp_path / "run")
    end = go(iql, [*flags, *change, "--run-dir", folder])
    assert "\n" not in end
    if named:
        assert str(folder) in end and f" {named}" in end and "--run-dir" in end
    assert read_arrays(folder) == unbroken.arrays


def test_another_dataset_is_refused_by_its_hash(iql, flags, unbroken, tmp_path, monkeypatch):
    folder = shutil.copytree(unbroken.folder, tmp_path / "run")
    monkeypatch.setattr(iql.hashlib, "sha256", iql.hashlib.sha1)
    assert "dataset_sha256" in go(iql, [*flags, "--run-dir", folder])


def test_bad_input_is_one_line(iql, flags, tmp_path):
    for bad, words in {
        ("--dataset", "no/such-v0"): "--dataset no/such-v0",
        ("--env-id", "NoSuch-v0"): "NoSuch",
        ("--env-id", "CartPole-v1"): "CartPole",
        ("--env-id", "MountainCarContinuous-v0"): "collect.py",
        ("--preset", "nothing"): "ogbench",
        ("--init-from", str(tmp_path)): "checkpoint.npz",
    }.items():
        end = go(iql, [*flags, *bad, "--run-dir", tmp_path / "run"])
        assert isinstance(end, str) and words in end and "\n" not in end.strip(), (bad, end)


def test_unknown_flag_exits_with_2(iql, capsys):
    assert go(iql, ["--no-such-flag"]) == 2


# ------------------------------------------------------------------------------------ Damage, disk


def test_every_flipped_bit_and_every_cut_is_detected(iql, unbroken, tmp_path):
    data = (unbroken.folder / "checkpoint.npz").read_bytes()
    good, whole = iql.load(unbroken.folder)
    rng, silent = random.Random(0), []
    for number in range(120):
        damaged = bytearray(data)
        if number < 100:
            place = rng.randrange(len(data))
            damaged[place] ^= 1 << rng.randrange(8)
        else:
            damaged = damaged[: rng.randrange(len(data))]
        (tmp_path / "checkpoint.npz").write_bytes(damaged)
        try:
            arrays, meta = iql.load(tmp_path)
        except SystemExit as end:
            assert "unreadable" in end.code
        else:  # harmless: a byte that nobody reads, or a name or shape that restore refuses
            if set(arrays) == set(good) and meta == whole:
                other = {n for n, x in arrays.items() if x.tobytes() != good[n].tobytes()}
                silent += [number] * any(arrays[n].shape == good[n].shape for n in other)
    assert silent == []


def test_pickle_in_a_checkpoint_is_refused(iql, tmp_path):
    meta = np.frombuffer(b"{}", np.uint8)
    np.savez(tmp_path / "checkpoint.npz", meta=meta, agents=np.array([print], object))
    with pytest.raises(SystemExit, match="unreadable"):
        iql.load(tmp_path)


@pytest.mark.parametrize(("where", "number"), [("np.savez", 1), ("np.savez", 3), ("os.fsync", 4)])
def test_disk_full_leaves_the_round_before(
    where, number, iql, flags, unbroken, tmp_path, monkeypatch
):
    owner, name = {"np": iql.np, "os": iql.os}[where[:2]], where[3:]
    original, calls = getattr(owner, name), []

    def full(*args, **kwargs):
        calls.append(name)
        if len(calls) == number:
            raise OSError(28, "No space left on device")
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        assert "No space left on device" in go(iql, [*flags, "--run-dir", tmp_path])
    assert list(tmp_path.glob("*.tmp")) == []
    assert (number == 1) or len(iql.load(tmp_path)[1]["rows"]) == number - 1
    assert go(iql, [*flags, "--run-dir", tmp_path]) is None
    same(tmp_path, unbroken)


@pytest.mark.parametrize("phase", ["offline", "online"])
def test_a_value_that_is_not_finite_stops_before_it_is_saved(
    phase, iql, flags, unbroken, tmp_path, monkeypatch
):
    def poisoned(train):
        def round_(agents, buffers, run, first, last):
            agents, buffers, info = train(agents, buffers, run, first, last)
            if first == 20:
                params = jax.tree.map(lambda x: x.at[0].set(np.nan), agents.critic.params)
                agents = agents.replace(critic=agents.critic.replace(params=params))
            return agents, buffers, info

        return round_

    phases = iql.phases
    monkeypatch.setattr(
        iql, "phases",
        lambda config: [(n, s, poisoned(f) if n == phase else f) for n, s, f in phases(config)],
    )  # fmt: skip
    end = go(iql, [*flags, "--run-dir", tmp_path])
    assert f"{phase} step 40" in end and "agents/critic" in end and "not saved" in end
    kept = 1 if phase == "offline" else 3
    assert iql.load(tmp_path)[1]["done"] == kept
    assert read_metrics(tmp_path) == unbroken.rows[:kept]


# ------------------------------------------------------------------------------------------- Seeds


@pytest.fixture(scope="module")
def two_seeds(iql, flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    assert go(iql, [*flags, "--num-seeds", "2", "--run-dir", folder]) is None
    return folder


def test_a_seed_of_many_is_its_single_run(two_seeds, unbroken):
    """But for the last digits: XLA does not compile a loop over one seed as one over two."""
    many, single = (iql_arrays(folder) for folder in (two_seeds, unbroken.folder))
    for name, array in single.items():
        if name.startswith("agents") and "opt_state" not in name and not name.endswith("key"):
            np.testing.assert_allclose(many[name][0], array[0], rtol=1e-3, atol=1e-4, err_msg=name)
    first = many["buffers/observations"][0, 50 - 40], single["buffers/observations"][0, 50 - 40]
    np.testing.assert_allclose(*first, rtol=1e-3)  # of the second online round


def test_seeds_differ_in_parameters_batches_and_episodes(two_seeds):
    arrays = iql_arrays(two_seeds)
    for name in ("agents/actor/params/params/Dense_0/kernel", "buffers/observations"):
        assert not np.array_equal(arrays[name][0], arrays[name][1]), name


def iql_arrays(folder):
    with np.load(folder / "checkpoint.npz") as file:
        return {name: file[name] for name in file.files if name != "meta"}


def test_evaluation_does_not_change_training(iql, flags, unbroken, tmp_path):
    more = [*flags, "--eval-episodes", "5", "--run-dir", tmp_path]
    assert go(iql, more) is None
    assert read_arrays(tmp_path) == unbroken.arrays


# --------------------------------------------------------------------------------------- init-from


def test_init_from_starts_online_with_that_agent(iql, flags, unbroken, tmp_path):
    folder = unbroken.folder
    flags = [*flags, "--init-from", folder, "--run-dir", tmp_path / "run"]
    assert go(iql, [*flags, "--online-steps", "0"]) is None  # nothing to do
    flags[-1] = tmp_path / "more"
    assert go(iql, [*flags, "--seed", "5"]) is None
    rows = read_metrics(tmp_path / "more")
    assert {row["phase"] for row in rows} == {"online"} and rows[0]["seed"] == "5"
    before, after = iql_arrays(folder), iql_arrays(tmp_path / "more")
    steps = [x["agents/critic/step"][0] for x in (before, after)]
    assert steps == [100, 160]  # it went on from that optimiser
    theirs = jax.random.split(before["agents/key"][0], 3)[0]  # after a round of no steps
    assert (iql_arrays(tmp_path / "run")["agents/key"][0] != theirs).any()  # the key is its own


@pytest.mark.parametrize(("change", "words"), [
    (["--hidden-dims", "8", "8"], "sizes"), (["--hidden-dims", "16"], "networks"),
    (["--reward-scale", "2"], "units"),
])  # fmt: skip
def test_init_from_another_agent_is_refused(change, words, iql, flags, unbroken, tmp_path):
    more = [*flags, *change, "--init-from", unbroken.folder, "--run-dir", tmp_path]
    end = go(iql, more)
    assert words in end and str(unbroken.folder) in end


def test_init_from_another_script_is_refused(iql, bc, flags, unbroken, tmp_path):
    more = ["--dataset", "pendulum/random-v0", "--hidden-dims", "16", "16", "--normalize-returns",
            "--init-from"]  # fmt: skip
    assert "another script" in go(bc, [*more, unbroken.folder, "--run-dir", tmp_path])


# ------------------------------------------------------------------------------------------- wandb


def test_wandb_gets_every_round_and_goes_on(iql, flags, unbroken, tmp_path, monkeypatch):
    started, logged = [], []
    module = SimpleNamespace(init=lambda **words: started.append(words), log=logged.append)
    monkeypatch.setitem(sys.modules, "wandb", module)
    assert go(iql, [*flags, "--wandb", "--run-dir", tmp_path]) is None
    assert started[0]["resume"] == "allow" and started[0]["config"]["script"] == "iql"
    assert len(logged) == 5 and logged[-1]["step"] == 60
    assert float(unbroken.rows[-1]["q"]) == pytest.approx(logged[-1]["online/q"], rel=1e-5)
    same(tmp_path, unbroken)  # the same run, with or without
