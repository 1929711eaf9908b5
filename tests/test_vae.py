"""vae.py against diffusers' AutoencoderDC, an independent implementation, on random weights."""
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from common import write_json
from helpers import draw, error
from model import PRESETS
from naive import diffusers_vae
from tools.convert import check_config
from vae import DCAE, DCAEConfig, relu_attention

RES, VIT = "ResBlock", "EfficientViTBlock"
# The stages of nano's, in other numbers of layers, scaled.
PLAIN = replace(PRESETS["nano"].vae, encoder_layers_per_block=(2, 1, 2), decoder_layers_per_block=(1, 2, 1),
                scaling_factor=0.41407)
# Sides that differ, every kind of change of width, no two neighbouring numbers alike.
ODD = DCAEConfig(in_channels=4, latent_channels=8, attention_head_dim=16,
                 encoder_block_types=(VIT, RES, VIT, VIT), decoder_block_types=(RES, VIT, RES, VIT),
                 encoder_block_out_channels=(48, 24, 16, 32), decoder_block_out_channels=(8, 16, 16, 64),
                 encoder_layers_per_block=(1, 2, 1, 3), decoder_layers_per_block=(2, 1, 3, 1),
                 encoder_qkv_multiscales=((3,), (), (), (3, 5)), decoder_qkv_multiscales=((), (5, 3), (), ()),
                 scaling_factor=1.7)
# The published vae/config.json of SANA-1.5, as its JSON reads.
PUBLISHED = {"_class_name": "AutoencoderDC", "_name_or_path": "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers",
             "in_channels": 3, "latent_channels": 32, "attention_head_dim": 32,
             "encoder_block_types": [RES] * 3 + [VIT] * 3, "decoder_block_types": [RES] * 3 + [VIT] * 3,
             "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
             "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
             "encoder_layers_per_block": [2, 2, 2, 3, 3, 3], "decoder_layers_per_block": [3, 3, 3, 3, 3, 3],
             "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
             "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
             "downsample_block_type": "Conv", "upsample_block_type": "interpolate",
             "decoder_norm_types": "rms_norm", "decoder_act_fns": "silu", "scaling_factor": 0.41407}
# The reference has a second form of attention for stages with no more positions than head_dim. The coarsest
# stage of PLAIN has 24, 32 and 80 of them (head_dim 32), of ODD 2 and 20 (16). Heads narrower than 16 would
# often be all zero after ReLU; next to that kink gradients are ill-conditioned.
CASES = [(PLAIN, 16, 24), (PLAIN, 32, 16), (PLAIN, 40, 32), (ODD, 16, 8), (ODD, 32, 40)]


def pair(config: DCAEConfig) -> tuple[DCAE, nn.Module]:
    """Ours and the reference on the same tensors; norms and biases are random as well."""
    with torch.device("meta"):
        ours = DCAE(config)
    ours.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(1)
    for parameter in ours.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
        parameter.data.normal_(std=fan_in ** -0.5, generator=generator)
    return ours, diffusers_vae(ours)


def value_and_grad(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = function(x)
    return y.detach(), torch.autograd.grad((y * draw(*y.shape, seed=3)).sum(), x)[0]


@pytest.mark.parametrize("config, H, W", CASES)
def test_values_and_gradients_equal_the_reference(config: DCAEConfig, H: int, W: int) -> None:
    ours, reference = pair(config)
    s, f = config.scaling_factor, 2 ** (len(config.encoder_block_types) - 1)
    images = draw(2, config.in_channels, H, W, seed=5)
    latents = draw(2, config.latent_channels, H // f, W // f, seed=6)
    ways = ((ours.encode, lambda x: reference.encode(x).latent * s, images),
            (ours.decode, lambda z: reference.decode(z / s).sample, latents))
    for mine, theirs, x in ways:
        for got, want in zip(value_and_grad(mine, x), value_and_grad(theirs, x)):
            assert error(got, want) < 1e-5


def test_the_published_size_equals_the_reference() -> None:
    ours, reference = pair(DCAEConfig())
    image = draw(1, 3, 64, 32, seed=4)
    with torch.no_grad():
        z = ours.encode(image)
        assert z.shape == (1, 32, 2, 1) and error(z, reference.encode(image).latent * 0.41407) < 1e-5
        assert error(ours.decode(z), reference.decode(z / 0.41407).sample) < 1e-5
    assert sum(p.numel() for p in ours.parameters()) == 312_250_275
    assert sum(p.numel() for p in ours.encoder.parameters()) == 153_027_104
    assert len(ours.state_dict()) == 375


@pytest.mark.parametrize("config, H, W", CASES[2:])
def test_bf16_is_as_exact_as_the_reference(config: DCAEConfig, H: int, W: int) -> None:
    ours, reference = pair(config)
    s = config.scaling_factor
    images = draw(2, config.in_channels, H, W, seed=4)
    with torch.no_grad():
        x = ours.decode(z := ours.encode(images))
        ours, reference = ours.bfloat16(), reference.bfloat16()
        # ours takes any float dtype
        for exact, mine, theirs in ((z, ours.encode(images), reference.encode(images.bfloat16()).latent * s),
                                    (x, ours.decode(z), reference.decode(z.bfloat16() / s).sample)):
            assert mine.dtype == torch.bfloat16 and error(mine.float(), exact) < 0.03
            assert error(mine.float(), exact) < 1.3 * error(theirs.float(), exact) + 1e-3


def test_the_default_config_is_the_published_one(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", PUBLISHED)
    check_config(tmp_path / "config.json", DCAEConfig())


def test_attention_stays_fp32_under_autocast_and_is_zero_where_no_query_is_positive() -> None:
    q, k, v = draw(3, 1, 2, 500, 32, seed=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = relu_attention(q, k, v)
    assert out.dtype == torch.float32 and torch.equal(out, relu_attention(q, k, v))
    assert torch.equal(relu_attention(-q.abs(), k, v), torch.zeros_like(out))


@pytest.mark.parametrize("config", [PLAIN, ODD])
def test_overwriting_without_gradient_changes_no_bit_and_no_input(config: DCAEConfig) -> None:
    ours, _ = pair(config)
    images = draw(2, config.in_channels, 16, 16, seed=4)
    latents = ours.encode(images)                                   # with gradient: nothing is overwritten
    pictures, given = ours.decode(latents), (images.clone(), latents.detach().clone())
    assert pictures.requires_grad
    # safetensors refuses any other layout, and inside everything is channels-last
    assert latents.is_contiguous() and pictures.is_contiguous()
    with torch.no_grad():
        assert torch.equal(ours.encode(images), latents) and torch.equal(ours.decode(latents), pictures)
    assert torch.equal(images, given[0]) and torch.equal(latents, given[1])
