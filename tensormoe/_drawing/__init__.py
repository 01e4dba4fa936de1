"""Networks and plans as pictures and text, made from shapes alone."""

from __future__ import annotations

from tensormoe._drawing._network import draw_network as draw_network
from tensormoe._drawing._program import draw_program as draw_program
from tensormoe._drawing._shapes import Drawing as Drawing
from tensormoe._drawing._text import Role as Role
from tensormoe._drawing._text import network_lines as network_lines

__all__ = ["Drawing", "Role", "draw_network", "draw_program", "network_lines"]
