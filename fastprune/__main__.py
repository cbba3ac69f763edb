"""``python -m fastprune``: the command line, for launchers that start modules (``python -m torch.distributed.run``)."""

from __future__ import annotations

from fastprune.cli import main

if __name__ == "__main__":
    main()
