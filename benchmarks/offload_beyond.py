"""Offloading beyond the layers: what a custom backward pass keeps, and the logits of a large vocabulary.

    python benchmarks/offload_beyond.py --what flash,logits --targets v5e,h200

Temporaries in device and host memory as compiled, MiB, and FLOPs of the step.
"""

import argparse
import math
import re
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp

import nexus_jax as nj

B, T, D, HEADS, WORDS = 8, 1024, 512, 8, 65536
bf16 = jnp.bfloat16


@jax.custom_vjp
def flash(q, k, v):
    return forward(q, k, v)[0]


def scores(q, k):
    return jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])


def forward(q, k, v):
    s = scores(q, k)
    statistics = jax.nn.logsumexp(s, -1)
    out = jnp.einsum("bhts,bshd->bthd", jnp.exp(s - statistics[..., None]).astype(q.dtype), v)
    return out, (q, k, v, out, statistics)


def backward(kept, g):
    q, k, v, out, statistics = kept
    p = jnp.exp(scores(q, k) - statistics[..., None])
    row = jnp.einsum("bthd,bthd->bht", out.astype(jnp.float32), g.astype(jnp.float32))
    dp = jnp.einsum("bthd,bshd->bhts", g, v, preferred_element_type=jnp.float32)
    ds = (p * (dp - row[..., None]) / math.sqrt(q.shape[-1])).astype(q.dtype)
    dq, dk = jnp.einsum("bhts,bshd->bthd", ds, k), jnp.einsum("bhts,bthd->bshd", ds, q)
    return dq, dk, jnp.einsum("bhts,bthd->bshd", p.astype(q.dtype), g)


flash.defvjp(forward, backward)


class FlashAttention(nn.Module):
    @nn.compact
    def __call__(self, x):
        q, k, v = (nn.DenseGeneral((HEADS, D // HEADS), dtype=bf16, name=name)(x) for name in "qkv")
        return nn.DenseGeneral(D, axis=(-2, -1), dtype=bf16, name="o")(flash(q, k, v))


class Block(nn.Module):
    attention: bool = True

    @nn.compact
    def __call__(self, x):
        if self.attention:
            x = x + FlashAttention(name="attn")(nn.LayerNorm(dtype=bf16)(x))
        h = nn.gelu(nn.Dense(4 * D, dtype=bf16)(nn.LayerNorm(dtype=bf16)(x)))
        return x + nn.Dense(D, dtype=bf16)(h)


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return Block(name="block")(x), None


class Flash(nn.Module):
    scanned: bool

    @nn.compact
    def __call__(self, x):
        if self.scanned:
            steps = nn.scan(Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=6)
            x, _ = steps(name="layers")(x, None)
        else:
            for i in range(6):
                x = Block(name=f"blocks_{i}")(x)
        return nn.LayerNorm(dtype=jnp.float32)(x)


class Language(nn.Module):
    layers: int

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(WORDS, D, dtype=bf16)
        x = embed(tokens)
        for i in range(self.layers):
            x = Block(attention=False, name=f"blocks_{i}")(x)
        return nn.LayerNorm(dtype=bf16)(x), embed.embedding


def cross_entropy(x, embedding, tokens):
    logits = (x @ embedding.astype(bf16).T).astype(jnp.float32)
    return jnp.sum(jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0])


def whole(model):
    def loss(params, tokens):
        x, embedding = model.apply(params, tokens)
        return cross_entropy(x[:, :-1], embedding, tokens[:, 1:])

    return loss


def chunks(model, remat=False):
    def loss(params, tokens):
        x, embedding = model.apply(params, tokens)
        pieces = x.reshape(8, B * T // 8, D), jnp.roll(tokens, -1, 1).reshape(8, -1)
        one = lambda total, piece: (total + cross_entropy(piece[0], embedding, piece[1]), None)
        return jax.lax.scan(jax.checkpoint(one) if remat else one, 0.0, pieces)[0]

    return loss


def flash_rows():
    offloader = nj.ActivationOffloader(offload_threshold_mb=0.2, prefetch_ahead=0)
    x = jax.ShapeDtypeStruct((B, T, D), bf16)
    for scanned in (False, True):
        model = Flash(scanned)
        args = jax.eval_shape(model.init, jax.random.key(0), x), x
        shape = "scan" if scanned else "unrolled"
        of = lambda m: lambda params, x: jnp.sum(jnp.sin(m.apply(params, x)))
        yield f"flash, {shape}, as it is", of(model), args
        yield f"flash, {shape}, full remat", of(nj.apply_selective_checkpointing(model, "all")), args
        yield f"flash, {shape}, wrap(loss)", offloader.wrap(of(model)), args


def logits_rows():
    offloader = nj.ActivationOffloader(offload_threshold_mb=1.0, prefetch_ahead=1)
    tokens = jax.ShapeDtypeStruct((B, T), jnp.int32)
    for layers, name, of in [
        (6, "logits", whole),
        (2, "logits", whole),
        (6, "logits in chunks", chunks),
        (6, "logits in chunks under jax.checkpoint", lambda m: chunks(m, remat=True)),
    ]:
        model = Language(layers)
        args = jax.eval_shape(model.init, jax.random.key(0), tokens), tokens
        yield f"{name}, {layers} layers, as it is", of(model), args
        yield f"{name}, {layers} layers, full remat", of(nj.apply_selective_checkpointing(model, "all")), args
        yield f"{name}, {layers} layers, wrap(model)", of(offloader.wrap(model)), args
        yield f"{name}, {layers} layers, wrap(loss)", offloader.wrap(of(model)), args


def temporaries(fn, args, target):
    """MiB of temporaries on the device and on the host, FLOPs."""
    found = nj.measure(fn, *args, target=target)
    sizes = {"device": 0, "host": 0}
    text = found.texts("buffer_assignment")
    for line in text.splitlines():
        if match := re.match(r"allocation \d+: size (\d+),(.*)preallocated-temp", line):
            sizes["host" if "color 5" in match[2] else "device"] += int(match[1])
    return sizes["device"] / 2**20, sizes["host"] / 2**20, found.flops


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", default="flash,logits")
    parser.add_argument("--targets", default="v5e,h200")
    args = parser.parse_args()
    rows = {"flash": flash_rows, "logits": logits_rows}
    warnings.simplefilter("ignore")  # that nothing moves on a CPU
    for what in args.what.split(","):
        for name, fn, given in rows[what]():
            for target in args.targets.split(","):
                device, host, flops = temporaries(fn, given, target)
                print(f"{name:60} {target:6} device {device:6.0f}  host {host:6.0f}  {flops:.4g} FLOPs", flush=True)


if __name__ == "__main__":
    main()
