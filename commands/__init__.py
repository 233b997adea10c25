"""What ``generate.py`` does beside making one video: a file a task."""
