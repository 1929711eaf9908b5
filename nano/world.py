"""The nano world: pictures of coloured shapes, what can be said and asked about them, and an exact judge.

A scene is one to four upright shapes on a plain ground of 32 x 32 pixels. It is drawn from signed distances
(no rasteriser), described in GenEval's six tasks, asked about in short questions, and judged from its pixels
alone: segmentation by colour, shape by matching, GenEval's rules for counts, colours and positions. Nothing
in the judge is learned.

Prompts are split by content: what a test prompt says (in either order, from either side) is never said by
itself in training. Only for a single shape, where there is too little to say, the wording is held out instead
("a photo of a heart").

Letters: B pictures, K components found in them, H W pixels.
"""
import hashlib
import itertools
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 32                                                   # pixels per side
LARGEST = 6.6                                               # radius of a thing, pixels
SHAPES = ("circle", "square", "triangle", "heart", "star", "moon", "ring", "diamond", "bar", "arrow", "tee",
          "house")
COLORS = {"red": (0.88, 0.13, 0.13),
          "orange": (1.00, 0.55, 0.05),
          "yellow": (0.98, 0.86, 0.08),
          "green": (0.15, 0.62, 0.22),
          "blue": (0.15, 0.33, 0.88),
          "purple": (0.52, 0.18, 0.70),
          "pink": (1.00, 0.45, 0.72),
          "black": (0.07, 0.07, 0.09)}
COLOR_NAMES = tuple(COLORS)
DIM = (0.50, 0.52, 0.56)                                    # the ground at light 0
BRIGHT = (1.00, 0.985, 0.95)                                # and at light 1
NUMBERS = ("zero", "one", "two", "three", "four")
RELATIONS = {"left of": (-1, 0),                            # (x, y), y down
             "right of": (1, 0),
             "above": (0, -1),
             "below": (0, 1)}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")     # GenEval's order
WORDINGS = ("", "a picture of ", "a photo of ", "a drawing of ", "an image of ", "a sticker of ",
            "a card with ", "a page with ", "a tile with ", "a print of ")

Rng = np.random.Generator
Look = tuple[str, str]                                      # shape, colour


class Thing(NamedTuple):
    shape: str
    color: str
    x: float            # centre, pixels
    y: float
    r: float            # radius of its circle, pixels: some corners reach out of it, to 1.23 r at most


class Scene(NamedTuple):
    things: tuple[Thing, ...]
    light: float        # of the ground, 0 dim ... 1 bright: what the aesthetic score measures


class Prompt(NamedTuple):
    text: str
    task: str
    include: tuple[tuple[str, str | None, int], ...]        # what is asked for: shape, colour or None, count
    relation: str | None = None                             # of the first to the second


# ----------------------------------------------------------------------------- scenes

def pick(rng: Rng, items: Iterable, *but: Any) -> Any:
    """One of the items, and none of those in `but`."""
    items = [item for item in items if item not in but]
    return items[rng.integers(len(items))]


def random_look(rng: Rng) -> Look:
    return pick(rng, SHAPES), pick(rng, COLOR_NAMES)


def arrange(rng: Rng, looks: list[Look]) -> Scene:
    """Things of these looks, their circles at least 1.5 pixels apart: the first fit of many draws."""
    count = len(looks)
    tries = 4 ** (count - 1)
    low, high = (5.0, LARGEST) if count <= 2 else (4.4, 5.4)
    first, second = np.triu_indices(count, 1)
    fits = np.array([])
    while not fits.size:
        r = rng.uniform(low, high, (tries, count))                                      # (tries, count)
        room = SIZE - 2 - 2 * r                                                         # (tries, count)
        x, y = rng.uniform(0, 1, (2, tries, count)) * room + 1 + r                      # (tries, count) each
        distance = np.hypot(x[:, first] - x[:, second], y[:, first] - y[:, second])     # (tries, pairs)
        gap = distance - r[:, first] - r[:, second]                                     # (tries, pairs)
        fits = np.flatnonzero((gap > 1.5).all(1))
    places = np.stack([x, y, r])[:, fits[0]].T.tolist()                                 # (count, 3)
    things = [Thing(*look, *place) for look, place in zip(looks, places)]
    return Scene(tuple(things), float(rng.random()))


def sample_scene(rng: Rng, mixed: float = 0.0) -> Scene:
    """One shape, or two to four alike, or two that differ; with probability `mixed` any two to four."""
    kind = rng.random()
    count = int(rng.integers(2, 5)) if 0.1 <= kind <= 0.35 else 1
    if rng.random() < mixed:
        looks = [random_look(rng) for _ in range(rng.integers(2, 5))]
    elif kind > 0.35:
        shapes = rng.permutation(len(SHAPES))[:2]
        looks = [(SHAPES[shape], pick(rng, COLOR_NAMES)) for shape in shapes]
    else:
        looks = [random_look(rng)] * count
    return arrange(rng, looks)


def mean_radius(scene: Scene) -> float:
    """Of the things, pixels: the larger, the higher the preference."""
    return float(np.mean([thing.r for thing in scene.things]))


# ----------------------------------------------------------------------------- drawing

def box(x: Tensor, y: Tensor, width: float, height: float) -> Tensor:
    """Distance to a box of these half widths at the origin, negative inside (off its corners too small)."""
    return torch.maximum(x.abs() - width, y.abs() - height)


def signed_distance(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """Distance to the outline of a shape of radius 1 at the origin, negative inside; y points down."""
    rho = torch.hypot(x, y)
    if shape == "circle":
        return rho - 0.95
    if shape == "ring":
        return (rho - 0.72).abs() - 0.27
    if shape == "square":
        return box(x, y, 0.80, 0.80)
    if shape == "diamond":
        return 0.58 * (x.abs() / 0.72 + y.abs() / 0.98 - 1)
    if shape == "bar":
        return box(x, y, 0.95, 0.36)
    if shape == "tee":
        return torch.minimum(box(x, y + 0.58, 0.82, 0.27), box(x, y - 0.1, 0.28, 0.8))
    # a roof, apex up, on a stem or on walls
    roof = 0.7 * (x.abs() - y - 0.97)
    if shape == "arrow":
        return torch.minimum(torch.maximum(roof, y + 0.08), box(x, y - 0.4, 0.3, 0.5))
    if shape == "house":
        return torch.minimum(torch.maximum(roof, y + 0.15), box(x, y - 0.32, 0.55, 0.5))
    if shape == "triangle":
        # apex up: two slanted sides and a base
        sides = 0.868 * x.abs() - 0.496 * (y + 0.95)
        return torch.maximum(sides, y - 0.75)
    if shape == "star":
        # fold the five arms into half of one, which has one straight edge
        fifth = 2 * torch.pi / 5
        angle = torch.remainder(torch.atan2(x, -y) + fifth / 2, fifth)
        angle = (angle - fifth / 2).abs()
        edge = torch.tensor([0.45 * np.cos(fifth / 2) - 1.05, 0.45 * np.sin(fifth / 2)])
        ex, ey = edge / edge.norm()
        return (rho * angle.cos() - 1.05) * ey - rho * angle.sin() * ex
    if shape == "heart":
        # a square on its tip, and a circle on each of its upper sides
        side = 1.12
        x, y = x.abs(), y - 0.08
        lobe = torch.hypot(x - side / 8 ** 0.5, y + side / 8 ** 0.5) - side / 2
        square = (x + y.abs() - side / 2 ** 0.5) / 2 ** 0.5
        return torch.minimum(lobe, square)
    assert shape == "moon", f"expected a shape of {SHAPES}, got {shape!r}"
    # a disc without the disc at its upper right
    bite = torch.hypot(x - 0.48, y + 0.22)
    return torch.maximum(rho - 0.97, 0.80 - bite)


def coverage(shape: str, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Share of each pixel that the shape covers, (..., H, W). x, y, r (...,): centre and radius in pixels."""
    x, y, r = (value[..., None, None] for value in (x, y, r))                           # (..., 1, 1) each
    at = torch.arange(SIZE) + 0.5                           # the middles of pixels
    dx = (at - x) / r                                                                   # (..., 1, W)
    dy = (at[:, None] - y) / r                                                          # (..., H, 1)
    return (0.5 - signed_distance(shape, dx, dy) * r).clamp(0, 1)


def render(scenes: list[Scene]) -> Tensor:
    """Pictures of scenes, (B, 3, H, W) fp32 in [0, 1]."""
    light = torch.tensor([scene.light for scene in scenes])                             # (B,)
    dim, bright = torch.tensor(DIM), torch.tensor(BRIGHT)
    ground = dim + light[:, None] * (bright - dim)                                      # (B, 3)
    ground = ground[:, :, None, None]                                                   # (B, 3, 1, 1)
    images = ground.expand(-1, -1, SIZE, SIZE).clone()                                  # (B, 3, H, W)
    for index, things, alpha in things_by_shape(scenes):
        color = torch.tensor([COLORS[thing.color] for thing in things])                 # (K, 3)
        change = color[:, :, None, None] - ground[index]                                # (K, 3, 1, 1)
        # adding is painting, since things hardly ever overlap
        images.index_add_(0, index, alpha[:, None] * change)
    return images


def things_by_shape(scenes: list[Scene]) -> Iterator[tuple[Tensor, tuple[Thing, ...], Tensor]]:
    """For each shape the numbers (K,) of the scenes of its things, the things, what they cover (K, H, W)."""
    for shape in SHAPES:
        found = [(b, thing) for b, scene in enumerate(scenes)
                 for thing in scene.things if thing.shape == shape]
        if found:
            index, things = zip(*found)
            places = [(thing.x, thing.y, thing.r) for thing in things]
            x, y, r = torch.tensor(places).T                                            # (K,) each
            yield torch.tensor(index), things, coverage(shape, x, y, r)


# ----------------------------------------------------------------------------- prompts

def noun(shape: str, color: str | None = None, count: int = 1) -> str:
    words = f"{color} {shape}" if color else shape
    if count > 1:
        return f"{NUMBERS[count]} {words}s"
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def write_prompt(include: tuple, relation: str | None = None, wording: str = "") -> Prompt:
    """The prompt that asks for these things; its task follows from what it says."""
    (_, color, count), *others = include
    if relation:
        task = "position"
    elif others:
        task = "color_attr" if color else "two_object"
    elif count > 1:
        task = "counting"
    else:
        task = "colors" if color else "single_object"
    nouns = [noun(*thing) for thing in include]
    return Prompt(wording + f" {relation or 'and'} ".join(nouns), task, include, relation)


def content_key(prompt: Prompt) -> str:
    """What a prompt says whatever its order or side; the split into train and test hangs on it."""
    things = [f"{count} {color} {shape}" for shape, color, count in prompt.include]
    if prompt.relation in ("right of", "below"):
        return f"{prompt.task} {OPPOSITE[prompt.relation]} {things[1]} {things[0]}"
    if prompt.relation:
        return f"{prompt.task} {prompt.relation} {things[0]} {things[1]}"
    return f"{prompt.task} {sorted(things)}" + (prompt.text if prompt.task == "single_object" else "")


@cache
def is_test(prompt: Prompt) -> bool:
    """One content in seven is held out for testing (of the wordings of a single shape, two in five)."""
    digest = hashlib.blake2b(content_key(prompt).encode()).digest()
    if prompt.task == "single_object":
        return digest[0] % 5 < 2
    return digest[0] % 7 == 0


def is_test_scene(scene: Scene) -> bool:
    """Whether a scene is a picture of what some test prompt says (of a single shape, the words decide)."""
    prompts = prompts_of(scene)
    return any(is_test(prompt) for prompt in prompts if prompt.task != "single_object")


def relation_between(a: Thing, b: Thing) -> str | None:
    """The relation that a plainly has to b: its direction lies within 37 degrees of an axis."""
    dx, dy = a.x - b.x, a.y - b.y
    for relation, (right, down) in RELATIONS.items():
        if right * dx + down * dy >= 0.8 * np.hypot(dx, dy):
            return relation
    return None


def prompts_of(scene: Scene, wording: str = "") -> list[Prompt]:
    """Every prompt, in both orders, that a scene of one kind fulfils exactly: no thing is left out."""
    things = scene.things
    count, first = len(things), things[0]
    if len({(thing.shape, thing.color) for thing in things}) == 1:
        plain, colored = (first.shape, None, count), (first.shape, first.color, count)
        return [write_prompt((plain,), None, wording), write_prompt((colored,), None, wording)]

    # two things of different shapes
    if count != 2 or first.shape == things[1].shape:
        return []
    prompts = []
    for a, b in (things, things[::-1]):
        plain = (a.shape, None, 1), (b.shape, None, 1)
        colored = (a.shape, a.color, 1), (b.shape, b.color, 1)
        for relation in dict.fromkeys([None, relation_between(a, b)]):
            prompts.append(write_prompt(plain, relation, wording))
            prompts.append(write_prompt(colored, relation, wording))
    return prompts


def sample_prompt(rng: Rng, scene: Scene, test: bool = False) -> Prompt | None:
    """One prompt of the asked split that fits the scene, or None; those that say more come more often."""
    prompts = prompts_of(scene, pick(rng, WORDINGS))
    fits = [prompt for prompt in prompts if is_test(prompt) == test]
    if not fits:
        return None
    # one for the shapes, one for their colours, one for their places
    weights = np.array([1 + bool(prompt.include[0][1]) + bool(prompt.relation) for prompt in fits])
    return fits[rng.choice(len(fits), p=weights / weights.sum())]


def sample_pair(rng: Rng, test: bool = False) -> tuple[Scene, Prompt]:
    """A scene and a prompt of the asked split that says what is in it; for training, a scene of which no test
    prompt says so."""
    while True:
        scene = sample_scene(rng)
        prompt = sample_prompt(rng, scene, test) if test or not is_test_scene(scene) else None
        if prompt:
            return scene, prompt


def scene_for(rng: Rng, prompt: Prompt) -> Scene:
    """A scene that shows just what a prompt asks for; colours left open are drawn."""
    looks = []
    for shape, color, count in prompt.include:
        looks += [(shape, color or pick(rng, COLOR_NAMES))] * count
    while True:
        scene = arrange(rng, looks)
        if prompt.relation is None or prompt.relation == relation_between(*scene.things):
            return scene


def corrupt(rng: Rng, prompt: Prompt, test: bool = True) -> Prompt:
    """A prompt that differs in one point (shape, colour, number, side, or whose colour is whose), so that no
    scene of `scene_for(prompt)` fulfils it; without `test`, none that is a test prompt."""
    (shape, color, count), *others = prompt.include
    relation = prompt.relation
    ways = ["shape"]
    if color:
        ways += ["color"]
    if prompt.task == "counting":
        ways += ["number"] * 2
    if relation:
        ways += ["side"] * 2
    if prompt.task == "color_attr" and color != others[0][1]:
        ways += ["swap"] * 2

    way = pick(rng, ways)
    if way == "shape":
        shape = pick(rng, SHAPES, shape, *(other[0] for other in others))
    elif way == "color":
        color = pick(rng, COLORS, color)
    elif way == "number":
        count = pick(rng, (2, 3, 4), count)
    elif way == "side":
        relation = OPPOSITE[relation]
    else:
        other_shape, other_color, _ = others[0]
        color, others = other_color, [(other_shape, color, 1)]
    include = (shape, color, count), *others
    wrong = write_prompt(include, relation, wording_of(prompt.text))
    return wrong if test or not is_test(wrong) else corrupt(rng, prompt, test)


def wording_of(text: str) -> str:
    return max((wording for wording in WORDINGS if text.startswith(wording)), key=len)


@cache
def every_prompt() -> dict[str, Prompt]:
    """All prompts of this world without a wording, by their text, in a fixed order."""
    prompts = []
    # one kind of thing
    for count, shape, color in itertools.product((1, 2, 3, 4), SHAPES, (None, *COLORS)):
        prompts.append(write_prompt(((shape, color, count),)))
    # two things, both with their colours or both without
    for first, second in itertools.permutations(SHAPES, 2):
        for colors in [(None, None), *itertools.product(COLORS, COLORS)]:
            include = (first, colors[0], 1), (second, colors[1], 1)
            prompts += [write_prompt(include, relation) for relation in (None, *RELATIONS)]
    return {prompt.text: prompt for prompt in prompts}


def parse_prompt(text: str) -> Prompt:
    """The Prompt behind a text of this world; ValueError for any other."""
    prompt = every_prompt().get(text.removeprefix(wording_of(text)))
    if prompt is None:
        raise ValueError(f'expected a prompt such as "a red heart left of a blue star", got {text!r}')
    return prompt._replace(text=text)


def in_benchmark(prompt: Prompt) -> bool:
    """As in GenEval, positions are asked for without colours, and two colours differ."""
    colors = {color for _, color, _ in prompt.include}
    if prompt.task == "position":
        return colors == {None}
    return prompt.task != "color_attr" or len(colors) == 2


def prompt_list(test: bool, per_task: dict[str, int] | int) -> list[Prompt]:
    """Distinct prompts of one split, at most `per_task` of each task, tasks in turn order."""
    chosen = []
    for number, task in enumerate(TASKS):
        asked = [prompt for prompt in every_prompt().values() if prompt.task == task and in_benchmark(prompt)]
        worded = [prompt._replace(text=wording + prompt.text) for prompt in asked for wording in WORDINGS]
        fits = [prompt for prompt in worded if is_test(prompt) == test]
        rng = np.random.default_rng([0, number])
        limit = per_task[task] if isinstance(per_task, dict) else per_task
        chosen += [fits[i] for i in rng.permutation(len(fits))[:limit]]
    return chosen


def benchmark_prompts() -> list[Prompt]:
    """The 600 test prompts of the nano benchmark. As in GenEval, tasks with more to say have more prompts."""
    counts = {"single_object": 28, "two_object": 48, "counting": 140,
              "colors": 64, "position": 160, "color_attr": 160}
    return prompt_list(True, counts)


# ----------------------------------------------------------------------------- questions

def questions(rng: Rng, scene: Scene) -> list[tuple[str, str]]:
    """Questions about a scene with their one-word answers, yes and no in balance, in random order."""
    things = scene.things
    looks = {(thing.shape, thing.color) for thing in things}
    shapes = [thing.shape for thing in things]

    # how many there are, of a shape that is mostly there
    shape = pick(rng, sorted(set(shapes)) if rng.random() < 0.8 else SHAPES)
    pairs = [(f"how many {shape}s?", NUMBERS[shapes.count(shape)]),
             ("how many shapes?", NUMBERS[len(things)])]

    # the colour of a shape and the shape of a colour, where there is one answer
    thing = pick(rng, things)
    if shapes.count(thing.shape) == 1:
        pairs.append((f"what color is the {thing.shape}?", thing.color))
    elif len(looks) == 1:
        pairs.append((f"what color are the {thing.shape}s?", thing.color))
    if len({shape for shape, color in looks if color == thing.color}) == 1:
        pairs.append((f"what shape is {thing.color}?", thing.shape))

    # whether a shape is there in this colour
    color = thing.color
    if rng.random() >= 0.5:
        color = pick(rng, COLORS, color)
    there = (thing.shape, color) in looks
    pairs.append((f"is there {noun(thing.shape, color)}?", "yes" if there else "no"))

    # where two things stand
    relation = relation_between(*things) if len(shapes) == len(set(shapes)) == 2 else None
    if relation:
        first, second = shapes
        asked = relation
        if rng.random() >= 0.5:
            asked = pick(rng, RELATIONS, relation)
        pairs += [(f"is the {first} {asked} the {second}?", "yes" if asked == relation else "no"),
                  (f"what is {OPPOSITE[relation]} the {first}?", second)]
    return [pairs[i] for i in rng.permutation(len(pairs))]


def question_set(count: int, seed: int = 0) -> tuple[Tensor, list[tuple[str, str]]]:
    """Test pictures (count, 3, H, W) with the 256 levels of a file; of each a question and its answer."""
    scene_rng = np.random.default_rng([seed, *b"vlm test"])
    question_rng = np.random.default_rng([seed, 2])
    scenes = [sample_scene(scene_rng, 0.4) for _ in range(count)]
    pairs = [questions(question_rng, scene)[0] for scene in scenes]
    return (render(scenes) * 255).round() / 255, pairs


def vocabulary() -> list[str]:
    """Every word of prompts, questions, answers and templates, in a fixed order."""
    frame = ("user assistant generate an image a and of with left right above below is are the there what "
             "how many color shape shapes yes no picture photo drawing sticker card page tile print keep "
             "as it describe ground in").split()
    plurals = [shape + "s" for shape in SHAPES]
    return [*frame, *SHAPES, *plurals, *COLORS, *NUMBERS, *"\n:.?,"]


# ----------------------------------------------------------------------------- the judge

MIN_AREA = 8.0          # pixels: less is dirt, not a thing
MIN_MATCH = 0.70        # soft intersection over union with the best-fitting shape: less is no shape


class Found(NamedTuple):
    shape: str | None   # None: matches no shape
    color: str
    x: float
    y: float
    w: float
    h: float
    match: float


@cache
def template(shape: str) -> tuple[float, float, float]:
    """Area and centroid of a shape of radius 1, measured on a fine grid."""
    at = torch.linspace(-1.2, 1.2, 961)
    x, y = torch.meshgrid(at, at, indexing="xy")
    inside = signed_distance(shape, x, y) < 0
    area = float(inside.sum()) * 0.0025 ** 2
    return area, float(x[inside].double().mean()), float(y[inside].double().mean())


def segment(images: Tensor) -> tuple[Tensor, Tensor]:
    """Colour of every pixel, (B, H, W) int64, -1 for ground, and alpha (B, H, W), the colour's share.

    A pixel is ground + alpha (colour - ground): the ground is the median of the frame, the colour the palette
    entry that leaves the smallest residual. Edges (alpha at most 1/2) count as ground.
    """
    rows = images[:, :, [0, -1]].flatten(2)                                             # (B, 3, 2 W)
    columns = images[:, :, :, [0, -1]].flatten(2)                                       # (B, 3, 2 H)
    ground = torch.cat([rows, columns], 2).median(2).values                             # (B, 3)
    palette = torch.tensor(list(COLORS.values()))                                       # (8, 3)
    to_color = palette - ground[:, None]                                                # (B, 8, 3)
    offset = images - ground[:, :, None, None]                                          # (B, 3, H, W)
    # clamped for a ground that is of a colour of the palette
    length = to_color.square().sum(2, keepdim=True).clamp(min=1e-6)                     # (B, 8, 1)
    alpha = torch.einsum("bkc,bchw->bkhw", to_color / length, offset)                   # (B, 8, H, W)
    alpha = alpha.clamp(0, 1)
    painted = alpha[:, :, None] * to_color[..., None, None]                             # (B, 8, 3, H, W)
    residual = (offset[:, None] - painted).square().sum(2)                              # (B, 8, H, W)
    color = residual.argmin(1)                                                          # (B, H, W)
    alpha = alpha.gather(1, color[:, None])[:, 0]                                       # (B, H, W)
    return torch.where(alpha > 0.5, color, -1), alpha


def components(color: Tensor) -> Tensor:
    """4-connected areas of one colour (B, H, W): every pixel gets the highest number of a pixel of its area,
    counted over the batch, int64; ground gets -1."""
    numbers = torch.arange(color.numel()).view_as(color)                                # (B, H, W)
    labels = torch.where(color >= 0, numbers, -1)                                       # (B, H, W)
    # a frame of ground, so that nothing comes round the edge
    color, labels = (F.pad(values, (1, 1, 1, 1), value=-1) for values in (color, labels))
    while True:
        # the highest number among a pixel and its neighbours of the same colour, until none is higher
        grown = labels                                                                  # (B, H + 2, W + 2)
        for shift, dim in (1, 1), (-1, 1), (1, 2), (-1, 2):
            same = color == color.roll(shift, dim)                                      # (B, H + 2, W + 2)
            grown = torch.where(same, grown.maximum(grown.roll(shift, dim)), grown)
        if torch.equal(grown, labels):
            return labels[:, 1:-1, 1:-1]
        labels = grown


def detect(images: Tensor) -> list[list[Found]]:
    """Everything in pictures (B, 3, H, W) in [0, 1]: one list of Found a picture."""
    assert images.shape[1:] == (3, SIZE, SIZE), images.shape
    color, alpha = segment(images.float().clamp(0, 1))                                  # (B, H, W) each
    labels = components(color)                                                          # (B, H, W)

    # the components that are no dirt, their pictures and their colours
    names, sizes = labels[color >= 0].unique(return_counts=True)
    names = names[sizes >= MIN_AREA / 2]                                                # (K,)
    owner = names // SIZE ** 2                                                          # (K,)
    hue = color.flatten()[names]                                                        # (K,)

    # a component with its soft rim: area, centre, width and height
    core = labels[owner] == names[:, None, None]                                        # (K, H, W)
    around = F.max_pool2d(core[:, None].float(), 3, stride=1, padding=1).bool()         # (K, 1, H, W)
    rim = around[:, 0] & (color[owner] == -1)                                           # (K, H, W)
    soft = torch.where(core | rim, alpha[owner], 0.0)                                   # (K, H, W)
    at = torch.arange(SIZE) + 0.5
    area = soft.sum((1, 2))                                                             # (K,)
    x = (soft * at).sum((1, 2)) / area                                                  # (K,)
    y = (soft * at[:, None]).sum((1, 2)) / area                                         # (K,)
    w = soft.amax(1).sum(1)                                                             # (K,)
    h = soft.amax(2).sum(1)                                                             # (K,)

    # every shape drawn in its place (the area gives the radius, the centroid the place), and how well it fits
    matches = []
    for shape in SHAPES:
        unit_area, cx, cy = template(shape)
        r = (area / unit_area).sqrt()                                                   # (K,)
        ideal = coverage(shape, x - cx * r, y - cy * r, r)                              # (K, H, W)
        shared = torch.minimum(soft, ideal).sum((1, 2))                                 # (K,)
        joined = torch.maximum(soft, ideal).sum((1, 2))                                 # (K,)
        matches.append(shared / joined)
    match, best = torch.stack(matches).max(0)                                           # (K,) each
    found: list[list[Found]] = [[] for _ in images]
    for k in torch.nonzero(area >= MIN_AREA).flatten().tolist():
        shape = SHAPES[best[k]] if match[k] >= MIN_MATCH else None
        numbers = [float(values[k]) for values in (x, y, w, h, match)]
        found[owner[k]].append(Found(shape, COLOR_NAMES[hue[k]], *numbers))
    return found


def sides(offset: np.ndarray, sizes: np.ndarray) -> set[str]:
    """GenEval's rule: the offset (x, y) of two centres, shrunk by a tenth of the summed sizes, points beyond
    half of its length. Up to two relations hold."""
    shrunk = np.maximum(np.abs(offset) - 0.1 * sizes, 0) * np.sign(offset)
    if np.abs(shrunk).max() < 1e-3:
        return set()
    direction = shrunk / np.linalg.norm(offset)
    return {relation for relation, side in RELATIONS.items() if direction @ side > 0.5}


def holds(relation: str, a: Found, b: Found) -> bool:
    offset = np.array([a.x - b.x, a.y - b.y])
    sizes = np.array([a.w + b.w, a.h + b.h])
    return relation in sides(offset, sizes)


def fulfils(found: list[Found], prompt: Prompt) -> bool:
    """GenEval's verdict. Extra things do not hurt, except when counting."""
    best = []
    for shape, color, count in prompt.include:
        group = [thing for thing in found if thing.shape == shape and color in (None, thing.color)]
        too_many = prompt.task == "counting" and len(group) > count
        if len(group) < count or too_many:
            return False
        best.append(max(group, key=lambda thing: thing.match))
    return prompt.relation is None or holds(prompt.relation, *best)


def judge(images: Tensor, prompts: list[Prompt]) -> list[bool]:
    """Does picture b, (B, 3, H, W) in [0, 1], show what prompt b asks for?"""
    return [fulfils(found, prompt) for found, prompt in zip(detect(images.cpu()), prompts, strict=True)]


def task_scores(verdicts: list[bool], prompts: list[Prompt]) -> dict[str, float]:
    """Share of right pictures for each task present, and `overall`, the unweighted mean of the tasks, as in
    GenEval."""
    scores = {}
    for task in TASKS:
        right = [verdict for verdict, prompt in zip(verdicts, prompts) if prompt.task == task]
        if right:
            scores[task] = sum(right) / len(right)
    return scores | {"overall": sum(scores.values()) / len(scores)}
