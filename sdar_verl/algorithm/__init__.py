"""The method itself, in pure torch: gates, objectives, the gated loss, advantages. No verl, Ray or I/O at import."""

# Schedules and signals in files of their own: imported here, they are registered whichever module comes first.
from sdar_verl.algorithm import hand_over as hand_over
from sdar_verl.algorithm import turn_signals as turn_signals
