"""From text to vectors: a small transformer in ONNX, and BM25's term weights."""
