"""The only room that knows verl: its trainers, workers and engines, its queue, and the names of our fields in it."""

import verl  # noqa: F401 - first, so that our hooks on its registries are there before a module of this folder loads one
