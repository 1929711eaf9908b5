"""Train ParaUni: `torchrun train.py --stage N` (or `python train.py --stage N` on one device).

    stage 1  align       queries + LIM learn to condition the frozen DiT   (flow matching, captioned pictures)
    stage 2  fine-tune   the DiT joins                                     (the same loss)
    stage 3  reinforce   queries + LIM + DiT against rewards, with LDAM    (grpo.py)

The VLM and the autoencoder are never trained. Each stage starts from the file of the stage before (`--init`),
strictly. Stages 1 and 2 are the loop below; the numbers are those of the paper's Table 1 where a recipe does
not scale them to nano.

Letters: B items of a batch, N queries, E condition width, C h w latent.
"""
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common import WEIGHTS_HELP, knob, parse_config, run_main

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TrainConfig:
    """Every flag of training. Defaults are the paper's; RECIPES holds what each preset and stage changes."""
    # what
    stage: int = knob(1, "1 align, 2 fine-tune, 3 reinforce", choices=(1, 2, 3))
    preset: str = knob("nano", "size of everything; see PRESETS in model.py")
    weights: str = knob("auto", WEIGHTS_HELP)
    init: str = knob("auto", "weights of the stage before: a stage{N-1}.safetensors; "
                             "auto looks into --weights")
    run_dir: str = knob("auto", "folder for log, checkpoints, pictures and weights; auto: runs/stage{N}")
    resume: str = knob("", "go on from a checkpoint: auto (the newest in --run-dir) or a folder")
    seed: int = knob(0, "all randomness is derived from it")
    layers: tuple[str, ...] = knob((), "stage 1: VLM layers to fuse, as 1,2,8; empty: all. "
                                       "Later stages go on with those of --init")
    norm: bool = knob(True, "stage 1: the LN of Eq. 4; later stages go on as --init")
    # pictures with captions
    data: tuple[str, ...] = knob((), "stages 1, 2: tar shards (a glob), folders, JSON lists, or latents of "
                                     "data.py encode, each with =WEIGHT behind it or none; "
                                     "empty: the nano world's")
    workers: int = knob(4, "processes that decode --data, on one device; 0: none")
    max_bad: float = knob(0.05, "share of bad samples in --data above which the run stops")
    # optimisation
    steps: int = knob(2000, "optimizer steps; in stage 3, of each reward's phase")
    batch_size: int = knob(512, "stages 1, 2: pictures a step, over all devices")
    micro_batch: int = knob(9, "pictures a forward pass, on one device")
    lr: float = knob(1e-4, "peak learning rate (AdamW, betas 0.9 0.95; cosine to 0)")
    warmup: int = knob(20, "steps of linear warm-up; published: 1 % of the steps")
    weight_decay: float = knob(0.05, "on matrices only")
    clip_norm: float = knob(1.0, "gradient norm above which gradients are scaled down")
    ema_decay: float = knob(0.999, "of the weights that are written at the end")
    caption_dropout: float = knob(0.1, "stages 1, 2: share of captions replaced by the unconditional prompt")
    times: str = knob("uniform", "stages 1, 2: distribution of t; noisy: sigmoid of N(1, 1)",
                      choices=("uniform", "noisy"))
    dtype: str = knob("auto", "auto: bf16 on CUDA, fp32 on CPU", choices=("auto", "fp32", "bf16"))
    compile: bool = knob(False, "torch.compile LIM and DiT; on by default on CUDA, but for --fsdp "
                                "and nano (a minute or two before the first step)")
    fsdp: bool = knob(False, "split LIM and DiT, gradients and optimizer state over the devices (FSDP2)")
    gradient_checkpointing: bool = knob(False, "compute activations of LIM and DiT again in backward: "
                                               "less memory, more time")
    max_skipped: int = knob(10, "steps in a row with a non-finite loss or gradient, which are skipped, "
                                "after which the run stops")
    log_every: int = knob(10, "stages 1, 2: steps between lines of the log")
    save_every: int = knob(200, "steps (stage 3: epochs) between checkpoints")
    keep: int = knob(2, "checkpoints kept")
    # stage 3: groups and sampling
    rewards: tuple[str, ...] = knob(("aesthetic", "pickscore", "clip"),
                                    "in this order, one phase each: names, or file.py:function")
    reward_weights: str = knob("", "folder of the reward models; empty: weights/nano")
    prompts: str = knob("", "file with one training prompt a line; empty: the nano world's")
    eval_prompts: str = knob("", "file with one held-out prompt a line; empty: the nano world's")
    num_groups: int = knob(48, "prompts an epoch, over all devices")
    group_size: int = knob(24, "pictures a prompt")
    num_steps: int = knob(10, "sampling steps in training; the last one is not stochastic")
    noise_level: float = knob(0.7, "a of the SDE; 0.7 in Flow-GRPO")
    guidance_scale: float = knob(4.5, "classifier-free guidance in training; "
                                      "1 turns it off and halves the cost")
    shift: float = knob(3.0, "of the time grid towards noise")
    sde_window: int = knob(0, "stochastic steps in a window that slides by one an epoch; 0: all but the last")
    # stage 3: objective
    clip_range: float = knob(1e-4, "of the ratio, per latent element (log-probabilities are means)")
    kl_coef: float = knob(0.01, "weight of the KL to the stage II model")
    inner_updates: int = knob(1, "optimizer steps on each epoch's pictures")
    anchor: str = knob("rollout", "old log-probabilities: the rollout's, or recomputed in the update's mode",
                       choices=("rollout", "recompute"))
    # stage 3: LDAM
    ldam: bool = knob(True, "perturb layers when training stalls")
    ldam_mode: str = knob("epoch", "epoch: fresh noise a picture for one epoch; "
                                   "keep: one field a layer that stays", choices=("epoch", "keep"))
    ldam_gamma0: float = knob(0.1, "scale of the perturbation")
    ldam_gamma_max: float = knob(1.0, "upper bound of gamma")
    ldam_spike: float = knob(100.0, "ratio of successive gradient norms that counts as a jump")
    ldam_patience: int = knob(5, "declines of the reward that open its gate")
    ldam_trigger: str = knob("all", "fires when all signals in use have triggered, or any",
                             choices=("all", "any"))
    ldam_use_grad_norm: bool = knob(True, "listen to the gradient norm")
    ldam_use_reward: bool = knob(True, "listen to the reward")
    # stage 3: held-out evaluation
    num_eval: int = knob(96, "held-out prompts, one picture each")
    eval_every: int = knob(50, "epochs between evaluations within a phase; one at the end of each anyway")
    eval_steps: int = knob(20, "sampling steps")
    eval_guidance_scale: float = knob(4.5, "guidance")

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "micro_batch", "log_every", "save_every", "keep", "inner_updates",
                     "num_eval", "eval_every", "max_skipped"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected --{name.replace('_', '-')} of at least 1, "
                                 f"got {getattr(self, name)}")
        for name in ("caption_dropout", "ema_decay", "max_bad"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"expected --{name.replace('_', '-')} between 0 and 1, "
                                 f"got {getattr(self, name)}")
        for name in ("lr", "clip_norm", "noise_level", "clip_range"):
            if getattr(self, name) <= 0:
                raise ValueError(f"expected --{name.replace('_', '-')} above 0, got {getattr(self, name)}")
        if self.stage > 1 and (self.layers or not self.norm):
            raise ValueError("expected --layers and --no-norm with --stage 1 only, "
                             f"got --stage {self.stage}: it goes on with those of --init")
        if not all(layer.isdecimal() for layer in self.layers):
            raise ValueError(f"expected --layers as numbers, such as 1,2,8, got {','.join(self.layers)}")
        if not (self.ldam_use_grad_norm or self.ldam_use_reward):
            raise ValueError("LDAM needs a signal: keep --ldam-use-grad-norm or --ldam-use-reward, "
                             "or turn it off with --no-ldam")


PAPER = {1: {"steps": 100_000, "warmup": 1000, "micro_batch": 32},
         2: {"steps": 10_000, "warmup": 100, "lr": 1e-5, "micro_batch": 32},
         3: {"steps": 2000, "warmup": 20, "lr": 1e-4, "ema_decay": 0.9, "save_every": 50,
             "micro_batch": 8}}                                     # Table 1: 9
NANO = {1: {"steps": 3000, "warmup": 50, "batch_size": 64, "micro_batch": 64,
            "lr": 2e-3, "times": "noisy", "ema_decay": 0.998},
        2: {"steps": 2000, "warmup": 100, "batch_size": 64, "micro_batch": 64,
            "lr": 5e-4, "times": "noisy", "ema_decay": 0.998},
        3: {"steps": 24, "warmup": 2, "lr": 1e-4, "micro_batch": 32, "num_groups": 4, "group_size": 8,
            "num_steps": 6, "clip_range": 2e-3, "kl_coef": 0.1, "ema_decay": 0.7, "save_every": 8}}
# What a run that goes on may be given anew: none of it changes a single weight
MAY_CHANGE = ("run_dir", "resume", "workers", "max_bad", "max_skipped", "save_every", "keep")
RECIPES = {"nano": NANO, **{f"{kind}{size}": PAPER for kind in ("", "openuni-")
                            for size in ("b-512", "l-512", "l-1024")}}


def parse(argv: list[str] | None = None) -> TrainConfig:
    """Defaults < recipe of the preset and stage < flags."""
    argv = sys.argv[1:] if argv is None else argv
    said = ([b for a, b in zip(argv, argv[1:]) if a == "--stage"]
            + [a[8:] for a in argv if a.startswith("--stage=")])
    stage = int(said[-1]) if said and said[-1] in ("1", "2", "3") else 1    # a bad one is reported below
    return parse_config(TrainConfig, {name: recipe[stage] for name, recipe in RECIPES.items()}, argv,
                        __doc__.split("\n")[0])


# ----------------------------------------------------------------------------- stages 1 and 2

def draw_times(kind: str, generators: list) -> "Tensor":
    """One t in (0, 1] an item: k / 1000 with k uniform in 1..1000, as published,
    or sigmoid of N(1, 1). Returns (B,)."""
    import torch
    if kind == "uniform":
        return torch.cat([torch.randint(1, 1001, (1,), generator=g) for g in generators]) / 1000
    return torch.sigmoid(torch.cat([torch.randn(1, generator=g) for g in generators]) + 1.0)


def item_loss(cfg: TrainConfig, model, data, step: int, items: list[int]) -> "Tensor":
    """The mean flow-matching loss of some items of a step, where a bad sample counts as 0.
    All draws of an item come from (seed, step, item)."""
    import torch
    from common import generator, precision
    from dit import flow_matching_loss, randn
    x0, captions, weights = data.batch(step, items)                                     # (B, C, h, w)
    rngs = [generator(cfg.seed, "item", step, item) for item in items]
    prompts = [None if torch.rand((), generator=g) < cfg.caption_dropout else c
               for g, c in zip(rngs, captions)]
    t = draw_times(cfg.times, rngs).to(x0.device)                                       # (B,)
    noise = randn(x0.shape, rngs, x0.device)                                            # (B, C, h, w)
    distinct = list(dict.fromkeys(prompts))                                             # each is read once
    prefix = model.encode_prefix(distinct, max_tokens=model.preset.train_tokens)
    with precision(model.device, cfg.dtype):
        c = model.fuse(model.condition_layers(prefix))                                  # (distinct, N, E)
        c = c[torch.tensor([distinct.index(p) for p in prompts], device=c.device)]      # (B, N, E)
        if weights is None:
            return flow_matching_loss(model.dit, x0, c, t, noise)
        data.dropped += int((weights == 0).sum())
        return masked_loss(model.dit, x0, c, t, noise, weights)


def masked_loss(dit, x0: "Tensor", c: "Tensor", t: "Tensor", noise: "Tensor", weights: "Tensor") -> "Tensor":
    """flow_matching_loss with a weight (B,) an item: the weighted sum of the items' losses over B."""
    s = t[:, None, None, None]
    v = dit((1 - s) * x0 + s * noise, t, c).float()                                     # (B, C, h, w)
    return ((v - (noise - x0)).square().mean((1, 2, 3)) * weights).mean()


def open_data(cfg: TrainConfig, model, dist, mine: range):
    """What the steps are fed: the nano world, or the corpus of --data."""
    from data import BadList, NanoLatents, Pairs, open_corpus, stamp_of
    if not cfg.data:
        if cfg.preset != "nano":
            raise ValueError(f"stages 1 and 2 of --preset {cfg.preset} need --data, pictures with captions: "
                             "only the nano world's are built in")
        return NanoLatents(model.vae, cfg.seed)
    preset, folder = model.preset, Path(cfg.run_dir)
    bad = BadList(folder / "bad-samples" / f"rank-{dist.rank:05}.jsonl", cfg.max_bad)
    corpus = open_corpus(cfg.data, cfg.seed, cfg.workers, folder / "corpus.json", bad,
                         lambda: stamp_of(model.vae, preset.image_size, preset.latent_shape), dist)
    shape = preset.latent_shape if corpus.stamp else (preset.image_size, preset.image_size, 3)
    chunks = [list(mine[i:i + cfg.micro_batch]) for i in range(0, len(mine), cfg.micro_batch)]
    return Pairs(corpus, model.vae, shape, cfg.batch_size, chunks, cfg.workers, bad)


def rescale(cfg: TrainConfig, params: dict, data, dist) -> float:
    """Make the mean over a step's items one over its good ones; returns the factor, 0 if there are none."""
    import torch
    from common import all_reduce_mean, local
    if not cfg.data:
        return 1.0
    dropped = round(all_reduce_mean(torch.tensor(float(data.dropped)), dist).item() * dist.world_size)
    data.dropped = 0
    if dropped == 0:
        return 1.0
    factor = cfg.batch_size / (cfg.batch_size - dropped) if dropped < cfg.batch_size else 0.0
    for p in params.values():
        if p.grad is not None:
            local(p.grad).mul_(factor)
    return factor


def train_supervised(cfg: TrainConfig, model, dist, checkpoint: Path | None) -> dict[str, float]:
    """Stages 1 and 2. Returns the last logged loss."""
    import torch
    from tqdm import tqdm
    from common import (RunLog, StopSignal, adamw, all_reduce_mean, average_gradients, check_skips,
                        clip_gradients, cosine_lr, ema_update, load_checkpoint, load_into, load_optimizer,
                        read_metrics, save_checkpoint, whole)

    if cfg.batch_size % dist.world_size:
        raise ValueError("expected --batch-size to be a multiple of the number of devices, "
                         f"{dist.world_size}, got {cfg.batch_size}")
    mine = range(cfg.batch_size)[dist.rank::dist.world_size]
    data = open_data(cfg, model, dist, mine)
    params = prepare(cfg, model, dist)
    ema = {name: p.detach().clone() for name, p in params.items()}
    opt = adamw(params.values(), cfg.lr, cfg.weight_decay)
    done, total, seconds = 0, 0.0, 0.0    # total: the sum of the losses since the last line of the log
    skipped = in_a_row = quiet = 0        # steps without an update: all, in a row, since the last log line
    if checkpoint:
        tensors, state, _ = load_checkpoint(checkpoint)
        load_into(params, tensors["trained"], str(checkpoint))
        load_into(ema, tensors["ema"], str(checkpoint))
        load_optimizer(opt, state["optimizer"])
        done, total, seconds = state["step"], state["loss_sum"], state["seconds"]
        skipped, in_a_row, quiet = state["skipped"], state["in_a_row"], state["quiet"]
    lead, timed, began, started = dist.rank == 0, done, time.perf_counter(), time.perf_counter()
    log = RunLog(cfg.run_dir, resume_step=done + 1 if cfg.resume else None) if lead else None
    record: dict[str, float] = {}

    bar = tqdm(range(done, cfg.steps), total=cfg.steps, initial=done, disable=not lead, unit="step",
               dynamic_ncols=True)
    with StopSignal() as signal:
        for step in bar:
            lr = cosine_lr(step, cfg.steps, cfg.warmup, cfg.lr)
            for group in opt.param_groups:
                group["lr"] = lr
            opt.zero_grad(set_to_none=True)
            before = total
            for first in range(0, len(mine), cfg.micro_batch):
                items = list(mine[first:first + cfg.micro_batch])
                loss = item_loss(cfg, model, data, step, items) * (len(items) / len(mine))
                loss.backward()
                total += loss.item()
            if not math.isfinite(total):                   # a loss may overflow where its gradient does not
                params["queries"].grad.fill_(math.nan)
            average_gradients(params.values(), dist)
            factor = rescale(cfg, params, data, dist)
            grad_norm = clip_gradients(params.values(), cfg.clip_norm, dist)
            total = before + (total - before) * factor if factor != 1 else total
            if math.isfinite(grad_norm) and factor:                             # the same on all ranks
                opt.step()
                ema_update(ema, params, min(cfg.ema_decay, (step + 1) / (step + 10)))
                in_a_row = 0
            else:
                total, skipped, in_a_row, quiet = before, skipped + 1, in_a_row + 1, quiet + 1
            flags = all_reduce_mean(torch.tensor([total, signal.stop], dtype=torch.float64,
                                                 device=model.device), dist).tolist()
            stop, last = flags[1] > 0, step + 1 == cfg.steps
            if lead and ((step + 1) % cfg.log_every == 0 or last):
                count = (step % cfg.log_every) + 1 - quiet
                record = {"step": step + 1, "loss": flags[0] / count if count else math.nan, "lr": lr,
                          "grad_norm": grad_norm, "skipped": skipped,
                          "time/step": (time.perf_counter() - began) / (step + 1 - timed)}
                log.write(record)
                bar.set_postfix_str(f"loss {record['loss']:.4f}, |g| {grad_norm:.2f}")
            if (step + 1) % cfg.log_every == 0:
                total, flags[0], quiet, timed, began = 0.0, 0.0, 0, step + 1, time.perf_counter()
            if last or stop or (step + 1) % cfg.save_every == 0 or in_a_row >= cfg.max_skipped:
                state = {"step": step + 1, "loss_sum": flags[0], "optimizer": whole(opt.state_dict()),
                         "skipped": skipped, "in_a_row": in_a_row, "quiet": quiet,
                         "seconds": seconds + time.perf_counter() - started}
                tensors = {"trained": whole(params), "ema": whole(ema)}
                if lead:
                    save_checkpoint(cfg.run_dir, step + 1, tensors, state, cfg.keep)
            check_skips(in_a_row, cfg.max_skipped, f"step {step + 1}")
            if stop and not last:
                bar.close()
                if lead:
                    print(f"stopped after step {step + 1} of {cfg.steps}; everything is saved, "
                          "go on with --resume auto")
                return {}
    if lead:
        log.close()
        record = read_metrics(log.path)[-1]               # a finished run that is resumed has made no step
    finish(cfg, model, params, ema, dist, {"seconds": round(seconds + time.perf_counter() - started)}
           | {key: record[key] for key in ("loss", "skipped") if lead})
    return record


def prepare(cfg: TrainConfig, model, dist) -> dict:
    """What the stage trains, by name, with the model ready to train it; everything else is frozen."""
    from common import compile_parts, shard
    model.requires_grad_(False)
    for p in model.trainable(cfg.stage).values():
        p.requires_grad_(True)
    model.lim.gradient_checkpointing = model.dit.gradient_checkpointing = cfg.gradient_checkpointing
    if cfg.fsdp:
        shard(model, dist)
    if cfg.compile:
        compile_parts(model.device, model.lim, model.dit)
    return model.trainable(cfg.stage)


def finish(cfg: TrainConfig, model, params: dict, ema: dict, dist, made: dict) -> None:
    """The weights of a stage (the EMA's), and beside them how they were made."""
    from common import environment, gathered, weights_of, write_json
    from model import save_trained
    path = Path(cfg.run_dir) / f"stage{cfg.stage}.safetensors"
    with weights_of(params, ema, model), gathered(model):
        if dist.rank == 0:
            save_trained(model, path, cfg.stage, cfg)
            write_json(path.with_suffix(".json"),
                       {"command": "python " + " ".join(sys.argv), "seed": cfg.seed, "steps": cfg.steps,
                        "devices": dist.world_size, **made, **environment()})
            print(f"weights {path}")


# ----------------------------------------------------------------------------- entry

def load_model(cfg: TrainConfig):
    """The preset with its frozen parts, and the weights of the stage before, strictly."""
    import torch
    from model import PRESETS, ParaUni, weights_folder
    openuni = cfg.init.endswith(".pth")
    if cfg.stage == 1 and cfg.init != "auto" and not openuni:
        raise ValueError("expected no --init with --stage 1, which no stage precedes, but an OpenUni .pth, "
                         f"got {cfg.init}")
    folder = weights_folder(cfg.preset, cfg.weights)
    if cfg.weights == "random":
        model = ParaUni.from_preset(cfg.preset, "random", cfg.seed)
    else:                                     # straight onto the GPU that setup_dist chose
        model = ParaUni.from_parts(PRESETS[cfg.preset], folder, cfg.seed,
                                   "cuda" if torch.cuda.is_available() else "cpu")
    model.fuse_as([int(layer) for layer in cfg.layers], cfg.norm)
    if openuni:
        model.load_trained(Path(cfg.init))
        return model, f"{cfg.init}, an OpenUni checkpoint"
    if cfg.weights == "random" and cfg.init == "auto":
        return model, "random weights"
    if cfg.stage == 1:
        return model, f"{folder}: VLM, DiT and autoencoder; queries and LIM start afresh"
    path = folder / f"stage{cfg.stage - 1}.safetensors" if cfg.init == "auto" else Path(cfg.init)
    if not path.is_file():
        raise FileNotFoundError(f"stage {cfg.stage} starts from stage {cfg.stage - 1}: expected {path}, "
                                f"found none; run --stage {cfg.stage - 1} first and pass its file as --init")
    model.load_trained(path, cfg.stage - 1, cfg.preset)
    return model, f"{path}: {len(model.trainable(cfg.stage - 1))} tensors of stage {cfg.stage - 1}"


def main(argv: list[str] | None = None) -> dict[str, float]:
    cfg = parse(argv)
    import json
    from dataclasses import replace
    from common import (broadcast, cleanup_dist, config_dict, environment, find_checkpoint,
                        peer_lost_sentence, prepare_run_dir, setup_dist)
    dist = setup_dist()
    cuda = dist.device.type == "cuda"
    chosen = any(flag in ("--compile", "--no-compile") for flag in (sys.argv[1:] if argv is None else argv))
    if cfg.fsdp and dist.world_size == 1:
        raise ValueError("--fsdp splits the model over devices and finds one: start several, "
                         "torchrun --nproc-per-node N, or leave it out")
    cfg = replace(cfg, compile=cfg.compile if chosen else cuda and not cfg.fsdp and cfg.preset != "nano",
                  run_dir=f"runs/stage{cfg.stage}" if cfg.run_dir == "auto" else cfg.run_dir,
                  dtype=("bf16" if cuda else "fp32") if cfg.dtype == "auto" else cfg.dtype)
    try:
        with peer_lost_sentence(dist):
            checkpoint = None
            if dist.rank == 0:
                checkpoint = find_checkpoint(cfg.resume, cfg.run_dir)
                prepare_run_dir(cfg.run_dir, cfg.resume, cfg, MAY_CHANGE)
                print(json.dumps(config_dict(cfg)), json.dumps(environment()), sep="\n", flush=True)
            checkpoint = broadcast(checkpoint, dist)
            model, loaded = load_model(cfg)
            model.to(dist.device)
            if dist.rank == 0:
                trained = sum(p.numel() for p in model.trainable(cfg.stage).values())
                print(f"loaded {loaded}\n{trained:,} parameters are trained, "
                      f"{sum(p.numel() for p in model.parameters()) - trained:,} are frozen", flush=True)
            if cfg.stage == 3:
                import grpo
                return grpo.train(cfg, model, dist, checkpoint)
            return train_supervised(cfg, model, dist, checkpoint)
    finally:
        cleanup_dist()


if __name__ == "__main__":
    run_main(main)
