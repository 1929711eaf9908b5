"""LIM against explicit loops, an independent encoder and hand formulas; Eq. 5 with layers and noise."""
import pytest
import torch
from torch import Tensor

import lim as lim_module
from lim import LIM, LIMConfig

TINY = LIMConfig(width=16, num_layers=2, num_heads=4, mlp_width=24, caption_channels=10)


def random_lim(config: LIMConfig = TINY, seed: int = 0) -> LIM:
    """Every parameter random: at their start biases and norm weights are 0 and 1, and would hide mistakes."""
    lim, generator = LIM(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lim.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return lim


def queries(L: int = 5, B: int = 3, N: int = 4, D: int = 16, seed: int = 1) -> Tensor:
    return torch.randn(L, B, N, D, generator=torch.Generator().manual_seed(seed))


def value_and_grads(lim: LIM, q: Tensor) -> tuple[Tensor, list[Tensor]]:
    q = q.clone().requires_grad_()
    c = lim(q)
    weight = torch.randn(c.shape, generator=torch.Generator().manual_seed(2))
    return c.detach(), list(torch.autograd.grad((c * weight).sum(), [q, *lim.parameters()]))


# ---- Eq. 4

def test_forward_is_the_loop_over_layers_and_samples() -> None:
    lim, q = random_lim(), queries()
    c, grads = value_and_grads(lim, q)
    leaf = q.clone().requires_grad_()
    loop = torch.stack([torch.stack([lim.agglayer_norm(lim.projector(lim.connector(leaf[i, b][None])))[0]
                                     for b in range(3)]) for i in range(5)])
    weight = torch.randn(c.shape, generator=torch.Generator().manual_seed(2))
    loop_grads = torch.autograd.grad((loop * weight).sum(), [leaf, *lim.parameters()])
    assert c.shape == (5, 3, 4, 10)
    torch.testing.assert_close(c, loop.detach(), rtol=0, atol=1e-5)
    for got, want in zip(grads, loop_grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_connector_is_the_siglip_encoder_with_the_same_names_and_weights() -> None:
    from transformers import SiglipVisionConfig
    from transformers.models.siglip.modeling_siglip import SiglipEncoder
    lim = random_lim()
    config = SiglipVisionConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                num_attention_heads=4)
    assert (config.layer_norm_eps, config.hidden_act) == (1e-6, "gelu_pytorch_tanh")
    reference = SiglipEncoder(config).eval()
    reference.load_state_dict(lim.connector.state_dict(), strict=True)
    # small inputs: a LayerNorm with another eps answers differently only where the variance is small
    for scale in (1.0, 1e-3):
        x = scale * queries(L=1)[0]
        want = reference(inputs_embeds=x, attention_mask=None).last_hidden_state
        torch.testing.assert_close(lim.connector(x), want, rtol=0, atol=1e-5)


def test_parameter_names_are_those_of_the_published_checkpoints() -> None:
    block = {f"{name}.{kind}" for kind in ("weight", "bias") for name in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "layer_norm1",
        "layer_norm2", "mlp.fc1", "mlp.fc2")}
    openuni = {f"connector.layers.{i}.{name}" for i in range(2) for name in block}
    openuni |= {"projector.weight", "projector.bias"}
    assert set(LIM(TINY).state_dict()) == openuni | {"agglayer_norm.weight", "agglayer_norm.bias"}
    assert set(LIM(LIMConfig(16, 2, 4, 24, 10, norm=False)).state_dict()) == openuni


def test_default_config_has_the_published_parameter_counts() -> None:
    with torch.device("meta"):
        lim = LIM(LIMConfig())
    assert sum(p.numel() for p in lim.connector.parameters()) == 221_910_528
    assert sum(p.numel() for p in lim.projector.parameters()) == 3_541_248
    assert [p.numel() for p in lim.agglayer_norm.parameters()] == [2304, 2304]
    assert lim.config.head_dim == 64 and lim.agglayer_norm.eps == 1e-5
    assert [lim.connector.layers[5].layer_norm1.eps, lim.connector.layers[5].layer_norm2.eps] == [1e-6, 1e-6]


def test_norm_acts_on_each_layer_and_can_be_left_out() -> None:
    q = queries() * torch.tensor([1.0, 3.0, 10.0, 30.0, 100.0]).view(5, 1, 1, 1)
    lim = LIM(TINY)
    c = lim(q)
    torch.testing.assert_close(c.mean(-1), torch.zeros(5, 3, 4), rtol=0, atol=1e-5)
    torch.testing.assert_close(c.var(-1, unbiased=False), torch.ones(5, 3, 4), rtol=0, atol=1e-2)
    bare = LIM(LIMConfig(16, 2, 4, 24, 10, norm=False))
    bare.load_state_dict({k: v for k, v in lim.state_dict().items() if not k.startswith("agglayer_norm")})
    torch.testing.assert_close(lim.agglayer_norm(bare(q)), c)
    assert bare(q)[4].std() > 10 * bare(q)[0].std()


def test_equal_layers_give_the_one_layer_answer() -> None:
    lim, q = random_lim(), queries(L=1)
    one, many = lim.fuse(lim(q)), lim.fuse(lim(q.expand(7, -1, -1, -1)))
    torch.testing.assert_close(many, one, rtol=0, atol=1e-6)


def test_fused_condition_does_not_depend_on_the_order_of_layers() -> None:
    lim, q = random_lim(), queries()
    torch.testing.assert_close(lim.fuse(lim(q[[3, 0, 4, 2, 1]])), lim.fuse(lim(q)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [4, 28])
def test_a_batch_of_L_samples_does_not_mix_samples(size: int) -> None:
    lim, q = random_lim(), queries(L=size, B=size)
    q_other = q.clone()
    q_other[:, 2] += 1
    change = (lim.fuse(lim(q_other)) - lim.fuse(lim(q))).detach().abs().amax((1, 2))
    assert change[2] > 1e-2
    assert torch.cat([change[:2], change[3:]]).max() < 1e-6


def test_layer_chunks_and_checkpointing_change_rows_at_a_time_but_no_value_and_no_gradient() -> None:
    q = queries(L=7, B=3)
    want, want_grads = value_and_grads(random_lim(), q)
    for layer_chunk, checkpointing, rows in [(0, False, [21]), (3, False, [9, 9, 3]), (0, True, [21, 21]),
                                             (3, True, [9, 9, 3, 3, 9, 9]), (1, True, [3] * 14)]:
        lim, seen = random_lim(), []
        lim.layer_chunk, lim.gradient_checkpointing = layer_chunk, checkpointing
        lim.connector.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(len(args[0])))
        got, got_grads = value_and_grads(lim, q)
        assert seen == rows                         # checkpointing: every chunk a second time, in backward
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
        for a, b in zip(got_grads, want_grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_mlp_recomputes_its_wide_tensor_and_changes_nothing() -> None:
    results, calls = [], []
    for recompute in (False, True):
        lim = random_lim()
        mlp = lim.connector.layers[0].mlp
        mlp.recompute = recompute
        mlp.fc2.register_forward_pre_hook(lambda *_, r=recompute: calls.append(r))
        results.append(value_and_grads(lim, queries()))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))
    assert calls == [False, True, True]
    with torch.device("meta"):
        assert LIM(LIMConfig()).connector.layers[0].mlp.recompute
    assert not random_lim().connector.layers[0].mlp.recompute


def test_init_is_siglips_and_follows_the_generator() -> None:
    config = LIMConfig(width=64, num_layers=1, num_heads=4, mlp_width=128, caption_channels=96)
    lim, twin = LIM(config), LIM(config)
    lim.init_weights(torch.Generator().manual_seed(3))
    twin.init_weights(torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(lim.parameters(), twin.parameters(), strict=True))
    layer = lim.connector.layers[0]
    for linear in (*layer.self_attn.children(), layer.mlp.fc1, layer.mlp.fc2, lim.projector):
        bound = (6 / sum(linear.weight.shape)) ** 0.5 if linear is not lim.projector else 64 ** -0.5
        assert 0.98 * bound < linear.weight.abs().max() <= bound
    assert all(not linear.bias.any() for linear in layer.self_attn.children())
    for linear in (layer.mlp.fc1, layer.mlp.fc2):
        assert 0.5e-6 < linear.bias.std() < 2e-6


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of num_heads"):
        LIMConfig(width=100, num_heads=24)
    for wrong in (torch.zeros(3, 4, 16), torch.zeros(5, 3, 4, 15)):
        with pytest.raises(ValueError, match="width 16"):
            LIM(TINY)(wrong)


# ---- Eq. 5

def test_fuse_is_one_function_under_both_names() -> None:
    assert LIM(TINY).fuse is lim_module.fuse and LIM.fuse is lim_module.fuse


def test_fuse_averages_the_layers_asked_for() -> None:
    c = queries(L=4, D=6)
    torch.testing.assert_close(lim_module.fuse(c), (c[0] + c[1] + c[2] + c[3]) / 4)
    torch.testing.assert_close(lim_module.fuse(c, layers=[4, 2]), (c[3] + c[1]) / 2)
    torch.testing.assert_close(lim_module.fuse(c, layers=range(1, 4)), (c[0] + c[1] + c[2]) / 3)
    torch.testing.assert_close(lim_module.fuse(c, layers=(i for i in (1,))), c[0])


def test_fuse_perturbs_each_layer_before_the_mean() -> None:
    c, eps = queries(L=4, D=6), queries(L=4, D=6, seed=3)
    eps[[0, 2]] = 0                                                          # layers 1 and 3 are left alone
    want = (c[0] + c[1] * (1 + 0.3 * eps[1]) + c[2] + c[3] * (1 + 0.3 * eps[3])) / 4
    torch.testing.assert_close(lim_module.fuse(c, gamma=0.3, noise=eps), want)
    want = (c[2] + c[3] * (1 + 0.3 * eps[3])) / 2
    torch.testing.assert_close(lim_module.fuse(c, layers=[3, 4], gamma=0.3, noise=eps), want)
    shared = eps[:, :1]                                                     # a field a layer, for all samples
    want = (c[0] + c[1] * (1 + 0.3 * shared[1]) + c[2] + c[3] * (1 + 0.3 * shared[3])) / 4
    torch.testing.assert_close(lim_module.fuse(c, gamma=0.3, noise=shared), want)
    torch.testing.assert_close(lim_module.fuse(c, gamma=0.0, noise=eps), lim_module.fuse(c))
    assert lim_module.fuse(c.bfloat16(), gamma=0.3, noise=eps).dtype == torch.bfloat16


def test_fuse_refuses_what_it_cannot_mean() -> None:
    c, eps = torch.ones(3, 3, 3, 3), torch.ones(3, 3, 3, 3)
    for layers in ([], [0], [4], [-1], [1, 1]):
        with pytest.raises(ValueError, match="layers must name at least one of 1..3"):
            lim_module.fuse(c, layers=layers)
    for gamma, noise in ((0.1, None), (None, eps)):
        with pytest.raises(ValueError, match="gamma and noise belong together"):
            lim_module.fuse(c, gamma=gamma, noise=noise)
    # without its sample dimension, a per-layer field would land on samples where B == L
    for noise in (eps[:, 0], eps[:2], eps[None]):
        with pytest.raises(ValueError, match="noise must have 4 dimensions"):
            lim_module.fuse(c, gamma=0.1, noise=noise)
