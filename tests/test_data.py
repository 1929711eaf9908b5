"""The corpus: every kind of bad file is named and left out, every good sample comes once an epoch in an order
that depends on the seed alone, and latents are those of this model.

The two long tests need photographs: PARAUNI_PHOTOS=DIR pytest tests/test_data.py -s -k "photographs"."""
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import model as model_module
import train
from common import Dist, load_checkpoint, read_metrics
from data import BadList, Corpus, EncodeConfig, Fault, Pairs, Reader, decode_picture, encode, scan, stamp_of
from helpers import TINY, save_parts, tiny_model

ALONE = Dist(0, 1, 0, torch.device("cpu"))
PHOTOS = os.environ.get("PARAUNI_PHOTOS", "")


def picture(width: int = 120, height: int = 100, kind: str = "JPEG", mode: str = "RGB", seed: int = 0,
            **options: object) -> bytes:
    """The bytes of a picture file: smooth colours, so that JPEG keeps them."""
    x, y = np.meshgrid(np.linspace(0, 200, width), np.linspace(0, 200, height))
    pixels = np.stack([x, y, np.full_like(x, 40 * (seed % 6))], 2).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return file.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_shard(path: Path, first: int, count: int, caption: str = "a red heart") -> Path:
    """Good samples with the captions "<caption> <number>", or "<caption>" where it ends in a full stop."""
    members = []
    for n in range(first, first + count):
        text = caption if caption.endswith(".") else f"{caption} {n}"
        members += [(f"{n:05}.png", picture(90, 90, "PNG", seed=n)),
                    (f"{n:05}.txt", text.rstrip(".").encode())]
    return write_tar(path, members)


def read_all(spec: tuple[str, ...], size: int = 16) -> tuple[list[str], dict[str, str]]:
    """(captions, {last part of a fault's name: reason}) of all samples of a corpus, once through."""
    shards, weights, faults = scan(spec, workers=0)
    corpus = Corpus(shards, weights, seed=0)
    captions = []
    for n in range(sum(corpus.totals)):
        _, caption, fault = Reader(corpus, (size, size, 3))[n]
        captions += [caption] if fault is None else []
        faults += [fault] if fault is not None else []
    return sorted(captions), {fault.name.rpartition("/")[2]: fault.reason for fault in faults}


# ----------------------------------------------------------------------------- bad input

def exif_rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6                                                    # shown after a quarter turn clockwise
    return picture(200, 100, exif=exif)


def sixteen_bit() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((90, 90), 32768, np.uint16)).save(file, "PNG")
    return file.getvalue()


def bomb() -> bytes:
    """A PNG of 30,000 x 30,000 pixels in 110 kB."""
    file = io.BytesIO()
    Image.new("1", (30000, 30000)).save(file, "PNG")
    return file.getvalue()


GOOD = {
    "plain": picture(), "cmyk": picture(mode="CMYK"), "grey": picture(mode="L"), "sixteen": sixteen_bit(),
    "palette": picture(kind="PNG", mode="P"), "alpha": picture(kind="PNG", mode="RGBA"),
    "rotated": exif_rotated(), "gif": picture(kind="GIF", mode="P"), "webp": picture(kind="WEBP"),
    "palette_alpha": picture(kind="PNG", mode="P", transparency=0)}
BAD = {
    "truncated": (picture()[:-200], "damaged picture: .*truncated"),
    "truncated_png": (picture(kind="PNG")[:-200], "damaged picture"),
    "thin": (picture(1, 100), "1 x 100 pixels, sides must be above 80"),
    "wide": (picture(30000, 90), "30000 x 90 pixels, one side is 10 times the other"),
    "small": (picture(80, 200), "80 x 200 pixels, sides must be above 80"),
    "text": (b"<html>not found</html>", "no JPEG, PNG, WEBP or GIF"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 200 200\n", "no JPEG, PNG, WEBP or GIF"),
    "bomb": (bomb(), "more than 80,000,000 pixels")}


def test_each_kind_of_picture_is_read_or_named(tmp_path: Path) -> None:
    members = []
    for key, content in {**GOOD, **{key: content for key, (content, _) in BAD.items()}}.items():
        members += [(f"{key}.jpg", content), (f"{key}.txt", key.encode())]      # the suffix says nothing
    captions, faults = read_all((str(write_tar(tmp_path / "a.tar", members)),))
    assert captions == sorted(GOOD)
    assert faults.keys() == {f"{key}.jpg" for key in BAD}
    for key, (_, reason) in BAD.items():
        assert re.search(reason, faults[f"{key}.jpg"]), faults[f"{key}.jpg"]


def test_pictures_look_as_they_should() -> None:
    plain = np.asarray(decode_picture(picture())).astype(int)
    for key in ("palette", "alpha", "gif", "webp"):
        other = np.asarray(decode_picture(GOOD[key])).astype(int)
        assert other.shape == plain.shape and abs(other - plain).mean() < 20, key
    assert decode_picture(GOOD["rotated"]).size == (100, 200)
    turned = np.asarray(decode_picture(GOOD["rotated"])).astype(int)    # red grew to the right: now down
    assert turned[-10, 50, 0] > turned[10, 50, 0] + 100
    assert set(np.unique(np.asarray(decode_picture(sixteen_bit())))) == {128}   # half of 65535, not white
    seen_through = Image.new("RGBA", (90, 90), (0, 0, 0, 0))
    file = io.BytesIO()
    seen_through.save(file, "PNG")
    assert np.asarray(decode_picture(file.getvalue())).min() == 255


def test_the_crop_is_a_square_along_the_long_side() -> None:
    wide = decode_picture(picture(200, 100))
    crops = [data.square(wide, 50, np.random.default_rng(seed)) for seed in range(20)]
    assert all(crop.shape == (50, 50, 3) and crop.dtype == np.uint8 for crop in crops)
    assert all(abs(int(crop[-1, 0, 1]) - 198) < 8 for crop in crops)            # from top to bottom, always
    lefts = [int(crop[0, 0, 0]) for crop in crops]
    assert min(lefts) < 20 and max(lefts) > 80                                  # anywhere from left to right


def test_each_kind_of_bad_member_is_named(tmp_path: Path) -> None:
    good, text = picture(), b"a caption"
    path = write_tar(tmp_path / "a.tar", [
        ("good.jpg", good), ("good.txt", text),
        ("sub/other.jpg", good), ("sub/other.json", b'{"prompt": "p"}'),
        ("zero.jpg", b""), ("zero.txt", text), ("zero_caption.jpg", good), ("zero_caption.txt", b""),
        ("alone.jpg", good), ("text_alone.txt", text), ("latin.jpg", good), ("latin.txt", b"gr\xfcn"),
        ("two.jpg", good), ("two.png", good), ("two.txt", text), ("blank.jpg", good), ("blank.txt", b" \n"),
        ("nojson.jpg", good), ("nojson.json", b"{"), ("nokey.jpg", good), ("nokey.json", b'{"url": "x"}'),
        ("deep.jpg", good), ("deep.json", b"[" * 100_000), ("README.md", b"# hi"), ("good.cls", b"7"),
        ("../up.jpg", good), ("../up.txt", text), ("/root.jpg", good), ("/root.txt", text),
        ("evil.pkl", pickle.dumps(print))])
    with tarfile.open(path, "a") as tar:
        for name, kind in (("link.jpg", tarfile.SYMTYPE), ("hard.jpg", tarfile.LNKTYPE),
                           ("pipe.jpg", tarfile.FIFOTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    captions, faults = read_all((str(path),))
    assert captions == ["a caption", "p"]
    special, leaves = "a link or special file", "its path leaves the shard"
    assert faults == {
        "zero": "the picture has no bytes", "zero_caption": "the caption has no bytes", "alone": "no caption",
        "text_alone": "no pictures under one key", "latin.jpg": "the caption is not UTF-8 at byte 2",
        "two": "2 pictures under one key", "blank.jpg": "the caption is empty",
        "nojson.jpg": "the caption file is not JSON", "deep.jpg": "the caption file is not JSON",
        "nokey.jpg": "the caption file has no text under caption, prompt, text",
        "up.jpg": leaves, "up.txt": leaves, "root.jpg": leaves, "root.txt": leaves,
        "link.jpg": special, "hard.jpg": special, "pipe.jpg": special}


@pytest.mark.parametrize(("cut", "left"), [(-1024 * 20, 2), (512 + 700, 0), (100, 0), (0, 0)])
def test_a_truncated_shard_gives_what_is_left_of_it(cut: int, left: int, tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", 0, 3)
    content = path.read_bytes()
    path.write_bytes(content[:cut] if cut >= 0 else content[:tarfile.open(path).getmembers()[4].offset + 600])
    shards, _, faults = scan((str(path),), 0)
    assert shards[0].samples == left and any(fault.name == str(path) for fault in faults)
    if left == 0:
        with pytest.raises(ValueError, match="found a part without any"):
            Corpus(shards, [1.0], 0)


def test_shards_that_are_no_tar_or_lie_about_sizes(tmp_path: Path) -> None:
    write_shard(tmp_path / "good.tar", 0, 2)
    write_tar(tmp_path / "empty.tar", [])
    (tmp_path / "noise.tar").write_bytes(np.random.default_rng(0).bytes(5000))
    with tarfile.open(tmp_path / "packed.tar", "w:gz"):
        pass
    member = tarfile.TarInfo("a.jpg")
    member.size = -1024                                         # base-256: tarfile would read in circles
    (tmp_path / "negative.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    captions, faults = read_all((str(tmp_path / "*.tar"),))
    assert len(captions) == 2
    assert faults.keys() == {"empty.tar", "noise.tar", "packed.tar", "negative.tar"}
    assert faults["empty.tar"] == "an empty shard"


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"--data .*none-\*.tar matches nothing"):
        scan((str(tmp_path / "none-*.tar"),), 0)
    with pytest.raises(FileNotFoundError, match="matches nothing"):
        scan((str(tmp_path / "gone.json"),), 0)
    (tmp_path / "dict.json").write_text("{}")
    (tmp_path / "noise.json").write_text("{")
    for name, said in (("dict.json", "to be a JSON list"), ("noise.json", "no JSON list")):
        with pytest.raises(ValueError, match=said):
            scan((str(tmp_path / name),), 0)
    with pytest.raises(ValueError, match="every part a weight"):
        scan((f"{tmp_path}/dict.json=1", f"{tmp_path}/noise.json"), 0)


def test_a_folder_and_a_list(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    for name, content in (("a.jpg", picture()), ("a.txt", b"one"), ("sub/b.png", picture(kind="PNG")),
                          ("sub/b.json", b'{"caption": "two"}'),
                          ("c.v1.jpg", picture()), ("c.v1.txt", b"three"),
                          ("d.jpg", picture()), ("e.jpg", b""), ("e.txt", b"x")):
        (folder / name).write_bytes(content)
    captions, faults = read_all((str(folder),))
    assert captions == ["one", "three", "two"]
    assert faults == {"d": "no caption", "e": "the picture has no bytes"}
    (folder / "list.json").write_text(json.dumps([
        {"image": "a.jpg", "annotation": "sub/b.json"}, {"image": "sub/b.png", "annotation": "a.txt"},
        {"image": "a.jpg", "caption": "said here"}, {"image": "gone.jpg", "annotation": "a.txt"},
        {"image": "../../etc/x.jpg", "caption": "x"}, {"image": "/etc/x.jpg", "caption": "x"},
        {"image": "a.jpg"}, 7, {"image": "a.jpg", "annotation": "gone.txt"}]))
    captions, faults = read_all((str(folder / "list.json"),))
    assert captions == ["one", "said here", "two"]
    assert faults["gone.jpg"] == "gone.jpg cannot be read: No such file or directory"
    assert faults["a.jpg"] == "gone.txt cannot be read: No such file or directory"
    assert "leaves the folder" in faults["list.json[4]"] and "leaves the folder" in faults["list.json[5]"]
    assert faults.keys() == {"gone.jpg", "a.jpg", *(f"list.json[{i}]" for i in (4, 5, 6, 7))}


def test_too_many_bad_samples_stop_and_each_is_named_once(tmp_path: Path) -> None:
    bad = BadList(tmp_path / "bad.jsonl", max_share=0.1)
    faults = [Fault(f"x{i}", "why", True) for i in range(10)]
    bad.note([None] * 5 + faults)
    bad.note([Fault("y", "too small", False)] * 50 + faults[:1] + [None] * 50)
    BadList(tmp_path / "bad.jsonl", 0.1).note(faults)                           # a run that goes on
    names = [json.loads(line)["name"] for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert Counter(names) == Counter([f"x{i}" for i in range(10)] + ["y"])
    with pytest.raises(ValueError, match=r"41 of 146 samples are bad, --max-bad allows 0.1.*bad.jsonl"):
        bad.note([Fault(f"z{i}", "why", True) for i in range(30)])


# ----------------------------------------------------------------------------- order

@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 shards of 1 to 5 good samples."""
    folder = tmp_path_factory.mktemp("shards")
    for k in range(40):
        write_shard(folder / f"{k:02}.tar", 10 * k, 1 + k % 5)
    return folder


def corpus_of(*spec: str, seed: int = 0) -> Corpus:
    found, weights, _ = scan(spec, 0)
    return Corpus(found, weights, seed)


def test_every_sample_comes_once_an_epoch_in_an_order_of_the_seed(shards: Path) -> None:
    corpus, total = corpus_of(str(shards)), 120
    epochs = [[corpus.place(n) for n in range(e * total, (e + 1) * total)] for e in range(3)]
    everything = {(shard.path, i) for shard in corpus.shards for i in range(shard.samples)}
    assert len(everything) == total and all({(s.path, i) for s, i in epoch} == everything for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    again = corpus_of(str(shards))
    assert again.place(2 * total + 7) == epochs[2][7] and again.place(3) == epochs[0][3]    # no history
    assert [corpus_of(str(shards), seed=1).place(n) for n in range(total)] != epochs[0]
    first = [shard.path for shard, _ in epochs[0][:20]]
    assert len(set(first)) > 8                                          # mixed over shards, not one by one


def test_weights_hold_exactly_and_each_part_keeps_its_epochs(shards: Path, tmp_path: Path) -> None:
    write_shard(tmp_path / "few.tar", 0, 7)
    corpus = corpus_of(f"{shards}=3", f"{tmp_path}/few.tar=1")
    drawn = [corpus.place(n) for n in range(2000)]
    few = [i for shard, i in drawn if shard.part == 1]
    assert len(few) == 500 and corpus.quota == [750, 250]
    assert all(sorted(few[k:k + 7]) == list(range(7)) for k in range(0, 490, 7))
    assert sum(shard.part for shard, _ in drawn[:100]) in range(10, 45)         # mixed, not in blocks
    with pytest.raises(ValueError, match="at least 1/1000"):
        corpus_of(f"{shards}=100000", f"{tmp_path}/few.tar=1")
    assert corpus_of(str(shards), f"{tmp_path}/few.tar").totals == [127]        # without weights: one pool


def pairs(corpus: Corpus, folder: Path, rank: int = 0, world: int = 1, workers: int = 0) -> Pairs:
    mine = list(range(12)[rank::world])
    return Pairs(corpus, tiny_model().vae, (32, 32, 3), 12, [mine[i:i + 3] for i in range(0, len(mine), 3)],
                 workers, BadList(folder / f"{rank}.jsonl", 0.05))


def test_items_do_not_depend_on_ranks_workers_or_the_first_step(shards: Path, tmp_path: Path) -> None:
    corpus, items = corpus_of(str(shards)), {}
    for world, workers, first in ((1, 0, 0), (2, 0, 0), (1, 2, 1), (4, 0, 1)):
        for rank in range(world):
            source = pairs(corpus, tmp_path, rank, world, workers)
            for step in range(first, 2):
                for chunk in source.chunks:
                    x, captions, weights = source.batch(step, chunk)
                    assert weights is None and x.shape == (len(chunk), *TINY.latent_shape)
                    for item, latent, caption in zip(chunk, x, captions):
                        kept = items.setdefault((step, item), (latent, caption))
                        assert kept[1] == caption
                        torch.testing.assert_close(kept[0], latent, rtol=1e-4, atol=1e-5)
    assert len(items) == 24 and len({caption for _, caption in items.values()}) == 24


def test_a_process_that_leaves_its_loader_open_ends(shards: Path, tmp_path: Path) -> None:
    """As after an error, whose traceback holds the loader: its workers ignore the signal to end."""
    code = ("from pathlib import Path; import test_data\n"
            f"left = test_data.pairs(test_data.corpus_of({str(shards)!r}), Path({str(tmp_path)!r}), "
            "workers=2)\n"
            "left.itself = left\n"
            "left.batch(0, left.chunks[0]); print('read')")
    ended = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True,
                           text=True, timeout=25, env=os.environ | {"PYTHONPATH": ".."})
    assert (ended.returncode, ended.stdout) == (0, "read\n"), ended.stderr


def test_reading_ahead_leaves_the_global_generator_alone(shards: Path, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    source = pairs(corpus_of(str(shards)), tmp_path)
    source.batch(0, source.chunks[0])
    assert torch.equal(before, torch.get_rng_state())


# ----------------------------------------------------------------------------- latents

@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, tiny_preset: None) -> Path:
    return save_parts(tiny_model(), tmp_path_factory.mktemp("parts"))


@pytest.fixture
def cache(parts: Path, tmp_path: Path) -> Callable:
    """cache(name, rank, world) encodes 10 pictures, one of them bad, as shards of 4."""
    members = [(f"{n}.{suffix}", content) for n in range(10) for suffix, content in
               (("png", b"no" if n == 5 else picture(90 + n, 90, "PNG", seed=n)), ("txt", b"a red heart"))]
    write_tar(tmp_path / "in" / "a.tar", members)

    def cache(name: str, rank: int = 0, world: int = 1, **flags: object) -> dict[str, int]:
        cfg = EncodeConfig(**{"data": (str(tmp_path / "in"),), "out": str(tmp_path / name),
                              "weights": str(parts), "per_shard": 4, "micro_batch": 3, "workers": 0, **flags})
        return encode(cfg, ALONE if world == 1 else Dist(rank, world, rank, torch.device("cpu")))
    return cache


def test_encoding_is_the_same_for_any_number_of_ranks_and_goes_on(cache: Callable, tmp_path: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache("one") == {"shards": 3, "samples": 9, "bad": 1, "filtered": 0}
    files = {path.name: path.read_bytes() for path in (tmp_path / "one").glob("*.tar")}
    assert files.keys() == {f"latents-00000{k}.tar" for k in range(3)}
    named = json.loads((tmp_path / "one" / "bad" / "rank-00000.jsonl").read_text())
    assert named["name"].endswith("a.tar/5.png") and named["reason"].startswith("no JPEG")
    found = scan((str(tmp_path / "in"),), 0)
    monkeypatch.setattr(data, "broadcast", lambda value, dist: (
        [list(vars(shard).values()) for shard in found[0]], found[1]))
    assert cache("two", 0, 2)["shards"] == 2 and cache("two", 1, 2)["shards"] == 1
    assert {path.name: path.read_bytes() for path in (tmp_path / "two").glob("*.tar")} == files
    (tmp_path / "one" / "latents-000001.tar").unlink()
    assert cache("one")["shards"] == 1 and cache("one")["shards"] == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "one").glob("*.tar")} == files
    with pytest.raises(ValueError, match="made with another per_shard: change --out"):
        cache("one", per_shard=5)


def test_latents_are_what_the_pictures_give_and_refused_elsewhere(cache: Callable, parts: Path,
                                                                  tmp_path: Path) -> None:
    cache("latents")
    vae = data.load_vae("nano", str(parts))[0]
    stamp = stamp_of(vae, 32, TINY.latent_shape)
    bad = BadList(tmp_path / "bad.jsonl", 0.5)
    spec = (str(tmp_path / "latents"),)
    corpus = data.open_corpus(spec, 0, 0, tmp_path / "record.json", bad, lambda: stamp, ALONE)
    assert corpus.stamp == stamp and corpus.totals == [9]
    source = Corpus(*scan((str(tmp_path / "in"),), 0)[:2], seed=0)
    pictures = [Reader(source, (32, 32, 3), plain=True)[n][0] for n in range(10) if n != 5]
    latents = torch.stack([Reader(corpus, TINY.latent_shape, plain=True)[n][0] for n in range(9)]).float()
    with torch.no_grad():
        want = vae.encode(data.signed(torch.stack(pictures), next(vae.parameters())))
    torch.testing.assert_close(latents, want, rtol=1e-2, atol=1e-2)             # stored in bf16
    for key, value, said in (("vae", "0" * 64, "vae is .* instead of 000"),
                             ("image_size", 64, "image_size is 32"),
                             ("scaling_factor", 0.41407, "scaling_factor is 1.0 instead of 0.41407"),
                             ("latent_shape", [8, 9, 9], "latent_shape")):
        other = stamp | {key: value}
        with pytest.raises(ValueError, match=f"of another model: {said}"):
            data.open_corpus(spec, 0, 0, tmp_path / "record.json", bad, other.copy, ALONE)
    with pytest.raises(ValueError, match="pictures alone or latents of one kind"):
        Corpus(*scan((spec[0], str(tmp_path / "in")), 0)[:2], seed=0)
    write_shard(tmp_path / "latents" / "more.tar", 0, 1)
    with pytest.raises(ValueError, match="an exact resume needs them unchanged"):
        data.open_corpus(spec, 0, 0, tmp_path / "record.json", bad, lambda: stamp, ALONE)


def test_a_damaged_latent_is_named(cache: Callable, tmp_path: Path) -> None:
    cache("latents")
    stamp = json.dumps(scan((str(tmp_path / "latents"),), 0)[0][0].stamp).encode()
    from safetensors.torch import save
    shape = TINY.latent_shape
    nan, good = torch.full(shape, float("nan")), torch.zeros(shape, dtype=torch.bfloat16)
    write_tar(tmp_path / "b" / "b.tar", [("stamp.json", stamp), *(
        member for key, content in (("good", save({"latent": good})), ("cut", save({"latent": good})[:-9]),
                                    ("pickle", pickle.dumps(print)), ("nan", save({"latent": nan})),
                                    ("shape", save({"latent": good[:4]})), ("name", save({"x": good})))
        for member in ((f"{key}.latent", content), (f"{key}.txt", key.encode())))])
    found, weights, _ = scan((str(tmp_path / "b"),), 0)
    items = [Reader(Corpus(found, weights, 0), shape)[n] for n in range(6)]
    assert [caption for _, caption, fault in items if fault is None] == ["good"]
    assert all("latent" in fault.reason for _, _, fault in items if fault is not None)


def test_encode_says_what_it_lacks(cache: Callable, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(ValueError, match="expected the command encode, got decode"):
        data.main(["decode"])
    with pytest.raises(ValueError, match="expected --data"):
        data.main(["encode"])
    with pytest.raises(ValueError, match="without weights"):
        cache("weighted", data=(f"{tmp_path}/in/a.tar=1", f"{tmp_path}/in/a.tar=2"))
    assert data.main(["--help"]) is None and "python data.py encode" in capsys.readouterr().out


# ----------------------------------------------------------------------------- training on it

def flags(parts: Path, run_dir: Path, source: Path, *more: str) -> list[str]:
    return ["--stage", "2", "--weights", str(parts), "--init", str(parts / "stage1.safetensors"),
            "--run-dir", str(run_dir), "--data", str(source), "--steps", "4", "--batch-size", "4",
            "--micro-batch", "4", "--warmup", "1", "--log-every", "1", "--workers", "0", *more]


@pytest.fixture
def staged(parts: Path) -> Path:
    model_module.save_trained(tiny_model(), parts / "stage1.safetensors", 1, train.TrainConfig(stage=1))
    return parts


def test_training_on_shards_leaves_bad_samples_out_and_resumes(staged: Path, tmp_path: Path) -> None:
    members = [(f"{n}.{suffix}", content) for n in range(9) for suffix, content in
               (("png", b"no" if n in (2, 6) else picture(90, 90, "PNG", seed=n)), ("txt", b"a red heart"))]
    write_tar(tmp_path / "in" / "a.tar", members)
    train.main(flags(staged, tmp_path / "whole", tmp_path / "in", "--max-bad", "0.5"))
    train.main(flags(staged, tmp_path / "parts", tmp_path / "in", "--max-bad", "0.5", "--save-every", "1",
                     "--keep", "9"))
    for path in (tmp_path / "parts" / "checkpoints").iterdir():         # as if it had been killed in step 3
        if path.name > "step-00000002":
            shutil.rmtree(path)
    (tmp_path / "parts" / "stage2.safetensors").unlink()
    train.main(flags(staged, tmp_path / "parts", tmp_path / "in", "--resume", "auto", "--workers", "1",
                     "--save-every", "1", "--keep", "9"))
    whole, part = (load_checkpoint(tmp_path / name / "checkpoints" / "step-00000004")[0]["trained"]
                   for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], part[name]) for name in whole)
    lines = [json.loads(line)
             for line in (tmp_path / "parts" / "bad-samples" / "rank-00000.jsonl").read_text().splitlines()]
    assert sorted(line["name"].rpartition("/")[2] for line in lines) == ["2.png", "6.png"]
    (tmp_path / "in" / "b.tar").write_bytes((tmp_path / "in" / "a.tar").read_bytes())
    with pytest.raises(ValueError, match="not those that .*corpus.json lists"):
        train.main(flags(staged, tmp_path / "parts", tmp_path / "in", "--resume", "auto"))


def test_a_bad_sample_weighs_nothing(staged: Path) -> None:
    """The gradient of a batch with a bad item is that of the good ones alone."""
    cfg = train.TrainConfig(data=("x",), batch_size=4, dtype="fp32")
    model = tiny_model()
    x0 = torch.randn(4, *TINY.latent_shape, generator=torch.Generator().manual_seed(0))

    class Given:
        dropped = 0

        def batch(self, step: int, items: list[int]) -> tuple:
            weights = torch.tensor([float(item != 2) for item in items])
            return x0[items] * weights[:, None, None, None], ["a red heart"] * len(items), weights

    grads, source = [], Given()
    for items in ([0, 1, 2, 3], [0, 1, 3]):
        model.zero_grad()
        train.item_loss(cfg, model, source, 0, items).backward()
        if len(items) == 4:
            assert train.rescale(cfg, dict(model.named_parameters()), source, ALONE) == 4 / 3
            assert source.dropped == 0
        grads.append(model.queries.grad.clone())
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)
    source.dropped = 4
    assert train.rescale(cfg, {}, source, ALONE) == 0


def test_a_batch_without_a_good_sample_is_skipped(staged: Path, tmp_path: Path) -> None:
    members = [(f"{n}.{suffix}", content) for n in range(4)
               for suffix, content in (("png", b"no"), ("txt", b"a red heart"))]
    write_tar(tmp_path / "in" / "a.tar", members)
    with pytest.raises(ValueError, match="2 updates in a row were skipped"):
        train.main(flags(staged, tmp_path / "run", tmp_path / "in", "--max-bad", "1", "--max-skipped", "2"))
    assert [line["skipped"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
    with pytest.raises(ValueError, match="samples are bad"):
        train.main(flags(staged, tmp_path / "other", tmp_path / "in", "--max-bad", "0", "--max-skipped",
                         "99"))


def test_large_presets_ask_for_data(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = train.parse(["--stage", "1", "--preset", "l-512"])
    with pytest.raises(ValueError, match="--preset l-512 need --data"):
        train.open_data(cfg, None, ALONE, range(4))


# ----------------------------------------------------------------------------- with real photographs

def photographs() -> list[Path]:
    found = [path for path in sorted(Path(PHOTOS).rglob("*"))
             if path.suffix.lower() in (".jpg", ".jpeg", ".png")]
    sizes = {path: Image.open(path).size for path in found}
    return [path for path, (w, h) in sizes.items() if min(w, h) > 80 and 0.1 < w / h < 10]


def crops(count: int, side: int) -> Iterator[bytes]:
    """JPEG files of `count` different parts of the photographs."""
    rng, files = np.random.default_rng(0), photographs()
    for n in range(count):
        picture = Image.open(files[n % len(files)]).convert("RGB")
        w, h = (int(rng.integers(81, size + 1)) for size in picture.size)
        left, top = (int(rng.integers(0, size - part + 1)) for size, part in zip(picture.size, (w, h)))
        if not 0.1 < w / h < 10:
            w = h = min(w, h)
        scale = side / min(w, h)
        file = io.BytesIO()
        picture.crop((left, top, left + w, top + h)).resize((round(w * scale), round(h * scale))).save(
            file, "JPEG", quality=90)
        yield file.getvalue()


@pytest.mark.skipif(not PHOTOS, reason="needs PARAUNI_PHOTOS, a folder of photographs")
def test_a_corpus_of_photographs_with_every_fault_mixed_in(tmp_path: Path) -> None:
    files = photographs()
    good = [path.read_bytes() for path in files[:1000]] + list(crops(1000 - min(1000, len(files)), 128))
    good += GOOD.values()
    faults = [(content, key.encode()) for key, (content, _) in BAD.items()]
    faults += [(picture(), b"\xff"), (picture(), None), (b"", b"x"), (picture(), b" "), (picture(), b"")]
    members: list[list[tuple[str, bytes]]] = [[] for _ in range(10)]
    bad = set()
    for n, content in enumerate(good):
        shard = members[n * 10 // len(good)]
        shard += [(f"{n:05}.jpg", content), (f"{n:05}.txt", f"photograph {n}".encode())]
        if n % 20 == 0:
            content, caption = faults[(n // 20) % len(faults)]
            shard += [(f"{n:05}x.jpg", content)] + [(f"{n:05}x.txt", caption or b"")] * (caption is not None)
            bad.add(f"{n * 10 // len(good)}.tar/{n:05}x")
    for k in range(10):
        write_tar(tmp_path / f"{k}.tar", members[k])
    (tmp_path / "cut.tar").write_bytes((tmp_path / "0.tar").read_bytes()[:3000])
    write_tar(tmp_path / "empty.tar", [])
    found, weights, early = scan((str(tmp_path / "*.tar"),), 0)
    corpus = Corpus(found, weights, 0)
    items = [Reader(corpus, (64, 64, 3))[n] for n in range(sum(corpus.totals))]
    captions = Counter(caption for _, caption, fault in items if fault is None)
    named = [*early, *(fault for _, _, fault in items if fault is not None)]
    for reason, count in Counter(re.sub(r"[0-9].*", "...", fault.reason) for fault in named).items():
        print(f"{count:4} {reason}")
    print(f"{len(captions)} good samples once each, {len(named)} bad ones named")
    assert captions == Counter(f"photograph {n}" for n in range(len(good))) and len(good) >= 1000
    assert {fault.name.removeprefix(f"{tmp_path}/").removesuffix(".jpg")
            for fault in named} == bad | {"cut.tar", "cut.tar/00000", "empty.tar"}


@pytest.mark.skipif(not PHOTOS, reason="needs PARAUNI_PHOTOS, a folder of photographs")
def test_the_rate_of_the_loader_on_photographs(tmp_path: Path) -> None:
    """Samples a second on one core at 512 px from tar, against plain PIL on the same files."""
    contents = list(crops(48, 640))
    write_tar(tmp_path / "a.tar", [member for n, content in enumerate(contents) for member in
                                   ((f"{n:05}.jpg", content), (f"{n:05}.txt", b"a photograph"))])
    for n, content in enumerate(contents):
        (tmp_path / f"{n:05}.jpg").write_bytes(content)

    def plain() -> None:
        for n in range(len(contents)):
            with Image.open(tmp_path / f"{n:05}.jpg") as picture:
                picture = picture.convert("RGB")
                side = min(picture.size)
                np.asarray(picture.crop((0, 0, side, side)).resize((512, 512), Image.Resampling.BICUBIC))

    corpus = corpus_of(str(tmp_path / "a.tar"))

    def ours() -> None:
        batches = iter([list(range(i, i + 8)) for i in range(0, len(contents), 8)])
        read = data.loader(Reader(corpus, (512, 512, 3)), batches, workers=0)
        assert sum(len(x) for x, _, _ in read) == len(contents)

    rates = {function.__name__: [] for function in (plain, ours)}
    for _ in range(3):
        for function in (plain, ours):
            start = time.process_time()
            function()
            rates[function.__name__].append(len(contents) / (time.process_time() - start))
    best = {name: max(values) for name, values in rates.items()}
    print(f"plain PIL {best['plain']:.1f}, loader {best['ours']:.1f} samples per second of one core; "
          f"ratio {best['ours'] / best['plain']:.3f}", file=sys.stderr)
    assert best["ours"] >= 0.9 * best["plain"]
