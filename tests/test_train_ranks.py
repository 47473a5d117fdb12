from __future__ import annotations

import pytest
import ranks


@pytest.mark.parametrize("stage", [0, 2])
def test_two_ranks_train_and_rate_as_the_method_says(stage):
    code, output = ranks.start("torchrun", 2, "train_worker.py", str(stage))
    assert code == 0 and "equal within" in output, output
