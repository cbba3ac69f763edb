"""The truth: statistics in float64, one example at a time, plain autograd, no batching, no hooks on gradients.

In: a causal LM and tokenised examples. Out: every statistic of every eligible weight, and dense scores formed from
them. It is short so that it can be checked by eye, slow, and shares nothing with the engine but the list of eligible
weights.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable
from typing import cast

import torch
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig

from fastprune.model.adapters import unwrap
from fastprune.model.matrices import eligible_matrices


class StayDouble(TorchFunctionMode):
    """Models cast to float32 inside norms and softmax; in float64 that would be a floor of 3e-7 under comparisons."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.float:
            return args[0].double()
        args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def _add_inputs(matrix, total, module, args):
    total += args[0].detach().flatten(0, -2).square().sum(0).view_as(total)


def _add_expert_inputs(matrix, total, module, args):
    """``args``: hidden states ``(n_tokens, hidden)`` and the experts ``(n_tokens, k)`` that each token was given."""
    x = args[0].detach()[(args[1] == matrix.expert).any(1)]
    if matrix.attribute == "down_proj":
        first = "gate_up_proj" if module.has_gate else "up_proj"
        weight = getattr(module, first)[matrix.expert].detach()
        bias = getattr(module, f"{first}_bias")[matrix.expert].detach() if module.has_bias else 0.0
        product = x @ (weight if module.is_transposed else weight.T) + bias
        x = module._apply_gate(product) if module.has_gate else module.act_fn(product)
    total += x.square().sum(0).view_as(total)


def oracle_statistics(model: torch.nn.Module, examples: Iterable) -> dict[str, dict[str, torch.Tensor]]:
    """Every statistic of method's table, in float64.

    Args:
        model: A causal LM of any float dtype; a copy is used.
        examples: Objects with ``input_ids`` and ``labels`` (-100 = not scored), unpadded.

    Returns:
        ``{name: {"grad_sum", "grad_abs_sum", "grad_sq_sum": like the weight, "act_sq_sum": (in_features,)}}``; the
        last is ``(in_features, 1)`` for a weight stored ``(in, out)``, so that it always broadcasts along the right
        axis.
    """
    model = copy.deepcopy(unwrap(model)).double().eval()
    matrices = eligible_matrices(model)
    parameters = list(dict.fromkeys(matrix.parameter.requires_grad_(True) for matrix in matrices))
    result = {
        matrix.name: {name: torch.zeros_like(matrix.weight) for name in ("grad_sum", "grad_abs_sum", "grad_sq_sum")}
        for matrix in matrices
    }
    for matrix in matrices:
        shape = (matrix.weight.shape[0], 1) if matrix.input_major else (matrix.weight.shape[1],)
        total = result[matrix.name]["act_sq_sum"] = matrix.weight.new_zeros(shape)
        if matrix.expert is not None:
            config = cast(PreTrainedConfig, matrix.module.config)
            config._experts_implementation_internal = "eager"  # the model's own code and no kernel
        hook = functools.partial(_add_inputs if matrix.expert is None else _add_expert_inputs, matrix, total)
        matrix.module.register_forward_pre_hook(hook)
    for example in examples:
        ids, labels = torch.tensor([example.input_ids]), torch.tensor(example.labels)
        with StayDouble():
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100)
        gradients = dict(zip(parameters, torch.autograd.grad(loss, parameters), strict=True))
        for matrix in matrices:
            gradient = matrix.part_of(gradients[matrix.parameter])
            result[matrix.name]["grad_sum"] += gradient
            result[matrix.name]["grad_abs_sum"] += gradient.abs()
            result[matrix.name]["grad_sq_sum"] += gradient.square()
    return {name: {key: value.detach() for key, value in values.items()} for name, values in result.items()}


def oracle_score(weight: torch.Tensor, statistics: dict[str, torch.Tensor], criterion: str) -> torch.Tensor:
    """One criterion's dense score, in float64, like the weight.

    Args:
        weight: The weight in its stored layout.
        statistics: What :func:`oracle_statistics` gives for it.
        criterion: A name of method's table.
    """
    w = weight.detach().double()
    return {
        "signed": lambda: -w * statistics["grad_sum"],
        "signed_reverse": lambda: w * statistics["grad_sum"],
        "abs": lambda: w.abs() * statistics["grad_abs_sum"],
        "abs_of_sum": lambda: (w * statistics["grad_sum"]).abs(),
        "fisher": lambda: w.square() * statistics["grad_sq_sum"],
        "wanda": lambda: w.abs() * statistics["act_sq_sum"].sqrt(),
        "magnitude": lambda: w.abs(),
    }[criterion]()


def oracle_select(harm: dict[str, torch.Tensor], benign: dict[str, torch.Tensor] | None, p: float | None, q: float):
    """The per-matrix set difference on dense scores: sorted flat indices of each matrix. Ties: lowest index first."""

    def top(score: torch.Tensor, fraction: float) -> set[int]:
        flat = score.flatten()
        best = torch.sort(flat, descending=True, stable=True).indices[: int(fraction * flat.numel())]
        return {index for index in best.tolist() if flat[index] > 0}

    return {
        name: sorted(top(score, q) - (top(benign[name], p) if p is not None and benign is not None else set()))
        for name, score in harm.items()
    }
