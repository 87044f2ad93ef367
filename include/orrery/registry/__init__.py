"""Versions and aliases in MLflow: register, promote, rollback."""
