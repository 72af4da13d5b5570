"""Run folders: files, tables and commits that survive a stop at any moment."""
