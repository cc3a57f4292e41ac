"""Reports from run folders alone: tables, figures, report.md, the page. No torch; matplotlib only once it draws."""

from afterimage.report.write import write_report
