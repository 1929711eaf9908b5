"""Stage III in pieces: objective, rollout, the gradient against naive ones, LDAM's noise, scoring."""
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

import naive
from common import Refused, derive_seed, generator
from grpo import (GRPOConfig, Perturbation, Rollout, accumulate_gradient, check_flags, check_ratio,
                  encode_conditions, group_advantages, keep_noise, open_prompts, rollout, score_groups,
                  score_heldout, trained_steps)
from helpers import ALONE, TINY, draw, moved, tiny_model
from model import ParaUni, Prefix

CFG = GRPOConfig(dtype="fp32", num_groups=2, group_size=4, num_steps=4, micro_batch=8, kl_coef=(0.01,),
                 guidance_scale=3.0, eval_steps=2)
# of different lengths: one is padded
PROMPTS = ["a red heart", "two blue stars above a green ring"]
KEYS = [(0, 5, group, member) for group in range(2) for member in range(4)]
FIRED, AT_REST = Perturbation(0.5, [2, 3], KEYS), Perturbation(0.0, [], KEYS)
ADVANTAGES = torch.tensor([1.0, -0.5, -0.8, 0.3, 0.2, 1.1, -1.3, 0.4])


@pytest.fixture
def policy() -> ParaUni:
    return tiny_model()


def roll(model: ParaUni, cfg: GRPOConfig, perturbation: Perturbation = AT_REST,
         reference: ParaUni | None = None) -> tuple[Prefix, Rollout]:
    prefix = model.encode_prefix([*PROMPTS, None])
    trained = trained_steps(cfg.num_steps, cfg.sde_window, 1)
    return prefix, rollout(model, reference or model, prefix, KEYS, perturbation, trained, *cfg.kl_coef, cfg)


def gradients(model: ParaUni) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.trainable(3).items()}


def assert_same_gradients(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Relative to the largest gradient of all; queries, LIM and DiT have one at all."""
    for part in ("queries", "lim.", "dit."):
        assert max(grad.abs().max() for name, grad in want.items() if name.startswith(part)) > 1e-4
    scale = max(grad.abs().max().item() for grad in want.values())
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad, rtol=0, atol=tolerance * scale, msg=name)


def test_a_group_without_spread_has_advantages_of_exactly_0() -> None:
    """Equal, and equal but for rounding. The trap: the mean of seven times 0.1 is not 0.1."""
    rewards = torch.full((3, 7), 0.1)
    rewards[1, 0] = torch.nextafter(rewards[1, 0], torch.tensor(9e9))
    rewards[2, 0] += 0.01
    for scale in (1.0, 2.0 ** -30):
        a = group_advantages(rewards * scale)
        assert (a[:2] == 0).all() and (a[2] != 0).any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_silences_its_group_only(bad: float) -> None:
    a = group_advantages(torch.tensor([[0.0, bad, 2.0], [0.0, 1.0, 2.0]]))
    torch.testing.assert_close(a, torch.tensor([[0.0, 0, 0], [-1.5, 0, 1.5]]) * (2 / 3) ** 0.5)


def test_the_window_slides_over_the_first_half() -> None:
    assert trained_steps(5, 0, 9) == [0, 1, 2, 3]
    assert [trained_steps(7, 2, epoch) for epoch in range(4)] == [[0, 1], [1, 2], [0, 1], [1, 2]]
    assert [trained_steps(6, 1, epoch) for epoch in range(4)] == [[0], [1], [2], [0]]


@pytest.mark.parametrize("shared", [False, True])
def test_pictures_of_a_prompt_share_their_first_latent_where_asked(policy: ParaUni, shared: bool) -> None:
    _, rolled = roll(policy, replace(CFG, shared_start=shared))
    distinct = [len(latents.flatten(1).unique(dim=0)) for latents in rolled.latents[[0, 1, -1]]]
    assert distinct == [2 if shared else 8, 8, 8]


@pytest.mark.parametrize("micro_batch, guidance, fired, window", [
    (1, 1.0, FIRED, 0), (2, 4.5, FIRED, 1), (4, 4.5, AT_REST, 0), (7, 4.5, FIRED, 2), (8, 1.0, AT_REST, 0)])
def test_the_first_ratio_is_1(policy: ParaUni, micro_batch: int, guidance: float, fired: Perturbation,
                              window: int) -> None:
    """Of the steps of the window, and no other is stochastic."""
    cfg = replace(CFG, micro_batch=micro_batch, guidance_scale=guidance, sde_window=window)
    prefix, rolled = roll(policy, cfg, fired)
    assert rolled.log_prob.bool().tolist() == [[k in rolled.trained] * 8 for k in range(4)]
    figures = accumulate_gradient(policy, prefix, rolled, ADVANTAGES, fired, cfg, first=True)
    assert figures["ratio_dev"].shape == (8 * len(rolled.trained),)
    assert figures["ratio_dev"].max() <= 1e-6 and figures["kl"].max() <= 1e-9


def test_recomputed_anchors_make_the_first_ratio_exactly_1(policy: ParaUni) -> None:
    cfg = replace(CFG, anchor="recompute")
    prefix, rolled = roll(policy, cfg)
    before = rolled.log_prob.clone()
    figures = accumulate_gradient(moved(policy, 0.05), prefix, rolled, ADVANTAGES, AT_REST, cfg, first=True)
    assert figures["ratio_dev"].max() == 0 and (rolled.log_prob != before)[:-1].all()


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_rollout_and_gradient_are_those_of_naive_loops(policy: ParaUni, guidance: float) -> None:
    """Of diffusers' DiT and transformers' SigLIP, a condition encoded for each picture and step."""
    cfg = replace(CFG, guidance_scale=guidance, kl_coef=(0.5,), micro_batch=4)
    reference = tiny_model()
    moved(policy, 0.02)
    prefix, rolled = roll(policy, cfg, reference=reference)
    texts = [prompt for prompt in PROMPTS for _ in range(4)]
    peer, peer_reference = naive.peer_of(policy), naive.peer_of(reference)
    latents, log_prob = naive.rollout(peer, texts, [generator("picture", *key) for key in KEYS], cfg)
    torch.testing.assert_close(rolled.latents, latents, rtol=0, atol=1e-5 * latents.abs().max().item())
    torch.testing.assert_close(rolled.log_prob[:3], log_prob, rtol=1e-5, atol=1e-5)

    accumulate_gradient(policy, prefix, rolled, ADVANTAGES, AT_REST, cfg, first=True)
    naive.accumulate_gradient(peer, peer_reference, texts, rolled.latents, rolled.log_prob, ADVANTAGES, cfg)
    assert_same_gradients(gradients(policy), gradients(peer))


def naive_steps(peer: ParaUni, b: int, noise: list[Tensor], rolled: Rollout, cfg: GRPOConfig) -> list[Normal]:
    """Every trained step of picture b, from the formulas; noise on layers 2 and 3."""
    c_layers, uncond = (peer.condition_layers(peer.encode_prefix([prompt]))
                        for prompt in (PROMPTS[b // 4], None))
    factor = torch.ones(TINY.lim.vlm_layers, 1, *c_layers.shape[2:])                    # (L, 1, N, E)
    for layer, eps in zip((2, 3), noise):
        factor[layer - 1] += eps[b]
    c, c_uncond = (c_layers * factor).mean(0), uncond.mean(0)
    steps = []
    for k in rolled.trained:
        t, t_next, x = rolled.times[k], rolled.times[k + 1], rolled.latents[k, b:b + 1]
        v = naive.guided(peer.dit, x, t, c, c_uncond, cfg)
        steps.append(naive.transition(x, v, t, t_next, cfg.noise_level))
    return steps


@pytest.mark.parametrize("guidance, fired, micro_batch", [
    (1.0, AT_REST, 16), (3.0, FIRED, 4), (1.0, FIRED, 2)])
def test_the_gradient_is_that_of_the_objective(policy: ParaUni, guidance: float, fired: Perturbation,
                                               micro_batch: int) -> None:
    """All pictures and steps as one graph, LDAM's noise and both sides of the clip included."""
    cfg = replace(CFG, guidance_scale=guidance, micro_batch=micro_batch, kl_coef=(0.5,), clip_range=2e-4,
                  step_weights="noise" if fired.layers else "equal")
    reference = moved(tiny_model(), 0.02, seed=2)
    prefix, rolled = roll(policy, cfg, fired, reference)
    moved(policy, 0.004)
    literal, peer_reference = naive.peer_of(policy), naive.peer_of(reference)
    figures = accumulate_gradient(policy, prefix, rolled, ADVANTAGES, fired, cfg, first=True)
    assert 0 < figures["clip_frac"].mean() < 1

    noise = fired.noise(slice(None), policy)
    total, kls = torch.zeros(()), []
    for b, advantage in enumerate(ADVANTAGES):
        with torch.no_grad():
            refs = naive_steps(peer_reference, b, noise, rolled, cfg)
        for k, step, ref in zip(rolled.trained, naive_steps(literal, b, noise, rolled, cfg), refs):
            log_prob = step.log_prob(rolled.latents[k + 1, b:b + 1]).mean()
            ratio = (log_prob - rolled.log_prob[k, b]).exp()
            bounded = ratio.clamp(1 - cfg.clip_range, 1 + cfg.clip_range)
            kl = kl_divergence(step, ref).mean()
            gain = torch.minimum(ratio * advantage, bounded * advantage) - cfg.kl_coef[0] * kl
            total = total - gain * (step.stddev.mean() / cfg.noise_level if fired.layers else 1.0)
            kls.append(kl.item())
    (total / 24).backward()
    assert figures["kl"].mean().item() == pytest.approx(sum(kls) / 24, rel=1e-4)
    # with guidance, large opposite gradients of c and c_uncond cancel in fp32
    assert_same_gradients(gradients(policy), gradients(literal), 1e-5 if guidance == 1 else 5e-5)
    assert all(p.grad is None for part in (policy.vlm, policy.vae) for p in part.parameters())


def test_conditions_are_made_in_the_precision_of_the_run_and_summed_in_fp32(policy: ParaUni) -> None:
    made: list[torch.dtype] = []
    policy.lim.projector.register_forward_hook(lambda module, args, out: made.append(out.dtype))
    prefix = policy.encode_prefix([*PROMPTS, None])
    conditions = encode_conditions(policy, prefix, FIRED, replace(CFG, dtype="bf16"))
    assert made == [torch.bfloat16] and [c.dtype for c in conditions] == [torch.float32] * 3


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_gradient_checkpointing_changes_no_bit_in_any_precision(policy: ParaUni, dtype: str) -> None:
    """The trap: computed again after its `with precision`, attention must still take the same kernel."""
    cfg, found = replace(CFG, dtype=dtype, kl_coef=(0.5,)), []
    prefix, rolled = roll(policy, cfg)
    for again in (False, True):
        policy.lim.connector.gradient_checkpointing = policy.dit.gradient_checkpointing = again
        policy.zero_grad(set_to_none=True)
        accumulate_gradient(policy, prefix, rolled, ADVANTAGES, AT_REST, cfg, first=True)
        found.append(gradients(policy))
    assert all(torch.equal(grad, found[1][name]) and grad.any() for name, grad in found[0].items())

    # where the DiT alone is trained, its gradient is the same
    policy.queries.requires_grad_(False)
    policy.lim.requires_grad_(False)
    policy.zero_grad(set_to_none=True)
    accumulate_gradient(policy, prefix, rolled, ADVANTAGES, AT_REST, cfg, first=True)
    assert all(torch.equal(p.grad, found[0][f"dit.{name}"]) for name, p in policy.dit.named_parameters())


def test_a_first_ratio_that_is_off_stops_an_exact_run(capsys: pytest.CaptureFixture) -> None:
    cfg = replace(CFG, clip_range=1e-3, compile=False)
    check_ratio(9e-5, cfg, warn=True)
    for deviation in (2e-4, math.nan):
        with pytest.raises(RuntimeError, match="--clip-range"):
            check_ratio(deviation, cfg, warn=True)
    assert capsys.readouterr() == ("", "")
    for change in ({"dtype": "bf16"}, {"compile": True}):
        check_ratio(2e-4, replace(cfg, **change), warn=True)
        assert "--anchor recompute" in "".join(capsys.readouterr())


def test_noise_is_drawn_for_each_layer_and_picture_by_its_key(policy: ParaUni) -> None:
    noise = torch.stack(Perturbation(0.3, [2, 4], KEYS).noise(slice(None), policy))     # (2, B, N, E)
    assert noise.std().item() == pytest.approx(0.3, rel=0.05) and abs(noise.mean().item()) < 0.02
    # independent of each other: pictures, layers
    assert torch.corrcoef(noise.flatten(0, 1).flatten(1)).fill_diagonal_(0).abs().max() < 0.4
    part = Perturbation(0.6, [4], KEYS[5:6]).noise(slice(None), policy)[0]
    torch.testing.assert_close(part[0], 2 * noise[1, 5])


def test_kept_noise_multiplies_stays_and_moves_the_reference_too(policy: ParaUni) -> None:
    """The KL measures weights, not fields."""
    reference, plain = tiny_model(), roll(policy, CFG)[1]
    fields = []
    for layers, gamma, key in (([2], 0.5, (0, 3)), ([2, 3], 0.4, (0, 9))):
        perturbation = Perturbation(gamma, layers, [key])
        fields.append(perturbation.noise(slice(None), policy))
        keep_noise(policy, reference, perturbation)
    want = torch.ones(TINY.lim.vlm_layers, *fields[0][0].shape[1:])
    want[1] = (1 + fields[0][0][0]) * (1 + fields[1][0][0])
    want[2] = 1 + fields[1][1][0]
    torch.testing.assert_close(policy.lim.kept_noise, want)
    prefix, rolled = roll(policy, CFG, reference=reference)
    assert (rolled.latents[-1] - plain.latents[-1]).abs().max() > 1e-3
    figures = accumulate_gradient(policy, prefix, rolled, ADVANTAGES, AT_REST, CFG, first=True)
    assert figures["ratio_dev"].max() <= 1e-6 and figures["kl"].max() <= 1e-9


def test_a_group_is_decoded_and_scored_under_its_own_prompt(policy: ParaUni) -> None:
    latents, shown = 3 * draw(8, *TINY.latent_shape), []
    reward = lambda images, texts: shown.append((images, texts)) or images[:, 0].mean((1, 2))       # noqa: E731
    scores = score_groups(policy, {"own": reward}, latents, PROMPTS, CFG, ALONE)["own"]
    images, texts = zip(*shown)
    with torch.no_grad():
        pictures = (policy.vae.decode(latents) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(torch.cat(images), pictures)
    assert texts == tuple([prompt] * 4 for prompt in PROMPTS) and scores.shape == (2, 4)
    torch.testing.assert_close(scores.flatten(), pictures[:, 0].mean((1, 2)))


def test_heldout_pictures_have_their_own_noise_and_a_chunk_fails_alone(policy: ParaUni) -> None:
    bright = lambda images, texts: images.mean((1, 2, 3))                               # noqa: E731

    def touchy(images: Tensor, texts: list[str]) -> Tensor:
        if "a circle" in texts:
            raise ConnectionError("the server is gone")
        return bright(images, texts)
    prompts, cfg = [*PROMPTS, "a circle"], replace(CFG, micro_batch=2)
    seeds = [derive_seed(cfg.seed, "heldout", i) for i in range(3)]
    want = bright(policy.generate(prompts, cfg.eval_steps, cfg.eval_guidance_scale, seeds), prompts).tolist()
    scores = score_heldout(policy, {"touchy": touchy, "bright": bright}, prompts, cfg, ALONE)
    assert scores["bright"] == pytest.approx(want, abs=1e-5)
    assert scores["touchy"] == pytest.approx([*want[:2], math.nan], abs=1e-5, nan_ok=True)


@pytest.mark.parametrize("flag, change", [
    ("--group-size", {"group_size": 1}), ("--num-groups", {"num_groups": 3}),
    ("--micro-batch", {"micro_batch": 3}), ("--sde-window", {"sde_window": CFG.num_steps}),
    ("--noise-level", {"noise_level": 0.0}), ("--steps", {"steps": (2, 0)}), ("--kl-coef", {"kl_coef": ()}),
    ("--rewards", {"steps": (1, 2, 3, 4)}), ("--inner-updates", {"steps": (4, 3), "inner_updates": 2}),
    ("--eval-prompts", {"preset": "l-512", "prompts": "p.txt"}), ("--save-every", {"save_every": 0})])
def test_flags_that_do_not_fit_are_refused(flag: str, change: dict) -> None:
    check_flags(CFG, world_size=2)
    with pytest.raises(Refused, match=flag):
        check_flags(replace(CFG, **change), world_size=2)


def test_a_prompt_that_cannot_be_read_is_refused_with_its_number(policy: ParaUni, tmp_path: Path) -> None:
    """It is too long, by the words that stand around it."""
    path, long = tmp_path / "prompts.txt", "a heart and " * 81 + "a star"
    path.write_text(f"a red heart\n\ntwo moons\n{long}\n")
    with pytest.raises(Refused, match=f"{path}, prompt 3: .*tokens"):
        open_prompts(str(path), policy)
    path.write_text("a red heart\n\ntwo moons\n")
    assert open_prompts(str(path), policy) == ["a red heart", "two moons"]
