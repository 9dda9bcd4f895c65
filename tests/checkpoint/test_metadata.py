"""state.json of other versions: earlier formats are converted, later ones refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpt2box.checkpoint.metadata import FORMAT_VERSION
from gpt2box.errors import BadInput
from tests.helpers.training import train


def test_later_formats_are_refused_and_earlier_ones_converted(
    volumes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(max_steps=20, eval_interval=10)
    path = volumes / "runs/run/checkpoints" / "step-00000020/state.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"format": FORMAT_VERSION + 1}))
    with pytest.raises(BadInput, match=rf"later version of gpt2box: format {FORMAT_VERSION + 1}"):
        train(max_steps=20, eval_interval=10)
    assert len(content["recent_losses"]) == 20
    for version, missing in ((1, ("bad_steps", "rollbacks", "recent_losses")), (2, ("recent_losses",)), (3, ())):
        earlier = {key: value for key, value in content.items() if key not in missing}
        if "rollbacks" in earlier:
            earlier["rollbacks"] = [{"step": 10, "left_out": 0}]
        path.write_text(json.dumps(earlier | {"format": version}))
        capsys.readouterr()
        train(max_steps=20, eval_interval=10)
        said = capsys.readouterr().err
        assert "finished at step 20" in said and "passed over" not in said
