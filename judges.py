"""The learned judges of the full-size benchmarks, frozen: what is in a picture, of which colour, yes or no.

    Detector    GenEval: Mask2Former of transformers, with the post-processing of mmdet, which GenEval runs on
    ColorNamer  GenEval: CLIP without training, on crops whose background is grey
    Answerer    DPG-Bench: a visual-question-answering model of transformers that writes its answer

Each loads from a folder, or from a repository of the Hugging Face hub. Two of the three are not the official
ones (those are mmdet's own Mask2Former, and mPLUG), so a score names its judge.
Letters: P padded, h w resized, H W picture, Q queries of the detector, E embedding.
"""
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from common import fingerprint
from scoring import COLORS, MIN_SCORE, NAMES, Found

SHORT, LONG = 800, 1333                                     # of the picture that the detector sees, pixels
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)      # ImageNet's, of levels 0 .. 255
TOP = 100                                                   # pairs of query and class that are looked at
RENAMED = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}",
             "a photo of a {color} object")
GREY = (0x99,) * 3                                          # in place of what is not the object


def model_folder(source: str, flag: str) -> Path:
    """The folder of a judge's weights: `source` itself, or what the hub has under that name, fetched once."""
    from huggingface_hub import snapshot_download
    folder = Path(source)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors", "*.txt"]))
        except (OSError, ValueError) as error:
            raise FileNotFoundError(f"expected {flag} to be a folder with config.json and model.safetensors, "
                                    f"or a repository of the hub; {source} is no folder and cannot be "
                                    f"fetched ({type(error).__name__})") from error
    for name in ("config.json", "*.safetensors"):
        if not list(folder.glob(name)) and not (flag == "--clip" and name == "config.json"):
            raise FileNotFoundError(f"expected {flag} to name a model with weights, "
                                    f"found no {name} in {source}")
    return folder


def load_pretrained(auto: type, folder: Path, flag: str, device: torch.device) -> torch.nn.Module:
    """A model of transformers, every tensor of which the file must have."""
    model, info = auto.from_pretrained(folder, local_files_only=True, output_loading_info=True,
                                       dtype=torch.float32)
    if lacking := sorted(map(str, (*info["missing_keys"], *info["mismatched_keys"]))):
        raise ValueError(f"the weights in {folder} ({flag}) lack {len(lacking)} tensors, or have them in "
                         f"other shapes: {', '.join(lacking[:3])}")
    return model.eval().requires_grad_(False).to(device)


def run_lengths(mask: np.ndarray) -> dict:
    """A mask (H, W) in COCO's plain form: lengths of runs down the columns, the first one of zeros."""
    flat = mask.T.ravel().astype(bool)
    ends = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff([0, *ends, len(flat)]).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}


def mask_of(runs: dict) -> np.ndarray:
    """The mask (H, W) of run lengths."""
    H, W = runs["size"]
    values = np.arange(len(runs["counts"])) % 2 == 1
    return np.repeat(values, runs["counts"]).reshape(W, H).T                            # (H, W)


class Detector:
    """Mask2Former for COCO's 80 classes. Differs from GenEval: the weights are Facebook's, not mmdet's."""

    def __init__(self, source: str, device: torch.device) -> None:
        from transformers import Mask2FormerForUniversalSegmentation
        folder = model_folder(source, "--detector")
        self.model = load_pretrained(Mask2FormerForUniversalSegmentation, folder, "--detector", device)
        labels = self.model.config.id2label
        names = tuple(RENAMED.get(labels[i], labels[i]) for i in sorted(labels))
        if names != NAMES:
            raise ValueError(f"expected --detector to know COCO's 80 classes in their order, {source} knows "
                             f"{len(names)}: {', '.join(names[:3])} ...")
        self.name = f"{source} sha256:{fingerprint(self.model)[:16]}"

    def prepare(self, image: Image.Image) -> tuple[Tensor, tuple[int, int]]:
        """The picture as the network sees it, (1, 3, P, P), padded right and below; h, w without padding."""
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()            # (1, 3, H, W)
        H, W = x.shape[-2:]
        scale = min(LONG / max(H, W), SHORT / min(H, W))
        h, w = int(H * scale + 0.5), int(W * scale + 0.5)
        x = F.interpolate(x, (h, w), mode="bilinear", align_corners=False).round()      # (1, 3, h, w)
        x = (x - x.new_tensor(MEAN)[:, None, None]) / x.new_tensor(STD)[:, None, None]
        return F.pad(x, (0, -w % 32, 0, -h % 32)), (h, w)                               # (1, 3, P, P)

    @torch.no_grad()
    def __call__(self, image: Image.Image) -> list[Found]:
        """All objects of an RGB picture with a score above GenEval's lowest threshold, best first.

        score = probability of the class times the mean of the mask's sigmoid inside the mask
        box   = the mask's extent, one beyond it on the right and below
        """
        x, (h, w) = self.prepare(image)
        out = self.model(pixel_values=x.to(self.model.device))
        probs = out.class_queries_logits[0].softmax(-1)[:, :-1]                         # (Q, 80)
        best, index = probs.flatten().topk(min(TOP, probs.numel()))                     # (TOP,)
        found = []
        for prob, at in zip(best.tolist(), index.tolist()):
            query, label = divmod(at, len(NAMES))
            if prob <= MIN_SCORE:                           # its score can only be lower: leave the mask be
                break
            mask = out.masks_queries_logits[:, query:query + 1]                         # (1, 1, P / 4, P / 4)
            mask = F.interpolate(mask, x.shape[-2:], mode="bilinear")[..., :h, :w]      # (1, 1, h, w)
            mask = F.interpolate(mask, image.size[::-1], mode="bilinear")[0, 0]         # (H, W)
            inside = mask > 0
            score = prob * ((mask.sigmoid() * inside).sum() / (inside.sum() + 1e-6)).item()
            if score > MIN_SCORE:
                rows, columns = (inside.any(axis).nonzero().flatten().tolist() for axis in (1, 0))
                box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
                found.append(Found(NAMES[label], score, tuple(map(float, box)),
                                   run_lengths(inside.cpu().numpy())))
        return sorted(found, key=lambda thing: -thing.score)


class ColorNamer:
    """CLIP picks one of GenEval's ten colours for a crop, by the mean of three sentences about each."""

    def __init__(self, source: str, device: torch.device) -> None:
        import open_clip
        from rewards import load_clip
        self.clip, self.encode, picture = load_clip(model_folder(source, "--clip"))
        self.clip.eval().requires_grad_(False).to(device)
        self.look = open_clip.image_transform(picture["size"], is_train=False, mean=tuple(picture["mean"]),
                                              std=tuple(picture["std"]))
        self.device, self.said = device, {}
        self.name = f"{source} sha256:{fingerprint(self.clip)[:16]}"

    def sentences(self, name: str) -> Tensor:
        """A unit embedding for each colour of a thing called `name`, (10, E)."""
        if name not in self.said:
            texts = [t.format(color=color, name=name) for color in COLORS for t in TEMPLATES]
            text = self.clip.encode_text(self.encode(texts).to(self.device))            # (30, E)
            text = F.normalize(text, dim=-1)
            self.said[name] = F.normalize(text.view(len(COLORS), len(TEMPLATES), -1).mean(1), dim=-1)
        return self.said[name]                                                          # (10, E)

    @torch.no_grad()
    def __call__(self, image: Image.Image, found: list[Found]) -> list[Found]:
        """The objects of an RGB picture with their colours."""
        if not found:
            return []
        crops = torch.stack([self.look(crop(image, thing)) for thing in found])         # (B, 3, T, T)
        seen = F.normalize(self.clip.encode_image(crops.to(self.device)), dim=-1)       # (B, E)
        best = [(row @ self.sentences(thing.name).T).argmax().item() for row, thing in zip(seen, found)]
        return [replace(thing, color=COLORS[i]) for thing, i in zip(found, best)]


def crop(image: Image.Image, thing: Found) -> Image.Image:
    """The object's box, all outside its mask grey; PIL rounds a box to whole pixels, here to one at least."""
    if thing.mask is not None:
        if list(image.size[::-1]) != list(thing.mask["size"]):
            raise ValueError(f"the mask of a {thing.name} is of {thing.mask['size']} pixels, its picture of "
                             f"{list(image.size[::-1])}: these are other pictures' detections")
        image = Image.composite(image, Image.new("RGB", image.size, GREY),
                                Image.fromarray(mask_of(thing.mask)))
    left, top, right, bottom = map(round, thing.box)
    return image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))


class Answerer:
    """A model of transformers that answers questions about a picture in words, as BLIP does."""

    def __init__(self, source: str, device: torch.device) -> None:
        from transformers import AutoModelForVisualQuestionAnswering, AutoProcessor
        folder = model_folder(source, "--vqa")
        self.model = load_pretrained(AutoModelForVisualQuestionAnswering, folder, "--vqa", device)
        if not self.model.can_generate():
            raise ValueError(f"expected --vqa to write its answers, as BLIP does; {source} picks from a list")
        self.processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        self.name = f"{source} sha256:{fingerprint(self.model)[:16]}"

    @torch.no_grad()
    def __call__(self, image: Image.Image, questions: list[str]) -> list[str]:
        """The answers in lower case, without a full stop."""
        inputs = self.processor(images=[image] * len(questions), text=questions, padding=True,
                                return_tensors="pt").to(self.model.device)
        out = self.model.generate(**inputs, max_new_tokens=10)
        return [text.strip().rstrip(".").lower()
                for text in self.processor.batch_decode(out, skip_special_tokens=True)]
