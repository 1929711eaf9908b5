"""What training reads: prompts for stage III, latents with captions for stages I and II.

Every item is a function of (seed, step, item): there is no state to save, and nothing depends on the number
of devices.

Letters: B items of a batch, C h w latent, H W picture, n number of an item, counted over all steps.
"""
import itertools
import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from common import Refused, derive_seed, fingerprint, read_lines
from nano import world


# ----------------------------------------------------------------------------- prompts (stage III)

def read_prompts(path: str | Path) -> list[str]:
    """One prompt a line; empty lines are left out."""
    try:
        prompts = read_lines(path)
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"expected {path} to hold one prompt a line in UTF-8: {error}") from error
    if not prompts:
        raise Refused(f"expected one prompt a line in {path}, found none")
    # benchmarks come as JSON, which would be painted letter by letter
    if re.match(r'[\[{]\s*("|$)', prompts[0]):
        raise Refused(f"expected one prompt a line in {path}, found JSON: {prompts[0]:.80}")
    return prompts


def nano_prompts(test: bool) -> list[str]:
    """Distinct prompts of the nano world, 96 a task at most, in turns: any first part has all tasks."""
    by_task = {task: [] for task in world.TASKS}
    for prompt in world.prompt_list(test, 96):
        by_task[prompt.task].append(prompt.text)
    turns = itertools.zip_longest(*by_task.values())
    return [text for turn in turns for text in turn if text is not None]


def draw_prompt(prompts: list[str], per_step: int, seed: int, step: int, item: int) -> str:
    """A training prompt: of a list, `per_step` of them a step, in an order that is drawn anew each round,
    or of the nano world where the list is empty."""
    if not prompts:
        return nano_item(seed, step, item)[1].text
    turn, place = divmod(step * per_step + item, len(prompts))
    order = np.random.default_rng([seed % 2 ** 32, turn]).permutation(len(prompts))
    return prompts[order[place]]


# ----------------------------------------------------------------------------- batches (stages I and II)

class Batch(NamedTuple):
    latents: Tensor                     # (B, C, h, w) fp32
    captions: list[str]
    source: Tensor | None = None        # (B, 3, H, W) in [0, 1]: pictures to edit, for who trains on such


WRONG_CAPTIONS = 0.1    # the share of nano's captions that are wrong in one point, as some of the web's are


def nano_item(seed: int, step: int, item: int) -> tuple[world.Scene, world.Prompt, str]:
    """A scene of the nano world, a training prompt that says what is in it, and the caption of its picture:
    mostly the prompt."""
    scene, prompt = world.sample_pair(np.random.default_rng(derive_seed(seed, "nano", step, item)))
    rng = np.random.default_rng(derive_seed(seed, "caption", step, item))
    is_wrong = rng.random() < WRONG_CAPTIONS
    written = world.corrupt(rng, prompt, test=False) if is_wrong else prompt
    return scene, prompt, written.text


class NanoLatents:
    """Pictures of the nano world, rendered and encoded as they are asked for."""

    def __init__(self, vae: nn.Module, seed: int) -> None:
        self.vae, self.seed = vae, seed

    @torch.no_grad()
    def batch(self, step: int, items: list[int]) -> Batch:
        scenes, _, captions = zip(*[nano_item(self.seed, step, item) for item in items])
        images = world.render(list(scenes)).to(next(self.vae.parameters()))             # (B, 3, H, W)
        return Batch(self.vae.encode(images * 2 - 1).float(), list(captions))


def stamp_of(vae: nn.Module, preset: object) -> dict:
    """What latents depend on; prepare.py writes it beside them."""
    return {"vae": fingerprint(vae),
            "scaling_factor": preset.vae.scaling_factor,
            "image_size": preset.image_size,
            "latent_shape": list(preset.latent_shape)}


def read_shards(folder: str, stamp: dict) -> list[tuple[Path, int]]:
    """The shards that prepare.py wrote into a folder, with the number of their samples."""
    path = Path(folder) / "index.json"
    if not path.is_file():
        raise Refused(f"no latents in {folder}, or not all of them yet: run prepare.py to its end")
    index = json.loads(path.read_text())
    if index["stamp"] != stamp:
        raise Refused(f"the latents in {folder} are of another model: {index['stamp']} instead of {stamp}")
    shards = [(path.with_name(name), count) for name, count in index["shards"].items()]
    # a copy may lack some, or the ends of some: the first step that drew from one would end every restart too
    for shard, _ in shards:
        try:
            safe_open(shard, "pt")
        except (OSError, SafetensorError) as error:
            raise Refused(f"{shard} is missing or cut off: copy it again, or delete it and run prepare.py as "
                          "before") from error
    return shards


def parse_mixture(spec: tuple[str, ...]) -> tuple[list[list[str]], list[float]]:
    """The folders of each part of a mixture, and the parts' weights; without weights all is one part.

    >>> parse_mixture(("drawings=1", "photos=3")), parse_mixture(("drawings", "photos"))
    (([['drawings'], ['photos']], [1.0, 3.0]), ([['drawings', 'photos']], [1.0]))
    """
    folders, weights = [], []
    for word in spec:
        match = re.fullmatch(r"(.+)=(\d*\.?\d+)", word)
        # a path may hold "=" itself
        if match and not Path(word).is_dir():
            word = match[1]
            weights.append(float(match[2]))
        folders.append(word)
    if not weights:
        return [folders], [1.0]
    if len(weights) < len(folders):
        raise Refused(f"expected FOLDER=WEIGHT for all of --data or for none, got {','.join(spec)}")
    return [[folder] for folder in folders], weights


class Latents:
    """Latents with captions that prepare.py wrote, each item drawn at random. Only what is asked for is read:
    memory does not grow with their number."""

    def __init__(self, spec: tuple[str, ...], batch_size: int, seed: int, model: nn.Module) -> None:
        """spec: folders, or FOLDER=WEIGHT each; model: the ParaUni that is trained on them."""
        self.batch_size, self.seed, self.device = batch_size, seed, model.device
        parts, weights = parse_mixture(spec)
        stamp = stamp_of(model.vae, model.preset)
        # of each part: its shards, and the number of samples before each of them and in all
        self.parts = []
        for folders in parts:
            shards = [shard for folder in folders for shard in read_shards(folder, stamp)]
            paths, counts = zip(*shards)
            self.parts.append((paths, np.cumsum([0, *counts])))
        self.weights = np.array(weights) / sum(weights)

    def batch(self, step: int, items: list[int]) -> Batch:
        latents, captions = [], []
        for item in items:
            n = step * self.batch_size + item
            rng = np.random.default_rng(derive_seed(self.seed, "latents", n))
            # a part of the mixture by its weight, and any of its samples
            paths, firsts = self.parts[rng.choice(len(self.parts), p=self.weights)]
            number = rng.integers(firsts[-1])
            # its shard, and its place there
            shard = np.searchsorted(firsts, number, side="right") - 1
            i = int(number - firsts[shard])
            # the file is mapped into memory, and only these slices of it are touched
            with safe_open(paths[shard], "pt") as file:
                first, last = file.get_slice("offsets")[i:i + 2].tolist()
                text = file.get_slice("captions")[first:last]                           # (bytes,)
                latents.append(file.get_slice("latents")[i])                            # (C, h, w) bf16
            captions.append(text.numpy().tobytes().decode())
        return Batch(torch.stack(latents).to(self.device).float(), captions)            # (B, C, h, w)
