"""What a run leaves behind and what is made of it: record, traces, report, comparison (docs/report.md)."""
