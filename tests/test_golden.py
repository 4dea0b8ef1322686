"""Every loss, gradient and update against numbers that the authors' own code computed.

tests/golden/ holds inputs and outputs of the official repositories, float64, recorded noise
included; its pages say of which commit and function. Here the scripts get the same parameters,
batches and noise, in float64 and without jit, so that recorded draws can take the place of random
ones. Where a script differs on purpose, the stated difference is what is asserted.

    python tests/test_golden.py    # writes results/golden.json: the largest errors of each file
"""

import functools
import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import distrax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import ROOT, load_script
from flax.training.train_state import TrainState

GOLDEN = Path(__file__).parent / "golden"
CASES = {}  # file, or file-in-script: (script, function, tolerance)
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

# The layers of a network: how our parameter's path begins, and theirs.
MLP = {f"MLP_0/Dense_{i}": f"hidden_{i}" for i in (0, 1)}
MLP |= {f"MLP_0/LayerNorm_{i}": f"hidden_{i}/norm" for i in (0, 1)}
VALUE = MLP | {"kernel": "out/kernel", "bias": "out/bias"}
POLICY = MLP | {"Dense_0": "mean", "Dense_1": "log_std"}
TD3_POLICY = {"layers_0/Dense_0": "hidden_0", "layers_0/Dense_1": "hidden_1", "layers_1": "out"}
MODEL = {"Dense_0": "hidden_0", "Dense_1": "hidden_1", "Dense_2": "both"}
PA_CRITIC = MODEL | {f"LayerNorm_{i}": f"hidden_{i}/norm" for i in (0, 1)} | {"Dense_2": "out"}


# ----------------------------------------------------------------------------------------- Helpers
@functools.lru_cache
def golden(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def case(script, *files, tolerance=1e-12):
    """Registers a function (d, found), which holds the script to the numbers `d` of a file."""

    def register(function):
        CASES.update({file: (script, function, tolerance) for file in files})
        return function

    return register


class Found:
    """The errors of what is compared, and the draws that take the place of random ones."""

    def __init__(self, patch, script):
        self.script, self.errors, self.draws, self.grads = script, [], [], []
        for name in ("normal", "uniform", "choice", "randint", "categorical", "permutation"):
            draw = functools.partial(self.draw, name, getattr(jax.random, name))
            patch.setattr(jax.random, name, draw)
        apply = TrainState.apply_gradients
        spy = lambda state, *, grads: self.grads.append(grads) or apply(state, grads=grads)  # noqa: E731
        patch.setattr(TrainState, "apply_gradients", spy)

    def draw(self, name, original, *arguments, **keywords):
        if not self.draws:  # distrax asks for shapes
            return original(*arguments, **keywords)
        expected, value = self.draws.pop(0)
        assert name == expected, f"{name} is drawn where {expected} was recorded"
        shape = keywords.get("shape", arguments[1] if len(arguments) > 1 else ())
        shape = shape if name in ("normal", "uniform") else np.shape(value)
        return value(*arguments) if callable(value) else jnp.reshape(value, shape)

    def hold(self, kind, ours, theirs):
        """Two trees of the same form. An error is relative to an array's largest entry."""
        ours, theirs = jax.tree.leaves(ours), jax.tree.leaves(theirs)
        assert len(ours) == len(theirs) > 0
        for a, b in zip(ours, theirs, strict=True):
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            assert a.shape == b.shape, (kind, a.shape, b.shape)
            scale = max(np.abs(b).max(), 1e-300)
            self.errors.append((kind, float(np.abs(a - b).max() / scale)))

    def call(self, function, *arguments, draws=(), eager=False):
        """A function of the script with these draws; what Adam is given meanwhile is in `grads`.
        One program, or with `eager` call by call, so that each turn of a loop has its own draws."""
        function = getattr(self.script, function) if isinstance(function, str) else function
        fixed = lambda x: x is None or isinstance(x, (str, int, self.script.Config))  # noqa: E731
        names, values = [name for name, _ in draws], [value for _, value in draws]

        def program(data, values):
            self.draws, self.grads = list(zip(names, values, strict=True)), []
            data = iter(data)
            found = function(*(x if fixed(x) else next(data) for x in arguments))
            assert not self.draws, f"not drawn: {self.draws}"
            return found, self.grads

        data = [x for x in arguments if not fixed(x)]
        if eager:
            with jax.disable_jit():
                found, self.grads = program(data, values)
        else:
            found, self.grads = jax.jit(program, compiler_options=QUICK)(data, values)
        return found

    def loss(self, function, *arguments, **keywords):
        """(loss, metrics) and gradient of one of the script's losses; the parameters come first."""
        function = jax.value_and_grad(getattr(self.script, function), has_aux=True)
        return self.call(function, *arguments, **keywords)


def read(d, prefix, like, layers, members=None):
    """Their parameters (or gradients) at `prefix`, in the form of our tree `like`; of an ensemble
    with the axis of its members in front."""

    def leaf(path, x):
        ours = jax.tree_util.keystr(path, simple=True, separator="/").removeprefix("params/")
        begin = next((b for b in layers if f"{ours}/".startswith(f"{b}/")), "")
        name = f"{layers.get(begin, '')}{ours.removeprefix(begin)}".strip("/")
        prefixes = [prefix] if members is None else [f"{prefix}/{i}" for i in range(members)]
        return np.stack([d[f"{p}/{name}".strip("/")] for p in prefixes]).reshape(x.shape)

    return jax.tree.map(jnp.asarray, jax.tree_util.tree_map_with_path(leaf, like))


def params_of(agent, field):
    return getattr(getattr(agent, field), "params", getattr(agent, field))


def agent_of(script, d, config, networks):
    """The script's agent with their parameters; networks: {field: (theirs, layers, members)}."""
    inputs = jax.random.PRNGKey(0), jnp.zeros((1, 5)), jnp.zeros((1, 2))
    agent = jax.eval_shape(functools.partial(script.create_agent, config=config), *inputs)
    agent = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), agent)
    for field, (name, layers, members) in networks.items():
        params = read(d, f"before/{name}", params_of(agent, field), layers, members)
        agent = with_params(agent, **{field: params})
    return agent


def with_params(agent, **trees):
    """An agent with these parameters and fresh optimisers, in float64."""
    for field, params in trees.items():
        part = getattr(agent, field)
        if isinstance(part, TrainState):
            params = part.replace(params=params, opt_state=part.tx.init(params))
        agent = agent.replace(**{field: params})
    return agent


def batch_of(script, d, k, rows=slice(None)):
    """Their batch k as the script's."""
    names = ("observations", "actions", "rewards", "next_observations", "masks", "mc_returns")
    zeros = np.zeros(len(d[f"batch/{k}/observations"]))
    arrays = {name: jnp.asarray(d.get(f"batch/{k}/{name}", zeros)[rows]) for name in names}
    return script.Batch(**arrays, ends=jnp.asarray(zeros[rows]))


def hold_params(found, d, at, agent, networks):
    """Parameters after updates, and how far they have moved."""
    for field, (name, layers, members) in networks.items():
        ours = params_of(agent, field)
        theirs, before = (read(d, f"{x}/{name}", ours, layers, members) for x in (at, "before"))
        found.hold("parameters", ours, theirs)
        flat = [
            np.concatenate([*map(np.ravel, jax.tree.leaves(x))]) for x in (ours, theirs, before)
        ]
        found.hold("change", flat[0] - flat[2], flat[1] - flat[2])


def replay(d, found, config, networks, moves, infos, draws=lambda k: (), after=(1, 5), **how):
    """Updates from `before` on: gradients of the first one in the order of `moves`, every update's
    metrics {ours: theirs, one per update}, and parameters after some."""
    agent = agent_of(found.script, d, config, networks)
    for k in range(after[-1]):
        inputs = agent, batch_of(found.script, d, k), config
        agent, info = found.call("update", *inputs, draws=draws(k), **how)
        assert len(found.grads) >= len(moves)
        for field, grads in zip(moves * (k == 0), found.grads, strict=False):
            name, *layers = networks[field]
            found.hold("gradients", grads, read(d, f"grad/{name}", grads, *layers))
        for ours, theirs in infos.items():
            found.hold("shares" if "below" in ours else "losses", info[ours], theirs[k])
        if k + 1 in after:
            hold_params(found, d, f"after{k + 1}", agent, networks)


def run(name, patch):
    """The errors [(kind, error), ...] of a file."""
    script, function, _ = CASES[name]
    with jax.enable_x64(True):
        found = Found(patch, load_script(script))
        function(golden(name.split("-in-")[0]), found)
    return found.errors


@pytest.mark.parametrize("name", CASES)
def test_equals_the_authors_code(name, monkeypatch):
    errors, tolerance = run(name, monkeypatch), CASES[name][2]
    # a change is a difference of nearly equal numbers; a mean of booleans is float32 in JAX
    allowed = {"change": max(1e-10, tolerance), "shares": 1e-7}
    bad = [(kind, error) for kind, error in errors if not error <= allowed.get(kind, tolerance)]
    assert errors and not bad, bad


def test_every_file_is_held_or_waits_for_its_system():
    files = {path.stem for path in GOLDEN.glob("*.npz")}
    waiting = "apl_gcql"
    assert files == {name for name in CASES if "-in-" not in name} | {
        name for name in files if re.match(waiting, name)
    }


# -------------------------------------------------------------------------------------- IQL and BC
def networks_of(policy=POLICY, critics=2, **others):
    names = {"critic": "critic", "target_critic_params": "target_critic"}
    return {"actor": ("actor", policy, None)} | others | {
        field: (name, VALUE, critics) for field, name in names.items()
    }  # fmt: skip


@case("algorithms/iql.py", "iql_mujoco")
def iql(d, found):
    config = found.script.Config(hidden_dims=(8, 8), offline_steps=10, online_steps=0)
    infos = {f"{x}_loss": d[f"loss/{x}"] for x in ("value", "actor", "critic")}
    infos |= {"v": d["metric/v"], "q": (d["metric/q1"] + d["metric/q2"]) / 2}
    infos |= {"advantage": d["metric/advantage"].mean(axis=1)}
    networks = networks_of(value=("value", VALUE, None))
    replay(d, found, config, networks, ("value", "actor", "critic"), infos)


@case("baselines/bc.py", "bc")
def bc(d, found):
    networks = {"actor": ("actor", POLICY, None)}
    infos = {"actor_loss": d["loss/actor"]}
    replay(d, found, found.script.Config(hidden_dims=(8, 8)), networks, ("actor",), infos)


# ------------------------------------------------------------------------------ SAC, RLPD and WSRL
SAC = dict(hidden_dims=(8, 8), learning_rate=3e-3, tau=0.1, discount=0.97, entropy_per_action=-0.75)
TEMPERATURE = ("temperature", {"log_temperature": "raw"}, None)


def sac_family(d, found, config, critics, draws, trace):
    """Losses and gradients of the first update, all at the parameters before it; three updates."""
    networks = networks_of(critics=critics, temperature=TEMPERATURE)
    agent, script = agent_of(found.script, d, config, networks), found.script
    first, last = batch_of(script, d, 0, slice(6)), batch_of(script, d, 0, slice(-6, None))
    noise = draws(0)
    inputs = {"critic": (first, noise[: len(noise) - 1]), "actor": (last, noise[-1:])}
    inputs["critic"] = first, noise[: 1 + (critics > 2)]
    for field, (batch, drawn) in inputs.items():
        params, rest = params_of(agent, field), (agent, batch, jax.random.PRNGKey(0), config)
        (loss, info), grads = found.loss(f"{field}_loss", params, *rest, draws=drawn)
        found.hold("losses", loss, d[f"loss/{field}"])
        found.hold("gradients", grads, read(d, f"grad/{field}", grads, *networks[field][1:]))
    found.hold("losses", info["entropy"], d["value/entropy"])
    rest = agent, info["entropy"], 2, config
    (loss, _), grads = found.loss("temperature_loss", agent.temperature.params, *rest)
    found.hold("losses", loss, d["loss/temperature"])
    found.hold("gradients", grads, [d["grad/temperature/raw"]])
    infos = {name: d[f"trace/{name}"] for name in ("actor_loss", "temperature_loss", "entropy")}
    replay(d, found, config, networks, (), infos | trace, draws, after=(1, 3), eager=critics > 2)
    return agent, last


@case("baselines/sac.py", "sac")
def sac(d, found):
    draws = lambda k: [("normal", d[f"noise/{x}"][k]) for x in ("next_action", "action")]  # noqa: E731
    trace = {"critic_loss": d["trace/critic_loss"]}
    sac_family(d, found, found.script.Config(**SAC), 2, draws, trace)


@case("baselines/rlpd.py", "rlpd")
def rlpd(d, found):
    config = found.script.Config(**SAC, num_critics=3, batch_size=6, utd_ratio=2)
    noise, pairs = d["noise/next_action"], d["noise/subset"].astype(int)

    def draws(k):
        critic = [[("normal", noise[k, u]), ("choice", pairs[k, u])] for u in (0, 1)]
        return [*critic[0], *critic[1], ("normal", d["noise/action"][k])]

    trace = {"critic_loss": d["trace/critic_loss"].mean(axis=1)}
    agent, last = sac_family(d, found, config, 3, draws, trace)
    found.hold("values", found.script.act(agent, last.observations, config), d["value/mode_action"])


def given_to_all(d):
    """One output layer for all critics, as every member's own."""
    shared = [name for name in d if "/shared/" in name]
    return d | {name.replace("shared", str(i)): d[name] for name in shared for i in range(3)}


@case("algorithms/sac_finetune.py", "wsrl_separate_heads", "wsrl")
def wsrl(d, found):
    """Losses and gradients. Stated: our critic loss is the sum over critics, theirs the mean; our
    temperature is exp, theirs softplus, of what is learnt; our heads are separate, and the gradient
    of a shared one is the sum of theirs; our log-std has a learnt scale and shift."""
    sizes = dict(hidden_dims=(8, 8), critic_hidden_dims=(8, 8), num_critics=3, layer_norm=True)
    config = found.script.Config(**sizes, discount=0.97, mode="wsrl")
    own = {"log_std_scale": np.ones(()), "log_std_shift": np.zeros(())}
    full = given_to_all(d) | {f"{at}/actor/{x}": own[x] for at in ("before", "grad") for x in own}
    agent = agent_of(found.script, full, config, networks_of(critics=3))
    temperature = {"log": jnp.log(jax.nn.softplus(d["before/temperature/raw"]))}
    agent = with_params(agent, temperature=temperature)
    first, whole = batch_of(found.script, d, 0, slice(6)), batch_of(found.script, d, 0)

    draws = [("normal", d["noise/next_action"][0, 0][None])]
    draws += [("choice", d["noise/subset"][0, 0].astype(int))]
    inputs = agent.critic.params, agent, first, jax.random.PRNGKey(0), config
    (loss, _), grads = found.loss("online_critic_loss", *inputs, draws=draws)
    found.hold("losses", loss / 3, d["loss/critic"])
    ours = jax.tree.map(lambda x: x / 3, grads)["params"]
    theirs = read(full, "grad/critic", grads, VALUE, 3)["params"]
    if "grad/critic/shared/out/bias" in d:
        for name in ("kernel", "bias"):
            found.hold("gradients", ours.pop(name).sum(axis=0), theirs.pop(name)[0])
    found.hold("gradients", ours, theirs)

    inputs = agent.actor.params, agent, whole, jax.random.PRNGKey(0), config
    (loss, info), grads = found.loss(
        "actor_loss", *inputs, draws=[("normal", d["noise/action"][0])]
    )
    found.hold("losses", loss, d["loss/actor"])
    ours, theirs = grads["params"], read(full, "grad/actor", grads, POLICY)["params"]
    found.hold("gradients", *({x: t[x] for x in t if x not in own} for t in (ours, theirs)))
    inputs = temperature, agent, info["entropy"], 2, config
    found.hold("losses", found.loss("temperature_loss", *inputs)[0][0], d["loss/temperature_in_s"])


# -------------------------------------------------------------------------------- CQL, Cal-QL, TD3
def cql(d, found, **settings):
    """Stated: our temperature's loss is linear in it, theirs in its logarithm, so that our gradient
    is theirs times the temperature. What follows is compared with their form of it."""
    sizes = dict(hidden_dims=(8, 8), critic_hidden_dims=(8, 8), num_actions=3, batch_size=6)
    config = found.script.Config(**sizes, micro_batches=1, **settings)
    moves = ("critic", "actor", "temperature", "multiplier")[: 3 + config.lagrange]
    logs = {name: (f"log_{name}", {"log": ""}, None) for name in moves[2:]}

    def draws(k):
        noise = {x: d[f"noise/{k}/{x}"] for x in ("target", "uniform_actions", "policy")}
        noise |= {x: d[f"noise/{k}/{x}"] for x in ("next_policy", "actor")}
        first = {x: np.moveaxis(y, 1, 0) if y.ndim == 3 else y[None] for x, y in noise.items()}
        drawn = [("normal", first["target"]), ("choice", np.arange(2))]
        drawn += [("uniform", first["uniform_actions"]), ("normal", first["next_policy"])]
        return [*drawn, ("normal", first["policy"]), ("normal", noise["actor"])]

    def in_the_logarithm(params, agent, entropy, action_dim, config):
        loss = params["log"] * (entropy - config.entropy_per_action * action_dim)
        return loss, {"temperature_loss": loss, "temperature": jnp.exp(params["log"])}

    raw = {"log": jnp.asarray(d["before/log_temperature"])}
    agent = agent_of(found.script, d, config, {})
    inputs = agent, -d["detail/log_prob"].mean(), 2, config
    _, grads = found.loss("temperature_loss", raw, *inputs)
    found.hold("gradients", grads["log"] / jnp.exp(raw["log"]), d["grad/log_temperature"])
    found.script.temperature_loss = in_the_logarithm
    infos = {"critic_loss": d["loss/td"].sum(axis=1), "q": d["metric/q"].mean(axis=1)}
    infos |= {"difference": d["loss/difference"].mean(axis=1), "entropy": d["metric/entropy"]}
    infos |= {f"{x}_loss": d[f"loss/{x}"] for x in ("actor", "temperature")}
    infos |= {x: d[f"metric/{x}"] for x in moves[2:]}
    if "calibrat" in found.script.__doc__.lower():
        infos["below_return"] = d["metric/below_return"].mean(axis=(1, 2))
    replay(d, found, config, networks_of(**logs), moves, infos, draws)


CQL = {
    "cql": dict(difference_range=(2.4, 2.66)),
    "cql_lagrange": dict(lagrange=True, backup_actions=3),
    "cal_ql": dict(lagrange=True, backup_actions=3),
    "cal_ql_kitchen": dict(importance_sampling=False, backup_actions=3),
}
for _file in ("cql", "cql_lagrange"):  # its offline update, written out there
    case("algorithms/sac_finetune.py", f"{_file}-in-sac_finetune")(
        functools.partial(cql, **CQL[_file])
    )
for _file, _settings in CQL.items():
    _script = f"algorithms/{'cal_ql' if 'cal' in _file else 'cql'}.py"
    case(_script, _file)(functools.partial(cql, **_settings))


@case("algorithms/cal_ql.py", "monte_carlo_returns", tolerance=1e-7)  # ours are float32
def monte_carlo_returns(d, found):
    for name, how in json.loads(str(d["settings"]))["cases"].items():
        rewards, masks = d[f"batch/{name}/rewards"], d[f"batch/{name}/masks"]
        ends = np.append(1.0 - masks[:-1], 1.0)
        rule = "infinite" if how["infinite_horizon"] else "sparse" if how["sparse"] else "finite"
        failure = how["reward_scale"] * (how["reward_of_failure"] or 0.0) + how["reward_bias"]
        config = found.script.Config(return_rule=rule, failure_reward=failure)
        theirs, weight = d[f"returns/{name}"], 0.99 ** np.arange(len(rewards))
        if name == "sparse_failure_terminated":  # stated: their rule does not look at the end
            theirs = np.cumsum((weight * rewards)[::-1])[::-1] / weight
        ours = found.script.monte_carlo_returns(rewards, masks, ends, config)
        found.hold("values", ours, theirs)


@case("algorithms/td3_c.py", "td3_bc-in-td3_c")
@case("baselines/td3_bc.py", "td3_bc")
def td3_bc(d, found):
    target = {"target_actor_params": ("target_actor", TD3_POLICY, None)}
    networks, config = networks_of(TD3_POLICY, **target), found.script.Config(hidden_dims=(8, 8))
    losses = {"actor_loss": "actor", "imitation": "imitation"}  # each stands for two updates
    infos = {x: np.array([0, 2 * d[f"loss/{y}"][0], 0, 2 * d[f"loss/{y}"][1], 0])
             for x, y in losses.items()} | {"critic_loss": d["loss/critic"]}  # fmt: skip
    draws = lambda k: [("normal", d[f"noise/{k}/target"])]  # noqa: E731
    replay(d, found, config, networks, ("critic",), infos, draws, after=(1, 2, 5), eager=True)
    agent = agent_of(found.script, d, config, networks)
    for k in (0, 1):
        inputs = agent, batch_of(found.script, d, k), config
        agent, _ = found.call("update", *inputs, draws=draws(k), eager=True)
    found.hold("gradients", found.grads[-1], read(d, "grad/actor", found.grads[-1], TD3_POLICY))


# ------------------------------------------------------------------------------------- PPO, Uni-O4
@case("baselines/ppo.py", "gae")
def gae(d, found):
    """V(s) is what stands in the observation."""
    value = SimpleNamespace(params=None, apply_fn=lambda params, x: x)
    for name in ("no_ends", "terminations", "time_limits"):
        for i in range(3):
            keys = "rewards", "masks", "ends", "values", "next_values"
            get = {key: jnp.asarray(d[f"batch/{name}/{key}"][:, i]) for key in keys}
            rollout = SimpleNamespace(observations=get["values"], **get)
            rollout.next_observations = get["next_values"]
            inputs = SimpleNamespace(value=value), rollout, found.script.Config()
            ours, values = found.call("generalised_advantages", *inputs, eager=True)
            found.hold("values", ours, d[f"advantages/{name}"][:, i])
            found.hold("values", ours + values, d[f"returns/{name}"][:, i])


def nested(d, prefix):
    """{layer: {kernel, bias} or an array} of what begins with `prefix`."""
    tree = {}
    for name in (name for name in d if name.startswith(f"{prefix}/")):
        layer, _, part = name.removeprefix(f"{prefix}/").partition("/")
        tree[layer] = tree.get(layer, {}) | {part: jnp.asarray(d[name])} if part else d[name]
    return jax.tree.map(jnp.asarray, tree)


@case("baselines/ppo.py", "ppo_losses")
def ppo(d, found):
    """CleanRL's networks, our losses. Stated: our value loss is the mean square, theirs a quarter
    of it in the total; each network has an optimiser of its own."""
    dense = lambda p, x: x @ p["kernel"] + p["bias"]  # noqa: E731
    hidden = lambda p, x: jnp.tanh(dense(p["hidden_1"], jnp.tanh(dense(p["hidden_0"], x))))  # noqa: E731

    def policy(p, x):
        mean = dense(p["mean"], hidden(p, x))
        return distrax.MultivariateNormalDiag(mean, jnp.exp(p["log_std"]) + 0 * mean)

    networks = {"actor": policy, "value": lambda p, x: dense(p["out"], hidden(p, x))[:, 0]}
    agent = SimpleNamespace(**{x: SimpleNamespace(apply_fn=f) for x, f in networks.items()})
    for variant, kind in (("normalised_clipped", "_normalised"), ("raw_unclipped", "")):
        names = ("observations", "actions", "log_probs", f"advantages{kind}", "values", "returns")
        samples = found.script.Sample(*(jnp.asarray(d[f"batch/0/{name}"]) for name in names))
        config = found.script.Config(entropy_weight=0.01, value_clip=0.2 * bool(kind))
        metric = {x.split("/")[2]: d[x] for x in d if x.startswith(f"metric/{variant}/")}
        inputs = agent, samples, None, config
        actor, value = (nested(d, f"before/{x}") for x in networks)
        (loss, info), grads = found.loss("actor_loss", actor, *inputs, eager=True)
        total = d[f"loss/{variant}/policy"] - 0.01 * metric["entropy"]
        found.hold("losses", loss, total)
        found.hold("losses", info["entropy"], metric["entropy"])
        found.hold("losses", info["kl"], metric["approx_kl"])
        found.hold("shares", info["ratio_clipped"], metric["clip_fraction"])
        found.hold("gradients", grads, nested(d, f"grad/{variant}/actor"))
        (loss, _), grads = found.loss("value_loss", value, *inputs, eager=True)
        found.hold("losses", loss / 2, d[f"loss/{variant}/value"])
        quarter = jax.tree.map(lambda x: x / 4, grads)
        found.hold("gradients", quarter, nested(d, f"grad/{variant}/value"))


def uni_o4_config(script, **changes):
    sizes = dict(hidden_dims=(8, 8), critic_hidden_dims=(8, 8), value_hidden_dims=(8, 8))
    sizes |= dict(model_hidden_dims=(8, 8), num_models=3, num_elites=2, num_members=3)
    return script.Config(**sizes | changes)


@case("algorithms/uni_o4.py", "uni_o4_cloning")
def uni_o4_cloning(d, found):
    networks, config = {"references": ("actor", POLICY, 3)}, uni_o4_config(found.script)
    agent = agent_of(found.script, d, config, networks)
    inputs = agent.references.params, agent, batch_of(found.script, d, 0), None, config
    (loss, info), grads = found.loss("cloning_loss", *inputs)
    found.hold("losses", loss, d["loss/cloning"].sum())
    found.hold("losses", info["cloning_loss"], d["loss/negative_log_likelihood"].mean())
    found.hold("gradients", grads, read(d, "grad/actor", grads, POLICY, 3))
    for k in range(5):
        agent, _ = found.call("clone", agent, batch_of(found.script, d, k), config)
        if k in (0, 4):
            hold_params(found, d, f"after{k + 1}", agent, networks)


@case("algorithms/uni_o4.py", "uni_o4_improvement", tolerance=1e-11)  # see the change below
def uni_o4_improvement(d, found):
    """Stated: Q sees clipped actions, the deviation is with n. Given the authors' advantages, the
    loss is theirs."""
    script = found.script
    config = uni_o4_config(script, num_members=1, improvement_clip_ratio=0.25)
    plain = uni_o4_config(script, clip_ratio=0.25, entropy_weight=0.0)
    networks = networks_of(value=("value", VALUE, None), members=("actor", POLICY, 1))
    networks |= {"references": ("old_actor", POLICY, 1), "offline_value": networks.pop("value")}
    del networks["actor"], networks["target_critic_params"]
    for i in range(3):
        own = {re.sub(f"actor/{i}/", "actor/0/", name): x for name, x in d.items()
               if f"actor/{i}/" in name or "actor/" not in name}  # fmt: skip
        agent = agent_of(script, own, config, networks)
        zeros = jax.vmap(agent.members.tx.init)(agent.members.params)
        agent = agent.replace(members=agent.members.replace(opt_state=zeros))
        batch = batch_of(script, {"batch/0/observations": d["batch/0/observations"]}, 0)
        member, old = (jax.tree.map(lambda x: x[0], x.params)
                       for x in (agent.members, agent.references))  # fmt: skip
        actions = jnp.asarray(d["batch/0/actions"][i])
        log_prob = agent.actor.apply_fn(old, batch.observations).log_prob(actions)
        for variant in ("authors", "clipped_population"):
            advantages = jnp.asarray(d[f"batch/0/advantages/{variant}"][i])
            sample = script.Sample(batch.observations, actions, log_prob, advantages, 0.0, 0.0)
            (loss, _), grads = found.loss("actor_loss", member, agent, sample, None, plain)
            found.hold("losses", loss, d[f"loss/{variant}"][i])
            found.hold("gradients", grads, read(own, f"grad/{variant}/actor/0", grads, POLICY))
        draws = [("normal", d["noise/actions"][i])]
        agent, info = found.call("improve_members", agent, batch, config, draws=draws, eager=True)
        found.hold("losses", info["actor_loss"], d["loss/clipped_population"][i])
        raw = d["detail/raw_advantage/clipped_population"][i]
        found.hold("losses", info["advantage"], raw.mean())
        ours = agent.members.params  # PyTorch's clip of the norm adds 1e-6 to it, Optax's nothing
        found.hold(
            "parameters", ours, read(own, "after1/clipped_population/actor", ours, POLICY, 1)
        )


def dynamics_of(script, d, config, agent):
    """An agent with their models, bounds and units; and their trees (parameters, gradients)."""
    for name in [name for name in d if "/mean/" in name and "/model/" in name]:
        halves = d[name], d[name.replace("/mean/", "/log_var/")]
        d = d | {name.replace("/mean/", "/both/"): np.concatenate(halves, axis=-1)}

    def tree(at):
        models = read(d, f"{at}/model", agent.best_models, MODEL, config.num_models)
        bounds = {"high": d[f"{at}/max_log_var"], "low": d[f"{at}/min_log_var"]}
        return jax.tree.map(jnp.asarray, {"models": models} | bounds)

    before = tree("before")
    agent = with_params(agent, dynamics=before, best_models=before["models"])
    units = {name: jnp.asarray(d[name]) for name in ("input_mean", "input_std")}
    return agent.replace(**units), tree


@case("algorithms/uni_o4.py", "uni_o4_dynamics")
def uni_o4_dynamics(d, found):
    script, config = found.script, uni_o4_config(found.script, model_batch_size=6)
    agent, tree = dynamics_of(script, d, config, agent_of(script, d, config, {}))
    batch = batch_of(script, d, 0)  # (3, 6, ...)
    inputs = agent, agent.dynamics.params, batch.observations, batch.actions
    mean, log_var = found.call("predict", *inputs)
    found.hold("values", [mean, log_var], [d["prediction/mean"], d["prediction/log_var"]])
    (loss, info), _ = found.loss("dynamics_loss", agent.dynamics.params, agent, batch, None, config)
    found.hold("losses", [loss, info["dynamics_loss"]], [d["loss/total"], d["loss/likelihood"]])
    held, agent = batch_of(script, d, "holdout"), agent.replace(best_errors=jnp.full(3, 1e9))
    judged = found.call("judge_models", agent, held, config)
    found.hold("values", judged.best_errors, d["holdout_errors"])
    assert list(np.argsort(judged.best_errors)[:2]) == list(d["elites"])
    rows = batch.replace(masks=jnp.ones((3, 6)), ends=jnp.ones((3, 6)), mc_returns=jnp.ones((3, 6)))
    rows = jax.tree.map(lambda x: x.reshape(18, *x.shape[2:]), rows)
    agent, _ = found.call("fit_dynamics", agent, rows, config)
    found.hold("gradients", found.grads, [tree("grad")])
    found.hold("parameters", agent.dynamics.params, tree("after1"))


@case("algorithms/uni_o4.py", "uni_o4_amq")
def uni_o4_amq(d, found):
    script, elites = found.script, list(d["elites"])
    networks = {"references": ("actor", POLICY, 3), "critic": ("critic", VALUE, 2)}
    draws = [("randint", np.arange(6))]
    for index, noise in zip(d["noise/model_index"], d["noise/model"], strict=True):
        order = np.concatenate([np.flatnonzero(index == elite) for elite in elites])
        draws += [("permutation", order), ("normal", noise[order].reshape(2, 3, 6))]
    for amq, score in (("paper", "sum"), ("code", "mean")):
        changes = dict(amq=amq, amq_starts=6, horizon=8, termination="hopper")
        config = uni_o4_config(script, **changes)
        agent, _ = dynamics_of(script, d, config, agent_of(script, d, config, networks))
        agent = agent.replace(best_errors=jnp.asarray([elites.index(i) if i in elites else 9.0
                                                       for i in range(3)]))  # fmt: skip
        states, units = jnp.asarray(d["batch/0/observations"]), (1.0, 0.0)
        inputs = agent, agent.references.params, jax.random.PRNGKey(0), states, units, config
        scores = found.call("amq_scores", *inputs, draws=draws, eager=True)
        found.hold("values", scores, d[f"score/{score}"])


# ------------------------------------------------------------------------------------------- PA-RL
def pa_rl_agent(found, d, **changes):
    """An agent whose policy gives recorded samples, and has learnt; heads are the members' own."""
    config = dict(
        critic_hidden_dims=(8, 8), num_critics=3, target_critics=2, base_actions=4, kept_actions=3,
        ascent_steps=4, ascent_rate=0.75, num_actions=3, cql_alpha=0.7, discount=0.97, tau=0.1,
        learning_rate=3e-3, batch_size=6, policy="gaussian", cloning_learning_rate=0.0,
        policy_learning_rate=0.0,
    )  # fmt: skip
    if bins := json.loads(str(d["settings"])).get("histogram"):
        config |= dict(value_bins=bins["bins"], value_range=(bins["min"], bins["max"]))
    config = found.script.Config(**config | changes)
    networks = {"critic": ("critic", PA_CRITIC, 3)}
    if any(name.startswith("before/target_critic") for name in d):
        networks["target_critic_params"] = ("target_critic", PA_CRITIC, 3)
    agent = agent_of(found.script, given_to_all(d), config, networks)
    policy = type("Policy", (), {"sample": lambda *_: found.draw("sample", None)})()
    agent = agent.replace(policy=policy, critic=agent.critic.replace(step=1))
    return agent, config, networks


def samples(x):
    """Their samples (B, M, A) as a policy of ours gives them, (M * B, A)."""
    return "sample", np.moveaxis(x, 1, 0).reshape(-1, 2)


@case("algorithms/pa_rl.py", "pa_rl_optimise_scalar", "pa_rl_optimise_hl_gauss")
def pa_rl_optimise(d, found):
    agent, config, _ = pa_rl_agent(found, d)
    batch, keys = batch_of(found.script, d, 0), jax.random.split(jax.random.PRNGKey(0))
    for variant, data in (("without_data_action", None), ("with_data_action", batch.actions)):
        seen = []

        def each(key, logits, seen=seen):
            seen.append(logits)
            return jnp.tile(jnp.arange(3)[:, None], (1, 6))

        inputs = agent, batch.observations, keys, config
        drawn = [samples(d["batch/0/base_actions"])]
        more = "softmax", 3, data
        draws = [*drawn, ("categorical", each)]
        actions, _ = found.call("optimise", *inputs, *more, draws=draws, eager=True)
        order = [2, 1, 0] if data is None else [1, 0, 2]  # theirs: best last, then the data's
        theirs = {x: np.moveaxis(d[f"{variant}/{x}"], 1, 0)[order]
                  for x in ("optimised_actions", "mean_q", "softmax_probabilities")}  # fmt: skip
        ours = actions, seen[0], jax.nn.softmax(seen[0], axis=0)
        found.hold("values", ours, tuple(theirs.values()))
        best, _ = found.call("optimise", *inputs, "argmax", 1, data, draws=drawn)
        found.hold("values", best[0], d[f"{variant}/argmax_action"])


PA_RL_CRITICS = [f"pa_rl_critic_{kind}{heads}" for kind in ("scalar", "hl_gauss")
                 for heads in ("_separate_heads", "")]  # fmt: skip


@case("algorithms/pa_rl.py", *PA_RL_CRITICS)
def pa_rl_critic(d, found):
    """Stated: our critics have heads of their own. The gradient of one for all, as theirs, is the
    sum over ours; how it moves then is not compared."""
    full, shared = given_to_all(d), any("/shared/" in name for name in d)
    for selection in ("argmax", "softmax"):
        agent, config, networks = pa_rl_agent(found, d, target_selection=selection)
        for k in range(3 if selection == "argmax" and not shared else 1):
            draws = []
            for name, which in (("base_actions", "own"), ("next_base_actions", "next")):
                draws.append(samples(d[f"batch/{k}/{name}"]))
                if selection == "softmax":  # theirs: the best last
                    draws.append(
                        ("categorical", 2 - d[f"noise/softmax_choice/{which}"].astype(int))
                    )
            pairs = (d[f"noise/{x}_members"][k].astype(int) for x in ("target", "difference"))
            target, pair = (("randint", x) for x in pairs)
            uniform = "uniform", np.moveaxis(d["noise/uniform_actions"][k], 1, 0)
            inputs = agent, batch_of(found.script, d, k), config
            draws += [target, uniform, pair]
            agent, info = found.call("update", *inputs, draws=draws, eager=True)
            losses = {x: info[y] for x, y in (("td", "critic_loss"), ("difference", "difference"))}
            if selection == "argmax":
                found.hold("losses", losses, {x: d[f"trace/{x}"][k] for x in losses})
            if k == 0:
                found.hold("losses", losses, {x: d[f"{selection}/loss/{x}"] for x in losses})
                found.hold("losses", info["q"], d["value/q"].mean())
                found.hold("shares", info["below_return"], d[f"{selection}/value/below_return"])
                ours = found.grads[0]["params"]
                theirs = read(full, f"{selection}/grad/critic", ours, PA_CRITIC, 3)
                if shared:
                    total = jax.tree.map(lambda x: x.sum(axis=0), ours.pop("Dense_2"))
                    one = jax.tree.map(lambda x: x[0], theirs.pop("Dense_2"))
                    found.hold("gradients", total, one)
                found.hold("gradients", ours, theirs)
            if selection == "argmax" and not shared and k in (0, 2):
                hold_params(found, full, f"after{k + 1}", agent, networks)


POLICY_OF_8 = dict(policy_blocks=2, policy_width=8, dropout_rate=0.0, policy_tau=0.1,
                   cloning_learning_rate=1.0, policy_learning_rate=1.0)  # fmt: skip
DIFFUSION = {"frequencies": "time/frequencies", "Dense_1": "time/hidden_0", "Dense_0": "time/out",
             "Dense_2": "in", "Dense_7": "out"} | {
    ours.format(i, 3 + 2 * i, 4 + 2 * i): f"block_{i}/{theirs}" for i in (0, 1) for ours, theirs in
    (("LayerNorm_{0}", "norm"), ("Dense_{1}", "hidden_0"), ("Dense_{2}", "out"))}  # fmt: skip
COSINES = np.r_[0:4, 64:68]  # where their time features are among ours, which are 0 elsewhere
PLACES = {
    "frequencies": (np.r_[0:4],), "Dense_1/kernel": (COSINES, np.r_[0:16]),
    "Dense_1/bias": (np.r_[0:16],), "Dense_0/kernel": (np.r_[0:16], np.r_[0:8]),
    "Dense_0/bias": (np.r_[0:8],), "Dense_2/kernel": (np.r_[0:8, 128:135], np.r_[0:8]),
}  # fmt: skip


@case("algorithms/pa_rl.py", "pa_rl_diffusion")
def pa_rl_diffusion(d, found):
    config = found.script.Config(policy="diffusion", **POLICY_OF_8)
    agent = agent_of(found.script, d, config, {})

    def at(path):
        name = jax.tree_util.keystr(path, simple=True, separator="/").removeprefix("params/")
        return np.ix_(*PLACES[name]) if name in PLACES else ...

    small = functools.partial(jax.tree_util.tree_map_with_path, lambda path, x: x[at(path)])
    put = lambda path, x, y: jnp.zeros(x.shape).at[at(path)].set(y)  # noqa: E731
    for field, name in (("actor", "actor"), ("target_actor_params", "target_actor")):
        like = agent.actor.params
        theirs = read(d, f"before/{name}", small(like), DIFFUSION)
        params = jax.tree_util.tree_map_with_path(put, like, theirs)
        agent = with_params(agent, **{field: params})
    batch = batch_of(found.script, d, 0)
    draws = [("randint", d["noise/step"][0].astype(int)), ("normal", d["noise/action"][0])]
    inputs = agent.actor.params, agent, batch, jax.random.PRNGKey(0), config
    (loss, _), grads = found.loss("actor_loss", *inputs, draws=draws)
    found.hold("losses", loss, d["loss/actor"])
    found.hold("gradients", small(grads), read(d, "grad/actor", small(grads), DIFFUSION))
    schedule = d["value/alpha"], d["value/alpha_product"]
    found.hold("values", agent.policy.schedule(), schedule)
    noise = [d["noise/start"], *d["noise/denoising"][::-1]]
    draws = [("normal", x.reshape(24, 2)) for x in noise]
    rows = jnp.repeat(batch.observations, 4, axis=0)  # (B * 4, O)
    inputs = agent.target_actor_params, rows, jax.random.PRNGKey(0)
    actions = found.call(agent.policy.sample, *inputs, draws=draws, eager=True)
    found.hold("values", actions.reshape(6, 4, 2), d["value/samples"])


TRANSFORMER = {"Dense_1": "observation/hidden_0", "Dense_0": "observation/out", "Dense_6":
               "head/hidden_0", "Dense_7": "head/out", "LayerNorm_4": "norm"} | {
    ours.format(i, 2 * i, 2 * i + 1, 2 * i + 2, 2 * i + 3): f"block_{i}/{theirs}" for i in (0, 1)
    for ours, theirs in (
        ("LayerNorm_{1}", "norm_1"), ("LayerNorm_{2}", "norm_2"), ("Dense_{3}", "hidden_0"),
        ("Dense_{4}", "out"), ("MultiHeadDotProductAttention_{0}/out", "attention_out"),
        ("MultiHeadDotProductAttention_{0}", "."))}  # fmt: skip


@case("algorithms/pa_rl.py", "pa_rl_transformer")
def pa_rl_transformer(d, found):
    config = dict(policy="transformer", attention_heads=2, action_bins=9, **POLICY_OF_8)
    config = found.script.Config(**config)
    full = {re.sub("(query|key|value)/", r"./\1/", name): x for name, x in d.items()}
    for at in ("before/actor", "grad/actor"):  # the last place predicts nothing
        tokens = np.stack([d[f"{at}/tokens/{i}"] for i in (0, 1)])
        full |= {f"{at}/positions": d[f"{at}/positions"][:2], f"{at}/tokens": tokens}
    agent = agent_of(found.script, full, config, {"actor": ("actor", TRANSFORMER, None)})
    batch = batch_of(found.script, d, 0)
    inputs = agent.actor.params, agent, batch, jax.random.PRNGKey(0), config
    (loss, _), grads = found.loss("actor_loss", *inputs)
    found.hold("losses", loss, d["loss/actor"])
    theirs = read(full, "grad/actor", grads, TRANSFORMER)
    for tree in (grads, theirs):  # a key's bias moves no attention: rounding alone
        for i in (0, 1):
            del tree["params"][f"MultiHeadDotProductAttention_{i}"]["key"]["bias"]
    found.hold("gradients", grads, theirs)
    logits = agent.policy.apply(agent.actor.params, batch.observations, batch.actions)
    found.hold("values", logits, d["value/logits"])
    draws = [("categorical", lambda key, logits: logits.argmax(axis=-1))] * 2
    inputs = agent.actor.params, batch.observations, jax.random.PRNGKey(0)
    actions = found.call(agent.policy.sample, *inputs, draws=draws, eager=True)
    found.hold("values", actions, d["value/greedy_actions"])


# ------------------------------------------------------------------------------ REDQ + adaptive BC
@case("algorithms/adaptive_bc.py", "adaptive_bc")
def adaptive_bc(d, found):
    """The first two updates; update 2 has the first step of the policy."""
    sizes = dict(hidden_dims=(8, 8), num_critics=4, discount=0.97, tau=0.1)
    target = {"target_actor_params": ("target_actor", TD3_POLICY, None)}
    networks, config = networks_of(TD3_POLICY, critics=4, **target), found.script.Config(**sizes)
    networks["weight"] = "weight", {"": ""}, None  # the rule does not move it here
    d = d | {f"{at}/weight": np.float64(0.37) for at in ("before", "after1", "after2", "after4")}
    losses = {"actor_loss": "actor", "imitation": "imitation"}  # each stands for two updates
    infos = {x: np.array([0, 2 * d[f"loss/{y}"][0], 0, 2 * d[f"loss/{y}"][1]])
             for x, y in losses.items()} | {"critic_loss": d["loss/critic"]}  # fmt: skip
    infos["q"] = d["value/critic_prediction"].mean(axis=(1, 2))
    noise, pairs = d["noise/target"], d["noise/permutation"][:, :2]
    draws = lambda k: [("normal", noise[k]), ("choice", pairs[k])]  # noqa: E731
    replay(d, found, config, networks, ("critic",), infos, draws, after=(1, 2, 4), eager=True)
    agent = agent_of(found.script, d, config, networks)
    for k in (0, 1):
        inputs = agent, batch_of(found.script, d, k), config
        agent, _ = found.call("update", *inputs, draws=draws(k), eager=True)
    found.hold("gradients", found.grads[-1], read(d, "grad/actor", found.grads[-1], TD3_POLICY))


@case("algorithms/adaptive_bc.py", "adaptive_bc_weight")
def adaptive_bc_weight(d, found):
    """The whole logs; two cases side by side, whose episodes end at different times."""
    for name, case in json.loads(str(d["settings"]))["cases"].items():
        references = case["random_score"], case["expert_score"]
        rule = dict(kp=case["Kp"], kd=case["Kd"], target_score=case["target"])
        rule |= dict(reference_returns=references, bc_weight=case["weight_maximum"])
        config = found.script.Config(hidden_dims=(8, 8), **rule)
        agents = agent_of(found.script, d, config, {})
        start = d[f"{name}/weight_before"], d[f"{name}/average_before"]
        both = [jnp.stack([x, x]) for x in start]  # the second one's episode goes on
        agents, log = agents.replace(weight=both[0], average_score=both[1]), []
        for x, length in zip(d[f"{name}/returns"], d[f"{name}/lengths"], strict=True):
            episodes = {"r": np.array([x, 0.0]), "l": np.array([length, 0])}
            ends = np.array([False, False]), np.array([True, False])
            agents = found.script.weight_rule(agents, *ends, episodes, config)
            log.append((agents.weight[0], agents.average_score[0]))
        theirs = np.stack([d[f"{name}/weight_after"], d[f"{name}/average_after"]], axis=1)
        found.hold("values", np.array(log), theirs)
        found.hold("values", (agents.weight[1], agents.average_score[1]), start)


# --------------------------------------------------------------------------------------------- APL
@case("algorithms/apl.py", "apl_td3_bc")
def apl_td3_bc(d, found):
    """Eight updates, each one's mode by the script's own rule from their coin and buffer size."""
    target = {"target_actor_params": ("target_actor", TD3_POLICY, None)}
    networks = networks_of(TD3_POLICY, **target)
    sizes = dict(hidden_dims=(8, 8), batch_size=6, utd_ratio=1, tau=0.1, discount=0.97)
    config, script = found.script.Config(**sizes), found.script
    agent, buffer = agent_of(script, d, config, networks), batch_of(script, d, 0)
    for k in range(8):
        draws = [("uniform", d["noise/buffer_uniform"][k]), ("randint", np.zeros((1, 6), int))]
        inputs = buffer, buffer, int(d["noise/online_size"][k]), jax.random.PRNGKey(0), config
        _, greedy = found.call("online_batch", *inputs, draws=draws, eager=True)
        found.hold("values", greedy[0], d["value/from_online_buffer"][k])
        found.hold("values", 1 - greedy[0], d["value/imitation_weight"][k])
        batches = jax.tree.map(lambda x: x[None], batch_of(script, d, k))
        inputs, draws = (agent, (batches, greedy), config), [("normal", d["noise/target"][k])]
        agent, info = found.call("online_update", *inputs, draws=draws, eager=True)
        found.hold("losses", info["critic_loss"], d["loss/critic"][k])
        if k % 2:  # each stands for two updates
            for ours, theirs in (("actor_loss", "actor"), ("imitation", "imitation")):
                found.hold("losses", info[ours] / 2, d[f"loss/{theirs}"][k // 2])
        mode = "grad_greedy" if k == 3 else "grad"
        for name in {0: ["critic"], 1: ["actor"], 3: ["actor"]}.get(k, []):
            ours = found.grads[0 if name == "critic" else -1]
            theirs = read(d, f"{mode}/{name}", ours, *networks[name][1:])
            found.hold("gradients", ours, theirs)
        if f"after{k + 1}/actor/out/bias" in d:
            hold_params(found, d, f"after{k + 1}", agent, networks)


# --------------------------------------------------------------------------------------------- OOO
RND = {"predictor": ("rnd_predictor", TD3_POLICY, None),
       "random_params": ("rnd_target", TD3_POLICY, None)}  # fmt: skip


def ooo_agent(found, d, networks):
    """The settings, and an agent with their parameters, whose moments are those of no data."""
    sizes = dict(hidden_dims=(8, 8), rnd_dims=(7, 9), rnd_share=0.4, bonus_scale=0.5, expectile=0.8)
    rates = dict(learning_rate=3e-3, rnd_learning_rate=1e-2, discount=0.97, tau=0.1)
    config, count = found.script.Config(**sizes, **rates), jnp.asarray(1e-4)
    return config, agent_of(found.script, d, config, networks).replace(
        observation_moments=(jnp.zeros(5), jnp.ones(5), count),
        bonus_moments=(jnp.zeros(()), jnp.ones(()), count),
        q_range=jnp.array([-0.5, 0.3]),
    )


def hold_moments(d, found, at, k, agent):
    names = ("observation_mean", "observation_variance", "bonus_variance")
    ours = *agent.observation_moments[:2], agent.bonus_moments[1]
    found.hold("values", ours, [d[f"{at}_{name}/{k}"] for name in names])


def bonus_of(found, params, agent, batch):
    errors = found.script.rnd_errors(params, agent, batch)
    return errors.max(axis=1) / jnp.sqrt(agent.bonus_moments[1])


@case("algorithms/ooo.py", "ooo_explore", "ooo_exploit")
def ooo(d, found):
    """Whole updates: exploring, with the bonus of every row; and without, as in retraining."""
    exploring = "loss/rnd" in d
    networks = networks_of(POLICY | {"log_std": "log_std/values"}, value=("value", VALUE, None))
    networks |= RND if exploring else {}
    config, agent = ooo_agent(found, d, networks)
    fields = ["predictor"] * exploring + ["value", "actor", "critic"]
    for k in range(4):
        before, inputs = agent, (agent, batch_of(found.script, d, k), config)
        draws = [("uniform", d["noise/rnd_uniform"][k])] if exploring else []
        agent, info = found.call("explore_update" if exploring else "update", *inputs, draws=draws)
        for field, grads in zip(fields * (k == 0), found.grads, strict=k == 0):
            name, *layers = networks[field]
            found.hold("gradients", grads, read(d, f"grad/{name}", grads, *layers))
        for field in fields:
            name = field.replace("predictor", "rnd")
            found.hold("losses", info[f"{name}_loss"], d[f"loss/{name}"][k])
        found.hold("losses", info["advantage"], d["value/advantage"][k].mean())
        if exploring:  # the new predictor, the old moments
            hold_moments(d, found, "trace/rnd", k + 1, agent)
            bonus = bonus_of(found, agent.predictor.params, before, inputs[1])
            found.hold("values", bonus, d["trace/rnd_bonus"][k])
            found.hold("losses", info["bonus"], d["trace/rnd_bonus"][k].mean())
        if k in (0, 3):
            hold_params(found, d, f"after{k + 1}", agent, networks)
    if exploring:
        found.hold("values", agent.bonus_moments[::2], [d["trace/rnd_bonus_mean/4"], 24.0001])


@case("algorithms/ooo.py", "ooo_rlpd")
def ooo_rlpd(d, found):
    """What IQL shares with RLPD: RND. Stated: there the bonus is that of the predictor before its
    step. The rest of the file is of RLPD's critics, which ooo.py has not."""
    config, agent = ooo_agent(found, d, RND)
    for k in range(3):
        batch, draws = batch_of(found.script, d, k), [("uniform", d["noise/rnd_uniform"][k])]
        bonus, with_rows = bonus_of(found, agent.predictor.params, agent, batch), "with_rows"
        found.hold("values", bonus, d["explore/bonus"][k])
        inputs = agent.predictor.params, agent, batch, jax.random.PRNGKey(0), config
        (loss, _), grads = found.loss("rnd_loss", *inputs, draws=draws)
        found.hold("losses", loss, d["explore/loss/rnd"][k])
        seen = found.call(with_rows, agent.observation_moments, batch.observations)
        paid = found.call(with_rows, agent.bonus_moments, bonus)
        predictor = agent.predictor.apply_gradients(grads=grads)
        agent = agent.replace(predictor=predictor, observation_moments=seen, bonus_moments=paid)
        if k < 2:
            hold_moments(d, found, "explore/rnd", k + 1, agent)
        if k in (0, 2):
            hold_params(found, d, f"explore/after{k + 1}", agent, RND)


# ------------------------------------------------------------------------------------------- BOORL
@case("algorithms/boorl.py", "boorl")
def boorl(d, found):
    """Three members: the losses of three online updates, the first gradients, and the choice of the
    member that acts. Ours go through the minibatches member by member, theirs by turns."""
    sizes = dict(hidden_dims=(8, 8), num_members=3, utd_ratio=2, batch_size=6)
    config = found.script.Config(**sizes, discount=0.97, tau=0.1)
    number = lambda match: f"{match[1]}/{2 * int(match[2]) + int(match[3])}/"  # noqa: E731
    d = d | {re.sub(r"((?:before|after\d)/.*critic)/(\d)/(\d)/", number, name): x
             for name, x in d.items()}  # fmt: skip
    networks = networks_of(critics=6) | {  # (3, 2, ...)
        name: (theirs, TD3_POLICY, 3)
        for name, theirs in (("actor", "actor"), ("target_actor_params", "target_actor"))
    }
    agent, noise = agent_of(found.script, d, config, networks), d["noise/target"]
    for name in ("actor", "critic"):  # an Adam of each member
        state = getattr(agent, name)
        state = state.replace(opt_state=jax.vmap(state.tx.init)(state.params))
        agent = agent.replace(**{name: state})
    for k in range(3):
        pair = batch_of(found.script, d, 2 * k), batch_of(found.script, d, 2 * k + 1)
        batch = jax.tree.map(lambda *xs: jnp.stack(xs), *pair)  # (2, B, ...)
        draws = [("normal", noise[k, u, m]) for m in range(3) for u in range(2)]
        inputs = agent, batch, config
        agent, info = found.call("online_update", *inputs, draws=draws, eager=True)
        ours = info["critic_loss"], info["q"], info["actor_loss"]
        theirs = d["loss/critic"], d["value/critic_prediction"], d["loss/actor"]
        found.hold("losses", ours, [x[k].mean() for x in theirs])
        for m in range(3 * (k == 0)):
            critic, _, actor = found.grads[3 * m : 3 * m + 3]
            found.hold("gradients", critic, read(d, f"grad/critic/{m}", critic, VALUE, 2))
            found.hold("gradients", actor, read(d, f"grad/actor/{m}", actor, TD3_POLICY))
        if k in (0, 2):
            hold_params(found, d, f"after{k + 1}", agent, networks)
    key, seen = jax.random.PRNGKey(0), []
    for scale in (1.0, 0.03, 4.0):
        at = f"choice/scale_{scale}".replace(".", "_")
        config = found.script.Config(**sizes, choice_scale=scale)
        for s, member, *theirs in zip(d["choice/observations"], *(
            d[f"{at}/{x}"] for x in ("chosen_member", "chosen_action", "logits", "probabilities")
        ), strict=True):  # fmt: skip
            choose = lambda key, logits, member=member: seen.append(logits) or member  # noqa: E731
            draws = [("categorical", choose), ("normal", np.zeros(2))]
            action = found.call("explore", agent, s, key, config, draws=draws, eager=True)
            ours = action, seen[-1], jax.nn.softmax(seen[-1])
            found.hold("values", ours, tuple(theirs))
    mean = found.script.act(agent, d["choice/observations"], config)
    found.hold("values", mean, d["choice/evaluation_action"])


# ------------------------------------------------------------------------------ Related systems
@case("algorithms/off2on.py", "off2on", tolerance=1e-9)  # their softplus is linear beyond 20
def off2on(d, found):
    """Stated: our temperature's loss is linear in it, theirs in its logarithm; our log-std has a
    learnt scale and shift: what follows is compared with their forms of both."""

    def in_the_logarithm(params, agent, entropy, action_dim, config):
        loss = params["log"] * (entropy - config.entropy_per_action * action_dim)
        return loss, {"temperature_loss": loss}

    script, plain = found.script, load_script("baselines/sac.py").TanhGaussianPolicy
    script.temperature_loss = in_the_logarithm
    script.ScaledTanhGaussianPolicy = lambda widths, size, _: plain(widths, size)
    config = script.Config(hidden_dims=(8, 8), critic_hidden_dims=(8, 8), num_members=3, tau=0.1,
                           batch_size=6, micro_batches=1, discount=0.97, new_share=0.6)  # fmt: skip
    full = dict(d)  # of the pair of a member one array
    for name in [name for name in d if re.search(r"critic/\d/0/", name)]:
        at, member, layer = re.fullmatch(r"(.*critic)/(\d)/0/(.*)", name).groups()
        pair = [d[f"{at}/{member}/{j}/{layer}"] for j in (0, 1)]
        full[f"{at}/{member}/{layer}"] = np.stack(pair)
    networks = networks_of(critics=3, ratio=("density_ratio", VALUE, None))
    networks |= {
        "actor": ("actor", POLICY, 3),
        "temperature": ("temperature", {"log": "raw"}, None),
    }
    agent = agent_of(script, full, config, networks)
    zeros = lambda size: batch_of(script, {"batch/0/observations": np.zeros((size, 1))}, 0)  # noqa: E731
    old, new, priorities = zeros(20), zeros(12), jnp.asarray(d["replay/priorities_with_online"])
    priorities, largest = priorities.reshape(1, 4, 8), jnp.full(1, 0.75)
    for k in range(3):
        parts = [batch_of(script, full, k)]
        parts += [parts[0].replace(observations=jnp.asarray(full[f"{x}/{k}/observations"]),
                                   actions=jnp.asarray(full[f"{x}/{k}/actions"]))
                  for x in ("batch_offline", "batch_online")]  # fmt: skip
        draws = [("uniform", d["noise/replay_uniform"][k]), ("randint", np.zeros((2, 6), int))]
        inputs = old, (new, priorities[0]), 7, jax.random.PRNGKey(0), config
        _, rows = found.call("online_batch", *inputs, draws=draws)
        found.hold("values", rows, d[f"replay/index/{k}"])
        policy = agent.actor.apply_fn(agent.actor.params, parts[0].observations).distribution
        found.hold("values", policy.mean(), d[f"value/policy_mean/{k}"])
        found.hold("values", policy.stddev(), d[f"value/policy_std/{k}"])
        drawn = jax.tree.map(lambda *xs: jnp.stack(xs), *parts), rows
        draws = [("normal", d["noise/next_action"][k][None]), ("normal", d["noise/action"][k])]
        agent, info = found.call("online_update", agent, drawn, config, draws=draws)
        moves = ("ratio", "critic", "actor", "temperature")
        for field, grads in zip(moves if k == 0 else (), found.grads, strict=k == 0):
            name, *layers = networks[field]
            found.hold("gradients", grads, read(full, f"grad/{name}", grads, *layers))
        both = d["loss/critic_0"][k] + d["loss/critic_1"][k]
        found.hold("losses", info["critic_loss"], both)
        names = {"actor": "policy", "temperature": "temperature", "ratio": "density_ratio"}
        for ours, theirs in names.items():
            found.hold("losses", info[f"{ours}_loss"], d[f"loss/{theirs}"][k])
        found.hold("values", info["priorities"], d[f"replay/new_priority/{k}"])
        inputs = priorities, largest, rows[None], info["priorities"][None]
        priorities, largest = script.prioritize(*inputs)
        found.hold("values", priorities.ravel(), d[f"replay/priorities_after/{k}"])
        found.hold("values", largest[0], d[f"replay/running_maximum_after/{k}"])
        if k in (0, 2):
            hold_params(found, full, f"after{k + 1}", agent, networks)
    for size, share, priority in d["replay/first_online_priority_table"]:
        each, rows = script.Config(new_share=float(share)), zeros(int(size))
        inputs = jax.tree.map(lambda x: x[None], new), rows, each
        found.hold("values", script.first_priorities(*inputs)[1][0], priority)


# -------------------------------------------------------------------------------------------- OPAL
GAUSSIAN = MLP | {"Dense_0": "mean", "Dense_1": "log_std"}
SKILLS = {"encoder": MLP | {f"Gaussian_0/{x}": y for x, y in GAUSSIAN.items()}, "prior": GAUSSIAN}
SKILLS |= {"decoder": GAUSSIAN}


def gates(d, at):
    """With our names of the encoder's GRUs. Gates r and z have one bias, torch's have two: it is
    their sum or, of gradients, which are equal, either."""
    full = dict(d)
    for i in range(4):
        theirs = f"{at}/encoder/gru/{i // 2}/{('forward', 'backward')[i % 2]}"
        names = itertools.product(("input", "recurrent"), ("kernel", "bias"))
        for (way, kind), (k, gate) in itertools.product(names, enumerate("rzn")):
            part = np.split(d[f"{theirs}/{way}_{kind}"], 3, axis=-1)[k]
            if (way, kind) == ("input", "bias") and gate != "n" and not at.endswith("grad"):
                part = part + np.split(d[f"{theirs}/recurrent_bias"], 3)[k]
            cell = f"GRUCell_{i}/{'ih'[way == 'recurrent']}{gate}"
            full[f"{at}/encoder/{cell}/{kind}"] = part
    return full


def skills_of(d, at, params):
    """Their parameters (or gradients) of encoder, prior and decoder, in the form of ours."""
    full = gates(d, at)
    trees = zip(SKILLS.items(), params, strict=True)
    return [read(full, f"{at}/{name}", like, layers) for (name, layers), like in trees]


def adam_of_two_biases(rate):
    """Adam, twice as fast for what are two parameters of theirs."""
    twice = lambda path: re.search("i[rz]'.*bias", jax.tree_util.keystr(path)) is not None  # noqa: E731
    double = lambda path, x: x * (1 + twice(path))  # noqa: E731
    scale = lambda updates, _: jax.tree_util.tree_map_with_path(double, updates)  # noqa: E731
    return optax.chain(optax.adam(rate), optax.stateless(scale))


@case("algorithms/opal.py", "opal")
def opal(d, found):
    """Stated: no bound on gradients, no fine-tuning; and rewards are discounted, here by 1."""
    sizes = dict(hidden_dims=(8, 8), skill_hidden_dims=(8, 8), gru_layers=2, skill_dim=3)
    config = found.script.Config(**sizes, skill_length=4, discount=1.0)
    cell = functools.partial(nn.GRUCell, param_dtype=jnp.float64)  # of its first state, too
    found.script.nn = SimpleNamespace(**vars(nn) | {"GRUCell": cell})
    agent, names = agent_of(found.script, d, config, {}), tuple(SKILLS)
    at = lambda agent: [getattr(agent, name).params for name in names]  # noqa: E731
    tx = adam_of_two_biases(1e-3)
    for name, params in zip(names, skills_of(d, "before", at(agent)), strict=True):
        state = getattr(agent, name).replace(params=params, tx=tx, opt_state=tx.init(params))
        agent = agent.replace(**{name: state})
    for k in range(3):
        windows = batch_of(found.script, d, k)
        if k == 0:
            inputs = agent.encoder.apply_fn, agent.encoder.params, windows.observations
            posterior = found.call(*inputs, windows.actions)
            values = [d[f"value/encoder_{x}"] for x in ("mean", "log_std")]
            found.hold("values", [posterior.mean(), jnp.log(posterior.stddev())], values)
        noise = [("normal", d["noise/latent"][k])]
        agent, info = found.call("update_skills", agent, windows, config, draws=noise)
        total = info["reconstruction"] + config.kl_weight * info["kl"]
        found.hold("losses", [total, *info.values()], [d[f"loss/{x}"][k] for x in ("total", *info)])
        if k == 0:
            found.hold("gradients", found.grads, skills_of(d, "grad", at(agent)))
        if k in (0, 2):
            theirs, before = (skills_of(d, x, at(agent)) for x in (f"after{k + 1}", "before"))
            found.hold("parameters", at(agent), theirs)
    labels = found.call("relabel", agent, batch_of(found.script, d, 1)).actions
    found.hold("values", labels, d["label/latents"])
    data = {x.split("/")[2]: y for x, y in d.items() if x.startswith("windows/data")}
    masks = 1.0 - data["terminals"] * (1 - data.pop("timeouts"))
    rows = found.script.Batch(ends=1.0 * data.pop("terminals"), masks=masks, **data)
    windows = found.script.windows_of(rows, config)
    theirs = {
        x: d[f"windows/labelled/{x}"] for x in ("observations", "rewards", "next_observations")
    }
    ours = windows.replace(observations=windows.observations[:, 0])
    found.hold("values", {x: getattr(ours, x) for x in theirs}, theirs)
    inside = d["windows/start"][:, None] + np.arange(4)  # (W, c)
    found.hold(
        "values", [windows.actions, windows.masks], [data["actions"][inside], masks[inside[:, -1]]]
    )
    found.hold("values", windows.ends, d["windows/labelled/terminals"])
    found.hold("values", 1 - windows.masks, d["windows/labelled/successes"])


# ------------------------------------------------------------------------------------------- Table
def main():
    """Write the largest errors, by kind, of every file: report.py makes a table of them."""
    rows = {}
    for name, (script, *_) in CASES.items():
        with pytest.MonkeyPatch.context() as patch:
            errors = run(name, patch)
        settings = json.loads(str(golden(name.split("-in-")[0])["settings"]))
        settings |= settings.get("no_ends_and_terminations", {})  # GAE's has two sources
        source = {key: settings.get(key) for key in ("repository", "commit", "function")}
        largest = {kind: max(error for k, error in errors if k == kind) for kind, _ in errors}
        rows[name] = {"script": script, **source, "errors": largest}
    (ROOT / "results" / "golden.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
