"""Rewards, converted from transformers' CLIPModel, against it and its processors; functions of one's own."""
import math
import shutil
from pathlib import Path

import matplotlib
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchvision import transforms
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import rewards
from common import ROOT, Refused
from rewards import AestheticHead, Reward, build_reward, preprocess
from tools import convert

T = 32                                                      # the tiny tower's picture size
SHAPES = [(512, 600), (600, 512), (511, 389), (100, 171), (40, 33), (T, 71), (71, T), (T, T)]   # W, H
PHOTO = Image.open(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg").convert("RGB")
PROMPTS = ["a red heart", "two stars, it's night", "a red heart", "word " * 100]


def to_tensor(*pictures: Image.Image) -> Tensor:
    return torch.stack([transforms.functional.pil_to_tensor(p) for p in pictures]) / 255    # (B, 3, H, W)


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Every tensor away from its initial value, so that a lost bias or norm weight shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim:
                p += 0.1 * torch.randn(p.shape, generator=generator)
    return model.eval()


def hf_processor(size: int) -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


@pytest.fixture(scope="module")
def hf_tokenizer() -> CLIPTokenizer:
    """Hugging Face's CLIP tokenizer with the published vocabulary, which open_clip brings along."""
    bpe = open_clip.tokenizer.SimpleTokenizer()
    rename = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocab = {rename.get(token, token): i for token, i in bpe.encoder.items()}
    return CLIPTokenizer(vocab=vocab, merges=list(bpe.bpe_ranks))


@pytest.fixture(scope="module", params=["gelu", "quick_gelu"])
def hf(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[CLIPModel, Path]:
    """A tiny CLIPModel, and what tools/convert.py makes of it and of a head in LAION's layout."""
    text = {"hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 3,
            "hidden_act": request.param, "eos_token_id": 2 if request.param == "quick_gelu" else 49407}
    vision = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
              "hidden_act": request.param, "image_size": T, "patch_size": 8}
    tiny = {"embed_dim": 24, "quick_gelu": request.param == "quick_gelu",
            "vision_cfg": {"image_size": T, "layers": 2, "width": 64, "patch_size": 8, "head_width": 16},
            "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 48, "heads": 3, "layers": 2}}
    model = randomise(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24,
                                           logit_scale_init_value=math.log(100))))
    folder = tmp_path_factory.mktemp(request.param)
    for name in ("clip-vit-large-patch14", "PickScore_v1"):
        model.save_pretrained(folder / name)
    # constants that OpenAI's file has and that are no weights
    path = folder / "clip-vit-large-patch14" / "model.safetensors"
    state = load_file(path) | {"text_model.embeddings.position_ids": torch.arange(77)[None],
                               "vision_model.embeddings.position_ids": torch.arange(17)[None]}
    path.unlink()
    save_file(state, path, {"format": "pt"})
    torch.save(randomise(AestheticHead(768)).state_dict(), folder / convert.LAION_HEAD)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_clip, "get_model_config", {"ViT-L-14-quickgelu": tiny, "ViT-H-14": tiny}.get)
        convert.main(["rewards", "--source", str(folder), "--out", str(folder / "rewards")])
    return model, folder / "rewards"


@pytest.mark.parametrize("size", [T, 224])
def test_pictures_like_the_hf_processor(size: int) -> None:
    """PIL computes in fixed point: one grey level at a tie of rounding is all that may differ."""
    for shape in SHAPES:
        picture = PHOTO.resize(shape)
        theirs = hf_processor(size)(picture, return_tensors="pt")["pixel_values"]
        ours = preprocess(to_tensor(picture), size, like_pil=True)
        levels = ((ours - theirs) * torch.tensor(rewards.STD).view(3, 1, 1) * 255).abs()
        assert levels.max() < 1.01 and (levels > 0.01).float().mean() < 1e-3, (shape, levels.max())


@pytest.mark.parametrize("name, divisor", [("clip", 30), ("pickscore", 26)])
def test_scores_match_transformers(hf: tuple[CLIPModel, Path], hf_tokenizer: CLIPTokenizer, name: str,
                                   divisor: float) -> None:
    model, folder = hf
    reward = build_reward(name, "cpu", folder)
    texts = hf_tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    for shape in [(T, T), (T, 71), (512, 600)]:
        pictures = [PHOTO.rotate(angle).resize(shape) for angle in (0, 90, 120, 180)]
        images = to_tensor(*pictures)
        pixels = hf_processor(T)(pictures, return_tensors="pt")["pixel_values"]             # (4, 3, T, T)
        if name == "clip":
            tower = transforms.Normalize(rewards.MEAN, rewards.STD)
            pixels = tower(transforms.CenterCrop(T)(transforms.Resize(T)(images)))
        with torch.no_grad():
            expected = model(pixel_values=pixels, **texts).logits_per_image.diagonal() / divisor    # (4,)
        assert expected.std() > 0.01                        # the pictures and prompts are told apart
        # a grey level in PIL's resizing may differ
        tolerance = 2e-3 if name == "pickscore" and shape != (T, T) else 1e-5
        torch.testing.assert_close(reward(images, PROMPTS), expected, atol=tolerance, rtol=0)


def test_aesthetic_score_matches_transformers(hf: tuple[CLIPModel, Path], tmp_path: Path) -> None:
    model, folder = hf
    assert sum(p.numel() for p in rewards.AestheticScore(folder).head.parameters()) == 927_969
    # the published head is too wide for the tiny tower
    head = randomise(AestheticHead(24, (12, 8, 6, 4)))
    (tmp_path / "clip").symlink_to(folder / "clip")
    (tmp_path / "aesthetic").mkdir()
    save_file(head.state_dict(), tmp_path / "aesthetic" / "aesthetic.safetensors")
    pictures = [PHOTO.resize((2 * T, 71)), PHOTO.rotate(90).resize((2 * T, 71))]
    with torch.no_grad():
        features = model.get_image_features(**hf_processor(T)(pictures, return_tensors="pt")).pooler_output
        expected = head(features / features.norm(dim=-1, keepdim=True))                     # (B,)
    scores = build_reward("aesthetic", "cpu", tmp_path)(to_tensor(*pictures), ["", ""])
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)


def test_another_clip_is_refused(hf: tuple[CLIPModel, Path], tmp_path: Path) -> None:
    with pytest.raises(Refused, match="of another architecture"):
        convert.convert_clip("ViT-H-14", hf[1].parent / "PickScore_v1", tmp_path / "clip")
    # nor may a folder without weights score by chance
    (tmp_path / "open_clip_config.json").symlink_to(hf[1] / "clip" / "open_clip_config.json")
    with pytest.raises(RuntimeError, match="Required pretrained weights"):
        rewards.load_clip(tmp_path)


def test_no_code_of_a_weights_folder_is_run(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(ROOT / "weights" / "nano" / "clip", tmp_path / "clip"))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Words: pass\n")
    for name, key, value in (
            ("open_clip_config.json", '"text_cfg": {', '"tokenizer_kwargs": {"trust_remote_code": true}'),
            ("tokenizer_config.json", "{", '"auto_map": {"AutoTokenizer": [null, "code.Words"]}')):
        (folder / name).write_text((folder / name).read_text().replace(key, f"{key}{value}, "))
    rewards.load_clip(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["clip", "pickscore", "aesthetic"])
def test_nanos_rewards_are_frozen_fp32_and_leave_the_seed_alone(name: str) -> None:
    images = torch.rand(5, 3, 40, 48, generator=torch.Generator().manual_seed(0))
    prompts = ["a red heart", "a blue star", "a blue star", "two red stars", "a red heart"]
    before = torch.get_rng_state()
    reward = build_reward(name, "cpu")
    assert torch.equal(before, torch.get_rng_state())
    assert not any(module.training for module in reward.modules())
    assert not any(p.requires_grad for p in reward.parameters())
    scores = reward(images.requires_grad_(), prompts)
    assert not scores.requires_grad and scores.dtype == torch.float32 and scores.std() > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reward(images, prompts), scores)
    one_by_one = [reward(images[i:i + 1], prompts[i:i + 1]) for i in range(5)]
    torch.testing.assert_close(torch.cat(one_by_one), scores, atol=1e-5, rtol=0)


OWN = """
from __future__ import annotations
from dataclasses import dataclass
import torch
from half import half
def brightness(images, prompts): return half(images).mean(dim=(1, 2, 3))
def flip(images, prompts):
    prompts.clear()
    return images.mul_(-1).add_(1).mean(dim=(1, 2, 3))
def plain(images, prompts): return [1] * len(images)
@dataclass
class Weight:
    value: float = 1.0
def wide(images, prompts): return images.mean(dim=(1, 2))
def blind(images, prompts): return torch.full((len(images),), float("nan"))
"""
IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A user's folder: a file of the name of one of ours, and what it imports."""
    (tmp_path / "rewards.py").write_text(OWN)
    (tmp_path / "half.py").write_text("def half(x): return x / 2\n")
    return tmp_path


def test_a_function_finds_what_lies_beside_it(own: Path, tmp_path: Path) -> None:
    # a link to a file in another folder
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "link.py").symlink_to(own / "rewards.py")
    linked = build_reward(f"{tmp_path}/other/link.py:brightness", "cpu")
    assert torch.equal(linked(IMAGES, PROMPTS[:3]), (IMAGES / 2).mean(dim=(1, 2, 3)))
    # run once for all its functions
    assert linked.score.__globals__ is build_reward(f"{own}/rewards.py:plain", "cpu").score.__globals__
    with pytest.raises(Refused, match="expected file.py:function"):
        build_reward("rewards:brightness", "cpu")


def test_no_reward_changes_what_another_one_sees(own: Path) -> None:
    images, prompts = IMAGES.clone(), ["a", "b", "c"]
    flip = build_reward(f"{own / 'rewards.py'}:flip", "cpu")
    torch.testing.assert_close(flip(images, prompts), 1 - IMAGES.mean(dim=(1, 2, 3)))
    assert torch.equal(images, IMAGES) and prompts == ["a", "b", "c"]


def test_any_numbers_are_a_reward_but_not_any_number_of_them(own: Path) -> None:
    with pytest.raises(Refused, match="rewards.py:wide"):
        build_reward(f"{own / 'rewards.py'}:wide", "cpu")(IMAGES, PROMPTS[:3])
    for function, want in (("plain", 1.0), ("blind", math.nan)):
        scores = build_reward(f"{own / 'rewards.py'}:{function}", "cpu")(IMAGES, PROMPTS[:3])
        torch.testing.assert_close(scores, torch.full((3,), want), equal_nan=True)


@pytest.mark.parametrize("images", [IMAGES - 1, IMAGES * 255, IMAGES[:2]])
def test_pictures_outside_0_to_1_or_of_another_number_than_prompts(images: Tensor) -> None:
    with pytest.raises(AssertionError):
        Reward("own", lambda x, p: x.mean(dim=(1, 2, 3)), "cpu")(images, PROMPTS[:3])
