"""Stage 0: the optimizer, the lessons and their labels. Whether the weights are good is told by the scores in
their training.json; here, that what is taught is true."""
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from common import cosine_lr, generator
from model import PRESETS, PROMPT, ParaUni, build_vlm
from nano import pretrain, world
from rewards import build_reward

TOKENIZER = pretrain.build_tokenizer()
FRAME = "(.+)".join(map(re.escape, PROMPT.format(image="", caption="|CAPTION|").split("|CAPTION|")))


@pytest.fixture(scope="module")
def fresh() -> ParaUni:
    """A nano VLM with the initial values of its training; no DiT is needed."""
    model = ParaUni(PRESETS["nano"], build_vlm(PRESETS["nano"].vlm), TOKENIZER)
    pretrain.init_vlm(model.vlm, generator(0, "vlm"))
    return model.eval()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(4, 6, 3), nn.Linear(40, 5)])
        self.word = nn.Embedding(7, 40)

    def forward(self, i: int) -> Tensor:
        """Another loss at each step i, so that momentum matters."""
        drawn = self.layers[0](((i + 1) * torch.arange(256.0).square()).view(1, 4, 8, 8).sin())
        return drawn.square().sum() + 9 * self.layers[1](self.word.weight.roll(i, 1)).pow(2 + i).sum()


def newton_schulz(update: Tensor) -> Tensor:
    """The five steps of Muon (arXiv 2502.16982), written down a second time; in bf16 as there."""
    x = update.bfloat16()
    x = x.T if update.shape[0] > update.shape[1] else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.T if update.shape[0] > update.shape[1] else x).float()


def test_descent_is_muon_on_the_layers_and_adamw_on_the_rest() -> None:
    """Three steps by hand: momentum 0.95 with Nesterov, lr 0.2 sqrt(max(rows, columns)), decoupled decay; the
    embedding and the biases by torch's AdamW."""
    torch.manual_seed(0)
    net, twin, lr, decay = Net(), Net(), 6e-3, 0.01
    twin.load_state_dict(net.state_dict())
    before = [p.detach().clone() for p in net.parameters()]
    descent = pretrain.Descent(net, 10, lr, decay)
    matrices = [twin.layers[0].weight, twin.layers[1].weight]
    rest = [p for p in twin.parameters() if all(p is not m for m in matrices)]
    adam, momentum = pretrain.adamw(rest, 1.0, decay), [torch.zeros_like(m) for m in matrices]
    for i in range(3):
        descent.step(i, net(i))
        twin.zero_grad()
        twin(i).backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        for group in adam.param_groups:
            group["lr"] = cosine_lr(i, 10, 50, 1.5e-3)
        adam.step()
        with torch.no_grad():
            for m, buffer in zip(matrices, momentum):
                buffer.lerp_(m.grad, 0.05)
                update = newton_schulz(m.grad.lerp(buffer, 0.95).flatten(1))
                rate = cosine_lr(i, 10, 50, lr)
                m.mul_(1 - rate * decay)
                m -= rate * 0.2 * math.sqrt(max(update.shape)) * update.view_as(m)
    for (name, p), q, start in zip(net.named_parameters(), twin.parameters(), before):
        assert (p - q).norm() < 0.05 * (q - start).norm(), name           # both iterate in bf16


def test_heads_look_back_by_one_and_two_tokens(fresh: ParaUni) -> None:
    """In the first two layers heads 0 and 1 attend to the token before and to the one before that, whatever
    the tokens are."""
    ids = torch.randint(7, 90, (3, 40), generator=generator(0, "ids"))
    fresh.vlm.set_attn_implementation("eager")
    seen = fresh.vlm.model.language_model(input_ids=ids, output_attentions=True).attentions
    for layer in seen[:2]:
        for head, back in ((0, 1), (1, 2)):
            there = layer[:, head].diagonal(-back, 1, 2)                                # (B, S - back)
            assert there.mean() > 0.7, (head, back, float(there.mean()))
    assert seen[2][:, 0].diagonal(-1, 1, 2).mean() < 0.5


def test_places_start_as_waves() -> None:
    waves = pretrain.sines(8, 128)
    assert waves.shape == (64, 128)
    near, far = (waves[0] - waves[1]).norm(), (waves[0] - waves[7]).norm()
    assert near < far and torch.allclose(waves[0].norm(), waves[63].norm())


def told(sentence: str) -> tuple[set[tuple[str, str]], str | None, list[str]]:
    """(colour, shape) of a sentence's things, the relation of the first to the second, their shapes."""
    relation = next((r for r in world.RELATIONS if f" {r} " in sentence), None)
    looks = re.findall(rf"\b({'|'.join(world.COLORS)}) ({'|'.join(world.SHAPES)})\b", sentence)
    return set(looks), relation, re.findall(rf"\b(?:{'|'.join(world.SHAPES)})\b", sentence)


def test_facts_are_true() -> None:
    """A second reading of what each line says: every answer follows from the line's sentence, and yes comes
    as often as no. Sentences about sides are training prompts, half of them in a prompt's frame."""
    rng, kinds, yes, framed = np.random.default_rng(0), set(), [], []
    for _ in range(600):
        (sentence, nothing), *parts = pretrain.facts(rng)
        looks, relation, shapes = told(sentence)
        if relation:
            framed.append(sentence.startswith("<|im_start|>"))
            said = re.fullmatch(FRAME if framed[-1] else r"(.+)\.", sentence)[1]
            assert not world.is_test(world.parse_prompt(said))
        assert nothing == "" and len(looks) in (0, len(shapes)) and 2 <= len(shapes) <= 6
        for given, said in parts:
            if match := re.fullmatch(r"is the (\w+) ([a-z ]+) the (\w+)\?", given):
                first, asked, second = match.groups()
                true = relation if [first, second] == shapes else world.OPPOSITE[relation]
                assert {first, second} == set(shapes) and said == ("yes" if asked == true else "no")
                kinds.add("side")
                yes.append(said == "yes")
            elif match := re.fullmatch(r"is there an? (\w+) (\w+)\?", given):
                assert said == ("yes" if match.groups() in looks else "no")
                kinds.add("there")
                yes.append(said == "yes")
            elif match := re.fullmatch(r"(left|right|above|below) is", given):
                there = shapes if relation.startswith(match[1]) else shapes[::-1]
                assert said == there[0] and (there == shapes or world.OPPOSITE[relation].startswith(match[1]))
                kinds.add("place")
            elif match := re.fullmatch(r"the (\w+) is", given):
                assert (said, match[1]) in looks
                kinds.add("color")
            elif match := re.fullmatch(r"the (\w+) shape is", given):
                assert (match[1], said) in looks
                kinds.add("shape")
            else:
                assert (given, said) == (".", "")
    assert kinds == {"side", "place", "there", "color", "shape"} and abs(np.mean(yes) - 0.5) < 0.03
    assert 0.4 < np.mean(framed) < 0.6


def test_side_questions_are_true() -> None:
    rng = np.random.default_rng(1)
    said = [pretrain.side_question(rng, "heart", "star", "above") for _ in range(400)]
    true = {"is the heart above the star?", "is the star below the heart?"}
    assert all((answer == "yes") == (question in true) for question, answer in said)
    assert 160 < sum(answer == "yes" for _, answer in said) < 240 and len(set(said)) == 8


def test_labels_are_the_answers_and_their_ends(fresh: ParaUni) -> None:
    pairs = [("how many stars?", "two"), ("what color are the stars?", "red")]
    for shown in (True, False):
        ids, labels, seen = pretrain.encode_dialogue(fresh, pairs, shown)
        assert seen == shown and ids.count(5) == (16 if shown else 0) and len(ids) == len(labels)
        assert all(label in (-100, token) for token, label in zip(ids, labels))
        said = TOKENIZER.decode([t for t in labels if t != -100]).split()
        assert said == ["two", "<|im_end|>", "red", "<|im_end|>"]
    ids, labels, seen = pretrain.encode_facts(fresh, np.random.default_rng(0))
    line = pretrain.facts(np.random.default_rng(0))
    whole = " ".join(f"{given} {said}" for given, said in line)
    assert not seen and ids == TOKENIZER(whole, add_special_tokens=False).input_ids
    assert [TOKENIZER.decode(t) for t in labels if t != -100] == [said for _, said in line if said]


def test_dialogues_are_about_their_scene() -> None:
    """Answers about a picture are those of the scene; a sentence in its place says as much; none twice; no
    held-out prompt is said."""
    rng, said = np.random.default_rng(2), []
    for scene in pretrain.pool("dialogue test", 200, 0.4):
        pairs, shown = pretrain.dialogue(rng, scene, 6, 0.5)
        assert 1 <= len(pairs) <= 7
        first = [t.shape for t in scene.things][:2]
        for question, answer in pairs:
            asked = question.split(". ")[-1]
            if match := re.fullmatch(r"how many (\w+)s\?", asked):
                count = sum(match[1] in ("shape", t.shape) for t in scene.things)
                assert answer == world.NUMBERS[count]
            if match := re.fullmatch(r"is the (\w+) ([a-z ]+) the (\w+)\?", asked):
                true = world.relation_between(*scene.things)
                true = true if match[1] == first[0] else world.OPPOSITE[true]
                assert (answer == "yes") == (match[2] == true)
        assert len({question for question, _ in pairs[1:]}) == len(pairs) - 1
        assert shown or ". " in pairs[0][0] and world.prompts_of(scene)
        said += [answer for question, answer in pairs if question.endswith("describe the picture.")]
        said += [] if shown else [pairs[0][0].partition(". ")[0].removeprefix("generate an image: ")]
    assert len(said) > 80 and not any(world.is_test(world.parse_prompt(text)) for text in said)


def test_a_picture_belongs_to_its_own_dialogue(fresh: ParaUni) -> None:
    """The loss of rows together is that of each alone, by the number of its labels: row i sees image i, also
    behind rows without a picture."""
    images = pretrain.render_all(pretrain.pool("rows", 3))
    pairs = [("how many stars?", "two"), ("how many shapes?", "three")]
    rows = [pretrain.encode_dialogue(fresh, pairs[:n], shown)
            for n, shown in ((1, False), (2, True), (1, True))]
    rows.append(pretrain.encode_facts(fresh, np.random.default_rng(3)))
    with torch.no_grad():
        whole = pretrain.answer_loss(fresh, rows, images)
        alone = [pretrain.answer_loss(fresh, [row], images[i:i + 1]) for i, row in enumerate(rows)]
        swapped = pretrain.answer_loss(fresh, rows, images[[0, 2, 1]])
    counts = torch.tensor([sum(t != -100 for t in labels) for _, labels, _ in rows]).float()
    mean = (torch.stack(alone) * counts).sum() / counts.sum()
    torch.testing.assert_close(whole, mean, rtol=1e-5, atol=1e-6)
    assert (swapped - whole).abs() > 1e-4


def test_what_is_said_of_each_thing() -> None:
    """Every word of a thing's phrase carries the thing, and no other word does."""
    prompts = [world.parse_prompt(text) for text in
               ("a photo of a heart left of a star", "three red moons", "a red ring and an orange square",
                "a star")]
    ids = pretrain.token_table(TOKENIZER, [p.text for p in prompts])                    # (B, S)
    labels = pretrain.phrases(TOKENIZER, prompts, ids)                                  # (B, S, 4)
    shape, color, side = world.SHAPES.index, [None, *world.COLORS].index, [None, *world.RELATIONS].index
    expected = [[None] * 3 + [(shape("heart"), 0, 0, side("left of"))] * 2 + [None] * 2
                + [(shape("star"), 0, 0, side("right of"))] * 2,
                [(shape("moon"), color("red"), 2, 0)] * 3,
                [(shape("ring"), color("red"), 0, 0)] * 3 + [None]
                + [(shape("square"), color("orange"), 0, 0)] * 3,
                [(shape("star"), 0, 0, 0)] * 2]
    for row, right in zip(labels.tolist(), expected):
        right = right + [None] * (len(row) - len(right))
        assert row == [list(part) if part else [-100] * 4 for part in right]


def test_patches_are_named() -> None:
    """Shape, colour and middle of a scene whose places are known; the ground elsewhere."""
    things = world.Thing("square", "red", 6.0, 10.0, 5.0), world.Thing("heart", "blue", 25.0, 24.0, 6.0)
    scene = world.Scene(things, 0.5)
    shapes, colors, middles = (labels[0].view(8, 8) for labels in pretrain.patch_labels([scene]))
    assert middles.nonzero().tolist() == [[2, 1], [6, 6]]
    assert shapes[2, 1] == world.SHAPES.index("square") and colors[6, 6] == list(world.COLORS).index("blue")
    assert shapes[0, 7] == len(world.SHAPES) and colors[0, 7] == len(world.COLORS)
    assert (shapes == len(world.SHAPES)).equal(colors == len(world.COLORS))


def test_a_text_encoder_learns_to_read() -> None:
    """Sixty steps of the lesson tell a share of held-out words that guessing cannot."""
    torch.manual_seed(0)
    scenes = pretrain.pool("reading test", 500)
    text = pretrain.TextEncoder(len(TOKENIZER), 64)
    before = pretrain.teach_reading(text, TOKENIZER, scenes, 0, 64)
    after = pretrain.teach_reading(text, TOKENIZER, scenes, 60, 64)
    assert before < 0.01 and after > 0.15, (before, after)


def test_truth_of_prompts_and_scenes() -> None:
    """The table of which captions are true of which scenes, against the prompts that each scene fulfils."""
    scenes = [s for s in pretrain.pool("truth", 60) if world.prompts_of(s)]
    truth, prompts = pretrain.Truth(scenes), [world.prompts_of(s)[-1] for s in scenes]
    table = truth.of(np.arange(len(scenes)), prompts, [None] * len(prompts))           # (scenes, prompts)
    assert table.diagonal().all()
    wrong = [world.corrupt(np.random.default_rng(0), p) for p in prompts]
    assert not truth.of(np.arange(len(scenes)), wrong, [None] * len(wrong)).diagonal().any()
    moods = [world.mood(s) for s in scenes]
    other = [world.MOODS[(world.MOODS.index(m) + 1) % 3] for m in moods]
    assert truth.of(np.arange(len(scenes)), prompts, moods).diagonal().all()
    assert not truth.of(np.arange(len(scenes)), prompts, other).diagonal().any()


def test_what_stage_0_writes_is_what_the_model_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All six parts, a few steps each on few scenes, every lesson among them; loading is strict, and each
    training.json has the command and the steps."""
    pool, prompts = pretrain.pool, world.benchmark_prompts()[::20]
    monkeypatch.setattr(pretrain, "WEIGHTS", tmp_path)
    monkeypatch.setattr(pretrain, "pool", lambda name, size, mixed=0.0: pool(name, min(size, 300), mixed))
    monkeypatch.setattr(pretrain, "answer_score", lambda model, count=0: 0.5)
    monkeypatch.setattr(pretrain, "right_over_wrong", lambda model: 0.5)
    monkeypatch.setattr(world, "benchmark_prompts", lambda: prompts)
    pairs = pretrain.pairs_of_pictures
    monkeypatch.setattr(pretrain, "pairs_of_pictures", lambda *given: pairs(*given[:3], 16))
    monkeypatch.setattr(torch, "compile", lambda module: module)
    steps = {"vae": 2, "vlm": 6, "dit": 3, "clip": 3, "pick": 2, "aes": 2}
    monkeypatch.setattr(pretrain, "PARTS", {part: (pretrain.PARTS[part][0], n) for part, n in steps.items()})
    monkeypatch.setattr("sys.argv", ["pretrain.py"])
    pretrain.main()
    for part, folder in zip(steps, ("vae", "vlm", "transformer", "clip", "pickscore", "aesthetic")):
        record = json.loads((tmp_path / folder / "training.json").read_text())
        assert record["command"] == f"python nano/pretrain.py {part}" and record["steps"] == steps[part]
    model = ParaUni.from_parts(PRESETS["nano"], tmp_path)
    picture = model.generate(["a red heart"], num_steps=2, seed=0)
    assert picture.isfinite().all() and model.chat(picture[0], "how many hearts?") is not None
    for name in ("clip", "pickscore", "aesthetic"):
        reward = build_reward(name, "cpu", weights=tmp_path)
        assert reward(picture, ["a red heart"]).isfinite().all()

    before = load_file(tmp_path / "vlm" / "model.safetensors")
    monkeypatch.setattr("sys.argv", ["pretrain.py", "--more", "2"])
    pretrain.main()
    record = json.loads((tmp_path / "vlm" / "training.json").read_text())
    after = load_file(tmp_path / "vlm" / "model.safetensors")
    assert record["command"] == "python nano/pretrain.py --more 2" and record["went_on_from"]["steps"] == 6
    moved = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"language_model", "multi_modal_projector"}, "what it learnt to see is left alone"


@pytest.mark.parametrize(("flags", "why"), [
    ("--more 0", "--more of at least 1, got 0"), ("vlm --more 5", "no parts beside --more and --ship"),
    ("--more 5 --ship runs/stage1", "not allowed with"), ("vml", "got 'vml'")])
def test_bad_flags_start_nothing(flags: str, why: str, monkeypatch: pytest.MonkeyPatch,
                                 capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr("sys.argv", ["pretrain.py", *flags.split()])
    monkeypatch.setattr(pretrain, "PARTS", dict.fromkeys(pretrain.PARTS, (pytest.fail, 1)))
    monkeypatch.setattr(pretrain, "train_vlm", pytest.fail)
    with pytest.raises(SystemExit):
        pretrain.main()
    assert why in capsys.readouterr().err


def test_draws_depend_on_the_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same, in the same order, by processes that draw ahead, as on a GPU, as by this one."""
    def draw(rng: np.random.Generator) -> tuple[int]:
        return (int(rng.integers(1 << 40)),)
    here = list(pretrain.drawn("a", 40, draw))
    assert len(set(here)) == 40 and list(pretrain.drawn("a", 3, draw)) == here[:3]
    assert not set(pretrain.drawn("b", 40, draw)) & set(here)
    monkeypatch.setattr(pretrain, "DEVICE", torch.device("cuda"))
    assert list(pretrain.drawn("a", 40, draw)) == here


def test_scenes_and_the_prompts_they_fulfil() -> None:
    scenes = pretrain.pool("said", 60, 0.4)
    for test in (False, True):
        chosen, prompts = pretrain.said_of(np.random.default_rng(0), scenes, 50, test)
        assert len(chosen) == len(prompts) == 50 and len(set(chosen)) > 10
        for j, prompt in zip(chosen, prompts):
            assert world.is_test(prompt) == test
            fits = {(p.include, p.relation) for p in world.prompts_of(scenes[j])}
            assert (prompt.include, prompt.relation) in fits
