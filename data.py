"""What the stages are fed: prompts for stage III, pictures or latents with captions for stages I and II.

    python data.py encode --data "shards/*.tar" --out latents --preset l-512 --weights DIR

Every item is a function of (seed, step, item): no state to save, and nothing depends on the number of
devices or workers. That is why the shards are read by tarfile and a map-style torch DataLoader: readers that
stream shards mix them in an order that depends on timing, and cannot be put back at item n.

A corpus is one or several of
  tar shards    a picture and a caption under one key: .txt, or .json with it under caption, prompt or text,
                as text-to-image-2M, BLIP3o-60k, LAION, Megalith-10M and RedCaps are published;
                or the latents that `encode` writes
  a folder      pictures, each with a caption file of the same stem beside it
  a JSON list   OpenUni's [{"image": path, "annotation": path of a caption file}], or "caption": text instead

Nothing in it is trusted: no member is ever extracted, only bytes at an offset are read; nothing is unpickled;
sizes are checked before anything is decoded. A bad sample is left out, counted and named with its reason. It
keeps its place in the batch with weight 0: every good sample comes once an epoch, and all batches have one
shape. Filters and crop are the published ones; transparent pixels lie on white, which the published code
leaves to chance.

It is long because strangers' files are wrong in many ways, and each has its own sentence.

Letters: B items of a batch, C h w latent, S side of a picture in pixels; n the number of an item, counted
over all steps.
"""
import atexit
import io
import json
import os
import signal
import struct
import sys
import tarfile
import warnings
import weakref
import zlib
from collections.abc import Generator, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from common import (Dist, StopSignal, broadcast, cleanup_dist, config_dict, derive_seed, fingerprint, knob,
                    load_into, parse_config, precision, read_safetensors, run_main, setup_dist, write_atomic,
                    write_json)

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor
    from vae import DCAE

PICTURES = ("jpg", "jpeg", "png", "webp", "gif")        # of a GIF the first frame
FORMATS = ("JPEG", "PNG", "WEBP", "GIF")                # PIL reads others too, some by starting programs
CAPTION_KEYS = ("caption", "prompt", "text")            # of a .json, in this order
MAX_PIXELS, MAX_PICTURE, MAX_CAPTION = 80_000_000, 2**26, 2**20     # pixels, bytes, bytes
SHUFFLE_SHARDS = 16     # samples of so many shards are mixed: enough for chance, few enough open files
MIX_BLOCK = 1000        # items in which the weights of a mixture hold exactly
FREE_FAULTS = 10        # bad samples before their share is judged
# What PIL is known to raise on damaged files of these formats
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError,
           struct.error, zlib.error)


# ---------------------------------------------------------------------------------------- prompts (stage III)

def read_prompts(path: str | Path) -> list[str]:
    """One prompt a line; empty lines are left out. FileNotFoundError, or ValueError if nothing is left."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError("expected --prompts to name a text file with one prompt a line, "
                                f"found no file {path}")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"expected {path} to be UTF-8 text with one prompt a line, "
                         f"byte {error.start} is not") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"expected one prompt a line in {path} (--prompts), found none")
    return prompts


def nano_prompts(test: bool) -> list[str]:
    """Distinct prompts of the nano world, 96 a task at most,
    tasks in rotation so that any first part has them all."""
    from nano import world
    by_task = [[p.text for p in world.prompt_list(test, 96) if p.task == task] for task in world.TASKS]
    return [texts[i] for i in range(96) for texts in by_task if i < len(texts)]


class NanoPrompts:
    """Training prompts of the nano world, endless;
    prompt `item` of a step is drawn from (seed, step, item)."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def draw(self, step: int, item: int) -> str:
        return nano_pair(self.seed, step, item)[1]


class FilePrompts:
    """Prompts of a list in a shuffled order, drawn anew each time round;
    prompt `item` of a step of `per_step` items."""

    def __init__(self, prompts: list[str], per_step: int, seed: int) -> None:
        self.prompts, self.per_step, self.seed = prompts, per_step, seed

    def draw(self, step: int, item: int) -> str:
        round_, place = divmod(step * self.per_step + item, len(self.prompts))
        return self.prompts[np.random.default_rng([self.seed, round_]).permutation(len(self.prompts))[place]]


# --------------------------------------------------------------------------------------------- the nano world

def nano_pair(seed: int, step: int, item: int):
    """A scene of the nano world and a training prompt that says what is in it."""
    from nano import world
    rng = np.random.default_rng(derive_seed(seed, "nano", step, item))
    while True:
        scene = world.sample_scene(rng)
        if prompt := world.sample_prompt(rng, scene):
            return scene, prompt.text


class NanoLatents:
    """Pictures of the nano world as latents, with captions: rendered and encoded as they are asked for."""

    def __init__(self, vae: "DCAE", seed: int) -> None:
        self.vae, self.seed = vae, seed

    def batch(self, step: int, items: list[int]) -> tuple["Tensor", list[str], None]:
        """Latents (B, C, h, w) fp32 and captions of the given items of a step; None: all are good."""
        import torch
        from nano import world
        pairs = [nano_pair(self.seed, step, item) for item in items]
        weight = next(self.vae.parameters())
        images = world.render([scene for scene, _ in pairs]).to(weight.device,
                                                                weight.dtype)           # (B, 3, H, W)
        with torch.no_grad():
            return self.vae.encode(images * 2 - 1).float(), [caption for _, caption in pairs], None


# --------------------------------------------------------------------- a sample: its bytes, and what they say

class BadSample(Exception):
    """Why a sample is left out."""


class Filtered(BadSample):
    """A sound sample that the published filters leave out; it does not count as bad."""


class Fault(NamedTuple):
    """A sample that was left out, for the list."""
    name: str
    reason: str
    bad: bool


class Place(NamedTuple):
    """Where some bytes are."""
    path: str
    offset: int = 0
    size: int = -1          # -1: the whole file


class Sample(NamedTuple):
    name: str
    picture: Place
    caption: Place | str
    is_json: bool           # of a caption at a place


def read_bytes(place: Place, limit: int) -> bytes:
    try:
        with open(place.path, "rb") as file:
            size = place.size if place.size >= 0 else os.fstat(file.fileno()).st_size
            if size > limit:
                raise BadSample(f"{size:,} bytes, the most is {limit:,}")
            file.seek(place.offset)
            data = file.read(size)
    except OSError as error:
        raise BadSample(f"{Path(place.path).name} cannot be read: {error.strerror}") from error
    if not data or len(data) < size:
        raise BadSample("cut off" if data else "no bytes")
    return data


def read_caption(sample: Sample) -> str:
    """The caption of a sample, stripped. Raises BadSample."""
    text = sample.caption
    if isinstance(text, Place):
        try:
            text = read_bytes(text, MAX_CAPTION).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadSample(f"the caption is not UTF-8 at byte {error.start}") from error
        if sample.is_json:
            text = caption_of_json(text)
    if not text.strip():
        raise BadSample("the caption is empty")
    return text.strip()


def caption_of_json(text: str) -> str:
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadSample("the caption file is not JSON") from error
    for key in CAPTION_KEYS:
        if isinstance(entry, dict) and isinstance(entry.get(key), str):
            return entry[key]
    raise BadSample(f"the caption file has no text under {', '.join(CAPTION_KEYS)}")


def decode_picture(data: bytes) -> "Image.Image":
    """An upright RGB picture from the bytes of a file. Raises BadSample, or Filtered by its sides.

    Filters: sides above 80 px, one at most 10 times the other (OpenUni). Size is known from the header.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")     # PIL warns of what is refused here
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
            width, height = picture.size
            if width * height > MAX_PIXELS:
                raise BadSample(f"more than {MAX_PIXELS:,} pixels")
            if min(width, height) <= 80:
                raise Filtered(f"{width} x {height} pixels, sides must be above 80")
            if not 0.1 < width / height < 10:
                raise Filtered(f"{width} x {height} pixels, one side is 10 times the other")
            picture.load()
            ImageOps.exif_transpose(picture, in_place=True)
            return to_rgb(picture)
    except UnidentifiedImageError as error:
        raise BadSample(f"no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file") from error
    except Image.DecompressionBombError as error:
        raise BadSample(f"more than {MAX_PIXELS:,} pixels") from error
    except DAMAGED as error:
        raise BadSample(f"damaged picture: {error}") from error


def to_rgb(picture: "Image.Image") -> "Image.Image":
    from PIL import Image
    if picture.mode.startswith("I"):            # 16 bits: convert() would cut all above 255 to white
        grey = np.asarray(picture).clip(0, 65535) / 257
        return Image.fromarray(grey.round().astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")     # convert() would copy


def square(picture: "Image.Image", size: int, rng: np.random.Generator) -> np.ndarray:
    """A random square along the long side, bicubic to `size`: (S, S, 3) uint8, as published."""
    from PIL import Image
    side = min(picture.size)
    left, top = (int(rng.integers(0, length - side + 1)) for length in picture.size)
    picture = picture.crop((left, top, left + side, top + side)).resize((size, size),
                                                                        Image.Resampling.BICUBIC)
    return np.array(picture)                                                            # (S, S, 3)


# ----------------------------------------------------------------------------------- shards and their samples

@dataclass(frozen=True)
class Index:
    """What is in a shard (a tar, a folder or a JSON list), known without decoding anything."""
    samples: list[Sample]
    faults: list[Fault]
    stamp: dict | None = None       # of latents: what they were made with


@lru_cache(maxsize=2 * SHUFFLE_SHARDS)
def read_index(path: str) -> Index:
    if path.endswith(".json"):
        return index_list(Path(path))
    return index_folder(Path(path)) if os.path.isdir(path) else index_tar(Path(path))


def key_of(name: str) -> tuple[str, str]:
    """Path up to the first dot of the file's name, and what follows in lower case, as WebDataset reads it."""
    folder, _, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    return f"{folder}/{stem}" if folder else stem, suffix.lower()


def index_tar(path: Path) -> Index:
    """The samples of a tar shard, by its headers alone."""
    parts: dict[str, list[tuple[str, Place]]] = {}
    faults, stamp, size = [], None, path.stat().st_size

    def fault(name: str, reason: str) -> None:
        faults.append(Fault(f"{path}/{name}" if name else str(path), reason, True))
    try:
        with tarfile.open(path, "r:") as tar:           # "r:": plain tar, so that nothing can inflate
            last = -1
            for member in tar:
                if member.size < 0 or tar.offset <= last:
                    raise tarfile.ReadError("a member of negative size")    # tarfile would read in circles
                last, (key, suffix) = tar.offset, key_of(member.name)
                place = Place(str(path), member.offset_data, member.size)
                if member.isdir():
                    continue
                if not member.isfile() or member.issparse():
                    fault(member.name, "a link or special file")
                elif member.name.startswith("/") or ".." in PurePosixPath(member.name).parts:
                    fault(member.name, "its path leaves the shard")
                elif member.name == "stamp.json":
                    stamp = json.loads(read_bytes(place, MAX_CAPTION))
                elif suffix in (*PICTURES, "latent", "txt", "json"):
                    parts.setdefault(key, []).append((suffix, place))
            with open(path, "rb") as file:
                file.seek(tar.offset)
                if file.read(512) != bytes(512):        # tarfile takes a cut in a header for the end
                    fault("", f"cut off or damaged after {tar.offset:,} of {size:,} bytes")
    except (tarfile.TarError, EOFError, OSError, ValueError, RecursionError, BadSample) as error:
        fault("", f"{error}: the samples after byte {max(last, 0) if parts else 0:,} are lost")
    samples = []
    for key, files in parts.items():
        try:
            samples.append(pair(f"{path}/{key}", files))
        except BadSample as error:
            fault(key, str(error))
    if not samples and not faults:
        fault("", "an empty shard")
    return Index(samples, faults, stamp)


def pair(name: str, files: list[tuple[str, Place]]) -> Sample:
    """The sample of the files (suffix, place) under one key. Raises BadSample."""
    pictures = [(suffix, place) for suffix, place in files if suffix in (*PICTURES, "latent")]
    captions = {suffix: place for suffix, place in files if suffix in ("txt", "json")}
    if len(pictures) != 1:
        raise BadSample(f"{len(pictures) or 'no'} pictures under one key")
    if not captions:
        raise BadSample("no caption")
    suffix, picture = pictures[0]
    caption = captions.get("txt", captions.get("json"))
    if picture.size == 0 or caption.size == 0:
        raise BadSample(f"the {'picture' if picture.size == 0 else 'caption'} has no bytes")
    return Sample(f"{name}.{suffix}", picture, caption, "txt" not in captions)


def index_folder(folder: Path) -> Index:
    """Pictures with a caption of the same stem beside each, in all folders below."""
    parts: dict[str, list[tuple[str, Place]]] = {}
    for file in sorted(folder.rglob("*")):
        stem, suffix = str(file.with_suffix("")), file.suffix[1:].lower()
        if suffix in (*PICTURES, "txt", "json") and file.is_file():
            parts.setdefault(stem, []).append((suffix, Place(str(file), 0, file.stat().st_size)))
    samples, faults = [], []
    for stem, files in parts.items():
        try:
            samples.append(pair(stem, files))
        except BadSample as error:
            faults.append(Fault(stem, str(error), True))
    return Index(samples, faults)


def index_list(path: Path) -> Index:
    """OpenUni's list; its paths are relative to its folder and stay in it."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON list of pictures: change --data") from error
    if not isinstance(entries, list):
        raise ValueError(f'expected {path} to be a JSON list of {{"image": ..., "annotation": ...}}, '
                         f"got {type(entries).__name__}: change --data")
    samples, faults = [], []
    for number, entry in enumerate(entries):
        try:
            samples.append(sample_of_entry(path.parent, entry))
        except BadSample as error:
            faults.append(Fault(f"{path}[{number}]", str(error), True))
    return Index(samples, faults)


def sample_of_entry(folder: Path, entry: Any) -> Sample:
    def inside(key: str) -> Place:
        name = PurePosixPath(entry[key])
        if name.is_absolute() or ".." in name.parts:
            raise BadSample(f"{entry[key]} leaves the folder of the list")
        return Place(str(folder / name))
    named = [key for key in ("annotation", "caption", "image")
             if isinstance(entry, dict) and isinstance(entry.get(key), str)]
    if "image" not in named or len(named) < 2:
        raise BadSample('expected {"image": path, "annotation": path} or "caption": text')
    picture = inside("image")
    caption = inside("annotation") if named[0] == "annotation" else entry["caption"]
    return Sample(picture.path, picture, caption, str(entry.get("annotation")).endswith(".json"))


# ------------------------------------------------------------------------------------------------- the corpus

@dataclass(frozen=True)
class Shard:
    """A line of the corpus's record: enough to say where item n is."""
    path: str
    bytes: int
    samples: int
    part: int               # of the mixture
    stamp: dict | None


def parse_spec(spec: tuple[str, ...]) -> tuple[list[list[str]], list[float]]:
    """(paths of the shards of each part, weights) of --data.

    A part is a glob of tars, a folder with tars, a folder with pictures, or a .json, with =WEIGHT behind it
    or not; without any weight all is one part, in which every sample counts the same.
    """
    names, weights = [], []
    for word in spec:
        name, _, weight = word.rpartition("=")
        try:
            weights.append(float(weight) if name else None)
        except ValueError:
            name, weight = "", word         # the "=" belongs to the path
            weights.append(None)
        names.append(name or word)
    if any(weights) and not all(weight is not None and weight > 0 for weight in weights):
        raise ValueError("expected --data to give every part a weight above 0, PATH=WEIGHT, or none any, "
                         f"got {','.join(spec)}")
    parts = [shard_paths(name) for name in names]
    if not any(weights):
        return [[path for part in parts for path in part]], [1.0]
    return parts, [weight / sum(weights) for weight in weights]


def shard_paths(name: str) -> list[str]:
    path = Path(name)
    if path.is_dir():
        return sorted(map(str, path.glob("*.tar"))) or [str(path)]
    if path.is_file():
        return [str(path)]
    found = sorted(str(file) for file in Path(path.anchor or ".").glob(str(path.relative_to(path.anchor))))
    if not found:
        raise FileNotFoundError(f"--data {name} matches nothing: expected tar shards, a folder or a .json")
    return found


def scan_shard(path: str, part: int) -> tuple[Shard, list[Fault]]:
    index = read_index.__wrapped__(path)        # not into the cache: a scan sees every shard once
    size = 0 if os.path.isdir(path) else os.path.getsize(path)
    return Shard(path, size, len(index.samples), part, index.stamp), index.faults


def scan(spec: tuple[str, ...], workers: int) -> tuple[list[Shard], list[float], list[Fault]]:
    """All shards of --data by their headers, the weights of the mixture, and what is bad already."""
    parts, weights = parse_spec(spec)
    jobs = [(path, part) for part, paths in enumerate(parts) for path in paths]
    if workers > 1 and len(jobs) > 1:
        with ProcessPoolExecutor(workers) as pool:
            found = list(pool.map(scan_shard, *zip(*jobs), chunksize=4))
    else:
        found = [scan_shard(*job) for job in jobs]
    return [shard for shard, _ in found], weights, [fault for _, faults in found for fault in faults]


class Corpus:
    """Where item n is: the order of a mixture of shards, as a function of (seed, n)."""

    def __init__(self, shards: list[Shard], weights: list[float], seed: int) -> None:
        self.seed, self.shards = seed, shards
        self.stamp = next((shard.stamp for shard in shards if shard.samples), None)
        if any(shard.stamp != self.stamp for shard in shards if shard.samples):
            raise ValueError("expected --data to be pictures alone or latents of one kind, got a mixture")
        self.parts = [[s for s in shards if s.part == part and s.samples] for part in range(len(weights))]
        self.totals = [sum(shard.samples for shard in part) for part in self.parts]
        if not all(self.totals):
            raise ValueError("expected samples in every part of --data, found a part without any: "
                             + "; ".join(f"{shard.path}: {shard.samples}" for shard in shards[:5]))
        exact = [weight * MIX_BLOCK for weight in weights]
        self.quota = [int(x) for x in exact]
        for part in sorted(range(len(exact)), key=lambda i: self.quota[i] - exact[i])[:MIX_BLOCK
                                                                                      - sum(self.quota)]:
            self.quota[part] += 1
        if not all(self.quota):
            raise ValueError(f"expected weights in --data of at least 1/{MIX_BLOCK} of their sum")
        self.cache: dict[tuple, Any] = {}

    def place(self, n: int) -> tuple[Shard, int]:
        """Shard and number in it of item n of the endless mixture."""
        block, rest = divmod(n, MIX_BLOCK)
        if len(self.parts) == 1:
            return self.ordered(0, n)
        parts = self.kept(("mix", block), lambda rng: rng.permutation(
            np.repeat(np.arange(len(self.parts)), self.quota)))
        part = int(parts[rest])
        return self.ordered(part, block * self.quota[part] + int((parts[:rest] == part).sum()))

    def ordered(self, part: int, number: int) -> tuple[Shard, int]:
        """Item `number` of a part. In each epoch the shards come in a new order;
        SHUFFLE_SHARDS of them at a time are mixed sample by sample."""
        epoch, number = divmod(number, self.totals[part])
        shards = self.parts[part]
        order = self.kept(("shards", part, epoch), lambda rng: rng.permutation(len(shards)))
        ends = self.kept(("ends", part, epoch), lambda rng: np.cumsum([shards[i].samples for i in order]))
        window = int(np.searchsorted(ends, number, "right")) // SHUFFLE_SHARDS
        before = int(ends[window * SHUFFLE_SHARDS - 1]) if window else 0
        after = int(ends[min(len(ends), (window + 1) * SHUFFLE_SHARDS) - 1])
        mixed = self.kept(("samples", part, epoch, window), lambda rng: rng.permutation(after - before))
        number = before + int(mixed[number - before])
        at = int(np.searchsorted(ends, number, "right"))
        return shards[order[at]], number - (int(ends[at - 1]) if at else 0)

    def kept(self, key: tuple, draw: Any) -> np.ndarray:
        """draw(rng of the key), kept while it is in use."""
        if key not in self.cache:
            if len(self.cache) >= 8 * (len(self.parts) + 1):        # two windows and epochs of each part
                self.cache.pop(next(iter(self.cache)))
            self.cache[key] = draw(np.random.default_rng(derive_seed(self.seed, "corpus", *key)))
        return self.cache[key]

    def plain(self, n: int) -> tuple[Shard, int]:
        """Item n in the order of the shards, once through: what `encode` walks."""
        ends = self.kept(("plain",), lambda rng: np.cumsum([shard.samples for shard in self.shards]))
        at = int(np.searchsorted(ends, n, "right"))
        return self.shards[at], n - (int(ends[at - 1]) if at else 0)


# --------------------------------------------------------------------------------------- decoding, in workers

class Reader:
    """Item n, decoded: what a DataLoader's workers run. shape: that of the latents, or (S, S, 3)."""

    def __init__(self, corpus: Corpus, shape: tuple[int, ...], plain: bool = False) -> None:
        self.corpus, self.shape, self.plain = corpus, shape, plain

    def __getitem__(self, n: int) -> tuple["Tensor", str | None, Fault | None]:
        import torch
        shard, number = (self.corpus.plain if self.plain else self.corpus.place)(n)
        sample = read_index(shard.path).samples[number]
        try:
            caption = read_caption(sample)
            data = read_bytes(sample.picture, MAX_PICTURE)
            if shard.stamp is not None:
                return decode_latent(data, self.shape), caption, None
            rng = np.random.default_rng(derive_seed(self.corpus.seed, "crop", n))
            return torch.from_numpy(square(decode_picture(data), self.shape[0], rng)), caption, None
        except BadSample as error:
            blank = torch.zeros(self.shape, dtype=torch.uint8 if shard.stamp is None else torch.bfloat16)
            return blank, None, Fault(sample.name, str(error), not isinstance(error, Filtered))


def decode_latent(data: bytes, shape: tuple[int, ...]) -> "Tensor":
    from safetensors import SafetensorError
    from safetensors.torch import load
    try:
        latent = load(data)["latent"]
    except (SafetensorError, KeyError) as error:
        raise BadSample(f"damaged latent: {error}") from error
    if tuple(latent.shape) != shape or not latent.isfinite().all():
        raise BadSample(f"expected a finite latent {shape}, got {tuple(latent.shape)}")
    return latent


def signed(pixels: "Tensor", like: "Tensor") -> "Tensor":
    """Pictures (B, S, S, 3) uint8 -> (B, 3, S, S) in [-1, 1], in the dtype and on the device of `like`.

    Not in the workers: turning every picture there costs a tenth of their time.
    """
    return pixels.to(like.device).permute(0, 3, 1, 2).to(like.dtype) / 127.5 - 1        # (B, 3, S, S)


def collate(items: list[tuple]) -> tuple["Tensor", list[str | None], list[Fault | None]]:
    import torch
    x, captions, faults = zip(*items)
    return torch.stack(x), list(captions), list(faults)


def quiet_worker(number: int) -> None:
    """Signals are for the process that trains: its launcher sends them to the whole group, and a worker that
    dies of one would look like a failure. After SIGTERM it has the 30 seconds that torchrun gives."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(30))


def loader(reader: Reader, batches: Iterator[list[int]], workers: int) -> Iterator[tuple]:
    """Batches of items in the given order, decoded ahead by `workers` processes (0: in this one).

    Trap: at exit multiprocessing waits for its workers before it drops what feeds them; so a loader that is
    still open then (an error's traceback holds it) is closed first.
    """
    ahead = decoded_ahead(reader, batches, workers)
    still = weakref.ref(ahead)
    atexit.register(lambda: (left := still()) and left.close())
    return ahead


def decoded_ahead(reader: Reader, batches: Iterator[list[int]], workers: int) -> Generator[tuple]:
    import torch
    yield from torch.utils.data.DataLoader(
        reader, batch_sampler=batches, num_workers=workers, collate_fn=collate, worker_init_fn=quiet_worker,
        prefetch_factor=4 if workers else None, generator=torch.Generator())    # not the global one


class BadList:
    """Names every bad sample in a file of JSON lines, once; stops the run where there are too many."""

    def __init__(self, path: Path, max_share: float) -> None:
        self.path, self.max_share, self.seen, self.count, self.filtered = path, max_share, 0, 0, 0
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        self.named = {json.loads(line)["name"] for line in lines if line.endswith("\n")}

    def note(self, faults: list[Fault | None]) -> None:
        """Raises ValueError where more than `max_share` of the samples seen so far are bad."""
        self.seen += len(faults)
        for fault in filter(None, faults):
            self.count += fault.bad
            self.filtered += not fault.bad
            if fault.name not in self.named:
                self.named.add(fault.name)
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(fault._asdict()) + "\n")
        if self.count > FREE_FAULTS + self.max_share * self.seen:
            raise ValueError(f"{self.count} of {self.seen} samples are bad, --max-bad allows "
                             f"{self.max_share:g} of them: see {self.path} for their names and reasons")


def numbers_of(chunks: list[list[int]], batch_size: int, step: int) -> Iterator[list[int]]:
    """The items of all chunks of all steps from `step` on, counted over all steps."""
    while True:
        yield from ([step * batch_size + item for item in chunk] for chunk in chunks)
        step += 1


class Pairs:
    """Latents with captions of a corpus, item by item as `Corpus.place` orders them."""

    def __init__(self, corpus: Corpus, vae: "DCAE", shape: tuple[int, ...], batch_size: int,
                 chunks: list[list[int]], workers: int, bad: BadList) -> None:
        """chunks: the items of a step that this process asks for, in the order in which it will."""
        self.vae, self.chunks, self.batch_size, self.workers, self.bad = vae, chunks, batch_size, workers, bad
        self.reader, self.ahead, self.asked = Reader(corpus, shape), None, iter(())
        self.dropped = 0                # bad samples in this step's batches; the loop counts and clears it

    def batch(self, step: int, items: list[int]) -> tuple["Tensor", list[str | None], "Tensor | None"]:
        """Latents (B, C, h, w) fp32, captions, and weights (B,): 0 where a sample is bad, None if none is.

        Steps come in order from any first one, and the items of a step in the order of `chunks`.
        """
        import torch
        if self.ahead is None:
            numbers, self.asked = (numbers_of(self.chunks, self.batch_size, step) for _ in range(2))
            self.ahead = loader(self.reader, numbers, self.workers)
        expected = next(self.asked)
        assert expected == [step * self.batch_size + item for item in items], (step, items, expected)
        x, captions, faults = next(self.ahead)
        self.bad.note(faults)
        weight = next(self.vae.parameters())
        keep = torch.tensor([fault is None for fault in faults], device=weight.device)  # (B,)
        if x.dtype == torch.uint8:
            with torch.no_grad():
                x = self.vae.encode(signed(x, weight))                                  # (B, C, h, w)
        return x.to(weight.device).float(), captions, None if keep.all() else keep.float()


def stamp_of(vae: "DCAE", image_size: int, latent_shape: tuple[int, ...]) -> dict:
    """What latents depend on: compared before they are trained on."""
    return {"vae": fingerprint(vae), "scaling_factor": vae.config.scaling_factor, "image_size": image_size,
            "latent_shape": list(latent_shape)}


def open_corpus(spec: tuple[str, ...], seed: int, workers: int, record: Path, bad: BadList,
                stamp: Any, dist: Dist) -> Corpus:
    """The corpus of --data, scanned by rank 0, which keeps its record beside the run.

    record  a file that a run which goes on must find true; written if it is not there
    stamp   () -> what latents must be stamped with
    Raises ValueError if the corpus has changed since, or for latents of another VAE or size.
    """
    found = None
    if dist.rank == 0:
        shards, weights, faults = scan(spec, workers)
        now = [[shard.path, shard.bytes, shard.samples] for shard in shards]
        if record.exists() and json.loads(record.read_text()) != now:
            raise ValueError(f"the files of --data are not those that {record} lists: an exact resume needs "
                             "them unchanged; put them back, or start a new run with another --run-dir")
        write_json(record, now)
        bad.seen += sum(shard.samples for shard in shards)
        bad.note(faults)
        found = [list(vars(shard).values()) for shard in shards], weights
    shards, weights = broadcast(found, dist)
    corpus = Corpus([Shard(*shard) for shard in shards], weights, seed)
    if corpus.stamp is not None and corpus.stamp != (want := stamp()):
        keys = [key for key in want if corpus.stamp.get(key) != want[key]]
        wrong = "; ".join(f"{key} is {corpus.stamp.get(key)} instead of {want[key]}" for key in keys)
        raise ValueError(f"the latents of --data are of another model: {wrong}"
                         "; encode the pictures again, or change --preset or --weights")
    return corpus


# ------------------------------------------------------------------------------- encode: the cache of latents

@dataclass(frozen=True)
class EncodeConfig:
    """Flags of `python data.py encode`."""
    data: tuple[str, ...] = knob((), "tar shards (a glob), folders, or JSON lists")
    out: str = knob("latents", "folder for the shards of latents; what is there already is kept")
    preset: str = knob("nano", "whose autoencoder and picture size; see PRESETS in model.py")
    weights: str = knob("auto", "folder with vae/; auto: weights/nano")
    seed: int = knob(0, "of the crops")
    dtype: str = knob("auto", "auto: bf16 on CUDA, fp32 on CPU; latents are stored in bf16",
                      choices=("auto", "fp32", "bf16"))
    micro_batch: int = knob(16, "pictures a forward pass")
    per_shard: int = knob(1000, "samples of a shard of latents")
    workers: int = knob(4, "processes that decode pictures; 0: none")
    max_bad: float = knob(0.05, "share of bad samples above which it stops")


def load_vae(preset: str, weights: str) -> tuple["DCAE", int, tuple[int, int, int]]:
    """(autoencoder, picture side, latent shape) of a preset, from the folder vae/ of its weights."""
    from model import PRESETS, weights_folder
    from vae import DCAE
    if preset not in PRESETS:
        raise ValueError(f"expected --preset to be one of {', '.join(PRESETS)}, got {preset!r}")
    path = weights_folder(preset, weights) / "vae" / "diffusion_pytorch_model.safetensors"
    vae = DCAE(PRESETS[preset].vae)
    load_into(vae, read_safetensors(path)[0], str(path), "change --preset or --weights")
    return vae.requires_grad_(False).eval(), PRESETS[preset].image_size, PRESETS[preset].latent_shape


def write_shard(path: Path, stamp: dict, samples: list[tuple[int, "Tensor", str]]) -> None:
    """A tar of latents (C, h, w) in bf16 and captions, atomically; its first member is the stamp."""
    from safetensors.torch import save

    def write(temporary: Path) -> None:
        with tarfile.open(temporary, "w") as tar:
            files = [("stamp.json", json.dumps(stamp).encode())]
            for n, latent, caption in samples:
                files += [(f"{n:09d}.latent", save({"latent": latent})), (f"{n:09d}.txt", caption.encode())]
            for name, data in files:
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    write_atomic(path, write)


def encode(cfg: EncodeConfig, dist: Dist) -> dict[str, int]:
    """Shards of latents of a corpus; shard k holds the good ones of items k per_shard ... and is made by rank
    k mod world size, whoever made the others. Returns counts of this process."""
    import torch
    from tqdm import tqdm
    vae, side, shape = load_vae(cfg.preset, cfg.weights)
    stamp, out = stamp_of(vae, side, shape), Path(cfg.out)
    check_same(out / "encode.json", {"stamp": stamp, "data": config_dict(cfg)["data"], "seed": cfg.seed,
                                     "per_shard": cfg.per_shard}, dist)
    vae.to(dist.device)
    dtype = ("bf16" if dist.device.type == "cuda" else "fp32") if cfg.dtype == "auto" else cfg.dtype
    bad = BadList(out / "bad" / f"rank-{dist.rank:05}.jsonl", cfg.max_bad)
    corpus = open_corpus(cfg.data, cfg.seed, cfg.workers, out / "corpus.json", bad, lambda: stamp, dist)
    if corpus.stamp is not None or len(corpus.parts) > 1:
        raise ValueError("expected --data to be pictures without weights: encode walks through all of them "
                         "once, in their order; give the weights to train.py")
    total = sum(corpus.totals)
    todo = [k for k in range(-(-total // cfg.per_shard)) if k % dist.world_size == dist.rank
            and not (out / f"latents-{k:06}.tar").exists()]
    spans = [range(k * cfg.per_shard, min(total, (k + 1) * cfg.per_shard)) for k in todo]
    chunks = [list(span[i:i + cfg.micro_batch]) for span in spans
              for i in range(0, len(span), cfg.micro_batch)]
    ahead = loader(Reader(corpus, (side, side, 3), plain=True), iter(chunks), cfg.workers)
    weight = next(vae.parameters())
    samples, counts = [], {"shards": 0, "samples": 0}
    with StopSignal() as stopped, torch.no_grad():
        for chunk, (x, captions, faults) in zip(chunks, tqdm(ahead, total=len(chunks), unit="batch",
                                                             disable=dist.rank > 0)):
            bad.note(faults)
            with precision(dist.device, dtype):
                latents = vae.encode(signed(x, weight)).bfloat16().cpu()                # (B, C, h, w)
            samples += [(n, latent.clone(), caption)
                        for n, latent, caption in zip(chunk, latents, captions) if caption is not None]
            if (chunk[-1] + 1) % cfg.per_shard == 0 or chunk[-1] + 1 == total:
                write_shard(out / f"latents-{chunk[-1] // cfg.per_shard:06}.tar", stamp, samples)
                counts["shards"], counts["samples"] = counts["shards"] + 1, counts["samples"] + len(samples)
                samples = []
            if stopped.stop:
                print("stopped; what is written is kept, go on with the same command")
                break
    print(f"rank {dist.rank}: {counts['samples']} samples in {counts['shards']} new shards in {out}; "
          f"{bad.count} bad and {bad.filtered} filtered"
          + (f", named in {bad.path}" if bad.named else ""))
    return counts | {"bad": bad.count, "filtered": bad.filtered}


def check_same(path: Path, settings: dict, dist: Dist) -> None:
    """Write how a folder is being made, or refuse to go on in one that was made otherwise."""
    if path.exists():
        old = json.loads(path.read_text())
        changed = [name for name in settings if old.get(name) != settings[name]]
        if changed:
            raise ValueError(f"{path.parent} holds latents made with another {', '.join(changed)}: "
                             "change --out, or give the flags of the first run")
    elif dist.rank == 0:
        write_json(path, settings)


def main(argv: list[str] | None = None) -> dict[str, int] | None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] != ["encode"]:
        print(__doc__.strip())
        if argv[:1] in ([], ["--help"], ["-h"]):
            return None
        raise ValueError(f"expected the command encode, got {argv[0]}")
    cfg = parse_config(EncodeConfig, {}, argv[1:], "Write the latents and captions of a corpus into shards.")
    if not cfg.data or cfg.micro_batch < 1 or cfg.per_shard < 1:
        raise ValueError("expected --data, and --micro-batch and --per-shard of at least 1")
    dist = setup_dist()
    try:
        return encode(cfg, dist)
    finally:
        cleanup_dist()


if __name__ == "__main__":
    run_main(main)
