"""Plans: the fewest segments that fit, the fastest place for hidden states, clear refusals. Peaks: test_memory.py."""

from __future__ import annotations

import sys

import pytest
import torch
import transformers
from support.architectures import CONFIGS, MOE_CONFIGS, build

import fastprune
from fastprune.errors import ArgumentError, NotFoundError
from fastprune.model.anatomy import Anatomy
from fastprune.planning.estimate import _FRAGMENTED, _WORKSPACE
from fastprune.planning.footprint import activation_bound, activation_bytes

GIB = 2**30


def llama(size: str) -> transformers.LlamaConfig:
    shapes = {"8B": (4096, 14_336, 32, 32), "70B": (8192, 28_672, 80, 64)}
    hidden, intermediate, blocks, heads = shapes[size]
    return transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=8,
        vocab_size=128_256,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


def test_a_config_alone_is_enough_and_nothing_is_built() -> None:
    plan = fastprune.plan(llama("70B"), 824, 250, memory="80GiB", host_memory="128GiB")
    assert plan.parameters == 70_553_706_496
    assert plan.eligible == 68_451_041_280
    assert 1 < plan.segments < 80
    assert plan.device_bytes < 80 * GIB and plan.host_bytes < 128 * GIB and plan.disk_bytes == 0
    assert plan.offload == "host"
    # weights once, all but the last segment and the head a second time
    assert 1.8 * 2 * plan.parameters < plan.read_bytes <= 2 * 2 * plan.parameters
    # 2 FLOPs a weight and token for forward, dX and dW, and again for most of the forward
    work = 2 * plan.eligible * 824 * 250
    assert 3.8 * work < plan.flops < 4 * work


def test_the_fewest_segments_that_fit() -> None:
    for budget in (24, 40, 80):
        plan = fastprune.plan(llama("8B"), 824, 250, memory=f"{budget}GiB", host_memory="64GiB")
        assert plan.device_bytes <= budget * GIB
        if plan.segments > 1:
            fewer = fastprune.plan(
                llama("8B"), 824, 250, segments=plan.segments - 1, offload="disk", host_memory="64GiB"
            )
            assert fewer.device_bytes > budget * GIB
    assert fastprune.plan(llama("8B"), 824, 250).segments == 1  # without a budget nothing is recomputed


@pytest.mark.slow
def test_hidden_states_go_where_there_is_room() -> None:
    def where(host_memory: str) -> fastprune.scoring.Plan:
        return fastprune.plan(llama("70B"), 824, 250, memory="24GiB", host_memory=host_memory)

    assert where("500GiB").offload == "host" and where("500GiB").disk_bytes == 0
    assert where("16GiB").offload == "disk" and where("16GiB").disk_bytes == where("16GiB").boundary_bytes
    assert fastprune.plan(llama("8B"), 8, 64, memory="80GiB").offload == "device"
    chosen = fastprune.plan(llama("8B"), 8, 64, offload="disk", segments=4)
    assert (chosen.offload, chosen.segments) == ("disk", 4)


def test_memory_falls_with_segments_and_grows_with_data() -> None:
    peaks = [fastprune.plan(llama("8B"), 64, 64, segments=s).device_bytes for s in (1, 2, 4, 8, 16)]
    assert peaks == sorted(peaks, reverse=True)
    few, many = (fastprune.plan(llama("8B"), n, 250, segments=8).boundary_bytes for n in (100, 400))
    assert many == 4 * few


def test_kept_scores_are_counted_as_they_come() -> None:
    """The head makes the last segment the largest; it goes backward first, when nothing above it has been kept."""
    plan = fastprune.plan(llama("8B"), 64, 64, segments=32, offload="disk")
    others = plan.weight_bytes + plan.accumulator_bytes + plan.activation_bytes
    in_use = (plan.device_bytes - _WORKSPACE) / (1 + _FRAGMENTED)
    assert others < in_use < others + 0.6 * plan.kept_bytes


def test_time_at_given_rates() -> None:
    plan = fastprune.plan(llama("8B"), 824, 250, segments=4, flops_per_second=1e14)
    assert plan.seconds == pytest.approx(plan.flops / 1e14)
    slow_disk = fastprune.plan(llama("8B"), 824, 250, segments=4, flops_per_second=1e14, read_bytes_per_second=1e8)
    assert slow_disk.seconds == pytest.approx(plan.read_bytes / 1e8)
    assert fastprune.plan(llama("8B"), 824, 250).seconds is None


def test_a_plan_prints_what_lies_where() -> None:
    text = str(fastprune.plan(llama("70B"), 824, 250, memory="24GiB", host_memory="16GiB", flops_per_second=4e14))
    for part in ("70,553,706,496 parameters", "segments", "on disk", "peak, device", "peak, host", "read from disk"):
        assert part in text
    assert "s at the given rates" in text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory": "5GiB"}, r"memory: 5\.00 GiB is not enough: 80 segments of 80 blocks need \d+\.\d+ GiB"),
        (
            {"memory": "24GiB", "host_memory": "10GiB", "offload": "host"},
            r"host_memory: 10\.00 GiB.*offload='disk'",
        ),
        ({"host_memory": "1MiB", "offload": "host", "segments": 4}, r"host_memory: 1\.0 MiB is not enough"),
        ({"host_memory": "1MiB"}, r"host_memory: 1\.0 MiB is not enough"),
        ({"memory": "plenty"}, "memory"),
        ({"offload": "cloud"}, "offload.*cloud"),
        ({"segments": 81}, "segments: expected 1 … 80"),
        ({"segments": True}, "segments"),
        ({"flops_per_second": 0}, "flops_per_second"),
        ({"read_bytes_per_second": -1.0}, "read_bytes_per_second"),
    ],
)
def test_impossible_plans_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        fastprune.plan(llama("70B"), 824, 250, **settings)


def test_a_folder_is_planned_as_its_config(tmp_path) -> None:
    llama("70B").save_pretrained(tmp_path)
    budgets = {"memory": "80GiB", "host_memory": "128GiB"}
    expected = fastprune.plan(llama("70B"), 824, 250, **budgets)
    for source in (tmp_path, str(tmp_path), tmp_path / "config.json"):
        assert fastprune.plan(source, 824, 250, **budgets) == expected
    with pytest.raises(NotFoundError, match="expected a checkpoint folder"):
        fastprune.plan("no/such/folder", 824, 250)


@pytest.mark.parametrize("source", [None, {"hidden_size": 32}, 7, transformers.LlamaConfig])
def test_what_is_no_model_is_refused(source: object) -> None:
    with pytest.raises(ArgumentError, match=r"model_or_config: expected a causal language model, .*, got .*[A-Za-z]"):
        fastprune.plan(source, 824, 250)


def test_a_containers_limit_counts(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["fastprune.planning.plan"]
    free = module._available(torch.device("cpu"))
    for name, text in (("limit", "3000000"), ("used", "2000000"), ("memory.stat", "inactive_file 500000\nanon 7\n")):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(module, "_CONTAINER", ((str(tmp_path / "limit"), str(tmp_path / "used")),))
    assert module._available(torch.device("cpu")) == 1_500_000
    (tmp_path / "limit").write_text("max")
    assert module._available(torch.device("cpu")) == pytest.approx(free, rel=0.5)


def test_what_torch_holds_back_unused_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second run in one process would otherwise be cut into segments for the sake of the first one's leavings."""
    for name, value in (("mem_get_info", (1000, 5000)), ("memory_reserved", 600), ("memory_allocated", 100)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert sys.modules["fastprune.planning.plan"]._available(torch.device("cuda", 0)) == 1500


def test_pinned_memory_comes_in_powers_of_two() -> None:
    """16 examples of 250 tokens of 8192 bfloat16 states take 65.5 MB, so 2^26 bytes; 206,000 tokens are 52 pieces."""
    plan = fastprune.plan(llama("70B"), 824, 250, segments=4, offload="host", host_memory="500GiB")
    offload, rest = divmod(plan.boundary_bytes, 52 << 26)
    assert offload >= 4 and rest == 0
    uneven = {"micro_batch": (1, 4096, 2048), "padded_tokens": [4096, *[2100] * 99]}  # 64 MiB each, the short ones too
    plan = fastprune.plan(llama("70B"), 100, 2120, segments=4, offload="host", host_memory="500GiB", **uneven)
    assert plan.boundary_bytes == offload * (100 << 26)
    assert plan.boundary_bytes > fastprune.plan(llama("70B"), 824, 250, segments=4, offload="disk").boundary_bytes


@pytest.mark.parametrize("name", [*CONFIGS, *MOE_CONFIGS])
def test_the_bound_covers_what_autograd_keeps(name: str) -> None:
    model = build(name)
    config = getattr(transformers, f"{name}Config")(**{**CONFIGS, **MOE_CONFIGS}[name])
    counted = activation_bytes(config, rows=4, tokens=16)
    assert (counted is None) == (name in MOE_CONFIGS)  # their routing looks at values
    if counted is not None:
        assert counted[0] <= 1.1 * 64 * activation_bound(Anatomy.of(model, allow_meta=True))


def test_the_count_of_what_autograd_keeps_is_real() -> None:
    """The same hooks on a real block of the model count the same bytes."""
    config = transformers.LlamaConfig(**CONFIGS["Llama"])
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    block, hidden = model.model.layers[0], torch.randn(4, 16, 32, requires_grad=True)
    positions = model.model.rotary_emb(hidden, torch.arange(16)[None].expand(4, 16))
    for module in block.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda module, args, output: (keep(args[0]), None)[1])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        block(hidden, position_embeddings=positions, attention_mask=torch.zeros(4, 1, 16, 16))  # as for padded rows
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    expected = sum(size for address, (size, _) in kept.items() if address not in own)
    kept, given = activation_bytes(config, rows=4, tokens=16)
    assert kept == pytest.approx(expected, rel=0.05)
    tables = sum(table.untyped_storage().nbytes() for table in positions)
    assert tables <= given <= 4 * tables + 4 * 4 * 16 * 16  # and one mask
