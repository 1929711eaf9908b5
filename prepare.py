"""Pictures with captions become latents with captions: once, before training.

    python prepare.py --data "shards/*.tar" --out latents/t2i --preset l-512
    torchrun --nproc-per-node 8 prepare.py ...      the same files, sooner

--data names, with commas between,
  tar shards    x.jpg and x.txt of one name, or x.json with the text under caption, prompt or text
  folders       the same as files, in all folders below
  JSON lists    OpenUni's [{"image": path, "annotation": path of a caption file}], or "caption": text;
                paths are relative to the list's folder

Trap: new captions of known pictures stand beside the old ones, as OpenUni's of LAION and RedCaps under
re_caption. --caption-keys says which are meant.

A source is cut into shards of --per-shard files. A shard appears by one rename: a killed run goes on with the
next. It holds `latents` (samples, C, h, w) bf16, of one random square of each picture, as OpenUni's own;
`captions`, a row of bytes; and `offsets` (samples + 1,), where in it each begins. At the end index.json lists
the shards, and left-out.jsonl names every file that was not used, with the reason.

The data is strangers': nothing is extracted, inflated or unpickled, sizes are limited, and links or paths
that leave a source are not followed.

Letters: B pictures of a batch, S side of a picture, C h w latent.
"""
import glob
import hashlib
import itertools
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader

from common import (Refused, atomic, derive_seed, knob, parse_config, precision, read_lines, run, setup_dist,
                    write_json)
from data import stamp_of
from model import PRESETS, read_tensors, weights_folder
from pictures import read_picture
from vae import DCAE

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".avif")
CAPTIONS = (".txt", ".json")
CAPTION_KEYS = (".txt", "caption", "prompt", "text")
MAX_PICTURE, MAX_CAPTION = 2 ** 26, 2 ** 20     # bytes
FREE_FAULTS = 10                                # bad samples before their share is judged
PATIENCE = 300                                  # seconds for a batch of pictures


@dataclass(frozen=True)
class PrepareConfig:
    data: tuple[str, ...] = knob((), "tar shards, folders and JSON lists; globs are matched")
    out: str = knob("latents", "folder for the latents; shards that are there already are kept")
    preset: str = knob("nano", "whose autoencoder and picture size", choices=tuple(PRESETS))
    weights: str = knob("auto", "folder with vae/; auto: weights/PRESET")
    seed: int = knob(0, "of the crops")
    micro_batch: int = knob(8, "pictures a forward pass")
    per_shard: int = knob(10_000, "files of a source that make a shard")
    caption_keys: tuple[str, ...] = knob(CAPTION_KEYS, "where captions stand, the first that is there: .txt "
                                                       "beside the picture, or a key of its JSON")
    workers: int = knob(4, "processes that read pictures; 0: none")
    max_bad: float = knob(0.05, "share of bad samples above which it stops")


# ----------------------------------------------------------------------------- what a source holds

class Place(NamedTuple):
    """Where the bytes of a file are: in a tar, or in a file of their own, which must lie below `root`."""
    name: str
    path: str
    offset: int = 0
    size: int | None = None
    root: str = ""
    changed: float = 0.0        # when the file, or the tar, was last written


class Sample(NamedTuple):
    picture: Place
    caption: Place | str


class LeftOut(NamedTuple):
    name: str
    kind: str           # bad, filtered, or other: what is neither picture nor caption
    reason: str


def own_file(name: str, root: str) -> Place:
    # one that is missing has no time
    with suppress(OSError, ValueError):
        return Place(name, name, root=root, changed=os.path.getmtime(name))
    return Place(name, name, root=root)


def read_source(source: Path, keys: tuple[str, ...] = CAPTION_KEYS) -> Iterator[Sample | LeftOut]:
    """All files of a source: the samples they make, or why they make none. keys: see --caption-keys."""
    if source.is_dir():
        files = read_folder(source, keys)
    elif source.suffix.lower() in (".json", ".jsonl"):
        files = read_list(source, keys)
    else:
        files = read_tar(source, keys)
    yield next(files, LeftOut(str(source), "other", "no files in it"))
    yield from files


def read_tar(path: Path, keys: tuple[str, ...]) -> Iterator[Sample | LeftOut]:
    """The samples of a tar, by its headers alone."""
    places: list[Place] = []
    end = 0
    try:
        changed = os.path.getmtime(path)
        # "r:" is a plain tar, which cannot inflate
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                # a negative one would be read for ever, also where an extended header states another
                if member.size < 0 or tar.offset <= end:
                    raise ValueError("a file of negative size")
                end = tar.offset
                name = f"{path}/{member.name}"
                if member.name.startswith("/") or ".." in member.name.split("/"):
                    yield LeftOut(name, "bad", "its path leaves the tar")
                elif member.isfile() and not member.issparse():
                    places.append(Place(name, str(path), member.offset_data, member.size, changed=changed))
                elif not member.isdir():
                    yield LeftOut(name, "bad", "a link or special file")
            # zeros end a tar; anything else is a header that is damaged, or another tar that was joined to it
            tar.fileobj.seek(end)
            rest = tar.fileobj.read(2 ** 20)
            if not rest or any(rest):
                raise ValueError("cut off, damaged or joined")
    except Exception as error:
        yield LeftOut(str(path), "bad", f"{error}: whatever is behind byte {end:,} is lost")
    yield from pair(places, keys)


def read_folder(folder: Path, keys: tuple[str, ...]) -> Iterator[Sample | LeftOut]:
    """The samples in a folder and in all folders below."""
    root = os.path.realpath(folder)
    errors: list[OSError] = []
    for path, folders, files in os.walk(folder, onerror=errors.append):
        # in an order that is the same everywhere
        folders.sort()
        for name in folders:
            if os.path.islink(f"{path}/{name}"):
                yield LeftOut(f"{path}/{name}", "bad", "a linked folder: name its target in --data")
        names = [f"{path}/{name}" for name in sorted(files)]
        yield from pair((own_file(name, root) for name in names), keys)
    for error in errors:
        yield LeftOut(error.filename, "bad", str(error))


def pair(places: Iterable[Place], keys: tuple[str, ...]) -> Iterator[Sample | LeftOut]:
    """Each picture with the caption that has its name up to the last dot; .txt goes before .json, but
    does not count where it is not among the keys."""
    endings = CAPTIONS if ".txt" in keys else ".json"
    groups: dict[str, list[Place]] = {}
    for place in places:
        stem, ending = os.path.splitext(place.name)
        if os.path.basename(place.name).startswith("."):
            yield LeftOut(place.name, "other", "a hidden file")
        elif ending.lower() not in PICTURES + CAPTIONS:
            yield LeftOut(place.name, "other", f"its ending is none of {' '.join(PICTURES + CAPTIONS)}")
        else:
            groups.setdefault(stem, []).append(place)
    for group in groups.values():
        pictures = [place for place in group if place.name.lower().endswith(PICTURES)]
        captions = [place for place in group if place.name.lower().endswith(endings)]
        if len(pictures) == 1 and captions:
            yield Sample(pictures[0], max(captions, key=lambda place: place.name.lower()))
        else:
            reason = f"{len(pictures)} pictures and {len(captions)} captions have this name"
            yield from (LeftOut(place.name, "bad", reason) for place in group)


def read_list(path: Path, keys: tuple[str, ...]) -> Iterator[Sample | LeftOut]:
    """The samples of a JSON list, or of JSON lines, each on its own; paths are relative to its folder."""
    root = os.path.realpath(path.parent)
    try:
        text = "\n".join(read_lines(path))
        entries = json.loads(text) if text.startswith("[") else map(read_line, text.split("\n"))
        for entry in entries:
            fields = entry if isinstance(entry, dict) else {}
            image, annotation = fields.get("image"), fields.get("annotation")
            caption = caption_in(fields, keys)
            if isinstance(annotation, str):
                caption = own_file(str(path.parent / annotation), root)
            if isinstance(image, str) and caption:
                yield Sample(own_file(str(path.parent / image), root), caption)
            else:
                reason = "no JSON, no image, or no annotation or caption"
                yield LeftOut(f"{path}: {json.dumps(entry):.200}", "bad", reason)
    except Exception as error:
        yield LeftOut(str(path), "bad", f"{error}: the entries from there on are lost")


def read_line(line: str) -> object:
    """What a line of JSON holds; one that is none stands for itself, and costs no other."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return line


def caption_in(entry: object, keys: tuple[str, ...]) -> str:
    """The caption in a JSON object, "" if there is none."""
    texts = [entry.get(key) for key in keys] if isinstance(entry, dict) else []
    return next((text for text in texts if isinstance(text, str) and text.strip()), "")


# ----------------------------------------------------------------------------- reading, in worker processes

def read_bytes(place: Place, limit: int) -> bytes:
    """The bytes of a stranger's file, at most `limit` of them. Raises ValueError or OSError."""
    path, size = place.path, place.size
    if size is None:
        path = os.path.realpath(path)
        if not path.startswith(os.path.join(place.root, "")):
            raise ValueError("a link or path that leaves its folder")
        # a pipe would be waited for
        if not os.path.isfile(path):
            raise ValueError("no such file")
        size = os.path.getsize(path)
    if size > limit:
        raise ValueError(f"{size:,} bytes, the most is {limit:,}")
    with open(path, "rb") as file:
        file.seek(place.offset)
        data = file.read(size)
    if len(data) < size:
        raise ValueError("cut off")
    return data


def read_caption(caption: Place | str, keys: tuple[str, ...]) -> bytes:
    text = caption
    if isinstance(caption, Place):
        text = read_bytes(caption, MAX_CAPTION).decode("utf-8-sig")
        if caption.name.lower().endswith(".json"):
            text = caption_in(json.loads(text), keys)
    if not text.strip():
        raise ValueError("its caption is empty")
    return text.strip().encode()


def read_sample(sample: Sample | LeftOut, S: int, seed: int,
                keys: tuple[str, ...] = CAPTION_KEYS) -> tuple[np.ndarray, bytes] | LeftOut:
    """A square (S, S, 3) uint8 of the picture with its caption, or why there is none."""
    if isinstance(sample, LeftOut):
        return sample
    # strangers' files promise nothing: whatever they raise costs one sample
    try:
        caption = read_caption(sample.caption, keys)
        picture = read_picture(read_bytes(sample.picture, MAX_PICTURE))
    except Exception as error:
        return LeftOut(sample.picture.name, "bad", str(error) or type(error).__name__)

    # the filters of OpenUni, for nano's pictures its own size
    width, height = picture.size
    side = min(width, height)
    if side <= min(80, S - 1) or not 0.1 < width / height < 10:
        reason = f"{width} x {height} pixels: too small, or too narrow"
        return LeftOut(sample.picture.name, "filtered", reason)

    # and its crop: a square along the long side
    rng = np.random.default_rng(seed)
    left = rng.integers(width - side + 1)
    top = rng.integers(height - side + 1)
    picture = picture.crop((left, top, left + side, top + side))
    picture = picture.resize((S, S), Image.Resampling.BICUBIC)
    return np.array(picture), caption                                                   # (S, S, 3)


def read_batch(jobs: list[tuple]) -> list:
    return [read_sample(*job) for job in jobs]


# ----------------------------------------------------------------------------- shards

def load_vae(preset: str, weights: str) -> DCAE:
    tensors, _ = read_tensors(weights_folder(preset, weights) / "vae" / "diffusion_pytorch_model.safetensors")
    vae = DCAE(PRESETS[preset].vae).to(next(iter(tensors.values())).dtype)
    vae.load_state_dict(tensors)
    return vae.requires_grad_(False).eval()


@torch.no_grad()
def encode(vae: DCAE, squares: list[np.ndarray]) -> Tensor:
    """B squares (S, S, 3) uint8 -> scaled latents (B, C, h, w) bf16, on the CPU."""
    weight = next(vae.parameters())
    images = torch.from_numpy(np.stack(squares)).to(weight.device)                      # (B, S, S, 3)
    images = images.permute(0, 3, 1, 2).float() / 127.5 - 1                             # (B, 3, S, S)
    with precision(weight.device, "bf16" if weight.is_cuda else "fp32"):
        return vae.encode(images).bfloat16().cpu()                                      # (B, C, h, w)


def make_shard(cfg: PrepareConfig, vae: DCAE, jobs: list[tuple],
               counts: Counter) -> tuple[dict[str, Tensor], list[LeftOut]]:
    """The tensors of a shard, and what was left out; counts: what became of this process's samples so far."""
    # an empty one first, as there may be no other
    latents = [torch.empty(0, *PRESETS[cfg.preset].latent_shape, dtype=torch.bfloat16)]
    captions: list[bytes] = []
    left_out: list[LeftOut] = []
    # what the workers send are arrays, through pipes: a container has little of /dev/shm, where tensors go
    loader = DataLoader(jobs, cfg.micro_batch, num_workers=cfg.workers, collate_fn=read_batch,
                        timeout=PATIENCE if cfg.workers else 0)
    for batch in loader:
        good = [item for item in batch if not isinstance(item, LeftOut)]
        rest = [item for item in batch if isinstance(item, LeftOut)]
        if good:
            squares, texts = zip(*good)
            latents.append(encode(vae, squares))                                        # (B, C, h, w)
            captions += texts
        left_out += rest
        counts["good"] += len(good)
        counts.update(item.kind for item in rest if item.kind != "other")
        if counts["bad"] > FREE_FAULTS + cfg.max_bad * counts.total():
            write_left_out(cfg.out, left_out)
            raise Refused(f"{counts['bad']} of {counts.total()} samples are bad, more than --max-bad allows: "
                          f"see {cfg.out}/left-out.jsonl for the last of them")
    tensors = {"latents": torch.cat(latents),                                           # (samples, C, h, w)
               "captions": torch.tensor(bytearray(b"".join(captions)), dtype=torch.uint8),    # (bytes,)
               "offsets": torch.tensor([0, *map(len, captions)]).cumsum(0)}             # (samples + 1,)
    return tensors, left_out


def write_left_out(out: str, left_out: Iterable[LeftOut]) -> None:
    lines = [json.dumps(item._asdict()) + "\n" for item in left_out]
    with atomic(Path(out) / "left-out.jsonl") as temporary:
        temporary.write_text("".join(lines))


def cut(files: Iterator, size: int) -> Iterator[tuple[list, list]]:
    """Lists of `size` files, each with the one that follows: an empty one behind the last."""
    lists = iter(lambda: list(itertools.islice(files, size)), [])
    return itertools.pairwise(itertools.chain(lists, [[]]))


def shard_path(out: str, source: int, part: int) -> Path:
    return Path(out) / f"{source:05}-{part:05}.safetensors"


def read_facts(path: Path) -> dict:
    """What a shard says about itself."""
    with safe_open(path, "pt") as shard:
        return json.loads(shard.metadata()["facts"])


def finish(out: str, sources: int, stamp: dict) -> None:
    """The index and the list of what was left out, once all shards are there."""
    shards: dict[str, int] = {}
    left_out: list[LeftOut] = []
    for source in range(sources):
        for part in itertools.count():
            path = shard_path(out, source, part)
            # each rank looks when it is done, and the last one finds them all
            if not path.exists():
                print("this process is done, others are still at work")
                return
            facts = read_facts(path)
            shards[path.name] = facts["samples"]
            left_out += [LeftOut(*entry) for entry in facts["left_out"]]
            if facts["last"]:
                break
    write_left_out(out, left_out)
    kinds = Counter(item.kind for item in left_out)
    summary = (f"{sum(shards.values())} samples in {out}; left out and named in left-out.jsonl: "
               f"{kinds['bad']} bad, {kinds['filtered']} filtered by size, {kinds['other']} other files")
    if not any(shards.values()):
        raise Refused(summary)
    write_json(Path(out) / "index.json", {"stamp": stamp, "shards": shards})
    print(summary)


def main(argv: list[str] | None = None) -> None:
    cfg = parse_config(PrepareConfig, argv, description=__doc__.splitlines()[0])
    if not cfg.data:
        raise Refused("expected --data, the tar shards, folders or JSON lists that hold the pictures")
    dist = setup_dist()
    sources: dict[Path, None] = {}      # each once, in their order
    for word in cfg.data:
        # a name may hold what means something else in a glob
        found = [word] if os.path.exists(word) else sorted(glob.glob(word, recursive=True))
        if not found:
            raise Refused(f"--data {word} matches nothing: * ? [] ** do, {{0..9}} does not, commas separate")
        # its shards would be among the files that a second start finds, and it could not go on
        if any(Path(cfg.out).resolve().is_relative_to(Path(source).resolve()) for source in found):
            raise Refused(f"--out {cfg.out} lies in --data {word}: choose a folder beside it")
        sources |= dict.fromkeys(map(Path, found))
    preset = PRESETS[cfg.preset]
    vae = load_vae(cfg.preset, cfg.weights).to(dist.device)
    stamp = stamp_of(vae, preset)
    counts: Counter = Counter()
    for number, source in enumerate(sources):
        # a tar is one rank's, and no other reads its headers; folders and lists are shared out by the shard
        is_tar = source.suffix.lower() == ".tar"
        if is_tar and number % dist.world_size != dist.rank:
            continue
        for part, (files, following) in enumerate(cut(read_source(source, cfg.caption_keys), cfg.per_shard)):
            if not is_tar and (number + part) % dist.world_size != dist.rank:
                continue
            path = shard_path(cfg.out, number, part)
            ingredients = json.dumps([stamp, cfg.seed, cfg.caption_keys, files])
            made_of = hashlib.sha256(ingredients.encode()).hexdigest()
            # go on where an earlier run was stopped, if it was the same and its source ended there too
            if path.exists():
                facts = read_facts(path)
                if (facts["made_of"], facts["last"]) != (made_of, not following):
                    raise Refused(f"{path} was made of other files, or otherwise: choose another --out")
                continue
            seeds = [derive_seed(cfg.seed, "crop", number, part, i) for i in range(len(files))]
            jobs = [(file, preset.image_size, seed, cfg.caption_keys) for file, seed in zip(files, seeds)]
            tensors, left_out = make_shard(cfg, vae, jobs, counts)
            samples = len(tensors["latents"])
            facts = {"made_of": made_of, "last": not following, "left_out": left_out, "samples": samples}
            # a kill left half of it
            for half in path.parent.glob(f".{path.name}.*"):
                half.unlink()
            with atomic(path) as temporary:
                save_file(tensors, temporary, {"facts": json.dumps(facts)})
            print(f"{path}: {samples:,} of {len(files):,} from {source}", flush=True)
    finish(cfg.out, len(sources), stamp)


if __name__ == "__main__":
    run(main)
