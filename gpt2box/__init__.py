"""gpt2box: train and fine-tune GPT-2 on one consumer GPU, as an appliance."""

import os

__version__ = "0.1.0"


def is_cpu_busy() -> bool:
    """Return True if other processes compete for the CPU, now and over the last minute."""
    try:
        with open("/proc/loadavg", encoding="ascii") as file:
            last_minute, _, _, running, _ = file.read().split()
        return float(last_minute) >= 1 and int(running.partition("/")[0]) > 1  # this one is among them
    except (OSError, ValueError):
        return False


# OpenMP reads this variable when PyTorch is loaded. Waiting threads spin by default, which occupies cores that the
# working threads need. Measured with `bench demo`, two threads on two cores: at a load of 4 to 8, spinning reaches 800
# to 2,400 tokens/s and sleeping 10,000 to 19,000; on idle cores, spinning reaches 39,000 and sleeping 25,000.
if is_cpu_busy():
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
