"""Networks and plans as pictures and text, made from shapes."""
