"""Rewards against transformers' CLIPModel and processors; weight layouts; own functions; refusals."""
import copy
import json
import math
import os
from pathlib import Path

import matplotlib
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from torchvision import transforms
from torchvision.transforms.functional import pil_to_tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import rewards
from rewards import LAION_HEAD, AestheticHead, Reward, build_clip, build_reward, preprocess, save_reward

T = 32                                                      # the tiny tower's picture size
SHAPES = [(512, 600), (600, 512), (511, 389), (100, 171), (40, 33), (T, 71), (71, T), (T, T)]   # W, H
PROMPTS = ["a red heart", "two stars, it's night", "a red heart", "word " * 100]
NANO_CFG = {"model_cfg": {
    "embed_dim": 24, "quick_gelu": False,
    "vision_cfg": {"image_size": T, "patch_size": 4, "width": 32, "head_width": 16, "layers": 2},
    "text_cfg": {"context_length": 8, "vocab_size": 9, "width": 32, "heads": 2, "layers": 2}},
    "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.25, 0.25, 0.2]}}


def photo() -> Image.Image:
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    return Image.open(path).convert("RGB")                  # 512 x 600


def to_tensor(*pictures: Image.Image) -> Tensor:
    return torch.stack([pil_to_tensor(p) for p in pictures]).float() / 255                  # (B, 3, H, W)


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every tensor away from its initial value, so that a lost bias or norm weight shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim:
                p += 0.1 * torch.randn(p.shape, generator=generator)
    return model.eval()


def nano_tokenizer(end_last: bool = True) -> Tokenizer:
    words = ["[PAD]", "[UNK]", "a", "red", "blue", "heart", "star"]
    words = [*words, "word", "[END]"] if end_last else [*words, "[END]", "word"]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="$A [END]", special_tokens=[("[END]", words.index("[END]"))])
    return tokenizer


@pytest.fixture(scope="module")
def hf_tokenizer() -> CLIPTokenizer:
    """Hugging Face's CLIP tokenizer with the published vocabulary, which open_clip brings along."""
    bpe = open_clip.tokenizer.SimpleTokenizer()
    rename = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocab = {rename.get(token, token): i for token, i in bpe.encoder.items()}
    return CLIPTokenizer(vocab=vocab, merges=list(bpe.bpe_ranks))


@pytest.fixture(scope="module", params=["gelu", "quick_gelu"])
def hf(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory,
       hf_tokenizer: CLIPTokenizer) -> tuple[CLIPModel, Path]:
    """A tiny CLIPModel, and a weights folder with it as clip/ and pickscore/ in Hugging Face's layout."""
    old_file = request.param == "quick_gelu"                # eos_token_id 2 and position_ids, like OpenAI's
    text = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3,
            "hidden_act": request.param, "eos_token_id": 2 if old_file else 49407}
    vision = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
              "hidden_act": request.param, "image_size": T, "patch_size": 8, "layer_norm_eps": 1e-3}
    model = randomise(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24,
                                           logit_scale_init_value=math.log(100))))
    folder = tmp_path_factory.mktemp(request.param)
    for name in ("clip", "pickscore"):
        model.save_pretrained(folder / name)
    if old_file:
        state = load_file(folder / "clip" / "model.safetensors")
        state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
        save_file(state, folder / "clip" / "model.safetensors")
    hf_tokenizer.backend_tokenizer.save(str(folder / "pickscore" / "tokenizer.json"))
    return model, folder


@pytest.fixture
def nano(tmp_path: Path) -> Path:
    """A weights folder of all three rewards, written as the trainer of the nano models writes it."""
    clip = randomise(build_clip(NANO_CFG))
    for name in ("clip", "pickscore"):
        save_reward(tmp_path / name, clip, NANO_CFG, nano_tokenizer())
    rewards.save_aesthetic_head(tmp_path / "aesthetic", randomise(AestheticHead(24, (12, 8, 6, 4))))
    return tmp_path


def hf_processor(size: int) -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def torchvision_pixels(images: Tensor, size: int = T) -> Tensor:
    return transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size),
                               transforms.Normalize(rewards.MEAN, rewards.STD)])(images)    # (B, 3, T, T)


def hf_scores(model: CLIPModel, tokenizer: CLIPTokenizer, pixels: Tensor, prompts: list[str]) -> Tensor:
    texts = tokenizer(prompts, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    with torch.no_grad():
        return model(pixel_values=pixels, **texts).logits_per_image.diagonal()              # (B,)


# ---- pictures --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [T, 224])
def test_pictures_like_the_hf_processor(size: int) -> None:
    """PIL computes in fixed point: one grey level at a tie of rounding is all that may differ."""
    for shape in SHAPES:
        picture = photo().resize(shape)
        theirs = hf_processor(size)(picture, return_tensors="pt")["pixel_values"]
        ours = preprocess(to_tensor(picture), size, like_pil=True)
        levels = ((ours - theirs) * torch.tensor(rewards.STD).view(3, 1, 1) * 255).abs()
        assert levels.max() < 1.01 and (levels > 0.01).float().mean() < 1e-3, (shape, levels.max())


def test_pictures_like_torchvision() -> None:
    for shape in SHAPES:
        images = to_tensor(photo().resize(shape))
        torch.testing.assert_close(preprocess(images, T), torchvision_pixels(images), atol=1e-6, rtol=0)


def test_pictures_of_tower_size_are_not_resized() -> None:
    images = torch.rand(2, 3, T, T, generator=torch.Generator().manual_seed(0))
    zero, one = (0.0,) * 3, (1.0,) * 3
    assert torch.equal(preprocess(images, T, zero, one), images)
    assert torch.equal(preprocess(images, T, zero, one, like_pil=True), (images * 255).round() / 255)


# ---- scores against transformers -------------------------------------------------------------------------

def test_clip_score_matches_transformers(hf: tuple[CLIPModel, Path], hf_tokenizer: CLIPTokenizer) -> None:
    model, folder = hf
    images = to_tensor(*(photo().rotate(angle) for angle in (0, 90, 120, 180)))             # (4, 3, 600, 512)
    expected = hf_scores(model, hf_tokenizer, torchvision_pixels(images), PROMPTS) / 30
    assert expected.std() > 0.01                            # the pictures and prompts are told apart
    scores = build_reward("clip", "cpu", weights=folder)(images, PROMPTS)
    assert scores.shape == (4,) and scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)


def test_pickscore_matches_transformers(hf: tuple[CLIPModel, Path], hf_tokenizer: CLIPTokenizer) -> None:
    model, folder = hf
    reward = build_reward("pickscore", "cpu", weights=folder)
    for shape, tolerance in [((T, T), 1e-5), ((512, 600), 2e-3)]:  # 2e-3: one grey level
        pictures = [photo().rotate(angle).resize(shape) for angle in (0, 90, 120, 180)]
        pixels = hf_processor(T)(pictures, return_tensors="pt")["pixel_values"]
        expected = hf_scores(model, hf_tokenizer, pixels, PROMPTS) / 26
        torch.testing.assert_close(reward(to_tensor(*pictures), PROMPTS), expected, atol=tolerance, rtol=0)


def test_key_map_keeps_every_number(hf: tuple[CLIPModel, Path], tmp_path: Path) -> None:
    """The mapped tensors, saved in open_clip's layout, give the scores of the other layout, bit for bit."""
    model, folder = hf
    mapped = rewards.hf_clip_to_open_clip(model.state_dict())
    assert sum(v.numel() for v in mapped.values()) == sum(p.numel() for p in model.parameters())
    first = build_reward("clip", "cpu", weights=folder)
    quick = model.config.text_config.hidden_act == "quick_gelu"
    cfg = {"model_cfg": {
        "embed_dim": 24, "quick_gelu": quick,
        "vision_cfg": {"image_size": T, "patch_size": 8, "width": 64, "head_width": 16, "layers": 2,
                       "mlp_ratio": 2.5, "norm_kwargs": {"eps": 1e-3}},
        "text_cfg": {"width": 48, "heads": 3, "layers": 2, "mlp_ratio": 2.0}}}
    clip = build_clip(cfg)
    clip.load_state_dict(mapped)
    save_reward(tmp_path / "clip", clip, cfg)
    images = to_tensor(photo(), photo().rotate(180))
    second = build_reward("clip", "cpu", weights=tmp_path)
    assert torch.equal(first(images, PROMPTS[:2]), second(images, PROMPTS[:2]))


@pytest.mark.parametrize("act, vision, text, params", [
    ("quick_gelu", (1024, 24, 16), (768, 12, 12), 427_616_513),         # openai/clip-vit-large-patch14
    ("gelu", (1280, 32, 16), (1024, 24, 16), 986_109_441)])              # CLIP-H, PickScore_v1
def test_full_size_tensors_fit(tmp_path: Path, act: str, vision: tuple[int, int, int],
                               text: tuple[int, int, int], params: int) -> None:
    """Shapes only: every tensor of the published architectures finds its place in open_clip's."""
    def tower(width: int, layers: int, heads: int) -> dict:
        return {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
                "num_attention_heads": heads, "hidden_act": act}
    config = {"text_config": tower(*text), "projection_dim": text[0],
              "vision_config": tower(*vision) | {"image_size": 224, "patch_size": 14}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        mapped = rewards.hf_clip_to_open_clip(CLIPModel(CLIPConfig(**config)).state_dict())
        clip = build_clip(rewards.hf_config_to_open_clip(tmp_path))
    assert {k: v.shape for k, v in mapped.items()} == {k: v.shape for k, v in clip.state_dict().items()}
    assert sum(p.numel() for p in clip.parameters()) == params
    assert clip.visual.transformer.resblocks[0].attn.num_heads == vision[2]
    assert clip.transformer.resblocks[0].attn.num_heads == text[2]


TOWERS = {"clip": ("quick_gelu", (1024, 24, 16), (768, 12, 12)),           # openai/clip-vit-large-patch14
          "pickscore": ("gelu", (1280, 32, 16), (1024, 24, 16))}             # PickScore_v1, a CLIP-H


def check_true_widths(name: str, layers: int, folder: Path, hf_tokenizer: CLIPTokenizer) -> None:
    """A reward on random weights of the published widths, from a folder in Hugging Face's layout, against
    CLIPModel, on photographs of the tower's size, and of another, where rounding to grey levels comes in."""
    act, *towers = TOWERS[name]
    vision, text = ({"hidden_size": width, "intermediate_size": 4 * width, "hidden_act": act,
                     "num_hidden_layers": min(depth, layers), "num_attention_heads": heads}
                    for width, depth, heads in towers)
    model = CLIPModel(CLIPConfig(text_config=text | {"eos_token_id": 2}, projection_dim=towers[1][0],
                                 vision_config=vision | {"image_size": 224, "patch_size": 14},
                                 logit_scale_init_value=math.log(100))).eval()
    model.save_pretrained(folder / name)
    wanted = []
    small = [photo().rotate(angle).resize((224, 224)) for angle in (0, 90, 180)]
    large = [photo().rotate(angle) for angle in (0, 90, 180)]
    for pictures in (small, large):
        pixels = (hf_processor(224)(pictures, return_tensors="pt")["pixel_values"] if name == "pickscore" else
                  torchvision_pixels(to_tensor(*pictures), 224))
        wanted.append(hf_scores(model, hf_tokenizer, pixels, PROMPTS[:3]) / rewards.DIVISORS[name])
    del model
    reward = build_reward(name, "cpu", weights=folder)
    off = [(reward(to_tensor(*pictures), PROMPTS[:3]) - want).abs().max().item()
           for pictures, want in zip((small, large), wanted, strict=True)]
    print(f"\n{name}, true widths, {layers} layers: off by {off[0]:.1e} and, resized, {off[1]:.1e}")
    assert off[0] <= 1e-5 and off[1] <= (1e-3 if name == "pickscore" else 1e-5)


@pytest.mark.parametrize("name", ["clip", "pickscore"])
def test_true_widths_match_transformers(name: str, tmp_path: Path, hf_tokenizer: CLIPTokenizer) -> None:
    check_true_widths(name, 1, tmp_path, hf_tokenizer)


@pytest.mark.parametrize("name", ["clip", "pickscore"])
def test_full_size_matches_transformers(name: str, tmp_path: Path, hf_tokenizer: CLIPTokenizer,
                                        request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--full"):
        pytest.skip("all layers: pytest --full, 8 GB of memory")
    check_true_widths(name, 32, tmp_path, hf_tokenizer)


def test_hf_tokenizer_and_open_clips_agree(hf_tokenizer: CLIPTokenizer) -> None:
    theirs = rewards.text_encoder(hf_tokenizer.backend_tokenizer, 77, 49408)(PROMPTS)
    assert torch.equal(theirs, rewards.text_encoder(None, 77, 49408)(PROMPTS))
    assert theirs[3, 76] == 49407                           # cut at 77, the end token kept


# ---- the aesthetic head ----------------------------------------------------------------------------------

def collapse(head: AestheticHead) -> tuple[Tensor, Tensor]:
    """The five layers as one affine map, in fp64."""
    layers = [copy.deepcopy(head.layers[i]).double() for i in (0, 2, 4, 6, 7)]
    weight, bias = layers[0].weight, layers[0].bias
    for layer in layers[1:]:
        weight, bias = layer.weight @ weight, layer.weight @ bias + layer.bias
    return weight[0], bias[0]


def test_aesthetic_is_one_affine_map_of_a_unit_vector(hf: tuple[CLIPModel, Path], tmp_path: Path) -> None:
    model, folder = hf
    head = randomise(AestheticHead(24, (12, 8, 6, 4)))
    rewards.save_aesthetic_head(tmp_path / "aesthetic", head)
    (tmp_path / "clip").symlink_to(folder / "clip")
    pictures = [photo().resize((T, T)), photo().rotate(90).resize((T, T))]
    with torch.no_grad():
        features = model.get_image_features(**hf_processor(T)(pictures, return_tensors="pt")).pooler_output
        weight, bias = collapse(head)
        expected = F.normalize(features, dim=-1).double() @ weight + bias                   # (B,)
    scores = build_reward("aesthetic", "cpu", weights=tmp_path)(to_tensor(*pictures), ["", ""])
    torch.testing.assert_close(scores.double(), expected, atol=1e-5, rtol=0)


def test_laion_layout_loads_from_a_pickle_of_tensors(tmp_path: Path) -> None:
    head = randomise(AestheticHead(768))
    torch.save(head.state_dict(), tmp_path / LAION_HEAD)
    loaded = rewards.load_aesthetic_head(tmp_path)
    assert sum(p.numel() for p in loaded.parameters()) == 927_969
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), loaded.parameters(), strict=True))


def test_the_published_laion_head() -> None:
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (folder / LAION_HEAD).is_file():
        pytest.skip(f"the published {LAION_HEAD} is not on this machine")
    head = rewards.load_aesthetic_head(folder)
    weight, bias = collapse(head)
    assert sum(p.numel() for p in head.parameters()) == 927_969
    assert weight.norm().item() == pytest.approx(17.9956, abs=1e-4)
    assert bias.item() == pytest.approx(5.23665, abs=1e-5)


# ---- a vocabulary of its own, and the module as a whole --------------------------------------------------

def test_own_tokenizer_is_pooled_at_its_end_token(nano: Path) -> None:
    score = build_reward("clip", "cpu", weights=nano).score
    texts = ["a red heart", "star", "a blue star " * 9]
    ids = score.encode(texts)                                                               # (U, S)
    assert ids.tolist() == [[2, 3, 5, 8, 0, 0, 0, 0], [6, 8, 0, 0, 0, 0, 0, 0], [2, 4, 6, 2, 4, 6, 2, 8]]
    clip, end = score.clip, torch.tensor([3, 1, 7])
    with torch.no_grad():
        x = clip.transformer(clip.token_embedding(ids) + clip.positional_embedding, attn_mask=clip.attn_mask)
        expected = clip.ln_final(x)[range(3), end] @ clip.text_projection                   # (U, E)
        torch.testing.assert_close(clip.encode_text(ids), expected)


def test_tokenizers_that_would_be_misread_are_refused(nano: Path) -> None:
    with pytest.raises(ValueError, match=r"ends a text with \[7\], its highest id is 8"):
        rewards.text_encoder(nano_tokenizer(end_last=False), 8, 9)
    with pytest.raises(ValueError, match="below vocab_size"):
        rewards.text_encoder(nano_tokenizer(), 8, 8)
    (nano / "clip" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="vocab_size 9, open_clip's BPE has 49408: put tokenizer.json"):
        build_reward("clip", "cpu", weights=nano)


def test_preprocess_cfg_of_the_folder_is_used(nano: Path) -> None:
    picture = build_reward("pickscore", "cpu", weights=nano).score.picture
    assert picture == {"size": T, "mean": [0.5, 0.4, 0.3], "std": [0.25, 0.25, 0.2], "like_pil": True}
    assert build_reward("clip", "cpu", weights=nano).score.picture["like_pil"] is False


@pytest.mark.parametrize("name", ["clip", "pickscore", "aesthetic"])
def test_a_reward_is_frozen_fp32_and_leaves_the_seed_alone(nano: Path, name: str) -> None:
    images = torch.rand(5, 3, 40, 48, generator=torch.Generator().manual_seed(0))
    prompts = ["a red heart", "star", "star", "a star", "blue"]
    before = torch.get_rng_state()
    reward = build_reward(name, "cpu", weights=nano)
    assert torch.equal(before, torch.get_rng_state())
    assert isinstance(reward, Reward)
    assert not any(module.training for module in reward.modules())
    assert not any(p.requires_grad for p in reward.parameters())
    scores = reward(images.requires_grad_(), prompts)
    assert not scores.requires_grad and scores.dtype == torch.float32 and scores.std() > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reward(images, prompts), scores)
    chunked = build_reward(name, "cpu", weights=nano, batch_size=2)(images, prompts)
    torch.testing.assert_close(chunked, scores, atol=1e-5, rtol=0)


def test_text_once_a_prompt_and_images_in_chunks(nano: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = build_reward("clip", "cpu", weights=nano, batch_size=4)
    clip, texts, pictures = reward.score.clip, [], []
    encode_text = clip.encode_text
    monkeypatch.setattr(clip, "encode_text", lambda ids: (texts.append(len(ids)), encode_text(ids))[1])
    clip.visual.register_forward_hook(lambda module, args, out: pictures.append(len(args[0])))
    images = torch.rand(6, 3, T, T, generator=torch.Generator().manual_seed(0))
    reward(images, ["star", "a star", "star", "star", "a star", "star"])
    assert texts == [2] and pictures == [4, 2]


def test_the_trained_nano_rewards_load() -> None:
    if not all((rewards.NANO_WEIGHTS / name).is_dir() for name in ("clip", "pickscore", "aesthetic")):
        pytest.skip("weights/nano holds no trained rewards yet")
    for name in ("clip", "pickscore", "aesthetic"):
        scores = build_reward(name, "cpu")(torch.zeros(2, 3, T, T), ["a red heart", "a blue star"])
        assert scores.shape == (2,) and scores.isfinite().all()


# ---- functions of one's own ------------------------------------------------------------------------------

OWN = """
import torch
def brightness(images, prompts): return images.mean(dim=(1, 2, 3))
def broken(images, prompts): return images.mean(dim=(1, 2))
def integers(images, prompts): return torch.arange(len(images))
def plain(images, prompts): return [1.0] * len(images)
def blind(images, prompts): return torch.full((len(images),), float("nan"))
"""


def test_a_function_from_a_file_or_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_reward.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for name in (f"{tmp_path / 'own_reward.py'}:brightness", "own_reward:brightness"):
        scores = build_reward(name, "cpu")(images, ["a", "b", "c"])
        torch.testing.assert_close(scores, images.mean(dim=(1, 2, 3)))
    assert build_reward("own_reward:blind", "cpu")(images, ["a", "b", "c"]).isnan().all()   # the caller masks


@pytest.mark.parametrize("function, came", [
    ("broken", r"Tensor.*float32.*\[2, 8\]"), ("integers", "int64"), ("plain", "list")])
def test_a_function_that_returns_what_is_no_reward(tmp_path: Path, function: str, came: str) -> None:
    (tmp_path / "own.py").write_text(OWN)
    reward = build_reward(f"{tmp_path / 'own.py'}:{function}", "cpu")
    with pytest.raises(ValueError, match=rf"own.py:{function} returned .*{came}.*expected .*\(2,\)"):
        reward(torch.zeros(2, 3, 8, 8), ["a", "b"])


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    with pytest.raises(ValueError, match="unknown reward 'hps': expected clip, pickscore, aesthetic, pac"):
        build_reward("hps", "cpu")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        build_reward(f"{tmp_path}/other.py:f", "cpu")
    with pytest.raises(ValueError, match="cannot import no_such_package.rewards"):
        build_reward("no_such_package.rewards:f", "cpu")
    with pytest.raises(ValueError, match="has no function 'sharpness'"):
        build_reward(f"{tmp_path}/own.py:sharpness", "cpu")


@pytest.mark.parametrize("images, prompts, sentence", [
    (torch.zeros(2, 3, 8, 8), ["a"], "2, 3, 8, 8.*and 1 prompts"),
    (torch.zeros(2, 3, 8, 8), "ab", "a list of B prompts"),
    (torch.zeros(2, 8, 8, 3), ["a", "b"], r"images \(B, 3, H, W\)"),
    (torch.full((1, 3, 8, 8), -1.0), ["a"], r"must lie in \[0, 1\], these span \[-1, -1\]"),
    (torch.full((1, 3, 8, 8), 255, dtype=torch.uint8), ["a"], r"these span \[255, 255\]")])
def test_wrong_inputs(images: Tensor, prompts: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Reward("own", lambda x, p: x.mean(dim=(1, 2, 3)), "cpu")(images, prompts)


# ---- files that are missing, damaged, or do not fit ------------------------------------------------------

def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def test_missing_and_truncated_files(nano: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(FileNotFoundError, match="model.safetensors does not exist; weights= must name"):
        build_reward("clip", "cpu", weights=tmp_path_factory.mktemp("empty"))
    cut(nano / "clip" / "model.safetensors")
    for name in ("clip", "aesthetic"):                      # the aesthetic score stands on clip/
        with pytest.raises(ValueError, match="clip/model.safetensors is truncated or damaged"):
            build_reward(name, "cpu", weights=nano)
    cut(nano / "pickscore" / "open_clip_config.json")
    with pytest.raises(ValueError, match="open_clip_config.json is truncated or damaged"):
        build_reward("pickscore", "cpu", weights=nano)
    torch.save(AestheticHead(24).state_dict(), nano / LAION_HEAD)
    cut(nano / LAION_HEAD)
    with pytest.raises(ValueError, match="linearMSE.pth is truncated or damaged"):
        rewards.load_aesthetic_head(nano)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "it_ran"),)
    torch.save({"layers.0.weight": Code()}, tmp_path / LAION_HEAD)
    with pytest.raises(ValueError, match="was refused: .*could run code"):
        rewards.load_aesthetic_head(tmp_path)
    assert not (tmp_path / "it_ran").exists()


def test_tensors_that_do_not_fit(nano: Path) -> None:
    path = nano / "clip" / "model.safetensors"
    state = load_file(path)
    save_file({k: v for k, v in state.items() if k != "ln_final.bias"}, path)
    with pytest.raises(ValueError, match=r"differ, first ln_final.bias: expected \(32,\), found none such"):
        build_reward("clip", "cpu", weights=nano)
    save_file(state | {"extra": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"first extra: expected none such, found \(2,\)"):
        build_reward("clip", "cpu", weights=nano)
    save_file(state, path)
    rewards.save_aesthetic_head(nano / "aesthetic", AestheticHead(25, (12, 8, 6, 4)))
    with pytest.raises(ValueError, match="reads embeddings of 25 numbers, the tower in clip/ gives 24"):
        build_reward("aesthetic", "cpu", weights=nano)
    save_file({"weight": torch.zeros(1)}, nano / "aesthetic" / "aesthetic.safetensors")
    with pytest.raises(ValueError, match="is no aesthetic head"):
        build_reward("aesthetic", "cpu", weights=nano)


@pytest.mark.parametrize("tower, field, value, sentence", [
    ("text_config", "hidden_act", "relu", "hidden_act must be gelu, or quick_gelu, in both towers"),
    ("text_config", "eos_token_id", 7, "open_clip pools at the highest id, 49407"),
    ("vision_config", "hidden_size", 128, "does not fit its architecture")])
def test_hf_configs_that_cannot_be_served(hf: tuple[CLIPModel, Path], tmp_path: Path, tower: str, field: str,
                                          value: str | int, sentence: str) -> None:
    source, folder = hf[1] / "clip", tmp_path / "clip"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    config[tower][field] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=sentence):
        build_reward("clip", "cpu", weights=tmp_path)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json does not exist"):
        build_reward("clip", "cpu", weights=tmp_path)


def test_hf_preprocessor_config_gives_mean_and_std(hf: tuple[CLIPModel, Path], tmp_path: Path) -> None:
    (tmp_path / "clip").mkdir()
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "clip" / name).symlink_to(hf[1] / "clip" / name)
    found = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.2, 0.2, 0.2]}
    (tmp_path / "clip" / "preprocessor_config.json").write_text(json.dumps(found))
    picture = build_reward("clip", "cpu", weights=tmp_path).score.picture
    assert (picture["mean"], picture["std"]) == (found["image_mean"], found["image_std"])


def test_model_cfg_with_unknown_parts_is_refused() -> None:
    with pytest.raises(ValueError, match="model_cfg must hold embed_dim, vision_cfg and text_cfg"):
        build_clip({"model_cfg": NANO_CFG["model_cfg"] | {"init_logit_bias": -10}})
