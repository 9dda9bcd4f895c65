"""Loading of a checkpoint into an existing model and optimizer, one tensor at a time."""

from pathlib import Path

import torch

from gpt2box.checkpoint.metadata import TrainState
from gpt2box.checkpoint.safetensors_io import read_tensors
from gpt2box.checkpoint.writer import ADAPTERS_FILE, optimizer_tensors, trained_parameters
from gpt2box.distributed.fsdp import meta_tensor
from gpt2box.errors import BadInput, Damaged, printable_line
from gpt2box.model.gpt2 import GPT2
from gpt2box.model.hf_weights import PREFIX, copy_from_hf, load_hf_weights, stored_tensors
from gpt2box.model.lora import lora_parameters
from gpt2box.optim.low_memory_adamw import reset_state


@torch.no_grad()
def load_weights(folder: Path, model: GPT2) -> None:
    """Load the weights of a checkpoint; into a model with LoRA adapters, only these.

    Raises:
        BadInput: the adapters were trained on other weights than the model has; or see load_hf_weights.
        Damaged: the adapters do not fit this network.
    """
    trained = lora_parameters(model)
    if not trained:
        return load_hf_weights(model, folder, tensors=read_tensors(folder / "model.safetensors"))
    own = dict(model.named_parameters())
    for key, stored in stored_tensors(folder):
        name = key.removeprefix(PREFIX)
        # Compare norms and biases only: adapters leave them unchanged, and no two trainings end with the same values.
        if stored.dim() == 1 and name in own and not torch.equal(stored, own[name].float().cpu()):
            raise BadInput(
                f"the adapters in {folder} were trained on other weights than these: {name} differs",
                "the weights that init_from had when the run began",
            )
    missing = dict(trained)
    for name, tensor in read_tensors(folder / ADAPTERS_FILE):
        parameter = missing.pop(name, None)
        if parameter is None or parameter.shape != tensor.shape:
            found = f"{folder / ADAPTERS_FILE}: {printable_line(name)} of shape {list(tensor.shape)}"
            raise Damaged(found, "adapters as lora_rank has them")
        parameter.copy_(tensor)
    if missing:
        raise Damaged(f"{folder / ADAPTERS_FILE}: without {next(iter(missing))}", "adapters of all matrices")


@torch.no_grad()
def restore_checkpoint(folder: Path, model: GPT2, optimizer: torch.optim.Optimizer, state: TrainState) -> None:
    """Load the weights and the optimizer state of a verified checkpoint into the existing tensors.

    Raises BadInput, Damaged: they do not fit this network; see load_weights.
    """
    load_weights(folder, model)
    path = folder / "optimizer.safetensors"
    parameters = trained_parameters(model)
    loaded: set[str] = set()
    expected = {}
    if state.optimizer_steps:
        expected = {name: tensor.shape for name, tensor in optimizer_tensors(model, optimizer, meta_tensor)}
    for full_name, tensor in read_tensors(path):
        key, _, name = full_name.partition(".")
        if expected.pop(full_name, () if key == "step" else None) != tensor.shape:
            found = f"{path}: {printable_line(full_name)} of shape {list(tensor.shape)}"
            raise Damaged(found, "the optimizer state of the weights beside it")
        entry = optimizer.state[parameters[name]]
        if name not in loaded and key != "step":  # unless a step of its own is stored
            entry["step"].fill_(float(state.optimizer_steps))
        if entry[key].shape == parameters[name].shape:
            copy_from_hf(name, entry[key], tensor)
        else:
            entry[key].copy_(tensor)
        loaded.add(name)
    if missing := [name for name in expected if not name.startswith("step.")]:
        raise Damaged(f"{path}: without {missing[0]}", "the optimizer state of all weights")
    for name in parameters.keys() - loaded:  # a checkpoint of step 0 stores none
        reset_state(optimizer.state[parameters[name]])
