"""LIM against plain loops, hand formulas and an independent encoder (paper Eq. 4 to 6)."""
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from helpers import draw
from lim import LIM, LIMConfig
from naive import siglip_connector
from tools.meter import Meter

SMALL = LIMConfig(vlm_layers=5, width=16, num_layers=2, num_heads=4, mlp_width=24, caption_channels=10)


def random_lim(config: LIMConfig = SMALL) -> LIM:
    """Every parameter random: at their start biases and norm weights are 0 and 1, and would hide mistakes."""
    lim, rng = LIM(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in lim.parameters():
            p.normal_(std=0.3, generator=rng)
    return lim


def value_and_gradients(lim: LIM, q: Tensor,
                        forward: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
    q = q.clone().requires_grad_()
    c = (forward or lim)(q)
    return c.detach(), list(torch.autograd.grad((c * draw(*c.shape)).sum(), [q, *lim.parameters()]))


def test_forward_is_the_loop_over_layers_and_prompts() -> None:
    lim, q = random_lim(), draw(5, 3, 4, 16)

    def loop(q: Tensor) -> Tensor:
        features = [lim.connector(q[i, b][None]) for i in range(5) for b in range(3)]
        rows = [lim.agglayer_norm(lim.projector(each)) for each in features]
        return torch.cat(rows).unflatten(0, (5, 3))
    (c, gradients), (want, want_gradients) = value_and_gradients(lim, q), value_and_gradients(lim, q, loop)
    torch.testing.assert_close(c, want, rtol=0, atol=1e-5)
    torch.testing.assert_close(gradients, want_gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_the_connector_is_the_siglip_encoder_with_the_same_names(scale: float) -> None:
    """Small inputs tell the eps of its LayerNorms."""
    lim, x = random_lim(), scale * draw(3, 4, 16)
    torch.testing.assert_close(lim.connector(x), siglip_connector(lim)(x), rtol=0, atol=1e-5)
    assert lim.agglayer_norm.eps == 1e-5


@pytest.mark.parametrize("switch", ["gradient_checkpointing", "recompute"])
def test_what_is_computed_again_changes_no_bit(switch: str) -> None:
    calls, results = [], []
    for again in (False, True):
        lim = random_lim()
        mlp = lim.connector.layers[0].mlp
        setattr(mlp if switch == "recompute" else lim.connector, switch, again)
        mlp.fc2.register_forward_pre_hook(lambda *_: calls.append(1))
        results.append(value_and_gradients(lim, draw(5, 3, 4, 16)))
    (c, gradients), (c_again, gradients_again) = results
    assert len(calls) == 3, "once without, twice with it"
    assert torch.equal(c, c_again)
    assert all(map(torch.equal, gradients, gradients_again))


def test_the_start_is_siglips() -> None:
    config = LIMConfig(vlm_layers=5, width=64, num_layers=1, num_heads=4, mlp_width=128, caption_channels=96)
    lim = LIM(config)
    lim.init_weights(torch.Generator().manual_seed(3))
    layer = lim.connector.layers[0]
    for linear in (*layer.self_attn.children(), layer.mlp.fc1, layer.mlp.fc2):
        bound = (6 / sum(linear.weight.shape)) ** 0.5
        assert 0.98 * bound < linear.weight.abs().max() <= bound
    assert 0.98 / 8 < lim.projector.weight.abs().max() <= 1 / 8
    assert all(not linear.bias.any() for linear in layer.self_attn.children())
    assert 0.5e-6 < layer.mlp.fc1.bias.std() < 2e-6


def test_perturb_is_the_mean_of_the_perturbed_layers() -> None:
    """c_i (1 + noise_i) for layers 2 and 4 of 2, 3, 4; three pictures of each of two prompts."""
    lim, c_layers = LIM(replace(SMALL, layers=(2, 3, 4))), draw(5, 2, 4, 10)
    noise = draw(2, 6, 4, 10, seed=2)
    c = c_layers.repeat_interleave(3, 1)                                                # (L, B G, N, E)
    want = (c[1] * (1 + noise[0]) + c[2] + c[3] * (1 + noise[1])) / 3
    fused, perturbed = lim.fuse(c_layers), c_layers[[1, 3]]
    with Meter() as both:
        got = lim.perturb(fused, perturbed, list(noise))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    # more layers take no more memory
    with Meter() as one:
        lim.perturb(fused, perturbed[:1], list(noise[:1]))
    assert one.peak == both.peak


def test_kept_noise_multiplies_each_layer_for_all_prompts() -> None:
    lim, q, kept = random_lim(), draw(5, 3, 4, 16), draw(5, 4, 10, seed=2)
    plain = lim(q)
    lim.kept_noise = kept
    torch.testing.assert_close(lim(q), plain * kept[:, None])
    assert "kept_noise" not in lim.state_dict()


@pytest.mark.parametrize("layers", [(0,), (6,), (2, 2)])
def test_a_layer_that_is_not_there_or_named_twice_is_an_error(layers: tuple[int, ...]) -> None:
    with pytest.raises(AssertionError, match="no such layers"):
        LIM(replace(SMALL, layers=layers))
