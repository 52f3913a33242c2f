"""`tunesmith schema`: print the JSON schema of the recipe."""

from __future__ import annotations

import json


def schema() -> None:
    from tunesmith.config.describe import recipe_schema

    print(json.dumps(recipe_schema(), indent=2, ensure_ascii=False))
