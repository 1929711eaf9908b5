"""bench.py: the naive loops give the same numbers, the counters count right, every --what runs."""
import json
import time
from collections import Counter
from dataclasses import replace

import pytest
import torch

import bench
import naive
from bench import BenchConfig, Clock, alternate, communication, count, main, matmul_seconds, stage3_flops
from common import generator
from dit import flow_matching_loss, randn
from grpo import accumulate_gradient, rollout, window
from helpers import tiny_model
from model import PRESETS, ParaUni
from train import TrainConfig

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers

CPU = torch.device("cpu")
SAID = ["a red heart", "two blue stars above a green ring"]            # of different lengths: one is padded
CFG = TrainConfig(stage=3, dtype="fp32", num_groups=2, group_size=3, num_steps=3, micro_batch=3, kl_coef=0.5,
                  guidance_scale=3.0)


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def learner(stage: int, seed: int = 0) -> ParaUni:
    model = tiny_model(seed)
    model.requires_grad_(False)
    for p in model.trainable(stage).values():
        p.requires_grad_(True)
    return model


def gradients(model: ParaUni, stage: int) -> dict[str, torch.Tensor]:
    grads = {name: p.grad.clone() for name, p in model.trainable(stage).items()}
    model.zero_grad(set_to_none=True)
    return grads


def assert_same_gradients(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    largest = max(g.abs().max() for g in theirs.values())
    for name, want in theirs.items():
        assert (ours[name] - want).abs().max() < 1e-5 * largest, name


# ----------------------------------------------------------------------------- the naive loops

def test_naive_stage_1_has_the_same_loss_and_gradient() -> None:
    model, said = learner(1), [*SAID, None, SAID[0]]
    x0, noise = (randn((4, *model.preset.latent_shape), generator(i), "cpu") for i in range(2))
    t = torch.tensor([0.1, 0.4, 0.7, 1.0])
    peer = naive.peer_of(model)
    want = naive.stage1_loss(peer, x0, said, t, noise)
    want.backward()
    c = model.fuse(model.condition_layers(model.encode_prefix([*SAID, None])))
    loss = flow_matching_loss(model.dit, x0, c[[0, 1, 2, 0]], t, noise)
    loss.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    assert_same_gradients(gradients(model, 1), gradients(peer, 1))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_naive_stage_3_has_the_same_pictures_and_gradient(guidance: float) -> None:
    cfg, model, reference = replace(CFG, guidance_scale=guidance), learner(3), tiny_model()
    with torch.no_grad():                       # away from the reference, so that the KL has a gradient
        for p in model.trainable(3).values():
            p += 0.02 * p.std(correction=0) * torch.randn(p.shape, generator=generator("move"))
    keys, trained = [("p", g, m) for g in range(2) for m in range(3)], window(3, 0, 0)
    prefix = model.encode_prefix([*SAID, None])
    rolled = rollout(model, reference, prefix, [generator(*key) for key in keys], None, trained, cfg)
    said = [p for p in SAID for _ in range(3)]
    peer = naive.peer_of(model)
    latents, log_probs = naive.rollout(peer, said, [generator(*key) for key in keys], cfg)
    assert error(rolled.latents, latents) < 1e-5 and error(rolled.log_prob[:2], log_probs) < 1e-5
    advantages = torch.tensor([1.0, -0.5, -0.5, 0.2, 1.1, -1.3])
    accumulate_gradient(model, prefix, rolled, advantages, None, cfg, anchor=False)
    naive.accumulate_gradient(peer, naive.peer_of(reference), said, rolled.latents, rolled.log_prob,
                              advantages, cfg)
    assert_same_gradients(gradients(model, 3), gradients(peer, 3))


def test_ours_does_a_part_of_the_work_and_needs_a_part_of_the_memory() -> None:
    """Counted, not timed: of two prompts with 4 pictures each."""
    model, reference, cfg = learner(3), tiny_model(), replace(CFG, group_size=4, micro_batch=4)
    keys, said = [(g, m) for g in range(2) for m in range(4)], [p for p in SAID for _ in range(4)]
    advantages, peer, peer_reference = torch.ones(8), naive.peer_of(model), naive.peer_of(reference)

    def ours() -> None:
        prefix = model.encode_prefix([*SAID, None])
        rolled = rollout(model, reference, prefix, [generator(*key) for key in keys], None, [0, 1], cfg)
        accumulate_gradient(model, prefix, rolled, advantages, None, cfg, anchor=False)

    def peers() -> None:
        latents, log_probs = naive.rollout(peer, said, [generator(*key) for key in keys], cfg)
        naive.accumulate_gradient(peer, peer_reference, said, latents, log_probs, advantages, cfg)
    few, many = count(ours, CPU), count(peers, CPU)
    assert 1.2 * few.flops < many.flops and few.memory < many.memory


# ----------------------------------------------------------------------------- measuring

def test_sides_take_turns_and_the_first_round_does_not_count() -> None:
    order: list[str] = []

    def side(name: str, seconds: float):
        def run(clock: Clock) -> None:
            order.append(name)
            time.sleep(seconds)
            clock.mark("sleep")
        return run
    got = alternate({"a": side("a", 0.001), "b": side("b", 0.02)}, 3)
    assert "".join(order) == "abbaabba"
    assert [len(got[name]) for name in "ab"] == [3, 3]
    assert all(b["sleep"] >= 0.02 and b["rest"] < b["sleep"] for b in got["b"])
    assert alternate({"b": side("b", 0.02)}, 1, "cpu")["b"][0]["sleep"] < 0.02         # sleeping is no work


def test_flops_of_attention_are_two_products_forward_and_five_back() -> None:
    q, k, v = (torch.randn(2, 3, tokens, 8, requires_grad=True) for tokens in (5, 7, 7))
    product = 2 * 2 * 3 * 5 * 7 * 8

    def attend() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert count(attend, CPU).flops == 2 * product
    assert count(lambda: attend().sum().backward(), CPU).flops == 7 * product


def test_flops_and_products_are_counted_by_hand() -> None:
    x, w, b = torch.randn(6, 4), torch.randn(5, 4, requires_grad=True), torch.randn(5)
    stack = torch.randn(3, 5, 7)

    def run() -> None:
        y = torch.nn.functional.linear(x, w, b)                                         # 2 * 6 * 4 * 5
        (y.expand(3, 6, 5) @ stack).sum().backward()                    # 2 * 3 * 6 * 5 * 7, once more for dy
    cost = count(run, CPU)
    assert cost.flops == 240 + 2 * 1260 + 240                           # and the gradient of w
    assert sum(cost.products.values()) == 4 and isinstance(cost.products, Counter)
    assert sorted(len(a[0]) for a, _ in cost.products.elements()) == [2, 2, 3, 3]
    assert 0 < matmul_seconds(cost.products, CPU, "wall") < 1


@pytest.mark.parametrize("groups", [1, 4])
def test_flops_of_convolutions_know_their_groups(groups: int) -> None:
    conv = torch.nn.Conv2d(4, 8, 3, padding=1, groups=groups)
    up = torch.nn.ConvTranspose2d(8, 4, 4, stride=2, padding=1, groups=groups)
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    first, second = 2 * 9 * 4 * 8 * 50 // groups, 2 * 16 * 8 * 4 * 50 // groups
    assert count(lambda: up(conv(x)).sum().backward(), CPU).flops == 3 * (first + second)


def test_memory_is_the_peak_of_what_is_alive() -> None:
    def run() -> None:
        a = torch.zeros(1000)                                                           # 4000 bytes
        b = a + 1                                                                       # 8000
        del a
        c = b[:500] * 2                                                                 # 6000: a is gone
        d = torch.cat([b, c])                                                           # 12000
        d.add_(1)                                                                       # in place: no more
        del b, c, d
        torch.zeros(2000)                                                               # 8000
    assert count(run, CPU).memory == 12_000


def test_a_ring_sends_what_it_must() -> None:
    assert communication(10 ** 9, 1e15, 1)["seconds"] == 0
    ddp = communication(10 ** 9, 4e14, 8)
    assert ddp["bytes"] == pytest.approx(2 * 7 / 8 * 4e9) and ddp["computing"] == 1.0
    assert ddp["seconds"] == pytest.approx(7e9 / 300e9 + 14 * 20e-6)
    assert ddp["share"] == pytest.approx(ddp["seconds"] / (1 + ddp["seconds"]))
    far = communication(10 ** 9, 4e14, 64)                              # leaves the machine
    assert far["seconds"] == pytest.approx(2 * 63 / 64 * 4e9 / 40e9 + 126 * 20e-6)
    split = communication(10 ** 9, 4e14, 8, passes=5, forwards=3)
    assert split["bytes"] == pytest.approx((5 * (2 * 2 + 4) + 3 * 2) * 7 / 8 * 1e9)


def test_flops_of_stage_3_are_those_of_its_passes() -> None:
    model = tiny_model()
    x, c = torch.randn(6, *model.preset.latent_shape), torch.randn(6, 4, 32)

    def guided() -> None:
        with torch.no_grad():
            model.dit(x.repeat(2, 1, 1, 1), torch.rand(12), c.repeat(2, 1, 1))
    each_token = [name for name, p in model.dit.named_parameters() if p.ndim > 1 and not any(
        part in name for part in ("table", "time_embed", "caption", "attn2.to_k", "attn2.to_v"))]
    weights = sum(model.dit.get_parameter(name).numel() for name in each_token)
    forward = count(guided, CPU).flops
    assert stage3_flops(model.preset, 6, 3, weights) == pytest.approx(forward * (3 + 2 + 2 * 3), rel=0.25)


# ----------------------------------------------------------------------------- the command

FAST = ["--rounds", "1", "--batch", "2", "--num-steps", "2", "--blocks", "1", "--vlm-layers", "3"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "matmul_peak", lambda *_: 1e11)


@pytest.mark.parametrize(("what", "vs"), [
    ("dit", "diffusers"), ("step", ""), ("dit-train", "diffusers"), ("decode", "diffusers"),
    ("sample", "diffusers"), ("sample", ""), ("stage1", "naive"), ("stage2", ""), ("stage3", "naive")])
def test_every_comparison_runs_and_writes_its_figures(what: str, vs: str, tmp_path, capsys) -> None:
    more = ["--vs", vs] if vs else []
    got = main([*FAST, "--what", what, "--group-size", "2", "--num-groups", "1",
                "--out", str(tmp_path / "x.json"), *more])
    ours = got["ours"]
    assert ours["gflop"] > 0 and ours["peak_memory_gb"] > 0
    assert ours["pictures_per_second"] == pytest.approx(2 / ours["seconds"])
    assert sum(ours["phases"].values()) == pytest.approx(ours["seconds"], rel=0.01)
    said = capsys.readouterr().out
    if vs:
        assert got["ratio_low"] <= got["ratio"] <= got["ratio_high"] and f"{vs} / ours:" in said
    written = json.loads((tmp_path / "x.json").read_text())
    assert written["config"]["what"] == what and written["ours"] == ours


def test_growth_is_measured_beside_what_flops_predict(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(bench, "process_points", lambda cfg: [{"size": n, "seconds": 1.0, "expected": 1 / n}
                                                              for n in (1, 2)])
    curves = main([*FAST, "--what", "growth", "--out", str(tmp_path / "growth.png")])
    assert [len(points) for points in curves.values()] == [4, 4, 3, 4, 2]
    tokens = curves["image tokens"]
    assert tokens[3]["gflop"] == pytest.approx(4 * tokens[2]["gflop"], rel=0.05)        # linear attention
    assert tokens[3]["expected"] == pytest.approx(tokens[3]["seconds"])
    assert (tmp_path / "growth.png").stat().st_size > 5000 and (tmp_path / "growth.json").exists()


def test_devices_on_paper(capsys) -> None:
    rows = main(["--what", "network", "--preset", "l-1024"])
    assert list(rows) == [1, 8, 64, 512] and rows[1]["ddp"]["bytes"] == 0
    assert rows[512]["fsdp"]["seconds"] > rows[512]["ddp"]["seconds"] > rows[8]["ddp"]["seconds"] > 0
    assert "1830 M trained" in capsys.readouterr().out


def test_startup_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.subprocess, "run", lambda *args, **_: time.sleep(0.01))
    got = main(["--what", "startup", "--rounds", "3"])
    assert 0.01 <= got["fastest"] <= got["seconds"] <= got["slowest"] < 1


def test_wrong_pairs_are_refused() -> None:
    for what, vs in (("dit", "naive"), ("stage1", "diffusers"), ("startup", "naive")):
        with pytest.raises(ValueError, match="expected --vs"):
            BenchConfig(what=what, vs=vs)
    with pytest.raises(ValueError, match="--rounds"):
        BenchConfig(rounds=0)
    with pytest.raises(ValueError, match="--weights random"):
        main(["--what", "sample", "--blocks", "1", "--weights", "auto"])


def test_the_model_is_cut_to_the_layers_asked_for() -> None:
    model = bench.load(BenchConfig(blocks=2, vlm_layers=3))
    assert len(model.dit.transformer_blocks) == model.dit.config.num_layers == 2
    assert model.preset.latent_shape == PRESETS["nano"].latent_shape
    assert model.condition_layers(model.encode_prefix(["a red heart"])).shape[0] == 3
