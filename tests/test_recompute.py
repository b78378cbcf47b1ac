"""Blocks that run again in the backward pass: the same gradients, from less memory."""

import copy

import pytest
import torch
from restructured import WIDTH, scramble
from torch.autograd.graph import saved_tensors_hooks

from models.captions import Captions
from models.dit import DiT
from models.operators import build_operator
from models.pixart import PixArt
from models.presets import pixart_config
from models.recompute import recompute
from models.restructure import parallelize
from models.selection import GatedDiT, GraftPair, LayerGates, PairChoice
from training.lora import add_lora


def swa(**more):
    return build_operator("swa", embed_dim=WIDTH, num_heads=4, **more)


def plain():
    torch.manual_seed(0)
    return DiT(input_size=8, hidden_size=WIDTH, depth=4, num_heads=4, num_classes=5)


def open_slots():
    model = plain()
    for block in model.blocks[1:3]:
        block.attn = GraftPair(block.attn, swa())
    add_lora(model, 2, 4.0, exclude=(".graft.",))
    return model


def pairs():
    return parallelize(plain(), [(0, 1)])


def open_pairs():
    model = parallelize(plain(), [(0, 1), (2, 3)])
    model.merges["2"] = PairChoice(model.merges["2"])
    return model


def pixart():
    torch.manual_seed(0)
    return PixArt(pixart_config("PixArt-Mini"))


KINDS = [plain, open_slots, pairs, open_pairs, pixart]


def gradients(model, keep=None):
    """-> gradients by name, that of `keep` among them, and the bytes that are kept for them.

    Weights do not count; what enters the blocks, which `checkpoint` holds by itself, does.
    """
    torch.manual_seed(1)
    side, B = model.input_size, 3
    y, drop = torch.tensor([0, 2, 4]), torch.tensor([True, False, False])
    if isinstance(model, PixArt):
        width = model.config["caption_channels"]
        mask = torch.arange(6) < torch.tensor([[6], [2], [4]])
        null = torch.randn(1, 6, width), torch.ones(1, 6, dtype=torch.bool)
        y = Captions(torch.randn(B, 6, width), mask, *null)
    x, t = torch.randn(B, 4, side, side), torch.tensor([1, 500, 900])
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held = {}  # by address: a tensor that is kept twice is there once

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(x, t, y, keep=keep, drop=drop)
        kept = sum(held.values())
        if model.recomputes:
            kept += len(model.layers) * 4 * B * model.num_tokens * model.hidden_size
        output.square().sum().backward()
    leaves = dict(model.named_parameters()) | ({} if keep is None else {"keep": keep})
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}, kept


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_equal_and_less_is_kept(kind, compiled):
    model = scramble(kind()).train()
    again = copy.deepcopy(model)
    recompute(again)
    if compiled:  # block by block, as training.compilation does it
        for region in again.regions():
            region.compile(backend="aot_eager", dynamic=False)
    keeps = (None, None)
    if kind in (open_slots, open_pairs):
        keeps = [torch.rand(3, 4, generator=torch.Generator().manual_seed(2)) for _ in range(2)]
        keeps = [keep.requires_grad_() for keep in keeps]
    expected, before = gradients(model, keeps[0])
    found, after = gradients(again, keeps[1])
    assert found.keys() == expected.keys() and len(found) > 20
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if compiled else {"rtol": 0, "atol": 0}
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, **tolerance, msg=name)
    assert all(gradient.abs().max() > 0 for gradient in found.values())
    assert after < 0.3 * before


def test_a_gated_model_runs_blocks_once_without_gradients(monkeypatch):
    gated = GatedDiT(open_slots(), LayerGates(4, "2:4", pinned=[0, 3])).eval()
    recompute(gated.dit)
    monkeypatch.setattr("models.recompute.checkpoint", None)
    with torch.no_grad():
        gated(torch.randn(2, 4, 8, 8), torch.tensor([1, 9]), torch.tensor([0, 1]))


def test_dropout_is_refused():
    model = plain()
    model.blocks[2].attn = swa(dropout=0.1)
    with pytest.raises(ValueError, match=r"blocks\.2\.attn has dropout 0\.1.*operator's YAML"):
        recompute(model)
