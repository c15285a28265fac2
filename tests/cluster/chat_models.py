"""A small model that generates text and has a chat template, with an adapter that has a template of its own."""

from pathlib import Path

from tests.assets.adapters import AdapterSpec
from tests.assets.families import make_family

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OWN_TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }} <tool_call>\n{% endfor %}"
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
FAILING_TEMPLATE = "{{ raise_exception('only users may speak') }}{{ add_generation_prompt }}"


def make_chat_models(folder: Path) -> list[AdapterSpec]:
    """Write `folder`/model and `folder`/adapters. The second adapter has a template of its own, the third a bad one."""
    specs = make_family(folder, "llama")
    (folder / "model" / "chat_template.jinja").write_text(TEMPLATE)
    (specs[1].path / "chat_template.jinja").write_text(OWN_TEMPLATE)
    (specs[2].path / "chat_template.jinja").write_text(FAILING_TEMPLATE)
    return specs
