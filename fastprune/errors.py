"""Every error that fastprune raises on purpose, and the way it imports optional packages.

Each class is both a :class:`FastpruneError` and the built-in error that fits, so that ``except ValueError`` written by
somebody who has never heard of this module still works. Messages name the argument, what was expected and what came.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any


class FastpruneError(Exception):
    """Base of all errors of this package. Nothing is changed in the model when one leaves a call."""


class ArgumentError(FastpruneError, ValueError):
    """An argument is out of range or of the wrong kind."""


class CalibrationError(FastpruneError, ValueError):
    """Calibration data cannot be read, tokenised or scored as given."""


class ModelError(FastpruneError, RuntimeError):
    """The model cannot be driven block by block, or its weights cannot be reached."""


class ScoringError(FastpruneError, RuntimeError):
    """A loss, gradient or score is not finite, or a statistic cannot be formed."""


class SelectionError(FastpruneError, ValueError):
    """A selection asks for more than was kept, or for nothing at all."""


class MaskError(FastpruneError, ValueError):
    """A mask does not fit the model or another mask.

    Attributes:
        undo: What takes the mask out again, where leaving :meth:`PruneMask.applied` could not.
    """

    undo: Any = None


class ArtifactError(FastpruneError, ValueError):
    """A file is truncated, foreign, or of another version."""


class DiskError(FastpruneError, OSError):
    """A file cannot be written: the disk is full, a quota is met, or the file system refuses."""


class BackendError(FastpruneError, RuntimeError):
    """An explicitly requested backend cannot serve the call."""


class NotFoundError(FastpruneError, FileNotFoundError):
    """A file or folder named by the caller does not exist."""


class MissingExtra(FastpruneError, ImportError):
    """An optional package is needed; the message names the extra that installs it."""


class FastpruneWarning(UserWarning):
    """Something the user should know although the call went on (a shortfall, a fallback, dropped rows)."""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional package.

    Args:
        module: Name of the module to import, e.g. ``"matplotlib.pyplot"``.
        extra: The extra of this distribution that installs it.

    Returns:
        The imported module.

    Raises:
        MissingExtra: The package is absent; the message says what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        if error.name is not None and error.name.split(".")[0] != package:
            raise
        raise MissingExtra(
            f"{package!r} is needed here and is not installed; run: pip install 'fastprune[{extra}]'"
        ) from error
