"""gpt2box: train and fine-tune GPT-2 on one consumer GPU, as an appliance."""

import os

__version__ = "0.1.0"

# Read when PyTorch is loaded: a CPU's threads that wait for each other sleep. Spinning, each holds a core that the one
# waited for may need: `bench demo`, two threads on two cores beside other work: 2,400 to 12,000 tokens/s, so 19,300.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
