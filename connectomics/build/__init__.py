"""Composition root: configuration in, objects out. The only room below the command line that reads configuration."""
