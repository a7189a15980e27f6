"""Being here puts tests/ on sys.path, so that tests import ``support``."""
