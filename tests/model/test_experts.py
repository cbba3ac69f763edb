"""The experts function alone: what it computes, which tokens it shows, and what is missing in transformers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.integrations import moe

from fastprune.errors import ModelError
from fastprune.model.experts import ExpertTokens, one_by_one, watched

N_EXPERTS, WIDTH, INNER, ROWS, TOKENS, TOP_K = 5, 6, 4, 3, 4, 2


class _Ungated(nn.Module):
    """Experts without a gate, with biases and a norm behind each, in the loop that transformers writes."""

    def __init__(self, config: object) -> None:
        super().__init__()
        self.num_experts = N_EXPERTS
        self.up_proj = nn.Parameter(torch.empty(N_EXPERTS, WIDTH, INNER))
        self.up_proj_bias = nn.Parameter(torch.empty(N_EXPERTS, INNER))
        self.down_proj = nn.Parameter(torch.empty(N_EXPERTS, INNER, WIDTH))
        self.down_proj_bias = nn.Parameter(torch.empty(N_EXPERTS, WIDTH))
        self.act_fn = nn.functional.silu
        self.post_expert_norm = nn.LayerNorm(WIDTH)

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        result = torch.zeros_like(hidden)
        for expert in range(N_EXPERTS):
            token, place = torch.where(index == expert)
            state = F.silu(hidden[token] @ self.up_proj[expert] + self.up_proj_bias[expert])
            state = self.post_expert_norm(state @ self.down_proj[expert] + self.down_proj_bias[expert])
            result.index_add_(0, token, state * weights[token, place, None])
        return result


def _mixtral() -> nn.Module:
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    return MixtralExperts(
        transformers.MixtralConfig(hidden_size=WIDTH, intermediate_size=INNER, num_local_experts=N_EXPERTS)
    )


def _gpt_oss() -> nn.Module:
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    return GptOssExperts(
        transformers.GptOssConfig(hidden_size=WIDTH, intermediate_size=INNER, num_local_experts=N_EXPERTS)
    )


def _ungated() -> nn.Module:
    decorated = moe.use_experts_implementation(is_transposed=True, has_bias=True, has_gate=False)(_Ungated)
    module = decorated(transformers.MixtralConfig())
    module.has_post_expert_norm = True  # an argument of the decorator since 5.18 or later
    return module


def prepared(make) -> tuple[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor]:
    module = make()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    module.config._experts_implementation = "eager"
    hidden = torch.randn(ROWS * TOKENS, WIDTH)
    index = torch.rand(ROWS * TOKENS, N_EXPERTS).topk(TOP_K).indices
    return module, hidden, index, torch.rand(ROWS * TOKENS, TOP_K)


@pytest.mark.parametrize("make", [_mixtral, _gpt_oss, _ungated])
def test_forward_and_gradients_are_those_of_the_module(make) -> None:
    module, hidden, index, weights = prepared(make)
    if make is _ungated:  # not every version's own loop can stand it
        index[3, 1] = index[8, 0] = N_EXPERTS  # no expert
    results = []
    for modules in ([], [module]):
        inputs = [tensor.clone().requires_grad_(True) for tensor in (hidden, weights)]
        with one_by_one(modules):
            output = module(inputs[0], index, inputs[1])
        results.append([output, *torch.autograd.grad(output.square().sum(), [*inputs, *module.parameters()])])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


class _Log:
    def __init__(self) -> None:
        self.seen: list[tuple[str, int, torch.Tensor, torch.Tensor, ExpertTokens]] = []

    def called(self, module: nn.Module, n_tokens: int) -> int:
        assert n_tokens == ROWS * TOKENS
        return ROWS

    def product(self, module, attribute, expert, x, y, tokens) -> None:
        self.seen.append((attribute, expert, x, y, tokens))


def test_a_watcher_sees_each_product_with_its_tokens_by_example() -> None:
    module, hidden, index, weights = prepared(_mixtral)
    index[index == 3] = N_EXPERTS
    log = _Log()
    with one_by_one([module]), watched(module, log), torch.no_grad():
        module(hidden, index, weights)
    with one_by_one([module]):
        module(hidden, index, weights)  # not watched any more
    reached = [expert for expert in range(N_EXPERTS) if (index == expert).any()]
    assert 3 not in reached
    assert [(attribute, expert) for attribute, expert, *_ in log.seen] == [
        (attribute, expert) for expert in reached for attribute in ("gate_up_proj", "down_proj")
    ]
    for attribute, expert, x, y, tokens in log.seen:
        at = (index == expert).any(1).nonzero()[:, 0]
        assert torch.equal(tokens.indices, at)
        rows = [at[start : start + n] // TOKENS for start, n in zip(tokens.starts, tokens.lengths, strict=True)]
        assert [set(row.tolist()) - {number} for number, row in enumerate(rows)] == [set()] * ROWS
        assert sum(map(len, rows)) == len(at)
        if attribute == "gate_up_proj":
            assert torch.equal(x, hidden[at])
        torch.testing.assert_close(y, x @ getattr(module, attribute)[expert].T)


def test_tokens_without_any_expert_give_zeros() -> None:
    module, hidden, index, weights = prepared(_mixtral)
    with one_by_one([module]):
        assert not module(hidden, torch.full_like(index, N_EXPERTS), weights).any()


def test_a_transformers_without_the_interface_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    module = _mixtral()
    monkeypatch.delattr(moe, "ALL_EXPERTS_FUNCTIONS")
    with pytest.raises(ModelError, match=r"integrations\.moe\.ALL_EXPERTS_FUNCTIONS"), one_by_one([module]):
        pass
    with one_by_one([]):
        pass  # a model without experts needs none of it
    monkeypatch.undo()
    vars(module.config).pop("_experts_implementation_internal")
    with pytest.raises(ModelError, match="_experts_implementation_internal"), one_by_one([module]):
        pass
