"""latents/group_norm.py: the Triton kernels, run by Triton's interpreter on the CPU."""

import torch
from test_modulation import interpreted
from torch import nn

from latents import group_norm
from latents.codec import load_codec

KERNELS = """
import torch
from latents import group_norm
from latents.group_norm import _disagreement

cpu = torch.device("cpu")
torch.manual_seed(0)
# Three parts of several tiles, the last of them cut short
group_norm.ELEMENTS, group_norm.TILE, group_norm.MOST_PARTS = 512, 256, 64
for channels, groups in ((32, 32), (20, 10), (24, 8), (65, 13), (48, 3)):
    exact = _disagreement(channels, groups, cpu, torch.float32)
    half = [_disagreement(channels, groups, cpu, t) for t in (torch.bfloat16, torch.float16)]
    assert exact < 1e-6 and half[0] < 4e-3 and half[1] < 6e-4, (channels, groups, exact, half)
"""


MOMENTS = """
import torch
import torch.nn.functional as F
from latents import group_norm

torch.manual_seed(0)
group_norm.ELEMENTS, group_norm.TILE = 96, 48  # 4 rows a part, in 100 parts
maps = 0.1 * torch.randn(1, 24, 20, 20) + torch.linspace(-1000, 1000, 8).repeat_interleave(3)[
    :, None, None
]
maps[0, 0, 0, 0] = 5000  # what the first part is measured from
weight, bias = torch.randn(2, 24)
exact = F.group_norm(maps.double(), 8, weight.double(), bias.double(), 1e-6)
for layout in (torch.contiguous_format, torch.channels_last):
    found = group_norm.group_norm(maps.to(memory_format=layout), None, weight, bias, 8, 1e-6, False)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-2)
"""

CODEC = """
import copy
from dataclasses import replace
import torch
from torch import nn
from diffusers import AutoencoderKL
from latents import group_norm
from latents.codec import Codec
from latents.group_norm import Block, Norm, Upsample

torch.manual_seed(0)
group_norm.MOST_PARTS = 64
vae = AutoencoderKL(
    block_out_channels=(10, 12),  # the doubled maps have 12 channels, the last ones 10
    layers_per_block=1,
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    norm_num_groups=2,
)
vae = vae.to(memory_format=torch.channels_last).eval().requires_grad_(False)
for name, parameter in vae.named_parameters():
    if "norm" in name or name.endswith("bias"):  # ones and zeros would hide much
        nn.init.normal_(parameter)
fused = copy.deepcopy(vae)
group_norm.fuse(fused)
kinds = [type(module) for module in fused.modules()]
assert [kinds.count(k) for k in (Block, Norm, Upsample, nn.GroupNorm, nn.SiLU)] == [10, 24, 1, 0, 0]
assert fused.state_dict().keys() == vae.state_dict().keys()
exact = Codec(vae, 1.0, 2, 4, "", "", torch.device("cpu"), torch.float32)
images, latents = torch.rand(1, 3, 12, 8) * 2 - 1, torch.randn(1, 4, 6, 4)
for dtype, near in ((torch.float32, 1e-5), (torch.bfloat16, 5e-2)):
    mine = replace(exact, vae=fused, dtype=dtype)
    torch.testing.assert_close(mine.encode(images), exact.encode(images), rtol=0, atol=near)
    with torch.no_grad(), mine._autocast():
        decoded = fused.decode(latents).sample
    assert decoded.dtype == dtype
    with torch.no_grad():
        expected = vae.decode(latents).sample
    torch.testing.assert_close(decoded.float(), expected, rtol=0, atol=near)
fused.encoder.compile(backend="aot_eager", fullgraph=True)
mine = replace(exact, vae=fused)
torch.testing.assert_close(mine.encode(images), exact.encode(images), rtol=0, atol=1e-5)
"""

OPERATIONS = """
import torch
from latents import group_norm

def meta(x):
    if not isinstance(x, torch.Tensor):
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")

group_norm.MOST_PARTS = 64
weight, bias, addend = torch.randn(3, 6)
for shape in ((2, 6, 3, 5), (2, 6, 7), (1, 6, 1, 1)):
    plain = torch.randn(shape, dtype=torch.bfloat16)
    last = plain.movedim(1, -1).contiguous().movedim(-1, 1)
    gaps = torch.cat((last, last), dim=-1)[..., : shape[-1]]
    for x in (plain, last, gaps):
        for operation, given in (
            (group_norm.group_norm, (x, None, weight, bias, 3, 1e-6, False)),
            (group_norm.group_norm, (x, addend, weight, bias, 3, 1e-6, True)),
            (group_norm.add, (x, plain, bias)),
        ):
            real, fake = operation(*given), operation(*map(meta, given))
            assert (real.shape, real.stride()) == (fake.shape, fake.stride())
            assert real.dtype == fake.dtype == torch.bfloat16
"""


def test_kernels_agree_with_pytorch():
    """Groups of 1 to 16 channels, of numbers that are no powers of two too."""
    interpreted(KERNELS)


def test_deviations_small_beside_the_mean_are_kept():
    """Of a thousandth part and less; and a pixel far from all others first."""
    interpreted(MOMENTS)


def test_a_fused_vae_is_the_same():
    """Moments and images, in float32 and, but for rounding, in bf16; and the names of its state."""
    interpreted(CODEC)


def test_fakes_of_the_operations_are_like_their_results():
    """Maps in any layout, and of other dimensions than four."""
    interpreted(OPERATIONS)


def test_a_vae_stays_on_pytorch_where_the_kernels_do_not_serve():
    codec, cuda = load_codec("assets/mini/vae", dtype=torch.bfloat16), torch.device("cuda")
    assert group_norm.accelerate(codec.vae, codec.device, torch.bfloat16) == []
    for dtype, kernels, reason in (
        (torch.float32, "auto", "Triton is for bf16 and fp16"),
        (torch.bfloat16, "torch", "as --kernels says"),
    ):
        lines = group_norm.accelerate(codec.vae, cuda, dtype, kernels)
        assert lines == [f"group norms of the VAE: PyTorch ({reason})"]
    codec.vae.register_to_config(act_fn="gelu")
    assert group_norm.refusal(codec.vae, cuda, torch.bfloat16) == "is for SiLU, not gelu"
    kinds = [type(module) for module in codec.vae.modules()]
    assert kinds.count(nn.GroupNorm) == 30 and group_norm.Norm not in kinds
