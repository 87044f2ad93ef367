"""The features' fixtures, for every test of the room."""

from features_house import define, project

__all__ = ["define", "project"]
