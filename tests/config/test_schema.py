"""The definition of the settings."""

from __future__ import annotations

from gpt2box.config import schema


def test_every_setting_has_a_description_and_a_group() -> None:
    for key, field in schema.Config.model_fields.items():
        assert field.description and isinstance(field.json_schema_extra, dict) and field.json_schema_extra["group"], key
