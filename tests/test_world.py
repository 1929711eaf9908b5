"""The nano world: its judge against scenes that are right and wrong on purpose, its split and its words."""
import re

import numpy as np
import pytest
import torch
from numpy.random import default_rng

from evaluation import geneval
from model import PROMPT, UNCONDITIONAL
from nano import world
from nano.world import COLORS, NUMBERS, RELATIONS, SIZE, TASKS, Found, Prompt, Scene, Thing


def verdict(things: list[Thing], text: str) -> bool:
    picture = world.render([Scene(tuple(things), 0.8)])
    return world.judge(picture, [world.parse_prompt(text)])[0]


@pytest.fixture(scope="module")
def benchmark() -> list[Prompt]:
    return world.benchmark_prompts()


@pytest.mark.parametrize("wrong", [False, True])
def test_judge_tells_right_from_wrong_scenes_in_every_task(wrong: bool, benchmark: list[Prompt]) -> None:
    """Scenes drawn for the test prompts, or for those with one point changed; through 8 bits and noise."""
    draw = default_rng(1)
    scenes = [world.scene_for(draw, world.corrupt(draw, p) if wrong else p) for p in benchmark]
    images = world.render(scenes)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    images = (images + 0.02 * noise).clamp(0, 1)
    verdicts = world.judge((images * 255).round() / 255, benchmark)
    scores = world.task_scores([v != wrong for v in verdicts], benchmark)
    assert set(scores) == {*TASKS, "overall"} and min(scores.values()) >= 0.98, scores


def test_detect_measures_what_was_drawn() -> None:
    [[bar]] = world.detect(world.render([Scene((Thing("bar", "black", 16.0, 15.0, 6.5),), 0.8)]))
    assert (bar.shape, bar.color) == ("bar", "black")
    assert abs(bar.w - 1.9 * 6.5) < 0.5 and abs(bar.h - 0.72 * 6.5) < 0.5


def test_only_counting_minds_extra_things() -> None:
    heart, moon = Thing("heart", "red", 8, 8, 5), Thing("moon", "green", 16, 24, 5)
    hearts = [heart, heart._replace(x=23)]
    for text in ("a heart", "a red heart", "a heart and a moon", "two hearts"):
        assert verdict([*hearts, moon], text)
    hearts += [moon._replace(shape="heart")]
    assert verdict(hearts, "two red hearts") and not verdict(hearts, "two hearts")


def test_the_position_rule_is_genevals() -> None:
    draw = default_rng(6)
    for _ in range(1000):
        a, b = (Found(None, "red", *draw.uniform(4, 28, 2), *draw.uniform(4, 16, 2), 1.0) for _ in range(2))
        boxes = [{"box": [f.x - f.w / 2, f.y - f.h / 2, f.x + f.w / 2, f.y + f.h / 2]} for f in (a, b)]
        assert {r for r in RELATIONS if world.holds(r, a, b)} == geneval.position(*boxes)


def test_degenerate_pictures_fulfil_nothing(benchmark: list[Prompt]) -> None:
    plain = [torch.tensor(c)[:, None, None].expand(3, SIZE, SIZE) for c in (*COLORS.values(), world.DIM)]
    noise = torch.rand(10, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    checker = (torch.arange(SIZE)[:, None] + torch.arange(SIZE)).remainder(2).float().expand(1, 3, SIZE, SIZE)
    for found in world.detect(torch.cat([torch.stack(plain), noise, checker])):
        assert not any(world.fulfils(found, p) for p in benchmark)
    assert world.detect(noise[:0]) == [] and world.judge(noise[:0], []) == []
    # nothing comes round the edge: the ground, and two columns
    color = torch.full((1, SIZE, SIZE), -1).index_fill(2, torch.tensor([0, SIZE - 1]), 0)
    assert len(world.components(color).unique()) == 3


def test_task_scores_are_means_of_tasks() -> None:
    prompts = [world.parse_prompt(text) for text in ("a heart", "a star", "two hearts")]
    scores = world.task_scores([True, False, False], prompts)
    assert scores == {"single_object": 0.5, "counting": 0.0, "overall": 0.25}


def brute_fulfils(scene: Scene, prompt: Prompt) -> bool:
    """From the scene itself and the words of the prompt: exactly these things, the first on the said side."""
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
    if sorted(t.shape for t in things) != sorted(s for s, _ in asked):
        return False
    for s, c in asked:
        if sum(t.shape == s and c in (None, t.color) for t in things) < asked.count((s, c)):
            return False
    if side is None:
        return True
    a, b = (next(t for t in things if t.shape == s) for s, _ in asked)
    along = {"left of": b.x - a.x, "right of": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}[side]
    return along > 0.79 * np.hypot(a.x - b.x, a.y - b.y)


def test_prompts_of_a_scene_are_fulfilled_by_it() -> None:
    draw, tasks, misjudged = default_rng(4), set(), 0
    scenes = [world.sample_scene(draw) for _ in range(400)]
    for scene, found in zip(scenes, world.detect(world.render(scenes))):
        prompts = world.prompts_of(scene, world.pick(draw, world.WORDINGS))
        assert len({p.text for p in prompts}) == len(prompts) >= 2
        assert all(brute_fulfils(scene, p) and world.parse_prompt(p.text) == p for p in prompts)
        misjudged += not all(world.fulfils(found, p) for p in prompts)
        tasks |= {p.task for p in prompts}
    assert tasks == set(TASKS)
    assert misjudged <= 2                        # two things of one colour whose corners touch look like one


def test_scene_for_shows_just_what_is_asked_and_corrupt_does_not(benchmark: list[Prompt]) -> None:
    draw, ways = default_rng(5), set()
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
    return prompt.task, prompt.relation, things if prompt.relation else frozenset(things)


def test_train_and_test_prompts_share_no_content() -> None:
    """No order, side or wording of a test prompt is a training prompt."""
    prompts = [p._replace(text=w + p.text) for p in world.every_prompt().values() for w in world.WORDINGS[:3]]
    train, test = ({canonical(p) for p in prompts if world.is_test(p) == side} for side in (False, True))
    assert not train & test and 0.08 < len(test) / len(train | test) < 0.25


def test_benchmark_prompts(benchmark: list[Prompt]) -> None:
    assert len(benchmark) == len({p.text for p in benchmark}) == 600
    assert list(dict.fromkeys(p.task for p in benchmark)) == list(TASKS)
    assert all(map(world.is_test, benchmark)) and not any(map(world.is_test, world.prompt_list(False, 100)))


def test_parse_prompt_refuses_other_texts() -> None:
    for text in ("", "a photo of ", "two heart", "a  heart", "a orange heart", "a heart and a heart"):
        with pytest.raises(ValueError, match=re.escape(f"got {text!r}")):
            world.parse_prompt(text)


def brute_answer(question: str, scene: Scene) -> str:
    """The answer from the scene's things alone; fails where a question has no single answer."""
    things = scene.things

    def side(a: Thing, b: Thing) -> str:
        dx, dy = a.x - b.x, a.y - b.y
        assert max(abs(dx), abs(dy)) >= 0.79 * np.hypot(dx, dy), "no plain side to ask about"
        return ("left of", "right of")[dx > 0] if abs(dx) > abs(dy) else ("above", "below")[dy > 0]

    if m := re.fullmatch(r"how many (\w+)s\?", question):
        return NUMBERS[sum(m[1] in ("shape", t.shape) for t in things)]
    if m := re.fullmatch(r"what color (is|are) the (\w+)\?", question):
        asked = [t for t in things if t.shape + "s" * (m[1] == "are") == m[2]]
        assert (len(asked) > 1) == (m[1] == "are") and len({t.color for t in asked}) == 1
        return asked[0].color
    if m := re.fullmatch(r"what shape is (\w+)\?", question):
        (shape,) = {t.shape for t in things if t.color == m[1]}
        return shape
    if m := re.fullmatch(r"is there an? (\w+) (\w+)\?", question):
        return ("no", "yes")[any((t.color, t.shape) == (m[1], m[2]) for t in things)]
    a, b = things                                # the others are asked about two things that differ
    by_shape = {t.shape: t for t in things}
    assert len(by_shape) == 2
    if m := re.fullmatch(r"is the (\w+) (left of|right of|above|below) the (\w+)\?", question):
        return ("no", "yes")[side(by_shape[m[1]], by_shape[m[3]]) == m[2]]
    m = re.fullmatch(r"what is (left of|right of|above|below) the (\w+)\?", question)
    other = b if m[2] == a.shape else a
    assert side(other, by_shape[m[2]]) == m[1]
    return other.shape


def test_answers_are_right_and_yes_and_no_in_balance() -> None:
    draw, yes, kinds = default_rng(9), {"is there": [], "is the": []}, set()
    for _ in range(2500):
        scene = world.sample_scene(draw, 0.3)
        for question, answer in world.questions(draw, scene):
            assert brute_answer(question, scene) == answer, (question, answer, scene)
            kinds.add(" ".join(question.split()[:2]))
            if answer in ("yes", "no"):
                yes["is there" if question.startswith("is there") else "is the"].append(answer == "yes")
    assert kinds == {"how many", "what color", "what shape", "is there", "is the", "what is"}
    assert all(abs(np.mean(answers) - 0.5) < 0.05 for answers in yes.values())


def test_every_word_is_in_the_vocabulary() -> None:
    texts = [*world.every_prompt(), *world.WORDINGS]
    draw = default_rng(10)
    for _ in range(500):
        texts += [text for pair in world.questions(draw, world.sample_scene(draw, 0.3)) for text in pair]
    texts += [re.sub(r"<\S+?>|{\w+}", " ", template) for template in (PROMPT, UNCONDITIONAL)]
    words = {word for text in texts for word in re.findall(r"[\n:.?,]|[^\s:.?,]+", text.lower())}
    vocabulary = world.vocabulary()
    assert words <= set(vocabulary) and len(vocabulary) == len(set(vocabulary))
