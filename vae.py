"""DC-AE, the deep-compression autoencoder of SANA (Chen et al., arXiv:2410.10733): image to latents and back.

Deterministic: no sampling, no mean and variance. One trick carries the rest: every change of resolution has
a shortcut without parameters that moves pixels into channels (or back), so the convolution beside it only
learns a residual. That is what lets it reconstruct at 32x compression.

    encode   image -> conv_in -> stages 0 .. S-1, halving between them -> conv_out (+ shortcut) -> latents
    decode   latents -> conv_in (+ shortcut) -> stages S-1 .. 0, doubling between them -> conv_out -> image

Parameters are named as in the published safetensors, which load strictly and without a conversion table.
Left out: tiling; and, refused by name, batch norm and stages without layers, which other DC-AEs have.
About a third of this file is the published config and the sentences for what it cannot be.

Letters in the shape comments:
    B batch    C channels of a stage (Ci in, Co out)    H W height and width there    N = H*W positions
    S stages   Z latent channels   f compression   d attention_head_dim   G heads of d channels, all scales
Inside the network tensors have the shape (B, C, H, W) but lie in memory channels-last: the norms and the
linear maps act on the C numbers of one pixel, which are then neighbours.
"""

import math
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# ---------------------------------------------------------------------------------------------------- config

CHOICES = {"encoder_block_types": ("ResBlock", "EfficientViTBlock"),
           "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
           "downsample_block_type": ("Conv", "conv", "pixel_unshuffle"),
           "upsample_block_type": ("interpolate", "pixel_shuffle"),
           "decoder_norm_types": ("rms_norm",),
           "decoder_act_fns": ("silu", "relu"),
           "decoder_conv_act_fn": ("silu", "relu")}
PER_STAGE = ("encoder_block_types", "encoder_block_out_channels", "encoder_layers_per_block",
             "encoder_qkv_multiscales", "decoder_block_types", "decoder_block_out_channels",
             "decoder_layers_per_block", "decoder_qkv_multiscales", "decoder_norm_types", "decoder_act_fns")
# The published files do not have these three keys, and mean the defaults below.
OFTEN_ABSENT = ("encoder_out_shortcut", "decoder_in_shortcut", "decoder_conv_act_fn")


@dataclass(frozen=True)
class DCAEConfig:
    """Fields of a published vae/config.json; the defaults are dc-ae-f32c32-sana-1.1, the VAE of SANA-1.5.

    Per-stage tuples run from the finest stage (the image's own resolution) to the coarsest, decoder included.
    Block types, norms and activations may be one name for all stages. The encoder always has rms_norm, silu.
    """
    in_channels: int = 3
    latent_channels: int = 32
    attention_head_dim: int = 32
    encoder_block_types: str | tuple[str, ...] = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    decoder_block_types: str | tuple[str, ...] = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    encoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    decoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    encoder_layers_per_block: tuple[int, ...] = (2, 2, 2, 3, 3, 3)
    decoder_layers_per_block: tuple[int, ...] = (3, 3, 3, 3, 3, 3)
    encoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))  # kernel sizes
    decoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))
    downsample_block_type: str = "Conv"
    upsample_block_type: str = "interpolate"
    decoder_norm_types: str | tuple[str, ...] = "rms_norm"
    decoder_act_fns: str | tuple[str, ...] = "silu"
    scaling_factor: float = 0.41407                         # 1 / root mean square of the raw latents
    encoder_out_shortcut: bool = True
    decoder_in_shortcut: bool = True
    decoder_conv_act_fn: str = "relu"

    def __post_init__(self) -> None:
        S = len(self.encoder_block_out_channels)
        for name in PER_STAGE:
            value = getattr(self, name)
            if not isinstance(value, str) and len(value) != S:
                raise ValueError(f"{name} needs one entry for each of the {S} stages of "
                                 f"encoder_block_out_channels, got {len(value)}: {value}")
        for name, known in CHOICES.items():
            for entry in per_stage(getattr(self, name), 1):
                if entry not in known:
                    raise ValueError(f"{name} {entry!r} is not implemented; choose from {', '.join(known)}")
        if self.scaling_factor <= 0:
            raise ValueError(f"scaling_factor must be positive, got {self.scaling_factor}")
        unshuffle = self.downsample_block_type == "pixel_unshuffle"
        self._check_side("encoder", self.encoder_out_shortcut, unshuffle)
        self._check_side("decoder", self.decoder_in_shortcut, False)

    def _check_side(self, side: str, latent_shortcut: bool, unshuffle: bool) -> None:
        channels = getattr(self, f"{side}_block_out_channels")
        kinds, layers, kernels = (getattr(self, f"{side}_{name}")
                                  for name in ("block_types", "layers_per_block", "qkv_multiscales"))
        d, Z = self.attention_head_dim, self.latent_channels
        if min(layers) < 1:
            raise ValueError(f"{side}_layers_per_block: a stage of 0 layers is not implemented, got {layers}")
        if any(kernel % 2 == 0 for stage in kernels for kernel in stage):
            raise ValueError(f"{side}_qkv_multiscales: kernel sizes must be odd, got {kernels}")
        for C, kind in zip(channels, per_stage(kinds, len(channels))):
            if kind == "EfficientViTBlock" and C % d:
                raise ValueError(f"{side}_block_out_channels: {C} channels of an EfficientViTBlock stage are "
                                 f"not divisible by attention_head_dim {d}")
        for fine, coarse in zip(channels, channels[1:]):
            if 4 * fine % coarse or (unshuffle and coarse % 4):
                raise ValueError(f"{side}_block_out_channels: {fine} then {coarse} leave no whole groups for "
                                 "the shortcut; the second must divide 4 times the first"
                                 + (" and be divisible by 4 for pixel_unshuffle" if unshuffle else ""))
        if latent_shortcut and channels[-1] % Z:
            raise ValueError(f"{side}_block_out_channels: the last, {channels[-1]}, must be divisible by "
                             f"latent_channels {Z} for the {side}'s shortcut to the latents")

    @classmethod
    def from_json(cls, config: dict) -> "DCAEConfig":
        """A parsed vae/config.json. Keys starting with "_" are ignored, unknown or missing ones raise."""
        given = {key: value for key, value in config.items() if not key.startswith("_")}
        names = [field.name for field in fields(cls)]
        unknown = sorted(set(given) - set(names))
        missing = [name for name in names if name not in given and name not in OFTEN_ABSENT]
        if unknown or missing:
            raise ValueError(f"not the config of a DC-AE: unknown keys {unknown}, missing keys {missing}")
        return cls(**{key: to_tuple(value) for key, value in given.items()})

    def to_json(self) -> dict:
        """The fields as plain values; `from_json` makes an equal config of them, also after json.dumps."""
        return asdict(self)


def to_tuple(value: object) -> object:
    return tuple(to_tuple(v) for v in value) if isinstance(value, (list, tuple)) else value


def per_stage(value: str | tuple[str, ...], S: int) -> tuple[str, ...]:
    return (value,) * S if isinstance(value, str) else value


# ---------------------------------------------------------------------------------------------------- blocks

# What no gradient will ask for is overwritten in place: at 512 px a tensor of the finest stage has 134 MB in
# fp32, and on a CPU the pages of a fresh one cost several times the arithmetic.

def silu(x: Tensor) -> Tensor:
    return F.silu(x, inplace=not torch.is_grad_enabled())


def relu(x: Tensor) -> Tensor:
    return F.relu(x, inplace=not torch.is_grad_enabled())


ACTIVATIONS = {"silu": silu, "relu": relu}


class RMSNorm(nn.Module):
    """Root-mean-square norm over the channels of each pixel, with weight and bias (unlike most RMSNorms).
    Every norm but the last ends a residual branch: `skip` is what its result is added to."""

    def __init__(self, C: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(C))
        self.bias = nn.Parameter(torch.zeros(C))

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        pixels = x.movedim(1, -1)                                                 # (B, H, W, C)
        # the norm in one pass over the picture: squares in a tensor of their own would double the time
        norm = torch.linalg.vector_norm(pixels, dim=-1, keepdim=True, dtype=torch.float32)
        y = pixels * torch.rsqrt(norm.square() / x.shape[1] + 1e-5)               # (B, H, W, C) fp32
        y = y.to(self.weight.dtype)     # bf16 rounds here, before the weight, in the published model
        y = torch.addcmul(self.bias, y, self.weight, out=None if torch.is_grad_enabled() else y)
        return (y if skip is None else y.add_(skip.movedim(1, -1))).movedim(-1, 1)      # (B, C, H, W)


class ResBlock(nn.Module):
    """x + RMSNorm(conv2(act(conv1 x)))."""

    def __init__(self, C: int, act: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(C, C, 3, padding=1)
        self.conv2 = nn.Conv2d(C, C, 3, padding=1, bias=False)
        self.norm = RMSNorm(C)
        self.act = ACTIVATIONS[act]

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv2(self.act(self.conv1(x))), x)                  # (B, C, H, W)


class MultiscaleProjection(nn.Module):
    """One more scale of q, k, v: a depthwise convolution, then a mix within each group of d channels."""

    def __init__(self, channels: int, d: int, kernel: int) -> None:
        super().__init__()
        self.proj_in = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False)
        self.proj_out = nn.Conv2d(channels, channels, 1, groups=channels // d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_out(self.proj_in(x))                                     # (B, 3C, H, W)


class LinearAttention(nn.Module):
    """Multi-scale ReLU linear attention: cost grows with N, not N^2, and there is no softmax and no scale."""

    def __init__(self, C: int, d: int, kernels: tuple[int, ...]) -> None:
        super().__init__()
        self.d = d
        self.to_q = nn.Linear(C, C, bias=False)
        self.to_k = nn.Linear(C, C, bias=False)
        self.to_v = nn.Linear(C, C, bias=False)
        self.to_qkv_multiscale = nn.ModuleList(MultiscaleProjection(3 * C, d, kernel) for kernel in kernels)
        self.to_out = nn.Linear(C * (1 + len(kernels)), C, bias=False)
        self.norm_out = RMSNorm(C)

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        pixels = x.movedim(1, -1)                                                 # (B, H, W, C)
        weight = torch.cat([self.to_q.weight, self.to_k.weight, self.to_v.weight])      # smaller than outputs
        qkv = F.linear(pixels, weight).movedim(-1, 1)                             # (B, 3C, H, W)
        qkv = torch.cat([qkv, *(scale(qkv) for scale in self.to_qkv_multiscale)], dim=1)    # (B, 3dG, H, W)
        # Trap: to_q, to_k, to_v are not query, key and value. They are thirds of one matrix whose outputs are
        # cut into consecutive chunks of 3d channels, and each chunk is one head: its query, key and value.
        heads = qkv.movedim(1, -1).reshape(B, H * W, -1, 3, self.d)               # (B, N, G, 3, d)
        q, k, v = heads.permute(3, 0, 2, 1, 4).unbind()                           # (B, G, N, d) each
        out = relu_attention(q, k, v).transpose(1, 2).reshape(B, H, W, -1)        # (B, H, W, dG) fp32
        out = out.to(qkv.dtype)
        return self.norm_out(self.to_out(out).movedim(-1, 1), x)                  # (B, C, H, W)


def relu_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """out_n = sum_m (q_n . k_m) v_m / sum_m (q_n . k_m), q and k after ReLU; all (B, G, N, d), out in fp32.

    In fp32 under autocast too: the sums run over all N positions, thousands in a large image. Where N <= d
    the published model multiplies in the other order, (q k^T) v: the same quotient, so one order serves here.
    """
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = F.relu(q.float()), F.relu(k.float()), v.float()
        top = q @ (k.transpose(-1, -2) @ v)                                       # (B, G, N, d)
        bottom = q @ k.sum(-2, keepdim=True).transpose(-1, -2)                    # (B, G, N, 1)
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
        u, gate = self.conv_depth(silu(self.conv_inverted(x))).chunk(2, dim=1)    # (B, 4C, H, W) each
        return self.norm(self.conv_point(u * silu(gate)), x)                      # (B, C, H, W)


class EfficientViTBlock(nn.Module):
    """Attention across the picture, then a convolutional feed-forward; each adds to its input."""

    def __init__(self, C: int, d: int, kernels: tuple[int, ...]) -> None:
        super().__init__()
        self.attn = LinearAttention(C, d, kernels)
        self.conv_out = GLUMBConv(C)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(self.attn(x))                                        # (B, C, H, W)


def group_mean(x: Tensor, Co: int) -> Tensor:
    """(B, Ci, H, W) -> (B, Co, H, W): the mean of Ci / Co consecutive channels."""
    return x.unflatten(1, (Co, -1)).mean(2)


class Down(nn.Module):
    """Half the resolution: a convolution, plus the 4 Ci numbers of each 2x2 patch averaged down to Co."""

    def __init__(self, Ci: int, Co: int, unshuffle: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(Ci, Co // 4 if unshuffle else Co, 3, stride=1 if unshuffle else 2, padding=1)
        self.unshuffle = unshuffle
        self.Co = Co

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.unshuffle:
            y = F.pixel_unshuffle(y, 2)                                           # (B, Co, H/2, W/2)
        return y + group_mean(F.pixel_unshuffle(x, 2), self.Co)                   # (B, Co, H/2, W/2)


def doubling_kernel(weight: Tensor) -> Tensor:
    """Of a 3x3 convolution that follows a doubling of every pixel: the same as one transposed convolution of
    stride 2, with 4 products for 9 and without the large picture between.

    Output pixel o reads u[o + i] with weight w[i], i = -1 .. 1, of u[p] = x[p // 2]; so x[h] meets the sum of
    those w[i] with o + i in {2h, 2h + 1}. weight (Co, Ci, 3, 3); returns (Ci, Co, 4, 4).
    """
    w = F.pad(weight.float().flip(2, 3), (1, 1, 1, 1))                            # (Co, Ci, 5, 5)
    w = w[:, :, :-1] + w[:, :, 1:]                                                # (Co, Ci, 4, 5)
    return (w[..., :-1] + w[..., 1:]).transpose(0, 1).to(weight.dtype)            # (Ci, Co, 4, 4)


class Up(nn.Module):
    """Twice the resolution: a convolution, plus each channel repeated n = 4 Co / Ci times, as 2x2 patches."""

    def __init__(self, Ci: int, Co: int, shuffle: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(Ci, 4 * Co if shuffle else Co, 3, padding=1)
        self.shuffle = shuffle
        n, self.Co = 4 * Co // Ci, Co
        # pixel (i, j) of patch c shows channel (4c + 2i + j) // n: for n = 4, 2, 1 a view can say so
        self.patch = {4: (1, 1), 2: (2, 1), 1: (2, 2)}[math.gcd(n, 4)]
        self.repeats = n // math.gcd(n, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.shuffle:
            y = F.pixel_shuffle(self.conv(x), 2)                                  # (B, Co, 2H, 2W)
        else:
            kernel = doubling_kernel(self.conv.weight)                            # (Ci, Co, 4, 4)
            y = F.conv_transpose2d(x, kernel, self.conv.bias, stride=2, padding=1)         # (B, Co, 2H, 2W)
        if self.repeats > 1:
            x = x.repeat_interleave(self.repeats, dim=1)
        skip = x.unflatten(1, (self.Co, *self.patch)).permute(0, 1, 4, 2, 5, 3)   # (B, Co, H, 1|2, W, 1|2)
        y.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).add_(skip)                  # (B, Co, H, 2, W, 2)
        return y                                                                  # (B, Co, 2H, 2W)


def make_block(kind: str, C: int, d: int, kernels: tuple[int, ...], act: str) -> nn.Module:
    return ResBlock(C, act) if kind == "ResBlock" else EfficientViTBlock(C, d, kernels)


# ---------------------------------------------------------------------------------------------------- network

class Encoder(nn.Module):
    def __init__(self, config: DCAEConfig) -> None:
        super().__init__()
        channels = config.encoder_block_out_channels
        S = len(channels)
        kinds = per_stage(config.encoder_block_types, S)
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i in range(S):
            blocks = [make_block(kinds[i], channels[i], config.attention_head_dim,
                                 config.encoder_qkv_multiscales[i], "silu")
                      for _ in range(config.encoder_layers_per_block[i])]
            if i < S - 1:
                unshuffle = config.downsample_block_type == "pixel_unshuffle"
                blocks.append(Down(channels[i], channels[i + 1], unshuffle))
            self.down_blocks.append(nn.Sequential(*blocks))
        self.conv_out = nn.Conv2d(channels[-1], config.latent_channels, 3, padding=1)
        self.Z = config.latent_channels
        self.out_shortcut = config.encoder_out_shortcut

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)                                                       # (B, C, H, W)
        for stage in self.down_blocks:
            x = stage(x)
        z = self.conv_out(x)                                                      # (B, Z, H, W)
        return z + group_mean(x, self.Z) if self.out_shortcut else z


class Decoder(nn.Module):
    def __init__(self, config: DCAEConfig) -> None:
        super().__init__()
        channels = config.decoder_block_out_channels
        S = len(channels)
        kinds = per_stage(config.decoder_block_types, S)
        acts = per_stage(config.decoder_act_fns, S)
        self.conv_in = nn.Conv2d(config.latent_channels, channels[-1], 3, padding=1)
        self.up_blocks = nn.ModuleList()
        for i in range(S):
            blocks = [make_block(kinds[i], channels[i], config.attention_head_dim,
                                 config.decoder_qkv_multiscales[i], acts[i])
                      for _ in range(config.decoder_layers_per_block[i])]
            if i < S - 1:
                shuffle = config.upsample_block_type == "pixel_shuffle"
                blocks.insert(0, Up(channels[i + 1], channels[i], shuffle))
            self.up_blocks.append(nn.Sequential(*blocks))
        self.norm_out = RMSNorm(channels[0])
        self.conv_out = nn.Conv2d(channels[0], config.in_channels, 3, padding=1)
        self.act = ACTIVATIONS[config.decoder_conv_act_fn]
        self.repeats = channels[-1] // config.latent_channels if config.decoder_in_shortcut else 0

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_in(z)                                                       # (B, C, H, W)
        if self.repeats:
            x = x + z.repeat_interleave(self.repeats, dim=1)                      # (B, C, H, W)
        for stage in reversed(self.up_blocks):     # stored finest first
            x = stage(x)
        return self.conv_out(self.act(self.norm_out(x)))                          # (B, in_channels, H, W)


class DCAE(nn.Module):
    """The autoencoder. Its latents are always scaled (mean square about 1), as a diffusion model wants them.

    >>> small = DCAEConfig(latent_channels=8, encoder_block_types="ResBlock", decoder_block_types="ResBlock",
    ...                    encoder_block_out_channels=(16, 32), decoder_block_out_channels=(16, 32),
    ...                    encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
    ...                    encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()))
    >>> vae = DCAE(small)
    >>> latents = vae.encode(torch.zeros(1, 3, 8, 12))
    >>> latents.shape, vae.decode(latents).shape
    (torch.Size([1, 8, 4, 6]), torch.Size([1, 3, 8, 12]))
    """

    def __init__(self, config: DCAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.conv_in.weight.dtype

    @property
    def spatial_compression(self) -> int:
        return 2 ** (len(self.config.encoder_block_out_channels) - 1)

    def encode(self, images: Tensor) -> Tensor:
        """images (B, in_channels, H, W) in [-1, 1] -> latents (B, Z, H/f, W/f), times scaling_factor.

        Any float dtype goes in, here and in decode; that of the weights comes out.
        Raises ValueError if H or W is not divisible by f = spatial_compression.
        """
        f, channels = self.spatial_compression, self.config.in_channels
        if images.ndim != 4 or images.shape[1] != channels:
            raise ValueError(f"encode expects images (B, {channels}, H, W), got {tuple(images.shape)}")
        if images.shape[2] % f or images.shape[3] % f:
            raise ValueError(f"encode needs height and width divisible by {f}, got {images.shape[2]} x "
                             f"{images.shape[3]}; resize or crop the images")
        z = self.encoder(images.to(self.dtype, memory_format=torch.channels_last))    # (B, Z, H/f, W/f)
        return (z * self.config.scaling_factor).contiguous()

    def decode(self, latents: Tensor, chunk: int | None = None) -> Tensor:
        """latents (B, Z, H, W), scaled as by `encode` -> images (B, in_channels, H*f, W*f), not clamped.

        chunk   images decoded at a time, to bound memory; None decodes all at once. The result is the same.
        """
        Z = self.config.latent_channels
        if latents.ndim != 4 or latents.shape[1] != Z:
            raise ValueError(f"decode expects latents (B, {Z}, H, W), got {tuple(latents.shape)}")
        if chunk is not None and chunk < 1:
            raise ValueError(f"decode: chunk must be at least 1 image, got {chunk}")
        z = latents.to(self.dtype) / self.config.scaling_factor                   # (B, Z, H, W)
        z = z.contiguous(memory_format=torch.channels_last)
        images = [self.decoder(part) for part in z.split(chunk or len(z))]
        return torch.cat(images).contiguous()                                     # (B, in_channels, H*f, W*f)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Fresh weights for training from scratch: uniform within 1 / sqrt(fan_in); norms one, biases zero.

        generator   on the CPU whatever the model's device, so that a seed means the same weights everywhere;
                    None means seed 0
        """
        if generator is None:
            generator = torch.Generator().manual_seed(0)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                bound = module.weight[0].numel() ** -0.5
                module.weight.copy_((torch.rand(module.weight.shape, generator=generator) * 2 - 1) * bound)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, RMSNorm):
                module.weight.fill_(1.0)
                module.bias.zero_()
