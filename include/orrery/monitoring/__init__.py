"""What was promised against what happened: performance, drift, and the verdict on both."""
