"""The only room that knows verl: its trainers, workers and engines, its queue, and the names of our fields in it."""
