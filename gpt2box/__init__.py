"""gpt2box: train and fine-tune GPT-2 on one consumer GPU, as an appliance."""

__version__ = "0.1.0"
