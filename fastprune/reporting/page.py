"""``report.html``: a self-contained page.

In: a checked record and its plots. Out: the text of the page, with plots as inline SVG and without scripts, fonts or
links. All text from the record passes through :func:`html.escape`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

from fastprune.reporting.figures import Plot, Table
from fastprune.reporting.findings import checks_summary, comparison, headline, noise
from fastprune.reporting.formatting import (
    METRICS,
    bound,
    cell,
    check_value,
    clean,
    count,
    extra_columns,
    grouped,
    harm_terms,
    measured,
    model_label,
    percent,
    percents,
    rate_cell,
    result_rows,
    seconds,
    share,
)
from fastprune.reporting.glossary import definitions
from fastprune.reporting.masks import mask_label, role
from fastprune.reporting.measurements import measurements_table
from fastprune.reporting.palette import variables
from fastprune.reporting.record import missing

WHAT_IT_IS = (
    "fastprune scores each weight of a language model by how much it promotes harmful answers, spares the weights that "
    "benign skills need, and sets the few that remain to zero. This page shows what that did to {models}."
)
_KNOWN = {
    "schema", "title", "created", "environment", "model", "settings", "timings", "notes", "results", "dissociation",
    "skills", "sweep", "heatmap", "transfer", "checks", "masks", "measurements", "attacks",
}  # fmt: skip


def page(record: Mapping[str, Any], plots: Sequence[Plot]) -> str:
    """The text of the page."""
    title = clean(record.get("title") or "fastprune report")
    sections = [
        _head(record, title),
        _notes(record),
        _checks(record),
        _results(record),
        *(_plot(plot) for plot in plots),
        _skills(record),
        _details(record),
    ]
    body = "\n".join(section for section in sections if section)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_style()}</style>\n</head>\n<body>\n<main>\n{body}\n"
        f"{_footer(record)}\n</main>\n</body>\n</html>\n"
    )


def _style() -> str:
    face = "--type: system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif;"
    rules = resources.files("fastprune.reporting").joinpath("page.css").read_text(encoding="utf-8")
    light = f":root {{ color-scheme: light dark; {face} {variables(dark=False)} }}"
    dark = f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {variables(dark=True)} }} }}"
    return f"\n{light}\n{dark}\n{rules}"


def _head(record: Mapping[str, Any], title: str) -> str:
    model = record.get("model") or {}
    facts = [clean(model["name"])] if model.get("name") else []
    if not missing(model.get("parameters")):
        facts.append(f"{count(model['parameters'])} parameters")
    if not missing(model.get("eligible")):
        facts.append(f"{count(model['eligible'])} of them may be pruned")
    if record.get("created"):
        facts.append(clean(record["created"]).replace("T", " ")[:16])
    by = " · ".join(f"<span>{escape(fact)}</span>" for fact in facts)
    found = headline(record)
    finding = f'<p class="headline">{escape(found)}</p>' if found else ""
    head = f'<h1>{escape(title)}</h1>\n<p class="by">{by}</p>\n<p>{WHAT_IT_IS.format(models=_models(record))}</p>'
    return f"<header>\n{head}\n{finding}\n{_tiles(record)}\n</header>"


def _models(record: Mapping[str, Any]) -> str:
    n = len({row["model"] for row in [*result_rows(record), *(record.get("sweep") or ())]})
    return "one model" if n < 2 else f"{n} models"


def _tiles(record: Mapping[str, Any]) -> str:
    tiles = []
    found = comparison(record)
    total = (record.get("model") or {}).get("parameters")
    chosen = found.after if found is not None else []
    unpruned = (found.before if found is not None else None) or {}
    for row in chosen:
        prefix = f"{mask_label(record, row['mask'])}: " if len(chosen) > 1 else ""
        n = row.get("pruned")
        if not missing(n):
            part = "" if missing(total) or not total else f", {share(n, total)} of the model"
            tiles.append(("", count(n), "", f"{prefix}weights removed{part}"))
        for metric, kind, words in (("harm", "harm", "should fall"), ("utility", "kept", "should stay")):
            before, after = unpruned.get(metric), row.get(metric)
            if not missing(after):
                old, new = ("", percent(after)) if missing(before) else percents(before, after)
                was = f"{old} → " if old not in ("", new) else ""
                stays = ", does not change" if old == new else ""
                name = f"{METRICS[metric]} rate{harm_terms(record)}" if metric == "harm" else METRICS[metric]
                tiles.append((kind, new, was, f"{prefix}{name}; {words}{stays}"))
    checks = record.get("checks") or ()
    if checks:
        held = sum(check["holds"] for check in checks)
        tiles.append(("kept" if held == len(checks) else "harm", f"{held} of {len(checks)}", "", "checks hold"))
    items = [
        f'<div class="tile {kind}"><b><i>{escape(was)}</i>{escape(value)}</b><p>{escape(words)}</p></div>'
        for kind, value, was, words in tiles
    ]
    return f'<div class="tiles">{"".join(items)}</div>' if items else ""


def _notes(record: Mapping[str, Any]) -> str:
    notes = [note for note in record.get("notes") or () if clean(note)]
    if not notes:
        return ""
    items = "".join(f"<li>{escape(clean(note))}</li>" for note in notes)
    return f'<section class="notes"><strong>Keep in mind</strong><ul>{items}</ul></section>'


def _checks(record: Mapping[str, Any]) -> str:
    checks = record.get("checks") or ()
    if not checks:
        return ""
    rows = "".join(
        f"<tr{'' if check['holds'] else ' class=failed'}><td>{escape(clean(check['claim']))}</td>"
        f"<td>{check_value(check.get('value'))}</td><td>{escape(bound(check.get('bound')))}</td>"
        f"<td>{'<span class=pass>✓ holds</span>' if check['holds'] else '<span class=fail>✗ fails</span>'}</td></tr>"
        for check in checks
    )
    table = (
        "<table><thead><tr><th>claim</th><th>measured</th><th>expected</th><th>verdict</th></tr></thead>"
        f"<tbody>{rows}</tbody></table>"
    )
    return _section("Checks", f"<p>{escape(checks_summary(record))}</p>{_scrolling(table)}")


def _results(record: Mapping[str, Any]) -> str:
    rows = result_rows(record)
    if not rows:
        return ""
    rates, extras = measured(rows), extra_columns(rows)
    heads = ["weights", "removed", *(f"{METRICS[name]}, %" for name in rates), *map(clean, extras)]
    groups = [(model, [_result_row(record, row, rates, extras) for row in mine]) for model, mine in grouped(rows)]
    words = "".join(f"<h3>{name}</h3>{_definition_list(group)}" for name, group in definitions(record))
    key = f"<details><summary>What these words mean</summary>{words}</details>" if words else ""
    sure = measurements_table(record)
    inner = f"<summary>Sample sizes and 95 % intervals</summary>{_scrolling(_plain_table(sure))}"
    sizes = f"<details>{inner}</details>" if sure.rows else ""
    return _section("Results", f"<p>{escape(noise(record))}</p>{key}{_grouped_table(heads, groups)}{sizes}")


def _result_row(record: Mapping[str, Any], row: Mapping[str, Any], rates: Iterable[str], extras: Iterable[str]) -> str:
    cells = [f"<td>{count(row.get('pruned'))}</td>"]
    for name in rates:
        value = row.get(name)
        kind = "bar harm" if name == "harm" else "bar"
        bar = "" if missing(value) else f' class="{kind}" style="--share:{100 * value:.1f}%"'
        cells.append(f"<td{bar}>{rate_cell(value)}</td>")
    cells += [f"<td>{escape(cell(row.get(name)))}</td>" for name in extras]
    return _row(record, row["mask"], cells)


def _plot(plot: Plot) -> str:
    words = " ".join(escape(part) for part in (plot.reading, plot.caption) if part)
    finding = f"<p>{escape(plot.finding)}</p>" if plot.finding else ""
    label = escape(f"{plot.title}. {plot.finding} {plot.reading}", quote=True)
    style = f"width:{96 * plot.size[0]:.0f}px"
    picture = _scrolling(f'<div class="picture" role="img" aria-label="{label}" style="{style}">{plot.svg()}</div>')
    numbers = (
        f"<details><summary>The numbers</summary>{_scrolling(_plain_table(plot.table))}</details>"
        if plot.table.rows
        else ""
    )
    figure = f"<figure>{picture}<figcaption>{words}</figcaption></figure>"
    return _section(plot.title, f"{finding}{figure}{numbers}")


def _skills(record: Mapping[str, Any]) -> str:
    rows = record.get("skills") or ()
    if not rows:
        return ""
    skills = list(dict.fromkeys(row["skill"] for row in rows))
    scores = {(row["model"], row["mask"], row["skill"]): row.get("score") for row in rows}
    groups = []
    for model, mine in grouped(rows):
        masks = dict.fromkeys(row["mask"] for row in mine)
        cells = {mask: [f"<td>{rate_cell(scores.get((model, mask, s)))}</td>" for s in skills] for mask in masks}
        groups.append((model, [_row(record, mask, cells[mask]) for mask in masks]))
    table = _grouped_table(["weights", *(f"{clean(skill)}, %" for skill in skills)], groups)
    return _section("Benign skills one by one", f"<p>These are the skills that utility sums up.</p>{table}")


def _row(record: Mapping[str, Any], mask: str, cells: Iterable[str]) -> str:
    """A table row from cells that are markup."""
    chosen = ' class="chosen"' if role(record, mask) == "method" else ""
    return f'<tr{chosen}><th scope="row">{escape(mask_label(record, mask))}</th>{"".join(cells)}</tr>'


def _grouped_table(heads: Sequence[str], groups: Iterable[tuple[str, list[str]]]) -> str:
    """A table of rows (markup) under the names of models."""
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    body = "".join(
        f'<tr class="group"><th colspan="{len(heads)}" scope="rowgroup">{escape(model_label(model))}</th></tr>'
        + "".join(rows)
        for model, rows in groups
    )
    table = f'<table class="grouped upright"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return _scrolling(table)


def _details(record: Mapping[str, Any]) -> str:
    parts = [
        (name.capitalize(), {key: cell(value) for key, value in record[name].items()})
        for name in ("settings", "model", "environment")
        if record.get(name)
    ]
    masks = {row["mask"]: cell({k: v for k, v in row.items() if k != "mask"}) for row in record.get("masks") or ()}
    if masks:
        parts.append(("Masks", masks))
    timings = record.get("timings") or {}
    if timings:
        parts.append(("Timings", {key.removesuffix("_s").replace("_", " "): seconds(v) for key, v in timings.items()}))
    other = {key: cell(value) for key, value in record.items() if key not in _KNOWN}
    if other:
        parts.append(("Other entries of the record", other))
    if not parts:
        return ""
    inner = "".join(f"<h3>{name}</h3>{_definition_list(group.items())}" for name, group in parts)
    names = ", ".join(name.lower() for name, _ in parts)
    return _section("How this was made", f"<details><summary>{escape(names.capitalize())}</summary>{inner}</details>")


def _footer(record: Mapping[str, Any]) -> str:
    version = clean((record.get("environment") or {}).get("fastprune") or "")
    return (
        f"<footer>Made by fastprune{' ' + escape(version) if version else ''} from <code>record.json</code>, "
        "which holds every number in full precision.</footer>"
    )


def _section(title: str, inner: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{inner.replace('<p></p>', '')}\n</section>"


def _scrolling(content: str) -> str:
    return f'<div class="scroll" tabindex="0">{content}</div>'


def _plain_table(table: Table) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in table.heads)
    rows = "".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in table.rows)
    kind = ' class="upright"' if len(table.heads) > 5 else ""
    return f"<table{kind}><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _definition_list(pairs: Iterable[tuple[str, str]]) -> str:
    items = "".join(f"<dt>{escape(clean(word))}</dt><dd>{escape(meaning)}</dd>" for word, meaning in pairs)
    return f"<dl>{items}</dl>"
