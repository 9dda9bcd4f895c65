"""GPUs by the names that drivers and people use."""

from __future__ import annotations

import pytest

from gpt2box.planner.gpu_specs import gpu_spec_named, gpu_spec_of_device
from gpt2box.planner.memory import GIB


def test_gpus_are_found_by_the_names_that_drivers_and_people_use() -> None:
    for name, kind in {
        "NVIDIA GeForce RTX 4070": "rtx-4070",
        "NVIDIA GeForce RTX 4070 Ti SUPER": "rtx-4070-ti-super",
        "NVIDIA A100-SXM4-40GB": "a100-40gb",
        "NVIDIA H100 80GB HBM3": "h100",
        "Tesla T4": "t4",
    }.items():
        found = gpu_spec_of_device(name, None)
        assert found and found.name == kind
    assert (
        gpu_spec_of_device("NVIDIA GeForce RTX 4070 Laptop GPU", 8 * GIB) is None
        and gpu_spec_of_device("Matrox G400", None) is None
    )
    assert (
        gpu_spec_of_device("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 5 * GIB) is None
        and gpu_spec_of_device("NVIDIA H100 NVL", 94 * GIB) is None
    )
    sixteen = gpu_spec_of_device("NVIDIA GeForce RTX 4060 Ti", 16 * GIB)
    assert sixteen and sixteen.name == "rtx-4060-ti-16gb"
    assert gpu_spec_named("RTX4070").gib == 12


@pytest.mark.parametrize("name", ["4070", "RTX 4070", "geforce rtx-4070", "4070-TI"])
def test_a_gpu_is_found_without_its_family_name(name: str) -> None:
    assert gpu_spec_named(name).name == ("rtx-4070-ti" if "TI" in name else "rtx-4070")
