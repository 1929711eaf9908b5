"""Stage 0 of the nano model: train what the paper downloads.

    python nano/pretrain.py [PART ...]

    vae      DC-AE, on pictures of the nano world
    vlm      InternVL, on questions about pictures and about sentences, and on what a prompt plans
    clip     CLIP, on pictures and captions
    dit      SANA, on latents and prompts, which CLIP's text tower reads to it
    pick     the preference model: CLIP tuned on what a crowd thinks of pairs, which is known by construction
    aes      the aesthetic head: from CLIP's features to how bright the ground is, 1 to 10

in this order, since later ones need earlier ones, into runs/parts (--out). All are the classes of the full
size with smaller numbers, written in the layout of their published counterparts. All trainings share one
loop, `train`. None of them is shown, by itself, what a test prompt says, in a caption, a question or a
picture (of a single shape: in its wording); longer lists, and pictures of three and four things that differ
(vae, vlm), may hold it.

Letters: B pictures or texts, S tokens, P patches, K things, D width of a tower, E of a condition or
embedding, C h w latent.
"""
import copy
import json
import math
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import (Refused, adamw, atomic, cosine_lr, environment, generator, knob, parse_config, precision,
                    run, set_lr, write_json)
from dit import DiT, flow_matching_loss, randn, sample_ode
from model import PRESETS, PROMPT, QUESTION, ParaUni
from nano import world
from nano.world import Prompt, Rng, Scene, pick
from rewards import AestheticHead, preprocess
from tools.convert import published_config
from vae import DCAE

SEED = 0
NANO = PRESETS["nano"]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PATCH = 4                                                   # pixels, of all three networks that see
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<unk>"]
IMAGE = f"<img>{'<IMG_CONTEXT>' * NANO.vlm.image_seq_length}</img>\n"
VISION = {"image_size": world.SIZE, "patch_size": PATCH,
          "width": 128, "layers": 4, "head_width": 32, "mlp_ratio": 2.0}
TEXT = {"context_length": 20, "vocab_size": 96,
        "width": 128, "layers": 3, "heads": 4, "mlp_ratio": 2.0, "hf_tokenizer_name": "nano"}
CLIP_CONFIG = {"embed_dim": 96, "vision_cfg": VISION, "text_cfg": TEXT}

Scores = dict[str, float]
# what is given and what is answered, in turn; a list: a word for each token that is given
Parts = list[tuple[str, str | list[str]]]


# ----------------------------------------------------------------------------- the loop

def train(name: str, net: nn.Module, steps: int, lr: float, draw: Callable, loss_of: Callable,
          weight_decay: float = 0.01) -> None:
    """The loop of all trainings: draw a batch, take its loss, descend, log.

    draw     Rng -> batch: lists, and tensors on the CPU; a function of (SEED, name, step) alone
    loss_of  *batch -> scalar

    Muon (arXiv 2502.16982) for the matrices of the layers, AdamW for the rest: after 250 steps the vision
    tower names 95 % of the shapes that it sees, with AdamW alone 78 % at best.
    """
    params = {key: p for key, p in net.named_parameters() if p.requires_grad}
    matrices, others = [], []
    for key, p in params.items():
        in_layer = re.search(r"layer|block|projector|up_|down_", key) and not key.endswith("table")
        is_matrix = in_layer and p.ndim >= 2 and p[0].numel() >= 32
        (matrices if is_matrix else others).append(p)
    # Muon wants two dimensions: views of the same memory, in a convolution a row for an output channel
    views = [nn.Parameter(p.detach().view(len(p), -1)) for p in matrices]
    muon = torch.optim.Muon(views, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    peaks = {muon: lr, adamw(others, lr, weight_decay): min(lr, 1.5e-3)}

    # batches are made by other processes where a GPU would wait for them
    workers = 8 if DEVICE.type == "cuda" else 0
    batches = DataLoader(range(steps), batch_size=None, num_workers=workers,
                         multiprocessing_context="fork" if workers else None,
                         collate_fn=lambda step: draw(rng_of(name, step)))
    start, losses = time.time(), []
    for step, batch in enumerate(batches):
        for optimizer, peak in peaks.items():
            set_lr(optimizer, cosine_lr(step, steps, 50, peak))

        with precision(DEVICE, "bf16"):
            loss = loss_of(*batch)
        net.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(params.values(), 1.0)
        for p, view in zip(matrices, views):
            view.grad = None if p.grad is None else p.grad.flatten(1)
        for optimizer in peaks:
            optimizer.step()

        losses.append(loss.detach())                        # read later: a GPU need not wait
        if len(losses) == 100 or step + 1 == steps:
            mean = float(torch.stack(losses).mean())
            seconds = time.time() - start
            print(f"{name:10} {step + 1:6}/{steps} loss {mean:.4f} {seconds:6.0f} s", flush=True)
            losses = []


# ----------------------------------------------------------------------------- what is drawn, what is written

def rng_of(name: str, step: int = 0) -> Rng:
    return np.random.default_rng([SEED, *name.encode(), step])


def pool(name: str, size: int, mixed: float = 0.0, test: bool = False) -> list[Scene]:
    """`size` scenes. For training, none is a picture of what a test prompt says."""
    rng = rng_of(name)
    scenes = []
    while len(scenes) < size:
        scene = world.sample_scene(rng, mixed)
        if test or not world.is_test_scene(scene):
            scenes.append(scene)
    return scenes


def draw_prompts(rng: Rng, scenes: list[Scene], count: int,
                 test: bool = False) -> tuple[list[Scene], list[Prompt]]:
    """`count` of the scenes, and a prompt that each fulfils."""
    shown, prompts = [], []
    while len(shown) < count:
        scene = scenes[rng.integers(len(scenes))]
        prompt = world.sample_prompt(rng, scene, test)
        if prompt:
            shown.append(scene)
            prompts.append(prompt)
    return shown, prompts


def draw_pictures(rng: Rng, scenes: list[Scene], count: int) -> tuple:
    """Of `count` scenes the labels of their patches (3, B, P) and the pictures (B, 3, H, W) in [0, 1]."""
    shown = [scenes[j] for j in rng.integers(len(scenes), size=count)]
    return patch_labels(shown), world.render(shown)


def write_weights(path: Path, net: nn.Module) -> None:
    """In bf16; `net` gets the same numbers, to be scored with them."""
    state = {name: tensor.to("cpu", torch.bfloat16) for name, tensor in net.state_dict().items()}
    net.load_state_dict(state)
    net.eval()
    with atomic(path) as temporary:
        save_file(state, temporary)


def write_part(folder: Path, net: DiT | DCAE) -> None:
    write_json(folder / "config.json", published_config(net.config))
    write_weights(folder / "diffusion_pytorch_model.safetensors", net)


def load(net: nn.Module, folder: Path) -> Any:
    """`net` with the weights that an earlier training wrote."""
    path = next(folder.glob("*.safetensors"), None)
    if path is None:
        raise Refused(f"no weights in {folder}: expected the parts before this one to be trained into --out")
    net.load_state_dict(load_file(path))
    return net.to(DEVICE)


# ----------------------------------------------------------------------------- DC-AE

def train_vae(folder: Path, steps: int) -> Scores:
    vae = DCAE(NANO.vae)
    vae.init_weights(generator(SEED, "vae"))
    vae.to(DEVICE)
    vae.encoder.compile()
    vae.decoder.compile()

    def loss_of(labels: Tensor, images: Tensor) -> Tensor:
        x = images.to(DEVICE) * 2 - 1                                                   # (B, 3, H, W)
        z = vae.encode(x).float()                                                       # (B, C, h, w)
        # noise makes a decoder that forgives small errors
        again = vae.decode(z + 0.1 * torch.randn_like(z)).float()                       # (B, 3, H, W)
        error = again - x
        # channels of mean 0 and spread 1, since one scaling factor must do for all
        channels = z.transpose(0, 1).flatten(1)                                         # (C, B h w)
        shift, stretch = channels.mean(1), channels.std(1) - 1                          # (C,) each
        uneven = shift.square().mean() + stretch.square().mean()
        return error.abs().mean() + 2 * error.square().mean() + 0.05 * uneven

    draw = partial(draw_pictures, scenes=pool("vae", 20000, 0.3), count=32)
    train("vae", vae, steps, 1e-2, draw, loss_of)
    write_part(folder / "vae", vae)

    # what the judge says of true pictures after decoding bounds every model that draws through this decoder
    rng, prompts = rng_of("vae test"), world.benchmark_prompts()
    true = world.render([world.scene_for(rng, prompt) for prompt in prompts])           # (B, 3, H, W)
    again = through(vae, true).cpu()                                                    # (B, 3, H, W)
    mse = (again - true).square().mean((1, 2, 3))                                       # (B,)
    scores = world.task_scores(world.judge(again, prompts), prompts)
    return {"psnr_db": float(-10 * mse.log10().mean()), "judge": scores["overall"]}


@torch.no_grad()
@torch.autocast(DEVICE.type, enabled=False)
def through(vae: DCAE, images: Tensor, noise: float = 0.0) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1] after the autoencoder, as all drawn ones are; each with noise of its
    own level, 0 to `noise`, on its latents."""
    parts = []
    device = next(vae.parameters()).device
    levels = noise * torch.rand(len(images), 1, 1, 1).to(device)                        # (B, 1, 1, 1)
    for x, level in zip(images.split(250), levels.split(250)):
        z = vae.encode(x.to(device) * 2 - 1)                                            # (b, C, h, w)
        z = z + level * torch.randn_like(z)                                             # (b, C, h, w)
        parts.append(vae.decode(z) / 2 + 0.5)                                           # (b, 3, H, W)
    return torch.cat(parts).clamp(0, 1)


# ----------------------------------------------------------------------------- learning to see, and to read

# What a linear head says of every patch: its shape, its colour, and whether a thing has its middle there.
# Image towers learn from it in minutes what captions and answers alone teach in hours.
SEEN = [len(world.SHAPES) + 1, len(world.COLORS) + 1, 2]


def class_loss(logits: Tensor, labels: Tensor, classes: list[int]) -> Tensor:
    """Cross-entropy of several questions at once, summed to a scalar: logits (..., sum(classes)), labels
    (questions, ...), -100 where there is nothing to say."""
    parts = logits.float().flatten(0, -2).split(classes, -1)
    labels = labels.flatten(1).to(DEVICE)                                               # (questions, rows)
    return sum(F.cross_entropy(part, right) for part, right in zip(parts, labels))


def patch_labels(scenes: list[Scene]) -> Tensor:
    """The classes of SEEN for each patch of each scene, (3, B, P) int64."""
    side = world.SIZE // PATCH
    # the last shape and the last colour are the ground's
    ground = torch.tensor([len(world.SHAPES), len(world.COLORS), 0])
    labels = ground[:, None, None, None].repeat(1, len(scenes), side, side)             # (3, B, side, side)
    for index, things, covered in world.things_by_shape(scenes):
        share = F.avg_pool2d(covered, PATCH)                                            # (K, side, side)
        for b, thing, here in zip(index, things, share > 0.3):
            labels[0, b, here] = world.SHAPES.index(thing.shape)
            labels[1, b, here] = world.COLOR_NAMES.index(thing.color)
            labels[2, b, int(thing.y) // PATCH, int(thing.x) // PATCH] = 1
    return labels.flatten(2)                                                            # (3, B, P)


# What a prompt may say of a thing: its shape, its colour, its number, its side of the other one
SAID = [len(world.SHAPES), len(world.COLORS), len(world.NUMBERS), len(world.RELATIONS)]


def said_of(prompt: Prompt) -> list[tuple]:
    """The classes of SAID for two things of a prompt, in the order of SHAPES: the same for "a star above a
    heart" and "a heart below a star". -100 is for what is left open, and for no second thing."""
    sides = list(world.RELATIONS)
    relations = prompt.relation, world.OPPOSITE.get(prompt.relation)
    said = []
    for (shape, color, count), relation in zip(prompt.include, relations):
        said.append((world.SHAPES.index(shape),
                     world.COLOR_NAMES.index(color) if color else -100,
                     count - 1,
                     sides.index(relation) if relation else -100))
    return (sorted(said) + [(-100,) * len(SAID)])[:2]


# ----------------------------------------------------------------------------- InternVL: what it reads

def word_tokenizer(words: list[str]) -> Tokenizer:
    """One token a word or sign of the list, in its order; anything else is <unk>."""
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    signs = pre_tokenizers.Split(Regex("[\n:.?,]"), "isolated")
    spaces = pre_tokenizers.Split(" ", "removed")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([signs, spaces])
    return tokenizer


def vlm_tokenizer() -> PreTrainedTokenizerFast:
    """With InternVL's special tokens; unknown words are <unk>, which the model refuses."""
    tokenizer = word_tokenizer([*SPECIAL, *world.vocabulary()])
    tokenizer.add_special_tokens(SPECIAL[:-1])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<|endoftext|>",
                                   eos_token="<|im_end|>")


def asks_test(question: str) -> bool:
    """Whether a question says what a test prompt says, as "is there a red heart?" says "a red heart"."""
    text = question.removeprefix("is there ").removesuffix("?")
    text = text.replace("is the ", "a ").replace(" the ", " a ")
    prompt = world.every_prompt().get(text)
    return prompt is not None and world.is_test(prompt)


def ask(rng: Rng, scene: Scene) -> Parts:
    """At most eight different questions about a scene with their answers, in half of the cases about sides
    only, if it has any: what is left of what takes longest to learn."""
    drawn = [pair for _ in range(4) for pair in world.questions(rng, scene)]
    pairs = [pair for pair in dict.fromkeys(drawn) if not asks_test(pair[0])]
    about_sides = [pair for pair in pairs if any(relation in pair[0] for relation in world.RELATIONS)]
    if about_sides and rng.random() < 0.5:
        pairs = about_sides
    return [pairs[k] for k in rng.permutation(len(pairs))[:8]]


def draw_row(rng: Rng, scene: Scene, reading: float) -> tuple[Parts, bool]:
    """A picture and a dialogue about it or, with probability `reading`, the fullest sentence about it in its
    place, and whether the picture is shown. Half of the sentences stand in the frame of a prompt: what they
    say is only then to be read off right after <img>, where the queries will be."""
    pairs = ask(rng, scene)
    # either thing may come first in the sentence, whichever comes first in the questions
    turned = scene._replace(things=scene.things[::pick(rng, (1, -1))])
    prompts = [prompt for prompt in world.prompts_of(turned) if not world.is_test(prompt)]
    shown = not prompts or rng.random() >= reading
    first = IMAGE
    if not shown:
        sentence = pick(rng, world.WORDINGS) + prompts[-1].text
        if rng.random() < 0.5:
            return [(PROMPT.format(prompt=sentence), ""), *pairs], False
        first = f"{sentence}. "
    elif prompts:
        description = "describe the picture.", pick(rng, prompts).text
        pairs.insert(rng.integers(len(pairs) + 1), description)

    # questions and answers take turns, and the picture or the sentence comes first
    parts = []
    for question, answer in pairs:
        parts.append((QUESTION.format(image=first, prompt=question), f"{answer}<|im_end|>\n"))
        first = ""
    return parts, shown


def plan(prompt: Prompt) -> Parts:
    """A prompt in its frame, and behind it the words that the queries start as: "left color right color above
    color below color one color two color how many shapes?". Each is answered where it stands and nothing is
    written: what stands at a side and in which colour, the things in the prompt's order, how many there are;
    "no" where the prompt does not say."""
    nothing = ("no", "no")
    looks = [(shape, color or "no") for shape, color, _ in prompt.include]
    first, second = (looks + [nothing])[:2]
    # where no side is said, None is the only key
    sides = {prompt.relation: first, world.OPPOSITE.get(prompt.relation): second}
    at_sides = [word for relation in world.RELATIONS for word in sides.get(relation, nothing)]
    number = world.NUMBERS[sum(count for _, _, count in prompt.include)]
    answers = [*at_sides, *first, *second] + 4 * [number]
    return [(PROMPT.format(prompt=prompt.text), ""), (NANO.query_words, answers)]


def look_facts(rng: Rng) -> Parts:
    """A sentence about three to six things, and what follows from it: "a red heart, a blue star, a pink moon.
    the star is blue. the red shape is heart." Here the language model learns what belongs to what."""
    count = rng.integers(3, 7)
    shapes = rng.permutation(world.SHAPES)[:count].tolist()
    colors = rng.permutation(world.COLOR_NAMES)[:count].tolist()
    nouns = [world.noun(shape, color) for shape, color in zip(shapes, colors)]
    parts = [(", ".join(nouns) + ".", "")]
    for k in rng.permutation(count):
        asks_color = f"the {shapes[k]} is", colors[k]
        asks_shape = f"the {colors[k]} shape is", shapes[k]
        parts += [pick(rng, (asks_color, asks_shape)), (".", "")]
    return parts


def encode_rows(tokenizer: PreTrainedTokenizerFast, rows: list[Parts]) -> tuple[Tensor, Tensor]:
    """Token ids, and what each of them is answered with or -100, (B, S) each; padding comes last."""
    ids, labels = [], []
    for parts in rows:
        row_ids, row_labels = [], []
        for given, answer in parts:
            given = tokenizer.encode(given)
            if isinstance(answer, list):
                row_ids += given
                row_labels += tokenizer.convert_tokens_to_ids(answer)
            else:
                answer = tokenizer.encode(answer)
                row_ids += given + answer
                row_labels += [-100] * (len(given) - 1) + answer + [-100]
        ids.append(torch.tensor(row_ids))
        labels.append(torch.tensor(row_labels))
    pad = partial(nn.utils.rnn.pad_sequence, batch_first=True)
    return pad(ids), pad(labels, padding_value=-100)                                    # (B, S) each


# ----------------------------------------------------------------------------- InternVL: its training

@torch.no_grad()
def init_vlm(vlm: nn.Module) -> None:
    """Initial values for a width of 128: those of transformers suit widths in the thousands, and leave the
    towers idle for hundreds of steps."""
    rng = generator(SEED, "vlm")
    stds = {"embed_tokens": 0.3, "position_embeddings": 0.3, "patch_embeddings": 0.15, "lm_head": 0.02}
    for name, p in vlm.named_parameters():
        if "lambda" in name:
            p.fill_(1.0)
        elif p.ndim >= 2:
            std = next((std for part, std in stds.items() if part in name), 0.06)
            p.normal_(0, std, generator=rng)
    for layer in vlm.get_decoder().layers[:2]:
        look_back(layer.self_attn)


def look_back(attention: nn.Module) -> None:
    """Query heads 0 and 1, which share key head 0, start out attending 1 and 2 tokens back, whatever the
    tokens are: in rotary attention constant queries and keys, which biases are, score by distance alone.
    Without them the red one in "a red heart and a blue star" is the heart or the star by coin toss after
    4,500 steps, with them it is the heart in 99 % after 125."""
    width, half = attention.head_dim, attention.head_dim // 2
    theta = NANO.vlm.text_config.rope_parameters["rope_theta"]
    angle = theta ** -(torch.arange(half) / half)           # radians a token, as the rotary embedding's
    attention.k_proj.weight[:width] = 0
    attention.k_proj.bias[:half] = 4.6
    attention.k_proj.bias[half:width] = 0
    for head, distance in enumerate((1, 2)):
        turn = angle * distance                                                         # (half,)
        rows = slice(width * head, width * (head + 1))
        attention.q_proj.weight[rows] = 0
        attention.q_proj.bias[rows] = 4.6 * torch.cat([turn.cos(), -turn.sin()])        # (width,)


def train_vlm(folder: Path, steps: int) -> Scores:
    """Three lessons: the vision tower learns to see (a sixth of the steps) and is left alone from then on,
    the language model to read (a sixth), then the two to answer together. In a fourth, a quarter as long
    again, plans of pictures join, to be read off where the queries will be."""
    model = ParaUni(NANO, NANO.vlm_class(NANO.vlm), vlm_tokenizer())
    init_vlm(model.vlm)
    vlm = model.to(DEVICE).vlm.requires_grad_(True)
    scenes = pool("vlm", 40000, 0.4)
    described = [scene for scene in scenes if world.prompts_of(scene)]
    seeing = nn.Linear(NANO.vlm.vision_config.hidden_size, sum(SEEN))
    taught = nn.ModuleList([vlm, seeing]).to(DEVICE)

    def see(labels: Tensor, images: Tensor) -> Tensor:
        pixels = model.pixels(images.to(DEVICE))                                        # (B, 3, H, W)
        tokens = vlm.model.vision_tower(pixels).last_hidden_state[:, 1:]                # (B, P, width)
        return class_loss(seeing(tokens), labels, SEEN)

    def draw(rng: Rng, of: list[Scene], reading: float, facts: int, dialogues: int = 64,
             plans: int = 0) -> tuple:
        """Ids and labels of rows: facts, plans, dialogues about scenes; and the pictures shown, in order."""
        rows = [look_facts(rng) for _ in range(facts)]
        rows += [plan(prompt) for prompt in draw_prompts(rng, described, plans)[1]]
        shown = []
        for k in rng.integers(len(of), size=dialogues):
            row, is_shown = draw_row(rng, of[k], reading)
            rows.append(row)
            if is_shown:
                shown.append(of[k])
        return *encode_rows(model.tokenizer, rows), world.render(shown)

    answer = partial(answer_loss, model)
    sixth = max(1, steps // 6)
    train("vlm see", taught, sixth, 6e-3, partial(draw_pictures, scenes=scenes, count=192), see)
    vlm.model.vision_tower.requires_grad_(False)
    read = partial(draw, of=described, reading=1.0, facts=64)
    train("vlm read", taught, sixth, 6e-3, read, answer)
    both = partial(draw, of=scenes, reading=0.5, facts=16)
    train("vlm answer", taught, max(1, steps - 2 * sixth), 6e-3, both, answer)
    all_three = partial(draw, of=scenes, reading=0.5, facts=8, dialogues=24, plans=64)
    train("vlm plan", taught, max(1, steps // 4), 3e-3, all_three, answer)

    written = copy.deepcopy(vlm).to("cpu", torch.bfloat16)
    written.save_pretrained(folder / "vlm")
    model.tokenizer.save_pretrained(folder / "vlm")
    # scored as it is written
    vlm.load_state_dict(written.state_dict())
    images, pairs = world.question_set(2000, SEED)
    questions, answers = zip(*pairs)
    replies = []
    for i in range(0, len(pairs), 250):
        replies += model.answer(images[i:i + 250].to(DEVICE), questions[i:i + 250], max_new_tokens=4)
    return {"answers_right": float(np.mean([reply == answer for reply, answer in zip(replies, answers)]))}


def answer_loss(model: ParaUni, ids: Tensor, labels: Tensor, images: Tensor) -> Tensor:
    """Next-token loss on the answers, labels (B, S); images (b, 3, H, W) belong to the rows with a place for
    one, in their order."""
    ids, labels = ids.to(DEVICE), labels.to(DEVICE)
    shown = {"pixel_values": model.pixels(images.to(DEVICE))} if len(images) else {}
    # without a mask: padding comes last
    hidden = model.vlm.base_model(input_ids=ids, **shown).last_hidden_state             # (B, S, D)
    asked = labels != -100                                                              # (B, S)
    logits = model.vlm.lm_head(hidden[asked])                                           # (answers, words)
    return F.cross_entropy(logits.float(), labels[asked])


# ----------------------------------------------------------------------------- CLIP

def clip_tokenizer() -> PreTrainedTokenizerFast:
    """The words of the world, and the end token, which must have the highest id: open_clip pools there."""
    words = ["<pad>", "<unk>", *world.vocabulary(), "<end>"]
    tokenizer = word_tokenizer(words)
    end = [("<end>", len(words) - 1)]
    tokenizer.post_processor = processors.TemplateProcessing("$A <end>", special_tokens=end)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


@cache
def clip_encoder() -> Callable[[list[str]], Tensor]:
    """Texts -> ids (B, S), as open_clip will make them."""
    encode = partial(clip_tokenizer(), padding="max_length", max_length=TEXT["context_length"],
                     truncation=True, return_tensors="pt")
    return lambda texts: encode(texts).input_ids


def write_clip(folder: Path, model: CLIP) -> None:
    write_weights(folder / "model.safetensors", model)
    write_json(folder / "open_clip_config.json", {"model_cfg": CLIP_CONFIG})
    clip_tokenizer().save_pretrained(folder)


def embed_pictures(model: CLIP, images: Tensor) -> Tensor:
    """Unit embeddings (B, E) of pictures (B, 3, H, W) in [0, 1]."""
    features = model.encode_image(preprocess(images.to(DEVICE), world.SIZE))            # (B, E)
    return F.normalize(features.float(), dim=-1)


def embed_texts(model: CLIP, ids: Tensor) -> Tensor:
    return F.normalize(model.encode_text(ids.to(DEVICE)).float(), dim=-1)               # (B, E)


def draw_captions(rng: Rng, scenes: list[Scene], count: int, wrong: int, test: bool = False) -> tuple:
    """Of B scenes the labels of patches, the pictures and the light (B,); of T = B (1 + wrong) captions,
    first their own, then wrong ones, the ids (T, S), and which are true of which scenes (B, T); what the
    pictures show and the captions say of two things (B + T, 2, 4)."""
    shown, prompts = draw_prompts(rng, scenes, count, test)
    for _ in range(wrong):
        prompts += [world.corrupt(rng, prompt, test) for prompt in prompts[:len(shown)]]
    ids = clip_encoder()([prompt.text for prompt in prompts])                           # (T, S)
    light = torch.tensor([scene.light for scene in shown])                              # (B,)

    said = [said_of(prompt) for prompt in prompts]
    true, fullest = [], []
    for scene in shown:
        fits = [said_of(prompt) for prompt in world.prompts_of(scene)]
        true.append([each in fits for each in said])
        # the last prompt of a scene says all of it
        fullest.append(fits[-1])
    said = torch.tensor(fullest + said)                                                 # (B + T, 2, 4)
    return patch_labels(shown), world.render(shown), light, ids, torch.tensor(true), said


def train_clip(folder: Path, steps: int) -> Scores:
    """CLIP's loss, with wrong captions that the pictures must rank low. Beside it the image tower learns to
    see its patches, and both towers to put what is shown or said where one linear head finds it: contrast
    alone finds out late who is at which side of whom. Their light, which no caption says, is kept for the
    aesthetic head."""
    model = CLIP(**CLIP_CONFIG)
    vae = load(DCAE(NANO.vae), folder / "vae")
    width = CLIP_CONFIG["embed_dim"]
    seeing = nn.Linear(VISION["width"], sum(SEEN))
    reading = nn.Linear(width, 2 * sum(SAID))
    lighting = nn.Linear(width, 1)
    taught = nn.ModuleList([model, seeing, reading, lighting]).to(DEVICE)
    model.visual.output_tokens = True

    def loss_of(labels: Tensor, images: Tensor, light: Tensor, ids: Tensor, true: Tensor,
                said: Tensor) -> Tensor:
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        pictures = through(vae, images, 0.3)                                            # (B, 3, H, W)
        image, tokens = model.visual(preprocess(pictures, world.SIZE))                  # (B, E), (B, P, D)
        image = F.normalize(image.float(), dim=-1)                                      # (B, E)
        text = embed_texts(model, ids)                                                  # (T, E)
        logits = model.logit_scale.exp() * image @ text.T                               # (B, T)
        # a caption that is true of another scene too is no negative there
        B, T = true.shape
        also_true = true & ~torch.eye(B, T, dtype=torch.bool)                           # (B, T)
        logits = logits.masked_fill(also_true.to(DEVICE), -1e4)
        target = torch.arange(B, device=DEVICE)
        contrast = F.cross_entropy(logits, target) + F.cross_entropy(logits[:, :B].T, target)
        # entries of unit vectors are small: times sqrt(E) they are of size 1
        both = torch.cat([image, text]) * width ** 0.5                                  # (B + T, E)
        known = reading(both).unflatten(1, (2, -1))                                     # (B + T, 2, 29)
        read = class_loss(known, said.movedim(-1, 0), SAID)
        lit = F.mse_loss(lighting(both[:B]).float().squeeze(1), light.to(DEVICE))
        seen = class_loss(seeing(tokens), labels, SEEN)
        return contrast / 2 + seen + read + 4 * lit

    draw = partial(draw_captions, scenes=pool("clip", 30000), count=96, wrong=2)
    train("clip", taught, steps, 3e-3, draw, loss_of, 0.05)
    model.visual.output_tokens = False
    write_clip(folder / "clip", model)

    # how often a test picture scores higher with its own caption than with one that is wrong in one point
    test = pool("clip test", 8000, test=True)
    _, images, _, ids, _, _ = draw_captions(rng_of("clip score"), test, 2000, wrong=1, test=True)
    with torch.no_grad():
        image = embed_pictures(model, through(vae, images))                             # (B, E)
        right, wrong = embed_texts(model, ids).chunk(2)                                 # (B, E) each
    margin = ((right - wrong) * image).sum(1)                                           # (B,)
    return {"beats_wrong_caption": float((margin > 0).float().mean())}


# ----------------------------------------------------------------------------- SANA

def read_tokens(clip: CLIP, ids: Tensor) -> Tensor:
    """Features of every token, ids (B, S) -> (B, S, E), before CLIP's text tower pools them."""
    x = clip.token_embedding(ids) + clip.positional_embedding                           # (B, S, E)
    return clip.ln_final(clip.transformer(x, attn_mask=clip.attn_mask))                 # (B, S, E)


def train_dit(folder: Path, steps: int) -> Scores:
    """The flow-matching loss, and a quarter of that of a linear head that tells from the tokens inside the
    DiT what the clean picture will show: REPA (arXiv 2410.06940) with true labels in place of another
    network's features. CLIP's text tower, trained on, stands in for SANA's Gemma."""
    clip = load(CLIP(**CLIP_CONFIG), folder / "clip")
    clip.visual.requires_grad_(False)
    vae = load(DCAE(NANO.vae), folder / "vae")
    dit = DiT(NANO.dit)
    dit.init_weights(generator(SEED, "dit"))
    dit.compile()
    scenes = pool("dit", 40000)
    with torch.no_grad():
        parts = [world.render(scenes[i:i + 256]) for i in range(0, len(scenes), 256)]
        latents = torch.cat([vae.encode(part.to(DEVICE) * 2 - 1) for part in parts])    # (scenes, C, h, w)
    place = {scene: i for i, scene in enumerate(scenes)}
    seeing = nn.Linear(NANO.dit.width, sum(SEEN))
    inside = {}
    dit.transformer_blocks[3].register_forward_hook(lambda block, x, tokens: inside.update(tokens=tokens))
    taught = nn.ModuleList([clip, dit, seeing]).to(DEVICE)

    def draw(rng: Rng) -> tuple:
        shown, prompts = draw_prompts(rng, scenes, 192)
        # captions are left out now and then, for guidance
        texts = ["" if rng.random() < 0.1 else prompt.text for prompt in prompts]
        # times favour the noisy side, where numbers and places are decided
        t = torch.sigmoid(torch.tensor(rng.normal(0.6, 1, len(shown))))                 # (B,)
        places = [place[scene] for scene in shown]
        return places, patch_labels(shown), clip_encoder()(texts), t.float()

    def loss_of(places: list[int], labels: Tensor, ids: Tensor, t: Tensor) -> Tensor:
        c = read_tokens(clip, ids.to(DEVICE))                                           # (B, S, E)
        x0 = latents[places]                                                            # (B, C, h, w)
        loss = flow_matching_loss(dit, x0, c, t.to(DEVICE), torch.randn_like(x0))
        return loss + 0.25 * class_loss(seeing(inside["tokens"]), labels, SEEN)

    train("dit", taught, steps, 1e-2, draw, loss_of)
    write_part(folder / "transformer", dit)

    # every test prompt once, read by the text tower
    prompts, verdicts = world.benchmark_prompts(), []
    with torch.no_grad():
        for i in range(0, len(prompts), 100):
            some = prompts[i:i + 100]
            ids = clip_encoder()(["", *(prompt.text for prompt in some)])               # (1 + b, S)
            c = read_tokens(clip, ids.to(DEVICE))                                       # (1 + b, S, E)
            noise = randn((len(some), *NANO.latent_shape), generator(SEED, "judge", i), DEVICE)
            images = vae.decode(sample_ode(dit, noise, c[1:], c[:1])) / 2 + 0.5         # (b, 3, H, W)
            verdicts += world.judge(images, some)
    return world.task_scores(verdicts, prompts)


# ----------------------------------------------------------------------------- preference, and taste

RIGHT = 4.0         # log-odds of what was asked for against something else
LARGE = 4.0         # log-odds a pixel of radius
BEST = 26.0         # logit of the right thing at its largest; as in Flow-GRPO, the reward is the logit / 26


def draw_pairs(rng: Rng, scenes: list[Scene], count: int, test: bool = False) -> tuple:
    """Ids of prompts (B, S), two pictures of each (2 B, 3, H, W), the first of which shows what is asked for,
    the second something else in half of the cases; and what people think of each picture, (2 B,): the lead
    that one has is the log-odds with which they choose it (Bradley and Terry). They want what they asked for,
    and want it large."""
    first, prompts = draw_prompts(rng, scenes, count, test)
    is_wrong = rng.random(len(prompts)) < 0.5                                           # (B,)
    second = [new_scene(rng, prompt, wrong, test) for prompt, wrong in zip(prompts, is_wrong)]
    radius = np.array([world.mean_radius(scene) for scene in first + second])           # (2 B,)
    worth = BEST - LARGE * (world.LARGEST - radius)                                     # (2 B,)
    worth[len(prompts):] -= RIGHT * is_wrong
    ids = clip_encoder()([prompt.text for prompt in prompts])                           # (B, S)
    return ids, world.render(first + second), torch.tensor(worth, dtype=torch.float32)


def new_scene(rng: Rng, prompt: Prompt, is_wrong: bool, test: bool) -> Scene:
    """A scene of what a prompt says, or of something else; for training, none of what a test prompt says."""
    while True:
        scene = world.scene_for(rng, world.corrupt(rng, prompt, test) if is_wrong else prompt)
        if test or not world.is_test_scene(scene):
            return scene


def preference(model: CLIP, vae: DCAE, ids: Tensor, images: Tensor) -> Tensor:
    """The logit of every picture (2 B, 3, H, W) under its prompt (B, S), (2 B,)."""
    pictures = through(vae, images, 0.3)                                                # (2 B, 3, H, W)
    text = embed_texts(model, ids).repeat(2, 1)                                         # (2 B, E)
    return model.logit_scale.exp() * (embed_pictures(model, pictures) * text).sum(1)


def train_pick(folder: Path, steps: int) -> Scores:
    """Regression of what people think, which is known here: told by choices alone, a model overrates what
    nearly all agree on, and each prompt has another level."""
    model = load(CLIP(**CLIP_CONFIG), folder / "clip")
    vae = load(DCAE(NANO.vae), folder / "vae")

    def loss_of(ids: Tensor, images: Tensor, worth: Tensor) -> Tensor:
        return F.smooth_l1_loss(preference(model, vae, ids, images), worth.to(DEVICE))

    draw = partial(draw_pairs, scenes=pool("pick", 30000), count=48)
    train("pick", model, steps, 3e-4, draw, loss_of, 0.05)
    write_clip(folder / "pickscore", model)
    ids, images, worth = draw_pairs(rng_of("pick score"), pool("pick test", 4000, test=True), 1000, test=True)
    with torch.no_grad():
        first, second = preference(model, vae, ids, images).cpu().chunk(2)              # (1000,) each
    # of the pairs that three people in four agree on
    odds = torch.sub(*worth.chunk(2))                                                   # (1000,)
    agrees = (first > second) == (odds > 0)                                             # (1000,)
    return {"agrees_with_the_crowd": float(agrees[odds.abs() > math.log(3)].float().mean())}


def train_aes(folder: Path, steps: int) -> Scores:
    """Regression of 1 + 9 light from CLIP's unit embedding of pictures that went through the autoencoder."""
    model = load(CLIP(**CLIP_CONFIG), folder / "clip")
    vae = load(DCAE(NANO.vae), folder / "vae")
    head = AestheticHead(CLIP_CONFIG["embed_dim"], (32, 16, 16, 8)).to(DEVICE)

    @torch.no_grad()
    def features(name: str, count: int) -> tuple[Tensor, Tensor]:
        scenes = pool(name, count)
        light = torch.tensor([scene.light for scene in scenes])                         # (count,)
        images = through(vae, world.render(scenes), 0.3)                                # (count, 3, H, W)
        parts = [embed_pictures(model, part) for part in images.split(250)]
        return torch.cat(parts), (1 + 9 * light).to(DEVICE)

    x, y = features("aes", 6000)                                                        # (count, E), (count,)

    def loss_of(chosen: np.ndarray) -> Tensor:
        return F.mse_loss(head(x[chosen]).float(), y[chosen])

    train("aes", head, steps, 1e-3, lambda rng: (rng.integers(len(x), size=256),), loss_of)
    write_weights(folder / "aesthetic" / "aesthetic.safetensors", head)
    x, y = features("aes test", 1000)
    with torch.no_grad():
        return {"rmse": float(F.mse_loss(head(x), y).sqrt())}


# ----------------------------------------------------------------------------- the command

# part -> its training, its steps, and the folder that it writes
PARTS = {"vae": (train_vae, 900, "vae"),
         "vlm": (train_vlm, 5000, "vlm"),
         "clip": (train_clip, 4500, "clip"),
         "dit": (train_dit, 5000, "transformer"),
         "pick": (train_pick, 800, "pickscore"),
         "aes": (train_aes, 2000, "aesthetic")}


@dataclass(frozen=True)
class PretrainConfig:
    parts: tuple[str, ...] = knob((), f"what to train, of {', '.join(PARTS)}; none named: all", words=True)
    out: str = knob("runs/parts", "folder for the weights, which train.py --weights then names")


def main(argv: list[str] | None = None) -> None:
    cfg = parse_config(PretrainConfig, argv, description="Train what the paper downloads.")
    if not set(cfg.parts) <= set(PARTS):
        raise Refused(f"unknown part in {' '.join(cfg.parts)}: expected some of {', '.join(PARTS)}")
    # on a CPU the fused attention's bf16 gradient is slow: plain products and a softmax do in its place
    torch.backends.cuda.enable_flash_sdp(DEVICE.type == "cuda")
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(DEVICE.type == "cpu")

    # in whatever order they are named
    for part in [part for part in PARTS if part in (cfg.parts or PARTS)]:
        train_part, steps, place = PARTS[part]
        start = time.time()
        torch.manual_seed(SEED)
        scores = train_part(Path(cfg.out), steps)
        record = {"command": f"python nano/pretrain.py {part}", "seed": SEED, "steps": steps,
                  "seconds": round(time.time() - start), **environment()}
        record |= {name: round(score, 4) for name, score in scores.items()}
        write_json(Path(cfg.out) / place / "training.json", record)
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    run(main)
