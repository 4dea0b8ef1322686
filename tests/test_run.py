"""A run that is killed, preempted, poisoned or damaged goes on to the same bits, or says why not.

Most runs here are calls of `main` in this process, with `--resume run` in a folder of their own:
one configuration, hence one compilation. `Killed` passes every `except` of the scripts, as a
SIGKILL would; a real SIGKILL and a real SIGTERM stand at the end.
"""

import contextlib
import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, pendulum_rows, run_script
from jax.experimental.compilation_cache import compilation_cache

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# Saves: offline 60, 120, online 60, 120, 180, 240. The ring of 150 is full at online step 150.
SIZES = ["--offline-steps", "120", "--online-steps", "240", "--buffer-size", "150",
         "--log-interval", "20", "--eval-interval", "60"]  # fmt: skip


class Killed(BaseException):
    """Stands for a SIGKILL: no handler of the scripts may catch it."""


@pytest.fixture(scope="module", autouse=True)
def compile_cache(tmp_path_factory):
    """Programs compiled once serve all runs and processes of this file."""
    folder = str(tmp_path_factory.mktemp("compiled"))
    settings = {
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield {name.upper(): str(value) for name, value in settings.items()}
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(autouse=True)
def keep_handlers():
    """A signal that a script does not catch fails its test instead of ending pytest."""

    def handler(number, frame):
        raise AssertionError(f"signal {number} was not caught")

    before = {number: signal.signal(number, handler) for number in SIGNALS}
    yield
    for number, old in before.items():
        signal.signal(number, old)


@contextlib.contextmanager
def reused_agents(script):
    """Fresh agents of one configuration share their optimisers, so that jit knows them again; and
    the number of CPU devices stays what it is in a process that already uses them."""
    made, create = {}, script.create_shards

    def create_shards(config, observation_dim, action_dim, devices):
        if config not in made:
            made[config] = script.to_host(create(config, observation_dim, action_dim, devices))
        return script.to_devices(made[config], devices)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "create_shards", create_shards)
        patch.setattr(script, "use_all_cores", lambda num_seeds: None)
        yield script


@pytest.fixture(scope="module")
def script(iql):
    with reused_agents(iql) as patched:
        yield patched


@pytest.fixture(scope="module")
def flags(pendulum):
    return ["--dataset", str(pendulum), "--env-id", "Pendulum-v1", "--preset", "smoke", *SIZES,
            "--hidden-dims", "16", "16", "--normalize-observations", "--resume", "run"]  # fmt: skip


def go(script, folder, arguments):
    """`main` in `folder`: (exit code, stdout, stderr, [(phase, step)] of its log)."""
    logged, out, err, code = [], io.StringIO(), io.StringIO(), 0
    write_log = script.write_log

    def recorded(run, phase, values):
        logged.append((phase, getattr(run, phase)))
        write_log(run, phase, values)

    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(folder):
        patch.setattr(script, "write_log", recorded)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                script.main(arguments)
            except SystemExit as end:
                code = end.code
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue(), logged=logged)


@contextlib.contextmanager
def on_call(owner, name, number, action):
    """Run `action(*args)` before the call with this number, 1 the first, of `owner.name`."""
    original, count = getattr(owner, name), 0

    def hooked(*args, **kwargs):
        nonlocal count
        # Others rename files too: jax for its compilation cache.
        count += owner is not os or "checkpoint" in str(args[0])
        if count == number:
            action(*args)
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, hooked)
        yield


def die(*args):
    if args and hasattr(args[0], "write"):
        args[0].write(b"PK\x03\x04 the first half of a checkpoint")
    raise Killed


def load(folder):
    """(arrays, meta) of the checkpoint in `folder`, read without the scripts."""
    with np.load(folder / "checkpoint.npz") as file:
        arrays = {name: file[name] for name in file.files}
    return arrays, json.loads(arrays.pop("meta").tobytes())


def table(folder):
    """metrics.csv without what depends on the clock."""
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in r.items() if k not in ("updates_per_second", "seconds")}
            for r in rows]  # fmt: skip


def differing(arrays, others):
    """Names of the arrays that are not the same bits in both."""
    return [n for n in sorted({*arrays, *others}) if n not in arrays or n not in others
            or arrays[n].dtype != others[n].dtype or arrays[n].shape != others[n].shape
            or arrays[n].tobytes() != others[n].tobytes()]  # fmt: skip


def assert_same_run(folder, other):
    (arrays, meta), (others, other_meta) = load(folder), load(other)
    assert differing(arrays, others) == []
    assert [meta[k] for k in ("offline", "online")] == [
        other_meta[k] for k in ("offline", "online")
    ]
    assert table(folder) == table(other)
    records = [json.loads((each / "record.json").read_text()) for each in (folder, other)]
    for name in ("state_sha256", "offline", "online", "ended"):
        assert records[0][name] == records[1][name], name
    for name in set(records[0]["curve"]) - {"updates_per_second", "seconds"}:
        assert records[0]["curve"][name] == records[1]["curve"][name], name


@pytest.fixture(scope="module")
def unbroken(script, flags, tmp_path_factory):
    """The run that all others are held against, and how often its programs were compiled."""
    folder = tmp_path_factory.mktemp("unbroken")
    programs = [script.update_steps, script.online_step, script.insert_transitions]
    before = [program._cache_size() for program in programs]
    done = go(script, folder, flags)
    assert done.code == 0, done.err
    compiled = [p._cache_size() - n for p, n in zip(programs, before, strict=True)]
    return SimpleNamespace(folder=folder / "run", compiled=compiled, **vars(done))


# ----------------------------------------------------------------------------------------- Resume


def test_nothing_to_resume_starts_anew(unbroken):
    assert unbroken.logged[0] == ("offline", 20)
    steps = [(r["phase"], int(r["step"])) for r in table(unbroken.folder)]
    wanted = [("offline", n) for n in range(20, 121, 20)]
    assert steps == wanted + [("online", n) for n in range(20, 241, 20)]


def test_a_checkpoint_holds_all_that_changes(unbroken):
    arrays, _ = load(unbroken.folder)
    for part in ("state/actor/params", "state/actor/opt_state", "state/critic/opt_state",
                 "state/target_critic_params", "state/key", "transform/observation_mean",
                 "buffer/rows/rewards", "buffer/position", "rollout/played/0"):  # fmt: skip
        assert any(name.startswith(part) for name in arrays), part
    assert arrays["buffer/size"].tolist() == [150]  # the ring has been filled and overwritten
    assert len(arrays["rollout/played/0"]) == 40  # 240 steps: in the midst of the second episode


KILLS = {  # where, at which call, (phase, step) of the first log after the resume
    "before the first save": ("save_run", 1, ("offline", 20)),
    "half of a save written": ("np.savez", 2, ("offline", 80)),
    "save written, the one before in place": ("os.replace", 6, ("online", 80)),
    "save written, the one before renamed": ("os.replace", 7, ("online", 80)),
    "at the switch": ("start_online", 1, ("online", 20)),
    "first online step": ("step_rollout", 1, ("online", 20)),
    "within an online episode": ("step_rollout", 130, ("online", 140)),
    "in an online evaluation": ("evaluation_values", 4, ("online", 80)),
    "logged, not saved": ("save_run", 5, ("online", 140)),
}


@pytest.mark.parametrize("where", KILLS)
def test_killed_run_goes_on_to_the_same_bits(where, script, flags, unbroken, tmp_path):
    place, number, resumed_at = KILLS[where]
    owner = {"np": np, "os": os}.get(place.split(".")[0], script)
    with pytest.raises(Killed), on_call(owner, place.split(".")[-1], number, die):
        go(script, tmp_path, flags)
    done = go(script, tmp_path, flags)
    assert done.code == 0, done.err
    assert done.logged[0] == resumed_at  # not anew, and not with a step left out
    assert_same_run(tmp_path / "run", unbroken.folder)


def test_killed_twice(script, flags, unbroken, tmp_path):
    for place, number in (("offline_chunk", 5), ("step_rollout", 90)):
        with pytest.raises(Killed), on_call(script, place, number, die):
            go(script, tmp_path, flags)
    assert go(script, tmp_path, flags).code == 0
    assert_same_run(tmp_path / "run", unbroken.folder)


def test_sac_killed_after_its_warmup_goes_on_to_the_same_bits(sac, tmp_path):
    flags = ["--env-id", "Pendulum-v1", "--preset", "smoke", "--online-steps", "100",
             "--warmup-steps", "40", "--log-interval", "20", "--eval-interval", "60",
             "--hidden-dims", "16", "16", "--resume", "run"]  # fmt: skip
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    with reused_agents(sac):
        assert go(sac, tmp_path / "whole", flags).code == 0
        with pytest.raises(Killed), on_call(sac, "step_rollout", 70, die):
            go(sac, tmp_path / "killed", flags)
        assert go(sac, tmp_path / "killed", flags).logged[0] == ("online", 80)
    assert_same_run(tmp_path / "killed" / "run", tmp_path / "whole" / "run")


def test_finished_run_does_nothing_new(script, flags, unbroken, tmp_path):
    shutil.copytree(unbroken.folder, tmp_path / "run")
    done = go(script, tmp_path, flags)
    assert (done.code, done.logged) == (0, [])
    for name in ("checkpoint.npz", "checkpoint.previous.npz", "config.json", "metrics.csv"):
        assert (tmp_path / "run" / name).read_bytes() == (unbroken.folder / name).read_bytes(), name
    assert_same_run(tmp_path / "run", unbroken.folder)


def test_another_setting_is_refused_by_name(script, flags, unbroken, tmp_path):
    shutil.copytree(unbroken.folder, tmp_path / "run")
    done = go(script, tmp_path, [*flags, "--seed", "1", "--tau", "0.1"])
    assert done.code == 2
    assert "seed" in done.err and "tau" in done.err
    assert len(done.err.splitlines()) == 1


@pytest.fixture(scope="module")
def extended(script, flags, tmp_path_factory):
    """(a run of 40 online steps extended to 80, the run of 80)."""
    folders = [tmp_path_factory.mktemp(name) for name in ("extended", "straight")]
    flags = [*flags, "--offline-steps", "0"]
    for folder, steps in zip([folders[0], *folders], ("40", "80", "80"), strict=True):
        assert go(script, folder, [*flags, "--online-steps", steps]).code == 0
    return [folder / "run" for folder in folders]


def test_more_online_steps_go_on_like_one_run(extended):
    arrays, _ = load(extended[0])
    others, _ = load(extended[1])
    assert arrays["buffer/size"].tolist() == [80]
    assert differing(arrays, others) == []


def test_extended_run_resumes_without_its_flag(script, extended, tmp_path):
    shutil.copytree(extended[0], tmp_path / "run")
    done = go(script, tmp_path, ["--resume", "run"])
    assert (done.code, done.logged) == (0, [])


def test_fewer_online_steps_than_done_change_nothing(script, extended, tmp_path):
    shutil.copytree(extended[1], tmp_path / "run")
    done = go(script, tmp_path, ["--resume", "run", "--online-steps", "40"])
    assert (done.code, done.logged) == (0, [])
    assert_same_run(tmp_path / "run", extended[1])


# ------------------------------------------------------------------------------ Damaged checkpoints


@pytest.fixture
def checkpoint(script, tmp_path):
    """(path, arrays) of a checkpoint (save 2) with the same arrays in the one before (save 1)."""
    path = tmp_path / "checkpoint.npz"
    rng = np.random.default_rng(0)
    arrays = {
        "state/params": rng.normal(size=(36, 300)).astype(np.float32),  # longer than a read-ahead
        "state/key": np.array([[1, 2]], np.uint32),
        "rollout/played/0": rng.normal(size=(5, 1)).astype(np.float32),
    }
    script.save_checkpoint(path, arrays, {"save": 1})
    script.save_checkpoint(path, arrays, {"save": 2})
    return path, arrays


def assert_never_silently_wrong(script, path, arrays):
    """Exactly the saved arrays; or those of the previous save, with a warning."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        found, meta, source = script.load_checkpoint(path)
    assert differing(found, arrays) == []
    assert meta["save"] == (2 if source == path else 1)
    assert (source == path) == (err.getvalue() == ""), err.getvalue()


def flip(whole, bit):
    damaged = bytearray(whole)
    damaged[bit // 8] ^= 1 << bit % 8
    return damaged


def test_100_flipped_bits(script, checkpoint):
    path, arrays = checkpoint
    whole = path.read_bytes()
    for bit in np.random.default_rng(1).choice(8 * len(whole), 100, replace=False):
        path.write_bytes(flip(whole, int(bit)))
        assert_never_silently_wrong(script, path, arrays)


def array_header(path):
    """The bytes of a long array's header, where a bit changes its shape, type or offset."""
    with zipfile.ZipFile(path) as file:
        entry = file.getinfo("state/params.npy")
    first = entry.header_offset + 30 + len(entry.filename)
    return range(first, first + 20 + 128)


def directory(path):
    """The bytes of the zip's directory, where a bit can make an array disappear."""
    with zipfile.ZipFile(path) as file:
        return range(file.start_dir, path.stat().st_size)


@pytest.mark.parametrize("part", [array_header, directory])
def test_every_flipped_bit_of_the_file_format(part, script, checkpoint):
    path, arrays = checkpoint
    whole, faults = path.read_bytes(), []
    for bit in (8 * place + i for place in part(path) for i in range(8)):
        path.write_bytes(flip(whole, bit))
        try:
            assert_never_silently_wrong(script, path, arrays)
        except BaseException as fault:  # an exception of whatever kind is what the test is after
            faults.append((bit, type(fault).__name__))
    assert faults == []


def test_20_truncations(script, checkpoint):
    path, arrays = checkpoint
    whole = path.read_bytes()
    for length in [0, *np.random.default_rng(2).choice(len(whole), 19, replace=False)]:
        path.write_bytes(whole[:length])
        assert_never_silently_wrong(script, path, arrays)


def test_both_checkpoints_damaged(script, flags, unbroken, tmp_path):
    shutil.copytree(unbroken.folder, tmp_path / "run")
    for name in ("checkpoint.npz", "checkpoint.previous.npz"):
        file = tmp_path / "run" / name
        file.write_bytes(file.read_bytes()[:1000])
    rows = table(tmp_path / "run")
    done = go(script, tmp_path, flags)
    assert done.code == 2
    assert sum("error:" in line for line in done.err.splitlines()) == 1
    assert "Traceback" not in done.err
    assert table(tmp_path / "run") == rows  # nothing is overwritten


def test_damaged_run_goes_on_from_the_previous_checkpoint(script, flags, unbroken, tmp_path):
    shutil.copytree(unbroken.folder, tmp_path / "run")
    path, arrays = tmp_path / "run" / "checkpoint.npz", load(unbroken.folder)[0]
    place = path.read_bytes().index(arrays["buffer/rows/rewards"].tobytes())
    path.write_bytes(flip(path.read_bytes(), 8 * place))
    done = go(script, tmp_path, flags)
    assert done.code == 0
    assert done.err.count("warning") == 1
    assert done.logged[0] == ("online", 200)
    assert_same_run(tmp_path / "run", unbroken.folder)
    # The damaged file must never take the place of the whole one, not even for a moment.
    path.write_bytes(flip(path.read_bytes(), 8 * place))
    with pytest.raises(Killed), on_call(os, "replace", 3, die):
        go(script, tmp_path, flags)
    assert go(script, tmp_path, flags).logged[0] == ("online", 200)


def test_checkpoint_of_another_network_is_refused(script, flags, unbroken, tmp_path):
    shutil.copytree(unbroken.folder, tmp_path / "run")
    arrays, meta = load(unbroken.folder)
    name = next(name for name in arrays if name.startswith("state/critic/params"))
    arrays[name] = arrays[name][..., :1]
    script.save_checkpoint(tmp_path / "run" / "checkpoint.npz", arrays, meta)
    done = go(script, tmp_path, flags)
    assert done.code == 2
    assert name in done.err


class Payload:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_pickle_in_a_checkpoint_is_refused(script, tmp_path):
    path, meta = tmp_path / "checkpoint.npz", np.frombuffer(b"{}", np.uint8)
    np.savez(path, meta=meta, evil=np.array([Payload()], object))
    err = io.StringIO()
    with (contextlib.chdir(tmp_path), contextlib.redirect_stderr(err),
          pytest.raises(SystemExit) as end):  # fmt: skip
        script.load_checkpoint(path)
    assert end.value.code == 2
    assert not (tmp_path / "harm").exists()


def full_disk(*args):
    if hasattr(args[0], "write"):
        args[0].write(b"PK\x03\x04 the first half")
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    "owner, name, number", [(np, "savez", 4), (os, "replace", 6), (os, "replace", 7)]
)
def test_disk_full(owner, name, number, script, flags, unbroken, tmp_path):
    with on_call(owner, name, number, full_disk):  # in the save of online step 120
        done = go(script, tmp_path, flags)
    assert done.code == 4
    assert "No space left" in done.err
    assert not list((tmp_path / "run").glob("*.tmp"))
    with contextlib.redirect_stderr(io.StringIO()):
        _, meta, _ = script.load_checkpoint(tmp_path / "run")
    assert meta["online"] == 60
    assert go(script, tmp_path, flags).logged[0] == ("online", 80)
    assert_same_run(tmp_path / "run", unbroken.folder)


# ----------------------------------------------------------------------------------------- Signals

PHASES = {"offline": ("offline_chunk", 2), "online": ("step_rollout", 50),
          "evaluation": ("evaluation_values", 4)}  # fmt: skip
SAVED_AT = {"offline": (40, 0), "online": (120, 60), "evaluation": (120, 120)}


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("phase", PHASES)
def test_signal_saves_and_exits(phase, number, script, flags, unbroken, tmp_path):
    second = []

    def send(*args):
        os.kill(os.getpid(), number)
        time.sleep(0)  # the handler runs between two bytecodes
        second.extend(map(signal.getsignal, SIGNALS))

    with on_call(script, *PHASES[phase], send):
        done = go(script, tmp_path, flags)
    assert done.code == 128 + number
    assert [line for line in done.err.splitlines() if "--resume run" in line] == [
        f"{number.name}: saved; go on with --resume run"
    ]
    assert second == [signal.SIG_DFL] * 3  # a second signal ends the run at once
    _, meta = load(tmp_path / "run")
    assert (meta["offline"], meta["online"]) == SAVED_AT[phase]
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert (record["ended"], record["resumes"]) == (number.name, 0)
    done = go(script, tmp_path, flags)
    assert done.code == 0
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert (record["ended"], record["resumes"]) == ("finished", 1)
    assert_same_run(tmp_path / "run", unbroken.folder)


class Late(list):
    """Signals received, where one comes just after the script has looked."""

    def __bool__(self):
        before = len(self) > 0
        if not before:
            self.append(signal.SIGTERM)
        return before


def test_signal_between_saving_and_leaving(script, flags, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "catch_signals", Late)
        done = go(script, tmp_path, flags)
    assert done.code == 128 + signal.SIGTERM
    _, meta = load(tmp_path / "run")
    assert meta["offline"] == done.logged[-1][1]  # what it says is saved is saved


# ---------------------------------------------------------------------------------------- Numerics


def test_bad_rewards_offline_stop_the_run(script, flags, tmp_path):
    agent_batch = script.agent_batch

    def poisoned(*args):
        return agent_batch(*args).replace(rewards=np.full(2000, np.nan, np.float32))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "agent_batch", poisoned)
        done = go(script, tmp_path, flags)
    assert done.code == 3
    assert "offline step 20" in done.err and "critic_loss" in done.err
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert "critic_loss" in record["ended"] and record["offline"] == 20
    assert not (tmp_path / "run" / "checkpoint.npz").exists()


def test_bad_rewards_online_keep_the_last_good_checkpoint(script, flags, unbroken, tmp_path):
    step_rollout, count = script.step_rollout, 0

    def poisoned(run):
        nonlocal count
        count += 1
        batch = step_rollout(run)
        return batch.replace(rewards=np.full(1, np.nan, np.float32)) if count > 130 else batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "step_rollout", poisoned)
        done = go(script, tmp_path, flags)
    assert done.code == 3
    assert "critic_loss" in done.err and len(done.err.splitlines()) == 1
    arrays, meta = load(tmp_path / "run")
    assert meta["online"] == 120 + 60 * (done.logged[-1][1] > 180)
    assert [n for n, x in arrays.items() if not np.isfinite(x).all()] == []
    assert go(script, tmp_path, flags).code == 0
    assert_same_run(tmp_path / "run", unbroken.folder)


def test_bad_parameters_behind_finite_metrics_are_not_saved(script, flags, tmp_path):
    """The last update of a chunk can spoil the parameters, and no metric has seen them yet."""
    chunk = script.offline_chunk

    def poisoned(run, num_steps):
        values = chunk(run, num_steps)
        if run.offline == 100:
            actor = run.shards[0].actor
            params = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), actor.params)
            run.shards = [run.shards[0].replace(actor=actor.replace(params=params))]
        return values

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "offline_chunk", poisoned)
        done = go(script, tmp_path, flags)
    assert done.code == 3
    arrays, meta = load(tmp_path / "run")
    assert meta["offline"] == 60
    assert [n for n, x in arrays.items() if not np.isfinite(x).all()] == []


# ------------------------------------------------------------------------------------- Determinism


def test_every_program_compiles_once(unbroken):
    assert unbroken.compiled == [1, 1, 1]  # update_steps, online_step, insert_transitions


def test_evaluation_does_not_change_training(script, flags, unbroken, tmp_path):
    done = go(script, tmp_path, [*flags, "--eval-interval", "120", "--eval-episodes", "3"])
    assert done.code == 0, done.err
    assert differing(load(tmp_path / "run")[0], load(unbroken.folder)[0]) == []
    evaluation = {"return", "length", "score"}
    rows = [[{k: v for k, v in row.items() if k not in evaluation} for row in table(folder)]
            for folder in (tmp_path / "run", unbroken.folder)]  # fmt: skip
    assert rows[0] == rows[1]


def test_eval_only_reprints_the_last_score(script, unbroken, tmp_path):
    done = go(script, tmp_path, ["--eval-only", str(unbroken.folder)])
    assert done.code == 0, done.err
    last = table(unbroken.folder)[-1]
    wanted = f"return {float(last['return']):.1f}, length {float(last['length']):.1f}, score nan"
    assert f"seed 0: {wanted}" in done.out.splitlines()


def test_init_from_starts_online_with_that_agent(script, flags, unbroken, tmp_path):
    rows = pendulum_rows(300, seed=1)  # other data: its own normaliser would be another one
    np.savez(tmp_path / "other.npz", **rows)
    seen = []

    def look(run, phase, chunk, num_steps, received):
        seen.append((phase, script.named_arrays(script.to_host(run.shards), "state"), run))
        raise Killed

    options = ["--dataset", str(tmp_path / "other.npz"), "--init-from", str(unbroken.folder)]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(script, "start_online", lambda run: None)
        patch.setattr(script, "train", look)
        go(script, tmp_path, [*flags, *options])
    (phase, state, run), (saved, _) = seen[0], load(unbroken.folder)
    assert phase == "online"
    state_names = {name for name in saved if name.startswith("state/")}
    assert differing(state, {name: saved[name] for name in state_names}) == ["state/key"]
    mean, std = (saved[f"transform/observation_{name}"] for name in ("mean", "std"))
    assert not np.allclose(mean, rows["observations"].mean(axis=0), atol=1e-3)
    np.testing.assert_allclose(run.transform.observation_mean, mean, rtol=0)
    wanted = (rows["observations"] - mean) / std
    np.testing.assert_allclose(run.datasets[0].observations, wanted, atol=1e-5)
    np.testing.assert_allclose(
        run.datasets[0].rewards, rows["rewards"] * saved["transform/reward_scale"], rtol=1e-5
    )


def test_init_from_goes_on_with_that_agents_data(script, flags, unbroken, pendulum, tmp_path):
    options = [*flags[4:-2], "--init-from", str(unbroken.folder)]  # neither --dataset nor --env-id
    config, path, spec = script.parse_config(options)
    assert (config.dataset, path) == (str(pendulum), pendulum)
    assert json.loads(spec)["id"] == "Pendulum-v1"
    other = tmp_path / "other.npz"
    other.touch()
    given = ["--dataset", str(other), "--env-id", "MountainCarContinuous-v0"]
    config, path, spec = script.parse_config([*options, *given])
    assert (config.dataset, path) == (str(other), other)
    assert json.loads(spec)["id"] == "MountainCarContinuous-v0"
    with pytest.raises(SystemExit) as refused:  # another flat file says nothing of its environment
        script.parse_config([*options, *given[:2]])
    assert refused.value.code == 2


PAIR = """
import os, sys
sys.path.insert(0, sys.argv[1])
import jax
from conftest import load_script
from test_run import Killed, die, on_call, reused_agents

jax.config.update("jax_num_cpu_devices", 2)  # as on two cores: a device per seed
flags, two = sys.argv[2:], ["--num-seeds", "2"]
with reused_agents(load_script("algorithms/iql.py")) as iql:
    for name, more in ("pair", two), ("broken", two), ("0", []), ("1", ["--seed", "1"]):
        os.mkdir(name)
        os.chdir(name)
        if name == "broken":
            try:
                with on_call(iql, "step_rollout", 30, die):
                    iql.main([*flags, *more])
            except Killed:
                print("killed")
        iql.main([*flags, *more])
        os.chdir("..")
"""


@pytest.fixture(scope="module")
def seeds(flags, compile_cache, tmp_path_factory):
    """Folder of runs of two seeds: `pair`, the same `broken` and resumed, and the singles."""
    folder = tmp_path_factory.mktemp("seeds")
    few = ["--offline-steps", "40", "--online-steps", "40", "--eval-interval", "20"]
    command = [sys.executable, "-c", PAIR, str(ROOT / "tests"), *flags, *few]
    env = os.environ | {"JAX_PLATFORMS": "cpu"} | compile_cache
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "killed" in done.stdout
    return folder


def test_two_seeds_resume_to_the_same_bits(seeds):
    assert_same_run(seeds / "broken" / "run", seeds / "pair" / "run")
    rows = [(r["phase"], r["step"], r["seed"]) for r in table(seeds / "pair" / "run")]
    assert len(rows) == len(set(rows)) == 8


def test_a_seed_of_many_is_its_single_run(seeds):
    pair, rows = load(seeds / "pair" / "run")[0], table(seeds / "pair" / "run")
    for i in (0, 1):
        single, _ = load(seeds / str(i) / "run")
        mine = {n: x[i : i + 1] for n, x in pair.items() if not n.startswith(("transform", "roll"))}
        assert differing(mine, {name: single[name] for name in mine}) == []
        assert differing({"": pair[f"rollout/played/{i}"]}, {"": single["rollout/played/0"]}) == []
        assert [r for r in rows if r["seed"] == str(i)] == table(seeds / str(i) / "run")


def test_seeds_differ_in_parameters_batches_and_resets(seeds, script, unbroken, flags):
    arrays, meta = load(seeds / "pair" / "run")
    kernels = {n: x for n, x in arrays.items() if "params" in n and n.endswith("kernel")}
    assert kernels and not [n for n, x in kernels.items() if np.array_equal(x[0], x[1])]
    config = script.config_from(json.dumps(meta["config"]))
    agents = [script.create_agent_state(jax.random.PRNGKey(i), 3, 1, config) for i in (0, 1)]
    fresh = [script.named_arrays(agent.actor.params, "") for agent in agents]
    assert not [n for n in fresh[0] if "kernel" in n and np.array_equal(fresh[0][n], fresh[1][n])]
    batches = [script.sample(np.arange(2000), 2000, agent.key, 32) for agent in agents]
    assert (batches[0] != batches[1]).any()
    starts = arrays["buffer/rows/observations"][:, 0]
    assert not np.array_equal(starts[0], starts[1])
    resets = {script.episode_seed(stream, seed, episode)
              for stream in range(3) for seed in range(50) for episode in range(50)}  # fmt: skip
    assert len(resets) == 3 * 50 * 50


# ------------------------------------------------------------------------------------------- wandb


def raising(*args, **kwargs):
    raise ConnectionError("unreachable")


@pytest.mark.parametrize("fault", ["init", "log"])
def test_dead_wandb_costs_one_warning(fault, script, flags, tmp_path, monkeypatch):
    fake = SimpleNamespace(init=lambda **kwargs: SimpleNamespace(log=raising))
    if fault == "init":
        fake.init = raising
    monkeypatch.setitem(sys.modules, "wandb", fake)
    few = ["--offline-steps", "40", "--online-steps", "0"]
    done = go(script, tmp_path, [*flags, *few, "--wandb"])
    assert done.code == 0, done.err
    assert done.err.count("warning") == 1 and "unreachable" in done.err
    assert len(table(tmp_path / "run")) == 2


# --------------------------------------------------------------------------------- Real processes

SIGKILL_IN_SAVE = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from conftest import load_script
iql = load_script("algorithms/iql.py")
savez, calls = iql.np.savez, []

def savez_and_die(file, **arrays):
    calls.append(file)
    if len(calls) == 4:
        file.write(b"PK half")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    savez(file, **arrays)

iql.np.savez = savez_and_die
iql.main(sys.argv[2:])
"""


def test_other_processes_sigkilled_and_resumed_give_the_same_bits(
    flags, unbroken, compile_cache, tmp_path
):
    command = [sys.executable, "-c", SIGKILL_IN_SAVE, str(ROOT / "tests"), *flags]
    env = os.environ | {"JAX_PLATFORMS": "cpu"} | compile_cache
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, timeout=300)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "run" / "checkpoint.tmp").read_bytes() == b"PK half"
    code, _, err = run_script("algorithms/iql.py", *flags, cwd=tmp_path, **compile_cache)
    assert code == 0, err
    assert_same_run(tmp_path / "run", unbroken.folder)
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_sigterm_from_outside(flags, compile_cache, tmp_path):
    env = os.environ | {"JAX_PLATFORMS": "cpu"} | compile_cache
    command = [sys.executable, str(ROOT / "algorithms/iql.py"), *flags, "--online-steps", "1000000"]
    process = subprocess.Popen(command, cwd=tmp_path, env=env, text=True, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE)  # fmt: skip
    metrics, limit = tmp_path / "run" / "metrics.csv", time.time() + 120
    while not (metrics.exists() and "online" in metrics.read_text()) and time.time() < limit:
        time.sleep(0.2)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "SIGTERM: saved; go on with --resume run" in err
    assert load(tmp_path / "run")[1]["online"] == int(table(tmp_path / "run")[-1]["step"])
