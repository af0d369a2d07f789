"""Tool calls: one incremental parser and a table of formats."""
