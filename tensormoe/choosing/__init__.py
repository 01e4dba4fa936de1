"""Choosing before training: one function from a question to all of its answers, as plain values."""

from __future__ import annotations
