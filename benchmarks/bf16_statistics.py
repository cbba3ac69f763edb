"""What adding in bfloat16 costs: the weights that are chosen, the sums, and ties, against float64 sums.

Runs on the shipped model organism with 412 + 412 examples, in half a minute on one core. One JSON line for each run,
set and fraction; docs/precision.md shows them as tables. ``--out FILE`` appends the lines to a file.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import torch
from measure import write_lines

from fastprune import ops
from fastprune.calibration import CalibrationSet, load_calibration
from fastprune.model.matrices import Matrix
from fastprune.organism import SKILLS, Language, load_organism
from fastprune.scoring import engine
from fastprune.scoring.score import score
from fastprune.scoring.scores import Scores
from fastprune.scoring.statistics import SegmentStatistics
from fastprune.scoring.top_scores import TopScores

N_EXAMPLES = 412  # of each set, as in the paper
FRACTIONS = {"harm": (3e-3, 1e-3), "benign": (5e-2, 1e-3)}  # q of the signed score, p of the absolute one
RUNS = {  # name -> (dtype of the model, dtype of the sums)
    "bfloat16 sums": (torch.float32, "bfloat16"),
    "float32 sums": (torch.float32, "float32"),
    "bfloat16 model, float32 sums": (torch.bfloat16, "float32"),
    "bfloat16 model, bfloat16 sums": (torch.bfloat16, "bfloat16"),
}


class RoundedStatistics(SegmentStatistics):
    """The sums of a segment as the published code keeps them; they are wrong, and this measures how much.

    Each example's gradient is formed in float32, rounded to bfloat16, and added to a bfloat16 sum, one example after
    the other in the order of the micro-batches; an addend below 2^-9 of the sum is lost. ``act_sq_sum`` is float32
    throughout. Arguments as for :class:`SegmentStatistics`, whose ``dtype`` is not used.
    """

    def __init__(
        self, matrices: Sequence[Matrix], statistics: tuple[str, ...], dtype: torch.dtype, backend: str | None
    ) -> None:
        super().__init__(matrices, statistics, torch.bfloat16, backend)
        self.per_example = self.wants_gradients  # the plain sum too: the order of roundings is the point

    @staticmethod
    def _zeros(matrix: Matrix, statistic: str, dtype: torch.dtype) -> torch.Tensor:
        return SegmentStatistics._zeros(matrix, statistic, torch.float32 if statistic == "act_sq_sum" else dtype)

    def _add(
        self, matrix: Matrix, left: torch.Tensor, right: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor
    ) -> None:
        exact = torch.empty(left.shape[1], right.shape[1], dtype=torch.float32, device=left.device)
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            if length == 0:
                continue
            tokens = slice(start, start + length)
            ops.accumulate_grad_sum(exact.zero_(), left[tokens], right[tokens], backend=self._backend)
            gradient = exact.to(torch.bfloat16)
            for name, accumulator in self.of[matrix.name].items():
                match name:
                    case "grad_sum":
                        accumulator += gradient
                    case "grad_abs_sum":
                        accumulator += gradient.abs()
                    case "grad_sq_sum":
                        accumulator += gradient.square()

    def finish(self, scale: float) -> None:
        """As for the exact sums; then float32, in which scores are formed."""
        super().finish(scale)
        self.of = {name: {key: total.float() for key, total in sums.items()} for name, sums in self.of.items()}


@contextlib.contextmanager
def rounded_sums() -> Iterator[None]:
    """Every pass inside adds in bfloat16. In one process only: the sums depend on the order of the examples."""
    with mock.patch.object(engine, "SegmentStatistics", RoundedStatistics):
        yield


def calibration(tokenizer: object) -> tuple[CalibrationSet, CalibrationSet]:
    language = Language()
    each = -(-N_EXAMPLES // len(SKILLS))
    by_skill = [language.rows(skill, each) for skill in SKILLS]
    benign = [row for rows in zip(*by_skill, strict=True) for row in rows][:N_EXAMPLES]
    harm = load_calibration(language.rows("harm", N_EXAMPLES), tokenizer, format="chat")
    return harm, load_calibration(benign, tokenizer, format="chat")


def lists(scores: Scores, role: str) -> dict[str, TopScores]:
    return scores.harm if role == "harm" else scores.benign


def dense(kept: TopScores) -> torch.Tensor:
    """Every score of a matrix by flat index, float32."""
    return torch.empty(kept.numel).scatter_(0, kept.indices, kept.values)


def tied(values: torch.Tensor) -> int:
    """How many of these have the very value of another one."""
    counts = values.unique(return_counts=True)[1]
    return int(counts[counts > 1].sum())


def compare(exact: Scores, other: Scores) -> Iterator[dict[str, object]]:
    for role, fractions in FRACTIONS.items():
        pairs = [(kept, lists(other, role)[name]) for name, kept in lists(exact, role).items()]
        for fraction in fractions:
            best = [(a.prefix(int(fraction * a.numel)), b.prefix(int(fraction * b.numel))) for a, b in pairs]
            weights = sum(len(a) for a, _ in best)
            common = sum(int(torch.isin(a.indices, b.indices).sum()) for a, b in best)
            line = {"role": role, "fraction": fraction, "weights": weights, "overlap": round(common / weights, 4)}
            line |= {"tied": sum(tied(b.values) for _, b in best), "tied_exact": sum(tied(a.values) for a, _ in best)}
            if role == "benign":  # signed sums have no such ratio: they cancel
                ratios = [dense(b)[a.indices] / a.values for a, b in pairs]
                of_best = [ratio[: len(a)] for ratio, (a, _) in zip(ratios, best, strict=True)]
                line |= {"median_ratio": round(float(torch.cat(ratios).nanmedian()), 4)}
                line |= {"median_ratio_of_best": round(float(torch.cat(of_best).nanmedian()), 4)}
            yield line
    p, q = FRACTIONS["benign"][0], FRACTIONS["harm"][0]
    one, two = (scores.select(p, q) for scores in (exact, other))
    line = {"role": "pruned", "fraction": q, "weights": one.total}
    yield {**line, "overlap": round((one & two).total / one.total, 4), "jaccard": round(one.jaccard(two), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    model, tokenizer = load_organism("aligned")
    harm, benign = calibration(tokenizer)

    def run(model_dtype: torch.dtype, sums: str) -> Scores:
        rounded = sums == "bfloat16"
        with rounded_sums() if rounded else contextlib.nullcontext():
            # The organism's weights are stored in bfloat16, so both models have the same ones.
            return score(
                model.to(model_dtype),
                harm,
                benign,
                p_max=1.0,
                q_max=1.0,
                statistics_dtype="float32" if rounded else sums,
                progress=False,
            )

    exact = run(torch.float32, "float64")
    lines = [
        {
            "benchmark": "bf16_statistics",
            "torch": torch.__version__,
            "run": name,
            "n_harm": len(harm),
            "n_benign": len(benign),
            **line,
        }
        for name, dtypes in RUNS.items()
        for line in compare(exact, run(*dtypes))
    ]
    write_lines(lines, arguments.out)


if __name__ == "__main__":
    main()
