"""Data sets: their classes."""

from __future__ import annotations

from panfpn_fast.data.categories import Categories, Category, get_categories

__all__ = ["Categories", "Category", "get_categories"]
