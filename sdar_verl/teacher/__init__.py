"""The privileged teacher: where its weights come from, how the rows it reads are made."""
