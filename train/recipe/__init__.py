"""Recipes: their keys, the registries of tasks and data sources, reading, validation and migration."""
