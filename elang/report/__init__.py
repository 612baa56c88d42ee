"""A run to look at: one self-contained page, and its figures as PNGs. From what a run left, without its models."""

from elang.report.figures import Chart, charts
from elang.report.images import save_images
from elang.report.page import page
from elang.report.points import Points, operating_points, outcomes
from elang.report.run import Run, load_run

__all__ = ["Chart", "Points", "Run", "charts", "load_run", "operating_points", "outcomes", "page", "save_images"]
