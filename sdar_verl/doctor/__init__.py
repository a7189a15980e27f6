"""``sdar-verl doctor``: what is wrong with an installation or a run, before anything is started."""
