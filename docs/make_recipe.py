"""Write docs/recipe.md, the reference of the recipe, from the fields themselves.

python docs/make_recipe.py           # write it
python docs/make_recipe.py --check   # exit 1 if it is not current
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from tunesmith.config.dump import plain_default
from tunesmith.config.schema import MAIN_KEYS, SCIENCE, Recipe, SourceSection

PAGE = Path(__file__).resolve().parent / "recipe.md"
HEAD = """# The recipe

<!-- Written by docs/make_recipe.py from src/tunesmith/config/sections/. Change it there. -->

A recipe is a YAML file of sections. Only `model` and `data.train` have no default. `tunesmith init`
writes a starter with every key in it; `tunesmith schema` prints the JSON schema for an editor.

- An unknown key is an error that names the nearest known one. All errors are reported at once,
  each with its line. Names that TRL, Axolotl, LLaMA-Factory, Unsloth and torchtune use are
  recognised, and the error says what they are called here.
- On the command line `section.key=value` changes a recipe: `tunesmith train recipe.yaml
  optim.lr=1e-4 adapter=lora`.
- A plain value for a whole section stands for its main key, which is in **bold** below:
  `model: M` is `model: {{name: M}}`.
- `2e-5` is a number, although YAML 1.1 reads text there.
- Paths are read from the folder the command runs in; data that is not there is looked for beside
  the recipe.
- `{science}` say what is learned; the other sections change nothing of the result beyond rounding.
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD.format(science="` `".join(SCIENCE))]
    for name, info in Recipe.model_fields.items():
        section: Any = info.annotation
        parts.append(f"\n## {name}\n\n{_sentence(info.description or '')}\n")
        parts.append(_table(section, main=MAIN_KEYS[name]))
    parts.append(
        "\n## An item of data.train and data.eval\n\nA path, or a mapping with these keys.\n"
    )
    parts.append(_table(SourceSection, main="path"))
    return "".join(f"{part.strip()}\n\n" for part in parts).rstrip() + "\n"


def _table(section: type[BaseModel], *, main: str) -> str:
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for key, field in section.model_fields.items():
        shown = f"**`{key}`**" if key == main else f"`{key}`"
        lines.append(f"| {shown} | {_default(field)} | {_meaning(field)} |")
    return "\n".join(lines) + "\n"


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined and field.default_factory is None:
        return "required"
    text = yaml.safe_dump(plain_default(field), default_flow_style=True, width=1000)
    return f"`{text.removesuffix(chr(10)).removesuffix('...').strip()}`"


def _meaning(field: FieldInfo) -> str:
    text = (field.description or "").replace("|", "\\|")
    if get_origin(field.annotation) is Literal:
        words = [f"`{word}`" for word in get_args(field.annotation)]
        text += f"; one of {', '.join(words)}" if len(words) > 1 else ""
    return text


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def main() -> None:
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page(), encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != page():
        sys.exit("docs/recipe.md is not current: run `python docs/make_recipe.py`")


if __name__ == "__main__":
    main()
