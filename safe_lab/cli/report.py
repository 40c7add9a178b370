"""``safe-lab report``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from safe_lab.cli.words import Parser, refuse, wide_console

FORMATS = ("html", "md", "csv", "latex")


def report(arguments: Sequence[str]) -> int:
    """``safe-lab report``: what runs or an experiment came to, as one page to read, or as a table."""
    parser = Parser(
        prog="safe-lab report",
        description="Write what runs came to: as one HTML file that needs no network, or as a table for a README (md), a "
        "spreadsheet (csv) or a paper (latex). Variants are held against a baseline, with the statistics that their seeds allow.",
    )
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="run folders, folders of runs, or an experiment's folder or YAML"
    )
    parser.add_argument("--output", metavar="FILE", help="where to write; by itself standard output")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="by itself what the file's name ends with, or html; without a file, a table for the terminal",
    )
    parser.add_argument(
        "--baseline", metavar="VARIANT", help="what the others are held against; by itself none, or the first"
    )
    parser.add_argument(
        "--metric", metavar="FIGURE", help="figure that says how good a run is; by itself the task's main metric"
    )
    parser.add_argument(
        "--figures",
        metavar="FIGURE,...",
        help="what stands beside it, such as resources/memory_mean_bytes,resources/flops; by itself the experiment's figures",
    )
    parser.add_argument(
        "--margin", type=float, metavar="X", help="by how much of it a variant may be worse and count as no worse"
    )
    chosen = parser.parse_args(arguments)
    by_ending = {"html": "html", "htm": "html", "md": "md", "csv": "csv", "tex": "latex"}
    ending = (chosen.output or "").rpartition(".")[2].lower()
    form = chosen.format or ("terminal" if chosen.output is None else by_ending.get(ending, "html"))
    if form == "html" and chosen.output is None:
        parser.error("--output FILE: a page is not for a terminal; without --format a table is")

    from pathlib import Path

    from safe_lab import report as reporting
    from safe_lab.ablation.show import print_comparison
    from safe_lab.section import ConfigError
    from safe_lab.whole_file import whole_file

    tables = {"md": reporting.to_markdown, "csv": reporting.to_csv, "latex": reporting.to_latex}
    try:
        source = reporting.read_source(
            [Path(path) for path in chosen.paths],
            baseline=chosen.baseline,
            metric=chosen.metric,
            figures=None
            if chosen.figures is None
            else [one.strip() for one in chosen.figures.split(",") if one.strip()],
            margin=chosen.margin,
        )
        if form == "terminal":
            print_comparison(source.comparison, wide_console())
            return 0
        text = tables[form](source.comparison) if form in tables else reporting.write_page(source)
    except ConfigError as error:
        return refuse(error)
    if chosen.output is None:
        print(text, end="")
        return 0
    try:
        with whole_file(Path(chosen.output)) as stream:
            stream.write(text.encode())
    except OSError as error:
        print(f"{chosen.output}: cannot be written ({error})", file=sys.stderr)
        return 1
    print(chosen.output)
    return 0
