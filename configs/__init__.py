"""Configurations shipped with the project."""
