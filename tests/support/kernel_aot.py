"""Compiles every kernel variant for GPUs that need not be there, and reads off the machine code what can be proved.

    python tests/support/kernel_aot.py 80 90             facts by architecture and variant, as one JSON object
    python tests/support/kernel_aot.py 90 --table        as the Markdown tables of kernels/README.md

The launchers themselves are called, on tensors without storage, while the active driver is one that only names an
architecture: what is compiled is what a launch would compile, block shapes and specialisations included. This runs in
a process of its own, because Triton decides on import whether it interprets.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from fastprune_kernels import act_sq_sum, grad_abs_sum, grad_sum
from fastprune_kernels.tiling import BlockShape
from torch import Tensor
from triton.backends.compiler import GPUTarget

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
COUNTED = ("HGMMA", "HMMA", "DFMA", "FFMA", "LDGSTS", "LDL", "STL", "RED", "ATOM", "ATOMG")
INSTRUCTION_BYTES = 16
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class NamedArchitecture:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture  # the key under which Triton keeps what it compiled

    def get_current_stream(self, device: int) -> int:
        return 0


def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def per_example(names, *outs, n_in=4096, tokens=250, dtype=BF16, transposed=False, shape=None) -> None:
    """Launch the per-example kernel for weights ``(out, n_in)`` and eight examples."""
    matrices = []
    for n_out in outs:
        dy = empty(n_out, 8 * tokens, dtype=dtype).T if transposed else empty(8 * tokens, n_out, dtype=dtype)
        matrices.append((dy, {f"grad_{name}": empty(n_out, n_in, dtype=FP32) for name in names.split()}))
    spans = torch.arange(8) * tokens, torch.full((8,), tokens)
    grad_abs_sum.accumulate_grad_statistics(matrices, empty(8 * tokens, n_in, dtype=dtype), *spans, shape=shape)


def summed(n_out, n_in, dtype=BF16) -> None:
    acc = empty(n_out, n_in, dtype=FP32)
    grad_sum.accumulate_grad_sum(acc, empty(4096, n_out, dtype=dtype), empty(4096, n_in, dtype=dtype))


def squared(n_in, dtype=BF16) -> None:
    act_sq_sum.accumulate_act_sq_sum(empty(n_in, dtype=FP32), empty(4096, n_in, dtype=dtype))


bind = functools.partial
VARIANTS: dict[str, Callable[[], None]] = {
    "abs_sum": bind(per_example, "abs_sum", 4096),
    "sq_sum": bind(per_example, "sq_sum", 4096),
    "abs_sum, 64 tokens": bind(per_example, "abs_sum", 4096, tokens=64),
    "abs_sum, q/k/v in one": bind(per_example, "abs_sum", 4096, 1024, 1024),
    "abs_sum + sum": bind(per_example, "abs_sum sum", 4096),
    "abs_sum + sq_sum": bind(per_example, "abs_sum sq_sum", 4096),
    "abs_sum, fp16": bind(per_example, "abs_sum", 4096, dtype=FP16),
    "abs_sum, fp32": bind(per_example, "abs_sum", 4096, dtype=FP32),
    "abs_sum + sum, fp32": bind(per_example, "abs_sum sum", 4096, dtype=FP32),
    "abs_sum, small weight": bind(per_example, "abs_sum", 512, n_in=512),
    "abs_sum, dy transposed": bind(per_example, "abs_sum", 4096, transposed=True),
    "abs_sum, odd sizes": bind(per_example, "abs_sum", 4097, n_in=4099),
    "abs_sum + sum, odd sizes": bind(per_example, "abs_sum sum", 4097, n_in=4099),
    "grad_sum": bind(summed, 4096, 4096),
    "grad_sum, fp32": bind(summed, 4096, 4096, FP32),
    "grad_sum, odd sizes": bind(summed, 4097, 4099),
    "act_sq_sum": bind(squared, 4096),
    "act_sq_sum, fp32": bind(squared, 4096, FP32),
}
# Other blocks for the same kernel (bfloat16, 250 tokens): what block_shape has to choose from on sm_90.
SHAPES = {
    "chosen": None,
    "3 stages": BlockShape(128, 128, 64, 8, 3),
    "128 tokens a step": BlockShape(128, 128, 128, 8, 3),
    "two programs a multiprocessor": BlockShape(64, 128, 64, 4, 3),
    "wide": BlockShape(64, 256, 64, 8, 3),
    "too large": BlockShape(128, 256, 64, 8, 3),
    "too large, 16 warps": BlockShape(128, 256, 64, 16, 3),
}


def compiled(launch: Callable[[], None]) -> tuple[object, dict]:
    """Call a launcher; instead of launching, return what was compiled and the keyword arguments."""
    kept = []
    run = triton.JITFunction.run

    def compile_only(self, *args, warmup, **kwargs):
        kept.append((run(self, *args, warmup=True, **kwargs), kwargs))

    triton.JITFunction.run = compile_only
    try:
        launch()
    finally:
        triton.JITFunction.run = run
    (only,) = kept
    return only


def facts(launch: Callable[[], None]) -> dict[str, object]:
    """Block, warps, stages, registers, bytes of stack, local and shared memory, and counts of instructions."""
    kernel, arguments = compiled(launch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = run_tool("--dump-resource-usage", file.name)
        code = [
            (int(address, 16), text)
            for address, text in re.findall(r"^\s+/\*(\w{4,})\*/\s+(.*?);", run_tool("-sass", file.name), re.M)
        ]
    opcodes = [re.sub(r"^@!?\w+\s+", "", text).split()[0] for _, text in code]
    names = [opcode.split(".")[0] for opcode in opcodes]
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage).groups())
    step, example = loop_instructions(code)
    return {
        "block": [arguments[name] for name in ("BLOCK_OUT", "BLOCK_IN", "BLOCK_TOKENS") if name in arguments],
        "warps": kernel.metadata.num_warps,
        "stages": kernel.metadata.num_stages,
        "registers": registers,
        "stack": stack,
        "local": local,
        "shared": kernel.metadata.shared,
        "instructions": {name: names.count(name) for name in COUNTED if name in names},
        # Each wgmma that a program waits for carries a scoreboard; one a step means that they run in a row.
        "awaited": sum("HGMMA" in text and "gsb" in text for _, text in code),
        "unguarded": unguarded_writes(code),
        "step": step,
        "example": example,
    }


def loop_instructions(code: list[tuple[int, str]]) -> tuple[int | None, int | None]:
    """Instructions of a thread for one step and for the end of an example; None without such a loop."""
    loop = product_loop(code)
    if loop is None:
        return None, None
    start, end = loop
    forward = [to - at for at, to in jumps(code) if start <= at < to <= end]
    skipped = max([16, *forward]) // INSTRUCTION_BYTES - 1
    return (end - start) // INSTRUCTION_BYTES + 1 - skipped, skipped


def product_loop(code: list[tuple[int, str]]) -> tuple[int, int] | None:
    """First and last address of the innermost loop round all products."""
    products = [address for address, text in code if "HGMMA" in text or "HMMA" in text]
    loops = [(to, at) for at, to in jumps(code) if products and to <= products[0] and products[-1] <= at]
    return min(loops, key=lambda loop: loop[1] - loop[0], default=None)


def jumps(code: list[tuple[int, str]]) -> list[tuple[int, int]]:
    return [(address, int(m[1], 16)) for address, text in code if (m := re.search(r"BRA 0x(\w+)", text))]


def unguarded_writes(code: list[tuple[int, str]]) -> int:
    """Writes to shared memory that another group of four warps may still be reading for its wgmma.

    A wait for wgmma is one of a group of four warps for its own; a barrier has to follow before what was read is
    written over. The loop counts twice, for what its end leaves to its beginning.
    """
    loop = product_loop(code)
    again = [line for line in code if loop and loop[0] <= line[0] <= loop[1]]
    after = [line for line in code if loop and line[0] > loop[1]]
    state, count = "free", 0
    for _, text in [line for line in code if not loop or line[0] <= loop[1]] + again + after:
        if "HGMMA" in text:
            state = "read"
        elif "WARPGROUP.DEPBAR" in text and state == "read":
            state = "waited for"
        elif "BAR.SYNC" in text and state == "waited for":
            state = "free"
        elif re.search(r"\b(STS|LDGSTS|STSM)\b", text) and state != "free":
            count += 1
    return count


def run_tool(*arguments: str) -> str:
    return subprocess.run([TOOLS / "cuobjdump", *arguments], check=True, capture_output=True, text=True).stdout


def markdown(table: dict[str, dict]) -> str:
    lines = [
        "| variant | block | warps, stages | registers | spills, bytes | shared, KiB | tensor-core instructions "
        "| instructions: step, example |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, f in table.items():
        tensor_core = ", ".join(f"{n} {op}" for op, n in f["instructions"].items() if op in ("HGMMA", "HMMA", "DFMA"))
        loop = "" if f["step"] is None else f"{f['step']}, {f['example']}"
        lines.append(
            f"| {name} | {' x '.join(map(str, f['block']))} | {f['warps']}, {f['stages']} | {f['registers']} "
            f"| {f['stack'] + f['local']} | {f['shared'] / 1024:.0f} | {tensor_core} | {loop} |"
        )
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    tables = {}
    for architecture in [a for a in arguments if a.isdigit()]:
        triton.runtime.driver.set_active(NamedArchitecture(int(architecture)))
        tables[architecture] = {name: facts(launch) for name, launch in VARIANTS.items()}
        if "--table" in arguments:
            print(f"### sm_{architecture}, Triton {triton.__version__}\n\n{markdown(tables[architecture])}\n")
    if "--table" not in arguments:
        print(json.dumps(tables))
    elif triton.runtime.driver.active.architecture == 90:
        shapes = {n: facts(bind(per_example, "abs_sum", 4096, shape=shape)) for n, shape in SHAPES.items()}
        print(f"### Blocks for abs_sum, sm_90\n\n{markdown(shapes)}")


if __name__ == "__main__":
    main(sys.argv[1:])
