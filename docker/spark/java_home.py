"""Make, while the image is built, the JAVA_HOME that Spark can start with; print it."""

# ruff: noqa: T201  what it prints is for the terminal

import os

from orrery.scoring import java

print(java.find_home(os.environ))
