"""The largest size that fits: exact for any step that grows, and found with few compiles."""

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nexus_jax as nj
from nexus_jax.fit import Workload, _Search
from nexus_jax.policy import load_policy


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("NEXUS_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))


def mlp(policy="none", batch=8):
    """A workload whose residuals grow with the batch."""
    layer = lambda w, x: jnp.tanh(jnp.sin(x @ w) @ w)
    if policy != "none":
        layer = jax.checkpoint(layer, policy=load_policy(policy))

    def loss(ws, x):
        for w in ws:
            x = layer(w, x)
        return jnp.sum(x**2)

    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    return loss, ([shape(64, 64)] * 3, shape(batch, 64))


def test_within_the_targets_own_memory_the_compiler_decides():
    """libtpu takes programs whose sum is more than the chip has: holes count twice in it."""

    class Made:
        limit_bytes = 3000

        def __init__(self, k):
            self.device_bytes, self.fits = 100 * k, k <= 37

    search = _Search(Workload(lambda batch=8: None), "batch", None, None, 1, 500, 0, False, 1.0)
    search._measure = lambda policy, n: Made(n)
    search._per_second = lambda policy, n: None
    assert search.run(None).largest == 37 == search.run(None).largest
    search = _Search(Workload(lambda batch=8: None), "batch", None, 3000, 1, 500, 0, False, 1.0)
    search._measure, search._per_second = (lambda policy, n: Made(n)), (lambda policy, n: None)
    assert search.run(None).largest == 30, "bytes that a user names are bytes"


@settings(max_examples=300, deadline=None)
@given(
    base=st.integers(0, 10**9),
    slope=st.integers(1, 10**7),
    step=st.just(1) | st.integers(2, 64),
    curve=st.integers(0, 300),
    limit=st.integers(1, 10**11),
    start=st.integers(1, 512),
    at_most=st.integers(1, 5000),
)
def test_the_answer_is_exact_and_takes_few_compiles(base, slope, step, curve, limit, start, at_most):
    """On any growing function: a line, a staircase (tiles, padding), a parabola (attention over a length)."""
    nbytes = lambda k: base + slope * (k + -k % step) + curve * k * k
    tried = []

    class Made:
        limit_bytes = None

        def __init__(self, k):
            tried.append(k)
            self.device_bytes = nbytes(k)

    search = _Search(Workload(lambda batch=start: None), "batch", None, limit, 1, at_most, 0, False, 1.0)
    search._measure = lambda policy, n: Made(n)
    search._per_second = lambda policy, n: None
    found = search.run(None)
    exact = max((k for k in range(at_most + 1) if k == 0 or nbytes(k) <= limit), default=0)
    assert found.largest == exact
    assert len(tried) == len(set(tried)) == found.compiles
    assert found.compiles <= (13 if step == 1 else 4 + 2 * at_most.bit_length())


def test_each_policy_gets_its_own_batch():
    limit = nj.measure(*_called(mlp(batch=256))).device_bytes
    found = nj.fit(mlp, "batch", ["none", "all"], target="local", limit_bytes=limit)
    none, all_ = found
    for policy, row in (("none", none), ("all", all_)):
        fitting, next_ = (nj.measure(*_called(mlp(policy, row.largest + more))).device_bytes for more in (0, 1))
        assert fitting == row.device_bytes <= limit < next_ == row.next_bytes
    text = str(found)
    assert "largest batch" in text and "none" in text and "1.00x" in text
    assert found.as_dict()["fits"][0]["largest"] == none.largest


def _called(workload):
    loss, args = workload
    return (loss, *args)


def test_multiples_and_bounds():
    limit = nj.measure(*_called(mlp(batch=100))).device_bytes
    [row] = nj.fit(mlp, "batch", target="local", limit_bytes=limit, multiple=8)
    assert row.largest % 8 == 0 and 96 <= row.largest < 112
    [row] = nj.fit(mlp, "batch", target="local", limit_bytes=limit, at_most=16)
    assert row.largest == 16 and row.next_bytes is None
    [row] = nj.fit(mlp, "batch", target="local", limit_bytes=10)
    assert row.largest == 0 and row.device_bytes > 10


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"vary": "length"}, "takes no parameter 'length'"),
        ({"vary": "policy"}, "policy='none': only a whole number above 0 can be varied"),
        ({"multiple": 0}, "multiple=0, at_most=65536: write whole numbers"),
        ({"at_most": 4, "multiple": 8}, "multiple=8, at_most=4"),
        ({"limit_bytes": None}, "the memory of target='local' is not known: write limit_bytes="),
    ],
)
def test_what_makes_no_sense_is_said(kwargs, message):
    with pytest.raises(ValueError, match=message):
        nj.fit(mlp, **{"target": "local", "limit_bytes": 10**6, **kwargs})
