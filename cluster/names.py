"""Names of models and patterns of names: one rule for each, and the places where they are matched.

A name has 1 to 200 printable characters, in Unicode's normal form C; every other form of it is the same name. `/`
separates parts. No part is empty, starts with a dot, or starts or ends with a blank. A name does not start with `~`,
has no `\\`, `*` or `?`, and does not end with `@` and 16 hexadecimal digits, which is how revisions are named. An
adapter's name is none of the base model's names (`base.name` and `base.aliases`), and does not start with one of them
and a colon. All other characters, such as `:`, `@` and brackets, have no meaning in a name.

A pattern is a name in which `*` stands for any characters and `?` for one. Upper and lower case differ.

| place | matched with |
|---|---|
| `model` and `lora_path` of requests | a name of the base model; else an adapter's name, or its name and `@REVISION`; \
each also after a name of the base model and a colon |
| calls that load and unload adapters, configurations, `.ranklet/adapters.json` | an adapter's name |
| folders in `adapters_dir` | an adapter's name without `/`. Folders that start with a dot are no adapters |
| patterns of API keys and of quotas | an adapter's name, without base model and revision; all names of the base model |
| labels of metrics | see `ranklet.cluster.labels` |

`engine.base_aliases` is compared with what adapters' files say of their base model, which need not be a name.
"""

import fnmatch
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Final

MAX_NAME_CHARACTERS: Final = 200
_SPECIAL = re.compile(r"[\\*?]")
_ENDS_LIKE_REVISION = re.compile(r"@[0-9a-f]{16}$")


def normal_name(name: str) -> str:
    """Return the normal form of a name."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def spellings(name: str) -> Sequence[str]:
    """Return the forms that the file of a name may have: as given, composed, and decomposed as macOS writes it."""
    return tuple(dict.fromkeys((name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD")))))


def name_error(name: str, base_names: Iterable[str] = ()) -> str | None:
    """Return the reason why `name`, in its normal form, cannot be the name of an adapter, or None."""
    if not name or len(name) > MAX_NAME_CHARACTERS:
        return f"expected 1 to {MAX_NAME_CHARACTERS} characters, got {len(name)}"
    if not name.isprintable():
        wrong = next(character for character in name if not character.isprintable())
        return f"expected a name of printable characters, got {wrong!a}"
    if _SPECIAL.search(name):
        return "expected a name without '\\', '*' and '?'"
    if name.startswith("~") or any(map(_is_bad_part, name.split("/"))):
        return (
            "expected a name whose parts between '/' are not empty, do not start with a dot or '~', and neither start "
            "nor end with a blank"
        )
    if _ENDS_LIKE_REVISION.search(name):
        return "expected a name that does not end with '@' and 16 hexadecimal digits, as `name@revision` does"
    for base in base_names:
        if name == base or name.startswith(base + ":"):
            return (
                f"{base!r} is a name of the base model: expected another name, which does not start with {base + ':'!r}"
            )
    return None


def readings(name: str) -> tuple[str, ...]:
    """Return the names of adapters that `name` of a request may mean: itself, and what stands before a revision."""
    plain, at, _ = name.rpartition("@")
    return (name, plain) if at else (name,)


def matches(pattern: str, names: Iterable[str]) -> bool:
    """Return whether a pattern matches one of the names of a model."""
    plain = normal_name(pattern).replace("[", "[[]")  # brackets are special for fnmatch
    return any(fnmatch.fnmatchcase(name, plain) for name in names)


def _is_bad_part(part: str) -> bool:
    return not part or part.startswith(".") or part != part.strip()
