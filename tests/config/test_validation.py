"""Checks of all settings, each by itself and together."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2box.config import loader, schema, validation
from gpt2box.errors import BadInput


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_all_faults_are_reported_at_once_with_the_nearest_name(tmp_path: Path) -> None:
    path = write(
        tmp_path / "c.yaml", "dataset: x\nlearning_rat: 1\ndropout: 2\nmax_steps: many\nseed: 1.5\ncompile: 3\n"
    )
    with pytest.raises(BadInput) as raised:
        loader.load_config(path, {})
    text = raised.value.found
    assert "5 faults" in text
    assert "learning_rat: no such setting; did you mean learning_rate?" in text
    assert "dropout: found 2" in text and "max_steps: found 'many'" in text and "seed: found 1.5" in text


@given(
    st.dictionaries(
        st.sampled_from(sorted(schema.Config.model_fields)),
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
    )
)
def test_any_values_are_accepted_or_refused(values: dict[str, object]) -> None:
    try:
        loaded = validation.validate(values, "test")
    except BadInput:
        return
    micro_batch_size = 1 if loaded.micro_batch_size == "auto" else loaded.micro_batch_size
    assert loaded.tokens_per_step % (micro_batch_size * loaded.block_size) == 0
