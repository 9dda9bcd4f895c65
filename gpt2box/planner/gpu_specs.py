"""Data sheet figures of common GPUs, from NVIDIA's data sheets and architecture white papers."""

import difflib
import re
import textwrap
from dataclasses import dataclass

from gpt2box.errors import BadInput


@dataclass(frozen=True)
class GpuSpec:
    """One GPU model."""

    name: str
    gib: float
    bandwidth_gb_s: float
    bf16_tflops: float  # dense, float32 accumulation: on GeForce half of the advertised float16 rate; 0: no bfloat16
    capability: tuple[int, int]


# name, memory in GiB, bandwidth in GB/s, bfloat16 TFLOPS, compute capability
TABLE = """
rtx-2080-ti       11   616      0  7.5
t4                16   320      0  7.5
rtx-3060          12   360   25.5  8.6
rtx-3060-ti        8   448   32.4  8.6
rtx-3070           8   448   40.6  8.6
rtx-3070-ti        8   608   43.5  8.6
rtx-3080          10   760   59.5  8.6
rtx-3080-12gb     12   912   61.3  8.6
rtx-3080-ti       12   912   68.2  8.6
rtx-3090          24   936   71.2  8.6
rtx-3090-ti       24  1008   80.0  8.6
rtx-a6000         48   768  154.8  8.6
a10               24   600  125.0  8.6
rtx-4060           8   272   30.2  8.9
rtx-4060-ti        8   288   44.1  8.9
rtx-4060-ti-16gb  16   288   44.1  8.9
rtx-4070          12   504   58.3  8.9
rtx-4070-super    12   504   71.0  8.9
rtx-4070-ti       12   504   80.2  8.9
rtx-4070-ti-super 16   672   88.2  8.9
rtx-4080          16   717   97.5  8.9
rtx-4080-super    16   736  104.4  8.9
rtx-4090          24  1008  165.2  8.9
l4                24   300  121.0  8.9
rtx-5060           8   448   38.4  12.0
rtx-5060-ti        8   448   47.4  12.0
rtx-5060-ti-16gb  16   448   47.4  12.0
rtx-5070          12   672   61.7  12.0
rtx-5070-ti       16   896   87.9  12.0
rtx-5080          16   960  112.6  12.0
rtx-5090          32  1792  209.5  12.0
a100-40gb         40  1555  312.0  8.0
a100-80gb         80  2039  312.0  8.0
h100              80  3350  989.4  9.0
h200             141  4800  989.4  9.0
"""


def parse_row(line: str) -> GpuSpec:
    """Parse a line of the table."""
    name, gib, bandwidth, tflops, capability = line.split()
    major, minor = capability.split(".")
    return GpuSpec(name, float(gib), float(bandwidth), float(tflops), (int(major), int(minor)))


GPU_SPECS = {spec.name: spec for spec in map(parse_row, TABLE.strip().splitlines())}


def gpu_spec_named(name: str) -> GpuSpec:
    """Find a GPU by its name in the table, in any common spelling, with or without `rtx`.

    Raises BadInput: the table has no such GPU.
    """
    normalized = normalize_gpu_name(name)
    for candidate in (normalized, f"rtx-{normalized}"):
        if candidate in GPU_SPECS:
            return GPU_SPECS[candidate]
    near = difflib.get_close_matches(normalized, GPU_SPECS, 1)
    raise BadInput(
        f"no GPU {name!r} in the table" + (f"; did you mean {near[0]}?" if near else ""),
        textwrap.fill(f"one of {', '.join(GPU_SPECS)}", 100, subsequent_indent="    ", break_on_hyphens=False),
        "or give its memory: --vram-gib 12",
    )


def gpu_spec_of_device(name: str, total_bytes: int | None) -> GpuSpec | None:
    """Find a GPU by the driver's name for it, such as 'NVIDIA GeForce RTX 4070'; None if the table lacks it."""
    if re.search(r"laptop|\bmig\b|h100.*pcie|vgpu|grid", name.lower()):
        return None  # another chip or power limit under the same name, or a share of a GPU
    normalized = normalize_gpu_name(name)
    matches = [known for known in GPU_SPECS if re.fullmatch(rf"{known}(-.*)?", normalized)]
    if not matches:
        return None
    base = re.sub(r"-\d+gb$", "", max(matches, key=len))
    variants = [spec for spec in GPU_SPECS.values() if re.fullmatch(rf"{base}(-\d+gb)?", spec.name)]
    if not total_bytes:
        return variants[0]
    # Some names are sold with two memory sizes.
    nearest = min(variants, key=lambda spec: abs(spec.gib - total_bytes / 2**30))
    return nearest if abs(nearest.gib - total_bytes / 2**30) < 0.15 * nearest.gib else None


def normalize_gpu_name(name: str) -> str:
    """Convert 'NVIDIA GeForce RTX 4070 Ti' and 'rtx4070ti' to 'rtx-4070-ti'."""
    name = re.sub(r"nvidia|geforce|tesla|-?sxm\d?|-?pcie?|hbm\d?e?", " ", name.lower())
    name = re.sub(r"(rtx)\s*[-_]?\s*(\d{4}|a\d{4})", r"\1-\2-", name)
    name = re.sub(r"(\d)\s*-?\s*(ti|super)\b", r"\1-\2", re.sub(r"(ti)(super)", r"\1-\2", name))
    return re.sub(r"[\s_-]+", "-", re.sub(r"(\d+)\s*gb", r"\1gb", name)).strip("-")
