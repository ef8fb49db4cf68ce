"""`offloader.verify`: the user's own step, with and without offloading."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from models import GPT, NNXGPT, linen_loss, loss_of

import nexus_jax as nj
from nexus_jax.training import offload
from nexus_jax.training.verify import OffloadMismatch

TOKENS = jnp.arange(32).reshape(2, 16) % 64
pytestmark = pytest.mark.filterwarnings("ignore:on the CPU:nexus_jax.OffloadWarning")


@pytest.fixture(autouse=True)
def fresh_memory():
    offload._SEEN.clear()


def step(w, x):
    return jnp.sum(jnp.sin(jnp.tanh(x @ w) @ w))


ARGS = jnp.eye(4) * 0.5, jnp.ones((8, 4))


def test_a_loss_and_its_gradients():
    offloader = nj.ActivationOffloader(offload_threshold_mb=0.0)
    found = offloader.verify(offloader.wrap(step), *ARGS)
    assert [leaf.path for leaf in found.leaves] == ["gradient", "loss"]
    assert "2 arrays are equal" in str(found)


def test_the_first_leaf_that_differs_is_named(monkeypatch):
    """A device whose copies back are wrong."""
    offloader = nj.ActivationOffloader(offload_threshold_mb=0.0)
    right = nj.ActivationOffloader._to_device
    monkeypatch.setattr(nj.ActivationOffloader, "_to_device", lambda self, x: right(self, x) * 1.01)
    with pytest.raises(OffloadMismatch, match=r"^gradient is the first that differs .* 1 of 2 arrays differ"):
        offloader.verify(offloader.wrap(step), *ARGS)
    monkeypatch.setattr(nj.ActivationOffloader, "_to_device", lambda self, x: right(self, x) * jnp.nan)
    with pytest.raises(OffloadMismatch, match="by inf of its largest"):
        offloader.verify(offloader.wrap(step), *ARGS)


def test_a_whole_step_that_donates_its_arguments():
    offloader = nj.ActivationOffloader(offload_threshold_mb=0.0)
    model = GPT(layers=2)
    params = model.init(jax.random.key(0), TOKENS)

    @jax.jit
    def update(params):
        loss, grads = jax.value_and_grad(linen_loss(model, TOKENS))(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), loss

    donating = jax.jit(update, donate_argnums=0)
    found = offloader.verify(donating, params)
    assert len(found.leaves) == len(jax.tree.leaves(params)) + 1
    assert not any(x.is_deleted() for x in jax.tree.leaves(params))


def test_an_nnx_model_is_not_changed():
    offloader = nj.ActivationOffloader(offload_threshold_mb=0.0)
    model = offloader.wrap(NNXGPT(layers=2, rngs=nnx.Rngs(0)))
    before = nnx.to_pure_dict(nnx.state(model))
    found = offloader.verify(lambda m: loss_of(m(TOKENS), TOKENS), model)
    assert len(found.leaves) > 10
    assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, before, nnx.to_pure_dict(nnx.state(model)))))


def test_nothing_offloaded_is_said():
    with pytest.warns(nj.OffloadWarning, match="nothing was offloaded"):
        nj.ActivationOffloader().verify(step, *ARGS)
