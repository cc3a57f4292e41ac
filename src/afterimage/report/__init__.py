"""Reports made from run folders: tables, figures, report.md and the HTML page.

Never imports torch; imports matplotlib only to draw.
"""

from afterimage.report.write import write_report
