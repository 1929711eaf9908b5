"""Stage III in pieces: the objective by hand, the rollout's exactness, the gradient against a naive one,
LDAM's noise."""
import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

import grpo
from common import Dist, derive_seed, generator, weights_of
from dit import euler_grid, guided_velocity
from grpo import (Rollout, accumulate_gradient, check, check_ratio, chunk_kv, chunks, conditions, epoch_noise,
                  gaussian_kl, group_advantages, grpo_loss, keep_noise, rollout, score_heldout,
                  step_log_prob, window)
from helpers import TINY, tiny_model
from model import ParaUni, Prefix, save_trained
from train import TrainConfig

ALONE = Dist(0, 1, 0, torch.device("cpu"))
CFG = TrainConfig(stage=3, dtype="fp32", num_groups=2, group_size=4, num_steps=4, micro_batch=8,
                  guidance_scale=3.0, eval_steps=2)
PROMPTS = ["a red heart", "two blue stars above a green ring"]         # of different lengths: one is padded


@pytest.fixture(scope="module")
def fresh() -> ParaUni:
    return tiny_model()


@pytest.fixture
def policy(fresh: ParaUni) -> ParaUni:
    return clone(fresh)


def clone(model: ParaUni) -> ParaUni:
    """A copy with its own queries, LIM and DiT."""
    return copy.deepcopy(model, {id(model.vlm): model.vlm, id(model.vae): model.vae})


def perturbed(model: ParaUni, amount: float, seed: int = 1) -> ParaUni:
    model, rng = clone(model), generator(seed, "perturb")
    with torch.no_grad():
        for p in model.trainable(3).values():
            p += amount * p.std(correction=0) * torch.randn(p.shape, generator=rng)
    return model


def keys_of(cfg: TrainConfig, groups: int = 2) -> list[tuple]:
    return [(0, 5, group, member) for group in range(groups) for member in range(cfg.group_size)]


def roll(model: ParaUni, cfg: TrainConfig, gamma: float = 0.0,
         epoch: int = 0) -> tuple[Prefix, Tensor | None, Rollout]:
    prefix, keys = model.encode_prefix([*PROMPTS, None]), keys_of(cfg)
    noise = epoch_noise(model, [2, 3], gamma, keys) if gamma else None
    rolled = rollout(model, model, prefix, [generator("picture", *key) for key in keys], noise,
                     window(cfg.num_steps, cfg.sde_window, epoch), cfg)
    return prefix, noise, rolled


# ----------------------------------------------------------------------------- the objective

def test_advantages_of_a_group_have_mean_0_and_std_1() -> None:
    rewards = torch.randn(5, 6, generator=generator("rewards")) * torch.tensor([0.01, 1, 10, 0.1, 5])[:, None]
    a = group_advantages(rewards)
    torch.testing.assert_close(a.mean(1), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(a.std(1, correction=0), torch.ones(5), atol=1e-5, rtol=0)
    assert torch.equal(a.argsort(1), rewards.argsort(1))
    torch.testing.assert_close(group_advantages(torch.tensor([[1.0, 3.0]])), torch.tensor([[-1.0, 1.0]]))


@pytest.mark.parametrize(("value", "size"), [(0.1, 7), (0.1, 3), (1e4 / 3, 24), (0.0, 2), (-0.7, 11)])
def test_a_group_without_spread_has_advantages_of_exactly_0(value: float, size: int) -> None:
    rewards = torch.stack([torch.full((size,), value), torch.linspace(0, 1, size)])
    a = group_advantages(rewards)
    assert (a[0] == 0).all() and (a[1] != 0).any()


def test_rounding_of_the_mean_is_the_trap_of_the_test_above() -> None:
    rewards = torch.full((1, 7), 0.1)
    assert (rewards - rewards.mean(1, keepdim=True)).abs().max() > 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_silences_its_group_only(bad: float) -> None:
    a = group_advantages(torch.tensor([[0.0, bad, 2.0], [0.0, 1.0, 2.0]]))
    assert (a[0] == 0).all()
    torch.testing.assert_close(a[1], torch.tensor([-1.5, 0, 1.5]) * (2 / 3) ** 0.5)


def test_a_group_of_one_is_refused() -> None:
    for shape in ((4, 1), (4,)):
        with pytest.raises(ValueError, match="--group-size"):
            group_advantages(torch.zeros(shape))


@pytest.mark.parametrize(("advantage", "ratio", "loss", "slope"), [
    # clipped only where it would gain
    (+1.0, 1.1, -1.1, -1.1), (+1.0, 1.5, -1.2, 0.0), (+1.0, 0.5, -0.5, -0.5),
    (-1.0, 0.9, +0.9, +0.9), (-1.0, 0.5, +0.8, 0.0), (-1.0, 1.5, +1.5, +1.5),
    (+2.0, 1.0, -2.0, -2.0), (+0.0, 1.5, +0.0, +0.0)])
def test_the_clipped_loss_by_hand(advantage: float, ratio: float, loss: float, slope: float) -> None:
    log_prob = torch.tensor([-1.0 + math.log(ratio)], requires_grad=True)
    got = grpo_loss(log_prob, torch.tensor([-1.0]), torch.tensor([advantage]), clip_range=0.2)
    got.backward()
    torch.testing.assert_close(got.detach(), torch.tensor(loss))
    torch.testing.assert_close(log_prob.grad, torch.tensor([slope]))


def test_the_loss_is_a_mean_over_pictures() -> None:
    log_prob, a = torch.tensor([0.0, math.log(1.1)]), torch.tensor([1.0, -1.0])
    torch.testing.assert_close(grpo_loss(log_prob, torch.zeros(2), a, 0.2), torch.tensor((-1 + 1.1) / 2))


def test_kl_is_that_of_the_two_gaussians() -> None:
    rng = generator("kl")
    mean, ref = (torch.randn(3, 2, 4, 4, generator=rng) for _ in range(2))
    std = torch.tensor([0.1, 0.7, 2.0])
    mean.requires_grad_()
    kl = gaussian_kl(mean, ref, std)
    wide = std[:, None, None, None].expand_as(mean)
    torch.testing.assert_close(kl, kl_divergence(Normal(mean, wide), Normal(ref, wide)).mean((1, 2, 3)))
    assert torch.autograd.grad(kl.sum(), mean)[0].abs().min() > 0
    assert (gaussian_kl(ref, ref, std) == 0).all()


# ----------------------------------------------------------------------------- chunks, steps

def test_chunks_visit_every_picture_once_with_its_own_group() -> None:
    tried = 0
    for groups in range(1, 6):
        for size in range(2, 7):
            for micro_batch in [*(m for m in range(1, size) if size % m == 0), *range(size, 14)]:
                parts = list(chunks(groups, size, micro_batch))
                seen = [i for _, b in parts for i in range(b.start, b.stop)]
                assert seen == list(range(groups * size))
                for g, b in parts:
                    assert b.stop - b.start <= micro_batch
                    assert {i // size for i in range(b.start, b.stop)} == set(range(g.start, g.stop))
                    # the DiT shares its conditions out evenly
                    assert (b.stop - b.start) % (g.stop - g.start) == 0
                tried += 1
    assert tried > 200


def test_the_window_slides_over_all_steps_but_the_last() -> None:
    assert window(5, 0, 9) == [0, 1, 2, 3]
    assert [window(5, 2, epoch) for epoch in range(4)] == [[0, 1], [1, 2], [2, 3], [0, 1]]
    assert window(5, 4, 7) == [0, 1, 2, 3]


# ----------------------------------------------------------------------------- rollout

@pytest.mark.parametrize(("micro_batch", "guidance", "gamma"), [
    (1, 1.0, 0.5), (1, 4.5, 0.0), (2, 4.5, 0.5), (4, 1.0, 0.0), (4, 4.5, 0.5), (7, 4.5, 0.5), (8, 1.0, 0.5),
    (8, 4.5, 0.0), (8, 4.5, 0.5)])
def test_the_first_ratio_is_1(policy: ParaUni, micro_batch: int, guidance: float, gamma: float) -> None:
    cfg = replace(CFG, micro_batch=micro_batch, guidance_scale=guidance)
    prefix, noise, rolled = roll(policy, cfg, gamma)
    assert rolled.log_prob[:-1].abs().min() > 0 and (rolled.log_prob[-1] == 0).all()
    sigmas = euler_grid(cfg.num_steps, cfg.shift)[0].tolist()
    c = conditions(policy, prefix, noise, cfg)
    for groups, b in chunks(2, cfg.group_size, micro_batch):
        kv = chunk_kv(policy.dit, *c, groups, b, 8, cfg)
        for k in rolled.trained:
            x_next, log_prob, _, _ = step_log_prob(policy.dit, kv, rolled.latents[k, b], sigmas[k],
                                                   sigmas[k + 1], cfg, rolled.latents[k + 1, b])
            assert torch.equal(x_next, rolled.latents[k + 1, b])
            assert (torch.exp(log_prob - rolled.log_prob[k, b]) - 1).abs().max() <= 1e-6
    got = accumulate_gradient(policy, prefix, rolled, torch.randn(8, generator=generator("a")), noise, cfg,
                              anchor=False)
    assert got["ratio_dev"] <= 1e-6 and got["clip_frac"] == 0 and got["kl"] <= 1e-9


def test_other_noise_in_the_update_than_in_the_rollout_is_noticed(policy: ParaUni) -> None:
    prefix, noise, rolled = roll(policy, CFG, 0.5)
    other = epoch_noise(policy, [2, 3], 0.5, [(1, *key) for key in keys_of(CFG)])
    for wrong in (other, None):
        found = accumulate_gradient(policy, prefix, rolled, torch.ones(8), wrong, CFG, anchor=False)
        assert found["ratio_dev"] > 1e-5


def test_recomputed_anchors_make_the_first_ratio_exactly_1(policy: ParaUni) -> None:
    prefix, noise, rolled = roll(policy, CFG)
    before = rolled.log_prob.clone()
    moved = perturbed(policy, 0.05)
    found = accumulate_gradient(moved, prefix, rolled, torch.ones(8), noise, CFG, anchor=True)
    assert found["ratio_dev"] == 0
    assert (rolled.log_prob != before)[:-1].all()


@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_a_picture_depends_neither_on_chunks_nor_on_other_pictures(policy: ParaUni, gamma: float) -> None:
    _, _, whole = roll(policy, CFG, gamma)
    _, _, parts = roll(policy, replace(CFG, micro_batch=2), gamma)
    assert torch.equal(whole.latents[0], parts.latents[0])
    torch.testing.assert_close(whole.latents, parts.latents, atol=1e-4, rtol=1e-4)
    # the second group by itself
    keys = keys_of(CFG)[4:]
    noise = epoch_noise(policy, [2, 3], gamma, keys) if gamma else None
    alone = rollout(policy, policy, policy.encode_prefix([PROMPTS[1], None]),
                    [generator("picture", *key) for key in keys], noise, [0, 1, 2], CFG)
    assert torch.equal(whole.latents[0, 4:], alone.latents[0])
    torch.testing.assert_close(whole.latents[:, 4:], alone.latents, atol=1e-4, rtol=1e-4)
    assert (whole.latents[-1, :4] - whole.latents[-1, 4:]).abs().max() > 0.1


@pytest.mark.parametrize(("size", "epoch"), [(0, 0), (1, 1)])
def test_steps_outside_the_window_are_euler_steps(policy: ParaUni, size: int, epoch: int) -> None:
    cfg = replace(CFG, sde_window=size)
    prefix, _, rolled = roll(policy, cfg, epoch=epoch)
    assert rolled.trained == ([1] if size else [0, 1, 2])
    sigmas = euler_grid(cfg.num_steps, cfg.shift)[0].tolist()
    with torch.no_grad():
        kv = chunk_kv(policy.dit, *conditions(policy, prefix, None, cfg), slice(0, 2), slice(0, 8), 8, cfg)
        for k in range(4):
            x = rolled.latents[k]
            v = guided_velocity(policy.dit, x, torch.full((8,), sigmas[k]), kv, cfg.guidance_scale)
            euler = x + (sigmas[k + 1] - sigmas[k]) * v
            off = (rolled.latents[k + 1] - euler).abs().max()
            if k in rolled.trained:
                assert off > 0.1 and rolled.log_prob[k].abs().min() > 0
            else:
                assert off < 1e-5 and (rolled.log_prob[k] == 0).all()


# ----------------------------------------------------------------------------- update

def naive_means(model: ParaUni, prompt: str, noise: Tensor | None, rolled: Rollout, b: int,
                cfg: TrainConfig) -> list[tuple[Tensor, float]]:
    """Mean and std of every trained step of picture b, everything by itself and from the formulas."""
    c_layers, uncond = (model.condition_layers(model.encode_prefix([p]))
                        for p in (prompt, None))                                        # (L, 1, N, E)
    c = (c_layers if noise is None else c_layers * (1 + noise[:, b:b + 1])).mean(0)
    sigmas, out = euler_grid(cfg.num_steps, cfg.shift)[0].tolist(), []
    for k in rolled.trained:
        t, t_next, x = sigmas[k], sigmas[k + 1], rolled.latents[k, b:b + 1]
        v = model.dit(x, torch.tensor([t]), c)
        if cfg.guidance_scale > 1:
            v_uncond = model.dit(x, torch.tensor([t]), uncond.mean(0))
            v = v_uncond + cfg.guidance_scale * (v - v_uncond)
        sigma = cfg.noise_level * math.sqrt(t / (1 - (t_next if t == 1 else t)))
        dt = t_next - t
        out.append((x + (v + sigma ** 2 / (2 * t) * (x + (1 - t) * v)) * dt, sigma * math.sqrt(-dt)))
    return out


def naive_gradient(model: ParaUni, reference: ParaUni, rolled: Rollout, advantages: Tensor,
                   noise: Tensor | None, cfg: TrainConfig) -> float:
    """The objective of all pictures and steps as one graph; returns the KL, leaves .grad."""
    total, kl_total = torch.zeros(()), 0.0
    for b in range(len(advantages)):
        prompt = PROMPTS[b // cfg.group_size]
        with torch.no_grad():
            refs = naive_means(reference, prompt, noise, rolled, b, cfg)
        for k, (mean, std), (ref, _) in zip(rolled.trained,
                                            naive_means(model, prompt, noise, rolled, b, cfg), refs):
            ratio = (Normal(mean, std).log_prob(rolled.latents[k + 1, b:b + 1]).mean()
                     - rolled.log_prob[k, b]).exp()
            gain = torch.minimum(ratio * advantages[b],
                                 ratio.clamp(1 - cfg.clip_range, 1 + cfg.clip_range) * advantages[b])
            kl = kl_divergence(Normal(mean, std), Normal(ref, std)).mean()
            total, kl_total = total - gain + cfg.kl_coef * kl, kl_total + kl.item()
    (total / len(advantages) / len(rolled.trained)).backward()
    return kl_total / len(advantages) / len(rolled.trained)


@pytest.mark.parametrize(("guidance", "gamma", "micro_batch"),
                         [(1.0, 0.0, 8), (3.0, 0.0, 2), (3.0, 0.5, 4), (1.0, 0.5, 1)])
def test_the_cheap_gradient_is_the_naive_one(fresh: ParaUni, guidance: float, gamma: float,
                                             micro_batch: int) -> None:
    cfg = replace(CFG, guidance_scale=guidance, micro_batch=micro_batch, kl_coef=0.5, clip_range=2e-4)
    policy, reference = clone(fresh), perturbed(fresh, 0.02, seed=2)
    keys, prefix = keys_of(cfg), policy.encode_prefix([*PROMPTS, None])
    noise = epoch_noise(policy, [2, 3], gamma, keys) if gamma else None
    rolled = rollout(policy, reference, prefix, [generator("picture", *key) for key in keys], noise,
                     [0, 1, 2], cfg)
    advantages = torch.randn(8, generator=generator("advantages"))
    moved, naive = perturbed(policy, 0.004), perturbed(policy, 0.004)
    got = accumulate_gradient(moved, prefix, rolled, advantages, noise, cfg, anchor=False)
    kl = naive_gradient(naive, reference, rolled, advantages, noise, cfg)
    assert 0 < got["clip_frac"] < 1, "both sides of the clip are wanted in this test"
    assert got["kl"] == pytest.approx(kl, rel=1e-4) and kl > 0
    want = {name: p.grad for name, p in naive.trainable(3).items()}
    for part in ("queries", "lim.", "dit."):
        names = [name for name in want if name.startswith(part)]
        error, scale = (sum(x.double().square().sum() for x in xs).sqrt() for xs in (
            [moved.trainable(3)[n].grad - want[n] for n in names], [want[n] for n in names]))
        # with guidance, large opposite gradients of c and c_uncond cancel in fp32
        assert scale > 1e-4 and error / scale < (1e-5 if guidance == 1 else 5e-5), (
            part, (error / scale).item(), scale.item())


def test_gradients_add_up_over_chunks_and_calls(policy: ParaUni) -> None:
    prefix, noise, rolled = roll(policy, CFG)
    advantages = torch.randn(8, generator=generator("advantages"))
    accumulate_gradient(policy, prefix, rolled, advantages, noise, CFG, anchor=False)
    once = {name: p.grad.clone() for name, p in policy.trainable(3).items()}
    accumulate_gradient(policy, prefix, rolled, advantages, noise, replace(CFG, micro_batch=2), anchor=False)
    for name, p in policy.trainable(3).items():
        assert (p.grad - 2 * once[name]).norm() <= 1e-4 * once[name].norm() + 1e-9, name
    assert all(p.grad is None for part in (policy.vlm, policy.vae) for p in part.parameters())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_conditions_are_made_in_the_precision_of_the_run_and_summed_in_fp32(policy: ParaUni,
                                                                            dtype: str) -> None:
    made: list[torch.dtype] = []
    policy.lim.projector.register_forward_hook(lambda module, args, out: made.append(out.dtype))
    c = conditions(policy, policy.encode_prefix([*PROMPTS, None]), None, replace(CFG, dtype=dtype))
    assert made == [torch.float32 if dtype == "fp32" else torch.bfloat16]
    assert [x.dtype for x in c] == [torch.float32] * 2


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_gradient_checkpointing_changes_nothing_in_any_precision(policy: ParaUni, dtype: str) -> None:
    """The trap: computed again after its `with precision`, attention must still take the same kernel."""
    cfg, found = replace(CFG, dtype=dtype, kl_coef=0.5), []
    prefix, noise, rolled = roll(policy, cfg)
    for again in (False, True):
        policy.lim.gradient_checkpointing = policy.dit.gradient_checkpointing = again
        policy.zero_grad(set_to_none=True)
        accumulate_gradient(policy, prefix, rolled, torch.linspace(-1, 1, 8), noise, cfg, anchor=False)
        found.append({name: p.grad for name, p in policy.trainable(3).items()})
    for name, grad in found[0].items():
        assert grad.abs().max() > 0 and torch.equal(grad, found[1][name]), name


def test_kl_is_0_at_the_start_and_pulls_back_afterwards(policy: ParaUni) -> None:
    cfg, still = replace(CFG, kl_coef=1.0), torch.zeros(8)
    prefix, noise, rolled = roll(policy, cfg)
    assert accumulate_gradient(policy, prefix, rolled, still, noise, cfg, anchor=False)["kl"] <= 1e-9
    moved = perturbed(policy, 0.02)
    far = accumulate_gradient(moved, prefix, rolled, still, noise, cfg, anchor=False)["kl"]
    assert far > 1e-6
    grads = {name: p.grad for name, p in moved.trainable(3).items()}
    square = sum(g.square().sum() for g in grads.values())
    with torch.no_grad():
        for name, p in moved.trainable(3).items():
            p -= 0.1 * far / square * grads[name]           # to first order, a tenth less
    near = accumulate_gradient(moved, prefix, rolled, still, noise, cfg, anchor=False)["kl"]
    assert 0.8 * far < near < 0.97 * far


def test_check_ratio_raises_in_fp32_and_warns_otherwise() -> None:
    cfg = replace(CFG, clip_range=1e-3)
    assert check_ratio(9e-5, cfg) is None
    with pytest.raises(RuntimeError, match="--clip-range.*Likely causes.*LDAM"):
        check_ratio(2e-4, cfg)
    with pytest.raises(RuntimeError, match="--clip-range"):
        check_ratio(math.nan, cfg)
    for change in ({"dtype": "bf16"}, {"compile": True}):
        assert "--anchor recompute" in check_ratio(2e-4, replace(cfg, **change))


@pytest.mark.parametrize(("change", "flag"), [
    ({"group_size": 1}, "--group-size"), ({"num_groups": 3}, "--num-groups"),
    ({"num_groups": 0}, "--num-groups"), ({"micro_batch": 3}, "--micro-batch"),
    ({"num_steps": 1}, "--num-steps"), ({"sde_window": 4}, "--sde-window"),
    ({"rewards": ()}, "--rewards"), ({"rewards": ("a.py:f", "b.py:f")}, "--rewards")])
def test_bad_arithmetic_is_refused_in_the_words_of_the_flags(change: dict, flag: str) -> None:
    check(CFG, world_size=2)
    with pytest.raises(ValueError, match=flag):
        check(replace(CFG, **change), world_size=2)


# ----------------------------------------------------------------------------- LDAM's noise

def test_epoch_noise_touches_only_its_layers_and_each_picture_by_its_key(fresh: ParaUni) -> None:
    keys = keys_of(CFG)
    noise = epoch_noise(fresh, [2, 4], 0.3, keys)                                       # (L, B, N, E)
    assert noise.shape == (4, 8, TINY.num_queries, 32)
    assert (noise[[0, 2]] == 0).all() and (noise[[1, 3]] != 0).all()
    assert noise[[1, 3]].std().item() == pytest.approx(0.3, rel=0.05) and abs(noise.mean().item()) < 0.02
    rows = noise[[1, 3]].transpose(0, 1).flatten(1)                                     # (B, 2 N E)
    assert torch.corrcoef(rows).fill_diagonal_(0).abs().max() < 0.3
    assert torch.corrcoef(noise[[1, 3]].flatten(1))[0, 1].abs() < 0.1
    assert torch.equal(epoch_noise(fresh, [2, 4], 0.3, keys[5:6])[:, 0], noise[:, 5])
    torch.testing.assert_close(epoch_noise(fresh, [2, 4], 0.6, keys), 2 * noise)


def test_kept_fields_multiply_and_stay(policy: ParaUni, tmp_path) -> None:
    before = policy.generate(PROMPTS, 2, 1.0)
    first, second = (epoch_noise(policy, layers, gamma, [key])[:, 0]
                     for layers, gamma, key in (([2], 0.5, (0, 3)), ([2, 3], 0.4, (0, 9))))
    keep_noise(policy, [2], 0.5, (0, 3))
    torch.testing.assert_close(policy.layer_factor, 1 + first)
    assert (policy.layer_factor[[0, 2, 3]] == 1).all()
    once = policy.generate(PROMPTS, 2, 1.0)
    keep_noise(policy, [2, 3], 0.4, (0, 9))
    torch.testing.assert_close(policy.layer_factor, (1 + first) * (1 + second))
    twice = policy.generate(PROMPTS, 2, 1.0)
    assert min((a - b).abs().max() for a, b in ((before, once), (once, twice))) > 1e-3

    save_trained(policy, tmp_path / "stage3.safetensors", 3, CFG)
    other = tiny_model(seed=7)
    other.vlm, other.vae = policy.vlm, policy.vae
    other.load_trained(tmp_path / "stage3.safetensors")
    assert torch.equal(other.generate(PROMPTS, 2, 1.0), twice)
    assert "layer_factor" not in " ".join(policy.state_dict())
    assert clone(policy).layer_factor is not policy.layer_factor


def test_a_kept_field_is_in_rollout_and_update_alike(policy: ParaUni) -> None:
    plain = roll(policy, CFG)[2]
    keep_noise(policy, [2, 3], 0.5, (0, 3))
    prefix, noise, rolled = roll(policy, CFG)
    assert (rolled.latents[-1] - plain.latents[-1]).abs().max() > 1e-3
    assert accumulate_gradient(policy, prefix, rolled, torch.ones(8), noise, CFG,
                               anchor=False)["ratio_dev"] <= 1e-6


class Firing:
    """An LDAM that fires."""
    last = {"epoch": 1, "fired": 1, "gamma": 0.5, "gamma_raw": 0.5, "bounded": 0}

    def update(self, grad_norm: float, reward: float) -> float:
        return 0.5


def test_a_kept_field_moves_the_reference_too_so_that_the_kl_stays_one_of_weights(policy: ParaUni) -> None:
    run = SimpleNamespace(cfg=replace(CFG, ldam_mode="keep"), model=policy, reference=clone(policy),
                          ldam=Firing(), dist=Dist(0, 1, 0, policy.device), gamma=None)
    assert grpo.perturb(run, [2], 0.0, 1.0, (0, 3))["ldam/layers"] == [2]
    assert torch.equal(run.reference.layer_factor, policy.layer_factor)
    assert (policy.layer_factor[1] != 1).all()


# ----------------------------------------------------------------------------- an epoch

def run_of(policy: ParaUni, scores: dict, tmp_path, **changes) -> grpo.Run:
    (tmp_path / "r.py").write_text("def any_name(images, prompts):\n    return images.mean((1, 2, 3))\n")
    cfg = replace(CFG, rewards=(f"{tmp_path / 'r.py'}:any_name",), num_eval=2, run_dir=str(tmp_path), steps=4,
                  warmup=0, clip_range=1e-2, **changes)
    run = grpo.start(cfg, policy, ALONE)
    run.scorers = scores
    return run


def test_a_nan_reward_leaves_out_its_group_only(policy: ParaUni, tmp_path, monkeypatch) -> None:
    values, used = torch.tensor([1.0, math.nan, 3.0, 4.0, 1.0, 2.0, 3.0, 6.0]), []
    real = accumulate_gradient
    monkeypatch.setattr(grpo, "accumulate_gradient", lambda *args: (used.append(args[3]), real(*args))[1])
    run = run_of(policy, {"r": lambda images, prompts: values,
                          "watched": lambda images, prompts: values * 0 + math.nan}, tmp_path)
    record = grpo.run_epoch(run, 0)
    assert (used[0][:4] == 0).all() and torch.equal(used[0][4:], group_advantages(values[4:].view(1, 4))[0])
    assert record["reward_nan"] == 1 and record["zero_std"] == 0 and math.isfinite(record["grad_norm"])
    assert record["reward/r"] == pytest.approx(20 / 7) and math.isnan(record["reward/watched"])
    assert all(p.isfinite().all() for p in run.params.values())


def test_an_epoch_without_a_finite_group_changes_nothing_and_is_counted(policy: ParaUni, tmp_path) -> None:
    run = run_of(policy, {"r": lambda images, prompts: torch.full((8,), math.nan)}, tmp_path)
    for average in run.ema.values():
        average.add_(1)                                                 # away from the weights
    before = {name: (p.detach().clone(), run.ema[name].clone()) for name, p in run.params.items()}
    record = grpo.run_epoch(run, 0)
    assert all(torch.equal(before[name][0], p) and torch.equal(before[name][1], run.ema[name])
               for name, p in run.params.items())
    assert record["reward_nan"] == 2 and record["skipped"] == run.in_a_row == 1


def test_equal_rewards_teach_nothing_but_the_kl(policy: ParaUni, tmp_path) -> None:
    record = grpo.run_epoch(run_of(policy, {"r": lambda images, prompts: torch.full((8,), 0.1)}, tmp_path), 0)
    assert record["zero_std"] == 1 and record["grad_norm"] < 1e-4


def test_a_gradient_that_is_not_finite_is_neither_applied_nor_shown_to_ldam(policy: ParaUni, tmp_path,
                                                                            monkeypatch) -> None:
    run = run_of(policy, {"r": lambda images, prompts: images.mean((1, 2, 3))}, tmp_path)
    run.ldam.last = {"fired": 1}                                                        # of an epoch before
    before = {name: p.detach().clone() for name, p in run.params.items()}

    def poisoned(*args: object) -> dict[str, float]:
        for p in run.params.values():
            p.grad = torch.full_like(p, math.nan)
        return {"kl": 0.0, "ratio_dev": 0.0, "clip_frac": 0.0}
    monkeypatch.setattr(grpo, "accumulate_gradient", poisoned)
    record = grpo.run_epoch(run, 0)
    assert record["ldam/fired"] == 0 and run.ldam.epoch == 0 and run.gamma is None
    assert all(torch.equal(p, before[name]) for name, p in run.params.items())


def test_training_raises_a_reward(policy: ParaUni, tmp_path) -> None:
    """Bright pictures win. Shown on a frozen batch of noise, before and after six steps."""
    def bright(images: Tensor, prompts: list[str]) -> Tensor:
        return images.mean((1, 2, 3))
    run = run_of(policy, {"r": bright}, tmp_path, lr=3e-3, kl_coef=0.0, ldam=False)
    before = bright(policy.generate(PROMPTS * 4, 4, 3.0), []).mean()
    for epoch in range(4):
        assert grpo.run_epoch(run, epoch)["ratio_dev"] <= 1e-6
    assert bright(policy.generate(PROMPTS * 4, 4, 3.0), []).mean() > before + 0.01


# ----------------------------------------------------------------------------- looking at a model

def test_heldout_scores_are_the_same_however_they_are_shared_out(policy: ParaUni, monkeypatch) -> None:
    prompts = [*PROMPTS, "a pink moon", "a circle", "three rings"]
    rewards = {"bright": lambda images, said: images.mean((1, 2, 3)),
               "length": lambda images, said: torch.tensor([float(len(s)) for s in said])}
    cfg = replace(CFG, micro_batch=2)
    alone = score_heldout(policy, rewards, prompts, cfg, ALONE)
    assert alone["length"] == [float(len(p)) for p in prompts] and len(set(alone["bright"])) == 5
    seeds = [derive_seed(cfg.seed, "heldout", i) for i in range(5)]
    assert alone["bright"] == pytest.approx(policy.generate(prompts, 2, cfg.eval_guidance_scale,
                                                            seed=seeds).mean((1, 2, 3)).tolist(), abs=1e-5)
    monkeypatch.setattr(grpo, "all_gather_list", lambda tensor, dist: tensor)
    for world in (2, 3, 7):                                 # 7: two ranks have nothing to do
        shares = [score_heldout(policy, rewards, prompts, cfg, Dist(rank, world, rank, torch.device("cpu")))
                  for rank in range(world)]
        for name in rewards:
            assert sum((share[name] for share in shares), []) == pytest.approx(alone[name], abs=1e-5)


def test_weights_of_puts_everything_back(policy: ParaUni) -> None:
    params = policy.trainable(3)
    before = {name: p.detach().clone() for name, p in params.items()}
    ema = {name: p + 1 for name, p in before.items()}
    with weights_of(params, ema):
        assert all(torch.equal(p, ema[name]) for name, p in params.items())
    assert all(torch.equal(p, before[name]) for name, p in params.items())
    with pytest.raises(KeyboardInterrupt), weights_of(params, ema):
        raise KeyboardInterrupt
    assert all(torch.equal(p, before[name]) for name, p in params.items())


def test_the_curves_survive_a_reward_that_was_nowhere_finite(tmp_path) -> None:
    records = [{"epoch": n, "phase": "a" if n < 3 else "b", "ldam/fired": n % 2, "reward/a": 0.1 * n,
                "reward/b": None if n == 2 else 1.0}
               for n in range(1, 5)]
    grpo.plot_rewards([{"epoch": 0, "phase": "a", "heldout/a": 0.0}, *records], ["a", "b"],
                      tmp_path / "rewards.png")
    assert (tmp_path / "rewards.png").stat().st_size > 1000
