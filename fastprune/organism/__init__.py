"""A tiny language model on which every claim of the method can be checked on a CPU: language, training, checkpoints."""

from fastprune.organism.checkpoints import STAGES, checkpoint_path, load_organism
from fastprune.organism.data import calibration_rows, evaluation_rows, export_data
from fastprune.organism.language import NEIGHBOUR, SKILLS, Language
from fastprune.organism.train import train_organism

__all__ = [
    "NEIGHBOUR",
    "SKILLS",
    "STAGES",
    "Language",
    "calibration_rows",
    "checkpoint_path",
    "evaluation_rows",
    "export_data",
    "load_organism",
    "train_organism",
]
