"""What one device computes: the DeepSeek-V3 architecture, without any parallelism."""
