"""Train ParaUni: `torchrun train.py --stage N` (or `python train.py --stage N` on one device).

    stage 1  align       queries + LIM learn to condition the frozen DiT   (Eq. 2, pictures with captions)
    stage 2  fine-tune   the DiT joins                                     (the same loss, better data)
    stage 3  reinforce   queries + LIM + DiT against rewards, with LDAM    (grpo.py)

The VLM and the autoencoder are never trained. Stage 1 begins with fresh queries and LIM, stages 2 and 3 with
the file of the stage before (--init), strictly. Stages 1 and 2 are the loop below; the numbers are those of
the paper's supplement, Table 1, where a preset's recipe (model.py) does not scale them to nano.

Letters: B items of a batch, N queries, E condition width, C h w latent.
"""
import argparse
import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

import grpo
from common import (Dist, Refused, RunConfig, adamw, average_gradients, catch_stop, clip_gradients, cosine_lr,
                    ema_update, generator, knob, load_checkpoint, make_trainable, mean_over_ranks, open_run,
                    parse_config, precision, resolve, run, save_checkpoint, set_lr, setup_dist, swapped,
                    write_log)
from data import Latents, NanoLatents
from dit import flow_matching_loss, randn
from model import PRESETS, ParaUni


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """The flags of stages 1 and 2; defaults are stage 1's."""
    steps: int = knob(100_000, "optimizer steps")
    warmup: int = knob(1000, "steps of linear warm-up")
    micro_batch: int = knob(32, "pictures a forward pass, on one device")
    batch_size: int = knob(512, "pictures a step, over all devices")
    data: tuple[str, ...] = knob((), "folders of prepare.py, all or none as DIR=WEIGHT; nano has its own")
    caption_dropout: float = knob(0.1, "share of captions replaced by the unconditional prompt")
    times: str = knob("uniform", "distribution of t; noisy: sigmoid of N(1, 1)", choices=("uniform", "noisy"))
    # the ablations of stage 1; later stages go on as their --init
    layers: tuple[int, ...] = knob((), "stage 1: VLM layers to fuse, as 1,2,8; none: all")
    norm: bool = knob(True, "stage 1: the LN of Eq. 4")
    log_every: int = knob(10, "steps between lines of the log")


# What the paper's stage 2 has other than its stage 1 (supplement, Table 1)
STAGE_2 = {"steps": 10_000, "warmup": 100, "lr": 1e-5}


def batch_loss(cfg: TrainConfig, model: ParaUni, data: NanoLatents | Latents, step: int,
               items: list[int]) -> Tensor:
    """The mean flow-matching loss (Eq. 2) of some items of a step."""
    batch = data.batch(step, items)
    x0 = batch.latents                                                                  # (B, C, h, w)

    # all draws of an item come from (seed, step, item), whatever batch or device it is in
    generators = [generator(cfg.seed, "item", step, item) for item in items]
    # sometimes no caption, so that guidance has something to compare with
    prompts = [None if torch.rand((), generator=g) < cfg.caption_dropout else caption
               for g, caption in zip(generators, batch.captions)]
    if cfg.times == "uniform":
        # k / 1000 with k in 1..1000, as published
        t = torch.cat([torch.randint(1, 1001, (1,), generator=g) for g in generators]) / 1000       # (B,)
    else:
        # more often near the noise, where a picture's content is decided
        t = torch.sigmoid(torch.cat([torch.randn(1, generator=g) for g in generators]) + 1.0)       # (B,)
    noise = randn(x0.shape, generators, x0.device)                                      # (B, C, h, w)

    # a prompt that comes twice is read once
    distinct = list(dict.fromkeys(prompts))
    prefix = model.encode_prefix(distinct, max_tokens=model.preset.train_tokens)
    with precision(x0.device, cfg.dtype):
        c = model.lim.fuse(model.condition_layers(prefix))                              # (distinct, N, E)
        c = c[torch.tensor([distinct.index(prompt) for prompt in prompts], device=c.device)]    # (B, N, E)
        return flow_matching_loss(model.dit, x0, c, t.to(x0.device), noise)


def train(cfg: TrainConfig, dist: Dist) -> dict[str, float]:
    """Stages 1 and 2. Returns the last line of the log, {} if it was stopped."""
    if cfg.batch_size % dist.world_size:
        raise Refused(f"expected --batch-size to be a multiple of the {dist.world_size} devices")
    if cfg.stage == 2 and (cfg.layers or not cfg.norm):
        raise Refused("--layers and --no-norm are for stage 1: stage 2 fuses as its --init file says")
    if not (cfg.data or PRESETS[cfg.preset].shapes_world):
        raise Refused(f"preset {cfg.preset} needs --data, latents with captions: prepare.py makes them")
    state = open_run(cfg, dist)
    # stage 1 decides which layers are fused, and may go on from a stage 1 file that --init names
    init = "none" if cfg.stage == 1 and cfg.init == "auto" else cfg.init
    layers = cfg.layers if cfg.stage == 1 else None
    model = ParaUni.from_preset(cfg.preset, cfg.weights, init, cfg.seed, dist.device, cfg.fresh, stage=1,
                                layers=layers, norm=cfg.norm)
    data = NanoLatents(model.vae, cfg.seed)
    if cfg.data:
        data = Latents(cfg.data, cfg.batch_size, cfg.seed, model)
    params = make_trainable(cfg, model)
    ema = {name: p.detach().clone() for name, p in params.items()}
    optimizer = adamw(params.values(), cfg.lr, cfg.weight_decay)
    if dist.lead:
        print(f"{sum(p.numel() for p in params.values()):,} parameters are trained")

    # where the run stands: at its beginning, or where a checkpoint left it
    done, skipped, record = 0, 0, {}
    if state:
        load_checkpoint(state, params, ema, optimizer)
        done, skipped, record = state["step"], state["skipped"], state["record"]

    # this rank's items of every step
    mine = list(range(cfg.batch_size)[dist.rank::dist.world_size])
    with catch_stop() as stop, tqdm(total=cfg.steps, initial=done, disable=not dist.lead, unit="step") as bar:
        for step in range(done, cfg.steps):
            began = time.perf_counter()
            # set the learning rate
            lr = cosine_lr(step, cfg.steps, cfg.warmup, cfg.lr)
            set_lr(optimizer, lr)

            # accumulate the gradient over micro-batches
            optimizer.zero_grad(set_to_none=True)
            loss = 0.0
            for first in range(0, len(mine), cfg.micro_batch):
                items = mine[first:first + cfg.micro_batch]
                part = batch_loss(cfg, model, data, step, items) * (len(items) / len(mine))
                part.backward()
                loss += part.detach()

            # average it over devices, clip it
            average_gradients(params.values(), dist)
            grad_norm = clip_gradients(params.values(), cfg.clip_norm)
            loss = mean_over_ranks(loss.item(), dist)

            # step; without a finite gradient the weights stay as they are
            skipped += 1
            if math.isfinite(grad_norm) and math.isfinite(loss):
                optimizer.step()
                # the average of the weights forgets faster in the beginning
                ema_update(ema, params, min(cfg.ema_decay, (step + 1) / (step + 10)))
                skipped = 0

            # log
            last = step + 1 == cfg.steps
            bar.update()
            if (step + 1) % cfg.log_every == 0 or last:
                record = {"step": step + 1, "loss": loss, "lr": lr, "grad_norm": grad_norm,
                          "skipped": skipped, "time/step": time.perf_counter() - began}
                bar.set_postfix_str(f"loss {loss:.4f}")
                write_log(cfg.run_dir, record, dist)

            # save
            stopped = mean_over_ranks(len(stop), dist) > 0
            gives_up = skipped >= cfg.max_skipped
            if last or stopped or gives_up or (step + 1) % cfg.save_every == 0:
                save_checkpoint(cfg, dist, step + 1, params, ema, optimizer,
                                {"step": step + 1, "skipped": skipped, "record": record})
            if gives_up:
                raise Refused(f"{skipped} steps in a row were skipped up to step {step + 1}: no finite "
                              "gradient; the weights before them are saved. Lower --lr, or look at the data")
            if stopped and not last:
                return {}

    # what is written is the average of the weights
    with swapped(params, ema):
        model.save_stage(cfg, dist, record)
    return record


def main(argv: list[str] | None = None) -> dict[str, float]:
    # the stage decides which flags there are, and with the preset what they are by default
    first_look = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first_look.add_argument("--stage", type=int, default=1)
    first_look.add_argument("--preset", choices=PRESETS, default=RunConfig.preset)
    first, _ = first_look.parse_known_args(argv)

    # the paper's numbers, then those of the preset, then what is typed
    recipe = (STAGE_2 if first.stage == 2 else {}) | PRESETS[first.preset].recipes.get(first.stage, {})
    config = grpo.GRPOConfig if first.stage == 3 else TrainConfig
    about = f"{__doc__.splitlines()[0]} Flags of stage {first.stage}, preset {first.preset}."
    cfg = parse_config(config, argv, recipe, about)
    dist = setup_dist()
    cfg = resolve(cfg, dist.device, small=PRESETS[cfg.preset].shapes_world)
    result = grpo.train(cfg, dist) if cfg.stage == 3 else train(cfg, dist)
    if not result and dist.lead:
        print("stopped; everything is saved, go on with --resume auto")
    return result


if __name__ == "__main__":
    run(main)
