"""Networks and plans as pictures and text, made from shapes alone."""

from __future__ import annotations

from tensormoe._drawing._network import draw_network
from tensormoe._drawing._program import draw_program
from tensormoe._drawing._shapes import Drawing
from tensormoe._drawing._text import Role, network_lines

__all__ = ["Drawing", "Role", "draw_network", "draw_program", "network_lines"]
