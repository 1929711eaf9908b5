"""GenEval and DPG-Bench at full size: pictures as files, learned judges, the published rules. Reached through
`python evaluate.py geneval` and `dpg`.

Three steps, each with files of its own, so that what is done stays done and another program can do any of
them: pictures (GenEval's folder layout, DPG's grids), what a judge says of each (--out/detections,
--out/answers), the score. Processes of torchrun share the first two, prompt by prompt; the last is rank 0's.
What is not the whole benchmark is not called by its name. Letters: B pictures, H W pixels.
"""
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common import derive_seed, fingerprint, knob
from evaluate import (GenevalConfig, ModelConfig, finish, geneval_table, load, number, open_picture,
                      same_settings, spread)
from sample import out_folder
from scoring import (DPG_PROMPTS, GENEVAL_DIGEST, PER_PROMPT, check_request, dpg_items, dpg_scores,
                     found_to_json, geneval_digest, geneval_requests, json_files, need, need_color,
                     read_detections, read_json, said_by_one, task_table, verdict)

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor
    from common import Dist
    from judges import Answerer, ColorNamer, Detector
    from scoring import Item

PROMPTS_URL = "https://raw.githubusercontent.com/djghosh13/geneval/main/prompts/evaluation_metadata.jsonl"
QUESTIONS_URL = "https://raw.githubusercontent.com/TencentQQGYLab/ELLA/main/dpg_bench/dpg_bench.csv"


# ----------------------------------------------------------------------------- shared

def fetched(path: str, url: str, out: str, flag: str, dist: "Dist") -> str:
    """`path`, or where nothing was given the file behind a public address, fetched once into --out."""
    from urllib.request import urlopen
    from common import write_atomic
    copy = Path(out) / url.rpartition("/")[2]
    if not path and not copy.is_file() and dist.rank == 0:
        try:
            with urlopen(url, timeout=30) as answer:
                content = answer.read()
        except OSError as error:
            raise FileNotFoundError(f"cannot fetch {url} ({error}): fetch it elsewhere and name it "
                                    f"with {flag}") from error
        write_atomic(copy, lambda temporary: temporary.write_bytes(content))
    any_rank(False, dist)                                   # the others wait until it is there
    return path or str(copy)


def file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def any_rank(flag: bool, dist: "Dist") -> bool:
    """True if any process says so. All must ask: they wait for each other here."""
    import torch
    from common import all_reduce_mean
    return all_reduce_mean(torch.tensor([float(flag)]), dist).item() > 0


def in_group(command: Callable, cfg: ModelConfig) -> dict:
    """A command that several processes share; what it returns and prints is rank 0's."""
    from common import cleanup_dist, setup_dist
    dist = setup_dist()
    try:
        return command(cfg, dist)
    finally:
        cleanup_dist()


# ----------------------------------------------------------------------------- pictures of prompts as files

@dataclass(frozen=True)
class Job:
    """A file to be drawn: one picture of a prompt, or four in a square."""
    path: Path
    text: str
    seeds: tuple[int, ...]


def draw_files(cfg: "GenevalConfig | DpgConfig", dist: "Dist", jobs: list[Job]) -> bool:
    """Draw this process's share of the files that are not there yet. False if a signal stopped it.

    A file is complete or absent; pictures do not depend on the batch, nor on the number of processes.
    """
    from common import StopSignal, precision, save_image, write_json
    from tqdm import tqdm
    model, dtype = load(cfg, cfg.stage_file)
    settings = {"weights": f"sha256:{fingerprint(model)[:16]}", "preset": cfg.preset, "seed": cfg.seed,
                "num_steps": cfg.num_steps, "guidance_scale": cfg.guidance_scale, "dtype": dtype}
    path = Path(cfg.out) / "settings.json"
    if path.is_file():
        same_settings(read_json(path, "--out"), settings, path)
    elif dist.rank == 0:
        write_json(path, settings)
    side, count = model.preset.image_size, len(jobs[0].seeds)
    mine = [job for job in jobs[dist.rank::dist.world_size] if not drawn(job, side)]
    per_batch, done = max(1, cfg.batch_size // count), 0
    with StopSignal() as signal, tqdm(total=len(mine), unit="file", disable=not mine or dist.rank > 0) as bar:
        while done < len(mine) and not signal.stop:
            part = mine[done:done + per_batch]
            with precision(model.device, dtype):
                images = model.generate([job.text for job in part for _ in job.seeds], cfg.num_steps,
                                        cfg.guidance_scale, seed=[s for job in part for s in job.seeds]).cpu()
            for job, group in zip(part, images.split(count)):
                save_image(job.path, group[0] if count == 1 else square(group))
            done += len(part)
            bar.update(len(part))
    if any_rank(done < len(mine), dist):
        print(f"process {dist.rank} stopped with {len(mine) - done} files to go; "
              "the same command goes on from here")
        return False
    return True


def square(images: "Tensor") -> "Tensor":
    """Four pictures (4, 3, H, W) as one, (3, 2 H, 2 W): top left, top right, bottom left, bottom right."""
    import torch
    return torch.cat([torch.cat(list(pair), 2) for pair in images.split(2)], 1)         # (3, 2 H, 2 W)


def drawn(job: Job, side: int) -> bool:
    """Is the file there, whole and of the right size? ValueError if it is there and is not."""
    if not job.path.is_file():
        return False
    side *= 1 if len(job.seeds) == 1 else 2
    if (size := open_picture(job.path).size) != (side, side):
        raise ValueError(f"expected {job.path} to be {side} x {side} pixels, it is {size[0]} x {size[1]}: "
                         "remove it, or choose another --out")
    return True


# ----------------------------------------------------------------------------- geneval

@dataclass(frozen=True)
class Prompt:
    """A folder of GenEval's layout."""
    folder: str                 # "00000"
    request: dict               # what its metadata.jsonl asks for
    samples: tuple[str, ...]    # "00000/samples/00000.png"


def full_geneval(cfg: GenevalConfig, dist: "Dist") -> dict:
    out, requests = out_folder(cfg.out), None
    if cfg.metadata or not cfg.images:
        requests = geneval_requests(fetched(cfg.metadata, PROMPTS_URL, cfg.out, "--metadata", dist))
    folder = Path(cfg.images) if cfg.images else out / "images"
    if not cfg.images:
        jobs = geneval_jobs(cfg, requests, folder, dist)
        if not draw_files(cfg, dist, jobs) or not cfg.score:
            return {}
    prompts = read_layout(folder, requests)
    stopped = not cfg.detections and not detect_all(cfg, dist, folder, prompts)
    if any_rank(stopped, dist) or dist.rank:
        return {}
    files = (json_files(cfg.detections, "--detections") if cfg.detections
             else [out / "detections" / f"{prompt.folder}.json" for prompt in prompts])
    detector, found = read_detections(files)
    verdicts, records = judge_detections(cfg, dist.device, folder, prompts, found)
    (out / "verdicts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    scores, lacks = task_table(verdicts, [p.request["tag"] for p in prompts]), incomplete(folder, prompts)
    name = f"GenEval's rules, not the benchmark ({'; '.join(lacks)})" if lacks else "GenEval"
    result = {"name": name, "benchmark": not lacks, "detector": detector, **scores}
    return finish(cfg, "geneval", result,
                  f"{name}\ndetector {detector}; the official one is mmdet's Mask2Former Swin-S\n"
                  f"{geneval_table(scores)}\nverdicts {out / 'verdicts.jsonl'}")


def geneval_jobs(cfg: GenevalConfig, requests: list[dict], folder: Path, dist: "Dist") -> list[Job]:
    """What is to be drawn, after metadata.jsonl of each prompt has been written, or found to be the same."""
    from common import write_atomic
    jobs = []
    for i in spread(cfg.limit, len(requests)):
        path, text = folder / f"{i:05}" / "metadata.jsonl", json.dumps(requests[i])
        if path.is_file():
            same_request(path, requests[i])
        elif dist.rank == 0:
            write_atomic(path, lambda temporary, text=text: temporary.write_text(text + "\n"))
        for j in range(cfg.per_prompt):
            jobs.append(Job(folder / f"{i:05}" / "samples" / f"{j:05}.png", requests[i]["prompt"],
                            (derive_seed(cfg.seed, "geneval", i, j),)))
    return jobs


def same_request(path: Path, request: dict | None) -> dict:
    """What a metadata.jsonl asks for; ValueError if it is not what --metadata says."""
    found = check_request(read_json(path, "metadata"), str(path))
    if request is not None and found != request:
        raise ValueError(f"{path} does not match --metadata: it asks for {found['prompt']!r}, --metadata for "
                         f"{request['prompt']!r} there")
    return found


def read_layout(folder: Path, requests: list[dict] | None) -> list[Prompt]:
    """The prompts of a folder in GenEval's layout: 00000/metadata.jsonl, 00000/samples/00000.png ..."""
    names = sorted(path.name for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []
    if not names:
        raise FileNotFoundError("expected a folder with 00000/metadata.jsonl and 00000/samples/00000.png, "
                                f"found none in {folder}; change --images")
    prompts = []
    for name in names:
        if not (folder / name / "metadata.jsonl").is_file():
            raise FileNotFoundError(f"expected {folder / name / 'metadata.jsonl'}, found none")
        request = requests[int(name)] if requests and int(name) < len(requests) else None
        if requests and request is None:
            raise ValueError(f"{folder / name} has no line in --metadata, which has {len(requests)}")
        prompts.append(Prompt(name, same_request(folder / name / "metadata.jsonl", request),
                              sample_names(folder, name)))
    return prompts


def sample_names(folder: Path, name: str) -> tuple[str, ...]:
    """A prompt's pictures, as "00000/samples/00000.png". ValueError for a picture that is not named so."""
    paths = sorted((folder / name / "samples").glob("*"))
    pictures = [path for path in paths if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")]
    for path in pictures:
        if not re.fullmatch(r"\d+\.png", path.name):
            raise ValueError(f"{path} is not named as GenEval's samples are: expected 00000.png ...")
    return tuple(f"{name}/samples/{path.name}" for path in pictures)


def incomplete(folder: Path, prompts: list[Prompt]) -> list[str]:
    """What keeps a folder from being the benchmark; empty if nothing does."""
    from PIL import Image
    lacks, sizes = [], set()
    if geneval_digest([prompt.request for prompt in prompts]) != GENEVAL_DIGEST:
        lacks.append(f"{len(prompts)} prompts that are not the published 553")
    if wrong := [p.folder for p in prompts if len(p.samples) != PER_PROMPT]:
        lacks.append(f"{len(wrong)} prompts without exactly {PER_PROMPT} pictures, as {wrong[0]}")
    for name in (sample for prompt in prompts for sample in prompt.samples):
        with Image.open(folder / name) as picture:
            sizes.add(picture.size)
    if len(sizes) > 1:
        first = ", ".join(f"{w} x {h}" for w, h in sorted(sizes)[:3])
        lacks.append(f"pictures of {len(sizes)} sizes, as {first}")
    return lacks


def detect_all(cfg: GenevalConfig, dist: "Dist", folder: Path, prompts: list[Prompt]) -> bool:
    """Detections of this process's share of the prompts, one file each in --out/detections.
    False if a signal stopped it."""
    from common import StopSignal, write_json
    from judges import ColorNamer, Detector
    from tqdm import tqdm
    detector = Detector(cfg.detector, dist.device)
    colors = ColorNamer(cfg.clip, dist.device) if any(map(asks_color, prompts)) else None
    judges = {"detector": detector.name, "colors": colors.name if colors else ""}
    with StopSignal() as signal:
        for prompt in tqdm(prompts[dist.rank::dist.world_size], unit="prompt", disable=dist.rank > 0):
            if signal.stop:
                print("stopped; the same command goes on from here")
                return False
            path = Path(cfg.out) / "detections" / f"{prompt.folder}.json"
            old = read_json(path, "--out") if path.is_file() else {}
            known = old.get("pictures", {}) if {key: old.get(key) for key in judges} == judges else {}
            pictures = {name: detect(folder / name, prompt.request, detector, colors, known.get(name))
                        for name in prompt.samples}
            if (new := {**judges, "pictures": pictures}) != old:
                write_json(path, new)
    return True


def asks_color(prompt: Prompt) -> bool:
    return any("color" in clause for clause in prompt.request["include"])


def detect(path: Path, request: dict, detector: "Detector", colors: "ColorNamer | None",
           known: dict | None) -> dict:
    """One picture's objects, with the colours that decide; those of an earlier run if it is the same file."""
    digest = file_digest(path)
    if known and known.get("sha256") == digest:
        return known
    picture = open_picture(path)
    found = with_colors(detector(picture), request, picture, colors)
    return {"sha256": digest, "objects": [found_to_json(thing) for thing in found]}


def with_colors(found: list, request: dict, picture: "Image.Image", colors: "ColorNamer | None") -> list:
    """The objects, those whose colour decides with one."""
    asked = [thing for thing in need_color(found, request) if thing.color is None]
    named = {id(thing): new for thing, new in zip(asked, colors(picture, asked) if asked else [])}
    return [named.get(id(thing), thing) for thing in found]


def judge_detections(cfg: GenevalConfig, device: "torch.device", folder: Path, prompts: list[Prompt],
                     found: dict[str, dict]) -> tuple[dict[tuple[int, int], bool], list[dict]]:
    """GenEval's verdict on every picture: (prompt, sample) -> right, and a record of each with the reason.
    Colours that ready detections lack are named here, by --clip."""
    from judges import ColorNamer
    verdicts, records, colors = {}, [], None
    for i, prompt in enumerate(prompts):
        for j, name in enumerate(prompt.samples):
            if name not in found:
                raise ValueError(f"no detections of {name} in {cfg.detections or cfg.out}: detect it too, "
                                 "with an empty list if nothing is there")
            entry, picture = found[name], open_picture(folder / name)
            if entry.get("sha256", digest := file_digest(folder / name)) != digest:
                raise ValueError(f"the detections of {name} are of another picture: detect it again")
            if colors is None and not all(f.color for f in need_color(entry["objects"], prompt.request)):
                colors = ColorNamer(cfg.clip, device)
            things = with_colors(entry["objects"], prompt.request, picture, colors)
            verdicts[i, j], reason = verdict(things, prompt.request)
            records.append({"filename": name, "task": prompt.request["tag"],
                            "prompt": prompt.request["prompt"], "right": verdicts[i, j], "reason": reason})
    return verdicts, records


# ----------------------------------------------------------------------------- dpg

@dataclass(frozen=True)
class DpgConfig(ModelConfig):
    out: str = knob("runs/dpg",
                    "folder for pictures, answers and table; an interrupted evaluation there goes on")
    questions: str = knob("", "DPG-Bench's question file, CSV; empty: fetch it")
    images: str = knob("", "score a folder of any model's 2 x 2 grids, item_id.png; empty: draw them")
    answers: str = knob("", "ready answers, a JSON file or a folder of them, in place of --vqa")
    vqa: str = knob("Salesforce/blip-vqa-capfilt-large",
                    "the model that answers: a folder, or a repository of the hub")
    official_quirks: bool = knob(False, "score as the official script does: the first row is lost, "
                                        "categories see the last picture only")
    limit: int = knob(0, "prompts, evenly spread over the file's, for a quick look; 0: all of them")
    num_steps: int = knob(20, "sampling steps")
    guidance_scale: float = knob(4.5, "classifier-free guidance; 1 turns it off")
    score: bool = knob(True, "score the pictures; --no-score only draws them")


def dpg(cfg: DpgConfig) -> dict:
    """DPG-Bench: four pictures of each long prompt, and a model that answers questions about them."""
    return in_group(full_dpg, cfg)


def full_dpg(cfg: DpgConfig, dist: "Dist") -> dict:
    out = out_folder(cfg.out)
    path = fetched(cfg.questions, QUESTIONS_URL, cfg.out, "--questions", dist)
    items, notes = dpg_items(path, cfg.official_quirks)
    items = [items[i] for i in spread(cfg.limit, len(items))]
    folder = Path(cfg.images) if cfg.images else out / "images"
    if not cfg.images:
        jobs = [Job(folder / f"{item.name}.png", item.text,
                    tuple(derive_seed(cfg.seed, "dpg", item.name, k) for k in range(4))) for item in items]
        if not draw_files(cfg, dist, jobs) or not cfg.score:
            return {}
    stopped = not cfg.answers and not ask_all(cfg, dist, folder, items)
    if any_rank(stopped, dist) or dist.rank:
        return {}
    if not cfg.answers:                                     # not those about pictures that are gone
        items = [item for item in items if (folder / f"{item.name}.png").is_file()]
    judge, answers = read_answers(json_files(cfg.answers, "--answers") if cfg.answers else
                                  [out / "answers" / f"{item.name}.json" for item in items], items)
    scores = dpg_scores(items, answers, cfg.official_quirks)
    whole = len(scores["prompts"]) == DPG_PROMPTS
    name = "DPG-Bench" if whole else (f"DPG-Bench's rule, not the benchmark ({len(scores['prompts'])} "
                                      f"prompts scored, the benchmark has {DPG_PROMPTS})")
    result = {"name": name, "benchmark": whole, "judge": judge, "notes": notes, **scores}
    noted = f"{len(notes)} notes on the question file, as: {notes[0]}\n" if notes else ""
    return finish(cfg, "dpg", result, f"{noted}{name}\n{dpg_table(scores, judge)}")


def dpg_table(scores: dict, judge: str) -> str:
    lines = [f"judge {judge}; the official one is mPLUG-large",
             f"{'':31} {'score':>8} {'s.e.':>8} {'n':>7}",
             f"{'prompts':31} {number(scores['score'])} {number(scores['error'])} {len(scores['prompts']):7}"]
    for name, row in scores["categories"].items():
        lines.append(f"{name:31} {number(row['yes'])} {'-':>8} {row['n']:7}")
    return "\n".join(lines)


def tiles(path: Path) -> list["Image.Image"]:
    """The four pictures of a 2 x 2 grid."""
    picture = open_picture(path)
    side, odd = divmod(picture.width, 2)
    if picture.width != picture.height or odd:
        raise ValueError(f"expected {path} to be a square of 2 x 2 pictures, "
                         f"it is {picture.width} x {picture.height} pixels")
    return [picture.crop((x, y, x + side, y + side)) for y in (0, side) for x in (0, side)]


def ask_all(cfg: DpgConfig, dist: "Dist", folder: Path, items: list["Item"]) -> bool:
    """Answers about this process's share of the pictures that are there, one file a prompt in --out/answers.
    False if a signal stopped it."""
    from common import StopSignal
    from judges import Answerer
    from tqdm import tqdm
    there = [item for item in items if (folder / f"{item.name}.png").is_file()]
    if not there:
        raise FileNotFoundError(f"expected grids called {items[0].name}.png, ... in {folder}, found none")
    vqa = Answerer(cfg.vqa, dist.device)
    with StopSignal() as signal:
        for item in tqdm(there[dist.rank::dist.world_size], unit="prompt", disable=dist.rank > 0):
            if signal.stop:
                print("stopped; the same command goes on from here")
                return False
            ask_item(Path(cfg.out) / "answers" / f"{item.name}.json", folder / f"{item.name}.png", item, vqa,
                     cfg.batch_size)
    return True


def ask_item(path: Path, grid: Path, item: "Item", vqa: "Answerer", batch_size: int) -> None:
    """Ask about one grid and write the answers, unless they are there of the same picture and judge."""
    from common import write_json
    digest, numbers = file_digest(grid), [str(p.number) for p in item.propositions]
    old = read_json(path, "--out") if path.is_file() else {}
    known = old.get("items", {}).get(item.name, {})
    same = old.get("judge") == vqa.name and known.get("sha256") == digest
    if same and all(set(numbers) <= set(tile) for tile in known["tiles"]):
        return
    asked, answers = [p.question for p in item.propositions], []
    for picture in tiles(grid):
        said = [text for k in range(0, len(asked), batch_size)
                for text in vqa(picture, asked[k:k + batch_size])]
        answers.append(dict(zip(numbers, said)))
    write_json(path, {"judge": vqa.name, "items": {item.name: {"sha256": digest, "tiles": answers}}})


def read_answers(files: list[Path], items: list["Item"]) -> tuple[str, dict[str, list[dict[int, str]]]]:
    """The judge's name, and of each prompt that has some, the answers to its propositions, a dict each."""
    form = '{item_id: {"tiles": [{"1": "yes", "2": "no", ...}, ...]}}'
    judge, parts = said_by_one(files, "--answers", "judge", "items", form)
    out = {}
    for file, said in parts:
        for item in (item for item in items if item.name in said):
            need(said[item.name], ("tiles",), f"{file} (--answers), {item.name}")
            out[item.name] = [tile_answers(tile, item, file) for tile in said[item.name]["tiles"]]
    return judge, out


def tile_answers(tile: dict, item: "Item", file: Path) -> dict[int, str]:
    """The answers to an item's propositions about one of its pictures."""
    need(tile, tuple(str(p.number) for p in item.propositions), f"{file} (--answers), {item.name}")
    return {p.number: tile[str(p.number)] for p in item.propositions}
