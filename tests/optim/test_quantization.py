"""Stochastic rounding to 8 bits and bfloat16 is exact on average and close each time."""

from __future__ import annotations

import pytest
import torch

from gpt2box.optim.quantization import code_values, dequantize, quantize, round_to_bfloat16
from tests.helpers.optimizers import generator


@pytest.mark.parametrize("signed", [True, False])
def test_8_bit_values_are_exact_on_average_and_close_each_time(signed: bool) -> None:
    assert len(code_values(signed, torch.device("cpu")).unique()) == 256
    values = torch.randn(1000, generator=generator()).double().exp().float()
    if signed:
        values *= torch.randn(1000, generator=generator()).sign()
    rng = generator()
    drawn = torch.stack([dequantize(*quantize(values, signed, rng), signed) for _ in range(400)])
    largest = torch.nn.functional.pad(values.abs(), (0, 24)).view(-1, 256).amax(1).repeat_interleave(256)[:1000]
    assert ((drawn - values).abs() / largest).max() < (0.015 if signed else 0.008)
    assert ((drawn.mean(0) - values).abs() / largest).max() < 0.002
    if signed:  # a block whose largest absolute value is negative
        value = torch.tensor([-1.0, 0.3])
        for _ in range(100):
            value = dequantize(*quantize(value, True, rng), True)
        assert float(value[0]) == pytest.approx(-1.0, rel=1e-4)
    zeros, tiny = torch.zeros(300), torch.full((300,), 1e-30)
    assert not dequantize(*quantize(zeros, signed, rng), signed).any()
    assert signed or dequantize(*quantize(torch.cat([tiny, torch.ones(10)]), False, rng), False).all()


def test_bfloat16_values_are_exact_on_average() -> None:
    values = torch.tensor([1.001, -3.1415926, 1e-20, 0.0, 65_000.0])
    rng = generator()
    drawn = torch.stack([round_to_bfloat16(values, rng).float() for _ in range(4000)])
    assert torch.allclose(drawn.mean(0), values, rtol=2e-4)
    assert all(len(drawn[:, i].unique()) == (1 if values[i] == 0 else 2) for i in range(4))
