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

Letters: B prompts, L VLM layers, N queries, S prompt tokens, D VLM width, E condition width, C H W latent.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError
import torch
from torch import Tensor, nn
import torch.nn.functional as F
from transformers import (AutoTokenizer, DynamicCache, InternVLConfig, InternVLForConditionalGeneration,
                          InternVLVisionConfig, Qwen2Config)

from common import config_dict, derive_seed, generator, load_into, read_safetensors, save_safetensors
from dit import DiT, DiTConfig, randn, sample_ode
from lim import LIM, LIMConfig, fuse
from vae import DCAE, DCAEConfig

NANO_WEIGHTS = Path(__file__).parent / "weights" / "nano"

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
    sources: dict[str, str] = field(default_factory=dict)       # part -> published repository

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self.image_size // 2 ** (len(self.vae.encoder_block_types) - 1)
        return self.vae.latent_channels, side, side


INTERNVL3_1B = VLMConfig(width=896, num_layers=24, num_heads=14, mlp_width=4864, dtype="bfloat16")
INTERNVL3_2B = VLMConfig(dtype="bfloat16")
CONNECTOR_B = LIMConfig(width=896, num_layers=6, num_heads=14, mlp_width=3072, caption_channels=2304)
SANA_06B = DiTConfig(num_layers=28, num_heads=36, num_cross_heads=16, cross_head_dim=72, qk_norm=False)
DC_AE = "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers"

PRESETS = {
    # The embedded default: 32 x 32 pictures, everything trained by nano/pretrain.py on two CPU cores.
    "nano": Preset(
        image_size=32, num_queries=16,
        vlm=VLMConfig(width=128, num_layers=8, num_heads=4, num_kv_heads=2, mlp_width=384, vocab_size=96,
                      context=256, image_token_id=5, image_size=32, patch_size=4, vision_width=128,
                      vision_layers=4, vision_heads=4, vision_mlp_width=384),
        lim=LIMConfig(width=128, num_layers=2, num_heads=4, mlp_width=256, caption_channels=128),
        dit=DiTConfig(num_layers=6, num_heads=4, head_dim=32, num_cross_heads=4, cross_head_dim=32,
                      caption_channels=128, in_channels=8),
        vae=DCAEConfig(latent_channels=8, encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
                       decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
                       encoder_block_out_channels=(32, 64, 128), decoder_block_out_channels=(32, 64, 128),
                       encoder_layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1),
                       encoder_qkv_multiscales=((), (), (5,)), decoder_qkv_multiscales=((), (), (5,)),
                       scaling_factor=1.0)),
    # OpenUni-B's pair: InternVL3-1B + SANA-1.0 0.6B, 512 px.
    "b-512": Preset(
        image_size=512, num_queries=256, vlm=INTERNVL3_1B, lim=CONNECTOR_B, dit=SANA_06B, vae=DCAEConfig(),
        sources={"vlm": "OpenGVLab/InternVL3-1B-hf",
                 "dit": "Efficient-Large-Model/Sana_600M_512px_diffusers",
                 "vae": DC_AE}),
    # OpenUni-L's pair: InternVL3-2B + SANA-1.0 1.6B, 512 px; no qk-norm.
    "l-512": Preset(
        image_size=512, num_queries=256, vlm=INTERNVL3_2B, lim=LIMConfig(), dit=DiTConfig(qk_norm=False),
        vae=DCAEConfig(),
        sources={"vlm": "OpenGVLab/InternVL3-2B-hf",
                 "dit": "Efficient-Large-Model/Sana_1600M_512px_diffusers",
                 "vae": DC_AE}),
    # The paper: InternVL3-2B + SANA-1.5 1.6B, 1024 px.
    "l-1024": Preset(
        image_size=1024, num_queries=256, vlm=INTERNVL3_2B, lim=LIMConfig(), dit=DiTConfig(),
        vae=DCAEConfig(),
        sources={"vlm": "OpenGVLab/InternVL3-2B-hf",
                 "dit": "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers",
                 "vae": DC_AE}),
}


def weights_folder(name: str, weights: str | Path | None) -> Path:
    """The folder that --weights means for a preset; None and "auto" are the weights that come with nano."""
    if weights not in (None, "auto"):
        return Path(weights)
    if name == "nano":
        return NANO_WEIGHTS
    raise FileNotFoundError("expected --weights to name a folder with vlm/, transformer/ and vae/ for preset "
                            f"{name} (published as {', '.join(PRESETS[name].sources.values())}), or random, "
                            "got nothing")


def build_vlm(c: VLMConfig) -> InternVLForConditionalGeneration:
    """InternVL3 of the given size, random weights.
    Embeddings and lm_head are separate tensors, as in the published ones."""
    vision = InternVLVisionConfig(hidden_size=c.vision_width, num_hidden_layers=c.vision_layers,
                                  num_attention_heads=c.vision_heads, intermediate_size=c.vision_mlp_width,
                                  image_size=[c.image_size] * 2, patch_size=[c.patch_size] * 2,
                                  attention_bias=True)
    text = Qwen2Config(hidden_size=c.width, num_hidden_layers=c.num_layers, num_attention_heads=c.num_heads,
                       num_key_value_heads=c.num_kv_heads, intermediate_size=c.mlp_width,
                       vocab_size=c.vocab_size, max_position_embeddings=c.context,
                       rope_parameters={"rope_type": "default", "rope_theta": 1e6},
                       rms_norm_eps=1e-6, tie_word_embeddings=False)
    config = InternVLConfig(vision_config=vision, text_config=text, image_token_id=c.image_token_id,
                            image_seq_length=c.image_tokens, tie_word_embeddings=False)
    return InternVLForConditionalGeneration(config).to(getattr(torch, c.dtype))


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

    @property
    def device(self) -> torch.device:
        return self.queries.device

    # -------------------------------------------------------------- loading and saving

    @classmethod
    def from_preset(cls, name: str, weights: str | Path | None = None, seed: int = 0) -> "ParaUni":
        """Build a preset and load its weights.

        weights  None or "auto": the trained weights of the preset; "random": true size, drawn from `seed`;
                 a folder: vlm/, transformer/, vae/ and optionally stage1/2.safetensors in it
                 (the newest stage is loaded)
        Raises ValueError or FileNotFoundError with one sentence for a missing, damaged or foreign file.
        """
        if name not in PRESETS:
            raise ValueError(f"expected --preset to be one of {', '.join(PRESETS)}, got {name!r}")
        preset = PRESETS[name]
        if weights == "random":
            return cls._random(preset, seed)
        folder = weights_folder(name, weights)
        model = cls.from_parts(preset, folder)
        for stage in (2, 1):
            if (path := folder / f"stage{stage}.safetensors").exists():
                model.load_trained(path, stage, name)
                break
        return model.eval()

    @classmethod
    def _random(cls, preset: Preset, seed: int) -> "ParaUni":
        tokenizer = AutoTokenizer.from_pretrained(NANO_WEIGHTS / "vlm") if preset is PRESETS["nano"] else None
        with torch.random.fork_rng(devices=[]):             # transformers draws from the global generator
            torch.manual_seed(derive_seed(seed, "vlm") % 2 ** 32)
            model = cls(preset, build_vlm(preset.vlm), tokenizer)
        model.init_trained(seed)
        model.dit.init_weights(generator(seed, "dit"))
        model.vae.init_weights(generator(seed, "vae"))
        return model.eval()

    @classmethod
    def from_parts(cls, preset: Preset, folder: Path, seed: int = 0) -> "ParaUni":
        """The frozen VLM and DC-AE and the pre-trained DiT from a folder; queries and LIM freshly drawn."""
        diffusers = ("config.json", "diffusion_pytorch_model.safetensors")
        for part, names in (("vlm", ("config.json", "tokenizer.json")), ("transformer", diffusers),
                            ("vae", diffusers)):
            for name in names:
                if not (folder / part / name).is_file():
                    raise FileNotFoundError(f"expected {folder / part / name}, found none; "
                                            "--weights must name a folder with vlm/, transformer/ and vae/")
        for part, config, want in (("transformer", DiTConfig, preset.dit), ("vae", DCAEConfig, preset.vae)):
            found = config.from_json(json.loads((folder / part / "config.json").read_text()))
            if found != want:
                raise ValueError(f"{folder / part} is of another preset: expected {want}, got {found}; "
                                 "change --preset or --weights")
        model = cls(preset, load_vlm(preset.vlm, folder / "vlm"),
                    AutoTokenizer.from_pretrained(folder / "vlm"))
        for part, module in (("transformer", model.dit), ("vae", model.vae)):
            path = folder / part / "diffusion_pytorch_model.safetensors"
            load_into(module, read_safetensors(path)[0], str(path), "change --preset or --weights")
        model.init_trained(seed)
        return model.eval()

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
        `stage` and `preset`: what the file must be of."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"expected the weights of a stage at {path}, found none; "
                                    "change --init or --weights")
        tensors, metadata = read_safetensors(Path(path))
        made, of = metadata.get("stage"), metadata.get("preset")
        if made not in ("1", "2", "3") or stage not in (None, int(made)):
            raise ValueError(f"expected {path} to be weights of stage {stage or '1, 2 or 3'}, "
                             f"got stage {made}; run the stages in order or change --init")
        if preset not in (None, of):
            raise ValueError(f"expected {path} to be of preset {preset}, it is of {of}; "
                             "change --preset, --init or --weights")
        factor = tensors.pop("ldam.layer_factor", None)
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

    def pixels(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] -> the VLM's input: one tile, ImageNet statistics."""
        side = self.preset.vlm.image_size
        if images.shape[-2:] != (side, side):
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
        return fuse(c_layers, layers, None if noise is None else 1.0, noise)

    def condition(self, prompts: list[str | None], images: Tensor | None = None,
                  layers: list[int] | None = None) -> Tensor:
        """The condition of prompts, (B, N, E) (paper Eq. 5). None is the unconditional prompt.

        images  (B, 3, H, W) in [0, 1]: shown to the VLM in front of each prompt (reconstruction, editing)
        layers  1-based VLM layers to average; None = all
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
        dtype = next(self.vae.parameters()).dtype
        return (self.vae.decode(latents.to(dtype), chunk=chunk).float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def answer(self, images: Tensor, questions: list[str], max_new_tokens: int = 32) -> list[str]:
        """Ask the VLM one question about each picture, (B, 3, H, W) in [0, 1]; greedy decoding."""
        ids, mask = self.tokenize([QUESTION.format(image=self.image_text(), question=q) for q in questions])
        order = mask.argsort(dim=1, stable=True)                                        # padding to the left
        ids, mask = ids.gather(1, order), mask.gather(1, order)                         # (B, S)
        end = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        out = self.vlm.generate(input_ids=ids, attention_mask=mask, pixel_values=self.pixels(images),
                                do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=end,
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
                     {"stage": str(stage), "preset": cfg.preset, "config": json.dumps(config_dict(cfg))})


def load_vlm(config: VLMConfig, folder: Path) -> InternVLForConditionalGeneration:
    """InternVL from a local folder in transformers' layout; refuses missing, unknown or misshapen tensors."""
    text = InternVLConfig.from_pretrained(folder, local_files_only=True).text_config
    if (text.hidden_size, text.num_hidden_layers) != (config.width, config.num_layers):
        raise ValueError(f"{folder} is of another preset: expected {config.num_layers} layers of width "
                         f"{config.width}, got {text.num_hidden_layers} of {text.hidden_size}; "
                         "change --preset or --weights")
    if not list(folder.glob("*.safetensors")):
        raise FileNotFoundError(f"expected {folder / 'model.safetensors'}, found none; change --weights")
    try:                                    # misshapen tensors pass here, to be refused with the others below
        vlm, info = InternVLForConditionalGeneration.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, dtype=getattr(torch, config.dtype),
            ignore_mismatched_sizes=True)
    except SafetensorError as error:
        raise ValueError(f"the weights in {folder} are truncated or no safetensors ({error}); "
                         "change --weights") from error
    faults = {"missing": "missing_keys", "unknown": "unexpected_keys", "of another shape": "mismatched_keys"}
    wrong = "; ".join(f"{len(info[key])} {fault}: {', '.join(sorted(map(str, info[key]))[:3])}"
                      for fault, key in faults.items() if info[key])
    if wrong:
        raise ValueError(f"{folder} is not the expected VLM ({wrong}): change --weights or --preset")
    return vlm
