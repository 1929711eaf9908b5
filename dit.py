"""SANA, a diffusion transformer with linear attention, and the flow it is trained on and sampled from.

Papers  SANA (arXiv 2410.10629), SANA-1.5 (2501.18427), DPM-Solver++ (2211.01095), Flow-GRPO (2505.05470).
        Parameter names are those of the published files, of diffusers' SanaTransformer2DModel.
Time    The convention of all files: t = 1 is noise, t = 0 is data, which makes ParaUni's Eq. 1

            x_t = (1 - t) x0 + t noise          v = dx_t / dt = noise - x0

        Sampling walks from t = 1 down to t = 0, so dt < 0. The network's time embedder sees 1000 t.
        Schedulers call the same quantity sigma, and so do the time grids below.
Letters B batch (images), G images per condition, N condition tokens, E condition width, C H W latent
        channels, height, width, p patch size, P = (H/p)(W/p) image tokens, M = h d width of h heads with d
        channels, R Mix-FFN width. Tensors stay token-major (B, P, M) from the first layer to the last.
Swap    Another DiT takes this one's place if it is made of a config and has three members: cross_kv(c), what
        it makes of a condition once for many calls, a list of tuples of tensors with a row for each condition
        ([(c,)] will do); forward(x, t, c=None, kv=None), the velocity under c or under kv = cross_kv(c);
        init_weights(generator). To be compiled on a GPU, it has its blocks in an nn.ModuleList.
"""
import math
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

HAS_ONEDNN = torch.backends.mkldnn.is_available()               # see pointwise
CrossKV = list[tuple[Tensor, ...]]                              # see DiT.cross_kv
Generators = torch.Generator | list[torch.Generator] | None     # see randn

# ---- configuration

@dataclass(frozen=True)
class DiTConfig:
    """Sizes of the network; the defaults are SANA-1.5 1.6B."""
    num_layers: int = 20
    num_heads: int = 70           # of self-attention; linear, so cost grows with head_dim: many small heads
    head_dim: int = 32
    num_cross_heads: int = 20     # of cross-attention; softmax
    cross_head_dim: int = 112
    caption_channels: int = 2304  # width of the condition
    in_channels: int = 32         # of the latents, in and out
    mlp_ratio: float = 2.5
    patch_size: int = 1           # the autoencoder has already compressed 32 times
    qk_norm: bool = True          # RMSNorm of q and k, all heads together: SANA-1.5 has it, SANA-1.0 has not
    # positional embeddings: None for 512 and 1024 px, where the padding of the Mix-FFN's convolutions tells
    # places apart; 1 and 2 for 2K and 4K
    interpolation_scale: float | None = None
    sample_size: int = 32         # side of the training latents; positions need it

    def __post_init__(self) -> None:
        assert self.num_cross_heads * self.cross_head_dim == self.width, "both attentions have one width"

    @property
    def width(self) -> int:
        return self.num_heads * self.head_dim


# ---- the network

def pointwise(layer: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
    """A linear layer, or a convolution with a kernel of one patch, on token-major x (B, P, in): the same."""
    weight = layer.weight.flatten(1)                                             # (out, in)
    # in fp32 a CPU convolves by oneDNN, on an AMD twice as fast as it multiplies by MKL
    in_fp32 = x.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type)
    if in_fp32 and not x.is_cuda and HAS_ONEDNN:
        y = F.conv2d(x.mT[:, :, None], weight[:, :, None, None], layer.bias)     # (B, out, 1, P)
        return y[:, :, 0].mT                                                     # (B, P, out)
    return F.linear(x, weight, layer.bias)                                       # (B, P, out)


class Linear(nn.Linear):
    """Of tokens (B, P, in), as pointwise computes it."""

    def forward(self, x: Tensor) -> Tensor:
        return pointwise(self, x)                                                # (B, P, out)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm whose affine part, (B, 1, M) each, comes from the time."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm in the dtype of its input, autocast or not. CUDA has a fused kernel; on a CPU torch's own is
    slower than these lines and keeps an fp32 copy of x for the gradient."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        if x.is_cuda:
            # which autocast would have in fp32
            with torch.autocast("cuda", enabled=False):
                return F.rms_norm(x, self.normalized_shape, weight, self.eps)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        y = x * torch.rsqrt(norm.square() / x.shape[-1] + self.eps)              # (..., M) fp32
        return y.to(x.dtype) * weight                                            # (..., M)


def mlp(in_width: int, width: int, activation: nn.Module) -> nn.Sequential:
    """For the time and for the caption."""
    return nn.Sequential(OrderedDict(
        linear_1=nn.Linear(in_width, width),
        activation=activation,
        linear_2=nn.Linear(width, width)))


class TimeEmbed(nn.Module):
    """adaLN-single (PixArt-alpha): one projection of the time makes shift, scale and gate for all blocks, and
    each block adds a learnt table to them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.emb = nn.ModuleDict({"timestep_embedder": mlp(256, width, nn.SiLU())})
        self.linear = nn.Linear(width, 6 * width)

    def forward(self, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)
        angles = 1000 * t.float()[:, None] * frequencies                         # (B, 128)
        waves = torch.cat([angles.cos(), angles.sin()], dim=1)                   # (B, 256) fp32
        e = self.emb["timestep_embedder"](waves.to(dtype))                       # (B, M)
        return e, self.linear(F.silu(e)).unflatten(1, (6, -1))                   # (B, M), (B, 6, M)


def sincos_positions(config: DiTConfig, grid: tuple[int, int], device: torch.device) -> Tensor:
    """Where each image token is, (P, M) fp32: sines and cosines of its column in the first half, of its row
    in the second. Whatever the grid, places run from 0 to base / scale: a larger picture has finer ones."""
    base = config.sample_size // config.patch_size
    quarter = config.width // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64, device=device) / quarter)
    waves = []
    for side in grid:
        place = torch.arange(side, dtype=torch.float64, device=device) * (base / side)
        angles = place[:, None] / config.interpolation_scale * frequencies       # (side, M/4)
        waves.append(torch.cat([angles.sin(), angles.cos()], dim=1).float())     # (side, M/2)
    rows = waves[0][:, None].expand(-1, grid[1], -1)                             # (H/p, W/p, M/2)
    columns = waves[1].expand(grid[0], -1, -1)                                   # (H/p, W/p, M/2)
    return torch.cat([columns, rows], dim=2).flatten(0, 1)                       # (P, M)


class Attention(nn.Module):
    """The layers that both kinds of attention have; qk-norm runs over the whole width, all heads together."""

    def __init__(self, width: int, head_dim: int, qk_norm: bool, bias: bool) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.to_q = Linear(width, width, bias=bias)
        self.to_k = Linear(width, width, bias=bias)
        self.to_v = Linear(width, width, bias=bias)
        self.norm_q = RMSNorm(width, eps=1e-5) if qk_norm else nn.Identity()
        self.norm_k = RMSNorm(width, eps=1e-5) if qk_norm else nn.Identity()
        self.to_out = nn.Sequential(Linear(width, width))

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, self.head_dim)).transpose(1, 2)               # (B, P, M) -> (B, h, P, d)


class LinearAttention(Attention):
    """Self-attention of the image tokens: ReLU kernel, no softmax, no scale, and no positions."""

    def forward(self, x: Tensor) -> Tensor:
        q = self.norm_q(self.to_q(x))                                            # (B, P, M)
        k = self.norm_k(self.to_k(x))                                            # (B, P, M)
        v = self.to_v(x)                                                         # (B, P, M)
        # One copy each makes them fp32 and head-major, as the products want them. ReLU comes after it: its
        # result is the very tensor that the products keep for the gradient.
        dense = torch.contiguous_format
        dtype = v.dtype
        q, k, v = (self.heads(y).to(torch.float32, memory_format=dense) for y in (q, k, v))
        # a sum over P tokens is too long for bf16
        with torch.autocast(x.device.type, enabled=False):
            out = linear_attention(F.relu(q), F.relu(k), v)                      # (B, h, P, d) fp32
        out = out.transpose(1, 2).to(dtype, memory_format=dense)                 # (B, P, h, d)
        return self.to_out(out.flatten(2))                                       # (B, P, M)


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with the kernel q·k in place of exp(q·k), for q, k >= 0; all (B, h, P, d) fp32.

        out_i = sum_j (q_i·k_j) v_j / sum_j (q_i·k_j) = q_i (sum_j k_j^T v_j) / q_i·(sum_j k_j)
    """
    # the right side needs one d x d matrix per head for all tokens: O(P), where softmax pays O(P^2);
    # a column of ones beside v: the same two products give numerator and denominator
    v = F.pad(v, (0, 1), value=1.0)                                              # (B, h, P, d + 1)
    out = q @ (k.transpose(2, 3) @ v)                                            # (B, h, P, d + 1)
    return out[..., :-1] / (out[..., -1:] + 1e-15)                               # (B, h, P, d)


class CrossAttention(Attention):
    """Softmax attention from image tokens to condition tokens. Keys and values depend neither on x nor on t,
    so kv() makes them once for a whole sampling run."""

    def kv(self, c: Tensor) -> tuple[Tensor, Tensor]:
        k = self.heads(self.norm_k(self.to_k(c)))                                # (B/G, h, N, d)
        v = self.heads(self.to_v(c))                                             # (B/G, h, N, d)
        return k, v

    def forward(self, x: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        # the G images of a condition queue up as G P queries of one attention: no copies of k and v
        q = self.norm_q(self.to_q(x)).reshape(len(k), -1, x.shape[2])            # (B/G, G P, M)
        out = F.scaled_dot_product_attention(self.heads(q), k, v, attn_mask=bias)
        return self.to_out(out.transpose(1, 2).reshape(x.shape))                 # (B, P, M)


class MixFFN(nn.Module):
    """Gated feed-forward with a 3x3 depthwise convolution: all that a token learns of its position, where
    there are no positional embeddings."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        M, R = config.width, int(config.mlp_ratio * config.width)
        self.conv_inverted = nn.Conv2d(M, 2 * R, 1)
        self.conv_depth = nn.Conv2d(2 * R, 2 * R, 3, padding=1, groups=2 * R)
        self.conv_point = nn.Conv2d(R, M, 1, bias=False)
        # Of its wide tensors a wide model keeps one for the backward pass and computes the others from it
        # again: a third of a block's activations saved, at the price of no matrix product.
        self.recompute = M >= 1024

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        # compiled, what is kept and what is computed again is the compiler's choice
        if self.recompute and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            y = pointwise(self.conv_inverted, x)                                 # (B, P, 2R)
            return checkpoint(self.gated, y, grid, use_reentrant=False, preserve_rng_state=False)
        # the wide tensor gets no name: that would keep it alive beside two others in sampling
        return self.gated(pointwise(self.conv_inverted, x), grid)                # (B, P, M)

    def gated(self, y: Tensor, grid: tuple[int, int]) -> Tensor:
        # tokens read as an image in channels-last memory format, and back: views, no copies
        y = F.silu(y.unflatten(1, grid).permute(0, 3, 1, 2))                     # (B, 2R, H/p, W/p)
        y = self.conv_depth(y)                                                   # (B, 2R, H/p, W/p)
        y = y.permute(0, 2, 3, 1).flatten(1, 2)                                  # (B, P, 2R)
        value, gate = y.chunk(2, dim=2)                                          # (B, P, R) each
        return pointwise(self.conv_point, value * F.silu(gate))                  # (B, P, M)


class Block(nn.Module):
    """Linear self-attention, cross-attention, Mix-FFN. Surprise: cross-attention reads x itself, neither
    normalised nor modulated, and its result is not gated."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.zeros(6, config.width))
        self.attn1 = LinearAttention(config.width, config.head_dim, config.qk_norm, bias=False)
        self.attn2 = CrossAttention(config.width, config.cross_head_dim, config.qk_norm, bias=True)
        self.ff = MixFFN(config)

    def forward(self, x: Tensor, modulation: Tensor, kv: tuple[Tensor, ...], grid: tuple[int, int]) -> Tensor:
        table = self.scale_shift_table + modulation                              # (B, 6, M)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = table.split(1, dim=1)
        # what has no name is freed at once
        x = torch.addcmul(x, gate_1, self.attn1(modulated_norm(x, shift_1, scale_1)))    # (B, P, M)
        x = x + self.attn2(x, *kv)                                               # (B, P, M)
        return torch.addcmul(x, gate_2, self.ff(modulated_norm(x, shift_2, scale_2), grid))


class DiT(nn.Module):
    """The SANA transformer: noisy latents, time and condition in, velocity out. A fresh one has torch's
    default weights, made to load a file into; to train from scratch, init_weights()."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        M, C, p = config.width, config.in_channels, config.patch_size
        self.config = config
        # True computes each block again in the backward pass: less memory, more time
        self.gradient_checkpointing = False
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(C, M, p, stride=p)})
        self.time_embed = TimeEmbed(M)
        self.caption_projection = mlp(config.caption_channels, M, nn.GELU("tanh"))
        self.caption_norm = RMSNorm(M, eps=1e-5)
        self.transformer_blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.scale_shift_table = nn.Parameter(torch.zeros(2, M))
        self.proj_out = nn.Linear(M, p * p * C)

    @property
    def dtype(self) -> torch.dtype:
        return self.proj_out.weight.dtype

    def cross_kv(self, c: Tensor, c_mask: Tensor | None = None) -> CrossKV:
        """All that the blocks need of a condition c (B/G, N, E), computed once for many calls: (k, v) per
        block; with c_mask (B/G, N), 1 keep and 0 drop, (k, v, bias). Differentiable in c."""
        c = self.caption_norm(self.caption_projection(c.to(self.dtype)))         # (B/G, N, M)
        kv = [block.attn2.kv(c) for block in self.transformer_blocks]
        if c_mask is None:
            return kv
        # -10000 and not -inf, as published: a row that drops every token must not become NaN
        bias = (1 - c_mask[:, None, None, :].to(kv[0][0].dtype)) * -10000.0      # (B/G, 1, 1, N)
        return [(k, v, bias) for k, v in kv]

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None, c_mask: Tensor | None = None,
                kv: CrossKV | None = None) -> Tensor:
        """The velocity at x (B, C, H, W) and t (B,) under condition c (B/G, N, E), or under
        kv = cross_kv(c, c_mask) shared by many calls. Row b of c is the condition of the images
        b G ... b G + G - 1; usually G = 1. Computed in the dtype of the weights, or of autocast."""
        assert (c is None) != (kv is None), "the condition comes as c or as kv"
        if kv is None:
            kv = self.cross_kv(c, c_mask)
        B, C, H, W = x.shape
        p = self.config.patch_size
        grid = H // p, W // p
        assert B % len(kv[0][0]) == 0, f"{B} images for {len(kv[0][0])} conditions"

        # patches become tokens
        x = F.pixel_unshuffle(x.to(self.dtype), p)                               # (B, C p p, H/p, W/p)
        x = pointwise(self.patch_embed["proj"], x.flatten(2).transpose(1, 2))    # (B, P, M)
        if self.config.interpolation_scale is not None:
            x = (x + sincos_positions(self.config, grid, x.device)).to(x.dtype)  # (B, P, M)

        e, modulation = self.time_embed(t, self.dtype)                           # (B, M), (B, 6, M)
        for block, block_kv in zip(self.transformer_blocks, kv, strict=True):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, modulation, block_kv, grid, use_reentrant=False,
                               preserve_rng_state=False)                         # (B, P, M)
            else:
                x = block(x, modulation, block_kv, grid)                         # (B, P, M)

        # tokens become patches
        shift, scale = (self.scale_shift_table + e[:, None]).split(1, dim=1)     # (B, 1, M) each
        v = self.proj_out(modulated_norm(x, shift, scale))                       # (B, P, p p C)
        v = v.view(B, *grid, p, p, C).permute(0, 5, 1, 3, 2, 4)                  # (B, C, H/p, p, W/p, p)
        return v.reshape(B, C, H, W)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw weights for training from scratch, as SANA does except where marked (*)."""
        # (*) norms stay at one, as they were made: SANA starts caption_norm at 0.01
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.groups > 1:
                # torch's default for 9 inputs
                nn.init.uniform_(module.weight, -1 / 3, 1 / 3, generator=generator)
            elif isinstance(module, nn.Linear | nn.Conv2d):
                # (*) SANA leaves 1x1 convolutions at torch's default
                nn.init.xavier_uniform_(module.weight.flatten(1), generator=generator)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)

        # every t starts with nearly the same modulation
        for embedder in (self.time_embed.emb["timestep_embedder"], self.caption_projection):
            nn.init.normal_(embedder.linear_1.weight, std=0.02, generator=generator)
            nn.init.normal_(embedder.linear_2.weight, std=0.02, generator=generator)
        nn.init.normal_(self.time_embed.linear.weight, std=0.02, generator=generator)
        # gates near 0: blocks start near the identity
        for module in (self, *self.transformer_blocks):
            nn.init.normal_(module.scale_shift_table, std=self.config.width ** -0.5, generator=generator)
        # (*) as in DiT: the first prediction is 0 and not noise
        nn.init.zeros_(self.proj_out.weight)


# ---- the flow: training loss and deterministic sampling

def randn(shape: tuple[int, ...], generator: Generators, device: torch.device | str) -> Tensor:
    """Standard normal fp32 numbers, drawn where the generator lives, then moved: a CPU generator gives the
    same numbers on every device. With a list of shape[0] generators row b comes from generator[b] alone, so
    an image's noise does not depend on its batch."""
    if isinstance(generator, list):
        assert len(generator) == shape[0], f"{len(generator)} generators for {shape[0]} rows"
        rows = [randn((1, *shape[1:]), g, g.device) for g in generator]
        # to a GPU at once, and without waiting for it
        return torch.cat(rows).to(device, non_blocking=True)
    source = device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=source).to(device)


def flow_matching_loss(dit: nn.Module, x0: Tensor, c: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """The training loss: (dit(x_t, t, c) - (noise - x0))^2, mean over all elements (ParaUni Eq. 2).

    x0, noise   (B, C, H, W)   clean latents, and what they are mixed with
    c           (B/G, N, E)    conditions
    t           (B,)           in (0, 1], how much of the noise
    """
    s = t[:, None, None, None]                                                   # (B, 1, 1, 1)
    x_t = (1 - s) * x0 + s * noise                                               # (B, C, H, W)
    return F.mse_loss(dit(x_t, t, c).float(), noise - x0)


def guided_velocity(dit: nn.Module, x: Tensor, t: Tensor, kv: CrossKV, guidance_scale: float) -> Tensor:
    """Classifier-free guidance: v_uncond + guidance_scale (v_cond - v_uncond), (B, C, H, W) fp32.

    kv   dit.cross_kv(torch.cat([c_uncond, c])), both of the same batch size, the unconditional one first;
         where guidance_scale <= 1, which means no guidance, dit.cross_kv(c)
    """
    if guidance_scale <= 1:
        return dit(x, t, kv=kv).float()
    # both halves run as one batch of 2B and are combined in fp32
    v = dit(torch.cat([x, x]), torch.cat([t, t]), kv=kv).float()                 # (2B, C, H, W)
    v_uncond, v_cond = v.chunk(2)                                                # (B, C, H, W) each
    return v_uncond + guidance_scale * (v_cond - v_uncond)


def shift_time(u: Tensor, shift: float) -> Tensor:
    """Push times towards noise; larger latents need more noise to hide their content (Stable Diffusion 3)."""
    return shift * u / (1 + (shift - 1) * u)


def dpm_grid(num_steps: int, shift: float) -> tuple[Tensor, Tensor]:
    """Times of the published SANA sampler, DPMSolverMultistepScheduler with flow sigmas: (sigmas, t).

    sigmas   (num_steps + 1,)   what the update uses, descending, the last one 0
    t        (num_steps,)       what the network sees: sigmas truncated to thousandths, as published
    """
    # trap: the first sigma is 0.9997 and not 1, good for the ODE; sde_step wants euler_grid
    u = 1 - torch.linspace(1, 0.001, num_steps + 1, dtype=torch.float64)
    sigmas = shift_time(u, shift).flip(0)                                        # (num_steps + 1,)
    t = (1000 * sigmas[:-1]).trunc() / 1000                                      # (num_steps,)
    return sigmas.float(), t.float()


def euler_grid(num_steps: int, shift: float) -> tuple[Tensor, Tensor]:
    """Times of FlowMatchEulerDiscreteScheduler, from exactly 1: (sigmas, t) as of dpm_grid."""
    # trap, kept to be equal: the lower end is shifted twice; with shift 3 the last step is 0.0089 -> 0
    lowest = shift_time(torch.tensor(0.001), shift).item()
    u = torch.linspace(1, lowest, num_steps, dtype=torch.float64)
    t = shift_time(u, shift).float()                                             # (num_steps,)
    return F.pad(t, (0, 1)), t


def dpm_step(x: Tensor, x0: Tensor, x0_prev: Tensor | None,
             sigma_prev: float, sigma: float, sigma_next: float) -> Tensor:
    """One step of DPM-Solver++ 2M in terms of the flow, alpha = 1 - sigma.

    x is alpha x0 + sigma noise. Solved for the noise and mixed again at sigma_next, exact for a fixed x0:

        x_next = (sigma_next / sigma) x + (alpha_next - alpha sigma_next / sigma) x0
    """
    # second order: from the last two estimates of x0, extrapolate half a step ahead in
    # lambda = log(alpha / sigma); the first step (no x0_prev) and the last do without
    if x0_prev is not None and sigma_next > 0:
        lam_prev, lam, lam_next = (math.log((1 - s) / s) for s in (sigma_prev, sigma, sigma_next))
        x0 = x0 + (x0 - x0_prev) * (0.5 * (lam_next - lam) / (lam - lam_prev))   # (B, C, H, W)
    ratio = sigma_next / sigma
    return ratio * x + ((1 - sigma_next) - (1 - sigma) * ratio) * x0


@torch.no_grad()
def sample_ode(dit: nn.Module, noise: Tensor, c: Tensor, c_uncond: Tensor | None, num_steps: int = 20,
               guidance_scale: float = 4.5, shift: float = 3.0, solver: str = "dpm++") -> Tensor:
    """Integrate dx/dt = v from noise at t = 1 to latents of images at t = 0, (B, C, H, W) fp32 both.

    c        (B/G, N, E)        conditions
    c_uncond (B/G or 1, N, E)   the condition of "no prompt"; may be None where guidance_scale <= 1
    solver   "dpm++" is second order and the published default; "euler" walks the grid that sde_step walks
    """
    assert solver in ("dpm++", "euler"), solver
    if guidance_scale > 1:
        c = torch.cat([c_uncond.expand_as(c), c])                                # (2B/G, N, E)
    kv = dit.cross_kv(c)
    sigmas, times = dpm_grid(num_steps, shift) if solver == "dpm++" else euler_grid(num_steps, shift)
    sigmas, times = sigmas.tolist(), times.to(noise.device)

    x, x0_prev = noise.float(), None
    for i in range(num_steps):
        v = guided_velocity(dit, x, times[i].expand(len(x)), kv, guidance_scale)     # (B, C, H, W)
        if solver == "dpm++":
            x0 = x - sigmas[i] * v                                               # (B, C, H, W)
            x = dpm_step(x, x0, x0_prev, sigmas[i - 1], sigmas[i], sigmas[i + 1])
            x0_prev = x0
        else:
            x = x + (sigmas[i + 1] - sigmas[i]) * v                              # (B, C, H, W)
    return x


# ---- the stochastic step

def sde_step(x: Tensor, v: Tensor, t: Tensor, t_next: Tensor, noise_level: float,
             x_next: Tensor | None = None, generator: Generators = None,
             ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One reverse step of the flow SDE from t to t_next < t, and its log-likelihood (ParaUni Eq. 3).

        x_next = x + [v + sigma^2 / (2t) (x + (1 - t) v)] dt + sigma sqrt(-dt) eps        dt = t_next - t < 0

    Where it comes from: since x = (1 - t) x0 + t noise and v = E[noise - x0 | x], the sum x + (1 - t) v is
    the expected noise, E[noise | x], and -1/t times it the score of p_t. Fresh noise eps of variance
    sigma^2 |dt| widens p_t; the drift sigma^2/2 score |dt| narrows it by as much. So every sigma, which is no
    time here, has the marginals of the ODE.

    x, v        (B, C, H, W)   latents and velocity; computed in fp32
    t, t_next   (B,)           kept on the CPU they cost no GPU synchronisation
    noise_level a in Flow-GRPO's sigma = a sqrt(t / (1 - t)); 0: Euler step, std and log_prob 0 by definition
    x_next      (B, C, H, W)   a stored sample to score; None draws one (generator: see randn)
    Returns     x_next, log_prob (B,) in nats, mean (B, C, H, W), std (B,)
    Differs from Flow-GRPO's formula: log_prob is a mean over C*H*W, not a sum; so clip_range is per element.
    """
    assert ((0 <= t_next) & (t_next < t) & (t <= 1)).all(), f"t = {t.tolist()}, t_next = {t_next.tolist()}"
    x, v = x.float(), v.float()
    # to a GPU without waiting for it
    t, t_next = (s.to(x.device, torch.float32, non_blocking=True)[:, None, None, None] for s in (t, t_next))
    dt = t_next - t                                                              # (B, 1, 1, 1)
    # Sigma diverges at t = 1. There 1 - t_next replaces 1 - t, as in Flow-GRPO, and the std of that step is
    # a, whatever t_next is. No help for t just below 1: use euler_grid, which starts at 1.
    sigma = noise_level * torch.sqrt(t / (1 - torch.where(t == 1, t_next, t)))   # (B, 1, 1, 1)
    mean = x + (v + sigma ** 2 / (2 * t) * (x + (1 - t) * v)) * dt               # (B, C, H, W)
    std = sigma * torch.sqrt(-dt)                                                # (B, 1, 1, 1)
    if x_next is None:
        # trap: a gradient through x_next would cancel that of mean, and log_prob would teach nothing
        x_next = mean.detach() + std * randn(x.shape, generator, x.device)       # (B, C, H, W)
    if noise_level == 0:
        return x_next, x.new_zeros(len(x)), mean, std.flatten()
    log_prob = -0.5 * ((x_next - mean) / std) ** 2 - torch.log(std) - 0.5 * math.log(2 * math.pi)
    return x_next, log_prob.mean(dim=(1, 2, 3)), mean, std.flatten()             # log_prob (B,)
