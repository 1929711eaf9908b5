"""dit.py against diffusers (network, schedulers, pipeline), torch.distributions and closed forms."""
import copy
import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, SanaTransformer2DModel
from torch import Tensor
from torch.distributions import Normal

import dit as dit_file
from common import Refused, generator, write_json
from dit import DiT, DiTConfig, dpm_grid, euler_grid, flow_matching_loss, sample_ode, sde_step
from helpers import error
from naive import diffusers_dit
from tools.convert import check_config, published_config
from tools.meter import Meter
from vae import DCAEConfig

TINY = DiTConfig(num_layers=2, num_heads=3, head_dim=8, num_cross_heads=2, cross_head_dim=12,
                 caption_channels=20, in_channels=5)
PLAIN = replace(TINY, num_layers=3, num_heads=2, head_dim=12, num_cross_heads=1, cross_head_dim=24,
                mlp_ratio=1.7, qk_norm=False)
PLACED = replace(TINY, num_layers=1, patch_size=2, num_cross_heads=6, cross_head_dim=4,
                 interpolation_scale=2.0, sample_size=12)                       # inputs are 6 x 4
CONFIGS = {"qk_norm": TINY, "plain": PLAIN, "positions, patch_2": PLACED}
# just wide enough that the Mix-FFN computes its wide tensors again
WIDE = replace(TINY, num_heads=32, head_dim=32, num_cross_heads=8, cross_head_dim=128)


def build(config: DiTConfig = TINY) -> DiT:
    """A DiT whose every parameter, tables and norms included, is random and matters."""
    with torch.device("meta"):
        dit = DiT(config)
    dit, g = dit.to_empty(device="cpu"), generator("dit", 0)
    for name, p in dit.named_parameters():
        gain = 0.5 if "norm" in name or "table" in name else 0.7 / math.sqrt(p[0].numel())
        p.data = gain * torch.randn(p.shape, generator=g) + (1.0 if "norm" in name else 0.0)
    return dit


def inputs(config: DiTConfig = TINY, B: int = 3) -> tuple[Tensor, ...]:
    """x, t and c for 6 x 4 latents and 7 condition tokens."""
    g = generator("dit", 1)
    x = torch.randn(B, config.in_channels, 6, 4, generator=g)
    c = torch.randn(B, 7, config.caption_channels, generator=g)
    return x, torch.rand(B, generator=g), c


def test_default_config_is_the_published_file_byte_for_byte() -> None:
    published = published_config(DiTConfig()) | {"_diffusers_version": "0.33.0.dev0"}
    text = json.dumps(published, indent=2, sort_keys=True) + "\n"
    assert hashlib.sha256(text.encode()).hexdigest().startswith("70863bf6")


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_config_is_checked_against_what_diffusers_writes(config: DiTConfig, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    SanaTransformer2DModel.from_config(published_config(config)).save_config(tmp_path)
    # without positions the side of the training latents says nothing
    check_config(path, config if config.interpolation_scale else replace(config, sample_size=7))
    # files of SANA-1.0 may lack the key
    write_json(path, {key: value for key, value in json.loads(path.read_text()).items() if key != "qk_norm"})
    check_config(path, replace(config, qk_norm=False))
    with pytest.raises(Refused, match="qk_norm"):
        check_config(path, replace(config, qk_norm=True))


@pytest.mark.parametrize("config, key, value", [
    (DiTConfig(), "guidance_embeds", True), (DiTConfig(), "norm_eps", 1e-5), (DiTConfig(), "unknown", 1),
    (DCAEConfig(), "layers", 3), (DCAEConfig(), "in_channels", 4), (DCAEConfig(), "scaling_factor", None)])
def test_config_refuses_other_values(config: object, key: str, value: object, tmp_path: Path) -> None:
    written = published_config(config) | {key: value}
    write_json(tmp_path / "config.json", {k: v for k, v in written.items() if v is not None})
    with pytest.raises(Refused, match=key):
        check_config(tmp_path / "config.json", config)


@pytest.mark.parametrize("onednn", [False, True], ids=["products", "convolutions"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_values_and_gradients_equal_diffusers(config: DiTConfig, masked: bool, onednn: bool,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dit_file, "HAS_ONEDNN", onednn)
    dit, (x, t, c) = build(config), inputs(config)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [0, 1] * 3 + [0]]) if masked else None
    theirs, leaves = diffusers_dit(dit), [[a.clone().requires_grad_() for a in (x, c)] for _ in range(2)]
    v = dit(leaves[0][0], t, leaves[0][1], mask)
    want = theirs(leaves[1][0], leaves[1][1], 1000 * t, encoder_attention_mask=mask, return_dict=False)[0]
    assert error(v, want) < 1e-5
    torch.autograd.backward([v, want], [torch.randn(v.shape, generator=generator("dit", 2))] * 2)
    assert all(error(a.grad, b.grad) < 1e-5 for a, b in zip(*leaves, strict=True))
    largest = max(p.grad.abs().max() for p in theirs.parameters())
    for name, p in dit.named_parameters():  # without qk-norm the key bias has gradient 0, up to rounding
        want = theirs.get_parameter(name).grad
        assert (p.grad - want).abs().max() < 3e-5 * want.abs().max() + 1e-6 * largest, name


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_bf16_is_as_close_to_fp32_as_diffusers_is(config: DiTConfig) -> None:
    dit, (x, t, c) = build(config), inputs(config)
    exact, theirs = dit(x, t, c), diffusers_dit(dit).bfloat16()
    v = copy.deepcopy(dit).bfloat16()(x, t, c)
    want = theirs(x.bfloat16(), c.bfloat16(), 1000 * t, return_dict=False)[0]
    assert v.dtype == torch.bfloat16 and error(v.float(), want.float()) < 0.05
    assert error(v.float(), exact) < 2 * error(want.float(), exact) + 1e-3


def test_autocast_leaves_linear_attention_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    results, inner, (x, t, c) = [], dit_file.linear_attention, inputs()
    monkeypatch.setattr(dit_file, "linear_attention", lambda *qkv: results.append(inner(*qkv)) or results[-1])
    with torch.autocast("cpu", torch.bfloat16):
        v = build()(x, t, c)
    assert [r.dtype for r in results] == [torch.float32] * TINY.num_layers
    assert error(v.float(), build()(x, t, c)) < 0.05


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputing_is_exact(dtype: torch.dtype, frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks (gradient checkpointing) and wide tensors of the feed-forward, each alone and both."""
    x, t, c = inputs()
    results, calls, conv2d = [], [], F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda *args: calls.append(args[1].shape[-1]) or conv2d(*args))
    for checkpointing, recompute in ((False, False), (False, True), (True, False), (True, True)):
        dit = build().requires_grad_(not frozen)
        dit.gradient_checkpointing = checkpointing
        for block in dit.transformer_blocks:
            block.ff.recompute = recompute
        leaf = c.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            v = dit(x, t, leaf)
        v.square().mean().backward()
        results.append([v, leaf.grad, *(p.grad for p in dit.parameters() if not frozen)])
        assert all(torch.equal(a, b) for a, b in zip(results[0], results[-1], strict=True))
        # and it does compute again: its 3x3 convolutions were counted
        assert calls.count(3) == (1 + checkpointing + recompute) * TINY.num_layers
        calls.clear()


def test_a_wide_feed_forward_keeps_one_wide_tensor_for_its_gradient() -> None:
    """Four without recomputing: what SiLU reads, what the convolution reads, its result, and two halves."""
    ff, x = build(WIDE).transformer_blocks[0].ff, torch.randn(2, 24, WIDE.width, generator=generator("x"))
    wide, narrow = 4 * 2 * 24 * ff.conv_depth.out_channels, 4 * x.numel()
    for ff.recompute, wide_tensors in ((True, 1), (False, 4)):
        with Meter() as meter:
            y = ff(x, (6, 4))
        assert meter.alive == wide_tensors * wide + narrow
        del y
    # sampling holds two at most
    with torch.no_grad(), Meter() as meter:
        ff(x, (6, 4))
    assert meter.peak <= 2 * wide + narrow


def test_compiles_without_a_graph_break() -> None:
    dit, (x, t, c) = build(), inputs()
    dit.transformer_blocks[0].ff.recompute = True
    compiled = torch.compile(dit, fullgraph=True, backend="eager")
    for v in (compiled(x, t, c), compiled(x, t, kv=dit.cross_kv(c))):
        assert error(v, dit(x, t, c)) < 1e-6
        v.sum().backward()


def test_a_new_one_starts_at_zero_with_a_gradient() -> None:
    dit, (x, t, c) = DiT(TINY), inputs()
    dit.init_weights(generator("dit", 3))
    assert dit(x, t, c).abs().max() == 0
    flow_matching_loss(dit, x, c, t, torch.ones_like(x)).backward()
    assert dit.proj_out.weight.grad.abs().max() > 0


def make_scheduler(solver: str, num_steps: int, shift: float = 3.0):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    if solver == "dpm++":
        scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True,
                                                flow_shift=shift)
    scheduler.set_timesteps(num_steps)
    return scheduler


# with shift 1.0 some sigmas are whole thousandths, and the truncation of their rounding errors is arbitrary
@pytest.mark.parametrize("shift", [2.0, 3.0, 6.0])
def test_grids_are_bit_equal_to_diffusers(shift: float) -> None:
    for n in range(1, 61):
        sigmas, t = dpm_grid(n, shift)
        theirs = make_scheduler("dpm++", n, shift)
        assert torch.equal(sigmas, theirs.sigmas)
        assert torch.equal(t, (theirs.timesteps.double() / 1000).float())
        sigmas, t = euler_grid(n, shift)
        theirs = make_scheduler("euler", n, shift)
        assert torch.equal(sigmas, theirs.sigmas) and torch.equal(1000 * t, theirs.timesteps)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
@pytest.mark.parametrize("num_steps", [1, 2, 20])
@pytest.mark.parametrize("solver", ["dpm++", "euler"])
def test_sampling_follows_the_diffusers_scheduler(solver: str, num_steps: int, guidance_scale: float) -> None:
    dit, (noise, _, c) = build(), inputs(B=4)
    c_uncond = torch.randn(1, 7, TINY.caption_channels, generator=generator("dit", 6))
    scheduler, x = make_scheduler(solver, num_steps), noise
    # two conditions, two images each
    rows = c[:2].repeat_interleave(2, 0)
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            t = (timestep / 1000).float().expand(4)
            v = dit(x, t, rows)
            if guidance_scale > 1:
                v_uncond = dit(x, t, c_uncond.expand(4, -1, -1))
                v = v_uncond + guidance_scale * (v - v_uncond)
            x = scheduler.step(v, timestep, x, return_dict=False)[0]
    ours = sample_ode(dit, noise, c[:2], c_uncond, num_steps, guidance_scale, solver=solver)
    assert ours.dtype == torch.float32 and not ours.requires_grad
    assert error(ours, x) < 2e-5


@pytest.mark.parametrize("noise_level", [0.0, 0.7, 1.2])
def test_every_noise_level_has_the_marginals_of_the_ode(noise_level: float) -> None:
    """Of data from N(1.5, 0.4^2), whose velocity is known exactly."""
    g, times = generator("dit", 0), torch.linspace(1, 0, 401)[:, None]
    x = torch.randn(1, 1, 200, 200, generator=g)
    for i, (t, t_next) in enumerate(zip(times, times[1:]), start=1):
        variance = ((1 - t) * 0.4) ** 2 + t ** 2
        v = (t - (1 - t) * 0.4 ** 2) / variance * (x - (1 - t) * 1.5) - 1.5
        x = sde_step(x, v, t, t_next, noise_level, generator=g)[0]
        if i % 100 == 0:
            s = t_next.item()
            assert x.mean().item() == pytest.approx((1 - s) * 1.5, abs=0.02)
            assert x.std().item() == pytest.approx(math.hypot((1 - s) * 0.4, s), abs=0.015)


def test_sde_step_is_the_formula_and_its_density_the_normal_one() -> None:
    x, v = torch.randn(2, 3, 2, 4, 5, generator=generator("dit", 7))
    t, t_next = torch.tensor([1.0, 0.8, 0.3]), torch.tensor([0.9, 0.5, 0.0])
    # bf16 comes in, fp32 is computed
    x, v = x.bfloat16(), v.bfloat16()
    x_next, log_prob, mean, std = drawn = sde_step(x, v, t, t_next, 0.7, generator=generator("dit", 8))
    x, v = x.float(), v.float()
    for b in range(3):
        s, dt = t[b].item(), (t_next[b] - t[b]).item()
        sigma = 0.7 * math.sqrt(s / (1 - (s if s < 1 else t_next[b].item())))
        drift = v[b] + sigma ** 2 / (2 * s) * (x[b] + (1 - s) * v[b])
        assert error(mean[b], x[b] + drift * dt) < 1e-6
        assert std[b].item() == pytest.approx(sigma * math.sqrt(-dt), rel=1e-6)
        want = Normal(mean[b], std[b]).log_prob(x_next[b]).mean().item()
        assert log_prob[b].item() == pytest.approx(want, abs=1e-5)
    noise = torch.randn(x.shape, generator=generator("dit", 8))
    assert error(x_next, mean + std[:, None, None, None] * noise) < 1e-6
    assert log_prob.shape == std.shape == (3,)
    # from t = 1 the std is the noise level, whatever the step
    assert std[0].item() == pytest.approx(0.7, rel=1e-6)
    # a stored sample scores as when it was drawn
    scored = sde_step(x, v, t, t_next, 0.7, x_next=x_next)
    assert all(torch.equal(a, b) for a, b in zip(drawn, scored, strict=True))
    # without noise it is the Euler step
    x_next, log_prob, _, _ = sde_step(x, v, t, t_next, 0.0)
    assert torch.equal(x_next, x + v * (t_next - t)[:, None, None, None]) and not log_prob.any()
    with pytest.raises(AssertionError):
        sde_step(x, v, t_next, t, 0.7)
