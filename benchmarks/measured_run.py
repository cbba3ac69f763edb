"""Score or patch one checkpoint in a process of its own, and print seconds and peak memory as one JSON line.

    python benchmarks/measured_run.py score FOLDER [--examples N] [--tokens T] [--memory 3GiB] [--segments S]
                                            [--host-memory 100GiB] [--offload disk] [--resident]
                                            [--shared-blocks]
    python benchmarks/measured_run.py patch FOLDER OUT

``peak_bytes`` is the highest resident memory (of a GPU: allocated memory too) above that after the imports. Both sets
have N examples of T random tokens, the second half scored. ``planned_bytes`` is what ``fastprune.plan`` expects of
``score``. With ``--shared-blocks`` the first block's file is read for every block. Run by ``bench_streaming.py`` and by
tests.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
import transformers
from measure import backends, status_bytes
from transformers.models.llama import modeling_llama  # noqa: F401 - an import that must not count as a run's memory

import fastprune
from fastprune.calibration import CalibrationSet, Example
from fastprune.checkpoint import skeleton
from fastprune.checkpoint.load import load_config, load_model
from fastprune.checkpoint.shards import Stored, stored_tensors
from fastprune.masking import PruneMask
from fastprune.planning.plan import MICRO_BATCH_TOKENS


def random_set(n_examples: int, n_tokens: int, vocabulary: int, seed: int) -> CalibrationSet:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, vocabulary, (n_examples, n_tokens), generator=generator).tolist()
    context = n_tokens // 2
    return CalibrationSet([Example(tuple(row), (*[-100] * context, *row[context:])) for row in rows])


def score(arguments: argparse.Namespace) -> dict[str, object]:
    n, tokens = arguments.examples, arguments.tokens
    config = load_config(arguments.folder)
    sets = [random_set(n, tokens, config.vocab_size, seed) for seed in (0, 1)]
    limits = {name: getattr(arguments, name) for name in ("memory", "host_memory", "segments", "offload")}
    if arguments.shared_blocks:
        share_blocks(config.num_hidden_layers)
    model = load_model(arguments.folder) if arguments.resident else arguments.folder
    start = time.perf_counter()
    scores = fastprune.score(model, *sets, **limits, progress=False)
    seconds = time.perf_counter() - start
    rows = min(n, max(1, MICRO_BATCH_TOKENS // tokens))
    largest = (rows, tokens, rows * (tokens - tokens // 2))
    planned = fastprune.plan(model if arguments.resident else config, 2 * n, tokens, **limits, micro_batch=largest)
    digest = scores.select(None, 1e-3).digest
    plan = {"planned_bytes": planned.peak_bytes, "segments": planned.segments}
    scored = {"examples": 2 * n, "tokens": 2 * n * tokens, "backends": backends()}
    return {"seconds": seconds, **scored, **plan, "mask": digest}


def share_blocks(n_blocks: int) -> None:
    """Let the tensors of block 0 on disk stand for those of all blocks."""

    def with_aliases(folder: Path) -> dict[str, Stored]:
        stored = stored_tensors(folder)
        first = {name: tensor for name, tensor in stored.items() if name.startswith("model.layers.0.")}
        return stored | {
            name.replace("layers.0.", f"layers.{index}."): tensor
            for index in range(1, n_blocks)
            for name, tensor in first.items()
        }

    skeleton.stored_tensors = with_aliases


def patch(arguments: argparse.Namespace) -> dict[str, object]:
    stored = {name: tensor for name, tensor in stored_tensors(arguments.folder).items() if len(tensor.shape) == 2}
    indices = {name: torch.arange(0, tensor.numel, 100_003) for name, tensor in stored.items()}
    mask = PruneMask(indices, {name: tensor.shape for name, tensor in stored.items()})
    start = time.perf_counter()
    fastprune.patch_checkpoint(arguments.folder, mask, arguments.out)
    return {"seconds": time.perf_counter() - start, "weights": mask.total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    of_score = commands.add_parser("score")
    of_score.add_argument("folder", type=Path)
    of_score.add_argument("--examples", type=int, default=8)
    of_score.add_argument("--tokens", type=int, default=64)
    of_score.add_argument("--memory")
    of_score.add_argument("--host-memory")
    of_score.add_argument("--segments", type=int)
    of_score.add_argument("--shared-blocks", action="store_true")
    of_score.add_argument("--offload")
    of_score.add_argument("--resident", action="store_true", help="load the whole model first, not counted as time")
    of_score.set_defaults(run=score)
    of_patch = commands.add_parser("patch")
    of_patch.add_argument("folder", type=Path)
    of_patch.add_argument("out", type=Path)
    of_patch.set_defaults(run=patch)
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        # The matrix library's own buffers; of a GPU all that a process's first call waits for.
        torch.mm(*torch.randn(2, 256, 256, device=device))
    before = status_bytes("VmRSS")
    result = arguments.run(arguments)
    result["peak_bytes"] = status_bytes("VmHWM") - before
    if torch.cuda.is_available():
        result["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
    json.dump(result, sys.stdout)
    print()


if __name__ == "__main__":
    main()
