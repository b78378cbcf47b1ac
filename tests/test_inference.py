"""models/inference.py on the CPU: what is prepared computes the same."""

import pytest
import torch
from torch import nn

from models.dit import DiT
from models.inference import Float8Linear, quicken, to_float8
from models.restructure import parallelize


def tiny(pairs=()):
    torch.manual_seed(0)
    model = DiT(input_size=8, hidden_size=64, depth=4, num_heads=4, num_classes=5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return parallelize(model, pairs).eval()


@pytest.mark.parametrize("pairs", [(), ((1, 2),), ((0, 1), (2, 3))], ids=str)
def test_a_prepared_model_computes_the_same(pairs):
    model = tiny(pairs)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.tensor([1, 5])
    names = set(model.state_dict())
    with torch.no_grad():
        expected = model(*inputs)
        quicken(model, torch.float32)
        torch.testing.assert_close(model(*inputs), expected, rtol=0, atol=0)
        assert set(model.state_dict()) == names


def test_half_precision_weights_change_nothing_under_autocast():
    model = tiny()
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.tensor([1, 5])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(*inputs)
        quicken(model, torch.bfloat16)
        torch.testing.assert_close(model(*inputs), expected, rtol=0, atol=0)
    assert model.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
    assert model.pos_embed.dtype == torch.float32


def test_rows_in_8_bits_keep_their_largest_entry_and_three_bits_of_the_others():
    torch.manual_seed(0)
    rows = torch.randn(6, 80) * torch.logspace(-3, 3, 6)[:, None]
    rows[4] = 0
    small, scale = to_float8(rows)
    back = small.float() * scale
    largest = rows.abs().argmax(1, keepdim=True)
    torch.testing.assert_close(back.gather(1, largest), rows.gather(1, largest))
    assert ((back - rows).abs() <= 2**-4 * rows.abs() + 2**-9 * scale).all()


def test_8_bit_products_need_their_gpu():
    with pytest.raises(ValueError, match="--fp8: needs an Ada or Hopper GPU"):
        quicken(tiny(), torch.bfloat16, float8=True)


def test_an_8_bit_layer_keeps_the_shapes_of_its_linear_layer():
    layer = Float8Linear(nn.Linear(32, 48))
    assert layer.weight.dtype == torch.float8_e4m3fn and layer.weight.shape == (48, 32)
    assert layer.scale.shape == (1, 48)
