"""evaluate.py: the arithmetic of its tables, the nano benchmark and its resume, rewards before and after,
reconstruction, questions, and the way to every command."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import evaluate
import rewards
import scoring
from common import derive_seed, fingerprint, generator
from model import ParaUni, save_trained
from nano import pretrain, world
from sample import SampleConfig

PROMPTS = world.benchmark_prompts()


class Painter(nn.Module):
    """Stands in for ParaUni: paints what is asked for where the seed is even, nothing where it is odd."""

    def __init__(self, stop_at: int = -1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.batches, self.stop_at = [], stop_at

    device = torch.device("cpu")

    def generate(self, prompts: list[str], num_steps: int, guidance_scale: float, seed: list[int]) -> Tensor:
        if len(self.batches) == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        self.batches.append(seed)
        scenes = [world.scene_for(np.random.default_rng(s), world.parse_prompt(text))
                  for text, s in zip(prompts, seed)]
        blank = world.Scene((), 0.5)
        return world.render([blank if s % 2 else scene for s, scene in zip(seed, scenes)])


@pytest.fixture
def painter(monkeypatch: pytest.MonkeyPatch) -> Painter:
    painter = Painter()
    monkeypatch.setattr(evaluate, "load_model", lambda *args: painter)
    return painter


def geneval(out: Path, *flags: str) -> dict:
    return evaluate.main(["geneval", "--out", str(out), "--limit", "8", "--per-prompt", "3",
                          "--batch-size", "7", *flags])


def test_help_does_not_load_torch() -> None:
    code = "import sys, evaluate; sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(evaluate.__file__).parent).returncode == 0


# ----------------------------------------------------------------------------- geneval

def test_scores_and_errors_against_hand_numbers() -> None:
    a, b = (next(i for i, p in enumerate(PROMPTS) if p.task == task) for task in ("counting", "colors"))
    verdicts = {(a, 0): True, (a, 1): True, (a + 1, 0): False, (a + 1, 1): False,       # shares 1 and 0
                (b, 0): False, (b, 1): False, (b + 1, 0): False, (b + 1, 1): True}      # shares 0 and 1/2
    scores = scoring.task_table(verdicts, [prompt.task for prompt in PROMPTS])
    assert list(scores["tasks"]) == ["counting", "colors"]
    # s.e. (difference / sqrt 2) / sqrt 2
    for task, right, error in (("counting", 0.5, 0.5), ("colors", 0.25, 0.25)):
        assert scores["tasks"][task] == {"right": right, "error": pytest.approx(error), "prompts": 2,
                                         "pictures": 4}
    assert scores["overall"] == {"right": 0.375, "error": pytest.approx(0.3125 ** 0.5 / 2), "prompts": 4,
                                 "pictures": 8}
    assert evaluate.geneval_table(scores).splitlines()[1:] == [
        "counting          0.5000   0.5000        2        4",
        "colors            0.2500   0.2500        2        4",
        "mean of tasks     0.3750   0.2795        4        8"]


def test_one_prompt_has_no_error() -> None:
    scores = scoring.task_table({(0, 0): True, (0, 1): False}, [prompt.task for prompt in PROMPTS])
    assert scores["overall"]["error"] is None and " - " in evaluate.geneval_table(scores)


def test_verdicts_are_the_judges_and_a_part_is_not_the_benchmark(tmp_path: Path, painter: Painter,
                                                                 capsys: pytest.CaptureFixture) -> None:
    result = geneval(tmp_path)
    records = [json.loads(line) for line in (tmp_path / "verdicts.jsonl").read_text().splitlines()[1:]]
    assert [(r["prompt"], r["sample"]) for r in records] == [(75 * k, j) for k in range(8) for j in range(3)]
    assert all(r["right"] == (derive_seed(0, "geneval", r["prompt"], r["sample"]) % 2 == 0) for r in records)
    assert {r["right"] for r in records} == {True, False}
    assert [len(batch) for batch in painter.batches[:-1]] == [7, 7, 7, 3]              # and last the examples
    written = json.loads((tmp_path / "geneval.json").read_text())
    assert written["overall"] == result["overall"] and not written["benchmark"]
    assert written["config"]["limit"] == 8 and written["settings"]["num_steps"] == 20
    said = capsys.readouterr().out
    assert "not the benchmark (8 of 600 prompts, 3 of 4 pictures each)" in said and "mean of tasks" in said
    assert (tmp_path / "examples.png").read_bytes().startswith(b"\x89PNG")


def test_all_prompts_and_four_pictures_are_the_benchmark(tmp_path: Path, painter: Painter,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "benchmark_prompts", lambda: PROMPTS[::100])
    result = evaluate.main(["geneval", "--out", str(tmp_path)])
    assert result["benchmark"] and result["name"] == "nano GenEval" and result["overall"]["pictures"] == 24


def test_stopped_evaluation_goes_on(tmp_path: Path, painter: Painter, capsys: pytest.CaptureFixture) -> None:
    whole = geneval(tmp_path / "whole")
    painter.batches, painter.stop_at = [], 1
    assert geneval(tmp_path / "part") == {} and "stopped with 10 pictures to go" in capsys.readouterr().out
    path = tmp_path / "part" / "verdicts.jsonl"
    path.write_text(path.read_text() + '{"prompt": 300, "sam')                       # a line that a crash cut
    painter.batches, painter.stop_at = [], -1
    assert geneval(tmp_path / "part") == whole
    assert [len(batch) for batch in painter.batches[:-1]] == [7, 3]
    assert path.read_bytes() == (tmp_path / "whole" / "verdicts.jsonl").read_bytes()
    painter.batches = []
    # more pictures are no other setting
    geneval(tmp_path / "part", "--per-prompt", "4", "--batch-size", "64")
    assert len(painter.batches[0]) == 8 and len(painter.batches) == 2


def test_other_settings_are_refused_by_name(tmp_path: Path, painter: Painter) -> None:
    geneval(tmp_path)
    before = (tmp_path / "verdicts.jsonl").read_bytes()
    for flags, names in ((["--seed", "1"], "--seed 0 -> 1"),
                         (["--guidance-scale", "3"], "--guidance-scale 4.5 -> 3.0"),
                         (["--num-steps", "9"], "--num-steps 20 -> 9"),
                         (["--dtype", "bf16"], "--dtype fp32 -> bf16")):
        with pytest.raises(ValueError,
                           match=f"other settings .{names}.: give those, or choose another --out"):
            geneval(tmp_path, *flags)
    with torch.no_grad():
        painter.weight += 1e-7
    with pytest.raises(ValueError, match="--weights sha256"):
        geneval(tmp_path)
    assert (tmp_path / "verdicts.jsonl").read_bytes() == before


def test_geneval_draws_with_the_real_model(tmp_path: Path) -> None:
    flags = ["--weights", "random", "--num-steps", "1", "--limit", "2", "--per-prompt", "1"]
    result = evaluate.main(["geneval", "--out", str(tmp_path), *flags])
    assert result["overall"] == {"right": 0.0, "error": None, "prompts": 2, "pictures": 2}


# ----------------------------------------------------------------------------- rewards

def test_paired_difference_against_hand_numbers() -> None:
    row = evaluate.compare([1.0, 2.0, 9.0, 3.0, 4.0], [2.0, 2.0, None, 5.0, 5.0])       # differences 1 0 2 1
    assert row["n"] == 4 and row["change"] == 1 and row["before"][0] == 2.5 and row["after"][0] == 3.5
    assert row["before"][1] == pytest.approx((5 / 3) ** 0.5 / 2)
    assert row["after"][1] == pytest.approx(3 ** 0.5 / 2)
    half = 1.96 * (2 / 3) ** 0.5 / 2
    assert row["interval"] == pytest.approx([1 - half, 1 + half])
    assert evaluate.rewards_table({"clip": row}).splitlines()[1] == (
        "clip               2.5000    0.6455    3.5000    0.8660   +1.0000   +0.1998   +1.8002     4")


def test_rewards_before_and_after(tmp_path: Path) -> None:
    model = ParaUni.from_preset("nano", "random", 0)
    for name in ("a", "b"):                 # a fresh DiT predicts zero and hears no prompt
        with torch.no_grad():
            weight = model.dit.proj_out.weight
            weight.copy_(0.05 * torch.randn(weight.shape, generator=generator(name)))
        save_trained(model, tmp_path / f"{name}.safetensors", 3, SampleConfig(prompt=("x",)))
    (tmp_path / "light.py").write_text(
        "def light(images, prompts):\n    return images.mean((1, 2, 3))\n"
        "def holes(images, prompts):\n"
        "    return images.mean((1, 2, 3)) + images.new_tensor("
        "[float('nan') if 'moon' in p else 0 for p in prompts])\n")
    (tmp_path / "p.txt").write_text("a ring\ntwo moons\na red star\na heart\n")

    def run(after: str) -> dict:
        return evaluate.main(["rewards", "--weights", "random", "--baseline", str(tmp_path / "a.safetensors"),
                              "--num-steps", "1", "--stage-file", str(tmp_path / f"{after}.safetensors"),
                              "--prompts", str(tmp_path / "p.txt"), "--limit", "3", "--rewards",
                              f"{tmp_path}/light.py:light,{tmp_path}/light.py:holes",
                              "--out", str(tmp_path / "out")])
    same, other = run("a"), run("b")
    assert same["rewards"]["light"]["interval"] == [0, 0] and same["before"] == other["before"]
    a, b = (torch.tensor(other[when]["light"]) for when in ("before", "after"))
    assert other["prompts"] == ["a ring", "two moons", "a red star"] and len(a) == 3 and (a != b).all()
    assert other["rewards"]["light"]["change"] == pytest.approx((b - a).mean().item(), abs=1e-6)
    assert other["rewards"]["holes"]["n"] == 2 and other["after"]["holes"][1] is None
    assert json.loads((tmp_path / "out" / "rewards.json").read_text())["after"] == other["after"]


def test_baseline_is_the_folders_stage_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(evaluate, "heldout_scores",
                        lambda cfg, path, prompts: seen.append(path) or {"clip": [1.0] * len(prompts)})
    evaluate.main(["rewards", "--stage-file", "x", "--weights", str(tmp_path), "--out", str(tmp_path)])
    assert seen == [str(tmp_path / "stage2.safetensors"), "x"]


# ----------------------------------------------------------------------------- understand

def test_question_set_is_that_of_the_training_script() -> None:
    images, pairs = world.question_set(20)
    scenes, rng = pretrain.pool("vlm test", 20, 0.4), np.random.default_rng([pretrain.SEED, 2])
    assert torch.equal(images, pretrain.to_float(pretrain.render_all(scenes)))
    assert pairs == [world.questions(rng, scene)[0] for scene in scenes]
    assert world.question_set(5)[1] == pairs[:5] != world.question_set(5, seed=1)[1]


def test_every_question_has_a_kind_and_shares_are_right() -> None:
    _, pairs = world.question_set(300)
    rows = evaluate.answer_scores(pairs, [right for _, right in pairs])
    assert set(rows) == {*evaluate.KINDS.values(), "all"} and {row["right"] for row in rows.values()} == {1.0}
    rows = evaluate.answer_scores([("how many rings?", "one"), ("how many shapes?", "two"),
                                   ("is there a red moon?", "no"), ("is the ring above the star?", "yes")],
                                  ["one", "three", "no", "no"])
    assert rows == {"how many": {"right": 0.5, "error": pytest.approx(0.5), "n": 2},
                    "is there": {"right": 1.0, "error": None, "n": 1},
                    "relation": {"right": 0.0, "error": None, "n": 1},
                    "all": {"right": 0.5, "error": pytest.approx((1 / 3) ** 0.5 / 2), "n": 4}}


def test_understand_repeats_bit_for_bit_and_hashes_the_vlm(tmp_path: Path) -> None:
    def run(*flags: str) -> dict:
        argv = ["understand", "--weights", "random", "--count", "5", "--batch-size", "3",
                "--out", str(tmp_path), *flags]
        return evaluate.main(argv)
    first, again = run(), run()
    assert first == again and first["kinds"]["all"]["n"] == 5
    assert json.loads((tmp_path / "understand.json").read_text())["answers_sha256"] == first["answers_sha256"]
    assert run("--seed", "1")["vlm_sha256"] != first["vlm_sha256"]


def test_right_answers_are_counted(tmp_path: Path, painter: Painter) -> None:
    _, pairs = world.question_set(7)
    answers = iter([right for _, right in pairs[:6]] + ["ring"])
    painter.vlm = nn.Linear(1, 1)
    painter.answer = lambda images, asked, max_new_tokens: [next(answers) for _ in asked]
    result = evaluate.main(["understand", "--count", "7", "--batch-size", "2", "--out", str(tmp_path)])
    assert result["kinds"]["all"]["right"] == pytest.approx(6 / 7) and len(result["first_wrong"]) == 1


def test_fingerprint_sees_one_bit_and_hidden_buffers() -> None:
    module = nn.Linear(3, 2)
    prints = [fingerprint(module)]
    with torch.no_grad():
        module.weight[0, 0] = torch.nextafter(module.weight[0, 0], torch.tensor(9.0))
    prints.append(fingerprint(module))
    module.register_buffer("kept", torch.zeros(1), persistent=False)
    prints.append(fingerprint(module))
    assert len(set(prints)) == 3 and prints[-1] == fingerprint(module)


# ----------------------------------------------------------------------------- reconstruct

def light_clip(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """A CLIP of a few weights in place of the trained one."""
    cfg = {"model_cfg": {"embed_dim": 8, "quick_gelu": False, "vision_cfg": {
        "image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 1}, "text_cfg": {
        "context_length": 8, "vocab_size": 9, "width": 16, "heads": 1, "layers": 1}}}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip = rewards.build_clip(cfg).eval()
    monkeypatch.setattr(rewards, "load_clip", lambda path: (clip, None, {"size": 32}))


def test_reconstruction_compares_the_last_layer_with_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                         capsys: pytest.CaptureFixture) -> None:
    light_clip(monkeypatch, tmp_path)
    seen, originals = [], world.question_set(3)[0]
    model = ParaUni.from_preset("nano", "random", 0)

    def generate(prompts: list[str], num_steps: int, guidance_scale: float, seed: list[int], images: Tensor,
                 layers: list[int] | None) -> Tensor:
        seen.append((prompts, len(seed), layers))
        return (images + (0.1 if layers else 0.05)).clamp(max=2)            # all layers are nearer

    monkeypatch.setattr(model, "generate", generate)
    monkeypatch.setattr(evaluate, "load_model", lambda *args: model)
    result = evaluate.main(["reconstruct", "--count", "3", "--batch-size", "2", "--out", str(tmp_path)])
    assert [(n, layers) for _, n, layers in seen] == [(2, None), (1, None), (2, [8]), (1, [8])]
    assert set(sum((p for p, _, _ in seen), [])) == {"Keep the image as it is."}
    row = result["table"]["psnr"]
    assert row["n"] == 3 and row["before"][0] == pytest.approx(20, abs=1e-4)    # -20 log10 of 0.1, 0.05
    assert row["after"][0] == pytest.approx(26.0206, abs=1e-4)
    assert row["change"] == pytest.approx(6.0206, abs=1e-4)
    assert result["table"]["ssim"]["change"] > 0 and -1 <= result["table"]["clip"]["before"][0] <= 1
    rolled = scoring.ssim(originals.roll(1, 0), originals).mean().item()
    assert result["ends"]["another"]["ssim"][0] == pytest.approx(rolled)
    assert "the same weights, read at the last layer" in capsys.readouterr().out
    assert (tmp_path / "reconstruct.png").read_bytes().startswith(b"\x89PNG")


def test_reconstruction_of_a_folder_with_the_real_model(tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image
    light_clip(monkeypatch, tmp_path)
    (tmp_path / "p").mkdir()
    flags = ["reconstruct", "--weights", "random", "--num-steps", "1", "--images", str(tmp_path / "p"),
             "--out", str(tmp_path / "o")]
    with pytest.raises(FileNotFoundError, match="a folder of at least 2 pictures, found 0"):
        evaluate.main(flags)
    for i in range(3):
        Image.new("RGB", (40, 50 + i), (80 * i, 40, 200)).save(tmp_path / "p" / f"{i}.jpg")
    result = evaluate.main(flags)
    assert result["table"]["psnr"]["n"] == 3
    assert json.loads((tmp_path / "o/reconstruct.json").read_text())["table"]


# ----------------------------------------------------------------------------- understanding benchmarks

class Seer(nn.Module):
    """Stands in for ParaUni: says yes where the middle of the picture is light."""
    device = torch.device("cpu")

    def __init__(self, stop_at: int = -1) -> None:
        super().__init__()
        from types import SimpleNamespace
        self.vlm, self.asked, self.stop_at = nn.Linear(1, 1, bias=False), [], stop_at
        self.preset = SimpleNamespace(vlm=SimpleNamespace(image_size=14))
        nn.init.ones_(self.vlm.weight)

    def answer(self, images: Tensor, questions: list[str], max_new_tokens: int) -> list[str]:
        if len(self.asked) == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        assert images.shape[1:] == (3, 14, 14)
        self.asked.append((len(questions), max_new_tokens))
        return ["Yes" if level > 0.5 else "No" for level in images[:, 0, 7, 7].tolist()]


@pytest.fixture
def pope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Five questions about five pictures: three right ones for a Seer, and the flags that ask them."""
    from PIL import Image
    lines = []
    for i, (level, label) in enumerate(((255, "yes"), (0, "no"), (255, "no"), (0, "yes"), (255, "yes"))):
        Image.new("RGB", (20, 30), (level,) * 3).save(tmp_path / f"{i}.jpg")
        entry = {"question_id": i, "image": f"{i}.jpg", "text": "Is it light?", "label": label}
        lines.append(json.dumps(entry))
    (tmp_path / "pope.jsonl").write_text("\n".join(lines))
    return ["understand", "--benchmark", "pope", "--questions", str(tmp_path / "pope.jsonl"), "--images",
            str(tmp_path), "--batch-size", "2", "--out", str(tmp_path / "o")]


def test_a_benchmark_is_asked_scored_and_gone_on_with(tmp_path: Path, pope: list[str],
                                                      monkeypatch: pytest.MonkeyPatch,
                                                      capsys: pytest.CaptureFixture) -> None:
    seer = Seer(stop_at=1)
    monkeypatch.setattr(evaluate, "load_model", lambda *args: seer)
    assert evaluate.main(pope) == {} and "stopped with 1 questions to go" in capsys.readouterr().out
    seer.stop_at = -1
    with open(tmp_path / "o/answers.jsonl", "a") as file:
        file.write('{"name": "4", "ans')                    # a line that a crash cut
    result = evaluate.main(pope)
    assert seer.asked == [(2, 32), (2, 32), (1, 32)]
    assert {row["name"]: row["value"] for row in result["rows"]}["accuracy"] == 0.6
    assert "pope, 5 questions" in capsys.readouterr().out
    with pytest.raises(ValueError, match="answers.jsonl is of other settings .--max-new-tokens 32 -> 9."):
        evaluate.main([*pope, "--max-new-tokens", "9"])


def test_answers_are_compared_with_those_of_the_untouched_model(pope: list[str],
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    seer, other = Seer(), Seer()
    monkeypatch.setattr(evaluate, "load_model", lambda *args: seer)
    monkeypatch.setattr(evaluate, "untouched_model", lambda cfg: other)
    flags = [*pope, "--reference", "auto"]
    assert evaluate.main(flags)["untouched"] == {"same_answers": 5, "of": 5, "same_weights": True}
    nn.init.zeros_(other.vlm.weight)
    other.answer = lambda images, questions, max_new_tokens: ["No"] * len(questions)
    assert evaluate.main([*flags, "--out", flags[flags.index("--out") + 1] + "2"])["untouched"] == {
        "same_answers": 2, "of": 5, "same_weights": False}


def test_mm_vet_gets_a_submission_file(tmp_path: Path, pope: list[str],
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "load_model", lambda *args: Seer())
    (tmp_path / "mmvet.json").write_text(json.dumps({"v1_0": {"imagename": "0.jpg", "question": "Why?"}}))
    evaluate.main(["understand", "--benchmark", "mmvet", "--questions", str(tmp_path / "mmvet.json"),
                   "--images", str(tmp_path), "--out", str(tmp_path / "v")])
    assert json.loads((tmp_path / "v/mmvet_submission.json").read_text()) == {"v1_0": "Yes"}


def test_pictures_of_questions_may_be_base64(tmp_path: Path) -> None:
    import base64
    import io
    from PIL import Image
    from questions import Question
    pixels, file = np.random.default_rng(0).integers(0, 255, (30, 30, 3), dtype=np.uint8), io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    text = base64.b64encode(file.getvalue()).decode()
    got = evaluate.tile(Question("q", "all", text, "", ()), "", 30)
    assert torch.equal(got, torch.from_numpy(pixels).permute(2, 0, 1) / 255)
    with pytest.raises(ValueError, match="the picture of question q is damaged"):
        evaluate.tile(Question("q", "all", text[:400], "", ()), "", 30)
    with pytest.raises(FileNotFoundError, match="expected a picture .*a.jpg, found none"):
        evaluate.tile(Question("q", "all", "a.jpg", "", ()), str(tmp_path), 30)


def test_the_untouched_model_is_that_of_the_folder(tmp_path: Path) -> None:
    """Its VLM is the one in the weights folder, to the bit, whatever stage file the other model has."""
    from helpers import save_parts
    model = ParaUni.from_preset("nano", "random", 3)
    cfg = evaluate.UnderstandConfig(weights=str(save_parts(model, tmp_path)), reference="auto")
    untouched = evaluate.untouched_model(cfg)
    assert fingerprint(untouched.vlm) == fingerprint(model.vlm) and untouched is not model


# ----------------------------------------------------------------------------- the way to every command

def test_commands_of_other_files_are_reached_with_their_own_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import dataclass
    from types import SimpleNamespace
    from common import knob

    @dataclass(frozen=True)
    class Flags:
        count: int = knob(1, "a number")

    def command(cfg: Flags) -> dict:
        """What it does."""
        return {"count": cfg.count}

    for name, (module, config, function) in evaluate.COMMANDS.items():
        if module != "evaluate":
            monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{config: Flags, function: command}))
            assert evaluate.main([name, "--count", "5"]) == {"count": 5}
    assert {"dpg", "layers", "ablate", "report"} <= evaluate.COMMANDS.keys()


# ----------------------------------------------------------------------------- mistakes

@pytest.mark.parametrize(("argv", "sentence"), [
    ([], "expected the first word to be one of geneval, dpg, rewards, .*, report, got nothing"),
    (["--limit", "3", "geneval"], "got '--limit'"),
    (["understand", "--preset", "l-1024"], "--preset l-1024 needs --benchmark and --questions"),
    (["understand", "--benchmark", "pope"], "expected --questions for every --benchmark but nano"),
    (["understand", "--questions", "x"], "expected --questions for every --benchmark but nano"),
    (["reconstruct", "--preset", "l-1024"], "has no pictures of its own: name a folder with --images"),
    (["geneval", "--limit", "601"], "--limit of at most 600"),
    (["geneval", "--limit", "-1"], "--limit of at least 0"),
    (["geneval", "--per-prompt", "0"], "--per-prompt of at least 1"),
    (["geneval", "--out", __file__], "cannot make the folder --out"),
    (["rewards"], "--stage-file to name the weights after training"),
    (["rewards", "--stage-file", "x", "--rewards", ""], "at least one reward"),
    (["rewards", "--stage-file", "x", "--preset", "l-512"], "name a file with --prompts"),
    (["rewards", "--stage-file", "x", "--weights", "random"], "--baseline"),
    (["understand", "--count", "0"], "--count of at least 1"),
])
def test_mistakes_are_one_sentence(argv: list[str], sentence: str) -> None:
    with pytest.raises((ValueError, OSError), match=sentence) as error:
        evaluate.main(argv)
    assert "\n" not in str(error.value)


def test_the_nano_benchmark_is_for_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="start it with python"):
        evaluate.main(["geneval"])


def test_flags_of_another_command_are_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        evaluate.main(["geneval", "--count", "3"])
    assert "unknown flag --count" in capsys.readouterr().err
