"""What a chain will cost, before it runs: operations, bytes and hours per stage, and what more workers make of them."""

from pipeline.plan.work import Estimate, estimate, table

__all__ = ["Estimate", "estimate", "table"]
