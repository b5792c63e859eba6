"""The report: the run's summary.json and the page that shows it."""

from vocabshrink.pages.report import write_report
from vocabshrink.run.engine import Context


def report(context: Context) -> dict:
    """Writes report.html of whatever the run's folder holds."""
    return {"report": write_report(context.dir).name}
