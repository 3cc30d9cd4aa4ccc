"""Watching runs: what a run's folder says of it, judged, counted and drawn; any folder, and nothing of it is believed."""
