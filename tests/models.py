"""Small models that tests and benchmarks share: a GPT in linen (unrolled and scanned) and in nnx."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx


def attend(q, k, v, dtype):
    """Causal attention; scores and softmax in f32, as in `jax.nn.dot_product_attention`. [batch, length, heads, head_dim]."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    mask = jnp.tril(jnp.ones((q.shape[1], q.shape[1]), bool))
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e30))
    return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(dtype), v)


class Attention(nn.Module):
    heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        d = x.shape[-1]
        heads = (self.heads, d // self.heads)
        q, k, v = (nn.DenseGeneral(heads, dtype=self.dtype, name=n)(x) for n in ("q", "k", "v"))
        context = attend(q, k, v, self.dtype)
        return nn.DenseGeneral(d, axis=(-2, -1), dtype=self.dtype, name="out")(context)


class Block(nn.Module):
    heads: int
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    attention: type = Attention

    @nn.compact
    def __call__(self, x, train: bool = False):
        y = self.attention(self.heads, self.dtype, name="attn")(nn.LayerNorm(dtype=self.dtype)(x))
        x = x + nn.Dropout(self.dropout, deterministic=not train)(y)
        y = nn.Dense(4 * x.shape[-1], dtype=self.dtype)(nn.LayerNorm(dtype=self.dtype)(x))
        return x + nn.Dense(x.shape[-1], dtype=self.dtype)(nn.gelu(y))


class GPT(nn.Module):
    layers: int = 4
    d: int = 32
    heads: int = 4
    vocab: int = 64
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    block: type = Block

    def make_block(self, i):
        return self.block

    @nn.compact
    def __call__(self, tokens, train: bool = False):
        embed = nn.Embed(self.vocab, self.d, dtype=self.dtype, name="embed")
        x = embed(tokens) + self.param("pos", nn.initializers.normal(0.02), (tokens.shape[1], self.d)).astype(
            self.dtype
        )
        for i in range(self.layers):
            x = self.make_block(i)(self.heads, self.dropout, self.dtype, name=f"blocks_{i}")(x, train)
        return embed.attend(nn.LayerNorm(dtype=self.dtype, name="norm")(x))


class Step(nn.Module):
    heads: int

    @nn.compact
    def __call__(self, x, _):
        return Block(self.heads, name="block")(x), None


class ScannedGPT(nn.Module):
    layers: int = 4
    d: int = 32
    heads: int = 4
    vocab: int = 64

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(self.vocab, self.d, name="embed")(tokens)
        scan = nn.scan(Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers)
        x, _ = scan(self.heads, name="layers")(x, None)
        return nn.Dense(self.vocab, name="head")(x)


class NNXAttention(nnx.Module):
    def __init__(self, d, heads, *, dtype=jnp.float32, rngs):
        shape = (heads, d // heads)
        linear = lambda: nnx.LinearGeneral(d, shape, dtype=dtype, rngs=rngs)
        self.q, self.k, self.v = linear(), linear(), linear()
        self.out = nnx.LinearGeneral(shape, d, axis=(-2, -1), dtype=dtype, rngs=rngs)
        self.dtype = dtype

    def __call__(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.out(attend(q, k, v, self.dtype))


class NNXBlock(nnx.Module):
    def __init__(self, d, heads, *, dropout=0.0, dtype=jnp.float32, rngs):
        self.norm1, self.norm2 = (nnx.LayerNorm(d, dtype=dtype, rngs=rngs) for _ in range(2))
        self.attn = NNXAttention(d, heads, dtype=dtype, rngs=rngs)
        self.up = nnx.Linear(d, 4 * d, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(4 * d, d, dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x):
        x = x + self.dropout(self.attn(self.norm1(x)))
        return x + self.down(jax.nn.gelu(self.up(self.norm2(x))))


class NNXGPT(nnx.Module):
    def __init__(self, layers=4, d=32, heads=4, vocab=64, length=16, *, dropout=0.0, dtype=jnp.float32, rngs):
        self.embed = nnx.Embed(vocab, d, dtype=dtype, rngs=rngs)
        self.pos = nnx.Param(0.02 * jax.random.normal(rngs.params(), (length, d)))
        self.blocks = nnx.List([NNXBlock(d, heads, dropout=dropout, dtype=dtype, rngs=rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(d, dtype=dtype, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = x + self.pos[...].astype(x.dtype)
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(self.norm(x))


def loss_of(logits, tokens):
    logp = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.mean(jnp.take_along_axis(logp, tokens[..., None], -1))


def linen_loss(model, tokens, **kwargs):
    return lambda params: loss_of(model.apply(params, tokens, **kwargs), tokens)
