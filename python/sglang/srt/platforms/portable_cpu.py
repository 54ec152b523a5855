"""srt on any x86-64 or Arm CPU, from the wheels on the package index.

Upstream's CPU platform needs a CPU build of sgl-kernel that no wheel has. This out-of-tree
platform takes plain torch everywhere, and gives srt defaults that fit a host: memory in proportion
to the model and the token budget, and processes that sleep while there is nothing to do. What
encode-only mode needs of any platform is in `srt/encode_only/`.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys

import torch
from sglang.cli import plugins_first
from sglang.srt.encode_only.plugin import supports_installed_sglang
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform

logger = logging.getLogger(__name__)

_BIND = "SGLANG_CPU_OMP_THREADS_BIND"

ENVIRONMENT = {
    # torch asks for huge pages for large tensors.
    "THP_MEM_ALLOC_ENABLE": "1",
    # What oneDNN and torch keep of the code compiled for each shape of a product: 0.7 MB, so that a
    # server that saw prompts of every length held more than a gigabyte of it.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
    "LRU_CACHE_CAPACITY": "128",
}
"""What this process and those it starts get, where the user has not set it. torch reads all of it
when it first computes."""

# Tokens of KV cache that a server takes without --max-total-tokens: a few requests at full length.
DEFAULT_KV_TOKENS = 16384
DEFAULT_RUNNING_REQUESTS = 64

# Parameters of glibc's mallopt, and their values: no mapping of its own for a large tensor, and how
# many bytes may lie free before they go back to the system.
_MALLOPT = {-4: 0, -1: 256 << 20}  # M_MMAP_MAX, M_TRIM_THRESHOLD


def activate() -> str | None:
    """Entry point of `sglang.srt.platforms`: the class to use, or None to stand aside.

    Stands aside where there is an accelerator, where the user picked upstream's CPU engine
    (`SGLANG_USE_CPU_ENGINE=1`), and with another version of sglang.
    """
    # Where SGLANG_PLATFORM names this platform, srt calls no other entry point of the group.
    plugins_first.install()
    if not supports_installed_sglang() or os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1":
        return None
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None and accelerator.type != "cpu":
        return None
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Kernels for CUDA, whose import takes 145 MB and two seconds. srt does without where it must.
    for library in ("flashinfer", "cutlass"):
        sys.modules.setdefault(library, None)  # type: ignore[arg-type]
    return f"{__name__}:PortableCpuPlatform"


class PortableCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """A CPU with nothing but torch."""

    _enum = PlatformEnum.OOT

    def get_device(self, device_id: int = 0) -> str:  # type: ignore[override]
        # srt takes apart the default of --device as a string.
        return "cpu"

    def get_compile_backend(self, mode: str | None = None) -> str:
        # Inductor would compile for half a minute inside the first request.
        return "eager"

    def get_torch_profiler_activity_str(self) -> str:
        return "CPU"

    def get_torch_profiler_activity(self) -> torch.profiler.ProfilerActivity:
        return torch.profiler.ProfilerActivity.CPU

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def apply_server_args_defaults(self, server_args) -> None:
        # An x86 host is given intel_amx, whose kernels no wheel has.
        if server_args.attention_backend in (None, "intel_amx"):
            server_args.attention_backend = self.get_default_attention_backend()
        if server_args.max_total_tokens is None:
            server_args.max_total_tokens = DEFAULT_KV_TOKENS
        if server_args.max_running_requests is None:
            server_args.max_running_requests = DEFAULT_RUNNING_REQUESTS
        # The device's memory is the host's, which other processes use too; the two limits above
        # bound what is taken, and srt's own guess can become negative on a small host.
        if server_args.mem_fraction_static is None:
            server_args.mem_fraction_static = 0.8
        server_args.sleep_on_idle = True
        # Nothing runs beside the scheduler here, and results would wait for its next round.
        server_args.disable_overlap_schedule = True
        server_args.disable_custom_all_reduce = True
        _share_cores(server_args.tp_size * server_args.pp_size * server_args.dp_size)

    def post_load_model(self, model: torch.nn.Module) -> None:
        from sglang.srt.runtime_context import get_device

        _bind_threads(_cores_of(get_device().gpu_id))
        keep_memory()


def _share_cores(ranks: int) -> None:
    """Gives each rank cores of its own where there are more ranks than NUMA nodes.

    srt binds a rank to a NUMA node, and else wants the cores spelled out in the environment, which
    the ranks inherit.
    """
    # srt.utils asks for the platform while it is imported.
    from sglang.srt.utils.numa_utils import get_cpu_ids_by_node

    if ranks <= len(get_cpu_ids_by_node()):
        return
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // ranks)
    bind = [
        ",".join(map(str, cores[start : start + share]))
        for start in ((rank * share) % len(cores) for rank in range(ranks))
    ]
    os.environ.setdefault(_BIND, "|".join(bind))


def _cores_of(rank: int) -> list[int]:
    """The cores that are a rank's: those it is given in the environment, or a NUMA node's."""
    from sglang.srt.utils.numa_utils import get_cpu_ids_by_node

    bind = os.environ.get(_BIND, "all")
    ranks = get_cpu_ids_by_node() if bind == "all" else bind.split("|")
    cores: set[int] = set()
    for part in ranks[rank].split(","):
        first, _, last = part.partition("-")
        cores.update(range(int(first), int(last or first) + 1))
    allowed = os.sched_getaffinity(0)
    return sorted(cores & allowed) or sorted(allowed)


def _bind_threads(cores: list[int]) -> None:
    """Computes in as many threads as there are `cores`, each on its own.

    The threads of a process that slept often wake on one core. The first, which waits for the
    others by spinning, then keeps them from running for up to 8 ms of a request.
    """
    torch.set_num_threads(len(cores))
    openmp = ctypes.CDLL(None)
    if not hasattr(openmp, "GOMP_parallel"):
        logger.info("The compute threads are not bound: torch has another OpenMP here.")
        return

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def bind_one(_: object) -> None:
        os.sched_setaffinity(0, {cores[openmp.omp_get_thread_num()]})

    openmp.GOMP_parallel(bind_one, None, len(cores), 0)
    logger.info("The compute threads are bound to cores %s.", ", ".join(map(str, cores)))


def keep_memory() -> None:
    """Has the allocator keep what a forward pass frees, for the next one.

    glibc gives large tensors back to the system, which then clears thousands of pages again: two
    thirds of the time of a short forward pass. Where the user set its tunables, those count.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or "GLIBC_TUNABLES" in os.environ:
        return
    if any(name.startswith("MALLOC_") and name.endswith("_") for name in os.environ):
        return
    for parameter, value in _MALLOPT.items():
        mallopt(parameter, value)


def give_back_memory() -> None:
    """Has the allocator give the system what lies free, however little or much it keeps."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
