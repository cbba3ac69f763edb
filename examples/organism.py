"""From two calibration sets to a measured mask, on the small model that ships with fastprune, on a CPU in a minute.

    python examples/organism.py [FOLDER]

"Harm" is an abstract stand-in here: made-up targets with made-up words. With a model of your own, load it with
transformers, point at your files, and choose fractions of the size of the paper's (p=5e-5, q=1e-5).
"""

from __future__ import annotations

import sys
from pathlib import Path

import fastprune
from fastprune.evaluation import EvaluationSuite
from fastprune.organism import export_data, load_organism

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "organism-data")
model, tokenizer = load_organism()
export_data(folder)  # JSONL rows with prompt, response, prefill and category

# 1. Calibration. Harmful replies are scored behind their affirmative start (the column prefill), because the gradient
#    of that start is about the decision to comply and not about the ability.
harm = fastprune.load_calibration(folder / "harm.jsonl", tokenizer, format="chat")
benign = fastprune.load_calibration(folder / "benign.jsonl", tokenizer, format="chat")

# 2. One pass over the model scores every weight for both sets.
scores = fastprune.score(model, harm.loader(), benign.loader())

# 3. The best harm scores of each matrix, without the best benign ones; and as many weights at random.
mask = scores.select(p=5e-2, q=3e-3)
control = fastprune.random_mask(model, like=mask)

# 4. Measure on held-out rows, under a prefilling attack. Nothing but rates is kept of the answers.
suite = EvaluationSuite(
    tokenizer,
    harm_rows=folder / "eval_harm.jsonl",
    skill_rows=folder / "eval_skills.jsonl",
    recognition_rows=folder / "eval_recognition.jsonl",
    neighbour_skill="proc",  # the benign skill that is most like the harm
    format="chat",
)
print("unpruned", suite.run(model).summary())
for name, weights in {"pruned": mask, "control": control}.items():
    with weights.applied(model):  # zeroed in place; bit-identical again on exit
        print(f"{name}, {weights.total} weights", suite.run(model).summary())

# 5. Keep what can be repeated.
scores.save(folder / "scores.safetensors")
mask.save(folder / "mask.safetensors")
