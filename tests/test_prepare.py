"""prepare.py: every file is read or named, and neither ranks nor workers nor kills change what is written."""
import io
import json
import multiprocessing
import os
import pickle
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import prepare
from common import Refused, derive_seed
from data import Latents
from helpers import file_of
from model import ParaUni


def picture(width: int = 50, height: int = 45, seed: int = 0) -> bytes:
    """The bytes of a PNG: red grows to the right, green downwards."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 200 / width, y * 200 / height, 0 * x + 40 * (seed % 6)], 2)
    return file_of(Image.fromarray(pixels.astype(np.uint8)))


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def pairs(*numbers: int) -> dict[str, bytes]:
    files = {}
    for n in numbers:
        files |= {f"{n:05}.png": picture(seed=n), f"{n:05}.txt": f"caption {n}".encode()}
    return files


def run(out: Path, *data: object, **flags: object) -> None:
    flags = {"workers": 0, "max_bad": 1.0, **flags}
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    prepare.main(["--data", ",".join(map(str, data)), "--out", str(out), *words])


def read(out: Path, *data: object, **flags: object) -> tuple[list[str], dict[str, str]]:
    """All captions that came through; of what was left out the end of the name -> the reason."""
    run(out, *data, **flags)
    captions = []
    for name, count in json.loads((out / "index.json").read_text())["shards"].items():
        shard = load_file(out / name)
        text, offsets = shard["captions"].numpy().tobytes(), shard["offsets"].tolist()
        assert count == len(shard["latents"]) == len(offsets) - 1
        captions += [text[first:last].decode() for first, last in zip(offsets, offsets[1:])]
    left_out = map(json.loads, (out / "left-out.jsonl").read_text().splitlines())
    return captions, {entry["name"].rpartition("/")[2]: entry["reason"] for entry in left_out}


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def test_a_tar_with_everything_in_it(tmp_path: Path) -> None:
    good, text = picture(), b"a caption"
    path = write_tar(tmp_path / "a.tar", {
        "good.png": good, "good.txt": text, "./sub/json.png": good, "./sub/json.json": b'{"prompt": "json"}',
        "both.png": good, "both.json": b'{"caption": "no"}', "both.txt": b"txt first",
        "UPPER.v1.PNG": good, "UPPER.v1.TXT": b"\xef\xbb\xbfa\xe2\x80\xa8b", "UPPER.v1.json": b"{}",
        "two.jpg": good, "two.png": good, "two.txt": text, "latin.png": good, "latin.txt": b"gr\xfcn",
        "blank.png": good, "blank.txt": b" \n", "nokey.png": good, "nokey.json": b'{"url": "x"}',
        "deep.png": good, "deep.json": b"[" * 100_000, "small.png": picture(31, 200), "small.txt": text,
        "thin.png": picture(900, 90), "thin.txt": text, "cut.png": good[:-100], "cut.txt": text,
        "../up.png": good, "../up.txt": text, "/root.png": good, "b.pkl": pickle.dumps(print),
        "._good.png": b"x", "long.txt": b"x" * 2 ** 21, "long.png": good, "alone.png": good})
    with tarfile.open(path, "a") as tar:
        for name, kind in (("link.png", tarfile.SYMTYPE), ("hard.png", tarfile.LNKTYPE),
                           ("pipe.png", tarfile.FIFOTYPE), ("folder.png", tarfile.DIRTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    captions, left_out = read(tmp_path / "out", path)
    assert captions == ["a caption", "json", "txt first", "a\u2028b"]
    assert left_out.keys() == {
        "alone.png", "two.jpg", "two.png", "two.txt", "latin.png", "blank.png", "nokey.png", "deep.png",
        "small.png", "thin.png", "cut.png", "up.png", "up.txt", "root.png", "b.pkl", "._good.png", "long.png",
        "link.png", "hard.png", "pipe.png"}
    assert left_out["up.png"] == left_out["root.png"] == "its path leaves the tar"
    assert {left_out[f"{name}.png"] for name in ("link", "hard", "pipe")} == {"a link or special file"}
    assert read(tmp_path / "keys", path, caption_keys="new,caption")[0] == ["no"]


@pytest.mark.parametrize("harm, count", [
    (lambda data: data[:512 * 10 + 100], 2), (lambda data: data[:512 * 4], 1), (lambda data: data[:100], 0),
    (lambda data: data[:512 * 8] + b"not a header" + data[512 * 8 + 12:], 2), (lambda data: data + data, 3)],
    ids=["cut", "cut between samples", "cut in the first header", "damaged", "joined"])
def test_a_harmed_tar_is_read_as_far_as_it_is_whole(harm: Callable, count: int, tmp_path: Path) -> None:
    """A sample is 4 blocks: two headers, a picture of 1 block, a caption."""
    write_tar(tmp_path / "whole.tar", pairs(7))
    files = pairs(0, 1, 2)
    assert all(len(content) <= 512 for content in files.values())
    path = write_tar(tmp_path / "harmed.tar", files)
    path.write_bytes(harm(path.read_bytes()))
    captions, left_out = read(tmp_path / "out", tmp_path / "*.tar")
    assert captions == [f"caption {n}" for n in range(count)] + ["caption 7"] and "harmed.tar" in left_out


def test_sources_that_are_damaged_or_lie_about_sizes_are_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "good.tar", pairs(0))
    write_tar(tmp_path / "packed.tar", pairs(0), "w:gz")
    member = tarfile.TarInfo("a.png")
    member.pax_headers = {"GNU.sparse.realsize": "10"}
    hides = tarfile.TarInfo("0").tobuf() + member.tobuf(tarfile.PAX_FORMAT)[:1024]
    member.size = -1536                                 # tarfile would read in circles
    bad = {"noise.tar": np.random.default_rng(0).bytes(5000), "nothing.tar": b"",
           "negative.tar": member.tobuf(tarfile.GNU_FORMAT) + bytes(2048),
           "hidden.tar": hides + member.tobuf(tarfile.GNU_FORMAT) + bytes(2048),
           "a.json": b'[{"image": "1.png", "caption": "x"}, {...', "b.json": b"\xff"}
    write_files(tmp_path, {"1.png": picture(), **bad})
    captions, left_out = read(tmp_path / "out", tmp_path / "*.tar", tmp_path / "*.json")
    assert captions == ["caption 0"] and left_out.keys() == {"packed.tar", "0", *bad}


def test_a_folder_with_everything_in_it(tmp_path: Path) -> None:
    other = write_files(tmp_path / "other", pairs(8, 9))
    folder = write_files(tmp_path / "in", {
        **pairs(0), "deep/er/00001.png": picture(), "deep/er/00001.txt": b"deep", "list.parquet": b"x"})
    write_tar(folder / "shards" / "x.tar", pairs(2))
    write_files(folder / "shards", {"._x.tar": b"x", "y.tar.gz": b"x"})
    os.symlink(other, folder / "linked")
    os.symlink(other / "00008.png", folder / "out.png")
    os.symlink(folder / "00000.png", folder / "within.png")
    os.symlink(write_tar(tmp_path / "z.tar", pairs(3)), folder / "z.tar")
    write_files(folder, {"out.txt": b"x", "within.txt": b"within", "pipe.txt": b"x"})
    os.mkfifo(folder / "pipe.png")
    captions, left_out = read(tmp_path / "out", folder)
    assert sorted(captions) == ["caption 0", "deep", "within"]
    assert left_out.keys() == {"list.parquet", "x.tar", "._x.tar", "y.tar.gz", "linked", "out.png", "z.tar",
                               "pipe.png"}
    assert sorted(read(tmp_path / "out2", folder / "linked", folder / "z.tar")[0]) == [     # links, but named
        "caption 3", "caption 8", "caption 9"]


@pytest.mark.parametrize("lines", [False, True])
def test_a_list_with_everything_in_it(lines: bool, tmp_path: Path) -> None:
    files = {**pairs(0), "sub/b.png": picture(), "sub/b.txt": b"", "sub/b.json": b'{"text": "b", "new": "c"}'}
    folder = write_files(tmp_path / "in", files)
    write_files(tmp_path, pairs(5))
    os.symlink(tmp_path / "00005.png", folder / "link.png")
    entries = [{"image": "00000.png", "annotation": "sub/b.json"},
               {"image": "sub/b.png", "annotation": "00000.txt"},
               {"image": "00000.png", "caption": "said\u2028here"}, {"image": "gone.png", "caption": "x"},
               {"image": "../00005.png", "caption": "x"}, {"image": "link.png", "caption": "x"},
               {"image": str(tmp_path / "00005.png"), "caption": "x"}, {"image": "nul\0.png", "caption": "x"},
               {"image": "00000.png", "annotation": "gone.txt"}, {"image": "00000.png"}, {"caption": "x"}, 7]
    texts = [json.dumps(entry, ensure_ascii=False) for entry in entries]
    text = "\n".join(['{"image": "000', *texts]) if lines else f"[{', '.join(texts)}]"
    (folder / "list.json").write_text("\ufeff" + text)
    assert read(tmp_path / "out", folder / "list.json")[0] == ["b", "caption 0", "said\u2028here"]
    assert (tmp_path / "out" / "left-out.jsonl").read_text().count("\n") == 9 + lines
    assert read(tmp_path / "c", f"{folder}/*.json", folder, caption_keys="new")[0] == ["c", "caption 0", "c"]


def test_too_many_bad_samples_and_none_at_all_stop_it(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", pairs(*range(20)) | {f"{n:05}.png": b"no" for n in range(5, 17)})
    with pytest.raises(Refused, match="--max-bad"):
        run(tmp_path / "out", path, max_bad=0.05)
    assert "00005.png" in (tmp_path / "out" / "left-out.jsonl").read_text()
    assert len(read(tmp_path / "out", path, max_bad=0.15)[0]) == 8
    write_files(tmp_path / "small", {"a.png": picture(31, 70), "a.txt": b"x"})
    for source, words in (("small", "0 samples"), ("{000..219}.tar", "matches nothing"), ("", "lies in")):
        with pytest.raises(Refused, match=words):
            run(tmp_path / "none", tmp_path / source, max_bad=0)
    assert not (tmp_path / "none" / "index.json").exists()


def test_latents_are_those_of_the_crops(tmp_path: Path) -> None:
    run(tmp_path / "out", write_tar(tmp_path / "a.tar", pairs(0, 1)), seed=3)
    crops = [prepare.read_sample(sample, 32, derive_seed(3, "crop", 0, 0, i))[0]
             for i, sample in enumerate(prepare.read_source(tmp_path / "a.tar"))]
    images = torch.from_numpy(np.stack(crops))                                          # (2, 32, 32, 3)
    vae = prepare.load_vae("nano", "auto")
    want = vae.encode((images.permute(0, 3, 1, 2) / 255 * 2 - 1).to(vae.encoder.conv_in.weight.dtype))
    latents = load_file(tmp_path / "out" / "00000-00000.safetensors")["latents"]
    torch.testing.assert_close(latents, want.bfloat16(), rtol=2e-2, atol=2e-2)
    # and training takes them for its own
    batch = Latents((str(tmp_path / "out"),), 8, 0, ParaUni.from_preset("nano")).batch(0, list(range(8)))
    assert set(batch.captions) == {"caption 0", "caption 1"}
    assert torch.equal(batch.latents, latents[[int(text[-1]) for text in batch.captions]].float())


def test_a_crop_is_a_square_along_the_long_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "read_bytes", lambda place, limit: picture(200, 100))
    sample = prepare.Sample(prepare.Place("a.png", ""), "x")
    crops = [prepare.read_sample(sample, 50, seed)[0].astype(int) for seed in range(40)]
    assert all(crop.shape == (50, 50, 3) for crop in crops)
    assert all(crop[0, 0, 1] < 6 and crop[-1, 0, 1] > 192 for crop in crops)            # from top to bottom
    lefts = [crop[0, 0, 0] for crop in crops]
    assert min(lefts) < 10 and max(lefts) > 90                                          # anywhere across


@pytest.fixture
def corpus(tmp_path: Path) -> list[Path]:
    """Three tars, a folder and a list, with bad samples."""
    tars = [write_tar(tmp_path / f"{k}.tar", pairs(*range(10 * k, 10 * k + 5 + k)) | {f"{k}.png": b"no"})
            for k in range(3)]
    folder = write_files(tmp_path / "folder", pairs(*range(40, 51)))
    entries = [{"image": f"000{n}.png", "caption": str(n)} for n in range(40, 51)]
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, entries)))
    return [*tars, folder, folder / "list.jsonl"]


def in_child(function: Callable, **environment: str) -> multiprocessing.Process:
    def child() -> None:
        os.environ.update(environment)
        function()
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def test_files_do_not_depend_on_ranks_or_workers(corpus: list[Path], tmp_path: Path,
                                                 capfd: pytest.CaptureFixture) -> None:
    run(tmp_path / "one", *corpus, per_shard=4)
    capfd.readouterr()
    port = str(20_000 + os.getpid() % 10_000)
    ranks = [in_child(lambda: run(tmp_path / "two", *corpus, per_shard=4, workers=1), RANK=str(rank),
                      WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port) for rank in range(2)]
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, 0]
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    # each shard was made once
    assert capfd.readouterr().out.count(".safetensors: ") == len(list((tmp_path / "two").glob("0*"))) == 12


def test_a_killed_run_goes_on(corpus: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "whole", *corpus, per_shard=4)
    save, left = prepare.save_file, [7]

    def save_or_die(tensors: dict, path: Path, metadata: dict) -> None:
        if not left[0]:
            Path(path).write_bytes(b"half of it")
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        save(tensors, path, metadata)
    process = in_child(lambda: (monkeypatch.setattr(prepare, "save_file", save_or_die),
                                run(tmp_path / "out", *corpus, per_shard=4)))
    process.join(60)
    assert process.exitcode == -signal.SIGKILL and not (tmp_path / "out" / "index.json").exists()
    run(tmp_path / "out", *corpus, per_shard=4)
    # the half is gone
    assert contents(tmp_path / "whole") == contents(tmp_path / "out")


def test_a_folder_of_other_latents_is_not_mixed_with(corpus: list[Path], tmp_path: Path) -> None:
    run(tmp_path / "out", *corpus, per_shard=6)
    for other in ({"seed": 1}, {"caption_keys": ".txt,caption,new"}):
        with pytest.raises(Refused, match="another --out"):
            run(tmp_path / "out", *corpus, per_shard=6, **other)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Refused, match="another --out"):
        patch.setattr(prepare, "stamp_of", lambda vae, preset: {"vae": "another"})
        run(tmp_path / "out", *corpus, per_shard=6)
    write_files(corpus[3], pairs(39))
    with pytest.raises(Refused, match="another --out"):
        run(tmp_path / "out", *corpus, per_shard=6)
    # a sample more behind a shard that was full
    write_tar(corpus[0], pairs(*range(5)) | {"0.png": b"no"} | pairs(7))
    with pytest.raises(Refused, match="another --out"):
        run(tmp_path / "out", corpus[0], per_shard=6)
    # a caption that was corrected in its place
    run(tmp_path / "new", corpus[3])
    (corpus[3] / "00045.txt").write_text("caption 54")
    with pytest.raises(Refused, match="another --out"):
        run(tmp_path / "new", corpus[3])
