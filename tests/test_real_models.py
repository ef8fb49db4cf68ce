"""Models as people write them, in both frameworks: a ResNet, an encoder-decoder, an LSTM, a mixture of experts."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from checks import check_linen, check_nnx
from flax import nnx

import nexus_jax as nj

IMAGES = jnp.linspace(-1, 1, 2 * 8 * 8 * 3).reshape(2, 8, 8, 3)
SOURCE, TARGET = jnp.arange(24).reshape(2, 12) % 50, jnp.arange(16).reshape(2, 8) % 50
X = jnp.linspace(-1, 1, 2 * 6 * 16).reshape(2, 6, 16)
DROPOUT = {"rngs": {"dropout": jax.random.key(7)}}


# --- linen ----------------------------------------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    filters: int
    strides: int = 1

    @nn.compact
    def __call__(self, x, train):
        conv = functools.partial(nn.Conv, self.filters, use_bias=False)
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        y = nn.relu(norm()(conv((3, 3), self.strides)(x)))
        y = norm(scale_init=nn.initializers.zeros)(conv((3, 3))(y))
        if y.shape != x.shape:
            x = norm(name="norm_proj")(conv((1, 1), self.strides, name="conv_proj")(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Conv(8, (3, 3), name="stem")(x)
        for stage in range(2):
            for i in range(3):
                x = ResidualBlock(8 * 2**stage, 2 if stage and not i else 1)(x, train=train)
        return nn.Dense(10)(x.mean((1, 2)))


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x, *, deterministic):
        y = nn.Dropout(0.1)(nn.gelu(nn.Dense(64)(x)), deterministic=deterministic)
        return nn.Dense(x.shape[-1])(y)


class EncoderLayer(nn.Module):
    @nn.compact
    def __call__(self, x, mask, *, deterministic):
        attend = nn.MultiHeadDotProductAttention(4, dropout_rate=0.1)
        x = x + attend(nn.LayerNorm()(x), mask=mask, deterministic=deterministic)
        return x + Mlp()(nn.LayerNorm()(x), deterministic=deterministic)


class DecoderLayer(nn.Module):
    @nn.compact
    def __call__(self, x, memory, self_mask=None, cross_mask=None, *, deterministic):
        attend = functools.partial(nn.MultiHeadDotProductAttention, 4, dropout_rate=0.1, deterministic=deterministic)
        x = x + attend(name="self_attn")(nn.LayerNorm()(x), mask=self_mask)
        x = x + attend(name="cross_attn")(nn.LayerNorm()(x), memory, mask=cross_mask)
        return x + Mlp()(nn.LayerNorm()(x), deterministic=deterministic)


class Seq2Seq(nn.Module):
    def setup(self):
        self.embed = nn.Embed(50, 32)
        self.encoder = [EncoderLayer() for _ in range(2)]
        self.decoder = [DecoderLayer() for _ in range(2)]

    def __call__(self, source, target, *, train):
        memory, mask = self.embed(source), nn.make_attention_mask(source > 0, source > 0)
        for layer in self.encoder:
            memory = layer(memory, mask, deterministic=not train)
        x = self.embed(target)
        for layer in self.decoder:
            x = layer(x, memory, self_mask=nn.make_causal_mask(target), deterministic=not train)
        return self.embed.attend(x)


class Lstm(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.RNN(nn.LSTMCell(16))(x)
        return nn.Dense(3)(x)


class ScannedCell(nn.Module):
    @nn.compact
    def __call__(self, x):
        scan = functools.partial(nn.scan, variable_broadcast="params", split_rngs={"params": False})
        cell = scan(nn.GRUCell, in_axes=1, out_axes=1)(16)
        return nn.Dense(3)(cell(cell.initialize_carry(jax.random.key(0), x[:, 0].shape), x)[1])


class Expert(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(16)(nn.gelu(nn.Dense(32)(x)))


class MoeLayer(nn.Module):
    @nn.compact
    def __call__(self, x):
        gates = nn.softmax(nn.Dense(4, name="router")(x))
        self.sow("losses", "balance", gates.mean())
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        experts = nn.vmap(Expert, in_axes=None, out_axes=0, axis_size=4, **axes)(name="experts")
        return x + jnp.einsum("ebtd,bte->btd", experts(nn.LayerNorm()(x)), gates)


class Moe(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(3):
            x = MoeLayer(name=f"layer_{i}")(x)
        return x


BLOCKS = {("ResidualBlock_" + i,) for i in "01245"}  # the second stage's first block changes the shape: no family
LINEN = {
    "resnet, all": (ResNet(), (IMAGES,), "all", {"mutable": ["batch_stats"]}, BLOCKS),
    "resnet, alternate": (
        ResNet(), (IMAGES,), "alternate", {"mutable": ["batch_stats"]}, {("ResidualBlock_0",), ("ResidualBlock_2",), ("ResidualBlock_4",)},
    ),
    "encoder-decoder, all": (
        Seq2Seq(), (SOURCE, TARGET), "all", {"train": True, **DROPOUT}, {(f"{s}_{i}",) for s in ("encoder", "decoder") for i in (0, 1)},
    ),
    "encoder-decoder, alternate": (  # decoder_1, with its two attentions, is left alone as a whole
        Seq2Seq(), (SOURCE, TARGET), "alternate", {"train": True, **DROPOUT}, {("encoder_0",), ("decoder_0",)},
    ),
    "encoder-decoder, heavy_ops": (
        Seq2Seq(), (SOURCE, TARGET), "heavy_ops", {"train": True, **DROPOUT},
        {(f"encoder_{i}", "MultiHeadDotProductAttention_0") for i in (0, 1)}
        | {(f"decoder_{i}", f"{kind}_attn") for i in (0, 1) for kind in ("self", "cross")},
    ),
    "lstm in nn.RNN": (Lstm(), (X,), "all", {}, {("LSTMCell_0",), ("LSTMCell_1",)}),
    "nn.scan over a cell": (ScannedCell(), (X,), "all", {}, {("ScanGRUCell_0",)}),
    "mixture of experts, all": (Moe(), (X,), "all", {"mutable": ["losses"]}, {(f"layer_{i}",) for i in range(3)}),
    "mixture of experts, the experts": (
        Moe(), (X,), nj.Policy(checkpoint=(nj.CheckpointRule(type="Expert"),)), {"mutable": ["losses"]}, {(f"layer_{i}", "experts") for i in range(3)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LINEN)
def test_linen(case):
    model, args, policy, kwargs, boundaries = LINEN[case]
    ours = check_linen(model, *args, policy=policy, rtol=1e-5, **kwargs)
    found = nj.policy_of(ours).selection.boundaries
    assert found == boundaries or (case == "resnet, all" and found < boundaries)


# --- nnx ------------------------------------------------------------------------------------------------------------


class NNXResidualBlock(nnx.Module):
    def __init__(self, before, after, strides, rngs):
        self.conv1, self.norm1 = nnx.Conv(before, after, (3, 3), strides, rngs=rngs), nnx.BatchNorm(after, rngs=rngs)
        self.conv2, self.norm2 = nnx.Conv(after, after, (3, 3), rngs=rngs), nnx.BatchNorm(after, rngs=rngs)
        self.project = nnx.Conv(before, after, (1, 1), strides, rngs=rngs) if before != after else lambda x: x

    def __call__(self, x):
        y = self.norm2(self.conv2(nnx.relu(self.norm1(self.conv1(x)))))
        return nnx.relu(self.project(x) + y)


class NNXResNet(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        sizes = [[(8, 8, 1)] * 2, [(8, 16, 2), (16, 16, 1), (16, 16, 1)]]
        self.stages = nnx.List([nnx.List([NNXResidualBlock(*s, rngs) for s in stage]) for stage in sizes])
        self.head = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for stage in self.stages:
            for block in stage:
                x = block(x)
        return self.head(x.mean((1, 2)))


def nnx_attention(rngs):
    return nnx.MultiHeadAttention(4, 32, dropout_rate=0.1, deterministic=False, decode=False, rngs=rngs)


class NNXLayer(nnx.Module):
    def __init__(self, rngs, cross=False):
        self.self_attn, self.norm = nnx_attention(rngs), nnx.RMSNorm(32, rngs=rngs)
        self.cross_attn = nnx_attention(rngs) if cross else None
        up, down, drop = nnx.Linear(32, 64, rngs=rngs), nnx.Linear(64, 32, rngs=rngs), nnx.Dropout(0.1, rngs=rngs)
        self.mlp = nnx.Sequential(up, nnx.gelu, drop, down)

    def __call__(self, x, memory=None, *, mask=None):
        x = x + self.self_attn(self.norm(x), mask=mask)
        if self.cross_attn is not None:
            x = x + self.cross_attn(x, memory)
        return x + self.mlp(x)


class NNXSeq2Seq(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(50, 32, rngs=rngs)
        self.encoder = nnx.List([NNXLayer(rngs) for _ in range(2)])
        self.decoder = nnx.List([NNXLayer(rngs, cross=True) for _ in range(2)])

    def __call__(self, source, target):
        memory, x = self.embed(source), self.embed(target)
        for layer in self.encoder:
            memory = layer(memory)
        for layer in self.decoder:
            x = layer(x, memory, mask=nnx.make_causal_mask(target))
        return self.embed.attend(x)


class NNXLstm(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.RNN(nnx.LSTMCell(16, 16, rngs=rngs), rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class NNXExpert(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(16, 32, rngs=rngs), nnx.Linear(32, 16, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.gelu(self.up(x)))


class NNXMoeLayer(nnx.Module):
    def __init__(self, rngs):
        self.router = nnx.Linear(16, 4, rngs=rngs)
        self.experts = nnx.split_rngs(splits=4)(nnx.vmap(NNXExpert, in_axes=0, out_axes=0))(rngs)

    def __call__(self, x):
        gates = jax.nn.softmax(self.router(x))
        self.sow(nnx.Intermediate, "balance", gates.mean())
        out = nnx.vmap(lambda expert, x: expert(x), in_axes=(0, None))(self.experts, x)
        return x + jnp.einsum("ebtd,bte->btd", out, gates)


class NNXMoe(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([NNXMoeLayer(rngs) for _ in range(3)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


DECODER = {("decoder", "0", "self_attn"), ("decoder", "0", "cross_attn"), ("decoder", "1", "self_attn"), ("decoder", "1", "cross_attn")}  # fmt: skip
NNX = {
    "resnet, all": (NNXResNet, (IMAGES,), "all", {("stages", "0", "0"), ("stages", "0", "1"), ("stages", "1", "1"), ("stages", "1", "2")}),
    "encoder-decoder, alternate": (NNXSeq2Seq, (SOURCE, TARGET), "alternate", {("encoder", "0"), ("decoder", "0")}),
    "encoder-decoder, heavy_ops": (
        NNXSeq2Seq, (SOURCE, TARGET), "heavy_ops", {("encoder", "0", "self_attn"), ("encoder", "1", "self_attn")} | DECODER,
    ),
    "lstm in nnx.RNN": (NNXLstm, (X,), "all", {("layers", "0"), ("layers", "1")}),
    "mixture of experts, all": (NNXMoe, (X,), "all", {("layers", str(i)) for i in range(3)}),
    "mixture of experts, the experts": (
        NNXMoe, (X,), nj.Policy(checkpoint=(nj.CheckpointRule(type="NNXExpert"),)), {("layers", str(i), "experts") for i in range(3)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NNX)
def test_nnx(case):
    make, args, policy, boundaries = NNX[case]
    ours = check_nnx(make(nnx.Rngs(params=0, dropout=1, carry=2)), *args, policy=policy, rtol=1e-5)
    assert nj.policy_of(ours).selection.boundaries == boundaries
