"""Kronecker-factored curvature for PyTorch that people can trust."""
