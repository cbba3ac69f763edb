"""Write a checkpoint of random bf16 weights, shard by shard, so that it can be larger than memory.

    python benchmarks/random_checkpoint.py DIR [--shape 300m|3b|8b|70b] [--blocks N] [--shared-blocks]

The weights are N(0, 0.02) from a fixed seed, as a fresh initialisation; norms are one. Only four million are drawn,
since a billion take a thread a quarter of a minute; every matrix repeats them, each from another place on. ``3b``,
``8b`` and ``70b`` are the shapes of Llama models of 3.2 B, 8 B and 70 B parameters (6, 15 and 131 GiB), ``300m`` one of
270 M (0.5 GiB). With ``--shared-blocks`` only the first block is written, for a disk too small for all:
``measured_run.py --shared-blocks`` reads it in place of every other one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

_LLAMA_3 = {"num_key_value_heads": 8, "vocab_size": 128_256}
SHAPES = {
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "tied": False,
        **_LLAMA_3,
    },
    "70b": {
        "hidden_size": 8192,
        "intermediate_size": 28_672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "tied": False,
        **_LLAMA_3,
    },
    "3b": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        **_LLAMA_3,
    },
    "300m": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 20,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "vocab_size": 32_000,
    },
}

# A prime: no number of columns divides it, so rows do not repeat with the values.
N_DRAWN = 4_194_301
# Between the places where two matrices begin; prime to the above, so that no two of as many begin at the same one.
STEP = 1_618_033


def write_checkpoint(
    folder: Path, *, shard_bytes: int = 1 << 29, tied: bool = True, shared_blocks: bool = False, **shape: int
) -> Path:
    """Write a random bf16 Llama.

    Args:
        folder: Made if it does not exist.
        shard_bytes: A shard is closed when it is as large; one shard and one tensor are in memory at a time.
        tied: Whether the head is the embedding.
        shared_blocks: Leave out all blocks but the first.
        shape: Settings of ``LlamaConfig``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = transformers.LlamaConfig(
        **shape, tie_word_embeddings=tied, dtype="bfloat16", architectures=["LlamaForCausalLM"]
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    parameters = {
        name: parameter
        for name, parameter in model.named_parameters()
        if not shared_blocks or not name.startswith("model.layers.") or name.startswith("model.layers.0.")
    }
    names = {}
    for number, shard in enumerate(_shards(parameters, shard_bytes)):
        file = f"model-{number:05d}.safetensors"
        save_file(shard, folder / file)
        names |= dict.fromkeys(shard, file)
    total = sum(parameter.numel() * 2 for parameter in parameters.values())
    index = {"metadata": {"total_size": total}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _shards(parameters: dict[str, torch.Tensor], shard_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
    drawn = torch.empty(N_DRAWN, dtype=torch.bfloat16).normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    shard: dict[str, torch.Tensor] = {}
    for number, (name, parameter) in enumerate(parameters.items()):
        tensor = torch.ones(parameter.shape, dtype=torch.bfloat16)
        if parameter.ndim > 1:
            _fill(tensor.view(-1), drawn.roll(-number * STEP))
        shard[name] = tensor
        if sum(part.numel() * 2 for part in shard.values()) >= shard_bytes:
            yield shard
            shard = {}
    if shard:
        yield shard


def _fill(flat: torch.Tensor, values: torch.Tensor) -> None:
    """Write the values into a vector, over and over."""
    for part in flat.split(len(values)):
        part.copy_(values[: len(part)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="3b")
    parser.add_argument("--blocks", type=int, help="decoder blocks, instead of the shape's own")
    parser.add_argument("--shared-blocks", action="store_true", help="write the first block alone")
    arguments = parser.parse_args()
    shape = dict(SHAPES[arguments.shape])
    if arguments.blocks is not None:
        shape["num_hidden_layers"] = arguments.blocks
    print(write_checkpoint(arguments.folder, shared_blocks=arguments.shared_blocks, **shape))


if __name__ == "__main__":
    main()
