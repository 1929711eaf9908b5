"""vae.py against diffusers' AutoencoderDC, an independent implementation, on small random models."""

import doctest
import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderDC
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import vae
from bench import count
from vae import DCAE, DCAEConfig, relu_attention

RES, VIT = "ResBlock", "EfficientViTBlock"
PLAIN = DCAEConfig(latent_channels=8, attention_head_dim=32,
                   encoder_block_types=(RES, RES, VIT), decoder_block_types=(RES, RES, VIT),
                   encoder_block_out_channels=(32, 64, 128), decoder_block_out_channels=(32, 64, 128),
                   encoder_layers_per_block=(2, 1, 2), decoder_layers_per_block=(1, 2, 1),
                   encoder_qkv_multiscales=((), (), (5,)), decoder_qkv_multiscales=((), (), (5,)))
# Every alternative of the config, sides that differ, no two neighbouring numbers alike.
ODD = DCAEConfig(in_channels=4, latent_channels=8, attention_head_dim=16,
                 encoder_block_types=(VIT, RES, VIT, VIT), decoder_block_types=(RES, VIT, RES, VIT),
                 encoder_block_out_channels=(48, 24, 16, 32), decoder_block_out_channels=(20, 16, 32, 64),
                 encoder_layers_per_block=(1, 2, 1, 3), decoder_layers_per_block=(2, 1, 3, 1),
                 encoder_qkv_multiscales=((3,), (), (), (3, 5)), decoder_qkv_multiscales=((), (5, 3), (), ()),
                 downsample_block_type="pixel_unshuffle", upsample_block_type="pixel_shuffle",
                 decoder_norm_types=("rms_norm",) * 4, decoder_act_fns=("relu", "silu", "silu", "relu"),
                 decoder_conv_act_fn="silu", scaling_factor=1.7, decoder_in_shortcut=False)
ONE_NAME = DCAEConfig(latent_channels=6, attention_head_dim=16,
                      encoder_block_types=VIT, decoder_block_types=RES,
                      encoder_block_out_channels=(32, 16), decoder_block_out_channels=(24, 48),
                      encoder_layers_per_block=(1, 2), decoder_layers_per_block=(2, 1),
                      encoder_qkv_multiscales=((), (7,)), decoder_qkv_multiscales=((), ()),
                      scaling_factor=0.3, encoder_out_shortcut=False)
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
# stage of PLAIN has 24, 32 and 80 of them (head_dim 32), of ODD 2 and 20 (16), of ONE_NAME 4 and 60 (16).
# Heads narrower than 16 would often be all zero after ReLU; next to that kink gradients are ill-conditioned.
CASES = [(PLAIN, 16, 24), (PLAIN, 32, 16), (PLAIN, 40, 32), (ODD, 16, 8), (ODD, 32, 40), (ONE_NAME, 4, 4),
         (ONE_NAME, 12, 20)]


def draw(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pair(config: DCAEConfig) -> tuple[DCAE, AutoencoderDC]:
    """Ours and the reference, with the same weights; norms and biases are random as well."""
    reference = AutoencoderDC(**config.to_json()).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in reference.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
        parameter.data = noise / fan_in ** 0.5
    ours = DCAE(config).eval()
    ours.load_state_dict(reference.state_dict(), strict=True)
    return ours, reference


def error(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.abs().max()).item()


def value_and_grad(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = function(x)
    return y.detach(), torch.autograd.grad((y * draw(y.shape, 3)).sum(), x)[0]


@pytest.mark.parametrize("config, H, W", CASES)
def test_values_and_gradients_match_the_reference(config: DCAEConfig, H: int, W: int) -> None:
    ours, reference = pair(config)
    s, f = config.scaling_factor, ours.spatial_compression
    images = draw((2, config.in_channels, H, W), 4)
    latents = draw((2, config.latent_channels, H // f, W // f), 5)
    z, z_grad = value_and_grad(ours.encode, images)
    z_ref, z_ref_grad = value_and_grad(lambda x: reference.encode(x).latent * s, images)
    assert error(z, z_ref) < 1e-5 and error(z_grad, z_ref_grad) < 1e-5
    x, x_grad = value_and_grad(ours.decode, latents)
    x_ref, x_ref_grad = value_and_grad(lambda z: reference.decode(z / s).sample, latents)
    assert error(x, x_ref) < 1e-5 and error(x_grad, x_ref_grad) < 1e-5


@pytest.mark.parametrize("config, H, W", [(PLAIN, 16, 24), (PLAIN, 40, 32), (ODD, 32, 40)])
def test_bf16_is_as_exact_as_the_reference(config: DCAEConfig, H: int, W: int) -> None:
    ours, reference = pair(config)
    s = config.scaling_factor
    images = draw((2, config.in_channels, H, W), 4)
    with torch.no_grad():
        z = ours.encode(images)
        x = ours.decode(z)
        ours, reference = ours.bfloat16(), reference.bfloat16()
        images, latents = images.bfloat16(), z.bfloat16()
        for exact, mine, theirs in ((z, ours.encode(images), reference.encode(images).latent * s),
                                    (x, ours.decode(latents), reference.decode(latents / s).sample)):
            assert mine.dtype == torch.bfloat16
            assert error(mine.float(), exact) < 0.03
            assert error(mine.float(), exact) < 1.3 * error(theirs.float(), exact) + 1e-3


@pytest.mark.parametrize("config", [PLAIN, ODD, ONE_NAME, DCAEConfig()])
def test_names_and_shapes_are_the_published_ones(config: DCAEConfig) -> None:
    with torch.device("meta"):
        ours, reference = DCAE(config).state_dict(), AutoencoderDC(**config.to_json()).state_dict()
    assert {name: p.shape for name, p in ours.items()} == {name: p.shape for name, p in reference.items()}


def test_full_size() -> None:
    with torch.device("meta"):
        full = DCAE(DCAEConfig())
    assert sum(p.numel() for p in full.parameters()) == 312_250_275
    assert sum(p.numel() for p in full.encoder.parameters()) == 153_027_104
    assert len(full.state_dict()) == 375
    assert full.spatial_compression == 32 and DCAE(PLAIN).spatial_compression == 4


def test_config_from_json() -> None:
    assert DCAEConfig.from_json(PUBLISHED) == DCAEConfig()
    for config in (DCAEConfig(), ODD, ONE_NAME):
        assert DCAEConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    with torch.device("meta"):
        theirs = AutoencoderDC(**ODD.to_json()).config
    assert DCAEConfig.from_json(theirs) == ODD
    hash(DCAEConfig.from_json(PUBLISHED))                   # lists, left in, would not hash


def test_scaling_factor_is_applied_on_both_sides() -> None:
    ours, _ = pair(replace(PLAIN, scaling_factor=1.0))
    scaled = DCAE(replace(PLAIN, scaling_factor=0.25))
    scaled.load_state_dict(ours.state_dict())
    images = draw((1, 3, 16, 16), 4)
    with torch.no_grad():
        z = ours.encode(images)
        assert torch.equal(scaled.encode(images), z * 0.25)
        assert torch.equal(scaled.decode(z * 0.25), ours.decode(z))


def test_any_float_dtype_goes_in_and_that_of_the_weights_comes_out() -> None:
    ours, _ = pair(PLAIN)
    ours.bfloat16()
    image, z = draw((1, 3, 16, 24), 4), draw((1, 8, 4, 6), 5)
    with torch.no_grad():
        for call, x in ((ours.encode, image), (ours.decode, z)):
            assert call(x).dtype == torch.bfloat16 and torch.equal(call(x), call(x.bfloat16()))


def test_chunked_decode_is_equal() -> None:
    ours, _ = pair(PLAIN)
    z = draw((5, 8, 4, 6), 4)
    with torch.no_grad():
        whole = ours.decode(z)
        seen = []
        ours.decoder.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
        assert error(ours.decode(z, chunk=2), whole) < 1e-6
    assert seen == [2, 2, 1]


def test_results_are_contiguous() -> None:
    # safetensors refuses any other layout, and inside everything is channels-last
    ours = DCAE(PLAIN)
    z = ours.encode(draw((2, 3, 16, 16), 4))
    assert z.is_contiguous() and ours.decode(z).is_contiguous() and ours.decode(z, chunk=1).is_contiguous()


def test_attention_stays_fp32_under_autocast() -> None:
    q, k, v = draw((3, 1, 2, 500, 32), 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = relu_attention(q, k, v)
    assert out.dtype == torch.float32 and torch.equal(out, relu_attention(q, k, v))


def test_attention_with_nothing_positive_is_zero() -> None:
    q, k, v = draw((3, 1, 1, 50, 8), 4)
    q = -q.abs()
    q.requires_grad_()
    out = relu_attention(q, k, v)
    out.sum().backward()
    assert out.abs().max() == 0 and q.grad.abs().max() == 0


def test_init_weights_sets_every_parameter_from_the_generator() -> None:
    first, second, other = DCAE(ODD), DCAE(ODD), DCAE(ODD)
    for model, seed in ((first, 1), (second, 1), (other, 2)):
        for p in model.parameters():
            p.data.fill_(float("nan"))
        model.init_weights(torch.Generator().manual_seed(seed))
    for a, b, c in zip(first.parameters(), second.parameters(), other.parameters()):
        assert a.isfinite().all() and torch.equal(a, b)
        assert a.ndim == 1 or not torch.equal(a, c)
    images = first.decode(first.encode(draw((1, 4, 16, 16), 4)))
    assert 0.01 < images.std() < 100


@pytest.mark.parametrize(("coarse", "fine", "shuffle"), [
    (8, 4, False), (8, 8, False), (8, 2, False), (4, 8, False), (4, 3, False), (4, 6, True), (8, 4, True)])
def test_up_is_doubling_a_convolution_and_a_shortcut_of_pixels(coarse: int, fine: int, shuffle: bool) -> None:
    """With doubling, as one transposed convolution of four ninths the work."""
    up, x = vae.Up(coarse, fine, shuffle), draw((2, coarse, 3, 5), 1)
    up.conv.weight.data, up.conv.bias.data = (draw(tuple(p.shape), i) for i, p in enumerate(
        (up.conv.weight, up.conv.bias), 2))

    def plain(x: Tensor) -> Tensor:
        y = (torch.nn.functional.pixel_shuffle(up.conv(x), 2) if shuffle
             else up.conv(torch.nn.functional.interpolate(x, scale_factor=2, mode="nearest")))
        return y + torch.nn.functional.pixel_shuffle(x.repeat_interleave(4 * fine // coarse, dim=1), 2)
    flops = []
    for function in (up, plain):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            function(x)
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] if shuffle else 9 * flops[0] == 4 * flops[1]
    (y, gradient), (want, want_gradient) = value_and_grad(up, x), value_and_grad(plain, x)
    assert error(y, want) < 1e-6 and error(gradient, want_gradient) < 1e-6


def test_without_gradient_little_fresh_memory_is_asked_for() -> None:
    """An activation takes none, doubling its convolution and the shuffling of it; a residual block takes five
    times its input with gradient, twice without."""
    x, up, block = draw((2, 8, 32, 32), 1), vae.Up(8, 8, shuffle=True), vae.ResBlock(8, "silu")
    x = x.contiguous(memory_format=torch.channels_last)
    size = 4 * x.numel()
    with torch.no_grad():
        assert all(act(y := x.clone()).data_ptr() == y.data_ptr() for act in (vae.silu, vae.relu))
        assert count(lambda: up(x), x.device).memory < 2.5 * 4 * size           # the result has 4 sizes
        assert count(lambda: block(x), x.device).memory < 2.5 * size
    assert vae.silu(x).data_ptr() != x.data_ptr() and vae.relu(x).data_ptr() != x.data_ptr()
    assert count(lambda: block(x), x.device).memory > 3.5 * size


@pytest.mark.parametrize("config", [ODD, ONE_NAME])
def test_overwriting_without_gradient_changes_no_bit_and_no_input(config: DCAEConfig) -> None:
    ours = DCAE(config)
    ours.init_weights(torch.Generator().manual_seed(1))
    images = draw((2, config.in_channels, 16, 16), 4)
    latents = ours.encode(images)                                               # with gradient: nothing is
    pictures, given = ours.decode(latents), (images.clone(), latents.detach().clone())
    with torch.no_grad():
        assert torch.equal(ours.encode(images), latents) and torch.equal(ours.decode(latents), pictures)
    assert torch.equal(images, given[0]) and torch.equal(latents, given[1])
    assert pictures.requires_grad


def test_compiles_into_one_graph() -> None:
    ours = DCAE(ONE_NAME)
    encode = torch.compile(ours.encoder, fullgraph=True, backend="eager")
    decode = torch.compile(ours.decoder, fullgraph=True, backend="eager")
    images = draw((1, 3, 16, 16), 4)
    with torch.no_grad():
        z = ours.encoder(images)
        assert error(encode(images), z) < 1e-6 and error(decode(z), ours.decoder(z)) < 1e-6


@pytest.mark.parametrize("change, sentence", [
    ({"encoder_layers_per_block": (1, 1)}, "encoder_layers_per_block needs one entry for each of the 3"),
    ({"decoder_layers_per_block": (0, 1, 1)}, "decoder_layers_per_block: a stage of 0 layers is not"),
    ({"decoder_block_types": (RES, "Dense", RES)}, "decoder_block_types 'Dense' is not implemented"),
    ({"decoder_norm_types": "batch_norm"}, "decoder_norm_types 'batch_norm' is not implemented"),
    ({"decoder_norm_types": ("batch_norm", "rms_norm", "rms_norm")}, "'batch_norm' is not implemented"),
    ({"decoder_act_fns": "gelu"}, "decoder_act_fns 'gelu' is not implemented; choose from silu, relu"),
    ({"decoder_conv_act_fn": "tanh"}, "decoder_conv_act_fn 'tanh' is not implemented"),
    ({"downsample_block_type": "avg"}, "downsample_block_type 'avg' is not implemented"),
    ({"upsample_block_type": "bilinear"}, "upsample_block_type 'bilinear' is not implemented"),
    ({"attention_head_dim": 48}, "128 channels of an EfficientViTBlock .* by attention_head_dim 48"),
    ({"encoder_block_out_channels": (32, 96, 128)}, "encoder_block_out_channels: 32 then 96"),
    ({"decoder_block_out_channels": (32, 96, 128)}, "decoder_block_out_channels: 32 then 96"),
    ({"encoder_qkv_multiscales": ((), (), (4,))}, "encoder_qkv_multiscales: kernel sizes must be odd"),
    ({"latent_channels": 7}, "the last, 128, must be divisible by latent_channels 7"),
    ({"scaling_factor": 0.0}, "scaling_factor must be positive"),
])
def test_config_refuses_by_name(change: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        replace(PLAIN, **change)


def test_json_refuses_by_name() -> None:
    with pytest.raises(ValueError, match=r"unknown keys \['layers'\]"):
        DCAEConfig.from_json({**PUBLISHED, "layers": 3})
    with pytest.raises(ValueError, match=r"missing keys \['scaling_factor'\]"):
        DCAEConfig.from_json({key: value for key, value in PUBLISHED.items() if key != "scaling_factor"})


def test_shapes_are_refused_with_what_was_expected() -> None:
    ours = DCAE(PLAIN)
    for H, W in ((18, 16), (16, 18)):
        with pytest.raises(ValueError, match=f"divisible by 4, got {H} x {W}"):
            ours.encode(torch.zeros(1, 3, H, W))
    with pytest.raises(ValueError, match=r"encode expects images \(B, 3, H, W\), got \(1, 16, 16, 3\)"):
        ours.encode(torch.zeros(1, 16, 16, 3))
    with pytest.raises(ValueError, match=r"decode expects latents \(B, 8, H, W\), got \(8, 4, 4\)"):
        ours.decode(torch.zeros(8, 4, 4))
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        ours.decode(torch.zeros(1, 8, 4, 4), chunk=0)


def test_examples_in_the_docstrings() -> None:
    result = doctest.testmod(vae)
    assert result.attempted > 0 and result.failed == 0
