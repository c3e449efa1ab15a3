"""`similarity`: how alike the experts of a mixture are, how far from the dense FFN and from an earlier checkpoint.

Read straight from the files, a layer at a time and some neurons of it at a time; no model is built.
"""

from __future__ import annotations

from prismoe.routing.likeness import Duplicate, Similarity

__all__ = ["Duplicate", "Similarity"]
