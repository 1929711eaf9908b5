"""The nano world: pictures of coloured shapes, what can be said and asked about them, and an exact judge.

A scene is one to four upright shapes on a plain ground of 32 x 32 pixels. It is drawn from signed distances
(no rasteriser), described in GenEval's six tasks, asked about in short questions, and judged from pixels
alone: segmentation by colour, shape by matching, GenEval's rules for counts, colours and positions. No part
of the judge is learned.

Prompts are split by content: what a test prompt says (in either order, from either side) is never said in
training. Only for a single shape, where there is too little to say, the wording is held out instead
("a photo of a heart").

Letters: B pictures, K found components, S shapes, H W pixels.
"""

import hashlib
import itertools
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
import torch.nn.functional as F

SIZE = 32                                                    # pixels per side
SHAPES = ("circle", "square", "triangle", "heart", "star", "moon", "ring")
COLORS = {"red": (0.88, 0.13, 0.13), "orange": (1.00, 0.55, 0.05), "yellow": (0.98, 0.86, 0.08),
          "green": (0.15, 0.62, 0.22), "blue": (0.15, 0.33, 0.88), "purple": (0.52, 0.18, 0.70),
          "pink": (1.00, 0.45, 0.72), "black": (0.07, 0.07, 0.09)}
DIM, BRIGHT = (0.50, 0.52, 0.56), (1.00, 0.985, 0.95)        # the ground at light 0 and at light 1
NUMBERS = ("zero", "one", "two", "three", "four")
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}     # (x, y), y down
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")     # GenEval's order
WORDINGS = ("", "a picture of ", "a photo of ", "a drawing of ", "an image of ", "a sticker of ",
            "a card with ", "a page with ", "a tile with ", "a print of ")
MOODS = ("dim", "soft", "bright")                            # said of the ground, to the CLIP towers only


# ----------------------------------------------------------------------------- scenes

@dataclass(frozen=True)
class Thing:
    shape: str
    color: str
    x: float            # centre, pixels
    y: float
    r: float            # radius of the circle around the shape, pixels


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]
    light: float        # of the ground, 0 dim ... 1 bright: what the aesthetic score measures


@dataclass(frozen=True)
class Prompt:
    """What is asked for: `include` lists (shape, colour or None, count);
    `relation` holds between the first two."""
    text: str
    task: str
    include: tuple[tuple[str, str | None, int], ...]
    relation: str | None = None


def place(rng: np.random.Generator, count: int) -> list[tuple[float, float, float]]:
    """Centres and radii of `count` shapes that keep 1.5 px of ground between them:
    the first fit of many draws."""
    low, high = (5.0, 6.6) if count <= 2 else (4.4, 5.4)
    first, second = np.triu_indices(count, 1)
    while True:
        r = rng.uniform(low, high, (4 ** (count - 1), count))                           # (tries, count)
        xy = rng.uniform(0, 1, (2, *r.shape)) * (SIZE - 2 - 2 * r) + 1 + r              # (2, tries, count)
        gap = np.hypot(*(xy[..., first] - xy[..., second])) - r[:, first] - r[:, second]
        fits = np.flatnonzero((gap > 1.5).all(1))
        if len(fits):
            return [tuple(map(float, spot)) for spot in zip(*xy[:, fits[0]], r[fits[0]])]


def sample_scene(rng: np.random.Generator, mixed: float = 0.0) -> Scene:
    """One shape, or two to four alike, or two that differ; with probability `mixed` any two to four."""
    kind, colors = rng.random(), list(COLORS)
    count = 1 if kind < 0.1 else 2 if kind > 0.35 else int(rng.integers(2, 5))
    if rng.random() < mixed:
        count = int(rng.integers(2, 5))
        looks = [(SHAPES[rng.integers(len(SHAPES))], colors[rng.integers(len(colors))]) for _ in range(count)]
    elif kind > 0.35:
        looks = [(SHAPES[s], colors[rng.integers(len(colors))]) for s in rng.permutation(len(SHAPES))[:2]]
    else:
        looks = [(SHAPES[rng.integers(len(SHAPES))], colors[rng.integers(len(colors))])] * count
    return Scene(tuple(Thing(*look, *spot) for look, spot in zip(looks, place(rng, count))),
                 float(rng.random()))


# ----------------------------------------------------------------------------- drawing

def signed_distance(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """Distance to the outline of a shape of radius 1 at the origin, negative inside; y points down."""
    rho = torch.hypot(x, y)
    if shape == "circle":
        return rho - 0.95
    if shape == "ring":
        return (rho - 0.72).abs() - 0.27
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.80
    if shape == "triangle":                                  # apex up; two slanted sides and a base
        return torch.maximum(0.868 * x.abs() - 0.496 * (y + 0.95), y - 0.75)
    if shape == "star":                     # fold the five arms into half of one, then one straight edge
        fifth = 2 * torch.pi / 5
        angle = (torch.remainder(torch.atan2(x, -y) + fifth / 2, fifth) - fifth / 2).abs()
        edge = torch.tensor([0.45 * np.cos(fifth / 2) - 1.05, 0.45 * np.sin(fifth / 2)])
        edge = edge / edge.norm()
        return (rho * angle.cos() - 1.05) * edge[1] - rho * angle.sin() * edge[0]
    if shape == "heart":                    # a square on its tip, and a circle on each upper side
        s, cy = 1.12, 0.08
        lobe = torch.hypot(x.abs() - s / 8 ** 0.5, y - cy + s / 8 ** 0.5) - s / 2
        return torch.minimum(lobe, (x.abs() + (y - cy).abs() - s / 2 ** 0.5) / 2 ** 0.5)
    if shape == "moon":                                      # a disc without the disc at its upper right
        return torch.maximum(rho - 0.97, 0.80 - torch.hypot(x - 0.48, y + 0.22))
    raise ValueError(f"expected a shape of {SHAPES}, got {shape!r}")


def coverage(shape: str, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Share of each pixel that the shape covers. x, y, r (...,): centre and radius in pixels.
    Returns (..., H, W)."""
    at = torch.arange(SIZE) + 0.5
    dx = (at - x[..., None, None]) / r[..., None, None]                                 # (..., 1, W)
    dy = (at[:, None] - y[..., None, None]) / r[..., None, None]                        # (..., H, 1)
    dx, dy = torch.broadcast_tensors(dx, dy)
    return (0.5 - signed_distance(shape, dx, dy) * r[..., None, None]).clamp(0, 1)


def render(scenes: list[Scene]) -> Tensor:
    """Pictures of scenes. Returns (B, 3, H, W) fp32 in [0, 1]."""
    light = torch.tensor([s.light for s in scenes])[:, None]
    ground = torch.tensor(DIM) + light * (torch.tensor(BRIGHT) - torch.tensor(DIM))     # (B, 3)
    images = ground[:, :, None, None].expand(-1, -1, SIZE, SIZE).clone()                # (B, 3, H, W)
    for shape in SHAPES:
        found = [(b, t) for b, s in enumerate(scenes) for t in s.things if t.shape == shape]
        if not found:
            continue
        x, y, r = torch.tensor([(t.x, t.y, t.r) for _, t in found]).T
        color = torch.tensor([COLORS[t.color] for _, t in found])[:, :, None, None]     # (K, 3, 1, 1)
        alpha = coverage(shape, x, y, r)[:, None]                                       # (K, 1, H, W)
        index = torch.tensor([b for b, _ in found])
        images.index_add_(0, index, alpha * (color - ground[index][:, :, None, None]))  # things never overlap
    return images


# ----------------------------------------------------------------------------- words

def noun(shape: str, color: str | None = None, count: int = 1) -> str:
    words = f"{color} {shape}" if color else shape
    if count > 1:
        return f"{NUMBERS[count]} {words}s"
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def content_key(prompt: Prompt) -> str:
    """What a prompt says whatever its order or side; the split into train and test hangs on it."""
    include = [f"{count} {color} {shape}" for shape, color, count in prompt.include]
    if prompt.relation in ("right of", "below"):
        return f"{prompt.task} {OPPOSITE[prompt.relation]} {include[1]} {include[0]}"
    if prompt.relation:
        return f"{prompt.task} {prompt.relation} {include[0]} {include[1]}"
    return f"{prompt.task} {sorted(include)}" + (prompt.text if prompt.task == "single_object" else "")


@lru_cache(maxsize=None)
def is_test(prompt: Prompt) -> bool:
    """One content in seven is held out for testing (of the wordings of a single shape, two in five)."""
    digest = hashlib.blake2b(content_key(prompt).encode()).digest()
    return digest[0] % 5 < 2 if prompt.task == "single_object" else digest[0] % 7 == 0


def say(task: str, include: tuple, relation: str | None = None, wording: str = "") -> Prompt:
    nouns = [noun(shape, color, count) for shape, color, count in include]
    return Prompt(wording + f" {relation or 'and'} ".join(nouns), task, include, relation)


def relation_between(a: Thing, b: Thing) -> str | None:
    """The relation that a plainly has to b: its direction within 37 degrees of an axis."""
    dx, dy = a.x - b.x, a.y - b.y
    if max(abs(dx), abs(dy)) < 0.8 * np.hypot(dx, dy):
        return None
    return ("left of" if dx < 0 else "right of") if abs(dx) > abs(dy) else ("above" if dy < 0 else "below")


def prompts_of(scene: Scene, wording: str = "") -> list[Prompt]:
    """Every prompt, in both orders, that a scene of one kind fulfils exactly (no thing is left unsaid)."""
    things = scene.things
    if len({(t.shape, t.color) for t in things}) == 1:
        shape, color, count = things[0].shape, things[0].color, len(things)
        if count > 1:
            return [say("counting", ((shape, c, count),), None, wording) for c in (None, color)]
        return [say("single_object", ((shape, None, 1),), None, wording),
                say("colors", ((shape, color, 1),), None, wording)]
    if len(things) != 2 or things[0].shape == things[1].shape:
        return []
    out = []
    for a, b in (things, things[::-1]):
        plain, colored = (((a.shape, None, 1), (b.shape, None, 1)),
                          ((a.shape, a.color, 1), (b.shape, b.color, 1)))
        out += [say("two_object", plain, None, wording), say("color_attr", colored, None, wording)]
        if relation := relation_between(a, b):
            out += [say("position", plain, relation, wording), say("position", colored, relation, wording)]
    return out


def sample_prompt(rng: np.random.Generator, scene: Scene, test: bool = False) -> Prompt | None:
    """One prompt of the asked split that fits the scene, or None; those that say more come more often."""
    wording = str(rng.choice(WORDINGS))
    fits = [p for p in prompts_of(scene, wording) if is_test(p) == test]
    says = np.array([1 + (p.include[0][1] is not None) + (p.relation is not None) for p in fits], float)
    return fits[rng.choice(len(fits), p=says / says.sum())] if fits else None


def scene_for(rng: np.random.Generator, prompt: Prompt) -> Scene:
    """A scene that shows just what a prompt asks for; colours left open are drawn."""
    looks = []
    for shape, color, count in prompt.include:
        color = color or list(COLORS)[rng.integers(len(COLORS))]
        looks += [(shape, color)] * count
    while True:
        scene = Scene(tuple(Thing(*look, *spot) for look, spot in zip(looks, place(rng, len(looks)))),
                      float(rng.random()))
        if prompt.relation is None or prompt.relation == relation_between(*scene.things):
            return scene


def corrupt(rng: np.random.Generator, prompt: Prompt) -> Prompt:
    """A prompt that differs in one point (shape, colour, number, side, or whose colour is whose),
    so that no scene of `scene_for(prompt)` fulfils it."""
    ways = ["shape", *["color"] * any(c for _, c, _ in prompt.include),
            *["number"] * (prompt.task == "counting") * 2, *["side"] * bool(prompt.relation) * 2]
    (shape, color, count), *others = prompt.include
    if prompt.task == "color_attr" and color != others[0][1]:
        ways += ["swap"] * 2
    way = ways[rng.integers(len(ways))]
    wording = max((w for w in WORDINGS if prompt.text.startswith(w)), key=len)
    relation = OPPOSITE[prompt.relation] if way == "side" else prompt.relation
    if way == "shape":
        taken = {shape, *(other[0] for other in others)}
        shape = [s for s in SHAPES if s not in taken][rng.integers(len(SHAPES) - len(taken))]
    if way == "color":
        color = [c for c in COLORS if c != color][rng.integers(len(COLORS) - 1)]
    if way == "number":
        count = [n for n in (2, 3, 4) if n != count][rng.integers(2)]
    if way == "swap":
        color, others = others[0][1], [(others[0][0], color, 1)]
    return say(prompt.task, ((shape, color, count), *others), relation, wording)


def all_contents(task: str) -> list[tuple[tuple, str | None]]:
    """(include, relation) of every prompt of a task, in a fixed order;
    positions without colours, as in GenEval."""
    pairs = list(itertools.permutations(SHAPES, 2))
    if task == "single_object":
        return [(((s, None, 1),), None) for s in SHAPES]
    if task == "colors":
        return [(((s, c, 1),), None) for s in SHAPES for c in COLORS]
    if task == "counting":
        return [(((s, c, n),), None) for n in (2, 3, 4) for s in SHAPES for c in (None, *COLORS)]
    if task == "two_object":
        return [(((a, None, 1), (b, None, 1)), None) for a, b in pairs]
    if task == "position":
        return [(((a, None, 1), (b, None, 1)), r) for a, b in pairs for r in RELATIONS]
    if task == "color_attr":
        return [(((a, c, 1), (b, d, 1)), None) for a, b in pairs for c in COLORS for d in COLORS if c != d]
    raise ValueError(f"expected a task of {TASKS}, got {task!r}")


def prompt_list(test: bool, per_task: dict[str, int] | int, seed: int = 0) -> list[Prompt]:
    """Distinct prompts of one split, at most `per_task` of each task, tasks in turn order."""
    out = []
    for task in TASKS:
        fits = [p for inc, rel in all_contents(task)
                for w in WORDINGS if is_test(p := say(task, inc, rel, w)) == test]
        order = np.random.default_rng([seed, TASKS.index(task)]).permutation(len(fits))
        limit = per_task[task] if isinstance(per_task, dict) else per_task
        out += [fits[i] for i in order[:limit]]
    return out


def benchmark_prompts() -> list[Prompt]:
    """The 600 test prompts of the nano benchmark;
    as in GenEval the tasks with more to say have more prompts."""
    counts = {"single_object": 28, "two_object": 48, "counting": 140, "colors": 64, "position": 160,
              "color_attr": 160}
    return prompt_list(True, counts)


def parse_prompt(text: str) -> Prompt:
    """The Prompt behind a text of this world; ValueError for any other."""
    wording = max((w for w in WORDINGS if text.startswith(w)), key=len)
    body = text.removeprefix(wording)
    relation = next((r for r in RELATIONS if f" {r} " in body), None)
    include = []
    for part in body.split(f" {relation or 'and'} "):
        first, *color, last = part.split() if len(part.split()) in (2, 3) else ("", "", "")
        count = NUMBERS.index(first) if first in NUMBERS else 1
        shape = last[:-1] if count > 1 else last
        if (shape not in SHAPES or (color and color[0] not in COLORS)
                or first not in ("a", "an", *NUMBERS[2:])):
            raise ValueError(f'expected a prompt such as "a red heart left of a blue star", got {text!r}')
        include.append((shape, color[0] if color else None, count))
    if len(include) > 1:
        task = "position" if relation else "color_attr" if include[0][1] else "two_object"
    else:
        task = "counting" if include[0][2] > 1 else "colors" if include[0][1] else "single_object"
    prompt, (shapes, colors, counts) = say(task, tuple(include), relation, wording), zip(*include)
    plain_pair = len(set(shapes)) == 2 and max(counts) == 1 and len({c is None for c in colors}) == 1
    if prompt.text != text or len(include) > 2 or (len(include) == 2 and not plain_pair):
        raise ValueError(f'expected a prompt such as "a red heart left of a blue star", got {text!r}')
    return prompt


def questions(rng: np.random.Generator, scene: Scene) -> list[tuple[str, str]]:
    """Questions about a scene with their one-word answers, yes and no in balance; in random order."""
    things = scene.things
    here = sorted({t.shape for t in things})
    shape = str(rng.choice(here if rng.random() < 0.8 else SHAPES))
    out = [(f"how many {shape}s?", NUMBERS[sum(t.shape == shape for t in things)]),
           ("how many shapes?", NUMBERS[len(things)])]
    thing = things[rng.integers(len(things))]
    if sum(t.shape == thing.shape for t in things) == 1 or len({(t.shape, t.color) for t in things}) == 1:
        plural = "s" if sum(t.shape == thing.shape for t in things) > 1 else ""
        out.append((f"what color {'are' if plural else 'is'} the {thing.shape}{plural}?", thing.color))
    if len({t.shape for t in things if t.color == thing.color}) == 1:
        out.append((f"what shape is {thing.color}?", thing.shape))
    color = thing.color if rng.random() < 0.5 else str(rng.choice([c for c in COLORS if c != thing.color]))
    there = any((t.shape, t.color) == (thing.shape, color) for t in things)
    out.append((f"is there {noun(thing.shape, color)}?", "yes" if there else "no"))
    if len(things) == 2 and len(here) == 2 and (relation := relation_between(*things)):
        asked = relation if rng.random() < 0.5 else str(rng.choice([r for r in RELATIONS if r != relation]))
        out.append((f"is the {things[0].shape} {asked} the {things[1].shape}?",
                    "yes" if asked == relation else "no"))
        out.append((f"what is {OPPOSITE[relation]} the {things[0].shape}?", things[1].shape))
    return [out[i] for i in rng.permutation(len(out))]


def question_set(count: int, seed: int = 0) -> tuple[Tensor, list[tuple[str, str]]]:
    """Held-out pictures (count, 3, H, W) with the 256 levels of a file,
    and about each a question with its answer."""
    scenes_rng, asked_rng = np.random.default_rng([seed, *b"vlm test"]), np.random.default_rng([seed, 2])
    scenes = [sample_scene(scenes_rng, 0.4) for _ in range(count)]
    return (render(scenes) * 255).round() / 255, [questions(asked_rng, scene)[0] for scene in scenes]


def mood(scene: Scene) -> str:
    return MOODS[min(int(3 * scene.light), 2)]


def vocabulary() -> list[str]:
    """Every word of prompts, questions, answers and templates, in a fixed order."""
    plural = [s + "s" for s in SHAPES]
    frame = ("user assistant generate an image a and of with left right above below is are the there what "
             "how many color shape shapes yes no picture photo drawing sticker card page tile print keep "
             "as it describe ground in").split()
    return list(dict.fromkeys([*frame, *SHAPES, *plural, *COLORS, *NUMBERS, *MOODS,
                               "\n", ":", ".", "?", ","]))


# ----------------------------------------------------------------------------- the judge

MIN_AREA = 8.0          # pixels: less is dirt, not a thing
MIN_MATCH = 0.70        # soft intersection over union with the best-fitting shape: less is no shape


@dataclass(frozen=True)
class Found:
    shape: str | None   # None: matches no shape
    color: str
    x: float
    y: float
    w: float
    h: float
    match: float


@lru_cache(maxsize=None)
def template(shape: str) -> tuple[float, float, float]:
    """Area and centroid of a shape of radius 1, measured on a fine grid."""
    at = torch.linspace(-1.2, 1.2, 961)
    inside = (signed_distance(shape, *torch.meshgrid(at, at, indexing="xy")) < 0).double()
    area = inside.sum()
    return (float(area * 0.0025 ** 2),
            float((inside * at).sum() / area), float((inside * at[:, None]).sum() / area))


def components(color: Tensor) -> Tensor:
    """4-connected areas of one colour (B, H, W): every pixel gets the highest pixel number of its area,
    (B, H W) int64.

    Pixels take the highest number among their neighbours, then the one which the pixel of that number has
    got: areas are done in few rounds, however long and winding. Ground pixels (-1) keep their own numbers.
    """
    B, H, W = color.shape
    across = (color[:, :, 1:] == color[:, :, :-1]) & (color[:, :, 1:] >= 0)             # (B, H, W - 1)
    down = (color[:, 1:] == color[:, :-1]) & (color[:, 1:] >= 0)                        # (B, H - 1, W)
    labels = torch.arange(H * W).view(1, H, W).expand(B, -1, -1)                        # (B, H, W)
    while True:
        grown = labels.clone()
        grown[:, :, 1:] = grown[:, :, 1:].maximum(grown[:, :, :-1] * across)
        grown[:, :, :-1] = grown[:, :, :-1].maximum(grown[:, :, 1:] * across)
        grown[:, 1:] = grown[:, 1:].maximum(grown[:, :-1] * down)
        grown[:, :-1] = grown[:, :-1].maximum(grown[:, 1:] * down)
        grown = grown.flatten(1)                                                        # (B, H W)
        grown = grown.gather(1, grown).view(B, H, W)
        if torch.equal(grown, labels):
            return labels.flatten(1)
        labels = grown


def segment(images: Tensor) -> tuple[Tensor, Tensor]:
    """Colour of every pixel.
    Returns color (B, H, W) int64, -1 for ground, and alpha (B, H, W), the colour's share.

    A pixel is ground + alpha (colour - ground); the ground is the median of the frame, the colour the palette
    entry that leaves the smallest residual. Edges (alpha at most 1/2) count as ground.
    """
    frame = torch.cat([images[:, :, [0, -1]].flatten(2),
                       images[:, :, :, [0, -1]].flatten(2)], 2)                         # (B, 3, 4 W)
    ground = frame.median(2).values                                                     # (B, 3)
    palette = torch.tensor(list(COLORS.values()))                                       # (8, 3)
    to_color = palette - ground[:, None]                                                # (B, 8, 3)
    offset = images - ground[:, :, None, None]                                          # (B, 3, H, W)
    # clamped for a ground that is of a colour of the palette
    length = to_color.square().sum(2, keepdim=True).clamp(min=1e-6)                     # (B, 8, 1)
    alpha = torch.einsum("bkc,bchw->bkhw", to_color / length, offset)
    alpha = alpha.clamp(0, 1)                                                           # (B, 8, H, W)
    residual = (offset[:, None]
                - alpha[:, :, None] * to_color[..., None, None]).square().sum(2)        # (B, 8, H, W)
    color = residual.argmin(1)                                                          # (B, H, W)
    alpha = alpha.gather(1, color[:, None])[:, 0]                                       # (B, H, W)
    return torch.where(alpha > 0.5, color, -1), alpha


def detect(images: Tensor) -> list[list[Found]]:
    """Everything in pictures (B, 3, H, W) in [0, 1]: one list of Found a picture."""
    if images.shape[1:] != (3, SIZE, SIZE):
        raise ValueError(f"expected pictures (B, 3, {SIZE}, {SIZE}), got {tuple(images.shape)}")
    color, alpha = segment(images.float().clamp(0, 1))
    labels = components(color)                                                          # (B, H W)
    # size (B, H W): of area n at n; owner, name (K,): picture and area of each found component
    size = torch.zeros_like(labels).scatter_add_(1, labels, torch.ones_like(labels))
    owner, name = torch.nonzero((size >= MIN_AREA / 2) & (color.flatten(1) >= 0), as_tuple=True)
    found: list[list[Found]] = [[] for _ in images]
    if not len(owner):
        return found
    hue = color.flatten(1)[owner, name]                                                 # (K,)
    core = (labels[owner] == name[:, None]).view(-1, SIZE, SIZE)                        # (K, H, W)
    edge = (F.max_pool2d(core[:, None].float(), 3, 1, 1)[:, 0].bool()
            & (color[owner] == -1))                                                     # its soft rim
    soft = torch.where(core | edge, alpha[owner], 0.0)                                  # (K, H, W)
    at = torch.arange(SIZE) + 0.5
    area = soft.sum((1, 2))                                                             # (K,)
    x, y = (soft * at).sum((1, 2)) / area, (soft * at[:, None]).sum((1, 2)) / area      # (K,)
    match = []
    for shape in SHAPES:                    # area gives the radius, the centroid gives the place
        a, cx, cy = template(shape)
        r = (area / a).sqrt()
        ideal = coverage(shape, x - cx * r, y - cy * r, r)                              # (K, H, W)
        match.append(torch.minimum(soft, ideal).sum((1, 2)) / torch.maximum(soft, ideal).sum((1, 2)))
    match, best = torch.stack(match).max(0)                                             # (K,)
    w, h = soft.amax(1).sum(1), soft.amax(2).sum(1)                                     # (K,)
    for k in torch.nonzero(area >= MIN_AREA).flatten().tolist():
        shape = SHAPES[best[k]] if match[k] >= MIN_MATCH else None
        numbers = (float(v[k]) for v in (x, y, w, h, match))
        found[owner[k]].append(Found(shape, list(COLORS)[hue[k]], *numbers))
    return found


def holds(relation: str, a: Found, b: Found) -> bool:
    """GenEval's rule: the centre offset, shrunk by a tenth of the summed sizes,
    points beyond half of its length."""
    offset = np.array([a.x - b.x, a.y - b.y])
    shrunk = np.maximum(np.abs(offset) - 0.1 * np.array([a.w + b.w, a.h + b.h]), 0) * np.sign(offset)
    return bool((shrunk / max(np.linalg.norm(offset), 1e-6)) @ np.array(RELATIONS[relation]) > 0.5)


def fulfils(found: list[Found], prompt: Prompt) -> bool:
    """GenEval's verdict. Extra things do not hurt, except when counting."""
    groups = []
    for shape, color, count in prompt.include:
        group = [f for f in found if f.shape == shape and color in (None, f.color)]
        if len(group) < count or (prompt.task == "counting" and len(group) > count):
            return False
        groups.append(sorted(group, key=lambda f: -f.match)[:count])
    return prompt.relation is None or any(all(holds(prompt.relation, a, b) for b in groups[1])
                                          for a in groups[0])


def judge(images: Tensor, prompts: list[Prompt]) -> list[bool]:
    """Does picture b, (B, 3, H, W) in [0, 1], show what prompt b asks for?"""
    if len(images) != len(prompts):
        raise ValueError("expected one prompt a picture, "
                         f"got {len(images)} pictures and {len(prompts)} prompts")
    return [fulfils(found, prompt) for found, prompt in zip(detect(images), prompts)]


def task_scores(verdicts: list[bool], prompts: list[Prompt]) -> dict[str, float]:
    """Share of right pictures for each task present, and `overall`,
    the unweighted mean of the tasks, as in GenEval."""
    by_task = {t: [v for v, p in zip(verdicts, prompts) if p.task == t] for t in TASKS}
    scores = {t: sum(v) / len(v) for t, v in by_task.items() if v}
    return scores | {"overall": sum(scores.values()) / len(scores)}
