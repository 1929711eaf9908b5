"""Draw pictures of prompts, or ask about a picture.

    python sample.py "a red heart left of a blue star" "three moons"   a file each in samples/, and grid.png
    python sample.py --chat picture.png "how many circles?"            the answer of the vision-language model

A picture's noise depends on --seed, its prompt's place and its number there. Letters: B pictures, H W pixels.
"""
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.functional import to_pil_image, to_tensor

from common import Refused, atomic, derive_seed, knob, parse_config, precision, run
from data import read_prompts
from model import PRESETS, PROMPT, ParaUni
from pictures import read_picture, save_sheet

BATCH = 16                                                  # pictures drawn at a time


@dataclass(frozen=True)
class SampleConfig:
    prompt: tuple[str, ...] = knob((), "what to draw, in quotes; with --chat, one question", words=True)
    prompts: str = knob("", "file with one prompt a line, drawn after those of the command line")
    chat: str = knob("", "picture file to ask about")
    preset: str = knob("nano", "size of everything", choices=PRESETS)
    weights: str = knob("auto", "auto: weights/PRESET, which tools/convert.py writes; random; or a folder")
    stage_file: str = knob("auto", "a stageN.safetensors; auto: the highest N in --weights; none")
    out: str = knob("samples", "folder for the pictures")
    seed: int = knob(0, "all randomness is derived from it")
    num_steps: int = knob(20, "sampling steps")
    guidance_scale: float = knob(4.5, "classifier-free guidance; 1 turns it off")
    per_prompt: int = knob(1, "pictures of each prompt")


def load(cfg: Any, device: torch.device, stage_file: str = "") -> ParaUni:
    """The model of cfg.preset, cfg.weights and a stage file, to sample from."""
    # bf16 is SANA's own precision; where there is a --dtype, as in evaluation, fp32 is fp32
    in_fp32 = PRESETS[cfg.preset].shapes_world or getattr(cfg, "dtype", "bf16") == "fp32"
    dtype = torch.float32 if in_fp32 else torch.bfloat16
    return ParaUni.from_preset(cfg.preset, cfg.weights, stage_file or cfg.stage_file, cfg.seed, device,
                               dtype=dtype)


def save_picture(path: Path, image: Tensor, scale: int = 1) -> None:
    """Save (3, H, W) in [0, 1] as PNG, every pixel drawn scale x scale."""
    # as bytes NaN would be black
    if not image.isfinite().all():
        raise Refused(f"no {path}: the model drew NaN, so its weights are broken, or hold NaN themselves")
    picture = to_pil_image((image * 255).round().byte().cpu())
    with atomic(path) as temporary:
        ImageOps.scale(picture, scale, Image.Resampling.NEAREST).save(temporary, "PNG")


def write_pictures(cfg: SampleConfig, model: ParaUni, prompts: list[str]) -> list[Path]:
    """Pictures of every prompt as files, and all of them on one sheet. Returns the paths."""
    # an unknown word, or a prompt that is too long, shows before the first picture
    model.tokenize([PROMPT.format(prompt=prompt) for prompt in prompts])
    folder, paths, sheet = Path(cfg.out), [], []
    wanted = [(i, j) for i in range(len(prompts)) for j in range(cfg.per_prompt)]
    for first in range(0, len(wanted), BATCH):
        part = wanted[first:first + BATCH]
        # a prompt's first picture is that of model.generate
        seeds = [derive_seed(cfg.seed, "picture", i, *([j] if j else [])) for i, j in part]
        with precision(model.device, "bf16" if model.device.type == "cuda" else "fp32"):
            images = model.generate([prompts[i] for i, _ in part], cfg.num_steps, cfg.guidance_scale,
                                    seed=seeds).cpu()                               # (B, 3, H, W)
        for (i, j), image in zip(part, images):
            number = f"{i:03}-{j}" if cfg.per_prompt > 1 else f"{i:03}"
            slug = re.sub(r"\W+", "-", prompts[i].lower())[:48].strip("-")
            paths.append(folder / f"{number}-{slug}.png")
            save_picture(paths[-1], image, scale=max(1, 256 // image.shape[-1]))
            print(paths[-1], flush=True)
        sheet += F.adaptive_avg_pool2d(images, min(256, images.shape[-1]))          # of (3, h, w)
    columns = cfg.per_prompt if cfg.per_prompt > 1 else min(8, len(wanted))
    save_sheet(folder / "grid.png", torch.stack(sheet), columns, [prompts[i] for i, _ in wanted])
    print(folder / "grid.png")
    return [*paths, folder / "grid.png"]


def main(argv: list[str] | None = None) -> list[Path] | str:
    cfg = parse_config(SampleConfig, argv, description=__doc__.split("\n")[0])
    prompts = [*cfg.prompt, *(read_prompts(cfg.prompts) if cfg.prompts else [])]
    if not prompts or cfg.chat and len(prompts) != 1:
        raise Refused('expected prompts in quotes, as "a red heart left of a star", or --prompts FILE; with '
                      f"--chat PICTURE one question, got {len(prompts)}")
    model = load(cfg, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if not cfg.chat:
        return write_pictures(cfg, model, prompts)
    answer = model.chat(to_tensor(read_picture(cfg.chat)), prompts[0])
    print(answer)
    return answer


if __name__ == "__main__":
    run(main)
