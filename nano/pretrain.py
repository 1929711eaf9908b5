"""Stage 0 of the nano model: train what the paper downloads.
`python nano/pretrain.py [PART ...]`, parts in this order:

    vae      DC-AE on pictures of the nano world
    vlm      InternVL on questions about pictures and about sentences
    dit      SANA, with a small text encoder of its own, on latents and prompts
    clip     CLIP on pictures and captions
    pick     the preference model: CLIP tuned on pairs in which the better picture is known by construction
    aes      the aesthetic head: five linear layers from CLIP's features to how bright the ground is, 1 to 10

All are the classes of the full size with smaller numbers (`PRESETS["nano"]`). Each part is written under
weights/nano/ in the layout of its published counterpart, with a training.json beside it: command, seed,
steps, time, device and scores. On a GPU if there is one: the longest part takes 11 minutes on an H100.
`--more STEPS` goes on with the vlm that is there. The file is long because it is six trainings in turn; they
share what is drawn, how it descends and what is written down.
"""

import argparse
import copy
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Dataset
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common import (adamw, cosine_lr, ema_update, environment, generator, precision, read_safetensors,
                    save_safetensors, write_json)
from dit import DiT, guided_velocity, randn, shift_time
from model import PRESETS, PROMPT, QUESTION, ParaUni, VLMConfig, build_vlm
from nano import world
from rewards import AestheticHead, build_clip, preprocess, save_aesthetic_head, save_reward, text_encoder
from vae import DCAE

SEED = 0
NANO = PRESETS["nano"]
WEIGHTS = ROOT / "weights" / "nano"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<unk>"]


# ----------------------------------------------------------------------------- shared

def said_of(rng: np.random.Generator, scenes: list[world.Scene], count: int,
            test: bool = False) -> tuple[list[int], list[world.Prompt]]:
    """The numbers of `count` scenes, and a prompt that each fulfils."""
    chosen, prompts = [], []
    while len(chosen) < count:
        j = int(rng.integers(len(scenes)))
        if prompt := world.sample_prompt(rng, scenes[j], test):
            chosen.append(j)
            prompts.append(prompt)
    return chosen, prompts


def pool(name: str, size: int, mixed: float = 0.0) -> list[world.Scene]:
    """`size` scenes drawn from (seed, name)."""
    rng = np.random.default_rng([SEED, *name.encode()])
    return [world.sample_scene(rng, mixed) for _ in range(size)]


def render_all(scenes: list[world.Scene]) -> Tensor:
    """(B, 3, H, W) uint8, a quarter of the memory."""
    return torch.cat([(world.render(scenes[i:i + 1024]) * 255).round().byte()
                      for i in range(0, len(scenes), 1024)]).to(DEVICE)


class Draws(Dataset):
    """What `draw` makes of a generator of (seed, name, step), for each step."""

    def __init__(self, name: str, steps: int, draw: Callable[[np.random.Generator], tuple]) -> None:
        self.name, self.steps, self.draw = name, steps, draw

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple:
        return self.draw(np.random.default_rng([SEED, *self.name.encode(), step]))


def drawn(name: str, steps: int, draw: Callable[[np.random.Generator], tuple]) -> Iterable[tuple]:
    """The draws of all steps in turn; made by other processes where a GPU would wait for them."""
    ahead = {"num_workers": 3, "prefetch_factor": 8, "multiprocessing_context": "fork"}
    return DataLoader(Draws(name, steps, draw), batch_size=None, collate_fn=lambda made: made,
                      **(ahead if DEVICE.type == "cuda" else {}))


def to_float(images: Tensor) -> Tensor:
    return images.float() / 255


def bf16(module: nn.Module) -> dict[str, Tensor]:
    return {name: t.bfloat16() if t.is_floating_point() else t for name, t in module.state_dict().items()}


def round_to_bf16(module: nn.Module) -> nn.Module:
    """What is written is bf16; what is scored and built upon is the same numbers."""
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(p.bfloat16().float())
    return module


class Clock:
    """Prints a line every hundred steps, and writes training.json at the end."""

    def __init__(self, part: str, steps: int, **numbers: float) -> None:
        self.part, self.steps, self.start, self.numbers = part, steps, time.time(), numbers
        self.total, self.count = 0.0, 0

    def step(self, i: int, loss: Tensor) -> None:
        self.total, self.count = self.total + loss.detach(), self.count + 1             # a GPU need not wait
        if (i + 1) % 100 == 0 or i + 1 == self.steps:
            print(f"{self.part:5} {i + 1:6}/{self.steps} loss {self.total / self.count:.4f} "
                  f"{time.time() - self.start:6.0f} s", flush=True)
            self.total, self.count = 0.0, 0

    def write(self, folder: Path, **scores: float) -> None:
        record = {"command": f"python nano/pretrain.py {self.part}", "seed": SEED, "steps": self.steps,
                  **self.numbers, "seconds": round(time.time() - self.start),
                  "device": environment()["device"], **scores}
        write_json(folder / "training.json", record)
        print(json.dumps(record), flush=True)


class Descent:
    """Muon for the matrices of the layers (convolutions too, a row an output channel), AdamW at no more than
    1.5e-3 for the rest, both on cosine schedules, gradients clipped to norm 1.

    Muon (arXiv 2502.16982) pays at this size: after 250 steps the vision tower names 95 % of the shapes that
    it sees, after as many steps of AdamW 78 % at best.
    """
    LAYERS = re.compile(r"layer|block|projector|up_|down_")

    def __init__(self, net: nn.Module, steps: int, lr: float, weight_decay: float = 0.01) -> None:
        named = {name: p for name, p in net.named_parameters() if p.requires_grad}
        self.matrices = [p for name, p in named.items() if p.ndim >= 2 and p[0].numel() >= 32
                         and self.LAYERS.search(name) and not name.endswith("scale_shift_table")]
        self.flat = [nn.Parameter(p.detach().flatten(1)) for p in self.matrices]        # Muon wants 2-D
        owned = {id(p) for p in self.matrices}
        self.params, self.steps = list(named.values()), steps
        self.optimizers = {
            torch.optim.Muon(self.flat, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"): lr,
            adamw([p for p in self.params if id(p) not in owned], lr, weight_decay): min(lr, 1.5e-3)}

    def step(self, i: int, loss: Tensor) -> None:
        for p in self.params:
            p.grad = None
        loss.backward()
        nn.utils.clip_grad_norm_(self.params, 1.0)
        for p, flat in zip(self.matrices, self.flat):
            flat.grad = None if p.grad is None else p.grad.flatten(1)
        for opt, lr in self.optimizers.items():
            for group in opt.param_groups:
                group["lr"] = cosine_lr(i, self.steps, 50, lr)
            opt.step()


# ----------------------------------------------------------------------------- DC-AE

def train_vae(steps: int, batch: int = 32, lr: float = 1e-2) -> None:
    clock = Clock("vae", steps, batch=batch, lr=lr)
    vae = DCAE(NANO.vae)
    vae.init_weights(generator(SEED, "vae"))
    vae.to(DEVICE)
    encode, decode = torch.compile(vae.encode), torch.compile(vae.decode)
    images = render_all(pool("vae", 20000, 0.3))
    descent, rng = Descent(vae, steps, lr), generator(SEED, "vae", "draws")
    for i in range(steps):
        x = to_float(images[torch.randint(len(images), (batch,), generator=rng)]) * 2 - 1
        with precision(DEVICE, "bf16"):
            z = encode(x).float()                                                       # (B, C, h, w)
            # noise: for a decoder that forgives small errors
            noise = 0.1 * torch.randn(z.shape, generator=rng).to(DEVICE)                # (B, C, h, w)
            error = decode(z + noise).float() - x                                       # (B, 3, H, W)
        # Channels of mean 0 and spread 1, since one scaling factor must do for all.
        flat = z.transpose(0, 1).flatten(1)                                             # (C, B h w)
        spread = flat.mean(1).square().mean() + (flat.std(1) - 1).square().mean()
        descent.step(i, loss := error.abs().mean() + 2 * error.square().mean() + 0.05 * spread)
        clock.step(i, loss)
    round_to_bf16(vae).eval()
    test, prompts = to_float(render_all(pool("vae test", 1024))), world.benchmark_prompts()
    places = np.random.default_rng([SEED, 4])
    true = world.render([world.scene_for(places, p) for p in prompts]).to(DEVICE)       # (600, 3, H, W)
    with torch.no_grad():
        z = vae.encode(test * 2 - 1)
        error = ((vae.decode(z) / 2 + 0.5).clamp(0, 1) - test).square().mean((1, 2, 3))
        again = torch.cat([vae.decode(vae.encode(part * 2 - 1)) / 2 + 0.5 for part in true.split(100)])
    folder = WEIGHTS / "vae"
    write_json(folder / "config.json", NANO.vae.to_json())
    save_safetensors(folder / "diffusion_pytorch_model.safetensors", bf16(vae), None)
    # what the judge says of true pictures after decoding bounds every model that draws through this decoder
    judged = world.task_scores(world.judge(again.cpu(), prompts), prompts)["overall"]
    clock.write(folder, psnr_db=round(float(-10 * error.log10().mean()), 2),
                latent_std=round(float(z.std()), 3), judge=round(judged, 4))


def load_vae() -> DCAE:
    vae = DCAE(NANO.vae)
    vae.load_state_dict(load_file(WEIGHTS / "vae" / "diffusion_pytorch_model.safetensors"))
    return vae.to(DEVICE).eval()


# ----------------------------------------------------------------------------- learning to see, and to read

def patch_labels(scenes: list[world.Scene], patch: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Of each patch of each scene, (B, patches) int64 each: shape and colour, of which the last class is the
    ground, and whether the middle of a thing lies in it, 0 or 1."""
    side = world.SIZE // patch
    shapes = torch.full((len(scenes), side * side), len(world.SHAPES))
    colors = torch.full((len(scenes), side * side), len(world.COLORS))
    middles = torch.zeros(len(scenes), side * side, dtype=torch.long)
    for shape in world.SHAPES:
        found = [(b, t) for b, s in enumerate(scenes) for t in s.things if t.shape == shape]
        if found:
            x, y, r = torch.tensor([(t.x, t.y, t.r) for _, t in found]).T
            share = F.avg_pool2d(world.coverage(shape, x, y, r)[:, None],
                                 patch).flatten(1)                                      # (K, patches)
            for (b, thing), covered in zip(found, share > 0.3):
                shapes[b, covered] = world.SHAPES.index(shape)
                colors[b, covered] = list(world.COLORS).index(thing.color)
                middles[b, int(thing.y // patch) * side + int(thing.x // patch)] = 1
    return shapes, colors, middles


class Seeing(nn.Module):
    """A linear head that says of every patch its shape, its colour and whether a thing has its middle there.
    Image towers learn from it in minutes what captions and answers alone teach in hours; it is thrown away
    afterwards."""

    def __init__(self, width: int, scenes: list[world.Scene]) -> None:
        super().__init__()
        self.classes = [len(world.SHAPES) + 1, len(world.COLORS) + 1, 2]
        self.head = nn.Linear(width, sum(self.classes))
        self.register_buffer("labels", torch.stack(patch_labels(scenes)))               # (3, scenes, patches)

    def loss(self, tokens: Tensor, chosen: np.ndarray | list[int]) -> Tensor:
        """tokens (B, patches, width) of the scenes `chosen`. Returns a scalar."""
        said = self.head(tokens).float().split(self.classes, -1)                   # (B, patches, classes)
        return sum(F.cross_entropy(logits.flatten(0, 1), labels.flatten())
                   for logits, labels in zip(said, self.labels[:, chosen]))


# Of each thing that a prompt names: its shape, its colour or none, its number, its side or none
SAID = [len(world.SHAPES), len(world.COLORS) + 1, len(world.NUMBERS), len(world.RELATIONS) + 1]


def things_said(prompt: world.Prompt) -> list[list[int]]:
    """The classes of SAID for each thing of a prompt; a colour or a side that is left open is 0."""
    sides = [prompt.relation, world.OPPOSITE.get(prompt.relation)]
    return [[world.SHAPES.index(shape), 1 + list(world.COLORS).index(color) if color else 0,
             count - 1, 1 + list(world.RELATIONS).index(side) if side else 0]
            for (shape, color, count), side in zip(prompt.include, sides)]


def reading_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the classes of SAID for K things side by side: logits (B, K sum(SAID)),
    labels (B, K len(SAID)), -100 where there is no thing. Returns a scalar."""
    parts = logits.split(SAID * (labels.shape[1] // len(SAID)), -1)
    return sum(F.cross_entropy(part, right) for part, right in zip(parts, labels.T))


# ----------------------------------------------------------------------------- InternVL

def word_tokenizer(words: list[str]) -> Tokenizer:
    """One token a word or sign of the list, in its order; anything else is <unk>."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex("[\n:.?,]"), "isolated"),
                                                       pre_tokenizers.Split(" ", "removed")])
    return tokenizer


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, with InternVL's special tokens; unknown words are <unk>, which the model refuses."""
    tokenizer = word_tokenizer([*SPECIAL, *world.vocabulary()])
    tokenizer.add_special_tokens(SPECIAL[:-1])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token=SPECIAL[0],
                                   eos_token=SPECIAL[2])


def sayable(scene: world.Scene) -> tuple[list[world.Prompt], bool]:
    """What may be said of a scene in training, and whether the last and fullest prompt is among it, which
    answers every question."""
    prompts = world.prompts_of(scene)
    told = [p for p in prompts if not world.is_test(p)]
    return told, bool(told) and told[-1] == prompts[-1]


def dialogue(rng: np.random.Generator, scene: world.Scene, turns: int,
             reading: float) -> tuple[list[tuple[str, str]], bool]:
    """At most `turns` different questions with answers about a scene, and whether its picture is shown; else,
    with probability `reading`, the fullest sentence stands in for it, unless that is held out."""
    asked = world.questions(rng, scene) + world.questions(rng, scene)
    if len(scene.things) == 2 and (relation := world.relation_between(*scene.things)):
        first, second = (thing.shape for thing in scene.things)
        asked += [side_question(rng, first, second, relation) for _ in range(3)] if first != second else []
    asked = list(dict.fromkeys(asked))
    pairs, (told, fully) = [asked[k] for k in rng.permutation(len(asked))[:turns]], sayable(scene)
    shown = not fully or rng.random() >= reading
    if told and rng.random() < 0.4:
        said = told[rng.integers(len(told)) if shown else -1].text
        pairs.insert(int(rng.integers(len(pairs) + 1)), ("describe the picture.", said))
    if not shown:
        sentence = world.prompts_of(scene, str(rng.choice(world.WORDINGS)))[-1].text
        if rng.random() < 0.5:
            sentence = f"generate an image: {sentence}"
        pairs[0] = (f"{sentence}. {pairs[0][0]}", pairs[0][1])
    return pairs, shown


def side_question(rng: np.random.Generator, first: str, second: str, true: str) -> tuple[str, str]:
    """Whether the first is left of, ... the second, or the other way round, when its `true` side is known;
    yes and no in balance."""
    if rng.random() < 0.5:
        first, second, true = second, first, world.OPPOSITE[true]
    asked = true if rng.random() < 0.5 else str(rng.choice([r for r in world.RELATIONS if r != true]))
    return f"is the {first} {asked} the {second}?", "yes" if asked == true else "no"


def facts(rng: np.random.Generator, kinds: tuple[int, ...] = (0, 1, 2)) -> list[tuple[str, str]]:
    """A line of one of some kinds, 0, 1 and 2: a sentence about two to six things, and what follows from
    it, as (given, answer) in turn. A line asks as much as many dialogues: this is where the language model
    learns what belongs to what.

    "a red heart, a blue star. the star is blue. the red shape is heart."
    "a red heart, a blue star. is there a red star? no. is there a blue star? yes."
    "a red heart above a blue star. below is star. above is heart. is the star left of the heart? no."

    Half of the third kind have their sentence, a training prompt, in the frame of a prompt: what stands
    where is only then to be read off where the queries will be.
    """
    kind, colors, count = kinds[rng.integers(len(kinds))], list(world.COLORS), int(rng.integers(2, 7))
    looks = [(world.SHAPES[s], colors[c]) for s, c in zip(rng.permutation(len(world.SHAPES))[:count],
                                                          rng.permutation(len(colors)))]
    if kind == 2:
        (a, _), (b, _) = looks[:2]
        relation, colored = str(rng.choice(list(world.RELATIONS))), rng.random() < 0.5
        include = tuple((shape, color if colored else None, 1) for shape, color in looks[:2])
        prompt = world.say("position", include, relation)
        if world.is_test(prompt):
            return facts(rng, kinds)
        wording, there = str(rng.choice(world.WORDINGS)), {relation: a, world.OPPOSITE[relation]: b}
        parts = [(PROMPT.format(image="", caption=wording + prompt.text) if rng.random() < 0.5
                  else f"{prompt.text}.", "")]
        for side in rng.permutation(list(there)):
            parts += [(f"{side.split()[0]} is", there[str(side)]), (".", "")]
        return parts + [side_question(rng, a, b, relation) for _ in range(4)]
    parts = [(", ".join(world.noun(*look) for look in looks) + ".", "")]
    for k in rng.permutation(count):
        shape, color = looks[k]
        if kind == 0:
            parts += [(f"the {shape} is", color) if rng.random() < 0.5 else (f"the {color} shape is", shape),
                      (".", "")]
        else:
            named = color if rng.random() < 0.5 else str(rng.choice([c for c in colors if c != color]))
            parts.append((f"is there {world.noun(shape, named)}?", "yes" if named == color else "no"))
    return parts


def encode_facts(model: ParaUni, rng: np.random.Generator,
                 kinds: tuple[int, ...] = (0, 1, 2)) -> tuple[list, list, bool]:
    """A line of facts in the form of `encode_dialogue`."""
    ids, labels = [], []
    for given, said in facts(rng, kinds):
        given, said = (model.tokenizer(text, add_special_tokens=False).input_ids for text in (given, said))
        ids += given + said
        labels += [-100] * len(given) + said
    return ids, labels, False


@torch.no_grad()
def init_vlm(vlm: nn.Module, rng: torch.Generator) -> None:
    """Initial values for a width of 128: those of transformers suit widths in the thousands, and leave the
    towers idle for hundreds of steps. Places of patches start as sines and cosines, and in the first two
    layers of the language model two heads start out attending to the last token and to the last but one:
    without them it takes longer than this training to learn that the red one in "a red heart and a blue
    star" is the heart (after 4,500 steps still a coin toss, with them 99 % right after 125)."""
    for name, p in vlm.named_parameters():
        if "lambda" in name:
            p.fill_(1.0)
        elif name.endswith("position_embeddings"):
            p[0, 1:] = 0.5 * sines(math.isqrt(p.shape[1] - 1), p.shape[2])
        elif p.ndim >= 2:
            std = 0.3 if "embed_tokens" in name else 0.02 if "lm_head" in name else \
                0.15 if "patch_embeddings" in name else 0.06
            p.normal_(0, std, generator=rng)
    for layer in vlm.model.language_model.layers[:2]:
        look_back(layer.self_attn, NANO.vlm)


def look_back(attention: nn.Module, c: VLMConfig, strength: float = 4.6) -> None:
    """Query heads 0 and 1, which share key head 0, attend 1 and 2 tokens back, whatever the tokens are: in
    rotary attention constant queries and keys, which biases are, score by distance alone."""
    half = c.width // c.num_heads // 2
    angle = c.rope_theta ** -(torch.arange(half) / half)        # radians a token, as the rotary embedding's
    attention.k_proj.weight[:2 * half] = 0
    attention.k_proj.bias[:2 * half] = strength * torch.cat([torch.ones(half), torch.zeros(half)])
    for head, distance in enumerate((1, 2)):
        rows = slice(2 * half * head, 2 * half * (head + 1))
        attention.q_proj.weight[rows] = 0
        attention.q_proj.bias[rows] = strength * torch.cat([(angle * distance).cos(),
                                                            -(angle * distance).sin()])


def sines(side: int, width: int) -> Tensor:
    """(side side, width): a quarter each of sines and cosines of the row, then of the column."""
    angle = torch.arange(side)[:, None] * 0.01 ** (torch.arange(width // 4) / (width // 4))
    axis = torch.cat([angle.sin(), angle.cos()], 1)                                     # (side, width / 2)
    return torch.cat([axis[:, None].expand(-1, side, -1), axis[None].expand(side, -1, -1)], 2).flatten(0, 1)


def train_vlm(steps: int, batch: int = 64, lr: float = 6e-3, go_on: bool = False) -> None:
    """Three lessons: the vision tower learns to see (a sixth of the steps) and is left alone from then on,
    the language model to read (a sixth), then the two to answer together.

    Lines of facts are of kind 0 while it learns to read: with all three kinds from the start, a run of 4,000
    steps named only 0.62 of the colours asked for. Later three of five are about sides: what is left of what
    took longest. `go_on` gives more of the last lesson alone, three lines a dialogue, to the weights that are
    there."""
    clock = Clock("vlm", steps, batch=batch, lr=lr)
    if go_on:
        clock.numbers |= {"command": f"python nano/pretrain.py --more {steps}",
                          "went_on_from": json.loads((WEIGHTS / "vlm" / "training.json").read_text())}
        model = ParaUni.from_parts(NANO, WEIGHTS)
    else:
        tokenizer = build_tokenizer()
        assert len(tokenizer) <= NANO.vlm.vocab_size, (
            f"{len(tokenizer)} words do not fit {NANO.vlm.vocab_size} embeddings")
        model = ParaUni(NANO, build_vlm(NANO.vlm), tokenizer)
        init_vlm(model.vlm, generator(SEED, "vlm"))
    vlm = model.to(DEVICE).vlm.requires_grad_(True)
    vlm.set_attn_implementation("eager")                         # for the bf16 gradient, as in `precision`
    scenes = pool("vlm", 40000, 0.4)
    told = np.flatnonzero([sayable(scene)[1] for scene in scenes])
    everything = np.arange(len(scenes))
    images, seeing = render_all(scenes), Seeing(NANO.vlm.vision_width, scenes)
    taught, done = nn.ModuleList([vlm, seeing]).to(DEVICE), 0
    sixth = max(1, steps // 6)
    answer = partial(draw_rows, model, scenes=scenes, of=everything, batch=batch, reading=0.4,
                     kinds=(0, 1, 2, 2, 2))
    lessons = {"answer": (steps, partial(answer, lines=3 * batch))} if go_on else {
        "see": (sixth, lambda rng: (rng.integers(len(scenes), size=3 * batch), [])),
        "read": (sixth, lambda rng: draw_rows(model, rng, scenes, told, batch, 1.0, lines=batch, kinds=(0,))),
        "answer": (max(1, steps - 2 * sixth), partial(answer, lines=batch // 2))}
    for lesson, (count, draw) in lessons.items():
        vlm.model.vision_tower.requires_grad_(lesson == "see")
        descent = Descent(taught, count, lr)
        for i, (chosen, rows) in enumerate(drawn(f"vlm {lesson}", count, draw)):
            with precision(DEVICE, "bf16"):
                if lesson == "see":
                    pixels = model.pixels(to_float(images[chosen]))
                    tokens = vlm.model.vision_tower(pixels).last_hidden_state[:, 1:]    # (B, patches, width)
                    loss = seeing.loss(tokens, chosen)
                else:
                    loss = answer_loss(model, rows, images[chosen])
            descent.step(i, loss)
            clock.step(done + i, loss)
            if (done + i + 1) % 500 == 0:
                print(json.dumps({"answers_right": answer_score(model, 500)}), flush=True)
                save_vlm(model)
        done += count
    round_to_bf16(vlm)
    save_vlm(model)
    clock.write(WEIGHTS / "vlm", answers_right=round(answer_score(model), 4))


def draw_rows(model: ParaUni, rng: np.random.Generator, scenes: list[world.Scene], of: np.ndarray, batch: int,
              reading: float, lines: int, kinds: tuple[int, ...]) -> tuple[np.ndarray, list]:
    """The numbers of some scenes out of `of`, and encoded a dialogue about each, then some lines of facts."""
    chosen = rng.choice(of, batch)
    rows = [encode_dialogue(model, *dialogue(rng, scenes[j], 6, reading)) for j in chosen]
    return chosen, rows + [encode_facts(model, rng, kinds) for _ in range(lines)]


def save_vlm(model: ParaUni) -> None:
    copy.deepcopy(model.vlm).to("cpu", torch.bfloat16).save_pretrained(WEIGHTS / "vlm")
    model.tokenizer.save_pretrained(WEIGHTS / "vlm")


def answer_loss(model: ParaUni, rows: list[tuple[list[int], list[int], bool]], images: Tensor) -> Tensor:
    """Next-token loss on the answers of some dialogues, those about a picture with it;
    row i's picture is images[i]."""
    shown = torch.tensor([seen for _, _, seen in rows])
    ids, labels = (nn.utils.rnn.pad_sequence([torch.tensor(row[k]) for row in rows], batch_first=True,
                                             padding_value=pad).to(model.device)
                   for k, pad in ((0, 0), (1, -100)))                                   # (B, S) each
    asked = labels[:, 1:] != -100
    embeds = model.embed(ids, to_float(images[shown[:len(images)]]) if shown.any() else None)
    # without a mask: padding comes last
    hidden = model.vlm.model.language_model(inputs_embeds=embeds).last_hidden_state[:, :-1]
    return F.cross_entropy(model.vlm.lm_head(hidden[asked]).float(), labels[:, 1:][asked])


def encode_dialogue(model: ParaUni, pairs: list[tuple[str, str]],
                    shown: bool) -> tuple[list[int], list[int], bool]:
    """Token ids, and labels that are -100 but on the answers and their ends."""
    ids, labels = [], []
    for k, (question, answer) in enumerate(pairs):
        image = model.image_text() if shown and k == 0 else ""
        asked = model.tokenizer(QUESTION.format(image=image, question=question),
                                add_special_tokens=False).input_ids
        said = model.tokenizer(f"{answer}<|im_end|>\n", add_special_tokens=False).input_ids
        ids += asked + said
        labels += [-100] * len(asked) + said
    return ids, labels, shown


def answer_score(model: ParaUni, count: int = 2000) -> float:
    """Share of right answers to single questions about held-out pictures."""
    images, pairs = world.question_set(count, SEED)
    said = [a for i in range(0, count, 250)
            for a in model.answer(images[i:i + 250].to(model.device), [q for q, _ in pairs[i:i + 250]], 4)]
    return float(np.mean([a == right for a, (_, right) in zip(said, pairs)]))


# ----------------------------------------------------------------------------- SANA

class TextEncoder(nn.Module):
    """The stand-in for SANA's Gemma: prompt tokens -> (B, S, E),
    a small bidirectional transformer trained with the DiT."""

    def __init__(self, vocab_size: int, width: int, max_tokens: int = 24) -> None:
        super().__init__()
        self.token = nn.Embedding(vocab_size, width)
        self.position = nn.Parameter(torch.randn(max_tokens, width))    # as loud as the words
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True,
                                           norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids (B, S), 0 = padding -> features (B, S, E), mask (B, S) with 1 = token."""
        x = self.token(ids) + self.position[:ids.shape[1]]                              # (B, S, E)
        return self.norm(self.layers(x, src_key_padding_mask=ids == 0)), (ids != 0).float()


def token_table(tokenizer: PreTrainedTokenizerFast, texts: list[str], length: int = 16) -> Tensor:
    """Ids (B, length), each text closed by <|im_end|> so that the empty one has a token, padded with 0."""
    rows = tokenizer([t + "<|im_end|>" for t in texts], add_special_tokens=False).input_ids
    assert max(map(len, rows)) <= length, f"a prompt of {max(map(len, rows))} tokens does not fit {length}"
    return torch.tensor([row + [0] * (length - len(row)) for row in rows])


def phrases(tokenizer: PreTrainedTokenizerFast, prompts: list[world.Prompt], ids: Tensor) -> Tensor:
    """What each word of each prompt, ids (B, S), has to know: of "a red heart left of a blue star" every word
    of "a red heart" that this is a heart, red, one, and left of the other. Returns (B, S, 4): shape, colour,
    number, side; -100 at all other words, and 0 for a colour or a side left open."""
    out = torch.full((*ids.shape, len(SAID)), -100)
    for b, prompt in enumerate(prompts):
        for thing, numbers in zip(prompt.include, things_said(prompt)):
            words = tokenizer(world.noun(*thing), add_special_tokens=False).input_ids
            start = next(i for i in range(ids.shape[1]) if ids[b, i:i + len(words)].tolist() == words)
            out[b, start:start + len(words)] = torch.tensor(numbers)
    return out


def teach_reading(text: TextEncoder, tokenizer: PreTrainedTokenizerFast, scenes: list[world.Scene],
                  steps: int, batch: int = 128) -> float:
    """The text encoder learns, before there is a DiT, what `phrases` says, through a linear head that is
    thrown away: SANA's own has read before, too. Returns the share of test words of which all is known."""
    device = text.position.device
    reader = nn.ModuleDict({"text": text, "head": nn.Linear(text.position.shape[1], sum(SAID))}).to(device)
    descent = Descent(reader, steps, 6e-3)

    def draw(rng: np.random.Generator, test: bool = False) -> tuple[Tensor, Tensor]:
        _, prompts = said_of(rng, scenes, batch, test)
        ids = token_table(tokenizer, [p.text for p in prompts])                         # (B, S)
        return ids, phrases(tokenizer, prompts, ids)                                    # (B, S, 4)

    def read(ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with precision(device, "bf16"):
            said = reader["head"](text(ids.to(device))[0]).float()                      # (B, S, all classes)
        known = labels[..., 0] != -100
        return said[known], labels[known].to(device)                                    # (words, ...) each

    for i, drawing in enumerate(drawn("reading", steps, draw)):
        descent.step(i, reading_loss(*read(*drawing)))
    rng = np.random.default_rng([SEED, *b"reading test"])
    with torch.no_grad():
        right = [torch.stack([part.argmax(-1) for part in said.split(SAID, -1)], 1).eq(labels).all(1)
                 for said, labels in (read(*draw(rng, test=True)) for _ in range(8))]
    return float(torch.cat(right).float().mean())


def logit_normal(count: int, rng: torch.Generator, mean: float = 0.6) -> Tensor:
    """Times that favour the noisy side, where numbers and places are decided."""
    return torch.sigmoid(torch.randn(count, generator=rng) + mean)


def encode_pool(name: str, size: int) -> tuple[list[world.Scene], Tensor]:
    """Scenes and their latents (B, C, h, w)."""
    scenes, vae = pool(name, size), load_vae()
    with torch.no_grad():
        return scenes, torch.cat([vae.encode(to_float(part) * 2 - 1)
                                  for part in render_all(scenes).split(256)])


def train_dit(steps: int, batch: int = 192, lr: float = 1e-2) -> None:
    """The flow-matching loss, and a quarter of that of a `Seeing` head that tells from the tokens inside the
    DiT what the clean picture will show at each place: after REPA (arXiv 2410.06940), with true labels in
    place of another network's features."""
    clock = Clock("dit", steps, batch=batch, lr=lr)
    tokenizer, rng = build_tokenizer(), generator(SEED, "dit", "draws")
    torch.manual_seed(SEED)
    text, dit = TextEncoder(len(tokenizer), NANO.dit.caption_channels), DiT(NANO.dit)
    dit.init_weights(generator(SEED, "dit"))
    both = nn.ModuleDict({"text": text, "dit": dit}).to(DEVICE)
    scenes, latents = encode_pool("dit", 40000)
    words_known = teach_reading(text, tokenizer, scenes, max(1, steps // 20))
    print(json.dumps({"words_known": round(words_known, 4)}), flush=True)
    seeing, inside = Seeing(NANO.dit.width, scenes).to(DEVICE), {}
    dit.transformer_blocks[3].register_forward_hook(lambda block, given, tokens: inside.update(tokens=tokens))
    params, descent = dict(both.named_parameters()), Descent(nn.ModuleList([both, seeing]), steps, lr)
    ema = {name: p.detach().clone() for name, p in params.items()}
    network = torch.compile(dit)

    def draw(rng: np.random.Generator) -> tuple[list[int], Tensor]:
        chosen, prompts = said_of(rng, scenes, batch)
        texts = ["" if rng.random() < 0.1 else p.text for p in prompts]                 # caption dropout
        return chosen, token_table(tokenizer, texts)

    for i, (chosen, ids) in enumerate(drawn("dit", steps, draw)):
        x0 = latents[chosen]                                                            # (B, C, h, w)
        t = logit_normal(batch, rng).to(DEVICE)                                         # (B,)
        noise = torch.randn(x0.shape, generator=rng).to(DEVICE)                         # (B, C, h, w)
        x = (1 - t.view(-1, 1, 1, 1)) * x0 + t.view(-1, 1, 1, 1) * noise                # (B, C, h, w)
        with precision(DEVICE, "bf16"):
            v = network(x, t, *text(ids.to(DEVICE)))
            seen = seeing.loss(inside["tokens"], chosen)
        loss = F.mse_loss(v.float(), noise - x0)
        descent.step(i, loss + 0.25 * seen)
        ema_update(ema, params, min(0.999, (i + 1) / (i + 10)))
        clock.step(i, loss)
        if (i + 1) % 1000 == 0 or i + 1 == steps:
            save_dit(text, dit, ema)
            print(json.dumps(judge_dit(200)), flush=True)
    clock.write(WEIGHTS / "transformer", words_known=round(words_known, 4), **judge_dit(600))


def save_dit(text: TextEncoder, dit: DiT, ema: dict[str, Tensor]) -> None:
    named = {name: t.bfloat16() for name, t in ema.items()}
    write_json(WEIGHTS / "transformer" / "config.json", NANO.dit.to_json())
    for part, folder in (("dit", "transformer/diffusion_pytorch_model"), ("text", "text_encoder/model")):
        save_safetensors(WEIGHTS / f"{folder}.safetensors",
                         {n.removeprefix(part + "."): t
                          for n, t in named.items() if n.startswith(part + ".")}, None)


def judge_dit(count: int) -> dict[str, float]:
    """Judge scores of the written DiT under its own text encoder on every (600 // count)th test prompt."""
    tokenizer, vae, dit = build_tokenizer(), load_vae(), DiT(NANO.dit).to(DEVICE).eval()
    text = TextEncoder(len(tokenizer), NANO.dit.caption_channels).to(DEVICE).eval()
    dit.load_state_dict(load_file(WEIGHTS / "transformer" / "diffusion_pytorch_model.safetensors"))
    text.load_state_dict(load_file(WEIGHTS / "text_encoder" / "model.safetensors"))
    prompts, verdicts = world.benchmark_prompts()[::600 // count], []
    with torch.no_grad():
        for i in range(0, len(prompts), 100):
            part = prompts[i:i + 100]
            ids = token_table(tokenizer, [p.text for p in part] + [""]).to(DEVICE)      # (B + 1, S)
            c, mask = text(ids)                                                         # (B + 1, S, E)
            noise = randn((len(part), *NANO.latent_shape),
                          [generator(SEED, "judge", i + k) for k in range(len(part))], DEVICE)
            doubled = (torch.cat([c[-1:].expand(len(part), -1, -1), c[:-1]]),
                       torch.cat([mask[-1:].expand(len(part), -1), mask[:-1]]))
            drawings = vae.decode(text_sample(dit, noise, *doubled)) / 2 + 0.5          # (B, 3, H, W)
            verdicts += world.judge(drawings.cpu(), part)
    return {k: round(v, 4) for k, v in world.task_scores(verdicts, prompts).items()}


def text_sample(dit: DiT, noise: Tensor, c: Tensor, mask: Tensor, steps: int = 20,
                shift: float = 3.0) -> Tensor:
    """Euler sampling under masked text of unequal length, guidance 4.5;
    c (2 B, S, E), unconditional half first."""
    times = shift_time(torch.linspace(1, 0, steps + 1, device=noise.device), shift)
    x, kv = noise, dit.cross_kv(c, mask)
    for t, t_next in zip(times[:-1], times[1:]):
        x = x + (t_next - t) * guided_velocity(dit, x, t.expand(len(x)), kv, 4.5)
    return x


# ----------------------------------------------------------------------------- reward models

CLIP = {"embed_dim": 64, "quick_gelu": False,
        "vision_cfg": {"image_size": 32, "layers": 4, "width": 128, "head_width": 32, "patch_size": 4,
                       "mlp_ratio": 2.0},
        "text_cfg": {"context_length": 20, "vocab_size": 96, "width": 128, "heads": 4, "layers": 3,
                     "mlp_ratio": 2.0}}


def clip_tokenizer() -> Tokenizer:
    """The words of the world, <unk>, and the end token, which must have the highest id:
    open_clip pools there."""
    names = ["<pad>", "<unk>", *world.vocabulary()]
    tokenizer = word_tokenizer([*names, "<end>"])
    tokenizer.post_processor = processors.TemplateProcessing("$A <end>",
                                                             special_tokens=[("<end>", len(names))])
    return tokenizer


class Truth:
    """Which prompts are true of which scenes, whole batches at a time:
    counts of every look, and the sides of pairs."""

    def __init__(self, scenes: list[world.Scene]) -> None:
        self.shapes, self.colors = list(world.SHAPES), [None, *world.COLORS]
        # counts (scenes, S, 1 + colours)
        self.counts = np.zeros((len(scenes), len(self.shapes), len(self.colors)), int)
        self.sides = np.zeros((len(scenes), len(world.RELATIONS), len(self.shapes), len(self.shapes)), bool)
        self.moods = np.array([world.mood(s) for s in scenes])
        for i, scene in enumerate(scenes):
            for thing in scene.things:
                self.counts[i, self.shapes.index(thing.shape), [0, self.colors.index(thing.color)]] += 1
            if len(scene.things) == 2 and (relation := world.relation_between(*scene.things)):
                a, b = (self.shapes.index(t.shape) for t in scene.things)
                names = list(world.RELATIONS)
                self.sides[i, names.index(relation), a, b] = True
                self.sides[i, names.index(world.OPPOSITE[relation]), b, a] = True

    def of(self, chosen: list[int], prompts: list[world.Prompt], moods: list[str | None]) -> Tensor:
        """(scenes, prompts) bool."""
        out = np.ones((len(chosen), len(prompts)), bool)
        for k, (prompt, mood) in enumerate(zip(prompts, moods)):
            for shape, color, count in prompt.include:
                have = self.counts[chosen, self.shapes.index(shape), self.colors.index(color)]
                out[:, k] &= have == count if prompt.task == "counting" else have >= count
            if prompt.relation:
                a, b = (self.shapes.index(shape) for shape, _, _ in prompt.include)
                out[:, k] &= self.sides[chosen, list(world.RELATIONS).index(prompt.relation), a, b]
            if mood:
                out[:, k] &= self.moods[chosen] == mood
        return torch.from_numpy(out)


def contrastive_loss(model: nn.Module, images: Tensor, ids: Tensor, truth: Tensor) -> Tensor:
    """CLIP's loss. ids (B + M, S): the B pictures' own captions, then M wrong ones that only the pictures
    must rank low; truth (B, B + M) marks the pairs that are true, which are no negatives whoever
    wrote them."""
    B = len(images)
    image = F.normalize(model.encode_image(images), dim=-1)                             # (B, E)
    text = F.normalize(model.encode_text(ids), dim=-1)                                  # (B + M, E)
    logits = model.logit_scale.exp() * image @ text.T                                   # (B, B + M)
    logits = logits.masked_fill(truth & ~torch.eye(B, len(ids), dtype=torch.bool, device=truth.device), -1e4)
    target = torch.arange(B, device=truth.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits[:, :B].T, target)) / 2


class CaptionedScenes:
    """Batches of scenes with a caption of each, the mood of the ground said in half of them,
    and wrong captions."""

    def __init__(self, name: str, size: int, test: bool = False) -> None:
        rng, self.test = np.random.default_rng([SEED, *name.encode(), 1]), test
        self.scenes = [s for s in pool(name, size) if world.sample_prompt(rng, s, test)]
        self.images, self.truth = render_all(self.scenes), Truth(self.scenes)
        self.encode = text_encoder(clip_tokenizer(), CLIP["text_cfg"]["context_length"],
                                   CLIP["text_cfg"]["vocab_size"])

    def draw(self, rng: np.random.Generator, count: int) -> tuple[list[int], list[world.Prompt]]:
        return said_of(rng, self.scenes, count, self.test)

    def batch(self, rng: np.random.Generator, count: int, wrong: int) -> tuple[list[int], Tensor, Tensor]:
        """The numbers of B scenes, ids (B + wrong B, S), truth (B, B + wrong B)."""
        chosen, prompts = self.draw(rng, count)
        moods = [world.mood(self.scenes[j]) if rng.random() < 0.5 else None for j in chosen] * (1 + wrong)
        said = prompts + [world.corrupt(rng, p) for _ in range(wrong) for p in prompts]
        ids = self.encode([p.text + (f", {m}" if m else "") for p, m in zip(said, moods)])
        return chosen, ids, self.truth.of(chosen, said, moods)

    def pixels(self, chosen: list[int]) -> Tensor:
        """Pictures (B, 3, H, W) as CLIP wants them."""
        return normalise(to_float(self.images[chosen]))


def normalise(images: Tensor) -> Tensor:
    return preprocess(images, CLIP["vision_cfg"]["image_size"])


def train_clip(steps: int, batch: int = 96, lr: float = 3e-3) -> None:
    """A third of the steps teach the image tower to see and the text tower to read: a linear head finds all
    that is said of both things in the embedding of a caption. The others compare pictures with captions."""
    clock = Clock("clip", steps, batch=batch, lr=lr)
    torch.manual_seed(SEED)
    model, data = build_clip({"model_cfg": CLIP}), CaptionedScenes("clip", 30000)
    seeing, alone = Seeing(CLIP["vision_cfg"]["width"], data.scenes), steps // 3
    reading = nn.Linear(CLIP["embed_dim"], 2 * sum(SAID))
    taught = nn.ModuleList([model, seeing, reading]).to(DEVICE)

    def alone_draw(rng: np.random.Generator) -> tuple[list[int], Tensor, Tensor]:
        chosen, prompts = data.draw(rng, batch)
        known = [(things_said(p) + [[-100] * len(SAID)])[:2] for p in prompts]
        return chosen, data.encode([p.text for p in prompts]), torch.tensor(known).flatten(1)

    model.visual.output_tokens = True
    descent = Descent(taught, alone, lr, 0.05)
    for i, (chosen, ids, known) in enumerate(drawn("clip alone", alone, alone_draw)):
        with precision(DEVICE, "bf16"):
            loss = seeing.loss(model.visual(data.pixels(chosen))[1], chosen)
            said = reading(model.encode_text(ids.to(DEVICE))).float()
            loss = loss + reading_loss(said, known.to(DEVICE))
        descent.step(i, loss)
        clock.step(i, loss)
    model.visual.output_tokens = False
    descent = Descent(taught, steps - alone, lr, 0.05)
    batches = drawn("clip together", steps - alone, lambda rng: data.batch(rng, batch, wrong=2))
    for i, (chosen, ids, truth) in enumerate(batches):
        with precision(DEVICE, "bf16"):
            loss = contrastive_loss(model, data.pixels(chosen), ids.to(DEVICE), truth.to(DEVICE))
        descent.step(i, loss)
        model.logit_scale.data.clamp_(max=math.log(100))
        clock.step(alone + i, loss)
    round_to_bf16(model).eval()
    write_clip(WEIGHTS / "clip", model)
    clock.write(WEIGHTS / "clip", beats_wrong_caption=round(right_over_wrong(model), 4))


def write_clip(folder: Path, model: nn.Module) -> None:
    save_reward(folder, copy.deepcopy(model).to("cpu", torch.bfloat16), {"model_cfg": CLIP}, clip_tokenizer())


def load_clip() -> nn.Module:
    model = build_clip({"model_cfg": CLIP})
    model.load_state_dict(load_file(WEIGHTS / "clip" / "model.safetensors"))
    return model.to(DEVICE)


@torch.no_grad()
def right_over_wrong(model: nn.Module, count: int = 2000) -> float:
    """How often a test picture scores higher with its own test prompt
    than with a prompt wrong in one point."""
    data, rng = CaptionedScenes("clip test", 4 * count, test=True), np.random.default_rng([SEED, 5])
    chosen, prompts = data.draw(rng, count)
    wrong = [world.corrupt(rng, p) for p in prompts]
    image = F.normalize(model.encode_image(data.pixels(chosen)), dim=-1)                # (B, E)
    right, other = (F.normalize(model.encode_text(data.encode([p.text for p in said]).to(DEVICE)), dim=-1)
                    for said in (prompts, wrong))                                       # (B, E) each
    return float(((image * right).sum(1) > (image * other).sum(1)).float().mean())


def pairs_of_pictures(data: CaptionedScenes, vae: DCAE, rng: np.random.Generator,
                      count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts (B, S), better and worse pictures (B, 3, H, W): the worse one shows something else,
    or is decoded from noisier latents.

    Both come through the autoencoder, as generated pictures do, and have the same light.
    """
    chosen, prompts = data.draw(rng, count)
    scenes = [data.scenes[j] for j in chosen]
    other = [replace(world.scene_for(rng, world.corrupt(rng, p)), light=s.light)
             for p, s in zip(prompts, scenes)]
    wrong = torch.from_numpy(rng.random(count) < 0.5)                                   # (B,)
    low = torch.from_numpy(rng.uniform(0.0, 0.3, count)).float()                        # (B,) noise, better
    high = torch.where(wrong, low, low + torch.from_numpy(rng.uniform(0.2, 0.8, count)).float())
    better, worse = world.render(scenes), world.render(other)
    worse = torch.where(wrong[:, None, None, None], worse, better)                      # (B, 3, H, W)
    with torch.no_grad():
        z = vae.encode(torch.cat([better, worse]).to(DEVICE) * 2 - 1)                   # (2 B, C, h, w)
        noise = torch.cat([low, high])[:, None, None, None] * torch.from_numpy(rng.standard_normal(z.shape))
        pictures = vae.decode(z + noise.float().to(DEVICE)) / 2 + 0.5
    better, worse = pictures.clamp(0, 1).chunk(2)
    return data.encode([p.text for p in prompts]).to(DEVICE), better, worse


def train_pick(steps: int, batch: int = 48, lr: float = 3e-4) -> None:
    clock = Clock("pick", steps, batch=batch, lr=lr)
    model, data, vae = load_clip(), CaptionedScenes("pick", 30000), load_vae()
    descent = Descent(model, steps, lr, 0.05)
    for i in range(steps):
        rng = np.random.default_rng([SEED, *b"pick", i])
        asked, better, worse = pairs_of_pictures(data, vae, rng, batch)
        chosen, ids, truth = data.batch(rng, batch, wrong=1)
        with precision(DEVICE, "bf16"):
            margin = preference_margin(model, asked, better, worse)                     # (B,)
            loss = -F.logsigmoid(margin).mean() + 0.3 * contrastive_loss(
                model, data.pixels(chosen), ids.to(DEVICE), truth.to(DEVICE))
        descent.step(i, loss)
        model.logit_scale.data.clamp_(max=math.log(100))
        clock.step(i, loss)
    round_to_bf16(model).eval()
    write_clip(WEIGHTS / "pickscore", model)
    test, rng = CaptionedScenes("pick test", 4000, test=True), np.random.default_rng([SEED, 6])
    with torch.no_grad():
        right = (preference_margin(model, *pairs_of_pictures(test, vae, rng, 1000)) > 0).float().mean()
    clock.write(WEIGHTS / "pickscore", prefers_the_better=round(float(right), 4))


def preference_margin(model: nn.Module, ids: Tensor, better: Tensor, worse: Tensor) -> Tensor:
    """How much higher the better picture scores, (B,), in units of the logits."""
    text = F.normalize(model.encode_text(ids), dim=-1)                                  # (B, E)
    image = F.normalize(model.encode_image(normalise(torch.cat([better, worse]))),
                        dim=-1)                                                         # (2 B, E)
    score = model.logit_scale.exp() * (image * text.repeat(2, 1)).sum(1)                # (2 B,)
    return score[:len(ids)] - score[len(ids):]


def train_aes(steps: int, batch: int = 256, lr: float = 1e-3) -> None:
    """Regression of 1 + 9 light from CLIP's unit embedding of pictures that went through the autoencoder."""
    clock = Clock("aes", steps, batch=batch, lr=lr)
    model, vae = load_clip(), load_vae()
    torch.manual_seed(SEED)
    head = AestheticHead(CLIP["embed_dim"], (32, 16, 16, 8)).to(DEVICE)
    opt, rng = adamw(head.parameters(), lr, 0.01), generator(SEED, "aes")

    @torch.no_grad()
    def features(name: str, count: int) -> tuple[Tensor, Tensor]:
        scenes, out = pool(name, count), []
        for part in world.render(scenes).split(250):
            z = vae.encode(part.to(DEVICE) * 2 - 1)                                     # (B, C, h, w)
            noise = 0.3 * torch.rand(len(z), 1, 1, 1, generator=rng) * torch.randn(z.shape, generator=rng)
            pictures = (vae.decode(z + noise.to(DEVICE)) / 2 + 0.5).clamp(0, 1)
            out.append(F.normalize(model.encode_image(normalise(pictures)), dim=-1))
        return torch.cat(out), torch.tensor([1 + 9 * s.light for s in scenes], device=DEVICE)

    x, y = features("aes", 6000)
    for i in range(steps):
        chosen = torch.randint(len(x), (batch,), generator=rng)
        for group in opt.param_groups:
            group["lr"] = cosine_lr(i, steps, 50, lr)
        opt.zero_grad(set_to_none=True)
        (loss := F.mse_loss(head(x[chosen]), y[chosen])).backward()
        opt.step()
        clock.step(i, loss)
    x, y = features("aes test", 1000)
    head = round_to_bf16(head).eval()
    save_aesthetic_head(WEIGHTS / "aesthetic", copy.deepcopy(head).to("cpu", torch.bfloat16))
    with torch.no_grad():
        error = (head(x) - y).square().mean().sqrt()
    clock.write(WEIGHTS / "aesthetic", rmse=round(float(error), 3))


def ship(run_dir: Path) -> None:
    """Put the weights of a stage I or II run, in bf16, among the shipped ones, with the record of how they
    were made; if `evaluate.py geneval --out RUN_DIR` has judged them, with its scores."""
    path = next(run_dir.glob("stage[12].safetensors"))
    tensors, metadata = read_safetensors(path)
    here, there = str(run_dir), f"runs/{path.stem}"   # where the run lay on this machine is nobody's business
    metadata = {name: text.replace(here, there) for name, text in metadata.items()}
    save_safetensors(WEIGHTS / path.name, {name: t.bfloat16() for name, t in tensors.items()}, metadata)
    record = json.loads(path.with_suffix(".json").read_text().replace(here, there))
    if (judged := run_dir / "geneval.json").is_file():
        scores = json.loads(judged.read_text())
        record["judge"] = {"name": scores["name"], "settings": scores["settings"], **scores["tasks"],
                           "overall": scores["overall"]}
    write_json(WEIGHTS / f"{path.stem}.json", record)


PARTS = {"vae": (train_vae, 900), "vlm": (train_vlm, 5000), "dit": (train_dit, 6000),
         "clip": (train_clip, 4500), "pick": (train_pick, 800), "aes": (train_aes, 2000)}


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("parts", nargs="*", metavar="PART",
                        help=f"what to train, of {', '.join(PARTS)} (default: everything)")
    parser.add_argument("--scale", type=float, default=1.0,
                        help="multiplies every number of steps; for a quick look")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--more", type=int, metavar="STEPS",
                         help="instead: this many more steps of the last lesson for the vlm that is there")
    instead.add_argument("--ship", type=Path, metavar="RUN_DIR",
                         help="instead: put a stage I or II run's weights among the shipped ones")
    return parser


def main() -> None:
    parser = arguments()
    args = parser.parse_args()
    if args.parts and (args.ship or args.more is not None):
        parser.error(f"expected no parts beside --more and --ship, got {args.parts[0]!r}")
    if args.ship:
        return ship(args.ship)
    if args.more is not None:
        if args.more < 1:
            parser.error(f"expected --more of at least 1, got {args.more}")
        return train_vlm(args.more, batch=20, lr=3e-3, go_on=True)
    if unknown := [part for part in args.parts if part not in PARTS]:
        parser.error(f"expected parts of {', '.join(PARTS)}, got {unknown[0]!r}")
    for part in args.parts or PARTS:
        train, steps = PARTS[part]
        train(max(1, round(steps * args.scale)))


if __name__ == "__main__":
    main()
