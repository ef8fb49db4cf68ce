"""Train a vision transformer (Flax nnx) on scikit-learn's handwritten digits, under a policy of nexus_jax.

python examples/train_vit_nnx.py --policy heavy_ops
python examples/train_vit_nnx.py --compare --out out
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import nexus_jax

PIXELS, PATCH, CLASSES = 8, 2, 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(common.Config):
    steps: int = common.flag(600, common.STEPS_HELP)
    batch: int = common.flag(64, "images of one step")
    d_model: int = common.flag(64, "width")
    lr: float = common.flag(2e-3, "learning rate after warm-up")
    auto_min_params: int = common.flag(20_000, "auto recomputes modules of more parameters than this")


# --- the model: plain Flax, which knows nothing of nexus_jax ------------------------------------------------


class Block(nnx.Module):
    def __init__(self, d: int, heads: int, *, rngs: nnx.Rngs):
        self.norm1, self.norm2 = nnx.LayerNorm(d, rngs=rngs), nnx.LayerNorm(d, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(heads, d, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(d, 4 * d, rngs=rngs), nnx.Linear(4 * d, d, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attn(self.norm1(x))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class ViT(nnx.Module):
    def __init__(self, layers: int, d: int, heads: int, *, rngs: nnx.Rngs):
        self.embed = nnx.Linear(PATCH**2, d, rngs=rngs)
        self.pos = nnx.Param(0.02 * jax.random.normal(rngs.params(), ((PIXELS // PATCH) ** 2, d)))
        self.blocks = nnx.List([Block(d, heads, rngs=rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(d, rngs=rngs)
        self.head = nnx.Linear(d, CLASSES, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        side = PIXELS // PATCH
        patches = images.reshape(-1, side, PATCH, side, PATCH).swapaxes(2, 3).reshape(-1, side**2, PATCH**2)
        x = self.embed(patches) + self.pos[...]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(axis=1))


# --- the images ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Digits:
    """Images in [0, 1] and their labels."""

    images: np.ndarray
    labels: np.ndarray


def digits() -> tuple[Digits, Digits]:
    """Images to train on, and a fifth held out for the test, whatever the seed of the run."""
    data = load_digits()
    images, labels = (data.images / 16).astype(np.float32), data.target.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(labels))
    test, train = np.split(order, [len(order) // 5])
    return Digits(images[train], labels[train]), Digits(images[test], labels[test])


@dataclasses.dataclass(frozen=True)
class Batches:
    """Endless random batches; iterating again starts again."""

    data: Digits
    batch: int
    seed: int

    def __iter__(self) -> Iterator[common.Batch]:
        rng = np.random.default_rng(self.seed)
        while True:
            picked = rng.integers(len(self.data.labels), size=self.batch)
            yield jnp.asarray(self.data.images[picked]), jnp.asarray(self.data.labels[picked])


# --- training -----------------------------------------------------------------------------------------------


def loss_of(model: ViT, images: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()


@nnx.jit(donate_argnums=(0, 1))
def train_step(model: ViT, opt: nnx.Optimizer, images: jax.Array, labels: jax.Array) -> jax.Array:
    value, grads = nnx.value_and_grad(loss_of)(model, images, labels)
    opt.update(model, grads)
    return value


@nnx.jit
def correct(model: ViT, images: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.mean(model(images).argmax(-1) == labels)


def workload(policy="heavy_ops", batch=16, layers=4, d_model=128, heads=4):
    """For ``nexus-jax``: the loss, and its arguments as shapes (the model among them)."""
    config = Config(policy=policy, batch=batch, layers=layers, d_model=d_model, heads=heads)
    plain = nnx.eval_shape(lambda: ViT(layers, d_model, heads, rngs=nnx.Rngs(0)))
    model = nexus_jax.apply_selective_checkpointing(plain, common.checkpointing(config))
    images = jax.ShapeDtypeStruct((batch, PIXELS, PIXELS), jnp.float32)
    return loss_of, (model, images, jax.ShapeDtypeStruct((batch,), jnp.int32))


def build(config: Config, test: Digits) -> common.Trainee:
    """The model of a configuration, under its policy, with a compiled step."""
    plain = ViT(config.layers, config.d_model, config.heads, rngs=nnx.Rngs(config.seed))
    model = nexus_jax.apply_selective_checkpointing(plain, common.checkpointing(config))
    opt = nnx.Optimizer(model, common.optimizer(config), wrt=nnx.Param)
    images = jax.ShapeDtypeStruct((config.batch, PIXELS, PIXELS), jnp.float32)
    labels = jax.ShapeDtypeStruct((config.batch,), jnp.int32)
    step = train_step.lower(model, opt, images, labels).compile()
    graph, state = nnx.split(model)
    return common.Trainee(
        loss=lambda state, *batch: loss_of(nnx.merge(graph, state), *batch),
        params=common.shapes(state),
        step=step,
        advance=lambda *batch: step(model, opt, *batch),
        score=lambda: float(correct(model, test.images, test.labels)),
    )


def main(argv: Sequence[str] | None = None) -> int:
    config = common.parse(Config, "Train a vision transformer on handwritten digits.", argv)
    train, test = digits()
    print(f"images: {len(train.labels)} to train on, {len(test.labels)} held out")
    batches = Batches(train, config.batch, config.seed)
    return common.run(config, lambda c: build(c, test), batches, "vit_nnx", "test accuracy")


if __name__ == "__main__":
    sys.exit(main())
