"""The forks of docs/forks.md: in a copy and a process of its own each does what the page says."""
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import grpo
from common import read_log
from model import ParaUni
from nano import world

ROOT = Path(__file__).resolve().parent.parent
# name -> its changed lines, its commands, its diff
FORKS = {name: (lines, commands, diff) for lines, name, commands, diff in re.findall(
    r"^(\d+) changed lines.*?```sh\ngit apply docs/forks/(\w+)\.patch\n(.*?)```.*?```diff\n(.*?)```",
    (ROOT / "docs/forks.md").read_text(encoding="utf-8"), re.S | re.M)}
SMALL = {"train.py": "--batch-size 4 --save-every 1", "sample.py": "--num-steps 2",
         "3": "--group-size 2 --num-steps 3 --num-eval 2 --eval-steps 2 --rewards clip --kl-coef 0.3"}


def run(command: str) -> None:
    """One of the page's commands on a small scale."""
    words = shlex.split(command)
    start = next(i for i, word in enumerate(words) if word.endswith(".py"))
    script, argv = words[start], words[start + 1:]
    small = SMALL["3" if "3" in argv else script].split() + argv + ["--steps", "2"] * (script == "train.py")
    if "--nproc-per-node" in words:
        port = str(20_000 + time.monotonic_ns() % 10_000)
        with get_context("fork").Pool(2) as pool:
            pool.starmap(run_rank, [("0", port, small), ("1", port, small)], chunksize=1)
    else:
        import_module(script.removesuffix(".py")).main(small)


def run_rank(rank: str, port: str, argv: list[str]) -> None:
    os.environ.update(RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    import_module("train").main(argv)


def test_the_page_shows_the_patches_and_counts_their_lines() -> None:
    assert FORKS.keys() == {path.stem for path in (ROOT / "docs/forks").glob("*.patch")} and len(FORKS) == 7
    for name, (stated, _, diff) in FORKS.items():
        assert diff == (ROOT / "docs/forks" / f"{name}.patch").read_text(encoding="utf-8")
        ours = [part for part in diff.split("diff --git ")[1:] if "\nnew file mode " not in part]
        changed = len(re.findall(r"^[+-](?!\+\+ b/|-- a/)", "".join(ours), re.M))
        assert len(ours) <= 2 and changed == int(stated) <= 20


def run_fork(name: str, folder: Path) -> None:
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    shutil.copytree(ROOT / "nano", folder / "nano")
    (folder / "weights").symlink_to(ROOT / "weights")
    env = os.environ | {"PYTHONPATH": str(folder), "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    subprocess.run(["git", "apply", ROOT / "docs/forks" / f"{name}.patch"], cwd=folder, env=env, check=True)
    subprocess.run([sys.executable, __file__, name], cwd=folder, env=env, check=True)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Future]:
    """All of them, two at a time: each imports everything anew."""
    pool = ThreadPoolExecutor(2)
    return {name: pool.submit(run_fork, name, tmp_path_factory.mktemp(name)) for name in FORKS}


@pytest.mark.parametrize("name", FORKS)
def test_a_fork_runs(name: str, started: dict[str, Future]) -> None:
    started[name].result()


@torch.no_grad()
def check_layer_attention() -> None:
    model = ParaUni.from_preset("nano", fresh=("lim.layer_query",))
    prefix = model.encode_prefix(["two orange stars", None])
    c_layers = model.condition_layers(prefix)                                           # (L, 2, N, E)
    # before training it is the mean; then it learns
    assert torch.equal(model.lim.fuse(c_layers), c_layers.mean(0))
    assert load_file("runs/layer_attention/stage3.safetensors")["lim.layer_query"].ne(0).all()
    # Eq. 6 under some attention: sum_i a_i c_i (1 + noise_i)
    model.lim.layer_query.normal_()
    fired = grpo.Perturbation(0.5, [4, 7], [(0, 0, 0, member) for member in range(3)])
    noise = fired.noise(slice(0, 3), model)                                             # 2 x (3, N, E)
    c, _, perturbed = grpo.encode_conditions(model, prefix, fired, grpo.GRPOConfig(dtype="fp32"))
    factor = torch.ones(8, *noise[0].shape).index_add(0, torch.tensor([3, 6]), torch.stack(noise))
    attention = (c_layers[:, :1] @ model.lim.layer_query).softmax(0)[..., None]         # (L, 1, N, 1)
    expected = (attention * c_layers[:, :1] * factor).sum(0)                            # (3, N, E)
    torch.testing.assert_close(model.lim.perturb(c, perturbed, noise), expected)


def check_judge_reward() -> None:
    assert read_log("runs/judge/metrics.jsonl")[-1]["reward/judge"] is not None
    scene = world.Scene((world.Thing("star", "orange", x=16.0, y=16.0, r=6.0),), light=1.0)
    judge, images = import_module("judge_reward").judge, world.render([scene] * 2)
    assert judge(images, ["an orange star", "a red heart"]).tolist() == [1, 0]


def check_causal_lm() -> None:
    model = ParaUni.from_preset("nano-qwen3", "random")
    one, two = model.condition(["two orange stars", "a red heart"])
    assert type(model.vlm).__name__ == "Qwen3ForCausalLM" and not torch.allclose(one, two)
    bias = load_file("runs/qwen3-3/stage3.safetensors")["lim.projector.bias"]
    assert not torch.equal(bias, model.lim.projector.bias)


def check_diffusion_nft() -> None:
    assert [line["grad_norm"] > 0 for line in read_log("runs/nft/metrics.jsonl")[1:]] == [True, True]
    nft = import_module("nft")
    nft.BETA = 0.5
    # least where the paper's Theorem 3.2 says, at v_old + (2 r - 1) (target - v_old) / beta
    v_old, target, away = torch.randn(3, 3, 8, 4, 4)                                    # (3, 8, 4, 4) each
    r = torch.tensor([0.0, 0.5, 0.8])
    best = v_old + torch.tensor([-1.0, 0.0, 0.6])[:, None, None, None] * (target - v_old) / 0.5
    more = nft.nft_loss(best + away, v_old, target, r) - nft.nft_loss(best, v_old, target, r)       # (3,)
    torch.testing.assert_close(more, (0.5 * away).square().mean((1, 2, 3)))


def check_plain_dit() -> None:
    dit = ParaUni.from_preset("nano-plain-dit", "random").dit
    tensors = load_file("runs/plain_dit/stage2.safetensors")
    x, c, t = torch.randn(4, 8, 8, 8), torch.randn(2, 16, 128), torch.rand(4)
    # adaLN-zero: the first velocity is 0; a step later the blocks hear the time
    assert not dit(x, t, c).any() and tensors["dit.blocks.0.modulation.weight"].any()
    dit.load_state_dict({name: torch.randn_like(p) / 5 for name, p in dit.state_dict().items()})
    # pictures share the condition of their group, and hear it
    torch.testing.assert_close(dit(x, t, kv=dit.cross_kv(c)), dit(x, t, c.repeat_interleave(2, 0)))
    assert not torch.equal(dit(x, t, c), dit(x, t, c.flip(0)))


def check_tensorboard() -> None:
    events = import_module("tensorboard.backend.event_processing.event_accumulator")
    board = events.EventAccumulator("runs/board").Reload()
    log = [(line["step"], pytest.approx(line["loss"])) for line in read_log("runs/board/metrics.jsonl")]
    assert [(event.step, event.value) for event in board.Scalars("loss")] == log


def check_fsdp() -> None:
    """Two ranks, each with its half, take the steps of one; resumed in the middle, they end the same."""
    for stage in (2, 3):
        run(f"python train.py --stage {stage} --run-dir runs/one{stage}")
        start = ParaUni.from_preset("nano", stage_file=f"weights/nano/stage{stage - 1}.safetensors")
        one, split = (torch.load(f"runs/{name}{stage}/checkpoints/00000002.pt") for name in ("one", "split"))
        # the bias of a softmax's keys has no gradient but rounding errors, which Adam scales up
        names = [name for name in one["ema"] if not name.endswith("k_proj.bias")]
        a, b, before = (torch.cat([tensors[name].detach().double().flatten() for name in names])
                        for tensors in (one["ema"], split["ema"], start.trainable(stage)))
        assert (a - b).norm() <= 1e-6 * a.norm() and (a - before).norm() > 20 * (a - b).norm()
    run("torchrun --nproc-per-node 2 train.py --stage 2 --fsdp --gradient-checkpointing --run-dir runs/on "
        "--resume runs/split2/checkpoints/00000001.pt")
    whole, resumed = (load_file(f"runs/{name}/stage2.safetensors") for name in ("split2", "on"))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


if __name__ == "__main__":
    torch.set_num_threads(1)
    for command in FORKS[sys.argv[1]][1].splitlines():
        run(command)
    globals()[f"check_{sys.argv[1]}"]()
