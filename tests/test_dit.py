"""dit.py against diffusers (network, schedulers), torch.distributions and closed forms."""
import copy
import dataclasses
import hashlib
import json
import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, SanaTransformer2DModel
from torch.distributions import Normal

import dit as dit_file
from bench import count
from dit import DiT, DiTConfig, dpm_grid, euler_grid, flow_matching_loss, guided_velocity
from dit import randn, sample_ode, sde_step

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers

TINY = DiTConfig(num_layers=2, num_heads=3, head_dim=8, num_cross_heads=2, cross_head_dim=12,
                 caption_channels=20, in_channels=5, mlp_ratio=2.5, patch_size=1, qk_norm=True)
PLAIN = dataclasses.replace(TINY, num_layers=3, num_heads=2, head_dim=12, num_cross_heads=1,
                            cross_head_dim=24, mlp_ratio=1.7, qk_norm=False)
PATCH = dataclasses.replace(TINY, num_layers=1, patch_size=2, num_cross_heads=6, cross_head_dim=4)
PLACED = dataclasses.replace(TINY, num_layers=1, interpolation_scale=0.5, sample_size=8)    # inputs are 6 x 4
CONFIGS = {"qk_norm": TINY, "plain": PLAIN, "patch_2": PATCH, "positions": PLACED,
           "positions, patch_2": dataclasses.replace(PATCH, interpolation_scale=2.0, sample_size=12)}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(config: DiTConfig = TINY, seed: int = 0) -> DiT:
    """A DiT whose every parameter, tables and norms included, is random and matters."""
    dit, g = DiT(config), rng(seed)
    for name, p in dit.named_parameters():
        gain = 0.5 if "norm" in name or "table" in name else 0.7 / math.sqrt(p[0].numel())
        p.data = gain * torch.randn(p.shape, generator=g) + (1.0 if "norm" in name else 0.0)
    return dit


def reference(dit: DiT) -> SanaTransformer2DModel:
    model = SanaTransformer2DModel.from_config(dit.config.to_json())
    model.load_state_dict(dit.state_dict(), strict=True)
    return model


def inputs(config: DiTConfig = TINY, B: int = 3) -> tuple[torch.Tensor, ...]:
    """x, t and c for 6 x 4 latents and 7 condition tokens."""
    g = rng(1)
    x = torch.randn(B, config.in_channels, 6, 4, generator=g)
    c = torch.randn(B, 7, config.caption_channels, generator=g)
    return x, torch.rand(B, generator=g), c


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


# Configuration

SIZES = {  # published model: config, parameters, tensors
    "SANA-1.5 1.6B": (DiTConfig(), 1_604_641_952, 476),
    "SANA-1.5 4.8B": (DiTConfig(num_layers=60), 4_721_825_952, 1396),
    "SANA-1.0 1.6B": (DiTConfig(qk_norm=False), 1_604_462_752, 396),
    "SANA-1.0 0.6B": (DiTConfig(num_layers=28, num_heads=36, num_cross_heads=16, cross_head_dim=72,
                                qk_norm=False), 591_747_872, 548),
}


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts_of_the_published_models(name):
    config, parameters, tensors = SIZES[name]
    with torch.device("meta"):
        state = DiT(config).state_dict()
    assert (sum(p.numel() for p in state.values()), len(state)) == (parameters, tensors)


def test_default_config_is_the_published_file_byte_for_byte():
    published = DiTConfig().to_json() | {"_diffusers_version": "0.33.0.dev0"}
    text = json.dumps(published, indent=2, sort_keys=True) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert digest.startswith("70863bf6") and digest.endswith("e8fc68")


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_config_round_trip_through_diffusers(config):
    theirs = dict(SanaTransformer2DModel.from_config(config.to_json()).config)
    theirs = {key: value for key, value in theirs.items() if not key.startswith("_")}
    assert DiTConfig.from_json(theirs) == config
    assert DiTConfig.from_json(json.loads(json.dumps(config.to_json(sample_size=16)))) == config


def test_a_config_without_qk_norm_key_has_none():
    published = DiTConfig(qk_norm=False).to_json()
    del published["qk_norm"]
    assert DiTConfig.from_json(published) == DiTConfig(qk_norm=False)


@pytest.mark.parametrize("key, value", [
    ("guidance_embeds", True), ("attention_bias", True), ("interpolation_scale", 0.0),
    ("qk_norm", "layer_norm"), ("norm_eps", 1e-5), ("out_channels", 64), ("cross_attention_dim", 1152),
    ("timestep_scale", 0.001), ("dropout", 0.1), ("_class_name", "SanaVideoTransformer3DModel"),
    ("rope_max_seq_len", 1024)])
def test_config_refuses_what_is_not_implemented(key, value):
    with pytest.raises(ValueError, match=key):
        DiTConfig.from_json(DiTConfig().to_json() | {key: value})


def test_config_refuses_unequal_widths_and_vague_qk_norm():
    with pytest.raises(ValueError, match="num_cross_heads"):
        DiTConfig(num_cross_heads=16)
    with pytest.raises(ValueError, match="interpolation_scale must be None, or positive beside a sample"):
        DiTConfig(interpolation_scale=1.0)
    with pytest.raises(ValueError, match="qk_norm"):
        DiTConfig(qk_norm="rms_norm_across_heads")


# Network

@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_values_and_gradients_equal_diffusers(config, masked):
    dit = build(config)
    x, t, c = inputs(config)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [0, 1] * 3 + [0]]) if masked else None
    theirs, leaves = reference(dit), [[a.clone().requires_grad_() for a in (x, c)] for _ in range(2)]
    v = dit(leaves[0][0], t, leaves[0][1], mask)
    want = theirs(leaves[1][0], leaves[1][1], 1000 * t, encoder_attention_mask=mask, return_dict=False)[0]
    assert error(v, want) < 1e-5
    weight = torch.randn(v.shape, generator=rng(2))
    (v * weight).sum().backward()
    (want * weight).sum().backward()
    for a, b in zip(*leaves, strict=True):
        assert error(a.grad, b.grad) < 1e-5
    parameters = dict(theirs.named_parameters())
    largest = max(p.grad.abs().max() for p in parameters.values())
    for name, p in dit.named_parameters():  # without qk-norm the key bias has gradient 0, up to rounding
        want = parameters[name].grad
        assert (p.grad - want).abs().max() < 3e-5 * want.abs().max() + 1e-6 * largest, name


def test_state_dict_loads_both_ways():
    ours, theirs = build(), SanaTransformer2DModel.from_config(TINY.to_json())
    theirs.load_state_dict(ours.state_dict(), strict=True)
    DiT(TINY).load_state_dict(theirs.state_dict(), strict=True)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_bf16_is_as_close_to_fp32_as_diffusers_is(config):
    dit, (x, t, c) = build(config), inputs(config)
    exact, theirs = dit(x, t, c), reference(dit).bfloat16()
    half = copy.deepcopy(dit).bfloat16()
    v = half(x, t, c)
    want = theirs(x.bfloat16(), c.bfloat16(), 1000 * t, return_dict=False)[0]
    assert v.dtype == torch.bfloat16
    assert error(v.float(), want.float()) < 0.05
    assert error(v.float(), exact) < 2 * error(want.float(), exact) + 1e-3


def test_autocast_leaves_linear_attention_in_fp32(monkeypatch):
    results, inner = [], dit_file.linear_attention
    monkeypatch.setattr(dit_file, "linear_attention", lambda *qkv: results.append(inner(*qkv)) or results[-1])
    x, t, c = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        v = build()(x, t, c)
    assert [r.dtype for r in results] == [torch.float32] * TINY.num_layers
    assert error(v.float(), build()(x, t, c)) < 0.05


def test_linear_attention_is_the_quadratic_sum():
    q, k, v = (torch.rand(2, 3, 9, 4, generator=rng(i)) for i in range(3))
    weights = torch.einsum("bhid,bhjd->bhij", q, k)
    weights = weights / weights.sum(-1, keepdim=True)
    assert error(dit_file.linear_attention(q, k, v), torch.einsum("bhij,bhjd->bhid", weights, v)) < 1e-6
    assert dit_file.linear_attention(torch.zeros_like(q), k, v).abs().max() == 0


def test_shared_kv_equals_the_condition_and_carries_gradient():
    dit, (x, t, c) = build(), inputs()
    mask = torch.tensor([[1] * 7, [1] * 2 + [0] * 5, [1] * 6 + [0]])
    for m in (None, mask):
        grads = []
        for shared in (False, True):
            leaf = c.clone().requires_grad_()
            kv = dit.cross_kv(leaf, m) if shared else None
            v = [dit(x, s, kv=kv) if shared else dit(x, s, leaf, m) for s in (t, t / 2)]
            (v[0].square().sum() + v[1].sum()).backward()
            grads.append((torch.cat(v).detach(), leaf.grad))
        assert torch.equal(grads[0][0], grads[1][0])
        assert error(grads[1][1], grads[0][1]) < 1e-5


def test_masked_tokens_do_not_matter_and_a_row_without_tokens_is_finite():
    dit, (x, t, c) = build(), inputs()
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [0] * 7])
    v = dit(x, t, c, mask)
    other = torch.where(mask[..., None] == 1, c, torch.randn(c.shape, generator=rng(5)))
    assert torch.isfinite(v).all()
    assert error(dit(x, t, other, mask)[:2], v[:2]) < 1e-6
    assert error(dit(x[1:2], t[1:2], c[1:2, :4]), v[1:2]) < 1e-5
    assert error(dit(x, t, c), v) > 1e-3


def test_one_condition_serves_a_group_of_images():
    dit, (x, t, c) = build(), inputs(B=6)
    c, mask = c[:2], torch.tensor([[1] * 7, [1] * 3 + [0] * 4])
    for m, repeated in ((None, None), (mask, mask.repeat_interleave(3, 0))):
        assert error(dit(x, t, c, m), dit(x, t, c.repeat_interleave(3, 0), repeated)) < 1e-5


@pytest.mark.parametrize("recompute", [False, True])
def test_tokens_are_never_copied_around_the_depthwise_convolution(recompute, monkeypatch):
    ff, dense, conv2d = build().transformer_blocks[0].ff, [], F.conv2d

    def spy(x, *args, **more):
        out = conv2d(x, *args, **more)
        dense.extend(image.is_contiguous(memory_format=torch.channels_last) for image in (x, out))
        return out
    monkeypatch.setattr(F, "conv2d", spy)
    ff.recompute = recompute
    ff(torch.randn(2, 24, TINY.width, generator=rng()), (6, 4)).sum().backward()
    assert dense == [True] * (4 if recompute else 2)


def test_sampling_keeps_two_wide_tensors_of_the_feed_forward_at_most():
    ff, x = build().transformer_blocks[0].ff, torch.randn(2, 24, TINY.width, generator=rng())
    wide = 4 * 2 * 24 * ff.conv_depth.out_channels
    with torch.no_grad():
        assert count(lambda: ff(x, (6, 4)), torch.device("cpu")).memory < 2.1 * wide
        sampled = ff(x, (6, 4))
    assert torch.equal(ff(x, (6, 4)), sampled)


def test_gradient_checkpointing_recomputes_and_changes_nothing():
    x, t, c = inputs()
    grads, calls = [], []
    for recompute in (False, True):
        dit = build()
        dit.gradient_checkpointing = recompute
        dit.transformer_blocks[0].ff.register_forward_pre_hook(lambda *_, r=recompute: calls.append(r))
        leaf = c.clone().requires_grad_()
        dit(x, t, leaf).square().mean().backward()
        grads.append([leaf.grad, *(p.grad for p in dit.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert calls == [False, True, True]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_feed_forward_recomputes_its_wide_tensors_and_changes_nothing(dtype, frozen, checkpointing,
                                                                          monkeypatch):
    x, t, c = inputs()
    results, calls, conv2d = [], [], F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda *args, **more: calls.append(recompute) or conv2d(*args, **more))
    for recompute in (False, True):
        dit = build().requires_grad_(not frozen)
        dit.gradient_checkpointing = checkpointing
        for block in dit.transformer_blocks:
            block.ff.recompute = recompute
        leaf = c.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            v = dit(x, t, leaf)
        v.square().mean().backward()
        results.append([v, leaf.grad, *(p.grad for p in dit.parameters() if not frozen)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)) and leaf.grad.abs().max() > 0
    assert [calls.count(r) for r in (False, True)] == [n * TINY.num_layers for n in
                                                       (1 + checkpointing, 2 + checkpointing)]
    with torch.device("meta"):
        assert DiT(dataclasses.replace(DiTConfig(), num_layers=1)).transformer_blocks[0].ff.recompute


def test_the_feed_forward_keeps_one_wide_tensor_for_its_gradient():
    ff, x, saved = build().transformer_blocks[0].ff, torch.randn(2, 24, TINY.width, generator=rng()), []
    wide, kept = 4 * 2 * 24 * ff.conv_depth.out_channels, []
    keep = lambda y: saved.append(y.untyped_storage()) or y                      # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda y: y):
        for ff.recompute in (False, True):
            saved.clear()
            ff(x, (6, 4))
            kept.append(len({storage.data_ptr() for storage in saved if storage.nbytes() >= wide}))
    assert kept == [3, 1]


def test_the_relu_of_linear_attention_keeps_nothing_of_its_own_for_the_gradient():
    attention, x, kept = build().transformer_blocks[0].attn1.bfloat16(), torch.ones(2, 24, TINY.width), {}
    keep = lambda y: kept.update({y.untyped_storage().data_ptr(): y}) or y       # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda y: y):
        attention(x.bfloat16().requires_grad_())
    kinds = [y.dtype for y in kept.values() if y.numel() >= x.numel()]
    # bf16: the layers' input and output, two norms of two each; fp32: q, k, v beside 1, the numerator
    assert (kinds.count(torch.bfloat16), kinds.count(torch.float32)) == (6, 4)


def test_compiles_without_a_graph_break():
    dit, (x, t, c) = build(), inputs()
    dit.transformer_blocks[0].ff.recompute = True
    compiled = torch.compile(dit, fullgraph=True, backend="eager")
    mask, kv = torch.ones(3, 7), dit.cross_kv(c)
    assert error(compiled(x, t, c, mask), dit(x, t, c)) < 1e-6
    v = compiled(x, t, kv=kv)
    assert error(v, dit(x, t, c)) < 1e-6
    v.sum().backward()
    assert dit.transformer_blocks[0].attn2.to_k.weight.grad.abs().max() > 0


def test_init_weights_is_seeded_starts_at_zero_and_learns():
    first, second = DiT(TINY), DiT(TINY)
    first.init_weights(rng(3))
    second.init_weights(rng(3))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    x, t, c = inputs()
    assert first(x, t, c).abs().max() == 0
    table = torch.cat([block.scale_shift_table for block in first.transformer_blocks])
    assert 0.8 < table.std() * TINY.width ** 0.5 < 1.2
    optimizer, losses = torch.optim.Adam(first.parameters(), lr=3e-3), []
    noise = torch.randn(x.shape, generator=rng(4))
    for _ in range(40):
        losses.append(flow_matching_loss(first, x, c, t, noise))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0]


def test_wrong_shapes_and_missing_condition_are_refused():
    dit, (x, t, c) = build(PATCH), inputs(PATCH)
    kv, mask = dit.cross_kv(c), torch.ones(3, 7)
    for call in (lambda: dit(x, t), lambda: dit(x, t, c, kv=kv), lambda: dit(x, t, c_mask=mask, kv=kv),
                 lambda: dit(x[:, :4], t, c), lambda: dit(x[..., :3], t, c), lambda: dit(x, t, c[:2])):
        with pytest.raises(ValueError):
            call()


# Loss

def test_flow_matching_loss_is_the_formula():
    dit, (x0, t, c) = build(), inputs()
    noise = torch.randn(x0.shape, generator=rng(2))
    x_t = torch.stack([(1 - s) * a + s * e for s, a, e in zip(t, x0, noise, strict=True)])
    want = (dit(x_t, t, c) - (noise - x0)).pow(2).mean()
    assert flow_matching_loss(dit, x0, c, t, noise).item() == pytest.approx(want.item(), rel=1e-6)
    half = flow_matching_loss(copy.deepcopy(dit).bfloat16(), x0.bfloat16(), c.bfloat16(), t, noise)
    assert half.dtype == torch.float32 and half.item() == pytest.approx(want.item(), rel=0.02)


def test_flow_matching_loss_draws_thousandths_evenly_and_normal_noise():
    seen = []

    def spy(x, t, c):
        seen.append((x, t))
        return x

    x0 = torch.zeros(20_000, 1, 1, 2)
    loss = flow_matching_loss(spy, x0, x0, generator=rng())
    x, t = seen[0]
    assert loss == flow_matching_loss(spy, x0, x0, generator=rng())
    assert x.dtype == t.dtype == torch.float32
    k = (1000 * t).round()
    assert torch.equal(t, k / 1000) and k.min() == 1 and k.max() == 1000
    counts = torch.bincount(((k - 1) // 100).long(), minlength=10)
    assert len(counts) == 10 and (counts - 2000).abs().max() < 5 * math.sqrt(2000)
    noise = x / t[:, None, None, None]
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


# Time grids and deterministic sampling

def dpm_scheduler(num_steps: int, shift: float = 3.0) -> DPMSolverMultistepScheduler:
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True,
                                            flow_shift=shift)
    scheduler.set_timesteps(num_steps)
    return scheduler


def euler_scheduler(num_steps: int, shift: float = 3.0) -> FlowMatchEulerDiscreteScheduler:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(num_steps)
    return scheduler


@pytest.mark.parametrize("shift", [2.0, 3.0, 6.0])  # with 1.0 some sigmas are whole thousandths, and the
def test_grids_are_bit_equal_to_diffusers(shift):   # truncation of their rounding errors is nobody's standard
    for n in range(1, 61):
        sigmas, t = dpm_grid(n, shift)
        theirs = dpm_scheduler(n, shift)
        assert torch.equal(sigmas, theirs.sigmas)
        assert torch.equal(t, (theirs.timesteps.double() / 1000).float())
        sigmas, t = euler_grid(n, shift)
        assert torch.equal(sigmas, euler_scheduler(n, shift).sigmas)
        assert torch.equal(1000 * t, euler_scheduler(n, shift).timesteps)


def test_grids_are_the_published_ones():
    assert (1000 * dpm_grid(20, 3.0)[1]).round().tolist() == [
        999, 982, 963, 944, 922, 899, 874, 847, 817, 785, 749, 710, 666, 617, 562, 499, 428, 345, 249, 136]
    assert euler_grid(20, 3.0)[0][-2:].tolist() == pytest.approx([0.0089286, 0], abs=1e-7)
    for grid in (dpm_grid, euler_grid):
        with pytest.raises(ValueError, match="num_steps"):
            grid(0, 3.0)
        with pytest.raises(ValueError, match="shift"):
            grid(20, 0.0)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
@pytest.mark.parametrize("num_steps", [1, 2, 5, 20])
@pytest.mark.parametrize("solver", ["dpm++", "euler"])
def test_sampling_follows_the_diffusers_scheduler(solver, num_steps, guidance_scale):
    dit, (noise, _, c) = build(), inputs(B=2)
    c_uncond = torch.randn(1, 7, TINY.caption_channels, generator=rng(6))
    scheduler = (dpm_scheduler if solver == "dpm++" else euler_scheduler)(num_steps)
    x = noise
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            t = (timestep / 1000).float().expand(2)
            v = dit(x, t, c)
            if guidance_scale > 1:
                v_uncond = dit(x, t, c_uncond.expand(2, -1, -1))
                v = v_uncond + guidance_scale * (v - v_uncond)
            x = scheduler.step(v, timestep, x, return_dict=False)[0]
    ours = sample_ode(dit, noise, c, c_uncond, num_steps, guidance_scale, solver=solver)
    assert ours.dtype == torch.float32 and not ours.requires_grad
    assert error(ours, x) < 2e-5


def test_sampling_makes_keys_and_values_once_and_shares_them_in_a_group(monkeypatch):
    dit, (noise, _, c) = build(), inputs(B=6)
    calls, inner = [], dit.cross_kv
    monkeypatch.setattr(dit, "cross_kv", lambda *args: calls.append(1) or inner(*args))
    ours = sample_ode(dit, noise, c[:2], c[2:3], num_steps=3)
    assert len(calls) == 1
    assert error(ours, sample_ode(dit, noise, c[:2].repeat_interleave(3, 0), c[2:3], num_steps=3)) < 1e-5


def test_sampling_in_bf16_keeps_fp32_latents():
    dit, (noise, _, c) = build(), inputs()
    half = sample_ode(copy.deepcopy(dit).bfloat16(), noise, c, c.flip(2), num_steps=5, guidance_scale=2.0)
    assert half.dtype == torch.float32 and not torch.equal(half, half.bfloat16().float())
    assert error(half, sample_ode(dit, noise, c, c.flip(2), num_steps=5, guidance_scale=2.0)) < 0.05


@pytest.mark.parametrize("solver", ["dpm++", "euler"])
def test_solvers_converge_to_the_exact_gaussian_flow(solver):
    noise = torch.randn(1, 1, 4, 4, generator=rng())
    errors = []
    for n in (10, 20, 40):
        x = sample_ode(GaussianFlow(), noise, noise, None, n, 1.0, solver=solver)
        errors.append((x - (GaussianFlow.mean + GaussianFlow.std * noise)).abs().max().item())
    assert errors[0] > errors[1] > errors[2] and errors[2] < (0.02 if solver == "dpm++" else 0.1)


def test_guided_velocity_is_the_formula_and_has_a_gradient():
    dit, (x, t, c) = build(), inputs()
    c_uncond, leaf = c.flip(2), c.clone().requires_grad_()
    kv = dit.cross_kv(torch.cat([c_uncond, leaf]))
    v = guided_velocity(dit, x, t, kv, 3.0)
    want = dit(x, t, c_uncond) + 3.0 * (dit(x, t, c) - dit(x, t, c_uncond))
    assert v.dtype == torch.float32 and error(v, want) < 1e-5
    v.sum().backward()
    assert leaf.grad.abs().max() > 0
    half, both = copy.deepcopy(dit).bfloat16(), torch.cat([c_uncond, c])
    v_uncond, v_cond = half(x.repeat(2, 1, 1, 1), t.repeat(2), both).float().chunk(2)
    v = guided_velocity(half, x, t, half.cross_kv(both), 3.0)
    assert torch.equal(v, v_uncond + 3.0 * (v_cond - v_uncond))
    assert torch.equal(guided_velocity(dit, x, t, dit.cross_kv(c), 1.0), dit(x, t, c))
    with pytest.raises(ValueError, match="c_uncond"):
        guided_velocity(dit, x, t, dit.cross_kv(c), 3.0)


def test_sampling_refuses_bad_arguments():
    dit, (noise, _, c) = build(), inputs()
    for c_uncond in (None, c[:, :3], c[:2]):
        with pytest.raises(ValueError, match="c_uncond"):
            sample_ode(dit, noise, c, c_uncond)
    with pytest.raises(ValueError, match="solver"):
        sample_ode(dit, noise, c, c, solver="heun")


# Stochastic step

class GaussianFlow(torch.nn.Module):
    """The exact velocity for data from N(mean, std^2), in place of a DiT."""
    mean, std = 1.5, 0.4

    @classmethod
    def marginal(cls, t: float) -> tuple[float, float]:
        return (1 - t) * cls.mean, math.sqrt(((1 - t) * cls.std) ** 2 + t ** 2)

    def cross_kv(self, c):
        return [(c, c)]

    def forward(self, x, t, kv=None):
        t = t[:, None, None, None]
        variance = ((1 - t) * self.std) ** 2 + t ** 2
        return (t - (1 - t) * self.std ** 2) / variance * (x - (1 - t) * self.mean) - self.mean


@pytest.mark.parametrize("noise_level", [0.0, 0.7, 1.2])
def test_every_noise_level_has_the_marginals_of_the_ode(noise_level):
    steps, g = 400, rng()
    x = torch.randn(1, 1, 200, 200, generator=g)
    times = torch.linspace(1, 0, steps + 1)
    for i in range(steps):
        t, t_next = times[i:i + 1], times[i + 1:i + 2]
        x = sde_step(x, GaussianFlow()(x, t), t, t_next, noise_level, generator=g)[0]
        if (i + 1) % 100 == 0:
            mean, std = GaussianFlow.marginal(t_next.item())
            assert x.mean().item() == pytest.approx(mean, abs=0.02)
            assert x.std().item() == pytest.approx(std, abs=0.015)


def step_inputs(requires_grad: bool = False) -> tuple[torch.Tensor, ...]:
    g = rng(7)
    x, v = (torch.randn(3, 2, 4, 5, generator=g) for _ in range(2))
    return x, v.requires_grad_(requires_grad), torch.tensor([1.0, 0.8, 0.3]), torch.tensor([0.9, 0.5, 0.0])


def test_sde_step_is_the_formula_and_its_density_the_normal_one():
    x, v, t, t_next = step_inputs()
    x_next, log_prob, mean, std = sde_step(x, v, t, t_next, 0.7, generator=rng(8))
    for b in range(3):
        s, dt = t[b].item(), (t_next[b] - t[b]).item()
        sigma = 0.7 * math.sqrt(s / (1 - (s if s < 1 else t_next[b].item())))
        drift = v[b] + sigma ** 2 / (2 * s) * (x[b] + (1 - s) * v[b])
        assert error(mean[b], x[b] + drift * dt) < 1e-6
        assert std[b].item() == pytest.approx(sigma * math.sqrt(-dt), rel=1e-6)
        want = Normal(mean[b], std[b]).log_prob(x_next[b]).mean()
        assert log_prob[b].item() == pytest.approx(want.item(), abs=1e-5)
    noise = torch.randn(x.shape, generator=rng(8))
    assert error(x_next, mean + std[:, None, None, None] * noise) < 1e-6
    assert [a.dtype for a in (x_next, log_prob, mean, std)] == [torch.float32] * 4
    assert [tuple(a.shape) for a in (log_prob, std)] == [(3,), (3,)]


def test_std_of_the_first_step_is_the_noise_level_for_every_step_size():
    x, v, _, _ = step_inputs()
    std = sde_step(x, v, torch.ones(3), torch.tensor([0.99, 0.5, 0.0]), 0.7, generator=rng())[3]
    assert std.tolist() == pytest.approx([0.7] * 3, rel=1e-6)


def test_a_stored_sample_scores_as_when_it_was_drawn():
    x, v, t, t_next = step_inputs()
    drawn = sde_step(x, v, t, t_next, 0.7, generator=rng(8))
    scored = sde_step(x, v, t, t_next, 0.7, x_next=drawn[0])
    assert all(torch.equal(a, b) for a, b in zip(drawn, scored, strict=True))


def test_log_prob_gradient_has_the_closed_form():
    x, v, t, t_next = step_inputs(requires_grad=True)
    x_next, log_prob, mean, std = sde_step(x, v, t, t_next, 0.7, generator=rng(8))
    assert not x_next.requires_grad
    log_prob.sum().backward()
    t, t_next, std = (a[:, None, None, None] for a in (t, t_next, std))
    sigma_2 = std ** 2 / (t - t_next)
    slope = (t_next - t) * (1 + sigma_2 * (1 - t) / (2 * t))
    assert error(v.grad, ((x_next - mean) / std ** 2 * slope / x[0].numel()).detach()) < 1e-5


def test_noise_level_zero_is_the_euler_step():
    x, v, t, t_next = step_inputs()
    x_next, log_prob, mean, std = sde_step(x, v, t, t_next, 0.0, generator=rng())
    euler = x + v * (t_next - t)[:, None, None, None]
    assert torch.equal(x_next, euler) and torch.equal(mean, euler)
    assert torch.equal(std, torch.zeros(3)) and torch.equal(log_prob, torch.zeros(3))


def test_sde_walk_without_noise_is_the_euler_sampler():
    dit, (noise, _, c) = build(), inputs()
    kv, x, (sigmas, times) = dit.cross_kv(torch.cat([c.flip(2), c])), noise, euler_grid(5, 3.0)
    with torch.no_grad():
        for i in range(5):
            t = times[i].expand(3)
            v = guided_velocity(dit, x, t, kv, 4.5)
            x = sde_step(x, v, t, sigmas[i + 1].expand(3), 0.0, generator=rng())[0]
    assert error(x, sample_ode(dit, noise, c, c.flip(2), 5, solver="euler")) < 1e-5


def test_sde_step_takes_bf16_and_computes_in_fp32():
    x, v, t, t_next = step_inputs()
    x, v = x.bfloat16(), v.bfloat16()
    half = sde_step(x, v, t, t_next, 0.7, generator=rng(8))
    full = sde_step(x.float(), v.float(), t, t_next, 0.7, generator=rng(8))
    assert all(torch.equal(a, b) for a, b in zip(half, full, strict=True))
    assert all(a.dtype == torch.float32 for a in sde_step(x, v, t, t_next, 0.0, generator=rng()))


@pytest.mark.parametrize("t, t_next, noise_level", [
    ([0.5, 0.5, 0.5], [0.4, 0.5, 0.4], 0.7), ([0.5, 0.5, 0.5], [0.4, 0.4, 0.6], 0.7),
    ([1.5, 0.5, 0.5], [0.4, 0.4, 0.4], 0.7), ([0.5, 0.5, 0.5], [0.4, -0.1, 0.4], 0.7),
    ([0.5, 0.5, 0.5], [0.4, 0.4, 0.4], -1.0)])
def test_sde_step_refuses_times_out_of_order(t, t_next, noise_level):
    x, v, _, _ = step_inputs()
    with pytest.raises(ValueError):
        sde_step(x, v, torch.tensor(t), torch.tensor(t_next), noise_level, generator=rng())


def test_noise_with_one_generator_per_image_does_not_depend_on_the_batch():
    together = randn((3, 2, 4, 5), [rng(i) for i in range(3)], "cpu")
    assert torch.equal(together[1:2], randn((1, 2, 4, 5), [rng(1)], "cpu"))
    assert not torch.equal(together[0], together[1])
    assert torch.equal(randn((3, 2), rng(1), "cpu"), torch.randn(3, 2, generator=rng(1)))
    x, v, t, t_next = step_inputs()
    whole = sde_step(x, v, t, t_next, 0.7, generator=[rng(i) for i in range(3)])[0]
    alone = sde_step(x[2:], v[2:], t[2:], t_next[2:], 0.7, generator=[rng(2)])[0]
    assert F.mse_loss(whole[2:], alone) == 0
    with pytest.raises(ValueError, match="generator"):
        randn((3, 2), [rng()], "cpu")
