"""What the stages are fed: prompts for stage III, latents with captions for stages I and II.

Every item is a function of (seed, step, item): no state to save, and nothing depends on the number of
devices. B items, C h w latent.
"""
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common import derive_seed


def read_prompts(path: str | Path) -> list[str]:
    """One prompt a line; empty lines are left out. FileNotFoundError, or ValueError if nothing is left."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError("expected --prompts to name a text file with one prompt a line, "
                                f"found no file {path}")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"expected {path} to be UTF-8 text with one prompt a line, "
                         f"byte {error.start} is not") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"expected one prompt a line in {path} (--prompts), found none")
    return prompts


def nano_prompts(test: bool) -> list[str]:
    """Distinct prompts of the nano world, 96 a task at most,
    tasks in rotation so that any first part has them all."""
    from nano import world
    by_task = [[p.text for p in world.prompt_list(test, 96) if p.task == task] for task in world.TASKS]
    return [texts[i] for i in range(96) for texts in by_task if i < len(texts)]


class NanoPrompts:
    """Training prompts of the nano world, endless;
    prompt `item` of a step is drawn from (seed, step, item)."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def draw(self, step: int, item: int) -> str:
        return nano_pair(self.seed, step, item)[1]


class FilePrompts:
    """Prompts of a list in a shuffled order, drawn anew each time round;
    prompt `item` of a step of `per_step` items."""

    def __init__(self, prompts: list[str], per_step: int, seed: int) -> None:
        self.prompts, self.per_step, self.seed = prompts, per_step, seed

    def draw(self, step: int, item: int) -> str:
        round_, place = divmod(step * self.per_step + item, len(self.prompts))
        return self.prompts[np.random.default_rng([self.seed, round_]).permutation(len(self.prompts))[place]]


def nano_pair(seed: int, step: int, item: int):
    """A scene of the nano world and a training prompt that says what is in it."""
    from nano import world
    rng = np.random.default_rng(derive_seed(seed, "nano", step, item))
    while True:
        scene = world.sample_scene(rng)
        if prompt := world.sample_prompt(rng, scene):
            return scene, prompt.text


class NanoLatents:
    """Pictures of the nano world as latents, with captions: rendered and encoded as they are asked for."""

    def __init__(self, vae: torch.nn.Module, seed: int) -> None:
        self.vae, self.seed = vae, seed

    @torch.no_grad()
    def batch(self, step: int, items: list[int]) -> tuple[Tensor, list[str]]:
        """Latents (B, C, h, w) fp32 and captions of the given items of a step."""
        from nano import world
        pairs = [nano_pair(self.seed, step, item) for item in items]
        weight = next(self.vae.parameters())
        images = world.render([scene for scene, _ in pairs]).to(weight.device,
                                                                weight.dtype)           # (B, 3, H, W)
        return self.vae.encode(images * 2 - 1).float(), [caption for _, caption in pairs]
