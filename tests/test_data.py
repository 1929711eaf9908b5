"""Prompts and latents are functions of (seed, step, item); a picture is read one way, whatever its file."""
import io
import json
import tracemalloc
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, PngImagePlugin
from safetensors.torch import save_file

from common import Refused
from data import (Latents, NanoLatents, draw_prompt, nano_item, nano_prompts, parse_mixture, read_prompts,
                  stamp_of)
from helpers import TINY, file_of, tiny_model
from nano import world
from pictures import read_picture

PARAUNI = SimpleNamespace(vae=tiny_model().vae, preset=TINY, device=torch.device("cpu"))


def test_a_prompt_is_a_line_of_utf8(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufefftwo stars\r\n\r\na heart\u2028and a moon\u0085\n  a ring ".encode())
    assert read_prompts(path) == ["two stars", "a heart\u2028and a moon", "a ring"]


@pytest.mark.parametrize("content", [b" \n\n", b"gr\xfcn", b'{"tag": "colors", "prompt": "a cat"}\n'])
def test_a_file_without_prompts_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(Refused, match="prompts.txt"):
        read_prompts(tmp_path / "prompts.txt")


def test_prompts_are_what_they_were() -> None:
    """The default runs give the same numbers for ever."""
    assert draw_prompt([], 5, 3, step=0, item=0) == "a print of a red heart above a blue moon"
    assert draw_prompt([], 5, 3, step=19, item=7) == "an image of a square and a ring"
    assert draw_prompt(nano_prompts(test=True)[:37], 5, 11, step=0, item=1) == "a tile with a triangle"


def test_a_list_of_prompts_is_gone_through_in_a_new_order_each_time() -> None:
    drawn = [draw_prompt(list("abcdefg"), 2, -1, n // 2, n % 2) for n in range(21)]
    rounds = [drawn[0:7], drawn[7:14], drawn[14:21]]
    assert all(set(one) == set("abcdefg") for one in rounds) and rounds[0] != rounds[1] != rounds[2]


def scene() -> Image.Image:
    """Red grows to the right, green downwards; sides differ, so that every turn shows."""
    y, x = np.mgrid[0:40, 0:60]
    return Image.fromarray(np.stack([4 * x, 6 * y, 0 * x + 90], 2).astype(np.uint8))


def far(a: Image.Image, b: Image.Image) -> float:
    """Mean distance of two pictures in grey values."""
    assert (a.size, a.mode) == (b.size, b.mode)
    return float(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).mean())


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_pictures_are_upright(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = file_of(scene(), kind, exif=exif)
    assert far(read_picture(data), ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")) == 0


@pytest.mark.parametrize("mode, kind", [("RGB", "JPEG"), ("CMYK", "JPEG"), ("RGB", "WEBP"), ("RGB", "AVIF"),
                                        ("RGB", "BMP"), ("P", "GIF"), ("P", "PNG"), ("RGBA", "PNG")])
def test_all_modes_and_formats_are_read(mode: str, kind: str) -> None:
    assert far(read_picture(file_of(scene().convert(mode), kind)), scene()) < 20


def test_grey_pictures_keep_their_grey() -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for pixels in (ramp, ramp.astype(np.uint16) * 257):
        assert (np.asarray(read_picture(file_of(Image.fromarray(pixels)))) == ramp[..., None]).all()


def test_what_is_transparent_is_white() -> None:
    palette = Image.new("P", (9, 9), 0)
    palette.putpalette([10, 20, 30])
    for data in (file_of(Image.new("RGBA", (9, 9))), file_of(palette, transparency=0),
                 file_of(palette, "GIF", transparency=0),
                 file_of(Image.new("RGB", (9, 9)), transparency=(0, 0, 0))):
        assert set(np.unique(read_picture(data))) == {255}
    assert set(np.unique(read_picture(file_of(Image.new("LA", (9, 9), (0, 128)))))) == {127}


def test_odd_but_sound_files_are_read() -> None:
    text, exif = PngImagePlugin.PngInfo(), Image.Exif()
    text.add_text("workflow", "x" * 3_000_000, zip=True)
    assert far(read_picture(file_of(scene(), pnginfo=text)), scene()) == 0
    exif[0x010F], exif[0x0112] = 7, 6                   # a maker that is no text, and a turn
    turned = scene().transpose(Image.Transpose.ROTATE_270)
    assert far(read_picture(file_of(scene(), exif=exif)), turned) == 0


def test_large_pictures_are_refused_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [file_of(Image.new("1", (side, side))) for side in (9_000, 14_000)]
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail("read"))
    for data in (*files, "/dev/zero"):
        with pytest.raises(Refused, match="pixels|no such file"):
            read_picture(data)


@pytest.mark.parametrize("data", [file_of(scene(), "JPEG")[:-200], file_of(scene())[:-60], b"", b"<html>",
                                  b"%!PS-Adobe-3.0 EPSF-3.0\n", file_of(scene(), "TIFF"), "gone.png"])
def test_what_is_no_picture_is_refused(data: bytes | str) -> None:
    with pytest.raises(Refused):
        read_picture(data)


def test_nano_latents_are_the_pictures_of_their_captions() -> None:
    batch = NanoLatents(PARAUNI.vae, seed=5).batch(7, [3, 0])
    scenes, _, captions = zip(*[nano_item(5, 7, item) for item in (3, 0)])
    assert batch.captions == list(captions)
    want = PARAUNI.vae.encode(world.render(list(scenes)) * 2 - 1)
    torch.testing.assert_close(batch.latents, want, rtol=0, atol=1e-5)


def test_nano_trains_on_nothing_of_the_test_and_one_caption_in_ten_is_wrong() -> None:
    """What stages I to III draw: pictures, captions (right and wrong) and prompts."""
    wrong = []
    for item in range(4000):
        scene, prompt, text = nano_item(0, 1, item)
        caption = world.parse_prompt(text)
        assert not (world.is_test_scene(scene) or world.is_test(prompt) or world.is_test(caption))
        true = [each.text for each in world.prompts_of(scene, world.wording_of(caption.text))]
        is_true = caption.text in true
        assert is_true == (caption == prompt)
        wrong.append(not is_true)
    assert 0.085 < sum(wrong) / len(wrong) < 0.115


def write(folder: Path, counts: list[int], **changed: object) -> str:
    """Shards as prepare.py writes them; sample n has the latent n and the caption "name n"."""
    shards, n = {f"{k}.safetensors": count for k, count in enumerate(counts)}, 0
    folder.mkdir()
    for name, count in shards.items():
        captions = [f"{folder.name} {i} \u2028é".encode() for i in range(n, n + count)]
        save_file({"latents": torch.arange(n, n + count).bfloat16().reshape(count, 1, 1, 1),
                   "captions": torch.tensor(list(b"".join(captions)), dtype=torch.uint8),
                   "offsets": torch.tensor([0, *map(len, captions)]).cumsum(0)}, folder / name)
        n += count
    stamp = stamp_of(PARAUNI.vae, TINY) | changed
    (folder / "index.json").write_text(json.dumps({"stamp": stamp, "shards": shards}))
    return str(folder)


def captions_of(spec: tuple[str, ...], count: int, seed: int = 0) -> list[str]:
    """The first items' captions without their ends; each must fit its latents."""
    batch = Latents(spec, 4, seed, PARAUNI).batch(0, list(range(count)))
    numbers = [float(caption.split()[-2]) for caption in batch.captions]
    assert batch.latents.flatten().tolist() == numbers and batch.latents.dtype == torch.float32
    return [caption.removesuffix(" \u2028é") for caption in batch.captions]


def test_item_n_is_a_function_of_seed_and_n(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", [3, 0, 5, 1])
    whole = captions_of((folder,), 40)
    again = Latents((folder,), 4, 0, PARAUNI)
    for n in (37, 2, 20):
        assert again.batch(n // 4, [n % 4]).captions[0].startswith(whole[n] + " ")
    assert captions_of((folder,), 40, seed=1) != whole
    (tmp_path / "a" / "2.safetensors").write_bytes(b"half of it")
    with pytest.raises(Refused, match="2.safetensors is missing or cut off"):
        Latents((folder,), 4, 0, PARAUNI)


@pytest.mark.parametrize("counts", [[[1]], [[3, 0, 5], [1, 2]], [[64]]])
def test_every_sample_is_as_likely_as_any_other(counts: list[list[int]], tmp_path: Path) -> None:
    # a path may look like one with a weight
    folders = tuple(write(tmp_path / f"run={k}", shards) for k, shards in enumerate(counts))
    total = sum(map(sum, counts))
    times = Counter(captions_of(folders, 100 * total))
    assert len(times) == total and all(60 <= count <= 140 for count in times.values())


def test_a_mixture_is_drawn_by_its_weights(tmp_path: Path) -> None:
    many, few = write(tmp_path / "many", [60, 40]), write(tmp_path / "few=1", [7])
    drawn = captions_of((f"{many}=3", f"{few}=1"), 2000)
    few = Counter(caption for caption in drawn if caption.startswith("few=1"))
    assert len(few) == 7 and 440 <= few.total() <= 560                  # 500 +- 3 s.d.


def test_weights_for_some_folders_only_are_refused() -> None:
    with pytest.raises(Refused, match="for all of --data or for none"):
        parse_mixture(("photos", "drawings=2"))


@pytest.mark.parametrize("key", ["vae", "scaling_factor", "image_size", "latent_shape"])
def test_latents_of_another_model_are_refused(key: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "a", [2], **{key: "another"})
    with pytest.raises(Refused, match="of another model"):
        Latents((folder,), 4, 0, PARAUNI)
    (tmp_path / "a" / "index.json").unlink()
    with pytest.raises(Refused, match="prepare.py"):
        Latents((folder,), 4, 0, PARAUNI)


def test_memory_does_not_grow_with_the_number_of_captions(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", [100_000])
    tracemalloc.start()
    Latents((folder,), 64, 0, PARAUNI).batch(1, [0, 63])
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()
