"""Reports: what runs or an experiment came to, as one page to read, or as a table."""

from safe_lab.report.page import write_page
from safe_lab.report.source import Source, read_source
from safe_lab.report.tables import to_csv, to_latex, to_markdown

__all__ = ["Source", "read_source", "to_csv", "to_latex", "to_markdown", "write_page"]
