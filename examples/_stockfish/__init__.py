"""Parts of the example on the experts in Debian's stockfish."""
