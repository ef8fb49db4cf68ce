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


class Decoder(nn.Module):
    heads: int

    @nn.compact
    def __call__(self, x, read):
        norm = lambda name: nn.LayerNorm(dtype=BF16, use_bias=False, name=name)
        attend = lambda name: nn.MultiHeadDotProductAttention(self.heads, dtype=BF16, use_bias=False, name=name)
        mask = nn.make_causal_mask(jnp.ones(x.shape[:2]))
        y = norm("norm_0")(x)
        x = x + attend("own")(y, y, mask=mask)
        x = x + attend("cross")(norm("norm_1")(x), read)
        y = nn.relu(nn.Dense(4 * x.shape[-1], use_bias=False, dtype=BF16, name="up")(norm("norm_2")(x)))
        return x + nn.Dense(x.shape[-1], use_bias=False, dtype=BF16, name="down")(y)


class Translator(nn.Module):
    layers: int
    d: int
    heads: int
    vocab: int

    @nn.compact
    def __call__(self, source, target):
        embed = nn.Embed(self.vocab, self.d, dtype=BF16, name="embed")
        x, y = embed(source), embed(target)
        for i in range(self.layers):
            x = models.Block(self.heads, dtype=BF16, name=f"encoder_{i}")(x)
        x = nn.LayerNorm(dtype=BF16, name="norm")(x)
        for i in range(self.layers):
            y = Decoder(self.heads, name=f"decoder_{i}")(y, x)
        return embed.attend(nn.LayerNorm(dtype=BF16, name="last")(y))


def translator(policy="none", batch=16, length=320, answer=96, layers=3, d=384, vocab=12000, heads=6):
    """Encoder and decoder: every decoder layer reads the encoder's result, which lives from the middle to the end."""
    model = _wrapped(Translator(layers, d, heads, vocab), policy)
    source, target = _tokens(batch, length), _tokens(batch, answer)
    params = jax.eval_shape(model.init, jax.random.key(0), source, target)
    return (lambda p, s, t: models.loss_of(model.apply(p, s, t), t)), (params, source, target)


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


class Patches(nn.Module):
    layers: int
    d: int
    heads: int

    @nn.compact
    def __call__(self, patches):
        x = nn.Dense(self.d, dtype=BF16, name="project")(patches)
        x = x + self.param("pos", nn.initializers.normal(0.02), x.shape[1:]).astype(BF16)
        for i in range(self.layers):
            x = models.Block(self.heads, dtype=BF16, name=f"blocks_{i}")(x)
        return nn.Dense(patches.shape[-1], name="out")(nn.LayerNorm(dtype=BF16, name="norm")(x))


def patches(policy="none", batch=24, tokens=145, features=588, layers=4, d=256, heads=4):
    """A masked autoencoder's encoder: 145 tokens, small enough for most of it to fit on a TPU's chip."""
    model = _wrapped(Patches(layers, d, heads), policy)
    x = _shape(batch, tokens, features)
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    return (lambda p, x: jnp.mean((model.apply(p, x) - x) ** 2)), (params, x)


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


class Residual(nn.Module):
    features: int
    strides: int

    @nn.compact
    def __call__(self, x):
        conv = lambda n, kernel, strides, name: nn.Conv(n, kernel, strides, use_bias=False, dtype=BF16, name=name)
        norm = lambda name: nn.BatchNorm(use_running_average=False, dtype=BF16, name=name)
        y = nn.relu(norm("norm_0")(conv(self.features, (1, 1), 1, "conv_0")(x)))
        y = nn.relu(norm("norm_1")(conv(self.features, (3, 3), self.strides, "conv_1")(y)))
        y = norm("norm_2")(conv(4 * self.features, (1, 1), 1, "conv_2")(y))
        if x.shape != y.shape:
            x = norm("norm")(conv(4 * self.features, (1, 1), self.strides, "conv")(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    stages: tuple

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(64, (7, 7), 2, use_bias=False, dtype=BF16, name="stem")(x)
        x = nn.max_pool(nn.relu(nn.BatchNorm(use_running_average=False, dtype=BF16, name="norm")(x)), (3, 3), (2, 2))
        for i, count in enumerate(self.stages):
            for j in range(count):
                x = Residual(64 * 2**i, 2 if i and not j else 1, name=f"stage_{i}_{j}")(x)
        return nn.Dense(1000, name="head")(jnp.mean(x.astype(jnp.float32), (1, 2)))


def resnet(policy="none", batch=32, size=160, stages=(2, 2, 2)):
    """Bottleneck blocks with batch statistics, which the loss returns beside its value."""
    model = _wrapped(ResNet(stages), policy)
    images, labels = _shape(batch, size, size, 3), _shape(batch, dtype=jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)

    def loss(params, stats, x, y):
        logits, _ = model.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
        return _cross_entropy(logits, y)

    return loss, (variables["params"], variables["batch_stats"], images, labels)


# --- sequences without attention -------------------------------------------------------------------------------------


class Dilated(nn.Module):
    features: int
    dilation: int

    @nn.compact
    def __call__(self, x):
        conv = lambda name: nn.Conv(self.features, (3,), kernel_dilation=self.dilation, name=name)
        y = nn.tanh(conv("filter")(x)) * nn.sigmoid(conv("gate")(x))
        return x + nn.Dense(self.features, name="mix")(y), nn.Dense(2 * self.features, name="skip")(y)


class WaveNet(nn.Module):
    layers: int
    features: int

    @nn.compact
    def __call__(self, x):
        x, total = nn.Conv(self.features, (1,), name="first")(x), 0
        for i in range(self.layers):
            x, skip = Dilated(self.features, 2**i, name=f"dilated_{i}")(x)
            total = total + skip
        return nn.Dense(256, name="out")(nn.relu(nn.Dense(2 * self.features, name="last")(nn.relu(total))))


def wavenet(policy="none", batch=8, length=4000, layers=7, features=96):
    """Dilated convolutions over sound, gated, every layer's output summed at the end, f32."""
    model = _wrapped(WaveNet(layers, features), policy)
    x, y = _shape(batch, length, 1), _shape(batch, length, dtype=jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    return (lambda p, x, y: _cross_entropy(model.apply(p, x), y)), (params, x, y)


class Recurrent(nn.Module):
    layers: int
    d: int
    vocab: int

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(self.vocab, self.d, name="embed")(tokens)
        for i in range(self.layers):
            x = x + nn.RNN(nn.GRUCell(self.d), name=f"rnn_{i}")(x)
        return nn.Dense(self.vocab, name="head")(x)


def recurrent(policy="none", batch=32, length=192, layers=2, d=384, vocab=2000):
    """GRUs: a scan over time for each layer, f32."""
    return _language_model(Recurrent(layers, d, vocab), policy, batch, length)


# --- neither ---------------------------------------------------------------------------------------------------------


class Interactions(nn.Module):
    tables: int
    rows: int
    d: int

    @nn.compact
    def __call__(self, numbers, ids):
        x = numbers
        for i, width in enumerate((256, self.d)):
            x = nn.relu(nn.Dense(width, name=f"bottom_{i}")(x))
        found = [nn.Embed(self.rows, self.d, name=f"table_{i}")(ids[:, i]) for i in range(self.tables)]
        every = jnp.stack([x, *found], 1)
        pairs = jnp.einsum("bid,bjd->bij", every, every)
        x = jnp.concatenate([x, pairs.reshape(len(x), -1)], -1)
        for i, width in enumerate((1024, 512, 256)):
            x = nn.relu(nn.Dense(width, name=f"top_{i}")(x))
        return nn.Dense(1, name="out")(x)[:, 0]


def recommender(policy="none", batch=16384, tables=12, rows=20000, d=64):
    """Embedding tables, products of all pairs, an MLP: the parameters are larger than what is computed, f32."""
    model = _wrapped(Interactions(tables, rows, d), policy)
    numbers, ids, clicked = _shape(batch, 13), _shape(batch, tables, dtype=jnp.int32), _shape(batch)
    params = jax.eval_shape(model.init, jax.random.key(0), numbers, ids)

    def loss(params, numbers, ids, clicked):
        logits = model.apply(params, numbers, ids)
        return jnp.mean(jnp.logaddexp(0, logits) - clicked * logits)

    return loss, (params, numbers, ids, clicked)


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
