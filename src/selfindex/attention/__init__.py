"""Attention over decoded pages and full-precision tokens, merged by log-sum-exp."""
