"""tools/: what is counted is right, and every measurement runs."""
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import naive
from common import generator, make_trainable
from grpo import GRPOConfig, Perturbation, accumulate_gradient, rollout, trained_steps
from helpers import TINY, tiny_model
from model import ParaUni
from tools import bench, gpu_check, plan
from tools.meter import Meter

PROMPTS = ["a red heart", "two blue stars above a green ring"]         # of different lengths: one is padded
CFG = GRPOConfig(dtype="fp32", num_groups=2, group_size=3, num_steps=3, micro_batch=3, kl_coef=(0.5,),
                 guidance_scale=3.0)


def epoch(model: ParaUni, cfg: GRPOConfig, gamma: float | None) -> Meter:
    """Of rollout and update of an epoch of stage III; with gamma, one in which LDAM has fired."""
    keys = [(group, member) for group in range(2) for member in range(cfg.group_size)]
    perturbation = Perturbation(gamma or 0.0, [2, 3] if gamma else [], keys)
    with Meter() as meter:
        prefix = model.encode_prefix([*PROMPTS, None])
        rolled = rollout(model, model, prefix, keys, perturbation, trained_steps(cfg.num_steps, 0, 0),
                         *cfg.kl_coef, cfg)
        accumulate_gradient(model, prefix, rolled, torch.ones(len(keys)), perturbation, cfg, first=True)
    return meter


def test_ours_does_a_part_of_the_work_and_needs_a_part_of_the_memory() -> None:
    cfg, model = replace(CFG, group_size=4, micro_batch=4), tiny_model()
    make_trainable(cfg, model)
    peer, prompts = naive.peer_of(model), [prompt for prompt in PROMPTS for _ in range(4)]
    ours = epoch(model, cfg, None)
    with Meter() as theirs:
        latents, log_probs = naive.rollout(peer, prompts, [generator(i) for i in range(8)], cfg)
        naive.accumulate_gradient(peer, peer, prompts, latents, log_probs, torch.ones(8), cfg)
    assert 1.2 * ours.flops < theirs.flops and ours.peak < theirs.peak
    make_trainable(replace(cfg, gradient_checkpointing=True), model)
    assert model.lim.connector.gradient_checkpointing and epoch(model, cfg, None).peak < 0.9 * ours.peak


def test_where_ldam_has_fired_an_epoch_takes_little_more_memory_however_many_pictures_it_has() -> None:
    model, more = tiny_model(), []
    for p in make_trainable(CFG, model).values():
        p.grad = torch.zeros_like(p)
    for group_size in (4, 16):
        cfg = replace(CFG, group_size=group_size, micro_batch=4, num_steps=2)
        peaks = [epoch(model, cfg, gamma).peak for gamma in (None, 0.5)]
        assert peaks[0] < peaks[1] < 1.05 * peaks[0]
        more.append(peaks[1] - peaks[0])
    assert more[0] == more[1]


def test_bytes_are_counted_from_the_making_of_a_tensor_to_its_end() -> None:
    before = torch.zeros(1000, 1000)
    with Meter() as meter:
        a = before[0, :500] + before.t()[0, :500]                       # 2000: what was there is not counted
        b = torch.cat([a, a])                                           # 6000
        del a                                                           # 4000
        c = b[:250] * 2                                                 # 5000: a view of b is nothing new
        c.add_(1)                                                       # in place
        torch.zeros(500)                                                # 7000 for a moment
        d = torch.zeros(250)                                            # 6000
    assert meter.peak == 7000 and meter.alive == 6000
    del b, c, d
    assert meter.alive == 0


def test_flops_are_two_for_a_multiplication_and_an_addition() -> None:
    x, q = torch.zeros(5, 7), torch.zeros(2, 3, 16, 8)
    w, kernel = torch.zeros(7, 3, requires_grad=True), torch.zeros(4, 1, 3, 3, requires_grad=True)
    with Meter() as product:
        (x @ w).sum().backward()                                        # no gradient to x
    with Meter() as depthwise:
        F.conv2d(torch.zeros(1, 4, 6, 6), kernel, padding=1, groups=4).sum().backward()
    with Meter() as attention:
        F.scaled_dot_product_attention(q, q, q)
    assert product.flops == 2 * 2 * 5 * 7 * 3
    assert depthwise.flops == 2 * 2 * 4 * 36 * 9
    assert attention.flops == 2 * 2 * 2 * 3 * 16 * 16 * 8


@pytest.mark.parametrize("stage", [2, 3])
def test_what_fake_tensors_say_real_ones_do(stage: int) -> None:
    def costs() -> tuple[list[int], list[int]]:
        model, cfg = plan.build(TINY), plan.recipe(TINY, stage)
        for p in make_trainable(cfg, model).values():
            p.grad = torch.zeros_like(p)
        if stage == 3:
            return plan.measure(plan.reinforced(model, replace(cfg, num_groups=2), 4))
        return plan.measure(plan.supervised(model, cfg, 4))
    with FakeTensorMode():
        fake_flops, fake_peaks = costs()
    flops, peaks = costs()
    assert fake_flops == flops and fake_peaks == pytest.approx(peaks, rel=0.02)


def test_what_fits_is_what_the_sums_say() -> None:
    moments = [[(1e9, 0.0), (8e9, 4e9)], [(5e9, 0.0), (2e9, 1e9)]]      # without and with checkpointing
    p = plan.Plan(2, 10 ** 9, 10 ** 9, 1e12, 512, 2e9, 20e9, moments, 1)
    assert replace(p, rewards_bytes=7e9).memory(1) == 2e9 + 7e9 + 20e9 + 8e9 + 1.5e9
    assert p.memory(3, True) == 2e9 + 20e9 + 5e9 + 1.5e9                # what does not grow is larger
    assert (p.largest(24e9), p.largest(40e9), p.largest(40e9, True)) == (0, 3, 15)
    assert replace(p, group_size=24).largest(60e9) == 8                 # 8 divides a group, the next is 12
    assert [plan.fits(p, limit) for limit in (24, 29, 40)] == ["no", "4 `--gradient-checkpointing`", "3"]


@pytest.mark.parametrize("is_peer", [False, True])
@pytest.mark.parametrize("what", bench.SIDES)
def test_every_side_makes_one_run_after_another(what: str, is_peer: bool, tiny_preset: None) -> None:
    args = bench.parse([f"--what={what}", "--batch=2", "--num-groups=1", "--group-size=2", "--num-steps=2",
                        f"--vs={bench.RIVALS[what]}"])

    def two_turns() -> Iterator[None]:
        yield
        raise gpu_check.Enough
    with pytest.raises(gpu_check.Enough):
        bench.SIDES[what](args, two_turns(), is_peer)


def test_the_check_of_a_gpu_runs_at_toy_size_whatever_becomes_of_a_part(tmp_path: Path) -> None:
    parts = [*gpu_check.TOY_PARTS, "absent"]
    results = gpu_check.main(["--toy", f"--parts={','.join(parts)}", f"--out={tmp_path / 'check'}"])
    assert results.pop("absent")["status"].startswith("failed")
    for result in results.values():
        assert result["status"] == "ok" and all(row["ok"] for row in result["rows"]), result
    assert [len(result["rows"]) for result in results.values()] == [7, 8, 32, 5]
    written = json.loads((tmp_path / "check.json").read_text())["parts"]
    assert list(written) == parts and "NOT FINISHED" in (tmp_path / "check.md").read_text()
