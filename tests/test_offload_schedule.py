"""Offloading in step with the layers: where stages begin, which copies run beside which, and that memory is freed."""

import dataclasses
import functools
import importlib.metadata
import itertools
import re
import warnings

import chex
import jax
import jax.numpy as jnp
import pytest
from checks import assert_close, needs, steps_of
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from models import GPT, NNXGPT, ScannedGPT, linen_loss, loss_of

import nexus_jax as nj
from nexus_jax.measure import measurement
from nexus_jax.offloading import hazards, stages
from nexus_jax.program import step_of
from nexus_jax.targets.compiler import compile_all, find_target

pytestmark = pytest.mark.filterwarnings("ignore::nexus_jax.OffloadWarning")
LAYERS = 5
TOKENS = jnp.arange(32).reshape(2, 16) % 64


def block(x, p):
    return x + jnp.tanh(x @ p["up"]) @ p["down"]


def mlp(params, x):
    for p in params:
        x = block(x, p)
    return jnp.sum(jnp.sin(x.astype(jnp.float32)))


def weights(layers=LAYERS, d=8, dtype=jnp.float32):
    shapes = {"up": (d, 4 * d), "down": (4 * d, d)}
    one = lambda i, n: 0.1 * jax.random.normal(jax.random.key(i), shapes[n], dtype)
    return [{n: one(i, n) for n in shapes} for i in range(layers)]


X = jnp.linspace(-1, 1, 64).reshape(8, 8)


def offloader(ahead=1, **kwargs):
    return nj.ActivationOffloader(offload_threshold_mb=0.0, prefetch_ahead=ahead, **kwargs)


def fences(fn, *args):
    """For each conditional of a program, in order: bytes that its branch sends to the host, and back."""
    found = []
    for eqn in steps_of(jax.make_jaxpr(fn)(*args)):
        if eqn.primitive.name != "cond" or not any(isinstance(v, jax.core.Tracer) or v.aval.ndim for v in eqn.outvars):
            continue
        out = back = 0
        for inner in eqn.params["branches"][1].jaxpr.eqns:
            if inner.primitive.name == "device_put":
                for source, target in zip(inner.invars, inner.outvars, strict=True):
                    spaces = (source.aval.memory_space, target.aval.memory_space)
                    out += spaces == (jax.memory.Space.Device, jax.memory.Space.Host) and target.aval.size * 4
                    back += spaces == (jax.memory.Space.Host, jax.memory.Space.Device) and target.aval.size * 4
        found.append((out, back))
    return found


def cuts_of(loss, params):
    forward = jax.make_jaxpr(lambda p: jax.vjp(loss, p))(params).jaxpr
    return stages.layer_cuts(forward, set(forward.invars)), len(forward.eqns)


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_stages_are_the_layers_and_the_head(kind):
    if kind == "linen":
        model = GPT(layers=LAYERS)
        params = model.init(jax.random.key(0), TOKENS)
        cuts, n = cuts_of(lambda p: model.apply(p, TOKENS), params)
    else:
        graph, params = nnx.split(NNXGPT(layers=LAYERS, rngs=nnx.Rngs(0)))
        cuts, n = cuts_of(lambda p: nnx.merge(graph, p)(TOKENS), params)
    assert len(cuts) == LAYERS  # every layer but the first, and the head
    lengths = {b - a for a, b in itertools.pairwise(cuts)}
    assert len(lengths) == 1 and n - cuts[-1] < lengths.pop()


@pytest.mark.parametrize(("layers", "words"), [(2, 4), (2, 4096), (3, 4096)])
def test_of_few_layers_a_head_that_keeps_far_more_than_they_do_stays(layers, words):
    table = jax.random.normal(jax.random.key(9), (8, words))

    def loss(params, x):
        for p in params:
            x = block(x, p)
        return jnp.sum(jax.nn.logsumexp(x @ table, -1))

    params = weights(layers)
    ours = offloader().wrap(loss)
    kept = nj.residuals(ours, params, X)
    host = [r.shape for r in kept if r.place == "host"]
    stays = [r.shape for r in kept if r.place == "device" and r.op != "argument" and r.shape == (8, words)]
    assert len(host) >= layers and ((8, words) in host, len(stays)) == ((True, 0) if words == 4 else (False, 1))
    assert_close(jax.grad(loss)(params, X), jax.grad(ours)(params, X), 1e-5)


def test_layers_that_differ_are_cut_at_their_waists():
    def pyramid(ws, x):
        for i, w in enumerate(ws):
            wide = functools.reduce(lambda h, _: jnp.cos(h) if i % 2 else jnp.tanh(h), range(9 + i), x @ w)
            x = jnp.sum(wide.reshape(8, 4, -1), 1)
        return x

    ws = [jnp.ones((2**k, 2 ** (k + 1))) for k in (6, 5, 4)]
    cuts, n = cuts_of(lambda w: pyramid(w, jnp.ones((8, 64))), ws)
    assert len(cuts) >= 2 and n > cuts[-1]


EACH = 5 * X.nbytes  # what a layer keeps: its input, and tanh, four times as wide; the first one's input is an argument


def test_a_residual_leaves_while_the_next_layer_runs():
    forward = fences(lambda p: jax.vjp(offloader().wrap(mlp), p, X), weights())
    # The last layer keeps its own and its input: they would come back at once.
    assert [o for o, _ in forward] == [0, *[EACH] * (LAYERS - 2), EACH - X.nbytes]
    assert sum(b for _, b in forward) == 0


def test_with_nothing_ahead_a_residual_leaves_while_its_own_layer_runs():
    forward = fences(lambda p: jax.vjp(offloader(0).wrap(mlp), p, X), weights())
    # A layer makes tanh, and the next one's input; what the last one hands on is the head's.
    assert [o for o, _ in forward] == [*[EACH] * (LAYERS - 1), EACH - X.nbytes]


def test_what_is_before_a_scan_is_no_layer():
    def loss(params, x):
        scales = [jnp.broadcast_to(jnp.float32(i), (8,)) for i in range(8)]  # the same equation, again and again
        x, _ = jax.lax.scan(lambda x, p: (block(x, p) * sum(scales), None), x, params)
        return jnp.sum(jnp.sin(x))

    assert any(r.place == "host" for r in nj.residuals(offloader().wrap(loss), stack(weights(6)), X))


def test_layers_with_a_short_scan_in_each_are_layers():
    def layer(x, p):
        x, _ = jax.lax.scan(lambda x, _: (jnp.tanh(x @ p["up"]) @ p["down"], None), x, None, length=2)
        return x

    def loss(params, x):
        return jnp.sum(jnp.sin(functools.reduce(layer, params, x)))

    params = weights(6)
    plain, ours = (jax.jit(jax.grad(f, (0, 1)))(params, X) for f in (loss, offloader().wrap(loss)))
    assert_close(plain, ours, 1e-5)
    assert any(r.place == "host" for r in nj.residuals(offloader().wrap(loss), params, X))


@pytest.mark.parametrize("ahead", [0, 1, 2, 3])
def test_a_residual_comes_back_as_many_layers_ahead_as_asked(ahead):
    loss = offloader(ahead).wrap(mlp)
    _, pull = jax.vjp(loss, weights(), X)
    back = [b for _, b in fences(pull, jnp.ones(()))]
    # The first conditional is the last layer's; what it keeps stays on the device, if there is anything ahead.
    needed = [0 if ahead else EACH, *[EACH] * (LAYERS - 2), EACH - X.nbytes]
    assert back == [sum(needed[: ahead + 1]), *needed[ahead + 1 :], *([0] * ahead)]


@pytest.mark.parametrize("ahead", [0, 1, 3])
@pytest.mark.parametrize("transform", ["jit", "vmap", "vmap weights", "scan", "remat"])
def test_gradients_are_the_plain_ones(ahead, transform):
    def gradient(f):
        match transform:
            case "jit":
                return jax.grad(f, (0, 1))(weights(), X)
            case "vmap":
                return jax.vmap(jax.grad(f, (0, 1)), (None, 0))(weights(), jnp.stack([X, X + 1]))
            case "vmap weights":
                stacked = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), weights())
                return jax.vmap(jax.grad(f, (0, 1)), (0, None))(stacked, X)
            case "scan":
                step = lambda p: lambda carry, x: (carry + f(p, x), None)
                return jax.grad(lambda p: jax.lax.scan(step(p), 0.0, jnp.stack([X, X + 1]))[0])(weights())
            case _:
                return jax.grad(jax.checkpoint(f), (0, 1))(weights(), X)

    plain, ours = (jax.jit(gradient, static_argnums=0)(f) for f in (mlp, offloader(ahead).wrap(mlp)))
    assert_close(plain, ours, 1e-5)


@pytest.mark.parametrize("kind", ["auto", "explicit", "shard_map", "inside shard_map"])
def test_gradients_over_a_mesh(kind):
    explicit = kind == "explicit"
    axis = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis,))
    split = PartitionSpec("data")
    mean = lambda tree: jax.tree.map(lambda a: jax.lax.pmean(a, "data"), tree)

    def step(f):
        mapped = functools.partial(
            jax.shard_map, mesh=mesh, in_specs=(PartitionSpec(), split), out_specs=PartitionSpec()
        )
        match kind:
            case "shard_map":
                return jax.jit(jax.grad(mapped(lambda p, x: mean(f(p, x)))))
            case "inside shard_map":
                return jax.jit(mapped(lambda p, x: mean(jax.grad(f)(p, x))))
            case _:
                return jax.jit(jax.grad(f))

    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, split))
        plain, ours = (step(f)(weights(), x) for f in (mlp, offloader().wrap(mlp)))
    assert_close(plain, ours, 1e-5)


@pytest.mark.parametrize("pin", [True, False])
@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_models_and_memory_kinds(kind, pin):
    wrap = offloader(pin_memory=pin).wrap
    if kind == "linen":
        model = GPT(layers=3)
        params = model.init(jax.random.key(0), TOKENS)
        plain, ours = (jax.jit(jax.grad(linen_loss(m, TOKENS)))(params) for m in (model, wrap(model)))
    else:
        model = NNXGPT(layers=3, rngs=nnx.Rngs(0))
        step = nnx.jit(nnx.grad(lambda m: loss_of(m(TOKENS), TOKENS)))
        plain, ours = (nnx.to_pure_dict(step(m)) for m in (model, wrap(model)))
    assert_close(plain, ours, 1e-5)


def test_integers_keys_and_flags_pass_between_stages():
    def noisy(params, x, key):
        count = jnp.zeros((), jnp.int32)
        for p in params:
            key, sub = jax.random.split(key)
            keep = jax.random.bernoulli(sub, 0.9, x.shape)
            x = x + jnp.where(keep, jnp.tanh(x @ p["up"]) @ p["down"], 0)
            count = count + keep.sum()
        return jnp.sum(jnp.sin(x)), count

    args = weights(), X, jax.random.key(0)
    plain, ours = (jax.jit(jax.value_and_grad(f, has_aux=True))(*args) for f in (noisy, offloader().wrap(noisy)))
    chex.assert_trees_all_close(plain, ours, rtol=1e-5)


def compiled_bytes(found):
    """Device temporaries and host bytes, as set aside: libtpu's own sums count what is fragmented twice."""
    sizes = {"device": 0, "host": 0}
    for line in found.texts("buffer_assignment").splitlines():
        if match := re.match(r"allocation \d+: size (\d+),(.*)preallocated-temp", line):
            sizes["host" if "color 5" in match[2] else "device"] += int(match[1])
    return sizes["device"], sizes["host"]


def compile_once(loss, *args, target):
    """As ``nj.measure``, with the compiler's texts from the same compile."""
    where, program = find_target(target), step_of(loss, args, 0, False)
    [answer] = compile_all([dataclasses.replace(program.job(where, "the step", {}), texts=True)])
    return measurement(program, where, answer)


@pytest.fixture(scope="module", params=["v5e", "h200"])
def compiled(request):
    """Bytes of six layers of 640 MiB of residuals each: nothing moved, and moved with 0 to 3 layers ahead."""
    target = request.param
    needs(target)
    rows, d = 2**17, 512
    params = jax.eval_shape(lambda: weights(6, d, jnp.bfloat16))
    x = jax.ShapeDtypeStruct((rows, d), jnp.bfloat16)
    wrapped = [nj.ActivationOffloader(offload_threshold_mb=1.0, prefetch_ahead=n).wrap(mlp) for n in range(4)]
    full = lambda params, x: functools.reduce(jax.checkpoint(block), params, x)
    head = lambda f: lambda params, x: jnp.sum(jnp.sin(f(params, x).astype(jnp.float32)))
    found = [compile_once(f, params, x, target=target) for f in (mlp, head(full), *wrapped)]
    hlo = [m.texts("hlo") for m in found[2:]]
    return target, 5 * rows * d * 2, [compiled_bytes(m) for m in found], hlo


def test_memory_is_freed_by_the_compilers_with_default_flags(compiled):
    """The same step keeping and offloading everything, none of it recomputed; no device is needed."""
    _, layer, (plain, full, none_ahead, one_ahead, *_), _ = compiled
    assert plain[0] > 5.9 * layer and plain[1] == 0
    assert none_ahead[0] < 1.25 * full[0] and none_ahead[0] < 0.45 * plain[0]
    assert (
        none_ahead[1] >= 5.5 * layer and one_ahead[1] >= 4.5 * layer
    )  # the last one's stays, and the first one's input


def test_each_layer_that_comes_back_earlier_takes_its_bytes(compiled):
    target, layer, (_, _, *ours), _ = compiled
    steps = [b[0] - a[0] for a, b in itertools.pairwise(ours)]
    # On a TPU, what leaves beside the next layer is copied first, and the layout of the memory takes some at one place.
    most = [1.25, 1.6, 1] if target == "v5e" else [1, 1, 1]
    assert all(0.999 * layer <= step <= 1.001 * m * layer for step, m in zip(steps, most, strict=True))


def schedules(hlo):
    """For each computation that fetches, in the order of the schedule: where fetches start and end, and matmuls."""
    found = []
    for computation in re.split(r"\n(?=\S)", hlo):
        events, started = [], set()
        for line in computation.splitlines():
            if fetch := re.match(r"\s*%(\S+) = \((?!\S*S\(5\)).* copy-start\(", line):
                if "S(5)" in line:
                    started.add(fetch[1])
                    events.append("start")
            elif done := re.search(r" copy-done\(%([^),]+)", line):
                events += ["done"] if done[1] in started else []
            elif re.search(r" (fusion|dot|convolution|custom-call)\(", line) and re.search(
                "gemm|convolution|dot", line
            ):
                events.append("matmul")
        found += [events] if "start" in events and "matmul" in events else []
    return found


def test_the_compiled_schedule_computes_a_layer_while_the_next_ones_residuals_come_back(compiled):
    _, _, _, (none_ahead, one_ahead, *_) = compiled
    layers = schedules(one_ahead)
    assert len(layers) == 5
    for events in layers:
        whole = events.count("matmul")
        assert whole >= 4 and events[0] == "start" and events[-1] == "done"
        last = len(events) - 1 - events[::-1].index("start")
        assert "matmul" not in events[:last] and events[last:].count("matmul") == whole
    for events in schedules(none_ahead):  # nothing is there before its own layer: it waits
        assert events[0] == "start" and events.index("done") < len(events) - events[::-1].index("matmul") - 1


# --- scans over layers ---------------------------------------------------------------------------------------------


def scanned(params, x, remat=False, unroll=1):
    step = jax.checkpoint(block) if remat else block
    out, _ = jax.lax.scan(lambda x, p: (step(x, p), None), x, params, unroll=unroll)
    return jnp.sum(jnp.sin(out.astype(jnp.float32)))


def stack(trees):
    return jax.tree.map(lambda *xs: jnp.stack(xs), *trees)


@pytest.mark.parametrize("unroll", [1, 2])
@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("layers", [2, 6])
def test_what_a_step_of_a_scan_keeps_leaves_inside_the_step(layers, remat, unroll):
    loss = functools.partial(scanned, remat=remat, unroll=unroll)
    params = stack(weights(layers))
    ours = jax.jit(jax.grad(offloader().wrap(loss), (0, 1)))
    assert_close(jax.jit(jax.grad(loss, (0, 1)))(params, X), ours(params, X), 1e-5)
    moves = [
        e.params["jaxpr"].jaxpr
        for e in steps_of(jax.make_jaxpr(jax.grad(offloader().wrap(loss)))(params, X))
        if e.primitive.name == "scan"
    ]
    spaces = [
        [v.aval.memory_space for e in b.eqns if e.primitive.name == "device_put" for v in e.outvars] for b in moves
    ]
    n = 1 if remat else 2  # what is carried, and of 1 - tanh(x)**2 and tanh(x) the one
    assert spaces == [[jax.memory.Space.Host] * n, [jax.memory.Space.Device] * n]


@pytest.mark.parametrize("ahead", [0, 2])
def test_a_scanned_model_and_what_is_around_it(ahead):
    model = ScannedGPT(layers=5)
    params = model.init(jax.random.key(0), TOKENS)
    wrapped = offloader(ahead).wrap(model)
    plain, ours = (jax.jit(jax.grad(linen_loss(m, TOKENS)))(params) for m in (model, wrapped))
    assert_close(plain, ours, 1e-5)
    found = nj.residuals(linen_loss(wrapped, TOKENS), params)
    host = [r for r in found if r.place == "host"]
    assert host and all(r.shape[0] == 5 for r in host)


@pytest.mark.parametrize("target", ["v5e", "h200"])
def test_a_scan_takes_less_than_recomputing_everything(target):
    needs(target)
    rows, d = 2**17, 512
    params = jax.eval_shape(lambda: stack(weights(6, d, jnp.bfloat16)))
    x = jax.ShapeDtypeStruct((rows, d), jnp.bfloat16)
    moved = nj.ActivationOffloader(offload_threshold_mb=1.0)
    losses = (
        functools.partial(scanned, remat=True),
        moved.wrap(scanned),
        moved.wrap(functools.partial(scanned, remat=True)),
    )
    found = [compile_once(f, params, x, target=target) for f in losses]
    if target == "h200":
        assert_read_in_reverse(found[1].texts("hlo"))
    full, ours, both = map(compiled_bytes, found)
    assert ours[0] < full[0] and ours[1] >= 6 * 5 * rows * d * 2
    assert both[0] < full[0] - 4 * rows * d * 2 and both[1] >= 6 * rows * d * 2


def assert_read_in_reverse(hlo):
    """The transpose of a scan reads the last step's first; a compiler once did not (nexus_jax.offloading.hazards)."""
    slices = [line for line in hlo.splitlines() if re.search(r"bf16\[1,131072,\d+\].* dynamic-slice\(", line)]
    strides = [
        int(n) for line in slices for n in re.findall(r'"linear":\{"byte_offset":"\d+","byte_stride":"(-?\d+)"', line)
    ]
    assert len(strides) == 2 and all(stride < 0 for stride in strides)


def test_compilers_that_are_known_to_be_wrong_are_named(monkeypatch):
    params = stack(weights(3))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.10.2")
    with pytest.warns(hazards.OffloadHazard, match=r"openxla/xla/pull/46231.*offloader\.verify"):
        jax.make_jaxpr(jax.grad(offloader().wrap(scanned)))(params, X)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.12.0.1")
    with warnings.catch_warnings():
        warnings.simplefilter("error", hazards.OffloadHazard)
        jax.make_jaxpr(jax.grad(offloader().wrap(scanned)))(params, X)
