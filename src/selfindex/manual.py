"""A text that is there wherever Python is, for what is measured once on some text."""


def manual() -> str:
    """CPython's reference manual, as `help()` shows it."""
    from pydoc_data import topics

    return "\n".join(topics.topics[key] for key in sorted(topics.topics))
