"""Every test: the project root on sys.path, one thread, no downloads, the CPU alone: results are compared to
the bit, and a GPU would take bf16 by default."""
import os
from collections.abc import Iterator
from pathlib import Path

# before any Hugging Face library is imported: they read these once
for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
    os.environ[name] = "1"
# before torch looks for a GPU
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest  # noqa: E402
import torch  # noqa: E402

from helpers import TINY, save_stages, tiny_model  # noqa: E402
from model import PRESETS  # noqa: E402

torch.set_num_threads(1)


def pytest_runtest_setup() -> None:
    """Whatever has run before it in its process, a test draws the same."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def tiny_preset() -> Iterator[None]:
    """`--preset nano` means the tiny model of helpers.py, for the tests of a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "nano", TINY)
        yield


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for --weights with the tiny model, its stages 1 and 2 and two rewards, which is only read."""
    return save_stages(tiny_model(), tmp_path_factory.mktemp("weights"))
