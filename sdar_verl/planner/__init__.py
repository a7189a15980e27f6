"""Will it fit, what does it cost: memory per GPU and phase, time per step, GPU-hours (docs/planner.md)."""
