"""Train a byte-level GPT (Flax linen) on Python's standard library, under a policy of nexus_jax.

python examples/train_gpt.py --policy heavy_ops
python examples/train_gpt.py --compare --out out
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence

import common
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import nexus_jax

VOCAB = 256  # bytes
# Not the library: what pip installed, and its tests (tables of escapes, files that are broken on purpose).
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
VALIDATION_BATCHES = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(common.Config):
    length: int = common.flag(128, "bytes of one sequence")


# --- the model: plain Flax, which knows nothing of nexus_jax ------------------------------------------------


class Block(nn.Module):
    heads: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = x + nn.MultiHeadDotProductAttention(self.heads, name="attn")(nn.LayerNorm()(x), mask=mask)
        return x + nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x))))


class GPT(nn.Module):
    layers: int
    d_model: int
    heads: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = nn.Embed(VOCAB, self.d_model, name="embed")
        x = embed(tokens) + self.param("pos", nn.initializers.normal(0.02), (tokens.shape[1], self.d_model))
        mask = nn.make_causal_mask(tokens)
        for i in range(self.layers):
            x = Block(self.heads, name=f"blocks_{i}")(x, mask)
        return embed.attend(nn.LayerNorm(name="norm")(x))


# --- the text -----------------------------------------------------------------------------------------------


def corpus() -> tuple[np.ndarray, np.ndarray]:
    """Bytes to train on, and bytes of files that are held out; the same on every machine with this Python."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIPPED.isdisjoint(name.parts):
            # Python's own hash differs from run to run.
            held_out = hashlib.sha256(name.as_posix().encode()).digest()[0] % 10 == 0
            parts[held_out].append(path.read_bytes())
    train, held_out = (np.frombuffer(b"\0".join(parts[k]), np.uint8) for k in (False, True))  # \0 ends a file
    return train, held_out


@dataclasses.dataclass(frozen=True)
class Windows:
    """Endless random stretches of a text, one byte longer than a sequence; iterating again starts again."""

    text: np.ndarray
    batch: int
    length: int
    seed: int

    def __iter__(self) -> Iterator[common.Batch]:
        rng = np.random.default_rng(self.seed)
        while True:
            starts = rng.integers(len(self.text) - self.length, size=self.batch)
            yield (jnp.asarray(self.text[starts[:, None] + np.arange(self.length + 1)]),)


# --- training -----------------------------------------------------------------------------------------------


def transformed(config: Config) -> tuple[nn.Module, Callable[..., jax.Array]]:
    """The model of a configuration under its policy, and its loss as a function of parameters and text."""
    plain = GPT(config.layers, config.d_model, config.heads)
    model = nexus_jax.apply_selective_checkpointing(plain, common.checkpointing(config))

    def loss(params, text):
        tokens = text.astype(jnp.int32)
        logits = model.apply(params, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    return model, loss


def workload(policy="heavy_ops", batch=16, length=128, layers=4, d_model=128, heads=4):
    """For ``nexus-jax``: the loss, and its arguments as shapes.

    nexus-jax compare examples/train_gpt.py:workload --target v5e --set d_model=1024 --set layers=12
    """
    config = Config(policy=policy, batch=batch, length=length, layers=layers, d_model=d_model, heads=heads)
    model, loss = transformed(config)
    tokens = jax.ShapeDtypeStruct((config.batch, config.length), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(config.seed), tokens)
    return loss, (params, jax.ShapeDtypeStruct((config.batch, config.length + 1), jnp.uint8))


def build(config: Config, held_out: np.ndarray) -> common.Trainee:
    """The model of a configuration, under its policy, with a compiled step."""
    model, loss = transformed(config)
    tx = common.optimizer(config)

    def train_step(state, text):
        params, opt_state = state
        value, grads = jax.value_and_grad(loss)(params, text)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    window = jax.ShapeDtypeStruct((config.batch, config.length + 1), jnp.uint8)
    params = model.init(jax.random.key(config.seed), jnp.zeros((config.batch, config.length), jnp.int32))
    state = (params, tx.init(params))
    step = jax.jit(train_step, donate_argnums=0).lower(state, window).compile()
    compiled_loss = jax.jit(loss)

    def advance(text):
        nonlocal state  # the old one was donated to the step
        state, value = step(state, text)
        return value

    def validation_loss() -> float:
        windows = iter(Windows(held_out, config.batch, config.length, seed=0))
        return float(np.mean([compiled_loss(state[0], *next(windows)) for _ in range(VALIDATION_BATCHES)]))

    return common.Trainee(
        loss=loss,
        params=common.shapes(params),
        step=step,
        advance=advance,
        score=validation_loss,
    )


def main(argv: Sequence[str] | None = None) -> int:
    config = common.parse(Config, "Train a byte-level GPT on the source of Python's standard library.", argv)
    train, held_out = corpus()
    print(f"text: {len(train) / 1e6:.1f} MB to train on, {len(held_out) / 1e6:.1f} MB held out")
    windows = Windows(train, config.batch, config.length, config.seed)
    return common.run(config, lambda c: build(c, held_out), windows, "gpt", "validation loss")


if __name__ == "__main__":
    sys.exit(main())
