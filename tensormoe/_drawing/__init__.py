"""Networks and plans as pictures and text, made from shapes alone."""

from __future__ import annotations

from tensormoe._drawing._network import draw_network as draw_network
from tensormoe._drawing._program import draw_program as draw_program
from tensormoe._drawing._shapes import Drawing as Drawing

__all__ = ["Drawing", "draw_network", "draw_program"]
