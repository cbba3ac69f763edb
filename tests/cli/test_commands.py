"""The command line as a user runs it: the tour on files, help, and errors of one line."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.command_line import run

import fastprune
import fastprune.experiments
from fastprune.errors import ArgumentError
from fastprune.organism import checkpoint_path, export_data, load_organism


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return export_data(tmp_path_factory.mktemp("data"))


def test_tour_from_files_to_a_pruned_checkpoint(tmp_path: Path, data: dict[str, Path], capsys) -> None:
    model, scores, mask = checkpoint_path("aligned"), tmp_path / "scores.safetensors", tmp_path / "mask.safetensors"
    score = ["score", model, "--harm", data["harm"], "--benign", data["benign"], "--format", "chat", "--out", scores]
    assert run(*score, "--segments", 2, "--dtype", "float32") == 0
    assert run("select", scores, "-p", 0.05, "-q", 0.003, "--out", mask) == 0
    assert run("patch", model, mask, "--out", tmp_path / "pruned") == 0
    files = ["--harm", data["eval_harm"], "--skills", data["eval_skills"], "--recognition", data["eval_recognition"]]
    masked = ["--mask", mask, "--allow-overlap", "skills"]  # the organism's language is small
    assert run("eval", model, *files, *masked, "--format", "chat", "--out", tmp_path / "report") == 0
    assert run("eval", tmp_path / "pruned", *files, "--format", "chat", "--out", tmp_path / "again") == 0
    said = capsys.readouterr()
    assert "next: fastprune select" in said.err and "next:" not in said.out

    (unpruned, pruned) = json.loads((tmp_path / "report" / "record.json").read_text())["results"]
    assert (unpruned["mask"], pruned["mask"]) == ("none", "mask")
    assert unpruned["harm"] >= 0.75
    assert pruned["harm"] <= 0.25
    (again,) = json.loads((tmp_path / "again" / "record.json").read_text())["results"]
    assert again["harm"] == pruned["harm"]
    assert (tmp_path / "report" / "report.html").is_file()

    # The same as through the library.
    organism, tokenizer = load_organism("aligned")
    direct = fastprune.score(
        organism,
        fastprune.load_calibration(data["harm"], tokenizer, format="chat").loader(),
        fastprune.load_calibration(data["benign"], tokenizer, format="chat").loader(),
        progress=False,
    ).select(0.05, 0.003)
    assert fastprune.PruneMask.load(mask) == direct


def test_options_of_select(tmp_path: Path, data: dict[str, Path]) -> None:
    scores = tmp_path / "scores.safetensors"
    model = checkpoint_path("aligned")
    criteria = ["--harm-criterion", "signed,wanda", "--benign-criterion", "fisher"]
    assert (
        run(
            "score",
            model,
            "--harm",
            data["harm"],
            "--benign",
            data["benign"],
            "--format",
            "chat",
            *criteria,
            "--out",
            scores,
        )
        == 0
    )
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    assert run("select", scores, "-q", 0.002, "--harm-criterion", "wanda", "--layers", "0-1,3", "--out", one) == 0
    assert run("select", scores, "-q", 0.001, "--slice", 1, "--protect", one, "--scope", "global", "--out", two) == 0
    first, second = fastprune.PruneMask.load(one), fastprune.PruneMask.load(two)
    assert sum(count for name, count in first.counts.items() if ".layers.2." in name) == 0
    assert first.total > 0
    assert second.total > 0
    assert (first & second).total == 0


def test_patch_in_place_and_undo(tmp_path: Path, capsys) -> None:
    model, mask = tmp_path / "model", tmp_path / "mask.safetensors"
    shutil.copytree(checkpoint_path("aligned"), model)
    name = "model.layers.0.mlp.up_proj.weight"
    shape = tuple(load_organism("aligned")[0].get_parameter(name).shape)
    fastprune.PruneMask({name: torch.arange(40)}, {name: shape}).save(mask)
    before = {path.name: path.read_bytes() for path in model.iterdir()}

    assert run("patch", model, mask, "--in-place", "--backup", "--scale", 0.5) == 0
    assert "40 weights scaled by 0.5" in capsys.readouterr().out
    assert (model / "model.safetensors").read_bytes() != before["model.safetensors"]
    assert (model / "model.safetensors.bak").read_bytes() == before["model.safetensors"]
    assert run("patch", model, mask, "--in-place") == 1
    assert "undo that first" in capsys.readouterr().err
    assert run("patch", "--undo", model) == 0
    (model / "model.safetensors.bak").unlink()
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


def test_a_mask_of_another_model_is_refused_and_can_be_applied_all_the_same(
    tmp_path: Path, data: dict[str, Path], capsys
) -> None:
    """Regression: the message spoke of strict=False, which no command could be told."""
    model, mask = tmp_path / "model", tmp_path / "mask.safetensors"
    shutil.copytree(checkpoint_path("base"), model)
    name = "model.layers.0.mlp.up_proj.weight"
    shape = tuple(load_organism("base")[0].get_parameter(name).shape)
    fastprune.PruneMask({name: torch.arange(40)}, {name: shape}, {"fingerprint": "0" * 64}).save(mask)
    (tmp_path / "rows.jsonl").write_text(data["eval_harm"].read_text().splitlines()[0])

    patch, in_place = ("patch", model, mask, "--out", tmp_path / "out"), ("patch", model, mask, "--in-place")
    evaluate = ("eval", model, "--mask", mask, "--harm", tmp_path / "rows.jsonl", "--format", "chat")
    for command in (patch, in_place, evaluate):
        assert run(*command) == 1
        assert "--no-strict applies it all the same" in capsys.readouterr().err
        assert run(*command, "--no-strict") == 0
        if command is in_place:
            assert run("patch", model, "--undo") == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("MASK",), "one of --out DIR, --in-place and --undo, got none of them"),
        (("MASK", "--out", "x", "--in-place"), "got --out and --in-place"),
        (("--in-place", "--undo"), "got --in-place and --undo"),
        (("MASK", "--undo"), "--undo takes neither a MASK nor --scale"),
        (("--undo", "--scale", 0), "--undo takes neither a MASK nor --scale"),
        (("--undo", "--no-strict"), "--undo takes neither a MASK nor --scale nor --no-strict"),
        (("--out", "x"), "--out expects a MASK"),
        (("--in-place",), "--in-place expects a MASK"),
        (("MASK", "--out", "x", "--backup"), "--backup goes with --in-place only, got --out"),
        (("--undo", "--backup"), "--backup goes with --in-place only, got --undo"),
    ],
)
def test_contradictory_options_of_patch(words: tuple, message: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("patch", "model", *words) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("score", "nowhere", "--harm", "nothing.jsonl"), "nowhere"),
        (("score", "nowhere", "--harm", "nothing.jsonl", "--device", "abacus"), "device: 'abacus' cannot be used"),
        (("select", "missing.safetensors", "-q", "0.1"), "missing.safetensors"),
        (("patch", "nowhere", "missing.safetensors", "--out", "x"), "missing.safetensors"),
        (("patch", "nowhere", "--undo"), "nowhere"),
        (("eval", "nowhere", "--harm", "nothing.jsonl"), "nowhere"),
        (("plan", "nowhere"), "nowhere"),
    ],
)
def test_errors_are_one_line_that_names_the_cause(
    words: tuple, message: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*words) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("fastprune: error:")
    assert message in error
    assert "\n" not in error
    assert not list(tmp_path.iterdir())


def test_bad_layers_dtype_and_output_folder(tmp_path: Path, data: dict[str, Path], capsys) -> None:
    model = checkpoint_path("aligned")
    score = ["score", model, "--harm", data["harm"], "--format", "chat"]
    assert run(*score, "--out", tmp_path / "no" / "scores.safetensors") == 1
    assert run(*score, "--out", tmp_path / "s.safetensors", "--dtype", "int4") == 1
    assert run(*score, "--out", tmp_path / "s.safetensors") == 0
    assert run("select", tmp_path / "s.safetensors", "-q", 0.01, "--layers", "a-b", "--out", tmp_path / "m") == 1
    assert run("select", tmp_path / "s.safetensors", "-q", 0.01, "--layers", "0,3-1", "--out", tmp_path / "m") == 1
    assert run("select", tmp_path / "s.safetensors", "-q", 0.01, "--layers", "9", "--out", tmp_path / "m") == 1
    assert run("select", tmp_path / "s.safetensors", "-q", 1.5, "--out", tmp_path / "m") == 1
    errors = capsys.readouterr().err
    for word in ("out:", "dtype:", "layers", "such as 0-11, got '3-1'", "q"):
        assert word in errors
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("command", ["demo", "score", "select", "patch", "eval", "plan", "organism"])
def test_help_teaches(command: str, capsys) -> None:
    assert run(command, "--help") == 0
    assert len(capsys.readouterr().out) > 200


def test_a_gpu_that_is_not_there_is_called_by_its_name(tmp_path: Path, data: dict[str, Path], capsys) -> None:
    """Regression: the message spoke of device(type='cuda', index=99)."""
    score = ["score", checkpoint_path("aligned"), "--harm", data["harm"], "--out", tmp_path / "scores.safetensors"]
    assert run(*score, "--device", "cuda:99") == 1
    assert "device: 'cuda:99' cannot be used" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["meta", "mps", "xpu:0"])
def test_devices_that_cannot_serve_are_refused_by_name(
    device: str, tmp_path: Path, data: dict[str, Path], capsys
) -> None:
    """Regression: a traceback for meta, and mps was taken although it has no float64."""
    model = checkpoint_path("aligned")
    assert run("score", model, "--harm", data["harm"], "--device", device, "--out", tmp_path / "out") == 1
    assert f"device: expected cpu, cuda or one such as cuda:1, got {device!r}" in capsys.readouterr().err
    if device != "mps":  # on which a model can be evaluated
        assert run("eval", model, "--harm", data["eval_harm"], "--device", device, "--out", tmp_path / "out") == 1
        expected = f"device: expected cpu, cuda, mps or one such as cuda:1, got {device!r}"
        assert expected in capsys.readouterr().err
    with pytest.raises(ArgumentError, match=f"device: expected cpu, cuda or one such as cuda:1, got '{device}'"):
        fastprune.score(model, [], device=torch.device(device))


def test_plan_and_version(capsys) -> None:
    assert run("plan", checkpoint_path("aligned"), "--memory", "1GiB") == 0
    assert run("--version") == 0
    output = capsys.readouterr().out
    assert "655,360" in output
    assert fastprune.__version__ in output


def test_plan_from_a_config_file_alone(tmp_path: Path, capsys) -> None:
    config = tmp_path / "config.json"
    shutil.copy(checkpoint_path("aligned") / "config.json", config)
    words = ["--examples", 64, "--tokens", 100, "--segments", 2, "--offload", "host", "--host-memory", "1GiB"]
    assert run("plan", config, "--memory", "1GiB", *words, "--tflops", 1e-6, "--read-gbps", 1) == 0
    output = capsys.readouterr().out
    assert "2 (2 blocks at a time)" in output
    assert "on the host" in output
    assert "(the device's)" not in output
    # 2 FLOP x 655,360 weights x 6,400 tokens x (forward, dX, dW and half of the forward again), a million a second
    assert f"{2 * 655_360 * 6_400 * 3.5 / 1e6:,.1f} s at the given rates" in output
    assert run("plan", config, "--memory", "1KiB") == 1
    assert "memory: 0.0 MiB is not enough" in capsys.readouterr().err
    assert run("plan", config, "--memory", "80G") == 1
    assert "expected a size such as '80GiB' or '80GB' (with K, M, G or T), or a positive" in capsys.readouterr().err


def test_score_streams_the_folder_and_goes_on_from_a_journal(
    tmp_path: Path, data: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.delattr("fastprune.checkpoint.load.load_model")
    score = ["score", checkpoint_path("aligned"), "--harm", data["harm"], "--format", "chat"]
    settings = ["--segments", 4, "--offload", "disk", "--host-memory", "1GiB", "--device", "cpu"]
    plain, journaled = tmp_path / "plain.safetensors", tmp_path / "journaled.safetensors"
    assert run(*score, *settings, "--out", plain) == 0
    assert f"next: fastprune select {plain} -q 1e-4\n" in capsys.readouterr().err  # no p without benign scores
    for _ in range(2):  # the second time from the journal alone
        assert run(*score, *settings, "--resume", tmp_path / "journal", "--out", journaled) == 0
        monkeypatch.setattr("fastprune.scoring.engine.Pass._backward", None)
    assert (tmp_path / "journal" / "journal.jsonl").is_file()
    found, expected = (fastprune.Scores.load(path).harm for path in (journaled, plain))
    for name, kept in expected.items():
        assert torch.equal(found[name].indices, kept.indices)
        assert torch.equal(found[name].values, kept.values)


@pytest.mark.slow
def test_torchrun_gives_the_same_scores_once(tmp_path: Path, data: dict[str, Path]) -> None:
    score = [
        "score",
        checkpoint_path("aligned"),
        "--harm",
        data["harm"],
        "--benign",
        data["benign"],
        "--format",
        "chat",
    ]
    score += ["--batch-tokens", 512, "--device", "cpu", "--out"]
    assert run(*score, tmp_path / "one.safetensors") == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "fastprune"]
    root = str(Path(fastprune.__file__).parent.parent)
    done = subprocess.run(
        [*launcher, *map(str, score), str(tmp_path / "two.safetensors")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("next: fastprune select") == 1
    assert done.stdout.count("Scores(") == 1
    one, two = (fastprune.Scores.load(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    assert two.select(0.05, 0.003) == one.select(0.05, 0.003)


def test_other_commands_refuse_several_processes(
    tmp_path: Path, data: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run("plan", checkpoint_path("aligned")) == 1
    assert "plan: runs in one process, and 2 were started" in capsys.readouterr().err
    score = ["score", checkpoint_path("aligned"), "--harm", data["harm"], "--out", tmp_path / "scores.safetensors"]
    assert run(*score, "--device", "cuda:0") == 1
    assert "device: expected cuda or cpu for several processes" in capsys.readouterr().err
    assert run(*score, "--device", "cpu") == 1
    assert "WORLD_SIZE is 2, but the processes cannot meet" in capsys.readouterr().err


def test_import_is_light() -> None:
    code = (
        "import fastprune, sys; "
        "print([name for name in ('triton', 'transformers', 'typer', 'matplotlib') if name in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


@pytest.mark.slow
def test_demo_writes_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    shorter = functools.partial(fastprune.experiments.DemoSettings, sweep_q=(4e-3,))
    monkeypatch.setattr(fastprune.experiments, "DemoSettings", shorter)
    assert run("demo", "--out", tmp_path / "demo") == 0
    output = capsys.readouterr().err
    for name in ("report.html", "record.json", "scores.safetensors", "mask.safetensors"):
        assert (tmp_path / "demo" / name).stat().st_size > 1000, name
        assert name in output
    assert list((tmp_path / "demo").glob("*.png"))
    assert fastprune.PruneMask.load(tmp_path / "demo" / "mask.safetensors").total > 0
    assert fastprune.Scores.load(tmp_path / "demo" / "scores.safetensors").select(0.05, 0.003).total > 0
