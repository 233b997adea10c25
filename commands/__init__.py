"""What ``generate.py`` does beside one video: a file each."""
