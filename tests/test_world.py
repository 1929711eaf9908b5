"""The nano world: its judge against scenes that are right and wrong on purpose,
its split, its words, its questions."""
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from model import PROMPT, UNCONDITIONAL
from nano import world
from nano.world import COLORS, NUMBERS, RELATIONS, SHAPES, SIZE, TASKS, Found, Prompt, Scene, Thing


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def one(shape: str, color: str, x: float = 16.0, y: float = 16.0, r: float = 6.0) -> Thing:
    return Thing(shape, color, x, y, r)


def shown(things: list[Thing], light: float = 0.8) -> Tensor:
    return world.render([Scene(tuple(things), light)])


def verdict(things: list[Thing], text: str) -> bool:
    return world.judge(shown(things), [world.parse_prompt(text)])[0]


@pytest.fixture(scope="module")
def benchmark() -> list[Prompt]:
    return world.benchmark_prompts()


# ----------------------------------------------------------------------------- the judge, on pictures

@pytest.fixture(scope="module")
def right_and_wrong(benchmark: list[Prompt]) -> tuple[list[bool], list[bool]]:
    """Verdicts on scenes drawn for the test prompts,
    and on scenes drawn for those prompts with one point changed."""
    draw = rng(1)
    right = world.render([world.scene_for(draw, p) for p in benchmark])
    wrong = world.render([world.scene_for(draw, world.corrupt(draw, p)) for p in benchmark])
    return world.judge(right, benchmark), world.judge(wrong, benchmark)


def test_judge_accepts_right_scenes_in_every_task(right_and_wrong, benchmark: list[Prompt]) -> None:
    accepted = right_and_wrong[0]
    assert sum(accepted) >= 0.995 * 600
    scores = world.task_scores(accepted, benchmark)
    assert set(scores) == {*TASKS, "overall"} and min(scores.values()) >= 0.98, scores


def test_judge_rejects_wrong_scenes_in_every_task(right_and_wrong, benchmark: list[Prompt]) -> None:
    rejected = [not v for v in right_and_wrong[1]]
    assert sum(rejected) >= 0.995 * 600
    assert min(world.task_scores(rejected, benchmark).values()) >= 0.98


def test_judge_reads_the_pictures_through_8_bits_and_some_noise(benchmark: list[Prompt]) -> None:
    draw, some = rng(2), benchmark[::6]
    images = world.render([world.scene_for(draw, p) for p in some])
    images = images + 0.02 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    assert sum(world.judge((images.clamp(0, 1) * 255).round() / 255, some)) >= 98


def test_detect_measures_what_was_drawn() -> None:
    things = [one("heart", "red", 8.0, 9.0, 5.5), one("ring", "black", 23.5, 22.0, 6.5)]
    found = sorted(world.detect(shown(things))[0], key=lambda f: f.x)
    assert [(f.shape, f.color) for f in found] == [("heart", "red"), ("ring", "black")]
    for f, t in zip(found, things):
        _, cx, cy = world.template(t.shape)
        assert abs(f.x - t.x - cx * t.r) < 0.2 and abs(f.y - t.y - cy * t.r) < 0.2
        assert f.match > 0.9 and 1.5 * t.r < f.w < 2.2 * t.r and 1.5 * t.r < f.h < 2.2 * t.r


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_in_every_color_is_found_as_itself(shape: str) -> None:
    images = torch.cat([shown([one(shape, color)], light) for color in COLORS for light in (0.0, 0.5, 1.0)])
    found = [[(f.shape, f.color) for f in per_picture] for per_picture in world.detect(images)]
    assert found == [[(shape, color)] for color in COLORS for _ in range(3)]


def test_components_against_a_plain_flood_fill() -> None:
    color = torch.randint(-1, 2, (3, 12, 12), generator=torch.Generator().manual_seed(0))
    color[2] = -1
    color[2, ::4], color[2, 2::8, 0], color[2, 6::8, -1] = 1, 1, 1    # winding: rows joined at alternate ends
    color[2, 1:4, 0], color[2, 5:8, -1] = 1, 1
    labels = world.components(color).view(3, 12, 12)
    for b in range(3):
        areas, left = [], {(y, x) for y in range(12) for x in range(12) if color[b, y, x] >= 0}
        while left:
            area, border = set(), [left.pop()]
            while border:
                y, x = border.pop()
                area.add((y, x))
                near = {(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)} & left
                border += [p for p in near if color[b][p] == color[b, y, x]]
                left -= set(border)
            areas.append(area)
        for area in areas:
            assert {int(labels[b][p]) for p in area} == {max(12 * y + x for y, x in area)}


def test_only_counting_minds_extra_things() -> None:
    pair = [one("heart", "red", 8, 8, 5), one("star", "blue", 23, 9, 5)]
    extra = one("moon", "green", 16, 24, 5)
    for text in ("a heart", "a red heart", "a heart and a star", "a red heart and a blue star",
                 "a heart left of a star"):
        assert verdict(pair, text) and verdict([*pair, extra], text)
    twins = [one("heart", "red", 8, 8, 5), one("heart", "red", 23, 9, 5)]
    third = one("heart", "red", 16, 24, 5)
    assert verdict(twins, "two hearts") and verdict(twins, "two red hearts")
    assert verdict([*twins, extra], "two hearts")
    assert not verdict([*twins, third], "two hearts") and not verdict([*twins, third], "two red hearts")
    assert not verdict(twins, "three hearts") and verdict([*twins, third], "three hearts")
    assert verdict([*twins, replace(third, color="blue")], "two red hearts")


def test_color_must_sit_on_the_right_shape() -> None:
    things = [one("heart", "red", 8, 8, 5), one("star", "blue", 23, 23, 5)]
    assert verdict(things, "a red heart and a blue star") and verdict(things, "a blue star and a red heart")
    assert not verdict(things, "a blue heart and a red star") and not verdict(things, "a blue heart")


@pytest.mark.parametrize("dx, dy, holding", [
    (-12, 0, {"left of"}), (12, 0, {"right of"}), (0, -12, {"above"}), (0, 12, {"below"}),
    (-12, -12, {"left of", "above"}),            # (12 - 2) / 17 = 0.59 on both axes: both hold
    (12, 5, {"right of"}),                       # y: (5 - 2) / 13 = 0.23
    (3, 0, set()), (0, 0, set()),                # 3 px apart, 2 of them forgiven: 1/3 of the distance
    (4.2, 0, {"right of"}), (3.9, 0, set()),     # the limit: (d - 2) / d = 0.5 at d = 4
])
def test_position_rule(dx: float, dy: float, holding: set[str]) -> None:
    """Offset less a tenth of the summed sizes (here 20 px: 2 px off each axis),
    over the whole distance, beyond 1/2."""
    a, b = (Found(None, "red", 16 + x, 16 + y, 10.0, 10.0, 1.0) for x, y in ((dx, dy), (0, 0)))
    assert {r for r in RELATIONS if world.holds(r, a, b)} == holding
    assert {r for r in RELATIONS if world.holds(r, b, a)} == {world.OPPOSITE[r] for r in holding}


def test_position_forgives_by_the_size_along_each_axis() -> None:
    a, b = Found(None, "red", 10, 10, 20.0, 2.0, 1.0), Found(None, "red", 17, 16.5, 20.0, 2.0, 1.0)
    # x: (7 - 4) / 9.6, y: (6.5 - 0.4) / 9.6
    assert {r for r in RELATIONS if world.holds(r, a, b)} == {"above"}


def test_degenerate_pictures_fulfil_nothing(benchmark: list[Prompt]) -> None:
    plain = [torch.tensor(c)[:, None, None].expand(3, SIZE, SIZE)
             for c in (*COLORS.values(), world.DIM, world.BRIGHT)]
    noise = torch.rand(10, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    checker = (torch.arange(SIZE)[:, None] + torch.arange(SIZE)).remainder(2).float().expand(3, SIZE, SIZE)
    images = torch.cat([torch.stack(plain), torch.zeros(1, 3, SIZE, SIZE), torch.ones(1, 3, SIZE, SIZE),
                        noise, checker[None]])
    for found in world.detect(images):
        assert not any(world.fulfils(found, p) for p in benchmark)
    hard = (torch.rand(40, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    by_chance = [world.fulfils(found, p) for found in world.detect(hard) for p in benchmark]
    assert np.mean(by_chance) < 0.001            # a clot of 8 pixels may look like a square
    assert world.detect(images[:0]) == [] and world.judge(images[:0], []) == []


def test_ground_of_a_palette_color_hides_only_that_color() -> None:
    picture = shown([one("square", "blue")])[0]
    red = torch.tensor(COLORS["red"])[:, None, None]
    blue = (picture - picture[:, :1, :1]).abs().sum(0) > 0.01
    found = world.detect(torch.where(blue, picture, red)[None])[0]
    assert [(f.shape, f.color) for f in found] == [("square", "blue")]


def test_judge_refuses_what_does_not_fit() -> None:
    picture, prompt = shown([one("heart", "red")]), world.parse_prompt("a heart")
    with pytest.raises(ValueError, match="expected one prompt a picture, got 1 pictures and 2 prompts"):
        world.judge(picture, [prompt, prompt])
    with pytest.raises(ValueError, match=r"expected pictures \(B, 3, 32, 32\), got \(1, 3, 64, 64\)"):
        world.judge(picture.repeat(1, 1, 2, 2), [prompt])


def test_task_scores_are_means_of_tasks() -> None:
    prompts = [world.parse_prompt(t) for t in ("a heart", "a star", "a moon", "a ring", "two hearts")]
    scores = world.task_scores([True, True, True, False, False], prompts)
    assert scores == {"single_object": 0.75, "counting": 0.0, "overall": 0.375}


# ----------------------------------------------------------------------------- scenes

def test_things_never_overlap_nor_leave_the_picture() -> None:
    draw = rng(3)
    scenes = [world.sample_scene(draw, 0.4) for _ in range(1500)]
    cover, border = torch.zeros(len(scenes), SIZE, SIZE), torch.ones(SIZE, SIZE, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    for scene in scenes:
        for i, a in enumerate(scene.things):
            assert all(np.hypot(a.x - c.x, a.y - c.y) > a.r + c.r + 1.5 for c in scene.things[:i])
    for shape in SHAPES:
        rows = [(b, t.x, t.y, t.r) for b, s in enumerate(scenes) for t in s.things if t.shape == shape]
        index, x, y, r = torch.tensor(rows).T
        cover.index_add_(0, index.long(), world.coverage(shape, x, y, r))
    assert cover.max() < 1.1                # soft rims of two things may share a pixel, their bodies may not
    assert cover[:, border].max() < 0.35         # so that the frame shows the ground
    assert {len(s.things) for s in scenes} == {1, 2, 3, 4}


def test_render_mixes_ground_and_color_by_coverage() -> None:
    picture = shown([one("circle", "red")], light=0.0)[0]
    torch.testing.assert_close(picture[:, 16, 16], torch.tensor(COLORS["red"]), rtol=0, atol=1e-6)
    torch.testing.assert_close(picture[:, 0, 0], torch.tensor(world.DIM), rtol=0, atol=1e-6)
    torch.testing.assert_close(shown([], light=1.0)[0, :, 5, 5], torch.tensor(world.BRIGHT),
                               rtol=0, atol=1e-6)
    area = world.coverage("circle", *torch.tensor([16.0, 16.0, 6.0])).sum()
    assert abs(float(area) - np.pi * (0.95 * 6) ** 2) < 1.5
    for shape in SHAPES:
        drawn = world.coverage(shape, *torch.tensor([16.0, 16.0, 6.0])).sum()
        assert abs(float(drawn) / 36 / world.template(shape)[0] - 1) < 0.05


def test_mood_follows_the_light() -> None:
    moods = [world.mood(Scene((), light)) for light in (0.0, 0.3, 0.4, 0.6, 0.7, 1.0)]
    assert moods == ["dim", "dim", "soft", "soft", "bright", "bright"]


# ----------------------------------------------------------------------------- prompts and their split

def brute_fulfils(scene: Scene, prompt: Prompt) -> bool:
    """From the scene itself and the words of the prompt: exactly these things,
    and the first one on the said side."""
    words = prompt.text
    for wording in sorted(world.WORDINGS, key=len, reverse=True):
        words = words.removeprefix(wording)
    side = next((r for r in RELATIONS if r in words), None)
    asked = []
    for part in re.split(f" {side or 'and'} ", words):
        number, *color, shape = part.split()
        count = {"two": 2, "three": 3, "four": 4}.get(number, 1)
        asked += [(shape.removesuffix("s") if count > 1 else shape, color[0] if color else None)] * count
    things = list(scene.things)
    if len(things) != len(asked) or sorted(t.shape for t in things) != sorted(s for s, _ in asked):
        return False
    if any(sum(t.shape == s and c in (None, t.color) for t in things) < asked.count((s, c))
           for s, c in asked):
        return False
    if side is None:
        return True
    a, b = (next(t for t in things if t.shape == s) for s, _ in asked)
    along = {"left of": b.x - a.x, "right of": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}[side]
    return along > 0.79 * np.hypot(a.x - b.x, a.y - b.y)


def test_prompts_of_a_scene_are_fulfilled_by_it() -> None:
    draw, tasks, misjudged = rng(4), set(), 0
    scenes = [world.sample_scene(draw) for _ in range(400)]
    for scene, found in zip(scenes, world.detect(world.render(scenes))):
        prompts = world.prompts_of(scene, world.WORDINGS[draw.integers(len(world.WORDINGS))])
        assert len({p.text for p in prompts}) == len(prompts) >= 2
        assert all(brute_fulfils(scene, p) for p in prompts), (scene, prompts)
        misjudged += not all(world.fulfils(found, p) for p in prompts)
        tasks |= {p.task for p in prompts}
    assert tasks == set(TASKS)
    assert misjudged <= 2                        # two things of one colour whose corners touch look like one


def test_scene_for_shows_just_what_is_asked_and_corrupt_does_not(benchmark: list[Prompt]) -> None:
    draw, ways = rng(5), set()
    for prompt in benchmark:
        scene, wrong = world.scene_for(draw, prompt), world.corrupt(draw, prompt)
        assert brute_fulfils(scene, prompt) and not brute_fulfils(scene, wrong)
        assert wrong.task == prompt.task and len(wrong.include) == len(prompt.include)
        ways.add((prompt.task, tuple(a != b for a, b in zip(prompt.include[0], wrong.include[0])),
                  prompt.include[1:] != wrong.include[1:], prompt.relation != wrong.relation))
    assert len(ways) >= 10                       # shapes, colours, numbers, sides and swaps all occur


def canonical(prompt: Prompt) -> tuple:
    """What a prompt says, whatever its order or side, without the module's own key."""
    if prompt.task == "single_object":
        return prompt.task, prompt.text
    things = prompt.include
    if prompt.relation in ("right of", "below"):
        return prompt.task, {"right of": "left of", "below": "above"}[prompt.relation], things[::-1]
    if prompt.relation:
        return prompt.task, prompt.relation, things
    return prompt.task, frozenset(things)


def test_train_and_test_prompts_share_no_content() -> None:
    train, test = (world.prompt_list(side, 10 ** 6) for side in (False, True))
    assert {p.task for p in train} == {p.task for p in test} == set(TASKS)
    assert not {world.content_key(p) for p in train} & {world.content_key(p) for p in test}
    assert not {canonical(p) for p in train} & {canonical(p) for p in test}
    assert len({p.text for p in train + test}) == len(train + test)
    assert 0.08 < len(test) / len(train + test) < 0.25


def test_orders_and_sides_of_one_content_are_on_one_side_of_the_split() -> None:
    draw = rng(6)
    for _ in range(300):
        a, b = (SHAPES[i] for i in draw.permutation(len(SHAPES))[:2])
        c, d = ((None, None) if draw.random() < 0.4
                else (list(COLORS)[i] for i in draw.integers(len(COLORS), size=2)))
        x, y = (a, c, 1), (b, d, 1)
        for task, relation in (("two_object" if c is None else "color_attr", None),
                               *(("position", r) for r in RELATIONS)):
            prompts = [world.say(task, (x, y), relation, w) for w in world.WORDINGS[:3]]
            prompts += [world.say(task, (y, x), world.OPPOSITE.get(relation), w) for w in world.WORDINGS[:3]]
            assert len({world.is_test(p) for p in prompts}) == 1
            assert len({world.content_key(p) for p in prompts}) == 1 == len({canonical(p) for p in prompts})


def test_sampled_prompts_stay_on_their_side() -> None:
    draw = rng(7)
    for _ in range(300):
        scene, side = world.sample_scene(draw), bool(draw.integers(2))
        if prompt := world.sample_prompt(draw, scene, test=side):
            assert world.is_test(prompt) == side and brute_fulfils(scene, prompt)


def test_benchmark_prompts(benchmark: list[Prompt]) -> None:
    assert len(benchmark) == len({p.text for p in benchmark}) == 600
    assert list(dict.fromkeys(p.task for p in benchmark)) == list(TASKS)
    assert all(map(world.is_test, benchmark))
    assert benchmark == world.benchmark_prompts()
    assert world.prompt_list(True, 5, seed=1) != world.prompt_list(True, 5)


def test_parse_prompt_inverts_every_text() -> None:
    for prompt in world.prompt_list(False, 400) + world.prompt_list(True, 400):
        assert world.parse_prompt(prompt.text) == prompt
    draw = rng(8)
    for _ in range(200):
        for prompt in world.prompts_of(world.sample_scene(draw), "a sticker of "):
            assert world.parse_prompt(prompt.text) == prompt


@pytest.mark.parametrize("text", [
    "", "heart", "a photo of", "a photo of ", "a hearts", "two heart", "one heart", "five hearts",
    "a brown heart", "a cat", "A heart", "a heart.", "a  heart", "a orange heart", "an red heart",
    "a red red heart", "a heart and", "a heart and a heart",
    "a heart and a star and a moon", "a heart left of a star and a moon", "a red heart and a star",
    "two hearts and a star", "a heart on a star", "Generate an image of a heart"])
def test_parse_prompt_refuses_other_texts(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"got {text!r}")):
        world.parse_prompt(text)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="expected a shape"):
        world.signed_distance("hexagon", torch.zeros(1), torch.zeros(1))
    with pytest.raises(ValueError, match="expected a task"):
        world.all_contents("two_objects")


# ----------------------------------------------------------------------------- questions and words

def brute_answer(question: str, scene: Scene) -> str:
    """The answer from the scene's things alone; fails where a question has no single answer."""
    things = scene.things

    def side(a: Thing, b: Thing) -> str:
        dx, dy = a.x - b.x, a.y - b.y
        assert max(abs(dx), abs(dy)) >= 0.79 * np.hypot(dx, dy), "no plain side to ask about"
        across = abs(a.x - b.x) > abs(a.y - b.y)
        return ("left of", "right of")[a.x > b.x] if across else ("above", "below")[a.y > b.y]

    if m := re.fullmatch(r"how many (\w+)s\?", question):
        return NUMBERS[sum(m[1] in ("shape", t.shape) for t in things)]
    if m := re.fullmatch(r"what color (is|are) the (\w+)\?", question):
        asked = [t for t in things if t.shape + "s" * (m[1] == "are") == m[2]]
        assert (len(asked) > 1) == (m[1] == "are") and len({t.color for t in asked}) == 1
        return asked[0].color
    if m := re.fullmatch(r"what shape is (\w+)\?", question):
        (shape,) = {t.shape for t in things if t.color == m[1]}
        return shape
    if m := re.fullmatch(r"is there (an?) (\w+) (\w+)\?", question):
        assert (m[1] == "an") == (m[2] == "orange")
        return ("no", "yes")[any((t.color, t.shape) == (m[2], m[3]) for t in things)]
    a, b = things                                # the others are asked about two things that differ
    by_shape = {t.shape: t for t in things}
    assert len(by_shape) == 2
    if m := re.fullmatch(r"is the (\w+) (left of|right of|above|below) the (\w+)\?", question):
        return ("no", "yes")[side(by_shape[m[1]], by_shape[m[3]]) == m[2]]
    m = re.fullmatch(r"what is (left of|right of|above|below) the (\w+)\?", question)
    assert m, question
    other = b if m[2] == a.shape else a
    assert side(other, by_shape[m[2]]) == m[1]
    return other.shape


def test_answers_are_right_and_yes_and_no_in_balance() -> None:
    draw, said, kinds = rng(9), {"is there": [], "is the": []}, set()
    for _ in range(2500):
        scene = world.sample_scene(draw, 0.3)
        for question, answer in world.questions(draw, scene):
            assert brute_answer(question, scene) == answer, (question, answer, scene)
            kinds.add(" ".join(question.split()[:2]))
            if answer in ("yes", "no"):
                said["is there" if question.startswith("is there") else "is the"].append(answer == "yes")
    assert kinds == {"how many", "what color", "what shape", "is there", "is the", "what is"}
    for kind, yes in said.items():
        assert abs(np.mean(yes) - 0.5) < 0.05, (kind, np.mean(yes))


def test_every_word_is_in_the_vocabulary(benchmark: list[Prompt]) -> None:
    texts = [p.text for p in [*benchmark, *world.prompt_list(False, 1000)]] + list(world.MOODS)
    draw = rng(10)
    for _ in range(500):
        scene = world.sample_scene(draw, 0.3)
        texts += [word for pair in world.questions(draw, scene) for word in pair]
    texts += [re.sub(r"<\S+?>|{\w+}", " ", template) for template in (PROMPT, UNCONDITIONAL)]
    texts += world.WORDINGS
    words = {word for text in texts for word in re.findall(r"[\n:.?,]|[^\s:.?,]+", text.lower())}
    vocabulary = world.vocabulary()
    assert words <= set(vocabulary), sorted(words - set(vocabulary))
    assert len(vocabulary) == len(set(vocabulary))
