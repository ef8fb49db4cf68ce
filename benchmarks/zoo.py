"""Small models of very different kind, as workloads: `nexus-jax compare benchmarks/zoo.py:bert`.

Each is a function `name(policy="none") -> (loss, abstract arguments)`; nothing is computed. They are what the model of
the device peak and the planner are measured on, small enough to compile in seconds.
"""

import pathlib
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

import nexus_jax as nj

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))
import models

BF16 = jnp.bfloat16


def _shape(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def _tokens(batch, length):
    return _shape(batch, length, dtype=jnp.int32)


def _wrapped(model, policy):
    return model if policy == "none" else nj.apply_selective_checkpointing(model, policy)


def _language_model(model, policy, batch, length, **kwargs):
    model, tokens = _wrapped(model, policy), _tokens(batch, length)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    return (lambda p, t: models.loss_of(model.apply(p, t, **kwargs), t)), (params, tokens)


# --- language models -------------------------------------------------------------------------------------------------


def gpt(policy="none", batch=8, length=512, layers=4, d=512, vocab=8192, heads=8):
    """A GPT whose layers are unrolled, bf16 activations and f32 parameters."""
    model = models.GPT(layers=layers, d=d, heads=heads, vocab=vocab, dtype=BF16)
    return _language_model(model, policy, batch, length)


def gpt_f32(policy="none", batch=4, length=384, layers=2, d=384, vocab=4096, heads=6):
    """The same in f32, with sizes that are no powers of two."""
    return _language_model(models.GPT(layers=layers, d=d, heads=heads, vocab=vocab), policy, batch, length)


def gpt_scanned(policy="none", batch=8, length=512, layers=8, d=512, vocab=8192, heads=8):
    """A GPT whose layers are one `nn.scan`, f32."""
    return _language_model(models.ScannedGPT(layers=layers, d=d, heads=heads, vocab=vocab), policy, batch, length)


def gpt_nnx(policy="none", batch=8, length=512, layers=3, d=512, vocab=8192, heads=8):
    """The unrolled GPT in nnx."""
    make = lambda: models.NNXGPT(layers, d, heads, vocab, length, dtype=BF16, rngs=nnx.Rngs(0))
    model = _wrapped(nnx.eval_shape(make), policy)
    return (lambda m, t: models.loss_of(m(t), t)), (model, _tokens(batch, length))


def bert(policy="none", batch=16, length=256, layers=4, d=512, vocab=8192, heads=8):
    """A masked language model with dropout, bf16: the random keys are an argument."""
    model = _wrapped(models.GPT(layers=layers, d=d, heads=heads, vocab=vocab, dropout=0.1, dtype=BF16), policy)
    tokens = _tokens(batch, length)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)

    def loss(params, tokens, key):
        rngs = {"dropout": jax.random.wrap_key_data(key)}
        return models.loss_of(model.apply(params, tokens, train=True, rngs=rngs), tokens)

    return loss, (params, tokens, _shape(2, dtype=jnp.uint32))


class RMSNorm(nn.Module):
    dtype: jnp.dtype = BF16

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x = x.astype(jnp.float32)
        return (x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale).astype(self.dtype)


def _rotate(x):
    angles = jnp.arange(x.shape[1])[:, None] * 10000.0 ** -jnp.linspace(0, 1, x.shape[-1] // 2)
    sin, cos = jnp.sin(angles)[None, :, None], jnp.cos(angles)[None, :, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


class LlamaBlock(nn.Module):
    heads: int
    groups: int

    @nn.compact
    def __call__(self, x):
        d = x.shape[-1]
        dense = lambda n, name: nn.DenseGeneral(n, use_bias=False, dtype=BF16, name=name)
        y = RMSNorm()(x)
        q, k = (_rotate(dense((n, d // self.heads), s)(y)) for n, s in ((self.heads, "q"), (self.groups, "k")))
        v = dense((self.groups, d // self.heads), "v")(y)
        k, v = (jnp.repeat(a, self.heads // self.groups, 2) for a in (k, v))
        y = models.attend(q, k, v, BF16)
        x = x + nn.DenseGeneral(d, axis=(-2, -1), use_bias=False, dtype=BF16, name="out")(y)
        y = RMSNorm()(x)
        return x + dense(d, "down")(nn.silu(dense(3 * d, "gate")(y)) * dense(3 * d, "up")(y))


class Llama(nn.Module):
    layers: int
    d: int
    heads: int
    vocab: int

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(self.vocab, self.d, dtype=BF16, name="embed")(tokens)
        for i in range(self.layers):
            x = LlamaBlock(self.heads, self.heads // 4, name=f"blocks_{i}")(x)
        return nn.Dense(self.vocab, use_bias=False, dtype=BF16, name="head")(RMSNorm()(x))


def llama(policy="none", batch=4, length=512, layers=3, d=512, vocab=8192, heads=8):
    """RMSNorm, rotary positions, grouped keys, gated MLP, untied head, bf16."""
    return _language_model(Llama(layers, d, heads, vocab), policy, batch, length)


class Experts(nn.Module):
    experts: int
    capacity: int

    @nn.compact
    def __call__(self, x):
        d, e, c = x.shape[-1], self.experts, self.capacity
        gates = jax.nn.softmax(nn.Dense(e, name="router")(x.astype(jnp.float32)))
        chosen = jax.nn.one_hot(jnp.argmax(gates, -1), e)
        position = jnp.cumsum(chosen, 1) * chosen - 1
        dispatch = jax.nn.one_hot(position.astype(jnp.int32), c, dtype=BF16) * chosen[..., None].astype(BF16)
        combine = dispatch * gates[..., None].astype(BF16)
        up = self.param("up", nn.initializers.normal(), (e, d, 4 * d)).astype(BF16)
        down = self.param("down", nn.initializers.normal(), (e, 4 * d, d)).astype(BF16)
        y = jnp.einsum("gsec,gsd->egcd", dispatch, x)
        y = nn.gelu(jnp.einsum("egcd,edf->egcf", y, up))
        y = jnp.einsum("egcf,efd->egcd", y, down)
        return jnp.einsum("gsec,egcd->gsd", combine, y)


class MoEBlock(nn.Module):
    heads: int
    experts: int

    @nn.compact
    def __call__(self, x):
        x = x + models.Attention(self.heads, BF16, name="attn")(nn.LayerNorm(dtype=BF16)(x))
        capacity = 2 * x.shape[1] // self.experts
        return x + Experts(self.experts, capacity, name="experts")(nn.LayerNorm(dtype=BF16)(x))


class MoE(nn.Module):
    layers: int
    d: int
    heads: int
    vocab: int
    experts: int

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(self.vocab, self.d, dtype=BF16, name="embed")(tokens)
        for i in range(self.layers):
            x = MoEBlock(self.heads, self.experts, name=f"blocks_{i}")(x)
        return nn.Dense(self.vocab, dtype=BF16, name="head")(nn.LayerNorm(dtype=BF16)(x))


def moe(policy="none", batch=8, length=256, layers=2, d=384, vocab=4096, heads=6, experts=8):
    """A mixture of experts that dispatches by einsum."""
    return _language_model(MoE(layers, d, heads, vocab, experts), policy, batch, length)


class OffloadStep(nn.Module):
    heads: int

    @nn.compact
    def __call__(self, x, _):
        return models.Block(self.heads, dtype=BF16, name="block")(checkpoint_name(x, "block_input")), None


class OffloadGPT(nn.Module):
    layers: int
    d: int
    heads: int
    vocab: int

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(self.vocab, self.d, dtype=BF16, name="embed")(tokens)
        policy = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=["block_input"],
            offload_src="device",
            offload_dst="pinned_host",
        )
        step = nn.remat(OffloadStep, policy=policy, prevent_cse=False)
        scan = nn.scan(step, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers)
        x, _ = scan(self.heads, name="layers")(x, None)
        return nn.Dense(self.vocab, dtype=BF16, name="head")(x)


def scan_offload(policy="none", batch=8, length=512, layers=8, d=512, vocab=8192, heads=8):
    """`nn.remat` inside `nn.scan` as people write it, with every layer's input on the host."""
    if policy != "none":
        raise ValueError(f"{policy=}: scan_offload has its own.")
    return _language_model(OffloadGPT(layers, d, heads, vocab), policy, batch, length)


# --- vision ----------------------------------------------------------------------------------------------------------


class ViT(nn.Module):
    layers: int
    d: int
    heads: int
    patch: int
    classes: int = 1000

    @nn.compact
    def __call__(self, images):
        p = (self.patch, self.patch)
        x = nn.Conv(self.d, p, strides=p, dtype=BF16, name="patches")(images)
        x = x.reshape(x.shape[0], -1, self.d)
        first = jnp.zeros((x.shape[0], 1, self.d), BF16) + self.param("cls", nn.initializers.zeros, (self.d,)).astype(
            BF16
        )
        x = jnp.concatenate([first, x], 1)
        x = x + self.param("pos", nn.initializers.normal(0.02), x.shape[1:]).astype(BF16)
        for i in range(self.layers):
            x = models.Block(self.heads, dtype=BF16, name=f"blocks_{i}")(x)
        return nn.Dense(self.classes, name="head")(nn.LayerNorm(name="norm")(x[:, 0]))


def _cross_entropy(logits, labels):
    logp = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.mean(jnp.take_along_axis(logp, labels[..., None], -1))


def vit(policy="none", batch=32, size=224, patch=16, layers=3, d=384, heads=6):
    """A vision transformer: 197 tokens, so that nothing is a round number."""
    model = _wrapped(ViT(layers, d, heads, patch), policy)
    images, labels = _shape(batch, size, size, 3), _shape(batch, dtype=jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)
    return (lambda p, x, y: _cross_entropy(model.apply(p, x), y)), (params, images, labels)


class ConvBlock(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = nn.Conv(self.features, (3, 3), dtype=BF16, name=f"conv_{i}")(x)
            x = nn.relu(nn.GroupNorm(8, dtype=BF16, name=f"norm_{i}")(x))
        return x


class UNet(nn.Module):
    widths: tuple
    out: int = 1

    @nn.compact
    def __call__(self, x):
        skips = []
        for i, width in enumerate(self.widths):
            x = ConvBlock(width, name=f"down_{i}")(x)
            skips.append(x)
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = ConvBlock(2 * self.widths[-1], name="middle")(x)
        for i, (width, skip) in enumerate(zip(reversed(self.widths), reversed(skips), strict=True)):
            x = nn.ConvTranspose(width, (2, 2), strides=(2, 2), dtype=BF16, name=f"up_{i}")(x)
            x = ConvBlock(width, name=f"merge_{i}")(jnp.concatenate([x, skip], -1))
        return nn.Conv(self.out, (1, 1), name="out")(x)


def unet(policy="none", batch=16, size=128, widths=(32, 64, 128)):
    """A convolutional U-Net whose skips live from one end of the step to the other."""
    model = _wrapped(UNet(widths), policy)
    images, wanted = _shape(batch, size, size, 3), _shape(batch, size, size, 1)
    params = jax.eval_shape(model.init, jax.random.key(0), images)
    return (lambda p, x, y: jnp.mean((model.apply(p, x) - y) ** 2)), (params, images, wanted)


# --- neither ---------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x):
        return nn.tanh(nn.Dense(self.features, name="dense")(x))


class MLP(nn.Module):
    widths: tuple

    @nn.compact
    def __call__(self, x):
        for i, width in enumerate(self.widths):
            x = Layer(width, name=f"layer_{i}")(x)
        return nn.Dense(1, name="out")(x)


def mlp(policy="none", batch=4096, widths=(512, 4096, 256, 8192, 128, 2048, 2048, 512)):
    """Layers of very unequal width, f32."""
    model = _wrapped(MLP(tuple(widths)), policy)
    x, y = _shape(batch, 256), _shape(batch, 1)
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    return (lambda p, x, y: jnp.mean((model.apply(p, x) - y) ** 2)), (params, x, y)
