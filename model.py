"""ParaUni: a frozen vision-language model reads a prompt and N learnable queries; the queries' features of
all its layers are fused (lim.py) into the condition of a diffusion transformer (dit.py) that paints in the
latents of an autoencoder (vae.py). Paper section 3.2, Eq. 4 and 5.

    prompt, [image] --VLM, frozen-> q_1..q_L --LIM-> c_1..c_L --mean-> c --DiT-> latents --DC-AE-> picture
       queries      /

Reading of the paper. "Every layer" = the outputs of layers 1..L; the last one carries the VLM's final norm.
The prompt comes first and the queries last, so under causal attention the prompt never sees a query: its keys
and values are computed once, without gradient, and only the queries are back-propagated through.

Letters: B prompts, L VLM layers, N queries, S prompt tokens, D VLM width, E condition width, C H W latent.
"""
import json
import shlex
import sys
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from torchvision.transforms.functional import InterpolationMode, normalize, resize
from transformers import (AutoTokenizer, DynamicCache, InternVLConfig, InternVLForConditionalGeneration,
                          InternVLVisionConfig, PreTrainedConfig, PreTrainedTokenizerFast, Qwen2Config,
                          Qwen2Tokenizer)
from transformers.utils import logging

from common import (ROOT, Dist, Refused, Weights, atomic, config_dict, derive_seed, environment, finite,
                    generator, write_json)
from dit import DiT, DiTConfig, randn, sample_ode
from lim import LIM, LIMConfig
from vae import DCAE, DCAEConfig

logging.disable_progress_bar()

# The published templates: no system block; the queries follow `<img>` directly.
PROMPT = "<|im_start|>user\nGenerate an image: {prompt}<|im_end|>\n<|im_start|>assistant\n<img>"
# no prompt: what guidance compares with
UNCONDITIONAL = "<|im_start|>user\n{image}Generate an image.<|im_end|>\n<|im_start|>assistant\n<img>"
# about a picture that is shown: stands as it is
INSTRUCTION = "<|im_start|>user\n{image}{prompt}<|im_end|>\n<|im_start|>assistant\n<img>"
# an answer in words is wanted, so no `<img>`
QUESTION = "<|im_start|>user\n{image}{prompt}<|im_end|>\n<|im_start|>assistant\n"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# ----------------------------------------------------------------------------- presets

@dataclass(frozen=True)
class Preset:
    """The sizes of everything. A new one is one more entry of PRESETS."""
    name: str
    image_size: int                     # pixels per side of generated pictures
    num_queries: int                    # N
    vlm: PreTrainedConfig               # of any causal language model of transformers
    lim: LIMConfig
    dit: DiTConfig
    vae: DCAEConfig
    vlm_class: type = InternVLForConditionalGeneration
    dit_class: type = DiT               # another has the members that dit.py's head names
    # of the VLM in memory, whatever its file says
    vlm_dtype: torch.dtype = torch.bfloat16
    # of the files that stages write
    stage_dtype: torch.dtype = torch.float32
    # longer captions are cut in stages I and II, as published; no other prompt is
    train_tokens: int = 128
    # prompts, pictures and words are those of nano/world.py
    shapes_world: bool = False
    # words that the queries start as; none: N(0, 1/sqrt(D)), as published
    query_words: str = ""
    # stage -> flags that differ from the paper's
    recipes: dict[int, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        text = self.vlm.get_text_config()
        assert (self.lim.width, self.lim.vlm_layers) == (text.hidden_size, text.num_hidden_layers), \
            "LIM and VLM have one width and one number of layers"

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self.image_size // 2 ** (len(self.vae.encoder_block_types) - 1)
        return self.vae.latent_channels, side, side


def internvl(width: int, layers: int, heads: int, kv_heads: int, mlp_width: int, vocab_size: int = 151674,
             context: int = 32768, rope_theta: float = 1e6, image_token_id: int = 151667,
             vision: dict | None = None) -> InternVLConfig:
    """An InternVL3: a Qwen2.5 behind a vision tower, by default InternViT-300M with one tile of 448 px."""
    published = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
                 "intermediate_size": 4096, "image_size": [448, 448], "patch_size": [14, 14]}
    tower = InternVLVisionConfig(attention_bias=True, **(vision or published))
    text = Qwen2Config(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=mlp_width, vocab_size=vocab_size, max_position_embeddings=context,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta}, rms_norm_eps=1e-6,
        tie_word_embeddings=False)
    # after the 2 x 2 pixel shuffle
    image_tokens = (tower.image_size[0] // tower.patch_size[0] // 2) ** 2
    # trap: embeddings and lm_head are tied unless told otherwise, and the published ones differ
    return InternVLConfig(vision_config=tower, text_config=text, image_token_id=image_token_id,
                          image_seq_length=image_tokens, tie_word_embeddings=False)


# The embedded default: 32 x 32 pictures, every part trained by nano/pretrain.py.
# VLM 2.4 M parameters, LIM with queries 0.3 M, DiT 1.8 M, DC-AE 1.0 M.
NANO = Preset(
    "nano", image_size=32, num_queries=16, shapes_world=True, vlm_dtype=torch.float32,
    stage_dtype=torch.bfloat16,
    query_words="left color right color above color below color one color two color how many shapes?",
    vlm=internvl(width=128, layers=8, heads=4, kv_heads=2, mlp_width=384, vocab_size=96, context=256,
                 rope_theta=100.0, image_token_id=5,
                 vision={"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
                         "intermediate_size": 384, "image_size": [32, 32], "patch_size": [4, 4]}),
    lim=LIMConfig(vlm_layers=8, width=128, num_layers=2, num_heads=4, mlp_width=256, caption_channels=128),
    dit=DiTConfig(num_layers=6, num_heads=4, head_dim=32, num_cross_heads=4, cross_head_dim=32,
                  caption_channels=128, in_channels=8, interpolation_scale=0.25, sample_size=8),
    vae=DCAEConfig(latent_channels=8, scaling_factor=1.0,
                   encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
                   decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
                   encoder_block_out_channels=(32, 64, 128), decoder_block_out_channels=(32, 64, 128),
                   encoder_layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1),
                   encoder_qkv_multiscales=((), (), (5,)), decoder_qkv_multiscales=((), (), (5,))),
    recipes={1: {"steps": 2000, "warmup": 50, "batch_size": 128, "micro_batch": 128, "lr": 2e-3,
                 "times": "noisy", "ema_decay": 0.998},
             2: {"steps": 4000, "warmup": 100, "batch_size": 128, "micro_batch": 128, "lr": 8e-4,
                 "times": "noisy", "ema_decay": 0.998},
             # pictures without guidance, in training and in the looks: half the cost, and more to gain
             3: {"steps": (50, 60, 180), "micro_batch": 64, "num_groups": 4, "group_size": 16, "lr": 2e-4,
                 "num_steps": 6, "guidance_scale": 1.0, "shared_start": True, "sde_window": 1,
                 "step_weights": "noise", "clip_range": 2e-3,
                 "kl_coef": (0.3, 0.3, 0.05), "kl_reference": "phase",
                 "num_eval": 192, "eval_guidance_scale": 1.0}})

INTERNVL3_1B = internvl(width=896, layers=24, heads=14, kv_heads=2, mlp_width=4864)         # 938 M
INTERNVL3_2B = internvl(width=1536, layers=28, heads=12, kv_heads=2, mlp_width=8960)        # 2,089 M
LIM_B = LIMConfig(vlm_layers=24, width=896, num_layers=6, num_heads=14, mlp_width=3072)     # 54 M
LIM_L = LIMConfig()                                                                         # 225 M
SANA_06B = DiTConfig(num_layers=28, num_heads=36, num_cross_heads=16, cross_head_dim=72,    # 592 M
                     qk_norm=False)
SANA_16B = DiTConfig(qk_norm=False)                                                         # 1,604 M
SANA15_16B = DiTConfig()                                                                    # 1,605 M
DC_AE = DCAEConfig()                                                                        # 312 M

# GenEval, DPG-Bench: the goal for a trained model; OpenUni's scores are of arXiv 2505.23661.
PRESETS = {preset.name: preset for preset in (
    NANO,
    # OpenUni-B's pair; OpenUni-B-512: 0.84
    Preset("b-512", 512, 256, INTERNVL3_1B, LIM_B, SANA_06B, DC_AE),
    # OpenUni-L's pair; OpenUni-L-512: 0.85
    Preset("l-512", 512, 256, INTERNVL3_2B, LIM_L, SANA_16B, DC_AE),
    # the paper: 0.87, 83.45; OpenUni-L-1024: 0.86, 83.08
    Preset("l-1024", 1024, 256, INTERNVL3_2B, LIM_L, SANA15_16B, DC_AE))}
# OpenUni itself, the paper's baseline: the VLM's last layer only, and no norm
for pair in ("b-512", "l-512", "l-1024"):
    last_alone = replace(PRESETS[pair].lim, norm=False, layers=(PRESETS[pair].lim.vlm_layers,))
    PRESETS[f"openuni-{pair}"] = replace(PRESETS[pair], name=f"openuni-{pair}", lim=last_alone)


# ----------------------------------------------------------------------------- files

def weights_folder(name: str, weights: str) -> Path:
    """What --weights means. "auto": weights/NAME, which tools/convert.py writes; nano's is there."""
    return ROOT / "weights" / name if weights == "auto" else Path(weights)


def read_tensors(path: Path) -> tuple[Weights, dict[str, str]]:
    """The tensors and the text metadata of a safetensors file."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise Refused(f"{path} is missing, truncated or no safetensors file ({error}): change --weights, "
                      "--init or --stage-file; tools/convert.py writes the published weights") from error


@torch.no_grad()
def load_strict(own: Weights, tensors: Weights, fresh: tuple[str, ...], what: str) -> None:
    """Copy a file's tensors into the model's, by name. Only names that begin as `fresh` says may be missing:
    they stay as they were drawn."""
    missing = [name for name in own if name not in tensors and not name.startswith(fresh)]
    misfit = [name for name in tensors if name not in own or own[name].shape != tensors[name].shape]
    if missing or misfit:
        raise Refused(f"{what} does not fit this preset: {len(missing)} tensors are missing {missing[:3]}, "
                      f"{len(misfit)} are unknown or of another shape {misfit[:3]}; change --preset, or name "
                      "in train.py's --fresh what may start afresh")
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


def read_stage(path: Path, preset: Preset, stage: int | None) -> tuple[Weights, dict[str, str]]:
    """What a stage has trained, and how. Refused: another preset, another stage than `stage` (None: any)."""
    tensors, metadata = read_tensors(path)
    # OpenUni's parts are those of the preset it is named after
    of_stage, of_preset = metadata.get("stage"), metadata.get("preset", "").removeprefix("openuni-")
    if of_stage not in ("1", "2", "3") or stage not in (None, int(of_stage)):
        raise Refused(f"expected {path} to be of stage {stage or '1, 2 or 3'}, it is of stage {of_stage}")
    if of_preset != preset.name.removeprefix("openuni-"):
        raise Refused(f"expected {path} to be of preset {preset.name}, it is of {of_preset or 'none'}")
    return tensors, metadata


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """For random weights, which know no words: text as its bytes, InternVL's marks at their published ids."""
    marks = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645,
             "<img>": 151665, "</img>": 151666, "<IMG_CONTEXT>": 151667}
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    return Qwen2Tokenizer(letters | marks, unk_token=None, eos_token="<|im_end|>",
                          extra_special_tokens=list(marks))


def random_vlm(preset: Preset) -> tuple[nn.Module, PreTrainedTokenizerFast]:
    """A drawn VLM, with the preset's vocabulary where it is there."""
    folder = weights_folder("nano" if preset.shapes_world else preset.name, "auto") / "vlm"
    tokenizer = AutoTokenizer.from_pretrained(folder) if folder.is_dir() else byte_tokenizer()
    return preset.vlm_class(preset.vlm).to(preset.vlm_dtype), tokenizer


def read_vlm(preset: Preset, folder: Path) -> tuple[nn.Module, PreTrainedTokenizerFast]:
    """VLM and tokenizer of a folder. transformers says what did not fit and goes on; here all must fit."""
    vlm, report = preset.vlm_class.from_pretrained(folder, dtype=preset.vlm_dtype, local_files_only=True,
                                                   output_loading_info=True)
    wrong = [f"{key} {sorted(map(str, names))[:2]}" for key, names in report.items() if names]
    text = vlm.config.get_text_config()
    if wrong or (text.hidden_size, text.num_hidden_layers) != (preset.lim.width, preset.lim.vlm_layers):
        raise Refused(f"{folder} is not of preset {preset.name}: width {text.hidden_size}, "
                      f"{text.num_hidden_layers} layers, {', '.join(wrong)}")
    return vlm, AutoTokenizer.from_pretrained(folder, local_files_only=True)


# ----------------------------------------------------------------------------- the model

class Prefix(NamedTuple):
    """What the queries see of a batch of prompts: keys and values of every VLM layer, without gradient."""
    keys_values: list[tuple[Tensor, Tensor]]        # L x (B, kv heads, S, head width), right-padded
    mask: Tensor                                    # (B, S) 1 = token, 0 = padding


class ParaUni(nn.Module):
    """The whole model. `vlm` and `vae` are frozen; `queries`, `lim` and `dit` are what the stages train."""

    def __init__(self, preset: Preset, vlm: nn.Module, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        self.preset, self.tokenizer = preset, tokenizer
        self.fresh: tuple[str, ...] = ()            # parameters that the published files lack
        self.vlm = vlm.requires_grad_(False).eval()
        self.queries = nn.Parameter(torch.randn(preset.num_queries, preset.lim.width))  # (N, D)
        self.lim = LIM(preset.lim)
        self.dit = preset.dit_class(preset.dit)
        self.vae = DCAE(preset.vae).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "ParaUni":
        """The frozen parts stay in eval mode: in train mode transformers may drop the prefix silently."""
        super().train(mode)
        self.vlm.eval()
        self.vae.eval()
        return self

    @property
    def device(self) -> torch.device:
        return self.queries.device

    # -------------------------------------------------------------- loading and saving

    @classmethod
    def from_preset(cls, name: str, weights: str | Path = "auto", stage_file: str | Path = "auto",
                    seed: int = 0, device: str | torch.device = "cpu", fresh: tuple[str, ...] = (),
                    dtype: torch.dtype = torch.float32, stage: int | None = None,
                    layers: tuple[int, ...] | None = None, norm: bool = True) -> "ParaUni":
        """Build a preset and load its weights, strictly.

        weights       "auto": weights/NAME; a folder with vlm/, transformer/, vae/; "random": from `seed`
        stage_file    a stageN.safetensors: queries and LIM, of stages 2 and 3 a DiT in the folder's place;
                      "auto": the folder's of `stage`, or its highest; "none": queries and LIM afresh
        fresh         prefixes of parameters that the files may lack
        dtype         of queries, LIM and DiT: fp32 to train them, bf16 does for sampling
        stage         which stage the file must be of; None: any
        layers, norm  what is fused; layers None: both as the stage file says, else as the preset does
        """
        # which files?
        preset, folder, is_random = PRESETS[name], weights_folder(name, str(weights)), weights == "random"
        # transformers would look on the hub for a folder that is not there
        config = folder / "vlm" / "config.json"
        if not is_random and not config.is_file():
            raise Refused(f"no {config}: change --weights; tools/convert.py writes published weights")
        if stage_file == "auto" and is_random:
            stage_file = "none"
        elif stage_file == "auto" and stage:
            stage_file = folder / f"stage{stage}.safetensors"
        elif stage_file == "auto":
            stage_file = max(folder.glob("stage[123].safetensors"), default="none")
            # enough to be asked about pictures; what it draws is noise
            if stage_file == "none":
                warnings.warn(f"no stage file in {folder}: queries and LIM are untrained", stacklevel=2)

        # what a stage has trained, and what is fused: as asked, else as it had it, else as the preset says
        trained, metadata, lim = {}, {}, preset.lim
        if stage_file != "none":
            trained, metadata = read_stage(Path(stage_file), preset, stage)
        if layers is not None:
            lim = replace(lim, layers=layers or lim.layers, norm=norm and lim.norm)
        elif metadata:
            fused = tuple(int(i) for i in metadata["layers"].split(",") if i)
            lim = replace(lim, layers=fused, norm=metadata["norm"] == "True")
        preset = replace(preset, lim=lim)

        # build it: torch's initialisers draw from the global generator, here from the seed, and then it is
        # put back
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "start") % 2 ** 32)
            vlm, tokenizer = random_vlm(preset) if is_random else read_vlm(preset, folder / "vlm")
            model = cls(preset, vlm, tokenizer)
        model.init_trained(seed)
        # what was new when the stage was trained is still not in the published files
        model.fresh = fresh + tuple(json.loads(metadata.get("fresh", "[]")))

        # the autoencoder and, where no stage has trained it, the DiT: drawn or published
        parts = {"vae": model.vae}
        if metadata.get("stage") not in ("2", "3"):
            parts["dit"] = model.dit
        for part, module in parts.items():
            if is_random:
                module.init_weights(generator(seed, part))
                continue
            place = folder / ("transformer" if part == "dit" else part)
            published, _ = read_tensors(place / "diffusion_pytorch_model.safetensors")
            # the autoencoder stays as its file is, fp32 or bf16
            if part == "vae" and torch.bfloat16 in {tensor.dtype for tensor in published.values()}:
                module.bfloat16()
            # the published files have the names of our modules
            own = {f"{part}.{key}": tensor for key, tensor in module.state_dict().items()}
            stored = {f"{part}.{key}": tensor for key, tensor in published.items()}
            load_strict(own, stored, model.fresh, str(place))
        if metadata:
            # LDAM's fields, where stage 3 ran with --ldam-mode keep
            model.lim.kept_noise = trained.pop("lim.kept_noise", None)
            load_strict(model.trainable(int(metadata["stage"])), trained, model.fresh, str(stage_file))
        # VLM and autoencoder have their own dtypes
        model.queries.data = model.queries.data.to(dtype)
        model.lim.to(dtype)
        model.dit.to(dtype)
        return model.to(device).eval()

    def init_trained(self, seed: int) -> None:
        """Queries ~ N(0, 1/sqrt(D)) and a fresh LIM, as published, drawn from `seed`."""
        # one stream for both, so that the order of drawing is part of the seed
        rng = generator(seed, "queries")
        queries = torch.randn(self.queries.shape, generator=rng) * self.preset.lim.width ** -0.5    # (N, D)
        # a small VLM answers only to words that it knows (prompt tuning, arXiv 2104.08691)
        if self.preset.query_words:
            ids, _ = self.tokenize([self.preset.query_words])                           # (1, N)
            assert ids.shape[1] == len(queries), f"query_words: {ids.shape[1]} tokens, {len(queries)} queries"
            queries = self.vlm.get_input_embeddings()(ids[0])                           # (N, D)
        self.queries.data.copy_(queries)
        self.lim.init_weights(rng)

    def trainable(self, stage: int) -> Weights:
        """Name -> parameter of what a stage trains: queries and LIM in stage 1, the DiT too in 2 and 3. Its
        file holds these, and what LDAM has left (kept_noise). Who trains fewer leaves the others out in
        common.make_trainable."""
        prefixes = ("queries", "lim.") if stage == 1 else ("queries", "lim.", "dit.")
        return {name: p for name, p in self.named_parameters() if name.startswith(prefixes)}

    def save_stage(self, cfg: Any, dist: Dist, made: dict) -> None:
        """Write what a stage has trained as RUN_DIR/stageN.safetensors, in one rename, and how it was made
        (`made`: the last line of its log) beside it as stageN.json."""
        if not dist.lead:
            return
        tensors = {name: p.detach().to("cpu", self.preset.stage_dtype)
                   for name, p in self.trainable(cfg.stage).items()}
        if self.lim.kept_noise is not None:
            tensors["lim.kept_noise"] = self.lim.kept_noise.cpu()
        metadata = {"stage": str(cfg.stage), "preset": self.preset.name,
                    "layers": ",".join(map(str, self.lim.layers)),
                    "norm": str(self.preset.lim.norm),
                    "fresh": json.dumps(self.fresh), "config": json.dumps(config_dict(cfg))}
        path = Path(cfg.run_dir) / f"stage{cfg.stage}.safetensors"
        with atomic(path) as temporary:
            save_file(tensors, temporary, metadata)
        write_json(path.with_suffix(".json"), {"command": shlex.join(["python", *sys.argv]), "seed": cfg.seed,
                                               "devices": dist.world_size, **finite(made), **environment()})
        print(f"weights {path}")

    # -------------------------------------------------------------- prompt -> condition

    def tokenize(self, texts: list[str], max_tokens: int | None = None,
                 padding_side: str = "right") -> tuple[Tensor, Tensor]:
        """Padded token ids and mask, (B, S) int64 each. `max_tokens` keeps the first so many."""
        rows, unk_id = [], self.tokenizer.unk_token_id
        text_config = self.preset.vlm.get_text_config()
        longest = text_config.max_position_embeddings - self.preset.num_queries
        for text in texts:
            found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            row = found.input_ids[:max_tokens]
            # a word that the model does not know would be read as any other: better no picture
            words = [text[first:last] for token, (first, last) in zip(row, found.offset_mapping)
                     if token == unk_id]
            if words:
                raise Refused(f"unknown words {words} in {text!r}: a prompt is such as "
                              '"a red heart left of a blue star"')
            # trap: InternVL3's last mark, <video>, has no embedding; in a caption it would end a training
            row = [token for token in row if token < text_config.vocab_size]
            if len(row) > longest:
                raise Refused(f"{len(row)} tokens, at most {longest} fit: {text[:80]!r}")
            rows.append(torch.tensor([row, [1] * len(row)]).T)                          # (S, 2) ids, mask
        # queries follow at the right, so padding in between is masked
        both = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=padding_side)     # (B, S, 2)
        return both.to(self.device).unbind(2)

    def image_text(self) -> str:
        return f"<img>{'<IMG_CONTEXT>' * self.preset.vlm.image_seq_length}</img>\n"

    def pixels(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] -> the VLM's input, one tile with ImageNet statistics."""
        side = self.preset.vlm.vision_config.image_size[0]
        # bicubic may overshoot; at its own size a picture stays as it is
        images = resize(images.to(self.device), (side, side), InterpolationMode.BICUBIC)
        images = images.clamp(0, 1)                                                     # (B, 3, side, side)
        # as the vision tower was trained
        return normalize(images, IMAGENET_MEAN, IMAGENET_STD).to(self.vlm.dtype)        # (B, 3, side, side)

    @torch.no_grad()
    def encode_prefix(self, prompts: list[str | None], images: Tensor | None = None,
                      max_tokens: int | None = None) -> Prefix:
        """Run the prompts (None = the unconditional one) through the VLM, once, without gradient."""
        assert not isinstance(prompts, str) and prompts, "expected a list of prompts"
        assert all(prompt is None or prompt.strip() for prompt in prompts), "a prompt says nothing"
        # a prompt asks for a picture; beside a picture it is an instruction about it
        image = "" if images is None else self.image_text()
        template = PROMPT if images is None else INSTRUCTION
        texts = [UNCONDITIONAL.format(image=image) if prompt is None
                 else template.format(image=image, prompt=prompt.strip()) for prompt in prompts]
        ids, mask = self.tokenize(texts, max_tokens)                                    # (B, S) each
        # the pictures' features take the places that image_text() has kept for them
        shown = {} if images is None else {"pixel_values": self.pixels(images)}
        # with its vision tower, which the queries do not need; without its head: no words are asked for
        cache = self.vlm.base_model(input_ids=ids, attention_mask=mask, position_ids=mask.cumsum(1) - 1,
                                    use_cache=True, **shown).past_key_values
        return Prefix([(layer.keys, layer.values) for layer in cache.layers], mask)

    def read_queries(self, prefix: Prefix) -> Tensor:
        """The queries' features q_i of layers 1..L after a prefix, (L, B, N, D), with gradient."""
        B, N = len(prefix.mask), self.preset.num_queries
        mask = torch.cat([prefix.mask, prefix.mask.new_ones(B, N)], 1)                  # (B, S + N)
        # a fresh cache each time: the pass extends it, and it would keep the graph
        cache = DynamicCache(prefix.keys_values)
        # positions go on behind each prompt's own end: padding is not counted
        positions = mask.cumsum(1)[:, -N:] - 1                                          # (B, N)
        queries = self.queries.to(self.vlm.dtype).expand(B, -1, -1)                     # (B, N, D)
        out = self.vlm.get_decoder()(inputs_embeds=queries, attention_mask=mask,
                                     position_ids=positions, past_key_values=cache,
                                     use_cache=True, output_hidden_states=True)
        # 0 is the embedding, which is no layer's output
        return torch.stack(out.hidden_states[1:])                                       # (L, B, N, D)

    def condition_layers(self, prefix: Prefix) -> Tensor:
        """Per-layer conditions c_1 ... c_L (paper Eq. 4), (L, B, N, E)."""
        return self.lim(self.read_queries(prefix).to(self.queries.dtype))

    def condition(self, prompts: list[str | None], images: Tensor | None = None,
                  layers: list[int] | None = None) -> Tensor:
        """The condition of prompts (paper Eq. 5), (B, N, E). None is the unconditional prompt.

        images  (B, 3, H, W) in [0, 1]: shown to the VLM's vision tower; a prompt is then an instruction about
                its picture and stands as it is, without "Generate an image:"
        layers  VLM layers, from 1, to average; None = those the model was trained with
        """
        prefix = self.encode_prefix(prompts, images)
        return self.lim.fuse(self.condition_layers(prefix), layers)                     # (B, N, E)

    # -------------------------------------------------------------- condition -> picture, picture -> words

    @torch.no_grad()
    def generate(self, prompts: list[str], num_steps: int = 20, guidance_scale: float = 4.5,
                 seed: int | list[int] = 0, solver: str = "dpm++", images: Tensor | None = None,
                 layers: list[int] | None = None) -> Tensor:
        """Pictures of prompts, (B, 3, H, W) fp32 in [0, 1].

        seed    the noise of picture i is drawn from (seed, i), or from seed[i] of a list, whatever the batch
        images  as in `condition`; guidance then compares with "Generate an image." about it
        """
        c = self.condition(prompts, images, layers)                                     # (B, N, E)
        c_uncond = None
        if guidance_scale > 1:
            # one for all, unless each goes with its own picture
            nothing = [None] * (1 if images is None else len(images))
            c_uncond = self.condition(nothing, images, layers)                          # (1 or B, N, E)
        # each picture's noise has a stream of its own
        if not isinstance(seed, list):
            seed = [derive_seed(seed, "picture", i) for i in range(len(prompts))]
        shape = len(prompts), *self.preset.latent_shape
        noise = randn(shape, [generator(each) for each in seed], self.device)           # (B, C, H, W)
        latents = sample_ode(self.dit, noise, c, c_uncond, num_steps, guidance_scale, solver=solver)
        return self.decode(latents)                                                     # (B, 3, H, W)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> pictures (B, 3, H, W) fp32 in [0, 1]."""
        # as many at a time as have the pixels of four pictures of 1024 x 1024
        chunk = max(1, 4 * 1024 ** 2 // self.preset.image_size ** 2)
        images = torch.cat([self.vae.decode(part) for part in latents.split(chunk)])    # (B, 3, H, W)
        return (images.float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def answer(self, images: Tensor, questions: list[str], max_new_tokens: int = 32) -> list[str]:
        """Ask the VLM one question about each picture, (B, 3, H, W) in [0, 1]; greedy decoding."""
        texts = [QUESTION.format(image=self.image_text(), prompt=question) for question in questions]
        # what goes on from the right end must be padded on the left
        ids, mask = self.tokenize(texts, padding_side="left")                           # (B, S) each
        # an image token among the words would ask for a picture
        out = self.vlm.generate(input_ids=ids, attention_mask=mask, pixel_values=self.pixels(images),
                                do_sample=False, max_new_tokens=max_new_tokens,
                                suppress_tokens=[self.preset.vlm.image_token_id],
                                eos_token_id=self.tokenizer.convert_tokens_to_ids("<|im_end|>"),
                                pad_token_id=self.tokenizer.pad_token_id)
        answers = self.tokenizer.batch_decode(out[:, ids.shape[1]:], skip_special_tokens=True)
        return [answer.strip() for answer in answers]

    def chat(self, image: Tensor, question: str) -> str:
        """The frozen VLM's answer to a question about one picture, (3, H, W) in [0, 1]."""
        return self.answer(image[None], [question])[0]
