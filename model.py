"""ParaUni: a frozen vision-language model reads a prompt and N learnable queries; the queries' features of
all its layers are fused (lim.py) into the condition of a diffusion transformer (dit.py) that paints in the
latents of an autoencoder (vae.py).

    prompt, [image] --VLM, frozen-> q_1..q_L --LIM-> c_1..c_L --mean-> c --DiT-> latents --DC-AE-> picture
       queries      /

Paper sections 3.1-3.2, Eq. 3-5. The VLM is the InternVL class of transformers, with no remote code.

Reading of the paper. "Every layer" = the outputs of layers 1..L: layer i is `hidden_states[i]`, the embedding
(0) is not used, and the last one carries the VLM's final norm. The prompt comes first and the queries last,
so under causal attention the prompt never sees a query: its keys and values are computed once, without
gradient, and only the queries are back-propagated through.

The first half of this file is the model. The second half, longer than it, is about the files that others
published: fetching them, reading them exactly, and refusing what is not them.

Letters: B prompts, L VLM layers, N queries, S prompt tokens, D VLM width, E condition width, C H W latent.
"""

import errno
import json
import pickle
import shlex
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
import torch
from torch import Tensor, nn
import torch.nn.functional as F
from transformers import (AutoTokenizer, DynamicCache, InternVLConfig, InternVLForConditionalGeneration,
                          InternVLVisionConfig, PreTrainedTokenizerFast, Qwen2Config)

from common import (config_dict, derive_seed, generator, load_into, read_safetensors, refuse_misfit,
                    save_safetensors)
from dit import DiT, DiTConfig, randn, sample_ode
from lim import LIM, LIMConfig, fuse
from vae import DCAE, DCAEConfig

WEIGHTS = Path(__file__).parent / "weights"
NANO_WEIGHTS = WEIGHTS / "nano"

# The published templates: no system block; the queries follow `<img>` directly.
PROMPT = "<|im_start|>user\n{image}Generate an image: {caption}<|im_end|>\n<|im_start|>assistant\n<img>"
UNCONDITIONAL = "<|im_start|>user\n{image}Generate an image.<|im_end|>\n<|im_start|>assistant\n<img>"
QUESTION = "<|im_start|>user\n{image}{question}<|im_end|>\n<|im_start|>assistant\n"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# ----------------------------------------------------------------------------- presets

@dataclass(frozen=True)
class VLMConfig:
    """The numbers of an InternVL3 that differ between sizes; the rest is in `build_vlm`.
    Defaults: InternVL3-2B."""
    width: int = 1536                   # D
    num_layers: int = 28                # L
    num_heads: int = 12
    num_kv_heads: int = 2
    mlp_width: int = 8960
    vocab_size: int = 151674
    context: int = 32768                # tokens
    rope_theta: float = 1e6             # base of the rotary embedding's wavelengths
    image_token_id: int = 151667        # <IMG_CONTEXT>
    image_size: int = 448               # pixels per side of the one tile shown to the VLM
    patch_size: int = 14
    vision_width: int = 1024
    vision_layers: int = 24
    vision_heads: int = 16
    vision_mlp_width: int = 4096
    dtype: str = "float32"              # of the frozen weights in memory, whatever their file says

    @property
    def image_tokens(self) -> int:
        return (self.image_size // self.patch_size // 2) ** 2          # after the 2 x 2 pixel shuffle


@dataclass(frozen=True)
class Preset:
    image_size: int                     # pixels per side of generated pictures
    num_queries: int                    # N
    vlm: VLMConfig
    lim: LIMConfig
    dit: DiTConfig
    vae: DCAEConfig
    train_tokens: int = 128             # longer prompts are cut in training, as published; never at inference
    layers: tuple[int, ...] = ()        # VLM layers that are fused, from 1; empty: all, as in the paper
    # part -> (repository, revision) on the Hugging Face hub, and the folder of weights/ they are fetched into
    sources: dict[str, tuple[str, str]] = field(default_factory=dict, hash=False)
    folder: str = ""
    openuni: str = ""                   # file of OpenUni's repository with its own connector and DiT

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self.image_size // 2 ** (len(self.vae.encoder_block_types) - 1)
        return self.vae.latent_channels, side, side


INTERNVL3_1B = VLMConfig(width=896, num_layers=24, num_heads=14, mlp_width=4864, dtype="bfloat16")
INTERNVL3_2B = VLMConfig(dtype="bfloat16")
CONNECTOR_B = LIMConfig(width=896, num_layers=6, num_heads=14, mlp_width=3072, caption_channels=2304)
SANA_06B = DiTConfig(num_layers=28, num_heads=36, num_cross_heads=16, cross_head_dim=72, qk_norm=False)

# The revisions are those that public projects pinned; a revision never changes.
INTERNVL3_1B_HF = ("OpenGVLab/InternVL3-1B-hf", "014c0583a0d4bedf29fbe2dbff4f865eb998e171")
INTERNVL3_2B_HF = ("OpenGVLab/InternVL3-2B-hf", "cb57a075cb75a2e6d1b668b128d48bb00ae321d2")
SANA_06B_512 = ("Efficient-Large-Model/Sana_600M_512px_diffusers", "83d7a190bfd1fd070570a793d2dab5c7a3231b9d")
SANA_16B_512 = ("Efficient-Large-Model/Sana_1600M_512px_diffusers",
                "e58e81ec2dc4faf305122872313884df3afeffa8")
SANA15_16B_1024 = ("Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers",
                   "b77948f2b4eed5c728e9b828ccff07f7427b43cc")
DC_AE = ("mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers", "6f7b3f3b289a439a11ef4fb1034989fd4b9a4766")
OPENUNI = ("wusize/openuni", "main")

# Sizes below: parameters of VLM + LIM with queries + DiT + DC-AE; "in memory" is for sampling, all but the
# DC-AE (fp32) in bf16, without activations; plan.py prints what each stage of training needs. Scores: GenEval
# and DPG-Bench, the goal for a trained model. Those of OpenUni are from arXiv 2505.23661.
PRESETS = {
    # The embedded default: 32 x 32 pictures, every part trained by nano/pretrain.py.
    "nano": Preset(
        image_size=32, num_queries=16,
        vlm=VLMConfig(width=128, num_layers=8, num_heads=4, num_kv_heads=2, mlp_width=384, vocab_size=96,
                      context=256, rope_theta=100.0, image_token_id=5, image_size=32, patch_size=4,
                      vision_width=128, vision_layers=4, vision_heads=4, vision_mlp_width=384),
        lim=LIMConfig(width=128, num_layers=2, num_heads=4, mlp_width=256, caption_channels=128),
        dit=DiTConfig(num_layers=6, num_heads=4, head_dim=32, num_cross_heads=4, cross_head_dim=32,
                      caption_channels=128, in_channels=8, interpolation_scale=0.25, sample_size=8),
        vae=DCAEConfig(latent_channels=8, encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
                       decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
                       encoder_block_out_channels=(32, 64, 128), decoder_block_out_channels=(32, 64, 128),
                       encoder_layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1),
                       encoder_qkv_multiscales=((), (), (5,)), decoder_qkv_multiscales=((), (), (5,)),
                       scaling_factor=1.0)),
    # OpenUni-B's pair: InternVL3-1B + SANA-1.0 0.6B, 512 px, 24 layers.
    # 938 M + 55 M + 592 M + 312 M; 4.4 GB in memory. OpenUni-B-512: GenEval 0.84.
    "b-512": Preset(
        image_size=512, num_queries=256, vlm=INTERNVL3_1B, lim=CONNECTOR_B, dit=SANA_06B, vae=DCAEConfig(),
        sources={"vlm": INTERNVL3_1B_HF, "transformer": SANA_06B_512, "vae": DC_AE}, folder="b-512"),
    # OpenUni-L's pair: InternVL3-2B + SANA-1.0 1.6B, 512 px, 28 layers; no qk-norm.
    # 2,089 M + 226 M + 1,604 M + 312 M; 9.1 GB in memory. OpenUni-L-512: GenEval 0.85.
    "l-512": Preset(
        image_size=512, num_queries=256, vlm=INTERNVL3_2B, lim=LIMConfig(), dit=DiTConfig(qk_norm=False),
        vae=DCAEConfig(),
        sources={"vlm": INTERNVL3_2B_HF, "transformer": SANA_16B_512, "vae": DC_AE}, folder="l-512"),
    # The paper: InternVL3-2B + SANA-1.5 1.6B, 1024 px, 28 layers.
    # 2,089 M + 226 M + 1,605 M + 312 M; 9.1 GB in memory. ParaUni (arXiv 2512.05422): GenEval 0.87,
    # DPG-Bench 83.45; OpenUni-L-1024: 0.86 and 83.08.
    "l-1024": Preset(
        image_size=1024, num_queries=256, vlm=INTERNVL3_2B, lim=LIMConfig(), dit=DiTConfig(),
        vae=DCAEConfig(),
        sources={"vlm": INTERNVL3_2B_HF, "transformer": SANA15_16B_1024, "vae": DC_AE}, folder="l-1024"),
}


def openuni(name: str, pair: str) -> Preset:
    """OpenUni itself, the paper's baseline: the VLM's last layer only, connector, then projector, no norm."""
    base = PRESETS[name]
    return replace(base, lim=replace(base.lim, norm=False), layers=(base.vlm.num_layers,),
                   openuni=f"openuni_{pair}_hf_blip3o60k.pth")


PRESETS |= {"openuni-b-512": openuni("b-512", "b_internvl3_1b_sana_0_6b_512"),
            "openuni-l-512": openuni("l-512", "l_internvl3_2b_sana_1_6b_512"),
            "openuni-l-1024": openuni("l-1024", "l_internvl3_2b_sana_1_6b_1024")}


def weights_folder(name: str, weights: str | Path | None) -> Path:
    """The folder that --weights means for a preset. None and "auto": the weights that come with nano;
    "hub": weights/NAME, into which what is missing of the published files is fetched first."""
    if weights == "hub":
        return download(name)
    if weights not in (None, "auto"):
        return Path(weights)
    if name == "nano":
        return NANO_WEIGHTS
    raise FileNotFoundError("expected --weights to name a folder with vlm/, transformer/ and vae/ for preset "
                            f"{name}, or hub (which fetches "
                            f"{', '.join(repo for repo, _ in PRESETS[name].sources.values())}), or random, "
                            "got nothing")


# ----------------------------------------------------------------------------- the model

@dataclass(frozen=True)
class Prefix:
    """What the queries see of a batch of prompts: keys and values of every VLM layer, right-padded,
    without gradient."""
    keys_values: list[tuple[Tensor, Tensor]]        # L x (B, kv heads, S, head width)
    mask: Tensor                                    # (B, S) 1 = token, 0 = padding


class ParaUni(nn.Module):
    """The whole model. `vlm` and `vae` are frozen; `queries`, `lim` and `dit` are what the stages train."""

    def __init__(self, preset: Preset, vlm: InternVLForConditionalGeneration, tokenizer) -> None:
        super().__init__()
        self.preset, self.tokenizer = preset, tokenizer
        self.vlm = vlm
        self.queries = nn.Parameter(torch.empty(preset.num_queries, preset.vlm.width))  # (N, D)
        self.lim = LIM(preset.lim)
        self.dit = DiT(preset.dit)
        self.vae = DCAE(preset.vae)
        self.layers: list[int] | None = list(preset.layers) or None     # those that are fused; None: all
        # (L, N, E): LDAM's fields under --ldam-mode keep, else None; a buffer, to move with the model
        self.register_buffer("layer_factor", None, persistent=False)
        for part in (self.vlm, self.vae):
            part.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "ParaUni":
        """The frozen parts stay in eval mode: in train mode with checkpointing,
        transformers drops the prefix silently."""
        super().train(mode)
        self.vlm.eval()
        self.vae.eval()
        return self

    def fuse_as(self, layers: list[int] | None, norm: bool) -> None:
        """Ablations: c is the mean of these layers only (None: all), without Eq. 4's LN unless `norm`."""
        L = self.preset.vlm.num_layers
        if layers and not (len(set(layers)) == len(layers) and set(layers) <= set(range(1, L + 1))):
            raise ValueError(f"expected --layers to name some of 1..{L}, none twice, "
                             f"got {','.join(map(str, layers))}")
        self.layers = layers or list(self.preset.layers) or None
        if not norm:
            self.lim.agglayer_norm = nn.Identity()

    @property
    def device(self) -> torch.device:
        return self.queries.device

    # -------------------------------------------------------------- loading and saving

    @classmethod
    def from_preset(cls, name: str, weights: str | Path | None = None, seed: int = 0,
                    device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> "ParaUni":
        """Build a preset and load its weights, straight onto a device.

        weights  None or "auto": the trained weights of the preset; "hub": the published files, fetched if
                 they are missing; "random": true size, drawn from `seed`; a folder: vlm/, transformer/, vae/
                 and optionally stage1/2.safetensors or OpenUni's .pth in it (the newest stage is loaded)
        dtype    of queries, LIM and DiT: fp32 to train them, bf16 does for sampling
        Raises ValueError or FileNotFoundError with one sentence for a missing, damaged or foreign file.
        """
        if name not in PRESETS:
            raise ValueError(f"expected --preset to be one of {', '.join(PRESETS)}, got {name!r}")
        preset = PRESETS[name]
        if weights == "random":
            return cls._random(preset, seed, dtype).to(device)
        folder = weights_folder(name, weights)
        model = cls.from_parts(preset, folder, 0, device, dtype)
        for stage in (2, 1):
            if (path := folder / f"stage{stage}.safetensors").exists():
                model.load_trained(path, stage, name)
                break
        else:
            if preset.openuni and (folder / preset.openuni).is_file():
                model.load_trained(folder / preset.openuni)
        return model.eval()

    @classmethod
    def _random(cls, preset: Preset, seed: int, dtype: torch.dtype) -> "ParaUni":
        tokenizer = (AutoTokenizer.from_pretrained(NANO_WEIGHTS / "vlm") if preset is PRESETS["nano"]
                     else byte_tokenizer())
        with torch.random.fork_rng(devices=[]):             # transformers draws from the global generator
            torch.manual_seed(derive_seed(seed, "vlm") % 2 ** 32)
            vlm = build_vlm(preset.vlm)
        model = cls._empty(preset, vlm, tokenizer)
        for module, kind in ((model.dit, dtype), (model.vae, torch.float32)):
            module.to(kind).to_empty(device="cpu")
        model.init_trained(seed)
        model.queries.data = model.queries.data.to(dtype)
        model.lim.to(dtype)
        model.dit.init_weights(generator(seed, "dit"))
        model.vae.init_weights(generator(seed, "vae"))
        return model.eval()

    @classmethod
    def from_parts(cls, preset: Preset, folder: Path, seed: int = 0, device: str | torch.device = "cpu",
                   dtype: torch.dtype = torch.float32) -> "ParaUni":
        """The frozen VLM and DC-AE and the pre-trained DiT from a folder; queries and LIM freshly drawn.
        Every file is checked before the first weight is read."""
        parts = read_parts(preset, folder)
        tokenizer = load_tokenizer(preset.vlm, folder / "vlm")
        with torch.device("meta"):
            vlm = build_vlm(preset.vlm)
        model = cls._empty(preset, vlm, tokenizer)
        modules = {"vlm": model.vlm, "transformer": model.dit, "vae": model.vae}
        for part, module in modules.items():
            refuse_misfit(module.state_dict(), {name: t.shape for name, t in parts[part].items()},
                          str(folder / part), "change --preset or --weights")
        model.dit.to(dtype)
        if any(t.dtype != "BF16" for t in parts["vae"].values()):        # else as its file says, bf16
            model.vae.float()
        else:
            model.vae.bfloat16()
        for part, module in modules.items():
            module.to_empty(device=device)
            fill(module, parts[part])
        reset_rope(model.vlm)
        model.init_trained(seed)
        model.queries.data, model.lim = model.queries.data.to(device, dtype), model.lim.to(device, dtype)
        return model.eval()

    @classmethod
    def _empty(cls, preset: Preset, vlm: InternVLForConditionalGeneration, tokenizer) -> "ParaUni":
        """DiT and autoencoder without memory yet: theirs is taken once, in the dtype and on the device where
        they stay."""
        with torch.device("meta"):
            model = cls(preset, vlm, tokenizer)
        model.queries = nn.Parameter(torch.empty(model.queries.shape))                  # (N, D)
        model.lim.to_empty(device="cpu")
        return model

    def init_trained(self, seed: int) -> None:
        """Queries ~ N(0, 1/sqrt(D)) and a fresh LIM, as published, drawn from `seed`."""
        rng = generator(seed, "queries")
        with torch.no_grad():
            self.queries.copy_(torch.randn(self.queries.shape, generator=rng) * self.preset.vlm.width ** -0.5)
        self.lim.init_weights(rng)

    def trainable(self, stage: int) -> dict[str, nn.Parameter]:
        """Name -> parameter of what a stage trains: queries and LIM in stage 1,
        the DiT too in stages 2 and 3."""
        prefixes = ("queries", "lim.") if stage == 1 else ("queries", "lim.", "dit.")
        return {name: p for name, p in self.named_parameters() if name.startswith(prefixes)}

    def load_trained(self, path: Path, stage: int | None = None, preset: str | None = None) -> dict[str, str]:
        """Load what a stage trained, strictly; returns the file's metadata.
        `stage` and `preset`: what the file must be of. An OpenUni .pth is read too, see load_openuni."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"expected the weights of a stage at {path}, found none; "
                                    "change --init or --weights")
        if Path(path).suffix == ".pth":
            return load_openuni(self, Path(path))
        tensors, metadata = read_safetensors(Path(path))
        made, of = metadata.get("stage"), metadata.get("preset")
        if made not in ("1", "2", "3") or stage not in (None, int(made)):
            raise ValueError(f"expected {path} to be weights of stage {stage or '1, 2 or 3'}, "
                             f"got stage {made}; run the stages in order or change --init")
        if preset not in (None, of):
            raise ValueError(f"expected {path} to be of preset {preset}, it is of {of}; "
                             "change --preset, --init or --weights")
        factor = tensors.pop("ldam.layer_factor", None)
        self.fuse_as([int(i) for i in metadata.get("layers", "").split(",") if i],
                     metadata.get("norm", "True") == "True")
        load_into(self.trainable(int(made)), tensors, str(path), "is it of this --preset?")
        self.layer_factor = None if factor is None else factor.to(self.device)
        return metadata

    # -------------------------------------------------------------- prompt -> condition

    def tokenize(self, texts: list[str], max_tokens: int | None = None) -> tuple[Tensor, Tensor]:
        """Right-padded token ids and mask, (B, S) int64 each.
        `max_tokens` keeps the first ones, as in training."""
        rows = [self.tokenizer(text, add_special_tokens=False).input_ids[:max_tokens] for text in texts]
        unknown = self.tokenizer.unk_token_id
        if unknown is not None and (bad := [t for t, row in zip(texts, rows) if unknown in row]):
            read = self.tokenizer(bad[0], add_special_tokens=False, return_offsets_mapping=True)
            words = [bad[0][first:last]
                     for i, (first, last) in zip(read.input_ids, read.offset_mapping) if i == unknown]
            raise ValueError(f"the {len(self.tokenizer)} words of this model do not include "
                             f"{', '.join(map(repr, words))}; "
                             'expected a prompt such as "a red heart left of a blue star"')
        longest = max(map(len, rows))
        if longest + self.preset.num_queries > self.preset.vlm.context:
            raise ValueError("expected a prompt of at most "
                             f"{self.preset.vlm.context - self.preset.num_queries} tokens, got {longest}")
        ids = torch.zeros(len(rows), longest, dtype=torch.long, device=self.device)     # (B, S)
        mask = torch.zeros_like(ids)                                                    # (B, S)
        for b, row in enumerate(rows):
            ids[b, :len(row)] = torch.tensor(row, device=self.device)
            mask[b, :len(row)] = 1
        return ids, mask

    def image_text(self) -> str:
        return f"<img>{'<IMG_CONTEXT>' * self.preset.vlm.image_tokens}</img>\n"

    def question_text(self, question: str) -> str:
        """A question about one picture, in the frame of the tokenizer's own chat template if it has one."""
        if not self.tokenizer.chat_template:
            return QUESTION.format(image=self.image_text(), question=question)
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = self.tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False,
                                                  add_generation_prompt=True)
        mark = next((mark for mark in ("<IMG_CONTEXT>", "<image>") if mark in text), None)
        if mark is None:
            raise ValueError("the chat template beside the tokenizer has no place for a picture: "
                             "fetch chat_template.jinja again")
        return text.replace(mark, self.image_text().rstrip("\n"), 1)

    def embed(self, ids: Tensor, images: Tensor | None) -> Tensor:
        """Token embeddings (B, S, D), with the features of one picture a row in the places of its
        image tokens."""
        embeds = self.vlm.get_input_embeddings()(ids)                                   # (B, S, D)
        if images is None:
            return embeds
        features = self.vlm.model.get_image_features(
            pixel_values=self.pixels(images)).pooler_output                             # (B, image tokens, D)
        here = (ids == self.preset.vlm.image_token_id)[..., None]                       # (B, S, 1)
        return embeds.masked_scatter(here, features.to(embeds.dtype))                   # (B, S, D)

    def pixels(self, images: Tensor, as_processor: bool = False) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] -> the VLM's input: one tile, ImageNet statistics.
        Resized as OpenUni does for a condition, or as InternVL's processor does for a question: rows, then
        columns, each rounded to grey levels."""
        side = self.preset.vlm.image_size
        if images.shape[-2:] != (side, side) and as_processor:
            images = (images * 255).round()
            for size in ((images.shape[-2], side), (side, side)):
                images = F.interpolate(images, size, mode="bicubic", antialias=True).round().clamp(0, 255)
            images = images / 255
        elif images.shape[-2:] != (side, side):
            images = F.interpolate(images, (side, side), mode="bilinear", antialias=False)
        mean, std = (torch.tensor(v, device=images.device)[:, None, None]
                     for v in (IMAGENET_MEAN, IMAGENET_STD))
        return ((images - mean) / std).to(self.vlm.dtype)                               # (B, 3, side, side)

    @torch.no_grad()
    def encode_prefix(self, prompts: list[str | None], images: Tensor | None = None,
                      max_tokens: int | None = None) -> Prefix:
        """Run the prompts (None = the unconditional one) through the VLM, once, without gradient."""
        if not prompts:
            raise ValueError("expected at least one prompt, got an empty list")
        if any(p is not None and not p.strip() for p in prompts):
            raise ValueError("expected every prompt to say something, got an empty one")
        if images is not None and len(images) != len(prompts):
            raise ValueError("expected one picture for each prompt, "
                             f"got {len(images)} pictures and {len(prompts)} prompts")
        image = self.image_text() if images is not None else ""
        texts = [UNCONDITIONAL.format(image=image) if p is None
                 else PROMPT.format(image=image, caption=p.strip()) for p in prompts]
        ids, mask = self.tokenize(texts, max_tokens)
        language = self.vlm.model.language_model
        cache = language(inputs_embeds=self.embed(ids, images), attention_mask=mask,
                         position_ids=positions(mask), use_cache=True,
                         past_key_values=DynamicCache(config=language.config)).past_key_values
        return Prefix([(layer.keys, layer.values) for layer in cache.layers], mask)

    def read_queries(self, prefix: Prefix) -> Tensor:
        """The queries' features of layers 1..L after a prefix, with gradient to the queries.
        Returns (L, B, N, D)."""
        B, N = len(prefix.mask), self.preset.num_queries
        mask = torch.cat([prefix.mask, prefix.mask.new_ones(B, N)], 1)                  # (B, S + N)
        # a fresh cache each time: the pass extends it, and it would keep the graph
        cache = DynamicCache(prefix.keys_values)
        out = self.vlm.model.language_model(
            inputs_embeds=self.queries.to(self.vlm.dtype).expand(B, -1, -1), attention_mask=mask,
            position_ids=positions(mask)[:, -N:], past_key_values=cache, use_cache=True,
            output_hidden_states=True)
        return torch.stack(out.hidden_states[1:])                                       # (L, B, N, D)

    def condition_layers(self, prefix: Prefix) -> Tensor:
        """Per-layer conditions c_1 ... c_L, (L, B, N, E) (paper Eq. 4)."""
        return self.lim(self.read_queries(prefix).to(self.queries.dtype))

    def fuse(self, c_layers: Tensor, layers: list[int] | None = None, noise: Tensor | None = None) -> Tensor:
        """The mean over layers (paper Eq. 5), (B, N, E), with LDAM's kept fields and a perturbation,
        c_i (1 + noise_i)."""
        if self.layer_factor is not None:
            c_layers = c_layers * self.layer_factor[:, None]                            # (L, B, N, E)
        return fuse(c_layers, self.layers if layers is None else layers,
                    None if noise is None else 1.0, noise)

    def condition(self, prompts: list[str | None], images: Tensor | None = None,
                  layers: list[int] | None = None) -> Tensor:
        """The condition of prompts, (B, N, E) (paper Eq. 5). None is the unconditional prompt.

        images  (B, 3, H, W) in [0, 1]: shown to the VLM in front of each prompt (reconstruction, editing)
        layers  1-based VLM layers to average; None = those the model was trained with
        """
        return self.fuse(self.condition_layers(self.encode_prefix(prompts, images)), layers)

    # -------------------------------------------------------------- condition -> picture, picture -> words

    @torch.no_grad()
    def generate(self, prompts: list[str], num_steps: int = 20, guidance_scale: float = 4.5,
                 seed: int | list[int] = 0, solver: str = "dpm++", images: Tensor | None = None,
                 layers: list[int] | None = None) -> Tensor:
        """Pictures of prompts, (B, 3, H, W) fp32 in [0, 1].

        The noise of picture i is drawn from (seed, i), or from seed[i] if a list is given:
        it does not depend on the batch.
        """
        c = self.condition(prompts, images, layers)                                     # (B, N, E)
        seeds = ([derive_seed(seed, "picture", i) for i in range(len(prompts))] if isinstance(seed, int)
                 else seed)
        noise = randn((len(prompts), *self.preset.latent_shape), [generator(s) for s in seeds], self.device)
        c_uncond = self.condition([None], None if images is None else images[:1] * 0,
                                  layers)                                               # (1, N, E)
        return self.decode(sample_ode(self.dit, noise, c, c_uncond, num_steps, guidance_scale, solver=solver))

    @torch.no_grad()
    def decode(self, latents: Tensor, chunk: int = 64) -> Tensor:
        """Latents -> pictures (B, 3, H, W) fp32 in [0, 1]."""
        return (self.vae.decode(latents, chunk=chunk).float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def answer(self, images: Tensor, questions: list[str], max_new_tokens: int = 32) -> list[str]:
        """Ask the VLM one question about each picture, (B, 3, H, W) in [0, 1]; greedy decoding."""
        ids, mask = self.tokenize([self.question_text(q) for q in questions])
        order = mask.argsort(dim=1, stable=True)                                        # padding to the left
        ids, mask = ids.gather(1, order), mask.gather(1, order)                         # (B, S)
        end = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        out = self.vlm.generate(input_ids=ids, attention_mask=mask,
                                suppress_tokens=[self.preset.vlm.image_token_id],   # else a picture is due
                                pixel_values=self.pixels(images, as_processor=True), do_sample=False,
                                max_new_tokens=max_new_tokens, eos_token_id=end,
                                pad_token_id=self.tokenizer.pad_token_id)
        return [text.strip()
                for text in self.tokenizer.batch_decode(out[:, ids.shape[1]:], skip_special_tokens=True)]

    def chat(self, image: Tensor, question: str) -> str:
        """The frozen VLM's answer to a question about one picture, (3, H, W) in [0, 1]."""
        if not question.strip():
            raise ValueError("expected a question, got an empty one")
        return self.answer(image[None].to(self.device), [question])[0]


def positions(mask: Tensor) -> Tensor:
    """Position of each token, (B, S), counted over real tokens only."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def save_trained(model: ParaUni, path: Path, stage: int, cfg, dtype: torch.dtype = torch.float32) -> None:
    """What a stage trained, as one safetensors file that says which stage of which preset it is,
    and how it was made."""
    tensors = {name: p.detach().to(dtype) for name, p in model.trainable(stage).items()}
    if model.layer_factor is not None:
        tensors["ldam.layer_factor"] = model.layer_factor
    save_safetensors(path, tensors,
                     {"stage": str(stage), "preset": cfg.preset, "config": json.dumps(config_dict(cfg)),
                      "layers": ",".join(map(str, model.layers or [])),
                      "norm": str(not isinstance(model.lim.agglayer_norm, nn.Identity))})


# ----------------------------------------------------------------------------- the VLM

def build_vlm(c: VLMConfig) -> InternVLForConditionalGeneration:
    """InternVL3 of the given size, random weights.
    Trap: InternVLConfig ties embeddings and lm_head unless told otherwise, and the published ones differ: the
    tensor that is loaded last would overwrite the other."""
    vision = InternVLVisionConfig(hidden_size=c.vision_width, num_hidden_layers=c.vision_layers,
                                  num_attention_heads=c.vision_heads, intermediate_size=c.vision_mlp_width,
                                  image_size=[c.image_size] * 2, patch_size=[c.patch_size] * 2,
                                  attention_bias=True)
    text = Qwen2Config(hidden_size=c.width, num_hidden_layers=c.num_layers, num_attention_heads=c.num_heads,
                       num_key_value_heads=c.num_kv_heads, intermediate_size=c.mlp_width,
                       vocab_size=c.vocab_size, max_position_embeddings=c.context,
                       rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
                       rms_norm_eps=1e-6, tie_word_embeddings=False)
    config = InternVLConfig(vision_config=vision, text_config=text, image_token_id=c.image_token_id,
                            image_seq_length=c.image_tokens, tie_word_embeddings=False)
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, c.dtype))        # no fp32 copy, and the rotary table stays in fp32
    try:
        return InternVLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(default)


def reset_rope(vlm: InternVLForConditionalGeneration) -> None:
    """The rotary table is in no file: computed anew, in fp32, for a model that came from the meta device."""
    language = vlm.model.language_model
    language.rotary_emb = type(language.rotary_emb)(language.config).to(vlm.device)


def check_vlm_config(config: VLMConfig, folder: Path) -> None:
    """Refuse a config.json that would compute something else than the preset, even from tensors that fit."""
    read_json(folder / "config.json")
    found = InternVLConfig.from_pretrained(folder, local_files_only=True)
    text, vision = found.text_config, found.vision_config
    if (text.hidden_size, text.num_hidden_layers) != (config.width, config.num_layers):
        raise ValueError(f"{folder} is of another preset: expected {config.num_layers} layers of width "
                         f"{config.width}, got {text.num_hidden_layers} of {text.hidden_size}; "
                         "change --preset or --weights")
    for name, got, want in (
            ("num_attention_heads", text.num_attention_heads, config.num_heads),
            ("num_key_value_heads", text.num_key_value_heads, config.num_kv_heads),
            ("rms_norm_eps", text.rms_norm_eps, 1e-6), ("hidden_act", text.hidden_act, "silu"),
            # the published rope_type, dynamic, is the default one up to 32,768 tokens
            ("rope_theta", text.rope_parameters["rope_theta"], config.rope_theta),
            ("image_token_id", found.image_token_id, config.image_token_id),
            ("downsample_ratio", found.downsample_ratio, 0.5),
            ("vision_feature_layer", found.vision_feature_layer, -1),
            ("the vision tower's num_attention_heads", vision.num_attention_heads, config.vision_heads),
            ("the vision tower's layer_norm_eps", vision.layer_norm_eps, 1e-6),
            ("the vision tower's hidden_act", vision.hidden_act, "gelu")):
        if got != want:
            raise ValueError(f"{folder / 'config.json'} is of another model: expected {name} {want}, "
                             f"got {got}; change --preset or --weights")


def internvl_name(name: str) -> str:
    """The name of a tensor in today's transformers; published files have those of its version 4.52."""
    for old, new in (("language_model.model.", "model.language_model."),
                     ("language_model.lm_head.", "lm_head."),
                     ("vision_tower.", "model.vision_tower."),
                     ("multi_modal_projector.", "model.multi_modal_projector.")):
        if name.startswith(old):
            return new + name[len(old):]
    return name


def load_tokenizer(config: VLMConfig, folder: Path) -> PreTrainedTokenizerFast:
    """The folder's own tokenizer; ValueError if its <IMG_CONTEXT> is not the VLM's."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    found = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    if found != config.image_token_id or len(tokenizer) > config.vocab_size:
        raise ValueError(f"the tokenizer in {folder} is of another model: expected <IMG_CONTEXT> to be token "
                         f"{config.image_token_id} of at most {config.vocab_size}, got {found} of "
                         f"{len(tokenizer)}; fetch its files again or change --preset")
    return tokenizer


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Random weights have no vocabulary: text as its bytes, and InternVL's marks at their published ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    marks = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645,
             "<img>": 151665, "</img>": 151666, "<IMG_CONTEXT>": 151667}
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters | marks, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(marks))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|endoftext|>",
                                   eos_token="<|im_end|>")


# ----------------------------------------------------------------------------- published files: fetch them

# Of each repository only what is read here; fp16 variants carry another name and are left out.
DIFFUSERS = ("config.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-*.safetensors",
             "diffusion_pytorch_model.safetensors.index.json")
NEEDED = {"vlm": ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                  "added_tokens.json", "chat_template.jinja", "model.safetensors", "model-*.safetensors",
                  "model.safetensors.index.json"),
          "transformer": tuple(f"transformer/{name}" for name in DIFFUSERS), "vae": DIFFUSERS}


class Fetch(NamedTuple):
    repository: str
    revision: str
    patterns: tuple[str, ...]
    folder: Path                                            # the files keep their names under it

    def command(self) -> str:
        """What to type to fetch the same by hand."""
        words = ["hf", "download", self.repository, "--revision", self.revision]
        for pattern in self.patterns:
            words += ["--include", pattern]
        return shlex.join([*words, "--local-dir", str(self.folder)])


def fetches(name: str) -> list[Fetch]:
    """All that a preset's folder is made of."""
    preset = PRESETS[name]
    folder = WEIGHTS / preset.folder
    parts = [Fetch(*preset.sources[part], NEEDED[part], folder if part == "transformer" else folder / part)
             for part in preset.sources]
    return parts + ([Fetch(*OPENUNI, (preset.openuni,), folder)] if preset.openuni else [])


def download(name: str) -> Path:
    """Fetch the published files of a preset into weights/NAME, and return that folder.

    With progress; what is there is not fetched again, and a file that was cut off is continued.
    Raises FileNotFoundError or OSError with one sentence, which holds the command that does the same by hand.
    """
    import huggingface_hub
    from huggingface_hub import errors
    if not PRESETS[name].sources:
        raise ValueError(f"preset {name} is on no hub: leave --weights out, or name a folder")
    for fetch in fetches(name):
        try:
            huggingface_hub.snapshot_download(fetch.repository, revision=fetch.revision,
                                              allow_patterns=list(fetch.patterns), local_dir=fetch.folder)
        except (OSError, errors.HTTPError, errors.XetDownloadError) as error:
            if errno.ENOSPC in (getattr(error, "errno", None), getattr(error.__cause__, "errno", None)):
                raise OSError(errno.ENOSPC, f"the disk is full, {fetch.repository} is not complete in "
                                            f"{fetch.folder}: free some space and start again, "
                                            "which goes on where it stopped") from error
            reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".:")
            raise FileNotFoundError(f"cannot fetch {fetch.repository} ({reason}); with a network, start "
                                    f"again or run: {fetch.command()}") from error
    return WEIGHTS / PRESETS[name].folder


# ----------------------------------------------------------------------------- published files: read them

FLOATS = ("F32", "BF16", "F16")
CHUNK = 2 ** 27                                             # bytes of a file that are mapped at a time


class Stored(NamedTuple):
    """A tensor in a safetensors file, not read yet."""
    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is truncated or damaged ({error}): fetch it again") from error


def read_parts(preset: Preset, folder: Path) -> dict[str, dict[str, Stored]]:
    """What the files of vlm/, transformer/ and vae/ hold, after a check that they are all there, whole, and
    of this preset. Nothing is loaded."""
    for part, names in (("vlm", ("config.json", "tokenizer.json")), ("transformer", ("config.json",)),
                        ("vae", ("config.json",))):
        for name in names:
            if not (folder / part / name).is_file():
                raise FileNotFoundError(f"expected {folder / part / name}, found none; --weights must name a "
                                        "folder with vlm/, transformer/ and vae/, or be hub")
    for part, config, want in (("transformer", DiTConfig, preset.dit), ("vae", DCAEConfig, preset.vae)):
        found = config.from_json(read_json(folder / part / "config.json"))
        if found != want:
            raise ValueError(f"{folder / part} is of another preset: expected {want}, got {found}; "
                             "change --preset or --weights")
    check_vlm_config(preset.vlm, folder / "vlm")
    return {"vlm": scan(tensor_files(folder / "vlm", "model"), internvl_name),
            **{part: scan(tensor_files(folder / part, "diffusion_pytorch_model"))
               for part in ("transformer", "vae")}}


def tensor_files(folder: Path, stem: str) -> list[Path]:
    """The safetensors of a folder: those that its index names, or the only one."""
    index, single = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
    if not index.is_file():
        if not single.is_file():
            raise FileNotFoundError(f"expected {single}, found none; change --weights, or fetch it")
        return [single]
    names = sorted(set(read_json(index).get("weight_map", {}).values()))
    if not names or any(Path(name).name != name for name in names):
        raise ValueError(f"{index} is no index of safetensors files beside it: fetch it again")
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{index} names {len(absent)} of {len(names)} files that are not there, "
                                f"first {absent[0]}: fetch it, or change --weights")
    return [folder / name for name in names]


def scan(files: list[Path], rename: Callable[[str], str] = str) -> dict[str, Stored]:
    """Our name -> place of every tensor in some safetensors files; only their headers are read."""
    found: dict[str, Stored] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.offset_keys():
                    tensor = file.get_slice(name)
                    stored = Stored(path, name, tuple(tensor.get_shape()), tensor.get_dtype())
                    if stored.dtype not in FLOATS:
                        raise ValueError(f"expected {path} to hold {', '.join(FLOATS)} numbers, {name} is "
                                         f"{stored.dtype}: quantised files are not read; change --weights")
                    if rename(name) in found:
                        raise ValueError(f"{name} is twice in {path.parent}: fetch its files again")
                    found[rename(name)] = stored
        except SafetensorError as error:
            raise ValueError(f"{path} is truncated or no safetensors file ({error}): "
                             "fetch it again") from error
    return found


@torch.no_grad()
def fill(module: nn.Module, tensors: dict[str, Stored]) -> None:
    """Copy tensors from their files into the module's own, which are in the dtype and on the device wanted.

    A file is mapped into memory and never read as a whole, and mapped again after every 128 MiB, since the
    pages of a mapping count as this process's memory for as long as it is open.
    """
    own, order = module.state_dict(), list(tensors.items())
    while order:
        path, size = order[0][1].path, 0
        with safe_open(path, framework="pt") as file:
            while order and order[0][1].path == path and size < CHUNK:
                name, stored = order.pop(0)
                tensor = file.get_tensor(stored.name)
                own[name].copy_(tensor)
                size += tensor.nbytes


# ----------------------------------------------------------------------------- OpenUni's checkpoints

OPENUNI_NAMES = {"meta_queries": "queries", "connector.": "lim.connector.", "projector.": "lim.projector.",
                 "agglayer_norm.": "lim.agglayer_norm.", "transformer.": "dit."}
# What a file may lack as a whole: the norm is ParaUni's own, and pre-training leaves the DiT as it is.
OPENUNI_OPTIONAL = {"agglayer_norm.": "the fusing norm starts afresh",
                    "transformer.": "the DiT stays as --weights has it"}
OPENUNI_FROZEN = ("lmm.", "vae.")                           # not in the published files


def load_openuni(model: ParaUni, path: Path) -> dict[str, str]:
    """Queries, connector and projector of an OpenUni .pth, and its DiT if that was trained too: what OpenUni
    itself paints with (presets openuni-*), or where ParaUni's stage 1 may start. Prints what came of every
    key; returns metadata as a stage's file has it.

    Raises ValueError for a damaged file, one that holds code (which is not run), and keys that do not fit.
    """
    stored = read_pickle(path)
    theirs = {key: next((p for p in OPENUNI_NAMES if key.startswith(p)), None) for key in stored}
    ours = {OPENUNI_NAMES[p] + key[len(p):] if p else key: stored[key]
            for key, p in theirs.items() if not key.startswith(OPENUNI_FROZEN)}
    kinds = {p for p in OPENUNI_NAMES if p not in OPENUNI_OPTIONAL or p in theirs.values()}
    wanted = {name: p for name, p in model.trainable(2).items()
              if name.startswith(tuple(OPENUNI_NAMES[p] for p in kinds))}
    load_into(wanted, ours, str(path), "is it of this --preset?")
    print(f"{path}: {len(stored)} keys")
    for p in OPENUNI_NAMES:
        count = sum(found == p for found in theirs.values())
        print(f"  {p:15} " + (f"{count:4} loaded" if p in kinds else f"   0 there: {OPENUNI_OPTIONAL[p]}"))
    for p in OPENUNI_FROZEN:
        print(f"  {p:15} {sum(key.startswith(p) for key in stored):4} left out: frozen, --weights has them")
    return {"stage": "2" if "transformer." in kinds else "1", "preset": "openuni"}


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a .pth, mapped; a pickle with anything else in it is refused before any of it runs."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is truncated or no file of torch.save: fetch it again")
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} was refused unread: it is damaged, or holds more than tensors and could "
                         "run code; expected a dict of tensors written by torch.save") from error
    except RuntimeError as error:
        raise ValueError(f"{path} is truncated or damaged ({str(error).splitlines()[0]}): "
                         "fetch it again") from error
    wrong = ([type(stored).__name__] if not isinstance(stored, dict)
             else [f"{key} is a {type(value).__name__}" for key, value in stored.items()
                   if not (isinstance(value, Tensor) and value.is_floating_point())])
    if wrong:
        raise ValueError(f"expected {path} to hold a flat dict of floating-point tensors, got {wrong[0]}")
    return stored
