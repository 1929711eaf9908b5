"""The three stages end to end on a tiny model: what moves and what does not, going on, what is refused."""
import json
import math
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import common
import grpo
import naive
import train
from common import Refused, generator, read_log
from data import NanoLatents, stamp_of
from dit import randn
from evaluation import DrawConfig
from grpo import GRPOConfig, nano_prompts, score_heldout
from helpers import ALONE, TINY, TINY_VISION, assert_equal, assert_same_run, log_of, newest, tiny_model
from ldam import LDAM
from model import PRESETS, ParaUni, internvl
from sample import load
from train import TrainConfig, batch_loss

pytestmark = pytest.mark.usefixtures("tiny_preset")
SHORT = ("--steps", "5", "--batch-size", "4", "--micro-batch", "4", "--warmup", "1", "--log-every", "2",
         "--lr", "1e-3")
REINFORCE = ("--steps", "2", "--num-groups", "2", "--group-size", "2", "--num-steps", "3", "--warmup", "0",
             "--micro-batch", "4", "--num-eval", "4", "--eval-steps", "2", "--rewards", "bright,red",
             "--guidance-scale", "4.5", "--kl-coef", "0.3")
# what other programs may read from a line of the log of stage 3
KEYS = {"epoch", "phase", "reward/bright", "reward/red", "heldout/bright", "heldout/red", "kl", "ratio_dev",
        "clip_frac", "zero_std", "grad_norm", "ldam/fired", "ldam/gamma", "ldam/r_s", "ldam/g_s",
        "ldam/n_cool", "time/rollout", "time/reward", "time/update"}


class Bright:
    """A reward to which something happens at its n-th call: at[n]. The calls of a run of four epochs of
    two groups are 1 the trial, 2 held-out, 3 to 6 the first phase, 7 held-out, 8 to 11 the second phase, 12
    held-out."""
    calls = 0

    def __init__(self, at: dict[int, str]) -> None:
        self.at = at

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        self.calls += 1
        scores = images.mean((1, 2, 3))
        happens = self.at.get(self.calls)
        if happens == "SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)
        if happens == "crash":
            # not an Exception: nothing of ours catches it
            raise KeyboardInterrupt
        if happens == "fail":
            raise ConnectionError("the server is gone")
        return scores * {"nan": math.nan, "zero": 0}.get(happens, 1)


def command(weights: Path, stage: int, run_dir: Path, *flags: str,
            at: dict[int, str] | None = None) -> dict[str, float]:
    """What the command line does; pictures, which take longer than a run, are drawn in one test only."""
    red = lambda images, prompts: images[:, 0].mean((1, 2))                             # noqa: E731
    scorers = {"bright": Bright(at or {}), "red": red, "clip": red}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "build_reward", lambda name, device, weights: scorers[name])
        if "--eval-every" not in flags:
            patch.setattr(grpo, "draw_examples", lambda *args: torch.zeros(1, 3, 4, 4))
        return train.main(["--stage", str(stage), "--weights", str(weights), "--run-dir", str(run_dir),
                           *(REINFORCE if stage == 3 else SHORT), *flags])


@pytest.fixture
def run(tiny_weights: Path, tmp_path: Path) -> Callable:
    """run(stage, folder, *flags) trains in tmp_path/folder, which it returns."""
    def run(stage: int, folder: str, *flags: str, at: dict[int, str] | None = None) -> Path:
        command(tiny_weights, stage, tmp_path / folder, *flags, at=at)
        return tmp_path / folder
    return run


@pytest.fixture(scope="module")
def whole(tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of stage 3 that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    command(tiny_weights, 3, folder)
    return folder


# ----------------------------------------------------------------------------- stages 1 and 2

# as published, and more often near the noise
TIMES = {"uniform": lambda rng: torch.randint(1, 1001, (1,), generator=rng) / 1000,
         "noisy": lambda rng: torch.sigmoid(1 + torch.randn(1, generator=rng))}


@pytest.mark.parametrize("times", TIMES)
def test_stage_1_is_that_of_the_naive_loop(times: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' DiT and transformers' SigLIP, a condition for each picture; see naive.py."""
    cfg, items = TrainConfig(dtype="fp32", caption_dropout=0.5, times=times), list(range(6))
    model = tiny_model()
    # so few that captions are cut
    model.preset = replace(TINY, train_tokens=12)
    read, encode = [], model.encode_prefix
    monkeypatch.setattr(model, "encode_prefix",
                        lambda prompts, **more: read.append(prompts) or encode(prompts, **more))
    data, peer = NanoLatents(model.vae, cfg.seed), naive.peer_of(model)
    loss = batch_loss(cfg, model, data, 5, items)
    loss.backward()

    # the draws of each item, in their order: dropout, time, noise
    batch, (prompts, t, noise) = data.batch(5, items), ([], [], [])
    for item, caption in zip(items, batch.captions):
        rng = generator(cfg.seed, "item", 5, item)
        prompts.append(None if torch.rand((), generator=rng) < 0.5 else caption)
        t.append(TIMES[times](rng))
        noise.append(randn((1, *batch.latents.shape[1:]), rng, "cpu"))
    want = naive.stage1_loss(peer, batch.latents, prompts, torch.cat(t), torch.cat(noise))
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    scale = max(p.grad.abs().max().item() for p in peer.trainable(1).values())
    for name, p in model.trainable(1).items():
        torch.testing.assert_close(p.grad, peer.trainable(1)[name].grad, rtol=0, atol=1e-5 * scale, msg=name)
    # read once each
    assert len(read) == 1 and len(read[0]) == len(set(prompts)) < 6 and None in prompts


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_stage_trains_its_parts_only(stage: int, run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """And these as the flags say: schedule, clipping, AdamW and the average are written out here."""
    models, real = [], ParaUni.from_preset
    monkeypatch.setattr(ParaUni, "from_preset", lambda *a, **kw: models.append(real(*a, **kw)) or models[0])
    gradients, clip = [], common.clip_gradients
    for module in (train, grpo):
        monkeypatch.setattr(module, "clip_gradients", lambda params, norm: (
            gradients.append([p.grad.clone() for p in params]) or clip(params, norm)))
    folder = run(stage, "run", "--lr", "1e-3", "--weight-decay", "0.5", "--clip-norm", "1e-3",
                 "--ema-decay", "0.3")
    before, after = tiny_model().state_dict(), models[0].state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    trains = ("queries", "lim.") if stage == 1 else ("queries", "lim.", "dit.")
    for part in ("queries", "lim.", "dit.", "vlm.", "vae."):
        names = {name for name in before if name.startswith(part)}
        assert len(names & changed) > 0.8 * len(names) if part in trains else not names & changed, part
    # what is written is the average, which is left in the model
    tensors, state = load_file(folder / f"stage{stage}.safetensors"), newest(folder)
    assert tensors.keys() == {name for name in before if name.startswith(trains)}
    assert_equal(tensors, state["ema"])

    average = {name: before[name] for name in state["trained"]}
    twins = {name: nn.Parameter(p.clone()) for name, p in average.items()}
    # half a cosine, behind a step of warm-up in stages 1 and 2; in stage 3 one for each reward
    rates = [1, 0.5] * 2 if stage == 3 else [0.5, 1, 0.853553, 0.5, 0.146447]
    for step, (rate, grads) in enumerate(zip(rates, gradients, strict=True)):
        if step == 0 or (stage, step) == (3, 2):
            groups = [{"params": [p for p in twins.values() if (p.ndim > 1) == is_matrix],
                       "weight_decay": 0.5 * is_matrix} for is_matrix in (True, False)]
            adam = torch.optim.AdamW(groups, betas=(0.9, 0.95))
        for p, grad in zip(twins.values(), grads):
            p.grad = grad
        nn.utils.clip_grad_norm_(twins.values(), 1e-3)
        for group in adam.param_groups:
            group["lr"] = 1e-3 * rate
        adam.step()
        decay = 0.3 if stage == 3 else min(0.3, (step + 1) / (step + 10))
        average = {name: p.detach().lerp(average[name], decay) for name, p in twins.items()}
    torch.testing.assert_close(state["trained"], twins, rtol=0, atol=1e-6)
    torch.testing.assert_close(state["ema"], average, rtol=0, atol=1e-6)


# ----------------------------------------------------------------------------- stage 3

def test_the_log_and_the_files_of_stage_3(tiny_weights: Path, tmp_path: Path) -> None:
    final = command(tiny_weights, 3, tmp_path, "--eval-every", "1")
    first, *lines = read_log(tmp_path / "metrics.jsonl")
    assert first.keys() == {"epoch", "phase", "heldout/bright", "heldout/red"} and first["epoch"] == 0
    assert [(line["epoch"], line["phase"]) for line in lines] == [(1, "bright"), (2, "bright"),
                                                                  (3, "red"), (4, "red")]
    for line in lines:
        assert line.keys() >= KEYS
        assert line["ratio_dev"] <= 1e-6 and line["grad_norm"] > 0 and line["zero_std"] == 0
    # each phase has its own schedule
    assert lines[0]["lr"] == lines[2]["lr"] > lines[1]["lr"] == lines[3]["lr"]
    assert final == {name: lines[3][f"heldout/{name}"] for name in ("bright", "red")}
    modes = {path.name: path.stat().st_mode for path in tmp_path.iterdir()}
    assert modes.keys() >= {"stage3.json", "config.json", "rewards.png", "before_after.png"}
    assert modes["stage3.safetensors"] == modes["stage3.json"]
    made = json.loads((tmp_path / "stage3.json").read_text())
    assert made["seed"] == 0 and made["epoch"] == 4 and made["torch"] == torch.__version__


def test_the_saved_file_makes_the_pictures_that_were_scored(run: Callable, tiny_weights: Path) -> None:
    folder = run(3, "run", "--ema-decay", "0.3", "--lr", "1e-3")
    first, *_, last = (line.get("heldout/bright") for line in log_of(folder))
    model = ParaUni.from_preset("nano", tiny_weights, folder / "stage3.safetensors", stage=3)
    cfg = GRPOConfig(dtype="fp32", micro_batch=4, eval_steps=2, eval_guidance_scale=1.0)
    scores = score_heldout(model, {"bright": Bright({})}, nano_prompts(test=True)[:4], cfg, ALONE)["bright"]
    assert sum(scores) / 4 == pytest.approx(last, abs=1e-6)
    assert abs(last - first) > 1e-5


@pytest.mark.parametrize("call, every, saved", [(3, "1", []), (7, "9", [2]), (10, "1", [2, 3])])
def test_a_stage_3_that_crashed_goes_on_from_what_it_saved(
        call: int, every: str, saved: list[int], run: Callable, whole: Path, tmp_path: Path) -> None:
    """What was trained is saved before anything is looked at: call 7 is the look after the first phase."""
    with pytest.raises(KeyboardInterrupt):
        run(3, "parts", "--save-every", every, at={call: "crash"})
    assert [int(path.stem) for path in sorted((tmp_path / "parts").glob("checkpoints/*.pt"))] == saved
    for _ in range(2):
        # the second time nothing is left to do
        assert_same_run(whole, run(3, "parts", "--save-every", every, "--resume", "auto"), 3)


def test_the_kl_refers_to_stage_2_or_to_the_beginning_of_the_phase(run: Callable, whole: Path) -> None:
    """It is 0 where a phase begins with the reference, and nowhere else."""
    zeros = [[record["kl"] == 0 for record in log_of(folder)[1:]]
             for folder in (whole, run(3, "stage2", "--kl-reference", "stage2"))]
    assert zeros == [[True, False, True, False], [True, False, False, False]]


@pytest.mark.parametrize("mode", ["epoch", "keep"])
def test_with_ldam_firing_the_first_ratio_is_1_and_runs_go_on(mode: str, run: Callable) -> None:
    # fires at the first decline of the reward, and acts in the epoch after it
    flags = ("--steps", "8", "--ldam-mode", mode, "--ldam-spike", "1e-9", "--ldam-patience", "1",
             "--ldam-gamma0", "1e6", "--ldam-gamma-max", "0.5")
    folder = run(3, "stage3", *flags, "--save-every", "1", "--keep", "99")
    lines = log_of(folder)[1:]
    fired = [line["epoch"] for line in lines if line["ldam/fired"]]
    assert {line["phase"] for line in lines if line["ldam/fired"]} == {"bright", "red"} and fired[0] < 8
    # it looks at what is logged, of the phase's own reward, and begins anew with it
    for phase in ("bright", "red"):
        ldam = LDAM(1e6, spike=1e-9, patience=1, gamma_max=0.5)
        for line in [line for line in lines if line["phase"] == phase]:
            ldam.update(line["grad_norm"], line[f"reward/{phase}"])
            assert ldam.last == {name: line[f"ldam/{name}"] for name in ldam.last}
    assert all(line["ratio_dev"] <= 1e-6 for line in lines)
    assert ("lim.kept_noise" in load_file(folder / "stage3.safetensors")) == (mode == "keep")

    # without it, the epoch after the first firing is the first to differ
    plain = log_of(run(3, "plain", *flags, "--no-ldam"))[1:]
    same = [a["reward/red"] == b["reward/red"] for a, b in zip(lines, plain)]
    assert same[:fired[0] + 1] == [True] * fired[0] + [False]

    # from right after it fired, through the next phase
    again = run(3, "again", *flags, "--resume", str(folder / "checkpoints" / f"{fired[0]:08}.pt"))
    assert log_of(again) == lines[fired[0] - 1:]
    assert_equal(newest(folder), newest(again))

    # the last checkpoint makes the stage's file, as the reference has it
    code = (common.ROOT / "docs" / "reference.md").read_text().split("```python\n")[1].split("```")[0]
    exec(code.replace("00000250", "00000016").replace("runs/", f"{folder.parent}/"), {})
    assert_equal(*(load_file(folder.parent / name / "stage3.safetensors") for name in ("stage3", "early")))


def test_what_fires_in_the_last_epoch_of_a_phase_is_not_used(run: Callable, whole: Path) -> None:
    fired = run(3, "fired", "--ldam-spike", "1e-9", "--no-ldam-use-reward")
    assert [line["ldam/fired"] for line in log_of(fired)[1:]] == [0, 1, 0, 1]
    assert_equal(load_file(fired / "stage3.safetensors"), load_file(whole / "stage3.safetensors"))


def test_a_first_ratio_that_is_off_stops_the_run(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpo, "summarise", lambda figures, dist: {"ratio_dev": 1.0})
    with pytest.raises(RuntimeError, match="first ratio"):
        run(3, "run")


@pytest.mark.parametrize("layers, changed", [("present", [4]), ("all", [2, 3, 4])])
def test_which_layers_a_later_reward_perturbs(layers: str, changed: list[int], run: Callable) -> None:
    """Of 4 layers CLIP has the last. It fires after each phase's second epoch, in vain if that ends it."""
    folder = run(3, "run", "--steps", "3,3,2", "--rewards", "bright,clip,red", "--ldam-mode", "keep",
                 "--keep", "3", "--ldam-layers", layers, "--ldam-spike", "1e-9", "--no-ldam-use-reward")
    before, after, end = (torch.load(path)["kept_noise"] for path in sorted(folder.glob("checkpoints/*")))
    assert [i for i in range(1, 5) if not torch.equal(before[i - 1], after[i - 1])] == changed
    assert torch.equal(after, end)


def test_an_epoch_without_a_usable_reward_changes_nothing_and_is_counted(run: Callable) -> None:
    # at 8 and 9 it is only watched
    at = dict.fromkeys([3, 4], "zero") | dict.fromkeys([5, 6, 8, 9], "nan")
    folder = run(3, "run", "--save-every", "1", "--keep", "9", at=at)
    lines = log_of(folder)[1:]
    # equal rewards have no spread and teach nothing but the KL, which is no reason to skip
    assert [line["zero_std"] for line in lines] == [1, None, 0, 0] and lines[0]["grad_norm"] < 1e-4
    assert [line["skipped"] for line in lines] == [0, 1, 0, 0]
    assert [line["reward_nan"] for line in lines] == [0, 2, 0, 0]
    assert [line["reward/bright"] is None for line in lines] == [False, True, True, False]
    assert lines[1]["ldam/fired"] == 0
    before, after, later, _ = (torch.load(path) for path in sorted(folder.glob("checkpoints/*")))
    for kind in ("trained", "ema"):
        assert_equal(before[kind], after[kind])
    assert not torch.equal(after["trained"]["queries"], later["trained"]["queries"])


def test_too_many_skipped_epochs_stop_the_run_and_it_can_go_on(run: Callable, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="1 updates in a row were skipped up to epoch 2"):
        run(3, "run", "--max-skipped", "1", at={5: "nan", 6: "nan"})
    assert newest(tmp_path / "run")["epoch"] == 2
    assert len(log_of(run(3, "run", "--max-skipped", "2", "--resume", "auto"))) == 5


def test_a_reward_that_raises_costs_its_group_or_its_figure(run: Callable, whole: Path) -> None:
    # epoch 1: the first group alone
    line = log_of(run(3, "run", at={3: "fail"}))[1]
    assert line["reward_nan"] == 1 and line["skipped"] == 0 and line["grad_norm"] > 0
    # every look but the first
    folder = run(3, "looks", at={7: "fail", 12: "fail"})
    looks = [line["heldout/bright"] for line in log_of(folder) if "heldout/bright" in line]
    assert looks == [log_of(whole)[0]["heldout/bright"], None, None]
    # nothing trained is lost
    assert_equal(*(load_file(run_dir / "stage3.safetensors") for run_dir in (whole, folder)))


def test_the_other_ways_of_an_update(run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = ["a red heart", "a blue ring", "two moons", "a bar", "a red star", "a pink tee"]
    (tmp_path / "train.txt").write_text("\n".join(prompts))
    (tmp_path / "eval.txt").write_text("two green stars\na moon\n")
    flags = ("--steps", "4,2", "--inner-updates", "2", "--anchor", "recompute", "--sde-window", "1",
             "--num-steps", "4", "--no-ldam", "--dtype", "bf16", "--kl-coef", "0.01,0",
             "--prompts", f"{tmp_path}/train.txt", "--eval-prompts", f"{tmp_path}/eval.txt")
    rolled, scored, rollout, score_groups = [], [], grpo.rollout, grpo.score_groups
    with monkeypatch.context() as patch:
        patch.setattr(grpo, "rollout", lambda *args: rolled.append(args) or rollout(*args))
        patch.setattr(grpo, "score_groups", lambda *args: scored.append(args[3]) or score_groups(*args))
        folder = run(3, "run", *flags)
    # each epoch has prompts, noise and stochastic steps of its own, and pictures are scored by what was read
    assert sorted(sum(scored, [])) == sorted(prompts)
    for epoch, (texts, (model, _, prefix, keys, _, trained, *_)) in enumerate(zip(scored, rolled)):
        assert torch.equal(prefix.keys_values[0][0], model.encode_prefix([*texts, None]).keys_values[0][0])
        assert keys == [(0, epoch, group, member) for group in range(2) for member in range(2)]
        assert trained == [epoch % 2]
    lines = log_of(folder)[1:]
    # a number of steps a phase, 2 of them an epoch; none at rate 0
    assert [line["phase"] for line in lines] == ["bright", "bright", "red"]
    assert lines[0]["lr"] > lines[1]["lr"] > 0
    assert all(line["ratio_dev"] == 0 and math.isfinite(line["grad_norm"]) for line in lines)
    # the second update is off the rollout's policy
    assert lines[0]["clip_frac"] > 0
    # a rein of its own, here none
    assert lines[1]["kl"] > 0 == lines[2]["kl"]
    run(3, "parts", *flags, at={3: "SIGTERM"})
    (tmp_path / "eval.txt").write_text("two green stars\na ring\n")
    with pytest.raises(Refused, match="prompt files"):
        run(3, "parts", *flags, "--resume", "auto")
    (tmp_path / "eval.txt").write_text("two green stars\na moon\n")
    assert_same_run(folder, run(3, "parts", *flags, "--resume", "auto"), 3)


def test_reinforcement_raises_the_reward(run: Callable) -> None:
    """Bright pictures win."""
    lines = log_of(run(
        3, "run", "--steps", "6", "--rewards", "bright", "--num-groups", "4", "--group-size", "4",
        "--micro-batch", "16", "--lr", "3e-3", "--clip-range", "1e-2", "--kl-coef", "0", "--no-ldam",
        "--guidance-scale", "1", "--eval-guidance-scale", "1", "--num-eval", "16", "--ema-decay", "0"))
    assert lines[-1]["heldout/bright"] > lines[0]["heldout/bright"] + 0.01


# ----------------------------------------------------------------------------- refusals

def test_a_run_is_not_mixed_with_another(run: Callable, tmp_path: Path) -> None:
    run(1, "run", "--steps", "1")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    other = run(1, "other", "--steps", "1")
    for stage, flags, words in ((1, ("--steps", "1"), "--resume auto"),
                                (1, ("--steps", "1", "--resume", str(other)), "already holds a run"),
                                (1, ("--steps", "9", "--resume", "auto"), "--steps 1 -> 9"),
                                (2, ("--steps", "1", "--resume", "auto"), "--stage 1 -> 2"),
                                (3, ("--steps", "1", "--resume", "auto"), "--stage 1 -> 3")):
        with pytest.raises(Refused, match=words):
            run(stage, "run", *flags)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_stages_are_chained_strictly(run: Callable, tiny_weights: Path) -> None:
    # stage 1 would train for the DiT of another stage 2, which its own file leaves out
    for stage, wanted, given in ((1, 1, 2), (2, 1, 2), (3, 2, 1)):
        with pytest.raises(Refused, match=f"stage {wanted}, it is of stage {given}"):
            run(stage, "run", "--init", str(tiny_weights / f"stage{given}.safetensors"))
    with pytest.raises(Refused, match="--layers"):
        run(2, "run", "--no-norm")
    with pytest.raises(Refused, match="two called red"):
        run(3, "run", "--rewards", "red,bright,red")
    with pytest.raises(SystemExit, match="2"):
        run(3, "run", "--preset", "micro")


# after the second epoch LDAM fires on those of layers 2 and 3 that are fused, if any is
@pytest.mark.parametrize("layers, noisy", [([2, 4], [False, True, False, False]), ([1, 4], None)])
def test_stage_1_decides_what_is_fused(layers: list, noisy: list, run: Callable, tiny_weights: Path) -> None:
    one = run(1, "1", "--steps", "1", "--layers", ",".join(map(str, layers)), "--no-norm")
    two = run(2, "2", "--steps", "1", "--init", f"{one}/stage1.safetensors")
    three = run(3, "3", "--init", f"{two}/stage2.safetensors", "--steps", "3", "--ldam-mode", "keep",
                "--rewards", "bright", "--ldam-spike", "1e-9", "--no-ldam-use-reward")
    lim = ParaUni.from_preset("nano", tiny_weights, three / "stage3.safetensors").lim
    assert lim.layers == layers and not list(lim.agglayer_norm.parameters())
    assert lim.kept_noise is noisy or [bool((field != 1).any()) for field in lim.kept_noise] == noisy


def test_a_new_preset_is_one_entry(run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All stages, without the nano world: latents with captions, prompts of a file, a tokenizer of bytes."""
    vlm = internvl(width=32, layers=4, heads=2, kv_heads=1, mlp_width=64, vision=TINY_VISION)
    monkeypatch.setitem(PRESETS, "mine", replace(TINY, name="mine", vlm=vlm, shapes_world=False, recipes={}))
    vae = ParaUni.from_preset("mine", "random").vae
    exact = load(DrawConfig(preset="mine", weights="random", dtype="fp32"), torch.device("cpu"))
    assert exact.queries.dtype == torch.float32
    save_file({"latents": torch.randn(2, *TINY.latent_shape).bfloat16(), "offsets": torch.tensor([0, 5, 13]),
               "captions": torch.tensor(list(b"a cattwo dogs"), dtype=torch.uint8)},
              tmp_path / "shard.safetensors")
    (tmp_path / "index.json").write_text(json.dumps(
        {"stamp": stamp_of(vae, PRESETS["mine"]), "shards": {"shard.safetensors": 2}}))
    (tmp_path / "prompts.txt").write_text("a cat, please\n")
    mine = ("--preset", "mine", "--weights", "random", "--steps", "1")
    data = ("--data", f"{tmp_path}")
    prompts = ("--prompts", f"{tmp_path}/prompts.txt", "--eval-prompts", f"{tmp_path}/prompts.txt")
    init = "auto"
    for stage, flags in enumerate((data, data, prompts), start=1):
        folder = run(stage, str(stage), *mine, *flags, "--init", init)
        init = f"{folder}/stage{stage}.safetensors"
    assert Path(init).exists()
