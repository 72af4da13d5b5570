"""Policies act in many environments at once; what happened becomes rows."""
