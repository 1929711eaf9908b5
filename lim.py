"""Layer Integration Module (LIM): one condition out of the query features of every VLM layer.

    c_i = LN(f_theta(q_i))      for every layer i = 1..L; f_theta and LN are shared by all layers     (Eq. 4)
    c   = 1/n sum_i c_i         the condition that the diffusion transformer attends to               (Eq. 5)
    c_i <- c_i (1 + gamma eps)  the perturbation of stage III, of some layers                         (Eq. 6)

f_theta is a pre-LN transformer encoder (the connector: no positions, no mask, no final norm), then one Linear
to the DiT's caption width. All layers share it, so c does not depend on their order.

Reading of the paper
- Which layers: q holds the *outputs* of VLM layers 1..L (28 at the paper's size); the input embedding is not
  one of them. Eq. 4 writes i in [0, L], Eq. 5 averages over n layers; here n = L and layers count from 1.
- Where LN is: after f_theta, on each c_i by itself, before the mean; one set of weights for all layers, eps
  1e-5. norm=False leaves it out: the paper's ablation row, and (with the last layer alone) OpenUni.
- Where the perturbation acts: on c_i, between LN and the mean, as Eq. 4 and 6 have it; the paper's Figure 6
  shows it in front of the LIM. When it fires and how hard: ldam.py.

Parameter names are those of OpenUni's checkpoints (connector.*, projector.*; ParaUni adds agglayer_norm.*).

Letters: L VLM layers, B prompts, N queries, D VLM width, E caption width of the DiT, R = L B rows, h heads of
width d, n fused layers, S perturbed ones, G pictures of a prompt.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class LIMConfig:
    """Sizes of the LIM; the defaults are OpenUni-L's, between InternVL3-2B and SANA-1.5 1.6B."""
    vlm_layers: int = 28            # L
    width: int = 1536               # D, hidden size of the VLM
    num_layers: int = 6             # depth of the connector
    num_heads: int = 24
    mlp_width: int = 8960
    caption_channels: int = 2304    # E, width the DiT expects its condition in
    norm: bool = True               # the LN of Eq. 4; False is the ablation and OpenUni
    layers: tuple[int, ...] = ()    # those that are fused, from 1; none named: all, as in the paper


class SelfAttention(nn.Module):
    def __init__(self, config: LIMConfig) -> None:
        super().__init__()
        self.head_dim = config.width // config.num_heads
        self.q_proj = nn.Linear(config.width, config.width)
        self.k_proj = nn.Linear(config.width, config.width)
        self.v_proj = nn.Linear(config.width, config.width)
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))                 # 3 x (R, h, N, d)
        x = F.scaled_dot_product_attention(q, k, v)                                     # (R, h, N, d)
        return self.out_proj(x.transpose(1, 2).flatten(2))                              # (R, N, D)


class MLP(nn.Module):
    def __init__(self, config: LIMConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.width)
        # keep one of the two wide tensors for the backward pass and make the other from it again: no matrix
        # product, and a quarter of the layer's memory; narrow models have memory to spare
        self.recompute = config.mlp_width >= 1024

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
        self.gradient_checkpointing = False     # True: compute each layer again in the backward pass

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False)     # (R, N, D)
            else:
                x = layer(x)                                                            # (R, N, D)
        return x


class LIM(nn.Module):
    def __init__(self, config: LIMConfig) -> None:
        super().__init__()
        self.config = config
        self.connector = Connector(config)
        self.projector = nn.Linear(config.width, config.caption_channels)
        self.agglayer_norm = nn.LayerNorm(config.caption_channels, eps=1e-5) if config.norm else nn.Identity()
        every = list(range(1, config.vlm_layers + 1))
        self.layers = list(config.layers) or every                  # those that are fused; fewer in ablations
        assert len(set(self.layers) & set(every)) == len(self.layers), f"no such layers: {self.layers}"
        # (L, N, E): what LDAM's firings have left, multiplied into the c_i (--ldam-mode keep); None: nothing
        self.register_buffer("kept_noise", None, persistent=False)

    def forward(self, q: Tensor) -> Tensor:
        """Per-layer conditions c_i = LN(f_theta(q_i)) (paper Eq. 4), with what LDAM has left (kept_noise).

        q        (L, B, N, D)    the queries' hidden states after VLM layers 1..L
        Returns  (L, B, N, E)    layer i at index i - 1
        """
        # all layers' rows as one batch, the layer outermost; cut apart again by q's own two sizes
        rows = q.flatten(0, 1)                                                          # (R, N, D)
        c = self.agglayer_norm(self.projector(self.connector(rows)))                    # (R, N, E)
        c_layers = c.unflatten(0, q.shape[:2])                                          # (L, B, N, E)
        if self.kept_noise is None:
            return c_layers
        return c_layers * self.kept_noise[:, None].to(c_layers.device)

    def fuse(self, c_layers: Tensor, layers: list[int] | None = None) -> Tensor:
        """The condition c = mean of c_i (paper Eq. 5), (B, N, E), over the layers that are named by their
        numbers 1..L, or else those of the model. c_layers (L, B, N, E): what forward returns."""
        layers = self.layers if layers is None else layers
        if len(layers) < self.config.vlm_layers:
            c_layers = c_layers[[i - 1 for i in layers]]                                # (n, B, N, E)
        return c_layers.mean(0)                                                         # (B, N, E)

    def perturb(self, c: Tensor, perturbed: Tensor, noise: list[Tensor]) -> Tensor:
        """Eq. 6 inside of Eq. 5: mean_i c_i (1 + noise_i) = c + 1/n sum_i c_i noise_i, one layer at a time.

        c          (B, N, E)        what fuse returns
        perturbed  (S, B, N, E)     the c_i of the S layers that are perturbed
        noise      S x (B G, N, E)  gamma eps of each, for the G pictures of each prompt
        Returns    (B G, N, E)
        """
        group_size = len(noise[0]) // len(c)
        c = c.repeat_interleave(group_size, 0)                                          # (B G, N, E)
        for c_i, noise_i in zip(perturbed, noise, strict=True):
            c = c + c_i.repeat_interleave(group_size, 0) * noise_i / len(self.layers)   # (B G, N, E)
        return c

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """SigLIP's start for the connector, nn.Linear's for the projector. A parameter that is not named here
        keeps the value that its module's __init__ gave it. None: torch's global generator."""
        for layer in self.connector.layers:
            for linear in (*layer.self_attn.children(), layer.mlp.fc1, layer.mlp.fc2):
                nn.init.xavier_uniform_(linear.weight, generator=generator)
                nn.init.zeros_(linear.bias)
            nn.init.normal_(layer.mlp.fc1.bias, std=1e-6, generator=generator)
            nn.init.normal_(layer.mlp.fc2.bias, std=1e-6, generator=generator)
        bound = 1 / math.sqrt(self.config.width)
        nn.init.uniform_(self.projector.weight, -bound, bound, generator=generator)
        nn.init.uniform_(self.projector.bias, -bound, bound, generator=generator)
