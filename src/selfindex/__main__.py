"""`python -m selfindex` is the command `selfindex`."""

from .cli import app

app(prog_name="selfindex")
