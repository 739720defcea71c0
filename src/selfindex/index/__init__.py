"""The index: tables, scores and selection."""
