"""Stage 0: the loop, the lessons, their labels. Whether the weights are good is told by the scores in their
training.json; here, that what is taught is true, and that no test prompt is in it."""
import json
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.random import default_rng
from torch import Tensor, nn

from common import Refused, adamw, cosine_lr
from model import PRESETS, ParaUni
from nano import check, pretrain, world
from nano.world import Prompt
from rewards import build_reward
from test_world import brute_answer

TOKENIZER = pretrain.vlm_tokenizer()


@pytest.fixture(scope="module")
def fresh() -> ParaUni:
    """A nano VLM with the initial values of its training."""
    nano = PRESETS["nano"]
    model = ParaUni(nano, nano.vlm_class(nano.vlm), TOKENIZER)
    pretrain.init_vlm(model.vlm)
    return model.eval()


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

    def loss(self, i: int) -> Tensor:
        """Another loss at each step i, so that momentum matters."""
        drawn = self.layers[0](((i + 1) * torch.arange(256.0).square()).view(1, 4, 8, 8).sin())
        return drawn.square().sum() + 9 * self.layers[1](self.word.weight.roll(i, 1)).pow(2 + i).sum()


def test_the_loop_is_muon_on_the_layers_and_adamw_on_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps by hand: a convolution is a matrix with a row for an output channel; the embedding and the
    biases are AdamW's, at a lower peak."""
    monkeypatch.setattr(pretrain, "precision", lambda device, dtype: nullcontext())
    torch.manual_seed(0)
    net, twin, steps = Net(), Net(), iter(range(3))
    twin.load_state_dict(net.state_dict())
    pretrain.train("test", net, 3, 6e-3, lambda rng: (), lambda: net.loss(next(steps)), 0.01)

    matrices = [twin.layers[0].weight, twin.layers[1].weight]
    flat = [nn.Parameter(m.detach().flatten(1).clone()) for m in matrices]
    muon = torch.optim.Muon(flat, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adam = adamw([twin.word.weight, twin.layers[0].bias, twin.layers[1].bias], 1.0, 0.01)
    for i in range(3):
        twin.zero_grad()
        twin.loss(i).backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        for m, own in zip(matrices, flat):
            own.grad = m.grad.flatten(1)
        for optimizer, peak in ((muon, 6e-3), (adam, 1.5e-3)):
            for group in optimizer.param_groups:
                group["lr"] = cosine_lr(i, 3, 50, peak)
            optimizer.step()
        for m, own in zip(matrices, flat):
            m.data.copy_(own.detach().view_as(m))
    for p, q in zip(net.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_heads_look_back_by_one_and_two_tokens(fresh: ParaUni) -> None:
    """In the first two layers heads 0 and 1 attend to the token before and to the one before that."""
    fresh.vlm.set_attn_implementation("eager")
    seen = fresh.vlm.get_decoder()(input_ids=torch.arange(7, 90)[None], output_attentions=True).attentions
    for layer in seen[:2]:
        for head, back in ((0, 1), (1, 2)):
            assert layer[:, head].diagonal(-back, 1, 2).mean() > 0.7, (head, back)
    assert seen[2][:, 0].diagonal(-1, 1, 2).mean() < 0.5


def prompts_in(text: str) -> list[Prompt]:
    """All prompts that a text says or asks about, whatever frame or question is around them."""
    text = re.sub(r"<\S+?>|generate an image:|is there |user\n|assistant\n", ".", text)
    sentences = re.split(r"[.?\n:]", text.replace("is the ", "a ").replace(" the ", " a "))
    sentences = [sentence.strip() for sentence in sentences]
    bare = [sentence.removeprefix(world.wording_of(sentence)) for sentence in sentences]
    return [world.parse_prompt(text) for text, said in zip(sentences, bare) if said in world.every_prompt()]


def test_no_training_sees_a_test_prompt(tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that six trainings draw: thousands of captions, questions and pictures, wrong ones too."""
    texts, scenes, names, drawing = [], [], [], []
    pool, render = pretrain.pool, world.render
    encode_rows, encode = pretrain.encode_rows, pretrain.clip_encoder()

    def only_draw(name: str, net: nn.Module, steps: int, lr: float, draw: Callable, *rest: object) -> None:
        names.append(name)
        drawing.append(True)
        for step in range(10):
            draw(pretrain.rng_of(name, step))
        drawing.clear()

    def note(notes: list, what: list) -> list:
        notes.extend(what if drawing else [])
        return what

    def noted_rows(tokenizer: object, rows: list) -> tuple:
        note(texts, ["".join(f"{given} {answer}" for given, answer in row if isinstance(answer, str))
                     for row in rows])
        return encode_rows(tokenizer, rows)

    def noted_pool(name: str, *given: object, **named: object) -> list:
        drawn = pool(name, *given, **named)
        scenes.extend([] if "test" in name else drawn)
        return drawn

    monkeypatch.setattr(pretrain, "train", only_draw)
    monkeypatch.setattr(pretrain, "pool", noted_pool)
    monkeypatch.setattr(pretrain, "encode_rows", noted_rows)
    monkeypatch.setattr(pretrain, "clip_encoder", lambda: lambda said: encode(note(texts, said)))
    monkeypatch.setattr(world, "render", lambda shown: render(note(scenes, shown)))
    pretrain.main(["--out", str(tmp_path)])
    prompts = [prompt for text in texts for prompt in prompts_in(text)]
    pictured = [prompt for scene in scenes for prompt in world.prompts_of(scene)]
    assert len(names) == 9 and len(prompts) > 3000 and len(pictured) > 10000
    assert not [prompt.text for prompt in prompts if world.is_test(prompt)]
    assert not [prompt for prompt in pictured if world.is_test(prompt) and prompt.task != "single_object"]


def test_rows_are_true() -> None:
    """Answers are those of the scene, also where a sentence stands in its place."""
    draw, framed, described = default_rng(2), [], []
    assert world.is_test(world.parse_prompt("a ring"))      # of a single shape only words are held out
    scenes = [scene for scene in pretrain.pool("rings", 1500) if scene.things[0].shape == "ring"]
    for scene in pretrain.pool("dialogue test", 400, 0.4) + scenes:
        row, shown = pretrain.draw_row(draw, scene, 0.6)
        assert shown == ("<IMG_CONTEXT>" in row[0][0]) and (shown or world.prompts_of(scene))
        framed += [] if shown else [row[0][1] == ""]
        for given, answer in row:
            answer = answer.removesuffix("<|im_end|>\n")
            described += [answer] if "describe" in given else []
            if question := re.search(r"(how many|what|is) [^?.]*\?", given):
                assert answer == brute_answer(question[0], scene)
    assert 0.3 < np.mean(framed) < 0.7 and len(framed) > 80
    assert len(described) > 80 and not any(world.is_test(world.parse_prompt(text)) for text in described)


def test_facts_are_true_and_labels_are_their_answers() -> None:
    rows = [pretrain.look_facts(default_rng(seed)) for seed in range(100)]
    ids, labels = pretrain.encode_rows(TOKENIZER, rows)
    for row, row_ids, row_labels in zip(rows, ids, labels):
        (sentence, _), *parts = row
        looks = set(re.findall(r"\b(\w+) (\w+)[,.]", sentence))
        for given, answer in parts[::2]:
            word = given.split()[1]
            assert ((word, answer) if given.endswith("shape is") else (answer, word)) in looks
        answered = row_labels != -100
        # the word before an answer is answered with it
        assert torch.equal(row_labels[answered], row_ids.roll(-1)[answered])
        assert TOKENIZER.decode(row_labels[answered]).split() == [answer for _, answer in parts if answer]


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


def test_a_picture_belongs_to_its_own_row(fresh: ParaUni) -> None:
    """The loss of rows together is the mean over labels of each alone, also behind rows without a picture."""
    images = world.render(pretrain.pool("rows", 2))
    rows = [[("how many stars?", "two")], [(pretrain.IMAGE + "how many shapes?", "three .")],
            [(pretrain.IMAGE, "one")]]
    shown = [images[:0], images[:1], images[1:]]
    with torch.no_grad():
        whole = pretrain.answer_loss(fresh, *pretrain.encode_rows(TOKENIZER, rows), images)
        alone = [pretrain.answer_loss(fresh, *pretrain.encode_rows(TOKENIZER, [row]), image)
                 for row, image in zip(rows, shown)]
        swapped = pretrain.answer_loss(fresh, *pretrain.encode_rows(TOKENIZER, rows), images.flip(0))
    torch.testing.assert_close(whole, (alone[0] + 2 * alone[1] + alone[2]) / 4, rtol=1e-5, atol=1e-6)
    assert (swapped - whole).abs() > 1e-4


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
    told = (wrong != -100) & (shown != -100)
    assert ((wrong != shown) & told).flatten(1).any(1).all()


def test_what_is_said_has_one_order() -> None:
    """The same for both ways to say it, and another for another side."""
    said = [pretrain.said_of(world.parse_prompt(text)) for text in (
        "a red star above a blue heart", "a blue heart below a red star", "a heart above a star",
        "two hearts")]
    heart, star = world.SHAPES.index("heart"), world.SHAPES.index("star")
    blue, red = (world.COLOR_NAMES.index(color) for color in ("blue", "red"))
    below, above = (list(world.RELATIONS).index(side) for side in ("below", "above"))
    assert said[0] == said[1] == [[heart, blue, 0, below], [star, red, 0, above]]
    assert said[2] == [[heart, -100, 0, above], [star, -100, 0, below]]
    assert said[3] == [[heart, -100, 1, -100], [-100] * 4]


def radius(thing: world.Found) -> float:
    """Of a thing in a picture, from its width and height and those of its shape of radius 5.5."""
    whole = world.coverage(thing.shape, *torch.tensor([16.0, 16.0, 5.5]))
    return 5.5 * ((thing.w + thing.h) / (whole.amax(0).sum() + whole.amax(1).sum())).item()


def test_people_prefer_what_they_asked_for_and_large() -> None:
    """What people think of pictures from the pictures alone, by the judge."""
    draw = default_rng(6)
    clip, scenes = pretrain.clip_tokenizer(), pretrain.pool("pairs", 400)
    ids, images, worth = pretrain.draw_pairs(draw, scenes, 200)
    seen = []
    for row, first, second in zip(ids, *images.chunk(2)):
        words = [i for i in row.tolist() if 0 < i < len(world.vocabulary()) + 2]
        prompt = world.parse_prompt(clip.decode(words))
        found = world.detect(torch.stack([first, second]))
        right = [world.fulfils(things, prompt) for things in found]
        large, small = (np.mean([radius(thing) for thing in things]) for things in found)
        assert right[0]
        seen.append(4 * (large - small + (not right[1])))
    # a radius can be seen to about a tenth of a pixel
    assert (worth[:200] - worth[200:] - torch.tensor(seen)).abs().mean() < 0.4
    # the right thing at its largest is worth 26, which is a reward of 1
    assert 12 < worth.min() < 16 and 25 < worth.max() < 26


def test_what_stage_0_writes_is_what_the_model_loads(tmp_path: Path, small: None) -> None:
    """All six parts, a few steps each; loading is strict; each training.json says how."""
    pretrain.main(["--out", str(tmp_path)])
    for part, (_, steps, place) in pretrain.PARTS.items():
        record = json.loads((tmp_path / place / "training.json").read_text())
        assert record["command"] == f"python nano/pretrain.py {part}" and record["steps"] == steps
    model = ParaUni.from_preset("nano", tmp_path)
    picture = model.generate(["a red heart"], num_steps=2, seed=0)
    assert picture.isfinite().all() and isinstance(model.chat(picture[0], "how many hearts?"), str)
    for name in ("clip", "pickscore", "aesthetic"):
        assert build_reward(name, "cpu", weights=tmp_path)(picture, ["a red heart"]).isfinite().all()


def test_an_unknown_part_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain, "PARTS", {"vae": (pytest.fail, 1, "vae")})
    with pytest.raises(Refused, match="vml"):
        pretrain.main(["vae", "vml"])


def test_the_check_counts_wins_and_looks_at_every_task() -> None:
    """The area under the curve by hand; then the command with few pictures."""
    assert check.area_under_curve(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 1.0, 2.0])) == 4.5 / 6
    result = check.main(["--pictures", "2"])
    assert list(result["auc"]) == list(world.TASKS) and 0 < result["right"] < 1
    assert result["headroom"].keys() == {"aesthetic", "pickscore", "clip"}


def test_the_preferred_look_is_that_of_a_quarter() -> None:
    draw, prompt = default_rng(8), world.parse_prompt("a red heart")
    light = [check.preferred(draw, prompt, "aesthetic").light for _ in range(60)]
    large = [world.mean_radius(check.preferred(draw, prompt, "pickscore")) for _ in range(60)]
    assert min(light) > 0.5 and np.mean(light) > 0.8
    # of 5.0 to 6.6 pixels
    assert min(large) > 5.8 and np.mean(large) > 6.3
