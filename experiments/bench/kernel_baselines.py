"""Attention of other libraries over as many keys and values, to hold this library's against.

Each makes its own random inputs and computes one query per sequence and query head; none computes a window,
page visibility or a log-sum-exp. What is not installed is skipped with the reason.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import jax
import numpy as np

from retro_jax.experiments.bench.device_time import EVENTS, WALL, Timing, device_time
from retro_jax.experiments.bench.kernel_cases import Case, Dimensions, normal, random_keys, random_page_ids

SLEEP_CYCLES = 40_000_000
"""Clock cycles, 20 ms on an H100, that a device idles so that the host can launch all calls meanwhile."""


@dataclass(frozen=True)
class Baseline:
    """Attention of another library.

    Attributes:
        name: for the table.
        package: that must be installed.
        variants: ways to run it, of which the fastest counts.
        paged: whether its keys and values lie in pages, among pages that are not read.
        torch: whether it runs through torch.
        prepare: (variant, case, dimensions, sets, seed) -> launches call number i.
    """

    name: str
    package: str
    variants: tuple[str, ...]
    paged: bool
    torch: bool
    prepare: Callable[[str, Case, Dimensions, int, int], Callable[[int], Any]]

    def missing(self) -> str | None:
        """Returns why it cannot run here, None if it can."""
        packages = (self.package, "torch") if self.torch else (self.package,)
        for package in packages:
            if find_spec(package) is None:
                return f"{package} is not installed"
        if self.torch and jax.default_backend() != "gpu":
            return f"it needs an NVIDIA GPU, JAX runs on {jax.default_backend()!r}"
        try:
            return None if not self.torch or _torch().cuda.is_available() else "torch sees no GPU"
        except (
            Exception
        ) as error:  # of any kind: torch loads many libraries, and JAX has loaded its own of them
            return f"torch cannot be imported: {error}"

    def footprint(self, case: Case, dims: Dimensions) -> int:
        """Bytes of device memory that one set of inputs takes."""
        return case.footprint(dims) if self.paged else case.bytes(dims)

    def time(
        self, variant: str, case: Case, dims: Dimensions, sets: int, calls: int, warm_up: int, seed: int
    ) -> tuple[Timing, float | None]:
        """Times one variant.

        Args:
          variant: one of `variants`.
          case: attention or dense attention.
          dims: its other sizes.
          sets: of inputs, taken in turn.
          calls: to time.
          warm_up: calls before those.
          seed: of the inputs.

        Returns:
          its timing, and the microseconds of a call by CUDA events around all of them; None without torch.
        """
        call = self.prepare(variant, case, dims, sets, seed)
        if not self.torch:
            return device_time(call, calls, warm_up), None
        torch = _torch()
        try:
            timing = device_time(call, calls, warm_up, wait=lambda _: torch.cuda.synchronize())
            events_us = _by_events(torch, call, calls)
            if timing.how == WALL:  # the profiler saw JAX's kernels only
                mean = (events_us, events_us)
                timing = replace(timing, how=EVENTS, busy_us=events_us, busy_us_10_90=mean, span_us=None)
            return timing, events_us
        finally:
            del call
            torch.cuda.empty_cache()  # for JAX, which cannot take back what torch keeps


def versions() -> dict[str, str]:
    """Returns the versions of the baselines' packages that are installed."""
    found = {}
    for package in ("torch", "flashinfer-python", "nvidia-cudnn-cu13"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _by_events(torch: ModuleType, call: Callable[[int], Any], calls: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    # Calls are launched slower than they run: behind a pause they lie ready in the stream.
    torch.cuda._sleep(SLEEP_CYCLES)
    begin.record()
    for index in range(calls):
        call(index)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) * 1e3 / calls


def _jax(variant: str, case: Case, dims: Dimensions, sets: int, seed: int) -> Callable[[int], Any]:
    tokens = case.selected(dims) * dims.page_size
    keys = random_keys(seed)
    shape = (case.batch, tokens, dims.kv_heads, dims.head_dim)
    inputs = [
        (
            normal(next(keys), (case.batch, 1, dims.heads, dims.head_dim), dims.dtype),
            normal(next(keys), shape, dims.dtype),
            normal(next(keys), shape, dims.dtype),
        )
        for _ in range(sets)
    ]
    attend = jax.jit(partial(jax.nn.dot_product_attention, implementation=variant))
    return lambda index: attend(*inputs[index % sets])


def _torch_sdpa(_: str, case: Case, dims: Dimensions, sets: int, seed: int) -> Callable[[int], Any]:
    torch = _torch()
    draw = _torch_normal(torch, dims, seed)
    tokens = case.selected(dims) * dims.page_size
    inputs = [
        (
            draw(case.batch, dims.heads, 1, dims.head_dim),
            draw(case.batch, dims.kv_heads, tokens, dims.head_dim),
            draw(case.batch, dims.kv_heads, tokens, dims.head_dim),
        )
        for _ in range(sets)
    ]
    attend = torch.nn.functional.scaled_dot_product_attention
    return lambda index: attend(*inputs[index % sets], enable_gqa=True)


def _flashinfer(variant: str, case: Case, dims: Dimensions, sets: int, seed: int) -> Callable[[int], Any]:
    """Its page table is one per sequence, not per KV head: every head reads the same random pages."""
    import flashinfer

    torch = _torch()
    draw = _torch_normal(torch, dims, seed)
    layout, cores = variant.split(", ")
    B, P, C, S, K = case.batch, case.pages(dims), case.selected(dims), dims.page_size, dims.kv_heads
    page = (S, K) if layout == "NHD" else (K, S)
    caches = [draw(B * P, 2, *page, dims.head_dim) for _ in range(sets)]
    q = draw(B, dims.heads, dims.head_dim)
    ids = random_page_ids(np.random.default_rng(seed), (B, 1), P, C)[:, 0] + np.arange(B)[:, None] * P
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.zeros(128 << 20, dtype=torch.uint8, device="cuda"),
        layout,
        use_tensor_cores=cores == "tensor cores",
    )
    wrapper.plan(
        torch.arange(B + 1, dtype=torch.int32, device="cuda") * C,
        torch.tensor(ids.ravel(), dtype=torch.int32, device="cuda"),
        torch.full((B,), S, dtype=torch.int32, device="cuda"),
        dims.heads,
        K,
        dims.head_dim,
        S,
        q_data_type=q.dtype,
        kv_data_type=q.dtype,
    )
    return lambda index: wrapper.run(q, caches[index % sets])


def _torch() -> ModuleType:
    import torch

    return torch


def _torch_normal(torch: ModuleType, dims: Dimensions, seed: int) -> Callable[..., Any]:
    generator = torch.Generator("cuda").manual_seed(seed)
    return lambda *shape: torch.randn(
        shape, dtype=getattr(torch, dims.dtype), device="cuda", generator=generator
    )


FLASHINFER = Baseline(
    "FlashInfer",
    "flashinfer",
    tuple(f"{layout}, {cores}" for layout in ("NHD", "HND") for cores in ("tensor cores", "CUDA cores")),
    paged=True,
    torch=True,
    prepare=_flashinfer,
)
BASELINES = {
    "jax": Baseline("jax.nn", "jax", ("cudnn", "xla"), paged=False, torch=False, prepare=_jax),
    "flashinfer": FLASHINFER,
    "torch": Baseline("torch SDPA", "torch", ("",), paged=False, torch=True, prepare=_torch_sdpa),
}
