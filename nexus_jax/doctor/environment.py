"""Checks of flags, environment variables and versions. Some of them matter only to a step that offloads."""

from __future__ import annotations

from collections.abc import Iterator

from nexus_jax.doctor.case import Case, Finding
from nexus_jax.report import size
from nexus_jax.targets.host import GPU_POOL as _HOST_LIMIT
from nexus_jax.targets.host import gpu_pool_bytes

GIB = 2**30
_PREMAPPED = "TPU_PREMAPPED_BUFFER_SIZE"
_ALLOCATORS = ("default", "platform", "bfc", "cuda_async", "vmm", "address")


def unrolled_offload(case: Case) -> Iterator[Finding]:
    """Offloading outside a loop, where nothing ties the copies to the progress of the step."""
    loose = sum(n for n, place in case.to_host if not place.in_loop)
    if not loose or case.platform == "cpu":
        return
    found = f"{size(loose)} go to the host outside any loop"
    scan = "run the layers in jax.lax.scan (nn.scan, nnx.scan)"
    if case.on_gpu and case.flag_is("xla_gpu_enable_latency_hiding_scheduler", True):
        yield Finding(
            check="unrolled offload",
            found=f"{found}, and XLA's latency-hiding scheduler is on, as it is by default",
            matters="it starts the copies back early, and device memory is not freed: for 12 unrolled layers of a GPT under "
            "offload_dot_with_no_batch_dims on an H200, 4.42 GiB of temporaries with it and 1.64 GiB without",
            write="XLA_FLAGS=--xla_gpu_enable_latency_hiding_scheduler=false, or jax.jit(step, compiler_options="
            f"{{'xla_gpu_enable_latency_hiding_scheduler': False}}), or {scan}: in a loop it frees with the default flags",
            source="compiled by jax 0.12.0.1 for an H200; https://github.com/openxla/xla/pull/18139",
        )
    if case.platform == "tpu":
        yield Finding(
            check="unrolled offload",
            found=f"{found}, on a TPU",
            matters="XLA cancels such a copy with the copy back, or starts the copy back early: for 12 unrolled layers of a "
            "GPT under offload_dot_with_no_batch_dims on a v5e, 8.61 GiB of temporaries, and 1.55 GiB recomputing all",
            write=f"{scan}: 16 layers in a loop on a v5e go from 1664 MiB to 640 MiB on the device and 1024 MiB on the host",
            source="compiled by jax 0.12.0.1 for a v5e",
        )


def offload_on_cpu(case: Case) -> Iterator[Finding]:
    """Offloading where the host's memory is the device's."""
    if case.platform == "cpu" and case.host_bytes:
        yield Finding(
            check="offload on a CPU",
            found=f"{size(case.host_bytes)} go to the host, and the step runs on the CPU",
            matters="a CPU has no memory apart from the host's: nothing moves, and nothing is freed",
            write='the target that the step is for, as doctor(fn, ..., target="h200")',
        )


def pinned_memory(case: Case) -> Iterator[Finding]:
    """What is offloaded against what may be pinned in host memory."""
    if case.on_gpu:
        yield from _gpu_pool(case)
    if case.platform == "tpu":
        yield from _premapped(case)


def _gpu_pool(case: Case) -> Iterator[Finding]:
    given = case.environ.get(_HOST_LIMIT)
    source = "xla/pjrt/gpu/gpu_helpers.cc; https://github.com/openxla/xla/pull/20633"
    if given is not None and not given.isdigit():
        yield Finding(
            check="pinned memory",
            found=f"{_HOST_LIMIT}={given!r} is no whole number",
            matters="XLA cannot read it, logs an error and takes 64 GiB",
            write=f"{_HOST_LIMIT}=256, in GiB",
            source=source,
        )
        return
    limit = gpu_pool_bytes(case.environ)
    if case.host_bytes > limit:
        yield Finding(
            check="pinned memory",
            found=f"{size(case.host_bytes)} go to the host, and {_HOST_LIMIT} allows {size(limit)}"
            + " by default" * (given is None),
            matters="offloaded values live in a pool of pinned memory of that size: past it the step fails with "
            "RESOURCE_EXHAUSTED, however much memory the host has",
            write=f"{_HOST_LIMIT}={-(-case.host_bytes * 5 // (4 * GIB))} (a quarter more than needed: the pool fragments)",
            source=source,
        )


def _premapped(case: Case) -> Iterator[Finding]:
    given = case.environ.get(_PREMAPPED)
    source = "https://docs.cloud.google.com/tpu/docs/performance-guide"
    if given is not None and (not given.isdigit() or int(given) % 4096):
        yield Finding(
            check="pinned memory",
            found=f"{_PREMAPPED}={given!r} is no multiple of 4096",
            matters="libtpu maps that many bytes of host memory in pages of 4096",
            write=f"{_PREMAPPED}=17179869184",
            source=source,
        )
        return
    limit = int(given or 4 * GIB)
    if case.host_bytes > limit:
        yield Finding(
            check="pinned memory",
            found=f"{size(case.host_bytes)} go to the host, and {_PREMAPPED} is {size(limit)}"
            + " by default" * (given is None),
            matters="transfers go through memory that is mapped beforehand; where it is too small, the step is slower or fails "
            "with RESOURCE_EXHAUSTED: Failed to allocate buffer from premapped region",
            write=f"{_PREMAPPED}={-(-case.host_bytes // 2**30) * 2**30}",
            source=source,
        )


def host_memory(case: Case) -> Iterator[Finding]:
    """What is offloaded against the memory of the host."""
    if case.host is not None and case.host_bytes > case.host.nbytes:
        yield Finding(
            check="host memory",
            found=f"{size(case.host_bytes)} go to the host, and it has {size(case.host.nbytes)}: {case.host.what}",
            matters="pinned memory is never swapped out: the step fails, or the machine stops the process",
            write="a policy that offloads less, or a larger offload_threshold_mb",
        )


def xla_offloading(case: Case) -> Iterator[Finding]:
    """XLA flags that move values to the host, or keep them from it, whatever the policy says."""
    about = {
        "xla_gpu_enable_host_memory_offloading": (
            case.on_gpu,
            "XLA's own rematerialization may then move values to the host that no policy named",
            "https://github.com/openxla/xla/pull/11895",
        ),
        "xla_gpu_enable_pipelined_host_offloading": (
            case.on_gpu,
            "it rewrites the copies in loops; it was turned off by default after a training run that did not converge with it",
            "https://github.com/openxla/xla/pull/45393",
        ),
        "xla_tpu_rematerialization_use_host_memory_offload": (
            case.platform == "tpu",
            "XLA's own rematerialization may then move values to the host that no policy named",
            "the flags of libtpu 0.0.50",
        ),
        "xla_tpu_impure_disable_offloading": (
            case.platform == "tpu",
            "it keeps what a policy offloads on the device",
            "the flags of libtpu 0.0.50",
        ),
    }
    for flag, (matters_here, why, source) in about.items():
        if matters_here and case.flag_is(flag, False):
            yield Finding(
                check="XLA's offloading flags",
                found=f"--{flag} is on",
                matters=why,
                write=f"--{flag}=false",
                source=source,
            )


def xla_remat(case: Case) -> Iterator[Finding]:
    """XLA's own rematerialization pass, which runs where a program would not fit."""
    off = not case.config.get("jax_compiler_enable_remat_pass", True)
    disabled = "rematerialization" in (case.flag("xla_disable_hlo_passes") or "").split(",")
    if (off or disabled) and case.platform != "cpu":
        how = "jax_compiler_enable_remat_pass is False" if off else "--xla_disable_hlo_passes names rematerialization"
        yield Finding(
            check="XLA's rematerialization",
            found=how,
            matters="XLA then recomputes nothing of its own: a step that is just too large fails, where it would run slower",
            write='jax.config.update("jax_compiler_enable_remat_pass", True)' if off else "the flag without it",
            source="https://docs.jax.dev/en/latest/config_options.html",
        )
    level = case.config.get("jax_memory_fitting_level", "O2")
    if str(level).rpartition(".")[2] in ("O0", "O1"):
        yield Finding(
            check="XLA's rematerialization",
            found=f"jax_memory_fitting_level is {level}",
            matters="XLA then tries less to make a program fit the device",
            write='jax.config.update("jax_memory_fitting_level", "O2")',
            source="https://docs.jax.dev/en/latest/config_options.html",
        )
    changed = [
        f for f in _REMAT_FLAGS if case.flag(f) is not None and f.startswith("xla_tpu") == (case.platform == "tpu")
    ]
    if changed and case.platform != "cpu":
        yield Finding(
            check="XLA's rematerialization",
            found=", ".join(f"--{flag}={case.flag(flag)}" for flag in changed),
            matters="it changes what XLA recomputes beside the policy, so bytes and seconds are no longer those of the policy",
            write="the step without it, once, to tell the two apart",
            source="the flags of libtpu 0.0.50 and of jax-cuda13-pjrt 0.12.0.1",
        )


_REMAT_FLAGS = (
    "xla_tpu_rematerialization_algo",
    "xla_tpu_rematerialization_min_size_in_bytes",
    "xla_tpu_rematerialization_max_block_size_limit",
    "xla_tpu_rematerialization_block_effort_factor",
    "xla_tpu_pre_fusion_remat",
    "xla_gpu_memory_limit_slop_factor",
)


def gpu_memory(case: Case) -> Iterator[Finding]:
    """How much of a GPU's memory JAX takes, and how."""
    if not case.on_gpu:
        return
    get = case.environ.get
    new, old = get("XLA_CLIENT_MEM_FRACTION"), get("XLA_PYTHON_CLIENT_MEM_FRACTION")
    source = "https://docs.jax.dev/en/latest/gpu_memory_allocation.html"
    said = {"check": "GPU memory", "source": source}
    if new and old:
        yield Finding(
            found="XLA_CLIENT_MEM_FRACTION and XLA_PYTHON_CLIENT_MEM_FRACTION are both set",
            matters="JAX refuses to start",
            write="XLA_CLIENT_MEM_FRACTION only: the other name is the old one",
            **said,
        )
    fraction = _number(new or old)
    if (new or old) and (fraction is None or fraction < 0.75):
        yield Finding(
            found=f"JAX may take {new or old} of the GPU's memory",
            matters="a step that fits the GPU fails past that fraction (0.75 by default); what measure says fits is the device's",
            write="XLA_CLIENT_MEM_FRACTION=0.95 where nothing else runs on the GPU",
            **said,
        )
    if (get("XLA_PYTHON_CLIENT_PREALLOCATE") or "true") in ("false", "False", "0"):
        yield Finding(
            found=f"XLA_PYTHON_CLIENT_PREALLOCATE={get('XLA_PYTHON_CLIENT_PREALLOCATE')}",
            matters="memory is taken piece by piece and fragments: a step that uses most of the GPU may fail for it",
            write="the environment without it, for a step near the limit",
            **said,
        )
    allocator = (get("XLA_PYTHON_CLIENT_ALLOCATOR") or "default").lower()
    if allocator not in _ALLOCATORS or allocator == "platform":
        known = allocator == "platform"
        yield Finding(
            found=f"XLA_PYTHON_CLIENT_ALLOCATOR={allocator}",
            matters="every buffer is allocated and freed by the driver, which is very slow"
            if known
            else "JAX refuses to start",
            write="the environment without it" if known else f"one of {', '.join(_ALLOCATORS)}",
            **said,
        )


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None


def jax_config(case: Case) -> Iterator[Finding]:
    """Settings of JAX that change what remat does, or what a step holds."""
    about = {
        "jax_disable_jit": (
            "every operation runs on its own and loops are unrolled in Python: nothing is freed, fused or scheduled",
            "https://docs.jax.dev/en/latest/config_options.html",
        ),
        "jax_debug_nans": (
            "jax.jit then ignores donate_argnums: parameters and optimizer state are held twice, and each step waits",
            "jax/_src/pjit.py",
        ),
        "jax_debug_infs": ("each step waits for its results, to look at them", "jax/_src/pjit.py"),
        "jax_disable_most_optimizations": (
            "XLA then does little of what makes recomputed values cheap, and temporaries grow",
            "https://docs.jax.dev/en/latest/config_options.html",
        ),
    }
    for name, (matters, source) in about.items():
        if case.config.get(name):
            write = f'jax.config.update("{name}", False), or the environment without {name.upper()}'
            yield Finding(check="JAX's settings", found=f"{name} is on", matters=matters, write=write, source=source)
    if case.config.get("jax_remat3"):
        refused = " and policies that offload fail" if case.version < (0, 11) else ""
        yield Finding(
            check="JAX's settings",
            found="jax_remat3 is on",
            matters=f"jax.checkpoint is another one then: custom callables as policies are ignored or half ignored{refused}",
            write='jax.config.update("jax_remat3", False), or policies by name (those of nexus_jax are)',
            source="measured on jax 0.10.2 and 0.12.0.1",
        )


def versions(case: Case) -> Iterator[Finding]:
    """Versions that are known not to do what a policy asks for."""
    if case.platform == "cpu" and case.version[:2] == (0, 10):
        yield Finding(
            check="versions",
            found=f"jax {'.'.join(map(str, case.version))} on the CPU",
            matters="its compiler recomputes what jax.checkpoint asks for and frees nothing by it: 64 MiB of temporaries in "
            "8 layers with and without, where jax 0.12 goes from 64 to 22. GPUs and TPUs are not concerned",
            write='pip install "jax>=0.12", or a target of its own: measure(..., target="v5e")',
            source="compiled by jax 0.10.2 and 0.12.0.1",
        )
