"""What a call asks for in memory on the CPU, by torch's profiler."""
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def measure(run: Callable[[], object]) -> tuple[int, int]:
    """(bytes held while the result of `run` lives, bytes held at the peak), above what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = torch.tensor([event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns())])
    total = held.cumsum(0)
    del result
    return total[-1].item(), total.max().item()
