"""The method itself, in pure torch: gates, objectives, the gated loss, advantages. No verl, Ray or I/O at import."""
