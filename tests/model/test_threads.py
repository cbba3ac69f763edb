"""Several threads at once: each gets its own result, and nothing of the process is other than before."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.architectures import HARM, build
from support.pass_statistics import kept

import fastprune
from fastprune.calibration import CalibrationSet, micro_batches
from fastprune.checkpoint.skeleton import _parameters_on_meta
from fastprune.errors import ModelError
from fastprune.evaluation.likelihood import log_probabilities
from fastprune.model.frozen import frozen_eval


def elsewhere(call: Callable[[], object]) -> object:
    """What a call in another thread returns, or the error that it ended in."""
    results: list[object] = []

    def run() -> None:
        try:
            results.append(call())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return results[0]


def score(source: object) -> fastprune.Scores:
    return fastprune.score(source, CalibrationSet(HARM), progress=False)


def test_folders_in_two_threads(tmp_path: Path) -> None:
    build("Llama").save_pretrained(tmp_path)
    expected = kept(score(tmp_path))
    results: list[dict] = []
    threads = [threading.Thread(target=lambda: results.append(kept(score(tmp_path)))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 3
    assert not torch.nn.Linear(2, 2).weight.is_meta


def test_another_thread_builds_its_own_modules_meanwhile() -> None:
    register = torch.nn.Module.register_parameter
    with _parameters_on_meta():
        assert torch.nn.Linear(2, 2).weight.is_meta
        weight = elsewhere(lambda: torch.nn.Linear(2, 2).weight)
    assert not weight.is_meta and weight.requires_grad
    assert torch.nn.Module.register_parameter is register


def evaluate(model: torch.nn.Module) -> torch.Tensor:
    return log_probabilities(model, micro_batches(HARM, batch_tokens=24))


@pytest.mark.parametrize("call", [score, evaluate])
def test_a_model_that_is_at_work_in_another_thread_is_refused(call: Callable) -> None:
    model, answers = build("Llama"), []

    def meanwhile(*_: object) -> None:
        if not answers:
            answers.append(elsewhere(lambda: call(model)))

    hook = model.lm_head.register_forward_hook(meanwhile)
    found = kept(score(model))
    hook.remove()
    assert isinstance(answers[0], ModelError) and "another thread is scoring or evaluating" in str(answers[0])
    assert kept(score(model)) == found == kept(elsewhere(lambda: score(model)))


def test_compilation_is_on_again_when_the_last_of_overlapping_passes_ends() -> None:
    import torch._dynamo as dynamo

    first, second = frozen_eval(build("Llama")), frozen_eval(build("GPT2"))
    with first:
        second.__enter__()
    assert dynamo.eval_frame._stance.stance == "force_eager"
    second.__exit__(None, None, None)
    assert dynamo.eval_frame._stance.stance == "default"
