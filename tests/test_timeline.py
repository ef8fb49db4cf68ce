"""Memory over time: sums that are the compiler's own, names that are the model's, on every target and from broken texts."""

import json
import os
import re
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import needs
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import SingleDeviceSharding
from models import GPT, NNXGPT, ScannedGPT, linen_loss, loss_of

import nexus_jax as nj
from nexus_jax import _compat, timeline
from nexus_jax.targets import worker

SIZE = dict(layers=2, d=256, heads=4, vocab=512, dtype=jnp.bfloat16)
MIB = 2**20


def gpt(policy="none"):
    model = nj.apply_selective_checkpointing(GPT(**SIZE), policy)
    tokens = jax.ShapeDtypeStruct((8, 512), jnp.int32)
    return lambda p, t: linen_loss(model, t)(p), (jax.eval_shape(model.init, jax.random.key(0), tokens), tokens)


def scanned(policy="none"):
    model = nj.apply_selective_checkpointing(ScannedGPT(layers=4, d=64, heads=4, vocab=64), policy)
    tokens = jax.ShapeDtypeStruct((8, 128), jnp.int32)
    return lambda p, t: linen_loss(model, t)(p), (jax.eval_shape(model.init, jax.random.key(0), tokens), tokens)


def compiled(folder, lowered):
    """A lowered program's timeline, and the compiler's own figures: raw JAX, without ``measure``."""
    found = lowered.compile(compiler_options=worker.dump_options(folder / "dump"))
    worker.keep_texts(folder / "dump", folder)
    stats = found.memory_analysis()
    names = ("argument_size", "output_size", "alias_size", "temp_size", "host_temp_size", "peak_memory")
    figures = {name: getattr(stats, f"{name}_in_bytes") for name in names}
    figures["total"] = getattr(stats, "total_allocation_bytes", None)  # jax 0.12 has it
    return {**figures, "texts": {name: (folder / name).read_text() for name in worker.TEXTS.values()}}


STEPS = [("gpt", "none"), ("gpt", "all"), ("scanned", "offload")]


def compile_steps(device, out):
    """Each of the steps for a device, None for the local one; texts and figures into folders of their own."""
    place = None if device is None else SingleDeviceSharding(device)
    for name, policy in STEPS:
        loss, args = globals()[name](policy)
        args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), args)
        folder = out / f"{name}_{policy}"
        folder.mkdir()
        figures = compiled(folder, jax.jit(jax.value_and_grad(loss)).lower(*args))
        (folder / "figures.json").write_text(json.dumps(figures))


BY_HAND = """
import pathlib, sys
sys.path.insert(0, sys.argv[1])
import test_timeline
from nexus_jax import _compat
from nexus_jax.targets.sheets import gpu_target_config, sheet
target = sys.argv[2]
devices = _compat.tpu_devices("v5e:2x2") if target == "v5e" else _compat.gpu_devices(gpu_target_config(sheet(target)))
test_timeline.compile_steps(devices[0], pathlib.Path(sys.argv[3]))
"""


@pytest.fixture(scope="session")
def by_hand(tmp_path_factory):
    """``(timeline, the compiler's figures)`` of a step on a target; each target is compiled for once."""
    folders = {}

    def get(target, name, policy):
        if target != "local":
            needs(target)
        if target not in folders:
            folders[target] = tmp_path_factory.mktemp(target)
            if target == "local":
                compile_steps(None, folders[target])
            else:
                env = {**os.environ, **_compat.TPU_ENVIRONMENT, "JAX_PLATFORMS": "cpu"}
                argv = [sys.executable, "-c", BY_HAND, os.path.dirname(__file__), target, str(folders[target])]
                subprocess.run(argv, env=env, check=True, capture_output=True)
        figures = json.loads((folders[target] / f"{name}_{policy}" / "figures.json").read_text())
        return timeline.parse(**figures["texts"]), figures

    return get


TARGETS = ("local", "v5e", "h200")


# --- sums ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("name", "policy"), STEPS)
def test_it_sums_to_the_compilers_own_total(by_hand, target, name, policy):
    t, figures = by_hand(target, name, policy)
    d = t.device
    if figures["total"] is not None:
        assert t.reserved == figures["total"]
    sums = (d.arguments, d.outputs, d.aliased, t.host.temporaries)
    assert sums == tuple(figures[f] for f in ("argument_size", "output_size", "alias_size", "host_temp_size"))
    if target != "v5e":  # libtpu's temp_size is not what it sets aside: see Timeline
        assert d.temporaries == figures["temp_size"] and t.on_chip == 0
        assert t.device_bytes == sums[0] + sums[1] - sums[2] + figures["temp_size"]
    assert max(p.bytes for p in t.points) == t.peak_bytes <= t.reserved
    assert t.peak_bytes + t.unwritten + t.fragmentation + d.thread_local == t.reserved
    assert t.unwritten >= 0 and t.fragmentation >= 0
    for p in t.points:
        assert sum(b.bytes for b in t.live_at(p.step)) == p.bytes
    assert sum(b.bytes for b in t.at_peak) == t.peak_bytes
    assert [b.bytes for b in t.at_peak] == sorted((b.bytes for b in t.at_peak), reverse=True)


@pytest.mark.parametrize(("name", "policy"), STEPS)
def test_what_is_in_use_is_what_the_compilers_heap_simulation_says(by_hand, name, policy):
    """XLA's own peak on a GPU: arguments, outputs, constants, and the most that is live in the heap."""
    t, figures = by_hand("h200", name, policy)
    outputs = {b.slot[0] for b in t.buffers if b.kind == "output"}
    heap = lambda b: b.kind == "temporary" and b.slot[0] not in outputs
    live = max(sum(b.bytes for b in t.live_at(p.step) if heap(b)) for p in t.points)
    mine = t.device.arguments + t.device.outputs - t.device.aliased + t.device.constants + live
    assert abs(mine - figures["peak_memory"]) <= 1024, "but for a few scalars"


def test_measure_gives_the_same(by_hand, tmp_path, monkeypatch):
    monkeypatch.setenv("NEXUS_JAX_CACHE", str(tmp_path))
    loss, args = gpt("all")
    m = nj.measure(loss, *args)
    t = m.timeline()
    assert t.device_bytes == m.device_bytes and t.device.temporaries == m.temp_bytes
    assert t.peak_bytes == by_hand("local", "gpt", "all")[0].peak_bytes
    argument = {b.path for b in t.buffers if b.kind == "argument" and b.shape == "f32[512,256]"}
    assert argument == {"params/embed/embedding", "params/pos"}


@pytest.mark.parametrize("target", (None, "v5e", "h200"))
def test_arguments_are_named_by_their_place_in_the_call(target, tmp_path, monkeypatch):
    if target:
        needs(target)
    monkeypatch.setenv("NEXUS_JAX_CACHE", str(tmp_path))
    table = jnp.arange(64.0)  # closed over: JAX may make it an argument of its own

    def loss(weights, unused, x, more):
        return jnp.sum(jnp.tanh(x @ weights["w"]["kernel"]) * weights["b"] * table * more[1]["k"]) + 0 * jnp.sum(unused)

    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    weights = {"b": f32(64), "not_read": f32(3, 5), "w": {"kernel": f32(32, 64)}}
    args = (weights, jax.ShapeDtypeStruct((7,), jnp.int32), f32(16, 32), [True, {"k": f32()}])
    t = nj.measure(loss, *args, target=target).timeline()
    found = {b.path: b.shape for b in t.buffers if b.kind == "argument" and b.path != "constant"}
    assert {k: v for k, v in found.items() if v != "s32[7]"} == {
        "b": "f32[64]", "w/kernel": "f32[32,64]", "args[2]": "f32[16,32]", "args[3]/1/k": "f32[]"
    }  # fmt: skip
    assert "fun()" not in {b.path for b in t.buffers} | {p.path for p in t.points}


def test_the_arguments_of_an_nnx_model(tmp_path, monkeypatch):
    monkeypatch.setenv("NEXUS_JAX_CACHE", str(tmp_path))
    tokens = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    model = nnx.eval_shape(lambda: NNXGPT(rngs=nnx.Rngs(0)))
    t = nj.measure(lambda m, t: loss_of(m(t), t), model, tokens).timeline()
    named = {b.path for b in t.buffers if b.kind == "argument"}
    assert {"blocks/0/attn/q/kernel", "args[1]"} < named


def test_a_step_that_does_not_fit_sums_to_what_the_compiler_refuses(tmp_path):
    needs("v5e")
    code = """
        import json, pathlib, sys, jax, jax.numpy as jnp
        from jax.sharding import SingleDeviceSharding
        from nexus_jax import _compat
        from nexus_jax.targets import worker
        out = pathlib.Path(sys.argv[1])
        place = SingleDeviceSharding(_compat.tpu_devices("v5e:2x2")[0])
        x = jax.ShapeDtypeStruct((57344, 57344), jnp.float32, sharding=place)
        fun = lambda x: jnp.sum(jnp.tanh(jnp.tanh(jnp.tanh(x) @ x) @ x))
        try:
            jax.jit(fun).lower(x).compile(compiler_options=worker.dump_options(out / "dump"))
        except Exception as error:
            worker.keep_texts(out / "dump", out)
            print(json.dumps(worker.failure(error)["out_of_memory"]["wanted"]))
    """
    env = {**os.environ, **_compat.TPU_ENVIRONMENT, "JAX_PLATFORMS": "cpu"}
    argv = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    done = subprocess.run(argv, env=env, check=True, capture_output=True, text=True)
    wanted = json.loads(done.stdout.splitlines()[-1])
    t = timeline.parse(**{name: (tmp_path / name).read_text() for name in worker.TEXTS.values()})
    assert t.reserved == pytest.approx(wanted, abs=0.01 * 2**30), "libtpu says hundredths of a GiB"


# --- names and phases ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ("local", "h200"))
def test_the_largest_thing_live_is_the_attention_scores(by_hand, target):
    t, _ = by_hand(target, "gpt", "none")
    largest = timeline.grouped(t.at_peak)[0]
    assert largest.pattern == "GPT/blocks[0..1]/attn" and largest.bytes == 2 * largest.each.bytes
    assert largest.each.bytes == 4 * 8 * 4 * 512 * 512 and largest.each.shape.startswith("f32[")
    assert (largest.each.kind, largest.each.place, largest.each.phase) == ("temporary", "device", "forward")


@pytest.mark.parametrize("target", TARGETS)
def test_most_bytes_have_a_module(by_hand, target):
    t, _ = by_hand(target, "gpt", "none")
    assert sum(b.bytes for b in t.at_peak if "GPT" in b.path or b.kind == "argument") > 0.8 * t.peak_bytes
    arguments = {b.path for b in t.buffers if b.kind == "argument"}
    assert "params/blocks_0/attn/q/kernel" in arguments and "t" in arguments


@pytest.mark.parametrize("target", ("v5e", "h200"))
def test_recomputing_lowers_the_curve(by_hand, target):
    (none, _), (recomputed, _) = by_hand(target, "gpt", "none"), by_hand(target, "gpt", "all")
    assert recomputed.peak_bytes < 0.7 * none.peak_bytes
    assert not any(p.phase == "recompute" for p in none.points)
    again = [p for p in recomputed.points if p.phase == "recompute"]
    assert any(p.path.startswith("GPT/blocks_1/attn") for p in again)

    def kept(t):  # temporaries of the blocks' forward pass that are live when the first block's backward pass begins
        last = next(p.step for p in t.points if p.phase == "backward" and p.path.startswith("GPT/blocks_1"))
        live = t.live_at(last)
        return sum(b.bytes for b in live if b.kind == "temporary" and b.phase == "forward" and "blocks" in b.path)

    assert kept(recomputed) < 0.4 * kept(none)


@pytest.mark.parametrize("target", TARGETS)
def test_the_phases_are_in_order(by_hand, target):
    t, _ = by_hand(target, "gpt", "none")
    middle = {phase: np.median([p.step for p in t.points if p.phase == phase]) for phase in ("forward", "backward")}
    assert middle["forward"] < middle["backward"]
    gradient = next(b for b in t.buffers if b.kind == "output" and b.path == "GPT/blocks_1/Dense_1")
    assert gradient.phase == "backward"


@pytest.mark.parametrize("target", ("v5e", "h200"))
def test_what_is_offloaded_is_on_the_host_and_nowhere_else(by_hand, target):
    t, figures = by_hand(target, "scanned", "offload")
    by_size = t.host_temp_by_size()
    stacked = 4 * 4 * 8 * 128 * 256  # four layers of f32[8,128,256]: the only one of a MB or more
    assert by_size == {stacked: stacked}
    assert sum(by_size.values()) == figures["host_temp_size"] == t.host.temporaries
    assert all(b.place == "host" for b in t.host_buffers) and all(b.place == "device" for b in t.buffers)
    assert t.host_buffers and all(b.path.startswith("ScannedGPT/layers/block") for b in t.host_buffers)
    assert any(p.in_loop for p in t.points) and not all(p.in_loop for p in t.points)


def test_donated_arguments_are_counted_once(tmp_path):
    step = lambda w, x: (w - 0.1 * jnp.tanh(x @ w), jnp.sum(x))
    w, x = jax.ShapeDtypeStruct((64, 64), jnp.float32), jax.ShapeDtypeStruct((64, 64), jnp.float32)
    found = compiled(tmp_path, jax.jit(step, donate_argnums=0).lower(w, x))
    t = timeline.parse(**found["texts"])
    assert t.device.aliased == found["alias_size"] == 4 * 64 * 64
    assert (t.device.arguments, t.device.outputs) == (found["argument_size"], found["output_size"])
    assert t.device_bytes == 2 * 4 * 64 * 64 + found["output_size"] - found["alias_size"] + found["temp_size"]
    assert {b.path for b in t.buffers if b.kind == "argument"} == {"w", "x"}


def test_branches_loops_and_sorts(tmp_path):
    def fun(x, n):
        x = jax.lax.fori_loop(0, n, lambda i, x: jnp.sin(x @ x), x)
        x = jax.lax.cond(n > 3, lambda x: jnp.sort(x, 0), lambda x: jnp.cumsum(x @ x, 1), x)
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 1e6, lambda x: x + 1 + jnp.tanh(x), x)

    args = (jax.ShapeDtypeStruct((128, 128), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32))
    found = compiled(tmp_path, jax.jit(fun).lower(*args))
    t = timeline.parse(**found["texts"])
    assert t.device.temporaries == found["temp_size"] and any(p.in_loop for p in t.points)
    assert all(sum(b.bytes for b in t.live_at(p.step)) == p.bytes for p in t.points)


# --- hand-made texts -----------------------------------------------------------------------------------------------


def texts(allocations, order, live, lines=()):
    """The three texts, from ``(header, [value])``, names in order, ``{"name{}": (first, last)}`` and lines of a program."""
    found = ["BufferAssignment:"]
    for i, (header, values) in enumerate(allocations):
        found += [f"allocation {i}: {header}:", *(f" value: <{i} {v}" for v in values)]
    ranges = [f"    {name}:{first}-{last}" for name, (first, last) in live.items()]
    steps = [f"    {i}:{name}" for i, name in enumerate(order)]
    head = [f"HloLiveRange (max {len(order)}):", "  InstructionSequence:", *steps, "  BufferLiveRange:", *ranges]
    program = ["HloModule f, is_scheduled=true", "", "ENTRY %main (x: f32[4]) -> f32[4] {", *lines]
    program += [f"  %{name} = f32[4]{{0}} add(%x, %x)" for name in order if not any(f"%{name} =" in x for x in lines)]
    return {
        "buffer_assignment": "\n".join([*found, ""]),
        "live_range": "\n".join([*head, "  Live ranges at 1 (peak):", "    x{}: 4 bytes", ""]),
        "hlo": "\n".join([*program, "}", ""]),
    }


def test_a_loops_carry_is_counted_once_and_named_by_what_fills_it():
    made = texts(
        [
            ("size 16, parameter 0, shape |f32[4]| at ShapeIndex {}", ["x @0> (size=16,offset=0): f32[4]{0}"]),
            (
                "size 64, preallocated-temp",
                [
                    "zeros @0> (size=32,offset=0): f32[8]{0}",
                    "carry{1} (phi) @0> (size=32,offset=0): f32[8]{0}",
                    "fill @0> (size=32,offset=0): f32[8]{0}",
                    "after{1} (phi) @0> (size=32,offset=0): f32[8]{0}",
                    "other @0> (size=16,offset=48): f32[4]{0}",
                ],
            ),
        ],
        ["x", "zeros", "carry", "fill", "after", "other"],
        {"x{}": (0, 6), "zeros{}": (1, 2), "carry{1}": (2, 3), "fill{}": (3, 4), "after{1}": (4, 5), "other{}": (5, 5)},
        [
            '  %zeros = f32[8]{0} broadcast(%x), metadata={op_name="jit(f)/jvp(M)/broadcast_in_dim"}',
            '  %fill = f32[8]{0} add(%x), metadata={op_name="jit(f)/jvp(M)/while/body/layer/mul" stack_frame_id=3}',
        ],
    )
    t = timeline.parse(**made)
    assert [p.bytes for p in t.points] == [16, 48, 48, 48, 48, 64]
    assert {b.name: b.path for b in t.buffers if b.slot == (1, 0)} == dict.fromkeys(
        ("zeros", "carry{1}", "fill", "after{1}"), "M/layer"
    )
    assert t.fragmentation == 64 - 48


def test_every_kind_of_memory_in_its_place():
    tiled = "f32[4]{0:T(128)}"
    allocations = [
        (f"size 512, page 0, parameter 0, shape |{tiled}| at ShapeIndex {{0}}", [f"x{{0}} @0> (size=512,offset=0): {tiled}"]),
        ("size 512, page 0, parameter 1, shape |f32[4]| at ShapeIndex {}, maybe-live-out", [f"w @0> (size=512,offset=0): {tiled}"]),
        ("size 128, page 0, constant", [f"c @0> (size=128,offset=0): {tiled}"]),
        ("size 64, page 0, thread-local", [f"inner @0> (size=64,offset=0): {tiled}"]),
        ("size 256, page 0, output shape is |(f32[4])|, maybe-live-out", [f"y @0> (size=256,offset=0): {tiled}"]),
        ("size 1024, color 1, page 0, preallocated-temp", [f"fast @1> (size=1024,offset=0): {tiled}"]),
        ("size 2048, color 5, page 0, preallocated-temp", [f"far @5> (size=2048,offset=0): {tiled}"]),
    ]  # fmt: skip
    order = ["x", "w", "c", "fast", "far", "y"]
    live = {"x{0}": (0, 6), "w{}": (0, 6), "c{}": (0, 6), "fast{}": (3, 4), "far{}": (4, 5), "y{}": (5, 6)}
    tpu = timeline.parse(**texts(allocations, order, live))
    assert tpu.device == timeline.Sums(arguments=1024, outputs=768, aliased=512, constants=128, thread_local=64)
    assert (tpu.on_chip, tpu.host.temporaries, tpu.reserved) == (1024, 2048, 1024 + 256 + 128 + 64)
    assert [p.bytes for p in tpu.points] == [1152] * 5 + [1408]
    assert tpu.host_temp_by_size() == {16: 16}, "the array's size, not the tile's"
    # The same without tiles is a GPU's: its color 1 is device memory, and what is thread-local is not.
    plain = [(h.replace(tiled, "f32[4]"), [v.replace(tiled, "f32[4]{0}") for v in vs]) for h, vs in allocations]
    gpu = timeline.parse(**texts(plain, order, live))
    assert (gpu.on_chip, gpu.device.temporaries, gpu.device.thread_local) == (0, 1024, 0)
    assert [p.bytes for p in gpu.points] == [1152, 1152, 1152, 2176, 2176, 1408]


def test_an_odd_name_is_only_a_name():
    line = (
        r'  %a = f32[4]{0} add(%x), metadata={op_name="p[\'params\'][\'a/b{}\'][\'</script>\']"}, sharding={replicated}'
    )
    made = texts(
        [("size 16, preallocated-temp", ["a @0> (size=16,offset=0): f32[4]{0}"])], ["x", "a"], {"a{}": (1, 1)}, [line]
    )
    [buffer] = timeline.parse(**made).buffers
    assert buffer.path == "params/a/b{}/</script>"


def test_collectives_made_one_are_named_by_the_first():
    scope = "jit(f)/(jit(fun)/jvp(layer_0)/tanh:jit(fun)/transpose(jvp(layer_2))/mul:all)"
    line = f'  %a = f32[4]{{0}} all-gather-start(%x), metadata={{op_name="{scope}"}}'
    made = texts(
        [("size 16, preallocated-temp", ["a @0> (size=16,offset=0): f32[4]{0}"])], ["x", "a"], {"a{}": (1, 1)}, [line]
    )
    [buffer] = timeline.parse(**made).buffers
    assert (buffer.path, buffer.op, buffer.phase) == ("layer_0", "tanh", "forward")


def test_instructions_made_one_are_named_by_the_first():
    scope = "jit(f)/jit(step)/transpose(jvp(layer_0))/mul;jit(step)/jvp(layer_1)/broadcast_in_dim"
    line = f'  %a = f32[4]{{0}} multiply(%x), metadata={{op_name="{scope}"}}'
    made = texts(
        [("size 16, preallocated-temp", ["a @0> (size=16,offset=0): f32[4]{0}"])], ["x", "a"], {"a{}": (1, 1)}, [line]
    )
    [buffer] = timeline.parse(**made).buffers
    assert (buffer.path, buffer.op, buffer.phase) == ("layer_0", "mul", "backward")


def test_constants_that_became_arguments_come_first():
    assert [b.path for b in timeline.parse(**GOOD, arguments=["w"]).buffers if b.kind == "argument"] == ["w"]
    two = {**GOOD, "buffer_assignment": GOOD["buffer_assignment"].replace("parameter 0", "parameter 1")}
    assert [b.path for b in timeline.parse(**two, arguments=["w"]).buffers if b.kind == "argument"] == ["w"]
    with pytest.raises(ValueError, match="of a program with 1 arguments, and not with 2"):
        timeline.parse(**GOOD, arguments=["w", "x"])


@st.composite
def heaps(draw):
    """Buffers of a heap, none over another at one time: ``(offset, size, first step, last step)``; and the number of steps."""
    steps = draw(st.integers(1, 12))
    found, taken = [], np.zeros((steps, 24), bool)
    for _ in range(draw(st.integers(0, 12))):
        offset, first = draw(st.integers(0, 23)), draw(st.integers(0, steps - 1))
        size, last = draw(st.integers(1, 24 - offset)), draw(st.integers(first, steps - 1))
        where = (slice(first, last + 1), slice(offset, offset + size))
        if not taken[where].any():
            taken[where] = True
            found.append((offset, size, first, last))
    return found, taken


@settings(deadline=None, max_examples=60)
@given(heaps())
def test_bytes_in_use_are_those_of_brute_force(heap):
    found, taken = heap
    values = [f"v{i} @0> (size={size},offset={offset}): u8[{size}]{{0}}" for i, (offset, size, *_) in enumerate(found)]
    live = {f"v{i}{{}}": (first, last) for i, (_, _, first, last) in enumerate(found)}
    order = [f"s{i}" for i in range(len(taken))]
    t = timeline.parse(**texts([("size 24, preallocated-temp", values)], order, live))
    assert [p.bytes for p in t.points] == taken.sum(1).tolist()
    assert all(sum(b.bytes for b in t.live_at(p.step)) == p.bytes for p in t.points)
    assert t.peak_step == taken.sum(1).argmax() and t.reserved == 24 == t.peak_bytes + t.fragmentation


GOOD = texts(
    [
        ("size 16, parameter 0, shape |f32[4]| at ShapeIndex {}", ["x @0> (size=16,offset=0): f32[4]{0}"]),
        ("size 16, preallocated-temp", ["a @0> (size=16,offset=0): f32[4]{0}"]),
    ],
    ["x", "a"],
    {"x{}": (0, 2), "a{}": (1, 2)},
)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("buffer_assignment", lambda text: "", "no buffer assignment: it begins with ''"),
        ("buffer_assignment", lambda text: "BufferAssignment:\n", "it holds no allocation"),
        ("buffer_assignment", lambda text: text.replace("size 16, pre", "size sixteen, pre"), "this line is not understood: 'allocation 1: size sixteen"),
        ("buffer_assignment", lambda text: text.replace("offset=0): f32[4]{0}\nall", "off"), "this line is not understood: 'value: <0 x @0>"),
        ("buffer_assignment", lambda text: text.replace("size=16,offset=0", "size=16,offset=8"), "value x ends at byte 24 of allocation 0, which has 16"),
        ("buffer_assignment", lambda text: "BufferAssignment:\n" + text.splitlines()[2], "a value before any allocation"),
        ("buffer_assignment", lambda text: text + "Memory Space: default (color=0)\nTotal bytes: 99 (99B)\n", "sum to 32 bytes, and it says 99: cut short"),
        ("live_range", lambda text: "x", "no live ranges: the text begins with 'x'"),
        ("live_range", lambda text: text.replace("    0:x\n", ""), "step 0 of the schedule is missing before '1:a'"),
        ("live_range", lambda text: text.replace("    0:x\n    1:a\n", ""), "the schedule is empty"),
        ("live_range", lambda text: text.replace("a{}:1-2", "a{}:1"), "this line is not understood: 'a{}:1'"),
        ("live_range", lambda text: text.replace("a{}:1-2", "a{}:2-1"), "'a{}:2-1' ends before it begins"),
        ("live_range", lambda text: text.replace("    a{}:1-2\n", ""), "none for a{}, which the buffer assignment places"),
        ("hlo", lambda text: "module {", "no compiled program: it begins with 'module {'"),
        ("hlo", lambda text: text.replace("%x =", "%y =").replace("%a =", "%b ="), "the texts are of two programs"),
    ],
)  # fmt: skip
def test_broken_texts_are_named(name, change, message):
    timeline.parse(**GOOD)
    with pytest.raises(ValueError, match=re.escape(message)):
        timeline.parse(**{**GOOD, name: change(GOOD[name])})


# --- shown ---------------------------------------------------------------------------------------------------------


def test_the_table_shows_sums_and_what_is_live(by_hand):
    t, _ = by_hand("local", "gpt", "none")
    text = timeline.table(t)
    for shown in ("set aside", "fragmentation", "not written yet", "temporaries", "live at the peak", "smaller ones"):
        assert shown in text
    assert "GPT/blocks[0..1]/attn" in text and f"step {t.peak_step} of {len(t.points)}" in text
    assert "on the chip" not in text and "host bytes" not in text


@pytest.mark.parametrize("kind", ("png", "svg"))
def test_a_picture_of_two_policies(by_hand, tmp_path, kind):
    lines = {policy: by_hand("local", "gpt", policy)[0] for policy in ("none", "all")}
    path = tmp_path / f"memory.{kind}"
    timeline.draw(lines, path, capacity=int(1.2 * lines["none"].reserved))
    if kind == "png":
        from matplotlib import image

        pixels = image.imread(path)
        assert pixels.shape[0] > 500 and pixels.shape[1] > 1000 and pixels.std() > 0.05
        return
    text = path.read_text()
    for shown in (">none<", ">all<", "at the peak", "GPT/blocks[0..1]/attn", "forward", "recompute", "the device has"):
        assert shown in text, shown
    timeline.draw(lines, tmp_path / "again.svg", capacity=int(1.2 * lines["none"].reserved))
    assert (tmp_path / "again.svg").read_text() == text


def test_a_picture_of_many_policies_with_odd_names(tmp_path):
    t = timeline.parse(**GOOD)
    lines = {f"${i} <&> " + "long " * 8: t for i in range(9)}
    timeline.draw(lines, tmp_path / "odd.svg", capacity=10**12)
    assert "above this picture" in (tmp_path / "odd.svg").read_text()


def test_what_a_picture_refuses(tmp_path, monkeypatch):
    t = timeline.parse(**GOOD)
    with pytest.raises(ValueError, match="lines is empty: give at least one"):
        timeline.draw({}, tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a.jpg'.*: write a name that ends in .png or .svg"):
        timeline.draw({"none": t}, tmp_path / "a.jpg")
    with pytest.raises(ValueError, match="capacity=0 must be a positive number of bytes"):
        timeline.draw({"none": t}, tmp_path / "a.png", capacity=0)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RuntimeError, match=r'pip install "nexus-jax\[pictures\]"'):
        timeline.draw({"none": t}, tmp_path / "a.png")
