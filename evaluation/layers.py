"""What do the layers carry? `python evaluate.py layers`: one trained model, looked into.

    Figure 2   each layer alone as the condition: the rewards by depth
    Figure 4   how alike the layers are: q_i, the visual tokens that the paper compares, and c_i, what the
               LIM makes of them; with --last-file beside a model that was trained on the last layer only
    Figure 5   each region of layers removed: what every reward loses
    Figure 9   the reward curves of stage III runs; of one with LDAM and one without they are the
               supplement's Figures 1-3: `--runs runs/ldam,runs/no-ldam`

Every figure is a PNG; the numbers and a verdict on each sentence of the paper are in layers.json.
All pictures of a prompt start from the same noise, so that differences are paired by prompt.

Letters: L VLM layers, P pairs of layers, B prompts, N queries, D width, H W pixels.
"""
import inspect
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from common import Refused, derive_seed, fingerprint, knob, precision, read_log, write_json
from evaluation import (DrawConfig, ScoreConfig, claim, draw, drawing_settings, finish, heldout_prompts, load,
                        mean_and_error, read_json, same_settings, start, table)
from grpo import open_rewards
from ldam import REGIONS, REWARD_REGIONS, region_layers
from model import ParaUni
from pictures import COLORS, draw_curves, panels, save_sheet

Scores = dict[str, dict[str, Tensor]]       # variant -> reward -> one score a prompt, (B,) float64


@dataclass(frozen=True)
class LayersConfig(ScoreConfig):
    last_file: str = knob("", "weights trained on the last layer only, for Figure 4; empty: without")
    runs: tuple[str, ...] = knob((), "stage 3 run folders whose curves are drawn")
    limit: int = knob(96, "the first so many prompts (the paper's Figure 2 has 500); 0: all of them")
    out: str = knob("runs/layers", "folder for figures and tables; an interrupted analysis there goes on")


def main(argv: list[str] | None = None) -> dict:
    """The paper's analyses of layers. Returns the rows of claims and figures."""
    cfg, dist = start(LayersConfig, argv, __doc__)
    folder = Path(cfg.out)
    # what is missing shows before the first picture, not after the last one
    if "clip" not in cfg.rewards:
        raise Refused("Figure 2 shows the CLIP score: name clip among --rewards")
    logs = {run: stage3_log(Path(run)) for run in cfg.runs}
    model = load(cfg, dist.device)
    models = {"all layers": model}
    if cfg.last_file:
        models["the last layer"] = load(cfg, dist.device, cfg.last_file)
    prompts = heldout_prompts(cfg, model)

    # a variant is a choice of layers to fuse
    L = model.preset.lim.vlm_layers
    variants = {"all": list(range(1, L + 1))}
    variants |= {f"layer {i}": [i] for i in range(1, L + 1)}
    variants |= {f"no {region}": without_region(region, L) for region in REGIONS}
    scores = score_variants(cfg, model, prompts, variants)
    likeness = {name: similarities(one, prompts, cfg) for name, one in models.items()}
    single, claims = figure2(scores, L, folder)
    maps, claims4 = figure4(likeness, folder)
    removed, claims5 = figure5(scores, folder)
    claims += claims4 + claims5
    if logs:
        drawn = [key for key in next(iter(logs.values()))[0] if key.startswith("reward/")]
        figure, axes = panels(len(drawn))
        draw_curves(axes, logs, drawn)
        figure.savefig(folder / "figure9.png")

    # the pictures themselves: a row a prompt, a column a variant
    shown = prompts[:4]
    columns = [draw_all(cfg, model, shown, layers) for layers in variants.values()]
    images = torch.stack(columns, 1).flatten(0, 1)                              # (4 variants, 3, H, W)
    save_sheet(folder / "figure2_pictures.png", images, len(variants), list(variants) * len(shown), shown)
    result = {"claims": claims, "figure2": single, "figure4": maps, "figure5": removed}
    return finish(cfg, "layers", result, "\n\n".join(map(table, (single, removed, claims))))


def without_region(region: str, num_layers: int) -> list[int]:
    return sorted({*range(1, num_layers + 1)} - {*region_layers(region, num_layers)})


def draw_all(cfg: DrawConfig, model: ParaUni, prompts: list[str], layers: list[int] | None = None) -> Tensor:
    """A picture of each prompt, (B, 3, H, W) in [0, 1] on the CPU, conditioned on some layers. The noise of
    picture i comes from (seed, i), whatever the layers and the model."""
    seeds = [derive_seed(cfg.seed, "analyse", i) for i in range(len(prompts))]
    return draw(cfg, model, prompts, seeds, layers=layers)


def score_variants(cfg: LayersConfig, model: ParaUni, prompts: list[str],
                   variants: dict[str, list[int]]) -> Scores:
    """Rewards of every prompt's picture under every variant. What variants.json has is not drawn again."""
    scorers = open_rewards(cfg, model, prompts[0])
    digests = {name: fingerprint(scorer)[:16] for name, scorer in scorers.items()}
    for name, scorer in scorers.items():
        # a function has no weights that tell it from others
        if inspect.isfunction(scorer.score):
            source = Path(inspect.getfile(scorer.score)).read_bytes()
            digests[name] = sha256(source).hexdigest()[:16]
    same_settings(Path(cfg.out), {**drawing_settings(cfg, model), "prompts": derive_seed(*prompts),
                                  "limit": len(prompts), "rewards": digests})
    path = Path(cfg.out) / "variants.json"
    scores = read_json(path) if path.is_file() else {}
    for name in tqdm([name for name in variants if name not in scores], unit="variant"):
        images = draw_all(cfg, model, prompts, variants[name])                  # (B, 3, H, W)
        scores[name] = {reward: scorer(images, prompts).tolist() for reward, scorer in scorers.items()}
        write_json(path, scores)
    every = [[by_reward[reward] for reward in scorers] for by_reward in scores.values()]
    values = torch.tensor(every, dtype=torch.float64)                           # (variants, rewards, B)
    # a prompt without a finite score somewhere is left out everywhere: differences stay paired
    values = values[..., values.isfinite().all(0).all(0)]                       # (variants, rewards, B)
    return {name: dict(zip(scorers, rows)) for name, rows in zip(scores, values)}


def table_row(name: str, variant: str, scores: dict[str, Tensor]) -> dict:
    """Mean and standard error of each reward of a variant."""
    row = {name: variant}
    for reward, values in scores.items():
        row[reward], row[f"{reward} s.e."] = mean_and_error(values.tolist())
    return {**row, "n": len(values)}


def figure2(scores: Scores, L: int, folder: Path) -> tuple[list[dict], list[dict]]:
    """The rewards by the layer that is the condition, beside those of all layers. Returns table, claims."""
    depth = list(range(1, L + 1))
    names = ["all", *(f"layer {i}" for i in depth)]
    rows = [table_row("condition", name, scores[name]) for name in names]
    figure, axes = panels(len(scores["all"]))
    for axis, reward in zip(axes, scores["all"]):
        means = [row[reward] for row in rows]
        errors = [row[f"{reward} s.e."] or 0 for row in rows]
        axis.axhline(means[0], color="black", label="all layers")
        axis.axhspan(means[0] - errors[0], means[0] + errors[0], color="black", alpha=0.15, linewidth=0)
        axis.errorbar(depth, means[1:], errors[1:], marker="o", capsize=3, label="one layer")
        axis.set(title=reward, xlabel="layer used as the condition")
    axes[0].legend()
    figure.savefig(folder / "figure2.png")

    # each prompt's least-squares slope over depth
    clip = torch.stack([scores[name]["clip"] for name in names[1:]])            # (L, B)
    x = torch.tensor(depth, dtype=torch.float64) - (L + 1) / 2                  # (L,)
    slopes = x @ clip / x.square().sum()                                        # (B,)
    rising = claim("The CLIP score of a single layer rises with its depth (Figure 2)", "CLIP score a layer",
                   slopes)
    # the best layer is chosen by the same pictures, which leans against the claim
    best = clip[clip.mean(1).argmax()]                                          # (B,)
    more = claim("All layers together say more than the best single one",
                 "CLIP score, all - best layer", scores["all"]["clip"] - best)
    return rows, [rising, more]


@torch.no_grad()
def similarities(model: ParaUni, prompts: list[str], cfg: LayersConfig) -> dict[str, Tensor]:
    """Cosine similarity of layers i and j, a mean over queries: of q_i, before the LIM, and of c_i, behind
    it. (B, L, L) each."""
    maps = {"q_i": [], "c_i": []}
    for first in range(0, len(prompts), cfg.batch_size):
        prefix = model.encode_prefix(prompts[first:first + cfg.batch_size])
        with precision(model.device, cfg.dtype):
            features = {"q_i": model.read_queries(prefix), "c_i": model.condition_layers(prefix)}
        for kind, layers in features.items():
            unit = F.normalize(layers.float(), dim=-1)                          # (L, b, N, D)
            cosine = torch.einsum("ibnd,jbnd->bij", unit, unit) / unit.shape[2]
            maps[kind].append(cosine.cpu())                                     # (b, L, L)
    return {kind: torch.cat(parts) for kind, parts in maps.items()}


def figure4(likeness: dict[str, dict[str, Tensor]], folder: Path) -> tuple[list[dict], list[dict]]:
    """Table and claims of maps, from {what the model was trained on: {"q_i" or "c_i": (B, L, L)}}."""
    rows, claims, columns = [], [], len(likeness)
    figure, axes = panels(columns, 4.4, 3.6, rows=2)
    for kind, line in (("q_i", axes[:columns]), ("c_i", axes[columns:])):
        means = {trained_on: maps[kind].mean(0) for trained_on, maps in likeness.items()}   # (L, L) each
        low = min(mean.min().item() for mean in means.values())
        for axis, (trained_on, mean) in zip(line, means.items()):
            L = len(mean)
            rows.append({"features": kind, "trained on": trained_on, "cosines": mean.tolist()})
            image = axis.imshow(mean.numpy(), vmin=low, vmax=1, origin="lower", extent=(0.5, L + 0.5) * 2)
            # the regions' borders, where clusters would end
            for region in ("shallow", "middle"):
                edge = max(region_layers(region, L)) + 0.5
                axis.axhline(edge, color="white", linewidth=0.8)
                axis.axvline(edge, color="white", linewidth=0.8)
            axis.set(title=f"{kind}, trained on {trained_on}", xlabel="layer", ylabel="layer")
        figure.colorbar(image, ax=line, label="cosine similarity")
        claims += figure4_claims(kind, *(maps[kind] for maps in likeness.values()))
    figure.savefig(folder / "figure4.png")
    return rows, claims


def figure4_claims(kind: str, every: Tensor, last: Tensor | None = None) -> list[dict]:
    """What the paper says of the maps (B, L, L): "adjacent layers exhibit higher similarity", "cluster-like
    phenomena" where all layers were trained, "relatively low" similarity where only the last one was."""
    L = every.shape[-1]
    i, j = torch.triu_indices(L, L, 1)                                          # (P,) each
    region = torch.tensor([k for k, name in enumerate(REGIONS) for _ in region_layers(name, L)])   # (L,)
    same = region[i] == region[j]                                               # (P,)
    near = j - i == 1                                                           # (P,)
    every = every[:, i, j].double()                                             # (B, P)
    # a cluster ends at its border: judged by neighbours alone, among which nearness plays no part
    inside, across = near & same, near & ~same                                  # (P,) each

    def contrast(maps: Tensor, these: Tensor, others: Tensor) -> Tensor:
        return maps[:, these].mean(1) - maps[:, others].mean(1)                 # (B,)

    clusters = contrast(every, inside, across)                                  # (B,)
    found = [
        ("Adjacent layers are more alike than others", "adjacent - others", contrast(every, near, ~near)),
        ("Layers of one region are more alike than layers of two", "same region - two regions",
         contrast(every, same, ~same)),
        ("Clusters: neighbours are more alike inside a region than across its border",
         "neighbours, inside - across", clusters)]
    if last is not None:
        last = last[:, i, j].double()                                           # (B, P)
        found += [
            ("Layers are less alike when trained on the last one only", "all pairs, all - last",
             every.mean(1) - last.mean(1)),
            ("Clusters are weaker when trained on the last layer only",
             "neighbours, inside - across, all - last", clusters - contrast(last, inside, across))]
    return [claim(f"{text} (Figure 4, {kind})", f"cosine similarity, {measure}", values)
            for text, measure, values in found]


def figure5(scores: Scores, folder: Path) -> tuple[list[dict], list[dict]]:
    """Each region removed: the paired change of each reward. Returns table, and the caption as claims."""
    whole = scores["all"]
    changes = {}
    for region in REGIONS:
        changes[region] = {reward: scores[f"no {region}"][reward] - whole[reward] for reward in whole}
    rows = [table_row("removed", region, by_reward) for region, by_reward in changes.items()]
    figure, axes = panels(len(whole), 3.2, 3)
    for axis, reward in zip(axes, whole):
        errors = [row[f"{reward} s.e."] or 0 for row in rows]
        axis.bar(list(REGIONS), [row[reward] for row in rows], yerr=errors, capsize=4, color=COLORS[:3])
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set(title=f"change of {reward}", xlabel="region removed")
    figure.savefig(folder / "figure5.png")

    # how far each score falls, (B,) each
    falls = {reward: {region: -changes[region][reward] for region in REGIONS} for reward in whole}
    found = [("clip is sensitive to all three regions", f"fall of clip without {region}", fall)
             for region, fall in falls["clip"].items()]
    for reward, most in REWARD_REGIONS.items():
        if reward not in falls:
            continue
        # "most": more than by the strongest of the others; its choice by these scores leans against the claim
        others = {region: fall for region, fall in falls[reward].items() if region != most}
        rival = max(others, key=lambda region: others[region].mean())
        found.append((f"{reward} is most sensitive to the {most} region",
                      f"fall of {reward} without {most} - without {rival}",
                      falls[reward][most] - others[rival]))
        if reward == "clip":
            continue
        # "little": by less than half, up or down, of what the other two regions do
        shallow, middle, deep = falls[reward].values()                          # (B,) each
        change = shallow * shallow.mean().sign()                                # (B,)
        found.append((f"Shallow layers have little impact on {reward}",
                      f"{reward}: half the fall without another region - change without shallow",
                      (middle + deep) / 4 - change))
    return rows, [claim(f"{text} (Figure 5)", measure, values) for text, measure, values in found]


def stage3_log(run: Path) -> list[dict]:
    """The epochs of a stage 3 run."""
    records = [record for record in read_log(run / "metrics.jsonl") if "ldam/fired" in record]
    if not records:
        raise Refused(f"expected the folder of a stage 3 run, with epochs in its log, got {run}")
    return records
