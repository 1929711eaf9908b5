"""SANA, a diffusion transformer with linear attention, and the flow it is trained on and sampled from.

Four parts: configuration, network, the flow (training loss, deterministic samplers), and the one stochastic
step that reinforcement learning needs. It imports nothing of this project. It is longer than other parts as
it is also the text on its subject, with every formula, shape and trap where it is used.

Papers  SANA (arXiv 2410.10629), SANA-1.5 (2501.18427); rectified flow (2209.03003); DPM-Solver++
        (2211.01095); Flow-GRPO (2505.05470) for the stochastic step.
Time    The convention of all files: t = 1 is noise, t = 0 is data.

            x_t = (1 - t) x0 + t noise          v = dx_t / dt = noise - x0

        Sampling walks from t = 1 down to t = 0, so dt < 0. The network's time embedder sees 1000 t.
        Schedulers call the same quantity sigma, and so do the time grids below.
Letters B batch (images), G images per condition, N condition tokens, E condition width, C H W latent
        channels, height, width, p patch size, P = (H/p)(W/p) image tokens, M = h d width of h heads with d
        channels, R Mix-FFN width. Tensors stay token-major (B, P, M) from the first layer to the last.
Names   Parameter names and shapes are those of the published files (diffusers SanaTransformer2DModel), which
        load with strict=True. Left out, and refused by DiTConfig.from_json: the guidance embedding
        (SANA-Sprint), attention biases.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

DENSE = torch.contiguous_format
CrossKV = list[tuple[Tensor, ...]]                              # see DiT.cross_kv
Generators = torch.Generator | list[torch.Generator] | None     # see randn

# ------------------------------------------------------------------------------------------------------------
# Configuration

PUBLISHED_KEYS = {  # our field: key of the published transformer/config.json
    "num_layers": "num_layers", "num_heads": "num_attention_heads", "head_dim": "attention_head_dim",
    "num_cross_heads": "num_cross_attention_heads", "cross_head_dim": "cross_attention_head_dim",
    "caption_channels": "caption_channels", "in_channels": "in_channels", "mlp_ratio": "mlp_ratio",
    "patch_size": "patch_size", "interpolation_scale": "interpolation_scale",
}
FIXED_VALUES = {  # published key: the only value implemented here
    "_class_name": "SanaTransformer2DModel", "attention_bias": False, "dropout": 0.0,
    "guidance_embeds": False, "norm_elementwise_affine": False, "norm_eps": 1e-6,
}
IGNORED_KEYS = {"_diffusers_version", "_name_or_path", "guidance_embeds_scale", "sample_size"}


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of the network. The defaults are SANA-1.5 1.6B."""
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
    # Positional embeddings: None for 512 and 1024 px, where the padding of the Mix-FFN's convolutions tells
    # places apart; 1 and 2 for 2K and 4K. They need the side of the training latents too.
    interpolation_scale: float | None = None
    sample_size: int | None = None

    def __post_init__(self) -> None:
        if self.interpolation_scale is not None and not (self.interpolation_scale > 0 and self.sample_size):
            raise ValueError("interpolation_scale must be None, or positive beside a sample_size, "
                             f"got {self.interpolation_scale!r} beside {self.sample_size!r}")
        if not isinstance(self.qk_norm, bool):
            raise ValueError(f"qk_norm must be True or False, got {self.qk_norm!r}")
        if self.num_cross_heads * self.cross_head_dim != self.width:
            raise ValueError(f"num_cross_heads * cross_head_dim must be num_heads * head_dim = {self.width}, "
                             f"got {self.num_cross_heads} * {self.cross_head_dim}")

    @property
    def width(self) -> int:
        return self.num_heads * self.head_dim

    @classmethod
    def from_json(cls, published: dict) -> "DiTConfig":
        """Read a published transformer/config.json. Raises ValueError for what is not implemented."""
        qk_norm = published.get("qk_norm")  # trap: files of SANA-1.0 may lack the key, which means no norm
        if qk_norm not in (None, "rms_norm_across_heads"):
            raise ValueError(f"qk_norm must be null or 'rms_norm_across_heads', the config has {qk_norm!r}")
        fields = {ours: published[key] for ours, key in PUBLISHED_KEYS.items() if key in published}
        side = published.get("sample_size") if published.get("interpolation_scale") is not None else None
        config = cls(**fields, qk_norm=qk_norm is not None, sample_size=side)
        implemented = config.to_json() | {"timestep_scale": 1.0}
        for key in published.keys() - IGNORED_KEYS:
            if key not in implemented:
                raise ValueError(f"the transformer config has the unknown key {key!r}")
            if published[key] != implemented[key]:
                raise ValueError(f"the transformer config has {key} = {published[key]!r}, "
                                 f"only {implemented[key]!r} is implemented")
        return config

    def to_json(self, sample_size: int = 32) -> dict:
        """The content of a published config.json. Without positional embeddings sample_size, the latent side
        of training, is not used, but tells other programs the picture size (16: 512 px, 32: 1024 px)."""
        sizes = {key: getattr(self, ours) for ours, key in PUBLISHED_KEYS.items()}
        return FIXED_VALUES | sizes | {
            "cross_attention_dim": self.width, "out_channels": self.in_channels,
            "sample_size": self.sample_size or sample_size,
            "qk_norm": "rms_norm_across_heads" if self.qk_norm else None}


# ------------------------------------------------------------------------------------------------------------
# The network

def pointwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution with a kernel of one patch: on token-major x (B, P, in) it is a matrix product."""
    return F.linear(x, conv.weight.flatten(1), conv.bias)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm whose affine part, (B, 1, M) each, comes from the time."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with the kernel q·k in place of exp(q·k), for q, k >= 0 (SANA Eq. 1).

        out_i = sum_j (q_i·k_j) v_j / sum_j (q_i·k_j) = q_i (sum_j k_j^T v_j) / q_i·(sum_j k_j)

    The right side needs one d x d matrix per head for all tokens: O(P), where softmax pays O(P^2).
    q, k, v and the result are (B, h, P, d) fp32.
    """
    # a column of ones beside v: the same two products give numerator and denominator
    out = q @ (k.transpose(2, 3) @ F.pad(v, (0, 1), value=1.0))          # (B, h, P, d + 1)
    return out[..., :-1] / (out[..., -1:] + 1e-15)                       # (B, h, P, d)


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm in the dtype of its input: under autocast the weight's differs, and torch would leave its
    fused kernel. CUDA has one; elsewhere torch composes the norm of more steps than the lines below, and
    keeps an fp32 copy of x for the gradient."""

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        y = x * torch.rsqrt(norm.square() / x.shape[-1] + self.eps)      # (..., M) fp32
        return y.to(x.dtype) * self.weight.to(x.dtype)                   # (..., M)


class MLP(nn.Module):
    """Two linear layers, for the time and for the caption."""

    def __init__(self, in_width: int, width: int, activation: nn.Module) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_width, width)
        self.activation = activation
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.activation(self.linear_1(x)))


class TimeEmbed(nn.Module):
    """adaLN-single (PixArt-alpha): one projection of the time makes shift, scale and gate for all blocks, and
    each block adds a learnt table to them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.emb = nn.ModuleDict({"timestep_embedder": MLP(256, width, nn.SiLU())})
        self.linear = nn.Linear(width, 6 * width)

    def forward(self, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)
        angles = 1000 * t.float()[:, None] * frequencies                 # (B, 128)
        waves = torch.cat([angles.cos(), angles.sin()], dim=1)           # (B, 256) fp32
        e = self.emb["timestep_embedder"](waves.to(dtype))               # (B, M)
        return e, self.linear(F.silu(e)).unflatten(1, (6, -1))           # (B, M), (B, 6, M)


def sincos_positions(config: DiTConfig, grid: tuple[int, int], device: torch.device) -> Tensor:
    """Where each image token is, (P, M) fp32: sines and cosines of its column in the first half, of its row
    in the second. Whatever the grid, places run from 0 to base / scale: a larger picture has finer ones."""
    base, quarter = config.sample_size // config.patch_size, config.width // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64, device=device) / quarter)
    waves = []
    for side in grid:
        place = torch.arange(side, dtype=torch.float64, device=device) * (base / side)
        angles = place[:, None] / config.interpolation_scale * frequencies           # (side, M/4)
        waves.append(torch.cat([angles.sin(), angles.cos()], dim=1).float())         # (side, M/2)
    rows, columns = waves
    rows, columns = rows[:, None].expand(-1, grid[1], -1), columns.expand(grid[0], -1, -1)
    return torch.cat([columns, rows], dim=2).flatten(0, 1)                           # (P, M)


class Attention(nn.Module):
    """The layers that both kinds of attention have; qk-norm runs over the whole width, all heads together."""

    def __init__(self, width: int, head_dim: int, qk_norm: bool, bias: bool) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_k = nn.Linear(width, width, bias=bias)
        self.to_v = nn.Linear(width, width, bias=bias)
        self.norm_q = RMSNorm(width, eps=1e-5) if qk_norm else nn.Identity()
        self.norm_k = RMSNorm(width, eps=1e-5) if qk_norm else nn.Identity()
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, self.head_dim))                       # (B, P, M) -> (B, P, h, d)


class LinearAttention(Attention):
    """Self-attention of the image tokens: ReLU kernel, no softmax, no scale, and no positions."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.norm_q(self.to_q(x)), self.norm_k(self.to_k(x)), self.to_v(x)         # (B, P, M) each
        dtype = v.dtype
        # one copy each makes them fp32 and head-major, as the products want them; only then relu, whose
        # result is the same tensor that the products keep for the gradient
        q, k, v = (self.heads(y).transpose(1, 2).to(torch.float32, memory_format=DENSE) for y in (q, k, v))
        with torch.autocast(x.device.type, enabled=False):  # a sum over P tokens is too long for bf16
            out = linear_attention(F.relu(q), F.relu(k), v)              # (B, h, P, d) fp32
        return self.to_out(out.transpose(1, 2).to(dtype, memory_format=DENSE).flatten(2))        # (B, P, M)


class CrossAttention(Attention):
    """Softmax attention from image tokens to condition tokens. Keys and values depend neither on x nor on t,
    so kv() makes them once for a whole sampling run."""

    def kv(self, c: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self.heads(self.norm_k(self.to_k(c))), self.heads(self.to_v(c))
        return k.transpose(1, 2), v.transpose(1, 2)                      # (B/G, h, N, d) each

    def forward(self, x: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        # the G images of a condition queue up as G P queries of one attention: no copies of k and v
        q = self.norm_q(self.to_q(x)).reshape(len(k), -1, x.shape[2])    # (B/G, G P, M)
        out = F.scaled_dot_product_attention(self.heads(q).transpose(1, 2), k, v, attn_mask=bias)
        return self.to_out(out.transpose(1, 2).reshape(x.shape))         # (B, P, M)


def as_image(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens (B, P, R) read as an image (B, R, H/p, W/p) in channels-last memory format: a view."""
    return x.unflatten(1, grid).permute(0, 3, 1, 2)


def as_tokens(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).flatten(1, 2)                           # (B, P, R), a view


class Gated(torch.autograd.Function):
    """gated() with one wide tensor kept for the backward pass, y, from which it computes the others again.

    By hand, and not by torch's checkpoint, whose bookkeeping takes the processor that starts the kernels
    1.5 ms a block and more, this 0.6 (H100, 2 pictures of 1,024 tokens; no difference from 8 pictures on).
    With s = silu(y), [value, gate] = conv(s), h = value silu(gate) and out = h W^T:

        dh = dout W      dW = dout^T h      dvalue = dh silu(gate)      dgate = dh value silu'(gate)
    """

    @staticmethod
    def forward(ctx, y: Tensor, depth: Tensor, bias: Tensor, point: Tensor, grid: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(y, depth, bias, point)
        ctx.grid = grid
        return gated(y, depth, bias, point, grid)

    @staticmethod
    def backward(ctx, d_out: Tensor) -> tuple[Tensor | None, ...]:
        y, depth, bias, point = ctx.saved_tensors
        learns = ctx.needs_input_grad[1]                # false in stage 1, where the DiT is frozen
        s = F.silu(as_image(y, ctx.grid))                                            # (B, 2R, H/p, W/p)
        z = as_tokens(F.conv2d(s, depth, bias, padding=1, groups=len(depth)))        # (B, P, 2R)
        (value, gate), d_z = z.chunk(2, dim=2), torch.empty_like(z)                  # (B, P, R) each, views
        d_value, d_gate = d_z.chunk(2, dim=2)
        opened, d_h = F.silu(gate), d_out @ point                                    # (B, P, R) each
        torch.mul(d_h, opened, out=d_value)
        torch.ops.aten.silu_backward.grad_input(d_h.mul_(value), gate, grad_input=d_gate)
        h = opened.mul_(value)                                                       # (B, P, R)
        d_point = d_out.flatten(0, 1).T @ h.flatten(0, 1) if learns else None        # (M, R)
        del z, value, gate, opened, d_h, h              # before the convolution's gradient needs as much
        d_s, d_depth, d_bias = torch.ops.aten.convolution_backward(
            as_image(d_z, ctx.grid), s, depth, [len(depth)], [1, 1], [1, 1], [1, 1], False, [0, 0],
            len(depth), [True, learns, learns])
        del d_z, s
        d_y = torch.ops.aten.silu_backward(as_tokens(d_s), y)                        # (B, P, 2R)
        return d_y, d_depth, d_bias, d_point, None


def gated(y: Tensor, depth: Tensor, bias: Tensor, point: Tensor, grid: tuple[int, int]) -> Tensor:
    y = F.silu(as_image(y, grid))                                                    # (B, 2R, H/p, W/p)
    y = as_tokens(F.conv2d(y, depth, bias, padding=1, groups=len(depth)))            # (B, P, 2R)
    value, gate = y.chunk(2, dim=2)                                                  # (B, P, R) each
    return F.linear(value * F.silu(gate), point)                                     # (B, P, M)


class MixFFN(nn.Module):
    """Gated feed-forward with a 3x3 depthwise convolution: all that a token ever learns of its position.

    recompute = True keeps one wide tensor for the backward pass and computes the others from it again, which
    takes no matrix product: a third of a block's activations for one more pass over these tensors.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        M, R = config.width, int(config.mlp_ratio * config.width)
        self.conv_inverted = nn.Conv2d(M, 2 * R, 1)
        self.conv_depth = nn.Conv2d(2 * R, 2 * R, 3, padding=1, groups=2 * R)
        self.conv_point = nn.Conv2d(R, M, 1, bias=False)
        self.recompute = M >= 1024      # narrow models have memory to spare

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        depth, bias, point = self.conv_depth.weight, self.conv_depth.bias, self.conv_point.weight.flatten(1)
        # compiled, what is kept and what is computed again is the compiler's choice
        if self.recompute and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            y = pointwise(self.conv_inverted, x)                                     # (B, P, 2R)
            return Gated.apply(y, depth.to(y.dtype), bias.to(y.dtype), point.to(y.dtype), grid)
        # the wide tensor gets no name: that would keep it alive beside two others in sampling
        return gated(pointwise(self.conv_inverted, x), depth, bias, point, grid)     # (B, P, M)


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
        table = self.scale_shift_table + modulation                                  # (B, 6, M)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = table.split(1, dim=1)   # (B, 1, M) each
        x = torch.addcmul(x, gate_1, self.attn1(modulated_norm(x, shift_1, scale_1)))
        x = x + self.attn2(x, *kv)
        return torch.addcmul(x, gate_2, self.ff(modulated_norm(x, shift_2, scale_2), grid))


class DiT(nn.Module):
    """The SANA transformer: noisy latents, time and condition in, velocity out.

    gradient_checkpointing = True computes each block again in the backward pass: less memory, more time.
    A fresh DiT has torch's default weights, made to load a file into; to train from scratch, init_weights().
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        M, C, p = config.width, config.in_channels, config.patch_size
        self.config = config
        self.gradient_checkpointing = False
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(C, M, p, stride=p)})
        self.time_embed = TimeEmbed(M)
        self.caption_projection = MLP(config.caption_channels, M, nn.GELU("tanh"))
        self.caption_norm = RMSNorm(M, eps=1e-5)
        self.transformer_blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.scale_shift_table = nn.Parameter(torch.zeros(2, M))
        self.proj_out = nn.Linear(M, p * p * C)

    @property
    def dtype(self) -> torch.dtype:
        return self.proj_out.weight.dtype

    def cross_kv(self, c: Tensor, c_mask: Tensor | None = None) -> CrossKV:
        """All that the blocks need of a condition, computed once for many calls. Differentiable in c.

        c        (B/G, N, E)    any float dtype
        c_mask   (B/G, N)       1 keep, 0 drop; None keeps all
        Returns  per block (k, v), (B/G, h, N, d) each; with c_mask (k, v, bias), bias (B/G, 1, 1, N)
        """
        c = self.caption_norm(self.caption_projection(c.to(self.dtype)))             # (B/G, N, M)
        kv = [block.attn2.kv(c) for block in self.transformer_blocks]
        if c_mask is None:
            return kv
        # -10000 and not -inf, as published: a row that drops every token must not become NaN
        bias = (1 - c_mask[:, None, None, :].to(kv[0][0].dtype)) * -10000.0          # (B/G, 1, 1, N)
        return [(k, v, bias) for k, v in kv]

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None, c_mask: Tensor | None = None,
                kv: CrossKV | None = None) -> Tensor:
        """The velocity at x and t under condition c, or under kv = cross_kv(c, c_mask) shared by many calls.

        x        (B, C, H, W)   any float dtype; computed in that of the weights
        t        (B,)           time in [0, 1], 1 = noise
        c        (B/G, N, E)    row b is the condition of the images b G ... b G + G - 1; usually G = 1
        c_mask   (B/G, N)       1 keep, 0 drop; None keeps all
        Returns  (B, C, H, W)   in the dtype of the weights, or of autocast
        Raises   ValueError unless the condition comes one of the two ways, or if shapes do not fit.
        """
        if (c is None) == (kv is None) or (kv is not None and c_mask is not None):
            raise ValueError("DiT takes its condition as c and c_mask, or as kv = dit.cross_kv(c, c_mask)")
        kv = self.cross_kv(c, c_mask) if kv is None else kv
        grid = self.check_shapes(x, len(kv[0][0]))
        B, C, H, W = x.shape
        p = self.config.patch_size

        patches = F.pixel_unshuffle(x.to(self.dtype), p).flatten(2).transpose(1, 2)  # (B, P, C p p)
        x = pointwise(self.patch_embed["proj"], patches)                             # (B, P, M)
        if self.config.interpolation_scale is not None:
            x = (x + sincos_positions(self.config, grid, x.device)).to(x.dtype)      # (B, P, M)
        e, modulation = self.time_embed(t, self.dtype)                               # (B, M), (B, 6, M)
        for block, block_kv in zip(self.transformer_blocks, kv, strict=True):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, modulation, block_kv, grid, use_reentrant=False)
            else:
                x = block(x, modulation, block_kv, grid)                             # (B, P, M)
        shift, scale = (self.scale_shift_table + e[:, None]).split(1, dim=1)         # (B, 1, M) each
        v = self.proj_out(modulated_norm(x, shift, scale))                           # (B, P, p p C)
        v = v.view(B, *grid, p, p, C).permute(0, 5, 1, 3, 2, 4)                      # (B, C, H/p, p, W/p, p)
        return v.reshape(B, C, H, W)

    def check_shapes(self, x: Tensor, num_conditions: int) -> tuple[int, int]:
        """Returns (H/p, W/p), the grid of image tokens."""
        (B, C, H, W), p = x.shape, self.config.patch_size
        if C != self.config.in_channels or H % p or W % p:
            raise ValueError(f"latents must have {self.config.in_channels} channels and sides divisible by "
                             f"{p}, got {C} channels and {H} x {W}")
        if B % num_conditions:
            raise ValueError(f"{B} images cannot be shared out evenly among {num_conditions} conditions")
        return H // p, W // p

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw weights for training from scratch, as SANA does except where marked (*).

            matrices, 1x1 convolutions    Xavier uniform; (*) SANA leaves convolutions at torch's default
            depthwise convolutions        uniform +-1/3, torch's default
            biases                        0
            time and caption embedders    normal, std 0.02: every t starts with nearly the same modulation
            scale_shift_table             normal, std 1/sqrt(M): gates near 0, blocks start near the identity
            RMSNorm weights               1; (*) SANA starts caption_norm at 0.01
            proj_out                      0; (*) as in DiT: the first prediction is 0 and not noise
        """
        for module in self.modules():
            if isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
            elif isinstance(module, nn.Conv2d) and module.groups > 1:
                nn.init.uniform_(module.weight, -1 / 3, 1 / 3, generator=generator)
            elif isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1), generator=generator)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        for mlp in (self.time_embed.emb["timestep_embedder"], self.caption_projection):
            nn.init.normal_(mlp.linear_1.weight, std=0.02, generator=generator)
            nn.init.normal_(mlp.linear_2.weight, std=0.02, generator=generator)
        nn.init.normal_(self.time_embed.linear.weight, std=0.02, generator=generator)
        for module in (self, *self.transformer_blocks):
            nn.init.normal_(module.scale_shift_table, std=self.config.width ** -0.5, generator=generator)
        nn.init.zeros_(self.proj_out.weight)


# ------------------------------------------------------------------------------------------------------------
# The flow: training loss and deterministic sampling

def randn(shape: tuple[int, ...], generator: Generators, device: torch.device | str) -> Tensor:
    """Standard normal fp32 numbers, drawn where the generator lives, then moved: a CPU generator gives the
    same numbers on every device. With a list of shape[0] generators row b comes from generator[b] alone, so
    an image's noise does not depend on its batch. Raises ValueError if the list has another length.
    """
    if isinstance(generator, list):
        if len(generator) != shape[0]:
            raise ValueError(f"expected one generator for each of {shape[0]} rows, got {len(generator)}")
        return torch.cat([randn((1, *shape[1:]), g, device) for g in generator])
    source = device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=source).to(device)


def flow_matching_loss(dit: nn.Module, x0: Tensor, c: Tensor, t: Tensor | None = None,
                       noise: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
    """The training loss: (dit(x_t, t, c) - (noise - x0))^2, mean over all elements (2209.03003 Eq. 1).

    x0       (B, C, H, W)   clean latents
    c        (B/G, N, E)    conditions
    t        (B,)           times; None draws k / 1000, k uniform in 1 ... 1000, as ParaUni and OpenUni do
    noise    (B, C, H, W)   None draws it, after t
    Returns a scalar, fp32.
    """
    if t is None:
        source = x0.device if generator is None else generator.device
        t = torch.randint(1, 1001, (len(x0),), generator=generator, device=source).to(x0.device) / 1000
    if noise is None:
        noise = randn(x0.shape, generator, x0.device)
    x0, s = x0.float(), t[:, None, None, None]
    v = dit((1 - s) * x0 + s * noise, t, c)                              # (B, C, H, W)
    return F.mse_loss(v.float(), noise - x0)


def guided_velocity(dit: nn.Module, x: Tensor, t: Tensor, kv: CrossKV, guidance_scale: float) -> Tensor:
    """Classifier-free guidance: v_uncond + guidance_scale (v_cond - v_uncond). Differentiable in x and kv.

    x, t     (B, C, H, W), (B,)
    kv       dit.cross_kv(torch.cat([c_uncond, c])), both of the same batch size, the unconditional one first;
             where guidance_scale <= 1, which means no guidance, dit.cross_kv(c)
    Returns  (B, C, H, W) fp32. Both halves run as one batch of 2B and are combined in fp32.
    """
    if guidance_scale <= 1:
        return dit(x, t, kv=kv).float()
    if len(kv[0][0]) % 2:
        raise ValueError("guidance_scale > 1 needs kv = dit.cross_kv(torch.cat([c_uncond, c])), "
                         f"an even number of conditions, got {len(kv[0][0])}")
    v = dit(torch.cat([x, x]), torch.cat([t, t]), kv=kv).float()         # (2B, C, H, W)
    v_uncond, v_cond = v.chunk(2)                                        # (B, C, H, W) each
    return v_uncond + guidance_scale * (v_cond - v_uncond)


def shift_time(u: Tensor, shift: float) -> Tensor:
    """Push times towards noise; larger latents need more noise to hide their content (2403.03206 Eq. 23)."""
    return shift * u / (1 + (shift - 1) * u)


def dpm_grid(num_steps: int, shift: float) -> tuple[Tensor, Tensor]:
    """Times of the published SANA sampler (DPMSolverMultistepScheduler with flow sigmas).

    Returns  sigmas (num_steps + 1,) fp32, descending, the last one 0: what the update uses, and
             t      (num_steps,) fp32, sigmas truncated to thousandths as published: what the network sees.
    Trap: the first sigma is 0.9997, not 1. Good for the ODE; sde_step wants euler_grid.
    """
    check_grid(num_steps, shift)
    u = 1 - torch.linspace(1, 0.001, num_steps + 1, dtype=torch.float64)
    sigmas = shift_time(u, shift).flip(0)                                # (num_steps + 1,)
    return sigmas.float(), ((1000 * sigmas[:-1]).trunc() / 1000).float()


def euler_grid(num_steps: int, shift: float) -> tuple[Tensor, Tensor]:
    """Times of FlowMatchEulerDiscreteScheduler, from exactly 1. Returns (sigmas, t) as dpm_grid does.

    Trap, kept to be equal: the lower end 1/1000 is shifted twice; with shift 3 the last step is 0.0089 -> 0.
    """
    check_grid(num_steps, shift)
    lowest = shift_time(torch.tensor(0.001), shift).item()
    u = torch.linspace(1, lowest, num_steps, dtype=torch.float64)
    t = shift_time(u, shift).float()                                     # (num_steps,)
    return F.pad(t, (0, 1)), t


def check_grid(num_steps: int, shift: float) -> None:
    if num_steps < 1 or shift <= 0:
        raise ValueError(f"a time grid needs num_steps >= 1 and shift > 0, got {num_steps} and {shift}")


def dpm_step(x: Tensor, x0: Tensor, x0_prev: Tensor | None,
             sigma_prev: float, sigma: float, sigma_next: float) -> Tensor:
    """One step of DPM-Solver++ 2M (2211.01095 Alg. 2) in terms of the flow, alpha = 1 - sigma.

    x is alpha x0 + sigma noise. Solve that for the noise and mix again at sigma_next:

        x_next = (sigma_next / sigma) x + (alpha_next - alpha sigma_next / sigma) x0

    which is exact as long as x0 does not change. Second order: from the last two estimates of x0, extrapolate
    half a step ahead in lambda = log(alpha / sigma). The first step (no x0_prev) and the last do without.
    """
    if x0_prev is not None and sigma_next > 0:
        lam_prev, lam, lam_next = (math.log((1 - s) / s) for s in (sigma_prev, sigma, sigma_next))
        x0 = x0 + (x0 - x0_prev) * (0.5 * (lam_next - lam) / (lam - lam_prev))
    ratio = sigma_next / sigma
    return ratio * x + ((1 - sigma_next) - (1 - sigma) * ratio) * x0


@torch.no_grad()
def sample_ode(dit: nn.Module, noise: Tensor, c: Tensor, c_uncond: Tensor | None, num_steps: int = 20,
               guidance_scale: float = 4.5, shift: float = 3.0, solver: str = "dpm++") -> Tensor:
    """Integrate dx/dt = v from noise at t = 1 to latents of images at t = 0.

    noise    (B, C, H, W)       standard normal
    c        (B/G, N, E)        row b is the condition of the images b G ... b G + G - 1; usually G = 1
    c_uncond (B/G or 1, N, E)   the condition of "no prompt"; may be None where guidance_scale <= 1
    solver   "dpm++" is second order and the published default; "euler" walks the grid that sde_step walks
    Returns  (B, C, H, W) fp32.
    Raises   ValueError for an unknown solver, and if c_uncond is missing or does not fit c.
    """
    if solver not in ("dpm++", "euler"):
        raise ValueError(f'solver must be "dpm++" or "euler", got {solver!r}')
    if guidance_scale > 1:
        c = torch.cat([expand_uncond(c_uncond, c), c])                   # (2B/G, N, E)
    kv = dit.cross_kv(c)
    sigmas, times = dpm_grid(num_steps, shift) if solver == "dpm++" else euler_grid(num_steps, shift)
    sigmas, times = sigmas.tolist(), times.to(noise.device)

    x, x0_prev = noise.float(), None
    for i in range(num_steps):
        v = guided_velocity(dit, x, times[i].expand(len(x)), kv, guidance_scale)     # (B, C, H, W)
        if solver == "euler":
            x = x + (sigmas[i + 1] - sigmas[i]) * v
        else:
            x0 = x - sigmas[i] * v
            x, x0_prev = dpm_step(x, x0, x0_prev, sigmas[i - 1], sigmas[i], sigmas[i + 1]), x0
    return x


def expand_uncond(c_uncond: Tensor | None, c: Tensor) -> Tensor:
    """c_uncond in the batch size of c; ValueError where the two cannot run as one batch."""
    shape = None if c_uncond is None else tuple(c_uncond.shape)
    if shape not in (tuple(c.shape), (1, *c.shape[1:])):
        raise ValueError(f"guidance_scale > 1 needs c_uncond in the shape of c, {tuple(c.shape)}, or with "
                         f"one row, got {shape}; pass guidance_scale=1 for no guidance")
    return c_uncond.expand_as(c)


# ------------------------------------------------------------------------------------------------------------
# The stochastic step

def sde_step(x: Tensor, v: Tensor, t: Tensor, t_next: Tensor, noise_level: float,
             x_next: Tensor | None = None, generator: Generators = None,
             ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One reverse step of the flow SDE from t to t_next < t, and its log-likelihood (ParaUni Eq. 3).

        x_next = x + [v + sigma^2 / (2t) (x + (1 - t) v)] dt + sigma sqrt(-dt) eps        dt = t_next - t < 0

    Where it comes from: since x = (1 - t) x0 + t eps and v = E[eps - x0 | x], the sum x + (1 - t) v is the
    expected noise E[eps | x], and -1/t times it the score of p_t. Fresh noise of variance sigma^2 |dt| widens
    p_t; the drift sigma^2/2 score |dt| narrows it by as much. So every sigma has the marginals of the ODE.

    x, v        (B, C, H, W)   latents, and velocity = noise - data; computed in fp32
    t, t_next   (B,)           time in [0, 1], 1 = noise; kept on the CPU they cost no GPU synchronisation
    noise_level a in sigma = a sqrt(t / (1 - t)). That diverges at t = 1, so there 1 - t_next replaces 1 - t,
                as in Flow-GRPO, and the std of that step is a, whatever t_next is. No help for t just below
                1, where it is a sqrt(t (t - t_next) / (1 - t)): use euler_grid, which starts at 1
    x_next      (B, C, H, W)   a stored sample to score; None draws one
    generator   one for all, or a list of B (see randn)
    Returns     x_next (B, C, H, W); log_prob (B,) in nats; mean (B, C, H, W); std (B,)
                log_prob is differentiable in x and v; a drawn x_next is a constant, as policy gradients want.
                noise_level 0 is the Euler step: std 0, and log_prob 0 by definition, as there is no density.
    Raises      ValueError unless 0 <= t_next < t <= 1 everywhere and noise_level >= 0.
    Differs from the paper: log_prob is the mean over C*H*W, not the sum, so clip_range is per element.
    """
    if noise_level < 0:
        raise ValueError(f"noise_level must be >= 0, got {noise_level}")
    if not ((0 <= t_next) & (t_next < t) & (t <= 1)).all():
        raise ValueError(f"expected 0 <= t_next < t <= 1, got t = {t.tolist()}, t_next = {t_next.tolist()}")
    x, v = x.float(), v.float()
    t, t_next = (s.to(x.device, torch.float32)[:, None, None, None] for s in (t, t_next))
    dt = t_next - t                                                              # (B, 1, 1, 1)
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
