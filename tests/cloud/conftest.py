"""SageMaker, played; see tests/sagemaker_house.py."""

from sagemaker_house import sagemaker

__all__ = ["sagemaker"]
