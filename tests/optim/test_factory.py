"""Parameter groups of the optimizer."""

from __future__ import annotations

from gpt2box.optim.factory import make_optimizer
from tests.helpers.models import tiny_model
from tests.helpers.optimizers import plan


def test_weight_decay_applies_to_matrices_only() -> None:
    model = tiny_model()
    groups = make_optimizer(model, plan(weight_decay="0.3")).param_groups
    decayed = {id(p) for p in groups[0]["params"]}
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decayed) == (
            name.endswith("weight") and ".ln_" not in name and name != "ln_f.weight"
        ), name
