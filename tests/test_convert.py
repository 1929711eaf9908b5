"""tools/convert.py on small files in the published layouts; the words that the published VLM reads."""
import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import InternVLForConditionalGeneration

from common import Refused, fingerprint
from helpers import TINY, tiny_model
from model import PRESETS, PROMPT, ParaUni, byte_tokenizer
from tools import convert

VLM, SANA, DC_AE = "InternVL3-2B-hf", "SANA1.5_1.6B_1024px_diffusers", "dc-ae-f32c32-sana-1.1-diffusers"
DIT_FILE = f"{SANA}/transformer/diffusion_pytorch_model.safetensors"
OPENUNI_FILE = "openuni/openuni_l_internvl3_2b_sana_1_6b_1024_hf_blip3o60k.pth"
LARGE = replace(TINY, name="l-1024", shapes_world=False)
OPENUNI = replace(LARGE, name="openuni-l-1024", lim=replace(TINY.lim, norm=False, layers=(4,)))


@pytest.fixture
def source(tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The repositories of l-1024, of the size of the tiny model, to damage; and presets of that size."""
    monkeypatch.setitem(PRESETS, "l-1024", LARGE)
    monkeypatch.setitem(PRESETS, "openuni-l-1024", OPENUNI)
    source = tmp_path / "source"
    for part, place in (("vlm", VLM), ("transformer", f"{SANA}/transformer"), ("vae", DC_AE)):
        shutil.copytree(tiny_weights / part, source / place)
    (source / VLM / "chat_template.jinja").write_text("a template")
    (source / "openuni").mkdir()
    return source


def run(source: Path, name: str = "l-1024") -> Path:
    out = source.parent / "out" / name
    convert.main([name, "--source", str(source), "--out", str(out)])
    return out


def rewrite(path: Path, change: Callable[[str, Tensor], tuple[str, Tensor]]) -> None:
    tensors = dict(change(name, tensor) for name, tensor in load_file(path).items())
    path.unlink()
    save_file(tensors, path, {"format": "pt"})


def shard(path: Path) -> None:
    """Split a file, which goes, as diffusers and transformers do."""
    huggingface_hub.save_torch_state_dict(
        load_file(path), path.parent, max_shard_size=path.stat().st_size // 2,
        filename_pattern=f"{path.stem}{{suffix}}.safetensors")


def test_a_preset_loads_bit_for_bit(source: Path) -> None:
    out = run(source)
    with pytest.warns(UserWarning, match="untrained"):
        model, tiny = ParaUni.from_preset("l-1024", out), tiny_model()
    for part in ("vlm", "dit", "vae"):
        assert fingerprint(getattr(model, part)) == fingerprint(getattr(tiny, part))
    assert model.tokenizer.get_vocab() == tiny.tokenizer.get_vocab()
    assert (out / "vlm" / "chat_template.jinja").read_text() == "a template"
    assert len({path.stat().st_mode for path in out.rglob("*.*")}) == 1


def test_shards_are_put_together_and_stand_above_a_single_file(source: Path) -> None:
    tiny = tiny_model()
    shard(source / DIT_FILE)
    shard(source / VLM / "model.safetensors")
    # as in a published repository: beside the shards a single file in half precision, which is not read
    save_file({name: p.half() for name, p in tiny.dit.state_dict().items()}, source / DIT_FILE)
    model = ParaUni.from_preset("l-1024", run(source))
    assert fingerprint(model.dit) == fingerprint(tiny.dit)
    assert fingerprint(model.vlm) == fingerprint(tiny.vlm)


def test_the_vlm_computes_what_the_published_one_does(source: Path) -> None:
    """Under today's names too, and whatever the config says of tied embeddings."""
    theirs = InternVLForConditionalGeneration.from_pretrained(source / VLM)
    path = source / VLM / "config.json"
    config = json.loads(path.read_text())
    for part in (config, config["text_config"]):
        part["tie_word_embeddings"] = True
    path.write_text(json.dumps(config))
    theirs.save_pretrained(source / "today", save_original_format=False)
    (source / "today" / "model.safetensors").replace(source / VLM / "model.safetensors")
    ours = InternVLForConditionalGeneration.from_pretrained(run(source) / "vlm")
    inputs = {"input_ids": torch.tensor([[5] * TINY.vlm.image_seq_length + [7, 8, 9, 10, 11]]),
              "pixel_values": torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
    with torch.no_grad():
        want, got = (vlm(**inputs, output_hidden_states=True) for vlm in (theirs, ours))
    assert torch.equal(got.logits, want.logits)
    assert all(torch.equal(a, b) for a, b in zip(got.hidden_states, want.hidden_states, strict=True))
    assert ours.config.tie_word_embeddings is False


def test_numbers_keep_their_dtype(source: Path) -> None:
    for file in (DIT_FILE, f"{DC_AE}/diffusion_pytorch_model.safetensors", f"{VLM}/model.safetensors"):
        rewrite(source / file, lambda name, tensor: (name, tensor.bfloat16()))
    for path in run(source).rglob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.bfloat16}


def edit(old: str, new: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(path.read_text().replace(old, new))


def rename(old: str, new: str) -> Callable[[Path], None]:
    return lambda path: rewrite(path, lambda name, tensor: (name.replace(old, new), tensor))


def first_row(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    return name, tensor[:1] if "fc1" in name or "proj_out.bias" in name else tensor


@pytest.mark.parametrize("name, damage, sentence", [
    (DIT_FILE, lambda path: (Path.unlink(path), path.write_bytes(b"half of it")), "missing, truncated"),
    (DIT_FILE, lambda path: (shard(path), min(path.parent.glob("*-00001-of-*")).unlink()), "missing"),
    (DIT_FILE, lambda path: [shutil.copy(path, path.with_stem(f"{path.stem}-{n}")) for n in "12"], "repeats"),
    (DIT_FILE, rename("to_q", "query"), "6 missing .*6 unknown"),
    (DIT_FILE, lambda path: rewrite(path, first_row), "1 misshaped .*proj_out.bias"),
    (DIT_FILE, lambda path: rewrite(path, lambda name, t: (name, t.to(torch.int8))), "quantised"),
    (f"{SANA}/transformer/config.json", edit('"num_layers": 2', '"num_layers": 3'), "of another preset"),
    (f"{VLM}/config.json", edit('"rope_theta": 1', '"rope_theta": 9'), "rope_theta is 9"),
    (f"{VLM}/model.safetensors", rename("fc1", "up"), "unexpected_keys"),
    (f"{VLM}/model.safetensors", lambda path: rewrite(path, first_row), "mismatched"),
    (f"{VLM}/tokenizer.json", lambda path: byte_tokenizer().save_pretrained(path.parent), "151667, not 5")])
def test_bad_files_leave_nothing(source: Path, name: str, damage: Callable, sentence: str) -> None:
    damage(source / name)
    with pytest.raises(Refused, match=sentence):
        run(source)
    assert list((source.parent / "out").iterdir()) == []


def test_a_folder_appears_whole_or_not_at_all(source: Path) -> None:
    # what a killed conversion left is not gone on with
    left = source.parent / "out" / ".l-1024.partial" / "vlm"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_text("half")
    out = run(source)
    assert not left.parent.exists() and "half" not in (out / "vlm" / "config.json").read_text()
    with pytest.raises(Refused, match="is already there"):
        run(source)
    assert (out / "transformer" / "config.json").is_file()


def openuni_state(model: ParaUni, fine_tuned: bool) -> dict[str, Tensor]:
    """What OpenUni's training writes: its own names, bf16 as DeepSpeed keeps them."""
    names = {"queries": "meta_queries", "lim.connector.": "connector.", "lim.projector.": "projector."}
    names |= {"dit.": "transformer."} if fine_tuned else {}
    return {theirs + name[len(ours):]: (p.detach() + 0.25).bfloat16() for name, p in model.named_parameters()
            for ours, theirs in names.items() if name.startswith(ours)}


@pytest.mark.parametrize("fine_tuned", [False, True])
def test_openuni_paints_with_its_own_weights_and_last_layer(source: Path, fine_tuned: bool) -> None:
    tiny = tiny_model()
    state = openuni_state(tiny, fine_tuned)
    torch.save(state | {"vae.x": torch.zeros(1)}, source / OPENUNI_FILE)
    out = run(source, "openuni-l-1024")
    assert (out / f"stage{2 if fine_tuned else 1}.safetensors").is_file()

    model = ParaUni.from_preset("openuni-l-1024", out)
    assert torch.equal(model.queries, state["meta_queries"].float())
    stored = state["transformer.proj_out.weight"].float() if fine_tuned else tiny.dit.proj_out.weight
    assert torch.equal(model.dit.proj_out.weight, stored)
    # a training from scratch reads it too; the file says so itself, to another preset of the pair too
    afresh = ParaUni.from_preset("openuni-l-1024", out, "none").lim
    assert afresh.layers == [TINY.lim.vlm_layers] and isinstance(afresh.agglayer_norm, torch.nn.Identity)
    assert isinstance(ParaUni.from_preset("l-1024", out).lim.agglayer_norm, torch.nn.Identity)
    with torch.no_grad():
        last = model.read_queries(model.encode_prefix(["a red heart", None]))[-1]       # after the final norm
        want = model.lim.projector(model.lim.connector(last))
        torch.testing.assert_close(model.condition(["a red heart", None]), want)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("make, sentence", [
    (lambda s, p: torch.save(s | {"x": Evil(p.parent / "ran")}, p), "could run code"),
    (lambda s, p: p.write_bytes(pickle.dumps(Evil(p.parent / "ran"))), "could run code"),
    (lambda s, p: torch.save({"state_dict": s}, p), "flat dict of tensors"),
    (lambda s, p: torch.save(s | {"meta_queries": torch.ones(1).expand(10 ** 15)}, p), "misshaped .*queries"),
    (lambda s, p: torch.save(s | {"transformer.proj_out.bias": torch.zeros(8)}, p), "missing .*dit.caption")])
def test_bad_openuni_files_are_refused(source: Path, make: Callable, sentence: str) -> None:
    make(openuni_state(tiny_model(), fine_tuned=False), source / OPENUNI_FILE)
    with pytest.raises(Refused, match=sentence):
        run(source, "openuni-l-1024")
    assert not (source / "openuni" / "ran").exists()


def test_pinned_revisions_are_fetched(source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = {}

    def snapshot_download(name: str, revision: str, allow_patterns: list[str], local_dir: Path) -> None:
        asked[name] = revision
        hub = source / local_dir.name
        files = [str(path.relative_to(hub)) for path in hub.rglob("*") if path.is_file()]
        for file in huggingface_hub.utils.filter_repo_objects(files, allow_patterns=allow_patterns):
            (local_dir / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(hub / file, local_dir / file)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(convert, "DOWNLOADS", tmp_path / "downloads")
    (source / SANA / "text_encoder").mkdir()
    (source / SANA / "text_encoder" / "model.safetensors").write_text("not needed")
    convert.main(["l-1024", "--out", str(tmp_path / "new")])
    assert ParaUni.from_preset("l-1024", tmp_path / "new").preset == LARGE
    assert len(asked) == 3 and all(len(revision) == 40 for revision in asked.values())
    assert not (tmp_path / "downloads" / SANA / "text_encoder").exists()


def test_random_weights_read_bytes_with_the_published_marks() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer(PROMPT.format(prompt="a 猫"), add_special_tokens=False).input_ids
    assert (ids[0], ids[-1], ids.count(151645)) == (151644, 151665, 1)
    # the words that OpenUni was trained with
    assert tokenizer.decode(ids) == ("<|im_start|>user\nGenerate an image: a 猫<|im_end|>\n"
                                     "<|im_start|>assistant\n<img>")


def test_a_mark_without_an_embedding_is_left_out() -> None:
    model = tiny_model()
    model.tokenizer.add_tokens([f"<{i}>" for i in range(9)])            # of 97 tokens 96 have one
    assert model.condition(["a <8> heart"]).equal(model.condition(["a heart"]))
