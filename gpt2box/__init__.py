"""gpt2box: train and fine-tune GPT-2 on one consumer GPU, as an appliance."""

import os

__version__ = "0.1.0"


def is_cpu_busy() -> bool:
    """Whether another process is running just now, and some were in the last minute."""
    try:
        with open("/proc/loadavg", encoding="ascii") as file:
            last_minute, _, _, running, _ = file.read().split()
        return float(last_minute) >= 1 and int(running.partition("/")[0]) > 1  # this one is among them
    except (OSError, ValueError):
        return False


# Read when PyTorch is loaded. A CPU's threads that wait for each other spin, and each holds a core that the one waited
# for may need: `bench demo`, two threads on two cores, load 4 to 8: 800 to 2,400 tokens/s; 10,000 to 19,000 where they
# sleep. On cores that are free, spinning is faster: 39,000, not 25,000.
if is_cpu_busy():
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
