"""Raw data in, clean data out: ingest, validate, and reading committed tables."""
