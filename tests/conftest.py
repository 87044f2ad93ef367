"""Makes `tests/` importable for what the rooms' tests share, and lends every room the real S3 server."""

from hypothesis import settings
from s3 import s3_bucket, s3_endpoint

# A busy machine may stop for longer than any example takes; how long one takes is not what is tested.
settings.register_profile("busy", deadline=None)
settings.load_profile("busy")

__all__ = ["s3_bucket", "s3_endpoint"]
