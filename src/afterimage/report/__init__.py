"""Reports from run folders alone: tables, figures, report.md, the page. No torch; matplotlib only once it draws."""

from afterimage.report.page.page import write_page
from afterimage.report.rows import Row, Rows, Unfinished, read_rows
from afterimage.report.tables import console_table, csv_table, latex_table, markdown_table
from afterimage.report.write import write_report
from afterimage.runs.results import Score

__all__ = [
    "Row",
    "Rows",
    "Score",
    "Unfinished",
    "console_table",
    "csv_table",
    "latex_table",
    "markdown_table",
    "read_rows",
    "write_page",
    "write_report",
]
