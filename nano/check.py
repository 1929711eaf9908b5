"""What nano's reward models see, and what stage III has to gain.

    python nano/check.py [--stage-file FILE] [--pictures 32]

Two tables about pictures of held-out prompts, drawn as stage III draws them.

    right from wrong    how often a picture that the exact judge finds right scores higher than one that it
                        finds wrong (the area under the curve): of the prompt, or of one that differs in one
                        point
    headroom            the reward of true scenes with the look that it wants, less that of the model's
                        pictures, in standard deviations over these

Letters: B pictures, H W pixels.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import knob, parse_config, run
from evaluation import table
from grpo import GRPOConfig, Perturbation, rollout, trained_steps
from model import PRESETS, ParaUni
from nano import world
from nano.pretrain import rng_of, through
from nano.world import Prompt, Scene
from rewards import build_reward

REWARDS = "aesthetic", "pickscore", "clip"
CANDIDATES = 16     # scenes of a prompt, of which the best quarter has the preferred look


@dataclass(frozen=True)
class CheckConfig:
    stage_file: str = knob("auto", "a stageN.safetensors; auto: nano's own of stage 2")
    pictures: int = knob(32, "held-out prompts a task, with two pictures each")
    seed: int = knob(0, "all randomness is derived from it")


def draw(model: ParaUni, prompts: list[Prompt], cfg: GRPOConfig) -> Tensor:
    """Pictures (B, 3, H, W) of prompts, as an epoch of stage III draws them."""
    steps = trained_steps(cfg.num_steps, cfg.sde_window, 0)
    images = []
    for i in range(0, len(prompts), 64):
        texts = [prompt.text for prompt in prompts[i:i + 64]]
        keys = [(cfg.seed, "check", i + j) for j in range(len(texts))]
        prefix = model.encode_prefix([*texts, None])
        rolled = rollout(model, model, prefix, keys, Perturbation(0.0, [], keys), steps, 0.0, cfg)
        images.append(model.decode(rolled.latents[-1]))                                 # (b, 3, H, W)
    return torch.cat(images)                                                            # (B, 3, H, W)


def preferred(rng: world.Rng, prompt: Prompt, reward: str) -> Scene:
    """A true scene of a prompt with the look that a reward wants, as a quarter of them has it."""
    scenes = [world.scene_for(rng, prompt) for _ in range(CANDIDATES)]
    looks = {"aesthetic": lambda scene: scene.light, "pickscore": world.mean_radius}
    if reward in looks:
        scenes.sort(key=looks[reward], reverse=True)
    return scenes[rng.integers(CANDIDATES // 4)]


def area_under_curve(right: Tensor, wrong: Tensor) -> float:
    """How often one of `right` is higher than one of `wrong`, ties counted half."""
    difference = right[:, None] - wrong                                                 # (right, wrong)
    return float(torch.heaviside(difference, torch.tensor(0.5)).mean())


def main(argv: list[str] | None = None) -> dict:
    cfg = parse_config(CheckConfig, argv, description=__doc__.splitlines()[0])
    stage = 2 if cfg.stage_file == "auto" else None
    model = ParaUni.from_preset("nano", stage_file=cfg.stage_file, stage=stage)
    scorers = {name: build_reward(name, "cpu") for name in REWARDS}
    # as stage III samples, one picture a prompt; the reference is not asked
    sampling = GRPOConfig(**PRESETS["nano"].recipes[3] | {"group_size": 1}, seed=cfg.seed)

    # a picture of each prompt, and one of the prompt with one point changed
    rng = rng_of("check", cfg.seed % 2 ** 32)
    prompts = world.prompt_list(True, cfg.pictures)
    others = [world.corrupt(rng, prompt) for prompt in prompts]
    images = draw(model, prompts + others, sampling)                                    # (2 B, 3, H, W)
    is_right = torch.tensor(world.judge(images, prompts * 2))                           # (2 B,)
    texts = [prompt.text for prompt in prompts]
    scores = {name: scorer(images, texts * 2) for name, scorer in scorers.items()}      # (2 B,) each

    areas = {}
    for task in world.TASKS:
        here = torch.tensor([prompt.task == task for prompt in prompts * 2])            # (2 B,)
        right, wrong = here & is_right, here & ~is_right
        row = {"right from wrong": task, "right": right.sum().item(), "wrong": wrong.sum().item()}
        for name in ("clip", "pickscore"):
            row[name] = area_under_curve(scores[name][right], scores[name][wrong])
        areas[task] = row
    headroom = {}
    for name, scorer in scorers.items():
        scenes = [preferred(rng, prompt, name) for prompt in prompts]
        wanted = through(model.vae, world.render(scenes))                               # (B, 3, H, W)
        drawn = scores[name][:len(prompts)]                                             # (B,)
        row = {"headroom": name, "wanted": scorer(wanted, texts).mean().item(),
               "drawn": drawn.mean().item(), "s.d.": drawn.std().item()}
        row["in s.d."] = (row["wanted"] - row["drawn"]) / row["s.d."]
        headroom[name] = row
    share = is_right[:len(prompts)].float().mean().item()
    print(table([*areas.values()]))
    print(f"\n{share:.3f} of the pictures are right\n")
    print(table([*headroom.values()]))
    return {"auc": areas, "right": share, "headroom": headroom}


if __name__ == "__main__":
    run(main)
