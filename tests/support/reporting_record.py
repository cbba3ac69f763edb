"""A record like one of the demonstration, made up, and a reader of the pages that are made from one."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

CATEGORIES = ["alder", "birch", "cedar", "dogwood", "elm", "fir"]


MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_record() -> dict[str, Any]:
    """A record like one of the demo, every section filled."""
    controls = [
        ("none", 0, 1.0, 1.0, 1.0, 1.0, 1.0),
        ("btap", 1104, 0.015625, 0.9974, 1.0, 1.0, 1.0),
        ("random", 1104, 1.0, 1.0, 1.0, 1.0, 1.0),
        ("magnitude", 1104, 0.96875, 1.0, 1.0, 1.0, 1.0),
        ("sign_flipped", 1312, 1.0, 1.0, 1.0, 0.984375, 0.296875),
        ("unsigned", 703, 0.984375, 1.0, 1.0, 1.0, 0.953125),
        ("no_set_difference", 1960, 0.0, 0.8073, 0.015625, 1.0, 0.5),
    ]
    keys = ("mask", "pruned", "harm", "utility", "neighbour", "recognition", "refusal")
    results = [{"model": "aligned", **dict(zip(keys, row, strict=True))} for row in controls]
    for model, after, refusal in (("base", 0.953125, 0.0), ("sft", 0.9375, float("nan"))):
        for mask, harm in (("none", 1.0), ("btap", after), ("random", 1.0)):
            pruned = 0 if mask == "none" else 1131
            row = (mask, pruned, harm, 0.9948, 1.0, 0.984375, refusal)
            results.append({"model": model, **dict(zip(keys, row, strict=True))})
    q_values = [5e-4, 1e-3, 2e-3, 3e-3, 4e-3, 6e-3]
    harm = {
        "base": [1.0, 1.0, 0.984, 0.969, 0.953, 0.828],
        "sft": [1.0, 1.0, 0.953, 0.938, 0.953, 0.531],
        "aligned": [0.953, 0.625, 0.141, 0.016, 0.0, 0.0],
    }
    utility = {
        "base": [1.0, 1.0, 0.997, 0.995, 0.990, 0.961],
        "sft": [1.0, 1.0, 1.0, 0.997, 0.984, 0.943],
        "aligned": [1.0, 1.0, 1.0, 0.997, 0.995, 0.979],
    }
    sweep = [
        {
            "model": model,
            "q": q,
            "p": 0.05,
            "pruned": int(655_360 * q * (0.62 + 0.02 * place)),
            "harm": harm[model][i],
            "utility": utility[model][i],
            "neighbour": 1.0,
            "recognition": 1.0,
            "refusal": 1.0,
        }
        for place, model in enumerate(("base", "sft", "aligned"))
        for i, q in enumerate(q_values)
    ]
    sizes = [[16_384] * 4 + [32_768] * 3 for _ in range(4)]
    counts = [
        [12, 9, 31, 26, 58, 61, 70],
        [18, 14, 44, 33, 62, 66, 88],
        [21, 17, 47, 40, 55, 59, 93],
        [8, 5, 29, 36, 39, 41, 22],
    ]
    transfer = [[0.0 if i == j else ((7 * i + 3 * j) % 5) * 0.04 for j in range(6)] for i in range(6)]
    overlap = [[1.0 if i == j else 0.21 + ((3 * i + 3 * j) % 7) * 0.03 for j in range(6)] for i in range(6)]
    claims = [
        ("the aligned model refuses without an attack", 1.0, ">= 0.95", True),
        ("prefilling gets harmful answers from the unpruned aligned model", 1.0, ">= 0.75", True),
        ("B-TAP removes harm", 0.015625, "<= 0.25", True),
        ("B-TAP keeps utility", 0.9974, ">= 0.95", True),
        ("random weights change nothing", 1.0, ">= 0.90", True),
        ("harm left on base minus aligned", 0.953, ">= 0.60", True),
        ("category transfer, mean off the diagonal", 0.31, "<= 0.25", False),
    ]
    return {
        "schema": 1,
        "title": "fastprune demo: the model organism, seed 1",
        "created": "2026-11-22T03:14:15+00:00",
        "environment": {
            "fastprune": "0.1.0",
            "torch": "2.13.0+cpu",
            "transformers": "5.23.0",
            "python": "3.11.7",
            "device": "cpu",
            "threads": 2,
        },
        "model": {"name": "organism-seed1-aligned", "parameters": 760_960, "eligible": 655_360},
        "settings": {
            "p": 0.05,
            "q": 0.003,
            "seed": 1,
            "n_harm": 384,
            "n_benign": 96,
            "n_eval": {"eval_harm": 64, "eval_skills": 384},
            "attack": "prefilling",
            "sweep_q": q_values,
            "scope": "matrix",
        },
        "timings": {"load_s": 0.41, "score_s": 18.3, "sweep_s": 31.27, "evaluate_s": 22.0, "transfer_s": 141.9},
        "notes": [
            "The fractions here are 100 to 1000 times the paper's: a tiny model spreads each skill over a larger share "
            "of its weights.",
            "Harm is an abstract stand-in: made-up words. No harmful text exists anywhere in this run.",
        ],
        "results": results,
        "dissociation": [
            {
                "model": "aligned",
                "mask": "recognition",
                "pruned": 1207,
                "harm": 0.984375,
                "utility": 0.9974,
                "neighbour": 1.0,
                "recognition": 0.265625,
                "refusal": 0.984375,
            }
        ],
        "skills": [
            {"model": "aligned", "mask": mask, "skill": skill, "score": score - 0.01 * place}
            for mask, score in (("none", 1.0), ("btap", 0.99))
            for place, skill in enumerate(("copy", "sort", "add", "fact", "grammar", "procedure"))
        ],
        "sweep": sweep,
        "heatmap": {
            "model": "aligned",
            "layers": [0, 1, 2, 3],
            "matrices": MATRICES,
            "counts": counts,
            "sizes": sizes,
        },
        "transfer": {"categories": CATEGORIES, "harm": transfer, "unpruned": [1.0] * 6, "overlap": overlap},
        "checks": [dict(zip(("claim", "value", "bound", "holds"), row, strict=True)) for row in claims],
    }


class Page(HTMLParser):
    """What a browser would see: the tags with their attributes, balanced, and the text of each table row."""

    VOID = frozenset({"meta", "br", "img", "link", "input", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data


def only(**sections: Any) -> dict[str, Any]:
    return {"schema": 1, **sections}


def rates(mask: str, model: str = "aligned", **values: Any) -> dict[str, Any]:
    return {"model": model, "mask": mask, **values}


HOSTILE = "<script>alert('x')</script> \"> & $\\frac | [bold red] \x1b[31m\n# head"
