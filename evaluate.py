"""Measure a model: `python evaluate.py geneval`, `rewards` or `understand`; each has a --help.

    geneval     does it draw what is asked for? the nano benchmark's prompts through the exact judge of
                nano/world.py
    rewards     what did stage III gain? the reward models on held-out prompts, before and after
    understand  does the vision-language model still see? held-out questions about pictures of the nano world

Each prints a table and writes it, with its settings, as JSON into --out. Standard errors (s.e.) are over
prompts, or over questions: sample standard deviation / sqrt(n). Letters: B pictures, H W pixels.
"""
import hashlib
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from common import config_dict, derive_seed, knob, parse_config, read_metrics, run_main
from sample import load_model, out_folder
from train import RECIPES, TrainConfig

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor, nn
    from model import ParaUni


@dataclass(frozen=True)
class ModelConfig:
    """Flags of every command."""
    preset: str = knob("nano", "size of everything")
    weights: str = knob("auto", "auto (weights/nano), random (from --seed), "
                                "or a folder with vlm/, transformer/, vae/")
    stage_file: str = knob("", "a stage's weights, as runs/stage3/stage3.safetensors; "
                               "empty: the newest in --weights")
    out: str = knob("", "folder for tables and pictures")
    seed: int = knob(0, "all randomness is derived from it")
    batch_size: int = knob(64, "pictures at a time")
    dtype: str = knob("auto", "auto: bf16 on CUDA, fp32 on CPU", choices=("auto", "fp32", "bf16"))

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("num_steps", 1), ("per_prompt", 1), ("count", 1),
                            ("limit", 0)):
            if (value := getattr(self, name, least)) < least:
                raise ValueError(f"expected --{name.replace('_', '-')} of at least {least}, got {value}")


# ----------------------------------------------------------------------------- shared

def parse(cls: type, argv: list[str], command: Callable) -> ModelConfig:
    return parse_config(cls, {name: {} for name in RECIPES}, argv, command.__doc__.split("\n")[0])


def load(cfg: ModelConfig, stage_file: str) -> tuple["ParaUni", str]:
    """A model and the precision that --dtype means on its device."""
    model = load_model(cfg.preset, cfg.weights, stage_file, cfg.seed)
    auto = "bf16" if model.device.type == "cuda" else "fp32"
    return model, auto if cfg.dtype == "auto" else cfg.dtype


def mean_and_error(values: list[float]) -> tuple[float | None, float | None]:
    """Mean and its standard error; None where there are too few values."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return (fmean(values) if values else None), error


def number(value: float | None, width: int = 8, sign: str = "") -> str:
    return f"{'-':>{width}}" if value is None else f"{value:{sign}{width}.4f}"


def fingerprint(module: "nn.Module") -> str:
    """SHA-256 of every parameter and buffer, names included: equal only where all bits are."""
    import torch
    digest = hashlib.sha256()
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def finish(cfg: ModelConfig, name: str, result: dict, table: str) -> dict:
    """Print the table; write the result with how it was made."""
    from common import environment, write_json
    path = Path(cfg.out) / f"{name}.json"
    write_json(path, {**result, "config": config_dict(cfg), "environment": environment()})
    print(f"{table}\nwritten to {path}")
    return result


# ----------------------------------------------------------------------------- geneval

PER_PROMPT = 4                  # pictures of each prompt that make the benchmark, as in GenEval


@dataclass(frozen=True)
class GenevalConfig(ModelConfig):
    out: str = knob("runs/geneval",
                    "folder for verdicts, table and pictures; an interrupted evaluation there goes on")
    per_prompt: int = knob(PER_PROMPT, "pictures of each prompt")
    limit: int = knob(0, "prompts, evenly spread over the benchmark's, for a quick look; 0: all of them")
    num_steps: int = knob(20, "sampling steps")
    guidance_scale: float = knob(4.5, "classifier-free guidance; 1 turns it off")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preset != "nano":
            raise ValueError(f"only --preset nano is judged so far, got {self.preset}: "
                             "the judge knows the nano world only")


def geneval(argv: list[str]) -> dict:
    """The nano benchmark: pictures of held-out prompts through the exact judge, in GenEval's six tasks."""
    cfg = parse(GenevalConfig, argv, geneval)
    from common import save_png
    from nano import world
    prompts = world.benchmark_prompts()
    if cfg.limit > len(prompts):
        raise ValueError(f"expected --limit of at most {len(prompts)}, the benchmark's prompts, "
                         f"got {cfg.limit}")
    folder = out_folder(cfg.out)
    model, dtype = load(cfg, cfg.stage_file)
    settings = {"weights": f"sha256:{fingerprint(model)[:16]}", "seed": cfg.seed, "num_steps": cfg.num_steps,
                "guidance_scale": cfg.guidance_scale, "dtype": dtype}          # all that a verdict depends on
    verdicts = read_verdicts(folder / "verdicts.jsonl", settings)
    count = cfg.limit or len(prompts)
    wanted = [(i * len(prompts) // count, j) for i in range(count) for j in range(cfg.per_prompt)]
    if not judge_pictures(cfg, model, dtype, prompts,
                          [key for key in wanted if key not in verdicts], verdicts):
        return {}
    verdicts = {key: verdicts[key] for key in wanted}
    save_png(folder / "examples.png", example_grid(cfg, model, dtype, prompts, verdicts))
    whole = count == len(prompts) and cfg.per_prompt == PER_PROMPT
    name = ("nano GenEval" if whole else
            f"part of nano GenEval, not the benchmark ({count} of {len(prompts)} prompts, "
            f"{cfg.per_prompt} of {PER_PROMPT} pictures each)")
    scores = geneval_scores(verdicts, prompts)
    result = {"name": name, "benchmark": whole, "settings": settings, **scores}
    return finish(cfg, "geneval", result,
                  f"{name}\n{geneval_table(scores)}\npictures {folder / 'examples.png'}")


def read_verdicts(path: Path, settings: dict) -> dict[tuple[int, int], bool]:
    """(prompt, sample) -> right, of an earlier run with the same settings;
    they stand in the file's first line.

    A last line that was cut is taken off. ValueError names the settings that differ.
    """
    with open(path, "ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
    records = read_metrics(path)
    if not records:
        path.write_text(json.dumps({"settings": settings}) + "\n")
        return {}
    was = records[0].get("settings", {})
    changed = [f"--{name.replace('_', '-')} {was.get(name, '(absent)')} -> {value}"
               for name, value in settings.items() if was.get(name) != value]
    if changed:
        raise ValueError(f"{path} is of other settings ({', '.join(changed)}): give those, "
                         "or choose another --out")
    return {(record["prompt"], record["sample"]): record["right"] for record in records[1:]}


def draw(cfg: GenevalConfig, model: "ParaUni", dtype: str, prompts: list,
         keys: list[tuple[int, int]]) -> "Tensor":
    """The pictures (prompt, sample) of the benchmark, (B, 3, H, W) in [0, 1] on the CPU:
    the same in any batch."""
    from common import precision
    seeds = [derive_seed(cfg.seed, "geneval", i, j) for i, j in keys]
    with precision(model.device, dtype):
        return model.generate([prompts[i].text for i, _ in keys], cfg.num_steps, cfg.guidance_scale,
                              seed=seeds).cpu()


def judge_pictures(cfg: GenevalConfig, model: "ParaUni", dtype: str, prompts: list,
                   todo: list[tuple[int, int]], verdicts: dict[tuple[int, int], bool]) -> bool:
    """Draw and judge pictures; add each verdict to `verdicts` and to the file.
    False if a signal stopped it."""
    from common import StopSignal
    from nano import world
    from tqdm import tqdm
    with StopSignal() as signal, open(Path(cfg.out) / "verdicts.jsonl", "a") as file:
        with tqdm(total=len(todo), unit="picture", dynamic_ncols=True, disable=not todo) as bar:
            for first in range(0, len(todo), cfg.batch_size):
                if signal.stop:
                    bar.close()
                    print(f"stopped with {len(todo) - first} pictures to go; "
                          "the same command goes on from here")
                    return False
                keys = todo[first:first + cfg.batch_size]
                right = world.judge(draw(cfg, model, dtype, prompts, keys), [prompts[i] for i, _ in keys])
                for (i, j), verdict in zip(keys, right):
                    line = {"prompt": i, "sample": j, "right": verdict, "task": prompts[i].task}
                    file.write(json.dumps({**line, "text": prompts[i].text}) + "\n")
                file.flush()
                verdicts |= zip(keys, right)
                bar.update(len(keys))
    return True


def geneval_scores(verdicts: dict[tuple[int, int], bool], prompts: list) -> dict:
    """Share of right pictures of each task, and `overall`, the unweighted mean of the tasks,
    with standard errors.

    An error counts prompts, not pictures, since the pictures of a prompt fail together;
    those of tasks add in squares.
    """
    from nano import world
    scores = world.task_scores(list(verdicts.values()), [prompts[i] for i, _ in verdicts])
    tasks, errors = {}, []
    for task in scores:
        if task == "overall":
            continue
        by_prompt: dict[int, list[float]] = {}
        for (i, _), right in verdicts.items():
            if prompts[i].task == task:
                by_prompt.setdefault(i, []).append(float(right))
        errors.append(mean_and_error([fmean(shares) for shares in by_prompt.values()])[1])
        tasks[task] = {"right": scores[task], "error": errors[-1], "prompts": len(by_prompt),
                       "pictures": sum(map(len, by_prompt.values()))}
    error = None if None in errors else math.hypot(*errors) / len(errors)
    total = {"right": scores["overall"], "error": error, "prompts": sum(t["prompts"] for t in tasks.values()),
             "pictures": len(verdicts)}
    return {"tasks": tasks, "overall": total}


def geneval_table(scores: dict) -> str:
    lines = [f"{'task':15} {'right':>8} {'s.e.':>8} {'prompts':>8} {'pictures':>8}"]
    for name, row in (*scores["tasks"].items(), ("mean of tasks", scores["overall"])):
        lines.append(f"{name:15} {number(row['right'])} {number(row['error'])} "
                     f"{row['prompts']:8} {row['pictures']:8}")
    return "\n".join(lines)


def example_grid(cfg: GenevalConfig, model: "ParaUni", dtype: str, prompts: list,
                 verdicts: dict[tuple[int, int], bool]) -> "Image.Image":
    """Up to two right pictures of each task, then up to two wrong ones, drawn again from their seeds."""
    import numpy as np
    from common import image_grid
    from nano import world
    keys = list(verdicts)
    keys = [keys[k] for k in np.random.default_rng(cfg.seed).permutation(len(keys))]
    chosen = []
    for right in (True, False):
        for task in world.TASKS:
            one_a_prompt = {key[0]: key for key in keys
                            if verdicts[key] == right and prompts[key[0]].task == task}
            chosen += list(one_a_prompt.values())[:2]
    captions = [f"{'right' if verdicts[key] else 'wrong'}: {prompts[key[0]].text}" for key in chosen]
    images = draw(cfg, model, dtype, prompts, chosen)                                   # (B, 3, H, W)
    return image_grid(images, min(6, len(chosen)), 128 // images.shape[-1], captions)


# ----------------------------------------------------------------------------- rewards

@dataclass(frozen=True)
class RewardsConfig(ModelConfig):
    stage_file: str = knob("", "the weights after training, as runs/stage3/stage3.safetensors; must be given")
    baseline: str = knob("", "the weights before; empty: stage2.safetensors in --weights")
    prompts: str = knob("", "file with one held-out prompt a line; empty: the nano world's")
    limit: int = knob(0, "the first so many prompts; 0: all of them")
    rewards: tuple[str, ...] = knob(("clip", "pickscore", "aesthetic"), "names, or file.py:function")
    reward_weights: str = knob("", "folder of the reward models; empty: weights/nano")
    num_steps: int = knob(20, "sampling steps")
    guidance_scale: float = knob(4.5, "classifier-free guidance; 1 turns it off")
    out: str = knob("runs/rewards", "folder for the table")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.stage_file:
            raise ValueError("expected --stage-file to name the weights after training, got none")
        if not self.rewards:
            raise ValueError("expected --rewards to name at least one reward, got none")
        if self.preset != "nano" and not self.prompts:
            raise ValueError(f"preset {self.preset} has no held-out prompts of its own: "
                             "name a file with --prompts")
        if self.weights == "random" and not self.baseline:
            raise ValueError("random weights have no stage2.safetensors: "
                             "name the weights before with --baseline")


def rewards(argv: list[str]) -> dict:
    """Rewards of held-out prompts before and after training, from the same noise, one picture a prompt."""
    cfg = parse(RewardsConfig, argv, rewards)
    from data import nano_prompts, read_prompts
    from model import weights_folder
    prompts = read_prompts(cfg.prompts) if cfg.prompts else nano_prompts(test=True)
    prompts = prompts[:cfg.limit or len(prompts)]
    baseline = cfg.baseline or str(weights_folder(cfg.preset, cfg.weights) / "stage2.safetensors")
    out_folder(cfg.out)
    before, after = heldout_scores(cfg, baseline, prompts), heldout_scores(cfg, cfg.stage_file, prompts)
    table = {name: compare(before[name], after[name]) for name in before}
    result = {"baseline": baseline, "rewards": table, "prompts": prompts, "before": before, "after": after}
    return finish(cfg, "rewards", result,
                  f"before {baseline}\nafter  {cfg.stage_file}\n{rewards_table(table)}")


def heldout_scores(cfg: RewardsConfig, stage_file: str, prompts: list[str]) -> dict[str, list[float | None]]:
    """Each reward of a picture of every prompt, drawn and scored as training does;
    None where it is not finite."""
    from common import Dist
    from grpo import score_heldout
    from rewards import build_reward
    model, dtype = load(cfg, stage_file)    # anew each time: a stage 1 file must not keep another's DiT
    model.tokenize(prompts)                          # an unknown word is reported before the first picture
    scorers = {name.rpartition(":")[2]: build_reward(name, model.device, weights=cfg.reward_weights or None)
               for name in cfg.rewards}
    as_in_training = TrainConfig(stage=3, seed=cfg.seed, micro_batch=cfg.batch_size, dtype=dtype,
                                 eval_steps=cfg.num_steps, eval_guidance_scale=cfg.guidance_scale)
    scores = score_heldout(model, scorers, prompts, as_in_training, Dist(0, 1, 0, model.device))
    return {name: [x if math.isfinite(x) else None for x in values] for name, values in scores.items()}


def compare(before: list[float | None], after: list[float | None]) -> dict:
    """Means with standard errors, and the mean paired difference with its 95 % interval
    (normal, +- 1.96 s.e.).

    Prompts that lack a score on either side are left out; n counts the others.
    """
    pairs = [(a, b) for a, b in zip(before, after, strict=True) if a is not None and b is not None]
    change, error = mean_and_error([b - a for a, b in pairs])
    interval = None if error is None else [change - 1.96 * error, change + 1.96 * error]
    return {"n": len(pairs), "before": mean_and_error([a for a, _ in pairs]),
            "after": mean_and_error([b for _, b in pairs]), "change": change, "interval": interval}


def rewards_table(table: dict[str, dict]) -> str:
    titles = ("before", "s.e.", "after", "s.e.", "change", "95 % from", "to")
    lines = [f"{'reward':15} {' '.join(f'{title:>9}' for title in titles)} {'n':>5}"]
    for name, row in table.items():
        means = [number(value, 9) for value in (*row["before"], *row["after"])]
        changes = [number(value, 9, "+") for value in (row["change"], *(row["interval"] or (None, None)))]
        lines.append(f"{name:15} {' '.join(means + changes)} {row['n']:5}")
    return "\n".join(lines)


# ----------------------------------------------------------------------------- understand

KINDS = {"how many": "how many", "what color": "what color", "what shape": "what shape",
         "is there": "is there", "is the": "relation",
         "what is": "what is"}                              # first two words of a question -> its kind


@dataclass(frozen=True)
class UnderstandConfig(ModelConfig):
    count: int = knob(2000, "questions, each about a picture of its own")
    batch_size: int = knob(250, "questions at a time")
    out: str = knob("runs/understand", "folder for the table")


def understand(argv: list[str]) -> dict:
    """The vision-language model's answers to held-out questions about pictures of the nano world.

    The hashes show that training left it alone: two runs with equal ones gave the same answers from
    the same bits.
    """
    cfg = parse(UnderstandConfig, argv, understand)
    from common import precision
    from nano import world
    from tqdm import tqdm
    out_folder(cfg.out)
    model, dtype = load(cfg, cfg.stage_file)
    images, pairs = world.question_set(cfg.count, cfg.seed)                             # (count, 3, H, W)
    answers = []
    with precision(model.device, dtype):
        for first in tqdm(range(0, cfg.count, cfg.batch_size), unit="batch", dynamic_ncols=True):
            part = slice(first, first + cfg.batch_size)
            asked = [question for question, _ in pairs[part]]
            # every answer is one word
            answers += model.answer(images[part].to(model.device), asked, max_new_tokens=4)
    wrong = [[question, said, right] for (question, right), said in zip(pairs, answers) if said != right]
    result = {"kinds": answer_scores(pairs, answers), "vlm_sha256": fingerprint(model.vlm),
              "first_wrong": wrong[:50],
              "answers_sha256": hashlib.sha256("\n".join(answers).encode()).hexdigest()}
    lines = [f"{'question':15} {'right':>8} {'s.e.':>8} {'n':>6}"]
    for kind, row in result["kinds"].items():
        lines.append(f"{kind:15} {number(row['right'])} {number(row['error'])} {row['n']:6}")
    lines += [f"{name:14} {result[name]}" for name in ("answers_sha256", "vlm_sha256")]
    return finish(cfg, "understand", result, "\n".join(lines))


def answer_scores(pairs: list[tuple[str, str]], answers: list[str]) -> dict[str, dict]:
    """Share of right answers for each kind of question present, and of all."""
    marks: dict[str, list[float]] = {kind: [] for kind in (*KINDS.values(), "all")}
    for (question, right), said in zip(pairs, answers, strict=True):
        for kind in (KINDS[" ".join(question.split()[:2])], "all"):
            marks[kind].append(float(said == right))
    rows = {}
    for kind, values in marks.items():
        if values:
            mean, error = mean_and_error(values)
            rows[kind] = {"right": mean, "error": error, "n": len(values)}
    return rows


# ----------------------------------------------------------------------------- entry

COMMANDS = {"geneval": geneval, "rewards": rewards, "understand": understand}


def main(argv: list[str] | None = None) -> dict:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return {}
    if not argv or argv[0] not in COMMANDS:
        got = repr(argv[0]) if argv else "nothing"
        raise ValueError(f"expected the first word to be one of {', '.join(COMMANDS)}, got {got}; see --help")
    return COMMANDS[argv[0]](argv[1:])


if __name__ == "__main__":
    run_main(main)
