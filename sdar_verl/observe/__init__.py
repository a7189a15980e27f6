"""What takes part in every step of the trainer: schedules, records, warnings."""
