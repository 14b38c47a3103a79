"""The report of a chain: what came out, shown so that it can be doubted, compared and passed on."""

from pipeline.report.inputs import ModelCard, ReportInputs, Trial
from pipeline.report.page import PAGE, Report, build_report

__all__ = ["PAGE", "ModelCard", "Report", "ReportInputs", "Trial", "build_report"]
