"""models/inference.py on the CPU: what is prepared computes the same."""

import ctypes
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import cublaslt
from models.dit import DiT
from models.inference import Float8Linear, GeluLinear, quicken, stack, stack_pairs, to_float8
from models.operators import build_operator
from models.restructure import parallelize


def inputs(dtype=torch.float32):
    return torch.randn(2, 4, 8, 8, dtype=dtype), torch.tensor([3, 900]), torch.tensor([1, 5])


def tiny(pairs=(), windows=()):
    """windows: blocks whose attention is local."""
    torch.manual_seed(0)
    model = DiT(input_size=8, hidden_size=64, depth=4, num_heads=4, num_classes=5)
    for block in windows:
        model.blocks[block].attn = build_operator("swa", embed_dim=64, num_heads=4)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return parallelize(model, pairs).eval()


@pytest.mark.parametrize("pairs", [(), ((1, 2),), ((0, 1), (2, 3))], ids=str)
def test_a_prepared_model_computes_the_same(pairs):
    model, given = tiny(pairs), inputs()
    names = set(model.state_dict())
    with torch.no_grad():
        expected = model(*given)
        said = quicken(model, torch.float32)
        torch.testing.assert_close(model(*given), expected, rtol=0, atol=0)
        assert set(model.state_dict()) == names
    assert said == (["parallel pairs: two passes, one a block"] if pairs else [])


@pytest.mark.parametrize("gelu", [False, True], ids=["apart", "gelu"])
@pytest.mark.parametrize("windows", [(), (2, 3)], ids=["attention", "windows"])
@pytest.mark.parametrize("pairs", [((1, 2),), ((0, 1), (2, 3))], ids=str)
def test_a_stacked_pair_computes_what_two_passes_do(monkeypatch, pairs, windows, gelu):
    """In float64, before and after blocks alone, with GELU in its product and apart from it."""
    model, given, ran = tiny(pairs, windows).double(), inputs(torch.float64), []
    if gelu:
        monkeypatch.setattr(GeluLinear, "forward", lambda self, x: F.gelu(
            F.linear(x, self.weight, self.bias), approximate="tanh"))  # fmt: skip
        for block in model.blocks:
            block.mlp.fc1, block.mlp.act = GeluLinear(block.mlp.fc1), nn.Identity()
    with torch.no_grad():
        expected = model(*given)
        said = stack_pairs(model)
        for block in (*model.blocks, *model.stacks.values()):
            block.register_forward_hook(lambda block, *_: ran.append(block))
        torch.testing.assert_close(model(*given), expected, rtol=1e-12, atol=1e-12)
    alike = [pair for pair in pairs if pair != (1, 2) or not windows]
    assert len(model.stacks) == len(alike) and len(ran) == 4 - len(alike)
    few = "parallel pairs: one pass of both blocks up to 1024 tokens in a pass"
    assert said[: bool(alike)] == [f"{few}: {len(alike)}"] * bool(alike)
    assert said[bool(alike) :] == [
        f"parallel pairs: two passes, one a block, of blocks that do not stack: {a} and {b}"
        for a, b in pairs if (a, b) not in alike
    ]  # fmt: skip


def test_many_samples_and_gradients_take_two_passes(monkeypatch):
    model, given, ran = tiny(((0, 1),)), inputs(), []
    stack_pairs(model)
    model.stacks["0"].register_forward_hook(lambda *_: ran.append(1))
    with torch.no_grad():
        expected = model(*given)
        assert ran == [1]
        torch.testing.assert_close(model(*(torch.cat([t] * 33) for t in given))[:2], expected)
    model(*given)
    assert ran == [1]


def test_a_stack_takes_no_memory_of_its_own():
    model = tiny(((0, 1),))
    expected = model.blocks[1].attn.qkv.weight.clone()
    stack_pairs(model)
    both = model.stacks["0"].attn.qkv
    for i, block in enumerate(model.blocks[:2]):
        assert block.attn.qkv.weight.data_ptr() == both.weight[i].data_ptr()
        assert block.attn.qkv.bias.data_ptr() == both.bias[i].data_ptr()
    assert torch.equal(model.blocks[1].attn.qkv.weight, expected)
    assert torch.equal(both.weight[1], expected)


def test_weights_load_into_a_model_with_stacks():
    model, other, given = tiny(((0, 1),)), tiny(((0, 1),)), inputs()
    for parameter in other.parameters():
        parameter.data.mul_(0.9)
    stack_pairs(model)
    model.load_state_dict(other.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(*given), other(*given))


def test_blocks_with_other_operators_have_no_stack():
    model = tiny(windows=(1,))
    assert stack(*model.blocks[:2]) is None
    for block in model.blocks[2:]:
        block.attn = build_operator("hyena_y", d_model=64, l_max=16)
    assert stack(*model.blocks[2:]) is None  # filters lie outside of linear layers


def test_without_stacked_products_pairs_take_two_passes_and_say_why(monkeypatch):
    def fail(*given):
        raise RuntimeError("cublasLtMatmulDescCreate of cuBLASLt ends with status 15")

    why = cublaslt.refusal
    monkeypatch.setattr(cublaslt, "refusal", lambda device: why(torch.device("cuda")))
    monkeypatch.setattr(cublaslt, "_product", fail)
    model = tiny(((0, 1),))
    (said,) = stack_pairs(model)
    assert not model.stacks and said == (
        "parallel pairs: two passes, one a block (stacked products do not run here: "
        "cublasLtMatmulDescCreate of cuBLASLt ends with status 15)"
    )
    monkeypatch.setattr(cublaslt, "_product", lambda *_: SimpleNamespace(settle=lambda _: False))
    (said,) = stack_pairs(model)
    assert "(stacked products disagree with PyTorch's)" in said
    assert stack_pairs(tiny()) == []


def test_products_keep_the_first_way_that_is_right(monkeypatch):
    product = cublaslt._Product.__new__(cublaslt._Product)
    product.shapes, product.gelu, ran = ((2, 5, 8), (2, 16, 8), (2, 16)), False, []

    def run(self, way, x, weight, bias, out):
        ran.append(way)
        if way == "unsupported":
            raise RuntimeError
        out.copy_(cublaslt.by_pytorch(x, weight, bias, False) * (2 if way == "wrong" else 1))

    monkeypatch.setattr(cublaslt._Product, "run", run)
    for ways, kept in ((["unsupported", "wrong", "right", "more"], ["right"]), (["wrong"], [])):
        product.ways = ways
        assert product.settle(torch.device("cpu")) == bool(kept) and product.ways == kept
    assert ran == ["unsupported", "wrong", "right", "wrong"]


def test_cublaslt_is_told_what_its_header_says():
    """The library that PyTorch brings takes descriptions without a GPU."""
    if torch.version.cuda is None:
        pytest.skip("this PyTorch is built without CUDA")
    product = cublaslt._Product(2, 512, 1152, 3456, True)
    held, size = ctypes.c_int64(), ctypes.c_size_t()
    for matrix, attribute, expected in (
        (product.matrices[0], 2, 1152), (product.matrices[0], 3, 3456),  # rows, columns
        (product.matrices[1], cublaslt.STRIDE, 512 * 1152), (product.matrices[2], 3, 512),
    ):  # fmt: skip
        cublaslt._call("cublasLtMatrixLayoutGetAttribute", matrix, attribute, ctypes.byref(held),
                       ctypes.c_size_t(8), ctypes.byref(size))  # fmt: skip
        assert held.value == expected
    cublaslt._call("cublasLtMatmulDescGetAttribute", product.description, cublaslt.BIAS_STRIDE,
                   ctypes.byref(held), ctypes.c_size_t(8), ctypes.byref(size))  # fmt: skip
    assert held.value == 3456 and ctypes.sizeof(cublaslt._Way) == 96
    with pytest.raises(RuntimeError, match="cublasLtMatmulDescSetAttribute .* with status"):
        product._set(cublaslt.EPILOGUE, ctypes.c_int64(36))


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
