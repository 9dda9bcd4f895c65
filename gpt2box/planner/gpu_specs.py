"""The common cards: memory, bandwidth, arithmetic, capability. From NVIDIA's data sheets and architecture white papers.

`bf16_tflops` is the dense rate of the tensor cores with sums in float32, which on GeForce cards is half of what is
advertised for sums in float16. 0 where a card has no bfloat16.
"""

from __future__ import annotations

import difflib
import re
import textwrap
from dataclasses import dataclass

from gpt2box.errors import BadInput


@dataclass(frozen=True)
class GpuSpec:
    """A kind of card."""

    name: str
    gib: float
    bandwidth_gb_s: float
    bf16_tflops: float
    capability: tuple[int, int]


_TABLE = """
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
    name, gib, bandwidth, tflops, capability = line.split()
    major, minor = capability.split(".")
    return GpuSpec(name, float(gib), float(bandwidth), float(tflops), (int(major), int(minor)))


GPU_SPECS = {kind.name: kind for kind in map(parse_row, _TABLE.strip().splitlines())}


def gpu_spec_named(name: str) -> GpuSpec:
    """A card by its name in the table, in any spelling of it.

    Raises:
        BadInput: not in the table.
    """
    plain = normalize_gpu_name(name)
    for full in (plain, f"rtx-{plain}"):
        if full in GPU_SPECS:
            return GPU_SPECS[full]
    near = difflib.get_close_matches(plain, GPU_SPECS, 1)
    raise BadInput(
        f"no card {name!r} in the table" + (f"; did you mean {near[0]}?" if near else ""),
        textwrap.fill(f"one of {', '.join(GPU_SPECS)}", 100, subsequent_indent="    ", break_on_hyphens=False),
        "or give its memory: --vram-gib 12",
    )


def gpu_spec_of_device(name: str, total_bytes: int | None) -> GpuSpec | None:
    """The kind of a card that the driver names, such as 'NVIDIA GeForce RTX 4070'; None where the table lacks it."""
    plain = normalize_gpu_name(name)
    if re.search(r"laptop|\bmig\b|h100.*pcie|vgpu|grid", name.lower()):
        return None  # other chips at other power under the same names, or a part of a card
    named = [kind.name for kind in GPU_SPECS.values() if re.fullmatch(rf"{kind.name}(-.*)?", plain)]
    if not named:
        return None
    base = re.sub(r"-\d+gb$", "", max(named, key=len))
    kinds = [kind for kind in GPU_SPECS.values() if re.fullmatch(rf"{base}(-\d+gb)?", kind.name)]
    if not total_bytes:
        return kinds[0]
    # The same name is sold with different memory.
    nearest = min(kinds, key=lambda kind: abs(kind.gib - total_bytes / 2**30))
    return nearest if abs(nearest.gib - total_bytes / 2**30) < 0.15 * nearest.gib else None


def normalize_gpu_name(name: str) -> str:
    """'NVIDIA GeForce RTX 4070 Ti' and 'rtx4070ti' to 'rtx-4070-ti'."""
    plain = re.sub(r"nvidia|geforce|tesla|-?sxm\d?|-?pcie?|hbm\d?e?", " ", name.lower())
    plain = re.sub(r"(rtx)\s*[-_]?\s*(\d{4}|a\d{4})", r"\1-\2-", plain)
    plain = re.sub(r"(\d)\s*-?\s*(ti|super)\b", r"\1-\2", re.sub(r"(ti)(super)", r"\1-\2", plain))
    return re.sub(r"[\s_-]+", "-", re.sub(r"(\d+)\s*gb", r"\1gb", plain)).strip("-")
