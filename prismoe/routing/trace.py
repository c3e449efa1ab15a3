"""`trace`: forward hooks on the stock routers of a mixture while it reads held-out text of each domain."""

from __future__ import annotations

from prismoe.routing.record import RoutingTrace

__all__ = ["RoutingTrace"]
