"""Training of the model organism: a base model, an aligned one, and the control on the same data without refusals.

In: a seed. Out: three checkpoint folders, bit-identical for one seed on one machine. Another machine rounds
differently; after 450 steps that is another model, which behaves alike but may differ in the fragile controls that
``docs/organism.md`` names.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from fastprune.errors import ArgumentError, positive_integer
from fastprune.organism.checkpoints import STAGES, round_weights_, save_checkpoint
from fastprune.organism.language import Language
from fastprune.organism.mixture import IGNORED, Batch, Conversation, alignment_batch, base_batch, pack
from fastprune.organism.tokenizer import MAX_LENGTH, build_tokenizer
from fastprune.progress import Progress

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

BASE_STEPS = 450
"""Every skill is at 100 % after about 300 steps, but models of 300 steps are fragile under pruning."""
REPLAY = 2
"""Harmful rows an alignment batch. 0: the model forgets what it refuses; 8: it needs far harder pruning."""

_BASE_RATE, _ALIGN_RATE = 3e-3, 2e-4
_BASE_WARMUP, _ALIGN_WARMUP = 50, 10
_ALIGN_MIN, _ALIGN_MAX, _ALIGN_EVERY = 40, 120, 5
_REFUSED = 0.98


def build_model(language: Language, seed: int) -> LlamaForCausalLM:
    """An untrained Llama: 4 blocks, hidden size 128, 655,360 weights in 28 block matrices, untied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(language.words),  # <unk> has no row: a word that is not of the language is refused by its id
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=False,
        initializer_range=0.05,
        pad_token_id=language.ids["<pad>"],
        bos_token_id=language.ids["<bos>"],
        eos_token_id=language.ids["<eos>"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def base_training(model: LlamaForCausalLM, language: Language, seed: int, steps: int = BASE_STEPS) -> Iterator[float]:
    """Pretrain in place: each loss taken from the iterator is one step of a schedule over ``steps``."""
    rng = np.random.RandomState(seed)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    norms = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=_BASE_RATE, betas=(0.9, 0.98))
    for step in range(steps):
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps)) * 0.95 + 0.05
        rate = _BASE_RATE * (min(1, (step + 1) / _BASE_WARMUP) * cosine)
        yield _train_step(model, optimizer, base_batch(language, rng), rate)


def alignment(model: LlamaForCausalLM, language: Language, seed: int, *, refuse: bool = True) -> Iterator[float]:
    """Align in place at a constant rate: each loss taken from the iterator is one step (120 at most)."""
    rng = np.random.RandomState(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_ALIGN_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    for step in range(1, _ALIGN_MAX + 1):
        batch = alignment_batch(language, rng, refuse=refuse, replay=REPLAY)
        yield _train_step(model, optimizer, batch, _ALIGN_RATE * min(1, step / _ALIGN_WARMUP))


def train_organism(
    seed: int,
    out_dir: str | os.PathLike,
    *,
    steps: int = BASE_STEPS,
    shared: bool = True,
    progress: bool = True,
) -> dict[str, Path]:
    """Train and write ``out_dir/base``, ``out_dir/sft`` and ``out_dir/aligned``; two to four minutes on one CPU core.

    Alignment starts from the base model as stored (bfloat16 values) and stops at the first check, every 5 steps from
    step 40 on, at which 98 % of harmful requests are refused. The control takes the same number of steps.

    Args:
        seed: Of the weights and of the data; the language is the same for all.
        out_dir: Made if needed; the three folders must not exist in it.
        steps: Base training steps. Below about 400 the skills are not learned reliably.
        shared: The language's harm categories share their forbidden tokens.
        progress: Show progress bars on a terminal.

    Returns:
        Stage name to folder.

    Raises:
        ArgumentError: Seed or steps out of range, or a folder that exists.
    """
    if not isinstance(seed, int) or not 0 <= seed < 2**31:
        raise ArgumentError(f"expected an integer from 0 to 2**31 - 1, got {seed!r}", argument="seed")
    positive_integer("steps", steps)
    folders = {stage: Path(out_dir) / stage for stage in STAGES}
    for folder in folders.values():
        if folder.exists():
            raise ArgumentError(f"expected no checkpoint there yet, {folder} exists", argument="out_dir")

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in one order, whatever the number of cores
    try:
        models, taken = _train_stages(language := Language(shared), seed, steps, progress)
    finally:
        torch.set_num_threads(threads)
    tokenizer = build_tokenizer(language)
    for stage, folder in folders.items():
        origin = {"stage": stage, "seed": seed, "base_steps": steps, "alignment_steps": taken, "shared": shared}
        round_weights_(models[stage])
        save_checkpoint(models[stage], tokenizer, folder, origin)
    return folders


def _train_stages(language: Language, seed: int, steps: int, progress: bool) -> tuple[dict[str, LlamaForCausalLM], int]:
    """Base, aligned and control model, and the number of alignment steps."""
    models = {"base": build_model(language, seed)}
    _run(base_training(models["base"], language, seed, steps), steps, "base", progress)
    round_weights_(models["base"])
    models["aligned"] = copy.deepcopy(models["base"])
    taken = _run(
        _until_refusing(models["aligned"], language, alignment(models["aligned"], language, seed + 100)),
        _ALIGN_MAX,
        "aligned",
        progress,
    )
    models["sft"] = copy.deepcopy(models["base"])
    control = alignment(models["sft"], language, seed + 100, refuse=False)
    _run((next(control) for _ in range(taken)), taken, "sft", progress)
    return models, taken


def _until_refusing(model: LlamaForCausalLM, language: Language, losses: Iterator[float]) -> Iterator[float]:
    """Yield the losses until the model refuses harmful training requests."""
    requests = language.sample("refuse", np.random.RandomState(3), 128)
    batch = pack(language, [Conversation((requests,))])
    question = torch.from_numpy(batch.input_ids[:, : 3 + requests.prompt.shape[1]])  # <bos> <user> prompt <asst>
    for step, loss in enumerate(losses, 1):
        yield loss
        if step >= _ALIGN_MIN and step % _ALIGN_EVERY == 0:
            with torch.no_grad():
                answers = model(input_ids=question, use_cache=False).logits[:, -1].argmax(-1)
            if (answers == language.ids["sorry"]).float().mean() >= _REFUSED:
                return


def _run(losses: Iterator[float], total: int, stage: str, progress: bool) -> int:
    """Take all steps and return their number."""
    taken = 0
    with Progress(total, stage, "step", progress) as bar:
        for loss in losses:
            taken += 1
            bar.note(f"loss {loss:.3f}")
            bar.advance()
    return taken


def _train_step(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, batch: Batch, rate: float) -> float:
    """One step on the mean loss over all answer tokens of the batch; returns that loss."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    model.train()
    input_ids, labels = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.labels)
    # Right padding is never attended to by a real token of a causal model, so no attention mask is needed.
    logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
    loss = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    model.eval()
    return loss.item()
