"""All that knows TensorRT: building, loading and running engines."""
