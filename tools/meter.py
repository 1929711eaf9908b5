"""FLOPs and memory of whatever runs, operator by operator, on real tensors or fake ones."""
import math
import weakref
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, shape_wrapper


def conv_backward_flop(grad: list[int], x: list[int], weight: list[int], *more: Any, out_shape: Any) -> int:
    """torch's own formula takes a depthwise convolution for a dense one where its weight has a gradient."""
    *_, output_mask = more
    return 2 * math.prod(grad) * math.prod(weight[1:]) * sum(output_mask[:2])


aten = torch.ops.aten
FORMULAS = flop_registry | {
    aten.convolution_backward: shape_wrapper(conv_backward_flop),
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward:
        flop_registry[aten._scaled_dot_product_flash_attention_backward]}


class Meter(TorchDispatchMode):
    """What is done while it is on: .flops, by torch's formulas, and the bytes of the tensors that are made,
    .alive now and .peak at most.

    Differs from torch's FlopCounterMode, which hooks into modules: with it, recomputed tensors stay alive.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops, self.alive, self.peak, self.known = 0, 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, func: OpOverload, types: tuple, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # what was there before is not counted, nor what shares its storage: views, results in place
        self.known.update(storages((args, kwargs)))
        out = func(*args, **kwargs)
        if func.overloadpacket in FORMULAS:
            self.flops += FORMULAS[func.overloadpacket](*args, **kwargs, out_val=out)
        for storage in storages(out):
            if storage not in self.known:
                self.known.add(storage)
                self.alive += storage.nbytes()
                self.peak = max(self.peak, self.alive)
                weakref.finalize(storage, self.free, storage.nbytes())
        return out

    def free(self, size: int) -> None:
        self.alive -= size


def storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
