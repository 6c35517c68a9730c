"""ONNX Runtime as an engine: graphs by transformers' own exporter, weights in our codes."""
