"""Reward models of stage III: CLIP score, PickScore, Aesthetic score, and a reward from any Python function.

`build_reward(name, device)` gives a frozen module: (images, prompts) -> one number an image. It runs in this
process, without gradient, in fp32 whatever autocast surrounds it. Scales and pictures are those of Flow-GRPO
(arXiv 2505.05470), so that curves compare. The aesthetic model is LAION's head, as in Flow-GRPO; the paper
cites another one. Texts are cleaned as in OpenAI's CLIP (curly quotes, HTML), which transformers'
fast tokenizer leaves out.

    name       weights at full size           picture to tower size  score                      usual range
    clip       openai/clip-vit-large-patch14  floats, bilinear       exp(logit_scale)·cos / 30  0.5 .. 1.2
    pickscore  yuvalkirstain/PickScore_v1     grey levels, bicubic   exp(logit_scale)·cos / 26  0.7 .. 0.95
    aesthetic  the CLIP above + LAION's head  grey levels, bicubic   head(unit embedding)       1 .. 10
    path/to/file.py:function              untouched                 the function's own

The weights folder, for nano and for the published ones that tools/convert.py brings into it:

    clip/, pickscore/  open_clip's layout: open_clip_config.json, model.safetensors, and a tokenizer where
                       that config names one and it is not open_clip's own
    aesthetic/         aesthetic.safetensors; the tower in front of this head is that of clip/

Letters: B images, U different prompts, S text tokens, E embedding, H W picture, h w resized, T tower side.
"""
import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.transforms.functional import InterpolationMode, center_crop, crop, normalize, resize

from common import ROOT, Refused

MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD

ScoreFn = Callable[[Tensor, list[str]], Tensor]             # images (B, 3, H, W), B prompts -> (B,)


# ----------------------------------------------------------------------------- the scores

def grey_levels(x: Tensor) -> Tensor:
    """Whole grey levels 0..255, kept as floats since not every device can resize bytes."""
    return x.round().clamp(0, 255)


def preprocess(images: Tensor, size: int, mean: tuple = MEAN, std: tuple = STD,
               like_pil: bool = False) -> Tensor:
    """What the image tower sees: shortest side to size, centre crop, normalised.

    images    (B, 3, H, W) fp32 in [0, 1]
    like_pil  False: floats, bilinear, the crop of torchvision (clip)
              True:  grey levels, bicubic, the crop of Hugging Face's processor on PIL (pickscore, aesthetic)
    Returns (B, 3, T, T) fp32.
    """
    if like_pil:
        # the shorter of the two becomes size
        H, W = images.shape[-2:]
        h = int(size * max(H, W) / W)
        w = int(size * max(H, W) / H)
        # PIL resizes rows, stores whole grey levels, then resizes columns: bicubic overshoot is cut twice
        bicubic = partial(resize, interpolation=InterpolationMode.BICUBIC)
        x = bicubic(grey_levels(images * 255), (H, w))                              # (B, 3, H, w)
        x = bicubic(grey_levels(x), (h, w))                                         # (B, 3, h, w)
        x = grey_levels(x) / 255                                                    # (B, 3, h, w)
        # at some odd margins torchvision's crop is one pixel off
        x = crop(x, (h - size) // 2, (w - size) // 2, size, size)                   # (B, 3, T, T)
    else:
        x = center_crop(resize(images, size), size)                                 # (B, 3, T, T)
    # by the statistics of the tower's training pictures
    return normalize(x, mean, std)                                                  # (B, 3, T, T)


def embed_images(visual: nn.Module, images: Tensor, like_pil: bool = False) -> Tensor:
    """Unit embeddings (B, E) of images (B, 3, H, W), by an image tower that knows its size and statistics."""
    size, mean, std = visual.image_size[0], visual.image_mean, visual.image_std
    chunks = [visual(preprocess(chunk, size, mean, std, like_pil)) for chunk in images.split(64)]
    return F.normalize(torch.cat(chunks), dim=-1)                                   # (B, E)


class ClipScore(nn.Module):
    """exp(logit_scale) · cos(image, prompt) / divisor: CLIP score and PickScore."""

    def __init__(self, folder: Path, divisor: float, like_pil: bool) -> None:
        super().__init__()
        self.clip, self.encode = load_clip(folder)
        self.divisor, self.like_pil = divisor, like_pil

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        # a group of pictures repeats one prompt: each text is read once
        texts = list(dict.fromkeys(prompts))
        ids = self.encode(texts).to(images.device)                                  # (U, S)
        text = F.normalize(self.clip.encode_text(ids), dim=-1)                      # (U, E)
        text = text[[texts.index(prompt) for prompt in prompts]]                    # (B, E)
        image = embed_images(self.clip.visual, images, self.like_pil)               # (B, E)
        cosine = (image * text).sum(-1)                                             # (B,)
        return self.clip.logit_scale.exp() * cosine / self.divisor                  # (B,)


class AestheticHead(nn.Module):
    """LAION's head: five linear layers and no activation, so one affine map once dropout is off."""

    def __init__(self, embed_dim: int, widths: tuple[int, ...] = (1024, 128, 64, 16)) -> None:
        super().__init__()
        a, b, c, d = widths
        # the published names are layers.0, 2, 4, 6, 7
        self.layers = nn.Sequential(
            nn.Linear(embed_dim, a),
            nn.Dropout(0.2),
            nn.Linear(a, b),
            nn.Dropout(0.2),
            nn.Linear(b, c),
            nn.Dropout(0.1),
            nn.Linear(c, d),
            nn.Linear(d, 1))

    def forward(self, embedding: Tensor) -> Tensor:
        return self.layers(embedding).squeeze(-1)                                   # (B, E) -> (B,)


class AestheticScore(nn.Module):
    """The head on the unit embedding of CLIP's image tower; the prompt plays no part."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.visual = load_clip(folder / "clip")[0].visual
        # the head's widths are read off its tensors
        state = load_file(folder / "aesthetic" / "aesthetic.safetensors")
        widths = [len(state[f"layers.{i}.bias"]) for i in (0, 2, 4, 6)]
        with torch.random.fork_rng(devices=[]):
            self.head = AestheticHead(state["layers.0.weight"].shape[1], tuple(widths))
        self.head.load_state_dict(state)

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        image = embed_images(self.visual, images, like_pil=True)                    # (B, E)
        return self.head(image)                                                     # (B,)


class Reward(nn.Module):
    """A frozen reward: checks what goes in and what comes out."""

    def __init__(self, name: str, score: ScoreFn, device: str | torch.device) -> None:
        super().__init__()
        self.name = name
        self.score = score
        self.device = torch.device(device)
        self.eval().requires_grad_(False).to(self.device)

    @torch.no_grad()
    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        B = len(images)
        assert images.shape[1] == 3 and len(prompts) == B, f"{tuple(images.shape)}, {len(prompts)} prompts"
        # a NaN is no reason to stop: what is scored NaN is masked by the caller
        low, high = images.aminmax()
        assert not (low < -1e-3 or high > 1 + 1e-3), f"expected images in [0, 1], got [{low:g}, {high:g}]"
        # its own copy: what a function does to its pictures and prompts, no other reward sees
        images = images.to(self.device, torch.float32, copy=True)                   # (B, 3, H, W)
        # in fp32: in bf16 the pictures of a group would tie
        with torch.autocast(self.device.type, enabled=False):
            scores = self.score(images, list(prompts))                              # (B,)
        scores = torch.as_tensor(scores, dtype=torch.float32, device=self.device)   # (B,)
        if scores.shape != (B,):
            raise Refused(f"reward {self.name} returned numbers of shape {tuple(scores.shape)}, "
                          f"expected one number per image, ({B},)")
        return scores


# ----------------------------------------------------------------------------- by name

def build_reward(name: str, device: str | torch.device, weights: str | Path | None = None) -> Reward:
    """The reward called name: f(images (B, 3, H, W) in [0, 1], prompts: list of B) -> (B,) fp32 on device.

    name     "clip", "pickscore", "aesthetic" or "path/to/file.py:function"
    weights  folder laid out as the head of this file says; None: nano's
    """
    folder = ROOT / "weights" / "nano" if weights is None else Path(weights)
    if ".py:" in name:
        score = load_function(name)
    elif name not in ("clip", "pickscore", "aesthetic") or not (folder / name).is_dir():
        raise Refused(f"no reward at {folder / name}: expected file.py:function, or clip, pickscore or "
                      "aesthetic, which `python tools/convert.py rewards` fetches")
    # the divisors bring the logits near 1
    elif name == "clip":
        score = ClipScore(folder / "clip", 30.0, like_pil=False)
    elif name == "pickscore":
        score = ClipScore(folder / "pickscore", 26.0, like_pil=True)
    else:
        score = AestheticScore(folder)
    return Reward(name, score, device)


def load_function(name: str) -> ScoreFn:
    """The function that path/to/file.py:function names. What lies beside the file can be imported, but where
    a module of this project has its name."""
    file, _, function = name.rpartition(":")
    # of a link what it leads to
    path = Path(file).resolve()
    sys.path.append(str(path.parent))
    # run once for all its functions, under a name that no library has
    module_name = f"reward {path}"
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, path)
        sys.modules[module_name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module_name])
    return getattr(sys.modules[module_name], function)


# ----------------------------------------------------------------------------- weights

def load_clip(folder: Path) -> tuple[CLIP, Callable]:
    """The CLIP of a folder, and its tokenizer (U texts -> (U, S)). What the folder may say of rounding,
    interpolation and crop is not read: they belong to the reward."""
    name = f"local-dir:{folder}"
    # building draws initial values, which must not move the caller's random numbers
    with torch.random.fork_rng(devices=[]):
        clip = open_clip.create_model(name, require_pretrained=True)
    # a tokenizer of transformers' may come as code, and the folder's own config could ask for it to be run
    words = open_clip.get_model_config(name)["text_cfg"]
    no_code = {"trust_remote_code": False} if words.get("hf_tokenizer_name") else {}
    return clip, open_clip.get_tokenizer(name, **no_code)
