"""Makes text of others safe to show: in messages, in logs and on terminals."""


def escape(text: str, *, keep: str = "") -> str:
    r"""Replace characters that do not show as themselves by escapes such as `\x1b` and `\u202e`.

    These are controls (also C1, which terminals obey), line separators, characters without width, those that turn the
    direction of writing, and surrogates of bytes that are not UTF-8.

    Args:
        keep: characters that stay, such as line feeds.
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() or each in keep else ascii(each)[1:-1] for each in text)
