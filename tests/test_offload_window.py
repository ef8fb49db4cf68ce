"""`offload_threshold_mb="auto"`: what moves is what the link moves while the layers compute."""

import functools
import warnings

import jax
import jax.numpy as jnp
import pytest
from checks import assert_close

import nexus_jax as nj
from nexus_jax.offloading.window import Windows
from nexus_jax.policy.rules import MB
from nexus_jax.targets import sheet

pytestmark = pytest.mark.filterwarnings("ignore:on the CPU", "ignore:nothing was offloaded")
LAYERS = 6
TOKENS = 1024


def layer(x, p):
    up, down = p
    return x + jnp.tanh(x @ up) @ down


def unrolled(params, x):
    for p in params:
        x = layer(x, p)
    return jnp.sum(x.astype(jnp.float32))


def scanned(params, x):
    x, _ = jax.lax.scan(lambda x, p: (layer(x, p), None), x, params)
    return jnp.sum(x.astype(jnp.float32))


def arguments(d, stacked):
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.bfloat16)
    if stacked:
        return (shape(LAYERS, d, 4 * d), shape(LAYERS, 4 * d, d)), shape(TOKENS, d)
    return [(shape(d, 4 * d), shape(4 * d, d))] * LAYERS, shape(TOKENS, d)


def moved(loss, args, **kwargs):
    """Bytes on the host, each."""
    wrapped = nj.ActivationOffloader(**kwargs).wrap(loss)
    return sorted(r.nbytes for r in nj.residuals(wrapped, *args) if r.place == "host")


def room(d, target):
    """Bytes that the link moves while one layer runs forward at the device's peak, from its data sheet."""
    device = sheet(target)
    return 2 * 2 * TOKENS * d * 4 * d / device.bf16_flops * device.device_to_host_bandwidth


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("target", ["h200", "v5e", "v5p"])
@pytest.mark.parametrize("d", [2048, 4096, 8192, 16384])
def test_the_largest_move_as_far_as_the_window_goes(d, target, stacked):
    carry, wide = TOKENS * d * 2, TOKENS * 4 * d * 2
    left, expected = room(d, target), []
    for nbytes in (wide, carry):
        if nbytes <= left:
            left -= nbytes
            expected.append(nbytes)
    loss = scanned if stacked else unrolled
    found = moved(loss, arguments(d, stacked), offload_threshold_mb="auto", target=target, prefetch_ahead=1)
    scale = LAYERS if stacked else 1
    assert {n // scale for n in found} == set(expected)
    every = moved(loss, arguments(d, stacked), offload_threshold_mb=1.0, prefetch_ahead=1)
    assert [n for n in every if n // scale in expected] == found
    assert {n // scale for n in every} == {wide, carry}


def test_the_cases_are_of_every_kind():
    kinds = set()
    for d in (2048, 4096, 8192, 16384):
        for target in ("h200", "v5e", "v5p"):
            kinds.add(sum(n <= room(d, target) for n in (TOKENS * d * 2, TOKENS * 4 * d * 2)))
    assert kinds == {0, 1, 2}


def test_what_comes_back_needs_a_window_too():
    rates = Windows(sheet("h200"))
    assert rates.back(1e-3) == 2 * rates.out(1e-3) == int(2e-3 * sheet("h200").host_to_device_bandwidth)


def test_a_slow_way_back_keeps_it_on_the_device(monkeypatch):
    auto = dict(offload_threshold_mb="auto", target="v5e", prefetch_ahead=1)
    assert moved(unrolled, arguments(16384, False), **auto)
    monkeypatch.setattr(Windows, "back", lambda self, beside: 0)
    assert not moved(unrolled, arguments(16384, False), **auto)


def test_gradients_are_the_plain_ones(monkeypatch):
    slow = functools.partial(Windows.seconds)
    monkeypatch.setattr(Windows, "seconds", lambda self, program: 1e3 * slow(self, program))  # so that small ones move
    monkeypatch.setattr("nexus_jax.training.offload._AUTO_MB", 0.0)
    keys = iter(jax.random.split(jax.random.key(0), 2 * LAYERS + 1))
    draw = lambda *s: jax.random.normal(next(keys), s) / 8
    params, x = [(draw(32, 128), draw(128, 32)) for _ in range(LAYERS)], draw(16, 32)
    offloader = nj.ActivationOffloader(offload_threshold_mb="auto", target="v5e", prefetch_ahead=1)
    assert any(r.place == "host" for r in nj.residuals(offloader.wrap(unrolled), params, x))
    plain, ours = (jax.jit(jax.value_and_grad(f))(params, x) for f in (unrolled, offloader.wrap(unrolled)))
    assert_close(plain, ours, 1e-5)


def test_a_link_that_hides_nothing_says_so():
    offloader = nj.ActivationOffloader(offload_threshold_mb="auto", target="v5p")
    args = arguments(1024, False)
    said = r"largest residual is 8 MB, and the link of v5p"
    with pytest.warns(nj.OffloadWarning, match=said), offloader.offload_context():
        jax.make_jaxpr(jax.grad(unrolled))(*args)
    with warnings.catch_warnings():
        warnings.simplefilter("error", nj.OffloadWarning)
        with offloader.offload_context():
            jax.make_jaxpr(jax.grad(unrolled))(*arguments(16384, False))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"offload_threshold_mb": "auto"}, 'target="h200"'),
        ({"offload_threshold_mb": "auto", "target": "v9"}, "v9"),
        ({"offload_threshold_mb": "auto", "target": "local"}, "name the device"),
        ({"offload_threshold_mb": "auto", "target": "v5e", "prefetch_ahead": 0}, "1 or more"),
        ({"offload_threshold_mb": 1.0, "target": "v5e"}, "leave it out"),
        ({"offload_threshold_mb": "all"}, '"auto"'),
    ],
)
def test_bad_input(given, said):
    with pytest.raises(ValueError, match=said):
        nj.ActivationOffloader(**given)


def test_the_smallest_is_one_megabyte():
    assert nj.ActivationOffloader(offload_threshold_mb="auto", target="v5e").threshold_bytes == MB
