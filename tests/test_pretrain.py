"""Stage 0: the loop, the lessons, their labels: what is taught is true, and no test prompt is in it."""
import json
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from numpy.random import default_rng
from torch import Tensor, nn

from common import Refused, adamw, cosine_lr
from helpers import NANO_WEIGHTS, assert_equal, save_stage
from model import ParaUni, read_tensors
from nano import check, pretrain, world
from nano.world import Prompt
from rewards import build_reward
from test_world import brute_answer

TOKENIZER = pretrain.vlm_tokenizer()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stage 0 with one step a training, small batches of few scenes, and little to score."""
    pool, draw = pretrain.pool, pretrain.draw_prompts
    prompts, questions = world.benchmark_prompts()[::20], world.question_set(8)
    parts = {part: (train, 1, place) for part, (train, _, place) in pretrain.PARTS.items()}
    monkeypatch.setattr(pretrain, "PARTS", parts)
    monkeypatch.setattr(pretrain, "pool", lambda name, size, *mixed, **test: pool(
        name, min(size, 80), *mixed, **test))
    monkeypatch.setattr(pretrain, "draw_prompts", lambda rng, scenes, count, test=False: draw(
        rng, scenes, min(count, 24), test))
    encode_rows = pretrain.encode_rows
    monkeypatch.setattr(pretrain, "encode_rows", lambda tokenizer, rows: encode_rows(tokenizer, rows[-8:]))
    answer_loss = pretrain.answer_loss

    def last_pictures(model: ParaUni, ids: Tensor, labels: Tensor, images: Tensor) -> Tensor:
        """The pictures of the rows that are left."""
        places = (ids == model.preset.vlm.image_token_id).any(1).sum()
        return answer_loss(model, ids, labels, images[len(images) - places:])
    monkeypatch.setattr(pretrain, "answer_loss", last_pictures)
    monkeypatch.setattr(pretrain, "precision", lambda device, dtype: nullcontext())
    monkeypatch.setattr(pretrain, "sample_ode", lambda dit, noise, c, c_uncond: noise)
    monkeypatch.setattr(world, "benchmark_prompts", lambda: prompts)
    monkeypatch.setattr(world, "question_set", lambda count, seed: questions)
    monkeypatch.setattr(nn.Module, "compile", lambda module: None)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(4, 6, 3), nn.Linear(40, 5)])
        self.word = nn.Embedding(7, 40)

    def forward(self, i: int) -> Tensor:
        """Another loss at each step i, so that momentum matters."""
        drawn = self.layers[0](((i + 1) * torch.arange(256.0).square()).view(1, 4, 8, 8).sin())
        return drawn.square().sum() + 9 * self.layers[1](self.word.weight.roll(i, 1)).pow(2 + i).sum()


def test_the_loop_is_muon_on_the_layers_and_adamw_on_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A convolution is a matrix, a row a channel; embedding and biases are AdamW's, at a lower peak."""
    monkeypatch.setattr(pretrain, "precision", lambda device, dtype: nullcontext())
    net, steps = Net(), iter(range(3))
    flat = {name: p.detach().clone() for name, p in net.named_parameters()}
    flat["layers.0.weight"] = flat["layers.0.weight"].flatten(1)
    flat = {name: nn.Parameter(p) for name, p in flat.items()}
    pretrain.train("test", net, 3, 6e-3, lambda rng: (), lambda: net(next(steps)), 0.01)

    matrices = [flat["layers.0.weight"], flat["layers.1.weight"]]
    others = [flat["word.weight"], flat["layers.0.bias"], flat["layers.1.bias"]]
    muon = torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adam = adamw(others, 1.0, 0.01)
    for i in range(3):
        twin = {name: p.view_as(net.get_parameter(name)) for name, p in flat.items()}
        loss = torch.func.functional_call(net, twin, i)
        for p, grad in zip(flat.values(), torch.autograd.grad(loss, list(flat.values()))):
            p.grad = grad
        nn.utils.clip_grad_norm_(flat.values(), 1.0)
        for optimizer, peak in ((muon, 6e-3), (adam, 1.5e-3)):
            for group in optimizer.param_groups:
                group["lr"] = cosine_lr(i, 3, 50, peak)
            optimizer.step()
    for name, p in net.named_parameters():
        torch.testing.assert_close(p, flat[name].view_as(p), rtol=1e-6, atol=1e-7)


def prompts_in(text: str) -> list[Prompt]:
    """All prompts that a text says or asks about, whatever frame or question is around them."""
    text = re.sub(r"<\S+?>|generate an image:|is there |user\n|assistant\n", ".", text)
    sentences = re.split(r"[.?\n:]", text.replace("is the ", "a ").replace(" the ", " a "))
    sentences = [sentence.strip() for sentence in sentences]
    bare = [sentence.removeprefix(world.wording_of(sentence)) for sentence in sentences]
    return [world.parse_prompt(text) for text, said in zip(sentences, bare) if said in world.every_prompt()]


def test_no_training_sees_a_test_prompt(tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that six trainings draw: thousands of captions, questions and pictures, wrong ones too."""
    names, scenes, pool = [], [], pretrain.pool
    rows, clip = Mock(wraps=pretrain.encode_rows), Mock(wraps=pretrain.clip_encoder())
    render = Mock(wraps=world.render)

    def only_draw(name: str, net: nn.Module, steps: int, lr: float, draw: Callable, *rest: object) -> None:
        names.append(name)
        with monkeypatch.context() as patch:
            patch.setattr(pretrain, "encode_rows", rows)
            patch.setattr(pretrain, "clip_encoder", lambda: clip)
            patch.setattr(world, "render", render)
            for step in range(10):
                draw(pretrain.rng_of(name, step))

    def noted_pool(name: str, *given: object, **named: object) -> list:
        drawn = pool(name, *given, **named)
        scenes.extend([] if "test" in name else drawn)
        return drawn

    monkeypatch.setattr(pretrain, "train", only_draw)
    monkeypatch.setattr(pretrain, "pool", noted_pool)
    pretrain.main(["--out", str(tmp_path)])
    scenes += [scene for call in render.call_args_list for scene in call.args[0]]
    texts = [text for call in clip.call_args_list for text in call.args[0]]
    texts += [f"{given} {answer}" for call in rows.call_args_list for row in call.args[1]
              for given, answer in row if isinstance(answer, str)]
    prompts = [prompt for text in texts for prompt in prompts_in(text)]
    pictured = [prompt for scene in scenes for prompt in world.prompts_of(scene)]
    assert len(names) == 9 and len(prompts) > 3000 and len(pictured) > 10000
    assert not [prompt.text for prompt in prompts if world.is_test(prompt)]
    assert not [prompt for prompt in pictured if world.is_test(prompt) and prompt.task != "single_object"]


def test_rows_are_true() -> None:
    """Answers are those of the scene, also where a sentence stands in its place."""
    draw = default_rng(2)
    for scene in pretrain.pool("dialogue test", 400, 0.4):
        row, shown = pretrain.draw_row(draw, scene, 0.6)
        assert shown == ("<IMG_CONTEXT>" in row[0][0])
        for given, answer in row:
            if question := re.search(r"(how many|what|is) [^?.]*\?", given):
                assert answer.removesuffix("<|im_end|>\n") == brute_answer(question[0], scene)


def test_a_plan_is_read_off_the_words_that_queries_start_as() -> None:
    row = pretrain.plan(world.parse_prompt("a photo of a red heart below a blue star"))
    ids, labels = pretrain.encode_rows(TOKENIZER, [row])
    asked = labels[0] != -100
    words, answers = (" ".join(TOKENIZER.convert_ids_to_tokens(row[0, asked])) for row in (ids, labels))
    assert words == "left color right color above color below color one color two color how many shapes ?"
    assert answers == "no no no no star blue heart red heart red star blue two two two two"
    # right behind <img>, where the queries will be
    assert ids[0, ~asked][-1] == TOKENIZER.convert_tokens_to_ids("<img>") and asked[-16:].all()
    [_, (_, answers)] = pretrain.plan(world.parse_prompt("three blue moons"))
    assert answers == 8 * ["no"] + ["moon", "blue", "no", "no"] + 4 * ["three"]


def test_a_picture_belongs_to_its_own_row() -> None:
    """The loss of rows together is the mean over labels of each alone, also behind rows without a picture."""
    model, images = ParaUni.from_preset("nano"), world.render(pretrain.pool("rows", 2))
    rows = [[("how many stars?", "two")], [(pretrain.IMAGE + "how many shapes?", "three .")],
            [(pretrain.IMAGE, "one")]]

    @torch.no_grad()
    def loss(rows: list, images: Tensor) -> Tensor:
        return pretrain.answer_loss(model, *pretrain.encode_rows(TOKENIZER, rows), images)
    alone = loss(rows[:1], images[:0]) + 2 * loss(rows[1:2], images[:1]) + loss(rows[2:], images[1:])
    torch.testing.assert_close(loss(rows, images), alone / 4, rtol=1e-5, atol=1e-6)
    assert (loss(rows, images.flip(0)) - loss(rows, images)).abs() > 1e-4


def test_patches_are_named() -> None:
    """Shape, colour and middle of a scene whose places are known; the ground elsewhere."""
    things = world.Thing("square", "red", 6.0, 10.0, 5.0), world.Thing("heart", "blue", 25.0, 24.0, 6.0)
    shapes, colors, middles = pretrain.patch_labels([world.Scene(things, 0.5)]).view(3, 8, 8)
    assert middles.nonzero().tolist() == [[2, 1], [6, 6]]
    assert shapes[2, 1] == world.SHAPES.index("square") and colors[6, 6] == world.COLOR_NAMES.index("blue")
    assert shapes[0, 7] == len(world.SHAPES) and colors[0, 7] == len(world.COLORS)


def test_captions_are_true_of_the_scenes_that_they_fit() -> None:
    scenes = pretrain.pool("truth", 100)
    _, _, _, ids, true, said = pretrain.draw_captions(default_rng(4), scenes, 60, wrong=1)
    assert ids.shape == (120, 20) and true[:, :60].diagonal().all() and not true[:, 60:].diagonal().any()
    assert 60 < true.sum() < 2000           # other scenes' captions are true of some, and not of most
    # what a caption says is shown; what a wrong one says is not, or leaves open what is asked of the other
    shown, own, wrong = said.chunk(3)
    open_ = own == -100
    assert torch.equal(shown[~open_], own[~open_]) and open_.float().mean() > 0.2
    assert ((wrong != shown) & (wrong != -100) & (shown != -100)).flatten(1).any(1).all()


def test_people_prefer_what_they_asked_for_and_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the judge and the radii of what is shown: BEST for the right thing at its largest."""
    render = Mock(wraps=world.render)
    monkeypatch.setattr(world, "render", render)
    scenes = pretrain.pool("pairs", 400)
    ids, images, worth = pretrain.draw_pairs(default_rng(6), scenes, 200)
    [shown] = render.call_args.args
    # prompts are drawn first
    _, prompts = pretrain.draw_prompts(default_rng(6), scenes, 200)
    assert torch.equal(ids, pretrain.clip_encoder()([prompt.text for prompt in prompts]))
    right = torch.tensor(world.judge(images, prompts * 2))
    assert right[:200].all() and 60 < right[200:].sum() < 140
    radius = torch.tensor([np.mean([thing.r for thing in scene.things]) for scene in shown])
    torch.testing.assert_close(worth, (26 - 4 * (6.6 - radius) - 4 * ~right).float())


def test_what_stage_0_writes_is_what_the_model_loads(tmp_path: Path, small: None) -> None:
    """All six parts, a few steps each, in their own order; loading is strict; each training.json says how."""
    for parts, missing in (["vae", "vml"], "vml"), (["aes"], "clip"):
        with pytest.raises(Refused, match=missing):
            pretrain.main([*parts, "--out", str(tmp_path)])
    pretrain.main([*reversed(pretrain.PARTS), "--out", str(tmp_path)])
    for part, (_, steps, place) in pretrain.PARTS.items():
        record = json.loads((tmp_path / place / "training.json").read_text())
        assert record["command"] == f"python nano/pretrain.py {part}" and record["steps"] == steps
    model = ParaUni.from_preset("nano", tmp_path)
    picture = model.generate(["a red heart"], num_steps=2, seed=0)
    assert picture.isfinite().all() and isinstance(model.chat(picture[0], "how many hearts?"), str)
    for name in ("clip", "pickscore", "aesthetic"):
        assert build_reward(name, "cpu", weights=tmp_path)(picture, ["a red heart"]).isfinite().all()


def test_stage_files_are_bf16_and_all_weights_small(tmp_path: Path) -> None:
    again = save_stage(ParaUni.from_preset("nano"), tmp_path, 3)
    files = [read_tensors(path)[0] for path in (NANO_WEIGHTS / "stage3.safetensors", again)]
    assert {tensor.dtype for file in files for tensor in file.values()} == {torch.bfloat16}
    assert_equal(*files)
    assert sum(path.stat().st_size for path in NANO_WEIGHTS.rglob("*")) <= 25e6


def test_the_check_counts_wins_and_looks_at_every_task() -> None:
    """The area under the curve by hand; then the command with few pictures, and a seed below 0."""
    assert check.area_under_curve(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 1.0, 2.0])) == 4.5 / 6
    result = check.main(["--pictures", "2", "--seed", "-1"])
    assert list(result["auc"]) == list(world.TASKS) and 0 < result["right"] < 1
    # true pictures with the wanted look, bright or large, are ahead of drawn ones
    assert min(result["headroom"][name]["in s.d."] for name in ("aesthetic", "pickscore")) > 0.5
