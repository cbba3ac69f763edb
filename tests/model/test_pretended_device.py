"""The workflow as on a GPU, but for the GPU: where tensors are made and moved, and which kernels are called.

Every tensor that is made on the CPU and used beside a device's is an error here, as it is there.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.architectures import BENIGN, HARM, build
from support.devices import masks, spread
from support.generation import tiny_model, word_tokenizer
from support.pretended_device import DeviceTensor, pretended
from transformers import LlamaConfig, LlamaForCausalLM

import fastprune
from fastprune.calibration import CalibrationSet
from fastprune.checkpoint import skeleton
from fastprune.checkpoint.streamed import Streamed
from fastprune.evaluation import EvaluationSuite, evaluate, generate_rows, perplexity
from fastprune.masking import largest_magnitude_mask
from fastprune.model.weights import EMBEDDING, HEAD
from fastprune.organism import export_data, load_organism

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("g++") is None or torch.cuda.is_available(),
    reason="the emulated kernels need Linux and g++; where there is a device, nothing has to be pretended",
)


@pytest.fixture
def calls(emulated: ModuleType) -> Iterator[list[str]]:
    """Two pretended devices, and the names of the kernels that were called."""
    with pretended(emulated) as calls:
        yield calls


@pytest.mark.slow
def test_mixing_devices_is_an_error(calls: list[str]) -> None:
    one = torch.ones(2, device="cuda:0")
    with pytest.raises(RuntimeError, match=r"one device, got .*'cpu', 'cuda:0'"):
        one + torch.ones(2)
    with pytest.raises(RuntimeError, match=r"one device, got .*'cuda:0', 'cuda:1'"):
        torch.add(one, torch.ones(2, device="cuda"))
    with pytest.raises(TypeError, match="numpy"):
        one.numpy()
    assert (one + 1 + torch.tensor(1)).cpu().numpy().tolist() == [3, 3]


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_scoring_has_the_same_pruned_sets(name: str, calls: list[str]) -> None:
    model = build(name, dtype=torch.float64)
    expected = masks(model, statistics_dtype="float64")
    assert masks(model.to("cuda:0"), statistics_dtype="float64") == expected
    assert "top_scores" in calls


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second", "offload"),
    [
        ("cuda:0", "cpu", "host"),
        ("cpu", "cuda:1", "disk"),
        ("cuda:0", "cuda:1", "device"),
        ("cuda:1", "cuda:0", "host"),
    ],
)
def test_a_model_on_two_devices(first: str, second: str, offload: str, calls: list[str]) -> None:
    model = build("Llama", dtype=torch.float64)
    expected = masks(model, statistics_dtype="float64")
    assert masks(spread(model, first, second), statistics_dtype="float64", offload=offload) == expected


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_serve_each_dtype_and_masks_are_taken_back(dtype: torch.dtype, calls: list[str]) -> None:
    model = build("GPT2", dtype=dtype).to("cuda")
    before = {name: weight.held.clone() for name, weight in model.state_dict().items()}
    mask, _ = masks(model)
    assert {"accumulate_per_example", "accumulate_act_sq_sum", "top_scores"} <= set(calls)
    with mask.applied(model):
        pruned = sum(int((weight.held != before[name]).sum()) for name, weight in model.state_dict().items())
    assert 0 < pruned <= mask.total
    for name, weight in model.state_dict().items():
        assert isinstance(weight, DeviceTensor)
        assert torch.equal(weight.held, before[name])
    writes = [call for call in calls if call.endswith("_sparse")]
    assert writes == ["apply_sparse", "restore_sparse"]  # of all matrices together
    assert fastprune.random_mask(model, like=mask, match="magnitude").counts == mask.counts


@pytest.mark.slow
def test_a_mask_is_written_device_by_device(calls: list[str]) -> None:
    model = spread(build("Llama"), "cuda:0", "cuda:1")
    before = {name: weight.held.clone() for name, weight in model.state_dict().items()}
    mask, _ = masks(model)
    with mask.applied(model):
        changed = {weight.device for name, weight in model.state_dict().items() if (weight.held != before[name]).any()}
    assert changed == {torch.device("cuda:0"), torch.device("cuda:1")}
    assert [call for call in calls if call.endswith("_sparse")] == 2 * ["apply_sparse"] + 2 * ["restore_sparse"]
    assert all(torch.equal(weight.held, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.slow
def test_a_folder_is_streamed_to_the_current_device(tmp_path: Path, calls: list[str]) -> None:
    model = build("Mixtral", num_hidden_layers=2)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    streamed, resident = (
        fastprune.score(
            source, CalibrationSet(HARM), CalibrationSet(BENIGN), segments=2, offload="host", progress=False
        )
        for source in (tmp_path, model.to("cuda"))
    )
    assert streamed.select(0.05, 0.01) == resident.select(0.05, 0.01)
    assert "accumulate_per_example" in calls


@pytest.mark.parametrize(
    ("name", "dtype", "pageable"), [("Llama", None, ""), ("Mixtral", None, "experts"), ("Llama", "bfloat16", "weight")]
)
def test_a_folder_is_read_into_pinned_memory(
    name: str, dtype: str | None, pageable: str, tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for what is converted or put together, which is copied there afterwards."""
    model = build(name, num_hidden_layers=2)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    names = {(stored.path, stored.start): name for name, stored in skeleton.stored_tensors(tmp_path).items()}
    real, pinned = skeleton.read_tensor, {}

    def noted(stored, **options):
        tensor = real(stored, **options)
        pinned[names[stored.path, stored.start]] = tensor.is_pinned()
        return tensor

    monkeypatch.setattr(skeleton, "read_tensor", noted)
    streamed = Streamed(tmp_path, torch.device("cuda:1"), dtype and getattr(torch, dtype))
    with streamed.held((EMBEDDING, 0, 1, HEAD)):
        for name, weight in streamed.model.state_dict().items():
            assert torch.equal(weight.held, model.state_dict()[name].to(weight.dtype)), name
    streamed.close()
    assert pinned == {name: not pageable or pageable not in name for name in names.values()}


def test_evaluation_gives_the_same_rates(tmp_path: Path, calls: list[str]) -> None:
    files = {}
    for name, path in export_data(tmp_path).items():
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:8]))
        files[name] = path
    model, tokenizer = load_organism("aligned")
    rows = {"harm_rows": "eval_harm", "skill_rows": "eval_skills", "recognition_rows": "eval_recognition"}
    settings = {**{name: files[key] for name, key in rows.items()}, "format": "chat", "batch_size": 4}
    expected = evaluate(model, tokenizer, **settings)
    found = evaluate(model.to("cuda"), tokenizer, **settings)
    assert found.summary() == expected.summary()


@pytest.mark.slow
@pytest.mark.parametrize("devices", [("cuda:1", "cuda:0")])
def test_a_model_on_two_devices_says_and_recognizes_the_same(
    devices: tuple[str, str], tmp_path: Path, calls: list[str]
) -> None:
    rows = [{"prompt": f"w{i} w{i + 7}", "response": "w1 w2", "prefill": "w3", "category": "c"} for i in range(5)]
    asked = [{"prompt": f"w{i}", "response": "yes" if i % 2 else "no"} for i in range(4)]
    suite = EvaluationSuite(
        word_tokenizer(), harm_rows=rows, recognition_rows=asked, max_new_tokens=6, attack=["prefilling", "none"]
    )
    drawing = {"temperature": 0.9, "samples": 2}
    generated = {"format": "raw", "max_new_tokens": 5}

    def everything(model: torch.nn.Module, store: str) -> tuple:
        mask = largest_magnitude_mask(model, fastprune.random_mask(model, like=some, seed=1))
        answers = suite.answer(model, masks={"mask": mask, "some": some}, store=tmp_path / store, **drawing)
        return (
            suite.run(model),
            [(a.key, a.text, a.finish) for a in answers],
            generate_rows(model, word_tokenizer(), rows, **generated),
            perplexity(model, word_tokenizer(), ["w1 w2 w3 w4", "w5 w6"]),
            mask,
        )

    plain = small_llama()
    name = "model.layers.3.mlp.up_proj.weight"
    some = fastprune.PruneMask({name: torch.arange(300)}, {name: tuple(plain.get_parameter(name).shape)})
    expected = everything(plain, "one")
    found = everything(spread(small_llama(), *devices), "two")
    assert found[0].to_dict() == expected[0].to_dict()
    assert found[1:] == expected[1:]
    assert len({text for _, text, _ in found[1]}) > 10


def small_llama() -> torch.nn.Module:
    """Four blocks over the vocabulary of the words."""
    torch.manual_seed(4)
    config = {**tiny_model().config.to_dict(), "num_hidden_layers": 4}
    return LlamaForCausalLM(LlamaConfig(**config)).eval()
