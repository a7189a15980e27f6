"""Privileged context: what the teacher sees and the student does not."""
