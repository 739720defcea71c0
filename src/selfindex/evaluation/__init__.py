"""Quality measured against the dense model and against other caches; `selfindex eval` runs it."""
