"""The device that a plan is made for: one of this machine, or one that is only named. Importable without torch."""

from dataclasses import dataclass, field, replace

from gpt2box.config.schema import Config
from gpt2box.config.validation import check_ranks
from gpt2box.errors import BadInput
from gpt2box.model.shape import ModelShape
from gpt2box.planner.bench_records import BenchRecord, bench_key, read_bench_records, should_compile
from gpt2box.planner.gpu_specs import GPU_SPECS, GpuSpec, gpu_spec_named, gpu_spec_of_device
from gpt2box.planner.memory import GIB
from gpt2box.system import gpu
from gpt2box.system.host import cpu_name, memory_bytes
from gpt2box.utils.paths import bench_file
from gpt2box.utils.progress import format_bytes

DESKTOP_RESERVE_BYTES = GIB // 2  # left free on a GPU that is only named: what a desktop without a browser uses


@dataclass(frozen=True)
class TargetDevice:
    """The device that a plan is made for, and what is known of it."""

    name: str
    free_bytes: int
    spec: GpuSpec | None  # None: a CPU, or a GPU without data sheet figures
    dtype: str
    on_gpu: bool
    compiled: bool  # the model is compiled there if the settings allow it
    bench_name: str = ""  # the device's name in bench.json; empty: no measurements apply
    bench_records: list[BenchRecord] = field(default_factory=list)
    ranks: int = 1  # processes that share a step's sequences, each on such a device
    memory_note: str = ""


def select_target_device(name: str | None, vram_gib: float | None, config: Config, gpus: int = 1) -> TargetDevice:
    """Return the GPU of that name or memory, else the device that the settings choose on this machine.

    Raises:
        BadInput: The GPU is unknown, the settings need one and this machine has none, or so many cannot share a step.
    """
    check_ranks(config, gpus)
    if name or vram_gib:
        return replace(describe_named_gpu(name, vram_gib, config), ranks=gpus)
    nvml = gpu.query_nvml()
    if config.device == "cpu" or (config.device == "auto" and not nvml.gpus):
        free = memory_bytes()[1]
        dtype = "float32" if config.dtype == "auto" else config.dtype
        compiled = config.compile is True
        note = f"{format_bytes(free)} free now"
        cpu = TargetDevice("this CPU", free, None, dtype, False, compiled, cpu_name(), memory_note=note)
        return replace(cpu, ranks=gpus)
    return replace(describe_installed_gpu(config, nvml), ranks=gpus)


def describe_named_gpu(name: str | None, vram_gib: float | None, config: Config) -> TargetDevice:
    """Describe a GPU by its name or its memory."""
    spec = gpu_spec_named(name) if name else None
    total = round((vram_gib or (spec.gib if spec else 0)) * GIB)
    note = f"{format_bytes(total)}, of which {format_bytes(DESKTOP_RESERVE_BYTES)} are left to a desktop"
    note += "" if spec else "; no speed without a GPU's name (--gpu)"
    dtype = resolve_dtype(config, spec.capability if spec else gpu.BFLOAT16_CAPABILITY)
    name = spec.name if spec else "the GPU"
    return TargetDevice(name, total - DESKTOP_RESERVE_BYTES, spec, dtype, True, True, memory_note=note)


def describe_installed_gpu(config: Config, nvml: gpu.Nvml) -> TargetDevice:
    """Describe the GPU of this machine that the settings name.

    Raises BadInput: there is none, or the driver does not report its memory.
    """
    index = int(config.device.partition(":")[2] or 0)
    if index >= len(nvml.gpus):
        found = nvml.fault or f"no GPU with the number {index}"
        raise BadInput(found, f"a GPU here, or one of {', '.join(GPU_SPECS)}", "gpt2box plan … --gpu rtx-4070")
    card = nvml.gpus[index]
    if card.free_bytes is None:
        raise BadInput(f"the driver does not report the memory of {card.name}", "", "gpt2box plan … --vram-gib 12")
    note = f"{format_bytes(card.free_bytes)} of {format_bytes(card.total_bytes or 0)} free now"
    spec = gpu_spec_of_device(card.name, card.total_bytes)
    dtype = resolve_dtype(config, card.capability or gpu.BFLOAT16_CAPABILITY)
    return TargetDevice(card.name, card.free_bytes, spec, dtype, True, True, card.name, memory_note=note)


def resolve_dtype(config: Config, capability: tuple[int, int]) -> str:
    """Return the dtype of activations, as system/device.py chooses it."""
    if config.dtype != "auto":
        return config.dtype
    return "bfloat16" if capability >= gpu.BFLOAT16_CAPABILITY else "float32"


def apply_bench_records(
    device: TargetDevice, config: Config, shape: ModelShape, can_compile: bool = True
) -> TargetDevice:
    """Add the measurements made on the device; with `compile: auto`, compile or not as they show to be faster."""
    if not device.bench_name:
        return device
    records, compiled = read_bench_records(bench_file(), device.bench_name), device.compiled
    if config.compile == "auto" and config.may_compile and can_compile:
        key = bench_key(device.bench_name, config, shape, device.dtype)
        compiled = should_compile(records, key, config.tokens_per_step, device.compiled)
    return replace(device, bench_records=records, compiled=compiled)
