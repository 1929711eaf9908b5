"""Reward models of stage III: CLIP score, PickScore, Aesthetic score, and a reward from any Python function.

`build_reward(name, device)` gives a frozen module: (images, prompts) -> one number an image. It runs in this
process, without gradient, in fp32 whatever autocast surrounds it. Scales and pictures are those of Flow-GRPO
(arXiv 2505.05470), so that curves compare:

    name       weights at full size           picture to tower size  score                      usual range
    clip       openai/clip-vit-large-patch14  floats, bilinear       exp(logit_scale)·cos / 30  0.5 .. 1.2
    pickscore  yuvalkirstain/PickScore_v1     grey levels, bicubic   exp(logit_scale)·cos / 26  0.7 .. 0.95
    aesthetic  the CLIP above + LAION's head  grey levels, bicubic   head(unit embedding)       1 .. 10
    package.module:function, path/file.py:function    untouched      the function's own

The weights folder, the same for nano and full size:

    clip/, pickscore/  model.safetensors beside open_clip_config.json (the layout open_clip publishes) or
                       config.json (Hugging Face's CLIPModel); the names of the tensors tell which of the two.
                       tokenizer.json: a vocabulary of its own; without it, open_clip's BPE.
    aesthetic/         aesthetic.safetensors, or LAION's file under its own name; the tower is that of clip/

Of a folder's preprocessing only mean and std are read: rounding, interpolation and crop belong to the reward.
The scores are the short part of this file; the longer one reads weights in their published layouts.

Letters: B images, U different prompts, S text tokens, E embedding, H W picture, h w resized, T tower side.
"""
import importlib
import importlib.util
import json
import pickle
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import CLIPConfig

NANO_WEIGHTS = Path(__file__).resolve().parent / "weights" / "nano"
MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
BPE_VOCAB_SIZE = 49408                                      # of open_clip's own tokenizer
LAION_HEAD = "sac+logos+ava1-l14-linearMSE.pth"
DIVISORS = {"clip": 30.0, "pickscore": 26.0}                # bring the logits near 1, see the table
FETCH = {                                                   # how the full-size weights come into a folder
    "clip": "hf download openai/clip-vit-large-patch14 config.json preprocessor_config.json "
            "model.safetensors --local-dir {folder}",
    "pickscore": "hf download yuvalkirstain/PickScore_v1 config.json preprocessor_config.json "
                 "model.safetensors --local-dir {folder}",
    "aesthetic": "curl -L --create-dirs -O --output-dir {folder} https://github.com/christophschuhmann/"
                 f"improved-aesthetic-predictor/raw/main/{LAION_HEAD}"}

ScoreFn = Callable[[Tensor, list[str]], Tensor]             # images (B, 3, H, W), B prompts -> (B,)
EncodeFn = Callable[[list[str]], Tensor]                    # U texts -> (U, S)


# ---- the scores ------------------------------------------------------------------------------------------

def grey_levels(x: Tensor) -> Tensor:
    """Whole grey levels 0..255, kept as floats since not every device can resize bytes."""
    return x.round().clamp(0, 255)


def resize(x: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Antialiased resize of (B, 3, H, W); a picture that already has the size passes untouched."""
    return x if x.shape[-2:] == size else F.interpolate(x, size, mode=mode, antialias=True)


def preprocess(images: Tensor, size: int, mean: tuple = MEAN, std: tuple = STD,
               like_pil: bool = False) -> Tensor:
    """What the image tower sees: shortest side to size, centre crop, normalised.

    images    (B, 3, H, W) fp32 in [0, 1]
    like_pil  False: floats, bilinear, the crop of torchvision (clip)
              True:  grey levels, bicubic, the crop of Hugging Face's processor on PIL (pickscore, aesthetic)
    Returns (B, 3, T, T) fp32.
    """
    H, W = images.shape[-2:]
    h, w = int(size * max(H, W) / W), int(size * max(H, W) / H)  # the shorter of the two is size
    if like_pil:
        # PIL resizes rows, stores whole grey levels, then resizes columns: bicubic overshoot is cut twice
        x = resize(grey_levels(images * 255), (H, w), "bicubic")                    # (B, 3, H, w)
        x = resize(grey_levels(x), (h, w), "bicubic")                               # (B, 3, h, w)
        x = grey_levels(x) / 255                                                    # (B, 3, h, w)
        top, left = (h - size) // 2, (w - size) // 2
    else:
        x = resize(images, (h, w), "bilinear")                                      # (B, 3, h, w)
        top, left = round((h - size) / 2), round((w - size) / 2)  # one pixel off PIL's at some odd margins
    x = x[..., top:top + size, left:left + size]                                    # (B, 3, T, T)
    return (x - x.new_tensor(mean).view(3, 1, 1)) / x.new_tensor(std).view(3, 1, 1)  # (B, 3, T, T)


def embed_images(visual: nn.Module, images: Tensor, picture: dict, batch_size: int) -> Tensor:
    """Unit embeddings (B, E) of images (B, 3, H, W); picture holds the arguments of preprocess."""
    chunks = [visual(preprocess(x, **picture)) for x in images.split(batch_size)]
    return F.normalize(torch.cat(chunks), dim=-1)                                   # (B, E)


class ClipScore(nn.Module):
    """exp(logit_scale) · cos(image, prompt) / divisor: CLIP score and PickScore."""

    def __init__(self, folder: Path, divisor: float, like_pil: bool, batch_size: int) -> None:
        super().__init__()
        self.clip, self.encode, picture = load_clip(folder)
        self.picture = picture | {"like_pil": like_pil}
        self.divisor, self.batch_size = divisor, batch_size

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        row = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}  # a group repeats one prompt
        ids = self.encode(list(row)).to(images.device)                              # (U, S)
        text = torch.cat([self.clip.encode_text(x) for x in ids.split(self.batch_size)])  # (U, E)
        text = F.normalize(text, dim=-1)[[row[prompt] for prompt in prompts]]       # (B, E)
        image = embed_images(self.clip.visual, images, self.picture, self.batch_size)  # (B, E)
        return self.clip.logit_scale.exp() * (image * text).sum(-1) / self.divisor  # (B,)


class AestheticHead(nn.Module):
    """LAION's head: five linear layers and no activation, so one affine map once dropout is off."""

    def __init__(self, embed_dim: int, widths: tuple[int, int, int, int] = (1024, 128, 64, 16)) -> None:
        super().__init__()
        a, b, c, d = widths
        self.layers = nn.Sequential(                        # the published names are 0, 2, 4, 6, 7
            nn.Linear(embed_dim, a), nn.Dropout(0.2), nn.Linear(a, b), nn.Dropout(0.2),
            nn.Linear(b, c), nn.Dropout(0.1), nn.Linear(c, d), nn.Linear(d, 1))

    def forward(self, embedding: Tensor) -> Tensor:
        return self.layers(embedding).squeeze(-1)                                   # (B, E) -> (B,)


class AestheticScore(nn.Module):
    """The head on the unit embedding of CLIP's image tower; the prompt plays no part."""

    def __init__(self, folder: Path, batch_size: int) -> None:
        super().__init__()
        clip, _, picture = load_clip(folder / "clip")
        self.visual, self.head = clip.visual, load_aesthetic_head(folder / "aesthetic")
        self.picture, self.batch_size = picture | {"like_pil": True}, batch_size
        needs, gets = self.head.layers[0].in_features, clip.visual.output_dim
        if needs != gets:
            raise ValueError(f"the aesthetic head in {folder} reads embeddings of {needs} numbers, the tower "
                             f"in clip/ gives {gets}: put the CLIP that the head was trained on into clip/")

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.head(embed_images(self.visual, images, self.picture, self.batch_size))  # (B,)


class Reward(nn.Module):
    """A frozen reward: checks what goes in and what comes out. NaN passes: the caller masks such groups."""

    def __init__(self, name: str, score: ScoreFn, device: str | torch.device) -> None:
        super().__init__()
        self.name, self.score, self.device = name, score, torch.device(device)
        self.eval().requires_grad_(False).to(self.device)

    @torch.no_grad()
    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        B = len(images)
        if images.ndim != 4 or images.shape[1] != 3 or not 0 < B == len(prompts) or isinstance(prompts, str):
            raise ValueError(f"reward {self.name}: expected images (B, 3, H, W) and a list of B prompts, "
                             f"got images {tuple(images.shape)} and {len(prompts)} prompts")
        low, high = (x.item() for x in images.aminmax())
        if low < -1e-3 or high > 1 + 1e-3:
            raise ValueError(f"reward {self.name}: images must lie in [0, 1], these span [{low:g}, {high:g}]")
        with torch.autocast(self.device.type, enabled=False):
            scores = self.score(images.to(self.device, torch.float32), prompts)     # (B,)
        if not isinstance(scores, Tensor) or scores.shape != (B,) or scores.dtype != torch.float32:
            came = (type(scores).__name__, *(getattr(scores, of, "") for of in ("dtype", "shape")))
            raise ValueError(f"reward {self.name} returned {came}, expected one fp32 per image, ({B},)")
        return scores.to(self.device)                                               # (B,)


def build_reward(name: str, device: str | torch.device, *, weights: str | Path | None = None,
                 batch_size: int = 64) -> Reward:
    """The reward called name: f(images (B, 3, H, W) in [0, 1], prompts: list of B) -> (B,) fp32 on device.

    name        "clip", "pickscore", "aesthetic", "package.module:function" or "path/to/file.py:function"
    weights     folder laid out as the head of this file says; None: weights/nano beside this file
    batch_size  images that go through the tower at a time
    Raises ValueError or FileNotFoundError: unknown name; weights that are missing, damaged or do not fit.
    """
    folder = NANO_WEIGHTS if weights is None else Path(weights)
    if name in DIVISORS:
        score = ClipScore(folder / name, DIVISORS[name], like_pil=name == "pickscore", batch_size=batch_size)
    elif name == "aesthetic":
        score = AestheticScore(folder, batch_size)
    elif ":" in name:
        score = load_function(name)
    else:
        raise ValueError(f"unknown reward {name!r}: expected clip, pickscore, aesthetic, "
                         "package.module:function or path/to/file.py:function")
    return Reward(name, score, device)


def load_function(name: str) -> ScoreFn:
    """The function that package.module:function or path/to/file.py:function names."""
    where, _, attribute = name.rpartition(":")
    if where.endswith(".py"):
        if not Path(where).is_file():
            raise FileNotFoundError(f"reward {name!r}: there is no file {where}")
        spec = importlib.util.spec_from_file_location(f"reward_{Path(where).stem}", where)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module                     # dataclasses look their module up there
        spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(where)
        except ModuleNotFoundError as error:
            raise ValueError(f"reward {name!r}: cannot import {where} ({error})") from error
    if not hasattr(module, attribute):
        raise ValueError(f"reward {name!r}: {where} has no function {attribute!r}")
    return getattr(module, attribute)


# ---- text ------------------------------------------------------------------------------------------------

def text_encoder(tokenizer: Tokenizer | None, context_length: int, vocab_size: int) -> EncodeFn:
    """A function from U texts to ids (U, S): S = context_length, padded with 0.

    tokenizer  None for open_clip's BPE, else one whose post-processor ends each text with its end token.
    Raises ValueError if the tokenizer does not suit the model.
    """
    if tokenizer is None:
        if vocab_size != BPE_VOCAB_SIZE:
            raise ValueError(f"text_cfg has vocab_size {vocab_size}, open_clip's BPE has {BPE_VOCAB_SIZE}: "
                             "put tokenizer.json, the model's own vocabulary, beside its weights")
        return partial(open_clip.tokenize, context_length=context_length)

    def tokens(text: str) -> list[int]:                     # without padding, which the file may ask for
        found = tokenizer.encode(text)
        return [i for i, real in zip(found.ids, found.attention_mask, strict=True) if real]
    # open_clip pools a text at its highest id: another end token would be passed over in silence
    last, highest = tokens("")[-1:], max(tokenizer.get_vocab().values())
    if last != [highest] or highest >= vocab_size:
        raise ValueError(f"tokenizer.json ends a text with {last}, its highest id is {highest}, text_cfg has "
                         f"vocab_size {vocab_size}: a text must end with the highest id, below vocab_size")

    def encode(texts: list[str]) -> Tensor:
        ids = torch.zeros(len(texts), context_length, dtype=torch.long)             # (U, S)
        for row, text in zip(ids, texts, strict=True):
            found = tokens(text)[:context_length]
            row[:len(found)] = torch.tensor(found)
            row[len(found) - 1] = highest                   # a text that was cut keeps its end token
        return ids
    return encode


# ---- weights ---------------------------------------------------------------------------------------------

def build_clip(cfg: dict) -> CLIP:
    """An untrained open_clip CLIP from the content of open_clip_config.json, of which it reads model_cfg."""
    model_cfg, must = cfg.get("model_cfg", {}), {"embed_dim", "vision_cfg", "text_cfg"}
    if not must <= set(model_cfg) <= must | {"quick_gelu"}:
        raise ValueError("model_cfg must hold embed_dim, vision_cfg and text_cfg, and may hold quick_gelu; "
                         f"it holds {sorted(model_cfg)}")
    return CLIP(**model_cfg)


def save_reward(folder: str | Path, model: CLIP, cfg: dict, tokenizer: Tokenizer | None = None) -> None:
    """Writes a clip/ or pickscore/ folder that build_reward reads.

    cfg  {"model_cfg": what build_clip took, "preprocess_cfg": {"mean": 3 numbers, "std": 3 numbers}}
         without preprocess_cfg: OpenAI's mean and std
    """
    text_encoder(tokenizer, model.context_length, model.vocab_size)  # what could not be read is not written
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(cfg, indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save(str(folder / "tokenizer.json"))


def save_aesthetic_head(folder: str | Path, head: AestheticHead) -> None:
    """Writes the aesthetic/ folder; the tower that the head reads goes to clip/ beside it."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(head.state_dict(), Path(folder) / "aesthetic.safetensors")


def load_clip(folder: Path) -> tuple[CLIP, EncodeFn, dict]:
    """The CLIP of a folder in either layout, its text encoder, and size, mean and std for preprocess."""
    path, own = folder / "model.safetensors", folder / "tokenizer.json"
    state = read_tensors(path)
    # by the tensors, not by the config: repositories that serve both libraries carry both configs
    if any(key.startswith("vision_model.") for key in state):
        cfg, state = hf_config_to_open_clip(folder), hf_clip_to_open_clip(state)
    else:
        cfg = read_json(folder / "open_clip_config.json")
    with torch.random.fork_rng(devices=[]):                 # leave the caller's random state alone
        clip = build_clip(cfg)
    load_strict(clip, state, path)
    encode = text_encoder(Tokenizer.from_file(str(own)) if own.is_file() else None,
                          clip.context_length, clip.vocab_size)
    (size, width), picture = clip.visual.image_size, cfg.get("preprocess_cfg", {})
    if size != width:
        raise ValueError(f"{folder}: image_size is {size} x {width}, the rewards crop square pictures")
    return clip, encode, {"size": size, "mean": picture.get("mean", MEAN), "std": picture.get("std", STD)}


def load_aesthetic_head(folder: Path) -> AestheticHead:
    """The head of an aesthetic/ folder, its widths read off the tensors."""
    path = folder / "aesthetic.safetensors"
    if not path.is_file() and (folder / LAION_HEAD).is_file():
        path = folder / LAION_HEAD
    state = read_tensors(path)
    keys = {f"layers.{i}.{kind}" for i in (0, 2, 4, 6, 7) for kind in ("weight", "bias")}
    if set(state) != keys:
        raise ValueError(f"{path} is no aesthetic head: expected weight and bias of layers.0, 2, 4, 6 and 7, "
                         f"found {sorted(state)[:4]} ...")
    widths = tuple(state[f"layers.{i}.weight"].shape[0] for i in (0, 2, 4, 6))
    with torch.random.fork_rng(devices=[]):
        head = AestheticHead(state["layers.0.weight"].shape[1], widths)
    load_strict(head, state, path)
    return head


def load_strict(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Fills every tensor of the model and leaves none of the file over, or says which does not fit."""
    want = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    have = {key: tuple(value.shape) for key, value in state.items()}
    wrong = sorted(key for key in want | have if want.get(key) != have.get(key))
    if wrong:
        key = wrong[0]
        raise ValueError(f"{path} does not fit its architecture: {len(wrong)} tensors differ, first {key}: "
                         f"expected {want.get(key, 'none such')}, found {have.get(key, 'none such')}")
    model.load_state_dict(state)


def existing(path: Path) -> Path:
    if not path.is_file():
        how = FETCH.get(path.parent.name, "").format(folder=path.parent)
        raise FileNotFoundError(f"reward weights: {path} does not exist; weights= must name a folder with "
                                "clip/, pickscore/ and aesthetic/ (which needs clip/ too), "
                                "laid out as the head of rewards.py says"
                                + (f"; the published ones come by: {how}" if how else ""))
    return path


def read_json(path: Path) -> dict:
    try:
        return json.loads(existing(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is truncated or damaged ({error}): fetch or save it again") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors, or of a .pth: a pickle that holds anything but plain data is refused."""
    try:
        if existing(path).suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} was refused: it is damaged, or holds more than tensors and could run code; "
                         "expected a state_dict written by torch.save") from error
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is truncated or damaged ({error}): fetch or save it again") from error


# ---- Hugging Face's CLIPModel in open_clip's words -------------------------------------------------------

def hf_config_to_open_clip(folder: Path) -> dict:
    """What open_clip_config.json would say, from the config.json of a CLIPModel."""
    config = CLIPConfig(**read_json(folder / "config.json"))  # has the defaults that older files omit
    text, vision = config.text_config, config.vision_config
    acts = {text.hidden_act, vision.hidden_act}
    if acts not in ({"gelu"}, {"quick_gelu"}):
        raise ValueError(f"{folder}/config.json: hidden_act must be gelu, or quick_gelu, in both towers; "
                         f"it is {sorted(acts)}")
    if text.eos_token_id not in (2, text.vocab_size - 1):   # 2 in older files: pool at the highest id
        raise ValueError(f"{folder}/config.json: eos_token_id is {text.eos_token_id}, but open_clip pools at "
                         f"the highest id, {text.vocab_size - 1}")

    def tower(c: CLIPConfig) -> dict:
        return {"width": c.hidden_size, "layers": c.num_hidden_layers,
                "mlp_ratio": c.intermediate_size / c.hidden_size, "norm_kwargs": {"eps": c.layer_norm_eps}}
    cfg = {"model_cfg": {
        "embed_dim": config.projection_dim,
        "quick_gelu": acts == {"quick_gelu"},               # OpenAI's; LAION's and PickScore have gelu
        "vision_cfg": tower(vision) | {"image_size": vision.image_size, "patch_size": vision.patch_size,
                                       "head_width": vision.hidden_size // vision.num_attention_heads},
        "text_cfg": tower(text) | {"context_length": text.max_position_embeddings,
                                   "vocab_size": text.vocab_size, "heads": text.num_attention_heads}}}
    if (folder / "preprocessor_config.json").is_file():
        found = read_json(folder / "preprocessor_config.json")
        cfg["preprocess_cfg"] = {"mean": found["image_mean"], "std": found["image_std"]}
    return cfg


HF_NAMES = {
    "vision_model.encoder.layers.": "visual.transformer.resblocks.",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.": "visual.conv1.",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.": "visual.ln_pre.",         # sic
    "vision_model.post_layernorm.": "visual.ln_post.",
    "visual_projection.weight": "visual.proj",
    "text_model.encoder.layers.": "transformer.resblocks.",
    "text_model.embeddings.token_embedding.": "token_embedding.",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.": "ln_final.",
    "text_projection.weight": "text_projection",
    ".self_attn.q_proj.": ".attn.in_proj_", ".self_attn.out_proj.": ".attn.out_proj.",
    ".layer_norm1.": ".ln_1.", ".layer_norm2.": ".ln_2.",
    ".mlp.fc1.": ".mlp.c_fc.", ".mlp.fc2.": ".mlp.c_proj.",
}


def hf_clip_to_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """CLIPModel's tensors under open_clip's names: q, k, v stacked in one, both projections transposed."""
    out = {}
    for key, value in state.items():
        # position_ids is a constant in older files; k and v go with q
        if key.endswith(".position_ids") or ".k_proj." in key or ".v_proj." in key:
            continue
        if ".q_proj." in key:                               # a lost k or v shows as a wrong shape
            parts = [key.replace(".q_proj.", f".{letter}_proj.") for letter in "qkv"]
            value = torch.cat([state[part] for part in parts if part in state])
        if key in ("visual_projection.weight", "text_projection.weight"):
            value = value.T
        for old, new in HF_NAMES.items():
            key = key.replace(old, new)
        out[key] = value.contiguous()
    return out
