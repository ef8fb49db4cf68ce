"""Small models that tests and benchmarks share: a GPT in linen (unrolled and scanned) and in nnx."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name


def attend(q, k, v, dtype, dot=jax.lax.dot_general):
    """Causal attention; scores and softmax in f32, as in `jax.nn.dot_product_attention`. [batch, length, heads, head_dim]."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    mask = jnp.tril(jnp.ones((q.shape[1], q.shape[1]), bool))
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e30))
    return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(dtype), v, _dot_general=dot)


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


# The boundaries of three policies as one would write them by hand.

KEPT_BY_HAND = jax.checkpoint_policies.save_only_these_names("kept")


def kept_dot(*args, **kwargs):
    return checkpoint_name(jax.lax.dot_general(*args, **kwargs), "kept")


class NamedAttention(Attention):
    """The attention with a name on what HEAVY_OPS keeps: the outputs of the weight matmuls, and the context."""

    @nn.compact
    def __call__(self, x):
        d = x.shape[-1]
        dense = functools.partial(nn.DenseGeneral, dtype=self.dtype, dot_general=kept_dot)
        q, k, v = (dense((self.heads, d // self.heads), name=n)(x) for n in ("q", "k", "v"))
        return dense(d, axis=(-2, -1), name="out")(attend(q, k, v, self.dtype, kept_dot))


class HandAttentionBlock(Block):
    attention: type = nn.remat(NamedAttention, policy=KEPT_BY_HAND)


class HandAlternate(GPT):
    def make_block(self, i):
        return nn.remat(Block, static_argnums=(2,)) if i % 2 == 0 else Block


def gpt_by_hand(policy, **sizes):
    match policy:
        case "all":
            return GPT(**sizes, block=nn.remat(Block, static_argnums=(2,)))
        case "alternate":
            return HandAlternate(**sizes)
        case "heavy_ops":
            return GPT(**sizes, block=HandAttentionBlock)


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


class NNXHandBlock(NNXBlock):
    __call__ = nnx.remat(NNXBlock.__call__)


class NNXNamedAttention(NNXAttention):
    @nnx.remat(policy=KEPT_BY_HAND)
    def __call__(self, x):
        for linear in (self.q, self.k, self.v, self.out):
            linear.dot_general = kept_dot
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.out(attend(q, k, v, self.dtype, kept_dot))


def nnx_gpt_by_hand(policy, plain):
    """A copy of an NNXGPT with the boundaries of a policy written by hand."""
    model = nnx.clone(plain)
    for i, block in enumerate(model.blocks):
        if policy == "all" or (policy == "alternate" and i % 2 == 0):
            object.__setattr__(block, "__class__", NNXHandBlock)
        if policy == "heavy_ops":
            object.__setattr__(block.attn, "__class__", NNXNamedAttention)
    return model


def loss_of(logits, tokens):
    logp = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.mean(jnp.take_along_axis(logp, tokens[..., None], -1))


def linen_loss(model, tokens, **kwargs):
    return lambda params: loss_of(model.apply(params, tokens, **kwargs), tokens)
