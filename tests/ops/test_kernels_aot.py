"""What can be proved of the Triton kernels without a GPU: how they compile for an A100 and an H100.

Each variant that a launcher can ask for is compiled by kernel_aot.py in processes of their own (the suite interprets),
one for each architecture, once a session. Triton keeps the results on disk, so only a first run takes its half minute.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has no build for this platform")
pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[1] / "support" / "kernel_aot.py"
# Bytes of shared memory that one program can have (CUDA programming guide, technical specifications).
SHARED_LIMIT = {"80": 163 << 10, "90": 227 << 10}


def variant_names() -> list[str]:
    """Read, not imported: the script compiles, and this process interprets."""
    for node in ast.parse(SCRIPT.read_text()).body:
        if isinstance(node, ast.AnnAssign) and node.target.id == "VARIANTS":
            return [key.value for key in node.value.keys]
    raise AssertionError("kernel_aot.py has no VARIANTS")


NAMES = variant_names()
PRODUCTS = [name for name in NAMES if "act_sq_sum" not in name]
# 16-bit inputs in whole 16-byte rows: the path of every layer of the models that this is for.
FAST = [name for name in PRODUCTS if not any(word in name for word in ("fp32", "odd", "transposed"))]


@pytest.fixture(scope="session")
def facts() -> dict[str, dict[str, dict]]:
    processes = [
        subprocess.Popen([sys.executable, SCRIPT, architecture], stdout=subprocess.PIPE, text=True)
        for architecture in SHARED_LIMIT
    ]
    merged = {}
    for process in processes:
        output, _ = process.communicate()
        assert process.returncode == 0
        merged |= json.loads(output)
    return merged


each_architecture = pytest.mark.parametrize("architecture", SHARED_LIMIT)


@each_architecture
@pytest.mark.parametrize("name", NAMES)
def test_nothing_spills_and_shared_memory_suffices(facts, architecture, name) -> None:
    fact = facts[architecture][name]
    assert fact["stack"] == fact["local"] == 0
    assert not {"LDL", "STL"} & fact["instructions"].keys()
    assert fact["registers"] <= 255
    assert fact["shared"] <= SHARED_LIMIT[architecture]


@each_architecture
@pytest.mark.parametrize("name", NAMES)
def test_sums_are_written_by_one_program_each(facts, architecture, name) -> None:
    """An atomic addition would make the order of a sum, and so its bits, a matter of chance."""
    assert not {"RED", "ATOM", "ATOMG"} & facts[architecture][name]["instructions"].keys()


@each_architecture
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_run_on_the_tensor_cores_meant(facts, architecture, name) -> None:
    """wgmma on an H100 where that is safe (tiling.mma_shape says where not), mma elsewhere."""
    instructions = facts[architecture][name]["instructions"]
    expected = "HGMMA" if architecture == "90" and name in FAST else "HMMA"
    assert {"HGMMA", "HMMA"} & instructions.keys() == {expected}
    # Squares and sums are FFMA too, once an element of the tile; products would be thousands.
    assert instructions.get("FFMA", 0) <= 64


@pytest.mark.parametrize("name", FAST)
def test_nothing_is_written_over_that_a_product_may_still_read(facts, name) -> None:
    """Guards against triton-lang/triton 11047: no barrier between one warp group's wait and another's next copy."""
    assert facts["90"][name]["unguarded"] == 0


@each_architecture
@pytest.mark.parametrize("name", FAST)
def test_copies_go_straight_to_shared_memory(facts, architecture, name) -> None:
    """One 16-byte copy a thread for each 16 bytes of both operands: (stages - 1) before the loop, one set within."""
    fact = facts[architecture][name]
    out, columns, tokens = fact["block"]
    copies = (out + columns) * tokens * 2 // 16 // (32 * fact["warps"])
    assert fact["instructions"]["LDGSTS"] == copies * fact["stages"]


@pytest.mark.parametrize("name", FAST)
def test_products_of_a_step_are_awaited_once(facts, name) -> None:
    """The compiler can decide to wait for every single wgmma, and says so nowhere but in the code."""
    fact = facts["90"][name]
    assert fact["awaited"] == 1 < fact["instructions"]["HGMMA"]


@pytest.mark.parametrize("name", [name for name in FAST if not name.startswith("grad_sum")])
def test_instructions_leave_time_for_products(facts, name) -> None:
    """A step's instructions are issued while its products run, and an example's end costs one to add and one to clear.

    A tensor core does 4096 operations a clock; each of the four schedulers of a multiprocessor issues one instruction a
    clock for its quarter of the warps. Short steps are the exception that block_shape explains.
    """
    fact = facts["90"][name]
    out, columns, tokens = fact["block"]
    product_clocks = 2 * out * columns * tokens / 4096
    issue_clocks = fact["step"] * fact["warps"] / 4
    assert issue_clocks < product_clocks * (1 if tokens == 64 and out * columns == 128 * 128 else 2)
    elements = out * columns // (32 * fact["warps"])
    n_sums = 2 if "+" in name else 1
    assert fact["example"] <= elements * (n_sums + 1) + 8


def test_blocks_are_the_ones_meant(facts) -> None:
    """The variants were compiled with what block_shape chooses, and long examples take longer steps on an H100."""
    assert facts["90"]["abs_sum"]["block"] == [128, 128, 64]
    assert facts["90"]["abs_sum, 64 tokens"]["block"] == [128, 128, 32]
    assert facts["80"]["abs_sum"]["block"] == [128, 128, 32]
