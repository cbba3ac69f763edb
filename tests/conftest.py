"""Settings for the whole suite: interpreter mode without a GPU, no network, seeds that do not depend on test order.

One thread, here and in the processes that tests start, unless OMP_NUM_THREADS says otherwise: for models this small
others only wait for one another. Tests of what threads may change ask for more by themselves.
"""

from __future__ import annotations

import fcntl
import os
import zlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # has to be set before the first import of triton
torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
pytest.register_assert_rewrite("support")  # a failed assertion there shows its values, as one in a test does


@pytest.fixture(autouse=True)
def _seed_from_test_id(request: pytest.FixtureRequest) -> None:
    """Each test draws the same numbers alone, in any order and under any selection."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The CUDA extension, for the CPU; some ten seconds for all tests that ask for it."""
    from support.emulated_cuda import build

    if "PYTEST_XDIST_WORKER" not in os.environ:
        return build(tmp_path_factory.mktemp("cuda_emulated"))
    folder = tmp_path_factory.getbasetemp().parent / "cuda_emulated"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the first of the processes builds it for all
        return build(folder)


@pytest.fixture
def model() -> torch.nn.Module:
    """A Llama, small enough to be written many times."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))


@pytest.fixture
def folder(model: torch.nn.Module, tmp_path: Path) -> Path:
    """It in shards."""
    model.save_pretrained(tmp_path / "model", max_shard_size="6KB")
    return tmp_path / "model"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """``gpu`` tests need a device; they are left out, by name, where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))
