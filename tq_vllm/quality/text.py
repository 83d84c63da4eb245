"""The text that quality is measured on: Python's own documentation, which every Python ships."""

import hashlib

# Of CPython 3.11.7, the text of docs/quality.md. Other releases word some topics differently.
DOCUMENTED_SHA256 = "71f2ff5d99bdc1f9c48c5c2353ad138201c5ca1c377e0226857ef8fa89b8bcee"


def fixed_text() -> str:
    """The topics of Python's documentation in alphabetical order."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def text_sha256() -> str:
    """SHA-256 of `fixed_text()`, hexadecimal."""
    return hashlib.sha256(fixed_text().encode()).hexdigest()


def text_note() -> str:
    """Which text it is; a warning where it is not the one of the documented figures."""
    found = text_sha256()
    if found == DOCUMENTED_SHA256:
        return f"Text: Python's documentation, SHA-256 {found[:12]}."
    return (
        f"Text: this Python's documentation, SHA-256 {found[:12]}, is not that of docs/quality.md "
        f"({DOCUMENTED_SHA256[:12]}): compare rows of this run only."
    )
