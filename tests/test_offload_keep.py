"""What is kept for the backward pass, and what is made again: on programs whose answer is known by hand."""

import jax
import jax.numpy as jnp
import pytest
from checks import assert_close

import nexus_jax as nj

pytestmark = pytest.mark.filterwarnings("ignore::nexus_jax.OffloadWarning")
ROWS, D = 16, 8
W, X = 0.3 * jax.random.normal(jax.random.key(0), (D, D)), jax.random.normal(jax.random.key(1), (ROWS, D))
ONE = X.nbytes


def mask(w, x):
    causal = jnp.tril(jnp.ones((ROWS, ROWS), bool))
    return jnp.where(causal, (x @ w) @ x.T, -1e30)


PROGRAMS = {
    "its own derivative": (lambda w, x: jnp.tanh(x @ w), ONE),
    "one of two precisions": (lambda w, x: jnp.sin((x @ w).astype(jnp.bfloat16).astype(jnp.float32)), ONE // 2),
    "several functions of one value": (lambda w, x: jnp.sin(y := x @ w) * jnp.exp(y) + jax.nn.gelu(y), ONE),
    "a sum, repeated": (lambda w, x: x * jnp.sin(jnp.sum(x @ w, 1, keepdims=True)), ROWS * 4),
    "a view": (lambda w, x: jnp.sin((x @ w).reshape(ROWS * D)).reshape(D, ROWS).T ** 2, ONE),
    "a mask of literals": (lambda w, x: mask(w, x), 0),
    "a view of a weight": (lambda w, x: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16).T, 0),
    "an argument": (lambda w, x: jnp.sin(w) * 2.0, 0),
    "integers": (lambda w, x: (x @ w)[jnp.argsort(x[:, 0])], 0),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_bytes_that_leave_and_gradients(name):
    fun, expected = PROGRAMS[name]
    loss = lambda w, x: jnp.sum(fun(w, x).astype(jnp.float32))
    ours = nj.ActivationOffloader(offload_threshold_mb=0.0).wrap(loss)
    moved = [r for r in nj.residuals(ours, W, X) if r.place == "host"]
    extra = {"a mask of literals": ONE}.get(name, 0)  # x @ w, the operand of the second matmul
    assert sum(r.nbytes for r in moved) == expected + extra
    assert_close(jax.grad(loss, (0, 1))(W, X), jax.grad(ours, (0, 1))(W, X), 1e-5)
    assert_close(jax.jit(jax.grad(loss, (0, 1)))(W, X), jax.jit(jax.grad(ours, (0, 1)))(W, X), 1e-5)
