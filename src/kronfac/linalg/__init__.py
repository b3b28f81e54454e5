"""Symmetric products and safe factorisations."""
