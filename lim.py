"""Layer Integration Module (LIM): one condition out of the query features of every VLM layer (paper Eq. 4-5).

    c_i = LN(f_theta(q_i))      for every layer i = 1..L; f_theta and LN are shared by all layers     (Eq. 4)
    c   = 1/L * sum_i c_i       the condition the diffusion transformer attends to                    (Eq. 5)

f_theta is a pre-LN transformer encoder (the connector: no positions, no mask, no final norm), then one Linear
to the DiT's caption width. Sharing it makes the L layers a batch: they are merged with the samples for
compute. It also makes the layers exchangeable: c does not depend on their order.

Reading of the paper
- Which layers: q holds the *outputs* of VLM layers 1..L (28 at the paper's size); the input embedding is not
  one of them. Eq. 4 writes i in [0, L], Eq. 5 averages over n layers; here n = L and layers count from 1.
- Where LN is: after f_theta, on each c_i by itself, before the mean; one set of weights for all layers, eps
  1e-5. `norm=False` leaves it out: the paper's ablation row, and (with L = 1) OpenUni.
- Where the perturbation of stage III acts: on c_i, between LN and the mean, as c_i * (1 + gamma * noise_i).
  When it fires and how hard: ldam.py.

Parameter names are those of OpenUni's checkpoints (connector.*, projector.*; ParaUni adds agglayer_norm.*).

L VLM layers  B batch  N queries  D VLM width  E caption width of the DiT  R = L*B rows  h heads  d head width
"""
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class LIMConfig:
    """Sizes of the LIM. The defaults are the paper's: InternVL3-2B in front, SANA-1.5 1.6B behind."""
    width: int = 1536               # D, hidden size of the VLM
    num_layers: int = 6             # depth of the connector, not the number of VLM layers (that one is free)
    num_heads: int = 24
    mlp_width: int = 8960
    caption_channels: int = 2304    # E, width the DiT expects its condition in
    norm: bool = True               # the LN of Eq. 4; False is the ablation and OpenUni

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(f"LIMConfig: width must be a multiple of num_heads, got width={self.width} and "
                             f"num_heads={self.num_heads}; change one of the two")

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads


# ------------------------------------------------------------------------------------------------------------
# f_theta, first half: the connector

class SelfAttention(nn.Module):
    def __init__(self, config: LIMConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.width, config.width)
        self.k_proj = nn.Linear(config.width, config.width)
        self.v_proj = nn.Linear(config.width, config.width)
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)           # 3 x (R, h, N, d)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        x = F.scaled_dot_product_attention(q, k, v)                                     # (R, h, N, d)
        return self.out_proj(x.transpose(1, 2).flatten(2))                              # (R, N, D)


class MLP(nn.Module):
    """recompute = True keeps one of the two wide tensors for the backward pass and makes the other from it
    again: no matrix product, and a fifth of the layer's memory."""

    def __init__(self, config: LIMConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.width)
        self.recompute = config.mlp_width >= 1024       # narrow models have memory to spare

    def forward(self, x: Tensor) -> Tensor:
        wide = self.fc1(x)                                                              # (R, N, mlp)
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.down, wide, use_reentrant=False, preserve_rng_state=False)
        return self.down(wide)

    def down(self, wide: Tensor) -> Tensor:
        return self.fc2(F.gelu(wide, approximate="tanh"))                               # (R, N, D)


class EncoderLayer(nn.Module):
    def __init__(self, config: LIMConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.width, eps=1e-6)     # SigLIP's; agglayer_norm has 1e-5
        self.self_attn = SelfAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.width, eps=1e-6)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))                                     # (R, N, D)
        return x + self.mlp(self.layer_norm2(x))                                        # (R, N, D)


class Connector(nn.Module):
    def __init__(self, config: LIMConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)                                                                # (R, N, D)
        return x


# ------------------------------------------------------------------------------------------------------------
# Eq. 5, and Eq. 4 around it

def fuse(c_layers: Tensor, layers: Iterable[int] | None = None, gamma: float | None = None,
         noise: Tensor | None = None) -> Tensor:
    """The condition c = mean over layers of c_i (paper Eq. 5), each c_i perturbed first where noise is given.

    c_layers    (L, B, N, E)    what LIM.forward returns
    layers      paper numbers 1..L of the layers to average, in any order; None = all of them
    gamma       strength of the perturbation c_i * (1 + gamma * noise_i); comes with noise
    noise       4 dimensions, each 1 or that of c_layers; rows of zeros for the layers left alone
    Returns c (B, N, E) in the dtype of c_layers.
    Raises ValueError for layers that are empty, out of range or repeated, for gamma without noise or noise
    without gamma, and for noise of another shape.
    """
    if (gamma is None) != (noise is None):
        raise ValueError(f"fuse: gamma and noise belong together, got gamma={gamma} and "
                         f"{'no noise' if noise is None else 'noise'}; give both or neither")
    if noise is not None:
        # 4 dimensions are asked for because (L, N, E) would broadcast over samples, unnoticed where B == L
        if noise.ndim != 4 or any(n not in (1, m) for n, m in zip(noise.shape, c_layers.shape, strict=True)):
            raise ValueError(f"fuse: noise must have 4 dimensions, each 1 or that of c_layers "
                             f"{tuple(c_layers.shape)}, got {tuple(noise.shape)}")
        c_layers = c_layers * (1 + gamma * noise.to(c_layers.dtype))                    # (L, B, N, E)
    if layers is None:
        return c_layers.mean(0)                                                         # (B, N, E)
    chosen, num_layers = list(layers), c_layers.shape[0]
    if not chosen or len(set(chosen)) != len(chosen) or not all(1 <= i <= num_layers for i in chosen):
        raise ValueError(f"fuse: layers must name at least one of 1..{num_layers}, none twice, got {chosen}")
    return c_layers[[i - 1 for i in chosen]].mean(0)                                    # (B, N, E)


class LIM(nn.Module):
    """Layer Integration Module.

    Two attributes trade time for memory, with the same values and gradients: `layer_chunk` > 0 runs that many
    VLM layers at a time (0 = all at once); `gradient_checkpointing` keeps no activations of a chunk and
    computes them again in backward, so that with both set only one chunk's activations are ever alive.
    """
    fuse = staticmethod(fuse)

    def __init__(self, config: LIMConfig) -> None:
        super().__init__()
        self.config = config
        self.connector = Connector(config)
        self.projector = nn.Linear(config.width, config.caption_channels)
        self.agglayer_norm = nn.LayerNorm(config.caption_channels, eps=1e-5) if config.norm else nn.Identity()
        self.gradient_checkpointing = False
        self.layer_chunk = 0
        self.init_weights()

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """SigLIP's start for the connector, nn.Linear's for the projector. None: torch's global generator."""
        for layer in self.connector.layers:
            for linear in (*layer.self_attn.children(), layer.mlp.fc1, layer.mlp.fc2):
                nn.init.xavier_uniform_(linear.weight, generator=generator)
                nn.init.zeros_(linear.bias)
            nn.init.normal_(layer.mlp.fc1.bias, std=1e-6, generator=generator)
            nn.init.normal_(layer.mlp.fc2.bias, std=1e-6, generator=generator)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        bound = 1 / math.sqrt(self.config.width)
        nn.init.uniform_(self.projector.weight, -bound, bound, generator=generator)
        nn.init.uniform_(self.projector.bias, -bound, bound, generator=generator)

    def forward(self, q: Tensor) -> Tensor:
        """Per-layer conditions c_i = LN(f_theta(q_i)) (paper Eq. 4).

        q           (L, B, N, D)    the queries' hidden states after VLM layers 1..L
        Returns (L, B, N, E), layer i at index i - 1. Raises ValueError for another shape.
        """
        if q.ndim != 4 or q.shape[-1] != self.config.width:
            raise ValueError(f"LIM: q must be (layers, batch, queries, width {self.config.width}), "
                             f"got {tuple(q.shape)}")
        L, B, N, D = q.shape
        # layer outermost, cut apart again by both sizes: a batch of L samples is never taken for L layers
        rows = q.reshape(L * B, N, D)                                                   # (R, N, D)
        chunks = [self._chunk(x) for x in rows.split((self.layer_chunk or L) * B)]
        return torch.cat(chunks).unflatten(0, (L, B))                                   # (L, B, N, E)

    def _chunk(self, x: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(self._c, x, use_reentrant=False, preserve_rng_state=False)  # no dropout
        return self._c(x)

    def _c(self, x: Tensor) -> Tensor:
        return self.agglayer_norm(self.projector(self.connector(x)))                    # (R, N, E)
