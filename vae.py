"""DC-AE, the deep-compression autoencoder of SANA (Chen et al., arXiv:2410.10733): image to latents and back.

    encode   image -> conv_in -> stages 0 .. S-1, halving between them -> conv_out + shortcut -> latents
    decode   latents -> conv_in + shortcut -> stages S-1 .. 0, doubling between them -> conv_out -> image

Deterministic: no sampling, no mean and variance. One trick carries the rest: every change of resolution has
a shortcut without parameters that moves pixels into channels (or back), so the convolution beside it only
learns a residual. That is what lets it reconstruct at 32x compression.

Parameters are named as in the published safetensors. Left out: tiling, and what only other DC-AEs have.

Letters  B batch   C channels of a stage (Ci in, Co out)   H W height and width there   N = H W positions
         S stages   Z latent channels   f = 2^(S-1) compression   d attention_head_dim   h heads, all scales
Layout   Tensors have the shape (B, C, H, W) but lie in memory channels-last: the norms and the linear maps
         act on the C numbers of one pixel, which are then neighbours.
Memory   What no gradient asks for is overwritten in place: at 512 px a tensor of the finest stage has 134 MB
         in fp32, and on a CPU the pages of a fresh one cost several times the arithmetic.
"""
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# ---- configuration

@dataclass(frozen=True)
class DCAEConfig:
    """Fields of a published vae/config.json; the defaults are dc-ae-f32c32-sana-1.1, the VAE of SANA-1.5.
    Tuples run from the finest stage (the image's own resolution) to the coarsest, in the decoder too."""
    in_channels: int = 3
    latent_channels: int = 32
    attention_head_dim: int = 32
    encoder_block_types: tuple[str, ...] = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    decoder_block_types: tuple[str, ...] = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    encoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    decoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    encoder_layers_per_block: tuple[int, ...] = (2, 2, 2, 3, 3, 3)
    decoder_layers_per_block: tuple[int, ...] = (3, 3, 3, 3, 3, 3)
    encoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))  # kernel sizes
    decoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))
    scaling_factor: float = 0.41407                         # 1 / root mean square of the raw latents


# ---- blocks, each with its residual inside

def silu(x: Tensor) -> Tensor:
    return F.silu(x, inplace=not torch.is_grad_enabled())


class RMSNorm(nn.Module):
    """Root-mean-square norm over the channels of each pixel, with weight and bias (unlike most RMSNorms).
    Every norm but the last ends a residual branch: `skip` is what its result is added to."""

    def __init__(self, C: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(C))
        self.bias = nn.Parameter(torch.zeros(C))

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        pixels = x.movedim(1, -1)                                               # (B, H, W, C)
        # the norm in one pass over the picture: squares in a tensor of their own would double the time
        norm = torch.linalg.vector_norm(pixels, dim=-1, keepdim=True, dtype=torch.float32)
        y = pixels * torch.rsqrt(norm.square() / x.shape[1] + 1e-5)             # (B, H, W, C) fp32
        # bf16 rounds here, before the weight, in the published model
        y = y.to(self.weight.dtype)
        y = torch.addcmul(self.bias, y, self.weight, out=None if torch.is_grad_enabled() else y)
        if skip is not None:
            y = y.add_(skip.movedim(1, -1))
        return y.movedim(-1, 1)                                                 # (B, C, H, W)


class ResBlock(nn.Module):
    """x + RMSNorm(conv2(SiLU(conv1 x)))."""

    def __init__(self, C: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(C, C, 3, padding=1)
        self.conv2 = nn.Conv2d(C, C, 3, padding=1, bias=False)
        self.norm = RMSNorm(C)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv2(silu(self.conv1(x))), skip=x)               # (B, C, H, W)


class LinearAttention(nn.Module):
    """Multi-scale ReLU linear attention: cost grows with N, not N^2, and there is no softmax and no scale."""

    def __init__(self, C: int, d: int, kernels: tuple[int, ...]) -> None:
        super().__init__()
        self.d = d
        self.to_q = nn.Linear(C, C, bias=False)
        self.to_k = nn.Linear(C, C, bias=False)
        self.to_v = nn.Linear(C, C, bias=False)
        # one more scale of q, k, v: a depthwise convolution, then a mix within each group of d channels
        self.to_qkv_multiscale = nn.ModuleList(nn.Sequential(OrderedDict(
            proj_in=nn.Conv2d(3 * C, 3 * C, kernel, padding=kernel // 2, groups=3 * C, bias=False),
            proj_out=nn.Conv2d(3 * C, 3 * C, 1, groups=3 * C // d, bias=False))) for kernel in kernels)
        self.to_out = nn.Linear(C * (1 + len(kernels)), C, bias=False)
        self.norm_out = RMSNorm(C)

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        # one product for all three: joining the matrices moves less memory than joining the results
        weight = torch.cat([self.to_q.weight, self.to_k.weight, self.to_v.weight])
        qkv = F.linear(x.movedim(1, -1), weight).movedim(-1, 1)                 # (B, 3C, H, W)
        scales = [scale(qkv) for scale in self.to_qkv_multiscale]
        qkv = torch.cat([qkv, *scales], dim=1)                                  # (B, 3dh, H, W)

        # Trap: to_q, to_k, to_v are not query, key and value. They are thirds of one matrix whose outputs are
        # cut into consecutive chunks of 3d channels, and each chunk is one head: its query, key and value.
        heads = qkv.movedim(1, -1).reshape(B, H * W, -1, 3, self.d)             # (B, N, h, 3, d)
        q, k, v = heads.permute(3, 0, 2, 1, 4).unbind()                         # (B, h, N, d) each
        out = relu_attention(q, k, v).transpose(1, 2).reshape(B, H, W, -1)      # (B, H, W, dh) fp32
        out = self.to_out(out.to(qkv.dtype)).movedim(-1, 1)                     # (B, C, H, W)
        return self.norm_out(out, skip=x)                                       # (B, C, H, W)


def relu_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """out_n = sum_m (q_n . k_m) v_m / sum_m (q_n . k_m), q and k after ReLU; all (B, h, N, d), out in fp32.

    In fp32 under autocast too: the sums run over all N positions, thousands in a large image. Where N <= d
    the published model multiplies in the other order, (q k^T) v: the same quotient, so one order serves here.
    """
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = F.relu(q.float()), F.relu(k.float()), v.float()
        top = q @ (k.transpose(-1, -2) @ v)                                     # (B, h, N, d)
        bottom = q @ k.sum(-2, keepdim=True).transpose(-1, -2)                  # (B, h, N, 1)
        return top / (bottom + 1e-15)


class GLUMBConv(nn.Module):
    """The feed-forward: 1x1 conv up to 8C, 3x3 depthwise conv, gate, 1x1 conv back, norm, plus the input."""

    def __init__(self, C: int) -> None:
        super().__init__()
        self.conv_inverted = nn.Conv2d(C, 8 * C, 1)
        self.conv_depth = nn.Conv2d(8 * C, 8 * C, 3, padding=1, groups=8 * C)
        self.conv_point = nn.Conv2d(4 * C, C, 1, bias=False)
        self.norm = RMSNorm(C)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv_depth(silu(self.conv_inverted(x)))                        # (B, 8C, H, W)
        value, gate = y.chunk(2, dim=1)                                         # (B, 4C, H, W) each
        return self.norm(self.conv_point(value * silu(gate)), skip=x)           # (B, C, H, W)


def make_blocks(kind: str, C: int, num: int, kernels: tuple[int, ...], d: int) -> list[nn.Module]:
    """The blocks of one stage."""
    if kind == "ResBlock":
        return [ResBlock(C) for _ in range(num)]
    # attention across the picture, then a convolutional feed-forward
    assert kind == "EfficientViTBlock", kind
    return [nn.Sequential(OrderedDict(attn=LinearAttention(C, d, kernels), conv_out=GLUMBConv(C)))
            for _ in range(num)]


# ---- changes of resolution

def group_mean(x: Tensor, Co: int) -> Tensor:
    """(B, Ci, H, W) -> (B, Co, H, W): the mean of Ci / Co consecutive channels."""
    return x.unflatten(1, (Co, -1)).mean(2)


class Down(nn.Module):
    """Half the resolution: a convolution, plus the 4 Ci numbers of each 2x2 patch averaged down to Co."""

    def __init__(self, Ci: int, Co: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(Ci, Co, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)                                                        # (B, Co, H/2, W/2)
        return y + group_mean(F.pixel_unshuffle(x, 2), y.shape[1])              # (B, Co, H/2, W/2)


class Up(nn.Module):
    """Twice the resolution: every pixel doubled and a convolution, plus each channel repeated n = 4 Co / Ci
    times and laid out as 2x2 patches."""

    def __init__(self, Ci: int, Co: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(Ci, Co, 3, padding=1)
        # pixel (i, j) of the patch of channel c shows channel (4c + 2i + j) // n of the input: a patch has
        # one value, one for each row, or four
        self.patch = {4: (1, 1), 2: (2, 1), 1: (2, 2)}[4 * Co // Ci]

    def forward(self, x: Tensor) -> Tensor:
        kernel = doubling_kernel(self.conv.weight)                              # (Ci, Co, 4, 4)
        y = F.conv_transpose2d(x, kernel, self.conv.bias, stride=2, padding=1)  # (B, Co, 2H, 2W)
        # both sides of the sum are views: no large tensor but y
        shortcut = x.unflatten(1, (-1, *self.patch))                            # (B, Co, 1|2, 1|2, H, W)
        shortcut = shortcut.permute(0, 1, 4, 2, 5, 3)                           # (B, Co, H, 1|2, W, 1|2)
        y.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).add_(shortcut)            # (B, Co, H, 2, W, 2)
        return y                                                                # (B, Co, 2H, 2W)


def doubling_kernel(weight: Tensor) -> Tensor:
    """Of a 3x3 convolution that follows a doubling of every pixel: the same as one transposed convolution of
    stride 2, with 4 products for 9 and without the large picture between.

    Output pixel o reads u[o + i] with weight w[i], i = -1 .. 1, of u[p] = x[p // 2]; so x[h] meets the sum of
    those w[i] with o + i in {2h, 2h + 1}. weight (Co, Ci, 3, 3); returns (Ci, Co, 4, 4).
    """
    w = F.pad(weight.float().flip(2, 3), (1, 1, 1, 1))                          # (Co, Ci, 5, 5)
    w = w[:, :, :-1] + w[:, :, 1:]                                              # (Co, Ci, 4, 5)
    w = w[..., :-1] + w[..., 1:]                                                # (Co, Ci, 4, 4)
    return w.transpose(0, 1).to(weight.dtype)                                   # (Ci, Co, 4, 4)


# ---- the network

class Encoder(nn.Module):
    def __init__(self, config: DCAEConfig) -> None:
        super().__init__()
        widths = config.encoder_block_out_channels
        self.Z = config.latent_channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.Sequential()
        stages = zip(config.encoder_block_types, widths, config.encoder_layers_per_block,
                     config.encoder_qkv_multiscales, strict=True)
        for i, stage in enumerate(stages):
            blocks = make_blocks(*stage, config.attention_head_dim)
            if i < len(widths) - 1:
                blocks.append(Down(widths[i], widths[i + 1]))
            self.down_blocks.append(nn.Sequential(*blocks))
        self.conv_out = nn.Conv2d(widths[-1], self.Z, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down_blocks(self.conv_in(x))                                   # (B, C, H, W)
        return self.conv_out(x) + group_mean(x, self.Z)                         # (B, Z, H, W)


class Decoder(nn.Module):
    def __init__(self, config: DCAEConfig) -> None:
        super().__init__()
        widths = config.decoder_block_out_channels
        self.repeats = widths[-1] // config.latent_channels
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.up_blocks = nn.ModuleList()
        stages = zip(config.decoder_block_types, widths, config.decoder_layers_per_block,
                     config.decoder_qkv_multiscales, strict=True)
        for i, stage in enumerate(stages):
            blocks = make_blocks(*stage, config.attention_head_dim)
            if i < len(widths) - 1:
                blocks.insert(0, Up(widths[i + 1], widths[i]))
            self.up_blocks.append(nn.Sequential(*blocks))
        self.norm_out = RMSNorm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.in_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_in(z) + z.repeat_interleave(self.repeats, dim=1)          # (B, C, H, W)
        # the stages are stored finest first
        for stage in reversed(self.up_blocks):
            x = stage(x)                                                        # (B, C, H, W)
        x = F.relu(self.norm_out(x), inplace=not torch.is_grad_enabled())       # (B, C, H, W)
        return self.conv_out(x)                                                 # (B, in_channels, H, W)


class DCAE(nn.Module):
    """The autoencoder. Its latents are always scaled (mean square about 1), as a diffusion model wants them.
    Any float dtype goes in; that of the weights comes out, or autocast's, contiguous."""

    def __init__(self, config: DCAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.conv_in.weight.dtype

    def encode(self, images: Tensor) -> Tensor:
        """images (B, in_channels, H, W) in [-1, 1], sides divisible by f -> latents (B, Z, H/f, W/f)."""
        images = images.to(self.dtype, memory_format=torch.channels_last)       # (B, in_channels, H, W)
        z = self.encoder(images) * self.config.scaling_factor                   # (B, Z, H/f, W/f)
        return z.contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        """latents (B, Z, H, W) as of encode -> images (B, in_channels, H f, W f), not clamped."""
        z = latents.to(self.dtype, memory_format=torch.channels_last)           # (B, Z, H, W)
        return self.decoder(z / self.config.scaling_factor).contiguous()        # (B, in_channels, H f, W f)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Fresh weights for training from scratch: uniform within 1 / sqrt(fan_in), biases zero; norms stay.
        Drawn on the CPU whatever the model's device, so that a seed means the same weights everywhere."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                bound = module.weight[0].numel() ** -0.5
                uniform = torch.rand(module.weight.shape, generator=generator)
                module.weight.copy_((uniform * 2 - 1) * bound)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
