"""A ParaUni of a few thousand weights that trains in milliseconds, in the layout of a weights folder."""
import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from common import generator, save_safetensors
from dit import DiTConfig
from lim import LIMConfig
from model import NANO_WEIGHTS, PRESETS, ParaUni, VLMConfig, build_vlm
from vae import DCAEConfig

TINY = replace(
    PRESETS["nano"], num_queries=4,
    vlm=VLMConfig(width=32, num_layers=4, num_heads=2, num_kv_heads=1, mlp_width=64, vocab_size=96,
                  context=256, image_token_id=5, image_size=32, patch_size=4, vision_width=32,
                  vision_layers=1, vision_heads=2, vision_mlp_width=64),
    lim=LIMConfig(width=32, num_layers=1, num_heads=2, mlp_width=64, caption_channels=32),
    dit=DiTConfig(num_layers=2, num_heads=2, head_dim=16, num_cross_heads=2, cross_head_dim=16,
                  caption_channels=32, in_channels=8),
    vae=DCAEConfig(latent_channels=8, attention_head_dim=16,
                   encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
                   decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
                   encoder_block_out_channels=(8, 16, 16), decoder_block_out_channels=(8, 16, 16),
                   encoder_layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1),
                   encoder_qkv_multiscales=((), (), (5,)), decoder_qkv_multiscales=((), (), (5,)),
                   scaling_factor=1.0))


def tiny_model(seed: int = 0) -> ParaUni:
    """Random weights from `seed`; unlike a fresh DiT, its velocity is not zero and depends on the
    condition."""
    from transformers import AutoTokenizer
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ParaUni(TINY, build_vlm(TINY.vlm), AutoTokenizer.from_pretrained(NANO_WEIGHTS / "vlm"))
    model.init_trained(seed)
    model.dit.init_weights(generator(seed, "dit"))
    model.vae.init_weights(generator(seed, "vae"))
    with torch.no_grad():
        rng = generator(seed, "awake")
        for p in model.vlm.parameters():                        # prompts differ in their features
            p.mul_(5 if p.ndim == 2 else 1)
        for block in model.dit.transformer_blocks:              # gates open, so that the condition is heard
            block.scale_shift_table += 0.5 * torch.randn(block.scale_shift_table.shape, generator=rng)
        model.dit.proj_out.weight.copy_(0.3 * torch.randn(model.dit.proj_out.weight.shape, generator=rng))
    return model.eval()


def save_parts(model: ParaUni, folder: Path) -> Path:
    """The frozen parts and the DiT as a folder for --weights."""
    model.vlm.save_pretrained(folder / "vlm")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(NANO_WEIGHTS / "vlm" / name, folder / "vlm" / name)
    for part, module in (("transformer", model.dit), ("vae", model.vae)):
        save_safetensors(folder / part / "diffusion_pytorch_model.safetensors", module.state_dict())
        (folder / part / "config.json").write_text(json.dumps(module.config.to_json()))
    return folder
