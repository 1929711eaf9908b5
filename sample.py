"""Draw pictures of prompts, or ask about a picture.

    python sample.py "a red heart left of a blue star" "three moons"   samples/000-a-red-heart-....png and
                                                                       samples/grid.png
    python sample.py --chat picture.png "how many circles?"            the answer of the vision-language model

A picture's noise depends on --seed, its prompt's place and its number there. Letters: B pictures, H W pixels.
"""
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common import (WEIGHTS_HELP, derive_seed, image_grid, knob, parse_config, precision, run_main,
                    save_image, save_png)
from train import RECIPES

if TYPE_CHECKING:
    from model import ParaUni

BATCH = 16                                                   # pictures drawn at a time


@dataclass(frozen=True)
class SampleConfig:
    prompt: tuple[str, ...] = knob((), "what to draw, in quotes; with --chat, one question", positional="*")
    prompts: str = knob("", "file with one prompt a line, drawn after those of the command line")
    chat: str = knob("", "picture file to ask about")
    preset: str = knob("nano", "size of everything")
    weights: str = knob("auto", WEIGHTS_HELP)
    stage_file: str = knob("", "a stage's weights, as runs/stage3/stage3.safetensors, or an OpenUni .pth; "
                               "empty: the newest in --weights")
    out: str = knob("samples", "folder for the pictures")
    seed: int = knob(0, "all randomness is derived from it")
    num_steps: int = knob(20, "sampling steps")
    guidance_scale: float = knob(4.5, "classifier-free guidance; 1 turns it off")
    per_prompt: int = knob(1, "pictures of each prompt")

    def __post_init__(self) -> None:
        if min(self.num_steps, self.per_prompt) < 1:
            raise ValueError("expected --num-steps, --per-prompt of at least 1, "
                             f"got {self.num_steps}, {self.per_prompt}")
        if self.chat and (len(self.prompt) != 1 or self.prompts):
            raise ValueError("expected --chat PICTURE, one question in quotes, no --prompts, "
                             f"got {len(self.prompt)} questions")
        if not self.prompt and not self.prompts:
            raise ValueError('expected a prompt in quotes, such as "a red heart left of a star", '
                             'or --prompts FILE')
        if not all(text.strip() for text in self.prompt):
            raise ValueError("expected every prompt to say something, got an empty one")


def load_model(preset: str, weights: str, stage_file: str, seed: int) -> "ParaUni":
    """A preset with the weights of a stage, or with the newest in its folder;
    on the GPU where there is one."""
    import torch
    from model import PRESETS, ParaUni, weights_folder
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if preset == "nano" else torch.bfloat16      # SANA's own precision
    if weights == "random" or not stage_file:
        model = ParaUni.from_preset(preset, weights, seed, device, dtype)
    else:                       # a stage 1 file belongs on the pre-trained DiT, not on the newest stage
        model = ParaUni.from_parts(PRESETS[preset], weights_folder(preset, weights), 0, device, dtype)
    if stage_file:
        model.load_trained(Path(stage_file), preset=preset)
    return model


def out_folder(name: str) -> Path:
    """The folder of --out, made if it is missing."""
    try:
        Path(name).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise NotADirectoryError(f"cannot make the folder --out {name} ({error.strerror}): "
                                 "choose another") from error
    if not os.access(name, os.W_OK | os.X_OK):
        raise PermissionError(f"no permission to write into the folder --out {name}: choose another")
    return Path(name)


def write_pictures(cfg: SampleConfig) -> list[Path]:
    """Pictures of every prompt as files, and all of them on one sheet. Returns the paths."""
    import torch
    import torch.nn.functional as F
    from data import read_prompts
    prompts = [*cfg.prompt, *(read_prompts(cfg.prompts) if cfg.prompts else [])]
    folder, model = out_folder(cfg.out), load_model(cfg.preset, cfg.weights, cfg.stage_file, cfg.seed)
    model.tokenize(prompts)     # an unknown word in the last prompt is reported before the first picture
    wanted, paths, sheet = [(i, j) for i in range(len(prompts)) for j in range(cfg.per_prompt)], [], []
    for first in range(0, len(wanted), BATCH):
        part = wanted[first:first + BATCH]
        seeds = [derive_seed(cfg.seed, "picture", i, *([j] if j else []))               # 0 as in `generate`
                 for i, j in part]
        with precision(model.device, "bf16" if model.device.type == "cuda" else "fp32"):
            images = model.generate([prompts[i] for i, _ in part], cfg.num_steps, cfg.guidance_scale,
                                    seed=seeds).cpu()
        for (i, j), image in zip(part, images):
            slug = re.sub(r"\W+", "-", prompts[i].lower())[:48].strip("-")
            paths.append(folder / f"{i:03}{f'-{j}' if cfg.per_prompt > 1 else ''}-{slug}.png")
            save_image(paths[-1], image, scale=max(1, 256 // image.shape[-1]))
            print(paths[-1], flush=True)
        sheet += F.adaptive_avg_pool2d(images, min(256, images.shape[-1]))              # B of (3, h, w)
    columns, grid = cfg.per_prompt if cfg.per_prompt > 1 else min(8, len(wanted)), folder / "grid.png"
    save_png(grid, image_grid(torch.stack(sheet), columns, 256 // sheet[0].shape[-1],
                              [prompts[i] for i, _ in wanted]))
    print(grid)
    return [*paths, grid]


def ask(cfg: SampleConfig) -> str:
    """The VLM's answer to one question about one picture file."""
    import numpy as np
    import torch
    from PIL import Image
    if not Path(cfg.chat).is_file():
        raise FileNotFoundError(f"expected --chat to name a picture, found no file {cfg.chat}")
    try:
        with Image.open(cfg.chat) as picture:
            pixels = np.array(picture.convert("RGB"))                                   # (H, W, 3)
    except (OSError, SyntaxError) as error:                  # PIL says the one or the other of a damaged PNG
        raise ValueError("expected --chat to name a picture, "
                         f"{cfg.chat} cannot be read as one ({error})") from error
    model = load_model(cfg.preset, cfg.weights, cfg.stage_file, cfg.seed)
    print(answer := model.chat(torch.from_numpy(pixels).permute(2, 0, 1) / 255, cfg.prompt[0]))
    return answer


def main(argv: list[str] | None = None) -> list[Path] | str:
    cfg = parse_config(SampleConfig, {name: {} for name in RECIPES}, argv, __doc__.split("\n")[0])
    return ask(cfg) if cfg.chat else write_pictures(cfg)


if __name__ == "__main__":
    run_main(main)
