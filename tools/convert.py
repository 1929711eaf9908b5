"""Fetch published weights and bring them into the one layout that everything else reads: weights/nano's.

    python tools/convert.py l-1024          InternVL3-2B, SANA-1.5 1.6B and DC-AE; also b-512 and l-512
    python tools/convert.py openuni-l-1024  the same with OpenUni's trained queries, connector and DiT
    python tools/convert.py rewards         CLIP, PickScore and LAION's aesthetic head

They go to weights/NAME (docs/reference.md), with numbers and dtype as published. Every name and shape is
compared with the preset's architecture; what would compute something else is refused, before the folder
appears under its name. The originals stay in weights/downloads, where a second start goes on. Without a
network: `hf download REPOSITORY --local-dir DIR/ITS-NAME` elsewhere, for each of them, and --source DIR.
"""
import argparse
import copy
import json
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import huggingface_hub
import open_clip
import torch
from open_clip.model import CLIP
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, InternVLConfig

from common import ROOT, Refused, run, write_json
from dit import DiT, DiTConfig
from model import PRESETS, ParaUni, Preset, read_tensors
from rewards import AestheticHead
from vae import DCAE, DCAEConfig

# ----------------------------------------------------------------------------- what is published where

# A repository of the Hugging Face hub, and its revision: of OpenUni's no project pins one, so the newest.
REVISIONS = {
    "OpenGVLab/InternVL3-1B-hf": "014c0583a0d4bedf29fbe2dbff4f865eb998e171",
    "OpenGVLab/InternVL3-2B-hf": "cb57a075cb75a2e6d1b668b128d48bb00ae321d2",
    "Efficient-Large-Model/Sana_600M_512px_diffusers": "83d7a190bfd1fd070570a793d2dab5c7a3231b9d",
    "Efficient-Large-Model/Sana_1600M_512px_diffusers": "e58e81ec2dc4faf305122872313884df3afeffa8",
    "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers": "b77948f2b4eed5c728e9b828ccff07f7427b43cc",
    "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers": "6f7b3f3b289a439a11ef4fb1034989fd4b9a4766",
    "wusize/openuni": "main",
    "openai/clip-vit-large-patch14": "32bd64288804d66eefd0ccbe215aa642df71cc41",
    "yuvalkirstain/PickScore_v1": "a4e4367c6dfa7288a00c550414478f865b875800",
}
# What is read of a repository; weights in half precision carry another name and are left out.
TRANSFORMERS = ("*.json", "*.jinja", "model.safetensors", "model-*.safetensors")
SANA = ("transformer/*.json", "transformer/diffusion_pytorch_model.safetensors",
        "transformer/diffusion_pytorch_model-*.safetensors")
DC_AE = ("config.json", "diffusion_pytorch_model.safetensors")

# preset: its VLM, its diffusion transformer, and OpenUni's name of the pair
PAIRS = {
    "b-512": ("OpenGVLab/InternVL3-1B-hf", "Efficient-Large-Model/Sana_600M_512px_diffusers",
              "b_internvl3_1b_sana_0_6b_512_hf"),
    "l-512": ("OpenGVLab/InternVL3-2B-hf", "Efficient-Large-Model/Sana_1600M_512px_diffusers",
              "l_internvl3_2b_sana_1_6b_512_hf"),
    "l-1024": ("OpenGVLab/InternVL3-2B-hf", "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers",
               "l_internvl3_2b_sana_1_6b_1024_hf"),
}

DOWNLOADS = ROOT / "weights" / "downloads"
LAION_HEAD = "sac+logos+ava1-l14-linearMSE.pth"
LAION_URL = f"https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/{LAION_HEAD}"
LAION_SHA256 = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"


def fetch(repository: str, files: tuple[str, ...], source: Path | None) -> Path:
    """The folder with a repository's files: in --source, or in weights/downloads, where it is fetched to."""
    folder = (source or DOWNLOADS) / repository.partition("/")[2]
    if not source:
        revision = REVISIONS[repository]
        print(f"{repository} at {revision} -> {folder}")
        huggingface_hub.snapshot_download(repository, revision=revision, local_dir=folder,
                                          allow_patterns=list(files))
    return folder


# ----------------------------------------------------------------------------- reading, with nothing trusted

def read_shards(folder: Path, stem: str) -> dict[str, Tensor]:
    """All tensors of a folder, mapped into memory and not read yet: of its shards, else of its only file."""
    tensors = {}
    for path in sorted(folder.glob(f"{stem}-*.safetensors")) or [folder / f"{stem}.safetensors"]:
        part, _ = read_tensors(path)
        # of two revisions, or precisions, the last one's numbers would be mixed in
        if tensors.keys() & part.keys():
            raise Refused(f"{path} repeats tensors of the shards before it: delete those of another download")
        tensors |= part
    return tensors


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a .pth, mapped; a pickle with anything else in it is refused before any of it runs."""
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise Refused(f"{path} was refused: it is missing or truncated, or holds more than tensors and could "
                      f"run code ({reason})") from error
    if not isinstance(stored, dict) or not all(isinstance(value, Tensor) for value in stored.values()):
        raise Refused(f"{path} was refused: expected a flat dict of tensors")
    return stored


def check_fit(tensors: dict[str, Tensor], build: Callable[[], dict[str, Tensor]], what: Path) -> None:
    """Names and shapes are exactly those of the tensors that build() makes, here without memory."""
    with torch.device("meta"):
        expected = build()
    faults = {"missing": expected.keys() - tensors.keys(),
              "unknown": tensors.keys() - expected.keys(),
              "misshaped": {name for name, x in tensors.items() if x.shape != expected.get(name, x).shape},
              "quantised": {name for name, x in tensors.items() if x.itemsize < 2}}
    found = [f"{len(names)} {fault} {sorted(names)[:2]}" for fault, names in faults.items() if names]
    if found:
        raise Refused(f"{what} is of another architecture: {', '.join(found)}")


# ----------------------------------------------------------------------------- the parts of a preset

# Values of the VLM's config that decide what its tensors compute. Two that are known to differ do not matter:
# the published rope_type, dynamic, is the default one up to 32,768 tokens; and what ties lm_head to the
# embeddings is taken from the preset, which has them apart, as the files have.
DECISIVE = ("image_token_id", "downsample_ratio", "vision_feature_layer",
            "text_config/num_attention_heads", "text_config/num_key_value_heads", "text_config/rms_norm_eps",
            "text_config/hidden_act", "text_config/rope_parameters/rope_theta",
            "vision_config/num_attention_heads", "vision_config/layer_norm_eps", "vision_config/hidden_act")


def convert_vlm(preset: Preset, source: Path, target: Path) -> None:
    published = InternVLConfig.from_pretrained(source, local_files_only=True)
    for path in DECISIVE:
        found, wanted = published.to_dict(), preset.vlm.to_dict()
        for key in path.split("/"):
            found, wanted = found[key], wanted[key]
        if found != wanted:
            raise Refused(f"{source} is not the VLM of {preset.name}: {path} is {found}, not {wanted}")

    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    mark = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    if mark != preset.vlm.image_token_id:
        raise Refused(f"the tokenizer in {source} is another VLM's: <IMG_CONTEXT> is token {mark}, "
                      f"not {preset.vlm.image_token_id}")

    # transformers reads the names of its older versions too, and saves one file under one set of names
    tensors = read_shards(source, "model")
    vlm, report = preset.vlm_class.from_pretrained(
        source, config=copy.deepcopy(preset.vlm), dtype=next(iter(tensors.values())).dtype,
        local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True)
    wrong = [f"{key} {sorted(map(str, names))[:2]}" for key, names in report.items() if names]
    if wrong:
        raise Refused(f"{source} is of another architecture: {', '.join(wrong)}")
    vlm.save_pretrained(target)
    for path in (*source.glob("*token*.json"), *source.glob("*.jinja")):
        shutil.copy(path, target)


# our field: key of the published transformer/config.json, where they differ
RENAMED = {"num_heads": "num_attention_heads", "head_dim": "attention_head_dim",
           "num_cross_heads": "num_cross_attention_heads", "cross_head_dim": "cross_attention_head_dim"}
# published key: the only value that is implemented here; two that only younger files name
FIXED_DIT = {"_class_name": "SanaTransformer2DModel", "attention_bias": False, "dropout": 0.0,
             "guidance_embeds": False, "norm_elementwise_affine": False, "norm_eps": 1e-6}
YOUNGER_DIT = {"timestep_scale": 1.0, "guidance_embeds_scale": 0.1}
FIXED_DCAE = {"downsample_block_type": "Conv", "upsample_block_type": "interpolate",
              "decoder_norm_types": "rms_norm", "decoder_act_fns": "silu", "decoder_conv_act_fn": "relu",
              "encoder_out_shortcut": True, "decoder_in_shortcut": True}


def published_config(config: DiTConfig | DCAEConfig) -> dict:
    """The published transformer/config.json, or vae/config.json."""
    if isinstance(config, DCAEConfig):
        return asdict(config) | FIXED_DCAE
    sizes = {RENAMED.get(name, name): value for name, value in asdict(config).items()}
    return FIXED_DIT | sizes | {
        "cross_attention_dim": config.width,
        "out_channels": config.in_channels,
        "qk_norm": "rms_norm_across_heads" if config.qk_norm else None}


def check_config(path: Path, config: DiTConfig | DCAEConfig) -> None:
    """Refuse a config.json, as published, that is of other sizes or of what is not implemented here."""
    # as JSON has it: tuples are lists
    ours = json.loads(json.dumps(published_config(config) | YOUNGER_DIT))
    # a size that is not named is None: qk_norm, in files of SANA-1.0
    found = dict.fromkeys(asdict(config)) | json.loads(path.read_text())
    # without positions the side of the training latents says nothing
    if ours.get("interpolation_scale") is None:
        ours["sample_size"] = found.get("sample_size")
    wrong = {key: value for key, value in found.items() if key[0] != "_" and value != ours.get(key)}
    if wrong:
        raise Refused(f"{path} is of another preset, or of what is not implemented: it has {wrong}")


def convert_diffusers(config: DiTConfig | DCAEConfig, kind: type, source: Path, target: Path) -> None:
    """transformer/ or vae/. Their names are ours; shards are put together."""
    check_config(source / "config.json", config)
    tensors = read_shards(source, "diffusion_pytorch_model")
    check_fit(tensors, lambda: kind(config).state_dict(), source)
    target.mkdir()
    shutil.copy(source / "config.json", target)
    save_file(tensors, target / "diffusion_pytorch_model.safetensors")


# OpenUni's names of our parts. VLM and autoencoder are frozen and come from their own repositories.
OPENUNI_NAMES = {"meta_queries": "queries", "connector": "lim.connector", "projector": "lim.projector",
                 "transformer": "dit"}
OPENUNI_FROZEN = ("lmm", "vae")


def convert_openuni(preset: Preset, path: Path, target: Path) -> None:
    """What OpenUni trained, as the weights of a stage: of stage 2 if the DiT is among it, else of stage 1."""
    tensors = {}
    for key, tensor in read_pickle(path).items():
        part = key.partition(".")[0]
        if part not in OPENUNI_FROZEN:
            name = key.replace(part, OPENUNI_NAMES.get(part, part), 1)
            tensors[name] = tensor

    # its pre-training leaves the DiT as it is: such a file has none
    stage = 2 if any(name.startswith("dit.") for name in tensors) else 1
    check_fit(tensors, lambda: ParaUni(preset, nn.Identity(), None).trainable(stage), path)
    metadata = {"stage": str(stage), "preset": preset.name, "norm": str(preset.lim.norm),
                "layers": ",".join(map(str, preset.lim.layers)), "source": path.name}
    # only now: a few bytes, repeated, could be a tensor of any size
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, target / f"stage{stage}.safetensors", metadata)


def convert_preset(preset: Preset, source: Path | None, target: Path, training: str) -> None:
    vlm, sana, pair = PAIRS[preset.name.removeprefix("openuni-")]
    convert_vlm(preset, fetch(vlm, TRANSFORMERS, source), target / "vlm")
    folder = fetch(sana, SANA, source) / "transformer"
    convert_diffusers(preset.dit, DiT, folder, target / "transformer")
    folder = fetch("mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers", DC_AE, source)
    convert_diffusers(preset.vae, DCAE, folder, target / "vae")
    if preset.name.startswith("openuni-"):
        file = f"openuni_{pair}_{training}.pth"
        folder = fetch("wusize/openuni", (file,), source)
        convert_openuni(preset, folder / file, target)


# ----------------------------------------------------------------------------- the rewards

# What open_clip calls the parts of a name.
HF_NAMES = {
    "vision_model.": "visual.",
    "visual_projection.weight": "visual.proj",
    "text_model.": "",
    "text_projection.weight": "text_projection",
    "embeddings.": "",
    "patch_embedding.": "conv1.",
    "position_embedding.weight": "positional_embedding",
    "pre_layrnorm.": "ln_pre.",         # sic
    "post_layernorm.": "ln_post.",
    "final_layer_norm.": "ln_final.",
    "encoder.layers.": "transformer.resblocks.",
    "self_attn.q_proj.": "attn.in_proj_",
    "self_attn.": "attn.",
    "layer_norm": "ln_",
    "fc1.": "c_fc.",
    "fc2.": "c_proj.",
}


def open_clip_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """CLIPModel's tensors under open_clip's names: q, k, v stacked in one, both projections transposed."""
    out = {}
    for key, tensor in state.items():
        # k and v go with q, and one that lacks shows as a wrong shape; older files hold a constant too
        if any(word in key for word in (".k_proj.", ".v_proj.", ".position_ids")):
            continue
        if ".q_proj." in key:
            parts = [key.replace(".q_proj.", f".{letter}_proj.") for letter in "qkv"]
            tensor = torch.cat([state[part] for part in parts if part in state])
        if key in ("visual_projection.weight", "text_projection.weight"):
            tensor = tensor.T
        for theirs, ours in HF_NAMES.items():
            key = key.replace(theirs, ours)
        out[key] = tensor.contiguous()
    return out


def convert_clip(name: str, source: Path, target: Path) -> None:
    """A CLIPModel of transformers as open_clip's model of that name."""
    model_cfg = open_clip.get_model_config(name)
    tensors = open_clip_tensors(read_shards(source, "model"))
    check_fit(tensors, lambda: CLIP(**model_cfg).state_dict(), source)
    write_json(target / "open_clip_config.json", {"model_cfg": model_cfg})
    save_file(tensors, target / "model.safetensors")


def convert_rewards(source: Path | None, target: Path) -> None:
    for folder, repository, name in (("clip", "openai/clip-vit-large-patch14", "ViT-L-14-quickgelu"),
                                     ("pickscore", "yuvalkirstain/PickScore_v1", "ViT-H-14")):
        convert_clip(name, fetch(repository, TRANSFORMERS, source), target / folder)
    path = (source or DOWNLOADS) / LAION_HEAD
    if not source and not path.is_file():
        torch.hub.download_url_to_file(LAION_URL, str(path), hash_prefix=LAION_SHA256)
    head = read_pickle(path)
    check_fit(head, lambda: AestheticHead(768).state_dict(), path)
    (target / "aesthetic").mkdir()
    save_file(head, target / "aesthetic" / "aesthetic.safetensors")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*PAIRS, *(f"openuni-{name}" for name in PAIRS), "rewards"]
    parser.add_argument("name", choices=names, help="a preset, or rewards")
    parser.add_argument("--source", type=Path, help="folder with the repositories, each under its name")
    parser.add_argument("--out", type=Path, help="folder to write (default: weights/NAME)")
    parser.add_argument("--training", default="blip3o60k", choices=("blip3o60k", "text2image23m"),
                        help="which of OpenUni's: fine-tuned (default), or pre-trained, without a DiT")
    args = parser.parse_args(argv)
    out = args.out or ROOT / "weights" / args.name
    if out.exists():
        raise Refused(f"{out} is already there: delete it, or choose another --out")

    # written to a folder beside it, renamed at the end: half a conversion is never taken for a whole one
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        if args.name == "rewards":
            convert_rewards(args.source, partial)
        else:
            convert_preset(PRESETS[args.name], args.source, partial, args.training)
        # safetensors makes files that their owner alone can read: they get the mode of any other new file
        for path in partial.rglob("*.safetensors"):
            with suppress(OSError):
                path.chmod(partial.stat().st_mode & 0o666)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"weights {out}")


if __name__ == "__main__":
    run(main)
