"""What does each part of the method add? `python evaluate.py ablate`: many nano models, trained, in 13 rows.

Rows about layers train stages 1 and 2 from stage 0, rows about LDAM train stage 3 from one stage 2; those of
the paper's Table 3 are among them.

A run is a row with one seed, in a folder of its own: settings.json holds the flags of its train.py runs,
row.json what came out. What has its row.json is not trained again; what was interrupted goes on from its
checkpoint. Several processes may share the work: the same command with other --rows, OMP_NUM_THREADS=1 each,
and once more with all of them for the table. Seeds are the same in all rows: differences are paired by seed.

Letters: B pictures, N queries, E condition width, C h w latent.
"""
import hashlib
import itertools
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import train
from common import Refused, derive_seed, generator, knob, parse_config, resolve, setup_dist, write_json
from dit import flow_matching_loss, randn
from evaluation import DrawConfig, claim, finish, mean_and_error, read_json, same_settings, table
from evaluation.layers import draw_all, stage3_log, without_region
from ldam import REGIONS
from model import PRESETS, ParaUni, weights_folder
from nano import world
from pictures import panels
from rewards import build_reward

REWARDS = ("clip", "pickscore", "aesthetic")
MEASURES = ("judge", *REWARDS, "loss")                  # only the loss is better small
# Where the paper asks for a jump of 100, the largest in nano's default runs is 3.9.
AT_NANO = "--ldam-spike=2.5"
# What a model is scored by: a picture of each prompt of the nano benchmark, and pictures for the held-out
# loss. The noise is the same for all rows and all training seeds.
NUM_LOSS = 256
DRAWING = DrawConfig(num_steps=10, batch_size=60, dtype="fp32")


class Row(NamedTuple):
    title: str
    family: str                     # "layers" or "ldam"
    paper: float | None = None      # GenEval, overall, of the paper's Table 3
    own: list[str] = []             # what it adds to the flags of its first stage


ROWS = {
    "all": Row("all layers", "layers", 0.87),
    "no-shallow": Row("no shallow layers", "layers", 0.82),
    "no-middle": Row("no middle layers", "layers", 0.85),
    "no-deep": Row("no deep layers", "layers", 0.84),
    "every-other": Row("every other layer", "layers", 0.86),
    "no-norm": Row("no LayerNorm", "layers", 0.73, own=["--no-norm"]),
    "last": Row("last layer only", "layers"),
    "no-ldam": Row("no LDAM", "ldam", own=["--no-ldam"]),
    "ldam": Row("LDAM, the paper's thresholds", "ldam", 0.87),
    "ldam-epoch": Row("LDAM, nano thresholds, noise for an epoch", "ldam", own=[AT_NANO]),
    "ldam-keep": Row("LDAM, nano thresholds, noise kept", "ldam", own=[AT_NANO, "--ldam-mode=keep"]),
    "no-grad-norm": Row("LDAM, nano thresholds, no gradient-norm gate", "ldam", 0.86,
                        [AT_NANO, "--no-ldam-use-grad-norm"]),
    "no-reward": Row("LDAM, nano thresholds, no reward gate", "ldam", 0.86,
                     [AT_NANO, "--no-ldam-use-reward"])}
PAPER_NOTE = ("Table 3's \"Ours\", 0.87, stands beside all layers, here without stage 3, and beside LDAM: "
              "the paper does not say which of them it is.")
# claim, the row that is better by it, the other row
COMPARED = (
    *((f"It is worse with {row.title}", "all", name) for name, row in ROWS.items()
      if row.family == "layers" and name != "all"),
    ("LDAM helps", "ldam-epoch", "no-ldam"),
    ("LDAM helps, its noise kept", "ldam-keep", "no-ldam"),
    ("LDAM needs the gradient-norm gate", "ldam-epoch", "no-grad-norm"),
    ("LDAM needs the reward gate", "ldam-epoch", "no-reward"))


@dataclass(frozen=True)
class AblateConfig:
    """A run of a row about layers takes about five minutes of one CPU core."""
    weights: str = knob("auto", "where all rows start; auto: weights/nano; or a folder like it")
    rows: tuple[str, ...] = knob(tuple(ROWS), "rows to train; the table shows every finished one")
    seeds: int = knob(3, "runs of each row, with seeds 0, 1, 2 ...; at least 2")
    stage1_steps: int = knob(150, "steps of stage 1, rows about layers")
    stage2_steps: int = knob(120, "steps of stage 2, rows about layers")
    stage3_steps: int = knob(12, "epochs of stage 3 for each of the three rewards")
    out: str = knob("runs/ablate", "folder for runs, tables and plots; interrupted work there goes on")


def main(argv: list[str] | None = None) -> dict:
    """Train every row over several seeds; table, plots and verdicts. Returns the rows of the tables "ablate"
    and "claims"; {} if stopped."""
    cfg = parse_config(AblateConfig, argv, description=__doc__.split("\n")[0])
    if not set(cfg.rows) <= set(ROWS) or cfg.seeds < 2:
        raise Refused(f"expected --seeds to be at least 2, and --rows some of {', '.join(ROWS)}")
    # a row that is finished stands in the table, whether it is among --rows or not
    for name, seed in itertools.product(ROWS, range(cfg.seeds)):
        folder = run_folder(cfg, name, seed)
        if (folder / "row.json").is_file():
            same_settings(folder, make_plan(cfg, name, seed))
    for name, seed in itertools.product(cfg.rows, range(cfg.seeds)):
        folder, plan = run_folder(cfg, name, seed), make_plan(cfg, name, seed)
        same_settings(folder, plan)
        print(f"{ROWS[name].title}, seed {seed}: {folder}", flush=True)
        if not (folder / "row.json").is_file() and not run_row(folder, plan):
            print("stopped; everything is saved, the same command goes on from here")
            return {}
    return summarise(cfg)


# ----------------------------------------------------------------------------- one run

def run_folder(cfg: AblateConfig, name: str, seed: int) -> Path:
    return Path(cfg.out) / f"{name}-seed{seed}"


def flags(**values: object) -> list[str]:
    """flags(num_steps=4) -> ["--num-steps", "4"]"""
    return [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def make_plan(cfg: AblateConfig, name: str, seed: int) -> dict:
    """All that a run depends on: the train.py flags of its stages, in order, and the weights."""
    folder, parts = run_folder(cfg, name, seed), weights_folder("nano", cfg.weights)
    shared = flags(seed=seed, weights=cfg.weights, resume="auto", keep=1)
    if ROWS[name].family == "layers":
        before, stages = "none", []
        for n, steps in ((1, cfg.stage1_steps), (2, cfg.stage2_steps)):
            own = flags(steps=steps, warmup=max(1, steps // 10), batch_size=64, micro_batch=64, dtype="bf16",
                        save_every=50)
            stages.append(flags(stage=n, init=before, run_dir=folder / f"stage{n}") + shared + own)
            before = folder / f"stage{n}" / f"stage{n}.safetensors"
    else:
        own = flags(steps=cfg.stage3_steps, num_groups=3, group_size=8, micro_batch=24, num_steps=4,
                    num_eval=24, eval_steps=DRAWING.num_steps, eval_every=10_000, save_every=10)
        start = flags(stage=3, init=parts / "stage2.safetensors", run_dir=folder / "stage3")
        stages = [start + shared + own]
    stages[0] += ROWS[name].own

    # fewer layers than all
    L = PRESETS["nano"].lim.vlm_layers
    fused = {"last": [L], "every-other": range(2 - L % 2, L + 1, 2)}
    fused |= {f"no-{region}": without_region(region, L) for region in REGIONS}
    if name in fused:
        stages[0] += flags(layers=",".join(map(str, fused[name])))
    # runs from other weights must not share a table
    files = [path.read_bytes() for path in sorted(parts.rglob("*.safetensors"))]
    digest = hashlib.sha256(b"".join(files)).hexdigest()[:16]
    return {"stages": stages, "weights": cfg.weights, "sha256": digest}


def run_row(folder: Path, plan: dict) -> bool:
    """Train what the plan says, from where it was left, and score it. False if a signal stopped it."""
    for stage in plan["stages"]:
        # its flags begin with --stage N
        name = f"stage{stage[1]}"
        weights = folder / name / f"{name}.safetensors"
        if not weights.is_file() and not train.main(stage):
            return False
    write_json(folder / "row.json", {"scores": score_run(plan["weights"], weights)})
    for checkpoints in folder.glob("stage*/checkpoints"):
        shutil.rmtree(checkpoints)
    return True


def score_run(parts: str, weights: Path) -> dict:
    """What one trained model is worth: judge, rewards of the same pictures, loss on held-out pictures."""
    device = setup_dist().device
    cfg = resolve(DRAWING, device)
    # nano's stage 3 learns to do without guidance
    if weights.stem == "stage3":
        cfg = replace(cfg, guidance_scale=1.0)
    model = ParaUni.from_preset("nano", parts, weights, device=device)
    prompts = world.benchmark_prompts()
    texts = [prompt.text for prompt in prompts]
    images = draw_all(cfg, model, texts)                                        # (B, 3, H, W)
    judge = world.task_scores(world.judge(images, prompts), prompts)["overall"]
    scores = {"judge": judge, "loss": heldout_loss(model)}
    for name in REWARDS:
        reward = build_reward(name, device, weights_folder("nano", "auto"))
        scores[name] = reward(images, texts).mean().item()
    return scores


@torch.no_grad()
def heldout_loss(model: ParaUni) -> float:
    """Mean flow-matching loss on pictures whose captions are never trained on, at even times."""
    rng = np.random.default_rng(derive_seed(DRAWING.seed, "heldout loss"))
    scenes, prompts = zip(*[world.sample_pair(rng, test=True) for _ in range(NUM_LOSS)])
    images = world.render(list(scenes)).to(model.device)                        # (B, 3, H, W)
    x0 = model.vae.encode(images * 2 - 1).float()                               # (B, C, h, w)
    generators = [generator(DRAWING.seed, "heldout loss", i) for i in range(NUM_LOSS)]
    noise = randn(x0.shape, generators, model.device)                           # (B, C, h, w)
    c = model.condition([prompt.text for prompt in prompts])                    # (B, N, E)
    t = (torch.arange(NUM_LOSS) * 97 % NUM_LOSS + 0.5) / NUM_LOSS               # (B,) mixed
    return flow_matching_loss(model.dit, x0, c, t.to(model.device), noise).item()


# ----------------------------------------------------------------------------- the table

def summarise(cfg: AblateConfig) -> dict:
    """Every finished row of this folder, of the seeds asked for: table, plots, claims."""
    # {row: {seed: scores}}
    runs: dict[str, dict[int, dict]] = {}
    for name, seed in itertools.product(ROWS, range(cfg.seeds)):
        run = run_folder(cfg, name, seed)
        if not (run / "row.json").is_file():
            continue
        scores = runs.setdefault(name, {})[seed] = read_json(run / "row.json")["scores"]
        if ROWS[name].family == "ldam":
            scores["firings"] = sum(record["ldam/fired"] for record in stage3_log(run / "stage3"))
    rows = [table_row(name, runs) for name in runs]
    plot_rows(runs, Path(cfg.out) / "ablate.png")

    # what the paper says, each measure by itself
    claims = []
    for (text, better, worse), measure in itertools.product(COMPARED, MEASURES):
        values = advantage(runs, better, worse, measure)
        if len(values) > 1:
            claims.append(claim(text, measure, values, "seeds"))
    tables = [table(part) for part in (rows, claims) if part]
    text = "\n\n".join([*tables, f"Nano thresholds: {AT_NANO}.", PAPER_NOTE])
    return finish(cfg, "ablate", {"ablate": rows, "claims": claims}, text)


def table_row(name: str, runs: dict) -> dict:
    """Means over seeds, and the judge's paired difference to the row that it is compared with."""
    reference = "all" if ROWS[name].family == "layers" else "no-ldam"
    row = {"row": ROWS[name].title, "seeds": len(runs[name])}
    for measure in MEASURES:
        values = [scores[measure] for scores in runs[name].values()]
        row[measure], row[f"{measure} s.e."] = mean_and_error(values)
    difference = advantage(runs, name, reference, "judge") if name != reference else []
    row["judge against"] = ROWS[reference].title
    row["judge difference"], row["difference s.e."] = mean_and_error(difference)
    fired = [scores["firings"] for scores in runs[name].values() if "firings" in scores]
    row["firings"] = sum(fired) if fired else None
    row["paper"] = ROWS[name].paper
    return row


def advantage(runs: dict, better: str, worse: str, measure: str) -> list[float]:
    """better - worse for each seed that both have, turned so that a positive number is an advantage."""
    a, b = runs.get(better, {}), runs.get(worse, {})
    sign = -1 if measure == "loss" else 1
    return [sign * (a[seed][measure] - b[seed][measure]) for seed in a if seed in b]


def plot_rows(runs: dict, path: Path) -> None:
    """Each row's seeds (pale) and mean with its standard error, a panel a measure."""
    figure, axes = panels(len(MEASURES), 3, 0.6 + 0.35 * len(runs))
    names = list(runs)[::-1]
    for axis, measure in zip(axes, MEASURES):
        for y, name in enumerate(names):
            color = "tab:blue" if ROWS[name].family == "layers" else "tab:red"
            values = [scores[measure] for scores in runs[name].values()]
            mean, error = mean_and_error(values)
            axis.plot(values, [y] * len(values), "o", color=color, alpha=0.3, markersize=4)
            axis.errorbar(mean, y, xerr=error or 0, fmt="o", color=color, capsize=3)
        axis.set(title=measure + (" (less is better)" if measure == "loss" else ""))
        axis.set_yticks(range(len(names)), [ROWS[name].title for name in names] if axis is axes[0] else [])
        axis.grid(axis="y", alpha=0.3)
    figure.savefig(path)
