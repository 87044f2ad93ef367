"""Makes `tests/` importable for what the rooms' tests share, and lends every room the real S3 server."""

from s3 import s3_bucket, s3_endpoint

__all__ = ["s3_bucket", "s3_endpoint"]
