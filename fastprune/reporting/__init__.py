"""A record of a run, written for people: JSON, PNG plots, one self-contained HTML page, Markdown, a terminal table.

Everything is computed from the record alone, so that a page can be made again from ``record.json`` on any machine.
Matplotlib and rich are imported only when something is drawn or printed.

In: the JSON dict that an experiment returns. Out: files and text.
"""

from fastprune.reporting.record import load_record, validate
from fastprune.reporting.report import write_report
from fastprune.reporting.terminal import print_results

__all__ = ["load_record", "print_results", "validate", "write_report"]
