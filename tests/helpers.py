"""A ParaUni of a few thousand weights that trains in milliseconds, and how its runs are made and compared."""
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from common import Dist, generator, read_log
from dit import DiTConfig
from lim import LIMConfig
from model import PRESETS, ParaUni, internvl, weights_folder
from tools.convert import published_config
from train import TrainConfig

ALONE = Dist(0, 1, torch.device("cpu"))
NANO_WEIGHTS = weights_folder("nano", "auto")
TINY_VISION = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
               "image_size": [32, 32], "patch_size": [4, 4]}
TINY = replace(
    PRESETS["nano"], stage_dtype=torch.float32, num_queries=4, query_words="",
    vlm=internvl(width=32, layers=4, heads=2, kv_heads=1, mlp_width=64, vocab_size=96, context=256,
                 image_token_id=5, vision=TINY_VISION),
    lim=LIMConfig(vlm_layers=4, width=32, num_layers=1, num_heads=2, mlp_width=64, caption_channels=32),
    dit=DiTConfig(num_layers=2, num_heads=2, head_dim=16, num_cross_heads=2, cross_head_dim=16,
                  caption_channels=32, in_channels=8),
    vae=replace(PRESETS["nano"].vae, attention_head_dim=16, encoder_block_out_channels=(8, 16, 16),
                decoder_block_out_channels=(8, 16, 16)))
REWARDS = '''
def bright(images, prompts):
    return images.mean((1, 2, 3))


def red(images, prompts):
    return images[:, 0].mean((1, 2))
'''


def tiny_model(seed: int = 0) -> ParaUni:
    """Random weights from `seed`; unlike a fresh DiT's, its velocity is not zero and hears the condition."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vlm = TINY.vlm_class(TINY.vlm).to(TINY.vlm_dtype)
        model = ParaUni(TINY, vlm, AutoTokenizer.from_pretrained(NANO_WEIGHTS / "vlm"))
    model.init_trained(seed)
    model.dit.init_weights(generator(seed, "dit"))
    model.vae.init_weights(generator(seed, "vae"))
    rng = generator(seed, "awake")
    with torch.no_grad():
        # prompts differ in their features
        for p in model.vlm.parameters():
            p.mul_(5 if p.ndim == 2 else 1)
        # gates are open
        for block in model.dit.transformer_blocks:
            block.scale_shift_table += 0.5 * torch.randn(block.scale_shift_table.shape, generator=rng)
        model.dit.proj_out.weight.copy_(0.3 * torch.randn(model.dit.proj_out.weight.shape, generator=rng))
    return model.eval()


def moved(model: ParaUni, amount: float, seed: int = 1) -> ParaUni:
    """The same model some way on: `amount` of each trained tensor's spread, in a random direction."""
    rng = generator(seed, "move")
    with torch.no_grad():
        for p in model.trainable(3).values():
            p += amount * p.std(correction=0) * torch.randn(p.shape, generator=rng)
    return model


def save_stage(model: ParaUni, folder: Path, stage: int = 1, init: str = "auto") -> Path:
    model.save_stage(TrainConfig(stage=stage, run_dir=str(folder), init=init), ALONE, {})
    return folder / f"stage{stage}.safetensors"


def save_stages(model: ParaUni, folder: Path) -> Path:
    """A folder for --weights: all parts, the files of stages 1 and 2, and rewards.py."""
    model.vlm.save_pretrained(folder / "vlm")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(NANO_WEIGHTS / "vlm" / name, folder / "vlm" / name)
    for part, module in (("transformer", model.dit), ("vae", model.vae)):
        (folder / part).mkdir(parents=True)
        save_file(module.state_dict(), folder / part / "diffusion_pytorch_model.safetensors")
        (folder / part / "config.json").write_text(json.dumps(published_config(module.config)))
    for stage in (1, 2):
        save_stage(model, folder, stage)
    (folder / "rewards.py").write_text(REWARDS)
    return folder


def newest(run_dir: Path) -> dict:
    """The state in a run's last checkpoint."""
    return torch.load(max((run_dir / "checkpoints").glob("*.pt")), weights_only=True)


def log_of(run_dir: Path) -> list[dict]:
    """The log without its times, which differ from run to run."""
    return [{key: value for key, value in line.items() if not key.startswith("time/")}
            for line in read_log(run_dir / "metrics.jsonl")]


def leaves(tree: object, name: str = "") -> dict[str, object]:
    """What nested dicts and lists hold, by its path; flags and times left out."""
    if not isinstance(tree, (dict, list, tuple)):
        return {} if "config" in name or "time/" in name else {name: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {path: leaf for key, value in items for path, leaf in leaves(value, f"{name} {key}").items()}


def assert_equal(a: object, b: object) -> None:
    """Bit for bit: all of two checkpoints, or parts of them, but flags and times."""
    a, b = leaves(a), leaves(b)
    assert a.keys() == b.keys()
    for path, leaf in a.items():
        assert torch.equal(leaf, b[path]) if isinstance(leaf, Tensor) else leaf == b[path], path


def assert_same_run(a: Path, b: Path, stage: int) -> None:
    """Bit for bit: all of the last checkpoint but the flags, the weights of the stage, and the log."""
    assert_equal(newest(a), newest(b))
    assert_equal(*(load_file(folder / f"stage{stage}.safetensors") for folder in (a, b)))
    assert log_of(a) == log_of(b) and len(log_of(a)) > 1


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def file_of(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()
