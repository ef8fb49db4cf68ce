"""FLOPs, bytes and loops of a program against formulas, and against XLA's own count."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P
from models import GPT, NNXGPT, ScannedGPT, linen_loss, loss_of

import nexus_jax as nj
from nexus_jax import flops
from nexus_jax.flops import count, count_matmuls, matmul_flops
from nexus_jax.fusion import Line, traffic

few = settings(max_examples=25, deadline=None)
small = st.integers(1, 5)


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


# --- matmuls and convolutions ----------------------------------------------------------------------------------------


@few
@given(batch=small, m=small, k=small, n=small)
def test_a_dot_and_its_gradients(batch, m, k, n):
    a, b = f32(batch, m, k), f32(batch, k, n)
    dot = lambda a, b: jnp.einsum("bmk,bkn->bmn", a, b)
    assert count(dot, a, b).flops == 2 * batch * m * k * n
    found = count(jax.grad(lambda a, b: jnp.sum(jnp.sin(dot(a, b))), (0, 1)), a, b)
    assert found.matmul_flops == 6 * batch * m * k * n and found.matmuls == 3


def test_a_complex_dot_has_four_times_as_many():
    x = jax.ShapeDtypeStruct((4, 4), jnp.complex64)
    assert matmul_flops(jnp.dot, x, x) == 4 * matmul_flops(jnp.dot, f32(4, 4), f32(4, 4))


def test_a_ragged_dot_and_its_gradients():
    x, w, sizes = f32(12, 8), f32(3, 8, 5), jnp.array([2, 3, 7])
    dot = lambda x, w: jax.lax.ragged_dot(x, w, sizes)
    assert matmul_flops(dot, x, w) == 2 * 12 * 8 * 5
    assert matmul_flops(jax.grad(lambda x, w: jnp.sum(jnp.sin(dot(x, w))), (0, 1)), x, w) == 3 * 2 * 12 * 8 * 5


def taps(image, kernel, stride, low, high, lhs_dilation, rhs_dilation):
    """Pairs of a window and a tap of it on an element of the image, one by one."""
    wide = (image - 1) * lhs_dilation + 1
    windows = (low + wide + high - (kernel - 1) * rhs_dilation - 1) // stride + 1
    at = [w * stride + t * rhs_dilation - low for w in range(windows) for t in range(kernel)]
    return sum(0 <= i < wide and i % lhs_dilation == 0 for i in at)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(4, 7)] * 2),
    kernel=st.tuples(*[st.integers(1, 3)] * 2),
    stride=st.integers(1, 3),
    padding=st.tuples(*[st.integers(0, 3)] * 2),
    lhs_dilation=st.integers(1, 3),
    rhs_dilation=st.integers(1, 2),
    groups=st.integers(1, 3),
    of_batch=st.booleans(),
)
def test_a_convolution(sizes, kernel, stride, padding, lhs_dilation, rhs_dilation, groups, of_batch):
    batch, features, out = 2 * groups, 3 * groups, 2 * groups
    numbers = ("NHWC", "HWIO", "NHWC")
    x, w = f32(batch, *sizes, features), f32(*kernel, features if of_batch else 3, out)
    conv = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(stride, 1),
        padding=(padding, (0, 0)),
        lhs_dilation=(lhs_dilation, 1),
        rhs_dilation=(rhs_dilation, 1),
        dimension_numbers=numbers,
        feature_group_count=1 if of_batch else groups,
        batch_group_count=groups if of_batch else 1,
    )
    pairs = taps(sizes[0], kernel[0], stride, *padding, lhs_dilation, rhs_dilation)
    pairs *= taps(sizes[1], kernel[1], 1, 0, 0, 1, 1)
    of_one = (batch // groups) * features if of_batch else batch * 3
    assert matmul_flops(conv, x, w) == 2 * of_one * out * pairs


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_the_gradients_of_a_convolution_cost_what_it_costs(stride, padding, groups):
    x, w = f32(2, 11, 13, 8), f32(3, 3, 8 // groups, 16)

    def conv(x, w):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, w, (stride, stride), padding, dimension_numbers=numbers, feature_group_count=groups
        )

    loss = lambda x, w: jnp.sum(conv(x, w) ** 2)
    assert matmul_flops(jax.grad(loss, (0, 1)), x, w) == 3 * matmul_flops(conv, x, w) > 0


# --- everything else -------------------------------------------------------------------------------------------------

FORMULAS = {
    "elementwise": (lambda x: jnp.tanh(x) * x, [(4, 6)], 2 * 24),
    "integers": (lambda x: jnp.bitwise_and(x.astype(jnp.int32) + 1, 3), [(4, 6)], 2 * 24),
    "broadcast": (lambda x, y: x + y, [(4, 6), (6,)], 24),
    "moves": (lambda x: jnp.flip(jnp.pad(x.T[None, ::2].astype(jnp.bfloat16), 1)), [(4, 6)], 0),
    "taken apart": (lambda x: [row for row in x], [(4, 6)], 0),
    "put together": (lambda x: jnp.tile(jnp.stack([x, jnp.zeros_like(x)]), 2), [(4, 6)], 0),
    "reduction": (lambda x: jnp.sum(x, 0), [(4, 6)], 24),
    "argmax": (lambda x: jnp.argmax(x, 1), [(4, 6)], 24),
    "cumulative": (lambda x: jax.lax.cumsum(x, 1) + jax.lax.cummax(x, 0), [(4, 6)], 3 * 24),
    "own reduction": (lambda x: jax.lax.reduce(x, 0.0, lambda a, b: a + b * b, (0,)), [(4, 6)], 2 * 24),
    "pooling": (lambda x: jax.lax.reduce_window(x, 0.0, jax.lax.add, (2, 3), (2, 3), "VALID"), [(4, 6)], 24),
    "sort": (lambda x: jax.lax.sort(x, dimension=1), [(3, 16)], 3 * 16 * 4),
    "sort of pairs": (lambda x, y: jax.lax.sort((x, y), num_keys=2), [(16,), (16,)], 2 * 16 * 4),
    "top_k": (lambda x: jax.lax.top_k(x, 4), [(3, 16)], 3 * 16 * 2),
    "real fft": (lambda x: jnp.fft.rfft(x), [(3, 16)], 3 * 2.5 * 16 * 4),
    "real fft 2d": (lambda x: jnp.fft.rfft2(x), [(3, 8, 16)], 3 * 2.5 * 128 * 7),
    "complex fft": (lambda x: jax.lax.fft(jax.lax.complex(x, x), "FFT", (16,)), [(3, 16)], 3 * 16 + 3 * 5 * 16 * 4),
    "inverse real fft": (lambda x: jnp.fft.irfft(jnp.fft.rfft(x)), [(3, 16)], 2 * 3 * 2.5 * 16 * 4),
    "triangular solve": (
        lambda a, b: jax.lax.linalg.triangular_solve(a, b, left_side=True),
        [(6, 6), (6, 5)],
        6 * 6 * 5,
    ),
    "barrier": (lambda x: jax.lax.optimization_barrier(x), [(4, 6)], 0),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_the_table_of_costs(name):
    fn, shapes, expected = FORMULAS[name]
    found = count(fn, *(f32(*shape) for shape in shapes))
    assert found.flops == expected and not found.unknown


@pytest.mark.parametrize("name, expected", [("cholesky", 6**3 / 3), ("lu", 2 * 6**3 / 3), ("qr", 8 * 6**3 / 3)])
def test_factorisations(name, expected):
    found = count(getattr(jax.lax.linalg, name), f32(5, 6, 6))
    assert [r.flops for r in found.records if r.op == name] == [5 * expected] and not found.unknown


def test_an_update_counts_its_elements_and_is_made_in_place():
    x, y, i = f32(1000, 6), f32(2, 6), jax.ShapeDtypeStruct((2, 1), jnp.int32)
    numbers = jax.lax.ScatterDimensionNumbers((1,), (0,), (0,))
    [r] = count(lambda x, i, y: jax.lax.scatter_add(x, i, y, numbers), x, i, y).records
    assert (r.flops, r.read, r.written) == (12, 2 * 48 + 8, 48)


def test_threefry_bits_are_known_and_those_of_a_device_are_not():
    key = lambda impl: jax.eval_shape(lambda: jax.random.key(0, impl=impl))
    bits = lambda key: jax.random.bits(key, (4, 6))
    assert count(bits, key("threefry2x32")).flops == 60 * 24
    assert count(bits, key("rbg")).unknown == {"random_bits": 1} and count(bits, key("rbg")).flops == 0


# --- bodies ----------------------------------------------------------------------------------------------------------


@few
@given(lengths=st.lists(st.integers(1, 4), min_size=1, max_size=3), m=small, k=small)
def test_nested_scans_multiply(lengths, m, k):
    body = lambda x: jnp.tanh(x @ jnp.ones((k, k)))
    for length in lengths:
        body = lambda x, inner=body, n=length: jax.lax.scan(lambda c, _: (inner(c), None), x, None, length=n)[0]
    found = count(body, f32(m, k))
    assert found.matmuls == math.prod(lengths)
    assert found.flops == math.prod(lengths) * (2 * m * k * k + m * k)
    grad = jax.grad(lambda x: jnp.sum(body(x)))
    assert count_matmuls(grad, f32(m, k)) == 2 * math.prod(lengths)


@few
@given(start=st.integers(-5, 5), stop=st.integers(-5, 12), step=st.integers(1, 4), form=st.sampled_from("<≤>≥"))
def test_a_counting_while_loop(start, stop, step, form):
    def loop(x):
        test = {"<": lambda i: i < stop, "≤": lambda i: i <= stop, ">": lambda i: -i > -stop, "≥": lambda i: stop >= i}
        test[">"] = lambda i: stop > i
        return jax.lax.while_loop(lambda s: test[form](s[0]), lambda s: (s[0] + step, s[1] @ s[1]), (start, x))[1]

    runs = len(range(start, stop + (form in "≤≥"), step))
    found = count(loop, f32(3, 3))
    assert found.matmuls == runs and found.matmul_flops == runs * 54 and not found.unknown


@pytest.mark.parametrize("down", [lambda i: i - 2, lambda i: -2 + i], ids=["i - 2", "-2 + i"])
def test_a_while_loop_that_counts_down(down):
    loop = lambda x: jax.lax.while_loop(lambda s: s[1] > 1, lambda s: (s[0] @ s[0], down(s[1])), (x, 8))[0]
    assert count_matmuls(loop, f32(3, 3)) == 4  # 8, 6, 4, 2


def test_a_fori_loop_between_literals_inside_a_jitted_function():
    inner = jax.jit(lambda x, n: jax.lax.fori_loop(jnp.int32(2), n, lambda i, c: c @ c, x))
    assert count_matmuls(lambda x: inner(x, 7), f32(3, 3)) == 5
    assert count(lambda x, n: inner(x, n), f32(3, 3), 7).unknown == {"while": 1}


def test_a_while_loop_of_unknown_length_counts_once_and_is_named():
    def loop(x, n):
        body = lambda x: jax.lax.while_loop(lambda x: x[0, 0] < n, lambda x: x @ x, x)
        return jax.lax.scan(lambda c, _: (body(c), None), x, None, length=3)[0]

    found = count(loop, f32(3, 3), f32())
    assert found.matmul_flops == 3 * 54 and found.unknown == {"while": 3}
    assert "while (runs 3x). A while loop whose length is not in the program counts one step." in str(found)


@few
@given(widths=st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_a_cond_counts_its_largest_branch(widths):
    branches = [lambda x, n=n: jnp.sum(x @ jnp.ones((4, n))) for n in widths]
    switch = lambda i, x: jax.lax.switch(i, branches, x)
    expected = 2 * 3 * 4 * max(widths)
    assert matmul_flops(switch, jax.ShapeDtypeStruct((), jnp.int32), f32(3, 4)) == expected


@jax.custom_vjp
def stiff(x):
    return x @ x


stiff.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ (x @ x),))


@jax.custom_jvp
def own(x):
    return x @ x


own.defjvp(lambda p, t: (own(*p), p[0] @ t[0]))


@pytest.mark.parametrize("fn, forward, both", [(stiff, 1, 3), (own, 1, 2)], ids=["custom_vjp", "custom_jvp"])
def test_custom_derivatives_count_what_runs(fn, forward, both):
    assert count_matmuls(fn, f32(3, 3)) == forward
    assert count_matmuls(jax.value_and_grad(lambda x: jnp.sum(jnp.sin(fn(x)))), f32(3, 3)) == both


def test_calls_are_seen_through():
    inner = jax.jit(lambda x: jax.jit(jax.nn.relu)(x @ x))
    found = count(lambda x: jax.checkpoint(inner)(inner(x)), f32(8, 8))
    assert found.matmuls == 2 and found.flops == 2 * (2 * 8**3 + 64) and not found.unknown


def test_a_linear_solve_runs_one_of_its_programs():
    def solve(a, b):
        return jax.lax.custom_linear_solve(lambda x: a @ x, b, lambda _, b: a @ (a @ b), symmetric=True)

    assert count_matmuls(solve, f32(4, 4), f32(4)) == 2


@pytest.mark.parametrize("manual", [("a", "b"), ("a",)], ids=["over all axes", "over some"])
def test_a_shard_map_counts_all_devices(manual):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    body = lambda x, w: jax.lax.psum(x @ w, "a")
    mapped = jax.shard_map(body, mesh=mesh, in_specs=(P("a"), P()), out_specs=P(), axis_names=set(manual))
    devices = 4 * (2 if "b" in manual else 1)
    found = count(jax.jit(mapped), f32(8, 16), f32(16, 16))
    assert found.matmul_flops == devices * 2 * 2 * 16 * 16  # each has 2 of the 8 rows
    assert found.flops == found.matmul_flops + devices * 2 * 16


# --- what is not known -----------------------------------------------------------------------------------------------


def test_what_is_not_known_is_named_and_nothing_is_raised():
    def fn(x):
        y = jax.pure_callback(lambda x: x, x, x)
        return jax.lax.scan(lambda c, _: (jnp.linalg.eigh(c)[1], None), y @ x, None, length=4)[0]

    found = count(fn, f32(3, 3))
    assert found.unknown == {"eigh": 4, "pure_callback": 1} and found.matmul_flops == 54
    assert "not counted, because their FLOPs are not known: eigh (runs 4x), pure_callback (runs 1x)" in str(found)
    assert "not known" not in str(count(jnp.dot, f32(3, 3), f32(3, 3)))


@pytest.mark.parametrize("estimated", [True, False])
def test_a_pallas_kernel_counts_its_estimate(estimated):
    def kernel(x, y):
        y[...] = x[...] * 2

    estimate = pl.CostEstimate(flops=1000, bytes_accessed=900, transcendentals=0) if estimated else None
    double = pl.pallas_call(
        kernel, out_shape=jax.ShapeDtypeStruct((8, 8), jnp.float32), cost_estimate=estimate, interpret=True
    )
    [r] = count(double, f32(8, 8)).records
    assert (r.op, r.known, r.flops) == ("pallas_call", estimated, 1000 * estimated)
    assert (r.read, r.written) == ((900 - 256, 256) if estimated else (256, 256))


def test_what_no_output_needs_is_not_counted():
    inner = jax.jit(lambda x: (x @ x, jnp.sin(x @ x)))
    assert count(lambda x: inner(x)[0], f32(8, 8)).matmuls == 1
    printed = lambda x: jax.debug.print("{}", jnp.sum(x @ x)) or x
    assert count(printed, f32(8, 8)).matmuls == 1


# --- bytes -----------------------------------------------------------------------------------------------------------


def moved(fn, *shapes):
    found = count(fn, *(f32(*shape) for shape in shapes))
    return sum(r.read for r in found.records) // 4, sum(r.written for r in found.records) // 4


def softmax(x):
    e = jnp.exp(x - jax.lax.stop_gradient(jnp.max(x, -1, keepdims=True)))
    return e / jnp.sum(e, -1, keepdims=True)


BIG = 1000  # of a row, so that what is one number a row hardly counts

BYTES = {  # in elements: read, written
    "a chain": (lambda x: jnp.tanh(jnp.sin(x) * x + 1) * x, [(BIG,)], (BIG, BIG)),
    "of two inputs": (lambda x, y: jnp.sin(x) + x * y, [(BIG,), (BIG,)], (2 * BIG, BIG)),
    "reduced": (lambda x: jnp.sum(jnp.sin(x) * x), [(BIG,)], (BIG, 1)),
    "in two outputs": (lambda x: (jnp.sin(x), jnp.cos(jnp.sin(x))), [(BIG,)], (BIG, 2 * BIG)),
    "broadcast": (lambda x, y: x * y, [(BIG, BIG), (BIG,)], (BIG * BIG + BIG, BIG * BIG)),
    "a constant": (lambda: jnp.ones(BIG), [], (0, BIG)),
    "transposed": (lambda x: x.T.reshape(-1), [(10, BIG)], (0, 0)),
    "a matmul": (lambda x, y: x @ y, [(10, 20), (20, 30)], (200 + 600, 300)),
    "a matmul and more": (lambda x, y: jnp.tanh(x @ y + 1), [(10, 20), (20, 30)], (800 + 300, 300 + 300)),
    "into a matmul": (lambda x, y: jnp.tanh(x) @ y, [(10, 20), (20, 30)], (200 + 800, 200 + 300)),
    "softmax": (softmax, [(7, BIG)], (3 * 7 * BIG + 3 * 7, 7 * BIG + 2 * 7)),
    "a slice into a matmul": (lambda x, y: x[:10] @ y, [(BIG, 20), (20, 30)], (200 + 800, 200 + 300)),
    "of a slice": (lambda x: jnp.sin(x[:10]), [(BIG,)], (10, 10)),
}


@pytest.mark.parametrize("name", BYTES)
def test_bytes_that_go_through_memory(name):
    fn, shapes, expected = BYTES[name]
    assert moved(fn, *shapes) == expected


FUSED = {  # on a TPU, where it is something else than in BYTES
    "a matmul and more": (BYTES["a matmul and more"][0], [(10, 20), (20, 30)], (800, 300)),
    "into a matmul": (BYTES["into a matmul"][0], [(10, 20), (20, 30)], (800, 300)),
    "into two matmuls": (lambda x, y: jnp.tanh(x) @ y + x @ y, [(10, 20), (20, 30)], (1600, 300)),
    "a matmul and a softmax": (
        lambda x, y: softmax(x @ y),
        [(9, 2), (2, BIG)],
        (18 + 2 * BIG + 3 * 9 * BIG + 3 * 9, 2 * 9 * BIG + 2 * 9),
    ),
    # doubled, the scores are the matmul's own kernel's; the others double them again, so they are written after all
    "a matmul, more, and a softmax": (
        lambda x, y: softmax(2 * (x @ y)),
        [(9, 2), (2, BIG)],
        (18 + 2 * BIG + 2 * 9 * BIG + 3 * 9, 2 * 9 * BIG + 2 * 9),
    ),
}


@pytest.mark.parametrize("name", FUSED)
def test_bytes_where_matmuls_are_fused(name):
    fn, shapes, expected = FUSED[name]
    records = count(fn, *(f32(*shape) for shape in shapes)).records
    read, written = (sum(r.fused[i] for r in records) // 4 for i in (0, 1))
    assert (read, written) == expected


def test_a_scan_moves_its_slices_each_time():
    found = count(lambda x: jax.lax.scan(lambda c, x: (c + x, jnp.sin(x)), x[0], x), f32(5, BIG))
    body = [r for r in found.records if r.times == 5]
    assert sum(r.read for r in body) == 2 * 4 * BIG and sum(r.written for r in body) == 2 * 4 * BIG


def test_a_residual_stream_is_written_and_the_inside_of_an_activation_is_not():
    def block(x, w):
        y = x + jax.nn.gelu(x @ w)
        return y + (y - jnp.mean(y, -1, keepdims=True)) @ w

    written = {(r.op, r.written) for r in count(block, f32(16, 16), f32(16, 16)).records}
    assert ("tanh", 1024) not in written
    assert sum(n == 1024 for op, n in written if op == "add") == 1  # the set has one; both additions are such
    ops = [r.op for r in count(block, f32(16, 16), f32(16, 16)).records if r.op == "add" and r.written]
    assert len(ops) == 2


def test_what_the_backward_pass_reads_is_read_there_again():
    loss = lambda x, w: jnp.sum(jax.nn.gelu(x @ w))
    found = count(jax.grad(loss, 1), f32(64, 64), f32(64, 64)).records
    activation = [r for r in found if r.phase == "backward" and r.op != "dot_general" and r.written]
    assert [(r.read, r.written) for r in activation] == [(64 * 64 * 4, 64 * 64 * 4)]  # x @ w in, its cotangent out


def brute(lines, sizes, outs):
    """The same by trying, for a chain of fused lines that one kernel uses: everything read once, the outputs written."""
    made = {o for line in lines for o in line.outs}
    read = {i for line in lines for i in line.ins} - made
    return sum(sizes[i] for i in read), sum(sizes[o] for o in outs)


@few
@given(st.data())
def test_a_random_elementwise_program_reads_its_inputs_once_and_writes_its_outputs(data):
    inputs = data.draw(st.integers(1, 4))
    n = inputs + data.draw(st.integers(1, 12))
    lines = [
        Line("fused", tuple(data.draw(st.lists(st.integers(0, v - 1), min_size=1, max_size=3))), (v,), False)
        for v in range(inputs, n)
    ]
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=n, max_size=n))
    used = {i for line in lines for i in line.ins}
    outs = [v for v in range(inputs, n) if v not in used]
    found = traffic(lines, sizes, outs)
    total = tuple(map(sum, zip(*(f for f in found if f), strict=True)))
    assert total == brute(lines, sizes, outs)


# --- real steps ------------------------------------------------------------------------------------------------------

BATCH, LENGTH, D, VOCAB, LAYERS = 2, 16, 32, 64, 4
TOKENS = BATCH * LENGTH
FORWARD = LAYERS * TOKENS * (24 * D * D + 4 * LENGTH * D) + 2 * TOKENS * D * VOCAB


def tokens():
    return jnp.zeros((BATCH, LENGTH), jnp.int32)


def params_of(model):
    return jax.eval_shape(model.init, jax.random.key(0), tokens())


@functools.cache
def gpt_step(policy=None):
    model = nj.apply_selective_checkpointing(GPT(), policy) if policy else GPT()
    return count(jax.value_and_grad(linen_loss(model, tokens())), params_of(model))


def test_a_gpt_step_is_its_formula():
    found = gpt_step()
    assert found.matmul_flops == 3 * FORWARD
    matmuls = {
        p: sum(r.flops * r.times for r in found.records if r.phase == p and r.op == "dot_general") for p in flops.PHASES
    }
    assert matmuls == {"forward": FORWARD, "backward": 2 * FORWARD, "recompute": 0, "transfer": 0}
    assert found.by_phase["forward"] + found.by_phase["backward"] == found.flops


def test_a_wide_gpt_step_is_six_times_parameters_times_tokens():
    model = GPT(layers=2, d=256, heads=4, vocab=512)
    t = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), t)
    n = sum(x.size for x in jax.tree.leaves(params)) - params["params"]["pos"].size
    found = count(jax.value_and_grad(lambda p, t: loss_of(model.apply(p, t), t)), params, t)
    assert found.matmul_flops == pytest.approx(6 * n * 32, rel=0.02)  # attention's length * d is the rest


def test_a_scanned_gpt_step_is_its_formula():
    model = ScannedGPT()
    found = count(jax.value_and_grad(linen_loss(model, tokens())), params_of(model))
    assert found.matmul_flops == 3 * FORWARD
    assert {r.times for r in found.records if "attn" in r.path and r.op == "dot_general"} == {LAYERS}


def test_an_nnx_gpt_step_is_its_formula():
    from flax import nnx

    graph, params, rest = nnx.split(nnx.eval_shape(lambda: NNXGPT(rngs=nnx.Rngs(0))), nnx.Param, ...)
    loss = lambda params: loss_of(nnx.merge(graph, params, rest)(tokens()), tokens())
    assert count(jax.value_and_grad(loss), params).matmul_flops == 3 * FORWARD


def test_remat_adds_the_layers_forward_to_the_recompute_phase():
    plain, all_ = gpt_step(), gpt_step("all")
    again = [r for r in all_.records if r.phase == "recompute" and r.op == "dot_general"]
    # the last matmul of a block is needed by nothing in its backward pass
    assert sum(r.flops for r in again) == LAYERS * TOKENS * (16 * D * D + 4 * LENGTH * D)
    assert {r.path.split("/")[1] for r in again} == {f"blocks_{i}" for i in range(LAYERS)}
    assert all_.matmul_flops == plain.matmul_flops + sum(r.flops for r in again)
    assert plain.by_phase["recompute"] == 0 and plain.transfer_bytes == {"host": 0, "device": 0}


def test_remat_under_the_flag_of_its_successor():
    if not hasattr(jax.config, "jax_remat3"):
        pytest.skip("this JAX has one remat")
    before = jax.config.jax_remat3
    jax.config.update("jax_remat3", True)
    try:
        layer = jax.checkpoint(lambda x: jnp.sin(jnp.sin(x @ x)))
        assert count(layer, f32(4, 4)).matmuls == 1 and not count(layer, f32(4, 4)).unknown
        found = count(jax.grad(lambda x: jnp.sum(layer(x))), f32(4, 4))
    finally:
        jax.config.update("jax_remat3", before)
    phases = [r.phase for r in found.records if r.op == "dot_general"]
    assert phases.count("recompute") == 1 and phases.count("backward") == 2 and not found.unknown


def test_offloaded_bytes_are_in_the_transfer_phase():
    offload = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["kept"],
        offload_src="device",
        offload_dst="pinned_host",
    )
    block = jax.checkpoint(lambda x, w: jnp.sin(jnp.sin(checkpoint_name(x @ w, "kept"))), policy=offload)
    loss = lambda x, ws: jnp.sum(jax.lax.scan(lambda x, w: (block(x, w), None), x, ws)[0])
    found = count(jax.grad(loss, 1), f32(8, 16), f32(3, 16, 16))
    assert found.transfer_bytes == {"host": 3 * 8 * 16 * 4, "device": 3 * 8 * 16 * 4}
    assert {r.phase for r in found.records if r.place} == {"transfer"}
    assert found.by_phase["transfer"] == 0 and found.nbytes == sum(
        (r.read + r.written) * r.times for r in found.records if not r.place
    )
    plain = jax.grad(lambda x, ws: jnp.sum(jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, ws)[0]), 1)
    assert count(plain, f32(8, 16), f32(3, 16, 16)).transfer_bytes == {"host": 0, "device": 0}


def test_paths_and_phases_of_records():
    paths = {(r.path, r.phase) for r in gpt_step("all").records if r.op == "dot_general"}
    blocks = itertools.product(range(LAYERS), ("forward", "backward", "recompute"))
    assert {(f"GPT/blocks_{i}/attn", phase) for i, phase in blocks} <= {
        ("/".join(p.split("/")[:3]), phase) for p, phase in paths
    }


def test_the_table_of_a_count():
    text = str(gpt_step())
    assert "forward" in text and f"{FORWARD:.4g}" in text and f"{gpt_step().flops:.4g} FLOPs" in text


# --- an independent count --------------------------------------------------------------------------------------------


def xla_flops(fn, *args):
    return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]


def test_xla_counts_the_same_of_a_gpt_step():
    model = GPT(layers=2, d=64, vocab=128)
    params = params_of(model)
    step = jax.value_and_grad(linen_loss(model, tokens()))
    found = count(step, params)
    assert found.flops == pytest.approx(xla_flops(step, params), rel=0.02)
    assert found.matmul_flops == pytest.approx(xla_flops(step, params), rel=0.1)


def test_xla_counts_the_same_of_a_network_of_convolutions():
    def loss(ws, x):
        for w, stride in zip(ws, (1, 2, 2), strict=True):
            numbers = ("NHWC", "HWIO", "NHWC")
            x = jax.nn.relu(jax.lax.conv_general_dilated(x, w, (stride, stride), "SAME", dimension_numbers=numbers))
        return jnp.sum(x**2)

    ws = [f32(3, 3, 4, 8), f32(3, 3, 8, 8), f32(3, 3, 8, 16)]
    step = jax.value_and_grad(loss)
    assert count(step, ws, f32(2, 13, 13, 4)).flops == pytest.approx(xla_flops(step, ws, f32(2, 13, 13, 4)), rel=0.02)


def test_equal_bodies_are_read_once():
    inner = jax.jit(lambda x: jnp.sin(x @ x))

    def deep(x):
        for i in range(50):
            with jax.named_scope(f"layer_{i}"):
                x = jax.lax.scan(lambda c, _: (inner(c), None), x, None, length=2)[0]
        return x

    from nexus_jax.records import _Counter

    counter = _Counter()
    records = counter.records(jax.make_jaxpr(deep)(f32(4, 4)).jaxpr, 0)
    assert sum(r.times for r in records if r.op == "dot_general") == 100
    assert len(counter.facts) < 150  # 50 scans and one of each equation inside, were they traced once
    assert np.unique([r.path for r in records if r.op == "dot_general"]).size == 50
